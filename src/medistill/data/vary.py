"""`vary:SOURCE`: the same data made harder or smaller, by rules that are told."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..errors import DataError, UsageError, nearest
from ..rng import Rng
from ..sets import FULL, Card, RealSet, Splits, TaskKind, copied
from .source import Source, Where, bare, split_outside
from .split import depending

OPTIONS = ("classes", "part", "n", "imbalance", "contrast", "resolution", "noise", "size")
LEAST = 100  # validation images that stay where a set is cut: fewer choose by chance


def load(source: Source, where: Where, inner: Callable[[str, Where], Splits]) -> Splits:
    """Read a source and change it; what each option does to an image is the same in all splits.

    A source with options of its own stands in parentheses: `vary:(folder:scans;size=28);n=200`.
    They are done in this order. Options:

        classes=A|B    these classes alone
        part=K/N       the K-th of N parts, as if N sites shared the data: training and validation
                       units (patients, where they are known) are dealt out by seed, class by
                       class; test stays as it is
        n=N            at most N training images, chosen by seed, classes as frequent as before;
                       validation shrinks alike, to 100 images at least; test stays as it is
        imbalance=R    training and validation classes shrink geometrically, from the first, which
                       keeps its images, to the last, which keeps one in R; test stays as it is
        size=N         images become N pixels a side, by area
        resolution=N   images become N pixels a side by area, and are enlarged again (bilinear)
        contrast=F     intensities move toward the middle: 0.5 + F (x - 0.5), F from 0 to 1
        noise=S        Gaussian noise of S is added, then intensities are clamped to [0, 1]

    Raises: UsageError when an option is out of range or a class unknown; DataError when several
    labels of an image meet `classes` or `imbalance`.
    """
    texts = [one for one in split_outside(source.target, ",") if one]
    if len(texts) != 1:
        raise UsageError(
            f"vary: found {len(texts)} sources; expected one, its options in parentheses, as "
            f"vary:({','.join(texts)});n=50"
        )
    splits = inner(bare(texts[0]), where)
    rng = Rng(where.seed).child("vary")
    if source.options.keys() & {"classes", "imbalance"}:
        if splits.train.card.task == "multi-label":
            raise DataError(
                f"vary: found {splits.train.card.name}, whose images have several labels; expected "
                "one label per image for classes and imbalance: leave them out"
            )
        splits = _classes(splits, source)
    if "part" in source.options:
        place, count = _part(source.options["part"])
        shares = [_dealt(one, place, count, rng.at("part", i)) for i, one in enumerate(splits[:2])]
        splits = Splits(shares[0], shares[1], splits.test)
    limit = source.integer("n", 0, 1, 1 << 40)
    if limit:
        splits = _limited(splits, limit, rng)
    ratio = source.number("imbalance", 1, 1, 1e6)
    if ratio > 1:
        thin = [_thinned(part, ratio, rng.at("imbalance", i)) for i, part in enumerate(splits[:2])]
        splits = Splits(thin[0], thin[1], splits.test)
    card = _card(splits.train.card, source)
    parts = [_changed(part, card, source, rng.child("noise", i)) for i, part in enumerate(splits)]
    chosen = (name for name in ("part", "n", "imbalance", "noise") if name in source.options)
    return depending(Splits(*parts), splits.train.depends, *chosen)


def _classes(splits: Splits, source: Source) -> Splits:
    card, wanted = splits.train.card, source.listed("classes")
    for name in wanted:
        if name not in card.classes:
            raise UsageError(f"vary: found no class {name!r}: {nearest(name, card.classes)}")
    if not wanted:
        return splits
    if len(set(wanted)) < 2:
        raise UsageError(f"vary: found classes={'|'.join(wanted)}; expected two or more")
    numbers = [card.classes.index(name) for name in wanted]
    lookup = torch.full((len(card.classes),), -1)
    lookup[torch.tensor(numbers)] = torch.arange(len(numbers))
    kind: TaskKind = "binary" if len(wanted) == 2 else "multi-class"
    other = replace(card, classes=tuple(wanted), task=kind)
    parts = []
    for part in splits:
        labels = lookup[part.labels]
        index = (labels >= 0).nonzero().flatten()
        kept = part.take(index)
        told = kept.groups, kept.facts
        parts.append(RealSet(kept.images, labels[index], other, *told, depends=kept.depends))
    return Splits(*parts)


def _limited(splits: Splits, limit: int, rng: Rng) -> Splits:
    share = limit / len(splits.train)
    if share >= 1:
        return splits
    parts = []
    for name, part in zip(("train", "val"), splits, strict=False):
        total = limit if name == "train" else max(min(LEAST, len(part)), round(share * len(part)))
        order = torch.randperm(len(part), generator=rng.at("n", name))
        if part.labels.ndim == 1:
            order = _evenly(part.labels[order], order)
        parts.append(part.take(order[:total].sort().values))
    return Splits(parts[0], parts[1], splits.test)


def _evenly(labels: Tensor, order: Tensor) -> Tensor:
    """Reorder positions so that every beginning of them holds the classes in their proportions."""
    places = torch.empty(len(labels), dtype=torch.float64)
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        places[members] = (torch.arange(len(members)).double() + 0.5) / len(members)
    return order[places.argsort(stable=True)]


def _thinned(part: RealSet, ratio: float, generator: torch.Generator) -> RealSet:
    """Keep n ratio^(-c / (k - 1)) of the n images of class c, one at least."""
    kept, last = [], max(1, len(part.card.classes) - 1)
    for number, members in enumerate(part.by_class):
        count = max(1, round(len(members) * ratio ** (-number / last)))
        order = torch.randperm(len(members), generator=generator)
        kept.append(members[order[:count]])
    return part.take(torch.cat(kept).sort().values)


def _card(card: Card, source: Source) -> Card:
    side = source.integer("size", 0, 1, 4096)
    told = ";".join(f"{name}={source.options[name]}" for name in OPTIONS if name in source.options)
    shape = (side,) * len(card.shape) if side else card.shape
    return replace(card, name=f"{card.name};{told}" if told else card.name, shape=shape)


def _part(text: str) -> tuple[int, int]:
    """Read K/N as a place from 0 and a count."""
    words = text.split("/")
    if len(words) != 2 or not all(word.isdecimal() for word in words):
        raise UsageError(f"vary: found part={text}; expected K/N, as 1/3")
    place, count = map(int, words)
    if not 1 <= place <= count <= 10_000:
        raise UsageError(f"vary: found part={text}; expected K from 1 to N, and N to 10000")
    return place - 1, count


def _dealt(real: RealSet, place: int, count: int, generator: torch.Generator) -> RealSet:
    """Deal units out in turn, in random order within each class, and return one place's images."""
    units = torch.arange(len(real)) if real.groups is None else real.groups
    names, which = units.unique(return_inverse=True)
    own = torch.zeros(len(names), dtype=torch.int64)
    if real.labels.ndim == 1:
        own[which.flip(0)] = real.labels.flip(0)  # of the first image of each
    drawn = torch.randperm(len(names), generator=generator)
    order = drawn[own[drawn].argsort(stable=True)]
    turn = torch.empty_like(order)
    turn[order] = torch.arange(len(names)) % count
    return real.take((turn[which] == place).nonzero().flatten())


def _changed(part: RealSet, card: Card, source: Source, rng: Rng) -> RealSet:
    """Change the images of one split, block by block; 16 bits stay 16 bits."""
    side = source.integer("resolution", 0, 1, 4096)
    contrast = source.number("contrast", 1, 0, 1)
    noise = source.number("noise", 0, 0, 10)
    images = part.images
    if side or contrast < 1 or noise or card.shape != tuple(images.shape[2:]):
        full, blocks = FULL[images.dtype], []
        for number, block in enumerate(images.split(256)):
            pixels = block.float() / full
            if card.shape != tuple(pixels.shape[2:]):
                pixels = interpolate(pixels, size=card.shape, mode="area")
            if side:
                mode = "bilinear" if pixels.ndim == 4 else "trilinear"
                small = interpolate(pixels, size=(side,) * len(card.shape), mode="area")
                pixels = interpolate(small, size=card.shape, mode=mode)
            pixels = 0.5 + contrast * (pixels - 0.5)
            if noise:
                drawn = torch.randn(pixels.shape, generator=rng.at(number))
                pixels = pixels + noise * drawn
            blocks.append((pixels.clamp_(0, 1) * full).round_().to(images.dtype))
        images = torch.cat(blocks)
    if images is part.images:
        return copied(part, card=card)
    return RealSet(images, part.labels, card, part.groups, part.facts)
