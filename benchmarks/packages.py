"""How small packages are, how fast they are read, and how fast bad ones are refused.

    python benchmarks/packages.py run      # about ten minutes on two cores
    python benchmarks/packages.py table    # writes docs/package_sizes.md

Sizes: PneumoniaMNIST at ten images per class by `sketch` from noise, packed and scored as a
receiver scores it, beside random real images of the same number, as many of them as JPEG files
(quality 75) as have the package's bytes, and the whole training split. Students of one recipe, five
of each; the learning rate is chosen once, by random images on the validation split. Times: the
fastest of five in one process, and how far the peak of the resident memory rose. Results go to
results/packages.json.
"""

import argparse
import ctypes
import gc
import io
import json
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import handover
import jsonl
import numpy as np
import torch
from PIL import Image

from medistill import __version__
from medistill.arms import arm_rows, random_arm, synthetic_arm
from medistill.backbones import ConvNet
from medistill.budget import Budget
from medistill.compute import Compute
from medistill.data import load
from medistill.distill import Run, distill, distill_to
from medistill.errors import PackageRefused
from medistill.features import logits_of_set
from medistill.methods import Task
from medistill.methods.random import Random
from medistill.methods.sketch import FromSketch
from medistill.metrics import evaluate_task, score
from medistill.package import Terms, archived, generate, load_private, load_trust, pack
from medistill.package.archive import extracted, held, laid_out, slices
from medistill.package.keys import Signer
from medistill.package.manifest import Stored
from medistill.package.read import examined
from medistill.package.transfer import pulled
from medistill.progress import hushed
from medistill.records import from_record
from medistill.rng import Rng
from medistill.sets import RealSet, Recipe, Splits
from medistill.train import RealImages, balanced_index, fit

RESULTS = Path(__file__).parent / "results" / "packages.json"
TABLE = Path(__file__).parents[1] / "docs" / "package_sizes.md"
STUDENT, COMPUTE, STUDENTS, IPC, JPEG = ConvNet(width=32), Compute("bfloat16"), 5, 10, 75
RATES = (0.01, 0.03)
CONTROL = 17 << 20  # bytes that the meter of memory has to see
Allow: Any = ["no-audit", "no-scores", "real-pixels", "leaks", "small-class"]


def packed(
    source: str, method: Any, ipc: int, place: Path, *, told: bool = False, dtype: Stored = "U8"
) -> tuple[dict[str, bytes], Any, Splits]:
    """Distill, pack and sign; return the files, the receiver's keys and the data.

    With `told` the package carries scores and an audit: short ones, for only their size counts.
    """
    splits = load(source, offline=True)
    task = Task(splits.train, Budget(ipc=ipc), STUDENT, compute=COMPUTE)
    steps = 600 if isinstance(method, FromSketch) else None
    distill_to(place / "run", Run(method, task, 0, source, "", steps), resume=False)
    if told:
        short = ["--data", source, "--student-steps", "30"]
        cache = place / "cache"
        handover.run("evaluate", "run", *short, "--seeds", "2", at=place, cache=cache)
        audit = ["audit", "run", *short, "--models", "4", "--images", "100"]
        handover.run(*audit, at=place, cache=cache)
    generate(place / "keys")
    key = load_private(place / "keys" / "private.pem")
    files = pack(place / "run", Terms("measured"), [key], allow=Allow, dtype=dtype)
    return files, load_trust(place / "keys" / "public.pem"), splits


def sizes() -> list[dict[str, Any]]:
    """Return bytes and scores of a package and of what else as many bytes could be."""
    with tempfile.TemporaryDirectory() as folder:
        method = FromSketch(factor=1, scale=1.0)
        files, trust, splits = packed("pneumoniamnist", method, IPC, Path(folder), told=True)
    package = examined(files, trust)
    size = len(archived(files))
    task = Task(splits.train, Budget(ipc=IPC), STUDENT, compute=COMPUTE)
    drawn = distill(Random(), task, seed=0)
    base = replace(package.manifest.recipe, steps=1000, stop=1000, batch=128)
    how: dict[str, Any] = {"compute": COMPUTE}
    how["seeds"] = range(STUDENTS)
    rows, recipe = arm_rows(random_arm(drawn, splits), splits, base, STUDENT, rates=RATES, **how)
    chosen = from_record(Recipe, recipe)
    arm = synthetic_arm(package.synthetic)
    made, _ = arm_rows(arm, splits, chosen, STUDENT, rates=(), **how)
    pixels = splits.train.images[0].numel()
    found = [row_of("package", len(package.images), size, made)]
    found.append(row_of("random images, raw", len(drawn), len(drawn) * (pixels + 1), rows))
    coded = [jpeg(image) for image in splits.train.images]
    each = sum(map(len, coded)) / len(coded)
    count = int(size / each)
    decoded = torch.stack([torch.from_numpy(np.array(Image.open(io.BytesIO(c)))) for c in coded])
    lossy = RealSet(decoded.unsqueeze(1), splits.train.labels, splits.train.card)
    several = [trained(lossy, splits, chosen, count, seed) for seed in range(STUDENTS)]
    found.append(row_of("random images, JPEG", count, size, several))
    many = [trained(splits.train, splits, chosen, len(splits.train), s) for s in range(STUDENTS)]
    found.append(row_of("all images, JPEG", len(coded), sum(map(len, coded)), many))
    return found


def row_of(what: str, images: int, size: int, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a line of the table."""
    accuracy = score([row["accuracy"] for row in rows])
    return {
        "what": what,
        "images": images,
        "bytes": size,
        "accuracy": [accuracy.mean, accuracy.low, accuracy.high],
        "auc": score([row["auc"] for row in rows]).mean,
    }


def jpeg(image: torch.Tensor) -> bytes:
    """Return a gray image as JPEG."""
    out = io.BytesIO()
    Image.fromarray(image[0].numpy()).save(out, "JPEG", quality=JPEG)
    return out.getvalue()


def trained(real: RealSet, splits: Splits, recipe: Recipe, count: int, seed: int) -> dict[str, Any]:
    """Train a student on so many random images, all classes equally often, and test it."""
    rng = Rng(seed).child("bytes")
    index = torch.randperm(len(real), generator=rng.at("images"))[:count]
    part = real.take(index)
    network = STUDENT.build(real.card, rng.at("network"))
    fit(network, RealImages(part, balanced_index(part)), recipe, rng, compute=COMPUTE)
    logits = logits_of_set(network, splits.test)
    return dict(evaluate_task(splits.test.card.task, logits, splits.test.labels))


def timed(what: Callable[[], object]) -> tuple[float, int]:
    """Return the best of five times, and by how much a sixth run, the first, raised the memory.

    What is free goes back to the system before, so that nothing is taken unseen from it.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory_of("VmRSS")
    what()
    grown = memory_of("VmHWM") - before
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        what()
        best = min(best, time.perf_counter() - begin)
    return best, max(grown, 0)


def memory_of(field: str) -> int:
    """Return a size of this process in bytes, by its name in Linux's status file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def speeds() -> dict[str, Any]:
    """Return how long reading packages takes, and refusing each hostile one."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        files, trust, _ = packed("phantom:n=2400,size=64,channels=3", Random(), 400, place / "10")
        whole = archived(files)
        seconds, _ = timed(lambda: examined(laid_out(slices(whole), len(whole)), trust))
        _, grown = timed(lambda: torch.zeros(CONTROL, dtype=torch.uint8).sum())
        assert grown > 0.9 * CONTROL, grown  # the meter sees what it has to see
        rows = [row_of_refusal(name, what) for name, what in hostile(files, trust).items()]
        source = "phantom:n=9000,size=64,channels=3"
        large, sender, _ = packed(source, Random(), 2600, place / "64")
        for name, (path, how) in large_files(large, place).items():
            keys = {"trusted": sender, "strangers": trust}.get(how, ())
            rows.append(row_of_refusal(name, opened(path, keys, how == "unsigned")))
        rows += pulls(place, sender)
        rows += wrong_numbers(place)
        path = written(place / "whole", large)
        longest, most = timed(opened(path, sender, False))
        size = path.stat().st_size
    small = {}
    for name, channels, classes, side in (
        ("gray 28, 2 classes", 1, 2, 28),
        ("color 64, 9", 3, 9, 64),
    ):
        with tempfile.TemporaryDirectory() as folder:
            source = f"phantom:n=270,size={side},channels={channels},classes={classes}"
            small[name] = len(archived(packed(source, Random(), IPC, Path(folder))[0]))
    return {
        "bytes": len(whole),
        "read_s": round(seconds, 4),
        "large_bytes": size,
        "large_read_s": round(longest, 4),
        "large_grown_bytes": most,
        "refused": rows,
        "ipc10_bytes": small,
    }


def pulls(place: Path, trust: Sequence[Signer]) -> list[dict[str, Any]]:
    """Return rows of what `pull` gets from a path and refuses: it holds the bytes it is sent."""
    cases = {
        "pulled, 64 MiB, signed by a stranger": ("a", ()),
        "pulled, a terabyte of zeros": ("zeros", trust),
    }

    def getting(file: str, keys: Sequence[Signer]) -> Callable[[], object]:
        return lambda: examined(extracted(pulled(str(place / file))), keys)

    return [row_of_refusal(name, getting(*case)) for name, case in cases.items()]


def wrong_numbers(place: Path) -> list[dict[str, Any]]:
    """Return rows of unsigned packages whose last number is none: they are read whole."""
    rows = []
    for name, count, ipc in (("10 MB", 1500, 200), ("64 MiB", 9000, 1300)):
        source = f"phantom:n={count},size=64,channels=3"
        made, _, _ = packed(source, Random(), ipc, place / name, dtype="F16")
        files = {name: part for name, part in made.items() if name != "signature.dsse.json"}
        data = files["data.safetensors"]
        start = 8 + int.from_bytes(data[:8], "little")
        end = start + json.loads(data[8:start])["images"]["data_offsets"][1]
        files["data.safetensors"] = data[: end - 2] + b"\x00\x7e" + data[end:]
        what = opened(written(place / f"{name} of numbers", files), (), True)
        rows.append(row_of_refusal(f"{name}, unsigned, its last number is none", what))
    return rows


def row_of_refusal(name: str, what: Callable[[], object]) -> dict[str, Any]:
    """Return how long refusing took and by how much memory grew."""
    spent, grown = timed(lambda: refused(what))
    return {"what": name, "seconds": round(spent, 4), "grown_bytes": grown}


def opened(path: Path, trust: Sequence[Signer], unsigned: bool) -> Callable[[], object]:
    """Return what reads a file on disk."""

    def reading() -> object:
        with held(path) as files:
            return examined(files, trust, unsigned=unsigned)

    return reading


def written(path: Path, files: dict[str, bytes]) -> Path:
    """Write an archive."""
    path.write_bytes(archived(files))
    return path


def large_files(files: dict[str, bytes], place: Path) -> dict[str, tuple[Path, str]]:
    """Return hostile packages of almost 64 MiB on disk, and by whose keys they are read."""
    data = files["data.safetensors"]
    unsigned = {name: part for name, part in files.items() if name != "signature.dsse.json"}
    renamed = data.replace(b"images", b"imagez", 1)
    changed = {**files, "data.safetensors": flipped(data)}
    last = {**files, "data.safetensors": data[:-1] + bytes([data[-1] ^ 1])}
    with open(place / "zeros", "wb") as file:
        file.truncate(1 << 40)
    return {
        "64 MiB, signed by a stranger": (written(place / "a", files), "strangers"),
        "64 MiB, no signature": (written(place / "b", unsigned), "trusted"),
        "64 MiB, signed, a bit in the middle flipped": (written(place / "c", changed), "trusted"),
        "64 MiB, signed, the last byte changed": (written(place / "d", last), "trusted"),
        "64 MiB, unsigned, other tensors than it says": (
            written(place / "e", {**unsigned, "data.safetensors": renamed}),
            "unsigned",
        ),
        "a terabyte of zeros": (place / "zeros", "trusted"),
    }


def hostile(files: dict[str, bytes], trust: Sequence[Signer]) -> dict[str, Callable[[], object]]:
    """Return what reads hostile packages that lie in memory."""
    whole = archived(files)
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("data.safetensors", bytes(256 << 20))
    deep = b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    many = json.dumps({str(n): {} for n in range(5000)}).encode()
    bit = flipped(whole)
    return {
        "10 MB, a bit flipped": lambda: examined(laid_out(slices(bit), len(bit)), trust),
        "bomb of 256 MiB": lambda: extracted(bomb.getvalue()),
        "100,000 levels": lambda: examined({**files, "manifest.json": deep}, (), unsigned=True),
        "header of 2^60 bytes": lambda: examined(
            bare(files, (1 << 60).to_bytes(8, "little")), (), unsigned=True
        ),
        "5,000 tensors": lambda: examined(
            bare(files, len(many).to_bytes(8, "little") + many), (), unsigned=True
        ),
        "10 MB, signed by a stranger": lambda: examined(files, ()),
        "10 MB, no signature": lambda: examined(bare(files, b""), ()),
    }


def flipped(content: bytes) -> bytes:
    """Return content with one bit changed in the middle."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def bare(files: dict[str, bytes], data: bytes) -> dict[str, bytes]:
    """Return files without a signature, with other tensors."""
    rest = {name: part for name, part in files.items() if name != "signature.dsse.json"}
    return {**rest, "data.safetensors": data or files["data.safetensors"]}


def refused(what: Callable[[], object]) -> None:
    """Fail unless it is refused."""
    try:
        what()
    except PackageRefused:
        return
    raise AssertionError("read what had to be refused")


def table() -> None:
    """Write the page."""
    held = json.loads(RESULTS.read_text())
    lines = [
        "# Sizes and times of packages",
        "",
        "Written by `python benchmarks/packages.py table` from `benchmarks/results/packages.json`, "
        "whose head says how. PneumoniaMNIST, ten images per class by `sketch` from noise. A point "
        "is one percent of accuracy above chance (62.5%, the larger class of the test split). "
        "The package carries scores and an audit.",
        "",
        "| what | images | bytes | accuracy | AUC | bytes a point |",
        "|---|---|---|---|---|---|",
    ]
    for row in held["sizes"]:
        mean, low, high = (100 * value for value in row["accuracy"])
        points = max(mean - 62.5, 0.1)
        lines.append(
            f"| {row['what']} | {row['images']:,} | {row['bytes']:,} | {mean:.1f} [{low:.1f}, "
            f"{high:.1f}] | {100 * row['auc']:.1f} | {row['bytes'] / points:,.0f} |"
        )
    by = {row["what"]: row for row in held["sizes"]}
    if by["random images, JPEG"]["accuracy"][0] > by["package"]["accuracy"][0]:
        lines += [
            "",
            "For the same bytes real images as JPEG files teach more: a package is for those who "
            "may not send any.",
        ]
    fast = held["speeds"]
    lines += [
        "",
        f"A package of {fast['bytes']:,} bytes is verified and loaded in {fast['read_s']:.3f} s, "
        f"one of {fast['large_bytes']:,} in {fast['large_read_s']:.3f} s (and "
        f"{fast['large_grown_bytes'] / 2**20:.0f} MiB of memory). Ten images per class take "
        + ", ".join(f"{size:,} bytes ({name})" for name, size in fast["ipc10_bytes"].items())
        + ".",
        "",
        "A hostile one is refused as soon as it is known to be one: contents are hashed in pieces, "
        "and only read into memory once a trusted key has vouched for their digest. With "
        "`--unsigned` nobody vouches, and `pull` holds what it is sent: both need the file's own "
        "size. Memory is how far the first refusal raised the process's peak.",
        "",
        "| refused | milliseconds | memory, MiB |",
        "|---|---|---|",
    ]
    lines += [
        f"| {row['what']} | {1000 * row['seconds']:.1f} | {row['grown_bytes'] / 2**20:.0f} |"
        for row in fast["refused"]
    ]
    lines += reproduced()
    TABLE.write_text("\n".join(lines) + "\n")


def reproduced() -> list[str]:
    """Return a section: what receivers get out of packages, in three commands."""
    rows = jsonl.read(handover.RESULTS)
    if not rows:
        return []
    lines = ["", "## What a receiver reproduces", "", REPRODUCED]
    lines += ["| method | seed | bytes | declared | reproduced | difference |", "|---" * 6 + "|"]
    for row in rows:
        told, found = row["declared"], row["reproduced"]
        gap = 100 * (found["mean"] - told["mean"])
        size = f"{row['bytes']:,}" + (" with an audit" if row["audited"] else "")
        lines.append(
            f"| {row['method']} | {row['seed']} | {size} | {shown(told)} | {shown(found)} | "
            f"{gap:+.1f} |"
        )
    gaps = [100 * abs(row["reproduced"]["mean"] - row["declared"]["mean"]) for row in rows]
    near = sum(gap <= 1 for gap in gaps)
    lines += [
        "",
        f"{near} of {len(gaps)} lie within one point; the largest gap is {max(gaps):.1f}.",
    ]
    receiver = rows[0]["commands"]["receiver"]
    return [*lines, "", "```", *receiver, "```"]


def shown(found: dict[str, Any]) -> str:
    """Return a score in percent with its interval."""
    mean, low, high = (100 * found[name] for name in ("mean", "low", "high"))
    return f"{mean:.1f} [{low:.1f}, {high:.1f}]"


REPRODUCED = """PneumoniaMNIST, ten per class, ConvNet-3-32. The sender's scores and the receiver's
are means of five networks each, on the same test split. The receiver has an empty folder, the
package and the sender's public key. Rows are of `python benchmarks/handover.py run`, in
`benchmarks/results/handover.jsonl` with all commands.
"""


def main() -> None:
    """Measure, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["run", "table"])
    parser.add_argument("--only", choices=["sizes", "speeds"])
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.part == "table":
        table()
        return
    held = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for name, measure in (("speeds", speeds), ("sizes", sizes)):
        if given.only in (None, name):
            with hushed():
                held[name] = measure()
            held["version"] = __version__
            RESULTS.write_text(json.dumps(held, indent=1) + "\n")
            print(json.dumps(held[name], indent=1), flush=True)


if __name__ == "__main__":
    main()
