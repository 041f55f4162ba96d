"""The cosine series of images: an orthonormal basis in which smooth images are short."""

import math

import torch
from torch import Tensor


def series(images: Tensor) -> Tensor:
    """Return the coefficients of images [n, c, ...] over their spatial axes, of the same shape.

    a_u = sum_x images_x sqrt(2 / h) cos(pi u (x + 1/2) / h) along each axis of length h, a_0
    divided by sqrt(2): the orthonormal DCT-II, so sums of squares are kept.
    """
    for axis in range(2, images.ndim):
        images = _along(images, waves(images.shape[axis]).to(images), axis)
    return images


def images_of(coefficients: Tensor) -> Tensor:
    """Return the images of a cosine series: the inverse of `series`, its transpose."""
    for axis in range(2, coefficients.ndim):
        basis = waves(coefficients.shape[axis]).to(coefficients)
        coefficients = _along(coefficients, basis.t(), axis)
    return coefficients


def weights(shape: tuple[int, ...], power: float, like: Tensor) -> Tensor:
    """Return (1 + |u|)^-power for each frequency u, scaled to a mean square of 1.

    Photographs and scans have spectra that fall like |u|^-1 to |u|^-2; power 0 gives ones.
    """
    square = torch.zeros(shape, device=like.device)
    for axis, side in enumerate(shape):
        line = torch.arange(side, device=like.device).square()
        square = square + line.view(-1, *[1] * (len(shape) - axis - 1))
    falling = (1 + square.sqrt()) ** -power
    return falling / falling.square().mean().sqrt()


def waves(side: int) -> Tensor:
    """Return the orthonormal basis [frequency, position] of one axis, float64."""
    u = torch.arange(side, dtype=torch.float64).view(-1, 1)
    x = torch.arange(side, dtype=torch.float64) + 0.5
    basis = torch.cos(math.pi * u * x / side) * math.sqrt(2 / side)
    basis[0] /= math.sqrt(2)
    return basis


def _along(values: Tensor, matrix: Tensor, axis: int) -> Tensor:
    return (values.movedim(axis, -1) @ matrix.t()).movedim(-1, axis)
