"""How tensors are stepped: `choose` is the one place that decides which kernel does it.

| file | device | writes the rule |
|---|---|---|
| `__init__.py` (`Eager`) | all | `update.step_`, one operation of torch after another |
| `__init__.py` (`Resting`) | all | `update.rest_`, of parameters without a gradient |
| `cpu.py`, `cpu.cpp` | CPU | once more, in one pass over memory |
| `compiled.py` | accelerators | `update.step_` through `torch.compile` |
| `gpu.py` | accelerators, with Triton | once more, in one launch; `choose` does not yet take it |

A kernel is a class that is made from tensors, their state and their counts of steps. It is kept as
long as these stay what they are, and given gradients and numbers at each step.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from ..options import Group
from ..update import Scalars, Slot, count_, in_batches, rest_, step_
from . import compiled, cpu
from .cpu import BuildError

__all__ = ["BuildError", "Eager", "Kernel", "choose", "prepare", "reason_against"]

WORTH_BUILDING = 2**18  # elements: smaller models are trained before a compiler has started


class Kernel(Protocol):
    """Steps the tensors that it was made from."""

    def step(
        self, grads: list[Tensor], keys: list[Any] | None, s: Scalars, *, measure: bool
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
        self, grads: list[Tensor], keys: list[Any] | None, s: Scalars, *, measure: bool
    ) -> list[dict[str, Any]]:
        """As `Kernel` has it."""
        slots = [x.at_step(grads, keys, i) for i, x in enumerate(self.slots)]
        found = [step_(batch, s, measure=measure) for batch in in_batches(slots)]
        count_(self.counts, s)
        return found


class Resting(Eager):
    """`update.rest_`, for tensors without a gradient; it takes none."""

    def step(
        self, grads: list[Tensor], keys: list[Any] | None, s: Scalars, *, measure: bool
    ) -> list[dict[str, Any]]:
        """As `Kernel` has it, without measurements."""
        keyed = [x._replace(key=keys[i] if keys else None) for i, x in enumerate(self.slots)]
        for batch in in_batches(keyed):
            rest_(batch, s)
        count_(self.counts, s)
        return []


def choose(slots: list[Slot], counts: list[Tensor], group: Group, fits: bool) -> Kernel:
    """The kernel for tensors that share device, dtypes and step count.

    Args:
        slots: the tensors, all with a gradient or none.
        counts: of each tensor the count that its step adds 1 to.
        group: their options: `fused` True demands a one-pass kernel (PACE has already refused
            tensors that it cannot step), False does without, None takes the CPU's where it pays.
        fits: whether there is no `reason_against` any of them.
    """
    if slots[0].grad is None:
        return Resting(slots, counts)
    fused, device = group["fused"], slots[0].param.device.type
    if fused is None and not group["track_stats"] and device == "cpu":
        elements = sum(x.param.numel() for x in slots)
        fused = elements >= WORTH_BUILDING and fits and cpu.available()
    kept = [x._replace(grad=None) for x in slots]
    if not fused:
        return Eager(kept, counts)
    return cpu.Kernel(kept, counts) if device == "cpu" else compiled.Kernel(kept, counts)


def reason_against(param: Tensor, state_dtype: torch.dtype, grad: Tensor | None) -> str | None:
    """Why the one-pass kernel of a parameter's device cannot step it, or None where it can."""
    if param.device.type == "cpu":
        return cpu.reason_against(param, state_dtype, grad)
    return cpu.reason_in_memory(param)


def prepare(device: torch.device) -> None:
    """See that a device's one-pass kernel can be used.

    Raises:
        BuildError: the CPU's cannot be built, or what torch compiles with is not there.
    """
    if device.type == "cpu":
        cpu.build()
    else:
        compiled.prepare(device)
