"""HoP-TM: match easy parameters first, and the shape of the way."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UsageError
from ..records import State
from ..rng import Rng
from .base import Task
from .trajectory_matching import AlongFlatExperts, Compared, Path, ending

EASY, GROWTH, EVERY = 5e-9, 1.5, 500  # squared errors that count as matched, and their growth


@dataclass(frozen=True)
class HoPTM(AlongFlatExperts):
    """High-order progressive trajectory matching.

    L = sum_j b_j (theta_N - theta*)_j^2 / sum_j b_j (theta_0 - theta*)_j^2 + shape S, where b_j
    is 1 from the step on in which (theta_N - theta*)_j^2 < 5e-9 1.5^(step // 500), and S is the
    smooth L1 distance between the cosines of all angles of the triangles (begin, middle, end) of
    student and expert.
    Source: Bian et al., arXiv 2509.24177; angles as in Park et al., CVPR 2019.
    Departures: those of MTT; while no parameter is easy, all are matched (the released code
    divides 0 by 0); experts train at the common rate.
    """

    iterations: int = 10_000
    student_steps: int = 80
    max_start: int = 4
    lr_images: float = 10.0
    lr_rate: float = 1e-7
    batch_synthetic: int = 10
    shape: float = 0.5
    name: ClassVar[str] = "hop_tm"
    paper: ClassVar[str] = "arXiv 2509.24177"
    beats_random: ClassVar[bool] = True

    def check(self, task: Task) -> None:
        """Refuse a stretch of one epoch, which has no middle and so no shape."""
        super().check(task)
        if self.shape and self.expert_epochs < 2:
            raise UsageError(
                f"found expert_epochs {self.expert_epochs} for hop_tm; expected 2 or more, for a "
                "way of one has no middle: or take --shape 0"
            )

    def as_in_paper(self, task: Task) -> "HoPTM":
        """Set what the paper has for PathMNIST at 10 images per class."""
        return HoPTM(experts=100, patience=0, start="real")

    def init(self, task: Task, rng: Rng) -> State:
        """Begin with no parameter that counts as easy."""
        state = super().init(task, rng)
        size = len(task.prepared["expert.0.start"])
        return {**state, "easy": torch.zeros(size, dtype=torch.bool, device=task.real.device)}

    def compare(self, thetas: Sequence[Tensor], path: Path, state: State) -> Compared:
        """Return both parts of L, and the parameters that are easy from now on."""
        end, middle = len(thetas) - 1, (len(thetas) - 1) // 2
        left = thetas[end] - path.target
        bound = EASY * GROWTH ** (int(state["step"]) // EVERY)
        easy = state["easy"] | (left.square() < bound)
        counts = easy if bool(easy.any()) else torch.ones_like(easy)
        way = ((path.start - path.target).square() * counts).sum().clamp_min(1e-30)
        corners = [theta.detach().requires_grad_() for theta in (thetas[middle], thetas[end])]
        own = angles(torch.stack([thetas[0], *corners]))
        bent = self.shape * F.smooth_l1_loss(own, angles(torch.stack(list(path[:3]))))
        in_middle, in_end = torch.autograd.grad(bent, corners)
        cotangents = {middle: in_middle, end: in_end + 2 * left * counts / way}
        # The part over easy parameters says nothing as long as few are: log that over all.
        return Compared(ending(thetas, end, path).loss, cotangents, {"easy": easy})


def angles(corners: Tensor) -> Tensor:
    """Return the cosines [n, n, n] of all angles that points [n, p] span, by corner first."""
    edges = F.normalize(corners.unsqueeze(0) - corners.unsqueeze(1), dim=2)
    return torch.bmm(edges, edges.transpose(1, 2))
