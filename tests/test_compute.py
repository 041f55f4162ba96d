"""The fast ways to compute against the plain one: blocks, bfloat16, compiled code."""

import dataclasses
import math
import shutil

import pytest
import torch

from medistill.augment import KINDS, Augmentation, Kind
from medistill.backbones import Backbone, ConvNet, ResNet18, to_spec
from medistill.backbones.convnet import Norm
from medistill.budget import Budget
from medistill.compute import (
    BLOCK,
    PLAIN,
    REPAYS_S,
    Compute,
    _compiled,
    find_device,
    full_block,
    worth_compiling,
)
from medistill.conformance import toy
from medistill.data import load
from medistill.errors import RunRefused, UsageError
from medistill.features import LEAST_MAPS, extract, extract_fast, fixed, of_set, read_size
from medistill.methods import DC, DM, Method, Task
from medistill.methods.base import recipe_of, started
from medistill.methods.dm import bank_entry, class_means, gap, real_means
from medistill.probes import SketchSpec, probe
from medistill.rng import Rng
from medistill.sets import RealSet
from medistill.train import RealImages, TensorImages, fit, gradient

REAL = load("phantom:n=120,size=16").train
COMPILED = Compute(compile=True)
META = torch.device("meta")  # holds no numbers, but refuses most mixtures of devices
compiler = pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler on this machine")


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the distance of two tensors relative to the size of the second."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def test_blocks_are_cut_and_filled_up_only_for_compiled_code() -> None:
    x, y = torch.arange(10 * BLOCK + 3), torch.arange(10 * BLOCK + 3) + 1
    plain = list(PLAIN.blocks(x, y))
    assert [len(a) for a, _ in plain] == [*[BLOCK] * 10, 3]
    assert torch.equal(torch.cat([b for _, b in plain]), y)
    filled = list(COMPILED.blocks(x, y))
    assert [len(a) for a, _ in filled] == [BLOCK] * 11
    assert torch.equal(torch.cat([a for a, _ in filled])[: len(x)], x)
    assert not filled[-1][1][3:].any()


@pytest.mark.parametrize(
    ("count", "sizes"),
    [
        (20, [20]),
        (BLOCK, [BLOCK]),
        (BLOCK + 1, [17, 17]),  # 34 rows in place of 64
        (50, [25, 25]),
        (2 * BLOCK - 3, [BLOCK, BLOCK]),  # 3 of 64 rows are empty: no reason to compile anew
        (70, [24] * 3),
        (100, [BLOCK] * 4),  # a short batch at an epoch's end compiles nothing anew
        (150, [BLOCK] * 5),
        (1000, [BLOCK] * 32),
        (0, []),
    ],
)
def test_compiled_blocks_are_even_where_filling_up_would_be_dear(
    count: int, sizes: list[int]
) -> None:
    x = torch.arange(count)
    found = list(COMPILED.blocks(x))
    assert [len(a) for (a,) in found if count] == sizes
    assert all(len(a) <= BLOCK for (a,) in found)
    assert torch.equal(torch.cat([x[:0], *(a for (a,) in found)])[:count], x)
    # What must not depend on how many images there are keeps its one size.
    assert {len(a) for (a,) in COMPILED.blocks(x, fill=True)} <= {BLOCK}


@pytest.mark.parametrize(
    ("shape", "cpu", "other"),
    [
        ((28, 28), 32, 1024),
        ((32, 32), 32, 1024),
        ((64, 64), 8, 256),
        ((224, 224), 1, 20),
        ((16, 16, 16), 8, 256),
    ],
)
def test_blocks_of_large_images_are_short(shape: tuple[int, ...], cpu: int, other: int) -> None:
    assert full_block(torch.zeros(1).expand(40, 3, *shape)) == cpu
    assert full_block(torch.empty((40, 3, *shape), device="meta")) == other


def test_few_images_make_one_block_of_their_own_number() -> None:
    assert [len(a) for (a,) in COMPILED.blocks(torch.ones(20))] == [20]
    assert [len(a) for (a,) in COMPILED.blocks(torch.ones(50), whole=True)] == [50]


@pytest.mark.parametrize("backbone", [ConvNet(2, 16), ConvNet(2, 16, norm="batch"), ResNet18(8)])
def test_bfloat16_features_lie_near_the_plain_ones(backbone: Backbone) -> None:
    network = backbone.build(REAL.card, Rng(0).at("network"))
    images = REAL.normalized(torch.arange(50))
    exact = extract(network.double(), images.double()).detach()
    network.float()
    found = extract_fast(network, images, Compute("bfloat16"))
    assert found.dtype == torch.float32
    assert apart(found, exact) < 0.04
    # Rounding is not biased: the mean over images, all that matching sees, lies nearer still.
    assert apart(found.mean(0), exact.mean(0)) < 0.02
    assert apart(extract_fast(network, images), exact) < 1e-5


def test_bfloat16_leaves_the_network_as_it_is() -> None:
    network = ConvNet(2, 16).build(REAL.card, Rng(0).at("network"))
    of_set(network, REAL, Compute("bfloat16"))
    assert {p.dtype for p in network.parameters()} == {torch.float32}


def test_norms_of_bfloat16_maps_are_summed_in_float32() -> None:
    network = ConvNet(1, 4).build(REAL.card, Rng(0).at("network"))
    norm = network.body[1].bfloat16()  # type: ignore[index]
    x = 30 + torch.randn(2, 4, 16, 16, generator=Rng(0).at("x"))
    x = x.bfloat16()
    expected = torch.nn.functional.instance_norm(x.double())
    # Sums in bfloat16 would leave nothing of a variance of 1 beside a mean of 30.
    assert (norm(x).double() - expected).abs().max() < 0.05


def test_a_bfloat16_gradient_points_where_the_plain_one_does() -> None:
    network = ConvNet(2, 16).build(REAL.card, Rng(0).at("network"))
    images, labels = REAL.normalized(torch.arange(90)), REAL.labels[:90]
    expected, loss = gradient(network, images, labels)
    found, found_loss = gradient(network, images, labels, Compute("bfloat16"))
    assert {p.dtype for p in (*network.parameters(), *found)} == {torch.float32}
    assert float(found_loss) == pytest.approx(float(loss), rel=0.01)
    flat = [torch.cat([g.flatten() for g in gradients]) for gradients in (found, expected)]
    assert not torch.equal(*flat)
    assert float(torch.cosine_similarity(*flat, dim=0)) > 0.98


@pytest.mark.parametrize("norm", ["batch", "layer", "group", "none"])
def test_every_norm_trains_in_bfloat16(norm: Norm) -> None:
    network = ConvNet(2, 8, norm=norm).build(REAL.card, Rng(0).at("network"))
    images, labels = REAL.normalized(torch.arange(40)), REAL.labels[:40]
    expected, _ = gradient(network, images, labels)
    found, _ = gradient(network, images, labels, Compute("bfloat16"))
    flat = [torch.cat([g.flatten() for g in gradients]) for gradients in (found, expected)]
    assert float(torch.cosine_similarity(*flat, dim=0)) > 0.95


def test_students_learn_in_bfloat16() -> None:
    losses = []
    real = load("phantom:n=120,size=16,variation=1").train
    task = Task(real, Budget(ipc=2), ConvNet(2, 8), Augmentation(kinds=()))
    recipe = dataclasses.replace(recipe_of(task), steps=80, stop=40, lr=0.03)
    for compute in (PLAIN, Compute("bfloat16")):
        network = task.network(Rng(0).at("network"))
        losses.append(fit(network, RealImages(real), recipe, Rng(0), compute=compute))
    assert losses[1] == pytest.approx(losses[0], abs=0.1)
    assert max(losses) < 0.5 < math.log(2)


@pytest.mark.slow
@compiler
@pytest.mark.timeout(300)
def test_compiled_gradient_equals_the_plain_one_though_blocks_are_filled_up() -> None:
    network = ConvNet(2, 8).build(REAL.card, Rng(0).at("network"))
    images, labels = REAL.normalized(torch.arange(BLOCK + 5)), REAL.labels[: BLOCK + 5]
    expected, loss = gradient(network, images, labels)
    found, found_loss = gradient(network, images, labels, COMPILED)
    assert float(found_loss) == pytest.approx(float(loss), rel=1e-5)
    for f, e in zip(found, expected, strict=True):
        assert torch.allclose(f, e, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@compiler
@pytest.mark.timeout(300)
@pytest.mark.parametrize("method", [DM(batch_real=40), DC(batch_real=40, inner_epochs=2)])
def test_a_compiled_step_equals_a_plain_one(method: Method) -> None:
    images = []
    for compute in (PLAIN, COMPILED):
        task = Task(toy(), Budget(ipc=2), ConvNet(1, 8), Augmentation(), compute)
        state = method.init(task, Rng(0))
        for _ in range(2):
            state, _ = method.step(state, task, Rng(0))
        images.append(state["images"])
    assert torch.allclose(*images, rtol=1e-4, atol=1e-5)
    assert not torch.equal(images[0], method.init(task, Rng(0))["images"])


def test_without_a_compiler_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    _compiled.cache_clear()
    with pytest.raises(UsageError, match="no C\\+\\+ compiler"):
        COMPILED.path(apart)


def test_the_real_set_moves_as_a_whole_and_its_positions_stay() -> None:
    positions = REAL.by_class
    real = REAL.to(META)
    assert all(map(torch.equal, real.by_class, positions))
    assert real.device == real.labels.device == real.normalized(torch.arange(3)).device == META
    assert REAL.device.type == "cpu"
    assert find_device("cpu").type == "cpu"


@pytest.mark.parametrize("n", [1, 6])
@pytest.mark.parametrize("kind", KINDS)
def test_augmentation_is_applied_where_the_images_lie(kind: Kind, n: int) -> None:
    augmentation = Augmentation(kinds=(kind,))
    draw = augmentation.draw(n, (16, 16), Rng(0).at("draw"))
    assert augmentation.apply(torch.empty(6, 3, 16, 16, device=META), draw).device == META


def test_all_of_a_step_lies_where_the_real_images_lie() -> None:
    assert len(REAL.by_class) == 2  # counted before the labels are gone
    task = Task(REAL.to(META), Budget(ipc=2), ConvNet(2, 8))
    state = started(task, "noise", Rng(0))
    assert {name: t.device.type for name, t in state.items() if name != "step"} == dict.fromkeys(
        ("images", "labels", "velocity"), "meta"
    )
    network = task.network(Rng(0).at("network"))
    draws = [Augmentation().draw(1, (16, 16), Rng(0).at(c)) for c in range(task.classes)]
    means = real_means(network, task, draws, 8, Rng(0))
    images = state["images"].requires_grad_()
    assert gap(class_means(network, images, state["labels"], task, draws), means).device == META
    for data in (RealImages(task.real), TensorImages(state["images"].detach(), state["labels"])):
        drawn = data.draw(torch.arange(3))
        gradients, loss = gradient(network, *drawn)
        assert {t.device for t in (*drawn, *gradients, loss)} == {META}


def test_a_set_larger_than_the_device_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.Tensor, "to", full)
    with pytest.raises(RunRefused, match="expected room for them on cuda: use --device cpu"):
        REAL.to(torch.device("cuda"))


def test_an_unknown_or_missing_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device("auto").type == "cpu"
    with pytest.raises(UsageError, match="no GPU"):
        find_device("cuda")
    with pytest.raises(UsageError, match="auto, cpu or cuda"):
        find_device("gpu")


def test_auto_compiles_what_is_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("medistill.compute.time.perf_counter", lambda: now[0])

    def unit() -> None:
        now[0] += 0.5

    assert worth_compiling("auto", unit, 2 * REPAYS_S + 1)
    assert not worth_compiling("auto", unit, 2 * REPAYS_S - 1)
    assert worth_compiling("on", unit, 0)
    assert not worth_compiling("off", unit, 1e9)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert not worth_compiling("auto", unit, 1e9)
    with pytest.raises(UsageError, match="auto, on or off"):
        worth_compiling("yes", unit, 1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "compute", [Compute(), pytest.param(Compute(compile=True), marks=pytest.mark.slow)]
)
def test_many_pixels_pass_twice_to_the_same_gradient(
    monkeypatch: pytest.MonkeyPatch, compute: Compute
) -> None:
    network = fixed(ConvNet(2, 8).build(REAL.card, Rng(0).at("network")))
    images = REAL.normalized(torch.arange(BLOCK + 3)).requires_grad_()
    passes: list[int] = []
    network.body[0].register_forward_hook(lambda *_: passes.append(1))
    found = []
    kept = images[:, 0].numel() * LEAST_MAPS
    for most, expected in ((kept, 2), (kept - 1, 2 + 4)):
        monkeypatch.setattr("medistill.features.KEPT", most)
        loss = extract(network, images, compute, levels=True).square().sum()
        found.append(torch.autograd.grad(loss, images)[0])
        if not compute.compile:
            assert len(passes) == expected
    assert torch.allclose(*found, atol=1e-5)


def test_networks_that_only_look_ask_for_no_gradient_of_their_own() -> None:
    task = Task(REAL, Budget(ipc=2), ConvNet(1, 4))
    spec = SketchSpec(to_spec(ConvNet(1, 4)), {"kinds": []}, networks=1, frequencies=4)
    for network in (
        bank_entry(task, 0)[0],
        probe(spec, REAL.card, 0, torch.ones(1), torch.device("cpu")).network,
    ):
        assert not any(p.requires_grad for p in network.parameters())
    assert bank_entry(task, 0)[0] is bank_entry(task, 0)[0]
    assert bank_entry(task, 0)[0] is not bank_entry(task, 1)[0]


def test_few_large_images_are_read_at_once() -> None:
    def of_shape(*shape: int) -> RealSet:
        card = dataclasses.replace(REAL.card, channels=shape[0], shape=shape[1:])
        empty = torch.empty(0, dtype=torch.int64)
        large = RealSet(torch.empty((0, *shape), dtype=torch.uint8), empty, card)
        object.__setattr__(large, "images", torch.zeros(1).expand(5000, *shape))
        return large

    assert read_size(of_shape(1, 28, 28)) == 1024
    assert read_size(of_shape(3, 224, 224)) == 55
    assert read_size(of_shape(1, 256, 256, 256)) == 1


@pytest.mark.parametrize("levels", [False, True], ids=["last", "all"])
def test_volumes_pass_in_bfloat16_too(levels: bool) -> None:
    card = dataclasses.replace(REAL.card, shape=(16, 16, 16))
    network = ConvNet(2, 8).build(card, Rng(0).at("network"))
    volumes = torch.randn(3, 1, 16, 16, 16, generator=Rng(0).at("volumes"))
    exact = extract_fast(network, volumes, levels=levels)
    rounded = extract_fast(network, volumes, Compute("bfloat16"), levels=levels)
    assert 0 < float((rounded - exact).abs().max()) < 0.05 * float(exact.abs().max())
    gradient(network, volumes, torch.tensor([0, 1, 0]), Compute("bfloat16"))
