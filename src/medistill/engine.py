"""Map tasks over workers: this process, local processes, or a Ray cluster, by one interface."""

import ast
import inspect
import math
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache
from itertools import islice
from multiprocessing.process import BaseProcess
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from .errors import RunRefused, UsageError, extra
from .places import cores

T = TypeVar("T")
R = TypeVar("R")
KNOCK_S = 5.0
TRIES = 3  # runs of a task whose worker was lost
AHEAD = 1024  # items among which a worker looks for one like its last


@dataclass(frozen=True)
class Lost:
    """What stands for the result of a task whose workers were lost TRIES times."""

    reason: str = (
        f"lost a worker process {TRIES} times in the same place; expected it to live: it may want "
        "more memory than there is, so use fewer workers"
    )


class Engine(ABC):
    """Where tasks run. A task is a function of a module and one item; both must be picklable."""

    @property
    def places(self) -> int:
        """How many tasks run at once, as far as that is known before."""
        return 1

    @abstractmethod
    def done(
        self,
        function: Callable[[T], R],
        items: Iterable[T],
        like: Callable[[T], object] | None = None,
        until: float = math.inf,
    ) -> Iterator[tuple[int, R | Lost]]:
        """Yield (number of the item, function(item)) as tasks end, in any order.

        Items are taken as workers get free, so they need not all be in memory. A lost worker costs
        its task only, which runs again; `Lost` stands for a result that never came. Where `like`
        says what an item is like, local workers keep to items that are like their last, for which
        they have loaded and compiled what is needed. None is given out after `until` (monotonic
        seconds); what waits on a cluster, or for another worker, still runs.
        Raises: what the function raises.
        """

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Yield function(item) for each item, in order.

        Raises: what the function raises; RunRefused when a worker is lost again and again.
        """
        early: dict[int, R] = {}
        turn = 0
        for number, result in self.done(function, items):
            if isinstance(result, Lost):
                raise RunRefused(result.reason)
            early[number] = result
            while turn in early:
                yield early.pop(turn)
                turn += 1


@dataclass(frozen=True)
class Here(Engine):
    """Run tasks in this process, one after another."""

    def done(
        self,
        function: Callable[[T], R],
        items: Iterable[T],
        like: Callable[[T], object] | None = None,
        until: float = math.inf,
    ) -> Iterator[tuple[int, R | Lost]]:
        """Yield the results.

        Example:
            >>> list(Here().map(abs, [-1, 2]))
            [1, 2]
        """
        for number, item in enumerate(items):
            if time.monotonic() > until:
                return
            yield number, function(item)


class _Queue(Generic[T]):
    """Items that wait, with their numbers."""

    def __init__(
        self, items: Iterable[T], like: Callable[[T], object] | None, until: float
    ) -> None:
        self._source = enumerate(items)
        self._like = like or (lambda _: None)
        self._ahead: list[tuple[int, T, object]] = []
        self._most = AHEAD if like else 1
        self._until = until

    def next(self, last: object, others: Collection[object]) -> tuple[int, T, object] | None:
        """Return an item like the worker's last, else one that no other worker has begun on.

        None when there is no item, or no time.
        """
        if time.monotonic() > self._until:
            return None
        for number, item in islice(self._source, self._most - len(self._ahead)):
            self._ahead.append((number, item, self._like(item)))
        if not self._ahead:
            return None
        places = range(len(self._ahead))
        alike = (place for place in places if self._ahead[place][2] == last)
        fresh = (place for place in places if self._ahead[place][2] not in others)
        return self._ahead.pop(next(alike, next(fresh, 0)))


class _Idle(NamedTuple):
    worker: ProcessPoolExecutor
    like: object  # of its last item


class _Busy(NamedTuple, Generic[T]):
    worker: ProcessPoolExecutor
    number: int
    item: T
    like: object
    tries: int


@dataclass(frozen=True)
class Processes(Engine):
    """Run tasks in spawned processes of this machine, which share its cores evenly.

    Each worker is a pool of its own, so that one which dies takes no other task with it.
    """

    workers: int

    @property
    def places(self) -> int:
        """As many as there are workers."""
        return self.workers

    def done(
        self,
        function: Callable[[T], R],
        items: Iterable[T],
        like: Callable[[T], object] | None = None,
        until: float = math.inf,
    ) -> Iterator[tuple[int, R | Lost]]:
        """Yield the results.

        Raises: UsageError when a script calls this as it is imported, for workers import it too.
        """
        _check_guarded()
        queue = _Queue(items, like, until)
        free = [_Idle(self._worker(), None) for _ in range(self.workers)]
        running: dict[Future[R], _Busy[T]] = {}
        try:
            while True:
                begun = [one.like for one in running.values()]
                while free and (following := queue.next(free[-1].like, begun)) is not None:
                    future, worker = self._given(free.pop().worker, function, following[1])
                    running[future] = _Busy(worker, *following, 1)
                    begun.append(following[2])
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    one = running[future]  # until its result is there: who raises is ended, too
                    worker = one.worker
                    result: R | Lost = Lost()
                    try:
                        result = future.result()
                    except BrokenProcessPool:
                        worker = self._worker()
                        if one.tries < TRIES:
                            again = worker.submit(function, one.item)
                            running[again] = one._replace(worker=worker, tries=one.tries + 1)
                            del running[future]
                            continue
                    del running[future]
                    free.append(_Idle(worker, one.like))
                    yield one.number, result
        finally:
            for worker in [one.worker for one in free] + [one.worker for one in running.values()]:
                _end(worker)

    def _given(
        self, worker: ProcessPoolExecutor, function: Callable[[T], R], item: T
    ) -> tuple[Future[R], ProcessPoolExecutor]:
        """Give an item to a worker, or to a new one where that died while it had nothing to do."""
        try:
            return worker.submit(function, item), worker
        except BrokenProcessPool:
            _end(worker)
            fresh = self._worker()
            return fresh.submit(function, item), fresh

    def _worker(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            1,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_begin,
            initargs=(max(1, cores() // self.workers),),
        )


@cache
def _check_guarded() -> None:
    """Refuse to start workers from a script's own lines, which each of them would run again.

    A script that asks for `__name__` anywhere is taken to know that; `python -m PACKAGE` is
    imported by no worker.
    """
    main = sys.modules["__main__"]
    path = getattr(main, "__file__", None)
    if path is None or getattr(main.__spec__, "name", "").endswith("__main__"):
        return
    frame = inspect.currentframe()
    while frame and not (frame.f_code.co_name == "<module>" and frame.f_code.co_filename == path):
        frame = frame.f_back
    if frame is None:
        return
    try:
        with open(path, "rb") as file:
            parts = ast.walk(ast.parse(file.read()))
    except (OSError, SyntaxError, ValueError):  # no script, or one that is being edited
        return
    if not any(isinstance(part, ast.Name) and part.id == "__name__" for part in parts):
        raise UsageError(
            f"found work for several processes in line {frame.f_lineno} of {path}, which each of "
            "them would run again; expected it below `if __name__ == '__main__':`"
        )


def _begin(threads: int) -> None:
    """Set up a worker: it leaves Ctrl-C to its parent, and does not outlive it."""
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_die_after, args=(parent,), daemon=True).start()


def _die_after(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _end(worker: ProcessPoolExecutor) -> None:
    """End a worker, whatever it is doing."""
    processes = list((worker._processes or {}).values())
    worker.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.terminate()
        process.join()


@dataclass(frozen=True)
class Cluster(Engine):
    """Run tasks on a Ray cluster: the one at `address`, else one that is started on this machine.

    A task takes `cpus` and `gpus` of a node. Ray runs a task again when its worker or node is lost.
    Every node needs medistill and what the tasks read; results travel to this process. Tokens are
    required of all who connect (RAY_AUTH_MODE=token).
    """

    address: str | None = None
    cpus: float = 1.0
    gpus: float = 0.0

    def done(
        self,
        function: Callable[[T], R],
        items: Iterable[T],
        like: Callable[[T], object] | None = None,
        until: float = math.inf,
    ) -> Iterator[tuple[int, R | Lost]]:
        """Yield the results.

        Raises: what the function raises; UsageError when the ray extra is not installed; RunRefused
        when the cluster cannot be reached, or no node of it has what a task takes.
        """
        ray = self._connected()
        task = ray.remote(_call).options(
            num_cpus=self.cpus, num_gpus=self.gpus, max_retries=TRIES - 1
        )
        source = enumerate(items)
        running: dict[Any, int] = {}
        while True:
            # Twice as many as there are places, so that no place waits for this process.
            places = 2 * max(1, int(ray.cluster_resources().get("CPU", 1) / max(self.cpus, 0.01)))
            late = time.monotonic() > until
            while len(running) < places and not late and (following := next(source, None)):
                running[task.remote(function, following[1])] = following[0]
            if not running:
                return
            for ready in ray.wait(list(running), num_returns=1)[0]:
                yield running.pop(ready), _fetched(ray, ready)

    def _connected(self) -> Any:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        # A task without a GPU sees none; else all of them would share the first.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
        ray = extra("ray", "ray")
        if not ray.is_initialized():
            try:
                _reachable(self.address)
                ray.init(
                    address=self.address or "local", log_to_driver=False, logging_level="ERROR"
                )
            except (OSError, RuntimeError, ValueError) as error:
                raise RunRefused(
                    f"could not reach a Ray cluster at {self.address or 'this machine'} "
                    f"({str(error).splitlines()[0]}); expected one that `ray start --head` began, "
                    "with the same token (RAY_AUTH_TOKEN_PATH)"
                ) from None
        self._check_room(ray)
        return ray

    def _check_room(self, ray: Any) -> None:
        """Refuse what no node has: Ray would wait for such a node for ever."""
        nodes = [node.get("Resources", {}) for node in ray.nodes() if node.get("Alive")]
        if not any(n.get("CPU", 0) >= self.cpus and n.get("GPU", 0) >= self.gpus for n in nodes):
            have = ", ".join(f"{n.get('CPU', 0):g} and {n.get('GPU', 0):g}" for n in nodes)
            raise RunRefused(
                f"found nodes with CPUs and GPUs: {have or 'none'}; expected one with "
                f"{self.cpus:g} and {self.gpus:g}: lower --gpus or the protocol's threads"
            )


def _reachable(address: str | None) -> None:
    """Knock at HOST:PORT: Ray itself would try for many minutes.

    Raises: OSError when nobody answers; ValueError when it is no address.
    """
    if address is None or address == "auto" or "://" in address:
        return
    host, colon, port = address.rpartition(":")
    if not (colon and host and port.isdecimal()):
        raise ValueError("no HOST:PORT")
    socket.create_connection((host, int(port)), timeout=KNOCK_S).close()


def _call(function: Callable[[T], R], item: T) -> R:
    return function(item)


def _fetched(ray: Any, ready: Any) -> Any:
    """Return a task's result; an exception that it raised is raised as it was."""
    try:
        return ray.get(ready)
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, Exception) else error from None
    except (
        ray.exceptions.WorkerCrashedError,
        ray.exceptions.NodeDiedError,
        ray.exceptions.OutOfMemoryError,
        ray.exceptions.ObjectLostError,
    ):
        return Lost()
    except ray.exceptions.RayError as error:
        raise RunRefused(
            f"lost the Ray cluster ({str(error).splitlines()[0]}); expected it to live: start it "
            "again and run the same command"
        ) from None


def local(workers: int, threads: int = 1) -> Engine:
    """Return the engine of this machine with so many workers (1: this process).

    0: as many as there are cores for, where a task runs in so many `threads`.
    Raises: UsageError when there is less than none.
    """
    if workers < 0:
        raise UsageError(f"found --workers {workers}; expected 0 or more")
    workers = workers or max(1, cores() // threads)
    return Here() if workers == 1 else Processes(workers)
