"""How tensors are stepped: `choose` is the one place that decides which kernel does it.

So is `follow` for what another optimizer has moved, and `swaps` for averages and live weights.

| file | device | writes the rule |
|---|---|---|
| `__init__.py` (`Eager`) | all | `update.step_`, one operation of torch after another |
| `__init__.py` (`Resting`) | all | `update.rest_`, of parameters without a gradient |
| `cpu.py`, `cpu.cpp` | CPU | once more, in one pass over memory |
| `gpu.py` | CUDA, with Triton | once more, in one launch |

A kernel is a class that is made from tensors, their state and their counts of steps. It is kept as
long as these stay what they are, and given gradients and numbers at each step.
"""

import functools
import warnings
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..defaults import AUTO
from ..memory import lacks_memory
from ..options import Group
from ..state import PLAIN, averages_of
from ..update import MovedSlot, PullScalars, Scalars, Slot, count_, in_batches, pull_, rest_, step_
from . import cpu
from .cpu import BuildError

__all__ = ["BuildError", "Each", "Eager", "Kernel", "choose", "prepare", "reason_against"]

WORTH_BUILDING = 2**18  # elements: smaller models are trained before a compiler has started


class Kernel(Protocol):
    """Steps the tensors that it was made from."""

    def step(
        self, grads: list[Tensor], keys: Any | None, s: Scalars, *, measure: bool
    ) -> list[dict[str, Any]]:
        """One PACE step, in place; the counts move with it.

        Args:
            grads: of each tensor its gradient, of its shape.
            keys: of each tensor its key of stochastic rounding; None: nothing is rounded so.
            s: the step's scalars.
            measure: return `update.measurements`, where the kernel can.

        Returns:
            In parts: `skipped`, how many coordinates stood still, and the measurements.
        """
        ...


class Eager:
    """`update.step_`, one operation of torch after another: for all tensors, on all devices."""

    def __init__(self, slots: list[Slot], counts: list[Tensor]) -> None:
        self.slots, self.counts = slots, counts

    def step(
        self, grads: list[Tensor], keys: Any | None, s: Scalars, *, measure: bool
    ) -> list[dict[str, Any]]:
        """As `Kernel` has it."""
        slots = [x.at_step(grads, keys, i) for i, x in enumerate(self.slots)]
        found = [step_(batch, s, measure=measure) for batch in in_batches(slots)]
        count_(self.counts, s)
        return found


class Resting(Eager):
    """`update.rest_`, for tensors without a gradient; it takes none."""

    def step(
        self, grads: list[Tensor], keys: Any | None, s: Scalars, *, measure: bool
    ) -> list[dict[str, Any]]:
        """As `Kernel` has it, without measurements."""
        keyed = [x._replace(key=keys[i] if keys else None) for i, x in enumerate(self.slots)]
        for batch in in_batches(keyed):
            rest_(batch, s)
        count_(self.counts, s)
        return []


class Each:
    """A kernel for each tensor, where each has a count that the host does not read.

    Args:
        kernels: of one tensor each.
    """

    def __init__(self, kernels: list[Kernel]) -> None:
        self.kernels = kernels

    def step(
        self, grads: list[Tensor], keys: Any | None, s: Scalars, *, measure: bool
    ) -> list[dict[str, Any]]:
        """As `Kernel` has it; of `s`, vectors have a number for each tensor."""
        found = []
        for i, kernel in enumerate(self.kernels):
            key = None if keys is None else [keys[i]]
            found += kernel.step(grads[i : i + 1], key, s.of(i), measure=measure)
        return found


def choose(
    slots: list[Slot], counts: list[Tensor], group: Group, *, fits: bool, together: bool
) -> Kernel:
    """The kernel for tensors that share device and dtypes.

    Args:
        slots: the tensors, all with a gradient or none.
        counts: of each tensor the count that its step adds 1 to.
        group: their options: `fused` True demands a one-pass kernel (PACE has already refused
            tensors that it cannot step), False does without, None takes the device's where it pays.
        fits: whether there is no `reason_against` any of them.
        together: whether they have one count of steps, which the host knows, and one set of
            numbers; else the numbers of a step are vectors, of one for each.
    """
    first, fused = slots[0], group["fused"]
    if fused is None and first.grad is not None and not group["track_stats"]:
        elements = sum(x.param.numel() for x in slots)
        fused = elements >= WORTH_BUILDING and fits
        fused = fused and _available(first.param, first.exp_avg.dtype, group)
    kept = [x._replace(grad=None) for x in slots]
    make: Any
    if first.grad is None:
        make = Resting
    elif not fused:
        make = Eager
    elif device_kind(first.param.device) == "cpu":
        make = cpu.Kernel
    else:
        from . import gpu

        return gpu.Kernel(kept, counts)  # whose numbers may be vectors
    if together:
        return make(kept, counts)  # type: ignore[no-any-return]
    return Each([make([x], [count]) for x, count in zip(kept, counts, strict=True)])


def follow(slots: list[MovedSlot], pull: PullScalars, *, measure: bool) -> list[dict[str, Any]]:
    """`update.pull_` on tensors of one device and dtype: by its kernel where that pays.

    Args:
        slots: the tensors.
        pull: the numbers.
        measure: return `update.measurements`, which no kernel can.

    Returns:
        In parts: the measurements.
    """
    elements = sum(x.param.numel() for x in slots)
    if not measure and elements >= WORTH_BUILDING and _can_follow(slots):
        if device_kind(slots[0].param.device) == "cpu":
            cpu.follow(slots, pull)
        else:
            from . import gpu

            gpu.follow(slots, pull)
        return []
    return [pull_(batch, pull, measure=measure) for batch in in_batches(slots)]


class Swap(Protocol):
    """Parameters and averages that trade places, all of them or none."""

    pairs: list[tuple[Tensor, Tensor]]

    @property
    def done(self) -> bool:
        """Whether they have traded places; also after an exception."""
        ...

    def run(self, *, back: bool) -> None:
        """Swap them, as `swap.swap_in` or, back, as `swap.swap_back` does."""
        ...


def swaps(
    pairs: Iterable[tuple[Tensor, Tensor]],
) -> tuple[list[Swap], list[tuple[Tensor, Tensor]]]:
    """Which parameters and averages trade places by kernels, and which by torch operations.

    A swap alone has no kernel built for the CPU: it takes the one that steps have had built.

    Args:
        pairs: parameter and average, as `swap.swap_in` takes them.

    Returns:
        A kernel for those that are alike; and the other pairs.
    """
    alike = defaultdict(list)
    for pair in pairs:
        alike[pair[0].device, pair[0].dtype, pair[1].dtype, _can_swap(*pair)].append(pair)
    made: list[Swap] = []
    others = []
    for (device, dtype, of_average, fits), members in alike.items():
        elements = sum(param.numel() for param, _ in members)
        if not fits or elements < WORTH_BUILDING:
            others += members
        elif device_kind(device) == "cpu" and cpu.is_built():
            made.append(cpu.Swap(members))
        elif device_kind(device) == "gpu" and _gpu_swaps(device, dtype, of_average):
            from . import gpu

            made.append(gpu.Swap(members))
        else:
            others += members
    return made, others


def _can_follow(slots: list[MovedSlot]) -> bool:
    """Whether a kernel can follow these tensors: all alike, in one piece, and it works here."""
    first = slots[0]
    device = first.param.device
    kinds = {tuple(None if y is None else y.dtype for y in x[:4]) for x in slots}
    v = first.second_moment
    of_v = first.average.dtype if v is None else v.dtype
    if len(kinds) > 1 or not device_kind(device) or (first.param.dtype, of_v) not in cpu.DTYPES:
        return False
    tensors = [y for x in slots for y in (*x[:4], *x.extra) if y is not None]
    if not all(map(_in_one_piece, tensors)):
        return False
    if device_kind(device) == "cpu":
        return cpu.available()
    if capturing(device):
        return False
    kind = (None if v is None else v.dtype, len(first.extra), first.before is not None)
    fault = _fault_of_follow(device, first.param.dtype, *kind)
    if fault:
        _warn(fault, "Pullback steps")
    return fault is None


def _can_swap(param: Tensor, average: Tensor) -> bool:
    """Whether a kernel can swap them, where there is one."""
    return (
        (param.dtype, average.dtype) in cpu.DTYPES
        and param.shape == average.shape
        and param.device == average.device
        and all(_in_one_piece(x) and not lacks_memory(x) for x in (param, average))
    )


def _gpu_swaps(device: torch.device, dtype: torch.dtype, of_average: torch.dtype) -> bool:
    """Whether the GPU's kernel can swap tensors of these dtypes; warns, once, if not."""
    if capturing(device):
        return False
    fault = _fault_of_swap(device, dtype, of_average)
    if fault:
        _warn(fault, "live weights and average are swapped")
    return fault is None


def _in_one_piece(x: Tensor) -> bool:
    """Whether a tensor is its elements in their order, and nothing else."""
    return type(x) in PLAIN and x.is_contiguous() and not x.is_neg()


# ---- what can be used ---------------------------------------------------------------------------


def device_kind(device: torch.device) -> str | None:
    """The one-pass kernel of a device: "cpu", "gpu", or None where it has none."""
    return {"cpu": "cpu", "cuda": "gpu"}.get(device.type)


def capturing(device: torch.device) -> bool:
    """Whether what is done on this device now goes into a CUDA graph, and is not done yet."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def reason_against(param: Tensor, state_dtype: torch.dtype, grad: Tensor | None) -> str | None:
    """Why the one-pass kernel of a parameter's device cannot step it, or None where it can."""
    if type(param) not in PLAIN:
        return f"takes plain tensors, not {type(param).__name__}"
    if device_kind(param.device) is None:
        return f"takes tensors on CPUs and CUDA GPUs, not on {param.device.type}"
    if param.layout != torch.strided:
        return "takes dense tensors, not sparse ones"
    if not param.is_contiguous() or param.is_neg():
        return "takes contiguous tensors"
    if (param.dtype, state_dtype) not in cpu.DTYPES:
        return f"takes float32, bfloat16 and float64, not {param.dtype}"
    if grad is not None and grad.dtype != param.dtype:
        return f"takes gradients of the parameter's dtype, not {grad.dtype}"
    if grad is not None and (type(grad) not in PLAIN or grad.is_neg()):
        return f"takes plain gradients, not {type(grad).__name__} of another kind"
    return None


def prepare(param: Tensor, state_dtype: torch.dtype, group: Group) -> None:
    """See that the one-pass kernel of a parameter's device can be used for it.

    Raises:
        BuildError: the CPU's cannot be built; or a GPU's cannot be compiled, steps otherwise than
            torch operations, or would step for the first time in a CUDA graph.
    """
    if device_kind(param.device) == "cpu":
        cpu.build()
    elif capturing(param.device):
        raise BuildError(
            "fused=True must take a step with these tensors before one that goes into a CUDA "
            "graph; nothing was changed"
        )
    elif fault := _fault_on_gpu(_variant(param, state_dtype, group)):
        raise BuildError(f"the GPU's one-pass kernel cannot be used: {fault}")


def _available(param: Tensor, state_dtype: torch.dtype, group: Group) -> bool:
    """Whether the one-pass kernel of a parameter's device can be used; warns, once, if it cannot.

    In a CUDA graph it cannot: its tables and its check would not be made before it is replayed.
    """
    if device_kind(param.device) == "cpu":
        return cpu.available()
    if capturing(param.device):
        return False
    fault = _fault_on_gpu(_variant(param, state_dtype, group))
    if fault:
        _warn(fault)
    return fault is None


class Variant(NamedTuple):
    """What the GPU's kernel is compiled for."""

    device: torch.device
    dtype: torch.dtype
    state_dtype: torch.dtype
    extra: int  # averages besides the pull's
    uniform_gain: bool
    stochastic: bool
    skip: bool | None  # coordinates that are not finite; or None: steps, as the device decides


def _variant(param: Tensor, state_dtype: torch.dtype, group: Group) -> Variant:
    return Variant(
        param.device,
        param.dtype,
        state_dtype,
        len(averages_of(group).extra),
        group["gain"] == "scalar" or group["pullback"] == AUTO,
        group["stochastic_round"],
        {"skip": None, "guard": True}.get(group["nonfinite"], False),
    )


@functools.cache
def _fault_on_gpu(variant: Variant) -> str | None:
    """Why a GPU's kernel is not used; None: it has taken the same step as torch operations."""
    try:
        from . import gpu
    except ImportError as error:
        return f"{error}; pip install 'paceline[gpu]'"
    return gpu.fault(*variant)


@functools.cache
def _fault_of_follow(
    device: torch.device, dtype: torch.dtype, of_v: torch.dtype | None, extra: int, pulls: bool
) -> str | None:
    """The same after another optimizer's step, for what it is compiled for."""
    try:
        from . import gpu
    except ImportError as error:
        return f"{error}; pip install 'paceline[gpu]'"
    return gpu.fault_of_follow(device, dtype, of_v, extra, pulls)


@functools.cache
def _fault_of_swap(device: torch.device, dtype: torch.dtype, of_average: torch.dtype) -> str | None:
    """The same of a swap."""
    try:
        from . import gpu
    except ImportError as error:
        return f"{error}; pip install 'paceline[gpu]'"
    return gpu.fault_of_swap(device, dtype, of_average)


@functools.cache
def _warn(fault: str, what: str = "PACE steps") -> None:
    warnings.warn(f"{what} without its one-pass kernel, slower: {fault}", stacklevel=2)
