"""PACE as a `torch.optim.Optimizer`: arguments, lazy state, averaged weights in and out."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from numbers import Real
from typing import Any, TypeAlias, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from . import fused, rounding
from .swap import swap_back, swap_in
from .update import PLAIN, Scalars, Slot, scalars, step_in_batches

Group: TypeAlias = dict[str, Any]

# Of a parameter: of its state.
DTYPES = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}


class PACE(Optimizer):
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

    State for each parameter, created at its first step: `step` (0-dim float32), `exp_avg` (m),
    `exp_avg_sq` (v) and `average`, all of the parameter's shape and in float32 (float64 for a
    float64 parameter): 12 bytes a parameter, 8 with `average=False`. While the average is swapped
    in, `average` keeps the live weights, for 16-bit parameters in packed form.

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
            to 0.003 pretraining GPT-2). Required, for no default has been earned yet.
        ema_power: κ in [0, 1], how fast the averaging weight decays. Larger is a slower average.
        ema_beta: a constant averaging weight in (0, 1]; takes the place of the power where given.
        ema_rate: γ > 0, in steps⁻¹.
        ema_start: ρ >= 0 steps during which the average is the live weights.
        ema_every: the average takes in every this-many-th step's weights, >= 1. The pull is
            applied at every step.
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
        state_dtype: torch.bfloat16 keeps m, v and the average in it, rounded stochastically; for
            float32 and bfloat16 parameters. None: float32 as said above.
        stochastic_round: round bfloat16 parameters stochastically when they are written; to
            nearest, updates below 1/512 of a weight are lost. Not for float16; wider parameters
            are not rounded.
        seed: of the stochastic rounding, which is a function of the seed, the parameter's place in
            the optimizer, its step and the element: nothing to save, the same on replay.
        maximize: ascend instead of descend.
        track_stats: measure each step for `stats()`; costs time, and scratch memory of some four
            times the parameters that are stepped together.

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
        pullback: float,
        ema_power: float | None = 0.5,
        ema_beta: float | None = None,
        ema_rate: float = 1.0,
        ema_start: int = 0,
        ema_every: int = 1,
        clip: bool = True,
        average: bool = True,
        fused: bool | None = None,
        foreach: bool | None = None,
        capturable: bool = False,
        state_dtype: torch.dtype | None = None,
        stochastic_round: bool = False,
        seed: int = 0,
        maximize: bool = False,
        track_stats: bool = False,
    ) -> None:
        self._stats: dict[str, Any] | None = None
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "pullback": pullback,
            "ema_power": ema_power,
            "ema_beta": ema_beta,
            "ema_rate": ema_rate,
            "ema_start": ema_start,
            "ema_every": ema_every,
            "clip": clip,
            "average": average,
            "fused": fused,
            "foreach": foreach,
            "capturable": capturable,
            "state_dtype": state_dtype,
            "stochastic_round": stochastic_round,
            "seed": seed,
            "maximize": maximize,
            "track_stats": track_stats,
        }
        _check_options(defaults)
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_stats", None)

    def add_param_group(self, param_group: Group) -> None:
        """Add a group of parameters with options of its own.

        Raises:
            ValueError: an option is out of range, or a parameter is not floating-point or does not
                go with an option.
            RuntimeError: `fused=True`, and the kernel cannot be built here.
        """
        if isinstance(param_group, dict) and param_group.get("ema_power") is not None:
            param_group.setdefault("ema_beta", None)  # the group's own power, not our default beta
        super().add_param_group(param_group)
        try:
            _check_options(param_group)
            self._check_params(len(self.param_groups) - 1)
        except (ValueError, fused.BuildError):
            self.param_groups.pop()
            raise
        # While swapped: the parameters' dtypes when the averages came in. Kept here, for groups go
        # into checkpoints; the optimizer's attributes do not.
        param_group["swapped"] = _dtypes(param_group) if self._swapped else None

    def _check_params(self, group: int) -> None:
        options = self.param_groups[group]
        params = options["params"]
        if len(set(params)) < len(params):
            raise ValueError(f"params must be given once each, got one twice in group {group}")
        for index, param in enumerate(params):
            if param.dtype not in DTYPES and not param.is_complex():
                raise ValueError(
                    f"params must be 16-, 32- or 64-bit floating-point tensors, got {param.dtype} "
                    f"in {_describe(self.param_groups, group, index)}"
                )
            if options["state_dtype"] and param.dtype not in (torch.float32, torch.bfloat16):
                raise ValueError(
                    f"state_dtype is for float32 and bfloat16 parameters, got {param.dtype} in "
                    f"{_describe(self.param_groups, group, index)}"
                )
            if options["stochastic_round"] and param.dtype == torch.float16:
                raise ValueError(
                    "stochastic_round is for bfloat16 parameters, got torch.float16 in "
                    f"{_describe(self.param_groups, group, index)}"
                )
            if options["fused"]:
                self._demand_fused(group, index, ValueError)
        if options["fused"]:
            for device in {p.device for p in params}:
                fused.prepare(device)

    def _demand_fused(self, group: int, index: int, error: type[Exception]) -> None:
        options = self.param_groups[group]
        param = options["params"][index]
        reason = fused.reason_against(param, _state_dtype(param, options))
        if reason:
            raise error(
                f"fused=True {reason}, got {_describe(self.param_groups, group, index)}; nothing "
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
        """
        if self._swapped:
            raise RuntimeError(
                "step() was called while the averaged weights are in the model; call train() "
                "first. Nothing was changed"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_gradients()

        measured: list[list[dict[str, Tensor]]] = []
        first = 0  # the group's first parameter's place in the optimizer
        for group in self.param_groups:
            measured.append([])
            for slots, numbers in self._batches(group, first):
                if _one_pass(slots, group):
                    fused.step_(slots, numbers)
                else:
                    measured[-1] += step_in_batches(slots, numbers, measure=group["track_stats"])
            first += len(group["params"])
        self._stats = _summarize(measured)
        return loss

    def _batches(self, group: Group, first: int) -> Iterator[tuple[list[Slot], Scalars]]:
        """The parameters that have gradients, with state, counted one step on.

        Args:
            group: a parameter group.
            first: the place of its first parameter in the optimizer.
        """
        foreach, capturable = group["foreach"], group["capturable"]
        rounds = group["state_dtype"] is not None or group["stochastic_round"]
        stepped: dict[tuple[Any, ...], list[tuple[int, Slot, Tensor]]] = defaultdict(list)
        steps = []
        for place, p in enumerate(group["params"], first):
            if p.grad is None:
                continue
            state = self._ready(p, group)
            average = state.get("average", state.get("offset")) if group["average"] else None
            slot = Slot(p, p.grad, state["exp_avg"], state["exp_avg_sq"], average)
            together = type(p) in PLAIN if foreach is None else foreach
            step = None if capturable else state["step"].item()
            fits = fused.reason_against(p, slot.exp_avg.dtype) is None
            key = (p.device, p.dtype, fits, None if together else place, step)
            stepped[key].append((place, slot, state["step"]))
            steps.append(state["step"])
        if steps:
            torch._foreach_add_(steps, 1.0)
        for (device, *_, step), members in stepped.items():
            places, slots, counts = map(list, zip(*members, strict=True))
            # Counts that the host may not read: a vector, and vectors of scalars from it.
            now = torch.stack(counts) if step is None else int(step) + 1
            numbers = scalars(now, group)
            if rounds:
                keys = _keys(group["seed"], places, now, device)
                slots = [slot._replace(key=key) for slot, key in zip(slots, keys, strict=True)]
            if not isinstance(now, Tensor):
                yield slots, numbers
                continue
            for i, slot in enumerate(slots):
                own = (x[i] if isinstance(x, Tensor) and x.ndim else x for x in numbers)
                yield [slot], Scalars._make(own)

    def _ready(self, param: Tensor, group: Group) -> dict[str, Any]:
        """The parameter's state: made at its first step, in the form that the options ask for."""
        state: dict[str, Any] = self.state[param]
        dtype = _state_dtype(param, group)
        if not state:
            device = param.device if group["capturable"] else None
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            state["exp_avg"] = fused.empty_state(param, dtype, param.device).zero_()
            state["exp_avg_sq"] = fused.empty_state(param, dtype, param.device).zero_()
        elif state["exp_avg"].dtype != dtype:
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = state[key].to(dtype)
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
        return state

    def _check_gradients(self) -> None:
        for g, group in enumerate(self.param_groups):
            if group["fused"]:
                for device in {p.device for p in group["params"] if p.grad is not None}:
                    fused.prepare(device)
            for i, p in enumerate(group["params"]):
                if p.grad is None:
                    continue
                if group["fused"]:
                    self._demand_fused(g, i, RuntimeError)
                if p.grad.layout != torch.strided or p.grad.is_complex():
                    kind = "complex" if p.grad.is_complex() else "sparse"
                    raise RuntimeError(
                        f"PACE does not support {kind} gradients, got one in "
                        f"{_describe(self.param_groups, g, i)}; nothing was changed"
                    )

    # ---- the model to return ------------------------------------------------------------------

    @property
    def _swapped(self) -> bool:
        return any(group.get("swapped") for group in self.param_groups)

    def _averages(self) -> dict[Tensor, Tensor]:
        """Parameter -> average or offset, for those that keep one and have stepped."""
        kept = {
            p: self.state[p].get("average", self.state[p].get("offset"))
            for group in self.param_groups
            if group["average"]
            for p in group["params"]
            if p in self.state
        }
        return {p: average for p, average in kept.items() if average is not None}

    @torch.no_grad()
    def eval(self) -> None:
        """Put the average into the parameters; the live weights wait where the average was.

        In place, without a third copy (`paceline.swap`). Free if it is there already; parameters
        that keep no average or have not stepped stay as they are.

        Raises:
            RuntimeError: the model's dtype was changed after the first step. Nothing has changed.
        """
        if self._swapped:
            return
        averages = self._averages()
        for p, average in averages.items():
            narrower = average.itemsize < p.itemsize
            if narrower != ("offset" in self.state[p]) or average.dtype not in (
                torch.bfloat16,
                torch.promote_types(p.dtype, torch.float32),
            ):
                raise RuntimeError(
                    f"a parameter of shape {tuple(p.shape)} is {p.dtype} now, which does not go "
                    f"with its {average.dtype} average; convert models before the first step"
                )
        swap_in(averages.items())
        for group in self.param_groups:
            group["swapped"] = _dtypes(group)

    @torch.no_grad()
    def train(self) -> None:
        """Put the live weights back into the parameters. Free if they are there already.

        Raises:
            RuntimeError: the model's dtype is not that of the moment when the average came in, or
                a checkpoint's of that moment. Nothing has changed.
        """
        if not self._swapped:
            return
        for group in self.param_groups:
            if group["swapped"] != _dtypes(group):
                raise RuntimeError(
                    f"the averages were swapped into parameters of {set(group['swapped'])}, which "
                    f"are {set(_dtypes(group))} now; convert them back, then call train()"
                )
        swap_back(self._averages().items())
        for group in self.param_groups:
            group["swapped"] = None

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Hold the average in the parameters inside a `with`; go back whatever happens there."""
        restore = self.eval if self._swapped else self.train
        self.eval()
        try:
            yield
        finally:
            restore()

    @torch.no_grad()
    def averaged_state_dict(self, model: torch.nn.Module) -> dict[str, Any]:
        """The returned model's `state_dict()`: a snapshot that leaves the live weights alone.

        Averaged parameters have their average in the parameter's dtype; frozen parameters, those
        that keep no average, and buffers are copied as they are. Names of one tied parameter share
        one tensor.

        Args:
            model: the module whose parameters this optimizer steps, itself or wrapped.

        Raises:
            ValueError: the optimizer keeps averages, but none for a parameter of this model, or one
                of them does not show as itself in the model's `state_dict(keep_vars=True)`.
        """
        averages = self._averages()
        ours = [name for name, p in model.named_parameters() if p in averages]
        if averages and not ours:
            raise ValueError(
                f"model must hold parameters of this optimizer, got {type(model).__name__} "
                "with none of them"
            )
        returned = model.state_dict(keep_vars=True)
        snapshots: dict[Tensor, Tensor] = {}
        for name, value in returned.items():
            if isinstance(value, Tensor):
                if value not in snapshots:
                    source = value if self._swapped else averages.get(value, value)
                    if source.itemsize < value.itemsize:
                        source = value.detach() + source
                    snapshots[value] = source.detach().to(value.dtype, copy=True)
                returned[name] = snapshots[value]
        for name in ours:
            if model.get_parameter(name) not in snapshots:
                raise ValueError(
                    f"model must show its parameters in state_dict(), got another tensor for {name}"
                )
        return returned

    # ---- reports and checkpoints --------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        """What the last step did; needs `track_stats=True`.

        Returns:
            `gain_mean`, `gain_min`, `gain_max` of λ over coordinates; `clipped`, the fraction of
            coordinates that the clip holds at 1; 2-norms `adamw_norm` of the AdamW step,
            `pull_norm` of the pull and `update_norm` of the whole update; `distance`, the 2-norm
            of live weights minus average after the step. Over all tracked parameters that had a
            gradient, and under "groups" the same for each group (None for one without any).

        Raises:
            RuntimeError: no tracked step has been taken.
        """
        if self._stats is None:
            raise RuntimeError("stats() needs a step taken with track_stats=True")
        numbers: dict[str, Any] = _as_numbers(self._stats)
        return numbers

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a `state_dict()`; state keeps its dtype whatever the parameters'.

        One saved while the average was swapped in says so, and goes with model weights saved at
        the same time: `train()` then brings back the live weights.
        """
        loaded: dict[str, Any] = {}

        def restore(_: Optimizer) -> None:
            # torch has cast float state to the parameter's dtype: take ours from the source again.
            # A copy, for two optimizers that share tensors would swap each other's averages.
            ids = [i for group in loaded["param_groups"] for i in group["params"]]
            params = [p for group in self.param_groups for p in group["params"]]
            for group in self.param_groups:
                for key, value in {**self.defaults, "swapped": None}.items():
                    group.setdefault(key, value)
            options = [group for group in self.param_groups for _ in group["params"]]
            for i, p, group in zip(ids, params, options, strict=True):
                for key, value in loaded["state"].get(i, {}).items():
                    if isinstance(value, Tensor) and key == "step":
                        device = p.device if group["capturable"] else "cpu"
                        self.state[p][key] = value.to(device, torch.float32, copy=True)
                    elif isinstance(value, Tensor) and value.is_floating_point():
                        mine = fused.empty_state(value, _state_dtype(p, group), p.device)
                        self.state[p][key] = mine.copy_(value)

        # The first sees what the user's own hooks made of the state, the second runs before theirs.
        hooks = [
            self.register_load_state_dict_pre_hook(lambda _, final: loaded.update(final)),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()
        self._stats = None


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
        and fused.reason_against(slots[0].param, slots[0].exp_avg.dtype) is None
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


def _dtypes(group: Group) -> list[str]:
    return [str(p.dtype) for p in group["params"]]


def _check_options(options: Group) -> None:
    """Make the options plain numbers, so that checkpoints load with `weights_only=True`.

    Raises:
        ValueError: names the first option out of its range, and its value.
    """

    def require(name: str, ok: bool, range_: str) -> None:
        if not ok:
            raise ValueError(f"{name} must be {range_}, got {options[name]!r}")

    def number(value: object) -> float:
        """The value as a float, or NaN, which no range contains, for what is no real number."""
        if isinstance(value, Real) and not isinstance(value, bool):
            with suppress(OverflowError):
                return float(value)
        return math.nan

    lr = options["lr"]
    if isinstance(lr, Tensor):
        finite = lr.ndim == 0 and bool(lr.isfinite())
        require("lr", finite and bool(lr >= 0), "a finite number >= 0, or a 0-dim tensor of one")
    for name in ("eps", "weight_decay", "pullback") + (() if isinstance(lr, Tensor) else ("lr",)):
        require(name, 0 <= number(options[name]) < math.inf, "a finite number >= 0")
        options[name] = float(options[name])
    betas = options["betas"]
    pair = isinstance(betas, (tuple, list)) and len(betas) == 2
    require("betas", pair and all(0 <= number(b) < 1 for b in betas), "two numbers in [0, 1)")
    options["betas"] = (float(betas[0]), float(betas[1]))
    power, beta = options["ema_power"], options["ema_beta"]
    require("ema_power", power is None or 0 <= number(power) <= 1, "None or in [0, 1]")
    require("ema_beta", beta is None or 0 < number(beta) <= 1, "None or in (0, 1]")
    if power is None and beta is None:
        raise ValueError("ema_beta must be in (0, 1] where ema_power is None, got None for both")
    options["ema_power"] = None if power is None else float(power)
    options["ema_beta"] = None if beta is None else float(beta)
    require("ema_rate", 0 < number(options["ema_rate"]) < math.inf, "a finite number > 0")
    require("ema_start", 0 <= number(options["ema_start"]) < math.inf, "a number of steps >= 0")
    for name in ("ema_rate", "ema_start"):
        options[name] = float(options[name])
    every = options["ema_every"]
    whole = isinstance(every, int) and not isinstance(every, bool)
    require("ema_every", whole and every >= 1, "a whole number of steps >= 1")
    for name in ("clip", "average", "capturable", "stochastic_round", "maximize", "track_stats"):
        require(name, isinstance(options[name], bool), "True or False")
    for name in ("fused", "foreach"):
        choice = options[name]
        require(name, choice is None or isinstance(choice, bool), "None, True or False")
    if options["fused"] and (options["foreach"] is not None or options["track_stats"]):
        raise ValueError(
            "fused=True needs foreach=None and track_stats=False: "
            "the one-pass kernel takes all tensors its own way, and measures nothing"
        )
    narrow = options["state_dtype"] in (None, torch.bfloat16)
    require("state_dtype", narrow, "None or torch.bfloat16")
    seed = options["seed"]
    require("seed", isinstance(seed, int) and not isinstance(seed, bool), "a whole number")
    if not options["average"] and options["pullback"] != 0:
        raise ValueError(
            f"average=False needs pullback=0, got pullback={options['pullback']!r}: "
            "a pull needs an average to pull toward"
        )


def _describe(groups: list[Group], group: int, index: int) -> str:
    """A parameter by its name where the user gave names, else by its place; and its shape."""
    names = groups[group].get("param_names")
    name = f"parameter {names[index]!r}" if names else f"parameter {index} of group {group}"
    return f"{name} of shape {tuple(groups[group]['params'][index].shape)}"


def _summarize(measured: list[list[dict[str, Tensor]]]) -> dict[str, Any] | None:
    """Batches' measurements as those of each group and of all; tensors, so that no device waits."""

    def summary(batches: list[dict[str, Tensor]]) -> dict[str, Any] | None:
        if not batches:
            return None
        device = batches[0]["count"].device

        def over(key: str) -> Tensor:
            return torch.stack([batch[key].to(device, torch.float32) for batch in batches])

        count = over("count").sum().clamp_min(1)
        return {
            "gain_mean": over("gain_sum").sum() / count,
            "gain_min": over("gain_min").min(),
            "gain_max": over("gain_max").max(),
            "clipped": over("clipped").sum() / count,
            "adamw_norm": over("adamw_sq").sum().sqrt(),
            "pull_norm": over("pull_sq").sum().sqrt(),
            "update_norm": over("update_sq").sum().sqrt(),
            "distance": over("distance_sq").sum().sqrt(),
        }

    tracked = [[batch for batch in group if batch] for group in measured]
    overall = summary([batch for group in tracked for batch in group])
    return None if overall is None else {**overall, "groups": [summary(group) for group in tracked]}


def _as_numbers(value: Any) -> Any:
    """Tensors inside dicts and lists as plain floats."""
    if isinstance(value, dict):
        return {key: _as_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_as_numbers(item) for item in value]
    return value.item() if isinstance(value, Tensor) else value
