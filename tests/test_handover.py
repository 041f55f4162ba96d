"""Models for other people's programs say what the network says."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from medistill import Recipe, Rng, load, model
from medistill.backbones import ConvNet, Network, to_spec
from medistill.cli import app
from medistill.errors import DataError
from medistill.handover import Ready, ready, write_bundle, write_onnx
from medistill.pixels import Whitening

CARD = load("phantom:n=40,size=16").train.card
RECIPE = Recipe((0.3,), (0.2,), to_spec(ConvNet(2, 8)), {"kinds": []})
IMAGES = torch.rand((5, 1, 16, 16), generator=Rng(0).at("images"))


def network(whitened: bool = False) -> Network:
    """Return an untrained network, perhaps one of whitened images."""
    made = ConvNet(2, 8).build(CARD, Rng(0).at("network"))
    if whitened:
        matrix = torch.randn((256, 256), generator=Rng(0).at("matrix")) / 16
        made.whiten_by(Whitening(torch.full((256,), 0.1), matrix))
    return made


def expected(made: Network) -> torch.Tensor:
    """Return what a network says of images, step by step."""
    seen = (IMAGES - 0.3) / 0.2
    if made.whitening is not None:
        seen = ((seen.flatten(1) - made.whitening.mean) @ made.whitening.matrix).view_as(seen)
    logits: torch.Tensor = made(seen).detach()
    return logits


@pytest.mark.parametrize("whitened", [False, True])
def test_a_model_takes_intensities_and_normalizes_them_itself(whitened: bool) -> None:
    made = network(whitened)
    before = IMAGES.clone()
    found = Ready(made, RECIPE)(IMAGES)
    torch.testing.assert_close(found, expected(made))
    assert torch.equal(IMAGES, before)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("whitened", [False, True])
def test_another_runtime_says_the_same(whitened: bool, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    made = network(whitened)
    write_onnx(tmp_path / "a.onnx", made, RECIPE, CARD)
    session = runtime.InferenceSession(tmp_path / "a.onnx")
    for count in (1, 5):  # not the number that it was written with
        [found] = session.run(None, {"images": IMAGES[:count].numpy()})
        np.testing.assert_allclose(found, expected(made)[:count].numpy(), atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_names_of_classes_are_never_run(tmp_path: Path) -> None:
    bundle = pytest.importorskip("monai.bundle")
    touched = tmp_path / "touched"
    evil = f"$open({str(touched)!r}, 'w').close()"
    names = (evil, "@network", "%configs/inference.json")
    card = dataclasses.replace(CARD, classes=names, license=evil)
    made = ConvNet(2, 8).build(card, Rng(0).at("network"))
    write_bundle(tmp_path / "bundle", made, RECIPE, card)
    parser = bundle.ConfigParser()
    parser.read_config(tmp_path / "bundle" / "configs" / "inference.json")
    parser.read_meta(tmp_path / "bundle" / "configs" / "metadata.json")
    found = parser.get_parsed_content("_meta_")
    shown = found["network_data_format"]["outputs"]["pred"]["channel_def"]
    assert [text.strip() for text in shown.values()] == list(names)
    assert not touched.exists()


@pytest.mark.filterwarnings("ignore")
def test_monai_reads_the_bundle(tmp_path: Path) -> None:
    bundle = pytest.importorskip("monai.bundle")
    made = network()
    write_bundle(tmp_path / "bundle", made, RECIPE, CARD)
    parser = bundle.ConfigParser()
    parser.read_config(tmp_path / "bundle" / "configs" / "inference.json")
    parser.read_meta(tmp_path / "bundle" / "configs" / "metadata.json")
    parser["bundle_root"] = str(tmp_path / "bundle")
    found = parser.get_parsed_content("network")(IMAGES)
    torch.testing.assert_close(found, expected(made))
    assert parser.get("_meta_#network_data_format#outputs#pred#num_channels") == 2
    picture = tmp_path / "a.png"
    from PIL import Image

    Image.fromarray((IMAGES[0, 0].numpy() * 255).astype(np.uint8)).save(picture)
    seen = parser.get_parsed_content("preprocessing")({"image": str(picture)})["image"]
    # Rows stay rows: a picture that is turned over would still have this shape and range.
    torch.testing.assert_close(torch.as_tensor(np.asarray(seen)), IMAGES[0], atol=0.005, rtol=0)
    Image.fromarray((IMAGES[:3, 0].movedim(0, -1).numpy() * 255).astype(np.uint8)).save(picture)
    seen = parser.get_parsed_content("preprocessing")({"image": str(picture)})["image"]
    luma = (IMAGES[:3, 0] * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0)
    torch.testing.assert_close(torch.as_tensor(np.asarray(seen))[0], luma, atol=0.01, rtol=0)


@pytest.mark.parametrize(
    "rule",
    [
        "window center 40 width 400 to 0..1, 16 bit",
        "16-bit values / 65535",
        "8-bit values / 255; 16-bit values / 65535",
        "8-bit values / 255; stretch to 16x16",
    ],
)
def test_a_bundle_of_other_images_names_their_rule_and_reads_none(
    rule: str, tmp_path: Path
) -> None:
    write_bundle(tmp_path / "b", network(), dataclasses.replace(RECIPE, intensity=rule), CARD)
    config = json.loads((tmp_path / "b" / "configs" / "inference.json").read_text())
    assert "preprocessing" not in config
    padded = dataclasses.replace(RECIPE, intensity="8-bit values / 255; pad to 16x16")
    write_bundle(tmp_path / "p", network(), padded, CARD)
    assert "preprocessing" in json.loads((tmp_path / "p/configs/inference.json").read_text())
    assert rule in (tmp_path / "b" / "docs" / "README.md").read_text()


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        ready(tmp_path / "none")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_train_writes_both(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    run, source = str(tmp_path / "run"), "phantom:n=40,size=16"
    words = ["distill", source, "--backbone", "convnet-1-4", "--ipc", "1", "--out", run]
    assert CliRunner().invoke(app, [*words, "--method", "dm", "--steps", "1"]).exit_code == 0
    words = ["train", run, "--out", str(tmp_path / "m"), "--onnx", str(tmp_path / "a.onnx")]
    made = CliRunner().invoke(app, [*words, "--bundle", str(tmp_path / "bundle"), "--json"])
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)["model"] == str(tmp_path / "m")
    own, _, _ = model.load(tmp_path / "m")
    held = ready(tmp_path / "bundle" / "models" / "model.safetensors").network
    assert all(map(torch.equal, own.state_dict().values(), held.state_dict().values()))
    assert (tmp_path / "a.onnx").stat().st_size > 0
    again = CliRunner().invoke(app, [*words[:3], str(tmp_path / "n"), *words[4:]])
    assert again.exit_code == 5
