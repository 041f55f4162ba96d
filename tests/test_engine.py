"""Engines: every result, in order where asked, errors as they are, and workers that are lost."""

import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from medistill.engine import TRIES, Cluster, Engine, Here, Lost, Processes, _Queue, local
from medistill.errors import DataError, RunRefused, UsageError

BOTH = pytest.mark.parametrize("engine", [Here(), Processes(2)], ids=["here", "processes"])


def square(number: int) -> int:
    return number * number


def slow_first(number: int) -> int:
    time.sleep(1.5 if number == 0 else 0)
    return number


def refuse(number: int) -> int:
    if number == 3:
        raise DataError("found 3; expected another number")
    return number


def die_once(number: int, *, folder: Path) -> int:
    """Kill the own process the first time that it is given a 2."""
    mark = folder / "died"
    if number == 2 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    with (folder / "done").open("a") as file:
        file.write(f"{number}\n")
    return number


def die_at_two(number: int) -> int:
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.slow
@BOTH
def test_results_come_in_order_and_errors_as_they_are(engine: Engine) -> None:
    assert list(engine.map(square, range(7))) == [0, 1, 4, 9, 16, 25, 36]
    assert list(engine.map(square, [])) == []
    with pytest.raises(DataError, match="found 3") as kept:
        list(engine.map(refuse, range(5)))
    # Also the worker whose task raised is gone, though its error is held.
    assert kept.value.args
    assert not multiprocessing.active_children()


def test_a_worker_keeps_to_what_is_alike_then_begins_on_what_no_other_has() -> None:
    queue = _Queue([0, 1, 10, 2, 11, 20], lambda number: number // 10, math.inf)
    assert queue.next(None, []) == (0, 0, 0)
    assert queue.next(None, [0]) == (2, 10, 1)
    assert queue.next(0, [1]) == (1, 1, 0)
    assert queue.next(1, [0]) == (4, 11, 1)
    assert queue.next(1, [0]) == (5, 20, 2)
    assert queue.next(2, [0]) == (3, 2, 0)  # rather another's than none
    assert queue.next(0, []) is None
    taken: list[int] = []
    lazy = _Queue((taken.append(n) or n for n in range(9)), None, math.inf)
    assert lazy.next(None, []) == (0, 0, None)
    assert taken == [0]  # items may be large: without a word on them none is taken early


@pytest.mark.slow
def test_all_items_are_done_whatever_they_are_like() -> None:
    done = Processes(2).done(square, range(9), like=lambda number: number % 3)
    assert sorted(done) == [(n, n * n) for n in range(9)]


@BOTH
def test_nothing_begins_when_the_time_is_over(engine: Engine) -> None:
    assert list(engine.done(square, range(3), until=time.monotonic() - 1)) == []


@pytest.mark.slow
def test_a_slow_task_holds_up_no_other() -> None:
    numbers = [number for number, _ in Processes(2).done(slow_first, range(4))]
    assert sorted(numbers) == list(range(4))
    assert numbers[0] != 0
    assert list(Processes(2).map(slow_first, range(4))) == list(range(4))


@pytest.mark.slow
def test_items_are_taken_as_workers_get_free() -> None:
    taken = []

    def items() -> Iterator[int]:
        for number in range(50):
            taken.append(number)
            yield number

    results = Processes(1).map(square, items())
    assert next(results) == 0
    assert len(taken) <= 2
    assert list(results) == [n * n for n in range(1, 50)]


@pytest.mark.slow
def test_a_lost_worker_costs_its_task_only(tmp_path: Path) -> None:
    task = partial(die_once, folder=tmp_path)
    assert list(Processes(2).map(task, range(6))) == list(range(6))
    done = [int(line) for line in (tmp_path / "done").read_text().splitlines()]
    assert sorted(done) == list(range(6))  # nothing that ran beside it ran again


def _number() -> Iterator[int]:
    """Yield 0, wait until its worker is idle, kill that, and yield 1."""
    yield 0
    time.sleep(1)
    for worker in multiprocessing.active_children():
        worker.kill()
        worker.join()
    yield 1


@pytest.mark.slow
def test_a_worker_that_dies_idle_is_replaced() -> None:
    found = []
    for number, result in Processes(1).done(square, _number()):
        found.append((number, result))
    assert found == [(0, 0), (1, 1)]


@pytest.mark.slow
def test_a_worker_lost_again_and_again_ends_its_task_and_no_other() -> None:
    found = dict(Processes(2).done(die_at_two, range(4)))
    assert found == {0: 0, 1: 1, 2: Lost(), 3: 3}
    with pytest.raises(RunRefused, match=f"lost a worker process {TRIES} times"):
        list(Processes(1).map(die_at_two, range(4)))


UNGUARDED = """
from medistill.engine import Processes
{guard}print(list(Processes(2).map(abs, [-1, -2])))
"""


GUARDED = "if __name__ == '__main__': "


@pytest.mark.parametrize("guard", ["", "if True: ", GUARDED, "__name__ == '__main__' and "])
def test_a_script_that_each_worker_would_run_again_is_one_line(tmp_path: Path, guard: str) -> None:
    script = tmp_path / "of" / "script.py"
    script.parent.mkdir()
    script.write_text(UNGUARDED.format(guard=guard))
    ran = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    if "__name__" in guard:
        assert ran.stdout == "[1, 2]\n"
        return
    assert ran.returncode == 1
    assert ran.stderr.count("Traceback") == 1
    said = f"UsageError: found work for several processes in line 3 of {script}"
    assert said in ran.stderr.splitlines()[-1]
    if not guard:  # a package's own lines are run by `python -m` alone
        script.rename(script.with_name("__main__.py"))
        command = [sys.executable, "-m", "of"]
        ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert ran.stdout == "[1, 2]\n"


ORPHANS = """
import os, sys, time
from pathlib import Path
from medistill.engine import Processes
from test_engine import tell_and_wait
if __name__ == "__main__":
    list(Processes(2).map(tell_and_wait, [sys.argv[1]] * 2))
"""


def tell_and_wait(folder: str) -> None:
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(60)


def alive(process: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{process}/stat").read_text().split()[2]
    except OSError:
        return False


@pytest.mark.slow
def test_workers_do_not_outlive_a_parent_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "orphans.py"
    script.write_text(ORPHANS)
    told = tmp_path / "told"
    told.mkdir()
    where = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    parent = subprocess.Popen(
        [sys.executable, str(script), str(told)], env={**os.environ, "PYTHONPATH": where}
    )
    until = time.monotonic() + 60
    while len(list(told.iterdir())) < 2 and time.monotonic() < until:
        time.sleep(0.1)
    workers = [int(one.name) for one in told.iterdir()]
    assert len(workers) == 2
    parent.kill()
    parent.wait()
    until = time.monotonic() + 20
    while any(map(alive, workers)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(map(alive, workers))


def test_less_than_one_worker_is_refused() -> None:
    with pytest.raises(UsageError, match="expected 0 or more"):
        local(-1)
    assert local(0, threads=10_000) == Here()


def test_what_no_node_has_is_refused() -> None:
    class Nodes:
        @staticmethod
        def nodes() -> list[dict[str, object]]:
            return [
                {"Alive": True, "Resources": {"CPU": 4.0}},
                {"Alive": True, "Resources": {"CPU": 2.0, "GPU": 1.0}},
                {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}},
            ]

    Cluster(cpus=4)._check_room(Nodes)
    Cluster(cpus=2, gpus=1)._check_room(Nodes)
    with pytest.raises(RunRefused, match="found nodes with CPUs and GPUs: 4 and 0, 2 and 1"):
        Cluster(cpus=4, gpus=1)._check_room(Nodes)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere", "127.0.0.1:"])
def test_a_cluster_that_is_not_there_is_told_at_once(address: str) -> None:
    pytest.importorskip("ray")
    begin = time.monotonic()
    with pytest.raises(RunRefused, match="could not reach a Ray cluster"):
        list(Cluster(address).map(square, [1]))
    assert time.monotonic() - begin < 30


def test_a_missing_ray_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"medistill\[ray\]"):
        list(Cluster().map(square, [1]))
