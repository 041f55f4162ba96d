"""Real datasets: one file per source; `load` reads any of them, `inspect` says what is in it.

Add a source: one file with `load(source, where) -> Splits` and OPTIONS, one entry in `_KINDS`.
"""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from ..errors import DataError, UsageError
from ..sets import Splits, with_statistics
from . import combine, csv, datalist, dicom, folder, medmnist, nifti, npz, phantom, vary
from .inspect import inspect
from .medmnist_table import TABLE
from .source import Source, Where, parse

__all__ = ["check_splits", "fetch", "inspect", "load", "names", "public_classes"]

_Load = Callable[[Source, Where], Splits]


def _combine(source: Source, where: Where) -> Splits:
    return combine.load(source, where, _read)


def _vary(source: Source, where: Where) -> Splits:
    return vary.load(source, where, _read)


_KINDS: dict[str, tuple[ModuleType, _Load]] = {
    "medmnist": (medmnist, medmnist.load),
    "npz": (npz, npz.load),
    "folder": (folder, folder.load),
    "phantom": (phantom, phantom.load),
    "csv": (csv, csv.load),
    "datalist": (datalist, datalist.load),
    "dicom": (dicom, dicom.load),
    "nifti": (nifti, nifti.load),
    "combine": (combine, _combine),
    "vary": (vary, _vary),
}


def names() -> list[str]:
    """Return the sets that are known by a bare name.

    Example:
        >>> names()[:3]
        ['phantom', 'pathmnist', 'chestmnist']
    """
    return ["phantom", *TABLE]


def load(source: str, *, root: Path | None = None, offline: bool = False, seed: int = 0) -> Splits:
    """Load a dataset, with its digest and its training mean and std on the card.

    source: `pneumoniamnist`, `pneumoniamnist@64`, `phantom:variation=0.2,size=32`, `npz:PATH`,
    `folder:PATH;size=28;channels=1`, `csv:PATH`, `datalist:PATH`, `dicom:PATH`, `nifti:PATH`,
    `combine:A,B;labels=keep`, `vary:A;n=200`, or an existing path. Names are
    looked up in `root`, $MEDISTILL_DATA and the user's cache, then downloaded unless `offline`.
    Raises: UsageError when the source or an option is unknown; DataError when the data is absent
    or cannot be used.

    Example:
        >>> splits = load("phantom:n=100,size=16")
        >>> tuple(splits.train.images.shape)
        (100, 1, 16, 16)
    """
    splits = _read(source, Where(root, offline, seed))
    check_splits(splits)
    return with_statistics(splits)


def _read(text: str, where: Where) -> Splits:
    source = parse(text, [kind for kind in _KINDS if kind != "medmnist"], names())
    module, read = _KINDS[source.kind]
    source.check(module.OPTIONS)
    return read(source, where)


def public_classes(source: str) -> bool:
    """Say whether a source's classes stand in medistill itself, and were not read from the data.

    Example:
        >>> public_classes("pneumoniamnist@64"), public_classes("csv:scans.csv")
        (True, False)
    """
    kinds = [kind for kind in _KINDS if kind != "medmnist"]
    return parse(source, kinds, names()).kind in ("medmnist", "phantom")


def fetch(name: str, *, root: Path | None = None, offline: bool = False) -> Path:
    """Return the verified file of a MedMNIST edition, downloaded where it is absent.

    Raises: UsageError when the name is unknown; DataError when the file cannot be had or its MD5
    does not fit; RunRefused when the disk has no room.
    """
    if name == "phantom":
        raise UsageError("phantom is built in; found nothing to fetch: use it as it is")
    return medmnist.fetch(name, Where(root, offline))


def check_splits(splits: Splits) -> None:
    """Refuse a dataset that nothing can be learned or measured on.

    Raises: DataError when a split is empty, or when a class has no training image, or when there
    are fewer than two classes.
    """
    card = splits.train.card
    for name, part in splits._asdict().items():
        if not len(part):
            raise DataError(f"{card.name}: found no images in {name}; expected some in every split")
    if len(card.classes) < 2 and card.task != "multi-label":
        raise DataError(
            f"{card.name}: found one class only ({', '.join(card.classes)}); expected at least two"
        )
    labels = splits.train.labels
    for number, title in enumerate(card.classes):
        present = labels[:, number] if card.task == "multi-label" else labels == number
        if not present.any():
            raise DataError(
                f"{card.name}: found no training image of class {title!r}; expected at least one "
                "of each class: add some or take the class out"
            )
