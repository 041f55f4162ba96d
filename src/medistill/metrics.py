"""Scores of predictions, as fractions, and their intervals."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

NAMES = ("accuracy", "balanced_accuracy", "auc", "f1", "ece")


@dataclass(frozen=True)
class Score:
    """A mean over `n` independent repetitions with its 95% interval (None for one repetition)."""

    mean: float
    low: float | None
    high: float | None
    n: int


def score(values: Sequence[float]) -> Score:
    """Return mean and 95% t interval: mean +- t(0.975, n - 1) s / sqrt(n).

    Example:
        >>> found = score([0.8, 0.9])
        >>> round(found.mean, 3), round(found.low, 3), round(found.high, 3), found.n
        (0.85, 0.215, 1.485, 2)
    """
    from scipy.stats import t

    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return Score(mean, None, None, 1)
    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)
    half = float(t.ppf(0.975, n - 1)) * spread
    return Score(mean, mean - half, mean + half, n)


def gap_closed(
    synthetic: Sequence[float], random: Sequence[float], full: Sequence[float]
) -> Score | None:
    """Return (synthetic - random) / (full - random) with a 95% interval.

    The interval comes from first-order propagation of the three standard errors, with the
    degrees of freedom of the smallest sample. None where full data is not better than random
    images, because the ratio then means nothing.
    """
    from scipy.stats import t

    arms = [np.asarray(arm, dtype=np.float64) for arm in (synthetic, random, full)]
    s, r, f = (float(arm.mean()) for arm in arms)
    n = min(len(arm) for arm in arms)
    if not f > r:  # nan included
        return None
    value = (s - r) / (f - r)
    if n < 2:
        return Score(value, None, None, n)
    slopes = (1 / (f - r), (s - f) / (f - r) ** 2, -(s - r) / (f - r) ** 2)
    variance = sum(
        slope**2 * float(arm.var(ddof=1)) / len(arm)
        for slope, arm in zip(slopes, arms, strict=True)
    )
    half = float(t.ppf(0.975, n - 1)) * math.sqrt(variance)
    return Score(value, value - half, value + half, n)


def worth(value: float, sizes: Sequence[int], scores: Sequence[float]) -> float:
    """Return how many random images per class score as high as `value`, by their learning curve.

    The curve is made non-decreasing (isotonic regression) and read linearly in log(size). Below its
    first size: that size, for nothing smaller was measured; above its last score: infinity.
    Source: as the indicator's learning curve (docs/studies.md).

    Example:
        >>> worth(0.7, [1, 10, 100], [0.5, 0.7, 0.9])
        10.0
    """
    from sklearn.isotonic import IsotonicRegression

    logs = np.log(np.asarray(sizes, dtype=np.float64))
    rising = IsotonicRegression().fit_transform(logs, np.asarray(scores, dtype=np.float64))
    if value > rising[-1]:
        return math.inf
    place = int(np.searchsorted(rising, value))  # the first size that reaches the value
    if place == 0:
        return float(sizes[0])
    low, high = rising[place - 1], rising[place]
    share = (value - low) / (high - low)
    return round(float(np.exp(logs[place - 1] + share * (logs[place] - logs[place - 1]))), 6)


def worth_of(own: Score, curve: Mapping[int, Score]) -> Score | None:
    """Return the worth of a set's score by random images' scores at some sizes, None for one size.

    The ends are the worth of the score's own ends; infinite where the curve never gets there.
    """
    if len(curve) < 2:
        return None
    sizes = sorted(curve)
    means = [curve[size].mean for size in sizes]
    low, high = (None if x is None else worth(x, sizes, means) for x in (own.low, own.high))
    return Score(worth(own.mean, sizes, means), low, high, own.n)


def confusion(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Count predictions, int64 [k, k]: rows are true classes, columns predicted ones."""
    return torch.bincount(labels * classes + predicted, minlength=classes**2).view(classes, -1)


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Return the expected calibration error: sum over bins of |accuracy - confidence| n_b / n.

    Source: Guo et al., ICML 2017, equation 3; 15 equal bins of the top probability.
    """
    confidence, predicted = probabilities.max(1)
    bin_of = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gap = (predicted == labels).double() - confidence.double()
    per_bin = torch.zeros(bins, dtype=torch.float64).index_add_(0, bin_of, gap)
    return float(per_bin.abs().sum() / len(labels))


def area_under_curve(probabilities: Tensor, labels: Tensor) -> float:
    """Return the area under the ROC curve: of class 1 for two classes, else macro one-vs-rest.

    Classes that are absent from the labels have no curve and are left out; nan if none is left.
    """
    from sklearn.metrics import roc_auc_score

    k = probabilities.shape[1]
    areas = []
    for c in [1] if k == 2 else range(k):
        truth = (labels == c).numpy()
        if 0 < truth.sum() < len(truth):
            areas.append(float(roc_auc_score(truth, probabilities[:, c].numpy())))
    return float(np.mean(areas)) if areas else float("nan")


def finite(logits: Tensor) -> Tensor:
    """Return logits float64 with the rows that are not finite set to 0: a network that diverged.

    Example:
        >>> finite(torch.tensor([[1.0, 2.0], [float("nan"), 0.0]])).tolist()
        [[1.0, 2.0], [0.0, 0.0]]
    """
    usable = logits.isfinite().all(1, keepdim=True)
    return logits.double().masked_fill(~usable, 0.0)


def quadratic_kappa(counts: Tensor) -> float:
    """Return Cohen's kappa with quadratic weights of a confusion matrix [k, k]; nan of one class.

    1 - sum_ij (i - j)^2 O_ij / sum_ij (i - j)^2 E_ij, E the product of the margins over n.
    Source: Cohen, Psychological Bulletin 1968.

    Example:
        >>> quadratic_kappa(torch.tensor([[5, 0], [0, 5]]))
        1.0
    """
    seen = counts.double()
    place = torch.arange(len(seen), dtype=torch.float64)
    weights = (place - place.unsqueeze(1)).square()
    chance = (weights * seen.sum(1, keepdim=True) * seen.sum(0)).sum() / seen.sum()
    return float(1 - (weights * seen).sum() / chance) if chance > 0 else float("nan")


def evaluate_labels(logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """Return the scores of a multi-label task: the mean over labels of each one's own.

    accuracy, balanced accuracy and F1 at a probability of one half, AUC, calibration error; for
    `confusion` the matrices [k, 2, 2]. A label that all images have, or none, has no AUC.
    Source: accuracy and AUC as Yang et al., Scientific Data 2023, score ChestMNIST.
    Shapes: logits [n, k], labels {0, 1} [n, k].
    """
    logits, labels = finite(logits), labels.cpu()
    two = torch.stack([torch.zeros_like(logits), logits], 2)  # softmax of these is the sigmoid
    parts = [evaluate_logits(two[:, c], labels[:, c]) for c in range(labels.shape[1])]
    scores: dict[str, Any] = {}
    for name in NAMES:
        known = [part[name] for part in parts if not math.isnan(part[name])]
        scores[name] = math.fsum(known) / len(known) if known else float("nan")
    return scores | {"confusion": [part["confusion"] for part in parts]}


def evaluate_task(task: str, logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """Return the scores that fit a task; ordinal ones have `kappa` beside the others."""
    if task == "multi-label":
        return evaluate_labels(logits, labels)
    scores = evaluate_logits(logits, labels)
    if task == "ordinal":
        scores["kappa"] = quadratic_kappa(torch.tensor(scores["confusion"]))
    return scores


def evaluate_logits(logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """Return accuracy, balanced accuracy, AUC, macro F1, calibration error and confusion matrix.

    Shapes: logits [n, k], labels int64 [n]. Recalls and F1 average over classes that occur in
    the labels. Rows that are not finite say nothing: all their classes count as equally likely.
    """
    logits, labels = finite(logits), labels.cpu()
    probabilities = logits.softmax(1)
    counts = confusion(logits.argmax(1), labels, logits.shape[1])
    right, true, said = counts.diag().double(), counts.sum(1), counts.sum(0)
    present = true > 0
    return {
        "accuracy": float(right.sum() / len(labels)),
        "balanced_accuracy": float((right / true)[present].mean()),
        "auc": area_under_curve(probabilities, labels),
        "f1": float((2 * right / (true + said))[present].mean()),
        "ece": calibration_error(probabilities, labels),
        "confusion": counts.tolist(),
    }
