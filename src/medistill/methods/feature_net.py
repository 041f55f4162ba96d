"""The network trained on real images whose features herding and k-center choose by."""

from torch import Tensor

from ..backbones import to_spec
from ..features import of_set
from ..records import State, to_record
from ..rng import Rng
from ..sets import Recipe
from ..train import RealImages, fit
from .base import Task


def trained(task: Task, steps: int, rng: Rng) -> State:
    """Train the task's backbone on the real training split and return its parameters."""
    card = task.real.card
    network = task.backbone.build(card, rng.at("network"))
    recipe = Recipe(
        mean=card.mean,
        std=card.std,
        backbone=to_spec(task.backbone),
        augmentation=to_record(task.augmentation),
        steps=steps,
        stop=steps,
    )
    fit(network, RealImages(task.real), recipe, rng.child("fit"))
    return dict(network.state_dict())


def class_features(task: Task) -> list[Tensor]:
    """Return the features [n_c, d] of each class's images under the prepared network."""
    network = task.backbone.build(task.real.card, Rng(0).at("replaced"))
    network.load_state_dict(task.prepared)
    network.eval()
    features = of_set(network, task.real)
    return [features[members] for members in task.real.by_class]
