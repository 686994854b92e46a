"""What the state of a parameter can hold, and all making, casting and taking in of it.

    key                  shape  dtype       made at            meaning
    step                 ()     float64     PACE's first step  the steps taken
    idle_steps           ()     float64     the first step     the steps since without a gradient
    exp_avg              p's    state's     PACE's first step  m
    exp_avg_sq           p's    state's     PACE's first step  v
    average              p's    state's     the first step     what the pull goes toward
    offset               p's    state's     the first step     average - p, in place of average
    return_<name>        p's    wide        the first step     an average of `returns`
    <average>_<tensor>   p's    the rule's  the first step     what a rule `keeps`, as average_ema
    average_step         ()     float64     Pullback's first   the steps taken, beside the base's
    pullback_exp_avg_sq  p's    wide        the first pull     v, where Pullback's base has none
    begun_<average>      ()     float64     its late start     the t at which it began, where not 0
    outer_buffer         p's    wide        Elastic's first    the outer momentum, of DiLoCo

p is the parameter. Wide is float32, or float64 for a float64 parameter. The state's dtype is wide,
or bfloat16 with `state_dtype=torch.bfloat16`; where it is narrower than p, offset is kept. Counts
are on the CPU; PACE's on p's device where the host must not read them (`counts_on_device`). The t
of averages is the steps taken plus `idle_steps`, for they take in weights that stand still, too.
An average that is asked for later begins at the next step; the option `history` of a group keeps
which rule each average has had, for `paceline.snapshots`. While an average is in the parameter
(`paceline.swap`), its place keeps the live weights. Other keys are those of Pullback's base, or of
other tools. Averages of a group with the option `elastic_steps` stand still in steps, and move
where workers meet (`paceline.elastic`).
"""

import ctypes
import functools
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from . import shards
from .averaging import Averaging, parse
from .options import Group, parse_returns, returns_text

State: TypeAlias = dict[str, Any]

STEP, IDLE, EXP_AVG, EXP_AVG_SQ = "step", "idle_steps", "exp_avg", "exp_avg_sq"
AVERAGE, OFFSET = "average", "offset"
RETURN = "return_"  # and the name that `returns` gives
AVERAGE_STEP, OWN_EXP_AVG_SQ = "average_step", "pullback_exp_avg_sq"
OUTER_BUFFER = "outer_buffer"
COUNTS = frozenset({STEP, IDLE, AVERAGE_STEP})
BEGUN = "begun_"  # and the key of an average
HISTORY = "history"  # of a group: what `read_history` reads
ELASTIC_STEPS = "elastic_steps"  # of a group: steps with other workers (`paceline.elastic`)
# The keys of each optimizer, besides those of its further averages (`Averages.extra_keys`).
PACE_KEYS = frozenset({STEP, IDLE, EXP_AVG, EXP_AVG_SQ, AVERAGE, OFFSET, OUTER_BUFFER})
PULLBACK_KEYS = frozenset({AVERAGE, AVERAGE_STEP, IDLE, OWN_EXP_AVG_SQ, OUTER_BUFFER})
FROZEN = "frozen"  # of a group: the places of parameters that were frozen at the last step, as text

WIDE = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}
PLAIN = (Tensor, torch.nn.Parameter)  # not a DTensor or another subclass
HUGE_PAGE = 2**21  # bytes
MADV_HUGEPAGE = 14  # of Linux's madvise(2)


# ---- names and dtypes ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Averages:
    """The averages that a group keeps, by their keys in the state of a parameter."""

    rules: Mapping[str, Averaging]
    """`average` first, which the pull goes toward; then `return_<name>` of each of `returns`."""
    still: bool = False
    """Whether they move where workers meet, and not in steps."""

    @functools.cached_property
    def history(self) -> str:
        """The history of averages that have had these rules, and began with their parameters."""
        return json.dumps({key: [self.text(key), False] for key in self.rules})

    def text(self, key: str) -> str | None:
        """The rule by which an average takes in weights at each step, if one does."""
        return None if self.still else str(self.rules[key])

    def weight(self, key: str, step: int | Tensor) -> float | Tensor:
        """The weight of the newest iterate in an average at step t = `step`."""
        return 0.0 if self.still else self.rules[key].weight(step)

    @property
    def own(self) -> Averaging:
        """The rule of `average`."""
        return self.rules[AVERAGE]

    @functools.cached_property
    def returned(self) -> str:
        """The key of the model to return."""
        return next((key for key in self.rules if key != AVERAGE), AVERAGE)

    @functools.cached_property
    def extra(self) -> tuple[str, ...]:
        """Keys of the averages besides `average` that are one tensor each."""
        return tuple(k for k, rule in self.rules.items() if k != AVERAGE and not rule.keeps)

    @functools.cached_property
    def kept(self) -> dict[str, dict[str, str]]:
        """What rules keep: key of the average -> (key in the state -> the rule's own name)."""
        return {
            average: {f"{average}_{name}": name for name in rule.keeps}
            for average, rule in self.rules.items()
            if rule.keeps
        }

    @functools.cached_property
    def extra_keys(self) -> frozenset[str]:
        """All keys but `average`: of the other averages, and of what rules keep."""
        return frozenset(self.rules.keys() - {AVERAGE}).union(*self.kept.values())


def averages_of(group: Group) -> Averages:
    """The averages of a group of PACE's or Pullback's."""
    rule, returns = group["averaging"], group.get("returns")
    own = rule if isinstance(rule, Averaging) else parse(rule)  # one that was set between steps
    others = parse_returns(returns_text(returns)).items()
    rules = {AVERAGE: own} | {RETURN + name: rule for name, rule in others}
    return Averages(rules, still=ELASTIC_STEPS in group)


def frozen_places(group: Group) -> list[int]:
    """The places in a group of parameters that were frozen at the last step.

    Raises:
        ValueError: a checkpoint's text is none of this group's.
    """
    text = group.get(FROZEN) or ""
    try:
        places = [int(place) for place in text.split(",") if place]
    except (AttributeError, ValueError):
        places = [-1]
    if any(not 0 <= place < len(group["params"]) for place in places):
        raise ValueError(f"frozen must be places of parameters, got {text!r}")
    return places


def read_history(text: str | None) -> dict[str, tuple[str | None, bool]]:
    """What is known of the averages of a group, by their keys, from its option `history`.

    Returns:
        The rule that it has had since it began, None if that is not known or not one rule; and
        whether it began late for some parameter, whose state then has `begun_<average>`.

    Raises:
        ValueError: it is no such text.
    """
    try:
        found = {key: (rule, late) for key, (rule, late) in json.loads(text or "{}").items()}
    except (TypeError, AttributeError, ValueError, RecursionError):
        found = {"": (None, None)}
    if not all(isinstance(r, str | None) and isinstance(x, bool) for r, x in found.values()):
        raise ValueError(f"history must be as a state_dict() has it, got {text!r}")
    return found


def forget_history(group: Group, key: str) -> None:
    """Keep of an average of a group that it is not of one rule."""
    found = read_history(group.get(HISTORY))
    group[HISTORY] = json.dumps(found | {key: (None, False)})


def begun_keys_in(state: State) -> set[str]:
    """The keys in a state that say when its averages began."""
    return {key for key in state if key.startswith(BEGUN)}


def extra_keys_in(state: State) -> set[str]:
    """Keys of averages but the pull's, and of what rules keep, that a state has now."""
    return {key for key in state if key.startswith((f"{AVERAGE}_", RETURN))} - {AVERAGE_STEP}


def taken_in(state: State) -> int:
    """The t of the averages in a state: the steps that they have seen."""
    return int(state.get(AVERAGE_STEP, state.get(STEP, 0.0)) + state[IDLE])


def wide_dtype(param: Tensor) -> torch.dtype:
    """The dtype of averages of a parameter."""
    return WIDE.get(param.dtype, param.dtype)


def state_dtype(param: Tensor, group: Group) -> torch.dtype:
    """The dtype of PACE's moments and of its average or offset."""
    dtype: torch.dtype | None = group["state_dtype"]
    return dtype or wide_dtype(param)


def dtype_of(
    key: str, now: torch.dtype, param: Tensor, averages: Averages, own: torch.dtype
) -> torch.dtype:
    """The dtype that a tensor of the state is to have beside its parameter.

    Args:
        key: of the tensor, one of the table above.
        now: its dtype. What rules keep only gets wider.
        param: the parameter.
        averages: of its group.
        own: the dtype of moments and `average`.
    """
    if key in (EXP_AVG, EXP_AVG_SQ, AVERAGE, OFFSET):
        return own
    if key in (OWN_EXP_AVG_SQ, OUTER_BUFFER) or key in averages.rules:
        return wide_dtype(param)
    return torch.promote_types(now, param.dtype)


def counts_on_device(param: Tensor, group: Group) -> bool:
    """Whether PACE's step count is where the parameter is, and not read by the host."""
    skips = group["nonfinite"] == "skip" and param.device.type != "cpu"
    return bool(group["capturable"]) or skips


# ---- making -------------------------------------------------------------------------------------


def new(param: Tensor, dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor like the parameter, in huge pages where Linux has them to give.

    The CPU's kernel reads and writes five tensors in each thread, more than a CPU remembers of
    ordinary pages of memory (benchmarks/results).
    """
    made = torch.empty_like(param, dtype=dtype, requires_grad=False)
    mine = shards.local(made)
    if type(mine) in PLAIN and mine.device.type == "cpu":
        begin, end = mine.data_ptr(), mine.data_ptr() + mine.nbytes
        begin, end = -(-begin // HUGE_PAGE) * HUGE_PAGE, end // HUGE_PAGE * HUGE_PAGE
        if end > begin and (advise := _madvise()):
            advise(begin, end - begin, MADV_HUGEPAGE)  # what it answers does not matter
    return made


def new_count(value: float = 0.0) -> Tensor:
    """A count of steps; exact up to 2^53."""
    return torch.tensor(value, dtype=torch.float64)


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return cast(Callable[[int, int, int], int], advise)


def ensure(state: State, param: Tensor, group: Group, averages: Averages) -> None:
    """Have PACE's state of a parameter hold what its group's options ask for.

    Args:
        state: of the parameter; empty before its first step; changed.
        param: the parameter.
        group: its options.
        averages: of the group.
    """
    dtype = state_dtype(param, group)
    weights = param.detach()
    if fresh := not state:
        state |= {
            STEP: new_count(),
            IDLE: new_count(),
            EXP_AVG: new(param, dtype).zero_(),
            EXP_AVG_SQ: new(param, dtype).zero_(),
        }
    else:
        state |= {key: state[key].to(dtype) for key in (EXP_AVG, EXP_AVG_SQ)}
    ensure_counters(state, param, group)
    begins = begins_in(state, averages)
    note_begins(state, group, averages, begins, 0 if fresh or not begins else taken_in(state))
    if param.is_contiguous():  # the kernels go by places in memory
        for key in shaped_keys(state, averages):
            if not state[key].is_contiguous():
                state[key] = new(param, state[key].dtype).copy_(state[key])
    if dtype.itemsize < param.dtype.itemsize:
        if AVERAGE in state:
            state[OFFSET] = (state.pop(AVERAGE) - weights).to(dtype)
        elif OFFSET not in state:
            state[OFFSET] = new(param, dtype).zero_()
    elif OFFSET in state:
        state[AVERAGE] = weights.to(dtype) + state.pop(OFFSET)
    elif AVERAGE not in state or state[AVERAGE].dtype != dtype:
        state[AVERAGE] = new(param, dtype).copy_(state.get(AVERAGE, weights))
    begin_extra(state, averages, weights)
    for key in averages.extra_keys:  # the parameter may be of another dtype than before
        state[key] = state[key].to(dtype_of(key, state[key].dtype, param, averages, dtype))


def shaped_keys(state: State, averages: Averages) -> set[str]:
    """The keys of PACE's state, as it is now, of tensors that are shaped like the parameter."""
    return state.keys() & (PACE_KEYS - COUNTS | averages.extra_keys)


def ensure_counters(state: State, param: Tensor, group: Group) -> None:
    """Have PACE's counts be where its group's options ask for them."""
    device = param.device if counts_on_device(param, group) else torch.device("cpu")
    state.setdefault(IDLE, new_count())  # none in checkpoints of torch.optim.AdamW
    for key in (STEP, IDLE):
        if state[key].device != device or state[key].dtype != torch.float64:
            state[key] = state[key].to(device, torch.float64)


def begins_in(state: State, averages: Averages) -> set[str]:
    """The keys of averages that a state is to hold and does not yet."""
    there = state.keys() | ({AVERAGE} if OFFSET in state else set())
    return averages.rules.keys() - there


def note_begins(state: State, group: Group, averages: Averages, begins: set[str], t: int) -> None:
    """Keep when averages begin, and which rules those of a group have had.

    Args:
        state: of a parameter; changed.
        group: its options; its history is changed.
        averages: of the group.
        begins: the keys of those that begin now.
        t: of averages in that state.
    """
    late = begins if t else set()
    state |= {BEGUN + key: new_count(t) for key in late}
    if group.get(HISTORY) == averages.history and not late:
        return
    before = read_history(group.get(HISTORY))
    now = {}
    for key in averages.rules:
        text = averages.text(key)
        # One that is there without a history had who knows which rule.
        had, was_late = before.get(key, (text if key in begins else None, False))
        now[key] = [had if had == text else None, was_late or key in late]
    group[HISTORY] = json.dumps(now)


def begin_extra(state: State, averages: Averages, weights: Tensor) -> None:
    """Have a state hold the averages beside `average`, and what rules keep; drop those of before.

    Args:
        state: of a parameter; changed.
        averages: of its group.
        weights: what averages begin from that are not there yet.
    """
    there = extra_keys_in(state)
    if there == averages.extra_keys:
        return
    dtype = wide_dtype(weights)
    for average, rule in averages.rules.items():
        if average not in state and average != AVERAGE:
            state[average] = new(weights, dtype).copy_(weights)
        kept = averages.kept.get(average, {})
        before = {key for key in there if key.startswith(f"{average}_")}
        if before != kept.keys():  # it begins now, or its rule is another than before
            begun = rule.begin(weights, dtype)
            for key in before:
                del state[key]
            state |= {key: begun[name] for key, name in kept.items()}
    for key in extra_keys_in(state) - averages.extra_keys:
        del state[key]
        state.pop(BEGUN + key, None)


def restore(
    state: State,
    saved: State,
    keys: frozenset[str],
    param: Tensor,
    averages: Averages,
    own: torch.dtype,
) -> None:
    """Put saved tensors and counts into a parameter's state, each in its own dtype.

    torch casts what it loads to the parameter's dtype, and may share it with where it comes from.

    Args:
        state: of the parameter, as torch has loaded it; changed.
        saved: where it was loaded from.
        keys: what to restore.
        param: the parameter.
        averages: of its group.
        own: the dtype of moments and `average`.
    """
    for key in saved.keys() & (keys | begun_keys_in(saved)):
        value = saved[key]
        if key in COUNTS or key.startswith(BEGUN):
            state[key] = new_count(float(value))
        else:
            dtype = dtype_of(key, value.dtype, param, averages, own)
            state[key] = new(param, dtype).copy_(value)


# ---- taking in ----------------------------------------------------------------------------------


def take_in(averages: Averages, step: int, members: list[tuple[Tensor, State]]) -> None:
    """Have averages whose rules keep more tensors take in new weights.

    Args:
        averages: of a group.
        step: t, from 1.
        members: parameters, and their states; these are changed.
    """
    for average, kept in averages.kept.items():
        averages.rules[average].update_(
            step,
            [shards.local(p) for p, _ in members],
            [shards.local(state[average]) for _, state in members],
            [
                {name: shards.local(state[key]) for key, name in kept.items()}
                for _, state in members
            ],
        )
