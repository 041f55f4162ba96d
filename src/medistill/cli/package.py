"""medistill pack, sign, verify and show: one small signed file that goes to others."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .common import AsJson, Out, at_least_one, emit, guarded, interval_text

if TYPE_CHECKING:
    from ..package import Package
    from ..records import Json

Trust = Annotated[
    Path | None,
    typer.Option(help="The sender's public.pem, or a folder of such files, NAME.pem each."),
]
Unsigned = Annotated[
    bool, typer.Option("--unsigned", help="Also read a package without any signature.")
]
Threshold = Annotated[int, typer.Option(help="Trusted keys that must have signed.")]
Archive = Annotated[Path, typer.Argument(help="A package: NAME.medistill, or its folder.")]
Keys = Annotated[list[Path] | None, typer.Option(help="private.pem to sign with; may be repeated.")]
Recipients = Annotated[list[str] | None, typer.Option(help="Whom it is for; may be repeated.")]
Supersedes = Annotated[
    Path | None, typer.Option(help="The package of the version before, named by its digest.")
]
Allow = Annotated[
    str,
    typer.Option(
        help="Pack what is refused otherwise, and say so in the package: real-pixels, leaks, "
        "no-audit, no-scores, small-class; comma between."
    ),
]
Numbers = Annotated[Literal["uint8", "float16"], typer.Option(help="How pixels are stored.")]
Preview = Annotated[bool, typer.Option("--preview", help="Add a picture of the synthetic images.")]
AsFolder = Annotated[
    bool, typer.Option("--folder", help="Write the files into a folder, not an archive.")
]
SHADES = " .:-=+*#%@"
SHOWN = 28  # columns of a picture in the terminal


@guarded
def pack(
    run: Annotated[Path, typer.Argument(help="A run folder, evaluated and audited.")],
    out: Out,
    key: Keys = None,
    name: Annotated[str, typer.Option(help="Name of the package; that of --out otherwise.")] = "",
    counter: Annotated[int, typer.Option(help="Version; each one is higher than the last.")] = 1,
    site: Annotated[str, typer.Option(help="Who sends it.")] = "",
    contact: Annotated[str, typer.Option(help="Whom to ask.")] = "",
    license: Annotated[str, typer.Option(help="License; that of the data otherwise.")] = "",
    recipient: Recipients = None,
    purpose: Annotated[str, typer.Option(help="What it may be used for.")] = "",
    expires: Annotated[str, typer.Option(help="Last day on which it is read, YYYY-MM-DD.")] = "",
    supersedes: Supersedes = None,
    min_patients: Annotated[int, typer.Option(help="Fewest patients of a class.")] = 20,
    allow: Allow = "",
    numbers: Numbers = "uint8",
    preview: Preview = False,
    folder: AsFolder = False,
    as_json: AsJson = False,
) -> None:
    """Put a run into one small file that a stranger can check and train on.

    It holds images, labels, recipe, scores, what is proved and was tried of privacy, and a report
    for the data protection officer; no path, no size of the data, no code. Refused are sets that
    hold or start from real pixels, lack an audit or scores, leak, or have a class of fewer than
    --min-patients, unless --allow says otherwise.

    Example: medistill pack runs/first --key keys/private.pem --out first.medistill
    """
    from ..package import Terms, load_private
    from ..package import pack as files_of
    from ..package.pack import flags_of, superseded
    from ..records import refuse_existing

    at_least_one(min_patients=min_patients)
    refuse_existing(out)
    named = name or out.name.removesuffix(".medistill")
    words = {"site": site, "contact": contact, "license": license, "purpose": purpose}
    before = superseded(supersedes, named, counter) if supersedes else ""
    files = files_of(
        run,
        Terms(named, counter, (*(recipient or ()),), expires, before, **words),
        [load_private(path) for path in key or ()],
        least=min_patients,
        allow=flags_of(allow),
        dtype="U8" if numbers == "uint8" else "F16",
        preview=preview,
    )
    _write(out, files, folder, as_json)


def _write(out: Path, files: "dict[str, bytes]", folder: bool, as_json: bool) -> None:
    from ..package import written
    from ..package.archive import SIGNATURE

    size, whole = written(out, files, folder=folder)
    signed = SIGNATURE in files
    record = {"package": str(out), "bytes": size, "sha256": whole, "signed": signed}
    text = f"{out}: {size:,} bytes, sha256 {whole}"
    note = "\nnot signed: give --key, for others to trust it"
    emit(record, text if signed else text + note, as_json)


@guarded
def sign(
    package: Archive,
    key: Annotated[Path, typer.Option(help="private.pem to sign with.")],
    out: Out,
    trust: Trust = None,
    unsigned: Unsigned = False,
    as_json: AsJson = False,
) -> None:
    """Add a signature to a package of others, once it passed all checks that verify makes.

    With it a package can ask for two pairs of eyes, each with a key of its own: receivers say
    --threshold 2. What was signed before stays signed.

    Example: medistill sign a.medistill --trust keys --key b/private.pem --out both.medistill
    """
    from ..package import countersigned, load_private
    from ..records import refuse_existing

    refuse_existing(out)
    files = countersigned(package, trust, load_private(key), unsigned=unsigned)
    _write(out, files, package.is_dir(), as_json)


@guarded
def verify(
    package: Archive,
    trust: Trust = None,
    unsigned: Unsigned = False,
    threshold: Threshold = 1,
    as_json: AsJson = False,
) -> None:
    """Check a package: who signed it, that nothing was changed, and that it is what it says.

    Keys come from --trust alone, never from the package. Nothing in it is executed. An older
    version than one that was seen here is refused.

    Example: medistill verify first.medistill --trust keys/public.pem
    """
    import json
    import sys

    from ..errors import PackageRefused
    from ..package import read

    try:
        found = read(package, trust, unsigned=unsigned, threshold=threshold)
    except PackageRefused as error:
        if as_json:
            print(json.dumps({"ok": False, "reason": str(error)}))
            print(f"medistill: {error}", file=sys.stderr)
            raise typer.Exit(error.exit_code) from None
        raise
    record = {"ok": True, "signer": signer_of(found), "manifest": _manifest(found)}
    emit(record, f"{package} is whole; signed by {signer_of(found) or 'nobody'}", as_json)


@guarded
def show(
    package: Archive,
    trust: Trust = None,
    unsigned: Unsigned = False,
    threshold: Threshold = 1,
    as_json: AsJson = False,
) -> None:
    """Check a package as verify does, and show its card, scores, privacy and one picture a class.

    Example: medistill show first.medistill --trust keys/public.pem
    """
    from ..package import read

    found = read(package, trust, unsigned=unsigned, threshold=threshold)
    record = {
        "manifest": _manifest(found),
        "signer": signer_of(found),
        "evaluation": found.evaluation,
        "privacy": found.privacy,
        "sha256": found.sha256,
        "bytes": found.bytes,
    }
    emit(record, _text(found), as_json)


def is_package(path: Path, trust: Path | None) -> bool:
    """Say whether a path is a package, else a run of one's own.

    Raises: PackageRefused when it is none though keys are given: a run folder is not signed.
    """
    from ..errors import PackageRefused

    found = path.is_file() or (path / "manifest.json").is_file()
    if trust is not None and not found:
        raise PackageRefused(
            f"found no package in {path}; expected one, since --trust is given: leave it out for a "
            "run of your own"
        )
    return found


def signer_of(found: "Package") -> str | None:
    """Return the names that the receiver has for who signed, with their keys; None for nobody."""
    names = [f"{one.name} ({one.keyid[:16]})" for one in found.signers]
    return ", ".join(names) or None


def _manifest(found: "Package") -> "Json":
    from ..records import to_record

    return to_record(found.manifest)


def _text(found: "Package") -> str:
    from ..report.told import told_of

    told = found.manifest
    card, made = told.card, told.made
    size = " x ".join(map(str, (card.channels, *card.shape)))
    lines = [
        f"{told.name}, version {told.counter}: {len(found.images)} images ({size}), "
        f"{found.bytes:,} bytes",
        f"signed by {signer_of(found) or 'nobody'}; sha256 {found.sha256}",
        f"made from {card.name} by {made.method}, from {made.start}; {made.version}",
        f"classes: {', '.join(card.classes)}",
    ]
    for arm in ("synthetic", "random", "full"):
        scores = found.evaluation.get(arm)
        if scores:
            one = {name: interval_text(scores[name]) for name in ("accuracy", "auc")}
            lines.append(f"{arm}: accuracy {one['accuracy']}, AUC {one['auc']}")
    said = told_of(_manifest(found), found.privacy)
    lines += [f"{title}: {text}" for title, text in said.items()]
    return "\n".join([*lines, *_pictures(found)])


def _pictures(found: "Package") -> list[str]:
    """Return the first image of each of the first classes in letters, side by side."""
    import torch
    import torch.nn.functional as F

    first = [
        found.images[row.nonzero()[0, 0]]
        for row in (found.labels.argmax(1) == c for c in range(len(found.manifest.card.classes)))
        if row.any()
    ][:3]
    drawn = []
    for image in first:
        flat = image.mean(0)
        flat = flat[len(flat) // 2] if flat.ndim == 3 else flat
        small = F.interpolate(flat[None, None], (SHOWN // 2, SHOWN), mode="area")[0, 0]
        low, high = small.min(), small.max()
        level = ((small - low) / (high - low).clamp_min(1e-6) * (len(SHADES) - 1)).round()
        drawn.append(["".join(SHADES[v] for v in row) for row in level.to(torch.int64).tolist()])
    return ["  ".join(rows) for rows in zip(*drawn, strict=True)] if drawn else []
