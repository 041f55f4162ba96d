"""DP-MERF: a generator whose random Fourier features have the means of the data's."""

from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ..backbones import Linear, channels_last, refresh, to_spec
from ..optim import adam_
from ..pixels import normalize
from ..probes import SketchSpec, probe
from ..records import State, to_record
from ..rng import Rng
from ..sets import Start, SyntheticSet
from ..sketch import mean_of
from .base import Log, Task, one_hot
from .sketch import Sketched

EPOCH = 120  # steps after which the rate falls: 60,000 images in batches of 500


class Generator(nn.Module):
    """A code and a class to an image: a hidden layer, maps of a quarter side, two convolutions.

    Source: the convolutional generator of the paper's released code.
    Shapes: codes [n, d + k] -> intensities [n, c, ...] in (0, 1).
    """

    def __init__(self, inputs: int, hidden: int, channels: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape
        self.small = tuple(-(-side // 4) for side in shape)
        convolution = nn.Conv2d if len(shape) == 2 else nn.Conv3d
        size = 16
        for side in self.small:
            size *= side
        self.one = nn.Linear(inputs, hidden)
        self.norm = nn.BatchNorm1d(hidden)
        self.two = nn.Linear(hidden, size)
        self.three = convolution(16, 8, 5, padding=2)
        self.four = convolution(8, channels, 5, padding=2)

    def forward(self, codes: Tensor) -> Tensor:
        """Return images."""
        maps = self.two(F.relu(self.norm(self.one(codes))))
        maps = maps.view(len(codes), 16, *self.small)
        maps = maps.contiguous(memory_format=channels_last(maps.ndim))
        mode = "bilinear" if len(self.shape) == 2 else "trilinear"
        maps = F.relu(self.three(F.interpolate(maps, scale_factor=2, mode=mode)))
        maps = F.interpolate(maps, scale_factor=2, mode=mode)
        assert self.four.bias is not None
        maps = torch.sigmoid(by_twos(maps, self.four.weight, self.four.bias))
        for axis, side in enumerate(self.shape, 2):
            maps = maps.narrow(axis, 0, side)
        return maps


def by_twos(maps: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return a convolution with kernels of side 5, padding 2, of maps with even sides.

    It moves by two and gives the 2^d outputs in between as channels: to an image's few channels
    torch takes over twice as long, back and forth (on volumes; on pictures 1.3 times).
    Shapes: maps [n, i, ...], weight [o, i, 5, ...], bias [o] -> [n, o, ...].
    """
    axes = maps.ndim - 2
    shifts = [
        F.pad(weight, [side for s in reversed(by) for side in (s, 1 - s)])
        for by in product((0, 1), repeat=axes)
    ]
    convolve = F.conv2d if axes == 2 else F.conv3d
    found: Tensor = convolve(
        maps, torch.stack(shifts, 1).flatten(0, 1), bias.repeat_interleave(2**axes), 2, 2
    )
    found = found.unflatten(1, (len(weight), *[2] * axes))
    order = [place for axis in range(axes) for place in (2 + axes + axis, 2 + axis)]
    return found.permute(0, 1, *order).reshape(len(maps), len(weight), *maps.shape[2:])


@dataclass(frozen=True)
class DPMERF(Sketched):
    """Train a generator whose images have the data's mean embedding, and draw the set from it.

    L = sum_c || mean over codes of phi(G(code, c)) - mean over x in S_c of phi(x) ||^2,
    phi(x) = [cos(t_j . x), sin(t_j . x)]_j / sqrt(J)
    The real side is a sketch, so that a private sketch makes this DP-MERF: one noisy release.
    Source: Harder, Adamczewski and Park, AISTATS 2021 (arXiv 2002.11603), section 3.
    Departures: neighbors differ by a patient added or removed, and class sizes are noisy, where the
    paper replaces one of a known number; frequencies are scaled to noise images (the paper's length
    for MNIST, sqrt(105), is scale 0.97 here); a set has `ipc` images, the paper samples 60,000.
    With bfloat16 generated pixels and frequencies are rounded before they are multiplied.
    """

    iterations: int = 1200
    lr: float = 0.01
    decay: float = 0.9
    batch: int = 500
    code: int = 5
    hidden: int = 200
    frequencies: int = 5000
    scale: float = 1.0
    start: Start = "noise"
    name: ClassVar[str] = "dp_merf"
    paper: ClassVar[str] = "arXiv 2002.11603"

    def steps(self, task: Task) -> int:
        """Return the iterations."""
        return self.iterations

    def spec(self, task: Task) -> SketchSpec:
        """Return what the sketch of this task is made of: of pixels, unless one is given."""
        if task.sketch is not None:
            return task.sketch.spec
        plain = to_record(task.augmentation) | {"kinds": []}
        return SketchSpec(to_spec(Linear()), plain, 1, self.frequencies, self.scale, "last")

    def init(self, task: Task, rng: Rng) -> State:
        """Return an untrained generator and Adam's moments."""
        generator = self._generator(task)
        refresh(generator, rng.at("generator"))
        state = {name: value.detach().clone() for name, value in generator.state_dict().items()}
        for name, value in generator.named_parameters():
            state[f"first.{name}"] = torch.zeros_like(value)
            state[f"second.{name}"] = torch.zeros_like(value)
        device = task.real.device
        state = {name: value.to(device) for name, value in state.items()}
        return {**state, "step": torch.zeros((), dtype=torch.int64)}

    def step(self, state: State, task: Task, rng: Rng) -> tuple[State, Log]:
        """Match one network's part of the sketch with a batch of generated images."""
        step, held = int(state["step"]), task.prepared
        spec, card, device = self.spec(task), task.real.card, task.real.device
        number = step % spec.networks
        target = mean_of(held["sums"][:, number], held["counts"]).to(device)
        way = probe(spec, card, number, held["spreads"][number], device)
        each = max(1, self.batch // task.classes)
        labels = torch.arange(task.classes).repeat_interleave(each)
        codes = self._codes(labels, task, rng.at("codes", step))
        generator = self._generator(task)
        own = {name: state[name].clone() for name in generator.state_dict()}
        names = [name for name, _ in generator.named_parameters()]
        for name in names:
            own[name].requires_grad_()
        images = functional_call(generator, own, (codes,))
        images = normalize(images.clone(), card.mean, card.std)
        seen = way.of(images, task.compute, lowered=True)
        means = torch.stack([part.mean(0) for part in seen.split(each)])
        loss = (means - target).square().sum()
        gradients = torch.autograd.grad(loss, [own[name] for name in names])
        made = dict(state)
        lr = self.lr * self.decay ** (step // EPOCH)
        for name, gradient in zip(names, gradients, strict=True):
            value, first, second = (
                state[key].clone() for key in (name, f"first.{name}", f"second.{name}")
            )
            adam_(value, gradient, first, second, step=step + 1, lr=lr)
            made |= {name: value, f"first.{name}": first, f"second.{name}": second}
        made |= {name: own[name].detach() for name in own if name not in names}
        return {**made, "step": state["step"] + 1}, {"loss": float(loss.detach())}

    def finish(self, state: State, task: Task, rng: Rng) -> SyntheticSet:
        """Draw the set's images from the generator as it stands."""
        labels = one_hot(task)
        generator = self._generator(task).eval()
        own = {name: state[name] for name in generator.state_dict()}
        codes = self._codes(labels.argmax(1).cpu(), task, rng.at("codes of the set"))
        with torch.no_grad():
            images = functional_call(generator, own, (codes,))
        card = task.real.card
        images = normalize(images, card.mean, card.std)
        return super().finish({**state, "images": images, "labels": labels}, task, rng)

    def _generator(self, task: Task) -> Generator:
        card = task.real.card
        with torch.device("meta"):
            empty = Generator(self.code + task.classes, self.hidden, card.channels, card.shape)
        return empty.to_empty(device="cpu")

    def _codes(self, labels: Tensor, task: Task, generator: torch.Generator) -> Tensor:
        """Return codes N(0, 1) beside the class of each, one-hot."""
        drawn = torch.randn((len(labels), self.code), generator=generator)
        return torch.cat([drawn, F.one_hot(labels, task.classes).float()], 1).to(task.real.device)
