"""medistill report: one page about a run."""

from pathlib import Path
from typing import Annotated

import typer

from .common import AsJson, emit, guarded


@guarded
def report(
    run: Annotated[Path, typer.Argument(help="A run folder that distill wrote.")],
    out: Annotated[Path, typer.Option(help="The HTML file to write.")] = Path("report.html"),
    as_json: AsJson = False,
) -> None:
    """Write one self-contained HTML page about a run; it needs no network to be read.

    Example: medistill report runs/first --out report.html
    """
    from ..report import report as write_report

    write_report(run, out)
    emit({"page": str(out)}, str(out), as_json)
