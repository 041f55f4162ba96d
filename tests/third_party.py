"""A method as somebody else would write it: one short file, no registration."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from medistill.methods import Log, Method, Task
from medistill.methods.base import moved, started
from medistill.records import State
from medistill.rng import Rng
from medistill.sets import Start


@dataclass(frozen=True)
class ToMean(Method):
    """Pull images to the mean of their class: a third party's method, not in the tuple.

    Source: Somebody, arXiv 0000.00000.
    Departures: none known.
    """

    lr: float = 0.1
    start: Start = "noise"
    name: ClassVar[str] = "to-mean"
    paper: ClassVar[str] = "arXiv 0000.00000"
    beats_random: ClassVar[bool] = True

    def steps(self, task: Task) -> int:
        return 30

    def init(self, task: Task, rng: Rng) -> State:
        return started(task, self.start, rng)

    def step(self, state: State, task: Task, rng: Rng) -> tuple[State, Log]:
        means = [task.real.normalized(members).mean(0) for members in task.real.by_class]
        own = state["labels"].argmax(1)
        gap = state["images"] - torch.stack(means)[own]
        noise = torch.randn(gap.shape, generator=rng.at("step", int(state["step"])))
        after = moved(state, gap + 0.1 * noise, lr=self.lr, momentum=0.5)
        return after, {"loss": float(gap.square().sum())}
