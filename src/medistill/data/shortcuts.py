"""Can a model tell the class without looking at the picture? From size, border or range alone."""

from collections.abc import Sequence

import numpy as np
import torch

from ..records import Json
from ..sets import RealSet, Splits
from .dicom import RISKS

MOST = 5000  # images that a tree learns from
DEPTH = 4
ABOVE = 0.25  # of the way from chance to certainty, from where a shortcut is told
STORED = ("stored height", "stored width", "file bytes", "site")


def found(splits: Splits) -> list[Json]:
    """Return a finding for each kind of fact that tells the class by itself.

    A decision tree of depth 4 learns the class from a few numbers of each training image: what was
    stored (size, bytes, site), the outermost pixels (mean and deviation), or the range of
    intensities (least, greatest, and the 1st and 99th percentile). Its balanced accuracy on the
    validation split is told where it is a quarter of the way or more from chance to 1: a student
    may learn the same, and a distilled image may carry it.
    """
    train, val = splits.train, splits.val
    if train.labels.ndim == 2 or len(val.labels.unique()) < 2:
        return []
    few = torch.arange(len(train))
    if len(few) > MOST:
        few = few[torch.linspace(0, len(few) - 1, MOST).round().long()]
    seen = {"train": (train, few), "val": (val, torch.arange(min(len(val), MOST)))}
    facts = {name: _facts(part, index) for name, (part, index) in seen.items()}
    findings = []
    for kind in facts["train"]:
        x, y = facts["train"][kind], train.labels[few].numpy()
        if not x.shape[1] or (x == x[:1]).all():
            continue
        reached = _reached(x, y, facts["val"][kind], val.labels[seen["val"][1]].numpy())
        chance = 1 / len(train.card.classes)
        if reached - chance >= ABOVE * (1 - chance):
            told = f"{kind} alone: balanced accuracy {reached:.2f}, by chance {chance:.2f}"
            findings.append(
                {"kind": "shortcut", "severity": "warning", "count": 1, "examples": [told]}
            )
    return findings


def _reached(x: np.ndarray, y: np.ndarray, x_val: np.ndarray, y_val: np.ndarray) -> float:
    from sklearn.metrics import recall_score
    from sklearn.tree import DecisionTreeClassifier

    tree = DecisionTreeClassifier(max_depth=DEPTH, class_weight="balanced", random_state=0)
    said = tree.fit(x, y).predict(x_val)
    present = np.unique(y_val)
    return float(recall_score(y_val, said, labels=present, average="macro", zero_division=0))


def _facts(part: RealSet, index: torch.Tensor) -> dict[str, np.ndarray]:
    """Return the numbers [n, f] of each kind of fact."""
    names: Sequence[str] = [name for name in (*STORED, *RISKS) if name in part.facts]
    stored = [part.facts[name][index].double() for name in names]
    border, ranges = [], []
    # Torch takes quantiles of at most 2^24 numbers.
    for piece in index.split(max(1, min(256, 2**23 // part.images[0].numel()))):
        pixels = part.take(piece).images.float().div_(part.full).mean(1)
        edge = torch.cat([_side(pixels, axis, at) for axis in (-1, -2) for at in (0, -1)], 1)
        border.append(torch.stack([edge.mean(1), edge.std(1)], 1))
        flat = pixels.flatten(1)
        ends = torch.tensor([0.0, 0.01, 0.99, 1.0])
        ranges.append(flat.quantile(ends, 1).T)
    return {
        "what was stored": torch.stack(stored, 1).numpy() if stored else np.empty((len(index), 0)),
        "the border": torch.cat(border).numpy(),
        "the range of intensities": torch.cat(ranges).numpy(),
    }


def _side(pixels: torch.Tensor, axis: int, at: int) -> torch.Tensor:
    return pixels.select(axis, at).flatten(1)
