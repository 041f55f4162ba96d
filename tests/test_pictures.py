"""Picture sheets: sizes, pixels, labels, repeatable bytes."""

from io import BytesIO

import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops

from medistill.errors import DataError, UsageError
from medistill.pictures import (
    GAP_PX,
    MARGIN_PX,
    WIDTH_PX,
    class_sheet,
    png,
    real_beside_synthetic,
    sheet,
)
from medistill.sets import Card, Origin, RealSet, Recipe, SyntheticSet

CARD = Card("toy", "binary", ("left", "right"), 1, (8, 8), (0.5,), (0.2,))


def tiles_in(image: Image.Image, color: tuple[int, int, int]) -> list[tuple[int, int]]:
    """Return the left upper corners of the solid blocks of one color."""
    hits = {
        (x, y)
        for x in range(image.width)
        for y in range(image.height)
        if image.getpixel((x, y)) == color
    }
    return sorted((y, x) for x, y in hits if (x - 1, y) not in hits and (x, y - 1) not in hits)


def colored(n: int, color: tuple[float, float, float], side: int = 4) -> torch.Tensor:
    return torch.tensor(color).view(1, 3, 1, 1).expand(n, 3, side, side)


def test_pixels_become_equal_blocks_and_are_clamped() -> None:
    image = sheet([("", torch.tensor([[[[-3.0, 0.5], [1.0, 9.0]]]]))], scale=3)
    left = image.width - MARGIN_PX - 6
    block = image.crop((left, MARGIN_PX, left + 6, MARGIN_PX + 6)).convert("L")
    expected = torch.tensor([[0, 128], [255, 255]]).repeat_interleave(3, 0).repeat_interleave(3, 1)
    assert list(block.tobytes()) == expected.flatten().tolist()


def test_long_rows_wrap_and_stay_within_the_width() -> None:
    image = sheet([("red", colored(30, (1.0, 0.0, 0.0), 10))], scale=9)
    corners = tiles_in(image, (255, 0, 0))
    assert len(corners) == 30
    lines = sorted({y for y, _ in corners})
    assert len(lines) > 1
    assert lines[1] - lines[0] == 90 + GAP_PX
    assert image.width <= WIDTH_PX


def test_rows_of_other_sizes_share_one_sheet() -> None:
    image = sheet([("a", colored(2, (1.0, 0.0, 0.0), 64)), ("b", colored(3, (0.0, 1.0, 0.0), 8))])
    assert len(tiles_in(image, (255, 0, 0))) == 2
    assert len(tiles_in(image, (0, 255, 0))) == 3


@pytest.mark.parametrize(("side", "shown"), [(28, 84), (64, 64), (200, 200), (600, 200)])
def test_images_come_out_at_a_readable_size(side: int, shown: int) -> None:
    image = sheet([("", torch.zeros(1, 1, side, side))])
    assert image.height == shown + 2 * MARGIN_PX


def test_channels_and_volumes() -> None:
    generator = torch.Generator().manual_seed(0)
    five = torch.rand(2, 4, 5, 6, 6, generator=generator)
    slices = [five[:, :3, 2], five[:, :3, :, 3], five[:, :3, :, :, 3]]
    slices[1:] = [F.pad(part, (0, 0, 0, 1)) for part in slices[1:]]  # depth 5, height 6
    assert png(sheet([("v", five)], 4)) == png(sheet([("v", torch.cat(slices, 3))], 4))
    assert sheet([("v", torch.rand(1, 1, 28, 28, 28))]).height == 84 + 2 * MARGIN_PX
    two = torch.rand(2, 2, 6, 6, generator=generator)
    assert png(sheet([("t", two)])) == png(sheet([("t", two[:, :1])]))


def test_the_label_is_drawn_at_the_left_and_wraps() -> None:
    images = torch.zeros(1, 1, 28, 28)
    blank, named = sheet([("", images)]), sheet([("pneumonia", images)])
    long = sheet([("a class whose name goes on and on, far beyond one line", images)])
    assert blank.width < named.width < long.width < 400
    label = named.crop((0, 0, named.width - 84 - MARGIN_PX, named.height))
    assert ImageChops.invert(label.convert("L")).getbbox() is not None


def test_values_that_are_no_number_are_drawn_black_not_refused() -> None:
    broken = torch.full((1, 1, 4, 4), float("nan"))
    assert png(sheet([("x", broken)])) == png(sheet([("x", torch.zeros(1, 1, 4, 4))]))


def test_png_is_repeatable_whole_and_without_extras() -> None:
    image = sheet([("a", colored(2, (0.2, 0.4, 0.6)))])
    image.info["dpi"] = (300, 300)
    image.info["comment"] = "of today"
    again = Image.open(BytesIO(png(image)))
    assert png(image) == png(image.copy())
    assert again.info == {}
    assert again.convert("RGB").tobytes() == image.tobytes()


def test_refusals_name_what_was_found() -> None:
    with pytest.raises(UsageError, match="found 0 rows"):
        sheet([])
    with pytest.raises(UsageError, match="scale 0"):
        sheet([("a", torch.zeros(1, 1, 4, 4))], scale=0)
    with pytest.raises(DataError, match=r"'a': found images of shape \(4, 4\)"):
        sheet([("a", torch.zeros(4, 4))])


def synthetic_set(images: torch.Tensor, labels: torch.Tensor) -> SyntheticSet:
    recipe = Recipe(CARD.mean, CARD.std, {}, {})
    origin = Origin("dm", {}, 0, "noise", False, "", "0")
    return SyntheticSet(images, labels, recipe, origin, CARD)


def test_real_stands_above_synthetic_class_by_class() -> None:
    real = RealSet(
        torch.arange(6, dtype=torch.uint8).mul(40).view(6, 1, 1, 1).expand(6, 1, 8, 8).contiguous(),
        torch.tensor([1, 0, 1, 0, 1, 0]),
        CARD,
    )
    soft = torch.tensor([[0.3, 0.7], [0.9, 0.1]])
    made = synthetic_set(torch.tensor([1.0, 0.5]).view(2, 1, 1, 1).expand(2, 1, 8, 8), soft)
    gray = [x.float().div(255) for x in real.images]
    expected = sheet(
        [
            ("left\nreal", torch.stack([gray[1], gray[3]])),
            ("left\nsynthetic", made.images[1:]),
            ("right\nreal", torch.stack([gray[0], gray[2]])),
            ("right\nsynthetic", made.images[:1]),
        ]
    )
    assert png(real_beside_synthetic(real, made, per_class=2)) == png(expected)
    with pytest.raises(UsageError, match="found 0 images per class"):
        real_beside_synthetic(real, made, per_class=0)


def test_an_image_with_two_labels_stands_in_both_rows() -> None:
    card = Card("toy", "multi-label", ("left", "right"), 1, (8, 8), (0.5,), (0.2,))
    images = torch.full((1, 1, 8, 8), 90, dtype=torch.uint8)
    real = RealSet(images, torch.tensor([[1, 1]]), card)
    made = synthetic_set(torch.zeros(0, 1, 8, 8), torch.zeros(0, 2))
    expected = sheet([("left\nreal", images / 255), ("right\nreal", images / 255)])
    assert png(real_beside_synthetic(real, made)) == png(expected)


def test_class_sheet_has_a_row_for_each_class_that_has_images() -> None:
    both = RealSet(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 0, 1, 1]), CARD)
    one = RealSet(both.images, torch.zeros(4, dtype=torch.int64), CARD)
    assert class_sheet(both).height > class_sheet(one).height
