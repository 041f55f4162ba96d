"""What a study shows, in words made from its numbers."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..metrics import Score, score
from ..tabulate import Book
from .study_figures import methods_of
from .words import apart, listed

FEWEST = 3  # sources, below which no word is said about a method


class Against(NamedTuple):
    """One method against random images at one budget, over sources.

    `settled` is on how many of them both have an interval, so that these can part.
    """

    method: str
    sources: int
    settled: int
    gain: float
    above: int
    below: int
    gains: tuple[float, ...]


def against_random(book: Book, ipc: int, backbone: str, metric: str = "accuracy") -> list[Against]:
    """Return each method's mean gain over random images, and where intervals part; best first."""
    found = []
    for method in methods_of(book):
        pairs: list[tuple[Score, Score]] = []
        for source in book.names("source"):
            own = book.score(metric, source, method, ipc, backbone)
            base = book.score(metric, source, "random", ipc, backbone)
            if own is not None and base is not None:
                pairs.append((own, base))
        if pairs:
            gains = [own.mean - base.mean for own, base in pairs]
            beyond = [gain for gain, pair in zip(gains, pairs, strict=True) if apart(*pair)]
            above = sum(gain > 0 for gain in beyond)
            mean = float(np.mean(gains))
            below = len(beyond) - above
            settled = sum(own.high is not None and base.high is not None for own, base in pairs)
            found.append(Against(method, len(pairs), settled, mean, above, below, tuple(gains)))
    return sorted(found, key=lambda one: -one.gain)


def findings(book: Book, backbone: str, states: dict[str, int]) -> tuple[list[str], list[str]]:
    """Return paragraphs on what the numbers show, and the warnings they call for."""
    told, warned = [], []
    total, done = sum(states.values()), states.get("done", 0)
    sources = book.names("source")
    told.append(
        f"{len(sources)} sources and {len(methods_of(book))} methods at "
        f"{listed([str(ipc) for ipc in book.budgets])} images per class; {done:,} of {total:,} "
        "cells are done."
    )
    if states.get("missing"):
        warned.append(
            f"{states['missing']:,} cells have not been run: what follows may change with them."
        )
    if states.get("refused"):
        warned.append(
            f"{states['refused']:,} cells were refused, as of classes with too few images."
        )
    if changed := book.changed():
        warned.append(
            f"Cells of {listed(changed)} were made of data with different digests: its files "
            "changed while the study ran, or its phantoms were drawn on another kind of processor, "
            "which moves a few pixels by one gray level."
        )
    if len(made := book.made_by()) > 1:
        warned.append(f"Its cells were made by {listed(made)}: sums round by it.")
    if states.get("failed"):
        warned.append(f"{states['failed']:,} cells failed: see `medistill study status`.")
    for ipc in book.names("ipc"):
        found = [one for one in against_random(book, ipc, backbone) if one.sources >= FEWEST]
        if not found:
            continue
        told.append(_at(ipc, found))
    alone = [
        one
        for key, one in book.groups.items()
        if key[1] not in ("random", "full") and len(one.scores("accuracy")) < 2
    ]
    if alone:
        warned.append(
            f"{len(alone):,} numbers come from one synthesis: without an interval no difference "
            "is settled."
        )
    return told, warned


def _at(ipc: int, found: Sequence[Against]) -> str:
    best, last = found[0], found[-1]
    text = (
        f"At {ipc} per class {best.method} "
        + ("gains most over" if best.gain > 0 else "loses least to")
        + f" as many random images: {100 * best.gain:+.1f} points of accuracy on average over "
        f"{best.sources} sources"
    )
    if best.settled:
        text += f", beyond both intervals on {best.above} of {best.settled} that have them"
        text += f" and behind on {best.below}" if best.below else ""
    text += "."
    means = {one.method: score(list(one.gains)) for one in found}
    worse = [name for name, one in means.items() if one.high is not None and one.high < 0]
    level = [
        name
        for name, one in means.items()
        if one.low is not None and one.high is not None and one.low <= 0 <= one.high
    ]
    if worse:
        text += f" {listed(worse)} stay{'s' if len(worse) == 1 else ''} behind random images."
    if level:
        text += f" {listed(level)} cannot be told from them on average."
    if not worse and not level and last is not best:
        text += f" {last.method} gains least ({100 * last.gain:+.1f})."
    return text
