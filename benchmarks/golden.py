"""Write golden packages of the present format: what readers of all later versions must open.

    python benchmarks/golden.py

Those that are there already are left alone: they stay for ever. Beside each lies the senders' keys
(NAME.pem, or a folder NAME for two) and NAME.json with what a reader must find in it.
"""

import dataclasses
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from medistill import conformance
from medistill.backbones import ConvNet
from medistill.budget import Budget
from medistill.distill import Run, distill_to
from medistill.methods import DATM, DM, MTT, Method, Task
from medistill.package import Terms, archived, generate, load_private, load_trust, pack
from medistill.package.archive import FORMAT
from medistill.package.manifest import Stored
from medistill.package.read import Package, examined
from medistill.sets import RealSet

PLACE = Path(__file__).parents[1] / "tests" / "golden"
SHORT: dict[str, Any] = {"experts": 1, "student_steps": 2, "iterations": 2}
ALLOW: Any = ["no-audit", "no-scores", "small-class"]


def volumes() -> RealSet:
    """Return the toy set with its images as slices of volumes."""
    flat = conformance.toy(counts=(6, 6))
    images = flat.images.unsqueeze(2).expand(-1, -1, 8, -1, -1).contiguous()
    card = dataclasses.replace(flat.card, shape=(8, 8, 8))
    return dataclasses.replace(flat, images=images, card=card)


def kinds() -> dict[str, tuple[Method, RealSet, Stored, int]]:
    """Return what is packed: by which method, of which data, stored how, signed by how many."""
    datm = DATM(**SHORT, last=1, last_grown=1, lr_labels=0.1)
    return {
        "soft-labels": (datm, conformance.toy(), "U8", 1),
        "float16-whitened": (MTT(**SHORT, max_start=1, zca=True), conformance.toy(), "F16", 1),
        "several-labels": (DM(), conformance.toy("multi-label"), "U8", 1),
        "volumes-two-signers": (DM(), volumes(), "U8", 2),
        "color": (DM(), conformance.toy(channels=3), "U8", 1),
    }


def found_in(package: Package) -> dict[str, Any]:
    """Return what a reader must find."""
    images, labels = package.synthetic.to_train()
    white = package.whitening
    return {
        "name": package.manifest.name,
        "shape": list(package.images.shape),
        "mean": float(package.images.double().mean()),
        "deviation": float(package.images.double().std()),
        "normalized_mean": float(images.double().mean()),
        "labels": package.labels.tolist(),
        "task": package.manifest.card.task,
        "whitened": None if white is None else float(white.matrix.double().square().mean()),
        "signers": len(package.signers),
        "backbone": package.manifest.recipe.backbone,
        "train_labels": list(labels.shape),
    }


def made(name: str, method: Method, real: RealSet, stored: Stored, signers: int) -> None:
    """Write one package with its keys and what is in it."""
    out = PLACE / f"{FORMAT.rpartition(' ')[2]}-{name}.medistill"
    if out.exists():
        print(f"{out.name} is there", flush=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        task = Task(real, Budget(ipc=2), ConvNet(depth=1, width=4))
        distill_to(place / "run", Run(method, task, 0, "toy", "", 2), resume=False)
        pairs = [generate(place / str(n)) for n in range(signers)]
        terms = Terms("golden", site="Golden hospital")
        keys = [load_private(private) for private, _ in pairs]
        files = pack(place / "run", terms, keys, allow=ALLOW, dtype=stored)
        public = [path.read_bytes() for _, path in pairs]
    out.write_bytes(archived(files))
    trust = keys_beside(out, public)
    package = examined(files, load_trust(trust), threshold=signers)
    out.with_suffix(".json").write_text(json.dumps(found_in(package), indent=1) + "\n")
    print(f"{out.name}: {out.stat().st_size:,} bytes", flush=True)


def keys_beside(out: Path, public: Sequence[bytes]) -> Path:
    """Write the senders' keys, and return the file or folder of them."""
    if len(public) == 1:
        trust = out.with_suffix(".pem")
        trust.write_bytes(public[0])
        return trust
    trust = out.with_suffix("")
    trust.mkdir()
    for number, content in enumerate(public):
        (trust / f"signer{number}.pem").write_bytes(content)
    return trust


def main() -> None:
    """Write all that are missing."""
    torch.set_num_threads(1)
    for name, what in kinds().items():
        made(name, *what)


if __name__ == "__main__":
    main()
