"""DSA: gradient matching under differentiable siamese augmentation."""

from dataclasses import dataclass, replace
from typing import ClassVar

from ..augment import Augmentation
from .base import Task
from .gradient_matching import GradientMatching


@dataclass(frozen=True)
class DSA(GradientMatching):
    """Gradient matching with the same augmentation on real and synthetic images.

    D(grad CE(A_w(S_c); theta), grad CE(A_w(T_c); theta)) with one draw w for each class and step
    (equation 7); the network also trains on augmented images
    Source: Zhao and Bilen, ICML 2021, arXiv 2102.08259.
    Departures: images start from noise unless told otherwise (paper: real images); steps and
    loops as in DC.
    """

    name: ClassVar[str] = "dsa"
    paper: ClassVar[str] = "arXiv 2102.08259"
    beats_random: ClassVar[bool] = True

    def as_in_paper(self, task: Task) -> "DSA":
        """Start from real images."""
        return replace(self, start="real")

    def view(self, task: Task) -> Augmentation:
        """Return the task's augmentation, the same on both sides."""
        return task.augmentation
