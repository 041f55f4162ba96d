"""What a report reads: the files of one run folder, and nothing besides."""

import json
from dataclasses import dataclass
from pathlib import Path

from ..audit.verdict import FORMAT as AUDIT
from ..errors import DataError
from ..records import Json, read_json

RUN = "medistill run 1"
EVALUATION = "medistill evaluation 1"
NEEDED = ("source", "command", "method", "images", "data")


@dataclass(frozen=True)
class RunFolder:
    """The content of a run folder; what a run has not written yet is None or empty."""

    name: str
    run: Json
    log: list[Json]
    sheet: bytes | None
    evaluation: Json | None
    audit: Json | None
    size: int


def read_folder(path: Path) -> RunFolder:
    """Read a run folder.

    Raises: DataError when `path` holds no run of a known format, or a file in it is damaged.
    """
    if not (path / "run.json").is_file():
        raise DataError(
            f"found no run.json in {path}; expected a run folder: give one that "
            "`medistill distill ... --out RUN` wrote"
        )
    run = record_of(path / "run.json", RUN)
    missing = [name for name in NEEDED if name not in run]
    if missing or not isinstance(run["data"], dict):
        raise DataError(
            f"{path / 'run.json'} lacks {', '.join(missing) or 'the card of its data'}; "
            "expected a whole record: distill again"
        )
    sheet = path / "sheet.png"
    evaluation, audit = path / "evaluation.json", path / "audit.json"
    images = path / "synthetic.safetensors"
    return RunFolder(
        name=path.resolve().name,
        run=run,
        log=_lines(path / "log.jsonl"),
        sheet=sheet.read_bytes() if sheet.is_file() else None,
        evaluation=record_of(evaluation, EVALUATION) if evaluation.is_file() else None,
        audit=record_of(audit, AUDIT) if audit.is_file() else None,
        size=images.stat().st_size if images.is_file() else 0,
    )


def record_of(path: Path, kind: str) -> Json:
    """Read a record of a format.

    Raises: DataError when it has another one.
    """
    record = read_json(path)
    found = record.get("format") if isinstance(record, dict) else None
    if not isinstance(record, dict) or found != kind:
        raise DataError(
            f"{path}: found format {found!r}; expected {kind!r}: "
            "make it again, or read it with the version of medistill that wrote it"
        )
    return record


def _lines(path: Path) -> list[Json]:
    """Read one JSON object a line; a last line that a stopped run left unfinished is dropped."""
    if not path.is_file():
        return []
    rows: list[Json] = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line.strip() else {}
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows += [row] if row else []
        elif number < len(lines):
            raise DataError(
                f"{path}: line {number} is no JSON object; expected one a line: distill again"
            )
    return rows
