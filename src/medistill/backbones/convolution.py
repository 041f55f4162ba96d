"""A first convolution whose images are asked for a gradient, and whose weights are not."""

from functools import reduce
from itertools import product
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW = 4  # channels: those of images


class OfImages(nn.Module):
    """A convolution with the parameters of another, fast in the gradient of images on a CPU.

    Parameters get no gradient; neither forward mode nor torch.func knows it.
    """

    def __init__(self, layer: nn.Conv2d | nn.Conv3d) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias

    @staticmethod
    def can_be(layer: nn.Module) -> TypeGuard[nn.Conv2d | nn.Conv3d]:
        """Say whether a layer is a convolution of few channels, side 3, padding 1 and no more."""
        if not isinstance(layer, nn.Conv2d | nn.Conv3d) or layer.in_channels > FEW:
            return False
        ones = (1,) * len(layer.kernel_size)
        found = layer.kernel_size, layer.padding, layer.stride, layer.dilation, layer.groups
        plain = found == ((3,) * len(ones), ones, ones, ones, 1)
        return plain and layer.padding_mode == "zeros"

    def forward(self, x: Tensor) -> Tensor:
        """Return the maps, in the precision of the weights."""
        x = x.to(self.weight.dtype)
        if x.requires_grad and x.device.type == "cpu" and x.dtype != torch.bfloat16:
            maps: Tensor = _Convolve.apply(x, self.weight, self.bias)  # type: ignore[no-untyped-call]
            return maps
        return convolve(x, self.weight, self.bias)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return a convolution of pictures or volumes with padding 1."""
    return (F.conv2d if x.ndim == 4 else F.conv3d)(x, weight, bias, padding=1)


class _Convolve(torch.autograd.Function):
    """`convolve`, with `to_images` for its gradient in the images; of weights it has none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return convolve(x, weight, bias)

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
