"""Decoding many files once: workers fill a memory-mapped file, which the next run finds again."""

import hashlib
import json
import math
import mmap
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from .. import __version__
from ..engine import Processes
from ..errors import DataError, NoRoom, UsageError
from ..places import cache_folder, cores
from ..progress import progress
from ..records import Json, digest, locked, write_atomic

Array = np.ndarray[Any, Any]
IN_MEMORY = 2**26  # bytes; what is larger goes to a file
KEEP = 64 * 2**30  # bytes of decoded sets that are kept; the oldest go first
FORM = 2  # counts what changes of how files are decoded
CHUNK = 256  # images that a worker decodes before they are written


class Decoded(NamedTuple):
    """Images [n, c, ...], and where they lie if not in memory."""

    images: Tensor
    file: mmap.mmap | None = None
    path: Path | None = None

    def blocks(self) -> Iterator[Tensor]:
        """Yield the images in order and in blocks; each is gone when the next comes."""
        for block in self.images.split(CHUNK):
            yield block
            if self.file is not None:
                self.file.madvise(mmap.MADV_DONTNEED)


class Job(Protocol):
    """What one or several images are decoded from; it travels to workers."""

    @property
    def count(self) -> int:
        """How many images it gives."""

    @property
    def stamp(self) -> list[Any]:
        """What must be the same for a decoded image to be used again: paths, sizes, times."""


def stamp_of(path: str) -> list[Any]:
    """Return path, size and time of change of a file.

    Raises: DataError when there is none.
    """
    try:
        found = os.stat(path)
    except OSError as error:
        raise DataError(f"found no file {path} ({error.strerror}); expected an image") from None
    except ValueError as error:
        raise DataError(f"found the path {path!r} ({error}); expected an image") from None
    return [os.path.abspath(path), found.st_size, found.st_mtime_ns]


def decoded(
    jobs: Sequence[Job],
    read: Callable[[Any], Array],
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    rule: Json,
    cache: Path | None = None,
) -> Decoded:
    """Return the images [n, c, ...] of all jobs, in order.

    `read` returns the images [count, c, ...] of one job. Small sets are decoded here and kept in
    memory. Larger ones are decoded by as many processes as there are cores into a file of the
    cache, under a digest of the jobs' stamps and the rule: a decoding that was stopped goes on
    where it stopped, and a file that is there is not made again. Old files go when the cache holds
    more than KEEP bytes ($MEDISTILL_CACHE_BYTES).
    Raises: DataError when an image cannot be read or has another shape; NoRoom when the disk
    has no room.
    """
    total = sum(job.count for job in jobs)
    size = total * math.prod(shape) * dtype.itemsize
    if size <= IN_MEMORY:
        images = np.empty((total, *shape), dtype)
        with progress("images", total) as advance:
            place = 0
            for job in jobs:
                images[place : place + job.count] = _checked(read(job), job, shape, dtype)
                place += job.count
                advance(job.count)
        return Decoded(torch.from_numpy(images))
    stamps = hashlib.sha256()
    for job in jobs:
        stamps.update(json.dumps(job.stamp).encode())
    what = {
        "form": FORM,
        "stamps": stamps.hexdigest(),
        "shape": shape,
        "dtype": str(dtype),
        "rule": rule,
    }
    folder = (cache or cache_folder()) / "decoded"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # it holds pixels of patients
    path = folder / f"{digest({**what, 'version': __version__})[:32]}.pixels"
    return _held(path, (total, *shape), dtype, partial(_fill, jobs=jobs, read=read))


def arranged(decoded: Decoded, order: Tensor) -> Decoded:
    """Return the images in another order; those of a file are copied into another one, once."""
    images, path = decoded.images, decoded.path
    if path is None or decoded.file is None:
        return Decoded(images[order])
    key = hashlib.sha256(order.numpy().tobytes()).hexdigest()[:16]
    dtype = images.numpy().dtype

    def copy(half: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        pixels = np.memmap(half.with_suffix(".half"), dtype, mode="w+", shape=shape)
        for part in torch.arange(len(order)).split(CHUNK):
            pixels[part[0] : part[-1] + 1] = images[order[part]].numpy()
            assert decoded.file is not None
            decoded.file.madvise(mmap.MADV_DONTNEED)
        pixels.flush()
        half.with_suffix(".half").rename(half)

    shape = (len(order), *images.shape[1:])
    return _held(path.with_name(f"{path.stem}-{key}.pixels"), shape, dtype, copy)


def _held(
    path: Path, shape: tuple[int, ...], dtype: np.dtype[Any], make: Callable[..., None]
) -> Decoded:
    """Return the images of a file of the cache, made where it is not there."""
    with locked(path):  # of two runs one decodes and the other waits
        if not path.is_file():
            _make_room(path.parent, math.prod(shape) * dtype.itemsize, path)
            make(path, shape=shape, dtype=dtype)
        os.utime(path)
        images = np.memmap(path, dtype, mode="c", shape=shape)
    return Decoded(torch.from_numpy(images), images._mmap, path)  # type: ignore[attr-defined]


def _checked(found: Array, job: Job, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    if found.shape != (job.count, *shape) or found.dtype != dtype:
        sides = "x".join(map(str, found.shape[1:]))
        raise DataError(
            f"{job.stamp[0]}: found an image of {sides} ({found.dtype}); expected "
            f"{'x'.join(map(str, shape))} ({dtype}) as the others: set size and channels"
        )
    return found


def _chunk(jobs: Sequence[Job], read: Callable[[Any], Array], like: Any) -> Array:
    return np.concatenate([_checked(read(job), job, *like) for job in jobs])


def _fill(
    path: Path,
    *,
    jobs: Sequence[Job],
    read: Callable[[Any], Array],
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
) -> None:
    """Decode all jobs into a file; what is done is noted beside it, and lives through a kill."""
    half, note = path.with_suffix(".half"), path.with_suffix(".done")
    chunks: list[list[Job]] = [[]]
    for job in jobs:
        if sum(one.count for one in chunks[-1]) >= CHUNK:
            chunks.append([])
        chunks[-1].append(job)
    done = int(note.read_text()) if half.is_file() and note.is_file() else 0
    pixels = np.memmap(half, dtype, mode="r+" if done else "w+", shape=shape)
    place = sum(job.count for chunk in chunks[:done] for job in chunk)
    task = partial(_chunk, read=read, like=(shape[1:], dtype))
    with progress("images", shape[0], done=place) as advance:
        for number, found in enumerate(Processes(cores()).map(task, chunks[done:])):
            pixels[place : place + len(found)] = found
            place += len(found)
            if number % 16 == 15:
                pixels.flush()
                write_atomic(note, str(done + number + 1).encode())
            advance(len(found))
    pixels.flush()
    half.rename(path)
    note.unlink(missing_ok=True)


def _limit() -> int:
    given = os.environ.get("MEDISTILL_CACHE_BYTES", str(KEEP))
    if not given.isdecimal():
        raise UsageError(f"found MEDISTILL_CACHE_BYTES={given}; expected a number of bytes")
    return int(given)


def _make_room(folder: Path, size: int, path: Path) -> None:
    """Remove the oldest decoded sets until the new one fits the limit; refuse a full disk."""
    limit = _limit()
    mine = {path.with_suffix(".half"), path.with_suffix(".done"), path.with_suffix(".lock")}
    done = (file for file in folder.glob("*.pixels") if file != path)
    held = sorted(done, key=lambda file: file.stat().st_mtime)
    total = sum(file.stat().st_size for file in held)
    while held and total + size > limit:
        total -= held[0].stat().st_size
        held.pop(0).unlink()
    free = shutil.disk_usage(folder).free + sum(
        f.stat().st_blocks * 512 for f in mine if f.exists()
    )
    if size > free:
        raise NoRoom(
            f"found {free} bytes free below {folder}; expected {size} for the decoded images: "
            "free some, or name another cache in $MEDISTILL_CACHE"
        )
