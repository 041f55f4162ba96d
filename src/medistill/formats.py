"""Tables as text: Markdown, CSV, LaTeX, HTML, JSON."""

import csv
import html
import io
import math
from collections.abc import Callable, Sequence

from .metrics import Score
from .records import Json
from .tabulate import PERCENT, Table


def text_of(found: Score | None, metric: str, between: str = ", ") -> str:
    """Return a score as tables print it: `mean [low, high]`, in percent where it is a share.

    Example:
        >>> text_of(Score(0.83, 0.812, 0.848, 5), "accuracy")
        '83.0 [81.2, 84.8]'
    """
    if found is None:
        return ""
    scale, digits = (100.0, 1) if metric in PERCENT else (1.0, 1)
    if metric == "peak_memory_bytes":
        scale, digits = 1 / 2**20, 0

    def one(value: float) -> str:
        if metric == "worth" and value <= 1:
            return "≤1"  # nothing smaller was measured
        return "more" if math.isinf(value) else f"{scale * value:z.{digits}f}"

    text = one(found.mean)
    if found.low is not None and found.high is not None:
        text += f" [{one(found.low)}{between}{one(found.high)}]"
    return text


def rate_text(found: Json) -> str:
    """Return what an attack finds at one rate of false alarms, in percent, and whether it could.

    Example:
        >>> rate_text({"tpr": 0.5, "low": 0.25, "high": 0.75, "resolved": False})
        '50.0 [25.0, 75.0] (too few others for this rate)'
    """
    power = "" if found["resolved"] else " (too few others for this rate)"
    tpr, low, high = (100 * found[name] for name in ("tpr", "low", "high"))
    return f"{tpr:.1f} [{low:.1f}, {high:.1f}]{power}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    r"""Return a table of Markdown.

    Example:
        >>> print(markdown(("a", "b"), [("1", "2|3")]))
        | a | b |
        |---|---|
        | 1 | 2\|3 |
    """
    first, *lines = (
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (head, *rows)
    )
    return "\n".join([first, "|---" * len(head) + "|", *lines])


def as_markdown(made: Table) -> str:
    """Return a table as Markdown."""
    rows = [(*head, *(text_of(cell, made.metric) for cell in cells)) for head, cells in made.lines]
    return markdown((*made.corner, *made.columns), rows)


def as_csv(made: Table) -> str:
    """Return a table as CSV, each score as mean, low, high and n (fractions)."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    parts = ("mean", "low", "high", "n")
    writer.writerow([*made.corner, *(f"{c} {part}" for c in made.columns for part in parts)])
    for head, cells in made.lines:
        numbers = [getattr(cell, part, None) for cell in cells for part in parts]
        writer.writerow([*head, *("" if x is None else f"{x:.6g}" for x in numbers)])
    return out.getvalue().rstrip("\n")


def as_record(made: Table) -> Json:
    """Return a table as JSON: one object a line, scores by column (null for what is not finite)."""
    rows = []
    for head, cells in made.lines:
        scores = {
            column: None if cell is None else {n: _finite(v) for n, v in vars(cell).items()}
            for column, cell in zip(made.columns, cells, strict=True)
        }
        rows.append({**dict(zip(made.corner, head, strict=True)), "scores": scores})
    return {"metric": made.metric, "rows": rows}


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value


def as_latex(made: Table) -> str:
    """Return a table as LaTeX (booktabs)."""
    lines = [
        f"\\begin{{tabular}}{{{'l' * len(made.corner)}{'r' * len(made.columns)}}}",
        "\\toprule",
    ]
    lines.append(" & ".join(map(_tex, (*made.corner, *made.columns))) + " \\\\")
    lines.append("\\midrule")
    for head, cells in made.lines:
        texts = map(_tex, (*head, *(text_of(cell, made.metric, "--") for cell in cells)))
        lines.append(" & ".join(texts) + " \\\\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"])


TEX = {c: "\\" + c for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "≤": r"$\le$",
    "[": "{[}",  # after the end of a line it would be that command's argument
    "]": "{]}",
}


def _tex(text: str) -> str:
    return "".join(TEX.get(c, c) for c in text)


def as_html(made: Table) -> str:
    """Return a table as HTML."""

    def row(tag: str, texts: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts) + "</tr>"

    body = [
        row("td", (*head, *(text_of(c, made.metric) for c in cells))) for head, cells in made.lines
    ]
    return "\n".join(["<table>", row("th", (*made.corner, *made.columns)), *body, "</table>"])


FORMATS: dict[str, Callable[[Table], str]] = {
    "md": as_markdown,
    "csv": as_csv,
    "latex": as_latex,
    "html": as_html,
}
