"""PACE in one pass over memory: a kernel built where it runs, with the compiler found there.

On the CPU it is kernel.cpp, built once for a machine by its C++ compiler and kept in the cache
folder; on other devices `update.step_` through `torch.compile`. Both take tensors of any size and
number and any scalars without being built again.
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
import sys
import tempfile
import warnings
from array import array
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from . import shards, update
from .cache import cache_folder
from .update import Scalars, Slot

DTYPES = {  # of parameters and state: how kernel.cpp numbers them
    (torch.float32, torch.float32): 0,
    (torch.float32, torch.bfloat16): 1,
    (torch.bfloat16, torch.float32): 2,
    (torch.bfloat16, torch.bfloat16): 3,
    (torch.float64, torch.float64): 4,
}
FLAGS = [
    "-std=c++17",
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-shared",
    "-fPIC",
    "-pthread",
]
HUGE_PAGE = 2**21  # bytes
MADV_HUGEPAGE = 14  # of Linux's madvise(2)
WORTH_BUILDING = 2**18  # elements: smaller models are trained before a compiler has started
WORTH_A_LAUNCH = 2**16  # elements: smaller tensors are batched where each would be a launch


class BuildError(RuntimeError):
    """The kernel cannot be built or loaded here; the message says why."""


def reason_against(
    param: Tensor, state_dtype: torch.dtype, grad: Tensor | None = None
) -> str | None:
    """Why the one-pass kernel cannot step a parameter, or None where it can."""
    if type(param) not in update.PLAIN:
        return f"takes plain tensors, not {type(param).__name__}"
    if param.layout != torch.strided:
        return "takes dense tensors, not sparse ones"
    if not param.is_contiguous():
        return "takes contiguous tensors"
    if (param.dtype, state_dtype) not in DTYPES:
        return f"takes float32, bfloat16 and float64, not {param.dtype}"
    if grad is not None and grad.dtype != param.dtype:
        return f"takes gradients of the parameter's dtype, not {grad.dtype}"
    return None


def prepare(device: torch.device) -> None:
    """See that a step can be taken on this device.

    Raises:
        BuildError: the CPU's kernel cannot be built, or what torch compiles with is not there.
    """
    if device.type == "cpu":
        build()
    elif device.type == "cuda" and not find_spec("triton"):
        raise BuildError("torch.compile needs triton on CUDA; pip install triton")


def step_(slots: list[Slot], s: Scalars) -> list[int | Tensor]:
    """`update.step_` in one pass, without measurements; `prepare` comes before it.

    Returns:
        How many coordinates stood still, in parts.
    """
    if slots[0].param.device.type == "cpu":
        return [_cpu_step(slots, s)]
    return compiled_step(slots, s)


def _cpu_step(slots: list[Slot], s: Scalars) -> int:
    kernel = build()
    grads = [slot.grad.contiguous() for slot in slots]  # kept while their addresses are in use
    rows = array("q")
    for slot, grad in zip(slots, grads, strict=True):
        rows.extend(
            (
                slot.param.data_ptr(),
                grad.data_ptr(),
                slot.exp_avg.data_ptr(),
                slot.exp_avg_sq.data_ptr(),
                0 if slot.average is None else slot.average.data_ptr(),
                slot.param.numel(),
                int(slot.key or 0),
                slot.start,
                *(x.data_ptr() for x in slot.returned),
            )
        )
    step = array(
        "d",
        map(
            float,
            (
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
                -1.0 if s.ascend else 1.0,
                1.0 if s.hold else 0.0,
                *s.weights,
            ),
        ),
    )
    return kernel(
        rows.buffer_info()[0],
        len(slots),
        step.buffer_info()[0],
        len(s.weights),
        DTYPES[slots[0].param.dtype, slots[0].exp_avg.dtype],
        0 if slots[0].average is None else 1 if not s.gain else 3 if s.scalar else 2,
        s.stochastic,
        torch.get_num_threads(),
        _openmp(),
    )


def empty_state(like: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.empty_like`, in huge pages where Linux has them to give.

    The kernel reads and writes five tensors in each thread: too many for what a CPU remembers of
    ordinary pages of memory, where that is fast otherwise (benchmarks/results).
    """
    state = torch.empty_like(like, dtype=dtype, device=device)
    mine = shards.local(state)
    if type(mine) in update.PLAIN and mine.device.type == "cpu":
        begin, end = mine.data_ptr(), mine.data_ptr() + mine.nbytes
        begin, end = -(-begin // HUGE_PAGE) * HUGE_PAGE, end // HUGE_PAGE * HUGE_PAGE
        if end > begin and (advise := _madvise()):
            advise(begin, end - begin, MADV_HUGEPAGE)  # what it answers does not matter
    return state


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return cast(Callable[[int, int, int], int], advise)


@functools.cache
def build() -> Callable[..., int]:
    """The CPU's kernel, built if the cache folder does not have it.

    Raises:
        BuildError: no C++ compiler, or it fails; the message is one line.
    """
    source = Path(__file__).with_name("kernel.cpp")
    compiler = (
        shlex.split(os.environ.get("CXX", ""))
        or [path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))][:1]
    )
    if not compiler:
        raise BuildError("no C++ compiler was found; install g++ or clang++, or set CXX")
    # For the instructions that torch itself uses here, so that a cache folder can be shared.
    tuned = {"AVX512": ["-march=x86-64-v4"], "AVX2": ["-march=x86-64-v3"]}
    capability = torch.backends.cpu.get_cpu_capability()
    command = [*compiler, *FLAGS, *tuned.get(capability, [])]
    key = hashlib.sha256(f"{command} {platform.platform()}".encode() + source.read_bytes())
    name = f"kernel-{key.hexdigest()[:16]}.so"
    with contextlib.ExitStack() as stack:
        try:
            folder = cache_folder()
            scratch = stack.enter_context(tempfile.TemporaryDirectory(dir=folder))
        except OSError:  # nowhere to keep it: build it for this process
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            scratch = str(folder)
        library = folder / name
        try:
            if not library.exists():
                made = Path(scratch) / "made.so"
                subprocess.run(
                    [*command, str(source), "-o", str(made)],
                    check=True,
                    capture_output=True,
                    text=True,
                    timeout=300,
                )
                made.replace(library)  # at once and whole, whoever else is building it
            step = ctypes.CDLL(str(library)).paceline_step
        except subprocess.CalledProcessError as error:
            lines = [line for line in error.stderr.splitlines() if "error" in line]
            raise BuildError(f"{compiler[0]} failed: {(lines or ['no message'])[0]}") from None
        except (OSError, AttributeError, subprocess.TimeoutExpired) as error:
            raise BuildError(f"{compiler[0]}: {error}") from None
    pointer, number = ctypes.c_void_p, ctypes.c_int
    step.argtypes = [pointer, ctypes.c_int64, pointer, *[number] * 5, pointer]
    step.restype = ctypes.c_int64
    return cast(Callable[..., int], step)


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


@functools.cache
def _compiled() -> Callable[[list[Slot], Scalars], Any]:
    return torch.compile(update.step_, dynamic=True, fullgraph=True)


def compiled_step(slots: list[Slot], s: Scalars) -> list[int | Tensor]:
    """`update.step_` through `torch.compile`: large tensors one by one, small ones together."""

    def tensor(x: float | Tensor) -> Tensor:  # for torch would compile anew for each number
        return torch.as_tensor(x, dtype=torch.float32)

    numbers = s._replace(
        root_bias2=tensor(s.root_bias2),
        step_size=tensor(s.step_size),
        shrink=tensor(s.shrink),
        weight=tensor(s.weight),
        gain=tensor(s.gain) if isinstance(s.gain, Tensor) or s.gain else 0.0,
        weights=tuple(map(tensor, s.weights)),
    )
    small = [slot for slot in slots if slot.param.numel() < WORTH_A_LAUNCH]
    found = [update.step_(batch, s) for batch in update.in_batches(small)] if small else []
    for slot in slots:
        if slot.param.numel() >= WORTH_A_LAUNCH:
            flat = [None if x is None else _flat(x) for x in slot[:5]]
            key = None if slot.key is None else torch.as_tensor(slot.key, dtype=torch.int32)
            returned = tuple(map(_flat, slot.returned))
            found.append(_compiled()([Slot._make([*flat, key, slot.start, returned])], numbers))
    return [x["held"] for x in found if "held" in x]


def _flat(x: Tensor) -> Tensor:
    """The same memory in one dimension, but no view: torch would compile anew for other bases."""
    return x.new_empty(0).set_(x.untyped_storage(), x.storage_offset(), (x.numel(),), (1,))
