"""The average and the pull of PACE around any other torch optimizer."""

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import Optimizer

from . import kernels, memory, shards
from .averaging import Averaging
from .base import Around, describe, refuse_layouts, summarize
from .loading import StateCheck, check_count, check_tensor, load_hooks, validated_checkpoint
from .options import (
    SHORT,
    Group,
    averages_left_open,
    check_average_and_pull,
    check_lr,
    check_scalar,
    check_spelling,
    expand_short,
    number,
    require,
)
from .state import (
    AVERAGE,
    AVERAGE_STEP,
    COUNTS,
    FROZEN,
    HISTORY,
    IDLE,
    OWN_EXP_AVG_SQ,
    PLAIN,
    PULLBACK_KEYS,
    WIDE,
    Averages,
    State,
    averages_of,
    begin_extra,
    begins_in,
    begun_keys_in,
    extra_keys_in,
    frozen_places,
    new,
    new_count,
    note_begins,
    restore,
    take_in,
    taken_in,
    wide_dtype,
)
from .swap import SWAPPED, Swapped, write_record
from .update import TINY, MovedSlot, PullScalars

GAINS = ("adam", "own", "scalar")
# State of bases whose `exp_avg_sq` is of gradients in another basis than the parameter's.
ROTATED = {"Q", "GG", "projector", "ortho_matrix"}
# Options that LR schedulers add to groups.
SCHEDULED = {"initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr"}


class Pullback(Around):
    r"""Keeps an average of the weights around any optimizer, and can pull them toward it.

        θ'        = base(θ_t)                                 the base's own step
        λ_t       = min(1, η·c·β_t / (sqrt(v̂_t) + ε))         gain of a coordinate, or min(1, c)
        θ_{t+1}   = θ' + λ_t·(average_{t-1} - θ_t)            the pull starts at θ_t
        average_t = what the rule makes of θ_{t+1}            a power EMA with κ = 0.7, say

    With c = 0 the live weights are the base's, and the average watches. Around
    `torch.optim.AdamW` it is PACE.

        opt = Pullback(torch.optim.Muon(matrices, lr=0.02), pullback=0.1)
        opt = Pullback(torch.optim.SGD(model.parameters(), lr=0.1), averaging=Uniform(start=1000))

    It is an optimizer itself, on the base's own `state` and `param_groups` (the same objects), so
    that schedulers, scalers and checkpoints see one flat optimizer; swap and export are as in PACE.
    Step, save, load and add groups to this one: the base refuses to step or load past it.

    It adds to each parameter's state what `paceline.state` says: a count of steps, the averages,
    and a second moment of its own where the base keeps none. A pull holds a copy of the weights
    while the base steps, on the CPU also between steps, and is a pass over memory that PACE's
    kernel does not need: docs/averages.md says what that costs.

    Every option below except `base` can be set for each parameter group, in the base's groups.

    Args:
        base: any torch optimizer that moves the weights in `step()` only, keeps all of its state
            in `state` and `param_groups`, and, where a pull is asked for, has not stepped.
        pullback: strength c >= 0; with the gains "adam" and "own" in the unit of a gradient, with
            "scalar" the gain itself.
        averaging: as in PACE, the average that the pull goes toward, and its default.
            Its steps go on from the base's own count, where it keeps one as `step`.
        kappa: as in PACE, short for averaging=PowerEMA(kappa).
        return_kappa: as in PACE, κ of a second average, to be returned.
        returns: as in PACE, averages to be returned.
        gain: where v̂ comes from. "adam": from the base's `exp_avg_sq` (with amsgrad
            `max_exp_avg_sq`), with the group's betas[1] and eps, for each parameter for which the
            base keeps that in the parameter's own coordinates; for others as "own", which is a
            second moment kept here, and right for bases that keep `exp_avg_sq` scaled or corrected
            (Prodigy, StableAdamW). "scalar": there is none, λ is c for all coordinates,
            in [0, 1] unless gain_clip is False.
        gain_beta2: decay in [0, 1) of its own second moment.
        gain_eps: ε >= 0 beside its own second moment, in the unit of a gradient.
        gain_clip: hold the gain to at most 1, so that the pull never goes past the average.
        nonfinite: what a gradient that is not finite, or whose square is not, does. "skip": the
            base does not step, on no rank, and the step does not count. "raise":
            FloatingPointError before anything has changed, on all ranks. Both read the gradients
            once more, and wait for their device; all ranks of the default process group must step
            together. "ignore": what the base does with it.
        track_stats: measure the steps of groups with a pull for `stats()`, where `base_norm` stands
            for PACE's `adamw_norm`.

    Raises:
        ValueError: the base cannot be used, for a reason said above, or because it has options of
            these names; a parameter is not floating-point; or an argument is out of its range.

    Source: Au & Block, Training for the Model You Return, arXiv:2606.25086 (2026), for the pull;
    each average names its own.
    """

    _own_option = "averaging"

    def __init__(
        self,
        base: Optimizer,
        pullback: float = 0.0,
        averaging: Averaging | str | None = None,
        *,
        kappa: float | None = None,
        return_kappa: float | None = None,
        returns: Averaging | str | Mapping[str, Averaging | str] | None = None,
        gain: str = "adam",
        gain_beta2: float = 0.999,
        gain_eps: float = 1e-8,
        gain_clip: bool = True,
        nonfinite: str = "skip",
        track_stats: bool = False,
    ) -> None:
        ours = {k: x for k, x in locals().items() if k not in ("self", "base", "__class__")}
        expand_short(ours)
        given = dict(ours)
        _check_options(ours)
        _check_base(base, ours)
        ours |= averages_left_open(base.param_groups, given)
        self.base, self._ours = base, ours
        completed = [self._completed(i) for i in range(len(base.param_groups))]
        stepped = any(map(_has_stepped, base.state.values()))
        if stepped and any(group["pullback"] for group in completed):
            raise ValueError(
                "base must not have stepped yet where a pull is asked for, got a "
                f"{type(base).__name__} with state; make it anew, or give pullback=0"
            )
        for group, complete in zip(base.param_groups, completed, strict=True):
            _assign(group, complete | {SWAPPED: ""})
        self._forget()
        # In place of Optimizer's __init__, which would make groups and a state of its own.
        super().__setstate__({"defaults": base.defaults | ours})

    def _forget(self) -> None:
        super()._forget()
        self._copies: dict[Tensor, Tensor] = {}  # of weights before a step, on the CPU
        self._unstepped: dict[Tensor, State] = {}  # kept from the base in its first step

    def __getstate__(self) -> dict[str, Any]:
        names = ("base", "defaults", "_ours", "_state_is_provisional")
        return {name: getattr(self, name) for name in names}

    def _completed(self, index: int) -> Group:
        """One of the base's groups with all of our options, checked."""
        groups = self.base.param_groups
        said = dict(groups[index])
        check_spelling(said, {*self._ours, *SHORT, *self.base.defaults})
        theirs = {name: said.pop(name) for name in SHORT if name in self.base.defaults}
        expand_short(said)
        complete = self._ours | said | theirs
        refuse_layouts(groups, index, ValueError)
        _check_options(complete)
        for i, p in enumerate(complete["params"]):
            if p.requires_grad and p.dtype not in WIDE:
                raise ValueError(
                    f"params must be 16-, 32- or 64-bit floating-point tensors, got {p.dtype} in "
                    f"{describe(groups, index, i)}"
                )
        return complete

    def add_param_group(self, param_group: Group) -> None:
        """Add a group to the base; what it lacks of our options is as given to this optimizer.

        Raises:
            ValueError: an option is out of range, or a parameter is flattened by FSDP1, is a
                DTensor of Partial placement, or is not floating-point.
            RuntimeError: an earlier group was added to the base past this optimizer.

            The group has not been added then.
        """
        swapped = self.swapped
        self.base.add_param_group(param_group)
        groups = self.base.param_groups
        try:
            _assign(groups[-1], self._completed(len(groups) - 1))
        except ValueError:
            groups.pop()
            raise
        live: list[Swapped | None] = [None] * len(groups[-1]["params"])
        groups[-1][SWAPPED] = write_record(live) if swapped else ""

    # ---- stepping -----------------------------------------------------------------------------

    @_disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, **options: Any) -> Any:
        """Have the base take one step; then pull, and take the new weights into the averages.

        Args:
            closure: re-evaluates the model under gradients and returns the loss, for the base.
            options: what else the base's `step` takes.

        Returns:
            What the base's returns; after a skipped step the closure's loss, or None.

        Raises:
            RuntimeError: the averaged weights are swapped in, or a gradient is sparse or complex.
                Nothing has changed then.
            FloatingPointError: with `nonfinite="raise"`, as said there.
        """
        if closure is None and self._is_state_probe():
            self._make_provisional_state()
            return None
        self._refuse_while_swapped()
        plan: list[_Planned] | None = None
        loss: Any = None

        def evaluate() -> Any:
            nonlocal loss, plan
            assert closure is not None
            with torch.enable_grad():
                loss = closure()
            if plan is None:  # the first time, when nothing has moved yet
                plan = self._plan()
            return loss

        try:
            if closure is None:
                plan = self._plan()
                loss = self._base_step(**options)
            else:
                loss = self._base_step(evaluate, **options)
        except _Skipped:
            self._count_faults([], True)
            return loss
        finally:
            for p, ours in self._unstepped.items():
                self.state[p] |= ours
            self._unstepped = {}
        self._follow(plan or [])
        return loss

    def _make_provisional_state(self) -> None:
        """Have the base make its state by a step, add ours, and undo the rest of that step."""
        plan = self._plan()
        groups = [dict(group) for group in self.param_groups]
        self._base_step()
        for x in plan:
            assert x.before is not None
            shards.local(x.param).copy_(shards.local(x.before))
            self._begin(x)
        for group, before in zip(self.param_groups, groups, strict=True):
            counts = {"step": 0} if "step" in group else {}  # some count there: to be loaded, too
            history = {name: x for name, x in group.items() if name == HISTORY}
            _assign(group, counts | before | history)
        self._state_is_provisional = True

    def _plan(self) -> list["_Planned"]:
        """What has to be known of each parameter that steps, before the base moves it.

        Raises:
            _Skipped: the step is to be skipped.
        """
        groups = self.param_groups
        for index, group in enumerate(groups):
            self._check_gradients(groups, index)
            ours = [group[name] for name in self._ours]
            if ours != self._checked.get(index):
                refuse_layouts(groups, index, RuntimeError)
                checked = dict(group)
                _check_options(checked)
                group |= checked
                self._checked[index] = [group[name] for name in self._ours]
        self._check_memory()
        self._compare_ranks()
        if bool(self._skips_step()):
            raise _Skipped
        self._drop_provisional_state()
        plan = []
        earlier, self._copies = self._copies, {}
        for group in self.param_groups:
            pulls, averages = group["pullback"] != 0, averages_of(group)
            if pulls and group["gain"] != "scalar":
                check_lr(group)
            for p in group["params"]:
                state = self.state.get(p, {})
                idle = p.grad is None
                if idle and AVERAGE not in state:
                    continue
                done = _steps_done(state, group)
                begins = AVERAGE not in state or extra_keys_in(state) != averages.extra_keys
                pulled = pulls and not idle
                before = None
                if begins:  # which may keep it
                    before = p.detach().clone()
                elif pulled:
                    before = self._copy(p, earlier)
                square = None
                if pulled and not _has_second_moment(p, state, group):  # at a first step: yet
                    square = shards.local_grad(p).to(wide_dtype(p)).square()
                plan.append(_Planned(p, group, averages, done, idle, begins, before, square))
                if _is_unstepped(state):
                    self._unstepped[p] = self.state.pop(p)
        return plan

    def _copy(self, param: Tensor, earlier: dict[Tensor, Tensor]) -> Tensor:
        """θ_t. On the CPU its memory is kept between steps: new memory costs more than the copy."""
        if type(param) not in PLAIN or param.device.type != "cpu":
            return param.detach().clone()
        kept = earlier.get(param)
        if kept is None or (kept.dtype, kept.shape) != (param.dtype, param.shape):
            kept = new(param, param.dtype)
        self._copies[param] = kept
        return kept.copy_(param.detach())

    def _check_memory(self) -> None:
        """Raises: RuntimeError: what a step reads and writes does not go together in memory."""
        tensors: list[Tensor] = []
        owners: list[Tensor] = []
        for group in self.param_groups:
            keys = {AVERAGE, OWN_EXP_AVG_SQ} | averages_of(group).extra_keys
            for p in group["params"]:
                state = self.state.get(p) or {}
                if p.grad is None and AVERAGE not in state:
                    continue
                held = {key: state[key] for key in sorted(state.keys() & keys)}
                beside = held | ({} if p.grad is None else {"gradient": p.grad})
                if why := memory.first_fault(p, beside):
                    raise RuntimeError(f"{self._name(p)} cannot step: {why}; nothing was changed")
                tensors += [shards.local(p), *(shards.local(x) for x in held.values())]
                owners += [p] * (1 + len(held))
        spans = memory.spans(tensors)
        if spans != self._spans and (found := memory.shared(tensors, spans)):
            names = " and ".join(self._name(owners[i]) for i in found)
            raise RuntimeError(f"{names} share memory; nothing was changed")
        self._spans = spans

    def _begin_averages(self, group: Group, param: Tensor) -> None:
        done, weights = _steps_done(self.state.get(param, {}), group), param.detach()
        averages = averages_of(group)
        self._begin(_Planned(param, group, averages, done, True, True, weights, None))

    def _begin(self, x: "_Planned") -> None:
        """Make what its state lacks of ours.

        Not before the base has made its own: it would take a state that is not empty for that.
        """
        state = self.state[x.param]
        dtype = wide_dtype(x.param)
        begins = begins_in(state, x.averages)
        if AVERAGE not in state:
            assert x.before is not None
            state |= {AVERAGE_STEP: new_count(x.done), AVERAGE: x.before.to(dtype, copy=True)}
        if state[AVERAGE].dtype != dtype:
            state[AVERAGE] = state[AVERAGE].to(dtype)
        for key in (AVERAGE_STEP, IDLE):  # float32 in what was saved otherwise
            if key not in state or state[key].dtype != torch.float64:
                state[key] = state.get(key, new_count()).double()
        note_begins(state, x.group, x.averages, begins, taken_in(state) if begins else 0)
        if x.begins:
            assert x.before is not None
            begin_extra(state, x.averages, x.before)
        if x.idle:
            return
        if x.square is None or _has_second_moment(x.param, state, x.group):
            state.pop(OWN_EXP_AVG_SQ, None)  # or it would be out of date when it is needed again
            return
        if OWN_EXP_AVG_SQ not in state:
            # Steps that were taken without it count as if they had had this gradient, too.
            state[OWN_EXP_AVG_SQ] = torch.zeros_like(x.param, dtype=dtype)
            own = shards.local(state[OWN_EXP_AVG_SQ])
            own.add_(x.square, alpha=1.0 - x.group["gain_beta2"] ** x.done)

    def _follow(self, plan: list["_Planned"]) -> None:
        """After the base's step: the pull, and the averages."""
        alike: dict[tuple[Any, ...], list[_Planned]] = defaultdict(list)
        if all(x.idle for x in plan):  # nothing has stepped
            return
        for x in plan:
            self._begin(x)
            state = self.state[x.param]
            state[IDLE if x.idle else AVERAGE_STEP] += 1
            if x.square is not None and OWN_EXP_AVG_SQ in state:
                own = shards.local(state[OWN_EXP_AVG_SQ])
                own.lerp_(x.square, 1.0 - x.group["gain_beta2"])
            param = shards.local(x.param)
            alone = None if type(param) in PLAIN else id(param)
            place = (id(x.group), param.device, param.dtype, x.idle, OWN_EXP_AVG_SQ in state)
            alike[*place, int(state[AVERAGE_STEP]), int(state[IDLE]), alone].append(x)
        measured: dict[int, list[Any]] = {id(group): [] for group in self.param_groups}
        self._note_frozen()
        work = []
        for key, members in alike.items():
            *_, own, step, idle, _ = key
            group, averages = members[0].group, members[0].averages
            pull = _pull(group, averages, step, idle, own)
            work.append((members, [self._slot(x) for x in members], step + idle, pull))
        for members, slots, _, pull in work:
            group = members[0].group
            now = pull.without_averages() if self._projections else pull
            measured[id(group)] += kernels.follow(slots, now, measure=group["track_stats"])
        if self._projections:
            self._project()
            for _, slots, _, pull in work:
                moved = [x._replace(before=None) for x in slots]
                kernels.follow(moved, pull, measure=False)
        for members, _, step, _ in work:
            take_in(members[0].averages, step, [(x.param, self.state[x.param]) for x in members])
        self._stats = summarize(list(measured.values()), own_step="base_norm")

    def _slot(self, x: "_Planned") -> MovedSlot:
        state = self.state[x.param]
        param, average = shards.local(x.param), shards.local(state[AVERAGE])
        extra = tuple(shards.local(state[key]) for key in x.averages.extra)
        if x.idle or not x.group["pullback"]:
            return MovedSlot(param, average, extra=extra)
        assert x.before is not None
        v = None
        if x.group["gain"] != "scalar":
            own = state.get(OWN_EXP_AVG_SQ)
            v = shards.local(_second_moment(state, x.group) if own is None else own)
        return MovedSlot(param, average, shards.local(x.before), v, extra)

    # ---- checkpoints --------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a `state_dict()`: the base what is its own, in its own way; the rest in float32.

        One of the base alone is a start: its state is taken over, a warning says so, and the
        averages begin from the weights that are there at the next step.

        Raises:
            ValueError: groups that do not match, or are another base's; an option out of its range;
                or a parameter whose average, or what the pull needs, is missing, misshapen, or that
                of a shard. Nothing has changed then. What the base raises.
        """
        with load_hooks(self, state_dict) as given:
            saved = validated_checkpoint(
                given,
                self.param_groups,
                keys=None,
                count=AVERAGE_STEP,
                complete=self._complete,
                checker=_checker,
            )
            # A copy, for torch's optimizers would share the tensors with where they come from.
            theirs = {k: _copied(x) for k, x in saved["state"].items() if not _is_unstepped(x)}
            with self._calling_base():
                self.base.load_state_dict(saved | {"state": theirs})
            for group, mine in zip(saved["param_groups"], self.param_groups, strict=True):
                averages = averages_of(mine)
                keys = PULLBACK_KEYS | averages.extra_keys
                for key, p in zip(group["params"], mine["params"], strict=True):
                    if source := saved["state"].get(key, {}):
                        restore(self.state[p], source, keys, p, averages, wide_dtype(p))
            self._stats, self._state_is_provisional = None, False
            self._tell_of_projections()
        states = [saved["state"].get(key, {}) for g in saved["param_groups"] for key in g["params"]]
        if any(_has_stepped(state) and AVERAGE not in state for state in states):
            warnings.warn(
                f"the checkpoint keeps no averages, as those of {type(self.base).__name__}: its "
                "state is taken over, and averages begin from the weights that are there at the "
                "next step",
                stacklevel=2,
            )

    def _complete(self, saved: Group, mine: Group, index: int) -> Group:
        """All options of a saved group of this optimizer or of its base, checked."""
        lacks = sorted(self.base.defaults.keys() - saved.keys())
        others = sorted(saved.keys() - mine.keys() - SCHEDULED)
        if lacks and others:
            raise ValueError(
                f"group {index} of the checkpoint is not of {type(self.base).__name__}: it lacks "
                f"{lacks} and has {others}; nothing was changed"
            )
        group = {name: mine[name] for name in self._ours} | saved
        _check_options(group)
        if FROZEN in mine or FROZEN in saved:
            group[FROZEN] = saved.get(FROZEN, "")
        frozen_places(group | {"params": mine["params"]})
        return group


class _Skipped(Exception):
    """The step is not to be taken."""


class _Planned(NamedTuple):
    """A parameter that the base is about to move."""

    param: Tensor
    group: Group
    averages: Averages
    done: float  # steps that were taken of it
    idle: bool  # it has no gradient: its averages alone go on
    begins: bool  # its state lacks averages, or has others than its group
    before: Tensor | None  # θ_t, where it will be needed
    square: Tensor | None  # g², this rank's part, where a second moment of our own may need it


def _checker(group: Group, members: list[tuple[Tensor, State]]) -> StateCheck:
    """What raises a ValueError for a saved state that lacks, or has wrong, what is ours in it."""
    # If no parameter of the group has one, the pull was turned on after the last step.
    pulled = any(
        OWN_EXP_AVG_SQ in state or _has_second_moment(p, state, group) for p, state in members
    )
    averages = {AVERAGE, AVERAGE_STEP, *averages_of(group).extra_keys}

    def check(state: State, param: Tensor, record: Swapped | None) -> None:
        if not record and not state.keys() & PULLBACK_KEYS:
            return  # it had no gradient yet, or is the base's alone
        needed = set(averages)
        stepped = not _is_unstepped(state)
        if pulled and stepped and group["pullback"] and not _has_second_moment(param, state, group):
            needed.add(OWN_EXP_AVG_SQ)
        if missing := sorted(needed - state.keys()):
            raise ValueError(f"its state lacks {missing}")
        for key in sorted(state.keys() & (averages | PULLBACK_KEYS)):
            (check_count if key in COUNTS else check_tensor)(key, state[key], param)

    return check


def _copied(value: Any) -> Any:
    """A deep copy of state, but for tensors of others' classes, which may not know how."""
    if isinstance(value, Tensor):
        return value.clone() if type(value) in PLAIN or shards.is_sharded(value) else value
    if isinstance(value, dict):
        return {key: _copied(x) for key, x in value.items()}
    return type(value)(map(_copied, value)) if isinstance(value, (list, tuple)) else value


def _assign(group: Group, options: Group) -> None:
    """Give a group just these options; it stays the same object."""
    group.clear()
    group |= options


def _check_options(options: Group) -> None:
    check_average_and_pull(options)
    require(options, "gain", options["gain"] in GAINS, f"one of {', '.join(GAINS)}")
    check_scalar(options, options["gain_clip"])
    require(options, "gain_beta2", 0 <= number(options["gain_beta2"]) < 1, "in [0, 1)")
    require(options, "gain_eps", 0 <= number(options["gain_eps"]) < math.inf, "a number >= 0")
    for name in ("gain_beta2", "gain_eps"):
        options[name] = float(options[name])
    require(options, "nonfinite", options["nonfinite"] != "guard", "one of skip, raise, ignore")
    if not options["gain_eps"] and not options["gain_clip"]:
        raise ValueError("gain_clip=False needs gain_eps > 0, got 0: a gain would have no bound")
    for name in ("gain_clip", "track_stats"):
        require(options, name, isinstance(options[name], bool), "True or False")


def _check_base(base: Optimizer, ours: dict[str, Any]) -> None:
    if not isinstance(base, Optimizer):
        raise ValueError(f"base must be a torch.optim.Optimizer, got {type(base).__name__}")
    name = type(base).__name__
    # By what those have that do: Schedule-Free, PACE; SAM; optimizers inside the backward pass.
    for methods in (("eval", "train"), ("first_step",), ("fused_backward",)):
        if all(hasattr(base, method) for method in methods):
            raise ValueError(
                f"base must move the weights in step() only, got a {name}, whose "
                f"{' and '.join(f'{method}()' for method in methods)} may move them, too"
            )
    if taken := sorted(base.defaults.keys() & ours.keys()):
        raise ValueError(f"base must not have options of our names, got a {name} with {taken}")
    if any(SWAPPED in group for group in base.param_groups):
        raise ValueError(f"base must not have been in a Pullback before, got a {name} that was")
    if extra := sorted(base.state_dict().keys() - {"state", "param_groups"}):
        raise ValueError(
            f"base must keep all of its state in state and param_groups, got a {name}, whose "
            f"state_dict() has {extra}"
        )
    for group in base.param_groups:
        if group.get("pullback", ours["pullback"]) and group.get("gain", ours["gain"]) != "scalar":
            require({"lr": name}, "lr", "lr" in group, "an option of the base's groups")


def _steps_done(state: State, group: Group) -> float:
    """The steps that were taken of a parameter."""
    # A base's count for all the group is not that of one that joins it now.
    base_count: Any = state.get("step", group.get("step", 0) if state else 0)
    return float(state.get(AVERAGE_STEP, base_count))


def _is_unstepped(state: State) -> bool:
    """Whether this state has averages that began before the base made its own (`Elastic`)."""
    ours = PULLBACK_KEYS | extra_keys_in(state) | begun_keys_in(state)
    return number(state.get(AVERAGE_STEP), tensors=True) == 0 and state.keys() <= ours


def _has_stepped(state: dict[str, Any]) -> bool:
    """Whether this state is of a parameter that has stepped.

    Some bases make their state with themselves, and count 0 steps in it.
    """
    return bool(state and state.get("step", 1) != 0)


def _has_second_moment(param: Tensor, state: dict[str, Any], group: Group) -> bool:
    """Whether a pull on the parameter needs no second moment of our own."""
    if group["gain"] != "adam":
        return bool(group["gain"] == "scalar")
    v = state.get("exp_avg_sq")
    plain = isinstance(v, Tensor) and v.shape == param.shape and not ROTATED & state.keys()
    return plain and "betas" in group and "eps" in group


def _second_moment(state: dict[str, Any], group: Group) -> Tensor:
    """Adam's v of a parameter, as a tensor to compute with."""
    v: Any = state["max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"]
    quantized = hasattr(v, "dequantize") and type(v) not in PLAIN and not shards.is_sharded(v)
    return v.dequantize() if quantized else v  # type: ignore[no-any-return]


def _pull(group: Group, averages: Averages, step: int, idle: int, own: bool) -> PullScalars:
    """The pull of a step under a group's options.

    Args:
        group: the options.
        averages: of the group.
        step: steps taken, with this one.
        idle: steps without a gradient.
        own: whether the second moment is one that Pullback keeps.
    """
    rule = averages.own
    gain = group["pullback"]
    beta2, eps = group["gain_beta2"], group["gain_eps"]
    if gain and group["gain"] != "scalar":
        lr = group["lr"]
        lr = float(lr) if isinstance(lr, Tensor) and lr.device.type == "cpu" else lr
        gain = lr * gain * rule.falloff(step + idle)
        if not own:
            beta2, eps = group["betas"][1], group["eps"]
    return PullScalars(
        gain=gain,
        root_bias2=math.sqrt(1.0 - beta2**step),
        eps=eps or TINY,
        clip=group["gain_clip"],
        weight=averages.weight(AVERAGE, step + idle),
        extra_weights=tuple(averages.weight(key, step + idle) for key in averages.extra),
    )
