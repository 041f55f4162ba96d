"""How long the smallest study takes from nothing to its page.

    python benchmarks/smoke.py

Runs `medistill study run studies/smoke.yaml` and `medistill report` by the command line, with two
workers and an empty cache, and writes the seconds of both to results/smoke.json.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "smoke.json"


def main() -> None:
    """Measure and write."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        there = {**os.environ, "MEDISTILL_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
        begin = [sys.executable, "-m", "medistill"]
        study, out = str(ROOT / "studies" / "smoke.yaml"), str(folder / "smoke")
        spent = {}
        for what, words in (
            ("study", ["study", "run", study, "--out", out, "--workers", "2"]),
            ("page", ["report", out, "--out", str(folder / "smoke.html")]),
        ):
            at = time.monotonic()
            subprocess.run([*begin, *words], env=there, check=True)
            spent[what] = round(time.monotonic() - at, 1)
        cells = len(list((folder / "smoke" / "cells").glob("*.json")))
        size = (folder / "smoke.html").stat().st_size
    record = {"cells": cells, "workers": 2, "seconds": spent, "page_bytes": size}
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    print(record)


if __name__ == "__main__":
    main()
