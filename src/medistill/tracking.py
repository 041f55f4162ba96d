"""Optional writers of what a run does to TensorBoard or MLflow; nothing is written unless asked."""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import RunRefused, UsageError, extra

EXPERIMENT = "medistill"
EVERY_S = 2.0  # between two writes to a database, each of which takes a tenth of a second
LONGEST = 500  # letters of a parameter in MLflow


class Tracker(ABC):
    """Where the numbers of one run go, beside its own files."""

    @abstractmethod
    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Write the numbers of one step; those that are not finite are left out."""

    @abstractmethod
    def end(self, scores: Mapping[str, float], finished: bool = True) -> None:
        """Write what the run reached, and close it."""


class TensorBoard(Tracker):
    """Events for TensorBoard, in a folder of the run's name."""

    def __init__(self, folder: Path, name: str, facts: Mapping[str, Any]) -> None:
        extra("tensorboard", "tracking")
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(folder / name))
        lines = (f"| {key} | {value} |" for key, value in facts.items())
        self.writer.add_text("settings", "\n".join(("| name | value |", "|---|---|", *lines)))

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Write the numbers of one step."""
        for key, value in _finite(values).items():
            self.writer.add_scalar(key, value, step)

    def end(self, scores: Mapping[str, float], finished: bool = True) -> None:
        """Write the scores and close the file."""
        for key, value in _finite(scores).items():
            self.writer.add_scalar(f"score/{key}", value, 0)
        self.writer.close()


class MLflow(Tracker):
    """A run in an MLflow store, by default a database file of this machine."""

    def __init__(self, store: str, name: str, facts: Mapping[str, Any]) -> None:
        mlflow = extra("mlflow", "tracking")
        entities = extra("mlflow.entities", "tracking")
        self.metric, self.written = entities.Metric, time.monotonic()
        self.waiting: list[Any] = []
        uri = store if "://" in store else f"sqlite:///{Path(store).expanduser().resolve()}"
        self.store, self.errors = store, (mlflow.exceptions.MlflowException, OSError)
        params = [entities.Param(key, str(value)[:LONGEST]) for key, value in facts.items()]
        with self._reached():
            self.client = mlflow.MlflowClient(tracking_uri=uri)
            held = self.client.get_experiment_by_name(EXPERIMENT)
            number = held.experiment_id if held else self.client.create_experiment(EXPERIMENT)
            self.run = self.client.create_run(number, run_name=name).info.run_id
            self.client.log_batch(self.run, params=params)

    @contextmanager
    def _reached(self) -> Iterator[None]:
        """End the run in one line where the store is not there, or no longer: it can be resumed."""
        try:
            yield
        except self.errors as error:
            said = (str(error).splitlines() or ["no answer"])[0]
            raise RunRefused(
                f"could not write to the MLflow store {self.store} ({said}); expected a database "
                "file or the address of a server"
            ) from None

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Keep the numbers of one step, and write them with others."""
        now = int(1000 * time.time())
        for key, value in _finite(values).items():
            self.waiting.append(self.metric(key, value, now, step))
        if time.monotonic() - self.written > EVERY_S:
            self._write()

    def _write(self) -> None:
        with self._reached():
            for start in range(0, len(self.waiting), 1000):  # as many as a batch may hold
                self.client.log_batch(self.run, metrics=self.waiting[start : start + 1000])
        self.waiting, self.written = [], time.monotonic()

    def end(self, scores: Mapping[str, float], finished: bool = True) -> None:
        """Write the scores and close the run."""
        self.step(0, {f"score.{key}": value for key, value in scores.items()})
        self._write()
        with self._reached():
            self.client.set_terminated(self.run, "FINISHED" if finished else "FAILED")


def check_track(text: str) -> None:
    """Refuse, before any work, what `tracker` could not open; nothing to track is well.

    Raises: UsageError as `tracker` does.
    """
    kind, _, where = text.partition(":")
    if text and (kind not in ("tensorboard", "mlflow") or not where):
        raise UsageError(
            f"found --track {text}; expected tensorboard:FOLDER, mlflow:FILE.db or mlflow:URI"
        )
    if text:
        extra(kind, "tracking")


def tracker(text: str, name: str, facts: Mapping[str, Any]) -> Tracker:
    """Open `tensorboard:FOLDER`, or `mlflow:FILE.db` or `mlflow:URI`, for one run.

    Raises: UsageError when it is neither, or the tracking extra is not installed; RunRefused when
    the store cannot be written.
    """
    check_track(text or "nothing")
    kind, _, where = text.partition(":")
    if kind == "tensorboard":
        return TensorBoard(Path(where).expanduser(), name, facts)
    return MLflow(where, name, facts)


def _finite(values: Mapping[str, float]) -> dict[str, float]:
    return {key: float(value) for key, value in values.items() if math.isfinite(value)}
