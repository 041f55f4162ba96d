"""Identical images, and stratified splits that never tear a group apart."""

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from ..rng import Rng
from ..sets import Splits, copied

SHARES = {"train": 0.7, "val": 0.1, "test": 0.2}


def identical(parts: Sequence[Iterable[Tensor]]) -> list[Tensor]:
    """Number images so that two have one number just when every pixel agrees.

    Shapes: parts of blocks [b, ...] that are read once; returns int64 [n] of each part, numbered
    across all parts.

    Example:
        >>> a = torch.tensor([[1, 2], [3, 4], [1, 2]], dtype=torch.uint8)
        >>> identical([[a], [a[1:2]]])
        [tensor([0, 1, 0]), tensor([1])]
    """
    known: dict[tuple[object, ...], int] = {}
    numbers = []
    for part in parts:
        own: list[int] = []
        for block in part:
            shape = tuple(block.shape[1:])
            own += [known.setdefault((shape, key), len(known)) for key in fingerprints(block)]
        numbers.append(torch.tensor(own).long())
    return numbers


def depending(splits: Splits, *on: str) -> Splits:
    """Return splits whose images depend on each other by this too; what is empty says nothing."""
    told = "; ".join(dict.fromkeys(filter(None, (splits.train.depends, *on))))
    return Splits(*(copied(part, depends=told) for part in splits))


def fingerprints(block: Tensor) -> list[bytes]:
    """Return a digest of each image's pixels."""
    rows = block.reshape(len(block), -1).contiguous().numpy()
    return [hashlib.blake2b(row, digest_size=16).digest() for row in rows]


def assign_each(keys: Sequence[str], shares: Mapping[str, float], rng: Rng) -> dict[str, Tensor]:
    """Deal images to splits by their keys (of patients, or of pixels) alone, equal keys together.

    A key falls to a split with probability share / (sum of shares), by a digest of seed and key: no
    image decides where another one goes, as it does in `assign`, and shares come out about right.
    Shapes: returns int64 positions, in order, of each split.

    Example:
        >>> found = assign_each([str(n) for n in range(1000)], {"train": 0.7, "test": 0.3}, Rng(0))
        >>> len(found["train"]), len(found["test"])
        (696, 304)
    """
    names, ends = list(shares), list(accumulate(shares.values()))
    dealt: dict[str, list[int]] = {name: [] for name in ("train", *shares)}
    for position, key in enumerate(keys):
        place = bisect_right(ends, rng.integer("deal", key) / 2**63 * ends[-1])
        dealt[names[min(place, len(names) - 1)]].append(position)
    return {name: torch.tensor(found).long() for name, found in dealt.items()}


def assign(
    labels: Tensor, groups: Tensor, shares: Mapping[str, float], rng: Rng
) -> dict[str, Tensor]:
    """Deal images to splits by class, whole groups at a time; a group counts with its first label.

    Of a class with n images a split other than `train` gets about n share / (sum of shares), at
    least one group where three or more are there; train gets the rest.
    Shapes: labels, groups int64 [n]; returns int64 positions, in order, of each split.
    """
    total = sum(shares.values())
    members: dict[int, list[int]] = {}
    for position, group in enumerate(groups.tolist()):
        members.setdefault(group, []).append(position)
    by_class: dict[int, list[list[int]]] = {}
    for positions in members.values():
        by_class.setdefault(int(labels[positions[0]]), []).append(positions)
    dealt: dict[str, list[int]] = {name: [] for name in ("train", *shares)}
    for label, units in sorted(by_class.items()):
        order = torch.randperm(len(units), generator=rng.at("split", label)).tolist()
        images = sum(map(len, units))
        for name, share in shares.items():
            if name == "train" or len(units) < 3:
                continue
            quota = max(1, round(images * share / total))
            while quota > 0 and len(order) > 1:
                unit = units[order.pop()]
                dealt[name] += unit
                quota -= len(unit)
        for number in order:
            dealt["train"] += units[number]
    return {name: torch.tensor(sorted(found)).long() for name, found in dealt.items()}
