"""Pages that a benchmark writes say what its committed rows say."""

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = {
    "main_job": "results.md",
    "speed": "speed.md",
    "controls": "controls.md",
    "packages": "package_sizes.md",
    "hospitals": "hospitals.md",
    "leaks": "leaks.md",
    "private": "private.md",
    "predictions": "predictions.md",
}
WRITTEN = {name: page for name, page in PAGES.items() if (ROOT / "docs" / page).is_file()}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_page_is_what_its_command_writes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    module = importlib.import_module(name)
    monkeypatch.setattr(module, "TABLE", tmp_path / WRITTEN[name])
    module.table()
    assert (tmp_path / WRITTEN[name]).read_text() == (ROOT / "docs" / WRITTEN[name]).read_text()


def test_the_smallest_study_takes_what_docs_say() -> None:
    found = json.loads((ROOT / "benchmarks" / "results" / "smoke.json").read_text())["seconds"]
    told = f"it took {found['study']:.0f} s (`benchmarks/smoke.py`)"
    assert told in (ROOT / "docs" / "studies.md").read_text()
    assert found["study"] + found["page"] < 300
