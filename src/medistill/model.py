"""The receiving side: train a model on a synthetic set by its recipe, test it, save it."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch

from . import __version__
from .backbones import Network, from_spec
from .errors import DataError
from .features import logits_of_set
from .metrics import evaluate_task
from .pixels import Whitening
from .records import Json, from_record, load_state, read_json, save_state, to_record
from .rng import Rng
from .sets import Card, RealSet, Recipe, SyntheticSet
from .train import CPU, TensorImages, check_kind, fit

FORMAT = "medistill model 1"


def train(
    synthetic: SyntheticSet,
    recipe: Recipe | None = None,
    *,
    seed: int = 0,
    device: torch.device = CPU,
) -> Network:
    """Return a network trained on a synthetic set by `recipe` (the set's own otherwise)."""
    by = recipe or synthetic.recipe
    rng = Rng(seed).child("student")
    network = from_spec(by.backbone).build(synthetic.card, rng.at("network")).to(device)
    network.whiten_by(synthetic.whitening)
    fit(network, TensorImages.of(dataclasses.replace(synthetic, recipe=by), device), by, rng)
    return network


def declared(folder: Path) -> tuple[SyntheticSet, Recipe, Json | None]:
    """Return a run's set, the recipe chosen for it on validation data, and its declared scores.

    Before `evaluate` has run there is no choice yet: the set's own recipe, and no scores.
    Raises: DataError when the folder holds no finished run.
    """
    synthetic = SyntheticSet.load(folder / "synthetic.safetensors")
    path = folder / "evaluation.json"
    if not path.is_file():
        return synthetic, synthetic.recipe, None
    evaluation: dict[str, Any] = read_json(path)
    return (
        synthetic,
        from_record(Recipe, evaluation["recipes"]["synthetic"]),
        evaluation["synthetic"],
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
    """Write weights as safetensors, with the recipe and the card in the header."""
    header: Json = {"format": FORMAT, "version": __version__}
    header |= {"recipe": to_record(recipe), "card": to_record(card)}
    save_state(path, network.state_dict(), header)


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
