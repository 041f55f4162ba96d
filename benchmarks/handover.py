"""What a receiver gets out of a package, beside what its sender declared: in three commands.

    python benchmarks/handover.py run      # about half an hour on two cores
    python benchmarks/packages.py table    # writes docs/package_sizes.md, these rows too

Site A distills PneumoniaMNIST at ten images per class, evaluates, audits (the first seed of a
method alone) and packs, all by the command line. Site B is an empty folder with an empty cache, in
which lie the package and A's public key: it runs verify, show and train, and train says the
accuracy of five networks on the test split that A declared of. One row for each package goes to
results/handover.jsonl.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jsonl

from medistill import __version__

RESULTS = Path(__file__).parent / "results" / "handover.jsonl"
DATA, IPC, STUDENTS, SEEDS = "pneumoniamnist", "10", "5", 3
BACKBONE, FAST = "convnet-3-32", ("--precision", "bfloat16", "--compile", "on")
METHODS = {"sketch": (), "dm-bank": ("--steps", "2000"), "dm": ("--steps", "1000")}
AUDIT = ("--models", "8", "--images", "200", "--student-steps", "200", "--budget", "60")


def run(*words: str | Path, at: Path, cache: Path) -> str:
    """Run one command of medistill as a user would, and return what it prints."""
    place = {**os.environ, "MEDISTILL_CACHE": str(cache)}
    line = [sys.executable, "-m", "medistill", *map(str, words)]
    done = subprocess.run(line, cwd=at, env=place, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(line)}: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout


def sent(folder: Path, method: str, seed: int, cache: Path) -> tuple[Path, list[str]]:
    """Return the package that site A makes, and the commands that made it."""
    distill = f"distill {DATA} --method {method} --ipc {IPC} --backbone {BACKBONE}".split()
    made: list[list[str]] = [
        [*distill, *FAST, *METHODS[method], "--seed", str(seed), "--out", "run"],
        ["evaluate", "run", "--data", DATA, "--seeds", STUDENTS, *FAST],
        ["keygen", "--out", "keys"],
    ]
    pack = ["pack", "run", "--key", "keys/private.pem", "--out"]
    if seed == 0:
        made.append(["audit", "run", "--data", DATA, *AUDIT])
    made.append([*pack, "a.medistill", "--allow", "no-audit,leaks,small-class"])
    for words in made:
        run(*words, at=folder, cache=cache)
    return folder / "a.medistill", [f"medistill {' '.join(words)}" for words in made]


def received(folder: Path, package: Path, public: Path) -> tuple[dict[str, Any], list[str]]:
    """Return what site B is told by its three commands, and these."""
    shutil.copy(package, folder / "a.medistill")
    shutil.copy(public, folder / "public.pem")
    by = ["a.medistill", "--trust", "public.pem"]
    train = ["train", *by, "--data", DATA, "--students", STUDENTS, "--out", "model", "--json"]
    made = [["verify", *by], ["show", *by], train]
    told = [run(*words, at=folder, cache=folder / "cache") for words in made]
    found: dict[str, Any] = json.loads(told[-1])
    return found, [f"medistill {' '.join(words)}" for words in made]


def measure(method: str, seed: int, cache: Path) -> dict[str, Any]:
    """Return one row."""
    with tempfile.TemporaryDirectory() as home:
        a, b = Path(home, "a"), Path(home, "b")
        a.mkdir()
        b.mkdir()
        package, sending = sent(a, method, seed, cache)
        told, receiving = received(b, package, a / "keys" / "public.pem")
        return {
            "method": method,
            "seed": seed,
            "audited": seed == 0,
            "bytes": package.stat().st_size,
            "declared": told["declared"],
            "reproduced": told["reproduced"],
            "commands": {"sender": sending, "receiver": receiving},
            "version": __version__,
        }


def main() -> None:
    """Measure what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["run"])
    parser.add_argument("--method", choices=list(METHODS), nargs="+", default=list(METHODS))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        for seed in range(SEEDS):
            for method in given.method:
                if (method, seed) in {(row["method"], row["seed"]) for row in jsonl.read(RESULTS)}:
                    continue
                row = measure(method, seed, Path(cache))
                jsonl.append(RESULTS, [row])
                print({k: v for k, v in row.items() if k != "commands"}, flush=True)


if __name__ == "__main__":
    main()
