"""The one place where networks are trained."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from .augment import Augmentation
from .backbones import Network
from .compute import PLAIN, Compute
from .errors import DataError
from .optim import Tensors, sgd_
from .records import State, from_record
from .rng import Rng
from .sets import Card, Loss, RealSet, Recipe, SyntheticSet

OnMark = Callable[[int, float], None]
CPU = torch.device("cpu")


class Drawable(Protocol):
    """What a network can be trained on: a number of images, and normalized images by index."""

    def __len__(self) -> int:
        """Return the number of images."""

    def draw(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return normalized images [b, c, ...] and labels (int64 [b] or float [b, k])."""


class RealImages:
    """Real images of a set (or of the positions `index`) as training data."""

    def __init__(self, real: RealSet, index: Tensor | None = None) -> None:
        self.real = real
        self.index = torch.arange(len(real)) if index is None else index

    def __len__(self) -> int:
        return len(self.index)

    def draw(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return normalized images and class numbers."""
        where = self.index[index]
        return self.real.normalized(where), self.real.labels[where.to(self.real.device)]


def balanced_index(real: RealSet) -> Tensor:
    """Return positions in which every class stands as often as the largest one.

    Images of smaller classes are repeated, so that a student of all real images starts from the
    same even prior as a student of a set with equally many images per class. Multi-label images
    have no class of their own: each stands once.

    Example:
        >>> from medistill import load
        >>> real = load("phantom:n=40").train
        >>> len(balanced_index(real)) == 2 * max(map(len, real.by_class))
        True
    """
    if real.labels.ndim == 2:
        return torch.arange(len(real))
    largest = max(map(len, real.by_class))
    numbers = torch.arange(largest)
    return torch.cat([members[numbers % len(members)] for members in real.by_class])


class TensorImages:
    """Normalized images and labels in memory as training data."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    @staticmethod
    def of(synthetic: SyntheticSet, device: torch.device = CPU) -> "TensorImages":
        """Return a synthetic set as its recipe prepares it, on a device."""
        return TensorImages(*(tensor.to(device) for tensor in synthetic.to_train()))

    def __len__(self) -> int:
        return len(self.images)

    def draw(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return images and labels at `index`."""
        where = index.to(self.images.device)
        return self.images[where], self.labels[where]


def check_kind(found: Card, expected: Card) -> None:
    """Refuse data of another kind than a network was, or is to be, trained on.

    Raises: DataError when classes, channels or shape differ.
    """
    for name in ("classes", "channels", "shape"):
        if getattr(found, name) != getattr(expected, name):
            raise DataError(
                f"found {name} {getattr(found, name)} in {found.name}; expected "
                f"{getattr(expected, name)} as in the synthetic set: use data of the same kind"
            )


def losses(kind: Loss, logits: Tensor, labels: Tensor) -> Tensor:
    """Return the loss [n] of each image's logits [n, k], by a recipe's kind of loss.

    cross-entropy: labels are class numbers int64 [n] or weights [n, k].
    ordinal: cross-entropy with label y spread to exp(-(y - j)^2) / sum_j exp(-(y - j)^2), so that a
    miss by one class costs less than a miss by two.
    binary-cross-entropy: the mean over classes of each class's own, labels in [0, 1] [n, k].
    Source of ordinal: Diaz and Marathe, CVPR 2019, equation 1, with squared distance.

    Example:
        >>> near, far = losses("ordinal", torch.eye(3)[[1, 2]] * 9, torch.tensor([0, 0]))
        >>> bool(near < far)
        True
    """
    if kind == "cross-entropy":
        return F.cross_entropy(logits, labels, reduction="none")
    if kind == "binary-cross-entropy":
        each = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none")
        return each.mean(1)
    place = torch.arange(logits.shape[1], device=logits.device, dtype=logits.dtype)
    spread = (-(place - place.unsqueeze(1)).square()).softmax(1)
    soft = spread[labels] if labels.ndim == 1 else labels @ spread
    return F.cross_entropy(logits, soft, reduction="none")


def gradient(
    network: Network,
    images: Tensor,
    labels: Tensor,
    compute: Compute = PLAIN,
    loss: Loss = "cross-entropy",
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return the gradient of the mean loss in all parameters, and the loss.

    The sum over blocks of images equals the whole batch to float rounding and stays in the cache;
    networks that mix the images of a batch see it whole. Images that fill up a block weigh nothing.
    In bfloat16 the parameters are rounded on their way in; they and their gradients stay float32.
    """
    parameters = tuple(network.parameters())
    weights = images.new_full((len(images),), 1 / len(images))
    run = compute.path(_loss)
    total: tuple[Tensor, ...] | None = None
    value = weights.new_zeros(())
    for block in compute.blocks(images, labels, weights, whole=network.mixes_images):
        part = run(network, compute.dtype, loss, *block)
        gradients = torch.autograd.grad(part, parameters)
        value += part.detach()
        if total is None:
            total = gradients
        else:
            torch._foreach_add_(total, gradients)
    assert total is not None
    return total, value


def _loss(
    network: Network,
    dtype: torch.dtype,
    kind: Loss,
    images: Tensor,
    labels: Tensor,
    weights: Tensor,
) -> Tensor:
    if dtype == torch.float32:
        logits = network(images)
    else:
        parameters = _rounded(dict(network.named_parameters()), _norms(network), dtype)
        logits = functional_call(network, parameters, (images.to(dtype),)).float()
    return (losses(kind, logits, labels) * weights).sum()


def _rounded(parameters: State, norms: set[str], dtype: torch.dtype) -> State:
    return {name: p if name in norms else p.to(dtype) for name, p in parameters.items()}


def _norms(network: Network) -> set[str]:
    """Return the parameters of batch norms, which must be as precise as their statistics."""
    kind = nn.modules.batchnorm._BatchNorm
    named = [name for name, module in network.named_modules() if isinstance(module, kind)]
    return {f"{name}.{what}" for name in named for what in ("weight", "bias")}


def batch_index(n: int, batch: int, step: int, rng: Rng) -> Tensor:
    """Return the positions of one batch: whole epochs in random order, the last batch shorter."""
    if n <= batch:
        return torch.arange(n)
    per_epoch = -(-n // batch)
    epoch, part = divmod(step, per_epoch)
    order = torch.randperm(n, generator=rng.at("order", epoch))
    return order[part * batch : (part + 1) * batch]


def fit(
    network: Network,
    data: Drawable,
    recipe: Recipe,
    rng: Rng,
    *,
    marks: Sequence[int] = (),
    on_mark: OnMark | None = None,
    compute: Compute = PLAIN,
) -> float:
    """Train a network in place by a recipe and return the last loss.

    SGD with momentum; the rate falls tenfold after half of recipe.steps; training stops after
    recipe.stop steps. After each step named in `marks`, `on_mark(step, loss)` is called.
    Source: the common recipe of arXiv 2006.05929 and 2102.08259.
    Departures: length in steps, not epochs, so that 2 images and 4,708 train equally long; the
    momentum survives the fall of the rate.
    """
    augmentation = from_record(Augmentation, recipe.augmentation)
    parameters: list[Tensor] = list(network.parameters())
    velocity = [torch.zeros_like(p) for p in parameters]
    loss = torch.tensor(torch.nan)
    for step in range(recipe.stop):
        images, labels = batch_of(data, recipe.batch, augmentation, step, rng)
        gradients, loss = gradient(network, images, labels, compute, recipe.loss)
        _move(parameters, gradients, velocity, recipe, step)
        if on_mark is not None and step + 1 in marks:
            on_mark(step + 1, float(loss))
    return float(loss)


def batch_of(
    data: Drawable, batch: int, augmentation: Augmentation, step: int, rng: Rng
) -> tuple[Tensor, Tensor]:
    """Return the augmented images and the labels of one step."""
    images, labels = data.draw(batch_index(len(data), batch, step, rng))
    if augmentation.kinds:
        shape = tuple(images.shape[2:])
        draw = augmentation.draw(len(images), shape, rng.at("augment", step))
        images = augmentation.apply(images, draw)
    return images, labels


def _move(
    parameters: Tensors, gradients: Tensors, velocity: Tensors, recipe: Recipe, step: int
) -> None:
    """Make the recipe's step number `step`, in place."""
    lr = recipe.lr if step < (recipe.steps + 1) // 2 else recipe.lr / 10
    how = {"momentum": recipe.momentum, "weight_decay": recipe.weight_decay}
    sgd_(parameters, gradients, velocity, lr=lr, **how)


def fit_together(
    networks: Sequence[Network],
    data: Sequence[Drawable],
    recipe: Recipe,
    rngs: Sequence[Rng],
    *,
    compute: Compute = PLAIN,
) -> list[float]:
    """Train networks of one architecture at once, each on data of its own, as `fit` would.

    Their parameters are stacked, and one call computes what all of them do (torch.func.vmap, which
    makes grouped convolutions): on a GPU small batches leave most of it idle. Batches go through
    whole. Equals `fit` of each to float rounding; returns the last losses.
    Raises: ValueError when the networks mix the images of a batch.
    """
    if any(network.mixes_images for network in networks):
        raise ValueError("networks with batch norm keep statistics of their own; use fit")
    augmentation = from_record(Augmentation, recipe.augmentation)
    states = [dict(network.named_parameters()) for network in networks]
    stacked = {
        name: torch.stack([state[name].detach() for state in states]).requires_grad_()
        for name in states[0]
    }
    velocity = [torch.zeros_like(p) for p in stacked.values()]
    last = torch.full((len(networks),), torch.nan)
    for step in range(recipe.stop):
        pairs = zip(data, rngs, strict=True)
        drawn = [batch_of(one, recipe.batch, augmentation, step, rng) for one, rng in pairs]
        images, labels = (torch.stack(tensors) for tensors in zip(*drawn, strict=True))
        gradients, last = gradients_together(
            networks[0], stacked, images, labels, compute, recipe.loss
        )
        _move(tuple(stacked.values()), gradients, velocity, recipe, step)
    with torch.no_grad():
        for number, state in enumerate(states):
            for name, parameter in state.items():
                parameter.copy_(stacked[name][number])
    return last.tolist()


def gradients_together(
    network: Network,
    stacked: State,
    images: Tensor,
    labels: Tensor,
    compute: Compute = PLAIN,
    loss: Loss = "cross-entropy",
    *,
    again: bool = False,
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return what `gradient` gives for s networks, each on images of its own.

    Shapes: stacked parameters [s, ...] that ask for a gradient, images [s, b, c, ...], labels
    [s, b] or [s, b, k]; returns gradients [s, ...] and losses [s]. Gradients can be differentiated
    `again` where no compiler stands in the way.
    """
    run = _losses if again else compute.path(_losses)
    found = run(network, compute.dtype, loss, stacked, images, labels)
    gradients = torch.autograd.grad(found.sum(), tuple(stacked.values()), create_graph=again)
    return gradients, found.detach()


def _losses(
    network: Network,
    dtype: torch.dtype,
    kind: Loss,
    stacked: State,
    images: Tensor,
    labels: Tensor,
) -> Tensor:
    """Return the mean loss [s] of s networks, each on images of its own."""
    norms = _norms(network)

    def loss(parameters: State, images: Tensor, labels: Tensor) -> Tensor:
        parts = _rounded(parameters, norms, dtype)
        body, head = (
            {n.removeprefix(part): p for n, p in parts.items() if n.startswith(part)}
            for part in ("body.", "head.")
        )
        # Not through the network, which asks for an order of memory that vmap does not know.
        maps = functional_call(network.body, body, (images.to(dtype),))
        logits = functional_call(network.head, head, (maps.flatten(1).to(dtype),))
        return losses(kind, logits.float(), labels).mean()

    found: Tensor = torch.vmap(loss)(stacked, images, labels)
    return found
