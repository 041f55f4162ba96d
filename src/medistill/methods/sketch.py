"""Sketch: match a sketch of the real set, which is never looked at again."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..backbones import to_spec
from ..errors import UsageError
from ..optim import adam_
from ..records import Json, State, to_record
from ..rng import Rng
from ..sets import Start
from ..sketch import SketchSpec, check_backbone, mean_of, probe
from ..sketch import sketch as sketch_of
from .base import Log, Method, Task, started


@dataclass(frozen=True)
class FromSketch(Method):
    """Match the empirical characteristic function of random features, class by class.

    L = sum_c || z_m(T_c) - mean over x in S_c of [cos(t_j . phi_m(A_m(x))),
    sin(t_j . phi_m(A_m(x)))]_j / sqrt(J) ||^2 for one network m of the sketch in each step, in
    turn; Adam on the images, cosine schedule
    Source: ours, after DM (arXiv 2110.04181) and NCFM (arXiv 2502.20653).
    Departures: not from a paper. Frequencies and networks are fixed, so the real side is a sum
    that was made once; a sketch file carries its own networks, frequencies and scale.
    """

    iterations: int = 800
    lr_images: float = 0.1
    networks: int = 20
    frequencies: int = 128
    scale: float = 1.0
    start: Start = "noise"
    name: ClassVar[str] = "sketch"
    paper: ClassVar[str] = "ours"
    from_sketch: ClassVar[bool] = True

    def steps(self, task: Task) -> int:
        """Return the iterations."""
        return self.iterations

    def check(self, task: Task) -> None:
        """Refuse settings that no sketch can have, or that are not those of the given one."""
        spec = self.spec(task)
        for name in ("networks", "frequencies", "scale"):
            if getattr(self, name) != getattr(spec, name):
                raise UsageError(
                    f"found {name} {getattr(self, name)}; expected {getattr(spec, name)}, as in "
                    "the sketch: leave it out, or make another sketch"
                )
        check_backbone(spec, task.real.card)

    def spec(self, task: Task) -> SketchSpec:
        """Return what the sketch of this task is made of."""
        if task.sketch is not None:
            return task.sketch.spec
        return SketchSpec(
            to_spec(task.backbone),
            to_record(task.augmentation),
            self.networks,
            self.frequencies,
            self.scale,
        )

    def prepared_from(self, task: Task) -> Json:
        """Return the sketch's own settings: all budgets, rates and seeds share one."""
        return {"sketch": to_record(self.spec(task))}

    def prepare(self, task: Task, rng: Rng) -> State:
        """Return the sketch's sums, counts and constants."""
        found = task.sketch or sketch_of(task.real, self.spec(task), task.compute)
        return found.state

    def init(self, task: Task, rng: Rng) -> State:
        """Return the images at their start, and Adam's moments."""
        state = started(task, self.start, rng)
        velocity = state.pop("velocity")
        return {**state, "first": velocity, "second": velocity.clone()}

    def step(self, state: State, task: Task, rng: Rng) -> tuple[State, Log]:
        """Match the next network's part of the sketch."""
        step = int(state["step"])
        spec, held = self.spec(task), task.prepared
        number = step % spec.networks
        card, device = task.real.card, task.real.device
        target = mean_of(held["sums"][:, number], held["counts"]).to(device)
        way = probe(spec, card, number, float(held["spreads"][number]), device)
        images = state["images"].clone().requires_grad_()
        own = way.of(images, task.compute).split(task.ipc)
        means = torch.stack([part.mean(0) for part in own])
        loss = (means - target).square().sum()
        (gradient,) = torch.autograd.grad(loss, images)
        lr = self.lr_images * (1 + math.cos(math.pi * step / self.iterations)) / 2
        return adam_step(state, gradient, lr), {"loss": float(loss.detach())}


def adam_step(state: State, gradient: Tensor, lr: float) -> State:
    """Return the state after one step of Adam on the images, with the step counted."""
    images, first, second = (state[name].clone() for name in ("images", "first", "second"))
    step = state["step"] + 1
    adam_(images, gradient, first, second, step=int(step), lr=lr)
    return {**state, "images": images, "first": first, "second": second, "step": step}
