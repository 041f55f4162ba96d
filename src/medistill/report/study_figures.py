"""What a study's page draws: learning curves, variation, the indicator, cost; traces for plotly."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..indicator import CANDIDATES, LEAST, Example, inputs_of, left_out
from ..metrics import Score
from ..records import Json
from ..study import BASELINES
from ..tabulate import Book

SYMBOLS = (
    *("circle", "square", "diamond", "cross", "triangle-up", "star", "x", "pentagon", "hexagon"),
)
TONES = 9  # colors that the page has for methods


def tone(number: int) -> str:
    """Return the name of a method's color."""
    return f"m{number % TONES}"


def _trace(name: str, number: int, points: Sequence[tuple[float, float, str]], **more: Any) -> Json:
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
            (float(ipc), 100 * one.mean, f"{ipc} per class: {100 * one.mean:.1f}")
            for ipc, one in known
        ]
        if points:
            traces.append(_trace(method, number, points, error_y=_error([one for _, one in known])))
    layout = {
        "xaxis": {"title": {"text": "images per class"}, **_sizes([*curve, *book.budgets])},
        "yaxis": {"title": {"text": "test accuracy, percent"}},
    }
    return {"traces": traces, "layout": layout}


def variation_figure(
    book: Book, measured: Mapping[str, Json], ipc: int, backbone: str, methods: Sequence[str]
) -> Json | None:
    """Draw the gain over random images against how far classes lie apart, source by source."""
    traces = []
    for number, method in enumerate(methods):
        points = []
        for source, numbers in measured.items():
            own = book.score("accuracy", source, method, ipc, backbone)
            base = book.score("accuracy", source, "random", ipc, backbone)
            fisher = numbers["variation"]["fisher"]
            if own is not None and base is not None and 0 < fisher < math.inf:
                gain = 100 * (own.mean - base.mean)
                points.append((fisher, gain, f"{source}: {gain:+.1f} points"))
        if points:
            traces.append(_trace(method, number, points))
    if not traces:
        return None
    layout = {
        "xaxis": {"title": {"text": "spread between over within classes (Fisher)"}, "type": "log"},
        "yaxis": {"title": {"text": "points above random images"}, "zeroline": True},
    }
    return {"traces": traces, "layout": layout}


def cost_figure(book: Book, ipc: int, backbone: str, methods: Sequence[str]) -> Json | None:
    """Draw mean gain over random images against mean seconds of distillation."""
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
            seconds, gain = float(np.mean(spent)), float(np.mean(gains))
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
    """Draw predicted against reached accuracy, each dataset predicted by the others alone."""
    names, model = CANDIDATES[candidate]
    traces = []
    for number, method in enumerate(methods):
        known = [one for one in examples if ipc in one.reached.get(method, {})]
        if len(known) < LEAST:
            continue
        inputs = [inputs_of(one.measured, ipc, "accuracy") for one in known]
        table = np.array([[found[name] for name in names] for found in inputs])
        target = np.array([one.reached[method][ipc]["accuracy"] for one in known])
        found = left_out(model, table, target)
        points = [
            (
                100 * float(x),
                100 * float(y),
                f"{one.source}: {100 * x:.1f} told, {100 * y:.1f} reached",
            )
            for one, x, y in zip(known, found, target, strict=True)
        ]
        traces.append(_trace(method, number, points))
    if not traces:
        return None
    line = {"x": [0, 100], "y": [0, 100], "mode": "lines", "name": "equal", "arm": "full"}
    layout = {
        "xaxis": {"title": {"text": "accuracy predicted by the other datasets, percent"}},
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
