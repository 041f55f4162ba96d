"""Read a package: every check first, on the very bytes that are used after; nothing is executed."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import MedistillError, PackageRefused, RunRefused, UsageError
from ..pixels import Whitening
from ..places import state_folder
from ..privacy import Guarantee, check_promise
from ..records import Json, from_record, locked, read_json, write_atomic, write_json
from ..sets import Origin, SyntheticSet
from .archive import (
    DATA,
    MANIFEST,
    MOST_JSON,
    NEEDED,
    SIGNATURE,
    Files,
    digest_of,
    held,
    laid_out,
    slices,
    whole,
)
from .keys import Signer, content_digest, cosigned, load_trust, verified
from .manifest import (
    MOST_END,
    WHITENING,
    Manifest,
    arrays_of,
    check_header,
    is_score,
    manifest_of,
    opened,
)
from .strict import MOST_HEADER, header_of, parsed, texts_of

SEEN = "medistill seen 2"
ARMS = ("synthetic", "random", "full")
# Of an evaluation a package tells these, no more and no less.
OF_EVALUATION = ("protocol", "students", "seeds", *ARMS, "gap_closed")


@dataclass(frozen=True)
class Verdict:
    """What an audit concluded."""

    leaks: bool
    reasons: tuple[str, ...]
    membership: str
    blind: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Package:
    """A package that passed every check: what it holds, and who signed it (nobody: unsigned).

    `sha256` is that of its archive, `content` that of what is signed. Shapes as in `SyntheticSet`.
    """

    manifest: Manifest
    images: Tensor
    labels: Tensor
    whitening: Whitening | None
    evaluation: Json
    privacy: Json
    report: str
    signers: tuple[Signer, ...]
    sha256: str
    content: str
    bytes: int

    @property
    def synthetic(self) -> SyntheticSet:
        """The set, as a run folder holds it."""
        made, card = self.manifest.made, self.manifest.card
        origin = Origin(
            made.method, made.settings, made.seed, made.start, made.real_pixels, "", made.version
        )
        recipe = self.manifest.recipe
        return SyntheticSet(self.images, self.labels, recipe, origin, card, self.whitening)


class PackageSet(Dataset[tuple[Tensor, Tensor]]):
    """A package's images as a network is trained on them: normalized, all tiles made whole.

    Each item is an image [c, ...] and its label [k], weights of the classes.
    """

    def __init__(self, package: Package) -> None:
        self.package = package
        self.images, self.labels = package.synthetic.to_train()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return one image and its label."""
        return self.images[index], self.labels[index]


def read(
    path: Path,
    trust: Path | None,
    *,
    unsigned: bool = False,
    threshold: int = 1,
    today: date | None = None,
) -> Package:
    """Read a package that keys in `trust` signed.

    In this order: sizes and names, who signed, digests of all files (large ones in pieces), strict
    JSON, expiry, tensors against the manifest, the guarantee's own numbers, the counter against the
    highest one seen here.
    With `unsigned`, a package without a signature is read too (and one with a signature still has
    to be signed by a trusted key).
    Raises: PackageRefused when any check fails; DataError when the trust file cannot be read.
    """
    with held(path) as files:
        return _known(files, trust, unsigned, threshold, today)


def countersigned(
    path: Path, trust: Path | None, key: Ed25519PrivateKey, *, unsigned: bool = False
) -> dict[str, bytes]:
    """Return the files of a package that passed all checks, with one signature more.

    Raises: as `read`; RunRefused when the key has signed it already.
    """
    with held(path) as files:
        _known(files, trust, unsigned, 1, None)
        return {**files, SIGNATURE: cosigned(files, key)}


def received(
    content: bytes,
    out: Path,
    trust: Path | None,
    *,
    unsigned: bool = False,
    threshold: int = 1,
    mode: int | None = None,
) -> Package:
    """Write an archive that came from elsewhere, once it passed all checks that `read` makes.

    Raises: as `read`; RunRefused when it cannot be written.
    """
    files = laid_out(slices(content), len(content))
    found = _known(files, trust, unsigned, threshold, None)
    write_atomic(out, content, mode=mode)
    return found


def _known(
    files: Mapping[str, bytes],
    trust: Path | None,
    unsigned: bool,
    threshold: int,
    today: date | None,
) -> Package:
    if SIGNATURE in files and trust is None:
        raise PackageRefused(
            "found a signature, and no --trust to check it by; expected the sender's public.pem"
        )
    known = load_trust(trust) if trust else ()
    found = examined(files, known, unsigned=unsigned, threshold=threshold, today=today)
    if trust is not None:
        _check_counters(trust, found)
    return found


def examined(
    files: Mapping[str, bytes],
    trust: Sequence[Signer],
    *,
    unsigned: bool = False,
    threshold: int = 1,
    today: date | None = None,
) -> Package:
    """Return a package from the bytes of its files, after all checks but that of the counter.

    Raises: PackageRefused; UsageError when the threshold is none.
    """
    if threshold < 1 or (unsigned and threshold > 1):
        raise UsageError(
            f"found --threshold {threshold}{' with --unsigned' if unsigned else ''}; expected 1 or "
            "more keys, or an unsigned package"
        )
    files = Files.of(whole(files))
    signers: Sequence[Signer] = ()
    if SIGNATURE in files:
        signers = verified(files, trust, threshold)
    elif not unsigned:
        raise PackageRefused(
            "found no signature in the package; expected one: ask the sender, or say --unsigned if "
            "you made it yourself"
        )
    records = {name: parsed(files[name], name, MOST_JSON) for name in NEEDED if "json" in name}
    manifest = manifest_of(records[MANIFEST])
    _check_date(manifest, today or datetime.now(UTC).date())
    head = files.head(DATA, 8 + MOST_HEADER)
    header = header_of(head, files.size(DATA), DATA)
    check_header(header, manifest)
    if not files[DATA].startswith(head):  # what was parsed must be what was hashed
        raise PackageRefused(f"found {DATA} changing while it is read; expected it still")
    found = arrays_of(files[DATA], header, manifest)
    _check_privacy(records["privacy.json"], manifest)
    _check_told(records["evaluation.json"], records["privacy.json"])
    report = _text(files["REPORT.md"])
    sha256, size = digest_of(files)
    images, labels = opened(found, manifest)
    state = {name: torch.from_numpy(found[name].copy()) for name in WHITENING if name in found}
    return Package(
        manifest,
        images,
        labels,
        Whitening.of_state(state),
        records["evaluation.json"],
        records["privacy.json"],
        report,
        tuple(signers),
        sha256,
        content_digest(files),
        size,
    )


def _text(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise PackageRefused("found no UTF-8 in REPORT.md; expected text") from None


def _check_date(manifest: Manifest, today: date) -> None:
    if manifest.expires and date.fromisoformat(manifest.expires) < today:
        raise PackageRefused(
            f"found a package that expired on {manifest.expires}; expected one that may still be "
            "used: ask the sender for a new one"
        )


def _check_privacy(record: Json, manifest: Manifest) -> None:
    """Refuse a guarantee whose numbers do not follow from each other."""
    held: Any = record.get("guarantee")
    if held is None:
        return
    try:
        promise = from_record(Guarantee, held)
        check_promise(promise, int(str(record.get("networks", ""))))
    except (MedistillError, ValueError, TypeError, ArithmeticError) as error:
        text = ascii(str(error))[1:-1][:200]
        raise PackageRefused(f"found a guarantee that does not hold together ({text})") from None
    if manifest.made.real_pixels:
        raise PackageRefused(
            "found a guarantee for a set that it cannot cover; expected a true one"
        )


def _check_told(evaluation: Json, privacy: Json) -> None:
    """Refuse scores and findings in another form than `show` and others read."""
    try:
        sound = not evaluation or _are_scores(evaluation)
        audit = privacy["audit"]
        if audit is not None:
            date.fromisoformat(audit["date"])
            from_record(Verdict, audit["verdict"])
        # A line of its own would read as if this program said it.
        if not sound or any("\n" in text for text in texts_of([evaluation, privacy])):
            raise ValueError
    except (MedistillError, KeyError, TypeError, ValueError, AttributeError):
        raise PackageRefused(
            "found scores or an audit in another form than pack writes; expected the sender's file"
        ) from None


def _are_scores(evaluation: Json) -> bool:
    """Say whether an evaluation holds scores of all arms, and gaps, as readers show them."""
    arms = [evaluation[arm] for arm in ARMS]
    scores = [one for arm in arms for one in arm.values()]
    gaps = [gap for gap in evaluation["gap_closed"].values() if gap is not None]
    return (
        set(evaluation) == set(OF_EVALUATION)
        and all({"accuracy", "auc"} <= set(arm) for arm in arms)
        and all(is_score(one, -1.0) for one in scores)  # kappa goes below 0
        and all(is_score(gap, -MOST_END, MOST_END) for gap in gaps)
        and all(isinstance(evaluation[name], list) for name in ("students", "seeds"))
        and isinstance(evaluation["protocol"], dict)
    )


def _check_counters(trust: Path, found: Package) -> None:
    """Refuse an older version than one that was seen here, or another with the same counter.

    A signature can be cut off, so that the counter of its key would not be asked: all keys count
    that were ever seen on this content.
    Raises: RunRefused when what was seen cannot be written down.
    """
    path = seen_path(trust)
    try:
        with locked(path):
            held: Json = {"format": SEEN, "seen": {}}
            held = read_json(path) if path.is_file() else held
            marks = held.setdefault("marks", {})
            keys = sorted({*marks.get(found.content, ()), *(one.keyid for one in found.signers)})
            fresh = [_is_fresh(held["seen"], f"{key} {found.manifest.name}", found) for key in keys]
            if any(fresh) or marks.get(found.content) != keys:
                marks[found.content] = keys
                write_json(path, held)
    except (KeyError, TypeError, AttributeError, ValueError):
        raise RunRefused(f"{path} is damaged; expected what was seen here: put it right") from None


def _is_fresh(seen: Json, key: str, found: Package) -> bool:
    """Note a key's version if it is the highest, and say so."""
    name, counter = found.manifest.name, found.manifest.counter
    last = seen.get(key, {"counter": 0, "content": ""})
    if counter < last["counter"]:
        raise PackageRefused(
            f"found version {counter} of {name}; expected {last['counter']} or "
            "later, which was seen here: an old one is offered again"
        )
    if counter == last["counter"] and found.content != last["content"]:
        raise PackageRefused(
            f"found another package that calls itself version {counter} of "
            f"{name}; expected the one seen here, or a higher number: ask the sender"
        )
    seen[key] = {"counter": counter, "content": found.content}
    return bool(counter > last["counter"])


def seen_path(trust: Path) -> Path:
    """Return the file that holds the highest versions seen, beside the keys: one for a folder.

    Where that folder is not this user's to write, it lies among the user's own files.
    """
    folder = trust if trust.is_dir() else trust.parent
    if os.access(folder, os.W_OK):
        return folder / "seen.json"
    mine = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    return state_folder() / f"seen-{mine}.json"
