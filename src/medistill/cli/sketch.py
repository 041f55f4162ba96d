"""medistill sketch and merge: sums of a set, and the sums of several."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import typer

from .common import (
    AsJson,
    Compile,
    DataRoot,
    Device,
    LedgerFile,
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
    PRIVATE,
    Asked,
    classes_of,
    needs_epsilon,
    plan_of,
    plan_record,
    plan_text,
    released,
)

if TYPE_CHECKING:
    from ..ledger import Ledger
    from ..probes import SketchSpec
    from ..records import Json
    from ..sets import RealSet
    from ..sketch import Sketch

Networks = Annotated[
    int | None,
    typer.Option(help="Random networks that look at the images: 20, or 10 with --epsilon."),
]
Frequencies = Annotated[
    int | None,
    typer.Option(
        help="Random frequencies for each stage of each network: 512 unless given; 128 with "
        "--epsilon, for noise grows with their number."
    ),
]
Scale = Annotated[
    float | None,
    typer.Option(help="Size of the frequencies; larger ones see finer detail. 0.5 (1 if private)."),
]
Layers = Annotated[
    Literal["all", "last"] | None,
    typer.Option(
        help="Look at what all stages of a network give, or at the last alone; last with --epsilon."
    ),
]
Moments = Annotated[
    int | None,
    typer.Option(
        help="Keep mean and covariance of each class at so many of the lowest frequencies along "
        "each axis (8 is plenty), for distill --start class-mean; not with --epsilon."
    ),
]
Epsilon = Annotated[
    float | None,
    typer.Option(help="Make it differentially private: epsilon of each unit, as 1 (extra dp)."),
]
Delta = Annotated[
    float | None,
    typer.Option(help="With --epsilon: less than 1 / number of units; 1e-5 unless given."),
]
UnitName = Annotated[
    Literal["patient", "image"] | None,
    typer.Option(
        help="Whom --epsilon protects: patient unless given; image only where no patient has two."
    ),
]
Classes = Annotated[
    str | None,
    typer.Option(help="With --epsilon: the public list of classes, commas, in the data's order."),
]
Limit = Annotated[
    float | None,
    typer.Option(help="Refuse where all releases of these data would go beyond this epsilon."),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Say how noisy each class would be; release nothing."),
]
AcceptNoise = Annotated[
    bool, typer.Option("--accept-noise", help="Release even where the noise drowns a class.")
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
    scale: Scale = None,
    layers: Layers = None,
    moments: Moments = None,
    augment: Augment = "all",
    no_flip: NoFlip = False,
    mean: Mean = None,
    std: Std = None,
    epsilon: Epsilon = None,
    delta: Delta = None,
    unit: UnitName = None,
    classes: Classes = None,
    ledger: LedgerFile = None,
    limit: Limit = None,
    dry_run: DryRun = False,
    accept_noise: AcceptNoise = False,
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
    _check_out(out)
    source = optioned(source, window=window, spacing=spacing)
    real = _read(source, (data_root, offline, seed), (device, epsilon), mean or (), std or ())
    counts = {"networks": networks, "frequencies": frequencies, "moments": moments}
    asked = {**counts, "scale": scale, "layers": layers}
    spec = _spec(real, backbone, (augment, no_flip), asked, epsilon, seed)
    way = _Way(precision, workers, compile)
    if epsilon is None:
        own = {"classes": classes, "ledger": ledger, "limit": limit, "accept_noise": accept_noise}
        needs_epsilon(dry_run=dry_run, delta=delta, unit=unit, **own)
        _write(out, partial(_plain, real, spec, way), as_json)
        return
    public = classes_of(classes, source, real.card)
    budget = (epsilon, 1e-5 if delta is None else delta, unit or "patient", public)
    asked_for = Asked(*budget, ledger, limit, accept_noise)
    if dry_run:
        about = plan_of(real, spec, asked_for)
        emit(plan_record(about), plan_text(about), as_json)
    else:
        _write(out, partial(_private, real, spec, way, asked_for), as_json)


def _proved(device: str, epsilon: float | None) -> str:
    """Return the device; with epsilon the processor, where no image moves another's numbers.

    Raises: UsageError when another device is asked for.
    """
    from ..errors import UsageError

    if epsilon is None:
        return device
    if device not in ("auto", "cpu"):
        raise UsageError(
            f"found --device {device} with --epsilon; expected cpu: nobody has shown that a GPU "
            "computes each image alone, to the last bit (docs/privacy.md)"
        )
    return "cpu"


class _Way(NamedTuple):
    precision: Literal["float32", "bfloat16"]
    workers: int
    compile: Literal["auto", "on", "off"]


_Made = tuple["Sketch", str, "Json"]


def _plain(real: "RealSet", spec: "SketchSpec", way: _Way) -> _Made:
    from ..compute import Compute
    from ..engine import local
    from ..sketch import sketch as sketch_of

    made = sketch_of(real, spec, Compute(way.precision), local(way.workers), way.compile)
    return made, "", {}


def _private(
    real: "RealSet",
    spec: "SketchSpec",
    way: _Way,
    asked: Asked,
) -> _Made:
    from ..compute import Compute
    from ..engine import local
    from ..errors import UsageError

    if way.compile == "on":
        raise UsageError("found --compile on with --epsilon; expected auto or off")
    return released(real, spec, asked, Compute(way.precision), local(way.workers))


def _write(out: Path, make: Callable[[], _Made], as_json: bool) -> None:
    """Make a sketch, write it, and say what it took."""
    from ..compute import peak_memory

    begin = time.monotonic()
    made, text, record = make()
    made.save(out)
    taken = {"seconds": round(time.monotonic() - begin, 3), "peak_memory_bytes": peak_memory()}
    images, size = int(made.counts.sum()), out.stat().st_size
    lines = [f"{images} images in {out}, {size:,} bytes", *([text] if text else [])]
    lines.append(f"next: medistill distill {out} --method sketch --out RUN")
    found = {"sketch": str(out), "images": images, "bytes": size, **taken, **record}
    emit(found, "\n".join(lines), as_json)


def _read(
    source: str,
    where: tuple[Path | None, bool, int],
    on: tuple[str, float | None],
    mean: Sequence[float],
    std: Sequence[float],
) -> "RealSet":
    """Return the training split, by the normalization that is given, if one is."""
    from ..compute import find_device
    from ..data import load
    from ..sets import normalized_by

    root, offline, seed = where
    device = find_device(_proved(*on))
    real = load(source, root=root, offline=offline, seed=seed).train.to(device)
    if mean or std:
        real = dataclasses.replace(real, card=normalized_by(real.card, mean, std))
    return real


def _spec(
    real: "RealSet",
    backbone: str,
    augment: tuple[str, bool],
    asked: "Json",
    epsilon: float | None,
    seed: int,
) -> "SketchSpec":
    """Return what the sketch is made of; a private one looks at less unless it is asked for."""
    from ..backbones import backbone as read_backbone
    from ..backbones import to_spec
    from ..probes import SketchSpec
    from ..records import to_record

    augmentation = read_augmentation(*augment)
    if not real.card.flips:
        augmentation = augmentation.without_flips()
    usual = {} if epsilon is None else PRIVATE
    chosen = usual | {name: value for name, value in asked.items() if value is not None}
    looks = to_spec(read_backbone(backbone)), to_record(augmentation)
    return SketchSpec(*looks, seed=seed, **chosen)


@guarded
def merge(
    sketches: Annotated[list[Path], typer.Argument(help="Sketches made with the same settings.")],
    out: Out,
    ledger: LedgerFile = None,
    as_json: AsJson = False,
) -> None:
    """Add sketches up: the sketch of all their images, to the last bit (docs/methods.md).

    Sketches that were made with other settings are refused, and the field that differs is named;
    so are private ones that the ledger at hand knows for releases of the same data.

    Example: medistill merge a.sketch b.sketch --out both.sketch
    """
    from ..ledger import Ledger, ledger_file
    from ..records import to_record
    from ..sketch import Sketch
    from ..sketch import merge as merge_all

    _check_out(out)
    parts = [Sketch.load(path) for path in sketches]
    _check_sites(parts, Ledger(ledger or ledger_file()))
    made = merge_all(parts)
    made.save(out)
    images = int(made.counts.sum())
    record = {"sketch": str(out), "sketches": len(sketches), "images": images}
    text = f"{len(sketches)} sketches of {images} images in {out}"
    if made.privacy is not None:
        record["guarantee"] = to_record(made.privacy)
        text += (
            f"\nepsilon {made.privacy.epsilon:g} for each {made.privacy.unit}, if none is in two "
            "of these sketches: whoever is in several loses the sum"
        )
    emit(record, text, as_json)


def _check_sites(parts: "Sequence[Sketch]", ledger: "Ledger") -> None:
    """Refuse releases of the same data: what they guarantee together is less than any of them."""
    from ..errors import RunRefused
    from ..privacy import composed

    promised = [part.privacy for part in parts if part.privacy is not None]
    for one, other in itertools.combinations(promised, 2):
        if found := ledger.same(one.receipts, other.receipts):
            total = composed([1 / each.noise for each in found], one.delta)
            raise RunRefused(
                f"found two releases of {found[0].data}, which guarantee epsilon {total:.2f} "
                f"together at delta {one.delta:g}; expected sketches of sites that share no "
                "patient: use one (other data of that name: give another --ledger)"
            )


def _check_out(out: Path) -> None:
    """Refuse a file that is there, or whose name later commands would not take for a sketch."""
    from ..errors import RunRefused, UsageError
    from ..records import check_writable

    if out.suffix != SKETCH:
        raise UsageError(f"found --out {out}; expected a name that ends in {SKETCH}")
    if out.exists():
        raise RunRefused(f"found {out} already there; expected a new file: choose another --out")
    check_writable(out)
