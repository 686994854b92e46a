"""What an optimizer checkpoint must be to be loaded, said before anything is changed."""

import math
import re
import reprlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from . import swap
from .base import describe
from .options import EXCHANGE, Group, number
from .shards import is_partitioned, is_sharded, local
from .state import (
    AVERAGE,
    ELASTIC_STEPS,
    EXP_AVG,
    EXP_AVG_SQ,
    HISTORY,
    OFFSET,
    OUTER_BUFFER,
    OWN_EXP_AVG_SQ,
    PLAIN,
    PULLBACK_KEYS,
    RETURN,
    State,
    begun_keys_in,
    extra_keys_in,
    read_history,
    wide_dtype,
)

# By the options of a group: of torch's Adam and AdamW.
ADAM = {"betas", "eps", "amsgrad", "capturable", "differentiable", "foreach"}
SECOND_MOMENTS = frozenset({EXP_AVG_SQ, "max_exp_avg_sq", OWN_EXP_AVG_SQ})
# What DDP, torch.compile, FSDP and activation checkpointing put into a name.
WRAPPERS = re.compile(
    r"(?<![^.])(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
StateCheck = Callable[[State, Tensor, swap.Swapped | None], None]


def check_keeps_averages(optimizer: Optimizer, saved: dict[str, Any], where: Any) -> None:
    """Check that an optimizer which keeps no average is not given the state of one that does.

    Raises:
        ValueError: it is; averages and live weights would be lost.
    """
    groups = saved.get("param_groups", [])
    if any(isinstance(group, dict) and swap.SWAPPED in group for group in groups):
        raise ValueError(
            f"{where} was written with PACE or Pullback; {type(optimizer).__name__} would drop the "
            "average and the live weights in it, so give the optimizer that wrote it"
        )


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
    kept, with a warning. So are NaN and infinity in averages and moments of a group that steps
    with them, by nonfinite="ignore"; elsewhere they are refused.

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
    check_outline(saved)
    sizes = [[len(group["params"]) for group in side] for side in (saved["param_groups"], groups)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the checkpoint's parameter groups have {sizes[0]} parameters, the optimizer's "
            f"{sizes[1]}: make the same groups, in the same order, and load again"
        )
    params = [key for group in saved["param_groups"] for key in group["params"]]
    if len(set(params)) < len(params):
        raise ValueError("the checkpoint has a parameter twice in its groups; nothing was changed")
    states, completed, others = dict(saved["state"]), [], set()
    nonfinite: list[str] = []
    for g, (theirs, mine) in enumerate(zip(saved["param_groups"], groups, strict=True)):
        found = [states.get(key, {}) for key in theirs["params"]]
        _check_names(theirs, mine, g)
        if ELASTIC_STEPS in theirs and ELASTIC_STEPS not in mine:
            raise ValueError(
                "the checkpoint is of paceline.Elastic, whose averages stand still in steps; load "
                "it into one; nothing was changed"
            )
        with in_one_line(f"group {g} of the checkpoint"):
            group = {**mine, **complete(theirs, mine, g)}
            if mine.get("param_names"):
                group["param_names"] = mine["param_names"]
            if keys is None:
                _check_base_options(group, mine)
            group[swap.SWAPPED] = theirs.get(swap.SWAPPED) or ""
            if HISTORY in theirs or HISTORY in mine:
                group[HISTORY] = theirs.get(HISTORY) or ""
                read_history(group[HISTORY])
            check = checker(group, list(zip(mine["params"], found, strict=True)))
            records = _records(group[swap.SWAPPED], len(found))
        completed.append(group)
        for i, (key, record) in enumerate(zip(theirs["params"], records, strict=True)):
            state, param = found[i], mine["params"][i]
            try:
                check(state, param, record)
                for name in sorted(begun_keys_in(state)):
                    check_count(name, state[name])
                if keys is None:
                    _check_base_state(state, param, group)
                # DeepSpeed's stage 3 leaves the padding of its partitions unwritten.
                wrong = [] if is_partitioned(param) else _nonfinite_keys(state, param)
                if wrong:
                    if group["nonfinite"] != "ignore":
                        raise ValueError(
                            f"its {wrong[0]!r} is not finite; to go on with that, set nonfinite to "
                            "'ignore' in the checkpoint's groups"
                        )
                    nonfinite += [f"{name!r} of {describe(groups, g, i)}" for name in wrong]
                if record and record.average and RETURN + record.average not in state:
                    raise ValueError(
                        f"the checkpoint had its average {record.average!r} swapped in, and lacks "
                        "that"
                    )
            except Exception as error:  # of state of any kind
                raise ValueError(
                    f"{describe(groups, g, i)} cannot be loaded: {one_line(error)}; nothing was "
                    "changed"
                ) from None
            if keys is not None:
                others |= state.keys() - keys - extra_keys_in(state) - begun_keys_in(state)
            # Saved before its first step, where its averages begin; unless workers have met since.
            if state.get(count) == 0 and not record and not theirs.get(ELASTIC_STEPS):
                del states[key]
    unknown = sorted(map(repr, states.keys() - set(params)))
    if any(not isinstance(key, str) for key in states.keys() - set(params)):
        raise ValueError(
            f"the checkpoint has state for {unknown[0]}, which is in none of its groups; nothing "
            "was changed"
        )
    if nonfinite:
        warnings.warn(
            f"the checkpoint has tensors that are not finite: {', '.join(nonfinite[:9])}",
            stacklevel=4,
        )
    if others or unknown:
        warnings.warn(
            f"the checkpoint's state has {', '.join([*unknown, *sorted(map(repr, others))])} of "
            "another tool; it is carried along",
            stacklevel=4,
        )
    return {**saved, "state": states, "param_groups": completed}


@contextmanager
def load_hooks(optimizer: Optimizer, state_dict: Any) -> Iterator[dict[str, Any]]:
    """Run an optimizer's own hooks around a load that is not torch's.

    Yields:
        What they make of the `state_dict()`.

    Raises:
        ValueError: it is no dict.
    """
    check_is_dict(state_dict)
    saved = dict(state_dict)
    for pre_hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        changed = pre_hook(optimizer, saved)
        saved = saved if changed is None else changed
    yield saved
    for post_hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        post_hook(optimizer)


def check_is_dict(saved: Any) -> None:
    """Raises: ValueError: what is to be loaded is no dict."""
    if not isinstance(saved, dict):
        raise ValueError(f"the checkpoint must be a dict, got {_shown(saved)}; nothing was changed")


def one_line(error: Exception) -> str:
    """What an exception says, in one line, with its type where that says more."""
    lines = f"{type(error).__name__}: {error}".removeprefix("ValueError: ").splitlines()
    return lines[0] if lines else "no reason given"


@contextmanager
def in_one_line(what: str) -> Iterator[None]:
    """Have options of any kind be refused by a ValueError of one line.

    Args:
        what: cannot be loaded then.
    """
    try:
        yield
    except ValueError as error:  # which may show a tensor
        raise ValueError(" ".join(str(error).split())) from error
    except Exception as error:
        raise ValueError(
            f"{what} cannot be loaded: {one_line(error)}; nothing was changed"
        ) from error


def _shown(value: Any) -> str:
    """Anything in a few words."""
    return " ".join(reprlib.repr(value).split())


def check_outline(saved: Any) -> None:
    """Raises: ValueError: it does not have the parts of a `state_dict()`, whatever is in them."""

    def check(ok: bool, what: str, must: str, value: Any) -> None:
        if not ok:
            raise ValueError(
                f"{what} of the checkpoint must be {must}, got {_shown(value)}; nothing was changed"
            )

    check_is_dict(saved)
    state, groups = saved.get("state"), saved.get("param_groups")
    check(isinstance(state, dict), "'state'", "a dict", state)
    check(isinstance(groups, list), "'param_groups'", "a list", groups)
    for g, group in enumerate(groups):
        check(isinstance(group, dict), f"group {g}", "a dict", group)
        params = group.get("params")
        keys = isinstance(params, list) and all(isinstance(key, int | str) for key in params)
        check(keys, f"'params' of group {g}", "a list of numbers or names", params)
        for key in params:
            own = state.get(key, {})
            named = isinstance(own, dict) and all(isinstance(name, str) for name in own)
            check(named, f"the state of {key!r}", "a dict of names", own)


def _check_names(theirs: Group, mine: Group, index: int) -> None:
    """Raises: ValueError: a saved group has other names than the optimizer's, or another order."""
    count, names = len(theirs["params"]), theirs.get("param_names") or []
    strings = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not strings or len(names) not in (0, count):
        raise ValueError(
            f"'param_names' of group {index} of the checkpoint must be a list of {count} names, "
            f"got {_shown(names)}; nothing was changed"
        )
    if any(isinstance(key, str) for key in theirs["params"]):
        return  # torch.distributed.checkpoint has put the states in order by these names
    own = mine.get("param_names") or []
    for i, (saved, name) in enumerate(zip(names, own, strict=False)):
        if WRAPPERS.sub("", saved) != WRAPPERS.sub("", name):
            raise ValueError(
                f"parameter {i} of group {index} is {saved!r} in the checkpoint and {name!r} in "
                "the optimizer: give it the same parameters in the same order, or take "
                "'param_names' out of the checkpoint; nothing was changed"
            )


def _records(text: Any, count: int) -> list[swap.Swapped | None]:
    """Raises: ValueError: the text is no record of what so many parameters hold."""
    try:
        records = swap.read_record(text, count)
        dtypes = [getattr(torch, x.dtype.removeprefix("torch."), None) for x in records if x]
    except (ValueError, AttributeError) as error:
        raise ValueError(f"swapped={_shown(text)} cannot be loaded: {error}") from None
    if not all(isinstance(dtype, torch.dtype) for dtype in dtypes):
        raise ValueError(f"swapped={_shown(text)} cannot be loaded: it names no dtype")
    return records


def _check_base_options(group: Group, mine: Group) -> None:
    """Raises: ValueError: an option that nobody else checks is of another kind than before.

    Or it is a number that no optimizer of torch takes for it.
    """
    for key in mine.keys() - {"params", "param_names", swap.SWAPPED, "every", *EXCHANGE}:
        own, theirs = _kind(mine[key]), _kind(group[key])
        if own not in (None, theirs) and (own != "flag" or group[key] is not None):
            raise ValueError(f"{key} must be as {_shown(mine[key])}, got {_shown(group[key])}")
        if key in ("foreach", "fused") and not isinstance(group[key], bool | None):
            raise ValueError(f"{key} must be None, True or False, got {_shown(group[key])}")
        if own == "number" and key in ("lr", "weight_decay", "eps"):
            tensors = key == "lr" or isinstance(mine[key], Tensor)
            if not 0 <= number(group[key], tensors=tensors) < math.inf:
                raise ValueError(f"{key} must be a finite number >= 0, got {_shown(group[key])}")


def _kind(value: Any) -> Any:
    """Number, flag, or the kinds in a sequence; None for what may be anything."""
    if isinstance(value, bool):
        return "flag"
    if isinstance(value, tuple | list):
        return tuple(map(_kind, value))
    return None if _is_flags(value) or math.isnan(number(value, tensors=True)) else "number"


def _is_flags(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.bool


def _check_base_state(state: State, param: Tensor, group: Group) -> None:
    """Raises: ValueError: a base's step count or moments can be none."""
    needed: set[str] = set()
    if group.keys() >= ADAM and state.keys() - PULLBACK_KEYS - extra_keys_in(state):
        needed = {"step", EXP_AVG, EXP_AVG_SQ, *["max_exp_avg_sq"] * bool(group["amsgrad"])}
    if missing := sorted(needed - state.keys()):
        raise ValueError(f"its state lacks {missing}")
    for key in sorted(needed - {"step"}):
        check_tensor(key, state[key], param)
    for key in SECOND_MOMENTS & state.keys():
        _check_not_negative(key, state[key])
    if "step" in state:
        check_count("step", state["step"])


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
    if value.layout != param.layout or value.is_meta != param.is_meta:
        raise ValueError(f"its {key!r} must be in memory as the parameter is, a dense tensor")
    if key in SECOND_MOMENTS:
        _check_not_negative(key, value)


def _check_not_negative(key: str, value: Any) -> None:
    plain = type(value) in PLAIN or is_sharded(value)  # others' classes may not know how
    if plain and bool((local(value.detach()) < 0).any()):
        raise ValueError(f"its {key!r} must not be negative")


def _nonfinite_keys(state: State, param: Tensor) -> list[str]:
    """The averages and moments in a state that have NaN or infinity, or would once loaded."""
    others = {AVERAGE, OFFSET, EXP_AVG, OUTER_BUFFER, "momentum_buffer"}
    keys = state.keys() & (SECOND_MOMENTS | others)
    return [
        key
        for key in sorted(keys | extra_keys_in(state))
        if (type(x := state[key]) in PLAIN or is_sharded(x))
        and not bool(local(x.detach()).to(wide_dtype(param)).isfinite().all())
    ]


def check_count(key: str, value: Any, _: Tensor | None = None) -> None:
    """Raises: ValueError: a saved count of steps is not one whole number that float64 can count."""
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"its {key!r} must be one number, got shape {tuple(value.shape)}")
    flag = _is_flags(value)
    count = math.nan if flag else number(value, tensors=True)
    if not 0 <= count < 2**53 or not count.is_integer():
        got = count if isinstance(value, Tensor | float) and not flag else _shown(value)
        raise ValueError(f"its {key!r} must be a whole number >= 0 and < 2**53, got {got}")
