"""What a study found, as Markdown in a paper's order; every number is read from its rows."""

import math
from collections import Counter
from pathlib import Path

import numpy as np

from ..formats import as_markdown, markdown, text_of
from ..judge import flipped
from ..methods import make
from ..metrics import score
from ..plan import BASELINES, grid
from ..progress import DONE
from ..records import to_record, write_atomic
from ..tabulate import table
from .paper_answers import claim, noise_floor, sample
from .paper_variation import by_variation, variation
from .study_opened import Opened
from .study_words import FEWEST, Against, against_random, findings
from .words import listed

BLIND = 0.02  # of balanced accuracy above chance, below which a student names one class
FEW_STEPS = 0.001  # of a paper's steps
OURS = "ours"  # what a method of no paper calls it


def study_paper(found: Opened, out: Path) -> None:
    """Write the findings of a study, with what its indicator was judged as.

    Raises: RunRefused when `out` cannot be written.
    """
    write_atomic(out, paper(found).encode())


def paper(found: Opened) -> str:
    """Return the page as text."""
    indicator = found.indicator
    by = " --indicator indicator.json" if indicator else ""
    parts = [
        f"# What the study {found.study.name} found",
        f"Written by `medistill report {found.folder.path}{by} --out findings.md` from the study's "
        "rows; no number is typed by hand.",
        *_short(found),
        *_protocol(found),
        *_gains(found),
        *variation(found),
        *(sample(indicator, noise_floor(found)) if indicator else ()),
        *_cost(found),
        *_surprises(found),
        *_limits(found),
        *_scores(found),
    ]
    # Names are the study's: none of them is markup.
    return "\n\n".join(parts).replace("<", "&lt;") + "\n"


def _short(found: Opened) -> list[str]:
    # Rows tell of no cell without numbers, so that it failed is all that a page says of one.
    failed = {"failed": found.states["failed"]}
    told, warned = findings(found.book, found.backbone, failed)
    asked = [one for one in found.entries if one.cell.kind != "measure"]
    known = sum(one.state == DONE for one in asked)
    first = (
        f"{len(found.book.names('source'))} sources and {len(found.methods)} methods at "
        f"{listed([str(ipc) for ipc in found.book.budgets])} images per class; {known:,} of "
        f"{len(asked):,} cells have numbers (Limits says which have none)."
    )
    answers = [*by_variation(found), *(claim(found.indicator) if found.indicator else ())]
    points = [first, *told[1:], *unlike(found), *short_runs(found), *answers, *warned]
    return ["## In short", "\n".join(f"- {text}" for text in points)]


def _protocol(found: Opened) -> list[str]:
    study, protocol = found.study, found.study.protocol
    chosen = (
        "by random images of the same number, whose choice serves all methods"
        if protocol.tuning == "random"
        else "by pilots of each set"
    )
    text = (
        f"{study.about} Distilled and trained with {listed(study.backbones)}; {_syntheses(found)}, "
        f"{protocol.students} student on each; {protocol.random} draws of random images; "
        f"{protocol.full} trainings on all data. A student makes "
        f"{protocol.steps} steps of {protocol.batch} images. Learning rate (of "
        f"{listed([str(rate) for rate in protocol.rates])}) and stop were chosen on the validation "
        f"split {chosen}. The test split was read once by each student at its end and chose "
        "nothing. Intervals: 95%, Student's t over syntheses (random images: over draws); of the "
        "gap closed: three standard errors."
    )
    text = " ".join([text, *unlike(found)])
    rows = []
    for data in study.sources:
        group = found.book.group(data.title, "full", 0, found.backbone)
        if group is None:
            continue
        first, full = group.rows[0], score(group.scores("accuracy"))
        fisher = found.measured.get(data.title, {}).get("variation", {}).get("fisher", math.nan)
        facts = (str(first["classes"]), str(first["train"]), f"{fisher:.3f}")
        rows.append((data.title, data.group, *facts, text_of(full, "accuracy")))
    head = ("source", "kind", "classes", "training images", "Fisher ratio", "all data, accuracy")
    return ["## Protocol", text, markdown(head, rows)]


def unlike(found: Opened) -> list[str]:
    """Say whose stored images are more than images, so that numbers alike are no sets alike."""
    made = {way.title: make(way.method, way.settings) for way in found.study.methods}
    factors = {title: getattr(each, "factor", 1) for title, each in made.items()}
    told = [
        f"An image of {title} is {factor} x {factor} tiles ({factor} x {factor} x {factor} of a "
        "volume), each of which a student trains on as an image of its own; random images and "
        "those of other methods are whole, and no arm of random tiles shows what tiles alone give."
        for title, factor in factors.items()
        if factor > 1
    ]
    if soft := [title for title, each in made.items() if each.soft_labels]:
        told.append(f"Labels of {listed(soft)} are learned and soft, all others hard.")
    if means := [title for title, each in made.items() if each.start == "class-mean"]:
        told.append(
            f"Images of {listed(means)} start from class means; no arm shows what these alone give."
        )
    return told


def _syntheses(found: Opened) -> str:
    """Say how many syntheses the numbers hold, of how many asked for."""
    counts = Counter(
        len({row["synthesis"] for row in group.rows})
        for key, group in found.book.groups.items()
        if key[1] not in BASELINES
    )
    parts = [f"{count:,} of {made}" for made, count in sorted(counts.items(), reverse=True)]
    return (
        f"{found.study.seeds} syntheses of each method asked for ({listed(parts)} syntheses among "
        f"{sum(counts.values()):,} numbers)"
    )


def _gains(found: Opened) -> list[str]:
    text = (
        "Points of accuracy above as many random real images: mean over sources with its 95% "
        "interval; then on how many sources both intervals part, above and below, of those where "
        "both have one; then the p-value of a sign-flip test over sources (one-sided, as if they "
        "were independent, not corrected for the number of methods)."
    )
    budgets = found.book.names("ipc")
    head = ("method", *(f"{ipc} per class" for ipc in budgets))
    tables = {}
    for metric in ("accuracy", "balanced_accuracy"):
        against = {
            (one.method, ipc): one
            for ipc in budgets
            for one in against_random(found.book, ipc, found.backbone, metric)
        }
        rows = [
            (method, *(_gain(against.get((method, ipc))) for ipc in budgets))
            for method in found.methods
        ]
        tables[metric] = markdown(head, rows)
    best = [_best(found, ipc) for ipc in budgets]
    balanced = (
        "The same of balanced accuracy, which does not rise where a student names the larger "
        "class more often:"
    )
    parts = ["## Against random images", text, tables["accuracy"], balanced]
    return [*parts, tables["balanced_accuracy"], *_one_class(found), " ".join(filter(None, best))]


def _one_class(found: Opened) -> list[str]:
    """Say whose accuracy is above random images' though its students name one class."""
    told = []
    for ipc in found.book.names("ipc"):
        for source in found.book.names("source"):
            base = found.book.group(source, "random", ipc, found.backbone)
            for method in found.methods:
                own = found.book.group(source, method, ipc, found.backbone)
                if own is None or base is None:
                    continue
                least = 1 / int(own.rows[0]["classes"]) + BLIND
                means = [float(np.mean(one.scores("accuracy"))) for one in (own, base)]
                balanced = float(np.mean(own.scores("balanced_accuracy")))
                if means[0] > means[1] and balanced < least:
                    told.append(f"{method} on {source} at {ipc}")
    if not told:
        return []
    return [
        "More accurate than random images, but by naming the larger class: balanced accuracy less "
        f"than {100 * BLIND:.0f} points above chance for {listed(told)}."
    ]


def _gain(one: Against | None) -> str:
    if one is None:
        return ""
    gains = np.array(one.gains)
    p = flipped(-gains, np.zeros_like(gains))
    return (
        f"{text_of(score(list(one.gains)), 'accuracy')}; {one.above} above, {one.below} below of "
        f"{one.settled}; p = {p:.2g}"
    )


def _best(found: Opened, ipc: int) -> str:
    """Say which method has the best mean, alone, on how many sources."""
    wins: dict[str, int] = {}
    ties = 0
    for source in found.book.names("source"):
        means = {}
        for method in (*found.methods, "random"):
            own = found.book.score("accuracy", source, method, ipc, found.backbone)
            if own is not None:
                means[method] = own.mean
        if len(means) > 1:
            best = [name for name, mean in means.items() if mean == max(means.values())]
            ties += len(best) > 1
            if len(best) == 1:
                wins[best[0]] = wins.get(best[0], 0) + 1
    if not wins:
        return ""
    order = sorted(wins.items(), key=lambda pair: -pair[1])
    return (
        f"At {ipc} per class the best mean is that of "
        + listed([f"{name} on {count}" for name, count in order])
        + f" of {sum(wins.values()) + ties} sources"
        + (f"; on {ties} several are best alike." if ties else ".")
    )


def _cost(found: Opened) -> list[str]:
    rows = []
    for method in found.methods:
        cells = []
        for ipc in found.book.names("ipc"):
            spent = [
                one.mean
                for source in found.book.names("source")
                if (one := found.book.score("distill_seconds", source, method, ipc, found.backbone))
            ]
            cells.append(f"{float(np.median(spent)):.1f} s" if spent else "")
        rows.append((method, *cells))
    head = ("method", *(f"{ipc} per class" for ipc in found.book.names("ipc")))
    return [
        "## Cost",
        "Median seconds of a distillation over sources, on the study's machine, beside other work. "
        "What a method prepares once for all budgets and syntheses of a source (experts, banks, "
        "sketches, the network that herding and kcenter choose by) is not in them.",
        markdown(head, rows),
        _hours(found),
    ]


def _hours(found: Opened) -> str:
    """Say what all cells took, by their rows."""
    rows = [row for group in found.book.groups.values() for row in group.rows]
    made = {row["key"]: row["distill_seconds"] or 0.0 for row in rows}
    hours = (sum(made.values()) + sum(row["seconds"] for row in rows)) / 3600
    return (
        f"Together distillations and students took {hours:.1f} hours of single processes; what "
        "was prepared, and the choice of rates, is not in them."
    )


def _surprises(found: Opened) -> list[str]:
    told = []
    for ipc in found.book.names("ipc"):
        above = []
        for source in found.book.names("source"):
            full = found.book.score("accuracy", source, "full", 0, found.backbone)
            for method in found.methods:
                own = found.book.score("accuracy", source, method, ipc, found.backbone)
                if own and full and (own.low or 0) > (1 if full.high is None else full.high):
                    above.append(f"{method} on {source}")
        if above:
            told.append(
                f"At {ipc} per class {len(above)} sets beat all data beyond both intervals: "
                f"{listed(above)}."
                + (
                    " Students stop where random images of that number chose, all data where its "
                    "own pilots did."
                    if found.study.protocol.tuning == "random"
                    else ""
                )
            )
    told += [text for ipc in found.book.names("ipc") if (text := _unsteady(found, ipc))]
    return ["## What surprised", "\n".join(f"- {text}" for text in told)] if told else []


def _unsteady(found: Opened, ipc: int) -> str:
    """Say which method differs most from synthesis to synthesis, and which least."""
    spread = {}
    for method in (*found.methods, "random"):
        known = []
        for source in found.book.names("source"):
            group = found.book.group(source, method, ipc, found.backbone)
            values = group.scores("accuracy") if group else []
            if len(values) > 1:
                known.append(float(np.std(values, ddof=1)))
        if len(known) >= FEWEST:
            spread[method] = float(np.median(known))
    if len(spread) < 2:
        return ""
    order = sorted(spread, key=lambda name: spread[name])
    return (
        f"At {ipc} per class {order[-1]} varies most from synthesis to synthesis (random: from "
        f"draw to draw; standard deviation {100 * spread[order[-1]]:.1f} points, median over "
        "sources with several), "
        f"{order[0]} least "
        f"({100 * spread[order[0]]:.1f})."
    )


def _limits(found: Opened) -> list[str]:
    study = found.study
    absent = sorted(
        {
            (place.source, place.ipc)
            for place in grid(study)
            if place.method not in (*BASELINES, "measure")
        }
        - {(key[0], key[2]) for key in found.book.groups if key[1] not in BASELINES}
    )
    points = [*short_runs(found)]
    if study.protocol.tuning == "random":
        points.append(
            "Learning rate and stop serve all methods of a source and budget as random images "
            "chose them; a method whose sets want another rate is held back, random images are not."
        )
    points += [
        "Tasks made from the same images are not independent datasets: the errors with whole "
        "families left out are the honest ones for data of another kind.",
        "Few syntheses give wide intervals, and sign-flip tests over sources treat related sources "
        "as independent.",
        "One test split each: intervals say nothing of other hospitals.",
        "Folders and slices do not name patients and are split by image: where a patient has "
        "several, they may stand on both sides, and scores are too high for new patients.",
    ]
    if slices := [one.title for one in study.sources if "by=image" in one.source]:
        points.append(
            f"Slices of one scan stand on both sides of the splits of {listed(slices)}: their "
            "scores say nothing of other scans."
        )
    if absent:
        places = listed([f"{source} at {ipc}" for source, ipc in absent])
        points.append(
            f"Without numbers, for a class is too small, or they failed or were not run: {places}."
        )
    settings = "\n".join(
        f"- {way.title}: {way.method}, settings {to_record(make(way.method, way.settings))}"
        + (f", steps by images per class {way.steps}" if way.steps else "")
        for way in study.methods
    )
    sources = "\n".join(f"- {one.title}: `{one.source}`" for one in study.sources)
    limits = "\n".join(f"- {text}" for text in points)
    return ["## Limits", limits, "## Settings", settings, "## Sources", sources]


def short_runs(found: Opened) -> list[str]:
    """Say which part of their papers' steps the methods made, where that is not all."""
    papers = {way.title: make(way.method, way.settings).paper for way in found.study.methods}
    parts: dict[str, list[float]] = {}
    for group in found.book.groups.values():
        if papers.get(group.place.method) in (None, OURS):
            continue
        for row in group.rows:
            if row["steps_done"] and row["paper_steps"]:
                place = f"{group.place.method} at {group.place.ipc}"
                parts.setdefault(place, []).append(row["steps_done"] / row["paper_steps"])
    shares = {place: float(np.median(known)) for place, known in parts.items()}
    if not shares or min(shares.values()) >= 1:
        return []
    fewest = [place for place, share in shares.items() if share < FEW_STEPS]
    every = list(shares.values())
    text = (
        f"Methods of papers that move images make {100 * min(every):.2g}% to "
        f"{100 * max(every):.3g}% of their papers' steps (median "
        f"{100 * float(np.median(every)):.2g}%): tables rank methods at that cost, not at their "
        "best."
    )
    if fewest:
        text += (
            f" {listed(fewest)} make less than {100 * FEW_STEPS:.2g}%, hardly moving their images: "
            "their numbers say nothing of these methods at full length."
        )
    return [text]


def _scores(found: Opened) -> list[str]:
    parts = ["## All scores"]
    for metric, title in (
        ("accuracy", "Accuracy on the test split, percent:"),
        ("auc", "AUC (macro) on the test split, percent:"),
        ("worth", "Worth: random images per class that reach the same accuracy:"),
    ):
        made = table(found.book, metric=metric, fixed={"backbone": found.backbone})
        parts += [title, as_markdown(made)]
    return parts
