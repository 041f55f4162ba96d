"""Is distillation worth it here? An answer from a small random sample, before any distillation."""

import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from .engine import Engine, Here
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
    """What is predicted of a dataset, what was measured, and what to do, in words."""

    lines: tuple[Line, ...]
    random: dict[int, dict[str, float]]
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
            "random": {str(ipc): scores for ipc, scores in self.random.items()},
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

    gap closed = (predicted - random) / (predicted full - random), random read from the samples'
    curve; None where full data is predicted within 0.01 of random. `worth` is how many random
    images per class that curve would need for the predicted accuracy. Scores are of the study's own
    student and lengths (see `Indicator.about`), not of the papers'.
    Raises: UsageError when the data has several labels of an image, or the indicator does not know
    a method or budget; DataError when no indicator is there.
    """
    begin = time.monotonic()
    known = indicator or load_indicator()
    for each in ipc:
        for method in methods or known.methods()[:1]:
            known.check(method, each)
    measured = measure(train, val, seed=seed, engine=engine)
    curves = {name: curve_of(measured, name) for name in METRICS}
    random = {each: {name: curve_at(*curves[name], each) for name in METRICS} for each in ipc}
    full = {name: known.predict(measured, "full", 0, name) for name in METRICS}
    lines = []
    for each in ipc:
        for method in methods or known.methods():
            if not known.knows(method, each):
                continue
            scores = {name: known.predict(measured, method, each, name) for name in METRICS}
            base, top = random[each]["accuracy"], full["accuracy"].mean
            gap = _gap(scores["accuracy"], base, top)
            value = worth(scores["accuracy"].mean, *curves["accuracy"])
            lines.append(Line(method, each, scores["accuracy"], scores["auc"], gap, value))
    told = recommendation(lines, random, full["accuracy"])
    spent = time.monotonic() - begin
    return Prediction(tuple(lines), random, full, told, measured, known.about, spent)


def _gap(found: Score, random: float, full: float) -> Score | None:
    if full - random < CLEAR or found.low is None or found.high is None:
        return None

    def closed(value: float) -> float:
        return (value - random) / (full - random)

    return Score(closed(found.mean), closed(found.low), closed(found.high), found.n)


def recommendation(lines: Sequence[Line], random: dict[int, dict[str, float]], full: Score) -> str:
    """Say in words what the predictions mean, budget by budget."""
    told = []
    for ipc in dict.fromkeys(line.ipc for line in lines):
        mine = [line for line in lines if line.ipc == ipc]
        best = max(mine, key=lambda line: line.accuracy.mean)
        base, value = random[ipc]["accuracy"], best.accuracy.mean
        said = (
            f"At {ipc} per class {best.method} promises most: {100 * value:.0f}% "
            f"(80% interval {100 * (best.accuracy.low or 0):.0f} to "
            f"{100 * (best.accuracy.high or 1):.0f}), where random images give {100 * base:.0f}% "
            f"and all images about {100 * full.mean:.0f}%."
        )
        if full.mean - base < CLEAR:
            said += " Random images do as well as all of them: there is nothing to distill."
        elif value <= base:
            said += " No method is expected to beat random images: raise the budget."
        elif best.accuracy.low is not None and best.accuracy.low <= base:
            said += " The gain is likely but not sure: distill and evaluate before you rely on it."
        else:
            count = f"about {best.worth:.0f}"
            if math.isinf(best.worth):
                count = "more than were sampled"
            said += f" It pays: the set would be worth {count} random images per class."
        told.append(said)
    return " ".join(told)
