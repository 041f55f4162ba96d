"""Random real images: the baseline of every result."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ..records import State
from ..rng import Rng
from .base import Log, Method, Task, pick, selected


@dataclass(frozen=True)
class Random(Method):
    """Choose `ipc` real images of each class at random, without repetition.

    Source: the baseline of arXiv 2006.05929, table 1.
    Departures: none known.
    """

    start: Literal["real"] = "real"
    name: ClassVar[str] = "random"
    paper: ClassVar[str] = "arXiv 2006.05929"

    def steps(self, task: Task) -> int:
        """Return 0: a choice is made at once."""
        return 0

    def init(self, task: Task, rng: Rng) -> State:
        """Choose."""
        generator = rng.at("choice")
        return selected(task, torch.cat([pick(m, task.ipc, generator) for m in task.real.by_class]))

    def step(self, state: State, task: Task, rng: Rng) -> tuple[State, Log]:
        """Change nothing: there is no step to make."""
        return state, {"loss": 0.0}
