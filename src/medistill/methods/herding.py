"""Herding: real images whose running mean of features follows the class mean."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .feature_net import FeatureSelection


@dataclass(frozen=True)
class Herding(FeatureSelection):
    """Choose images greedily so that the mean of the chosen features stays near the class mean.

    w_0 = mu; x_k = argmax over unused x of <w_{k-1}, phi(x)>; w_k = w_{k-1} + mu - phi(x_k)
    Source: Welling, ICML 2009; as a baseline in arXiv 2006.05929. phi: a network trained on the
    real training split for `feature_steps` steps.
    Departures: the papers do not fix the feature network; ours is the task's backbone.
    """

    name: ClassVar[str] = "herding"
    paper: ClassVar[str] = "Welling, ICML 2009"

    def choose(self, features: Tensor, count: int) -> Tensor:
        """Return `herd(features, count)`."""
        return herd(features, count)


def herd(features: Tensor, count: int) -> Tensor:
    """Return the positions of the first `count` herded rows of features [n, d], in order."""
    mean = features.double().mean(0)
    weight = mean.clone()
    free = torch.ones(len(features), dtype=torch.bool)
    chosen = []
    for _ in range(count):
        scores = (features.double() @ weight).masked_fill(~free, -torch.inf)
        k = int(scores.argmax())
        free[k] = False
        chosen.append(k)
        weight += mean - features[k].double()
    return torch.tensor(chosen)
