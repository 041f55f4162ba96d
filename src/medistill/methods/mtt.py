"""MTT: images that lead a student along an expert's way."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from ..features import MOST_WHITENED
from .base import Task
from .trajectory_matching import TrajectoryMatching

# arXiv 2203.11932, appendix, CIFAR-10 at 1, 10 and 50 images per class.
PAPER: dict[int, dict[str, Any]] = {
    1: {"student_steps": 50, "max_start": 2, "lr_images": 100.0, "lr_rate": 1e-7, "rate": 0.01},
    10: {"student_steps": 30, "max_start": 20, "lr_images": 100.0, "lr_rate": 1e-5, "rate": 0.001},
    50: {"student_steps": 30, "max_start": 40, "lr_images": 1e3, "lr_rate": 1e-5, "rate": 0.001},
}


def nearest_row(table: dict[int, dict[str, Any]], ipc: int) -> dict[str, Any]:
    """Return the settings for the largest number of images per class that is not above `ipc`.

    Example:
        >>> nearest_row({1: {"a": 1}, 10: {"a": 2}}, 7)
        {'a': 1}
    """
    return dict(table[max((known for known in table if known <= ipc), default=min(table))])


def small_enough(task: Task) -> bool:
    """Say whether a task's images can be whitened."""
    return task.real.images[0].numel() <= MOST_WHITENED


@dataclass(frozen=True)
class MTT(TrajectoryMatching):
    """Matching training trajectories.

    L = |theta_N - theta*_{t+M}|^2 / |theta*_t - theta*_{t+M}|^2 (equation 2), where theta_N comes
    from theta*_t by N steps of SGD on the augmented synthetic images, whose rate is learned too
    Source: Cazenavette et al., CVPR 2022, arXiv 2203.11932, algorithm 1.
    Departures: images start near the mean of their class unless told otherwise (paper: real
    images); the derivative is the same but made step by step (see `unroll`); the student's rate
    is exp(r); experts are held out a tenth of the images, and matched no further than where they
    stopped getting better there; their way is kept in bfloat16.
    """

    name: ClassVar[str] = "mtt"
    paper: ClassVar[str] = "arXiv 2203.11932"
    beats_random: ClassVar[bool] = True

    def as_in_paper(self, task: Task) -> Self:
        """Set what the paper has for CIFAR-10 at the nearest number of images per class."""
        row = nearest_row(PAPER, task.ipc)
        zca = task.ipc < 50 and small_enough(task)
        return replace(self, **row, zca=zca, experts=100, patience=0, start="real")
