"""What each setting of the sketch method is worth, on validation data.

    python benchmarks/sketch_tuning.py run [--only DATASET] [--worker I N]
    python benchmarks/sketch_tuning.py show

`run` distills from noise with the defaults (but scale 1) and with one setting changed at a time,
trains STUDENTS students on each set and appends one JSON line per setting, with their scores on the
validation split, to results/sketch_tuning.jsonl; lines that are there are skipped. Random images
and `dm-bank` from real images stand beside them. Test data is not read. CIFAR-10 is cut to 1,000
training images per class and an eighth of its training set as validation data; MedNIST to 1,000 per
class. `show` prints the table that `main_job.py table` puts into docs/results.md.
"""

import argparse
import dataclasses
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jsonl
import torch
from sketch_ideas import Bands, Restarts, SecondStage

from medistill import __version__
from medistill.backbones import backbone
from medistill.budget import Budget
from medistill.compute import Compute
from medistill.data import load
from medistill.distill import distill
from medistill.features import logits_of_set
from medistill.methods import DM, Method, Task
from medistill.methods.random import Random
from medistill.methods.sketch import FromSketch
from medistill.metrics import evaluate_logits
from medistill.records import to_record
from medistill.rng import Rng
from medistill.sets import RealSet, SyntheticSet
from medistill.train import TensorImages, fit

RESULTS = Path(__file__).parent / "results" / "sketch_tuning.jsonl"
BACKBONE = backbone("convnet-3-32")
STUDENTS, STUDENT_STEPS, LR, IPC = 3, 400, 0.02, 10
COMPUTE = Compute("bfloat16", compile=True)
DATASETS = {
    "pneumoniamnist": "pneumoniamnist",
    "mednist": "folder:{tmp}/medistill-main-job/mednist;size=28;limit=1000",
    "cifar10": "folder:{tmp}/medistill-cifar/train;limit=1143",
}
STEPS = {"pneumoniamnist": 600, "mednist": 600, "cifar10": 300}
ARCHIVES = {
    "mednist": ("mednist/mednist.tar.gz", "medistill-main-job/mednist"),
    "cifar10": ("cifar10/cifar10_jpeg.tar.gz", "medistill-cifar/train"),
}
MEANS = {"scale": 0.5, "moments": 8, "start": "class-mean"}
CHANGES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "1 tile": {"factor": 1},
    "9 tiles": {"factor": 3},
    "last stage": {"layers": "last"},
    "smooth 0": {"smooth": 0.0},
    "smooth 2": {"smooth": 2.0},
    "scale 0.5": {"scale": 0.5},
    "scale 0.25": {"scale": 0.25},
    "scale 0.5, 1 tile": {"scale": 0.5, "factor": 1},
    "scale 0.5, 1 tile, steps x 3": {"scale": 0.5, "factor": 1, "iterations": 3.0},
    "scale 0.5, real start": {"scale": 0.5, "start": "real"},
    "scale 0.5, class means": MEANS,
    "scale 0.5, class means, steps x 3": {**MEANS, "iterations": 3.0},
    "scale 0.5, class means, 2048 frequencies": {**MEANS, "frequencies": 2048},
    "scale 0.5, 2048 frequencies": {"scale": 0.5, "frequencies": 2048},
    "scale 2": {"scale": 2.0},
    "128 frequencies": {"frequencies": 128},
    "2048 frequencies": {"frequencies": 2048},
    "5 networks": {"networks": 5},
    "rate 0.03": {"lr_images": 0.03},
    "rate 0.3": {"lr_images": 0.3},
    "steps / 3": {"iterations": 1 / 3},
    "steps x 3": {"iterations": 3.0},
    "scale 0.5, steps x 3": {"scale": 0.5, "iterations": 3.0},
    "real start": {"start": "real"},
}

HALF = {"scale": 0.5}
IDEAS: dict[str, tuple[type[FromSketch], dict[str, Any]]] = {
    "scale 0.5, warm restarts, steps x 3": (Restarts, {**HALF, "iterations": 3.0}),
    "scale 0.5, falling restarts, steps x 3": (Restarts, {**HALF, "iterations": 3.0, "decay": 0.5}),
    "scales 0.25 to 2": (Bands, HALF),
    "scales 0.25 and 0.5": (Bands, {**HALF, "bands": (0.25, 0.5)}),
    "scale 0.5, second stage": (SecondStage, HALF),
}
NAMES = ["random", "dm-bank, real", *CHANGES, *IDEAS]


def read(name: str) -> tuple[RealSet, RealSet]:
    """Return the training and validation split of a dataset, unpacked where that is needed."""
    tmp = Path(tempfile.gettempdir())
    if name in ARCHIVES:
        archive, where = ARCHIVES[name]
        if not (tmp / where).is_dir():
            shutil.unpack_archive(
                Path(os.environ["MEDISTILL_DATA"]) / archive, (tmp / where).parent
            )
    splits = load(DATASETS[name].format(tmp=tmp))
    return splits.train, splits.val


def method_of(name: str, dataset: str) -> Method:
    """Return a setting's method."""
    if name == "random":
        return Random()
    if name == "dm-bank, real":
        return DM(bank=30, start="real", iterations=1000)
    kind, settings = IDEAS.get(name, (FromSketch, CHANGES.get(name, {})))
    change = {"scale": 1.0, **settings}
    change["iterations"] = round(STEPS[dataset] * change.get("iterations", 1))
    return kind(**change)


def scores(synthetic: SyntheticSet, val: RealSet) -> list[dict[str, float]]:
    """Train students and return their validation scores."""
    recipe = dataclasses.replace(
        synthetic.recipe, steps=STUDENT_STEPS, stop=STUDENT_STEPS, batch=128, lr=LR
    )
    found = []
    for number in range(STUDENTS):
        rng = Rng(0).child("student", number)
        network = BACKBONE.build(val.card, rng.at("network"))
        fit(network, TensorImages.of(synthetic), recipe, rng.child("fit"), compute=COMPUTE)
        score = evaluate_logits(logits_of_set(network, val), val.labels)
        found.append({name: score[name] for name in ("balanced_accuracy", "auc")})
    return found


def measure(name: str, dataset: str, ipc: int, seed: int) -> dict[str, Any]:
    """Distill with one setting and score it."""
    train, val = read(dataset)
    method = method_of(name, dataset)
    begin = time.monotonic()
    task = Task(train, Budget(ipc=ipc), BACKBONE, compute=COMPUTE)
    cache = None if name in IDEAS else Path(tempfile.gettempdir()) / "medistill-tuning"
    synthetic = distill(method, task, seed=seed, cache=cache)
    spent = time.monotonic() - begin
    return {
        "dataset": dataset,
        "setting": name,
        "ipc": ipc,
        "seed": seed,
        "method": method.name,
        "fields": to_record(method),
        "students": scores(synthetic, val),
        "seconds": round(spent, 1),
        "version": __version__,
    }


def run(only: list[str], worker: tuple[int, int], budgets: list[int], settings: list[str]) -> None:
    """Measure what is missing."""
    done = {
        (row["dataset"], row["setting"], row["ipc"], row["seed"]) for row in jsonl.read(RESULTS)
    }
    jobs = [(n, d, i) for i in budgets for n in settings for d in only]
    for name, dataset, ipc in jobs[worker[0] :: worker[1]]:
        if (dataset, name, ipc, 0) not in done:
            row = measure(name, dataset, ipc, 0)
            jsonl.append(RESULTS, [row])
            print(dataset, ipc, name, cell(row), row["seconds"], flush=True)


def cell(row: dict[str, Any]) -> str:
    """Return balanced accuracy / AUC in percent, each the mean of the students."""
    return " / ".join(
        f"{100 * statistics.mean(s[name] for s in row['students']):.1f}"
        for name in ("balanced_accuracy", "auc")
    )


def lines() -> list[str]:
    """Return the section of docs/results.md that these rows make."""
    found = {(row["setting"], row["dataset"], row["ipc"]): cell(row) for row in jsonl.read(RESULTS)}
    columns = sorted({key[1:] for key in found}, key=lambda c: (c[1], list(DATASETS).index(c[0])))
    told = ["\n## Settings of sketch, on validation data\n", ABOUT]
    told.append("| setting | " + " | ".join(f"{d}, {i} per class" for d, i in columns) + " |")
    told.append("|---" * (len(columns) + 1) + "|")
    for name in NAMES:
        cells = [found.get((name, *column), "") for column in columns]
        if any(cells):
            told.append(f"| {name} | {' | '.join(cells)} |")
    return told if found else []


ABOUT = """`python benchmarks/sketch_tuning.py run`: convnet-3-32, one synthesis from noise with
what were the defaults and with one setting changed at a time, 3 students of 400 steps; balanced
accuracy / AUC in percent. The students of one set spread by about a point, so smaller differences
say nothing. CIFAR-10 is cut to 1,000 images of each class and distilled in 300 steps. By this table
the frequencies' scale became 0.5 by default (1 before, as in the rows that do not name it). Class
means: `--moments 8 --start class-mean`. Restarts, several scales at once and a second stage (whose
networks were trained on the first stage's set) are no part of the method: they gained nothing
beyond the steps that they took (`benchmarks/sketch_ideas.py`).
"""


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("run", "show"))
    parser.add_argument("--only", nargs="+", choices=list(DATASETS), default=list(DATASETS))
    parser.add_argument("--ipc", nargs="+", type=int, default=[IPC])
    parser.add_argument("--settings", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--worker", type=int, nargs=2, default=(0, 1), metavar=("I", "N"))
    given = parser.parse_args()
    if given.what == "show":
        print("\n".join(lines()))
        return
    torch.set_num_threads(1)
    run(given.only, given.worker, given.ipc, given.settings)


if __name__ == "__main__":
    main()
