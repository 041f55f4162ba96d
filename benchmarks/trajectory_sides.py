"""The rows of benchmarks/speed.py on trajectories: an expert's epoch, and one matching step."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from medistill.backbones import Network
from medistill.experts import Bank, Training, _Crew
from medistill.methods import Task
from medistill.methods.base import one_hot
from medistill.methods.trajectory_matching import student_of
from medistill.rng import Rng
from medistill.train import RealImages, batch_of
from medistill.unroll import Step, flat, plan, pull_back, vector_of, walk

Side = Callable[[], Tensor]
Plain = Callable[[Network], nn.Sequential]
RATE = 0.01


@dataclass
class Trajectories:
    """What both sides share: a task, and how to build a network of torch's own layers."""

    task: Task
    plain: Plain

    def expert(self) -> tuple[Side, Side]:
        """One epoch of an expert, the images held out included; returns how far it moved."""
        task = self.task
        bank = Bank(
            task.real, task.backbone, task.augmentation, task.compute, Training(least_steps=1)
        )
        rng = Rng(0).child("expert", 0)
        _, kept = bank.dealt
        data = RealImages(task.real, kept)

        def slow() -> Tensor:
            network = self.plain(task.backbone.build(task.real.card, rng.at("network")))
            before = vector_of(network)
            for step in range(-(-len(kept) // 256)):
                images, labels = batch_of(data, 256, task.augmentation, step, rng)
                loss = F.cross_entropy(network(images), labels)
                parameters = tuple(network.parameters())
                for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                    p.data -= RATE * g
            return vector_of(network) - before

        def fast() -> Tensor:
            crew = _Crew(bank, [0])
            crew.train_epoch()
            return crew.moves[0, 0].float()

        return slow, fast

    def matching(self, steps: int, precision: Literal["float32", "bfloat16"]) -> tuple[Side, Side]:
        """The gradient in the images of one matching step over so many steps of a student."""
        task = self.task
        student = student_of(replace(task, compute=replace(task.compute, precision=precision)))
        network = task.network(Rng(0).at("start"))
        start = vector_of(network)
        target = start + 0.01 * torch.randn(len(start), generator=Rng(0).at("target"))
        target = target.to(start.device)
        labels, shape = one_hot(task), (task.total, task.real.card.channels, *task.real.card.shape)
        images = torch.randn(shape, generator=Rng(0).at("images")).to(start.device)
        kinds = task.augmentation
        drawn = plan(len(images), len(images), steps, kinds, task.real.card.shape, Rng(0))
        rate = torch.tensor(RATE, device=start.device)

        def fast() -> Tensor:
            thetas = walk(student, start, images, labels, rate, drawn, kinds)
            by = {steps: 2 * (thetas[-1] - target)}
            return pull_back(student, thetas, images, labels, rate, drawn, kinds, by).images

        return lambda: self.unrolled(network, target, images, labels, rate, drawn), fast

    def unrolled(
        self,
        network: Network,
        target: Tensor,
        images: Tensor,
        labels: Tensor,
        rate: Tensor,
        drawn: list[Step],
    ) -> Tensor:
        """The textbook way: every step with its graph, one backward pass through all."""
        body = self.plain(network)
        theta = [p.detach().clone().requires_grad_() for p in body.parameters()]
        names = [name for name, _ in body.named_parameters()]
        leaf, rate = images.clone().requires_grad_(), rate.clone().requires_grad_()
        for where, draw in drawn:
            seen = self.task.augmentation.apply(leaf[where], draw)
            logits = functional_call(body, dict(zip(names, theta, strict=True)), (seen,))
            loss = F.cross_entropy(logits, labels[where])
            slopes = torch.autograd.grad(loss, theta, create_graph=True)
            theta = [p - rate * g for p, g in zip(theta, slopes, strict=True)]
        apart = flat([p.unsqueeze(0) for p in theta])[0] - target
        return torch.autograd.grad(apart.square().sum(), (leaf, rate))[0]
