"""The fast path and the plain one reach the same accuracy: five seeds of each on PneumoniaMNIST.

    python benchmarks/agreement.py

Plain is float32 without a compiler, fast is bfloat16 with one. Each seed distills DM from real
images, ten per class, for STEPS steps, and trains one student on it, on its own path throughout;
scores are those of the validation split. One JSON line per seed and path goes to
results/agreement.jsonl; the means, their 95% intervals and that of the difference are printed.
"""

import dataclasses
import json
import time
from pathlib import Path

from medistill import __version__
from medistill.backbones import backbone
from medistill.budget import Budget
from medistill.compute import Compute
from medistill.data import load
from medistill.distill import distill
from medistill.features import logits_of_set
from medistill.methods import DM, Task
from medistill.metrics import evaluate_logits, score
from medistill.rng import Rng
from medistill.train import TensorImages, fit

RESULTS = Path(__file__).parent / "results" / "agreement.jsonl"
BACKBONE = backbone("convnet-3-32")
STEPS, STUDENT_STEPS, SEEDS = 200, 600, range(5)
PATHS = {"plain": Compute(), "fast": Compute("bfloat16", compile=True)}


def main() -> None:
    """Measure and print."""
    splits = load("pneumoniamnist")
    rows = []
    for seed in SEEDS:
        for name, compute in PATHS.items():
            begin = time.perf_counter()
            task = Task(splits.train, Budget(ipc=10), BACKBONE, compute=compute)
            made = distill(DM(start="real"), task, seed=seed, steps=STEPS)
            recipe = dataclasses.replace(made.recipe, steps=STUDENT_STEPS, stop=STUDENT_STEPS)
            rng = Rng(seed).child("student")
            network = BACKBONE.build(splits.val.card, rng.at("network"))
            fit(network, TensorImages.of(made), recipe, rng.child("fit"), compute=compute)
            found = evaluate_logits(logits_of_set(network, splits.val), splits.val.labels)
            scores = {key: found[key] for key in ("accuracy", "balanced_accuracy", "auc")}
            seconds = round(time.perf_counter() - begin, 1)
            row = {"path": name, "seed": seed, **scores, "seconds": seconds}
            rows.append({**row, "version": __version__})
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for what in ("balanced_accuracy", "auc"):
        plain, fast = ([row[what] for row in rows if row["path"] == name] for name in PATHS)
        apart = [f - p for f, p in zip(fast, plain, strict=True)]
        for name, values in (("plain", plain), ("fast", fast), ("fast - plain", apart)):
            mean = score(values)
            print(f"{what:<18} {name:<13} {mean.mean:.4f} [{mean.low:.4f}, {mean.high:.4f}]")


if __name__ == "__main__":
    main()
