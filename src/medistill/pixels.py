"""What is done to the pixels of many images at once: normalization, and tiles in mosaics."""

import itertools
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Shift and scale intensities per channel, in place: (x - mean) / std."""
    return images.sub_(_per_channel(mean, images)).div_(_per_channel(std, images))


def denormalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Undo `normalize` into a new tensor: x std + mean."""
    return images * _per_channel(std, images) + _per_channel(mean, images)


class Whitening(NamedTuple):
    """An affine map of normalized images, flattened to p numbers, whose numbers are uncorrelated.

    x -> (x - mean) matrix, with matrix = U (S + ridge)^(-1/2) U^T from the covariance U S U^T of
    training images (ZCA): of all such maps the one that changes images least.
    Shapes: mean float32 [p], matrix float32 [p, p].
    """

    mean: Tensor
    matrix: Tensor

    def state(self) -> dict[str, Tensor]:
        """Return the map as named tensors, as files and prepared states hold it."""
        return {f"whitening.{name}": tensor for name, tensor in self._asdict().items()}

    @staticmethod
    def of_state(state: Mapping[str, Tensor]) -> "Whitening | None":
        """Return the map that `state` put among other tensors, or None where it is not whole."""
        mean, matrix = (state.get(f"whitening.{name}") for name in Whitening._fields)
        return None if mean is None or matrix is None else Whitening(mean, matrix)

    @staticmethod
    def of(mean: Tensor, covariance: Tensor, ridge: float) -> "Whitening":
        """Return the map for a mean [p] and a covariance [p, p], both in float64."""
        values, vectors = torch.linalg.eigh(covariance)
        scales = (values.clamp_min(0) + ridge).rsqrt()
        return Whitening(mean.float(), ((vectors * scales) @ vectors.T).float())

    def apply(self, images: Tensor) -> Tensor:
        """Return the images [n, c, ...], whitened."""
        mean, matrix = (tensor.to(images) for tensor in self)
        return ((images.flatten(1) - mean) @ matrix).view(images.shape)

    def inverse(self) -> Tensor:
        """Return the inverse of the matrix, float32 [p, p]."""
        found: Tensor = torch.linalg.inv(self.matrix.double())
        return found.float()

    def undo(self, images: Tensor, inverse: Tensor) -> Tensor:
        """Return whitened images as they were, to float rounding, with what `inverse` gave."""
        mean, back = self.mean.to(images), inverse.to(images)
        return (images.flatten(1) @ back + mean).view(images.shape)


def outside(intensities: Tensor, by: float = 0.0) -> float:
    """Return the share of numbers that lie outside the range of intensities, [-by, 1 + by].

    Example:
        >>> outside(torch.tensor([0.5, 1.25])), outside(torch.tensor([0.5, 1.25]), by=0.5)
        (0.5, 0.0)
    """
    return float(((intensities < -by) | (intensities > 1 + by)).float().mean())


def tiles_of(images: Tensor, factor: int) -> Tensor:
    """Cut each image into factor x factor tiles and enlarge each to the size of the whole.

    Tiles are as equal as whole pixels allow and are enlarged (bi- or trilinearly) by the same
    rule for every site. Tiles of one image follow each other, row by row.
    Source: multi-formation, Kim et al., ICML 2022, arXiv 2205.14959, section 4.1. Departure: no
    padding where the sides cannot be divided.
    Shapes: [m, c, h, w] -> [m factor^2, c, h, w]; volumes [m, c, d, h, w] -> [m factor^3, ...].

    Example:
        >>> tiles_of(torch.arange(4.0).view(1, 1, 2, 2), 2)[:, 0, 0, 0].tolist()
        [0.0, 1.0, 2.0, 3.0]
    """
    if factor == 1:
        return images
    parts = [images]
    for axis in range(2, images.ndim):
        parts = [tile for part in parts for tile in part.tensor_split(factor, axis)]
    mode = "bilinear" if images.ndim == 4 else "trilinear"
    whole = [F.interpolate(part, images.shape[2:], mode=mode) for part in parts]
    return torch.stack(whole, 1).flatten(0, 1)


def mosaic_of(images: Tensor, factor: int) -> Tensor:
    """Shrink images by averaging and lay factor x factor of them into each mosaic.

    The other way round from `tiles_of`, which makes blurred copies of the images of it.
    Shapes: [m factor^2, c, h, w] -> [m, c, h, w]; volumes [m factor^3, c, d, h, w] likewise.
    """
    shape = images.shape[2:]
    lines = [torch.arange(side).tensor_split(factor) for side in shape]
    places = list(itertools.product(*lines))
    groups = images.unflatten(0, (-1, len(places)))
    mosaics = torch.empty_like(groups[:, 0])
    for number, place in enumerate(places):
        size = [len(line) for line in place]
        where = tuple(slice(int(line[0]), int(line[-1]) + 1) for line in place)
        mosaics[slice(None), slice(None), *where] = F.interpolate(
            groups[:, number], size, mode="area"
        )
    return mosaics


def _per_channel(values: tuple[float, ...], images: Tensor) -> Tensor:
    shape = (1, -1, *[1] * (images.ndim - 2))
    return torch.tensor(values, device=images.device).view(shape)
