"""One package into one page: what a receiver gets, and what its sender says of it."""

import base64
from pathlib import Path
from typing import NamedTuple

from .. import __version__
from ..errors import UsageError
from ..records import Json, write_atomic
from .page import filled, part
from .tables import Facts, arm_names, data_facts, pairs, run_facts, score_table
from .told import told_of
from .words import ARMS, LIMITS, findings

OPEN = '<div class="scroll" tabindex="0" role="region" aria-label="Table"><table class="prose">\n'
CLOSE = "</table></div>\n"
BELOW = 2  # levels that the sender's titles go down, below the page's own


class Parcel(NamedTuple):
    """What a package that passed every check says of itself.

    `signer` is empty where nobody signed it; `report` is the sender's REPORT.md, free text, where
    `privacy` is what was checked; `sheet` is a PNG drawn from its images.
    """

    manifest: Json
    evaluation: Json
    privacy: Json
    report: str
    signer: str
    sha256: str
    size: int
    sheet: bytes


def package_report(told: Parcel, out: Path) -> None:
    """Write one self-contained HTML page about a package.

    Raises: UsageError when the report extra is not installed; RunRefused when `out` cannot be
    written.
    """
    write_atomic(out, render_package(told).encode())


def render_package(told: Parcel) -> str:
    """Return the page as text: what the package says is text on it, and never markup.

    Raises: UsageError when the report extra is not installed.
    """
    manifest, evaluation = told.manifest, told.evaluation or None
    made = _as_run(told)
    paragraph, warnings = findings(made, evaluation)
    return filled(
        "package.html.j2",
        {
            "title": f"{manifest['name']}, version {manifest['counter']}",
            "paragraph": paragraph,
            "warnings": [*_warnings(told), *warnings],
            "terms": _terms(told),
            "sheet": base64.b64encode(told.sheet).decode(),
            "table": score_table(evaluation) if evaluation else [],
            "arms": ARMS,
            "arm_names": arm_names(evaluation),
            "declared_on": manifest["declared_on"],
            "made": run_facts(made),
            "settings": pairs(manifest["made"]["settings"]),
            "recipe": [(name, value) for name, value in pairs(manifest["recipe"]) if value],
            "report": _as_html(told.report),
            "data": data_facts(manifest["card"]),
            "limits": LIMITS,
            "style": part("page.css"),
            "script": "",
            "library": "",
            "version": __version__,
        },
    )


def _as_run(told: Parcel) -> Json:
    """Return what the words and tables of a run need, as far as a package tells it."""
    manifest, made = told.manifest, told.manifest["made"]
    each = set(manifest["per_class"])
    return {
        "data": {**manifest["card"], "license": manifest["license"]},
        "source": manifest["card"]["name"],
        "images": sum(manifest["per_class"]),
        "ipc": each.pop() if len(each) == 1 else None,
        "method": made["method"],
        # Students cut tiles by the recipe; settings are what the sender says of the method.
        "settings": {**made["settings"], "factor": manifest["recipe"]["factor"]},
        "seed": made["seed"],
        "start": made["start"],
        "real_pixels": made["real_pixels"],
        "backbone": manifest["recipe"]["backbone"],
    }


def _warnings(told: Parcel) -> list[str]:
    warned = []
    if not told.signer:
        warned.append("Nobody signed this package: it may come from anyone.")
    if told.manifest["allowed"]:
        allowed = ", ".join(told.manifest["allowed"])
        warned.append(f"Its sender packed it in spite of: {allowed}.")
    return warned


def _terms(told: Parcel) -> Facts:
    said = told_of(told.manifest, told.privacy)
    rows = [
        ("Signed by", told.signer or "nobody"),
        ("SHA-256", told.sha256),
        ("Size", f"{told.size:,} bytes"),
        *((title.capitalize(), text) for title, text in said.items()),
        ("Made by", told.manifest["made"]["version"]),
    ]
    return [(name, value) for name, value in rows if value]


def _as_html(text: str) -> str:
    """Return Markdown as HTML with titles, lists and tables alone.

    Tags are text, and there is no link and no picture: what a sender wrote must not lead away.
    Raises: UsageError when the report extra is not installed.
    """
    try:
        from markdown_it import MarkdownIt
    except ImportError:
        raise UsageError(
            "found no markdown-it-py; expected the report extra: pip install medistill[report]"
        ) from None
    reader = MarkdownIt("commonmark", {"html": False}).enable("table")
    reader.disable(["link", "image", "autolink", "html_inline", "html_block", "reference"])
    tokens = reader.parse(text)
    for token in tokens:
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(6, int(token.tag[1:]) + BELOW)}"
    reader.add_render_rule("table_open", lambda *_: OPEN)
    reader.add_render_rule("table_close", lambda *_: CLOSE)
    return str(reader.renderer.render(tokens, reader.options, {}))
