"""medistill distill: a run folder from a dataset."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..errors import UsageError
from ..places import cache_folder
from .common import (
    AsJson,
    Compile,
    DataRoot,
    Device,
    Offline,
    Out,
    Precision,
    Seed,
    Source,
    Spacing,
    Track,
    Window,
    Workers,
    at_least_one,
    command_line,
    emit,
    extra_fields,
    guarded,
    optioned,
)

if TYPE_CHECKING:
    from ..augment import Augmentation
    from ..backbones import Backbone
    from ..budget import Budget, Share, Small
    from ..methods import Method
    from ..sets import RealSet
    from ..sketch import Sketch

Name = Annotated[
    str | None,
    typer.Option(
        help="random, herding, kcenter, dc, dsa, dm, dm-bank, sketch, mtt, tesla, ftd, datm, att, "
        "hop_tm or dp_merf; dm for images, sketch for a sketch unless given."
    ),
]
Ipc = Annotated[
    int | None,
    typer.Option(help="Images per class, the mean where --budget is unequal; 10 unless given."),
]
Images = Annotated[
    int | None, typer.Option(help="Images in all, in place of --ipc: for multi-label tasks.")
]
Bytes = Annotated[int | None, typer.Option(help="Bytes of 8-bit pixels in all, in place of --ipc.")]
Dealt = Annotated[
    Literal["equal", "proportional", "sqrt"],
    typer.Option(help="How images are dealt to classes: equally, or by (the root of) their size."),
]
SmallClass = Annotated[
    Literal["refuse", "whole"],
    typer.Option(help="A class with fewer real images than its share: refused, or taken whole."),
]
BackboneName = Annotated[
    str,
    typer.Option(
        help="convnet-DEPTH-WIDTH, mlp-WIDTH, resnet18 or linear, with a norm if you like "
        "(convnet-3-64-batch; instance, batch, layer, group, none); monai:NAME."
    ),
]
OwnBackbone = Annotated[
    str | None,
    typer.Option(help="As in sketch; convnet-3-128, or that of the sketch, unless given."),
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
    bool, typer.Option("--no-flip", help="Leave out flips: a mirrored image is of another class.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run that is in --out.")]

SKETCH = ".sketch"
IPC = 10
SHOWN = ("method", "ipc", "images", "seconds", "peak_memory_bytes", "bytes")


@guarded
def distill(
    context: typer.Context,
    source: Source,
    out: Out,
    method: Name = None,
    ipc: Ipc = None,
    images: Images = None,
    bytes: Bytes = None,
    budget: Dealt = "equal",
    small: SmallClass = "refuse",
    backbone: OwnBackbone = None,
    steps: Steps = None,
    paper: Paper = False,
    augment: Augment = "all",
    no_flip: NoFlip = False,
    precision: Precision = "float32",
    compile: Compile = "auto",
    resume: Resume = False,
    workers: Workers = 1,
    track: Track = "",
    device: Device = "auto",
    seed: Seed = 0,
    window: Window = None,
    spacing: Spacing = None,
    data_root: DataRoot = None,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Distill a dataset into a few synthetic images per class.

    Settings of the method are flags too: --lr-images 0.5 --start real. Images start from noise
    (mtt and its heirs: class means) unless --start real or --paper is given. --workers train
    experts side by side. Ctrl-C leaves a run that goes on with --resume.

    Example: medistill distill phantom --method dm --ipc 10 --steps 200 --out runs/first
    """
    from ..compute import Compute, find_device
    from ..distill import Run, distill_to
    from ..engine import local
    from ..methods import Task
    from ..sketch import Sketch

    at_least_one(steps=steps)
    fields, source = extra_fields(context.args), optioned(source, window=window, spacing=spacing)
    view = read_augmentation(augment, no_flip)
    held = Sketch.load(Path(source)) if source.endswith(SKETCH) else None
    chosen = _method(method, fields, held, paper)
    real = held.without_images() if held else _train(source, data_root, offline, seed)
    student = held.backbone if held and not backbone else _student(backbone)
    real, how = real.to(find_device(device)), Compute(precision)
    spent = _budget(ipc, images, bytes, budget, small)
    task = Task(real, spent, student, view, how, held, engine=local(workers))
    if paper:
        chosen = dataclasses.replace(chosen.as_in_paper(task), **fields)  # type: ignore[type-var]
    run = Run(chosen, task, seed, source, command_line(), steps)
    record = distill_to(
        out, run, resume=resume, cache=cache_folder(), compiling=compile, track=track
    )
    _tell(record, out, "SOURCE" if held else source, seed, as_json)


def _budget(
    ipc: int | None, images: int | None, bytes: int | None, share: "Share", small: "Small"
) -> "Budget":
    """Read --ipc, --images, --bytes, --budget and --small."""
    from ..budget import Budget

    each = IPC if ipc is images is bytes is None else ipc
    return Budget(each, images, bytes, share, small)


def _tell(record: dict[str, Any], out: Path, source: str, seed: int, as_json: bool) -> None:
    shown = {"run": str(out), **{name: record[name] for name in SHOWN}}
    text = (
        f"{record['images']} images in {out} after {record['steps_done']} steps, "
        f"{record['seconds']:.0f} s; look at {out / 'sheet.png'}\n"
        f"next: medistill evaluate {out} --data '{source}'{f' --seed {seed}' if seed else ''}"
    )
    emit(shown, text, as_json)


def _method(
    name: str | None, fields: dict[str, Any], held: "Sketch | None", paper: bool
) -> "Method":
    """Read --method and its settings; a sketch brings its own."""
    from ..methods import PRESETS, make

    if paper and name in PRESETS:
        raise UsageError(f"found --method {name} with --paper; expected a method that has one")
    chosen = name or ("dm" if held is None else "sketch")
    method = make(chosen, fields)
    if held is None or not method.from_sketch:
        return method
    known = {name: value for name, value in held.settings.items() if name in vars(method)}
    return make(chosen, {**known, **fields})


def _train(source: str, root: Path | None, offline: bool, seed: int) -> "RealSet":
    """Load the training split of a source."""
    from ..data import load

    return load(source, root=root, offline=offline, seed=seed).train


def _student(name: str | None) -> "Backbone":
    """Read --backbone."""
    from ..backbones import backbone

    return backbone(name or "convnet-3-128")


def read_augmentation(text: str, no_flip: bool) -> "Augmentation":
    """Read --augment and --no-flip."""
    from ..augment import KINDS, Augmentation
    from ..errors import UsageError, nearest

    kinds = {"all": KINDS, "none": ()}.get(text, tuple(text.split(",")))
    for name in kinds:
        if name not in KINDS:
            raise UsageError(f"found no augmentation {name!r}: {nearest(name, KINDS)}")
    chosen = Augmentation(kinds=kinds)  # type: ignore[arg-type]
    return chosen.without_flips() if no_flip else chosen
