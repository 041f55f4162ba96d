"""The SOURCE grammar: what a user writes to name a dataset, and where names are looked up."""

import os
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import UsageError, nearest
from ..places import cache_folder

# What a bare path is read as.
ENDINGS = {
    "npz": (".npz",),
    "csv": (".csv", ".tsv"),
    "datalist": (".json",),
    "nifti": (".nii", ".nii.gz"),
    "dicom": (".dcm",),
}
ARCHIVES = (".tar.gz", ".tgz", ".tar", ".zip")  # of a folder of images


@dataclass(frozen=True)
class Source:
    """A parsed SOURCE: its kind, what stands after the colon, and its options."""

    kind: str
    target: str
    options: dict[str, str] = field(default_factory=dict)

    def number(self, key: str, default: float, low: float, high: float) -> float:
        """Return an option as a number.

        Raises: UsageError when it is no number or lies outside low to high.
        """
        text = self.options.get(key)
        if text is None:
            return default
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            raise UsageError(
                f"{self.kind}: found {key}={text}; expected a number from {low:g} to {high:g}"
            )
        return value

    def integer(self, key: str, default: int, low: int, high: int) -> int:
        """Return an option as a whole number.

        Raises: UsageError when it is no whole number or lies outside low to high.
        """
        value = self.number(key, default, low, high)
        if value != int(value):
            raise UsageError(f"{self.kind}: found {key}={value:g}; expected a whole number")
        return int(value)

    def listed(self, key: str) -> list[str]:
        """Return the parts of an option that stand apart by `|`; none where it is not given."""
        return [part.strip() for part in self.options.get(key, "").split("|") if part.strip()]

    def check(self, known: Collection[str]) -> None:
        """Refuse options that the kind does not have.

        Raises: UsageError that names the nearest options.
        """
        for key in self.options:
            if key not in known:
                hint = nearest(key, known) if known else "it takes no options"
                raise UsageError(f"{self.kind} has no option {key!r}: {hint}")


@dataclass(frozen=True)
class Where:
    """Where named sets are looked up, whether they may be downloaded, and the seed of splits."""

    root: Path | None = None
    offline: bool = False
    seed: int = 0

    @property
    def cache(self) -> Path:
        """The folder that downloads go to: `root` where given, else the user's cache."""
        return self.root or cache_folder() / "data"

    def places(self, *folders: str) -> list[Path]:
        """Return the folders to look in, in order, each followed by its sub-`folders`.

        `root`, then $MEDISTILL_DATA, then the user's cache.
        """
        shared = os.environ.get("MEDISTILL_DATA")
        tops = [self.root, Path(shared) if shared else None, Where().cache]
        found = [place for top in tops if top for place in (top, *(top / f for f in folders))]
        return list(dict.fromkeys(found))


def split_outside(text: str, separator: str) -> list[str]:
    """Split a text at a separator that stands outside parentheses.

    Raises: UsageError when the parentheses do not match.

    Example:
        >>> split_outside("(phantom:size=28,n=50),breastmnist", ",")
        ['(phantom:size=28,n=50)', 'breastmnist']
    """
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if depth < 0:
            break
        if letter == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    if depth:
        raise UsageError(f"found {text!r}; expected a closing for each opening parenthesis")
    return [part.strip() for part in parts]


def bare(text: str) -> str:
    """Return an inner source without the parentheses that keep its options together."""
    return text[1:-1].strip() if text.startswith("(") and text.endswith(")") else text


def options_of(parts: list[str], text: str) -> dict[str, str]:
    """Read `key=value` parts of a SOURCE.

    Raises: UsageError when a part has no `=` or a key stands twice.
    """
    options: dict[str, str] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals or not key or key in options:
            raise UsageError(f"found {part!r} in {text!r}; expected key=value, each key once")
        options[key.strip()] = value.strip()
    return options


def parse(text: str, kinds: Collection[str], names: Collection[str]) -> Source:
    """Parse a SOURCE into its kind, target and options.

        KIND:TARGET;key=value;...      one of `kinds`
        NAME[@SIZE]                    one of `names`; the kind is "medmnist"
        PATH                           a folder of images, or a file by its ending

    Raises: UsageError when the kind or name is unknown or an option has no value.

    Example:
        >>> parse("folder:scans;size=28", ["folder"], [])
        Source(kind='folder', target='scans', options={'size': '28'})
    """
    text = text.strip()
    kind, _, rest = text.partition(":")
    # Only an inner source needs parentheses; in a path they are letters like any other.
    parts = split_outside(text, ";") if kind in ("combine", "vary") else text.split(";")
    head = parts[0]
    kind, colon, rest = (part.strip() for part in head.partition(":"))
    if kind == "phantom":
        extra = [part for part in rest.split(",") if part]
        return Source("phantom", "", options_of(extra + parts[1:], text))
    if head.startswith("phantom@"):
        raise UsageError(f"found {head!r}; expected phantom:size={head.partition('@')[2]}")
    options = options_of(parts[1:], text)
    if head.split("@")[0] in names:
        return Source("medmnist", head, options)
    if colon and kind in kinds:
        if not rest:
            raise UsageError(f"found {text!r}; expected something after {kind}:")
        return Source(kind, rest, options)
    file = Path(head).expanduser().is_file()
    for by_ending, endings in ENDINGS.items():
        if head.lower().endswith(endings) and (file or by_ending == "npz"):
            return Source(by_ending, head, options)
    if head.lower().endswith(ARCHIVES):
        return Source("folder", head, options)
    if file:
        return Source("npz", head, options)
    if head and (os.sep in head or Path(head).expanduser().is_dir()):
        return Source("folder", head, options)
    wrong, known = (kind, kinds) if colon else (head, (*names, *kinds))
    raise UsageError(
        f"found no source {wrong!r}: {nearest(wrong, known)}; expected a known name, an existing "
        f"path or KIND:TARGET"
    )
