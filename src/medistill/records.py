"""Settings and results to JSON and back, digests, and files that are whole or absent."""

import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .errors import DataError, NoRoom, RunRefused, UsageError, nearest

DIGEST = "sha256"  # of the tensors, in the header of a file of them
State = dict[str, Tensor]
Json = dict[str, Any]
T = TypeVar("T")


def to_record(value: Any) -> Json:
    """Turn a dataclass into plain JSON types (tuples become lists).

    Example:
        >>> from medistill.budget import Budget
        >>> to_record(Budget(ipc=10))
        {'ipc': 10, 'images': None, 'bytes': None, 'share': 'equal', 'small': 'refuse'}
    """
    record: Json = json.loads(json.dumps(dataclasses.asdict(value)))
    return record


def from_record(kind: type[T], record: Mapping[str, Any]) -> T:
    """Make a `kind` (a dataclass) from JSON, with every field checked for its type.

    Raises: UsageError when a field is unknown, missing or of the wrong type (correct that field).
    """
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for name in record:
        if name not in names:
            raise UsageError(f"{kind.__name__} has no field {name!r}: {nearest(name, names)}")
    try:
        adapter: Any = _adapter(kind)  # type: ignore[arg-type]  # a type can be hashed
        found: T = adapter.validate_json(json.dumps(dict(record)), strict=True)
        return found
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UsageError(
            f"{kind.__name__}: {where} is {first.get('input')!r}; {first['msg'].lower()}"
        ) from None


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)  # takes milliseconds to make


def canonical(value: Any) -> bytes:
    """Return the one JSON text of a value: sorted keys, no spaces, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def digest(value: Any) -> str:
    """Return the SHA-256 of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(canonical(value)).hexdigest()


def state_digest(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over sorted (name, dtype, shape, bytes) of a set of tensors."""
    total = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        total.update(canonical([name, str(tensor.dtype), list(tensor.shape)]))
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


UMASK = os.umask(0o077)  # can be read by setting another alone
os.umask(UMASK)


def write_atomic(path: Path, content: bytes, *, mode: int | None = None) -> None:
    """Write a file so that its name holds the old content or the new, whatever happens.

    Temporary file, fsync, rename, fsync of the folder. The user's umask says who may read it,
    unless a `mode` is given. What a killed process left of such files is removed.
    Raises: NoRoom when the disk is full or the folder cannot be written (free space, or
    choose another folder); the old file is left as it was.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{path.name}."
        _sweep(path.parent, prefix, ".tmp")
        handle, temporary = _claimed(
            lambda: tempfile.mkstemp(dir=path.parent, prefix=prefix, suffix=".tmp")
        )
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~UMASK if mode is None else mode)
            os.replace(temporary, path)
        _flushed(path.parent)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        cause = "the disk is full" if error.errno == errno.ENOSPC else str(error.strerror)
        raise NoRoom(
            f"could not write {path}: {cause}; expected {len(content)} bytes of room in a folder "
            "that can be written: free some or choose another folder"
        ) from error
    except BaseException:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise


def check_writable(path: Path) -> None:
    """Refuse, before hours of work, a place where no file can be written.

    Raises: NoRoom.
    """
    try:
        there = next(folder for folder in path.absolute().parents if folder.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise NoRoom(
            f"could not write {path}: {error.strerror}; expected a folder that can be written: "
            "choose another"
        ) from error


def refuse_existing(*paths: Path) -> None:
    """Refuse to write where something is already.

    Raises: RunRefused that names the first such place.
    """
    for path in paths:
        if path.exists():
            raise RunRefused(f"found {path} already there; expected a new place: choose another")


def owner_only(path: Path) -> None:
    """Refuse a secret that others than its owner can read.

    Raises: UsageError.
    """
    if os.stat(path).st_mode & 0o077:
        raise UsageError(f"found {path} open to others; expected mode 600: chmod 600 {path}")


def atomically(out: Path, make: Callable[[Path], object]) -> None:
    """Let `make` write a file or folder under another name, and give it its own once whole.

    What a killed process left of such folders is removed.
    Raises: NoRoom when it cannot be written.
    """
    place, claimed = None, None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # A name of its own, so that nobody can lay a link there before.
        prefix = f".{out.name[:40]}."
        _sweep(out.parent, prefix, ".half")

        def begin() -> tuple[int, str]:
            name = tempfile.mkdtemp(prefix=prefix, suffix=".half", dir=out.parent)
            return os.open(name, os.O_RDONLY), name

        claimed, name = _claimed(begin)
        place = Path(name)
        half = place / out.name
        make(half)
        for path in (half, *half.rglob("*")) if half.is_dir() else (half,):
            _flushed(path)
        os.rename(half, out)
        _flushed(out.parent)
    except OSError as error:
        raise NoRoom(f"could not write {out}: {error.strerror}; choose another place") from None
    finally:
        if place is not None:
            shutil.rmtree(place, ignore_errors=True)
        if claimed is not None:
            os.close(claimed)


def _claimed(begin: Callable[[], tuple[int, str]]) -> tuple[int, str]:
    """Return the handle and name of something half-made, under a lock.

    The system lets the lock go when the process ends. Who sweeps may have been faster than the
    lock: then it is begun again.
    """
    while True:
        handle, name = begin()
        with suppress(OSError):  # of file systems without locks, where nobody sweeps
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.path.lexists(name):
            return handle, name
        os.close(handle)


def _sweep(folder: Path, prefix: str, suffix: str) -> None:
    """Remove what is half-made under such names and belongs to no process any more."""
    with os.scandir(folder) as entries:
        names = [e.path for e in entries if e.name.startswith(prefix) and e.name.endswith(suffix)]
    for name in names:
        with suppress(OSError):  # another one swept, or it is not ours to remove
            handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.isdir(name):
                    shutil.rmtree(name, ignore_errors=True)
                else:
                    os.unlink(name)
            finally:
                os.close(handle)


def _flushed(path: Path) -> None:
    """Have what was written reach the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file that several processes may want to make; it stands beside it.

    Raises: NoRoom when its folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _lock_file(path.with_suffix(".lock"))
    except OSError as error:
        raise NoRoom(
            f"could not write beside {path}: {error.strerror}; expected a folder that can be "
            "written: choose another (of the cache: set MEDISTILL_CACHE)"
        ) from None
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _lock_file(path: Path) -> IO[str]:
    try:
        return open(path, "a", encoding="utf-8")
    except PermissionError:  # another user's, in a folder of both: to hold it, reading is enough
        return open(path, encoding="utf-8")


def kept(path: Path | None, make: Callable[[], Json]) -> Json:
    """Return the record of a file, made and written first where it is not there yet, or damaged.

    Without a path it is made each time, and written nowhere.
    """
    if path is not None and path.is_file():
        with suppress(DataError):
            found: Json = read_json(path)
            return found
    made = make()
    if path is not None:
        write_json(path, made)
    return made


def kept_state(path: Path | None, make: Callable[[], State], header: Json) -> State:
    """Return the tensors of a file, as `kept` does a record; a state of none is not written."""
    if path is not None and path.is_file():
        with suppress(DataError):
            return load_state(path)[0]
    made = make()
    if path is not None and made:
        save_state(path, made, header)
    return made


def write_json(path: Path, value: Any) -> None:
    """Write a JSON value, indented for people, atomically."""
    write_atomic(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises: DataError when the file is missing or is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"found no {path}; expected a file that medistill wrote there") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not readable JSON ({error}); expected a whole file") from None


def save_state(path: Path, state: Mapping[str, Tensor], header: Json) -> None:
    """Write tensors and one JSON header as safetensors, atomically and byte for byte repeatable.

    The header is one string under one key: with several keys safetensors orders them at random. It
    also holds the digest of the tensors, so that `load_state` knows damaged ones.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    told = canonical({**header, DIGEST: state_digest(plain)}).decode()
    write_atomic(path, save(plain, metadata={"medistill": told}))


def header_of(path: Path) -> Json:
    """Read what `save_state` wrote beside the numbers, which are neither read nor checked.

    Raises: DataError when the file is missing, damaged or was not written by medistill.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            return _header(file.metadata())
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise _foreign(path, error) from None


def _header(metadata: dict[str, str] | None) -> Json:
    header = json.loads((metadata or {})["medistill"])
    if not isinstance(header, dict):
        raise ValueError(f"its header is {type(header).__name__}, not an object")
    return header


def _foreign(path: Path, error: Exception) -> DataError:
    return DataError(
        f"{path} is damaged or of another origin ({error}); expected a whole medistill file"
    )


def load_state(path: Path) -> tuple[State, Json]:
    """Read what `save_state` wrote.

    Raises: DataError when the file is missing, damaged or was not written by medistill.
    """
    if not path.is_file():
        raise DataError(f"found no {path}; expected a file that medistill wrote there")
    try:
        with safe_open(str(path), framework="pt") as file:
            header = _header(file.metadata())
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if header.pop(DIGEST, None) not in (None, state_digest(state)):  # None: older files
            raise ValueError("its numbers are not those that were saved")
        return state, header
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise _foreign(path, error) from None
