"""The arms of an evaluation: what students train on, how they are tuned, and their rows."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import __version__
from .backbones import Backbone, Network, to_spec
from .compute import PLAIN, Compute, whole_batches
from .errors import RunRefused
from .features import logits_of_set
from .methods.base import choose
from .metrics import evaluate_task, finite
from .progress import progress
from .records import Json, digest, from_record, kept, state_digest, to_record
from .rng import Rng
from .sets import Recipe, Splits, SyntheticSet
from .train import (
    CPU,
    Drawable,
    RealImages,
    TensorImages,
    balanced_index,
    fit,
    fit_together,
    losses,
)

RATES = (0.01, 0.03, 0.1)
# Where a student may stop, as fractions of the schedule: all lie after the fall of the rate, for
# before it the choice on a small validation split is mostly noise.
MARKS = (0.625, 0.75, 0.875, 1.0)


@dataclass(frozen=True)
class Arm:
    """One kind of training data: a name, images, and how to draw it for a seed."""

    name: str
    images: int
    digest: str
    of_seed: Callable[[int], Drawable]


def arm_rows(
    arm: Arm,
    splits: Splits,
    base: Recipe,
    backbone: Backbone,
    *,
    seeds: Sequence[int],
    rates: Sequence[float] = RATES,
    cache: Path | None = None,
    compute: Compute = PLAIN,
) -> tuple[list[Json], Json]:
    """Return one arm's rows, a student for each seed, and the recipe that they trained by.

    Without `rates` there are no pilots: the students train by `base` as it is.
    """
    book = Book(cache, arm, splits, base, backbone, compute)
    with progress(f"{arm.name}", len(rates) + len(seeds)) as advance:
        recipe = book.tuned(rates, advance)["recipe"]
        return book.rows(recipe, seeds, advance), recipe


def synthetic_arm(synthetic: SyntheticSet, device: torch.device = CPU) -> Arm:
    """Return the arm that trains on a synthetic set: the same images for every seed."""
    content = state_digest({"images": synthetic.images, "labels": synthetic.labels})
    data = TensorImages.of(synthetic, device)
    return Arm("synthetic", len(synthetic), content, lambda seed: data)


def random_arm(synthetic: SyntheticSet, splits: Splits) -> Arm:
    """Return the arm that trains on as many random real images: a draw of its own per seed."""
    several = splits.train.card.task == "multi-label"
    return _random(splits, [] if several else _by_weight(synthetic.labels), len(synthetic))


def sized_arm(ipc: int, splits: Splits) -> Arm:
    """Return the arm that trains on `ipc` random real images per class (of labels: times them).

    Raises: RunRefused when a class has fewer.
    """
    classes = len(splits.train.card.classes)
    several = splits.train.card.task == "multi-label"
    least = min(len(members) for members in splits.train.by_class)
    if not several and ipc > least:
        raise RunRefused(
            f"found {least} images in the smallest class; expected {ipc} or more for this size of "
            "the curve: leave it out"
        )
    return _random(splits, [] if several else [ipc] * classes, ipc * classes)


def _random(splits: Splits, counts: list[int], total: int) -> Arm:
    def of_seed(seed: int) -> Drawable:
        generator = Rng(seed).child("random arm").at("choice")
        return RealImages(splits.train, choose(splits.train, counts, total, generator))

    return Arm("random", total, f"images {counts or total}", of_seed)


def _by_weight(labels: Tensor) -> list[int]:
    """Return how many images of each class weigh as much as labels [m, k]: soft ones rounded."""
    weight = labels.sum(0)
    counts = weight.floor()
    missing = len(labels) - int(counts.sum())
    counts[(weight - counts).argsort(descending=True, stable=True)[:missing]] += 1
    return [int(count) for count in counts]


def full_arm(splits: Splits) -> Arm:
    """Return the arm that trains on the whole training split, its classes equally often."""
    index = balanced_index(splits.train)
    return Arm("full", len(splits.train), "balanced", lambda seed: RealImages(splits.train, index))


def pays_together(device: torch.device) -> bool:
    """Say whether several students at once are faster than one after the other.

    Grouped convolutions on CPU cores took two to three times as long (benchmarks/speed.py,
    students-5); a batch of a few images leaves most of a GPU idle.
    """
    return device.type != "cpu"


class Book:
    """The rows of one arm and backbone, read from the cache where they are already there."""

    def __init__(
        self,
        cache: Path | None,
        arm: Arm,
        splits: Splits,
        base: Recipe,
        backbone: Backbone,
        compute: Compute,
    ) -> None:
        self.cache, self.arm, self.splits, self.backbone = cache, arm, splits, backbone
        self.compute = compute
        card = splits.train.card
        factor = base.factor if arm.name == "synthetic" else 1  # real images are whole
        self.base = dataclasses.replace(
            base, mean=card.mean, std=card.std, backbone=to_spec(backbone), factor=factor
        )

    def _path(self, what: Json) -> Path | None:
        if self.cache is None:
            return None
        key = digest(
            {
                "what": what,
                "arm": [self.arm.name, self.arm.digest],
                "data": self.splits.train.card.digest,
                "precision": self.compute.precision,
                # What sums round by.
                "compiled": self.compute.compile,
                "threads": torch.get_num_threads(),
                "device": self.splits.train.device.type,
                "torch": torch.__version__,
                "version": __version__,
            }
        )
        return self.cache / "baselines" / f"{self.arm.name}-{key[:24]}.json"

    def _cached(self, what: Json, make: Callable[[], Json]) -> Json:
        return kept(self._path(what), make)

    def tuned(self, rates: Sequence[float], advance: Callable[..., None]) -> Json:
        """Return the recipe that the pilots choose on the validation split, and the pilots."""
        if not rates:
            return {"recipe": to_record(self.base), "pilots": []}
        # The base's own rate and stop are chosen anew, so sets that differ in them share this.
        base = dataclasses.replace(self.base, lr=0.0, stop=self.base.steps)
        what = {"base": to_record(base), "rates": list(rates), "pilot": True}
        # A rare label is hardly ever likelier than one half, so accuracies would not tell.
        several = self.splits.val.card.task == "multi-label"
        by = "auc" if several else "balanced_accuracy"

        def make() -> Json:
            pilots = []
            for lr in rates:
                pilots.append(self._pilot(lr))
                advance(note=f"{self.arm.name} pilot")
            best, point = max(
                ((pilot, point) for pilot in pilots for point in pilot["curve"]),
                key=lambda pair: (pair[1][by], -pair[1]["cross_entropy"]),
            )
            best["chosen"] = True
            chosen = dataclasses.replace(self.base, lr=best["lr"], stop=point["step"])
            return {"recipe": to_record(chosen), "pilots": pilots}

        return self._cached(what, make)

    def _pilot(self, lr: float) -> Json:
        recipe = dataclasses.replace(self.base, lr=lr, stop=self.base.steps)
        curve: list[Json] = []

        def look(step: int, loss: float) -> None:
            logits = logits_of_set(network, self.splits.val)
            labels, kind = self.splits.val.labels.cpu(), self.splits.val.card.task
            scores = evaluate_task(kind, logits, labels)
            entropy = float(losses(recipe.loss, finite(logits), labels).mean())
            names = ("accuracy", "balanced_accuracy", "auc")
            curve.append(
                {"step": step, "loss": loss if math.isfinite(loss) else None}
                | {"cross_entropy": entropy}
                | {name: scores[name] for name in names}
            )

        marks = sorted({max(1, math.ceil(recipe.steps * mark)) for mark in MARKS})
        network = self._network(-1)
        fit(
            network,
            self.arm.of_seed(-1),
            recipe,
            Rng(-1).child("student"),
            marks=marks,
            on_mark=look,
            compute=self.compute,
        )
        return {
            "arm": self.arm.name,
            "backbone": self.backbone.name,
            "lr": lr,
            "curve": curve,
            "chosen": False,
        }

    def rows(
        self, recipe: Mapping[str, Any], seeds: Sequence[int], advance: Callable[..., None]
    ) -> list[Json]:
        """Train a student for each seed by the chosen recipe and test each once.

        Where that is faster, all that the cache does not hold train at once.
        """
        by = from_record(Recipe, recipe)
        missing = [seed for seed in dict.fromkeys(seeds) if not self._held(recipe, seed)]
        ready: dict[int, tuple[Network, float]] = {}
        if len(missing) > 1 and pays_together(self.splits.train.device):
            ready = self._trained_together(by, missing)
        rows = []
        for seed in seeds:
            row = self._row(recipe, seed, ready.get(seed))
            advance(note=f"{self.arm.name} {row['accuracy']:.3f}")
            rows.append(row)
        return rows

    def _held(self, recipe: Mapping[str, Any], seed: int) -> bool:
        path = self._path(_student(recipe, seed))
        return path is not None and path.is_file()

    def _trained_together(
        self, by: Recipe, seeds: Sequence[int]
    ) -> dict[int, tuple[Network, float]]:
        """Return trained networks by seed, each with its share of the seconds."""
        begin = time.monotonic()
        networks = [self._network(seed) for seed in seeds]
        if networks[0].mixes_images:
            return {}
        size = whole_batches(by.batch, self.splits.train.card.shape)
        for at in range(0, len(seeds) if size > 1 else 0, size):
            part = seeds[at : at + size]
            data = [self.arm.of_seed(seed) for seed in part]
            rngs = [Rng(seed).child("student") for seed in part]
            fit_together(networks[at : at + size], data, by, rngs, compute=self.compute)
        share = (time.monotonic() - begin) / len(seeds)
        ready = zip(seeds, networks, strict=True) if size > 1 else ()
        return {seed: (network, share) for seed, network in ready}

    def _row(
        self, recipe: Mapping[str, Any], seed: int, ready: tuple[Network, float] | None
    ) -> Json:
        def make() -> Json:
            begin = time.monotonic()
            network, spent = ready or (self._network(seed), 0.0)
            if ready is None:
                rng = Rng(seed).child("student")
                by = from_record(Recipe, recipe)
                fit(network, self.arm.of_seed(seed), by, rng, compute=self.compute)
            test = self.splits.test
            scores = evaluate_task(test.card.task, logits_of_set(network, test), test.labels)
            return {
                "arm": self.arm.name,
                "backbone": self.backbone.name,
                "seed": seed,
                "images": self.arm.images,
                **scores,
                "lr": recipe["lr"],
                "stop": recipe["stop"],
                "device": str(self.splits.train.device),
                "precision": self.compute.precision,
                "compiled": self.compute.compile,
                "seconds": round(spent + time.monotonic() - begin, 3),
            }

        return self._cached(_student(recipe, seed), make)

    def _network(self, seed: int) -> Network:
        train = self.splits.train
        generator = Rng(seed).child("student").at("network")
        return self.backbone.build(train.card, generator).to(train.device)


def _student(recipe: Mapping[str, Any], seed: int) -> Json:
    return {"recipe": dict(recipe), "seed": seed}
