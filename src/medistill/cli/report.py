"""medistill report: one page about a run, a study or a package."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from .common import AsJson, emit, guarded
from .package import Threshold, Trust, Unsigned, is_package, signer_of

Form = Literal["pdf", "svg", "png"]
Noted = Annotated[
    Path | None,
    typer.Option(
        "--ledger",
        help="Of an audited run: where its private release is noted, with all others of the same "
        "data; the user's own unless given.",
    ),
]


@guarded
def report(
    run: Annotated[
        Path, typer.Argument(help="A folder that distill or study run wrote, or a package.")
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="FILE.html; or FILE.md: of a study its findings, of an audited run the page for a "
            "data protection officer."
        ),
    ] = Path("report.html"),
    indicator: Annotated[
        Path | None,
        typer.Option(help="Of a study: what study fit-indicator wrote."),
    ] = None,
    figures: Annotated[
        Path | None,
        typer.Option(help="Of a study: a folder for its figures as files, for papers."),
    ] = None,
    form: Annotated[Form, typer.Option(help="The form of --figures.")] = "pdf",
    ledger: Noted = None,
    trust: Trust = None,
    unsigned: Unsigned = False,
    threshold: Threshold = 1,
    as_json: AsJson = False,
) -> None:
    """Write one self-contained HTML page about a run, a study or a package; it needs no network.

    FILE.md is Markdown: a study's findings, or what a data protection officer has to know of an
    audited run. A study's figures can be written as files of their own. A package is checked first,
    as verify does, by --trust.

    Example: medistill report runs/first --out report.html
    """
    from ..errors import UsageError

    of_study = (run / "study.yaml").is_file()
    if figures is not None and not of_study:
        raise UsageError(f"found --figures for {run}; expected a folder that study run wrote")
    if indicator is not None and not of_study:
        raise UsageError(f"found --indicator for {run}; expected a folder that study run wrote")
    packed = is_package(run, trust)
    if ledger is not None and (of_study or packed):
        raise UsageError(f"found --ledger for {run}; expected an audited run")
    drawn: list[Path] = []
    if packed:
        _of_package(run, out, (trust, unsigned, threshold))
    elif of_study:
        drawn = _of_study(run, out, indicator, figures, form)
    else:
        _of_run(run, out, ledger)
    text = str(out) + (f"\n{len(drawn)} figures in {figures}" if drawn else "")
    emit({"page": str(out), "figures": [str(path) for path in drawn]}, text, as_json)


def _of_study(
    folder: Path, out: Path, indicator: Path | None, figures: Path | None, form: Form
) -> list[Path]:
    from ..indicator import load_indicator
    from ..report import opened, study_paper, study_prints, study_report
    from ..study import Folder

    found = opened(Folder(folder), load_indicator(indicator) if indicator else None)
    (study_paper if out.suffix == ".md" else study_report)(found, out)
    return study_prints(found, figures, form) if figures is not None else []


def _of_run(folder: Path, out: Path, ledger: Path | None) -> None:
    from ..ledger import Ledger
    from ..report import officer_report
    from ..report import report as write_report

    noted = Ledger(ledger) if ledger else None
    (officer_report if out.suffix == ".md" else write_report)(folder, out, noted)


def _of_package(path: Path, out: Path, by: tuple[Path | None, bool, int]) -> None:
    from ..errors import UsageError
    from ..package import read
    from ..pictures import png, synthetic_sheet
    from ..records import to_record
    from ..report import Parcel, package_report

    if out.suffix == ".md":
        raise UsageError(f"found --out {out} for a package; expected FILE.html: REPORT.md is in it")
    trust, unsigned, threshold = by
    found = read(path, trust, unsigned=unsigned, threshold=threshold)
    told = Parcel(
        to_record(found.manifest),
        found.evaluation,
        found.privacy,
        found.report,
        signer_of(found) or "",
        found.sha256,
        found.bytes,
        png(synthetic_sheet(found.synthetic)),
    )
    package_report(told, out)
