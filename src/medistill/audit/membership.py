"""Membership inference over the whole way: distill, train a student, and ask it who was in."""

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..augment import Augmentation
from ..backbones import Backbone
from ..budget import Budget
from ..compute import PLAIN, Compute
from ..distill import distill
from ..engine import Engine, Here
from ..errors import UsageError
from ..features import logits_of_set
from ..methods import Method, Task
from ..methods.base import labels_at, recipe_of
from ..model import train
from ..privacy import Guarantee
from ..private_sketch import audited_release, signals_of
from ..probes import SketchSpec
from ..progress import progress
from ..rng import Rng
from ..sets import Origin, RealSet, SyntheticSet
from ..sketch import sketch
from .curves import LEVEL, Array, Curve, clustered
from .one_run import OneRun, one_run
from .signals import Bools, Integers, calibrated, lira, nearness, rmia, sureness

HERE: Engine = Here()
FEWEST = 4  # models; with fewer some image is in all or none of the others
Attack = Literal["lira", "rmia", "set"]
ATTACKS: tuple[Attack, ...] = ("lira", "rmia", "set")


class Pool(NamedTuple):
    """Whom the audit asks about: images that are in by chance, and some that never are.

    `canaries` marks those with a wrong label, which only a model that saw them believes: they are
    the worst case. `units` numbers who is in or out as one: the images of a patient, where the
    source names patients, or equal images; each image alone elsewhere.
    Shapes: canaries bool [n]; units int64 [n], 0 to the number of units.
    """

    real: RealSet
    canaries: Tensor
    outside: RealSet
    units: Tensor

    @property
    def first(self) -> Integers:
        """The position of the first image of each unit, int64 [u]."""
        found: Integers = np.unique(self.units.numpy(), return_index=True)[1]
        return found

    def by_unit(self, scores: Array) -> Array:
        """Return the mean over each unit's images [models, u] of scores [models, n], nan of none.

        The attacker knows all images of a patient, and asks about the patient. Scores that are nan
        are left out.
        """
        units = self.units.numpy()
        known = np.isfinite(scores)
        total, count = (np.zeros((int(units.max()) + 1, len(scores))) for _ in range(2))
        np.add.at(total, units, np.where(known, scores, 0).T)
        np.add.at(count, units, known.T)
        with np.errstate(invalid="ignore"):
            mean: Array = (total / count).T
        return mean


def pool_of(
    members: RealSet, others: RealSet, *, images: int, canaries: int, seed: int = 0
) -> Pool:
    """Draw the images to ask about from training images, some with a wrong label.

    Units are drawn whole, but for the last, and all images of a unit are canaries or none:
    `canaries` of `images` is their share of units.
    Raises: UsageError when there are fewer training images than asked for.
    """
    if images > len(members) or not 0 <= canaries <= images:
        raise UsageError(
            f"found {len(members)} training images for {images}, {canaries} of them canaries; "
            "expected enough of them"
        )
    rng, classes = Rng(seed).child("pool"), len(members.card.classes)
    order = _first_units(_numbered(members), images, rng.at("images"))
    real = members.take(order)
    units = _numbered(real)
    count = int(units.max()) + 1
    chosen = torch.randperm(count, generator=rng.at("canaries"))[: canaries * count // images]
    marked = torch.isin(units, chosen)
    shift = torch.randint(1, classes, (images,), generator=rng.at("labels"))
    wrong = (real.labels.cpu() + shift) % classes
    labels = torch.where(marked, wrong, real.labels.cpu()).to(real.device)
    return Pool(RealSet(real.images, labels, real.card, real.groups), marked, others, units)


def _numbered(real: RealSet) -> Tensor:
    """Return the unit of each image, from 0 on."""
    if real.groups is None:
        return torch.arange(len(real))
    number: Tensor = real.groups.unique(return_inverse=True)[1]
    return number


def _first_units(units: Tensor, images: int, generator: torch.Generator) -> Tensor:
    """Return the positions of so many images, of units in an order drawn at random."""
    count = int(units.max()) + 1
    place = torch.empty(count, dtype=torch.int64)
    place[torch.randperm(count, generator=generator)] = torch.arange(count)
    return place[units].argsort(stable=True)[:images].sort().values


@dataclass(frozen=True)
class Way:
    """How a set is made and what is trained on it: what an attacker is assumed to know.

    With `copies` the set is all its images as they are: the positive control, whose canaries every
    attack must find. With a `spec` each model distills from a sketch of its own, and with a
    `guarantee` from a private release for the unit it names; none of them leaves the audit.
    """

    method: Method
    budget: Budget
    backbone: Backbone
    steps: int | None = None
    student_steps: int = 300
    rate: float = 0.02
    batch: int = 128
    augmentation: Augmentation = field(default_factory=Augmentation)
    compute: Compute = PLAIN
    copies: bool = False
    spec: SketchSpec | None = None
    guarantee: Guarantee | None = None


class Shadows(NamedTuple):
    """Models whose members are known: how sure they are, and how near their sets lie.

    Shapes: inside bool [models, n]; signals [models, n + z]; near [models, n].
    """

    inside: Bools
    signals: Array
    near: Array


def coins(units: Tensor, models: int, seed: int = 0) -> Bools:
    """Return which images are in which model, by a coin for each unit and model: [models, n].

    Coins are independent, so that the other models tell nothing of a model's members: with exactly
    half of the models for each image, how many of the others have it would.
    """
    drawn = torch.rand((models, int(units.max()) + 1), generator=Rng(seed).at("coins"))
    found: Bools = (drawn < 0.5)[:, units].numpy()
    return found


def shadows(pool: Pool, way: Way, *, models: int, seed: int = 0, engine: Engine = HERE) -> Shadows:
    """Go the whole way once for each model, on the images it drew, and ask it about all.

    Raises: UsageError when there are fewer than four models.
    """
    if models < FEWEST:
        raise UsageError(f"found {models} models; expected {FEWEST} or more")
    inside = coins(pool.units, models, seed)
    jobs = [(torch.from_numpy(row), seed * 1000 + number) for number, row in enumerate(inside)]
    found = []
    with progress("models", models) as advance:
        for row in engine.map(partial(ask, pool, way), jobs):
            found.append(row)
            advance()
    signals, near = (np.stack(rows) for rows in zip(*found, strict=True))
    return Shadows(inside, signals, near)


def ask(pool: Pool, way: Way, job: tuple[Tensor, int]) -> tuple[Array, Array]:
    """Return how sure one model is of all images, those outside last, and how near its set is."""
    inside, seed = job
    part = pool.real.take(inside.nonzero().flatten())
    looks, how = way.augmentation, way.compute
    task = Task(part, way.budget, way.backbone, augmentation=looks, compute=how)
    if way.spec is not None and not way.copies:
        task = _sketched(task, way.spec, way.guarantee)
    if way.copies:
        made = _copied(part, task)
    else:
        made = distill(way.method, task, seed=seed, steps=way.steps)
    steps = {"steps": way.student_steps, "stop": way.student_steps, "lr": way.rate}
    recipe = dataclasses.replace(made.recipe, batch=way.batch, **steps)  # type: ignore[arg-type]
    network = train(made, recipe, seed=seed)
    asked = [real.whitened(network.whitening) for real in (pool.real, pool.outside)]
    signals = [sureness(logits_of_set(network, real), real.labels.cpu()) for real in asked]
    images, _ = made.to_train()
    near = nearness(asked[0].normalized(torch.arange(len(asked[0]))).cpu(), images)
    return np.concatenate(signals), near


def _sketched(task: Task, spec: SketchSpec, guarantee: Guarantee | None) -> Task:
    """Return the task of a sketch of its images, with the noise of a guarantee if there is one."""
    real = task.real
    if guarantee is None:
        held = sketch(real, spec, task.compute)
    else:
        held = audited_release(real, _promised(real, guarantee), spec, guarantee, task.compute)
    return dataclasses.replace(task, real=held.without_images(), sketch=held)


def _promised(real: RealSet, guarantee: Guarantee) -> Tensor:
    """Return the unit of each image as `private_sketch` counts them, int64 [n].

    Patients, or images with those that equal them.
    """
    each = guarantee.unit == "image" and real.card.patients
    return torch.arange(len(real)) if each or real.groups is None else real.groups


def drowning(pool: Pool, way: Way, inside: Bools) -> float | None:
    """Return how noisy the noisiest class of an attacked model is; None where there is no noise.

    A share of the longest mean there is (see `private_sketch.plan`), and the median over models:
    each has the images that its coins gave it, and all the noise. Shapes: inside [models, n].
    """
    if way.spec is None or way.guarantee is None:
        return None
    noise = []
    for row in torch.from_numpy(inside):
        part = pool.real.take(row.nonzero().flatten())
        units = _promised(part, way.guarantee)
        signals = signals_of(part, units, way.spec, way.guarantee)
        noise.append(max(one.noise for one in signals))
    return statistics.median(noise)


def _copied(part: RealSet, task: Task) -> SyntheticSet:
    """Return a set of real images as they are, to be trained on without augmentation."""
    index = torch.arange(len(part))
    images = part.images.float() / part.full
    plain = recipe_of(task)
    still: dict[str, object] = {**plain.augmentation, "kinds": []}
    recipe = dataclasses.replace(plain, augmentation=still)
    origin = Origin("copies", {}, 0, "real", True, part.card.digest, "")
    return SyntheticSet(images, labels_at(part, index), recipe, origin, part.card)


class Leak(NamedTuple):
    """What one attack found, of images with their own labels and of canaries."""

    attack: Attack
    natural: Curve | None
    canaries: Curve | None


def attack(
    pool: Pool, held: Shadows, kinds: Sequence[Attack] = ATTACKS, level: float = LEVEL
) -> list[Leak]:
    """Attack each model with all others as references; areas have intervals of `level`.

    `lira` and `rmia` ask the student, `set` the distilled images themselves. The score of a unit is
    the mean of its images' scores, and intervals come from drawing units.
    """
    every = range(len(held.inside))
    canaries, inside = pool.canaries.numpy()[pool.first], held.inside[:, pool.first]
    found = []
    for kind in kinds:
        scores = pool.by_unit(np.stack([scored(pool, held, kind, target) for target in every]))
        found.append(_measured(kind, scores, inside, canaries, level))
    return found


def scored(pool: Pool, held: Shadows, kind: Attack, target: int) -> Array:
    """Return what one attack says of each image being in one model, all others known: [n]."""
    n = len(pool.real)
    rest = np.arange(len(held.inside)) != target
    mine, others, inside = held.signals[target], held.signals[rest], held.inside[rest]
    if kind == "lira":
        return lira(mine[:n], others[:, :n], inside)
    if kind == "set":
        return calibrated(held.near[target], held.near[rest], inside)
    return rmia(mine[:n], others[:, :n], inside, mine[n:], others[:, n:])


def guessed(pool: Pool, held: Shadows, delta: float) -> OneRun:
    """Guess which canaries the first model has, by LiRA with all others as references.

    The others' coins are independent of its own, so that the bound is of this one run. Half of the
    canaries are guessed; a canary that has no score is as likely in as out.
    Raises: UsageError when there are fewer than four canaries.
    """
    marked, inside = pool.canaries.numpy()[pool.first], held.inside[0][pool.first]
    scores = np.nan_to_num(pool.by_unit(scored(pool, held, "lira", 0)[None])[0])
    return one_run(scores[marked], inside[marked], int(marked.sum()) // 4 * 2, delta)


def _measured(kind: Attack, scores: Array, inside: Bools, canaries: Bools, level: float) -> Leak:
    def curve(which: Bools) -> Curve | None:
        if not which.any():
            return None
        return clustered(scores[:, which], inside[:, which], level=level)

    return Leak(kind, curve(~canaries), curve(canaries))


def nothing_to_find(pool: Pool, held: Shadows, seed: int = 0) -> Shadows:
    """Return the same models with members drawn anew: the negative control.

    Who is said to be in has nothing to do with who was; an attack that finds them is broken.
    """
    return held._replace(inside=coins(pool.units, len(held.inside), seed + 1_000_003))
