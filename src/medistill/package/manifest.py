"""What a package says of itself: all that a receiver needs to train on it, and to judge it."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..augment import Augmentation
from ..backbones import Monai, from_spec
from ..errors import MedistillError, PackageRefused
from ..metrics import Score
from ..pixels import Whitening
from ..records import Json, from_record, state_digest
from ..sets import Card, Recipe, SyntheticSet
from .archive import later
from .strict import Held, texts_of

Array = NDArray[Any]
NUMPY = {"U8": np.uint8, "F16": np.float16, "F32": np.float32, "I64": np.int64}
IMAGES, LABELS = "images", "labels"
WHITENING = tuple(f"whitening.{name}" for name in Whitening._fields)
MOST_TEXT = 2000
MOST_INTENSITY = 1e4
LEAST_STD, MOST_STD = 1e-4, 1e4
MOST_LABELS = 1 << 26  # weights of all classes for all images
MOST_END = 1e9  # of an interval: few trainings and a small gap make it wide
MOST_SHOWN = 1 << 28  # numbers of all whole images that a set's tiles make
READ = 256  # images that are opened at once
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
MOST_CLASSES, MOST_PARAMETERS = 10_000, 1 << 28
MOST_CHANNELS, MOST_SIDE, MOST_WIDTH, MOST_DEPTH = 64, 4096, 8192, 16
MOST_FACTOR = 8  # tiles along a side: a small file must not become a gigabyte
LAYERS = ("depth", "hidden")  # of a backbone's numbers those that count layers
Stored = Literal["U8", "F16"]
Flag = Literal["real-pixels", "no-audit", "leaks", "small-class", "no-scores"]


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor of `data.safetensors` is, and between what its numbers lie."""

    dtype: Literal["U8", "F16", "F32", "I64"]
    shape: tuple[int, ...]
    low: float
    high: float


@dataclass(frozen=True)
class Made:
    """How a set was made: the origin of its `SyntheticSet`, without a digest of the data."""

    method: str
    settings: dict[str, object]
    seed: int
    start: Literal["noise", "real", "class-mean"]
    real_pixels: bool
    version: str


@dataclass(frozen=True)
class Manifest:
    """The manifest of a package.

    `scale` and `offset`, per channel, turn stored numbers s into intensities offset + scale s.
    `counter` grows with each version of a name, and `supersedes` is the SHA-256 of the archive
    before it. `expires` is the last day (YYYY-MM-DD), or empty. `declared` is the accuracy that the
    sender measured on `declared_on` by the recipe, with its interval. `allowed` names what `pack`
    refuses unless it is told not to. `least_patients` is the number below which no class is.
    """

    name: str
    counter: int
    card: Card
    recipe: Recipe
    made: Made
    tensors: dict[str, TensorSpec]
    scale: tuple[float, ...]
    offset: tuple[float, ...]
    per_class: tuple[int, ...]
    least_patients: int
    site: str = ""
    contact: str = ""
    license: str = "unknown"
    recipients: tuple[str, ...] = ()
    purpose: str = ""
    expires: str = ""
    supersedes: str = ""
    declared: dict[str, float | int | None] | None = None
    declared_on: str = ""
    allowed: tuple[Flag, ...] = ()
    format: Literal["medistill package 1"] = "medistill package 1"


def manifest_of(record: Json) -> Manifest:
    """Return a manifest from its record, checked for sense as far as it can be without the data.

    Raises: PackageRefused.
    """
    if later(record.get("format")):
        raise PackageRefused("found a package by a later medistill; expected one of ours: upgrade")
    try:
        found = from_record(Manifest, record)
        if found.expires:
            date.fromisoformat(found.expires)
    except (MedistillError, ValueError, TypeError) as error:
        raise PackageRefused(f"found a manifest that cannot be used ({_short(error)})") from None
    card, recipe, channels = found.card, found.recipe, found.card.channels
    numbers = [n for n in recipe.backbone.values() if isinstance(n, int)]
    shaped = (
        0 < channels <= MOST_CHANNELS
        and 1 < len(card.shape) < 4
        and all(0 < side <= MOST_SIDE for side in card.shape)
    )
    # Products of what is bounded alone: those of long shapes take seconds.
    cut = shaped and 1 <= recipe.factor <= min(MOST_FACTOR, *card.shape)
    tiles, pixels = (recipe.factor ** len(card.shape), math.prod(card.shape)) if cut else (0, 0)
    sound = {
        "its name": NAME.fullmatch(found.name) is not None,
        "its counter": 0 < found.counter < 2**31,
        "its number of patients": 0 <= found.least_patients < 2**31,
        "its images": shaped,
        "its classes": 1 < len(card.classes) == len(set(card.classes)) <= MOST_CLASSES,
        "its scale": len(found.scale) == channels and min(found.scale, default=0) > 0,
        "its offset": len(found.offset) == channels,
        "its mean": len(recipe.mean) == len(recipe.std) == channels
        and all(abs(mean) <= MOST_INTENSITY for mean in recipe.mean),
        "its std": all(LEAST_STD <= std <= MOST_STD for std in recipe.std),
        "its recipe": 0 < recipe.stop <= recipe.steps <= 10**7
        and 0 < recipe.batch <= 2**20
        and 0 < recipe.lr <= 100
        and 0 <= recipe.momentum < 1
        and 0 <= recipe.weight_decay <= 1,
        "its tiles": cut and 0 < sum(found.per_class) * tiles * channels * pixels <= MOST_SHOWN,
        "its labels": sum(found.per_class) * tiles * len(card.classes) <= MOST_LABELS,
        "its range of intensities": _in_range(found),
        "its declared score": found.declared is None or is_score(found.declared),
        "its backbone": all(0 < n <= MOST_WIDTH for n in numbers)
        and all(recipe.backbone.get(n, 1) in range(1, MOST_DEPTH + 1) for n in LAYERS),
        "its tensors": {IMAGES, LABELS} <= set(found.tensors) <= {IMAGES, LABELS, *WHITENING},
        "its count of classes": len(found.per_class) == len(card.classes),
        "its texts": all(len(t) <= MOST_TEXT and "\n" not in t for t in texts_of(record)),
    }
    for what, good in sound.items():
        if not good:
            raise PackageRefused(f"found no sense in {what}; expected a manifest that pack wrote")
    _check_specs(found)
    return found


def _in_range(manifest: Manifest) -> bool:
    """Say whether the intensities that the stored numbers stand for are those of images."""
    told = manifest.tensors.get(IMAGES)
    pairs = zip(manifest.scale, manifest.offset, strict=False)
    return told is not None and all(
        abs(offset + scale * end) <= MOST_INTENSITY
        for scale, offset in pairs
        for end in (told.low, told.high)
    )


def is_score(record: Mapping[str, Any], least: float = 0.0, most: float = 1.0) -> bool:
    """Say whether a record is a score: its mean, both ends or neither, a number of trainings."""
    try:
        found = from_record(Score, record)
    except (MedistillError, TypeError, ValueError):
        return False
    ends = [end for end in (found.low, found.high) if end is not None]
    around = not ends or (len(ends) == 2 and ends[0] <= found.mean <= ends[1])
    small = all(abs(end) <= MOST_END for end in ends)
    return least <= found.mean <= most and around and small and found.n > 0


def _check_specs(manifest: Manifest) -> None:
    """Refuse a backbone or an augmentation that is none, before anything is built of them."""
    recipe = manifest.recipe
    try:
        looks = from_record(Augmentation, recipe.augmentation)
        strengths = [n for n in vars(looks).values() if isinstance(n, float)]
        if not (all(0 <= n <= 1000 for n in strengths) and looks.scale >= 1):
            raise ValueError(f"augmentation {recipe.augmentation}")
        backbone = from_spec(recipe.backbone)
        # Networks of MONAI are asked where they are built: reading imports nothing.
        known = not isinstance(backbone, Monai)
        size = backbone.parameters(manifest.card) if known else 0
    except (MedistillError, ValueError, TypeError, RuntimeError) as error:
        raise PackageRefused(f"found a recipe that cannot be used ({_short(error)})") from None
    if size > MOST_PARAMETERS:
        raise PackageRefused(f"found a network of {size:,} numbers; expected {MOST_PARAMETERS:,}")


def _short(error: Exception) -> str:
    return ascii(str(error))[1:-1][:200]


def check_header(held: Mapping[str, Held], manifest: Manifest) -> None:
    """Refuse, before a tensor is read, other tensors than the manifest names.

    Raises: PackageRefused when names, types or shapes differ.
    """
    if set(held) != set(manifest.tensors):
        raise PackageRefused("found other tensors than the manifest names; expected the same")
    for name, one in held.items():
        told = manifest.tensors[name]
        if (one.dtype, one.shape) != (told.dtype, told.shape):
            raise PackageRefused(
                f"found {name} {one.dtype} {one.shape}; expected {told.dtype} {told.shape}"
            )


def arrays_of(content: bytes, held: Mapping[str, Held], manifest: Manifest) -> dict[str, Array]:
    """Return the tensors of the very bytes that were verified, read-only, as the manifest says.

    Raises: PackageRefused when ranges or counts differ from the manifest.
    """
    begin = 8 + int.from_bytes(content[:8], "little")
    found = {}
    for name, one in held.items():
        told = manifest.tensors[name]
        kind = np.dtype(NUMPY[one.dtype]).newbyteorder("<")
        flat = np.frombuffer(content, kind, math.prod(one.shape), begin + one.begin)
        low, high = (float(end) for end in (flat.min(), flat.max()))  # nan if any is
        if not told.low <= low <= high <= told.high:
            raise PackageRefused(
                f"found {name} from {low} to {high}; expected {told.low} to {told.high}"
            )
        found[name] = flat.reshape(one.shape)
    _check_set(found, manifest)
    return found


def _check_set(found: Mapping[str, Array], manifest: Manifest) -> None:
    card, images, labels = manifest.card, found[IMAGES], found[LABELS]
    count, classes = len(images), len(card.classes)
    if images.shape[1:] != (card.channels, *card.shape) or len(labels) != count:
        raise PackageRefused(f"found images {images.shape} for {card.channels} x {card.shape}")
    hard = labels.dtype.kind == "i"
    if labels.shape != ((count,) if hard else (count, classes)):
        raise PackageRefused(f"found labels of shape {labels.shape}; expected {count} of {classes}")
    if hard and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise PackageRefused(f"found labels beyond the {classes} classes; expected class numbers")
    if not hard and not (0 <= float(labels.min()) <= float(labels.max()) <= 1):
        raise PackageRefused("found soft labels beyond 0 to 1; expected weights of classes")
    if not hard and card.task != "multi-label":
        sums = labels.astype(np.float64).sum(1)
        if float(np.abs(sums - 1).max()) > 0.01:
            raise PackageRefused("found soft labels that do not add up to 1; expected weights")
    if per_class(labels, classes) != manifest.per_class:
        raise PackageRefused("found other numbers of images per class than the manifest says")
    if not manifest.recipe.whitening and set(WHITENING) & set(found):
        raise PackageRefused("found a whitening that the recipe does not name; expected none")
    if manifest.recipe.whitening:
        pixels = math.prod((card.channels, *card.shape))
        mean, matrix = (found.get(name) for name in WHITENING)
        if mean is None or matrix is None or mean.shape != (pixels,):
            raise PackageRefused("found no whitening though the recipe names one; expected both")
        state = {n: torch.from_numpy(found[n].copy()) for n in WHITENING}
        if matrix.shape != (pixels, pixels) or state_digest(state) != manifest.recipe.whitening:
            raise PackageRefused("found another whitening than the recipe names; expected that one")


def per_class(labels: Array, classes: int) -> tuple[int, ...]:
    """Return how many images each class has; a soft label counts for its largest weight.

    In multi-label tasks, as in others, every image counts once.
    """
    own = labels if labels.ndim == 1 else labels.argmax(1)
    return tuple(int(n) for n in np.bincount(own, minlength=classes))


def quantized(images: Tensor, dtype: Stored) -> tuple[Array, list[float], list[float]]:
    """Return stored numbers with scale and offset per channel: intensity = offset + scale s.

    U8: the range of each channel in 255 equal parts, so that nothing is off by more than half a
    part. F16: the intensities themselves.
    """
    channels = images.shape[1]
    if dtype == "F16":
        return images.numpy().astype(np.float16), [1.0] * channels, [0.0] * channels
    flat = images.double().transpose(0, 1).flatten(1)
    low, high = flat.amin(1), flat.amax(1)
    scale = torch.where(high > low, (high - low) / 255, torch.ones_like(low))
    shape = (1, channels, *[1] * (images.ndim - 2))
    parts = (images.double() - low.view(shape)) / scale.view(shape)
    return parts.round().clamp(0, 255).to(torch.uint8).numpy(), scale.tolist(), low.tolist()


def opened(found: Mapping[str, Array], manifest: Manifest) -> tuple[Tensor, Tensor]:
    """Return images as intensities float32 [m, c, ...], and labels float32 [m, k]."""
    stored = found[IMAGES]
    shape = (1, -1, *[1] * (stored.ndim - 2))
    scale, offset = (
        torch.tensor(t, dtype=torch.float64).view(shape) for t in (manifest.scale, manifest.offset)
    )
    images = torch.empty(stored.shape, dtype=torch.float32)
    for at in range(0, len(stored), READ):
        part = torch.from_numpy(stored[at : at + READ].astype(np.float64))
        images[at : at + READ] = part * scale + offset
    labels = torch.from_numpy(found[LABELS].copy())
    if labels.ndim == 1:
        weights = torch.zeros(len(labels), len(manifest.card.classes))
        return images, weights.scatter_(1, labels[:, None], 1.0)
    return images, labels.float()


def tensors_of(made: SyntheticSet, dtype: Stored) -> tuple[dict[str, Array], Json]:
    """Return the tensors that a package stores of a set, and what its manifest says of them."""
    images, scale, offset = quantized(made.images, dtype)
    hard = bool(((made.labels == 0) | (made.labels == 1)).all())
    one = hard and bool((made.labels.sum(1) == 1).all()) and made.card.task != "multi-label"
    labels = made.labels.argmax(1).numpy() if one else made.labels.numpy().astype(np.float16)
    stored: dict[str, Array] = {IMAGES: images, LABELS: labels}
    if made.whitening is not None:
        stored |= {name: tensor.numpy() for name, tensor in made.whitening.state().items()}
    names = {np.dtype(kind): name for name, kind in NUMPY.items()}
    specs = {
        name: {
            "dtype": names[array.dtype],
            "shape": list(array.shape),
            "low": float(array.min()),
            "high": float(array.max()),
        }
        for name, array in stored.items()
    }
    counts = list(per_class(labels, len(made.card.classes)))
    return stored, {"tensors": specs, "scale": scale, "offset": offset, "per_class": counts}
