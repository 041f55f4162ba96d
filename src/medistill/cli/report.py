"""medistill report: one page about a run or a study."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from .common import AsJson, emit, guarded


@guarded
def report(
    run: Annotated[Path, typer.Argument(help="A folder that distill or study run wrote.")],
    out: Annotated[Path, typer.Option(help="The HTML file to write.")] = Path("report.html"),
    figures: Annotated[
        Path | None,
        typer.Option(help="Of a study: a folder for its figures as files, for papers."),
    ] = None,
    form: Annotated[
        Literal["pdf", "svg", "png"], typer.Option(help="The form of --figures.")
    ] = "pdf",
    as_json: AsJson = False,
) -> None:
    """Write one self-contained HTML page about a run or a study; it needs no network to be read.

    Example: medistill report runs/first --out report.html
    """
    from ..errors import UsageError
    from ..report import report as write_report
    from ..report import study_prints, study_report

    of_study = (run / "study.yaml").is_file()
    if figures is not None and not of_study:
        raise UsageError(f"found --figures for {run}; expected a folder that study run wrote")
    write = study_report if of_study else write_report
    write(run, out)
    drawn = study_prints(run, figures, form) if figures is not None else []
    text = str(out) + (f"\n{len(drawn)} figures in {figures}" if drawn else "")
    emit({"page": str(out), "figures": [str(path) for path in drawn]}, text, as_json)
