"""Sources, folders, pooled sets and the inspection: what is read, and how bad input is refused."""

import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from medistill.data import check_splits, fetch, inspect, load, names
from medistill.data.source import Source, Where, parse
from medistill.data.split import SHARES, assign, identical
from medistill.errors import DataError, MedistillError, UsageError
from medistill.rng import Rng
from medistill.sets import Card, RealSet, Splits

KINDS = ["npz", "folder", "phantom", "combine"]
Pixels = np.ndarray


def noise(number: int, height: int = 12, width: int = 12, *, color: bool = False) -> Pixels:
    shape = (height, width, 3) if color else (height, width)
    return np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)


def save(path: Path, pixels: Pixels) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def make_folder(top: Path, per_class: int = 20, classes: tuple[str, ...] = ("a", "b")) -> Path:
    for c, name in enumerate(classes):
        for i in range(per_class):
            save(top / name / f"{i:03}.png", noise(1000 * c + i))
    return top


def tiny(labels: list[int], start: int = 0, groups: list[int] | None = None) -> RealSet:
    card = Card("tiny", "binary", ("a", "b"), 1, (2, 2))
    images = torch.arange(start, start + 4 * len(labels), dtype=torch.uint8).view(-1, 1, 2, 2)
    group = None if groups is None else torch.tensor(groups)
    return RealSet(images, torch.tensor(labels).long(), card, group)


def said(error: pytest.ExceptionInfo[MedistillError]) -> str:
    """Return the message, which must be one line."""
    text = str(error.value)
    assert "\n" not in text
    return text


# --- the grammar ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("breastmnist@64", Source("medmnist", "breastmnist@64")),
        ("phantom", Source("phantom", "")),
        ("phantom:size=32,n=50;seed=1", Source("phantom", "", dict(size="32", n="50", seed="1"))),
        ("npz:x.npz", Source("npz", "x.npz")),
        ("folder:some (old)/x;size=28", Source("folder", "some (old)/x", {"size": "28"})),
        ("absent.npz", Source("npz", "absent.npz")),
        ("combine:(a;n=1),b;n=2", Source("combine", "(a;n=1),b", {"n": "2"})),
    ],
)
def test_a_source_is_parsed(text: str, expected: Source) -> None:
    assert parse(text, KINDS, names()) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("pneumoniamist", "did you mean pneumoniamnist"),
        ("foldr:x", "did you mean folder"),
        ("breastmnist@32", "28, 64, 128, 224"),
        ("adrenalmnist3d@128", "28, 64"),
        ("phantom:sizes=28", "did you mean size"),
        ("phantom:size=abc", "16 to 512"),
        ("phantom:size=28.5", "whole number"),
        ("phantom:size", "key=value"),
        ("phantom:variation=nan", "0 to 1"),
        ("breastmnist;size=28", "it takes no options"),
        ("npz:", "expected something"),
        ("combine:phantom", "two or more"),
        ("combine:(phantom,breastmnist", "parenthesis"),
        ("combine:phantom,phantom;labels=no", "keep or source"),
        ("", "found no source"),
    ],
)
def test_a_wrong_source_is_a_usage_error(text: str, words: str) -> None:
    with pytest.raises(UsageError) as error:
        load(text, offline=True)
    assert words in said(error)


def test_the_size_of_a_phantom_is_an_option() -> None:
    with pytest.raises(UsageError, match="phantom:size=64"):
        load("phantom@64")


def test_bare_paths_are_recognized(tmp_path: Path) -> None:
    assert load(str(make_folder(tmp_path))).train.card.name == tmp_path.name


def test_places_follow_root_environment_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDISTILL_DATA", "/shared")
    monkeypatch.setenv("MEDISTILL_CACHE", "/cache")
    assert Where(tmp_path).places("sub")[:2] == [tmp_path, tmp_path / "sub"]
    assert Where(tmp_path).places() == [tmp_path, Path("/shared"), Path("/cache/data")]
    assert Where().cache == Path("/cache/data")
    assert Where(tmp_path).cache == tmp_path


def test_the_phantom_is_not_fetched() -> None:
    with pytest.raises(UsageError, match="built in"):
        fetch("phantom")


# --- common checks ----------------------------------------------------------------------------


def test_an_empty_class_is_named() -> None:
    splits = Splits(tiny([0, 0]), tiny([1]), tiny([1]))
    with pytest.raises(DataError, match="no training image of class 'b'"):
        check_splits(splits)


def test_an_empty_split_is_named() -> None:
    with pytest.raises(DataError, match="no images in val"):
        check_splits(Splits(tiny([0, 1]), tiny([]), tiny([1])))


def test_a_multi_label_class_needs_one_positive() -> None:
    card = Card("many", "multi-label", ("a", "b"), 1, (2, 2))
    part = RealSet(torch.zeros(2, 1, 2, 2).byte(), torch.tensor([[1, 0], [1, 0]]), card)
    with pytest.raises(DataError, match="'b'"):
        check_splits(Splits(part, part, part))


# --- identical images and splits --------------------------------------------------------------


def test_identical_images_share_a_number_across_parts() -> None:
    a = torch.randint(0, 256, (5, 1, 3, 3), generator=Rng(0).at("x")).byte()
    one, two = identical([a.split(2), [a[[4, 0]]]])
    assert one.unique().numel() == 5
    assert two.tolist() == [one[4], one[0]]
    # The same bytes in another shape are another image.
    assert identical([[a[:1]], [a[:1].view(1, 1, 1, 9)]])[1].tolist() == [1]


def test_assign_keeps_groups_whole_and_shares_close() -> None:
    labels = torch.arange(300) % 3
    groups = torch.arange(300) // 2  # each pair has two classes
    dealt = assign(labels, groups, SHARES, Rng(1))
    everything = torch.cat(list(dealt.values()))
    assert everything.sort().values.tolist() == list(range(300))
    assert [len(dealt[name]) for name in SHARES] == pytest.approx([210, 30, 60], abs=6)
    seen = [set(groups[positions].tolist()) for positions in dealt.values()]
    assert sum(map(len, seen)) == len(set.union(*seen)) == 150
    assert torch.equal(assign(labels, groups, SHARES, Rng(1))["test"], dealt["test"])
    assert not torch.equal(assign(labels, groups, SHARES, Rng(2))["test"], dealt["test"])


def test_assign_leaves_a_tiny_class_to_train() -> None:
    dealt = assign(torch.tensor([0, 0, 1, 1, 1]), torch.arange(5), SHARES, Rng(0))
    assert {0, 1} <= set(dealt["train"].tolist())
    assert len(dealt["val"]) == len(dealt["test"]) == 1


# --- folders ----------------------------------------------------------------------------------


def test_a_folder_is_split_by_class_with_its_pixels_unchanged(tmp_path: Path) -> None:
    splits = load(f"folder:{make_folder(tmp_path)}")
    assert [torch.bincount(part.labels).tolist() for part in splits] == [[14] * 2, [2] * 2, [4] * 2]
    assert splits.train.card.classes == ("a", "b")
    assert splits.train.card.channels == 1
    assert splits.train.card.digest
    stored = {bytes(image.numpy()) for part in splits for image in part.images}
    assert stored == {noise(1000 * c + i).tobytes() for c in range(2) for i in range(20)}


def test_the_seed_decides_the_split(tmp_path: Path) -> None:
    make_folder(tmp_path)
    one, same, other = (load(f"folder:{tmp_path}", seed=seed).train.digest for seed in (0, 0, 1))
    assert one == same != other


def test_identical_images_stay_together_across_classes(tmp_path: Path) -> None:
    make_folder(tmp_path)
    for i in range(10):
        save(tmp_path / "b" / f"again{i}.png", noise(i))
    splits = load(f"folder:{tmp_path}")
    kinds = {found["kind"] for found in inspect(splits)["findings"]}
    assert kinds == {"duplicate", "label-conflict"}
    groups = [set(part.groups.tolist()) for part in splits if part.groups is not None]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 40


def test_given_splits_are_kept_and_val_is_cut_off_train(tmp_path: Path) -> None:
    make_folder(tmp_path / "train")
    for c, name in enumerate("ab"):
        for i in range(3):
            save(tmp_path / "test" / name / f"{i}.png", noise(5000 + 10 * c + i))
    splits = load(f"folder:{tmp_path}")
    assert [len(part) for part in splits] == [36, 4, 6]
    given = {noise(5000 + 10 * c + i).tobytes() for c in range(2) for i in range(3)}
    assert {bytes(image.numpy()) for image in splits.test.images} == given
    for c, name in enumerate("ab"):
        save(tmp_path / "val" / name / "0.png", noise(6000 + c))
    assert [len(part) for part in load(f"folder:{tmp_path}")] == [40, 2, 6]


def test_hidden_files_are_passed_over_and_others_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_folder(tmp_path)
    (tmp_path / ".git").mkdir()
    (tmp_path / "a" / ".hidden.png").write_bytes(b"")
    (tmp_path / "a" / "notes.txt").write_text("x")
    assert sum(map(len, load(f"folder:{tmp_path}"))) == 40
    assert "ignored 1 files" in capsys.readouterr().err


def test_size_pads_to_a_square_before_it_resizes(tmp_path: Path) -> None:
    make_folder(tmp_path)
    white = np.full((12, 24), 255, dtype=np.uint8)
    save(tmp_path / "a" / "wide.png", white)
    images = torch.cat([part.images for part in load(f"folder:{tmp_path};size=8")])
    wide = next(image[0] for image in images if (image[0, 4] == 255).all())
    assert (wide[3:5] == 255).all()
    assert (wide[[0, 7]] == 0).all()


@pytest.mark.parametrize("kind", ["bmp", "tif", "tiff", "jpg", "JPEG"])
def test_pictures_of_every_kind_are_read(kind: str, tmp_path: Path) -> None:
    make_folder(tmp_path)
    white = np.full((16, 16), 255, dtype=np.uint8)
    save(tmp_path / "a" / f"white.{kind}", white)
    images = torch.cat([part.images for part in load(f"folder:{tmp_path};size=16")])
    assert int((images == 255).flatten(1).all(1).sum()) == 1


def test_channels_follow_the_images_or_the_option(tmp_path: Path) -> None:
    make_folder(tmp_path)
    color = noise(1, color=True)
    save(tmp_path / "b" / "color.png", color)
    mixed = load(f"folder:{tmp_path}")
    images = torch.cat([part.images for part in mixed])
    assert images.shape[1] == 3
    repeated = (images == images[:, :1]).flatten(1).all(1)
    assert int(repeated.sum()) == 40
    assert torch.equal(images[~repeated][0], torch.from_numpy(color).permute(2, 0, 1))
    grey = torch.cat([part.images for part in load(f"folder:{tmp_path};channels=1")])
    luma = torch.from_numpy(np.array(Image.fromarray(color).convert("L")))
    assert any(torch.equal(image[0], luma) for image in grey)


def test_limit_takes_some_of_each_class_by_seed(tmp_path: Path) -> None:
    make_folder(tmp_path)
    splits = load(f"folder:{tmp_path};limit=10")
    assert torch.cat([part.labels for part in splits]).bincount().tolist() == [10, 10]
    assert load(f"folder:{tmp_path};limit=10", seed=1).train.digest != splits.train.digest


def _mixed_sizes(top: Path) -> None:
    save(top / "a" / "other.png", noise(1, 12, 13))


def _truncated(top: Path) -> None:
    whole = (top / "a" / "003.png").read_bytes()
    (top / "a" / "003.png").write_bytes(whole[: len(whole) // 2])


def _no_image(top: Path) -> None:
    (top / "b" / "004.png").write_text("hello")


def _deep(top: Path) -> None:
    save(top / "a" / "deep.png", noise(0).astype(np.uint16))


def _frames(top: Path) -> None:
    first = Image.fromarray(noise(0))
    first.save(top / "a" / "frames.tif", save_all=True, append_images=[first])


def _empty_class(top: Path) -> None:
    (top / "c").mkdir()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_mixed_sizes, "found sizes 12x12"),
        (_truncated, "003.png is no whole image"),
        (_no_image, "004.png is no whole image"),
        (_deep, "more than 8 bits"),
        (_frames, "2 frames"),
        (_empty_class, "no training image of class 'c'"),
    ],
)
def test_a_spoiled_folder_is_refused(
    tmp_path: Path, spoil: Callable[[Path], None], words: str
) -> None:
    make_folder(tmp_path)
    spoil(tmp_path)
    with pytest.raises(DataError) as error:
        load(f"folder:{tmp_path}")
    assert words in said(error)


@pytest.mark.parametrize(
    ("names", "sizes"),
    [
        (("Train", "Test"), (0, 1)),
        (("Training", "Testing"), (0, 1)),
        (("train", "valid", "test"), (1, 1)),
        (("TRAIN", "validation"), (1, 0)),
    ],
)
def test_splits_have_the_names_that_people_give_them(
    names: tuple[str, ...], sizes: tuple[int, int], tmp_path: Path
) -> None:
    for number, name in enumerate(names):
        make_folder(tmp_path / name, per_class=20 + number)
    splits = load(f"folder:{tmp_path}")
    assert splits.train.card.classes == ("a", "b")
    last = 2 * (20 + len(names) - 1)
    held = [len(part) for part in (splits.val, splits.test)]
    assert [size in (42, last) for size in held] == [bool(told) for told in sizes]


@pytest.mark.parametrize("names", [("train", "test", "notes"), ("test", "val"), ("a", "valid")])
def test_splits_among_other_folders_are_refused(names: tuple[str, ...], tmp_path: Path) -> None:
    for name in names:
        make_folder(tmp_path / name)
    with pytest.raises(DataError, match="expected train"):
        load(f"folder:{tmp_path}")


def test_a_class_without_a_name_that_can_be_shown_is_refused(tmp_path: Path) -> None:
    make_folder(tmp_path)
    (tmp_path / "a").rename(tmp_path / "a\udcff")
    with pytest.raises(DataError, match="can be shown"):
        load(f"folder:{tmp_path}")


def test_absent_empty_and_one_class_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found no folder"):
        load(f"folder:{tmp_path / 'absent'}")
    with pytest.raises(DataError, match="found no images"):
        load(f"folder:{tmp_path}")
    with pytest.raises(DataError, match=r"one class only \(a\)"):
        load(f"folder:{make_folder(tmp_path, classes=('a',))}")
    with pytest.raises(UsageError, match="expected 1 or 3"):
        load(f"folder:{tmp_path};channels=2")


# --- pooled sets ------------------------------------------------------------------------------


def test_combine_makes_a_class_of_each_source(tmp_path: Path) -> None:
    make_folder(tmp_path)
    pooled = load(f"combine:(phantom:n=40,size=16),folder:{tmp_path}")
    card = pooled.train.card
    assert card.classes == ("phantom:n=40,size=16", tmp_path.name)
    assert card.shape == (12, 12)
    assert torch.bincount(pooled.train.labels).tolist() == [40, 28]
    assert card.license == "CC0 1.0; unknown"
    # A folder numbers its identical images; the phantom's get numbers of their own.
    groups = [part.groups for part in pooled if part.groups is not None]
    assert torch.cat(groups).unique().numel() == sum(map(len, pooled))


def test_combine_keeps_classes_sizes_and_color(tmp_path: Path) -> None:
    make_folder(tmp_path)
    one = load("phantom:n=40,size=24")
    pooled = load(
        f"combine:(phantom:n=40,size=24),(phantom:n=40,channels=3,size=24),"
        f"folder:{tmp_path};labels=keep;n=15"
    )
    card = pooled.train.card
    assert card.channels == 3
    assert card.classes[:2] == ("phantom:n=40,size=24: normal", "phantom:n=40,size=24: nodule")
    assert len(card.classes) == 6
    assert [len(part) for part in pooled] == [45, 20, 38]
    # Area: each pixel of the pooled image is the mean of 2 x 2 pixels.
    small = one.val.images.float().unflatten(2, (12, 2)).unflatten(4, (12, 2)).mean((3, 5))
    expected = small.round().byte().expand(-1, 3, -1, -1)
    assert torch.equal(pooled.val.images[:8], expected)


def test_the_same_source_twice_makes_two_classes() -> None:
    pooled = load("combine:phantom:n=20,(phantom:n=20,seed=1)")
    assert len(pooled.train.card.classes) == 2
    twice = load("combine:phantom:n=20,phantom:n=20;labels=keep")
    assert twice.train.card.classes[2] == "phantom:n=20 (2): normal"


def test_combine_refuses_what_it_cannot_pool(tmp_path: Path) -> None:
    def file(name: str, shape: tuple[int, ...], labels: Pixels) -> str:
        images = np.zeros((len(labels), *shape), dtype=np.uint8)
        arrays = {
            f"{s}_{w}": a for s in SHARES for w, a in (("images", images), ("labels", labels))
        }
        np.savez(tmp_path / name, **arrays)
        return str(tmp_path / name)

    flat = file("flat.npz", (8, 8), np.array([[0], [1]]))
    deep = file("deep.npz", (8, 8, 8), np.array([[0], [1]]))
    many = file("many.npz", (8, 8), np.array([[0, 1], [1, 1]]))
    with pytest.raises(DataError, match="flat 2D, deep 3D"):
        load(f"combine:{flat},{deep}")
    with pytest.raises(DataError, match="many, a multi-label set"):
        load(f"combine:{flat},{many}")
    assert load(f"combine:{deep},{deep};labels=keep").train.card.shape == (8, 8, 8)


# --- inspection -------------------------------------------------------------------------------


def test_inspect_finds_what_was_planted() -> None:
    train = tiny([0, 0, 0, 1, 0], groups=[0, 1, 2, 3, 4])
    images = train.images.clone()
    images[1] = images[0]
    images[2] = 7
    train = replace(train, images=images)
    test = tiny([1, 1], start=100, groups=[3, 9])
    test.images[1] = images[4]
    found = inspect(Splits(train, tiny([0, 1], start=200, groups=[20, 21]), test))
    findings = {entry["kind"]: entry for entry in found["findings"]}
    assert findings["leak"]["examples"] == ["train[4] = test[1]"]
    assert findings["label-conflict"]["examples"] == ["train[4] = test[1]"]
    assert findings["duplicate"]["examples"] == ["train[0] = train[1]"]
    assert findings["group-leak"]["examples"] == ["group 3 in train and test"]
    assert findings["constant"]["examples"] == ["train[2]"]
    assert findings["imbalance"]["examples"] == ["b: 1"]
    severities = [entry["severity"] for entry in found["findings"]]
    assert severities == ["error", "error", "warning", "warning", "info", "info"]
    counts = dict(found["splits"]["train"])
    assert sum(counts.pop("histogram")) == pytest.approx(1)
    assert counts == {
        "images": 5,
        "patients": 5,
        "patients_by_class": {"a": 4, "b": 1},
        "classes": {"a": 4, "b": 1},
        "majority": 0.8,
    }


def test_inspect_of_a_clean_set_finds_nothing() -> None:
    report = inspect(Splits(tiny([0, 1]), tiny([0, 1], 50), tiny([0, 1], 100)))
    assert report["findings"] == []
    assert report["splits"]["val"]["patients"] is None
    assert report["card"]["name"] == "tiny"


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "leaks", "pair"), [("breastmnist", 1, "test"), ("pneumoniamnist", 8, "val")]
)
def test_known_leaks_of_real_sets_are_found(
    data_root: Path, name: str, leaks: int, pair: str
) -> None:
    found = inspect(load(name, root=data_root, offline=True))["findings"]
    (leak,) = (entry for entry in found if entry["kind"] == "leak")
    assert leak["count"] == leaks
    assert all("train[" in text and f"{pair}[" in text for text in leak["examples"])


@pytest.mark.data
def test_real_jpeg_folders_are_read(data_root: Path, tmp_path: Path) -> None:
    kept: dict[str, int] = {}
    with tarfile.open(data_root / "mednist" / "mednist.tar.gz") as archive:
        for member in archive:
            label = member.name.split("/")[1] if member.isfile() else ""
            if kept.get(label, 0) < 60 and label:
                kept[label] = kept.get(label, 0) + 1
                content = archive.extractfile(member)
                assert content is not None
                (tmp_path / member.name).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / member.name).write_bytes(content.read())
            if label == "CXR":  # the third class; to read on would unpack the whole archive
                break
    splits = load(f"folder:{tmp_path / 'mednist'};limit=50")
    assert splits.train.card.shape == (64, 64)
    assert splits.train.card.channels == 1
    assert splits.train.card.classes == ("AbdomenCT", "BreastMRI", "CXR")
    assert sum(map(len, splits)) == 101
