"""Sketches: sums over a set from which images are distilled without it."""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from .augment import Augmentation, Draw
from .backbones import Backbone, Network, from_spec, level_sizes
from .compute import PLAIN, Compute, Mode, full_block, worth_compiling
from .engine import Engine, Here
from .errors import DataError, UsageError
from .features import extract, extract_fast, fixed, read_size
from .privacy import Guarantee, check_promise, weakest
from .progress import progress
from .records import Json, State, canonical, digest, from_record, load_state, save_state, to_record
from .rng import Rng
from .sets import Card, RealSet, normalized_by

FORMAT = "medistill sketch 1"
# Sums are counted in steps of 2^-30: whole numbers add up to the same in every order.
GRID = 2**30
NOISE_IMAGES = 64
MOST_PIXELS = 2**26  # of one image; a file that asks for more is refused
MOST_PARAMETERS = 2**28
MOST_NUMBER = 2**12  # of layers, channels and the like
PROBES = 32  # kept in memory: drawing frequencies anew would cost a step as much as its images
SETTINGS = ("networks", "frequencies", "scale", "layers")
HERE = Here()


@dataclass(frozen=True)
class SketchSpec:
    """What a sketch asks of an image; two sketches can be added where all of this is equal.

    `networks` random networks of one backbone, each with one draw of augmentation, and for each of
    its stages (or its features alone: `layers`) `frequencies` random frequencies of size `scale`;
    all follow from `seed`, which is public.
    """

    backbone: Json
    augmentation: Json
    networks: int = 20
    frequencies: int = 512
    scale: float = 0.5
    layers: Literal["all", "last"] = "all"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("networks", "frequencies", "scale"):
            if not getattr(self, name) > 0:
                raise UsageError(f"found {name} {getattr(self, name)}; expected more than 0")
        if self.layers not in ("all", "last"):
            raise UsageError(f"found layers {self.layers!r}; expected all or last")

    def sizes(self, card: Card) -> tuple[int, ...]:
        """Return the length of each level that is looked at, for images of a card."""
        sizes = level_sizes(from_spec(self.backbone), card.channels, card.shape)
        return sizes if self.layers == "all" else sizes[-1:]


@dataclass(frozen=True, eq=False)
class Sketch:
    """The empirical characteristic function of a set's features, class by class, as sums.

    sums[c, m] = sum over images x of class c of round(GRID [cos(t_j . phi_ml(A_m(x))),
    sin(t_j . phi_ml(A_m(x)))]_jl / sqrt(J L)), phi_ml what stage l of L of network m gives, so one
    image adds a vector of norm 1 for each of the networks; counts[c] is the number of images.
    Shapes: sums int64 [k, networks, 2 J L]; counts int64 [k]; spreads float64 [networks, L], the
    constants that `spreads_of` gives. With `privacy` sums and counts are noisy, and one patient
    adds the mean of its images' vectors.
    """

    spec: SketchSpec
    card: Card
    sums: Tensor
    counts: Tensor
    spreads: Tensor
    privacy: Guarantee | None = None

    @property
    def state(self) -> State:
        """The tensors, as they are saved."""
        return {"sums": self.sums, "counts": self.counts, "spreads": self.spreads}

    @property
    def backbone(self) -> Backbone:
        """The backbone of its networks."""
        return from_spec(self.spec.backbone)

    @property
    def settings(self) -> Json:
        """The fields that a method which distills from it has to have."""
        record = to_record(self.spec)
        return {name: record[name] for name in SETTINGS}

    def means(self) -> Tensor:
        """Return the mean vector [k, networks, 2 J L] of each class, float32."""
        return mean_of(self.sums, self.counts)

    def without_images(self) -> RealSet:
        """Return a real set of no images that carries the card."""
        images = torch.empty((0, self.card.channels, *self.card.shape), dtype=torch.uint8)
        return RealSet(images, torch.empty(0, dtype=torch.int64), self.card)

    def save(self, path: Path) -> None:
        """Write the sketch as safetensors with one JSON header."""
        header = {"format": FORMAT, "spec": to_record(self.spec), "card": to_record(self.card)}
        header |= {} if self.privacy is None else {"privacy": to_record(self.privacy)}
        save_state(path, self.state, header)

    @staticmethod
    def load(path: Path) -> "Sketch":
        """Read a sketch that `save` wrote.

        Raises: DataError when the file is missing, damaged, empty or cannot be a sketch.
        """
        state, header = load_state(path)
        if header.get("format") != FORMAT:
            raise DataError(f"{path} holds no sketch; expected a file that sketch wrote")
        try:
            spec = from_record(SketchSpec, header["spec"])
            card = from_record(Card, header["card"])
            held = header.get("privacy")
            privacy = None if held is None else from_record(Guarantee, held)
            if privacy is not None:
                check_promise(privacy, spec.networks)
            found = Sketch(spec, card, state["sums"], state["counts"], state["spreads"], privacy)
        except (KeyError, TypeError, UsageError) as error:
            raise DataError(f"{path} is no whole sketch ({error}); expected one") from None
        found._check(path)
        return found

    def _check(self, path: Path) -> None:
        self._check_spec(path)
        k = len(self.card.classes)
        shape = shape_of(self.card, self.spec)
        if self.sums.dtype != torch.int64 or tuple(self.sums.shape) != shape:
            raise DataError(
                f"{path}: found sums {self.sums.dtype} {tuple(self.sums.shape)}; "
                f"expected int64 {shape}"
            )
        if self.counts.dtype != torch.int64 or tuple(self.counts.shape) != (k,):
            raise DataError(f"{path}: found no count for each of {k} classes; expected int64")
        spreads, levels = self.spreads, len(self.spec.sizes(self.card))
        if spreads.dtype != torch.float64 or spreads.shape != (self.spec.networks, levels):
            raise DataError(f"{path}: found no spread for each level; expected float64 numbers")
        if not bool((spreads.isfinite() & (spreads > 0)).all()):
            raise DataError(f"{path}: found a spread that is not above 0; expected a sketch")
        if int(self.counts.min()) < 0 or int(self.counts.max()) < 1:
            raise DataError(f"{path}: found counts {self.counts.tolist()}; expected some images")
        most = self.sums.double().abs().amax((1, 2)) / GRID
        bound = self.counts.double() / math.sqrt(self.spec.frequencies * levels)
        if self.privacy is not None:
            bound = bound + 20 * self.privacy.added * self.privacy.bound  # 20 deviations
        if (most > bound * (1 + 1e-6)).any():
            raise DataError(f"{path}: found sums beyond what its counts allow; expected a sketch")

    def _check_spec(self, path: Path) -> None:
        """Refuse what cannot be computed with, before a network is built of it."""
        card = self.card
        pixels = math.prod((card.channels, *card.shape))
        if not 0 < pixels <= MOST_PIXELS or min(card.shape, default=0) < 1:
            raise DataError(f"{path}: found images of {pixels} pixels; expected 1 to {MOST_PIXELS}")
        numbers = [n for n in self.spec.backbone.values() if isinstance(n, int)]
        if any(n > MOST_NUMBER for n in numbers):
            raise DataError(f"{path}: found {max(numbers)} in its backbone; expected less")
        try:
            normalized_by(card, card.mean, card.std)
            from_record(Augmentation, self.spec.augmentation)
            size = from_spec(self.spec.backbone).parameters(card)
        except (UsageError, TypeError, ValueError, KeyError, RuntimeError) as error:
            raise DataError(f"{path} is no whole sketch ({error}); expected one") from None
        if size > MOST_PARAMETERS:
            raise DataError(
                f"{path}: found a network of {size} parameters; expected {MOST_PARAMETERS} at most"
            )


@dataclass(frozen=True, eq=False)
class Probe:
    """One network of a sketch with its draw and, for each level, its frequencies [d, J]."""

    network: Network
    augmentation: Augmentation
    draw: Draw
    frequencies: list[Tensor]

    def of(self, images: Tensor, compute: Compute = PLAIN) -> Tensor:
        """Return the vectors [n, 2 J L] of normalized images, with a gradient."""
        seen = self.augmentation.apply(images, self.draw)
        return waves(extract(self.network, seen, compute, levels=True), self.frequencies)

    def on_grid(self, images: Tensor, compute: Compute = PLAIN) -> Tensor:
        """Return the vectors of images on the grid, int64 [n, 2 J L], without a gradient.

        Blocks have one size: what is computed of an image does not depend on how many others there
        are (where widths leave vector lanes no rest; else but for last bits).
        """
        found = self.of_images(images, compute)
        if not bool(found.isfinite().all()):
            raise DataError("found features that are not finite; expected finite pixels")
        return (found.double() * GRID).round().long()

    def of_images(self, images: Tensor, compute: Compute = PLAIN) -> Tensor:
        """Return the vectors of images [n, 2 J L] without a gradient, in blocks of one size."""
        seen = self.augmentation.apply(images, self.draw)
        features = extract_fast(self.network, seen, compute, levels=True, fill=True)
        blocks = compute.blocks(features, fill=True)
        return torch.cat([waves(block, self.frequencies) for (block,) in blocks])[: len(images)]


def mean_of(sums: Tensor, counts: Tensor) -> Tensor:
    """Return the mean vectors of sums [k, ...] on the grid over counts [k], float32."""
    return (sums.double() / GRID / counts.double().view(-1, *[1] * (sums.ndim - 1))).float()


def waves(features: Tensor, frequencies: Sequence[Tensor]) -> Tensor:
    """Return [cos(t_j . phi_l), sin(t_j . phi_l)]_jl / sqrt(J L): rows of norm 1.

    `features` [n, d] ends with the levels phi_l side by side; each has its frequencies [d_l, J].
    """
    sizes = [t.shape[0] for t in frequencies]
    levels = features[:, -sum(sizes) :].split(sizes, 1)
    phases = torch.cat([level @ t for level, t in zip(levels, frequencies, strict=True)], 1)
    return torch.cat([phases.cos(), phases.sin()], 1) / math.sqrt(phases.shape[1])


def check_backbone(spec: SketchSpec, card: Card) -> None:
    """Refuse a backbone that does not see each image of a card alone.

    Raises: UsageError when it is unknown, mixes the images of a batch, or does not fit the images.
    """
    backbone = from_spec(spec.backbone)
    if backbone.build(card, Rng(0).at("check")).mixes_images:
        raise UsageError(
            f"found {backbone.name}, whose features of an image depend on its batch; expected "
            "another norm for a sketch: use instance norm"
        )


def spreads_of(spec: SketchSpec, card: Card, number: int) -> list[float]:
    """Return the root mean square distance of two noise images at each level, three digits.

    Noise images stand in for real ones, so that frequencies tell nothing about patients; three
    digits, so that another machine's last bit does not become another frequency.
    """
    at = Rng(spec.seed).child("sketch", number)
    network = from_spec(spec.backbone).build(card, at.at("network"))
    sizes = spec.sizes(card)
    noise = torch.randn((NOISE_IMAGES, card.channels, *card.shape), generator=at.at("noise images"))
    found = extract_fast(network, noise, levels=True)[:, -sum(sizes) :]
    levels = found.double().split(sizes, 1)
    return [float(f"{float(level.var(0).sum().mul(2).sqrt()):.3g}") for level in levels]


def all_spreads(spec: SketchSpec, card: Card) -> Tensor:
    """Return the spreads of all networks, float64 [networks, L]."""
    rows = [spreads_of(spec, card, number) for number in range(spec.networks)]
    return torch.tensor(rows, dtype=torch.float64)


def probe(
    spec: SketchSpec, card: Card, number: int, spreads: Tensor, device: torch.device
) -> Probe:
    """Return the network `number` of a sketch, rebuilt from the public seed or still remembered.

    Frequencies of a level are N(0, (scale / spread)^2).
    """
    return _probe(canonical(to_record(spec)), card, number, tuple(spreads.tolist()), device)


@lru_cache(maxsize=PROBES)
def _probe(
    record: bytes, card: Card, number: int, spreads: tuple[float, ...], device: torch.device
) -> Probe:
    spec = from_record(SketchSpec, json.loads(record))
    at = Rng(spec.seed).child("sketch", number)
    network = from_spec(spec.backbone).build(card, at.at("network"))
    generator = at.at("frequencies")
    frequencies = [
        torch.randn((size, spec.frequencies), generator=generator) * (spec.scale / spread)
        for size, spread in zip(spec.sizes(card), spreads, strict=True)
    ]
    augmentation = from_record(Augmentation, spec.augmentation)
    draw = augmentation.draw(1, card.shape, at.at("augment"))
    return Probe(fixed(network.to(device)), augmentation, draw, [t.to(device) for t in frequencies])


def sketch(
    real: RealSet,
    spec: SketchSpec,
    compute: Compute = PLAIN,
    engine: Engine = HERE,
    compiling: Mode | None = None,
) -> Sketch:
    """Return the sketch of a real set, in one pass.

    `compiling` decides whether the networks are compiled (as `compute` says where it is None).
    Sources: the empirical characteristic function of random features, as in NCFM (arXiv
    2502.20653) and random Fourier features (Rahimi and Recht, NIPS 2007).
    Departures: frequencies are fixed and public, not trained, so that sketches add up.
    Raises: UsageError when the task is multi-label or the backbone mixes images; DataError when
    features are not finite.

    Example:
        >>> from medistill import ConvNet, load
        >>> from medistill.backbones import to_spec
        >>> spec = SketchSpec(to_spec(ConvNet(1, 4)), {"kinds": []}, networks=2, frequencies=8)
        >>> sketch(load("phantom:n=20,size=16").train, spec).counts.tolist()
        [10, 10]
    """
    card = real.card
    if card.task == "multi-label":
        raise UsageError(f"found a multi-label task in {card.name}; expected one class per image")
    check_backbone(spec, card)
    spreads = all_spreads(spec, card)
    if compiling is not None:
        block = full_block(real.images)
        few = real.take(torch.arange(min(block, len(real))))
        unit = partial(_sums, few, spec=spec, spreads=spreads, compute=compute)
        compiled = worth_compiling(compiling, unit, len(real) / block)
        compute = dataclasses.replace(compute, compile=compiled)
    task = partial(_sums, spec=spec, spreads=spreads, compute=compute)
    size = read_size(real)
    shards = (real.take(part) for part in torch.arange(len(real)).split(size))
    counts = torch.tensor([len(members) for members in real.by_class])
    sums = torch.zeros(shape_of(card, spec), dtype=torch.int64)
    with progress("sketch", len(real)) as advance:
        for shard, part in enumerate(engine.map(task, shards)):
            sums += part
            advance(min(size, len(real) - shard * size))
    return Sketch(spec, card, sums, counts, spreads)


def shape_of(card: Card, spec: SketchSpec) -> tuple[int, int, int]:
    """Return the shape of a sketch's sums."""
    return len(card.classes), spec.networks, 2 * spec.frequencies * len(spec.sizes(card))


def _sums(real: RealSet, *, spec: SketchSpec, spreads: Tensor, compute: Compute) -> Tensor:
    """Return the sums of a few images: they are read once and seen by all networks."""
    sums = torch.zeros(shape_of(real.card, spec), dtype=torch.int64, device=real.device)
    images = real.normalized(torch.arange(len(real)))
    for number in range(spec.networks):
        way = probe(spec, real.card, number, spreads[number], real.device)
        sums[:, number].index_add_(0, real.labels, way.on_grid(images, compute))
    return sums.cpu()


def merge(sketches: Sequence[Sketch]) -> Sketch:
    """Return the sketch of all images of several sketches: their sums added.

    Private ones keep the weakest guarantee among them, if no patient is in two of them: each
    patient's vector is in one sum (parallel composition).
    Raises: DataError when they differ in more than names, digests and counts, or two are the same.
    """
    first = sketches[0]
    for other in sketches[1:]:
        for kind, one, two in (
            ("", to_record(first.spec), to_record(other.spec)),
            ("privacy ", _promise(first), _promise(other)),
            ("card ", _kind(first.card), _kind(other.card)),
            ("", {"spreads": first.spreads.tolist()}, {"spreads": other.spreads.tolist()}),
        ):
            for name, value in one.items():
                if two[name] != value:
                    raise DataError(
                        f"found {kind}{name} {two[name]} in {other.card.name} and {value} in "
                        f"{first.card.name}; expected sketches made alike (--mean and --std too)"
                    )
    promised = weakest([part.privacy for part in sketches if part.privacy])
    if len({part.sums.cpu().numpy().tobytes() for part in sketches}) < len(sketches):
        raise DataError("found the same sketch twice; expected sketches of different images")
    whole = "" if first.privacy else digest([part.card.digest for part in sketches])
    names = dict.fromkeys(part.card.name for part in sketches)
    name = " + ".join(names) + ("" if len(names) == len(sketches) else f" ({len(sketches)} parts)")
    card = dataclasses.replace(first.card, name=name, digest=whole)
    sums = torch.stack([part.sums for part in sketches]).sum(0)
    counts = torch.stack([part.counts for part in sketches]).sum(0)
    return Sketch(first.spec, card, sums, counts, first.spreads, promised)


def _promise(sketch: Sketch) -> Json:
    """Return what two private sketches must share; a plain one shares it with plain ones alone."""
    return {name: getattr(sketch.privacy, name, None) for name in ("unit", "delta", "bound")}


def _kind(card: Card) -> Json:
    """Return what images of two sets must share: what a network sees of them."""
    record = to_record(card)
    names = ("task", "classes", "channels", "shape", "mean", "std", "flips", "intensity")
    return {name: record[name] for name in names}
