"""The outer loop: run folders, resuming, refusals, and runs that are killed for real."""

import dataclasses
import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import medistill
from medistill.augment import Augmentation
from medistill.backbones import ConvNet
from medistill.budget import Budget
from medistill.compute import Compute
from medistill.data import load
from medistill.distill import Run, distill, distill_to
from medistill.errors import DataError, RunRefused, UsageError
from medistill.methods import Method, Task
from medistill.methods.dc import DC
from medistill.methods.dm import DM
from medistill.methods.random import Random
from medistill.prepare import prepared
from medistill.records import State, load_state, read_json, state_digest
from medistill.rng import Rng
from medistill.sets import SyntheticSet

# The package's face shows the function of this name, so the module is taken from the table.
MODULE = import_module("medistill.distill")
SOURCE = "phantom:n=60,size=16"
SMALL = ConvNet(depth=2, width=8)


def run_of(
    method: Method | None = None, *, steps: int | None = 6, seed: int = 0, ipc: int = 2, **task: Any
) -> Run:
    train = load(task.pop("source", SOURCE)).train
    return Run(
        method or DM(), Task(train, Budget(ipc=ipc), SMALL, **task), seed, SOURCE, "cmd", steps
    )


def losses(folder: Path) -> list[tuple[int, float]]:
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [(line["step"], line["loss"]) for line in map(json.loads, lines)]


@pytest.fixture
def each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a checkpoint after every step."""
    monkeypatch.setattr(MODULE, "CHECKPOINT_EVERY_S", 0.0)


class Stop(Exception):
    """Ends a run from within, as a kill would: nothing is saved on the way out."""


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]) -> None:
    """Make DM raise `error` in place of the step after `step`."""
    plain = DM.step

    def until(self: DM, state: State, task: Task, rng: Rng) -> Any:
        if int(state["step"]) == step:
            raise error
        return plain(self, state, task, rng)

    monkeypatch.setattr(DM, "step", until)


# --- run folders ------------------------------------------------------------------------------


def test_a_run_folder_holds_all_there_is_to_know(tmp_path: Path, untouched_generator: None) -> None:
    folder = tmp_path / "a" / "run"
    record = distill_to(folder, run_of(), resume=False)
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoint.safetensors",
        "log.jsonl",
        "run.json",
        "sheet.png",
        "synthetic.safetensors",
    ]
    assert read_json(folder / "run.json") == record
    told = {name: record[name] for name in ("format", "method", "seed", "ipc", "images", "steps")}
    assert told == {
        "format": "medistill run 1",
        "method": "dm",
        "seed": 0,
        "ipc": 2,
        "images": 4,
        "steps": 6,
    }
    assert record["finished"]
    assert record["steps_done"] == 6
    assert record["paper_steps"] == 20_000
    assert record["bytes"] == (folder / "synthetic.safetensors").stat().st_size
    assert record["peak_memory_bytes"] > 1e7
    assert record["data"]["digest"] == load(SOURCE).train.card.digest
    assert (folder / "sheet.png").read_bytes().startswith(b"\x89PNG")
    assert [step for step, _ in losses(folder)] == [1, 2, 3, 4, 5, 6]
    made = SyntheticSet.load(folder / "synthetic.safetensors")
    assert made.images.shape == (4, 1, 16, 16)
    assert (made.origin.method, made.origin.seed, made.origin.real_pixels) == ("dm", 0, False)


def test_the_library_call_gives_the_images_of_the_run_folder(tmp_path: Path) -> None:
    run = run_of()
    distill_to(tmp_path / "run", run, resume=False)
    made = distill(run.method, run.task, seed=0, steps=6)
    stored = SyntheticSet.load(tmp_path / "run" / "synthetic.safetensors")
    assert torch.equal(made.images, stored.images)
    other = distill(run.method, run.task, seed=1, steps=6)
    assert not torch.equal(made.images, other.images)


def test_a_method_that_makes_no_steps_has_no_log(tmp_path: Path) -> None:
    record = distill_to(tmp_path / "run", run_of(Random(), steps=None), resume=False)
    assert record["steps_done"] == 0
    assert record["real_pixels"]
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == ["run.json", "sheet.png", "synthetic.safetensors"]


def test_what_cannot_be_begun_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, untouched_generator: None
) -> None:
    run, out = run_of(steps=1), tmp_path / "run"
    deep = dataclasses.replace(run.task, backbone=ConvNet(depth=5, width=8))
    with pytest.raises(UsageError, match="choose a smaller depth"):
        distill_to(out, dataclasses.replace(run, task=deep), resume=False)
    monkeypatch.setattr(DM, "tasks", ("multi-class",))
    with pytest.raises(UsageError, match="found a binary task"):
        distill_to(out, run, resume=False)
    with pytest.raises(UsageError, match="found a binary task"):
        distill(run.method, run.task, seed=0, steps=1)
    assert not out.exists()


@pytest.mark.parametrize("what", ["file", "full folder"])
def test_what_is_there_is_never_overwritten(what: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    kept = out if what == "file" else out / "notes.txt"
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("mine")
    with pytest.raises(RunRefused, match="already there"):
        distill_to(out, run_of(), resume=False)
    assert kept.read_text() == "mine"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [kept]


def test_an_empty_folder_may_be_used(tmp_path: Path) -> None:
    assert distill_to(tmp_path, run_of(steps=1), resume=False)["finished"]


# --- resuming ---------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 4])
def test_a_resumed_run_is_the_same_run(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, each_step: None
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    distill_to(whole, run_of(), resume=False)
    with monkeypatch.context() as patch:
        stop_after(step, patch, Stop)
        with pytest.raises(Stop):
            distill_to(broken, run_of(), resume=False)
    assert not read_json(broken / "run.json")["finished"]
    # A kill may leave lines that no checkpoint has seen, the last one torn.
    with open(broken / "log.jsonl", "a") as file:
        file.write('{"step": 99, "seconds": 1, "loss": -1}\n{"step": 100, "lo')
    before = json.loads((broken / "log.jsonl").read_text().splitlines()[0])
    record = distill_to(broken, run_of(), resume=True)
    assert record["finished"]
    assert losses(broken) == losses(whole)
    lines = list(map(json.loads, (broken / "log.jsonl").read_text().splitlines()))
    assert lines[0] == before
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)
    for name in ("synthetic.safetensors", "sheet.png"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes()


def test_without_a_checkpoint_a_run_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    distill_to(whole, run_of(), resume=False)
    with monkeypatch.context() as patch:
        stop_after(3, patch, Stop)
        with pytest.raises(Stop):
            distill_to(broken, run_of(), resume=False)
    assert not (broken / "checkpoint.safetensors").exists()
    distill_to(broken, run_of(), resume=True)
    assert losses(broken) == losses(whole)


def test_an_interrupt_saves_the_last_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_after(3, patch, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            distill_to(tmp_path, run_of(), resume=False)
    assert int(load_state(tmp_path / "checkpoint.safetensors")[0]["step"]) == 3
    assert len(losses(tmp_path)) == 3
    assert distill_to(tmp_path, run_of(), resume=True)["steps_done"] == 6


def test_what_was_decided_when_a_run_went_on_stays_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped while it prepared, then after a step: it still goes on as it began to step."""

    def interrupted(*_: Any) -> State:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MODULE, "prepared", interrupted)
        with pytest.raises(KeyboardInterrupt):
            distill_to(tmp_path, run_of(), resume=False)
    assert read_json(tmp_path / "run.json")["compute"] is None
    with monkeypatch.context() as patch:
        stop_after(3, patch, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            distill_to(tmp_path, run_of(), resume=True)
    assert read_json(tmp_path / "run.json")["compute"]["precision"] == "float32"
    run = run_of()
    other = dataclasses.replace(run.task, compute=Compute("bfloat16"))
    with pytest.raises(RunRefused, match="its compute is"):
        distill_to(tmp_path, dataclasses.replace(run, task=other), resume=True)
    assert distill_to(tmp_path, run, resume=True)["steps_done"] == 6


def test_an_interrupt_between_line_and_state_loses_no_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, calls = json.dumps, []

    def interrupted(value: Any, **kwargs: Any) -> str:
        if isinstance(value, dict) and value.get("step") == 4 and not calls:
            calls.append(value)
            raise KeyboardInterrupt
        return plain(value, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(MODULE.json, "dumps", interrupted)
        with pytest.raises(KeyboardInterrupt):
            distill_to(tmp_path, run_of(), resume=False)
    distill_to(tmp_path, run_of(), resume=True)
    assert [step for step, _ in losses(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    distill_to(tmp_path, run_of(), resume=False)
    before = (tmp_path / "synthetic.safetensors").read_bytes(), losses(tmp_path)
    assert distill_to(tmp_path, run_of(), resume=True)["steps_done"] == 6
    assert ((tmp_path / "synthetic.safetensors").read_bytes(), losses(tmp_path)) == before


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"seed": 1}, "seed"),
        ({"method": DM(lr_images=0.5)}, "settings"),
        ({"method": DC()}, "method"),
        ({"steps": 7}, "steps"),
        ({"ipc": 3}, "budget"),
        ({"source": "phantom:n=60,size=16,seed=1"}, "data"),
        ({"augmentation": Augmentation(kinds=())}, "augmentation"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_resuming_another_run_is_refused(change: dict[str, Any], name: str, tmp_path: Path) -> None:
    distill_to(tmp_path, run_of(steps=2), resume=False)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    change = {"steps": 2, **change}
    with pytest.raises(RunRefused, match=f"holds another run: its {name} is"):
        distill_to(tmp_path, run_of(**change), resume=True)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_resuming_where_there_is_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunRefused, match="found no run in"):
        distill_to(tmp_path / "absent", run_of(), resume=True)
    assert not (tmp_path / "absent").exists()


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    distill_to(tmp_path, run_of(), resume=False)
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"checkpoint\.safetensors is damaged"):
        distill_to(tmp_path, run_of(), resume=True)


# --- what goes wrong --------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    run = run_of(DM(lr_images=1e30), steps=50)
    with pytest.raises(RunRefused, match=r"found loss (nan|inf) at step \d+; .*lower") as one:
        distill_to(tmp_path, run, resume=False)
    assert "\n" not in str(one.value)
    logged = losses(tmp_path)
    assert 1 <= len(logged) < 50
    assert all(abs(loss) < float("inf") for _, loss in logged)
    state = load_state(tmp_path / "checkpoint.safetensors")[0]
    assert int(state["step"]) == len(logged)
    assert not (tmp_path / "synthetic.safetensors").exists()


def fail_writing(name: str, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Let fsync answer that the disk is full from the call number `after` on for `name`."""
    plain, calls = os.fsync, []

    def fsync(handle: int) -> None:
        if name in os.readlink(f"/proc/self/fd/{handle}"):
            calls.append(handle)
            if len(calls) > after:
                raise OSError(errno.ENOSPC, "No space left on device")
        plain(handle)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc to name open files")
@pytest.mark.parametrize("name", ["checkpoint.safetensors", "log.jsonl"])
def test_a_full_disk_keeps_the_checkpoint_before(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, each_step: None
) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "run"
    distill_to(whole, run_of(), resume=False)
    with monkeypatch.context() as patch:
        fail_writing(name, patch, after=3)
        with pytest.raises(RunRefused, match="could not write") as refused:
            distill_to(folder, run_of(), resume=False)
    assert "\n" not in str(refused.value)
    assert refused.value.exit_code == 5
    assert int(load_state(folder / "checkpoint.safetensors")[0]["step"]) == 3
    assert not list(folder.glob(".*"))
    distill_to(folder, run_of(), resume=True)
    assert losses(folder) == losses(whole)


def test_a_log_that_cannot_be_written_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, each_step: None
) -> None:
    plain, calls = open, []

    def full(*args: Any, **kwargs: Any) -> Any:
        if args[1:] == ("a",):
            calls.append(args)
            if len(calls) > 2:
                raise OSError(errno.ENOSPC, "No space left on device")
        return plain(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(MODULE, "open", full, raising=False)
        with pytest.raises(RunRefused, match="No space left on device; expected room"):
            distill_to(tmp_path, run_of(), resume=False)
    assert int(load_state(tmp_path / "checkpoint.safetensors")[0]["step"]) == 2
    distill_to(tmp_path, run_of(), resume=True)
    assert [step for step, _ in losses(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_resumed_run_is_compiled_as_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([True, False])
    asked = []

    def worth(mode: str, unit: Any, times: float) -> bool:
        unit()
        asked.append((mode, times))
        return next(answers)

    monkeypatch.setattr(MODULE, "worth_compiling", worth)
    monkeypatch.setattr("medistill.compute._compiled", lambda function: function)
    run = run_of(steps=3)
    assert distill_to(tmp_path / "a", run, resume=False, compiling="auto")["compute"]["compile"]
    assert distill_to(tmp_path / "a", run, resume=True, compiling="auto")["compute"]["compile"]
    assert asked == [("auto", 3)]
    record = distill_to(tmp_path / "b", run, resume=False, compiling="auto")
    assert not record["compute"]["compile"]
    # The step that is measured leaves no trace in the result.
    plain = distill_to(tmp_path / "c", run, resume=False)
    assert (tmp_path / "b" / "synthetic.safetensors").read_bytes() == (
        tmp_path / "c" / "synthetic.safetensors"
    ).read_bytes()
    assert plain["compute"] == {"precision": "float32", "compile": False}


# --- what is prepared -------------------------------------------------------------------------


def test_what_is_prepared_is_shared_by_seeds_and_budgets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def prepare(self: DM, task: Task, rng: Rng) -> State:
        calls.append(rng)
        return {"numbers": torch.rand(3, generator=rng.at("numbers"))}

    monkeypatch.setattr(DM, "prepare", prepare)
    one, two = run_of(ipc=1), run_of(ipc=3)
    first = prepared(one.method, one.task, tmp_path)
    again = prepared(two.method, two.task, tmp_path)
    distill(one.method, one.task, seed=5, steps=1, cache=tmp_path)
    assert len(calls) == 1
    assert state_digest(first) == state_digest(again)
    prepared(run_of(DM(lr_images=0.5)).method, one.task, tmp_path)
    assert len(calls) == 1  # a rate changes nothing of it
    (path,) = (tmp_path / "prepared").glob("*.safetensors")
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    mended = prepared(one.method, one.task, tmp_path)
    assert len(calls) == 2  # a damaged product is made again
    assert state_digest(mended) == state_digest(first)
    assert path.read_bytes() == content
    calls.pop()
    for changed in (
        run_of(DM(bank=2)),
        run_of(source="phantom:n=60,size=16,seed=1"),
        run_of(augmentation=Augmentation(kinds=())),
    ):
        before = len(calls)
        prepared(changed.method, changed.task, tmp_path)
        assert len(calls) == before + 1
    prepared(one.method, one.task, None)
    assert len(calls) == 5


# --- real processes ---------------------------------------------------------------------------

FLAGS = {
    "dm": ["--iterations", "160"],
    "dc": ["--steps", "60", "--outer-loops", "3", "--inner-epochs", "2"],
    "ftd": ["--steps=80", "--experts=2", "--max-start=2", "--student-steps=4", "--lr-images=1"],
}
EACH_STEP = (
    "from importlib import import_module; "
    "import_module('medistill.distill').CHECKPOINT_EVERY_S = 0; "
    "from medistill.cli import main; main()"
)


def words_of(method: str, out: Path) -> list[str]:
    words = ["distill", SOURCE, "--method", method, "--ipc", "2", "--backbone", SMALL.name]
    return [*words, *FLAGS[method], "--out", str(out), "--json"]


def begin(words: list[str], *, each_step: bool = True) -> subprocess.Popen[str]:
    start = ["-c", EACH_STEP] if each_step else ["-m", "medistill"]
    return subprocess.Popen(
        [sys.executable, *start, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # One thread, as in this process: sums in another order have other last bits.
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(medistill.__file__).parents[1]),
        },
        # Tests that run in the background ignore interrupts, and so would their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def lines_in(folder: Path) -> int:
    path = folder / "log.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_lines(process: subprocess.Popen[str], folder: Path, count: int) -> None:
    while lines_in(folder) < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)


def finished(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=100)
    return process.returncode, out, err


@pytest.mark.slow
@pytest.mark.parametrize("method", list(FLAGS))
def test_a_run_killed_at_any_moment_resumes_bit_for_bit(method: str, tmp_path: Path) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    reference = begin(words_of(method, whole), each_step=False)
    moments = random.Random(f"{method} moments")
    goal, resume = 0, False
    for _ in range({"dm": 3, "dc": 2, "ftd": 2}[method]):
        process = begin([*words_of(method, folder), *(["--resume"] if resume else [])])
        goal, resume = lines_in(folder) + moments.randint(2, 12), True
        wait_for_lines(process, folder, goal)
        time.sleep(moments.random() * 0.03)  # anywhere within a step, a line or a checkpoint
        process.send_signal(signal.SIGKILL)
        assert finished(process)[0] == -signal.SIGKILL
        assert not (folder / "synthetic.safetensors").exists()
    done = int(load_state(folder / "checkpoint.safetensors")[0]["step"])
    assert 0 < done <= lines_in(folder) + 1
    code, out, err = finished(begin([*words_of(method, folder), "--resume"]))
    assert (code, json.loads(out)["images"], err) == (0, 4, "")
    assert finished(reference)[0] == 0
    assert losses(folder) == losses(whole)
    assert len(losses(folder)) == {"dm": 160, "dc": 60, "ftd": 80}[method]
    one, two = (path / "synthetic.safetensors" for path in (whole, folder))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.slow
def test_ctrl_c_leaves_a_run_that_goes_on(tmp_path: Path) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "stopped"
    reference = begin(words_of("dm", whole), each_step=False)
    process = begin(words_of("dm", folder), each_step=False)
    wait_for_lines(process, folder, 5)
    process.send_signal(signal.SIGINT)
    code, out, err = finished(process)
    assert (code, out) == (130, "")
    (line,) = err.splitlines()
    assert (
        line == "medistill: stopped; distill goes on with --resume, study run by the same command"
    )
    done = int(load_state(folder / "checkpoint.safetensors")[0]["step"])
    assert 5 <= done < 160
    code, _, err = finished(begin([*words_of("dm", folder), "--resume"], each_step=False))
    assert (code, err) == (0, "")
    # What the page says to type again begins anew, elsewhere.
    assert "--resume" not in json.loads((folder / "run.json").read_text())["command"]
    assert finished(reference)[0] == 0
    assert losses(folder) == losses(whole)
    one, two = (path / "synthetic.safetensors" for path in (whole, folder))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize(
    "fields", [{"outer_loops": 0}, {"iterations": -1}, {"batch_real": 0}, {"lr_images": -0.1}]
)
def test_settings_that_make_no_sense_are_refused_before_anything_is_written(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(UsageError, match=next(iter(fields))):
        distill_to(folder, run_of(DC(**fields)), resume=False)
    assert not folder.exists()


@pytest.mark.parametrize("method", [DM(start="class-mean"), DC(start="class-mean")])
def test_a_class_of_one_image_has_no_mean_to_start_from(method: Method, tmp_path: Path) -> None:
    run = run_of(method)
    real = run.task.real
    alone = real.by_class[0][:1]
    few = dataclasses.replace(
        real,
        images=real.images[torch.cat([alone, *real.by_class[1:]])],
        labels=real.labels[torch.cat([alone, *real.by_class[1:]])],
        groups=None,
    )
    folder = tmp_path / "run"
    task = dataclasses.replace(run.task, real=few, budget=Budget(ipc=1))
    with pytest.raises(RunRefused, match="mean of one"):
        distill_to(folder, dataclasses.replace(run, task=task), resume=False)
    assert not folder.exists()


def test_a_checkpoint_without_its_log_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    distill_to(folder, run_of(steps=2), resume=False)
    (folder / "log.jsonl").unlink()
    with pytest.raises(DataError, match="found 0 lines"):
        distill_to(folder, run_of(steps=2), resume=True)
