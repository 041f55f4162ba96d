"""medistill distill: a run folder from a dataset."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from .common import (
    AsJson,
    DataRoot,
    Offline,
    Out,
    Seed,
    Source,
    cache_folder,
    command_line,
    emit,
    extra_fields,
    guarded,
)


@guarded
def distill(
    context: typer.Context,
    source: Source,
    out: Out,
    method: Annotated[str, typer.Option(help="random, herding, kcenter, dc, dsa or dm.")] = "dm",
    ipc: Annotated[int, typer.Option(help="Images per class.")] = 10,
    backbone: Annotated[
        str, typer.Option(help="convnet-DEPTH-WIDTH, mlp-WIDTH or resnet18, perhaps with a norm.")
    ] = "convnet-3-128",
    steps: Annotated[
        int | None, typer.Option(help="Stop after so many steps: a fraction of the method's own.")
    ] = None,
    paper: Annotated[
        bool,
        typer.Option("--paper", help="Every setting as the paper has it, real start included."),
    ] = False,
    augment: Annotated[
        str,
        typer.Option(help="all, none, or some of color,crop,cutout,flip,scale,rotate."),
    ] = "all",
    no_flip: Annotated[
        bool, typer.Option("--no-flip", help="A mirrored image would belong to another class.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run that is in --out.")
    ] = False,
    seed: Seed = 0,
    data_root: DataRoot = None,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Distill a dataset into a few synthetic images per class.

    Settings of the method are flags too: --lr-images 0.5 --start real --iterations 1000. Wrong
    names are answered with the right ones. Images start from noise unless --start real or --paper
    is given. Ctrl-C leaves a run that goes on with --resume.

    Example: medistill distill phantom --method dm --ipc 10 --steps 200 --out runs/first
    """
    from ..augment import KINDS, Augmentation
    from ..backbones import backbone as read_backbone
    from ..data import load
    from ..distill import Run, distill_to
    from ..errors import UsageError, nearest
    from ..methods import Task, method_class
    from ..records import from_record
    from ..sets import Budget

    kind = method_class(method)
    fields = extra_fields(context.args)
    chosen = from_record(kind, fields)
    budget, student = Budget(ipc=ipc), read_backbone(backbone)
    if steps is not None and steps < 1:
        raise UsageError(f"found --steps {steps}; expected at least 1")
    kinds = {"all": KINDS, "none": ()}.get(augment, tuple(augment.split(",")))
    for name in kinds:
        if name not in KINDS:
            raise UsageError(f"found no augmentation {name!r}: {nearest(name, KINDS)}")
    splits = load(source, root=data_root, offline=offline, seed=seed)
    augmentation = Augmentation(kinds=kinds)  # type: ignore[arg-type]
    if no_flip or not splits.train.card.flips:
        augmentation = augmentation.without_flips()
    task = Task(splits.train, budget, student, augmentation)
    if paper:
        chosen = dataclasses.replace(chosen.as_in_paper(task), **fields)  # type: ignore[type-var]
    run = Run(chosen, task, seed, source, command_line(), steps)
    record = distill_to(Path(out), run, resume=resume, cache=cache_folder())
    short = {
        name: record[name]
        for name in ("method", "ipc", "images", "seconds", "peak_memory_bytes", "bytes")
    }
    emit(
        {"run": str(out), **short},
        f"{record['images']} images in {out} after {record['steps_done']} steps, "
        f"{record['seconds']:.0f} s; look at {out / 'sheet.png'}\n"
        f"next: medistill evaluate {out} --data '{source}'",
        as_json,
    )
