"""How much may be synthesized, and how it is dealt to the classes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from .errors import RunRefused, UsageError
from .records import Json
from .sets import Card, RealSet

Share = Literal["equal", "proportional", "sqrt"]
Small = Literal["refuse", "whole"]


@dataclass(frozen=True)
class Budget:
    """How much may be synthesized: images per class, images in all, or bytes; exactly one.

    `share` deals the images to the classes: equally, in proportion to the classes' sizes, or to
    the square roots of these; every class gets one at least. `small` says what becomes of a class
    with fewer images than its share: it is refused, or taken whole (and the rest is not spent).
    Raises: UsageError when none or several are given, or the number is below 1, or `share` or
    `small` has no such name.
    """

    ipc: int | None = None
    images: int | None = None
    bytes: int | None = None
    share: Share = "equal"
    small: Small = "refuse"

    def __post_init__(self) -> None:
        record = {name: getattr(self, name) for name in ("ipc", "images", "bytes")}
        given = {k: v for k, v in record.items() if v is not None}
        if len(given) != 1:
            raise UsageError(
                f"found a budget of {given or 'nothing'}; expected one of ipc, images, bytes"
            )
        name, number = next(iter(given.items()))
        if number < 1:
            raise UsageError(f"found {name} {number}; expected at least 1")
        for what, known in (("share", get_args(Share)), ("small", get_args(Small))):
            if getattr(self, what) not in known:
                raise UsageError(
                    f"found {what} {getattr(self, what)!r}; expected {' or '.join(known)}"
                )

    def total(self, card: Card) -> int:
        """Return the images that the budget allows in all (uint8 pixels for bytes).

        Raises: RunRefused when it does not reach for one image of each class.
        """
        if self.ipc is not None:
            return self.ipc * len(card.classes)
        pixels = card.channels * math.prod(card.shape)
        total = self.images if self.images is not None else (self.bytes or 0) // pixels
        if total < (1 if card.task == "multi-label" else len(card.classes)):
            raise RunRefused(
                f"found a budget of {total} images for {len(card.classes)} classes; "
                "expected at least one image per class: raise the budget"
            )
        return total

    def counts(self, card: Card, present: Sequence[int]) -> tuple[int, ...]:
        """Return the images of each class, where so many real ones are `present`.

        Shares are rounded by largest remainder, so that their sum is the budget.
        Raises: RunRefused when the budget does not reach for one image of each class, or a class
        has fewer than its share and is not to be taken whole.

        Example:
            >>> card = Card("toy", "binary", ("no", "yes"), 1, (8, 8))
            >>> Budget(images=10, share="sqrt").counts(card, [100, 900])
            (3, 7)
        """
        power = {"equal": 0.0, "proportional": 1.0, "sqrt": 0.5}[self.share]
        counts = _dealt(self.total(card), [count**power for count in present])
        for name, count, have in zip(card.classes, counts, present, strict=True):
            if have < count and self.small == "refuse":
                raise RunRefused(
                    f"found {have} training images of class {name!r} in {card.name}; expected at "
                    f"least {count} (its share of the budget): lower --ipc, add images, or take "
                    "small classes whole (--small whole)"
                )
        return tuple(min(count, have) for count, have in zip(counts, present, strict=True))


def _dealt(total: int, weights: Sequence[float]) -> list[int]:
    """Deal `total` by weights, one to each at least, the rest by largest remainder."""
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [max(1, math.floor(share)) for share in exact]
    while sum(counts) != total:
        up = 1 if sum(counts) < total else -1
        gaps = [
            up * (share - count) if count + up > 0 else -math.inf
            for share, count in zip(exact, counts, strict=True)
        ]
        counts[gaps.index(max(gaps))] += up
    return counts


def counted(real: RealSet) -> Json:
    """Return how many images and patients a set was made from, and the smallest class."""
    told: Json = {"images": len(real), "patients": None}
    sizes = [len(members) for members in real.by_class]
    if real.card.patients and real.groups is not None:
        groups = real.groups
        told["patients"] = len(groups.unique())
        sizes = [len(groups[members].unique()) for members in real.by_class]
    least = sizes.index(min(sizes))
    return told | {"smallest_class": real.card.classes[least], "smallest": sizes[least]}
