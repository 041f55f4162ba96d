"""Methods, one file each; a new one adds its class to the tuple and nothing else."""

from ..errors import UsageError, nearest
from .base import Log, Method, Task
from .dc import DC
from .dm import DM
from .dsa import DSA
from .herding import Herding
from .kcenter import KCenter
from .random import Random

__all__ = ["METHODS", "Log", "Method", "Task", "method_class"]

METHODS: tuple[type[Method], ...] = (Random, Herding, KCenter, DC, DSA, DM)


def method_class(name: str) -> type[Method]:
    """Return the method of that name.

    Raises: UsageError when there is none (with the nearest names).
    """
    known = {kind.name: kind for kind in METHODS}
    if name not in known:
        raise UsageError(f"found no method {name!r}: {nearest(name, known)}")
    return known[name]
