"""What the classes look like at their coarsest: means and covariances of low cosine coefficients.

Every sum is one of whole numbers below 2^53, so that it is the same in every order, and parts add
up to the whole. (Normalized pixels, of which they are made, may differ in their last bit from one
kind of device to another.)
"""

import math

import torch
from torch import Tensor

from .cosine import images_of, waves
from .errors import UsageError
from .sets import Card

STEPS = 2**16  # in which pixels and coefficients are counted
FINE = 2**15  # in which waves are
MOST = 16 * STEPS  # normalized values beyond 16 deviations are cut
MOST_LENGTH = 1024  # coefficients of an image: their products fill a square of it
FEWEST = 50  # images of a class, below which what is drawn may come near one of them
BLOCK = 4096  # images: so many squares add up to less than 2^53


def check_moments(card: Card, size: int) -> None:
    """Refuse more frequencies than an image of a card has, or than can be held.

    Raises: UsageError.
    """
    least, length = min(card.shape), moments_shape(card, size)[1]
    if size > least or length > MOST_LENGTH:
        raise UsageError(
            f"found moments {size} for images of {'x'.join(map(str, card.shape))}; expected at "
            f"most {least}, and {MOST_LENGTH} coefficients in all (found {length})"
        )


def moments_shape(card: Card, size: int) -> tuple[int, int]:
    """Return the shape of one class's moments: the sum of coefficients above that of products."""
    length = card.channels * size ** len(card.shape)
    return (1 + length, length) if size else (0, 0)


def coefficients_of(images: Tensor, size: int) -> Tensor:
    """Return the lowest cosine coefficients of normalized images [n, c, ...], int64 [n, d].

    a_u = mean over x of images_x w_u(x), where w_u is the product over axes of sqrt(2)
    cos(pi u (x + 1/2) / h), or 1 for u = 0; u runs over 0 to `size` - 1 along each axis. The
    coefficients do not depend on the resolution, as far as that shows them. In steps of 2^-16.
    """
    values = (images.double() * STEPS).round().clamp(-MOST, MOST)
    for axis in range(2, images.ndim):
        side = images.shape[axis]
        # Waves whose squares have a mean of 1.
        fine = (waves(side)[:size] * math.sqrt(side) * FINE).round().to(values)
        total = values.movedim(axis, -1) @ fine.t()
        # By a tensor: a GPU would multiply by the inverse of a number, which breaks halves.
        values = (total / total.new_tensor(FINE * side)).round().movedim(-1, axis)
    return values.clamp(-MOST, MOST).flatten(1).long()


def moments_of(images: Tensor, labels: Tensor, classes: int, size: int) -> Tensor:
    """Return the moments of normalized images [n, c, ...] by class, int64 [k, 1 + d, d].

    Row 0 is the sum of the coefficients, the rest the sum of their products.
    """
    if not size:
        return torch.zeros((classes, 0, 0), dtype=torch.int64)
    found = []
    for number in range(classes):
        rows = coefficients_of(images[labels == number], size).double()
        length = rows.shape[1]
        total = torch.zeros((1 + length, length), dtype=torch.int64, device=rows.device)
        for part in rows.split(BLOCK):
            total += torch.cat([part.sum(0, keepdim=True), part.t() @ part]).long()
        found.append(total)
    return torch.stack(found)


def possible(moments: Tensor, counts: Tensor) -> bool:
    """Say whether so many images can have such moments."""
    first, second = moments[:, 0].double().abs(), moments[:, 1:].double().abs()
    each = counts.double().view(-1, 1)
    return bool((first <= MOST * each).all() and (second <= MOST**2 * each.unsqueeze(-1)).all())


def images_like(
    moments: Tensor, count: int, number: int, card: Card, generator: torch.Generator
) -> Tensor:
    """Return so many normalized images [number, c, ...] from the Gaussian that has the moments.

    a ~ N(mean, covariance) of the class's coefficients, and images_x = sum_u a_u w_u(x).
    Shapes: moments int64 [1 + d, d] of one class, of `count` images.
    """
    held = moments.cpu().double() / count
    mean = held[0] / STEPS
    covariance = held[1:] / STEPS**2 - torch.outer(mean, mean)
    values, vectors = torch.linalg.eigh(covariance)
    drawn = torch.randn((number, len(mean)), generator=generator, dtype=torch.float64)
    rows = mean + (drawn * values.clamp_min(0).sqrt()) @ vectors.t()
    size = round((len(mean) / card.channels) ** (1 / len(card.shape)))
    whole = torch.zeros((number, card.channels, *card.shape), dtype=torch.float64)
    low = (slice(None), slice(None), *[slice(size)] * len(card.shape))
    whole[low] = rows.view(number, card.channels, *[size] * len(card.shape))
    return images_of(whole * math.sqrt(math.prod(card.shape))).float()
