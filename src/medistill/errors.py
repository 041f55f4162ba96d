"""The one error tree: each message says what was found, what was expected and what to do.

MedistillError          exit code 1
|- UsageError           exit code 2: a flag, a name or a setting that does not exist or fit
|- DataError            exit code 3: input data that cannot be used as it is
|- PackageRefused       exit code 4: a package that failed a check
'- RunRefused           exit code 5: a run that must not start (budget, class too small, disk)
   '- NoRoom            a file that could not be written
"""

from collections.abc import Iterable
from difflib import get_close_matches
from importlib import import_module
from typing import Any


class MedistillError(Exception):
    """Root of every error that medistill raises on purpose; `exit_code` is the command's status."""

    exit_code = 1


class UsageError(MedistillError):
    """A flag, a name or a setting is wrong: correct the call."""

    exit_code = 2


class DataError(MedistillError):
    """The input data cannot be used as it is: correct the data or choose another source."""

    exit_code = 3


class PackageRefused(MedistillError):
    """A package failed a check and was not read."""

    exit_code = 4


class RunRefused(MedistillError):
    """A run was refused before it started, or stopped, so that nothing is lost or overwritten."""

    exit_code = 5


class NoRoom(RunRefused):
    """A file could not be written: what is kept already stays, and the run goes on from it."""


def extra(module: str, name: str) -> Any:
    """Import a library that the extra `name` brings.

    Raises: UsageError that names the extra when the library is not there.
    """
    try:
        return import_module(module)
    except ImportError:
        top = module.partition(".")[0]
        raise UsageError(
            f"found no {top}; expected the extra {name}: pip install 'medistill[{name}]'"
        ) from None


def nearest(name: str, known: Iterable[str]) -> str:
    """Say which of the `known` names lie nearest to a wrong one, else name them all.

    Example:
        >>> nearest("hurding", ["random", "herding", "kcenter"])
        'did you mean herding?'
    """
    names = sorted(known)
    close = get_close_matches(name, names, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(names)}"
