"""What a careful eye finds in a dataset: counts, balance, duplicates, leaks, blank images."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..records import Json, to_record
from ..sets import RealSet, Splits
from . import near, shortcuts
from .split import identical

EXAMPLES = 5
IMBALANCE = 3.0
BINS = 16
RISKS = {
    "burned in": "burned-in",
    "secondary capture": "secondary-capture",
    "overlay": "overlay",
    "private": "private-tags",
}
_LEVELS = {"error": 0, "warning": 1, "info": 2}


def inspect(splits: Splits) -> Json:
    """Count images, patients and classes per split, and list findings, the gravest first.

        {"card": {...},
         "splits": {NAME: {"images", "patients", "classes": {...}, "majority"}},
         "findings": [{"kind", "severity", "count", "examples"}]}

    `majority` is the accuracy of always answering the most frequent class of that split.
    "patients_by_class" counts them by class, "histogram" is the share of pixels in 16 equal steps
    of intensity. Kinds: leak (identical images in two splits), group-leak (a patient in two
    splits),
    near-leak and near-duplicate (images that differ little, see `near.pairs`, in two splits or
    in one), label-conflict (identical images, other labels), duplicate (identical images in one
    split), shortcut (size, border or range of intensities alone tell the class, see
    `shortcuts.found`), constant (images without contrast), imbalance (classes of train with a third
    of the images of the largest, or less), and for DICOM burned-in, secondary-capture, overlay and
    private-tags (headers that say so). `count` is that of sets of images, and `surplus`, where it
    stands, that of images which could be left out.
    """
    numbers = identical([part.blocks() for part in splits])
    findings = [
        *_duplicates(splits, numbers),
        *_near(splits, numbers),
        *_groups(splits),
        *shortcuts.found(splits),
        *_risks(splits),
        *_constant(splits),
        *_imbalance(splits.train),
    ]
    return {
        "card": to_record(splits.train.card),
        "splits": {name: _counts(part) for name, part in splits._asdict().items()},
        "findings": sorted(findings, key=lambda found: _LEVELS[found["severity"]]),
    }


def _class_counts(part: RealSet) -> list[int]:
    if part.labels.ndim == 2:
        return [int(count) for count in part.labels.sum(0).tolist()]
    return torch.bincount(part.labels, minlength=len(part.card.classes)).tolist()


def _counts(part: RealSet) -> Json:
    counts = _class_counts(part)
    top = None if part.labels.ndim == 2 else max(counts) / max(1, len(part))
    return {
        "images": len(part),
        "patients": None if part.groups is None else len(part.groups.unique()),
        "patients_by_class": _patients(part),
        "histogram": _histogram(part),
        "classes": dict(zip(part.card.classes, counts, strict=True)),
        "majority": top,
    }


def _patients(part: RealSet) -> Json | None:
    if part.groups is None:
        return None
    groups = [len(part.groups[members].unique()) for members in part.by_class]
    return dict(zip(part.card.classes, groups, strict=True))


def _histogram(part: RealSet) -> list[float]:
    """Return the share of pixels in each sixteenth of the intensities."""
    counts = np.zeros(BINS, dtype=np.int64)
    for block in part.blocks():
        values = block.numpy().reshape(-1)
        width = (part.full + 1) // BINS
        counts += np.bincount(values // values.dtype.type(width), minlength=BINS)
    return [round(float(share), 6) for share in counts / max(1, counts.sum())]


def _near(splits: Splits, numbers: Sequence[Tensor]) -> list[Json]:
    names = [(name, i) for name, part in splits._asdict().items() for i in range(len(part))]
    leaks: list[str] = []
    within: list[str] = []
    for one, other in near.pairs(splits, torch.cat(list(numbers))):
        kind = within if names[one][0] == names[other][0] else leaks
        kind.append(" ~ ".join(f"{name}[{i}]" for name, i in (names[one], names[other])))
    return [
        *_finding("near-leak", "warning", leaks),
        *_finding("near-duplicate", "info", within),
    ]


def _risks(splits: Splits) -> list[Json]:
    """List the images whose headers warn that pixels or tags may name the patient."""
    findings = []
    for fact, kind in RISKS.items():
        shown = [
            f"{name}[{i}]"
            for name, part in splits._asdict().items()
            if fact in part.facts
            for i in part.facts[fact].nonzero().flatten().tolist()
        ]
        severity = "info" if fact == "private" else "warning"
        findings += _finding(kind, severity, shown)
    return findings


def _finding(kind: str, severity: str, examples: Sequence[str]) -> list[Json]:
    if not examples:
        return []
    shown: Any = list(examples[:EXAMPLES])
    return [{"kind": kind, "severity": severity, "count": len(examples), "examples": shown}]


def _members(splits: Splits, numbers: Sequence[Tensor]) -> list[list[tuple[str, int]]]:
    """Places (split, position) of every number that occurs more than once."""
    found: dict[int, list[tuple[str, int]]] = {}
    for name, part in zip(splits._fields, numbers, strict=True):
        for position, number in enumerate(part.tolist()):
            found.setdefault(number, []).append((name, position))
    return [places for places in found.values() if len(places) > 1]


def _named(places: Sequence[tuple[str, int]]) -> str:
    return " = ".join(f"{name}[{position}]" for name, position in places[:EXAMPLES])


def _duplicates(splits: Splits, numbers: Sequence[Tensor]) -> list[Json]:
    """One count per set of identical images; a set may be a leak and a conflict at once."""
    same = _members(splits, numbers)
    labels = {name: part.labels for name, part in splits._asdict().items()}
    leaks, within, conflicts = [], [], []
    surplus = sum(len(places) - 1 for places in same)
    for places in same:
        kinds = [name for name, _ in places]
        if len(set(kinds)) > 1:
            leaks.append(_named(places))
        if len(set(kinds)) < len(kinds):
            within.append(_named(places))
        first = labels[places[0][0]][places[0][1]]
        if any(not torch.equal(labels[name][position], first) for name, position in places):
            conflicts.append(_named(places))
    found = [
        *_finding("leak", "error", leaks),
        *_finding("label-conflict", "warning", conflicts),
        *_finding("duplicate", "info", within),
    ]
    for one in found:
        if one["kind"] == "duplicate":
            one["surplus"] = surplus
    return found


def _groups(splits: Splits) -> list[Json]:
    numbers = [part.groups for part in splits if part.groups is not None]
    if len(numbers) < len(splits):
        return []
    leaks = []
    for places in _members(splits, numbers):
        names = sorted({name for name, _ in places}, key=splits._fields.index)
        if len(names) > 1:
            group = int(numbers[splits._fields.index(places[0][0])][places[0][1]])
            leaks.append(f"group {group} in {' and '.join(names)}")
    return _finding("group-leak", "error", leaks)


def _constant(splits: Splits) -> list[Json]:
    found = []
    for name, part in splits._asdict().items():
        place = 0
        for block in part.blocks():
            flat = block.reshape(len(block), -1)
            blank = (flat == flat[:, :1]).all(1).nonzero().flatten() + place
            found += [f"{name}[{position}]" for position in blank.tolist()]
            place += len(block)
    return _finding("constant", "warning", found)


def _imbalance(train: RealSet) -> list[Json]:
    counts = _class_counts(train)
    if max(counts) < IMBALANCE * max(1, min(counts)):
        return []
    rare = [c for c, count in enumerate(counts) if max(counts) >= IMBALANCE * max(1, count)]
    return _finding("imbalance", "info", [f"{train.card.classes[c]}: {counts[c]}" for c in rare])
