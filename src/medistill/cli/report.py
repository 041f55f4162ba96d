"""medistill report: one page about a run or a study."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from .common import AsJson, emit, guarded


@guarded
def report(
    run: Annotated[Path, typer.Argument(help="A folder that distill or study run wrote.")],
    out: Annotated[
        Path, typer.Option(help="The HTML file to write; of a study also FILE.md, in words.")
    ] = Path("report.html"),
    indicator: Annotated[
        Path | None,
        typer.Option(help="For FILE.md: what study fit-indicator wrote, to be judged there."),
    ] = None,
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

    A study's findings can also be written as Markdown, and its figures as files for papers.

    Example: medistill report runs/first --out report.html
    """
    from ..errors import UsageError
    from ..indicator import load_indicator
    from ..report import report as write_report
    from ..report import study_paper, study_prints, study_report

    of_study = (run / "study.yaml").is_file()
    in_words = out.suffix == ".md"
    if (figures is not None or in_words) and not of_study:
        raise UsageError(
            f"found {run}; expected a folder that study run wrote for figures and FILE.md"
        )
    if indicator is not None and not in_words:
        raise UsageError(f"found --indicator for {out}; expected --out FILE.md beside it")
    if in_words:
        study_paper(run, out, load_indicator(indicator) if indicator else None)
    else:
        (study_report if of_study else write_report)(run, out)
    drawn = study_prints(run, figures, form) if figures is not None else []
    text = str(out) + (f"\n{len(drawn)} figures in {figures}" if drawn else "")
    emit({"page": str(out), "figures": [str(path) for path in drawn]}, text, as_json)
