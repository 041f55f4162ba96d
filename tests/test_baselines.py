"""Private baselines of benchmarks: what is compared with a private sketch keeps its own promise."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

from medistill.backbones import ConvNet
from medistill.budget import Budget
from medistill.data import load
from medistill.distill import distill
from medistill.methods import Task
from medistill.methods.random import Random


@pytest.fixture
def private(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("opacus")
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    module = importlib.import_module("private")
    monkeypatch.setattr(module, "STUDENT", ConvNet(width=8))
    return module


@pytest.mark.filterwarnings("ignore")
def test_dp_sgd_spends_what_it_was_given_and_noise_costs_accuracy(private: ModuleType) -> None:
    torch.manual_seed(0)  # Opacus draws from the global generator
    splits = load("phantom:n=1000,size=16,variation=0.8,classes=3")
    given = private.dp_sgd(splits, 8.0, 0)
    assert 7.9 < given["spent"] <= 8.0
    plain, noise = private.dp_sgd(splits, None, 0), private.dp_sgd(splits, 0.02, 0)
    assert noise["spent"] <= 0.02
    assert "spent" not in plain
    assert plain["auc"] > given["auc"] > 0.6 > noise["auc"]


def test_a_set_is_cut_to_its_first_images_of_each_class(private: ModuleType) -> None:
    splits = load("phantom:n=60,size=16,classes=3")
    made = distill(Random(), Task(splits.train, Budget(ipc=4), private.STUDENT), seed=0)
    cut = private.first_of_each(made, 2)
    assert cut.labels.argmax(1).tolist() == [0, 0, 1, 1, 2, 2]
    assert torch.equal(cut.images, made.images[[0, 1, 4, 5, 8, 9]])
