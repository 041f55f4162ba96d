"""Ideas for the sketch method that are no part of it, for `sketch_tuning.py` to measure."""

import dataclasses
import math
from abc import abstractmethod
from dataclasses import dataclass

import torch

from medistill.compute import Compute
from medistill.distill import distill
from medistill.features import extract_fast, fixed
from medistill.methods import Task
from medistill.methods.sketch import FromSketch
from medistill.probes import Probe, all_spreads, probe
from medistill.records import State
from medistill.rng import Rng
from medistill.sketch import shape_of
from medistill.train import TensorImages, fit

WAYS: list[Probe] = []  # of the run that was prepared last; nothing of it is kept in a cache


@dataclass(frozen=True)
class Restarts(FromSketch):
    """Adam's rate falls and begins again, `cycles` times; each time from `decay` of the last."""

    cycles: int = 3
    decay: float = 1.0

    def rate(self, step: int) -> float:
        """Return the rate of a cycle."""
        cycle, within = divmod(step, self.iterations // self.cycles)
        part = within / (self.iterations // self.cycles)
        return self.lr_images * self.decay**cycle * (1 + math.cos(math.pi * part)) / 2


@dataclass(frozen=True)
class Own(FromSketch):
    """A sketch whose networks or frequencies are others than a file could name."""

    @abstractmethod
    def ways(self, task: Task) -> list[Probe]:
        """Return them."""

    def prepare(self, task: Task, rng: Rng) -> State:
        """Return the sums of the whole set."""
        spec, real = self.spec(task), task.real
        WAYS[:] = self.ways(task)
        images = real.normalized(torch.arange(len(real)))
        sums = torch.zeros(shape_of(real.card, spec), dtype=torch.int64)
        for number, way in enumerate(WAYS):
            sums[:, number].index_add_(0, real.labels, way.on_grid(images, task.compute))
        counts = torch.tensor([len(members) for members in real.by_class])
        return {"sums": sums, "counts": counts, "spreads": all_spreads(spec, real.card)}

    def way(self, task: Task, number: int) -> Probe:
        """Return one of them."""
        return WAYS[number]


@dataclass(frozen=True)
class Bands(Own):
    """Frequencies of several sizes side by side, in place of one."""

    bands: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0)

    def ways(self, task: Task) -> list[Probe]:
        """Return the sketch's own, every frequency times the band that it falls in."""
        spec, real = dataclasses.replace(self.spec(task), scale=1.0), task.real
        sizes = torch.tensor(self.bands).repeat(spec.frequencies // len(self.bands))
        found = []
        for number, spreads in enumerate(all_spreads(spec, real.card)):
            way = probe(spec, real.card, number, spreads, real.device)
            found.append(dataclasses.replace(way, frequencies=[t * sizes for t in way.frequencies]))
        return found


@dataclass(frozen=True)
class SecondStage(Own):
    """Networks that were trained for `trained` steps on what the sketch method made first."""

    trained: int = 30

    def ways(self, task: Task) -> list[Probe]:
        """Return them, with frequencies scaled to what they give of noise images."""
        spec, card = self.spec(task), task.real.card
        names = {field.name for field in dataclasses.fields(FromSketch)}
        plain = FromSketch(**{name: getattr(self, name) for name in names})
        first = distill(plain, task, seed=0)
        recipe = dataclasses.replace(first.recipe, steps=400, stop=self.trained, batch=128, lr=0.02)
        found = []
        for number, spreads in enumerate(all_spreads(spec, card)):
            at = Rng(7).child("second", number)
            network = task.backbone.build(card, at.at("network"))
            compute = Compute("bfloat16", compile=True)
            fit(network, TensorImages.of(first), recipe, at.child("fit"), compute=compute)
            network = fixed(network)
            noise = torch.randn((64, card.channels, *card.shape), generator=at.at("noise"))
            sizes = spec.sizes(card)
            levels = extract_fast(network, noise, levels=True)[:, -sum(sizes) :].split(sizes, 1)
            way = probe(spec, card, number, spreads, task.real.device)
            scaled = [
                t * float(old) / float(level.var(0).sum().mul(2).sqrt())
                for t, old, level in zip(way.frequencies, spreads, levels, strict=True)
            ]
            found.append(dataclasses.replace(way, network=network, frequencies=scaled))
        return found
