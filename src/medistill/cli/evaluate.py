"""medistill evaluate: the honest score of a run."""

from pathlib import Path
from typing import Annotated

import typer

from ..places import cache_folder
from .common import (
    SOURCE_HELP,
    AsJson,
    Compile,
    DataRoot,
    Device,
    Offline,
    Precision,
    Seed,
    Spacing,
    Window,
    at_least_one,
    command_line,
    emit,
    guarded,
    optioned,
    scores_text,
    whole_numbers,
)

SHOWN = (
    *("protocol", "students", "seeds", "synthetic", "random", "full"),
    *("gap_closed", "worth", "curve"),
)
Curve = Annotated[
    str,
    typer.Option(
        help="Sizes of random images per class, as 1,2,5,10,20,50: how many is the set worth?"
    ),
]


@guarded
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run folder that distill wrote.")],
    data: Annotated[str, typer.Option(help=SOURCE_HELP)],
    seeds: Annotated[int, typer.Option(help="Students per arm, each with its own seed.")] = 5,
    backbone: Annotated[
        list[str] | None,
        typer.Option(help="Students, repeatable; the backbone that distilled the set otherwise."),
    ] = None,
    student_steps: Annotated[
        int | None, typer.Option(help="Length of the training schedule, in steps.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="Images in a training step; fewer for large volumes.")
    ] = None,
    curve: Curve = "",
    precision: Precision = "float32",
    compile: Compile = "auto",
    device: Device = "auto",
    seed: Seed = 0,
    window: Window = None,
    spacing: Spacing = None,
    data_root: DataRoot = None,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Score a run beside random real images and full data, under one recipe.

    Learning rate and length are chosen on the validation split, the test split is read once.
    Random and full-data scores are kept in the cache. --seed must be the one of distill where the
    source is split by seed (folders).

    Example: medistill evaluate runs/first --data phantom
    """
    from ..backbones import backbone as read_backbone
    from ..compute import Compute, find_device
    from ..data import load
    from ..evaluate import evaluate_run

    at_least_one(seeds=seeds, student_steps=student_steps, batch=batch)
    sizes = whole_numbers("curve", curve) if curve else []
    students = [read_backbone(name) for name in backbone or []]
    where = find_device(device)
    splits = load(
        optioned(data, window=window, spacing=spacing), root=data_root, offline=offline, seed=seed
    ).to(where)
    record = evaluate_run(
        run,
        splits,
        students=students or None,
        seeds=range(seeds),
        steps=student_steps,
        batch=batch,
        curve=sizes,
        command=command_line(),
        cache=cache_folder(),
        compute=Compute(precision),
        compiling=compile,
    )
    emit({name: record[name] for name in SHOWN}, scores_text(record), as_json)
