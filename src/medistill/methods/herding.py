"""Herding: real images whose running mean of features follows the class mean."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..records import State
from ..rng import Rng
from .base import Log, Method, Task, selected
from .feature_net import class_features, trained


@dataclass(frozen=True)
class Herding(Method):
    """Choose images greedily so that the mean of the chosen features stays near the class mean.

    w_0 = mu; x_k = argmax over unused x of <w_{k-1}, phi(x)>; w_k = w_{k-1} + mu - phi(x_k)
    Source: Welling, ICML 2009; as a baseline in arXiv 2006.05929. phi: a network trained on the
    real training split for `feature_steps` steps.
    Departures: the papers do not fix the feature network; ours is the task's backbone.
    """

    feature_steps: int = 300
    start: Literal["real"] = "real"
    name: ClassVar[str] = "herding"
    paper: ClassVar[str] = "Welling, ICML 2009"

    def steps(self, task: Task) -> int:
        """Return 0: the choice is made at once."""
        return 0

    def prepare(self, task: Task, rng: Rng) -> State:
        """Train the feature network."""
        return trained(task, self.feature_steps, rng)

    def init(self, task: Task, rng: Rng) -> State:
        """Choose class by class."""
        chosen = [
            members[herd(features, task.ipc)]
            for members, features in zip(task.real.by_class, class_features(task), strict=True)
        ]
        return selected(task, torch.cat(chosen))

    def step(self, state: State, task: Task, rng: Rng) -> tuple[State, Log]:
        """Change nothing: there is no step to make."""
        return state, {"loss": 0.0}


def herd(features: Tensor, count: int) -> Tensor:
    """Return the positions of the first `count` herded rows of features [n, d], in order."""
    mean = features.double().mean(0)
    weight = mean.clone()
    free = torch.ones(len(features), dtype=torch.bool)
    chosen = []
    for _ in range(count):
        scores = (features.double() @ weight).masked_fill(~free, -torch.inf)
        k = int(scores.argmax())
        free[k] = False
        chosen.append(k)
        weight += mean - features[k].double()
    return torch.tensor(chosen)
