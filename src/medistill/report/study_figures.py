"""What a study's page draws: learning curves, variation, the indicator, cost; traces for plotly."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..formats import text_of
from ..indicator import LEAST, Example, afar, conformal, having, reached_by
from ..metrics import Score
from ..plan import BASELINES
from ..records import Json
from ..tabulate import Book

SYMBOLS = (
    *("circle", "square", "diamond", "cross", "triangle-up", "star", "x", "pentagon", "hexagon"),
)
TONES = 9  # colors that the page has for methods
MOST_GAP = 1.5  # shares of the gap that a figure shows; marks beyond lie on its edge
LEAST_GAP = 0.05  # of accuracy, between random images and full data


def tone(number: int) -> str:
    """Return the name of a method's color."""
    return f"m{number % TONES}"


def _trace(
    name: str, number: int, points: Sequence[tuple[float | str, float, str]], **more: Any
) -> Json:
    """Return marks of one method; texts are escaped, for plotly reads a small HTML."""
    return {
        "x": [x for x, _, _ in points],
        "y": [y for _, y, _ in points],
        "text": [html.escape(text) for _, _, text in points],
        "name": html.escape(name),
        "arm": tone(number),
        "mode": "markers",
        "hoverinfo": "name+text",
        "marker": {"symbol": SYMBOLS[number % len(SYMBOLS)], "size": 9},
        **more,
    }


def _error(scores: Sequence[Score]) -> Json:
    over = [100 * ((s.mean if s.high is None else s.high) - s.mean) for s in scores]
    under = [100 * (s.mean - (s.mean if s.low is None else s.low)) for s in scores]
    return {"type": "data", "symmetric": False, "array": over, "arrayminus": under}


def _sizes(sizes: Sequence[int]) -> Json:
    """Return a logarithmic axis of images per class with its sizes spelled out."""
    ticks = sorted(set(sizes))
    return {"type": "log", "tickvals": ticks, "ticktext": [str(size) for size in ticks]}


def curve_figure(book: Book, source: str, backbone: str, methods: Sequence[str]) -> Json | None:
    """Draw one source: random images by their number, methods at their budgets, full data."""
    curve = book.curve(source, backbone)
    if not curve:
        return None
    scores = list(curve.values())
    traces = [
        {
            "x": list(curve),
            "y": [100 * one.mean for one in scores],
            "error_y": _error(scores),
            "text": [
                f"{size} per class: {text_of(one, 'accuracy')}" for size, one in curve.items()
            ],
            "hoverinfo": "name+text",
            "name": "random images",
            "arm": "random",
            "mode": "lines+markers",
            "marker": {"symbol": "diamond-open", "size": 8},
        }
    ]
    full = book.score("accuracy", source, "full", 0, backbone)
    if full is not None:
        ends = [min(curve), max(curve)]
        flat = {"x": ends, "y": [100 * full.mean] * 2, "name": "full data", "arm": "full"}
        traces.append({**flat, "mode": "lines", "line": {"dash": "dash"}})
    for number, method in enumerate(methods):
        scored = {i: book.score("accuracy", source, method, i, backbone) for i in book.budgets}
        known = [(ipc, one) for ipc, one in scored.items() if one is not None]
        points = [
            (float(ipc), 100 * one.mean, f"{ipc} per class: {text_of(one, 'accuracy')}")
            for ipc, one in known
        ]
        if points:
            traces.append(_trace(method, number, points, error_y=_error([one for _, one in known])))
    layout = {
        "xaxis": {"title": {"text": "images per class"}, **_sizes([*curve, *book.budgets])},
        "yaxis": {"title": {"text": "test accuracy, percent"}},
    }
    return {"traces": traces, "layout": layout}


def gap_figure(
    book: Book,
    at: Mapping[str, float] | Mapping[str, str],
    ipc: int,
    methods: Sequence[str],
    axis: Json,
) -> Json | None:
    """Draw the gap closed by each method against a number of each source, or its group.

    Sources where full data is less than 0.05 above random images have no gap to speak of, and are
    left out.
    """
    backbone = book.names("backbone")[0]
    traces = []
    for number, method in enumerate(methods):
        points, scores = [], []
        for source, x in at.items():
            own = book.score("gap_closed", source, method, ipc, backbone)
            if own is not None and book.gap(source, ipc, backbone) >= LEAST_GAP:
                beyond = " (beyond the figure)" if abs(own.mean) > MOST_GAP else ""
                y = 100 * max(-MOST_GAP, min(MOST_GAP, own.mean))
                at_ = x if isinstance(x, str) else f"at {x:.3g}"
                closed = text_of(own, "gap_closed")
                points.append((x, y, f"{source} ({at_}): {closed}%{beyond}"))
                scores.append(own)
        if points:
            traces.append(_trace(method, number, points, error_y=_error(scores)))
    if not traces:
        return None
    layout = {
        "xaxis": axis,
        "yaxis": {"title": {"text": "gap closed, percent"}, "zeroline": True, "range": [-160, 160]},
    }
    return {"traces": traces, "layout": layout}


def cost_figure(book: Book, ipc: int, backbone: str, methods: Sequence[str]) -> Json | None:
    """Draw mean gain over random images against median seconds of distillation."""
    traces = []
    for number, method in enumerate(methods):
        gains, spent = [], []
        for source in book.names("source"):
            own = book.score("accuracy", source, method, ipc, backbone)
            base = book.score("accuracy", source, "random", ipc, backbone)
            time = book.score("distill_seconds", source, method, ipc, backbone)
            if own is not None and base is not None and time is not None:
                gains.append(100 * (own.mean - base.mean))
                spent.append(max(time.mean, 0.1))
        if gains:
            seconds, gain = float(np.median(spent)), float(np.mean(gains))
            text = f"{gain:+.1f} points, {seconds:.0f} s, {len(gains)} sources"
            traces.append(_trace(method, number, [(seconds, gain, text)]))
    if not traces:
        return None
    layout = {
        "xaxis": {"title": {"text": "seconds of distillation"}, "type": "log"},
        "yaxis": {"title": {"text": "points above random images"}},
    }
    return {"traces": traces, "layout": layout}


def indicator_figure(
    examples: Sequence[Example], ipc: int, methods: Sequence[str], candidate: str
) -> Json | None:
    """Draw predicted against reached accuracy, each dataset predicted by other families alone."""
    traces = []
    for number, method in enumerate(methods):
        known = having(examples, method, ipc)
        if len(known) < LEAST:
            continue
        target = reached_by(known, method, ipc, "accuracy")
        found = afar(known, candidate, method, ipc, "accuracy")
        points = [
            (100 * x, 100 * y, f"{one.source}: {100 * x:.1f} told, {100 * y:.1f} reached")
            for one, x, y in zip(known, found.tolist(), target.tolist(), strict=True)
            if math.isfinite(x)
        ]
        half = 100 * conformal(np.abs(target - found))
        # Thin and without caps: hundreds of them lie over each other.
        within = {"type": "data", "array": [half] * len(points), "width": 0, "thickness": 0.5}
        traces.append(_trace(method, number, points, error_x=within))
    if not traces:
        return None
    line = {"x": [0, 100], "y": [0, 100], "mode": "lines", "name": "equal", "arm": "full"}
    layout = {
        "xaxis": {
            "title": {"text": "accuracy predicted by other families of datasets, percent"},
            "range": [0, 105],
        },
        "yaxis": {"title": {"text": "accuracy reached, percent"}},
    }
    return {"traces": [{**line, "line": {"dash": "dot", "width": 1}}, *traces], "layout": layout}


def heat(book: Book, ipc: int, backbone: str, methods: Sequence[str]) -> list[Json]:
    """Return rows of a heat map: points above random images, method by method, with their shade.

    The shade runs from -1 (20 points below) to 1 (20 above).
    """
    rows = []
    for source in book.names("source"):
        base = book.score("accuracy", source, "random", ipc, backbone)
        cells: list[Json | None] = []
        for method in methods:
            own = book.score("accuracy", source, method, ipc, backbone)
            if own is None or base is None:
                cells.append(None)
                continue
            gain = 100 * (own.mean - base.mean)
            cells.append({"gain": f"{gain:+.1f}", "shade": round(max(-1, min(1, gain / 20)), 3)})
        if any(cells):
            rows.append({"source": source, "cells": cells})
    return rows


def methods_of(book: Book) -> list[str]:
    """Return the methods of a study without the baselines."""
    return [name for name in book.names("method") if name not in BASELINES]
