"""What a backbone is: a frozen spec that builds networks whose numbers come from a generator."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..pixels import Whitening
from ..records import State
from ..sets import Card

MOST_SIDE = 4  # of a stage's maps, where all stages are looked at


class Network(nn.Module):
    """A body that gives features and one linear head that gives logits.

    Shapes: images [n, c, h, w] or [n, c, d, h, w] -> features [n, d] -> logits [n, k].
    `whitening` is what its images were whitened by, if they were; it is part of its state, and
    not of its path: images come whitened.
    """

    whitening_mean: Tensor | None
    whitening_matrix: Tensor | None

    def __init__(self, body: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.body = body
        self.head = head
        for name in Whitening._fields:
            self.register_buffer(f"whitening_{name}", None)

    @property
    def whitening(self) -> Whitening | None:
        """What the images that the network was trained on were whitened by."""
        if self.whitening_mean is None or self.whitening_matrix is None:
            return None
        return Whitening(self.whitening_mean, self.whitening_matrix)

    def whiten_by(self, whitening: Whitening | None) -> None:
        """Remember what images have to be whitened by."""
        for name in Whitening._fields:
            setattr(self, f"whitening_{name}", whitening and getattr(whitening, name).clone())

    def features(self, images: Tensor) -> Tensor:
        """Return the body's output, flattened; channels-last, which the CPU kernels prefer."""
        out: Tensor = self.body(images.contiguous(memory_format=channels_last(images.ndim)))
        return out.flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        logits: Tensor = self.head(self.features(images).to(self.head.weight.dtype))
        return logits

    @property
    def mixes_images(self) -> bool:
        """True where an image's logits depend on its batch (batch normalization)."""
        return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.modules())

    def parameter_state(self) -> State:
        """Return the parameters by name, detached and copied."""
        return {name: p.detach().clone() for name, p in self.named_parameters()}


@dataclass(frozen=True)
class Backbone(ABC):
    """An architecture with its settings as fields; it builds untrained networks."""

    family: ClassVar[str]

    @property
    @abstractmethod
    def name(self) -> str:
        """The short name that `backbone()` reads back."""

    @abstractmethod
    def body(self, channels: int, shape: tuple[int, ...]) -> nn.Module:
        """Return the layers before the linear head.

        Raises: UsageError when the images are too small for the architecture.
        """

    def parameters(self, card: Card) -> int:
        """Return the number of parameters of a network for a card, without memory for them."""
        with torch.device("meta"):
            body = self.body(card.channels, card.shape)
        head = (_width(self, card.channels, card.shape) + 1) * len(card.classes)
        return sum(p.numel() for p in body.parameters()) + head

    def build(self, card: Card, generator: torch.Generator) -> Network:
        """Return a fresh network for a dataset's channels, shape and classes."""
        width = _width(self, card.channels, card.shape)
        with torch.device("meta"):
            body = self.body(card.channels, card.shape)
            network = Network(body, nn.Linear(width, len(card.classes)))
        network = network.to_empty(device="cpu")
        refresh(network, generator)
        last = channels_last(2 + len(card.shape))
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                module.to(memory_format=last)  # type: ignore[call-overload]
        return network


def channels_last(dimensions: int) -> torch.memory_format:
    """Return the order of memory that CPU kernels prefer, for batches of 4 or 5 dimensions."""
    return torch.channels_last if dimensions == 4 else torch.channels_last_3d


def levels_of(body: nn.Module, images: Tensor) -> list[Tensor]:
    """Return what each stage of a body gives, flat [n, d] and in order, the features last.

    A stage ends before the next layer of weights. Maps are averaged over pairs of neighbors along
    each axis until no side is longer than 4, so that large images have no longer levels.
    """
    levels: list[Tensor] = []
    begun = False
    maps = images
    for module in body.children():
        if any(p.ndim > 1 for p in module.parameters()):
            if begun:
                levels.append(_few(maps))
            begun = True
        maps = module(maps)
    return [*levels, _few(maps)]


def average_pool(maps: Tensor, sides: Sequence[int]) -> Tensor:
    """Average blocks of `sides` pixels; volumes in float32, for which alone CPUs have a kernel."""
    if maps.ndim == 4:
        return F.avg_pool2d(maps, list(sides))
    return F.avg_pool3d(maps.float(), list(sides)).to(maps.dtype)


def _few(maps: Tensor) -> Tensor:
    while max(maps.shape[2:], default=0) > MOST_SIDE:
        maps = average_pool(maps, [2 if side > MOST_SIDE else 1 for side in maps.shape[2:]])
    return maps.flatten(1)


@cache
def _width(backbone: Backbone, channels: int, shape: tuple[int, ...]) -> int:
    """Return the number of features, from a pass without numbers (20 ms, so done once)."""
    with torch.device("meta"):
        probe = torch.empty(2, channels, *shape)
        return int(backbone.body(channels, shape)(probe).flatten(1).shape[1])


@cache
def level_sizes(backbone: Backbone, channels: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return how many numbers each of a body's levels has for one image."""
    with torch.device("meta"):
        levels = levels_of(backbone.body(channels, shape), torch.empty(2, channels, *shape))
    return tuple(level.shape[1] for level in levels)


@torch.no_grad()
def refresh(network: nn.Module, generator: torch.Generator) -> None:
    """Draw all parameters anew, in place, by the framework's default rule.

    Weights and biases of convolutions and linear layers: U(-1/sqrt(fan_in), 1/sqrt(fan_in))
    (Kaiming-uniform with a = sqrt(5)); norms: weight 1, bias 0, running statistics reset.
    """
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
            bound = 1 / math.sqrt(module.weight[0].numel())
            for tensor in (module.weight, module.bias):
                if tensor is not None:
                    # Drawn in a contiguous tensor: numbers must not depend on memory layout.
                    fresh = torch.empty(tensor.shape).uniform_(-bound, bound, generator=generator)
                    tensor.copy_(fresh)
        elif module._parameters or any(b is not None for b in module._buffers.values()):
            module.reset_parameters()  # type: ignore[operator]
