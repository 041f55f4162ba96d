"""Whether the audit's own controls and the audit of a release are what they claim to be.

    python benchmarks/controls.py run [--only release|negative|positive|near]
    python benchmarks/controls.py table     # writes docs/controls.md

`release`: RELEASES audits of 20,000 private releases (more below epsilon 1.5) with and without the
longest vector, each with fresh noise; how often the lower bound is at most epsilon, and how much of
epsilon it reaches.
`negative`: models of random real images, attacked with members that were drawn anew by SEEDS sets
of coins; how often the 95% intervals hold what nothing to find gives. `positive`: copies of real
images; what the attack on the set finds at one false alarm in a hundred, and the area of the best
attack on the student. `near`: sets of ten training images per class that were changed a little;
how many of them the copy check suspects, and how often it fails sets of as many images of the test
split. Results go to results/controls.json.
"""

import argparse
import dataclasses
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from medistill import __version__
from medistill.audit import audit_mechanism, copies, worst_patient
from medistill.audit.affordable import copying
from medistill.audit.battery import CONTROL_STEPS, LEVEL_OF_ALL, NUMBERS
from medistill.audit.copies import FAILS
from medistill.audit.membership import (
    Leak,
    Way,
    attack,
    guessed,
    nothing_to_find,
    pool_of,
    shadows,
)
from medistill.audit.verdict import COPIED, POSITIVE, tells
from medistill.backbones import ConvNet
from medistill.budget import Budget
from medistill.compute import Compute
from medistill.data import load
from medistill.distill import distill
from medistill.methods import Task
from medistill.methods.random import Random
from medistill.privacy import Guarantee, bound_of, noise_of
from medistill.progress import hushed
from medistill.rng import Rng
from medistill.sets import Splits, SyntheticSet

RESULTS = Path(__file__).parent / "results" / "controls.json"
TABLE = Path(__file__).parents[1] / "docs" / "controls.md"
SETS = ("breastmnist", "vary:pneumoniamnist;n=2000")
RELEASES, EPSILONS, SEEDS, MODELS, IMAGES = 40, (0.5, 1.0, 2.0, 4.0, 8.0), 200, 8, 400
RATE, DELTA = 0.01, 1e-5
Change = Callable[[Tensor, torch.Generator], Tensor]
NEAR = (
    "Suspects come nearer to one training image than the nearest share of held-out images that is "
    "in brackets (of five yardsticks the one that says most); a set fails where they are more than "
    "chance gives. A few copies among others fail only where they are nearer than the very nearest "
    "held-out images; what was moved further than a pixel is not found, and what two images share "
    "seldom: look at the gallery, and at what the attack on the set finds."
)
DRAWS, FEW = 100, (1, 3, 5)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parts = {"release": release, "negative": negative, "positive": positive, "near": near}
    parser.add_argument("part", choices=["run", "table"])
    parser.add_argument("--only", choices=list(parts), action="append")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.part == "table":
        table()
        return
    held = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for name in given.only or parts:
        held[name] = parts[name]()
        held["version"] = __version__
        lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in held.items())
        RESULTS.write_text("{" + ",\n".join(lines) + "}\n")
        print(name, json.dumps(held[name])[:400], flush=True)


def release() -> list[dict[str, Any]]:
    """Audit the release many times, each with noise of its own."""
    found = []
    for epsilon in EPSILONS:
        promise = Guarantee(epsilon, DELTA, "patient", noise_of(epsilon, DELTA), bound_of(20))
        zeros = torch.zeros(NUMBERS, dtype=torch.int64)
        worst = worst_patient((NUMBERS,), promise.bound)
        bounds = []
        for _ in range(RELEASES):
            with hushed():
                one = audit_mechanism(zeros, worst, promise)
            bounds.append(round(one.lower, 4))
        found.append({"epsilon": epsilon, "runs": one.runs, "lower": bounds})
    return found


def way() -> Way:
    """Return the way that needs no distillation."""
    return Way(Random(), Budget(ipc=10), ConvNet(width=32), compute=Compute("bfloat16"))


def negative() -> list[dict[str, Any]]:
    """Attack members that were never in, by many coins."""
    found = []
    for name in SETS:
        splits = load(name, offline=True)
        pool = pool_of(splits.train, splits.val, images=IMAGES, canaries=IMAGES // 5)
        with hushed():
            held = shadows(pool, way(), models=MODELS)
        rows: dict[str, list[dict[str, float]]] = {}
        told, proved = 0, []
        for seed in range(SEEDS):
            nothing = nothing_to_find(pool, held, seed)
            told += any(map(tells, curves(attack(pool, nothing, level=LEVEL_OF_ALL))))
            proved.append(round(guessed(pool, nothing, 0.0).lower, 4))
            for leak in attack(pool, nothing):
                for side, curve in (("natural", leak.natural), ("canaries", leak.canaries)):
                    assert curve is not None
                    at = next(one for one in curve.found if one.rate == RATE)
                    row = {"auc_low": curve.auc_low, "auc_high": curve.auc_high}
                    row |= {"low": at.low, "high": at.high}
                    row = {key: round(value, 4) for key, value in row.items()}
                    rows.setdefault(f"{leak.attack} of {side}", []).append(row)
        row_of = {"set": name, "models": MODELS, "attacks": rows}
        found.append(row_of | {"told": told, "one_run": proved})
    return found


def curves(leaks: list[Leak]) -> list[dict[str, Any]]:
    """Return what verdicts look at."""
    sides = [side for leak in leaks for side in (leak.natural, leak.canaries) if side is not None]
    return [dataclasses.asdict(side) for side in sides]


def positive() -> list[dict[str, Any]]:
    """Attack copies of real images."""
    found = []
    for name in SETS:
        splits = load(name, offline=True)
        pool = pool_of(splits.train, splits.val, images=IMAGES, canaries=IMAGES // 5)
        with hushed():
            held = shadows(pool, copying(way(), CONTROL_STEPS), models=MODELS)
        one = guessed(pool, held, 0.0)
        row = {"set": name, "attack": "one run", "lower": one.lower, "provable": one.provable}
        found.append(row | {"right": one.right, "guesses": one.guesses})
        for leak in attack(pool, held, level=LEVEL_OF_ALL):
            for side, curve in (("natural", leak.natural), ("canaries", leak.canaries)):
                assert curve is not None
                at = next(one for one in curve.found if one.rate == RATE)
                row = {"set": name, "attack": leak.attack, "images": side}
                row |= {"auc": round(curve.auc, 4), "auc_low": round(curve.auc_low, 4)}
                found.append(row | {"tpr": round(at.tpr, 4), "low": at.low, "members": at.members})
    return found


def near() -> list[dict[str, Any]]:
    """Hide real images in a set, changed in one way, and count what the copy check suspects."""
    found = []
    for name in SETS:
        splits = load(name, offline=True)
        made = distill(Random(), Task(splits.train, Budget(ipc=10), ConvNet(width=32)), seed=0)
        for change, way_ in CHANGES.items():
            images = way_(made.images.cpu(), Rng(0).at(change)).clamp(0, 1)
            changed = dataclasses.replace(made, images=images)
            row: dict[str, Any] = {"set": name, "change": change, "images": len(images)}
            found.append(row | views(changed, splits))
        found += few_copies(name, splits, made)
        found.append(never_seen(name, splits, made))
    return found


def few_copies(name: str, splits: Splits, made: SyntheticSet) -> list[dict[str, Any]]:
    """Hide few changed real images among test images, none of which equals a training image."""
    draws = (dataclasses.replace(made, images=test_images(splits, n)) for n in range(DRAWS))
    unseen = next(
        one
        for one in draws
        if not any(found.exact for found in copies(one, splits.train, splits.val))
    )
    found = []
    for few in FEW:
        images = unseen.images.clone()
        images[:few] = noisy(0.02)(made.images[:few].cpu(), Rng(0).at("few")).clamp(0, 1)
        row = {"set": name, "change": f"noise of 0.02, {few} of 20", "images": len(images)}
        found.append(row | views(dataclasses.replace(made, images=images), splits))
    return found


def views(made: SyntheticSet, splits: Splits) -> dict[str, Any]:
    """Return what the copy check says of a set."""
    kept = ("suspects", "share", "failed")
    found = copies(made, splits.train, splits.val)
    return {one.view: {key: getattr(one, key) for key in kept} for one in found}


def test_images(splits: Splits, draw: int) -> Tensor:
    """Return ten images of each class of the test split, as intensities."""
    generator = Rng(draw).at("test images")
    chosen = [
        members[torch.randperm(len(members), generator=generator)[:10]]
        for members in splits.test.by_class
    ]
    return splits.test.images[torch.cat(chosen)].float() / splits.test.full


def never_seen(name: str, splits: Splits, made: SyntheticSet) -> dict[str, Any]:
    """Return how often sets of test images fail, and how often for one that a member equals."""
    size, near_, equal = len(made.images), [0, 0], [0, 0]
    for draw in range(DRAWS):
        unseen = dataclasses.replace(made, images=test_images(splits, draw))
        for view, one in enumerate(copies(unseen, *splits[:2], seed=draw)):
            near_[view] += one.p_value < FAILS
            equal[view] += one.exact > 0
    return {"set": name, "draws": DRAWS, "images": size, "near": near_, "equal": equal}


def noisy(deviation: float) -> Change:
    """Return what adds noise of a deviation, in parts of the range of intensities."""
    return lambda images, generator: (
        images + deviation * torch.randn(images.shape, generator=generator)
    )


def moved(pixels: int) -> Change:
    """Return what moves images to the right and down."""
    return lambda images, _: images.roll((pixels, pixels), (-1, -2))


def blurred(images: Tensor, _: torch.Generator) -> Tensor:
    """Average each 3 x 3 pixels."""
    return F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)


def turned(images: Tensor, _: torch.Generator) -> Tensor:
    """Turn by ten degrees."""
    angle = math.radians(10)
    rotation = [[math.cos(angle), -math.sin(angle), 0.0], [math.sin(angle), math.cos(angle), 0.0]]
    grid = F.affine_grid(
        torch.tensor(rotation).expand(len(images), 2, 3), list(images.shape), align_corners=False
    )
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def mixed(images: Tensor, _: torch.Generator) -> Tensor:
    """Take the mean of each two."""
    return (images + images.roll(1, 0)) / 2


CHANGES: dict[str, Change] = {
    "none": lambda images, _: images,
    "half the contrast": lambda images, _: images * 0.5 + 0.25,
    "noise of 0.02": noisy(0.02),
    "noise of 0.05": noisy(0.05),
    "noise of 0.1": noisy(0.1),
    "blurred, 3 x 3": blurred,
    "moved by 1 pixel": moved(1),
    "moved by 2 pixels": moved(2),
    "turned by 10 degrees": turned,
    "mean of two": mixed,
}


def table() -> None:
    """Write the page."""
    held = json.loads(RESULTS.read_text())
    lines = [
        "# Are the audit's controls what they claim to be?",
        "",
        "Written by `python benchmarks/controls.py table` from `benchmarks/results/controls.json`; "
        "its head says how.",
    ]
    if "release" in held:
        lines += ["", "## The release", ""]
        heads = ("epsilon", "audits", "releases", "lower bound, mean", "least", "most")
        heads += ("at most epsilon", "0.8 epsilon or more")
        lines += ["| " + " | ".join(heads) + " |"]
        lines += ["|---" * 8 + "|"]
        for row in held["release"]:
            low, claim = row["lower"], row["epsilon"]
            shares = [
                f"{sum(one <= claim for one in low)} of {len(low)}",
                f"{sum(one >= 0.8 * claim for one in low)} of {len(low)}",
            ]
            lines.append(
                f"| {claim:g} | {len(low)} | {row['runs']:,} | {statistics.mean(low):.3f} "
                f"| {min(low):.3f} | {max(low):.3f} | {shares[0]} | {shares[1]} |"
            )
    if "negative" in held:
        lines += ["", "## Nothing to find", ""]
        lines += ["| set | attack | coins | area covers one half | share covers its rate |"]
        lines += ["|---" * 5 + "|"]
        for row in held["negative"]:
            for attack_, found in row["attacks"].items():
                area = sum(one["auc_low"] <= 0.5 <= one["auc_high"] for one in found)
                share = sum(one["low"] <= RATE <= one["high"] for one in found)
                lines.append(
                    f"| {row['set']} | {attack_} | {len(found)} | {100 * area / len(found):.1f}% "
                    f"| {100 * share / len(found):.1f}% |"
                )
        for row in held["negative"]:
            if "told" in row:
                lines += [
                    "",
                    f"{row['set']}: a verdict would have said that something was found by "
                    f"{row['told']} of {SEEDS} coins, by natural images or canaries (5 in 100 are "
                    "meant, at most). A bound on epsilon from one run is above 0 in "
                    f"{sum(one > 0 for one in row['one_run'])} of {len(row['one_run'])} (5 in 100 "
                    "are meant, at most).",
                ]
    if "positive" in held:
        lines += ["", "## Copies to find", ""]
        heads = ("set", "attack", "images", "area", "its interval's low end")
        heads += ("found at one false alarm in a hundred", "sees its control")
        lines += ["| " + " | ".join(heads) + " |", "|---" * 7 + "|"]
        for row in (row for row in held["positive"] if row["attack"] != "one run"):
            sees = row["tpr"] >= COPIED if row["attack"] == "set" else row["auc_low"] > POSITIVE
            lines.append(
                f"| {row['set']} | {row['attack']} | {row['images']} | {row['auc']:.3f} "
                f"| {row['auc_low']:.3f} | {100 * row['tpr']:.1f}% of {row['members']:,} "
                f"| {'yes' if sees else 'no'} |"
            )
        lines += [
            "",
            "An audit says that nothing was found only where the attack on the set finds "
            f"{100 * COPIED:.0f}% of copies at one false alarm in a hundred, and some attack on a "
            f"student an area beyond {POSITIVE:g} with its interval (for all of an audit's areas "
            "and rates together). Attacks on a student do not find 99% of copies at so few false "
            "alarms: a student of a copy is far less sure than a copy is near.",
            "",
            *(
                f"{row['set']}: one run guesses {row['right']} of {row['guesses']} canaries right, "
                f"which proves an epsilon of {row['lower']:.2f} or more; {row['provable']:.2f} "
                "could be shown."
                for row in held["positive"]
                if row["attack"] == "one run"
            ),
        ]
    if "near" in held:
        lines += near_lines(held["near"])
    TABLE.write_text("\n".join(lines) + "\n")


def near_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Return what the copy check finds of changed real images, and how often it is wrong."""
    lines = ["", "## Near copies to find", ""]
    lines.append("| set | change | suspects, pixels | fails | suspects, features | fails |")
    lines.append("|---" * 6 + "|")
    for row in rows:
        if "change" in row:
            cells = [
                f"{row[view]['suspects']} of {row['images']} ({100 * row[view]['share']:g}%) "
                f"| {'yes' if row[view]['failed'] else 'no'}"
                for view in ("pixels", "features")
            ]
            lines.append(f"| {row['set']} | {row['change']} | " + " | ".join(cells) + " |")
    lines += ["", NEAR]
    for row in rows:
        if "draws" in row:
            shared = ", which the public splits share" * (sum(row["equal"]) > 0)
            lines += [
                "",
                f"{row['set']}: of {row['draws']} sets of {row['images']} test images, which were "
                f"never seen, {row['near'][0]} failed for near copies in pixels and "
                f"{row['near'][1]} in features (one in 200 is meant, at most), and "
                f"{row['equal'][0]} and {row['equal'][1]} for an image that equals a training "
                f"image{shared}.",
            ]
    return lines


if __name__ == "__main__":
    main()
