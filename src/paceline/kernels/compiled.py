"""`update.step_` through `torch.compile`: what `fused=True` means on accelerators.

It was never measured on the devices that it is for, and goes when they have a kernel of their own.
"""

import functools
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..update import Scalars, Slot, count_, in_batches, step_
from .cpu import BuildError

WORTH_A_LAUNCH = 2**16  # elements: smaller tensors are batched where each would be a launch


def prepare(device: torch.device) -> None:
    """Raises: BuildError: what torch compiles with is not there."""
    if device.type == "cuda" and not find_spec("triton"):
        raise BuildError("torch.compile needs triton on CUDA; pip install triton")


class Kernel:
    """The compiled step for some tensors: large ones one by one, small ones together."""

    def __init__(self, slots: list[Slot], counts: list[Tensor]) -> None:
        self.slots, self.counts = slots, counts

    def step(
        self, grads: list[Tensor], keys: list[Any] | None, s: Scalars, *, measure: bool
    ) -> list[dict[str, Any]]:
        """`update.step_`, without measurements."""

        def tensor(x: float | Tensor) -> Tensor:  # or torch would compile anew for each number
            return torch.as_tensor(x, dtype=torch.float32)

        numbers = s._replace(
            root_bias2=tensor(s.root_bias2),
            step_size=tensor(s.step_size),
            shrink=tensor(s.shrink),
            weight=tensor(s.weight),
            gain=tensor(s.gain) if isinstance(s.gain, Tensor) or s.gain else 0.0,
            extra_weights=tuple(map(tensor, s.extra_weights)),
        )
        slots = [x.at_step(grads, keys, i) for i, x in enumerate(self.slots)]
        small = [x for x in slots if x.param.numel() < WORTH_A_LAUNCH]
        found = [step_(batch, s) for batch in in_batches(small)] if small else []
        for x in slots:
            if x.param.numel() >= WORTH_A_LAUNCH:
                flat = [_flat(tensor) for tensor in x[:5] if tensor is not None]
                key = None if x.key is None else torch.as_tensor(x.key, dtype=torch.int32)
                extra = tuple(map(_flat, x.extra))
                slot = Slot._make([*flat, key, x.start, extra])
                found.append(_compiled()([slot], numbers))
        count_(self.counts, s)
        return found


@functools.cache
def _compiled() -> Callable[[list[Slot], Scalars], Any]:
    return torch.compile(step_, dynamic=True, fullgraph=True)


def _flat(x: Tensor) -> Tensor:
    """The same memory in one dimension, but no view: torch would compile anew for other bases."""
    return x.new_empty(0).set_(x.untyped_storage(), x.storage_offset(), (x.numel(),), (1,))
