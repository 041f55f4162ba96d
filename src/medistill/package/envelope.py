"""DSSE: an envelope of a payload, its type, and the Ed25519 signatures over both."""

import base64
import binascii
from collections.abc import Sequence
from typing import NamedTuple

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from ..errors import PackageRefused
from ..records import Json, canonical
from .archive import MOST_JSON
from .strict import parsed

MOST_KEYS = 64


class Envelope(NamedTuple):
    """What was signed, and the signatures by the key that each says it is of; none is checked."""

    kind: str
    payload: bytes
    marks: dict[str, bytes]

    def holds(self, keyid: str, key: Ed25519PublicKey) -> bool:
        """Say whether a key signed this payload under this type."""
        if keyid not in self.marks:
            return False
        try:
            key.verify(self.marks[keyid], pae(self.kind, self.payload))
        except InvalidSignature:
            return False
        return True


def pae(kind: str, payload: bytes) -> bytes:
    """Return what is signed: DSSEv1's pre-authentication encoding of a type and a payload."""
    name = kind.encode()
    return b"DSSEv1 %d %b %d %b" % (len(name), name, len(payload), payload)


def enveloped(kind: str, payload: bytes, keys: Sequence[tuple[str, Ed25519PrivateKey]]) -> bytes:
    """Return the envelope of a payload, signed with each key, given with its keyid."""
    said = pae(kind, payload)
    marks = [{"keyid": keyid, "sig": text_of(key.sign(said))} for keyid, key in keys]
    marks.sort(key=lambda one: one["keyid"])
    return canonical({"payload": text_of(payload), "payloadType": kind, "signatures": marks})


def envelope_of(content: bytes, kind: str, name: str) -> Envelope:
    """Read an envelope of one pinned type, in the one form that `enveloped` gives it.

    Raises: PackageRefused.
    """
    record = parsed(content, name, MOST_JSON)
    if set(record) != {"payload", "payloadType", "signatures"}:
        raise PackageRefused(f"found other fields in {name} than an envelope has")
    if record["payloadType"] != kind:
        raise PackageRefused(f"found a signature of another type; expected {kind}")
    payload, marks = bytes_of(record["payload"], name), _marks(record, name)
    if canonical(record) != content:
        raise PackageRefused(f"found {name} in another form than medistill writes; get it again")
    return Envelope(kind, payload, marks)


def _marks(record: Json, name: str) -> dict[str, bytes]:
    marks = record["signatures"]
    if not isinstance(marks, list) or not 1 <= len(marks) <= MOST_KEYS:
        raise PackageRefused(f"found no list of 1 to {MOST_KEYS} signatures in {name}")
    if not all(isinstance(mark, dict) and set(mark) == {"keyid", "sig"} for mark in marks):
        raise PackageRefused(f"found other fields in a signature of {name}")
    return {str(mark["keyid"]): bytes_of(mark["sig"], name) for mark in marks}


def text_of(content: bytes) -> str:
    """Return bytes as base64."""
    return base64.b64encode(content).decode()


def bytes_of(text: object, name: str) -> bytes:
    """Return what a text of base64 stands for, if it is the one text that does.

    Raises: PackageRefused.
    """
    try:
        found = base64.b64decode(text if isinstance(text, str) else "=", validate=True)
    except (binascii.Error, ValueError):
        found = b""
    if not found or text_of(found) != text:
        raise PackageRefused(f"found no plain base64 in {name}; expected the sender's file")
    return found
