"""DP-MERF: a generator whose random Fourier features have the means of the data's."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ..backbones import Linear, channels_last, refresh, to_spec
from ..errors import RunRefused
from ..optim import adam_
from ..pixels import normalize
from ..probes import SketchSpec, probe
from ..records import State, to_record
from ..rng import Rng
from ..sets import Start, SyntheticSet
from ..sketch import mean_of
from .base import Log, Task, one_hot
from .sketch import Sketched

MODES = ("linear", "bilinear", "trilinear")
MOST_SIDE = 32  # of maps whose first axis goes among the channels
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
        maps = torch.sigmoid(doubled(F.relu(doubled(maps, self.three)), self.four))
        for axis, side in enumerate(self.shape, 2):
            maps = maps.narrow(axis, 0, side)
        return maps


def doubled(maps: Tensor, layer: nn.Conv2d | nn.Conv3d) -> Tensor:
    """Return maps of twice the size along each axis (linear in between), convolved.

    torch's convolution of few small maps on a CPU takes several times as long as one of many maps
    with an axis less. So there the first axis goes among the channels, and its doubling U, with two
    rows of zeros at either end, into the weights: w'_(oz)(iu) = sum_k w_oik U_(z + k)u. These are
    side / 5 times as many products as before, which pays up to images of about 64 pixels.
    Shapes: maps [n, i, ...] -> [n, o, ...], kernels of side 5, padding 2.
    """
    side, rest = maps.shape[2], maps.ndim - 3
    if maps.device.type != "cpu" or side > MOST_SIDE:
        maps = maps.contiguous(memory_format=channels_last(maps.ndim))
        whole: Tensor = layer(F.interpolate(maps, scale_factor=2, mode=MODES[rest]))
        return whole
    own = torch.eye(side, dtype=maps.dtype)[None]
    own = F.interpolate(own, scale_factor=2, mode=MODES[0])
    places = F.pad(own[0].T, (0, 0, 2, 2)).unfold(0, 5, 1)
    weight = torch.einsum("oik...,zuk->oziu...", layer.weight, places)
    weight = weight.flatten(0, 1).flatten(1, 2)
    flat = maps.flatten(1, 2)
    if rest == 2:
        flat = flat.contiguous(memory_format=torch.channels_last)
    flat = F.interpolate(flat, scale_factor=2, mode=MODES[rest - 1])
    assert layer.bias is not None
    bias = layer.bias.repeat_interleave(2 * side)
    convolve = F.conv1d if rest == 1 else F.conv2d
    found = convolve(flat, weight, bias, padding=2)
    unfolded: Tensor = found.unflatten(1, (len(layer.weight), 2 * side))
    return unfolded


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
    With bfloat16 generated pixels, frequencies and phases are rounded, on the way back too.
    Raises: RunRefused at a step when no gradient is left, as where all pixels are at 0 or 1.
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
        seen = way.of(images, task.compute, dtype=task.compute.dtype)
        means = torch.stack([part.mean(0) for part in seen.split(each)])
        loss = (means - target).square().sum()
        gradients = torch.autograd.grad(loss, [own[name] for name in names])
        if not any(bool(gradient.any()) for gradient in gradients):
            raise RunRefused(
                f"found no gradient at step {step + 1}, as where all generated pixels are at 0 or "
                f"1; expected some: take another method, or try a lower --lr (now {self.lr:g})"
            )
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
