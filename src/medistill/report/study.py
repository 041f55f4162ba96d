"""One study into one page that needs nothing else: no network, no other file."""

import base64
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from .. import __version__
from ..indicator import LEAST, SEED, examples_of
from ..metrics import Score
from ..records import Json, to_record, write_atomic
from ..study import Entry, Folder, entries_of, grid, measured_in
from ..tabulate import Book, rows_of, text_of
from .page import filled, library, part
from .study_figures import (
    cost_figure,
    curve_figure,
    heat,
    indicator_figure,
    methods_of,
    tone,
    variation_figure,
)
from .study_words import findings
from .tables import pairs

SHOWN = ("accuracy", "balanced_accuracy", "auc", "gap_closed", "worth", "distill_seconds")
TITLES = {
    "accuracy": "Accuracy",
    "balanced_accuracy": "Balanced accuracy",
    "auc": "AUC (macro)",
    "gap_closed": "Gap closed",
    "worth": "Worth in random images per class",
    "distill_seconds": "Seconds of distillation",
}
MOST_SHEETS = 8 * 2**20  # bytes of pictures in a page
SHEETS_AT = (1, 10)  # images per class; more make no picture to look at


def study_report(path: Path, out: Path) -> None:
    """Write one self-contained HTML page about the study in the folder `path`.

    Raises: DataError when `path` is no study folder or a cell in it is damaged; UsageError when the
    report extra is not installed; RunRefused when `out` cannot be written.
    """
    write_atomic(out, render_study(Folder(path)).encode())


def render_study(folder: Folder) -> str:
    """Return the page as text; the same folder gives the same text.

    Raises: UsageError when the report extra is not installed.
    """
    study = folder.study()
    entries = entries_of(folder, grid(study))
    rows, measured = rows_of(study, entries), measured_in(entries)
    book, states = Book(rows, study.budgets), Counter(one.state for one in entries)
    backbone = study.backbones[0]
    methods = methods_of(book)
    told, warned = findings(book, backbone, states)
    named = examples_of([row for row in rows if row["backbone"] == backbone], measured)
    figures: dict[str, Json | None] = {}
    for number, source in enumerate(book.names("source")):
        figures[f"curve-{number}"] = curve_figure(book, source, backbone, methods)
    for ipc in book.names("ipc"):
        figures[f"variation-{ipc}"] = variation_figure(book, measured, ipc, backbone, methods)
        figures[f"cost-{ipc}"] = cost_figure(book, ipc, backbone, methods)
        figures[f"indicator-{ipc}"] = (
            indicator_figure(named, ipc, methods, SEED) if len(named) >= LEAST else None
        )
    known = {name: figure for name, figure in figures.items() if figure is not None}
    context = {
        "title": f"{study.name}: distillation on {len(book.names('source'))} datasets",
        "study": study,
        "told": told,
        "warnings": warned,
        "methods": methods,
        "tones": {method: tone(number) for number, method in enumerate(methods)},
        "sources": book.names("source"),
        "budgets": book.names("ipc"),
        "tables": [_table(book, metric, backbone, methods) for metric in SHOWN],
        "heats": {ipc: heat(book, ipc, backbone, methods) for ipc in book.names("ipc")},
        "figures": known,
        "sheets": _sheets(entries, folder),
        "protocol": pairs(to_record(study.protocol)),
        "place": str(folder.path.name),
        "style": part("page.css") + part("study.css"),
        "script": part("plots.js") + part("study.js"),
        "library": library() if known else "",
        "version": __version__,
    }
    return filled("study.html.j2", context)


def _table(book: Book, metric: str, backbone: str, methods: list[str]) -> Json:
    """Return one metric's table: a line for each source and budget, the best method marked."""
    columns = [*methods, "random", "full"]
    if metric not in ("accuracy", "balanced_accuracy", "auc"):
        columns = methods
    lines = []
    for ipc in book.names("ipc"):
        for source in book.names("source"):
            scores = [book.score(metric, source, name, ipc, backbone) for name in columns]
            if any(scores):
                cells = [_cell(found, metric) for found in scores]
                best = _best(scores[: len(methods)], metric)
                if best is not None:
                    cells[best]["best"] = True
                lines.append({"source": source, "ipc": ipc, "cells": cells})
    return {"metric": metric, "title": TITLES[metric], "columns": columns, "lines": lines}


def _cell(found: Score | None, metric: str) -> Json:
    mean, _, within = text_of(found, metric).partition(" ")
    value = "" if found is None else repr(found.mean if math.isfinite(found.mean) else 1e9)
    return {"mean": mean, "within": within.strip("[]"), "value": value, "best": False}


def _best(scores: list[Score | None], metric: str) -> int | None:
    """Return the place of the best mean where it is alone; of seconds none is best."""
    known = [(found.mean, place) for place, found in enumerate(scores) if found is not None]
    if metric == "distill_seconds" or len(known) < 2:
        return None
    top = max(known)
    return top[1] if sum(mean == top[0] for mean, _ in known) == 1 else None


def _sheets(entries: Sequence[Entry], folder: Folder) -> list[Json]:
    """Return picture sheets, the smallest budgets first, as many as a page should hold."""
    found: list[Json] = []
    spent = 0
    for ipc in SHEETS_AT:
        for place, cell, _ in entries:
            if place.ipc != ipc or cell.kind != "method" or place.seed:
                continue
            sheet = folder.sheet(cell.key)
            if sheet is None or spent + len(sheet) > MOST_SHEETS:
                continue
            spent += len(sheet)
            found.append(
                {
                    "source": place.source,
                    "method": place.method,
                    "ipc": ipc,
                    "png": base64.b64encode(sheet).decode(),
                }
            )
    return found
