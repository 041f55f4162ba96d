"""K-center: real images that cover their class in feature space."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .feature_net import FeatureSelection


@dataclass(frozen=True)
class KCenter(FeatureSelection):
    """Choose images greedily, each time the one farthest from those chosen.

    s_1 = the point nearest the class mean; then argmax_x min_{s in S} ||phi(x) - phi(s)||
    Source: Gonzalez, 1985, in feature space as Sener and Savarese, ICLR 2018; as a baseline in
    arXiv 2006.05929. phi: a network trained on the real training split for `feature_steps` steps.
    Departures: the papers do not fix the feature network; ours is the task's backbone.
    """

    name: ClassVar[str] = "kcenter"
    paper: ClassVar[str] = "Sener and Savarese, ICLR 2018"

    def choose(self, features: Tensor, count: int) -> Tensor:
        """Return `spread_out(features, count)`."""
        return spread_out(features, count)


def spread_out(features: Tensor, count: int) -> Tensor:
    """Return the positions of `count` greedy centers of features [n, d], in order."""
    points = features.double()
    chosen = [int((points - points.mean(0)).square().sum(1).argmin())]
    nearest = (points - points[chosen[0]]).square().sum(1)
    while len(chosen) < count:
        # A point that is chosen has distance zero; -1 keeps it out where all distances are zero.
        nearest[chosen[-1]] = -1.0
        chosen.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, (points - points[chosen[-1]]).square().sum(1))
    return torch.tensor(chosen)
