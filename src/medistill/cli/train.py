"""medistill train: a model from a run folder."""

import dataclasses
import itertools
import math
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
MISSED = "not reproduced"

Students = Annotated[int, typer.Option(help="Networks to train and test; the first is saved.")]
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
    from ..sets import Card, Recipe, Splits, SyntheticSet


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
    of every site counts alike; on local validation data it is told what each site is worth, and the
    model takes images by the mean and std of --data (without it by the mean over the sites). The
    model is a safetensors file with the recipe in its header. Where --data is the source that a run
    was made from and split by seed (folders, tables), --seed must be the one of distill.

    Example: medistill train runs/first --out model.safetensors --data phantom
    """
    from ..compute import find_device
    from ..data import load
    from ..model import recipe_together, save

    at_least_one(students=students)
    _check_places(out, onnx, bundle)
    how: Json = {"seed": seed, "device": find_device(device)}
    given = [_given(path, (trust, unsigned, threshold)) for path in sets]
    _check_once(given)
    splits = None
    if data:
        where = optioned(data, window=window, spacing=spacing)
        splits = load(where, root=data_root, offline=offline, seed=seed).to(how["device"])
    local = splits.test.card if splits else None
    made = [one.synthetic for one in given]
    first = made[0].card
    if splits:
        _check_local(splits, made)
    networks = _trained(made, students, how)
    recipe = recipe_together(made, local)
    save(out, networks[0], recipe, first)
    record: Json = {"model": str(out), "packages": [one.name for one in given]}
    record |= _tested(networks, given, splits, how if sites else None)
    record["recipe"] = dataclasses.asdict(recipe)
    emit(record, _text(record, data), as_json)  # before an export that may be refused
    _hand_over(networks[0], recipe, first, onnx, bundle)


def _trained(made: "list[SyntheticSet]", students: int, how: Json) -> "list[Network]":
    from ..model import train_together
    from ..progress import progress

    networks = []
    with progress("networks", students) as advance:
        for number in range(students):
            networks.append(train_together(made, **how | {"seed": how["seed"] + number}))
            advance()
    return networks


def _check_places(out: Path, onnx: Path | None, bundle: Path | None) -> None:
    """Refuse, before the work and not after it, what could not be written."""
    from ..records import check_writable, refuse_existing

    places = [place for place in (out, onnx, bundle) if place]
    refuse_existing(*places)
    for place in places:
        check_writable(place)
    if len({place.resolve() for place in places}) < len(places):
        raise UsageError("found one place for two of --out, --onnx and --bundle; expected others")
    for needed in ("onnx", "onnxscript") if onnx else ():
        extra(needed, "onnx")


def _check_once(given: "list[Given]") -> None:
    """Refuse sets that would count twice."""
    if len({(one.synthetic.digest, one.synthetic.recipe.mean) for one in given}) < len(given):
        raise UsageError("found the same set twice; expected each once")
    for one, other in itertools.combinations(given, 2):
        if one.version_of == other.version_of and one.keys & other.keys:
            raise UsageError(
                f"found two versions of the package {one.version_of[-1]}; expected one: the newest "
                "(or, of two sites, packages that name each by --site)"
            )


def _check_local(splits: "Splits", made: "list[SyntheticSet]") -> None:
    """Refuse, before the work, local data of another kind; say where other rules made it."""
    from ..evaluate import check_split
    from ..progress import say
    from ..train import check_kind

    local, recipe = splits.test.card, made[0].recipe
    check_kind(local, made[0].card)
    for one in made:
        check_split(one, splits.train.card)
    if recipe.intensity and local.intensity and local.intensity != recipe.intensity:
        say(
            f"local intensities are not made as the sender's: {local.intensity}, there "
            f"{recipe.intensity}"
        )


def _hand_over(
    network: "Network", recipe: "Recipe", card: "Card", onnx: Path | None, bundle: Path | None
) -> None:
    from ..handover import write_bundle, write_onnx

    if onnx:
        write_onnx(onnx, network, recipe, card)
    if bundle:
        write_bundle(bundle, network, recipe, card)


def _tested(
    networks: "list[Network]", given: "list[Given]", splits: "Splits | None", how: Json | None
) -> Json:
    """Return the local scores, what they are held against, and what each site is worth."""
    from ..compute import peak_memory
    from ..metrics import score
    from ..model import influence, test_together
    from ..progress import progress

    one = given[0] if len(given) == 1 else None
    local, worth, each, reached = None, None, None, None
    if splits:
        found = [test_together(network, splits.test, given) for network in networks]
        local = found[0]
        each = dataclasses.asdict(score([one["accuracy"] for one in found]))
        if one and one.declared and splits.test.card.name == one.declared_on:
            reached = each | {"verdict": _verdict(each, one.declared)}
    if splits and how and not one:
        own = test_together(networks[0], splits.val, given)["accuracy"]
        worth = {"together": own, "sites": []}
        with progress("sites", len(given)) as advance:
            for row in influence(given, splits.val, **how):
                worth["sites"].append(row)
                advance()
    return {
        "declared": one.declared if one else None,
        "declared_on": one.declared_on if one else "",
        "reproduced": reached,
        "local": local,
        "students": each,
        "influence": worth,
        "peak_memory_bytes": peak_memory(),
    }


def _text(record: Json, data: str | None) -> str:
    lines = [f"model in {record['model']}"]
    local, told, worth = (record[name] for name in ("local", "declared", "influence"))
    if local:
        area = "undefined" if local["auc"] is None else f"{100 * local['auc']:.1f}"
        lines.append(f"accuracy on {data}: {100 * local['accuracy']:.1f}, AUC {area}")
    if local and record["students"]["n"] > 1:
        lines.append(f"all {record['students']['n']}: {interval_text(record['students'])}")
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
        synthetic, recipe, told = declared(path)
        chosen = dataclasses.replace(synthetic, recipe=recipe)
        if told is None:
            return Given(str(path), chosen)
        return Given(str(path), chosen, told["synthetic"]["accuracy"], told["data"]["name"])
    from ..package import read

    found = read(path, trust, unsigned=unsigned, threshold=threshold)
    manifest = found.manifest
    name, keys = manifest.site or manifest.name, frozenset(one.keyid for one in found.signers)
    version_of = (manifest.site, manifest.name)
    return Given(name, found.synthetic, manifest.declared, manifest.declared_on, version_of, keys)


def _verdict(reached: Json, told: Json) -> str:
    """Say whether students reached what was declared: within a point, or as far as they scatter.

    The means of n and of m students of one kind differ by t s sqrt(1/n + 1/m) or less in 95 of 100
    draws; t s / sqrt(n) is half the declared interval.
    """
    low, high, n = (told[name] for name in ("low", "high", "n"))
    apart = abs(reached["mean"] - told["mean"])
    if 100 * apart <= 1:
        return "within a point"
    half = math.inf if low is None else (high - low) / 2 * math.sqrt(1 + n / reached["n"])
    if 2 * half > WIDE:
        return "cannot tell"
    return "as students scatter" if apart <= half else MISSED


def _advice(told: Json) -> str:
    """Say whose students are too few to compare scores by."""
    if told["low"] is None or told["high"] - told["low"] >= WIDE:
        return "declared scores are of too few students: ask the sender for more"
    return "your students are too few: --students 5, or more"


def _held_against(reached: Json, told: Json) -> str:
    """Say in a line what came of it."""
    mine = f"{interval_text(reached)} by {reached['n']} student(s)"
    apart = 100 * (reached["mean"] - told["mean"])
    return {
        "within a point": f"reproduced: {mine}, within a point of what was declared",
        "cannot tell": f"cannot tell: {mine}; {_advice(told)}",
        "as students scatter": f"reproduced: {mine}, {apart:+.1f} points from what was declared, "
        f"as far as students scatter",
        MISSED: f"NOT reproduced: {mine}, {apart:+.1f} points from what was declared (if these are "
        "the sender's data: only their name was compared)",
    }[reached["verdict"]]
