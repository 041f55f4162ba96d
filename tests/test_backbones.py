"""Backbones: the fast norm against torch's, sizes, plain twins, and fresh numbers on demand."""

import dataclasses
import sys
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medistill.backbones import (
    MLP,
    Backbone,
    ConvNet,
    Network,
    ResNet18,
    backbone,
    from_spec,
    level_sizes,
    levels_of,
    to_spec,
)
from medistill.backbones.convnet import InstanceNorm
from medistill.backbones.convolution import to_images
from medistill.compute import BLOCK, Compute
from medistill.errors import UsageError
from medistill.features import extract, fixed
from medistill.rng import Rng
from medistill.sets import Card
from medistill.train import gradient

SMALL = (
    ConvNet(depth=2, width=8),
    ConvNet(depth=1, width=8, norm="batch"),
    ConvNet(depth=1, width=8, norm="group", activation="gelu", pooling="max"),
    ConvNet(depth=1, width=8, norm="layer", activation="leaky_relu", pooling="none"),
    ConvNet(depth=1, width=8, norm="none", activation="sigmoid"),
    MLP(width=8),
    ResNet18(width=2),
)
each_small = pytest.mark.parametrize("spec", SMALL, ids=lambda spec: repr(spec))


def card(channels: int = 3, shape: tuple[int, ...] = (16, 16), classes: int = 4) -> Card:
    """Return a card of that many channels, pixels and classes."""
    names = tuple(f"class {c}" for c in range(classes))
    return Card("toy", "multi-class", names, channels, shape)


def noise(*shape: int, name: str = "noise") -> Tensor:
    """Return N(0, 1) numbers."""
    return torch.randn(shape, generator=Rng(0).at(name))


def built(spec: Backbone, seed: int = 0, **facts: object) -> Network:
    """Return a network for a toy card."""
    return spec.build(card(**facts), Rng(seed).at("network"))  # type: ignore[arg-type]


# Instance normalization


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("shape", [(5, 6), (3, 4, 5)], ids=["2d", "3d"])
def test_instance_norm_equals_group_norm_to_the_second_derivative(
    shape: tuple[int, ...], last: bool
) -> None:
    ours, theirs = InstanceNorm(7).double(), nn.GroupNorm(7, 7).double()
    with torch.no_grad():
        for parameter in ("weight", "bias"):
            getattr(ours, parameter).copy_(noise(7, name=parameter))
            getattr(theirs, parameter).copy_(noise(7, name=parameter))
    x = 3 + 2 * noise(4, 7, *shape).double()
    if last:
        three = len(shape) == 3
        x = x.to(memory_format=torch.channels_last_3d if three else torch.channels_last)
    results = []
    for norm in (ours, theirs):
        leaf = x.clone().requires_grad_()
        wanted = (leaf, norm.weight, norm.bias)
        out = norm(leaf)
        first = torch.autograd.grad(out.sin().sum(), wanted, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), wanted)
        results.append((out, *first, *second))
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-9)


def test_instance_norm_of_a_constant_channel_is_its_shift() -> None:
    x = torch.full((2, 3, 4, 4), 0.7, requires_grad=True)
    out = InstanceNorm(3)(x)
    torch.testing.assert_close(out, torch.zeros_like(out), atol=1e-3, rtol=0)
    (slope,) = torch.autograd.grad(out.square().sum(), x)
    assert bool(slope.isfinite().all())


def test_instance_norm_of_large_constants_stays_finite() -> None:
    # Rounding leaves some of these variances below zero, by more than eps.
    x = (1000 + 37.7 * torch.arange(64.0)).view(1, 64, 1, 1).expand(1, 64, 5, 7)
    assert bool(InstanceNorm(64)(x).isfinite().all())


# Architectures


@pytest.mark.parametrize(
    ("spec", "facts", "expected"),
    [
        (ConvNet(), {"shape": (32, 32), "classes": 10}, 320_010),
        # 28 -> 14 -> 7 -> 3: convolutions 1,280 + 2 x 147,584, norms 3 x 256, head 2 x 1,152 + 2.
        (ConvNet(), {"channels": 1, "shape": (28, 28), "classes": 2}, 299_522),
        (MLP(), {"channels": 1, "shape": (28, 28), "classes": 10}, 118_282),
        (ResNet18(norm="batch"), {"shape": (32, 32), "classes": 10}, 11_173_962),
    ],
    ids=["convnet color 32", "convnet gray 28", "mlp gray 28", "resnet18 color 32"],
)
def test_parameters_are_as_many_as_published(
    spec: Backbone, facts: dict[str, object], expected: int
) -> None:
    assert sum(p.numel() for p in built(spec, **facts).parameters()) == expected


@pytest.mark.parametrize(("channels", "side"), [(1, 28), (3, 28), (3, 32)])
def test_convnet_equals_a_plain_sequence_with_the_same_weights(channels: int, side: int) -> None:
    network = built(ConvNet(depth=3, width=16), channels=channels, shape=(side, side))
    layers: list[nn.Module] = []
    for block in range(3):
        layers.append(nn.Conv2d(channels if block == 0 else 16, 16, 3, padding=1))
        layers += [nn.GroupNorm(16, 16), nn.ReLU(), nn.AvgPool2d(2)]
    plain = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * (side // 8) ** 2, 4))
    values = list(network.state_dict().values())
    plain.load_state_dict(dict(zip(plain.state_dict(), values, strict=True)))
    x = noise(5, channels, side, side)
    torch.testing.assert_close(network(x), plain(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(network.features(x), plain[:-1](x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (SMALL[1], [nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(2)]),
        (SMALL[2], [nn.GroupNorm(4, 8), nn.GELU(), nn.MaxPool2d(2)]),
        (SMALL[3], [nn.GroupNorm(1, 8), nn.LeakyReLU(0.01)]),
        (SMALL[4], [nn.Identity(), nn.Sigmoid(), nn.AvgPool2d(2)]),
    ],
    ids=lambda value: repr(value) if isinstance(value, Backbone) else "",
)
def test_settings_choose_the_layers_of_a_block(spec: Backbone, expected: list[nn.Module]) -> None:
    first = [nn.Conv2d(3, 8, 3, padding=1)]
    assert repr(nn.Sequential(*first, *expected)) == repr(spec.body(3, (16, 16)))


@pytest.mark.parametrize("channels", [1, 3])
@each_small
def test_gray_and_color_give_features_and_logits(spec: Backbone, channels: int) -> None:
    network = built(spec, channels=channels)
    x = noise(3, channels, 16, 16)
    features = network.features(x)
    assert features.shape == (3, network.head.in_features)
    assert network(x).shape == (3, 4)
    assert bool(network(x).isfinite().all())
    torch.testing.assert_close(network(x), network.head(features))


def test_volumes_stay_float32_between_convolutions_in_bfloat16() -> None:
    """Compiled loops over bfloat16 volumes are slow on CPUs; convolutions alone are not."""
    network = built(ConvNet(depth=2, width=8), channels=1, shape=(8, 8, 8))
    x = noise(3, 1, 8, 8, 8)
    exact = network(x)
    rounded = network.to(torch.bfloat16)
    maps = rounded.body[1](rounded.body[0](x.bfloat16()))  # type: ignore[index]
    assert maps.dtype == torch.float32
    logits = rounded(x.bfloat16())
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), exact, atol=0.05, rtol=0.05)


def test_volumes_pass_a_convnet() -> None:
    network = built(ConvNet(depth=2, width=4), channels=1, shape=(8, 9, 10))
    assert network.features(noise(2, 1, 8, 9, 10)).shape == (2, 4 * 2 * 2 * 2)
    assert network(noise(2, 1, 8, 9, 10)).shape == (2, 4)


@pytest.mark.parametrize(
    ("spec", "shape", "needed"),
    [
        (ConvNet(depth=3), (7, 32), "8 or more"),
        (ConvNet(depth=3), (4, 16, 16), "8 or more"),
        (ResNet18(), (15, 16), "16 or more"),
        (ResNet18(), (16, 16, 16), "two dimensions"),
    ],
)
def test_images_too_small_are_refused(spec: Backbone, shape: tuple[int, ...], needed: str) -> None:
    with pytest.raises(UsageError, match=f"found images of .* expected .*{needed}.*: choose"):
        built(spec, shape=shape)


# Numbers


@each_small
def test_a_generator_fixes_the_network(spec: Backbone, untouched_generator: None) -> None:
    first, again, other = built(spec, 3), built(spec, 3), built(spec, 4)
    assert all(map(torch.equal, first.state_dict().values(), again.state_dict().values()))
    assert not torch.equal(first.head.weight, other.head.weight)


def test_the_global_generator_is_not_read() -> None:
    fresh = built(ConvNet(depth=1, width=8)).head.weight
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        assert torch.equal(built(ConvNet(depth=1, width=8)).head.weight, fresh)


def test_parameters_fill_the_framework_s_range() -> None:
    for name, tensor in built(ConvNet(depth=2, width=64)).parameter_state().items():
        if name.startswith("body.1") or name.startswith("body.5"):  # norms
            assert float(tensor.min()) == float(tensor.max()) == float(name.endswith("weight"))
            continue
        fan_in = {"body.0": 27, "body.4": 576, "head.w": 1024, "head.b": 1024}[name[:6]]
        bound = fan_in**-0.5
        assert 0.8 * bound < float(tensor.abs().max()) <= bound or tensor.numel() < 64
        if tensor.numel() > 1000:
            assert float(tensor.std()) == pytest.approx(bound / 3**0.5, rel=0.05)


def test_batch_norm_starts_from_fresh_statistics() -> None:
    state = built(ConvNet(depth=1, width=8, norm="batch")).state_dict()
    assert torch.equal(state["body.1.running_mean"], torch.zeros(8))
    assert torch.equal(state["body.1.running_var"], torch.ones(8))


@each_small
def test_only_batch_norm_mixes_images(spec: Backbone) -> None:
    network = built(spec)
    x = noise(4, 3, 16, 16)
    apart = torch.cat([network(x[:2]), network(x[2:])])
    assert network.mixes_images == (not torch.allclose(network(x), apart, atol=1e-5))
    assert network.mixes_images == (getattr(spec, "norm", "") == "batch")


# Names and specs


@pytest.mark.parametrize(
    "spec",
    [
        *(ConvNet(d, w, n) for d, w, n in product((1, 4), (8, 128), ("instance", "batch", "none"))),
        MLP(64),
        ResNet18(),
        ResNet18(16, "group"),
    ],
    ids=lambda spec: spec.name,
)
def test_names_are_read_back(spec: Backbone) -> None:
    assert backbone(spec.name) == spec


@each_small
def test_specs_are_read_back(spec: Backbone) -> None:
    assert from_spec(to_spec(spec)) == spec


def test_short_names_take_the_defaults() -> None:
    assert backbone("convnet") == ConvNet()
    assert backbone("convnet-4") == ConvNet(depth=4)
    assert backbone("convnet-batch") == ConvNet(norm="batch")
    assert backbone("resnet18-batch") == ResNet18(norm="batch")


@pytest.mark.parametrize(
    "name",
    ["", "convnt", "convnet-", "convnet-x", "convnet-0", "convnet-3-64-9", "convnet-3--64",
     "convnet-²", "mlp-8-batch", "resnet18-8-8", "convnet-batch-3"],
)  # fmt: skip
def test_wrong_names_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=r"found (no )?backbone"):
        backbone(name)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"family": "convnt"}, "did you mean convnet"),
        ({}, "found no backbone family"),
        ({"family": "convnet", "dept": 3}, "did you mean depth"),
        ({"family": "convnet", "depth": "3"}, "depth is '3'"),
    ],
)
def test_wrong_specs_are_refused(record: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        from_spec(record)


# Blocks of images


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_blocks_give_the_gradient_of_the_whole_batch(norm: str) -> None:
    spec = dataclasses.replace(ConvNet(depth=1, width=8), norm=norm)
    network = built(spec, shape=(8, 8))
    x = noise(2 * BLOCK + 5, 3, 8, 8)
    y = torch.arange(len(x)) % 4
    whole = F.cross_entropy(network(x), y)
    expected = torch.autograd.grad(whole, tuple(network.parameters()))
    mean = float(whole.detach())
    for labels in (y, F.one_hot(y, 4).float()):
        found, loss = gradient(network, x, labels)
        assert loss == pytest.approx(mean, rel=1e-5)
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_blocks_give_the_features_of_the_whole_batch(norm: str) -> None:
    spec = dataclasses.replace(ConvNet(depth=1, width=8), norm=norm)
    network = built(spec, shape=(8, 8))
    x = noise(2 * BLOCK + 5, 3, 8, 8).requires_grad_()
    found, expected = extract(network, x), network.features(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    (mine,) = torch.autograd.grad(found.square().sum(), x)
    (theirs,) = torch.autograd.grad(expected.square().sum(), x)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


IN_FOUR = (
    (ConvNet(2, 8), (1, 9, 12)),
    (ConvNet(2, 8, norm="batch"), (3, 8, 8)),
    (ConvNet(2, 8), (1, 8, 9, 10)),
    (ResNet18(4), (4, 16, 16)),
)


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("spec", "shape"), IN_FOUR)
def test_fixed_networks_give_images_the_plain_gradient_by_a_way_of_their_own(
    spec: Backbone, shape: tuple[int, ...], compile: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = built(spec, channels=shape[0], shape=shape[1:])
    images = noise(5, *shape).requires_grad_()
    weights = noise(*network.features(images).shape, name="weights")
    expected = torch.autograd.grad((network.features(images) * weights).sum(), images)[0]

    def found() -> Tensor:
        loss = (extract(fixed(network), images, Compute(compile=compile)) * weights).sum()
        return torch.autograd.grad(loss, images)[0]

    torch._dynamo.utils.counters.clear()
    assert torch.allclose(found(), expected, atol=1e-5)
    # Its own way is taken, in compiled code too: there a change of it shows.
    monkeypatch.setattr(
        "medistill.backbones.convolution.to_images", lambda *given: 2 * to_images(*given)
    )
    assert torch.allclose(found(), 2 * expected, atol=2e-5)
    assert not torch._dynamo.utils.counters["graph_break"]


def test_convolutions_of_pictures_are_torchs_own_type() -> None:
    """Opacus finds its per-image gradients by the exact type: a subclass would be slow there."""
    kinds = {type(m) for m in built(ConvNet(2, 8)).modules() if isinstance(m, nn.Conv2d)}
    assert kinds == {nn.Conv2d}


def test_levels_are_what_the_stages_give_and_are_no_longer_for_large_images() -> None:
    spec = ConvNet(2, 4)
    for side in (16, 64):
        network = built(spec, channels=1, shape=(side, side))
        images = noise(3, 1, side, side)
        first, last = levels_of(network.body, images)
        begun = network.body[:4](images)
        expected = F.adaptive_avg_pool2d(begun, 4).flatten(1)
        assert torch.allclose(first, expected, atol=1e-5)
        assert last.shape[1] == 4 * 4**2
        assert level_sizes(spec, 1, (side, side)) == (first.shape[1], last.shape[1])
    volumes = level_sizes(ConvNet(3, 4), 1, (28, 28, 28))
    assert volumes == (4 * 27, 4 * 27, 4 * 27)
    assert len(level_sizes(ResNet18(4), 1, (28, 28))) == 9
    assert level_sizes(MLP(hidden=2, width=6), 1, (16, 16)) == (6, 6)


# --- networks of MONAI --------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(32, 32), (32, 32, 32)], ids=["image", "volume"])
@pytest.mark.parametrize("name", ["monai:densenet121", "monai:resnet10"])
def test_networks_of_monai_are_backbones(
    name: str, shape: tuple[int, ...], untouched_generator: None
) -> None:
    spec = backbone(name)
    assert (spec.name, from_spec(to_spec(spec))) == (name, spec)
    card = Card("x", "multi-class", ("a", "b", "c"), 1, shape)
    one, two, other = (spec.build(card, Rng(seed).at("network")) for seed in (0, 0, 1))
    for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(one.head.weight, other.head.weight)
    images = torch.randn((2, 1, *shape), generator=torch.Generator().manual_seed(0))
    assert one(images).shape == (2, 3)
    assert one.features(images).shape == (2, one.head.in_features)
    assert one.mixes_images
    from monai.networks import nets

    kind = {"monai:densenet121": {"in_channels": 1, "out_channels": 3}}.get(
        name, {"n_input_channels": 1, "num_classes": 3}
    )
    with torch.random.fork_rng():  # they draw from the global generator
        theirs = getattr(nets, name.removeprefix("monai:"))(spatial_dims=len(shape), **kind)
    theirs.load_state_dict(dict(zip(theirs.state_dict(), two.state_dict().values(), strict=True)))
    torch.testing.assert_close(two.eval()(images), theirs.eval()(images))


def test_a_network_of_monai_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card("x", "binary", ("a", "b"), 1, (28, 28))
    with pytest.raises(UsageError, match="32 pixels a side work"):
        backbone("monai:densenet121").build(card, Rng(0).at("network"))
    with pytest.raises(UsageError, match="did you mean densenet121"):
        backbone("monai:densnet121")
    monkeypatch.setitem(sys.modules, "monai.networks.nets", None)
    with pytest.raises(UsageError, match=r"medistill\[medical\]"):
        backbone("monai:resnet18").build(card, Rng(0).at("network"))
