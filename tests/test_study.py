"""Studies: their file, their grid, runs that are stopped in every way, engines that agree."""

import contextlib
import json
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from medistill.cell import Cell, Job, Protocol, run_cell
from medistill.cli import app
from medistill.distill import _Keeper
from medistill.engine import Here, Processes
from medistill.errors import DataError, NoRoom, UsageError
from medistill.formats import as_csv, as_latex
from medistill.metrics import Score
from medistill.plan import Place, Study, grid, read_study
from medistill.study import Folder, Options, entries_of, run_study
from medistill.tabulate import Book, Table, read_rows, records_of, rows_of, table, write_rows

ROOT = Path(__file__).parents[1]
TINY = """
sources:
  - {source: "phantom:n=60,size=16", name: alike, group: phantom}
  - {source: "phantom:n=60,size=16,variation=0.9", name: unlike, group: phantom}
methods:
  - herding
  - {method: dm, steps: {1: 3, 2: 5}}
budgets: [1, 2]
curve: [1, 4]
measure: false
backbones: [convnet-2-8]
seeds: 2
protocol: {steps: 4, batch: 8, rates: [0.01, 0.1], tuning: random, random: 3, full: 2}
"""
TIMES = ("seconds", "distill_seconds", "peak_memory_bytes", "command")


def tiny(folder: Path, text: str = TINY) -> Study:
    path = folder / "tiny.yaml"
    path.write_text(text)
    return read_study(path)


def without_times(value: Any) -> Any:
    """Return a record without what differs between two runs of the same cell."""
    if isinstance(value, dict):
        return {name: without_times(v) for name, v in value.items() if name not in TIMES}
    return [without_times(one) for one in value] if isinstance(value, list) else value


def cells_in(folder: Path) -> dict[str, Any]:
    files = sorted((folder / "cells").glob("*.json"))
    return {path.stem: without_times(json.loads(path.read_text())) for path in files}


@pytest.mark.slow
def test_a_cell_is_audited_where_that_is_asked_and_its_key_says_so(tmp_path: Path) -> None:
    real = "{method: dm, settings: {start: real}, steps: {1: 2, 2: 2}, audit: 4}"
    text = TINY.replace("  - herding\n", "").replace("{method: dm, steps: {1: 3, 2: 5}}", real)
    plain, asked = tiny(tmp_path), tiny(tmp_path, text)
    known, cells = {cell.key for cell in grid(plain).values()}, grid(asked)
    fresh = {place.method for place, cell in cells.items() if cell.key not in known}
    assert fresh == {"dm"}
    options = Options(only=("alike", "dm"))
    run_study(asked, tmp_path / "out", Here(), cache=tmp_path / "cache", options=options)
    place = next(place for place in cells if place.method == "dm" and place.source == "alike")
    record = Folder(tmp_path / "out").cell(cells[place].key)
    assert record is not None
    assert record["status"] == "done", record["error"]
    assert record["audit"]["models"] == 4
    assert record["audit"]["reconstruction"]["failed"] is True
    entries = entries_of(Folder(tmp_path / "out"), cells)
    rows = rows_of(asked, entries)
    found = Book(rows, asked.every_budget).score(
        "lira_auc", "alike", "dm", place.ipc, place.backbone
    )
    held = [e.record for e in entries if e.place[:3] == place[:3] and e.record]
    means = [one["audit"]["membership"]["lira"]["canaries"]["auc"] for one in held]
    assert found is not None
    assert found.mean == pytest.approx(sum(means) / len(means))
    assert read_rows(write_rows(rows))[0]["lira_auc"] is None  # random images come first
    with pytest.raises(UsageError, match="fewer than 4 models"):
        tiny(tmp_path, text.replace("audit: 4", "audit: 2"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Path]:
    """Return the tiny study and the folder that one process ran it in."""
    folder = tmp_path_factory.mktemp("study")
    study = tiny(folder)
    states = run_study(study, folder / "out", Here(), cache=folder / "cache")
    assert states == {"done": len(grid(study))}
    return study, folder / "out"


def test_a_grid_has_every_cell_once_and_baselines_first(tmp_path: Path) -> None:
    cells = grid(tiny(tmp_path))
    kinds = [cell.kind for cell in cells.values()]
    assert kinds == [*(["random"] * 3 + ["full"]) * 2, *["method"] * 16]
    assert len({cell.key for cell in cells.values()}) == len(cells)
    assert [c.steps for p, c in cells.items() if p[:3] == ("alike", "dm", 2)] == [5, 5]
    only = TINY.replace("group: phantom}", "group: phantom, methods: [dm], budgets: [2]}", 1)
    cells = grid(tiny(tmp_path, only))
    assert {p.method for p in cells if p.source == "alike"} == {"random", "full", "dm"}
    assert {p.ipc for p in cells if p.source == "alike"} == {0, 1, 2, 4}  # the curve has 1 and 4


def test_a_key_changes_with_what_numbers_depend_on_and_with_nothing_else(tmp_path: Path) -> None:
    protocol = Protocol()
    cell = Cell("method", "phantom", "convnet-2-8", protocol, 1, "dm", {}, 3, 0)
    others = [
        replace(cell, source="phantom:n=60"),
        replace(cell, backbone="convnet-2-16"),
        replace(cell, ipc=2),
        replace(cell, settings={"lr_images": 2.0}),
        replace(cell, steps=4),
        replace(cell, seed=1),
        replace(cell, protocol=replace(protocol, steps=7)),
        replace(cell, protocol=replace(protocol, students=2)),
        replace(cell, protocol=replace(protocol, precision="bfloat16")),
    ]
    assert len({cell.key, *(one.key for one in others)}) == 1 + len(others)
    # More draws of random images are no reason to distill anew.
    assert replace(cell, protocol=replace(protocol, random=9, full=9)).key == cell.key
    full = Cell("full", "phantom", "convnet-2-8", protocol)
    assert replace(full, protocol=replace(protocol, random=9, tuning="random")).key == full.key
    assert replace(full, protocol=replace(protocol, full=9)).key != full.key


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("- herding", "- hurding"), "did you mean herding"),
        (("- herding", "- random"), "leave it out"),
        (("- herding", "- dm"), "method dm twice"),
        (("name: unlike", "name: alike"), "source alike twice"),
        (("budgets: [1, 2]", "budgets: [0]"), "budget 0: 0 in the study"),
        (("curve: [1, 4]", "curve: [4, -4]"), "budget -4: -4 in the study"),
        (("seeds: 2", "seeds: 0"), "seeds: 0"),
        (("random: 3", "random: 0"), "random: 0 in the study; expected 1 or more"),
        (("batch: 8", "batch: 0"), "batch: 0"),
        (("batch: 8", "threads: 0"), "threads: 0"),
        (("{1: 3, 2: 5}", "-3"), "steps of dm: -3"),
        (("{1: 3, 2: 5}", "0"), "steps of dm: 0"),
        (("[0.01, 0.1]", "[.nan]"), "found rates (nan,)"),
        (("{1: 3, 2: 5}", "[3]"), "found steps [3] of a method"),
        (("{1: 3, 2: 5}", "3.5"), "found steps 3.5"),
        (
            ("{1: 3, 2: 5}", "3, budgets: [7]"),
            "found budgets 7 of dm; expected some of the study's",
        ),
        (("[0.01, 0.1]", "[0.01, 0]"), "found rates (0.01, 0.0)"),
        (("- herding", "- 5"), "found method 5"),
        (("- herding", "- {method: herding, 5: 1}"), "no field '5'"),
        (
            ("- herding", "- {method: dm, name: other, steps: {1: 3, 2: 4}}"),
            "the same cell as other on alike and as dm on alike",
        ),
        ((",variation=0.9", ""), "the same cell as random on alike and as random on unlike"),
        (("budgets: [1, 2]", "budgets: one"), "budgets is 'one'"),
        (("seeds: 2", "sedes: 2"), "did you mean seeds"),
        (("batch: 8", "bach: 8"), "did you mean batch"),
        (("steps: {1: 3, 2: 5}", "step: 3"), "did you mean steps"),
        (("group: phantom}", "grup: phantom}"), "did you mean group"),
        (("convnet-2-8", "convnat-2-8"), "convnat"),
        (("tuning: random", "tuning: never"), "Protocol: tuning is 'never'"),
        (("{1: 3, 2: 5}", "{1: many}"), "steps.1"),
        (("name: unlike", "methods: [dm, mtt]"), "found methods mtt"),
        (("sources:", "sauces:"), "found sources: None"),
    ],
)
def test_a_wrong_study_is_told_in_one_line(
    tmp_path: Path, change: tuple[str, str], told: str
) -> None:
    assert change[0] in TINY
    with pytest.raises(UsageError) as raised:
        tiny(tmp_path, TINY.replace(*change))
    assert told in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_file_that_is_no_study_is_told_in_one_line(tmp_path: Path) -> None:
    for text, told in (
        ("a: [", "no readable YAML"),
        ("- 1", "holds list"),
        ("", "NoneType"),
        ("about: 2020-01-01" + TINY, "no field can be .*: write dates in quotes"),
        ("sources: &a [*a]", "no field can be"),
    ):
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(DataError, match=told):
            read_study(tmp_path / "x.yaml")
    with pytest.raises(DataError, match="found no"):
        read_study(tmp_path / "absent.yaml")
    with pytest.raises(DataError, match="expected a study folder"):
        Folder(tmp_path).study()


def test_studies_of_the_project_can_be_read() -> None:
    for path in sorted((ROOT / "studies").glob("*.yaml")):
        assert grid(read_study(path)), path.name


@pytest.mark.slow
def test_what_the_indicator_is_fed_is_a_cell_of_its_own(tmp_path: Path) -> None:
    study = tiny(tmp_path, TINY.replace("measure: false", "measure: true"))
    options = Options(only=("measure", "alike"))
    run_study(study, tmp_path / "out", Here(), cache=tmp_path / "cache", options=options)
    cell = grid(study)[Place("alike", "measure", 0, "convnet-2-8", 0)]
    record = Folder(tmp_path / "out").cell(cell.key)
    assert record is not None
    assert set(record["measure"]["random"]) == {"1", "2", "5", "10", "20"}
    assert rows_of(study, entries_of(Folder(tmp_path / "out"), grid(study))) == []


def test_methods_train_by_what_random_images_chose(finished: tuple[Study, Path]) -> None:
    study, out = finished
    folder = Folder(out)
    for place, cell in grid(study).items():
        record = folder.cell(cell.key)
        assert record is not None
        if cell.kind == "method":
            chosen = folder.cell(grid(study)[place._replace(method="random", seed=0)].key)
            assert chosen is not None
            for name in ("lr", "stop"):
                assert record["recipe"][name] == chosen["recipe"][name]
            assert [row["seed"] for row in record["rows"]] == [place.seed]
            assert record["steps_done"] == (cell.steps or 0)
    assert folder.study() == study


def test_each_cell_tunes_itself_where_the_study_says_so(tmp_path: Path) -> None:
    cell = Cell(
        "method", "phantom:n=60,size=16", "convnet-2-8", Protocol(4, 8, (0.5,)), 1, "herding"
    )
    record = run_cell(Job(cell, None, None, True, tmp_path)).record
    assert record["status"] == "done"
    assert record["recipe"]["lr"] == 0.5
    assert [one.suffix for one in (tmp_path / "cells").iterdir()] == [".lock"]


def test_done_cells_are_not_run_again_and_changed_ones_are(
    finished: tuple[Study, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, out = finished[0], tmp_path / "copy"
    shutil.copytree(finished[1], out)
    ran: list[str] = []

    def count(job: Job) -> Any:
        ran.append(job.cell.key)
        return run_cell(job)

    monkeypatch.setattr("medistill.study.run_cell", count)
    run_study(study, out, Here(), cache=tmp_path)
    assert ran == []
    more = replace(study, seeds=3)
    run_study(more, out, Here(), cache=tmp_path, options=Options(only=("dm", "alike")))
    assert len(ran) == 2
    run_study(study, out, Here(), cache=tmp_path)  # the folder is the old study's again
    assert len(ran) == 2


def test_failed_cells_keep_their_error_and_are_retried_when_asked(tmp_path: Path) -> None:
    here = str(tmp_path / "images")
    text = TINY.replace("phantom:n=60,size=16,variation=0.9", f"folder:{here}")
    study = tiny(tmp_path, text.replace("budgets: [1, 2]", "budgets: [1, 40]"))
    states = run_study(study, tmp_path / "out", Here(), cache=tmp_path / "cache")
    cells = [Folder(tmp_path / "out").cell(cell.key) for cell in grid(study).values()]
    errors = {record["status"]: record["error"] for record in cells if record and "error" in record}
    assert "found no folder" in errors["failed"]
    assert "at least 40" in errors["refused"]
    assert states["failed"]
    assert states["refused"]
    # Methods whose random images failed wait for these: pilots of their own would stay for good.
    assert states["missing"] == 2 * 2 * 2  # methods, budgets, seeds
    assert sum(states.values()) == len(grid(study))
    before = (tmp_path / "out" / "cells").stat().st_mtime_ns
    assert run_study(study, tmp_path / "out", Here(), cache=tmp_path / "cache") == states
    assert (tmp_path / "out" / "cells").stat().st_mtime_ns == before
    fixed = tiny(tmp_path, text.replace("budgets: [1, 2]", "budgets: [1]"))
    os.rename(_class_folders(tmp_path / "made"), here)
    again = run_study(
        fixed, tmp_path / "out", Here(), cache=tmp_path / "cache", options=Options(retry=True)
    )
    assert set(again) == {"done"}
    whole = run_study(fixed, tmp_path / "whole", Here(), cache=tmp_path / "other")
    assert whole == again
    mine = cells_in(tmp_path / "out")
    for name, record in cells_in(tmp_path / "whole").items():
        assert mine[name] == record


def test_a_run_with_failed_cells_says_so_by_its_exit_code(tmp_path: Path) -> None:
    study = tmp_path / "tiny.yaml"
    study.write_text(TINY.replace("phantom:n=60,size=16,variation=0.9", f"folder:{tmp_path}/no"))
    command = ["study", "run", str(study), "--out", str(tmp_path / "out"), "--workers", "1"]
    ran = CliRunner().invoke(app, [*command, "--only", "unlike", "--only", "full"])
    assert ran.exit_code == 1
    assert "1 cells failed: medistill study status" in ran.stderr


def test_a_full_disk_ends_a_study_and_loses_nothing_of_a_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = tiny(tmp_path)
    only = Options(only=("alike", "dm"))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_study(study, whole, Here(), cache=tmp_path / "one", options=only)
    plain, steps = _Keeper.keep, []

    def keep(self: _Keeper, *args: Any) -> None:
        plain(self, *args)
        self.save()
        steps.append(args)
        if len(steps) == 2:
            raise NoRoom("could not write log.jsonl")

    with monkeypatch.context() as patch:
        patch.setattr(_Keeper, "keep", keep)
        with pytest.raises(NoRoom):
            run_study(study, cut, Here(), cache=tmp_path / "two", options=only)
        assert list((tmp_path / "two" / "cells").glob("*/checkpoint.safetensors"))
        run_study(study, cut, Here(), cache=tmp_path / "two", options=only)
        assert len(steps) == 2 * (3 + 5)  # of two seeds and two budgets: no step was made twice
    assert cells_in(cut) == cells_in(whole)


def _class_folders(folder: Path) -> Path:
    from PIL import Image

    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        for number in range(30):
            pixels = bytes((number * 7 + (120 if name == "b" else 0) + i) % 256 for i in range(256))
            Image.frombytes("L", (16, 16), pixels).save(folder / name / f"{number}.png")
    return folder


def test_no_cell_begins_after_its_time(tmp_path: Path) -> None:
    options = Options(minutes=0)
    states = run_study(tiny(tmp_path), tmp_path / "out", Here(), cache=tmp_path, options=options)
    assert states == {"missing": len(grid(tiny(tmp_path)))}


def test_what_a_kill_left_before_a_run_began_is_no_refusal(
    finished: tuple[Study, Path], tmp_path: Path
) -> None:
    study, _out = finished
    place = Place("alike", "dm", 2, "convnet-2-8", 1)
    key = grid(study)[place].key
    torn = tmp_path / "cache" / "cells" / key / ".run.json.x.tmp"
    torn.parent.mkdir(parents=True)
    torn.write_text("{")
    options = Options(only=(key,))
    run_study(study, tmp_path / "out", Here(), cache=tmp_path / "cache", options=options)
    record = Folder(tmp_path / "out").cell(key)
    assert record is not None
    assert record["status"] == "done", record
    assert not torn.parent.exists()


def test_only_brings_the_random_images_that_choose(tmp_path: Path) -> None:
    study = tiny(tmp_path)
    place = Place("alike", "dm", 2, "convnet-2-8", 1)
    key = grid(study)[place].key
    run_study(study, tmp_path / "out", Here(), cache=tmp_path, options=Options(only=(key,)))
    done = {path.stem for path in (tmp_path / "out" / "cells").iterdir()}
    assert done == {key, grid(study)[place._replace(method="random", seed=0)].key}
    with pytest.raises(UsageError, match="found no cell for nothing"):
        run_study(
            study, tmp_path / "no", Here(), cache=tmp_path, options=Options(only=("nothing",))
        )
    assert not (tmp_path / "no").exists()


def test_a_damaged_cell_is_named(finished: tuple[Study, Path], tmp_path: Path) -> None:
    study, _ = finished
    key = next(iter(grid(study).values())).key
    (tmp_path / "cells").mkdir()
    for text in ("{", '{"format": "other"}'):
        (tmp_path / "cells" / f"{key}.json").write_text(text)
        with pytest.raises(DataError, match=key):
            run_study(study, tmp_path, Here(), cache=tmp_path)


@pytest.mark.slow
def test_processes_and_one_process_give_the_same_bits(
    finished: tuple[Study, Path], tmp_path: Path
) -> None:
    study, out = finished
    run_study(study, tmp_path / "out", Processes(2), cache=tmp_path / "cache")
    assert cells_in(tmp_path / "out") == cells_in(out)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_study_that_is_killed_ten_times_ends_with_the_same_table(
    finished: tuple[Study, Path], tmp_path: Path
) -> None:
    _study, out = finished
    words = [sys.executable, "-m", "medistill", "study", "run", str(out / "study.yaml")]
    words += ["--out", str(tmp_path / "out"), "--workers", "2"]
    there = {**os.environ, "MEDISTILL_CACHE": str(tmp_path / "cache")}
    kills = 0
    draw = random.Random(0)
    for number in range(10):
        before = len(cells_in(tmp_path / "out"))
        if before == len(cells_in(out)):
            break
        process = subprocess.Popen(words, env=there, stderr=subprocess.DEVNULL)
        until = time.monotonic() + (draw.uniform(1.0, 6.0) if number % 2 else 60)
        while process.poll() is None and time.monotonic() < until:
            if len(cells_in(tmp_path / "out")) > before:  # others are in the midst of theirs
                break
            time.sleep(0.02)
        time.sleep(draw.uniform(0.0, 0.2))
        kills += process.poll() is None
        process.kill()
        process.wait()
    assert kills >= 7  # ten, unless this machine was done before
    assert subprocess.run(words, env=there, check=False).returncode == 0
    assert cells_in(tmp_path / "out") == cells_in(out)


class Ray:
    """Two Ray nodes on loopback addresses, with a token; each is a process group of its own."""

    def __init__(self, folder: Path) -> None:
        self.port = 20000 + secrets.randbelow(20000)
        token = folder / "token"
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        self.there = {
            **os.environ,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "MEDISTILL_CACHE": str(folder / "cache"),
            "OMP_NUM_THREADS": "1",
        }
        common = ["--num-cpus=1", "--disable-usage-stats", "--object-store-memory=80000000"]
        common += ["--block", f"--temp-dir=/tmp/medistill-ray-{self.port}"]
        first = ["--head", "--node-ip-address=127.0.0.2", f"--port={self.port}"]
        self.head = self._start(*first, "--include-dashboard=false", *common)
        time.sleep(6)
        address = f"--address=127.0.0.2:{self.port}"
        self.node = self._start(address, "--node-ip-address=127.0.0.3", *common[:-1])

    def _start(self, *words: str) -> "subprocess.Popen[bytes]":
        ray = Path(sys.executable).with_name("ray")
        return subprocess.Popen(
            [str(ray), "start", *words],
            env=self.there,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def workers(self) -> list[int]:
        """Wait for processes that run cells, and return them."""
        until = time.monotonic() + 30
        while time.monotonic() < until:
            mine = [*below(self.head.pid), *below(self.node.pid)]
            found = [one for one in mine if command_of(one).startswith("ray::_call")]
            if found:
                return found
        return []

    def end(self, process: "subprocess.Popen[bytes]") -> None:
        """Kill a node with all its processes."""
        for one in (*below(process.pid), process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(one, signal.SIGKILL)
        process.wait()


def command_of(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_text()
    except OSError:
        return ""


def below(process: int) -> list[int]:
    """Return the processes that a process began, and those that these began."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found = [process]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found[1:]


@pytest.fixture
def ray_nodes(tmp_path: Path) -> Iterator[Ray]:
    pytest.importorskip("ray")
    nodes = Ray(tmp_path)
    yield nodes
    nodes.end(nodes.node)
    nodes.end(nodes.head)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_ray_cluster_that_loses_a_worker_and_a_node_gives_the_same_bits(
    finished: tuple[Study, Path], tmp_path: Path, ray_nodes: Ray
) -> None:
    _study, out = finished
    words = [sys.executable, "-m", "medistill", "study", "run", str(out / "study.yaml")]
    words += ["--out", str(tmp_path / "out"), "--engine", "ray"]
    words += ["--address", f"127.0.0.2:{ray_nodes.port}"]
    process = subprocess.Popen(words, env=ray_nodes.there)
    cells = tmp_path / "out" / "cells"

    def wait_for(count: int) -> None:
        until = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < until:
            if cells.is_dir() and len(list(cells.glob("*.json"))) >= count:
                return
            time.sleep(0.05)

    wait_for(2)
    killed = ray_nodes.workers()
    os.kill(killed[0], signal.SIGKILL)
    wait_for(5)
    assert process.poll() is None, "the study was over before its node could be killed"
    assert len(below(ray_nodes.node.pid)) >= 2
    ray_nodes.end(ray_nodes.node)
    assert process.wait(timeout=200) == 0
    assert cells_in(tmp_path / "out") == cells_in(out)


def test_tables_hold_the_means_of_their_rows(finished: tuple[Study, Path]) -> None:
    study, out = finished
    rows = rows_of(study, entries_of(Folder(out), grid(study)))
    assert len(rows) == 2 * (3 * 3 + 2) + 16
    made = table(Book(rows, study.every_budget), metric="auc", fixed={"source": "alike"})
    assert made.corner == ("source", "ipc")
    assert made.columns == ("random", "full", "herding", "dm")
    assert [head for head, _ in made.lines] == [("alike", "1"), ("alike", "2")]
    own = [r["auc"] for r in rows if (r["source"], r["method"], r["ipc"]) == ("alike", "dm", 2)]
    cell = made.lines[1][1][3]
    assert cell is not None
    assert cell.n == 2
    assert cell.mean == pytest.approx(sum(own) / 2)
    assert as_csv(made).splitlines()[0].startswith("source,ipc,random mean,random low")


def test_the_command_line_tells_of_a_study(finished: tuple[Study, Path], tmp_path: Path) -> None:
    _, out = finished

    def run(*words: str) -> str:
        result = CliRunner().invoke(app, ["study", *words])
        assert result.exit_code == 0, result.output
        return result.stdout

    assert "| alike | 4/4 | 4/4 | 3/3 | 1/1 |  |" in run("status", str(out))
    assert json.loads(run("status", str(out), "--json"))["cells"] == {"done": 24}
    text = run("table", str(out), "--rows", "source", "--columns", "method", "--only", "ipc=2")
    assert text.startswith("| source | random | full | herding | dm |")
    for form, start in (("latex", "\\begin{tabular}{llrrrr}"), ("html", "<table>"), ("csv", "so")):
        assert run("table", str(out), "--format", form).startswith(start)
    assert run("rows", str(out), "--out", str(tmp_path / "rows.csv")).startswith("38 rows in ")
    assert (tmp_path / "rows.csv").read_text().count("\n") == 39
    wrong = (["--metric", "acuracy"], ["--rows", "sources"], ["--only", "ipc"], ["--only", "ipc=3"])
    wrong += (["--rows", "source,ipc", "--columns", "ipc"],)
    for words in wrong:
        result = CliRunner().invoke(app, ["study", "table", str(out), *words])
        assert result.exit_code == 2
        assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "words",
    [
        ["--gpus", "1"],
        ["--engine", "ray", "--workers", "2"],
        ["--engine", "ray", "--device", "cuda"],
    ],
)
def test_flags_of_another_engine_are_refused(
    finished: tuple[Study, Path], words: list[str]
) -> None:
    result = CliRunner().invoke(app, ["study", "run", str(finished[1]), *words])
    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1), result.output


def test_names_in_latex_are_text() -> None:
    head = ("[a] 50% & b_c", "x^2 ~ \\{y}")
    text = as_latex(
        Table(("source", "ipc"), ("dm",), ((head, (Score(1.0, None, None, 1),)),), "worth")
    )
    expected = (
        r"{[}a{]} 50\% \& b\_c & x\textasciicircum{}2 \textasciitilde{} \textbackslash{}\{y\}"
    )
    assert expected + r" & $\le$1 \\" in text.splitlines()


def test_a_study_goes_on_from_its_rows_to_the_same_end(
    finished: tuple[Study, Path], tmp_path: Path
) -> None:
    """Rows of finished cells come back; the lost ones run by recipes that random rows tell."""
    study, out = finished
    rows = rows_of(study, entries_of(Folder(out), grid(study)))
    kept = [row for row in rows if (row["source"], row["method"]) != ("unlike", "dm")]
    (tmp_path / "rows.csv").write_text(write_rows(kept))
    folder = tmp_path / "again"
    words = ("study", "restore", str(out / "study.yaml"), "--out", str(folder), "--rows")
    for restored in (20, 0):
        result = CliRunner().invoke(app, [*words, str(tmp_path / "rows.csv"), "--json"])
        assert json.loads(result.stdout)["restored"] == restored
    run_study(study, folder, Here(), cache=tmp_path / "cache")
    again = rows_of(study, entries_of(Folder(folder), grid(study)))
    assert len(again) == len(rows) == len(kept) + 4
    for mine, theirs in zip(read_rows(write_rows(again)), read_rows(write_rows(rows)), strict=True):
        assert without_times(mine) == without_times(theirs)
    (tmp_path / "cut.csv").write_text(write_rows([row for row in kept if row["student_seed"] != 1]))
    (tmp_path / "none.csv").write_text("a,b\n1,2\n")
    for name in ("cut", "none", "missing"):
        result = CliRunner().invoke(app, [*words, str(tmp_path / f"{name}.csv")])
        assert result.exit_code == 3, result.output
        assert len(result.stderr.splitlines()) == 1


def test_what_was_measured_is_restored_from_an_indicator(
    finished: tuple[Study, Path],
) -> None:
    study = replace(finished[0], measure=True)
    records = records_of(study, [], {"alike": {"classes": 2}, "elsewhere": {}})
    cells = {cell.key: place for place, cell in grid(study).items()}
    assert {cells[key].source: one["measure"] for key, one in records.items()} == {
        "alike": {"classes": 2}
    }
