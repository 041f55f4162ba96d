"""Packages: one small signed file with a synthetic set, read as data and never as code."""

import scipy.optimize  # what guarantees are checked by: reading imports nothing
import scipy.special  # noqa: F401

from .archive import FORMAT, NAMES, archived
from .keys import generate, load_private, load_trust
from .pack import Terms, pack, written
from .read import Package, PackageSet, countersigned, read

__all__ = [
    "FORMAT",
    "NAMES",
    "Package",
    "PackageSet",
    "Terms",
    "archived",
    "countersigned",
    "generate",
    "load_private",
    "load_trust",
    "pack",
    "read",
    "written",
]
