"""ATT: match wherever the student comes nearest to the expert."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..records import State
from .mtt import MTT
from .trajectory_matching import Compared, Path, ending


@dataclass(frozen=True)
class ATT(MTT):
    """Automatic training trajectories: MTT with a length that is chosen in each step.

    L = min over i in 1..N of |theta_i - theta*_{t+M}|^2 / |theta*_t - theta*_{t+M}|^2
    Source: Liu et al., ECCV 2024, arXiv 2407.14245.
    Departures: those of MTT, whose settings it has.
    """

    name: ClassVar[str] = "att"
    paper: ClassVar[str] = "arXiv 2407.14245"
    beats_random: ClassVar[bool] = True

    def compare(self, thetas: Sequence[Tensor], path: Path, state: State) -> Compared:
        """Compare where the student is nearest; later steps get no gradient."""
        apart = torch.stack([(theta - path.target).norm() for theta in thetas])
        return ending(thetas, 1 + int(apart[1:].argmin()), path)
