"""Trackers: the numbers of a run arrive in TensorBoard and MLflow, and nowhere unless asked."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from medistill.errors import RunRefused, UsageError
from medistill.tracking import MLflow, tracker

READ_EVENTS = """
import json, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator(sys.argv[1])
events.Reload()
found = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
print(json.dumps(found))
"""
READ_RUNS = """
import json, sys
import mlflow
client = mlflow.MlflowClient(tracking_uri="sqlite:///" + sys.argv[1])
experiment = client.get_experiment_by_name("medistill")
found = []
for run in client.search_runs([experiment.experiment_id]):
    losses = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")]
    found.append({"name": run.info.run_name, "status": run.info.status, "params": run.data.params,
                  "metrics": run.data.metrics, "losses": losses})
print(json.dumps(found))
"""


def python(code: str, *words: object) -> Any:
    """Run code by itself: the libraries warn of themselves, and change logging."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def medistill(*words: object) -> "subprocess.CompletedProcess[str]":
    line = [sys.executable, "-m", "medistill", *map(str, words)]
    return subprocess.run(line, capture_output=True, text=True, timeout=200, check=False)


def distilled(folder: Path, track: str) -> list[dict[str, Any]]:
    words = ["distill", "phantom:n=40,size=16", "--method", "dm", "--ipc", "1", "--steps", "4"]
    words += ["--backbone", "convnet-2-8", "--out", str(folder), "--track", track]
    done = medistill(*words)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_run_arrives_in_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    log = distilled(tmp_path / "first", f"tensorboard:{tmp_path / 'events'}")
    found = python(READ_EVENTS, tmp_path / "events" / "first")
    assert [step for step, _ in found["loss"]] == [1, 2, 3, 4]
    wanted = [row["loss"] for row in log]
    assert [value for _, value in found["loss"]] == pytest.approx(wanted, rel=1e-6)
    assert "score/seconds" in found


@pytest.mark.slow
def test_runs_arrive_in_mlflow(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    store = tmp_path / "runs.db"
    log = distilled(tmp_path / "first", f"mlflow:{store}")
    distilled(tmp_path / "second", f"mlflow:{store}")
    found = {run["name"]: run for run in python(READ_RUNS, store)}
    assert set(found) == {"first", "second"}
    first = found["first"]
    assert first["status"] == "FINISHED"
    assert first["params"]["method"] == "dm"
    assert first["params"]["lr_images"] == "1.0"
    assert [step for step, _ in first["losses"]] == [1, 2, 3, 4]
    wanted = [row["loss"] for row in log]
    assert [value for _, value in first["losses"]] == pytest.approx(wanted)
    assert first["metrics"]["score.seconds"] > 0


@pytest.mark.slow
def test_cells_of_a_study_arrive_in_mlflow(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    (tmp_path / "one.yaml").write_text(
        'sources: ["phantom:n=40,size=16"]\nmethods: [herding]\nbudgets: [1]\nseeds: 1\n'
        "measure: false\nbackbones: [convnet-2-8]\n"
        "protocol: {steps: 2, batch: 8, rates: [0.1], random: 1, full: 1}\n"
    )
    store = tmp_path / "runs.db"
    words = ["study", "run", tmp_path / "one.yaml", "--out", tmp_path / "out", "--workers", "1"]
    done = medistill(*words, "--track", f"mlflow:{store}")
    assert done.returncode == 0, done.stderr
    found = {run["params"]["method"]: run for run in python(READ_RUNS, store)}
    assert set(found) == {"random", "full", "herding"}
    cells = [json.loads(path.read_text()) for path in (tmp_path / "out" / "cells").iterdir()]
    for record in cells:
        (run,) = (run for run in found.values() if run["params"]["key"] == record["key"])
        assert run["metrics"]["score.accuracy"] == pytest.approx(record["rows"][0]["accuracy"])


def test_nothing_is_imported_unless_asked() -> None:
    code = "import sys, medistill.distill, medistill.study\n"
    code += "print({'mlflow', 'tensorboard'} & {*sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True
    )
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("text", ["wandb:x", "tensorboard", "mlflow:", ""])
def test_another_tracker_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="expected tensorboard:FOLDER"):
        tracker(text, "name", {})


def test_a_wrong_tracker_is_told_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text('sources: ["phantom:n=40"]\nmethods: [herding]\n')
    for words in (
        ["distill", "phantom:n=40", "--steps", "1"],
        ["study", "run", tmp_path / "one.yaml", "--minutes", "0"],
    ):
        done = medistill(*words, "--out", tmp_path / "out", "--track", "wandb:x")
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["tensorboard", "mlflow"])
def test_a_missing_extra_is_named(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, kind, None)
    with pytest.raises(UsageError, match=r"medistill\[tracking\]"):
        tracker(f"{kind}:{tmp_path / 'x'}", "name", {})


def test_numbers_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from medistill.tracking import _finite

    assert _finite({"a": 1, "b": math.nan, "c": math.inf}) == {"a": 1.0}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of mlflow's own libraries
def test_a_store_that_goes_away_ends_a_run_in_one_line(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    told = tracker(f"mlflow:{tmp_path / 'runs.db'}", "one", {"method": "dm"})
    assert isinstance(told, MLflow)
    told.step(1, {"loss": 0.5})

    def gone(*_: Any, **__: Any) -> None:
        raise ConnectionError("connection refused\nand more")

    told.client.log_batch = gone
    with pytest.raises(RunRefused, match=r"runs\.db \(connection refused\); expected a database"):
        told.end({"accuracy": 0.5})
