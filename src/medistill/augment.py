"""Differentiable siamese augmentation: draw parameters first, apply them purely afterwards."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import UsageError

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
    Departures: none known; a gray channel has no saturation, as in the reference.

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
        """Draw one kind and its parameters for `n` images (1: shared by all) of `shape` pixels.

        Raises: UsageError when the images are volumes (use no augmentation there).
        """
        if not self.kinds:
            return Draw(None, {})
        if len(shape) != 2:
            raise UsageError(
                f"found volumes of {'x'.join(map(str, shape))}; expected images of two dimensions "
                "for augmentation: pass --augment none"
            )
        kind = self.kinds[int(torch.randint(len(self.kinds), (1,), generator=generator))]
        u = torch.rand(3, n, generator=generator)
        return Draw(kind, _PARAMETERS[kind](self, u, shape))

    def apply(self, images: Tensor, draw: Draw) -> Tensor:
        """Apply a draw to images [b, c, h, w]; pure and differentiable in the images."""
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
    reach = torch.tensor([_pixels(a.crop, side) for side in shape]).view(2, 1)
    shift = (u[:2] * (2 * reach + 1)).long() - reach
    return {"down": shift[0], "right": shift[1]}


def _cutout_parameters(a: Augmentation, u: Tensor, shape: Any) -> dict[str, Tensor]:
    sides = torch.tensor(shape).view(2, 1)
    cut = torch.tensor([_pixels(a.cutout, side) for side in shape]).view(2, 1)
    # As the reference: the center lies anywhere, one step further where the side is even.
    first = (u[:2] * (sides + 1 - cut % 2)).long() - cut // 2
    return {"top": first[0], "left": first[1], "height": cut[0], "width": cut[1]}


def _flip_parameters(a: Augmentation, u: Tensor, shape: Any) -> dict[str, Tensor]:
    return {"mirror": u[0] < a.flip}


def _scale_parameters(a: Augmentation, u: Tensor, shape: Any) -> dict[str, Tensor]:
    low = 1 / a.scale
    factor = low + u[:2] * (a.scale - low)
    zero = torch.zeros_like(u[0])
    return {"theta": _theta(factor[0], zero, zero, factor[1])}


def _rotate_parameters(a: Augmentation, u: Tensor, shape: Any) -> dict[str, Tensor]:
    angle = (u[0] - 0.5) * 2 * a.rotate / 180 * math.pi
    return {"theta": _theta(angle.cos(), -angle.sin(), angle.sin(), angle.cos())}


def _theta(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    zero = torch.zeros_like(a)
    return torch.stack([torch.stack([a, b, zero], -1), torch.stack([c, d, zero], -1)], 1)


def _column(value: Tensor) -> Tensor:
    return value.view(-1, 1, 1, 1)


def _color(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    x = x + _column(p["brightness"])
    gray = x.mean(1, keepdim=True)
    x = (x - gray) * _column(p["saturation"]) + gray if x.shape[1] > 1 else x
    mean = x.mean((1, 2, 3), keepdim=True)
    return (x - mean) * _column(p["contrast"]) + mean


def _crop(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    _, _, h, w = x.shape
    rows = torch.arange(h, device=x.device) + p["down"].view(-1, 1)
    columns = torch.arange(w, device=x.device) + p["right"].view(-1, 1)
    inside = ((rows >= 0) & (rows < h))[:, None, :, None] & ((columns >= 0) & (columns < w))[
        :, None, None, :
    ]
    rows, columns = rows.clamp(0, h - 1), columns.clamp(0, w - 1)
    if len(rows) == 1:
        moved = x[:, :, rows[0]][:, :, :, columns[0]]
    else:
        images = torch.arange(len(x), device=x.device).view(-1, 1, 1)
        moved = x[images, :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)
    return moved * inside


def _cutout(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    rows = torch.arange(x.shape[2], device=x.device).view(1, -1)
    columns = torch.arange(x.shape[3], device=x.device).view(1, -1)
    top, left = p["top"].view(-1, 1), p["left"].view(-1, 1)
    row = (rows >= top) & (rows < top + p["height"])
    column = (columns >= left) & (columns < left + p["width"])
    return x * ~(row[:, None, :, None] & column[:, None, None, :])


def _flip(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    return torch.where(_column(p["mirror"]), x.flip(-1), x)


def _affine(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    theta = p["theta"].to(x.dtype).expand(len(x), 2, 3)
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
