"""How much faster the library is than a plain textbook loop, on the same data in one process.

    python benchmarks/speed.py run [--only WHAT ...] [--size 28] [--width 128] [--volumes]
                                   [--repeats 3]
    python benchmarks/speed.py profile --only student-20 features
    python benchmarks/speed.py table

The plain loops are ours, in the shape of the field's references: class after class, float32, a
fresh network of torch's own layers for each step, one pass over a whole batch. Each row times both
in turn, takes the fastest of so many repeats for each side, and says how far their results lie
apart, relative to the plain ones: features, sketches, by how much a step moves the images, a
student's loss. Peaks are resident memory beyond what the process held before. Data is the built-in
phantom set, so a GPU machine without a network can run the same command.
"""

import argparse
import ctypes
import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import agreement
import jsonl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from trajectory_sides import Trajectories

from medistill import __version__
from medistill.augment import Augmentation
from medistill.backbones import ConvNet, Network, levels_of, to_spec
from medistill.budget import Budget
from medistill.compute import Compute, find_device
from medistill.data import load
from medistill.features import of_set
from medistill.methods import DC, DM, DSA, Method, Task
from medistill.methods.base import recipe_of
from medistill.methods.dp_merf import DPMERF
from medistill.methods.gradient_matching import distance
from medistill.metrics import score
from medistill.pixels import normalize
from medistill.probes import SketchSpec, probe, waves
from medistill.records import State, to_record
from medistill.rng import Rng
from medistill.sets import Card, RealSet
from medistill.sketch import _sums, mean_of, sketch
from medistill.train import TensorImages, fit, fit_together

RESULTS = Path(__file__).parent / "results" / "speed.jsonl"
TABLE = Path(__file__).parents[1] / "docs" / "speed.md"
PROFILE = RESULTS.with_name("profile.json")
KINDS = {
    "convolutions": ("convolution", "mkldnn", "thnn"),
    "compiled norm, activation, pooling": ("Compiled", "cpp_fused", "graph_"),
}
IPC, IMAGES = 10, 512
FAST = Compute("bfloat16", compile=True)
WHAT = (
    "features",
    "dm",
    "dm-bank",
    "dc",
    "dsa",
    "sketch",
    "dp_merf",
    "student-20",
    "student-256",
    "students-5",
    "expert",
    "mtt T=10",
    "mtt T=30",
    "mtt T=80",
    "mtt-bfloat16 T=30",
)
Side = Callable[[], Tensor]


def plain(network: Network, channels: int, width: int) -> nn.Sequential:
    """Return the same network of torch's own layers, as the references build it."""
    layers: list[nn.Module] = []
    source = iter(network.body.parameters())
    volumes = next(network.body.parameters()).ndim == 5
    kind, pool = (nn.Conv3d, nn.AvgPool3d) if volumes else (nn.Conv2d, nn.AvgPool2d)
    for block in range(3):
        conv = kind(channels if block == 0 else width, width, 3, padding=1)
        norm = nn.GroupNorm(width, width)
        for parameter in (conv.weight, conv.bias, norm.weight, norm.bias):
            assert parameter is not None
            parameter.data = next(source).detach().clone(memory_format=torch.contiguous_format)
        layers += [conv, norm, nn.ReLU(), pool(2)]
    head = nn.Linear(network.head.in_features, network.head.out_features)
    head.load_state_dict(network.head.state_dict())
    return nn.Sequential(*layers, nn.Flatten(), head).to(network.head.weight.device)


def peak() -> int:
    """Return the largest resident size since `reset`, in bytes."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def reset() -> int:
    """Forget the peak and return the present size."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    else:
        # Freed memory that the allocator keeps would count as held before.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    return peak()


def timed(side: Side, repeats: int = 3) -> tuple[float, int, Tensor]:
    """Return the best time of a side, its peak and its result; the first run only warms up."""
    side()
    best = float("inf")
    before = reset()
    for _ in range(repeats):
        begin = time.perf_counter()
        result = side()
        if result.is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return best, max(0, peak() - before), result


def ceiling(device: torch.device) -> float:
    """Return the machine's measured rate of bfloat16 matrix products, GFLOP/s."""
    side = 8192 if device.type == "cuda" else 2048
    a = torch.randn(side, side, device=device).bfloat16()
    seconds, _, _ = timed(lambda: a @ a)
    return 2 * side**3 / seconds / 1e9


def images_of(shape: tuple[int, ...], channels: int) -> RealSet:
    """Return phantom images, or volumes of noise: as many as cost about what 1,024 of 28 px do."""
    count = max(32, 2 * IMAGES * 28**2 // math.prod(shape))
    if len(shape) == 2:
        source = f"phantom:n={count},size={shape[0]},channels={channels}"
        return load(source, offline=True).train
    generator = Rng(0).at("volumes")
    pixels = torch.randint(0, 256, (count, channels, *shape), generator=generator)
    half = (0.5,) * channels
    card = Card("volumes", "binary", ("no", "yes"), channels, shape, mean=half, std=half)
    return RealSet(pixels.to(torch.uint8), torch.arange(count) % 2, card)


class Bench:
    """The task that all rows share, and for each row a plain and a fast side."""

    def __init__(self, shape: tuple[int, ...], width: int, channels: int, device: str) -> None:
        self.device = find_device(device)
        self.real = images_of(shape, channels).to(self.device)
        self.width, self.channels = width, channels
        view = Augmentation() if len(shape) == 2 else Augmentation(kinds=())
        backbone = ConvNet(width=width)
        self.task = Task(self.real, Budget(ipc=IPC), backbone, view, compute=FAST)
        self.rng = Rng(0)

    def network(self, *names: str | int) -> Network:
        """Return a network by name."""
        return self.task.network(self.rng.at(*names))

    def features(self) -> tuple[Side, Side]:
        """Features of all images under one network."""
        network = self.network("features")
        body = plain(network, self.channels, self.width)[:-1]
        index = torch.arange(len(self.real)).split(256)

        def slow() -> Tensor:
            with torch.no_grad():
                return torch.cat([body(self.real.normalized(part)) for part in index])

        return slow, lambda: of_set(network, self.real, FAST)

    def step_of(self, method: Method) -> Side:
        """Return a side that makes one step of a method from its start."""
        task = dataclasses.replace(self.task, prepared=method.prepare(self.task, Rng(0)))
        state = method.init(task, self.rng)
        return lambda: method.step(state, task, self.rng)[0]["images"] - state["images"]

    def dm(self) -> tuple[Side, Side]:
        """One step of DM with a fresh network and 256 real images of each class."""
        method = DM()
        return self.plain_dm(method), self.step_of(method)

    def dm_bank(self) -> tuple[Side, Side]:
        """One step of DM under a bank, against the plain step with a fresh network."""
        return self.plain_dm(DM()), self.step_of(DM(bank=2))

    def plain_dm(self, method: DM) -> Side:
        """Return the plain step of DM, class by class."""
        state = method.init(self.task, self.rng)

        def slow() -> Tensor:
            at = self.rng.child("step", 0)
            body = plain(self.network("step", 0, "network"), self.channels, self.width)[:-1]
            images = state["images"].clone().requires_grad_()
            loss = torch.zeros((), device=self.device)
            for c in range(self.task.classes):
                real, own = self.pair(images, c, at, method.batch_real, self.task.augmentation)
                with torch.no_grad():
                    target = body(real).mean(0)
                loss = loss + (body(own).mean(0) - target).square().sum()
            loss.backward()
            assert images.grad is not None
            return -method.lr_images * images.grad

        return slow

    def pair(
        self, images: Tensor, c: int, at: Rng, batch: int, augmentation: Any
    ) -> tuple[Tensor, Tensor]:
        """Return a class's real and synthetic images under one draw."""
        members = self.real.by_class[c]
        order = torch.randperm(len(members), generator=at.at("real", c))
        draw = augmentation.draw(1, self.real.card.shape, at.at("augment", c))
        real = self.real.normalized(members[order[: min(batch, len(members))]])
        own = images[c * IPC : (c + 1) * IPC]
        return augmentation.apply(real, draw), augmentation.apply(own, draw)

    def dc(self) -> tuple[Side, Side]:
        """One round of DC: match all classes, then 50 epochs on the images."""
        return self.matching(DC())

    def dsa(self) -> tuple[Side, Side]:
        """One round of DSA."""
        return self.matching(DSA())

    def matching(self, method: DC | DSA) -> tuple[Side, Side]:
        """Return both sides of a round of gradient matching."""
        state: State = method.init(self.task, self.rng)
        view = method.view(self.task)

        def slow() -> Tensor:
            at = self.rng.child("step", 0)
            network = plain(self.network("network", 0), self.channels, self.width)
            parameters = tuple(network.parameters())
            images = state["images"].clone().requires_grad_()
            loss = torch.zeros((), device=self.device)
            for c in range(self.task.classes):
                real, own = self.pair(images, c, at, method.batch_real, view)
                labels = [torch.full((len(x),), c, device=self.device) for x in (real, own)]
                target = torch.autograd.grad(F.cross_entropy(network(real), labels[0]), parameters)
                mine = F.cross_entropy(network(own), labels[1])
                gradients = torch.autograd.grad(mine, parameters, create_graph=True)
                loss = loss + distance(gradients, target)
            (gradient,) = torch.autograd.grad(loss, images)
            moved = -method.lr_images * gradient
            after = images.detach() + moved
            optimizer = torch.optim.SGD(parameters, lr=method.lr_network)
            inner = at.child("inner")
            for step in range(50):
                draw = view.draw(len(after), self.real.card.shape, inner.at("augment", step))
                optimizer.zero_grad()
                F.cross_entropy(network(view.apply(after, draw)), state["labels"]).backward()
                optimizer.step()
            return moved

        return slow, self.step_of(method)

    def sketch(self) -> tuple[Side, Side]:
        """A sketch of all images under two networks, the constants of its frequencies at hand."""
        task = self.task
        spec = SketchSpec(to_spec(task.backbone), to_record(task.augmentation), networks=2)
        made = sketch(self.real, spec, FAST)
        ways = [probe(spec, self.real.card, m, made.spreads[m], self.device) for m in range(2)]
        bodies = [plain(way.network, self.channels, self.width)[:-2] for way in ways]  # to its maps

        def slow() -> Tensor:
            means = []
            with torch.no_grad():
                for members in self.real.by_class:
                    for way, body in zip(ways, bodies, strict=True):
                        parts = []
                        for part in members.split(256):
                            seen = way.augmentation.apply(self.real.normalized(part), way.draw)
                            levels = torch.cat(levels_of(body, seen), 1)
                            parts.append(waves(levels, way.frequencies).sum(0))
                        means.append(torch.stack(parts).sum(0) / len(members))
            return torch.stack(means)

        def fast() -> Tensor:
            sums, _ = _sums(self.real, spec=spec, spreads=made.spreads, compute=FAST)
            return mean_of(sums, made.counts).flatten(0, 1)

        return slow, fast

    def dp_merf(self) -> tuple[Side, Side]:
        """The gradient of one step in the generator, the sketch of pixels at hand."""
        method, card = DPMERF(), self.real.card
        held = sketch(self.real, method.spec(self.task), FAST)
        task = dataclasses.replace(self.task, prepared=held.state)
        state = method.init(task, self.rng)
        (frequencies,) = probe(held.spec, card, 0, held.spreads[0], self.device).frequencies
        target, each = held.means()[:, 0].to(self.device), method.batch // task.classes
        small, axes = [-(-side // 4) for side in card.shape], len(card.shape)
        cut = (..., *(slice(side) for side in card.shape))
        kind = nn.Conv2d if axes == 2 else nn.Conv3d
        mode = "bilinear" if axes == 2 else "trilinear"
        network = nn.Sequential(
            nn.Linear(method.code + task.classes, method.hidden),
            nn.BatchNorm1d(method.hidden),
            nn.ReLU(),
            nn.Linear(method.hidden, 16 * math.prod(small)),
            nn.Unflatten(1, (16, *small)),
            nn.Upsample(scale_factor=2, mode=mode),
            kind(16, 8, 5, padding=2),
            nn.ReLU(),
            nn.Upsample(scale_factor=2, mode=mode),
            kind(8, self.channels, 5, padding=2),
            nn.Sigmoid(),
        ).to(self.device)
        firsts = [name for name in state if name.startswith("first.")]
        for parameter, name in zip(network.parameters(), firsts, strict=True):
            parameter.data = state[name.removeprefix("first.")].clone()
        labels = torch.arange(task.classes).repeat_interleave(each)

        def slow() -> Tensor:
            codes = method._codes(labels, task, self.rng.at("codes", 0))
            images = normalize(network(codes)[cut].clone(), card.mean, card.std)  # in place
            loss = torch.zeros((), device=self.device)
            for number, part in enumerate(images.flatten(1).split(each)):
                phases = part @ frequencies
                seen = torch.cat([phases.cos(), phases.sin()], 1) / math.sqrt(phases.shape[1])
                loss = loss + (seen.mean(0) - target[number]).square().sum()
            found = torch.autograd.grad(loss, list(network.parameters()))
            return torch.cat([gradient.flatten() for gradient in found])

        def fast() -> Tensor:
            after, _ = method.step(state, task, self.rng)
            return torch.cat([after[name].flatten() for name in firsts]) / 0.1  # Adam's 1 - beta

        return slow, fast

    def student(self, images: int) -> tuple[Side, Side]:
        """Five steps of training a student on a batch of so many images."""
        x = torch.randn((images, self.channels, *self.real.card.shape), generator=self.rng.at("x"))
        y = torch.arange(images) % self.task.classes
        data = TensorImages(x.to(self.device), y.to(self.device))
        recipe = dataclasses.replace(recipe_of(self.task), steps=10, stop=5, batch=images)
        view, streams = self.task.augmentation, self.rng.child("student")

        def slow() -> Tensor:
            network = plain(self.network("student"), self.channels, self.width)
            optimizer = torch.optim.SGD(
                network.parameters(), recipe.lr, momentum=0.9, weight_decay=recipe.weight_decay
            )
            for step in range(5):
                draw = view.draw(images, self.real.card.shape, streams.at("augment", step))
                optimizer.zero_grad()
                loss = F.cross_entropy(network(view.apply(data.images, draw)), data.labels)
                loss.backward()
                optimizer.step()
            return loss.detach()

        def fast() -> Tensor:
            network = self.network("student")
            return torch.tensor(fit(network, data, recipe, streams, compute=FAST))

        return slow, fast

    def students(self) -> tuple[Side, Side]:
        """Five students of twenty images for five steps: in turn, and at once."""
        x = torch.randn((20, self.channels, *self.real.card.shape), generator=self.rng.at("x"))
        data = TensorImages(x.to(self.device), (torch.arange(20) % 2).to(self.device))
        recipe = dataclasses.replace(recipe_of(self.task), steps=10, stop=5, batch=20)
        streams = [self.rng.child("student", number) for number in range(5)]

        def fresh() -> list[Network]:
            return [self.network("student", number) for number in range(5)]

        def in_turn() -> Tensor:
            pairs = zip(fresh(), streams, strict=True)
            return torch.tensor([fit(n, data, recipe, rng, compute=FAST) for n, rng in pairs])

        def at_once() -> Tensor:
            losses = fit_together(fresh(), [data] * 5, recipe, streams, compute=FAST)
            return torch.tensor(losses)

        return in_turn, at_once


def products(bench: Bench, what: str) -> float | None:
    """Return the GFLOP that convolutions need for one pass of `what`, where it is one network's.

    One image's way forward times images; a gradient takes three times as much.
    """
    flops, shape = 0.0, bench.real.card.shape
    for block in range(3):
        inputs = bench.channels if block == 0 else bench.width
        pixels = math.prod(side // 2**block for side in shape)
        flops += 2 * pixels * inputs * bench.width * 3 ** len(shape)
    real = sum(min(256, len(members)) for members in bench.real.by_class)
    own = IPC * bench.task.classes
    passes = {
        "features": len(bench.real),
        "dm": real + 3 * own,
        "dm-bank": 3 * own,
        "sketch": 2 * len(bench.real),
        "student-20": 5 * 3 * 20,
        "student-256": 5 * 3 * 256,
        "expert": 3 * len(bench.real),
    }
    return flops * passes[what] / 1e9 if what in passes else None


def sides(bench: Bench, what: str) -> tuple[Side, Side]:
    """Return the plain and the fast side of a row."""
    trajectories = Trajectories(bench.task, lambda n: plain(n, bench.channels, bench.width))
    if what == "students-5":
        return bench.students()
    if what == "expert":
        return trajectories.expert()
    if what.startswith("mtt"):
        precision = "bfloat16" if "bfloat16" in what else "float32"
        return trajectories.matching(int(what.partition("=")[2]), precision)
    if what.startswith("student-"):
        return bench.student(int(what.removeprefix("student-")))
    both: tuple[Side, Side] = getattr(bench, what.replace("-", "_"))()
    return both


def row(bench: Bench, what: str, repeats: int) -> dict[str, Any]:
    """Measure one row."""
    plain_side, fast_side = sides(bench, what)
    slow, peak_slow, expected = timed(plain_side, repeats)
    fast, peak_fast, found = timed(fast_side, repeats)
    apart = (found.cpu() - expected.cpu()).norm() / expected.cpu().norm()
    return {
        "what": what,
        "plain_s": round(slow, 5),
        "fast_s": round(fast, 5),
        "ratio": round(slow / fast, 2),
        "gflop": products(bench, what),
        "peak_plain": peak_slow,
        "peak_fast": peak_fast,
        # Under a bank another network is matched, so the images are not meant to be equal.
        "difference": None if what == "dm-bank" else float(apart),
    }


def measure(given: argparse.Namespace) -> None:
    """Measure the rows that were asked for and append them to the result file."""
    shape = (given.size,) * (3 if given.volumes else 2)
    bench = Bench(shape, given.width, given.channels, given.device)
    device, rate = bench.device, ceiling(bench.device)
    if not given.json:
        print(f"ceiling {rate:.0f} GFLOP/s in bfloat16 products", flush=True)
    common = {
        "shape": shape,
        "width": given.width,
        "channels": given.channels,
        "images": len(bench.real),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "ceiling_gflops": round(rate, 1),
        "repeats": given.repeats,
        "torch": torch.__version__,
        "version": __version__,
    }
    rows = []
    for what in given.only:
        found = row(bench, what, given.repeats)
        rows.append(found)
        jsonl.append(RESULTS, [{**found, **common}])
        if given.json:
            continue
        print(
            f"{what:<12} plain {found['plain_s']:.4f} s, fast {found['fast_s']:.4f} s, "
            f"ratio {found['ratio']:.1f}, difference {found['difference']}",
            flush=True,
        )
    if given.json:
        told = {"machine": common["device"], "ceiling_gflops": common["ceiling_gflops"]}
        print(json.dumps({**told, "rows": rows}))


def profiled(given: argparse.Namespace) -> None:
    """Say where the time of the fast path goes, and keep it in results/profile.json."""
    shape = (given.size,) * (3 if given.volumes else 2)
    bench = Bench(shape, given.width, given.channels, given.device)
    found = json.loads(PROFILE.read_text()) if PROFILE.is_file() else {}
    for what in given.only:
        _, fast = sides(bench, what)
        for _ in range(3):
            fast()
        with profile(activities=[ProfilerActivity.CPU]) as trace:
            for _ in range(3):
                fast()
        times = dict.fromkeys((*KINDS, "the rest"), 0.0)
        for event in trace.key_averages():
            kind = next((k for k, words in KINDS.items() if _has(event.key, words)), "the rest")
            times[kind] += event.self_cpu_time_total
        total = sum(times.values())
        key = f"{what}, {'x'.join(map(str, shape))}, width {given.width}"
        found[key] = {kind: round(spent / total, 3) for kind, spent in times.items()}
        print(key, found[key], flush=True)
    PROFILE.write_text(json.dumps(found, indent=1) + "\n")


def _has(name: str, words: Sequence[str]) -> bool:
    return any(word in name for word in words)


def profiles() -> list[str]:
    """Return the table of where the time goes."""
    if not PROFILE.is_file():
        return []
    lines = [PROFILES, "| what | " + " | ".join((*KINDS, "the rest")) + " |"]
    lines.append("|---" * (len(KINDS) + 2) + "|")
    for what, shares in json.loads(PROFILE.read_text()).items():
        cells = " | ".join(f"{100 * share:.0f}%" for share in shares.values())
        lines.append(f"| {what} | {cells} |")
    return lines


def table() -> None:
    """Write docs/speed.md from the result file."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for found in jsonl.read(RESULTS):
        key = (*(tuple(found[k]) if k == "shape" else found[k] for k in KEYS),)
        groups.setdefault(key, []).append(found)
    lines = [HEAD, *profiles()]
    for key, rows in groups.items():
        facts = dict(zip(KEYS, key, strict=True))
        side = "x".join(map(str, facts["shape"]))
        lines.append(
            f"\n## {side}, {facts['channels']} channel(s), ConvNet-3-{facts['width']}, "
            f"{facts['device']}, {facts['threads']} thread(s)\n"
        )
        rates = sorted({round(r["ceiling_gflops"]) for r in rows})
        reach = f"{rates[0]}" if len(rates) == 1 else f"{rates[0]} to {rates[-1]}"
        lines.append(
            f"{rows[0]['images']} images; products of bfloat16 matrices reach {reach} GFLOP/s.\n"
        )
        lines.append(
            "| what | plain, s | fast, s | ratio | ratio at the ceiling | of the ceiling | "
        )
        lines[-1] += "plain peak, MiB | fast peak, MiB | difference |"
        lines.append("|---" * 9 + "|")
        for r in rows:
            apart = "-" if r["difference"] is None else f"{r['difference']:.1e}"
            part = most = "-"
            rate = r["ceiling_gflops"]
            if r["gflop"] is not None:
                part = f"{r['gflop'] / r['fast_s'] / rate:.0%}"
                most = f"{r['plain_s'] * rate / r['gflop']:.1f}"
            lines.append(
                f"| {r['what']} | {r['plain_s']:.4f} | {r['fast_s']:.4f} | {r['ratio']:.1f} "
                f"| {most} | {part} | {r['peak_plain'] / 2**20:.0f} | {r['peak_fast'] / 2**20:.0f} "
                f"| {apart} |"
            )
    lines += scale()
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(TABLE)


def scale() -> list[str]:
    """Return the sections on what benchmarks/stream.py and memory.py measured."""
    lines = []
    if (stream := RESULTS.with_name("stream.jsonl")).exists():
        rows = jsonl.read(stream)
        spec = rows[0]["spec"]
        lines += [STREAM.format(**spec, family=spec["backbone"]["family"])]
        lines += ["| what | images | seconds | images / s | own, MiB | mapped, MiB |"]
        lines += ["|---|---|---|---|---|---|"]
        for r in rows:
            for part in r.get("parts", [r]):
                own, mapped = part["own_memory_bytes"] / 2**20, part["mapped_memory_bytes"] / 2**20
                lines.append(
                    f"| {r['what']} | {part['images']:,} | {part['seconds']:.0f} "
                    f"| {part['images_per_second']:,} | {own:.0f} | {mapped:.0f} |"
                )
        same = "equals" if rows[-1]["equals_whole"] else "DIFFERS from"
        lines.append(
            f"\nThe merged sketch of the halves {same} that of the whole, to the last bit."
        )
    if (memory := RESULTS.with_name("memory.json")).exists():
        lines += [MEMORY, "| method | backbone | images | own, GiB | mapped, GiB |"]
        lines += ["|---|---|---|---|---|"]
        for r in jsonl.read(memory):
            own, mapped = r["own_memory_bytes"] / 2**30, r["mapped_memory_bytes"] / 2**30
            lines.append(
                f"| {r['method']} | {r['backbone']} | {r['images']:,} | {own:.2f} | {mapped:.2f} |"
            )
    if (whole := RESULTS.with_name("whole.jsonl")).exists():
        lines += [
            WHOLE,
            "| what | sketch | synthesis | evaluation | AUC |",
            "|---|---|---|---|---|",
        ]
        for r in jsonl.read(whole):
            spent = " | ".join(f"{r[part]:.0f}" for part in ("sketch_s", "distill_s", "evaluate_s"))
            found = score(r["auc"])
            lines.append(f"| {r['what']} | {spent} | {found.mean:.3f} |")
    lines += evaluation()
    lines += [
        AGREEMENT,
        "| method | score | plain | fast | fast - plain |",
        "|---|---|---|---|---|",
    ]
    for name, what, scores in agreement.compared(jsonl.read(agreement.RESULTS)):
        cells = [f"{x.mean:.4f} [{x.low:.4f}, {x.high:.4f}]" for x in scores]
        lines.append(f"| {name} | {what.replace('_', ' ')} | {' | '.join(cells)} |")
    return lines


def evaluation() -> list[str]:
    """Return what evaluating a set costs beside distilling it with dm-bank."""
    name = "pneumoniamnist_dm_bank_{}.json"
    run, found = (json.loads(RESULTS.with_name(name.format(k)).read_text()) for k in PARTS)
    whole = run["seconds"] / run["steps"] * run["paper_steps"]
    facts = {name: f"{run[name]:,}" for name in ("steps", "paper_steps")}
    more = "less" if found["seconds"] < whole else "more"
    return [EVALUATION.format(**facts, more=more, spent=found["seconds"], whole=whole)]


PARTS = ("run", "evaluation")
EVALUATION = """
With the full arm from the cache, evaluating a set costs {more} than distilling it with dm-bank: on
PneumoniaMNIST, ten per class, ConvNet-3-64, all of the evaluation (five students an arm) took
{spent:.0f} s, and {paper_steps} steps of dm-bank take {whole:.0f} s at the rate of {steps}
(`benchmarks/results/pneumoniamnist_dm_bank_*.json`).
"""
AGREEMENT = """
## The same accuracy on both paths

`python benchmarks/agreement.py`: PneumoniaMNIST, ten images per class from real images (sketch:
from noise), 200 steps of dm and dm-bank, 40 of dc and dsa, all 600 of sketch, distilled and trained
in float32 uncompiled and in bfloat16 compiled; five seeds, validation split.
"""
STREAM = """
## A million images that are never in memory

`python benchmarks/stream.py`: phantom images of 28 pixels in a memory-mapped file, {networks}
networks ({family}, width {backbone[width]}), {frequencies} frequencies. "Own" is what the process
holds, "mapped" the pages of the file, which the system takes back when it wants them. The halves
ran in two processes at once.
"""
MEMORY = """
## Color images of 224 pixels

`python benchmarks/memory.py`: two steps at ten images per class from a memory-mapped set.
"""
WHOLE = """
## From the data to a score

`python benchmarks/whole.py`: `sketch` on PneumoniaMNIST, ten per class, ConvNet-3-128, seconds on
two threads. The evaluation is that of the synthetic arm, three pilots and five students; random and
full arms come from the cache. The defaults but for the scale of frequencies (1 here): four tiles an
image, students of 1,000 steps; the short way: whole images, students of 300 steps.
"""
PROFILES = """
`python benchmarks/speed.py profile` (torch's profiler): parts of the time of the fast path.
"""
KEYS = ("shape", "channels", "width", "device", "threads")
HEAD = """# Speed

Written by `python benchmarks/speed.py table` from `benchmarks/results/speed.jsonl`. Do not edit.

Each row runs a plain loop of our own, in the shape of the field's references (class after class,
float32, uncompiled, fresh network of torch's layers in each step), and our path (bfloat16,
compiled) in one process and in turn, on the same data (phantom images of that shape, two classes),
and takes the fastest of three of each (of the rounds of dc and dsa at 224 pixels, which take
minutes, one). The field's own code of DM takes 0.58 s a step on this kind of machine. The
difference is that of the results, relative to the plain ones: features, sketches, by how much one
step moves the images, a student's loss. Under a bank another network is matched, so there images
are not meant to be equal. Peaks are memory beyond what the process held before. "Of the ceiling" is
the part of the machine's measured rate of bfloat16 matrix products that the convolutions' own
products reach in the fast path, and "ratio at the ceiling" what no path of the same arithmetic can
beat on that machine. A round of dc or dsa trains its network for 50 of student-20's steps (that row
times five). In students-5 both sides are ours: five students in turn, and all at once by grouped
convolutions, as `evaluate` does on a GPU only. dp_merf is the gradient of one step in its generator
(500 images, 5,000 frequencies, whatever the width). "mtt T=N" is the gradient in the images of one
matching step over N steps of a student, float32 on both sides unless the row says bfloat16: the
plain one keeps the graph of all of them, ours parameter vectors alone, for which it walks twice.
Per step it makes 11 convolutions' worth of products, the plain loop 9 (up to 14 from 33 steps on,
where not all vectors are kept), so the wider the convolutions, the less is gained in float32. Cores
are shared, so times vary; ratios were measured side by side. On the H100 images of 28 pixels leave
the chip idle: both sides wait for kernels to be launched (convolutions reach two parts in a hundred
of its rate at most), so what saves arithmetic saves little there: steps of few images take up to
1.4 times as long as plain ones, features and sketches gain a third, and most what launches less:
`dm-bank`, and students at once.

Where a row of one channel, 28 pixels and width 128 falls short of this project's goal (4 for dc and
dsa, 3 for student-20), the profile below says why: the convolutions and their two backward products
run at the rate that the library's kernels reach on 20 small maps, and the compiled norm, activation
and pooling with their derivatives take most of the rest. Sums over space as reductions instead of
matrix products, one-pass variance, and blocks of 5 to 128 images were tried and are no faster. A
round of dc spends most of its time in fifty steps of its network, then in the gradient of 512 real
images; the second derivative of the synthetic side is compiled forward over backward.
"""


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="?", choices=("run", "table", "profile"), default="run")
    parser.add_argument("--json", action="store_true", help="print the rows as one JSON object")
    parser.add_argument("--only", nargs="+", choices=WHAT, default=WHAT)
    parser.add_argument("--size", type=int, default=28)
    parser.add_argument("--volumes", action="store_true", help="size^3 instead of size^2")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--channels", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=3, help="after one that warms up")
    given = parser.parse_args()
    if given.what == "table":
        table()
    elif given.what == "profile":
        profiled(given)
    else:
        measure(given)


if __name__ == "__main__":
    main()
