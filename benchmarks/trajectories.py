"""What trajectory matching depends on: its gradient, its start, and how many experts it has.

    python benchmarks/trajectories.py run [gradient starts experts bank]
    python benchmarks/trajectories.py show

PneumoniaMNIST, ten images per class. `gradient` holds TESLA's gradient in the images against the
exact one along the same student; `starts` gives loss, student rate and validation scores while MTT
runs from noise, class means and real images; `experts` compares five experts with twenty, tested
over seeds; `bank` times the training of experts in two processes. One JSON line for each goes to
results/trajectories.jsonl; lines that are there are skipped. `show` prints the tables that
`main_job.py table` puts into docs/results.md. Nothing is chosen by a test score.
"""

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonl
import main_job
import torch
import torch.nn.functional as F

from medistill import __version__
from medistill.arms import Book, arm_rows, random_arm, synthetic_arm
from medistill.backbones import ConvNet
from medistill.budget import Budget
from medistill.data import load
from medistill.distill import distill
from medistill.engine import local
from medistill.methods import MTT, Task
from medistill.methods.base import started
from medistill.methods.trajectory_matching import student_of
from medistill.metrics import score
from medistill.prepare import prepared
from medistill.records import Json, State, from_record, to_record
from medistill.rng import Rng
from medistill.sets import Recipe, Splits
from medistill.unroll import plan, pull_back, walk

RESULTS = Path(__file__).parent / "results" / "trajectories.jsonl"
CACHE = Path(tempfile.gettempdir()) / "medistill-main-job" / "cache"
IPC, SEEDS, STUDENT_STEPS, BATCH = 10, range(3), 600, 128
ALIKE = MTT(**main_job.settings_of("mtt", "pneumoniamnist"))
STARTS = {
    "noise, rate 0.01": dataclasses.replace(ALIKE, start="noise"),
    "noise, rate 0.002": dataclasses.replace(
        ALIKE, start="noise", rate=0.002, lr_rate=4e-7, lr_images=300.0
    ),
    "class means": ALIKE,
    "class means, to epoch 20": dataclasses.replace(ALIKE, max_start=20),
    "real": dataclasses.replace(ALIKE, start="real"),
}
MARKS = (0, 30, 60, 120)


def task_of(splits: Splits, width: int = 32) -> Task:
    """Return the task that all parts share."""
    backbone = ConvNet(width=width)
    return Task(splits.train, Budget(ipc=IPC), backbone, compute=main_job.COMPUTE)


def gradient(splits: Splits) -> Iterator[Json]:
    """Hold TESLA's gradient against the exact one, in float32."""
    exact = dataclasses.replace(ALIKE, experts=1, max_start=9)
    task = task_of(splits, 64)
    task = dataclasses.replace(task, prepared=prepared(exact, task, CACHE, "auto"))
    plain = dataclasses.replace(task.compute, precision="float32")
    task = dataclasses.replace(task, compute=plain)
    first, student = started(task, "real", Rng(0)), student_of(task)
    path = exact.stretch(task, 0, Rng(0))
    for steps in (5, 20, 50):
        for rate in (0.01, 0.03, 0.1):
            drawn = plan(2 * IPC, 2 * IPC, steps, task.augmentation, task.real.card.shape, Rng(0))
            given = (first["images"], first["labels"], torch.tensor(rate), drawn, task.augmentation)
            thetas = walk(student, path.start, *given)
            by = {steps: 2 * (thetas[-1] - path.target)}
            found = [
                pull_back(student, thetas, *given, by, exact=kind).images.flatten()
                for kind in (True, False)
            ]
            yield {
                "steps": steps,
                "rate": rate,
                "cosine": float(F.cosine_similarity(*found, dim=0)),
                "norm": float(found[1].norm() / found[0].norm()),
            }


def starts(splits: Splits) -> Iterator[Json]:
    """Run MTT from each start, and look at it on the validation split."""
    for name, method in STARTS.items():
        task = task_of(splits)
        task = dataclasses.replace(task, prepared=prepared(method, task, CACHE, "auto"))
        state: State | None = None
        seen: list[tuple[State, dict[str, float]]] = []
        for mark in MARKS:
            made = distill(
                method,
                task,
                seed=0,
                steps=mark,
                resume=state,
                on_step=lambda *pair, seen=seen: seen.append(pair),  # type: ignore[misc]
            )
            state = seen[-1][0] if seen else None
            base = dataclasses.replace(
                made.recipe, steps=STUDENT_STEPS, stop=STUDENT_STEPS, batch=BATCH, lr=0.01
            )
            book = Book(None, synthetic_arm(made), splits, base, task.backbone, main_job.COMPUTE)
            pilots = book.tuned(main_job.RATES, lambda **_: None)["pilots"]
            points = [point for pilot in pilots for point in pilot["curve"]]
            best = max(points, key=lambda p: (p["balanced_accuracy"], -p["cross_entropy"]))
            last = [log for _, log in seen[-20:]]
            yield {
                "start": name,
                "steps": mark,
                "validation": {key: best[key] for key in ("balanced_accuracy", "auc")},
                **{
                    key: sum(log[key] for log in last) / len(last) if last else None
                    for key in ("loss", "rate", "gradient_norm", "outside")
                },
            }


def experts(splits: Splits) -> Iterator[Json]:
    """Test what five experts give against twenty."""
    task = task_of(splits)
    for count in (5, 20):
        method = dataclasses.replace(ALIKE, experts=count)
        ready = dataclasses.replace(task, prepared=prepared(method, task, CACHE, "auto"))
        for seed in SEEDS:
            made = distill(method, ready, seed=seed, steps=main_job.TRAJECTORY_STEPS[IPC])
            base = dataclasses.replace(
                made.recipe, steps=STUDENT_STEPS, stop=STUDENT_STEPS, batch=BATCH, lr=0.01
            )
            common: dict[str, Any] = {"compute": main_job.COMPUTE}
            _, recipe = arm_rows(
                random_arm(made, splits), splits, base, task.backbone, seeds=(), cache=CACHE,
                rates=main_job.RATES, **common,
            )  # fmt: skip
            tuned = from_record(Recipe, recipe)
            rows, _ = arm_rows(
                synthetic_arm(made), splits, tuned, task.backbone, seeds=[seed], rates=(), **common
            )
            yield {"experts": count, "seed": seed} | {k: rows[0][k] for k in ("accuracy", "auc")}


def bank(splits: Splits) -> Iterator[Json]:
    """Time a part of twenty experts of fifty epochs, two processes side by side."""
    task = dataclasses.replace(task_of(splits, 128), engine=local(2))
    method = dataclasses.replace(ALIKE, experts=2, max_start=1, patience=0)
    with tempfile.TemporaryDirectory() as folder:
        prepared(method, task, Path(folder), "auto")  # compiles
        longer = dataclasses.replace(method, max_start=7)
        begin = time.monotonic()
        prepared(longer, task, Path(folder), "auto")
        spent = time.monotonic() - begin
    epochs = 2 * (longer.epochs - method.epochs)
    yield {"epochs": epochs, "seconds": spent, "whole_minutes": spent / epochs * 1000 / 60}


PARTS = {"gradient": gradient, "starts": starts, "experts": experts, "bank": bank}


def rows(what: str) -> list[Json]:
    """Return what was measured of one part."""
    return [row for row in jsonl.read(RESULTS) if row["what"] == what]


def run(parts: list[str]) -> None:
    """Measure the parts that are not there yet."""
    torch.set_num_threads(1)
    splits = load("pneumoniamnist", offline=True)
    for what in parts:
        if rows(what):
            continue
        for row in PARTS[what](splits):
            about = {"data_digest": splits.train.card.digest, "version": __version__}
            about["settings"] = to_record(ALIKE)
            jsonl.append(RESULTS, [{"what": what, **row, **about}])
            print(what, row, flush=True)


def lines() -> list[str]:
    """Return the section of docs/results.md that these rows make."""
    if not RESULTS.exists():
        return []
    told = ["\n## Trajectories: gradient, start and experts\n", ABOUT]
    if found := rows("gradient"):
        told += [GRADIENT, "| student steps | rate | cosine | length, TESLA : exact |"]
        told += ["|---|---|---|---|"]
        told += [
            f"| {r['steps']} | {r['rate']} | {r['cosine']:.3f} | {r['norm']:.2f} |" for r in found
        ]
    if found := rows("starts"):
        told += [START, "| start | steps | loss | rate | outside | validation balanced / AUC |"]
        told += ["|---|---|---|---|---|---|"]
        for r in found:
            values = "- | - | -"
            if r["loss"] is not None:
                values = f"{r['loss']:.3f} | {r['rate']:.4f} | {100 * r['outside']:.0f}%"
            seen = r["validation"]
            told.append(
                f"| {r['start']} | {r['steps']} | {values} "
                f"| {100 * seen['balanced_accuracy']:.1f} / {100 * seen['auc']:.1f} |"
            )
    if found := rows("experts"):
        told += [EXPERTS, "| experts | accuracy | AUC |", "|---|---|---|"]
        for count in sorted({r["experts"] for r in found}):
            group = [r for r in found if r["experts"] == count]
            cells = [main_job.interval([r[key] for r in group]) for key in ("accuracy", "auc")]
            told.append(f"| {count} | {' | '.join(cells)} |")
        few, many = ([r["accuracy"] for r in found if r["experts"] == n] for n in (5, 20))
        lost = score([b - a for a, b in zip(few, many, strict=True)])
        low, high = 100 * (lost.low or 0), 100 * (lost.high or 0)
        told.append(
            f"\nFive lose {100 * lost.mean:.1f} points [{low:.1f}, {high:.1f}] seed by seed."
        )
    if found := rows("weak"):
        told += [WEAK, "| dataset | method | seeds | accuracy | AUC |", "|---|---|---|---|---|"]
        for name, kind in sorted({(r["dataset"], r["method"]) for r in found}):
            group = [r for r in found if (r["dataset"], r["method"]) == (name, kind)]
            cells = [main_job.interval([r[key] for r in group]) for key in ("accuracy", "auc")]
            told.append(f"| {name} | {kind} | {len(group)} | {' | '.join(cells)} |")
    for r in rows("bank"):
        told.append(BANK.format(**r))
    return told


ABOUT = """`python benchmarks/trajectories.py run`, PneumoniaMNIST, ten per class.
"""
GRADIENT = """
TESLA takes each step of the student by itself. Its gradient in the images against the exact one,
along the same student from an expert's way (ConvNet-3-64, real images):
"""
START = f"""
MTT from different starts, one synthesis each (ConvNet-3-32; loss, rate and share of pixels outside
the data's range are means of the last 20 steps). Scores are those of the best pilot of
{STUDENT_STEPS} steps on the validation split; with 0 steps that is what students make of the start
itself, which of pure noise is as good as the luckiest of twelve pilots:
"""
EXPERTS = f"""
Five experts against twenty, {main_job.TRAJECTORY_STEPS[IPC]} steps, three seeds of synthesis, test
split:
"""
WEAK = """
What becomes of it where experts have learned nothing: sets of about a thousand images and fewer,
experts of six single passes (2 to 5 steps each) at the papers' rate of 0.01, 60 steps of synthesis,
test split. The tables above have the same methods with experts at a rate of 0.1 over 21 epochs of
at least 10 steps. (`least_steps` was added because of these rows, which were measured before it.)
"""
BANK = """
Twenty experts of fifty epochs (ConvNet-3-128, bfloat16, compiled, two processes of one thread):
{epochs} epochs took {seconds:.0f} s, so all 1,000 would take {whole_minutes:.0f} minutes.
"""


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("verb", choices=("run", "show"))
    parser.add_argument("parts", nargs="*", default=list(PARTS), metavar="PART")
    given = parser.parse_args()
    if given.verb == "show":
        print("\n".join(lines()))
    else:
        run(given.parts)


if __name__ == "__main__":
    main()
