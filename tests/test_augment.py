"""Augmentation against plain loops over images, its ranges, its gradients and its draws."""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from medistill.augment import KINDS, Augmentation, Draw
from medistill.rng import Rng

SHAPE = (9, 12)  # odd, even and not square, so that mixed-up axes show


def images(n: int, channels: int = 3, shape: tuple[int, ...] = SHAPE) -> Tensor:
    """Return images of noise."""
    return torch.randn(n, channels, *shape, generator=Rng(0).at("images"))


def draw_of(kind: str, n: int, number: int = 0, shape: tuple[int, ...] = SHAPE) -> Draw:
    """Return a draw of one kind."""
    only = dataclasses.replace(Augmentation(), kinds=(kind,))
    return only.draw(n, shape, Rng(number).at(kind))


# The plain twin: one image at a time, pixel by pixel, from the words of the specification.


def value(image: np.ndarray, channel: int, place: Sequence[float]) -> float:
    """Read a pixel, zero outside."""
    inside = all(0 <= at < side for at, side in zip(place, image.shape[1:], strict=True))
    return float(image[channel, *map(int, place)]) if inside else 0.0


def plain_color(image: np.ndarray, p: dict[str, float]) -> np.ndarray:
    image = image + p["brightness"]
    if len(image) > 1:
        gray = image.mean(0)
        image = (image - gray) * p["saturation"] + gray
    return (image - image.mean()) * p["contrast"] + image.mean()


def plain_crop(image: np.ndarray, p: dict[str, np.ndarray]) -> np.ndarray:
    out = np.zeros_like(image)
    for c, *place in np.ndindex(image.shape):
        out[c, *place] = value(image, c, np.array(place) + p["shift"])
    return out


def plain_cutout(image: np.ndarray, p: dict[str, np.ndarray]) -> np.ndarray:
    out = image.copy()
    for c, *place in np.ndindex(image.shape):
        if all(0 <= at < p["length"][axis] for axis, at in enumerate(place - p["first"])):
            out[c, *place] = 0
    return out


def plain_flip(image: np.ndarray, p: dict[str, float]) -> np.ndarray:
    return (
        np.stack([row[::-1] for row in image.reshape(-1, image.shape[-1])]).reshape(image.shape)
        if p["mirror"]
        else image
    )


def plain_affine(image: np.ndarray, p: dict[str, np.ndarray]) -> np.ndarray:
    """Read each pixel where the matrix sends it, coordinates in [-1, 1], bilinear, zero outside.

    Coordinates run from the last axis to the first, as rows and columns of the matrix do.
    """
    matrix, sides = p["theta"], np.array(image.shape[:0:-1])
    out = np.zeros_like(image)
    for channel, *place in np.ndindex(image.shape):
        unit = (2 * np.array(place[::-1]) + 1) / sides - 1
        sent = ((matrix @ [*unit, 1] + 1) * sides - 1) / 2
        for corner in itertools.product((0, 1), repeat=len(sides)):
            near = np.floor(sent) + corner
            weight = float(np.prod(1 - abs(sent - near)))
            out[channel, *place] += weight * value(image, channel, near[::-1])
    return out


PLAIN = {
    "color": plain_color,
    "crop": plain_crop,
    "cutout": plain_cutout,
    "flip": plain_flip,
    "scale": plain_affine,
    "rotate": plain_affine,
}


@pytest.mark.parametrize("shape", [SHAPE, (5, 6, 7)], ids=["image", "volume"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_equals_its_plain_twin(
    kind: str, shared: bool, channels: int, shape: tuple[int, ...]
) -> None:
    x = images(5, channels, shape)
    for number in range(3):
        draw = draw_of(kind, 1 if shared else 5, number, shape)
        y = Augmentation().apply(x, draw)
        for k, image in enumerate(x.double().numpy()):
            own = {
                name: v.numpy()[min(k, len(v) - 1)].astype(float) for name, v in draw.values.items()
            }
            np.testing.assert_allclose(y[k].numpy(), PLAIN[kind](image, own), atol=1e-5)


def test_gray_saturation_is_the_identity() -> None:
    x = images(3, 1)
    draw = draw_of("color", 1)
    other = Draw("color", {**draw.values, "saturation": torch.zeros(1)})
    assert torch.equal(Augmentation().apply(x, draw), Augmentation().apply(x, other))


# Strengths


MANY = 20_000


def spans(values: Tensor, low: float, high: float) -> bool:
    """Say whether many uniform values fill [low, high] and nothing beyond."""
    slack = 0.005 * (high - low)
    inside = low <= float(values.min()) and float(values.max()) <= high
    return inside and float(values.min()) < low + slack and float(values.max()) > high - slack


def test_color_has_its_published_strengths() -> None:
    values = draw_of("color", MANY).values
    assert spans(values["brightness"], -0.5, 0.5)
    assert spans(values["saturation"], 0.0, 2.0)
    assert spans(values["contrast"], 0.5, 1.5)
    pairs = torch.corrcoef(torch.stack(list(values.values())))
    assert float((pairs - torch.eye(3)).abs().max()) < 0.03  # three numbers, not one


@pytest.mark.parametrize(("side", "reach"), [(28, 4), (32, 4), (8, 1), (64, 8)])
def test_crop_shifts_by_an_eighth_either_way(side: int, reach: int) -> None:
    values = draw_of("crop", MANY, shape=(side, side)).values
    for shift in values["shift"].T:
        numbers, counts = shift.unique(return_counts=True)
        assert numbers.tolist() == list(range(-reach, reach + 1))
        assert float(counts.min()) > 0.8 * MANY / (2 * reach + 1)
    assert abs(float(torch.corrcoef(values["shift"].T.float())[0, 1])) < 0.03


@pytest.mark.parametrize(("side", "cut"), [(28, 14), (9, 5), (32, 16)])
def test_cutout_is_half_as_wide_with_its_center_anywhere(side: int, cut: int) -> None:
    values = draw_of("cutout", MANY, shape=(side, side)).values
    assert values["length"].tolist() == [[cut, cut]]
    for first in values["first"].T:
        centers = first + cut // 2
        assert centers.unique().tolist() == list(range(side + 1 - cut % 2))


def test_flip_mirrors_half_of_the_images() -> None:
    assert float(draw_of("flip", MANY).values["mirror"].float().mean()) == pytest.approx(0.5, 0.05)


def test_scale_draws_two_independent_factors() -> None:
    theta = draw_of("scale", MANY).values["theta"]
    for axis in (0, 1):
        assert spans(theta[:, axis, axis], 1 / 1.2, 1.2)
    assert float(theta[:, 0, 1].abs().max()) == float(theta[:, 1, 0].abs().max()) == 0
    assert abs(float(torch.corrcoef(theta[:, [0, 1], [0, 1]].T)[0, 1])) < 0.03


def test_rotate_turns_by_up_to_fifteen_degrees_and_keeps_lengths() -> None:
    theta = draw_of("rotate", MANY).values["theta"]
    degrees = torch.atan2(theta[:, 1, 0], theta[:, 0, 0]) * 180 / math.pi
    assert spans(degrees, -15.001, 15.001)
    eye = torch.eye(2).expand(MANY, 2, 2)
    torch.testing.assert_close(theta[:, :, :2] @ theta[:, :, :2].mT, eye)


def test_strengths_are_settings() -> None:
    still = Augmentation(
        kinds=("crop", "flip", "scale", "rotate"), crop=0.0, flip=0.0, scale=1.0, rotate=0.0
    )
    x = images(2)
    for number in range(12):
        y = still.apply(x, still.draw(1, SHAPE, Rng(number).at("still")))
        torch.testing.assert_close(y, x, atol=1e-5, rtol=0)


# Draws


@pytest.mark.parametrize("kind", KINDS)
def test_a_shared_draw_is_one_for_all_images_and_every_batch_size(kind: str) -> None:
    one = images(1)
    draw = draw_of(kind, 1)
    alone = Augmentation().apply(one, draw)
    for n in (2, 7):
        together = Augmentation().apply(one.expand(n, -1, -1, -1), draw)
        torch.testing.assert_close(together, alone.expand(n, -1, -1, -1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_draw_per_image_differs_between_images(kind: str) -> None:
    n = 16
    out = Augmentation().apply(images(1).expand(n, -1, -1, -1), draw_of(kind, n))
    assert any(not torch.equal(out[0], other) for other in out[1:])


def test_the_same_generator_gives_the_same_draw(untouched_generator: None) -> None:
    for number in range(12):
        first, again = (Augmentation().draw(3, SHAPE, Rng(number).at("draw")) for _ in range(2))
        assert first.kind == again.kind
        assert all(torch.equal(first.values[name], again.values[name]) for name in first.values)


def test_kinds_are_drawn_alike_often() -> None:
    generator = Rng(0).at("kinds")
    kinds = [Augmentation().draw(1, SHAPE, generator).kind for _ in range(3000)]
    counts = {kind: kinds.count(kind) for kind in KINDS}
    assert sum(counts.values()) == 3000
    assert all(400 < count < 600 for count in counts.values()), counts


def test_without_flips_leaves_flips_out_and_all_else_alone() -> None:
    strong = Augmentation(rotate=30.0)
    tame = strong.without_flips()
    assert tame == dataclasses.replace(strong, kinds=tuple(k for k in KINDS if k != "flip"))
    generator = Rng(0).at("kinds")
    assert "flip" not in {tame.draw(1, SHAPE, generator).kind for _ in range(200)}


def test_no_kinds_change_nothing_whatever_the_shape(untouched_generator: None) -> None:
    none = Augmentation(kinds=())
    x = torch.randn(2, 1, 4, 4, 4, generator=Rng(0).at("volume"))
    assert none.apply(x, none.draw(2, (4, 4, 4), Rng(0).at("draw"))) is x


def test_volumes_turn_about_each_axis_alike_often() -> None:
    turns = draw_of("rotate", 3000, shape=(4, 5, 6)).values["theta"][:, :, :3]
    still = (turns.diagonal(dim1=1, dim2=2) == 1).float()
    assert float(still.sum(1).min()) == 1
    assert float((still.sum(1) == 1).float().mean()) > 0.99  # else the angle is nearly 0
    assert still.mean(0).tolist() == pytest.approx([1 / 3] * 3, abs=0.04)
    torch.testing.assert_close(turns @ turns.mT, torch.eye(3).expand(3000, -1, -1))
    angle = (turns.diagonal(dim1=1, dim2=2).sum(1) / 2 - 0.5).clamp(-1, 1).arccos()
    assert 14.5 < float(angle.max()) * 180 / math.pi < 15.1


def test_volumes_are_scaled_along_each_axis_by_itself() -> None:
    theta = draw_of("scale", MANY, shape=(4, 5, 6)).values["theta"]
    for axis in range(3):
        assert spans(theta[:, axis, axis], 1 / 1.2, 1.2)
    pairs = torch.corrcoef(theta.diagonal(dim1=1, dim2=2).T)
    assert float((pairs - torch.eye(3)).abs().max()) < 0.03


# Gradients


@pytest.mark.parametrize("shape", [(4, 5), (3, 4, 3)], ids=["image", "volume"])
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_reaches_the_images(kind: str, n: int, shape: tuple[int, ...]) -> None:
    draw = draw_of(kind, n, shape=shape)
    values = {k: v.double() if v.is_floating_point() else v for k, v in draw.values.items()}
    exact = Draw(draw.kind, values)
    x = images(2, 3, shape).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: Augmentation().apply(z, exact), (x,))
    (gradient,) = torch.autograd.grad(Augmentation().apply(x, exact).square().sum(), x)
    assert all(float(part.abs().max()) > 0 for part in gradient)


@pytest.mark.parametrize("kind", KINDS)
def test_images_given_are_left_alone(kind: str) -> None:
    x = images(2)
    before = x.clone()
    Augmentation().apply(x, draw_of(kind, 2))
    assert torch.equal(x, before)
