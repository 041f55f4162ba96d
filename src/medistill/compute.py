"""How numbers are computed: in which precision, in which blocks, compiled or not."""

import math
import os
import resource
import shlex
import shutil
import sys
import sysconfig
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, ParamSpec, TypeVar

import torch
from torch import Tensor

from .errors import UsageError

# Images of up to 32 x 32 pixels at once; fewer of larger ones. Larger blocks leave the cache and
# cost up to twice as much on two CPU cores; small blocks leave most of a GPU idle.
BLOCK = 32
GPU_BLOCK = 1024
FEW = 3  # blocks: more are hardly longer by a last one that is filled up
BLOCK_PIXELS = 32 * 32
# Compiling took 7 to 35 s on two cores, and made steps about half as long.
REPAYS_S = 90.0
Mode = Literal["auto", "on", "off"]
_STATUS = Path("/proc/self/status")
# What torch's compiler says of its own doings.
QUIET = (
    r"The \.grad attribute of a Tensor that is not a leaf",
    r".torch\.jit\.script(_method)?. is deprecated",
    r"<class 'torch\.autograd\.function\.Function'> should not be instantiated",
)

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Compute:
    """How numbers are computed; results differ by rounding alone.

    `precision` is that of the real images' way through a network and of training: bfloat16 rounds
    pixels, maps and parameters on their way in, and keeps norms, sums over images and what is
    trained in float32. Gradients in synthetic images are float32 but where students walk along
    experts: there a step rounds as training does (cosine to float32 0.998 over 30 steps of
    ConvNet-3-128); and what a generator of `dp_merf` makes meets its frequencies rounded. `compile`
    is for steps and students; it costs some seconds for each architecture and size of block, and
    pays on long runs.
    """

    precision: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """The torch name of `precision`."""
        return torch.bfloat16 if self.precision == "bfloat16" else torch.float32

    def path(self, function: Callable[P, R]) -> Callable[P, R]:
        """Return a function as it is, or compiled where that is wanted."""
        return _compiled(function) if self.compile else function

    def blocks(
        self, *tensors: Tensor, whole: bool = False, fill: bool = False
    ) -> Iterator[tuple[Tensor, ...]]:
        """Yield blocks of equally long tensors that fit the cache (or one block of all).

        A compiled path knows few sizes, so there the last block is filled up with zeros; where few
        blocks would gain more than a tenth by that, they are even instead. With `fill` every block
        has the same size however many images there are, so that what is computed of an image does
        not depend on how many others there are.
        """
        size = len(tensors[0]) if whole else block_size(tensors[0])
        if fill and not whole:
            size = full_block(tensors[0])
        elif self.compile:
            size = _even(len(tensors[0]), size)
        for block in zip(*(tensor.split(size) for tensor in tensors), strict=True):
            missing = size - len(block[0])
            if missing and (self.compile or fill):
                block = tuple(torch.cat([t, t.new_zeros(missing, *t.shape[1:])]) for t in block)
            yield block


PLAIN = Compute()


def has_compiler() -> bool:
    """Say whether what torch compiles with is here: a C++ compiler and Python's headers."""
    words = shlex.split(os.environ.get("CXX", "g++"))
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    return bool(words and shutil.which(words[0])) and headers.is_file()


def require_compiler() -> None:
    """Refuse to compile where it cannot be done.

    Raises: UsageError when there is no C++ compiler, or Python came without its headers.
    """
    if not has_compiler():
        raise UsageError(
            "found no C++ compiler with Python's headers; expected g++ (or $CXX) and python3-dev "
            "for --compile on: install them, or use --compile auto"
        )


def _even(count: int, size: int) -> int:
    """Return the size of blocks, smaller than `size` where filling up the last would be dear."""
    number = -(-count // max(size, 1))
    dear = number <= FEW and number * size > 1.1 * count
    return -(-count // number) if dear else size


def full_block(images: Tensor) -> int:
    """Return how many images of this shape a full block holds where they lie."""
    most = BLOCK if images.device.type == "cpu" else GPU_BLOCK
    # torch convolves a single volume on one thread without its fast kernels.
    least = 1 if images.ndim == 4 else 2
    return max(least, min(most, most * BLOCK_PIXELS // math.prod(images.shape[2:])))


def block_size(images: Tensor) -> int:
    """Return how many of these images go through a network at once."""
    return min(len(images), full_block(images))


def whole_batches(batch: int, shape: Sequence[int]) -> int:
    """Return how many batches of images of this shape, each whole, fill a GPU as one block does."""
    return max(1, GPU_BLOCK * BLOCK_PIXELS // (batch * math.prod(shape)))


def worth_compiling(mode: Mode, unit: Callable[[], object], times: float) -> bool:
    """Say whether to compile work that does `unit` so many times: `auto` measures one.

    `auto` compiles where the work would take over REPAYS_S seconds as it is, and never without a
    C++ compiler.
    Raises: UsageError when there is no such mode, or `on` cannot be done.
    """
    if mode not in ("auto", "on", "off"):
        raise UsageError(f"found --compile {mode}; expected auto, on or off")
    if mode == "on":
        require_compiler()
    if mode != "auto" or not has_compiler():
        return mode == "on"
    unit()  # the first one also warms up
    _finished()
    begin = time.perf_counter()
    unit()
    _finished()
    return (time.perf_counter() - begin) * times > REPAYS_S


def _finished() -> None:
    """Wait for a GPU, where this process uses one."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def find_device(name: str) -> torch.device:
    """Return the device that `auto`, `cpu` or `cuda` stands for (auto: a GPU where there is one).

    Raises: UsageError when there is no GPU, or no such name.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise UsageError(f"found device {name!r}; expected auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("found no GPU that torch can use; expected one for cuda: use auto or cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    # float32 means float32, as on a CPU; bfloat16 is there for those who want it fast.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    return torch.device("cuda")


def peak_memory() -> int:
    """Return the peak resident memory in bytes, of this process or of its largest worker."""
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    own, workers = (resource.getrusage(one).ru_maxrss for one in who)
    if _STATUS.is_file():  # getrusage's own may be that of the process which started this one
        lines = _STATUS.read_text(encoding="utf-8").splitlines()
        own = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    peak = max(own, workers)
    return peak if sys.platform == "darwin" else peak * 1024


def forget_peak() -> None:
    """Count the peak of this process from now on, where the system lets it."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


@cache
def _compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Return a function compiled for each size of block; fresh networks share the code.

    Raises: UsageError when there is no C++ compiler.
    """
    require_compiler()
    # The default of 8 is below the sizes and architectures that one study meets. Beyond the limit
    # torch would go on uncompiled without a word: slower, and rounded by what came before.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 4096
    with quietly():
        compiled = torch.compile(function, dynamic=False)

    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with quietly():
            return compiled(*args, **kwargs)

    return run


@contextmanager
def quietly() -> Iterator[None]:
    """Keep torch from warning of its own doings."""
    with warnings.catch_warnings():
        for text in QUIET:
            warnings.filterwarnings("ignore", text)
        yield
