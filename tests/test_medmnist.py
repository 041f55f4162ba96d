"""MedMNIST files: the table, the reader, the places looked in, and downloads, whole or absent."""

import hashlib
import pickle
import struct
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch

from medistill.data import fetch, load, medmnist, medmnist_table, names, npz
from medistill.data.medmnist_table import TABLE
from medistill.data.npz import SPLITS
from medistill.errors import DataError, MedistillError, RunRefused

Arrays = dict[str, np.ndarray]


def arrays(shape: tuple[int, ...] = (8, 8), classes: int = 2, n: int = 6) -> Arrays:
    rng = np.random.default_rng(0)
    found: Arrays = {}
    for split in ("train", "val", "test"):
        found[f"{split}_images"] = rng.integers(0, 256, (n, *shape), dtype=np.uint8)
        found[f"{split}_labels"] = (np.arange(n) % classes)[:, None].astype(np.uint8)
    return found


def write(path: Path, content: Arrays) -> Path:
    np.savez_compressed(path, **content)
    return path


def said(error: pytest.ExceptionInfo[MedistillError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# --- the table --------------------------------------------------------------------------------


def test_the_table_is_whole() -> None:
    assert len(TABLE) == 18
    assert names() == ["phantom", *TABLE]
    sums = [md5 for facts in TABLE.values() for md5 in facts.md5.values()]
    assert len(set(sums)) == len(sums) == 12 * 4 + 6 * 2
    assert all(len(md5) == 32 for md5 in sums)
    for name, facts in TABLE.items():
        deep = name.endswith("3d")
        assert list(facts.md5) == ([28, 64] if deep else [28, 64, 128, 224])
        assert (facts.task == "binary") == (len(facts.classes) == 2)
        assert facts.modality
        # Where a class is called left or right, a mirrored image would be of the other class.
        assert facts.flips == (not any("left" in title for title in facts.classes))
        assert len(facts.card(64).shape) == (3 if deep else 2)


def test_a_card_names_its_edition() -> None:
    card = TABLE["dermamnist"].card(128)
    assert card.name == "dermamnist@128"
    assert card.url == "https://zenodo.org/records/10519652/files/dermamnist_128.npz?download=1"
    assert (card.license, card.channels, card.shape) == ("CC BY-NC 4.0", 3, (128, 128))
    assert TABLE["retinamnist"].task == "ordinal"
    assert TABLE["chestmnist"].task == "multi-label"


# --- the reader -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored", "read"),
    [
        ((8, 8), (1, 8, 8)),
        ((8, 8, 3), (3, 8, 8)),
        ((8, 8, 1), (1, 8, 8)),
        ((8, 8, 8), (1, 8, 8, 8)),
    ],
)
def test_images_become_channels_first(
    tmp_path: Path, stored: tuple[int, ...], read: tuple[int, ...]
) -> None:
    content = arrays(stored)
    splits = load(str(write(tmp_path / "x.npz", content)))
    assert tuple(splits.train.images.shape) == (6, *read)
    channels_last = content["train_images"].reshape(6, *read[1:], read[0])
    assert np.array_equal(splits.train.images.movedim(1, -1).numpy(), channels_last)
    assert splits.train.labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert splits.train.card.task == "binary"


def test_several_label_columns_are_a_multi_label_task(tmp_path: Path) -> None:
    content = arrays()
    for split in ("train", "val", "test"):
        content[f"{split}_labels"] = np.tile([[1, 0, 1], [0, 1, 1]], (3, 1))
    splits = load(f"npz:{write(tmp_path / 'x.npz', content)}")
    assert splits.train.card.task == "multi-label"
    assert splits.train.card.classes == ("0", "1", "2")
    assert splits.test.labels[0].tolist() == [1, 0, 1]


def _key(content: Arrays) -> None:
    del content["val_labels"]


def _dtype(content: Arrays) -> None:
    content["test_images"] = content["test_images"].astype(np.int32)


def _nan(content: Arrays) -> None:
    content["train_images"] = content["train_images"] / 255
    content["train_images"][0, 0, :2] = np.nan


def _range(content: Arrays) -> None:
    content["train_labels"][0] = 255


def _negative(content: Arrays) -> None:
    content["train_labels"] = content["train_labels"].astype(int) - 1


def _float_labels(content: Arrays) -> None:
    content["val_labels"] = content["val_labels"] / 2


def _count(content: Arrays) -> None:
    content["train_labels"] = content["train_labels"][:-1]


def _one_class(content: Arrays) -> None:
    for split in ("train", "val", "test"):
        content[f"{split}_labels"][:] = 0


def _empty_class(content: Arrays) -> None:
    content["train_labels"][:] = 0


def _sizes(content: Arrays) -> None:
    content["val_images"] = content["val_images"][:, :4]


def _channels(content: Arrays) -> None:
    content["val_images"] = np.repeat(content["val_images"][..., None], 3, axis=-1)


def _axes(content: Arrays) -> None:
    content["train_images"] = content["train_images"][:, 0]


def _words(content: Arrays) -> None:
    content["train_labels"] = np.array(["a", "b"] * 3)


def _objects(content: Arrays) -> None:
    content["train_labels"] = np.array([{}] * 6, dtype=object)


def _label_axes(content: Arrays) -> None:
    content["train_labels"] = content["train_labels"][..., None]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_key, "no val_labels; found test_images"),
        (_dtype, "found int32 images; expected uint8, uint16"),
        (_nan, "float64 images with 2 pixels that are not finite"),
        (_range, "found label 255"),
        (_negative, "labels from -1"),
        (_float_labels, "labels of type float64"),
        (_count, "found 6 images and 5 labels"),
        (_one_class, "one class only"),
        (_empty_class, "no training image of class '1'"),
        (_sizes, "(6, 1, 4, 8)"),
        (_channels, "(6, 3, 8, 8)"),
        (_axes, "images of shape (6, 8)"),
        (_words, "expected numbers"),
        (_objects, "expected numbers"),
        (_label_axes, "labels of shape (6, 1, 1)"),
    ],
)
def test_a_spoiled_file_is_refused(
    tmp_path: Path, spoil: Callable[[Arrays], None], words: str
) -> None:
    content = arrays()
    spoil(content)
    path = write(tmp_path / "x.npz", content)
    with pytest.raises(DataError) as error:
        load(str(path))
    assert words in said(error)


def test_a_missing_or_damaged_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found no"):
        load(str(tmp_path / "absent.npz"))
    path = write(tmp_path / "x.npz", arrays())
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="damaged") as error:
        load(str(path))
    said(error)
    # A flipped byte in the middle of the compressed pixels: the archive's sum does not fit.
    path.write_bytes(whole[:300] + bytes([whole[300] ^ 255]) + whole[301:])
    with pytest.raises(DataError, match="damaged"):
        load(str(path))


def test_a_header_that_lies_about_its_size_is_not_believed(tmp_path: Path) -> None:
    path = write(tmp_path / "x.npz", arrays())
    lie = BytesIO()
    np.lib.format.write_array_header_1_0(
        lie, {"descr": "|u1", "fortran_order": False, "shape": (10**12, 28, 28)}
    )
    with zipfile.ZipFile(path) as old:
        members = {name: old.read(name) for name in old.namelist()}
    members["train_images.npy"] = lie.getvalue()
    with zipfile.ZipFile(path, "w") as new:
        for name, content in members.items():
            new.writestr(name, content)
    with pytest.raises(DataError, match="its size does not fit"):
        load(str(path))


def test_more_than_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "x.npz", arrays())
    monkeypatch.setattr("medistill.data.npz.os.sysconf", lambda name: 20)
    with pytest.raises(DataError, match="expected at most the memory, 400 bytes"):
        load(str(path))


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 3), (8, 8, 8)], ids=["gray", "color", "volume"])
def test_large_arrays_that_are_not_compressed_stay_in_their_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]
) -> None:
    content = arrays(shape)
    np.savez(tmp_path / "plain.npz", **content)
    packed = load(str(write(tmp_path / "packed.npz", content)))
    asked: list[int] = []
    plain_start = npz._start
    monkeypatch.setattr(npz, "MAP_FROM", 1)
    monkeypatch.setattr(npz, "_start", lambda *a: asked.append(plain_start(*a)) or asked[-1])
    mapped = load(str(tmp_path / "plain.npz"))
    assert len(asked) == 6
    for one, other in zip(mapped, packed, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
        assert one.digest == other.digest
        index = torch.tensor([3, 0])
        assert torch.equal(one.normalized(index), other.normalized(index))
        assert one.normalized(index).stride() == other.normalized(index).stride()
    # A map does not travel to another process; its images do, as a copy.
    there = pickle.loads(pickle.dumps(mapped.train))
    assert mapped.train.file is not None
    assert there.file is None
    assert there.digest == mapped.train.digest
    # Copy on write: what is changed in memory never reaches the file.
    before = (tmp_path / "plain.npz").read_bytes()
    mapped.train.images[:] = 0
    assert (tmp_path / "plain.npz").read_bytes() == before


def test_sixteen_bits_floats_and_patients(tmp_path: Path) -> None:
    content = arrays()
    deep = {k: v.astype(np.uint16) * 257 if "images" in k else v for k, v in content.items()}
    unit = {k: v / 255 if "images" in k else v for k, v in content.items()}
    people = {f"{name}_groups": np.arange(len(content[f"{name}_images"])) // 2 for name in SPLITS}
    plain = load(str(write(tmp_path / "a.npz", content)))
    for other in (deep, unit):
        found = load(str(write(tmp_path / "b.npz", {**other, **people})))
        assert found.train.images.dtype == torch.uint16
        index = torch.arange(len(plain.train))
        torch.testing.assert_close(found.train.normalized(index), plain.train.normalized(index))
        assert found.train.groups is not None
        assert found.train.groups.tolist() == [i // 2 for i in range(len(plain.train))]
    unit["val_images"] = unit["val_images"] * 2
    with pytest.raises(DataError, match=r"val: found intensities from .* expected floats from 0"):
        load(str(write(tmp_path / "c.npz", unit)))
    people["test_groups"] = people["test_groups"][1:]
    with pytest.raises(DataError, match="found test_groups"):
        load(str(write(tmp_path / "d.npz", {**content, **people})))


def test_a_mapped_set_does_not_fill_the_memory(tmp_path: Path) -> None:
    content = arrays((512, 512))
    content["train_images"] = np.repeat(content["train_images"], 60, 0)
    content["train_labels"] = np.repeat(content["train_labels"], 60, 0)
    np.savez(tmp_path / "plain.npz", **content)
    train = load(str(tmp_path / "plain.npz")).train
    size = train.images.numel()
    assert train.file is not None
    assert size > 2**26

    def mapped() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssFile"))

    before = mapped()  # the digest and the statistics have been read once
    for part in torch.arange(len(train)).split(20):
        train.normalized(part)
        assert torch.equal(train.take(part[:1]).images[0], train.images[int(part[0])])
        train.take(part)
    assert mapped() - before < size / 8
    assert sum(len(block) for block in train.blocks()) == len(train)
    assert mapped() - before < size / 8
    assert train.images.sum() > 0  # a plain read fills it, so the measure sees what it should
    assert mapped() - before > size / 2


def test_a_member_that_claims_more_than_the_file_holds_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plain.npz"
    np.savez(path, **arrays() | {"train_images": np.asfortranarray(arrays()["train_images"])})
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("train_images.npy")
    sizes = struct.pack("<II", info.file_size, info.file_size)
    place = whole.rindex(b"PK\x01\x02" + whole[whole.index(b"PK\x01\x02") + 4 :][:16] + sizes)
    lie = struct.pack("<II", 2**31, 2**31)
    path.write_bytes(whole[: place + 20] + lie + whole[place + 28 :])
    with pytest.raises(DataError, match="damaged"):
        load(str(path))


def test_a_mapped_member_must_lie_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(npz, "MAP_FROM", 1)
    path = tmp_path / "plain.npz"
    np.savez(path, **arrays())
    whole = path.read_bytes()
    path.write_bytes(b"\0\0\0\0" + whole[4:])
    with pytest.raises(DataError, match="damaged"):
        load(str(path))


# --- places and downloads ---------------------------------------------------------------------


class _Site:
    """A small web site on this machine: what it serves, and what was asked of it."""

    def __init__(self) -> None:
        self.content = b""
        self.asked = 0
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.asked += 1
                self.send_response(200 if site.content else 503)
                self.send_header("Content-Length", str(len(site.content)))
                self.end_headers()
                self.wfile.write(site.content)

            def log_message(self, *words: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Site]:
    """Serve a small edition under the name breastmnist, with a true MD5 in the table."""
    served = _Site()
    thread = threading.Thread(target=served.server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    served.content = write(tmp_path / "served.npz", arrays((28, 28))).read_bytes()
    md5 = {28: hashlib.md5(served.content).hexdigest()}
    facts = replace(TABLE["breastmnist"], md5=md5, images=(6, 6, 6))
    monkeypatch.setitem(TABLE, "breastmnist", facts)
    address = f"http://127.0.0.1:{served.server.server_address[1]}"
    monkeypatch.setattr(medmnist_table, "RECORD", address)
    monkeypatch.delenv("MEDISTILL_DATA", raising=False)
    monkeypatch.setenv("MEDISTILL_CACHE", str(tmp_path / "cache"))
    yield served
    served.server.shutdown()
    served.server.server_close()
    thread.join()


def test_a_set_is_downloaded_once_and_found_again(
    site: _Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    splits = load("breastmnist")
    assert len(splits.train) == 6
    assert splits.train.card.classes == ("malignant", "normal, benign")
    kept = tmp_path / "cache" / "data" / "medmnist" / "breastmnist.npz"
    assert kept.read_bytes() == site.content
    assert [path.name for path in kept.parent.iterdir()] == ["breastmnist.npz"]
    captured = capsys.readouterr()
    assert "license CC BY 4.0" in captured.err
    assert captured.out == ""
    load("breastmnist", offline=True)
    assert fetch("breastmnist") == kept
    assert site.asked == 1
    # The cache also serves a root that has no copy of its own.
    assert fetch("breastmnist", root=tmp_path / "own") == kept


def test_a_root_gets_the_download(site: _Site, tmp_path: Path) -> None:
    path = fetch("breastmnist", root=tmp_path / "own")
    assert path == tmp_path / "own" / "medmnist" / "breastmnist.npz"


def test_a_wrong_md5_is_refused_and_nothing_is_left(site: _Site, tmp_path: Path) -> None:
    site.content += b"x"
    with pytest.raises(DataError, match="has MD5") as error:
        load("breastmnist")
    said(error)
    assert list((tmp_path / "cache" / "data" / "medmnist").iterdir()) == []


def test_a_failing_server_is_one_line(site: _Site, tmp_path: Path) -> None:
    site.content = b""
    with pytest.raises(DataError, match=r"could not download .*503"):
        load("breastmnist")
    assert list((tmp_path / "cache" / "data" / "medmnist").iterdir()) == []


def test_a_full_disk_refuses_the_run(site: _Site, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 10

    monkeypatch.setattr(medmnist.shutil, "disk_usage", lambda path: Usage)
    with pytest.raises(RunRefused, match="found 10 free bytes"):
        load("breastmnist")


def test_a_folder_that_cannot_be_written_refuses_the_run(site: _Site, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunRefused, match="could not write"):
        fetch("breastmnist", root=tmp_path / "file")


def test_offline_names_every_place(site: _Site, tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        load("breastmnist", root=tmp_path / "own", offline=True)
    text = said(error)
    for folder in (tmp_path / "own", tmp_path / "cache" / "data"):
        assert str(folder / "breastmnist.npz") in text
        assert str(folder / "medmnist" / "breastmnist.npz") in text
    assert site.asked == 0


def test_fetch_verifies_a_file_that_is_there(site: _Site, tmp_path: Path) -> None:
    path = tmp_path / "own" / "breastmnist.npz"
    path.parent.mkdir()
    path.write_bytes(site.content[:-1])
    with pytest.raises(DataError, match="delete it and fetch again"):
        fetch("breastmnist", root=tmp_path / "own")
    assert path.exists()


def test_another_file_of_the_name_is_no_official_one(
    site: _Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "breastmnist.npz", arrays((28, 28), n=4))
    with pytest.raises(DataError, match="has MD5"):
        load("breastmnist", root=tmp_path)
    monkeypatch.setattr(medmnist, "LARGE", 0)  # too large to be looked at each time
    with pytest.raises(DataError, match=r"found \(4, 4, 4\) images"):
        load("breastmnist", root=tmp_path)


def test_a_path_gets_the_known_facts_only_when_its_md5_fits(site: _Site, tmp_path: Path) -> None:
    path = tmp_path / "breastmnist.npz"
    path.write_bytes(site.content)
    assert load(str(path)).train.card.classes == ("malignant", "normal, benign")
    write(path, arrays((28, 28), classes=3))
    assert load(str(path)).train.card.classes == ("0", "1", "2")


# --- real files -------------------------------------------------------------------------------


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "shape"),
    [("breastmnist", (28,) * 2), ("pneumoniamnist", (28,) * 2), ("adrenalmnist3d", (28,) * 3)],
)
def test_official_files_are_read(data_root: Path, name: str, shape: tuple[int, ...]) -> None:
    fetch(name, root=data_root, offline=True)
    splits = load(name, root=data_root, offline=True)
    assert tuple(map(len, splits)) == TABLE[name].images
    assert tuple(splits.test.images.shape[1:]) == (1, *shape)
    assert splits.train.labels.dtype == torch.int64
    assert 0 < splits.train.card.mean[0] < 1
