"""Archives of image folders: unpacked once, into the cache, with nothing outside it touched."""

import lzma
import os
import shutil
import tarfile
import zipfile
import zlib
from pathlib import Path

from ..errors import DataError, RunRefused
from ..places import cache_folder
from ..progress import progress
from ..records import digest, locked
from .files import PICTURES

MOST_FILES = 5_000_000
MOST_BYTES = 64 * 2**30


def unpacked(path: Path) -> Path:
    """Return the folder that an archive of images was unpacked to.

    Pictures alone are taken, under their own paths; links, devices, absolute paths and `..` are
    refused. Of one folder that holds everything, the inside is returned.
    Raises: DataError when the archive is damaged, or holds what it must not; RunRefused when there
    is no room.
    """
    facts = path.stat()
    key = digest([str(path.resolve()), facts.st_size, facts.st_mtime_ns])[:24]
    to = cache_folder() / "unpacked" / key
    with locked(to):
        if not to.is_dir():
            begun = to.with_name(f".unpacking-{key}")
            shutil.rmtree(begun, ignore_errors=True)  # of a run that was killed: we have the lock
            try:
                begun.mkdir(mode=0o700)  # it holds pixels of patients
                _unpack(path, begun)
                os.sync()  # before a name that is trusted ever after
                begun.rename(to)
            except FileExistsError:
                raise RunRefused(
                    f"found {begun}, which another user's run left half-made; expected that it can "
                    "be removed: remove it, or set MEDISTILL_CACHE"
                ) from None
            except BaseException:
                shutil.rmtree(begun, ignore_errors=True)
                raise
    inside = [one for one in to.iterdir() if not one.name.startswith((".", "__"))]
    return inside[0] if len(inside) == 1 and inside[0].is_dir() else to


_BROKEN = (
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, ValueError),
    RuntimeError,  # encrypted, or compressed in ways that Python lacks
)


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(
        f"{path} is damaged or holds what an archive of images must not ({error}); expected "
        "pictures in folders: unpack it by hand"
    )


def _unpack(path: Path, to: Path) -> None:
    try:
        if path.name.lower().endswith(".zip"):
            _unzip(path, to)
        else:
            _untar(path, to)
    except _BROKEN as error:
        raise _damaged(path, error) from None
    except OSError as error:
        if error.errno is None:  # said by a decompressor, not by the system
            raise _damaged(path, error) from None
        raise RunRefused(
            f"could not unpack {path}: {error.strerror or error}; expected room in "
            f"{to.parent}: free some, or set MEDISTILL_CACHE"
        ) from None


def _untar(path: Path, to: Path) -> None:
    with tarfile.open(path) as archive, progress(f"unpack {path.name}", 0) as advance:
        total = 0
        for number, member in enumerate(archive):
            total += member.size
            _check(member.name, number, total)
            if member.isfile() and member.name.lower().endswith(PICTURES):
                archive.extract(member, to, filter="data")
                advance()


def _unzip(path: Path, to: Path) -> None:
    with zipfile.ZipFile(path) as archive, progress(f"unpack {path.name}", 0) as advance:
        total = 0
        for number, member in enumerate(archive.infolist()):
            total += member.file_size
            _check(member.filename, number, total)
            if not member.is_dir() and member.filename.lower().endswith(PICTURES):
                archive.extract(member, to)
                advance()


def _check(name: str, files: int, size: int) -> None:
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{name} leads outside")
    if files >= MOST_FILES or size > MOST_BYTES:
        raise ValueError(f"more than {MOST_FILES:,} files or {MOST_BYTES:,} bytes")
