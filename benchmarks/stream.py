"""Sketch a million images that are never in memory: rate, memory, and two shards in two processes.

    python benchmarks/stream.py [--n 1000000] [--backbone convnet-3-32] [--networks 4]

Phantom images of 28 pixels are written once into a memory-mapped file below the system's temporary
folder, and sketched three times: the first tenth (its memory is what the whole must not exceed),
the whole, and both halves in a process each, whose merged sketch must equal the whole's to the
last bit. Memory is counted in two parts: what the process holds as its own, and the pages of the
mapped file, which the system takes back when it wants them. One JSON line for each of the three
goes to results/stream.jsonl.
"""

import argparse
import json
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medistill import __version__
from medistill.augment import Augmentation
from medistill.backbones import backbone, to_spec
from medistill.compute import Compute
from medistill.data import load
from medistill.engine import Processes
from medistill.probes import SketchSpec
from medistill.records import to_record
from medistill.sets import RealSet
from medistill.sketch import Sketch, merge, sketch

RESULTS = Path(__file__).parent / "results" / "stream.jsonl"
PART = 20_000  # images drawn at once
COMPUTE = Compute("bfloat16", compile=True)


def written(n: int) -> Path:
    """Write the images and labels, unless they are there, and return their folder."""
    folder = Path(tempfile.gettempdir()) / f"medistill-stream-{n}"
    if (folder / "labels.npy").is_file():
        return folder
    folder.mkdir(exist_ok=True)
    images = np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, (n, 1, 28, 28))
    labels = np.empty(n, np.int64)
    for number, start in enumerate(range(0, n, PART)):
        part = load(f"phantom:n={PART},seed={number}", offline=True).train
        count = min(PART, n - start)
        images[start : start + count] = part.images[:count].numpy()
        labels[start : start + count] = part.labels[:count].numpy()
    images.flush()
    np.save(folder / "labels.npy", labels)
    return folder


def opened(folder: Path, first: int, last: int) -> RealSet:
    """Return images `first` to `last` of the file, mapped."""
    mapped = np.load(folder / "images.npy", mmap_mode="c")
    images = mapped[first:last]
    labels = np.load(folder / "labels.npy")[first:last]
    card = load("phantom", offline=True).train.card
    return RealSet(torch.from_numpy(images), torch.from_numpy(labels), card, file=mapped._mmap)


class Memory:
    """The largest own and mapped resident memory while it is open, looked at ten times a second."""

    def __enter__(self) -> "Memory":
        self.own = self.mapped = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.1):
            lines = Path("/proc/self/status").read_text().splitlines()
            sizes = {line.split(":")[0]: line.split()[1] for line in lines if line[:3] == "Rss"}
            self.own = max(self.own, int(sizes["RssAnon"]) * 1024)
            self.mapped = max(self.mapped, int(sizes["RssFile"]) * 1024)


def sketched(
    part: tuple[int, int], *, folder: Path, spec: SketchSpec
) -> tuple[Sketch, dict[str, Any]]:
    """Sketch a part of the file and return what it took."""
    real = opened(folder, *part)
    sketch(opened(folder, 0, 2048), spec, COMPUTE)  # compiles
    with Memory() as memory:
        begin = time.perf_counter()
        made = sketch(real, spec, COMPUTE)
        seconds = time.perf_counter() - begin
    return made, {
        "images": len(real),
        "seconds": round(seconds, 1),
        "images_per_second": round(len(real) / seconds),
        "own_memory_bytes": memory.own,
        "mapped_memory_bytes": memory.mapped,
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    """Read the command line, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=1_000_000)
    parser.add_argument("--backbone", default="convnet-3-32")
    parser.add_argument("--networks", type=int, default=4)
    given = parser.parse_args()
    begin = time.perf_counter()
    folder = written(given.n)
    print(f"written in {time.perf_counter() - begin:.0f} s", flush=True)
    looks = to_spec(backbone(given.backbone)), to_record(Augmentation())
    spec = SketchSpec(*looks, networks=given.networks)
    task = partial(sketched, folder=folder, spec=spec)
    n = given.n
    _, tenth = task((0, n // 10))
    whole, all_of_it = task((0, n))
    begin = time.perf_counter()
    halves = list(Processes(2).map(task, [(0, n // 2), (n // 2, n)]))
    spent = round(time.perf_counter() - begin, 1)
    merged = merge([half for half, _ in halves])
    equal = bool(torch.equal(merged.sums, whole.sums) and torch.equal(merged.counts, whole.counts))
    rows = [
        {"what": "a tenth", **tenth},
        {"what": "whole", **all_of_it},
        {"what": "two halves", "parts": [row for _, row in halves], "seconds": spent}
        | {"equals_whole": equal},
    ]
    common = {"spec": to_record(spec), "version": __version__, "torch": torch.__version__}
    RESULTS.write_text("".join(json.dumps({**row, **common}) + "\n" for row in rows))
    print("\n".join(json.dumps(row) for row in rows))


if __name__ == "__main__":
    main()
