"""Sketch: match a sketch of the real set, which is never looked at again."""

import math
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..backbones import to_spec
from ..cosine import images_of, series, weights
from ..errors import RunRefused, UsageError
from ..moments import FEWEST, images_like
from ..optim import adam_
from ..pixels import mosaic_of, tiles_of
from ..probes import Probe, SketchSpec, check_backbone, probe
from ..records import Json, State, to_record
from ..rng import Rng
from ..sets import Start, SyntheticSet
from ..sketch import SETTINGS, mean_of
from ..sketch import sketch as sketch_of
from .base import Log, Method, Task, started

NOISE = 0.2  # of the start, in standard deviations of the data


class Sketched(Method):
    """What methods share that need no more of the real set than a sketch."""

    from_sketch: ClassVar[bool] = True

    @abstractmethod
    def spec(self, task: Task) -> SketchSpec:
        """Return what the sketch of this task is made of."""

    def check(self, task: Task) -> None:
        """Refuse settings that are not those of the given sketch."""
        spec = self.spec(task)
        for name in SETTINGS:
            own = getattr(self, name, getattr(spec, name))  # a method need not have them all
            if own != getattr(spec, name):
                raise UsageError(
                    f"found {name} {own}; expected {getattr(spec, name)}, as in the sketch: leave "
                    "it out, or make another sketch"
                )

    def prepared_from(self, task: Task) -> Json:
        """Return the sketch's own settings: all budgets, rates and seeds share one."""
        return {"sketch": to_record(self.spec(task))}

    def prepare(self, task: Task, rng: Rng) -> State:
        """Return the sketch's sums, counts and constants."""
        found = task.sketch or sketch_of(task.real, self.spec(task), task.compute)
        return found.state


@dataclass(frozen=True)
class FromSketch(Sketched):
    """Match the empirical characteristic function of random features, class by class.

    L = sum_c || z_m(T_c) - mean over x in S_c of [cos(t_j . phi_ml(A_m(x))),
    sin(t_j . phi_ml(A_m(x)))]_jl / sqrt(J L) ||^2 for one network m of the sketch in each step, in
    turn, over all L stages of the network
    Images are cosine series a_u w_u with w_u falling like (1 + |u|)^-smooth, and Adam with a
    cosine schedule moves the a_u: smooth parts move first, and noise that no network sees stays
    small. Each stored image is factor x factor tiles that are made whole images before a network
    sees them.
    Source: ours, after DM (arXiv 2110.04181), NCFM (arXiv 2502.20653) and the multi-formation of
    IDC (arXiv 2205.14959).
    Departures: not from a paper. Frequencies and networks are fixed, so the real side is a sum
    that was made once; a sketch file carries its own networks, frequencies, scale and layers.
    Noise is smooth in the same way, and a fifth of the data's standard deviation. With `moments` a
    start from class means draws images of the Gaussian that has each class's mean and covariance at
    its lowest cosine frequencies (`images_like`): both are sums in the sketch. Each network has
    one draw of the augmentation, which both sides see, in place of an expectation over draws.
    """

    iterations: int = 600
    lr_images: float = 0.1
    networks: int = 20
    frequencies: int = 512
    scale: float = 0.5
    layers: Literal["all", "last"] = "all"
    moments: int = 0
    smooth: float = 1.5
    factor: int = 2
    start: Start = "noise"
    name: ClassVar[str] = "sketch"
    paper: ClassVar[str] = "ours"
    beats_random: ClassVar[bool] = True

    def steps(self, task: Task) -> int:
        """Return the iterations."""
        return self.iterations

    def check(self, task: Task) -> None:
        """Refuse settings that no sketch can have, or that are not those of the given one."""
        shape = task.real.card.shape
        if not 1 <= self.factor <= min(shape) // 4:
            raise UsageError(
                f"found factor {self.factor} for images of {'x'.join(map(str, shape))}; expected "
                "1 or more, and tiles of 4 pixels or more along each axis"
            )
        super().check(task)
        check_backbone(self.spec(task), task.real.card)

    def spec(self, task: Task) -> SketchSpec:
        """Return what the sketch of this task is made of."""
        if task.sketch is not None:
            return task.sketch.spec
        own = {name: getattr(self, name) for name in SETTINGS}
        return SketchSpec(to_spec(task.backbone), to_record(task.augmentation), **own)

    def init(self, task: Task, rng: Rng) -> State:
        """Return the images at their start, and Adam's moments."""
        if self.start == "noise":
            state = started(task, self.start, rng)
            images = NOISE * self._smoothed(series(state["images"]))
        elif self.start == "class-mean" and self.moments:
            state = started(task, "noise", rng)
            images = mosaic_of(self._drawn(task, rng), self.factor)
        else:
            state = started(task, self.start, rng, self.factor ** len(task.real.card.shape))
            images = mosaic_of(state["images"], self.factor)
        del state["velocity"]
        zeros = torch.zeros_like(images)
        return {**state, "images": images, "first": zeros, "second": zeros.clone()}

    def step(self, state: State, task: Task, rng: Rng) -> tuple[State, Log]:
        """Match the next network's part of the sketch."""
        step, held = int(state["step"]), task.prepared
        number = step % len(held["spreads"])
        target = mean_of(held["sums"][:, number], held["counts"]).to(task.real.device)
        way = self.way(task, number)
        images = state["images"].clone().requires_grad_()
        own = way.of(tiles_of(images, self.factor), task.compute)
        each = self.factor ** len(task.real.card.shape)
        parts = own.split([count * each for count in task.counts])
        means = torch.stack([part.mean(0) for part in parts])
        loss = (means - target).square().sum()
        (gradient,) = torch.autograd.grad(loss, images)
        return self._moved(state, gradient, self.rate(step)), {"loss": float(loss.detach())}

    def way(self, task: Task, number: int) -> Probe:
        """Return a network of the sketch with its draw and frequencies."""
        spreads = task.prepared["spreads"][number]
        return probe(self.spec(task), task.real.card, number, spreads, task.real.device)

    def rate(self, step: int) -> float:
        """Return Adam's rate, which falls along half a cosine."""
        return self.lr_images * (1 + math.cos(math.pi * step / self.iterations)) / 2

    def finish(self, state: State, task: Task, rng: Rng) -> SyntheticSet:
        """Return the set; its recipe says how many tiles an image holds."""
        made = super().finish(state, task, rng)
        return replace(made, recipe=replace(made.recipe, factor=self.factor))

    def _drawn(self, task: Task, rng: Rng) -> Tensor:
        """Return images for each tile, drawn from the moments of its class."""
        held, card = task.prepared, task.real.card
        counts = held["counts"].tolist()
        if min(counts) < FEWEST:
            name = card.classes[counts.index(min(counts))]
            raise RunRefused(
                f"found {min(counts)} images of class {name!r}; expected {FEWEST} or more, for "
                "what is drawn from the moments of a few comes near one of them: start from noise"
            )
        each, generator = self.factor ** len(card.shape), rng.at("start", "moments")
        parts = [
            images_like(moments, known, count * each, card, generator)
            for moments, known, count in zip(held["moments"], counts, task.counts, strict=True)
        ]
        return torch.cat(parts).to(task.real.device)

    def _moved(self, state: State, gradient: Tensor, lr: float) -> State:
        """Return the state after one step of Adam on the weighted series of the images."""
        first, second = state["first"].clone(), state["second"].clone()
        step = state["step"] + 1
        delta = torch.zeros_like(gradient)
        slope = self._weights(gradient) * series(gradient)
        adam_(delta, slope, first, second, step=int(step), lr=lr)
        images = state["images"] + self._smoothed(delta)
        return {**state, "images": images, "first": first, "second": second, "step": step}

    def _weights(self, images: Tensor) -> Tensor:
        return weights(tuple(images.shape[2:]), self.smooth, images)

    def _smoothed(self, coefficients: Tensor) -> Tensor:
        """Return the images of weighted coefficients."""
        return images_of(self._weights(coefficients) * coefficients)
