"""The command line: help, JSON shapes, and one line with the right exit code for every mistake."""

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

import medistill
from medistill.cli import app
from medistill.cli.common import command_line, extra_fields
from medistill.errors import UsageError
from medistill.places import cache_folder

COMMANDS = ("demo", "distill", "evaluate", "train", "report", "data list", "data fetch")
SCORE = {"mean", "low", "high", "n"}
NAMES = {"accuracy", "balanced_accuracy", "auc", "f1", "ece"}
SOURCE = "phantom:n=60,size=16"
TINY = ("--ipc", "2", "--backbone", "convnet-2-8", "--steps", "2")


def cli(*words: object) -> Any:
    return CliRunner().invoke(app, list(map(str, words)))


def ok(*words: object) -> dict[str, Any]:
    """Run a command with --json and return the one object on stdout, read strictly."""
    result = cli(*words, "--json")
    assert (result.exit_code, result.stderr) == (0, ""), result.output

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is no JSON")

    record: dict[str, Any] = json.loads(result.stdout, parse_constant=refuse)
    assert result.stdout.count("\n") == 1
    return record


def listing(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- help ---------------------------------------------------------------------------------------


def commands_of(group: Any, name: str = "") -> Iterator[str]:
    for word, command in group.commands.items():
        full = f"{name} {word}".strip()
        yield from commands_of(command, full) if hasattr(command, "commands") else [full]


ALL = sorted(commands_of(typer.main.get_command(app)))


def test_every_command_is_known_to_this_file() -> None:
    assert set(COMMANDS) < set(ALL)
    assert [name for name in ALL if name not in COMMANDS] == [
        # held by test_audit.py, test_data.py, test_trajectory.py, test_package.py, test_sketch.py,
        # test_indicator.py, test_rotation.py and test_study.py
        *("accept", "audit", "data inspect", "decrypt", "encrypt", "experts", "export", "keygen"),
        *("merge", "pack", "predict", "pull", "push", "rotate", "show", "sign", "sketch"),
        *(
            "study fit-indicator",
            "study restore",
            "study rows",
            "study run",
            "study status",
            "study table",
            "verify",
        ),
    ]


@pytest.mark.parametrize("name", ALL)
def test_every_command_has_help_with_an_example(name: str) -> None:
    result = cli(*name.split(), "--help")
    assert result.exit_code == 0
    text = re.sub(r"\s+", " ", result.stdout)
    assert f"Example: medistill {name}" in text
    assert "--json" in text


@pytest.mark.parametrize("words", [("--help",), ("-h",), ("data", "--help")])
def test_help_names_the_commands(words: tuple[str, ...]) -> None:
    result = cli(*words)
    assert result.exit_code == 0
    for name in ["list", "fetch", "inspect"] if "data" in words else ["distill", "evaluate"]:
        assert name in result.stdout
    assert ("130 stopped by Ctrl-C" in re.sub(r"\s+", " ", result.stdout)) == ("data" not in words)


def test_version() -> None:
    assert cli("--version").stdout == f"{medistill.__version__}\n"


def python(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=100,
        env={**os.environ, "PYTHONPATH": str(Path(medistill.__file__).parents[1])},
    )


@pytest.mark.slow
def test_help_waits_for_no_heavy_library(tmp_path: Path) -> None:
    result = python("-X", "importtime", "-m", "medistill", "--help", folder=tmp_path)
    assert result.returncode == 0
    assert "distill" in result.stdout
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "medistill.cli.distill" in imported
    tops = {name.partition(".")[0] for name in imported}
    assert not tops & {"torch", "numpy", "sklearn", "scipy", "PIL", "plotly", "pydantic"}


# --- what comes out -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """Return an evaluated run folder and what distill and evaluate printed."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    made = ok("distill", SOURCE, "--method", "dm", *TINY, "--out", folder)
    words = ("--seeds", 2, "--student-steps", 4)
    return folder, made, ok("evaluate", folder, "--data", SOURCE, *words)


def test_distill_prints_its_record(run: tuple[Path, dict[str, Any], dict[str, Any]]) -> None:
    folder, made, _ = run
    keys = ("run", "method", "ipc", "images", "seconds", "peak_memory_bytes", "bytes")
    assert tuple(made) == keys
    assert (made["run"], made["method"], made["ipc"], made["images"]) == (str(folder), "dm", 2, 4)


def test_evaluate_prints_its_record(run: tuple[Path, dict[str, Any], dict[str, Any]]) -> None:
    folder, _, found = run
    keys = {"protocol", "students", "seeds", "synthetic", "random", "full", "gap_closed", "worth"}
    keys |= {"curve"}
    assert set(found) == keys
    assert (found["students"], found["seeds"]) == (["convnet-2-8"], [0, 1])
    for arm in ("synthetic", "random", "full"):
        assert set(found[arm]) == NAMES
        assert all(set(value) == SCORE for value in found[arm].values())
        assert 0 <= found[arm]["accuracy"]["mean"] <= 1
    assert set(found["gap_closed"]) == {"accuracy", "auc"}
    stored = json.loads((folder / "evaluation.json").read_text())
    assert {name: stored[name] for name in found} == found


def test_train_report_and_inspect_print_their_records(
    run: tuple[Path, dict[str, Any], dict[str, Any]], here: Path
) -> None:
    found = ok("train", run[0], "--out", "model.safetensors", "--data", SOURCE)
    assert {"model", "packages", "declared", "reproduced", "local"} < set(found)
    assert found["packages"] == [str(run[0])]
    assert found["declared"] == run[2]["synthetic"]["accuracy"]
    assert set(found["local"]) == NAMES | {"confusion"}
    assert ok("train", run[0], "--out", "other.safetensors")["local"] is None
    pytest.importorskip("plotly")
    assert ok("report", run[0], "--out", "page.html")["page"] == "page.html"
    assert (here / "page.html").read_text().startswith("<!")
    found = ok("data", "inspect", SOURCE, "--sheet", "sheet.png")
    assert set(found) == {"card", "splits", "findings"}
    assert found["splits"]["train"]["images"] == 60
    assert (here / "sheet.png").is_file()
    known = ok("data", "list")["sets"]
    assert {"name", "task", "classes", "license"} == set(known[0])


def test_text_for_people_has_percent_and_the_next_command(
    run: tuple[Path, dict[str, Any], dict[str, Any]], here: Path
) -> None:
    result = cli("distill", SOURCE, "--method", "random", *TINY, "--out", "r")
    assert "next: medistill evaluate r --data 'phantom:n=60,size=16'" in result.stdout
    result = cli("evaluate", "r", "--data", SOURCE, "--seeds", 1, "--student-steps", 4)
    table = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines()}
    stored = json.loads((here / "r" / "evaluation.json").read_text())
    for arm in ("random", "synthetic", "full"):
        assert table[arm][0] == f"{100 * stored[arm]['accuracy']['mean']:.1f}"
    assert "gap closed (accuracy)" in result.stdout
    result = cli("train", "r", "--out", "m.safetensors", "--data", SOURCE)
    assert "declared accuracy" in result.stdout
    assert "real" in json.loads((here / "r" / "run.json").read_text())["start"]
    assert cli("data", "list").stdout.startswith("phantom")
    assert cli("data", "inspect", SOURCE).stdout.count("images:") == 3


def test_settings_reach_the_run_and_its_resume(here: Path) -> None:
    words = ("distill", SOURCE, *TINY, "--out", "r", "--lr-images", "0.5", "--start=class-mean")
    ok(*words, "--augment", "flip,crop", "--no-flip")
    record = json.loads((here / "r" / "run.json").read_text())
    assert record["settings"]["lr_images"] == 0.5
    assert record["settings"]["start"] == record["start"] == "class-mean"
    assert record["augmentation"]["kinds"] == ["crop"]
    assert record["steps"] == record["steps_done"] == 2
    before = listing(here / "r")["synthetic.safetensors"]
    ok(*words, "--augment", "flip,crop", "--no-flip", "--resume")
    assert listing(here / "r")["synthetic.safetensors"] == before
    refused = cli(*words, "--resume")
    assert (refused.exit_code, refused.stderr.count("\n")) == (5, 1)
    ok("distill", SOURCE, *TINY, "--out", "p", "--paper", "--augment", "none")
    record = json.loads((here / "p" / "run.json").read_text())
    assert (record["start"], record["real_pixels"]) == ("real", True)


def test_the_demo_tells_the_whole_story(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("plotly")
    module = import_module("medistill.demo")
    for name, value in {"STEPS": 2, "STUDENT_STEPS": 2, "STUDENTS": 1}.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(module, "SOURCE", "phantom:classes=3,n=60,size=16")
    (here / "demo").mkdir()
    (here / "demo" / "notes.txt").write_text("mine")
    record = ok("demo")
    assert set(record) == {"synthetic", "random", "full", "gap_closed", "page"}
    assert record["page"] == "demo-2/report.html"
    assert (here / record["page"]).is_file()
    assert cli("demo", "--out", "demo").exit_code == 5


def test_extra_fields() -> None:
    assert extra_fields(["--lr-images", "0.5", "--start=real", "--outer-loops", "null"]) == {
        "lr_images": 0.5,
        "start": "real",
        "outer_loops": None,
    }
    for words in (["--lr-images"], ["0.5"], ["--start", "real", "rest"]):
        with pytest.raises(UsageError, match="expected settings of the method"):
            extra_fields(words)


def test_the_command_is_recorded_as_it_can_be_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/medistill", "distill", "folder:a b;size=28"])
    assert command_line() == "medistill distill 'folder:a b;size=28'"


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDISTILL_CACHE", "/a")
    assert cache_folder() == Path("/a")
    monkeypatch.delenv("MEDISTILL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_folder() == Path("/b/medistill")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/c")
    assert cache_folder() == Path("/c/.cache/medistill")


# --- mistakes -----------------------------------------------------------------------------------


COUNTS = {"train": 20, "val": 6, "test": 6}


def write_npz(path: Path, **changes: Any) -> None:
    generator = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for name, n in COUNTS.items():
        arrays[f"{name}_images"] = generator.integers(0, 256, (n, 16, 16), dtype=np.uint8)
        arrays[f"{name}_labels"] = np.arange(n).reshape(n, 1) % 2
    arrays |= changes
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})


def write_folder(top: Path, classes: tuple[str, ...], side: int = 16) -> Path:
    generator = np.random.default_rng(1)
    for name in classes:
        (top / name).mkdir(parents=True)
        for number in range(8):
            pixels = generator.integers(0, 256, (side, side), dtype=np.uint8)
            Image.fromarray(pixels).save(top / name / f"{number}.png")
    return top


def noise() -> Any:
    """Return pixels."""
    return np.random.default_rng(2).integers(0, 256, (16, 16), dtype=np.uint8)


def spoil(folder: Path) -> None:
    """Write one of each input that cannot be used."""
    write_npz(folder / "good.npz")
    write_npz(folder / "nokey.npz", val_labels=None)
    pixels = np.random.default_rng(0).random((20, 16, 16))
    write_npz(folder / "float.npz", train_images=pixels * 400)
    write_npz(folder / "nan.npz", train_images=np.where(pixels > 0.9, np.nan, pixels))
    labels = np.arange(20) % 2
    write_npz(folder / "mark.npz", train_labels=np.where(labels, 255, 0))
    write_npz(folder / "below.npz", train_labels=labels - 1)
    write_npz(folder / "words.npz", train_labels=np.array(["a", "b"])[labels])
    write_npz(folder / "half.npz", train_labels=labels * 0.5)
    write_npz(folder / "gap.npz", train_labels=labels * 2)
    write_npz(folder / "short.npz", train_labels=labels[:-1])
    write_npz(folder / "pickle.npz", train_labels=np.array([{}] * 20, dtype=object))
    zeros = {f"{name}_labels": np.zeros(n, int) for name, n in COUNTS.items()}
    write_npz(folder / "one.npz", **zeros)
    many = {f"{name}_labels": np.eye(3, dtype=int)[np.arange(n) % 3] for name, n in COUNTS.items()}
    write_npz(folder / "many.npz", **many)
    (folder / "text.npz").write_text("this is no archive")
    cut = (folder / "good.npz").read_bytes()
    (folder / "cut.npz").write_bytes(cut[: len(cut) // 2])
    (folder / "no images" / "a").mkdir(parents=True)
    write_folder(folder / "one class", ("a",))
    torn = write_folder(folder / "torn", ("a", "b")) / "a" / "3.png"
    torn.write_bytes(torn.read_bytes()[:90])
    write_folder(folder / "mixed", ("a", "b"))
    Image.new("L", (20, 16)).save(folder / "mixed" / "b" / "0.png")
    (folder / "taken").mkdir()
    (folder / "taken" / "notes.txt").write_text("mine")
    write_folder(folder / "mixed channels", ("a", "b"))
    Image.new("RGBA", (16, 16)).save(folder / "mixed channels" / "b" / "0.png")
    Image.fromarray(noise()).save(write_folder(folder / "torn tiff", ("a", "b")) / "a" / "9.tif")
    tiff = folder / "torn tiff" / "a" / "9.tif"
    tiff.write_bytes(tiff.read_bytes()[:90])
    write_npz(folder / "int32.npz", train_images=np.full((20, 16, 16), 300, np.int32))
    (folder / "a file").write_text("mine")
    (folder / "empty").mkdir()
    (folder / "corrupt").mkdir()
    (folder / "corrupt" / "synthetic.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")

    no_labels = {f"{name}_labels": np.zeros((n, 0), int) for name, n in COUNTS.items()}
    write_npz(folder / "no labels.npz", **no_labels)
    no_pixels = {f"{name}_images": np.zeros((n, 0, 28), np.uint8) for name, n in COUNTS.items()}
    write_npz(folder / "no pixels.npz", **no_pixels)


DISTILL = "distill {} --out out --ipc 2 --backbone convnet-2-8 --steps 1"
PHANTOM = DISTILL.format(SOURCE)
BAD: dict[str, tuple[str, int, str]] = {
    "method": (f"{PHANTOM} --method dmm", 2, "no method 'dmm': did you mean dm"),
    "far method": (f"{PHANTOM} --method xyz", 2, "known: att, datm, dc, dm, dm-bank"),
    "source": (DISTILL.format("pneumonamnist"), 2, "did you mean pneumoniamnist"),
    "source option": (DISTILL.format("phantom:sise=3"), 2, "did you mean size"),
    "device": (f"{PHANTOM} --device gpu", 2, "expected auto, cpu or cuda"),
    "no sketch": (DISTILL.format("absent.sketch"), 3, "found no absent.sketch"),
    "long name": (DISTILL.format("npz:" + "x" * 300), 3, "File name too long"),
    "sketch of nothing": ("sketch absent.npz --out a.sketch", 3, "found no absent.npz"),
    "sketch merge": ("merge absent.sketch --out a.sketch", 3, "found no absent.sketch"),
    "ipc": (f"{PHANTOM} --ipc 0", 2, "found ipc 0; expected at least 1"),
    "steps": (f"{PHANTOM} --steps 0", 2, "found --steps 0"),
    "setting": (f"{PHANTOM} --lr-imags 1", 2, "did you mean lr_images"),
    "setting type": (f"{PHANTOM} --lr-images fast", 2, "lr_images is 'fast'"),
    "setting choice": (f"{PHANTOM} --start nothing", 2, "start is 'nothing'"),
    "setting value": (f"{PHANTOM} --lr-images", 2, "found '--lr-images'"),
    "two sources": (f"{PHANTOM} more", 2, "found 'more'"),
    "backbone": (f"{PHANTOM} --backbone convnot", 2, "did you mean convnet"),
    "backbone number": (f"{PHANTOM} --backbone convnet-0", 2, "found backbone 'convnet-0'"),
    "deep": (f"{PHANTOM} --backbone convnet-5-8", 2, "choose a smaller depth"),
    "augmentation": (f"{PHANTOM} --augment flop", 2, "did you mean flip"),
    "seeds": (f"evaluate empty --data {SOURCE} --seeds 0", 2, "found --seeds 0"),
    "student": (f"evaluate empty --data {SOURCE} --backbone x", 2, "no backbone 'x'"),
    "fetch": ("data fetch pneumonamnist", 2, "did you mean pneumoniamnist"),
    "missing file": (DISTILL.format("npz:absent.npz"), 3, "found no absent.npz"),
    "missing folder": (DISTILL.format("folder:absent"), 3, "found no folder absent"),
    "offline": (DISTILL.format("bloodmnist@128") + " --offline", 3, "bloodmnist"),
    "npz key": (DISTILL.format("nokey.npz"), 3, "has no val_labels"),
    "npz type": (DISTILL.format("float.npz"), 3, "expected floats from 0 to 1"),
    "NaN": (DISTILL.format("nan.npz"), 3, "pixels that are not finite"),
    "label above": (DISTILL.format("mark.npz"), 3, "found label 255"),
    "label below": (DISTILL.format("below.npz"), 3, "labels from -1"),
    "label words": (DISTILL.format("words.npz"), 3, "expected numbers"),
    "label fractions": (DISTILL.format("half.npz"), 3, "expected whole numbers"),
    "empty class": (DISTILL.format("gap.npz"), 3, "no training image of class '1'"),
    "fewer labels": (DISTILL.format("short.npz"), 3, "20 images and 19 labels"),
    "pickle": (DISTILL.format("pickle.npz"), 3, "pickle.npz"),
    "no archive": (DISTILL.format("text.npz"), 3, "is damaged or no .npz file"),
    "cut archive": (DISTILL.format("cut.npz"), 3, "is damaged or no .npz file"),
    "one class npz": (DISTILL.format("one.npz"), 3, "found one class only"),
    "no images": (DISTILL.format("folder:no?images"), 3, "found no images"),
    "one class": (DISTILL.format("folder:one?class"), 3, "one class"),
    "torn PNG": (DISTILL.format("folder:torn"), 3, "3.png is no whole image"),
    "torn TIFF": (DISTILL.format("folder:torn?tiff"), 3, "9.tif is no whole image"),
    "npz dtype": (DISTILL.format("int32.npz"), 3, "int32"),
    "mixed sizes": (DISTILL.format("folder:mixed"), 3, "expected one size"),
    "no run to evaluate": (f"evaluate empty --data {SOURCE}", 3, "synthetic.safetensors"),
    "absent run to evaluate": (f"evaluate absent --data {SOURCE}", 3, "synthetic.safetensors"),
    "file to evaluate": (f"evaluate a?file --data {SOURCE}", 3, "synthetic.safetensors"),
    "corrupt to evaluate": (f"evaluate corrupt --data {SOURCE}", 3, "is damaged"),
    "no run to report": ("report empty --out out.html", 3, "found no run.json in empty"),
    "no run to train": ("train absent --out out", 3, "synthetic.safetensors"),
    "corrupt to train": ("train corrupt --out out", 3, "is damaged"),
    "spoiled to inspect": ("data inspect folder:torn --sheet out.png", 3, "no whole image"),
    "multi-label": (
        DISTILL.format("many.npz") + " --method herding",
        2,
        "found a multi-label task in many",
    ),
    "no labels": (DISTILL.format("no?labels.npz"), 3, "expected one each or more"),
    "no pixels": (DISTILL.format("no?pixels.npz"), 3, "expected some pixels"),
    "nobody's home": (DISTILL.format("~nosuch/x"), 3, "expected another path"),
    "no memory": (f"{PHANTOM} --backbone convnet-2-99999999", 5, "not enough memory"),
    "a preset has no paper": (f"{PHANTOM} --method dm-bank --paper", 2, "a method that has one"),
    "one place for two": ("train empty --out new --bundle new", 2, "found one place for two"),
    "class too small": (f"{PHANTOM} --ipc 31", 5, "expected at least 31"),
    "taken": (f"{PHANTOM} --out taken", 5, "found taken already there"),
    "out is a file": (f"{PHANTOM} --out a?file", 5, "found a file already there"),
    "out below a file": (f"{PHANTOM} --out a?file/run", 5, "could not write"),
    "model taken": ("train empty --out taken", 5, "found taken already there"),
    "nothing to resume": (f"{PHANTOM} --resume", 5, "found no run in out"),
    "resume in a taken folder": (f"{PHANTOM} --out taken --resume", 5, "found no run in taken"),
}


def words_of(text: str) -> list[str]:
    return [word.replace("?", " ") for word in text.split()]


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spoiled")
    spoil(folder)
    return folder


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
@pytest.mark.parametrize("name", BAD)
def test_a_mistake_is_one_line_and_writes_nothing(
    name: str, as_json: bool, spoiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, code, message = BAD[name]
    monkeypatch.chdir(spoiled)
    monkeypatch.delenv("MEDISTILL_DATA", raising=False)
    before = listing(spoiled)
    result = cli(*words_of(text), *(["--json"] if as_json else []))
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert message in result.stderr
    assert result.stderr.startswith("medistill: ")
    assert result.stderr.count("\n") == 1
    assert isinstance(result.exception, SystemExit | type(None))
    assert listing(spoiled) == before


def test_local_data_of_another_kind_is_one_line(
    run: tuple[Path, dict[str, Any], dict[str, Any]], here: Path
) -> None:
    other = "phantom:n=60,size=20"
    for words in (("evaluate", run[0]), ("train", run[0], "--out", "m.safetensors")):
        result = cli(*words, "--data", other)
        assert (result.exit_code, result.stderr.count("\n")) == (3, 1)
        assert "found shape (20, 20)" in result.stderr
    assert listing(here) == {}


def test_another_split_of_the_same_data_is_refused_for_it_tests_on_training_images(
    here: Path,
) -> None:
    write_folder(here / "images", ("a", "b"))
    words = ("folder:images", "--out", "r", "--method", "random", "--ipc", "2", "--seed", "1")
    made = cli("distill", *words, "--backbone", "convnet-2-8")
    assert made.exit_code == 0, made.output
    assert "--data 'folder:images' --seed 1" in made.stdout
    again = ("evaluate", "r", "--data", "folder:images", "--seeds", "2", "--student-steps", "4")
    result = cli(*again)
    assert (result.exit_code, result.stderr.count("\n")) == (3, 1)
    assert "give --seed as distill had it" in result.stderr
    assert cli(*again, "--seed", "1").exit_code == 0
    learned = ("train", "r", "--out", "m.safetensors", "--data", "folder:images")
    result = cli(*learned)
    assert (result.exit_code, "give --seed as distill had it" in result.stderr) == (3, True)
    assert not (here / "m.safetensors").exists()
    assert cli(*learned, "--seed", "1").exit_code == 0


def test_a_full_disk_is_one_line(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    result = cli("distill", SOURCE, *TINY, "--out", "r")
    assert (result.exit_code, result.stderr.count("\n")) == (5, 1)
    assert "the disk is full" in result.stderr


def test_a_loss_that_is_not_finite_is_one_line(here: Path) -> None:
    words = (*TINY, "--out", "r", "--lr-images", "1e30", "--steps", "9")
    result = cli("distill", SOURCE, *words)
    assert (result.exit_code, result.stderr.count("\n")) == (5, 1)
    assert "lower --lr-images" in result.stderr


@pytest.mark.parametrize(
    "words", [("nothing",), ("evaluate",), ("distill", SOURCE, "--out", "r", "--ipc", "two")]
)
def test_wrong_usage_exits_with_two(words: tuple[str, ...], here: Path) -> None:
    result = cli(*words)
    assert result.exit_code == 2
    assert "Traceback" not in result.stderr
    assert listing(here) == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["method", "torn PNG", "torn TIFF", "taken"])
def test_a_mistake_in_a_real_process_is_one_line(name: str, spoiled: Path) -> None:
    text, code, message = BAD[name]
    result = python("-m", "medistill", *words_of(text), folder=spoiled)
    assert (result.returncode, result.stdout) == (code, "")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
