"""A student's steps on synthetic images, and their exact derivative in constant memory."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, jvp

from .augment import Augmentation, Draw
from .backbones import Network, channels_last
from .compute import PLAIN, Compute, quietly
from .records import State
from .rng import Rng
from .sets import Loss
from .train import batch_index, losses

# Steps of which all vectors stay in memory; of more, about twice the root of their number.
KEPT = 32


class Step(NamedTuple):
    """What one step of a student is drawn to do: which images it sees, and how augmented."""

    where: Tensor
    draw: Draw


class Pulled(NamedTuple):
    """The derivative of a loss of the student's parameters in all that they came from."""

    images: Tensor
    labels: Tensor
    rate: Tensor
    start: Tensor


class Student:
    """A network as a function of one vector of parameters [p].

    In bfloat16 maps and parameters are rounded on their way in, as where networks are trained; the
    vectors, their gradients and losses stay float32 (or what they are).

    The order is that of `named_parameters`, each tensor with its channels last, as CPU kernels of
    convolutions want them: their weights are then views of the vector and need no copy, which
    makes a compiled step a third shorter. Networks that keep statistics of a batch have more
    state than that and are refused by the methods that use this.
    """

    def __init__(
        self, network: Network, loss: Loss = "cross-entropy", compute: Compute = PLAIN
    ) -> None:
        self.network, self.loss, self.compute = network, loss, compute

    def gradient(self, vector: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """Return the gradient [p] of the mean loss at normalized images with labels [b, k]."""
        run = self.compute.path(_gradient)
        parts = (
            run(self.network, self.compute.dtype, self.loss, vector, *block)
            for block in self._blocks(images, labels)
        )
        return sum(parts, torch.zeros_like(vector))

    @torch.no_grad()
    def logits(self, vector: Tensor, images: Tensor) -> Tensor:
        """Return logits [n, k] of normalized images, block by block."""
        state, last = named(self.network, vector), channels_last(images.ndim)
        parts = [
            functional_call(self.network, state, (block.contiguous(memory_format=last),))
            for (block,) in replace(self.compute, compile=False).blocks(images)
        ]
        return torch.cat(parts)

    def pull(
        self, vector: Tensor, images: Tensor, labels: Tensor, by: Tensor, *, start: bool = True
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return <g, by> of the loss's gradient g, and its derivative in all that g depends on.

        The derivatives in parameters, images and labels are the change of the loss's gradients
        along `by` in the parameters, for second derivatives do not mind their order: forward over
        backward mode, so that no graph of a gradient is kept. Without `start` that in the
        parameters stays zero.
        """
        run, how = self.compute.path(_pulled), (self.compute.dtype, self.loss)
        along, back, parts = vector.new_zeros(()), torch.zeros_like(vector), []
        for block in self._blocks(images, labels):
            with quietly():
                own, own_back, *rest = run(self.network, *how, start, vector, by, *block)
            along += own
            back += own_back
            parts.append(rest)
        in_images, in_labels = (torch.cat(t)[: len(images)] for t in zip(*parts, strict=True))
        return along, back, in_images, in_labels

    def _blocks(self, images: Tensor, labels: Tensor) -> list[tuple[Tensor, ...]]:
        weights = images.new_full((len(images),), 1 / len(images))
        last = channels_last(images.ndim)
        blocks = self.compute.blocks(images, labels, weights)
        return [(x.contiguous(memory_format=last), *rest) for x, *rest in blocks]


def vector_of(network: nn.Module) -> Tensor:
    """Return a network's parameters as one vector [p]."""
    return flat([p.detach().unsqueeze(0) for p in network.parameters()])[0]


def flat(stacked: Sequence[Tensor]) -> Tensor:
    """Return the parameters [s, ...] of s networks as vectors [s, p], in a student's order."""
    return torch.cat([(p.movedim(2, -1) if p.ndim > 2 else p).flatten(1) for p in stacked], 1)


def named(network: Network, vectors: Tensor) -> State:
    """Return a vector [p], or vectors [s, p], cut into a network's parameters, by name."""
    known = dict(network.named_parameters())
    parts = vectors.split([p.numel() for p in known.values()], -1)
    lead = vectors.shape[:-1]
    found = {}
    for (name, p), part in zip(known.items(), parts, strict=True):
        last = (p.movedim(1, -1) if p.ndim > 1 else p).shape
        whole = part.view(*lead, *last)
        found[name] = whole.movedim(-1, len(lead) + 1) if p.ndim > 1 else whole
    return found


def plan(
    n: int, batch: int, steps: int, augmentation: Augmentation, shape: tuple[int, ...], rng: Rng
) -> list[Step]:
    """Draw a student's steps over n images: whole epochs in random order, parameters per image."""
    found = []
    for step in range(steps):
        index = batch_index(n, batch, step, rng)
        draw = augmentation.draw(len(index), shape, rng.at("augment", step))
        found.append(Step(index, draw))
    return found


class Way(Sequence[Tensor]):
    """A student's parameters before and after each step; few are kept, others are walked anew.

    Of more than KEPT steps, stretches of root n begin from vectors in memory, and the stretch that
    was asked for last is held whole: as one goes back, each is walked once more. The same
    arithmetic gives the same bits.
    """

    def __init__(
        self, advance: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]], start: Tensor, n: int
    ) -> None:
        self.advance, self.n = advance, n
        self.every = 1 if n <= KEPT else math.isqrt(n - 1) + 1
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        theta, velocity = start, torch.zeros_like(start)
        for i in range(n):
            if i % self.every == 0:
                self.kept[i] = theta, velocity
            theta, velocity = advance(i, theta, velocity)
        self.end, self.stretch = theta, {n: theta}

    def __len__(self) -> int:
        return self.n + 1

    def __getitem__(self, i: Any) -> Any:
        """Return the parameters [p] after step i (0: before the first)."""
        i = range(self.n + 1)[i]
        if i == self.n:
            return self.end
        if i in self.kept:
            return self.kept[i][0]
        if i not in self.stretch:
            at = i - i % self.every
            theta, velocity = self.kept[at]
            self.stretch = {}
            for step in range(at, min(at + self.every, self.n) - 1):
                theta, velocity = self.advance(step, theta, velocity)
                self.stretch[step + 1] = theta
        return self.stretch[i]


@torch.no_grad()
def walk(
    student: Student,
    start: Tensor,
    images: Tensor,
    labels: Tensor,
    rate: Tensor,
    steps: Sequence[Step],
    augmentation: Augmentation,
    *,
    momentum: float = 0.0,
) -> Way:
    """Return a student's parameters before and after each step of SGD.

    v_{i+1} = momentum v_i + g_i(theta_i);  theta_{i+1} = theta_i - rate v_{i+1}
    """

    @torch.no_grad()
    def advance(i: int, theta: Tensor, velocity: Tensor) -> tuple[Tensor, Tensor]:
        where, draw = steps[i]
        seen = augmentation.apply(images[where], draw)
        slope = student.gradient(theta, seen, labels[where])
        if not momentum:
            return theta - rate * slope, velocity  # which stays zero, and is not kept anew
        velocity = momentum * velocity + slope
        return theta - rate * velocity, velocity

    return Way(advance, start, len(steps))


def pull_back(
    student: Student,
    thetas: Sequence[Tensor],
    images: Tensor,
    labels: Tensor,
    rate: Tensor,
    steps: Sequence[Step],
    augmentation: Augmentation,
    cotangents: Mapping[int, Tensor],
    *,
    momentum: float = 0.0,
    exact: bool = True,
) -> Pulled:
    """Return the derivative of a loss L of `walk`'s vectors, given dL/dtheta_i as cotangents[i].

    For i from the last step to the first, with lambda_i = dL/dtheta_i through all that follows:
        m_i = lambda_{i+1} + momentum m_{i+1}
        d rate -= <m_i, g_i>;  d(x, y) -= rate d<g_i, m_i>/d(x, y)
        lambda_i = lambda_{i+1} - rate d<g_i, m_i>/dtheta_i  (+ cotangents[i])
    Only some vectors are kept, so the memory is that of one step however many there are.
    Not `exact`, lambda stays as it is: steps are taken to be independent of each other, the
    approximation of TESLA (arXiv 2211.10586, section 3.2), which needs no momentum.
    Source: the adjoint of gradient descent (Maclaurin et al., arXiv 1502.03492, algorithm 2, with
    the vectors kept instead of reversed).
    """
    d_images, d_labels = torch.zeros_like(images), torch.zeros_like(labels)
    d_rate = thetas[0].new_zeros(())
    adjoint, carried = torch.zeros_like(thetas[0]), torch.zeros_like(thetas[0])
    for i in reversed(range(max(cotangents))):
        if i + 1 in cotangents:
            adjoint = adjoint + cotangents[i + 1]
        carried = adjoint + momentum * carried
        index, draw = steps[i]
        leaf = images[index].requires_grad_()
        seen = augmentation.apply(leaf, draw)
        along, back, in_seen, in_labels = student.pull(
            thetas[i], seen.detach(), labels[index], carried, start=exact
        )
        (in_images,) = torch.autograd.grad(seen, leaf, in_seen)
        d_images.index_add_(0, index.to(images.device), in_images, alpha=-float(rate))
        d_labels.index_add_(0, index.to(images.device), in_labels, alpha=-float(rate))
        d_rate -= along
        adjoint = adjoint - rate * back
    if 0 in cotangents:
        adjoint = adjoint + cotangents[0]
    return Pulled(d_images, d_labels, d_rate.to(rate.device), adjoint)


def _loss(
    network: Network,
    dtype: torch.dtype,
    kind: Loss,
    vector: Tensor,
    images: Tensor,
    labels: Tensor,
    weights: Tensor,
) -> Tensor:
    parameters = named(network, vector)
    if dtype == torch.bfloat16:
        parameters = {name: p.to(dtype) for name, p in parameters.items()}
        images = images.to(dtype)
    logits: Tensor = functional_call(network, parameters, (images,)).to(vector.dtype)
    return (losses(kind, logits, labels) * weights).sum()


def _gradient(
    network: Network,
    dtype: torch.dtype,
    kind: Loss,
    vector: Tensor,
    images: Tensor,
    labels: Tensor,
    weights: Tensor,
) -> Tensor:
    found: Tensor = grad(_loss, argnums=3)(network, dtype, kind, vector, images, labels, weights)
    return found


def _pulled(
    network: Network,
    dtype: torch.dtype,
    kind: Loss,
    start: bool,
    vector: Tensor,
    by: Tensor,
    images: Tensor,
    labels: Tensor,
    weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def slopes(vector: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        found: tuple[tuple[Tensor, ...], Tensor] = grad_and_value(_loss, argnums=(3, 4, 5))(
            network, dtype, kind, vector, images, labels, weights
        )
        return found

    (back, in_images, in_labels), along = jvp(slopes, (vector,), (by,))[1]
    return along, back if start else torch.zeros_like(back), in_images, in_labels
