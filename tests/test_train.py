"""Training against torch's own optimizer in a plain loop."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from medistill.augment import Augmentation
from medistill.backbones import Backbone, ConvNet, Network
from medistill.data import load
from medistill.errors import DataError
from medistill.records import state_digest, to_record
from medistill.rng import Rng
from medistill.sets import Loss, Recipe
from medistill.train import (
    RealImages,
    TensorImages,
    balanced_index,
    batch_index,
    check_kind,
    fit,
    fit_together,
    gradient,
    losses,
)

REAL = load("phantom:n=60,size=16").train
SMALL = ConvNet(depth=2, width=8)
BATCH_NORM = ConvNet(depth=2, width=8, norm="batch")
NONE = to_record(Augmentation(kinds=()))


def recipe(**changes: object) -> Recipe:
    plain = Recipe(
        mean=REAL.card.mean,
        std=REAL.card.std,
        backbone={},
        augmentation=NONE,
        lr=0.05,
        steps=8,
        stop=8,
        batch=24,
    )
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


def network_of(backbone: Backbone = SMALL) -> Network:
    return backbone.build(REAL.card, Rng(0).at("network"))


def plain_loop(network: Network, images: Tensor, labels: Tensor, by: Recipe, rng: Rng) -> None:
    """Train as a textbook would: shuffled epochs, torch.optim.SGD, a step schedule."""
    optimizer = torch.optim.SGD(
        network.parameters(), lr=by.lr, momentum=by.momentum, weight_decay=by.weight_decay
    )
    step = 0
    while step < by.stop:
        epoch = step // -(-len(images) // by.batch)
        order = torch.arange(len(images))
        if len(images) > by.batch:
            order = torch.randperm(len(images), generator=rng.at("order", epoch))
        for start in range(0, len(images), by.batch):
            if step == by.stop:
                break
            part = order[start : start + by.batch]
            for group in optimizer.param_groups:
                group["lr"] = by.lr if 2 * step < by.steps else by.lr / 10
            optimizer.zero_grad()
            F.cross_entropy(network(images[part]), labels[part]).backward()
            optimizer.step()
            step += 1


@pytest.mark.parametrize("backbone", [SMALL, BATCH_NORM], ids=lambda b: b.name)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"momentum": 0.0, "weight_decay": 0.0},
        {"weight_decay": 0.1},
        {"steps": 7, "stop": 5},
        {"batch": 60},
        {"batch": 1000},
        {"batch": 59, "stop": 4},
    ],
    ids=lambda changes: "-".join(map(str, changes)) or "default",
)
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_fit_is_torch_sgd_in_a_plain_loop(
    changes: dict[str, object], soft: bool, backbone: Backbone, untouched_generator: None
) -> None:
    by, rng = recipe(**changes), Rng(3).child("student")
    images, labels = REAL.normalized(torch.arange(len(REAL))), REAL.labels
    if soft:
        labels = 0.8 * F.one_hot(labels, 2).float() + 0.1
    mine, other = network_of(backbone), network_of(backbone)
    fit(mine, TensorImages(images, labels), by, rng)
    plain_loop(other, images, labels, by, rng)
    for a, b in zip(mine.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)
    start = network_of(backbone)
    assert not torch.allclose(mine.head.weight, start.head.weight, atol=1e-3)


def test_a_shorter_stop_is_the_same_path_cut_off() -> None:
    seen: dict[int, str] = {}
    data, rng = RealImages(REAL), Rng(0)
    whole = network_of()

    def note(step: int, loss: float) -> None:
        seen[step] = state_digest(whole.state_dict())

    fit(whole, data, recipe(steps=8, stop=8), rng, marks=(3, 6), on_mark=note)
    for stop in (3, 6):
        cut = network_of()
        fit(cut, data, recipe(steps=8, stop=stop), rng)
        assert state_digest(cut.state_dict()) == seen[stop]


def test_marks_are_called_after_their_steps_with_the_loss() -> None:
    seen: list[tuple[int, float]] = []
    by = recipe(stop=5)
    last = fit(
        network_of(),
        RealImages(REAL),
        by,
        Rng(0),
        marks=(1, 5, 99),
        on_mark=lambda step, loss: seen.append((step, loss)),
    )
    assert [step for step, _ in seen] == [1, 5]
    assert seen[-1][1] == last
    index = batch_index(len(REAL), by.batch, 0, Rng(0))
    first = F.cross_entropy(network_of()(REAL.normalized(index)), REAL.labels[index])
    assert seen[0][1] == pytest.approx(float(first.detach()), rel=1e-5)


@pytest.mark.parametrize("kinds", [(), Augmentation().kinds], ids=["plain", "augmented"])
def test_one_seed_gives_one_result(kinds: tuple[str, ...], untouched_generator: None) -> None:
    by = recipe(augmentation=to_record(Augmentation(kinds=kinds)))  # type: ignore[arg-type]
    results = []
    for seed in (0, 0, 1):
        network = network_of()
        fit(network, RealImages(REAL), by, Rng(seed))
        results.append(state_digest(network.state_dict()))
        torch.rand(1, generator=torch.Generator())  # foreign draws change nothing
    assert results[0] == results[1] != results[2]


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_networks_trained_at_once_are_those_trained_in_turn(
    soft: bool, untouched_generator: None
) -> None:
    by = recipe(augmentation=to_record(Augmentation(kinds=("crop", "flip"))), weight_decay=0.1)
    images, labels = REAL.normalized(torch.arange(len(REAL))), REAL.labels
    if soft:
        labels = 0.8 * F.one_hot(labels, 2).float() + 0.1
    data = [TensorImages(images[i : i + 40], labels[i : i + 40]) for i in (0, 10, 20)]
    rngs = [Rng(seed).child("student") for seed in range(3)]

    def fresh() -> list[Network]:
        return [SMALL.build(REAL.card, Rng(seed).at("network")) for seed in range(3)]

    together, alone = fresh(), fresh()
    losses = fit_together(together, data, by, rngs)
    for network, one, rng, loss in zip(alone, data, rngs, losses, strict=True):
        assert loss == pytest.approx(fit(network, one, by, rng), abs=1e-4)
    for network, other in zip(together, alone, strict=True):
        for a, b in zip(network.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5)
    with pytest.raises(ValueError, match="batch norm"):
        fit_together([network_of(BATCH_NORM)] * 2, data[:2], by, rngs[:2])


def test_augmentation_of_the_recipe_is_applied() -> None:
    results = []
    for kinds in ((), ("cutout",)):
        network = network_of()
        augmentation = to_record(Augmentation(kinds=kinds))  # type: ignore[arg-type]
        fit(network, RealImages(REAL), recipe(augmentation=augmentation), Rng(0))
        results.append(state_digest(network.state_dict()))
    assert results[0] != results[1]


@pytest.mark.parametrize(("n", "batch"), [(60, 24), (7, 3), (6, 3), (5, 4)])
def test_batches_of_an_epoch_hold_every_image_once(n: int, batch: int) -> None:
    rng, per_epoch = Rng(0), -(-n // batch)
    epochs = []
    for epoch in range(3):
        parts = [batch_index(n, batch, epoch * per_epoch + i, rng) for i in range(per_epoch)]
        assert [len(part) for part in parts[:-1]] == [batch] * (per_epoch - 1)
        assert len(parts[-1]) == n - batch * (per_epoch - 1)
        order = torch.cat(parts).tolist()
        assert sorted(order) == list(range(n))
        epochs.append(order)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("n", [3, 4])
def test_a_set_no_larger_than_a_batch_is_taken_whole(n: int) -> None:
    assert batch_index(n, 4, 5, Rng(0)).tolist() == list(range(n))


@pytest.mark.parametrize("backbone", [SMALL, BATCH_NORM], ids=lambda b: b.name)
def test_gradient_in_blocks_is_that_of_the_whole_batch(backbone: Backbone) -> None:
    images = REAL.normalized(torch.arange(50))
    found, loss = gradient(network_of(backbone), images, REAL.labels[:50])
    network = network_of(backbone)
    whole = F.cross_entropy(network(images), REAL.labels[:50])
    assert loss == pytest.approx(float(whole.detach()), rel=1e-5)
    for a, b in zip(found, torch.autograd.grad(whole, list(network.parameters())), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_batch_norm_sees_a_batch_whole() -> None:
    network = network_of(BATCH_NORM)
    images = REAL.normalized(torch.arange(50))
    gradient(network, images, REAL.labels[:50])
    tracked = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert [int(m.num_batches_tracked) for m in tracked] == [1, 1]


def test_balanced_index_repeats_images_of_the_smaller_class_evenly() -> None:
    keep = torch.cat([REAL.by_class[0], REAL.by_class[1][:7]])
    uneven = dataclasses.replace(REAL, images=REAL.images[keep], labels=REAL.labels[keep])
    index = balanced_index(uneven)
    assert uneven.labels[index].bincount().tolist() == [30, 30]
    times = index.bincount()
    assert times[:30].tolist() == [1] * 30
    assert sorted(times[30:].tolist()) == [4] * 5 + [5] * 2


@pytest.mark.parametrize(
    "change", [{"classes": ("a", "b")}, {"channels": 3}, {"shape": (8, 8)}], ids=str
)
def test_data_of_another_kind_is_refused(change: dict[str, object]) -> None:
    other = dataclasses.replace(REAL.card, **change)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=f"found {next(iter(change))}"):
        check_kind(other, REAL.card)
    check_kind(dataclasses.replace(REAL.card, name="another"), REAL.card)


# --- losses -------------------------------------------------------------------------------------


def test_ordinal_loss_by_hand() -> None:
    logits = torch.tensor([[0.0, 1.0, 3.0]])
    weights = torch.tensor([1.0, 1 / torch.e, torch.e**-4])  # of distances 0, 1 and 2 from class 0
    expected = -(weights / weights.sum() * logits.log_softmax(1)).sum()
    for labels in (torch.tensor([0]), torch.tensor([[1.0, 0.0, 0.0]])):
        assert losses("ordinal", logits, labels).tolist() == pytest.approx([float(expected)])
    mixed = losses("ordinal", logits, torch.tensor([[0.5, 0.0, 0.5]]))
    ends = losses("ordinal", logits.expand(2, -1), torch.tensor([0, 2]))
    assert mixed.tolist() == pytest.approx([float(ends.mean())])


def test_binary_loss_by_hand() -> None:
    logits, labels = torch.tensor([[2.0, -1.0]]), torch.tensor([[1, 0]])
    expected = -(torch.sigmoid(logits[0, 0]).log() + torch.sigmoid(-logits[0, 1]).log()) / 2
    assert losses("binary-cross-entropy", logits, labels).tolist() == pytest.approx(
        [float(expected)]
    )


@pytest.mark.parametrize("kind", ["ordinal", "binary-cross-entropy"])
def test_fit_follows_the_loss_of_the_recipe(kind: Loss) -> None:
    images = REAL.normalized(torch.arange(60))
    labels = F.one_hot(REAL.labels, 2).float()
    labels[::2] = 1.0 if kind != "ordinal" else 0.5
    by = recipe(loss=kind, momentum=0.0, weight_decay=0.0, stop=1, batch=60)
    data = TensorImages(images, labels)
    mine, plain, together = network_of(), network_of(), network_of()
    fit(mine, data, by, Rng(0))
    fit_together([together], [data], by, [Rng(0)])
    loss = losses(kind, plain(images), labels).mean()
    parameters = list(plain.parameters())
    for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        p.data -= by.lr * g
    for a, b, c in zip(mine.parameters(), together.parameters(), parameters, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(b, c, rtol=1e-4, atol=1e-6)


def test_images_with_several_labels_stand_once_in_the_full_arm() -> None:
    card = dataclasses.replace(REAL.card, task="multi-label")
    several = dataclasses.replace(REAL, card=card, labels=F.one_hot(REAL.labels, 2))
    assert balanced_index(several).tolist() == list(range(60))
