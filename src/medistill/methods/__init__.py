"""Methods, one file each; a new one adds its class to the tuple and nothing else."""

from collections.abc import Mapping
from typing import Any

from ..errors import UsageError, nearest
from ..records import from_record
from .att import ATT
from .base import Log, Method, Task
from .datm import DATM
from .dc import DC
from .dm import DM
from .dp_merf import DPMERF
from .dsa import DSA
from .ftd import FTD
from .herding import Herding
from .hop_tm import HoPTM
from .kcenter import KCenter
from .mtt import MTT
from .random import Random
from .sketch import FromSketch
from .tesla import TESLA

__all__ = ["METHODS", "PRESETS", "Log", "Method", "Task", "make", "method_class"]

METHODS: tuple[type[Method], ...] = (
    Random,
    Herding,
    KCenter,
    DC,
    DSA,
    DM,
    FromSketch,
    MTT,
    TESLA,
    FTD,
    DATM,
    ATT,
    HoPTM,
    DPMERF,
)


# Names for settings that are worth one.
PRESETS: dict[str, tuple[type[Method], dict[str, Any]]] = {"dm-bank": (DM, {"bank": 30})}


def make(name: str, fields: Mapping[str, Any]) -> Method:
    """Return a method, or a preset of one, with some of its fields set.

    Raises: UsageError when there is no such name or field, or a value has the wrong type.

    Example:
        >>> make("dm-bank", {"lr_images": 0.5}).bank
        30
    """
    if name in PRESETS:
        kind, preset = PRESETS[name]
        return from_record(kind, {**preset, **fields})
    return from_record(method_class(name), fields)


def method_class(name: str) -> type[Method]:
    """Return the method of that name.

    Raises: UsageError when there is none (with the nearest names).
    """
    known = {kind.name: kind for kind in METHODS}
    if name not in known:
        raise UsageError(f"found no method {name!r}: {nearest(name, [*known, *PRESETS])}")
    return known[name]
