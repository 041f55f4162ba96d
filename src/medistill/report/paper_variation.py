"""What a study says of variation, in a paper's words: gaps closed by source, kind and design."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..formats import as_markdown, markdown
from ..judge import permuted
from ..tabulate import Book, table
from .study_figures import LEAST_GAP
from .study_opened import Opened
from .words import listed

CLEAR = 0.05  # p-values below it are told
REAL, POOLED_KIND = "real", "pooled"  # groups of sources: sets alone, and several made one


def _gaps(found: Opened, method: str, ipc: int, among: Sequence[str]) -> dict[str, float]:
    gaps = {}
    for source in among:
        own = found.book.score("gap_closed", source, method, ipc, found.backbone)
        if own is not None and found.book.gap(source, ipc, found.backbone) >= LEAST_GAP:
            gaps[source] = own.mean
    return gaps


def variation(found: Opened) -> list[str]:
    """Say how the gap closed goes with variation: over sources, by kind, over the designed ones."""
    budgets = found.book.names("ipc")
    kinds = dict.fromkeys(data.group for data in found.study.sources if data.group)
    parts = [
        "## Variation",
        "Gap closed = (method - random) / (all data - random), of accuracy. Sources where all "
        f"data is less than {100 * LEAST_GAP:.0f} points above random images are left out.",
    ]
    rows = []
    for method in found.methods:
        tied = [_tied(found, method, ipc) for ipc in budgets]
        rows.append((method, *("" if one is None else one.text for one in tied)))
    head = ("method", *(f"{ipc} per class" for ipc in budgets))
    parts += [
        "Spearman correlation over sources between the Fisher ratio (spread between classes over "
        "spread within, small: great variation within classes) and the gap closed, with its "
        "two-sided permutation p, as if sources were independent, not corrected for their number:",
        markdown(head, rows),
    ]
    if kinds:
        parts += ["Median gap closed by kind of source:", _by_kind(found, list(kinds))]
    designed = [one for one in found.study.sources if one.variation is not None]
    if designed:
        parts.append(
            "Phantoms whose variation alone moves (0: classes differ by a subtle texture; 1: they "
            "are other anatomies), accuracy in percent:"
        )
        titles = {one.title for one in designed}
        rows_ = [r for g in found.book.groups.values() for r in g.rows if r["source"] in titles]
        part = Book(rows_, found.study.every_budget)
        made = table(
            part, rows=("ipc", "source"), metric="accuracy", fixed={"backbone": found.backbone}
        )
        parts.append(as_markdown(made))
    return parts


class Tied(NamedTuple):
    """A rank correlation of gaps closed with Fisher ratios, and how likely chance gives it."""

    rank: float
    p: float
    sources: int

    @property
    def text(self) -> str:
        """The numbers as tables print them."""
        return f"{self.rank:+.2f} (p = {self.p:.2g}, {self.sources} sources)"


def _tied(found: Opened, method: str, ipc: int) -> Tied | None:
    from scipy.stats import spearmanr

    gaps = _gaps(found, method, ipc, found.book.names("source"))
    known = [
        (found.measured[source]["variation"]["fisher"], gap)
        for source, gap in gaps.items()
        if source in found.measured
    ]
    if len(known) < 5:
        return None
    fisher, gap = np.array(known).T
    if np.ptp(fisher) == 0 or np.ptp(gap) == 0:
        return None
    rank = float(spearmanr(fisher, gap).statistic)
    p = min(1.0, 2 * permuted(fisher if rank > 0 else -fisher, gap))
    return Tied(rank, p, len(known))


def by_variation(found: Opened) -> list[str]:
    """Say in words whether methods close more of the gap where classes vary less, by budget.

    And how many designed sources leave a gap to close, and how pooled sources differ from sets
    alone.
    """
    return [*_by_fisher(found), *_of_design(found), *_pooled(found)]


def _by_fisher(found: Opened) -> list[str]:
    told = []
    for ipc in found.book.names("ipc"):
        tied = {method: _tied(found, method, ipc) for method in found.methods}
        known = {method: one for method, one in tied.items() if one is not None}
        if not known:
            continue
        sure = {method: one for method, one in known.items() if one.p < CLEAR}
        more = [f"{method} ({one.rank:+.2f})" for method, one in sure.items() if one.rank > 0]
        less = [f"{method} ({one.rank:+.2f})" for method, one in sure.items() if one.rank < 0]
        said = _closing(
            (more, "more of the gap where classes lie further apart for their spread"),
            (less, "more of the gap where they lie closer"),
        )
        told.append(
            f"At {ipc} per class "
            + (said or "no link of a gap with variation is shown")
            + f" (rank correlation with the Fisher ratio over {_counts(known)} sources, p < "
            f"{CLEAR} as if they were independent; {len(known)} methods were asked)."
        )
    return told


def _closing(*ways: tuple[Sequence[str], str]) -> str:
    """Say which methods close how much of the gap; nothing where no way has one."""
    return " and ".join(
        f"{listed(names)} close{'s' if len(names) == 1 else ''} {what}"
        for names, what in ways
        if names
    )


def _counts(known: dict[str, Tied]) -> str:
    counts = sorted({one.sources for one in known.values()})
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def _of_design(found: Opened) -> list[str]:
    """Say on how many sources of the design a method has something to add to random images."""
    designed = [one.title for one in found.study.sources if one.variation is not None]
    budgets = found.book.names("ipc")
    if not designed or not budgets:
        return []
    left = [
        sum(found.book.gap(title, ipc, found.backbone) >= LEAST_GAP for title in designed)
        for ipc in budgets
    ]
    return [
        f"Of {len(designed)} sources whose variation alone moves, random images are "
        f"{100 * LEAST_GAP:.0f} points or more below all data on "
        f"{listed([str(count) for count in left])} (at "
        f"{listed([str(ipc) for ipc in budgets])} per class): the more classes "
        "differ, the fewer random images do the same as all."
    ]


def _pooled(found: Opened) -> list[str]:
    """Say by which methods more of the gap is closed on pooled sources than on sets alone."""
    among = {
        kind: [data.title for data in found.study.sources if data.group == kind]
        for kind in (REAL, POOLED_KIND)
    }
    told = []
    for ipc in found.book.names("ipc"):
        more: list[str] = []
        less: list[str] = []
        sizes = 0, 0
        for method in found.methods:
            alone, pooled = (
                list(_gaps(found, method, ipc, names).values()) for names in among.values()
            )
            if min(len(alone), len(pooled)) > 1:
                sizes = len(alone), len(pooled)
                (more if np.median(pooled) > np.median(alone) else less).append(method)
        if said := _closing((more, "more of the gap"), (less, "less of the gap")):
            told.append(
                f"On {sizes[1]} pooled sources against {sizes[0]} sets alone, at {ipc} per class "
                f"{said} (medians of so few: no more than a hint)."
            )
    return told


def _by_kind(found: Opened, kinds: Sequence[str]) -> str:
    rows = []
    for method in found.methods:
        for ipc in found.book.names("ipc"):
            cells = []
            for kind in kinds:
                among = [data.title for data in found.study.sources if data.group == kind]
                gaps = list(_gaps(found, method, ipc, among).values())
                cells.append(f"{100 * float(np.median(gaps)):.0f}% of {len(gaps)}" if gaps else "")
            rows.append((method, str(ipc), *cells))
    return markdown(("method", "ipc", *kinds), rows)
