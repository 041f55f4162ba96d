"""Numbers of variation against closed forms, known dimensions and slow twins."""

import dataclasses
import math

import pytest
import torch

from medistill.data import load
from medistill.errors import DataError
from medistill.sets import RealSet
from medistill.variation import (
    fisher_ratio,
    levina_bickel,
    sharpness,
    two_nn,
    variation,
    vendi,
)


def drawn(count: int, dimension: int, inside: int = 20) -> torch.Tensor:
    """Return points of a linear piece of so many dimensions, turned in a larger space."""
    generator = torch.Generator().manual_seed(dimension)
    points = torch.rand(count, dimension, generator=generator, dtype=torch.float64)
    turn = torch.randn(dimension, inside, generator=generator, dtype=torch.float64)
    return points @ torch.linalg.qr(turn.T).Q.T


@pytest.mark.parametrize("dimension", [1, 2, 5])
def test_estimators_find_a_known_dimension(dimension: int) -> None:
    points = drawn(1500, dimension)
    distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    for found in (two_nn(distances), levina_bickel(distances, 10)):
        assert found == pytest.approx(dimension, rel=0.12)
    # Scale has no say, nor have copies.
    assert two_nn(3 * distances) == pytest.approx(two_nn(distances))
    twice = torch.cat([points, points[:40]])
    exact = torch.cdist(twice, twice, compute_mode="donot_use_mm_for_euclid_dist")
    assert two_nn(exact) == pytest.approx(two_nn(distances), rel=1e-9)


def test_dimensions_equal_a_plain_loop() -> None:
    points = drawn(30, 3)
    distances = torch.cdist(points, points)
    logs, inverses = [], []
    for i in range(30):
        near = sorted(float(distances[i, j]) for j in range(30) if j != i)
        logs.append(math.log(near[1] / near[0]))
        inverses.append(sum(math.log(near[4] / near[j]) for j in range(4)) / 4)
    logs = sorted(logs)[:27]
    heights = [-math.log(1 - i / 30) for i in range(1, 28)]
    slope = sum(x * y for x, y in zip(logs, heights, strict=True)) / sum(x * x for x in logs)
    assert two_nn(distances) == pytest.approx(slope)
    assert levina_bickel(distances, 5) == pytest.approx(30 / sum(inverses))


def test_the_fisher_ratio_equals_a_plain_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(40, 7, generator=generator, dtype=torch.float64)
    labels = torch.arange(40) % 3
    features += labels.unsqueeze(1)
    between = within = 0.0
    mean = sum(features) / 40
    for label in range(3):
        part = [row for row, own in zip(features, labels, strict=True) if own == label]
        center = sum(part) / len(part)  # type: ignore[arg-type]
        between += len(part) * float(((center - mean) ** 2).sum())
        within += sum(float(((row - center) ** 2).sum()) for row in part)
    assert fisher_ratio(features, labels) == pytest.approx(between / within)
    assert fisher_ratio(torch.ones(4, 2), torch.arange(4) % 2) == math.inf


def test_the_vendi_score_counts_modes() -> None:
    modes = torch.eye(5).repeat_interleave(6, 0)
    assert vendi(modes) == pytest.approx(5)
    assert vendi(7 * modes) == pytest.approx(5)
    uneven = torch.cat([torch.eye(2)[:1].repeat(3, 1), torch.eye(2)[1:]])
    assert vendi(uneven) == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))


def test_sharpness_is_one_over_the_least_distance_between_classes() -> None:
    points = torch.tensor([[0.0], [1.0], [3.0], [3.0]])
    labels = torch.tensor([0, 0, 1, 0])
    # The copies at 3 differ in label and are left out; 1 and 3 stand next.
    assert sharpness(torch.cdist(points, points), labels) == pytest.approx(0.5)
    assert sharpness(torch.cdist(points, points), torch.zeros(4)) == 0


def test_classes_that_differ_more_have_a_larger_ratio_and_more_modes() -> None:
    found = [variation(load(f"phantom:classes=4,n=300,variation={v}").train) for v in (0, 0.5, 1)]
    assert found[0].fisher < found[1].fisher < found[2].fisher
    assert found[0].modes < found[2].modes
    again = variation(load("phantom:classes=4,n=300,variation=0").train)
    assert dataclasses.asdict(again) == dataclasses.asdict(found[0])


def test_duplicates_and_frequencies_are_counted() -> None:
    real = load("phantom:n=40").train
    images = torch.cat([real.images[:15], real.images[:5]])
    labels = torch.tensor([0] * 15 + [1] * 5)
    found = variation(RealSet(images, labels, real.card))
    assert found.duplicates == pytest.approx(0.25)
    assert found.majority == 0.75
    assert found.entropy == pytest.approx(
        -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(2)
    )


def test_what_cannot_be_measured_is_told() -> None:
    with pytest.raises(DataError, match="several labels"):
        variation(load("phantom:task=multi-label,n=60").train)
    real = load("phantom:n=40").train
    same = RealSet(real.images[:1].repeat(4, 1, 1, 1), torch.tensor([0, 1, 0, 1]), real.card)
    with pytest.raises(DataError, match="found 1 different"):
        variation(same)
