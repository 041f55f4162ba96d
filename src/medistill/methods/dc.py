"""DC: match the gradients that real and synthetic images give a network in training."""

from dataclasses import dataclass, replace
from typing import ClassVar

from ..augment import Augmentation
from ..records import State
from ..rng import Rng
from ..sets import Start
from .base import Log, Method, Task
from .gradient_matching import loops, match_step, start_state


@dataclass(frozen=True)
class DC(Method):
    """Dataset condensation with gradient matching.

    min_S E_theta0 sum_t sum_c D(grad CE(S_c; theta_t), grad CE(T_c; theta_t)), where theta_{t+1}
    follows from `inner` epochs of SGD on S (equations 9 and 10)
    Source: Zhao, Mopuri and Bilen, ICLR 2021, arXiv 2006.05929.
    Departures: none known in the loss. A step here is one of the `outer` rounds of an iteration;
    loops for numbers of images that the paper leaves out are interpolated between its own.
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
    name: ClassVar[str] = "dc"
    paper: ClassVar[str] = "arXiv 2006.05929"

    def steps(self, task: Task) -> int:
        """Return iterations x outer loops."""
        return self.iterations * loops(task.ipc, self.outer_loops, self.inner_epochs)[0]

    def as_in_paper(self, task: Task) -> "DC":
        """Start from noise."""
        return replace(self, start="noise")

    def init(self, task: Task, rng: Rng) -> State:
        """Return the images at their start and a first network."""
        return start_state(task, self.start, rng)

    def step(self, state: State, task: Task, rng: Rng) -> tuple[State, Log]:
        """Match once for all classes, then train the network on the new images."""
        return match_step(self, Augmentation(kinds=()), state, task, rng)
