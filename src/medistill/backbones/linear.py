"""Linear: pixels are the features; the student is a logistic regression."""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from .base import Backbone


@dataclass(frozen=True)
class Linear(Backbone):
    """The pixels themselves, and one linear head."""

    family: ClassVar[str] = "linear"

    @property
    def name(self) -> str:
        """`linear`."""
        return self.family

    def body(self, channels: int, shape: tuple[int, ...]) -> nn.Module:
        """Return what lays pixels out in a row."""
        return nn.Sequential(nn.Flatten())
