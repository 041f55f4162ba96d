"""Image files of any kind: read one, bring it to the shape and channels of its set."""

import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ..errors import DataError, UsageError
from .source import Source

Array = np.ndarray[Any, Any]
Fit = Literal["pad", "stretch"]
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
VOLUMES = (".nii", ".nii.gz")
DICOM = (".dcm", ".dicom", ".ima")
BROKEN = (
    *(OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error),
    *(Image.DecompressionBombError, Image.DecompressionBombWarning),
)
LEAST_SIDE, MOST_SIDE = 1, 4096


@dataclass(frozen=True)
class Rule:
    """How the images of one set are made alike; all of it is part of what a site must repeat.

    shape: the sides of every image, or none: then all must have the same by themselves.
    fit: pad to the shape's proportions with black, or stretch. channels: 1 to 4, 0 as they are.
    window: center and width of intensities, instead of those of the header. spacing: millimeters
    of a voxel, volumes only. dims: 2 for slices, 3 for volumes.
    """

    shape: tuple[int, ...] = ()
    channels: int = 0
    fit: Fit = "pad"
    window: tuple[float, float] | None = None
    spacing: tuple[float, ...] = ()
    dims: int = 2


RULE_OPTIONS = ("size", "channels", "fit", "window", "spacing", "dims")


def rule_of(source: Source, dims: int = 2) -> Rule:
    """Read the options that say how images are made alike.

        size=64 or size=48x64 or size=16x64x64    channels=1 to 4    fit=pad or stretch
        window=40,400 (center, width)    spacing=3 or spacing=3,1,1 (mm)    dims=2 or 3

    Raises: UsageError when an option has no such form.
    """
    kind = source.kind
    dims = source.integer("dims", dims, 2, 3)
    shape = _numbers(source, "size", "x", (1, dims))
    if any(side != int(side) or not LEAST_SIDE <= side <= MOST_SIDE for side in shape):
        raise UsageError(
            f"{kind}: found size={source.options['size']}; expected whole sides up to {MOST_SIDE}"
        )
    sides = tuple(map(int, shape)) * (dims if len(shape) == 1 else 1)
    fit = source.options.get("fit", "pad")
    if fit not in ("pad", "stretch"):
        raise UsageError(f"{kind}: found fit={fit}; expected pad or stretch")
    window = _numbers(source, "window", ",", (2,))
    spacing = _numbers(source, "spacing", ",", (1, 3))
    if (window and window[1] <= 0) or any(step <= 0 for step in spacing):
        raise UsageError(f"{kind}: found a width or spacing of 0 or less; expected more than 0")
    return Rule(
        sides,
        source.integer("channels", 0, 1, 4),
        fit,  # type: ignore[arg-type]
        (window[0], window[1]) if window else None,
        spacing * 3 if len(spacing) == 1 else spacing,
        dims,
    )


def _numbers(source: Source, key: str, mark: str, counts: tuple[int, ...]) -> tuple[float, ...]:
    text = source.options.get(key)
    if text is None:
        return ()
    try:
        numbers = tuple(float(part) for part in text.split(mark))
    except ValueError:
        numbers = ()
    if len(numbers) not in counts or not np.isfinite(numbers).all():
        expected = " or ".join(mark.join("N" * count) for count in counts)
        raise UsageError(f"{source.kind}: found {key}={text}; expected {key}={expected}")
    return numbers


def ending(path: str) -> str:
    """Return a file's ending in small letters, `.nii.gz` whole.

    Example:
        >>> ending("a/B.NII.GZ"), ending("c.jpeg"), ending("CT.1.2.3")
        ('.nii.gz', '.jpeg', '.3')
    """
    name = path.lower()
    return ".nii.gz" if name.endswith(".nii.gz") else Path(name).suffix


def read(path: str, rule: Rule) -> Array:
    """Read one file as [c, h, w] or [c, d, h, w], uint8 or uint16, made alike by `rule`.

    PNG, JPEG, BMP and TIFF of 8 or 16 bits, NIfTI volumes, and DICOM for every other ending.
    Raises: DataError that names the file when it is missing or no whole image.
    """
    return fitted(_reader(path)(path, rule), rule, path)


def _reader(path: str) -> Callable[[str, Rule], Array]:
    kind = ending(path)
    if kind in PICTURES:
        return read_picture
    if kind in VOLUMES:
        from .nifti import read_volume

        return read_volume
    from .dicom import read_instance

    return read_instance


@contextmanager
def picture(path: str) -> Iterator[Image.Image]:
    """Open an image file; of what the library only warns, broken files have an error of ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path) as image:
            yield image


def read_picture(path: str, rule: Rule) -> Array:
    """Read a PNG, JPEG, BMP or TIFF image as [c, h, w]; 16 bits are kept, palettes become color.

    Raises: DataError when the file is missing or no whole image.
    """
    try:
        with picture(path) as image:
            if image.mode.startswith("I;16"):
                return np.asarray(image).astype(np.uint16)[None]
            if image.mode in ("I", "F"):
                values = np.asarray(image)
                if not 0 <= float(values.min()) <= float(values.max()) <= 65535:
                    raise DataError(
                        f"{path}: found pixels from {values.min()} to {values.max()}; expected "
                        "0 to 65535"
                    )
                return values.astype(np.uint16)[None]
            modes = {"1": "L", "P": "RGB", "CMYK": "RGB", "YCbCr": "RGB", "LA": "L", "PA": "RGB"}
            array = np.asarray(image.convert(modes.get(image.mode, image.mode)))
    except FileNotFoundError:
        raise DataError(f"found no file {path}; expected an image there") from None
    except BROKEN as error:
        raise no_whole_image(path, error) from None
    return array[None] if array.ndim == 2 else np.ascontiguousarray(np.moveaxis(array, -1, 0))


def no_whole_image(path: str, error: BaseException) -> DataError:
    """Return the error of a picture that cannot be decoded."""
    return DataError(
        f"{path} is no whole image ({error}); expected one: replace or remove the file"
    )


def fitted(array: Array, rule: Rule, what: str) -> Array:
    """Bring one image [c, ...] to the channels and the shape of the rule, in its own depth.

    Padding is black and even on both sides; then pixels are averaged down or interpolated up
    (linear, antialiased). Color becomes gray by luma (ITU-R 601), gray is repeated into color.
    Raises: DataError when there is no way to the channels that were asked for.
    """
    if rule.channels and len(array) != rule.channels:
        array = _with_channels(array, rule.channels, what)
    if not rule.shape or array.shape[1:] == rule.shape:
        return array
    if len(array.shape) - 1 != len(rule.shape):
        raise DataError(
            f"{what}: found an image of {len(array.shape) - 1} dimensions; expected "
            f"{len(rule.shape)}: set dims"
        )
    full = np.iinfo(array.dtype).max
    pixels = torch.from_numpy(array.astype(np.float32))[None]
    if rule.fit == "pad":
        scale = max(have / want for have, want in zip(array.shape[1:], rule.shape, strict=True))
        margins: list[int] = []
        for have, want in zip(array.shape[:0:-1], rule.shape[::-1], strict=True):
            more = max(0, round(want * scale) - have)
            margins += [more // 2, more - more // 2]
        pixels = F.pad(pixels, margins)
    if len(rule.shape) == 2:
        pixels = F.interpolate(pixels, rule.shape, mode="bilinear", antialias=True)
    else:
        down = all(have >= want for have, want in zip(pixels.shape[2:], rule.shape, strict=True))
        pixels = F.interpolate(pixels, rule.shape, mode="area" if down else "trilinear")
    found: Array = pixels[0].round().clamp(0, full).numpy().astype(array.dtype)
    return found


def _with_channels(array: Array, channels: int, what: str) -> Array:
    if len(array) == 1:
        return np.repeat(array, channels, 0)
    if len(array) == 4 and channels == 3:
        return array[:3]
    if len(array) in (3, 4) and channels == 1:
        luma = np.tensordot(np.array([0.299, 0.587, 0.114]), array[:3].astype(np.float64), 1)
        return luma.round().astype(array.dtype)[None]
    raise DataError(f"{what}: found {len(array)} channels; expected {channels}: set channels")


def windowed(values: Array, center: float, width: float) -> Array:
    """Map intensities from center - width / 2 to center + width / 2 onto 0 to 65535, uint16.

    Example:
        >>> windowed(np.array([-200.0, 40.0, 500.0]), 40, 400).tolist()
        [0, 32768, 65535]
    """
    low = center - width / 2
    scaled = (np.asarray(values, np.float64) - low) / width
    return (scaled.clip(0, 1) * 65535 + 0.5).astype(np.uint16)


def spread(values: Array) -> tuple[float, float]:
    """Return center and width of a window from the 0.5th to the 99.5th percentile of intensities.

    For scans whose numbers have no unit, as those of MR.
    """
    low, high = np.percentile(values, [0.5, 99.5])
    return float(low + high) / 2, max(float(high - low), 1e-6)
