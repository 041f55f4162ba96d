"""Scores against plain loops, and intervals against formulas and simulation."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from medistill.metrics import (
    area_under_curve,
    calibration_error,
    confusion,
    evaluate_labels,
    evaluate_logits,
    evaluate_task,
    gap_closed,
    quadratic_kappa,
    score,
)

T_975 = {1: 12.706204736, 2: 4.302652730, 4: 2.776445105}  # quantiles from printed tables


def draw(n: int, k: int, seed: int, classes: list[int] | None = None) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    # Rounded, so that some probabilities tie.
    logits = (2 * torch.randn(n, k, generator=generator)).round(decimals=1)
    among = torch.tensor(classes or list(range(k)))
    return logits, among[torch.randint(len(among), (n,), generator=generator)]


def by_hand(logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """Compute every metric by counting, one image at a time."""
    n, k = logits.shape
    rows = [[math.exp(v - max(row)) for v in row] for row in logits.double().tolist()]
    p = [[v / sum(row) for v in row] for row in rows]
    y = labels.tolist()
    said = [row.index(max(row)) for row in p]
    counts = [[0] * k for _ in range(k)]
    for true, guess in zip(y, said, strict=True):
        counts[true][guess] += 1
    recalls, f1 = [], []
    for c in sorted(set(y)):
        recalls.append(counts[c][c] / y.count(c))
        f1.append(2 * counts[c][c] / (y.count(c) + said.count(c)))
    bins: dict[int, list[int]] = {}
    for i in range(n):
        bins.setdefault(max(math.ceil(15 * max(p[i])), 1), []).append(i)
    ece = sum(
        abs(sum(said[i] == y[i] for i in b) / len(b) - sum(max(p[i]) for i in b) / len(b))
        * len(b)
        / n
        for b in bins.values()
    )
    areas = []
    for c in [1] if k == 2 else range(k):
        pairs = [
            1.0 if p[i][c] > p[j][c] else 0.5 if p[i][c] == p[j][c] else 0.0
            for i in range(n)
            for j in range(n)
            if y[i] == c and y[j] != c
        ]
        if pairs:
            areas.append(sum(pairs) / len(pairs))
    return {
        "accuracy": sum(a == b for a, b in zip(y, said, strict=True)) / n,
        "balanced_accuracy": sum(recalls) / len(recalls),
        "auc": sum(areas) / len(areas) if areas else math.nan,
        "f1": sum(f1) / len(f1),
        "ece": ece,
        "confusion": counts,
    }


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("k", "classes"),
    [(2, None), (3, None), (5, None), (5, [0, 3]), (2, [1]), (4, [2])],
    ids=["binary", "three", "five", "absent-classes", "one-of-two", "one-of-four"],
)
def test_metrics_are_those_of_a_plain_loop(k: int, classes: list[int] | None, seed: int) -> None:
    logits, labels = draw(37, k, seed, classes)
    found, expected = evaluate_logits(logits, labels), by_hand(logits, labels)
    assert found.keys() == expected.keys()
    assert found.pop("confusion") == expected.pop("confusion")
    assert found == pytest.approx(expected, abs=1e-9, nan_ok=True)


def test_rows_of_the_confusion_matrix_are_true_classes() -> None:
    counts = confusion(torch.tensor([1, 1, 0, 2]), torch.tensor([0, 0, 0, 2]), 3)
    assert counts.tolist() == [[1, 2, 0], [0, 0, 0], [0, 0, 1]]


def test_one_class_has_no_curve() -> None:
    assert math.isnan(area_under_curve(torch.full((3, 2), 0.5), torch.ones(3).long()))


def test_binary_area_is_that_of_class_one_and_ties_count_half() -> None:
    ones = torch.tensor([0.1, 0.4, 0.4, 0.8])
    labels = torch.tensor([0, 0, 1, 1])
    assert area_under_curve(torch.stack([1 - ones, ones], 1), labels) == pytest.approx(3.5 / 4)


def test_calibration_of_certain_and_of_even_answers() -> None:
    certain = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert calibration_error(certain, torch.tensor([0, 1, 1, 1])) == pytest.approx(0.25)
    assert calibration_error(torch.full((4, 2), 0.5), torch.tensor([0, 0, 1, 1])) == 0
    # 0.55 and 0.65 lie in bins 9 and 10 of 15: errors of unlike sign do not cancel across bins.
    apart = torch.tensor([[0.55, 0.45], [0.65, 0.35]])
    assert calibration_error(apart, torch.tensor([0, 1])) == pytest.approx((0.45 + 0.65) / 2)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_network_that_diverged_knows_nothing(broken: float) -> None:
    found = evaluate_logits(torch.full((6, 2), broken), torch.tensor([0, 1, 0, 1, 0, 1]))
    assert (found["auc"], found["balanced_accuracy"], found["ece"]) == (0.5, 0.5, 0.0)


@pytest.mark.parametrize("values", [[0.8, 0.9], [0.7, 0.75, 0.9], [0.5, 0.6, 0.55, 0.65, 0.9]])
def test_score_is_the_t_interval_by_hand(values: list[float]) -> None:
    n = len(values)
    mean = sum(values) / n
    half = T_975[n - 1] * math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1)) / math.sqrt(n)
    found = score(values)
    assert (found.mean, found.low, found.high) == pytest.approx((mean, mean - half, mean + half))
    assert found.n == n


def test_one_repetition_has_no_interval() -> None:
    found = score([0.7])
    assert (found.mean, found.low, found.high, found.n) == (0.7, None, None, 1)


def test_gap_closed_by_hand() -> None:
    s, r, f = [0.84, 0.86], [0.78, 0.82], [0.89, 0.91]
    found = gap_closed(s, r, f)
    assert found is not None
    assert found.mean == pytest.approx(0.5)
    # Standard errors 0.01, 0.02, 0.01; the ratio's slopes at (0.85, 0.8, 0.9) are 10, -5, -5.
    half = T_975[1] * math.sqrt((10 * 0.01) ** 2 + (5 * 0.02) ** 2 + (5 * 0.01) ** 2)
    assert (found.low, found.high) == pytest.approx((0.5 - half, 0.5 + half))
    assert found.n == 2


def test_gap_closed_takes_the_degrees_of_freedom_of_the_smallest_arm() -> None:
    s, r, f = [0.84, 0.85, 0.86], [0.8], [0.9, 0.9]
    found = gap_closed(s, r, f)
    assert found is not None
    assert (found.mean, found.low, found.high, found.n) == (pytest.approx(0.5), None, None, 1)


def test_the_width_of_gap_closed_is_that_of_a_simulation() -> None:
    generator = torch.Generator().manual_seed(0)
    n, means = 5, (0.84, 0.78, 0.92)
    spreads = (0.01, 0.02, 0.008)
    offsets = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0]).double()
    offsets = offsets / offsets.std()  # so that each arm's sample spread is exact
    arms = [(m + sd * offsets).tolist() for m, sd in zip(means, spreads, strict=True)]
    found = gap_closed(*arms)
    assert found is not None
    assert found.low is not None
    assert found.high is not None
    s, r, f = (
        m + sd / math.sqrt(n) * torch.randn(200_000, generator=generator).double()
        for m, sd in zip(means, spreads, strict=True)
    )
    ratios = (s - r) / (f - r)
    error = (found.high - found.low) / 2 / T_975[n - 1]
    assert error == pytest.approx(float(ratios.std()), rel=0.03)
    assert found.mean == pytest.approx(float(ratios.mean()), abs=0.01)


@pytest.mark.parametrize("full", [[0.8, 0.8], [0.7, 0.75], [math.nan, math.nan]])
def test_no_gap_where_full_data_is_no_better_than_random_images(full: list[float]) -> None:
    assert gap_closed([0.9, 0.9], [0.8, 0.8], full) is None


# --- ordered classes and several labels ---------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_kappa_is_that_of_an_independent_library(seed: int) -> None:
    from sklearn.metrics import cohen_kappa_score

    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(5, (80,), generator=draw)
    said = (labels + torch.randint(-1, 2, (80,), generator=draw)).clamp(0, 4)
    counts = confusion(said, labels, 5)
    expected = cohen_kappa_score(labels.numpy(), said.numpy(), weights="quadratic")
    assert quadratic_kappa(counts) == pytest.approx(expected)
    scores = evaluate_task("ordinal", torch.eye(5)[said] * 9, labels)
    assert scores["kappa"] == pytest.approx(expected)
    assert "kappa" not in evaluate_task("multi-class", torch.eye(5)[said] * 9, labels)


def test_kappa_by_hand_and_of_one_class() -> None:
    # O = [[1, 1], [0, 2]]: 1 of 4 wrong; by chance (2 x 3 + 2 x 1) / 16 = 1/2 are.
    assert quadratic_kappa(torch.tensor([[1, 1], [0, 2]])) == pytest.approx(0.5)
    assert math.isnan(quadratic_kappa(torch.tensor([[4, 0], [0, 0]])))


def test_scores_of_several_labels_are_means_of_each_ones_own() -> None:
    from sklearn.metrics import balanced_accuracy_score, f1_score, roc_auc_score

    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (60, 3), generator=draw)
    logits = 2 * torch.randn((60, 3), generator=draw) + labels
    found = evaluate_task("multi-label", logits, labels)
    said, truth = (logits > 0).long().numpy(), labels.numpy()
    assert found["accuracy"] == pytest.approx(float((said == truth).mean()))
    assert found["auc"] == pytest.approx(roc_auc_score(truth, logits.numpy(), average="macro"))
    parts = [balanced_accuracy_score(truth[:, c], said[:, c]) for c in range(3)]
    assert found["balanced_accuracy"] == pytest.approx(sum(parts) / 3)
    parts = [f1_score(truth[:, c], said[:, c], average="macro") for c in range(3)]
    assert found["f1"] == pytest.approx(sum(parts) / 3)
    assert torch.tensor(found["confusion"]).sum((1, 2)).tolist() == [60] * 3


def test_a_label_that_all_images_have_has_no_curve() -> None:
    labels = torch.tensor([[1, 0], [1, 1], [1, 0]])
    logits = torch.tensor([[1.0, -1.0], [1.0, 1.0], [1.0, -2.0]])
    assert evaluate_labels(logits, labels)["auc"] == 1.0
    assert math.isnan(evaluate_labels(logits[:, :1], labels[:, :1])["auc"])
