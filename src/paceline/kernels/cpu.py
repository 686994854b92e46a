"""The CPU's kernel: PACE in one pass over memory, built once for a machine by its C++ compiler.

The library is kept in the cache folder, if nobody else can write there. It takes tensors of any
size and number and any scalars without being built again. `paceline.update` is the same rule
without a compiler.
"""

import contextlib
import ctypes
import functools
import hashlib
import math
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import files
from ..cache import code_folder, is_ours
from ..update import MovedSlot, PullScalars, Scalars, Slot

DTYPES = {  # of parameters and state: how cpu.cpp numbers them
    (torch.float32, torch.float32): 0,
    (torch.float32, torch.bfloat16): 1,
    (torch.bfloat16, torch.float32): 2,
    (torch.bfloat16, torch.bfloat16): 3,
    (torch.float64, torch.float64): 4,
}
# Of a row of the table, as cpu.cpp's Row has them.
GRAD, KEY, ROW = 1, 6, 9
FLAGS = [
    "-std=c++17",
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-shared",
    "-fPIC",
    "-pthread",
]


class BuildError(RuntimeError):
    """The kernel cannot be built or loaded here; the message says why."""


class Kernel:
    """The kernel for some tensors; its table of their addresses is kept between steps.

    Args:
        slots: tensors of one pair of dtypes, none with a `kernels.reason_against`. Gradients and
            keys of stochastic rounding are given at each step.
        counts: of each tensor its count of steps, 0-dim float64.
    """

    def __init__(self, slots: list[Slot], counts: list[Tensor]) -> None:
        self.count, self.extra = len(slots), len(slots[0].extra)
        self.dtypes = DTYPES[slots[0].param.dtype, slots[0].exp_avg.dtype]
        self.table = array("q")
        for x, count in zip(slots, counts, strict=True):
            tensors = (x.param, x.exp_avg, x.exp_avg_sq, x.average, count, *x.extra)
            param, m, v, average, steps, *extra = map(Tensor.data_ptr, tensors)
            size = x.param.numel()
            self.table.extend((param, 0, m, v, average, size, 0, x.start, steps, *extra))

    def step(
        self, grads: list[Tensor], keys: list[Any] | None, s: Scalars, *, measure: bool
    ) -> list[dict[str, Any]]:
        """`update.step_` in one pass, without measurements."""
        grads = [g.contiguous() for g in grads]  # kept while their addresses are in use
        row = ROW + self.extra
        self.table[GRAD::row] = array("q", map(Tensor.data_ptr, grads))
        if keys:
            self.table[KEY::row] = array("q", keys)
        step = array("d", map(float, numbers(s)))
        skipped = build().step(
            self.table.buffer_info()[0],
            self.count,
            step.buffer_info()[0],
            self.extra,
            self.dtypes,
            0 if not s.gain else 2 if s.uniform_gain else 1,
            s.stochastic,
            torch.get_num_threads(),
            _openmp(),
        )
        return [{"skipped": skipped}]


def numbers(s: Scalars) -> tuple[float | Tensor, ...]:
    """A step's numbers, as cpu.cpp's Step and gpu.py have them."""
    return (
        1.0 - s.beta1,
        s.beta2,
        1.0 - s.beta2,
        s.eps,
        1.0 / s.root_bias2,
        s.step_size,
        s.shrink,
        s.gain,
        1.0 if s.clip else math.inf,
        s.weight,
        -1.0 if s.maximize else 1.0,
        s.skip_nonfinite,
        *s.extra_weights,
    )


def pull_numbers(p: PullScalars) -> tuple[float | Tensor, ...]:
    """A pull's numbers, as cpu.cpp's and gpu.py's `follow` have them."""
    cap = 1.0 if p.clip else math.inf
    return (p.gain, 1.0 / p.root_bias2, p.eps, cap, p.weight, *p.extra_weights)


def follow(slots: list[MovedSlot], pull: PullScalars) -> None:
    """`update.pull_` in one pass over memory, without measurements.

    A gain of 0 is no pull: then an average that is not finite moves no weights.

    Args:
        slots: tensors alike in dtypes and in what they have, contiguous.
        pull: the numbers.
    """
    first, v = slots[0], slots[0].second_moment
    uniform, watches = v is None, first.before is None or not pull.gain
    table = array("q")
    for x in slots:
        tensors = (x.param, x.before, x.average, x.second_moment)
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        table.extend([*addresses, x.param.numel(), *map(Tensor.data_ptr, x.extra)])
    given = array("d", map(float, pull_numbers(pull)))
    build().follow(
        table.buffer_info()[0],
        len(slots),
        given.buffer_info()[0],
        len(first.extra),
        DTYPES[first.param.dtype, first.average.dtype if v is None else v.dtype],
        0 if watches else 2 if uniform else 1,
        torch.get_num_threads(),
        _openmp(),
    )


class Swap:
    """Parameters and averages that trade places, as in `paceline.swap`, in one pass over memory.

    Args:
        pairs: parameters and averages, of one pair of dtypes, contiguous.
    """

    def __init__(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        self.pairs, (param, average) = pairs, pairs[0]
        self.dtypes = DTYPES[param.dtype, average.dtype]
        self.table, self.flag = array("q"), array("q", [0])
        for x, y in pairs:
            self.table.extend((x.data_ptr(), y.data_ptr(), x.numel()))

    @property
    def done(self) -> bool:
        """Whether they have traded places; also after an exception."""
        return bool(self.flag[0])

    def run(self, *, back: bool) -> None:
        """Swap all of them; no Ctrl-C comes between two."""
        build().swap(
            self.table.buffer_info()[0],
            len(self.pairs),
            self.flag.buffer_info()[0],
            self.dtypes,
            back,
            torch.get_num_threads(),
            _openmp(),
        )


class Library(NamedTuple):
    """The functions of cpu.cpp."""

    step: Callable[..., int]
    follow: Callable[..., None]
    swap: Callable[..., None]


def _loaded(path: Path) -> Library:
    """Raises: OSError, AttributeError: it is no library of ours."""
    library = ctypes.CDLL(str(path))
    step, follow = library.paceline_step, library.paceline_follow
    swap = library.paceline_swap
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    step.argtypes = [pointer, size, pointer, *[number] * 5, pointer]
    step.restype = size
    follow.argtypes = [pointer, size, pointer, *[number] * 4, pointer]
    swap.argtypes = [pointer, size, pointer, *[number] * 3, pointer]
    follow.restype = swap.restype = None
    return Library(step, follow, swap)


@functools.cache
def build() -> Library:
    """The CPU's kernels, built if the cache folder does not have them.

    Raises:
        BuildError: no C++ compiler, or it fails; the message is one line.
    """
    source = Path(__file__).with_name("cpu.cpp")
    try:
        compiler = (
            shlex.split(os.environ.get("CXX", ""))
            or [path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))][:1]
        )
    except ValueError as error:
        raise BuildError(f"CXX={os.environ['CXX']!r} is no command: {error}") from None
    if not compiler:
        raise BuildError("no C++ compiler was found; install g++ or clang++, or set CXX")
    # For the instructions that torch itself uses here, so that a cache folder can be shared.
    tuned = {"AVX512": ["-march=x86-64-v4"], "AVX2": ["-march=x86-64-v3"]}
    capability = torch.backends.cpu.get_cpu_capability()
    command = [*compiler, *FLAGS, *tuned.get(capability, [])]
    key = hashlib.sha256(f"{command} {platform.platform()}".encode() + source.read_bytes())
    name = f"kernel-{key.hexdigest()[:16]}"
    folder = code_folder()
    try:
        return (folder and _kept(folder, name)) or _built(folder, name, [*command, str(source)])
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if "error" in line]
        raise BuildError(f"{compiler[0]} failed: {(lines or ['no message'])[0]}") from None
    except (OSError, AttributeError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{compiler[0]}: {error}") from None


def _kept(folder: Path, name: str) -> Library | None:
    """The kernels of a library in the folder, or None; one that is damaged or not ours goes.

    A library's name ends with the check sum of its contents.
    """
    for library in folder.glob(f"{name}-*.so"):
        with contextlib.suppress(OSError, AttributeError):  # it cannot be read, or loaded here
            if is_ours(library) and library.is_file() and library.name == _kept_name(name, library):
                return _loaded(library)
        with contextlib.suppress(OSError):
            files.remove(library)
    return None


def _built(folder: Path | None, name: str, command: list[str]) -> Library:
    """The kernels of a library made now, which is kept in the folder, if there is one."""
    with contextlib.ExitStack() as stack:
        try:
            own = folder and stack.enter_context(files.scratch(folder, "kernel"))
        except OSError:  # nothing can be kept there: build it for this process
            own = None
        made = (own or Path(stack.enter_context(tempfile.TemporaryDirectory()))) / "made.so"
        subprocess.run(
            [*command, "-o", str(made)],
            check=True,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=300,
        )
        found = _loaded(made)
        if folder and own:
            with contextlib.suppress(OSError):  # the disk is full
                made.chmod(0o700)
                files.put(made, folder / _kept_name(name, made))
        return found


def _kept_name(name: str, library: Path) -> str:
    return f"{name}-{hashlib.sha256(library.read_bytes()).hexdigest()}.so"


def is_built() -> bool:
    """Whether this process has the CPU's kernel already."""
    return bool(build.cache_info().currsize)


@functools.cache
def _openmp() -> int | None:
    """The address of the OpenMP runtime's entry in this process, if torch has brought one."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError, TypeError):
        return None


@functools.cache
def available() -> bool:
    """Whether the CPU's kernel can be built; warns, once, if it cannot."""
    try:
        build()
    except BuildError as error:
        warnings.warn(f"PACE steps without its one-pass kernel, slower: {error}", stacklevel=2)
        return False
    return True
