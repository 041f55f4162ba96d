"""MLP: the field's plainest student."""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from .base import Backbone


@dataclass(frozen=True)
class MLP(Backbone):
    """Linear layers with ReLU on flattened pixels (three layers in all, as in arXiv 2006.05929)."""

    width: int = 128
    hidden: int = 2
    family: ClassVar[str] = "mlp"

    @property
    def name(self) -> str:
        """`mlp-WIDTH`."""
        return f"mlp-{self.width}"

    def body(self, channels: int, shape: tuple[int, ...]) -> nn.Module:
        """Return the hidden layers."""
        inputs = channels
        for side in shape:
            inputs *= side
        layers: list[nn.Module] = [nn.Flatten()]
        for layer in range(self.hidden):
            layers += [nn.Linear(inputs if layer == 0 else self.width, self.width), nn.ReLU()]
        return nn.Sequential(*layers)
