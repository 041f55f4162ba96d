"""What a method is, and what all of them share: the task, the starts, the update of images."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import __version__
from ..augment import Augmentation
from ..backbones import Backbone, Network, to_spec
from ..budget import Budget
from ..compute import PLAIN, Compute, Mode
from ..engine import Engine, Here
from ..errors import DataError, RunRefused, UsageError
from ..features import read_size
from ..optim import sgd_
from ..pixels import denormalize
from ..records import Json, State, to_record
from ..rng import Rng
from ..sets import LOSSES, Origin, RealSet, Recipe, Start, SyntheticSet, TaskKind
from ..sketch import Sketch

Log = dict[str, float]
HERE: Engine = Here()


@dataclass(frozen=True)
class Task:
    """All that a method may see: the training split, the budget and the backbone.

    Where there is a `sketch`, `real` holds no images, only their card. `prepared` holds what the
    method's own `prepare` returned, `store` the folder in which it may keep files (None: nowhere),
    and `engine` is where it may work side by side. There is no other split here, so a method cannot
    look at test images. Flips are left out where the card says that a mirrored image would have
    another class.
    Raises: RunRefused when a class has fewer images than its share of the budget and is not to be
    taken whole; DataError when a sketch has no image of a class.
    """

    real: RealSet
    budget: Budget
    backbone: Backbone
    augmentation: Augmentation = field(default_factory=Augmentation)
    compute: Compute = PLAIN
    sketch: Sketch | None = None
    prepared: State = field(default_factory=dict)
    store: Path | None = None
    engine: Engine = HERE

    def __post_init__(self) -> None:
        if not self.real.card.flips:
            object.__setattr__(self, "augmentation", self.augmentation.without_flips())
        if self.sketch is not None:
            for name, count in zip(self.real.card.classes, self.sketch.counts, strict=True):
                if not count:
                    raise DataError(
                        f"found no image of class {name!r} in the sketch; expected some of each "
                        "class: merge it with a sketch that has them"
                    )
        _ = self.counts if self.real.card.task != "multi-label" else self.total

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Synthetic images of each class; nothing in a multi-label task."""
        card = self.real.card
        if card.task == "multi-label":
            return ()
        present = [len(members) for members in self.real.by_class]
        return self.budget.counts(card, self.sketch.counts.tolist() if self.sketch else present)

    @cached_property
    def total(self) -> int:
        """Synthetic images in all."""
        return sum(self.counts) or self.budget.total(self.real.card)

    @property
    def ipc(self) -> int:
        """Images per class, the mean over classes rounded."""
        return max(1, round(self.total / self.classes))

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
    own_files: ClassVar[bool] = False  # True where `prepare` keeps files of its own in task.store
    beats_random: ClassVar[bool] = False  # True where `conformance` is to hold it to that
    start: Start

    @property
    def soft_labels(self) -> bool:
        """Whether labels are learned, or a teacher's, and no longer one class each."""
        return False

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

    def prepare_compiled(self, task: Task, mode: Mode) -> bool:
        """Say whether `prepare` is compiled, by a rule that gives the same answer each time.

        What a measurement says may differ between runs, and with it the last bits of what they
        share: so `auto` does not compile here, unless a method knows better.
        """
        return mode == "on"

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
        loss=LOSSES[task.real.card.task],
        intensity=task.real.card.intensity,
    )


def one_hot(task: Task) -> Tensor:
    """Return labels float32 [m, k] of each class's images, class by class."""
    numbers = torch.arange(task.classes).repeat_interleave(torch.tensor(task.counts))
    return F.one_hot(numbers, task.classes).float().to(task.real.device)


def labels_at(real: RealSet, index: Tensor) -> Tensor:
    """Return the labels float32 [m, k] of real images."""
    labels = real.labels[index.to(real.device)]
    return (labels if labels.ndim == 2 else F.one_hot(labels, len(real.card.classes))).float()


def pick(members: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return `count` members at random: without repetition while there are enough of them."""
    if count <= len(members):
        return members[torch.randperm(len(members), generator=generator)[:count]]
    return members[torch.randint(len(members), (count,), generator=generator)]


def choose(real: RealSet, counts: Sequence[int], total: int, generator: torch.Generator) -> Tensor:
    """Return positions of real images at random: `counts` of each class, class by class.

    Multi-label images, `total` of them, are drawn one by one from the class that has been drawn
    least (images of no class count as one more); each image once while there are enough.
    """
    if real.labels.ndim == 1:
        pairs = zip(real.by_class, counts, strict=True)
        return torch.cat([pick(members, count, generator) for members, count in pairs])
    labels = torch.cat([real.labels.cpu(), real.labels.cpu().sum(1, keepdim=True) == 0], 1)
    labels = labels[:, labels.any(0)].double()
    order = torch.randperm(len(labels), generator=generator)
    labels, chosen, seen = labels[order], [], torch.zeros(labels.shape[1], dtype=torch.float64)
    free = torch.ones(len(labels), dtype=torch.bool)
    for _ in range(total):
        if not free.any():
            free[:] = True
        open_ = labels[free].any(0)
        least = int(seen.masked_fill(~open_, torch.inf).argmin())
        place = int((free & (labels[:, least] == 1)).nonzero()[0])
        free[place] = False
        seen += labels[place]
        chosen.append(int(order[place]))
    return torch.tensor(chosen)


def started(task: Task, start: Start, rng: Rng, each: int = 1) -> State:
    """Return images [m each, c, ...] at their start, labels [m, k], velocity and the step counter.

    noise: N(0, 1) on normalized images; real: random real images of the class; class-mean: the
    mean image of the class plus a tenth of its standard deviation per pixel times N(0, 1), so
    that the images of a class differ and can part. In multi-label tasks the labels are those of
    real images, drawn by `choose`, whatever the images start from.
    Raises: UsageError when the start has another name, or images have no class to take a mean of.
    """
    generator = rng.at("start")
    real, counts = task.real, [count * each for count in task.counts]
    several = real.card.task == "multi-label"
    index = choose(real, counts, task.total, generator) if start == "real" or several else None
    if start == "noise":
        shape = (task.total * each, real.card.channels, *real.card.shape)
        images = torch.randn(shape, generator=generator).to(real.device)
    elif start == "real":
        assert index is not None
        images = real.normalized(index)
    elif start == "class-mean" and not several:
        images = _near_means(task, counts, generator)
    else:
        known = "noise or real" if several else "noise, real or class-mean"
        raise UsageError(f"found start {start!r}; expected {known}")
    return {
        "images": images,
        "labels": labels_at(real, index) if several and index is not None else one_hot(task),
        "velocity": torch.zeros_like(images),
        "step": torch.zeros((), dtype=torch.int64),
    }


def check_means(task: Task) -> None:
    """Refuse to start from the mean of a class of one image, which is that image.

    Raises: RunRefused.
    """
    for name, members in zip(task.real.card.classes, task.real.by_class, strict=True):
        if len(members) < 2:
            raise RunRefused(
                f"found 1 training image of class {name!r}; expected 2 or more, because the "
                "mean of one is that image: start from noise or add images"
            )


def _near_means(task: Task, counts: Sequence[int], generator: torch.Generator) -> Tensor:
    """Return so many images near the mean of each class, which is read in pieces."""
    check_means(task)
    parts, shape = [], (task.real.card.channels, *task.real.card.shape)
    for members, count in zip(task.real.by_class, counts, strict=True):
        total = torch.zeros(shape, dtype=torch.float64, device=task.real.device)
        squares = total.clone()
        for piece in members.split(read_size(task.real)):
            images = task.real.normalized(piece).double()
            total += images.sum(0)
            squares += images.square().sum(0)
        mean = total / len(members)
        spread = (squares / len(members) - mean.square()).clamp_min(0).sqrt()
        noise = torch.randn((count, *shape), generator=generator).to(task.real.device)
        parts.append(mean.float() + 0.1 * spread.float() * noise)
    return torch.cat(parts)


def moved(state: State, gradient: Tensor, *, lr: float, momentum: float) -> State:
    """Return the state after one SGD step on the images, with the step counted."""
    images, velocity = state["images"].clone(), state["velocity"].clone()
    sgd_([images], [gradient], [velocity], lr=lr, momentum=momentum)
    return {**state, "images": images, "velocity": velocity, "step": state["step"] + 1}


def selected(task: Task, index: Tensor) -> State:
    """Return the state of a method that chooses real images: it is finished at once."""
    return {
        "images": task.real.normalized(index),
        "labels": labels_at(task.real, index),
        "index": index,
        "step": torch.zeros((), dtype=torch.int64),
    }
