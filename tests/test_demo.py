"""The demo tells the whole story: a distilled set, its score, and a page."""

from pathlib import Path

import pytest

from medistill import demo as story
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
    record = story.demo(folder)
    assert Path(record["page"]).read_text(encoding="utf-8").startswith("<!doctype html>")
    run = read_json(folder / "run.json")
    assert run["start"] == "noise"
    assert not run["real_pixels"]
    assert read_json(folder / "evaluation.json")["full"] == record["full"]
    with pytest.raises(RunRefused, match="already there"):
        story.demo(folder)
