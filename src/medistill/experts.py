"""Experts: networks trained on the real set, kept epoch by epoch, shared by all that match them."""

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from .augment import Augmentation
from .backbones import Backbone
from .compute import Compute, whole_batches
from .data.split import assign
from .engine import Engine, Here
from .errors import NoRoom, RunRefused
from .features import logits_of_set
from .optim import sgd_
from .progress import progress, say
from .records import Json, State, header_of, load_state, save_state
from .rng import Rng
from .sets import LOSSES, RealSet
from .train import RealImages, batch_of, gradient, gradients_together, losses
from .unroll import flat, named, vector_of

FORMAT = "medistill expert 1"
SAVE_EVERY_S = 60.0
MOST_HELD = 500  # images that are held out of training to measure accuracy
TOGETHER = 8  # experts that train at once where a GPU has room for them


@dataclass(frozen=True)
class Training:
    """How experts are trained: all that their digest depends on besides data and backbone.

    SGD without momentum at rate `lr`. With `sharpness` rho above 0 it is GSAM: at theta the
    gradient g, at theta + rho theta^2 g / |theta g| the gradient h, and a step along
    h - ascent (g - (<g, h> / |h|^2) h).
    Source: plain experts as in arXiv 2203.11932; GSAM, Zhuang et al., ICLR 2022, arXiv 2203.08065,
    algorithm 1, with the adaptive radius of arXiv 2102.11600, as arXiv 2211.11004 uses it.
    Departures: an epoch is one pass over the images, but at least `least_steps` steps, for on a few
    hundred images one pass moves an expert nowhere; a share `holdout` of the training images (500
    at most) is held out, and an expert stops `patience` epochs after its loss there was lowest (0:
    never); the papers train to the end.
    """

    lr: float = 0.01
    batch: int = 256
    least_steps: int = 10
    sharpness: float = 0.0
    ascent: float = 0.0
    holdout: float = 0.1
    patience: int = 10


@dataclass(frozen=True, eq=False)
class Bank:
    """What a bank of experts is made from, and the folder that keeps it (None: memory)."""

    real: RealSet
    backbone: Backbone
    augmentation: Augmentation
    compute: Compute
    training: Training
    folder: Path | None = None

    @cached_property
    def dealt(self) -> tuple[Tensor, Tensor]:
        """Positions of the images that are held out, and of those that experts train on.

        Where no class has images to spare, all are trained on, and looked at as well.
        """
        everything = torch.arange(len(self.real))
        share = min(self.training.holdout, MOST_HELD / len(self.real))
        if share > 0:
            groups = everything if self.real.groups is None else self.real.groups
            shares = {"train": 1 - share, "held": share}
            found = assign(self.real.labels.cpu(), groups, shares, Rng(0))
            if len(found["held"]):
                return found["held"], found["train"]
        return everything[:MOST_HELD], everything

    @property
    def patience(self) -> int:
        """The patience of the training; none where nothing is held out to judge by."""
        held, kept = self.dealt
        return self.training.patience if len(held) + len(kept) == len(self.real) else 0

    def path(self, number: int) -> Path | None:
        """Return the file of an expert."""
        return self.folder / f"expert-{number}.safetensors" if self.folder else None

    def size(self, count: int, epochs: int) -> int:
        """Return the bytes that so many experts take."""
        return count * self.backbone.parameters(self.real.card) * (2 * epochs + 8)


def experts(bank: Bank, count: int, epochs: int, engine: Engine) -> State:
    """Return the paths of `count` experts over so many epochs, training what is missing.

    `expert.K.start` float32 [p] is where expert K began, `expert.K.moves` bfloat16 [e, p] how far
    it had come after each epoch: differences are rounded, not parameters, for an epoch moves them
    by less than bfloat16 can tell apart. `accuracy` float32 [count, epochs + 1] is that on the
    images held out (nan after the end), `usable` int64 [count] the epochs until the loss there
    was lowest where training stopped early, and all otherwise.
    An expert's numbers depend on its number alone (on a GPU, where several train at once, to float
    rounding), so banks of other sizes share it; one that was cut short goes on from its last epoch
    on disk.
    Raises: RunRefused when the disk has no room, an expert does not stay finite, or another process
    writes the same files.
    """
    wanted = [k for k in range(count) if not _is_whole(bank, k, epochs)]
    if wanted and bank.folder is not None:
        size = bank.size(len(wanted), epochs)
        say(f"experts: {len(wanted)} of {epochs} epochs, {size / 1e6:.1f} MB in {bank.folder}")
        _check_room(bank.folder, size)
    if bank.real.file is not None:
        engine = Here()  # a map of a file does not travel to other processes
    items = [(bank, numbers, epochs) for numbers in _groups(bank, wanted)]
    made: dict[int, State] = {}
    with progress("experts", len(wanted)) as advance:
        for (_, numbers, _), states in zip(items, engine.map(train_experts, items), strict=True):
            made |= zip(numbers, states, strict=True)
            best = 100 * max(float(state["accuracy"].max()) for state in states)
            advance(len(numbers), note=f"accuracy {best:.1f}%")
    for k in range(count):
        if bank.folder is not None and not _is_whole(bank, k, epochs):
            raise RunRefused(
                f"found a shorter expert in {_file(bank, k)} than was just trained; expected that "
                "no other process writes there: wait for it, then run the same command again"
            )
    found = [
        made[k] if bank.folder is None else load_state(_file(bank, k))[0] for k in range(count)
    ]
    return _joined(found, epochs, bank.patience)


def train_experts(item: tuple[Bank, Sequence[int], int]) -> list[State]:
    """Train experts of some numbers, at once where there are several, and keep their files.

    Returns their states; where files hold these, the curves alone.
    """
    bank, numbers, epochs = item
    crew = _Crew(bank, numbers)
    saved = time.monotonic()
    while crew.epoch < epochs and not crew.stopped:
        crew.train_epoch()
        if bank.folder is not None and time.monotonic() - saved > SAVE_EVERY_S:
            crew.save()
            saved = time.monotonic()
    if bank.folder is None:
        return crew.states()
    crew.save()
    return [{"accuracy": state["accuracy"]} for state in crew.states()]


def usable_epochs(loss: Tensor, patience: int) -> int:
    """Return the epochs of an expert to match, from its held-out losses [e + 1] before and after.

    All of them, or those until the lowest loss where training stopped `patience` epochs after it.

    Example:
        >>> usable_epochs(torch.tensor([3.0, 1.0, 2.0]), 1), usable_epochs(torch.tensor([3.0]), 1)
        (1, 0)
    """
    end = _end(loss, patience)
    return len(loss) - 1 if end is None else int(loss[: end + 1].argmin())


def _end(loss: Tensor, patience: int) -> int | None:
    """Return the epoch after which an expert has stopped, if it has."""
    best = 0
    for epoch, value in enumerate(loss.tolist()):
        if value < float(loss[best]):
            best = epoch
        elif patience and epoch - best >= patience:
            return epoch
    return None


class _Crew:
    """Experts of one bank that train side by side, their parameters stacked."""

    def __init__(self, bank: Bank, numbers: Sequence[int]) -> None:
        self.bank, self.numbers = bank, numbers
        self.rngs = [Rng(0).child("expert", number) for number in numbers]
        build, card, device = bank.backbone.build, bank.real.card, bank.real.device
        networks = [build(card, rng.at("network")).to(device) for rng in self.rngs]
        self.network = networks[0]
        held, kept = bank.dealt
        self.held, self.data = bank.real.take(held), RealImages(bank.real, kept)
        self.start = torch.stack([vector_of(network) for network in networks])
        self.moves = torch.zeros(len(numbers), 0, self.start.shape[1], dtype=torch.bfloat16)
        self.curves: dict[str, Tensor] = {}
        path = bank.path(numbers[0])
        if path is not None and path.is_file():
            state, _ = load_state(path)
            self.moves = state["moves"].unsqueeze(0).clone()
            self.curves = {name: state[name].unsqueeze(0) for name in ("accuracy", "loss")}
            self._put(state["last"].unsqueeze(0).to(device))
        else:
            self._put(self.start)
            self._look()

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return self.moves.shape[1]

    @property
    def stopped(self) -> bool:
        """True when the held-out losses of all have ceased to fall."""
        return all(_end(loss, self.bank.patience) for loss in self.curves["loss"])

    def train_epoch(self) -> None:
        """Take one pass over the training images with every expert, and look at each."""
        training = self.bank.training
        per_epoch = max(-(-len(self.data) // training.batch), training.least_steps)
        for step in range(self.epoch * per_epoch, (self.epoch + 1) * per_epoch):
            drawn = [
                batch_of(self.data, training.batch, self.bank.augmentation, step, rng)
                for rng in self.rngs
            ]
            images, labels = (torch.stack(tensors) for tensors in zip(*drawn, strict=True))
            gradients = self._gradients(images, labels)
            if training.sharpness:
                gradients = self._flat(gradients, images, labels)
            sgd_(self.parameters, gradients, (), lr=training.lr)
        vectors = self._vectors()
        if not bool(torch.isfinite(vectors).all()):
            raise RunRefused(
                f"found parameters of an expert that are not finite after epoch {self.epoch + 1}; "
                "expected finite ones: lower --lr-expert"
            )
        moved = (vectors - self.start).to(torch.bfloat16).cpu()
        self.moves = torch.cat([self.moves, moved.unsqueeze(1)], 1)
        self._look()

    def states(self) -> list[State]:
        """Return each expert, cut where it stopped."""
        found = []
        for k, last in enumerate(self._vectors().cpu()):
            end = _end(self.curves["loss"][k], self.bank.patience) or self.epoch
            curves = {name: values[k, : end + 1].clone() for name, values in self.curves.items()}
            moves = self.moves[k, :end].clone()
            found.append({"start": self.start[k].cpu(), "moves": moves, "last": last, **curves})
        return found

    def save(self) -> None:
        """Write each expert's file."""
        for number, state in zip(self.numbers, self.states(), strict=True):
            if _is_whole(self.bank, number, len(state["moves"])):
                continue  # another process was faster
            header: Json = {"format": FORMAT, "number": number, "epochs": len(state["moves"])}
            stopped = _end(state["loss"], self.bank.patience) is not None
            save_state(_file(self.bank, number), state, {**header, "stopped": stopped})

    def _put(self, vectors: Tensor) -> None:
        """Make vectors [s, p] the experts' parameters; a lone network shares their memory."""
        self.stacked = {name: p.clone() for name, p in named(self.network, vectors).items()}
        self.parameters = tuple(p.requires_grad_() for p in self.stacked.values())
        self._show(0)

    def _show(self, k: int) -> None:
        """Make the network that of expert k."""
        for name, parameter in self.network.named_parameters():
            parameter.data = self.stacked[name].detach()[k]

    def _vectors(self) -> Tensor:
        return flat([p.detach() for p in self.parameters])

    def _gradients(self, images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        compute, loss = self.bank.compute, LOSSES[self.bank.real.card.task]
        if len(self.numbers) == 1:
            found, _ = gradient(self.network, images[0], labels[0], compute, loss)
            return tuple(g.unsqueeze(0) for g in found)
        return gradients_together(self.network, self.stacked, images, labels, compute, loss)[0]

    def _flat(
        self, gradients: tuple[Tensor, ...], images: Tensor, labels: Tensor
    ) -> tuple[Tensor, ...]:
        """Return the step of GSAM (see Training) from the plain gradient."""
        training = self.bank.training
        with torch.no_grad():
            before = [p.clone() for p in self.parameters]
            ways = [p.square() * g for p, g in zip(before, gradients, strict=True)]
            squares = [
                (p.abs() * g).flatten(1).square().sum(1)
                for p, g in zip(before, gradients, strict=True)
            ]
            reach = training.sharpness / (torch.stack(squares).sum(0).sqrt() + 1e-12)
            for p, way in zip(self.parameters, ways, strict=True):
                p += way * _over(reach, way)
        there = self._gradients(images, labels)
        with torch.no_grad():
            for p, old in zip(self.parameters, before, strict=True):
                p.copy_(old)
        return surrogate(gradients, there, training.ascent)

    @torch.no_grad()
    def _look(self) -> None:
        """Measure each expert on the images held out."""
        found: dict[str, list[float]] = {"accuracy": [], "loss": []}
        kind, labels = LOSSES[self.bank.real.card.task], self.held.labels.cpu()
        for k in range(len(self.numbers)):
            self._show(k)
            logits = logits_of_set(self.network, self.held, self.bank.compute)
            found["accuracy"].append(float((logits.argmax(1) == labels).float().mean()))
            found["loss"].append(float(losses(kind, logits, labels).mean()))
        self._show(0)
        for name, values in found.items():
            new = torch.tensor(values).unsqueeze(1)
            self.curves[name] = torch.cat([self.curves.get(name, new[:, :0]), new], 1)


def surrogate(
    here: tuple[Tensor, ...], there: tuple[Tensor, ...], ascent: float
) -> tuple[Tensor, ...]:
    """Return h - ascent (g - (<g, h> / |h|^2) h) for gradients g here and h there, per expert.

    Shapes: [s, ...], one slice for each expert.
    """
    pairs = [(g.flatten(1), h.flatten(1)) for g, h in zip(here, there, strict=True)]
    dot = torch.stack([(g * h).sum(1) for g, h in pairs]).sum(0)
    square = torch.stack([h.square().sum(1) for _, h in pairs]).sum(0)
    along = 1 + ascent * dot / square.clamp_min(1e-30)
    return tuple(_over(along, h) * h - ascent * g for g, h in zip(here, there, strict=True))


def _over(values: Tensor, tensor: Tensor) -> Tensor:
    """Return values [s] shaped so that they multiply a tensor [s, ...]."""
    return values.view(-1, *[1] * (tensor.ndim - 1))


def _groups(bank: Bank, wanted: Sequence[int]) -> list[list[int]]:
    """Deal experts that have not begun into groups that train at once; others go on alone."""
    room = whole_batches(bank.training.batch, bank.real.card.shape)
    size = min(TOGETHER, room) if bank.real.device.type != "cpu" else 1
    begun = [k for k in wanted if (path := bank.path(k)) is not None and path.is_file()]
    fresh = [k for k in wanted if k not in begun]
    return [[k] for k in begun] + [fresh[k : k + size] for k in range(0, len(fresh), size)]


def _file(bank: Bank, number: int) -> Path:
    path = bank.path(number)
    assert path is not None
    return path


def _is_whole(bank: Bank, number: int, epochs: int) -> bool:
    path = bank.path(number)
    if path is None or not path.is_file():
        return False
    header = header_of(path)
    return bool(header["stopped"]) or int(header["epochs"]) >= epochs


def _joined(states: Sequence[State], epochs: int, patience: int) -> State:
    """Return experts as one state, none longer than `epochs`."""
    joined: State = {}
    accuracy = torch.full((len(states), epochs + 1), torch.nan)
    usable = []
    for k, state in enumerate(states):
        curve = state["accuracy"][: epochs + 1]
        accuracy[k, : len(curve)] = curve
        usable.append(usable_epochs(state["loss"][: epochs + 1], patience))
        joined |= {
            f"expert.{k}.start": state["start"],
            f"expert.{k}.moves": state["moves"][:epochs],
        }
    return joined | {"accuracy": accuracy, "usable": torch.tensor(usable)}


def _check_room(folder: Path, size: int) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise NoRoom(
            f"could not make {folder}: {error.strerror}; expected a cache that can be written: set "
            "XDG_CACHE_HOME to another folder"
        ) from error
    if free < size:
        raise NoRoom(
            f"found {free / 1e6:.0f} MB free in {folder}; expected {size / 1e6:.0f} MB for "
            "experts: free some, or ask for fewer with --experts"
        )
