"""The indicator on studies whose answer is known, and predictions from the command line."""

import itertools
import json
import math
import mmap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from medistill.cli import app
from medistill.data import load
from medistill.engine import Here
from medistill.errors import DataError, RunRefused, UsageError
from medistill.indicator import (
    CANDIDATES,
    LEAST,
    SCORES,
    SEED,
    Example,
    Indicator,
    afar,
    conformal,
    curve_at,
    from_json,
    inputs_of,
    left_out,
    load_indicator,
    reached_by,
    to_json,
)
from medistill.judge import (
    _judged,
    apart,
    coverage_of,
    examples_of,
    fit,
    flipped,
    permuted,
    predictions_of,
)
from medistill.measure import measure
from medistill.metrics import Score
from medistill.plan import Data, Study
from medistill.predict import Line, predict, recommendation
from medistill.sets import RealSet, copied


class Nobody(Here):
    """An engine that is not to be asked."""

    def done(self, *_: Any, **__: Any) -> Any:
        raise AssertionError


def mean_model(known: Any, target: Any, new: Any) -> Any:
    return np.full(len(new), target.mean())


def measured(random: float, fisher: float = 1.0, classes: int = 2) -> dict[str, Any]:
    sizes = {"1": random, "10": random + 0.1}
    varied = {"fisher": fisher, "modes": 2.0, "dimension_mle": 8.0, "majority": 0.5}
    return {
        "random": {size: {m: [v - 0.01, v + 0.01] for m in SCORES} for size, v in sizes.items()},
        "variation": varied,
        "classes": classes,
        "train": 1000,
    }


def examples(count: int, noise: float = 0.0) -> list[Example]:
    """Return datasets on which dm reaches 0.2 + 0.8 random, and full data 0.95."""
    draw = np.random.default_rng(0)
    found = []
    for number in range(count):
        random = 0.4 + 0.4 * number / count
        score = 0.2 + 0.8 * random + noise * draw.normal()
        reached = {
            "dm": {1: {"accuracy": score, "auc": score}},
            "random": {1: {"accuracy": random, "auc": random}},
            "full": {0: {"accuracy": 0.95, "auc": 0.95}},
        }
        families = (f"family {number // 2}",)
        found.append(Example(f"set {number}", families, measured(random), reached))
    return found


def ten(one: Example) -> dict[str, float]:
    """Return what ten random images reach on such a dataset: 0.1 more than one."""
    return {name: score + 0.1 for name, score in one.reached["random"][1].items()}


def known_at(ipc: int) -> Indicator:
    """Return an indicator that knows dm at one and at `ipc` per class."""
    wide = [
        one._replace(reached=one.reached | {"dm": {ipc: one.reached["dm"][1], **one.reached["dm"]}})
        for one in examples(12)
    ]
    return Indicator(tuple(wide), SEED, {}, "toy")


def test_the_gap_closed_has_an_interval_of_its_own() -> None:
    """Of noisy gaps, the share inside is what the interval says; without noise it is a point."""
    exact = Indicator(tuple(examples(20)), SEED, {}, "toy").gap(measured(0.5), "dm", 1, 0.01)
    assert exact is not None
    assert exact.mean == pytest.approx(0.1 / 0.45, abs=1e-6)
    assert exact.high == pytest.approx(exact.mean, abs=1e-6)
    known = Indicator(tuple(examples(20, noise=0.03)), SEED, {}, "toy")
    found = known.gap(measured(0.5), "dm", 1, 0.01)
    assert found is not None
    assert found.high is not None
    errors = []
    for one in known.examples:
        others = tuple(o for o in known.examples if o.families != one.families)
        told = replace(known, examples=others).gap(one.measured, "dm", 1, 0.01)
        assert told is not None
        arms = (("dm", 1), ("random", 1), ("full", 0))
        own, base, full = (one.reached[method][ipc]["accuracy"] for method, ipc in arms)
        errors.append(abs(told.mean - (own - base) / (full - base)))
    assert found.high - found.mean == pytest.approx(conformal(np.array(errors)), rel=1e-6)
    assert known.gap(measured(0.5), "dm", 1, 0.6) is None  # there is no such gap
    assert known.gap(measured(0.5), "mtt", 1, 0.01) is None


def test_where_there_is_nothing_to_tell_the_seeds_correlation_is_about_zero() -> None:
    """A line that was fitted without a dataset leans away from it: its number itself does not."""
    draw, found, leaning = np.random.default_rng(5), [], []
    for _ in range(12):
        toys = [
            one._replace(reached={"dm": {1: {"accuracy": draw.uniform(), "auc": draw.uniform()}}})
            for one in examples(16)
        ]
        judged, told = _judged(toys, ("accuracy", SEED))
        found.append(judged["budgets"]["1"]["spearman"])
        leaning.append(np.corrcoef(told.told.ravel(), told.reached.ravel())[0, 1])
    assert abs(np.mean(found)) < 0.2
    assert np.mean(leaning) < -0.2


def test_families_keep_one_sign() -> None:
    better, worse = np.array([0.1, 0.1, 0.3, 0.3]), np.array([0.2, 0.4, 0.2, 0.4])
    groups = [("a",), ("a",), ("b",), ("b", "a")]
    gains = [0.4, -0.1]  # the last is of both, and would tie them
    assert apart(groups) == ["a", "b"]
    signs = list(itertools.product([-1, 1], repeat=2))
    exact = np.mean([np.dot(sign, gains) >= sum(gains) - 1e-12 for sign in signs])
    assert flipped(better, worse, groups=groups) == pytest.approx(exact)


def test_studies_that_cannot_be_judged_say_so_in_one_line() -> None:
    apart = [
        one._replace(reached={f"m{number % 3}": {1: {"accuracy": 0.5, "auc": 0.5}}})
        for number, one in enumerate(examples(9))
    ]
    with pytest.raises(RunRefused, match=r"found 3 datasets .* of one method and budget"):
        fit(apart, "toy")
    alike = [one._replace(families=("one",)) for one in examples(9)]
    with pytest.raises(RunRefused, match="of one family alone"):
        fit(alike, "toy")
    made = Indicator(tuple(alike), SEED, {}, "toy")
    two = [one._replace(families=(f"f{n % 2}",)) for n, one in enumerate(examples(10))]
    told = _judged(two, ("accuracy", SEED))[0]["budgets"]["1"]
    assert told["family_error"] is not None
    assert told["coverage"] is None  # of five others none can be left out: no interval, not 100%
    assert _judged(alike, ("accuracy", SEED))[0]["budgets"]["1"]["family_error"] is None
    assert made.predict(measured(0.5), "dm", 1, "auc").low == 0.0
    flat = measured(0.5, fisher=math.inf)
    assert math.isfinite(inputs_of(flat, 1, "auc")["fisher"])


def test_a_line_through_random_accuracy_is_found_exactly() -> None:
    made = fit(examples(12), "toy")
    for name in CANDIDATES:
        assert made.report["accuracy"][name]["error"] < 0.02
    line = made.report["accuracy"][SEED]
    assert line["error"] == pytest.approx(0, abs=1e-9)
    assert line["budgets"]["1"]["spearman"] == pytest.approx(1)
    (judged,) = line["methods"]["dm"].values()
    gains = {"gain_spearman": -1.0}  # the better random images are, the less dm adds
    assert judged == pytest.approx({"error": line["error"], "spearman": 1.0, **gains})
    assert line["family_error"] == pytest.approx(0, abs=1e-9)
    assert made.chosen in (SEED, "learning curve")
    found = made.predict(measured(0.5), "dm", 1, "accuracy")
    assert found.mean == pytest.approx(0.6, abs=1e-6)
    assert found.n == 12
    full = made.predict(measured(0.5), "full", 0, "auc")
    assert full.mean == pytest.approx(0.95, abs=1e-6)


def test_intervals_hold_as_often_as_they_say() -> None:
    """Over many drawn studies the interval of a new dataset covers about 80%."""
    draw = np.random.default_rng(1)
    inside, judged = [], []
    for _ in range(300):
        x = draw.uniform(0.2, 0.8, (21, 1))
        y = 0.1 + 0.8 * x[:, 0] + 0.05 * draw.normal(size=21)
        line = CANDIDATES[SEED][1]
        half = conformal(np.abs(y[:20] - left_out(line, x[:20], y[:20])))
        inside.append(abs(line(x[:20], y[:20], x[20:])[0] - y[20]) <= half)
        if len(judged) < 40:
            judged.append(coverage_of(line, x[:20], y[:20], [str(i) for i in range(20)]))
    assert 0.75 <= np.mean(inside) <= 0.9
    assert 0.75 <= np.mean(judged) <= 0.9


def test_what_is_left_out_is_not_seen() -> None:
    target = np.array([0.1, 0.2, 0.3, 0.6, 0.8, 0.7])
    table = np.zeros((6, 1))
    others = [(target.sum() - one) / 5 for one in target]
    assert left_out(mean_model, table, target) == pytest.approx(others)
    assert np.isnan(left_out(mean_model, table[:5], target[:5])).all()  # four others are left
    wide, more = np.zeros((9, 1)), np.array([*target, 0.4, 0.5, 0.9])
    families = ["a", "a", "b", "b", "b", "c", "c", "c", "ab"]  # the last is made of both
    by_family = left_out(mean_model, wide, more, families)
    assert by_family[:2] == pytest.approx([more[2:8].mean()] * 2)
    assert by_family[2:5] == pytest.approx([more[[0, 1, 5, 6, 7]].mean()] * 3)
    assert by_family[5] == pytest.approx(more[[0, 1, 2, 3, 4, 8]].mean())
    assert math.isnan(by_family[8])  # fewer than five others are left


def test_the_conformal_place_is_that_of_the_paper() -> None:
    errors = np.arange(1, 10) / 10
    assert conformal(errors) == 0.8  # ceil(0.8 x 10) = 8th of 9
    assert conformal(errors[:5]) == 0.5  # ceil(0.8 x 6) = 5th of 5, where ceil(0.8 x 5) is 4
    assert conformal(errors[:3]) == pytest.approx(0.3)  # ceil(0.8 x 4) = 4 > 3: the largest


def test_gains_and_shares_are_judged_beside_scores() -> None:
    line = fit(examples(12), "toy").report["accuracy"][SEED]
    at = line["budgets"]["1"]
    # Gain is 0.2 - 0.2 random, share score / 0.95: lines through random as well, one of them falls.
    assert at["gain_error"] == pytest.approx(0, abs=1e-9)
    assert at["gain_spearman"] == pytest.approx(-1)  # of the number itself
    assert at["share_pearson"] == pytest.approx(1)
    assert line["p_value"] == pytest.approx(1e-4)
    assert line["p_better"] == 1.0  # it is the seed's number itself
    told = predictions_of(examples(12), SEED, "auc")
    assert told.told.shape == (12, 1, 1)
    assert told.told == pytest.approx(told.reached)


def test_permutations_equal_all_permutations() -> None:
    """Of 4 datasets all 24 orders can be listed: the share whose rank sum is as large is p."""
    told = np.array([0.1, 0.2, 0.3, 0.4])
    reached = np.array([0.2, 0.1, 0.3, 0.4])
    ranks, orders = np.array([2, 1, 3, 4]), list(itertools.permutations([1, 2, 3, 4]))
    seen = np.dot([1, 2, 3, 4], ranks)
    exact = np.mean([np.dot(order, ranks) >= seen for order in orders])
    assert permuted(told, reached, 20000) == pytest.approx(exact, abs=0.01)
    assert permuted(np.full(4, 0.5), reached) == 1.0
    # A second budget that knows two datasets alone adds its ranks for these.
    wide = np.array([[0.1, np.nan], [0.2, np.nan], [0.3, 0.1], [0.4, 0.9]])
    assert permuted(wide, wide, 20000) < permuted(told, told, 20000) + 0.01


def test_where_nothing_is_told_p_is_uniform_or_larger() -> None:
    draw = np.random.default_rng(3)
    found = [permuted(draw.normal(size=12), draw.normal(size=12), 99) for _ in range(300)]
    assert np.mean(np.array(found) <= 0.1) == pytest.approx(0.1, abs=0.05)


def test_flipped_signs_equal_all_flips() -> None:
    better, worse = np.array([0.1, 0.1, 0.3]), np.array([0.2, 0.4, 0.2])
    gains = worse - better
    signs = list(itertools.product([-1, 1], repeat=3))
    exact = np.mean([np.dot(sign, gains) >= gains.sum() - 1e-12 for sign in signs])
    assert flipped(better, worse, 20000) == pytest.approx(exact, abs=0.01)
    assert flipped(better, better) == 1.0
    assert flipped(worse, better) > 0.5


@pytest.mark.parametrize("size", [1, 3, 10, 30, 1000])
def test_curves_follow_a_power_law(size: int) -> None:
    sizes = [1, 2, 5, 10]
    means = [1 - 0.5 * s**-0.3 for s in sizes]
    wanted = 1 - 0.5 * size**-0.3
    assert curve_at(sizes, means, size) == pytest.approx(wanted, abs=0.005)


def test_a_falling_curve_is_not_continued_downward() -> None:
    assert curve_at([1, 10], [0.6, 0.5], 1000) == pytest.approx(0.5)


def test_inputs_are_those_of_the_budget() -> None:
    found = inputs_of(measured(0.5), 10, "accuracy")
    assert found["random"] == pytest.approx(0.6)
    assert found["slope"] == pytest.approx(0.1)
    assert found["classes"] == pytest.approx(math.log(2))
    assert inputs_of(measured(0.5), 1, "accuracy")["random"] == pytest.approx(0.5)


def test_too_few_datasets_are_refused() -> None:
    with pytest.raises(RunRefused, match="found 5 datasets"):
        fit(examples(5), "toy")
    made = fit(examples(LEAST), "toy")
    with pytest.raises(UsageError, match="found 0 datasets with mtt at 1"):
        made.predict(measured(0.5), "mtt", 1, "auc")


def test_an_indicator_survives_its_file(tmp_path: Path) -> None:
    made = fit(examples(9, noise=0.02), "toy")
    path = tmp_path / "indicator.json"
    path.write_text(json.dumps(to_json(made)))
    again = load_indicator(path)
    assert again == made
    for wrong in ([], {}, {"format": "medistill indicator 1"}, {**to_json(made), "examples": [1]}):
        with pytest.raises(DataError):
            from_json(wrong, "x")
    with pytest.raises(UsageError, match="found candidate"):
        from_json({**to_json(made), "chosen": "magic"}, "x")


def test_examples_hold_the_mean_over_seeds() -> None:
    common = {"source": "pneumonia few", "ipc": 1}
    rows = [
        {**common, "method": "dm", "accuracy": 0.6, "auc": 0.7},
        {**common, "method": "dm", "accuracy": 0.8, "auc": 0.9},
        {**common, "method": "random", "accuracy": 0.1, "auc": 0.1},
        {**common, "method": "full", "ipc": 0, "accuracy": 0.9, "auc": 1.0},
    ]
    data = Data("pneumoniamnist", "pneumonia few", family=("pneumonia", "chest"))
    study = Study("x", (data,), (), backbones=("convnet", "mlp"))
    rows = [{**row, "backbone": "convnet"} for row in rows]
    other = [{**row, "accuracy": 0.0, "backbone": "mlp"} for row in rows]
    (found,) = examples_of(study, [*rows, *other], {"pneumonia few": measured(0.5)})
    assert found.families == ("pneumonia", "chest")
    assert Data("pneumoniamnist").families == ("pneumoniamnist",)
    assert found.reached["dm"][1] == pytest.approx({"accuracy": 0.7, "auc": 0.8})
    assert found.reached["random"][1]["auc"] == 0.1
    assert set(found.reached) == {"dm", "random", "full"}


def line(mean: float, low: float, ipc: int = 1, value: float = 7.0) -> Line:
    found = Score(mean, low, mean + 0.05, 9)
    return Line("dm", ipc, found, found, None, value)


@pytest.mark.parametrize(
    ("lines", "random", "told"),
    [
        ([line(0.8, 0.75)], 0.6, "It pays: the set would be worth about 7 random"),
        ([line(0.8, 0.75, value=math.inf)], 0.6, "more than the study has"),
        ([line(0.8, 0.55)], 0.6, "not sure"),
        ([line(0.55, 0.5)], 0.6, "No method is expected to beat random"),
        ([line(0.9, 0.88)], 0.895, "hardly expected to do better"),
        ([line(0.9, 0.88)], 0.995, "nothing to distill"),
    ],
)
def test_the_recommendation_follows_the_numbers(
    lines: Sequence[Line], random: float, told: str
) -> None:
    best = max(lines, key=lambda one: one.accuracy.mean)
    promised = {1: (best.method, best.accuracy)}
    base, full = {1: Score(random, None, None, 9)}, Score(0.9, 0.8, 1.0, 9)
    said = recommendation(lines, promised, base, full)
    assert told in said


def test_the_best_by_prediction_has_an_interval_of_its_own() -> None:
    """Two methods of pure noise: the one predicted higher is so by chance, and errs by more."""
    draw, noisy = np.random.default_rng(2), []
    for one in examples(24):
        scores = {f"m{n}": 0.6 + 0.1 * draw.normal() for n in range(6)}
        reached = {m: {1: {"accuracy": score, "auc": score}} for m, score in scores.items()}
        noisy.append(one._replace(reached=reached))
    known = Indicator(tuple(noisy), SEED, {}, "toy")
    name, found = known.best(measured(0.5), 1, known.methods())
    own = {m: known.predict(measured(0.5), m, 1, "accuracy") for m in known.methods()}
    assert name == max(own, key=lambda m: own[m].mean)
    assert found.mean == own[name].mean
    told = np.array([afar(noisy, SEED, m, 1, "accuracy") for m in own])
    reached_ = np.array([reached_by(noisy, m, 1, "accuracy") for m in own])
    errors = [abs(told[m, n] - reached_[m, n]) for n, m in enumerate(told.argmax(0))]
    half = sorted(errors)[19]  # ceil(0.8 x 25) = 20th of 24
    own_half = own[name].mean - (own[name].low or 0.0)
    assert found.mean - (found.low or 0.0) == pytest.approx(max(half, own_half))
    assert known.best(measured(0.5), 1, ["m3"]) == ("m3", own["m3"])
    with pytest.raises(UsageError, match="magic"):
        known.best(measured(0.5), 1, ["magic"])


@pytest.mark.slow
def test_measurements_read_no_test_image_and_repeat() -> None:
    splits = load("phantom:n=60,size=16")
    first = measure(splits.train, splits.val, sizes=(1, 40), draws=2, backbone="convnet-2-8")
    assert set(first["random"]) == {"1"}  # a class has 30 images
    again = measure(splits.train, splits.val, sizes=(1, 40), draws=2, backbone="convnet-2-8")
    assert {**first, "seconds": 0} == {**again, "seconds": 0}
    other = measure(splits.train, splits.val, sizes=(1,), draws=2, backbone="convnet-2-8", seed=1)
    assert other["random"] != first["random"]
    # Scored on the validation split: where its two classes change names, right becomes wrong.
    val = RealSet(splits.val.images, 1 - splits.val.labels, splits.val.card)
    turned = measure(splits.train, val, sizes=(1, 40), draws=2, backbone="convnet-2-8")
    for one, other in zip(
        first["random"]["1"]["accuracy"], turned["random"]["1"]["accuracy"], strict=True
    ):
        assert one + other == pytest.approx(1)
    # A set that lies in the map of a file is measured here, not by workers that copy it.
    held = load("phantom:n=60,size=16").train
    with mmap.mmap(-1, mmap.PAGESIZE) as file:
        mapped = copied(held, file=file)
        how: Any = {"sizes": (1, 40), "draws": 2, "backbone": "convnet-2-8"}
        there = measure(mapped, splits.val, engine=Nobody(), **how)
    assert {**first, "seconds": 0} == {**there, "seconds": 0}
    several = load("phantom:task=multi-label,n=60")
    with pytest.raises(UsageError, match="several labels"):
        measure(several.train, several.val)


@pytest.mark.slow
def test_the_command_line_predicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "indicator.json"
    path.write_text(json.dumps(to_json(fit(examples(9, noise=0.02), "toy"))))
    monkeypatch.setattr("medistill.measure.SIZES", (1, 2))
    words = ["predict", "phantom:n=60,size=16", "--ipc", "1", "--indicator", str(path)]
    result = CliRunner().invoke(app, [*words, "--json"])
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    (only,) = record["predictions"]
    assert only["method"] == "dm"
    assert 0 <= only["accuracy"]["low"] <= only["accuracy"]["mean"] <= only["accuracy"]["high"] <= 1
    shown = CliRunner().invoke(app, words).stdout
    assert "promises most" in shown
    for more, told in ((["--ipc", "0"], "--ipc 0"), (["--method", "mtt"], "found 0 datasets")):
        wrong = CliRunner().invoke(app, [*words, *more])
        assert wrong.exit_code == 2
        assert told in wrong.stderr


def test_predictions_stand_beside_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medistill.predict.measure", lambda *a, **k: measured(0.6))
    known: Indicator = fit(examples(12), "toy")
    splits = load("phantom:n=40")
    made = predict(splits.train, splits.val, ipc=[1], indicator=known)
    (only,) = made.lines
    assert made.random[1]["accuracy"].mean == pytest.approx(0.6)
    assert made.random[1]["accuracy"].low is not None
    assert only.gap_closed is not None
    assert only.gap_closed.mean == pytest.approx((0.68 - 0.6) / (0.95 - 0.6), abs=1e-5)
    assert "No dataset of the study is like this one" not in made.recommendation
    # The study has random images of one size alone, and the set is predicted above them.
    assert math.isinf(only.worth)
    wide = [
        one._replace(reached=one.reached | {"random": {**one.reached["random"], 10: ten(one)}})
        for one in examples(12)
    ]
    more = replace(known, examples=tuple(wide))
    (only,) = predict(splits.train, splits.val, ipc=[1], indicator=more).lines
    # Random images rise by 0.1 from one to ten.
    assert only.worth == pytest.approx(10**0.8, rel=1e-4)
    monkeypatch.setattr("medistill.predict.measure", lambda *a, **k: measured(0.6, classes=9))
    few = replace(more, chosen="ridge, few")
    strange = predict(splits.train, splits.val, ipc=[1], indicator=few).recommendation
    assert strange.endswith("is like this one (by classes): trust it less.")
    part = predict(splits.train, splits.val, ipc=[1, 21], indicator=known_at(21))
    assert {line.ipc for line in part.lines} == {1}
    assert "At 21 per class no set can be made: class " in part.recommendation
    with pytest.raises(RunRefused, match="has 20 training images; expected at least 21"):
        predict(splits.train, splits.val, ipc=[21], indicator=known_at(21))
    with pytest.raises(UsageError, match="at 7 per class"):
        predict(splits.train, splits.val, ipc=[7], indicator=known)
