"""medistill keygen, rotate and accept: the keys that packages are signed with."""

from pathlib import Path
from typing import Annotated

import typer

from .common import AsJson, Out, emit, guarded
from .package import Threshold

Age = Annotated[
    bool, typer.Option("--age", help="Also identity.txt and recipient.txt, for sealed packages.")
]


@guarded
def keygen(
    out: Annotated[Path, typer.Option(help="Folder for private.pem and public.pem.")],
    age: Age = False,
    as_json: AsJson = False,
) -> None:
    """Make the pair of keys that packages are signed with.

    Keep private.pem (nobody else can read it); give public.pem to receivers over a channel that
    they trust, for with it they know your packages from others. With --age a pair that is there
    already is kept.

    Example: medistill keygen --out keys
    """
    from ..package import generate, load_trust
    from ..package.seal import generate_identity

    private, public = out / "private.pem", out / "public.pem"
    if not (age and private.exists() and public.exists()):
        generate(out)
    keyid = load_trust(public)[0].keyid
    record = {"private": str(private), "public": str(public), "keyid": keyid}
    text = f"keep {private}; give away {public}\nfingerprint {keyid}"
    if age:
        secret, known = generate_identity(out)
        record |= {"identity": str(secret), "recipient": str(known)}
        text += f"\nkeep {secret}; give {known} to who shall send sealed packages"
    emit(record, text, as_json)


@guarded
def rotate(
    old: Annotated[Path, typer.Argument(help="The private.pem that was used until now.")],
    new: Annotated[Path, typer.Argument(help="The private.pem that is used from now on.")],
    out: Out,
    key: Annotated[
        list[Path] | None,
        typer.Option(help="private.pem of another that receivers trust; may be repeated."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a note that a new key replaces an old one, for receivers to accept.

    Both keys sign it, and others that receivers trust, for those who ask for more than one.
    Packages of the old key are believed no more once it is accepted: sign them anew, too.

    Example: medistill rotate keys/private.pem keys-new/private.pem --out rotation.json
    """
    from ..package import load_private
    from ..package.rotation import rotation
    from ..records import refuse_existing, write_atomic

    refuse_existing(out)
    others = [load_private(path) for path in key or ()]
    write_atomic(out, rotation(load_private(old), load_private(new), others))
    emit({"rotation": str(out)}, f"{out}: give it to receivers", as_json)


@guarded
def accept(
    rotation: Annotated[Path, typer.Argument(help="A note that rotate wrote.")],
    trust: Annotated[
        Path, typer.Option(help="public.pem, or a folder of NAME.pem: the old key's is replaced.")
    ],
    threshold: Threshold = 1,
    as_json: AsJson = False,
) -> None:
    """Believe a sender's new key in place of the old one, if the old key and the new sign it.

    The old key stays beside it under a name that is not read. If the old key may be in a thief's
    hands, do not accept a note that it alone signed: ask for --threshold 2, or for the new key over
    another channel.

    Example: medistill accept rotation.json --trust trust
    """
    from ..package.rotation import accepted

    old, new = accepted(rotation, trust, threshold)
    record = {"name": new.name, "old": old.keyid, "new": new.keyid}
    emit(record, f"{new.name}: {old.keyid} is replaced by {new.keyid}", as_json)
