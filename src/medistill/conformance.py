"""What every method must do: checks that anybody can run on a method of their own.

A check takes a function that makes the method, and raises AssertionError with one sentence. Give
short methods (few iterations): a whole suite then takes a second or two.
"""

import dataclasses
import inspect
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from . import model
from .backbones import ConvNet
from .budget import Budget
from .distill import distill
from .errors import RunRefused, UsageError
from .methods import Method, Task
from .methods.random import Random
from .metrics import score
from .prepare import prepared
from .records import State, from_record, load_state, save_state, to_record
from .rng import Rng
from .sets import Card, RealSet, Splits, SyntheticSet, TaskKind, with_statistics

Make = Callable[[], Method]
Check = Callable[[Make], None]
IPC = 2
STEPS = 4  # of a run in most checks
LONG = 24  # steps after which the loss must be lower
MOST_LINES = 200
SEEDS = range(6)  # of sets that are compared with as many of random images


def check_method(make: Make) -> None:
    """Run every check on the method that `make` returns.

    Raises: AssertionError when the method fails one (its message says which rule).

    Example:
        >>> from medistill.methods import Random
        >>> check_method(Random)
    """
    for check in CHECKS:
        check(make)


def toy(
    kind: TaskKind = "multi-class", *, channels: int = 1, counts: tuple[int, ...] = (9, 12, 15)
) -> RealSet:
    """Return a real set of 8x8 images: noise, and a bright band whose height is the class.

    In multi-label sets every third image is said to have the next class as well.
    """
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    images = _bands(labels, channels, 120, 120, Rng(0).at("toy", channels))
    if kind == "multi-label":
        labels = torch.nn.functional.one_hot(labels, len(counts))
        labels[::3] |= labels[::3].roll(1, 1)
    card = Card("toy", kind, tuple(f"class {c}" for c in range(len(counts))), channels, (8, 8))
    return _alone(images, labels, card)


def noisy(seed: int, per_class: int) -> RealSet:
    """Return a real set of 8x8 images of three classes: faint bands under strong noise."""
    labels = torch.arange(3).repeat_interleave(per_class)
    images = _bands(labels, 1, 220, 30, Rng(seed).at("noisy"))
    card = Card("noisy", "multi-class", ("top", "middle", "bottom"), 1, (8, 8))
    return _alone(images, labels, card)


def _bands(
    labels: Tensor, channels: int, noise: int, band: int, generator: torch.Generator
) -> Tensor:
    """Return noise below `noise`, brighter by `band` at the height of each image's class."""
    images = torch.randint(0, noise, (len(labels), channels, 8, 8), generator=generator)
    for image, label in zip(images, labels.tolist(), strict=True):
        image[:, 2 * label : 2 * label + 2] += band
    return images


def _alone(images: Tensor, labels: Tensor, card: Card) -> RealSet:
    """Return a set with the statistics of its own images."""
    part = RealSet(images.to(torch.uint8), labels, card)
    return with_statistics(Splits(part, part, part)).train


def toy_task(real: RealSet | None = None, *, ipc: int = IPC) -> Task:
    """Return a task on a toy set with the smallest network."""
    return Task(toy() if real is None else real, Budget(ipc=ipc), ConvNet(depth=1, width=8))


def check_shapes(make: Make) -> None:
    """Sizes, types and labels fit the budget and the data, for one image per class and more."""
    for ipc in (1, IPC + 1):
        _check_run(make(), toy_task(ipc=ipc))


def check_channels(make: Make) -> None:
    """Gray and color images alike."""
    for channels in (1, 3):
        _check_run(make(), toy_task(toy(channels=channels)))


def check_tasks(make: Make) -> None:
    """Every kind of task that the method declares runs; every other is refused."""
    _require(bool(make().tasks), "found no declared task; expected `tasks` to name one or more")
    for kind in get_args(TaskKind):
        task = toy_task(toy(kind, counts=(9, 12) if kind == "binary" else (9, 12, 15)))
        if kind in make().tasks:
            _check_run(make(), task)
        else:
            refused = _raises(UsageError, partial(distill, make(), task, seed=0, steps=1))
            _require(refused, f"an undeclared {kind} task ran; expected a UsageError")


def check_unequal(make: Make) -> None:
    """A budget dealt unequally gives each class its share; a small class may be taken whole."""
    for budget in (
        Budget(images=8, share="proportional"),
        Budget(images=9, share="sqrt"),
        Budget(ipc=4, small="whole"),
    ):
        real = toy(counts=(12, 3, 9))
        _check_run(make(), Task(real, budget, ConvNet(depth=1, width=8)))


def check_small_class(make: Make) -> None:
    """A class smaller than the budget, or empty, is refused; one of its very size is not."""
    for few in (0, 1):
        refused = _raises(RunRefused, partial(toy_task, toy(counts=(9, few, 9))))
        _require(refused, f"a class of {few} images ran for {IPC} per class; expected RunRefused")
    distill(make(), toy_task(toy(counts=(9, IPC, 9))), seed=0, steps=1)


def check_seed(make: Make) -> None:
    """The same seed gives the same bits, another seed (of every stream) another set."""
    first, again = (_by_hand(make(), toy_task(), seed=0) for _ in range(2))
    _require(_equal(first, again), "one seed gave two sets; expected the same bits")
    others = [_by_hand(make(), toy_task(), seed=seed) for seed in (1, 2, 3)]
    _require(
        not all(torch.equal(first.images, other.images) for other in others),
        "four seeds gave one set; expected draws that depend on the seed",
    )


def check_global_generator(make: Make) -> None:
    """The global generator of torch is left as it was."""
    before = torch.default_generator.get_state()
    distill(make(), toy_task(), seed=0, steps=STEPS)
    moved = not torch.equal(torch.default_generator.get_state(), before)
    _require(not moved, "the global generator moved; expected draws from `rng` alone")


def check_real_set(make: Make) -> None:
    """The real set is left as it was."""
    real = toy()
    images, labels = real.images.clone(), real.labels.clone()
    distill(make(), toy_task(real), seed=0, steps=STEPS)
    _require(torch.equal(real.images, images), "pixels of the real set changed; expected none to")
    _require(torch.equal(real.labels, labels), "labels of the real set changed; expected none to")


def check_state(make: Make) -> None:
    """State is a flat dict of tensors that counts its steps; no call changes what it was given."""
    method, rng = make(), Rng(0)
    task = _with_prepared(method, toy_task(), rng)
    state = method.init(task, rng)
    for done in range(STEPS):
        _check_kind(state, done if method.steps(task) else 0)
        given, shared = _copy(state), _copy(task.prepared)
        after, _ = method.step(state, task, rng)
        _require(_same(state, given), "step changed the state it was given; expected a new one")
        method.finish(state, task, rng)
        _require(_same(state, given), "finish changed the state it was given; expected it kept")
        _require(_same(task.prepared, shared), "step changed what was prepared; expected it kept")
        state = after


def check_resume(make: Make) -> None:
    """A run resumed from a file gives the same bits, though another run came between."""
    method, task = make(), toy_task()
    total = min(STEPS, method.steps(task))
    whole = distill(make(), task, seed=1, steps=total)
    kept = [method.init(_with_prepared(method, task, None), Rng(1))]
    distill(method, task, seed=1, steps=total // 2, on_step=lambda state, log: kept.append(state))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "checkpoint.safetensors")
        save_state(path, kept[-1], {})
        distill(make(), task, seed=2, steps=STEPS - 1)
        state, _ = load_state(path)
    resumed = distill(make(), task, seed=1, steps=total, resume=state)
    _require(
        _equal(resumed, whole),
        "a resumed run differs; expected draws by state['step'] and nothing kept on the method",
    )


def check_fields(make: Make) -> None:
    """Hyper-parameters are the fields of a frozen dataclass; they survive JSON, no other passes."""
    method = make()
    frozen = _raises(dataclasses.FrozenInstanceError, partial(setattr, method, "start", "noise"))
    _require(frozen, f"{type(method).__name__} is no frozen dataclass; expected one")
    record = to_record(method)
    _require("start" in record, "found no field `start`; expected noise, real or class-mean")
    _require(
        from_record(type(method), record) == method,
        "the settings changed on their way through JSON; expected plain fields",
    )
    refused = _raises(UsageError, partial(from_record, type(method), {**record, "unknown": 1}))
    _require(refused, "an unknown field passed; expected a UsageError")


def check_no_other_split(make: Make) -> None:
    """All that a method is given holds one real set: the training split."""
    task = toy_task()
    held = [*vars(make()).values(), *(getattr(task, f.name) for f in dataclasses.fields(Task))]
    sets = [value for value in held if isinstance(value, RealSet | Splits | SyntheticSet)]
    _require(
        len(sets) == 1 and sets[0] is task.real,
        f"found {len(sets)} image sets within a method's reach; expected the training split alone",
    )


def check_origin(make: Make) -> None:
    """The set says truly where it comes from, above all whether it holds a real image."""
    method, real = make(), toy()
    synthetic = distill(method, toy_task(real), seed=7, steps=STEPS)
    origin = synthetic.origin
    found = (origin.method, origin.settings, origin.seed, origin.start, origin.data_digest)
    expected = (method.name, to_record(method), 7, method.start, real.card.digest)
    _require(found == expected, f"found the origin {found}; expected {expected}")
    soft = not bool((synthetic.labels.max(1).values == 1).all())
    _require(
        soft <= method.soft_labels,
        "found soft labels; expected the method's soft_labels to be True, or one class an image",
    )
    pixels = real.images.float().div(255).flatten(1)
    apart = torch.cdist(synthetic.images.flatten(1), pixels).min()
    _require(
        origin.real_pixels or float(apart) > 0.1,
        "found a real image in the set; expected origin.real_pixels to be True",
    )


def check_loss_falls(make: Make) -> None:
    """Under the draws of the first step, the loss is lower after some steps (if there are any)."""
    method, rng = make(), Rng(0)
    task = _with_prepared(method, toy_task(), rng)
    start = state = method.init(task, rng)
    for _ in range(min(LONG, method.steps(task))):
        state, _ = method.step(state, task, rng)
    if state is start:
        return
    before = method.step(start, task, rng)[1]["loss"]
    after = method.step({**state, "step": start["step"]}, task, rng)[1]["loss"]
    _require(after < before, f"the loss went from {before:.4g} to {after:.4g}; expected it to fall")


def check_beats_random(make: Make) -> None:
    """Where it is declared, one image per class teaches more than one random real image does.

    Images are so noisy that one of a class says little. Six sets of either kind, from six seeds,
    each teach a student of their own; the lower end of the interval of the mean difference in
    accuracy on other images must be above nought.
    """
    if not make().beats_random:
        return
    own, base = (_accuracies(maker) for maker in (make, Random))
    gain = score([a - b for a, b in zip(own, base, strict=True)])
    assert gain.low is not None
    _require(
        gain.low > 0,
        f"found a gain of {gain.mean:+.2f} in accuracy over random images, {gain.low:+.2f} at the "
        "interval's lower end; expected more than nought, or beats_random = False",
    )


def check_documented(make: Make) -> None:
    """The docstring names its source with the paper's number, and every departure from it."""
    method = make()
    text = " ".join((inspect.getdoc(type(method)) or "").split())
    for part in ("Source:", "Departures:", method.paper):
        _require(part in text, f"found no {part!r} in the docstring of {method.name}; expected it")


def check_short(make: Make) -> None:
    """The method's file can be read at one sitting."""
    path = Path(inspect.getfile(type(make())))
    lines = len(path.read_text(encoding="utf-8").splitlines())
    _require(lines < MOST_LINES, f"{path.name} has {lines} lines; expected fewer than {MOST_LINES}")


CHECKS: tuple[Check, ...] = (
    check_shapes,
    check_channels,
    check_tasks,
    check_unequal,
    check_small_class,
    check_seed,
    check_global_generator,
    check_real_set,
    check_state,
    check_resume,
    check_fields,
    check_no_other_split,
    check_origin,
    check_loss_falls,
    check_beats_random,
    check_documented,
    check_short,
)


def _require(holds: bool, message: str) -> None:
    # Not an assert statement: these vanish under `python -O`.
    if not holds:
        raise AssertionError(message)


def _raises(kind: type[Exception], call: Callable[[], object]) -> bool:
    try:
        call()
    except kind:
        return True
    return False


def _accuracies(make: Make) -> list[float]:
    """Return the accuracy of a student of each of six sets of one noisy image per class."""
    task = Task(noisy(0, per_class=24), Budget(ipc=1), ConvNet(depth=1, width=8))
    test, found = noisy(1, per_class=60), []
    with tempfile.TemporaryDirectory() as folder:
        for seed in SEEDS:
            made = distill(make(), task, seed=seed, cache=Path(folder))
            recipe = dataclasses.replace(made.recipe, steps=60, stop=60)
            network = model.train(made, recipe, seed=seed)
            found.append(model.test(network, test, recipe, made.card)["accuracy"])
    return found


def _check_run(method: Method, task: Task) -> None:
    """Check the sizes, types and labels of the set that a short run gives."""
    synthetic = distill(method, task, seed=0, steps=STEPS)
    images, labels, classes = synthetic.images, synthetic.labels, task.classes
    found, m = tuple(images.shape), task.total
    expected = (m, *task.real.images.shape[1:])
    _require(found == expected, f"found images of shape {found}; expected {expected}")
    _require(images.dtype == torch.float32, f"found {images.dtype}; expected float32 images")
    _require(bool(images.isfinite().all()), "found images that are not finite; expected numbers")
    fits = labels.dtype == torch.float32 and tuple(labels.shape) == (m, classes)
    _require(fits, f"found labels {labels.dtype} {tuple(labels.shape)}; expected float32 [m, k]")
    if task.real.card.task != "multi-label":
        whole = torch.allclose(labels.sum(1), torch.ones(m))
        _require(whole, "found labels with other sums; expected rows that sum to 1")
        counts = tuple(labels.argmax(1).bincount(minlength=classes).tolist())
        _require(counts == task.counts, f"found {counts} images by class; expected {task.counts}")
    else:
        _require(bool((labels.sum(1) > 1).any()), "found no image with two labels; expected some")
        _require(bool(labels.any(0).all()), "found a label that no image has; expected all")


def _check_kind(state: State, done: int) -> None:
    plain = all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())
    _require(plain, "found a state with other values; expected a flat dict of tensors")
    _require("step" in state, "found no state['step']; expected the number of steps done")
    _require(int(state["step"]) == done, f"found step {int(state['step'])}; expected {done}")


def _with_prepared(method: Method, task: Task, rng: Rng | None) -> Task:
    """Fill in what the method prepares: from `rng`, or as `distill` does."""
    state = prepared(method, task, None) if rng is None else method.prepare(task, rng)
    return dataclasses.replace(task, prepared=state)


def _by_hand(method: Method, task: Task, *, seed: int) -> SyntheticSet:
    """Run a method without `distill`, whose preparation has the same stream for every seed."""
    rng = Rng(seed)
    task = _with_prepared(method, task, rng)
    state = method.init(task, rng)
    for _ in range(min(STEPS, method.steps(task))):
        state, _ = method.step(state, task, rng)
    return method.finish(state, task, rng)


def _copy(state: State) -> State:
    return {name: tensor.clone() for name, tensor in state.items()}


def _same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def _equal(one: SyntheticSet, other: SyntheticSet) -> bool:
    return torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)
