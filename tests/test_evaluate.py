"""Honest evaluation: what is chosen where, what is drawn when, and what is read from the cache."""

import dataclasses
import json
import math
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from medistill import arms
from medistill.arms import arm_rows, full_arm, random_arm, synthetic_arm
from medistill.backbones import ConvNet
from medistill.budget import Budget
from medistill.data import load
from medistill.distill import distill
from medistill.errors import DataError, RunRefused
from medistill.evaluate import Evaluation, evaluate, evaluate_run
from medistill.methods import Task
from medistill.methods.random import Random
from medistill.metrics import NAMES, Score, gap_closed, score, worth
from medistill.report.words import findings
from medistill.rng import Rng
from medistill.sets import RealSet, Splits, SyntheticSet
from medistill.train import RealImages, TensorImages

EASY = "phantom:n=60,size=16,variation=1"
SPLITS = load(EASY)
SMALL = ConvNet(depth=2, width=8)
RATES = (1e-5, 0.03)


def chosen_set(ipc: int = 2, seed: int = 0, splits: Splits = SPLITS) -> SyntheticSet:
    made = distill(Random(), Task(splits.train, Budget(ipc=ipc), SMALL), seed=seed)
    return dataclasses.replace(made, recipe=dataclasses.replace(made.recipe, steps=16, stop=16))


def small_evaluation(**changes: Any) -> Evaluation:
    given = {
        "synthetic": chosen_set(),
        "splits": SPLITS,
        "students": [SMALL],
        "seeds": range(2),
        "rates": RATES,
        **changes,
    }
    return evaluate(given.pop("synthetic"), given.pop("splits"), **given)


def poisoned(part: RealSet) -> RealSet:
    """Swap the two classes and replace the pixels by noise."""
    noise = torch.randint(256, part.images.shape, generator=torch.Generator().manual_seed(0))
    return dataclasses.replace(part, images=noise.to(torch.uint8), labels=1 - part.labels)


@pytest.fixture(scope="module")
def whole() -> Evaluation:
    return small_evaluation()


def test_a_student_of_several_backbones_is_their_mean() -> None:
    found = small_evaluation(students=[SMALL, ConvNet(2, 4)], curve=(1,))
    rows = [row for row in found.rows if row["arm"] == "random"]
    assert len(rows) == 4
    means = [
        statistics.fmean(row["accuracy"] for row in rows if row["seed"] == seed) for seed in (0, 1)
    ]
    assert found.scores("random", "accuracy") == means
    told = found.record()
    assert told["random"]["accuracy"]["n"] == 2
    assert told["curve"]["1"]["n"] == 2


# --- what an evaluation says --------------------------------------------------------------------


def test_rows_pilots_and_scores(whole: Evaluation) -> None:
    arms = ("synthetic", "random", "full")
    assert [(row["arm"], row["seed"]) for row in whole.rows] == [
        (a, s) for a in arms for s in (0, 1)
    ]
    for row in whole.rows:
        assert row["images"] == {"synthetic": 4, "random": 4, "full": 60}[row["arm"]]
        assert row["backbone"] == "convnet-2-8"
        assert sum(map(sum, row["confusion"])) == len(SPLITS.test)
        assert set(NAMES) < set(row)
        recipe = whole.recipes[row["arm"]]
        assert (row["lr"], row["stop"]) == (recipe["lr"], recipe["stop"])
    assert [(pilot["arm"], pilot["lr"]) for pilot in whole.pilots] == [
        (arm, rate) for arm in arms for rate in RATES
    ]
    for arm in arms:
        mine = [pilot for pilot in whole.pilots if pilot["arm"] == arm]
        (best,) = (pilot for pilot in mine if pilot["chosen"])
        assert [point["step"] for point in best["curve"]] == [10, 12, 14, 16]
        points = [(pilot["lr"], point) for pilot in mine for point in pilot["curve"]]
        top = max(points, key=lambda p: (p[1]["balanced_accuracy"], -p[1]["cross_entropy"]))
        recipe = whole.recipes[arm]
        assert (
            (recipe["lr"], recipe["stop"])
            == (top[0], top[1]["step"])
            == (
                best["lr"],
                top[1]["step"],
            )
        )


def test_the_record_has_the_keys_of_the_command_line(whole: Evaluation) -> None:
    record = whole.record()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert {"protocol", "students", "seeds", "synthetic", "random", "full"} < set(record)
    assert {"gap_closed", "worth", "rows", "pilots", "recipes"} < set(record)
    assert (record["students"], record["seeds"]) == (["convnet-2-8"], [0, 1])
    for arm in ("synthetic", "random", "full"):
        assert tuple(record[arm]) == NAMES
        for name in NAMES:
            values = [row[name] for row in whole.rows if row["arm"] == arm]
            assert record[arm][name] == dataclasses.asdict(score(values))
    for name in ("accuracy", "auc"):
        arms = (whole.scores(arm, name) for arm in ("synthetic", "random", "full"))
        gap = gap_closed(*arms)
        assert record["gap_closed"][name] == (dataclasses.asdict(gap) if gap else None)


def test_full_beats_random_beats_chance_on_an_easy_set() -> None:
    splits = load("phantom:n=200,size=16,variation=1,classes=3")
    made = chosen_set(ipc=1, splits=splits)
    made = dataclasses.replace(made, recipe=dataclasses.replace(made.recipe, steps=40, stop=40))
    found = evaluate(made, splits, students=[SMALL], seeds=range(3), rates=(0.03,)).record()
    random, full = (found[arm]["accuracy"]["mean"] for arm in ("random", "full"))
    assert full > random + 0.02
    assert random > 1 / 3 + 0.1


def test_a_set_of_random_images_is_worth_its_own_number() -> None:
    """Worth is read from the curve of random images, which are those of the random arm."""
    found = small_evaluation(curve=(1, 2, 8))
    record = found.record()
    assert list(record["curve"]) == ["1", "2", "8"]
    assert record["curve"]["2"] == record["random"]["accuracy"]  # the same draws, trained alike
    means = [found.curve[size].mean for size in (1, 2, 8)]
    own = score(found.scores("synthetic", "accuracy")).mean
    assert found.worth is not None
    assert found.worth.mean == worth(own, [1, 2, 8], means)
    assert small_evaluation().worth is None
    assert small_evaluation(curve=(2,)).worth is None  # one size is no curve


def test_a_worth_beyond_the_curve_is_null_and_said_so() -> None:
    ones = {size: Score(0.5, 0.5, 0.5, 2) for size in (1, 4)}
    rows = [{"arm": "synthetic", "accuracy": 0.9 - seed / 10, "seed": seed} for seed in (0, 1)]
    found = Evaluation(rows, [], {}, ones, 0.0).worth
    assert found is not None
    assert found.mean == math.inf
    told = {"worth": {"mean": None, "low": None, "high": None, "n": 2}, "curve": {"1": 0, "4": 0}}
    judged = {"synthetic": {"accuracy": {"mean": 0.9, "low": 0.8, "high": 1.0, "n": 2}}, **told}
    run = {"method": "dm", "images": 2, "data": {"name": "x"}, "source": "x"}
    assert "worth more than 4 random real images" in findings(run, judged)[0]


def test_a_size_beyond_a_class_is_refused_before_anything_is_trained(
    trained: Counter[str],
) -> None:
    with pytest.raises(RunRefused, match="leave it out"):
        small_evaluation(curve=(1, 1000))
    assert not trained


def test_one_seed_gives_one_evaluation(whole: Evaluation, untouched_generator: None) -> None:
    again = small_evaluation()
    for one, two in zip(whole.rows, again.rows, strict=True):
        assert {**one, "seconds": 0} == {**two, "seconds": 0}
    assert (again.pilots, again.recipes) == (whole.pilots, whole.recipes)


def test_a_student_that_diverges_leaves_a_whole_record() -> None:
    found = small_evaluation(rates=(1e30,))
    record = json.dumps(found.record(), allow_nan=False)
    assert json.loads(record)["synthetic"]["auc"]["mean"] == 0.5


# --- what the test split may decide -------------------------------------------------------------


def test_the_test_split_decides_nothing(whole: Evaluation) -> None:
    spoiled = small_evaluation(splits=SPLITS._replace(test=poisoned(SPLITS.test)))
    assert spoiled.pilots == whole.pilots
    assert spoiled.recipes == whole.recipes
    assert [row["accuracy"] for row in spoiled.rows] != [row["accuracy"] for row in whole.rows]


def test_the_validation_split_decides_the_recipe(whole: Evaluation) -> None:
    swapped = dataclasses.replace(SPLITS.val, labels=1 - SPLITS.val.labels)
    spoiled = small_evaluation(splits=SPLITS._replace(val=swapped))
    assert whole.recipes["full"]["lr"] == 0.03
    assert spoiled.recipes["full"]["lr"] == 1e-5


def test_each_student_reads_the_test_split_once(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, read = arms.logits_of_set, []

    def counted(network: Any, real: RealSet) -> Any:
        read.append(real)
        return plain(network, real)

    monkeypatch.setattr(arms, "logits_of_set", counted)
    small_evaluation()
    names = [next(n for n, part in SPLITS._asdict().items() if part is real) for real in read]
    count, marks = 3, 4
    assert Counter(names) == {"val": count * len(RATES) * marks, "test": count * 2}


# --- arms ---------------------------------------------------------------------------------------


def test_random_images_differ_by_seed_and_not_by_the_synthetic_set() -> None:
    def drawn(made: SyntheticSet, seed: int) -> list[int]:
        images = random_arm(made, SPLITS).of_seed(seed)
        assert isinstance(images, RealImages)
        assert SPLITS.train.labels[images.index].tolist() == [0, 0, 1, 1]
        return images.index.tolist()

    one, two = chosen_set(seed=0), chosen_set(seed=1)
    other = dataclasses.replace(two, images=torch.rand(two.images.shape))
    draws = [drawn(one, seed) for seed in (-1, 0, 1, 2)]
    assert len({tuple(draw) for draw in draws}) == 4
    assert draws == [drawn(other, seed) for seed in (-1, 0, 1, 2)]
    own = Random().init(Task(SPLITS.train, Budget(ipc=2), SMALL), Rng(0))["index"].tolist()
    assert draws[1] != own


def test_the_full_arm_draws_all_images_with_classes_equally_often() -> None:
    keep = torch.cat([SPLITS.train.by_class[0], SPLITS.train.by_class[1][:7]])
    train = dataclasses.replace(
        SPLITS.train, images=SPLITS.train.images[keep], labels=SPLITS.train.labels[keep]
    )
    arm = full_arm(SPLITS._replace(train=train))
    images = arm.of_seed(0)
    assert isinstance(images, RealImages)
    assert arm.images == 37
    assert train.labels[images.index].bincount().tolist() == [30, 30]
    assert sorted(set(images.index.tolist())) == list(range(37))


def test_rows_of_one_arm_are_those_of_the_evaluation(whole: Evaluation) -> None:
    made = chosen_set()
    rows, recipe = arm_rows(
        synthetic_arm(made), SPLITS, made.recipe, SMALL, seeds=range(2), rates=RATES
    )
    mine = [row for row in whole.rows if row["arm"] == "synthetic"]
    assert [{**r, "seconds": 0} for r in rows] == [{**r, "seconds": 0} for r in mine]
    assert recipe == whole.recipes["synthetic"]
    rows, recipe = arm_rows(synthetic_arm(made), SPLITS, made.recipe, SMALL, seeds=[0], rates=())
    assert (recipe["lr"], recipe["stop"]) == (made.recipe.lr, made.recipe.stop)


def test_students_trained_at_once_are_those_trained_in_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Evaluation
) -> None:
    trained, plain = [], arms.fit_together

    def noted(networks: Any, *rest: Any, **named: Any) -> Any:
        trained.append(len(networks))
        return plain(networks, *rest, **named)

    assert not arms.pays_together(torch.device("cpu"))
    assert arms.pays_together(torch.device("cuda"))
    monkeypatch.setattr(arms, "fit_together", noted)
    monkeypatch.setattr(arms, "pays_together", lambda device: True)
    found = small_evaluation(cache=tmp_path)
    assert trained == [2, 2, 2]
    for one, other in zip(found.rows, whole.rows, strict=True):
        same = ("arm", "seed", "accuracy", "confusion", "lr", "stop")
        assert [one[name] for name in same] == [other[name] for name in same]
        assert one["auc"] == pytest.approx(other["auc"], abs=1e-6)
    small_evaluation(cache=tmp_path, seeds=range(4))
    assert trained[3:] == [2, 2, 2]  # those in the cache are not trained again
    batch_norm = dataclasses.replace(SMALL, norm="batch")
    small_evaluation(students=[batch_norm])
    assert len(trained) == 6


@pytest.mark.parametrize(("task", "chosen"), [("multi-label", 0.03), ("multi-class", 1e-5)])
def test_the_score_that_chooses_fits_the_task(
    task: str, chosen: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "phantom:n=60,size=16,classes=3,task=" + task
    splits = load(name)
    made = distill(Random(), Task(splits.train, Budget(images=6), SMALL), seed=0)
    base = dataclasses.replace(made.recipe, steps=16, stop=16)
    calls: list[None] = []

    def scored(*_: Any) -> dict[str, Any]:
        calls.append(None)
        second = len(calls) > 4  # four marks for each of two rates
        return {"accuracy": 0.5, "balanced_accuracy": 1.0 - second, "auc": 0.0 + second}

    monkeypatch.setattr(arms, "evaluate_task", scored)
    _, recipe = arm_rows(synthetic_arm(made), splits, base, SMALL, seeds=(), rates=RATES)
    assert recipe["lr"] == chosen


# --- the cache ----------------------------------------------------------------------------------


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the students that are trained, by the kind of their data."""
    plain, count = arms.fit, Counter[str]()

    def counted(network: Any, data: Any, *args: Any, **kwargs: Any) -> Any:
        count["synthetic" if isinstance(data, TensorImages) else "real"] += 1
        return plain(network, data, *args, **kwargs)

    monkeypatch.setattr(arms, "fit", counted)
    return count


def test_random_and_full_students_are_trained_once(
    tmp_path: Path, trained: Counter[str], whole: Evaluation
) -> None:
    each = len(RATES) + 2
    first = small_evaluation(cache=tmp_path)
    assert trained == {"synthetic": each, "real": 2 * each}
    trained.clear()
    again = small_evaluation(cache=tmp_path)
    assert not trained
    for one, two, plain in zip(first.rows, again.rows, whole.rows, strict=True):
        assert {**one, "seconds": 0} == {**two, "seconds": 0} == {**plain, "seconds": 0}
    assert (again.pilots, again.recipes) == (whole.pilots, whole.recipes)
    trained.clear()
    small_evaluation(cache=tmp_path, seeds=range(3))
    assert trained == {"synthetic": 1, "real": 2}
    trained.clear()
    small_evaluation(cache=tmp_path, synthetic=chosen_set(seed=1))
    assert trained == {"synthetic": each}


def test_tiles_are_for_synthetic_images_alone(tmp_path: Path, trained: Counter[str]) -> None:
    small_evaluation(cache=tmp_path)
    trained.clear()
    made = chosen_set()
    tiled = dataclasses.replace(made, recipe=dataclasses.replace(made.recipe, factor=2))
    found = small_evaluation(cache=tmp_path, synthetic=tiled)
    assert trained == {"synthetic": len(RATES) + 2}
    factors = {arm: recipe["factor"] for arm, recipe in found.recipes.items()}
    assert factors == {"synthetic": 2, "random": 1, "full": 1}
    assert (len(synthetic_arm(tiled).of_seed(0)), found.rows[0]["images"]) == (16, 4)


def changes_that_matter() -> dict[str, dict[str, Any]]:
    made = chosen_set()
    recipe = dataclasses.replace(made.recipe, momentum=0.5)
    card = dataclasses.replace(SPLITS.train.card, digest="another")
    origin = dataclasses.replace(made.origin, data_digest="another")
    return {
        "recipe": {"synthetic": dataclasses.replace(made, recipe=recipe)},
        # The same mean and std, as after a change of the test split alone.
        "data": {
            "splits": Splits(*(dataclasses.replace(part, card=card) for part in SPLITS)),
            "synthetic": dataclasses.replace(made, origin=origin),
        },
        "students": {"students": [ConvNet(depth=2, width=4)]},
    }


@pytest.mark.parametrize("what", ["recipe", "data", "students"])
def test_what_matters_is_part_of_the_key(what: str, tmp_path: Path, trained: Counter[str]) -> None:
    small_evaluation(cache=tmp_path, seeds=[0], rates=(0.01,))
    trained.clear()
    small_evaluation(cache=tmp_path, seeds=[0], rates=(0.01,), **changes_that_matter()[what])
    assert trained == {"synthetic": 2, "real": 4}


def test_the_number_of_images_is_part_of_the_key_of_random(
    tmp_path: Path, trained: Counter[str]
) -> None:
    small_evaluation(cache=tmp_path, seeds=[0], rates=(0.01,))
    trained.clear()
    small_evaluation(cache=tmp_path, seeds=[0], rates=(0.01,), synthetic=chosen_set(ipc=3))
    assert trained == {"synthetic": 2, "real": 2}


# --- refusals, and run folders --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("phantom:n=60,size=20,variation=1", "shape"),
        ("phantom:n=60,size=16,variation=1,channels=3", "channels"),
        ("phantom:n=60,size=16,variation=1,classes=3", "classes"),
    ],
)
def test_data_of_another_kind_is_refused(source: str, name: str) -> None:
    with pytest.raises(DataError, match=f"found {name} "):
        small_evaluation(splits=load(source))


def test_a_test_split_of_one_class_is_refused() -> None:
    one = SPLITS.test.by_class[0]
    test = dataclasses.replace(
        SPLITS.test, images=SPLITS.test.images[one], labels=SPLITS.test.labels[one]
    )
    with pytest.raises(DataError, match="found 1 class in the test split"):
        small_evaluation(splits=SPLITS._replace(test=test))


def test_a_run_folder_is_evaluated_where_it_lies(tmp_path: Path) -> None:
    chosen_set().save(tmp_path / "synthetic.safetensors")
    record = evaluate_run(tmp_path, SPLITS, seeds=[0], steps=8, command="medistill evaluate ...")
    assert json.loads((tmp_path / "evaluation.json").read_text()) == record
    assert record["command"] == "medistill evaluate ..."
    assert record["data"]["digest"] == SPLITS.train.card.digest
    assert record["students"] == ["convnet-2-8"]
    assert {recipe["steps"] for recipe in record["recipes"].values()} == {8}
    assert all(recipe["stop"] <= 8 for recipe in record["recipes"].values())


def test_a_folder_without_a_finished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found no"):
        evaluate_run(tmp_path, SPLITS, seeds=[0])
    (tmp_path / "synthetic.safetensors").write_bytes(b"not a set")
    with pytest.raises(DataError, match="is damaged"):
        evaluate_run(tmp_path, SPLITS, seeds=[0])
    assert not (tmp_path / "evaluation.json").exists()
