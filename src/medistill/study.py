"""A study: a grid of sources, methods, budgets, backbones and seeds, run cell by cell."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from .audit import FEWEST
from .backbones import backbone as read_backbone
from .cell import FORMAT, Cell, Job, Protocol, Result, recipe_in, run_cell
from .engine import Engine, Lost
from .errors import DataError, UsageError
from .methods import make
from .metrics import NAMES
from .progress import DONE, MISSING, board
from .records import Json, from_record, read_json, to_record, write_atomic, write_json
from .tracking import check_track, tracker

BASELINES = ("random", "full")
MEASURE = "measure"


@dataclass(frozen=True)
class Data:
    """One dataset of a study: its source ($NAME is the environment's), name and group."""

    source: str
    name: str = ""
    group: str = ""
    methods: tuple[str, ...] = ()  # none: all
    budgets: tuple[int, ...] = ()  # none: the study's
    variation: float | None = None  # of a design in which it alone moves; figures draw it

    @property
    def title(self) -> str:
        """What tables call it."""
        return self.name or self.source


@dataclass(frozen=True)
class Way:
    """One method of a study with its settings; `steps` cuts runs short, by images per class."""

    method: str
    name: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    steps: dict[int, int] = field(default_factory=dict)
    budgets: tuple[int, ...] = ()
    audit: int = 0  # models by which each of its sets is attacked

    @property
    def title(self) -> str:
        """What tables call it."""
        return self.name or self.method


@dataclass(frozen=True)
class Study:
    """What a study file says.

    Every method runs on every source for every budget (images per class), backbone and seed. Beside
    them stand the full training split and random images: at every budget, and at the sizes of
    `curve`, from which is read how many random images a distilled set is worth; and, with
    `measure`, what the indicator is fed: random samples scored on the validation split, and numbers
    of variation.
    """

    name: str
    sources: tuple[Data, ...]
    methods: tuple[Way, ...]
    budgets: tuple[int, ...] = (1, 10, 50)
    backbones: tuple[str, ...] = ("convnet-3-128",)
    seeds: int = 3
    curve: tuple[int, ...] = ()
    measure: bool = True
    protocol: Protocol = field(default_factory=Protocol)
    about: str = ""


class Place(NamedTuple):
    """Where a cell stands in the grid, by the names that tables use."""

    source: str
    method: str
    ipc: int
    backbone: str
    seed: int


def read_study(path: Path) -> Study:
    """Read a study file (YAML); a source or method may be its name alone.

    Raises: DataError when the file is missing or no YAML; UsageError when a field, method or
    backbone is unknown, a name stands twice, or there is nothing to run.
    """
    try:
        record = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"found no {path}; expected a study file (YAML)") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        said = " ".join(str(error).split())
        raise DataError(f"{path} is no readable YAML ({said}); expected a study") from None
    if not isinstance(record, dict):
        raise DataError(f"{path} holds {type(record).__name__}; expected fields like sources:")
    record = {"name": path.stem, **record}
    record["sources"] = [_named(one, "source") for one in _listed(record, "sources")]
    record["methods"] = [_way(_named(one, "method")) for one in _listed(record, "methods")]
    study = from_record(Study, record)
    _check(study)
    return study


def _listed(record: Mapping[str, Any], name: str) -> list[Any]:
    found = record.get(name)
    if not isinstance(found, list) or not found:
        raise UsageError(f"found {name}: {found!r} in the study; expected a list of some")
    return found


def _named(one: Any, name: str) -> Json:
    return {name: one} if isinstance(one, str) else dict(one or {})


def _way(record: Json) -> Json:
    """Read `steps: 200` as well as `steps: {1: 500, 10: 200}`."""
    steps = record.get("steps", {})
    return {**record, "steps": {0: steps} if isinstance(steps, int) else dict(steps or {})}


def _check(study: Study) -> None:
    for what, given in (
        ("source", [one.title for one in study.sources]),
        ("method", [one.title for one in study.methods]),
        ("budget", study.budgets),
        ("backbone", study.backbones),
    ):
        twice = {str(one) for one in given if list(given).count(one) > 1}
        if not given:
            raise UsageError(f"found no {what} in the study; expected some")
        if twice:
            raise UsageError(
                f"found {what} {' and '.join(sorted(twice))} twice in the study; expected each "
                "once: give one a name of its own"
            )
    for way in study.methods:
        if {way.method, way.title} & {*BASELINES, MEASURE}:
            raise UsageError(
                f"found {way.title} among the methods; it stands beside every study: leave it out"
            )
        make(way.method, way.settings)
    known = {way.title for way in study.methods}
    for data in study.sources:
        if wrong := set(data.methods) - known:
            raise UsageError(
                f"found methods {', '.join(sorted(wrong))} for {data.title}; expected some of "
                f"{', '.join(sorted(known))}"
            )
    for name in study.backbones:
        read_backbone(name)
    if any(0 < way.audit < FEWEST or way.audit < 0 for way in study.methods):
        raise UsageError(f"found an audit of fewer than {FEWEST} models; expected 0, or more")
    if min((*study.budgets, *study.curve, study.seeds)) < 1:
        raise UsageError("found a budget, size or number of seeds below 1; expected 1 or more")


def grid(study: Study) -> dict[Place, Cell]:
    """Return all cells by their place: baselines first, then method by method, seed by seed."""
    cells: dict[Place, Cell] = {}
    protocol = study.protocol
    for backbone, data in product(study.backbones, study.sources):
        for ipc in dict.fromkeys((*(data.budgets or study.budgets), *study.curve)):
            place = Place(data.title, "random", ipc, backbone, 0)
            cells[place] = Cell("random", data.source, backbone, protocol, ipc)
        full = Cell("full", data.source, backbone, protocol)
        cells[Place(data.title, "full", 0, backbone, 0)] = full
    for data in study.sources if study.measure else ():
        place = Place(data.title, MEASURE, 0, study.backbones[0], 0)
        cells[place] = Cell("measure", data.source, study.backbones[0], protocol)
    for seed, backbone, data in product(range(study.seeds), study.backbones, study.sources):
        for ipc, way in product(data.budgets or study.budgets, study.methods):
            if data.methods and way.title not in data.methods:
                continue
            if way.budgets and ipc not in way.budgets:
                continue
            steps = way.steps.get(ipc, way.steps.get(0))
            what = (way.method, way.settings, steps, seed, way.audit)
            place = Place(data.title, way.title, ipc, backbone, seed)
            cells[place] = Cell("method", data.source, backbone, protocol, ipc, *what)
    return cells


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
    """How a study is run; nothing here changes a number.

    `retry` runs failed and refused cells again; `only` are keys of cells, or words that a cell's
    source, method or backbone must be; after `minutes` no further cell begins. `track` also writes
    each cell's scores elsewhere (see `tracker`).
    """

    retry: bool = False
    only: tuple[str, ...] = ()
    minutes: float | None = None
    root: Path | None = None
    offline: bool = False
    device: str = "cpu"
    track: str = ""


def run_study(
    study: Study,
    to: Path,
    engine: Engine,
    *,
    cache: Path,
    options: Options = Options(),  # frozen
) -> dict[str, int]:
    """Run all cells of a study that have not been run, and return how many stand in which state.

    Baselines come first: where the protocol tunes by random images, methods train by what these
    chose. A cell's file is written when it is done, so that a run may be killed at any time; what
    a cell had distilled so far goes on from its checkpoint.
    Raises: DataError when the folder holds a damaged cell; UsageError when `only` fits no cell.
    """
    check_track(options.track)
    folder, cells = Folder(to), grid(study)
    wanted = _wanted(cells, options.only)
    if not wanted:
        said = " ".join(options.only)
        raise UsageError(f"found no cell for {said}; see `medistill study status`")
    folder.write(study)
    until = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    states = {one.place: one.state for one in entries_of(folder, wanted)}
    rows = [data.title for data in study.sources]
    columns = [*(way.title for way in study.methods), *BASELINES, MEASURE]
    with board(study.name, rows, columns) as show:
        for place, state in states.items():
            show(place.source, place.method, state)
        for baseline in (True, False):
            items = [
                (place, cell)
                for place, cell in wanted.items()
                if (cell.kind != "method") == baseline and _runs(states[place], options.retry)
            ]
            jobs = _jobs(items, cells, folder, options, cache, until)
            for number, result in engine.done(run_cell, jobs):
                place, cell = items[number]
                made = _lost(cell, result) if isinstance(result, Lost) else result
                folder.keep(cell.key, made)
                if options.track:
                    _track(options.track, place, made.record)
                show(place.source, place.method, str(made.record["status"]), states[place])
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
    cache: Path,
    until: float | None,
) -> Iterator[Job]:
    """Yield the jobs of cells until the time is up, each with its recipe where one was chosen."""
    for place, cell in items:
        if until is not None and time.monotonic() > until:
            return
        recipe = None
        if cell.kind == "method" and cell.protocol.tuning == "random":
            held = folder.cell(cells[_chooser(place)].key)
            # Without one the cell has its own pilots: random images of that number were refused.
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
