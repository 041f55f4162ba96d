"""Predictions held against what was distilled, on datasets outside the study.

    pip install scikit-image                 # two of the cases are tiles and faces that it brings
    python benchmarks/predictions.py predict --folder runs/predictions
    python benchmarks/predictions.py distill --folder runs/predictions
    python benchmarks/predictions.py collect --folder runs/predictions
    python benchmarks/predictions.py table

`predict` asks the shipped indicator and notes how long it took; `distill` runs a study with the
settings of studies/feasibility.yaml (one seed); `collect` holds one against the other in
results/predictions.json, from which `table` writes docs/predictions.md. A new indicator is asked
again; what was distilled stays. Real data below $MEDISTILL_DATA.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from medistill.data import load
from medistill.engine import local
from medistill.places import cache_folder
from medistill.plan import grid, read_study
from medistill.predict import predict
from medistill.records import Json, to_record, write_json
from medistill.study import Folder, Options, entries_of, run_study
from medistill.tabulate import Book, rows_of

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "predictions.json"
TABLE = ROOT / "docs" / "predictions.md"
BUDGETS = (1, 10)
WORKERS = 2
CASES = {
    "organs mr": "nifti:$MEDISTILL_DATA/nifti/example_mr_sm.nii.gz;"
    "labels=$MEDISTILL_DATA/nifti/example_seg_mr.nii.gz;by=image;classes=5|6|15|21|46|47",
    "digits": "npz:{folder}/digits.npz",
    "faces": "npz:{folder}/faces.npz",
    "tiles of slides and fundus": "npz:{folder}/tiles.npz",
    "cifar animals": "vary:(folder:$MEDISTILL_DATA/cifar10/cifar10_jpeg.tar.gz;limit=1000);"
    "classes=bird|deer|frog|horse",
    "phantom in color": "vary:(phantom:variation=0.3,classes=6,channels=3,size=24,seed=9,n=1200);"
    "noise=0.05",
}
KIN = {  # cases that the study knows something alike of
    "cifar animals": "other classes of an archive that the study holds",
    "phantom in color": "drawn by the study's own generator",
}


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["predict", "distill", "collect", "table"])
    parser.add_argument("--folder", type=Path, default=Path("runs/predictions"))
    given = parser.parse_args()
    if given.part == "table":
        table()
        return
    given.folder.mkdir(parents=True, exist_ok=True)
    {"predict": foretell, "distill": distill, "collect": collect}[given.part](given.folder)


def source_of(name: str, folder: Path) -> str:
    """Return the source of a case."""
    return os.path.expandvars(CASES[name].format(folder=folder.resolve()))


def foretell(folder: Path) -> None:
    """Write what the indicator says of each case from its samples alone."""
    write_images(folder)
    for name in CASES:
        splits = load(source_of(name, folder), offline=True)
        least = min(len(members) for members in splits.train.by_class)
        asked = [ipc for ipc in BUDGETS if ipc <= least]
        made = predict(splits.train, splits.val, ipc=asked, engine=local(WORKERS))
        write_json(folder / f"{name}.json", made.record(source_of(name, folder)))
        print(f"{name}: {made.seconds:.0f} s. {made.recommendation}", flush=True)


def write_images(folder: Path) -> None:
    """Write digits, faces, and tiles of three pictures as .npz files with fixed splits."""
    from skimage import data
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.kron(digits.images * (255 / 16), np.ones((2, 2))).astype(np.uint8)
    save(folder / "digits.npz", images, digits.target)
    faces = np.pad(data.lfw_subset() * 255, ((0, 0), (1, 2), (1, 2)), "edge").astype(np.uint8)
    save(folder / "faces.npz", faces, np.repeat([0, 1], 100))
    tiles, labels = [], []
    for number, picture in enumerate((data.immunohistochemistry(), data.retina(), data.cell())):
        gray = picture if picture.ndim == 2 else picture.mean(2)
        found = [
            gray[y : y + 28, x : x + 28]
            for y in range(0, gray.shape[0] - 27, 28)
            for x in range(0, gray.shape[1] - 27, 28)
        ]
        kept = [tile for tile in found if tile.std() > 2][:320]
        tiles += kept
        labels += [number] * len(kept)
    save(folder / "tiles.npz", np.stack(tiles).astype(np.uint8), np.array(labels))


def save(path: Path, images: Any, labels: Any) -> None:
    """Deal images to 70% training, 10% validation and 20% test images, class by class."""
    draw = np.random.default_rng(0)
    parts: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    for label in np.unique(labels):
        order = draw.permutation(np.flatnonzero(labels == label))
        cuts = np.split(order, [int(0.7 * len(order)), int(0.8 * len(order))])
        for name, part in zip(parts, cuts, strict=True):
            parts[name] += part.tolist()
    arrays = {}
    for name, part in parts.items():
        arrays |= {f"{name}_images": images[part], f"{name}_labels": labels[part].reshape(-1, 1)}
    np.savez(path, **arrays)


def distill(folder: Path) -> None:
    """Run the study's methods on the cases."""
    known = read_study(ROOT / "studies" / "feasibility.yaml")
    record = to_record(known) | {
        "name": "predictions",
        "sources": [{"name": name, "source": source_of(name, folder)} for name in CASES],
        "budgets": list(BUDGETS),
        "curve": list(BUDGETS),
        "seeds": 1,
        "measure": False,
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(record, sort_keys=False))
    where = local(WORKERS)
    states = run_study(
        read_study(path), folder / "study", where, cache=cache_folder(), options=Options()
    )
    print(states)


def collect(folder: Path) -> None:
    """Hold predictions against results, and write both."""
    study = Folder(folder / "study").study()
    book = Book(
        rows_of(study, entries_of(Folder(folder / "study"), grid(study))), study.every_budget
    )
    cases = []
    for name in CASES:
        told = json.loads((folder / f"{name}.json").read_text())
        lines = []
        for one in told["predictions"]:
            for metric in ("accuracy", "auc"):
                found = book.score(metric, name, one["method"], one["ipc"], study.backbones[0])
                if found is not None:
                    held = one[metric]["low"] <= found.mean <= one[metric]["high"]
                    line = {"method": one["method"], "ipc": one["ipc"], "metric": metric}
                    line |= {"told": one[metric], "reached": round(found.mean, 6)}
                    lines.append(line | {"held": bool(held)})
        ends = {
            arm: round(found.mean, 6)
            for arm in ("random", "full")
            if (found := book.score("accuracy", name, arm, BUDGETS[-1], study.backbones[0]))
        }
        case = {"case": name, "source": CASES[name], "seconds": round(told["seconds"], 1)}
        case["best"] = {ipc: promised(one, int(ipc), lines) for ipc, one in told["best"].items()}
        cases.append({**case, "ends": ends, "lines": lines})
    write_json(RESULTS, {"workers": WORKERS, "cases": cases})
    table()


def promised(best: Json, ipc: int, lines: list[Json]) -> Json:
    """Return what was promised of the best method at a budget, beside what it reached."""
    place = best["method"], ipc, "accuracy"
    line = next(one for one in lines if (one["method"], one["ipc"], one["metric"]) == place)
    held = best["accuracy"]["low"] <= line["reached"] <= best["accuracy"]["high"]
    return {**line, "told": best["accuracy"], "held": bool(held)}


def _shares(found: list[tuple[str, bool]]) -> str:
    held = sum(one for _, one in found)
    return f"{held} of {len(found)} ({100 * held / len(found):.0f}%)"


def table() -> None:
    """Write the page."""
    found = json.loads(RESULTS.read_text())
    lines = [
        "# Predictions held against results",
        "",
        "Written by `python benchmarks/predictions.py table` from "
        "`benchmarks/results/predictions.json`, whose head says how. The indicator, fitted to "
        f"{found['cases'][0]['lines'][0]['told']['n']} datasets, was asked about datasets that are "
        "not among them; every method was distilled there, with the study's settings and one seed, "
        "which the indicator knows nothing of. Two are akin to the study's: "
        + "; ".join(f"{name} ({why})" for name, why in KIN.items())
        + ". Accuracy in percent: of the method that was "
        "promised the best result, told with its 80% interval (wider than its own: who is best by "
        "prediction is so by error too), and reached; then how many of all "
        "the intervals held (accuracy and AUC of all methods and budgets).",
        "",
        f"| dataset | asked in, s ({found['workers']} workers) | per class | best by prediction | "
        "told | reached | held | intervals that held |",
        "|---|---|---|---|---|---|---|---|",
    ]
    every: list[tuple[str, bool]] = []
    firsts: list[tuple[str, bool]] = []
    for case in found["cases"]:
        for ipc in BUDGETS:
            best = case["best"][str(ipc)]
            mine = [one["held"] for one in case["lines"] if one["ipc"] == ipc]
            every += [(case["case"], held) for held in mine]
            firsts.append((case["case"], best["held"]))
            told, low, high = (100 * best["told"][name] for name in ("mean", "low", "high"))
            lines.append(
                f"| {case['case']} | {case['seconds']:.0f} | {ipc} | {best['method']} | "
                f"{told:.1f} [{low:.1f}, {high:.1f}] | {100 * best['reached']:.1f} | "
                f"{'yes' if best['held'] else 'no'} | {sum(mine)} of {len(mine)} |"
            )
    lines += [
        "",
        f"Of the methods promised best {_shares(firsts)} landed inside, of all intervals "
        f"{_shares(every)} (80% were promised); without the two that are akin "
        f"{_shares([one for one in firsts if one[0] not in KIN])} and "
        f"{_shares([one for one in every if one[0] not in KIN])}.",
    ]
    TABLE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
