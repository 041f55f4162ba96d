"""`combine:A,B,...`: several sources pooled into one set of great variation."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..errors import DataError, UsageError
from ..rng import Rng
from ..sets import FULL, Card, RealSet, Splits
from .source import Source, Where, bare, split_outside
from .split import depending

OPTIONS = ("labels", "size", "n")


def load(source: Source, where: Where, inner: Callable[[str, Where], Splits]) -> Splits:
    """Pool the sources that `inner` loads; train stays train, val stays val, test stays test.

    By default a source is a class. A source with options of its own stands in parentheses.
    Grey images are repeated into three channels where any source has color; 16 bits become 8.
    Options:

        labels=keep   all classes of all sources, as "source: class"
        size=N        side of the images; default the smallest of all sides (area interpolation)
        n=N           at most N images of each split of each source, chosen by seed

    Raises: UsageError when fewer than two sources or another `labels` are given; DataError when a
    source is multi-label, or 2D and 3D sources meet.
    """
    keep = source.options.get("labels", "source")
    if keep not in ("keep", "source"):
        raise UsageError(f"combine: found labels={keep}; expected keep or source")
    texts = [text for text in split_outside(source.target, ",") if text]
    if len(texts) < 2:
        raise UsageError(f"combine: found {len(texts)} source; expected two or more, with commas")
    parts = [inner(bare(text), where) for text in texts]
    cards = [part.train.card for part in parts]
    _check(cards)
    limit = source.integer("n", 0, 1, 1 << 40)
    if limit:
        rng = Rng(where.seed).child("combine")
        parts = [_limited(part, limit, rng.child(i)) for i, part in enumerate(parts)]
    side = source.integer("size", min(min(card.shape) for card in cards), 1, 4096)
    card = _card(cards, side, keep == "keep")
    offsets = [0]
    for one in cards:
        offsets.append(offsets[-1] + (len(one.classes) if keep == "keep" else 1))
    groups = _groups(parts)
    pooled = []
    for position in range(3):
        sets = [part[position] for part in parts]
        images = torch.cat([_fitted(one.images, card) for one in sets])
        labels = [
            one.labels + start if keep == "keep" else torch.full_like(one.labels, start)
            for one, start in zip(sets, offsets, strict=False)
        ]
        pooled.append(RealSet(images, torch.cat(labels), card, groups[position]))
    inside = (part.train.depends for part in parts)
    return depending(Splits(*pooled), *inside, "n" if limit else "")


def _check(cards: Sequence[Card]) -> None:
    for card in cards:
        if card.task == "multi-label":
            raise DataError(
                f"combine: found {card.name}, a multi-label set; expected one label per image: "
                "leave it out"
            )
    if len({len(card.shape) for card in cards}) > 1:
        found = ", ".join(f"{card.name} {len(card.shape)}D" for card in cards)
        raise DataError(f"combine: found {found}; expected all 2D or all 3D")


def _card(cards: Sequence[Card], side: int, keep: bool) -> Card:
    names: list[str] = []
    for card in cards:
        count = sum(name.partition(" (")[0] == card.name for name in names)
        names.append(f"{card.name} ({count + 1})" if count else card.name)
    classes = (
        tuple(f"{n}: {c}" for n, card in zip(names, cards, strict=True) for c in card.classes)
        if keep
        else tuple(names)
    )

    def joined(values: Sequence[str]) -> str:
        return "; ".join(dict.fromkeys(value for value in values if value))

    return Card(
        name="+".join(names),
        task="binary" if len(classes) == 2 else "multi-class",
        classes=classes,
        channels=max(card.channels for card in cards),
        shape=(side,) * len(cards[0].shape),
        modality=joined([card.modality for card in cards]),
        license=joined([card.license for card in cards]),
        citation=joined([card.citation for card in cards]),
        url=joined([card.url for card in cards]),
        flips=all(card.flips for card in cards),
        intensity=joined([card.intensity for card in cards]),
        patients=False,  # one patient may be in several sources, under other numbers
    )


def _limited(splits: Splits, limit: int, rng: Rng) -> Splits:
    def cut(part: RealSet, name: str) -> RealSet:
        order = torch.randperm(len(part), generator=rng.at(name))[:limit].sort().values
        return part.take(order)

    return Splits(*(cut(part, name) for part, name in zip(splits, Splits._fields, strict=True)))


def _fitted(images: Tensor, card: Card) -> Tensor:
    """Bring images to the card's shape and channels and to 8 bits, in blocks."""
    if tuple(images.shape[2:]) != card.shape or images.dtype != torch.uint8:
        scale = 255 / FULL[images.dtype]
        blocks = []
        for block in images.split(256):
            pixels = block.float() * scale
            if tuple(pixels.shape[2:]) != card.shape:
                pixels = interpolate(pixels, size=card.shape, mode="area")
            blocks.append(pixels.round_().to(torch.uint8))
        images = torch.cat(blocks)
    if images.shape[1] < card.channels:
        images = images.expand(-1, card.channels, *images.shape[2:])
    return images


def _groups(parts: Sequence[Splits]) -> list[Tensor | None]:
    """Renumber groups so that sources share none; an image without one is a group of its own."""
    if all(one.groups is None for part in parts for one in part):
        return [None, None, None]
    base, found = 0, []
    for part in parts:
        counts = [len(one) for one in part]
        if any(one.groups is None for one in part):
            numbers = list(torch.arange(base, base + sum(counts)).split(counts))
        else:
            numbers = [one.groups + base for one in part if one.groups is not None]
        base = 1 + max(int(n.max()) for n in numbers if len(n))
        found.append(numbers)
    return [torch.cat([numbers[position] for numbers in found]) for position in range(3)]
