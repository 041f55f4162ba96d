"""A list of images with labels, patients and splits: what csv, datalist, dicom and nifti share."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import DataError, UsageError
from ..rng import Rng
from ..sets import Card, RealSet, Splits, TaskKind
from .decode import Decoded, arranged
from .source import Source
from .split import SHARES, assign, assign_each, depending, fingerprints, identical

SPLIT_NAMES = {
    **dict.fromkeys(("train", "training", "0"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "1"), "val"),
    **dict.fromkeys(("test", "testing", "holdout", "2"), "test"),
}
_CUT = "a split that is dealt (give all three, or none and deal=each, or test and deal=val)"


@dataclass(frozen=True)
class Item:
    """One image of a list: its label or labels by name, its split, patient and site if known."""

    label: str | tuple[str, ...]
    split: str = ""
    patient: str = ""
    site: str = ""
    sure: bool = True  # the patient is one that the source names, not a series or a file


def classes_of(items: Sequence[Item], given: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the class names in order: as given, else numbers by value and words by letter.

    Raises: DataError when an item has a class that is not among those given.
    """
    named = {one for item in items for one in _labels(item)}
    if given:
        strange = sorted(named - set(given))
        if strange:
            raise DataError(
                f"found class {strange[0]!r}; expected one of {', '.join(given)}, as classes says"
            )
        return tuple(given)
    try:
        numbers = {name: float(name) for name in named}
    except ValueError:
        numbers = {}
    if not all(map(math.isfinite, numbers.values())):
        numbers = {}
    return tuple(sorted(named, key=lambda name: (numbers.get(name, 0.0), name)))


def _labels(item: Item) -> tuple[str, ...]:
    return (item.label,) if isinstance(item.label, str) else item.label


def task_of(source: Source, items: Sequence[Item], classes: Sequence[str]) -> TaskKind:
    """Return the task: as the option `task` says, else what the labels look like.

    Raises: UsageError when the option has another value or does not fit the labels.
    """
    several = any(not isinstance(item.label, str) for item in items)
    given = source.options.get("task")
    known = ("binary", "multi-class", "ordinal", "multi-label")
    if given is not None and given not in known:
        raise UsageError(f"{source.kind}: found task={given}; expected {', '.join(known)}")
    if given is not None and (given == "multi-label") != several:
        raise UsageError(f"{source.kind}: found task={given}, which its labels do not fit")
    if several:
        return "multi-label"
    if given == "ordinal":
        return "ordinal"
    return "binary" if len(classes) == 2 else "multi-class"


def assembled(
    items: Sequence[Item],
    decoded: Decoded,
    card: Card,
    rng: Rng,
    by: str = "patient",
    facts: Mapping[str, Tensor] | None = None,
    deal: str = "class",
) -> Splits:
    """Return the splits of a list: as given, what is missing cut off train by `rng`.

    Patients, and images with identical pixels, stay together (`by="image"`: identical images
    alone). `groups` numbers patients where they are known, else identical images. With `deal` each
    a patient (an image, where none is named) is dealt by its name (its pixels) alone, and with val
    so too, but that the test split is as given and all others are dealt to train and val.
    Raises: DataError when a split is left without images, or none is given to test (`deal` val).
    """
    labels, first = _numbered(items, card)
    (same,) = identical([decoded.blocks()])
    patients = _patients(items)
    groups = same if patients is None else patients
    named = all(item.patient and item.sure for item in items)
    card = dataclasses.replace(card, patients=named)
    units = same if by == "image" or patients is None else _joined(patients, same)
    given = _given(items, card.name, deal)
    keys = None if deal == "class" else _keys(items, decoded, by)
    dealt = _dealt(given, first, units, rng, keys)
    for name, positions in zip(SHARES, dealt, strict=True):
        if not len(positions) and patients is not None:
            raise DataError(
                f"{card.name}: found {len(patients.unique())} patient(s), too few to part by "
                f"patient, and none for {name}; expected three or more of each class: give a "
                "split to each image, or add ;by=image (one patient then stands in several "
                "splits, and scores look too good)"
            )
    known = dict(facts or {})
    sites = sorted({item.site for item in items})
    if len(sites) > 1:
        known["site"] = torch.tensor([sites.index(item.site) for item in items])
    # One block of images after the other, so that each split is a slice of a mapped file.
    ready = arranged(decoded, torch.cat(dealt))
    parts = ready.images.split([len(positions) for positions in dealt])
    # Whether a split is dealt at all may hang on one image where some are given and some not.
    some = deal == "each" and bool({"val", "test"} & {*given})
    cut = not {*SHARES} <= {*given} and (deal == "class" or some)
    made = Splits(
        *(
            RealSet(
                images,
                labels[positions],
                card,
                groups[positions],
                {name: values[positions] for name, values in known.items()},
                ready.file,
            )
            for images, positions in zip(parts, dealt, strict=True)
        )
    )
    return depending(made, _CUT * cut)


def _given(items: Sequence[Item], name: str, deal: str) -> list[str]:
    """Return the split of each image as given, empty where it is dealt."""
    given = [item.split for item in items]
    if deal != "val":
        return given
    if "test" not in given:
        raise DataError(f"{name}: found no image of test; deal=val expects the test split")
    return ["test" if split == "test" else "" for split in given]


def _numbered(items: Sequence[Item], card: Card) -> tuple[Tensor, Tensor]:
    """Return the labels as numbers, and by which class each image is dealt: its rarest."""
    number = {name: position for position, name in enumerate(card.classes)}
    if card.task != "multi-label":
        labels = torch.tensor([number[_labels(item)[0]] for item in items])
        return labels, labels
    labels = torch.zeros(len(items), len(card.classes), dtype=torch.int64)
    for row, item in enumerate(items):
        labels[row, [number[name] for name in _labels(item)]] = 1
    rarity = labels.sum(0)
    first = torch.where(labels == 1, rarity, len(items) + 1).argmin(1)
    return labels, torch.where(labels.any(1), first, len(card.classes))


def deal_of(source: Source) -> str:
    """Read the option `deal`: class (by class), each, or val.

    Raises: UsageError when it is another word.
    """
    deal = source.options.get("deal", "class")
    if deal not in ("class", "each", "val"):
        raise UsageError(f"{source.kind}: found deal={deal}; expected class, each or val")
    return deal


def _keys(items: Sequence[Item], decoded: Decoded, by: str) -> list[str]:
    """Return by what each image is dealt: its patient's name, else its pixels."""
    pixels = [key.hex() for block in decoded.blocks() for key in fingerprints(block)]
    if by == "image":
        return pixels
    return [
        f"patient {item.patient}" if item.patient else key
        for item, key in zip(items, pixels, strict=True)
    ]


def _patients(items: Sequence[Item]) -> Tensor | None:
    """Number patients; an image without one is a patient of its own. None where none is known."""
    if not any(item.patient for item in items):
        return None
    known: dict[object, int] = {}
    keys = (item.patient or ("alone", row) for row, item in enumerate(items))
    return torch.tensor([known.setdefault(key, len(known)) for key in keys])


def _joined(one: Tensor, other: Tensor) -> Tensor:
    """Number what hangs together when equal numbers of either kind hold images together."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    top = int(one.max()) + 1
    size = top + int(other.max()) + 1
    links = coo_array(
        (torch.ones(len(one)).numpy(), (one.numpy(), (other + top).numpy())), shape=(size, size)
    )
    _, parts = connected_components(links, directed=False)
    return torch.from_numpy(parts).long()[one]


def _dealt(
    given: Sequence[str], labels: Tensor, groups: Tensor, rng: Rng, keys: Sequence[str] | None
) -> list[Tensor]:
    """Positions of train, val and test: as given, the missing ones cut off train."""
    missing = {k: v for k, v in SHARES.items() if k == "train" or k not in given}
    mine = torch.tensor([p for p, name in enumerate(given) if name in ("", "train")]).long()
    if keys is None:
        found = assign(labels[mine], groups[mine], missing, rng)
    else:
        found = assign_each([keys[place] for place in mine.tolist()], missing, rng)
    cut = {k: mine[v] for k, v in found.items()}
    kept = {name: torch.tensor([p for p, s in enumerate(given) if s == name]) for name in SHARES}
    return [cut.get(name, kept[name]).long() for name in SHARES]


def split_named(text: str, what: str) -> str:
    """Read the name of a split.

    Raises: DataError that names where it stands when it is another word.
    """
    word = text.strip().lower()
    if word and word not in SPLIT_NAMES:
        raise DataError(f"{what}: found split {text!r}; expected train, val or test")
    return SPLIT_NAMES.get(word, "")
