"""From a list of files with labels to splits: what the sources csv and datalist share."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from ..errors import DataError, UsageError
from ..records import to_record
from ..rng import Rng
from ..sets import Card, Splits
from .decode import decoded, stamp_of
from .files import PICTURES, VOLUMES, Array, Rule, ending, read, rule_of
from .source import Source, Where
from .split import depending
from .table import Item, assembled, classes_of, deal_of, task_of

BY = ("patient", "image")


@dataclass(frozen=True)
class Listed:
    """One file of a list: its path, where it stands in the list, and what is known of it."""

    path: str
    what: str
    item: Item

    @property
    def count(self) -> int:
        """One file, one image."""
        return 1

    @property
    def stamp(self) -> list[Any]:
        """Path, size and time of the file."""
        return [self.what, *stamp_of(self.path)]


def loaded(listed: Sequence[Listed], name: str, source: Source, where: Where) -> Splits:
    """Return the splits of a list of files.

    Raises: DataError when the list is empty, or that names the entry when its file is missing or no
    whole image, or when images differ in shape or channels and no size is given.
    """
    if not listed:
        raise DataError(f"{source.target}: found no image in the list; expected one per row")
    bytes_of = torch.tensor([_bytes(one) for one in listed])
    items = [one.item for one in listed]
    classes = classes_of(items, source.listed("classes"))
    task = task_of(source, items, classes)
    by = by_of(source)
    rule = rule_of(source, 3 if ending(listed[0].path) in VOLUMES else 2)
    first = _one(listed[0], rule=rule)[0]
    shape, dtype = first.shape, first.dtype
    job = partial(_one, rule=rule)
    found = decoded(listed, job, shape, dtype, to_record(rule))
    card = Card(
        name=name,
        task=task,
        classes=classes,
        channels=shape[0],
        shape=tuple(shape[1:]),
        intensity=intensity_of(rule, dtype, ending(listed[0].path)),
    )
    rng = Rng(where.seed).child(source.kind)
    # What a model could cheat by is a fact of the image.
    made = assembled(items, found, card, rng, by, {"file bytes": bytes_of}, deal_of(source))
    ways = {ending(one.path) for one in listed}
    kinds = {(intensity_of(rule, dtype, way), way in VOLUMES) for way in ways}
    several = "files of several kinds, whose first names the rule of images" * (len(kinds) > 1)
    return depending(made, several)


def by_of(source: Source) -> str:
    """Read the option `by`: what images are parted by.

    Raises: UsageError when it is neither patient nor image.
    """
    by = source.options.get("by", BY[0])
    if by not in BY:
        raise UsageError(f"{source.kind}: found by={by}; expected patient or image")
    return by


def _bytes(one: Listed) -> int:
    """Return the size of a file, which must be there."""
    try:
        return int(stamp_of(one.path)[1])
    except DataError as error:
        raise DataError(f"{one.what}: {error}") from None


def intensity_of(rule: Rule, dtype: np.dtype[Any], kind: str) -> str:
    """Say in words by what rule the stored values of files with an ending became intensities."""
    if dtype == np.uint8:
        how = "8-bit values / 255"
    elif kind in PICTURES:
        how = "16-bit values / 65535"
    elif kind in VOLUMES:
        how = "0.5th to 99.5th percentile of the volume to 0..1, 16 bit"
    else:
        how = "rescaled, header's window (else 0.5th to 99.5th percentile) to 0..1, 16 bit"
    if rule.window is not None and kind not in PICTURES:
        how = f"window center {rule.window[0]:g} width {rule.window[1]:g} to 0..1, 16 bit"
    fit = f"; {rule.fit} to {'x'.join(map(str, rule.shape))}" if rule.shape else ""
    step = f"; {'x'.join(f'{s:g}' for s in rule.spacing)} mm" if rule.spacing else ""
    return how + fit + step


def _one(one: Listed, *, rule: Rule) -> Array:
    try:
        return read(one.path, rule)[None]
    except DataError as error:
        raise DataError(f"{one.what}: {error}") from None
