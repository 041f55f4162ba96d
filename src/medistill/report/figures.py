"""What the page draws: traces for plotly as plain JSON, and confusion matrices as tables.

Colors are left to the page, which knows whether it is light or dark; a trace names its arm.
"""

import html
import math
from typing import Any

from ..records import Json
from .words import ARMS, arm_score, finite, interval, percent

METRICS = {
    "accuracy": "Accuracy",
    "balanced_accuracy": "Balanced accuracy",
    "auc": "AUC (macro)",
    "f1": "F1 (macro)",
    "kappa": "Quadratic kappa",
    "ece": "Calibration error (ECE)",
}
LOWER_IS_BETTER = ("ece",)
SYMBOL = {"synthetic": "circle", "random": "diamond", "full": "square"}
DASHES = ("solid", "dash", "longdash", "dashdot")  # one per backbone
MOST_POINTS = 800  # more do not show on a page, and would make it heavy


def scores_figure(evaluation: Json) -> Json | None:
    """Draw each arm's scores as dots with their intervals, one line per metric, in percent."""
    shown = [
        name
        for name in METRICS
        if name not in LOWER_IS_BETTER and any(arm_score(evaluation, arm, name) for arm in ARMS)
    ]
    traces = [_dots(evaluation, arm, place, shown) for place, arm in enumerate(ARMS)]
    traces = [trace for trace in traces if trace["x"]]
    if not traces:
        return None
    ticks = {"tickvals": list(range(len(shown))), "ticktext": [METRICS[name] for name in shown]}
    down = [len(shown) - 0.5, -0.5]
    return {
        "traces": traces,
        "layout": {"xaxis": {"title": {"text": "percent"}}, "yaxis": {**ticks, "range": down}},
    }


def _dots(evaluation: Json, arm: str, place: int, shown: list[str]) -> Json:
    trace: Json = {"x": [], "y": [], "text": []}
    over: list[float] = []
    under: list[float] = []
    for line, name in enumerate(shown):
        found = arm_score(evaluation, arm, name)
        if found is None:
            continue
        trace["x"].append(100 * found.mean)
        trace["y"].append(line + 0.2 * (place - 1))
        trace["text"].append(
            f"{METRICS[name]}: {percent(found.mean)}, interval {interval(found) or '-'}"
        )
        over.append(100 * (found.mean if found.high is None else found.high) - trace["x"][-1])
        under.append(trace["x"][-1] - 100 * (found.mean if found.low is None else found.low))
    error = {"type": "data", "symmetric": False, "array": over, "arrayminus": under}
    marker = {"symbol": SYMBOL[arm], "size": 10}
    kind = {"mode": "markers", "hoverinfo": "name+text", "name": arm, "arm": arm}
    return {**trace, **kind, "marker": marker, "error_x": error}


def loss_figure(log: list[Json]) -> Json | None:
    """Draw the distillation loss against the step, block means where there are many steps."""
    points = [(row["step"], finite(row.get("loss"))) for row in log if "step" in row]
    known = [(step, loss) for step, loss in points if loss is not None]
    if not known:
        return None
    size = -(-len(known) // MOST_POINTS)
    blocks = [known[i : i + size] for i in range(0, len(known), size)]
    losses = [sum(loss for _, loss in block) / len(block) for block in blocks]
    trace = {
        "x": [block[-1][0] for block in blocks],
        "y": losses,
        "name": "loss",
        "arm": "synthetic",
        "mode": "lines" if len(blocks) > 1 else "markers",
    }
    wide = min(losses) > 0 and max(losses) > 20 * min(losses)
    layout = {
        "xaxis": {"title": {"text": "step"}},
        "yaxis": {"title": {"text": "loss"}, **(_log_axis(losses) if wide else {})},
        "showlegend": False,
    }
    return {"traces": [trace], "layout": layout, "block": size}


def _log_axis(values: list[float]) -> Json:
    """Return a logarithmic axis with its ticks spelled out (plotly shortens 20 to 2)."""
    powers = range(math.floor(math.log10(min(values))), math.ceil(math.log10(max(values))) + 1)
    digits = (1, 2, 5) if len(powers) <= 3 else (1,)
    ticks = [float(f"{digit}e{power}") for power in powers for digit in digits]
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}


def pilots_figure(evaluation: Json) -> Json | None:
    """Draw validation accuracy against the step: chosen rates as lines, the others thin, dotted."""
    pilots = evaluation.get("pilots") or []
    backbones = list(dict.fromkeys(str(pilot.get("backbone")) for pilot in pilots))
    # Those drawn last lie above: the chosen ones.
    ordered = sorted(pilots, key=lambda pilot: bool(pilot.get("chosen")))
    traces = [trace for pilot in ordered if (trace := _pilot(pilot, backbones)) is not None]
    if not traces:
        return None
    layout = {
        "xaxis": {"title": {"text": "step"}},
        "yaxis": {"title": {"text": "accuracy, percent"}},
    }
    return {"traces": traces, "layout": layout}


def _pilot(pilot: Json, backbones: list[str]) -> Json | None:
    points = [(p.get("step"), finite(p.get("accuracy"))) for p in pilot.get("curve") or []]
    known = [(step, 100 * value) for step, value in points if value is not None]
    if not known:
        return None
    arm, chosen, backbone = str(pilot.get("arm")), bool(pilot.get("chosen")), pilot.get("backbone")
    dash = DASHES[backbones.index(str(backbone)) % len(DASHES)]
    # plotly reads a small HTML in names, so they are escaped as the page's own text is.
    name = html.escape(f"{arm}, {backbone}" if len(backbones) > 1 else arm)
    return {
        "x": [step for step, _ in known],
        "y": [value for _, value in known],
        "name": name,
        "text": html.escape(f"rate {pilot.get('lr')}"),
        "arm": arm if arm in ARMS else "full",
        "mode": "lines+markers" if chosen else "lines",
        "marker": {"symbol": SYMBOL.get(arm, "square"), "size": 7},
        "line": {"width": 2.5, "dash": dash} if chosen else {"width": 1, "dash": "dot"},
        "opacity": 1.0 if chosen else 0.55,
        "showlegend": chosen,
    }


def confusions(evaluation: Json, classes: list[str]) -> list[Json]:
    """Add up each arm's confusion matrices and divide every true class by its total.

    Returns: one {"arm", "trainings", "rows": [{"name", "cells": [{"share", "count"}]}]} per arm.
    """
    tables = []
    for arm in ARMS:
        found = [
            row["confusion"]
            for row in evaluation.get("rows") or []
            if row.get("arm") == arm and _square(row.get("confusion"), len(classes))
        ]
        if found:
            size = range(len(classes))
            total = [[sum(one[i][j] for one in found) for j in size] for i in size]
            rows = [
                {"name": name, "cells": [_cell(count, sum(line)) for count in line]}
                for name, line in zip(classes, total, strict=True)
            ]
            tables.append({"arm": arm, "trainings": len(found), "rows": rows})
    return tables


def _square(matrix: Any, size: int) -> bool:
    """Say whether a matrix is one of counts: several labels have a table for each instead."""
    return (
        isinstance(matrix, list)
        and [len(line) for line in matrix] == [size] * size
        and all(isinstance(count, int | float) for line in matrix for count in line)
    )


def _cell(count: float, total: float) -> Json:
    return {"share": count / total if total else 0.0, "count": count}
