"""Change packages in every way that comes to mind, and see that a reader only ever refuses them.

    python benchmarks/fuzz.py [--count 1000000] [--minutes 5] [--workers 2]

Mutations know the structure: bytes of the archive; bytes of one file, packed again with true sums;
values, keys and nesting of each JSON; fields of the header of tensors; shapes that header and
manifest agree on, of numbers that are there; fields of the envelope. They
start from a small private package and from the golden ones of the tests, which have scores, audits,
volumes, color, soft and several labels, whitening. Most skip the signature, as if the sender were
hostile, so that the readers behind it are reached; what they let through is shown, drawn, exported
and made ready for training. Each run goes on with seeds that no run had, and adds to the counts. A
crash is any exception but one of ours, a hang more than a second of the processor's time (or a
minute of the clock's), and an audit hook notes files
that are opened, written or moved and code that is compiled or run. Counts, and what was found, go
to results/fuzz.json, the counts also by the reader that they are of (a digest of its code); a crash
or a hang is kept with its seed, and tried again by the next run: what does not crash any more is
counted as mended.
"""

import argparse
import copy
import hashlib
import json
import math
import multiprocessing
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from typer.testing import CliRunner

import medistill.package
from medistill import __version__
from medistill.cli import app
from medistill.cli.package import _text as shown
from medistill.cli.train import _text as trained
from medistill.cli.train import _verdict
from medistill.errors import MedistillError, PackageRefused
from medistill.package import Package, Terms, generate, load_private, load_trust, pack
from medistill.package.archive import archived, extracted, read_files
from medistill.package.export import _card, _medmnist, whole
from medistill.package.keys import Signer
from medistill.package.manifest import Flag
from medistill.package.read import examined
from medistill.package.strict import WIDTHS
from medistill.records import to_record
from medistill.report.parcel import Parcel, render_package

RESULTS = Path(__file__).parent / "results" / "fuzz.json"
GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
HANG_S, BATCH, PART = 1.0, 1000, 200_000
WATCHED = (
    "open",
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "exec",
    "compile",
    "import",
    "os.system",
    "subprocess.Popen",
    "pickle.find_class",
)
KINDS = ("archive", "file", "json", "json", "json", "tensors", "tensors", "both", "envelope")
ALLOWED: list[Flag] = ["no-audit", "no-scores", "small-class"]
READING = ("archive", "envelope", "keys", "manifest", "read", "strict")  # files of the reader
Files = dict[str, bytes]
Part = dict[str, Any]
FILLS = (b"\0", b"\xff", b"[", b'"', b"9", b'\\"', b'{"a":')
EXTREMES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**53, -(2**53), 0.5, -0.0, 1e308, 5e-324, "", "x", "\0",
    "../x", "\x1b[2J", "\ud7ff", "x" * 3000, [], {}, [[]], [0], {"": 0}, {"a": {"a": {}}}, "U8",
    "F16", "convnet", "monai", [1] * 50, ["a", "b"], "2099-01-01", "0" * 64,
)  # fmt: skip


def seeds(folder: Path) -> tuple[Files, tuple[Signer, ...]]:
    """Make a small private run, and return a signed package of it with the sender's public key."""
    sketch = ["sketch", "phantom:n=60,size=16", "--backbone", "convnet-1-4", "--networks", "2"]
    sketch += ["--frequencies", "4", "--epsilon", "50", "--unit", "image", "--mean", "0.5"]
    made = ["distill", str(folder / "a.sketch"), "--ipc", "1", "--steps", "1"]
    for words, out in (([*sketch, "--std", "0.25", "--accept-noise"], "a.sketch"), (made, "run")):
        result = CliRunner().invoke(app, [*words, "--out", str(folder / out)])
        assert result.exit_code == 0, result.output
    generate(folder / "keys")
    key = load_private(folder / "keys" / "private.pem")
    files = pack(
        folder / "run", Terms("small"), [key], allow=["no-audit", "no-scores", "small-class"]
    )
    return files, load_trust(folder / "keys" / "public.pem")


def begun() -> tuple[list[Files], tuple[Signer, ...]]:
    """Return the packages that mutations start from, the one of `seeds` first, and its key."""
    with tempfile.TemporaryDirectory() as place:
        files, trust = seeds(Path(place))
    return [files, *(read_files(path) for path in sorted(GOLDEN.glob("*.medistill")))], trust


def bent(content: bytes, draw: random.Random) -> bytes:
    """Return bytes with one to four places changed, cut, doubled or filled."""
    found = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        at, kind = draw.randrange(len(found) + 1), draw.randrange(6)
        size = min(draw.choice((1, 1, 2, 4, 8, 64, 1024)), len(found) - at)
        if kind == 0 and size:
            found[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            found[at : at + size] = draw.randbytes(size)
        elif kind == 2:
            del found[at : at + size]
        elif kind == 3:
            found[at:at] = found[at : at + size]
        elif kind == 4:
            found[at : at + size] = draw.choice(FILLS) * draw.choice((size, size, 40_000))
        else:
            del found[at:]
    return bytes(found)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of all values in a record."""
    found = [path] if path else []
    inner = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list):
        inner = enumerate(value)
    return found + [one for key, part in inner for one in places(part, (*path, key))]


def other_record(record: Any, draw: random.Random) -> Any:
    """Return a record with one to three values replaced, removed, moved, doubled or nested."""
    for _ in range(draw.randint(1, 3)):
        known = places(record)
        if not known:
            return copy.deepcopy(draw.choice(EXTREMES))
        *way, last = draw.choice(known)
        holder = record
        for key in way:
            holder = holder[key]
        kind = draw.randrange(6)
        if kind <= 1:
            holder[last] = copy.deepcopy(draw.choice(EXTREMES))
        elif kind == 2:
            del holder[last]
        elif kind == 3 and isinstance(holder, dict):
            name = draw.choice(("more", "__class__", "", str(last) + " ", "a" * 99))
            holder[name] = copy.deepcopy(holder[last])
        elif kind == 4:
            holder[last] = [holder[last]] * draw.choice((1, 2, 40))
        elif isinstance(holder[last], int | float) and not isinstance(holder[last], bool):
            holder[last] = holder[last] * draw.choice((-1, 0, 2, 10**6, 0.5)) + draw.choice((0, 1))
        elif isinstance(holder[last], str):
            holder[last] = bent(holder[last].encode(), draw).decode("utf-8", "replace")
    return record


def as_text(record: Any, draw: random.Random) -> bytes:
    """Return a record as JSON, sometimes as JSON that is none."""
    text = json.dumps(record, ensure_ascii=draw.random() < 0.5)
    if draw.random() < 0.05:
        text = text.replace(
            draw.choice(("0", "1", "null", "{")), draw.choice(("NaN", "1e999", "[")), 1
        )
    if draw.random() < 0.05 and text.startswith("{") and len(text) > 2:
        text = text[:-1] + "," + text[1:]
    return text.encode("utf-8", "replace")


def other_tensors(content: bytes, draw: random.Random) -> bytes:
    """Return a file of tensors with another header or other numbers."""
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length], content[8 + length :]
    kind = draw.randrange(4)
    if kind < 2:
        header = as_text(other_record(json.loads(header), draw), draw)
    elif kind == 2:
        data = bent(data, draw)
    size = len(header) if draw.random() < 0.9 else draw.choice((0, 2**63, 2**64 - 1, length + 1))
    return size.to_bytes(8, "little") + header + data


def other_shapes(files: Files, draw: random.Random) -> Files:
    """Return files in which one tensor has another shape, or comes on top, as the manifest says."""
    length = int.from_bytes(files["data.safetensors"][:8], "little")
    header = json.loads(files["data.safetensors"][8 : 8 + length])
    record = json.loads(files["manifest.json"])
    data = files["data.safetensors"][8 + length :]
    name = draw.choice([*header, "whitening.mean", "whitening.matrix", "more"])
    kind = draw.choice(list(WIDTHS))
    shape = [draw.choice((1, 1, 2, 3, 5, 16)) for _ in range(draw.randrange(6))]
    if name in header and draw.random() < 0.7:
        kind, shape = header[name]["dtype"], list(header[name]["shape"])
        for _ in range(draw.randint(1, 2)):
            at = draw.randrange(len(shape) + 1)
            shape[at : at + draw.randrange(2)] = [draw.choice((1, 1, 2, 3))] * draw.randrange(2)
    kept = {key: data[slice(*one["data_offsets"])] for key, one in header.items()}
    size = WIDTHS[kind] * math.prod(shape)
    part = kept.get(name, b"\0")
    kept[name] = (part * (1 + size // len(part)))[:size]
    other, at = {}, 0
    for key, part in kept.items():
        given = {"dtype": kind, "shape": shape} if key == name else header[key]
        other[key] = {**given, "data_offsets": [at, at + len(part)]}
        at += len(part)
    told = record["tensors"].get(name, {"low": -1e4, "high": 1e4})
    record["tensors"][name] = {**told, "dtype": kind, "shape": shape}
    head = json.dumps(other).encode()
    found = len(head).to_bytes(8, "little") + head + b"".join(kept.values())
    return {**files, "data.safetensors": found, "manifest.json": json.dumps(record).encode()}


def mutated(files: Files, draw: random.Random, kinds: tuple[str, ...]) -> tuple[str, Files | bytes]:
    """Return the kind of a mutation, and a package that it changed."""
    kind = draw.choice(kinds)
    if kind == "archive":
        return kind, bent(archived(files), draw)
    other = dict(files)
    if kind == "file":
        name = draw.choice(list(files))
        other[name] = bent(files[name], draw)
        if draw.random() < 0.1:
            del other[draw.choice(list(other))]
        return kind, archived(other) if draw.random() < 0.5 else other
    if kind == "json":
        name = draw.choice(("manifest.json", "manifest.json", "privacy.json", "evaluation.json"))
        other[name] = as_text(other_record(json.loads(files[name]), draw), draw)
    elif kind == "both":
        return kind, other_shapes(files, draw)
    elif kind == "tensors":
        other["data.safetensors"] = other_tensors(files["data.safetensors"], draw)
    else:
        name = "signature.dsse.json"
        other[name] = as_text(other_record(json.loads(files[name]), draw), draw)
    return kind, other


def case(bases: list[Files], draw: random.Random) -> tuple[str, Files | bytes, bool]:
    """Return the kind of a mutation, a package that it changed, and whether it counts as signed."""
    first = draw.random() < 0.5
    files = bases[0] if first else draw.choice(bases[1:])
    kind, package = mutated(files, draw, KINDS if first else KINDS[:-1])
    return kind, package, first and (kind in ("envelope", "archive") or draw.random() < 0.1)


def tried(package: Files | bytes, trust: tuple[Signer, ...], signed: bool) -> Package | None:
    """Read a package and do with it what commands do; None where it is refused."""
    try:
        files = extracted(package) if isinstance(package, bytes) else package
        if not signed:
            files = {name: part for name, part in files.items() if name != "signature.dsse.json"}
        found = examined(files, trust, unsigned=not signed)
    except PackageRefused:
        return None
    with suppress(MedistillError):
        used(found)
    return found


def used(found: Package) -> None:
    """Show a package, and begin to train on it and to export it."""
    told = found.manifest
    shown(found)
    found.synthetic.to_train()
    record = {"model": "m", "local": None, "influence": None, "declared": told.declared}
    reached: dict[str, Any] | None = None
    if told.declared:
        reached = {"mean": 0.5, "low": None, "high": None, "n": 1}
        reached["verdict"] = _verdict(reached, told.declared)
    trained({**record, "declared_on": told.declared_on, "reproduced": reached}, None)
    _medmnist(found, *whole(found))
    _card(found, 3)


def drawn(found: Package) -> None:
    """Make the page of a package, for which templates are opened and compiled."""
    facts = (to_record(found.manifest), found.evaluation, found.privacy, found.report, "")
    render_package(Parcel(*facts, found.sha256, found.bytes, b""))


def stuck(*_: object) -> None:
    """End a case that hangs; it counts as a crash."""
    raise TimeoutError("hangs")


Job = tuple[int, int, list[Files], tuple[bytes, ...], float]


def worker(job: Job) -> dict[str, Any]:
    """Try one share of the mutations, each from its own seed."""
    start, count, bases, keys, until = job
    torch.set_num_threads(1)
    from medistill.package.keys import checked

    trust = tuple(Signer("sender", checked(raw)) for raw in keys)
    events: Counter[str] = Counter()
    watching = [False]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if watching[0] and event in WATCHED:
            events[f"{event} {ascii(arguments[0])[:80]}"] += 1

    signal.signal(signal.SIGALRM, stuck)
    assert tried(bases[0], trust, True)
    for files in bases:  # imports that any reading needs
        assert tried(files, trust, False)
    sys.addaudithook(hook)
    done: Counter[str] = Counter()
    crashes, slowest = [], 0.0
    for at in range(start, start + count):
        if at % BATCH == 0 and time.time() > until:
            break
        draw = random.Random(at)
        kind, package, signed = case(bases, draw)
        page = draw.random() < 0.05
        begin = time.process_time()
        watching[0] = True
        signal.setitimer(signal.ITIMER_REAL, 60 * HANG_S)
        try:
            found = tried(package, trust, signed)
            came = "read" if found else "refused"
            watching[0] = False
            if found and page:
                drawn(found)
        except Exception:
            watching[0] = False
            came = "crashed"
            crashes.append({"seed": at, "kind": kind, "trace": traceback.format_exc()[-800:]})
        signal.setitimer(signal.ITIMER_REAL, 0)
        watching[0] = False
        spent = time.process_time() - begin
        slowest = max(slowest, spent)
        if spent > HANG_S and came != "crashed":
            came = "crashed"
            crashes.append({"seed": at, "kind": kind, "trace": f"TimeoutError: {spent:.1f} s"})
        done[f"{kind} {came}"] += 1
    return {"done": done, "crashes": crashes[:20], "slowest": slowest, "events": events}


def again(before: dict[str, Any], job: Job) -> dict[str, Any]:
    """Return what was found before, with the crashes tried once more."""
    found = {**before, "mended": list(before.get("mended", [])), "crashes": []}
    for one in before["crashes"]:
        tried_now = worker((one["seed"], 1, *job[2:4], math.inf))
        found["crashes"] += tried_now["crashes"]
        if not tried_now["crashes"]:
            last = one["trace"].strip().splitlines()[-1]
            found["mended"].append({"seed": one["seed"], "kind": one["kind"], "was": last})
    if before["hangs"] and not found["crashes"]:  # each hang was tried again
        found["slowest"] = 0.0
    return found


def reader() -> str:
    """Return a digest of the code that reads packages."""
    room = Path(medistill.package.__file__).parent
    code = b"".join((room / f"{name}.py").read_bytes() for name in READING)
    return hashlib.sha256(code).hexdigest()[:12]


def main() -> None:
    """Share the work and write what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1_000_000, help="More, beside those known.")
    parser.add_argument("--minutes", type=float, default=600.0)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    begin = time.time()
    bases, trust = begun()
    keys = tuple(one.key.public_bytes_raw() for one in trust)
    until, left = begin + 60 * given.minutes, given.count
    found = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"next": 0}
    tries: list[Part] = [again(found, (0, 0, bases, keys, until))] if found["next"] else []
    while left > 0 and time.time() < until:  # kept after each part, so that a kill loses one
        share = min(PART, -(-left // given.workers))
        first = found["next"]
        jobs = [(first + n * share, share, bases, keys, until) for n in range(given.workers)]
        # Audit hooks stay, so each job has a process of its own.
        with ProcessPoolExecutor(given.workers, multiprocessing.get_context("spawn")) as pool:
            tries += pool.map(worker, jobs)
        spent, begin = time.time() - begin, time.time()
        found = kept(found, tries, first + share * given.workers, spent)
        left, tries = left - share * given.workers, [found]
    print(json.dumps({**found, "crashes": len(found["crashes"])}, indent=1))
    for one in found["crashes"][:5]:
        print(one["seed"], one["kind"], one["trace"])
    sys.exit(bool(found["crashes"] or found["hangs"] or found["events"]))


def kept(before: Part, parts: list[Part], after: int, spent: float) -> Part:
    """Write what all parts come to, and return it."""
    done = sum((Counter(part["done"]) for part in parts), Counter[str]())
    slowest = max(part["slowest"] for part in parts)
    total = sum(done.values())
    by = dict(before.get("readers", {}))
    by[reader()] = by.get(reader(), 0) + total - before.get("mutations", 0)
    found: Part = {
        "mutations": total,
        "readers": by,
        "next": after,
        "done": dict(sorted(done.items())),
        "crashes": [one for part in parts for one in part["crashes"]],
        "mended": parts[0].get("mended", []),
        "slowest": round(slowest, 4),
        "hangs": int(slowest > HANG_S),
        "events": dict(sum((Counter(part["events"]) for part in parts), Counter[str]())),
        "seconds": round(spent + before.get("seconds", 0), 1),
        "version": __version__,
    }
    found |= {name: before[name] for name in ("guided",) if name in before}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    return found


if __name__ == "__main__":
    main()
