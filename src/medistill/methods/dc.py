"""DC: match the gradients that real and synthetic images give a network in training."""

from dataclasses import dataclass, replace
from typing import ClassVar

from ..augment import Augmentation
from .base import Task
from .gradient_matching import GradientMatching


@dataclass(frozen=True)
class DC(GradientMatching):
    """Dataset condensation with gradient matching.

    min_S E_theta0 sum_t sum_c D(grad CE(S_c; theta_t), grad CE(T_c; theta_t)), where theta_{t+1}
    follows from `inner` epochs of SGD on S (equations 9 and 10)
    Source: Zhao, Mopuri and Bilen, ICLR 2021, arXiv 2006.05929.
    Departures: none known in the loss. A step here is one of the `outer` rounds of an iteration;
    loops for numbers of images that the paper leaves out are interpolated between its own.
    """

    name: ClassVar[str] = "dc"
    paper: ClassVar[str] = "arXiv 2006.05929"
    beats_random: ClassVar[bool] = True

    def as_in_paper(self, task: Task) -> "DC":
        """Start from noise."""
        return replace(self, start="noise")

    def view(self, task: Task) -> Augmentation:
        """Return no augmentation."""
        return Augmentation(kinds=())
