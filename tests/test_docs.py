"""Every command in the README and the docs runs, in order, in an empty folder."""

import os
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from medistill.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Appended so that a page's commands take seconds here; the last of two equal flags counts.
SHORT = {
    "distill": ["--steps", "2", "--backbone", "convnet-2-8"],
    "evaluate": ["--seeds", "2", "--student-steps", "4"],
}
REAL = re.compile(r"\w+mnist(3d)?\b")


def commands(page: Path) -> list[str]:
    """Return the lines `$ medistill ...` of a page's console blocks."""
    blocks = re.findall(r"```console\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    return re.findall(r"^\$ (medistill .*)$", "\n".join(blocks), re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # The demo has a test of its own; it takes no shorter form.
    lines = [line for line in commands(page) if line != "medistill demo"]
    if any(map(REAL.search, lines)) and not os.environ.get("MEDISTILL_DATA"):
        pytest.skip("set MEDISTILL_DATA to run the commands on real data")
    for line in lines:
        words = shlex.split(line)[1:]
        monkeypatch.setattr("sys.argv", ["medistill", *words])
        result = CliRunner().invoke(app, [*words, *SHORT.get(words[0], [])])
        assert result.exit_code == 0, f"{line}\n{result.output}\n{result.exception!r}"


def test_make_targets_of_the_readme_exist() -> None:
    named = set(re.findall(r"^make (\w+)$", (ROOT / "README.md").read_text(), re.MULTILINE))
    known = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "test"} <= named <= known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_inside_the_project_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target
