"""Identical images, and stratified splits that never tear a group apart."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..rng import Rng

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
            rows = block.reshape(len(block), -1).contiguous().numpy()
            keys = ((shape, hashlib.blake2b(row, digest_size=16).digest()) for row in rows)
            own += [known.setdefault(key, len(known)) for key in keys]
        numbers.append(torch.tensor(own).long())
    return numbers


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
