"""What herding and k-center share: a choice of images by the features of a trained network."""

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..features import of_set
from ..records import Json, State
from ..rng import Rng
from ..train import RealImages, fit
from .base import Log, Method, Task, recipe_of, selected


@dataclass(frozen=True)
class FeatureSelection(Method):
    """A choice of real images, class by class, by the features of a network trained on all."""

    feature_steps: int = 300
    start: Literal["real"] = "real"

    @abstractmethod
    def choose(self, features: Tensor, count: int) -> Tensor:
        """Return the positions of `count` rows of one class's features [n, d]."""

    def steps(self, task: Task) -> int:
        """Return 0: the choice is made at once."""
        return 0

    def prepared_from(self, task: Task) -> Json:
        """Return the length of the training: herding and k-center share one network."""
        return {"feature network": self.feature_steps}

    def prepare(self, task: Task, rng: Rng) -> State:
        """Train the feature network."""
        return trained(task, self.feature_steps, rng)

    def init(self, task: Task, rng: Rng) -> State:
        """Choose class by class."""
        parts = zip(task.real.by_class, class_features(task), task.counts, strict=True)
        chosen = [members[self.choose(features, count)] for members, features, count in parts]
        return selected(task, torch.cat(chosen))

    def step(self, state: State, task: Task, rng: Rng) -> tuple[State, Log]:
        """Change nothing: there is no step to make."""
        return state, {"loss": 0.0}


def trained(task: Task, steps: int, rng: Rng) -> State:
    """Train the task's backbone on the real training split and return its parameters."""
    network = task.network(rng.at("network"))
    recipe = replace(recipe_of(task), steps=steps, stop=steps)
    fit(network, RealImages(task.real), recipe, rng.child("fit"), compute=task.compute)
    return dict(network.state_dict())


def class_features(task: Task) -> list[Tensor]:
    """Return the features [n_c, d] of each class's images under the prepared network."""
    network = task.network(Rng(0).at("replaced"))
    network.load_state_dict(task.prepared)
    network.eval()
    features = of_set(network, task.real, task.compute).cpu()
    return [features[members] for members in task.real.by_class]
