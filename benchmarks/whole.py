"""How long `sketch` takes from the data to a score, part by part.

    python benchmarks/whole.py

PneumoniaMNIST, ten per class, ConvNet-3-128: the sketch, the synthesis from it, and the pilots and
students of the synthetic arm (random and full arms come from a warm cache and cost nothing). Once
with the defaults, and once with whole images (factor 1) and students of 300 steps, as the field's
prototypes have them. Rows go to results/whole.jsonl; `speed.py table` shows them.
"""

import dataclasses
import itertools
import time
from pathlib import Path

import jsonl
import torch

from medistill import __version__
from medistill.arms import RATES, arm_rows, synthetic_arm
from medistill.backbones import ConvNet, to_spec
from medistill.budget import Budget
from medistill.compute import Compute
from medistill.data import load
from medistill.distill import distill
from medistill.methods import Task
from medistill.methods.sketch import FromSketch
from medistill.prepare import prepared

RESULTS = Path(__file__).parent / "results" / "whole.jsonl"
COMPUTE = Compute("bfloat16", compile=True)
STUDENTS = 5
KINDS = {"four tiles, whole students": (2, 1000), "whole images, short students": (1, 300)}


def main() -> None:
    """Measure and append."""
    splits = load("pneumoniamnist")
    student = ConvNet()
    for name, (factor, steps) in KINDS.items():
        method = FromSketch(factor=factor, scale=1.0)
        task = Task(splits.train, Budget(ipc=10), student, compute=COMPUTE)
        times = [time.perf_counter()]
        task = dataclasses.replace(task, prepared=prepared(method, task, None))
        times.append(time.perf_counter())
        made = distill(method, task, seed=0)
        times.append(time.perf_counter())
        recipe = dataclasses.replace(made.recipe, steps=steps, stop=steps)
        rows, _ = arm_rows(
            synthetic_arm(made), splits, recipe, student, seeds=range(STUDENTS), compute=COMPUTE
        )
        times.append(time.perf_counter())
        parts = [round(b - a, 1) for a, b in itertools.pairwise(times)]
        row = {
            "what": name,
            "factor": factor,
            "student_steps": steps,
            "students": f"{len(RATES)} pilots, {STUDENTS} students",
            "backbone": to_spec(student),
            **dict(zip(("sketch_s", "distill_s", "evaluate_s"), parts, strict=True)),
            "accuracy": [r["accuracy"] for r in rows],
            "auc": [r["auc"] for r in rows],
            "threads": torch.get_num_threads(),
            "version": __version__,
        }
        jsonl.append(RESULTS, [row])
        print(row, flush=True)


if __name__ == "__main__":
    main()
