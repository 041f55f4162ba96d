"""Map tasks over workers: this process, local processes, and later a cluster, by one interface."""

import multiprocessing
import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import TypeVar

import torch

from .errors import RunRefused, UsageError

T = TypeVar("T")
R = TypeVar("R")
TRIES = 3  # runs of a task whose worker was lost


class Engine(ABC):
    """Where tasks run. A task is a function of a module and one item; both must be picklable."""

    @abstractmethod
    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Yield function(item) for each item, in order; a lost worker costs its task only.

        Items are taken as workers get free, so they need not all be in memory.
        Raises: what the function raises; RunRefused when workers are lost again and again.
        """


@dataclass(frozen=True)
class Here(Engine):
    """Run tasks in this process, one after another."""

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Yield the results.

        Example:
            >>> list(Here().map(abs, [-1, 2]))
            [1, 2]
        """
        return map(function, items)


@dataclass(frozen=True)
class Processes(Engine):
    """Run tasks in spawned processes of this machine, which share its cores evenly."""

    workers: int

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Yield the results."""
        source = iter(items)
        waiting: deque[T] = deque()  # handed out and not yet answered, oldest first
        lost = 0
        while True:
            try:
                for result in self._pool(function, source, waiting):
                    lost = 0
                    yield result
                return
            except BrokenProcessPool:
                lost += 1
                if lost == TRIES:
                    raise RunRefused(
                        f"lost a worker process {TRIES} times in the same place; expected it to "
                        "live: it may want more memory than there is, so use fewer workers"
                    ) from None

    def _pool(
        self, function: Callable[[T], R], source: Iterator[T], waiting: deque[T]
    ) -> Iterator[R]:
        """Run what is waiting and what the source still holds in one pool of processes."""
        threads = max(1, (os.cpu_count() or 1) // self.workers)
        with ProcessPoolExecutor(
            self.workers,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=torch.set_num_threads,
            initargs=(threads,),
        ) as pool:
            running: deque[Future[R]] = deque(pool.submit(function, item) for item in waiting)
            while True:
                while len(running) <= self.workers:
                    try:
                        item = next(source)
                    except StopIteration:
                        break
                    waiting.append(item)
                    running.append(pool.submit(function, item))
                if not running:
                    return
                result = running[0].result()
                running.popleft()
                waiting.popleft()
                yield result


def local(workers: int) -> Engine:
    """Return the engine of this machine with so many workers (1: this process).

    Raises: UsageError when there is less than one.
    """
    if workers < 1:
        raise UsageError(f"found --workers {workers}; expected at least 1")
    return Here() if workers == 1 else Processes(workers)
