"""Methods against closed forms, brute force and plain textbook twins of a whole step."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medistill.augment import Augmentation
from medistill.backbones import Backbone, ConvNet, Network
from medistill.budget import Budget
from medistill.conformance import toy
from medistill.distill import distill
from medistill.errors import DataError, RunRefused, UsageError
from medistill.methods import (
    DC,
    DM,
    DSA,
    METHODS,
    Method,
    Task,
    gradient_matching,
    make,
    method_class,
)
from medistill.methods.base import choose, one_hot, pick, started
from medistill.methods.gradient_matching import NORM_IMAGES, distance, loops
from medistill.methods.herding import Herding, herd
from medistill.methods.kcenter import KCenter, spread_out
from medistill.methods.random import Random
from medistill.records import State, from_record, to_record
from medistill.rng import Rng
from medistill.sets import RealSet

NONE = Augmentation(kinds=())
SMALL = ConvNet(depth=1, width=8)


@dataclass(frozen=True)
class Pixels(Backbone):
    """A backbone whose features are the pixels themselves."""

    family: ClassVar[str] = "pixels"

    @property
    def name(self) -> str:
        return "pixels"

    def body(self, channels: int, shape: tuple[int, ...]) -> nn.Module:
        return nn.Flatten()


def task_of(
    real: RealSet | None = None,
    *,
    ipc: int = 2,
    backbone: Backbone = SMALL,
    augmentation: Augmentation = NONE,
) -> Task:
    """Return a small task, without augmentation unless it is given."""
    return Task(real or toy(), Budget(ipc=ipc), backbone, augmentation)


def normalized(task: Task) -> Tensor:
    """Return all real images as a network sees them, from the words of the specification."""
    card = task.real.card
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (card.mean, card.std))
    return (task.real.images.float() / 255 - mean) / std


def drawn(task: Task, at: Rng, name: str, count: int, c: int) -> Tensor:
    """Return the positions of the real images that a step draws for a class."""
    members = task.real.by_class[c]
    return pick(members, min(count, len(members)), at.at(name, c))


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    """Compare relative to the largest expected number."""
    torch.testing.assert_close(
        found, expected, rtol=0, atol=tolerance * float(expected.abs().max())
    )


# DM


def test_dm_with_pixels_as_features_follows_the_gap_of_class_means() -> None:
    task = task_of(ipc=3, backbone=Pixels())
    method = DM(lr_images=1.0, momentum=0.5)
    state = method.init(task, Rng(0))
    after, log = method.step(state, task, Rng(0))
    # A batch of 256 holds whole classes here, so the real mean is the mean of the class.
    gaps = torch.stack(
        [
            state["images"][3 * c : 3 * c + 3].mean(0) - normalized(task)[members].mean(0)
            for c, members in enumerate(task.real.by_class)
        ]
    )
    expected = 2 * gaps.repeat_interleave(3, 0) / 3
    close(state["images"] - after["images"], expected)
    close(after["velocity"], expected)
    assert log["loss"] == pytest.approx(float(gaps.square().sum()), rel=1e-4)


def test_dm_momentum_over_two_steps_by_hand() -> None:
    task = task_of(ipc=1, backbone=Pixels())
    method = DM(lr_images=0.3, momentum=0.5)
    state = method.init(task, Rng(0))
    x = state["images"]
    means = torch.stack([normalized(task)[m].mean(0) for m in task.real.by_class])
    g1 = 2 * (x - means)
    x1 = x - 0.3 * g1
    g2 = 2 * (x1 - means)
    x2 = x1 - 0.3 * (0.5 * g1 + g2)
    for _ in range(2):
        state, _ = method.step(state, task, Rng(0))
    close(state["images"], x2)
    close(state["velocity"], 0.5 * g1 + g2)
    assert int(state["step"]) == 2


def plain_dm(method: DM, state: State, task: Task, seed: int) -> tuple[Tensor, Tensor, float]:
    """One step of DM class by class: new images, velocity and loss."""
    at = Rng(seed).child("step", int(state["step"]))
    network = task.backbone.build(task.real.card, at.at("network"))
    images = state["images"].clone().requires_grad_()
    loss = torch.zeros(())
    for c in range(task.classes):
        index = drawn(task, at, "real", method.batch_real, c)
        own = images[c * task.ipc : (c + 1) * task.ipc]
        both = []
        for batch in (normalized(task)[index], own):
            draw = task.augmentation.draw(1, task.real.card.shape, at.at("augment", c))
            both.append(network.body(task.augmentation.apply(batch, draw)).flatten(1).mean(0))
        loss = loss + (both[0] - both[1]).pow(2).sum()
    loss.backward()
    assert images.grad is not None
    velocity = method.momentum * state["velocity"] + images.grad
    return images.detach() - method.lr_images * velocity, velocity, float(loss.detach())


@pytest.mark.parametrize("augmentation", [NONE, Augmentation()], ids=["plain", "augmented"])
def test_dm_equals_a_loop_over_classes(augmentation: Augmentation) -> None:
    task = task_of(toy(channels=3), ipc=3, augmentation=augmentation)
    method = DM(batch_real=7)
    state = method.init(task, Rng(4))
    kinds = set()
    for number in range(4):
        at = Rng(4).child("step", number)
        kinds |= {augmentation.draw(1, (8, 8), at.at("augment", c)).kind for c in range(3)}
        images, velocity, loss = plain_dm(method, state, task, 4)
        state, log = method.step(state, task, Rng(4))
        close(state["images"], images)
        close(state["velocity"], velocity)
        assert log["loss"] == pytest.approx(loss, rel=1e-4)
    assert len(kinds) > 3 or not augmentation.kinds


def test_dm_sees_all_images_of_a_batch_norm_network_at_once() -> None:
    task = task_of(backbone=ConvNet(depth=1, width=8, norm="batch"))
    method = DM()
    state = method.init(task, Rng(0))
    _, log = method.step(state, task, Rng(0))
    at = Rng(0).child("step", 0)
    network = task.backbone.build(task.real.card, at.at("network"))
    index = [drawn(task, at, "real", 256, c) for c in range(3)]
    features = network.features(normalized(task)[torch.cat(index)]).split([len(i) for i in index])
    own = network.features(state["images"]).split(2)
    gaps = [r.mean(0) - s.mean(0) for r, s in zip(features, own, strict=True)]
    loss = torch.stack(gaps).square().sum()
    assert log["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)


@pytest.mark.parametrize("augmentation", [NONE, Augmentation()], ids=["plain", "augmented"])
def test_dm_with_a_bank_equals_a_loop_over_the_whole_set(augmentation: Augmentation) -> None:
    task = task_of(toy(channels=3), ipc=2, augmentation=augmentation)
    method = DM(bank=3)
    task = dataclasses.replace(task, prepared=method.prepare(task, Rng(9)))
    state = method.init(task, Rng(1))
    losses = []
    for step in range(4):
        at = Rng(0).child("bank", step % 3)
        network = task.backbone.build(task.real.card, at.at("network"))
        draw = augmentation.draw(1, (8, 8), at.at("augment"))
        images = state["images"].clone().requires_grad_()
        loss = torch.zeros(())
        for c, members in enumerate(task.real.by_class):
            pair = normalized(task)[members], images[2 * c : 2 * c + 2]
            real, own = (network.features(augmentation.apply(x, draw)).mean(0) for x in pair)
            loss = loss + (real - own).square().sum()
        (gradient,) = torch.autograd.grad(loss, images)
        expected = state["images"] - (0.5 * state["velocity"] + gradient)
        state, log = method.step(state, task, Rng(1))
        close(state["images"], expected)
        losses.append(log["loss"])
        assert log["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
    assert len(set(losses)) == 4


def test_means_of_a_bank_are_averaged_over_draws() -> None:
    task = task_of(toy(channels=3), ipc=2, augmentation=Augmentation())
    real = task.real
    (means,) = DM(bank=2, draws=3).prepare(task, Rng(0)).values()
    for number, found in enumerate(means):
        at = Rng(0).child("bank", number)
        network = task.backbone.build(real.card, at.at("network"))
        shape, wanted = real.card.shape, torch.zeros_like(found)
        for d in range(3):
            draw = task.augmentation.draw(1, shape, at.at("augment", *([d] if d else [])))
            for c, members in enumerate(real.by_class):
                images = task.augmentation.apply(real.normalized(members), draw)
                wanted[c] += network.body(images).flatten(1).mean(0) / 3
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    one, many = DM(bank=2), DM(bank=2, draws=3)
    assert one.prepared_from(task) != many.prepared_from(task)
    with pytest.raises(UsageError, match="above 1 with a bank"):
        distill(DM(draws=2), task, seed=0, steps=1)
    # The synthetic side has a draw of its own in each step, so equal states part.
    task = dataclasses.replace(task, prepared={"means": means[:1].expand(2, -1, -1)})
    state = many.init(task, Rng(0))
    first = many.step(state, task, Rng(0))[0]["images"]
    later = many.step({**state, "step": torch.tensor(2)}, task, Rng(0))[0]["images"]
    assert not torch.equal(first, later)


@pytest.mark.parametrize("method", [DM(bank=1), Herding(), KCenter()])
def test_features_that_are_not_finite_are_refused(method: Method) -> None:
    real = toy()
    broken = dataclasses.replace(real, card=dataclasses.replace(real.card, std=(float("nan"),)))
    with pytest.raises(DataError, match="features that are not finite"):
        distill(method, task_of(broken), seed=0, steps=1)


def test_a_bank_needs_networks_that_see_each_image_alone() -> None:
    task = task_of(backbone=ConvNet(depth=1, width=8, norm="batch"))
    with pytest.raises(UsageError, match="another norm for a bank"):
        DM(bank=2).check(task)
    DM().check(task)


def test_presets_are_methods_with_some_fields_set() -> None:
    assert make("dm-bank", {"lr_images": 2.0}) == DM(bank=30, lr_images=2.0)
    assert make("dm", {}) == DM()
    assert make("dm-bank", {"bank": 5}) == DM(bank=5)


# The distance of gradients


def some_gradients() -> tuple[Tensor, ...]:
    """Return tensors shaped as the gradients of a small network."""
    shapes = [(4, 3, 3, 3), (4,), (4,), (5, 4, 3, 3), (5,), (2, 20), (2,)]
    draw = Rng(0).at("gradients")
    return tuple(torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes)


def plain_distance(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Row by row in numpy."""
    total = 0.0
    for g, h in zip(one, other, strict=True):
        if g.ndim == 1:
            continue
        for a, b in zip(g.numpy(), h.numpy(), strict=True):
            a, b = a.ravel(), b.ravel()
            norms = np.sqrt((a * a).sum()) * np.sqrt((b * b).sum())
            total += 1 - (a * b).sum() / (norms + 1e-6)
    return total


def test_distance_is_zero_at_equal_and_two_per_row_at_negated_gradients() -> None:
    gradients = some_gradients()
    negated = tuple(-g for g in gradients)
    rows = 4 + 5 + 2
    assert float(distance(gradients, gradients)) == pytest.approx(0.0, abs=1e-5)
    assert float(distance(gradients, negated)) == pytest.approx(2 * rows, abs=1e-5)
    assert float(distance(gradients, tuple(3 * g for g in gradients))) == pytest.approx(0, abs=1e-5)


def test_distance_of_vanished_gradients_is_one_per_row() -> None:
    gradients = some_gradients()
    zeros = tuple(torch.zeros_like(g) for g in gradients)
    assert float(distance(zeros, gradients)) == 11.0
    # Norms of 1e-3 make the 1e-6 of the denominator half of it.
    small = (torch.full((1, 1), 1e-3, dtype=torch.float64),)
    assert float(distance(small, small)) == pytest.approx(0.5)


def test_distance_leaves_one_dimensional_tensors_out() -> None:
    gradients = some_gradients()
    other = tuple(g if g.ndim > 1 else -7 * g for g in gradients)
    assert torch.equal(distance(gradients, other), distance(gradients, gradients))


def test_distance_equals_numpy_row_by_row() -> None:
    one, other = some_gradients(), tuple(g.flip(0) for g in some_gradients())
    assert float(distance(one, other)) == pytest.approx(plain_distance(one, other), rel=1e-12)


# DC and DSA


def test_loops_are_those_of_the_paper() -> None:
    table = {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}
    assert {ipc: loops(ipc) for ipc in table} == table
    assert loops(15) == (15, 38)  # 37.5, rounded up
    assert loops(10, 3) == (3, 50)
    assert loops(10, None, 4) == (10, 4)


def test_loops_exist_for_every_number_of_images() -> None:
    found = [loops(ipc) for ipc in range(1, 201)]
    assert [outer for outer, _ in found] == list(range(1, 201))
    inner = [epochs for _, epochs in found]
    assert all(a <= b for a, b in pairwise(inner[:10]))
    assert all(a >= b >= 10 for a, b in pairwise(inner[9:]))


def plain_match(
    method: DC | DSA,
    augmentation: Augmentation,
    state: State,
    task: Task,
    network: Network,
    at: Rng,
) -> tuple[Tensor, Tensor, float]:
    """One match, all classes in one graph: new images, velocity and loss."""
    parameters = list(network.parameters())
    images = state["images"].clone().requires_grad_()
    loss = torch.zeros(())
    for c in range(task.classes):
        real = normalized(task)[drawn(task, at, "real", method.batch_real, c)]
        own = images[c * task.ipc : (c + 1) * task.ipc]
        both = []
        for batch in (real, own):
            draw = augmentation.draw(1, task.real.card.shape, at.at("augment", c))
            logits = network(augmentation.apply(batch, draw))
            error = F.cross_entropy(logits, torch.full((len(batch),), c))
            both.append(torch.autograd.grad(error, parameters, create_graph=True))
        for real_g, own_g in zip(*both, strict=True):
            if real_g.ndim > 1:
                for a, b in zip(real_g, own_g, strict=True):
                    a, b = a.flatten(), b.flatten()
                    loss = loss + 1 - (a @ b) / (a.norm() * b.norm() + 1e-6)
    (gradient,) = torch.autograd.grad(loss, images)
    velocity = method.momentum * state["velocity"] + gradient
    return images.detach() - method.lr_images * velocity, velocity, float(loss.detach())


def plain_training(
    method: DC | DSA, augmentation: Augmentation, images: Tensor, task: Task, network: Network,
    epochs: int, at: Rng,
) -> None:  # fmt: skip
    """Train a network on the images, each epoch one batch, plain SGD."""
    parameters = list(network.parameters())
    labels = torch.arange(task.classes).repeat_interleave(task.ipc)
    for step in range(epochs):
        x = images
        if augmentation.kinds:
            draw = augmentation.draw(len(x), (8, 8), at.child("inner").at("augment", step))
            x = augmentation.apply(x, draw)
        gradients = torch.autograd.grad(F.cross_entropy(network(x), labels), parameters)
        with torch.no_grad():
            for p, g in zip(parameters, gradients, strict=True):
                p -= method.lr_network * g


@pytest.mark.parametrize("together", [False, True], ids=["by class", "together"])
@pytest.mark.parametrize("kind", [DC, DSA], ids=lambda kind: kind.name)
def test_gradient_matching_equals_one_graph_over_all_classes(
    kind: type[DC] | type[DSA], together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is chosen on a GPU is computed here too.
    monkeypatch.setattr(gradient_matching, "at_once", lambda *_: together)
    task = task_of(toy(channels=3), augmentation=Augmentation())
    used = NONE if kind is DC else Augmentation()  # DC never augments, whatever the task says
    method = kind(outer_loops=2, inner_epochs=5, batch_real=7)
    state = method.init(task, Rng(2))
    network = None
    for number in range(4):
        at = Rng(2).child("step", number)
        if number % 2 == 0:
            network = task.backbone.build(task.real.card, Rng(2).at("network", number // 2))
        assert network is not None
        images, velocity, loss = plain_match(method, used, state, task, network, at)
        if number % 2 == 0:
            plain_training(method, used, images, task, network, 5, at)
        state, log = method.step(state, task, Rng(2))
        assert log["loss"] == pytest.approx(loss, rel=1e-4)
        close(state["images"], images)
        close(state["velocity"], velocity, 1e-3)
        for name, value in network.state_dict().items():
            close(state[f"net.{name}"], value)
        # The twin goes on from the same numbers, so that rounding does not add up.
        network.load_state_dict({k[4:]: v for k, v in state.items() if k.startswith("net.")})


def test_the_network_trains_between_rounds_and_not_after_the_last() -> None:
    task = task_of()
    method = DC(outer_loops=2, inner_epochs=1)
    state = method.init(task, Rng(0))
    nets = []
    for _ in range(4):
        state, _ = method.step(state, task, Rng(0))
        nets.append(state["net.head.weight"])
    assert torch.equal(nets[0], nets[1])  # trained after round 0, kept after the last round
    assert not torch.equal(nets[1], nets[2])  # a fresh one in the second iteration


@pytest.mark.parametrize("kind", [DC, DSA], ids=lambda kind: kind.name)
def test_steps_are_iterations_times_outer_loops(kind: type[DC] | type[DSA]) -> None:
    real = toy(counts=(12, 12))
    assert kind(iterations=7).steps(task_of(real, ipc=10)) == 70
    assert kind(iterations=7, outer_loops=3).steps(task_of(real, ipc=10)) == 21


def test_batch_norm_statistics_come_from_sixteen_real_images_of_each_class() -> None:
    task = task_of(toy(counts=(20, 30, 9)), backbone=ConvNet(depth=1, width=8, norm="batch"))
    method = DC(outer_loops=1)
    state, _ = method.step(method.init(task, Rng(0)), task, Rng(0))
    at = Rng(0).child("step", 0)
    index = torch.cat([drawn(task, at, "norm", 16, c) for c in range(3)])
    assert (NORM_IMAGES, len(index)) == (16, 16 + 16 + 9)
    network = task.backbone.build(task.real.card, Rng(0).at("network", 0))
    maps = network.body[0](normalized(task)[index]).movedim(1, 0).flatten(1)  # type: ignore[index]
    close(state["net.body.1.running_mean"], maps.mean(1).detach())
    close(state["net.body.1.running_var"], maps.var(1).detach())


# Selection


def some_points(n: int = 12) -> Tensor:
    """Return points in three dimensions."""
    return torch.randn(n, 3, generator=Rng(1).at("points"))


def test_herding_equals_brute_force() -> None:
    for points in (some_points(), some_points() + 2, some_points()[[0, 0, 0, 1, 2, 3]]):
        x = points.double().numpy()
        mu = x.mean(0)
        w, chosen = mu.copy(), []
        for _ in range(5):
            k = max((i for i in range(len(x)) if i not in chosen), key=lambda i: (w @ x[i], -i))
            chosen.append(k)
            w = w + mu - x[k]
        assert herd(points, 5).tolist() == chosen


def test_herding_keeps_the_mean_better_than_the_first_images() -> None:
    points = some_points(200)
    gaps = [(points[i].mean(0) - points.mean(0)).norm() for i in (herd(points, 10), range(10))]
    assert gaps[0] < 0.5 * gaps[1]


@pytest.mark.parametrize("copies", [1, 4])
def test_kcenter_equals_brute_force(copies: int) -> None:
    points = some_points(5).repeat(copies, 1)
    x = points.double().numpy()

    def apart(i: int, j: int) -> float:
        return float(((x[i] - x[j]) ** 2).sum())

    chosen = [min(range(len(x)), key=lambda i: ((x[i] - x.mean(0)) ** 2).sum())]
    while len(chosen) < 5:
        free = [i for i in range(len(x)) if i not in chosen]
        chosen.append(max(free, key=lambda i: min(apart(i, s) for s in chosen)))
    assert spread_out(points, 5).tolist() == chosen


def test_kcenter_never_repeats_even_among_equal_points() -> None:
    assert sorted(spread_out(torch.ones(6, 2), 6).tolist()) == list(range(6))
    assert len(set(spread_out(some_points(5).repeat(4, 1), 18).tolist())) == 18


@pytest.mark.parametrize("kind", [Random, Herding, KCenter], ids=lambda kind: kind.name)
def test_selection_returns_real_images_of_their_class_without_repetition(
    kind: type[Method],
) -> None:
    task = task_of(ipc=9)  # all of the smallest class
    short = {} if kind is Random else {"feature_steps": 2}
    method = kind(**short)
    task = dataclasses.replace(task, prepared=method.prepare(task, Rng(0)))
    state = method.init(task, Rng(0))
    index = state["index"]
    assert len(index.unique()) == 27
    assert torch.equal(task.real.labels[index], one_hot(task).argmax(1))
    close(state["images"], normalized(task)[index])
    synthetic = method.finish(state, task, Rng(0))
    close(synthetic.images, task.real.images[index].float() / 255)
    assert method.steps(task) == 0
    assert synthetic.origin.real_pixels


@pytest.mark.parametrize("kind", [Random, Herding, KCenter], ids=lambda kind: kind.name)
def test_selection_cannot_claim_another_start(kind: type[Method]) -> None:
    with pytest.raises(UsageError, match="start is 'noise'"):
        from_record(kind, {"start": "noise"})
    state = Random().init(task_of(), Rng(0))
    forced: Any = dataclasses.replace(kind(), start="noise")  # type: ignore[type-var]
    assert forced.finish(state, task_of(), Rng(0)).origin.real_pixels


def test_herding_and_kcenter_choose_by_the_features_that_were_prepared() -> None:
    task = task_of(ipc=3)
    for method, chosen_by in (
        (Herding(feature_steps=3), herd),
        (KCenter(feature_steps=3), spread_out),
    ):
        ready = dataclasses.replace(task, prepared=method.prepare(task, Rng(5)))
        network = task.backbone.build(task.real.card, Rng(9).at("any"))
        network.load_state_dict(ready.prepared)
        features = network.features(normalized(task)).detach()
        chosen = [members[chosen_by(features[members], 3)] for members in task.real.by_class]
        assert torch.equal(method.init(ready, Rng(0))["index"], torch.cat(chosen))


def test_pick_repeats_only_when_there_are_too_few() -> None:
    members = torch.tensor([3, 5, 8, 13])
    for seed in range(5):
        assert sorted(pick(members, 4, Rng(seed).at("pick")).tolist()) == members.tolist()
        assert len(set(pick(members, 3, Rng(seed).at("pick")).tolist())) == 3
        more = pick(members, 9, Rng(seed).at("pick"))
        assert len(more) == 9
        assert set(more.tolist()) <= set(members.tolist())


# Starts


def test_noise_is_standard_normal_on_normalized_images() -> None:
    task = task_of(toy(counts=(60, 60, 60)), ipc=60)
    images = started(task, "noise", Rng(0))["images"]
    assert images.shape == (180, 1, 8, 8)
    assert abs(float(images.mean())) < 0.03
    assert float(images.std()) == pytest.approx(1, abs=0.03)


def test_real_starts_are_images_of_their_class() -> None:
    task = task_of(ipc=4)
    state = started(task, "real", Rng(0))
    pixels = normalized(task)
    for k, image in enumerate(state["images"]):
        where = (pixels - image).flatten(1).abs().amax(1).argmin()
        close(pixels[where], image)
        assert int(task.real.labels[where]) == k // 4
    assert len(state["images"].flatten(1).unique(dim=0)) == 12


def test_class_means_start_apart_by_a_tenth_of_the_spread() -> None:
    task = task_of(toy(counts=(300, 300)), ipc=300)
    images = started(task, "class-mean", Rng(0))["images"].view(2, 300, 8, 8)
    for own, members in zip(images, task.real.by_class, strict=True):
        pixels = normalized(task)[members][:, 0]
        spread = pixels.std(0, correction=0)
        assert float(((own.mean(0) - pixels.mean(0)) / spread).abs().max()) < 0.03
        assert float(own.std(0).div(spread).mean()) == pytest.approx(0.1, abs=0.005)
        assert len(own.flatten(1).unique(dim=0)) == 300


def test_the_mean_of_a_single_image_is_refused_as_a_start() -> None:
    task = task_of(toy(counts=(9, 1, 9)), ipc=1)
    with pytest.raises(RunRefused, match="the mean of one is that image"):
        started(task, "class-mean", Rng(0))
    assert len(started(task, "noise", Rng(0))["images"]) == 3


def test_an_unknown_start_is_refused() -> None:
    unknown: Any = "zeros"
    with pytest.raises(UsageError, match="found start 'zeros'; expected noise, real or class-mean"):
        started(task_of(), unknown, Rng(0))


@pytest.mark.parametrize("kind", [DC, DSA, DM], ids=lambda kind: kind.name)
def test_origin_says_whether_real_pixels_are_in(kind: type[Any]) -> None:
    for start, expected in (("noise", False), ("class-mean", False), ("real", True)):
        method, task = kind(start=start), task_of()
        origin = method.finish(method.init(task, Rng(3)), task, Rng(3)).origin
        assert (origin.real_pixels, origin.start, origin.seed) == (expected, start, 3)
        assert origin.settings == to_record(method)


# Settings and tasks


def test_defaults_are_those_of_the_papers_but_for_the_start() -> None:
    assert (DM().iterations, DM().lr_images, DM().momentum, DM().batch_real) == (
        20_000,
        1,
        0.5,
        256,
    )
    for method in (DC(), DSA()):
        assert (method.iterations, method.lr_images, method.momentum) == (1000, 0.1, 0.5)
        assert (method.lr_network, method.batch_real, method.batch_synthetic) == (0.01, 256, 256)
    assert {kind().start for kind in (DC, DSA, DM)} == {"noise"}


def test_as_in_paper_sets_the_start_and_the_rate_of_large_budgets() -> None:
    few, many = task_of(), task_of(toy(counts=(100, 100)), ipc=100)
    assert DM().as_in_paper(few) == DM(start="real")
    assert DM().as_in_paper(many) == DM(start="real", lr_images=10.0)
    assert DSA().as_in_paper(few) == DSA(start="real")
    assert DC(start="real").as_in_paper(few) == DC()
    assert Random().as_in_paper(few) == Random()


def test_methods_are_found_by_name() -> None:
    assert [method_class(kind.name) for kind in METHODS] == list(METHODS)
    with pytest.raises(UsageError, match="found no method 'dmm': did you mean"):
        method_class("dmm")


def test_a_task_never_mirrors_images_whose_mirror_image_has_another_class() -> None:
    real = toy()
    sided = dataclasses.replace(real, card=dataclasses.replace(real.card, flips=False))
    kinds = Task(sided, Budget(ipc=1), SMALL).augmentation.kinds
    assert "flip" in Task(real, Budget(ipc=1), SMALL).augmentation.kinds
    assert set(kinds) == set(Augmentation().kinds) - {"flip"}


# several labels, unequal budgets


def test_dm_of_several_labels_follows_the_gap_of_the_means_of_each_label() -> None:
    real = toy("multi-label")
    task = task_of(real, ipc=3, backbone=Pixels())
    method = DM(lr_images=1.0, momentum=0.5)
    state = method.init(task, Rng(0))
    images, labels = state["images"], state["labels"]
    after, log = method.step(state, task, Rng(0))
    gradient, loss = torch.zeros_like(images), 0.0
    for c in range(3):
        mine = [i for i in range(9) if labels[i, c] == 1]
        theirs = [i for i in range(len(real)) if real.labels[i, c] == 1]
        gap = images[mine].mean(0) - normalized(task)[theirs].mean(0)
        loss += float(gap.square().sum())
        for i in mine:
            gradient[i] += 2 * gap / len(mine)
    close(after["images"], images - gradient)
    assert log["loss"] == pytest.approx(loss, rel=1e-4)


def test_several_labels_share_one_draw_and_those_of_one_have_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[Any] = []
    plain = Augmentation.draw

    def noted(*given: Any) -> Any:
        drawn.append(plain(*given))
        return drawn[-1]

    monkeypatch.setattr(Augmentation, "draw", noted)
    different = {}
    for kind in ("multi-label", "multi-class"):
        drawn.clear()
        task = task_of(toy(kind), augmentation=Augmentation(kinds=("color",)))
        DM().step(DM().init(task, Rng(0)), task, Rng(0))
        different[kind] = len({float(draw.values["brightness"]) for draw in drawn})
    assert different == {"multi-label": 1, "multi-class": 3}


def test_several_labels_are_drawn_until_all_occur_alike() -> None:
    real = toy("multi-label")
    none = torch.cat([real.labels, torch.zeros(5, 3, dtype=torch.int64)])
    images = torch.cat([real.images, real.images[:5]])
    real = dataclasses.replace(real, images=images, labels=none)
    index = choose(real, (), 12, Rng(0).at("choice"))
    assert len(set(index.tolist())) == 12
    counts = real.labels[index].sum(0).tolist()
    assert max(counts) - min(counts) <= 1
    assert 2 <= int((real.labels[index].sum(1) == 0).sum()) <= 4
    other = choose(real, (), 12, Rng(1).at("choice"))
    assert index.tolist() != other.tolist()
    # More than there are: every image once before any stands twice.
    many = choose(real, (), len(real) + 3, Rng(0).at("choice"))
    assert set(many[: len(real)].tolist()) == set(range(len(real)))


def test_a_class_mean_of_several_labels_is_refused() -> None:
    with pytest.raises(UsageError, match="expected noise or real"):
        started(task_of(toy("multi-label")), "class-mean", Rng(0))


@pytest.mark.parametrize("start", ["noise", "real"])
def test_the_labels_of_several_are_those_of_real_images(start: str) -> None:
    task = task_of(toy("multi-label"), ipc=3)
    state = started(task, start, Rng(0))
    index = choose(task.real, (), 9, Rng(0).at("start"))
    assert torch.equal(state["labels"], task.real.labels[index].float())
    if start == "real":
        assert torch.equal(state["images"], task.real.normalized(index))


def test_unequal_classes_are_dealt_and_split_alike() -> None:
    real = toy(counts=(12, 3, 9))
    task = Task(real, Budget(images=8, share="proportional"), Pixels(), NONE)
    assert task.counts == (4, 1, 3)
    for start in ("noise", "real", "class-mean"):
        state = started(task, start, Rng(0))
        assert state["labels"].argmax(1).tolist() == [0] * 4 + [1] + [2] * 3
    method = DM(lr_images=1.0, momentum=0.0)
    state = method.init(task, Rng(0))
    after, _ = method.step(state, task, Rng(0))
    first, count = 5, 3
    gap = state["images"][first:].mean(0) - normalized(task)[real.by_class[2]].mean(0)
    close(after["images"][first:], state["images"][first:] - 2 * gap / count)
    # From 3 real images the class of 1 image still has a mean of its own.
    gap = state["images"][4] - normalized(task)[real.by_class[1]].mean(0)
    close(after["images"][4], state["images"][4] - 2 * gap)
