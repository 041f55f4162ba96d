"""Honest evaluation: synthetic, random and full data under one recipe, tested once at the end."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from . import __version__
from .backbones import Backbone, Network, from_spec, to_spec
from .compute import PLAIN, Compute, Mode, peak_memory, worth_compiling
from .errors import DataError
from .features import logits_of_set
from .methods import Task
from .methods.random import Random
from .metrics import NAMES, Score, evaluate_logits, finite, gap_closed, score
from .progress import progress
from .records import Json, digest, from_record, read_json, state_digest, to_record, write_json
from .rng import Rng
from .sets import Budget, RealSet, Recipe, Splits, SyntheticSet
from .train import (
    CPU,
    Drawable,
    RealImages,
    TensorImages,
    balanced_index,
    check_kind,
    fit,
    gradient,
)

RATES = (0.01, 0.03, 0.1)
# Where a student may stop, as fractions of the schedule: all lie after the fall of the rate, for
# before it the choice on a small validation split is mostly noise.
MARKS = (0.625, 0.75, 0.875, 1.0)
FORMAT = "medistill evaluation 1"
PROTOCOL = (
    "Each arm (synthetic, random real images of the same number, full training data) trains its "
    "students by one recipe. For each arm and backbone, pilot students with a seed of their own "
    "choose the learning rate and the number of steps by balanced accuracy on the validation "
    "split (ties: lower cross-entropy). Full data is drawn with all classes equally often, as the "
    "other arms hold them. The test split is read once by each student at the end."
)
INTERVAL = (
    "95% t interval over students; each random student has its own draw of images. The interval "
    "of the synthetic arm covers the training of students, not the synthesis: repeat distill with "
    "other seeds for that."
)


@dataclass(frozen=True)
class Arm:
    """One kind of training data: a name, images, and how to draw it for a seed."""

    name: str
    images: int
    digest: str
    of_seed: Callable[[int], Drawable]


@dataclass(frozen=True)
class Evaluation:
    """All rows of an evaluation; means and intervals follow from them."""

    rows: list[Json]
    pilots: list[Json]
    recipes: dict[str, Json]
    seconds: float

    def scores(self, arm: str, metric: str) -> list[float]:
        """Return one metric of an arm's students, in the order of the rows."""
        return [row[metric] for row in self.rows if row["arm"] == arm]

    def record(self) -> Json:
        """Return the JSON form: rows, pilots, scores by arm, gap closed."""
        record: Json = {
            "format": FORMAT,
            "protocol": {"name": "tuned-on-validation 1", "text": PROTOCOL, "interval": INTERVAL},
            "students": sorted({row["backbone"] for row in self.rows}),
            "seeds": sorted({row["seed"] for row in self.rows}),
        }
        for arm in ("synthetic", "random", "full"):
            record[arm] = {name: _plain(score(self.scores(arm, name))) for name in NAMES}
        gaps = {
            name: gap_closed(*(self.scores(arm, name) for arm in ("synthetic", "random", "full")))
            for name in ("accuracy", "auc")
        }
        record["gap_closed"] = {name: _plain(gap) if gap else None for name, gap in gaps.items()}
        return record | {
            "worth": None,
            "recipes": self.recipes,
            "rows": self.rows,
            "pilots": self.pilots,
            "seconds": round(self.seconds, 3),
        }


def _plain(value: Score) -> Json:
    return dataclasses.asdict(value)


def evaluate(
    synthetic: SyntheticSet,
    splits: Splits,
    *,
    students: Sequence[Backbone],
    seeds: Sequence[int],
    recipe: Recipe | None = None,
    rates: Sequence[float] = RATES,
    cache: Path | None = None,
    compute: Compute = PLAIN,
) -> Evaluation:
    """Train students on the synthetic set, on random real images and on all, and test them once.

    Source: gap closed and baselines as in the project's protocol (docs/evaluation.md).
    Raises: DataError when the set and the splits are not of one kind (classes, channels, shape),
    or when the test split holds one class only.
    """
    begin = time.monotonic()
    check_kind(splits.train.card, synthetic.card)
    present = len(splits.test.labels.unique())
    if present < 2:
        raise DataError(
            f"{splits.test.card.name}: found {present} class in the test split; expected at least "
            "two: scores of one class say nothing"
        )
    base = recipe or synthetic.recipe
    arms = (
        synthetic_arm(synthetic, splits.train.device),
        random_arm(synthetic, splits),
        full_arm(splits),
    )
    rows: list[Json] = []
    pilots: list[Json] = []
    recipes: dict[str, Json] = {}
    total = len(arms) * len(students) * (len(rates) + len(seeds))
    with progress("evaluate", total) as advance:
        for backbone in students:
            for arm in arms:
                store = None if arm.name == "synthetic" else cache
                book = _Book(store, arm, splits, base, backbone, compute)
                tuned = book.tuned(rates, advance)
                pilots += tuned["pilots"]
                recipes.setdefault(arm.name, tuned["recipe"])
                rows += [book.row(tuned["recipe"], seed, advance) for seed in seeds]
    return Evaluation(rows, pilots, recipes, time.monotonic() - begin)


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
    book = _Book(cache, arm, splits, base, backbone, compute)
    with progress(f"{arm.name}", len(rates) + len(seeds)) as advance:
        recipe = book.tuned(rates, advance)["recipe"]
        return [book.row(recipe, seed, advance) for seed in seeds], recipe


def synthetic_arm(synthetic: SyntheticSet, device: torch.device = CPU) -> Arm:
    """Return the arm that trains on a synthetic set: the same images for every seed."""
    content = state_digest({"images": synthetic.images, "labels": synthetic.labels})
    data = TensorImages.of(synthetic, device)
    return Arm("synthetic", len(synthetic), content, lambda seed: data)


def random_arm(synthetic: SyntheticSet, splits: Splits) -> Arm:
    """Return the arm that trains on as many random real images: a draw of its own per seed."""
    train = splits.train
    ipc = len(synthetic) // len(train.card.classes)
    backbone = from_spec(synthetic.recipe.backbone)

    def of_seed(seed: int) -> Drawable:
        task = Task(train, Budget(ipc=ipc), backbone)
        return RealImages(train, Random().init(task, Rng(seed).child("random arm"))["index"])

    return Arm("random", ipc * len(train.card.classes), f"ipc {ipc}", of_seed)


def full_arm(splits: Splits) -> Arm:
    """Return the arm that trains on the whole training split, its classes equally often."""
    index = balanced_index(splits.train)
    return Arm("full", len(splits.train), "balanced", lambda seed: RealImages(splits.train, index))


class _Book:
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

    def _cached(self, what: Json, make: Callable[[], Json]) -> Json:
        if self.cache is None:
            return make()
        key = digest(
            {
                "what": what,
                "arm": [self.arm.name, self.arm.digest],
                "data": self.splits.train.card.digest,
                "precision": self.compute.precision,
                "version": __version__,
            }
        )
        path = self.cache / "baselines" / f"{self.arm.name}-{key[:24]}.json"
        if path.is_file():
            found: Json = read_json(path)
            return found
        made = make()
        write_json(path, made)
        return made

    def tuned(self, rates: Sequence[float], advance: Callable[..., None]) -> Json:
        """Return the recipe that the pilots choose on the validation split, and the pilots."""
        if not rates:
            return {"recipe": to_record(self.base), "pilots": []}
        what = {"base": to_record(self.base), "rates": list(rates), "pilot": True}

        def make() -> Json:
            pilots = []
            for lr in rates:
                pilots.append(self._pilot(lr))
                advance(note=f"{self.arm.name} pilot")
            best, point = max(
                ((pilot, point) for pilot in pilots for point in pilot["curve"]),
                key=lambda pair: (pair[1]["balanced_accuracy"], -pair[1]["cross_entropy"]),
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
            scores = evaluate_logits(logits, self.splits.val.labels)
            entropy = float(F.cross_entropy(finite(logits), self.splits.val.labels.cpu()))
            names = ("accuracy", "balanced_accuracy")
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

    def row(self, recipe: Mapping[str, Any], seed: int, advance: Callable[..., None]) -> Json:
        """Train one student by the chosen recipe and test it once."""

        def make() -> Json:
            begin = time.monotonic()
            network = self._network(seed)
            fit(
                network,
                self.arm.of_seed(seed),
                from_record(Recipe, recipe),
                Rng(seed).child("student"),
                compute=self.compute,
            )
            test = self.splits.test
            scores = evaluate_logits(logits_of_set(network, test), test.labels)
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
                "seconds": round(time.monotonic() - begin, 3),
            }

        made = self._cached({"recipe": dict(recipe), "seed": seed}, make)
        advance(note=f"{self.arm.name} {made['accuracy']:.3f}")
        return made

    def _network(self, seed: int) -> Network:
        train = self.splits.train
        generator = Rng(seed).child("student").at("network")
        return self.backbone.build(train.card, generator).to(train.device)


def evaluate_run(
    folder: Path,
    splits: Splits,
    *,
    students: Sequence[Backbone] | None = None,
    seeds: Sequence[int],
    steps: int | None = None,
    command: str = "",
    cache: Path | None = None,
    compute: Compute = PLAIN,
    compiling: Mode | None = None,
) -> Json:
    """Evaluate the set of a run folder, write evaluation.json there and return its content.

    `students` are the backbone that distilled the set unless told otherwise; `steps` replaces the
    length of the recipe's schedule; `compiling` decides whether training is compiled, by one step
    on full data for `auto` (as `compute` says where it is None).
    Raises: DataError when the folder holds no finished run.
    """
    begin = time.monotonic()
    synthetic = SyntheticSet.load(folder / "synthetic.safetensors")
    recipe = synthetic.recipe
    if steps is not None:
        recipe = dataclasses.replace(recipe, steps=steps, stop=steps)
    backbones = students or [from_spec(recipe.backbone)]
    if compiling is not None:
        step = partial(_one_step, backbones[0], splits.train, recipe, compute)
        times = recipe.steps * len(backbones) * (len(RATES) + len(seeds))
        compute = dataclasses.replace(compute, compile=worth_compiling(compiling, step, times))
    found = evaluate(
        synthetic,
        splits,
        students=backbones,
        seeds=seeds,
        recipe=recipe,
        cache=cache,
        compute=compute,
    )
    record = {
        **found.record(),
        "command": command,
        "data": to_record(splits.train.card),
        "seconds": round(time.monotonic() - begin, 3),
        "peak_memory_bytes": peak_memory(),
    }
    write_json(folder / "evaluation.json", record)
    return record


def _one_step(backbone: Backbone, real: RealSet, recipe: Recipe, compute: Compute) -> None:
    """Take one gradient on full data and forget it."""
    network = backbone.build(real.card, Rng(0).at("measured")).to(real.device)
    gradient(network, *RealImages(real).draw(torch.arange(min(recipe.batch, len(real)))), compute)
