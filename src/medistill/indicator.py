"""The indicator: from a small random sample of a dataset to what distillation would reach on it."""

import json
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .errors import DataError, UsageError, nearest
from .metrics import Score
from .records import Json, read_json

FORMAT = "medistill indicator 1"
SHIPPED = "indicator.json"
METRICS = ("accuracy", "auc")
SCORES = ("accuracy", "balanced_accuracy", "auc")
COVERAGE = 0.8
LEAST = 8  # datasets, below which nothing is fitted
FEWEST = 5  # of which a dataset that is left out is predicted: fewer say nothing of more numbers
SEED = "random accuracy alone"
BASELINES = ("random", "full")
Array = NDArray[np.float64]
Model = Callable[[Array, Array, Array], Array]


class Example(NamedTuple):
    """One dataset of a study: what was measured of it, and what was reached.

    `families` are the images that it is made of; `reached` is {method: {ipc: {metric: mean over
    seeds}}}, baselines too; of `full` the ipc is 0.
    """

    source: str
    families: tuple[str, ...]
    measured: Json
    reached: dict[str, dict[int, dict[str, float]]]


def inputs_of(measured: Json, ipc: int, metric: str) -> dict[str, float]:
    """Return the numbers that models may use for a budget, by name.

    random      mean score of random samples of that size, read from the curve
    curve_full  where the curve would end: its power law at all training images
    slope       gain of the score from the smallest sample to the largest, per factor of ten
    random_...  mean accuracy, balanced accuracy and AUC of random samples of that size
    and the logarithms of the numbers of classes and images, and the numbers of variation.

    Example:
        >>> one, ten = (dict.fromkeys(SCORES, values) for values in ([0.6, 0.8], [0.9]))
        >>> scores = {"1": one, "10": ten}
        >>> variation = {"fisher": 1.0, "modes": 2.0, "dimension_mle": 5.0, "majority": 0.5}
        >>> found = inputs_of({"random": scores, "variation": variation, "classes": 2,
        ...                    "train": 100}, 10, "auc")
        >>> found["random"], round(found["slope"], 6)
        (0.9, 0.2)
    """
    sizes, means = curve_of(measured, metric)
    each = measured["train"] / measured["classes"]
    varied = measured["variation"]
    spread = math.log10(sizes[-1] / sizes[0]) if len(sizes) > 1 else 1.0
    return {
        "random": curve_at(sizes, means, ipc or each),
        "curve_full": curve_at(sizes, means, each),
        "slope": (means[-1] - means[0]) / spread,
        **{f"random_{name}": _random(measured, name, ipc or each) for name in SCORES},
        "classes": math.log(measured["classes"]),
        "train": math.log(measured["train"]),
        "fisher": math.log(min(max(varied["fisher"], 1e-6), 1e6)),
        "dimension": math.log(min(max(varied["dimension_mle"], 1e-6), 1e6)),
        "modes": math.log(varied["modes"]),
        "majority": varied["majority"],
    }


def _random(measured: Json, metric: str, size: float) -> float:
    return curve_at(*curve_of(measured, metric), size)


def curve_of(measured: Json, metric: str) -> tuple[list[int], list[float]]:
    """Return the sizes of the random samples and the mean score of each."""
    sizes = sorted(int(size) for size in measured["random"])
    return sizes, [float(np.mean(measured["random"][str(size)][metric])) for size in sizes]


def curve_at(sizes: Sequence[int], means: Sequence[float], size: float) -> float:
    """Return the score at a size: between measured ones linear in log(size), beyond a power law.

    The power law is 1 - score = b size^-c through all points by least squares in logarithms, c at
    least 0, moved so that it meets the last point. Source: the usual form of learning curves, as
    in Figueroa et al., BMC Medical Informatics 2012, with its asymptote at a score of 1.

    Example:
        >>> curve_at([1, 100], [0.5, 0.7], 10)
        0.6
        >>> round(curve_at([1, 10], [0.0, 0.9], 100), 6)
        0.99
    """
    if size <= sizes[-1] or len(sizes) < 2:
        return round(float(np.interp(math.log(size), np.log(sizes), means)), 12)
    logs = np.log(np.asarray(sizes, dtype=np.float64))
    misses = np.log(np.clip(1 - np.asarray(means, dtype=np.float64), 1e-3, None))
    slope = min(0.0, float(np.polyfit(logs, misses, 1)[0]))
    return 1 - float(np.exp(misses[-1] + slope * (math.log(size) - logs[-1])))


def _line(known: Array, target: Array, new: Array) -> Array:
    from sklearn.linear_model import LinearRegression

    return np.asarray(LinearRegression().fit(known, target).predict(new))


def _ridge(known: Array, target: Array, new: Array) -> Array:
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-2, 3, 16)))
    return np.asarray(model.fit(known, target).predict(new))


def _process(known: Array, target: Array, new: Array) -> Array:
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, WhiteKernel
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    kernel = 1.0 * RBF(3.0, (0.5, 50)) + WhiteKernel(0.1, (1e-3, 1))
    model = make_pipeline(
        StandardScaler(), GaussianProcessRegressor(kernel, normalize_y=True, random_state=0)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return np.asarray(model.fit(known, target).predict(new))


# Candidates: which inputs they see, and how they predict.
FEW = ("random", "curve_full", "slope", "classes", "fisher")
SCORED = (*FEW, *(f"random_{name}" for name in SCORES))
MANY = (*FEW, "train", "dimension", "modes", "majority")
CANDIDATES: dict[str, tuple[tuple[str, ...], Model]] = {
    SEED: (("random",), _line),
    "learning curve": (("random", "curve_full"), _line),
    "ridge, few": (FEW, _ridge),
    "ridge, three scores": (SCORED, _ridge),
    "ridge, many": (MANY, _ridge),
    "Gaussian process": (FEW, _process),
}


@dataclass(frozen=True)
class Indicator:
    """Examples of a study and the candidate that did best on datasets left out."""

    examples: tuple[Example, ...]
    chosen: str
    report: Json
    about: str

    def measured(self) -> dict[str, Json]:
        """Return what was measured of each source."""
        return {one.source: one.measured for one in self.examples}

    def methods(self) -> list[str]:
        """Return the methods that the examples know, baselines left out."""
        return methods_of(self.examples)

    def budgets(self) -> list[int]:
        """Return the images per class that the examples know."""
        return budgets_of(self.examples)

    def knows(self, method: str, ipc: int) -> bool:
        """Say whether enough examples have the method at that budget."""
        return len(having(self.examples, method, ipc)) >= LEAST

    def check(self, method: str, ipc: int) -> None:
        """Refuse a method or budget that too few examples have.

        Raises: UsageError.
        """
        if not self.knows(method, ipc):
            raise UsageError(
                f"found {len(having(self.examples, method, ipc))} datasets with {method} at {ipc} "
                f"per class; expected {LEAST} or more: known methods are "
                f"{', '.join(self.methods())} at {', '.join(map(str, self.budgets()))}"
            )

    def predict(self, measured: Json, method: str, ipc: int, metric: str) -> Score:
        """Return the predicted score of a method on a dataset with its 80% interval.

        The interval is the conformal one of errors on examples whose families were left out: the
        prediction plus and minus the ceil(0.8 (n + 1))-th smallest absolute error, cut to [0, 1].
        Source: Barber et al., Annals of Statistics 2021 (jackknife), https://doi.org/10.1214/20-AOS1965.
        Departure: whole families are left out, for a new dataset belongs to none of them.
        Raises: UsageError when the examples do not know the method at that budget.
        """
        self.check(method, ipc)
        known = having(self.examples, method, ipc)
        names, model = CANDIDATES[self.chosen]
        table = table_of([one.measured for one in known], ipc, metric, names)
        new = table_of([measured], ipc, metric, names)
        target = reached_by(known, method, ipc, metric)
        value = float(np.clip(model(table, target, new)[0], 0, 1))
        half = conformal(np.abs(target - self._told(known, method, ipc, metric)))
        return Score(value, max(0.0, value - half), min(1.0, value + half), len(known))

    def best(self, measured: Json, ipc: int, methods: Sequence[str]) -> tuple[str, Score]:
        """Return which of some methods promises the highest accuracy, and what it promises.

        Who is best by prediction is so by its error too (on examples whose families were left out
        it fell short by 1 to 3 points on average). So the interval is the conformal one of the
        errors of whoever was predicted best there, and no narrower than the method's own.
        Raises: UsageError when the examples know none of the methods at that budget.
        """
        asked = [method for method in methods if self.knows(method, ipc)] or list(methods)
        means = [self.predict(measured, method, ipc, "accuracy").mean for method in asked]
        name, mean = max(zip(asked, means, strict=True), key=lambda pair: pair[1])
        known = [one for one in self.examples if all(ipc in one.reached.get(m, {}) for m in asked)]
        told = np.array([self._told(known, method, ipc, "accuracy") for method in asked])
        errors = np.abs(told - [reached_by(known, method, ipc, "accuracy") for method in asked])
        first = errors[told.argmax(0), np.arange(len(known))]
        half = max(conformal(first), conformal(errors[asked.index(name)]))
        return name, Score(mean, max(0.0, mean - half), min(1.0, mean + half), len(known))

    def gap(self, measured: Json, method: str, ipc: int, least: float) -> Score | None:
        """Return the predicted share of the gap from random images to all of them that is closed.

        (method - random) / (full - random) of predicted accuracies, with the conformal interval of
        that share on examples whose families were left out, as `predict` has it of scores; not cut,
        for a share may be negative or beyond 1. None where full data is predicted less than `least`
        above random images, or fewer than eight examples tell of such a gap.
        """
        arms = ((method, ipc), ("random", ipc), ("full", 0))
        if not all(self.knows(*arm) for arm in arms):
            return None
        own, base, top = (self.predict(measured, *arm, "accuracy").mean for arm in arms)
        known = [one for one in self.examples if all(i in one.reached.get(m, {}) for m, i in arms)]
        told = [self._told(known, *arm, "accuracy") for arm in arms]
        reached = [reached_by(known, *arm, "accuracy") for arm in arms]
        # Examples of which no share would be told, or which have none, say nothing of its error.
        there = (reached[2] - reached[1] >= least) & (told[2] - told[1] >= least)
        errors = np.abs(_share(*told) - _share(*reached))[there & np.isfinite(told[0])]
        if top - base < least or len(errors) < LEAST:
            return None
        value, half = float(_share(own, base, top)), conformal(errors)
        return Score(value, value - half, value + half, len(errors))

    def strange(self, measured: Json, ipc: int) -> list[str]:
        """Return the inputs in which a dataset lies outside all examples."""
        names = CANDIDATES[self.chosen][0]
        table = table_of([one.measured for one in self.examples], ipc, "accuracy", names)
        (new,) = table_of([measured], ipc, "accuracy", names)
        beyond = (new < table.min(0) - 1e-9) | (new > table.max(0) + 1e-9)
        return [name for name, out in zip(names, beyond.tolist(), strict=True) if out]

    def _told(self, known: Sequence[Example], method: str, ipc: int, metric: str) -> Array:
        """Return what `afar` gives, once: random images and full data stand beside each method."""
        key = (tuple(one.source for one in known), method, ipc, metric)
        if key not in self._remembered:
            self._remembered[key] = afar(known, self.chosen, method, ipc, metric)
        return self._remembered[key]

    @cached_property
    def _remembered(self) -> dict[tuple[tuple[str, ...], str, int, str], Array]:
        return {}


def _share(own: Any, random: Any, full: Any) -> Any:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.divide(own - random, full - random)


def afar(known: Sequence[Example], name: str, method: str, ipc: int, metric: str) -> Array:
    """Return what a candidate says of examples of which it saw none that shares a family."""
    inputs, model = CANDIDATES[name]
    table = table_of([one.measured for one in known], ipc, metric, inputs)
    target = reached_by(known, method, ipc, metric)
    return left_out(model, table, target, [one.families for one in known])


def reached_by(known: Sequence[Example], method: str, ipc: int, metric: str) -> Array:
    """Return what a method reached on examples that know it."""
    return np.array([one.reached[method][ipc][metric] for one in known])


def methods_of(examples: Sequence[Example]) -> list[str]:
    """Return the methods that examples know, baselines left out."""
    names = dict.fromkeys(name for one in examples for name in one.reached)
    return [name for name in names if name not in BASELINES]


def budgets_of(examples: Sequence[Example]) -> list[int]:
    """Return the images per class at which examples know a method."""
    names = methods_of(examples)
    return sorted({ipc for one in examples for name in names for ipc in one.reached.get(name, {})})


def having(examples: Sequence[Example], method: str, ipc: int) -> list[Example]:
    """Return the examples that know a method at a budget."""
    return [one for one in examples if ipc in one.reached.get(method, {})]


def table_of(measured: Sequence[Json], ipc: int, metric: str, names: Sequence[str]) -> Array:
    """Return the inputs of some names [datasets, names] that models fit and predict from."""
    found = [inputs_of(one, ipc, metric) for one in measured]
    return np.array([[one[name] for name in names] for one in found])


def left_out(
    model: Model,
    table: Array,
    target: Array,
    families: Sequence[Collection[str]] = (),
    *,
    clip: bool = True,
) -> Array:
    """Return the prediction of each dataset by a model that saw none that shares a family with it.

    Without families each dataset is one of its own. nan where fewer than five others are left.
    Scores are clipped to [0, 1]; other targets are not.
    """
    mine = [frozenset(one) for one in families] or [frozenset([str(i)]) for i in range(len(target))]
    found = np.full(len(target), math.nan)
    for one in dict.fromkeys(mine):
        rest = np.array([not (one & other) for other in mine])
        asked = np.array([other == one for other in mine])
        if rest.sum() >= FEWEST:
            found[asked] = model(table[rest], target[rest], table[asked])
    return np.clip(found, 0, 1) if clip else found


def conformal(errors: Array, coverage: float = COVERAGE) -> float:
    """Return the ceil(coverage (n + 1))-th smallest of n absolute errors; the largest if n is less.

    Errors that are not known are passed over; without any the answer is infinite.

    Example:
        >>> conformal(np.array([0.4, 0.1, 0.2, 0.3]))
        0.4
    """
    errors = errors[np.isfinite(errors)]
    place = min(len(errors), math.ceil(coverage * (len(errors) + 1)))
    return float(np.sort(errors)[place - 1]) if place else math.inf


def to_json(indicator: Indicator) -> Json:
    """Return the indicator as JSON: examples, choice and report."""
    return {
        "format": FORMAT,
        "about": indicator.about,
        "chosen": indicator.chosen,
        "report": indicator.report,
        "examples": [one._asdict() for one in indicator.examples],
    }


def from_json(record: Any, where: str) -> Indicator:
    """Read what `to_json` wrote.

    Raises: DataError when it is something else.
    """
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise DataError(f"{where} is no indicator; expected {FORMAT}")
    try:
        examples = tuple(
            Example(
                one["source"],
                tuple(one["families"]),
                one["measured"],
                {m: {int(i): s for i, s in by.items()} for m, by in one["reached"].items()},
            )
            for one in record["examples"]
        )
        chosen = record["chosen"]
        if chosen not in CANDIDATES:
            raise UsageError(f"found candidate {chosen!r}: {nearest(chosen, CANDIDATES)}")
        return Indicator(examples, chosen, record["report"], record["about"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{where} is damaged ({error!r}); expected a whole indicator") from None


def load_indicator(path: Path | None = None) -> Indicator:
    """Return the indicator of a file, or the one that is shipped.

    Raises: DataError when the file is none, or none is shipped.
    """
    if path is not None:
        return from_json(read_json(path), str(path))
    shipped = files(__package__).joinpath(SHIPPED)
    if not shipped.is_file():
        raise DataError("found no shipped indicator; expected --indicator FILE of fit-indicator")
    return from_json(json.loads(shipped.read_text(encoding="utf-8")), SHIPPED)
