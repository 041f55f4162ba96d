"""DSA: gradient matching under differentiable siamese augmentation."""

from dataclasses import dataclass, replace
from typing import ClassVar

from ..records import State
from ..rng import Rng
from ..sets import Start
from .base import Log, Method, Task
from .gradient_matching import loops, match_step, start_state


@dataclass(frozen=True)
class DSA(Method):
    """Gradient matching with the same augmentation on real and synthetic images.

    D(grad CE(A_w(S_c); theta), grad CE(A_w(T_c); theta)) with one draw w for each class and step
    (equation 7); the network also trains on augmented images
    Source: Zhao and Bilen, ICML 2021, arXiv 2102.08259.
    Departures: images start from noise unless told otherwise (paper: real images); steps and
    loops as in DC.
    """

    iterations: int = 1000
    outer_loops: int | None = None
    inner_epochs: int | None = None
    lr_images: float = 0.1
    momentum: float = 0.5
    lr_network: float = 0.01
    batch_real: int = 256
    batch_synthetic: int = 256
    start: Start = "noise"
    name: ClassVar[str] = "dsa"
    paper: ClassVar[str] = "arXiv 2102.08259"

    def steps(self, task: Task) -> int:
        """Return iterations x outer loops."""
        return self.iterations * loops(task.ipc, self.outer_loops, self.inner_epochs)[0]

    def as_in_paper(self, task: Task) -> "DSA":
        """Start from real images."""
        return replace(self, start="real")

    def init(self, task: Task, rng: Rng) -> State:
        """Return the images at their start and a first network."""
        return start_state(task, self.start, rng)

    def step(self, state: State, task: Task, rng: Rng) -> tuple[State, Log]:
        """Match once for all classes, then train the network on the new images."""
        return match_step(self, task.augmentation, state, task, rng)
