"""The path of images through a network, in blocks that fit the cache."""

import copy
from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .augment import Augmentation, Draw
from .backbones import Network, channels_last, levels_of
from .backbones.convolution import OfImages
from .compute import PLAIN, Compute
from .errors import DataError, UsageError
from .pixels import Whitening
from .sets import RealSet

READ = 1024  # images drawn from a real set at once, or fewer:
READ_PIXELS = 2**23
MOST_WHITENED = 3 * 64 * 64  # numbers of an image; their covariance then takes 1.2 GB
# Numbers of the first maps (images' pixels times the first weights' outputs). With more, maps are
# not kept for the way back but made anew: of a ConvNet they would take about 1 GB and more.
KEPT = 2**27
LEAST_MAPS = 32  # counted where there are fewer, and for bodies that begin with something else


def extract(
    network: Network, images: Tensor, compute: Compute = PLAIN, *, levels: bool = False
) -> Tensor:
    """Return features [n, d] of normalized images, with a gradient where the caller keeps one.

    With `levels` what all stages of the network give, side by side. Always float32. Networks that
    mix the images of a batch see them all at once. Many pixels with a gradient pass twice, so that
    memory grows with the images and not with all their maps.
    """
    run = compute.path(_levels if levels else _features)
    maps = max([LEAST_MAPS, *(len(p) for p in islice(network.body.parameters(), 1))])
    if images.requires_grad and images[:, 0].numel() * maps > KEPT:
        run = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
    last = channels_last(images.ndim)
    blocks = compute.blocks(images, whole=network.mixes_images)
    parts = [run(network.body, block.contiguous(memory_format=last)) for (block,) in blocks]
    return torch.cat(parts)[: len(images)]


def fixed(network: Network) -> Network:
    """Return the network, from now on without gradients in its parameters.

    Compiled code would compute them whether they are wanted or not: a third of a step's time.
    Images have a faster way back then (`OfImages`): networks whose parameters are given anew in
    each call are not for this.
    """
    for name, layer in islice(network.body.named_children(), 1):
        if OfImages.can_be(layer):
            setattr(network.body, name, OfImages(layer))
    return network.requires_grad_(False)


def lowered(network: Network, compute: Compute) -> Network:
    """Return the network with its body in the precision of the fast path: itself if that is so.

    The copy takes as long as a block or two, so who calls `extract_fast` often makes it once.
    """
    if all(tensor.dtype == compute.dtype for tensor in network.body.parameters()):
        return network
    copied = copy.deepcopy(network)
    copied.body.to(compute.dtype)
    return copied


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
    body = lowered(network, compute).body
    run = compute.path(_levels if levels else _features)
    last = channels_last(images.ndim)
    blocks = compute.blocks(images, whole=network.mixes_images, fill=fill)
    parts = [run(body, part.to(compute.dtype, memory_format=last)).float() for (part,) in blocks]
    return torch.cat(parts)[: len(images)]


def of_set(network: Network, real: RealSet, compute: Compute = PLAIN) -> Tensor:
    """Return features [n, d] of a real set's images, read in order, without a gradient.

    Raises: DataError when they are not finite.
    """
    blocks = torch.arange(len(real)).split(read_size(real))
    found = [extract_fast(network, real.normalized(part), compute) for part in blocks]
    return _finite(torch.cat(found), real)


def _finite(found: Tensor, real: RealSet) -> Tensor:
    """Refuse what would spoil all that is computed of it, without a word.

    Raises: DataError.
    """
    if not bool(found.isfinite().all()):
        raise DataError(
            f"{real.card.name}: found features that are not finite; expected numbers: look at the "
            "images, their mean and std"
        )
    return found


def read_size(real: RealSet) -> int:
    """Return how many images of a set are drawn at once."""
    return max(1, min(READ, READ_PIXELS // real.images[0].numel())) if len(real) else READ


def whitening_of(real: RealSet, ridge: float = 0.1) -> Whitening:
    """Return the ZCA map of a real set's normalized images: one pass, float64 sums.

    Raises: UsageError when an image has more numbers than a matrix of them fits memory.
    """
    size = real.images[0].numel()
    if size > MOST_WHITENED:
        shape = "x".join(map(str, real.images.shape[1:]))
        raise UsageError(
            f"found images of {shape} for ZCA; expected {MOST_WHITENED} numbers or fewer (64 x 64 "
            "in color): leave out --zca"
        )
    total = torch.zeros(size, dtype=torch.float64, device=real.device)
    products = torch.zeros(size, size, dtype=torch.float64, device=real.device)
    for part in torch.arange(len(real)).split(read_size(real)):
        rows = real.normalized(part).flatten(1).double()
        total += rows.sum(0)
        products += rows.T @ rows
    mean = total / len(real)
    return Whitening.of(mean, products / len(real) - torch.outer(mean, mean), ridge)


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
    Raises: DataError when they are not finite.
    """
    means = []
    for members in real.by_class:
        total = torch.zeros((), dtype=torch.float64, device=real.device)
        for part in members.split(read_size(real)):
            images = augmentation.apply(real.normalized(part), draw)
            total = total + extract_fast(network, images, compute).sum(0).double()
        means.append((total / len(members)).float())
    return _finite(torch.stack(means), real)


@torch.no_grad()
def logits_of_set(network: Network, real: RealSet, compute: Compute = PLAIN) -> Tensor:
    """Return logits [n, k] of a real set's images, in the machine's own memory.

    The network is trained, and in evaluation mode while they are computed.
    """
    network.eval()
    blocks = torch.arange(len(real)).split(read_size(real))
    logits = [
        network.head(extract_fast(network, real.normalized(part), compute)).cpu() for part in blocks
    ]
    network.train()
    return torch.cat(logits)
