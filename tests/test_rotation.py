"""Keys that are changed: whom a receiver believes after, and by which notes nobody is believed."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner

from medistill import conformance
from medistill.backbones import ConvNet
from medistill.budget import Budget
from medistill.cli import app
from medistill.distill import Run, distill_to
from medistill.errors import DataError, PackageRefused, RunRefused, UsageError
from medistill.methods import DM, Task
from medistill.package import Terms, generate, load_private, load_trust, pack, read, written
from medistill.package.envelope import envelope_of, enveloped, text_of
from medistill.package.keys import keyid_of, public_pem
from medistill.package.rotation import FORMAT, KIND, accepted, rotation
from medistill.records import canonical

Key = Ed25519PrivateKey


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small run."""
    place = tmp_path_factory.mktemp("rotation") / "run"
    task = Task(conformance.toy(), Budget(ipc=1), ConvNet(1, 4))
    distill_to(place, Run(DM(), task, 0, "toy", "", 1), resume=False)
    return place


@pytest.fixture
def keys() -> dict[str, Key]:
    """Return the keys of a sender, before and after, of a second sender and of a thief."""
    return {name: Key.generate() for name in ("old", "new", "other", "thief")}


@pytest.fixture
def trust(tmp_path: Path, keys: dict[str, Key]) -> Path:
    """Return a receiver's folder of keys: two senders."""
    (tmp_path / "trust").mkdir()
    for name, key in (("site-a", "old"), ("site-b", "other")):
        path = tmp_path / "trust" / f"{name}.pem"
        path.write_bytes(public_pem(keys[key].public_key()))
    return tmp_path / "trust"


def packed(run: Path, out: Path, key: Key, counter: int) -> Path:
    """Return a package of some version, signed."""
    allow: Any = ["no-audit", "no-scores", "small-class"]
    written(out, pack(run, Terms("toy", counter), [key], allow=allow))
    return out


def cli(*words: object) -> Any:
    """Run the command line."""
    return CliRunner().invoke(app, [str(word) for word in words])


def names_of(trust: Path) -> dict[str, str]:
    """Return whom a receiver believes."""
    return {one.name: one.keyid for one in load_trust(trust)}


def test_a_new_key_takes_the_old_ones_place_and_a_thief_gained_nothing(
    run: Path, tmp_path: Path, trust: Path, keys: dict[str, Key]
) -> None:
    stolen = packed(run, tmp_path / "stolen", keys["old"], 10**9)
    read(stolen, trust)  # the thief has driven the number of versions up
    own = packed(run, tmp_path / "own", keys["old"], 2)
    with pytest.raises(PackageRefused, match="or later, which was seen here"):
        read(own, trust)
    note = tmp_path / "rotation.json"
    note.write_bytes(rotation(keys["old"], keys["new"]))
    old, new = accepted(note, trust)
    assert (old.name, new.name) == ("site-a", "site-a")
    ids = {name: keyid_of(key.public_key()) for name, key in keys.items()}
    assert names_of(trust) == {"site-a": ids["new"], "site-b": ids["other"]}
    assert [path.name for path in trust.glob("*.retired")] == [
        f"site-a.pem.{ids['old'][:8]}.retired"
    ]
    with pytest.raises(PackageRefused, match="0 signature"):
        read(stolen, trust)
    assert read(packed(run, tmp_path / "again", keys["new"], 2), trust).signers[0].name == "site-a"
    with pytest.raises(PackageRefused, match="not trusted here"):
        accepted(note, trust)  # a note is good once


def test_one_file_is_changed_as_a_folder_is(tmp_path: Path, keys: dict[str, Key]) -> None:
    place = tmp_path / "public.pem"
    place.write_bytes(public_pem(keys["old"].public_key()))
    (tmp_path / "note").write_bytes(rotation(keys["old"], keys["new"]))
    accepted(tmp_path / "note", place)
    assert names_of(place) == {"public": keyid_of(keys["new"].public_key())}


def test_a_key_that_stands_there_twice_is_changed_twice(
    tmp_path: Path, trust: Path, keys: dict[str, Key]
) -> None:
    (trust / "zzz.pem").write_bytes((trust / "site-a.pem").read_bytes())
    (tmp_path / "note").write_bytes(rotation(keys["old"], keys["new"]))
    accepted(tmp_path / "note", trust)
    assert keyid_of(keys["old"].public_key()) not in names_of(trust).values()


def test_a_note_that_is_offered_again_brings_no_old_key_back(
    tmp_path: Path, trust: Path, keys: dict[str, Key]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_bytes(rotation(keys["old"], keys["new"]))
    second.write_bytes(rotation(keys["new"], keys["thief"]))  # named so, and honest here
    accepted(first, trust)
    accepted(second, trust)
    third = tmp_path / "third"
    third.write_bytes(rotation(keys["thief"], keys["old"]))  # home again, says the sender
    with pytest.raises(RunRefused, match="was replaced here before"):
        accepted(third, trust)
    with pytest.raises(PackageRefused, match="not trusted here"):
        accepted(first, trust)


def test_what_a_kill_left_between_two_files_is_finished(
    tmp_path: Path, trust: Path, keys: dict[str, Key]
) -> None:
    (trust / "zzz.pem").write_bytes((trust / "site-a.pem").read_bytes())
    (trust / "site-a.pem").write_bytes(public_pem(keys["new"].public_key()))  # as a kill leaves it
    (tmp_path / "note").write_bytes(rotation(keys["old"], keys["new"]))
    accepted(tmp_path / "note", trust)
    assert keyid_of(keys["old"].public_key()) not in names_of(trust).values()


def note_of(keys: dict[str, Key], by: tuple[str, ...], **changed: str) -> bytes:
    """Return a note signed by some keys only."""
    record = {
        "format": FORMAT,
        "old": keyid_of(keys["old"].public_key()),
        "new": text_of(keys["new"].public_key().public_bytes_raw()),
        "date": "2026-01-01",
    }
    signers = [(keyid_of(keys[name].public_key()), keys[name]) for name in by]
    return enveloped(KIND, canonical(record | changed), signers)


WEAK = text_of(bytes(32))
Make = Callable[[dict[str, Key]], bytes]
BAD: dict[str, Make] = {
    "by the old key alone": lambda keys: note_of(keys, ("old",)),
    "by the new key alone": lambda keys: note_of(keys, ("new",)),
    "by the new key and another sender": lambda keys: note_of(keys, ("new", "other")),
    "by a thief for his own key": lambda keys: rotation(keys["thief"], keys["new"]),
    "under the old key's name": lambda keys: note_of(keys, ("thief", "new")),
    "a weak key": lambda keys: note_of(keys, ("old", "new"), new=WEAK),
    "more fields": lambda keys: note_of(keys, ("old", "new"), more="1"),
    "another format": lambda keys: note_of(keys, ("old", "new"), format="medistill rotation 2"),
    "a note of another type": lambda keys: note_of(keys, ("old", "new")).replace(
        KIND.encode(), b"application/vnd.in-toto+json"
    ),
    "no JSON": lambda keys: b"{",
    "nothing": lambda keys: b"",
    "another form": lambda keys: note_of(keys, ("old", "new")).replace(b":", b": ", 1),
    "endless": lambda keys: b" " * (1 << 20),
}


@pytest.mark.parametrize("what", BAD)
def test_other_notes_change_nothing(
    what: str, tmp_path: Path, trust: Path, keys: dict[str, Key]
) -> None:
    before = names_of(trust)
    (tmp_path / "note").write_bytes(BAD[what](keys))
    result = cli("accept", tmp_path / "note", "--trust", trust)
    assert (result.exit_code, result.stderr.count("\n")) == (4, 1), result.output
    assert names_of(trust) == before
    assert not list(trust.glob("*.retired"))


def test_every_flipped_bit_of_a_note_is_refused(
    tmp_path: Path, trust: Path, keys: dict[str, Key]
) -> None:
    content = bytearray(rotation(keys["old"], keys["new"]))
    for at in range(len(content)):
        content[at] ^= 1 << at % 8
        (tmp_path / "note").write_bytes(content)
        with pytest.raises(PackageRefused):
            accepted(tmp_path / "note", trust)
        content[at] ^= 1 << at % 8


def test_who_asks_for_two_is_not_convinced_by_a_stolen_key(
    tmp_path: Path, trust: Path, keys: dict[str, Key]
) -> None:
    note = tmp_path / "note"
    note.write_bytes(rotation(keys["old"], keys["thief"]))
    with pytest.raises(PackageRefused, match="found 1 signature"):
        accepted(note, trust, threshold=2)
    note.write_bytes(rotation(keys["old"], keys["new"], [keys["other"]]))
    assert accepted(note, trust, threshold=2)[1].keyid == keyid_of(keys["new"].public_key())
    with pytest.raises(UsageError, match="threshold 0"):
        accepted(note, trust, threshold=0)


def test_the_command_line_changes_keys(tmp_path: Path) -> None:
    for name in ("before", "after"):
        generate(tmp_path / name)
    private = [tmp_path / name / "private.pem" for name in ("before", "after")]
    note, trust = tmp_path / "rotation.json", tmp_path / "before" / "public.pem"
    made = cli("rotate", *private, "--out", note)
    assert made.exit_code == 0, made.output
    assert cli("rotate", *private, "--out", note).exit_code == 5
    same = cli("rotate", private[0], private[0], "--out", tmp_path / "x")
    assert (same.exit_code, "found a key twice" in same.stderr) == (2, True)
    shown = cli("accept", note, "--trust", trust, "--json")
    assert shown.exit_code == 0, shown.output
    after = load_trust(tmp_path / "after" / "public.pem")[0].keyid
    assert names_of(trust) == {"public": after}
    assert cli("accept", tmp_path / "absent", "--trust", trust).exit_code == 3
    again = [load_private(path) for path in reversed(private)]
    note.unlink()
    note.write_bytes(rotation(*again))
    back = cli("accept", note, "--trust", trust)
    assert (back.exit_code, "was replaced here before" in back.stderr) == (5, True)
    with pytest.raises(DataError):
        accepted(note, tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    writer = os.open(tmp_path / "pipe", os.O_RDWR)
    assert cli("accept", tmp_path / "pipe", "--trust", trust).exit_code == 4
    os.close(writer)
    assert envelope_of(note.read_bytes(), KIND, "note").marks
