"""What tensors must be in memory to be stepped: of one shape, all there, and nobody else's."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from . import shards
from .state import PLAIN


def is_plain(x: Tensor) -> bool:
    """Whether a tensor is just a place in memory."""
    return type(x) in PLAIN and x.layout is torch.strided and x.device.type != "meta"


def lacks_memory(x: Tensor) -> bool:
    """Whether a tensor's storage is smaller than what it says to be in it."""
    if not is_plain(x) or x.numel() == 0:
        return False
    return x.untyped_storage().nbytes() < (x.storage_offset() + _extent(x)) * x.itemsize


def fault(param: Tensor, name: str, x: Tensor) -> str | None:
    """Why a parameter cannot step with its gradient or with a tensor of its state; None: it can.

    Args:
        param: the parameter.
        name: of the other tensor, "gradient" or a key of the state, for the message.
        x: the tensor.
    """
    if x.shape != param.shape:
        return f"its {name} has shape {tuple(x.shape)}"
    if shards.is_sharded(x) != shards.is_sharded(param):
        return f"its {name} and itself must both be shards or whole"
    if name == "gradient":  # others were refused before
        return "its gradient has been freed" if lacks_memory(x) else None
    if not x.is_floating_point() or x.layout != param.layout or x.device != param.device:
        return f"its {name} is {x.dtype} and {x.layout} on {x.device}"
    # The state of a subclass of Parameter is plain.
    if (type(x) not in PLAIN and type(param) in PLAIN) or x.is_neg():
        return f"its {name} is a {type(x).__name__} of another kind"
    return f"its {name} has been freed" if lacks_memory(x) else None


def first_fault(param: Tensor, tensors: dict[str, Tensor]) -> str | None:
    """The first `fault` of a parameter with its gradient and state, by their names; or None."""
    if lacks_memory(param):
        return "its memory has been freed"
    faults = (fault(param, name, x) for name, x in tensors.items())
    return next((why for why in faults if why), None)


def spans(tensors: Iterable[Tensor]) -> list[tuple[int, int, int]]:
    """Where tensors begin and end, and their index, of those that are plain and not empty.

    Devices that give no address, as TPUs, are left out.
    """
    return [
        (begin, begin + _extent(x) * x.itemsize, i)
        for i, x in enumerate(tensors)
        if is_plain(x) and x.numel() and (begin := x.data_ptr())
    ]


def shared(tensors: Sequence[Tensor], found: list[tuple[int, int, int]]) -> tuple[int, int] | None:
    """The indices of two tensors with an element in common, or twice that of one; or None.

    Args:
        tensors: the tensors.
        found: their `spans`.
    """
    for *_, i in found:
        if any(
            n > 1 and not step
            for n, step in zip(tensors[i].shape, tensors[i].stride(), strict=True)
        ):
            return i, i
    near: list[tuple[int, int, int]] = []  # those that end after the next begins
    for begin, end, i in sorted(found):
        near = [x for x in near if x[1] > begin]
        for *_, other in near:
            if _meet(tensors[other], tensors[i]):
                return other, i
        near.append((begin, end, i))
    return None


def _meet(a: Tensor, b: Tensor) -> bool:
    """Whether tensors whose spans overlap have a byte in common."""
    if a.is_contiguous() and b.is_contiguous():
        return True
    places = [
        x.data_ptr()
        + torch.arange(_extent(x)).as_strided(x.shape, x.stride()).reshape(-1) * x.itemsize
        for x in (a, b)
    ]
    return a.itemsize != b.itemsize or bool(torch.isin(*places).any())


def _extent(x: Tensor) -> int:
    """Elements from a tensor's first to its last place in memory; it has some."""
    if x.is_contiguous():
        return x.numel()
    return 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
