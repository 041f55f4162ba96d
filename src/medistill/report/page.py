"""One run folder into one page that needs nothing else: no network, no other file."""

import base64
import shlex
from functools import cache
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, FunctionLoader, StrictUndefined

from .. import __version__
from ..errors import UsageError
from ..ledger import Ledger, ledger_file
from ..records import Json, write_atomic
from .blocks import Section
from .figures import confusions, loss_figure, pilots_figure, scores_figure
from .folder import RunFolder, read_folder
from .officer import CLAIM, sections
from .tables import (
    arm_names,
    by_student,
    data_facts,
    pairs,
    run_facts,
    score_table,
    training_rows,
)
from .words import ARMS, LIMITS, findings, interval, percent


def report(path: Path, out: Path, ledger: Ledger | None = None) -> None:
    """Write one self-contained HTML page about the run folder `path`, from its files alone.

    The page holds its pictures, its plots and their library; a browser asks for nothing besides.
    Of a private run it says what the ledger (the user's own unless given) adds up.
    Raises: DataError when `path` is no run folder or a file in it is damaged; UsageError when the
    report extra is not installed; RunRefused when `out` cannot be written.
    """
    folder = read_folder(path)
    write_atomic(out, render(folder, ledger or Ledger(ledger_file())).encode())


def render(folder: RunFolder, ledger: Ledger | None = None) -> str:
    """Return the page as text; the same folder and ledger give the same text.

    Raises: UsageError when the report extra is not installed.
    """
    return filled("page.html.j2", _context(folder, ledger))


def filled(name: str, context: Json) -> str:
    """Return a page: a template of this package with its values."""
    return _environment().get_template(name).render(context) + "\n"


@cache
def _environment() -> Environment:
    """Return what keeps templates once they are compiled."""
    environment = Environment(
        loader=FunctionLoader(part),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "interval": interval}
    return environment


def _for_the_officer(folder: RunFolder, ledger: Ledger | None) -> list[Section]:
    if not folder.audit:
        return []
    chosen = (folder.evaluation or {}).get("set") == folder.audit["set"]
    return sections(folder.run, folder.audit, folder.size, chosen=chosen, ledger=ledger)


def _context(folder: RunFolder, ledger: Ledger | None) -> Json:
    run, evaluation = folder.run, folder.evaluation
    paragraph, warnings = findings(run, evaluation)
    data = run["data"]
    classes = [str(name) for name in data.get("classes") or []]
    figures = {
        "loss": loss_figure(folder.log),
        "scores": scores_figure(evaluation) if evaluation else None,
        "pilots": pilots_figure(evaluation) if evaluation else None,
    }
    place = _run_place(run, folder.name)
    told = _for_the_officer(folder, ledger)
    return {
        "title": f"{data.get('name', run['source'])} in {run['images']} synthetic images",
        "paragraph": paragraph,
        "warnings": warnings,
        "facts_rows": run_facts(run),
        "sheet": base64.b64encode(folder.sheet).decode() if folder.sheet else None,
        "evaluation": evaluation,
        "arms": ARMS,
        "arm_names": arm_names(evaluation),
        "table": score_table(evaluation) if evaluation else [],
        "students": by_student(evaluation) if evaluation else [],
        "rows": training_rows(evaluation) if evaluation else [],
        "confusions": confusions(evaluation, classes) if evaluation else [],
        "classes": classes,
        "figures": figures,
        "commands": _commands(run, evaluation, place),
        "evaluate": _on_data("evaluate", run, place),
        "settings": pairs(run.get("settings") or {}),
        "versions": pairs(run.get("versions") or {}),
        "data": data_facts(data),
        "privacy": told,
        "claim": CLAIM,
        "audit": _on_data("audit", run, place),
        "limits": LIMITS,
        "style": part("page.css"),
        "script": part("plots.js") + part("page.js"),
        "library": library() if any(figures.values()) else "",
        "version": __version__,
    }


def part(name: str) -> str:
    """Return a file of this package."""
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def library() -> str:
    """Return the plotting library, fit to stand inside a page.

    Raises: UsageError when the report extra is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise UsageError(
            "found no plotly; expected the report extra: pip install medistill[report]"
        ) from None
    # Inside a script element nothing but its end tag has a meaning to the HTML parser.
    return str(get_plotlyjs()).replace("</script", "<\\/script")


def _run_place(run: Json, name: str) -> str:
    """Return the run folder as the recorded command names it, so that commands fit together."""
    try:
        words = shlex.split(str(run["command"]))
    except ValueError:
        return name
    for word, after in zip(words, [*words[1:], ""], strict=True):
        if word == "--out" and after:
            return after
        if word.startswith("--out="):
            return word.removeprefix("--out=")
    return name


def _on_data(command: str, run: Json, place: str) -> str:
    """Return a command about the run that reads its data; a sketch is not what it needs."""
    source = run["data"].get("name") if run.get("sketch") else run["source"]
    return f"medistill {command} {shlex.quote(place)} --data {shlex.quote(str(source))}"


def _commands(run: Json, evaluation: Json | None, place: str) -> str:
    second = str((evaluation or {}).get("command") or _on_data("evaluate", run, place))
    third = f"medistill report {shlex.quote(place)} --out report.html"
    return "\n".join((str(run["command"]), second, third))
