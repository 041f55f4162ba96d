"""The copy check: do synthetic images come nearer to one real image than held-out ones do?"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..backbones import ConvNet
from ..errors import UsageError
from ..features import extract_fast, fixed, read_size
from ..pixels import mosaic_of, tiles_of
from ..rng import Rng
from ..sets import RealSet, SyntheticSet

SAMPLE = 1000  # held-out images that serve as yardstick, at most
Measure = Literal["distance", "relative"]
# Measures, and shares of held-out images below a yardstick.
YARDSTICKS: tuple[tuple[Measure, float], ...] = (
    ("distance", 0.01),
    ("relative", 0.01),
    ("relative", 0.05),
    ("relative", 0.25),
    ("relative", 0.5),
)
NEAREST = 50  # members whose mean distance tells how near is near
FAILS = 0.005  # of two views together: once in a hundred audits
READ = 64  # rows whose differences to their nearest are taken at once
SAME = 1e-3  # of the median distance between images: that is the same image, stored anew
See = Callable[[Tensor], Tensor]
FEATURES = ConvNet(depth=3, width=64)


@dataclass(frozen=True)
class Pair:
    """A synthetic image (or a tile of one) beside the real image that lies nearest to it.

    `distance` is relative: a share of the mean distance to the nearest 50.
    """

    synthetic: int
    real: int
    distance: float


@dataclass(frozen=True)
class Copies:
    """What one view found: a check that can fail, and proves nothing where it does not.

    `suspects` are the synthetic images that come nearer to a member than the nearest `share` of
    held-out images, which are no copies, by distance or by relative distance (`measure`).
    `p_value` is how often as many would if synthetic images were held-out ones. Of the nearest
    hundredth by distance, and the nearest 1, 5, 25 and 50 in a hundred by relative distance, the
    yardstick that says most counts, five times its p-value. `exact` counts those that are a member
    to rounding.
    """

    view: str
    measure: Measure
    share: float
    suspects: int
    p_value: float
    exact: int
    images: int
    nearest: tuple[Pair, ...]

    @property
    def failed(self) -> bool:
        """Whether there is a copy, or more suspects than chance gives once in a hundred audits."""
        return self.exact > 0 or self.p_value < FAILS


class Near(NamedTuple):
    """Distances to the nearest member [n], which one it is, and the distances beside the usual."""

    distance: Tensor
    member: Tensor
    relative: Tensor


def copies(
    synthetic: SyntheticSet, members: RealSet, others: RealSet, *, seed: int = 0
) -> list[Copies]:
    """Compare a set with the images it was made from, as pixels and as features.

    The relative distance of an image x is d(x, m_1) / mean over k <= 50 of d(x, m_k), m_k its k-th
    nearest member: a blurred image is near to all of them, a copy to one. The distance itself sees
    copies of what has many near equals, as a slice among slices.
    Source: Carlini et al. 2023 (arXiv 2301.13188), section 5, whose threshold is 0.5; here held-out
    images tell what is usual, for many a public set has a patient in several splits.
    Every tile of an image that holds several is looked at, beside real images that were shrunken to
    a tile and enlarged again, as one of these would have been. Pixels of an image are centered and
    scaled to norm 1, so that another brightness hides no copy; features are a random network's.
    Images are looked at in a mirror too, held-out ones alike.
    Shapes: `members` and `others` are training and held-out images of the same card.
    Raises: UsageError when one of them is empty.
    """
    if not len(members) or not len(others):
        raise UsageError(f"found {len(members)} members and {len(others)} others; expected both")
    made, _ = synthetic.to_train()
    network = fixed(FEATURES.build(members.card, Rng(seed).at("copies")))
    order = torch.randperm(len(others), generator=Rng(seed).at("yardstick"))[:SAMPLE]
    views: dict[str, See] = {
        "pixels": _plain,
        "features": lambda images: _unit(extract_fast(network, images)),
    }
    real = partial(_as_tiles, factor=synthetic.recipe.factor)
    held = others.take(order)
    return [_compare(name, see, real, made, members, held) for name, see in views.items()]


def _as_tiles(images: Tensor, factor: int) -> Tensor:
    """Return images as a set of so many tiles an image would show them."""
    if factor == 1:
        return images
    each = factor ** (images.ndim - 2)
    missing = -len(images) % each
    whole = torch.cat([images, images[:1].expand(missing, *images.shape[1:])])
    return tiles_of(mosaic_of(whole, factor), factor)[: len(images)]


def nearest_members(images: Tensor, members: RealSet) -> Tensor:
    """Return which member lies nearest to each normalized image, as pixels. Shapes: int64 [n]."""
    return _nearest([_plain(images)], members, _plain)[0].member


def _plain(images: Tensor) -> Tensor:
    flat = images.flatten(1)
    return _unit(flat - flat.mean(1, keepdim=True))


def _unit(rows: Tensor) -> Tensor:
    lengths: Tensor = rows.norm(dim=1, keepdim=True)
    return rows / lengths.clamp_min(1e-12)


def _compare(
    view: str, see: See, real: See, made: Tensor, members: RealSet, others: RealSet
) -> Copies:
    def shown(images: Tensor) -> Tensor:
        return see(real(images))

    def mirrored(images: Tensor) -> Tensor:
        return see(real(images).flip(-1))

    parts = torch.arange(len(others)).split(read_size(others))
    held = [
        torch.cat([way(others.normalized(part)) for part in parts]) for way in (shown, mirrored)
    ]
    sides = _nearest([see(made), see(made.flip(-1)), *held], members, shown)
    found, usual = _nearer(*sides[:2]), _nearer(*sides[2:])
    exact = int((found.distance < SAME * max(float(usual.distance.median()), 1e-12)).sum())
    by = found.relative
    pairs = (Pair(i, int(found.member[i]), float(by[i])) for i in by.argsort().tolist())
    return Copies(view, *weigh(found, usual), exact, len(made), tuple(pairs))


def weigh(made: Near, others: Near) -> tuple[Measure, float, int, float]:
    """Return the yardstick that says most, how many images are below it, and the p-value."""
    told = []
    for measure, share in YARDSTICKS:
        found, held = getattr(made, measure), getattr(others, measure).sort().values
        place = max(1, round(share * len(held)))
        suspects = int((found < held[place - 1]).sum())
        chance = chance_of(suspects, len(found), place, len(held))
        told.append((measure, share, suspects, min(1.0, len(YARDSTICKS) * chance)))
    return min(told, key=lambda one: one[-1])


def chance_of(suspects: int, images: int, place: int, others: int) -> float:
    """Return how likely so many of `images` lie below the `place`-th smallest of `others`.

    If all come alike, every order is as likely: at least s images are below the k-th other where
    they are among the first s + k - 1 of all, which is hypergeometric.

    Example:
        >>> chance_of(0, 5, 1, 10), chance_of(1, 1, 1, 1)
        (1.0, 0.5)
    """
    from scipy.stats import hypergeom

    if suspects == 0:
        return 1.0
    first = suspects + place - 1
    return float(hypergeom.sf(suspects - 1, images + others, images, first))


def _nearer(plain: Near, mirror: Near) -> Near:
    """Return how near images come as they are or in a mirror, whichever is nearer."""
    turned = mirror.distance < plain.distance
    return Near(*(torch.where(turned, b, a) for a, b in zip(plain, mirror, strict=True)))


def _nearest(sides: Sequence[Tensor], members: RealSet, see: See) -> list[Near]:
    """Return how near the rows of each side come to their nearest member; these are read once."""
    best = [torch.full((len(rows),), torch.inf) for rows in sides]
    place = [torch.zeros(len(rows), dtype=torch.int64) for rows in sides]
    usual = [torch.empty(len(rows), 0) for rows in sides]
    for part in torch.arange(len(members)).split(read_size(members)):
        seen = see(members.normalized(part))
        for n, rows in enumerate(sides):
            distances = torch.cdist(rows, seen)
            index = distances.argmin(1)
            # Products find the nearest, and differences say how near: products lose small ones.
            pieces = zip(rows.split(READ), index.split(READ), strict=True)
            values = torch.cat([(few - seen[which]).norm(dim=1) for few, which in pieces])
            nearer = values < best[n]
            best[n] = torch.where(nearer, values, best[n])
            place[n] = torch.where(nearer, part[index], place[n])
            near = torch.cat([usual[n], distances], 1)
            usual[n] = near.topk(min(NEAREST, near.shape[1]), largest=False).values
    # A mean of distances is no less than the least, however products are rounded.
    means = [near.mean(1).maximum(one) for near, one in zip(usual, best, strict=True)]
    relative = [one / mean.clamp_min(1e-12) for one, mean in zip(best, means, strict=True)]
    return [Near(*parts) for parts in zip(best, place, relative, strict=True)]
