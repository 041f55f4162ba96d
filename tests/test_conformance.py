"""The conformance suite: every method passes every check, and broken methods fail the right one."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from medistill import conformance
from medistill.backbones import ConvNet
from medistill.budget import Budget
from medistill.conformance import CHECKS, Check, check_method
from medistill.distill import distill
from medistill.errors import MedistillError
from medistill.methods import DM, METHODS, Log, Method, Task
from medistill.records import State
from medistill.rng import Rng
from medistill.sets import Start, SyntheticSet
from third_party import ToMean

# Short versions of the methods: the suite asks for no more steps than these.
SHORT = {
    "iterations": 24,
    "feature_steps": 2,
    "batch_real": 8,
    "networks": 2,
    "frequencies": 16,
    "experts": 2,
    "student_steps": 3,
    "max_start": 1,
    "lr_expert": 0.002,  # so that parameters are near enough to count as easy for hop_tm
    "last": 1,
    "last_grown": 2,
    "grown_by": 10,
    "lr_labels": 0.1,
}


# Where a set must teach something: enough networks and steps, and rates for images of 8 pixels.
TELLING = SHORT | {
    "iterations": 40,
    "networks": 4,
    "frequencies": 256,
    "student_steps": 5,
    "lr_expert": 0.02,
}
TRAJECTORIES = {"iterations": 12, "lr_images": 0.5}


def short(kind: type[Method], settings: dict[str, float] = SHORT) -> Callable[[], Method]:
    """Return a function that makes a method with few iterations."""
    fields = {field.name for field in dataclasses.fields(kind)}
    if "last_grown" in fields:
        fields.remove("max_start")  # has a window of its own
    return lambda: kind(**{name: value for name, value in settings.items() if name in fields})


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("kind", METHODS, ids=lambda kind: kind.name)
def test_every_method_passes(kind: type[Method], check: Check) -> None:
    settings = SHORT
    if check is conformance.check_beats_random:
        settings = TELLING | (TRAJECTORIES if hasattr(kind, "student_steps") else {})
    check(short(kind, settings))


def test_the_published_methods_of_distillation_declare_that_they_beat_random_images() -> None:
    silent = {kind.name for kind in METHODS if not kind.beats_random}
    assert silent == {"random", "herding", "kcenter", "dp_merf"}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_bank_of_networks_passes(check: Check) -> None:
    check(lambda: DM(bank=2, iterations=24))


@pytest.mark.parametrize("kind", METHODS, ids=lambda kind: kind.name)
def test_every_method_takes_volumes(kind: type[Method]) -> None:
    flat = conformance.toy(counts=(6, 6))
    images = flat.images.unsqueeze(2).expand(-1, -1, 8, -1, -1).contiguous()
    card = dataclasses.replace(flat.card, shape=(8, 8, 8))
    real = dataclasses.replace(flat, images=images, card=card)
    task = Task(real, Budget(ipc=2), ConvNet(1, 8))
    method = short(kind)()
    start = method.init(dataclasses.replace(task, prepared=method.prepare(task, Rng(0))), Rng(0))
    made = distill(method, task, seed=0, steps=3)
    assert made.images.shape == (4, 1, 8, 8, 8)
    assert made.images.isfinite().all()
    if method.steps(task):
        before = method.finish(start, task, Rng(0)).images
        assert not torch.equal(made.images, before)


def test_the_suite_holds_every_check() -> None:
    written = [f for name, f in vars(conformance).items() if name.startswith("check_")]
    assert set(written) - {check_method} == set(CHECKS)


def test_a_third_party_needs_no_registration() -> None:
    check_method(ToMean)


class HiddenCounter(ToMean):
    """Counts its steps on the class, so that two runs share the count."""

    done: ClassVar[list[int]] = [0]

    def init(self, task: Task, rng: Rng) -> State:
        self.done[0] = 0
        return super().init(task, rng)

    def step(self, state: State, task: Task, rng: Rng) -> tuple[State, Log]:
        after, log = super().step(state, task, rng.child("hidden", self.done[0]))
        self.done[0] += 1
        return after, log


class Mutates(ToMean):
    """Moves the images that it was given."""

    def step(self, state: State, task: Task, rng: Rng) -> tuple[State, Log]:
        after, log = super().step(state, task, rng)
        state["images"].copy_(after["images"])
        return {**after, "images": state["images"]}, log


class GlobalGenerator(ToMean):
    """Draws its start from the global generator."""

    def init(self, task: Task, rng: Rng) -> State:
        state = super().init(task, rng)
        return {**state, "images": torch.randn(state["images"].shape)}


class IgnoresSeed(ToMean):
    """Draws from a seed of its own."""

    def init(self, task: Task, rng: Rng) -> State:
        return super().init(task, Rng(0))

    def step(self, state: State, task: Task, rng: Rng) -> tuple[State, Log]:
        return super().step(state, task, Rng(0))


class ForgetsVelocity(ToMean):
    """Keeps the momentum on the class and not in the state."""

    kept: ClassVar[State] = {}

    def step(self, state: State, task: Task, rng: Rng) -> tuple[State, Log]:
        if int(state["step"]):
            state = {**state, "velocity": self.kept["velocity"]}
        after, log = super().step(state, task, rng)
        self.kept["velocity"] = after["velocity"]
        return {**after, "velocity": torch.zeros_like(after["velocity"])}, log


class MovesRealPixels(ToMean):
    """Writes into the real set."""

    def init(self, task: Task, rng: Rng) -> State:
        task.real.images[0, 0, 0, 0] ^= 1
        return super().init(task, rng)


class TakesRealImages(ToMean):
    """Puts real images in and says it started from noise."""

    def finish(self, state: State, task: Task, rng: Rng) -> SyntheticSet:
        index = torch.cat([members[: task.ipc] for members in task.real.by_class])
        return super().finish({**state, "images": task.real.normalized(index)}, task, rng)


class WalksUphill(ToMean):
    """Moves against the sign of its gradient."""

    def step(self, state: State, task: Task, rng: Rng) -> tuple[State, Log]:
        return dataclasses.replace(ToMean(), lr=-0.1).step(state, task, rng)


class NotFinite(ToMean):
    """Ends in numbers that are none."""

    def finish(self, state: State, task: Task, rng: Rng) -> SyntheticSet:
        return super().finish({**state, "images": state["images"] / 0}, task, rng)


class WrongLabels(ToMean):
    """Gives every image to the first class."""

    def finish(self, state: State, task: Task, rng: Rng) -> SyntheticSet:
        labels = torch.zeros_like(state["labels"])
        labels[:, 0] = 1
        return super().finish({**state, "labels": labels}, task, rng)


class GrayOnly(ToMean):
    """Returns one channel whatever the data has."""

    def finish(self, state: State, task: Task, rng: Rng) -> SyntheticSet:
        synthetic = super().finish(state, task, rng)
        return dataclasses.replace(synthetic, images=synthetic.images[:, :1])


class CountsNothing(ToMean):
    """Leaves the step counter at zero."""

    def step(self, state: State, task: Task, rng: Rng) -> tuple[State, Log]:
        after, log = super().step(state, task, rng)
        return {**after, "step": state["step"]}, log


class TeachesNothing(ToMean):
    """Ends in the noise it began with."""

    def finish(self, state: State, task: Task, rng: Rng) -> SyntheticSet:
        return super().finish(self.init(task, rng), task, rng)


class Undocumented(ToMean):
    """Pull images to the mean of their class."""


class ClaimsMultiLabel(ToMean):
    """Declares a kind of task that it cannot do."""

    tasks = ("binary", "multi-class", "ordinal", "multi-label")

    def init(self, task: Task, rng: Rng) -> State:
        state = super().init(task, rng)
        first = state["labels"].argmax(1)
        return {**state, "labels": torch.eye(task.classes)[first]}


@dataclass
class Thawed(Method):
    """A dataclass whose fields may change during a run."""

    start: Start = "noise"
    name: ClassVar[str] = "thawed"
    paper: ClassVar[str] = ""
    steps, init, step = ToMean.steps, ToMean.init, ToMean.step


@pytest.mark.parametrize(
    ("broken", "check"),
    [
        (HiddenCounter, conformance.check_resume),
        (ForgetsVelocity, conformance.check_resume),
        (Mutates, conformance.check_state),
        (CountsNothing, conformance.check_state),
        (GlobalGenerator, conformance.check_global_generator),
        (GlobalGenerator, conformance.check_seed),
        (IgnoresSeed, conformance.check_seed),
        (MovesRealPixels, conformance.check_real_set),
        (TakesRealImages, conformance.check_origin),
        (WalksUphill, conformance.check_loss_falls),
        (TeachesNothing, conformance.check_beats_random),
        (NotFinite, conformance.check_shapes),
        (WrongLabels, conformance.check_shapes),
        (GrayOnly, conformance.check_channels),
        (Undocumented, conformance.check_documented),
        (Thawed, conformance.check_fields),
        (WalksUphill, conformance.check_short),  # this file is long
    ],
    ids=lambda value: value.__name__,
)
def test_a_broken_method_fails(broken: type[Method], check: Check) -> None:
    with pytest.raises(AssertionError, match="; expected"):
        check(broken)


def test_a_method_may_not_declare_what_it_cannot_do() -> None:
    with pytest.raises((AssertionError, MedistillError)):
        conformance.check_tasks(ClaimsMultiLabel)
