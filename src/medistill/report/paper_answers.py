"""The two questions of a study in a paper's words: variation, and what a random sample tells."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..formats import as_markdown, markdown
from ..indicator import SEED, Indicator
from ..judge import apart, permuted
from ..plan import BASELINES
from ..records import Json
from ..tabulate import Book, table
from .study_figures import LEAST_GAP
from .study_opened import Opened
from .words import listed

POOLED = (
    *("candidate", "error of accuracy", "families left out", "Pearson, pooled"),
    *("Spearman, pooled", "p", "p better"),
)
CLEAR = 0.05  # p-values below it are told
HOLDS = 0.5  # of rank correlations, above which the claim holds
TELLS = 0.3


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
    """Say in words whether methods close more of the gap where classes vary less, by budget."""
    told = []
    for ipc in found.book.names("ipc"):
        tied = {method: _tied(found, method, ipc) for method in found.methods}
        known = {method: one for method, one in tied.items() if one is not None}
        if not known:
            continue
        sure = {method: one for method, one in known.items() if one.p < CLEAR}
        more = [f"{method} ({one.rank:+.2f})" for method, one in sure.items() if one.rank > 0]
        less = [f"{method} ({one.rank:+.2f})" for method, one in sure.items() if one.rank < 0]
        ways = ((more, "where classes vary less within"), (less, "where they vary more"))
        parts = [
            f"{listed(names)} close{'s' if len(names) == 1 else ''} more of the gap {where}"
            for names, where in ways
            if names
        ]
        told.append(
            f"At {ipc} per class "
            + (" and ".join(parts) if parts else "no method's gap goes with variation")
            + f" (rank correlation with the Fisher ratio, p < {CLEAR} as if sources were "
            f"independent; {len(known)} methods were asked)."
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


def claim(indicator: Indicator) -> list[str]:
    """Say where the claim of arXiv 2407.14429 holds: a random sample predicts the distilled set.

    It holds where at each number of images per class the rank correlations of all methods have a
    mean above 0.5, and datasets that change places seldom correlate as well.
    """
    seed = indicator.report["accuracy"][SEED]
    best = indicator.report["accuracy"][indicator.chosen]
    ranks = [one["spearman"] for one in seed["budgets"].values()]
    gains = [one["gain_spearman"] for one in seed["budgets"].values() if "gain_spearman" in one]
    weak = [
        f"{method} at {ipc}"
        for method, by in seed["methods"].items()
        for ipc, one in by.items()
        if one["spearman"] <= HOLDS
    ]
    holds = min(ranks) > HOLDS and seed["p_value"] < CLEAR
    text = (
        "That a random sample's accuracy predicts the distilled set's "
        + ("holds" if holds else "does not hold")
        + f" at fixed images per class: Spearman {_span(ranks)}, means over methods (above "
        f"{HOLDS} at each, and p = {seed['p_value']:.2g})"
        + (f"; not for {listed(weak)}" if weak else ", and above it for each method")
        + f". Its mean absolute error on datasets whose families were left out is "
        f"{seed['family_error']:.3f}. "
    )
    if gains:
        tells = min(map(abs, gains)) > TELLS and len({gain > 0 for gain in gains}) == 1
        text += (
            "It "
            + ("also tells" if tells else "hardly tells")
            + f" what distillation adds: of the gain over random images Spearman is {_span(gains)}."
        )
    if indicator.chosen == SEED:
        return [text + " No candidate with more numbers errs less."]
    better = best["p_better"] < CLEAR
    groups = len(apart([one.families for one in indicator.examples]))
    return [
        f"{text} The best candidate, {indicator.chosen}, errs by {best['family_error']:.3f} ("
        + ("better by more than" if better else "not better by more than what")
        + f" chance gives: p = {best['p_better']:.3g}, by flipped signs of {groups} families of "
        f"datasets, pooled ones left out, which give no less than {0.5**groups:.3g}; by images "
        f"per class {', '.join(f'{p:.3g}' for p in best['p_better_at'])})."
    ]


def _span(values: Sequence[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


def noise_floor(found: Opened) -> tuple[float, int]:
    """Return the error that a prediction of every method's true mean accuracy would have here.

    And of how many sources its deviations are.

    The mean over (source, method, budget) of sqrt(2 / pi) s / sqrt(n): n syntheses, s the root mean
    square of the standard deviations of that method and budget over sources with several. nan where
    no source has several.
    """
    spread: dict[tuple[str, int], list[float]] = {}
    several_of: set[str] = set()
    counts: dict[tuple[str, int], list[int]] = {}
    for (source, method, ipc, backbone), group in found.book.groups.items():
        if method in BASELINES or backbone != found.backbone:
            continue
        values = group.scores("accuracy")
        counts.setdefault((method, ipc), []).append(len(values))
        if len(values) > 1:
            several_of.add(source)
            spread.setdefault((method, ipc), []).append(float(np.var(values, ddof=1)))
    errors = [
        math.sqrt(2 / math.pi * float(np.mean(spread[place])) / count)
        for place, several in counts.items()
        if place in spread
        for count in several
    ]
    return (float(np.mean(errors)) if errors else math.nan), len(several_of)


def sample(indicator: Indicator, floor: tuple[float, int]) -> list[str]:
    """Say how well each candidate for the indicator predicts datasets that it has not seen."""
    parts = ["## The indicator"]
    parts.append(
        "Students were trained on 1 to 20 random images per class (drawn apart from the study's "
        "random images) and scored on the validation split. Candidates predict each method's test "
        "score on a dataset from others: all others, or those of which none is made of the same "
        "images (families left out: the error that a new dataset should expect, by which the "
        "candidate is chosen and intervals are made). At fixed images per class, means over "
        "methods. Correlations are those of predictions with that dataset alone left out, which "
        "lean to the negative where there is little to tell; of a single number they are its own:"
    )
    for metric in ("accuracy", "auc"):
        rows = []
        for name, one in indicator.report[metric].items():
            for ipc, at in one["budgets"].items():
                rows.append((name, ipc, *_judged(at)))
        head = ("candidate", "ipc", "error", "error, families left out", "Spearman", "Pearson")
        more = ("80% intervals hold", "gain, Spearman", "share of all data's, Spearman")
        parts.append(f"Of {metric}:\n\n" + markdown((*head, *more), rows))
    pooled = []
    for name, one in indicator.report["accuracy"].items():
        numbers = (one["error"], one["family_error"])
        pooled_both = (one["pooled_pearson"], one["pooled_spearman"])
        tests = (f"{one['p_value']:.2g}", f"{one['p_better']:.2g}")
        pooled.append((name, *(f"{x:.3f}" for x in (*numbers, *pooled_both)), *tests))
    parts.append(
        "Over all budgets at once; pooled correlations are high because larger budgets and easier "
        "datasets score higher whatever the method does. p: datasets permuted, as if independent; "
        "p better: signs flipped of families, pooled sets left out, against random accuracy "
        "alone:\n\n" + markdown(POOLED, pooled)
    )
    parts.append(
        f"Kept: {indicator.chosen}, from {len(indicator.examples)} datasets. Being the best of "
        f"{len(indicator.report['accuracy'])} on the same datasets, its error is a little "
        "flattered."
    )
    error, sources = floor
    if math.isfinite(error):
        parts.append(
            "What is missing: accuracies of few syntheses scatter, so even a prediction of each "
            f"method's true mean would err here by {error:.3f} on average (by the scatter on the "
            f"{sources} sources that have several), before that of the test split; the rest is "
            "what the sample does not tell."
        )
    return [*parts, *_by_method(indicator)]


def _by_method(indicator: Indicator) -> list[str]:
    """Return the errors of the kept candidate, and the seed's correlations, method by method."""
    accuracy, auc = (indicator.report[name][indicator.chosen] for name in ("accuracy", "auc"))
    budgets = list(accuracy["budgets"])
    head = ("method", *(f"{ipc} per class" for ipc in budgets))
    rows = []
    for method, found in accuracy["methods"].items():
        both = (found, auc["methods"][method])
        cells = [
            " / ".join(f"{one[ipc]['error']:.3f}" for one in both if ipc in one) for ipc in budgets
        ]
        rows.append((method, *cells))
    ranks = [
        (method, *(f"{one[ipc]['spearman']:+.2f}" if ipc in one else "" for ipc in budgets))
        for method, one in indicator.report["accuracy"][SEED]["methods"].items()
    ]
    return [
        "Its error by method, of accuracy and of AUC, one dataset left out:",
        markdown(head, rows),
        "Spearman correlation of the random sample's accuracy with what each method reached:",
        markdown(head, ranks),
    ]


def _judged(at: Json) -> tuple[str, ...]:
    first = ["" if at[name] is None else f"{at[name]:.3f}" for name in ("error", "family_error")]
    ranks = [
        f"{at[name]:.2f}" if name in at else ""
        for name in ("spearman", "pearson", "gain_spearman", "share_spearman")
    ]
    held = "" if at["coverage"] is None else f"{100 * at['coverage']:.0f}%"
    return (*first, *ranks[:2], held, *ranks[2:])
