"""Trajectory methods: the adjoint against the unrolled graph, and each loss against its formula."""

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path as FilePath
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from typer.testing import CliRunner

from medistill import model
from medistill.arms import _by_weight
from medistill.augment import Augmentation
from medistill.backbones import ConvNet
from medistill.budget import Budget
from medistill.cli import app
from medistill.compute import Compute
from medistill.conformance import toy
from medistill.data import load
from medistill.distill import Run, distill, distill_to
from medistill.errors import DataError, RunRefused, UsageError
from medistill.evaluate import evaluate
from medistill.experts import _Crew
from medistill.features import whitening_of
from medistill.methods import ATT, DATM, FTD, MTT, TESLA, HoPTM, Task
from medistill.methods.base import started
from medistill.methods.datm import PAPER as DATM_PAPER
from medistill.methods.hop_tm import angles
from medistill.methods.mtt import PAPER, nearest_row
from medistill.methods.trajectory_matching import (
    Path,
    ending,
    expert_at,
    student_of,
)
from medistill.pixels import denormalize
from medistill.prepare import prepared
from medistill.records import State, load_state, save_state
from medistill.rng import Rng
from medistill.sets import RealSet, SyntheticSet
from medistill.train import losses
from medistill.unroll import Step, Student, named, plan, pull_back, vector_of, walk
from test_methods import NONE, Pixels, task_of

SMALL: dict[str, Any] = {
    "experts": 2,
    "student_steps": 4,
    "max_start": 2,
    "expert_epochs": 2,
    "patience": 0,
}
DRAWS = Augmentation()


@dataclasses.dataclass
class Setting:
    """A student in float64, synthetic images and where it should arrive."""

    student: Student
    start: Tensor
    target: Tensor
    images: Tensor
    labels: Tensor
    rate: Tensor

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.images, self.labels, self.rate, self.start


def setting(n: int = 6, channels: int = 3, seed: int = 0) -> Setting:
    """Return soft labels, images of 8 x 8 and a small ConvNet."""
    rng = Rng(seed)
    card = toy(channels=channels).card
    network = ConvNet(depth=2, width=4).build(card, rng.at("network")).double()
    start = vector_of(network)
    kind: dict[str, Any] = {"dtype": torch.float64}
    return Setting(
        Student(network),
        start,
        start + 0.01 * torch.randn(len(start), generator=rng.at("target"), **kind),
        torch.randn(n, channels, 8, 8, generator=rng.at("images"), **kind),
        torch.randn(n, 3, generator=rng.at("labels"), **kind).softmax(1),
        torch.tensor(0.05, **kind),
    )


def unrolled(
    given: Setting, steps: Sequence[Step], momentum: float, detached: bool = False
) -> list[Tensor]:
    """Return all vectors with the whole graph behind them, the textbook way."""
    images, labels, rate, theta = given.leaves
    network, velocity, found = given.student.network, torch.zeros_like(theta), [theta]
    for where, draw in steps:
        seen = DRAWS.apply(images[where], draw)
        at = theta.detach().requires_grad_() if detached else theta
        logits = functional_call(network, named(network, at), (seen,))
        loss = losses("cross-entropy", logits, labels[where]).mean()
        (g,) = torch.autograd.grad(loss, at, create_graph=True)
        velocity = momentum * velocity + g
        theta = theta - rate * velocity
        found.append(theta)
    return found


def requiring(given: Setting) -> Setting:
    """Return the same setting with leaves that ask for a gradient."""
    parts = {f: getattr(given, f).clone().requires_grad_() for f in ("images", "labels", "rate")}
    return dataclasses.replace(given, start=given.start.clone().requires_grad_(), **parts)


@pytest.mark.parametrize(
    ("batch", "momentum"), [(100, 0.0), (4, 0.0), (4, 0.7)], ids=["whole", "batches", "momentum"]
)
def test_the_adjoint_is_the_unrolled_gradient(batch: int, momentum: float) -> None:
    given = setting()
    steps = plan(6, batch, 7, DRAWS, (8, 8), Rng(0))
    leaves = requiring(given)
    thetas = unrolled(leaves, steps, momentum)
    loss = (thetas[-1] - given.target).square().sum() + thetas[3].pow(3).sum()
    expected = torch.autograd.grad(loss, leaves.leaves)
    walked = walk(given.student, given.start, *given.leaves[:3], steps, DRAWS, momentum=momentum)
    for own, other in zip(walked, thetas, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-12)
    by = {7: 2 * (walked[-1] - given.target), 3: 3 * walked[3].square()}
    found = pull_back(given.student, walked, *given.leaves[:3], steps, DRAWS, by, momentum=momentum)
    for own, other in zip(found, expected, strict=True):
        assert float((own - other).abs().max() / other.abs().max()) < 1e-12


class _Distance(torch.autograd.Function):
    """The loss of a walk, whose derivative is `pull_back`'s."""

    @staticmethod
    def forward(
        ctx: Any, images: Tensor, labels: Tensor, rate: Tensor, start: Tensor, given: Setting
    ) -> Tensor:
        ctx.steps = plan(len(images), 2, 3, NONE, (8, 8), Rng(0))
        ctx.given, ctx.leaves = given, (images.detach(), labels.detach(), rate.detach())
        ctx.thetas = walk(given.student, start.detach(), *ctx.leaves, ctx.steps, NONE)
        return (ctx.thetas[-1] - given.target).square().sum()

    @staticmethod
    def backward(ctx: Any, *outside: Tensor) -> Any:
        by = {3: 2 * (ctx.thetas[-1] - ctx.given.target) * outside[0]}
        found = pull_back(ctx.given.student, ctx.thetas, *ctx.leaves, ctx.steps, NONE, by)
        return (*found, None)


def test_the_adjoint_passes_gradcheck() -> None:
    given = requiring(setting(n=3, channels=1))
    assert torch.autograd.gradcheck(
        lambda *leaves: _Distance.apply(*leaves, given), given.leaves, eps=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_vectors_that_are_walked_anew_are_the_same(
    momentum: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = setting()
    steps = plan(6, 4, 11, DRAWS, (8, 8), Rng(0))
    leaves = given.leaves[:3]
    found = []
    for kept in (30, 4):
        monkeypatch.setattr("medistill.unroll.KEPT", kept)
        way = walk(given.student, given.start, *leaves, steps, DRAWS, momentum=momentum)
        assert len(way) == 12
        assert len(way.kept) == {30: 11, 4: 3}[kept]
        by = {11: way[-1] - given.target, 5: way[5]}
        pulled = pull_back(given.student, way, *leaves, steps, DRAWS, by, momentum=momentum)
        found.append([*pulled, *way])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    assert found[0][4].equal(given.start)


MEMORY = """
import sys, torch
torch.set_num_threads(1)
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_trajectory import matching_at

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

matching_at(2)
before = peak()
matching_at(int(sys.argv[1]))
print(peak() / before)
"""


def matching_at(count: int) -> None:
    """Pull back through so many steps of a student that is large beside its images."""
    card = dataclasses.replace(toy().card, shape=(16, 16))
    network = ConvNet(depth=2, width=64).build(card, Rng(0).at("network"))
    student, start = Student(network), vector_of(network)
    images = torch.randn(20, 1, 16, 16, generator=Rng(0).at("images"))
    labels = F.one_hot(torch.arange(20) % 3, 3).float()
    steps = plan(20, 20, count, DRAWS, (16, 16), Rng(0))
    rate = torch.tensor(0.01)
    thetas = walk(student, start, images, labels, rate, steps, DRAWS)
    pull_back(student, thetas, images, labels, rate, steps, DRAWS, {count: thetas[-1]})


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_steps() -> None:
    words = [sys.executable, "-W", "ignore", "-c", MEMORY, "80", str(FilePath(__file__).parent)]
    found = subprocess.run(words, capture_output=True, text=True, check=True)
    assert float(found.stdout) < 1.15


def test_a_vector_and_its_parameters_are_one() -> None:
    network = setting().student.network
    state = dict(network.named_parameters())
    vector = vector_of(network)
    for name, part in named(network, vector).items():
        assert torch.equal(part, state[name])
    stacked = named(network, torch.stack([vector, 2 * vector]))
    for name, part in stacked.items():
        assert torch.equal(part[1], 2 * state[name])
    conv = named(network, vector)["body.4.weight"]
    assert conv.is_contiguous(memory_format=torch.channels_last)
    assert conv.untyped_storage().data_ptr() == vector.untyped_storage().data_ptr()


@pytest.mark.slow
def test_compiled_steps_agree() -> None:
    """Float32, whole blocks filled up with images of no weight."""
    given = setting(n=5)
    network = given.student.network.float()
    start, images, labels, by = (
        t.float() for t in (given.start, given.images, given.labels, given.target)
    )
    plain, fast = Student(network), Student(network, compute=Compute(compile=True))
    torch.testing.assert_close(
        fast.gradient(start, images, labels),
        plain.gradient(start, images, labels),
        rtol=1e-4,
        atol=1e-6,
    )
    pairs = zip(
        fast.pull(start, images, labels, by), plain.pull(start, images, labels, by), strict=True
    )
    for own, other in pairs:
        assert own.shape == other.shape
        assert float((own - other).norm() / other.norm()) < 1e-4


def test_bfloat16_steps_point_the_same_way() -> None:
    given = setting()
    network = given.student.network.float()
    leaves = [t.float() for t in (given.images, given.labels, given.rate)]
    steps = plan(6, 6, 10, DRAWS, (8, 8), Rng(0))
    found = []
    for precision in ("float32", "bfloat16"):
        student = Student(network, compute=Compute(precision))  # type: ignore[arg-type]
        thetas = walk(student, given.start.float(), *leaves, steps, DRAWS)
        assert thetas[-1].dtype == torch.float32
        by = {10: thetas[-1] - given.target.float()}
        found.append(pull_back(student, thetas, *leaves, steps, DRAWS, by).images.flatten())
    assert 0.99 < float(F.cosine_similarity(*found, dim=0)) < 0.9999999


def test_blocks_of_images_add_up_to_the_whole() -> None:
    given = setting(n=70)
    whole = Student(given.student.network)
    got = whole.pull(given.start, given.images, given.labels, given.target)
    leaves = requiring(given)
    logits = functional_call(whole.network, named(whole.network, leaves.start), (leaves.images,))
    loss = losses("cross-entropy", logits, leaves.labels).mean()
    (g,) = torch.autograd.grad(loss, leaves.start, create_graph=True)
    rest = torch.autograd.grad(g @ given.target, (leaves.start, leaves.images, leaves.labels))
    for own, other in zip(got, (g @ given.target, *rest), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-12)


# One step of a linear student, by hand


def linear() -> tuple[Task, State, Tensor, Tensor]:
    """Return a task whose network is one linear layer, images, and its start and target."""
    task = task_of(ipc=2, backbone=Pixels())
    state = MTT(**SMALL).init(dataclasses.replace(task, prepared={}), Rng(3))
    student = student_of(task)
    start = vector_of(student.network)
    target = start + 0.1 * torch.randn(len(start), generator=Rng(0).at("target"))
    return task, state, start, target


def by_hand(
    images: Tensor, labels: Tensor, start: Tensor, target: Tensor, rate: float
) -> tuple[float, Tensor, Tensor, float]:
    """Return L, dL/dx, dL/dy and dL/d(log rate) of one step of softmax regression.

    g_W = (p - y)^T x / n, g_b = mean (p - y); L = |theta - rate g - theta*|^2 / |theta - theta*|^2
    """
    x, n, k = images.flatten(1).double(), len(images), labels.shape[1]
    y, d = labels.double(), x.shape[1]
    w, b = start[: k * d].view(k, d).double(), start[k * d :].double()
    p = (x @ w.T + b).softmax(1)
    g_w, g_b = (p - y).T @ x / n, (p - y).mean(0)
    left_w = w - rate * g_w - target[: k * d].view(k, d)
    left_b = b - rate * g_b - target[k * d :]
    way = float((start - target).double().square().sum())
    loss = float(left_w.square().sum() + left_b.square().sum()) / way
    a_w, a_b = -2 * rate * left_w / way / n, -2 * rate * left_b / way / n
    # d/dx of sum (p - y) . (a_w x + a_b): through x itself, and through p.
    toward = x @ a_w.T + a_b
    through = p * (toward - (p * toward).sum(1, keepdim=True))
    d_x = (p - y) @ a_w + through @ w
    d_rate = -2 * float((left_w * g_w).sum() + (left_b * g_b).sum()) / way * rate
    return loss, d_x.view_as(images), -toward, d_rate


def prepared_with(start: Tensor, *ends: Tensor) -> State:
    """Return two like experts that go straight to `ends`, an epoch each."""
    moves = torch.stack([end - start for end in ends])
    each = {f"expert.{k}.{n}": t for k in range(2) for n, t in (("start", start), ("moves", moves))}
    accuracy = torch.full((2, len(ends) + 1), 0.5)
    return each | {"accuracy": accuracy, "usable": torch.tensor([len(ends)] * 2)}


@pytest.mark.parametrize("kind", [MTT, TESLA, ATT], ids=lambda kind: kind.name)
def test_one_step_of_a_linear_student_by_hand(kind: type[MTT]) -> None:
    task, state, start, target = linear()
    task = dataclasses.replace(task, prepared=prepared_with(start, (start + target) / 2, target))
    fields = {**SMALL, "student_steps": 1, "max_start": 1, "lr_images": 3.0, "rate": 0.05}
    method = kind(**fields, lr_rate=1e-4)
    state = method.init(task, Rng(3))
    loss, d_x, _, d_rate = by_hand(state["images"], state["labels"], start, target, 0.05)
    after, log = method.step(state, task, Rng(3))
    assert log["loss"] == pytest.approx(loss, rel=1e-5)
    assert log["gradient_norm"] == pytest.approx(float(d_x.norm()), rel=1e-4)
    assert log["expert_accuracy"] == 0.5
    moved = (state["images"] - after["images"]).double()
    torch.testing.assert_close(moved, 3 * d_x, rtol=1e-3, atol=1e-6)
    step = min(0.02, max(-0.02, 1e-4 / 0.05**2 * d_rate))
    assert float(state["log_rate"] - after["log_rate"]) == pytest.approx(step, rel=1e-3)
    assert log["rate"] == pytest.approx(0.05 * math.exp(-step), rel=1e-5)


def test_learned_labels_of_datm_by_hand() -> None:
    task, _, start, target = linear()
    task = dataclasses.replace(task, prepared=prepared_with(start, target, target, target))
    shared = {"experts": 2, "student_steps": 1, "expert_epochs": 1, "first": 0, "last": 0}
    method = DATM(**shared, last_grown=0, rate=0.05, lr_labels=2.0)
    state = method.init(task, Rng(3))
    for before in (state, {**state, "logits_velocity": torch.ones_like(state["logits"])}):
        y = before["logits"].double().softmax(1)
        _, d_x, d_y, _ = by_hand(before["images"], y, start, target, 0.05)
        after, _ = method.step(before, task, Rng(3))
        slope = y * (d_y - (y * d_y).sum(1, keepdim=True))
        velocity = 0.9 * before["logits_velocity"].double() + slope
        torch.testing.assert_close(
            (before["logits"] - after["logits"]).double(), 2 * velocity, rtol=1e-3, atol=1e-6
        )
        torch.testing.assert_close(after["labels"], after["logits"].softmax(1))
        moved = (before["images"] - after["images"]).double()
        torch.testing.assert_close(moved, 100 * d_x, rtol=1e-3, atol=1e-5)


# Each method's own part


def test_a_step_equals_its_plain_twin() -> None:
    """Two steps of MTT on a ConvNet against create_graph, momentum and rate included."""
    task = task_of(ipc=2, augmentation=DRAWS)
    method = MTT(**SMALL, rate=0.02, lr_rate=1e-4, lr_images=5.0, batch_synthetic=4)
    task = dataclasses.replace(task, prepared=method.prepare(task, Rng(0)))
    state = method.init(task, Rng(1))
    images, velocity = state["images"].clone(), torch.zeros_like(state["images"])
    log_rate, rate_velocity = math.log(0.02), 0.0
    for number in range(2):
        state, log = method.step(state, task, Rng(1))
        at = Rng(1).child("step", number)
        path = method.stretch(task, number, at)
        leaf, rate = images.clone().requires_grad_(), torch.tensor(math.exp(log_rate))
        given = Setting(
            student_of(task), path.start, path.target, leaf, state["labels"], rate.requires_grad_()
        )
        steps = plan(6, 4, 4, DRAWS, (8, 8), at)
        theta = unrolled(requiring_only(given), steps, 0.0)[-1]
        way = (path.start - path.target).square().sum()
        loss = (theta - path.target).square().sum() / way
        g, g_rate = torch.autograd.grad(loss, (leaf, rate))
        assert log["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
        velocity = 0.5 * velocity + g
        images = images - 5.0 * velocity
        lr = 1e-4 / 0.02**2
        slope = max(-0.02 / lr, min(0.02 / lr, float(g_rate) * math.exp(log_rate)))
        rate_velocity = 0.5 * rate_velocity + slope
        log_rate -= lr * rate_velocity
        torch.testing.assert_close(state["images"], images, rtol=1e-3, atol=1e-4)
        assert float(state["log_rate"]) == pytest.approx(log_rate, rel=1e-4)
    made = method.finish(state, task, Rng(1))
    assert made.recipe.lr == pytest.approx(math.exp(log_rate), rel=1e-4)


def requiring_only(given: Setting) -> Setting:
    """Return the setting with a start that asks for a gradient, as a first gradient needs."""
    return dataclasses.replace(given, start=given.start.clone().requires_grad_())


def test_tesla_takes_each_step_alone_and_exact_is_mtt() -> None:
    given = setting()
    steps = plan(6, 4, 5, DRAWS, (8, 8), Rng(0))
    leaves = requiring(given)
    thetas = unrolled(leaves, steps, 0.0, detached=True)
    loss = (thetas[-1] - given.target).square().sum()
    expected = torch.autograd.grad(loss, leaves.leaves[:3])
    walked = walk(given.student, given.start, *given.leaves[:3], steps, DRAWS)
    by = {5: 2 * (walked[-1] - given.target)}
    found = pull_back(given.student, walked, *given.leaves[:3], steps, DRAWS, by, exact=False)
    for own, other in zip(found[:3], expected, strict=True):
        assert float((own - other).abs().max() / other.abs().max()) < 1e-12
    exact = pull_back(given.student, walked, *given.leaves[:3], steps, DRAWS, by)
    cosine = F.cosine_similarity(exact.images.flatten(), found.images.flatten(), dim=0)
    assert 0.5 < float(cosine) < 0.9999999
    task = task_of(ipc=2, augmentation=DRAWS)
    fields = {**SMALL, "iterations": 3}
    sets = [
        distill(kind, task, seed=0).images
        for kind in (MTT(**fields), TESLA(**fields, exact=True), TESLA(**fields))
    ]
    assert torch.equal(sets[0], sets[1])
    assert not torch.equal(sets[0], sets[2])


def test_tesla_labels_are_those_of_the_target_expert() -> None:
    task, _, start, target = linear()
    task = dataclasses.replace(task, prepared=prepared_with(start, target, target))
    method = TESLA(**{**SMALL, "max_start": 1}, teacher_labels=True)
    state = method.init(task, Rng(3))
    after, _ = method.step(state, task, Rng(3))
    k, x = 3, state["images"].flatten(1)
    w, b = target[: k * x.shape[1]].view(k, -1), target[k * x.shape[1] :]
    torch.testing.assert_close(after["labels"], (x @ w.T + b).softmax(1))


def path_to(target: Tensor, start: Tensor | None = None) -> Path:
    """Return a stretch that ends at `target`."""
    first = torch.zeros_like(target) if start is None else start
    return Path(first, (first + target) / 2, target, 0.9)


def test_att_matches_where_the_student_is_nearest() -> None:
    target = torch.tensor([2.0, 0.0])
    thetas = [torch.tensor(v) for v in ([0.0, 0.0], [1.0, 0.0], [2.0, 0.5], [4.0, 0.0])]
    found = ATT().compare(thetas, path_to(target), {})
    assert found.loss == pytest.approx(0.25 / 4)
    assert list(found.cotangents) == [2]
    torch.testing.assert_close(found.cotangents[2], torch.tensor([0.0, 2 * 0.5 / 4]))
    assert MTT().compare(thetas, path_to(target), {}).loss == pytest.approx(1.0)


def test_angles_of_a_right_triangle() -> None:
    corners = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
    found = angles(corners)
    assert float(found[0, 1, 2]) == pytest.approx(0.0, abs=1e-6)
    assert float(found[1, 0, 2]) == pytest.approx(3 / 5)
    assert float(found[2, 0, 1]) == pytest.approx(4 / 5)


def test_hop_tm_counts_easy_parameters_and_the_shape_of_the_way() -> None:
    target = torch.tensor([2.0, 1.0, 0.0])
    thetas = [torch.tensor(v) for v in ([0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [2.0, 0.5, 1.0])]
    path, step = path_to(target), torch.tensor(0)
    nothing = {"easy": torch.zeros(3, dtype=torch.bool), "step": step}
    method = HoPTM(shape=0.5)
    found = method.compare(thetas, path, nothing)
    # The first parameter has arrived, so it alone counts: no error is left there.
    assert found.kept["easy"].tolist() == [True, False, False]
    corners = [theta.clone().requires_grad_() for theta in thetas[1:]]
    own = angles(torch.stack([thetas[0], *corners]))
    bent = 0.5 * F.smooth_l1_loss(own, angles(torch.stack(list(path[:3]))))
    expected = torch.autograd.grad(bent, corners)
    torch.testing.assert_close(found.cotangents[1], expected[0])
    torch.testing.assert_close(found.cotangents[2], expected[1])
    assert found.loss == pytest.approx(ending(thetas, 2, path).loss)
    # What was easy once stays so; the bound grows by half every 500 steps.
    still = method.compare([thetas[0], thetas[1], thetas[2] + 1], path, {**nothing, **found.kept})
    assert still.kept["easy"].tolist() == [True, False, False]
    easy = (2 * torch.tensor([1.0, 0.0, 0.0]) / 4) + 0 * target
    shape = method.compare([thetas[0], thetas[1], thetas[2] + 1], path, nothing)
    assert float((still.cotangents[2] - shape.cotangents[2])[1].abs()) > 0.1
    assert float(still.cotangents[2][0]) == pytest.approx(
        float(easy[0] + bent_part(thetas, path)[0]), rel=1e-4
    )
    error = math.sqrt(5e-9 * 1.4)
    near = [thetas[0], thetas[1], target + torch.tensor([error, 1.0, 1.0])]
    late = {**nothing, "step": torch.tensor(500)}
    assert method.compare(near, path, nothing).kept["easy"].tolist() == [False, False, False]
    assert method.compare(near, path, late).kept["easy"].tolist() == [True, False, False]
    # While none is easy all are matched, where the released code divides 0 by 0.
    all_ = method.compare(near, path, nothing).cotangents[2]
    assert torch.isfinite(all_).all()
    assert float(all_[1]) != 0


def bent_part(thetas: list[Tensor], path: Path) -> Tensor:
    """Return the derivative of the shape's part at the end of a student that is 1 further."""
    end = (thetas[2] + 1).requires_grad_()
    own = angles(torch.stack([thetas[0], thetas[1], end]))
    bent = 0.5 * F.smooth_l1_loss(own, angles(torch.stack(list(path[:3]))))
    return torch.autograd.grad(bent, end)[0]


def test_the_window_of_datm_grows_and_bad_steps_are_skipped() -> None:
    method = DATM(first=3, last=10, last_grown=20, grown_by=1000)
    assert [method.window(step) for step in (0, 500, 1000, 5000)] == [
        (3, 10),
        (3, 15),
        (3, 20),
        (3, 20),
    ]
    assert method.epochs == 22
    task = task_of(ipc=1)
    fields = {"experts": 1, "student_steps": 2, "first": 0, "last": 1, "last_grown": 1}
    careful = DATM(**fields, skip_above=1e-9)
    task = dataclasses.replace(task, prepared=careful.prepare(task, Rng(0)))
    state = careful.init(task, Rng(0))
    after, log = careful.step(state, task, Rng(0))
    assert log["skipped"] == 1
    assert torch.equal(after["images"], state["images"])
    assert torch.equal(after["log_rate"], state["log_rate"])
    assert int(after["step"]) == 1
    _, log = DATM(**fields).step(state, task, Rng(0))
    assert log["skipped"] == 0


def test_first_labels_of_datm() -> None:
    """The mean logits of the experts that are right; nearly one-hot where none is."""
    task, _, start, target = linear()
    kept = prepared_with(start, target)
    task = dataclasses.replace(task, prepared=kept)
    method = DATM(experts=2, first=0, last=0, last_grown=0, expert_epochs=1, start="real")
    state = method.init(task, Rng(0))
    k, x = 3, state["images"].flatten(1)
    logits = x @ target[: k * x.shape[1]].view(k, -1).T + target[k * x.shape[1] :]
    for image, label in enumerate([0, 0, 1, 1, 2, 2]):
        if int(logits[image].argmax()) == label:
            torch.testing.assert_close(state["logits"][image], logits[image])
        else:
            assert state["logits"][image].tolist() == [5.0 * (c == label) for c in range(3)]
    noise = dataclasses.replace(method, start="noise").init(task, Rng(0))
    assert torch.equal(noise["logits"][0], noise["logits"][1])
    assert torch.isfinite(noise["logits"]).all()


def test_random_images_stand_beside_soft_labels_by_their_weight() -> None:
    hard = F.one_hot(torch.tensor([0, 0, 1, 2, 2, 2]), 3).float()
    assert _by_weight(hard) == [2, 1, 3]
    # Most of each label is class 0, and yet the weights are those of 2, 1 and 1 images.
    soft = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.25, 0.25], [0.5, 0.2, 0.3], [0.4, 0.35, 0.25]])
    assert _by_weight(soft) == [2, 1, 1]


def test_datm_starts_from_images_that_an_expert_gets_right() -> None:
    real = toy(counts=(40, 40, 40))
    task = task_of(real, ipc=2, backbone=ConvNet(depth=1, width=8))
    method = DATM(experts=1, first=0, last=0, last_grown=0, expert_epochs=3, start="real")
    task = dataclasses.replace(task, prepared=method.prepare(task, Rng(0)))
    images = method.init(task, Rng(0))["images"]
    right = method._logits(images, task, 0).argmax(1)
    all_right = method._logits(real.normalized(torch.arange(120)), task, 0).argmax(1)
    possible = [(all_right[40 * c : 40 * c + 40] == c).sum() >= 8 for c in range(3)]
    for c, able in enumerate(possible):
        if able:
            assert right[2 * c : 2 * c + 2].tolist() == [c, c]
    assert any(possible)


def test_ftd_returns_the_average_of_its_images() -> None:
    task = task_of(ipc=1)
    method = FTD(**SMALL, iterations=3, average=0.5)
    assert method.training.sharpness == 0.01
    assert method.training.ascent == 0.4
    task = dataclasses.replace(task, prepared=method.prepare(task, Rng(0)))
    state, seen = method.init(task, Rng(0)), []
    for _ in range(3):
        state, _ = method.step(state, task, Rng(0))
        seen.append(MTT().finish(state, task, Rng(0)).images)
    expected = (0.25 * seen[0] + 0.5 * seen[1] + seen[2]) / 1.75
    torch.testing.assert_close(method.finish(state, task, Rng(0)).images, expected)


def test_the_stretch_lies_in_the_window_and_before_the_expert_ends() -> None:
    task, _, start, target = linear()
    ends = [start + (target - start) * e / 6 for e in range(1, 7)]
    kept = prepared_with(start, *ends)
    task = dataclasses.replace(task, prepared=kept | {"usable": torch.tensor([6, 3])})
    method = MTT(experts=2, expert_epochs=2, max_start=9)
    seen: dict[int, set[int]] = {0: set(), 1: set()}
    for number in range(200):
        at = Rng(0).child("step", number)
        expert = int(torch.randint(2, (1,), generator=at.at("expert")))
        path = method.stretch(task, number, at)
        epoch = round(6 * float((path.start - start).norm() / (target - start).norm()))
        seen[expert].add(epoch)
        torch.testing.assert_close(path.target, expert_at(kept, expert, epoch + 2, start.device))
        torch.testing.assert_close(path.middle, expert_at(kept, expert, epoch + 1, start.device))
    assert seen == {0: {0, 1, 2, 3, 4}, 1: {0, 1}}
    narrow = dataclasses.replace(method, max_start=2)
    assert narrow.window(0) == (0, 1)
    assert narrow.epochs == 3


def test_settings_of_the_papers() -> None:
    for ipc, row in ((1, 1), (5, 1), (10, 10), (49, 10), (50, 50), (200, 50)):
        real = toy(counts=(200, 200, 200))
        task = task_of(real, ipc=ipc)
        mtt = MTT(experts=3).as_in_paper(task)
        assert (mtt.experts, mtt.start, mtt.patience) == (100, "real", 0)
        assert mtt.student_steps == PAPER[row]["student_steps"]
        assert mtt.lr_images == nearest_row(PAPER, ipc)["lr_images"]
        datm = DATM().as_in_paper(task)
        assert datm.last_grown == DATM_PAPER[row]["last_grown"]
        assert datm.skip_above == 1.0
    tesla = TESLA().as_in_paper(task_of(ipc=1))
    assert tesla.teacher_labels
    assert tesla.max_start == 6
    assert HoPTM().as_in_paper(task_of()).start == "real"


# Whitening


def test_whitened_images_are_uncorrelated_and_come_back() -> None:
    real = toy(counts=(200, 200, 200))
    found = whitening_of(real, ridge=0.1)
    rows = real.normalized(torch.arange(600)).flatten(1).double()
    covariance = torch.cov(rows.T, correction=0)
    values, vectors = torch.linalg.eigh(covariance)
    expected = vectors @ torch.diag((values + 0.1) ** -0.5) @ vectors.T
    torch.testing.assert_close(found.matrix.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.mean.double(), rows.mean(0), rtol=1e-4, atol=1e-5)
    seen = real.whitened(found).normalized(torch.arange(600))
    after = torch.cov(seen.flatten(1).double().T, correction=0)
    ideal = vectors @ torch.diag(values / (values + 0.1)) @ vectors.T
    torch.testing.assert_close(after, ideal, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        found.undo(seen, found.inverse()), real.normalized(torch.arange(600)), rtol=1e-3, atol=1e-4
    )


def test_a_whitened_set_travels_with_its_map(tmp_path: Any) -> None:
    real = toy(counts=(40, 40, 40))
    task = task_of(real, ipc=2)
    method = MTT(**SMALL, zca=True, start="real", lr_images=0.0, iterations=1)
    made = distill(method, task, seed=0, steps=1)
    # Nothing moved, so the stored images look like the real ones that they started from.
    index = started(task, "real", Rng(0))["images"]
    torch.testing.assert_close(
        made.images, denormalize(index, real.card.mean, real.card.std), rtol=1e-3, atol=1e-3
    )
    made.save(tmp_path / "set.safetensors")
    read = SyntheticSet.load(tmp_path / "set.safetensors")
    assert read.whitening is not None
    images, _ = read.to_train()
    whitened = whitening_of(real).apply(index)
    torch.testing.assert_close(images, whitened, rtol=1e-2, atol=1e-2)
    state, header = load_state(tmp_path / "set.safetensors")
    for broken in (
        {k: v for k, v in state.items() if k != "whitening.mean"},
        {**state, "whitening.mean": state["whitening.mean"] + 1},
    ):
        save_state(tmp_path / "broken.safetensors", broken, header)
        with pytest.raises(DataError, match="whitening"):
            SyntheticSet.load(tmp_path / "broken.safetensors")


def test_all_arms_and_a_saved_model_see_whitened_images(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = load("phantom:n=60,size=16")
    task = Task(splits.train, Budget(ipc=2), ConvNet(depth=1, width=8))
    made = distill(MTT(**SMALL, zca=True), task, seed=0, steps=2)
    seen: list[bool] = []
    plain = RealSet.normalized

    def watched(self: RealSet, index: Tensor) -> Tensor:
        seen.append(self.whitening is not None)
        return plain(self, index)

    monkeypatch.setattr(RealSet, "normalized", watched)
    short = dataclasses.replace(made.recipe, steps=4, stop=4)
    evaluate(made, splits, students=[ConvNet(1, 8)], seeds=[0, 1], recipe=short, rates=(0.01,))
    assert seen
    assert all(seen)
    network = model.train(made, short)
    scores = model.test(network, splits.test, short, made.card)
    model.save(tmp_path / "m.safetensors", network, short, made.card)
    again, recipe, card = model.load(tmp_path / "m.safetensors")
    assert model.test(again, splits.test, recipe, card) == scores
    network.whiten_by(None)
    assert model.test(network, splits.test, short, made.card) != scores
    state, header = load_state(tmp_path / "m.safetensors")
    del state["whitening_mean"]
    save_state(tmp_path / "broken.safetensors", state, header)
    with pytest.raises(DataError, match="whitening"):
        model.load(tmp_path / "broken.safetensors")


def test_images_too_large_to_whiten_are_refused() -> None:
    with pytest.raises(UsageError, match="leave out --zca"):
        whitening_of(load("phantom:n=20,size=128").train)


# What goes wrong


def test_a_student_that_runs_away_stops_with_the_step_and_keeps_the_checkpoint(
    tmp_path: Any,
) -> None:
    task = task_of(ipc=1)
    method = MTT(**{**SMALL, "max_start": 1}, lr_images=1e30)
    run = Run(method, task, 0, "toy", "test", 20)
    with pytest.raises(RunRefused, match=r"student steps? at step \d+.*checkpoint is kept"):
        distill_to(tmp_path / "run", run, resume=False)
    assert (tmp_path / "run" / "checkpoint.safetensors").is_file()


@pytest.mark.parametrize(
    ("method", "error", "text"),
    [
        (MTT(rate=0.0), UsageError, "found rate 0"),
        (FTD(average=1.0), UsageError, "found average 1"),
        (DATM(max_start=3), UsageError, "--last-grown"),
        (HoPTM(expert_epochs=1), UsageError, "expected 2 or more"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_settings_that_mean_nothing_are_refused(
    method: Any, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        distill(method, task_of(), seed=0, steps=1)


def test_a_class_of_one_image_is_refused_before_experts_train(
    tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(MTT(**SMALL), task_of(toy(counts=(9, 1, 9)), ipc=1), 0, "toy", "test", 1)
    with pytest.raises(RunRefused, match="found 1 training image of class 'class 1'"):
        distill_to(tmp_path / "run", run, resume=False)
    assert "experts" not in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_interrupt_while_experts_train_leaves_a_run_that_goes_on(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(MTT(**SMALL), task_of(), 0, "toy", "test", 2)
    whole = distill_to(tmp_path / "whole", run, resume=False, cache=tmp_path / "a")
    plain, calls = _Crew.train_epoch, []

    def interrupted(crew: _Crew) -> None:
        calls.append(crew)
        if len(calls) == 3:
            raise KeyboardInterrupt
        plain(crew)

    monkeypatch.setattr(_Crew, "train_epoch", interrupted)
    with pytest.raises(RunRefused, match="leave out --resume"):
        distill_to(tmp_path / "run", run, resume=True, cache=tmp_path / "b")
    assert not calls
    with pytest.raises(KeyboardInterrupt):
        distill_to(tmp_path / "run", run, resume=False, cache=tmp_path / "b")
    # Whether to compile was not decided yet, so it is when the run goes on, as if it had not begun.
    asked = []
    with monkeypatch.context() as patch:
        module = sys.modules["medistill.distill"]
        patch.setattr(module, "worth_compiling", lambda *given: asked.append(given) or False)
        goes_on = dataclasses.replace(run, steps=1)
        assert module._compiled(tmp_path / "run", goes_on, "auto", True) is False
    assert len(asked) == 1
    record = distill_to(tmp_path / "run", run, resume=True, cache=tmp_path / "b")
    assert record["finished"]
    assert record["bytes"] == whole["bytes"]
    one, two = (tmp_path / name / "synthetic.safetensors" for name in ("whole", "run"))
    assert one.read_bytes() == two.read_bytes()


def test_patients_are_part_of_a_bank(tmp_path: Any) -> None:
    real = toy(counts=(20, 20, 20))
    grouped = dataclasses.replace(real, groups=torch.arange(60) // 2)
    for number, part in enumerate((real, grouped), 1):
        prepared(MTT(**SMALL), task_of(part), tmp_path)
        assert len({path.parent for path in tmp_path.rglob("expert-*")}) == number


def test_networks_that_mix_images_are_refused() -> None:
    task = task_of(backbone=ConvNet(depth=1, width=8, norm="batch"))
    with pytest.raises(UsageError, match="instance norm"):
        distill(MTT(**SMALL), task, seed=0, steps=1)


def test_the_rate_stays_positive_and_moves_by_a_bounded_step() -> None:
    task, _, start, target = linear()
    task = dataclasses.replace(task, prepared=prepared_with(start, target, target))
    method = MTT(**{**SMALL, "max_start": 1}, lr_rate=1e6)
    state = method.init(task, Rng(0))
    for _ in range(5):
        after, log = method.step(state, task, Rng(0))
        assert log["rate"] > 0
        assert abs(float(after["log_rate"] - state["log_rate"])) <= 0.02 * 2 + 1e-6
        state = after


def test_pixels_outside_the_range_are_logged_and_told(
    tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    task = task_of(ipc=1)
    run = Run(MTT(**SMALL, lr_images=1e4), task, 0, "toy", "test", 3)
    record = distill_to(tmp_path / "far", run, resume=False)
    assert record["outside"] > 0.1
    assert "lie far outside the data's range" in capsys.readouterr().err
    near = Run(MTT(**SMALL, lr_images=1e-3, start="real"), task, 0, "toy", "test", 3)
    assert distill_to(tmp_path / "near", near, resume=False)["outside"] == 0
    assert "outside" not in capsys.readouterr().err
    noise = Run(MTT(**SMALL, lr_images=1e-3, start="noise"), task, 0, "toy", "test", 3)
    assert distill_to(tmp_path / "noise", noise, resume=False)["outside"] > 0.05
    assert "outside" not in capsys.readouterr().err


def test_experts_are_prepared_once_for_methods_that_share_them(tmp_path: Any) -> None:
    task = task_of()
    first = prepared(MTT(**SMALL), task, tmp_path)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("expert-*.safetensors")}
    assert len(files) == 2
    again = prepared(TESLA(**SMALL), task, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in files} == files
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
    prepared(FTD(**SMALL), task, tmp_path)
    assert len(list(tmp_path.rglob("expert-*.safetensors"))) == 4


# The command


def test_experts_are_trained_ahead_and_found_again(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    words = ["experts", "phantom:n=60,size=16", "--backbone", "convnet-2-8", "--json"]
    flags = ["--experts", "2", "--max-start", "2"]
    first = CliRunner().invoke(app, [*words, *flags])
    assert first.exit_code == 0, first.output
    assert "experts: 2 of 3 epochs" in first.stderr
    found = json.loads(first.stdout)
    assert (found["experts"], found["epochs"]) == (2, [3, 3])
    assert len(found["accuracy"]) == 2
    again = CliRunner().invoke(app, [*words, *flags])
    assert again.stderr == ""
    assert json.loads(again.stdout)["accuracy"] == found["accuracy"]
    run = ["distill", *words[1:], "--method", "mtt", *flags, "--ipc", "1", "--steps", "1"]
    made = CliRunner().invoke(app, [*run, "--student-steps", "2", "--out", str(tmp_path / "run")])
    assert made.exit_code == 0, made.output
    assert "experts" not in made.stderr
    line = json.loads((tmp_path / "run" / "log.jsonl").read_text())
    assert {"loss", "gradient_norm", "rate", "expert_accuracy", "outside"} < set(line)


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["--method", "dm"], 2, "has no experts"),
        (["--experts", "0"], 2, "found experts 0 for mtt; expected 1 or more"),
        (["--workers", "-1"], 2, "expected 0 or more"),
        (["--backbone", "convnet-2-8-batch"], 2, "use instance norm"),
    ],
)
def test_experts_of_nothing_are_refused(words: list[str], code: int, text: str) -> None:
    result = CliRunner().invoke(app, ["experts", "phantom:n=60,size=16", *words])
    assert (result.exit_code, text in result.stderr) == (code, True), result.stderr
