"""The path of images through a network, in blocks that fit the cache."""

import torch
from torch import Tensor

from .backbones import BLOCK, Network
from .sets import RealSet

READ = 1024  # images drawn from a real set at once


def extract(network: Network, images: Tensor) -> Tensor:
    """Return features [n, d] of normalized images, with a gradient where the caller keeps one.

    Networks that mix the images of a batch see them all at once.
    """
    if network.mixes_images:
        return network.features(images)
    return torch.cat([network.features(block) for block in images.split(BLOCK)])


@torch.no_grad()
def of_set(network: Network, real: RealSet) -> Tensor:
    """Return features [n, d] of a real set's images, read in order, without a gradient."""
    blocks = torch.arange(len(real)).split(READ)
    return torch.cat([extract(network, real.normalized(part)) for part in blocks])


@torch.no_grad()
def logits_of_set(network: Network, real: RealSet) -> Tensor:
    """Return logits [n, k] of a real set's images by a trained network in evaluation mode."""
    network.eval()
    blocks = torch.arange(len(real)).split(READ)
    logits = [network.head(extract(network, real.normalized(part))) for part in blocks]
    network.train()
    return torch.cat(logits)
