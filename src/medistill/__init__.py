"""Distill medical image datasets into a few synthetic images that train a model almost as well."""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "load": "opening",
    "inspect": "data.inspect",
    "distill": "distill",
    "evaluate": "evaluate",
    "report": "report",
    "Budget": "budget",
    "Card": "sets",
    "RealSet": "sets",
    "Recipe": "sets",
    "Splits": "sets",
    "SyntheticSet": "sets",
    "Task": "methods",
    "Method": "methods",
    "Augmentation": "augment",
    "ConvNet": "backbones",
    "MLP": "backbones",
    "ResNet18": "backbones",
    "Rng": "rng",
    "MedistillError": "errors",
    "train": "model",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    # Imported on first use, so that `medistill --help` does not wait for torch.
    if name not in _PUBLIC:
        raise AttributeError(f"module 'medistill' has no attribute {name!r}")
    return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)


class _Face(ModuleType):
    """The package, whose public functions keep their names when a module of that name loads."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _PUBLIC and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Face
