"""medistill sketch and merge: sums of a set, and the sums of several."""

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Literal

import typer

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
    Window,
    Workers,
    emit,
    guarded,
    optioned,
)
from .distill import SKETCH, Augment, BackboneName, NoFlip, read_augmentation
from .private import (
    PLAIN,
    PRIVATE,
    classes_of,
    guarantee_text,
    needs_epsilon,
    plan_record,
    plan_text,
)

Networks = Annotated[
    int | None, typer.Option(help="Random networks that look at the images: 20 unless given.")
]
Frequencies = Annotated[
    int | None,
    typer.Option(
        help="Random frequencies for each stage of each network: 512 unless given; 128 with "
        "--epsilon, for noise grows with their number."
    ),
]
Scale = Annotated[
    float, typer.Option(help="Size of the frequencies; larger ones see finer detail.")
]
Layers = Annotated[
    Literal["all", "last"] | None,
    typer.Option(
        help="Look at what all stages of a network give, or at the last alone; last with --epsilon."
    ),
]
Epsilon = Annotated[
    float | None,
    typer.Option(help="Make it differentially private: epsilon of each unit, as 1 (extra dp)."),
]
Delta = Annotated[float, typer.Option(help="With --epsilon: less than 1 / number of units.")]
UnitName = Annotated[
    Literal["patient", "image"],
    typer.Option(help="Whom --epsilon protects; image: only where no patient has two."),
]
Classes = Annotated[
    str | None,
    typer.Option(help="With --epsilon: the public list of classes, commas, in the data's order."),
]
LedgerFile = Annotated[
    Path | None,
    typer.Option(help="Where releases are noted; $MEDISTILL_LEDGER or the user's unless given."),
]
Limit = Annotated[
    float | None,
    typer.Option(help="Refuse where all releases of these data would go beyond this epsilon."),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Say how noisy each class would be; release nothing."),
]
Mean = Annotated[
    list[float] | None,
    typer.Option(help="Public normalization, repeated for each channel; with --std."),
]
Std = Annotated[list[float] | None, typer.Option(help="See --mean.")]


@guarded
def sketch(
    source: Source,
    out: Out,
    backbone: BackboneName = "convnet-3-128",
    networks: Networks = None,
    frequencies: Frequencies = None,
    scale: Scale = 1.0,
    layers: Layers = None,
    augment: Augment = "all",
    no_flip: NoFlip = False,
    mean: Mean = None,
    std: Std = None,
    epsilon: Epsilon = None,
    delta: Delta = 1e-5,
    unit: UnitName = "patient",
    classes: Classes = None,
    ledger: LedgerFile = None,
    limit: Limit = None,
    dry_run: DryRun = False,
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
    """Sketch a training split: one pass, a small file, and the images are not needed any more.

    A sketch is a sum over images, so sketches of several sites or shards add up (merge) where they
    were made with the same settings, --seed, --mean and --std included. It is not private by
    itself: with --epsilon one release of noise makes it so, for all that is made from it later.

    Example: medistill sketch phantom --networks 4 --backbone convnet-3-16 --out phantom.sketch
    """
    from ..backbones import backbone as read_backbone
    from ..backbones import to_spec
    from ..compute import Compute, find_device, peak_memory
    from ..data import load
    from ..engine import local
    from ..ledger import Ledger, ledger_file
    from ..private_sketch import plan, private_sketch
    from ..records import to_record
    from ..sets import normalized_by
    from ..sketch import SketchSpec
    from ..sketch import sketch as sketch_of

    _check_out(out)
    where, student = find_device(device), read_backbone(backbone)
    augmentation = read_augmentation(augment, no_flip)
    source = optioned(source, window=window, spacing=spacing)
    real = load(source, root=data_root, offline=offline, seed=seed).train.to(where)
    if mean or std:
        real = dataclasses.replace(real, card=normalized_by(real.card, mean or (), std or ()))
    if not real.card.flips:
        augmentation = augmentation.without_flips()
    looks = to_spec(student), to_record(augmentation)
    given = {"networks": networks, "frequencies": frequencies, "layers": layers}
    usual = PLAIN if epsilon is None else PRIVATE
    chosen = usual | {name: value for name, value in given.items() if value is not None}
    spec = SketchSpec(*looks, scale=scale, seed=seed, **chosen)
    begin, compute = time.monotonic(), Compute(precision)
    if epsilon is None:
        needs_epsilon(dry_run=dry_run, classes=classes, ledger=ledger, limit=limit)
        made = sketch_of(real, spec, compute, local(workers), compile)
    else:
        public = classes_of(classes, source, real.card)
        about = plan(real, spec, epsilon=epsilon, delta=delta, unit=unit, classes=public)
        if dry_run:
            emit(plan_record(about), plan_text(about), as_json)
            return
        held = Ledger(ledger or ledger_file(), limit)
        made = private_sketch(real, spec, about, held, compute, local(workers))
    made.save(out)
    taken = {"seconds": round(time.monotonic() - begin, 3), "peak_memory_bytes": peak_memory()}
    images, size = int(made.counts.sum()), out.stat().st_size
    record = {"sketch": str(out), "images": images, "bytes": size, **taken}
    text = f"{images} images in {out}, {size:,} bytes"
    if epsilon is not None:
        together = held.together(real.card.name, real.digest, delta)
        record |= {"together": together, **plan_record(about)}
        text = f"about {text}\n{guarantee_text(record)}\nall releases of these data: epsilon "
        text += f"{together:.2f} at delta {delta:g}, noted in {held.path}"
    emit(record, f"{text}\nnext: medistill distill {out} --method sketch --out RUN", as_json)


@guarded
def merge(
    sketches: Annotated[list[Path], typer.Argument(help="Sketches made with the same settings.")],
    out: Out,
    as_json: AsJson = False,
) -> None:
    """Add sketches up: the sketch of all their images, to the last bit.

    Sketches that were made with other settings are refused, and the field that differs is named.

    Example: medistill merge a.sketch b.sketch --out both.sketch
    """
    from ..sketch import Sketch
    from ..sketch import merge as merge_all

    _check_out(out)
    made = merge_all([Sketch.load(path) for path in sketches])
    made.save(out)
    images = int(made.counts.sum())
    record = {"sketch": str(out), "sketches": len(sketches), "images": images}
    emit(record, f"{len(sketches)} sketches of {images} images in {out}", as_json)


def _check_out(out: Path) -> None:
    """Refuse a file that is there, or whose name later commands would not take for a sketch."""
    from ..errors import RunRefused, UsageError

    if out.suffix != SKETCH:
        raise UsageError(f"found --out {out}; expected a name that ends in {SKETCH}")
    if out.exists():
        raise RunRefused(f"found {out} already there; expected a new file: choose another --out")
