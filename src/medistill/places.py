"""What of this machine medistill uses: folders for what it may need again, and cores."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return the user's cache: $MEDISTILL_CACHE, else below $XDG_CACHE_HOME or ~/.cache."""
    named = os.environ.get("MEDISTILL_CACHE")
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medistill"


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0))


def state_folder() -> Path:
    """Return where what a user must not lose lies: below $XDG_DATA_HOME or ~/.local/share."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "medistill"
