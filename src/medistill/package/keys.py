"""Ed25519 keys, what they sign of a package, and the local file that says whom to believe."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from ..errors import DataError, PackageRefused, RunRefused
from ..records import canonical, owner_only, refuse_existing, write_atomic
from .archive import FORMAT, MOST_JSON, SIGNATURE, Files, later
from .envelope import MOST_KEYS, envelope_of, enveloped
from .strict import parsed

PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "urn:medistill:package:1"
MOST_FILE = 1 << 16  # bytes of a file of keys
PRIME = 2**255 - 19
# The y of the points of order 1, 2, 4 and 8: under such a key one signature fits many texts.
LOW_ORDER = frozenset(
    {
        0,
        1,
        PRIME - 1,
        0x05FC536D880238B13933C6D305ACDFD5F098EFF289F4C345B027B2C28F95E826,
        0x7A03AC9277FDC74EC6CC392CFA53202A0F67100D760B3CBA4FD84D3D706A17C7,
    }
)


@dataclass(frozen=True)
class Signer:
    """A public key with the name that the receiver gave it; `keyid` is the SHA-256 of its bytes."""

    name: str
    key: Ed25519PublicKey

    @property
    def keyid(self) -> str:
        """The name that the key has everywhere."""
        return keyid_of(self.key)


def keyid_of(key: Ed25519PublicKey) -> str:
    """Return the SHA-256 of a key's 32 bytes."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()


def checked(raw: bytes) -> Ed25519PublicKey:
    """Return the public key of 32 bytes that stand for one point of large order.

    Raises: PackageRefused when they stand for a point of small order, or for none in its one form
    (RFC 8032, section 5.1.3; the library that verifies takes both).
    """
    y = int.from_bytes(raw, "little") & (2**255 - 1)
    if len(raw) != 32 or y >= PRIME or y in LOW_ORDER:
        raise PackageRefused("found a weak or malformed key; expected an Ed25519 key: get another")
    return Ed25519PublicKey.from_public_bytes(raw)


def generate(folder: Path) -> tuple[Path, Path]:
    """Write a new pair of keys, private.pem (mode 600) and public.pem, and return their paths.

    A private key that stands there alone, as a kill may leave it, gets its public half again.
    Raises: RunRefused when both are there: a lost key cannot be had again.
    """
    private, public = folder / "private.pem", folder / "public.pem"
    refuse_existing(public)
    if private.exists():
        key = load_private(private)
    else:
        key = Ed25519PrivateKey.generate()
        form, plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        secret = key.private_bytes(serialization.Encoding.PEM, form, plain)
        write_atomic(private, secret, mode=0o600)
    write_atomic(public, public_pem(key.public_key()))
    return private, public


def public_pem(key: Ed25519PublicKey) -> bytes:
    """Return a public key as the file that load_trust reads."""
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_bytes(serialization.Encoding.PEM, form)


def key_file(path: Path) -> bytes:
    """Return the bytes of a file of keys, which is a small one.

    Raises: OSError; ValueError when it is larger.
    """
    with path.open("rb") as file:
        found = file.read(MOST_FILE + 1)
    if len(found) > MOST_FILE:
        raise ValueError(f"more than {MOST_FILE} bytes")
    return found


def load_private(path: Path) -> Ed25519PrivateKey:
    """Read a private key that only its owner can read.

    Raises: DataError when it is missing or no Ed25519 key; UsageError when others can read it.
    """
    try:
        key = serialization.load_pem_private_key(key_file(path), None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        reason = getattr(error, "strerror", None) or "it is no plain PEM key"
        raise DataError(
            f"could not read the private key {path} ({reason}); expected one that keygen wrote"
        ) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise DataError(f"found another kind of key in {path}; expected Ed25519: use keygen")
    owner_only(path)
    return key


def load_trust(path: Path) -> tuple[Signer, ...]:
    """Read whom the receiver believes: one public.pem, or a folder of NAME.pem.

    Raises: DataError when there is no key, or a file holds something else; PackageRefused when a
    key is weak.
    """
    # keygen may have written the receiver's own keys there.
    own = {path / "private.pem"}
    files = sorted(set(path.glob("*.pem")) - own) if path.is_dir() else [path]
    found: dict[str, Signer] = {}
    for file in files:
        try:
            key = serialization.load_pem_public_key(key_file(file))
        except (OSError, ValueError, UnsupportedAlgorithm) as error:
            reason = getattr(error, "strerror", None) or "it is no PEM public key"
            raise DataError(
                f"could not read the public key {file} ({reason}); expected the sender's public.pem"
            ) from None
        if not isinstance(key, Ed25519PublicKey):
            raise DataError(f"found another kind of key in {file}; expected Ed25519")
        signer = Signer(file.stem, checked(key.public_bytes_raw()))
        found.setdefault(signer.keyid, signer)
    if not 1 <= len(found) <= MOST_KEYS:
        raise DataError(f"found {len(found)} keys in {path}; expected 1 to {MOST_KEYS} .pem files")
    return tuple(found.values())


def statement(files: Mapping[str, bytes]) -> bytes:
    """Return the in-toto statement over every file of a package but the signature."""
    held = Files.of(files)
    subjects = [
        {"name": name, "digest": {"sha256": held.sha256(name)}}
        for name in sorted(held)
        if name != SIGNATURE
    ]
    record = {"_type": STATEMENT, "predicateType": PREDICATE, "predicate": {"format": FORMAT}}
    return canonical(record | {"subject": subjects})


def signed(files: Mapping[str, bytes], keys: Sequence[Ed25519PrivateKey]) -> bytes:
    """Return the envelope that signs all files of a package with each key."""
    named = [(keyid_of(key.public_key()), key) for key in keys]
    return enveloped(PAYLOAD_TYPE, statement(files), named)


def cosigned(files: Mapping[str, bytes], key: Ed25519PrivateKey) -> bytes:
    """Return the envelope of files that were read and checked, with one signature more.

    Raises: RunRefused when the key has signed them already.
    """
    held = parsed(files[SIGNATURE], SIGNATURE, MOST_JSON) if SIGNATURE in files else {}
    more = parsed(signed(files, [key]), SIGNATURE, MOST_JSON)
    marks = [*held.get("signatures", []), *more["signatures"]]
    marks.sort(key=lambda one: one["keyid"])
    if len({one["keyid"] for one in marks}) < len(marks):
        raise RunRefused("found this key's signature in the package; expected another key")
    return canonical({**more, "signatures": marks})


def content_digest(files: Mapping[str, bytes]) -> str:
    """Return the SHA-256 of what is signed: the same however many signed it."""
    return hashlib.sha256(statement(files)).hexdigest()


def verified(
    files: Mapping[str, bytes], trust: Sequence[Signer], threshold: int = 1
) -> list[Signer]:
    """Return who signed these very files, among those the receiver believes.

    Types are pinned, keys come from `trust` alone (a keyid in the package only says which of them
    to try), and what was signed must be, byte for byte, the statement of these files.
    Marks of strangers are not looked at; one under a trusted key must hold.
    Raises: PackageRefused when fewer than `threshold` of them signed it, or anything differs.
    """
    envelope = envelope_of(files[SIGNATURE], PAYLOAD_TYPE, SIGNATURE)
    found = [one for one in trust if one.keyid in envelope.marks]
    for one in found:
        if not envelope.holds(one.keyid, one.key):
            raise PackageRefused(
                f"found a signature that {one.name} did not make under this key; expected a true "
                "one: get the package again"
            )
    if len(found) < threshold:
        raise PackageRefused(
            f"found {len(found)} signature(s) by keys that are trusted here; expected {threshold}: "
            "ask the sender for the public key over another channel, or for a signed package"
        )
    if envelope.payload != statement(files):
        what = _differing(files, envelope.payload)
        raise PackageRefused(
            f"found other files than {found[0].name} signed ({what}); expected them as they were "
            "signed: get the package again"
        )
    return found


def _differing(files: Mapping[str, bytes], payload: bytes) -> str:
    """Say what differs; the payload is signed by a trusted key, and still read with care."""
    record = parsed(payload, "the statement", MOST_JSON)
    subjects, said = record.get("subject"), record.get("predicate")
    if isinstance(said, dict) and later(said.get("format")):
        return "written by a later medistill: upgrade"
    if record.get("predicateType") != PREDICATE or not isinstance(subjects, list):
        return "a statement about something else"
    told = {str(one.get("name")): one for one in subjects if isinstance(one, dict)}
    held = Files.of(files)
    for name in sorted(set(files) - {SIGNATURE} | set(told)):
        if name not in files:
            return f"{name[:40]!a} is missing"
        digest = held.sha256(name)
        if name not in told or told[name].get("digest") != {"sha256": digest}:
            return f"{name} differs"
    return "another form of it"
