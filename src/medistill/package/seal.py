"""Sealed packages: the age format, for recipients who are named by their keys."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError, PackageRefused, UsageError, extra
from ..records import owner_only, refuse_existing, write_atomic
from .archive import MOST_BYTES, MOST_TEXT

KIND = "age1"
OVERHEAD = 1 << 20  # of the format: a header, and 16 bytes for each 64 KiB


def generate_identity(folder: Path) -> tuple[Path, Path]:
    """Write a new identity.txt (mode 600) and recipient.txt for sealed packages.

    An identity that stands there alone, as a kill may leave it, gets its recipient again.
    Raises: RunRefused when both are there; UsageError without the extra share.
    """
    secret, known = folder / "identity.txt", folder / "recipient.txt"
    refuse_existing(known)
    if secret.exists():
        identity = _identity(secret)
    else:
        identity = _pyrage().x25519.Identity.generate()
        write_atomic(secret, f"{identity}\n".encode(), mode=0o600)
    write_atomic(known, f"{identity.to_public()}\n".encode())
    return secret, known


def seal(content: bytes, recipients: Sequence[str]) -> bytes:
    """Return content that each of the recipients (age1... keys, or files of them) can open.

    Sign first, then seal: who may open it stands inside, under the signature.
    Raises: UsageError when there is no recipient, or one is no key.
    """
    pyrage = _pyrage()
    try:
        keys = [pyrage.x25519.Recipient.from_str(text) for text in map(_known, recipients)]
        sealed: bytes = pyrage.encrypt(content, keys)
    except (pyrage.RecipientError, pyrage.EncryptError, OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"found a recipient that is no key ({error}); expected age1..., or a file that holds it"
        ) from None
    return sealed


def _known(text: str) -> str:
    return text if text.startswith(KIND) else Path(text).read_text(encoding="ascii").strip()


def unseal(path: Path, identity: Path) -> bytes:
    """Return what a sealed file holds, with the identity that it was sealed for.

    Raises: PackageRefused when it was sealed for others or was changed; DataError when the
    identity cannot be read; UsageError when others can read the identity.
    """
    pyrage, own = _pyrage(), _identity(identity)
    try:
        if path.stat().st_size > MOST_BYTES + MOST_TEXT + OVERHEAD:
            raise PackageRefused(f"found {path} larger than any package; expected a smaller one")
        opened: bytes = pyrage.decrypt(path.read_bytes(), [own])
    except OSError as error:
        raise DataError(f"could not read {path}: {error.strerror}; expected a file") from None
    except pyrage.DecryptError:
        raise PackageRefused(
            f"could not open {path}: it was sealed for others, or changed; expected one sealed for "
            f"{own.to_public()}"
        ) from None
    return opened


def _identity(path: Path) -> Any:
    """Read an identity that only its owner can read."""
    pyrage = _pyrage()
    try:
        own = pyrage.x25519.Identity.from_str(path.read_text(encoding="ascii").strip())
    except (OSError, UnicodeDecodeError, pyrage.IdentityError):
        raise DataError(
            f"could not read an identity from {path}; expected one that keygen --age wrote"
        ) from None
    owner_only(path)
    return own


def _pyrage() -> Any:
    return extra("pyrage", "share")
