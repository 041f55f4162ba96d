"""Reconstruction: do images still show the real ones that they started from?"""

from dataclasses import dataclass

import torch

from ..methods import Method, Task
from ..rng import Rng
from ..sets import RealSet, SyntheticSet
from .copies import nearest_members
from .curves import exact_interval


@dataclass(frozen=True)
class Recovered:
    """How many images lead back to their start: it is the nearest of all training images to them.

    `chance` is what images that forgot their start would reach by luck.
    """

    images: int
    recovered: int
    low: float
    high: float
    chance: float

    @property
    def failed(self) -> bool:
        """Whether more lead back than chance allows."""
        return self.low > self.chance


def recovered(
    made: SyntheticSet, method: Method, task: Task, members: RealSet, seed: int
) -> Recovered | None:
    """Start the run again and look which training image each image started from.

    `members` are the training images as a student of the set sees them.
    None where images did not start from real ones. Every tile of an image is one.
    """
    if method.start != "real":
        return None
    begun = method.finish(method.init(task, Rng(seed)), task, Rng(seed))
    first, _ = begun.to_train()
    last, labels = made.to_train()
    start, now = (nearest_members(images, members) for images in (first, last))
    count, hits = len(last), int((start == now).sum())
    # By luck within the class: whoever knows the class looks there.
    sizes = torch.tensor([len(members) for members in task.real.by_class], dtype=torch.float64)
    chance = float((1 / sizes)[labels.argmax(1)].mean())
    return Recovered(count, hits, *exact_interval(hits, count), chance)
