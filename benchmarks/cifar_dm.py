"""DM on CIFAR-10, ten images per class: the curve that holds our DM against the published one.

    python benchmarks/cifar_dm.py run --minutes 60
    python benchmarks/cifar_dm.py show

`run` goes on from where it stopped, in a folder below the system's temporary folder. At each step
that MARKS names, and at the end, STUDENTS students train on the images of that moment; their test
accuracy is a curve, and nothing is chosen by it. One JSON line for each student goes to
results/cifar_dm.jsonl. The published values are 48.9% after 20,000 steps, of 84.8% with all images
(arXiv 2110.04181); these files are JPEG, so compare with their own ceiling, which `run --full`
measures. Rows say how many seconds of a processor the steps before them took, scoring left out;
`--minutes` counts these, so a machine that is paused or shared gives as many steps.
"""

import argparse
import dataclasses
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import jsonl
import torch

from medistill import __version__
from medistill.arms import arm_rows, full_arm, synthetic_arm
from medistill.backbones import ConvNet
from medistill.budget import Budget
from medistill.compute import Compute
from medistill.data import load
from medistill.methods import Task
from medistill.methods.dm import DM
from medistill.records import State, load_state, save_state
from medistill.rng import Rng
from medistill.sets import Splits

RESULTS = Path(__file__).parent / "results" / "cifar_dm.jsonl"
IPC, STUDENTS, STUDENT_STEPS, FULL_STEPS = 10, 1, 600, 5000
MARKS = (0, 300, 1000, 2000, 3000, 5000, 10_000, 20_000)
COMPUTE = Compute("bfloat16", compile=True)
SEED = 0


def read(folder: Path) -> Splits:
    """Return CIFAR-10, unpacked below `folder`; validation images are cut off its training set."""
    if not (folder / "train").is_dir():
        archive = Path(os.environ["MEDISTILL_DATA"]) / "cifar10" / "cifar10_jpeg.tar.gz"
        shutil.unpack_archive(archive, folder)
    top = next(path.parent for path in folder.rglob("train") if path.is_dir())
    return load(f"folder:{top}")


def write(rows: list[dict[str, Any]], arm: str, step: int, spent: float | None = None) -> None:
    """Append rows and print their mean."""
    told = {"step": step, "version": __version__}
    told |= {} if spent is None else {"distill_seconds": round(spent)}
    jsonl.append(RESULTS, ({**told, **row} for row in rows))
    mean = sum(row["accuracy"] for row in rows) / len(rows)
    print(f"{arm} step {step}: {100 * mean:.1f}%", flush=True)


def run(minutes: float, full: bool) -> None:
    """Distill for so many minutes, scoring now and then."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    folder = Path(tempfile.gettempdir()) / "medistill-cifar"
    folder.mkdir(exist_ok=True)
    splits = read(folder)
    backbone = ConvNet()
    task = Task(splits.train, Budget(ipc=IPC), backbone, compute=COMPUTE)
    method = DM().as_in_paper(task)
    rng = Rng(SEED)
    path = folder / "state.safetensors"
    state, told = load_state(path) if path.is_file() else (method.init(task, rng), {})
    base = dataclasses.replace(
        method.finish(state, task, rng).recipe, steps=STUDENT_STEPS, stop=STUDENT_STEPS
    )
    if full:
        longer = dataclasses.replace(base, steps=FULL_STEPS, stop=FULL_STEPS, lr=0.03)
        arm = full_arm(splits)
        rows, _ = arm_rows(arm, splits, longer, backbone, seeds=[0], rates=(), compute=COMPUTE)
        write(rows, "full", 0)
        return
    scored = {row["step"] for row in jsonl.read(RESULTS) if row["arm"] == "synthetic"}

    def look(state: State) -> None:
        step = int(state["step"])
        save_state(path, state, {"seconds": spent})
        if step not in scored:
            arm = synthetic_arm(method.finish(state, task, rng))
            seeds = range(STUDENTS)
            rows, _ = arm_rows(arm, splits, base, backbone, seeds=seeds, rates=(), compute=COMPUTE)
            write(rows, arm.name, step, spent)
            scored.add(step)

    spent = float(told.get("seconds", 0.0))
    end = spent + 60 * minutes
    while spent < end and int(state["step"]) < method.steps(task):
        if int(state["step"]) in MARKS:
            look(state)
        elif int(state["step"]) % 100 == 0:
            save_state(path, state, {"seconds": spent})
        begin = time.process_time()
        state, _ = method.step(state, task, rng)
        spent += time.process_time() - begin
    look(state)


def show() -> None:
    """Print the curve."""
    curve: dict[tuple[str, int], list[float]] = {}
    for row in jsonl.read(RESULTS):
        curve.setdefault((row["arm"], row["step"]), []).append(row["accuracy"])
    for (arm, step), values in sorted(curve.items()):
        print(f"{arm:<10}{step:>7} {100 * sum(values) / len(values):.1f}% ({len(values)} students)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("verb", choices=["run", "show"])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--full", action="store_true", help="measure the full-data ceiling")
    given = parser.parse_args()
    if given.verb == "run":
        run(given.minutes, given.full)
    else:
        show()
