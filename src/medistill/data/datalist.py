"""`datalist:PATH`: a JSON list of images, as MONAI and the Decathlon have it."""

import json
import math
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..sets import Splits
from .files import RULE_OPTIONS
from .listed import Listed, loaded
from .source import Source, Where
from .table import Item

OPTIONS = (*RULE_OPTIONS, "by", "deal", "task", "classes", "images")
SPLITS = {"training": "train", "validation": "val", "test": "test"}
MOST_BYTES = 2**28


def load(source: Source, where: Where) -> Splits:
    """Read a datalist: keys `training`, and perhaps `validation` and `test`, of {"image", "label"}.

    `label` (or `class`) is a name or a number, or a list of them where an image may have several;
    `labels` or `class_names` above may name the numbers. `patient` (or `subject`, `patient_id`)
    and `site` are read where they are. Images without a label, as in a challenge's test list, are
    left out. Options, beside those of `rule_of`: by=image, deal=each|val, task=ordinal,
    classes=a|b|c in order, images=FOLDER where relative paths begin (the list's own folder unless
    given).

    Raises: DataError with key and number of the entry that cannot be used.
    """
    path = Path(source.target).expanduser()
    whole = _read(path)
    names = _names(whole)
    top = Path(source.options.get("images", path.parent)).expanduser()
    listed: list[Listed] = []
    seen: dict[str, str] = {}
    for key, split in SPLITS.items():
        entries = whole.get(key, [])
        if not isinstance(entries, list):
            raise DataError(f"{path}: found no list under {key!r}; expected one")
        for number, entry in enumerate(entries):
            what = f"{path}, {key}[{number}]"
            one = _entry(entry, split if len(set(SPLITS) & set(whole)) > 1 else "", names, what)
            if one is None:
                continue
            file = str(top / one[0])
            if file in seen:
                raise DataError(f"{what}: {one[0]} stands in {seen[file]} already")
            seen[file] = f"{key}[{number}]"
            listed.append(Listed(file, what, one[1]))
    if not listed:
        raise DataError(f"{path}: found no image with a label; expected some under 'training'")
    return loaded(listed, path.stem, source, where)


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MOST_BYTES:
            raise DataError(f"{path}: found more than {MOST_BYTES} bytes; expected a list of files")
        whole = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"found no list {path} ({error.strerror}); expected JSON") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no JSON ({error}); expected a datalist") from None
    if not isinstance(whole, dict) or "training" not in whole:
        raise DataError(f"{path}: found no key 'training'; expected a list of images there")
    return whole


def _names(whole: dict[str, Any]) -> dict[str, str]:
    """Return what the numbers of classes are called, if the list says so."""
    for key in ("labels", "class_names"):
        told = whole.get(key)
        if isinstance(told, dict):
            return {str(number): str(name) for number, name in told.items()}
        if isinstance(told, list):
            return {str(number): str(name) for number, name in enumerate(told)}
    return {}


def _entry(entry: Any, split: str, names: dict[str, str], what: str) -> tuple[str, Item] | None:
    if isinstance(entry, str):
        return None  # a challenge's test image
    if not isinstance(entry, dict) or not isinstance(entry.get("image"), str):
        raise DataError(f"{what}: found {str(entry)[:60]!r}; expected an object with an image path")
    told = entry.get("label", entry.get("class"))
    if told is None:
        return None
    label: str | tuple[str, ...]
    if isinstance(told, list):
        label = tuple(_name(one, names, what) for one in told)
    else:
        label = _name(told, names, what)
        if label.lower().endswith((".nii", ".nii.gz")):
            raise DataError(
                f"{what}: found a label map {label}; expected a class: for patches of organs use "
                "nifti:IMAGE;labels=MAP"
            )
    person, site = (
        next((str(entry[k]) for k in names if entry.get(k) is not None), "")
        for names in (("patient", "subject", "patient_id"), ("site",))
    )
    return entry["image"], Item(label, split, person, site)


def _name(told: Any, names: dict[str, str], what: str) -> str:
    if isinstance(told, bool) or not isinstance(told, int | float | str) or str(told).strip() == "":
        raise DataError(f"{what}: found label {told!r}; expected a class's name or number")
    if isinstance(told, float) and not math.isfinite(told):
        raise DataError(f"{what}: found label {told}; expected a class's name or number")
    text = str(int(told)) if isinstance(told, float) and told == int(told) else str(told)
    return names.get(text, text)
