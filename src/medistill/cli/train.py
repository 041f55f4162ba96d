"""medistill train: a model from a run folder."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from .common import (
    SOURCE_HELP,
    AsJson,
    DataRoot,
    Device,
    Offline,
    Out,
    Seed,
    Spacing,
    Window,
    emit,
    guarded,
    interval_text,
    optioned,
)


@guarded
def train(
    run: Annotated[Path, typer.Argument(help="A run folder that distill wrote.")],
    out: Out,
    data: Annotated[str | None, typer.Option(help=f"Local data to test on. {SOURCE_HELP}")] = None,
    device: Device = "auto",
    seed: Seed = 0,
    window: Window = None,
    spacing: Spacing = None,
    data_root: DataRoot = None,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Train a model on a synthetic set by its recipe, test it on local data, save the weights.

    The recipe is the one that evaluate chose on validation data, where it has run. The model is a
    safetensors file with the recipe in its header.

    Example: medistill train runs/first --out model.safetensors --data phantom
    """
    from ..compute import find_device, peak_memory
    from ..data import load
    from ..errors import RunRefused
    from ..model import declared, save, test
    from ..model import train as train_model

    if out.exists():
        raise RunRefused(f"found {out} already there; expected a new file: choose another --out")
    where = find_device(device)
    synthetic, recipe, scores = declared(run)
    splits = (
        load(
            optioned(data, window=window, spacing=spacing),
            root=data_root,
            offline=offline,
            seed=seed,
        )
        if data
        else None
    )
    network = train_model(synthetic, recipe, seed=seed, device=where)
    local = test(network, splits.test.to(where), recipe, synthetic.card) if splits else None
    save(out, network, recipe, synthetic.card)
    told = scores["accuracy"] if scores else None
    lines = [f"model in {out}"]
    if local:
        area = "undefined" if local["auc"] is None else f"{100 * local['auc']:.1f}"
        lines.append(f"accuracy on {data}: {100 * local['accuracy']:.1f}, AUC {area}")
    if told:
        lines.append(f"declared accuracy: {interval_text(told)}")
    record = {
        "model": str(out),
        "packages": [str(run)],
        "declared": told,
        "reproduced": None,
        "local": local,
        "recipe": dataclasses.asdict(recipe),
        "peak_memory_bytes": peak_memory(),
    }
    emit(record, "\n".join(lines), as_json)
