"""Whether a method improves on what it began with, seed by seed, at ten images per class.

    python benchmarks/paired.py run [--only METHOD] [--worker I N]
    python benchmarks/paired.py show

A seed of synthesis fixes the real images that a method starts from; how good that draw is moves a
score more than the method does, so unpaired intervals over a few seeds overlap whatever is true.
`run` gives each method the same start, scores the start and each result with the same students,
and appends one JSON line per seed to results/paired.jsonl; lines that are there are skipped. The
learning rate is chosen on the validation split with random images. `show` prints the table that
`main_job.py table` puts into docs/results.md: differences with their t interval over seeds.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonl
import main_job
import torch

from medistill import __version__
from medistill.arms import arm_rows, random_arm, synthetic_arm
from medistill.backbones import backbone
from medistill.budget import Budget
from medistill.data import load
from medistill.distill import distill
from medistill.methods import DC, DM, DSA, Method, Task
from medistill.metrics import score
from medistill.records import from_record, to_record
from medistill.sets import Recipe, Splits

RESULTS = Path(__file__).parent / "results" / "paired.jsonl"
IPC, SEEDS, STUDENTS, STUDENT_STEPS, BATCH = 10, 8, 3, 1000, 128
NAMES = ("accuracy", "balanced_accuracy", "auc")


@dataclass(frozen=True)
class Comparison:
    """Methods that start from the same real images, with the steps that each makes."""

    dataset: str
    backbone: str
    steps: dict[str, int]


METHODS: dict[str, Method] = {
    "dm": DM(start="real"),
    "dc": DC(start="real"),
    "dsa": DSA(start="real"),
}
COMPARISONS = (
    Comparison("pneumoniamnist", "convnet-3-64", {"dm": 2000}),
    Comparison("mednist", "convnet-3-32", {"dm": 1000}),
    Comparison("pneumoniamnist", "convnet-3-32", {"dc": 600, "dsa": 600}),
    Comparison("mednist", "convnet-3-32", {"dc": 300, "dsa": 300}),
)


def measure(told: Comparison, splits: Splits, seed: int, cache: Path) -> dict[str, Any]:
    """Score the start and what each method makes of it."""
    student = backbone(told.backbone)
    task = Task(splits.train, Budget(ipc=IPC), student, compute=main_job.COMPUTE)
    first = next(iter(told.steps))
    seconds, made = {}, {"start": distill(METHODS[first], task, seed=seed, steps=0)}
    for name, steps in told.steps.items():
        begin = time.monotonic()
        made[name] = distill(METHODS[name], task, seed=seed, steps=steps)
        seconds[name] = round(time.monotonic() - begin, 1)
    base = dataclasses.replace(
        made["start"].recipe, steps=STUDENT_STEPS, stop=STUDENT_STEPS, batch=BATCH
    )
    common: dict[str, Any] = {"compute": main_job.COMPUTE}
    _, recipe = arm_rows(
        random_arm(made["start"], splits), splits, base, student, seeds=(), cache=cache, **common
    )
    tuned = from_record(Recipe, recipe)
    scores = {}
    for name, synthetic in made.items():
        arm = synthetic_arm(synthetic)
        rows, _ = arm_rows(arm, splits, tuned, student, seeds=range(STUDENTS), rates=(), **common)
        scores[name] = {key: [row[key] for row in rows] for key in NAMES}
    return {
        "dataset": told.dataset,
        "backbone": told.backbone,
        "ipc": IPC,
        "seed": seed,
        "steps": told.steps,
        "paper_steps": {name: METHODS[name].steps(task) for name in told.steps},
        "settings": {name: to_record(METHODS[name]) for name in told.steps},
        "lr": tuned.lr,
        "scores": scores,
        "distill_seconds": seconds,
        "data_digest": splits.train.card.digest,
        "compute": to_record(main_job.COMPUTE),
        "version": __version__,
    }


def key(told: Comparison, seed: int) -> tuple[object, ...]:
    """Return what tells one line from another."""
    return told.dataset, told.backbone, tuple(sorted(told.steps.items())), seed


def run(only: str | None, place: int, workers: int) -> None:
    """Measure what is missing; worker `place` of `workers` takes every n-th line."""
    torch.set_num_threads(1)
    folder = Path(tempfile.gettempdir()) / "medistill-main-job"
    folder.mkdir(exist_ok=True)
    where = main_job.sources(folder)
    loaded: dict[str, Splits] = {}
    wanted = [told for told in COMPARISONS if only is None or only in told.steps]
    jobs = [(told, seed) for seed in range(SEEDS) for told in wanted]
    for told, seed in jobs[place::workers]:
        done = {
            key(Comparison(row["dataset"], row["backbone"], row["steps"]), row["seed"])
            for row in jsonl.read(RESULTS)
        }
        if key(told, seed) in done:
            continue
        if told.dataset not in loaded:
            loaded[told.dataset] = load(where[told.dataset], offline=True)
        row = measure(told, loaded[told.dataset], seed, folder / "cache")
        jsonl.append(RESULTS, [row])
        means = {name: mean(row, name, "accuracy") for name in row["scores"]}
        told_means = ", ".join(f"{name} {100 * value:.1f}" for name, value in means.items())
        print(told.dataset, told.backbone, seed, told_means, row["distill_seconds"], flush=True)


def mean(row: dict[str, Any], name: str, metric: str) -> float:
    """Return the mean over the students of one set."""
    return statistics.mean(row["scores"][name][metric])


def lines() -> list[str]:
    """Return the section of docs/results.md that these rows make."""
    found = jsonl.read(RESULTS)
    told = ["\n## Method against its own start, seed by seed\n", ABOUT]
    told += ["| dataset | student | seeds | what | accuracy | AUC |", "|---|---|---|---|---|---|"]
    for comparison in COMPARISONS:
        head = (comparison.dataset, comparison.backbone, comparison.steps)
        group = [row for row in found if (row["dataset"], row["backbone"], row["steps"]) == head]
        if len(group) < 2:
            continue
        names = ["start", *comparison.steps]
        pairs = [(name, "start") for name in comparison.steps]
        pairs += [("dsa", "dc")] if "dsa" in comparison.steps else []
        front = f"| {comparison.dataset} | {comparison.backbone} | {len(group)} |"
        for name in names:
            values = [[mean(row, name, metric) for row in group] for metric in ("accuracy", "auc")]
            cells = " | ".join(main_job.interval(value) for value in values)
            told.append(f"{front} {label(comparison, group, name)} | {cells} |")
        for one, other in pairs:
            values = [
                [mean(row, one, metric) - mean(row, other, metric) for row in group]
                for metric in ("accuracy", "auc")
            ]
            cells = " | ".join(signed(value) for value in values)
            told.append(f"{front} {one} - {other} | {cells} |")
    return told if found else []


def label(told: Comparison, group: list[dict[str, Any]], name: str) -> str:
    """Return a method's name with the steps that it made."""
    if name == "start":
        return "random images (the start)"
    return f"{name}, {told.steps[name]:,} of {group[0]['paper_steps'][name]:,} steps"


def signed(values: list[float]) -> str:
    """Return a difference and its interval in points."""
    found = score(values)
    low, high = found.low or 0.0, found.high or 0.0  # never None: groups have two seeds or more
    return f"{100 * found.mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


ABOUT = f"""`python benchmarks/paired.py run`: {IPC} per class, each seed a draw of real images
that the methods start from; {STUDENTS} students of {STUDENT_STEPS:,} steps score each set.
Accuracy and AUC in percent, differences in points, with 95% t intervals over seeds.
"""


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("run", "show"))
    parser.add_argument("--only", choices=list(METHODS))
    parser.add_argument("--worker", type=int, nargs=2, default=(0, 1), metavar=("I", "N"))
    given = parser.parse_args()
    if given.what == "show":
        print("\n".join(lines()))
    else:
        run(given.only, *given.worker)


if __name__ == "__main__":
    main()
