"""Backbones: the architectures of students, experts and teachers, one file per family."""

from collections.abc import Mapping
from typing import Any

from ..errors import UsageError, nearest
from ..records import Json, from_record, to_record
from .base import Backbone, Network, channels_last, level_sizes, levels_of, refresh
from .convnet import ConvNet
from .linear import Linear
from .mlp import MLP
from .monai import Monai
from .resnet import ResNet18

__all__ = [
    "MLP",
    "Backbone",
    "ConvNet",
    "Linear",
    "Monai",
    "Network",
    "ResNet18",
    "backbone",
    "channels_last",
    "from_spec",
    "level_sizes",
    "levels_of",
    "refresh",
    "to_spec",
]

BACKBONES: tuple[type[Backbone], ...] = (ConvNet, MLP, Linear, ResNet18, Monai)
_FAMILIES = {kind.family: kind for kind in BACKBONES}
_NUMBERS = {"convnet": ("depth", "width"), "mlp": ("width",), "resnet18": ("width",)}
_NORMS = ("instance", "batch", "layer", "group", "none")


def backbone(name: str) -> Backbone:
    """Read a short name: a family, then its numbers, then a norm, all but the first optional.

    `monai:NAME` is a network of MONAI.

    Raises: UsageError when the family, a number or the norm is unknown.

    Example:
        >>> backbone("convnet-3-64-batch")
        ConvNet(depth=3, width=64, norm='batch', activation='relu', pooling='average')
    """
    if name.startswith("monai:"):
        return Monai(name.removeprefix("monai:"))
    family, *rest = name.split("-")
    if family not in _FAMILIES:
        raise UsageError(f"found no backbone {name!r}: {nearest(family, _FAMILIES)}")
    fields: dict[str, Any] = {}
    if rest and rest[-1] in _NORMS and family not in ("mlp", "linear"):
        fields["norm"] = rest.pop()
    numbers = _NUMBERS.get(family, ())
    if len(rest) > len(numbers) or not all(part.isdecimal() and int(part) for part in rest):
        raise UsageError(
            f"found backbone {name!r}; expected {'-'.join((family, *map(str.upper, numbers)))}, "
            f"perhaps followed by a norm ({', '.join(_NORMS)})"
        )
    fields |= dict(zip(numbers, map(int, rest), strict=False))
    return _FAMILIES[family](**fields)


def to_spec(spec: Backbone) -> Json:
    """Return a backbone as a record: its family and its fields."""
    return {"family": spec.family, **to_record(spec)}


def from_spec(record: Mapping[str, Any]) -> Backbone:
    """Make a backbone from its record.

    Raises: UsageError when the family or a field is unknown.
    """
    fields = dict(record)
    family = str(fields.pop("family", ""))
    if family not in _FAMILIES:
        raise UsageError(f"found no backbone family {family!r}: {nearest(family, _FAMILIES)}")
    return from_record(_FAMILIES[family], fields)
