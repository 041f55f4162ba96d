"""Is distillation worth it here? An answer from a small random sample, before any distillation."""

import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from .engine import Engine, Here
from .errors import RunRefused
from .indicator import METRICS, Indicator, curve_at, curve_of, load_indicator
from .measure import measure
from .metrics import Score, worth
from .records import Json
from .sets import RealSet

HERE: Engine = Here()
CLEAR = 0.01  # of accuracy: less than that is no gap to close


@dataclass(frozen=True)
class Line:
    """What is predicted of one method at one budget; intervals hold 80% of the time."""

    method: str
    ipc: int
    accuracy: Score
    auc: Score
    gap_closed: Score | None
    worth: float


@dataclass(frozen=True)
class Prediction:
    """What is predicted of a dataset, what was measured, and what to do, in words.

    `best` is which method promises most at a budget, with the interval of `Indicator.best`.
    """

    lines: tuple[Line, ...]
    best: dict[int, tuple[str, Score]]
    random: dict[int, dict[str, Score]]
    full: dict[str, Score]
    recommendation: str
    measured: Json
    about: str
    seconds: float

    def record(self, source: str) -> Json:
        """Return the JSON form."""
        return {
            "source": source,
            "predictions": [
                # JSON knows no infinity: null where the curve does not reach the score.
                dataclasses.asdict(line) | {"worth": line.worth if line.worth < math.inf else None}
                for line in self.lines
            ],
            "best": {
                str(ipc): {"method": method, "accuracy": dataclasses.asdict(found)}
                for ipc, (method, found) in self.best.items()
            },
            "random": {
                str(ipc): {name: dataclasses.asdict(found) for name, found in scores.items()}
                for ipc, scores in self.random.items()
            },
            "full": {name: dataclasses.asdict(found) for name, found in self.full.items()},
            "recommendation": self.recommendation,
            "measured": self.measured,
            "indicator": self.about,
            "seconds": round(self.seconds, 3),
        }


def predict(
    train: RealSet,
    val: RealSet,
    *,
    ipc: Sequence[int],
    indicator: Indicator | None = None,
    methods: Sequence[str] = (),
    seed: int = 0,
    engine: Engine = HERE,
) -> Prediction:
    """Measure small random samples of a dataset and predict what each method would reach.

    Random images and full data are predicted like the methods, so that all are test scores of the
    study's own student and lengths (see `Indicator.about`), not of the papers'. `gap_closed` is
    that of `Indicator.gap`; None where full data is predicted within 0.01 of random images. `worth`
    is how many random images per class would reach the predicted accuracy, by their predictions at
    all sizes that the study has; infinite beyond the largest. Budgets that a class cannot fill are
    left out, and that is said.
    Raises: UsageError when the data has several labels of an image, or the indicator does not know
    a method or budget; RunRefused when a class has too few images for all of them; DataError when
    no indicator is there.
    """
    begin = time.monotonic()
    known = indicator or load_indicator()
    for each in ipc:
        for method in methods:
            known.check(method, each)
        if not any(known.knows(method, each) for method in known.methods()):
            known.check(known.methods()[0], each)
    ipc, too_many = _that_fit(train, ipc)
    measured = measure(train, val, seed=seed, engine=engine)
    random = {each: _random(known, measured, each) for each in ipc}
    full = {name: known.predict(measured, "full", 0, name) for name in METRICS}
    curve = _curve(known, measured)
    lines = []
    for each in ipc:
        for method in methods or known.methods():
            if not known.knows(method, each):
                continue
            scores = {name: known.predict(measured, method, each, name) for name in METRICS}
            gap = known.gap(measured, method, each, CLEAR)
            value = worth(scores["accuracy"].mean, *curve)
            lines.append(Line(method, each, scores["accuracy"], scores["auc"], gap, value))
    accuracy = {each: scores["accuracy"] for each, scores in random.items()}
    best = {each: known.best(measured, each, methods or known.methods()) for each in ipc}
    told = recommendation(lines, best, accuracy, full["accuracy"])
    if too_many:
        told += f" {too_many}"
    if strange := sorted({name for each in ipc for name in known.strange(measured, each)}):
        told += (
            f" No dataset of the study is like this one (by {', '.join(strange)}): trust it less."
        )
    spent = time.monotonic() - begin
    return Prediction(tuple(lines), best, random, full, told, measured, known.about, spent)


def _that_fit(train: RealSet, ipc: Sequence[int]) -> tuple[list[int], str]:
    """Return the budgets that every class can fill, and a sentence on the others."""
    sizes = [len(members) for members in train.by_class]
    least = min(sizes)
    fit = [each for each in ipc if each <= least]
    told = f"class {train.card.classes[sizes.index(least)]!r} has {least} training images"
    if not fit:
        raise RunRefused(f"found that {told}; expected at least {min(ipc)}: ask for fewer by --ipc")
    beyond = ", ".join(str(each) for each in ipc if each > least)
    return fit, f"At {beyond} per class no set can be made: {told}." if beyond else ""


def _random(known: Indicator, measured: Json, ipc: int) -> dict[str, Score]:
    """Return what random images would score; as measured where the study has none of that size."""
    if known.knows("random", ipc):
        return {name: known.predict(measured, "random", ipc, name) for name in METRICS}
    found = {name: curve_at(*curve_of(measured, name), ipc) for name in METRICS}
    return {name: Score(value, None, None, 0) for name, value in found.items()}


def _curve(known: Indicator, measured: Json) -> tuple[list[int], list[float]]:
    """Return the sizes of random images that the study has, and their accuracies."""
    sizes = sorted({size for one in known.examples for size in one.reached.get("random", {})})
    sizes = [size for size in sizes if known.knows("random", size)]
    if not sizes:
        return curve_of(measured, "accuracy")
    means = [known.predict(measured, "random", size, "accuracy").mean for size in sizes]
    return sizes, means


def recommendation(
    lines: Sequence[Line],
    best: dict[int, tuple[str, Score]],
    random: dict[int, Score],
    full: Score,
) -> str:
    """Say in words what the predictions mean, budget by budget."""
    told = []
    for ipc, (method, accuracy) in best.items():
        line = next(one for one in lines if (one.method, one.ipc) == (method, ipc))
        base, value = random[ipc].mean, accuracy.mean
        low, high = (
            end if known is None else known
            for end, known in ((0.0, accuracy.low), (1.0, accuracy.high))
        )
        said = (
            f"At {ipc} per class {method} promises most: {100 * value:.0f}% "
            f"(80% interval {100 * low:.0f} to "
            f"{100 * high:.0f}), where random images give {100 * base:.0f}% "
            f"and all images about {100 * full.mean:.0f}%."
        )
        if (1 if full.high is None else full.high) - base < CLEAR:
            said += " Random images do as well as all of them: there is nothing to distill."
        elif full.mean - base < CLEAR:
            said += (
                " All images are hardly expected to do better than random ones, within the error "
                "of the prediction: train on random images first."
            )
        elif value <= base:
            said += " No method is expected to beat random images: raise the budget."
        elif low <= base:
            said += " The gain is likely but not sure: distill and evaluate before you rely on it."
        else:
            count = f"about {line.worth:.0f}"
            if math.isinf(line.worth):
                count = "more than the study has"
            said += f" It pays: the set would be worth {count} random images per class."
        told.append(said)
    return " ".join(told)
