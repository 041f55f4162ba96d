"""Random real images: the baseline of every result."""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from ..records import State
from ..rng import Rng
from ..sets import TaskKind
from .base import Log, Method, Task, choose, selected


@dataclass(frozen=True)
class Random(Method):
    """Choose real images of each class at random, without repetition.

    Source: the baseline of arXiv 2006.05929, table 1.
    Departures: multi-label images, which the paper has not, are drawn so that all labels occur.
    """

    start: Literal["real"] = "real"
    name: ClassVar[str] = "random"
    paper: ClassVar[str] = "arXiv 2006.05929"
    tasks: ClassVar[tuple[TaskKind, ...]] = get_args(TaskKind)

    def steps(self, task: Task) -> int:
        """Return 0: a choice is made at once."""
        return 0

    def init(self, task: Task, rng: Rng) -> State:
        """Choose."""
        generator = rng.at("choice")
        return selected(task, choose(task.real, task.counts, task.total, generator))

    def step(self, state: State, task: Task, rng: Rng) -> tuple[State, Log]:
        """Change nothing: there is no step to make."""
        return state, {"loss": 0.0}
