"""medistill train: a model from a run folder."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
from .package import Trust, Unsigned

if TYPE_CHECKING:
    from ..records import Json
    from ..sets import Recipe, SyntheticSet


@guarded
def train(
    run: Annotated[Path, typer.Argument(help="A run folder that distill wrote, or a package.")],
    out: Out,
    trust: Trust = None,
    unsigned: Unsigned = False,
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

    The recipe is the one that evaluate chose on validation data, where it has run. A package is
    checked first, as verify does. Where --data is what its sender tested on, the score is held
    against the declared one. The model is a safetensors file with the recipe in its header.

    Example: medistill train runs/first --out model.safetensors --data phantom
    """
    from ..compute import find_device, peak_memory
    from ..data import load
    from ..errors import RunRefused
    from ..model import save, test
    from ..model import train as train_model

    if out.exists():
        raise RunRefused(f"found {out} already there; expected a new file: choose another --out")
    where = find_device(device)
    synthetic, recipe, told, told_on = _given(run, trust, unsigned)
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
    lines = [f"model in {out}"]
    if local:
        area = "undefined" if local["auc"] is None else f"{100 * local['auc']:.1f}"
        lines.append(f"accuracy on {data}: {100 * local['accuracy']:.1f}, AUC {area}")
    if told:
        lines.append(
            f"declared accuracy: {interval_text(told)}" + (f" on {told_on}" * bool(told_on))
        )
    reached = None
    if told and local and splits and splits.test.card.name == told_on:
        reached = {"mean": local["accuracy"], "low": None, "high": None, "n": 1}
        lines.append(_held_against(local["accuracy"], told))
    record = {
        "model": str(out),
        "packages": [str(run)],
        "declared": told,
        "reproduced": reached,
        "local": local,
        "recipe": dataclasses.asdict(recipe),
        "peak_memory_bytes": peak_memory(),
    }
    emit(record, "\n".join(lines), as_json)


def _given(
    path: Path, trust: Path | None, unsigned: bool
) -> tuple["SyntheticSet", "Recipe", "Json | None", str]:
    """Return a set, its recipe, and its declared accuracy with the name of the data it is of."""
    from ..model import declared

    if (path / "run.json").is_file():
        synthetic, recipe, scores = declared(path)
        return synthetic, recipe, scores["accuracy"] if scores else None, synthetic.card.name
    from ..package import read

    found = read(path, trust, unsigned=unsigned)
    told = found.manifest
    return found.synthetic, told.recipe, told.declared, told.declared_on


def _held_against(reached: float, told: "Json") -> str:
    """Say whether one student reached what was declared, with a point to spare."""
    low, high = (told["mean"] if told[end] is None else told[end] for end in ("low", "high"))
    if low - 0.01 <= reached <= high + 0.01:
        return "reproduced: within the declared interval, give or take a point"
    side = "below" if reached < low else "above"
    return (
        f"NOT reproduced: {100 * abs(reached - told['mean']):.1f} points {side} what was declared"
    )
