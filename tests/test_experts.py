"""Experts: resumed, grouped, cut short and shared, they are the same networks."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from medistill.augment import Augmentation
from medistill.backbones import ConvNet
from medistill.compute import Compute
from medistill.conformance import toy
from medistill.engine import Here, Processes
from medistill.errors import RunRefused
from medistill.experts import (
    MOST_HELD,
    Bank,
    Training,
    _Crew,
    _groups,
    experts,
    surrogate,
    train_experts,
    usable_epochs,
)
from medistill.optim import sgd_
from medistill.records import State, load_state, save_state
from medistill.rng import Rng
from medistill.sets import copied
from medistill.train import RealImages, batch_of, gradient
from medistill.unroll import flat, named, vector_of

REAL = toy(counts=(30, 20, 10))


def bank_of(folder: Path | None = None, **training: float) -> Bank:
    """Return a bank of the smallest networks, in batches that do not divide the images."""
    fields = {"batch": 16, "lr": 0.05, "patience": 0, "least_steps": 1, **training}
    kind = Training(**fields)  # type: ignore[arg-type]
    return Bank(REAL, ConvNet(depth=1, width=8), Augmentation(), Compute(), kind, folder)


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(tensor.nan_to_num(-1.0), other[name].nan_to_num(-1.0))
        if tensor.is_floating_point()
        else torch.equal(tensor, other[name])
        for name, tensor in one.items()
    )


def plain_expert(bank: Bank, number: int, epochs: int) -> list[Tensor]:
    """Train one expert by a plain loop; GSAM from its formulas, on one flat vector."""
    rng, training = Rng(0).child("expert", number), bank.training
    network = bank.backbone.build(bank.real.card, rng.at("network"))
    _, kept = bank.dealt
    data, found = RealImages(bank.real, kept), [vector_of(network)]
    per_epoch = max(-(-len(kept) // training.batch), training.least_steps)

    def slope(images: Tensor, labels: Tensor) -> Tensor:
        return flat([g.unsqueeze(0) for g in gradient(network, images, labels)[0]])[0]

    def put(vector: Tensor) -> None:
        network.load_state_dict(named(network, vector))

    for step in range(epochs * per_epoch):
        images, labels = batch_of(data, training.batch, bank.augmentation, step, rng)
        theta, g = vector_of(network), slope(images, labels)
        if training.sharpness:
            put(theta + training.sharpness * theta**2 * g / (theta.abs() * g).norm())
            h = slope(images, labels)
            g = h - training.ascent * (g - (g @ h) / (h @ h) * h)
        put(theta - training.lr * g)
        if (step + 1) % per_epoch == 0:
            found.append(vector_of(network))
    return found


@pytest.mark.parametrize(
    ("sharpness", "least"), [(0.0, 1), (0.1, 1), (0.0, 7)], ids=["sgd", "gsam", "few images"]
)
def test_an_expert_equals_a_plain_loop(sharpness: float, least: int) -> None:
    bank = bank_of(sharpness=sharpness, ascent=0.4, least_steps=least)
    kept = experts(bank, 2, 3, Here())
    for k in range(2):
        vectors = plain_expert(bank, k, 3)
        start, moves = kept[f"expert.{k}.start"], kept[f"expert.{k}.moves"]
        assert torch.equal(start, vectors[0])
        assert moves.dtype == torch.bfloat16
        for epoch, vector in enumerate(vectors[1:]):
            way = vector - vectors[0]
            # bfloat16 keeps eight bits of the way, not of the parameters.
            assert float((moves[epoch].float() - way).norm() / way.norm()) < 2**-8


def test_sharpness_changes_experts_and_their_folder_but_numbers_do_not(tmp_path: Path) -> None:
    few = experts(bank_of(tmp_path / "a"), 1, 2, Here())
    more = experts(bank_of(tmp_path / "a"), 3, 2, Here())
    assert torch.equal(few["expert.0.moves"], more["expert.0.moves"])
    assert not torch.equal(more["expert.0.moves"], more["expert.1.moves"])
    flat = experts(bank_of(sharpness=0.5), 1, 2, Here())
    assert not torch.equal(flat["expert.0.moves"], few["expert.0.moves"])


def test_surrogate_is_orthogonal_for_each_expert() -> None:
    g, h = torch.randn(2, 2, 3, 4, generator=Rng(0).at("g"))
    found = surrogate((g,), (h,), 1.0)[0]
    for own, here, there in zip(found, g, h, strict=True):
        rest = there - own
        assert float((rest * there).sum()) == pytest.approx(0, abs=1e-5)
        torch.testing.assert_close(here - rest, (here * there).sum() / (there**2).sum() * there)


def test_banks_go_on_where_they_were_and_are_read_where_they_are_whole(tmp_path: Path) -> None:
    whole = experts(bank_of(tmp_path / "whole"), 2, 4, Here())
    bank = bank_of(tmp_path / "parts")
    experts(bank, 1, 1, Here())
    experts(bank, 1, 3, Here())
    assert same(experts(bank, 2, 4, Here()), whole)
    assert same(experts(bank_of(), 2, 4, Here()), whole)
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").iterdir()}
    short = experts(bank, 1, 2, Here())
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").iterdir()} == stamps
    assert short["expert.0.moves"].shape[0] == 2
    assert torch.equal(short["accuracy"][0], whole["accuracy"][0, :3])


def test_several_at_once_equal_one_after_the_other() -> None:
    bank = bank_of(sharpness=0.05, ascent=0.3)
    alone = [train_experts((bank, [k], 2))[0] for k in range(3)]
    together = train_experts((bank, [0, 1, 2], 2))
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one["start"], other["start"])
        torch.testing.assert_close(one["last"], other["last"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one["loss"], other["loss"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one["accuracy"], other["accuracy"])


@pytest.mark.slow
def test_processes_give_the_same_bits(tmp_path: Path) -> None:
    here = experts(bank_of(tmp_path / "here"), 2, 2, Here())
    assert same(experts(bank_of(tmp_path / "there"), 2, 2, Processes(2)), here)
    assert same(experts(bank_of(), 2, 2, Processes(2)), here)


def test_usable_epochs_and_early_stops() -> None:
    loss = torch.tensor([3.0, 2.0, 1.0, 1.5, 1.2, 0.5])
    assert usable_epochs(loss, 0) == 5
    assert usable_epochs(loss, 2) == 2
    assert usable_epochs(loss, 3) == 5
    assert usable_epochs(loss[:4], 2) == 3
    patient = experts(bank_of(lr=2.0, patience=2), 1, 30, Here())
    length, usable = len(patient["expert.0.moves"]), int(patient["usable"][0])
    assert length < 30
    assert usable == length - 2
    assert bool(patient["accuracy"][0, length + 1 :].isnan().all())


def test_a_stopped_expert_is_whole_however_many_epochs_are_wanted(tmp_path: Path) -> None:
    bank = bank_of(tmp_path, lr=2.0, patience=2)
    first = experts(bank, 1, 30, Here())
    stamp = (tmp_path / "expert-0.safetensors").stat().st_mtime_ns
    again = experts(bank, 1, 40, Here())
    assert (tmp_path / "expert-0.safetensors").stat().st_mtime_ns == stamp
    assert torch.equal(first["expert.0.moves"], again["expert.0.moves"])


def test_images_held_out_are_of_every_class_and_train_no_expert() -> None:
    held, kept = bank_of().dealt
    assert sorted([*held.tolist(), *kept.tolist()]) == list(range(60))
    assert REAL.labels[held].bincount(minlength=3).tolist() == [3, 2, 1]
    nobody, everybody = bank_of(holdout=0.0).dealt
    assert len(everybody) == 60
    assert len(nobody) == min(60, MOST_HELD)
    grouped = replace(REAL, groups=torch.arange(60) // 2)
    held, kept = replace(bank_of(), real=grouped).dealt
    assert not set((held // 2).tolist()) & set((kept // 2).tolist())


def test_the_log_of_an_expert_is_its_accuracy_on_what_is_held_out() -> None:
    bank = bank_of()
    crew = _Crew(bank, [0])
    crew.train_epoch()
    state = crew.states()[0]
    held, _ = bank.dealt
    network = bank.backbone.build(REAL.card, Rng(0).at("any"))
    network.load_state_dict(named(network, state["last"]))
    right = network(REAL.normalized(held)).argmax(1) == REAL.labels[held]
    assert float(state["accuracy"][1]) == pytest.approx(float(right.float().mean()))


def test_the_size_is_told_and_refused_where_there_is_no_room(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = bank_of(tmp_path)
    experts(bank, 2, 3, Here())
    assert "experts: 2 of 3 epochs" in capsys.readouterr().err
    written = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert bank.size(2, 3) == pytest.approx(written, rel=0.35)
    full = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: full)
    with pytest.raises(RunRefused, match="free some, or ask for fewer"):
        experts(bank_of(tmp_path / "full"), 2, 3, Here())


def test_experts_that_run_away_are_refused_by_their_own_rate(tmp_path: Path) -> None:
    with pytest.raises(RunRefused, match="lower --lr-expert"):
        experts(bank_of(tmp_path, lr=1e30), 1, 3, Here())
    assert not list(tmp_path.glob("expert-*"))


def test_where_nothing_can_be_held_out_all_are_trained_on_and_looked_at() -> None:
    few = replace(bank_of(patience=2), real=toy(counts=(2, 2, 2)))
    held, kept = few.dealt
    assert held.tolist() == kept.tolist() == list(range(6))
    assert few.patience == 0
    assert bank_of(patience=2).patience == 2
    found = experts(few, 1, 6, Here())
    assert found["accuracy"].isfinite().all()
    assert found["usable"].tolist() == [6]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunRefused, match="XDG_CACHE_HOME"):
        experts(bank_of(tmp_path / "file" / "bank"), 1, 1, Here())


def test_a_longer_file_of_another_process_is_kept_and_a_shorter_one_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = bank_of(tmp_path)
    slow = _Crew(bank, [0])
    slow.train_epoch()
    experts(bank, 1, 3, Here())
    stamp = (tmp_path / "expert-0.safetensors").stat().st_mtime_ns
    slow.save()
    assert (tmp_path / "expert-0.safetensors").stat().st_mtime_ns == stamp

    def overwritten(crew: _Crew) -> None:
        save_state(tmp_path / "expert-0.safetensors", {}, {"epochs": 1, "stopped": False})

    monkeypatch.setattr(_Crew, "save", overwritten)
    with pytest.raises(RunRefused, match="no other process writes there"):
        experts(bank, 1, 5, Here())


def test_large_batches_train_alone_on_a_gpu() -> None:
    """Eight batches of 256 large images would fill any memory; the lone way goes in blocks."""
    bank = bank_of(batch=256)
    assert _groups(bank, [0, 1, 2]) == [[0], [1], [2]]
    meta = replace(bank, real=bank.real.to(torch.device("meta")))
    assert _groups(meta, list(range(10))) == [list(range(8)), [8, 9]]
    large = replace(REAL.card, shape=(128, 128))
    wide = replace(meta, real=copied(meta.real, card=large))
    assert _groups(wide, [0, 1]) == [[0], [1]]


KILLED = """
import sys, torch
from pathlib import Path
torch.set_num_threads(1)
import medistill.experts as e
from test_experts import bank_of
e.SAVE_EVERY_S = 0.0
print("begun", flush=True)
e.experts(bank_of(Path(sys.argv[1])), 3, 12, e.Here())
"""


@pytest.mark.slow
def test_killed_at_random_moments_the_bank_is_the_same(tmp_path: Path) -> None:
    whole = experts(bank_of(tmp_path / "whole"), 3, 12, Here())
    moments = random.Random(time.time_ns())
    killed, folder = 0, tmp_path / "killed"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    for _ in range(4):
        words = [sys.executable, "-c", KILLED, str(folder)]
        with subprocess.Popen(words, stdout=subprocess.PIPE, env=environment) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(moments.uniform(0.02, 0.4))
            process.send_signal(signal.SIGKILL)
            killed += process.wait() == -signal.SIGKILL
    assert killed
    assert same(experts(bank_of(folder), 3, 12, Here()), whole)
    left = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    assert left == {f"expert-{k}.safetensors" for k in range(3)}
    for path in folder.glob("expert-*"):
        assert load_state(path)[1]["epochs"] == 12


def test_plain_sgd_needs_no_velocity() -> None:
    parameter = [torch.ones(2)]
    sgd_(parameter, [torch.ones(2)], (), lr=0.5)
    assert parameter[0].tolist() == [0.5, 0.5]
