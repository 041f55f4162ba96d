"""The types that flow: real sets and their splits, recipes and synthetic sets."""

import dataclasses
import hashlib
import math
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .errors import DataError, RunRefused, UsageError
from .pixels import Whitening, normalize, tiles_of
from .records import Json, canonical, from_record, load_state, save_state, state_digest, to_record

FULL = {torch.uint8: 255, torch.uint16: 65535}  # what is stored for intensity 1
GIVEN = "given, not from the data"  # a normalization
BLOCK = 1024  # images read at once where a whole set is, or fewer:
BLOCK_PIXELS = 2**24
TaskKind = Literal["binary", "multi-class", "ordinal", "multi-label"]
Start = Literal["noise", "real", "class-mean"]
Loss = Literal["cross-entropy", "ordinal", "binary-cross-entropy"]
LOSSES: dict[TaskKind, Loss] = {
    "binary": "cross-entropy",
    "multi-class": "cross-entropy",
    "ordinal": "ordinal",
    "multi-label": "binary-cross-entropy",
}


@dataclass(frozen=True)
class Card:
    """What is known of a dataset: the facts that travel with everything made from it.

    mean and std are per channel, on intensities in [0, 1]; `normalization` says where they come
    from. `flips` is False where a mirrored image changes its class (left and right organs).
    `intensity` is the rule by which stored values became intensities: all sites must follow it.
    `patients` is True where the source names the patient of every image, and groups number them.
    """

    name: str
    task: TaskKind
    classes: tuple[str, ...]
    channels: int
    shape: tuple[int, ...]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    normalization: str = ""
    modality: str = ""
    license: str = "unknown"
    citation: str = ""
    url: str = ""
    flips: bool = True
    intensity: str = ""
    digest: str = ""
    patients: bool = False


@dataclass(frozen=True, eq=False)
class RealSet:
    """One split of a real dataset, as stored.

    Shapes: images uint8 or uint16 [n, c, h, w] or [n, c, d, h, w], 0 to 255 or 65535 for
    intensities 0 to 1; labels int64 [n], or {0, 1} [n, k] for multi-label tasks; groups int64 [n]
    of patients (or identical images), or None; facts: what else is known of each image, as numbers
    [n], by name. `file` is the map of a file that the images lie in, if they do: its pages are
    given back after each read, so that a set larger than the memory never fills it. `whitening` is
    what normalized images pass through as well. `depends` says by what one image may decide which
    others stand here or how they look; empty where none may.
    Raises: DataError when shapes, types or labels do not fit the card.
    """

    images: Tensor
    labels: Tensor
    card: Card
    groups: Tensor | None = None
    facts: dict[str, Tensor] = field(default_factory=dict)
    file: mmap.mmap | None = None
    whitening: Whitening | None = None
    depends: str = ""

    def __post_init__(self) -> None:
        shape = (self.card.channels, *self.card.shape)
        if self.images.dtype not in FULL or tuple(self.images.shape[1:]) != shape:
            raise DataError(
                f"{self.card.name}: found images {self.images.dtype} {tuple(self.images.shape)}; "
                f"expected uint8 or uint16 of shape (n, {', '.join(map(str, shape))})"
            )
        if len(self.labels) != len(self.images):
            raise DataError(
                f"{self.card.name}: found {len(self.images)} images and {len(self.labels)} labels; "
                "expected as many of each"
            )
        top = 2 if self.card.task == "multi-label" else len(self.card.classes)
        if len(self.labels) and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < top:
            raise DataError(
                f"{self.card.name}: found labels from {int(self.labels.min())} to "
                f"{int(self.labels.max())}; expected 0 to {top - 1} for its "
                f"{len(self.card.classes)} classes"
            )

    def __len__(self) -> int:
        return len(self.images)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the map of a file behind: where the set arrives its images are a copy."""
        return {**self.__dict__, "file": None}

    @property
    def device(self) -> torch.device:
        """Where the images lie, and where all that is computed from them is computed."""
        return self.images.device

    def to(self, device: torch.device) -> "RealSet":
        """Return the set with its images (still as stored) and labels on a device.

        Raises: RunRefused when the device has no room for them.
        """
        try:
            return copied(self, images=self.images.to(device), labels=self.labels.to(device))
        except torch.OutOfMemoryError:
            raise RunRefused(
                f"found {self.images.nbytes / 2**30:.1f} GiB of images in {self.card.name}; "
                f"expected room for them on {device}: use --device cpu, or fewer images"
            ) from None

    @cached_property
    def by_class(self) -> list[Tensor]:
        """Positions of each class's images, in order, int64, in the machine's own memory.

        In multi-label tasks an image stands with each of its classes.
        """
        labels = self.labels.cpu()
        count = len(self.card.classes)
        has = labels.T == 1 if labels.ndim == 2 else labels == torch.arange(count).view(-1, 1)
        return [row.nonzero().flatten() for row in has]

    @property
    def full(self) -> int:
        """The stored number that stands for intensity 1: 255, or 65535 for 16 bits."""
        return FULL[self.images.dtype]

    @cached_property
    def digest(self) -> str:
        """SHA-256 over shapes, pixels and labels."""
        total = hashlib.sha256(canonical([list(self.images.shape), list(self.labels.shape)]))
        for block in self.blocks():
            total.update(block.cpu().contiguous().numpy().data)
        total.update(self.labels.cpu().contiguous().numpy().data)
        return total.hexdigest()

    def normalized(self, index: Tensor) -> Tensor:
        """Draw images as float32, (x / full - mean) / std per channel."""
        # Contiguous, for sets read in other ways have other strides, and so other last bits.
        images = self.images[index.to(self.device)].contiguous().float().div_(self.full)
        self._give_back()
        images = normalize(images, self.card.mean, self.card.std)
        return images if self.whitening is None else self.whitening.apply(images)

    def whitened(self, whitening: Whitening | None) -> "RealSet":
        """Return the set with its normalized images whitened."""
        return self if whitening is self.whitening else copied(self, whitening=whitening)

    def take(self, index: Tensor) -> "RealSet":
        """Return the set of the images at `index`, copied into memory as they are stored."""
        where = index.to(self.device)
        groups = None if self.groups is None else self.groups[index]
        facts = {name: values[index] for name, values in self.facts.items()}
        part = RealSet(self.images[where], self.labels[where], self.card, groups, facts)
        self._give_back()
        return copied(part, whitening=self.whitening, depends=self.depends)

    def blocks(self) -> Iterator[Tensor]:
        """Yield the images as stored, in order and in blocks; each is gone when the next comes."""
        size = max(1, min(BLOCK, BLOCK_PIXELS // max(1, self.images[:1].numel())))
        for block in self.images.split(size):
            yield block
            self._give_back()

    def _give_back(self) -> None:
        if self.file is not None and self.device.type == "cpu":
            self.file.madvise(mmap.MADV_DONTNEED)


def copied(real: RealSet, **fields: Any) -> RealSet:
    """Return a set with other fields, where what was checked and counted once stays so."""
    other = object.__new__(RealSet)
    other.__dict__.update(real.__dict__, **fields)
    return other


class Splits(NamedTuple):
    """The three splits of a dataset; no patient and no identical image stands in two of them."""

    train: RealSet
    val: RealSet
    test: RealSet

    def to(self, device: torch.device) -> "Splits":
        """Return the splits on a device."""
        return Splits(*(part.to(device) for part in self))

    def whitened(self, whitening: Whitening | None) -> "Splits":
        """Return the splits with their normalized images whitened."""
        if whitening is not None:
            device = self.train.device
            whitening = Whitening(*(tensor.to(device) for tensor in whitening))
        return Splits(*(part.whitened(whitening) for part in self))


@dataclass(frozen=True)
class Recipe:
    """All that a receiver needs to train on a set: normalization, optimizer, length, backbone.

    Training makes `stop` steps of a schedule of `steps` steps (the rate falls tenfold at its
    half); a step takes `batch` images. `backbone` and `augmentation` are records of their specs.
    `loss` fits the task: cross-entropy, that with labels softened by distance for ordered classes,
    or a binary one for each class. `intensity` is the card's rule for intensities.
    With `factor` f above 1 each stored image is f x f tiles that `tiles_of` makes whole images of.
    `whitening` is the digest of the map that normalized images pass through, if they do: the set
    has its tensors.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    backbone: dict[str, object]
    augmentation: dict[str, object]
    optimizer: Literal["sgd"] = "sgd"
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    steps: int = 1000
    stop: int = 1000
    batch: int = 256
    loss: Loss = "cross-entropy"
    factor: int = 1
    intensity: str = ""
    whitening: str = ""


@dataclass(frozen=True)
class Origin:
    """Where a synthetic set comes from: method, settings, seed, data, and from what it started.

    `real_pixels` is True where any image is, or started from, a real image.
    """

    method: str
    settings: dict[str, object]
    seed: int
    start: Start
    real_pixels: bool
    data_digest: str
    version: str


@dataclass(frozen=True, eq=False)
class SyntheticSet:
    """A distilled set: intensities as the data's [0, 1] (not clamped), labels of every class.

    Shapes: images float32 [m, c, h, w] or [m, c, d, h, w], before normalization by recipe.mean
    and recipe.std; labels float32 [m, k], one-hot or soft, rows sum to 1 (in multi-label tasks
    each number is that of its own class, 0 to 1). Where the recipe names a `whitening`, it stands
    here; the images are stored as they look, not whitened.
    """

    images: Tensor
    labels: Tensor
    recipe: Recipe
    origin: Origin
    card: Card
    whitening: Whitening | None = None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def digest(self) -> str:
        """The SHA-256 of images and labels, by which scores and audits say what they are of."""
        return state_digest({"images": self.images, "labels": self.labels})

    def normalized(self) -> Tensor:
        """Return the stored images, normalized and whitened where the recipe says so."""
        images = normalize(self.images.clone(), self.recipe.mean, self.recipe.std)
        return images if self.whitening is None else self.whitening.apply(images)

    def to_train(self) -> tuple[Tensor, Tensor]:
        """Return the images that a network is trained on, all tiles made whole, and their labels.

        Raises: DataError when the images cannot be cut into as many tiles as the recipe says.
        """
        factor = self.recipe.factor
        if not 1 <= factor <= min(self.images.shape[2:]):
            raise DataError(
                f"found factor {factor} in a recipe for images of "
                f"{'x'.join(map(str, self.images.shape[2:]))}; expected 1 or more, and no more "
                "tiles than pixels along an axis"
            )
        each = factor ** (self.images.ndim - 2)
        return tiles_of(self.normalized(), factor), self.labels.repeat_interleave(each, 0)

    def save(self, path: Path) -> None:
        """Write the set as safetensors with one JSON header."""
        header: Json = {"format": "medistill synthetic 1"}
        header |= {name: to_record(getattr(self, name)) for name in ("recipe", "origin", "card")}
        state = {"images": self.images, "labels": self.labels}
        if self.whitening is not None:
            state |= self.whitening.state()
        save_state(path, state, header)

    @staticmethod
    def load(path: Path) -> "SyntheticSet":
        """Read a set that `save` wrote.

        Raises: DataError when the file is missing, damaged or holds something else.
        """
        state, header = load_state(path)
        if header.get("format") != "medistill synthetic 1" or {"images", "labels"} - set(state):
            raise DataError(f"{path} holds no synthetic set; expected one written by distill")
        try:
            recipe = from_record(Recipe, header["recipe"])
            origin = from_record(Origin, header["origin"])
            card = from_record(Card, header["card"])
            normalized_by(card, recipe.mean, recipe.std)
        except (KeyError, TypeError, UsageError) as error:
            raise DataError(f"{path} is no whole set ({error}); expected one") from None
        whitening = Whitening.of_state(state) if recipe.whitening else None
        if recipe.whitening and (
            whitening is None or state_digest(whitening.state()) != recipe.whitening
        ):
            raise DataError(f"{path} lacks the whitening that its recipe names; expected both")
        found = SyntheticSet(state["images"], state["labels"], recipe, origin, card, whitening)
        found._check(path)
        return found

    def _check(self, path: Path) -> None:
        """Refuse images and labels that no method makes."""
        count, card = len(self.images), self.card
        looks, classes = (count, card.channels, *card.shape), (count, len(card.classes))
        for name, shape in (("images", looks), ("labels", classes)):
            one: Tensor = getattr(self, name)
            if not one.is_floating_point() or tuple(one.shape) != shape or not count:
                raise DataError(
                    f"{path}: found {name} {one.dtype} {tuple(one.shape)}; expected floats of "
                    f"shape {shape}, and some"
                )
        most = self.images.abs().max()  # nan if any is
        if not bool(most.isfinite()) or not 0 <= self.labels.min() <= self.labels.max() <= 1:
            raise DataError(f"{path}: found images or labels that are no numbers, or beyond 0 to 1")


def normalized_by(card: Card, mean: Sequence[float], std: Sequence[float]) -> Card:
    """Return a card with a normalization that was given, not taken from the data.

    Raises: UsageError when there is not one number per channel, or a std is not above 0.
    """
    finite = all(map(math.isfinite, (*mean, *std)))
    if {len(mean), len(std)} != {card.channels} or not finite or min(std) <= 0:
        raise UsageError(
            f"found mean {list(mean)} and std {list(std)} for {card.name}; expected "
            f"{card.channels} number(s) each, and a std above 0"
        )
    return dataclasses.replace(card, mean=tuple(mean), std=tuple(std), normalization=GIVEN)


def with_statistics(splits: Splits) -> Splits:
    """Fill every card with the digest of the data and the mean and std of the training split.

    One pass over uint8 in blocks, float64 sums. A channel without contrast gets std 1.
    """
    train = splits.train
    axes = (0, *range(2, train.images.ndim))
    total = torch.zeros(train.card.channels, dtype=torch.float64)
    squares = total.clone()
    for block in train.blocks():
        values = block.double().div_(train.full)
        total += values.sum(axes)
        squares += values.square_().sum(axes)
    count = train.images.numel() // train.card.channels
    mean = total / count
    std = (squares / count - mean**2).clamp_min(0).sqrt()
    std[std < 1e-6] = 1.0
    whole = hashlib.sha256("".join(part.digest for part in splits).encode()).hexdigest()
    card = dataclasses.replace(
        train.card,
        mean=tuple(mean.tolist()),
        std=tuple(std.tolist()),
        normalization="training split",
        digest=whole,
    )
    return Splits(*(dataclasses.replace(part, card=card) for part in splits))
