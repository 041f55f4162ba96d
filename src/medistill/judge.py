"""Which indicator is best: candidates judged on datasets that they have not seen."""

import itertools
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .engine import Engine, Here
from .errors import RunRefused
from .indicator import (
    CANDIDATES,
    FEWEST,
    LEAST,
    METRICS,
    SEED,
    Array,
    Example,
    Indicator,
    Model,
    afar,
    budgets_of,
    conformal,
    having,
    left_out,
    methods_of,
    reached_by,
    table_of,
)
from .plan import Study
from .records import Json
from .rng import Rng

PERMUTATIONS = 9999
BY_METHOD = ("error", "spearman", "gain_spearman")
HERE: Engine = Here()


def examples_of(
    study: Study, rows: Sequence[Mapping[str, Any]], measured: Mapping[str, Json]
) -> list[Example]:
    """Return the examples that a study's rows and measurements give, one for each source.

    Rows of its first backbone count, with which the measurements stand.
    """
    rows = [row for row in rows if row["backbone"] == study.backbones[0]]
    families = {one.title: one.families for one in study.sources}
    sums: dict[tuple[str, str, int], dict[str, list[float]]] = {}
    for row in rows:
        ipc = 0 if row["method"] == "full" else int(row["ipc"])
        mine = sums.setdefault((row["source"], row["method"], ipc), {})
        for metric in METRICS:
            mine.setdefault(metric, []).append(float(row[metric]))
    found = []
    for source, numbers in measured.items():
        reached: dict[str, dict[int, dict[str, float]]] = {}
        for (name, method, ipc), scores in sums.items():
            if name == source:
                means = {metric: float(np.mean(values)) for metric, values in scores.items()}
                reached.setdefault(method, {})[ipc] = means
        found.append(Example(source, families[source], numbers, reached))
    return found


def fit(examples: Sequence[Example], about: str, engine: Engine = HERE) -> Indicator:
    """Compare the candidates on datasets left out, and keep the one with the least error.

    The least is of errors with whole families left out. The report holds of each candidate, by
    metric: mean absolute `error` of the score over all methods and budgets where one dataset is
    left out, and `family_error` where all that share a family with it are; `budgets`, what stands
    at one number of images per class (means over methods); `methods`, error and rank correlation of
    each method at each; `pooled_pearson` and `pooled_spearman` over all budgets at once, which easy
    datasets and large budgets make high; `p_value`, how often datasets that have changed places
    would correlate as well; `p_better`, how often flipped signs of families would make it beat the
    random score alone by as much. A correlation of a candidate of one number is that number's own:
    a line that was fitted without a dataset leans away from it where there is little to tell.
    Raises: RunRefused when fewer than eight datasets are known of every method and budget.
    """
    usable = [one for one in examples if methods_of([one])]
    most = max(
        (len(having(usable, m, ipc)) for m in methods_of(usable) for ipc in budgets_of(usable)),
        default=0,
    )
    if most < LEAST:
        raise RunRefused(
            f"found {most} datasets with measurements and results of one method and budget; "
            f"expected {LEAST} or more: run more of the study"
        )
    if not np.isfinite(predictions_of(usable, SEED, "accuracy").afar).any():
        raise RunRefused(
            "found datasets of one family alone; expected some that are made of other images, so "
            "that whole families can be left out: add sources, or correct their `family`"
        )
    jobs = [(metric, name) for metric in METRICS for name in CANDIDATES]
    found = dict(zip(jobs, engine.map(partial(_judged, usable), jobs), strict=True))
    report: Json = {metric: {} for metric in METRICS}
    families = [one.families for one in usable]
    for (metric, name), (judged, told) in found.items():
        report[metric][name] = judged | _tested(told, found[metric, SEED][1], families)
    chosen = min(CANDIDATES, key=lambda name: report["accuracy"][name]["family_error"])
    return Indicator(tuple(usable), chosen, report, about)


class Told(NamedTuple):
    """What a candidate said of datasets that it had not seen, and what was reached there.

    `afar` is what it said where no dataset that shares a family had been seen either.
    Shapes: told, afar, reached [datasets, methods, budgets], nan where nothing is known.
    """

    told: Array
    afar: Array
    reached: Array

    def errors(self, *, afar: bool) -> Array:
        """Return the absolute errors."""
        return np.abs((self.afar if afar else self.told) - self.reached)


def predictions_of(examples: Sequence[Example], name: str, metric: str) -> Told:
    """Return the predictions of a candidate, each dataset by others alone."""
    methods, budgets = methods_of(examples), budgets_of(examples)
    shape = (len(examples), len(methods), len(budgets))
    found = Told(*(np.full(shape, math.nan) for _ in Told._fields))
    inputs, model = CANDIDATES[name]
    for m, method in enumerate(methods):
        for b, ipc in enumerate(budgets):
            known = having(examples, method, ipc)
            if len(known) < LEAST:
                continue
            at = [i for i, one in enumerate(examples) if ipc in one.reached.get(method, {})]
            table = table_of([one.measured for one in known], ipc, metric, inputs)
            target = reached_by(known, method, ipc, metric)
            found.told[at, m, b] = left_out(model, table, target)
            found.afar[at, m, b] = afar(known, name, method, ipc, metric)
            found.reached[at, m, b] = target
    return found


def best_of(examples: Sequence[Example]) -> str:
    """Return the candidate whose accuracies err least on datasets whose families were left out."""
    return min(
        CANDIDATES,
        key=lambda name: _mean(predictions_of(examples, name, "accuracy").errors(afar=True)),
    )


def _mean(errors: Array) -> float:
    """Return the mean of what is known; infinite where nothing is."""
    return float(np.nanmean(errors)) if np.isfinite(errors).any() else math.inf


def targets_of(known: Sequence[Example], method: str, ipc: int, metric: str) -> dict[str, Array]:
    """Return what was reached: the score, its gain over random images, its share of full data's.

    Gain and share are left out where a dataset has no random images of that number, or no full
    data. The random images are those of the study's table, drawn apart from those measured.
    """
    score = reached_by(known, method, ipc, metric)
    found = {"score": score}
    if all(ipc in one.reached.get("random", {}) for one in known):
        found["gain"] = score - reached_by(known, "random", ipc, metric)
    if all("full" in one.reached for one in known):
        found["share"] = score / reached_by(known, "full", 0, metric)
    return found


def _judged(examples: Sequence[Example], job: tuple[str, str]) -> tuple[Json, Told]:
    """Return what one candidate does, leave one dataset out: at each budget, and pooled."""
    metric, name = job
    inputs, model = CANDIDATES[name]
    found = predictions_of(examples, name, metric)
    by_budget: dict[str, Json] = {}
    by_method: dict[str, Json] = {}
    for ipc in budgets_of(examples):
        parts: dict[str, list[float]] = {}
        for method in methods_of(examples):
            known = having(examples, method, ipc)
            if len(known) < LEAST:
                continue
            table = table_of([one.measured for one in known], ipc, metric, inputs)
            targets = targets_of(known, method, ipc, metric)
            judged = _one(model, table, targets, [one.families for one in known])
            by_method.setdefault(method, {})[str(ipc)] = {
                name: judged[name] for name in BY_METHOD if name in judged
            }
            for what, value in judged.items():
                parts.setdefault(what, []).append(value)
        if parts:
            by_budget[str(ipc)] = {what: _known_mean(values) for what, values in parts.items()}
    there = np.isfinite(found.told)
    told, reached = found.told[there], found.reached[there]
    judged = {
        "error": _mean(found.errors(afar=False)),
        "family_error": _mean(found.errors(afar=True)),
        "budgets": by_budget,
        "methods": by_method,
        "pooled_pearson": _correlated(told, reached, "pearsonr"),
        "pooled_spearman": _correlated(told, reached, "spearmanr"),
    }
    return judged, found


def _known_mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _one(
    model: Model, table: Array, targets: dict[str, Array], families: Sequence[Sequence[str]]
) -> Json:
    score = targets["score"]
    afar = np.abs(left_out(model, table, score, families) - score)
    judged: Json = {
        "family_error": _mean(afar) if np.isfinite(afar).any() else None,
        "coverage": coverage_of(model, table, score, families),
        "datasets": len(score),
    }
    for what, target in targets.items():
        found = left_out(model, table, target, clip=what == "score")
        before = "" if what == "score" else f"{what}_"
        judged[f"{before}error"] = float(np.abs(found - target).mean())
        said = table[:, 0] if table.shape[1] == 1 else found
        judged[f"{before}spearman"] = _correlated(said, target, "spearmanr")
        judged[f"{before}pearson"] = _correlated(said, target, "pearsonr")
    return judged


def _correlated(one: Array, other: Array, how: Literal["pearsonr", "spearmanr"]) -> float:
    """Return a correlation; 0 where one side does not vary, so that nothing was told."""
    from scipy import stats

    if len(one) < 3 or np.ptp(one) < 1e-12 or np.ptp(other) < 1e-12:
        return 0.0
    return float(getattr(stats, how)(one, other).statistic)


def coverage_of(
    model: Model, table: Array, target: Array, families: Sequence[Sequence[str]]
) -> float | None:
    """Return the share of datasets inside the interval that other families alone would give.

    None where no dataset has others enough.
    """
    mine = [frozenset(one) for one in families]
    inside = []
    for out, own in enumerate(mine):
        rest = np.array([not (own & other) for other in mine])
        if rest.sum() < FEWEST:
            continue
        others = [one for one, there in zip(mine, rest, strict=True) if there]
        errors = np.abs(target[rest] - left_out(model, table[rest], target[rest], others))
        half = conformal(errors)
        if math.isfinite(half):
            value = np.clip(model(table[rest], target[rest], table[out : out + 1])[0], 0, 1)
            inside.append(abs(value - target[out]) <= half)
    return float(np.mean(inside)) if inside else None


def _tested(found: Told, seed: Told, families: Sequence[Sequence[str]]) -> Json:
    mine, other = found.errors(afar=True), seed.errors(afar=True)
    return {
        "p_value": permuted(found.told, found.reached),
        "p_better": flipped(mine, other, groups=families),
        "p_better_at": [
            flipped(mine[..., b], other[..., b], groups=families) for b in range(mine.shape[-1])
        ],
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


def apart(families: Sequence[Sequence[str]]) -> list[str]:
    """Return the families of datasets that are made of one alone, each once."""
    return sorted({names[0] for names in families if len(names) == 1})


def flipped(
    errors: Array,
    others: Array,
    times: int = PERMUTATIONS,
    groups: Sequence[Sequence[str]] = (),
) -> float:
    """Return how often chance alone would make the errors smaller than the others by as much.

    A sign-flip test over datasets of the mean difference (others - errors): under the null either
    sign of a dataset's difference is as likely. Datasets of one group (family) keep one sign, for
    they are not independent, and those of several are left out, for they would tie all together.
    All flips are made where they are fewer than `times`, which gives the exact p; else p is as in
    `permuted`. 1 where errors and others are the same, or nothing is known.
    Shapes: errors, others [datasets, ...], nan where nothing is known.
    """
    gain = (others - errors).reshape(len(errors), -1)
    known = np.isfinite(gain).any(1)
    if groups:
        known = known & np.array([len(names) == 1 for names in groups])
    if not known.any():
        return 1.0
    gain = np.nanmean(gain[known], 1)
    if groups:
        own = np.array([groups[place][0] for place in np.flatnonzero(known).tolist()])
        gain = np.array([gain[own == name].sum() for name in np.unique(own)])
    if not np.abs(gain).max() > 0:
        return 1.0
    least = gain.sum() - 1e-12
    if 2 ** len(gain) <= times:
        every = np.array(list(itertools.product([1.0, -1.0], repeat=len(gain))))
        return float((every @ gain >= least).mean())
    signs = np.random.default_rng(Rng(0).integer("signs")).choice([-1.0, 1.0], (times, len(gain)))
    return float((1 + int((signs @ gain >= least).sum())) / (1 + times))
