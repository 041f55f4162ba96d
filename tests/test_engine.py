"""Engines: results in order, errors as they are, and workers that are lost."""

import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from medistill.engine import TRIES, Engine, Here, Processes
from medistill.errors import DataError, RunRefused

BOTH = pytest.mark.parametrize("engine", [Here(), Processes(2)], ids=["here", "processes"])


def square(number: int) -> int:
    return number * number


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


def die(number: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.slow
@BOTH
def test_results_come_in_order_and_errors_as_they_are(engine: Engine) -> None:
    assert list(engine.map(square, range(7))) == [0, 1, 4, 9, 16, 25, 36]
    assert list(engine.map(square, [])) == []
    with pytest.raises(DataError, match="found 3"):
        list(engine.map(refuse, range(5)))


@pytest.mark.slow
def test_items_are_taken_as_workers_get_free() -> None:
    taken = []

    def items() -> Iterator[int]:
        for number in range(50):
            taken.append(number)
            yield number

    results = Processes(1).map(square, items())
    assert next(results) == 0
    assert len(taken) <= 4
    assert list(results) == [n * n for n in range(1, 50)]


@pytest.mark.slow
def test_a_lost_worker_costs_its_task_only(tmp_path: Path) -> None:
    task = partial(die_once, folder=tmp_path)
    assert list(Processes(2).map(task, range(6))) == list(range(6))
    done = [int(line) for line in (tmp_path / "done").read_text().splitlines()]
    assert set(done) == set(range(6))
    assert len(done) <= 6 + 2  # what ran beside it may run again, the rest does not


@pytest.mark.slow
def test_workers_that_are_lost_again_and_again_end_the_run() -> None:
    with pytest.raises(RunRefused, match=f"lost a worker process {TRIES} times"):
        list(Processes(1).map(die, range(3)))
