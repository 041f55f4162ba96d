"""Sketches: sums over a set from which images are distilled without it."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from .augment import Augmentation
from .backbones import Backbone, from_spec
from .compute import PLAIN, Compute, Mode, full_block, worth_compiling
from .engine import Engine, Here
from .errors import DataError, UsageError
from .features import read_size
from .moments import check_moments, moments_of, moments_shape, possible
from .privacy import Guarantee, check_promise, weakest
from .probes import GRID, SketchSpec, all_spreads, check_backbone, probe
from .progress import progress
from .records import Json, State, digest, from_record, load_state, save_state, to_record
from .sets import Card, RealSet, normalized_by

FORMAT = "medistill sketch 1"
MOST_PIXELS = 2**26  # of one image; a file that asks for more is refused
MOST_PARAMETERS = 2**28
MOST_NUMBER = 2**12  # of layers, channels and the like
SETTINGS = ("networks", "frequencies", "scale", "layers", "moments")
HERE = Here()


@dataclass(frozen=True, eq=False)
class Sketch:
    """The empirical characteristic function of a set's features, class by class, as sums.

    sums[c, m] = sum over images x of class c of round(GRID [cos(t_j . phi_ml(A_m(x))),
    sin(t_j . phi_ml(A_m(x)))]_jl / sqrt(J L)), phi_ml what stage l of L of network m gives, so one
    image adds a vector of norm 1 for each of the networks; counts[c] is the number of images.
    Shapes: sums int64 [k, networks, 2 J L]; counts int64 [k]; spreads float64 [networks, L], the
    constants that `spreads_of` gives. With `privacy` sums and counts are noisy, and one patient
    adds the mean of its images' vectors. `moments` int64 [k, 1 + d, d] is what `moments_of` gives,
    where the spec asks for it.
    """

    spec: SketchSpec
    card: Card
    sums: Tensor
    counts: Tensor
    spreads: Tensor
    privacy: Guarantee | None = None
    moments: Tensor | None = None

    @property
    def state(self) -> State:
        """The tensors, as they are saved."""
        held = {"sums": self.sums, "counts": self.counts, "spreads": self.spreads}
        return held if self.moments is None else held | {"moments": self.moments}

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
            sums, counts, spreads = (state[name] for name in ("sums", "counts", "spreads"))
            found = Sketch(spec, card, sums, counts, spreads, privacy, state.get("moments"))
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
        self._check_moments(path)

    def _check_moments(self, path: Path) -> None:
        size = self.spec.moments
        if not size and self.moments is None:
            return
        shape = (len(self.card.classes), *moments_shape(self.card, size))
        held = self.moments
        if held is None or held.dtype != torch.int64 or tuple(held.shape) != shape:
            raise DataError(f"{path}: found no moments of its classes; expected int64 {shape}")
        if self.privacy is not None:
            raise DataError(f"{path}: found moments in a private sketch, which has none")
        if not possible(held, self.counts):
            raise DataError(f"{path}: found moments beyond what its counts allow")

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
            check_moments(card, self.spec.moments)
            from_record(Augmentation, self.spec.augmentation)
            size = from_spec(self.spec.backbone).parameters(card)
        except (UsageError, TypeError, ValueError, KeyError, RuntimeError) as error:
            raise DataError(f"{path} is no whole sketch ({error}); expected one") from None
        if size > MOST_PARAMETERS:
            raise DataError(
                f"{path}: found a network of {size} parameters; expected {MOST_PARAMETERS} at most"
            )


def mean_of(sums: Tensor, counts: Tensor) -> Tensor:
    """Return the mean vectors of sums [k, ...] on the grid over counts [k], float32."""
    return (sums.double() / GRID / counts.double().view(-1, *[1] * (sums.ndim - 1))).float()


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
    check_moments(card, spec.moments)
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
    moments = torch.zeros((len(counts), *moments_shape(card, spec.moments)), dtype=torch.int64)
    with progress("sketch", len(real)) as advance:
        for shard, (part, more) in enumerate(engine.map(task, shards)):
            sums += part
            moments += more
            advance(min(size, len(real) - shard * size))
    return Sketch(spec, card, sums, counts, spreads, None, moments if spec.moments else None)


def shape_of(card: Card, spec: SketchSpec) -> tuple[int, int, int]:
    """Return the shape of a sketch's sums."""
    return len(card.classes), spec.networks, 2 * spec.frequencies * len(spec.sizes(card))


def _sums(
    real: RealSet, *, spec: SketchSpec, spreads: Tensor, compute: Compute
) -> tuple[Tensor, Tensor]:
    """Return sums and moments of a few images: they are read once and seen by all networks."""
    sums = torch.zeros(shape_of(real.card, spec), dtype=torch.int64, device=real.device)
    images = real.normalized(torch.arange(len(real)))
    for number in range(spec.networks):
        way = probe(spec, real.card, number, spreads[number], real.device)
        sums[:, number].index_add_(0, real.labels, way.on_grid(images, compute))
    moments = moments_of(images, real.labels, len(real.card.classes), spec.moments)
    return sums.cpu(), moments.cpu()


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
    held = [part.moments for part in sketches if part.moments is not None]
    moments = torch.stack(held).sum(0) if held else None
    return Sketch(first.spec, card, sums, counts, first.spreads, promised, moments)


def _promise(sketch: Sketch) -> Json:
    """Return what two private sketches must share; a plain one shares it with plain ones alone."""
    return {name: getattr(sketch.privacy, name, None) for name in ("unit", "delta", "bound")}


def _kind(card: Card) -> Json:
    """Return what images of two sets must share: what a network sees of them."""
    record = to_record(card)
    names = ("task", "classes", "channels", "shape", "mean", "std", "flips", "intensity")
    return {name: record[name] for name in names}
