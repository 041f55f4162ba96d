"""Privacy that is proved: calibration, exact noise, bounded patients, one release, the ledger."""

import copy
import dataclasses
import itertools
import json
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from scipy.integrate import quad
from scipy.stats import chisquare, norm
from typer.testing import CliRunner

from medistill import private_sketch as module
from medistill.augment import KINDS, Augmentation, Kind
from medistill.backbones import ConvNet, refresh, to_spec
from medistill.backbones import backbone as read_backbone
from medistill.budget import Budget
from medistill.cli import app
from medistill.compute import Compute
from medistill.data import load
from medistill.distill import distill
from medistill.engine import Processes
from medistill.errors import DataError, MedistillError, RunRefused, UsageError
from medistill.ledger import Ledger
from medistill.methods import Task
from medistill.methods.dm import DM
from medistill.methods.dp_merf import DPMERF, Generator, doubled
from medistill.methods.sketch import FromSketch
from medistill.privacy import (
    GRID,
    Clean,
    Guarantee,
    attacker,
    clipped,
    composed,
    delta_of,
    discrete_gaussian,
    epsilon_of,
    noise_of,
)
from medistill.private_sketch import bound_of, plan, private_sketch, unit_sums, unit_vectors
from medistill.probes import GRID as SKETCH_GRID
from medistill.probes import SketchSpec, all_spreads, probe
from medistill.records import load_state, read_json, save_state, to_record
from medistill.rng import Rng
from medistill.sets import Card, RealSet, Splits, normalized_by
from medistill.sketch import Sketch, merge, sketch

SMALL = ConvNet(2, 4)
SPEC = SketchSpec(to_spec(SMALL), to_record(Augmentation()), networks=2, frequencies=4)
DELTA = 1e-5


def patients(n: int = 40, each: int = 3, seed: int = 0) -> RealSet:
    """Return images of patients that have up to `each` images, in any classes."""
    real = load(f"phantom:n=90,size=16,classes=3,seed={seed}").train
    real = real.take(torch.arange(n))
    card = dataclasses.replace(normalized_by(real.card, [0.5], [0.25]), patients=True)
    sizes = itertools.cycle((1, 2, each))
    numbers = [patient for patient in range(n) for _ in range(next(sizes))]
    groups = torch.tensor(numbers[:n])[torch.randperm(n, generator=Rng(seed).at("patients"))]
    return RealSet(real.images, real.labels, card, groups)


def spreads(card: Card, spec: SketchSpec = SPEC) -> torch.Tensor:
    """Return the public constants of a spec."""
    return all_spreads(spec, card)


def noise(path: Path, generator: torch.Generator) -> None:
    """Write a small picture of noise."""
    image = torch.randint(256, (8, 8), generator=generator).to(torch.uint8).numpy()
    Image.fromarray(image).save(path)


def released_of(real: RealSet, tmp_path: Path, epsilon: float = 1e6, **more: Any) -> Sketch:
    """Return one private sketch, its plan made for it."""
    given = {"delta": DELTA, "unit": "patient", "classes": real.card.classes, **more}
    return private_sketch(real, SPEC, Ledger(tmp_path / "ledger.json"), epsilon=epsilon, **given)


@pytest.mark.parametrize(
    ("epsilon", "sigma"),
    [(0.5, 7.032), (1, 3.731), (2, 1.994), (4, 1.081), (8, 0.600), (10, 0.500)],
)
def test_noise_is_that_of_the_exact_curve(epsilon: float, sigma: float) -> None:
    found = noise_of(epsilon, DELTA)
    assert found == pytest.approx(sigma, abs=6e-4)
    assert delta_of(1 / found, epsilon) <= DELTA
    assert delta_of(1 / found, epsilon) == pytest.approx(DELTA, rel=1e-6)
    assert epsilon_of(1 / found, DELTA) == pytest.approx(epsilon, rel=1e-6)


@pytest.mark.parametrize("mu", [0.1, 0.5, 1.0, 3.0])
def test_the_curve_is_the_integral_it_stands_for(mu: float) -> None:
    """delta = integral of max(0, p - e^epsilon q) over two normals whose means are mu apart."""
    for epsilon in (0.1, 1.0, 4.0):

        def loss(x: float, epsilon: float = epsilon) -> float:
            return max(0.0, norm.pdf(x, mu) - math.exp(epsilon) * norm.pdf(x))

        start = epsilon / mu + mu / 2
        wanted, _ = quad(loss, start, start + 40, epsabs=1e-16, limit=400)
        assert delta_of(mu, epsilon) == pytest.approx(wanted, rel=1e-3, abs=1e-14)


def test_an_independent_accountant_agrees() -> None:
    gdp = pytest.importorskip("opacus.accountants.analysis.gdp")
    for epsilon, delta in itertools.product((0.3, 1.0, 4.0, 10.0), (1e-5, 1e-7)):
        mu = 1 / noise_of(epsilon, delta)
        assert gdp.eps_from_mu(mu=mu, delta=delta) == pytest.approx(epsilon, rel=1e-3)


def test_the_textbook_formula_is_caught_at_epsilon_10() -> None:
    textbook = math.sqrt(2 * math.log(1.25 / DELTA)) / 10
    assert delta_of(1 / textbook, 10) > 2 * DELTA
    assert noise_of(10, DELTA) > textbook


@pytest.mark.parametrize("wrong", [(0.0, 1e-5), (-1.0, 1e-5), (math.inf, 1e-5), (1.0, 0.0), (1, 1)])
def test_what_is_no_budget_is_refused(wrong: tuple[float, float]) -> None:
    with pytest.raises(UsageError):
        noise_of(*wrong)


def test_releases_compose_as_gaussians_do() -> None:
    one = 1 / noise_of(1.0, DELTA)
    assert composed([one], DELTA) == pytest.approx(1.0)
    assert composed([one] * 4, DELTA) == pytest.approx(epsilon_of(2 * one, DELTA))
    assert 2.0 < composed([one] * 4, DELTA) < 4.0
    assert composed([], DELTA) == 0.0


def test_what_an_attacker_gains_is_the_tables() -> None:
    found = attacker(1.0, DELTA)
    assert found["tpr_at_0.001"] == pytest.approx(0.0024, abs=5e-5)
    assert found["tpr_at_0.01"] == pytest.approx(0.0198, abs=5e-5)
    assert attacker(10.0, DELTA)["auc"] == pytest.approx(0.921, abs=5e-4)


def test_small_noise_has_the_frequencies_of_its_formula() -> None:
    drawn = discrete_gaussian(40_000, 1.5)
    values = torch.arange(-5, 6)
    counts = torch.tensor([(drawn == value).sum() for value in values]).double()
    everything = torch.arange(-60, 61).double()
    weights = torch.exp(-everything.square() / (2 * 1.5**2))
    expected = torch.exp(-values.double().square() / (2 * 1.5**2)) / weights.sum() * len(drawn)
    expected *= counts.sum() / expected.sum()
    assert chisquare(counts.numpy(), expected.numpy()).pvalue > 1e-6


@pytest.mark.slow
def test_a_million_draws_have_the_deviation_asked_for() -> None:
    deviation = noise_of(1.0, DELTA) * bound_of(SPEC.networks) * GRID
    drawn = discrete_gaussian(1_000_000, deviation).double()
    assert float(drawn.std()) == pytest.approx(deviation, rel=0.01)
    assert abs(float(drawn.mean())) < 5 * deviation / 1000


def test_what_is_clipped_is_never_longer_than_the_bound() -> None:
    generator = torch.Generator().manual_seed(0)
    bound = 1.5
    limit = math.floor(bound * GRID) ** 2
    rows = [torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(10_000)]
    scales = torch.logspace(-8, 12, 10_000, dtype=torch.float64).unsqueeze(1)
    given = torch.stack(rows) * scales * GRID
    exactly = torch.zeros(6, 6, dtype=torch.float64)
    exactly.fill_diagonal_(bound * GRID)
    wild = torch.tensor([math.nan, math.inf, -math.inf, 1e308, -1e308, 5e-324]).double()
    for vectors in (given, exactly, wild.repeat(6, 1), torch.diag(wild), -exactly.sqrt()):
        found = clipped(vectors, bound)
        assert found.dtype == torch.int64
        assert all(sum(x * x for x in row) <= limit for row in found.tolist())
    assert torch.equal(clipped(exactly, bound), exactly.long())  # what fits stays as it is
    assert torch.equal(clipped(torch.tensor([[3, -4]]), bound), torch.tensor([[3, -4]]))
    long = clipped(torch.tensor([[3.0, -4.0]], dtype=torch.float64) * GRID, 1.0).double() / GRID
    assert long[0].tolist() == pytest.approx([0.6, -0.8], abs=1e-5)


def slow_vectors(real: RealSet, units: torch.Tensor) -> dict[int, list[list[float]]]:
    """Return each unit's vector by a loop over its images: means, before grid and clip."""
    held, found = spreads(real.card), {}
    for unit in units.unique().tolist():
        rows = [[0.0] * (SPEC.networks * 8 * 2 + 1) for _ in real.card.classes]
        mine = (units == unit).nonzero().flatten()
        for image in mine:
            row = rows[int(real.labels[image])]
            place = 0
            for number in range(SPEC.networks):
                way = probe(SPEC, real.card, number, held[number], torch.device("cpu"))
                for value in way.of_images(real.normalized(image.view(1)))[0].tolist():
                    row[place] += value / len(mine)
                    place += 1
            row[-1] += 1 / len(mine)
        found[unit] = rows
    return found


def test_a_patients_vector_is_the_mean_over_its_images() -> None:
    real = patients(12)
    assert real.groups is not None
    width = unit_vectors(real, real.groups, SPEC, spreads(real.card)).shape[2]
    assert width == SPEC.networks * 2 * SPEC.frequencies * len(SPEC.sizes(real.card)) + 1
    found = unit_vectors(real, real.groups, SPEC, spreads(real.card)).double() / GRID
    wanted = slow_vectors(real, real.groups)
    assert len(wanted) < len(real)
    for mine, rows in zip(found, wanted.values(), strict=True):
        assert torch.allclose(mine, torch.tensor(rows).double(), atol=3 / GRID)


def largest_move(real: RealSet, vectors: Callable[..., torch.Tensor] = unit_vectors) -> float:
    """Return how far a patient that is left out moves the sum of vectors at most."""
    assert real.groups is not None
    held, most = spreads(real.card), 0.0
    whole = vectors(real, real.groups, SPEC, held).sum(0)
    for group in real.groups.unique():
        rest = real.take((real.groups != group).nonzero().flatten())
        assert rest.groups is not None
        moved = (whole - vectors(rest, rest.groups, SPEC, held).sum(0)).flatten().tolist()
        most = max(most, math.sqrt(sum(x * x for x in moved)) / GRID)
    return most


def test_leaving_any_patient_out_moves_the_sum_by_the_bound_at_most() -> None:
    real = patients(30)
    assert largest_move(real) <= bound_of(SPEC.networks)
    assert largest_move(real) > 0.98 * bound_of(SPEC.networks)  # one image can use it all


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("backbone", "shape", "kinds"),
    [
        ("convnet-3-7", (18, 18), KINDS),
        ("convnet-2-5", (30, 30), KINDS),
        ("convnet-2-5", (9, 9, 9), KINDS),
        ("convnet-2-5", (64, 64), KINDS),
        ("convnet-2-5", (14, 14, 14), KINDS),
        ("convnet-2-5", (28, 28, 28), KINDS[:1]),
        ("linear", (30, 30), ()),
        ("linear", (9, 9, 9), ()),
        ("mlp-13", (18, 18), KINDS),
        ("resnet18-5", (18, 18), KINDS),
        *(("convnet-2-5", (18, 18), (kind,)) for kind in KINDS),
        *(("convnet-2-5", (9, 9, 9), (kind,)) for kind in KINDS),
    ],
)
def test_no_image_moves_the_last_bit_of_another(
    backbone: str, shape: tuple[int, ...], kinds: tuple[Kind, ...], precision: Any
) -> None:
    """Widths that leave a rest of vector lanes round an image by its place among others."""
    few = math.prod(shape) > 900
    size = math.ceil(math.sqrt(math.prod(shape)))
    real = load(f"phantom:n={50 if few else 140},size={size},classes=2").train
    card = dataclasses.replace(normalized_by(real.card, [0.5], [0.25]), shape=shape)
    pixels = real.images.flatten(1)[:, : math.prod(shape)]
    real = dataclasses.replace(real, images=pixels.reshape(-1, 1, *shape), card=card)
    augmentation = to_record(Augmentation(kinds=kinds))
    spec = SketchSpec(to_spec(read_backbone(backbone)), augmentation, 2, 8)
    held = spreads(real.card, spec)

    def vectors(part: RealSet) -> torch.Tensor:
        return unit_vectors(part, torch.arange(len(part)), spec, held, Compute(precision))

    whole = vectors(real)
    for gone in (0, 1, 17, len(real) - 1):
        kept = torch.tensor([i for i in range(len(real)) if i != gone])
        assert torch.equal(vectors(real.take(kept)), whole[kept]), gone
    order = torch.randperm(len(real), generator=Rng(0).at("order"))
    assert torch.equal(vectors(real.take(order)), whole[order])


@pytest.mark.parametrize("shape", [(18, 18), (9, 9, 9)])
def test_nor_where_threads_share_a_block(shape: tuple[int, ...]) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        test_no_image_moves_the_last_bit_of_another("convnet-3-7", shape, KINDS, "float32")
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "source", ["vary:({});size=5;resolution=3;contrast=0.7", "combine:(phantom:n=40,size=17),({})"]
)
def test_no_image_moves_the_pixels_of_another_where_all_are_resized(
    source: str, tmp_path: Path
) -> None:
    pixels = Rng(0).at("pixels")
    for n in range(500):  # of train more than are resized at once
        (tmp_path / "ab"[n % 2]).mkdir(exist_ok=True)
        noise(tmp_path / "ab"[n % 2] / f"{n:03}.png", pixels)

    def held() -> list[bytes]:
        found = load(source.format(f"folder:{tmp_path};channels=1;deal=each"))
        return sorted(image.numpy().tobytes() for part in found for image in part.images)

    before = held()
    (tmp_path / "a" / "000.png").unlink()
    after = held()
    assert len(before) - len(after) == len(set(before) - set(after)) == 1
    assert set(after) <= set(before)


def test_ten_thousand_random_and_adversarial_units_keep_to_the_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from medistill.probes import Probe

    honest = Probe.of_images
    faults = torch.tensor([3.0, -1e30, math.nan, math.inf, -math.inf])

    def wild(self: Probe, images: torch.Tensor, *rest: Any) -> torch.Tensor:
        """Say what no network of sound weights would, of half of the images."""
        found = honest(self, images, *rest)
        kind = (images.flatten(1).sum(1).abs() * 64).long() % 10
        return torch.where((kind < 5)[:, None], faults[kind % 5, None], found)

    monkeypatch.setattr(Probe, "of_images", wild)
    n, card = 15_000, normalized_by(patients(3).card, [0.5], [0.25])
    card = dataclasses.replace(card, shape=(8, 8))
    drawn = Rng(0).at("images and units")
    images = torch.randint(256, (n, 1, 8, 8), generator=drawn).to(torch.uint8)
    images[:100] = 255 * (torch.arange(100) % 2).view(-1, 1, 1, 1)
    images[100:200] = images[200:201]  # one image many times
    units = torch.cat([torch.arange(10_000), torch.randint(9_000, (5_000,), generator=drawn)])
    real = RealSet(images, torch.arange(n) % 3, card, units)
    spec = SketchSpec(to_spec(ConvNet(1, 4)), SPEC.augmentation, 1, 4)
    held = all_spreads(spec, card)
    found = unit_vectors(real, units, spec, held)
    limit = math.floor(bound_of(spec.networks) * GRID) ** 2
    lengths = found.flatten(1).square().sum(1)
    assert len(lengths) == 10_000
    assert int(lengths.max()) <= limit  # below 2^63: no overflow
    assert int(lengths.max()) > 0.99 * limit
    monkeypatch.setattr(module, "clipped", lambda vectors, bound: vectors)
    free = unit_vectors(real, units, spec, held).flatten(1).square().sum(1)
    assert int((free > limit).sum()) > 1000  # which the clip brought back
    monkeypatch.undo()
    found = unit_vectors(real, units, spec, held)
    for draw in range(5):
        left = torch.rand(10_000, generator=Rng(draw).at("left")) < (0.5, 0.99, 0.9999)[draw % 3]
        kept = left[units].nonzero().flatten()
        rest = unit_vectors(real.take(kept), units[kept], spec, held)
        names = units.unique()
        assert torch.equal(rest, found[left[names]])  # the others are what they were, to the bit


def test_neighbors_have_the_same_header(tmp_path: Path) -> None:
    real, headers = patients(30), []
    for number, kind in enumerate(("CT", "CT, MR")):
        card = dataclasses.replace(real.card, modality=kind, digest=kind, patients=number == 0)
        one = dataclasses.replace(real, card=card, groups=torch.arange(len(real)))
        path = tmp_path / f"{number}.sketch"
        released_of(one, tmp_path / str(number), unit="image").save(path)
        header = load_state(path)[1]
        del header["privacy"]["receipts"]
        headers.append(header)
    assert headers[0] == headers[1]


@pytest.mark.parametrize(("last", "named"), [("p9", True), ("", False)])
def test_one_image_without_a_patient_is_enough_to_have_no_unit(
    last: str, named: bool, tmp_path: Path
) -> None:
    pixels = Rng(0).at("pixels")
    rows = ["path,label,patient"]
    for n in range(40):
        noise(tmp_path / f"{n}.png", pixels)
        rows.append(f"{n}.png,{'ab'[n % 2]},{f'p{n // 2}' if n < 39 else last}")
    (tmp_path / "list.csv").write_text("\n".join(rows) + "\n")
    source = f"csv:{tmp_path / 'list.csv'};deal=each"
    assert load(source).train.card.patients is named
    # Whoever is in two sources would be two patients.
    both = load(f"combine:({source}),({source})")
    assert not both.train.card.patients
    with pytest.raises(UsageError, match="whose patient is not named"):
        module.check(
            dataclasses.replace(both.train, card=normalized_by(both.train.card, [0.5], [0.25])),
            "patient",
            both.train.card.classes,
        )


def test_a_unit_of_images_instead_of_patients_is_caught() -> None:
    def by_image(real: RealSet, units: torch.Tensor, *rest: Any) -> torch.Tensor:
        return unit_vectors(real, torch.arange(len(real)), *rest)

    assert largest_move(patients(30, each=6), by_image) > 1.5 * bound_of(SPEC.networks)


@pytest.mark.parametrize("fault", [3.0, math.nan, math.inf, -1e30])
def test_whatever_a_network_says_of_an_image_the_bound_holds(
    fault: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medistill.probes import Probe

    honest = Probe.of_images

    def wild(self: Probe, images: torch.Tensor, *rest: Any) -> torch.Tensor:
        found = honest(self, images, *rest)
        return torch.where(
            images.flatten(1).sum(1, keepdim=True) % 1 > 0.4, fault * torch.ones_like(found), found
        )

    real = patients(30)
    monkeypatch.setattr(Probe, "of_images", wild)
    assert largest_move(real) <= bound_of(SPEC.networks)
    if fault == 3.0:  # without the clip the same images move the sum too far
        monkeypatch.setattr(module, "clipped", lambda vectors, bound: vectors)
        assert largest_move(real) > 1.5 * bound_of(SPEC.networks)


def test_shards_and_processes_make_no_difference() -> None:
    real = patients(20)
    assert real.groups is not None
    held = spreads(real.card)
    whole = unit_vectors(real, real.groups, SPEC, held).sum(0)
    old = module.SHARD
    try:
        for most in (1, 3 * 3 * whole.shape[1], old):
            module.SHARD = most
            assert torch.equal(unit_sums(real, real.groups, SPEC, held), whole)
    finally:
        module.SHARD = old
    assert torch.equal(unit_sums(real, real.groups, SPEC, held, engine=Processes(2)), whole)


def test_clean_sums_are_released_once_and_gone() -> None:
    sums = torch.arange(6)
    clean = Clean(sums, 1.0)
    first = clean.release(2.0)
    assert not torch.equal(first, torch.arange(6))
    assert int(sums.abs().sum()) == 0
    with pytest.raises(RunRefused, match="released before"):
        clean.release(2.0)
    with pytest.raises(TypeError):
        Clean(torch.zeros(3), 1.0)


def test_noise_enters_every_number_and_no_two_releases_share_it(tmp_path: Path) -> None:
    real = patients(40)
    assert real.groups is not None
    exact = unit_sums(real, real.groups, SPEC, spreads(real.card)).double()
    releases = []
    for number in range(60):
        made = released_of(real, tmp_path / str(number), epsilon=12.0)
        noisy = made.sums.flatten(1).double() / (SKETCH_GRID // GRID)
        releases.append(noisy - exact[:, :-1])
    noise = torch.stack(releases)
    wanted = noise_of(12.0, DELTA) * bound_of(SPEC.networks) * GRID
    # Every limit is six deviations away: no seed could make this test repeat itself.
    flat = noise.flatten(1)
    assert float(flat.std()) == pytest.approx(wanted, rel=6 / math.sqrt(2 * flat.numel()))
    each = flat.std(0)
    assert float(each.min()) > (1 - 6 / math.sqrt(2 * 60)) * wanted
    assert float(each.max()) < (1 + 6 / math.sqrt(2 * 60)) * wanted
    shared = torch.corrcoef(flat)[~torch.eye(60, dtype=torch.bool)]
    assert float(shared.abs().max()) < 7 / math.sqrt(flat.shape[1])


def test_counts_are_noisy_as_well(tmp_path: Path) -> None:
    real = patients(40)
    counts = [released_of(real, tmp_path / str(i), 12.0).counts.tolist() for i in range(40)]
    spread = torch.tensor(counts).double().std(0)
    wanted = noise_of(12.0, DELTA) * bound_of(SPEC.networks)
    # Six deviations away for each class: one whose count has no noise is caught.
    assert float((spread / wanted - 1).abs().max()) < 6 / math.sqrt(2 * 39)
    assert min(min(row) for row in counts) >= 1


def test_almost_no_noise_gives_the_plain_sketch(tmp_path: Path) -> None:
    real = patients(40)
    assert real.groups is not None
    alone = RealSet(real.images, real.labels, real.card, torch.arange(40))
    found = released_of(alone, tmp_path, epsilon=1e9)
    wanted = sketch(alone, SPEC)
    assert torch.equal(found.counts, wanted.counts)
    assert torch.allclose(found.means(), wanted.means(), atol=1e-4)


def test_a_release_for_an_audit_passes_for_none(tmp_path: Path) -> None:
    """It draws noise again for sums that were released, and has no receipt to show."""
    real = patients(40)
    assert real.groups is not None
    made = released_of(real, tmp_path, epsilon=20.0)
    assert made.privacy is not None
    assert made.privacy.receipts
    again = module.audited_release(real, real.groups, SPEC, made.privacy)
    again.save(tmp_path / "again.sketch")
    with pytest.raises(DataError, match="without its releases"):
        Sketch.load(tmp_path / "again.sketch")


def test_a_private_sketch_says_what_it_promises_and_nothing_of_the_data(tmp_path: Path) -> None:
    real = patients(40)
    card = dataclasses.replace(real.card, digest="secret-digest-of-the-data")
    real = RealSet(real.images, real.labels, card, real.groups)
    made = released_of(real, tmp_path, epsilon=20.0)
    made.save(tmp_path / "a.sketch")
    again = Sketch.load(tmp_path / "a.sketch")
    assert again.privacy == made.privacy
    assert again.privacy is not None
    assert (again.privacy.epsilon, again.privacy.unit) == (20.0, "patient")
    assert torch.equal(again.sums, made.sums)
    assert b"secret-digest" not in (tmp_path / "a.sketch").read_bytes()
    # It distills like any other, from noise; from real images nothing can start.
    task = Task(again.without_images(), Budget(ipc=1), SMALL, sketch=again)
    method = FromSketch(networks=2, frequencies=4, iterations=3, factor=1)
    assert distill(method, task, seed=0).origin.real_pixels is False
    with pytest.raises(UsageError, match="holds no images to start from"):
        distill(dataclasses.replace(method, start="real"), task, seed=0)
    with pytest.raises(UsageError):
        distill(DM(), task, seed=0)


def test_private_sketches_add_up_to_the_weakest_promise(tmp_path: Path) -> None:
    one = released_of(patients(40), tmp_path / "one", epsilon=20.0)
    two = released_of(patients(40, seed=1), tmp_path / "two", epsilon=30.0)
    both = merge([one, two])
    assert both.privacy is not None
    assert one.privacy is not None
    assert two.privacy is not None
    assert both.privacy.epsilon == 30.0
    assert both.privacy.receipts == one.privacy.receipts + two.privacy.receipts
    assert both.card.digest == ""
    wide = math.hypot(one.privacy.noise, two.privacy.noise)
    assert both.privacy.added == pytest.approx(wide)
    strong = released_of(patients(40), tmp_path / "strong", epsilon=0.1)
    merge([strong, two]).save(tmp_path / "both.sketch")
    assert Sketch.load(tmp_path / "both.sketch").privacy is not None
    with pytest.raises(DataError, match="a release twice"):
        merge([one, one])
    assert torch.equal(both.sums, one.sums + two.sums)
    with pytest.raises(DataError, match="privacy unit"):
        merge([one, sketch(patients(40), SPEC)])
    with pytest.raises(DataError, match="privacy delta"):
        merge([one, released_of(patients(40), tmp_path / "three", 20.0, delta=1e-6)])


def private(real: RealSet, **fields: Any) -> RealSet:
    """Return a set whose card has other fields."""
    return RealSet(real.images, real.labels, dataclasses.replace(real.card, **fields), real.groups)


@pytest.mark.parametrize(
    ("real", "more", "told"),
    [
        (private(patients(), normalization="training split"), {}, "which are private"),
        (private(patients(), patients=False), {}, "whose patient is not named"),
        (patients(), {"classes": ["a", "b", "c"]}, "expected those of the public list: a, b, c"),
    ],
)
def test_what_is_private_and_must_be_public_is_refused(
    real: RealSet, more: dict[str, Any], told: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=told):
        released_of(real, tmp_path, **more)
    assert not (tmp_path / "ledger.json").exists()


def test_hopeless_budgets_are_refused_with_what_would_work(tmp_path: Path) -> None:
    real = patients(40)
    given: Any = {"delta": DELTA, "unit": "patient", "classes": real.card.classes}
    bad = plan(real, SPEC, epsilon=0.5, **given)
    assert bad.hopeless
    assert "noise would be moderate with --epsilon" in bad.advice
    enough = float(bad.advice.split("--epsilon ")[1].split(",")[0])
    with pytest.raises(UsageError, match="publish a patient at random"):
        plan(real, SPEC, epsilon=0.5, **{**given, "delta": 0.1})
    # A release itself asks nothing that depends on the data: neighbors are treated alike.
    assert released_of(real, tmp_path, epsilon=0.5).counts.min() >= 1
    good = plan(real, SPEC, epsilon=enough, **given)
    assert max(one.noise for one in good.signals) <= 0.3
    assert not good.advice
    # By hand: noise x bound x sqrt(width) over the units of the class.
    width = 2 * SPEC.frequencies * len(SPEC.sizes(real.card))
    first = good.signals[0]
    wanted = noise_of(enough, DELTA) * math.sqrt(3) * math.sqrt(width) / first.units
    assert first.noise == pytest.approx(wanted, rel=1e-3)
    assert sum(one.units for one in good.signals) == pytest.approx(
        len(real.groups.unique()) if real.groups is not None else 0, abs=0.01
    )


def test_the_ledger_counts_releases_of_the_same_data(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.json", limit=2.0)
    promise = Guarantee(1.0, DELTA, "patient", noise_of(1.0, DELTA), 2.0)
    assert ledger.spend("scans", "d1", promise) == ledger.releases()[0].receipt
    assert ledger.together("scans", "d1", DELTA) == pytest.approx(1.0)
    ledger.spend("scans", "d2", promise)  # a patient more: the name says that it is the same
    ledger.spend("others", "d3", promise)
    assert ledger.together("others@64", "d4", DELTA) == pytest.approx(1.0)  # the same patients
    assert ledger.path.stat().st_mode & 0o077 == 0
    assert ledger.together("renamed", "d3", DELTA) == pytest.approx(1.0)
    assert ledger.together("scans", "d1", DELTA) == pytest.approx(composed([promise.mu] * 2, DELTA))
    for _ in range(2):
        with pytest.raises(RunRefused, match="expected 2 at most"):
            Ledger(ledger.path, limit=2.0).spend(
                "scans", "d1", dataclasses.replace(promise, noise=noise_of(1.6, DELTA))
            )
    assert len(ledger.releases()) == 3
    wide = Ledger(tmp_path / "other.json")
    for name, data in (("a", "1"), ("b", "1"), ("b", "2"), ("c", "2")):
        wide.spend(name, data, promise)
    assert len(wide.of("a", "1")) == 4  # what is the same as the same is the same
    with pytest.raises(RunRefused, match="protect each patient"):
        wide.spend("a", "1", dataclasses.replace(promise, unit="image"))
    for text in ("{", "[]", '{"format": "x"}', '{"format": "medistill ledger 1", "releases": [1]}'):
        ledger.path.write_text(text)
        with pytest.raises(MedistillError):
            ledger.spend("scans", "d1", promise)


def test_two_processes_cannot_spend_the_same_budget(tmp_path: Path) -> None:
    jobs = [(str(tmp_path / "ledger.json"), number) for number in range(8)]
    assert sum(Processes(2).map(spend, jobs)) == 4
    assert len(Ledger(tmp_path / "ledger.json").releases()) == 4


def spend(job: tuple[str, int]) -> int:
    """Try to spend, and say whether it was allowed: four times are."""
    promise = Guarantee(1.0, DELTA, "patient", noise_of(1.0, DELTA), 2.0)
    limit = composed([promise.mu] * 4, DELTA)
    try:
        Ledger(Path(job[0]), limit).spend("scans", "d", promise)
    except RunRefused:
        return 0
    return 1


def test_the_command_line_releases_once_and_keeps_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDISTILL_LEDGER", str(tmp_path / "ledger.json"))
    monkeypatch.chdir(tmp_path)
    base = ["sketch", "phantom:n=60,size=16", "--backbone", "convnet-2-4", "--networks", "2"]
    base += ["--frequencies", "4"]
    public = ["--mean", "0.5", "--std", "0.25", "--unit", "image"]

    def run(*words: str) -> Any:
        return CliRunner().invoke(app, [*base, *words])

    for words, told in (
        (["--epsilon", "30", "--unit", "image"], "which are private"),
        (["--epsilon", "30", *public[:4]], "whose patient is not named"),
        (["--dry-run"], "--dry-run without --epsilon"),
        (["--unit", "image"], "--unit without --epsilon"),
        (["--epsilon", "30", *public, "--compile", "on"], "--compile on with --epsilon"),
        (["--epsilon", "30", *public, "--classes", "a,b"], "public list: a, b"),
        (["--epsilon", "-1", *public], "found epsilon -1"),
        (["--epsilon", "30", "--delta", "0", *public], "delta 0"),
        (["--delta", "0"], "--delta without --epsilon"),
    ):
        wrong = run("--out", "x.sketch", *words)
        assert wrong.exit_code == 2, wrong.output
        assert told in wrong.stderr
    hopeless = run("--out", "x.sketch", "--epsilon", "0.1", *public)
    assert hopeless.exit_code == 5
    assert "--epsilon" in hopeless.stderr
    dry = run("--out", "x.sketch", "--epsilon", "0.1", *public, "--dry-run")
    assert dry.exit_code == 0
    assert "Nothing was released" in dry.stdout
    assert "A release would be refused" in dry.stdout
    real = load("phantom:n=60,size=16").train
    card = normalized_by(real.card, [0.5], [0.25])
    spec = SketchSpec(to_spec(SMALL), SPEC.augmentation, 2, 4, scale=1.0, layers="last")
    given: Any = {"delta": DELTA, "unit": "image", "classes": card.classes}
    for one in plan(dataclasses.replace(real, card=card), spec, epsilon=0.1, **given).signals:
        told = rf"{one.name} +{one.units:.0f} images  noise {100 * one.noise:.0f}% of the mean, or"
        assert re.search(told, dry.stdout), (told, dry.stdout)
        # By hand: one network, last layer alone, 4 frequencies.
        assert one.noise == pytest.approx(noise_of(0.1, DELTA) * math.sqrt(3 * 8) / one.units)
    assert not list(tmp_path.iterdir())
    noisy = run("--out", "n.sketch", "--epsilon", "0.1", *public, "--accept-noise", "--ledger", "n")
    assert noisy.exit_code == 0, noisy.output
    assert "warning: the noise is " in noisy.stderr
    assert "noise would be moderate with --epsilon" in noisy.stderr
    some = run("--out", "s.sketch", "--epsilon", "2", *public, "--ledger", "n", "--json")
    assert some.exit_code == 0, some.output
    assert "warning: the noise is 0." in some.stderr  # beyond moderate, and not refused
    assert "warning" not in some.stdout
    (tmp_path / "s.sketch").unlink()
    (tmp_path / "n.sketch").unlink()
    made = run("--out", "a.sketch", "--epsilon", "30", *public, "--json")
    assert made.exit_code == 0, made.output
    record = json.loads(made.stdout)
    assert record["guarantee"]["epsilon"] == 30
    assert record["together"] == pytest.approx(30)
    assert record["guarantee"]["receipts"]
    assert not {"classes", "advice", "hopeless"} & set(record)  # sizes of classes stay
    again = run("--out", "b.sketch", "--epsilon", "30", *public)
    assert "finds a member" in again.stdout
    assert "warning" not in again.stderr
    assert "all releases of this name or of these very data: epsilon" in again.stdout
    assert Sketch.load(tmp_path / "a.sketch").sums.ne(Sketch.load(tmp_path / "b.sketch").sums).any()
    full = run("--out", "c.sketch", "--epsilon", "30", *public, "--limit", "45")
    assert full.exit_code == 5
    assert "2 release(s)" in full.stderr
    assert not (tmp_path / "c.sketch").exists()


def test_the_command_line_protects_patients_of_a_table(tmp_path: Path) -> None:
    """Each patient counts once, however many images there are, and in shares of its classes."""
    pixels, rows = Rng(0).at("pixels"), ["path,label,patient"]
    for n in range(150):
        noise(tmp_path / f"{n}.png", pixels)
        rows.append(f"{n}.png,{'ab'[n % 2]},p{n // 3}")
    (tmp_path / "list.csv").write_text("\n".join(rows) + "\n")
    source = f"csv:{tmp_path / 'list.csv'};deal=each"
    words = ["sketch", source, "--backbone", "convnet-1-4", "--networks", "2", "--frequencies", "4"]
    words += ["--classes", "a,b", "--mean", "0.5", "--std", "0.25", "--ledger"]
    words += [str(tmp_path / "ledger.json"), "--out", str(tmp_path / "a.sketch")]
    made = CliRunner().invoke(app, [*words, "--epsilon", "1e6", "--delta", "1e-5", "--json"])
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)["guarantee"]["unit"] == "patient"
    real = load(source).train
    assert real.groups is not None
    people = len(real.groups.unique())
    assert 30 < people < len(real) / 2
    held = Sketch.load(tmp_path / "a.sketch")
    assert held.privacy is not None
    assert held.privacy.unit == "patient"
    # Two images of one class and one of the other: two thirds and a third of a patient.
    assert abs(int(held.counts.sum()) - people) <= 1
    shares = torch.zeros(2, dtype=torch.float64)
    for patient in real.groups.unique():
        mine = real.labels[real.groups == patient]
        shares += mine.bincount(minlength=2) / len(mine)
    assert torch.equal(held.counts, shares.round().long())


def test_classes_of_a_folder_must_be_told_to_be_public(tmp_path: Path) -> None:
    from PIL import Image

    for name in ("ill", "well"):
        (tmp_path / "scans" / name).mkdir(parents=True)
        for number in range(12):
            shade = 9 * number + (100 if name == "ill" else 0)
            Image.new("L", (16, 16), shade).save(tmp_path / "scans" / name / f"{number}.png")
    words = ["sketch", str(tmp_path / "scans"), "--out", str(tmp_path / "a.sketch")]
    words += ["--epsilon", "1", "--mean", "0.5", "--std", "0.25", "--unit", "image", "--dry-run"]
    wrong = CliRunner().invoke(app, words)
    assert wrong.exit_code == 2
    assert "--classes 'ill,well'" in wrong.stderr
    words += ["--classes", "ill,well"]
    # One image more would deal the others anew, and a colored one would make all of them colored.
    for given, said in (("", "a split that is dealt"), (";deal=each", "channels that are read")):
        words[1] = str(tmp_path / "scans") + given
        wrong = CliRunner().invoke(app, words)
        assert (wrong.exit_code, said in wrong.stderr) == (2, True), wrong.stderr
    words[1] = str(tmp_path / "scans") + ";deal=each;channels=1"
    assert CliRunner().invoke(app, words).exit_code == 0


@pytest.mark.parametrize("option", ["part=1/2", "n=50", "imbalance=2", "noise=0.1"])
def test_a_choice_of_images_that_depends_on_others_is_refused(option: str) -> None:
    """One image more gives another permutation, and hundreds of other images."""
    for source in (f"vary:phantom;{option}", f"combine:(vary:phantom;{option}),phantom"):
        real = load(source).train
        real = dataclasses.replace(real, card=normalized_by(real.card, [0.5], [0.25]))
        for part in (real, real.take(torch.arange(40))):
            with pytest.raises(UsageError, match=f"other by {option.partition('=')[0]}, "):
                module.check(part, "image", real.card.classes)
    plain = load("vary:phantom;contrast=0.5;size=14").train
    plain = dataclasses.replace(plain, card=normalized_by(plain.card, [0.5], [0.25]))
    assert len(module.check(plain, "image", plain.card.classes)) == len(plain)


def test_images_are_no_unit_where_patients_have_several() -> None:
    real = patients(40)
    with pytest.raises(UsageError, match="expected --unit patient"):
        module.check(real, "image", real.card.classes)
    alone = dataclasses.replace(real, groups=torch.arange(len(real)))
    assert len(module.check(alone, "image", real.card.classes)) == 40
    # Somebody's patients are not named, others' are: they have several all the same.
    unsure = dataclasses.replace(real.card, patients=False)
    with pytest.raises(UsageError, match="expected --unit patient"):
        module.check(dataclasses.replace(real, card=unsure), "image", real.card.classes)
    twice = dataclasses.replace(alone.take(torch.arange(40).repeat(2)), card=unsure)
    assert twice.groups is not None
    assert len(twice.groups.unique()) == 40
    assert len(module.check(twice, "image", real.card.classes).unique()) == 40
    # The picture that stands twice moves the sum by one vector when it comes or goes.
    units = module.check(twice, "image", real.card.classes)
    spreads = all_spreads(SPEC, real.card)
    left = twice.take((units != units[0]).nonzero().flatten())
    whole, less = (
        unit_sums(part, module.check(part, "image", real.card.classes), SPEC, spreads)
        for part in (twice, left)
    )
    assert float((whole - less).double().norm()) <= bound_of(SPEC.networks) * module.GRID


def test_sums_without_noise_are_not_copied_or_pickled() -> None:
    clean = Clean(torch.zeros(3, dtype=torch.int64), 1.0)
    for way in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="one only"):
            way(clean)


def test_a_private_sketch_is_neither_compiled_nor_made_on_a_gpu(tmp_path: Path) -> None:
    words = ["sketch", "phantom", "--epsilon", "1", "--unit", "image", "--mean", "0.5", "--std"]
    words += ["0.25", "--out", str(tmp_path / "a.sketch"), "--ledger", str(tmp_path / "l.json")]
    for more in (["--device", "cuda"], ["--compile", "on"]):
        found = CliRunner().invoke(app, [*words, *more])
        assert (found.exit_code, "with --epsilon" in found.stderr) == (2, True), found.output
    real = patients(40)
    given: Any = {"epsilon": 1.0, "delta": 1e-5, "unit": "patient", "classes": real.card.classes}
    with pytest.raises(UsageError, match="compiled"):
        module.private_sketch(
            real, SPEC, Ledger(tmp_path / "l.json"), **given, compute=Compute(compile=True)
        )
    with pytest.raises(UsageError, match="images on meta"):
        module.private_sketch(
            real.to(torch.device("meta")), SPEC, Ledger(tmp_path / "l.json"), **given
        )
    assert not (tmp_path / "l.json").exists()


def test_a_split_that_is_given_in_part_is_dealt_by_others(tmp_path: Path) -> None:
    """One image of `val` less, and a tenth of the others would become it."""
    pixels = Rng(0).at("pixels")
    for split in ("", "train", "val", "test"):
        rows = ["path,label,split"]
        for n in range(40):
            noise(tmp_path / f"{n}.png", pixels)
            rows.append(f"{n}.png,{'ab'[n % 2]},{split if n < 8 else ''}")
        (tmp_path / "list.csv").write_text("\n".join(rows) + "\n")
        depends = load(f"csv:{tmp_path / 'list.csv'};deal=each").train.depends
        assert bool(depends) is (split in ("val", "test")), split


def test_no_image_moves_another_to_another_split_where_each_is_dealt(tmp_path: Path) -> None:
    pixels = Rng(0).at("pixels")
    for n in range(60):
        (tmp_path / "ab"[n % 2]).mkdir(exist_ok=True)
        noise(tmp_path / "ab"[n % 2] / f"{n:02}.png", pixels)

    def held(deal: str) -> list[set[bytes]]:
        splits = load(f"folder:{tmp_path};channels=1{deal}")
        return [{image.numpy().tobytes() for image in part.images} for part in splits]

    before = {deal: held(deal) for deal in ("", ";deal=each")}
    (tmp_path / "a" / "00.png").unlink()

    def moved(deal: str) -> int:
        return sum(len(a ^ b) for a, b in zip(before[deal], held(deal), strict=True))

    assert moved(";deal=each") == 1
    assert moved("") > 10


def test_no_image_moves_another_where_val_is_dealt_and_test_is_given(tmp_path: Path) -> None:
    """With train and test alone, one image of val had decided whether a tenth of train is val."""
    pixels = Rng(0).at("pixels")
    for n in range(96):
        folder = tmp_path / ("train", "test")[n % 3 == 0] / "ab"[n % 2]
        folder.mkdir(parents=True, exist_ok=True)
        noise(folder / f"{n:02}.png", pixels)

    def held(deal: str = ";deal=val") -> Splits:
        return load(f"folder:{tmp_path};channels=1{deal}")

    def keys(splits: Splits) -> list[set[bytes]]:
        return [{image.numpy().tobytes() for image in part.images} for part in splits]

    assert "dealt" in held("").train.depends
    assert "dealt" in held(";deal=each").train.depends
    splits = held()
    assert not splits.train.depends
    assert [len(part) for part in splits][2] == 32
    assert 2 <= len(splits.val) <= 18
    before = keys(splits)
    # An image of val more, and one of train less: each moves itself alone.
    (tmp_path / "val" / "a").mkdir(parents=True)
    noise(tmp_path / "val" / "a" / "new.png", pixels)
    more = keys(held())
    assert sum(len(a ^ b) for a, b in zip(before, more, strict=True)) == 1
    assert more[2] == before[2]
    (tmp_path / "train" / "b" / "01.png").unlink()
    assert sum(len(a ^ b) for a, b in zip(more, keys(held()), strict=True)) == 1
    for n in range(0, 96, 3):
        (tmp_path / "test" / "ab"[n % 2] / f"{n:02}.png").unlink()
    with pytest.raises(DataError, match="deal=val expects the test split"):
        held()


def test_dp_merf_matches_the_mean_embedding_of_pixels() -> None:
    """One step by hand: the loss from pixels and frequencies, the update by torch's own Adam."""
    real = load("phantom:n=60,size=16").train
    method = DPMERF(frequencies=16, batch=8, hidden=12, iterations=300)
    spec = method.spec(Task(real, Budget(ipc=2), SMALL))
    held = sketch(real, spec)
    task = Task(real, Budget(ipc=2), SMALL, prepared=held.state)
    rng = Rng(0)
    state = method.init(task, rng)
    after, log = method.step(state, task, rng)

    model = Generator(method.code + 2, 12, 1, (16, 16))
    model.load_state_dict({name: state[name].clone() for name in model.state_dict()})
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    drawn = torch.randn((8, method.code), generator=rng.at("codes", 0))
    images = model(torch.cat([drawn, torch.nn.functional.one_hot(labels, 2).float()], 1))
    pixels = ((images - real.card.mean[0]) / real.card.std[0]).flatten(1)
    way = probe(spec, real.card, 0, held.spreads[0], torch.device("cpu"))
    phases = pixels @ way.frequencies[0]
    embedded = torch.cat([phases.cos(), phases.sin()], 1) / 4
    loss = (embedded.view(2, 4, 32).mean(1) - held.means()[:, 0]).square().sum()
    assert log["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    optimizer = torch.optim.Adam(model.parameters(), lr=method.lr)
    loss.backward()
    optimizer.step()
    for name, value in model.state_dict().items():
        assert torch.allclose(after[name].float(), value.float(), atol=1e-4), name


@pytest.mark.parametrize("most", [3, 32])
@pytest.mark.parametrize("sides", [(4, 6), (4, 3, 5)])
def test_doubled_maps_convolved_are_the_plain_ones(
    sides: tuple[int, ...], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medistill.methods.dp_merf.MOST_SIDE", most)
    layer = (torch.nn.Conv2d, torch.nn.Conv3d)[len(sides) - 2](8, 2, 5, padding=2)
    refresh(layer, Rng(0).at("layer"))
    maps = torch.randn((3, 8, *sides), generator=Rng(0).at("maps"), requires_grad=True)
    mode = ("bilinear", "trilinear")[len(sides) - 2]
    found = doubled(maps, layer)
    expected = layer(torch.nn.functional.interpolate(maps, scale_factor=2, mode=mode))
    assert torch.allclose(found, expected, atol=1e-5)
    weights = torch.randn(expected.shape, generator=Rng(0).at("weights"))
    given = [maps, *layer.parameters()]
    for one, other in zip(
        torch.autograd.grad((found * weights).sum(), given),
        torch.autograd.grad((expected * weights).sum(), given),
        strict=True,
    ):
        assert torch.allclose(one, other, atol=1e-3)


def test_dp_merf_steps_in_bfloat16_as_in_float32_but_for_rounding() -> None:
    """What meets the frequencies is rounded; the sums of the real side are as they were."""
    real = load("phantom:n=60,size=16").train
    method = DPMERF(frequencies=256, batch=64, hidden=12)
    held = sketch(real, method.spec(Task(real, Budget(ipc=2), SMALL)))
    moved, losses = [], []
    for compute in (Compute(), Compute("bfloat16")):
        task = Task(real, Budget(ipc=2), SMALL, prepared=held.state, compute=compute)
        state = method.init(task, Rng(0))
        after, log = method.step(state, task, Rng(0))
        losses.append(log["loss"])
        firsts = [value for name, value in after.items() if name.startswith("first.")]
        moved.append(torch.cat([value.flatten() for value in firsts]))
    assert 0 < abs(losses[0] - losses[1]) < 1e-3 * losses[0]
    assert float(torch.cosine_similarity(moved[0], moved[1], dim=0)) > 0.999


def test_dp_merf_stops_where_its_generator_can_learn_no_more() -> None:
    real = load("phantom:n=60,size=16").train
    method = DPMERF(frequencies=16, batch=8, hidden=12, lr=50.0)
    with pytest.raises(RunRefused, match=r"no gradient at step [2-9], .*lower --lr \(now 50\)"):
        distill(method, Task(real, Budget(ipc=2), SMALL), seed=0)


def test_dp_merf_learns_from_a_private_sketch_and_says_that_no_pixel_is_real(
    tmp_path: Path,
) -> None:
    real = patients(60)
    method = DPMERF(frequencies=16, batch=30, hidden=12, iterations=150)
    spec = method.spec(Task(real, Budget(ipc=2), SMALL))
    given: Any = {"delta": DELTA, "unit": "patient", "classes": real.card.classes}
    held = private_sketch(real, spec, Ledger(tmp_path / "ledger.json"), epsilon=30.0, **given)
    task = Task(held.without_images(), Budget(ipc=2), SMALL, sketch=held)
    losses: list[float] = []
    made = distill(method, task, seed=0, on_step=lambda _, log: losses.append(log["loss"]))
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert made.origin.real_pixels is False
    with pytest.raises(UsageError, match="found frequencies 5000; expected 16"):
        distill(DPMERF(), task, seed=0, steps=1)
    held.save(tmp_path / "a.sketch")
    words = ["distill", str(tmp_path / "a.sketch"), "--method", "dp_merf", "--ipc", "1"]
    told = CliRunner().invoke(app, [*words, "--steps", "1", "--out", str(tmp_path / "run")])
    assert told.exit_code == 0, told.output
    assert read_json(tmp_path / "run" / "run.json")["settings"]["frequencies"] == 16
    assert 0 <= float(made.images.min()) <= float(made.images.max()) <= 1


@pytest.mark.parametrize(
    "change",
    [
        {"epsilon": 0.1},
        {"epsilon": -1.0},
        {"noise": 0.01, "added": 0.01},
        {"bound": 0.5},
        {"receipts": []},
        {"added": 0.0},
        {"delta": 1e-9},
        {"unit": "hospital"},
    ],
)
def test_a_changed_guarantee_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    made = released_of(patients(40), tmp_path, epsilon=20.0)
    made.save(tmp_path / "a.sketch")
    state, header = load_state(tmp_path / "a.sketch")
    save_state(tmp_path / "b.sketch", state, {**header, "privacy": header["privacy"] | change})
    with pytest.raises(DataError):
        Sketch.load(tmp_path / "b.sketch")


def test_a_run_that_dies_has_spent_its_budget_from_its_noise_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: Any) -> torch.Tensor:
        raise KeyboardInterrupt

    for name, spent in (("unit_sums", 0), ("_noisy", 1)):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, die)
            with pytest.raises(KeyboardInterrupt):
                released_of(patients(40), tmp_path)
        assert len(Ledger(tmp_path / "ledger.json").releases()) == spent
    with pytest.raises(UsageError, match="whose noise no number here can hold"):
        released_of(patients(40), tmp_path, epsilon=1e-9, delta=1e-14)
    assert len(Ledger(tmp_path / "ledger.json").releases()) == 1


def test_releases_of_the_same_data_are_no_two_sites(tmp_path: Path) -> None:
    paths = []
    for n in range(2):
        paths.append(tmp_path / f"{n}.sketch")
        released_of(patients(40), tmp_path, epsilon=4.0).save(paths[-1])
    words = ["merge", *map(str, paths), "--out", str(tmp_path / "both.sketch"), "--ledger"]
    wrong = CliRunner().invoke(app, [*words, str(tmp_path / "ledger.json")])
    assert wrong.exit_code == 5
    total = composed([1 / noise_of(4.0, DELTA)] * 2, DELTA)
    assert f"which guarantee epsilon {total:.2f} together" in wrong.stderr
    # Whoever merges elsewhere has no ledger of theirs.
    assert CliRunner().invoke(app, [*words, str(tmp_path / "none.json")]).exit_code == 0


def test_what_vary_makes_of_data_is_the_same_data(tmp_path: Path) -> None:
    ledger, noise = Ledger(tmp_path / "ledger.json", limit=5.0), noise_of(4.0, DELTA)
    promise = Guarantee(4.0, DELTA, "patient", noise, bound_of(1), noise)
    ledger.spend("scans", "a", promise)
    with pytest.raises(RunRefused, match="1 release"):
        ledger.spend("scans;contrast=0.9", "b", promise)
    assert ledger.of("scans;size=28+more@64", "c") == []
    ledger.spend(
        "more+scans", "c", dataclasses.replace(promise, epsilon=0.5, noise=noise_of(0.5, DELTA))
    )
    assert len(ledger.of("more@64+scans;size=28", "d")) == 1
    with pytest.raises(UsageError, match="--limit nan"):
        Ledger(tmp_path / "ledger.json", limit=math.nan)
    text = (tmp_path / "ledger.json").read_text()
    noted = re.search(r'"noise":[0-9.]+', text)
    assert noted
    (tmp_path / "ledger.json").write_text(text.replace(noted[0], '"noise":0'))
    with pytest.raises(DataError, match="no whole ledger"):
        ledger.releases()


def test_the_grid_is_paid_for_in_variance() -> None:
    """Noise of a step or less would be far weaker on a grid: seven steps' variance is added."""
    drawn = Clean(torch.zeros(20_000, dtype=torch.int64), 1.0).release(0.5 / GRID)
    assert float(drawn.double().var()) == pytest.approx(0.25 + 7, rel=0.05)


def test_a_folder_that_cannot_be_written_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    promise = Guarantee(1.0, DELTA, "patient", noise_of(1.0, DELTA), 2.0)
    with pytest.raises(RunRefused, match="could not write beside"):
        Ledger(tmp_path / "file" / "ledger.json").spend("scans", "d", promise)


def test_tiny_budgets_have_noise_as_well() -> None:
    assert delta_of(1 / noise_of(1e-7, 1e-9), 1e-7) == pytest.approx(1e-9, rel=1e-6)
