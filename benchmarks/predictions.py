"""Predictions held against what was distilled afterwards, on datasets that the study never saw.

    pip install scikit-image                 # two of the cases are tiles and faces that it brings
    python benchmarks/predictions.py predict --folder runs/predictions
    python benchmarks/predictions.py distill --folder runs/predictions
    python benchmarks/predictions.py table --folder runs/predictions

`predict` asks the shipped indicator first and notes how long it took; `distill` runs a study with
the settings of studies/feasibility.yaml (one seed); `table` writes results/predictions.json and
prints how often 80% intervals held. Real data below $MEDISTILL_DATA.
"""

import argparse
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from medistill.data import load
from medistill.engine import local
from medistill.places import cache_folder
from medistill.predict import predict
from medistill.records import to_record, write_json
from medistill.study import Folder, Options, entries_of, grid, read_study, run_study
from medistill.tabulate import Book, rows_of

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "predictions.json"
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


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["predict", "distill", "table"])
    parser.add_argument("--folder", type=Path, required=True)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    {"predict": foretell, "distill": distill, "table": table}[given.part](given.folder)


def source_of(name: str, folder: Path) -> str:
    """Return the source of a case."""
    return os.path.expandvars(CASES[name].format(folder=folder.resolve()))


def foretell(folder: Path) -> None:
    """Write what the indicator says of each case before anything is distilled."""
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


def table(folder: Path) -> None:
    """Hold predictions against results, and write both."""
    study = Folder(folder / "study").study()
    book = Book(rows_of(study, entries_of(Folder(folder / "study"), grid(study))), study.budgets)
    backbone, cases = study.backbones[0], []
    for name in CASES:
        told = json.loads((folder / f"{name}.json").read_text())
        lines = []
        for one in told["predictions"]:
            place = (name, one["method"], one["ipc"], backbone)
            for metric in ("accuracy", "auc"):
                found = book.score(metric, *place)
                if found is not None:
                    held = one[metric]["low"] <= found.mean <= one[metric]["high"]
                    lines.append(
                        {
                            "method": one["method"],
                            "ipc": one["ipc"],
                            "metric": metric,
                            "told": one[metric],
                            "reached": dataclasses.asdict(found),
                            "held": bool(held),
                        }
                    )
        best = max(
            (line for line in lines if line["metric"] == "accuracy" and line["ipc"] == BUDGETS[-1]),
            key=lambda line: line["told"]["mean"],
            default=None,
        )
        case = {"case": name, "source": CASES[name], "seconds": told["seconds"], "lines": lines}
        cases.append(case | {"recommended": best})
        share = np.mean([line["held"] for line in lines])
        if best:
            print(
                f"{name}: {told['seconds']:.0f} s; {best['method']} at {best['ipc']}: "
                f"{100 * best['told']['mean']:.1f} [{100 * best['told']['low']:.1f}, "
                f"{100 * best['told']['high']:.1f}] told, {100 * best['reached']['mean']:.1f} "
                f"reached, {'held' if best['held'] else 'MISSED'}; of all {100 * share:.0f}% held"
            )
    write_json(RESULTS, {"workers": WORKERS, "cases": cases})


if __name__ == "__main__":
    main()
