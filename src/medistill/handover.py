"""Trained models for other people's programs: ONNX, and MONAI Bundles."""

import contextlib
import io
import logging
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from . import __version__, model
from .backbones import Network
from .errors import UsageError, extra
from .pixels import normalize
from .records import Json, atomically, write_atomic, write_json
from .sets import Card, Recipe

OPSET = 20
README = """# {name}

A classifier of {classes}, trained on synthetic images of {source} by medistill {version}. It takes
intensities from 0 to 1 ({shape}) and gives one logit for each class. {rule} It is no medical
device, and was not tested on your data.
"""
PICTURE_RULE = "8-bit values / 255"
PICTURES = (
    "Values of 8 bits are divided by 255, as configs/inference.json does. Pictures of other "
    "proportions are padded evenly with black first: it would stretch them."
)
OTHERS = (
    "Intensities are made by this rule: {rule}. configs/inference.json holds no preprocessing for "
    "it: read images with medistill, or follow the rule."
)


class Ready(nn.Module):
    """A network that takes intensities in [0, 1] [n, c, ...] and normalizes them itself."""

    def __init__(self, network: Network, recipe: Recipe) -> None:
        super().__init__()
        self.network, self.mean, self.std = network, recipe.mean, recipe.std

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [n, k]."""
        seen = normalize(images.clone(), self.mean, self.std)
        whitening = self.network.whitening
        logits: Tensor = self.network(seen if whitening is None else whitening.apply(seen))
        return logits


def ready(path: Path | str) -> Ready:
    """Return the model of a file that `train` wrote, ready for intensities; bundles name this.

    Raises: DataError when the file is missing, damaged or holds something else.
    """
    network, recipe, _ = model.load(Path(path))
    return Ready(network.eval(), recipe)


def write_onnx(path: Path, network: Network, recipe: Recipe, card: Card) -> None:
    """Write a model as ONNX: `images` [n, c, ...] in [0, 1] to `logits` [n, k], for any n.

    Raises: UsageError without the extra onnx, or when torch's exporter cannot write the network;
    RunRefused when the file cannot be written.
    """
    for name in ("onnx", "onnxscript"):
        extra(name, "onnx")
    images = torch.zeros(2, card.channels, *card.shape)
    whole = Ready(network.cpu().eval(), recipe)
    noisy = logging.getLogger("torch.onnx")
    level, held = noisy.level, io.StringIO()
    noisy.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(held):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                whole,
                (images,),
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=({0: torch.export.Dim("n", min=1)},),
                input_names=["images"],
                output_names=["logits"],
                verbose=False,
            )
        assert program is not None
        content = program.model_proto.SerializeToString()
    except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
        first = str(error).partition("\n")[0][:200]
        raise UsageError(
            f"torch could not write this network as ONNX ({first}); expected one of its layers: "
            "use the safetensors file"
        ) from None
    finally:
        noisy.setLevel(level)
    write_atomic(path, content)


def write_bundle(folder: Path, network: Network, recipe: Recipe, card: Card) -> None:
    """Write a model as a MONAI Bundle: metadata, an inference config, weights as safetensors.

    MONAI's ConfigParser takes network, preprocessing and inferer from configs/inference.json; the
    network needs medistill, which rebuilds it from the file's header; nothing is pickled. Only
    pictures of 8 bits get a preprocessing: for other images the README names the rule.
    Raises: RunRefused when the folder cannot be written.
    """

    def make(half: Path) -> None:
        model.save(half / "models" / "model.safetensors", network, recipe, card)
        write_json(half / "configs" / "metadata.json", _metadata(card))
        write_json(half / "configs" / "inference.json", _inference(card, recipe))
        classes = ", ".join(card.classes)
        shape = " x ".join(map(str, (card.channels, *card.shape)))
        text = README.format(
            name=card.name,
            classes=classes,
            source=card.name,
            version=__version__,
            shape=shape,
            rule=PICTURES if _of_pictures(card, recipe) else OTHERS.format(rule=_rule(recipe)),
        )
        write_atomic(half / "docs" / "README.md", text.encode())

    atomically(folder, make)


def _plain(text: str) -> str:
    """Return a text that MONAI takes as it is: one that begins with $, @ or % it would run.

    These texts come from packages of others.
    """
    return f" {text}" if text[:1] in ("$", "@", "%") else text


def _metadata(card: Card) -> Json:
    image = {
        "type": "image",
        "format": "magnitude",
        "num_channels": card.channels,
        "spatial_shape": list(card.shape),
        "dtype": "float32",
        "value_range": [0, 1],
        "is_patch_data": False,
        "channel_def": {str(n): f"channel {n}" for n in range(card.channels)},
    }
    pred = {
        "type": "logits",
        "format": "classes",
        "num_channels": len(card.classes),
        "spatial_shape": [1],
        "dtype": "float32",
        "value_range": [],
        "is_patch_data": False,
        "channel_def": {str(n): _plain(name) for n, name in enumerate(card.classes)},
    }
    return {
        "version": "1.0.0",
        "changelog": {"1.0.0": f"written by medistill {__version__}"},
        "monai_version": "1.5.0",
        "pytorch_version": torch.__version__.partition("+")[0],
        "numpy_version": np.__version__,
        "required_packages_version": {"medistill": __version__},
        "name": f"Classifier of {card.name}",
        "task": "classification",
        "description": f"Trained on synthetic images of {card.name}",
        "authors": "medistill",
        "copyright": _plain(card.license),
        "intended_use": "research; no medical device",
        "network_data_format": {"inputs": {"image": image}, "outputs": {"pred": pred}},
    }


def _rule(recipe: Recipe) -> str:
    return recipe.intensity or PICTURE_RULE  # of sources that hold nothing else


def _of_pictures(card: Card, recipe: Recipe) -> bool:
    """Say whether images are pictures of 8 bits, which MONAI reads as medistill does."""
    rule, _, more = _rule(recipe).partition("; ")
    padded = more == f"pad to {'x'.join(map(str, card.shape))}"
    return len(card.shape) == 2 and rule == PICTURE_RULE and (padded or not more)


def _inference(card: Card, recipe: Recipe) -> Json:
    config: Json = {
        "imports": ["$from pathlib import Path"],
        "bundle_root": ".",
        "datalist": [],
        "network": {
            "_target_": "medistill.handover.ready",
            "path": "$Path(@bundle_root) / 'models' / 'model.safetensors'",
        },
        "inferer": {"_target_": "SimpleInferer"},
    }
    if _of_pictures(card, recipe):
        kind = "L" if card.channels == 1 else "RGB"
        reading = {
            "_target_": "LoadImaged",
            "keys": "image",
            "ensure_channel_first": True,
            # Rows first, as medistill has pictures; MONAI would turn them over.
            "reader": "PILReader",
            "reverse_indexing": False,
            "converter": f"$lambda picture: picture.convert('{kind}')",
        }
        scaling: Json = {"_target_": "ScaleIntensityRanged", "keys": "image", "clip": True}
        scaling |= {"a_min": 0, "a_max": 255, "b_min": 0, "b_max": 1}
        sizing: Json = {"_target_": "Resized", "keys": "image", "spatial_size": list(card.shape)}
        sizing |= {"mode": "bilinear", "anti_aliasing": True}
        config["preprocessing"] = {"_target_": "Compose", "transforms": [reading, scaling, sizing]}
    return config
