"""The ground floor: errors, random streams, records, SGD, progress and the central types."""

import dataclasses
import errno
import fcntl
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medistill import errors, pixels, progress, records, rng, sets
from medistill.budget import Budget
from medistill.errors import DataError, MedistillError, RunRefused, UsageError
from medistill.optim import sgd_
from medistill.pixels import mosaic_of, tiles_of
from medistill.sets import (
    Card,
    Origin,
    RealSet,
    Recipe,
    Splits,
    SyntheticSet,
)


def card(channels: int = 1, shape: tuple[int, ...] = (4, 5), **more: object) -> Card:
    """Return a card of two classes."""
    return dataclasses.replace(Card("toy", "binary", ("no", "yes"), channels, shape), **more)


def real(n: int, seed: int = 0, channels: int = 1, shape: tuple[int, ...] = (4, 5)) -> RealSet:
    """Return `n` images of noise whose classes alternate."""
    draw = rng.Rng(seed).at("images")
    images = torch.randint(0, 256, (n, channels, *shape), dtype=torch.uint8, generator=draw)
    return RealSet(images, torch.arange(n) % 2, card(channels, shape))


RECIPE = Recipe((0.25,), (0.5,), {"name": "convnet", "width": 8}, {"flip": True}, lr=0.02)
ORIGIN = Origin("dm", {"steps": 3, "lr_images": 0.1}, 7, "noise", False, "abc", "0.1.0")


# errors


def test_exit_codes_are_those_of_the_command_line() -> None:
    codes = {kind.__name__: kind.exit_code for kind in MedistillError.__subclasses__()}
    assert codes == {"UsageError": 2, "DataError": 3, "PackageRefused": 4, "RunRefused": 5}
    assert MedistillError.exit_code == 1


def test_nearest_names_all_when_none_is_near() -> None:
    assert errors.nearest("xyz", ["dm", "dc"]) == "known: dc, dm"
    assert errors.nearest("dsaa", ["dm", "dsa"]) == "did you mean dsa?"


# rng


def test_a_stream_depends_on_its_name_and_not_on_history(untouched_generator: None) -> None:
    streams = rng.Rng(5)
    fresh = torch.rand(3, generator=streams.at("student", 2))
    other = streams.at("student", 1)
    for _ in range(10):
        torch.rand(3, generator=other)
    assert torch.equal(torch.rand(3, generator=streams.at("student", 2)), fresh)
    assert torch.equal(torch.rand(3, generator=streams.child("student").at(2)), fresh)
    assert streams.child("a").child("b", 1).integer(2) == streams.integer("a", "b", 1, 2)


def test_a_stream_ignores_the_global_generator(untouched_generator: None) -> None:
    fresh = torch.rand(3, generator=rng.Rng(5).at("a"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        assert torch.equal(torch.rand(3, generator=rng.Rng(5).at("a")), fresh)


def test_names_seeds_and_types_make_different_streams() -> None:
    family = rng.Rng(0)
    names = [("a",), ("b",), ("a", "b"), ("ab",), ("1",), (1,), (1, 1), (11,), ()]
    numbers = {family.integer(*name) for name in names} | {rng.Rng(1).integer("a")}
    assert len(numbers) == len(names) + 1
    assert all(0 <= number < 2**63 for number in numbers)


def test_streams_are_the_same_in_every_version() -> None:
    # SHA-256 of "(0, 'student', 3)", first eight bytes, halved: a change moves every number.
    assert rng.Rng(0).integer("student", 3) == 2885574485919582330


# optim


@settings(max_examples=25, deadline=None)
@given(
    lr=st.floats(1e-3, 1.0),
    momentum=st.sampled_from([0.0, 0.5, 0.9]),
    weight_decay=st.sampled_from([0.0, 5e-4, 0.1]),
)
def test_sgd_is_that_of_torch(lr: float, momentum: float, weight_decay: float) -> None:
    draw = rng.Rng(1).at("sgd")
    start = [torch.randn(2, 3, generator=draw), torch.randn(4, generator=draw)]
    ours, theirs = [p.clone() for p in start], [p.clone() for p in start]
    velocity = [torch.zeros_like(p) for p in start]
    optimizer = torch.optim.SGD(theirs, lr=lr, momentum=momentum, weight_decay=weight_decay)
    for _ in range(5):
        gradients = [torch.randn(p.shape, generator=draw) for p in start]
        kept = [g.clone() for g in gradients]
        sgd_(ours, gradients, velocity, lr=lr, momentum=momentum, weight_decay=weight_decay)
        assert all(map(torch.equal, gradients, kept)), "the gradients were changed"
        for parameter, gradient in zip(theirs, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other)


def test_sgd_twice_by_hand() -> None:
    # v1 = 2 + .1 * 1 = 2.1, p1 = 1 - .5 * 2.1 = -.05
    # v2 = .9 * 2.1 + 3 + .1 * -.05 = 4.885, p2 = -.05 - .5 * 4.885 = -2.4925
    p, v = [torch.tensor([1.0])], [torch.tensor([0.0])]
    for gradient, value, speed in ((2.0, -0.05, 2.1), (3.0, -2.4925, 4.885)):
        sgd_(p, [torch.tensor([gradient])], v, lr=0.5, momentum=0.9, weight_decay=0.1)
        assert (p[0].item(), v[0].item()) == pytest.approx((value, speed))


# records


@pytest.mark.parametrize("value", [RECIPE, ORIGIN, card(flips=False), Budget(bytes=640)])
def test_records_survive_json(value: object) -> None:
    assert records.from_record(type(value), records.to_record(value)) == value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"momentun": 0.5}, "Recipe has no field 'momentun': did you mean momentum?"),
        ({"steps": "many"}, "Recipe: steps is 'many'; input should be a valid integer"),
        ({"steps": 1.5}, "Recipe: steps is 1.5; input should be a valid integer"),
        ({"optimizer": "adam"}, "Recipe: optimizer is 'adam'; input should be 'sgd'"),
        ({"mean": [0.1, "x"]}, "Recipe: mean.1 is 'x'; input should be a valid number"),
    ],
)
def test_wrong_records_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        records.from_record(Recipe, records.to_record(RECIPE) | change)
    assert str(caught.value) == message


def test_a_missing_field_is_named() -> None:
    record = records.to_record(RECIPE)
    del record["mean"]
    with pytest.raises(UsageError, match="mean"):
        records.from_record(Recipe, record)


def test_digests_ignore_the_order_of_keys_and_nothing_else() -> None:
    assert records.canonical({"b": "ü", "a": [1, 2]}) == '{"a":[1,2],"b":"ü"}'.encode()
    assert records.digest({"b": 1, "a": 2}) == records.digest({"a": 2, "b": 1})
    assert records.digest({"a": [1, 2]}) != records.digest({"a": [2, 1]})


def test_state_digest_sees_names_types_shapes_and_values() -> None:
    base = {"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(2)}
    others = [
        {"c": base["a"], "b": base["b"]},
        {"a": base["a"].view(3, 2), "b": base["b"]},
        {"a": base["a"].view(torch.int32), "b": base["b"]},
        {"a": base["a"] + 1, "b": base["b"]},
        {"a": base["a"]},
    ]
    digests = {records.state_digest(state) for state in [base, *others]}
    assert len(digests) == len(others) + 1
    turned = {"b": base["b"], "a": base["a"].t().contiguous().t()}
    assert records.state_digest(turned) == records.state_digest(base)


def test_the_umask_says_who_may_read_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for umask, mode in ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)):
        monkeypatch.setattr(records, "UMASK", umask)
        records.write_atomic(tmp_path / "a", b"x")
        assert (tmp_path / "a").stat().st_mode & 0o777 == mode
    records.write_atomic(tmp_path / "a", b"x", mode=0o640)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_a_lock_of_another_user_is_held_by_reading_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "seen.lock").touch()

    def anothers(path: Path, mode: str = "r", **how: Any) -> Any:
        if mode != "r":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return open(path, mode, **how)

    monkeypatch.setattr(records, "open", anothers, raising=False)
    with (
        records.locked(tmp_path / "seen.json"),
        open(tmp_path / "seen.lock") as other,
        pytest.raises(BlockingIOError),
    ):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with (
        pytest.raises(RunRefused, match="could not write beside"),
        records.locked(tmp_path / "none.json"),
    ):
        pass


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.json"
    records.write_atomic(path, b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(RunRefused, match="the disk is full") as caught:
        records.write_atomic(path, b"new")
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["state.json"]


def test_an_interrupt_while_writing_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.json"
    records.write_atomic(path, b"old")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        records.write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["state.json"]


def test_a_folder_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file, not a folder")
    with pytest.raises(RunRefused, match="choose another folder"):
        records.write_atomic(tmp_path / "taken" / "run.json", b"{}")


def test_json_files_round_trip_and_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "new" / "run.json"
    records.write_json(path, {"score": 0.5, "name": "ü"})
    assert records.read_json(path) == {"score": 0.5, "name": "ü"}
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DataError, match="not readable JSON"):
        records.read_json(path)
    with pytest.raises(DataError, match="found no"):
        records.read_json(tmp_path / "none.json")


def test_a_damaged_record_of_a_cache_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    assert records.kept(path, lambda: {"x": 1}) == {"x": 1}
    assert records.kept(path, lambda: {"x": 2}) == {"x": 1}
    path.write_text('{"x"')
    assert records.kept(path, lambda: {"x": 3}) == {"x": 3}
    assert records.read_json(path) == {"x": 3}


def test_states_are_saved_byte_for_byte_alike(tmp_path: Path) -> None:
    state = {"images": torch.rand(3, 2, generator=rng.Rng(0).at("x")), "step": torch.tensor(4)}
    header = {"format": "toy", "settings": {"b": 1, "a": 2}}
    turned = {"step": state["step"], "images": state["images"]}
    again = {"settings": {"a": 2, "b": 1}, "format": "toy"}
    records.save_state(tmp_path / "a", state, header)
    records.save_state(tmp_path / "b", turned, again)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    loaded, read = records.load_state(tmp_path / "a")
    assert read == header
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


@pytest.mark.parametrize("damage", ["cut", "header", "foreign", "empty", "missing", "number"])
def test_damaged_states_are_refused(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "state"
    records.save_state(path, {"x": torch.ones(8)}, {"format": "toy"})
    whole = path.read_bytes()
    content = {
        "cut": whole[:-3],
        "header": whole[:8] + b"}" + whole[9:],
        "foreign": whole.replace(b'"medistill"', b'"elsewhere"'),
        "empty": b"",
        "number": whole[:-1] + bytes([whole[-1] ^ 1]),
    }
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[damage])
    with pytest.raises(DataError) as caught:
        records.load_state(path)
    assert "\n" not in str(caught.value)


# progress


def test_progress_writes_lines_to_stderr_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    with progress.progress("steps", 4, done=1) as advance:
        advance()
        advance(2, note="loss 0.5")
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert [line.split()[:2] for line in lines] == [["steps", "2/4"], ["steps", "4/4"]]
    assert lines[1].endswith("0 s left loss 0.5")


def test_quiet_progress_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.progress("steps", 2, quiet=True) as advance:
        advance(2, note="done")
    assert capsys.readouterr() == ("", "")


# sets


@pytest.mark.parametrize(
    "words",
    [
        {},
        {"ipc": 1, "images": 2},
        {"ipc": 0},
        {"images": -1},
        {"bytes": 0},
        {"ipc": 1, "share": "all"},
        {"ipc": 1, "small": "none"},
    ],
)
def test_a_budget_is_exactly_one_number_above_zero(words: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="expected"):
        Budget(**words)


@pytest.mark.parametrize(
    ("budget", "counts"),
    [
        (Budget(ipc=10), (10, 10)),
        (Budget(images=7), (4, 3)),
        (Budget(bytes=60 * 9), (5, 4)),  # an image is 3 x 4 x 5 = 60 bytes
        (Budget(bytes=60 * 2), (1, 1)),
        (Budget(images=10, share="proportional"), (1, 9)),  # of 100 and 1500: 0.6 and 9.4
        (Budget(images=16, share="proportional"), (1, 15)),
        (Budget(ipc=10, share="sqrt"), (4, 16)),  # 10 and 38.7: 4.1 and 15.9
        (Budget(images=301), (151, 150)),
        (Budget(ipc=101, small="whole"), (100, 101)),
        (Budget(images=1602, share="proportional", small="whole"), (100, 1500)),
    ],
)
def test_a_budget_is_dealt_to_the_classes(budget: Budget, counts: tuple[int, ...]) -> None:
    present = [200 if budget.images == 301 else 100, 1500]
    assert budget.counts(card(channels=3), present) == counts


def test_a_class_below_its_share_is_refused_unless_taken_whole() -> None:
    with pytest.raises(RunRefused, match="found 3 training images of class 'no'"):
        Budget(ipc=4).counts(card(), [3, 9])
    assert Budget(ipc=4, small="whole").counts(card(), [3, 9]) == (3, 4)


@given(
    st.lists(st.integers(1, 5000), min_size=1, max_size=9),
    st.integers(0, 400),
    st.sampled_from(["equal", "proportional", "sqrt"]),
)
def test_shares_sum_to_the_budget_and_are_near_the_exact_ones(
    present: list[int], more: int, share: Literal["equal", "proportional", "sqrt"]
) -> None:
    kind = dataclasses.replace(card(), classes=tuple(map(str, range(len(present)))))
    total = len(present) + more
    counts = Budget(images=total, share=share, small="whole").counts(kind, [10**9] * len(present))
    assert sum(counts) == total
    counts = Budget(images=total, share=share).counts(kind, [n * 10**6 for n in present])
    assert sum(counts) == total
    assert min(counts) >= 1
    power = {"equal": 0.0, "proportional": 1.0, "sqrt": 0.5}[share]
    exact = [total * n**power / sum(m**power for m in present) for n in present]
    if min(exact) >= 1:
        assert all(abs(a - b) < 1 for a, b in zip(counts, exact, strict=True))


def test_what_small_classes_take_is_given_by_those_that_have_most_too_much() -> None:
    # 0.1, 0.1, 0.1, 4 and 5.7 of 10: three take 1, so 4 and then 5 (of 5.7) give one each.
    kind = dataclasses.replace(card(), classes=tuple("abcde"))
    budget = Budget(images=10, share="proportional", small="whole")
    assert budget.counts(kind, [100, 100, 100, 4000, 5700]) == (1, 1, 1, 3, 4)


def test_multi_label_images_have_no_share() -> None:
    several = dataclasses.replace(card(), task="multi-label")
    assert Budget(images=1).total(several) == 1
    assert Budget(ipc=4).total(several) == 8


@pytest.mark.parametrize("budget", [Budget(images=1), Budget(bytes=119)])
def test_a_budget_below_one_image_per_class_is_refused(budget: Budget) -> None:
    with pytest.raises(RunRefused, match="at least one image per class"):
        budget.counts(card(channels=3), [9, 9])


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (torch.zeros(2, 1, 4, 5), torch.tensor([0, 1])),
        (torch.zeros(2, 3, 4, 5, dtype=torch.uint8), torch.tensor([0, 1])),
        (torch.zeros(2, 1, 5, 4, dtype=torch.uint8), torch.tensor([0, 1])),
        (torch.zeros(2, 1, 4, 5, dtype=torch.uint8), torch.tensor([0])),
        (torch.zeros(2, 1, 4, 5, dtype=torch.uint8), torch.tensor([0, 2])),
        (torch.zeros(2, 1, 4, 5, dtype=torch.uint8), torch.tensor([-1, 1])),
    ],
    ids=["type", "channels", "shape", "count", "high label", "low label"],
)
def test_sets_that_do_not_fit_their_card_are_refused(images: Tensor, labels: Tensor) -> None:
    with pytest.raises(DataError, match=r"toy: found .*; expected "):
        RealSet(images, labels, card())


def test_labels_of_multi_label_tasks_are_zero_or_one() -> None:
    several = card(task="multi-label", classes=("a", "b", "c"))
    images = torch.zeros(2, 1, 4, 5, dtype=torch.uint8)
    assert len(RealSet(images, torch.tensor([[0, 1, 1], [0, 0, 0]]), several)) == 2
    with pytest.raises(DataError, match="expected 0 to 1"):
        RealSet(images, torch.tensor([[0, 1, 2], [0, 0, 0]]), several)


def test_positions_by_class_and_digest() -> None:
    data = real(5)
    assert [rows.tolist() for rows in data.by_class] == [[0, 2, 4], [1, 3]]
    changed = data.images.clone()
    changed[0, 0, 0, 0] ^= 1
    others = [
        RealSet(changed, data.labels, data.card),
        RealSet(data.images, 1 - data.labels, data.card),
        RealSet(data.images.view(5, 1, 5, 4), data.labels, card(shape=(5, 4))),
    ]
    assert len({data.digest, *(other.digest for other in others)}) == 4
    assert real(5).digest == data.digest


@pytest.mark.parametrize("shape", [(4, 5), (2, 4, 5)])
def test_normalize_and_denormalize_are_inverse(shape: tuple[int, ...]) -> None:
    images = torch.rand(3, 2, *shape, generator=rng.Rng(0).at("x"))
    mean, std = (0.1, 0.6), (0.5, 0.2)
    there = sets.normalize(images.clone(), mean, std)
    torch.testing.assert_close(there[:, 1], (images[:, 1] - 0.6) / 0.2)
    torch.testing.assert_close(pixels.denormalize(there, mean, std), images)


def test_normalized_images_leave_the_stored_ones_alone() -> None:
    data = real(4, channels=2)
    data = dataclasses.replace(data, card=card(2, mean=(0.5, 0.25), std=(0.5, 2.0)))
    kept = data.images.clone()
    seen = data.normalized(torch.tensor([3, 1]))
    torch.testing.assert_close(seen[0, 1], (kept[3, 1] / 255 - 0.25) / 2.0)
    assert torch.equal(data.images, kept)


@pytest.mark.parametrize("shape", [(4, 5), (2, 4, 5)])
def test_statistics_are_those_of_numpy_on_the_training_split(shape: tuple[int, ...]) -> None:
    # More images than one block holds, so that the sums cross its border.
    splits = Splits(*(real(n, n, 2, shape) for n in (1030, 6, 4)))
    filled = sets.with_statistics(splits)
    channels = splits.train.images.numpy().swapaxes(0, 1).reshape(2, -1) / np.float64(255)
    for part in filled:
        assert part.card.mean == pytest.approx(channels.mean(1), abs=1e-12)
        assert part.card.std == pytest.approx(channels.std(1), abs=1e-9)
        assert part.card.digest == filled.train.card.digest != ""
    assert splits.train.card.mean == ()


def test_a_channel_without_contrast_gets_std_one() -> None:
    flat = RealSet(torch.full((4, 1, 4, 5), 51, dtype=torch.uint8), torch.arange(4) % 2, card())
    filled = sets.with_statistics(Splits(flat, flat, flat)).train
    assert filled.card.std == (1.0,)
    assert filled.normalized(torch.arange(4)).abs().max() < 1e-6


def test_the_digest_of_splits_sees_the_test_split() -> None:
    first, second = (
        sets.with_statistics(Splits(real(6), real(4, 1), real(4, seed))).train.card.digest
        for seed in (2, 3)
    )
    assert first != second


def test_synthetic_sets_round_trip(tmp_path: Path) -> None:
    images = torch.rand(4, 1, 4, 5, generator=rng.Rng(0).at("x"))
    whole = SyntheticSet(images, torch.eye(2).repeat(2, 1), RECIPE, ORIGIN, card(mean=(0.25,)))
    whole.save(tmp_path / "synthetic.safetensors")
    back = SyntheticSet.load(tmp_path / "synthetic.safetensors")
    assert torch.equal(back.images, whole.images)
    assert torch.equal(back.labels, whole.labels)
    assert (back.recipe, back.origin, back.card) == (whole.recipe, whole.origin, whole.card)
    torch.testing.assert_close(back.normalized(), (images - 0.25) / 0.5)
    assert torch.equal(back.images, images), "normalized() changed the set"
    assert len(back) == 4


@pytest.mark.parametrize("header", [{"format": "other"}, {"format": "medistill synthetic 1"}])
def test_files_that_hold_no_synthetic_set_are_refused(
    header: dict[str, str], tmp_path: Path
) -> None:
    records.save_state(tmp_path / "x", {"weights": torch.ones(2)}, header)
    with pytest.raises(DataError, match="holds no synthetic set"):
        SyntheticSet.load(tmp_path / "x")


@pytest.mark.parametrize(
    "change",
    [
        {"images": torch.full((4, 1, 4, 5), float("nan"))},
        {"images": torch.ones(4, 1, 4, 5, dtype=torch.int64)},
        {"images": torch.ones(4, 1, 5, 5)},
        {"images": torch.ones(0, 1, 4, 5), "labels": torch.ones(0, 2)},
        {"labels": torch.ones(20, 2)},
        {"labels": torch.ones(4)},
        {"labels": torch.full((4, 2), -1.0)},
        {"labels": torch.full((4, 2), float("nan"))},
        {"recipe": {"mean": [0.1, 0.2, 0.3]}},
        {"recipe": {"std": [0.0]}},
        {"recipe": {"lr": "a"}},
        {"recipe": None},
    ],
    ids=str,
)
def test_sets_that_no_method_makes_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "synthetic.safetensors"
    whole = SyntheticSet(torch.ones(4, 1, 4, 5), torch.eye(2).repeat(2, 1), RECIPE, ORIGIN, card())
    whole.save(path)
    state, header = records.load_state(path)
    wrong = change.pop("recipe", {})
    header["recipe"] |= wrong or {}
    if wrong is None:
        del header["recipe"]
    records.save_state(path, {**state, **change}, header)
    with pytest.raises(DataError) as caught:
        SyntheticSet.load(path)
    assert "\n" not in str(caught.value)


def test_tiles_are_cut_in_rows_and_enlarged_by_hand() -> None:
    image = torch.arange(16.0).view(1, 1, 4, 4)
    found = tiles_of(image, 2)
    assert found.shape == (4, 1, 4, 4)
    # Pixel centers of 4 lie at -1/4, 1/4, 3/4, 5/4 of 2: the outer ones are held, the rest mixed.
    line = torch.tensor([0.0, 0.25, 0.75, 1.0])
    for number, first in enumerate((0.0, 2.0, 8.0, 10.0)):
        assert torch.allclose(found[number, 0], first + 4 * line[:, None] + line)
    uneven = tiles_of(torch.arange(35.0).view(1, 1, 5, 7), 2)
    assert uneven[:, 0, 0, 0].tolist() == [0.0, 4.0, 21.0, 25.0]
    assert tiles_of(image, 1) is image


def test_mosaics_hold_averages_and_their_tiles_are_the_images_again() -> None:
    images = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 2, 6, 5)
    mosaics = mosaic_of(images.contiguous(), 2)
    assert mosaics.shape == (2, 2, 6, 5)
    assert mosaics[1, 0, 0].tolist() == [4.0, 4.0, 4.0, 5.0, 5.0]
    assert torch.allclose(tiles_of(mosaics, 2), images)
    ramp = torch.arange(16.0).view(1, 1, 4, 4).repeat(4, 1, 1, 1)
    assert mosaic_of(ramp, 2)[0, 0, :2, :2].tolist() == [[2.5, 4.5], [10.5, 12.5]]
    volumes = torch.rand((8, 1, 4, 4, 4), generator=torch.Generator().manual_seed(0))
    assert tiles_of(mosaic_of(volumes, 2), 2).shape == volumes.shape


def test_a_set_of_tiles_trains_on_each_with_the_label_of_its_image() -> None:
    recipe = dataclasses.replace(RECIPE, mean=(0.5,), factor=2)
    images = torch.tensor([0.5, 1.0]).view(2, 1, 1, 1).expand(2, 1, 4, 4)
    labels = torch.eye(2)
    made = SyntheticSet(images, labels, recipe, ORIGIN, card(shape=(4, 4)))
    found, own = made.to_train()
    assert found[:, 0, 0, 0].tolist() == [0.0] * 4 + [1.0] * 4
    assert own.argmax(1).tolist() == [0] * 4 + [1] * 4
    for factor in (0, 5):
        wrong = dataclasses.replace(made, recipe=dataclasses.replace(recipe, factor=factor))
        with pytest.raises(DataError, match=f"found factor {factor}"):
            wrong.to_train()
