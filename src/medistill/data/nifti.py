"""`nifti:PATH`: volumes in class folders, or patches round the organs of a label map."""

import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError, extra
from ..progress import say
from ..records import to_record
from ..rng import Rng
from ..sets import Card, Splits
from .decode import Decoded, decoded, stamp_of
from .files import RULE_OPTIONS, VOLUMES, Array, Rule, ending, rule_of, spread, windowed
from .listed import Listed, by_of, intensity_of, loaded
from .source import Source, Where
from .table import Item, assembled, classes_of, deal_of

OPTIONS = (*RULE_OPTIONS, "labels", "start", "by", "deal", "task", "classes", "least")
PATCH = 32
_BROKEN = (
    *(OSError, ValueError, EOFError, zlib.error),
    *(KeyError, TypeError, OverflowError, MemoryError),
)


def load(source: Source, where: Where) -> Splits:
    """Read .nii and .nii.gz volumes.

    nifti:FOLDER            one sub-folder of volumes per class
    nifti:IMAGE;labels=MAP  patches round each label of a map: a class for each value (both may be
                            folders, with maps named as their images; each volume is a patient)

    Volumes are turned to RAS, brought to `spacing` if given, and become intensities by the window
    given, else from the 0.5th to the 99.5th percentile of the volume; 16 bits are kept. Patches
    have the shape of `size` (32 unless given) and are neither padded to black nor stretched: what
    lies outside the volume is its lowest intensity. With dims=2 each label gives one patch for each
    axial slice that holds 20 pixels of it or more, round their center, and slices are kept apart by
    by=image; with dims=3 cubes on a lattice of half their size, round every node inside the label:
    those overlap. Options, beside those of `rule_of`:

        labels=MAP    least=N  labels of N voxels or more (500)    classes=a|b|c  label values
        by=image      part by slice (or cube), not by patient     deal=  as in `folder`
        start=N       the map begins at slice N of the image, whatever the headers say

    Raises: UsageError when nibabel is absent; DataError with the file that cannot be used.
    """
    top = Path(source.target).expanduser()
    if "labels" in source.options:
        return _patches(top, source, where)
    if not top.is_dir():
        raise DataError(f"found no folder {top}; expected one with a sub-folder per class")
    listed = []
    for folder in sorted(entry for entry in top.iterdir() if entry.is_dir()):
        for path in sorted(folder.rglob("*")):
            if ending(str(path)) in VOLUMES:
                listed.append(Listed(str(path), str(path), Item(folder.name)))
    if not listed:
        raise DataError(f"found no volumes in sub-folders of {top}; expected .nii or .nii.gz")
    return loaded(listed, top.resolve().name, source, where)


def opened(path: str) -> Any:
    """Return a volume with its axes in the order right, anterior, superior.

    Raises: DataError when the file is no whole volume of three dimensions.
    """
    library = extra("nibabel", "medical")
    try:
        found = library.load(path)
    except (library.filebasedimages.ImageFileError, *_BROKEN) as error:
        short = " ".join(str(error).split())[:200]
        raise DataError(f"{path} is no NIfTI volume ({short}); expected one") from None
    if len(found.shape) == 4 and found.shape[3] == 1:
        found = library.funcs.squeeze_image(found)
    if len(found.shape) != 3 or 0 in found.shape:
        sides = "x".join(map(str, found.shape))
        raise DataError(f"{path}: found {sides}; expected one volume of three dimensions")
    return library.as_closest_canonical(found)


def _numbers(found: Any, path: str) -> Array:
    try:
        values = np.asarray(found.dataobj, dtype=np.float32)
    except _BROKEN as error:
        short = " ".join(str(error).split())[:200]
        raise DataError(f"{path}: found no readable voxels ({short}); expected a volume") from None
    broken = int((~np.isfinite(values)).sum())
    if broken:
        raise DataError(f"{path}: found {broken} voxels that are not finite; expected numbers")
    return values


def read_volume(path: str, rule: Rule) -> Array:
    """Read a volume as [1, d, h, w], the axes superior, anterior, right; its middle for slices."""
    found = _spaced(opened(path), rule.spacing, path, order=1)
    values = _numbers(found, path).T
    shown = windowed(values, *(rule.window or spread(values)))
    return shown[None] if rule.dims == 3 else shown[None, len(shown) // 2]


def _spaced(found: Any, spacing: tuple[float, ...], path: str, order: int) -> Any:
    """Return a volume resampled to voxels of `spacing` millimeters (right, anterior, superior)."""
    if not spacing:
        return found
    from nibabel.processing import resample_to_output

    values = _numbers(found, path)
    return resample_to_output(found, spacing, order=order, cval=float(values.min()))


@dataclass(frozen=True)
class Patches:
    """The patches of one volume: where they lie, and how large they are."""

    image: str
    labels: str
    centers: tuple[tuple[int, int, int], ...]
    rule: Rule
    start: int | None = None

    @property
    def count(self) -> int:
        """One image for each center."""
        return len(self.centers)

    @property
    def stamp(self) -> list[Any]:
        """Both files and all centers."""
        files = stamp_of(self.image), stamp_of(self.labels)
        return [self.image, *files, self.centers, self.start]


def _patches(top: Path, source: Source, where: Where) -> Splits:
    rule = rule_of(source)
    if not rule.shape:
        rule = replace(rule, shape=(PATCH,) * rule.dims)
    least = source.integer("least", 500, 1, 1 << 40)
    start = source.integer("start", 0, 0, 1 << 20) if "start" in source.options else None
    wanted = source.listed("classes")
    jobs: list[Patches] = []
    items: list[Item] = []
    without = 0
    for image, labels in _pairs(top, Path(source.options["labels"]).expanduser()):
        _, told = _grids(image, labels, rule.spacing, start)
        found = list(_centers(told, rule, least, wanted))
        if not found:
            without += 1
            continue
        jobs.append(Patches(image, labels, tuple(center for _, center in found), rule, start))
        items += [Item(str(value), patient=image, sure=False) for value, _ in found]
    if not items:
        raise DataError(
            f"{top}: found no label of {least} voxels or more; expected some: set least"
        )
    if without:
        say(f"{top.name}: left out {without} volume(s) without a label of {least} voxels or more")
    whole: Decoded = decoded(jobs, cut, (1, *rule.shape), np.dtype(np.uint16), to_record(rule))
    classes = classes_of(items, wanted)
    card = Card(
        name=top.name.removesuffix(".gz").removesuffix(".nii"),
        task="binary" if len(classes) == 2 else "multi-class",
        classes=classes,
        channels=1,
        shape=rule.shape,
        flips=False,  # a mirrored body has its liver on the left
        intensity=intensity_of(replace(rule, shape=()), np.dtype(np.uint16), ".nii"),
    )
    rng, by = Rng(where.seed).child("nifti"), by_of(source)
    return assembled(items, whole, card, rng, by, deal=deal_of(source))


def _pairs(top: Path, labels: Path) -> list[tuple[str, str]]:
    """Return each image with its map: two files, or two folders with the same names.

    Raises: DataError when one of them is missing.
    """
    if top.is_dir() and labels.is_dir():
        names = sorted(n for n in os.listdir(top) if ending(n) in VOLUMES)
        missing = [name for name in names if not (labels / name).is_file()]
        if missing or not names:
            what = f"no map {labels / missing[0]}" if missing else f"no volumes in {top}"
            raise DataError(f"found {what}; expected a map for each image, of the same name")
        return [(str(top / name), str(labels / name)) for name in names]
    for path in (top, labels):
        if not path.is_file():
            raise DataError(f"found no file {path}; expected a volume and its label map")
    return [(str(top), str(labels))]


@lru_cache(maxsize=2)
def _grids(
    image: str, labels: str, spacing: tuple[float, ...], start: int | None
) -> tuple[Array, Array]:
    """Return intensities and labels [d, h, w] on the grid of the label map."""
    library = extra("nibabel", "medical")
    from nibabel.processing import resample_from_to

    held, told = opened(image), opened(labels)
    if start is not None:
        held = held.slicer[:, :, start : start + told.shape[2]]
        if held.shape != told.shape:
            raise DataError(
                f"{labels}: found {told.shape}, which slices of {image} from {start} on do not "
                f"fit ({held.shape}); expected equal sides"
            )
        held = library.Nifti1Image(_numbers(held, image), told.affine)
    told = _spaced(told, spacing, labels, order=0)
    values = _numbers(held, image)
    same = held.shape == told.shape and np.allclose(held.affine, told.affine, atol=1e-3)
    if not same:
        held = resample_from_to(held, told, order=1, cval=float(values.min()))
    whole = _numbers(told, labels)
    if np.abs(whole - whole.round()).max() > 0:
        raise DataError(f"{labels}: found values that are not whole; expected a label map")
    return _numbers(held, image).T, whole.round().astype(np.int64).T


def _centers(
    labels: Array, rule: Rule, least: int, wanted: Sequence[str]
) -> Iterator[tuple[int, tuple[int, int, int]]]:
    """Yield label and center [z, y, x] of every patch."""
    values, counts = np.unique(labels, return_counts=True)
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        if value == 0 or (str(value) not in wanted if wanted else count < least):
            continue
        inside = labels == value
        if rule.dims == 2:
            for z in range(len(labels)):
                rows, columns = inside[z].nonzero()
                if len(rows) >= 20:
                    yield value, (z, round(rows.mean()), round(columns.mean()))
            continue
        steps = [max(1, side // 2) for side in rule.shape]
        lattice = [
            range(step // 2, side, step) for side, step in zip(labels.shape, steps, strict=True)
        ]
        for z in lattice[0]:
            for y in lattice[1]:
                for x in lattice[2]:
                    if inside[z, y, x]:
                        yield value, (z, y, x)


def cut(patches: Patches) -> Array:
    """Return the patches [count, 1, ...] of one volume."""
    rule = patches.rule
    values, _ = _grids(patches.image, patches.labels, rule.spacing, patches.start)
    shown = windowed(values, *(rule.window or spread(values)))
    sides = rule.shape if rule.dims == 3 else (1, *rule.shape)
    margin = [(side // 2, side - side // 2) for side in sides]
    padded = np.pad(shown, margin)
    found = []
    for center in patches.centers:
        where = tuple(slice(at, at + side) for at, side in zip(center, sides, strict=True))
        piece = padded[where]
        found.append(piece if rule.dims == 3 else piece[0])
    whole: Array = np.stack(found)[:, None]
    return whole
