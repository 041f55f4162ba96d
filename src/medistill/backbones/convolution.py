"""Convolutions whose images are asked for a gradient, and whose weights are not."""

from functools import reduce
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW = 4  # channels: those of images


class Conv2d(nn.Conv2d):
    """torch's convolution with kernels of side 3 and padding 1.

    Its gradient in images is fast where the network is `fixed` (medistill.features).
    """

    fixed = False

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True) -> None:
        super().__init__(inputs, outputs, 3, padding=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the maps."""
        return _maps(self, x)


class Conv3d(nn.Conv3d):
    """The same of volumes, in the precision of its own weights."""

    fixed = False

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the maps."""
        return _maps(self, x.to(self.weight.dtype))


def _maps(layer: Conv2d | Conv3d, x: Tensor) -> Tensor:
    maps: Tensor
    alone = layer.fixed and not any(p.requires_grad for p in layer.parameters())
    if (
        alone
        and layer.in_channels <= FEW
        and x.requires_grad
        and x.device.type == "cpu"
        and x.dtype != torch.bfloat16
    ):
        maps = _OfImages.apply(x, layer.weight, layer.bias)  # type: ignore[no-untyped-call]
        return maps
    maps = layer._conv_forward(x, layer.weight, layer.bias)
    return maps


class _OfImages(torch.autograd.Function):
    """A convolution with `to_images` for its gradient in the images; of weights it has none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        convolve = F.conv2d if x.ndim == 4 else F.conv3d
        return convolve(x, weight, bias, padding=1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return to_images(gradients[0], weight), None, None


def to_images(gradient: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient in a convolution's images: a matrix product, and a sum of shifted maps.

    d/dx_cp = sum_ok g_o(p - k + 1) w_ock, for kernels of side 3 and padding 1. torch's own kernel
    takes two to five times as long where the images have few channels: over half of a step.
    Shapes: gradient [n, o, ...], weight [o, c, 3, ...] -> [n, c, ...].
    """
    shape, axes = gradient.shape[2:], gradient.ndim - 2
    rows = gradient.movedim(1, -1).flatten(0, -2)
    products = weight.movedim(1, -1).flatten(1).T @ rows.T
    maps = F.pad(products.view(3**axes, weight.shape[1], len(gradient), *shape), (1, 1) * axes)
    shifted = [
        part[(..., *(slice(2 - k, 2 - k + side) for k, side in zip(by, shape, strict=True)))]
        for part, by in zip(maps, product(range(3), repeat=axes), strict=True)
    ]
    total: Tensor = reduce(torch.add, shifted)
    return total.transpose(0, 1)
