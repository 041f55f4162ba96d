"""Packages for other people's programs: arrays, MedMNIST's form, pictures, a folder for a hub."""

import json
import math
import re
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import UsageError
from ..pixels import tiles_of
from ..progress import say
from ..records import atomically, refuse_existing, to_record, write_atomic, write_json
from .read import Package

Target = Literal["npz", "medmnist", "folder", "hf"]
HUB = """---
license: {license}
task_categories:
- image-classification
tags:
- medical
- synthetic
- dataset-distillation
size_categories:
- {scale}
---

# {name}

{count} synthetic images of {classes}, distilled from {source} by {method}. Train by
`recipe.json`: its mean and std normalize intensities (pixels / 255), and its backbone,
augmentation, rate and number of steps belong to the set. Pixels were rounded to 8 bits and clipped
to black and white; the package itself holds them whole. {scores}

{claim}
"""


# The hub's names for numbers of images.
SCALES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (math.inf, "n>100K"))


def export(package: Package, to: Target, out: Path) -> None:
    """Write a package's images in a form that others read, under its name only once whole.

    npz: images float32 (intensities) and labels float32 (weights of classes), mean, std, classes.
    medmnist: `train_images` uint8 [n, h, w(, 3)] and `train_labels` [n, 1], other splits empty.
    folder: PNG files in a folder for each class. hf: those below `train`, with a card and recipe.
    Images of several tiles are written tile by tile, as they are trained on.
    Raises: UsageError when pictures are asked for of volumes; RunRefused when `out` is there.
    """
    refuse_existing(out)
    images, labels = whole(package)
    if to != "npz" and bool((labels != labels.round()).any()):
        say(f"soft labels became the class of most weight: --to {to} holds no others, npz does")
    if to in ("npz", "medmnist"):
        arrays = _medmnist(package, images, labels) if to == "medmnist" else {}
        if to == "npz":
            recipe = package.manifest.recipe
            arrays = {"images": images.numpy(), "labels": labels.numpy()}
            arrays |= {"mean": np.array(recipe.mean), "std": np.array(recipe.std)}
            arrays["classes"] = np.array(package.manifest.card.classes)
        atomically(out, lambda place: _save(place, arrays))
        return
    if images.ndim != 4:
        raise UsageError(f"found volumes for --to {to}; expected npz or medmnist for them")
    if package.manifest.card.task == "multi-label":
        raise UsageError(
            f"found images of several classes for --to {to}, whose folders hold one; expected npz "
            "or medmnist for them"
        )
    atomically(out, lambda place: _folder(package, to, place, images, labels))


def whole(package: Package) -> tuple[Tensor, Tensor]:
    """Return intensities of all tiles, each made a whole image, and their labels."""
    factor = package.manifest.recipe.factor
    each = factor ** (package.images.ndim - 2)
    return tiles_of(package.images, factor), package.labels.repeat_interleave(each, 0)


def bytes_of(images: Tensor) -> Tensor:
    """Return intensities as 8-bit pixels, clipped, channels last."""
    return images.clamp(0, 1).mul(255).round().to(torch.uint8).movedim(1, -1)


def _medmnist(package: Package, images: Tensor, labels: Tensor) -> dict[str, np.ndarray]:
    pixels = bytes_of(images).numpy()
    pixels = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
    several = package.manifest.card.task == "multi-label"
    numbers = labels.round().numpy() if several else labels.argmax(1, keepdim=True).numpy()
    found = {"train_images": pixels, "train_labels": numbers.astype(np.int64)}
    for split in ("val", "test"):
        found |= {f"{split}_images": pixels[:0], f"{split}_labels": found["train_labels"][:0]}
    return found


def _save(place: Path, arrays: dict[str, np.ndarray]) -> None:
    with place.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def _folder(package: Package, to: Target, place: Path, images: Tensor, labels: Tensor) -> None:
    told = package.manifest
    root = place / "train" if to == "hf" else place
    pixels, own = bytes_of(images).numpy(), labels.argmax(1).tolist()
    for number, (image, c) in enumerate(zip(pixels, own, strict=True)):
        folder = root / f"{c:03d}-{slug(told.card.classes[c])}"
        folder.mkdir(parents=True, exist_ok=True)
        flat = image[..., 0] if image.shape[-1] == 1 else image
        Image.fromarray(flat).save(folder / f"{number:05d}.png")
    write_json(place / "recipe.json", to_record(told.recipe))
    if to == "hf":
        write_atomic(place / "README.md", _card(package, len(images)).encode())


def _card(package: Package, count: int) -> str:
    told = package.manifest
    declared = told.declared
    scores = f"Declared accuracy: {100 * float(declared['mean'] or 0):.1f}%." if declared else ""
    return HUB.format(
        license=json.dumps(told.license),
        name=slug(told.name),
        count=count,
        classes=", ".join(map(slug, told.card.classes)),
        source=slug(told.card.name),
        method=slug(told.made.method),
        scores=scores,
        scale=next(name for most, name in SCALES if count < most),
        claim="They are made of patients' images: see REPORT.md of the package.",
    )


def slug(text: str) -> str:
    """Return a text that comes from a package as it may stand in a path or a page."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-.")[:60] or "none"
