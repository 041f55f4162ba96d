"""`folder:PATH`: one sub-folder of images per class, with or without train, val and test above."""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from ..errors import DataError, UsageError
from ..progress import progress, say
from ..rng import Rng
from ..sets import Card, Splits
from .archive import unpacked
from .decode import decoded
from .files import BROKEN, PICTURES, Array, no_whole_image, picture
from .listed import Listed
from .source import ARCHIVES, Source, Where
from .split import SHARES, depending
from .table import Item, assembled, deal_of

OPTIONS = ("size", "channels", "limit", "deal")
# What people name the folders of splits, whatever the case.
WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_GRAY = ("1", "L", "LA")


class _Item(NamedTuple):
    path: str
    split: str
    label: str


def load(source: Source, where: Where) -> Splits:
    """Read class folders of PNG, JPEG, BMP or TIFF images, or an archive of them (tar, zip).

    Folders train and test (and val; also training, testing, valid and validation, in any case)
    above the class folders are kept as they are; a split that is missing is cut off train.
    Otherwise 70, 10 and 20 percent of each class become train, val and test by seed, and images
    with identical pixels stay together, also across classes.
    `groups` numbers identical images. Options:

        size=N      pad to a square with black, then resize to N x N (bilinear, antialiased);
                    without it every image must have one size
        channels=1  color to gray by luma (ITU-R 601); channels=3 repeats gray; without it 1 if
                    every image is gray, else 3
        limit=N     at most N images of each class (of each given split), chosen by seed
        deal=each   each image falls to a split by its own pixels (and the seed) alone, so that no
                    other one moves it (docs/privacy.md); shares then come out about right
        deal=val    the same where the test split is given: all others fall to train or val

    Raises: DataError when there are no images or classes, or an image is broken, of another size
    or deeper than 8 bits.
    """
    top = Path(source.target).expanduser()
    name = top.resolve().name
    if name.lower().endswith(ARCHIVES) and top.is_file():
        name, top = name.partition(".")[0], unpacked(top)
    size = source.integer("size", 0, 1, 4096)
    channels = source.integer("channels", 0, 1, 3)
    if channels == 2:
        raise UsageError("folder: found channels=2; expected 1 or 3")
    rng = Rng(where.seed).child("folder")
    items, classes = _items(top)
    limit = source.integer("limit", 0, 1, 1 << 40)
    items = _chosen(items, limit, rng)
    count, shape = _header([item.path for item in items], size, channels)
    read = partial(_picture, mode="L" if count == 1 else "RGB", shape=shape, pad=bool(size))
    listed = [Listed(item.path, item.path, Item(item.label, item.split)) for item in items]
    dtype = np.dtype(np.uint8)
    images = decoded(listed, read, (count, *shape), dtype, {"folder": dict(read.keywords)})
    card = Card(
        name=name,
        task="binary" if len(classes) == 2 else "multi-class",
        classes=tuple(classes),
        channels=count,
        shape=shape,
        intensity="8-bit values / 255",
    )
    found = assembled([one.item for one in listed], images, card, rng, deal=deal_of(source))
    return depending(
        found,
        "limit" if limit else "",
        "" if channels else "channels that are read from all images (give channels)",
    )


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted(
            (e for e in entries if not e.name.startswith((".", "__"))), key=lambda e: e.name
        )


def _splits(top: Path) -> dict[str, Path]:
    """Return the folders of train, val and test by split, or the folder itself where it has none.

    Raises: DataError when some of its folders are named as splits are, and they are not those.
    """
    named = {e.name: WORDS.get(e.name.casefold()) for e in _visible(top) if e.is_dir()}
    splits = [split for split in named.values() if split]
    if not splits:
        return {"": top}
    if None in named.values() or "train" not in splits or len(set(splits)) < len(splits):
        raise DataError(
            f"found {', '.join(map(ascii, named))} in {top}; expected train (with val and test or "
            "without) and nothing beside, or classes of other names"
        )
    return {split: top / name for split in SHARES for name, own in named.items() if own == split}


def _items(top: Path) -> tuple[list[_Item], list[str]]:
    """Find every image with its split and class, and every class, in sorted order."""
    if not top.is_dir():
        raise DataError(f"found no folder {top}; expected one with a sub-folder per class")
    items, ignored = [], 0
    classes = set()
    for split, part in _splits(top).items():
        for label in (entry for entry in _visible(part) if entry.is_dir()):
            classes.add(label.name)
            for folder, below, files in os.walk(label.path):
                below[:] = sorted(name for name in below if not name.startswith((".", "__")))
                shown = sorted(name for name in files if not name.startswith("."))
                images = [name for name in shown if name.lower().endswith(PICTURES)]
                ignored += len(shown) - len(images)
                items += [_Item(os.path.join(folder, n), split, label.name) for n in images]
    if ignored:
        say(f"{top}: ignored {ignored} files that are no {', '.join(PICTURES)}")
    for name in classes:
        if not name.isprintable():  # nor is half a character, which no file can hold
            raise DataError(f"found class {name!a} in {top}; expected a name that can be shown")
    if not items:
        raise DataError(
            f"found no images in sub-folders of {top}; expected one sub-folder per class with "
            f"files {', '.join(PICTURES)}"
        )
    return items, sorted(classes)


def _chosen(items: list[_Item], limit: int, rng: Rng) -> list[_Item]:
    """Keep at most `limit` images of each class and given split."""
    if not limit:
        return items
    by_class: dict[tuple[str, str], list[_Item]] = {}
    for item in items:
        by_class.setdefault((item.split, item.label), []).append(item)
    kept = []
    for (split, label), found in by_class.items():
        order = torch.randperm(len(found), generator=rng.at("limit", split, label))
        kept += [found[position] for position in order[:limit].sort().values.tolist()]
    return kept


def _header(paths: Sequence[str], size: int, channels: int) -> tuple[int, tuple[int, int]]:
    """Read every header; return the channels and the shape (h, w) of the set."""
    sizes: dict[tuple[int, int], str] = {}
    gray = True
    with progress("image headers", len(paths)) as advance:
        for path in paths:
            try:
                with picture(path) as image:
                    _check_depth(image, path)
                    sizes.setdefault(image.size, path)
                    gray &= image.mode in _GRAY
            except BROKEN as error:
                raise no_whole_image(path, error) from None
            advance()
    if len(sizes) > 1 and not size:
        (a, one), (b, other) = list(sizes.items())[:2]
        raise DataError(
            f"found sizes {a[0]}x{a[1]} ({one}) and {b[0]}x{b[1]} ({other}); expected one size: "
            f"add ;size={min(*a, *b)}"
        )
    width, height = next(iter(sizes))
    return channels or (1 if gray else 3), (size, size) if size else (height, width)


def _check_depth(image: Image.Image, path: str) -> None:
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        raise DataError(f"{path}: found {frames} frames; expected one image per file: split it")
    if image.mode.startswith(("I", "F")) or ";16" in str(getattr(image, "tile", "")):
        raise DataError(
            f"{path}: found more than 8 bits per channel ({image.mode}); expected 8: convert it "
            "with a window that suits the modality"
        )


def _picture(one: Listed, *, mode: str, shape: tuple[int, int], pad: bool) -> Array:
    """Decode one image as [1, c, h, w]."""
    try:
        with picture(one.path) as opened:
            image = opened.convert(mode)
    except BROKEN as error:
        raise no_whole_image(one.path, error) from None
    pixels = np.asarray(_fit(image, shape) if pad else image).reshape(*shape, -1)
    return np.ascontiguousarray(np.moveaxis(pixels, -1, 0))[None]


def _fit(image: Image.Image, shape: tuple[int, int]) -> Image.Image:
    side = max(image.size)
    if image.size != (side, side):
        square = Image.new(image.mode, (side, side))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    return image if image.size == shape else image.resize(shape, Image.Resampling.BILINEAR)
