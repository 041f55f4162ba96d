"""medistill data: known sets, their download, and what is in a source."""

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import (
    AsJson,
    DataRoot,
    Offline,
    Seed,
    Source,
    Spacing,
    Window,
    emit,
    guarded,
    optioned,
)

app = typer.Typer(help="Known sets, their download, and what is in a source.", no_args_is_help=True)


@app.command("list")
@guarded
def list_(as_json: AsJson = False) -> None:
    """List the sets that are known by name.

    Example: medistill data list
    """
    from ..data import names
    from ..data.medmnist_table import TABLE

    facts = [
        {
            "name": name,
            "task": TABLE[name].task if name in TABLE else "binary",
            "classes": len(TABLE[name].classes) if name in TABLE else 2,
            "license": TABLE[name].license if name in TABLE else "built in",
        }
        for name in names()
    ]
    text = "\n".join(
        f"{f['name']:<16}{f['task']:<12}{f['classes']:>3} classes   {f['license']}" for f in facts
    )
    emit({"sets": facts}, text, as_json)


@app.command()
@guarded
def fetch(
    name: Annotated[str, typer.Argument(help="A known set, perhaps an edition: pathmnist@64.")],
    data_root: DataRoot = None,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Download a known set, its MD5 checked and its license shown; check one that is there.

    Example: medistill data fetch breastmnist
    """
    from ..data import fetch as fetch_set

    path = fetch_set(name, root=data_root, offline=offline)
    emit({"name": name, "path": str(path)}, str(path), as_json)


@app.command()
@guarded
def inspect(
    source: Source,
    sheet: Annotated[Path | None, typer.Option(help="Write a picture sheet (PNG) there.")] = None,
    seed: Seed = 0,
    window: Window = None,
    spacing: Spacing = None,
    data_root: DataRoot = None,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Say what is in a source: counts, balance, duplicates within and across splits.

    Example: medistill data inspect phantom
    """
    from ..data import inspect as inspect_set
    from ..data import load
    from ..pictures import class_sheet, png
    from ..records import write_atomic

    splits = load(
        optioned(source, window=window, spacing=spacing), root=data_root, offline=offline, seed=seed
    )
    found = inspect_set(splits)
    if sheet is not None:
        write_atomic(sheet, png(class_sheet(splits.train)))
    emit(found, _text(found), as_json)


BARS = " ▁▂▃▄▅▆▇█"


def _bars(shares: list[float]) -> str:
    """Draw a histogram in one line."""
    top = max(shares) or 1.0
    return "".join(BARS[min(8, math.ceil(8 * share / top))] for share in shares)


def _text(found: dict[str, Any]) -> str:
    card = found["card"]
    lines = [
        f"{card['name']}: {card['task']}, {card['channels']} channel(s), "
        f"{'x'.join(map(str, card['shape']))}, license {card['license']}"
    ]
    for name, part in found["splits"].items():
        classes = ", ".join(f"{title} {count}" for title, count in part["classes"].items())
        many = part["patients"] if part["patients"] != part["images"] else None
        people = f" in {many} groups" if many is not None else ""
        lines.append(f"{name:<6}{part['images']:>7} images{people}: {classes}")
        lines.append(f"{'':<6}intensities {_bars(part['histogram'])}")
    for finding in found["findings"]:
        examples = "; ".join(map(str, finding["examples"][:3]))
        if "surplus" in finding:
            examples = f"{finding['surplus']} images to spare: {examples}"
        lines.append(f"{finding['severity']}: {finding['kind']}, {finding['count']} ({examples})")
    return "\n".join(lines if found["findings"] else [*lines, "no findings"])
