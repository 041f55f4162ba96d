"""Attributes and subgroups: what a model tells of members, and whom it serves worse."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..backbones import Network
from ..features import logits_of_set
from ..rng import Rng
from ..sets import RealSet
from .curves import Array, exact_interval
from .signals import Bools

MOST_VALUES = 10
LEAST = 20  # images of the least frequent value, below which nothing is asked


@dataclass(frozen=True)
class Attribute:
    """One attribute: how well it is guessed of members and of others, and the largest guess.

    Only what is guessed better of members tells about them; `low` and `high` bound that advantage.
    """

    name: str
    members: float
    others: float
    majority: float
    low: float
    high: float


@dataclass(frozen=True)
class Subgroup:
    """Accuracy of one value of an attribute (or one class), with its interval."""

    name: str
    images: int
    accuracy: float
    low: float
    high: float


def attributes(
    network: Network, members: RealSet, others: RealSet, *, seed: int = 0
) -> list[Attribute]:
    """Guess each attribute from what a model says of an image, for members and for others.

    A logistic regression learns it from the model's logits and the class on half of the others, and
    is asked about the other half and about as many members as there are. The advantage is the
    difference of both accuracies, with a 95% interval for two independent shares (Newcombe 1998,
    method 10).
    Attributes are the facts of a source with 2 to 10 values, 20 images of each or more.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    order = torch.randperm(len(others), generator=Rng(seed).at("attributes")).numpy()
    known, asked = order[: len(order) // 2], order[len(order) // 2 :]
    seen = [_seen(network, part) for part in (members, others)]
    found = []
    for name in members.facts:
        values = [_values(part, name) for part in (members, others)]
        if not _usable(values[1][known]):
            continue
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        model.fit(seen[1][known], values[1][known])
        hits = [
            model.predict(seen[0]) == values[0],
            model.predict(seen[1][asked]) == values[1][asked],
        ]
        low, high = _difference(*hits)
        counts = np.unique(values[1], return_counts=True)[1]
        inside, outside = (float(one.mean()) for one in hits)
        largest = float(counts.max() / counts.sum())
        found.append(Attribute(name, inside, outside, largest, low, high))
    return found


def subgroups(network: Network, real: RealSet) -> list[Subgroup]:
    """Return a model's accuracy for each class and each value of each attribute."""
    right = (logits_of_set(network, real).argmax(1) == real.labels.cpu()).numpy()
    groups = [
        (f"class {title}", members.numpy())
        for title, members in zip(real.card.classes, real.by_class, strict=True)
    ]
    for name in real.facts:
        values = _values(real, name)
        if _usable(values):
            groups += [
                (f"{name} {value:g}", np.flatnonzero(values == value))
                for value in np.unique(values)
            ]
    made = []
    for name, index in groups:
        if len(index):
            hits = int(right[index].sum())
            low, high = exact_interval(hits, len(index))
            made.append(Subgroup(name, len(index), hits / len(index), low, high))
    return made


def _seen(network: Network, real: RealSet) -> Array:
    classes = torch.nn.functional.one_hot(real.labels.cpu(), len(real.card.classes))
    both: Tensor = torch.cat([logits_of_set(network, real).double(), classes.double()], 1)
    found: Array = both.numpy()
    return found


def _values(real: RealSet, name: str) -> Array:
    found: Array = real.facts[name].cpu().double().numpy()
    return found


def _usable(values: Array) -> bool:
    counts = np.unique(values[np.isfinite(values)], return_counts=True)[1]
    return 2 <= len(counts) <= MOST_VALUES and int(counts.min()) >= LEAST


def _difference(one: Bools, other: Bools) -> tuple[float, float]:
    """Return the interval of the difference of two shares, from the Wilson interval of each."""
    ends = []
    for hits in (one, other):
        n, p, z = len(hits), float(hits.mean()), 1.959964
        middle, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        ends.append((p, (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)))
    (p1, l1, u1), (p2, l2, u2) = ends
    low = p1 - p2 - np.sqrt((p1 - l1) ** 2 + (u2 - p2) ** 2)
    high = p1 - p2 + np.sqrt((u1 - p1) ** 2 + (p2 - l2) ** 2)
    return float(low), float(high)
