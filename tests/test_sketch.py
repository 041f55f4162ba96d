"""Sketches: sums by hand, to the last bit in every order, and files that are refused."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save
from typer.testing import CliRunner

from medistill.augment import Augmentation
from medistill.backbones import ConvNet, levels_of, to_spec
from medistill.budget import Budget
from medistill.cli import app
from medistill.compute import BLOCK, Compute
from medistill.conformance import toy
from medistill.cosine import images_of, series, weights
from medistill.data import load
from medistill.distill import distill
from medistill.engine import Processes
from medistill.errors import DataError, RunRefused, UsageError
from medistill.methods import DM, Task
from medistill.methods.sketch import FromSketch
from medistill.optim import adam_
from medistill.pixels import tiles_of
from medistill.probes import GRID, SketchSpec, probe, spreads_of, waves
from medistill.records import load_state, read_json, save_state, to_record
from medistill.rng import Rng
from medistill.sets import RealSet, normalized_by
from medistill.sketch import Sketch, merge, sketch

REAL = load("phantom:n=90,size=16,classes=3").train
SMALL = ConvNet(2, 8)
CPU = torch.device("cpu")


def spec_of(**fields: Any) -> SketchSpec:
    """Return a small spec."""
    settings = {"networks": 2, "frequencies": 8, **fields}
    return SketchSpec(to_spec(SMALL), to_record(Augmentation()), **settings)


def part_of(real: RealSet, index: torch.Tensor) -> RealSet:
    """Return some images of a set, with its card."""
    return RealSet(real.images[index], real.labels[index], real.card)


def pooled(maps: torch.Tensor) -> torch.Tensor:
    """Return maps of 4 x 4 positions."""
    return torch.nn.functional.adaptive_avg_pool2d(maps, 4)


def test_waves_by_hand() -> None:
    features = torch.tensor([[9.0, 1.0, 2.0]])
    frequencies = torch.tensor([[0.5, 0.0], [0.25, 1.0]])
    expected = torch.tensor([math.cos(1.0), math.cos(2.0), math.sin(1.0), math.sin(2.0)])
    assert torch.allclose(waves(features, [frequencies])[0], expected / math.sqrt(2))
    levels = [torch.tensor([[3.0]]), torch.tensor([[0.5], [1.0]])]
    phases = torch.tensor([27.0, 0.5 * 1 + 2])
    expected = torch.cat([phases.cos(), phases.sin()]) / math.sqrt(2)
    assert torch.allclose(waves(features, levels)[0], expected)


def test_a_sketch_equals_a_loop_over_images() -> None:
    spec = spec_of()
    found = sketch(REAL, spec)
    for number in range(2):
        spreads = spreads_of(spec, REAL.card, number)
        assert found.spreads[number].tolist() == spreads
        at = Rng(0).child("sketch", number)
        network = SMALL.build(REAL.card, at.at("network"))
        generator = at.at("frequencies")
        first, last = (
            torch.randn((size, 8), generator=generator) * spec.scale / spread
            for size, spread in zip((8 * 4 * 4, 8 * 4 * 4), spreads, strict=True)
        )
        draw = Augmentation().draw(1, (16, 16), at.at("augment"))
        for c, members in enumerate(REAL.by_class):
            total = torch.zeros(32, dtype=torch.float64)
            for i in members.tolist():
                image = Augmentation().apply(REAL.normalized(torch.tensor([i])), draw)
                with torch.no_grad():
                    begun = pooled(network.body[:4](image)).flatten()
                    phases = [begun @ first, network.features(image)[0] @ last]
                vector = [wave(phase) for wave in (torch.cos, torch.sin) for phase in phases]
                total += torch.cat(vector).double() / 4
            sums = found.sums[c, number].double() / GRID
            assert torch.allclose(sums, total, atol=1e-4)
            assert int(found.counts[c]) == len(members)
            assert torch.allclose(
                found.means()[c, number], (total / len(members)).float(), atol=1e-5
            )


def test_one_image_adds_a_vector_of_norm_one_for_each_network() -> None:
    way = probe(spec_of(), REAL.card, 0, torch.ones(2), CPU)
    vectors = way.on_grid(REAL.normalized(torch.arange(40))).double() / GRID
    assert torch.allclose(vectors.norm(dim=1), torch.ones(40, dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_sums_are_the_same_bits_in_every_order_and_grouping(precision: Any) -> None:
    spec, compute = spec_of(), Compute(precision)
    whole = sketch(REAL, spec, compute)
    halves = [part_of(REAL, torch.arange(first, 90, 2)) for first in (0, 1)]
    merged = merge([sketch(half, spec, compute) for half in halves])
    order = torch.randperm(90, generator=Rng(0).at("order"))
    shuffled = sketch(part_of(REAL, order), spec, compute)
    for other in (merged, shuffled):
        assert torch.equal(other.sums, whole.sums)
        assert torch.equal(other.counts, whole.counts)


def test_what_is_computed_of_an_image_never_depends_on_how_many_there_are() -> None:
    way = probe(spec_of(), REAL.card, 0, torch.ones(2), CPU)
    seen = []
    hook = way.network.body[0].register_forward_hook(
        lambda _, given, __: seen.append(len(given[0]))
    )
    way.on_grid(REAL.normalized(torch.arange(BLOCK + 3)))
    way.on_grid(REAL.normalized(torch.arange(1)))
    hook.remove()
    assert seen == [BLOCK] * 3


@pytest.mark.slow
def test_processes_make_the_sketch_that_one_process_makes() -> None:
    real = load("phantom:n=2100,size=16").train  # three shards
    found = sketch(real, spec_of(), engine=Processes(2))
    assert torch.equal(found.sums, sketch(real, spec_of()).sums)
    assert int(found.counts.sum()) == 2100


def test_merged_halves_distill_to_the_same_images_as_the_whole(tmp_path: Path) -> None:
    halves = [part_of(REAL, torch.arange(first, 90, 2)) for first in (0, 1)]
    merge([sketch(half, spec_of()) for half in halves]).save(tmp_path / "both.sketch")
    images = []
    method = FromSketch(iterations=6, networks=2, frequencies=8)
    for held in (sketch(REAL, spec_of()), Sketch.load(tmp_path / "both.sketch")):
        task = Task(held.without_images(), Budget(ipc=2), SMALL, sketch=held)
        images.append(distill(method, task, seed=3).images)
    task = Task(REAL, Budget(ipc=2), SMALL)
    assert torch.equal(images[0], images[1])
    assert torch.equal(images[0], distill(method, task, seed=3).images)


@pytest.mark.parametrize("layers", ["all", "last"])
def test_frequencies_grow_with_the_scale_and_follow_the_seed(layers: Any) -> None:
    spreads = torch.tensor([2.0, 5.0] if layers == "all" else [5.0])

    def frequencies(**fields: Any) -> list[torch.Tensor]:
        return probe(spec_of(layers=layers, **fields), REAL.card, 1, spreads, CPU).frequencies

    one, two = frequencies(scale=1.0), frequencies(scale=2.0)
    for t, twice, spread in zip(one, two, spreads.tolist(), strict=True):
        assert torch.allclose(2 * t, twice)
        assert float(t.std()) == pytest.approx(1 / spread, rel=0.1)
    assert not torch.equal(one[-1], frequencies(seed=1)[-1])


def test_the_last_layer_alone_is_the_features() -> None:
    spec = spec_of(layers="last")
    way = probe(spec, REAL.card, 0, torch.ones(1), CPU)
    images = REAL.normalized(torch.arange(3))
    seen = way.network.features(way.augmentation.apply(images, way.draw))
    assert torch.allclose(way.of(images), waves(seen, way.frequencies), atol=1e-5)
    assert sketch(REAL, spec).sums.shape == (3, 2, 16)


def test_spreads_are_the_distances_of_two_noise_images() -> None:
    spreads = spreads_of(spec_of(), REAL.card, 0)
    network = SMALL.build(REAL.card, Rng(0).child("sketch", 0).at("network"))
    a, b = torch.randn((2, 400, 1, 16, 16), generator=Rng(1).at("noise"))
    for stage, spread in zip((network.body[:4], network.body), spreads, strict=True):
        apart = (pooled(stage(a)) - pooled(stage(b))).flatten(1).square().sum(1).mean().sqrt()
        assert spread == pytest.approx(float(apart.detach()), rel=0.05)
        assert spread == float(f"{spread:.3g}")


def test_adam_twice_by_hand() -> None:
    p, m, v = torch.tensor([1.0]), torch.zeros(1), torch.zeros(1)
    twin = torch.tensor([1.0], requires_grad=True)
    optimizer = torch.optim.Adam([twin], lr=0.2)
    for step, gradient in enumerate((3.0, -1.0, 0.5), 1):
        adam_(p, torch.tensor([gradient]), m, v, step=step, lr=0.2)
        twin.grad = torch.tensor([gradient])
        optimizer.step()
    assert torch.allclose(p, twin.detach())
    assert float(m) == pytest.approx(0.9 * (0.9 * 0.3 - 0.1) + 0.05)


@pytest.mark.parametrize("factor", [1, 2])
def test_a_step_equals_autograd_and_adam_of_torch(factor: int) -> None:
    method = FromSketch(iterations=10, networks=2, frequencies=8, lr_images=0.3, factor=factor)
    task = Task(REAL, Budget(ipc=2), SMALL)
    task = dataclasses.replace(task, prepared=method.prepare(task, Rng(0)))
    held = sketch(REAL, method.spec(task))
    state = method.init(task, Rng(0))
    falling = weights((16, 16), 1.5, torch.zeros(1))
    amplitudes = (series(state["images"]) / falling).requires_grad_()
    assert float(amplitudes.detach().std()) == pytest.approx(0.2, rel=0.1)
    optimizer = torch.optim.Adam([amplitudes], lr=0.3)
    each = 2 * factor**2
    for step in range(3):
        optimizer.param_groups[0]["lr"] = 0.3 * (1 + math.cos(math.pi * step / 10)) / 2
        number = step % 2
        way = probe(held.spec, REAL.card, number, held.spreads[number], CPU)
        images = images_of(falling * amplitudes)
        seen = way.augmentation.apply(tiles_of(images, factor), way.draw)
        vectors = waves(torch.cat(levels_of(way.network.body, seen), 1), way.frequencies)
        loss = sum(
            (vectors[each * c : each * c + each].mean(0) - held.means()[c, number]).square().sum()
            for c in range(3)
        )
        assert isinstance(loss, torch.Tensor)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        state, log = method.step(state, task, Rng(0))
        assert log["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
        assert torch.allclose(state["images"], images_of(falling * amplitudes.detach()), atol=1e-3)


def test_a_start_from_real_images_lays_several_into_each() -> None:
    method = FromSketch(networks=1, frequencies=4, start="real")
    made = distill(method, Task(REAL, Budget(ipc=2), SMALL), seed=0, steps=0)
    assert (len(made), made.recipe.factor) == (6, 2)
    small = torch.nn.functional.avg_pool2d(REAL.images.float() / 255, 2)
    for c, members in enumerate(REAL.by_class):
        for image in made.images[2 * c : 2 * c + 2, :, :8, 8:]:
            assert (small[members] - image).abs().amax((1, 2, 3)).min() < 1e-5
    with pytest.raises(UsageError, match="found factor 5"):
        distill(FromSketch(factor=5), Task(REAL, Budget(ipc=2), SMALL), seed=0)


def test_what_cannot_be_sketched_is_refused() -> None:
    batch = SketchSpec(to_spec(ConvNet(1, 4, norm="batch")), to_record(Augmentation()))
    with pytest.raises(UsageError, match="another norm for a sketch"):
        sketch(REAL, batch)
    with pytest.raises(UsageError, match="multi-label"):
        sketch(toy("multi-label"), spec_of())
    with pytest.raises(UsageError, match="networks 0"):
        spec_of(networks=0)
    broken = dataclasses.replace(REAL, card=dataclasses.replace(REAL.card, std=(float("nan"),)))
    with pytest.raises(DataError, match="not finite"):
        sketch(broken, spec_of())


def test_parts_of_one_name_are_told_apart_from_the_whole() -> None:
    first, second = (sketch(part_of(REAL, torch.arange(n, 90, 2)), spec_of()) for n in (0, 1))
    merged = merge([first, second])
    assert merged.card.name == f"{first.card.name} (2 parts)"
    with pytest.raises(DataError, match="same sketch twice"):
        merge([first, first])


def test_merge_names_the_field_that_differs() -> None:
    one = sketch(REAL, spec_of())
    with pytest.raises(DataError, match=r"scale 2\.0"):
        merge([one, sketch(REAL, spec_of(scale=2.0))])
    other = dataclasses.replace(REAL, card=normalized_by(REAL.card, [0.5], [0.25]))
    with pytest.raises(DataError, match="card mean"):
        merge([one, sketch(other, spec_of())])


def test_a_public_normalization_is_one_number_per_channel() -> None:
    card = normalized_by(REAL.card, [0.5], [0.25])
    assert (card.mean, card.std) == ((0.5,), (0.25,))
    assert "given" in card.normalization
    for mean, std in (([0.5], []), ([0.5, 0.5], [0.2, 0.2]), ([0.5], [0.0])):
        with pytest.raises(UsageError, match="number"):
            normalized_by(REAL.card, mean, std)


def test_methods_that_need_images_refuse_a_sketch() -> None:
    held = sketch(REAL, spec_of())
    task = Task(held.without_images(), Budget(ipc=2), SMALL, sketch=held)
    with pytest.raises(UsageError, match="found a sketch for dm"):
        distill(DM(), task, seed=0)
    with pytest.raises(UsageError, match="no images to start from"):
        distill(FromSketch(start="real"), task, seed=0)
    with pytest.raises(UsageError, match="expected 2, as in the sketch"):
        distill(FromSketch(), task, seed=0)
    empty = dataclasses.replace(held, counts=torch.tensor([30, 0, 30]))
    with pytest.raises(DataError, match="found no image of class"):
        Task(held.without_images(), Budget(ipc=2), SMALL, sketch=empty)
    with pytest.raises(RunRefused, match="found 30 training images"):
        Task(held.without_images(), Budget(ipc=31), SMALL, sketch=held)


Parts = tuple[dict[str, torch.Tensor], dict[str, Any]]


def tensor_of(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Parts], None]:
    """Return what replaces one tensor of a sketch file."""

    def damage(parts: Parts) -> None:
        parts[0][name] = change(parts[0][name].clone()).clone()

    return damage


def header_of(*path: str, **values: Any) -> Callable[[Parts], None]:
    """Return what sets fields of a sketch file's header."""

    def damage(parts: Parts) -> None:
        where = parts[1]
        for name in path:
            where = where[name]
        where.update(values)

    return damage


def put(index: tuple[int, ...], value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function that sets one number of a tensor."""
    return lambda t: t.index_put_(
        tuple(map(torch.tensor, index)), torch.tensor(value, dtype=t.dtype)
    )


LEAST = torch.iinfo(torch.int64).min
DAMAGES: dict[str, Callable[[Parts], Any]] = {
    "another format": header_of(format="medistill model 1"),
    "no sums": lambda parts: parts[0].pop("sums"),
    "sums of another shape": tensor_of("sums", lambda t: t[:, :1]),
    "float sums": tensor_of("sums", torch.Tensor.double),
    "sums beyond the counts": tensor_of("sums", put((0, 0, 0), 100 * GRID)),
    "sums of the least number": tensor_of("sums", lambda t: t.fill_(LEAST)),
    "no images": tensor_of("counts", torch.zeros_like),
    "a count below zero": tensor_of("counts", put((1,), -1)),
    "no counts": tensor_of("counts", lambda t: t[:1]),
    "spread of zero": tensor_of("spreads", put((0, 0), 0.0)),
    "endless spread": tensor_of("spreads", put((1, 1), math.inf)),
    "a spread for each network": tensor_of("spreads", lambda t: t[:, :1]),
    "unknown layers": header_of("spec", layers="first"),
    "complex spreads": tensor_of("spreads", lambda t: t.to(torch.complex64)),
    "an unknown field": header_of("spec", more=1),
    "an unknown backbone": header_of("spec", "backbone", family="convnot"),
    "a wide backbone": header_of("spec", "backbone", width=10**7),
    "a deep backbone": header_of("spec", "backbone", depth=10**9, pooling="none"),
    "an unknown augmentation": header_of("spec", "augmentation", kinds=["shake"]),
    "no mean": header_of("card", mean=[]),
    "endless images": header_of("card", shape=[10**6, 10**6]),
    "no card": lambda parts: parts[1].pop("card"),
}


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_sketch_is_refused(tmp_path: Path, how: str) -> None:
    path = tmp_path / "a.sketch"
    sketch(REAL, spec_of()).save(path)
    state, header = load_state(path)
    DAMAGES[how]((state, header))
    save_state(path, state, header)
    with pytest.raises(DataError):
        Sketch.load(path)
    result = CliRunner().invoke(app, ["distill", str(path), "--out", str(tmp_path / "run")])
    assert result.exit_code == 3
    assert result.stderr.count("\n") == 1


def test_a_header_that_is_no_object_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.sketch"
    path.write_bytes(save({"sums": torch.zeros(1)}, metadata={"medistill": "[]"}))
    with pytest.raises(DataError, match="not an object"):
        Sketch.load(path)


def test_a_run_goes_on_with_its_own_sketch_only(tmp_path: Path) -> None:
    run = CliRunner().invoke
    path, out = tmp_path / "a.sketch", tmp_path / "run"
    sketch(REAL, spec_of()).save(path)
    words = ["distill", str(path), "--ipc", "2", "--iterations", "3", "--out", str(out)]
    assert run(app, words).exit_code == 0
    settings = read_json(out / "run.json")["settings"]
    assert (settings["networks"], settings["frequencies"]) == (2, 8)
    sketch(REAL, spec_of(seed=1)).save(path)
    assert run(app, [*words, "--resume"]).exit_code == 5
    refused = run(app, [*words[:-1], str(tmp_path / "other"), "--networks", "5"])
    assert refused.exit_code == 2
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("cut", "distill {cut} --out {out}"),
        ("empty", "distill {empty} --out {out}"),
        ("no image of class", "distill {classless} --out {out}"),
        ("not finite", "sketch {broken} --backbone convnet-1-4 --networks 1 --out {out}"),
        ("expected sketches made alike", "merge {whole} {other} --out {out}"),
    ],
)
def test_a_sketch_that_cannot_be_used_is_one_line(what: str, words: str, tmp_path: Path) -> None:
    names = ("cut", "empty", "classless", "whole", "other", "out")
    places = {name: tmp_path / f"{name}.sketch" for name in names}
    held = sketch(REAL, spec_of())
    held.save(places["whole"])
    places["cut"].write_bytes(places["whole"].read_bytes()[:300])
    places["empty"].write_bytes(b"")
    counts = torch.tensor([30, 0, 30])
    sums = held.sums * (counts > 0).view(-1, 1, 1)
    dataclasses.replace(held, counts=counts, sums=sums).save(places["classless"])
    sketch(REAL, spec_of(scale=2.0)).save(places["other"])
    folder = tmp_path / "broken.npz"
    part = {"images": np.full((8, 16, 16), np.nan), "labels": np.arange(8) % 2}
    arrays = {f"{s}_{k}": v for s in ("train", "val", "test") for k, v in part.items()}
    np.savez(folder, **arrays)
    given = {**places, "broken": f"npz:{folder}"}
    result = CliRunner().invoke(app, words.format(**given).split())
    assert (result.exit_code, result.stderr.count("\n")) == (3, 1), result.output
    assert what in result.stderr or what in ("cut", "empty")
    assert not places["out"].exists()


@pytest.mark.parametrize("cut", [0, 5, 300])
def test_a_truncated_sketch_is_refused(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "a.sketch"
    sketch(REAL, spec_of()).save(path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError):
        Sketch.load(path)


def test_a_sketch_file_is_repeatable_and_complete(tmp_path: Path) -> None:
    paths = [tmp_path / "a.sketch", tmp_path / "b.sketch"]
    for path in paths:
        sketch(REAL, spec_of()).save(path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    found = Sketch.load(paths[0])
    assert found.spec == spec_of()
    assert found.card == REAL.card


def test_the_images_are_not_needed_after_the_sketch(tmp_path: Path) -> None:
    run = CliRunner().invoke
    flags = ["--backbone", "convnet-2-8", "--networks", "2", "--frequencies", "8"]
    flags += ["--layers", "last"]
    part = load("phantom:n=40,size=16")
    arrays = {
        f"{name}_{what}": getattr(one, what)
        for name, one in zip(("train", "val", "test"), part, strict=True)
        for what in ("images", "labels")
    }
    images = tmp_path / "images.npz"
    source = f"npz:{images}"
    for name, turn in (("a", 1), ("b", -1)):  # other images, or merge would take them for the same
        np.savez(images, **{key: t.numpy().squeeze()[..., ::turn] for key, t in arrays.items()})
        found = run(app, ["sketch", source, *flags, "--out", str(tmp_path / f"{name}.sketch")])
        assert found.exit_code == 0, found.output
    again = run(app, ["sketch", source, *flags, "--out", str(tmp_path / "a.sketch")])
    assert again.exit_code == 5
    wrong = run(app, ["sketch", source, *flags, "--out", str(tmp_path / "a.txt")])
    assert wrong.exit_code == 2
    images.unlink()
    both = str(tmp_path / "both.sketch")
    merged = run(app, ["merge", *(str(tmp_path / f"{n}.sketch") for n in "ab"), "--out", both])
    assert merged.exit_code == 0, merged.output
    assert Sketch.load(Path(both)).counts.tolist() == (2 * part.train.labels.bincount()).tolist()
    words = ["distill", both, "--ipc", "2", "--iterations", "3", "--out", str(tmp_path / "run")]
    made = run(app, words)
    assert made.exit_code == 0, made.output
    assert (tmp_path / "run" / "sheet.png").is_file()
    assert read_json(tmp_path / "run" / "run.json")["settings"]["layers"] == "last"
