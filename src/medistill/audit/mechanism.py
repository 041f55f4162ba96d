"""The audit of the private release itself: thousands of releases with and without one patient."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UsageError
from ..privacy import GRID, Clean, Guarantee, epsilon_of
from ..progress import progress
from .curves import exact_interval

RUNS = 20_000
MOST_RUNS = 180_000
AT_ONCE = 500  # releases drawn together: each number has noise of its own in any case
LEVEL = 0.95
CERTAIN = 0.9999  # before it is said that a promise was broken
Release = Callable[[Tensor, Guarantee], Tensor]


def once(sums: Tensor, guarantee: Guarantee) -> Tensor:
    """Release sums as medistill does: once, and they are gone."""
    return Clean(sums.clone(), guarantee.bound).release(guarantee.noise)


@dataclass(frozen=True)
class MechanismAudit:
    """What releases with and without a patient prove of the mechanism.

    `lower` is a 95% lower bound on epsilon at the claimed delta, and `certain` one of 99.99%: where
    that is beyond the claim there is a bug. Both take the mechanism for one with Gaussian trade-off
    between its errors, as the claim does; `free` is a 95% lower bound that takes nothing for given.
    """

    claimed: float
    delta: float
    lower: float
    certain: float
    free: float
    runs: int
    false_positives: int
    false_negatives: int

    @property
    def broken(self) -> bool:
        """Whether the claim is refuted."""
        return self.certain > self.claimed


def audit_mechanism(
    without: Tensor,
    patient: Tensor,
    guarantee: Guarantee,
    *,
    runs: int | None = None,
    release: Release = once,
) -> MechanismAudit:
    """Guess from each release whether a patient is in, and bound epsilon by the guesses.

    The guess is the best there is against Gaussian noise: in, if the release lies further along
    the patient's vector than half its length. epsilon follows by the exact curve from mu, the
    larger of Phi^-1(1 - FPR) - Phi^-1(FNR) with upper bounds of both rates (Clopper and Pearson),
    which sees a leak of one kind best, and 2 Phi^-1(1 - (FPR + FNR) / 2) with one bound of their
    mean, which is closer where both are alike; half of the error each. That curve is the claim's;
    of another mechanism `free` alone is a bound.
    `runs` are those of `runs_of` unless told.
    Source: Nasr et al., USENIX Security 2023 (arXiv 2302.07956), section 3.
    Departure: the mean of both rates. A mechanism of mu has (FPR + FNR) / 2 >= Phi(-mu / 2), and
    false guesses of two rates are no likelier to be few than as many of their mean (Hoeffding,
    Annals of Mathematical Statistics 1956, theorem 4).
    Shapes: without, patient int64 of the same shape: sums of all others, and the patient's vector.
    Raises: UsageError when the patient's vector is 0, or there are fewer than 100 runs.
    """
    length = float(patient.double().norm())
    runs = runs_of(guarantee.epsilon) if runs is None else runs
    if length == 0 or runs < 100:
        raise UsageError("found no vector to look for, or too few runs; expected 100 or more")
    along = (patient.double() / length).flatten()
    false = [0, 0]
    with progress("releases", 2 * runs) as advance:
        for present in (0, 1):
            sums = without + present * patient
            for begin in range(0, runs, AT_ONCE):
                count = min(AT_ONCE, runs - begin)
                seen = release(sums.expand(count, *sums.shape), guarantee) - without
                guesses = seen.double().flatten(1) @ along > length / 2
                false[present] += int((guesses != bool(present)).sum())
                advance(count)
    lower, certain = (_lower(false, runs, guarantee.delta, level) for level in (LEVEL, CERTAIN))
    bounds = lower, certain, _free(false, runs, guarantee.delta)
    return MechanismAudit(guarantee.epsilon, guarantee.delta, *bounds, runs, *false)


def runs_of(epsilon: float) -> int:
    """Return how many releases bring the bound to 0.8 epsilon or more, nearly always.

    20,000, below epsilon 1.5 more by its square: 45,000 at 1. Beyond 180,000, that is below 0.5,
    the bound is allowed to fall behind.
    """
    return min(MOST_RUNS, round(RUNS * max(1.0, 1.5 / epsilon) ** 2))


def _lower(false: Sequence[int], runs: int, delta: float, level: float) -> float:
    from scipy.stats import norm

    error = (1 - level) / 2  # of each of the two ways to count
    apart = [_most(count, runs, error / 2) for count in false]
    together = _most(sum(false), 2 * runs, error)
    mu = float(max(-norm.ppf(apart).sum(), -2 * norm.ppf(together)))
    return epsilon_of(mu, delta) if mu > 0 and math.isfinite(mu) else 0.0


def _free(false: Sequence[int], runs: int, delta: float) -> float:
    """Return log((1 - delta - a) / b), a and b upper bounds of both rates, whichever way is more.

    Source: Kairouz, Oh and Viswanath, ICML 2015 (arXiv 1311.0776), theorem 2.1.
    """
    one, other = (_most(count, runs, (1 - LEVEL) / 2) for count in false)
    ways = [(1 - delta - a) / b for a, b in ((one, other), (other, one)) if b > 0]
    return max(0.0, *(math.log(ratio) for ratio in ways if ratio > 0)) if max(ways) > 0 else 0.0


def _most(count: int, runs: int, error: float) -> float:
    """Return the upper bound of a rate (Clopper and Pearson), which errs this often at most."""
    return exact_interval(count, runs, 1 - 2 * error)[1]


def worst_patient(shape: tuple[int, ...], bound: float) -> Tensor:
    """Return a vector of whole numbers as long as a patient's can be, in all numbers alike."""
    count = math.prod(shape)
    return torch.full(shape, math.floor(bound * GRID / math.sqrt(count)), dtype=torch.int64)
