"""`npz:PATH`: a file in the layout of MedMNIST, that is images and labels of three splits."""

import dataclasses
import hashlib
import os
import re
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from ..sets import FULL, Card, RealSet, Splits, TaskKind
from .medmnist_table import TABLE
from .source import Source, Where

OPTIONS: tuple[str, ...] = ()
SPLITS = ("train", "val", "test")
MAP_FROM = 2**26  # bytes; larger arrays that are not compressed stay in their file
_BROKEN = (
    *(zipfile.BadZipFile, zlib.error, EOFError),
    *(OSError, ValueError, RuntimeError, MemoryError),
    *(SyntaxError, tokenize.TokenError),  # of a header that numpy parses as Python's literals
)
Array = np.ndarray[Any, Any]


def load(source: Source, where: Where) -> Splits:
    """Read `npz:PATH`; the facts of a MedMNIST set are used where name and MD5 fit.

    Raises: DataError when the file is missing, damaged or of another layout.
    """
    path = Path(source.target).expanduser()
    return read(path, _known_card(path))


def read(path: Path, card: Card | None = None) -> Splits:
    """Read train, val and test from keys such as `train_images` and `train_labels`.

    `train_groups` and so on, whole numbers [n], tell patients apart. Without a card, classes are
    named by their numbers and the task follows from the labels.
    Shapes: images uint8, uint16, or floats from 0 to 1 (kept as 16 bits), [n, h, w], [n, h, w, 3]
    or [n, d, h, w]; labels [n], [n, 1] or [n, k].
    Raises: DataError when the file is missing, no npz, truncated, too large for the memory,
    or when a key is missing or holds something else.
    """
    if not path.is_file():
        raise DataError(
            f"found no {path}; expected an .npz file with train_images, train_labels, ..."
        )
    try:
        with zipfile.ZipFile(path) as archive:
            _check_members(archive, path)
            arrays = {
                f"{name}_{what}": _array(archive, f"{name}_{what}.npy", path)
                for name in SPLITS
                for what in ("images", "labels")
            }
            told = {f"{name}_groups" for name in SPLITS} & set(_sizes(archive))
            people = {n.split("_")[0]: _array(archive, f"{n}.npy", path) for n in sorted(told)}
    except _BROKEN as error:
        raise DataError(
            f"{path} is damaged or no .npz file ({error}); expected a whole one"
        ) from None
    files = {name: getattr(arrays[f"{name}_images"], "_mmap", None) for name in SPLITS}
    images = {name: _images(arrays.pop(f"{name}_images"), f"{path}: {name}") for name in SPLITS}
    labels = {name: _labels(arrays.pop(f"{name}_labels"), f"{path}: {name}") for name in SPLITS}
    card = card or _card(path, images["train"], labels)
    groups = _groups(people, images, path)
    card = dataclasses.replace(card, patients=bool(groups))
    parts = (RealSet(images[n], labels[n], card, groups.get(n), file=files[n]) for n in SPLITS)
    return Splits(*parts)


def _check_members(archive: zipfile.ZipFile, path: Path) -> None:
    sizes = _sizes(archive)
    for key in (f"{name}_{what}" for name in SPLITS for what in ("images", "labels")):
        if key not in sizes:
            found = ", ".join(sorted(sizes)) or "nothing"
            raise DataError(f"{path} has no {key}; found {found}: expected the keys of MedMNIST")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # Arrays that are not compressed stay in the file.
    packed = (info for info in archive.infolist() if info.compress_type != zipfile.ZIP_STORED)
    needed = sum(info.file_size for info in packed)
    if needed > memory:
        raise DataError(
            f"{path}: found {needed} bytes of arrays; expected at most the memory, "
            f"{memory} bytes: choose a smaller edition, or save it with numpy.savez, uncompressed"
        )


def _sizes(archive: zipfile.ZipFile) -> dict[str, int]:
    return {info.filename.removesuffix(".npy"): info.file_size for info in archive.infolist()}


def _array(archive: zipfile.ZipFile, member: str, path: Path) -> Array:
    """Read one array; its header is compared with its size first, as numpy trusts the header."""
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{member} has format version {version}")
        reader = np.lib.format.read_array_header_1_0
        if version == (2, 0):
            reader = np.lib.format.read_array_header_2_0
        shape, fortran, dtype = reader(file)
        header = file.tell()
        expected = header + int(np.prod(shape, dtype=object)) * dtype.itemsize
    if not dtype.hasobject and expected != archive.getinfo(member).file_size:
        raise ValueError(f"{member} says shape {shape}, which its size does not fit")
    if dtype.kind not in "uibf":
        raise DataError(f"{path}: found {member} of type {dtype}; expected numbers")
    info = archive.getinfo(member)
    stored = info.compress_type == zipfile.ZIP_STORED
    if stored and not info.file_size == info.compress_size <= path.stat().st_size:
        raise ValueError(f"{member} says {info.file_size} bytes, which the file does not hold")
    if stored and info.file_size >= MAP_FROM and not fortran:
        # Copy on write: torch wants memory that it may write to, and the file stays as it is.
        return np.memmap(path, dtype, mode="c", offset=_start(path, info) + header, shape=shape)
    with archive.open(member) as file:
        array: Array = np.lib.format.read_array(file, allow_pickle=False)
    return array


def _start(path: Path, info: zipfile.ZipInfo) -> int:
    """Return where the bytes of a stored member begin, from its own header in the file."""
    with path.open("rb") as file:
        file.seek(info.header_offset)
        header = file.read(30)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise ValueError(f"{info.filename} has no header where the archive says it is")
        start: int = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
        if start + info.file_size > path.stat().st_size:
            raise ValueError(f"{info.filename} is cut off")
    return start


def _images(array: Array, where: str) -> Tensor:
    if array.dtype.kind == "f":
        array = _sixteen(array, where)
    if array.dtype not in (np.uint8, np.uint16):
        raise DataError(
            f"{where}: found {array.dtype} images; expected uint8, uint16, or floats from 0 to 1"
        )
    if 0 in array.shape[1:]:
        raise DataError(f"{where}: found images of shape {array.shape}; expected some pixels")
    mapped = isinstance(array, np.memmap)
    if array.ndim == 3 or (array.ndim == 4 and array.shape[-1] > 3):
        return torch.from_numpy(np.ascontiguousarray(array[:, None]))
    if array.ndim == 4 and array.shape[-1] in (1, 3):
        moved = np.moveaxis(array, -1, 1)
        return torch.from_numpy(moved if mapped else np.ascontiguousarray(moved))
    raise DataError(
        f"{where}: found images of shape {array.shape}; expected (n, h, w), (n, h, w, 3) or "
        "(n, d, h, w)"
    )


def _sixteen(array: Array, where: str) -> Array:
    """Return intensities from 0 to 1 as 16-bit numbers."""
    # NaN is named on its own: rescaling, the usual cure of a wrong range, would not mend it.
    broken = int((~np.isfinite(array)).sum())
    if broken:
        raise DataError(
            f"{where}: found {array.dtype} images with {broken} pixels that are not finite; "
            "expected numbers"
        )
    if array.size and not 0 <= float(array.min()) <= float(array.max()) <= 1:
        raise DataError(
            f"{where}: found intensities from {array.min():g} to {array.max():g}; expected floats "
            "from 0 to 1: scale them"
        )
    return (array * 65535 + 0.5).astype(np.uint16)


def _groups(arrays: dict[str, Array], images: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return the patients of each split, numbered across all of them, where the file has them."""
    if not arrays:
        return {}
    for name in SPLITS:
        found = arrays.get(name)
        if found is None or found.dtype.kind not in "uib" or found.shape != (len(images[name]),):
            raise DataError(
                f"{path}: found {name}_groups {'' if found is None else found.shape}; expected a "
                f"whole number for each of {len(images[name])} images, in every split or in none"
            )
    _, numbers = np.unique(np.concatenate([arrays[n] for n in SPLITS]), return_inverse=True)
    parts = torch.from_numpy(numbers).long().split([len(images[n]) for n in SPLITS])
    return dict(zip(SPLITS, parts, strict=True))


def _labels(array: Array, where: str) -> Tensor:
    if array.dtype.kind not in "uib":
        raise DataError(f"{where}: found labels of type {array.dtype}; expected whole numbers")
    if 0 in array.shape[1:]:
        raise DataError(f"{where}: found labels of shape {array.shape}; expected one each or more")
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim not in (1, 2):
        raise DataError(f"{where}: found labels of shape {array.shape}; expected (n, 1) or (n, k)")
    return torch.from_numpy(array.astype(np.int64))


def _card(path: Path, images: Tensor, labels: dict[str, Tensor]) -> Card:
    if labels["train"].ndim == 2:
        task: TaskKind = "multi-label"
        count = labels["train"].shape[1]
    else:
        count = 1 + max((int(part.max()) for part in labels.values() if len(part)), default=-1)
        task = "binary" if count == 2 else "multi-class"
        # A label such as 255 is a mark of its own, not the last of 256 classes.
        if count > max(len(labels["train"]), 2):
            raise DataError(
                f"{path}: found label {count - 1} among {len(labels['train'])} training images; "
                "expected classes numbered from 0"
            )
    return Card(
        name=path.stem,
        task=task,
        classes=tuple(str(c) for c in range(count)),
        channels=images.shape[1],
        shape=tuple(images.shape[2:]),
        intensity=f"{8 * images.element_size()}-bit values / {FULL[images.dtype]}",
    )


def _known_card(path: Path) -> Card | None:
    match = re.fullmatch(r"([a-z]+mnist(?:3d)?)(?:_(\d+))?", path.stem)
    facts = TABLE.get(match[1]) if match else None
    size = int(match[2] or 28) if match else 0
    if facts is None or size not in facts.md5 or not path.is_file():
        return None
    with path.open("rb") as file:
        fits = hashlib.file_digest(file, "md5").hexdigest() == facts.md5[size]
    return facts.card(size) if fits else None
