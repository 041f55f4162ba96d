"""`phantom`: a built-in, offline set of parametric anatomy whose difficulty is one number."""

import math

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from ..errors import UsageError
from ..rng import Rng
from ..sets import Card, RealSet, Splits, TaskKind
from .phantom_table import ANATOMIES, COMMON, LESIONS, PARTS, Anatomy, Law
from .source import Source, Where

OPTIONS = ("variation", "classes", "size", "channels", "n", "seed", "task")
TASKS: tuple[TaskKind, ...] = ("multi-class", "ordinal", "multi-label")
MOST = len(ANATOMIES)
_BLOCK = 128  # images drawn at once; part of what a seed means
_LESION = 0.21  # brightness of a lesion at strength 1


def load(source: Source, where: Where) -> Splits:
    """Draw the phantom; the same options and seed give the same bits on one kind of processor.

    Another kind rounds sines and exponentials otherwise: of a million pixels about five differ by
    one gray level.

    At variation 0 the classes share one anatomy and one modality and differ by the texture of a
    faint lesion; at variation 1 each class is an anatomy and a modality of its own. In between,
    parts and imaging laws move by variation^2 from the common ones toward the class's own.
    Every image has its own pose, organ shapes, contrast, uneven brightness and noise, and a plain
    spot that means nothing. Options:

        variation=0.2  0 to 1           classes=2   2 to 12       size=28   16 to 512
        channels=1     1 or 3           n=1000      training images; val n / 5, test n / 2
        seed=SEED      default the seed of the run
        task=ordinal   one anatomy, one lesion; the classes are its grades, from none to plain
        task=multi-label   one anatomy; each lesion is there or not, by itself

    Raises: UsageError when an option is out of range.
    """
    variation = source.number("variation", 0.2, 0, 1)
    classes = source.integer("classes", 2, 2, MOST)
    size = source.integer("size", 28, 16, 512)
    channels = source.integer("channels", 1, 1, 3)
    images = source.integer("n", 1000, 10 * classes, 1_000_000)
    if channels == 2:
        raise UsageError("phantom: found channels=2; expected 1 or 3")
    task = source.options.get("task", "multi-class")
    if task not in TASKS:
        raise UsageError(f"phantom: found task={task}; expected {', '.join(TASKS)}")
    if task == "multi-label" and classes == MOST:
        raise UsageError(f"phantom: found classes={MOST}; expected at most {MOST - 1} lesions")
    if task != "multi-class" and "variation" in source.options:
        raise UsageError(f"phantom: found variation beside task={task}, which has one anatomy")
    own = [anatomy.name for anatomy in ANATOMIES] if variation >= 0.5 else list(LESIONS)
    given = ",".join(f"{key}={value}" for key, value in sorted(source.options.items()))
    names = {
        "multi-class": tuple(own[:classes]),
        "ordinal": tuple(f"grade {grade}" for grade in range(classes)),
        "multi-label": tuple(LESIONS)[1 : classes + 1],
    }[task]
    card = Card(
        name=f"phantom:{given}" if given else "phantom",
        task="binary" if task == "multi-class" and classes == 2 else task,
        classes=names,
        channels=channels,
        shape=(size, size),
        modality="simulated",
        license="CC0 1.0",
        citation="medistill phantom",
        flips=True,
    )
    rng = Rng(source.integer("seed", where.seed, 0, 1 << 53)).child("phantom")
    counts = {"train": images, "val": images // 5, "test": images // 2}
    scenes = _Scenes(variation if task == "multi-class" else 0.0, classes, task)
    return Splits(*(_split(scenes, card, n, rng.child(name)) for name, n in counts.items()))


class _Scenes:
    """Parts, laws and lesions of every class at one variation, as tensors."""

    def __init__(self, variation: float, classes: int, task: str = "multi-class") -> None:
        def mix(common: Tensor, own: Tensor) -> Tensor:
            return common + variation**2 * (own - common)

        chosen = ANATOMIES[:classes]
        self.parts = torch.stack([mix(_parts(COMMON), _parts(one)) for one in chosen])
        self.laws = torch.stack([mix(_law(COMMON.law), _law(one.law)) for one in chosen])
        kinds = torch.tensor(list(LESIONS.values()))
        self.lesions = kinds[:classes]
        if task == "ordinal":
            self.lesions = kinds[3].repeat(classes, 1)
            self.lesions[:, :-1] *= torch.linspace(0, 1.5, classes).view(-1, 1)
        if task == "multi-label":
            self.lesions = kinds[1 : classes + 1]


def _parts(anatomy: Anatomy) -> Tensor:
    return torch.tensor(anatomy.parts)


def _law(law: Law) -> Tensor:
    return torch.tensor((*law[:-1], *law.tint))


def _split(scenes: _Scenes, card: Card, count: int, rng: Rng) -> RealSet:
    """Draw one split: balanced labels in random order, then the images block by block."""
    labels = torch.arange(count) % len(card.classes)
    labels = labels[torch.randperm(count, generator=rng.at("labels"))]
    if card.task == "multi-label":
        shape = (count, len(card.classes))
        labels = (torch.rand(shape, generator=rng.at("several")) < 0.3).long()
    images = torch.empty((count, card.channels, *card.shape), dtype=torch.uint8)
    for number, start in enumerate(range(0, count, _BLOCK)):
        block = slice(start, start + _BLOCK)
        generator = rng.at("block", number)
        images[block] = _render(scenes, labels[block], card, generator)
    return RealSet(images, labels, card)


def _render(scenes: _Scenes, labels: Tensor, card: Card, generator: torch.Generator) -> Tensor:
    """Draw images uint8 [n, c, h, h] of the classes in `labels`."""
    n, size = len(labels), card.shape[0]
    several = labels if labels.ndim == 2 else None
    if several is not None:
        labels = torch.zeros(n, dtype=torch.int64)

    def normal(*shape: int) -> Tensor:
        return torch.randn(n, *shape, generator=generator)

    air, gamma, noise, rician, speckle, edge, bias, ribs = (
        scenes.laws[labels, column].view(n, 1, 1) for column in range(8)
    )
    x, y = _pose(size, normal(5))
    image, body = _paint(x, y, scenes.parts[labels], air, edge, normal(PARTS, 5))
    image = image + body * ribs * torch.cos(math.pi * (7 * y + 3 * x.abs() + normal(1, 1)))
    if several is None:
        image = image + body * _spots(x, y, scenes.lesions[labels], normal(7))
    else:
        for lesion, there in zip(scenes.lesions, several.T, strict=True):
            spot = _spots(x, y, lesion.expand(n, -1), normal(7))
            image = image + 1.5 * body * spot * there.view(n, 1, 1)
    image = image.clamp(0, 1) ** (gamma * torch.exp(0.15 * normal(1, 1)))
    line = torch.linspace(-1, 1, size)
    tilt = normal(2, 1) * line
    field = tilt[:, 0, :, None] + tilt[:, 1, None, :] + 0.5 * normal(1, 1) * (line**2)[:, None]
    image = image * torch.exp(bias * 0.6 * field)
    grain = avg_pool2d(normal(1, size, size), 3, 1, 1, count_include_pad=False)[:, 0]
    image = image * (1 + speckle * 2.2 * grain).clamp_min(0)
    image = image * (1 + 0.1 * normal(1, 1)) + 0.02 * normal(1, 1)
    image = image + noise * normal(size, size)
    image = torch.sqrt(image**2 * (image > 0) + (rician * noise * normal(size, size)) ** 2)
    channels = image[:, None]
    if card.channels == 3:
        tint = scenes.laws[labels, 8:]
        tint = tint + 0.1 * (1 - tint) * normal(3)
        channels = channels * tint[:, :, None, None]
    return channels.mul(255).round_().clamp_(0, 255).to(torch.uint8)


def _pose(size: int, draw: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates [n, h, h] of a frame turned, moved and stretched by chance."""
    line = (torch.arange(size) + 0.5) * 2 / size - 1
    angle, right, down, zoom, stretch = draw.t()[:, :, None, None]
    x, y = line - 0.05 * right, line[:, None] - 0.05 * down
    turn = 0.09 * angle
    scale = torch.exp(0.06 * zoom)
    cosine, sine = torch.cos(turn), torch.sin(turn)
    wide = torch.exp(0.05 * stretch)
    return (cosine * x + sine * y) / (scale * wide), (cosine * y - sine * x) / scale * wide


def _paint(
    x: Tensor, y: Tensor, parts: Tensor, air: Tensor, edge: Tensor, draw: Tensor
) -> tuple[Tensor, Tensor]:
    """Paint soft ellipses over each other; return the image and the body's mask, [n, h, h]."""
    image, body = air.expand_as(x), torch.zeros_like(x)
    for number in range(PARTS):
        across, down, half, tall, angle, value = parts[:, number].t()[:, :, None, None]
        jitter = draw[:, number].t()[:, :, None, None]
        across, down = across + 0.02 * jitter[0], down + 0.02 * jitter[1]
        half, tall = half * torch.exp(0.08 * jitter[2]), tall * torch.exp(0.08 * jitter[3])
        turn = torch.deg2rad(angle)
        cosine, sine = torch.cos(turn), torch.sin(turn)
        u = (cosine * (x - across) + sine * (y - down)) / half
        v = (cosine * (y - down) - sine * (x - across)) / tall
        # (1 - r) times the smaller half axis is close to the distance from the edge.
        depth = (1 - torch.sqrt(u**2 + v**2)) * torch.minimum(half, tall)
        mask = torch.sigmoid(depth / edge)
        image = image + mask * (value + 0.04 * jitter[4] - image)
        body = torch.maximum(body, mask)
    return image, body


def _spots(x: Tensor, y: Tensor, lesions: Tensor, draw: Tensor) -> Tensor:
    """The class's lesion and a plain spot of either sign, somewhere in the middle, [n, h, h]."""
    place = draw[:, :, None, None]
    flat, ring, stripe, mesh, radius = lesions.t()[:, :, None, None]
    u = (x + 0.1 - 0.22 * place[:, 0]) / radius
    v = (y - 0.16 * place[:, 1]) / radius
    turn = math.pi * place[:, 2]
    along = torch.cos(turn) * u + torch.sin(turn) * v
    aside = torch.cos(turn) * v - torch.sin(turn) * u
    r2 = u**2 + v**2
    waves = torch.cos(3.5 * along)
    texture = flat + ring * (r2 - 1) + stripe * waves + mesh * waves * torch.cos(3.5 * aside)
    strength = torch.exp(0.35 * place[:, 3])
    lesion: Tensor = strength * texture * torch.exp(-r2 / 2)
    far = ((x - 0.35 * place[:, 4]) ** 2 + (y - 0.25 * place[:, 5]) ** 2) / 0.02
    plain = 0.6 * place[:, 6] * torch.exp(-far / 2)
    return (lesion + plain) * _LESION
