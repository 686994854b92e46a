"""The average and the pull of PACE around any other torch optimizer."""

import math
import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from . import shards
from .averaged import AveragedOptimizer, begin_, further_dtype, further_in, summarize, take_in_
from .averaging import Averaging, PowerEMA
from .loading import check_tensor
from .options import (
    AVERAGE,
    DTYPES,
    Group,
    averages_of,
    averaging_of,
    check_pull,
    decoded,
    describe,
    encoded,
    further_state,
    number,
    require,
    require_one_return,
    returns_of,
)
from .update import PLAIN, Follower, follow_, in_batches

GAINS = ("adam", "own", "scalar")
# What this adds to the base's state of a parameter, besides the averages.
STEP, OWN = "average_step", "pullback_exp_avg_sq"
# State of bases whose `exp_avg_sq` is of gradients in another basis than the parameter's.
ROTATED = {"Q", "GG", "projector", "ortho_matrix"}
# Options that LR schedulers add to groups.
SCHEDULED = {"initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr"}


class Pullback(AveragedOptimizer):
    r"""Keeps an average of the weights around any optimizer, and can pull them toward it.

        θ'        = base(θ_t)                                 the base's own step
        λ_t       = min(1, η·c·β_t / (sqrt(v̂_t) + ε))         gain of a coordinate, or min(1, c)
        θ_{t+1}   = θ' + λ_t·(average_{t-1} - θ_t)            the pull starts at θ_t
        average_t = what the rule makes of θ_{t+1}            a power EMA with κ = 0.5, say

    With c = 0 the live weights are the base's, and the average watches. Around
    `torch.optim.AdamW` it is PACE.

        opt = Pullback(torch.optim.Muon(matrices, lr=0.02), pullback=0.1)
        opt = Pullback(torch.optim.SGD(model.parameters(), lr=0.1), averaging=Uniform(start=1000))

    It is an optimizer itself, on the base's own `state` and `param_groups` (the same objects), so
    that schedulers, scalers and checkpoints see one flat optimizer; swap and export are as in PACE.
    Step, save and load this one, not the base.

    State that it adds for each parameter: `average_step` (0-dim float32), `average` (float32, or
    float64), `return_<name>` for each of `returns`, what rules keep besides, and
    `pullback_exp_avg_sq` where it keeps a second moment of its own. A pull holds a copy of the
    weights while the base steps, and is a pass over memory that PACE's kernel does not need:
    docs/averages.md says what that costs.

    Every option below but `base` can be set for each parameter group, in the base's groups.

    Args:
        base: any torch optimizer that moves the weights in `step()` only, keeps all of its state
            in `state` and `param_groups`, and, where a pull is asked for, has not stepped.
        pullback: strength c >= 0; with the gains "adam" and "own" in the unit of a gradient, with
            "scalar" the gain itself.
        averaging: an average of `paceline.averaging`, or its text. Its steps go on from the base's
            own count, where it keeps one as `step`.
        return_power: as in PACE, κ of a second average, to be returned.
        returns: as in PACE, averages to be returned.
        gain: where v̂ comes from. "adam": from the base's `exp_avg_sq` (with amsgrad
            `max_exp_avg_sq`), with the group's betas[1] and eps, for each parameter for which the
            base keeps that in the parameter's own coordinates; for others as "own", which is a
            second moment kept here, and right for bases that keep `exp_avg_sq` scaled or corrected
            (Prodigy, StableAdamW). "scalar": there is none, λ is min(1, c) for all coordinates.
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

    def __init__(
        self,
        base: Optimizer,
        pullback: float = 0.0,
        averaging: Averaging | str = PowerEMA(),  # noqa: B008  # it is frozen
        *,
        return_power: float | None = None,
        returns: Averaging | str | dict[str, Averaging | str] | None = None,
        gain: str = "adam",
        gain_beta2: float = 0.999,
        gain_eps: float = 1e-8,
        gain_clip: bool = True,
        nonfinite: str = "skip",
        track_stats: bool = False,
    ) -> None:
        ours = {
            "pullback": pullback,
            "averaging": averaging,
            "returns": returns,
            "gain": gain,
            "gain_beta2": gain_beta2,
            "gain_eps": gain_eps,
            "gain_clip": gain_clip,
            "nonfinite": nonfinite,
            "track_stats": track_stats,
        }
        if return_power is not None:
            ours["return_power"] = return_power
        require_one_return(ours)
        _check_options(ours)
        _check_base(base, ours)
        self.base, self._ours = base, ours
        completed = [self._completed(i) for i in range(len(base.param_groups))]
        stepped = any(map(_has_stepped, base.state.values()))
        if stepped and any(group["pullback"] for group in completed):
            raise ValueError(
                "base must not have stepped yet where a pull is asked for, got a "
                f"{type(base).__name__} with state; make it anew, or give pullback=0"
            )
        for group, complete in zip(base.param_groups, completed, strict=True):
            group.pop("return_power", None)  # it is in `returns`
            group |= complete | {"swapped": ""}
        self._forget()
        # In place of Optimizer's __init__, which would make groups and a state of its own.
        super().__setstate__({"defaults": base.defaults | ours})

    # The same objects as the base's, whoever assigns new ones.

    @property
    def state(self) -> Any:
        """The base's state, with ours in it."""
        return self.base.state

    @state.setter
    def state(self, value: Any) -> None:
        self.base.state = value

    @property
    def param_groups(self) -> Any:
        """The base's groups, with our options in them."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, value: Any) -> None:
        self.base.param_groups = value

    def __getstate__(self) -> dict[str, Any]:
        names = ("base", "defaults", "_ours", "_rehearsed")
        return {name: getattr(self, name) for name in names}

    def _completed(self, index: int) -> Group:
        """One of the base's groups with all of our options, checked."""
        groups = self.base.param_groups
        require_one_return(groups[index])
        complete = self._ours | groups[index]
        _check_options(complete)
        for i, p in enumerate(complete["params"]):
            if p.dtype not in DTYPES:
                raise ValueError(
                    f"params must be 16-, 32- or 64-bit floating-point tensors, got {p.dtype} in "
                    f"{describe(groups, index, i)}"
                )
        return complete

    def add_param_group(self, param_group: Group) -> None:
        """Add a group to the base; what it lacks of our options is as given to this optimizer.

        Raises:
            ValueError: an option is out of range, or a parameter is not floating-point. The group
                has not been added then.
        """
        self.base.add_param_group(param_group)
        groups = self.base.param_groups
        try:
            groups[-1] |= self._completed(len(groups) - 1)
            groups[-1].pop("return_power", None)
        except ValueError:
            groups.pop()
            raise
        groups[-1]["swapped"] = encoded("" for _ in groups[-1]["params"]) if self.swapped else ""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The base's own."""
        self.base.zero_grad(set_to_none)

    # ---- stepping -----------------------------------------------------------------------------

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
        if closure is None and self._rehearsal():
            self._rehearse()
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
                loss = self.base.step(**options)
            else:
                loss = self.base.step(evaluate, **options)
        except _Skipped:
            self._count_faults([], True)
            return loss
        self._follow(plan or [])
        return loss

    def _rehearse(self) -> None:
        """Have the base make its state, add ours, and take back all else that this changed."""
        plan = self._plan()
        groups = [dict(group) for group in self.param_groups]
        self.base.step()
        for x in plan:
            assert x.before is not None
            shards.local(x.param).copy_(shards.local(x.before))
            self._begin(x)
        for group, before in zip(self.param_groups, groups, strict=True):
            counts = {"step": 0} if "step" in group else {}  # some count there: to be loaded, too
            group.clear()
            group |= counts | before
        self._rehearsed = True

    def _plan(self) -> list["_Planned"]:
        """What has to be known of each parameter that steps, before the base moves it.

        Raises:
            _Skipped: the step is to be skipped.
        """
        self._check_gradients()
        if bool(self._judge_gradients()):
            raise _Skipped
        if self._rehearsed:  # averages begin from what is in the parameters now
            self.state.clear()
            self._rehearsed = False
        plan = []
        for group in self.param_groups:
            pulls = group["pullback"] != 0
            further = further_state(group)
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state.get(p, {})
                # A base's count for all the group is not that of one that joins it now.
                done = state.get(STEP, state.get("step", group.get("step", 0) if state else 0))
                begins = AVERAGE not in state or further_in(state) != further
                before = p.detach().clone() if pulls or begins else None
                square = None
                if pulls and not _has_second_moment(p, state, group):  # at a first step: yet
                    square = shards.local_grad(p).to(DTYPES[p.dtype]).square()
                plan.append(_Planned(p, group, float(done), before, square))
        return plan

    def _begin(self, x: "_Planned") -> None:
        """Make what its state lacks of ours.

        Not before the base has made its own: it would take a state that is not empty for that.
        """
        state = self.state[x.param]
        dtype = DTYPES[x.param.dtype]
        if AVERAGE not in state:
            assert x.before is not None
            state[STEP] = torch.tensor(x.done, dtype=torch.float32)
            state[AVERAGE] = x.before.to(dtype, copy=True)
        if x.before is not None:
            begin_(state, x.group, x.before, dtype)
        if x.square is None or _has_second_moment(x.param, state, x.group):
            state.pop(OWN, None)  # or it would be out of date when it is needed again
            return
        if OWN not in state:
            # Steps that were taken without it count as if they had had this gradient, too.
            state[OWN] = torch.zeros_like(x.param, dtype=dtype)
            shards.local(state[OWN]).add_(x.square, alpha=1.0 - x.group["gain_beta2"] ** x.done)

    def _follow(self, plan: list["_Planned"]) -> None:
        """After the base's step: the pull, and the averages."""
        alike: dict[tuple[Any, ...], list[_Planned]] = defaultdict(list)
        for x in plan:
            self._begin(x)
            state = self.state[x.param]
            state[STEP] += 1
            if x.square is not None and OWN in state:
                shards.local(state[OWN]).lerp_(x.square, 1.0 - x.group["gain_beta2"])
            param = shards.local(x.param)
            alone = None if type(param) in PLAIN else id(param)
            place = (id(x.group), param.device, param.dtype, OWN in state)
            alike[*place, int(state[STEP]), alone].append(x)
        measured: dict[int, list[Any]] = {id(group): [] for group in self.param_groups}
        for (which, *_, own, step, _), members in alike.items():
            group = members[0].group
            numbers = _numbers(group, averaging_of(group), step, own)
            measured[which] += [
                follow_(batch, **numbers, measure=group["track_stats"])
                for batch in in_batches([self._follower(x) for x in members])
            ]
            take_in_(averages_of(group), step, [(x.param, self.state[x.param]) for x in members])
        self._stats = summarize(list(measured.values()), own_step="base_norm")

    def _follower(self, x: "_Planned") -> Follower:
        state = self.state[x.param]
        param, average = shards.local(x.param), shards.local(state[AVERAGE])
        simple = (name for name, rule in returns_of(x.group).items() if not rule.keeps)
        returned = tuple(shards.local(state[f"return_{name}"]) for name in simple)
        if not x.group["pullback"]:
            return Follower(param, average, returned=returned)
        assert x.before is not None
        v = None
        if x.group["gain"] != "scalar":
            v = shards.local(state[OWN] if OWN in state else _second_moment(state, x.group))
        return Follower(param, average, shards.local(x.before), v, returned)

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
        saved = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, saved)
            saved = saved if changed is None else changed
        saved = self._fitted(saved)
        # A copy, for torch's optimizers would share the tensors with where they come from.
        theirs = {key: _copied(state) for key, state in saved["state"].items()}
        self.base.load_state_dict(saved | {"state": theirs})
        keys = [key for group in saved["param_groups"] for key in group["params"]]
        params = [(p, group) for group in self.param_groups for p in group["params"]]
        for key, (p, group) in zip(keys, params, strict=True):
            source = saved["state"].get(key, {})
            # The base may have cast ours to the parameter's dtype: take it from the source again.
            kept = further_state(group)
            for name in {AVERAGE, OWN, *kept} & source.keys():
                dtype = DTYPES[p.dtype]
                if name in kept:
                    dtype = further_dtype(name, source[name].dtype, p, group)
                mine = torch.empty_like(p, dtype=dtype, requires_grad=False)
                self.state[p][name] = mine.copy_(source[name])
            if STEP in source:
                self.state[p][STEP] = torch.tensor(float(source[STEP]), dtype=torch.float32)
        self._stats, self._rehearsed = None, False
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)
        if any(_has_stepped(state) and AVERAGE not in state for state in saved["state"].values()):
            warnings.warn(
                f"the checkpoint keeps no averages, as those of {type(self.base).__name__}: its "
                "state is taken over, and averages begin from the weights that are there at the "
                "next step",
                stacklevel=2,
            )

    def _fitted(self, saved: dict[str, Any]) -> dict[str, Any]:
        """The checkpoint with all of our options, once all that is ours fits."""
        sizes = [[len(g["params"]) for g in x] for x in (saved["param_groups"], self.param_groups)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"the checkpoint's parameter groups have {sizes[0]} parameters, the optimizer's "
                f"{sizes[1]}: make the same groups, in the same order, and load again"
            )
        groups, states = [], dict(saved["state"])
        pairs = zip(saved["param_groups"], self.param_groups, strict=True)
        for g, (theirs, mine) in enumerate(pairs):
            group = {name: mine[name] for name in self._ours} | {"swapped": ""} | theirs
            if "averaging" in theirs and "returns" not in theirs:  # an older one, that has none yet
                group["returns"] = None
            lacks = sorted(self.base.defaults.keys() - theirs.keys())
            others = sorted(theirs.keys() - mine.keys() - SCHEDULED)
            if lacks and others:
                raise ValueError(
                    f"group {g} of the checkpoint is not of {type(self.base).__name__}: it lacks "
                    f"{lacks} and has {others}; nothing was changed"
                )
            _check_options(group)
            groups.append(group)
            swapped = decoded(group["swapped"]) or [""] * len(theirs["params"])
            kept = [states.get(key, {}) for key in theirs["params"]]
            # Of none in the group: a pull that was asked for since the last step.
            pulled = any(
                OWN in state or _has_second_moment(p, state, group)
                for p, state in zip(mine["params"], kept, strict=True)
            )
            for i, (key, dtype) in enumerate(zip(theirs["params"], swapped, strict=True)):
                state = states.get(key, {})
                try:
                    _check_state(state, mine["params"][i], group, pulled, dtype)
                except ValueError as error:
                    raise ValueError(
                        f"{describe(self.param_groups, g, i)} cannot be loaded: {error}; "
                        "nothing was changed"
                    ) from None
                if state.get(STEP) == 0 and not dtype:
                    del states[key]  # saved before its first step, which begins all of it anew
        known = {key for group in groups for key in group["params"]}
        if unknown := sorted(map(str, states.keys() - known)):
            raise ValueError(
                f"the checkpoint has state for {unknown[0]!r}, which is in none of its groups; "
                "nothing was changed"
            )
        return {**saved, "state": states, "param_groups": groups}


class _Skipped(Exception):
    """The step is not to be taken."""


class _Planned(NamedTuple):
    """A parameter that the base is about to move."""

    param: Tensor
    group: Group
    done: float  # steps that were taken of it
    before: Tensor | None  # θ_t, where it will be needed
    square: Tensor | None  # g², this rank's part, where a second moment of our own may need it


def _check_state(
    state: dict[str, Any], param: Tensor, group: Group, pulled: bool, swapped: str
) -> None:
    """Raises: ValueError: what is wrong with that of a parameter's saved state which is ours."""
    needed = {AVERAGE, STEP, *further_state(group)}
    if pulled and group["pullback"] and not _has_second_moment(param, state, group):
        needed.add(OWN)
    if not swapped and not state.keys() & {AVERAGE, STEP, OWN}:
        return  # it had no gradient yet, or is the base's alone
    if missing := sorted(needed - state.keys()):
        raise ValueError(f"its state lacks {missing}")
    name = swapped.partition("@")[2]
    if name and f"return_{name}" not in needed:
        raise ValueError(f"the checkpoint had its average {name!r} swapped in, and lacks that")
    for name in sorted((needed | {OWN}) & state.keys() - {STEP}):
        check_tensor(name, state[name], param)
    if torch.as_tensor(state[STEP]).numel() != 1:
        raise ValueError(f"its {STEP!r} must be one number")


def _copied(value: Any) -> Any:
    """A deep copy of state, but for tensors of others' classes, which may not know how."""
    if isinstance(value, Tensor):
        return value.clone() if type(value) in PLAIN or shards.is_sharded(value) else value
    if isinstance(value, dict):
        return {key: _copied(x) for key, x in value.items()}
    return type(value)(map(_copied, value)) if isinstance(value, (list, tuple)) else value


def _check_options(options: Group) -> None:
    check_pull(options)
    require(options, "averaging", options["averaging"] is not None, "an average, or its text")
    require(options, "gain", options["gain"] in GAINS, f"one of {', '.join(GAINS)}")
    require(options, "gain_beta2", 0 <= number(options["gain_beta2"]) < 1, "in [0, 1)")
    require(options, "gain_eps", 0 <= number(options["gain_eps"]) < math.inf, "a number >= 0")
    require(options, "nonfinite", options["nonfinite"] != "guard", "one of skip, raise, ignore")
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
    if any("swapped" in group for group in base.param_groups):
        raise ValueError(f"base must not have been in a Pullback before, got a {name} that was")
    if extra := sorted(base.state_dict().keys() - {"state", "param_groups"}):
        raise ValueError(
            f"base must keep all of its state in state and param_groups, got a {name}, whose "
            f"state_dict() has {extra}"
        )
    for group in base.param_groups:
        if group.get("pullback", ours["pullback"]) and group.get("gain", ours["gain"]) != "scalar":
            require({"lr": name}, "lr", "lr" in group, "an option of the base's groups")


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


def _numbers(group: Group, rule: Averaging, step: int, own: bool) -> dict[str, Any]:
    """What `follow_` needs besides tensors, at a step under a group's options."""
    gain = group["pullback"]
    beta2, eps = group["gain_beta2"], group["gain_eps"]
    if gain and group["gain"] != "scalar":
        lr = group["lr"]
        lr = float(lr) if isinstance(lr, Tensor) and lr.device.type == "cpu" else lr
        gain = lr * gain * rule.falloff(step)
        if not own:
            beta2, eps = group["betas"][1], group["eps"]
    return {
        "gain": gain,
        "root_bias2": math.sqrt(1.0 - beta2**step),
        "eps": eps,
        "clip": group["gain_clip"],
        "weight": rule.weight(step),
        "weights": [x.weight(step) for x in returns_of(group).values() if not x.keeps],
    }
