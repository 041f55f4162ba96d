"""Numbers of a study as rows and tables: scores with intervals, gap closed, worth."""

import csv
import io
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .cell import FORMAT, Cell
from .errors import DataError, UsageError, nearest
from .metrics import NAMES, Score, gap_closed, score, worth_of
from .plan import BASELINES, Place, Study, grid
from .progress import DONE
from .records import Json, to_record
from .study import Entry

Row = dict[str, Any]
DIMENSIONS = ("source", "method", "ipc", "backbone")
SCORES = (*NAMES, "kappa")
METRICS = (
    *(*SCORES, "gap_closed", "gap_closed_auc", "worth", "distill_seconds", "peak_memory_bytes"),
    "lira_auc",
)
PERCENT = (*SCORES, "gap_closed", "gap_closed_auc", "lira_auc")
OF_CELL = (
    "data_digest",
    "task",
    "classes",
    "train",
    "images",
    "start",
    "steps_done",
    "paper_steps",
    "distill_seconds",
    "peak_memory_bytes",
    "version",
    "device",
    "key",
)
OF_STUDENT = ("seed", *SCORES, "lr", "stop", "seconds")
COLUMNS = (
    "source",
    "group",
    "method",
    "ipc",
    "backbone",
    "synthesis",
    *(f"student_{name}" if name == "seed" else name for name in OF_STUDENT),
    *OF_CELL,
    "lira_auc",
)


def rows_of(study: Study, entries: Sequence[Entry]) -> list[Row]:
    """Return one row for every student of a study: where it stands, its scores, its costs."""
    groups = {data.title: data.group for data in study.sources}
    rows = []
    for place, record in ((one.place, one.record) for one in entries):
        if record is None or record["status"] != "done":
            continue
        for student in record["rows"]:
            row: Row = {
                "source": place.source,
                "group": groups[place.source],
                "method": place.method,
                "ipc": place.ipc,
                "backbone": place.backbone,
                "synthesis": place.seed,
            }
            row |= {f"student_{n}" if n == "seed" else n: student.get(n) for n in OF_STUDENT}
            row |= {name: record.get(name) for name in OF_CELL} | {"lira_auc": _lira(record)}
            rows.append({**row, "images": student["images"]})
    return rows


def _lira(record: Json) -> float | None:
    """Return the area under the curve of LiRA on images with a wrong label, if it was asked."""
    found = record.get("audit", {}).get("membership")
    return found["lira"]["canaries"]["auc"] if found else None


def write_rows(rows: Sequence[Row]) -> str:
    """Return rows as CSV, numbers to six digits."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({n: f"{v:.6g}" if isinstance(v, float) else v for n, v in row.items()})
    return out.getvalue()


def read_rows(text: str) -> list[Row]:
    """Return what `write_rows` wrote."""
    return [
        {name: _value(name, text) for name, text in row.items()}
        for row in csv.DictReader(io.StringIO(text))
    ]


def _value(name: str, text: str) -> Any:
    if name in (
        "source",
        "group",
        "method",
        "backbone",
        "data_digest",
        "task",
        "start",
        "version",
        "device",
        "key",
    ):
        return text
    if not text:
        return None
    return (
        float(text)
        if name in (*SCORES, "lr", "seconds", "distill_seconds", "lira_auc")
        else int(text)
    )


def records_of(study: Study, rows: Sequence[Row], measured: Mapping[str, Json]) -> dict[str, Json]:
    """Return the records of a study's finished cells as their rows tell them, by key.

    The inverse of `rows_of` and `measured_in`, so that a study goes on from its table alone. Rows
    of other cells, as those of changed settings, and cells with an audit, of which a row tells one
    number, are left out.
    Raises: DataError when a cell has other students than the study asks for.
    """
    parts: dict[str, list[Row]] = {}
    for row in rows:
        parts.setdefault(row["key"], []).append(row)
    records = {}
    for place, cell in grid(study).items():
        record = {"format": FORMAT, "key": cell.key, "cell": to_record(cell), "status": DONE}
        if cell.kind == "measure" and place.source in measured:
            records[cell.key] = {**record, "rows": [], "measure": measured[place.source]}
        elif cell.key in parts and not cell.audit:
            records[cell.key] = {**record, **_of_rows(cell, parts[cell.key])}
    return records


def _of_rows(cell: Cell, rows: Sequence[Row]) -> Json:
    seeds = [row["student_seed"] for row in rows]
    if seeds != list(cell.students):
        raise DataError(
            f"found students {seeds} of cell {cell.key}; expected {list(cell.students)}: give the "
            "whole file that `medistill study rows` wrote"
        )
    students = [
        {n: row[f"student_{n}" if n == "seed" else n] for n in (*OF_STUDENT, "images")}
        for row in rows
    ]
    return {**{name: rows[0][name] for name in OF_CELL}, "rows": students}


class Group(NamedTuple):
    """All students of one method on one source at one budget, by synthesis."""

    place: Place
    rows: list[Row]

    def scores(self, metric: str) -> list[float]:
        """Return the mean over students of each synthesis; of baselines, each student's own."""
        parts: dict[Any, list[float]] = {}
        for row in self.rows:
            key = row["student_seed"] if self.place.method in BASELINES else row["synthesis"]
            if row[metric] is not None:
                parts.setdefault(key, []).append(float(row[metric]))
        return [math.fsum(part) / len(part) for part in parts.values()]


class Book:
    """A study's rows by place, from which every figure and table is read."""

    def __init__(self, rows: Sequence[Row], budgets: Sequence[int]) -> None:
        self.budgets = tuple(budgets)
        self.groups: dict[tuple[str, str, int, str], Group] = {}
        for row in rows:
            key = (row["source"], row["method"], row["ipc"], row["backbone"])
            place = Place(*key, seed=0)
            self.groups.setdefault(key, Group(place, [])).rows.append(row)

    def names(self, dimension: str) -> list[Any]:
        """Return what occurs along a dimension, in the study's order; of budgets its own alone."""
        if dimension == "ipc":
            return [ipc for ipc in self.budgets if any(key[2] == ipc for key in self.groups)]
        place = DIMENSIONS.index(dimension)
        return list(dict.fromkeys(key[place] for key in self.groups))

    def group(self, source: str, method: str, ipc: int, backbone: str) -> Group | None:
        """Return the students at a place; full data stands at every budget."""
        return self.groups.get((source, method, 0 if method == "full" else ipc, backbone))

    def score(self, metric: str, source: str, method: str, ipc: int, backbone: str) -> Score | None:
        """Return one number of one place with its interval over syntheses (or draws), or None."""
        if metric not in METRICS:
            raise UsageError(f"found no metric {metric!r}: {nearest(metric, METRICS)}")
        found = self.group(source, method, ipc, backbone)
        if found is None:
            return None
        if metric in ("gap_closed", "gap_closed_auc"):
            return self._gap(found, "auc" if metric.endswith("auc") else "accuracy")
        if metric == "worth":
            return self._worth(found)
        known = [x for x in found.scores(metric) if math.isfinite(x)]
        return score(known) if known else None

    def _gap(self, found: Group, metric: str) -> Score | None:
        if found.place.method in BASELINES:
            return None
        source, _, ipc, backbone, _ = found.place
        arms = [self.group(source, name, ipc, backbone) for name in BASELINES]
        if None in arms:
            return None
        return gap_closed(found.scores(metric), *(arm.scores(metric) for arm in arms if arm))

    def gap(self, source: str, ipc: int, backbone: str) -> float:
        """Return how far full data is above random images in accuracy; nan if one is not there."""
        arms = [self.score("accuracy", source, name, ipc, backbone) for name in BASELINES]
        random, full = (math.nan if one is None else one.mean for one in arms)
        return full - random

    def changed(self) -> list[str]:
        """Return the sources whose cells were not all made of the same data."""
        seen: dict[str, set[str]] = {}
        for row in (row for group in self.groups.values() for row in group.rows):
            seen.setdefault(row["source"], set()).add(row["data_digest"])
        return [source for source, digests in seen.items() if len(digests) > 1]

    def made_by(self) -> list[str]:
        """Return by which versions and on which kinds of device the cells were made."""
        rows = (row for group in self.groups.values() for row in group.rows)
        return sorted({f"version {row['version']} on {row['device']}" for row in rows})

    def curve(self, source: str, backbone: str, metric: str = "accuracy") -> dict[int, Score]:
        """Return the scores of random images by their number per class."""
        found = {
            key[2]: score(group.scores(metric))
            for key, group in self.groups.items()
            if key[:2] == (source, "random") and key[3] == backbone
        }
        return dict(sorted(found.items()))

    def _worth(self, found: Group) -> Score | None:
        if found.place.method in BASELINES:
            return None
        curve = self.curve(found.place.source, found.place.backbone)
        return worth_of(score(found.scores("accuracy")), curve)


@dataclass(frozen=True)
class Table:
    """A table of scores: heads of its rows and columns, and cells row by row."""

    corner: tuple[str, ...]
    columns: tuple[str, ...]
    lines: tuple[tuple[tuple[str, ...], tuple[Score | None, ...]], ...]
    metric: str


def table(
    book: Book,
    *,
    rows: Sequence[str] = ("source", "ipc"),
    columns: Sequence[str] = ("method",),
    metric: str = "accuracy",
    fixed: Mapping[str, str] | None = None,
) -> Table:
    """Return a table of one metric; what is neither in `rows` nor `columns` nor fixed joins rows.

    Raises: UsageError when a dimension or metric is unknown, a dimension stands twice, or `fixed`
    names what is not there.
    """
    for name in (*rows, *columns, *(fixed or {})):
        if name not in DIMENSIONS:
            raise UsageError(f"found no dimension {name!r}: {nearest(name, DIMENSIONS)}")
        if [*rows, *columns].count(name) > 1:
            raise UsageError(f"found {name} twice in rows and columns; expected it once")
    choices: dict[str, list[Any]] = {}
    for name in DIMENSIONS:
        choices[name] = book.names(name)
        if fixed and name in fixed:
            choices[name] = [one for one in choices[name] if str(one) == fixed[name]]
            if not choices[name]:
                raise UsageError(
                    f"found no {name} {fixed[name]} in the study: "
                    f"{nearest(fixed[name], map(str, book.names(name)))}"
                )
    free = [n for n in DIMENSIONS if n not in (*rows, *columns) and len(choices[n]) > 1]
    down = [*rows, *free]
    lines = []
    across = list(itertools.product(*(choices[name] for name in columns)))
    for head in itertools.product(*(choices[name] for name in down)):
        cells = []
        for top in across:
            place = {n: c[0] for n, c in choices.items() if n not in (*down, *columns)}
            place |= dict(zip((*down, *columns), (*head, *top), strict=True))
            cells.append(book.score(metric, **place))
        if any(cell is not None for cell in cells):
            lines.append((tuple(map(str, head)), tuple(cells)))
    heads = tuple(" ".join(map(str, top)) for top in across)
    return Table(tuple(down), heads, tuple(lines), metric)
