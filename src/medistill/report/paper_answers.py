"""What a random sample tells of distillation, in a paper's words."""

import math
from collections.abc import Sequence

import numpy as np

from ..formats import markdown
from ..indicator import SEED, Indicator
from ..judge import apart
from ..plan import BASELINES
from ..records import Json
from .paper_variation import CLEAR
from .study_opened import Opened
from .words import listed

POOLED = (
    *("candidate", "error of accuracy", "families left out", "Pearson, pooled"),
    *("Spearman, pooled", "p", "p better"),
)
HOLDS = 0.5  # of rank correlations, above which the claim holds
TELLS = 0.3  # of their mean size
AIM = 0.04  # mean absolute error of accuracy below which a prediction replaces a trial


def claim(indicator: Indicator) -> list[str]:
    """Say where the claim of arXiv 2407.14429 holds: a random sample predicts the distilled set.

    It holds where at each number of images per class the rank correlations of all methods have a
    mean above 0.5, and datasets that change places seldom correlate as well.
    """
    seed = indicator.report["accuracy"][SEED]
    ranks = [one["spearman"] for one in seed["budgets"].values()]
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
        f"{HOLDS} at each, and p = {seed['p_value']:.2g} as if datasets were independent)"
        + (f"; not for {listed(weak)}" if weak else ", and above it for each method")
        + f". Its mean absolute error on datasets whose families were left out is "
        f"{seed['family_error']:.3f}. "
    )
    text += _told_of_gains(seed["methods"])
    if indicator.chosen == SEED:
        return [text + " No candidate with more numbers errs less."]
    return [text + _best_candidate(indicator)]


def _told_of_gains(methods: Json) -> str:
    """Say whether the random score tells what distillation adds to it, by method."""
    ranks = {
        (method, ipc): one["gain_spearman"]
        for method, by in methods.items()
        for ipc, one in by.items()
        if "gain_spearman" in one
    }
    if not ranks:
        return ""
    sizes = [
        float(np.mean([abs(rank) for (_, at), rank in ranks.items() if at == ipc]))
        for ipc in dict.fromkeys(at for _, at in ranks)
    ]
    least, most = min(ranks, key=lambda key: ranks[key]), max(ranks, key=lambda key: ranks[key])
    ends = [f"{method} at {ipc} {ranks[method, ipc]:+.2f}" for method, ipc in (least, most)]
    between = f"from {ends[0]} to {ends[1]}" if least != most else ends[0]
    return (
        "It "
        + ("also tells" if min(sizes) > TELLS else "hardly tells")
        + " what distillation adds, each method in its own way: its rank correlations with the "
        f"gain over random images go {between} (mean size {_span(sizes)}; below 0: the more random "
        "images give, the less is added)."
    )


def _best_candidate(indicator: Indicator) -> str:
    """Say whether the best candidate is better than the seed's number by more than chance."""
    report = indicator.report["accuracy"]
    seed, best = report[SEED], report[indicator.chosen]
    groups, rivals = len(apart([one.families for one in indicator.examples])), len(report) - 1
    fair = min(1.0, rivals * best["p_better"])
    by = [
        f"{mine['family_error']:.3f} against {other['family_error']:.3f} at {ipc}"
        for (ipc, mine), other in zip(
            best["budgets"].items(), seed["budgets"].values(), strict=True
        )
        if mine["family_error"] is not None and other["family_error"] is not None
    ]
    return (
        f" The best candidate, {indicator.chosen}, errs by {best['family_error']:.3f}"
        + (f" ({listed(by)} per class); " if by else "; ")
        + ("better by more than" if fair < CLEAR else "not shown to be better by more than what")
        + f" chance gives once {rivals} were tried: p = {fair:.2g}, {rivals} times that of its "
        f"own, {best['p_better']:.3g} by flipped signs of {groups} families of datasets (pooled "
        f"ones left out), which give no less than {0.5**groups:.3g}; by images per class "
        f"{', '.join(f'{p:.3g}' for p in best['p_better_at'])}."
    )


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
    return [*parts, *_missing(indicator, floor), *_by_method(indicator)]


def _missing(indicator: Indicator, floor: tuple[float, int]) -> list[str]:
    """Say how far the kept candidate is from this project's goal, and what its error is made of."""
    best, (error, sources) = indicator.report["accuracy"][indicator.chosen], floor
    reached = [
        method
        for method, by in best["methods"].items()
        if float(np.mean([one["error"] for one in by.values()])) <= AIM
    ]
    met = best["error"] <= AIM
    text = (
        f"What is missing: the goal was an error of {AIM} with a dataset left out, and it was "
        + ("met" if met else "not met")
        + f" ({best['error']:.3f}"
        + (f"; {listed(reached)} alone: {AIM} or less" if reached and not met else "")
        + "). "
    )
    if math.isfinite(error):
        text += (
            "Accuracies of few syntheses scatter, so even a prediction of each method's true mean "
            f"would err here by {error:.3f} on average (by the scatter on the {sources} sources "
            "that have several), before the scatter of the test split. "
        )
    if math.isfinite(best["family_error"]):
        text += (
            f"That it errs by {best['family_error']:.3f} where whole families are left out, from "
            "the same samples, says that more kinds of data to learn from would help; samples of "
            "few draws, scored on small validation splits, scatter too. How much of the rest a "
            "sample cannot tell is not known."
        )
    return [text]


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
    names = ("spearman", "gain_spearman")
    ranks = [
        (
            method,
            *(
                " / ".join(f"{one[ipc][name]:+.2f}" for name in names if name in one[ipc])
                if ipc in one
                else ""
                for ipc in budgets
            ),
        )
        for method, one in indicator.report["accuracy"][SEED]["methods"].items()
    ]
    return [
        "Its error by method, of accuracy and of AUC, one dataset left out:",
        markdown(head, rows),
        "Spearman correlation of the random sample's accuracy with what each method reached, and "
        "with its gain over random images:",
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
