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
    """One attribute: how often it is guessed of members, by a model of the set and by a control.

    The control saw no member, so only what is guessed better than by it tells about members; `low`
    and `high` bound that advantage, of the same members.
    """

    name: str
    guessed: float
    control: float
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
    network: Network, control: Network, members: RealSet, *, seed: int = 0
) -> list[Attribute]:
    """Guess each attribute of members from what a model says of their images and classes.

    The attacker knows the attribute of half of the members and learns it by a random forest on
    logits and class, for what is remembered need not be linear; asked is the other half. The same
    with the control's logits, on the same members: the advantage is the mean difference, with 95%
    intervals of paired differences.
    Attributes are the facts of a source with 2 to 10 values, 20 members of each or more.
    """
    order = torch.randperm(len(members), generator=Rng(seed).at("attributes")).numpy()
    known, asked = order[: len(order) // 2], order[len(order) // 2 :]
    seen = [_seen(one, members) for one in (network, control)]
    found = []
    for name in members.facts:
        values = _values(members, name)
        if not _usable(values):
            continue
        own, other = (_guessed(rows, values, known, asked) for rows in seen)
        gain = own.astype(float) - other.astype(float)
        half = 1.959964 * float(gain.std(ddof=1)) / len(gain) ** 0.5
        mean = float(gain.mean())
        counts = np.unique(values, return_counts=True)[1]
        largest = float(counts.max() / counts.sum())
        shares = float(own.mean()), float(other.mean())
        found.append(Attribute(name, *shares, largest, mean - half, mean + half))
    return found


def _guessed(rows: Array, values: Array, known: Array, asked: Array) -> Bools:
    from sklearn.ensemble import RandomForestClassifier

    model = RandomForestClassifier(200, min_samples_leaf=5, random_state=0)
    model.fit(rows[known], values[known])
    right: Bools = model.predict(rows[asked]) == values[asked]
    return right


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
