"""What attacks are measured by: true positives at small rates of false ones, with intervals."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError
from ..rng import Rng

Array = NDArray[np.float64]
RATES = (0.001, 0.01)
LEVEL = 0.95
BOOTSTRAPS = 2000


def exact_interval(hits: int, total: int, level: float = LEVEL) -> tuple[float, float]:
    """Return the interval of Clopper and Pearson of a share.

    Example:
        >>> low, high = exact_interval(0, 300)
        >>> low, round(high, 4)
        (0.0, 0.0122)
    """
    from scipy.stats import beta

    if not 0 <= hits <= total or total < 1:
        raise UsageError(f"found {hits} of {total}; expected some, and no more than all")
    tail = (1 - level) / 2
    low = 0.0 if hits == 0 else float(beta.ppf(tail, hits, total - hits + 1))
    high = 1.0 if hits == total else float(beta.ppf(1 - tail, hits + 1, total - hits))
    return low, high


@dataclass(frozen=True)
class Found:
    """How well scores tell members from others at one rate of false positives.

    `low` and `high` hold the share at 95%; `sure` is a lower end at the level of all that is looked
    at together. `resolved` is False where there are too few others to measure that rate: even no
    false positive among n bounds it by about 3 / n only. Members and others count images
    (patients), however often each was asked.
    """

    rate: float
    tpr: float
    low: float
    high: float
    sure: float
    members: int
    others: int
    resolved: bool


@dataclass(frozen=True)
class Curve:
    """An attack's area under the curve and what it finds at small rates of false positives."""

    auc: float
    auc_low: float
    auc_high: float
    found: tuple[Found, ...]


def curve_of(
    members: Array, others: Array, rates: Sequence[float] = RATES, level: float = LEVEL
) -> Curve:
    """Measure scores that are to be high for members.

    The threshold at a rate is the smallest score that at most that share of others reach; ties with
    it count as negatives, so that no rate is exceeded. The area is the Mann-Whitney statistic, ties
    counted half; its interval is that of Hanley and McNeil, Radiology 1982.
    Raises: UsageError when a side is empty or a score is not a number.
    """
    from scipy.stats import norm

    if not len(members) or not len(others):
        raise UsageError(f"found {len(members)} members and {len(others)} others; expected both")
    if not (np.isfinite(members).all() and np.isfinite(others).all()):
        raise UsageError("found scores that are not finite; expected numbers")
    area = _area(members, others)
    half = float(norm.ppf((1 + level) / 2)) * _deviation(area, len(members), len(others))
    found = []
    descending = np.sort(others)[::-1]
    for rate in rates:
        allowed = math.floor(rate * len(others) + 1e-9)
        threshold = descending[allowed] if allowed < len(others) else -math.inf
        hits = int((members > threshold).sum())
        low, high = exact_interval(hits, len(members))
        sure, sizes = exact_interval(hits, len(members), level)[0], (len(members), len(others))
        found.append(
            Found(rate, hits / len(members), low, high, sure, *sizes, _resolves(len(others), rate))
        )
    return Curve(area, max(0.0, area - half), min(1.0, area + half), tuple(found))


def _resolves(others: int, rate: float) -> bool:
    return others > 0 and exact_interval(0, others, 0.9)[1] <= rate


def _area(members: Array, others: Array) -> float:
    from scipy.stats import rankdata

    ranks = rankdata(np.concatenate([members, others]))[: len(members)]
    least = len(members) * (len(members) + 1) / 2
    return float((ranks.sum() - least) / (len(members) * len(others)))


def _deviation(area: float, members: int, others: int) -> float:
    one, two = area / (2 - area), 2 * area**2 / (1 + area)
    spread = area * (1 - area) + (members - 1) * (one - area**2) + (others - 1) * (two - area**2)
    return math.sqrt(max(spread, 0.0) / (members * others))


def clustered(
    scores: Array,
    inside: NDArray[np.bool_],
    rates: Sequence[float] = RATES,
    *,
    level: float = LEVEL,
    seed: int = 0,
) -> Curve:
    """Measure scores of the same images under several models, as `curve_of` does for one.

    Scores of an image go together whichever model it is asked of, so intervals come from drawing
    images anew, with all their scores (2,000 draws, percentiles), and are never narrower than those
    that take all scores for independent. `level` is that of the area and of `sure`; shares have
    95%. Scores that are nan are left out.
    Shapes: scores, inside [models, n].
    """
    known = np.isfinite(scores)
    found = curve_of(scores[inside & known], scores[~inside & known], rates, level)
    images = np.broadcast_to(np.arange(scores.shape[1]), scores.shape)[known]
    order = np.argsort(-scores[known], kind="stable")
    ranked = _Ranked(scores[known][order], inside[known][order], images[order])
    draw = np.random.default_rng(Rng(seed).integer("bootstrap"))
    count = scores.shape[1]
    areas, shares = [], []
    for _ in range(BOOTSTRAPS):
        times = np.bincount(draw.integers(0, count, count), minlength=count).astype(np.float64)
        area, tprs = ranked.measured(times, rates)
        areas.append(area)
        shares.append(tprs)
    tail = 100 * (1 - level) / 2
    low, high = np.nanpercentile(areas, [tail, 100 - tail])
    sure = np.nanpercentile(np.array(shares), tail, axis=0)
    tail = 100 * (1 - LEVEL) / 2
    within = np.nanpercentile(np.array(shares), [tail, 100 - tail], axis=0).T
    members, others = (int((side & known).any(0).sum()) for side in (inside, ~inside))
    wider = tuple(
        dataclasses.replace(
            one,
            low=min(one.low, float(a)),
            high=max(one.high, float(b)),
            sure=min(one.sure, float(c)),
            members=members,
            others=others,
            resolved=_resolves(others, one.rate),
        )
        for one, (a, b), c in zip(found.found, within, sure, strict=True)
    )
    return Curve(found.auc, min(found.auc_low, float(low)), max(found.auc_high, float(high)), wider)


class _Ranked(NamedTuple):
    """Scores from high to low, whether each is a member's, and of which image."""

    scores: Array
    inside: NDArray[np.bool_]
    images: NDArray[np.int64]

    def measured(self, times: Array, rates: Sequence[float]) -> tuple[float, list[float]]:
        """Return the area and the true positives where each image counts `times`; nan of none."""
        weights = times[self.images]
        hits = np.cumsum(np.where(self.inside, weights, 0.0))
        misses = np.cumsum(np.where(self.inside, 0.0, weights))
        if hits[-1] == 0 or misses[-1] == 0:
            return math.nan, [math.nan] * len(rates)
        last = np.append(self.scores[1:] != self.scores[:-1], True)  # of equal scores
        tpr = np.concatenate([[0.0], hits[last] / hits[-1]])
        fpr = np.concatenate([[0.0], misses[last] / misses[-1]])
        area = float(np.sum(np.diff(fpr) * (tpr[1:] + tpr[:-1]) / 2))
        return area, [float(tpr[np.searchsorted(fpr, rate + 1e-12, "right") - 1]) for rate in rates]
