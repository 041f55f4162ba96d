"""The figures of a study's page as files for papers: the same traces, drawn by matplotlib."""

import html
import io
import re
from pathlib import Path
from typing import Any, Literal

from ..errors import RunRefused, UsageError
from ..records import Json, write_atomic
from .page import part
from .study import figures_of
from .study_figures import heat
from .study_opened import Opened

Form = Literal["svg", "pdf", "png"]
LIGHT = part("study.css").partition("@media")[0]
ARMS = dict(re.findall(r"--(\w+): (#\w{6});", LIGHT))
MARKS = {
    "circle": "o",
    "square": "s",
    "diamond": "D",
    "diamond-open": "D",
    "cross": "P",
    "triangle-up": "^",
    "star": "*",
    "x": "X",
    "pentagon": "p",
    "hexagon": "h",
}
DASHES = {"solid": "-", "dash": "--", "dot": ":"}


def study_prints(study: Opened, to: Path, form: Form = "pdf") -> list[Path]:
    """Write every figure of a study as a file of its own, and say which.

    The same folder gives the same bytes: no date and no random name is written.
    Raises: UsageError when the report extra is not installed; RunRefused when a file cannot be
    written, or no cell is done.
    """
    drawn = {name: _drawn(figure) for name, figure in figures_of(study).items()}
    for ipc in study.book.names("ipc"):
        if gains := heat(study.book, ipc, study.backbone, study.methods):
            drawn[f"gains-{ipc}"] = _map(gains, study.methods, ipc)
    if not drawn:
        raise RunRefused(
            f"found no finished cell in {study.folder.path}; expected some: run more of the study"
        )
    written = []
    for name, figure in drawn.items():
        target = to / f"{name}.{form}"
        write_atomic(target, _bytes(figure, form))
        written.append(target)
    return written


def _pyplot() -> Any:
    """Return matplotlib's object interface, which keeps no global state.

    Raises: UsageError when the report extra is not installed.
    """
    try:
        from matplotlib import figure, rcParams
    except ImportError:
        raise UsageError(
            "found no matplotlib; expected the report extra: pip install 'medistill[report]'"
        ) from None
    rcParams["svg.hashsalt"] = "medistill"  # else names in the file are random
    rcParams["svg.fonttype"] = "none"
    rcParams["pdf.fonttype"] = 42
    return figure


def _bytes(figure: Any, form: Form) -> bytes:
    out = io.BytesIO()
    dates: dict[str, Any] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}
    figure.savefig(out, format=form, bbox_inches="tight", metadata=dates[form])
    return out.getvalue()


def _drawn(figure: Json) -> Any:
    """Draw traces and layout as the page's library does."""
    made = _pyplot().Figure(figsize=(5.2, 3.6), dpi=150)
    axes = made.add_subplot()
    for trace in figure["traces"]:
        _draw(axes, trace)
    for axis, name in ((axes.xaxis, "xaxis"), (axes.yaxis, "yaxis")):
        said = figure["layout"].get(name, {})
        axis.set_label_text(said.get("title", {}).get("text", ""))
        if said.get("type") == "log":
            (axes.set_xscale if name == "xaxis" else axes.set_yscale)("log")
        if "tickvals" in said:
            axis.set_ticks(said["tickvals"], said["ticktext"])
            axis.set_ticks([], minor=True)
        if "range" in said:
            (axes.set_xlim if name == "xaxis" else axes.set_ylim)(said["range"])
        if said.get("zeroline"):
            axes.axhline(0, color="#999999", linewidth=0.6, zorder=0)
    axes.grid(color="#e3e6ea", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    made.legend(loc="outside right upper", fontsize=7, frameon=False)
    made.set_layout_engine("constrained")
    return made


def _draw(axes: Any, trace: Json) -> None:
    marker, color = trace.get("marker", {}), ARMS[trace["arm"]]
    symbol = marker.get("symbol", "circle")
    mode = trace.get("mode", "markers")
    line = trace.get("line", {})
    axes.errorbar(
        trace["x"],
        trace["y"],
        xerr=_bars(trace.get("error_x")),
        yerr=_bars(trace.get("error_y")),
        label=_shown(trace["name"]),
        color=color,
        marker=MARKS[symbol] if "markers" in mode else "",
        markersize=4,
        markerfacecolor="white" if symbol.endswith("open") else color,
        linestyle=DASHES[line.get("dash", "solid")] if "lines" in mode else "",
        linewidth=line.get("width", 1.2),
        elinewidth=trace.get("error_x", {}).get("thickness", 0.6),
        alpha=0.9,
    )


def _shown(name: str) -> str:
    """Return a name as matplotlib prints it letter by letter; the page's names are HTML."""
    return html.unescape(name).replace("$", r"\$")


def _bars(error: Json | None) -> Any:
    if error is None:
        return None
    return [error.get("arrayminus", error["array"]), error["array"]]


def _map(rows: list[Json], methods: list[str], ipc: int) -> Any:
    """Draw the heat map of gains: blue above random images, orange below."""
    from matplotlib.colors import LinearSegmentedColormap

    made = _pyplot().Figure(figsize=(1.6 + 0.62 * len(methods), 0.8 + 0.24 * len(rows)), dpi=150)
    axes = made.add_subplot()
    nan = float("nan")
    shades = [[nan if cell is None else cell["shade"] for cell in row["cells"]] for row in rows]
    colors = LinearSegmentedColormap.from_list("gain", ["#d55e00", "#ffffff", "#0072b2"])
    axes.imshow(shades, cmap=colors, vmin=-1.6, vmax=1.6, aspect="auto")
    for y, row in enumerate(rows):
        for x, cell in enumerate(row["cells"]):
            axes.text(x, y, cell["gain"] if cell else "-", ha="center", va="center", fontsize=7)
    axes.set_xticks(
        range(len(methods)), [*map(_shown, methods)], fontsize=7, rotation=30, ha="right"
    )
    axes.set_yticks(range(len(rows)), [_shown(row["source"]) for row in rows], fontsize=7)
    axes.set_title(f"Points of accuracy above random images, {ipc} per class", fontsize=8)
    axes.tick_params(length=0)
    made.set_layout_engine("constrained")
    return made
