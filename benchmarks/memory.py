"""Distill 20,000 color images of 224 pixels within 4 GiB.

    python benchmarks/memory.py [--n 20000] [--method sketch]

The images (phantom ones, shifted copies of a thousand) are written once into a memory-mapped file
of 3 GB below the system's temporary folder. DM with its paper's settings and real start makes two
steps at ten images per class, and `sketch` reads the whole set under one network and makes two
steps. What the process holds as its own, and the mapped pages of the file, which the system takes
back when it wants them, go to results/memory.json.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import jsonl
import numpy as np
import torch
from stream import Memory

from medistill import __version__
from medistill.backbones import backbone
from medistill.budget import Budget
from medistill.compute import Compute
from medistill.data import load
from medistill.distill import distill
from medistill.methods import DM, Method, Task
from medistill.methods.sketch import FromSketch
from medistill.sets import RealSet

RESULTS = Path(__file__).parent / "results" / "memory.json"
SIDE, DRAWN = 224, 1000


def opened(n: int) -> RealSet:
    """Write the images unless they are there, and return them mapped."""
    path = Path(tempfile.gettempdir()) / f"medistill-large-{n}.npy"
    part = load(f"phantom:n={DRAWN},size={SIDE},channels=3", offline=True).train
    if not path.is_file():
        half = path.with_suffix(".half")
        images = np.lib.format.open_memmap(half, "w+", np.uint8, (n, 3, SIDE, SIDE))
        for start in range(0, n, DRAWN):
            shifted = part.images.roll(start // DRAWN, -1)[: n - start].numpy()
            images[start : start + len(shifted)] = shifted
        images.flush()
        half.rename(path)
    labels = part.labels.repeat(-(-n // DRAWN))[:n]
    mapped = np.load(path, mmap_mode="c")
    return RealSet(torch.from_numpy(mapped), labels, part.card, file=mapped._mmap)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=20_000)
    parser.add_argument("--method", choices=["dm", "sketch"], nargs="+", default=["dm", "sketch"])
    given = parser.parse_args()
    real = opened(given.n)
    rows = [row for row in jsonl.read(RESULTS) if row["method"] not in given.method]
    runs: list[tuple[Method, str]] = [
        (DM(start="real"), "convnet-3-128"),
        (FromSketch(networks=1), "convnet-3-32"),
    ]
    for method, name in (one for one in runs if one[0].name in given.method):
        task = Task(real, Budget(ipc=10), backbone(name), compute=Compute("bfloat16"))
        with Memory() as memory:
            begin = time.perf_counter()
            distill(method, task, seed=0, steps=2)
        rows.append(
            {
                "method": method.name,
                "backbone": name,
                "images": len(real),
                "steps": 2,
                "seconds": round(time.perf_counter() - begin, 1),
                "own_memory_bytes": memory.own,
                "mapped_memory_bytes": memory.mapped,
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "version": __version__,
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
