"""PACE as a `torch.optim.Optimizer`: arguments, lazy state, averaged weights in and out."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from .update import exchange_, exchange_back_, scalars, step_

Group: TypeAlias = dict[str, Any]


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
    float64 parameter): 12 bytes a parameter, 8 with `average=False`.

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
        foreach: step all tensors of one device and dtype together (True) or one by one (False).
            None chooses: together on accelerators, one by one on the CPU.
        maximize: ascend instead of descend.
        track_stats: measure each step for `stats()`; costs time and two copies of the largest
            batch of parameters that are stepped together.

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
        foreach: bool | None = None,
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
            "foreach": foreach,
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
            ValueError: an option is out of range, or a parameter is not floating-point.
        """
        if isinstance(param_group, dict) and param_group.get("ema_power") is not None:
            param_group.setdefault("ema_beta", None)  # the group's own power, not our default beta
        super().add_param_group(param_group)
        try:
            _check_options(param_group)
            for index, param in enumerate(param_group["params"]):
                if not (param.is_floating_point() or param.is_complex()):
                    raise ValueError(
                        f"params must be floating-point tensors, got {param.dtype} in "
                        f"{_describe(self.param_groups, len(self.param_groups) - 1, index)}"
                    )
        except ValueError:
            self.param_groups.pop()
            raise
        param_group["swapped"] = any(group.get("swapped") for group in self.param_groups)

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
        self._require_live("step()")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_gradients()

        measured: list[list[dict[str, Tensor]]] = []
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                measured.append([])
                continue
            for p in params:
                self._initialize(p, group)
            torch._foreach_add_([self.state[p]["step"] for p in params], 1.0)
            measured.append(
                [
                    step_(
                        batch,
                        [p.grad for p in batch if p.grad is not None],
                        [self.state[p]["exp_avg"] for p in batch],
                        [self.state[p]["exp_avg_sq"] for p in batch],
                        [self.state[p]["average"] for p in batch] if group["average"] else None,
                        scalars(step, group),
                        measure=group["track_stats"],
                    )
                    for step, batch in self._batches(params, group["foreach"])
                ]
            )
        self._stats = _summarize(measured)
        return loss

    def _initialize(self, param: Tensor, group: Group) -> None:
        state = self.state[param]
        dtype = torch.promote_types(param.dtype, torch.float32)
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(param, dtype=dtype)
            state["exp_avg_sq"] = torch.zeros_like(param, dtype=dtype)
        if group["average"] and "average" not in state:
            state["average"] = param.detach().to(dtype, copy=True)

    def _batches(
        self, params: list[Tensor], foreach: bool | None
    ) -> Iterator[tuple[int, list[Tensor]]]:
        """Parameters that one `step_` can take together, with their step number."""
        batches: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
        for index, p in enumerate(params):
            step = int(self.state[p]["step"])
            plain = type(p) in (Tensor, torch.nn.Parameter)
            together = (plain and p.device.type != "cpu") if foreach is None else foreach
            batches[step, p.device, p.dtype, None if together else index].append(p)
        for (step, *_), batch in batches.items():
            yield step, batch

    def _check_gradients(self) -> None:
        for g, group in enumerate(self.param_groups):
            for i, p in enumerate(group["params"]):
                if p.grad is None:
                    continue
                if p.grad.layout != torch.strided or p.grad.is_complex():
                    kind = "complex" if p.grad.is_complex() else "sparse"
                    raise RuntimeError(
                        f"PACE does not support {kind} gradients, got one in "
                        f"{_describe(self.param_groups, g, i)}; nothing was changed"
                    )

    # ---- the model to return ------------------------------------------------------------------

    @property
    def _swapped(self) -> bool:
        return any(group["swapped"] for group in self.param_groups)

    def _require_live(self, what: str) -> None:
        if self._swapped:
            raise RuntimeError(
                f"{what} was called while the averaged weights are in the model; "
                "call train() first. Nothing was changed"
            )

    def eval(self) -> None:
        """Put the average into the parameters; the live weights wait in `state[p]["average"]`.

        In place, without a third copy (see `paceline.update.exchange_`). Free if already done, and
        for parameters that keep no average or have not stepped.
        """
        self._swap(True)

    def train(self) -> None:
        """Put the live weights back into the parameters. Free if they are there already."""
        self._swap(False)

    @torch.no_grad()
    def _swap(self, to_average: bool) -> None:
        if self._swapped == to_average:
            return
        exchange = exchange_ if to_average else exchange_back_
        for group in self.param_groups:
            for p in group["params"]:
                if "average" in self.state.get(p, {}):
                    exchange(p, self.state[p]["average"])
            group["swapped"] = to_average

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Hold the average in the parameters inside a `with`; go back whatever happens there."""
        was_swapped = self._swapped
        self.eval()
        try:
            yield
        finally:
            self._swap(was_swapped)

    @torch.no_grad()
    def averaged_state_dict(self, model: torch.nn.Module) -> dict[str, Any]:
        """The returned model's `state_dict()`: a snapshot that leaves the live weights alone.

        Averaged parameters have their average in the parameter's dtype; frozen parameters, those
        that keep no average, and buffers are copied as they are. Names of one tied parameter share
        one tensor.

        Args:
            model: the module whose parameters this optimizer steps, itself or wrapped.

        Raises:
            ValueError: the optimizer keeps averages, but none for a parameter of this model.
        """
        returned = model.state_dict(keep_vars=True)
        snapshots: dict[Tensor, Tensor] = {}
        found = False
        for name, value in returned.items():
            if not isinstance(value, Tensor):
                continue
            if value not in snapshots:
                average = self.state.get(value, {}).get("average")
                found |= average is not None
                source = value if average is None or self._swapped else average
                snapshots[value] = source.detach().to(value.dtype, copy=True)
            returned[name] = snapshots[value]
        if not found and any("average" in state for state in self.state.values()):
            raise ValueError(
                f"model must hold parameters of this optimizer, but none of its "
                f"{len(snapshots)} tensors is one; got {type(model).__name__}"
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
        """Load a `state_dict()`; float32 state stays float32 whatever the parameters' dtype.

        One saved while the average was swapped in says so, and goes with model weights saved at
        the same time: `train()` then brings back the live weights.
        """
        loaded: dict[str, Any] = {}
        # Runs after the user's own hooks, so that it sees what is really loaded.
        hook = self.register_load_state_dict_pre_hook(lambda _, final: loaded.update(final))
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        # torch casts float state to the parameter's dtype: take ours from the source again.
        ids = [i for group in loaded["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(ids, params, strict=True):
            for key, value in loaded["state"].get(i, {}).items():
                if isinstance(value, Tensor) and value.is_floating_point() and key != "step":
                    self.state[p][key] = value.to(
                        p.device, torch.promote_types(p.dtype, torch.float32)
                    )
        for group in self.param_groups:
            for key, value in {**self.defaults, "swapped": False}.items():
                group.setdefault(key, value)
        self._stats = None


def _check_options(options: Group) -> None:
    """Raise a ValueError that names the first option out of its range, and its value."""

    def require(name: str, ok: bool, range_: str) -> None:
        if not ok:
            raise ValueError(f"{name} must be {range_}, got {options[name]!r}")

    def number(value: object) -> float:
        """The value, or NaN, which no range contains, for what is no finite number."""
        if isinstance(value, Tensor) and value.numel() == 1:
            return number(value.item())
        if isinstance(value, (int, float)) and math.isfinite(value):
            return float(value)
        return math.nan

    for name in ("lr", "eps", "weight_decay", "pullback"):
        require(name, number(options[name]) >= 0, "a finite number >= 0")
    betas = options["betas"]
    require(
        "betas",
        isinstance(betas, (tuple, list))
        and len(betas) == 2
        and all(0 <= number(beta) < 1 for beta in betas),
        "two numbers in [0, 1)",
    )
    power, beta = options["ema_power"], options["ema_beta"]
    require("ema_power", power is None or 0 <= number(power) <= 1, "None or in [0, 1]")
    require("ema_beta", beta is None or 0 < number(beta) <= 1, "None or in (0, 1]")
    if power is None and beta is None:
        raise ValueError("ema_beta must be in (0, 1] where ema_power is None, got None for both")
    require("ema_rate", number(options["ema_rate"]) > 0, "a finite number > 0")
    require("ema_start", number(options["ema_start"]) >= 0, "a finite number of steps >= 0")
    every = options["ema_every"]
    require("ema_every", isinstance(every, int) and every >= 1, "a whole number of steps >= 1")
    for name in ("clip", "average", "maximize", "track_stats"):
        require(name, isinstance(options[name], bool), "True or False")
    require("foreach", options["foreach"] in (None, True, False), "None, True or False")
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
