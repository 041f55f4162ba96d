"""Three hospitals that share no image: what each way of working together costs and gives.

    python benchmarks/hospitals.py run        # about half an hour
    python benchmarks/hospitals.py table      # writes docs/hospitals.md and its figure

PneumoniaMNIST is dealt out to three sites: one as it is, one with less contrast and resolution, one
with noise and another balance of classes (contrast alone is undone by a site's mean and std). Each
is a process of its own that reads its part alone and leaves files behind. The fourth party has
the files. Every model is tested on each site's own test images, normalized as that site does; the
worst site counts as much as the mean. Bytes are those that travel (FedAvg: both ways), rounds how
often.

    alone         each site trains on its own images; nothing moves
    one package   the package of each site, trained on alone
    packages      all packages, `train` on several: balanced by site and class
    sketches      each site's sketch under one public normalization, merged, distilled once
    fedavg        weights travel in rounds (McMahan et al., AISTATS 2017): ROUNDS times EPOCHS local
                  epochs, averaged by the number of images; our own plain loop
    flower        the same by Flower (flower_fedavg.py, in an environment of its own)
    pooled        all images in one place
"""

import argparse
import multiprocessing
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonl
import torch

from medistill import __version__
from medistill.augment import Augmentation
from medistill.backbones import ConvNet, Network, to_spec
from medistill.budget import Budget
from medistill.compute import Compute
from medistill.data import load
from medistill.distill import Run, distill, distill_to
from medistill.features import logits_of_set
from medistill.methods import Task
from medistill.methods.base import recipe_of
from medistill.methods.sketch import FromSketch
from medistill.metrics import evaluate_task, score
from medistill.model import train_together
from medistill.package import Terms, generate, load_private, pack, read, written
from medistill.probes import SketchSpec
from medistill.progress import hushed
from medistill.records import to_record
from medistill.rng import Rng
from medistill.sets import RealSet, Recipe, Splits, SyntheticSet, normalized_by
from medistill.sketch import Sketch, merge, sketch
from medistill.train import RealImages, balanced_index, fit

RESULTS = Path(__file__).parent / "results" / "hospitals.jsonl"
TABLE = Path(__file__).parents[1] / "docs" / "hospitals.md"
SITES = {
    "A": "part=1/3",
    "B": "part=2/3;contrast=0.6;resolution=14",
    "C": "part=3/3;imbalance=3;noise=0.05",
}
STUDENT, COMPUTE = ConvNet(width=32), Compute("bfloat16")
SEEDS, IPC, STEPS, STUDENT_STEPS, RATE, BATCH = 3, 10, 600, 600, 0.01, 128
ROUNDS, EPOCHS = (1, 5, 20), 1
METHOD = FromSketch(factor=1, scale=1.0)
PUBLIC = (0.5, 0.25)
Row = dict[str, Any]


def site_splits(source: str, name: str) -> Splits:
    """Return what one site has."""
    return load(f"vary:({source});{SITES[name]}", offline=True)


def at_home(job: tuple[str, str, int, Path]) -> None:
    """Do what a site does: distill and pack, and write a sketch. Runs in a process of its own."""
    source, name, seed, place = job
    torch.set_num_threads(1)
    with hushed():
        splits = site_splits(source, name)
        task = Task(splits.train, Budget(ipc=IPC), STUDENT, compute=COMPUTE)
        home = place / name
        distill_to(home / "run", Run(METHOD, task, seed, source, "", STEPS), resume=False)
        generate(home / "keys")
        key = load_private(home / "keys" / "private.pem")
        allow: Any = ["no-audit", "no-scores"]
        files = pack(home / "run", Terms(name, site=name), [key], allow=allow)
        written(place / f"{name}.medistill", files)
        (place / f"{name}.pem").write_bytes((home / "keys" / "public.pem").read_bytes())
        card = normalized_by(splits.train.card, [PUBLIC[0]], [PUBLIC[1]])
        known = replace(splits.train, card=replace(card, name=source))
        spec = SketchSpec(to_spec(STUDENT), to_record(Augmentation()), scale=1.0, seed=seed)
        sketch(known, spec, COMPUTE).save(place / f"{name}.sketch")


def recipe_for(real: RealSet) -> Recipe:
    """Return the recipe of all students: only what normalizes is each site's own."""
    base = recipe_of(Task(real, Budget(ipc=IPC), STUDENT))
    return replace(base, steps=STUDENT_STEPS, stop=STUDENT_STEPS, lr=RATE, batch=BATCH)


def by_recipe(made: SyntheticSet) -> SyntheticSet:
    """Return a set with the recipe of all students."""
    steps: Any = {"steps": STUDENT_STEPS, "stop": STUDENT_STEPS, "lr": RATE, "batch": BATCH}
    return replace(made, recipe=replace(made.recipe, **steps))


def on_real(parts: list[RealSet], seed: int, start: Network | None = None, **how: Any) -> Network:
    """Return a network trained on real images, each site's normalized by its own statistics."""
    rng = Rng(seed).child("real")
    network = start or STUDENT.build(parts[0].card, rng.at("network"))
    recipe = replace(recipe_for(parts[0]), **how)
    fit(network, Several(parts), recipe, rng.child("fit"), compute=COMPUTE)
    return network


class Several:
    """Real images of several sites as training data."""

    def __init__(self, parts: list[RealSet]) -> None:
        self.parts = [RealImages(part, balanced_index(part)) for part in parts]
        self.ends = torch.tensor([len(part) for part in self.parts]).cumsum(0)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def draw(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return normalized images and labels, in the order of sites."""
        which = torch.bucketize(index, self.ends, right=True)
        begins = [0, *self.ends[:-1].tolist()]
        drawn = [
            part.draw(index[which == number] - begins[number])
            for number, part in enumerate(self.parts)
            if bool((which == number).any())
        ]
        images, labels = zip(*drawn, strict=True)
        return torch.cat(images), torch.cat(labels)


def fedavg(parts: list[RealSet], rounds: int, seed: int) -> Network:
    """Return the network of federated averaging, each round a pass over each site's images."""
    network = STUDENT.build(parts[0].card, Rng(seed).child("fedavg").at("network"))
    sizes = torch.tensor([float(len(part)) for part in parts])
    shares = (sizes / sizes.sum()).tolist()
    for number in range(rounds):
        start = network.parameter_state()
        total = {name: torch.zeros_like(value) for name, value in start.items()}
        for part, share in zip(parts, shares, strict=True):
            network.load_state_dict(start, strict=False)
            one_pass(part, seed * 1000 + number, network)
            for name, value in network.parameter_state().items():
                total[name] += share * value
        network.load_state_dict(total, strict=False)
    return network


def one_pass(part: RealSet, seed: int, network: Network) -> None:
    """Train a network for EPOCHS passes over one site's images: what a site does in a round."""
    steps = EPOCHS * -(-len(RealImages(part, balanced_index(part))) // BATCH)
    # The rate falls at half of a schedule: here it stays within a round.
    on_real([part], seed, network, steps=2 * steps, stop=steps)


def scores(network: Network, tests: dict[str, RealSet], public: bool = False) -> Row:
    """Return the accuracy at each site, by its own normalization or the public one."""
    found = {}
    for name, real in tests.items():
        card = normalized_by(real.card, [PUBLIC[0]], [PUBLIC[1]]) if public else real.card
        seen = replace(real, card=card)
        found[name] = evaluate_task(card.task, logits_of_set(network, seen), real.labels)
    return {
        "accuracy": {name: one["accuracy"] for name, one in found.items()},
        "auc": {name: one["auc"] for name, one in found.items()},
    }


def measured(source: str, seed: int) -> list[Row]:
    """Return one line for each way of working together."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder, hushed():
        place = Path(folder)
        jobs = [(source, name, seed, place) for name in SITES]
        with multiprocessing.get_context("spawn").Pool(2, maxtasksperchild=1) as pool:
            pool.map(at_home, jobs, chunksize=1)
        splits = {name: site_splits(source, name) for name in SITES}
        trains = [one.train for one in splits.values()]
        # A test image's statistics are the site's: those of its training split.
        tests = {name: one.test for name, one in splits.items()}
        packages = {n: read(place / f"{n}.medistill", place / f"{n}.pem") for n in SITES}
        sets = {name: by_recipe(one.synthetic) for name, one in packages.items()}
        moved = sum((place / f"{name}.medistill").stat().st_size for name in SITES)

        def add(way: str, network: Network, sent: int, rounds: int, public: bool = False) -> None:
            told = {"source": source, "way": way, "seed": seed, "bytes": sent, "rounds": rounds}
            rows.append({**told, **scores(network, tests, public), "version": __version__})

        for name in SITES:
            add(f"alone {name}", on_real([splits[name].train], seed), 0, 0)
            one = (place / f"{name}.medistill").stat().st_size
            add(f"one package {name}", train_together([sets[name]], seed=seed), one, 1)
        add("packages", train_together(list(sets.values()), seed=seed), moved, 1)
        held = [Sketch.load(place / f"{name}.sketch") for name in SITES]
        merged = merge(held)
        empty, how = merged.without_images(), {"compute": COMPUTE, "sketch": merged}
        task = Task(empty, Budget(ipc=IPC), STUDENT, **how)  # type: ignore[arg-type]
        made = distill(METHOD, task, seed=seed, steps=STEPS)
        sent = sum((place / f"{name}.sketch").stat().st_size for name in SITES)
        add("sketches", train_together([by_recipe(made)], seed=seed), sent, 1, public=True)
        weights = 4 * sum(
            p.numel() for p in STUDENT.build(trains[0].card, Rng(0).at("x")).parameters()
        )
        for rounds in ROUNDS:
            traffic = 2 * weights * len(SITES) * rounds
            add(f"fedavg {rounds}", fedavg(trains, rounds, seed), traffic, rounds)
        pixels = sum(part.images.numel() + len(part) for part in trains)
        add("pooled", on_real(trains, seed), pixels, 1)
    return rows


def main() -> None:
    """Measure what is missing, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["run", "table"])
    parser.add_argument("--source", default="pneumoniamnist")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.part == "table":
        table()
        return
    known = jsonl.read(RESULTS)
    for seed in range(given.seeds):
        if not any((row["source"], row["seed"]) == (given.source, seed) for row in known):
            found = measured(given.source, seed)
            jsonl.append(RESULTS, found)
            for row in found:
                print(seed, row["way"], row["bytes"], row["accuracy"], flush=True)


def summary() -> list[Row]:
    """Return one line for each way: means over seeds, of sites where one of them is meant."""
    groups: dict[str, list[Row]] = {}
    for row in jsonl.read(RESULTS):
        way = row["way"]
        kind = way if way.startswith(("fedavg", "flower")) else way.rpartition(" ")[0] or way
        groups.setdefault(kind, []).append(row)
    told = []
    for kind, rows in groups.items():
        means = [sum(row["accuracy"].values()) / len(row["accuracy"]) for row in rows]
        worst = [min(row["accuracy"].values()) for row in rows]
        told.append(
            {
                "way": kind,
                "mean": score(means),
                "worst": score(worst),
                "bytes": sum(row["bytes"] for row in rows) / len(rows),
                "rounds": rows[0]["rounds"],
            }
        )
    return told


def said(by: dict[str, Row]) -> list[str]:
    """Return what the numbers say, in words."""
    alone, sent, pooled = (by[way] for way in ("alone", "packages", "pooled"))
    mean = {way: 100 * row["mean"].mean for way, row in by.items()}
    told = [
        f"Packages of all three reach {mean['packages']:.1f}, pooled images {mean['pooled']:.1f}: "
        f"{pooled['bytes'] / sent['bytes']:.0f} times fewer bytes, in one round, and no site waits "
        "for another."
    ]
    rounds = [row for way, row in by.items() if way.startswith("fedavg")]
    better = [row for row in rounds if row["mean"].mean > sent["mean"].mean]
    if better:
        first = min(better, key=lambda row: row["bytes"])
        told.append(
            f"Federated averaging passes them after {first['rounds']} rounds and "
            f"{first['bytes'] / sent['bytes']:.0f} times the bytes."
        )
    sums = by["sketches"]
    told.append(
        f"Merged sketches move {sums['bytes'] / sent['bytes']:.0f} times the bytes of packages and "
        f"reach {mean['sketches']:.1f}: they pay where noise is added to them, or a later set is "
        "to be made of the same sums."
    )
    if alone["mean"].mean > sent["mean"].mean:
        told.append(
            f"These sites have images enough of their own: each does better alone "
            f"({mean['alone']:.1f}) than with what the others send. Packages are for those who "
            "have no images, or too few."
        )
    return [" ".join(told)]


def table() -> None:
    """Write the page and its figure."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    rows = summary()
    lines = [
        "# Three hospitals",
        "",
        "Written by `python benchmarks/hospitals.py table` from "
        "`benchmarks/results/hospitals.jsonl`, whose head says how. Accuracy in percent with 95% t "
        "intervals over seeds (and sites, where one of them is meant), on each site's own test "
        "images: the mean of three sites, and the worst of them. Bytes moved: what leaves the "
        "sites, and of federated averaging also what comes back to them in each round.",
        "",
        "PneumoniaMNIST is dealt to three sites: one as it is, one with less contrast and "
        "resolution, one with noise and another balance of classes. Ways: *alone*, each trains on "
        "its own images; *one package*, on another's; *packages*, on all three; *sketches*, merged "
        "and distilled once; *fedavg N* and *flower N*, weights travel in N rounds, by a plain "
        "loop and by Flower; *pooled*, all images in one place.",
        "",
        "| way | mean | worst site | bytes moved | rounds |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            f"{100 * s.mean:.1f} [{100 * (s.low or s.mean):.1f}, {100 * (s.high or s.mean):.1f}]"
            for s in (row["mean"], row["worst"])
        ]
        lines.append(
            f"| {row['way']} | {cells[0]} | {cells[1]} | {row['bytes']:,.0f} | {row['rounds']} |"
        )
    lines += ["", *said({row["way"]: row for row in rows})]
    lines += ["", "![Accuracy against bytes moved](hospitals.png)"]
    TABLE.write_text("\n".join(lines) + "\n")
    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    # Flower's points lie on those of our own loop: their mark is a ring around them.
    plain = [row["way"] for row in rows if not row["way"].startswith("flower")]
    for row in rows:
        place, ring = max(row["bytes"], 1e3), row["way"] not in plain
        color = f"C{plain.index(row['way'].replace('flower', 'fedavg'))}"
        how = {"s": 110, "facecolors": "none", "edgecolors": color} if ring else {"color": color}
        axes.scatter(place, 100 * row["worst"].mean, marker="v", **how)
        axes.scatter(place, 100 * row["mean"].mean, **how)
        if not ring:
            at = (place, 100 * row["mean"].mean)
            axes.annotate(row["way"], at, (0, 9), textcoords="offset points", ha="center", size=8)
    axes.set(
        xscale="log",
        xlabel="bytes moved (none: at 1 kB)",
        ylabel="accuracy, % (dot: mean of sites, triangle: worst; ring: Flower)",
    )
    axes.yaxis.label.set_size(8)
    axes.margins(0.1)
    figure.savefig(TABLE.with_suffix(".png"), dpi=130)


if __name__ == "__main__":
    main()
