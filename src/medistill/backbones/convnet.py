"""ConvNet: the student of the field, in two and three dimensions."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ..errors import UsageError
from .base import Backbone, average_pool

Norm = Literal["instance", "batch", "layer", "group", "none"]
Activation = Literal["relu", "leaky_relu", "sigmoid", "gelu"]
Pooling = Literal["average", "max", "none"]

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(0.01),
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
}


class InstanceNorm(nn.Module):
    """Normalize each channel of each image over space: GroupNorm with as many groups as channels.

    Sums over space are written as matrix products over channels-last memory, because torch's
    own kernels are about seven times slower there on CPUs; values agree to float rounding.
    Maps of lower precision are normalized in float32, for the variance is a difference of sums;
    those of volumes on a CPU stay so, for compiled loops over bfloat16 volumes take three times as
    long (`Conv3d` rounds them again).
    Shapes: [n, c, ...] -> [n, c, ...].
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the scale to 1 and the shift to 0."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized maps."""
        flat = x.movedim(1, -1).flatten(1, -2)
        if x.dtype == torch.bfloat16:
            flat = flat.float()
        n, s, _ = flat.shape
        average = flat.new_full((n, 1, s), 1 / s)
        mean = torch.bmm(average, flat)
        # Rounding can leave a constant channel a little below zero.
        variance = (torch.bmm(average, flat * flat) - mean * mean).clamp_min(0)
        scale = torch.rsqrt(variance + self.eps) * self.weight
        out = flat * scale + (self.bias - mean * scale)
        if x.ndim < 5 or x.device.type != "cpu":
            out = out.to(x.dtype)
        maps: Tensor = out.unflatten(1, x.shape[2:]).movedim(-1, 1)
        return maps


class Conv3d(nn.Conv3d):
    """torch's convolution of volumes, in the precision of its own weights."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the maps."""
        return super().forward(x.to(self.weight.dtype))


def norm_layer(kind: Norm, channels: int, dimensions: int) -> nn.Module:
    """Return the normalization of a block (instance, batch, layer, group of 4, or none)."""
    if kind == "instance":
        return InstanceNorm(channels)
    if kind == "batch":
        return nn.BatchNorm2d(channels) if dimensions == 2 else nn.BatchNorm3d(channels)
    if kind == "none":
        return nn.Identity()
    return nn.GroupNorm(1 if kind == "layer" else min(4, channels), channels)


class AveragePool3d(nn.Module):
    """Average cubes of `side` voxels, in any precision (see `average_pool`)."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        """Return the averages."""
        return average_pool(x, [self.side] * 3)


@dataclass(frozen=True)
class ConvNet(Backbone):
    """Blocks of 3x3 convolution, normalization, activation and 2x2 pooling, then a linear layer.

    Source: Gidaris and Komodakis, CVPR 2018, in the form of Zhao et al., arXiv 2006.05929.
    Departures: a gray 28-pixel image keeps its size in the first block (the reference pads it to
    32), and the head is sized from the true maps.

    Example:
        >>> ConvNet(depth=3, width=64).name
        'convnet-3-64'
    """

    depth: int = 3
    width: int = 128
    norm: Norm = "instance"
    activation: Activation = "relu"
    pooling: Pooling = "average"
    family: ClassVar[str] = "convnet"

    @property
    def name(self) -> str:
        """`convnet-DEPTH-WIDTH`, with the norm appended where it is not the default."""
        tail = "" if self.norm == "instance" else f"-{self.norm}"
        return f"convnet-{self.depth}-{self.width}{tail}"

    def body(self, channels: int, shape: tuple[int, ...]) -> nn.Module:
        """Return the blocks; features are width x (side / 2^depth) per axis."""
        dimensions = len(shape)
        if self.pooling != "none" and min(shape) >> self.depth < 1:
            raise UsageError(
                f"found images of {'x'.join(map(str, shape))} for {self.name}; expected sides of "
                f"{2**self.depth} or more: choose a smaller depth"
            )
        conv = nn.Conv2d if dimensions == 2 else Conv3d
        pools: dict[str, type[nn.Module]] = {
            "average": nn.AvgPool2d if dimensions == 2 else AveragePool3d,
            "max": nn.MaxPool2d if dimensions == 2 else nn.MaxPool3d,
        }
        layers: list[nn.Module] = []
        for block in range(self.depth):
            inputs = channels if block == 0 else self.width
            layers.append(conv(inputs, self.width, kernel_size=3, padding=1))
            layers.append(norm_layer(self.norm, self.width, dimensions))
            layers.append(_ACTIVATIONS[self.activation]())
            if self.pooling != "none":
                layers.append(pools[self.pooling](2))
        return nn.Sequential(*layers)
