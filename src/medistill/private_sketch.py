"""Sketches with a proof: one bounded vector for each patient, one noisy release of their sum."""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .compute import PLAIN, Compute, full_block
from .engine import Engine, Here
from .errors import UsageError, extra
from .features import lowered
from .ledger import Ledger
from .privacy import (
    COUNT,
    GRID,
    MOST,
    Clean,
    Guarantee,
    Unit,
    bound_of,
    clipped,
    epsilon_of,
    noise_of,
)
from .probes import GRID as SKETCH_GRID
from .probes import Probe, SketchSpec, all_spreads, check_backbone, probe
from .progress import progress
from .sets import GIVEN, Card, RealSet
from .sketch import Sketch, shape_of

CLEAR, HOPELESS = 0.3, 1.0  # noise of a class's mean, as a share of the longest mean there is
SHARD = 2**25  # numbers of unit vectors, and pixels, at once
HERE = Here()


class Signal(NamedTuple):
    """One class: its units, and the noise of its mean as a share of the longest mean there is."""

    name: str
    units: float
    noise: float


@dataclass(frozen=True)
class Plan:
    """What a release would be: its guarantee, the noise by class, and what would work instead."""

    guarantee: Guarantee
    signals: tuple[Signal, ...]
    advice: str

    @property
    def worst(self) -> Signal:
        """The class whose mean has most noise."""
        return max(self.signals, key=lambda one: one.noise)

    @property
    def hopeless(self) -> bool:
        """Whether some class's mean would drown in noise."""
        return self.worst.noise > HOPELESS


def plan(
    real: RealSet,
    spec: SketchSpec,
    *,
    epsilon: float,
    delta: float,
    unit: Unit,
    classes: Sequence[str],
) -> Plan:
    """Say how much noise a release would have in each class, before anything is released.

    noise_c = noise bound sqrt(2 J L) / units_c, the length of the noise in one network's mean of
    class c; the mean itself is no longer than 1.
    It reads the real numbers of units: it is for the owner of the data, and no part of a release.
    `classes` is the public list of classes, which must be that of the data.
    Raises: UsageError when something is private that must be public (see `check`), or delta is too
    large for the number of units.
    """
    units = check(real, unit, classes)
    guarantee = _promise(spec, epsilon, delta, unit)
    if delta * len(units.unique()) > 1:
        raise UsageError(
            f"found delta {delta:g} for {len(units.unique())} {unit}s; expected less than one in "
            "their number: such a delta would allow to publish a patient at random"
        )
    signals = signals_of(real, units, spec, guarantee)
    return Plan(guarantee, signals, _advice(spec, guarantee, signals))


def signals_of(
    real: RealSet, units: Tensor, spec: SketchSpec, promise: Guarantee
) -> tuple[Signal, ...]:
    """Return how much noise a promise puts on each class's mean (see `plan`); units int64 [n]."""
    width = math.sqrt(2 * spec.frequencies * len(spec.sizes(real.card)))
    length = promise.noise * promise.bound * width
    _, number, counts = units.unique(return_inverse=True, return_counts=True)
    shares = torch.zeros(len(real.card.classes), dtype=torch.float64)
    shares.index_add_(0, real.labels.cpu(), 1 / counts[number].double())
    return tuple(
        Signal(name, round(share, 3), length / max(share, 1e-9))
        for name, share in zip(real.card.classes, shares.tolist(), strict=True)
    )


def _check_bounded(spec: SketchSpec) -> None:
    """Refuse what the bound of a patient's vector does not hold for."""
    if spec.moments:
        raise UsageError(
            f"found moments {spec.moments} in a private sketch; expected 0: no noise is made for "
            "them, so leave --moments out"
        )


def _promise(spec: SketchSpec, epsilon: float, delta: float, unit: Unit) -> Guarantee:
    _check_bounded(spec)
    noise, bound = noise_of(epsilon, delta), bound_of(spec.networks)
    if noise * bound * SKETCH_GRID * 40 > MOST:
        raise UsageError(
            f"found epsilon {epsilon:g} and delta {delta:g}, whose noise no number here can hold; "
            "expected more"
        )
    return Guarantee(epsilon, delta, unit, noise, bound, noise)


def _advice(spec: SketchSpec, promise: Guarantee, signals: tuple[Signal, ...]) -> str:
    """Say which epsilon, or which smaller sketch, would bring the noise down to CLEAR."""
    worst = max(signals, key=lambda one: one.noise)
    if worst.noise <= CLEAR:
        return ""
    less = promise.noise * CLEAR / worst.noise
    told = [f"--epsilon {math.ceil(10 * epsilon_of(1 / less, promise.delta)) / 10:g}"]
    fewer = math.floor(spec.frequencies * (CLEAR / worst.noise) ** 2)
    if fewer >= 8:
        told.append(f"--frequencies {fewer}")
    more = math.ceil(worst.units * worst.noise / CLEAR)
    told.append(f"{more} {promise.unit}s of {worst.name} (there are {worst.units:.0f})")
    return "noise would be moderate with " + ", or ".join(told)


def check(real: RealSet, unit: Unit, classes: Sequence[str]) -> Tensor:
    """Return the number of each image's unit, int64 [n].

    Raises: UsageError when the task has several labels, the classes are not those of the public
    list, the normalization was taken from the data, one image decides which others are there or how
    they look, patients are the unit and the source does not tell them apart, or images are and a
    patient has several.
    """
    card = real.card
    if tuple(classes) != card.classes:
        raise UsageError(
            f"found classes {', '.join(card.classes)} in {card.name}; expected those of the public "
            f"list: {', '.join(classes)}"
        )
    if card.task == "multi-label":
        raise UsageError(f"found a multi-label task in {card.name}; expected one class per image")
    if card.normalization != GIVEN:
        raise UsageError(
            f"found mean and std of {card.name} from its {card.normalization}, which are private; "
            "expected public ones: give --mean and --std, as 0.5 and 0.25"
        )
    if real.whitening is not None:
        raise UsageError("found whitening taken from the data, which is private; expected none")
    if real.depends:
        raise UsageError(
            f"found images of {card.name} that depend on each other by {real.depends}, so that one "
            f"{unit} more could change all of them; expected none that do"
        )
    if unit == "image":
        if _several(real):
            raise UsageError(
                f"found patients of {card.name} with several images; expected --unit patient, and "
                "every image's patient named: a promise for each image would say less of a patient "
                "than it seems to"
            )
        # Where no patients are named, groups number equal images: they are one.
        return torch.arange(len(real)) if real.groups is None else real.groups
    if not card.patients or real.groups is None:
        raise UsageError(
            f"found images in {card.name} whose patient is not named; expected a source that names "
            "the patient of every image (a patient column, npz groups, DICOM with PatientID), or "
            "--unit image where no patient has two images"
        )
    return real.groups


def _several(real: RealSet) -> bool:
    """Say whether somebody has several images, as far as the source knows.

    Where it names no patients, groups may number equal images too, which are no more than one.
    """
    if real.groups is None:
        return False
    order = real.groups.argsort(stable=True)
    groups = real.groups[order]
    again = (groups[1:] == groups[:-1]).nonzero().flatten()
    if real.card.patients:
        return len(again) > 0
    pairs = (real.images[order[[i, i + 1]]] for i in again.tolist())
    return any(not torch.equal(one, other) for one, other in pairs)


def private_sketch(
    real: RealSet,
    spec: SketchSpec,
    ledger: Ledger,
    *,
    epsilon: float,
    delta: float,
    unit: Unit,
    classes: Sequence[str],
    compute: Compute = PLAIN,
    engine: Engine = HERE,
) -> Sketch:
    """Return a sketch of a training split that is (epsilon, delta)-differentially private.

    v_p = mean over images x of unit p of [1 at class(x)] (z(x), COUNT), z(x) the vector of
    `Sketch`, cut toward 0 to whole numbers of 1 / GRID and to length sqrt(networks + COUNT^2);
    released: sum_p v_p + discrete Gaussian, once, after it was noted in the ledger. Nothing of the
    sum without noise is kept, and no seed could draw the noise again. Whether the noise leaves
    something to see, and delta is less than one in the number of units, is not asked here, for the
    answers depend on the data: see `plan`.
    Source: one-shot noisy moments with the exact calibration of Balle and Wang (arXiv 1805.06530);
    the proof stands in docs/privacy.md.
    Raises: UsageError when something is private that must be public (see `check`), or it would be
    compiled or computed elsewhere than on a CPU; RunRefused when the ledger's limit is reached.
    """
    if compute.compile or real.device.type != "cpu":
        found = "a compiled private sketch" if compute.compile else f"images on {real.device}"
        raise UsageError(
            f"found {found}; expected a plain sketch on a CPU: only for that it is shown that no "
            "image moves the numbers of another (docs/privacy.md)"
        )
    check_backbone(spec, real.card)
    units = check(real, unit, classes)
    extra("opendp.prelude", "dp")  # asked before anything is spent
    promise = _promise(spec, epsilon, delta, unit)
    ledger.check(real.card.name, real.digest, promise)
    spreads = all_spreads(spec, real.card)
    clean = Clean(unit_sums(real, units, spec, spreads, compute, engine), promise.bound)
    # Before the noise is drawn, and after all that takes hours or could fail.
    noted = ledger.spend(real.card.name, real.digest, promise)
    return _noisy(clean, real.card, spec, spreads, replace(promise, receipts=(noted,)))


def audited_release(
    real: RealSet,
    units: Tensor,
    spec: SketchSpec,
    promise: Guarantee,
    compute: Compute = PLAIN,
    engine: Engine = HERE,
) -> Sketch:
    """Return the sketch that one release of the units' sum gives; all but the noise is public.

    For audits, whose releases nobody sees: no ledger is asked here, so that there is no receipt and
    nobody loads such a sketch. Noisy counts are rounded, and no less than 1; the digest of the data
    is left out.
    """
    _check_bounded(spec)
    spreads = all_spreads(spec, real.card)
    clean = Clean(unit_sums(real, units, spec, spreads, compute, engine), promise.bound)
    return _noisy(clean, real.card, spec, spreads, replace(promise, receipts=()))


def _noisy(
    clean: Clean, card: Card, spec: SketchSpec, spreads: Tensor, promise: Guarantee
) -> Sketch:
    k, networks, width = shape_of(card, spec)
    noisy = clean.release(promise.noise).view(k, networks * width + 1)
    sums = (noisy[:, :-1] * (SKETCH_GRID // GRID)).view(k, networks, width)
    counts = (noisy[:, -1].double() / (GRID * COUNT)).round().clamp_min(1).long()
    # What a source says of its images may tell of one patient's, so it stays: that they are CT, MR,
    # or that each is named.
    public = replace(card, digest="", modality="", patients=promise.unit == "patient")
    return Sketch(spec, public, sums, counts, spreads, promise)


def unit_sums(
    real: RealSet,
    units: Tensor,
    spec: SketchSpec,
    spreads: Tensor,
    compute: Compute = PLAIN,
    engine: Engine = HERE,
) -> Tensor:
    """Return the sum of all units' vectors, int64 [k, networks 2 J L + 1] of 1 / GRID.

    The last number of a class counts it. What is computed of one unit never depends on another.
    """
    k, networks, width = shape_of(real.card, spec)
    order = units.argsort(stable=True)
    _, sizes = units[order].unique_consecutive(return_counts=True)
    most = max(1, SHARD // max(k * (networks * width + 1), real.images[0].numel()))
    parts = order.split(_packed(sizes.tolist(), most))
    shards = (_Shard(real.take(part), units[part]) for part in parts)
    task = partial(_shard_sums, spec=spec, spreads=spreads, compute=compute)
    total = torch.zeros((k, networks * width + 1), dtype=torch.int64)
    with progress("sketch", len(real)) as advance:
        for part, found in zip(parts, engine.map(task, shards), strict=True):
            total += found
            advance(len(part))
    return total


class _Shard(NamedTuple):
    real: RealSet
    units: Tensor


def _packed(sizes: list[int], most: int) -> list[int]:
    """Return lengths of shards of whole units, no more than `most` images where that can be.

    Example:
        >>> _packed([2, 2, 1, 5], 4)
        [4, 1, 5]
    """
    packed: list[int] = []
    for size in sizes:
        if packed and packed[-1] + size <= most:
            packed[-1] += size
        else:
            packed.append(size)
    return packed


def _shard_sums(shard: _Shard, *, spec: SketchSpec, spreads: Tensor, compute: Compute) -> Tensor:
    """Return the sum of the vectors of whole units."""
    return unit_vectors(shard.real, shard.units, spec, spreads, compute).sum(0)


class Placed(NamedTuple):
    """Images in blocks of one size [blocks, size, c, ...], and where each lies, int64 [n].

    Kernels round an image by its place in a block (the last lanes of a vector are others), so a
    place that depended on how many other images there are would let one patient move the numbers
    of another. Here it follows from the image alone; the rest of a block does not matter.
    """

    blocks: Tensor
    where: Tensor

    def vectors(self, way: Probe, compute: Compute) -> Tensor:
        """Return the images' vectors [n, 2 J L] without a gradient."""
        way = replace(way, network=lowered(way.network, compute))
        return torch.cat([way.of_images(block, compute) for block in self.blocks])[self.where]


def placed_by_content(images: Tensor) -> Placed:
    """Lay normalized images [n, c, ...] into blocks, each at the place that its pixels name."""
    size = full_block(images)
    rows = images.cpu().contiguous().flatten(1).numpy()
    places = torch.tensor([zlib.crc32(row.data) % size for row in rows])
    order = places.argsort(stable=True)
    counts = places.bincount(minlength=size)
    first = (counts.cumsum(0) - counts)[places[order]]
    rank = torch.empty_like(places)
    rank[order] = torch.arange(len(places)) - first
    blocks = images.new_zeros(int(counts.max()), size, *images.shape[1:])
    where = (rank * size + places).to(images.device)
    blocks.flatten(0, 1)[where] = images
    return Placed(blocks, where)


def unit_vectors(
    real: RealSet, units: Tensor, spec: SketchSpec, spreads: Tensor, compute: Compute = PLAIN
) -> Tensor:
    """Return the vectors of units, int64 [units, k, networks 2 J L + 1], none beyond the bound.

    Images of a unit are added as whole numbers and divided by how many there are, toward 0.
    """
    k, networks, width = shape_of(real.card, spec)
    _, number = units.unique(return_inverse=True)
    counts = number.bincount()
    found = torch.zeros((len(counts), k, networks * width + 1), dtype=torch.int64)
    placed = placed_by_content(real.normalized(torch.arange(len(real))))
    labels = real.labels.cpu()
    flat = found.view(len(counts) * k, networks * width + 1)
    row = number * k + labels
    for place in range(networks):
        way = probe(spec, real.card, place, spreads[place], real.device)
        seen = placed.vectors(way, compute).cpu().double()
        # What no image of pixels can give is worth nothing, and stops nothing.
        whole = (seen.nan_to_num(0.0, 0.0, 0.0).clamp(-1, 1) * GRID).trunc().long()
        flat[:, place * width : (place + 1) * width].index_add_(0, row, whole)
    flat[:, -1].index_add_(0, row, torch.full_like(row, int(COUNT * GRID)))
    means = torch.div(found, counts.view(-1, 1, 1), rounding_mode="trunc")
    return clipped(means, bound_of(spec.networks))
