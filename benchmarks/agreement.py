"""The fast path and the plain one reach the same accuracy: five seeds of each on PneumoniaMNIST.

    python benchmarks/agreement.py [--only METHOD]

Plain is float32 without a compiler, fast is bfloat16 with one. Each seed distills ten images per
class, for STEPS steps and with nothing from the cache, and trains one student on them, on its own
path throughout; scores are those of the validation split. One JSON line per method, seed and path
goes to results/agreement.jsonl, where those that are there are skipped; the means, their 95%
intervals and that of the difference are printed.
"""

import argparse
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonl

from medistill import __version__
from medistill.backbones import backbone
from medistill.budget import Budget
from medistill.compute import Compute
from medistill.data import load
from medistill.distill import distill
from medistill.features import logits_of_set
from medistill.methods import Task, make
from medistill.metrics import Score, evaluate_logits, score
from medistill.rng import Rng
from medistill.sets import Splits
from medistill.train import TensorImages, fit

RESULTS = Path(__file__).parent / "results" / "agreement.jsonl"
BACKBONE = backbone("convnet-3-32")
STUDENT_STEPS, SEEDS = 600, range(5)
STEPS = {"dm": 200, "dm-bank": 200, "dc": 40, "dsa": 40, "sketch": 600}
STARTS = {"dm": "real", "dm-bank": "real", "dc": "real", "dsa": "real", "sketch": "noise"}
PATHS = {"plain": Compute(), "fast": Compute("bfloat16", compile=True)}
SCORES = ("balanced_accuracy", "auc")
Row = dict[str, Any]


def measure(name: str, seed: int, path: str, splits: Splits) -> Row:
    """Distill and train one student on one path."""
    begin, compute = time.perf_counter(), PATHS[path]
    task = Task(splits.train, Budget(ipc=10), BACKBONE, compute=compute)
    made = distill(make(name, {"start": STARTS[name]}), task, seed=seed, steps=STEPS[name])
    recipe = dataclasses.replace(made.recipe, steps=STUDENT_STEPS, stop=STUDENT_STEPS)
    rng = Rng(seed).child("student")
    network = BACKBONE.build(splits.val.card, rng.at("network"))
    fit(network, TensorImages.of(made), recipe, rng.child("fit"), compute=compute)
    found = evaluate_logits(logits_of_set(network, splits.val), splits.val.labels)
    return {
        "method": name,
        "path": path,
        "seed": seed,
        **{key: found[key] for key in ("accuracy", *SCORES)},
        "seconds": round(time.perf_counter() - begin, 1),
        "version": __version__,
    }


def compared(rows: list[Row]) -> Iterator[tuple[str, str, tuple[Score, Score, Score]]]:
    """Yield a method, a score's name and that score: plain, fast, and by how much fast is more."""
    for name in STEPS:
        of = {(r["path"], r["seed"]): r for r in rows if r["method"] == name}
        if any((path, seed) not in of for path in PATHS for seed in SEEDS):
            continue
        for what in SCORES:
            plain, fast = ([of[path, seed][what] for seed in SEEDS] for path in PATHS)
            apart = [f - p for f, p in zip(fast, plain, strict=True)]
            yield name, what, (score(plain), score(fast), score(apart))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=list(STEPS))
    only = parser.parse_args().only
    splits = load("pneumoniamnist")
    known = {(r["method"], r["seed"], r["path"]) for r in jsonl.read(RESULTS)}
    for name in STEPS if only is None else (only,):
        for seed in SEEDS:
            for path in PATHS:
                if (name, seed, path) not in known:
                    row = measure(name, seed, path, splits)
                    jsonl.append(RESULTS, [row])
    for name, what, scores in compared(jsonl.read(RESULTS)):
        sides = (f"{x.mean:.4f} [{x.low:.4f}, {x.high:.4f}]" for x in scores)
        print(f"{name:<8} {what:<18} {' | '.join(sides)}")


if __name__ == "__main__":
    main()
