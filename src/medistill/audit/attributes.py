"""Attributes and subgroups: what a model tells of members, and whom it serves worse."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
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
    """One attribute: how often a model of the set lets it be guessed of members, and of others.

    What is guessed of others is seen in any image; only what is guessed better of members was
    remembered of them. `low` and `high` bound that advantage.
    """

    name: str
    guessed: float
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
    """Guess each attribute from what a model says of images and their classes.

    The attacker knows the attribute of half of the members (patients, where they are known) and
    learns it by a random forest on logits and class, for what is remembered need not be linear;
    asked are the other half, and the others, of whom nothing can be remembered. The advantage is
    the difference of the shares that are guessed right, with intervals of 95% for all attributes
    together, whose deviation counts the images of a patient as one.
    Attributes are the facts of a source with 2 to 10 values, 20 members of each or more.
    """
    from scipy.stats import norm

    units = _units(members)
    names = np.unique(units)
    chosen = np.random.default_rng(Rng(seed).integer("attributes")).permutation(names)
    known = np.isin(units, chosen[: len(names) // 2])
    seen, strange = _seen(network, members), _seen(network, others)
    told = {name: _values(members, name) for name in members.facts if name in others.facts}
    told = {name: values for name, values in told.items() if _usable(values)}
    times = float(norm.ppf(1 - 0.05 / (2 * max(1, len(told)))))
    found = []
    for name, values in told.items():
        guess = _forest(seen[known], values[known])
        own = guess(seen[~known]) == values[~known]
        other = guess(strange) == _values(others, name)
        gain = float(own.mean() - other.mean())
        half = times * math.hypot(_deviation(own, units[~known]), _deviation(other, _units(others)))
        counts = np.unique(values, return_counts=True)[1]
        largest = float(counts.max() / counts.sum())
        shares = float(own.mean()), float(other.mean())
        found.append(Attribute(name, *shares, largest, gain - half, gain + half))
    return found


def _forest(rows: Array, values: Array) -> Callable[[Array], Array]:
    from sklearn.ensemble import RandomForestClassifier

    model = RandomForestClassifier(200, min_samples_leaf=5, random_state=0)
    model.fit(rows, values)
    guess: Callable[[Array], Array] = model.predict
    return guess


def _units(real: RealSet) -> NDArray[np.int64]:
    groups = torch.arange(len(real)) if real.groups is None else real.groups.cpu()
    found: NDArray[np.int64] = groups.numpy()
    return found


def _deviation(right: Bools, units: NDArray[np.int64]) -> float:
    """Return the standard deviation of a share whose images go together by unit.

    s^2 = G / (G - 1) sum over units g of (sum over its images of (x - mean))^2 / n^2
    """
    _, place = np.unique(units, return_inverse=True)
    sums = np.bincount(place, right - right.mean())
    return math.sqrt(len(sums) / max(1, len(sums) - 1) * float((sums**2).sum())) / len(right)


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
