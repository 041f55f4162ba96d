"""What is measured of a dataset before distillation: small random samples, its variation."""

import dataclasses
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .arms import arm_rows, random_arm
from .backbones import backbone as read_backbone
from .budget import Budget
from .compute import Compute
from .engine import Engine, Here
from .errors import DataError, UsageError
from .methods import Task
from .methods.base import recipe_of
from .methods.random import Random
from .progress import hushed, progress
from .records import Json
from .rng import Rng
from .sets import RealSet, Splits
from .variation import variation

BACKBONE = "convnet-3-32"
SIZES = (1, 2, 5, 10, 20)
DRAWS = 3
FIRST_SEED = 1000  # so that no study's random images are among these
STEPS, BATCH, RATE = 200, 128, 0.02  # the rate lies between the two that pilots choose most
MOST_VALIDATION = 1000
SCORES = ("accuracy", "balanced_accuracy", "auc")
HERE: Engine = Here()


class _Sample(NamedTuple):
    train: RealSet
    val: RealSet
    size: int
    seed: int
    backbone: str
    threads: int


def measure(
    train: RealSet,
    val: RealSet,
    *,
    seed: int = 0,
    sizes: Sequence[int] = SIZES,
    draws: int = DRAWS,
    backbone: str = BACKBONE,
    engine: Engine = HERE,
    threads: int = 1,
) -> Json:
    """Train students on small random samples, score them on the validation split, and count.

    Returns: {"random": {size: {score: [of each draw]}}, "variation": {...}, "classes", "train",
    "shape", "channels", "seconds"}; sizes (images per class) that a class does not reach are left
    out. A student trains 200 steps of 128 images at a rate of 0.02. The test split is not here.
    Raises: UsageError when images have several labels; DataError when the validation split holds
    one class.
    """
    begin = time.monotonic()
    if train.card.task == "multi-label":
        raise UsageError(
            f"found several labels of an image in {train.card.name}; expected one: the indicator "
            "knows no other task, so give another source"
        )
    if len(val.labels.unique()) < 2:
        raise DataError(
            f"{train.card.name}: found one class in the validation split; expected two or more: "
            "samples could not be scored"
        )
    order = torch.randperm(len(val), generator=Rng(seed).at("measure", "validation"))
    if len(val) > MOST_VALIDATION:
        val = val.take(order[:MOST_VALIDATION].sort().values)
    if train.file is not None:
        engine = HERE  # each sample would copy a set that is too large for that
    least = min(len(members) for members in train.by_class)
    possible = [size for size in sizes if size <= least]
    first = FIRST_SEED * (1 + seed)
    samples = [
        _Sample(train, val, size, first + draw, backbone, threads)
        for size in possible
        for draw in range(draws)
    ]
    scores: dict[str, dict[str, list[float]]] = {}
    with progress("samples", len(samples)) as advance:
        for sample, row in zip(samples, engine.map(_trained, samples), strict=True):
            mine = scores.setdefault(str(sample.size), {name: [] for name in SCORES})
            for name in SCORES:
                mine[name].append(row[name])
            advance(note=f"{sample.size} per class: {row['accuracy']:.3f}")
    return {
        "random": scores,
        "variation": dataclasses.asdict(variation(train, seed=seed)),
        "classes": len(train.card.classes),
        "train": len(train),
        "shape": list(train.card.shape),
        "channels": train.card.channels,
        "backbone": backbone,
        "seconds": round(time.monotonic() - begin, 3),
    }


def _trained(sample: _Sample) -> Json:
    """Train one student on one draw and score it where its choice would be made."""
    torch.set_num_threads(sample.threads)
    student = read_backbone(sample.backbone)
    compute = Compute("bfloat16")
    task = Task(sample.train, Budget(ipc=sample.size), student, compute=compute)
    rng = Rng(sample.seed)
    drawn = Random().finish(Random().init(task, rng), task, rng)
    recipe = dataclasses.replace(recipe_of(task), steps=STEPS, stop=STEPS, batch=BATCH, lr=RATE)
    splits = Splits(sample.train, sample.val, sample.val)
    with hushed():
        rows, _ = arm_rows(
            random_arm(drawn, splits),
            splits,
            recipe,
            student,
            seeds=[sample.seed],
            rates=(),
            compute=compute,
        )
    return {name: rows[0][name] for name in SCORES}
