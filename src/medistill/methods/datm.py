"""DATM: trajectories whose difficulty fits the budget, and learned soft labels."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import UsageError
from ..optim import sgd_
from ..records import State
from ..rng import Rng
from .base import Log, Task, one_hot, pick
from .mtt import nearest_row, small_enough
from .trajectory_matching import AlongFlatExperts, expert_at, student_of

JUDGES = 10  # experts, and images of a class, whose logits a first label is the mean of
SEEN = 100
# arXiv 2310.05773, appendix: CIFAR-10 at 1, 10 and 50 images per class.
PAPER: dict[int, dict[str, Any]] = {
    1: {"lr_images": 100.0, "lr_labels": 5.0, "first": 0, "last": 4, "last_grown": 4}
    | {"lr_rate": 1e-7, "batch_synthetic": 10},
    10: {"lr_images": 100.0, "lr_labels": 2.0, "first": 0, "last": 10, "last_grown": 20}
    | {"grown_by": 1000, "batch_synthetic": 100},
    50: {"lr_images": 1e3, "lr_labels": 2.0, "first": 0, "last": 20, "last_grown": 40}
    | {"grown_by": 2000, "batch_synthetic": 500},
}


@dataclass(frozen=True)
class DATM(AlongFlatExperts):
    """Difficulty-aligned trajectory matching.

    L of MTT for a start epoch between `first` and a last one that grows from `last` to
    `last_grown` in `grown_by` steps; labels are softmax(y) with y learned; a step with L above
    `skip_above` changes nothing (0: none is skipped).
    Source: Guo et al., ICLR 2024, arXiv 2310.05773.
    Departures: those of MTT. y starts as the mean logits of the experts that classify an image
    rightly (one-hot where none does); images that start from noise take the mean over real images
    of their class. No step is skipped unless --paper: the first students of images that are not
    real all end further off than they began.
    """

    iterations: int = 10_000
    student_steps: int = 80
    first: int = 0
    last: int = 10
    last_grown: int = 20
    grown_by: int = 1000
    lr_labels: float = 2.0
    momentum_labels: float = 0.9
    skip_above: float = 0.0
    name: ClassVar[str] = "datm"
    paper: ClassVar[str] = "arXiv 2310.05773"
    beats_random: ClassVar[bool] = True

    @property
    def soft_labels(self) -> bool:
        """Labels are learned."""
        return True

    def check(self, task: Task) -> None:
        """Refuse a start epoch that this method would not look at."""
        super().check(task)
        if self.max_start != DATM.max_start:
            raise UsageError(
                f"found max_start {self.max_start} for datm, whose window grows; expected --last "
                "and --last-grown in its place"
            )

    @property
    def last_start(self) -> int:
        """The window's last epoch, grown."""
        return self.last_grown

    def window(self, step: int) -> tuple[int, int]:
        """Return the window of a step."""
        grown = min(1.0, step / self.grown_by)
        return self.first, self.last + int(grown * (self.last_grown - self.last))

    def as_in_paper(self, task: Task) -> "DATM":
        """Set what the paper has for CIFAR-10 at the nearest number of images per class."""
        row = nearest_row(PAPER, task.ipc)
        row |= {"skip_above": 1.0, "zca": small_enough(task), "start": "real"}
        return replace(self, **row, experts=100, patience=0)

    def init(self, task: Task, rng: Rng) -> State:
        """Choose real images that an expert classifies rightly, and the first labels."""
        state, task = super().init(task, rng), self.seen(task)
        if self.start == "real":
            index = self._right(task, rng)
            state["images"] = task.real.normalized(index)
        logits = self._first_logits(state["images"], task)
        return {
            **state,
            "logits": logits,
            "labels": logits.softmax(1),
            "logits_velocity": torch.zeros_like(logits),
        }

    def step(self, state: State, task: Task, rng: Rng) -> tuple[State, Log]:
        """Take a step, unless the student ends further off than it began."""
        after, log = super().step(state, task, rng)
        skipped = bool(self.skip_above) and log["loss"] > self.skip_above
        if skipped:
            after = {**state, "step": after["step"]}
        return after, {**log, "skipped": float(skipped)}

    def label_state(self, state: State, labels: Tensor, gradient: Tensor) -> State:
        """Move the logits."""
        logits, velocity = state["logits"].clone(), state["logits_velocity"].clone()
        inner = (labels * gradient).sum(1, keepdim=True)
        slope = labels * (gradient - inner)
        sgd_([logits], [slope], [velocity], lr=self.lr_labels, momentum=self.momentum_labels)
        return {"logits": logits, "logits_velocity": velocity, "labels": logits.softmax(1)}

    def _right(self, task: Task, rng: Rng) -> Tensor:
        """Return positions of real images, of each class those that expert 0 classifies rightly."""
        chosen = []
        for c, (members, count) in enumerate(zip(task.real.by_class, task.counts, strict=True)):
            generator = rng.at("right", c)
            tried = pick(members, min(len(members), 10 * count), generator)
            right = self._logits(task.real.normalized(tried), task, 0).argmax(1).cpu() == c
            # Wrong ones only where there are not enough.
            chosen.append(torch.cat([tried[right], tried[~right]])[:count])
        return torch.cat(chosen)

    def _first_logits(self, images: Tensor, task: Task) -> Tensor:
        """Return logits [m, k] to begin the labels from."""
        hard, judges = one_hot(task), range(min(JUDGES, self.experts))
        if self.start == "real":
            all_ = torch.stack([self._logits(images, task, k) for k in judges])
            right = all_.argmax(2) == hard.argmax(1)
            mean = (all_ * right.unsqueeze(2)).sum(0) / right.sum(0).clamp_min(1).unsqueeze(1)
            return torch.where(right.any(0).unsqueeze(1), mean, _certain(hard))
        rows = []
        for c, members in enumerate(task.real.by_class):
            seen = task.real.normalized(members[:SEEN])
            all_ = torch.cat([self._logits(seen, task, k) for k in judges])
            right = all_[all_.argmax(1) == c]
            rows.append(right.mean(0) if len(right) else _certain(_unit(c, hard)))
        return torch.stack(rows)[hard.argmax(1)]

    def _logits(self, images: Tensor, task: Task, expert: int) -> Tensor:
        """Return an expert's logits [m, k] at its last usable epoch."""
        epoch = int(task.prepared["usable"][expert])
        vector = expert_at(task.prepared, expert, epoch, images.device)
        return student_of(task).logits(vector, images)


def _certain(hard: Tensor) -> Tensor:
    """Return logits whose softmax is nearly a one-hot label."""
    return 5 * hard


def _unit(c: int, like: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(c, device=like.device), like.shape[1]).float()
