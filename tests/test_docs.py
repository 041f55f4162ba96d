"""Every command in the README and the docs runs, in order, in an empty folder."""

import json
import os
import re
import shlex
import tarfile
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from medistill.cli import app
from medistill.methods import METHODS
from medistill.plan import grid, read_study
from test_medical import hospital

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Appended so that a page's commands take seconds here; the last of two equal flags counts.
SHORT = {
    "distill": ["--steps", "2", "--backbone", "convnet-2-8"],
    "evaluate": ["--seeds", "2", "--student-steps", "4"],
    "audit": ["--control-steps", "30"],
}
# Volumes of 64 voxels a side take seconds each on a core.
LARGE = ["--seeds", "1"]
# Code that evaluates has a shorter recipe here.
WHOLE = "evaluate(synthetic, splits,"
BRIEF = WHOLE + " recipe=replace(synthetic.recipe, steps=8, stop=8),"
REAL = re.compile(r"\w+mnist(3d)?\b|MEDISTILL_DATA")


def blocks(page: Path, kind: str) -> list[str]:
    """Return a page's blocks of one kind."""
    return re.findall(rf"```{kind}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def commands(page: Path) -> list[str]:
    """Return the lines `$ medistill ...` of a page's console blocks."""
    return re.findall(r"^\$ (medistill .*)$", "\n".join(blocks(page, "console")), re.MULTILINE)


def write_lists(folder: Path, data: Path) -> None:
    """Write the tables and the list of docs/medical.md over files of MedNIST."""
    kept: dict[str, list[str]] = {}
    counts = (1000, 300, 100, 30, 30, 30)
    with tarfile.open(data / "mednist" / "mednist.tar.gz") as archive:
        for member in archive:
            name = member.name.split("/")[1] if member.name.endswith(".jpeg") else ""
            if name and len(kept.setdefault(name, [])) < counts[len(kept) - 1]:
                archive.extract(member, folder, filter="data")
                kept[name].append(member.name)
    rows = [(path, name) for name, paths in kept.items() for path in paths[:30]]
    for file, shown in (
        ("scans.csv", [(*row, f"P{number // 3}") for number, row in enumerate(rows)]),
        ("rare.csv", rare(kept)),
    ):
        lines = [("path", "label", "patient")[: len(shown[0])], *shown]
        (folder / file).write_text("\n".join(",".join(line) for line in lines) + "\n")
    entries = [{"image": path, "label": name} for path, name in rows]
    (folder / "list.json").write_text(json.dumps({"training": entries}))


def write_patients(folder: Path) -> None:
    """Write a table of pictures with their patients, two of each."""
    pixels = np.random.default_rng(0).integers(0, 256, (120, 32, 32), np.uint8)
    rows = ["path,label,patient"]
    for number, picture in enumerate(pixels):
        Image.fromarray(picture).save(folder / f"{number}.png")
        rows.append(f"{number}.png,{('ill', 'well')[number // 2 % 2]},P{number // 2}")
    (folder / "patients.csv").write_text("\n".join(rows) + "\n")


def rare(kept: dict[str, list[str]]) -> list[tuple[str, ...]]:
    """Return six classes of very different size."""
    counts = (1000, 300, 100, 30, 10, 5)
    pairs = zip(kept.items(), counts, strict=True)
    return [(path, name) for (name, paths), count in pairs for path in paths[:count]]


@pytest.mark.slow
@pytest.mark.timeout(1000)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of libraries about libraries
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # The demo has a test of its own; it takes no shorter form.
    lines = [line for line in commands(page) if line != "medistill demo"]
    if not os.environ.get("MEDISTILL_DATA"):
        lines = without_real_data(lines)
        if not lines:
            pytest.skip("set MEDISTILL_DATA to run the commands on real data")
    (tmp_path / "studies").symlink_to(ROOT / "studies")
    if page.name == "medical.md" and os.environ.get("MEDISTILL_DATA"):
        write_lists(tmp_path, Path(os.environ["MEDISTILL_DATA"]))
    if page.name == "medical.md":
        hospital(tmp_path / "hospital", patients=24)
    if page.name == "privacy.md":
        write_patients(tmp_path)
    for line in lines:
        words = shlex.split(os.path.expandvars(line))[1:]
        monkeypatch.setattr("sys.argv", ["medistill", *words])
        if words[:2] == ["study", "run"]:
            words += ["--minutes", "0.1", "--workers", "1"]
        short = SHORT.get(words[0], []) + (
            LARGE if words[0] == "evaluate" and "@64" in line else []
        )
        result = CliRunner().invoke(app, [*words, *short])
        assert result.exit_code == 0, f"{line}\n{result.output}\n{result.exception!r}"
    for block in blocks(page, "python"):
        # A page's code stands after its commands, and may read what they wrote.
        exec(compile(block.replace(WHOLE, BRIEF), page.name, "exec"), {"replace": replace})


def without_real_data(lines: list[str]) -> list[str]:
    """Leave out lines that read real data, and lines that read what these would have written."""
    missing, kept = {"scans.csv", "rare.csv", "list.json"}, []
    for line in lines:
        words = shlex.split(line)
        if REAL.search(line) or any(part in word for word in words for part in missing):
            missing |= {words[at + 1] for at, word in enumerate(words) if word == "--out"}
        else:
            kept.append(line)
    return kept


def test_lines_of_real_data_take_those_that_follow_from_them_along() -> None:
    lines = ["medistill a phantom --out p", "medistill a breastmnist --out q", "medistill b q/r"]
    assert without_real_data([*lines, "medistill b p"]) == [lines[0], "medistill b p"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_pages_show_are_read(page: Path, tmp_path: Path) -> None:
    for block in blocks(page, "yaml"):
        (tmp_path / "study.yaml").write_text(block)
        assert grid(read_study(tmp_path / "study.yaml"))


def test_make_targets_of_the_readme_exist() -> None:
    named = set(re.findall(r"^make (\w+)$", (ROOT / "README.md").read_text(), re.MULTILINE))
    known = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "test"} <= named <= known


def test_the_settings_of_every_method_are_told() -> None:
    told = (ROOT / "docs" / "methods.md").read_text()
    for kind in METHODS:
        shown = [f"`--{f.name.replace('_', '-')}` {f.default}" for f in fields(kind)]
        assert f"| `{kind.name}` | {', '.join(shown)} |" in told, kind.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_inside_the_project_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target
