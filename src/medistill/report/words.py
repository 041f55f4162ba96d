"""Numbers into words: scores with their intervals, and what they show, no more than that."""

import math
from collections.abc import Sequence
from typing import Any

from ..metrics import Score
from ..records import Json

ARMS = ("synthetic", "random", "full")
LIMITS = (
    "That the synthetic images are anonymous. Images that hold no pixel of a patient's image can "
    "still tell about patients; only an audit shows how much an attack learns, and only a "
    "mechanism with a proof bounds it. Treat the set as data of patients.",
    "That the scores hold elsewhere: they were measured on the test split of these data, with the "
    "recipe and the backbones named above.",
    "That the intervals cover everything: they show how scores vary between trainings, not how "
    "they would with other test images or with another distillation.",
    "That a model trained on the set is fit for the care of patients.",
)


def score(record: Any) -> Score | None:
    """Read {"mean", "low", "high", "n"}; None where there is no finite mean."""
    if not isinstance(record, dict):
        return None
    mean, low, high = (finite(record.get(name)) for name in ("mean", "low", "high"))
    if mean is None:
        return None
    return Score(mean, low, high, int(record.get("n") or 1))


def arm_score(evaluation: Json, arm: str, metric: str) -> Score | None:
    """Return what one arm of an evaluation reached in one metric."""
    return score((evaluation.get(arm) or {}).get(metric))


def finite(value: Any) -> float | None:
    """Return a finite number as float, anything else as None.

    Example:
        >>> finite(3), finite(float("nan")), finite("3"), finite(True)
        (3.0, None, None, None)
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number and math.isfinite(value) else None


def interval(found: Score) -> str:
    """Return the interval of a score in percent, or nothing for one training.

    Example:
        >>> interval(Score(0.83, 0.812, 0.848, 5)), interval(Score(0.83, None, None, 1))
        ('81.2 to 84.8', '')
    """
    if found.low is None or found.high is None:
        return ""
    return f"{100 * found.low:z.1f} to {100 * found.high:z.1f}"


def percent(fraction: float) -> str:
    """Return a fraction in percent with one decimal.

    Example:
        >>> percent(0.83)
        '83.0%'
    """
    return f"{100 * fraction:z.1f}%"


def amount(number: float, unit: str) -> str:
    """Return seconds or bytes in the unit that people would choose.

    Example:
        >>> amount(754, "s"), amount(62_720, "B")
        ('12 min 34 s', '62.7 kB')
    """
    if unit == "s":
        minutes, seconds = divmod(round(number), 60)
        hours, minutes = divmod(minutes, 60)
        if hours:
            return f"{hours} h {minutes} min"
        return f"{minutes} min {seconds} s" if minutes else f"{number:.1f} s"
    for name in ("B", "kB", "MB", "GB"):
        if number < 1000 or name == "GB":
            break
        number /= 1000
    return f"{number:.0f} B" if name == "B" else f"{number:.1f} {name}"


def apart(a: Score, b: Score) -> bool:
    """Say whether the intervals of two scores do not overlap."""
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return False
    return a.low > b.high or b.low > a.high


def findings(run: Json, evaluation: Json | None) -> tuple[str, list[str]]:
    """Return one paragraph on what the numbers show, and the warnings they call for."""
    told, warned = [_made(run)], _run_warnings(run)
    synthetic = arm_score(evaluation, "synthetic", "accuracy") if evaluation else None
    if evaluation is None or synthetic is None:
        told.append("How well it trains a model has not been measured yet.")
        return " ".join(told), warned
    told.append(_reached(synthetic))
    random, full = (arm_score(evaluation, arm, "accuracy") for arm in ("random", "full"))
    if random:
        told.append(_beside_random(synthetic, random))
        if random.mean >= synthetic.mean:
            warned.append(
                "Random real images of the same number do as well as the synthetic ones or better: "
                "by accuracy, distillation has not paid here."
            )
    if full:
        told.append(_beside_full(synthetic, full, score(_gap(evaluation, "accuracy"))))
        if full.mean < synthetic.mean:
            warned.append(
                "Full data scores below the synthetic set, so it is no ceiling here: its training "
                "may be too short, or its settings ill chosen. Do not read the gap closed."
            )
    if evaluation.get("worth"):
        told.append(_worth(evaluation))
    if min(s.n for s in (synthetic, random, full) if s) < 2:
        warned.append("An arm has one seed only: without an interval no difference is settled.")
    return " ".join(told), warned


def _made(run: Json) -> str:
    data = run["data"]
    ipc = f" ({run['ipc']} per class)" if run.get("ipc") else ""
    tiles = int(run.get("settings", {}).get("factor", 1)) ** len(data.get("shape", ()))
    each = f" Each holds {tiles} tiles, and students train on every tile, enlarged."
    return (
        f"The method {run['method']} distilled the training split of "
        f"{data.get('name', run['source'])} into {run['images']} synthetic images{ipc}."
        f"{each if tiles > 1 else ''}"
    )


def _run_warnings(run: Json) -> list[str]:
    warned = []
    if run.get("finished") is False:
        warned.append("The run did not finish: what follows describes where it stopped.")
    if run.get("real_pixels"):
        warned.append("Some synthetic images are, or started from, images of real patients.")
    return warned


def _reached(synthetic: Score) -> str:
    known = interval(synthetic)
    within = f" (95% interval {known}, {synthetic.n} seeds)" if known else ""
    return (
        f"Students trained on them alone classify {percent(synthetic.mean)} of the test split "
        f"correctly{within}."
    )


def _beside_random(synthetic: Score, random: Score) -> str:
    points = 100 * (synthetic.mean - random.mean)
    if round(points, 1) == 0:
        return f"As many random real images reach the same ({percent(random.mean)})."
    side = "above" if points > 0 else "below"
    if apart(synthetic, random):
        settled = "and the difference lies beyond its interval"
    elif interval(synthetic) and interval(random):
        settled = "but the two intervals overlap, so the difference is not settled"
    else:
        settled = "without an interval to judge the difference by"
    return (
        f"That is {abs(points):.1f} points {side} as many random real images "
        f"({percent(random.mean)}), {settled}."
    )


def _beside_full(synthetic: Score, full: Score, gap: Score | None) -> str:
    told = f"All real training images reach {percent(full.mean)}"
    if gap is None or full.mean < synthetic.mean:
        return f"{told}."
    if gap.mean < 0:
        return f"{told}; none of the gap between random and full data is closed."
    within = f" (95% interval {interval(gap)})" if interval(gap) else ""
    return f"{told}; {percent(gap.mean)} of the gap between random and full data is closed{within}."


def _worth(evaluation: Json) -> str:
    found = score(evaluation["worth"])
    if found is None:
        most = max(map(int, evaluation["curve"]))
        return f"The set is worth more than {most} random real images per class, the most tried."
    known = found.low is not None and found.high is not None
    within = f" (95% interval {found.low:.0f} to {found.high:.0f})" if known else ""
    return f"The set is worth about {found.mean:.0f} random real images per class{within}."


def _gap(evaluation: Json, metric: str) -> Any:
    return (evaluation.get("gap_closed") or {}).get(metric)


def listed(words: Sequence[str]) -> str:
    """Return words as a sentence lists them.

    Example:
        >>> listed(["a", "b", "c"])
        'a, b and c'
    """
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
