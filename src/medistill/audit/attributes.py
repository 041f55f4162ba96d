"""Attributes and subgroups: what a model tells of members, and whom it serves worse."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

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
    asked are the other half, and the others, of whom nothing can be remembered. Others weigh as
    often as members of their class and value are asked, and what one side lacks counts on neither,
    so that a split of another mix is no leak. The advantage is the difference of the shares that
    are guessed right, with intervals of 95% for all attributes together (Agresti and Caffo, The
    American Statistician 2000: two guesses more on each side, one right), patients counted as one.
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
        elsewhere = _values(others, name)
        kinds = _kinds(members.labels.cpu().numpy()[~known], values[~known])
        weights = _matched(kinds, _kinds(others.labels.cpu().numpy(), elsewhere))
        own = _share(guess(seen[~known]) == values[~known], units[~known], weights[0])
        other = _share(guess(strange) == elsewhere, _units(others), weights[1])
        gain, half = own.middle - other.middle, times * math.hypot(own.deviation, other.deviation)
        counts = np.unique(values, return_counts=True)[1]
        largest = float(counts.max() / counts.sum())
        found.append(Attribute(name, own.mean, other.mean, largest, gain - half, gain + half))
    return found


class _Share(NamedTuple):
    """A share, and where Agresti and Caffo put it, with its standard deviation."""

    mean: float
    middle: float
    deviation: float


def _share(right: Bools, units: NDArray[np.int64], weights: Array) -> _Share:
    """Return the weighted share of units that are guessed right.

    Units are as many as weigh alike (Kish): n = (sum w)^2 / sum w^2.
    """
    if not weights.any():
        return _Share(0.5, 0.5, 1.0)  # nothing is known
    _, place = np.unique(units, return_inverse=True)
    each = np.bincount(place, weights)
    count = each.sum() ** 2 / (each**2).sum()
    mean = float((right * weights).sum() / weights.sum())
    middle = (mean * count + 1) / (count + 2)
    return _Share(mean, middle, math.sqrt(middle * (1 - middle) / (count + 2)))


def _kinds(labels: NDArray[np.int64], values: Array) -> list[tuple[int, float]]:
    """Return the class and value of each image."""
    return list(zip(labels.tolist(), values.tolist(), strict=True))


def _matched(
    asked: Sequence[tuple[int, float]], others: Sequence[tuple[int, float]]
) -> tuple[Array, Array]:
    """Return weights of both sides, by which others are as often of each kind as those asked."""
    own, there = Counter(asked), Counter(others)
    return (
        np.array([float(kind in there) for kind in asked]),
        np.array([own[kind] / there[kind] for kind in others]),
    )


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
