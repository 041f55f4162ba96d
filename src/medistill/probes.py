"""What a sketch asks of an image: random networks and frequencies, rebuilt from a public seed."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from .augment import Augmentation, Draw
from .backbones import Network, from_spec, level_sizes
from .compute import PLAIN, Compute
from .errors import DataError, UsageError
from .features import extract, extract_fast, fixed
from .records import Json, canonical, from_record, to_record
from .rng import Rng
from .sets import Card

# Sums are counted in steps of 2^-30: whole numbers add up to the same in every order.
GRID = 2**30
NOISE_IMAGES = 64
PROBES = 32  # kept in memory: drawing frequencies anew would cost a step as much as its images
MOST_MOMENTS = 16  # frequencies along each axis


@dataclass(frozen=True)
class SketchSpec:
    """What a sketch asks of an image; two sketches can be added where all of this is equal.

    `networks` random networks of one backbone, each with one draw of augmentation, and for each of
    its stages (or its features alone: `layers`) `frequencies` random frequencies of size `scale`;
    all follow from `seed`, which is public. `moments` is how many of the lowest cosine frequencies
    along each axis the mean and covariance of each class are kept of (0: none).
    """

    backbone: Json
    augmentation: Json
    networks: int = 20
    frequencies: int = 512
    scale: float = 0.5
    layers: Literal["all", "last"] = "all"
    seed: int = 0
    moments: int = 0

    def __post_init__(self) -> None:
        for name in ("networks", "frequencies", "scale"):
            if not getattr(self, name) > 0:
                raise UsageError(f"found {name} {getattr(self, name)}; expected more than 0")
        if not 0 <= self.moments <= MOST_MOMENTS:
            raise UsageError(f"found moments {self.moments}; expected 0 to {MOST_MOMENTS}")
        if self.layers not in ("all", "last"):
            raise UsageError(f"found layers {self.layers!r}; expected all or last")

    def sizes(self, card: Card) -> tuple[int, ...]:
        """Return the length of each level that is looked at, for images of a card."""
        sizes = level_sizes(from_spec(self.backbone), card.channels, card.shape)
        return sizes if self.layers == "all" else sizes[-1:]


@dataclass(frozen=True, eq=False)
class Probe:
    """One network of a sketch with its draw and, for each level, its frequencies [d, J]."""

    network: Network
    augmentation: Augmentation
    draw: Draw
    frequencies: list[Tensor]

    def of(
        self,
        images: Tensor,
        compute: Compute = PLAIN,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Return the vectors [n, 2 J L] of normalized images, with a gradient (see `waves`)."""
        seen = self.augmentation.apply(images, self.draw)
        features = extract(self.network, seen, compute, levels=True)
        return waves(features, self.frequencies, dtype)

    def on_grid(self, images: Tensor, compute: Compute = PLAIN) -> Tensor:
        """Return the vectors of images on the grid, int64 [n, 2 J L], without a gradient.

        Blocks have one size: what is computed of an image does not depend on how many others there
        are (where widths leave vector lanes no rest; else but for last bits).
        """
        found = self.of_images(images, compute)
        if not bool(found.isfinite().all()):
            raise DataError("found features that are not finite; expected finite pixels")
        return (found.double() * GRID).round().long()

    def of_images(self, images: Tensor, compute: Compute = PLAIN) -> Tensor:
        """Return the vectors of images [n, 2 J L] without a gradient, in blocks of one size."""
        seen = self.augmentation.apply(images, self.draw)
        features = extract_fast(self.network, seen, compute, levels=True, fill=True)
        blocks = compute.blocks(features, fill=True)
        return torch.cat([waves(block, self.frequencies) for (block,) in blocks])[: len(images)]


def waves(
    features: Tensor, frequencies: Sequence[Tensor], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return [cos(t_j . phi_l), sin(t_j . phi_l)]_jl / sqrt(J L): rows of norm 1.

    `features` [n, d] ends with the levels phi_l side by side; each has its frequencies [d_l, J].
    Both and their products, the phases, are rounded to `dtype`.
    """
    sizes = [t.shape[0] for t in frequencies]
    levels = features[:, -sum(sizes) :].split(sizes, 1)
    pairs = zip(levels, frequencies, strict=True)
    phases = torch.cat([(level.to(dtype) @ t.to(dtype)).float() for level, t in pairs], 1)
    return torch.cat([phases.cos(), phases.sin()], 1) / math.sqrt(phases.shape[1])


def check_backbone(spec: SketchSpec, card: Card) -> None:
    """Refuse a backbone that does not see each image of a card alone.

    Raises: UsageError when it is unknown, mixes the images of a batch, or does not fit the images.
    """
    backbone = from_spec(spec.backbone)
    if backbone.build(card, Rng(0).at("check")).mixes_images:
        raise UsageError(
            f"found {backbone.name}, whose features of an image depend on its batch; expected "
            "another norm for a sketch: use instance norm"
        )


def spreads_of(spec: SketchSpec, card: Card, number: int) -> list[float]:
    """Return the root mean square distance of two noise images at each level, three digits.

    Noise images stand in for real ones, so that frequencies tell nothing about patients; three
    digits, so that another machine's last bit does not become another frequency.
    """
    at = Rng(spec.seed).child("sketch", number)
    network = from_spec(spec.backbone).build(card, at.at("network"))
    sizes = spec.sizes(card)
    noise = torch.randn((NOISE_IMAGES, card.channels, *card.shape), generator=at.at("noise images"))
    found = extract_fast(network, noise, levels=True)[:, -sum(sizes) :]
    levels = found.double().split(sizes, 1)
    return [float(f"{float(level.var(0).sum().mul(2).sqrt()):.3g}") for level in levels]


def all_spreads(spec: SketchSpec, card: Card) -> Tensor:
    """Return the spreads of all networks, float64 [networks, L]."""
    rows = [spreads_of(spec, card, number) for number in range(spec.networks)]
    return torch.tensor(rows, dtype=torch.float64)


def probe(
    spec: SketchSpec, card: Card, number: int, spreads: Tensor, device: torch.device
) -> Probe:
    """Return the network `number` of a sketch, rebuilt from the public seed or still remembered.

    Frequencies of a level are N(0, (scale / spread)^2).
    """
    return _probe(canonical(to_record(spec)), card, number, tuple(spreads.tolist()), device)


@lru_cache(maxsize=PROBES)
def _probe(
    record: bytes, card: Card, number: int, spreads: tuple[float, ...], device: torch.device
) -> Probe:
    spec = from_record(SketchSpec, json.loads(record))
    at = Rng(spec.seed).child("sketch", number)
    network = from_spec(spec.backbone).build(card, at.at("network"))
    generator = at.at("frequencies")
    frequencies = [
        torch.randn((size, spec.frequencies), generator=generator) * (spec.scale / spread)
        for size, spread in zip(spec.sizes(card), spreads, strict=True)
    ]
    augmentation = from_record(Augmentation, spec.augmentation)
    draw = augmentation.draw(1, card.shape, at.at("augment"))
    return Probe(fixed(network.to(device)), augmentation, draw, [t.to(device) for t in frequencies])
