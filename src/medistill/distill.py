"""The one outer loop: run a method, log it, checkpoint it, resume it."""

import dataclasses
import json
import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from . import __version__
from .backbones import to_spec
from .budget import counted
from .compute import Mode, peak_memory, require_compiler, worth_compiling
from .errors import DataError, NoRoom, RunRefused, UsageError
from .methods import Log, Method, Task
from .methods.base import check_means
from .pictures import png, real_beside_synthetic
from .pixels import outside
from .prepare import on_device, prepared
from .progress import progress, say
from .records import (
    Json,
    State,
    load_state,
    read_json,
    save_state,
    state_digest,
    to_record,
    write_atomic,
    write_json,
)
from .rng import Rng
from .sets import SyntheticSet
from .tracking import Tracker, check_track, tracker

CHECKPOINT_EVERY_S = 60.0
# Of the pixels, that lie outside the range by half of it (noise hardly does): a word is said then.
FAR, MOST_FAR = 0.5, 0.05
OnStep = Callable[[int, Log], None]


def distill(
    method: Method,
    task: Task,
    *,
    seed: int,
    steps: int | None = None,
    resume: State | None = None,
    on_step: Callable[[State, Log], None] | None = None,
    cache: Path | None = None,
) -> SyntheticSet:
    """Run a method on a task and return the synthetic set.

    `steps` cuts the run short (the method's own number otherwise); `resume` continues from a
    state; after each step `on_step(state, log)` is called. A run's draws depend on the seed and
    the step's number, so a resumed run gives the same bits on the same device and versions.
    Raises: UsageError when `check` does; RunRefused when the loss is no longer finite.

    Example:
        >>> from medistill import Budget, ConvNet, Task, load
        >>> from medistill.methods import Random
        >>> train = load("phantom:n=40").train
        >>> len(distill(Random(), Task(train, Budget(ipc=2), ConvNet(width=8)), seed=0))
        4
    """
    check(method, task)
    rng = Rng(seed)
    if not task.prepared:
        mode: Mode = "auto" if task.compute.compile else "off"
        task = dataclasses.replace(task, prepared=prepared(method, task, cache, mode))
    state = method.init(task, rng) if resume is None else on_device(resume, task.real.device)
    total = method.steps(task) if steps is None else min(steps, method.steps(task))
    done = int(state["step"])
    with progress(f"distill {method.name}", total, done=done) as advance:
        for _ in range(done, total):
            state, log = method.step(state, task, rng)
            for name, value in log.items():
                if not math.isfinite(value):
                    raise RunRefused(
                        f"found {name.replace('_', ' ')} {value} at step {int(state['step'])}; "
                        "expected a finite one: lower --lr-images; the last checkpoint is kept"
                    )
            if on_step is not None:
                on_step(state, log)
            advance(note=f"loss {log['loss']:.4g}")
    return method.finish(state, task, rng)


def check(method: Method, task: Task) -> None:
    """Refuse what cannot be begun, before anything is written.

    Raises: UsageError when the method does not handle the task of the data, or needs images where
    there is only a sketch; when a count among its settings is below 1 or a rate below 0; when the
    images are too small for the backbone. RunRefused when a class has no mean to start from.
    """
    card = task.real.card
    if card.task not in method.tasks:
        raise UsageError(
            f"found a {card.task} task in {card.name}; expected {' or '.join(method.tasks)} for "
            f"{method.name}: choose another method"
        )
    for field in dataclasses.fields(method):  # type: ignore[arg-type]
        name, value = field.name, getattr(method, field.name)
        least = field.metadata.get("least", int(isinstance(value, int) and field.default != 0))
        if type(value) in (int, float) and not value >= least:
            raise UsageError(f"found {name} {value} for {method.name}; expected {least} or more")
    if task.sketch is not None and not method.from_sketch:
        raise UsageError(
            f"found a sketch for {method.name}; expected images: use --method sketch, or give the "
            "data itself"
        )
    drawn = method.start == "class-mean" and hasattr(method, "moments") and method.moments > 0
    if task.sketch is not None and method.start != "noise" and not drawn:
        raise UsageError(
            f"found start {method.start!r} for a sketch, which holds no images to start from; "
            "expected noise: leave out --start (or class-mean, of a sketch made with --moments 8)"
        )
    if method.start == "class-mean" and card.task != "multi-label" and task.sketch is None:
        check_means(task)
    task.backbone.build(card, Rng(0).at("check"))
    if task.compute.compile:
        require_compiler()
    method.check(task)


@dataclass(frozen=True)
class Run:
    """What one run folder is asked to hold."""

    method: Method
    task: Task
    seed: int
    source: str
    command: str
    steps: int | None = None


def run_record(run: Run) -> Json:
    """Return what identifies a run: resuming is refused where any of this differs."""
    total, held = run.method.steps(run.task), run.task.sketch
    sketched: Json | None = None
    if held is not None:
        promised = None if held.privacy is None else to_record(held.privacy)
        sketched = {"digest": state_digest(held.state), "privacy": promised}
        sketched["spec"] = to_record(held.spec)
    return {
        "format": "medistill run 1",
        "source": run.source,
        "command": run.command,
        "method": run.method.name,
        "settings": to_record(run.method),
        "seed": run.seed,
        "budget": to_record(run.task.budget),
        "ipc": run.task.ipc if run.task.counts else None,  # several labels: no class of its own
        "images": run.task.total,
        "counts": list(run.task.counts),
        "backbone": to_spec(run.task.backbone),
        "augmentation": to_record(run.task.augmentation),
        "compute": to_record(run.task.compute),
        "start": run.method.start,
        "real_pixels": run.method.start == "real",
        "steps": total if run.steps is None else min(run.steps, total),
        "paper_steps": total,
        "data": to_record(run.task.real.card),
        "real": counted(run.task.real) if len(run.task.real) else None,
        "sketch": sketched,
        "device": str(run.task.real.device),
        "versions": {
            "medistill": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


_MAY_DIFFER = ("command", "seconds", "peak_memory_bytes", "bytes", "finished", "steps_done")


def distill_to(
    folder: Path,
    run: Run,
    *,
    resume: bool,
    cache: Path | None = None,
    compiling: Mode | None = None,
    track: str = "",
) -> Json:
    """Distill into a run folder and return its record.

    `compiling` decides whether the run is compiled (as its task says where it is None); a run
    that is resumed goes on as it began. `track` also writes the log elsewhere (see `tracker`).

    The folder holds run.json, log.jsonl, checkpoint.safetensors (at most every 60 s and at the
    end), synthetic.safetensors and sheet.png; a run that was killed continues with `resume`.
    Raises: RunRefused when the folder exists (without resume), or holds another run; UsageError
    when `check` does.
    """
    check(run.method, run.task)
    check_track(track)
    _check_free(folder, resume)
    ready = run.task.prepared or _ready(folder, run, resume, cache, compiling or "off")
    run = dataclasses.replace(run, task=dataclasses.replace(run.task, prepared=ready))
    if compiling is not None:
        compiled = _compiled(folder, run, compiling, resume)
        compute = dataclasses.replace(run.task.compute, compile=compiled)
        run = dataclasses.replace(run, task=dataclasses.replace(run.task, compute=compute))
    record = run_record(run)
    state, seconds = _opened(folder, record, resume)
    told = tracker(track, folder.name, _facts(record)) if track else None
    keeper = _Keeper(folder, state, seconds, told)
    try:
        synthetic = distill(
            run.method,
            run.task,
            seed=run.seed,
            steps=run.steps,
            resume=state,
            on_step=keeper.keep,
            cache=cache,
        )
    except (KeyboardInterrupt, RunRefused):
        keeper.stop()
        raise
    keeper.save()
    _tell_range(synthetic)
    synthetic.save(folder / "synthetic.safetensors")
    write_atomic(folder / "sheet.png", png(real_beside_synthetic(run.task.real, synthetic)))
    record |= {
        "finished": True,
        "steps_done": keeper.done,
        "outside": round(outside(synthetic.images), 4),
        "seconds": round(keeper.seconds, 3),
        "peak_memory_bytes": peak_memory(),
        "bytes": (folder / "synthetic.safetensors").stat().st_size,
    }
    write_json(folder / "run.json", record)
    keeper.end(record)
    return record


def _facts(record: Json) -> Json:
    """Return what a tracker shows of a run beside its numbers."""
    named = ("source", "method", "seed", "images", "ipc", "start", "steps", "device", "command")
    settings: Json = record["settings"]
    return {name: record[name] for name in named} | settings


def _tell_range(synthetic: SyntheticSet) -> None:
    """Say a word where images have run far out of the data's range."""
    far = outside(synthetic.images, by=FAR)
    if far > MOST_FAR:
        say(
            f"{100 * far:.0f}% of the pixels lie far outside the data's range; networks see them "
            "so, pictures cannot show them: lower --lr-images"
        )


def _compiled(folder: Path, run: Run, mode: Mode, resume: bool) -> bool:
    """Decide whether to compile, by a step that is thrown away or as the run began."""
    there = mode == "auto" and resume and (folder / "run.json").is_file()
    if there and (begun := _begun(folder).get("compute")):  # None: it was stopped before that
        return bool(begun.get("compile", False))
    steps = run.method.steps(run.task) if run.steps is None else run.steps
    if mode != "auto" or not steps:
        return worth_compiling(mode, lambda: None, 0)
    rng, task = Rng(run.seed), run.task
    state = run.method.init(task, rng)
    return worth_compiling(mode, lambda: run.method.step(state, task, rng), steps)


def _ready(folder: Path, run: Run, resume: bool, cache: Path | None, mode: Mode) -> State:
    """Prepare the method; an interrupt leaves a run that has not begun, which can be resumed."""
    try:
        return prepared(run.method, run.task, cache, mode)
    except KeyboardInterrupt:
        if not resume:
            record = run_record(run) | {"compute": None, "finished": False}  # not decided yet
            write_json(folder / "run.json", record)
        raise


def _check_free(folder: Path, resume: bool) -> None:
    if resume:
        if not (folder / "run.json").is_file():
            raise RunRefused(f"found no run in {folder}; expected run.json: leave out --resume")
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunRefused(
            f"found {folder} already there; expected a new or empty folder: choose another "
            "--out, or continue it with --resume"
        )


def _begun(folder: Path) -> Json:
    """Return what a folder says of its run.

    Raises: DataError when that is no record.
    """
    found = read_json(folder / "run.json")
    if not isinstance(found, dict):
        raise DataError(f"{folder / 'run.json'} is no record of a run; expected one of distill")
    return found


def _opened(folder: Path, record: Json, resume: bool) -> tuple[State | None, float]:
    """Make or reopen a run folder; return the state to go on from and the seconds spent.

    The record keeps the command that began the run.
    """
    if not resume:
        write_json(folder / "run.json", {**record, "finished": False})
        return None, 0.0
    old = _begun(folder)
    old["compute"] = old.get("compute") or record["compute"]
    for name in record:
        if name not in _MAY_DIFFER and old.get(name) != record[name]:
            raise RunRefused(
                f"{folder} holds another run: its {name} is {old.get(name)}; expected "
                f"{record[name]}: choose another --out or the settings it was begun with"
            )
    record["command"] = old.get("command", "")  # what began it makes it again, anywhere
    checkpoint = folder / "checkpoint.safetensors"
    if not checkpoint.is_file():
        write_json(folder / "run.json", {**record, "finished": False})  # what is decided by now
        write_atomic(folder / "log.jsonl", b"")
        return None, 0.0
    (state, header), log = load_state(checkpoint), folder / "log.jsonl"
    done, lines = int(state["step"]), log.read_text().splitlines() if log.is_file() else []
    if len(lines) < done:
        raise DataError(
            f"found {len(lines)} lines in {log}; expected {done}, one for each step of the "
            "checkpoint: begin anew in another folder"
        )
    write_atomic(log, "".join(line + "\n" for line in lines[:done]).encode())
    return state, float(header["seconds"])


class _Keeper:
    """Writes the log line by line and the checkpoint now and then."""

    def __init__(
        self, folder: Path, state: State | None, seconds: float, tracker: Tracker | None
    ) -> None:
        self.folder, self.before, self.tracker = folder, seconds, tracker
        self.begin = self.saved = time.monotonic()
        self.state = state
        self.done = 0 if state is None else int(state["step"])

    @property
    def seconds(self) -> float:
        return self.before + time.monotonic() - self.begin

    def keep(self, state: State, log: Log) -> None:
        done = int(state["step"])
        line = {"step": done, "seconds": round(self.seconds, 3), **log}
        try:
            with open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise self._no_room(error) from error
        # After the line, never before: an interrupt in between would save a step without its line.
        self.state, self.done = state, done
        if self.tracker is not None:
            self.tracker.step(done, log)
        if time.monotonic() - self.saved >= CHECKPOINT_EVERY_S:
            self.save()

    def stop(self) -> None:
        self.save()
        if self.tracker is not None:
            self.tracker.end({}, finished=False)

    def end(self, record: Json) -> None:
        names = ("seconds", "peak_memory_bytes", "outside")
        if self.tracker is not None:
            self.tracker.end({name: record[name] for name in names})

    def save(self) -> None:
        if self.state is not None:
            # The log must never be behind the checkpoint, so it reaches the disk first.
            try:
                with open(self.folder / "log.jsonl", "rb") as file:
                    os.fsync(file.fileno())
            except OSError as error:
                raise self._no_room(error) from error
            save_state(
                self.folder / "checkpoint.safetensors", self.state, {"seconds": self.seconds}
            )
            self.saved = time.monotonic()

    def _no_room(self, error: OSError) -> NoRoom:
        return NoRoom(
            f"could not write {self.folder / 'log.jsonl'}: {error.strerror}; expected room on "
            "the disk: free some, then continue with --resume"
        )
