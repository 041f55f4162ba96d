"""The receiving side: train a model on synthetic sets by their recipe, test it, save it."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import __version__
from .backbones import Network, from_spec
from .errors import DataError, RunRefused
from .features import logits_of_set
from .metrics import evaluate_task
from .pixels import Whitening
from .records import Json, from_record, load_state, read_json, save_state, to_record
from .rng import Rng
from .sets import Card, RealSet, Recipe, SyntheticSet, TaskKind
from .train import CPU, TensorImages, check_kind, fit

FORMAT = "medistill model 1"


class Given(NamedTuple):
    """A set that came from somewhere, and the accuracy that was declared of it on which data.

    `version_of` is a package's site and name, and `keys` are those of its signers: two packages of
    one name by one key are two versions of one.
    """

    name: str
    synthetic: SyntheticSet
    declared: Json | None = None
    declared_on: str = ""
    version_of: tuple[str, ...] = ()
    keys: frozenset[str] = frozenset()


def train(
    synthetic: SyntheticSet,
    recipe: Recipe | None = None,
    *,
    seed: int = 0,
    device: torch.device = CPU,
) -> Network:
    """Return a network trained on a synthetic set by `recipe` (the set's own otherwise)."""
    by = recipe or synthetic.recipe
    data = TensorImages.of(dataclasses.replace(synthetic, recipe=by), device)
    return _trained(synthetic, by, data, seed, device)


def train_together(
    sets: Sequence[SyntheticSet], *, seed: int = 0, device: torch.device = CPU
) -> Network:
    """Return a network trained on sets of several sites, by the recipe of the first.

    Each site's images are normalized by its own mean and std, and every class of every site stands
    as often as the largest, so that neither a large site nor a site's own mix of classes rules.
    Raises: DataError when the sets are not of one kind, backbone, loss or rule of intensities, or
    are whitened.
    """
    first = sets[0]
    for other in sets[1:]:
        check_kind(other.card, first.card)
        for name in ("backbone", "loss", "intensity"):
            one, two = (getattr(made.recipe, name) for made in (first, other))
            if one != two:
                raise DataError(
                    f"found {name} {two} in {other.card.name} and {one} in {first.card.name}; "
                    "expected sets that were made for one network: train on each alone"
                )
    if len(sets) > 1 and any(made.whitening is not None for made in sets):
        raise DataError("found a whitened set among several; expected none: train on each alone")
    images, labels = balanced([made.to_train() for made in sets], first.card.task)
    data = TensorImages(images.to(device), labels.to(device))
    return _trained(first, first.recipe, data, seed, device)


def _trained(
    synthetic: SyntheticSet, recipe: Recipe, data: TensorImages, seed: int, device: torch.device
) -> Network:
    rng = Rng(seed).child("student")
    network = from_spec(recipe.backbone).build(synthetic.card, rng.at("network")).to(device)
    network.whiten_by(synthetic.whitening)
    fit(network, data, recipe, rng)
    return network


def balanced(parts: Sequence[tuple[Tensor, Tensor]], task: TaskKind) -> tuple[Tensor, Tensor]:
    """Return the images and labels of several sites, each class of each as often as the largest.

    Images of smaller classes are repeated in turn. Soft labels count for their largest weight;
    where an image may have several labels, sites alone are balanced. One site's are left as they
    are.

    Example:
        >>> labels = torch.eye(2)
        >>> sites = [(torch.zeros(3, 1), labels[[0, 0, 1]]), (torch.ones(1, 1), labels[[1]])]
        >>> balanced(sites, "binary")[1].sum(0).tolist()
        [2.0, 4.0]
    """
    images, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    if len(parts) == 1:
        return images, labels
    site = torch.cat([torch.full((len(own),), n) for n, (own, _) in enumerate(parts)])
    place = site if task == "multi-label" else site * labels.shape[1] + labels.argmax(1)
    members = [(place == one).nonzero().flatten() for one in place.unique().tolist()]
    turn = torch.arange(max(map(len, members)))
    index = torch.cat([own[turn % len(own)] for own in members])
    return images[index], labels[index]


def recipe_together(sets: Sequence[SyntheticSet], local: Card | None) -> Recipe:
    """Return the recipe of a network of one or several sets, as it is used afterwards.

    One set has its own. A network of several has seen each site by its own mean and std, so that
    images have to come by those of their own site: the local ones, or where there is no local data
    the mean over sites.
    """
    first = sets[0].recipe
    if len(sets) == 1:
        return first
    if local is not None:
        return dataclasses.replace(first, mean=local.mean, std=local.std)
    mean, std = (
        tuple(torch.tensor([getattr(made.recipe, name) for made in sets]).double().mean(0).tolist())
        for name in ("mean", "std")
    )
    return dataclasses.replace(first, mean=mean, std=std)


def influence(sets: Sequence[Given], val: RealSet, **how: Any) -> Iterator[Json]:
    """Yield how well networks do on local validation images with each site alone, and without it.

    `how` is the seed and device of `train_together`. The test split is not read.
    """
    for number, one in enumerate(sets):
        alone = train_together([one.synthetic], **how)
        rest = [other.synthetic for n, other in enumerate(sets) if n != number]
        without = train_together(rest, **how)
        scores = [test_together(network, val, sets)["accuracy"] for network in (alone, without)]
        yield {"site": one.name, "alone": scores[0], "without": scores[1]}


def test_together(network: Network, real: RealSet, sets: Sequence[Given]) -> Json:
    """Return the scores of a network of several sites on local data, by its own mean and std."""
    made = [one.synthetic for one in sets]
    return test(network, real, recipe_together(made, real.card), made[0].card)


def declared(folder: Path) -> tuple[SyntheticSet, Recipe, Json | None]:
    """Return a run's set, the recipe chosen for it on validation data, and its evaluation.

    Before `evaluate` has run there is no choice yet: the set's own recipe, and None.
    Raises: DataError when the folder holds no finished run, or an evaluation of another set.
    """
    synthetic = SyntheticSet.load(folder / "synthetic.safetensors")
    path = folder / "evaluation.json"
    if not path.is_file():
        return synthetic, synthetic.recipe, None
    evaluation: dict[str, Any] = read_json(path)
    check_own(evaluation, synthetic, path)
    return synthetic, from_record(Recipe, evaluation["recipes"]["synthetic"]), evaluation


def check_own(record: Json, synthetic: SyntheticSet, path: Path) -> None:
    """Refuse scores or an audit of another set than the one that stands beside them.

    Raises: DataError.
    """
    if record.get("set") != synthetic.digest:
        raise DataError(
            f"found {path} of another set, or of an earlier version; expected it of "
            "synthetic.safetensors there: make it again"
        )


def test(network: Network, real: RealSet, recipe: Recipe, card: Card) -> Json:
    """Return the scores of a network on a split of local data, prepared as its recipe says.

    `card` is that of the set the network was trained on. AUC is None where the split holds one
    class only.
    Raises: DataError when the local data is of another kind (classes, channels, shape).
    """
    check_kind(real.card, card)
    seen = dataclasses.replace(real.card, mean=recipe.mean, std=recipe.std)
    local = dataclasses.replace(real, card=seen).whitened(network.whitening)
    logits = logits_of_set(network, local)
    scores = evaluate_task(real.card.task, logits, real.labels)
    return scores | {"auc": None if math.isnan(scores["auc"]) else scores["auc"]}


def save(path: Path, network: Network, recipe: Recipe, card: Card) -> None:
    """Write weights as safetensors, with the recipe and the card in the header.

    Raises: RunRefused when the training ran away to weights that are no numbers.
    """
    header: Json = {"format": FORMAT, "version": __version__}
    header |= {"recipe": to_record(recipe), "card": to_record(card)}
    state = network.state_dict()
    broken = [name for name, one in state.items() if not bool(one.isfinite().all())]
    if broken:
        raise RunRefused(
            f"found weights that are not finite ({broken[0]}); expected numbers: the training ran "
            "away, so the recipe does not fit the set"
        )
    save_state(path, state, header)


def load(path: Path) -> tuple[Network, Recipe, Card]:
    """Read a model that `save` wrote.

    Raises: DataError when the file is missing, damaged or holds something else.
    """
    state, header = load_state(path)
    if header.get("format") != FORMAT:
        raise DataError(f"{path} holds no model; expected one written by train")
    recipe, card = from_record(Recipe, header["recipe"]), from_record(Card, header["card"])
    network = from_spec(recipe.backbone).build(card, Rng(0).at("replaced"))
    if recipe.whitening:
        parts = [state[key] for name in Whitening._fields if (key := f"whitening_{name}") in state]
        if len(parts) < len(Whitening._fields):
            raise DataError(f"{path} lacks the whitening that its recipe names; expected both")
        network.whiten_by(Whitening(*parts))
    network.load_state_dict(state)
    return network, recipe, card
