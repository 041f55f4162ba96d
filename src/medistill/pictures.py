"""Picture sheets: rows of images with their labels, so that people can look at what was made."""

import math
import textwrap
from collections.abc import Iterator, Sequence
from io import BytesIO
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from .errors import DataError, UsageError
from .sets import RealSet, SyntheticSet

READABLE_PX = 96  # small images grow to about this side
LARGEST_PX = 256  # larger ones shrink to at most this side
WIDTH_PX = 1120
MARGIN_PX = 16
GAP_PX = 4
FONT_PX = 15
LABEL_LETTERS = 22
PAPER, INK, RULE = "#ffffff", "#1b1f24", "#d0d4da"


class _Row(NamedTuple):
    label: str
    tiles: list[Image.Image]


def sheet(rows: Sequence[tuple[str, Tensor]], scale: int | None = None) -> Image.Image:
    """Draw one row of pictures per (label, images), the label at the left; long rows wrap.

    Every pixel becomes scale x scale equal pixels. Without `scale`, small images grow to about 96
    pixels a side, and images above 256 are averaged down by a whole factor. Of two channels the
    first is shown, of four the first three, of a volume its three middle slices side by side: along
    depth, height and width.
    Shapes: images float in [0, 1] (clamped), [n, c, h, w] or [n, c, d, h, w].
    Raises: UsageError when there is no row or the scale is below 1; DataError when images have
    another shape.

    Example:
        >>> sheet([("noise", torch.zeros(3, 1, 28, 28))]).mode
        'RGB'
    """
    if not rows or (scale is not None and scale < 1):
        raise UsageError(
            f"found {len(rows)} rows and scale {scale}; expected one row and scale 1 at least"
        )
    flat = [(label, _flat(label, images)) for label, images in rows]
    return _compose([_Row(_wrapped(name), list(_tiles(images, scale))) for name, images in flat])


def png(image: Image.Image) -> bytes:
    """Return the image as PNG, the same bytes for the same pixels."""
    file = BytesIO()
    # A bare copy: what else the image carries (dates, densities) must not reach the file.
    Image.frombytes(image.mode, image.size, image.tobytes()).save(file, "PNG", compress_level=9)
    return file.getvalue()


def real_beside_synthetic(
    real: RealSet, synthetic: SyntheticSet, per_class: int = 10
) -> Image.Image:
    """Draw, class by class, the first real images above the first synthetic ones.

    A synthetic image with soft labels stands with its likeliest class, one with several labels
    with each; a class without images on one side has no row there.
    Raises: UsageError when `per_class` is below 1.
    """
    if per_class < 1:
        raise UsageError(f"found {per_class} images per class; expected at least 1")
    top = F.one_hot(synthetic.labels.argmax(1), synthetic.labels.shape[1])
    owned = synthetic.labels > 0.5 if real.labels.ndim == 2 else top
    rows = []
    for c, name in enumerate(real.card.classes):
        if len(first := _first(real, c, per_class)):
            rows.append((f"{name}\nreal", first))
        made = owned[:, c].nonzero().flatten()[:per_class]
        if len(made):
            rows.append((f"{name}\nsynthetic", synthetic.images[made]))
    return sheet(rows)


def synthetic_sheet(synthetic: SyntheticSet, per_class: int = 10) -> Image.Image:
    """Draw the first synthetic images of each class, a row for each, from the set alone."""
    own = synthetic.labels.argmax(1)
    rows = [
        (name, synthetic.images[own == c][:per_class].clamp(0, 1))
        for c, name in enumerate(synthetic.card.classes)
    ]
    return sheet([row for row in rows if len(row[1])])


def class_sheet(real: RealSet, per_class: int = 10) -> Image.Image:
    """Draw the first real images of each class, a row for each."""
    rows = [(name, _first(real, c, per_class)) for c, name in enumerate(real.card.classes)]
    return sheet([row for row in rows if len(row[1])])


def _first(real: RealSet, c: int, count: int) -> Tensor:
    """Return the first images of a class, in [0, 1]."""
    return real.images[real.by_class[c][:count].to(real.device)].float() / real.full


def _flat(label: str, images: Tensor) -> Tensor:
    """Return [n, 1 or 3, h, w] float32 in [0, 1] on the CPU."""
    if images.ndim not in (4, 5) or 0 in images.shape[1:]:
        raise DataError(
            f"{label!r}: found images of shape {tuple(images.shape)}; "
            "expected (n, channels, height, width) or (n, channels, depth, height, width)"
        )
    plane = images.detach()
    if plane.ndim == 5:
        plane = _orthogonal(plane)
    plane = plane[:, : 3 if plane.shape[1] >= 3 else 1]
    return torch.nan_to_num(plane.float().cpu()).clamp(0, 1)


def _orthogonal(volumes: Tensor) -> Tensor:
    """Lay the middle slices of volumes [n, c, d, h, w] side by side, bottoms filled with black."""
    planes = [volumes.select(axis, volumes.shape[axis] // 2) for axis in (2, 3, 4)]
    tall = max(plane.shape[2] for plane in planes)
    return torch.cat([F.pad(p, (0, 0, 0, tall - p.shape[2])) for p in planes], 3)


def _tiles(images: Tensor, scale: int | None) -> Iterator[Image.Image]:
    side = (
        min(images.shape[-2:])
        if images.shape[-1] > 2 * images.shape[-2]
        else max(images.shape[-2:])
    )
    if scale is None and side > LARGEST_PX:
        images = F.avg_pool2d(images, math.ceil(side / LARGEST_PX), ceil_mode=True)
    times = scale or max(1, READABLE_PX // side)
    pixels = images.mul(255).round().to(torch.uint8)
    pixels = pixels.repeat_interleave(times, -2).repeat_interleave(times, -1)
    for one in pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous():
        yield Image.frombytes("RGB", (one.shape[1], one.shape[0]), one.numpy().tobytes())


def _wrapped(label: str) -> str:
    lines = (textwrap.wrap(line, LABEL_LETTERS) or [""] for line in label.split("\n"))
    return "\n".join(part for line in lines for part in line)


def _places(row: _Row, left: int) -> list[tuple[int, int]]:
    """Return the corner of each tile, from the row's top, wrapped at the sheet's width."""
    if not row.tiles:
        return []
    wide, tall = row.tiles[0].width + GAP_PX, row.tiles[0].height + GAP_PX
    per_line = max(1, (WIDTH_PX - MARGIN_PX - left + GAP_PX) // wide)
    return [(left + i % per_line * wide, i // per_line * tall) for i in range(len(row.tiles))]


def _compose(rows: Sequence[_Row]) -> Image.Image:
    font = ImageFont.load_default(size=FONT_PX)
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    boxes = [pen.multiline_textbbox((0, 0), row.label, font=font) for row in rows]
    left = 2 * MARGIN_PX + math.ceil(max(box[2] for box in boxes))
    places = [_places(row, left) for row in rows]
    heights, width = [], left
    for row, corners, box in zip(rows, places, boxes, strict=True):
        ends = [y + tile.height for tile, (_, y) in zip(row.tiles, corners, strict=True)]
        heights.append(max([math.ceil(box[3]), *ends]))
        sides = [x + tile.width for tile, (x, _) in zip(row.tiles, corners, strict=True)]
        width = max([width, *(side + MARGIN_PX for side in sides)])
    image = Image.new("RGB", (width, sum(heights) + MARGIN_PX * (len(rows) + 1)), PAPER)
    pen = ImageDraw.Draw(image)
    top = MARGIN_PX
    for i, (row, corners, height) in enumerate(zip(rows, places, heights, strict=True)):
        if i and row.label.split("\n")[0] != rows[i - 1].label.split("\n")[0]:
            rule = top - MARGIN_PX // 2
            pen.line([(MARGIN_PX, rule), (width - MARGIN_PX, rule)], fill=RULE)
        pen.multiline_text((MARGIN_PX, top), row.label, fill=INK, font=font)
        for tile, (x, y) in zip(row.tiles, corners, strict=True):
            image.paste(tile, (x, top + y))
        top += height + MARGIN_PX
    return image
