"""The receiving side: training from a set, saving, loading, and testing on local data."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from medistill.backbones import ConvNet
from medistill.budget import Budget
from medistill.data import load as load_data
from medistill.distill import distill
from medistill.errors import DataError, RunRefused
from medistill.evaluate import evaluate_run
from medistill.features import logits_of_set
from medistill.methods import Task
from medistill.methods.random import Random
from medistill.model import declared, load, save, test, train
from medistill.records import save_state, state_digest
from medistill.sets import Splits, SyntheticSet

test.__test__ = False  # type: ignore[attr-defined]  # a function of the library, not a test
SPLITS = load_data("phantom:n=60,size=16,variation=1")


def small_set(norm: str = "instance") -> SyntheticSet:
    backbone = ConvNet(depth=2, width=8, norm=norm)  # type: ignore[arg-type]
    made = distill(Random(), Task(SPLITS.train, Budget(ipc=3), backbone), seed=0)
    return dataclasses.replace(made, recipe=dataclasses.replace(made.recipe, steps=8, stop=8))


def test_a_seed_decides_the_model(untouched_generator: None) -> None:
    made = small_set()
    models = [state_digest(train(made, seed=seed).state_dict()) for seed in (0, 0, 1)]
    assert models[0] == models[1] != models[2]


def test_another_recipe_is_followed() -> None:
    made = small_set()
    plain = state_digest(train(made).state_dict())
    for change in ({"lr": 0.02}, {"mean": (0.1,)}, {"stop": 4}):
        recipe = dataclasses.replace(made.recipe, **change)
        assert state_digest(train(made, recipe).state_dict()) != plain
    wider = dataclasses.replace(
        made.recipe, backbone={**made.recipe.backbone, "width": 4, "depth": 1}
    )
    assert train(made, wider).head.in_features == 4 * 8 * 8


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_a_saved_model_gives_the_same_logits(norm: str, tmp_path: Path) -> None:
    made = small_set(norm)
    network = train(made)
    path = tmp_path / "model.safetensors"
    save(path, network, made.recipe, made.card)
    again, recipe, card = load(path)
    assert (recipe, card) == (made.recipe, made.card)
    assert torch.equal(logits_of_set(network, SPLITS.test), logits_of_set(again, SPLITS.test))


def test_files_that_hold_no_model_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    with pytest.raises(DataError, match="found no"):
        load(path)
    small_set().save(path)
    with pytest.raises(DataError, match="holds no model"):
        load(path)
    save_state(path, {"x": torch.zeros(2)}, {"format": "something"})
    with pytest.raises(DataError, match="holds no model"):
        load(path)
    made = small_set()
    save(path, train(made), made.recipe, made.card)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="is damaged"):
        load(path)


def local(**changes: Any) -> Splits:
    """Return the data as another site has it: with a card of its own."""
    card = dataclasses.replace(SPLITS.train.card, **changes)
    return Splits(*(dataclasses.replace(part, card=card) for part in SPLITS))


def test_a_training_that_ran_away_is_not_saved(tmp_path: Path) -> None:
    made = small_set()
    network = train(made)
    with torch.no_grad():
        next(network.parameters()).fill_(float("nan"))
    with pytest.raises(RunRefused, match="not finite"):
        save(tmp_path / "m", network, made.recipe, made.card)
    assert not (tmp_path / "m").exists()


def test_local_data_is_normalized_as_the_recipe_says() -> None:
    made = small_set()
    network = train(made)
    scores = test(network, SPLITS.test, made.recipe, made.card)
    elsewhere = local(name="there", mean=(0.9,), std=(0.01,)).test
    assert test(network, elsewhere, made.recipe, made.card) == scores
    other = dataclasses.replace(made.recipe, mean=(0.9,), std=(0.01,))
    assert test(network, SPLITS.test, other, made.card) != scores


def test_local_data_of_another_kind_is_refused() -> None:
    made = small_set()
    for split in (local(classes=("a", "b")), load_data("phantom:n=60,size=20,variation=1")):
        with pytest.raises(DataError, match="of the same kind"):
            test(train(made), split.test, made.recipe, made.card)


def test_local_data_of_one_class_has_no_auc() -> None:
    made, one = small_set(), SPLITS.test.by_class[1]
    part = dataclasses.replace(
        SPLITS.test, images=SPLITS.test.images[one], labels=SPLITS.test.labels[one]
    )
    scores = test(train(made), part, made.recipe, made.card)
    assert scores["auc"] is None
    assert scores["accuracy"] == scores["balanced_accuracy"]


def test_the_declared_recipe_is_the_chosen_one_and_reproduces_its_row(tmp_path: Path) -> None:
    made = small_set()
    made.save(tmp_path / "synthetic.safetensors")
    synthetic, recipe, told = declared(tmp_path)
    assert (recipe, told) == (made.recipe, None)
    record = evaluate_run(tmp_path, SPLITS, seeds=[0, 1], steps=8)
    synthetic, recipe, told = declared(tmp_path)
    assert told is not None
    assert told["synthetic"] == record["synthetic"]
    assert dataclasses.asdict(recipe)["lr"] == record["recipes"]["synthetic"]["lr"]
    for row in record["rows"][:2]:
        network = train(synthetic, recipe, seed=row["seed"])
        mine = test(network, SPLITS.test, recipe, synthetic.card)
        assert mine == {name: row[name] for name in mine}


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found no"):
        declared(tmp_path)
