"""One cell of a study: distill once, or draw baselines, train students, and say what came out."""

import dataclasses
import os
import shutil
import time
import traceback
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from . import __version__
from .arms import RATES, arm_rows, full_arm, random_arm, synthetic_arm
from .audit import audit_run
from .backbones import backbone as read_backbone
from .budget import Budget
from .compute import Compute, find_device, forget_peak
from .data import load
from .distill import Run, distill, distill_to
from .errors import DataError, MedistillError, NoRoom, RunRefused, UsageError
from .measure import measure
from .methods import Task, make
from .methods.base import recipe_of
from .methods.random import Random
from .places import cache_folder
from .progress import hushed
from .records import Json, digest, locked, to_record
from .sets import Recipe, Splits, SyntheticSet

FORMAT = "medistill cell 1"
UNTOLD = ("run", "date", "seconds")  # of an audit: they differ where nothing else does
Kind = Literal["full", "random", "measure", "method"]
# Fields of the protocol that say nothing about a cell of this kind: they may change under it.
UNUSED: dict[Kind, tuple[str, ...]] = {
    "full": ("students", "random", "tuning"),
    "random": ("students", "full", "tuning"),
    "measure": ("students", "random", "full", "tuning", "steps", "batch", "rates", "compile"),
    "method": ("random", "full"),
}


@dataclass(frozen=True)
class Protocol:
    """How the students of a study are trained and tested: the same in all its cells.

    `steps` and `batch` are those of a student's schedule. Learning rates and stops are chosen on
    the validation split from `rates` (none: the recipe's own): by pilots of `each` set, or by
    `random` images of the same number, whose choice then serves all methods of that source, budget
    and backbone. `students` train on each synthetic set, `random` on draws of random images, `full`
    on the whole training split. `threads` and `compile` are part of it because sums round by them.
    """

    steps: int = 1000
    batch: int = 256
    rates: tuple[float, ...] = RATES
    tuning: Literal["each", "random"] = "each"
    students: int = 1
    random: int = 5
    full: int = 3
    precision: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    threads: int = 1
    split_seed: int = 0


@dataclass(frozen=True)
class Cell:
    """What one cell is asked to do: all that its numbers depend on.

    `full` trains on the whole training split, `random` on draws of `ipc` random images per class,
    `method` distills with a seed and trains on that; `measure` takes what the indicator is fed.
    Tasks with several labels of an image get as many images as `ipc` times their labels. With
    `audit` a distilled set is attacked as well, by so many models.
    """

    kind: Kind
    source: str
    backbone: str
    protocol: Protocol
    ipc: int = 0
    method: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    steps: int | None = None
    seed: int = 0
    audit: int = 0

    @property
    def students(self) -> range:
        """The seeds of its students; other cells of a synthesis have others."""
        first, number = 0, 0
        if self.kind == "method":
            first, number = self.seed * self.protocol.students, self.protocol.students
        elif self.kind != "measure":
            number = self.protocol.random if self.kind == "random" else self.protocol.full
        return range(first, first + number)

    @property
    def key(self) -> str:
        """The digest that names the cell's file."""
        record = to_record(self)
        for name in UNUSED[self.kind]:
            del record["protocol"][name]
        if not self.audit:
            del record["audit"]  # cells without one are those of before there were audits
        return digest(record)[:20]


class Job(NamedTuple):
    """A cell with what a worker needs to run it; it travels to workers.

    `recipe` is what a method's students are trained by where random images chose it; `scratch` is
    a folder for what is not finished yet. Without a `cache` the worker's machine has its own.
    """

    cell: Cell
    recipe: Json | None
    root: Path | None
    offline: bool
    cache: Path | None
    command: str = ""
    device: str = "cpu"

    @property
    def scratch(self) -> Path:
        """The folder of an unfinished distillation, which goes on there."""
        return self.shared / "cells" / self.cell.key

    @property
    def shared(self) -> Path:
        """The folder of what several cells need."""
        return self.cache or cache_folder()


class Result(NamedTuple):
    """What a cell gives: its record, and the picture sheet of a distilled set."""

    record: Json
    sheet: bytes | None


def run_cell(job: Job) -> Result:
    """Run one cell; what goes wrong in it is part of the result.

    The record's `status` is done; refused (the method cannot do it, or a class has too few images)
    or failed, both with `error`.
    Raises: NoRoom when something cannot be written; what a cell distilled so far stays.
    """
    begin = time.monotonic()
    torch.set_num_threads(job.cell.protocol.threads)
    forget_peak()  # of the cells before it in this process
    record: Json = {
        "format": FORMAT,
        "key": job.cell.key,
        "cell": to_record(job.cell),
        "command": job.command,
        "version": __version__,
        "torch": torch.__version__,
        "device": job.device,
    }
    sheet = None
    try:
        with hushed(), _alone(job):
            found, sheet = _run(job)
        record |= {"status": "done", **found}
    except NoRoom:
        raise
    except (RunRefused, UsageError) as error:
        record |= {"status": "refused", "error": str(error)}
    except MedistillError as error:
        record |= {"status": "failed", "error": str(error)}
    except Exception as error:  # one cell must not end a study
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(last.filename).name}, line {last.lineno}"
        record |= {"status": "failed", "error": f"{type(error).__name__}: {error} ({place})"}
    record["seconds"] = round(time.monotonic() - begin, 3)
    return Result(record, sheet)


def _alone(job: Job) -> AbstractContextManager[None]:
    """Hold the scratch folder of a distillation: another study may want the same cell."""
    return locked(job.scratch) if job.cell.kind == "method" else nullcontext()


@lru_cache(maxsize=4)  # neighboring cells read the same data
def _splits(source: str, root: Path | None, offline: bool, seed: int, device: str) -> Splits:
    # A study names folders as $NAME, whose value is each machine's own.
    found = load(os.path.expandvars(source), root=root, offline=offline, seed=seed)
    return found.to(find_device(device))


def _run(job: Job) -> tuple[Json, bytes | None]:
    cell, protocol = job.cell, job.cell.protocol
    splits = _splits(cell.source, job.root, job.offline, protocol.split_seed, job.device)
    compute = Compute(protocol.precision, protocol.compile)
    student = read_backbone(cell.backbone)
    facts: Json = {
        "data_digest": splits.train.card.digest,
        "task": splits.train.card.task,
        "classes": len(splits.train.card.classes),
        "train": len(splits.train),
    }
    if cell.kind == "measure":
        taken = measure(splits.train, splits.val, threads=protocol.threads)
        return {**facts, "rows": [], "measure": taken}, None
    counts: Json = {}
    made, sheet, whole = None, None, splits
    task = Task(splits.train, _budget(cell, splits), student, compute=compute)
    if cell.kind == "method":
        made, counts, sheet = _distilled(job, task)
        splits = splits.whitened(made.whitening)
        arm = synthetic_arm(made, splits.train.device)
    elif cell.kind == "random":
        drawn = distill(Random(), task, seed=cell.seed)
        arm = random_arm(drawn, splits)
    else:
        arm = full_arm(splits)
    base = _base(made.recipe if made else recipe_of(task), protocol, job.recipe)
    rows, recipe = arm_rows(
        arm,
        splits,
        base,
        student,
        seeds=cell.students,
        rates=() if job.recipe else protocol.rates,
        cache=None if made else job.shared,
        compute=compute,
    )
    if made and cell.audit:
        found = audit_run(
            job.scratch,
            whole,
            models=cell.audit,
            seed=cell.seed,
            compute=compute,
            cache=job.shared,
        )
        counts["audit"] = {name: found[name] for name in found if name not in UNTOLD}
    if made:
        shutil.rmtree(job.scratch, ignore_errors=True)
    return {**facts, **counts, "recipe": recipe, "rows": rows}, sheet


def _budget(cell: Cell, splits: Splits) -> Budget:
    card = splits.train.card
    if card.task == "multi-label":
        return Budget(images=max(1, cell.ipc) * len(card.classes))
    return Budget(ipc=max(1, cell.ipc))


def _base(recipe: Recipe, protocol: Protocol, chosen: Mapping[str, Any] | None) -> Recipe:
    """Return a set's recipe at the protocol's length, and at the rate and stop chosen already."""
    stop, lr = protocol.steps, recipe.lr
    if chosen is not None:
        stop, lr = chosen["stop"], chosen["lr"]
    return dataclasses.replace(recipe, steps=protocol.steps, stop=stop, batch=protocol.batch, lr=lr)


def _distilled(job: Job, task: Task) -> tuple[SyntheticSet, Json, bytes]:
    """Distill in the scratch folder, or go on with what stands there."""
    cell = job.cell
    method = make(cell.method, cell.settings)
    run = Run(method, task, cell.seed, cell.source, job.command, cell.steps)
    begun = (job.scratch / "run.json").is_file()
    if not begun:  # what a kill left before there was anything to go on from
        shutil.rmtree(job.scratch, ignore_errors=True)
    try:
        record = distill_to(job.scratch, run, resume=begun, cache=job.shared)
    except NoRoom:
        raise
    except (RunRefused, DataError):
        if not begun:
            shutil.rmtree(job.scratch, ignore_errors=True)
            raise
        # What stands there was written by another version, or is damaged.
        shutil.rmtree(job.scratch, ignore_errors=True)
        record = distill_to(job.scratch, run, resume=False, cache=job.shared)
    made = SyntheticSet.load(job.scratch / "synthetic.safetensors")
    names = ("images", "steps_done", "paper_steps", "start", "real_pixels", "outside", "settings")
    counts = {name: record[name] for name in names} | {
        "distill_seconds": record["seconds"],
        "peak_memory_bytes": record["peak_memory_bytes"],
    }
    return made, counts, (job.scratch / "sheet.png").read_bytes()


def recipe_in(record: Json) -> Json:
    """Return the learning rate and stop that a finished cell of random images chose.

    Raises: DataError when it holds no student.
    """
    if not record.get("rows"):
        raise DataError(f"found no student in cell {record.get('key')}; expected a finished one")
    return {name: record["rows"][0][name] for name in ("lr", "stop")}
