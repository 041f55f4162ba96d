"""Change keys: a note by which a receiver believes a sender's new key in place of the old one."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ..errors import DataError, PackageRefused, RunRefused, UsageError
from ..records import canonical, write_atomic
from .archive import MOST_JSON, plain_file
from .envelope import bytes_of, envelope_of, enveloped, text_of
from .keys import Signer, checked, keyid_of, load_trust, public_pem
from .strict import parsed

KIND = "application/vnd.medistill.rotation+json"
FORMAT = "medistill rotation 1"
FIELDS = {"format", "old", "new", "date"}
RETIRED = ".retired"


def rotation(
    old: Ed25519PrivateKey, new: Ed25519PrivateKey, others: Sequence[Ed25519PrivateKey] = ()
) -> bytes:
    """Return the note that `new` replaces `old`, signed by both and by others who vouch for it.

    Raises: UsageError when a key stands twice.
    """
    keys = {keyid_of(key.public_key()): key for key in (old, new, *others)}
    if len(keys) < 2 + len(others):
        raise UsageError("found a key twice; expected the old one, a new one, and others")
    record = {
        "format": FORMAT,
        "old": keyid_of(old.public_key()),
        "new": text_of(new.public_key().public_bytes_raw()),
        "date": datetime.now(UTC).date().isoformat(),
    }
    return enveloped(KIND, canonical(record), list(keys.items()))


def accepted(path: Path, trust: Path, threshold: int = 1) -> tuple[Signer, Signer]:
    """Put the new key of a note in the old one's place among trusted keys; return both.

    The note must be signed by the old key, which is trusted here, by the new one, and by
    `threshold` trusted keys in all. The old key stays beside the new one under a name that is not
    read, and no note brings it back. Versions seen of the old key do not count for the new one:
    whoever stole the old key and signed a high version with it gains nothing by that. Against a
    thief who writes a note of his own only a higher threshold helps, or another channel.
    Raises: PackageRefused when the note does not hold; DataError when it cannot be read; RunRefused
    when the new key was replaced here before, or keys cannot be written; UsageError when the
    threshold is none.
    """
    if threshold < 1:
        raise UsageError(f"found --threshold {threshold}; expected 1 or more keys")
    try:
        content = plain_file(path, MOST_JSON)
    except OSError as error:
        raise DataError(f"could not read {path}: {error.strerror}; expected a note") from None
    envelope = envelope_of(content, KIND, path.name)
    record = parsed(envelope.payload, path.name, MOST_JSON)
    if set(record) != FIELDS or record["format"] != FORMAT:
        raise PackageRefused(f"found other fields in {path.name}; expected those of {FORMAT}")
    raw = bytes_of(record["new"], path.name)
    known = load_trust(trust)
    old = next((one for one in known if one.keyid == record["old"]), None)
    if old is None:
        raise PackageRefused(
            "found a note about a key that is not trusted here; expected the sender's old key: ask "
            "the sender for the public key over another channel"
        )
    new = Signer(old.name, checked(raw))
    folder = trust if trust.is_dir() else trust.parent
    if any(load_trust(path)[0].keyid == new.keyid for path in folder.glob(f"*{RETIRED}")):
        raise RunRefused(
            "found a note for a key that was replaced here before; expected a new one: a note that "
            "is offered again would bring back a key that may be stolen by now"
        )
    vouched = [one for one in known if envelope.holds(one.keyid, one.key)]
    if old not in vouched or not envelope.holds(new.keyid, new.key) or len(vouched) < threshold:
        raise PackageRefused(
            f"found {len(vouched)} signature(s) by keys that are trusted here; expected {threshold}"
            ", that of the old key, and that of the new one"
        )
    for place in sorted(trust.glob("*.pem")) if trust.is_dir() else [trust]:
        if load_trust(place)[0].keyid == old.keyid:
            kept = place.with_name(f"{place.name}.{old.keyid[:8]}{RETIRED}")
            write_atomic(kept, public_pem(old.key))
            write_atomic(place, public_pem(new.key))
    return old, new
