"""What all commands share: options, errors in one line, and output for people or for programs."""

import functools
import json
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, ParamSpec

import typer

from ..errors import MedistillError, UsageError

P = ParamSpec("P")
INTERRUPTED = 130

Seed = Annotated[int, typer.Option(help="Number from which every random draw follows.")]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout; progress stays on stderr.")
]
DataRoot = Annotated[
    Path | None,
    typer.Option(help="Folder to look for known sets in, before $MEDISTILL_DATA and the cache."),
]
Offline = Annotated[bool, typer.Option("--offline", help="Never download; say where it looked.")]
Out = Annotated[Path, typer.Option(help="Where to write; an existing result is never overwritten.")]
Device = Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu or cuda.")]
Precision = Annotated[
    Literal["float32", "bfloat16"],
    typer.Option(help="bfloat16: training and real images in half the bytes; scores in float32."),
]
Compile = Annotated[
    Literal["auto", "on", "off"],
    typer.Option(help="Compile the networks; auto: where the work is long enough to repay it."),
]
Track = Annotated[
    str,
    typer.Option(
        help="Also write numbers to tensorboard:FOLDER, mlflow:FILE.db or mlflow:URI (extra "
        "tracking).",
        show_default=False,
    ),
]
Workers = Annotated[
    int, typer.Option(help="Processes that share the work; 1: this one; 0: as many as cores.")
]
LedgerFile = Annotated[
    Path | None,
    typer.Option(help="Where releases are noted; $MEDISTILL_LEDGER or the user's unless given."),
]
SOURCE_HELP = (
    "A known name (pneumoniamnist, pneumoniamnist@64, phantom, phantom:variation=0.2), "
    "folder:PATH, csv:TABLE, datalist:JSON, dicom:PATH, nifti:PATH, npz:PATH, combine:A,B, vary:A, "
    "or an existing path. Options follow after ';' (quote it): 'folder:scans;size=64'."
)
Source = Annotated[str, typer.Argument(help=SOURCE_HELP, show_default=False)]


Window = Annotated[
    str | None,
    typer.Option(
        help="CENTER,WIDTH of intensities, for DICOM and NIfTI: ';window=' of the source."
    ),
]
Spacing = Annotated[
    str | None,
    typer.Option(help="Millimeters between voxels, for NIfTI: ';spacing=' of the source."),
]


def optioned(source: str, **options: str | None) -> str:
    """Return a source with the options that were given as flags.

    Example:
        >>> optioned("dicom:scans", window="40,400", spacing=None)
        'dicom:scans;window=40,400'
    """
    given = [f";{name}={value}" for name, value in options.items() if value is not None]
    return source + "".join(given)


_NO_MEMORY = re.compile("can't allocate memory|not enough memory|out of memory", re.IGNORECASE)


def guarded(command: Callable[P, None]) -> Callable[P, None]:
    """Turn the library's errors into one line on stderr and the right exit code."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except MedistillError as error:
            print(f"medistill: {error}", file=sys.stderr)
            raise typer.Exit(error.exit_code) from None
        except OSError as error:
            # A path that no file can have; where a file is damaged or a disk full, errors of ours
            # say more.
            if error.filename is None:  # of what is printed
                print(f"medistill: {error.strerror}; expected room for the output", file=sys.stderr)
                raise typer.Exit(5) from None
            place = str(error.filename)
            place = place if len(place) < 200 else f"...{place[-190:]}"
            print(f"medistill: {place!a}: {error.strerror}; expected another path", file=sys.stderr)
            raise typer.Exit(3) from None
        except (MemoryError, RuntimeError) as error:
            said = ascii(str(error).partition("\n")[0])[1:-1][:200]
            if "home directory" in said:  # of a path that begins with ~
                print(f"medistill: {said}; expected another path", file=sys.stderr)
                raise typer.Exit(3) from None
            if not (isinstance(error, MemoryError) or _NO_MEMORY.search(said)):
                raise
            print(
                f"medistill: not enough memory ({said}); expected a smaller set, size or backbone",
                file=sys.stderr,
            )
            raise typer.Exit(5) from None
        except KeyboardInterrupt:
            print(
                "medistill: stopped; distill goes on with --resume, study run by the same command",
                file=sys.stderr,
            )
            raise typer.Exit(INTERRUPTED) from None

    return run


def at_least_one(**counts: int | None) -> None:
    """Refuse counts that were given and are below 1.

    Raises: UsageError that names the flag.
    """
    for name, count in counts.items():
        if count is not None and count < 1:
            raise UsageError(f"found --{name.replace('_', '-')} {count}; expected at least 1")


def whole_numbers(name: str, text: str) -> list[int]:
    """Read whole numbers of at least 1, comma between.

    Raises: UsageError that names the flag.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdecimal() and int(word) for word in words):
        raise UsageError(f"found --{name} {text}; expected whole numbers like 1,10,50")
    return [int(word) for word in words]


def emit(record: dict[str, Any], text: str, as_json: bool) -> None:
    """Print a result: JSON for programs, text for people."""
    print(json.dumps(record) if as_json else text)


def command_line() -> str:
    """Return the command that is running, as it can be typed again."""
    return shlex.join(["medistill", *sys.argv[1:]])


def extra_fields(arguments: list[str]) -> dict[str, Any]:
    """Read `--lr-images 0.5 --start real` into fields; values are JSON where they can be.

    Raises: UsageError when a flag has no value or a word is no flag.
    """
    fields: dict[str, Any] = {}
    words = [w for a in arguments for w in (a.split("=", 1) if a.startswith("--") else [a])]
    while words:
        flag = words.pop(0)
        if not flag.startswith("--") or not words:
            raise UsageError(
                f"found {flag!r}; expected settings of the method as --name value "
                "(docs/methods.md lists them)"
            )
        value = words.pop(0)
        try:
            fields[flag[2:].replace("-", "_")] = json.loads(value)
        except ValueError:
            fields[flag[2:].replace("-", "_")] = value
    return fields


def scores_text(record: dict[str, Any]) -> str:
    """Return the score table of an evaluation for the terminal, in percent."""
    names = {"accuracy": "accuracy", "balanced_accuracy": "balanced", "auc": "AUC", "f1": "F1"}
    if "kappa" in record["full"]:
        names["kappa"] = "kappa"
    lines = [" " * 11 + "".join(f"{title:>22}" for title in names.values())]
    for arm in ("random", "synthetic", "full"):
        cells = "".join(f"{interval_text(record[arm][name]):>22}" for name in names)
        lines.append(f"{arm:<11}{cells}")
    for name, gap in record["gap_closed"].items():
        text = (
            "no gap: full data is not better than random images"
            if gap is None
            else (interval_text(gap))
        )
        lines.append(f"gap closed ({name}): {text}")
    if worth := record["worth"]:
        most = max(map(int, record["curve"]))
        text = f"more than {most}" if worth["mean"] is None else f"about {worth['mean']:.0f}"
        lines.append(f"worth: {text} random images per class")
    return "\n".join(lines)


def interval_text(score: dict[str, Any]) -> str:
    """Return `mean [low, high]` in percent."""
    if score["low"] is None:
        return f"{100 * score['mean']:.1f}"
    return f"{100 * score['mean']:.1f} [{100 * score['low']:.1f}, {100 * score['high']:.1f}]"
