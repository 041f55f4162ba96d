"""medistill report: one page about a run or a study."""

from pathlib import Path
from typing import Annotated

import typer

from .common import AsJson, emit, guarded


@guarded
def report(
    run: Annotated[Path, typer.Argument(help="A folder that distill or study run wrote.")],
    out: Annotated[Path, typer.Option(help="The HTML file to write.")] = Path("report.html"),
    as_json: AsJson = False,
) -> None:
    """Write one self-contained HTML page about a run or a study; it needs no network to be read.

    Example: medistill report runs/first --out report.html
    """
    from ..report import report as write_report
    from ..report import study_report

    write = study_report if (run / "study.yaml").is_file() else write_report
    write(run, out)
    emit({"page": str(out)}, str(out), as_json)
