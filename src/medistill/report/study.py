"""One study into one page that needs nothing else: no network, no other file."""

import base64
import math
import shlex
from pathlib import Path

from .. import __version__
from ..formats import text_of
from ..indicator import SEED
from ..metrics import Score
from ..records import Json, to_record, write_atomic
from ..tabulate import Book
from .page import filled, library, part
from .paper import short_runs, unlike
from .paper_answers import claim
from .paper_variation import by_variation
from .study_figures import (
    cost_figure,
    curve_figure,
    gap_figure,
    heat,
    indicator_figure,
    tone,
)
from .study_opened import Opened
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
FISHER = {"title": {"text": "spread between over within classes (Fisher)"}, "type": "log"}
DESIGN = {
    "title": {"text": "variation of the phantom, all else the same"},
    "range": [-0.05, 1.05],
}
GROUP = {"title": {"text": "kind of source"}, "type": "category"}
SHEETS_AT = (1, 10)  # images per class; more make no picture to look at


def study_report(found: Opened, out: Path) -> None:
    """Write one self-contained HTML page about a study.

    Raises: UsageError when the report extra is not installed; RunRefused when `out` cannot be
    written.
    """
    write_atomic(out, render_study(found).encode())


def render_study(found: Opened) -> str:
    """Return the page as text; the same folder gives the same text.

    Raises: UsageError when the report extra is not installed.
    """
    study, book, methods, backbone = found.study, found.book, found.methods, found.backbone
    told, warned = findings(book, backbone, found.states)
    told += [*unlike(found), *short_runs(found), *by_variation(found)]
    if found.indicator is not None:
        told += claim(found.indicator)
    figures = figures_of(found)
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
        "figures": figures,
        "best": found.best,
        "sheets": _sheets(found),
        "protocol": pairs(to_record(study.protocol)),
        "place": shlex.quote(str(found.folder.path)),
        "style": part("page.css") + part("study.css"),
        "script": part("plots.js") + part("study.js"),
        "library": library() if figures else "",
        "version": __version__,
    }
    return filled("study.html.j2", context)


def figures_of(found: Opened) -> dict[str, Json]:
    """Return all figures of a study by name, without those for which too few cells are done."""
    study, book, methods, backbone = found.study, found.book, found.methods, found.backbone
    figures: dict[str, Json | None] = {}
    for number, source in enumerate(book.names("source")):
        figures[f"curve-{number}"] = curve_figure(book, source, backbone, methods)
    fisher = {source: one["variation"]["fisher"] for source, one in found.measured.items()}
    spread = {source: x for source, x in fisher.items() if 0 < x < math.inf}
    designed = {one.title: one.variation for one in study.sources if one.variation is not None}
    groups = {one.title: one.group for one in study.sources if one.group}
    for ipc in book.names("ipc"):
        figures[f"variation-{ipc}"] = gap_figure(book, spread, ipc, methods, FISHER)
        figures[f"design-{ipc}"] = gap_figure(book, designed, ipc, methods, DESIGN)
        figures[f"groups-{ipc}"] = gap_figure(book, groups, ipc, methods, GROUP)
        figures[f"cost-{ipc}"] = cost_figure(book, ipc, backbone, methods)
        for name, candidate in (("seed", SEED), ("indicator", found.best)):
            figures[f"{name}-{ipc}"] = indicator_figure(found.examples, ipc, methods, candidate)
    return {name: figure for name, figure in figures.items() if figure is not None}


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


def _sheets(study: Opened) -> list[Json]:
    """Return picture sheets, the smallest budgets first, as many as a page should hold."""
    found: list[Json] = []
    spent = 0
    for ipc in SHEETS_AT:
        for place, cell, _ in study.entries:
            if place.ipc != ipc or cell.kind != "method" or place.seed:
                continue
            sheet = study.folder.sheet(cell.key)
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
