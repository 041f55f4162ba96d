"""medistill train: a model from a run folder."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError, extra
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
    at_least_one,
    emit,
    guarded,
    interval_text,
    optioned,
)
from .package import Threshold, Trust, Unsigned, is_package

Json = dict[str, Any]
WIDE = 0.2  # of an interval that hardly anything misses

Students = Annotated[int, typer.Option(help="Networks to train and test; the first one is saved.")]
Onnx = Annotated[Path | None, typer.Option(help="Also write the model as ONNX (extra onnx).")]
Bundle = Annotated[
    Path | None, typer.Option(help="Also write the model as a MONAI Bundle, a folder.")
]
Sites = Annotated[
    bool, typer.Option("--sites/--no-sites", help="Also train on each site alone, and without it.")
]

if TYPE_CHECKING:
    from ..backbones import Network
    from ..model import Given
    from ..sets import Splits, SyntheticSet


@guarded
def train(
    sets: Annotated[
        list[Path], typer.Argument(help="Run folders that distill wrote, or packages.")
    ],
    out: Out,
    trust: Trust = None,
    unsigned: Unsigned = False,
    threshold: Threshold = 1,
    data: Annotated[str | None, typer.Option(help=f"Local data to test on. {SOURCE_HELP}")] = None,
    sites: Sites = True,
    students: Students = 1,
    onnx: Onnx = None,
    bundle: Bundle = None,
    device: Device = "auto",
    seed: Seed = 0,
    window: Window = None,
    spacing: Spacing = None,
    data_root: DataRoot = None,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Train a model on one or several synthetic sets, test it on local data, save the weights.

    The recipe is the one that evaluate chose on validation data, where it has run. Packages are
    checked first, as verify does. Where --data is what the sender tested on, the score is held
    against the declared one. Several sets: each is normalized by its own statistics and every class
    of every site counts alike; on local validation data it is told what each site is worth. The
    model is a safetensors file with the recipe in its header.

    Example: medistill train runs/first --out model.safetensors --data phantom
    """
    from ..compute import find_device
    from ..data import load
    from ..model import save, train_together

    at_least_one(students=students)

    _check_places(out, onnx, bundle)
    how: Json = {"seed": seed, "device": find_device(device)}
    given = [_given(path, (trust, unsigned, threshold)) for path in sets]
    if len({(one.synthetic.digest, one.synthetic.recipe.mean) for one in given}) < len(given):
        raise UsageError("found the same set twice; expected each once")
    splits = None
    if data:
        where = optioned(data, window=window, spacing=spacing)
        splits = load(where, root=data_root, offline=offline, seed=seed).to(how["device"])
    several = [how | {"seed": seed + number} for number in range(students)]
    networks = [train_together([one.synthetic for one in given], **one) for one in several]
    first = given[0].synthetic
    record: Json = {"model": str(out), "packages": [one.name for one in given]}
    record |= _tested(networks, given, splits, how if sites else None)
    save(out, networks[0], first.recipe, first.card)
    record["recipe"] = dataclasses.asdict(first.recipe)
    emit(record, _text(record, data), as_json)  # before an export that may be refused
    _hand_over(networks[0], first, onnx, bundle)


def _check_places(out: Path, onnx: Path | None, bundle: Path | None) -> None:
    """Refuse, before the work and not after it, what could not be written."""
    from ..records import refuse_existing

    places = [place for place in (out, onnx, bundle) if place]
    refuse_existing(*places)
    if len({place.resolve() for place in places}) < len(places):
        raise UsageError("found one place for two of --out, --onnx and --bundle; expected others")
    for needed in ("onnx", "onnxscript") if onnx else ():
        extra(needed, "onnx")


def _hand_over(
    network: "Network", made: "SyntheticSet", onnx: Path | None, bundle: Path | None
) -> None:
    from ..handover import write_bundle, write_onnx

    if onnx:
        write_onnx(onnx, network, made.recipe, made.card)
    if bundle:
        write_bundle(bundle, network, made.recipe, made.card)


def _tested(
    networks: "list[Network]", given: "list[Given]", splits: "Splits | None", how: Json | None
) -> Json:
    """Return the local scores, what they are held against, and what each site is worth."""
    from ..compute import peak_memory
    from ..metrics import score
    from ..model import influence, test, test_together

    one = given[0] if len(given) == 1 else None
    local, worth, reached = None, None, None
    if splits and one:
        first = one.synthetic
        found = [test(network, splits.test, first.recipe, first.card) for network in networks]
        local = found[0]
        if one.declared and splits.test.card.name == one.declared_on:
            reached = dataclasses.asdict(score([each["accuracy"] for each in found]))
    elif splits:
        local = test_together(networks[0], splits.test, given)
        if how:
            own = test_together(networks[0], splits.val, given)["accuracy"]
            worth = {"together": own, "sites": influence(given, splits.val, **how)}
    return {
        "declared": one.declared if one else None,
        "declared_on": one.declared_on if one else "",
        "reproduced": reached,
        "local": local,
        "influence": worth,
        "peak_memory_bytes": peak_memory(),
    }


def _text(record: Json, data: str | None) -> str:
    lines = [f"model in {record['model']}"]
    local, told, worth = (record[name] for name in ("local", "declared", "influence"))
    if local:
        area = "undefined" if local["auc"] is None else f"{100 * local['auc']:.1f}"
        lines.append(f"accuracy on {data}: {100 * local['accuracy']:.1f}, AUC {area}")
    if told:
        lines.append(f"declared accuracy: {interval_text(told)} on {record['declared_on']}")
    if record["reproduced"]:
        lines.append(_held_against(record["reproduced"], told))
    if worth:
        lines.append(f"on validation data, all sites together: {100 * worth['together']:.1f}")
        for row in worth["sites"]:
            gain = 100 * (worth["together"] - row["without"])
            lines.append(
                f"  {row['site']}: alone {100 * row['alone']:.1f}, all others without it "
                f"{100 * row['without']:.1f} (it brings {gain:+.1f} points)"
            )
    return "\n".join(lines)


def _given(path: Path, by: tuple[Path | None, bool, int]) -> "Given":
    """Return a set with the recipe that was chosen for it, and what was declared of it."""
    from ..model import Given, declared

    trust, unsigned, threshold = by
    if not is_package(path, trust):
        synthetic, recipe, scores = declared(path)
        chosen = dataclasses.replace(synthetic, recipe=recipe)
        return Given(str(path), chosen, scores["accuracy"] if scores else None, synthetic.card.name)
    from ..package import read

    found = read(path, trust, unsigned=unsigned, threshold=threshold)
    told = found.manifest
    name = f"{told.site or told.name}"
    return Given(name, found.synthetic, told.declared, told.declared_on)


def _held_against(reached: Json, told: Json) -> str:
    """Say whether the students reached what was declared, with a point to spare."""
    low, high = (told["mean"] if told[end] is None else told[end] for end in ("low", "high"))
    mine = f"{interval_text(reached)} by {reached['n']} student(s)"
    apart = 100 * abs(reached["mean"] - told["mean"])
    if apart <= 1:
        return f"reproduced: {mine}, within a point of what was declared"
    if high - low > WIDE:
        return f"cannot tell: {mine}; the declared interval is too wide to be missed: --students 5"
    if low <= reached["mean"] <= high:
        return f"reproduced: {mine}, within the declared interval ({apart:.1f} points away)"
    side = "below" if reached["mean"] < low else "above"
    return (
        f"NOT reproduced: {mine}, {apart:.1f} points {side} what was declared (if these are the "
        "sender's data: only their name was compared)"
    )
