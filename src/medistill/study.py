"""A study: the cells of its plan, run one by one and kept in a folder."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import yaml

from .cell import FORMAT, Cell, Job, Result, recipe_in, run_cell
from .engine import Engine, Lost
from .errors import DataError, UsageError
from .metrics import NAMES
from .plan import BASELINES, MEASURE, Place, Study, grid, read_study
from .progress import DONE, MISSING, board
from .records import Json, read_json, to_record, write_atomic, write_json
from .tracking import check_track, tracker


@dataclass(frozen=True)
class Folder:
    """A study's folder: study.yaml, one file per cell in cells/, picture sheets in sheets/."""

    path: Path

    def study(self) -> Study:
        """Return the study that runs here.

        Raises: DataError when this is no study folder.
        """
        if not (self.path / "study.yaml").is_file():
            raise DataError(
                f"found no study.yaml in {self.path}; expected a study folder: give one that "
                "`medistill study run ... --out STUDY` wrote"
            )
        return read_study(self.path / "study.yaml")

    def write(self, study: Study) -> None:
        """Keep what the study says."""
        text = yaml.safe_dump(to_record(study), sort_keys=False, allow_unicode=True)
        write_atomic(self.path / "study.yaml", text.encode())

    def cell(self, key: str) -> Json | None:
        """Return a cell's record, or None where it has not been run.

        Raises: DataError when its file is damaged.
        """
        path = self.path / "cells" / f"{key}.json"
        if not path.is_file():
            return None
        record = read_json(path)
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise DataError(f"{path} is no cell of a study; expected {FORMAT}: remove it")
        return record

    def sheet(self, key: str) -> bytes | None:
        """Return the picture sheet of a distilled set, where it was kept."""
        path = self.path / "sheets" / f"{key}.png"
        return path.read_bytes() if path.is_file() else None

    def keep(self, key: str, result: Result) -> None:
        """Write a cell's result; the record comes last, for it says that all is there."""
        if result.sheet is not None and result.record["cell"]["seed"] == 0:
            write_atomic(self.path / "sheets" / f"{key}.png", result.sheet)
        write_json(self.path / "cells" / f"{key}.json", result.record)


@dataclass(frozen=True)
class Options:
    """How a study is run; nothing here but `device`, by rounding, changes a number.

    `retry` runs failed and refused cells again; `only` are keys of cells, or words that a cell's
    source, method or backbone must be; after `minutes` no further cell begins. `track` also writes
    each cell's scores elsewhere (see `tracker`).
    """

    retry: bool = False
    only: tuple[str, ...] = ()
    minutes: float = math.inf
    root: Path | None = None
    offline: bool = False
    device: str = "cpu"
    track: str = ""


def run_study(
    study: Study,
    to: Path,
    engine: Engine,
    *,
    cache: Path | None,
    options: Options = Options(),  # frozen
) -> dict[str, int]:
    """Run all cells of a study that have not been run, and return how many stand in which state.

    Baselines come first: where the protocol tunes by random images, methods train by what these
    chose. A cell's file is written when it is done, so that a run may be killed at any time; what
    a cell had distilled so far goes on from its checkpoint.
    What several cells need is kept in `cache`; None: where each worker's machine keeps its own.
    Raises: DataError when the folder holds a damaged cell; UsageError when `only` fits no cell.
    """
    check_track(options.track)
    folder, cells = Folder(to), grid(study)
    wanted = _wanted(cells, options.only)
    if not wanted:
        said = " ".join(options.only)
        raise UsageError(f"found no cell for {said}; see `medistill study status`")
    folder.write(study)
    until = time.monotonic() + 60 * options.minutes
    states = {one.place: one.state for one in entries_of(folder, wanted)}
    again = {place for place, state in states.items() if _runs(state, options.retry)}
    rows = [data.title for data in study.sources]
    columns = [*(way.title for way in study.methods), *BASELINES, MEASURE]
    with board(study.name, rows, columns) as show:
        for place, state in states.items():
            show(place.source, place.method, MISSING if place in again else state)
        for baseline in (True, False):
            items = [
                (place, cell)
                for place, cell in wanted.items()
                if (cell.kind != "method") == baseline
                and place in again
                and (baseline or _has_recipe(place, cell, states))
            ]
            jobs = _jobs(items, cells, folder, options, cache)
            for number, result in engine.done(run_cell, jobs, _source, until):
                place, cell = items[number]
                made = _lost(cell, result) if isinstance(result, Lost) else result
                folder.keep(cell.key, made)
                if options.track:
                    _track(options.track, place, made.record)
                show(place.source, place.method, str(made.record["status"]), MISSING)
                states[place] = str(made.record["status"])
    return {name: list(states.values()).count(name) for name in sorted(set(states.values()))}


def _wanted(cells: Mapping[Place, Cell], only: Sequence[str]) -> dict[Place, Cell]:
    """Return the cells that all words fit, and the random images that choose their recipes."""
    wanted = {}
    for place, cell in cells.items():
        names = {cell.key, place.source, place.method, place.backbone}
        if all(word in names for word in only):
            wanted[place] = cell
            if cell.kind == "method" and cell.protocol.tuning == "random":
                wanted[_chooser(place)] = cells[_chooser(place)]
    return wanted


def _has_recipe(place: Place, cell: Cell, states: Mapping[Place, str]) -> bool:
    """Say whether random images have chosen, or cannot; else the cell stays missing."""
    return cell.protocol.tuning != "random" or states[_chooser(place)] in (DONE, "refused")


def _chooser(place: Place) -> Place:
    """Return the place of the random images beside a method's cell."""
    return place._replace(method="random", seed=0)


class Entry(NamedTuple):
    """A cell of a study with its record, if it has been run."""

    place: Place
    cell: Cell
    record: Json | None

    @property
    def state(self) -> str:
        """Done, refused or failed; missing where the cell has not been run."""
        return MISSING if self.record is None else str(self.record["status"])


def entries_of(folder: Folder, cells: Mapping[Place, Cell]) -> list[Entry]:
    """Return the cells with what stands in the folder; each file is read once.

    Raises: DataError when one is damaged.
    """
    return [Entry(place, cell, folder.cell(cell.key)) for place, cell in cells.items()]


def measured_in(entries: Sequence[Entry]) -> dict[str, Json]:
    """Return what was measured of each source."""
    found = {}
    for place, _, record in entries:
        if place.method == MEASURE and record and record["status"] == DONE:
            found[place.source] = record["measure"]
    return found


def _runs(state: str, retry: bool) -> bool:
    return state == MISSING or (retry and state in ("failed", "refused"))


def _jobs(
    items: Sequence[tuple[Place, Cell]],
    cells: Mapping[Place, Cell],
    folder: Folder,
    options: Options,
    cache: Path | None,
) -> Iterator[Job]:
    """Yield the jobs of cells, each with its recipe where one was chosen."""
    for place, cell in items:
        recipe = None
        if cell.kind == "method" and cell.protocol.tuning == "random":
            held = folder.cell(cells[_chooser(place)].key)
            # Where random images of that number were refused, the cell has its own pilots.
            recipe = recipe_in(held) if held and held["status"] == DONE else None
        yield Job(
            cell,
            recipe,
            options.root,
            options.offline,
            cache,
            f"medistill study run {folder.path / 'study.yaml'} --only {cell.key} --out again",
            options.device,
        )


def _source(job: Job) -> tuple[str, bool]:
    """Return what a worker has loaded and compiled for; the first syntheses of all come first."""
    return job.cell.source, job.cell.seed > 0


def _track(where: str, place: Place, record: Json) -> None:
    """Write a cell's mean scores over its students to TensorBoard or MLflow."""
    rows = record.get("rows") or []
    scores = {name: sum(row[name] for row in rows) / len(rows) for name in NAMES if rows}
    name = " ".join(str(part) for part in place).replace("/", "_")
    facts = {**place._asdict(), **record["cell"]["settings"], "key": record["key"]}
    told = tracker(where, name, facts | {"status": record["status"]})
    told.end({**scores, "seconds": record.get("seconds", 0.0)}, record["status"] == "done")


def _lost(cell: Cell, lost: Lost) -> Result:
    record = {"format": FORMAT, "key": cell.key, "cell": to_record(cell)}
    return Result({**record, "status": "failed", "error": lost.reason}, None)
