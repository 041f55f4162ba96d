"""What a method prepares once, kept on disk and shared by all budgets and seeds of synthesis."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from . import __version__
from .backbones import to_spec
from .compute import Mode
from .methods import Method, Task
from .records import State, digest, kept_state, locked, to_record
from .rng import Rng


def prepared(method: Method, task: Task, cache: Path | None, mode: Mode = "off") -> State:
    """Return what the method prepares, from the cache where its digest is already there.

    The stream is fixed, not the run's seed: all budgets and seeds of synthesis share it.
    """
    # By its own rule, so that whether a run's steps are compiled changes nothing of it.
    compiled = method.prepare_compiled(task, mode)
    task = dataclasses.replace(task, compute=dataclasses.replace(task.compute, compile=compiled))
    what = method.prepared_from(task)
    key = digest(
        {
            "what": what,
            "data": task.real.digest,
            "card": to_record(task.real.card),
            "device": task.real.device.type,
            "torch": torch.__version__,
            "backbone": to_spec(task.backbone),
            "augmentation": to_record(task.augmentation),
            "precision": task.compute.precision,
            "compiled": compiled,
            "version": __version__,
        }
    )
    # A sketch is what would be kept: it was prepared elsewhere.
    keep = cache is not None and task.sketch is None
    store = cache / "prepared" / key[:24] if cache and keep else None
    with _alone(store):
        if method.own_files:
            task = dataclasses.replace(task, store=store)
            return method.prepare(task, Rng(0).child("prepare"))
        path = store.with_suffix(".safetensors") if store else None
        header = {"format": "medistill prepared 1", "what": what, "key": key}
        state = kept_state(path, lambda: method.prepare(task, Rng(0).child("prepare")), header)
        return on_device(state, task.real.device)


@contextmanager
def _alone(store: Path | None) -> Iterator[None]:
    """Keep two runs from preparing the same: the second waits, and finds it done.

    The system gives the lock back when its process ends, however it ends.
    """
    if store is None:
        yield
        return
    with locked(store):
        yield


def on_device(state: State, device: torch.device) -> State:
    """Return a state whose tensors lie on a device; the step counter stays where it is read."""
    return {name: t if name == "step" else t.to(device) for name, t in state.items()}
