"""Packages for other people's programs: arrays, MedMNIST's form, pictures, a folder for a hub."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import UsageError
from ..pixels import tiles_of
from ..progress import say
from ..records import atomically, refuse_existing, to_record, write_atomic, write_json
from ..report.told import told_of
from .read import Package

Target = Literal["npz", "medmnist", "folder", "hf"]
HUB = """---
{license}
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

They are made of patients' images. What the package says of itself (its checked record, not this
card, is what counts):

{told}
"""
# The hub takes its own names alone; all others are `other` with a name.
LICENSES = {
    *("cc-by-4.0", "cc-by-nc-4.0", "cc-by-sa-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0"),
    *("cc-by-nd-4.0", "cc0-1.0", "apache-2.0", "mit", "unknown", "other"),
}

UNSAFE = r"[^A-Za-z0-9 .,:;%@+_()-]+"  # between backticks: neither markup nor a link

# The hub's names for numbers of images.
SCALES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (math.inf, "n>100K"))


def export(package: Package, to: Target, out: Path) -> None:
    """Write a package's images in a form that others read, under its name only once whole.

    npz: images float32 (intensities) and labels float32 (weights of classes), mean, std, classes,
    and what whitens normalized images, where the recipe asks for it.
    medmnist: `train_images` uint8 [n, h, w(, 3)] and `train_labels` [n, 1], other splits empty.
    folder: PNG files in a folder for each class. hf: those below `train`, with a card and recipe.
    Images of several tiles are written tile by tile, as they are trained on.
    Raises: UsageError when pictures are asked for of volumes; RunRefused when `out` is there.
    """
    refuse_existing(out)
    images, labels = whole(package)
    if to != "npz" and bool((labels != labels.round()).any()):
        say(f"soft labels became the class of most weight: --to {to} holds no others, npz does")
    if to != "npz" and package.whitening is not None:
        say(f"the recipe whitens images by a map that --to {to} does not hold; npz does")
    if to in ("npz", "medmnist"):
        way = _medmnist if to == "medmnist" else _whole_arrays
        arrays = way(package, images, labels)
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


def _whole_arrays(package: Package, images: Tensor, labels: Tensor) -> dict[str, np.ndarray]:
    recipe = package.manifest.recipe
    arrays = {"images": images.numpy(), "labels": labels.numpy()}
    arrays |= {"mean": np.array(recipe.mean), "std": np.array(recipe.std)}
    arrays["classes"] = np.array(package.manifest.card.classes)
    if package.whitening is not None:
        parts = package.whitening._asdict().items()
        arrays |= {f"whitening_{name}": part.numpy() for name, part in parts}
    return arrays


def _medmnist(package: Package, images: Tensor, labels: Tensor) -> dict[str, np.ndarray]:
    pixels = bytes_of(images).numpy()
    pixels = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
    several = package.manifest.card.task == "multi-label"
    numbers = labels.round().numpy() if several else labels.argmax(1, keepdim=True).numpy()
    small = np.uint8 if len(package.manifest.card.classes) <= 256 else np.int64
    found = {"train_images": pixels, "train_labels": numbers.astype(small)}
    for split in ("val", "test"):
        found |= {f"{split}_images": pixels[:0], f"{split}_labels": found["train_labels"][:0]}
    return found


def _save(place: Path, arrays: dict[str, Any]) -> None:
    with place.open("wb") as file:
        np.savez(file, **arrays)  # numbers and text: none of them would be pickled


def _folder(package: Package, to: Target, place: Path, images: Tensor, labels: Tensor) -> None:
    told = package.manifest
    root = place / "train" if to == "hf" else place
    pixels, own = bytes_of(images).numpy(), labels.argmax(1).tolist()
    for number, (image, c) in enumerate(zip(pixels, own, strict=True)):
        folder = root / f"{c:03d}-{slug(told.card.classes[c])}"
        folder.mkdir(parents=True, exist_ok=True)
        flat = image[..., 0] if image.shape[-1] == 1 else image
        Image.fromarray(flat).save(folder / f"{number:05d}.png")
    # Tiles are whole images here: nobody may cut them again.
    write_json(place / "recipe.json", to_record(replace(told.recipe, factor=1)))
    if to == "hf":
        write_atomic(place / "README.md", _card(package, len(images)).encode())


def _card(package: Package, count: int) -> str:
    told = package.manifest
    declared = told.declared
    scores = f"Declared accuracy: {100 * float(declared['mean'] or 0):.1f}%." if declared else ""
    return HUB.format(
        license=_license(told.license),
        name=slug(told.name),
        count=count,
        classes=", ".join(map(slug, told.card.classes)),
        source=slug(told.card.name),
        method=slug(told.made.method),
        scores=scores,
        scale=next(name for most, name in SCALES if count < most),
        told="\n".join(
            f"- {title}: `{re.sub(UNSAFE, '-', text)}`"
            for title, text in told_of(to_record(told), package.privacy).items()
        ),
    )


def _license(text: str) -> str:
    """Return a license as the hub takes it."""
    name = text.casefold().replace(" ", "-")
    if name in LICENSES:
        return f"license: {name}"
    return f"license: other\nlicense_name: {json.dumps(text)}"


def slug(text: str) -> str:
    """Return a text that comes from a package as it may stand in a path or a page."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-.")[:60] or "none"
