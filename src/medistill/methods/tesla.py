"""TESLA: MTT whose student steps are differentiated one by one."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from torch import Tensor

from ..records import State
from .base import Task
from .mtt import MTT, nearest_row
from .mtt import PAPER as MTT_PAPER
from .trajectory_matching import Path, student_of

# arXiv 2211.10586, appendix: CIFAR-10, where it differs from MTT.
PAPER: dict[int, dict[str, Any]] = {
    **MTT_PAPER,
    1: {**MTT_PAPER[1], "max_start": 6, "lr_rate": 1e-7},
}


@dataclass(frozen=True)
class TESLA(MTT):
    """Trajectory matching with constant memory and soft labels.

    Each gradient g_i of the student is taken as if theta_i did not depend on the images:
    dL/dx_i = -rate a^T dg_i/dx_i for all i, with a = 2 (theta_N - theta*) / |theta_0 - theta*|^2
    Source: Cui et al., ICML 2023, arXiv 2211.10586, section 3.2 (equations 5 to 7).
    Departures: those of MTT; the factor 2 that the released code loses is kept. `exact` puts the
    true gradient of MTT in its place. `teacher_labels` (off unless --paper) gives each image the
    softmax of the target expert, anew in each step; as long as an image does not show its class,
    that tells little.
    """

    iterations: int = 10_000
    exact: bool = False
    teacher_labels: bool = False
    name: ClassVar[str] = "tesla"
    paper: ClassVar[str] = "arXiv 2211.10586"
    beats_random: ClassVar[bool] = True

    @property
    def soft_labels(self) -> bool:
        """Labels are the experts' where that is asked for."""
        return self.teacher_labels

    def as_in_paper(self, task: Task) -> Self:
        """Set what the paper has for CIFAR-10, real start and labels of the experts."""
        row = nearest_row(PAPER, task.ipc)
        return replace(super().as_in_paper(task), **row, teacher_labels=True)

    def targets(self, state: State, task: Task, path: Path) -> Tensor:
        """Return the labels, or those of the target expert."""
        if not self.teacher_labels:
            return state["labels"]
        return student_of(task).logits(path.target, state["images"]).softmax(1)

    def label_state(self, state: State, labels: Tensor, gradient: Tensor) -> State:
        """Keep the labels that were used."""
        return {"labels": labels}
