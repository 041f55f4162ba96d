"""`monai:NAME`: classification networks of MONAI, in two and three dimensions."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from ..errors import UsageError, extra, nearest
from .base import Backbone

NAMES = (
    *("densenet121", "densenet169", "densenet201"),
    *("resnet10", "resnet18", "resnet34", "resnet50"),
)
LARGER = (32, 48, 64, 96, 128, 224)  # sides that are tried to say what would do


@dataclass(frozen=True)
class Monai(Backbone):
    """A network of MONAI by its name there, untrained; its last linear layer becomes our head.

    Source: MONAI's networks.nets, with their own defaults.
    Departures: numbers are drawn by the framework's default rule from the generator given.
    Raises: UsageError when MONAI is absent, the name unknown, or images too small for the network.

    Example:
        >>> Monai("densenet121").name
        'monai:densenet121'
    """

    network: str = "densenet121"
    family: ClassVar[str] = "monai"

    def __post_init__(self) -> None:
        if self.network not in NAMES:
            raise UsageError(f"found no network {self.network!r}: {nearest(self.network, NAMES)}")

    @property
    def name(self) -> str:
        """`monai:NETWORK`."""
        return f"monai:{self.network}"

    def body(self, channels: int, shape: tuple[int, ...]) -> nn.Module:
        """Return all layers but the last linear one; features are pooled over space."""
        body = _body(self.network, len(shape), channels)
        if not _fits(body, channels, shape):
            fresh = [_body(self.network, len(shape), channels) for _ in LARGER]
            sides = zip(LARGER, fresh, strict=True)
            works = next((s for s, net in sides if _fits(net, channels, (s,) * len(shape))), None)
            raise UsageError(
                f"found images of {'x'.join(map(str, shape))} for {self.name}; expected larger "
                f"ones ({works} pixels a side work): set size={works}, or choose convnet"
            )
        return body


def _body(name: str, dimensions: int, channels: int) -> nn.Module:
    """Build on no device, so that no number is drawn."""
    make: Callable[..., nn.Module] = getattr(extra("monai.networks.nets", "medical"), name)
    with torch.device("meta"):
        if name.startswith("dense"):
            whole = make(spatial_dims=dimensions, in_channels=channels, out_channels=2)
            layers = [whole.features, *list(whole.class_layers)[:-1]]  # type: ignore[arg-type]
        else:
            whole = make(spatial_dims=dimensions, n_input_channels=channels, num_classes=2)
            layers = [*list(whole.children())[:-1], nn.Flatten()]
    return nn.Sequential(*layers)


def _fits(body: nn.Module, channels: int, shape: tuple[int, ...]) -> bool:
    try:
        with torch.device("meta"), torch.no_grad():
            found = body.eval()(torch.empty(2, channels, *shape))
    except (RuntimeError, ValueError):
        return False
    finally:
        body.train()
    return bool(found.numel())
