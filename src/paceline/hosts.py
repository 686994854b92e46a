"""Optimizers as trainers hold them: inside wrappers, with the live weights in the model or others.

No trainer is imported here. Wrappers are known by what their documentation says of them.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.optim import Optimizer

from . import shards
from .base import AveragedOptimizer


def unwrapped(optimizer: Any) -> Any:
    """The optimizer that a trainer's wrappers have as `optimizer`, however many there are.

    - accelerate's: its class has `step_was_skipped`.
    - Lightning's and Lightning Fabric's: an instance of the class of what it wraps.
    - DeepSpeed's: no `torch.optim.Optimizer`.

    Optimizers around others, as Lookahead, are none of these, and stay as they are.
    """
    while (inner := getattr(optimizer, "optimizer", None)) is not None and (
        hasattr(type(optimizer), "step_was_skipped")
        or isinstance(optimizer, type(inner))
        or not isinstance(optimizer, Optimizer)
    ):
        optimizer = inner
    return optimizer


def swapping(optimizer: Any) -> Any:
    """The unwrapped optimizer if its `eval()` puts other weights into the model; else None."""
    optimizer = unwrapped(optimizer)
    both = (getattr(optimizer, name, None) for name in ("eval", "train"))
    return optimizer if all(map(callable, both)) else None


def check_reach(optimizer: Any, *models: nn.Module) -> None:
    """See that what an optimizer does to its parameters is done to these models.

    Raises:
        ValueError: it is not, because an engine keeps the weights elsewhere; the message names it.
    """
    stepped = {p for group in unwrapped(optimizer).param_groups for p in group["params"]}
    held = {p for model in models for p in model.parameters()}
    if any(map(shards.is_flattened, stepped | held)):
        raise ValueError(shards.FSDP1)
    partitioned = any(map(shards.is_partitioned, held))  # and the groups are empty between steps
    if partitioned or (stepped.isdisjoint(held) and stepped and held):
        raise ValueError(
            "the optimizer must step parameters of the model, got other tensors. DeepSpeed's ZeRO "
            "makes such copies: save by engine.save_checkpoint there, and see docs/hosts.md"
        )


def is_swapped(optimizer: Any) -> bool:
    """Whether the weights that an optimizer returns are in the model now.

    Schedule-Free's has `train_mode` in its groups; its wrappers have it beside another's groups.
    """
    mine: bool | None = getattr(optimizer, "swapped", None)
    if mine is None:
        mode = getattr(optimizer, "train_mode", True)
        mine = not all(group.get("train_mode", mode) for group in optimizer.param_groups)
    return mine


@contextmanager
def holding(optimizers: Iterable[Any], method: str) -> Iterator[None]:
    """Have the models hold what each swapping optimizer's `eval` or `train` puts in, in a `with`.

    Args:
        optimizers: of a trainer; those that do not swap are left out.
        method: "eval" or "train".
    """
    with ExitStack() as stack:
        for optimizer in filter(None, map(swapping, optimizers)):
            stack.enter_context(restoring(optimizer))
            getattr(optimizer, method)()
        yield


@contextmanager
def restoring(optimizer: Any) -> Iterator[None]:
    """Put back, at the end of a `with`, what is in the model now: live weights, or others.

    Args:
        optimizer: as `swapping` gives it.
    """
    if isinstance(optimizer, AveragedOptimizer):  # knows which of several averages is in
        with optimizer.restoring():
            yield
        return
    before = is_swapped(optimizer)
    try:
        yield
    finally:
        optimizer.eval() if before else optimizer.train()
