"""Honest evaluation: synthetic, random and full data under one recipe, tested once at the end."""

import dataclasses
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from .arms import RATES, Book, full_arm, random_arm, sized_arm, synthetic_arm
from .backbones import Backbone, from_spec
from .compute import PLAIN, Compute, Mode, peak_memory, worth_compiling
from .errors import DataError
from .metrics import NAMES, Score, gap_closed, score, worth_of
from .progress import progress
from .records import Json, to_record, write_json
from .rng import Rng
from .sets import Card, RealSet, Recipe, Splits, SyntheticSet
from .train import RealImages, check_kind, gradient

FORMAT = "medistill evaluation 1"
PROTOCOL = (
    "Each arm (synthetic, random real images of the same number, full training data) trains its "
    "students by one recipe. For each arm and backbone, pilot students with a seed of their own "
    "choose the learning rate and the number of steps by balanced accuracy on the validation "
    "split (AUC where an image may have several labels; ties: lower loss). Full data is drawn with "
    "all classes equally often (each image once where it may have several labels). The test split "
    "is read once by each student at the end."
)
INTERVAL = (
    "95% t interval over students; each random student has its own draw of images. The interval "
    "of the synthetic arm covers the training of students, not the synthesis: repeat distill with "
    "other seeds for that. Of several backbones a student's score is the mean over them, seed by "
    "seed."
)


@dataclass(frozen=True)
class Evaluation:
    """All rows of an evaluation; means and intervals follow from them."""

    rows: list[Json]
    pilots: list[Json]
    recipes: dict[str, Json]
    curve: dict[int, Score]
    seconds: float

    @property
    def worth(self) -> Score | None:
        """How many random images per class are as accurate; None without a curve."""
        return worth_of(score(self.scores("synthetic", "accuracy")), self.curve)

    def scores(self, arm: str, metric: str) -> list[float]:
        """Return one metric of an arm's students, of each seed the mean over its backbones."""
        by_seed: dict[int, list[float]] = {}
        for row in self.rows:
            if row["arm"] == arm:
                by_seed.setdefault(row["seed"], []).append(row[metric])
        return [statistics.fmean(found) for found in by_seed.values()]

    def record(self) -> Json:
        """Return the JSON form: rows, pilots, scores by arm, gap closed."""
        record: Json = {
            "format": FORMAT,
            "protocol": {"name": "tuned-on-validation 1", "text": PROTOCOL, "interval": INTERVAL},
            "students": sorted({row["backbone"] for row in self.rows}),
            "seeds": sorted({row["seed"] for row in self.rows}),
        }
        # Ordered classes have one score more.
        names = (*NAMES, "kappa") if "kappa" in self.rows[0] else NAMES
        for arm in ("synthetic", "random", "full"):
            record[arm] = {name: _plain(score(self.scores(arm, name))) for name in names}
        gaps = {
            name: gap_closed(*(self.scores(arm, name) for arm in ("synthetic", "random", "full")))
            for name in ("accuracy", "auc")
        }
        record["gap_closed"] = {name: _plain(gap) if gap else None for name, gap in gaps.items()}
        return record | {
            "worth": _finite(worth) if (worth := self.worth) else None,
            "curve": {str(size): _plain(found) for size, found in self.curve.items()},
            "recipes": self.recipes,
            "rows": self.rows,
            "pilots": self.pilots,
            "seconds": round(self.seconds, 3),
        }


def _plain(value: Score) -> Json:
    return dataclasses.asdict(value)


def _finite(value: Score) -> Json:
    """Return a worth with null for what lies beyond the curve's largest size."""
    return {name: x if x != math.inf else None for name, x in _plain(value).items()}


def evaluate(
    synthetic: SyntheticSet,
    splits: Splits,
    *,
    students: Sequence[Backbone],
    seeds: Sequence[int],
    recipe: Recipe | None = None,
    rates: Sequence[float] = RATES,
    curve: Sequence[int] = (),
    cache: Path | None = None,
    compute: Compute = PLAIN,
) -> Evaluation:
    """Train students on the synthetic set, on random real images and on all, and test them once.

    With `curve`, sizes in images per class, random images of these sizes are scored as well, from
    which follows how many of them the set is worth.
    Source: gap closed and baselines as in the project's protocol (docs/evaluation.md).
    Raises: DataError when the set and the splits are not of one kind (classes, channels, shape),
    or are other splits of the same data, or when the test split holds one class only; RunRefused
    when a class has fewer images than a size of the curve.
    """
    begin = time.monotonic()
    check_kind(splits.train.card, synthetic.card)
    check_split(synthetic, splits.train.card)
    present = len(splits.test.labels.unique())
    if present < 2:
        raise DataError(
            f"{splits.test.card.name}: found {present} class in the test split; expected at least "
            "two: scores of one class say nothing"
        )
    base = recipe or synthetic.recipe
    splits = splits.whitened(synthetic.whitening)
    arms = (
        synthetic_arm(synthetic, splits.train.device),
        random_arm(synthetic, splits),
        full_arm(splits),
    )
    rows: list[Json] = []
    pilots: list[Json] = []
    recipes: dict[str, Json] = {}
    sized = {size: sized_arm(size, splits) for size in curve}
    found: dict[int, list[list[float]]] = {}
    total = (len(arms) + len(sized)) * len(students) * (len(rates) + len(seeds))
    with progress("evaluate", total) as advance:
        for backbone in students:
            for arm in arms:
                book = Book(cache, arm, splits, base, backbone, compute)
                tuned = book.tuned(rates, advance)
                pilots += tuned["pilots"]
                recipes.setdefault(arm.name, tuned["recipe"])
                rows += book.rows(tuned["recipe"], seeds, advance)
            for size, arm in sized.items():
                book = Book(cache, arm, splits, base, backbone, compute)
                by = book.tuned(rates, advance)["recipe"]
                scores = [row["accuracy"] for row in book.rows(by, seeds, advance)]
                found.setdefault(size, []).append(scores)
    measured = {size: _over_backbones(scores) for size, scores in found.items()}
    return Evaluation(rows, pilots, recipes, measured, time.monotonic() - begin)


def _over_backbones(scores: Sequence[Sequence[float]]) -> Score:
    """Return the score of students whose scores stand by backbone: of each seed the mean."""
    return score([statistics.fmean(one) for one in zip(*scores, strict=True)])


def check_split(synthetic: SyntheticSet, here: Card) -> None:
    """Refuse another split of the data that a set was distilled from.

    Raises: DataError when names are equal and training images are not.
    """
    made = synthetic.origin.data_digest
    if made and made != here.digest and synthetic.card.name == here.name:
        raise DataError(
            f"{here.name}: found other training images than the set was distilled from; expected "
            "the same split, or students would be tested on images that it was made of: give "
            "--seed as distill had it (data of another place want another name)"
        )


def evaluate_run(
    folder: Path,
    splits: Splits,
    *,
    students: Sequence[Backbone] | None = None,
    seeds: Sequence[int],
    steps: int | None = None,
    batch: int | None = None,
    curve: Sequence[int] = (),
    command: str = "",
    cache: Path | None = None,
    compute: Compute = PLAIN,
    compiling: Mode | None = None,
) -> Json:
    """Evaluate the set of a run folder, write evaluation.json there and return its content.

    `students` are the backbone that distilled the set unless told otherwise; `steps` replaces the
    length of the recipe's schedule and `batch` the images of a step; `compiling` decides whether
    training is compiled, by one step on full data for `auto` (as `compute` says where it is None).
    Raises: DataError when the folder holds no finished run.
    """
    begin = time.monotonic()
    synthetic = SyntheticSet.load(folder / "synthetic.safetensors")
    recipe = synthetic.recipe
    if steps is not None:
        recipe = dataclasses.replace(recipe, steps=steps, stop=steps)
    if batch is not None:
        recipe = dataclasses.replace(recipe, batch=batch)
    backbones = students or [from_spec(recipe.backbone)]
    if compiling is not None:
        step = partial(_one_step, backbones[0], splits.train, recipe, compute)
        times = recipe.steps * len(backbones) * (len(RATES) + len(seeds)) * (1 + len(curve))
        compute = dataclasses.replace(compute, compile=worth_compiling(compiling, step, times))
    found = evaluate(
        synthetic,
        splits,
        students=backbones,
        seeds=seeds,
        recipe=recipe,
        curve=curve,
        cache=cache,
        compute=compute,
    )
    record = {
        **found.record(),
        "command": command,
        "set": synthetic.digest,
        "data": to_record(splits.train.card),
        "seconds": round(time.monotonic() - begin, 3),
        "peak_memory_bytes": peak_memory(),
    }
    write_json(folder / "evaluation.json", record)
    return record


def _one_step(backbone: Backbone, real: RealSet, recipe: Recipe, compute: Compute) -> None:
    """Take one gradient on full data and forget it."""
    network = backbone.build(real.card, Rng(0).at("measured")).to(real.device)
    images, labels = RealImages(real).draw(torch.arange(min(recipe.batch, len(real))))
    gradient(network, images, labels, compute, recipe.loss)
