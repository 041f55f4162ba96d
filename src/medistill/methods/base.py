"""What a method is, and what all of them share: the task, the starts, the update of images."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import __version__
from ..augment import Augmentation
from ..backbones import Backbone, Network, to_spec
from ..compute import PLAIN, Compute
from ..errors import DataError, RunRefused, UsageError
from ..optim import sgd_
from ..records import Json, State, to_record
from ..rng import Rng
from ..sets import Budget, Origin, RealSet, Recipe, Start, SyntheticSet, TaskKind, denormalize
from ..sketch import Sketch

Log = dict[str, float]


@dataclass(frozen=True)
class Task:
    """All that a method may see: the training split, the budget and the backbone.

    Where there is a `sketch`, `real` holds no images, only their card. `prepared` holds what the
    method's own `prepare` returned. There is no other split here, so a method cannot look at test
    images. Flips are left out where the card says that a mirrored image would have another class.
    Raises: RunRefused when a class has fewer images than the budget asks for (multi-label images
    have no class of their own to count).
    """

    real: RealSet
    budget: Budget
    backbone: Backbone
    augmentation: Augmentation = field(default_factory=Augmentation)
    compute: Compute = PLAIN
    sketch: Sketch | None = None
    prepared: State = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.real.card.flips:
            object.__setattr__(self, "augmentation", self.augmentation.without_flips())
        if self.real.card.task == "multi-label":
            return
        counts = [len(members) for members in self.real.by_class]
        if self.sketch is not None:
            counts = self.sketch.counts.tolist()
        for name, count in zip(self.real.card.classes, counts, strict=True):
            if self.sketch is not None and not count:
                raise DataError(
                    f"found no image of class {name!r} in the sketch; expected some of each "
                    "class: merge it with a sketch that has them"
                )
            if count < self.ipc:
                raise RunRefused(
                    f"found {count} training images of class {name!r} in "
                    f"{self.real.card.name}; expected at least {self.ipc} (images per class): "
                    "lower --ipc or add images"
                )

    @cached_property
    def ipc(self) -> int:
        """Images per class."""
        return self.budget.per_class(self.real.card)

    def network(self, generator: torch.Generator) -> Network:
        """Return a fresh network of the backbone, where the real images lie."""
        return self.backbone.build(self.real.card, generator).to(self.real.device)

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.real.card.classes)


class Method(ABC):
    """A distillation method: a frozen dataclass whose fields are its hyper-parameters.

    `init` and `step` take and return explicit state, a flat dict of tensors; state["step"] counts
    the steps done, and a step draws from `rng` by that number alone.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    tasks: ClassVar[tuple[TaskKind, ...]] = ("binary", "multi-class", "ordinal")
    from_sketch: ClassVar[bool] = False  # True where a sketch is enough
    start: Start

    @abstractmethod
    def steps(self, task: Task) -> int:
        """Return the number of steps of a whole run."""

    def check(self, task: Task) -> None:  # noqa: B027
        """Refuse, before anything is written, a task that this method cannot do.

        Raises: UsageError when a setting does not fit the task.
        """

    def prepared_from(self, task: Task) -> Json:
        """Return what `prepare` depends on besides data, backbone, augmentation and compute.

        What is prepared is kept under it, so methods that return the same share the product.
        """
        return {"method": self.name, "settings": to_record(self)}

    def prepare(self, task: Task, rng: Rng) -> State:
        """Return what is costly and the same for every budget and seed of synthesis."""
        return {}

    @abstractmethod
    def init(self, task: Task, rng: Rng) -> State:
        """Return the state before the first step: images, labels and all that steps need."""

    @abstractmethod
    def step(self, state: State, task: Task, rng: Rng) -> tuple[State, Log]:
        """Return the state after one more step, and numbers for the log (with `loss`)."""

    def finish(self, state: State, task: Task, rng: Rng) -> SyntheticSet:
        """Return the synthetic set of a state, in the data's intensities."""
        card = task.real.card
        origin = Origin(
            method=self.name,
            settings=to_record(self),
            seed=rng.seed,
            start=self.start,
            real_pixels=self.start == "real" or "index" in state,
            data_digest=card.digest,
            version=__version__,
        )
        images = denormalize(state["images"].cpu(), card.mean, card.std)
        return SyntheticSet(images, state["labels"].cpu(), recipe_of(task), origin, card)

    def as_in_paper(self, task: Task) -> "Method":
        """Return the method with every field as its paper sets it for this budget."""
        return self


def recipe_of(task: Task, augmentation: Augmentation | None = None) -> Recipe:
    """Return the default recipe for a task's data, backbone and augmentation (or another one)."""
    return Recipe(
        mean=task.real.card.mean,
        std=task.real.card.std,
        backbone=to_spec(task.backbone),
        augmentation=to_record(augmentation or task.augmentation),
    )


def one_hot(task: Task) -> Tensor:
    """Return labels float32 [m, k] of `ipc` images for each class, class by class."""
    numbers = torch.arange(task.classes).repeat_interleave(task.ipc)
    return F.one_hot(numbers, task.classes).float().to(task.real.device)


def pick(members: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return `count` members at random: without repetition while there are enough of them."""
    if count <= len(members):
        return members[torch.randperm(len(members), generator=generator)[:count]]
    return members[torch.randint(len(members), (count,), generator=generator)]


def started(task: Task, start: Start, rng: Rng, each: int = 1) -> State:
    """Return images [m each, c, ...] at their start, labels [m, k], velocity and the step counter.

    noise: N(0, 1) on normalized images; real: random real images of the class; class-mean: the
    mean image of the class plus a tenth of its standard deviation per pixel times N(0, 1), so
    that the images of a class differ and can part.
    Raises: UsageError when the start has another name.
    """
    generator = rng.at("start")
    count = task.ipc * each
    shape = (task.classes * count, task.real.card.channels, *task.real.card.shape)
    if start == "noise":
        images = torch.randn(shape, generator=generator).to(task.real.device)
    elif start == "real":
        index = [pick(members, count, generator) for members in task.real.by_class]
        images = task.real.normalized(torch.cat(index))
    elif start == "class-mean":
        parts = []
        for name, members in zip(task.real.card.classes, task.real.by_class, strict=True):
            if len(members) < 2:
                raise RunRefused(
                    f"found 1 training image of class {name!r}; expected 2 or more, because the "
                    "mean of one is that image: start from noise or add images"
                )
            spread, mean = torch.var_mean(task.real.normalized(members), 0, correction=0)
            noise = torch.randn((count, *mean.shape), generator=generator)
            parts.append(mean + 0.1 * spread.sqrt() * noise.to(task.real.device))
        images = torch.cat(parts)
    else:
        raise UsageError(f"found start {start!r}; expected noise, real or class-mean")
    return {
        "images": images,
        "labels": one_hot(task),
        "velocity": torch.zeros_like(images),
        "step": torch.zeros((), dtype=torch.int64),
    }


def moved(state: State, gradient: Tensor, *, lr: float, momentum: float) -> State:
    """Return the state after one SGD step on the images, with the step counted."""
    images, velocity = state["images"].clone(), state["velocity"].clone()
    sgd_([images], [gradient], [velocity], lr=lr, momentum=momentum)
    return {**state, "images": images, "velocity": velocity, "step": state["step"] + 1}


def selected(task: Task, index: Tensor) -> State:
    """Return the state of a method that chooses real images: it is finished at once."""
    return {
        "images": task.real.normalized(index),
        "labels": one_hot(task),
        "index": index,
        "step": torch.zeros((), dtype=torch.int64),
    }
