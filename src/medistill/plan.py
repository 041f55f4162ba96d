"""What a study file says, and the grid of cells that it asks for."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from .audit import FEWEST
from .backbones import backbone as read_backbone
from .cell import Cell, Protocol
from .errors import DataError, UsageError
from .methods import make
from .records import Json, from_record, to_record

BASELINES = ("random", "full")
MEASURE = "measure"
COUNTS = ("steps", "batch", "students", "random", "full", "threads")  # of a protocol


@dataclass(frozen=True)
class Data:
    """One dataset of a study: its source ($NAME is the environment's), name and group.

    `family` names the images that it is made of (its own name unless given): sets that share one
    are not independent.
    """

    source: str
    name: str = ""
    group: str = ""
    family: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()  # none: all
    budgets: tuple[int, ...] = ()  # none: the study's
    variation: float | None = None  # of a design in which it alone moves; figures draw it

    @property
    def title(self) -> str:
        """What tables call it."""
        return self.name or self.source

    @property
    def families(self) -> tuple[str, ...]:
        """What images it is made of."""
        return self.family or (self.title,)


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

    @property
    def every_budget(self) -> tuple[int, ...]:
        """The study's budgets, then those that its sources have of their own."""
        own = (ipc for data in self.sources for ipc in data.budgets)
        return tuple(dict.fromkeys((*self.budgets, *own)))


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
    try:
        json.dumps(record)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{path} holds what no field can be ({error}); expected numbers and words: write "
            "dates in quotes"
        ) from None
    record = {"name": path.stem, **{str(name): value for name, value in record.items()}}
    record["sources"] = [_named(one, "source") for one in _listed(record, "sources")]
    record["methods"] = [_way(_named(one, "method")) for one in _listed(record, "methods")]
    for kind, parts in ((Data, record["sources"]), (Way, record["methods"])):
        for one in parts:
            from_record(kind, one)  # names every field that is unknown
    if isinstance(record.get("protocol"), dict):
        from_record(Protocol, record["protocol"])
    study = from_record(Study, record)
    _check(study)
    return study


def _listed(record: Mapping[str, Any], name: str) -> list[Any]:
    found = record.get(name)
    if not isinstance(found, list) or not found:
        raise UsageError(f"found {name}: {found!r} in the study; expected a list of some")
    return found


def _named(one: Any, name: str) -> Json:
    if not isinstance(one, (str, dict)):
        raise UsageError(f"found {name} {one!r} in the study; expected a name, or fields")
    return {name: one} if isinstance(one, str) else {str(key): part for key, part in one.items()}


def _way(record: Json) -> Json:
    """Read `steps: 200` as well as `steps: {1: 500, 10: 200}`."""
    steps = {} if record.get("steps") is None else record["steps"]
    if not isinstance(steps, (int, dict)):
        raise UsageError(
            f"found steps {steps!r} of a method; expected a whole number, or one by images per "
            "class: {1: 500, 10: 200}"
        )
    return {**record, "steps": {0: steps} if isinstance(steps, int) else steps}


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
    _check_numbers(study)
    cells: dict[str, Place] = {}
    for place, cell in grid(study).items():
        other = cells.setdefault(cell.key, place)
        if other != place:
            raise UsageError(
                f"found the same cell as {other.method} on {other.source} and as {place.method} on "
                f"{place.source}; expected each once: leave one out"
            )


def _check_numbers(study: Study) -> None:
    """Refuse counts and lengths that no run can have, and budgets that are not the study's."""
    if any(0 < way.audit < FEWEST or way.audit < 0 for way in study.methods):
        raise UsageError(f"found an audit of fewer than {FEWEST} models; expected 0, or more")
    protocol = to_record(study.protocol)
    counts = {name: protocol[name] for name in COUNTS} | {"seeds": study.seeds}
    counts |= {f"budget {one}": one for one in (*study.every_budget, *study.curve)}
    for way in study.methods:
        counts |= {f"steps of {way.title}": one for one in way.steps.values()}
    for name, count in counts.items():
        if count < 1:
            raise UsageError(f"found {name}: {count} in the study; expected 1 or more")
    if not all(0 < rate < math.inf for rate in study.protocol.rates):
        raise UsageError(f"found rates {study.protocol.rates}; expected numbers above 0")
    known = study.every_budget
    for way in study.methods:
        if unknown := {*way.budgets} - {*known}:
            raise UsageError(
                f"found budgets {', '.join(map(str, sorted(unknown)))} of {way.title}; expected "
                f"some of the study's: {', '.join(map(str, known))}"
            )


def grid(study: Study) -> dict[Place, Cell]:
    """Return all cells by their place: baselines, the first seed of all sources, then the others.

    The other seeds of a source come together, so that what a worker loaded and compiled serves all.
    """
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
    turns = product((range(1), range(1, study.seeds)), study.backbones, study.sources)
    for seeds, backbone, data in turns:
        for seed, ipc, way in product(seeds, data.budgets or study.budgets, study.methods):
            if data.methods and way.title not in data.methods:
                continue
            if way.budgets and ipc not in way.budgets:
                continue
            steps = way.steps.get(ipc, way.steps.get(0))
            what = (way.method, way.settings, steps, seed, way.audit)
            place = Place(data.title, way.title, ipc, backbone, seed)
            cells[place] = Cell("method", data.source, backbone, protocol, ipc, *what)
    return cells
