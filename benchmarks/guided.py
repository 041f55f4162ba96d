"""Let the code's own branches lead the mutations of fuzz.py, by atheris (libFuzzer).

    pip install atheris
    python benchmarks/guided.py [--minutes 5]

Every draw that a mutation of fuzz.py makes is read from bytes, which libFuzzer bends; bytes that
reach new branches of `medistill.package` are kept and bent further. Each case goes the way of
fuzz.py: read, shown, exported, made ready for training. Any exception but one of ours ends the run
and is printed. What was done goes to results/fuzz.json, under `guided`, and adds up.
"""

import argparse
import inspect
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType

import atheris
import fuzz

MOST_BYTES = 4096  # of a case: draws after its end are zeros
KINDS_OF_CRASH = re.compile(r"Uncaught Python exception|ERROR: libFuzzer")


class Draws(random.Random):
    """Draws that are read from bytes."""

    def __init__(self, content: bytes) -> None:
        super().__init__(0)
        self.content, self.at = content, 0

    def getrandbits(self, k: int) -> int:
        """Return k bits."""
        size = -(-k // 8)
        part = self.content[self.at : self.at + size].ljust(size, b"\0")
        self.at += size
        return int.from_bytes(part, "little") & ((1 << k) - 1)

    def random(self) -> float:
        """Return a number from 0 to 1."""
        return self.getrandbits(16) / 2**16


def instrument() -> int:
    """Make the functions of the room of packages tell which of their branches ran."""
    count = 0
    for name, module in sorted(sys.modules.items()):
        if name.startswith("medistill.package") and isinstance(module, ModuleType):
            for one in vars(module).values():
                if inspect.isfunction(one) and one.__module__ == name:
                    atheris.instrument_func(one)
                    count += 1
    return count


def child(seconds: int, told: Path) -> None:
    """Run cases until the time is over; libFuzzer ends the process."""
    bases, trust = fuzz.begun()
    for files in bases:  # imports that any reading needs
        assert fuzz.tried(files, trust, False)
    instrument()
    done = [0]

    def one(content: bytes) -> None:
        _, package, signed = fuzz.case(bases, Draws(content))
        fuzz.tried(package, trust, signed)
        done[0] += 1
        if done[0] % 500 == 0:
            told.write_text(str(done[0]))

    limits = [
        f"-max_total_time={seconds}",
        f"-max_len={MOST_BYTES}",
        "-timeout=60",
        "-len_control=0",
    ]
    where = f"-artifact_prefix={told.parent}/"
    atheris.Setup([sys.argv[0], *limits, where, "-rss_limit_mb=8192"], one)
    atheris.Fuzz()


def main() -> None:
    """Run the fuzzer in a process of its own and add up what it did."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--told", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    seconds = round(60 * given.minutes)
    if given.told:
        child(seconds, given.told)
    begin = time.time()
    with tempfile.TemporaryDirectory() as place:
        told = Path(place) / "told"
        words = [sys.executable, __file__, "--minutes", str(given.minutes), "--told", str(told)]
        ran = subprocess.run(words, stderr=subprocess.PIPE, text=True, check=False)
        cases = int(told.read_text()) if told.is_file() else 0
    crashed = bool(KINDS_OF_CRASH.search(ran.stderr))
    edges = [int(n) for n in re.findall(r"cov: (\d+)", ran.stderr)]
    record = json.loads(fuzz.RESULTS.read_text())
    before = record.get("guided", {"cases": 0, "seconds": 0, "crashes": 0, "branches": 0})
    record["guided"] = {
        "cases": before["cases"] + cases,
        "seconds": round(before["seconds"] + time.time() - begin),
        "crashes": before["crashes"] + crashed,
        "branches": max([before["branches"], *edges]),
    }
    fuzz.RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record["guided"]))
    if crashed or not cases:
        print(ran.stderr[-3000:])
        sys.exit(1)


if __name__ == "__main__":
    main()
