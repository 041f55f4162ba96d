"""medistill study: a grid of datasets, methods and budgets, run, resumed and tabulated."""

import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..places import cache_folder
from .common import AsJson, DataRoot, Device, Offline, Track, Workers, emit, guarded

if TYPE_CHECKING:
    from ..engine import Engine
    from ..plan import Study
    from ..study import Entry

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Run a grid of datasets, methods and budgets; see how far it is; make tables of it.",
)
StudyFolder = Annotated[Path, typer.Argument(help="A folder that study run wrote.")]


@app.command()
@guarded
def run(
    study: Annotated[Path, typer.Argument(help="A study file (YAML), or the folder of a study.")],
    out: Annotated[
        Path | None, typer.Option(help="The study's folder; the file's name unless given.")
    ] = None,
    engine: Annotated[
        Literal["local", "ray"], typer.Option(help="Processes of this machine, or a Ray cluster.")
    ] = "local",
    workers: Annotated[
        int, typer.Option(help="Local processes; 0: one for each core and thread of a cell.")
    ] = 0,
    address: Annotated[
        str | None,
        typer.Option(help="Of a Ray cluster (HOST:PORT or auto); one is started unless given."),
    ] = None,
    gpus: Annotated[float, typer.Option(help="GPUs of a cell on a Ray cluster.")] = 0.0,
    retry: Annotated[
        bool, typer.Option("--retry", help="Run failed and refused cells again.")
    ] = False,
    only: Annotated[
        list[str] | None,
        typer.Option(help="A cell's key, or its source, method or backbone; repeatable, all hold."),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Begin no further cell after so many minutes.")
    ] = None,
    track: Track = "",
    device: Device = "cpu",
    data_root: DataRoot = None,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Run the cells of a study that have not been run.

    A cell is one method on one dataset with one budget and seed: distilled, trained on, tested.
    Its file is written when it is done, so a study may be stopped at any time, even killed; run it
    again and it goes on. Changed settings make new cells.

    Example: medistill study run studies/smoke.yaml --out runs/smoke
    """
    from ..plan import read_study
    from ..progress import say
    from ..study import Options, run_study

    said = read_study(study / "study.yaml" if study.is_dir() else study)
    folder = out or (study if study.is_dir() else Path(study.stem))
    most = math.inf if minutes is None else minutes
    options = Options(retry, tuple(only or ()), most, data_root, offline, device, track)
    where = _engine(engine, (workers, address, gpus), device, said.protocol.threads)
    # Nodes of a cluster may be other users' and have other disks.
    cache = None if engine == "ray" else cache_folder()
    states = run_study(said, folder, where, cache=cache, options=options)
    text = ", ".join(f"{count} {state}" for state, count in states.items())
    record = {"study": str(folder), "cells": states}
    emit(record, f"{text}: medistill study table {folder}", as_json)
    if failed := states.get("failed"):
        say(f"{failed} cells failed: medistill study status {folder} says why")
        raise typer.Exit(1)


def _engine(name: str, asked: tuple[int, str | None, float], device: str, threads: int) -> "Engine":
    from ..engine import Cluster, local
    from ..errors import UsageError

    workers, address, gpus = asked
    if name == "local":
        if address or gpus:
            flag = "--address" if address else "--gpus"
            raise UsageError(f"found {flag} for local processes; expected --engine ray beside it")
        return local(workers, threads)
    if workers:
        raise UsageError("found --workers for a Ray cluster; expected --engine local beside it")
    if device == "cuda" and not gpus:
        raise UsageError(
            "found --device cuda on a Ray cluster without --gpus; expected what part of a GPU a "
            "cell takes, as --gpus 1"
        )
    return Cluster(address, threads, gpus)


@app.command()
@guarded
def status(study: StudyFolder, as_json: AsJson = False) -> None:
    """Show how many cells are done, and why others are not.

    Example: medistill study status runs/smoke
    """
    from ..plan import BASELINES, MEASURE

    said, entries = _opened(study)
    counts: dict[tuple[str, str], Counter[str]] = {}
    errors: dict[str, list[str]] = {}
    for one in entries:
        place = one.place
        counts.setdefault((place.source, place.method), Counter())[one.state] += 1
        if one.record and "error" in one.record:
            text = f"{one.state}: {one.record['error']}"
            errors.setdefault(text, []).append(f"{place.source}, {place.method}, {place.ipc}")
    columns = [*(way.title for way in said.methods), *BASELINES, MEASURE]
    lines = ["| source | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for data in said.sources:
        cells = []
        for column in columns:
            mine = counts.get((data.title, column))
            cells.append(f"{mine['done']}/{mine.total()}" if mine else "")
        lines.append(f"| {data.title} | " + " | ".join(cells) + " |")
    for text, places in errors.items():
        lines.append(f"{len(places)} {text} (first: {places[0]})")
    totals = Counter(one.state for one in entries)
    lines.append(", ".join(f"{count} {state}" for state, count in sorted(totals.items())))
    emit({"study": str(study), "cells": totals, "errors": errors}, "\n".join(lines), as_json)


@app.command()
@guarded
def table(
    study: StudyFolder,
    rows: Annotated[
        str, typer.Option(help="source, method, ipc, backbone; commas.")
    ] = "source,ipc",
    columns: Annotated[str, typer.Option(help="As --rows.")] = "method",
    metric: Annotated[
        str,
        typer.Option(
            help="accuracy, balanced_accuracy, auc, f1, ece, kappa, gap_closed, gap_closed_auc, "
            "worth, distill_seconds, peak_memory_bytes or lira_auc."
        ),
    ] = "accuracy",
    only: Annotated[
        list[str] | None, typer.Option(help="DIMENSION=VALUE, as ipc=10; repeatable.")
    ] = None,
    format: Annotated[
        Literal["md", "csv", "latex", "html"], typer.Option(help="How the table is written.")
    ] = "md",
    as_json: AsJson = False,
) -> None:
    """Print a table of a study: means with 95% intervals over syntheses, in percent.

    Example: medistill study table runs/smoke --metric auc --only ipc=1
    """
    from ..errors import UsageError
    from ..formats import FORMATS, as_record
    from ..tabulate import Book
    from ..tabulate import rows_of as all_rows
    from ..tabulate import table as make_table

    said, entries = _opened(study)
    fixed = {}
    for word in only or []:
        name, equals, value = word.partition("=")
        if not equals:
            raise UsageError(f"found --only {word}; expected DIMENSION=VALUE, as ipc=10")
        fixed[name] = value
    book = Book(all_rows(said, entries), said.every_budget)
    made = make_table(
        book, rows=rows.split(","), columns=columns.split(","), metric=metric, fixed=fixed
    )
    emit(as_record(made), FORMATS[format](made), as_json)


@app.command(name="rows")
@guarded
def rows_(
    study: StudyFolder,
    out: Annotated[Path, typer.Option(help="The CSV file to write.")],
    as_json: AsJson = False,
) -> None:
    """Write every training of a study as one line of a CSV file.

    Example: medistill study rows runs/smoke --out smoke.csv
    """
    from ..records import write_atomic
    from ..tabulate import rows_of, write_rows

    found = rows_of(*_opened(study))
    write_atomic(out, write_rows(found).encode())
    emit({"rows": len(found), "file": str(out)}, f"{len(found)} rows in {out}", as_json)


@app.command()
@guarded
def restore(
    study: Annotated[Path, typer.Argument(help="A study file (YAML).")],
    rows: Annotated[Path, typer.Option(help="A CSV file that study rows wrote.")],
    out: Annotated[Path, typer.Option(help="The study's folder; what it holds already stays.")],
    indicator: Annotated[
        Path | None, typer.Option(help="A fitted indicator, which holds what was measured.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a study's folder from its rows, so that it goes on where only its table is at hand.

    Cells that the rows do not hold, or that the study asks for with other settings, run anew;
    pictures of the sets are not restored.

    Example: medistill study restore studies/smoke.yaml --rows smoke.csv --out runs/smoke
    """
    from ..cell import Result
    from ..errors import DataError
    from ..indicator import load_indicator
    from ..plan import grid, read_study
    from ..study import Folder
    from ..tabulate import read_rows, records_of

    said, folder = read_study(study), Folder(out)
    measured = load_indicator(indicator).measured() if indicator else {}
    try:
        records = records_of(said, read_rows(rows.read_text(encoding="utf-8")), measured)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{rows} does not read as the rows of a study ({error}); expected what `medistill "
            "study rows` wrote"
        ) from None
    new = [key for key in records if folder.cell(key) is None]
    folder.write(said)
    for key in new:
        folder.keep(key, Result(records[key], None))
    text = f"{len(new)} of {len(grid(said))} cells restored in {out}: medistill study run {out}"
    emit({"study": str(out), "restored": len(new)}, text, as_json)


@app.command(name="fit-indicator")
@guarded
def fit_indicator(
    study: StudyFolder,
    out: Annotated[Path, typer.Option(help="The file to write, for predict --indicator.")],
    workers: Workers = 1,
    as_json: AsJson = False,
) -> None:
    """Fit the indicator to a study: which numbers of a small sample tell what will be reached.

    Candidates are compared on datasets left out, at fixed images per class; the one with the least
    error of accuracy is kept, with the study's rows that it needs.

    Example: medistill study fit-indicator runs/feasibility --out indicator.json
    """
    from ..engine import local
    from ..indicator import to_json
    from ..judge import examples_of, fit
    from ..records import write_json
    from ..study import measured_in
    from ..tabulate import rows_of

    said, entries = _opened(study)
    examples = examples_of(said, rows_of(said, entries), measured_in(entries))
    made = fit(examples, f"{said.name}: {said.about}".strip(), local(workers))
    write_json(out, to_json(made))
    lines = [f"{made.chosen}, from {len(made.examples)} datasets, in {out}"]
    for name, judged in made.report["accuracy"].items():
        ranks = [f"{one['spearman']:.2f} at {ipc}" for ipc, one in judged["budgets"].items()]
        lines.append(
            f"{name:<24} mean absolute error of accuracy {judged['error']:.3f}, Spearman "
            f"{', '.join(ranks)} (p = {judged['p_value']:.2g})"
        )
    record = {"file": str(out), "chosen": made.chosen, "report": made.report}
    emit(record, "\n".join(lines), as_json)


def _opened(path: Path) -> "tuple[Study, list[Entry]]":
    from ..plan import grid
    from ..study import Folder, entries_of

    folder = Folder(path)
    said = folder.study()
    return said, entries_of(folder, grid(said))
