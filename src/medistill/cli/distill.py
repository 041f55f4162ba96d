"""medistill distill: a run folder from a dataset."""

import dataclasses
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..places import cache_folder
from .common import (
    AsJson,
    Compile,
    DataRoot,
    Device,
    Offline,
    Out,
    Seed,
    Source,
    command_line,
    emit,
    extra_fields,
    guarded,
)

if TYPE_CHECKING:
    from ..augment import Augmentation

Name = Annotated[str, typer.Option(help="random, herding, kcenter, dc, dsa, dm or dm-bank.")]
Ipc = Annotated[int, typer.Option(help="Images per class.")]
BackboneName = Annotated[
    str, typer.Option(help="convnet-DEPTH-WIDTH, mlp-WIDTH or resnet18, perhaps with a norm.")
]
Steps = Annotated[
    int | None, typer.Option(help="Stop after so many steps: a fraction of the method's own.")
]
Paper = Annotated[
    bool, typer.Option("--paper", help="Every setting as the paper has it, real start included.")
]
Augment = Annotated[
    str, typer.Option(help="all, none, or some of color,crop,cutout,flip,scale,rotate.")
]
NoFlip = Annotated[
    bool, typer.Option("--no-flip", help="A mirrored image would belong to another class.")
]
Precision = Annotated[
    Literal["float32", "bfloat16"],
    typer.Option(help="Of the real images' way through the networks; gradients stay in float32."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run that is in --out.")]

SHOWN = ("method", "ipc", "images", "seconds", "peak_memory_bytes", "bytes")


@guarded
def distill(
    context: typer.Context,
    source: Source,
    out: Out,
    method: Name = "dm",
    ipc: Ipc = 10,
    backbone: BackboneName = "convnet-3-128",
    steps: Steps = None,
    paper: Paper = False,
    augment: Augment = "all",
    no_flip: NoFlip = False,
    precision: Precision = "float32",
    compile: Compile = False,
    resume: Resume = False,
    device: Device = "auto",
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
    from ..backbones import backbone as read_backbone
    from ..compute import Compute, find_device
    from ..data import load
    from ..distill import Run, distill_to
    from ..errors import UsageError
    from ..methods import Task, make
    from ..sets import Budget

    fields = extra_fields(context.args)
    chosen = make(method, fields)
    budget, student = Budget(ipc=ipc), read_backbone(backbone)
    if steps is not None and steps < 1:
        raise UsageError(f"found --steps {steps}; expected at least 1")
    augmentation = _augmentation(augment, no_flip)
    where = find_device(device)
    splits = load(source, root=data_root, offline=offline, seed=seed)
    real, compute = splits.train.to(where), Compute(precision, compile)
    task = Task(real, budget, student, augmentation, compute)
    if paper:
        chosen = dataclasses.replace(chosen.as_in_paper(task), **fields)  # type: ignore[type-var]
    run = Run(chosen, task, seed, source, command_line(), steps)
    record = distill_to(out, run, resume=resume, cache=cache_folder())
    emit(
        {"run": str(out), **{name: record[name] for name in SHOWN}},
        f"{record['images']} images in {out} after {record['steps_done']} steps, "
        f"{record['seconds']:.0f} s; look at {out / 'sheet.png'}\n"
        f"next: medistill evaluate {out} --data '{source}'",
        as_json,
    )


def _augmentation(text: str, no_flip: bool) -> "Augmentation":
    """Read --augment and --no-flip."""
    from ..augment import KINDS, Augmentation
    from ..errors import UsageError, nearest

    kinds = {"all": KINDS, "none": ()}.get(text, tuple(text.split(",")))
    for name in kinds:
        if name not in KINDS:
            raise UsageError(f"found no augmentation {name!r}: {nearest(name, KINDS)}")
    chosen = Augmentation(kinds=kinds)  # type: ignore[arg-type]
    return chosen.without_flips() if no_flip else chosen
