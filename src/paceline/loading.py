"""What an optimizer checkpoint must be to be loaded, said before anything is changed."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import swap
from .base import describe
from .options import Group
from .shards import is_sharded
from .state import RETURN, State, extra_keys_in

StateCheck = Callable[[State, Tensor, swap.Swapped | None], None]


def validated_checkpoint(
    saved: dict[str, Any],
    groups: list[Group],
    *,
    keys: frozenset[str] | None,
    count: str,
    complete: Callable[[Group, Group, int], Group],
    checker: Callable[[Group, list[tuple[Tensor, State]]], StateCheck],
) -> dict[str, Any]:
    """A checkpoint as it is to be loaded, with all options filled in.

    State that was saved before its first step is dropped. State that other tools have put in is
    kept, with a warning.

    Args:
        saved: a `state_dict()`.
        groups: the optimizer's parameter groups; not changed.
        keys: of the optimizer's own state, besides further averages; None: others are a base's.
        count: the key of the steps taken.
        complete: from a saved group, the optimizer's, and its index: all options, checked.
        checker: from a completed group, and its parameters with their saved states: what raises a
            ValueError that says what is wrong with one of them.

    Raises:
        ValueError: it does not fit; the message names the first parameter or option that does not.
    """
    sizes = [[len(group["params"]) for group in side] for side in (saved["param_groups"], groups)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the checkpoint's parameter groups have {sizes[0]} parameters, the optimizer's "
            f"{sizes[1]}: make the same groups, in the same order, and load again"
        )
    states, completed, others = dict(saved["state"]), [], set()
    for g, (theirs, mine) in enumerate(zip(saved["param_groups"], groups, strict=True)):
        group = complete(theirs, mine, g)
        group[swap.SWAPPED] = theirs.get(swap.SWAPPED) or ""
        completed.append(group)
        found = [states.get(key, {}) for key in theirs["params"]]
        check = checker(group, list(zip(mine["params"], found, strict=True)))
        records = swap.read_record(group[swap.SWAPPED], len(found))
        for i, (key, record) in enumerate(zip(theirs["params"], records, strict=True)):
            state, param = found[i], mine["params"][i]
            try:
                check(state, param, record)
                if record and record.average and RETURN + record.average not in state:
                    raise ValueError(
                        f"the checkpoint had its average {record.average!r} swapped in, and lacks "
                        "that"
                    )
            except ValueError as error:
                raise ValueError(
                    f"{describe(groups, g, i)} cannot be loaded: {error}; nothing was changed"
                ) from None
            if keys is not None:
                others |= state.keys() - keys - extra_keys_in(state)
            if state.get(count) == 0 and not record:
                del states[key]  # saved before its first step, where its averages begin
    known = {key for group in completed for key in group["params"]}
    unknown = sorted(map(repr, states.keys() - known))
    if any(not isinstance(key, str) for key in states.keys() - known):
        raise ValueError(
            f"the checkpoint has state for {unknown[0]}, which is in none of its groups; nothing "
            "was changed"
        )
    if others or unknown:
        warnings.warn(
            f"the checkpoint's state has {', '.join([*unknown, *sorted(map(repr, others))])} of "
            "another tool; it is carried along",
            stacklevel=4,
        )
    return {**saved, "state": states, "param_groups": completed}


def check_tensor(key: str, value: Any, param: Tensor) -> None:
    """Raises: ValueError: why a saved value cannot be state that is shaped like the parameter."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"its {key!r} must be a floating-point tensor, got {kind}")
    if value.shape != param.shape:
        raise ValueError(f"its {key!r} has shape {tuple(value.shape)}")
    if is_sharded(value) != is_sharded(param):
        kinds = ["a whole tensor", "a shard"]
        raise ValueError(
            f"its {key!r} is {kinds[is_sharded(value)]}, the parameter "
            f"{kinds[is_sharded(param)]}; load it by "
            "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict"
        )


def check_count(key: str, value: Any, _: Tensor) -> None:
    """Raises: ValueError: a saved count of steps is not one number."""
    if torch.as_tensor(value).numel() != 1:
        raise ValueError(f"its {key!r} must be one number, got shape {tuple(value.shape)}")
