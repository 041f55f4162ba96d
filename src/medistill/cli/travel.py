"""medistill push, pull, encrypt, decrypt and export: packages on their way, and for others."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .common import AsJson, Out, emit, guarded
from .package import Archive, Threshold, Trust, Unsigned

if TYPE_CHECKING:
    from ..package import Package

Where = Annotated[
    str, typer.Argument(help="oci:HOST/NAME:TAG, a URL that fsspec knows (s3://...), or a path.")
]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="Speak plain HTTP with a registry (on this machine).")
]


@guarded
def push(
    package: Archive, target: Where, insecure: Insecure = False, as_json: AsJson = False
) -> None:
    """Send a package to a registry of containers, or to any place that fsspec reaches.

    Example: medistill push first.medistill shared/first.medistill
    """
    from ..package.transfer import push as send

    digest = send(package, target, insecure=insecure)
    record = {"target": target, "sha256": digest}
    emit(record, f"{package} is in {target}; sha256 {digest}", as_json)


@guarded
def pull(
    source: Where,
    out: Out,
    trust: Trust = None,
    unsigned: Unsigned = False,
    threshold: Threshold = 1,
    insecure: Insecure = False,
    as_json: AsJson = False,
) -> None:
    """Get a package from where push sends; it is checked, as verify does, before it is written.

    Example: medistill pull shared/first.medistill --trust keys/public.pem --out copy.medistill
    """
    from ..package.read import received
    from ..package.transfer import pulled
    from ..records import refuse_existing

    refuse_existing(out)
    content = pulled(source, insecure=insecure)
    found = received(content, out, trust, unsigned=unsigned, threshold=threshold)
    _told(out, found, as_json)


def _told(out: Path, found: "Package", as_json: bool) -> None:
    record = {"package": str(out), "sha256": found.sha256, "bytes": found.bytes}
    emit(record, f"{out}: {found.bytes:,} bytes, whole", as_json)


@guarded
def encrypt(
    package: Archive,
    to: Annotated[
        list[str], typer.Option(help="A recipient's age1... key, or a file with it; repeatable.")
    ],
    out: Out,
    as_json: AsJson = False,
) -> None:
    """Seal a package (age format), so that only the named recipients can open it.

    Sign first, with pack: a seal keeps others out, and says nothing of who sent it.

    Example: medistill encrypt first.medistill --to keys/recipient.txt --out first.age
    """
    from ..package.archive import archived, read_files, whole
    from ..package.seal import seal
    from ..records import refuse_existing, write_atomic

    refuse_existing(out)
    sealed, count = seal(archived(whole(read_files(package))), to)
    write_atomic(out, sealed)
    record = {"sealed": str(out), "bytes": len(sealed), "recipients": count}
    emit(record, f"{out}: {len(sealed):,} bytes, for {count} recipient(s)", as_json)


@guarded
def decrypt(
    sealed: Annotated[Path, typer.Argument(help="A file that encrypt wrote.")],
    identity: Annotated[Path, typer.Option(help="identity.txt that keygen --age wrote.")],
    out: Out,
    trust: Trust = None,
    unsigned: Unsigned = False,
    threshold: Threshold = 1,
    as_json: AsJson = False,
) -> None:
    """Open a sealed package; it is checked, as verify does, before it is written.

    Example: medistill decrypt a.age --identity id.txt --trust keys/public.pem --out a.medistill
    """
    from ..package.read import received
    from ..package.seal import unseal
    from ..records import refuse_existing

    refuse_existing(out)
    content = unseal(sealed, identity)
    # Sealed for its recipient, it stays the recipient's alone.
    found = received(content, out, trust, unsigned=unsigned, threshold=threshold, mode=0o600)
    _told(out, found, as_json)


@guarded
def export(
    package: Archive,
    to: Annotated[
        Literal["npz", "medmnist", "folder", "hf"], typer.Option(help="The form to write.")
    ],
    out: Out,
    trust: Trust = None,
    unsigned: Unsigned = False,
    threshold: Threshold = 1,
    as_json: AsJson = False,
) -> None:
    """Write a package's images for other programs: arrays, MedMNIST's form, pictures, a hub.

    medmnist and the pictures hold pixels of 8 bits, clipped to black and white; npz holds all
    numbers. The classes of the medmnist program read its file by index; its val and test are empty,
    and their len() knows the official number of images alone.

    Example: medistill export a.medistill --trust keys/public.pem --to medmnist --out a.npz
    """
    from ..package import read
    from ..package.export import export as write

    found = read(package, trust, unsigned=unsigned, threshold=threshold)
    write(found, to, out)
    emit({"out": str(out), "to": to}, f"{found.manifest.name} as {to} in {out}", as_json)
