"""Make a package of a run folder: what may leave the house, and nothing besides."""

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, get_args

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors.numpy import save

from ..audit.facts import facts_of
from ..audit.verdict import DROWNED
from ..audit.verdict import FORMAT as AUDIT
from ..errors import DataError, PackageRefused, RunRefused, UsageError, nearest
from ..model import check_own, declared
from ..pictures import png, synthetic_sheet
from ..records import Json, atomically, canonical, read_json, to_record, write_atomic
from ..report.folder import record_of
from ..report.officer import officer
from ..sets import SyntheticSet
from .archive import (
    DATA,
    FORMAT,
    MANIFEST,
    MOST_JSON,
    SIGNATURE,
    archived,
    digest_of,
    extracted,
    read_files,
    whole,
)
from .croissant import croissant
from .keys import keyid_of, signed
from .manifest import NAME, Flag, Made, Stored, manifest_of, tensors_of
from .read import OF_EVALUATION, examined
from .strict import parsed

FLAGS: tuple[Flag, ...] = get_args(Flag)
LEAST = 20  # patients of a class
OF_AUDIT = (
    "date",
    "models",
    "images",
    "unit",
    "reconstruction",
    "mechanism",
    "verdict",
)
NO_REPORT = "# {name}\n\nThis set was not audited: nothing is known of what it tells of patients.\n"


@dataclass(frozen=True)
class Terms:
    """What the sender says of a package beside what the run says: fields of `Manifest`."""

    name: str
    counter: int = 1
    recipients: tuple[str, ...] = ()
    expires: str = ""
    supersedes: str = ""
    site: str = ""
    contact: str = ""
    license: str = ""
    purpose: str = ""


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
    Raises: RunRefused when the set is refused; DataError when the folder holds no finished run;
    UsageError when the name is no plain word or the last day no date.
    """
    _check_terms(terms, keys)
    run = _read(folder / "run.json", ("method", "data")) or {}
    evaluation = _read(folder / "evaluation.json", (*OF_EVALUATION, "data"))
    audit = _read(folder / "audit.json", ("data", "verdict", "copies", "subgroups", "attributes"))
    if evaluation is not None and len(set(evaluation["students"])) > 1:
        raise UsageError(
            f"found scores of several backbones ({', '.join(evaluation['students'])}) in {folder}; "
            "expected one, whose recipe a package carries: evaluate again with one --backbone"
        )
    made, recipe, _ = declared(folder)
    if audit is not None:
        check_own(record_of(folder / "audit.json", AUDIT), made, folder / "audit.json")
    reasons = _reasons(made, evaluation, audit, least, run.get("real"))
    for flag, reason in reasons.items():
        if flag not in allow:
            raise RunRefused(f"{reason}: put that right, or say --allow {flag} to pack it as it is")
    # Where nobody knows the patients, images were counted, and nothing is said of patients.
    unknown = audit is None or audit["data"]["patients"] is None
    held = 0 if unknown or "small-class" in reasons else least
    chosen = dataclasses.replace(
        made, card=dataclasses.replace(made.card, digest=""), recipe=recipe
    )
    stored, tensors = tensors_of(chosen, dtype)
    record = _manifest(chosen, terms, evaluation, run)
    record |= {**tensors, "least_patients": held, "allowed": list(reasons)}
    data = save(stored)
    files = {
        MANIFEST: canonical(record),
        DATA: data,
        "evaluation.json": canonical(_evaluation(evaluation)),
        "privacy.json": canonical(_privacy(chosen, run, audit, evaluation is not None)),
        "croissant.json": canonical(croissant(record, data)),
        "REPORT.md": _report(folder, terms, audit, held).encode(),
    }
    if preview:
        files["preview.png"] = png(synthetic_sheet(made))
    _check_own(files)
    if keys:
        files[SIGNATURE] = signed(files, keys)
    return files


def _check_own(files: Mapping[str, bytes]) -> None:
    """Refuse to write what every reader would refuse.

    Raises: UsageError.
    """
    try:
        examined(extracted(archived(files)), (), unsigned=True)
    except PackageRefused as error:
        raise UsageError(f"readers would refuse this package: {error}") from None


def _check_terms(terms: Terms, keys: Sequence[Ed25519PrivateKey]) -> None:
    if not NAME.fullmatch(terms.name):
        raise UsageError(
            f"found name {terms.name!r}; expected letters, digits, '.', '_' and '-', as breast-10"
        )
    try:
        if terms.expires:
            date.fromisoformat(terms.expires)
    except ValueError:
        raise UsageError(f"found --expires {terms.expires}; expected a day, 2030-12-31") from None
    if len({keyid_of(key.public_key()) for key in keys}) < len(keys):
        raise UsageError("found the same --key twice; expected each key once")


def _manifest(made: SyntheticSet, terms: Terms, evaluation: Json | None, run: Json) -> Json:
    """Return what a manifest says beside tensors and patients."""
    origin = {field.name: getattr(made.origin, field.name) for field in dataclasses.fields(Made)}
    spent = {name: given for name, given in run.get("budget", {}).items() if given is not None}
    # A method's own settings may name more steps than were made.
    made_by = {"budget": spent, "steps": run.get("steps_done", run.get("steps"))}
    origin["settings"] = {**made.origin.settings, **made_by}
    return {
        "format": FORMAT,
        **to_record(terms),
        "license": terms.license or made.card.license,
        "card": to_record(made.card),
        "recipe": to_record(made.recipe),
        "made": to_record(Made(**origin)),
        "declared": _evaluation(evaluation)["synthetic"]["accuracy"] if evaluation else None,
        "declared_on": evaluation["data"]["name"] if evaluation else "",
    }


def _read(path: Path, needed: Sequence[str]) -> Json | None:
    """Return what stands in a file of the run, None where there is none.

    Raises: DataError when it lacks what it should hold.
    """
    if not path.is_file():
        return None
    found = read_json(path)
    missing = [name for name in needed if not (isinstance(found, dict) and name in found)]
    if missing:
        raise DataError(f"found no {missing[0]} in {path}; expected a whole file: make it again")
    record: Json = found
    return record


def _reasons(
    made: SyntheticSet,
    evaluation: Json | None,
    audit: Json | None,
    least: int,
    counts: Json | None,
) -> dict[Flag, str]:
    """Return why the set would be refused, by the flag that allows it."""
    found: dict[Flag, str] = {}
    if made.origin.real_pixels:
        found["real-pixels"] = "found images that are, or started from, real images of patients"
    if evaluation is None:
        found["no-scores"] = "found no evaluation of the run (medistill evaluate)"
    if audit is None:
        found["no-audit"] = "found no audit of the run (medistill audit)"
    # What attacks could not see for noise, a guarantee bounds.
    elif audit["verdict"]["membership"] not in ("valid", DROWNED):
        said = audit["verdict"]["membership"]
        found["no-audit"] = f"found an audit without a verdict on membership ({said})"
    if audit is not None and audit["verdict"]["leaks"]:
        found["leaks"] = f"found leaks in the audit ({'; '.join(audit['verdict']['reasons'])})"
    told = counts if audit is None else audit["data"]
    if told is None:
        found["small-class"] = (
            "found nobody who counted the patients of each class (an audit does); expected "
            f"{least} (--min-patients) or more"
        )
    elif told["smallest"] < least:
        unit = "images" if told["patients"] is None else "patients"
        found["small-class"] = (
            f"found {told['smallest']} {unit} in class {told['smallest_class']}; expected {least} "
            "(--min-patients) or more"
        )
    return found


def _evaluation(evaluation: Json | None) -> Json:
    """Return the scores that go along; of four digits, which tell no number of test images."""
    if evaluation is None:
        return {}
    found: Json = _finite({name: evaluation[name] for name in OF_EVALUATION}, digits=4)
    return found


def _privacy(made: SyntheticSet, run: Json, audit: Json | None, chosen: bool) -> Json:
    """Return the guarantee, the facts and what attacks found, without sizes of the data."""
    sketched = run.get("sketch") or {}
    record: Json = {
        "guarantee": sketched.get("privacy"),
        "networks": sketched["spec"]["networks"] if sketched else None,
        "facts": [dataclasses.asdict(fact) for fact in facts_of(made, run, chosen=chosen)],
        "audit": None,
    }
    if audit is not None:
        told = {name: audit[name] for name in OF_AUDIT if name in audit}
        # What tells the sizes of the data, of classes and of groups, or real images, stays at home.
        for name in ("membership", "positive_control", "negative_control"):
            if name in audit:
                told[name] = {kind: _curves(by) for kind, by in audit[name].items()}
        if "one_run" in audit:
            kept = ("lower", "claimed", "delta", "level")
            told["one_run"] = {name: audit["one_run"][name] for name in kept}
            told["one_run"]["controls"] = {
                name: {"found": one["lower"] > 0}
                for name, one in audit["one_run"]["controls"].items()
            }
        told["left_out"] = [one.partition(":")[0] for one in audit["left_out"]]
        told["copies"] = [_without(one, "nearest", "p_value") for one in audit["copies"]]
        told["attributes"] = [
            {"name": one["name"], "better": one["low"] > 0} for one in audit["attributes"]
        ]
        told["subgroups"] = [_without(one, "images", "low", "high") for one in audit["subgroups"]]
        if "reconstruction" in told:
            told["reconstruction"] = _without(told["reconstruction"], "chance")
        # More of their digits are chance, and take room.
        record["audit"] = _finite(told, digits=3)
    found: Json = _finite(record)
    return found


def _curves(by: Json) -> Json:
    """Return an attack's findings without what tells how many images (patients) it asked about.

    Ends of intervals follow from that number where nothing is found: they have two digits.
    """

    def of(at: Json) -> Json:
        ends = {end: round(at[end], 2) for end in ("low", "high")}
        return {**_without(at, "members", "others", "sure"), **ends}

    return {
        side: {**curve, "found": [of(at) for at in curve["found"]]} for side, curve in by.items()
    }


def _without(record: Json, *names: str) -> Json:
    return {key: value for key, value in record.items() if key not in names}


def _finite(value: Any, digits: int | None = None) -> Any:
    """Return a record whose numbers are finite, as JSON has them, else null; rounded if asked."""
    if isinstance(value, float):
        found = value if digits is None else float(f"{value:.{digits}g}")
        return found if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(one, digits) for key, one in value.items()}
    return [_finite(one, digits) for one in value] if isinstance(value, list | tuple) else value


def _report(folder: Path, terms: Terms, audit: Json | None, least: int) -> str:
    return NO_REPORT.format(name=terms.name) if audit is None else officer(folder, least=least)


def superseded(path: Path, name: str, counter: int) -> str:
    """Return the SHA-256 of the archive of a package that version `counter` of `name` replaces.

    Raises: PackageRefused when it is none; UsageError when it is no older version.
    """
    files = read_files(path)
    old = manifest_of(parsed(whole(files)[MANIFEST], MANIFEST, MOST_JSON))
    if old.name == name and old.counter >= counter:
        raise UsageError(
            f"found --counter {counter}; expected {old.counter + 1} or more to supersede version "
            f"{old.counter} of {name}: receivers refuse an older version than one they have seen"
        )
    return digest_of(files)[0]


def flags_of(text: str) -> list[Flag]:
    """Read the flags of `allow`, comma between.

    Raises: UsageError when there is no such flag.
    """
    found = [word.strip() for word in text.split(",") if word.strip()]
    for word in found:
        if word not in FLAGS:
            raise UsageError(f"found --allow {word}: {nearest(word, FLAGS)}")
    return [flag for flag in FLAGS if flag in found]


def written(out: Path, files: Mapping[str, bytes], *, folder: bool = False) -> tuple[int, str]:
    """Write files as an archive, or into a folder, under its name only once whole.

    Returns its bytes, and the SHA-256 of the archive.
    Raises: RunRefused when it cannot be written.
    """
    content = archived(files)
    if folder:
        atomically(out, partial(_fill, files=files))
    else:
        write_atomic(out, content)
    size = sum(map(len, files.values())) if folder else len(content)
    return size, hashlib.sha256(content).hexdigest()


def _fill(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        write_atomic(folder / name, content)
