"""What an optimizer checkpoint must be to be loaded, said before anything is changed."""

from typing import Any

import torch
from torch import Tensor

from .options import Group, check_options, decoded, describe, further_state
from .shards import is_sharded

MOMENTS = {"step", "exp_avg", "exp_avg_sq"}
AVERAGES = {"average", "offset"}
# What checkpoints did that lack these options.
OLDER = {"averaging": None, "returns": None, "gain": "adam"}
# What torch's AdamW has besides: how it steps, which says nothing about how we do.
ADAMW_ONLY = {
    "amsgrad",
    "capturable",
    "decoupled_weight_decay",
    "differentiable",
    "foreach",
    "fused",
}


def fitted(saved: dict[str, Any], groups: list[Group]) -> dict[str, Any]:
    """A checkpoint as it is to be loaded: what it lacks is as in the optimizer's groups.

    Args:
        saved: a `state_dict()` of PACE or of torch.optim.AdamW.
        groups: the optimizer's parameter groups; not changed.

    Raises:
        ValueError: it does not fit; the message names the first parameter or option that does not.
    """
    sizes = [[len(group["params"]) for group in side] for side in (saved["param_groups"], groups)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the checkpoint's parameter groups have {sizes[0]} parameters, the optimizer's "
            f"{sizes[1]}: make the same groups, in the same order, and load again"
        )
    ours = ["pullback" in group for group in saved["param_groups"]]
    completed = []
    for theirs, own, mine in zip(saved["param_groups"], ours, groups, strict=True):
        taken = theirs.keys() - (set() if own else ADAMW_ONLY)
        group = {**mine, "swapped": "", **{key: theirs[key] for key in taken}}
        group["swapped"] = group["swapped"] or ""  # None, in older checkpoints
        if own:
            group |= {key: OLDER[key] for key in OLDER.keys() - theirs.keys()}
        check_options(group)
        completed.append(group)

    states = dict(saved["state"])
    unknown = set(states)
    for g, group in enumerate(completed):
        swapped = decoded(group["swapped"]) or [""] * len(group["params"])
        kept = [states[key] for key in group["params"] if states.get(key)]
        # None in all the group: they are yet to begin, as after a checkpoint of AdamW.
        averaged = group["average"] and any(AVERAGES & state.keys() for state in kept)
        keeps = further_state(group)
        for i, (key, dtype) in enumerate(zip(group["params"], swapped, strict=True)):
            state = states.get(key, {})
            unknown.discard(key)
            try:
                _check_state(state, groups[g]["params"][i], keeps, averaged, dtype)
            except ValueError as error:
                raise ValueError(
                    f"{describe(groups, g, i)} cannot be loaded: {error}; nothing was changed"
                ) from None
            if state and state["step"] == 0 and not dtype:
                del states[key]  # saved before its first step, which begins its average anew
    if unknown:
        raise ValueError(
            f"the checkpoint has state for {sorted(map(str, unknown))[0]!r}, which is in none of "
            "its groups; nothing was changed"
        )
    for g, (theirs, own) in enumerate(zip(saved["param_groups"], ours, strict=True)):
        # Adam's weight decay is another; torch before 2.7 does not tell the two apart.
        is_adamw = "amsgrad" in theirs and theirs.get("decoupled_weight_decay", True)
        if not own and not is_adamw:
            raise ValueError(
                f"group {g} of the checkpoint is neither PACE's nor torch.optim.AdamW's, it has "
                f"{sorted(theirs.keys() - {'params'})}; nothing was changed"
            )
    return {**saved, "state": states, "param_groups": completed}


def _check_state(
    state: dict[str, Any], param: Tensor, keeps: frozenset[str], averaged: bool, swapped: str
) -> None:
    """Raises: ValueError: what is wrong with one parameter's state."""
    averages = AVERAGES & state.keys()
    if not state:
        if swapped:
            raise ValueError("the checkpoint has no state for it, but had its average swapped in")
        return  # it had no gradient yet
    if missing := sorted(MOMENTS - state.keys()):
        raise ValueError(
            f"its state lacks {missing} and has {sorted(map(str, state))}; PACE loads checkpoints "
            "of PACE and of torch.optim.AdamW"
        )
    if averages and (missing := sorted(keeps - state.keys())):
        raise ValueError(f"its state lacks {missing}, which its averages are made of")
    if extra := sorted(map(str, state.keys() - MOMENTS - AVERAGES - keeps)):
        raise ValueError(f"its state has {extra}, which PACE does not keep")
    name = swapped.partition("@")[2]
    if name and f"return_{name}" not in state:
        raise ValueError(f"the checkpoint had its average {name!r} swapped in, and lacks that")
    if len(averages) == 2 or ((averaged or swapped) and not averages):
        raise ValueError(f"its state must have 'average' or 'offset', got {sorted(averages)}")
    for name in sorted(state.keys() - {"step"}):
        check_tensor(name, state[name], param)
    step = torch.as_tensor(state["step"])
    if step.numel() != 1:
        raise ValueError(f"its 'step' must be one number, got shape {tuple(step.shape)}")


def check_tensor(name: str, value: Any, param: Tensor) -> None:
    """Raises: ValueError: why a saved value cannot be state that is shaped like the parameter."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"its {name!r} must be a floating-point tensor, got {kind}")
    if value.shape != param.shape:
        raise ValueError(f"its {name!r} has shape {tuple(value.shape)}")
    if is_sharded(value) != is_sharded(param):
        kinds = ["a whole tensor", "a shard"]
        raise ValueError(
            f"its {name!r} is {kinds[is_sharded(value)]}, the parameter "
            f"{kinds[is_sharded(param)]}; load it by "
            "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict"
        )
