"""FTD: MTT along flat experts."""

from dataclasses import dataclass
from typing import ClassVar

from ..errors import UsageError
from ..records import State
from ..rng import Rng
from ..sets import SyntheticSet
from .base import Log, Task
from .mtt import MTT
from .trajectory_matching import AlongFlatExperts


@dataclass(frozen=True)
class FTD(MTT, AlongFlatExperts):
    """Flat trajectory distillation: MTT with experts trained by GSAM, and averaged images.

    The set is the exponential moving average of the images: a <- average a + (1 - average) x.
    Source: Du et al., CVPR 2023, arXiv 2211.11004.
    Departures: those of MTT, whose settings it has; the average starts at zero and is corrected for
    that, so that a short run does not end at its start.
    """

    ascent: float = 0.4
    average: float = 0.999
    name: ClassVar[str] = "ftd"
    paper: ClassVar[str] = "arXiv 2211.11004"
    beats_random: ClassVar[bool] = True

    def check(self, task: Task) -> None:
        """Refuse an average that would never move."""
        super().check(task)
        if self.average >= 1:
            raise UsageError(f"found average {self.average} for ftd; expected less than 1")

    def init(self, task: Task, rng: Rng) -> State:
        """Begin the average, too."""
        state = super().init(task, rng)
        return {**state, "average": state["images"] * 0}

    def step(self, state: State, task: Task, rng: Rng) -> tuple[State, Log]:
        """Take a step of MTT and move the average."""
        after, log = super().step(state, task, rng)
        kept = self.average
        return {**after, "average": kept * state["average"] + (1 - kept) * after["images"]}, log

    def finish(self, state: State, task: Task, rng: Rng) -> SyntheticSet:
        """Return the averaged images: a weighted mean over all steps, as Adam corrects its own."""
        done = int(state["step"])
        images = state["average"] / (1 - self.average**done) if done else state["images"]
        made: SyntheticSet = super().finish({**state, "images": images}, task, rng)
        return made
