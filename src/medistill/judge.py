"""Which indicator is best: candidates judged on datasets that they have not seen."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .engine import Engine, Here
from .errors import RunRefused
from .indicator import (
    CANDIDATES,
    LEAST,
    METRICS,
    SEED,
    Array,
    Example,
    Indicator,
    Model,
    budgets_of,
    conformal,
    having,
    left_out,
    methods_of,
    table_of,
)
from .records import Json
from .rng import Rng

PERMUTATIONS = 9999
HERE: Engine = Here()


def fit(examples: Sequence[Example], about: str, engine: Engine = HERE) -> Indicator:
    """Compare the candidates on datasets left out, and keep the one with the least error.

    The report holds of each candidate, by metric: mean absolute `error` of the score over all
    datasets, methods and budgets; `budgets`, what stands at one number of images per class (means
    over methods); `methods`, the error of each method at each; `pooled_pearson` and
    `pooled_spearman` over all budgets at once, which easy datasets and large budgets make high;
    `p_value`, how often datasets that have changed places would correlate as well; `p_better`, how
    often flipped signs would make it beat the random score alone by as much.
    Raises: RunRefused when fewer than eight datasets are known.
    """
    usable = [one for one in examples if methods_of([one])]
    if len(usable) < LEAST:
        raise RunRefused(
            f"found {len(usable)} datasets with measurements and results; expected {LEAST} or "
            "more: run more of the study"
        )
    jobs = [(metric, name) for metric in METRICS for name in CANDIDATES]
    found = dict(zip(jobs, engine.map(partial(_judged, usable), jobs), strict=True))
    report: Json = {metric: {} for metric in METRICS}
    for (metric, name), (judged, told) in found.items():
        report[metric][name] = judged | _tested(told, found[metric, SEED][1])
    chosen = min(CANDIDATES, key=lambda name: report["accuracy"][name]["error"])
    return Indicator(tuple(usable), chosen, report, about)


class Told(NamedTuple):
    """What a candidate said of datasets that it had not seen, and what was reached there.

    Shapes: told, reached [datasets, methods, budgets], nan where nothing is known.
    """

    told: Array
    reached: Array


def predictions_of(examples: Sequence[Example], name: str, metric: str) -> Told:
    """Return the predictions of a candidate, each dataset by the others alone."""
    methods, budgets = methods_of(examples), budgets_of(examples)
    shape = (len(examples), len(methods), len(budgets))
    found = Told(np.full(shape, math.nan), np.full(shape, math.nan))
    inputs, model = CANDIDATES[name]
    for m, method in enumerate(methods):
        for b, ipc in enumerate(budgets):
            known = having(examples, method, ipc)
            if len(known) < LEAST:
                continue
            at = [i for i, one in enumerate(examples) if ipc in one.reached.get(method, {})]
            table = table_of([one.measured for one in known], ipc, metric, inputs)
            target = targets_of(known, method, ipc, metric)["score"]
            found.told[at, m, b] = left_out(model, table, target)
            found.reached[at, m, b] = target
    return found


def best_of(examples: Sequence[Example]) -> str:
    """Return the candidate whose accuracies err least on datasets left out."""

    def error(name: str) -> float:
        found = predictions_of(examples, name, "accuracy")
        errors = np.abs(found.told - found.reached)
        return float(np.nanmean(errors)) if np.isfinite(errors).any() else math.inf

    return min(CANDIDATES, key=error)


def targets_of(known: Sequence[Example], method: str, ipc: int, metric: str) -> dict[str, Array]:
    """Return what was reached: the score, its gain over random images, its share of full data's.

    Gain and share are left out where a dataset has no random images of that number, or no full
    data. The random images are those of the study's table: none of them was measured.
    """
    score = np.array([one.reached[method][ipc][metric] for one in known])
    found = {"score": score}
    if all(ipc in one.reached.get("random", {}) for one in known):
        found["gain"] = score - [one.reached["random"][ipc][metric] for one in known]
    if all("full" in one.reached for one in known):
        found["share"] = score / [one.reached["full"][0][metric] for one in known]
    return found


def _judged(examples: Sequence[Example], job: tuple[str, str]) -> tuple[Json, Told]:
    """Return what one candidate does, leave one dataset out: at each budget, and pooled."""
    metric, name = job
    inputs, model = CANDIDATES[name]
    found = predictions_of(examples, name, metric)
    by_budget: dict[str, Json] = {}
    for ipc in budgets_of(examples):
        parts: dict[str, list[float]] = {}
        for method in methods_of(examples):
            known = having(examples, method, ipc)
            if len(known) < LEAST:
                continue
            table = table_of([one.measured for one in known], ipc, metric, inputs)
            targets = targets_of(known, method, ipc, metric)
            families = [one.family for one in known]
            judged = _one(model, table, targets, families)
            for what, value in judged.items():
                parts.setdefault(what, []).append(value)
        if parts:
            by_budget[str(ipc)] = {what: float(np.mean(values)) for what, values in parts.items()}
    there = np.isfinite(found.told)
    told, reached = found.told[there], found.reached[there]
    judged = {
        "error": float(np.abs(told - reached).mean()) if len(told) else math.inf,
        "budgets": by_budget,
        "methods": _by_method(examples, found),
        "pooled_pearson": _correlated(told, reached, "pearsonr"),
        "pooled_spearman": _correlated(told, reached, "spearmanr"),
    }
    return judged, found


def _by_method(examples: Sequence[Example], found: Told) -> Json:
    """Return the error of each method at each number of images per class that is known."""
    errors = np.abs(found.told - found.reached)
    told: Json = {}
    for m, method in enumerate(methods_of(examples)):
        for b, ipc in enumerate(budgets_of(examples)):
            if np.isfinite(errors[:, m, b]).any():
                told.setdefault(method, {})[str(ipc)] = float(np.nanmean(errors[:, m, b]))
    return told


def _one(model: Model, table: Array, targets: dict[str, Array], families: Sequence[str]) -> Json:
    score = targets["score"]
    judged: Json = {
        "family_error": float(np.abs(left_out(model, table, score, families) - score).mean()),
        "coverage": coverage_of(model, table, score),
        "datasets": len(score),
    }
    for what, target in targets.items():
        found = left_out(model, table, target, clip=what == "score")
        before = "" if what == "score" else f"{what}_"
        judged[f"{before}error"] = float(np.abs(found - target).mean())
        judged[f"{before}spearman"] = _correlated(found, target, "spearmanr")
        judged[f"{before}pearson"] = _correlated(found, target, "pearsonr")
    return judged


def _correlated(one: Array, other: Array, how: Literal["pearsonr", "spearmanr"]) -> float:
    """Return a correlation; 0 where one side does not vary, so that nothing was told."""
    from scipy import stats

    if len(one) < 3 or np.ptp(one) < 1e-12 or np.ptp(other) < 1e-12:
        return 0.0
    return float(getattr(stats, how)(one, other).statistic)


def coverage_of(model: Model, table: Array, target: Array) -> float:
    """Return the share of datasets inside the interval that the others alone would give."""
    inside = 0
    for out in range(len(target)):
        rest = np.arange(len(target)) != out
        half = conformal(np.abs(target[rest] - left_out(model, table[rest], target[rest])))
        value = np.clip(model(table[rest], target[rest], table[out : out + 1])[0], 0, 1)
        inside += abs(value - target[out]) <= half
    return inside / len(target)


def _tested(found: Told, seed: Told) -> Json:
    return {
        "p_value": permuted(found.told, found.reached),
        "p_better": flipped(np.abs(found.told - found.reached), np.abs(seed.told - seed.reached)),
    }


def permuted(told: Array, reached: Array, times: int = PERMUTATIONS) -> float:
    """Return how often datasets that change places correlate as well as they stand.

    p = (1 + number of permutations whose statistic is as large) / (1 + permutations); the statistic
    is the mean Spearman correlation over methods and budgets, each over its datasets, and one
    permutation of datasets serves all of them. What was told without a dataset leans away from what
    it reached where there is nothing to tell, so the test errs to large p.
    Shapes: told, reached [datasets, ...], nan where nothing is known.
    """
    crossed = np.zeros((len(told), len(told)))
    for one, other in zip(*map(_columns, (told, reached)), strict=True):
        there = np.isfinite(one) & np.isfinite(other)
        crossed += np.outer(_ranks(one, there), _ranks(other, there))
    if not crossed.any():
        return 1.0
    places, draw = np.arange(len(told)), np.random.default_rng(Rng(0).integer("permutations"))
    least = np.trace(crossed) - 1e-12
    count = sum(crossed[draw.permutation(places), places].sum() >= least for _ in range(times))
    return float((1 + count) / (1 + times))


def _columns(values: Array) -> Array:
    return values.reshape(len(values), -1).T


def _ranks(values: Array, there: NDArray[np.bool_]) -> Array:
    """Return centered ranks of norm 1, 0 where nothing is known or nothing varies."""
    from scipy.stats import rankdata

    ranks = np.zeros(len(values))
    if there.any():
        ranks[there] = rankdata(values[there])
        ranks[there] -= ranks[there].mean()
    return ranks / max(float(np.linalg.norm(ranks)), 1e-12)


def flipped(errors: Array, others: Array, times: int = PERMUTATIONS) -> float:
    """Return how often chance alone would make the errors smaller than the others by as much.

    A sign-flip test over datasets of the mean difference (others - errors): under the null either
    sign of a dataset's difference is as likely. p as in `permuted`; 1 where they are the same.
    Shapes: errors, others [datasets, ...], nan where nothing is known.
    """
    gain = (others - errors).reshape(len(errors), -1)
    known = np.isfinite(gain).any(1)
    if not known.any():
        return 1.0
    gain = np.nanmean(gain[known], 1)
    if not np.abs(gain).max() > 0:
        return 1.0
    signs = np.random.default_rng(Rng(0).integer("signs")).choice([-1.0, 1.0], (times, len(gain)))
    count = int((signs @ gain >= gain.sum() - 1e-12).sum())
    return float((1 + count) / (1 + times))
