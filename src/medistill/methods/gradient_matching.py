"""The step that DC and DSA share: match gradients, move the images, train the network on them."""

from abc import abstractmethod
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..augment import Augmentation
from ..backbones import Network
from ..compute import Compute
from ..records import State
from ..rng import Rng
from ..sets import Start
from ..train import TensorImages, fit, gradient, gradients_together
from ..unroll import Student, flat, vector_of
from .base import Log, Method, Task, moved, pick, recipe_of, started

# arXiv 2006.05929, appendix: outer and inner loops for these numbers of images per class.
PAPER_LOOPS = {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}
NORM_IMAGES = 16  # real images per class that fix the statistics of batch normalization


@dataclass(frozen=True)
class GradientMatching(Method):
    """What DC and DSA share: their fields, their state and their step; they differ in `view`."""

    iterations: int = 1000
    outer_loops: int | None = None
    inner_epochs: int | None = None
    lr_images: float = 0.1
    momentum: float = 0.5
    lr_network: float = 0.01
    batch_real: int = 256
    batch_synthetic: int = 256
    start: Start = "noise"

    @abstractmethod
    def view(self, task: Task) -> Augmentation:
        """Return the augmentation under which gradients are matched."""

    def steps(self, task: Task) -> int:
        """Return iterations x outer loops."""
        return self.iterations * loops(task.ipc, self.outer_loops, self.inner_epochs)[0]

    def init(self, task: Task, rng: Rng) -> State:
        """Return the images at their start, and the first network's parameters as `net.NAME`."""
        network = task.network(rng.at("network", 0))
        return {**started(task, self.start, rng), **_named(network)}

    def step(self, state: State, task: Task, rng: Rng) -> tuple[State, Log]:
        """Match once for all classes, then train the network on the new images."""
        return match_step(self, self.view(task), state, task, rng)


def loops(ipc: int, outer: int | None = None, inner: int | None = None) -> tuple[int, int]:
    """Return (outer loops, inner epochs) for any number of images per class.

    The paper's six pairs, linear in between, and as many outer loops as images beyond.

    Example:
        >>> loops(10), loops(15), loops(100), loops(10, inner=5)
        ((10, 50), (15, 38), (100, 10), (10, 5))
    """
    known = sorted(PAPER_LOOPS)
    between = np.interp(ipc, known, [PAPER_LOOPS[k][1] for k in known])
    return outer or ipc, inner or int(between + 0.5)


def distance(synthetic: tuple[Tensor, ...], real: tuple[Tensor, ...]) -> Tensor:
    """Return sum over layers and output rows of 1 - <g, h> / (|g| |h| + 1e-6).

    Convolutions are flattened for each output channel; one-dimensional tensors count nothing.
    Source: arXiv 2006.05929, equation 10 and its released form.
    """
    total = real[0].new_zeros(())
    for g, h in zip(synthetic, real, strict=True):
        if g.ndim > 1:
            g, h = g.flatten(1), h.flatten(1)
            total = total + (1 - (g * h).sum(1) / (g.norm(dim=1) * h.norm(dim=1) + 1e-6)).sum()
    return total


def match_step(
    method: GradientMatching, augmentation: Augmentation, state: State, task: Task, rng: Rng
) -> tuple[State, Log]:
    """Do one round: match all classes under the present network, then train it on the images."""
    step = int(state["step"])
    outer, inner = loops(task.ipc, method.outer_loops, method.inner_epochs)
    iteration, round_ = divmod(step, outer)
    at = rng.child("step", step)
    network = _network(state, task, rng, iteration if round_ == 0 else None)
    frozen = network.mixes_images
    if frozen:
        _freeze_norms(network, task, at)
    images = state["images"]
    args = (images, task, augmentation, method, at)
    matched = _all_at_once if at_once(network, task, method) else _class_by_class
    gradients, total = matched(network, *args)
    state = moved(state, gradients, lr=method.lr_images, momentum=method.momentum)
    if round_ < outer - 1:
        network.train()
        _train_on(network, state, augmentation, method, inner, task, at)
    return {**state, **_named(network)}, {"loss": total}


def at_once(network: Network, task: Task, method: GradientMatching) -> bool:
    """Say whether all classes are matched in one call: on a GPU, which one class leaves idle.

    Classes need as many images each, and networks that mix none. On CPUs class after class stays in
    the cache.
    """
    real = {min(method.batch_real, len(members)) for members in task.real.by_class}
    even = len(real) == len(set(task.counts)) == 1
    return task.real.device.type == "cuda" and even and not network.mixes_images


def _viewed(
    images: Tensor, c: int, task: Task, augmentation: Augmentation, batch: int, rng: Rng
) -> tuple[Tensor, Tensor]:
    """Return real images of a class and its synthetic ones under one draw of the augmentation."""
    members = task.real.by_class[c]
    index = pick(members, min(batch, len(members)), rng.at("real", c))
    draw = augmentation.draw(1, task.real.card.shape, rng.at("augment", c))
    real = augmentation.apply(task.real.normalized(index), draw)
    return real, augmentation.apply(images, draw)


def _class_by_class(
    network: Network,
    images: Tensor,
    task: Task,
    augmentation: Augmentation,
    method: GradientMatching,
    rng: Rng,
) -> tuple[Tensor, float]:
    """Return the gradient of the sum of all classes' distances in the images, and that sum.

    Classes are summed, so each may be differentiated alone: memory holds one class's graph.
    """
    gradients, total = [], 0.0
    compiled = task.compute.compile and not network.mixes_images
    apart_in = _forward_over_backward if compiled else _backward_twice
    for c, part in enumerate(images.split(task.counts)):
        leaf = part.clone().requires_grad_()
        real, seen = _viewed(leaf, c, task, augmentation, method.batch_real, rng)
        target, _ = gradient(network, real, _labels(real, c), task.compute)
        apart, moved_by = apart_in(network, seen.detach(), _labels(seen, c), target)
        gradients += torch.autograd.grad(seen, leaf, moved_by)
        total += float(apart)
    return torch.cat(gradients), total


def _all_at_once(
    network: Network,
    images: Tensor,
    task: Task,
    augmentation: Augmentation,
    method: GradientMatching,
    rng: Rng,
) -> tuple[Tensor, float]:
    """Return the same as `_class_by_class`: the network is stacked, one copy for each class."""
    k, leaf = len(task.counts), images.clone().requires_grad_()
    pairs = [
        _viewed(part, c, task, augmentation, method.batch_real, rng)
        for c, part in enumerate(leaf.split(task.counts))
    ]
    real, seen = (torch.stack(parts) for parts in zip(*pairs, strict=True))
    stacked = {
        name: p.detach().expand(k, *p.shape).clone().requires_grad_()
        for name, p in network.named_parameters()
    }
    each = torch.arange(k, device=images.device).unsqueeze(1)
    labels = each.expand(k, real.shape[1])
    target, _ = gradients_together(network, stacked, real, labels, task.compute)
    labels = each.expand(k, seen.shape[1])
    own, _ = gradients_together(network, stacked, seen, labels, again=True)
    apart = torch.vmap(distance)(own, target).sum()
    (moved_by,) = torch.autograd.grad(apart, leaf)
    return moved_by, float(apart.detach())


def _backward_twice(
    network: Network, images: Tensor, labels: Tensor, target: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """Return the distance of the images' gradient from `target`, and its gradient in the images."""
    leaf = images.requires_grad_()
    loss = F.cross_entropy(network(leaf), labels)
    own = torch.autograd.grad(loss, tuple(network.parameters()), create_graph=True)
    apart = distance(own, target)
    (moved_by,) = torch.autograd.grad(apart, leaf)
    return apart.detach(), moved_by


def _forward_over_backward(
    network: Network, images: Tensor, labels: Tensor, target: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """Return the same as `_backward_twice`, compiled, for which a second backward cannot be.

    With v the gradient of the distance in the images' gradient g, that in the images is the
    gradient of <g, v>: the change of the loss's gradient in the images along v in the parameters.
    """
    compute = Compute(compile=True)
    own, _ = gradient(network, images, labels, compute)
    own = tuple(g.requires_grad_() for g in own)
    apart = distance(own, target)
    by = torch.autograd.grad(apart, own, materialize_grads=True)
    classes = network.head.out_features
    weights = F.one_hot(labels, classes).to(images.dtype)
    vector, along = vector_of(network), flat([g.unsqueeze(0) for g in by])[0]
    student = Student(network, compute=compute)
    *_, moved_by, _ = student.pull(vector, images, weights, along, start=False)
    return apart.detach(), moved_by


def _labels(images: Tensor, c: int) -> Tensor:
    return torch.full((len(images),), c, device=images.device)


def _train_on(
    network: Network,
    state: State,
    augmentation: Augmentation,
    method: GradientMatching,
    epochs: int,
    task: Task,
    rng: Rng,
) -> None:
    """Train the network for `epochs` passes over the synthetic images, plain SGD."""
    n = len(state["images"])
    steps = epochs * -(-n // method.batch_synthetic)
    recipe = replace(
        recipe_of(task, augmentation),
        lr=method.lr_network,
        momentum=0.0,
        weight_decay=0.0,
        steps=2 * steps,  # the rate falls at half of this: never within these steps
        stop=steps,
        batch=method.batch_synthetic,
    )
    data = TensorImages(state["images"], state["labels"])
    fit(network, data, recipe, rng.child("inner"), compute=task.compute)


def _network(state: State, task: Task, rng: Rng, fresh: int | None) -> Network:
    """Return the network of the state, or the fresh one of iteration `fresh`."""
    network = task.network(rng.at("network", fresh or 0))
    if fresh is None:
        prefix = "net."
        network.load_state_dict(
            {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        )
    return network


def _named(network: Network) -> State:
    return {f"net.{name}": value.clone() for name, value in network.state_dict().items()}


@torch.no_grad()
def _freeze_norms(network: Network, task: Task, rng: Rng) -> None:
    """Set batch-norm statistics from real images of every class, then hold them fixed."""
    index = torch.cat(
        [
            pick(members, min(NORM_IMAGES, len(members)), rng.at("norm", c))
            for c, members in enumerate(task.real.by_class)
        ]
    )
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
    network.train()
    network(task.real.normalized(index))
    for norm in norms:
        norm.momentum = 0.1
        norm.eval()
