"""K-center: real images that cover their class in feature space."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..records import State
from ..rng import Rng
from .base import Log, Method, Task, selected
from .feature_net import class_features, trained


@dataclass(frozen=True)
class KCenter(Method):
    """Choose images greedily, each time the one farthest from those chosen.

    s_1 = the point nearest the class mean; then argmax_x min_{s in S} ||phi(x) - phi(s)||
    Source: Gonzalez, 1985, in feature space as Sener and Savarese, ICLR 2018; as a baseline in
    arXiv 2006.05929. phi: a network trained on the real training split for `feature_steps` steps.
    Departures: the papers do not fix the feature network; ours is the task's backbone.
    """

    feature_steps: int = 300
    start: Literal["real"] = "real"
    name: ClassVar[str] = "kcenter"
    paper: ClassVar[str] = "Sener and Savarese, ICLR 2018"

    def steps(self, task: Task) -> int:
        """Return 0: the choice is made at once."""
        return 0

    def prepare(self, task: Task, rng: Rng) -> State:
        """Train the feature network."""
        return trained(task, self.feature_steps, rng)

    def init(self, task: Task, rng: Rng) -> State:
        """Choose class by class."""
        chosen = [
            members[spread_out(features, task.ipc)]
            for members, features in zip(task.real.by_class, class_features(task), strict=True)
        ]
        return selected(task, torch.cat(chosen))

    def step(self, state: State, task: Task, rng: Rng) -> tuple[State, Log]:
        """Change nothing: there is no step to make."""
        return state, {"loss": 0.0}


def spread_out(features: Tensor, count: int) -> Tensor:
    """Return the positions of `count` greedy centers of features [n, d], in order."""
    points = features.double()
    chosen = [int((points - points.mean(0)).square().sum(1).argmin())]
    nearest = (points - points[chosen[0]]).square().sum(1)
    while len(chosen) < count:
        # A point that is chosen has distance zero; -1 keeps it out where all distances are zero.
        nearest[chosen[-1]] = -1.0
        chosen.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, (points - points[chosen[-1]]).square().sum(1))
    return torch.tensor(chosen)
