"""`csv:PATH`: a table with a row per image: its file, its label or labels, perhaps its patient."""

import csv as reader
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import DataError, UsageError, nearest
from ..sets import Splits
from .files import RULE_OPTIONS
from .listed import Listed, loaded
from .source import Source, Where
from .table import Item, split_named

OPTIONS = (
    *RULE_OPTIONS,
    *("path", "label", "patient", "split", "site", "by", "deal", "task", "classes", "images"),
)
# Names that columns go by, in small letters and without marks between words.
NAMES = {
    "path": ("path", "file", "filename", "filepath", "image", "imagepath", "imagefile", "img"),
    "label": ("label", "labels", "class", "target", "diagnosis", "dx", "y", "findinglabels"),
    "patient": ("patient", "patientid", "subject", "subjectid", "case", "caseid"),
    "split": ("split", "set", "subset", "partition"),
    "site": ("site", "hospital", "center", "centre", "institution"),
}
MARKS = ",;\t|"
SEVERAL = "|"  # between the labels of one image


def load(source: Source, where: Where) -> Splits:
    """Read a table of images.

    The first row names the columns; the delimiter (, ; tab |) is found, UTF-8 and UTF-16 with a
    byte order mark are read, and Windows line ends. Paths are relative to the table's folder.
    Files are PNG, JPEG, BMP, TIFF, DICOM or NIfTI. Options, beside those of `rule_of`:

        path=COLUMN    the file           label=COLUMN   the class; label=A|B|C: columns of 0 and 1
        patient=COLUMN  split=COLUMN  site=COLUMN        by common names unless given
        by=image       part by image, not by patient     deal=  as in `folder`, by patient
        images=FOLDER  where relative paths begin
        task=ordinal   or multi-label: labels of one column stand apart by |
        classes=a|b|c  their names in order

    Raises: UsageError when a column is unknown; DataError with the row when a file is missing or
    stands twice, or a label is empty.
    """
    path = Path(source.target).expanduser()
    rows = list(_rows(path))
    if not rows:
        raise DataError(f"{path} is empty; expected a first row that names the columns")
    (_, head), body = rows[0], rows[1:]
    columns = {what: _column(source, what, head, path) for what in NAMES if what != "label"}
    labels = _label_columns(source, head, path)
    if columns["path"] is None:
        raise DataError(f"{path}, row 1: found columns {', '.join(head)}; expected one named path")
    top = Path(source.options.get("images", path.parent)).expanduser()
    listed: list[Listed] = []
    seen: dict[str, tuple[int, object]] = {}
    for number, cells in body:
        what = f"{path}, row {number}"
        if len(cells) != len(head):
            raise DataError(f"{what}: found {len(cells)} cells; expected {len(head)}, as in row 1")
        row = {name: cells[at].strip() for name, at in columns.items() if at is not None}
        if not row["path"]:
            raise DataError(f"{what}: found no path; expected the file of an image")
        file = str(top / row["path"])
        label = _label(source, [cells[at].strip() for at in labels], labels, head, what)
        if file in seen:
            first, other = seen[file]
            also = "" if other == label else f" with another label ({other}, here {label})"
            raise DataError(f"{what}: {row['path']} stands in row {first} already{also}")
        seen[file] = (number, label)
        split = split_named(row.get("split", ""), what)
        item = Item(label, split, row.get("patient", ""), row.get("site", ""))
        listed.append(Listed(file, what, item))
    return loaded(listed, path.stem, source, where)


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the number and the cells of each row that is not empty."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"found no table {path} ({error.strerror}); expected a CSV file") from None
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: found bytes that are no UTF-8 ({error.reason} at {error.start}); expected "
            "UTF-8, or UTF-16 with a byte order mark: save the table so"
        ) from None
    if "\0" in text:
        raise DataError(f"{path}: found a zero byte; expected text: UTF-16 needs its mark")
    first = text.partition("\n")[0]
    mark = max(MARKS, key=first.count)
    try:
        lines = reader.reader(text.splitlines(keepends=True), delimiter=mark, strict=True)
        yield from ((lines.line_num, row) for row in lines if any(cell.strip() for cell in row))
    except reader.Error as error:
        raise DataError(f"{path}: {error}; expected a CSV table") from None


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def _column(source: Source, what: str, head: Sequence[str], path: Path) -> int | None:
    """Return where a column stands: the one named by the option, or by a common name."""
    given = source.options.get(what)
    if given is not None:
        return _named(given, head, path)
    plain = [_plain(name) for name in head]
    found = [plain.index(name) for name in NAMES[what] if name in plain]
    return found[0] if found else None


def _named(name: str, head: Sequence[str], path: Path) -> int:
    names = [one.strip() for one in head]
    if name not in names:
        raise UsageError(f"{path} has no column {name!r}: {nearest(name, names)}")
    return names.index(name)


def _label_columns(source: Source, head: Sequence[str], path: Path) -> list[int]:
    given = source.options.get("label", "")
    if SEVERAL in given:
        return [_named(name.strip(), head, path) for name in given.split(SEVERAL)]
    found = _column(source, "label", head, path)
    if found is None:
        raise DataError(
            f"{path}, row 1: found columns {', '.join(head)}; expected one named label: name it "
            "with ;label=COLUMN"
        )
    return [found]


def _label(
    source: Source, cells: Sequence[str], labels: Sequence[int], head: Sequence[str], what: str
) -> str | tuple[str, ...]:
    if len(labels) > 1:
        for cell, at in zip(cells, labels, strict=True):
            if cell not in ("0", "1", "0.0", "1.0"):
                raise DataError(f"{what}: found {cell!r} in {head[at]}; expected 0 or 1")
        pairs = zip(cells, labels, strict=True)
        return tuple(head[at].strip() for cell, at in pairs if cell.startswith("1"))
    if source.options.get("task") == "multi-label":
        return tuple(part.strip() for part in cells[0].split(SEVERAL) if part.strip())
    if not cells[0]:
        raise DataError(f"{what}: found no label; expected a class")
    return cells[0]
