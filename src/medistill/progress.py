"""Progress on stderr: a bar with rate and time left at a terminal, a line now and then in a log."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

Advance = Callable[..., None]
LINE_EVERY_S = 30.0


class _Rate(ProgressColumn):
    """Units per second, or seconds per unit where that is the larger number."""

    def render(self, task: Task) -> Text:
        speed = task.speed
        if not speed:
            return Text("")
        return Text(f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each", style="cyan")


def say(text: str) -> None:
    """Write one line for people to stderr."""
    print(text, file=sys.stderr)


@contextmanager
def progress(what: str, total: int, *, done: int = 0, quiet: bool = False) -> Iterator[Advance]:
    """Show progress of `total` units and hand out `advance(n=1, note="")`.

    Example:
        >>> with progress("steps", 3, quiet=True) as advance:
        ...     advance()
    """
    if quiet:
        yield lambda n=1, note="": None
    elif sys.stderr.isatty():
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _Rate(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(what, total=total, completed=done, note="")
            yield lambda n=1, note="": bar.update(task, advance=n, note=note)
    else:
        yield _line_writer(what, total, done)


def _line_writer(what: str, total: int, done: int) -> Advance:
    begin = last = time.monotonic()
    count = done

    def advance(n: int = 1, note: str = "") -> None:
        nonlocal last, count
        count += n
        now = time.monotonic()
        if now - last >= LINE_EVERY_S:
            last = now
            rate = (count - done) / (now - begin)
            left = (total - count) / rate if rate else float("inf")
            print(f"{what} {count}/{total} {rate:.2f}/s, {left:.0f} s left {note}", file=sys.stderr)

    return advance
