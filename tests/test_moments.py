"""Moments of a sketch: coefficients by brute force, sums that are exact, images drawn from them."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import avg_pool2d
from typer.testing import CliRunner

from medistill.augment import Augmentation
from medistill.backbones import ConvNet, to_spec
from medistill.budget import Budget
from medistill.cli import app
from medistill.data import load
from medistill.distill import distill
from medistill.errors import DataError, RunRefused, UsageError
from medistill.methods import Task
from medistill.methods.dp_merf import DPMERF
from medistill.methods.sketch import FromSketch
from medistill.moments import (
    BLOCK,
    MOST,
    STEPS,
    check_moments,
    coefficients_of,
    images_like,
    moments_of,
    moments_shape,
    possible,
)
from medistill.pixels import mosaic_of
from medistill.privacy import Guarantee, bound_of, noise_of
from medistill.private_sketch import audited_release, plan
from medistill.probes import MOST_MOMENTS, SketchSpec
from medistill.records import load_state, save_state, to_record
from medistill.rng import Rng
from medistill.sets import RealSet, normalized_by
from medistill.sketch import Sketch, merge, sketch

REAL = load("phantom:n=180,size=16,classes=3").train
SMALL = ConvNet(2, 8)


def spec_of(**fields: Any) -> SketchSpec:
    """Return a small spec with moments."""
    settings = {"networks": 2, "frequencies": 8, "moments": 3, **fields}
    return SketchSpec(to_spec(SMALL), to_record(Augmentation()), **settings)


def generator() -> torch.Generator:
    """Return a generator of numbers."""
    return Rng(4).at("moments")


def test_coefficients_equal_a_loop_over_pixels() -> None:
    images = torch.randn((2, 2, 6, 8), generator=generator())
    found = coefficients_of(images, 3).double().view(2, 2, 3, 3) / STEPS
    for u in range(3):
        for v in range(3):
            total = torch.zeros(2, 2, dtype=torch.float64)
            for y in range(6):
                for x in range(8):
                    down = math.cos(math.pi * u * (y + 0.5) / 6) * (math.sqrt(2) if u else 1)
                    across = math.cos(math.pi * v * (x + 0.5) / 8) * (math.sqrt(2) if v else 1)
                    total += images[..., y, x] * down * across
            assert torch.allclose(found[..., u, v], total / 48, atol=1e-4)


def test_a_flat_image_is_its_first_coefficient_and_far_pixels_are_cut() -> None:
    flat = coefficients_of(torch.full((1, 1, 4, 4), 0.5), 2)
    assert flat.tolist() == [[STEPS // 2, 0, 0, 0]]
    assert coefficients_of(torch.full((1, 1, 4, 4), 1e9), 1).tolist() == [[MOST]]
    volume = coefficients_of(torch.full((1, 1, 4, 4, 4), 0.25), 2)
    assert volume.tolist() == [[STEPS // 4, *[0] * 7]]


def test_coefficients_do_not_depend_on_the_resolution() -> None:
    smooth = torch.nn.functional.interpolate(
        torch.randn((1, 1, 4, 4), generator=generator()), size=(64, 64), mode="bicubic"
    )
    large, small = (coefficients_of(one, 3) / STEPS for one in (smooth, avg_pool2d(smooth, 2)))
    assert torch.allclose(large, small, atol=5e-3)


def test_moments_are_sums_over_each_class_and_exact_in_every_order() -> None:
    images = REAL.normalized(torch.arange(180))
    found = moments_of(images, REAL.labels, 3, 3)
    rows = coefficients_of(images, 3)
    for c, members in enumerate(REAL.by_class):
        assert torch.equal(found[c, 0], rows[members].sum(0))
        assert torch.equal(found[c, 1:], sum(torch.outer(row, row) for row in rows[members]))
    order = torch.randperm(180, generator=generator())
    assert torch.equal(moments_of(images[order], REAL.labels[order], 3, 3), found)
    parts = [moments_of(images[part], REAL.labels[part], 3, 3) for part in order.split(7)]
    assert torch.equal(sum(parts), found)  # type: ignore[arg-type]
    # The largest numbers there can be, in one block: still below 2^53.
    assert MOST**2 * BLOCK <= 2**53


def test_images_drawn_have_the_moments() -> None:
    count, size = 400, 3
    mixed = torch.randn((count, 1, 16, 16), generator=generator()).cumsum(2).cumsum(3) / 20 + 0.5
    (moments,) = moments_of(mixed, torch.zeros(count, dtype=torch.int64), 1, size)
    card = dataclasses.replace(REAL.card, shape=(16, 16))
    drawn = images_like(moments, count, 20_000, card, generator())
    assert drawn.shape == (20_000, 1, 16, 16)
    own, like = (coefficients_of(one, size).double() / STEPS for one in (mixed, drawn))
    spread = own.std(0)
    assert ((own.mean(0) - like.mean(0)).abs() < 0.05 * spread).all()
    assert torch.allclose(torch.corrcoef(own.t()), torch.corrcoef(like.t()), atol=0.05)
    assert torch.allclose(like.std(0), spread, rtol=0.05)
    # Nothing beyond the lowest frequencies: the images are smooth.
    assert int(coefficients_of(drawn[:50], 8).view(50, 8, 8)[:, size:].abs().max()) <= 2
    pair = moments_of(mixed[:2], torch.zeros(2, dtype=torch.int64), 1, size)[0]
    line = coefficients_of(images_like(pair, 2, 50, card, generator()), size).double()
    assert torch.linalg.matrix_rank(line - line.mean(0), atol=20) == 1  # two images span a line


def test_a_sketch_holds_moments_that_add_up(tmp_path: Path) -> None:
    whole = sketch(REAL, spec_of())
    assert whole.moments is not None
    assert whole.moments.shape == (3, *moments_shape(REAL.card, 3)) == (3, 10, 9)
    halves = [RealSet(REAL.images[n::2], REAL.labels[n::2], REAL.card) for n in (0, 1)]
    both = merge([sketch(half, spec_of()) for half in halves])
    both.save(tmp_path / "both.sketch")
    again = Sketch.load(tmp_path / "both.sketch")
    assert again.moments is not None
    assert torch.equal(again.moments, whole.moments)
    assert sketch(REAL, spec_of(moments=0)).moments is None
    with pytest.raises(DataError, match="found moments 0"):
        merge([whole, sketch(halves[0], spec_of(moments=0))])


def test_a_start_from_class_means_needs_no_image(tmp_path: Path) -> None:
    sketch(REAL, spec_of()).save(tmp_path / "a.sketch")
    held = Sketch.load(tmp_path / "a.sketch")
    method = FromSketch(networks=2, frequencies=8, moments=3, start="class-mean")
    far = Task(held.without_images(), Budget(ipc=2), SMALL, sketch=held)
    near = Task(REAL, Budget(ipc=2), SMALL)
    made = distill(method, far, seed=3, steps=0)
    assert torch.equal(made.images, distill(method, near, seed=3, steps=0).images)
    assert (made.origin.start, made.origin.real_pixels) == ("class-mean", False)
    # Tiles of a class are drawn from its moments and from no others.
    assert held.moments is not None
    each = Rng(3).at("start", "moments")
    wanted = [images_like(m, 60, 8, REAL.card, each) for m in held.moments]
    std = REAL.card.std[0]
    pixels = mosaic_of(torch.cat(wanted), 2) * std + REAL.card.mean[0]
    assert torch.allclose(made.images, pixels, atol=1e-5)


def test_moments_that_cannot_be_are_refused(tmp_path: Path) -> None:
    bare = sketch(REAL, spec_of(moments=0))
    task = Task(bare.without_images(), Budget(ipc=2), SMALL, sketch=bare)
    method = FromSketch(networks=2, frequencies=8, start="class-mean")
    with pytest.raises(UsageError, match="made with --moments 8"):
        distill(method, task, seed=0)
    with pytest.raises(UsageError, match=f"expected 0 to {MOST_MOMENTS}"):
        spec_of(moments=MOST_MOMENTS + 1)
    lone = torch.cat([REAL.by_class[0][:49], *REAL.by_class[1:]])
    few = RealSet(REAL.images[lone], REAL.labels[lone], REAL.card)
    for real in (few, REAL):
        held = sketch(real, spec_of())
        far = Task(held.without_images(), Budget(ipc=1), SMALL, sketch=held)
        for task in (far, Task(real, Budget(ipc=1), SMALL)):
            way = dataclasses.replace(method, moments=3)
            if real is REAL:
                distill(way, task, seed=0, steps=0)
                continue
            with pytest.raises(RunRefused, match=r"found 49 images of class .*; expected 50"):
                distill(way, task, seed=0)
    with pytest.raises(UsageError, match="class-mean"):
        distill(DPMERF(start="class-mean"), far, seed=0)
    deep = dataclasses.replace(REAL.card, shape=(4, 16, 16))
    for card, size in (
        (REAL.card, 17),
        (deep, 5),
        (dataclasses.replace(REAL.card, channels=5), 15),
    ):
        with pytest.raises(UsageError, match=r"found moments \d+ for images of"):
            check_moments(card, size)
    path = tmp_path / "a.sketch"
    sketch(REAL, spec_of()).save(path)
    state, header = load_state(path)
    wrong = {
        "none": {name: t for name, t in state.items() if name != "moments"},
        "floats": {**state, "moments": state["moments"].double()},
        "short": {**state, "moments": state["moments"][:, 1:]},
        "beyond": {**state, "moments": state["moments"] + MOST**2 * 61},
        "least": {**state, "moments": torch.full_like(state["moments"], -(2**63))},
    }
    for name, tensors in wrong.items():
        save_state(path, tensors, header)
        with pytest.raises(DataError, match=r"found (no )?moments"):
            Sketch.load(path)
        ran = CliRunner().invoke(app, ["distill", str(path), "--out", str(tmp_path / name)])
        assert (ran.exit_code, ran.stderr.count("\n")) == (3, 1)
    assert possible(torch.zeros((1, 2, 1), dtype=torch.int64), torch.zeros(1, dtype=torch.int64))


def test_a_private_sketch_has_no_moments() -> None:
    real = load("phantom:n=60,size=16").train
    real = dataclasses.replace(real, card=normalized_by(real.card, [0.5], [0.25]))
    spec = spec_of(moments=2)
    wanted = {"epsilon": 8.0, "delta": 1e-5, "unit": "image", "classes": real.card.classes}
    with pytest.raises(UsageError, match="found moments 2 in a private sketch"):
        plan(real, spec, **wanted)  # type: ignore[arg-type]
    promise = Guarantee(8.0, 1e-5, "image", noise_of(8.0, 1e-5), bound_of(spec.networks))
    with pytest.raises(UsageError, match="found moments 2 in a private sketch"):
        audited_release(real, torch.arange(len(real)), spec, promise)


def test_the_command_line_keeps_moments_and_starts_from_them(tmp_path: Path) -> None:
    run = CliRunner().invoke
    source, path = "phantom:n=120,size=16", str(tmp_path / "a.sketch")
    words = ["sketch", source, "--backbone", "convnet-2-8", "--networks", "2", "--out", path]
    assert run(app, [*words, "--moments", "4"]).exit_code == 0
    more = ["--start", "class-mean", "--iterations", "3", "--ipc", "2"]
    made = run(app, ["distill", path, *more, "--out", str(tmp_path / "run")])
    assert made.exit_code == 0, made.output
    private = [*words[:-1], str(tmp_path / "b.sketch"), "--moments", "4", "--epsilon", "9"]
    public = ["--mean", "0.5", "--std", "0.25", "--classes", "normal,nodule", "--unit", "image"]
    refused = run(app, [*private, *public, "--dry-run"])
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
    assert "found moments 4 in a private sketch" in refused.stderr
    assert not (tmp_path / "b.sketch").exists()
