"""The container: a closed list of flat files in one archive that has only one form, or a folder."""

import os
import stat
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path

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
ENTRY = struct.Struct("<4s5H3L2H")  # of a file, before its name
LISTED = struct.Struct("<4s6H3L5H2L")  # of a file in the list at the end
END = struct.Struct("<4s4H2LH")
VERSION, DATE = 20, (1980 - 1980) << 9 | 1 << 5 | 1  # of the layout; the first day it knows


def most(name: str) -> int:
    """Return the largest size in bytes that a file of a package may have."""
    if name == DATA:
        return MOST_BYTES
    return MOST_JSON if name.endswith(".json") else MOST_TEXT


def archived(files: Mapping[str, bytes]) -> bytes:
    """Return the archive of some files: a ZIP that stores them as they are, in order of names.

    No compression, comment, extra field, time or permission: the same files give the same bytes,
    on every machine. Layout: PKWARE's APPNOTE 6.3.10, sections 4.3.7, 4.3.12 and 4.3.16.
    """
    parts, listed, at = [], [], 0
    for name in sorted(files):
        content, plain = files[name], name.encode()
        check, size = zlib.crc32(content), len(content)
        facts = (VERSION, 0, 0, 0, DATE, check, size, size, len(plain), 0)
        parts += [ENTRY.pack(b"PK\3\4", *facts), plain, content]
        listed += [LISTED.pack(b"PK\1\2", VERSION, *facts, 0, 0, 0, 0, at), plain]
        at += ENTRY.size + len(plain) + size
    length, count = sum(map(len, listed)), len(files)
    end = END.pack(b"PK\5\6", 0, 0, count, count, length, at, 0)
    return b"".join((*parts, *listed, end))


def extracted(content: bytes) -> dict[str, bytes]:
    """Return the files of an archive that `archived` could have written, and of no other.

    Files are read one after the other as far as known names go; then the archive is written again
    from them, and every byte must be the same: no second reading of it can differ.
    Raises: PackageRefused.
    """
    files: dict[str, bytes] = {}
    at = 0
    while content[at : at + 4] == b"PK\3\4" and len(files) < len(NAMES):
        if at + ENTRY.size > len(content):
            raise PackageRefused("found an archive cut short; expected a whole file: get it again")
        *_, size, _, length, _ = ENTRY.unpack_from(content, at)
        start = at + ENTRY.size
        name = content[start : start + length].decode("ascii", "replace")
        if name not in NAMES or name in files:
            raise PackageRefused(f"found {_safe(name)} in the archive; expected {_listed()}, once")
        if size > most(name):
            raise PackageRefused(f"found {name} of {size:,} bytes; expected {most(name):,} at most")
        at = start + length + size
        files[name] = content[start + length : at]
    if archived(files) != content:
        raise PackageRefused(
            "found an archive in another form than the one that packages have (changed, cut short, "
            "compressed, or more files than are known); expected the sender's file: get it again"
        )
    return files


def read_files(path: Path) -> dict[str, bytes]:
    """Return the files of a package, an archive or a folder, without following a link.

    Raises: PackageRefused when it is neither, or holds what a package does not.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise PackageRefused(
            f"could not open {path}: {error.strerror}; expected a package, not a link to one"
        ) from None
    try:
        if not stat.S_ISDIR(os.fstat(handle).st_mode):
            return extracted(_content(handle, path.name, MOST_BYTES + MOST_TEXT))
        names = os.listdir(handle)
        unknown = sorted(set(names) - set(NAMES))
        if unknown:
            raise PackageRefused(f"found {_safe(unknown[0])} in {path}; expected {_listed()}")
        files = {}
        for name in sorted(names):
            try:
                flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
                inner = os.open(name, flags, dir_fd=handle)
            except OSError as error:
                raise PackageRefused(
                    f"could not open {name}: {error.strerror}; expected a plain file"
                ) from None
            try:
                files[name] = _content(inner, name, most(name))
            finally:
                os.close(inner)
        return files
    finally:
        os.close(handle)


def whole(files: Mapping[str, bytes]) -> Mapping[str, bytes]:
    """Return files that are all there.

    Raises: PackageRefused when one is missing.
    """
    missing = [name for name in NEEDED if name not in files]
    if missing:
        raise PackageRefused(f"found no {missing[0]} in the package; expected a whole one")
    return files


def _content(handle: int, name: str, limit: int) -> bytes:
    """Return the bytes of an open plain file, and never more than the limit."""
    facts = os.fstat(handle)
    if not stat.S_ISREG(facts.st_mode):
        raise PackageRefused(f"found {_safe(name)}, which is no plain file; expected one")
    if facts.st_size > limit:
        raise PackageRefused(
            f"found {_safe(name)} of {facts.st_size:,} bytes; expected {limit:,} at most"
        )
    parts, left = [], limit + 1
    while left and (part := os.read(handle, min(left, 1 << 20))):
        parts.append(part)
        left -= len(part)
    if not left:
        raise PackageRefused(f"found {_safe(name)} growing while it is read; expected it still")
    return b"".join(parts)


def _safe(name: str) -> str:
    """Return a name that comes from a stranger as it may be printed."""
    return ascii(name[:60])


def _listed() -> str:
    return "only " + ", ".join(NAMES)
