"""The path of images through a network, in blocks that fit the cache."""

import copy

import torch
from torch import Tensor, nn

from .augment import Augmentation, Draw
from .backbones import Network, levels_of
from .compute import PLAIN, Compute
from .sets import RealSet

READ = 1024  # images drawn from a real set at once


def extract(
    network: Network, images: Tensor, compute: Compute = PLAIN, *, levels: bool = False
) -> Tensor:
    """Return features [n, d] of normalized images, with a gradient where the caller keeps one.

    With `levels` what all stages of the network give, side by side. Always float32. Networks that
    mix the images of a batch see them all at once.
    """
    run = compute.path(_levels if levels else _features)
    last = torch.channels_last if images.ndim == 4 else torch.channels_last_3d
    blocks = compute.blocks(images, whole=network.mixes_images)
    parts = [run(network.body, block.contiguous(memory_format=last)) for (block,) in blocks]
    return torch.cat(parts)[: len(images)]


def _features(body: nn.Module, block: Tensor) -> Tensor:
    maps: Tensor = body(block)
    return maps.flatten(1)


def _levels(body: nn.Module, block: Tensor) -> Tensor:
    return torch.cat(levels_of(body, block), 1)


@torch.no_grad()
def extract_fast(
    network: Network,
    images: Tensor,
    compute: Compute = PLAIN,
    *,
    levels: bool = False,
    fill: bool = False,
) -> Tensor:
    """Return features float32 [n, d] of normalized images without a gradient.

    Equals `extract` to the rounding of the precision that `compute` names; `fill` is that of
    Compute.blocks.
    """
    body = network.body
    if compute.dtype != torch.float32:
        body = copy.deepcopy(body).to(compute.dtype)
    run = compute.path(_levels if levels else _features)
    last = torch.channels_last if images.ndim == 4 else torch.channels_last_3d
    blocks = compute.blocks(images, whole=network.mixes_images, fill=fill)
    parts = [run(body, part.to(compute.dtype, memory_format=last)).float() for (part,) in blocks]
    return torch.cat(parts)[: len(images)]


def of_set(network: Network, real: RealSet, compute: Compute = PLAIN) -> Tensor:
    """Return features [n, d] of a real set's images, read in order, without a gradient."""
    blocks = torch.arange(len(real)).split(READ)
    return torch.cat([extract_fast(network, real.normalized(part), compute) for part in blocks])


@torch.no_grad()
def class_means(
    network: Network,
    real: RealSet,
    augmentation: Augmentation,
    draw: Draw,
    compute: Compute = PLAIN,
) -> Tensor:
    """Return the mean features [k, d] of all images of each class under one draw.

    Sums are float32 within a read and float64 across reads, so that long sets lose nothing.
    """
    means = []
    for members in real.by_class:
        total = torch.zeros((), dtype=torch.float64, device=real.device)
        for part in members.split(READ):
            images = augmentation.apply(real.normalized(part), draw)
            total = total + extract_fast(network, images, compute).sum(0).double()
        means.append((total / len(members)).float())
    return torch.stack(means)


@torch.no_grad()
def logits_of_set(network: Network, real: RealSet) -> Tensor:
    """Return logits [n, k] of a real set's images, in the machine's own memory.

    The network is trained, and in evaluation mode while they are computed.
    """
    network.eval()
    blocks = torch.arange(len(real)).split(READ)
    logits = [network.head(extract_fast(network, real.normalized(part))).cpu() for part in blocks]
    network.train()
    return torch.cat(logits)
