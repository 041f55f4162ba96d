"""Attacks by hand: intervals, scores, bounds on epsilon; copies that must be found; controls."""

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Callable
from datetime import date, timedelta
from html import unescape
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import beta, binom, norm
from typer.testing import CliRunner

from medistill.audit import (
    audit_mechanism,
    audit_run,
    battery,
    copies,
    curve_of,
    exact_interval,
    lower_bound,
    membership,
    one_run,
    worst_patient,
)
from medistill.audit.affordable import affordable, copying
from medistill.audit.attributes import _matched, _share, attributes, subgroups
from medistill.audit.battery import _seen_by
from medistill.audit.copies import FAILS, Near, _nearest, chance_of, weigh
from medistill.audit.curves import _Ranked, clustered
from medistill.audit.facts import facts_of
from medistill.audit.mechanism import LEVEL, _free, _lower, once, runs_of
from medistill.audit.membership import (
    Pool,
    Shadows,
    Way,
    _copied,
    ask,
    attack,
    coins,
    drowning,
    guessed,
    nothing_to_find,
    pool_of,
    shadows,
)
from medistill.audit.one_run import p_value
from medistill.audit.reconstruction import recovered
from medistill.audit.signals import calibrated, lira, nearness, rmia, sureness
from medistill.audit.verdict import DROWNED, verdict
from medistill.augment import Augmentation
from medistill.backbones import ConvNet, to_spec
from medistill.budget import Budget
from medistill.cli import app
from medistill.cli.audit import _drowning
from medistill.data import load
from medistill.distill import distill
from medistill.engine import Here
from medistill.errors import DataError, UsageError
from medistill.features import logits_of_set
from medistill.ledger import Ledger
from medistill.methods import Task
from medistill.methods.base import recipe_of
from medistill.methods.dm import DM
from medistill.methods.random import Random
from medistill.methods.sketch import FromSketch
from medistill.model import train
from medistill.privacy import (
    ADJACENCY,
    Guarantee,
    attacker,
    bound_of,
    composed,
    epsilon_of,
    noise_of,
)
from medistill.private_sketch import audited_release
from medistill.probes import SketchSpec
from medistill.records import read_json, to_record, write_json
from medistill.report import tried
from medistill.report.officer import officer
from medistill.rng import Rng
from medistill.sets import RealSet, SyntheticSet, normalized_by

DELTA = 1e-5


def test_exact_intervals_are_those_of_the_binomial() -> None:
    low, high = exact_interval(3, 20)
    assert binom.sf(2, 20, low) == pytest.approx(0.025)
    assert binom.cdf(3, 20, high) == pytest.approx(0.025)
    assert exact_interval(0, 10)[0] == 0
    assert exact_interval(10, 10)[1] == 1
    with pytest.raises(UsageError):
        exact_interval(3, 2)


def test_a_curve_by_hand() -> None:
    members = np.array([9.0, 8.0, 3.0, 1.0])
    others = np.array([7.0, 3.0, 2.0, 0.0, -1.0])
    found = curve_of(members, others, rates=(0.0, 0.2, 0.4))
    # Pairs: 9 and 8 beat all five, 3 beats three and ties one, 1 beats two.
    assert found.auc == pytest.approx((5 + 5 + 3.5 + 2) / 20)
    assert [one.tpr for one in found.found] == [0.5, 0.5, 0.75]
    assert [one.resolved for one in found.found] == [False, False, False]
    assert found.found[0].low == exact_interval(2, 4)[0]
    many = curve_of(np.arange(10.0), np.arange(400.0), rates=(0.01, 0.001))
    assert [one.resolved for one in many.found] == [True, False]
    for wrong in (([], [1.0]), ([math.nan], [1.0])):
        with pytest.raises(UsageError):
            curve_of(np.array(wrong[0]), np.array(wrong[1]))


def test_clustered_scores_have_the_curve_of_all_and_a_wider_interval() -> None:
    draw = np.random.default_rng(0)
    own = draw.normal(size=40)
    inside = draw.random((12, 40)) < 0.5
    scores = own + 0.1 * draw.normal(size=(12, 40)) + 0.3 * inside
    scores[0, 0] = np.nan
    found, known = clustered(scores, inside), np.isfinite(scores)
    plain = curve_of(scores[inside & known], scores[~inside & known])
    assert found.auc == plain.auc
    assert [one.tpr for one in found.found] == [one.tpr for one in plain.found]
    assert found.auc_low <= plain.auc_low
    # Drawing each image once gives back the curve itself, ties and all.
    tied = np.round(scores[known], 1)
    order = np.argsort(-tied, kind="stable")
    images = np.broadcast_to(np.arange(40), scores.shape)[known]
    ranked = _Ranked(tied[order], inside[known][order], images[order])
    area, shares = ranked.measured(np.ones(40), (0.01, 0.3))
    wanted = curve_of(tied[inside[known]], tied[~inside[known]], (0.01, 0.3))
    assert area == pytest.approx(wanted.auc)
    assert shares == [one.tpr for one in wanted.found]


def test_intervals_of_the_area_hold_where_there_is_nothing() -> None:
    draw = np.random.default_rng(0)
    inside = 0
    for _ in range(300):
        found = curve_of(draw.normal(size=60), draw.normal(size=60))
        inside += found.auc_low <= 0.5 <= found.auc_high
    assert 0.92 <= inside / 300 <= 0.98


def test_sureness_is_the_log_odds_of_the_own_class() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [60.0, -60.0, 0.0]])
    labels = torch.tensor([1, 0])
    p = logits[0].softmax(0)[1]
    found = sureness(logits, labels)
    assert found[0] == pytest.approx(float((p / (1 - p)).log()), rel=1e-5)
    assert found[1] == pytest.approx(60.0, rel=1e-6)  # where 1 - p is 0 in any float


def test_lira_is_the_ratio_of_two_gaussians() -> None:
    inside = np.array([[1, 0], [1, 1], [0, 1], [0, 0]], dtype=bool)
    references = np.array([[3.0, 0.0], [5.0, 2.0], [0.0, 4.0], [1.0, 1.0]])
    target = np.array([4.5, 0.5])
    # In: (3, 5) and (2, 4), out: (0, 1) and (0, 1); one deviation each: squares 4 / 2 and 1 / 2.
    d_in, d_out = math.sqrt(4 / 2), math.sqrt(1 / 2)
    wanted = [
        norm.logpdf(4.5, 4, d_in) - norm.logpdf(4.5, 0.5, d_out),
        norm.logpdf(0.5, 3, d_in) - norm.logpdf(0.5, 0.5, d_out),
    ]
    assert lira(target, references, inside) == pytest.approx(wanted)
    nowhere = lira(target, references, np.array([[1, 0], [1, 0], [1, 1], [1, 0]], dtype=bool))
    assert np.isnan(nowhere).tolist() == [True, False]


def test_rmia_counts_the_population_that_is_beaten() -> None:
    def odds(p: Any) -> Any:
        return np.log(np.asarray(p) / (1 - np.asarray(p)))

    inside = np.array([[True], [False]])
    references = odds([[0.8], [0.4]])  # P(x) = 0.6
    population = odds([0.5, 0.2, 0.9])
    population_references = odds([[0.5, 0.4, 0.3], [0.5, 0.4, 0.3]])  # ratios 1, 0.5, 3
    # 0.9 / 0.6 = 1.5: twice as much as 0.5 alone.
    found = rmia(odds([0.9]), references, inside, population, population_references)
    assert found == pytest.approx([1 / 3])
    loose = rmia(odds([0.9]), references, inside, population, population_references, gamma=1.2)
    assert loose == pytest.approx([2 / 3])


@pytest.mark.parametrize(
    ("guesses", "right", "bound"),
    [
        (20, 20, 1.82),
        (50, 50, 2.78),
        (100, 100, 3.49),
        (1000, 1000, 5.81),
        (1000, 550, 0.09),
        (1000, 700, 0.73),
        (1000, 900, 2.02),
        (100, 50, 0.0),
    ],
)
def test_one_run_bounds_are_the_tables(guesses: int, right: int, bound: float) -> None:
    assert lower_bound(guesses, guesses, right) == pytest.approx(bound, abs=0.006)


def test_delta_adds_the_papers_term() -> None:
    """Against the maximum over i by brute force."""
    m, r, v, epsilon, delta = 30, 12, 9, 0.4, 1e-3
    q = math.exp(epsilon) / (1 + math.exp(epsilon))
    terms = [(binom.cdf(v - 1, r, q) - binom.cdf(v - i - 1, r, q)) / i for i in range(1, v + 1)]
    wanted = binom.sf(v - 1, r, q) + 2 * m * delta * max(terms)
    assert p_value(m, r, v, epsilon, delta) == pytest.approx(wanted)
    assert lower_bound(m, r, r, 1e-3) < lower_bound(m, r, r)


def test_a_mechanism_of_known_epsilon_is_not_overstated() -> None:
    """Randomized response: each bit is kept with e / (1 + e), that is epsilon 1."""
    draw = np.random.default_rng(0)
    below = 0
    for _ in range(200):
        bits = draw.random(200) < 0.5
        told = np.where(draw.random(200) < math.e / (1 + math.e), bits, ~bits)
        found = one_run(told + 1e-6 * draw.random(200), bits, 200)
        below += found.lower <= 1
    assert below >= 0.93 * 200
    with pytest.raises(UsageError):
        one_run(np.zeros(4), np.zeros(4, dtype=bool), 3)


def test_guesses_are_the_highest_and_the_lowest() -> None:
    scores = np.array([5.0, 4.0, 3.0, 2.0, 1.0, 0.0])
    inside = np.array([1, 0, 1, 0, 0, 1], dtype=bool)
    found = one_run(scores, inside, 4)
    assert (found.right, found.guesses, found.canaries) == (2, 4, 6)
    assert found.provable == lower_bound(6, 4, 4)


def promise(epsilon: float, bound: float = 2.0) -> Guarantee:
    """Return a guarantee with the noise that it needs."""
    return Guarantee(epsilon, DELTA, "patient", noise_of(epsilon, DELTA), bound)


@pytest.mark.slow
@pytest.mark.parametrize("epsilon", [1.0, 8.0])
def test_the_release_keeps_its_promise_and_the_audit_comes_near(epsilon: float) -> None:
    held = promise(epsilon)
    shape = (4,)
    found = audit_mechanism(
        torch.zeros(shape, dtype=torch.int64), worst_patient(shape, held.bound), held, runs=8000
    )
    # The noise is drawn anew each time: bounds are wide enough for one failure in 10^4 runs.
    assert not found.broken
    assert found.certain < found.lower < 1.2 * epsilon
    assert found.lower > 0.4 * epsilon


@pytest.mark.slow
def test_noise_that_is_drawn_again_is_caught() -> None:
    """Twenty releases of the same sums, averaged: as a public implementation does it."""
    held = promise(1.0)
    shape = (2,)

    def again(sums: torch.Tensor, guarantee: Guarantee) -> torch.Tensor:
        return torch.stack([once(sums, guarantee) for _ in range(20)]).double().mean(0)

    zeros, worst = torch.zeros(shape, dtype=torch.int64), worst_patient(shape, held.bound)
    found = audit_mechanism(zeros, worst, held, runs=600, release=again)
    assert found.broken
    assert found.lower > 2

    def forgotten(sums: torch.Tensor, guarantee: Guarantee) -> torch.Tensor:
        return sums

    assert audit_mechanism(zeros, worst, held, runs=200, release=forgotten).lower > 10
    too_long = worst * 3  # a patient that was not clipped
    assert audit_mechanism(zeros, too_long, held, runs=2400).broken


def test_false_guesses_of_two_rates_are_no_likelier_few_than_of_their_mean() -> None:
    """Hoeffding 1956, by brute force, up to where it holds: a count of one below the mean."""
    for runs, one, two in ((6, 0.2, 0.9), (12, 0.05, 0.6), (40, 0.3, 0.35)):
        counts = np.arange(runs + 1)
        both = np.convolve(binom.pmf(counts, runs, one), binom.pmf(counts, runs, two))
        most = math.floor(runs * (one + two) - 1)
        mean = binom.cdf(np.arange(most + 1), 2 * runs, (one + two) / 2)
        assert (both.cumsum()[: most + 1] <= mean + 1e-12).all()


@pytest.mark.parametrize(("epsilon", "part"), [(0.5, 0.5), (1.0, 0.5), (4.0, 0.5), (1.0, 0.9)])
def test_the_bound_of_a_mechanism_is_below_epsilon_and_near(epsilon: float, part: float) -> None:
    """Guesses of a Gaussian release at a threshold that gives the absent that part of errors."""
    draw = np.random.default_rng(3)
    mu, runs = 1 / noise_of(epsilon, DELTA), runs_of(epsilon)
    middle = norm.isf(part * 2 * norm.cdf(-mu / 2))
    rates = [norm.sf(middle), norm.cdf(middle - mu)]
    lows = np.array([_lower(draw.binomial(runs, rates), runs, DELTA, LEVEL) for _ in range(400)])
    assert (lows <= epsilon).mean() >= 0.95
    assert lows.mean() > 0.75 * epsilon
    if part == 0.5:
        assert (lows >= 0.8 * epsilon).mean() >= 0.95


def test_a_leak_of_one_kind_is_bounded_by_the_two_rates_apart() -> None:
    runs, error = 1000, (1 - LEVEL) / 4
    most = beta.ppf(1 - error, [1, 701], [1000, 300])
    mu = -norm.ppf(most).sum()
    assert _lower([0, 700], runs, DELTA, LEVEL) == pytest.approx(epsilon_of(mu, DELTA))
    assert _lower([0, 1000], runs, DELTA, LEVEL) == 0.0


def test_releases_that_are_drawn_together_have_noise_of_their_own() -> None:
    held = promise(1.0)
    seen: list[torch.Tensor] = []

    def kept(sums: torch.Tensor, guarantee: Guarantee) -> torch.Tensor:
        seen.append(once(sums, guarantee))
        return seen[-1]

    zeros, worst = torch.zeros(3, dtype=torch.int64), worst_patient((3,), held.bound)
    found = audit_mechanism(zeros, worst, held, runs=1100, release=kept)
    assert [one.shape for one in seen] == [(500, 3), (500, 3), (100, 3)] * 2
    every = torch.cat(seen)
    assert len(every.unique()) > 0.99 * every.numel()  # of tens of millions some are equal
    inside = (every[1100:].double() @ worst.double()) / worst.double().norm() ** 2
    assert found.false_negatives == int((inside <= 0.5).sum())
    outside = (every[:1100].double() @ worst.double()) / worst.double().norm() ** 2
    assert found.false_positives == int((outside > 0.5).sum())


def test_small_audits_of_the_mechanism_say_little() -> None:
    held = promise(1.0)
    found = audit_mechanism(
        torch.zeros(2, dtype=torch.int64), worst_patient((2,), held.bound), held, runs=100
    )
    assert found.lower < 4.0
    assert found.certain <= found.lower
    with pytest.raises(UsageError):
        audit_mechanism(torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), held)


SPLITS = load("phantom:n=120,size=16")
SMALL = ConvNet(2, 8)


def test_copies_are_found_and_a_distilled_set_has_none() -> None:
    task = Task(SPLITS.train, Budget(ipc=4), SMALL)
    real = distill(Random(), task, seed=0)
    for found in copies(real, SPLITS.train, SPLITS.val):
        assert found.failed
        assert found.exact == 8
        place = found.nearest[0]
        assert torch.allclose(
            real.images[place.synthetic], SPLITS.train.images[place.real].float() / 255, atol=1e-5
        )
    mirrored = dataclasses.replace(real, images=real.images.flip(-1))
    assert [found.exact for found in copies(mirrored, SPLITS.train, SPLITS.val)] == [8, 8]
    faded = dataclasses.replace(real, images=real.images * 0.5 + 0.2)
    assert copies(faded, SPLITS.train, SPLITS.val)[0].exact == 8  # darker, and still the same
    made = distill(DM(), task, seed=0, steps=2)
    for found in copies(made, SPLITS.train, SPLITS.val):
        assert not found.failed
        assert found.exact == 0
        assert found.images == 8
        assert [pair.distance for pair in found.nearest] == sorted(
            pair.distance for pair in found.nearest
        )


def test_the_nearest_is_that_of_a_plain_loop() -> None:
    made = distill(Random(), Task(SPLITS.train, Budget(ipc=2), SMALL), seed=1)
    noisy = dataclasses.replace(
        made, images=made.images + 0.3 * torch.randn(made.images.shape, generator=gen(0))
    )
    found = copies(noisy, SPLITS.train, SPLITS.val)[0]
    shown = noisy.normalized()
    rows, other = shown.flatten(1), shown.flip(-1).flatten(1)
    real = SPLITS.train.normalized(torch.arange(len(SPLITS.train))).flatten(1)

    def unit(row: torch.Tensor) -> torch.Tensor:
        row = row - row.mean()
        return row / row.norm()

    for pair in found.nearest:
        sides = [unit(side[pair.synthetic]) for side in (rows, other)]
        by_side = [[float((side - unit(one)).norm()) for one in real] for side in sides]
        distances = min(by_side, key=min)
        assert pair.real == int(np.argmin(distances))
        usual = sum(sorted(distances)[:50]) / 50
        assert pair.distance == pytest.approx(min(distances) / usual, abs=1e-4)


def test_the_nearest_of_pieces_are_those_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.rand(5, 1, 16, 16, generator=gen(0))
    whole = _nearest([rows.flatten(1)], SPLITS.train, lambda images: images.flatten(1))
    monkeypatch.setattr(import_module("medistill.audit.copies"), "read_size", lambda _: 7)
    parts = _nearest([rows.flatten(1)], SPLITS.train, lambda images: images.flatten(1))
    for one, other in zip(whole[0], parts[0], strict=True):
        assert torch.allclose(one, other, atol=1e-5)


CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "noise": lambda images: images + 0.05 * torch.randn(images.shape, generator=gen(0)),
    "blur": lambda images: torch.nn.functional.avg_pool2d(images, 3, 1, 1, False, False),
    "darker": lambda images: images * 0.5,
}


@pytest.mark.parametrize("change", CHANGES)
def test_near_copies_are_found_even_where_held_out_images_are_copies_too(change: str) -> None:
    """Public sets have the same patient in two splits: what is usual there must hide no copy."""
    splits = load("phantom:n=400,size=16")
    made = distill(Random(), Task(splits.train, Budget(ipc=10), SMALL), seed=0)
    near = dataclasses.replace(made, images=CHANGES[change](made.images).clamp(0, 1))
    twice = splits.val.images.clone()
    twice[: len(twice) // 10] = splits.train.images[: len(twice) // 10]
    for held in (splits.val, dataclasses.replace(splits.val, images=twice)):
        found = copies(near, splits.train, held)
        for one in found:
            assert one.p_value < FAILS, one
            assert one.suspects >= 10
    other = dataclasses.replace(made, images=splits.test.images[:20].float() / 255)
    assert not any(one.failed for one in copies(other, splits.train, splits.val))


def test_the_yardstick_that_says_most_counts_and_is_paid_for() -> None:
    far, held = torch.full((100,), 99.0), torch.arange(1.0, 101.0)
    others = Near(held, held, held)

    def of(relative: torch.Tensor, distance: torch.Tensor = far) -> tuple[str, float, int, float]:
        return weigh(Near(distance[: len(relative)], relative, relative), others)

    few = of(torch.tensor([0.5, 90.0, 90.0]))
    assert few == ("relative", 0.01, 1, pytest.approx(5 * chance_of(1, 3, 1, 100)))
    many = of(torch.full((20,), 24.5))
    assert many == ("relative", 0.25, 20, pytest.approx(5 * chance_of(20, 20, 25, 100)))
    alone = of(torch.full((20,), 99.0), torch.full((20,), 0.5))
    assert alone == ("distance", 0.01, 20, pytest.approx(5 * chance_of(20, 20, 1, 100)))
    assert of(torch.full((20,), 99.0))[2:] == (0, 1.0)


def test_a_slice_among_its_neighbors_is_a_copy() -> None:
    """Fifty nearly equal slices of each patient: a copy of one is near to all of them."""
    splits = load("phantom:n=400,size=16")
    grown = splits.train.images[:8].repeat_interleave(50, 0).float()
    noise = 6 * torch.randn(grown.shape, generator=gen(1))
    slices = (grown + noise).clamp(0, 255).to(torch.uint8)
    members = RealSet(slices, splits.train.labels[:8].repeat_interleave(50), splits.train.card)
    made = distill(Random(), Task(members, Budget(ipc=10), SMALL), seed=0)
    near = made.images + 0.02 * torch.randn(made.images.shape, generator=gen(2))
    found = copies(dataclasses.replace(made, images=near.clamp(0, 1)), members, splits.val)[0]
    assert (found.measure, found.suspects, found.failed) == ("distance", 20, True)


def gen(seed: int) -> torch.Generator:
    """Return a generator."""
    return torch.Generator().manual_seed(seed)


def test_coins_are_fair_and_independent() -> None:
    inside = coins(torch.arange(400), 50)
    assert inside.mean() == pytest.approx(0.5, abs=0.02)
    assert np.abs(np.corrcoef(inside)[~np.eye(50, dtype=bool)]).max() < 0.25
    assert not np.array_equal(coins(torch.arange(400), 50, seed=1), inside)


def test_canaries_have_a_wrong_label_and_others_their_own() -> None:
    pool = pool_of(SPLITS.train, SPLITS.val, images=40, canaries=15)
    assert int(pool.canaries.sum()) == 15
    whole = {
        image.numpy().tobytes(): int(y) for image, y in zip(*pixels(SPLITS.train), strict=True)
    }
    for image, label, canary in zip(*pixels(pool.real), pool.canaries, strict=True):
        assert (whole[image.numpy().tobytes()] != int(label)) == bool(canary)
    with pytest.raises(UsageError):
        pool_of(SPLITS.train, SPLITS.val, images=1000, canaries=1)


def of_patients(real: RealSet, each: int) -> RealSet:
    """Return a set in which every patient has so many images, in no order."""
    groups = (torch.arange(len(real)) // each)[torch.randperm(len(real), generator=gen(1))] * 7
    return RealSet(real.images, real.labels, dataclasses.replace(real.card, patients=True), groups)


def test_a_patients_images_are_in_or_out_and_asked_about_together() -> None:
    real = of_patients(SPLITS.train, 3)
    pool = pool_of(real, SPLITS.val, images=60, canaries=14)
    groups = pool.real.groups
    assert groups is not None
    assert len(pool.first) == 20
    inside = coins(pool.units, 12)
    for group in groups.unique():
        own = (groups == group).numpy()
        assert len(set(pool.units[own].tolist())) == 1
        assert len(set(pool.canaries[own].tolist())) == 1
        assert all(len(set(row.tolist())) == 1 for row in inside[:, own])
    assert int(pool.canaries.sum()) == 12  # four patients, for four and two thirds
    scores = np.random.default_rng(0).normal(size=(12, 60))
    scores[3, :2] = np.nan
    scores[4, pool.units.numpy() == 1] = np.nan
    found = pool.by_unit(scores)
    for unit, first in enumerate(pool.first):
        own = groups.numpy() == int(groups[first])
        for model in range(12):
            known = [x for x in scores[model, own] if not np.isnan(x)]
            wanted = np.mean(known) if known else np.nan
            assert found[model, unit] == pytest.approx(wanted, nan_ok=True)
    near = scores.copy()
    held = Shadows(inside, np.zeros((12, 60 + len(SPLITS.val))), near)
    (leak,) = attack(pool, held, ("set",))
    assert leak.natural is not None
    assert leak.natural.found[0].members + leak.natural.found[0].others <= 12 * 16


def test_few_patients_are_not_asked_about_and_no_model_lacks_a_class() -> None:
    way = Way(DM(), Budget(ipc=2), SMALL, steps=1, student_steps=1)

    def left(each: int, images: int, ipc: int = 2) -> tuple[int, list[str]]:
        told: list[str] = []
        pool = pool_of(of_patients(SPLITS.train, each), SPLITS.val, images=images, canaries=12)
        asked = dataclasses.replace(way, budget=Budget(ipc=ipc))
        return affordable(pool, (asked, copying(asked, 1)), 4, 0, 60.0, told), told

    enough, told = left(1, 60)
    assert (enough, told) == (4, [])
    enough, told = left(5, 60)
    assert enough == 0
    assert "found 12 patients, 2 of them with a wrong label, among 60 images" in told[0]
    # The first coins leave a class of 30 or so images; some model of 64 has fewer than 24 of one.
    pool = pool_of(SPLITS.train, SPLITS.val, images=80, canaries=16)
    classes = [pool.real.labels[torch.from_numpy(row)] for row in coins(pool.units, 64, 0)]
    fewest = min(int(labels.bincount(minlength=2).min()) for labels in classes)
    first = int(classes[0].bincount(minlength=2).min())
    assert fewest < first
    budget = dataclasses.replace(way, budget=Budget(ipc=first))
    told = []
    assert affordable(pool, (budget, copying(budget, 1)), 64, 0, 60.0, told) == 0
    assert told[0].startswith("membership: each model has half of 80 images: found")


def test_where_each_image_is_a_patient_nothing_is_drawn_otherwise() -> None:
    alone = pool_of(SPLITS.train, SPLITS.val, images=40, canaries=10)
    named = pool_of(of_patients(SPLITS.train, 1), SPLITS.val, images=40, canaries=10)
    assert torch.equal(alone.units, torch.arange(40))
    assert len(named.first) == 40
    scores = np.arange(80.0).reshape(2, 40)
    assert np.array_equal(alone.by_unit(scores), scores)


def test_a_release_within_the_audit_protects_the_unit_that_was_promised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[torch.Tensor] = []

    def spy(real: RealSet, units: torch.Tensor, *rest: Any) -> Any:
        seen.append(units)
        return audited_release(real, units, *rest)

    monkeypatch.setattr(membership, "audited_release", spy)
    card = normalized_by(SPLITS.train.card, [0.5], [0.25])
    plain = RealSet(SPLITS.train.images, SPLITS.train.labels, card)
    pool = pool_of(of_patients(plain, 2), SPLITS.val, images=60, canaries=12)
    spec = SketchSpec(to_spec(SMALL), to_record(Augmentation()), networks=1, frequencies=4)
    coin = torch.from_numpy(coins(pool.units, 1)[0])
    for unit in ("patient", "image"):
        way = Way(
            FromSketch(networks=1, frequencies=4, iterations=2),
            *(Budget(ipc=1), SMALL),
            student_steps=2,
            spec=spec,
            guarantee=dataclasses.replace(promise(8.0), unit=unit, bound=bound_of(1)),  # type: ignore[arg-type]
        )
        ask(pool, way, (coin, 0))
    by_patient, by_image = seen
    assert len(by_patient.unique()) * 2 == len(by_image.unique()) == int(coin.sum())
    # Where no patients are named, groups number equal images, which are one.
    unnamed = pool.real.card
    seen.clear()
    twice = dataclasses.replace(pool.real, card=dataclasses.replace(unnamed, patients=False))
    ask(pool._replace(real=twice), way, (coin, 0))
    assert len(seen[0].unique()) == len(by_patient.unique())


def test_facts_tell_soft_labels_whitening_and_class_means() -> None:
    """What a set carries of patients without an attack: each of these changes its own fact."""
    made = distill(DM(), Task(SPLITS.train, Budget(ipc=1), SMALL), seed=0, steps=1)
    run = {"budget": to_record(Budget(ipc=1)), "settings": {}}

    def of(one: SyntheticSet) -> dict[str, str]:
        return {fact.kind: fact.weight for fact in facts_of(one, run)}

    plain = of(made)
    assert (plain["labels"], plain["start"]) == ("none", "none")
    assert "whitening" not in plain
    soft = dataclasses.replace(made, labels=torch.full_like(made.labels, 0.5))
    assert of(soft) == plain | {"labels": "some"}
    white = dataclasses.replace(made, recipe=dataclasses.replace(made.recipe, whitening="0" * 64))
    assert of(white) == plain | {"whitening": "high"}
    for start, weight in (("class-mean", "some"), ("real", "high")):
        origin = dataclasses.replace(made.origin, start=start, real_pixels=start == "real")
        assert of(dataclasses.replace(made, origin=origin)) == plain | {"start": weight}


def test_facts_tell_what_shares_and_a_learned_rate_give_away(tmp_path: Path) -> None:
    def facts(*words: str) -> dict[str, Any]:
        run = tmp_path / str(len(list(tmp_path.iterdir())))
        base = ["distill", "vary:(phantom:n=120,size=16);imbalance=10", "--backbone", "convnet-2-8"]
        made = CliRunner().invoke(app, [*base, "--steps", "1", *words, "--out", str(run)])
        assert made.exit_code == 0, made.output
        synthetic = SyntheticSet.load(run / "synthetic.safetensors")
        return {one.kind: one for one in facts_of(synthetic, read_json(run / "run.json"))}

    shared = facts("--images", "11", "--budget", "proportional")["class sizes"]
    assert (shared.weight, "follow the sizes" in shared.text) == ("some", True)
    for budget in (("--ipc", "10"), ("--images", "20"), ("--ipc", "9", "--budget", "sqrt")):
        whole = facts(*budget, "--small", "whole")["class sizes"]
        short = "was taken whole" in whole.text
        assert (whole.weight, short) in (("high", True), ("some", False)), budget
        assert short or "sqrt" in budget
    even = facts("--ipc", "2", "--small", "whole")
    assert even["class sizes"].weight == "none"
    assert even["recipe"].weight == "none"
    taught = facts("--ipc", "2", "--method", "mtt", "--experts", "1", "--max-start", "1")["recipe"]
    assert (taught.weight, "was learned from networks" in taught.text) == ("some", True)


def pixels(real: RealSet) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images and labels."""
    return real.images, real.labels


def test_nearness_is_minus_the_logarithm_of_the_distance_to_the_nearest() -> None:
    images = torch.tensor([[[[0.0, 0.0]]], [[[3.0, 1.0]]]])
    synthetic = torch.tensor([[[[3.0, 1.0]]], [[[1.0, 1.0]]], [[[0.0, 2.0]]]])
    # Means of squares: (1 + 1) / 2 at the nearest of the first, 0 at that of the second.
    assert nearness(images, synthetic) == pytest.approx([0.0, math.log(1e6)], abs=1e-5)


def test_calibration_takes_off_the_mean_over_sets_without_the_image() -> None:
    references = np.array([[-4.0, -1.0, -2.0], [-2.0, -3.0, -2.0], [-9.0, -5.0, -2.0]])
    inside = np.array([[False, True, True], [False, False, True], [True, False, True]])
    found = calibrated(np.array([-1.0, -3.0, -1.0]), references, inside)
    assert found[:2] == pytest.approx([2.0, 1.0])
    assert np.isnan(found[2])  # no set without it tells how near it would be


@pytest.fixture(scope="module")
def controls() -> tuple[Pool, Shadows]:
    """Return models of the positive control, trained on copies of what they drew."""
    splits = load("phantom:n=240,size=16,variation=1")
    pool = pool_of(splits.train, splits.val, images=240, canaries=24)
    student: Any = {"student_steps": 300, "rate": 0.05, "batch": 64}
    way = Way(Random(), Budget(ipc=2), ConvNet(2, 16), copies=True, **student)
    return pool, shadows(pool, way, models=8)


@pytest.mark.slow
def test_the_positive_control_is_found(controls: tuple[Pool, Shadows]) -> None:
    pool, held = controls
    for leak in attack(pool, held):
        assert leak.canaries is not None
        assert leak.canaries.auc > 0.93, leak
        if leak.attack == "set":  # a copy is where the image is
            assert leak.natural is not None
            assert min(one.tpr for one in (*leak.natural.found, *leak.canaries.found)) >= 0.99


@pytest.mark.slow
def test_the_negative_control_finds_nothing(controls: tuple[Pool, Shadows]) -> None:
    pool, held = controls
    covered, total = 0, 0
    for seed in range(100):
        for leak in attack(pool, nothing_to_find(pool, held, seed), ("lira",)):
            assert leak.natural is not None
            covered += leak.natural.auc_low <= 0.5 <= leak.natural.auc_high
            total += 1
    assert covered >= 0.9 * total


@pytest.mark.slow
def test_one_run_proves_something_of_copies_and_nothing_of_nothing(
    controls: tuple[Pool, Shadows],
) -> None:
    pool, held = controls
    found = guessed(pool, held, 0.0)
    assert (found.canaries, found.guesses) == (24, 12)
    assert found.lower > 0
    nothing = [guessed(pool, nothing_to_find(pool, held, seed), 0.0) for seed in range(100)]
    assert sum(one.lower > 0 for one in nothing) <= 10


def test_canaries_are_guessed_by_what_others_say_of_each() -> None:
    """How sure a model is of a canary depends on the canary far more than on who is in."""
    pool = pool_of(SPLITS.train, SPLITS.val, images=80, canaries=40)
    inside = coins(pool.units, 8)
    draw = np.random.default_rng(0)
    hard, little = 9 * draw.normal(size=80), draw.normal(size=(8, 80)) / 9
    signals = np.concatenate([hard + inside + little, np.zeros((8, 5))], 1)
    held = Shadows(inside, signals, np.zeros((8, 80)))
    found = guessed(pool, held, 0.0)
    assert (found.guesses, found.right) == (20, 20)
    marked = pool.canaries.numpy()
    assert one_run(signals[0, :80][marked], inside[0][marked], 20).right < 18


@pytest.mark.slow
def test_distilled_sets_are_attacked_the_same_way() -> None:
    pool = pool_of(SPLITS.train, SPLITS.val, images=80, canaries=20)
    way = Way(DM(), Budget(ipc=2), SMALL, steps=3, student_steps=10)
    held = shadows(pool, way, models=4)
    assert held.signals.shape == (4, 80 + len(SPLITS.val))
    assert np.isfinite(held.signals).all()
    assert held.near.shape == (4, 80)
    assert np.isfinite(held.near).all()
    again = shadows(pool, way, models=4)
    assert np.array_equal(held.signals, again.signals)
    assert {leak.attack for leak in attack(pool, held)} == {"lira", "rmia", "set"}
    with pytest.raises(UsageError, match="expected 4 or more"):
        shadows(pool, way, models=2)
    assert list(itertools.chain(*attack(pool, held)))


def run_of(folder: Path, *words: str) -> Path:
    """Return a run of phantoms, distilled by the command line."""
    base = ["distill", "phantom:n=120,size=16", "--backbone", "convnet-2-8", "--ipc", "2"]
    made = CliRunner().invoke(app, [*base, "--out", str(folder), *words])
    assert made.exit_code == 0, made.output
    return folder


def visible(page: str) -> str:
    """Return the words of a page, spaces made one."""
    body = re.sub(r"<(script|style).*?</\1>", "", page, flags=re.S)
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", body)).split())


@pytest.mark.slow
def test_the_command_line_audits_a_run_with_both_controls(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", "--method", "dm", "--steps", "3")
    words = ["audit", str(run), "--data", "phantom:n=120,size=16", "--models", "4"]
    words += ["--control-steps", "400"]
    words += ["--images", "60", "--student-steps", "20"]
    result = CliRunner().invoke(app, [*words, "--json"])
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record == read_json(run / "audit.json")
    assert (record["models"], record["images"], record["canaries"]) == (4, 60, 12)
    for control in ("membership", "positive_control", "negative_control"):
        assert set(record[control]) == {"lira", "rmia", "set"}
    assert [text.split(":")[0] for text in record["left_out"]] == [
        "mechanism",
        "reconstruction",
        "attributes",
    ]
    assert {one["name"] for one in record["subgroups"]} == {"class normal", "class nodule"}
    assert {fact["kind"]: fact["weight"] for fact in record["facts"]} == {
        "start": "none",
        "labels": "none",
        "class sizes": "none",
        "recipe": "none",
        "normalization": "some",
        "digest": "some",
        "guarantee": "some",
    }
    assert (run / "audit_copies.png").read_bytes().startswith(b"\x89PNG")
    shown = CliRunner().invoke(app, words).stdout
    assert "positive control" in shown
    assert "one run:" in shown
    page = run / "REPORT.md"
    made = CliRunner().invoke(app, ["report", str(run), "--out", str(page)])
    assert made.exit_code == 0, made.output
    text = page.read_text()
    own = record["membership"]["lira"]["canaries"]
    assert f"AUC {own['auc']:.2f} [{own['auc_low']:.2f}, {own['auc_high']:.2f}]" in text
    assert "120 training images of patients whose number is not known" in text
    sizes = {c: int((SPLITS.train.labels == c).sum()) for c in range(2)}
    least = min(sizes, key=lambda c: sizes[c])
    smallest = f"{SPLITS.train.card.classes[least]}: {sizes[least]} images"
    assert re.search(rf"Smallest class \| {smallest}", text)
    written = date.fromisoformat(record["date"])
    again = written + timedelta(days=365)
    assert f"Audited {written}. To be assessed anew by {again}" in text
    assert "None. No mechanism bounds" in text
    assert "too few others for this rate" in text
    assert "Not tried: mechanism" in text
    assert "anonymous" not in text.replace("does not make them anonymous", "")
    html = run / "report.html"
    made = CliRunner().invoke(app, ["report", str(run), "--out", str(html)])
    assert made.exit_code == 0, made.output
    shown = visible(html.read_text())
    for cell in text.replace("|", "\n").splitlines():
        said = unescape(" ".join(cell.strip("#- ").split()))
        assert cell.startswith(("# ", "Evidence")) or said in shown, said
    short = CliRunner().invoke(app, [*words[:4], "--budget", "0.00001"])
    assert "left out: mechanism: the run has no private release to audit" in short.stdout
    for part in ("reconstruction, subgroups and attributes", "membership"):
        assert f"left out: {part}: the minutes were over before; give --budget" in short.stdout
    few = CliRunner().invoke(app, [*words[:4], "--images", "19"])
    assert few.exit_code == 2
    assert "found 19 training images" in few.stderr
    wrong = CliRunner().invoke(app, ["audit", str(run), "--data", "phantom:n=130,size=16"])
    assert wrong.exit_code == 3
    assert "found other data" in wrong.stderr


@pytest.mark.slow
def test_a_set_of_real_images_fails_its_audit(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", "--method", "random")
    splits = load("phantom:n=120,size=16")
    record = audit_run(run, splits, models=4, images=60, student_steps=10, control_steps=400)
    assert record["verdict"]["leaks"] is True
    assert record["verdict"]["reasons"][:3] == [
        "copies in pixels",
        "copies in features",
        "images lead back to the real ones they started from",
    ]
    assert record["facts"][0]["weight"] == "high"
    told = officer(run)
    assert "Leaks were found: copies in pixels, copies in features and images lead back" in told
    assert "copies or starts were found again" in told
    with pytest.raises(DataError, match="medistill audit"):
        officer(tmp_path)


@pytest.mark.slow
def test_a_private_run_has_its_release_audited(tmp_path: Path) -> None:
    words = ["sketch", "phantom:n=120,size=16", "--backbone", "convnet-2-8", "--networks", "2"]
    words += ["--frequencies", "4", "--epsilon", "20", "--unit", "image", "--mean", "0.5"]
    words += ["--std", "0.25", "--out", str(tmp_path / "a.sketch")]
    ledger = Ledger(tmp_path / "ledger.json")
    words += ["--ledger", str(ledger.path)]
    assert CliRunner().invoke(app, words).exit_code == 0
    made = ["distill", str(tmp_path / "a.sketch"), "--ipc", "1", "--steps", "5"]
    assert CliRunner().invoke(app, [*made, "--out", str(tmp_path / "run")]).exit_code == 0
    how: Any = {"models": 4, "images": 60, "student_steps": 10, "control_steps": 400}
    record = audit_run(tmp_path / "run", SPLITS, **how)
    assert record["one_run"]["delta"] == DELTA
    told = officer(tmp_path / "run")
    assert "in the ledger" not in told  # what leaves the house
    page = ["report", str(tmp_path / "run"), "--out", str(tmp_path / "all.md"), "--ledger"]
    assert CliRunner().invoke(app, [*page, str(ledger.path)]).exit_code == 0
    assert (
        "It is the only release in the ledger under the name phantom"
        in (tmp_path / "all.md").read_text()
    )
    again = [str(tmp_path / "b.sketch") if word.endswith("a.sketch") else word for word in words]
    assert CliRunner().invoke(app, again).exit_code == 0
    total = composed([1 / one.noise for one in ledger.releases()], DELTA)
    assert CliRunner().invoke(app, [*page, str(ledger.path)]).exit_code == 0
    shown = (tmp_path / "all.md").read_text()
    assert f"in the ledger together: epsilon {total:.2f} at delta 1e-05." in shown
    assert 20 < total < 40
    most = attacker(total, DELTA)["tpr_at_0.01"]
    assert f"finds a member {100 * most:.1f} times in 100 at most, not as above" in shown
    html = [*page[:3], str(tmp_path / "all.html"), "--ledger", str(ledger.path)]
    assert CliRunner().invoke(app, html).exit_code == 0
    assert f"together: epsilon {total:.2f}" in visible((tmp_path / "all.html").read_text())
    other = CliRunner().invoke(app, [*page, str(tmp_path / "none.json")])
    assert other.exit_code == 0
    missing = f"does not hold {ledger.releases()[0].receipt}"
    assert missing in (tmp_path / "all.md").read_text()
    gain = attacker(20.0, DELTA)
    assert f"finds a member {100 * gain['tpr_at_0.01']:.1f} times in 100 at most" in told
    assert "a patient with several images is protected less" in told
    assert f"for each image ({ADJACENCY})" in told
    assert "bounded by epsilon 20" in told
    assert record["mechanism"]["claimed"] == 20
    assert record["noise"] > 0
    nothing = record["one_run"]["controls"]["negative_control"]
    assert 0 <= nothing["lower"] <= nothing["provable"]
    assert record["mechanism"]["broken"] is False
    assert record["membership"]["lira"]["natural"]["auc"] == pytest.approx(0.5, abs=0.4)
    refuted_guarantees_are_taken_back(tmp_path / "run", record, told)
    facts = {fact["kind"]: fact for fact in record["facts"]}
    assert facts["normalization"]["weight"] == facts["guarantee"]["weight"] == "none"
    assert "digest" not in facts


def refuted_guarantees_are_taken_back(run: Path, record: dict[str, Any], told: str) -> None:
    """Check what the officer reads where attacks show more than was promised."""
    broken = {"mechanism": {**record["mechanism"], "broken": True, "certain": 21.5}}
    write_json(run / "audit.json", {**record, **broken})
    refuted = officer(run)
    assert "None that holds" in refuted
    assert "releases show an epsilon of 21.50" in refuted
    for claim in ("bounded by epsilon", "against every attack", "itself is covered"):
        assert claim not in refuted
        assert claim in told
    beyond: dict[str, Any] = {"one_run": {**record["one_run"], "lower": 20.5, "claimed": 20.0}}
    beyond["negative_control"] = {}
    beyond["verdict"] = verdict({**record, **beyond})
    write_json(run / "audit.json", {**record, **beyond})
    assert "Against it: one run of attacks shows an epsilon of 20.50" in officer(run)
    said = {"leaks": False, "reasons": [], "blind": [], "membership": DROWNED}
    write_json(run / "audit.json", {**record, "verdict": said})
    assert f"No conclusion on membership ({DROWNED}). The guarantee alone bounds it." in officer(
        run
    )


def curve(low: float, high: float, found: float = 0.0) -> dict[str, Any]:
    """Return the ends of an area's interval, and what is found at one false alarm in a hundred."""
    points: list[dict[str, Any]] = [{"rate": 0.001, "tpr": 0.0}, {"rate": 0.01, "tpr": found}]
    points = [{**one, "sure": 0.0, "resolved": True} for one in points]
    return {"auc": (low + high) / 2, "auc_low": low, "auc_high": high, "found": points}


def one_run_of(lower: float, claimed: float | None = None, nothing: float = 0.0) -> dict[str, Any]:
    """Return what one run proves, of the set and of its controls."""
    controls = {"positive_control": {"lower": 1.0}, "negative_control": {"lower": nothing}}
    return {"lower": lower, "claimed": claimed, "controls": controls}


AWAY, HIDDEN = curve(0.99, 1.0, 0.99), curve(0.99, 1.0, 0.98)


@pytest.mark.parametrize(
    ("own", "positive", "copied", "negative", "leaks", "said"),
    [
        (curve(0.4, 0.6), curve(0.95, 1.0), AWAY, curve(0.4, 0.6), False, "valid"),
        (curve(0.6, 0.8), curve(0.95, 1.0), AWAY, curve(0.4, 0.6), True, "valid"),
        (curve(0.6, 0.8), curve(0.5, 0.6), AWAY, curve(0.4, 0.6), True, "valid"),
        (
            curve(0.4, 0.6),
            curve(0.5, 0.9),
            AWAY,
            curve(0.4, 0.6),
            False,
            "positive control",
        ),
        (
            curve(0.4, 0.6),
            curve(0.95, 1.0),
            HIDDEN,
            curve(0.4, 0.6),
            False,
            "positive control",
        ),
        (
            curve(0.6, 0.8),
            curve(0.95, 1.0),
            AWAY,
            curve(0.55, 0.6),
            False,
            "negative control",
        ),
    ],
)
def test_there_is_no_verdict_without_both_controls(
    own: Any, positive: Any, copied: Any, negative: Any, leaks: bool, said: str
) -> None:
    sides = {"membership": own, "positive_control": positive, "negative_control": negative}
    attacks = ("lira", "rmia", "set")
    record = {name: {a: {"canaries": side} for a in attacks} for name, side in sides.items()}
    record["positive_control"]["set"]["natural"] = copied
    record["positive_control"]["set"]["canaries"] = AWAY
    record |= {"one_run": one_run_of(0.5), "noise": None}
    found = verdict({"copies": [], **record})
    assert found["leaks"] is leaks
    assert said in found["membership"]
    # What copies say is no control of the attacks on members.
    copied_too = verdict({"copies": [{"view": "pixels", "failed": True}], **record})
    assert copied_too["leaks"]
    assert copied_too["membership"] == found["membership"]


def test_a_few_members_that_are_given_away_wholly_are_a_leak() -> None:
    """Two in a hundred hardly move the area, and are what small rates are looked at for."""
    draw = np.random.default_rng(0)
    inside = draw.random((16, 2000)) < 0.5
    scores = draw.normal(size=inside.shape)
    known = np.arange(2000) < 60
    scores[inside & known] += 9.0
    leaky, none = clustered(scores, inside), clustered(draw.normal(size=inside.shape), inside)
    assert leaky.auc < 0.52

    def record(curve: Any, negative: Any = none) -> Any:
        away = {"lira": {"canaries": plain(curve_away)}, "rmia": {}, "set": {"natural": AWAY}}
        return {
            "copies": [],
            "one_run": one_run_of(0.0),
            "noise": None,
            "membership": {"lira": {"natural": plain(curve) | {"auc_low": 0.5}}},
            "positive_control": away,
            "negative_control": {"lira": {"natural": plain(negative)}},
        }

    def plain(curve: Any) -> dict[str, Any]:
        return dataclasses.asdict(curve)

    curve_away = clustered(inside + draw.normal(size=inside.shape) / 9, inside)
    found = verdict(record(leaky))
    assert found["leaks"]
    assert re.match(r"lira finds natural \(\d\.\d% at 1% false alarms\)", found["reasons"][0])
    assert not verdict(record(none))["leaks"]
    assert "negative control" in verdict(record(none, leaky))["membership"]


def test_a_bound_of_one_run_above_the_promise_is_a_leak() -> None:
    cases = ((0.4, 0.0, True), (0.6, 0.0, False), (None, 0.6, False), (0.4, 0.45, False))
    for claimed, nothing, leaks in cases:
        record: Any = {name: {} for name in ("membership", "negative_control")}
        record["positive_control"] = {
            "lira": {"canaries": curve(0.95, 1.0)},
            "rmia": {},
            "set": {"natural": AWAY},
        }
        record |= {"one_run": one_run_of(0.5, claimed, nothing), "noise": None}
        found = verdict({"copies": [], **record})
        assert found["leaks"] is leaks
        broken = claimed is not None and nothing > claimed
        assert ("negative control was found" in found["membership"]) == broken


def test_nothing_found_under_noise_that_drowns_the_models_is_no_verdict() -> None:
    """Models of copies have no noise: that these are found says nothing of a private sketch."""
    record: Any = {
        "copies": [],
        "one_run": one_run_of(0.0, 1.0),
        "membership": {"lira": {"canaries": curve(0.4, 0.6)}},
        "positive_control": {
            "lira": {"canaries": curve(0.95, 1.0)},
            "rmia": {},
            "set": {"natural": AWAY},
        },
        "negative_control": {},
    }
    for noise, said in ((None, "valid"), (1.0, "valid"), (1.1, DROWNED)):
        assert verdict(record | {"noise": noise})["membership"] == said
    # What was found all the same was found.
    found = verdict(record | {"noise": 9.0, "membership": {"lira": {"canaries": curve(0.6, 0.7)}}})
    assert found["membership"] == "valid"
    assert found["leaks"]


def test_the_noise_of_an_attacked_model_is_that_of_its_own_images() -> None:
    spec = SketchSpec(to_spec(SMALL), to_record(Augmentation()), networks=2, frequencies=4)
    way = Way(FromSketch(), Budget(ipc=1), SMALL, spec=spec)
    noisy = dataclasses.replace(
        way, guarantee=Guarantee(1.0, DELTA, "image", 3.0, math.sqrt(3), 3.0)
    )
    pool = pool_of(of_patients(SPLITS.train, 3), SPLITS.val, images=60, canaries=12)
    inside = coins(pool.units, 5)
    assert drowning(pool, way, inside) is None
    length = 3.0 * math.sqrt(3) * math.sqrt(2 * 4 * len(spec.sizes(pool.real.card)))
    labels, groups = pool.real.labels.numpy(), pool.real.groups
    assert groups is not None
    for unit in ("image", "patient"):
        promise = dataclasses.replace(noisy.guarantee, unit=unit)  # type: ignore[type-var]
        wanted = []
        for row in inside:
            shares = [0.0] * len(pool.real.card.classes)
            for image in np.flatnonzero(row):
                of_one = row & (groups.numpy() == int(groups[image]))
                shares[labels[image]] += 1 if unit == "image" else 1 / of_one.sum()
            wanted.append(length / min(shares))
        found = drowning(pool, dataclasses.replace(noisy, guarantee=promise), inside)
        assert found == pytest.approx(sorted(wanted)[2])


def test_a_promise_for_images_is_held_against_patients_of_one_image() -> None:
    def claimed(each: int, unit: Any) -> float | None:
        pool = pool_of(of_patients(SPLITS.train, each), SPLITS.val, images=60, canaries=12)
        return battery._claimed(pool, Guarantee(2.0, DELTA, unit, 3.0, math.sqrt(3), 3.0))

    assert claimed(1, "image") == claimed(1, "patient") == claimed(3, "patient") == 2.0
    assert claimed(3, "image") is None


def test_pages_tell_both_controls_of_one_run_and_outside_no_number() -> None:
    def run(lower: float, right: int) -> dict[str, Any]:
        return {"lower": lower, "provable": 1.82, "right": right, "guesses": 20, "delta": 0.0}

    controls = {"positive_control": run(1.5, 19), "negative_control": run(0.0, 11)}
    own = {**run(0.25, 16), "controls": controls}
    inside, outside = tried._one_run_rows(own, False), tried._one_run_rows(own, True)
    could = "; 1.82 could be shown at most"
    assert inside == [
        ("one run", "16 of 20 guesses right", f"epsilon is at least 0.25{could}"),
        ("one run, positive control", "19 of 20 guesses right", f"epsilon is at least 1.50{could}"),
        ("one run, negative control", "11 of 20 guesses right", f"epsilon is at least 0.00{could}"),
    ]
    assert outside == [
        ("one run", "", "epsilon is at least 0.25"),
        ("one run, positive control", "", "found"),
        ("one run, negative control", "", "not found"),
    ]


@pytest.mark.parametrize(
    ("noise", "held", "told"),
    [(0.5, 900, ""), (1.5, 900, "--images 600 would bring"), (3.0, 900, "about 1,200 images")],
)
def test_the_command_says_how_many_images_noise_would_leave_seen(
    noise: float, held: int, told: str
) -> None:
    said = _drowning({"noise": noise, "images": 400, "data": {"images": held}})
    assert said.startswith(f"noise of a release in an attacked model: {noise:.2f} of the longest")
    assert told in said
    assert ("would" in said) == bool(told)


def with_fact(real: RealSet, values: torch.Tensor) -> RealSet:
    """Return a set with one more number known of each image."""
    return RealSet(real.images, real.labels, real.card, real.groups, {"site": values})


def test_the_free_bound_takes_nothing_for_given() -> None:
    """Randomized response of epsilon 1 is no Gaussian: the Gaussian's bound is beyond it."""
    share = 1 / (1 + math.e)
    false = (round(share * 20_000), round(share * 20_000))
    assert _free(false, 20_000, 1e-5) == pytest.approx(1.0, abs=0.05)
    assert _free(false, 20_000, 1e-5) < 1.0
    assert _lower(false, 20_000, 1e-5, LEVEL) > 1.0
    assert _free((20_000, 20_000), 20_000, 1e-5) == 0.0


def test_images_of_a_patient_count_as_one_and_two_guesses_are_added() -> None:
    right = np.array([True, True, False, True])
    one = _share(right, np.array([0, 0, 1, 1]), np.ones(4))
    assert one[:2] == pytest.approx((0.75, (0.75 * 2 + 1) / 4))
    assert one.deviation == pytest.approx(math.sqrt(0.625 * 0.375 / 4))
    assert _share(right, np.arange(4), np.ones(4)).middle == pytest.approx((3 + 1) / 6)
    halved = _share(right, np.arange(4), np.array([2.0, 1.0, 1.0, 0.0]))
    assert halved.mean == pytest.approx(0.75)
    assert halved.middle == pytest.approx((0.75 * 16 / 6 + 1) / (16 / 6 + 2))
    # All right among 30 is no certainty.
    assert _share(np.ones(30, dtype=bool), np.arange(30), np.ones(30)).deviation > 0.02


def test_others_are_weighed_as_those_asked() -> None:
    asked = [(0, 1.0), (0, 1.0), (1, 1.0), (1, 2.0)]
    own, there = _matched(asked, [(0, 1.0), (1, 1.0), (1, 1.0), (0, 3.0)])
    assert own.tolist() == [1, 1, 1, 0]  # nobody else is of class 1 and value 2
    assert there.tolist() == [2, 0.5, 0.5, 0]


@pytest.mark.parametrize("right", [0.98, 0.7])
def test_what_is_guessed_alike_of_all_is_seldom_a_leak(right: float) -> None:
    """Of 30 asked members and 200 others: a leak in 2.5% of cases at most, but for the draw."""
    draw, leaks = np.random.default_rng(0), 0
    for _ in range(2000):
        sides = [_share(draw.random(n) < right, np.arange(n), np.ones(n)) for n in (30, 200)]
        half = 1.96 * math.hypot(*(side.deviation for side in sides))
        leaks += sides[0].middle - sides[1].middle > half
    assert leaks / 2000 < 0.04


def test_a_shrunken_real_image_in_a_tile_is_a_copy(tmp_path: Path) -> None:
    """Beside whole images it is a blurred stranger; beside shrunken ones it is the image."""
    splits = load("phantom:n=200,size=16")
    task = Task(splits.train, Budget(ipc=2), ConvNet(2, 8))
    started = dataclasses.replace(FromSketch(iterations=1), start="real")
    prepared = dataclasses.replace(task, prepared=started.prepare(task, Rng(0)))
    state = started.init(prepared, Rng(0))
    made = started.finish(state, prepared, Rng(0))
    assert made.recipe.factor == 2
    for one in copies(made, splits.train, splits.val):
        assert one.images == 16
        assert one.failed, one.view
        assert one.suspects == 16 if one.view == "pixels" else one.suspects > 8
    blank = dataclasses.replace(
        made, images=torch.rand(made.images.shape, generator=Rng(0).at("x"))
    )
    assert not any(one.failed for one in copies(blank, splits.train, splits.val))


def test_attacks_that_miss_their_own_control_are_named() -> None:
    """LiRA finds its copies and RMIA does not: that RMIA finds nothing says nothing."""

    def curve(low: float, tpr: float = 1.0) -> dict[str, Any]:
        at = {"rate": 0.01, "tpr": tpr, "sure": 0.0, "resolved": True}
        return {"auc": low, "auc_low": low, "found": [at]}

    record: dict[str, Any] = {
        "copies": [],
        "one_run": one_run_of(0.0),
        "noise": None,
        "membership": {"lira": {"canaries": curve(0.4)}},
        "positive_control": {
            "lira": {"canaries": curve(0.95)},
            "rmia": {"natural": curve(0.6)},
            "set": {"natural": curve(0.99)},
        },
        "negative_control": {"lira": {"canaries": curve(0.4)}},
    }
    assert verdict(record)["blind"] == ["rmia of natural"]
    assert verdict(record)["membership"] == "valid"
    record["positive_control"]["lira"]["canaries"] = curve(0.8)
    assert "--control-steps" in verdict(record)["membership"]
    record["positive_control"]["set"]["natural"] = curve(0.99, 0.5)
    assert verdict(record)["blind"] == ["lira of canaries", "rmia of natural", "set of natural"]


def test_a_one_run_audit_that_proves_nothing_of_copies_is_named() -> None:
    one = one_run_of(0.0)
    one["controls"]["positive_control"]["lower"] = 0.0
    sides: Any = {name: {} for name in ("membership", "negative_control")}
    away = {"lira": {"canaries": AWAY}, "rmia": {}, "set": {"natural": AWAY}}
    record = {"copies": [], "one_run": one, "noise": None, "positive_control": away, **sides}
    assert verdict(record)["blind"] == ["one run of canaries"]
    # What it finds of copies must be more than is claimed, or it could refute nothing.
    one["controls"]["positive_control"]["lower"] = 2.55
    for claimed, blind in ((None, []), (1.0, []), (8.0, ["one run of canaries"])):
        assert verdict(record | {"one_run": one | {"claimed": claimed}})["blind"] == blind


def test_power_counts_images_and_not_how_often_they_were_asked() -> None:
    draw = np.random.default_rng(0)
    scores, inside = draw.normal(size=(20, 30)), draw.random((20, 30)) < 0.5
    found = clustered(scores, inside).found[-1]
    assert (found.members, found.others) == (30, 30)
    assert not found.resolved  # though scores would be enough for one in a hundred


@pytest.mark.slow
def test_an_attribute_that_a_model_remembers_of_members_is_found() -> None:
    """Members of site 1 have a wrong label, which only a model that saw them knows."""
    whole = load("phantom:n=480,size=16,variation=1").train
    train_set, strange = whole.take(torch.arange(240)), whole.take(torch.arange(240, 480))
    draw = torch.Generator().manual_seed(0)
    site = (torch.rand(240, generator=draw) < 0.3).long()
    odd = RealSet(train_set.images, (train_set.labels + site) % 2, train_set.card)
    learned = train(
        _copied(odd, Task(odd, Budget(ipc=2), ConvNet(2, 16))),
        dataclasses.replace(
            recipe_of(Task(odd, Budget(ipc=2), ConvNet(2, 16))),
            steps=400,
            stop=400,
            lr=0.05,
            batch=64,
            augmentation={"kinds": []},
        ),
    )
    members = with_fact(train_set, site)
    elsewhere = load("phantom:n=240,size=16,variation=1,seed=1").train
    still: Any = {"augmentation": {"kinds": []}, "steps": 400, "stop": 400, "lr": 0.05}
    plain = dataclasses.replace(recipe_of(Task(elsewhere, Budget(ipc=2), ConvNet(2, 16))), **still)
    control = train(_copied(elsewhere, Task(elsewhere, Budget(ipc=2), ConvNet(2, 16))), plain)
    others = with_fact(strange, (torch.rand(240, generator=draw) < 0.3).long())
    (found,) = attributes(learned, members, others)
    assert found.name == "site"
    assert found.low > 0
    assert found.low < found.guessed - found.others < found.high
    assert found.guessed > 0.95 > 0.8 > found.others
    assert found.majority == pytest.approx(float((site == 0).double().mean()))
    # A model that saw no member has nothing to remember, however good it is.
    (quiet,) = attributes(control, members, others)
    assert quiet.low <= 0 <= quiet.high
    # What any image shows of its site is guessed of everybody alike.
    seen = [with_fact(part, part.labels) for part in (train_set, strange)]
    (shown,) = attributes(control, *seen)
    assert min(shown.guessed, shown.others) > 0.99
    assert shown.low <= 0 <= shown.high
    # Nor is it a leak that others are of another mix: here nearly all of site 1.
    mixed = with_fact(strange, (torch.rand(240, generator=draw) < 0.9).long())
    (shifted,) = attributes(control, members, mixed)
    assert shifted.low <= 0 <= shifted.high
    assert attributes(learned, with_fact(train_set, torch.zeros(240)), others) == []
    groups = {one.name: one for one in subgroups(learned, members)}
    right = logits_of_set(learned, train_set).argmax(1) == train_set.labels
    assert groups["site 1"].accuracy == pytest.approx(float(right[site == 1].double().mean()))
    assert groups["site 1"].accuracy < 0.2 < 0.8 < groups["site 0"].accuracy
    assert groups["site 0"].images == int((site == 0).sum())
    assert len(groups) == 4


def test_the_chance_of_suspects_equals_all_orders() -> None:
    """Three images among four others: two or more below the second smallest other, by listing."""
    orders = list(itertools.permutations(range(7)))
    hits = 0
    for order in orders:
        images, others = order[:3], sorted(order[3:])
        hits += sum(one < others[1] for one in images) >= 2
    assert chance_of(2, 3, 2, 4) == pytest.approx(hits / len(orders))


def test_held_out_images_are_no_copies() -> None:
    """Sets that are fresh draws fail as rarely as they should, however few are held out."""
    draw = np.random.default_rng(0)
    for others in (20, 100, 1000):
        failed = 0
        for _ in range(2000):
            sides = (torch.tensor(draw.random((3, n))) for n in (100, others))
            failed += weigh(*(Near(*side) for side in sides))[3] < FAILS
        assert failed <= 20  # ten are meant, at most


def test_a_set_is_looked_at_as_its_student_sees_it(tmp_path: Path) -> None:
    """Copies in a set with another normalization are copies."""
    task = Task(SPLITS.train, Budget(ipc=3), SMALL)
    made = distill(Random(), task, seed=0)
    recipe = dataclasses.replace(made.recipe, mean=(0.1,), std=(0.7,))
    other = dataclasses.replace(made, recipe=recipe)
    seen = _seen_by(other, SPLITS)
    assert copies(other, seen.train, seen.val)[1].exact == 6
    assert copies(other, SPLITS.train, SPLITS.val)[1].exact < 6


def test_images_that_kept_their_start_lead_back_to_it() -> None:
    task = Task(SPLITS.train, Budget(ipc=3), SMALL)
    method = DM(start="real", lr_images=0.01)
    made = distill(method, task, seed=4, steps=2)
    found = recovered(made, method, task, SPLITS.train, 4)
    assert found is not None
    assert (found.images, found.recovered, found.failed) == (6, 6, True)
    assert found.chance == pytest.approx(1 / 60)
    noise = torch.rand(made.images.shape, generator=gen(1))
    lost = recovered(dataclasses.replace(made, images=noise), method, task, SPLITS.train, 4)
    assert lost is not None
    assert not lost.failed
    assert recovered(made, DM(), task, SPLITS.train, 4) is None


def test_the_control_is_asked_once_for_all_runs_on_the_same_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = pool_of(SPLITS.train, SPLITS.val, images=60, canaries=12)
    way = Way(Random(), Budget(ipc=2), SMALL, copies=True, student_steps=4)
    plain, asked = battery.shadows, []

    def noted(*rest: Any, **named: Any) -> Shadows:
        asked.append(named["seed"])
        return plain(*rest, **named)

    monkeypatch.setattr(battery, "shadows", noted)

    def found(way: Way, seed: int, cache: Path | None = tmp_path) -> Any:
        return [one.tolist() for one in battery._control(pool, way, 4, seed, Here(), cache)]

    first = found(way, 1)
    assert found(dataclasses.replace(way, method=DM(), budget=Budget(ipc=1)), 1) == first
    assert asked == [1]
    found(way, 2)
    found(dataclasses.replace(way, student_steps=5), 1)
    assert found(way, 1, None) == first
    assert asked == [1, 2, 1, 1]
