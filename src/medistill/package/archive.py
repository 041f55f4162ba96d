"""The container: a closed list of flat files in one archive that has only one form, or a folder."""

import hashlib
import os
import stat
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from ..errors import PackageRefused

FORMAT = "medistill package 1"
MANIFEST, DATA, SIGNATURE = "manifest.json", "data.safetensors", "signature.dsse.json"
NEEDED = (
    "REPORT.md",
    "croissant.json",
    DATA,
    "evaluation.json",
    MANIFEST,
    "privacy.json",
)
NAMES = (*NEEDED, "preview.png", SIGNATURE)
MOST_BYTES = 64 << 20
MOST_JSON = 256 << 10
MOST_TEXT = 4 << 20
PIECE = 1 << 20
LONGEST = max(map(len, NAMES))
CHANGED = (
    "found an archive in another form than the one that packages have (changed, cut short, "
    "compressed, or more files than are known); expected the sender's file: get it again"
)
ENTRY = struct.Struct("<4s5H3L2H")  # of a file, before its name
LISTED = struct.Struct("<4s6H3L5H2L")  # of a file in the list at the end
END = struct.Struct("<4s4H2LH")
VERSION, DATE = 20, (1980 - 1980) << 9 | 1 << 5 | 1  # of the layout; the first day it knows


def later(name: object) -> bool:
    """Say whether a format is one of packages that came after this version's.

    Example:
        >>> later("medistill package 2"), later(FORMAT), later("other 2")
        (True, False, False)
    """
    kind, _, number = str(name).rpartition(" ")
    known, _, own = FORMAT.rpartition(" ")
    return kind == known and number.isdecimal() and len(number) < 9 and int(number) > int(own)


def most(name: str) -> int:
    """Return the largest size in bytes that a file of a package may have."""
    if name == DATA:
        return MOST_BYTES
    return MOST_JSON if name.endswith(".json") else MOST_TEXT


class Entry(NamedTuple):
    """Where a file lies in what `read(begin, size)` reads, and its CRC-32 (None: in a folder)."""

    read: Callable[[int, int], bytes]
    begin: int
    size: int
    check: int | None = None


class Files(Mapping[str, bytes]):
    """The files of a package: known by name and size, and read when they are asked for.

    A large file is hashed in pieces, so that a stranger's costs no memory before it is known who
    signed it; when it is read after that, it must still have this digest.
    """

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self._entries = dict(entries)
        self._held: dict[str, bytes] = {}
        self._digests: dict[str, str] = {}

    @staticmethod
    def of(files: Mapping[str, bytes]) -> "Files":
        """Return files that lie in memory."""
        if isinstance(files, Files):
            return files
        return Files({name: Entry(slices(held), 0, len(held)) for name, held in files.items()})

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __getitem__(self, name: str) -> bytes:
        """Return a file's bytes, always the same. Raises: PackageRefused when they have changed."""
        if name not in self._held:
            _, _, size, check = self._entries[name]
            content = self.head(name, size)
            if len(content) != size or (check is not None and zlib.crc32(content) != check):
                raise PackageRefused(CHANGED)
            if name in self._digests and _sha256(content) != self._digests[name]:
                raise PackageRefused(f"found {name} changing while it is read; expected it still")
            self._held[name] = content
        return self._held[name]

    def size(self, name: str) -> int:
        """Return how many bytes a file has."""
        return self._entries[name].size

    def head(self, name: str, count: int) -> bytes:
        """Return the first bytes of a file, unchecked: so many, or all there are."""
        read, begin, size, _ = self._entries[name]
        return read(begin, min(count, size))

    def sha256(self, name: str) -> str:
        """Return the SHA-256 of a file, of a large one without holding it."""
        if name not in self._digests:
            read, begin, size, _ = self._entries[name]
            if size <= PIECE or name in self._held:
                self._digests[name] = _sha256(self[name])
            else:
                found = hashlib.sha256()
                for at in range(0, size, PIECE):
                    found.update(read(begin + at, min(PIECE, size - at)))
                self._digests[name] = found.hexdigest()
        return self._digests[name]


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def archived(files: Mapping[str, bytes]) -> bytes:
    """Return the archive of some files: a ZIP that stores them as they are, in order of names.

    No compression, comment, extra field, time or permission: the same files give the same bytes,
    on every machine. Layout: PKWARE's APPNOTE 6.3.10, sections 4.3.7, 4.3.12 and 4.3.16.
    """
    return b"".join(_pieces(files))


def digest_of(files: Mapping[str, bytes]) -> tuple[str, int]:
    """Return the SHA-256 of the archive of some files and its size, without making it."""
    found, size = hashlib.sha256(), 0
    for piece in _pieces(files):
        found.update(piece)
        size += len(piece)
    return found.hexdigest(), size


def _pieces(files: Mapping[str, bytes]) -> Iterator[bytes]:
    facts = []
    for name in sorted(files):
        content = files[name]
        facts.append((name, len(content), zlib.crc32(content)))
        yield _head(*facts[-1])
        yield content
    yield _ending(facts)


def _head(name: str, size: int, check: int) -> bytes:
    """Return what stands before a file."""
    return ENTRY.pack(b"PK\3\4", *_facts(name, size, check)) + name.encode()


def _ending(entries: Sequence[tuple[str, int, int]]) -> bytes:
    """Return the list at the end: each file with its size, its CRC-32 and where it begins."""
    listed, at = [], 0
    for name, size, check in entries:
        facts = _facts(name, size, check)
        listed.append(LISTED.pack(b"PK\1\2", VERSION, *facts, 0, 0, 0, 0, at) + name.encode())
        at += ENTRY.size + len(name.encode()) + size
    length, count = sum(map(len, listed)), len(listed)
    return b"".join((*listed, END.pack(b"PK\5\6", 0, 0, count, count, length, at, 0)))


def _facts(name: str, size: int, check: int) -> tuple[int, ...]:
    return (VERSION, 0, 0, 0, DATE, check, size, size, len(name.encode()), 0)


def extracted(content: bytes) -> dict[str, bytes]:
    """Return the files of an archive that `archived` could have written, and of no other.

    Raises: PackageRefused.
    """
    return dict(laid_out(slices(content), len(content)))


def laid_out(read: Callable[[int, int], bytes], total: int) -> Files:
    """Return the files of an archive of `total` bytes that `read(begin, size)` reads.

    Files follow one another as far as known names go; what stands before each and after them all
    must be, byte for byte, what `archived` writes there, and the sums of files are checked when
    they are read: no second reading of the archive can differ.
    Raises: PackageRefused.
    """
    entries: dict[str, Entry] = {}
    facts: list[tuple[str, int, int]] = []
    at = 0
    while len(entries) < len(NAMES) and (head := read(at, ENTRY.size + LONGEST))[:4] == b"PK\3\4":
        if len(head) < ENTRY.size:
            raise PackageRefused("found an archive cut short; expected a whole file: get it again")
        *_, check, size, _, length, _ = ENTRY.unpack_from(head)
        name = head[ENTRY.size : ENTRY.size + length].decode("ascii", "replace")
        if name not in NAMES or name in entries:
            raise PackageRefused(f"found {_safe(name)} in the archive; expected {_listed()}, once")
        if size > most(name):
            raise PackageRefused(f"found {name} of {size:,} bytes; expected {most(name):,} at most")
        facts.append((name, size, check))
        start = at + ENTRY.size + length
        if head[: ENTRY.size + length] != _head(*facts[-1]) or start + size > total:
            raise PackageRefused(CHANGED)
        entries[name] = Entry(read, start, size, check)
        at = start + size
    ending = _ending(facts)
    if list(entries) != sorted(entries) or at + len(ending) != total or read(at, total) != ending:
        raise PackageRefused(CHANGED)
    return Files(entries)


def slices(content: bytes) -> Callable[[int, int], bytes]:
    """Return how bytes in memory are read at a place."""
    return lambda begin, size: content[begin : begin + size]


def reads(handle: int) -> Callable[[int, int], bytes]:
    """Return how an open file is read at a place; fewer bytes where it ends before."""

    def read(begin: int, size: int) -> bytes:
        parts = []
        while size and (part := os.pread(handle, size, begin)):
            parts.append(part)
            begin, size = begin + len(part), size - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    return read


@contextmanager
def held(path: Path) -> Iterator[Files]:
    """Open a package, an archive or a folder, without following a link; contents are not read yet.

    Raises: PackageRefused when it is neither, or holds what a package does not.
    """
    with ExitStack() as stack:
        try:
            handle = open_plain(stack, path)
        except OSError as error:
            raise PackageRefused(
                f"could not open {path}: {error.strerror}; expected a package, not a link to one"
            ) from None
        if not stat.S_ISDIR(os.fstat(handle).st_mode):
            size = size_of(handle, path.name, MOST_BYTES + MOST_TEXT)
            yield laid_out(reads(handle), size)
            return
        names = os.listdir(handle)
        unknown = sorted(set(names) - set(NAMES))
        if unknown:
            raise PackageRefused(f"found {_safe(unknown[0])} in {path}; expected {_listed()}")
        entries = {}
        for name in sorted(names):
            try:
                inner = open_plain(stack, name, handle)
            except OSError as error:
                raise PackageRefused(
                    f"could not open {name}: {error.strerror}; expected a plain file"
                ) from None
            entries[name] = Entry(reads(inner), 0, size_of(inner, name, most(name)))
        yield Files(entries)


def open_plain(stack: ExitStack, path: Path | str, folder: int | None = None) -> int:
    """Open a path without following a link, until the stack is left. Raises: OSError."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    handle = os.open(path, flags, dir_fd=folder)
    stack.callback(os.close, handle)
    return handle


def plain_file(path: Path, most: int) -> bytes:
    """Return the bytes of a plain file, no link, of a size that it may have.

    Raises: OSError; PackageRefused when it is another thing, or larger.
    """
    with ExitStack() as stack:
        handle = open_plain(stack, path)
        return reads(handle)(0, size_of(handle, path.name, most))


def read_files(path: Path) -> dict[str, bytes]:
    """Return the files of a package, all of them read.

    Raises: as `held`.
    """
    with held(path) as files:
        return dict(files)


def whole(files: Mapping[str, bytes]) -> Mapping[str, bytes]:
    """Return files that are all there, read or not.

    Raises: PackageRefused when one is missing.
    """
    missing = [name for name in NEEDED if name not in files]
    if missing:
        raise PackageRefused(f"found no {missing[0]} in the package; expected a whole one")
    return files


def size_of(handle: int, name: str, limit: int) -> int:
    """Return the size of an open plain file, if it is not beyond the limit."""
    facts = os.fstat(handle)
    if not stat.S_ISREG(facts.st_mode):
        raise PackageRefused(f"found {_safe(name)}, which is no plain file; expected one")
    if facts.st_size > limit:
        raise PackageRefused(
            f"found {_safe(name)} of {facts.st_size:,} bytes; expected {limit:,} at most"
        )
    return facts.st_size


def _safe(name: str) -> str:
    """Return a name that comes from a stranger as it may be printed."""
    return ascii(name[:60])


def _listed() -> str:
    return "only " + ", ".join(NAMES)
