"""DM: match the mean features of each class under random networks."""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar, get_args

import torch
from torch import Tensor

from ..augment import Augmentation, Draw
from ..backbones import Backbone, Network
from ..errors import UsageError
from ..features import class_means as set_means
from ..features import extract, extract_fast, fixed
from ..progress import progress
from ..records import Json, State
from ..rng import Rng
from ..sets import Card, Start, TaskKind
from .base import Log, Method, Task, moved, pick, started

KEPT = 64  # networks of a bank that stay in memory between steps


@dataclass(frozen=True)
class DM(Method):
    """Distribution matching.

    L = sum_c || mean phi(A_w(T_c)) - mean phi(A_w(S_c)) ||^2, phi a fresh untrained network and w
    a fresh draw for each class in each step (equation 5)
    Source: Zhao and Bilen, WACV 2023, arXiv 2110.04181.
    Departures: images start from noise unless told otherwise (paper: real images); the rate stays
    at 1 from 100 images per class on (paper: 10); all classes pass the network in one call. In
    multi-label tasks, which the paper has not, c runs over the labels, T_c and S_c are the images
    that have it, and one draw serves all. `bank` networks, each with one draw for all classes,
    take the place of fresh ones: the means of the whole real set under them are computed once, and
    a step costs the synthetic images alone. With several `draws` these means are averaged over so
    many, and the synthetic side has a fresh one in each step (bank 0: fresh networks and 256 real
    images, as in the paper).
    """

    iterations: int = 20_000
    lr_images: float = 1.0
    momentum: float = 0.5
    batch_real: int = 256
    bank: int = 0
    draws: int = 1
    start: Start = "noise"
    name: ClassVar[str] = "dm"
    paper: ClassVar[str] = "arXiv 2110.04181"
    beats_random: ClassVar[bool] = True
    tasks: ClassVar[tuple[TaskKind, ...]] = get_args(TaskKind)

    def steps(self, task: Task) -> int:
        """Return the iterations."""
        return self.iterations

    def as_in_paper(self, task: Task) -> "DM":
        """Start from real images, under fresh networks; the rate is 10 from 100 per class on."""
        rate = 10.0 if task.ipc >= 100 else 1.0
        return replace(self, start="real", lr_images=rate, bank=0)

    def check(self, task: Task) -> None:
        """Refuse a bank of networks that mix the images of a batch, and draws without a bank."""
        if self.draws < 1 or (self.draws > 1 and not self.bank):
            raise UsageError(f"found draws {self.draws}; expected 1 or more, above 1 with a bank")
        if self.bank and task.network(Rng(0).at("check")).mixes_images:
            raise UsageError(
                f"found {task.backbone.name}, whose features of an image depend on its batch; "
                "expected another norm for a bank: use instance norm, or --bank 0"
            )

    def prepared_from(self, task: Task) -> Json:
        """Return the size of the bank: all budgets, rates and seeds share one."""
        return {"feature bank": self.bank} | ({"draws": self.draws} if self.draws > 1 else {})

    def prepare(self, task: Task, rng: Rng) -> State:
        """Return the class means [bank, k, d] of the whole real set, one network after another."""
        if not self.bank:
            return {}
        means = []
        with progress("feature bank", self.bank) as advance:
            for number in range(self.bank):
                network, draw = bank_entry(task, number)
                at = _bank(number)
                more = [
                    task.augmentation.draw(1, task.real.card.shape, at.at("augment", d))
                    for d in range(1, self.draws)
                ]
                found = [
                    set_means(network, task.real, task.augmentation, one, task.compute)
                    for one in (draw, *more)
                ]
                means.append(torch.stack(found).mean(0))
                advance()
        return {"means": torch.stack(means)}

    def init(self, task: Task, rng: Rng) -> State:
        """Return the images at their start."""
        return started(task, self.start, rng)

    def step(self, state: State, task: Task, rng: Rng) -> tuple[State, Log]:
        """Match the class means under one network: a fresh one, or the next of the bank."""
        step = int(state["step"])
        if self.bank:
            number = step % self.bank
            network, draw = bank_entry(task, number)
            means = task.prepared["means"][number]
            if self.draws > 1:
                at, shape = rng.child("step", step), task.real.card.shape
                draw = task.augmentation.draw(1, shape, at.at("augment"))
            draws = [draw] * task.classes
        else:
            at = rng.child("step", step)
            network = fixed(task.network(at.at("network")))
            shape = task.real.card.shape
            # An image with several labels is seen once, so all of them share its draw.
            names = range(task.classes) if task.counts else [0] * task.classes
            draws = [task.augmentation.draw(1, shape, at.at("augment", c)) for c in names]
            means = real_means(network, task, draws, self.batch_real, at)
        images = state["images"].clone().requires_grad_()
        loss = gap(class_means(network, images, state["labels"], task, draws), means)
        (gradient,) = torch.autograd.grad(loss, images)
        state = moved(state, gradient, lr=self.lr_images, momentum=self.momentum)
        return state, {"loss": float(loss.detach())}


def bank_entry(task: Task, number: int) -> tuple[Network, Draw]:
    """Return a network of the bank and its draw; they depend on the number alone."""
    return _entry(task.backbone, task.real.card, task.augmentation, task.real.device, number)


def _bank(number: int) -> Rng:
    return Rng(0).child("bank", number)


@lru_cache(maxsize=KEPT)
def _entry(
    backbone: Backbone, card: Card, augmentation: Augmentation, device: torch.device, number: int
) -> tuple[Network, Draw]:
    at = _bank(number)
    draw = augmentation.draw(1, card.shape, at.at("augment"))
    return fixed(backbone.build(card, at.at("network")).to(device)), draw


def gap(synthetic: Tensor, real: Tensor) -> Tensor:
    """Return the sum over classes of squared distances of means [k, d]."""
    return (synthetic - real).square().sum()


@torch.no_grad()
def real_means(network: Network, task: Task, draws: list[Draw], batch: int, rng: Rng) -> Tensor:
    """Return the mean features [k, d] of a fresh batch of real images of each class."""
    batches = []
    for c, members in enumerate(task.real.by_class):
        index = pick(members, min(batch, len(members)), rng.at("real", c))
        batches.append(task.augmentation.apply(task.real.normalized(index), draws[c]))
    features = extract_fast(network, torch.cat(batches), task.compute)
    parts = features.split([len(b) for b in batches])
    return torch.stack([part.mean(0) for part in parts])


def class_means(
    network: Network, images: Tensor, labels: Tensor, task: Task, draws: list[Draw]
) -> Tensor:
    """Return the mean features [k, d] of the synthetic images of each class.

    A label that no image has gets a mean of 0 and no gradient.
    """
    if not task.counts:
        features = extract(network, task.augmentation.apply(images, draws[0]), task.compute)
        return labels.T @ features / labels.sum(0).clamp_min(1).unsqueeze(1)
    parts = [
        task.augmentation.apply(part, draw)
        for part, draw in zip(images.split(task.counts), draws, strict=True)
    ]
    features = extract(network, torch.cat(parts), task.compute)
    return torch.stack([part.mean(0) for part in features.split(task.counts)])
