"""The copy check: does a synthetic image lie nearer to a real one than real ones to each other?"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..backbones import ConvNet
from ..errors import UsageError
from ..features import extract_fast, fixed, read_size
from ..pixels import mosaic_of, tiles_of
from ..rng import Rng
from ..sets import RealSet, SyntheticSet

SAMPLE = 1000  # held-out images that serve as yardstick, at most
QUANTILE = 0.01
FAILS = 0.005  # of two views together: once in a hundred audits
SAME = 1e-3  # of the median distance between images: that is the same image, stored anew
See = Callable[[Tensor], Tensor]
FEATURES = ConvNet(depth=3, width=64)


@dataclass(frozen=True)
class Pair:
    """A synthetic image (or a tile of one) beside the real image that lies nearest to it."""

    synthetic: int
    real: int
    distance: float


@dataclass(frozen=True)
class Copies:
    """What one view found: a check that can fail, and proves nothing where it does not.

    `yardstick` is the distance from its nearest member below which one in a hundred held-out images
    lies: held-out images are no copies, so synthetic ones below it are suspect. `p_value` is how
    often as many would lie there if synthetic images were held-out ones. `exact` counts those that
    are a member to rounding.
    """

    view: str
    yardstick: float
    suspects: int
    p_value: float
    exact: int
    images: int
    nearest: tuple[Pair, ...]

    @property
    def failed(self) -> bool:
        """Whether there is a copy, or more suspects than chance gives once in a hundred audits."""
        return self.exact > 0 or self.p_value < FAILS


def copies(
    synthetic: SyntheticSet, members: RealSet, others: RealSet, *, seed: int = 0
) -> list[Copies]:
    """Compare a set with the images it was made from, as pixels and as features.

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
    return _nearest(_plain(images), members, _plain)[1]


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
    distances, nearest = _either((see(made), see(made.flip(-1))), members, shown)
    usual, _ = _either(held, members, shown)
    place = max(1, round(QUANTILE * len(usual)))
    yardstick = float(usual.sort().values[place - 1])
    exact = int((distances < SAME * max(float(usual.median()), 1e-12)).sum())
    order = distances.argsort()
    pairs = tuple(Pair(int(i), int(nearest[i]), float(distances[i])) for i in order.tolist())
    suspects = int((distances < yardstick).sum())
    p_value = chance_of(suspects, len(made), place, len(usual))
    return Copies(view, yardstick, suspects, p_value, exact, len(made), pairs)


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


def _either(sides: Sequence[Tensor], members: RealSet, see: See) -> tuple[Tensor, Tensor]:
    """Return what `_nearest` does, of images and of their mirror images, whichever is nearer."""
    (plain, first), (other, second) = (_nearest(rows, members, see) for rows in sides)
    return torch.minimum(plain, other), torch.where(other < plain, second, first)


def _nearest(rows: Tensor, members: RealSet, see: See) -> tuple[Tensor, Tensor]:
    """Return each row's distance to its nearest member, and which one; read in pieces."""
    best = torch.full((len(rows),), torch.inf)
    place = torch.zeros(len(rows), dtype=torch.int64)
    for part in torch.arange(len(members)).split(read_size(members)):
        seen = see(members.normalized(part))
        index = torch.cdist(rows, seen).argmin(1)
        # Products find the nearest, and differences say how near: products lose small distances.
        values = (rows - seen[index]).norm(dim=1)
        better = values < best
        best = torch.where(better, values, best)
        place = torch.where(better, part[index], place)
    return best, place
