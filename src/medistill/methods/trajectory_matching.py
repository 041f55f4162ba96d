"""The step that MTT and its heirs share: walk as a student, compare with an expert, pull back."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..backbones import Backbone, Network
from ..compute import Mode, has_compiler
from ..errors import RunRefused, UsageError
from ..experts import Bank, Training, experts
from ..features import whitening_of
from ..optim import sgd_
from ..pixels import Whitening, denormalize, outside
from ..records import Json, State, state_digest, to_record
from ..rng import Rng
from ..sets import LOSSES, Card, Start, SyntheticSet
from ..unroll import Student, plan, pull_back, walk
from .base import Log, Method, Task, moved, started

MANY_IMAGES = 1000
MOST_RATE_STEP = 0.02  # of the logarithm of the student's rate, by one step's gradient


class Path(NamedTuple):
    """A stretch of one expert's way: where the student begins, and where it should arrive."""

    start: Tensor
    middle: Tensor
    target: Tensor
    accuracy: float


class Compared(NamedTuple):
    """A loss of the student's vectors, its derivative in some of them, and state that it keeps."""

    loss: float
    cotangents: dict[int, Tensor]
    kept: State


@dataclass(frozen=True)
class TrajectoryMatching(Method):
    """What MTT and its heirs share: their fields, their state and their step.

    The learned rate of the student is exp(r), so it stays positive; r moves by SGD at rate
    lr_rate / rate^2, which moves the rate itself as the papers do, to first order at its start,
    and no step's gradient changes it by more than 2%: far from the goal it would collapse. With
    `zca` all images are whitened (see `Whitening`); the set travels with the map.
    Images start from the mean of their class, a statistic: the first students of noise end many
    times further off than they began, so noise wants a lower `rate` and many more steps.
    """

    iterations: int = 5000
    student_steps: int = 30
    expert_epochs: int = 2
    max_start: int = 20
    experts: int = 100
    lr_images: float = 100.0
    lr_rate: float = 1e-5
    rate: float = 0.01
    momentum: float = 0.5
    batch_synthetic: int = 0
    lr_expert: float = 0.01
    zca: bool = False
    patience: int = field(default=10, metadata={"least": 0})
    start: Start = "class-mean"
    own_files: ClassVar[bool] = True

    @property
    def exact(self) -> bool:
        """Whether gradients go through all steps of the student, or each step stands alone."""
        return True

    @property
    def training(self) -> Training:
        """How the experts are trained."""
        return Training(lr=self.lr_expert, patience=self.patience)

    def window(self, step: int) -> tuple[int, int]:
        """Return the first and the last epoch that the student may begin from."""
        return 0, self.max_start - 1

    @property
    def last_start(self) -> int:
        """The last epoch that any step may begin from."""
        return self.max_start - 1

    def compare(self, thetas: Sequence[Tensor], path: Path, state: State) -> Compared:
        """Return L = |theta_N - theta*|^2 / |theta_0 - theta*|^2 and its derivative in theta_N."""
        return ending(thetas, len(thetas) - 1, path)

    def steps(self, task: Task) -> int:
        """Return the iterations."""
        return self.iterations

    def check(self, task: Task) -> None:
        """Refuse networks that mix the images of a batch: they are more than their parameters.

        Also a rate of zero.
        """
        if not self.rate:
            raise UsageError(f"found rate 0 for {self.name}; expected more: a student has to move")
        if task.network(Rng(0).at("check")).mixes_images:
            raise UsageError(
                f"found {task.backbone.name}, which keeps statistics of its batches; expected "
                f"another norm for {self.name}: use instance norm"
            )

    def prepared_from(self, task: Task) -> Json:
        """Return how experts are trained: their number and length are no part of it.

        Patients are, for they say which images can be held out.
        """
        groups = task.real.groups
        people = "" if groups is None else state_digest({"groups": groups})
        return {"experts": to_record(self.training), "zca": self.zca, "groups": people}

    @property
    def epochs(self) -> int:
        """Epochs of an expert that some step may ask for."""
        return self.last_start + self.expert_epochs

    def bank(self, task: Task) -> Bank:
        """Return what the experts of a task are made from."""
        parts = (task.real, task.backbone, task.augmentation, task.compute)
        return Bank(*parts, self.training, task.store)

    def prepare(self, task: Task, rng: Rng) -> State:
        """Return the experts, as `experts` does; files hold them where the task has a store.

        With `zca` they see whitened images, and the map stands beside them.
        """
        whitening = whitening_of(task.real) if self.zca else None
        bank = self.bank(replace(task, real=task.real.whitened(whitening)))
        found = experts(bank, self.experts, self.epochs, task.engine)
        if whitening is not None:
            found |= {**whitening.state(), "unwhitening": whitening.inverse()}
        return found

    def whitening(self, task: Task) -> Whitening | None:
        """Return the map that a task's images pass through, as `prepare` made it."""
        return Whitening.of_state(task.prepared) if self.zca else None

    def seen(self, task: Task) -> Task:
        """Return the task with images as the networks see them."""
        return replace(task, real=task.real.whitened(self.whitening(task)))

    def prepare_compiled(self, task: Task, mode: Mode) -> bool:
        """Compile the training of experts on more than a few images: epochs take half as long."""
        return mode == "on" or (mode == "auto" and has_compiler() and len(task.real) >= MANY_IMAGES)

    def init(self, task: Task, rng: Rng) -> State:
        """Return the images at their start, and the student's rate."""
        rate = torch.tensor(self.rate).log()
        first = started(self.seen(task), self.start, rng)
        return {**first, "log_rate": rate, "rate_velocity": torch.zeros_like(rate)}

    def step(self, state: State, task: Task, rng: Rng) -> tuple[State, Log]:
        """Walk along a stretch of one expert, and move images and rate by what is left at its end.

        Raises: RunRefused when the student's parameters are no longer finite.
        """
        number = int(state["step"])
        at = rng.child("step", number)
        path = self.stretch(task, number, at)
        images, labels, rate = state["images"], self.targets(state, task, path), _rate(state)
        batch, kinds = self.batch_synthetic or len(images), task.augmentation
        card = task.real.card
        steps = plan(len(images), batch, self.student_steps, kinds, card.shape, at)
        student = student_of(task)
        thetas = walk(student, path.start, images, labels, rate, steps, kinds)
        _check_finite(thetas, float(rate), number)
        found = self.compare(thetas, path, state)
        pulled = pull_back(
            student, thetas, images, labels, rate, steps, kinds, found.cotangents, exact=self.exact
        )
        after = moved(state, pulled.images, lr=self.lr_images, momentum=self.momentum)
        after |= self.label_state(state, labels, pulled.labels) | found.kept
        after |= self._moved_rate(state, pulled.rate * rate)
        return after, {
            "loss": found.loss,
            "gradient_norm": float(pulled.images.norm()),
            "rate": float(_rate(after)),
            "expert_accuracy": path.accuracy,
            "outside": outside(self._intensities(after["images"], task)),
        }

    def finish(self, state: State, task: Task, rng: Rng) -> SyntheticSet:
        """Return the set of a state; its recipe has the learned rate, and the map of `zca`."""
        made, whitening = super().finish(state, task, rng), self.whitening(task)
        recipe = replace(made.recipe, lr=float(_rate(state)))
        if whitening is None:
            return replace(made, recipe=recipe)
        held = Whitening(*(tensor.cpu() for tensor in whitening))
        recipe = replace(recipe, whitening=state_digest(held.state()))
        images = self._intensities(state["images"], task).cpu()
        return replace(made, images=images, recipe=recipe, whitening=held)

    def _intensities(self, images: Tensor, task: Task) -> Tensor:
        whitening, card = self.whitening(task), task.real.card
        plain = images
        if whitening is not None:
            plain = whitening.undo(images, task.prepared["unwhitening"])
        return denormalize(plain, card.mean, card.std)

    def targets(self, state: State, task: Task, path: Path) -> Tensor:
        """Return what the student learns of each image [m, k]: its label."""
        return state["labels"]

    def label_state(self, state: State, labels: Tensor, gradient: Tensor) -> State:
        """Return what changes of the labels, given their gradient: nothing."""
        return {}

    def stretch(self, task: Task, step: int, rng: Rng) -> Path:
        """Draw an expert and a start epoch that lies in the window and before the expert's end."""
        kept, generator = task.prepared, rng.at("expert")
        expert = int(torch.randint(self.experts, (1,), generator=generator))
        length = len(kept[f"expert.{expert}.moves"])
        ahead = min(self.expert_epochs, length)
        low, high = self.window(step)
        high = max(0, min(high, max(int(kept["usable"][expert]), ahead) - ahead))
        low = min(low, high)
        epoch = low + int(torch.randint(high - low + 1, (1,), generator=generator))
        places = (epoch, epoch + ahead // 2, epoch + ahead)
        first, middle, last = (expert_at(kept, expert, at, task.real.device) for at in places)
        return Path(first, middle, last, float(kept["accuracy"][expert, epoch + ahead]))

    def _moved_rate(self, state: State, gradient: Tensor) -> State:
        # One number: it stays where it is read, also after a resumed run put its state elsewhere.
        value, velocity = (state[name].cpu().clone() for name in ("log_rate", "rate_velocity"))
        lr = self.lr_rate / self.rate**2
        bound = MOST_RATE_STEP / lr if lr else 0.0
        slope = gradient.cpu().clamp(-bound, bound)
        sgd_([value], [slope], [velocity], lr=lr, momentum=self.momentum)
        return {"log_rate": value, "rate_velocity": velocity}


@dataclass(frozen=True)
class AlongFlatExperts(TrajectoryMatching):
    """What methods share whose experts are trained by GSAM (see Training)."""

    sharpness: float = 0.01
    ascent: float = 0.3

    @property
    def training(self) -> Training:
        """How the experts are trained: by GSAM."""
        return replace(super().training, sharpness=self.sharpness, ascent=self.ascent)


def ending(thetas: Sequence[Tensor], i: int, path: Path) -> Compared:
    """Return |theta_i - theta*|^2 / |theta_0 - theta*|^2 and its derivative in theta_i.

    Source: arXiv 2203.11932, equation 2.
    """
    way = (path.start - path.target).square().sum().clamp_min(1e-30)
    left = thetas[i] - path.target
    return Compared(float(left.square().sum() / way), {i: 2 * left / way}, {})


def expert_at(kept: State, expert: int, epoch: int, device: torch.device) -> Tensor:
    """Return an expert's parameters [p] after an epoch (0: where it began)."""
    start = kept[f"expert.{expert}.start"].to(device)
    if epoch == 0:
        return start.clone()
    return start + kept[f"expert.{expert}.moves"][epoch - 1].to(device).float()


def student_of(task: Task) -> Student:
    """Return the student of a task; its network's own parameters are never used."""
    card = task.real.card
    network = _network(task.backbone, card, task.real.device)
    return Student(network, LOSSES[card.task], task.compute)


@lru_cache(maxsize=8)
def _network(backbone: Backbone, card: Card, device: torch.device) -> Network:
    # Not `fixed`, for its parameters are given anew in each step, with derivatives of theirs.
    return backbone.build(card, Rng(0).at("student")).to(device).requires_grad_(False)


def _rate(state: State) -> Tensor:
    return state["log_rate"].cpu().exp()


def _check_finite(thetas: Sequence[Tensor], rate: float, step: int) -> None:
    """Refuse a student that has run away, and say where it did."""
    if torch.isfinite(thetas[-1]).all():
        return
    first = next(i for i, theta in enumerate(thetas) if not torch.isfinite(theta).all())
    raise RunRefused(
        f"found parameters that are not finite after {first} of {len(thetas) - 1} student steps at "
        f"step {step} (student rate {rate:.3g}); expected finite ones: lower --lr-images, --rate "
        "or --lr-rate; the last checkpoint is kept"
    )
