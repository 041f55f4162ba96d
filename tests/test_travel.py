"""Packages on their way: registries, other places, seals, and forms that others read."""

import dataclasses
import hashlib
import json
import os
import shutil
import socket
import subprocess
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from medistill.cli import app
from medistill.data import load
from medistill.errors import DataError, PackageRefused, UsageError
from medistill.package import Terms, generate, load_private, pack, read, transfer, written
from medistill.package.export import _license, bytes_of, export, slug, whole
from medistill.package.seal import generate_identity, seal, unseal
from medistill.package.transfer import MOST, pulled, push
from medistill.records import read_json, write_atomic

SOURCE = "phantom:n=60,size=16"


def cli(*words: object) -> Any:
    """Run the command line."""
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a place with keys and a signed package of four-tile images."""
    place = tmp_path_factory.mktemp("site")
    words = ["distill", SOURCE, "--backbone", "convnet-1-4", "--ipc", "2", "--method", "sketch"]
    made = cli(*words, "--steps", "2", "--networks", "2", "--out", place / "run")
    assert made.exit_code == 0, made.output
    generate(place / "keys")
    generate_identity(place / "keys")
    key = load_private(place / "keys" / "private.pem")
    files = pack(place / "run", Terms("small"), [key], allow=["no-audit", "no-scores"])
    written(place / "a.medistill", files)
    return place


def test_a_package_travels_through_places_that_fsspec_knows(site: Path, tmp_path: Path) -> None:
    pytest.importorskip("fsspec")
    content = (site / "a.medistill").read_bytes()
    trust = ("--trust", site / "keys" / "public.pem")
    for target in (str(tmp_path / "shared" / "a"), f"file://{tmp_path}/other", "memory://a/b"):
        sent = cli("push", site / "a.medistill", target, "--json")
        assert sent.exit_code == 0, sent.output
        out = tmp_path / slug(target)
        got = cli("pull", target, *trust, "--out", out)
        assert got.exit_code == 0, got.output
        assert out.read_bytes() == content
    for target in (tmp_path / "shared" / "a", "memory://a/b"):
        assert cli("push", site / "a.medistill", target).exit_code == 5
    assert cli("push", site / "a.medistill", "file:a").exit_code == 2
    assert cli("pull", tmp_path / "none", *trust, "--out", tmp_path / "x").exit_code == 3
    assert cli("pull", "none://a", *trust, "--out", tmp_path / "x").exit_code == 3
    assert not (tmp_path / "x").exists()


def test_what_is_pulled_is_checked_before_it_is_written(site: Path, tmp_path: Path) -> None:
    content = bytearray((site / "a.medistill").read_bytes())
    content[100] ^= 1
    (tmp_path / "bad").write_bytes(content)
    trust = ("--trust", site / "keys" / "public.pem")
    assert cli("pull", tmp_path / "bad", *trust, "--out", tmp_path / "x").exit_code == 4
    assert cli("pull", site / "a.medistill", "--out", tmp_path / "x").exit_code == 4  # no --trust
    with open(tmp_path / "large", "wb") as file:
        file.truncate(MOST + 1)
    with pytest.raises(PackageRefused, match="more than"):
        pulled(str(tmp_path / "large"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "large"]


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start a real registry on loopback."""
    pytest.importorskip("oras")
    if not shutil.which("docker-registry"):
        pytest.skip("no docker-registry on this machine")
    place = tmp_path_factory.mktemp("registry")
    host = f"127.0.0.1:{free_port()}"
    text = f"version: 0.1\nstorage: {{filesystem: {{rootdirectory: {place}}}}}\n"
    (place / "config.yml").write_text(text + f"http: {{addr: '{host}'}}\nlog: {{level: error}}\n")
    words = ["docker-registry", "serve", str(place / "config.yml")]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        for _ in range(100):
            try:
                urlopen(f"http://{host}/v2/").close()
                break
            except OSError:
                time.sleep(0.1)
        yield host
        server.terminate()


def test_a_package_travels_through_a_registry(site: Path, registry: str, tmp_path: Path) -> None:
    target = f"oci:{registry}/hospitals/small:1"
    sent = cli("push", site / "a.medistill", target, "--insecure", "--json")
    assert sent.exit_code == 0, sent.output
    trust = ("--trust", site / "keys" / "public.pem", "--insecure")
    got = cli("pull", target, *trust, "--out", tmp_path / "a", "--json")
    assert got.exit_code == 0, got.output
    assert (tmp_path / "a").read_bytes() == (site / "a.medistill").read_bytes()
    assert json.loads(got.stdout)["sha256"] == json.loads(sent.stdout)["sha256"]
    again = cli("push", site / "a.medistill", target, "--insecure")
    assert (again.exit_code, again.stderr.count("\n")) == (5, 1)  # a tag is not replaced
    assert "already there" in again.stderr
    manifest = urlopen(
        Request(
            f"http://{registry}/v2/hospitals/small/manifests/1",
            headers={"Accept": "application/vnd.oci.image.manifest.v1+json"},
        )
    ).read()
    named = f"oci:{registry}/hospitals/small@sha256:{hashlib.sha256(manifest).hexdigest()}"
    assert cli("pull", named, *trust, "--out", tmp_path / "by digest").exit_code == 0
    absent = cli("pull", f"oci:{registry}/none:1", *trust, "--out", tmp_path / "b")
    assert absent.exit_code == 3
    assert absent.stderr.count("\n") == 1
    assert cli("pull", "oci:nowhere", *trust, "--out", tmp_path / "b").exit_code == 2


def test_a_registry_that_is_not_there_is_told_at_once(tmp_path: Path) -> None:
    pytest.importorskip("oras.client")
    begin = time.monotonic()
    result = cli("pull", "oci:127.0.0.1:1/a:1", "--insecure", "--unsigned", "--out", tmp_path / "a")
    assert (result.exit_code, result.stderr.count("\n")) == (3, 1)
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize("source", ["memory://*", "github://x", "dir://x", "no/such", "pipe"])
def test_places_that_are_none_are_one_line(source: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    where = tmp_path / source if "://" not in source else source
    result = cli("pull", where, "--unsigned", "--out", tmp_path / "out")
    assert (result.exit_code, result.stderr.count("\n")) == (3, 1), result.output


def test_a_registry_that_says_nothing_is_given_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("oras")
    monkeypatch.setattr(transfer, "ANSWER_S", 0.3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        begin = time.monotonic()
        name = f"oci:127.0.0.1:{silent.getsockname()[1]}/a:1"
        result = cli("pull", name, "--unsigned", "--insecure", "--out", tmp_path / "x")
    assert (result.exit_code, result.stderr.count("\n")) == (3, 1), result.output
    assert time.monotonic() - begin < 20


def test_a_registry_that_lies_is_not_believed(
    site: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    client = pytest.importorskip("oras.client")
    from medistill.package.transfer import LAYER

    class Answer:
        """What a registry answers."""

        def __init__(self, parts: list[bytes]) -> None:
            self.parts = parts

        def __enter__(self) -> "Answer":
            return self

        def __exit__(self, *_: object) -> None: ...

        def raise_for_status(self) -> None: ...

        def iter_content(self, _: int) -> list[bytes]:
            return self.parts

    layer = {"mediaType": LAYER, "size": 10, "digest": "sha256:" + "0" * 64}
    cases: list[tuple[Any, list[bytes], type[Exception]]] = [
        ({"layers": [layer]}, [b"other"], PackageRefused),
        ({"layers": [layer]}, [b"x" * (1 << 20)] * 80, PackageRefused),
        ({"layers": [layer, layer]}, [b""], PackageRefused),
        ({"layers": [{**layer, "size": MOST + 1}]}, [b""], PackageRefused),
        ({"layers": [{**layer, "mediaType": "text/html"}]}, [b""], PackageRefused),
        ({"layers": [{**layer, "size": "x"}]}, [b""], DataError),
        ({"layers": None}, [b""], DataError),
        ([], [b""], PackageRefused),
        ({"layers": [], "more": "x" * (1 << 20)}, [b""], PackageRefused),
    ]
    monkeypatch.setattr(transfer, "_knock", lambda *_: None)
    told = Answer([json.dumps({"layers": [layer]}).encode()])
    monkeypatch.setattr(client.OrasClient, "do_request", lambda *_, **__: told)
    with pytest.raises(PackageRefused, match="expected the one asked for"):
        pulled(f"oci:127.0.0.1:1/a@sha256:{'1' * 64}", insecure=True)
    for manifest, parts, error in cases:
        told = Answer([json.dumps(manifest).encode()])
        monkeypatch.setattr(client.OrasClient, "do_request", lambda *_, t=told, **__: t)
        monkeypatch.setattr(client.OrasClient, "get_blob", lambda *_, p=parts, **__: Answer(p))
        with pytest.raises(error):
            pulled("oci:127.0.0.1:1/a:1", insecure=True)


def test_only_the_named_recipients_open_a_sealed_package(site: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyrage")
    generate_identity(tmp_path / "other")
    keys, package = site / "keys", site / "a.medistill"
    words = ["encrypt", package, "--to", keys / "recipient.txt"]
    made = cli(*words, "--to", (tmp_path / "other" / "recipient.txt").read_text().strip(),
               "--out", tmp_path / "a.age")  # fmt: skip
    assert made.exit_code == 0, made.output
    sealed = (tmp_path / "a.age").read_bytes()
    assert sealed.startswith(b"age-encryption.org/v1\n")
    assert package.read_bytes()[:100] not in sealed
    for number, folder in enumerate((keys, tmp_path / "other")):
        words = ["decrypt", tmp_path / "a.age", "--identity", folder / "identity.txt"]
        words += ["--trust", keys / "public.pem", "--out", tmp_path / f"{number}.medistill"]
        assert cli(*words).exit_code == 0, cli(*words).output
        assert (tmp_path / f"{number}.medistill").read_bytes() == package.read_bytes()
    generate_identity(tmp_path / "stranger")
    with pytest.raises(PackageRefused, match="sealed for others"):
        unseal(tmp_path / "a.age", tmp_path / "stranger" / "identity.txt")
    (tmp_path / "b.age").write_bytes(sealed[:-1] + bytes([sealed[-1] ^ 1]))
    with pytest.raises(PackageRefused, match="sealed for others, or changed"):
        unseal(tmp_path / "b.age", keys / "identity.txt")
    with pytest.raises(UsageError, match="no key"):
        seal(b"x", ["age1nothing"])
    with pytest.raises(UsageError, match="no key"):
        seal(b"x", [str(tmp_path / "absent")])
    with pytest.raises(DataError, match="identity"):
        unseal(tmp_path / "a.age", keys / "recipient.txt")
    write_atomic(tmp_path / "open.txt", (keys / "identity.txt").read_bytes())
    with pytest.raises(UsageError, match="open to others"):
        unseal(tmp_path / "a.age", tmp_path / "open.txt")
    assert os.stat(keys / "identity.txt").st_mode & 0o777 == 0o600


def test_other_programs_read_what_export_writes(site: Path, tmp_path: Path) -> None:
    words = ["export", site / "a.medistill", "--trust", site / "keys" / "public.pem"]
    for to in ("npz", "medmnist", "folder", "hf"):
        made = cli(*words, "--to", to, "--out", tmp_path / f"{to}.npz")
        assert made.exit_code == 0, made.output
    package = read(site / "a.medistill", site / "keys" / "public.pem")
    images, labels = whole(package)
    assert len(images) == 4 * len(package.images)  # every image holds four tiles
    held = np.load(tmp_path / "npz.npz", allow_pickle=False)
    assert np.array_equal(held["images"], images.numpy())
    assert np.array_equal(held["labels"], labels.numpy())
    assert held["mean"].tolist() == list(package.manifest.recipe.mean)
    other = np.load(tmp_path / "medmnist.npz", allow_pickle=False)
    assert (other["train_images"].shape, other["train_images"].dtype) == ((16, 16, 16), np.uint8)
    assert (other["train_labels"].shape, other["train_labels"].dtype) == ((16, 1), np.uint8)
    assert other["test_images"].shape == (0, 16, 16)
    pixels = bytes_of(images)[..., 0].numpy()
    assert np.array_equal(other["train_images"], pixels)
    files = sorted((tmp_path / "folder.npz").rglob("*.png"))
    assert [file.parent.name for file in files] == ["000-normal"] * 8 + ["001-nodule"] * 8
    drawn = np.stack([np.asarray(Image.open(file)) for file in files])
    assert np.array_equal(drawn, pixels)
    card = (tmp_path / "hf.npz" / "README.md").read_text()
    assert card.startswith("---\nlicense: cc0-1.0\n")
    assert "distilled from phantom" in card
    assert "- guarantee: `none`" in card
    for text, wanted in (("CC-BY-4.0", "cc-by-4.0"), ("CC BY 4.0", "cc-by-4.0"), ("X", "other")):
        assert _license(text).splitlines()[0] == f"license: {wanted}"
    for place in ("hf.npz", "folder.npz"):  # who obeys it must not cut tiles again
        assert read_json(tmp_path / place / "recipe.json")["factor"] == 1
    assert (tmp_path / "hf.npz" / "train" / "000-normal" / "00000.png").is_file()
    assert len(load(f"folder:{tmp_path / 'folder.npz'}").train) > 0  # our own reader does, too
    assert cli(*words, "--to", "hf", "--out", tmp_path / "hf.npz").exit_code == 5


@pytest.mark.slow
@pytest.mark.parametrize("to", ["hf", "folder"])
def test_hugging_face_loads_the_folder_as_a_data_set(
    to: str, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    import datasets

    place = tmp_path / "exported"
    words = ["export", site / "a.medistill", "--trust", site / "keys" / "public.pem", "--to", to]
    assert cli(*words, "--out", place).exit_code == 0
    found = datasets.load_dataset(str(place), cache_dir=str(tmp_path / "cache"))
    assert list(found) == ["train"]
    rows = found["train"]
    assert rows.features["label"].names == ["000-normal", "001-nodule"]
    assert rows["label"] == [0] * 8 + [1] * 8
    images, _ = whole(read(site / "a.medistill", site / "keys" / "public.pem"))
    pixels = bytes_of(images)[..., 0].numpy()
    for row, wanted in zip(rows, pixels, strict=True):
        assert np.array_equal(np.asarray(row["image"]), wanted)


def test_keys_of_the_age_tools_are_read(site: Path, tmp_path: Path) -> None:
    secret = (site / "keys" / "identity.txt").read_text()
    known = (site / "keys" / "recipient.txt").read_text()
    other = tmp_path / "other"
    generate_identity(other)
    listed, own = tmp_path / "listed", tmp_path / "own"
    listed.write_text(f"# two of us\n{known}\n{(other / 'recipient.txt').read_text()}")
    own.write_text(f"# created: 2026-01-01\n# public key: {known}{secret}")
    own.chmod(0o600)
    sealed, count = seal(b"content", [str(listed)])
    assert count == 2
    (tmp_path / "sealed").write_bytes(sealed)
    for identity in (own, other / "identity.txt"):
        assert unseal(tmp_path / "sealed", identity) == b"content"
    listed.write_text("# nobody\n")
    with pytest.raises(UsageError):
        seal(b"content", [str(listed)])


def test_what_is_no_plain_file_is_not_waited_for(site: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    identity = ("--identity", site / "keys" / "identity.txt")
    for place in (tmp_path / "pipe", "/dev/zero"):
        result = cli("decrypt", place, *identity, "--out", tmp_path / "x")
        assert (result.exit_code, result.stderr.count("\n")) == (4, 1), result.output
    trusted = cli("verify", site / "a.medistill", "--trust", "/dev/zero")
    assert (trusted.exit_code, trusted.stderr.count("\n")) == (3, 1)


def test_a_folder_of_own_keys_is_no_trouble(site: Path) -> None:
    assert cli("verify", site / "a.medistill", "--trust", site / "keys").exit_code == 0


def test_images_of_several_classes_have_no_folder(tmp_path: Path) -> None:
    golden = Path(__file__).parent / "golden" / "1-several-labels"
    trust = tmp_path / "sender.pem"  # what was seen is written down beside it
    trust.write_bytes(golden.with_suffix(".pem").read_bytes())
    found = read(golden.with_suffix(".medistill"), trust)
    for to in ("folder", "hf"):
        with pytest.raises(UsageError, match="several classes"):
            export(found, to, tmp_path / "x")  # type: ignore[arg-type]
    export(found, "npz", tmp_path / "x")


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("../../etc", "etc"),
        ("a/b\\c", "a-b-c"),
        ("---\nlicense: x", "license-x"),
        ("\x1b[2J", "2J"),
        ("..", "none"),
        ("x" * 99, "x" * 60),
    ],
)
def test_names_of_a_stranger_are_harmless_in_paths_and_pages(text: str, safe: str) -> None:
    assert slug(text) == safe


def test_volumes_are_no_pictures(site: Path, tmp_path: Path) -> None:
    package = read(site / "a.medistill", site / "keys" / "public.pem")
    volumes = dataclasses.replace(package, images=torch.zeros(4, 1, 4, 4, 4))
    for to in ("folder", "hf"):
        with pytest.raises(UsageError, match="found volumes"):
            export(volumes, to, tmp_path / "x")  # type: ignore[arg-type]
    export(volumes, "npz", tmp_path / "x")
    assert np.load(tmp_path / "x")["images"].shape == (32, 1, 4, 4, 4)  # of eight tiles each


def test_a_folder_without_files_is_no_package(site: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    recipient = site / "keys" / "recipient.txt"
    for words in (("push",), ("encrypt", "--to", recipient, "--out")):
        result = cli(words[0], tmp_path / "empty", *words[1:], tmp_path / "out")
        assert (result.exit_code, result.stderr.count("\n")) == (4, 1), result.output


def test_push_sends_a_folder_as_its_archive(site: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(site / "a.medistill") as file:
        file.extractall(tmp_path / "folder")
    push(tmp_path / "folder", str(tmp_path / "b"))
    assert (tmp_path / "b").read_bytes() == (site / "a.medistill").read_bytes()
    assert torch.equal(
        read(tmp_path / "b", site / "keys" / "public.pem").images,
        read(tmp_path / "folder", site / "keys" / "public.pem").images,
    )
