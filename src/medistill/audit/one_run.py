"""The one-run audit: many canaries, each in by the throw of a coin, and one run of the pipeline."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError

LEVEL = 0.95


@dataclass(frozen=True)
class OneRun:
    """What guesses about canaries prove: a lower bound on epsilon, and the largest they could."""

    canaries: int
    guesses: int
    right: int
    lower: float
    provable: float
    delta: float
    level: float = LEVEL


def p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Return how likely so many right guesses are at most, if (epsilon, delta) holds.

    q = e^epsilon / (1 + e^epsilon); p = P[Bin(r, q) >= v] + 2 m delta max over 1 <= i <= v of
    P[v - i <= Bin(r, q) < v] / i
    Source: Steinke, Nasr and Jagielski, NeurIPS 2023 (arXiv 2305.08846), theorem 5.2 and the
    program of its appendix.

    Example:
        >>> round(p_value(10, 10, 10, 0.0, 0.0), 6)
        0.000977
    """
    from scipy.stats import binom

    share = 1 / (1 + math.exp(-epsilon))
    beyond = float(binom.sf(right - 1, guesses, share))
    alpha = 0.0
    if delta > 0 and right > 0:
        near = np.cumsum(binom.pmf(np.arange(right - 1, -1, -1), guesses, share))
        alpha = float((near / np.arange(1, right + 1)).max())
    return min(1.0, beyond + 2 * canaries * delta * alpha)


def lower_bound(
    canaries: int, guesses: int, right: int, delta: float = 0.0, level: float = LEVEL
) -> float:
    """Return the largest epsilon that so many right guesses rule out, 0 if they rule out none.

    Example:
        >>> round(lower_bound(20, 20, 20), 2), round(lower_bound(1000, 1000, 700), 2)
        (1.82, 0.73)
    """
    if not 0 <= right <= guesses <= canaries:
        raise UsageError(
            f"found {right} right of {guesses} guesses on {canaries} canaries; expected no more "
            "guesses than canaries"
        )
    if guesses == 0 or p_value(canaries, guesses, right, 0.0, delta) >= 1 - level:
        return 0.0
    low, high = 0.0, 1.0
    while p_value(canaries, guesses, right, high, delta) < 1 - level and high < 64:
        low, high = high, 2 * high
    for _ in range(40):
        middle = (low + high) / 2
        ruled_out = p_value(canaries, guesses, right, middle, delta) < 1 - level
        low, high = (middle, high) if ruled_out else (low, middle)
    return low


def one_run(
    scores: NDArray[np.float64],
    included: NDArray[np.bool_],
    guesses: int,
    delta: float = 0.0,
) -> OneRun:
    """Guess the highest half of `guesses` scores in and the lowest half out, and count.

    The number of guesses must be fixed before scores are seen.
    Raises: UsageError when there are more guesses than canaries, or they are odd.
    """
    if not 0 < guesses <= len(scores) or guesses % 2:
        raise UsageError(
            f"found {guesses} guesses on {len(scores)} canaries; expected an even number, no more"
        )
    order = np.argsort(scores, kind="stable")
    half = guesses // 2
    right = int(included[order[-half:]].sum() + (~included[order[:half]]).sum())
    count = len(scores)
    return OneRun(
        count,
        guesses,
        right,
        lower_bound(count, guesses, right, delta),
        lower_bound(count, guesses, guesses, delta),
        delta,
    )
