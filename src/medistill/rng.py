"""Named random streams: a draw depends on its seed and its name, never on what was drawn before."""

import hashlib
from dataclasses import dataclass

import torch

Name = str | int


@dataclass(frozen=True)
class Rng:
    """A seed and a path of names, from which generators are made and never shared.

    The state of a stream is SHA-256(seed, names), cut to 63 bits. A resumed run draws the same
    numbers without a stored generator, and a new draw elsewhere shifts nothing. The global
    generator of torch is neither read nor written.

    Example:
        >>> a, b = Rng(0).at("student", 3), Rng(0).at("student", 3)
        >>> bool((torch.rand(4, generator=a) == torch.rand(4, generator=b)).all())
        True
    """

    seed: int
    path: tuple[Name, ...] = ()

    def child(self, *names: Name) -> "Rng":
        """Return the stream family below `names`."""
        return Rng(self.seed, (*self.path, *names))

    def integer(self, *names: Name) -> int:
        """Return the 63-bit number that `names` stands for."""
        text = repr((self.seed, *self.path, *names)).encode()
        return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1

    def at(self, *names: Name) -> torch.Generator:
        """Return a fresh CPU generator for `names`."""
        return torch.Generator().manual_seed(self.integer(*names))
