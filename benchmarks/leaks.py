"""What attacks find in distilled medical images, method by method, from noise and from real images.

    python benchmarks/leaks.py run --only breastmnist     # stopped and started again at will
    python benchmarks/leaks.py table                      # writes docs/leaks.md

Each line is the audit of one way (`medistill audit`): a set of ten images per class for each model,
models on images drawn by coins, a student of 300 steps on each, LiRA and RMIA, a fifth of the
images with a wrong label; copies and reconstruction of one whole run. Methods make the steps of
studies/feasibility.yaml. With an epsilon, each model distills a private sketch of its own, of the
command line's defaults, also where the command would refuse so much noise; `small` is a sketch as
small as these without noise. Rows go to results/leaks.jsonl; those of an earlier form of the audit
are measured again, and marked in the table until then.
"""

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import jsonl
import torch

from medistill import __version__
from medistill.audit import audit_run
from medistill.audit.verdict import FORMAT as AUDIT
from medistill.audit.verdict import POSITIVE
from medistill.augment import Augmentation
from medistill.backbones import ConvNet, to_spec
from medistill.budget import Budget
from medistill.cli.private import PRIVATE
from medistill.compute import Compute
from medistill.data import load
from medistill.distill import Run, distill_to
from medistill.engine import local
from medistill.ledger import Ledger
from medistill.methods import Method, Task, make
from medistill.methods.sketch import FromSketch
from medistill.places import cache_folder
from medistill.plan import read_study
from medistill.private_sketch import HOPELESS, plan, private_sketch
from medistill.probes import SketchSpec
from medistill.records import to_record
from medistill.sets import RealSet, Splits, normalized_by

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "leaks.jsonl"
TABLE = ROOT / "docs" / "leaks.md"
IPC = 10
# Images that are asked about, and models. Of the last set only private ways and what they stand
# beside: it has images enough that noise drowns no class of an attacked model at epsilon 1.
SETS = {
    "breastmnist": (400, 16),
    "vary:pneumoniamnist;n=2000": (400, 16),
    "pneumoniamnist": (1600, 8),
}
CONTROL_STEPS = 2000  # of 400, 1,200 and 2,000: until a student gives copies away on BreastMNIST
STUDENT = ConvNet(width=32)
COMPUTE = Compute("bfloat16")
WAYS = (
    ("random", ""),
    ("dc", "noise"),
    ("dc", "real"),
    ("dsa", "noise"),
    ("dsa", "real"),
    ("dm", "noise"),
    ("dm", "real"),
    ("mtt", "noise"),
    ("mtt", "class-mean"),
    ("mtt", "real"),
    ("datm", "noise"),
    ("datm", "real"),
    ("sketch", "noise"),
    ("sketch", "real"),
    ("sketch", "noise, small"),
    *(("sketch", f"noise, epsilon {epsilon:g}") for epsilon in (8.0, 1.0)),
)
DELTA = 1e-5
NOISE = """Noise of the smallest class in a private sketch of all images: {}. Each attacked model
has fewer images and as much noise; beyond 1 a class is drowned there, and that nothing is found is
no verdict. [Private](private.md) has the accuracy of such sets."""
SIDES = ("natural", "canaries")
BEFORE = "medistill audit 4"
OLDER = "Rows with an asterisk are of an earlier form of the audit. "


def main() -> None:
    """Run or tabulate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["run", "table"])
    parser.add_argument("--only", choices=list(SETS), action="append")
    parser.add_argument("--method", action="append", choices=[way[0] for way in WAYS])
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.part == "table":
        table()
        return
    done = {place(row) for row in jsonl.read(RESULTS) if current(row)}
    for name in SETS:
        for method, start in WAYS:
            wanted = not given.only or name in given.only
            wanted &= not given.method or method in given.method
            # No promise covers a choice of images.
            wanted &= "epsilon" not in start or ";n=" not in name
            few = "epsilon" in start or "small" in start or method == "random"
            wanted &= few or name != "pneumoniamnist"
            if wanted and (name, method, start) not in done:
                row = measured(name, method, start, given.workers)
                jsonl.append(RESULTS, [row])
                print(name, method, start, row["membership"]["lira"], flush=True)


def current(row: dict[str, Any]) -> bool:
    """Say whether a row is of today's audit, as far as tables show it.

    The form before said nothing of what noise drowns, and judged one run by another score.
    """
    return row.get("format") == AUDIT or (row.get("format") == BEFORE and "noise" not in row)


def place(row: dict[str, Any]) -> tuple[str, str, str]:
    """Return what a row is about."""
    return row["set"], row["method"], row["start"]


def measured(name: str, method: str, start: str, workers: int) -> dict[str, Any]:
    """Distill once, audit the run, and return what tables need of it."""
    study = read_study(ROOT / "studies" / "feasibility.yaml")
    known = {way.title: way for way in study.methods}
    way = known.get(method)
    settings = dict(way.settings) if way else {}
    steps = way.steps.get(IPC) if way else None
    if start:
        settings["start"] = start
    splits = load(name, offline=True)
    images, models = SETS[name]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        if "epsilon" in start:
            made, task = private(splits, float(start.split()[-1]), Path(place))
        elif "small" in start:
            made = FromSketch(start="noise", **PRIVATE)
            task = Task(public(splits.train), Budget(ipc=IPC), STUDENT, compute=COMPUTE)
        else:
            made = make(method, settings)
            task = Task(splits.train, Budget(ipc=IPC), STUDENT, compute=COMPUTE)
        distill_to(folder, Run(made, task, 0, name, "", steps), resume=False, cache=cache_folder())
        found = audit_run(
            folder,
            splits,
            models=models,
            images=images,
            compute=COMPUTE,
            control_steps=CONTROL_STEPS,
            engine=local(workers),
            cache=cache_folder(),
        )
    kept = ("membership", "positive_control", "negative_control", "one_run", "verdict", "seconds")
    row = {"set": name, "method": method, "start": start, "version": __version__}
    row["format"] = found["format"]
    row |= {key: found[key] for key in (*kept, "models", "images", "canaries")}
    row["copies"] = [
        {key: one[key] for key in ("view", "exact", "suspects", "images", "failed")}
        for one in found["copies"]
    ]
    if "epsilon" in start:
        row["noise"] = noise_of_smallest(splits.train, float(start.split()[-1]))
        row["attacked_noise"] = found["noise"]
    return row | {"reconstruction": found.get("reconstruction")}


def noise_of_smallest(real: RealSet, epsilon: float) -> float:
    """Return the noise of the smallest class's mean, as a share of the longest there is."""
    return plan(public(real), spec_of_private(), **asked(real, epsilon)).worst.noise


def spec_of_private() -> SketchSpec:
    """Return what the command line makes a private sketch of."""
    return SketchSpec(to_spec(STUDENT), to_record(Augmentation()), **PRIVATE)


def asked(real: RealSet, epsilon: float) -> dict[str, Any]:
    """Return what a release is asked for."""
    return {"epsilon": epsilon, "delta": DELTA, "unit": "image", "classes": real.card.classes}


def private(splits: Splits, epsilon: float, place: Path) -> tuple[Method, Task]:
    """Return what distills a private sketch: each image is a unit, no image left in reach."""
    real, ledger = public(splits.train), Ledger(place / "ledger.json")
    given = asked(real, epsilon)
    held = private_sketch(real, spec_of_private(), ledger, **given, compute=COMPUTE)
    method = FromSketch(start="noise", **PRIVATE)
    budget = Budget(ipc=IPC)
    return method, Task(held.without_images(), budget, STUDENT, compute=COMPUTE, sketch=held)


def public(real: RealSet) -> RealSet:
    """Return images with a normalization that everybody knows."""
    channels = real.card.channels
    card = normalized_by(real.card, [0.5] * channels, [0.25] * channels)
    return dataclasses.replace(real, card=card)


def table() -> None:
    """Write the page."""
    # Of a way that was measured again the last row counts.
    latest = {place(row): row for row in jsonl.read(RESULTS)}.values()
    lines = [
        "# What attacks find",
        "",
        "Written by `python benchmarks/leaks.py table` from `benchmarks/results/leaks.jsonl`; its "
        f"head says how. {IPC} images per class: each model distills the half of the images that "
        f"are asked about which coins gave it, and a {STUDENT.name} "
        "learns from that for 300 steps; copies are looked for in one more set of the same way, "
        "made once. Area under the curve with an interval of 95% for "
        "all areas and rates of a row together, and members found at one false alarm in a hundred "
        "(percent) with one of 95% each; canaries have a wrong label. A rate is in brackets where "
        "too few others measure it; one in a thousand would need 2,995 of them, and is left out. "
        + OLDER
        * (not all(map(current, latest)))
        + "That an attack finds nothing says nothing of other attacks. A small sketch, or one with "
        f"epsilon, is of {PRIVATE['networks']} networks with {PRIVATE['frequencies']} frequencies, "
        "looks at the last layer, and knows no mean and std of the data.",
    ]
    for name in dict.fromkeys(row["set"] for row in latest):
        images, models = next((r["images"], r["models"]) for r in latest if r["set"] == name)
        asked_about = f"{images:,} training images are asked about, by {models} models."
        lines += ["", f"## {name}", "", asked_about, ""]
        heads = ("method", "start", "LiRA", "LiRA, canaries", "RMIA", "RMIA, canaries")
        heads += (
            "set",
            "set, canaries",
            "equal to a real image",
            "near copies: pixels, features",
            "lead back to their start",
            "verdict",
        )
        lines.append("| " + " | ".join(heads) + " |")
        lines.append("|---" * len(heads) + "|")
        rows = sorted(
            (row for row in latest if row["set"] == name and place(row)[1:] in WAYS),
            key=lambda row: WAYS.index((row["method"], row["start"])),
        )
        lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
        first = next(filter(current, rows), rows[0])
        for control in ("positive_control", "negative_control"):
            told = curves(first[control])
            lines.append(f"| {control.replace('_', ' ')} | | " + " | ".join(told) + " | | | | |")
        lines += [line for line in (power(rows), drowned(rows)) if line]
    TABLE.write_text("\n".join(lines) + "\n")


def power(rows: list[dict[str, Any]]) -> str:
    """Say which attacks did not find their own control in some of these audits."""
    rows = list(filter(current, rows))
    if not rows:
        return ""
    names = [f"{attack} of {side}" for attack in rows[0]["membership"] for side in SIDES]
    blind = [one for one in names if any(one in row["verdict"]["blind"] for row in rows)]
    seen = [one for one in names if one not in blind]
    return (
        f"\nThe positive control is found by {', '.join(seen)}; that {', '.join(blind)} find "
        "nothing says nothing, for they do not find their control beyond an area of "
        f"{POSITIVE:g} either."
    )


def drowned(rows: list[dict[str, Any]]) -> str:
    """Say which private sketches the command would refuse, for their noise drowns a class."""
    told = [
        f"{row['noise']:.2f} of the longest mean there is at {row['start'].split(', ')[1]}"
        + ", which `medistill sketch` refuses" * (row["noise"] > HOPELESS)
        + (f" ({row['attacked_noise']:.2f} in an attacked model)" if current(row) else "")
        for row in rows
        if "noise" in row
    ]
    return f"\n{NOISE.format('; '.join(told))}" if told else ""


def cells(row: dict[str, Any]) -> list[str]:
    """Return a line's cells."""
    copied, back = row["copies"][0], row["reconstruction"]
    led = f"{back['recovered']} of {back['images']}" if back else ""
    told = row["verdict"]["reasons"]
    if row["verdict"]["membership"] != "valid":
        told = [*told, row["verdict"]["membership"]]
    return [
        row["method"] + ("" if current(row) else " \\*"),
        row["start"] or "real",
        *curves(row["membership"]),
        f"{copied['exact']} of {copied['images']}",
        ", ".join(str(one["suspects"] * one["failed"]) for one in row["copies"]),
        led,
        "; ".join(told) or "none found by attacks that see their control",
    ]


def curves(found: dict[str, Any]) -> list[str]:
    """Return all attacks on both kinds of images."""
    told = []
    for attack in ("lira", "rmia", "set"):
        for side in SIDES:
            one = found[attack][side]
            at = one["found"][-1]
            share = f"{100 * at['tpr']:.1f} [{100 * at['low']:.1f}, {100 * at['high']:.1f}]"
            share = share if at["resolved"] else f"({share})"
            told.append(f"{one['auc']:.2f} [{one['auc_low']:.2f}, {one['auc_high']:.2f}]; {share}")
    return told


if __name__ == "__main__":
    main()
