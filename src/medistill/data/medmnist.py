"""`NAME[@SIZE]`: the 18 MedMNIST sets, found on disk or downloaded with their MD5 checked."""

import hashlib
import shutil
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path

from ..errors import DataError, RunRefused, UsageError, nearest
from ..progress import progress, say
from ..records import atomically
from ..sets import Splits
from .medmnist_table import TABLE, Facts
from .npz import read
from .source import Source, Where

OPTIONS: tuple[str, ...] = ()
_CHUNK = 1 << 20
_PATIENCE_S = 60
LARGE = 1 << 30  # bytes that take seconds to hash


def edition(name: str) -> tuple[Facts, int]:
    """Return the facts of `NAME` or `NAME@SIZE` and the size of the edition in pixels.

    Raises: UsageError when the name or the size is unknown.

    Example:
        >>> facts, size = edition("pneumoniamnist@64")
        >>> facts.file(size)
        'pneumoniamnist_64.npz'
    """
    base, at, text = name.partition("@")
    if base not in TABLE:
        raise UsageError(f"found no set {base!r}: {nearest(base, TABLE)}")
    sizes = TABLE[base].md5
    if at and text not in map(str, sizes):
        known = ", ".join(map(str, sizes))
        raise UsageError(f"found {name}; expected one of the sizes of {base}: {known}")
    return TABLE[base], int(text) if at else 28


def load(source: Source, where: Where) -> Splits:
    """Load a MedMNIST set from `where.places()`, downloading it first where that is allowed.

    The MD5 of a file that is there is checked each time, up to LARGE bytes; of larger ones (some at
    224 pixels) when they are downloaded, and by `fetch`.
    Raises: DataError when it is neither there nor to be had, or the file is damaged.
    """
    facts, size = edition(source.target)
    path = find(facts, size, where)
    if path is None:
        path = _obtain(facts, size, where)
    elif path.stat().st_size <= LARGE:
        _check_md5(path, facts.md5[size])
    splits = read(path, facts.card(size))
    counts = tuple(len(part) for part in splits)
    if counts != facts.images:
        raise DataError(
            f"{path}: found {counts} images in train, val and test; expected {facts.images}: "
            f"delete it and run medistill data fetch {source.target}"
        )
    return splits


def find(facts: Facts, size: int, where: Where) -> Path | None:
    """Return the first file of an edition in the places to look, or None."""
    paths = (place / facts.file(size) for place in where.places("medmnist"))
    return next((path for path in paths if path.is_file()), None)


def fetch(name: str, where: Where) -> Path:
    """Return a verified file of an edition: the one on disk, else a download.

    Raises: DataError when the MD5 does not fit; RunRefused when the disk has no room for it.
    """
    facts, size = edition(name)
    path = find(facts, size, where)
    if path is None:
        return _obtain(facts, size, where)
    _check_md5(path, facts.md5[size])
    return path


def _check_md5(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "md5").hexdigest()
    if found != expected:
        raise DataError(f"{path} has MD5 {found}; expected {expected}: delete it and fetch again")


def _obtain(facts: Facts, size: int, where: Where) -> Path:
    if where.offline:
        looked = ", ".join(str(p / facts.file(size)) for p in where.places("medmnist"))
        raise DataError(
            f"found no {facts.file(size)}; looked for {looked}: put it there or leave out --offline"
        )
    card = facts.card(size)
    say(f"{card.name}: license {card.license}; cite {card.citation}")
    return download(card.url, where.cache / "medmnist" / facts.file(size), facts.md5[size])


def download(url: str, path: Path, md5: str) -> Path:
    """Download a file, which gets its name only when its MD5 fits.

    Raises: DataError when the server fails or the MD5 is another; RunRefused when the file does
    not fit on the disk or the folder cannot be written. Nothing is left behind.
    """

    def fetched(half: Path) -> None:
        try:
            found = _stream(url, half)
        except (urllib.error.URLError, TimeoutError, ConnectionError, HTTPException) as error:
            raise DataError(
                f"could not download {url} ({error}); expected an open network: try again, or put "
                f"the file at {path}"
            ) from None
        if found != md5:
            raise DataError(f"{url} has MD5 {found}; expected {md5}: try again later")

    atomically(path, fetched)
    return path


def _stream(url: str, path: Path) -> str:
    """Write the answer of a URL to a file and return its MD5."""
    total = hashlib.md5(usedforsecurity=False)
    with urllib.request.urlopen(url, timeout=_PATIENCE_S) as answer, path.open("wb") as file:
        length = int(answer.headers.get("Content-Length") or 0)
        free = shutil.disk_usage(path.parent).free
        if length > free:
            raise RunRefused(
                f"found {free} free bytes in {path.parent.parent}; expected {length}: free some"
            )
        with progress(f"download {path.name}, bytes", length) as advance:
            while chunk := answer.read(_CHUNK):
                file.write(chunk)
                total.update(chunk)
                advance(len(chunk))
    return total.hexdigest()
