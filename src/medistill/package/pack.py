"""Make a package of a run folder: what may leave the house, and nothing besides."""

import dataclasses
import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors.numpy import save

from ..audit.facts import facts_of
from ..errors import RunRefused, UsageError, nearest
from ..model import declared
from ..pictures import png, sheet
from ..records import Json, canonical, read_json, to_record, write_atomic
from ..report.officer import officer
from ..sets import SyntheticSet
from .archive import DATA, FORMAT, MANIFEST, SIGNATURE, archived
from .croissant import croissant
from .keys import signed
from .manifest import Flag, Made, Stored, manifest_of, tensors_of

FLAGS: tuple[Flag, ...] = get_args(Flag)
LEAST = 20  # patients of a class
SCORES = ("synthetic", "random", "full", "gap_closed")
OF_EVALUATION = ("protocol", "students", "seeds", *SCORES)
OF_AUDIT = (
    "date",
    "models",
    "images",
    "canaries",
    "membership",
    "positive_control",
    "negative_control",
    "one_run",
    "reconstruction",
    "mechanism",
    "left_out",
    "verdict",
)
NO_REPORT = "# {name}\n\nThis set was not audited: nothing is known of what it tells of patients.\n"


@dataclass(frozen=True)
class Terms:
    """What the sender says of a package beside what the run says: fields of `Manifest`."""

    name: str
    counter: int = 1
    site: str = ""
    contact: str = ""
    license: str = ""
    recipients: tuple[str, ...] = ()
    purpose: str = ""
    expires: str = ""
    supersedes: str = ""


def pack(
    folder: Path,
    terms: Terms,
    keys: Sequence[Ed25519PrivateKey] = (),
    *,
    least: int = LEAST,
    allow: Sequence[Flag] = (),
    dtype: Stored = "U8",
    preview: bool = False,
) -> dict[str, bytes]:
    """Return the files of a package, signed with each key; the same run gives the same bytes.

    Of the run, evaluation and audit only listed fields go in: no path, command, machine, digest of
    the data or size of a class. Refused are sets that hold or start from real pixels, that were not
    audited or in which the audit found a leak, that have a class of fewer than `least` patients, or
    no scores, each unless `allow` names it; what was needed is written in the manifest.
    Raises: RunRefused when the set is refused; DataError when the folder holds no finished run.
    """
    made, recipe, _ = declared(folder)
    run = read_json(folder / "run.json")
    evaluation = _read(folder / "evaluation.json")
    audit = _read(folder / "audit.json")
    needed = [flag for flag, reason in _reasons(made, evaluation, audit, least).items() if reason]
    for flag, reason in _reasons(made, evaluation, audit, least).items():
        if reason and flag not in allow:
            raise RunRefused(f"{reason}: put that right, or say --allow {flag} to pack it as it is")
    bare = dataclasses.replace(made, card=dataclasses.replace(made.card, digest=""))
    stored, tensors = tensors_of(made, dtype)
    scores = evaluation["synthetic"]["accuracy"] if evaluation else None
    held = 0 if audit is None or "small-class" in needed else least
    origin = {f.name: getattr(made.origin, f.name) for f in dataclasses.fields(Made)}
    record: Json = {
        "format": FORMAT,
        **to_record(terms),
        **tensors,
        "license": terms.license or made.card.license,
        "card": to_record(bare.card),
        "recipe": to_record(recipe),
        "made": to_record(Made(**origin)),
        "least_patients": held,
        "declared": scores,
        "declared_on": made.card.name if scores else "",
        "allowed": needed,
    }
    manifest_of(record)  # what a reader would refuse is not written
    data = save(stored)
    files = {
        MANIFEST: canonical(record),
        DATA: data,
        "evaluation.json": canonical(_evaluation(evaluation)),
        "privacy.json": canonical(_privacy(bare, run, audit)),
        "croissant.json": canonical(croissant(record, data)),
        "REPORT.md": _report(folder, terms, audit, held).encode(),
    }
    if preview:
        files["preview.png"] = _preview(made)
    if keys:
        files[SIGNATURE] = signed(files, keys)
    return files


def _read(path: Path) -> Json | None:
    found: Json | None = read_json(path) if path.is_file() else None
    return found


def _reasons(
    made: SyntheticSet, evaluation: Json | None, audit: Json | None, least: int
) -> dict[Flag, str]:
    """Return why the set would be refused, by the flag that allows it; empty where it is not."""
    found: dict[Flag, str] = dict.fromkeys(FLAGS, "")
    if made.origin.real_pixels:
        found["real-pixels"] = "found images that are, or started from, real images of patients"
    if evaluation is None:
        found["no-scores"] = "found no evaluation of the run (medistill evaluate)"
    if audit is None:
        found["no-audit"] = "found no audit of the run (medistill audit)"
        return found
    if audit["verdict"]["leaks"]:
        found["leaks"] = f"found leaks in the audit ({'; '.join(audit['verdict']['reasons'])})"
    count = audit["data"]["smallest"]
    if count < least:
        unit = "images" if audit["data"]["patients"] is None else "patients"
        found["small-class"] = (
            f"found {count} {unit} in class {audit['data']['smallest_class']}; expected {least} "
            "(--min-patients) or more"
        )
    return found


def _evaluation(evaluation: Json | None) -> Json:
    return {} if evaluation is None else {name: evaluation[name] for name in OF_EVALUATION}


def _privacy(made: SyntheticSet, run: Json, audit: Json | None) -> Json:
    """Return the guarantee, the facts and what attacks found, without sizes of the data."""
    sketched = run.get("sketch") or {}
    record: Json = {
        "guarantee": sketched.get("privacy"),
        "networks": sketched["spec"]["networks"] if sketched else None,
        "facts": [dataclasses.asdict(fact) for fact in facts_of(made, run)],
        "audit": None,
    }
    if audit is not None:
        told = {name: audit[name] for name in OF_AUDIT if name in audit}
        told["copies"] = [_without(one, "nearest") for one in audit["copies"]]
        told["attributes"] = audit["attributes"]
        told["subgroups"] = [_without(one, "images") for one in audit["subgroups"]]
        record["audit"] = told
    found: Json = _finite(record)
    return found


def _without(record: Json, name: str) -> Json:
    return {key: value for key, value in record.items() if key != name}


def _finite(value: Any) -> Any:
    """Return a record with numbers that are not finite as null, as JSON has them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list | tuple) else value


def _report(folder: Path, terms: Terms, audit: Json | None, least: int) -> str:
    return NO_REPORT.format(name=terms.name) if audit is None else officer(folder, least=least)


def _preview(made: SyntheticSet) -> bytes:
    """Return a picture of the first synthetic images of each class, from the set alone."""
    own = made.labels.argmax(1)
    rows = []
    for number, name in enumerate(made.card.classes):
        shown = made.images[own == number][:10].clamp(0, 1)
        if len(shown):
            rows.append((name, shown))
    return png(sheet(rows))


def check_name(name: str) -> None:
    """Refuse a name that is no plain word, for it becomes a file's.

    Raises: UsageError.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise UsageError(
            f"found name {name!r}; expected letters, digits, '.', '_' and '-', as breast-ipc10"
        )


def flags_of(text: str) -> list[Flag]:
    """Read the flags of `allow`, comma between.

    Raises: UsageError when there is no such flag.
    """
    found = [word.strip() for word in text.split(",") if word.strip()]
    for word in found:
        if word not in FLAGS:
            raise UsageError(f"found --allow {word}: {nearest(word, FLAGS)}")
    return [flag for flag in FLAGS if flag in found]


def written(out: Path, files: Mapping[str, bytes], *, folder: bool = False) -> int:
    """Write files as an archive, or into a folder, under its name only once whole; return bytes.

    Raises: RunRefused when it cannot be written.
    """
    if not folder:
        content = archived(files)
        write_atomic(out, content)
        return len(content)
    half = out.with_name(f".{out.name}.half")
    try:
        shutil.rmtree(half, ignore_errors=True)
        for name, content in files.items():
            write_atomic(half / name, content)
        os.rename(half, out)
    except OSError as error:
        raise RunRefused(f"could not write {out}: {error.strerror}; choose another place") from None
    finally:
        shutil.rmtree(half, ignore_errors=True)
    return sum(map(len, files.values()))
