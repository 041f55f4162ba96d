"""Differential privacy of one release: exact calibration, exact noise, and sums used once."""

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NoReturn

import torch
from torch import Tensor

from .errors import DataError, RunRefused, UsageError, extra

Unit = Literal["patient", "image"]
GRID = 2**20  # steps of one in what noise is added to: far below any noise of use
COUNT = 1.0  # of a unit to the number of its class, beside a vector of norm sqrt(networks)
SMOOTH = 7  # of the discrete Gaussian's variance, paid for standing on a grid: see docs/privacy.md
MOST = 2**62
ADJACENCY, MECHANISM = "add or remove one", "discrete Gaussian, one release"


@dataclass(frozen=True)
class Guarantee:
    """What one release guarantees, and by which mechanism.

    For all sets of outcomes O and all training splits S, S' that differ by one unit added or
    removed: P[M(S) in O] <= exp(epsilon) P[M(S') in O] + delta. The mechanism adds to each whole
    number of the sum a discrete Gaussian of standard deviation `noise` times `bound`, and `bound`
    is the largest length of one unit's vector. `receipts` name the releases that were added up (of
    sites that share no unit), and `added` is the deviation of all their noise, in bounds.
    """

    epsilon: float
    delta: float
    unit: Unit
    noise: float
    bound: float
    added: float = 0.0
    receipts: tuple[str, ...] = ()
    adjacency: str = ADJACENCY
    mechanism: str = MECHANISM

    @property
    def mu(self) -> float:
        """The parameter of Gaussian differential privacy: 1 / noise."""
        return 1 / self.noise


def bound_of(networks: int) -> float:
    """Return the longest vector that a unit can have in a sketch: sqrt(networks + COUNT^2).

    A unit's vector is the mean over its images of the sketch's vectors (of norm 1 for each network,
    in the block of the image's class) and of ones that count classes; a mean is no longer than its
    longest part.
    """
    return math.sqrt(networks + COUNT**2)


def check_promise(promise: Guarantee, networks: int) -> None:
    """Refuse a guarantee whose numbers do not follow from each other, as in a changed file.

    Raises: UsageError. Nothing here shows that the noise was really drawn: only the sender's
    signature vouches for that.
    """
    needed = noise_of(promise.epsilon, promise.delta)
    if promise.noise < needed * (1 - 1e-9):
        raise UsageError(
            f"found noise {promise.noise:g} for epsilon {promise.epsilon:g}; expected {needed:g}"
        )
    if not math.isclose(promise.bound, bound_of(networks)):
        raise UsageError(f"found bound {promise.bound:g}; expected {bound_of(networks):g}")
    if (promise.adjacency, promise.mechanism) != (ADJACENCY, MECHANISM):
        raise UsageError(
            f"found {promise.adjacency!r} by {promise.mechanism!r}; expected {ADJACENCY!r} by "
            f"{MECHANISM!r}"
        )
    if not promise.noise <= promise.added * (1 + 1e-9) < math.inf or not promise.receipts:
        raise UsageError("found a guarantee without its releases; expected their receipts")


def delta_of(mu: float, epsilon: float) -> float:
    """Return the least delta at which a Gaussian mechanism with sensitivity / deviation mu holds.

    delta = Phi(mu / 2 - epsilon / mu) - exp(epsilon) Phi(-mu / 2 - epsilon / mu)
    Source: Balle and Wang, ICML 2018 (arXiv 1805.06530), theorem 8; it is exact, where the textbook
    formula holds for epsilon below 1 alone.

    Example:
        >>> round(delta_of(1.0, 1.0), 6)
        0.126937
    """
    from scipy.special import log_ndtr

    first = float(log_ndtr(mu / 2 - epsilon / mu))
    second = epsilon + float(log_ndtr(-mu / 2 - epsilon / mu))
    return math.exp(first) * -math.expm1(min(0.0, second - first))


def epsilon_of(mu: float, delta: float) -> float:
    """Return the least epsilon at which a Gaussian mechanism holds with delta.

    Example:
        >>> round(epsilon_of(1 / 3.7306, 1e-5), 3)
        1.0
    """
    from scipy.optimize import brentq

    _check_delta(delta)
    if delta_of(mu, 0.0) <= delta:
        return 0.0
    top = 1.0
    while delta_of(mu, top) > delta:
        top *= 2
    found = float(brentq(lambda x: delta_of(mu, x) - delta, 0.0, top, xtol=1e-12, rtol=1e-12))
    while delta_of(mu, found) > delta:  # the root's last bits must not be on the wrong side
        found *= 1 + 1e-12
    return found


def noise_of(epsilon: float, delta: float) -> float:
    """Return the standard deviation, in units of the sensitivity, that gives (epsilon, delta).

    Raises: UsageError when epsilon is not above 0 or delta is not between 0 and 1.

    Example:
        >>> round(noise_of(1.0, 1e-5), 3), round(noise_of(10.0, 1e-5), 4)
        (3.731, 0.4999)
    """
    from scipy.optimize import brentq

    if not 0 < epsilon < math.inf:
        raise UsageError(f"found epsilon {epsilon:g}; expected a number above 0, as 1")
    _check_delta(delta)
    low, high = 1e-6, 1.0
    while delta_of(low, epsilon) > delta and low > 1e-100:
        low /= 2
    while delta_of(high, epsilon) < delta:
        high *= 2
    mu = float(brentq(lambda x: delta_of(x, epsilon) - delta, low, high, xtol=1e-14, rtol=1e-12))
    while delta_of(mu, epsilon) > delta:
        mu *= 1 - 1e-12
    return 1 / mu


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise UsageError(f"found delta {delta:g}; expected a number between 0 and 1, as 1e-5")


def composed(mus: Sequence[float], delta: float) -> float:
    """Return the epsilon of several releases of the same data together.

    Gaussian mechanisms compose to one with mu = sqrt(sum of squares), exactly.
    Source: Dong, Roth and Su, JRSS B 2022 (arXiv 1905.02383), corollary 2.
    """
    return epsilon_of(math.sqrt(math.fsum(mu * mu for mu in mus)), delta) if mus else 0.0


def weakest(promised: Sequence[Guarantee]) -> Guarantee | None:
    """Return what sums of several sites guarantee, each release in them once.

    Raises: DataError when a release stands twice.
    """
    if not promised:
        return None
    receipts = tuple(name for one in promised for name in one.receipts)
    if len(set(receipts)) < len(receipts):
        raise DataError("found a release twice; expected each private sketch once")
    added = math.sqrt(math.fsum(one.added**2 for one in promised))
    worst = max(promised, key=lambda one: one.epsilon)
    return replace(worst, added=added, receipts=receipts)


def attacker(epsilon: float, delta: float) -> dict[str, float]:
    """Return what the guarantee allows the best attack: true positives at a rate of false ones.

    The curve of a Gaussian mechanism: TPR = Phi(Phi^-1(FPR) + mu), AUC = Phi(mu / sqrt 2).
    Source: as `composed`, equation 6.

    Example:
        >>> {name: round(value, 4) for name, value in attacker(1.0, 1e-5).items()}
        {'tpr_at_0.001': 0.0024, 'tpr_at_0.01': 0.0198, 'auc': 0.5752}
    """
    from scipy.stats import norm

    mu = 1 / noise_of(epsilon, delta)
    found = {f"tpr_at_{rate:g}": float(norm.cdf(norm.ppf(rate) + mu)) for rate in (0.001, 0.01)}
    return found | {"auc": float(norm.cdf(mu / math.sqrt(2)))}


def clipped(vectors: Tensor, bound: float) -> Tensor:
    """Return whole vectors whose exact length is at most the bound; shorter ones as they are.

    What is not finite becomes 0, so that no vector can stop or blow up a release. Longer vectors
    are scaled and cut toward 0; lengths are compared as sums of squares of whole numbers.
    Shapes: vectors float64 or int64 [n, ...] in units of 1 / GRID; bound in units of one.
    """
    limit = math.floor(bound * GRID) ** 2
    whole = vectors
    if vectors.is_floating_point():
        # Nothing in range is touched by the clamp; squares of what is beyond would overflow.
        most = float(math.floor(bound * GRID) * 2**8)
        whole = vectors.nan_to_num(0.0, 0.0, 0.0).clamp(-most, most).trunc().long()
    flat = whole.flatten(1)
    for _ in range(4):
        squares = flat.double().square().sum(1)
        over = squares > limit * (1 - 1e-9)
        exact = [sum(x * x for x in row) > limit for row in flat[over].tolist()]
        rows = over.nonzero().flatten()[torch.tensor(exact, dtype=torch.bool)]
        if not len(rows):
            return flat.view_as(whole)
        factor = (math.sqrt(limit) * (1 - 1e-9) / squares[rows].sqrt()).unsqueeze(1)
        flat = flat.clone()
        flat[rows] = (flat[rows].double() * factor).trunc().long()
    raise AssertionError("vectors were longer than the bound after scaling")


class Clean:
    """Sums before noise: they can be released once, and are gone then.

    Nothing else reads them, and what distills takes a released sketch only, so that no statistic
    is seen without noise, or twice with fresh noise.
    """

    def __init__(self, sums: Tensor, bound: float) -> None:
        if sums.dtype != torch.int64:
            raise TypeError(f"found sums {sums.dtype}; expected int64")
        self._sums: Tensor | None = sums
        self._bound = bound
        self._turn = threading.Lock()

    def __reduce__(self) -> NoReturn:
        """Refuse copies and pickles: a second one could be released again."""
        raise TypeError("found a copy of sums without noise; expected one only")

    def release(self, noise: float) -> Tensor:
        """Return the sums with noise of standard deviation noise times the bound, and forget them.

        Each whole number gets a discrete Gaussian of its own, drawn exactly by OpenDP from the
        operating system's entropy; no seed exists that could draw it again.
        Source: Canonne, Kamath and Steinke, NeurIPS 2020 (arXiv 2004.00010).
        Raises: RunRefused when they were released before.
        """
        with self._turn:
            sums, self._sums = self._sums, None
        if sums is None:
            raise RunRefused(
                "found sums that were released before; expected one release: fresh noise on the "
                "same sums would wear the guarantee away"
            )
        deviation = math.sqrt((noise * self._bound * GRID) ** 2 + SMOOTH)
        noisy = sums + discrete_gaussian(sums.numel(), deviation).view_as(sums)
        sums.zero_()
        return noisy


def discrete_gaussian(count: int, deviation: float) -> Tensor:
    """Return whole numbers int64 [count] of P[x] proportional to exp(-x^2 / (2 deviation^2)).

    Raises: UsageError when the extra dp is not installed.
    """
    dp = extra("opendp.prelude", "dp")
    if deviation * 40 > MOST:
        raise UsageError(f"found noise {deviation:g}; expected less than {MOST / 40:g}")
    dp.enable_features("contrib")
    space = dp.vector_domain(dp.atom_domain(T="i64"), size=count), dp.l2_distance(T="f64")
    noise = dp.m.make_gaussian(*space, scale=deviation)
    return torch.tensor(noise([0] * count), dtype=torch.int64)
