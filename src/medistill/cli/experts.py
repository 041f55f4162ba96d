"""medistill experts: the networks that trajectory methods match, trained ahead of them."""

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..places import cache_folder
from .common import (
    AsJson,
    Compile,
    DataRoot,
    Device,
    Offline,
    Precision,
    Seed,
    Source,
    Spacing,
    Window,
    Workers,
    emit,
    extra_fields,
    guarded,
    optioned,
)
from .distill import Augment, BackboneName, NoFlip, read_augmentation

if TYPE_CHECKING:
    from ..records import State

Matching = Annotated[str, typer.Option(help="Whose experts: mtt, tesla, ftd, datm, att or hop_tm.")]


@guarded
def experts(
    context: typer.Context,
    source: Source,
    method: Matching = "mtt",
    backbone: BackboneName = "convnet-3-128",
    augment: Augment = "all",
    no_flip: NoFlip = False,
    precision: Precision = "float32",
    compile: Compile = "auto",
    workers: Workers = 1,
    device: Device = "auto",
    seed: Seed = 0,
    window: Window = None,
    spacing: Spacing = None,
    data_root: DataRoot = None,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Train the experts that a trajectory method matches, or find them, and say how good they are.

    They are kept for all budgets, rates and seeds of the method, and for methods whose experts
    train alike. Settings of the method are flags: --experts 20 --max-start 49 asks for 20 experts
    of 50 epochs. Stopped or killed, the next call goes on where it was.

    Example: medistill experts phantom --experts 5 --max-start 5 --backbone convnet-3-32
    """
    from ..backbones import backbone as read_backbone
    from ..budget import Budget
    from ..compute import Compute, find_device
    from ..data import load
    from ..distill import check
    from ..engine import local
    from ..errors import UsageError
    from ..methods import Task, make
    from ..methods.trajectory_matching import TrajectoryMatching
    from ..prepare import prepared

    chosen = make(method, extra_fields(context.args))
    if not isinstance(chosen, TrajectoryMatching):
        raise UsageError(
            f"found --method {method}, which has no experts; expected mtt or its heirs"
        )
    real = load(
        optioned(source, window=window, spacing=spacing), root=data_root, offline=offline, seed=seed
    ).train.to(find_device(device))
    augmentation, student = read_augmentation(augment, no_flip), read_backbone(backbone)
    task = Task(
        real, Budget(ipc=1), student, augmentation, Compute(precision), engine=local(workers)
    )
    check(chosen, task)
    begin = time.monotonic()
    kept = prepared(chosen, task, cache_folder(), compile)
    record = told(kept) | {"seconds": round(time.monotonic() - begin, 3)}
    best = record["accuracy"]
    text = (
        f"{record['experts']} experts, {min(record['epochs'])} to {max(record['epochs'])} epochs "
        f"to match, accuracy at their best {100 * min(best):.1f} to {100 * max(best):.1f}% on "
        f"images held out, {record['bytes'] / 1e6:.1f} MB"
    )
    emit(record, text, as_json)


def told(kept: "State") -> dict[str, Any]:
    """Return what a bank of experts holds, as one JSON object."""
    accuracy = kept["accuracy"].nan_to_num(0.0).amax(1)
    return {
        "experts": len(accuracy),
        "epochs": kept["usable"].tolist(),
        "accuracy": [round(float(value), 6) for value in accuracy],
        "bytes": sum(t.numel() * t.element_size() for t in kept.values()),
    }
