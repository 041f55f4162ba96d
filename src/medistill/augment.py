"""Differentiable siamese augmentation: draw parameters first, apply them purely afterwards."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Kind = Literal["color", "crop", "cutout", "flip", "scale", "rotate"]
KINDS: tuple[Kind, ...] = ("color", "crop", "cutout", "flip", "scale", "rotate")


@dataclass(frozen=True)
class Draw:
    """The parameters of one augmentation: a kind and tensors [n], n = 1 for a shared draw."""

    kind: Kind | None
    values: dict[str, Tensor]


@dataclass(frozen=True)
class Augmentation:
    """The six operations of differentiable siamese augmentation with their published strengths.

    A draw takes one of `kinds` at random for the whole batch; its parameters are one for all
    images (siamese matching) or one per image (training). It acts on normalized images, so the
    fill value 0 is the mean intensity.
    Source: Zhao and Bilen, ICML 2021, arXiv 2102.08259, section 3 and the released settings.
    Departures: none known for images; a gray channel has no saturation, as in the reference.
    Volumes [b, c, d, h, w], which the paper has not: crop, cutout and scale act along all three
    axes, flip mirrors the last one (left and right), rotate turns about one axis drawn at random.

    Example:
        >>> a = Augmentation()
        >>> draw = a.draw(1, (28, 28), torch.Generator().manual_seed(0))
        >>> a.apply(torch.zeros(4, 1, 28, 28), draw).shape
        torch.Size([4, 1, 28, 28])
    """

    kinds: tuple[Kind, ...] = KINDS
    brightness: float = 1.0
    saturation: float = 2.0
    contrast: float = 0.5
    crop: float = 0.125
    cutout: float = 0.5
    flip: float = 0.5
    scale: float = 1.2
    rotate: float = 15.0

    def without_flips(self) -> "Augmentation":
        """Return the same augmentation for anatomies whose mirror image has another class."""
        kinds = tuple(kind for kind in self.kinds if kind != "flip")
        return Augmentation(**{**self.__dict__, "kinds": kinds})

    def draw(self, n: int, shape: tuple[int, ...], generator: torch.Generator) -> Draw:
        """Draw one kind and its parameters for `n` images (1: shared by all) of `shape` pixels."""
        if not self.kinds:
            return Draw(None, {})
        kind = self.kinds[int(torch.randint(len(self.kinds), (1,), generator=generator))]
        u = torch.rand(3 if len(shape) == 2 else 4, n, generator=generator)
        return Draw(kind, _PARAMETERS[kind](self, u, shape))

    def apply(self, images: Tensor, draw: Draw) -> Tensor:
        """Apply a draw to images [b, c, h, w] or volumes; pure and differentiable in them."""
        if draw.kind is None:
            return images
        values = {name: value.to(images.device) for name, value in draw.values.items()}
        return _OPERATIONS[draw.kind](images, values)


def _pixels(fraction: float, side: int) -> int:
    return int(fraction * side + 0.5)


def _color_parameters(a: Augmentation, u: Tensor, shape: Any) -> dict[str, Tensor]:
    return {
        "brightness": (u[0] - 0.5) * a.brightness,
        "saturation": u[1] * a.saturation,
        "contrast": u[2] + a.contrast,
    }


def _crop_parameters(a: Augmentation, u: Tensor, shape: Any) -> dict[str, Tensor]:
    reach = torch.tensor([_pixels(a.crop, side) for side in shape]).view(-1, 1)
    return {"shift": ((u[: len(shape)] * (2 * reach + 1)).long() - reach).T}


def _cutout_parameters(a: Augmentation, u: Tensor, shape: Any) -> dict[str, Tensor]:
    sides = torch.tensor(shape).view(-1, 1)
    cut = torch.tensor([_pixels(a.cutout, side) for side in shape]).view(-1, 1)
    # As the reference: the center lies anywhere, one step further where the side is even.
    first = (u[: len(shape)] * (sides + 1 - cut % 2)).long() - cut // 2
    return {"first": first.T, "length": cut.T}


def _flip_parameters(a: Augmentation, u: Tensor, shape: Any) -> dict[str, Tensor]:
    return {"mirror": u[0] < a.flip}


def _scale_parameters(a: Augmentation, u: Tensor, shape: Any) -> dict[str, Tensor]:
    low = 1 / a.scale
    return {"theta": _theta((low + u[: len(shape)] * (a.scale - low)).T.diag_embed())}


def _rotate_parameters(a: Augmentation, u: Tensor, shape: Any) -> dict[str, Tensor]:
    angle = (u[0] - 0.5) * 2 * a.rotate / 180 * math.pi
    cos, sin = angle.cos(), angle.sin()
    plane = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], 1)
    if len(shape) == 2:
        return {"theta": _theta(plane)}
    turn = torch.eye(3).repeat(len(angle), 1, 1)
    for number, axis in enumerate((u[1] * 3).long().clamp(max=2).tolist()):
        turned = torch.tensor([other for other in range(3) if other != axis])
        turn[number, turned.view(-1, 1), turned] = plane[number]
    return {"theta": _theta(turn)}


def _theta(matrix: Tensor) -> Tensor:
    """Return matrices [n, d, d] with a shift of zero beside them, [n, d, d + 1]."""
    return F.pad(matrix, (0, 1))


def _column(value: Tensor, x: Tensor) -> Tensor:
    return value.view(-1, *[1] * (x.ndim - 1))


def _along(x: Tensor, axis: int, values: Tensor) -> Tensor:
    """Return values [n or 1, side] shaped so that they lie along a spatial axis of x."""
    shape = [len(values), *[1] * (x.ndim - 1)]
    shape[2 + axis] = values.shape[1]
    return values.view(shape)


def _color(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    x = x + _column(p["brightness"], x)
    gray = x.mean(1, keepdim=True)
    x = (x - gray) * _column(p["saturation"], x) + gray if x.shape[1] > 1 else x
    mean = x.mean(tuple(range(1, x.ndim)), keepdim=True)
    return (x - mean) * _column(p["contrast"], x) + mean


def _crop(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    inside: Tensor | None = None
    for axis, shift in enumerate(p["shift"].T):
        side = x.shape[2 + axis]
        places = torch.arange(side, device=x.device) + shift.view(-1, 1)
        holds = _along(x, axis, (places >= 0) & (places < side))
        inside = holds if inside is None else inside & holds
        places = places.clamp(0, side - 1)
        if len(places) == 1:
            x = x.index_select(2 + axis, places[0])
        else:
            x = x.gather(2 + axis, _along(x, axis, places).expand(x.shape))
    assert inside is not None
    return x * inside


def _cutout(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    hole: Tensor | None = None
    for axis, first in enumerate(p["first"].T):
        places = torch.arange(x.shape[2 + axis], device=x.device).view(1, -1)
        first = first.view(-1, 1)
        covered = _along(
            x, axis, (places >= first) & (places < first + p["length"][:, axis : axis + 1])
        )
        hole = covered if hole is None else hole & covered
    assert hole is not None
    return x * ~hole


def _flip(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    return torch.where(_column(p["mirror"], x), x.flip(-1), x)


def _affine(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    theta = p["theta"].to(x.dtype).expand(len(x), -1, -1)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="zeros", align_corners=False)


_PARAMETERS = {
    "color": _color_parameters,
    "crop": _crop_parameters,
    "cutout": _cutout_parameters,
    "flip": _flip_parameters,
    "scale": _scale_parameters,
    "rotate": _rotate_parameters,
}
_OPERATIONS = {
    "color": _color,
    "crop": _crop,
    "cutout": _cutout,
    "flip": _flip,
    "scale": _affine,
    "rotate": _affine,
}
