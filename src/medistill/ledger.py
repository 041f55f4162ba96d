"""The ledger: which private releases were made of which data, and what they guarantee together."""

import math
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from .errors import DataError, RunRefused, UsageError
from .places import state_folder
from .privacy import Guarantee, Unit, composed
from .records import Json, canonical, from_record, locked, read_json, to_record, write_atomic

FORMAT = "medistill ledger 1"


@dataclass(frozen=True)
class Release:
    """One release: of which data, when, and with how much noise. It stays where the data are."""

    receipt: str
    time: str
    data: str
    digest: str
    unit: Unit
    epsilon: float
    delta: float
    noise: float


def ledger_file() -> Path:
    """Return the user's ledger: $MEDISTILL_LEDGER, else below $XDG_DATA_HOME or ~/.local/share."""
    named = os.environ.get("MEDISTILL_LEDGER")
    if named:
        return Path(named).expanduser()
    return state_folder() / "ledger.json"


@dataclass(frozen=True)
class Ledger:
    """A file of releases, and the epsilon that all of the same data may reach together.

    Data are the same where name or digest is: a patient more changes only the digest, another
    folder only the name; editions of other size (NAME@64) are the same, and what `vary:` makes of
    the data (NAME;...). Pools of several data have other names and digests: their releases have to
    be added up by hand.
    Raises: UsageError when the limit is not above 0.
    """

    path: Path
    limit: float | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and not 0 < self.limit < math.inf:
            raise UsageError(f"found --limit {self.limit:g}; expected an epsilon above 0")

    def releases(self) -> list[Release]:
        """Return all releases, oldest first.

        Raises: DataError when the file is damaged: nobody knows then what was spent.
        """
        if not self.path.exists():
            return []
        record = read_json(self.path)
        try:
            if record["format"] != FORMAT:
                raise UsageError(f"found {record['format']!r}")
            releases = [from_record(Release, one) for one in record["releases"]]
            if not all(0 < one.noise < math.inf for one in releases):
                raise UsageError("found a release without noise")
            return releases
        except (KeyError, TypeError, UsageError) as error:
            raise DataError(
                f"{self.path} is no whole ledger ({error}); expected {FORMAT}: put back a copy"
            ) from None

    def of(self, data: str, digest: str) -> list[Release]:
        """Return the releases of the same data, and of data that are the same as those."""
        names, digests, rest = {_base(data)}, {digest}, self.releases()
        found: list[Release] = []
        while new := [one for one in rest if _base(one.data) in names or one.digest in digests]:
            found += new
            rest = [one for one in rest if one not in new]
            names |= {_base(one.data) for one in new}
            digests |= {one.digest for one in new}
        return found

    def together(self, data: str, digest: str, delta: float) -> float:
        """Return the epsilon at delta of all releases of the same data."""
        return composed([1 / one.noise for one in self.of(data, digest)], delta)

    def same(self, one: Sequence[str], other: Sequence[str]) -> tuple[Release, Release] | None:
        """Return two releases, by receipts of one and of the other, of the same data."""
        for made in self.releases():
            if made.receipt in one:
                for each in self.of(made.data, made.digest):
                    if each.receipt in other:
                        return made, each
        return None

    def check(self, data: str, digest: str, guarantee: Guarantee) -> None:
        """Refuse a release that must not be made.

        Raises: RunRefused when all together would go beyond the limit, or earlier releases protect
        another unit; DataError when the ledger is damaged.
        """
        before = self.of(data, digest)
        if others := {one.unit for one in before} - {guarantee.unit}:
            raise RunRefused(
                f"found releases of {data} that protect each {others.pop()}; expected the same "
                f"unit as now, {guarantee.unit}: what they guarantee together is not known"
            )
        mus = [*(1 / one.noise for one in before), guarantee.mu]
        total = composed(mus, guarantee.delta)
        if self.limit is not None and total > self.limit * (1 + 1e-9):
            raise RunRefused(
                f"found {len(before)} release(s) of {data} before; with this one epsilon "
                f"would be {total:.2f} at delta {guarantee.delta:g}; expected {self.limit:g} "
                "at most: use what was released, or raise --limit"
            )

    def spend(self, data: str, digest: str, guarantee: Guarantee) -> str:
        """Note a release before it is made, and return its receipt: a run that dies has spent it.

        Raises: as `check`, and notes nothing then.
        """
        with locked(self.path):
            self.check(data, digest, guarantee)
            now = datetime.now(UTC).isoformat(timespec="seconds")
            facts = (guarantee.unit, guarantee.epsilon, guarantee.delta, guarantee.noise)
            made = Release(secrets.token_hex(8), now, data, digest, *facts)
            releases = [to_record(one) for one in (*self.releases(), made)]
            record: Json = {"format": FORMAT, "releases": releases}
            # What was released of whom is for the owner's eyes.
            write_atomic(self.path, canonical(record), mode=0o600)
        return made.receipt


def _base(data: str) -> str:
    """Return the name of data whatever its size and changes: they show the same patients."""
    return "+".join(part.partition(";")[0].partition("@")[0] for part in data.split("+"))
