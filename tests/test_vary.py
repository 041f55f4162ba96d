"""`vary:` and archives: what is changed and what is not, by rules that can be checked by hand."""

import io
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from medistill.data import load
from medistill.data.vary import _dealt
from medistill.errors import DataError, UsageError
from medistill.rng import Rng
from medistill.sets import RealSet

BASE = "phantom:n=200,classes=4,variation=0.9"


def test_without_options_nothing_changes() -> None:
    for one, other in zip(load(f"vary:({BASE})"), load(BASE), strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)


def test_classes_are_kept_in_the_order_given() -> None:
    whole = load(BASE)
    names = whole.train.card.classes
    part = load(f"vary:({BASE});classes={names[2]}|{names[0]}")
    assert part.train.card.classes == (names[2], names[0])
    assert part.train.card.task == "binary"
    for new, old in ((0, 2), (1, 0)):
        mine = part.test.images[part.test.by_class[new]]
        assert torch.equal(mine, whole.test.images[whole.test.by_class[old]])


def test_fewer_images_keep_the_frequencies_and_the_test_split() -> None:
    whole = load("vary:(phantom:n=600,classes=2);imbalance=4")
    part = load("vary:(vary:(phantom:n=600,classes=2);imbalance=4);n=75")
    assert [len(members) for members in whole.train.by_class] == [300, 75]
    assert [len(members) for members in part.train.by_class] == [60, 15]
    assert len(part.val) == min(75, 100)  # all that there are: 60 and 15
    assert torch.equal(part.test.images, load("phantom:n=600,classes=2").test.images)


def test_parts_share_everything_and_nothing_twice() -> None:
    whole = load("phantom:n=90,size=16,classes=3,variation=1")
    source = "vary:(phantom:n=90,size=16,classes=3,variation=1);part="
    parts = [load(f"{source}{k}/4") for k in (1, 2, 3, 4)]
    for name in ("train", "val"):
        split = getattr(whole, name)
        told = sorted(image.numpy().tobytes() for image in split.images)
        found = [i.numpy().tobytes() for part in parts for i in getattr(part, name).images]
        assert sorted(found) == told
    for part in parts:  # classes are as frequent as in all
        assert all(7 <= len(members) <= 8 for members in part.train.by_class)
        assert torch.equal(part.test.images, whole.test.images)
    again = load(f"{source}2/4")
    assert torch.equal(again.train.images, parts[1].train.images)


def test_a_patient_is_at_one_site() -> None:
    real = load("phantom:n=60,size=16").train
    groups = torch.arange(60) // 5
    known = RealSet(real.images, real.labels, real.card, groups)
    seen: list[int] = []
    for place in range(3):
        part = _dealt(known, place, 3, Rng(0).at("x"))
        assert part.groups is not None
        seen += part.groups.unique().tolist()
    assert sorted(seen) == list(range(12))


def test_imbalance_is_geometric_and_leaves_test_alone() -> None:
    part = load("vary:(phantom:n=800,classes=4);imbalance=8")
    assert [len(members) for members in part.train.by_class] == [200, 100, 50, 25]
    assert [len(members) for members in part.val.by_class] == [40, 20, 10, 5]
    assert len(part.test) == 400


def test_pixels_follow_their_rules() -> None:
    whole = load("phantom:n=40").train.images
    flat = load("vary:(phantom:n=40);contrast=0.5").train.images
    wanted = (255 * (0.5 + 0.5 * (whole / 255 - 0.5))).round().to(torch.uint8)
    assert torch.equal(flat, wanted)
    small = load("vary:(phantom:n=40);size=14").train
    assert small.card.shape == (14, 14)
    means = whole.float().unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5))
    assert (small.images.float() - means).abs().max() <= 0.5 + 1e-3
    coarse = load("vary:(phantom:n=40);resolution=7").train.images
    assert coarse.shape == whole.shape
    assert coarse.float().diff(dim=3).abs().mean() < whole.float().diff(dim=3).abs().mean()
    noisy = load("vary:(phantom:n=40);contrast=0;noise=0.1").train.images
    assert noisy.float().std() / 255 == pytest.approx(0.1, rel=0.02)
    assert not torch.equal(noisy[0], noisy[1])
    assert torch.equal(noisy, load("vary:(phantom:n=40);contrast=0;noise=0.1").train.images)


def test_volumes_are_varied_too(data_root: Path) -> None:
    found = load("vary:adrenalmnist3d;size=14;resolution=7;noise=0.1", offline=True)
    assert tuple(found.train.images.shape) == (1188, 1, 14, 14, 14)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("vary:(phantom:n=40);classes=dot", "did you mean|known:"),
        ("vary:(phantom:n=40);classes=nodule|nodule", "two or more"),
        ("vary:(phantom:n=40);contrast=2", "from 0 to 1"),
        ("vary:(phantom:n=40);contrst=1", "did you mean contrast"),
        ("vary:(phantom:n=40);part=2", "expected K/N"),
        ("vary:(phantom:n=40);part=4/3", "K from 1 to N"),
        ("vary:phantom,phantom", "found 2 sources"),
        ("vary:(phantom:n=40", "closing"),
    ],
)
def test_wrong_options_are_told(text: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        load(text)


def test_several_labels_have_no_classes_to_choose() -> None:
    with pytest.raises(DataError, match="several labels"):
        load("vary:(phantom:task=multi-label,n=60);imbalance=2")
    assert len(load("vary:(phantom:task=multi-label,n=60);n=30").train) == 30


def picture(shade: int) -> bytes:
    out = io.BytesIO()
    Image.new("L", (8, 8), shade).save(out, "PNG")
    return out.getvalue()


def archive(path: Path, extra: tuple[str, ...] = ()) -> Path:
    """Write an archive of two classes of ten pictures, and of files by other names."""
    files = {f"top/{c}/{n}.png": picture(10 * n + ord(c)) for c in "ab" for n in range(10)}
    files |= dict.fromkeys(extra, picture(0))
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as zipped:
            for name, content in files.items():
                zipped.writestr(name, content)
        return path
    with tarfile.open(path, "w:gz") as tarred:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tarred.addfile(entry, io.BytesIO(content))
    return path


@pytest.mark.parametrize("name", ["scans.tar.gz", "scans.zip"])
def test_archives_are_read_as_folders(name: str, tmp_path: Path) -> None:
    path = archive(tmp_path / name, extra=("top/notes.txt",))
    for text in (f"folder:{path}", str(path)):
        found = load(text)
        assert found.train.card.classes == ("a", "b")
        assert found.train.card.name == "scans"
        assert sum(len(part) for part in found) == 20
    assert sorted(one.name for one in tmp_path.iterdir()) == [name]


@pytest.mark.parametrize("name", ["bad.tar.gz", "bad.zip"])
@pytest.mark.parametrize("outside", ["../out.png", "/out.png"])
def test_archives_that_lead_outside_are_refused(name: str, outside: str, tmp_path: Path) -> None:
    inside = tmp_path / "deep"
    inside.mkdir()
    path = archive(inside / name, extra=(outside,))
    with pytest.raises(DataError, match="must not"):
        load(f"folder:{path}")
    assert not (tmp_path / "out.png").exists()


def test_a_link_in_an_archive_is_left_out(tmp_path: Path) -> None:
    path = archive(tmp_path / "scans.tar.gz")
    with tarfile.open(tmp_path / "links.tar.gz", "w:gz") as tarred, tarfile.open(path) as old:
        for member in old:
            tarred.addfile(member, old.extractfile(member))
        link = tarfile.TarInfo("top/a/secret.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tarred.addfile(link)
    assert sum(len(part) for part in load(f"folder:{tmp_path / 'links.tar.gz'}")) == 20


def test_archives_that_python_cannot_open_are_one_line(tmp_path: Path) -> None:
    path = archive(tmp_path / "scans.zip")
    whole = path.read_bytes()
    for offset, what in ((6, 1), (8, 9)):  # flags: encrypted; the way it is compressed: Deflate64
        content = bytearray(whole)
        for mark, shift in ((b"PK\3\4", 0), (b"PK\1\2", 2)):
            place = content.find(mark)
            while place >= 0:
                content[place + offset + shift] = what
                place = content.find(mark, place + 4)
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"scans\.zip is damaged or holds"):
            load(f"folder:{path}")
    tarred = archive(tmp_path / "scans.tar.gz")
    damaged = bytearray(tarred.read_bytes())
    damaged[40:60] = bytes(20)
    tarred.write_bytes(damaged)
    with pytest.raises(DataError, match="damaged"):
        load(f"folder:{tarred}")


def test_what_a_killed_run_had_unpacked_goes_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = archive(tmp_path / "scans.zip")
    monkeypatch.setenv("MEDISTILL_CACHE", str(tmp_path / "cache"))
    load(f"folder:{path}")
    (whole,) = (one for one in (tmp_path / "cache" / "unpacked").iterdir() if one.is_dir())
    half = whole.with_name(f".unpacking-{whole.name}")
    whole.rename(half)  # as a kill leaves it
    (half / "stale.png").write_bytes(b"half")
    assert sum(map(len, load(f"folder:{path}"))) == 20
    assert not half.exists()
    assert whole.stat().st_mode & 0o077 == 0
    assert not (whole / "stale.png").exists()


def test_facts_of_images_stay_where_a_source_is_varied(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text(
        "path,label,site\n" + "".join(f"{n}.png,{'abc'[n % 3]},{'NS'[n % 2]}\n" for n in range(60))
    )
    for n in range(60):
        (tmp_path / f"{n}.png").write_bytes(picture(4 * n))
    inner = f"csv:{tmp_path / 'list.csv'}"
    for changes in ("size=6", "classes=a|b", "contrast=0.5"):
        train = load(f"vary:({inner});{changes}").train
        assert len(train.facts["site"]) == len(train), changes
        assert train.facts["site"].unique().tolist() == [0, 1]


def test_a_cut_archive_is_told(tmp_path: Path) -> None:
    path = archive(tmp_path / "cut.tar.gz")
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match="damaged"):
        load(f"folder:{path}")
