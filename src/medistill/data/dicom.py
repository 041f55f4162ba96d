"""`dicom:PATH`: series of DICOM images, as slices or as volumes."""

import os
import zlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import DataError, UsageError, extra
from ..progress import progress, say
from ..records import to_record
from ..rng import Rng
from ..sets import Card, Splits
from .decode import decoded, stamp_of
from .files import DICOM, RULE_OPTIONS, Array, Rule, ending, fitted, rule_of, spread, windowed
from .listed import BY, by_of, intensity_of
from .source import Source, Where
from .split import depending
from .table import Item, assembled, classes_of, deal_of, task_of

OPTIONS = (*RULE_OPTIONS, "label", "by", "deal", "task", "classes", "limit", "least")
MOST_FRAMES = 1 << 20
NO_IMAGES = ("Segmentation", "SR", "Presentation State", "Encapsulated", "RT ", "Waveform")
# What pydicom raises on files that are cut off or hold nonsense.
_BROKEN = (
    *(OSError, ValueError, EOFError, zlib.error),
    *(KeyError, AttributeError, TypeError, NotImplementedError),
)
RISKS = ("burned in", "secondary capture", "overlay", "private")
LABELS = ("folder", "Modality", "BodyPartExamined", "SeriesDescription", "ProtocolName")


@dataclass(frozen=True)
class Header:
    """What the header of one file says of where it belongs; no name of a patient is kept."""

    path: str
    series: str
    patient: str
    values: dict[str, str]
    place: float
    frames: int
    size: tuple[int, int]
    risks: tuple[str, ...]


@dataclass(frozen=True)
class Series:
    """The files of one series in the order of their slices."""

    headers: tuple[Header, ...]
    rule: Rule

    @property
    def count(self) -> int:
        """Slices, or one volume."""
        if self.rule.dims == 3:
            return 1
        return sum(header.frames for header in self.headers)

    @property
    def stamp(self) -> list[Any]:
        """Where the series lies, and all its files."""
        return [os.path.dirname(self.headers[0].path), *(stamp_of(h.path) for h in self.headers)]


def load(source: Source, where: Where) -> Splits:
    """Read a folder tree, or one file, of DICOM images; endings do not matter.

    Files are grouped by SeriesInstanceUID (by folder where it was emptied) and ordered by position
    along the slices' normal (by InstanceNumber where there is none). Stored values become rescaled
    ones (slope and intercept), then intensities by the window of the option, else of the header,
    else from the 0.5th to the 99.5th percentile of the series; MONOCHROME1 is inverted; 16 bits are
    kept. Compressed pixels are read by pydicom's plugins. Patients come from PatientID (a series
    without one is a patient of its own) and are numbered; names of patients are not read. Options,
    beside those of `rule_of` (dims=3 for volumes):

        label=folder   the sub-folder (the default where there are several), or a header's
                       Modality, BodyPartExamined, SeriesDescription or ProtocolName
        by=image       part by slice, not by patient     deal=  as in `folder`
        least=N        series of N slices or more
        limit=N        at most N slices of each series, evenly
        task=ordinal   classes=a|b|c in order

    Raises: UsageError when pydicom is absent; DataError with the file that cannot be read.
    """
    top = Path(source.target).expanduser()
    rule = rule_of(source)
    headers = headers_of(top)
    # By patient too: where series have lost their numbers, no two patients may become one.
    grouped: dict[tuple[str, str], list[Header]] = defaultdict(list)
    for header in headers:
        grouped[header.patient, header.series].append(header)
    least = source.integer("least", 1, 1, 1 << 20)
    limit = source.integer("limit", 0, 1, 1 << 20)
    series = []
    for found in grouped.values():
        ordered = sorted(found, key=lambda header: header.place)
        if sum(header.frames for header in ordered) < least:
            continue
        if limit and len(ordered) > limit:
            ordered = [ordered[int(i)] for i in np.linspace(0, len(ordered) - 1, limit).round()]
        _check_sizes(ordered, rule)
        series.append(Series(tuple(ordered), rule))
    if not series:
        raise DataError(f"{top}: found no series of {least} slices or more; expected some")
    names = _names(source, series, top)
    items = [
        Item(name, patient=first.patient or first.series, sure=bool(first.patient))
        for one, name in zip(series, names, strict=True)
        for first in [one.headers[0]] * one.count
    ]
    return _splits(items, series, rule, top, source, where)


def _splits(
    items: list[Item], series: list[Series], rule: Rule, top: Path, source: Source, where: Where
) -> Splits:
    classes = classes_of(items, source.listed("classes"))
    task, by = task_of(source, items, classes), by_of(source)
    first = read_series(series[0])
    shape, dtype = first.shape[1:], first.dtype
    found = decoded(series, read_series, shape, dtype, to_record(rule))
    kinds = sorted({one.headers[0].values.get("Modality", "") for one in series})
    card = Card(
        name=top.resolve().name,
        task=task,
        classes=classes,
        channels=shape[0],
        shape=tuple(shape[1:]),
        modality=", ".join(filter(None, kinds)),
        intensity=intensity_of(rule, dtype, ".dcm"),
    )
    facts = {
        name: torch.tensor([value for one in series for value in _per_image(one, name)])
        for name in ("stored height", "stored width", *RISKS)
    }
    rng = Rng(where.seed).child("dicom")
    made = assembled(items, found, card, rng, by, facts, deal_of(source))
    alone = all(one.count == 1 for one in series) or (made.train.card.patients and by == BY[0])
    return depending(
        made,
        "" if alone else "what the slices of a series share (give patients, or one slice of each)",
        "" if "label" in source.options else "labels whose place is found by all (give label)",
    )


def _per_image(one: Series, name: str) -> list[int]:
    values = []
    for header in one.headers:
        sizes = {"stored height": header.size[0], "stored width": header.size[1]}
        values += [sizes.get(name, int(name in header.risks))] * header.frames
    return values[: one.count]


def _check_sizes(headers: Sequence[Header], rule: Rule) -> None:
    sizes = {header.size: header.path for header in headers}
    if len(sizes) > 1 and (not rule.shape or rule.dims == 3):
        (a, one), (b, other) = list(sizes.items())[:2]
        raise DataError(
            f"found slices of {a[0]}x{a[1]} ({one}) and {b[0]}x{b[1]} ({other}) in one series; "
            "expected one size: set size (of slices), or take some out"
        )


def _names(source: Source, series: Sequence[Series], top: Path) -> list[str]:
    """Return the class of each series: its first folder below `top`, or a word of its header."""
    by = source.options.get("label")
    if by is not None and by not in LABELS:
        raise UsageError(f"dicom: found label={by}; expected {', '.join(LABELS)}")
    folders = [Path(os.path.relpath(one.headers[0].path, top)).parts for one in series]
    inside = [parts[0] if len(parts) > 1 else "" for parts in folders]
    if by in (None, "folder") and len(set(inside)) > 1 and all(inside):
        return inside
    if by == "folder":
        raise DataError(f"{top}: found no two sub-folders with series; expected one per class")
    names = [one.headers[0].values.get(by or "Modality", "") for one in series]
    for name, one in zip(names, series, strict=True):
        if not name:
            raise DataError(
                f"{one.headers[0].path}: found no {by or 'Modality'}; expected one as the class: "
                "choose another label"
            )
    return names


def headers_of(top: Path) -> list[Header]:
    """Read the header of every file of a tree.

    Raises: DataError when there is no file, or one that is no DICOM image.
    """
    if top.is_file():
        paths = [str(top)]
    else:
        walked = (
            os.path.join(folder, name)
            for folder, _, names in os.walk(top)
            for name in names
            if not name.startswith(".") and name != "DICOMDIR"
        )
        paths = sorted(walked)
    if not paths:
        raise DataError(f"found no files below {top}; expected DICOM images")
    found, ignored = [], 0
    with progress("DICOM headers", len(paths)) as advance:
        for path in paths:
            if top.is_dir() and not _claims(path):
                ignored += 1
            else:
                found.append(read_header(path))
            advance()
    if ignored:
        say(f"{top}: ignored {ignored} files that are no DICOM")
    if not found:
        raise DataError(f"found no DICOM files below {top}; expected images")
    return found


def _claims(path: str) -> bool:
    """Say whether a file says that it is DICOM, by its ending or its mark."""
    if ending(path) in DICOM:
        return True
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


def read_header(path: str) -> Header:
    """Read what tells where an image belongs.

    Raises: DataError when the file is no DICOM image.
    """
    library = extra("pydicom", "medical")
    try:
        data = library.dcmread(path, stop_before_pixels=True)
        frames, place = int(data.get("NumberOfFrames") or 1), _place(data)
        if not 1 <= frames <= MOST_FRAMES:
            raise ValueError(f"NumberOfFrames is {frames}")
    except (library.errors.InvalidDicomError, *_BROKEN) as error:
        raise DataError(f"{path} is no DICOM file ({error}); expected an image") from None
    kind = getattr(data.get("SOPClassUID"), "name", "")
    other = next((word for word in NO_IMAGES if word in kind), None)
    if other or data.get("Modality") in ("SEG", "SR", "PR", "KO", "RTSTRUCT"):
        raise DataError(
            f"{path} is a {kind or data.get('Modality')}, no image; expected images alone: take it "
            "out of the folder"
        )
    rows, columns = data.get("Rows"), data.get("Columns")
    if not rows or not columns:
        raise DataError(f"{path} has no pixels; expected an image")
    return Header(
        path,
        # Where identifiers were emptied, a folder is a series.
        str(data.get("SeriesInstanceUID") or os.path.dirname(path)),
        str(data.get("PatientID") or ""),
        {name: str(data.get(name) or "") for name in LABELS[1:]},
        place,
        frames,
        (int(rows), int(columns)),
        _risks(data),
    )


def _place(data: Any) -> float:
    """Return how far along the slices' normal an image lies."""
    position, turned = data.get("ImagePositionPatient"), data.get("ImageOrientationPatient")
    try:
        if position and turned:
            normal = np.cross([float(x) for x in turned[:3]], [float(x) for x in turned[3:]])
            return float(np.dot(normal, [float(x) for x in position]))
        return float(data.get("InstanceNumber") or 0)
    except (TypeError, ValueError):
        return 0.0


def _risks(data: Any) -> tuple[str, ...]:
    """Return what in a header tells that pixels or tags may name the patient."""
    kind = getattr(data.get("SOPClassUID"), "name", "")
    secondary = "Secondary Capture" in kind or "SECONDARY" in (data.get("ImageType") or [])
    return tuple(
        name
        for name, there in (
            ("burned in", str(data.get("BurnedInAnnotation") or "").upper() == "YES"),
            ("secondary capture", secondary),
            ("overlay", any(0x6000 <= tag.group <= 0x60FF for tag in data.keys())),  # noqa: SIM118
            ("private", any(tag.is_private for tag in data.keys())),  # noqa: SIM118
        )
        if there
    )


def read_series(series: Series) -> Array:
    """Read a series as [slices, c, h, w], or [1, c, d, h, w] for volumes."""
    rule = series.rule
    stacks = [_values(header.path, rule) for header in series.headers]
    values = [stack for stack, _, _ in stacks]
    window = rule.window or stacks[0][1]
    if window is None and stacks[0][2]:
        window = spread(np.concatenate([stack.ravel() for stack in values]))
    images = [_shown(stack, window, gray) for stack, _, gray in stacks]
    where = series.headers[0].path
    if rule.dims == 3:
        return fitted(np.moveaxis(np.concatenate(images), 0, 1), rule, where)[None]
    return np.stack([fitted(image, rule, where) for frames in images for image in frames])


def read_instance(path: str, rule: Rule) -> Array:
    """Read one file as [c, h, w], or all its frames as [c, d, h, w] for volumes."""
    stack, window, gray = _values(path, rule)
    window = rule.window or window
    if window is None and gray:
        window = spread(stack)
    frames = _shown(stack, window, gray)
    if rule.dims == 3:
        volume: Array = np.moveaxis(frames, 0, 1)
        return volume
    if len(frames) > 1:
        raise DataError(f"{path}: found {len(frames)} frames; expected one: use dicom:, or dims=3")
    first: Array = frames[0]
    return first


def _shown(stack: Array, window: tuple[float, float] | None, gray: bool) -> Array:
    """Return frames [f, c, h, w] as intensities."""
    if not gray:
        return np.moveaxis(stack, -1, 1)
    assert window is not None
    return windowed(stack, *window)[:, None]


def _color(data: Any, pixels: Array, kind: str) -> Array:
    """Return colored frames as 8 bits: numbers of a palette are looked up, deeper ones scaled."""
    from pydicom.pixels.processing import apply_color_lut, convert_color_space

    if kind == "PALETTE COLOR":
        color = np.asarray(apply_color_lut(pixels, data))[..., :3]  # one may tell opacity too
        bits = 8 * color.dtype.itemsize
    else:
        color = np.asarray(pixels if kind == "RGB" else convert_color_space(pixels, kind, "RGB"))
        bits = int(data.get("BitsStored") or 8)
    if bits == 8:
        return color.astype(np.uint8)
    whole: Array = (color.astype(np.float64) * (255 / (2**bits - 1))).round().clip(0, 255)
    return whole.astype(np.uint8)


def _values(path: str, rule: Rule) -> tuple[Array, tuple[float, float] | None, bool]:
    """Return the frames of a file, rescaled and upright; the header's window; whether it is gray.

    Raises: DataError when the pixels cannot be read.
    """
    library = extra("pydicom", "medical")
    try:
        data = library.dcmread(path)
        pixels, kind = data.pixel_array, str(data.get("PhotometricInterpretation"))
        if int(data.get("SamplesPerPixel") or 1) > 1 or kind == "PALETTE COLOR":
            color = _color(data, pixels, kind)
            return color.reshape(-1, *color.shape[-3:]), None, False
        slope = float(data.get("RescaleSlope", 1) or 1)
        values = pixels.astype(np.float32) * slope + float(data.get("RescaleIntercept", 0) or 0)
    except (library.errors.InvalidDicomError, *_BROKEN, RuntimeError) as error:
        short = " ".join(str(error).split())[:200]
        raise DataError(f"{path}: found no readable pixels ({short}); expected an image") from None
    if not np.isfinite(values).all():
        raise DataError(f"{path}: found values that are not finite; expected numbers")
    window = _window(data)
    if kind == "MONOCHROME1":
        values = -values
        window = (-window[0], window[1]) if window else None
        if rule.window is not None:  # the option means stored numbers, not turned ones
            values = values + 2 * rule.window[0]
    return values.reshape(-1, *values.shape[-2:]), window, True


def _window(data: Any) -> tuple[float, float] | None:
    """Return center and width of a header's first window, if it has one."""
    pair = [data.get("WindowCenter"), data.get("WindowWidth")]
    try:
        first = [float(one[0] if hasattr(one, "__len__") else one) for one in pair]
    except (TypeError, ValueError, IndexError):
        return None
    return (first[0], first[1]) if first[1] > 0 and np.isfinite(first).all() else None
