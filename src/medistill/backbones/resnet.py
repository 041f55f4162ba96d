"""ResNet-18 for images of 28 to 64 pixels."""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from torch import Tensor, nn

from ..errors import UsageError
from .base import Backbone
from .convnet import Norm, norm_layer


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al., CVPR 2016, figure 5, left)."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            norm_layer(norm, outputs, 2),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            norm_layer(norm, outputs, 2),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm_layer(norm, outputs, 2)
            )
        self.last = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(main(x) + shortcut(x))."""
        out: Tensor = self.last(self.main(x) + self.shortcut(x))
        return out


@dataclass(frozen=True)
class ResNet18(Backbone):
    """ResNet-18 with a 3x3 stem of stride 1 and no first pooling, so that small images survive.

    Source: He et al., CVPR 2016. Departures: the small-image stem, and instance norm by default,
    because batch statistics of a few synthetic images describe no real image.
    """

    width: int = 64
    norm: Norm = "instance"
    family: ClassVar[str] = "resnet18"

    @property
    def name(self) -> str:
        """`resnet18-WIDTH`, with the norm appended where it is not the default."""
        tail = "" if self.norm == "instance" else f"-{self.norm}"
        return f"resnet18-{self.width}{tail}"

    def body(self, channels: int, shape: tuple[int, ...]) -> nn.Module:
        """Return the stem, four stages of two blocks and the average over space."""
        if len(shape) != 2 or min(shape) < 16:
            raise UsageError(
                f"found images of {'x'.join(map(str, shape))} for resnet18; expected two "
                "dimensions of 16 or more: choose convnet"
            )
        w = self.width
        layers: list[nn.Module] = [
            nn.Conv2d(channels, w, 3, padding=1, bias=False),
            norm_layer(self.norm, w, 2),
            nn.ReLU(),
        ]
        widths = (w, w, 2 * w, 4 * w, 8 * w)
        for stage, (inputs, outputs) in enumerate(pairwise(widths)):
            layers.append(Block(inputs, outputs, 1 if stage == 0 else 2, self.norm))
            layers.append(Block(outputs, outputs, 1, self.norm))
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1))
