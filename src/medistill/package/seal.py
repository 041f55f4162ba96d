"""Sealed packages: the age format, for recipients who are named by their keys."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError, PackageRefused, UsageError, extra
from ..records import owner_only, refuse_existing, write_atomic
from .archive import MOST_BYTES, MOST_TEXT, plain_file
from .keys import key_file

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


def seal(content: bytes, recipients: Sequence[str]) -> tuple[bytes, int]:
    """Return content that each of the recipients (age1... keys, or files of them) can open.

    The number is that of keys: a file may hold several.

    Sign first, then seal: who may open it stands inside, under the signature.
    Raises: UsageError when there is no recipient, or one is no key.
    """
    pyrage = _pyrage()
    try:
        named = [text for one in recipients for text in _known(one)]
        keys = [pyrage.x25519.Recipient.from_str(text) for text in named]
        sealed: bytes = pyrage.encrypt(content, keys)
    except (pyrage.RecipientError, pyrage.EncryptError, OSError, ValueError) as error:
        raise UsageError(
            f"found a recipient that is no key ({error}); expected age1..., or a file that holds it"
        ) from None
    return sealed, len(keys)


def _known(text: str) -> list[str]:
    """Return the keys of a recipient: itself, or those of a file, as age has it."""
    return [text] if text.startswith(KIND) else _lines(key_file(Path(text)))


def _lines(content: bytes) -> list[str]:
    """Return the lines that are neither empty nor comments."""
    lines = (line.strip() for line in content.decode("ascii").splitlines())
    found = [line for line in lines if line and not line.startswith("#")]
    if not found:
        raise ValueError("no key in it")
    return found


def unseal(path: Path, identity: Path) -> bytes:
    """Return what a sealed file holds, with the identity that it was sealed for.

    Raises: PackageRefused when it was sealed for others or was changed; DataError when the
    identity cannot be read; UsageError when others can read the identity.
    """
    pyrage, own = _pyrage(), _identity(identity)
    try:
        sealed = plain_file(path, MOST_BYTES + MOST_TEXT + OVERHEAD)
        opened: bytes = pyrage.decrypt(sealed, [own])
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
        (text,) = _lines(key_file(path))
        own = pyrage.x25519.Identity.from_str(text)
    except (OSError, ValueError, pyrage.IdentityError):
        raise DataError(
            f"could not read an identity from {path}; expected one that keygen --age wrote"
        ) from None
    owner_only(path)
    return own


def _pyrage() -> Any:
    return extra("pyrage", "share")
