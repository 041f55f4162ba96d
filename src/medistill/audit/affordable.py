"""What of an audit the minutes, and the data, allow; what they do not is named."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping

import torch

from ..errors import RunRefused
from ..methods import Task
from ..progress import hushed
from ..records import Json
from .membership import FEWEST, Pool, Way, ask, coins

LATE = "the minutes were over before; give --budget more"
MOST_MODELS = 64
FEWEST_UNITS, FEWEST_CANARIES = 40, 8  # of patients (or images): fewer tell nothing


def in_time(parts: Mapping[str, Callable[[], Json]], end: float, left: list[str]) -> Json:
    """Return what the parts tell that begin before the end; the others are named in `left`."""
    told: Json = {"subgroups": [], "attributes": []}
    for what, look in parts.items():
        if time.monotonic() < end:
            told |= look()
        else:
            left.append(f"{what}: {LATE}")
    return told


def affordable(
    pool: Pool,
    ways: tuple[Way, Way],
    models: int | None,
    seed: int,
    seconds: float,
    left: list[str],
    places: int = 1,
) -> int:
    """Return how many models there will be; 0, with the reason, where there cannot be enough.

    Unless they are told, the way and its control are gone once each to see how long they take;
    `places` of them are gone at once.
    Every model that there will be must have enough images of each class.
    """
    units, canaries = len(pool.first), int(pool.canaries.numpy()[pool.first].sum())
    if units < FEWEST_UNITS or canaries < FEWEST_CANARIES:
        left.append(
            f"membership: found {units} patients, {canaries} of them with a wrong label, among "
            f"{len(pool.real)} images; expected {FEWEST_UNITS} and {FEWEST_CANARIES} or more: give "
            "--images more"
        )
        return 0
    if models is None and seconds <= 0:
        left.append(f"membership: {LATE}")
        return 0
    way = ways[0]
    try:
        if models is None:
            coin = torch.from_numpy(coins(pool.units, 1)[0])
            begin = time.monotonic()
            with hushed():
                for one in ways:
                    ask(pool, one, (coin, 0))
            each = time.monotonic() - begin
            models = min(MOST_MODELS, int(places * (seconds - each) / each))
            if models < FEWEST:
                needed = math.ceil((FEWEST / places + 2) * each / 60)
                left.append(
                    f"membership: a model and its control take {each:.0f} s and {FEWEST} are "
                    f"needed; give --budget {needed} or --models {FEWEST}"
                )
                return 0
        for number in (seed, seed + 1):  # of the run, of the positive control
            for row in torch.from_numpy(coins(pool.units, models, number)):
                Task(pool.real.take(row.nonzero().flatten()), way.budget, way.backbone)
    except RunRefused as error:
        left.append(f"membership: each model has half of {len(pool.real)} images: {error}")
        return 0
    return models


def copying(way: Way, least: int) -> Way:
    """Return the positive control of a way: copies, and students long enough to know them."""
    steps = max(way.student_steps, least)
    return dataclasses.replace(way, copies=True, rate=0.05, batch=64, student_steps=steps)
