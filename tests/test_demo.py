"""The demo tells the whole story: a distilled set, its score, and a page."""

import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from medistill import demo as story
from medistill.cli import app
from medistill.errors import RunRefused
from medistill.records import read_json


def test_demo_writes_a_run_a_score_and_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(story, "SOURCE", "phantom:classes=3,variation=1,n=60,size=16")
    monkeypatch.setattr(story, "STEPS", 3)
    monkeypatch.setattr(story, "STUDENT_STEPS", 8)
    monkeypatch.setattr(story, "STUDENTS", 2)
    folder = tmp_path / "demo"
    record = story.demo(folder, seed=1)
    assert Path(record["page"]).read_text(encoding="utf-8").startswith("<!doctype html>")
    run = read_json(folder / "run.json")
    assert run["start"] == "noise"
    assert not run["real_pixels"]
    # The command that is told makes the same set again.
    words = shlex.split(run["command"])[1:]
    again = CliRunner().invoke(app, [*words[:-1], str(tmp_path / "again")])
    assert again.exit_code == 0, again.output
    one, two = (tmp_path / name / "synthetic.safetensors" for name in ("demo", "again"))
    assert one.read_bytes() == two.read_bytes()
    scored = CliRunner().invoke(app, shlex.split(record["command"])[1:])
    assert scored.exit_code == 0, scored.output
    assert read_json(folder / "evaluation.json")["synthetic"] == record["synthetic"]
    assert read_json(folder / "evaluation.json")["full"] == record["full"]
    with pytest.raises(RunRefused, match="already there"):
        story.demo(folder)
