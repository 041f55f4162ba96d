"""Progress on stderr: a bar with rate and time left at a terminal, a line now and then in a log."""

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

Advance = Callable[..., None]
LINE_EVERY_S = 30.0
_hushed: ContextVar[bool] = ContextVar("hushed", default=False)


class _Rate(ProgressColumn):
    """Units per second, or seconds per unit where that is the larger number."""

    def render(self, task: Task) -> Text:
        speed = task.speed
        if not speed:
            return Text("")
        return Text(f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each", style="cyan")


@contextmanager
def hushed() -> Iterator[None]:
    """Keep `say` and `progress` silent, where something above them shows how far it has come.

    Example:
        >>> with hushed():
        ...     say("nobody hears this")
    """
    token = _hushed.set(True)
    try:
        yield
    finally:
        _hushed.reset(token)


def say(text: str) -> None:
    """Write one line for people to stderr."""
    if not _hushed.get():
        print(text, file=sys.stderr)


def _columns() -> tuple[ProgressColumn, ...]:
    """Return what every bar shows: name, bar, how many, rate, time left."""
    name = TextColumn("{task.description}")
    return name, BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn()


def _bar(*columns: ProgressColumn, **more: Any) -> Progress:
    """Return a bar whose rate and time left do not vanish where one unit takes minutes."""
    return Progress(*columns, speed_estimate_period=3600, **more)


@contextmanager
def progress(what: str, total: int, *, done: int = 0, quiet: bool = False) -> Iterator[Advance]:
    """Show progress of `total` units and hand out `advance(n=1, note="")`.

    Example:
        >>> with progress("steps", 3, quiet=True) as advance:
        ...     advance()
    """
    if quiet or _hushed.get():
        yield lambda n=1, note="": None
    elif sys.stderr.isatty():
        columns = (*_columns(), TextColumn("{task.fields[note]}"))
        with _bar(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(what, total=total, completed=done, note="")
            yield lambda n=1, note="": bar.update(task, advance=n, note=note)
    else:
        yield _line_writer(what, total, done, time.monotonic())


def _line_writer(what: str, total: int, done: int, begin: float) -> Advance:
    last, count = begin, done

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


Show = Callable[..., None]
MISSING, DONE = "missing", "done"


@contextmanager
def board(what: str, rows: Sequence[str], columns: Sequence[str]) -> Iterator[Show]:
    """Show a grid of many small works, and hand out `show(row, column, state, before="")`.

    A state is missing, done, or what else became of one; `before` is what it was, where it changes.
    A terminal shows a table of how many are done, below it a bar with rate and time left; a log
    gets a line now and then.

    Example:
        >>> with hushed(), board("grid", ["a"], ["x"]) as show:
        ...     show("a", "x", "missing")
        ...     show("a", "x", "done", "missing")
    """
    counts: dict[tuple[str, str], Counter[str]] = {}
    live = sys.stderr.isatty() and not _hushed.get()
    bar = _bar(*_columns(), disable=not live)
    begin = time.monotonic()
    task = bar.add_task(what, total=0)
    line: Advance | None = None

    def show(row: str, column: str, state: str, before: str = "") -> None:
        nonlocal line
        counts.setdefault((row, column), Counter())[state] += 1
        if before:
            counts[row, column][before] -= 1
        total = sum(one.total() for one in counts.values())
        left = sum(one[MISSING] for one in counts.values())
        if not before:
            bar.update(task, total=total, completed=total - left)
            return
        bar.update(task, advance=1)
        if not live and not _hushed.get():
            line = line or _line_writer(what, total, total - left - 1, begin)
            line(note=f"{row}, {column}: {state}")
        if live:
            screen.update(Group(_grid(counts, rows, columns), bar))

    with Live(console=Console(stderr=True), transient=True, auto_refresh=live) as screen:
        yield show


def _grid(
    counts: dict[tuple[str, str], Counter[str]], rows: Sequence[str], columns: Sequence[str]
) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        texts = []
        for column in columns:
            found = counts.get((row, column), Counter())
            total, ended = found.total(), found.total() - found[MISSING]
            wrong = ended - found[DONE]
            style = "red" if wrong else "green" if ended == total else ""
            text = f"{ended}/{total}" + (f" ({wrong} not done)" if wrong else "")
            texts.append(Text(text if total else "", style=style))
        table.add_row(row, *texts)
    return table
