"""One way to open what can be trained on: a dataset by its name, or a package that was signed."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from . import data
from .sets import Splits

if TYPE_CHECKING:
    from .package import PackageSet


@overload
def load(
    source: str | Path, *, root: Path | None = None, offline: bool = False, seed: int = 0
) -> Splits: ...


@overload
def load(source: str | Path, *, trust: str | Path, threshold: int = 1) -> "PackageSet": ...


def load(source: str | Path, *, trust: str | Path | None = None, **options: Any) -> Any:
    """Load a dataset as its splits; with `trust`, a package as a dataset to train on.

    A package is checked against the keys in `trust` (a public.pem, or a folder of them) before
    anything in it is used, and gives images ready for a network with their labels: a
    `torch.utils.data.Dataset` for any training loop. Its card, recipe and scores are `.package`.
    Without `trust`, `options` are those of `medistill.data.load`: root, offline and seed.
    Raises: PackageRefused when a package fails a check; UsageError and DataError as `data.load`.

    Example:
        >>> load("phantom:n=100,size=16").train.images.shape
        torch.Size([100, 1, 16, 16])
    """
    if trust is None:
        return data.load(str(source), **options)
    from .package import PackageSet, read

    return PackageSet(read(Path(source), Path(trust), **options))
