"""A study's folder, read once for all that is made from it."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from ..errors import DataError
from ..indicator import LEAST, SEED, Example, Indicator
from ..judge import best_of, examples_of
from ..plan import Study, grid
from ..records import Json
from ..study import Entry, Folder, entries_of, measured_in
from ..tabulate import Book, rows_of
from .study_figures import methods_of


@dataclass(frozen=True)
class Opened:
    """A study's folder with all that its pages are made from, and its indicator if one is given."""

    folder: Folder
    study: Study
    entries: list[Entry]
    book: Book
    measured: dict[str, Json]
    examples: list[Example]
    indicator: Indicator | None

    @cached_property
    def best(self) -> str:
        """The candidate for the indicator; without one all are compared, which takes a minute."""
        if self.indicator is not None:
            return self.indicator.chosen
        return best_of(self.examples) if len(self.examples) >= LEAST else SEED

    @property
    def states(self) -> Counter[str]:
        """How many cells are in which state."""
        return Counter(one.state for one in self.entries)

    @property
    def backbone(self) -> str:
        """The backbone that figures show."""
        return self.study.backbones[0]

    @property
    def methods(self) -> list[str]:
        """The methods without the baselines."""
        return methods_of(self.book)


def opened(folder: Folder, indicator: Indicator | None = None) -> Opened:
    """Read a study's folder; `indicator` is what was fitted to it.

    Raises: DataError when it is none, a cell in it is damaged, or the indicator is another study's
    or was fitted to other numbers.
    """
    study = folder.study()
    entries = entries_of(folder, grid(study))
    rows, measured = rows_of(study, entries), measured_in(entries)
    examples = examples_of(study, rows, measured)
    book = Book(rows, study.every_budget)
    titles = {data.title for data in study.sources}
    if indicator and (strange := sorted({e.source for e in indicator.examples} - titles)):
        raise DataError(
            f"found an indicator that was fitted to {strange[0]} too, which is no source of "
            f"{study.name}; expected what `medistill study fit-indicator {folder.path}` wrote"
        )
    if indicator and (moved := _moved(indicator.examples, examples)):
        raise DataError(
            f"found an indicator that was fitted to other numbers of {moved} than the study has "
            f"now; expected one of these: `medistill study fit-indicator {folder.path}`"
        )
    return Opened(folder, study, entries, book, measured, examples, indicator)


def _moved(fitted: Sequence[Example], now: Sequence[Example]) -> str:
    """Return the first source of which other scores are known now than were fitted; "" if none."""
    known = {one.source: _scores(one) for one in now}
    for one in fitted:
        mine, held = _scores(one), known.get(one.source, {})
        # Indicators keep six places.
        same = mine.keys() == held.keys() and all(
            abs(mine[place] - held[place]) < 1e-5 for place in mine
        )
        if not same:
            return one.source
    return ""


def _scores(example: Example) -> dict[tuple[str, int, str], float]:
    return {
        (method, ipc, metric): value
        for method, by in example.reached.items()
        for ipc, scores in by.items()
        for metric, value in scores.items()
    }
