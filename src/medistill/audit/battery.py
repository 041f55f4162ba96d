"""The whole audit of a run: facts, copies, membership with both controls, and what was left out."""

import dataclasses
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch

from .. import __version__
from ..augment import Augmentation
from ..backbones import from_spec, to_spec
from ..budget import Budget, counted
from ..compute import PLAIN, Compute
from ..engine import Engine, Here
from ..errors import DataError, UsageError
from ..ledger import Ledger
from ..methods import Task, make
from ..model import train
from ..pictures import png, sheet
from ..pixels import denormalize
from ..prepare import prepared
from ..privacy import Guarantee, Unit
from ..probes import SketchSpec
from ..records import (
    Json,
    State,
    digest,
    from_record,
    kept_state,
    read_json,
    to_record,
    write_atomic,
    write_json,
)
from ..sets import Card, RealSet, Splits, SyntheticSet
from ..train import CPU
from .affordable import affordable, copying, in_time
from .attributes import attributes, subgroups
from .copies import Copies, copies
from .curves import LEVEL, RATES
from .facts import Fact, facts_of
from .mechanism import audit_mechanism, worst_patient
from .membership import (
    ATTACKS,
    Leak,
    Pool,
    Shadows,
    Way,
    attack,
    drowning,
    guessed,
    nothing_to_find,
    pool_of,
    shadows,
)
from .reconstruction import recovered
from .verdict import FORMAT, verdict

OF_THE_SET = "reconstruction, subgroups and attributes"
HERE: Engine = Here()
SHOWN = 8  # pairs of nearest images in the gallery
NUMBERS = 4  # of a release that is audited: noise is the same in each
FEWEST_IMAGES = 40
# What is looked at together: an area and each rate, of each attack, for two kinds of images.
LEVEL_OF_ALL = 1 - (1 - LEVEL) / (2 * len(ATTACKS) * (1 + len(RATES)))
# Until copies are known by heart: 400 are too few for students of 10 images per class on small sets
# (docs/controls.md), and an audit that finds nothing would then say nothing.
CONTROL_STEPS = 2000


def audit_run(
    folder: Path,
    splits: Splits,
    *,
    minutes: float = 10.0,
    models: int | None = None,
    images: int = 400,
    student_steps: int = 300,
    control_steps: int = CONTROL_STEPS,
    seed: int = 0,
    compute: Compute = PLAIN,
    engine: Engine = HERE,
    cache: Path | None = None,
    ledger: Ledger | None = None,
) -> Json:
    """Audit the set of a run folder, write audit.json and audit_copies.png there, and return it.

    Members are training images, others those of the validation split; the test split is not read.
    `models` times the whole way is gone again, each on images drawn by coins; unless given, as many
    as the minutes allow. What they do not allow is named in `left_out`; only copies are looked for
    whatever they say. There is no verdict on membership without both controls: copies of real
    images, which must be found, and members drawn anew, of whom nothing can be found.
    `control_steps` is the least length of the positive control's students: the longer, the surer
    copies are known by heart. `cache` holds what the run prepared (experts, banks), so that its
    start is found at once, and the control, which is the same for all runs on the same data.
    `ledger` says of which data a private release was made, whose digest the run does not have.
    Raises: DataError when the folder holds no finished run, or the data are not those of the run;
    UsageError when there are too few images.
    """
    begin = time.monotonic()
    splits = splits.to(CPU)  # sets and networks of an audit are small, and lie there
    made, run = SyntheticSet.load(folder / "synthetic.safetensors"), read_json(folder / "run.json")
    _check(made, run, splits)
    plain, splits = splits.train, _seen_by(made, splits)
    count = _asked_about(images, len(splits.train))
    today = datetime.now(UTC).date().isoformat()
    record: Json = {"format": FORMAT, "run": str(folder), "seed": seed, "date": today}
    record["set"], record["data"] = made.digest, counted(splits.train)
    record["facts"] = _facts(made, run, plain, ledger)
    record["copies"] = _copies_told(folder, made, splits, seed)
    left: list[str] = []
    parts = _of_the_release(run, left)
    parts[OF_THE_SET] = partial(_of_the_set, made, run, splits, plain, cache, left)
    record |= in_time(parts, begin + 60 * minutes, left)
    pool = pool_of(splits.train, splits.val, images=count, canaries=count // 5, seed=seed)
    way = way_of(run, student_steps, compute)
    control = copying(way, control_steps)
    rest = begin + 60 * minutes - time.monotonic()
    enough = affordable(pool, (way, control), models, seed, rest, left, engine.places)
    if enough:
        record |= _membership(pool, (way, control), enough, seed, engine, cache)
    record |= {"left_out": left, "seconds": round(time.monotonic() - begin, 3)}
    record["verdict"] = verdict(record)
    write_json(folder / "audit.json", record)
    return record


def _asked_about(images: int, all_images: int) -> int:
    """Return how many images are asked about: of fewer than that a round number, which tells less.

    Raises: UsageError when there are too few.

    Example:
        >>> _asked_about(400, 4708), _asked_about(400, 364), _asked_about(400, 41)
        (400, 300, 40)
    """
    if min(images, all_images) < FEWEST_IMAGES:
        more = "take larger data" if all_images < FEWEST_IMAGES else "give --images more"
        raise UsageError(
            f"found {min(images, all_images)} training images to ask about; expected "
            f"{FEWEST_IMAGES} or more: {more}"
        )
    if images <= all_images:
        return images
    step = int(10 ** (len(str(all_images)) - 1))
    return all_images // step * step


def _seen_by(made: SyntheticSet, splits: Splits) -> Splits:
    """Return the splits as a student of the set sees them: by its mean, std and whitening."""
    recipe = made.recipe
    card = dataclasses.replace(splits.train.card, mean=recipe.mean, std=recipe.std)
    parts = (dataclasses.replace(part, card=card) for part in splits)
    return Splits(*parts).whitened(made.whitening)


def _of_the_release(run: Json, left: list[str]) -> dict[str, Callable[[], Json]]:
    """Return what audits the private release that a run was made from, if there is one."""
    held = (run.get("sketch") or {}).get("privacy")
    if not held:
        left.append("mechanism: the run has no private release to audit")
        return {}
    promise = from_record(Guarantee, held)

    def look() -> Json:
        zeros = torch.zeros(NUMBERS, dtype=torch.int64)
        checked = audit_mechanism(zeros, worst_patient((NUMBERS,), promise.bound), promise)
        return {"mechanism": dataclasses.asdict(checked) | {"broken": checked.broken}}

    return {"mechanism": look}


def _of_the_set(
    made: SyntheticSet,
    run: Json,
    splits: Splits,
    plain: RealSet,
    cache: Path | None,
    left: list[str],
) -> Json:
    """Return what one student of the set as it is tells, and whether images show their start."""
    told: Json = {}
    method = make(run["method"], run["settings"])
    if method.start == "real" and not (run.get("sketch") or {}):
        looks = from_record(Augmentation, run["augmentation"])
        how = from_record(Compute, run["compute"])
        budget, backbone = from_record(Budget, run["budget"]), from_spec(run["backbone"])
        task = Task(plain, budget, backbone, augmentation=looks, compute=how)
        ready = dataclasses.replace(task, prepared=prepared(method, task, cache))
        back = recovered(made, method, ready, splits.train, run["seed"])
        if back is not None:
            told["reconstruction"] = dataclasses.asdict(back) | {"failed": back.failed}
    else:
        left.append(f"reconstruction: images started from {made.origin.start}")
    network, facts = train(made), splits.train.facts
    told["subgroups"] = [dataclasses.asdict(one) for one in subgroups(network, splits.val)]
    found = attributes(network, splits.train, splits.val) if facts else []
    told["attributes"] = [dataclasses.asdict(one) for one in found]
    if not found:
        left.append("attributes: the source has none with enough images of each value")
    return told


def way_of(run: Json, student_steps: int, compute: Compute) -> Way:
    """Return how the set of a run was made, to go that way again."""
    made = run.get("sketch") or {}
    held = made.get("privacy")
    return Way(
        make(run["method"], run["settings"]),
        from_record(Budget, run["budget"]),
        from_spec(run["backbone"]),
        run["steps"],
        student_steps,
        augmentation=from_record(Augmentation, run["augmentation"]),
        compute=compute,
        spec=from_record(SketchSpec, made["spec"]) if made else None,
        guarantee=from_record(Guarantee, held) if held else None,
    )


def _check(made: SyntheticSet, run: Json, splits: Splits) -> None:
    card = splits.train.card
    if made.origin.data_digest and made.origin.data_digest != card.digest:
        raise _other(card, run)
    if (made.card.classes, made.card.shape) != (card.classes, card.shape):
        raise DataError(f"found other classes or sizes in {card.name}; expected those of the run")
    if card.task == "multi-label":
        raise UsageError(f"found several labels of an image in {card.name}; expected one")


def _other(card: Card, run: Json) -> DataError:
    return DataError(
        f"found other data in {card.name} than the run was made from; expected the same: give "
        f"--data '{run['source']}', with the same --seed"
    )


def _facts(made: SyntheticSet, run: Json, real: RealSet, ledger: Ledger | None) -> list[Json]:
    """Return the facts, and whether nothing shows that the data are those of a private release.

    Raises: DataError when the ledger knows that they are others.
    """
    found = facts_of(made, run)
    held = (run.get("sketch") or {}).get("privacy")
    receipts = held["receipts"] if held else ()
    noted = [one for one in ledger.releases() if one.receipt in receipts] if ledger else []
    if len(noted) == 1 and noted[0].digest != real.digest:
        raise _other(real.card, run)
    if not made.origin.data_digest and len(noted) != 1:
        told = f"nothing shows that {real.card.name}, which attacks know, is what it was made from"
        found.append(Fact("data", "some", told))
    return [dataclasses.asdict(fact) for fact in found]


def _membership(
    pool: Pool,
    ways: tuple[Way, Way],
    models: int,
    seed: int,
    engine: Engine,
    cache: Path | None,
) -> Json:
    way = ways[0]
    own = shadows(pool, way, models=models, seed=seed, engine=engine)
    held = {
        "membership": own,
        "positive_control": _control(pool, ways[1], models, seed + 1, engine, cache),
        "negative_control": nothing_to_find(pool, own, seed),
    }
    delta = way.guarantee.delta if way.guarantee else 0.0
    runs = {name: dataclasses.asdict(guessed(pool, one, delta)) for name, one in held.items()}
    own_run = runs.pop("membership") | {"claimed": _claimed(pool, way.guarantee)}
    return {
        "models": models,
        "images": len(pool.real),
        "unit": _unit(pool),
        "units": len(pool.first),
        "canaries": int(pool.canaries.numpy()[pool.first].sum()),
        "noise": drowning(pool, way, own.inside),
        **{name: _leaks(pool, one) for name, one in held.items()},
        "one_run": own_run | {"controls": runs},
    }


def _control(
    pool: Pool, way: Way, models: int, seed: int, engine: Engine, cache: Path | None
) -> Shadows:
    """Return models of copies: those of the cache where they were asked before."""
    what = {
        "pool": pool.real.digest,
        "units": len(pool.first),
        "others": pool.outside.digest,
        "card": to_record(pool.real.card),
        "backbone": to_spec(way.backbone),
        "steps": (way.student_steps, way.rate, way.batch),
        "compute": to_record(way.compute),
        "models": models,
        "seed": seed,
        "torch": torch.__version__,
        "version": __version__,
    }
    path = cache / "controls" / f"{digest(what)[:24]}.safetensors" if cache else None

    def make() -> State:
        held = shadows(pool, way, models=models, seed=seed, engine=engine)
        return {name: torch.from_numpy(one) for name, one in held._asdict().items()}

    state = kept_state(path, make, {"control": what})
    return Shadows(*(state[name].numpy() for name in Shadows._fields))


def _unit(pool: Pool) -> Unit:
    """Return who is in or out as one."""
    return "patient" if pool.real.card.patients and pool.real.groups is not None else "image"


def _claimed(pool: Pool, guarantee: Guarantee | None) -> float | None:
    """Return the epsilon that is promised for who was asked about, if one is."""
    if guarantee is None:
        return None
    # A patient of one image is an image too.
    same = guarantee.unit == _unit(pool) or len(pool.first) == len(pool.real)
    return guarantee.epsilon if same else None


def _leaks(pool: Pool, held: Shadows) -> Json:
    def told(leak: Leak) -> Json:
        sides = {"natural": leak.natural, "canaries": leak.canaries}
        return {name: dataclasses.asdict(side) for name, side in sides.items() if side}

    return {leak.attack: told(leak) for leak in attack(pool, held, level=LEVEL_OF_ALL)}


def _copies_told(folder: Path, made: SyntheticSet, splits: Splits, seed: int) -> list[Json]:
    """Return what was found of copies, and write the gallery of the nearest."""
    found = copies(made, splits.train, splits.val, seed=seed)
    write_atomic(folder / "audit_copies.png", _gallery(made, found[0], splits.train))
    told = []
    for one in found:
        record = dataclasses.asdict(one) | {"failed": one.failed}
        told.append(record | {"nearest": record["nearest"][:SHOWN]})
    return told


def _gallery(made: SyntheticSet, found: Copies, members: RealSet) -> bytes:
    """Draw the synthetic images that lie nearest to a real one, and that one below."""
    images, _ = made.to_train()
    pairs = found.nearest[:SHOWN]
    shown = images[[pair.synthetic for pair in pairs]]
    left = denormalize(shown, made.recipe.mean, made.recipe.std)
    right = members.images[[pair.real for pair in pairs]].float() / members.full
    return png(sheet([("synthetic", left.clamp(0, 1)), ("nearest real", right)]))
