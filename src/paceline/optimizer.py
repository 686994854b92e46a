"""PACE as a `torch.optim.Optimizer`: arguments, lazy state, averaged weights in and out."""

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from . import fused, rounding, shards
from .averaged import AveragedOptimizer, begin_, further_dtype, summarize, take_in_
from .averaging import Averaging
from .loading import AVERAGES, MOMENTS, OLDER, fitted
from .options import (
    AUTO,
    DTYPES,
    EMA_OPTIONS,
    Group,
    averages_of,
    check_options,
    describe,
    encoded,
    fill_in,
    further_state,
    require_one_return,
    returns_of,
)
from .update import PLAIN, Scalars, Slot, in_batches, root_sums, scalars, step_


class PACE(AveragedOptimizer):
    r"""AdamW whose weights are pulled, coordinate by coordinate, toward the average you return.

        β_t     = max((1 + γ·max(0, t - ρ))^-κ, 1e-4)
        λ_t     = min(1, η·c·β_t / (sqrt(v̂_t) + ε))
        θ_{t+1} = (1 - η·wd)·θ_t - η·m̂_t / (sqrt(v̂_t) + ε) + λ_t·(ema_{t-1} - θ_t)
        ema_t   = (1 - β_t)·ema_{t-1} + β_t·θ_{t+1},     ema_0 = θ_1

    θ are the *live* weights, where gradients are taken; ema is the *average*, which is the model to
    evaluate, save and return. m̂ and v̂ are Adam's bias-corrected moments, η the scheduled learning
    rate of the step. With c = 0 the live weights are those of `torch.optim.AdamW`, and the average
    watches ("EMA-evaluated AdamW"). With a constant averaging weight (`ema_beta`) β_t is that
    constant, and the gain has no β_t in it.

        opt = PACE(model.parameters(), lr=1e-3, pullback=0.1)
        for batch in batches:                # any training loop
            model(batch).loss.backward()
            opt.step()
            opt.zero_grad()
        with opt.averaged():                 # the model to return
            evaluate(model)
        torch.save(opt.averaged_state_dict(model), "model.pt")

    The pull wants a fast average, the model to return a slow one: `return_power=0.7` keeps a second
    average in the same pass over memory, and returns that. `returns={"slow": "ema:power=0.7",
    "mean": "uniform"}` keeps several: `opt.averaged("mean")` and `opt.averaged_state_dict(model,
    "mean")` ask for one by name; without a name it is the first.

    State for each parameter, created at its first step: `step` (0-dim float32), `exp_avg` (m),
    `exp_avg_sq` (v) and `average`, all of the parameter's shape and in float32 (float64 for a
    float64 parameter): 12 bytes a parameter, 8 with `average=False`. While the average is swapped
    in, `average` keeps the live weights, for 16-bit parameters in packed form. Each further average
    is `return_<name>`, 4 bytes a parameter (8 for a float64 one), whatever `state_dtype` says.

    With `state_dtype=torch.bfloat16` all three take 6 bytes a parameter, and float32 parameters
    have `offset`, the average minus the live weights, in place of `average`: who changes the
    weights between steps moves the average with them.

    Every option below but `params` can be set for each parameter group.

    Args:
        params: parameters, named parameters, or groups (dicts) of them.
        lr: learning rate η >= 0, a number or 0-dim tensor. LR schedulers work as usual.
        betas: decay of the first and second moment, each in [0, 1).
        eps: ε >= 0, in the unit of a gradient.
        weight_decay: decoupled weight decay wd >= 0.
        pullback: strength c >= 0, in the unit of a gradient: its best value moves with the scale
            of the gradients (the paper: 0.15-0.25 fine-tuning 1-2B models, 0.03 a 135M one, 0.002
            to 0.003 pretraining GPT-2). Or "auto", which sets itself, at each step for all
            coordinates of its groups: λ_t = min(1, max(0, (E_t - 1/2)/2)), with E_t the sum of
            η_t·sqrt(v̂_{t-1}) over those groups' coordinates with a gradient: what the step can
            change the loss by, to first order. Up to half a nat nothing pulls: that step is
            AdamW's. It is in the unit of the loss, and made for cross-entropy in nats; of
            parameters of 2^16 elements or more every 251st is looked at, and of shards that are no
            DTensors (FSDP1, ZeRO) those of this rank alone. Ranks that hold DTensors wait for each
            other, and must step the same ones. Ours, not the paper's (docs/averages.md). Required,
            for no default has been earned.
        gain: "adam" as above; or "scalar", λ_t = min(1, c) for all coordinates: c has no unit then,
            and the pull amounts to the learning rate η·β_t/(β_t + c·(1 - β_t)).
        ema_power: κ in [0, 1], how fast the averaging weight decays. Larger is a slower average.
            None: 0.5. With pullback="auto", and nothing said of averages: 0.3, and a second one of
            0.6 (`return_power`) is returned.
        ema_beta: a constant averaging weight in (0, 1]; takes the place of the power where given.
        ema_rate: γ > 0, in steps⁻¹.
        ema_start: ρ >= 0 steps during which the average is the live weights.
        ema_every: the average takes in every this-many-th step's weights, >= 1. The pull is
            applied at every step.
        averaging: any other average of `paceline.averaging`, or its text, as in Uniform(start=100)
            or "ema:half_life=200", instead of what the five options before say. β_t is then what
            its `falloff` says. LAWA and BEMA keep more state than the average, take a second pass,
            also over guarded coordinates, and go with neither state_dtype nor capturable.
        return_power: κ in [0, 1] of a second average, to be returned; nothing pulls toward it.
            Short for returns=PowerEMA(return_power).
        returns: averages to be returned, which nothing pulls toward: one, or a dict of them by
            names of letters and digits, of which `eval()` puts in the first. Of LAWA and BEMA the
            same is true as above, but that they go with `state_dtype`.
        clip: hold the gain to at most 1, so that the pull never goes past the average.
        average: keep an average. False, for which `pullback` must be 0, is plain AdamW.
        fused: step in one pass over memory (`paceline.fused`): True demands it, False does not use
            it. None uses it on the CPU, for those parameters of a group that it can step if they
            have 2^18 elements or more in all, and if a C++ compiler works; it warns once if none
            does. It steps contiguous float32, bfloat16 and float64 parameters. On accelerators
            None is False: through `torch.compile` it is there, but has not been measured.
        foreach: without the kernel, step many tensors at a time (True) or one by one (False). None
            chooses: together, but for tensor subclasses. Either way some four times 2^18 elements
            of scratch on the CPU, and 2^24 on accelerators.
        capturable: keep `step` on the parameter's device and wait for nothing there, as a CUDA
            graph needs. Costs more launches.
        state_dtype: torch.bfloat16, or its name, keeps m, v and the average in it, rounded
            stochastically; for float32 and bfloat16 parameters. None: float32 as said above.
        stochastic_round: round bfloat16 parameters stochastically when they are written; to
            nearest, updates below 1/512 of a weight are lost. Not for float16; wider parameters
            are not rounded.
        seed: of the stochastic rounding, which is a function of the seed, the parameter's place in
            the optimizer, its step and the element: nothing to save, the same on replay.
        nonfinite: what a gradient that is not finite, or whose square is not, does. "guard": its
            coordinates stand still at this step, all bits of weight, moments and average kept. It
            takes no memory traffic in the kernel; on accelerators, without `fused=True`, copies of
            what is stepped together. "skip": no parameter of the groups with this option steps, on
            any rank, and the step does not count. "raise": FloatingPointError
            before anything has changed, on all ranks. These two read the gradients once more, and
            go by each tensor's sum of squares; all ranks of the default process group must step
            together. "skip" keeps `step` on accelerators, and waits for none. "ignore": what
            torch's own optimizers do, which is to lose the weights, and here the average.
        maximize: ascend instead of descend.
        track_stats: measure each step for `stats()`; costs time, and scratch memory of some four
            times the parameters that are stepped together. Of sharded parameters, this rank's.

    Raises:
        ValueError: an argument is out of its range; the message names it and its value.

    Source: Au & Block, Training for the Model You Return, arXiv:2606.25086 (2026).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        pullback: float | Literal["auto"],
        gain: str = "adam",
        ema_power: float | None = None,
        ema_beta: float | None = None,
        ema_rate: float = 1.0,
        ema_start: int = 0,
        ema_every: int = 1,
        averaging: Averaging | str | None = None,
        return_power: float | None = None,
        returns: Averaging | str | dict[str, Averaging | str] | None = None,
        clip: bool = True,
        average: bool = True,
        fused: bool | None = None,
        foreach: bool | None = None,
        capturable: bool = False,
        state_dtype: torch.dtype | None = None,
        stochastic_round: bool = False,
        seed: int = 0,
        nonfinite: str = "guard",
        maximize: bool = False,
        track_stats: bool = False,
    ) -> None:
        self._forget()
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "pullback": pullback,
            "gain": gain,
            "ema_power": ema_power,
            "ema_beta": ema_beta,
            "ema_rate": ema_rate,
            "ema_start": ema_start,
            "ema_every": ema_every,
            "averaging": averaging,
            "returns": returns,
            "clip": clip,
            "average": average,
            "fused": fused,
            "foreach": foreach,
            "capturable": capturable,
            "state_dtype": state_dtype,
            "stochastic_round": stochastic_round,
            "seed": seed,
            "nonfinite": nonfinite,
            "maximize": maximize,
            "track_stats": track_stats,
        }
        if return_power is not None:
            defaults["return_power"] = return_power
        require_one_return(defaults)
        fill_in(defaults)
        check_options(defaults)
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # one that an older version pickled
            for option, value in OLDER.items():
                group.setdefault(option, value)

    def add_param_group(self, param_group: Group) -> None:
        """Add a group of parameters with options of its own.

        Raises:
            ValueError: an option is out of range, or a parameter is not floating-point or does not
                go with an option.
            RuntimeError: `fused=True`, and the kernel cannot be built here.
        """
        if isinstance(param_group, dict):  # a group's own average is not mixed with the default
            require_one_return(param_group)
            if param_group.get("averaging") is not None:
                param_group |= EMA_OPTIONS | param_group
            elif EMA_OPTIONS.keys() & param_group.keys():
                param_group.setdefault("averaging", None)
            if param_group.get("ema_power") is not None:
                param_group.setdefault("ema_beta", None)
            if param_group.get("average") is False and self.defaults["pullback"] == AUTO:
                param_group.setdefault("returns", None)  # which nobody asked for
        super().add_param_group(param_group)
        try:
            check_options(param_group)
            self._check_params(len(self.param_groups) - 1)
        except (ValueError, fused.BuildError):
            self.param_groups.pop()
            raise
        # While swapped: of each parameter the dtype when its average came in, if it did. Kept here,
        # for groups go into checkpoints, whose engines want plain values of one kind.
        param_group["swapped"] = encoded("" for _ in param_group["params"]) if self.swapped else ""

    def _check_params(self, group: int) -> None:
        options = self.param_groups[group]
        params = options["params"]
        if len(set(params)) < len(params):
            raise ValueError(f"params must be given once each, got one twice in group {group}")
        for index, param in enumerate(params):
            if param.dtype not in DTYPES and not param.is_complex():
                raise ValueError(
                    f"params must be 16-, 32- or 64-bit floating-point tensors, got {param.dtype} "
                    f"in {describe(self.param_groups, group, index)}"
                )
            if options["state_dtype"] and param.dtype not in (torch.float32, torch.bfloat16):
                raise ValueError(
                    f"state_dtype is for float32 and bfloat16 parameters, got {param.dtype} in "
                    f"{describe(self.param_groups, group, index)}"
                )
            if options["stochastic_round"] and param.dtype == torch.float16:
                raise ValueError(
                    "stochastic_round is for bfloat16 parameters, got torch.float16 in "
                    f"{describe(self.param_groups, group, index)}"
                )
            if options["fused"]:
                self._demand_fused(group, index, ValueError)
        if options["fused"]:
            for device in {p.device for p in params}:
                fused.prepare(device)

    @torch.no_grad()
    def _demand_fused(self, group: int, index: int, error: type[Exception]) -> None:
        options = self.param_groups[group]
        param = options["params"][index]
        reason = fused.reason_against(shards.local(param), _state_dtype(param, options), param.grad)
        if reason:
            raise error(
                f"fused=True {reason}, got {describe(self.param_groups, group, index)}; nothing "
                "was changed, and fused=None steps it another way"
            )

    # ---- stepping -----------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step on every parameter that has a gradient.

        Args:
            closure: re-evaluates the model under gradients and returns the loss, which is passed
                back.

        Raises:
            RuntimeError: the averaged weights are swapped in, or a gradient is sparse or complex.
                Nothing has changed then.
            FloatingPointError: with `nonfinite="raise"`, as said there.
        """
        if closure is None and (stepped := self._rehearsal()):
            for group, p in stepped:
                self._ready(p, group, further_state(group))
            self._rehearsed = True
            return None
        self._refuse_while_swapped()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_gradients()
        skip = self._judge_gradients()
        if self._rehearsed:  # averages begin from what is in the parameters now
            self.state.clear()
            self._rehearsed = False

        stake = self._stake()
        plans = []  # complete before the first change
        first = 0  # the group's first parameter's place in the optimizer
        for group in self.param_groups:
            skips = skip if group["nonfinite"] == "skip" else False
            batches = [] if skips is True else list(self._batches(group, first, skips, stake))
            plans.append([(slots, s, _one_pass(slots, group)) for slots, s in batches])
            first += len(group["params"])

        measured: list[list[dict[str, Tensor]]] = []
        held: list[int | Tensor] = []
        for group, plan in zip(self.param_groups, plans, strict=True):
            measured.append([])
            if plan:
                self._count_step(group, skip)
            for slots, numbers, one_pass in plan:
                if one_pass:
                    held += fused.step_(slots, numbers)
                else:
                    measure = group["track_stats"]
                    measured[-1] += [step_(x, numbers, measure=measure) for x in in_batches(slots)]
        held += [batch.pop("held") for group in measured for batch in group if "held" in batch]
        for group, plan in zip(self.param_groups, plans, strict=True):
            if plan and group["average"]:
                self._take_in(group, skip if group["nonfinite"] == "skip" else False)
        self._count_faults(held, skip)
        self._stats = summarize(measured)
        return loss

    def _count_step(self, group: Group, skip: bool | Tensor) -> None:
        steps = [self.state[p]["step"] for p in group["params"] if p.grad is not None]
        if group["nonfinite"] == "skip" and isinstance(skip, Tensor):
            for step in steps:
                step.add_(~skip.to(step.device))
        else:
            torch._foreach_add_(steps, 1.0)

    def _batches(
        self, group: Group, first: int, skip: bool | Tensor, stake: float | Tensor
    ) -> Iterator[tuple[list[Slot], Scalars]]:
        """The parameters that have gradients, with state, and the scalars of their next step.

        Args:
            group: a parameter group.
            first: the place of its first parameter in the optimizer.
            skip: a tensor that says on the device whether the step is skipped, or False.
            stake: as `_stake` has it.
        """
        foreach = group["foreach"]
        further = further_state(group)
        returned = [f"return_{k}" for k, rule in returns_of(group).items() if not rule.keeps]
        rounds = group["state_dtype"] is not None or group["stochastic_round"]
        stepped: dict[tuple[Any, ...], list[tuple[int, Slot, Tensor]]] = defaultdict(list)
        for place, p in enumerate(group["params"], first):
            if p.grad is None:
                continue
            state = self._ready(p, group, further)
            average = state.get("average", state.get("offset")) if group["average"] else None
            slot = Slot(
                shards.local(p),
                shards.local_grad(p),
                shards.local(state["exp_avg"]),
                shards.local(state["exp_avg_sq"]),
                None if average is None else shards.local(average),
                start=shards.first_element(p) if rounds else 0,
                returned=tuple(shards.local(state[key]) for key in returned),
            )
            mine = slot.param
            together = type(mine) in PLAIN if foreach is None else foreach
            step = None if _counts_on_device(p, group) else state["step"].item()
            fits = fused.reason_against(mine, slot.exp_avg.dtype, slot.grad) is None
            dtypes = (mine.dtype, slot.grad.dtype)
            key = (mine.device, dtypes, fits, None if together else place, step)
            stepped[key].append((place, slot, state["step"]))
        for (device, *_, step), members in stepped.items():
            places, slots, counts = map(list, zip(*members, strict=True))
            # Counts that the host may not read: a vector, and vectors of scalars from it.
            now = torch.stack(counts) + 1.0 if step is None else int(step) + 1
            at_stake = stake.to(device) if isinstance(stake, Tensor) else stake
            numbers = scalars(now, group, at_stake)
            if isinstance(skip, Tensor):
                numbers = numbers._replace(hold=skip.to(device))
            if rounds:
                keys = _keys(group["seed"], places, now, device)
                slots = [slot._replace(key=key) for slot, key in zip(slots, keys, strict=True)]
            if not isinstance(now, Tensor):
                yield slots, numbers
                continue
            for i, slot in enumerate(slots):
                own = Scalars._make(_of(x, i) for x in numbers)
                yield [slot], own._replace(weights=tuple(_of(x, i) for x in numbers.weights))

    def _stake(self) -> float | Tensor:
        """E_t of `auto_gain` at the step to come; on accelerators 0-dim, and nothing is read."""
        stepped: dict[Any, list[tuple[Tensor, Any]]] = defaultdict(list)
        for group in self.param_groups:
            for p in group["params"] if group["pullback"] == AUTO else ():
                if p.grad is None or not self.state.get(p):
                    continue
                step, lr = self.state[p]["step"], group["lr"]
                on_device = _counts_on_device(p, group)
                count = step.double().clamp_min(1.0) if on_device else max(1.0, step.item())
                if isinstance(lr, Tensor) and lr.device.type == "cpu":
                    lr = float(lr)
                rate = lr / (1.0 - group["betas"][1] ** count) ** 0.5
                # Those go into one operation that hold the same parts and have rates of one kind.
                stepped[p.device, shards.holders(p), type(rate)].append((p, rate))
        parts = []
        for members in stepped.values():
            params, rates = zip(*members, strict=True)
            roots = root_sums(
                [shards.local(self.state[p]["exp_avg_sq"]) for p in params],
                [shards.first_element(p) for p in params],
                [p.numel() for p in params],
            )
            part = torch.stack(torch._foreach_mul(roots, rates)).sum()
            parts.append(shards.total(part, params[0]))
        if not parts:
            return 0.0
        stake = torch.stack([part.to(parts[0].device) for part in parts]).sum()
        return stake.item() if stake.device.type == "cpu" else stake

    def _take_in(self, group: Group, skip: bool | Tensor) -> None:
        """Have averages that are more than one tensor take in the weights of this step."""
        rules = {key: rule for key, rule in averages_of(group).items() if rule.keeps}
        if not rules or skip:  # asked only where it is needed: a device would be waited for
            return
        for p in group["params"]:
            if p.grad is not None:
                take_in_(rules, int(self.state[p]["step"]), [(p, self.state[p])])

    def _ready(self, param: Tensor, group: Group, further: frozenset[str]) -> dict[str, Any]:
        """The parameter's state: made at its first step, in the form that the options ask for.

        `further` is the group's `further_state`.
        """
        state: dict[str, Any] = self.state[param]
        dtype = _state_dtype(param, group)
        counter = param.device if _counts_on_device(param, group) else torch.device("cpu")
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=counter)
            state["exp_avg"] = fused.empty_state(param, dtype, param.device).zero_()
            state["exp_avg_sq"] = fused.empty_state(param, dtype, param.device).zero_()
        elif state["exp_avg"].dtype != dtype:
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = state[key].to(dtype)
        if state["step"].device != counter:
            state["step"] = state["step"].to(counter)
        if param.is_contiguous() and not state["exp_avg"].is_contiguous():
            # The kernel goes by places in memory, and the parameter has another layout now.
            for key in state.keys() - {"step"}:
                state[key] = fused.empty_state(param, state[key].dtype, param.device).copy_(
                    state[key]
                )
        if not group["average"]:
            return state
        if dtype.itemsize < param.dtype.itemsize:
            if "average" in state:
                state["offset"] = (state.pop("average") - param.detach()).to(dtype)
            elif "offset" not in state:
                state["offset"] = fused.empty_state(param, dtype, param.device).zero_()
        elif "offset" in state:
            state["average"] = param.detach().to(dtype) + state.pop("offset")
        elif "average" not in state or state["average"].dtype != dtype:
            source = state.get("average", param.detach())
            state["average"] = fused.empty_state(param, dtype, param.device).copy_(source)
        if len(state) != 4 + len(further) or not further <= state.keys():
            begin_(state, group, param.detach(), DTYPES.get(param.dtype, param.dtype))
        for key in further:  # the parameter may be of another dtype than before
            state[key] = state[key].to(further_dtype(key, state[key].dtype, param, group))
        return state

    def _check_gradients(self) -> None:
        for g, group in enumerate(self.param_groups):
            if group["fused"]:
                for device in {p.device for p in group["params"] if p.grad is not None}:
                    fused.prepare(device)
            for i, p in enumerate(group["params"]):
                if group["fused"] and p.grad is not None:
                    self._demand_fused(g, i, RuntimeError)
        super()._check_gradients()

    # ---- reports and checkpoints --------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a `state_dict()`; state keeps its dtype whatever the parameters'.

        One saved while the average was swapped in says so, and goes with model weights saved at
        the same time: `train()` then brings back the live weights.

        One of `torch.optim.AdamW` is a start: moments, steps and AdamW's options are taken over, a
        warning says so, and the averages begin from the weights that are there at the next step,
        as if all steps before had been there: give Uniform, SWA and BEMA that step as their start.

        Raises:
            ValueError: state of another class, missing, left over, misshapen, or of a shard; groups
                that do not match; or an option out of its range. The message names the parameter
                or option. Nothing has changed then.
        """
        loaded: dict[str, Any] = {}

        def fit(_: Optimizer, final: dict[str, Any]) -> dict[str, Any]:
            loaded.update(fitted(final, self.param_groups))
            return loaded

        def restore(_: Optimizer) -> None:
            # torch has cast float state to the parameter's dtype: take ours from the source again.
            # A copy, for two optimizers that share tensors would swap each other's averages.
            ids = [i for group in loaded["param_groups"] for i in group["params"]]
            params = [p for group in self.param_groups for p in group["params"]]
            options = [group for group in self.param_groups for _ in group["params"]]
            for i, p, group in zip(ids, params, options, strict=True):
                for key, value in loaded["state"].get(i, {}).items():
                    if key == "step":
                        device = p.device if _counts_on_device(p, group) else "cpu"
                        step = torch.as_tensor(value).reshape(())
                        self.state[p][key] = step.to(device, torch.float32, copy=True)
                    else:
                        dtype = _state_dtype(p, group)
                        if key not in MOMENTS | AVERAGES:
                            dtype = further_dtype(key, value.dtype, p, group)
                        mine = fused.empty_state(p, dtype, p.device)
                        self.state[p][key] = mine.copy_(value)

        # The first sees what the user's own hooks made of the state, the second runs before theirs.
        hooks = [
            self.register_load_state_dict_pre_hook(fit),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()
        self._stats = None
        self._rehearsed = False
        kept = [self.state.get(p) for g in self.param_groups if g["average"] for p in g["params"]]
        if any(state and not AVERAGES & state.keys() for state in kept):
            warnings.warn(
                "the checkpoint keeps no averages, as those of torch.optim.AdamW: its moments, "
                "steps and options are taken over, and averages begin from the weights that are "
                "there at the next step",
                stacklevel=2,
            )


def _of(x: Any, i: int) -> Any:
    """The i-th of a vector of scalars; what is none is every slot's."""
    return x[i] if isinstance(x, Tensor) and x.ndim else x


def _counts_on_device(param: Tensor, group: Group) -> bool:
    """Whether the step count is to be where the parameter is, and not read."""
    skips = group["nonfinite"] == "skip" and param.device.type != "cpu"
    return bool(group["capturable"]) or skips


def _state_dtype(param: Tensor, group: Group) -> torch.dtype:
    dtype: torch.dtype | None = group["state_dtype"]
    return dtype or DTYPES.get(param.dtype, param.dtype)


def _one_pass(slots: list[Slot], group: Group) -> bool:
    """Whether tensors go to the one-pass kernel."""
    if group["fused"] is not None or group["foreach"] is not None or group["track_stats"]:
        return bool(group["fused"])
    return (
        slots[0].param.device.type == "cpu"
        and sum(slot.param.numel() for slot in slots) >= fused.WORTH_BUILDING
        # All tensors of a batch fit the kernel, or none does.
        and fused.reason_against(slots[0].param, slots[0].exp_avg.dtype, slots[0].grad) is None
        and fused.available()
    )


def _keys(
    seed: int, places: list[int], step: int | Tensor, device: torch.device
) -> list[int] | list[Tensor]:
    """The keys of stochastic rounding for parameters at these places in the optimizer."""
    if not isinstance(step, Tensor):
        keys: list[int] = rounding.keys(
            seed, torch.tensor(places, dtype=torch.int32), step
        ).tolist()
        return keys
    # Made on the device from nothing, for a CUDA graph cannot hold a copy from the host.
    all_places = torch.arange(max(places) + 1, dtype=torch.int32, device=device)
    return list(rounding.keys(seed, torch.stack([all_places[i] for i in places]), step.int()))
