"""AdrenalMNIST3D, ten volumes per class: random, herding, dm, dsa, sketch and full data.

    python benchmarks/volumes.py run [--only WHAT ...]
    python benchmarks/volumes.py show

One synthesis of each method, three students; learning rates are chosen on the validation split with
random volumes (full data: with full data). Rows go to results/volumes.jsonl, one per student, and
those that are there are skipped; `main_job.py table` puts the table into docs/results.md. Accuracy
alone misleads here: three of four volumes are of one class, and students see both alike often.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import jsonl
import main_job
import torch

from medistill import __version__
from medistill.arms import Arm, arm_rows, full_arm, random_arm, synthetic_arm
from medistill.backbones import ConvNet
from medistill.budget import Budget
from medistill.compute import Compute
from medistill.data import load
from medistill.distill import distill
from medistill.methods import DM, DSA, Method, Task
from medistill.methods.herding import Herding
from medistill.methods.random import Random
from medistill.methods.sketch import FromSketch
from medistill.records import from_record, to_record
from medistill.sets import Recipe

RESULTS = Path(__file__).parent / "results" / "volumes.jsonl"
STUDENT = ConvNet(width=16)
COMPUTE = Compute("bfloat16")
STUDENT_STEPS, BATCH, RATES, SEEDS = 150, 64, (0.01, 0.03), range(3)
LONG = "full, 450 steps"  # for all volumes are seen eight times only in 150
METHODS: dict[str, tuple[Method, int | None]] = {
    "dm-bank, noise": (DM(bank=10), 200),
    "dm-bank, real": (DM(bank=10, start="real"), 200),
    "sketch": (FromSketch(networks=8, iterations=80, scale=1.0), None),
    "dsa, real": (DSA(start="real"), 5),
    "herding": (Herding(feature_steps=40), None),
}


def run(only: list[str]) -> None:
    """Measure what is missing."""
    torch.set_num_threads(1)
    splits = load("adrenalmnist3d", offline=True)
    task = Task(splits.train, Budget(ipc=10), STUDENT, compute=COMPUTE)
    cache = Path(tempfile.gettempdir()) / "medistill-volumes"
    drawn = distill(Random(), task, seed=0)
    base = from_record(
        Recipe,
        to_record(drawn.recipe) | {"steps": STUDENT_STEPS, "stop": STUDENT_STEPS, "batch": BATCH},
    )

    def measure(name: str, arm: Arm, by: Recipe, **how: Any) -> Recipe:
        found, recipe = arm_rows(
            arm, splits, by, STUDENT, seeds=SEEDS, cache=cache, compute=COMPUTE, **how
        )
        if name not in {row["what"] for row in jsonl.read(RESULTS)}:
            common = {"what": name, "version": __version__, "data": splits.train.card.digest}
            jsonl.append(RESULTS, ({**common, **row, **more} for row in found))
            print(name, [round(row["auc"], 3) for row in found], flush=True)
        return from_record(Recipe, recipe)

    more: dict[str, Any] = {}
    tuned = measure("random", random_arm(drawn, splits), base, rates=RATES)
    for name, (method, steps) in METHODS.items():
        if name not in only or name in {row["what"] for row in jsonl.read(RESULTS)}:
            continue
        begin = time.monotonic()
        made = distill(method, task, seed=0, steps=steps, cache=cache)
        more = {
            "settings": to_record(method),
            "steps": method.steps(task) if steps is None else steps,
            "paper_steps": method.steps(task),
            "distill_seconds": round(time.monotonic() - begin, 1),
        }
        recipe = from_record(
            Recipe, to_record(tuned) | {"factor": made.recipe.factor, "lr": tuned.lr}
        )
        measure(name, synthetic_arm(made), recipe, rates=())
    more = {}
    if "full" in only:
        measure("full", full_arm(splits), base, rates=RATES)
    if LONG in only:
        longer = from_record(Recipe, to_record(base) | {"steps": 450, "stop": 450})
        measure(LONG, full_arm(splits), longer, rates=RATES[1:])


def lines() -> list[str]:
    """Return the section of docs/results.md that these rows make."""
    found = jsonl.read(RESULTS)
    if not found:
        return []
    told = ["\n## adrenalmnist3d, volumes of 28 voxels a side\n", ABOUT]
    told += ["| what | accuracy | balanced accuracy | AUC | steps |", "|---|---|---|---|---|"]
    for name in ("random", *METHODS, "full", LONG):
        mine = [row for row in found if row["what"] == name]
        if mine:
            scores = ("accuracy", "balanced_accuracy", "auc")
            cells = [main_job.interval([row[score] for row in mine]) for score in scores]
            steps = mine[0].get("steps")
            made = f"{steps:,} of {mine[0]['paper_steps']:,}" if steps else "-"
            told.append(f"| {name} | {' | '.join(cells)} | {made} |")
    true = [sum(row) for row in found[0]["confusion"]]
    most = 100 * max(true) / sum(true)
    told.append(f"| always the most frequent class | {most:.1f} | 50.0 | 50.0 | - |")
    return told


ABOUT = f"""`python benchmarks/volumes.py run`: {STUDENT.name}, ten volumes per class, one synthesis
of each method, three students of {STUDENT_STEPS} steps of {BATCH} volumes; percent, 95% t intervals
over students (random: each with a draw of its own). `sketch` made 80 steps in place of its 600. All
volumes are seen only eight times in 150 steps, so their short row is no ceiling.
"""


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("run", "show"))
    names = [*METHODS, "full", LONG]
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    given = parser.parse_args()
    if given.what == "run":
        run(given.only)
    else:
        print("\n".join(lines()))


if __name__ == "__main__":
    main()
