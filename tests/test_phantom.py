"""The phantom: same seed same bits, independent splits, and a difficulty that one number sets."""

import pytest
import torch

from medistill.data import inspect, load
from medistill.errors import UsageError
from medistill.sets import RealSet, Splits

Untouched = pytest.mark.usefixtures("untouched_generator")


@Untouched
def test_same_seed_same_bits() -> None:
    one, same = load("phantom:n=300", seed=3), load("phantom:n=300", seed=3)
    assert one.train.card.digest == same.train.card.digest
    assert load("phantom:n=300", seed=4).train.card.digest != one.train.card.digest
    named = load("phantom:n=300,seed=3", seed=9)
    assert torch.equal(named.train.images, one.train.images)


def test_defaults() -> None:
    splits = load("phantom")
    assert [len(part) for part in splits] == [1000, 200, 500]
    card = splits.train.card
    assert (card.name, card.classes, card.shape) == ("phantom", ("normal", "nodule"), (28, 28))
    assert card.license == "CC0 1.0"
    assert torch.bincount(splits.train.labels).tolist() == [500, 500]
    assert inspect(splits)["findings"] == []


@pytest.mark.parametrize("variation", [0, 0.5, 1])
def test_every_option_shapes_the_set(variation: float) -> None:
    splits = load(f"phantom:variation={variation},classes=12,size=20,channels=3,n=120")
    assert tuple(splits.train.images.shape) == (120, 3, 20, 20)
    assert torch.bincount(splits.val.labels, minlength=12).tolist() == [2] * 12
    assert splits.train.card.classes[0] == ("normal" if variation < 0.5 else "head CT")
    assert len(set(splits.train.card.classes)) == 12
    # Neither black nor burned out: an image that says nothing would be a broken law.
    for positions in splits.train.by_class:
        pixels = splits.train.images[positions].float() / 255
        assert 0.05 < pixels.mean() < 0.75
        assert pixels.std() > 0.1


@pytest.mark.parametrize(
    "options", ["variation=1.5", "classes=1", "classes=13", "size=8", "channels=2", "n=19", "n=x"]
)
def test_an_option_out_of_range_is_refused(options: str) -> None:
    with pytest.raises(UsageError, match=options.split("=")[0]):
        load(f"phantom:{options}")


def linear_accuracy(splits: Splits) -> float:
    """Test accuracy of ridge regression on pixels."""

    def rows(part: RealSet) -> torch.Tensor:
        pixels = part.normalized(torch.arange(len(part))).flatten(1)
        return torch.cat([pixels, torch.ones(len(part), 1)], 1)

    x, y = rows(splits.train), splits.train.labels.float() * 2 - 1
    weights = torch.linalg.solve(x.T @ x + 1000 * torch.eye(x.shape[1]), x.T @ y)
    return float(((rows(splits.test) @ weights > 0) == (splits.test.labels == 1)).float().mean())


def test_variation_sets_the_difficulty() -> None:
    low, middle, high = (linear_accuracy(load(f"phantom:variation={v}")) for v in (0, 0.35, 1))
    assert 0.6 < low < 0.85
    assert low + 0.1 < middle
    assert high > 0.99
