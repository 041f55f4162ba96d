"""The two questions of a study in a paper's words: variation, and what a random sample tells."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from ..indicator import SEED, Indicator
from ..judge import permuted
from ..records import Json
from ..tabulate import Book, as_markdown, table
from .study import Opened
from .study_figures import LEAST_GAP
from .words import markdown

POOLED = (
    *("candidate", "error of accuracy", "Pearson, pooled", "Spearman, pooled"),
    *("p", "p better"),
)
CLEAR = 0.05  # p-values below it are told


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
        cells = []
        for ipc in budgets:
            cells.append(
                _tied(_gaps(found, method, ipc, found.book.names("source")), found.measured)
            )
        rows.append((method, *cells))
    head = ("method", *(f"{ipc} per class" for ipc in budgets))
    parts += [
        "Spearman correlation over sources between the Fisher ratio (spread between classes over "
        "spread within, small: great variation within classes) and the gap closed, with its "
        "two-sided permutation p:",
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
        part = Book(rows_, found.study.budgets)
        made = table(
            part, rows=("ipc", "source"), metric="accuracy", fixed={"backbone": found.backbone}
        )
        parts.append(as_markdown(made))
    return parts


def _tied(gaps: Mapping[str, float], measured: Mapping[str, Json]) -> str:
    """Return the rank correlation of gaps with Fisher ratios and how likely chance gives it."""
    from scipy.stats import spearmanr

    known = [(measured[s]["variation"]["fisher"], gap) for s, gap in gaps.items() if s in measured]
    if len(known) < 5:
        return ""
    fisher, gap = np.array(known).T
    found = float(spearmanr(fisher, gap).statistic)
    p = min(1.0, 2 * permuted(fisher if found > 0 else -fisher, gap))
    return f"{found:+.2f} (p = {p:.2g}, {len(known)} sources)"


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
    """Say where the claim of arXiv 2407.14429 holds: a random sample predicts the distilled set."""
    seed = indicator.report["accuracy"][SEED]
    best = indicator.report["accuracy"][indicator.chosen]
    ranks = [one["spearman"] for one in seed["budgets"].values()]
    gains = [one.get("gain_spearman", math.nan) for one in seed["budgets"].values()]
    holds = min(ranks) > 0.5 and seed["p_value"] < CLEAR
    text = (
        "That a random sample's accuracy predicts the distilled set's "
        + ("holds" if holds else "does not hold")
        + f" at fixed images per class: Spearman {_span(ranks)}, mean absolute error "
        f"{seed['error']:.3f} on datasets left out (p = {seed['p_value']:.2g}). "
    )
    tells = min(gains) > 0.3
    text += (
        "It "
        + ("also tells" if tells else "hardly tells")
        + f" what distillation adds: of the gain over random images Spearman is {_span(gains)}. "
    )
    if indicator.chosen != SEED:
        text += (
            f"The best candidate, {indicator.chosen}, errs by {best['error']:.3f} (better by more "
            f"than chance: p = {best['p_better']:.2g})."
        )
    else:
        text += "No candidate with more numbers errs less."
    return [text]


def _span(values: Sequence[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


def sample(indicator: Indicator) -> list[str]:
    """Say how well each candidate for the indicator predicts datasets that it has not seen."""
    parts = ["## The indicator"]
    parts.append(
        "Students were trained on 1 to 20 random images per class (none of them among the study's "
        "random images) and scored on the validation split. Candidates predict each method's test "
        "score on a dataset from the others alone. At fixed images per class, means over methods:"
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
        numbers = (one["error"], one["pooled_pearson"], one["pooled_spearman"])
        tests = (f"{one['p_value']:.2g}", f"{one['p_better']:.2g}")
        pooled.append((name, *(f"{x:.3f}" for x in numbers), *tests))
    parts.append(
        "Over all budgets at once; pooled correlations are high because larger budgets and easier "
        "datasets score higher whatever the method does. p: datasets permuted; p better: signs "
        "flipped, against the random accuracy alone:\n\n" + markdown(POOLED, pooled)
    )
    parts.append(
        f"Kept: {indicator.chosen}, from {len(indicator.examples)} datasets. Being the best of "
        f"{len(indicator.report['accuracy'])} on the same datasets, its error is a little "
        "flattered."
    )
    return [*parts, *_by_method(indicator)]


def _by_method(indicator: Indicator) -> list[str]:
    """Return the errors of the kept candidate on datasets left out, method by method."""
    accuracy, auc = (indicator.report[name][indicator.chosen] for name in ("accuracy", "auc"))
    if "methods" not in accuracy:  # an indicator that was fitted before they were told
        return []
    budgets = list(accuracy["budgets"])
    rows = []
    for method, errors in accuracy["methods"].items():
        both = (errors, auc["methods"][method])
        cells = [" / ".join(f"{one[ipc]:.3f}" for one in both if ipc in one) for ipc in budgets]
        rows.append((method, *cells))
    shown = markdown(("method", *(f"{ipc} per class" for ipc in budgets)), rows)
    return ["Its error by method, of accuracy and of AUC:", shown]


def _judged(at: Json) -> tuple[str, ...]:
    names = ("error", "family_error", "spearman", "pearson")
    first = [f"{at[name]:.3f}" if "error" in name else f"{at[name]:.2f}" for name in names]
    gains = [
        f"{at[name]:.2f}" if name in at else "" for name in ("gain_spearman", "share_spearman")
    ]
    return (*first, f"{100 * at['coverage']:.0f}%", *gains)
