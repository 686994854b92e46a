"""PACE as a `torch.optim.Optimizer`: its arguments, its groups, the plan of a step."""

import ctypes
import operator
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, TypeAlias, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import Optimizer, ParamsT

from . import auto, kernels, memory, rounding, shards
from .averaging import Averaging
from .base import AveragedOptimizer, describe, refuse_layouts, summarize
from .defaults import AUTO, BETAS, LR, WEIGHT_DECAY
from .loading import StateCheck, check_count, check_is_dict, check_tensor, validated_checkpoint
from .options import (
    PULL,
    SHORT,
    Group,
    averages_left_open,
    check_lr,
    check_pace,
    check_spelling,
    expand_short,
)
from .state import (
    AVERAGE,
    COUNTS,
    ELASTIC_STEPS,
    EXP_AVG,
    EXP_AVG_SQ,
    FROZEN,
    IDLE,
    OFFSET,
    PACE_KEYS,
    PLAIN,
    STEP,
    WIDE,
    State,
    averages_of,
    counts_on_device,
    ensure,
    ensure_counters,
    extra_keys_in,
    frozen_places,
    restore,
    shaped_keys,
    state_dtype,
    take_in,
)
from .swap import SWAPPED, Swapped, write_record
from .update import Scalars, Slot, rest_, scalars

# What torch's AdamW has besides: how it steps, which says nothing about how we do.
ADAMW_ONLY = {
    "amsgrad",
    "capturable",
    "decoupled_weight_decay",
    "differentiable",
    "foreach",
    "fused",
}
# Options that decide how tensors are batched, what their state holds, and which kernel they take.
SHAPING = (
    *("averaging", "returns", "fused", "capturable", "state_dtype"),
    *("stochastic_round", "nonfinite", "track_stats"),
)
UNCHECKED = ("lr", "params", ELASTIC_STEPS)  # here: they change at each step, or are no option


class PACE(AveragedOptimizer):
    r"""AdamW whose weights are pulled, coordinate by coordinate, toward the average you return.

        β_t     = max((1 + γ·max(0, t - ρ))^-κ, 1e-4)
        λ_t     = min(1, η·c·β_t / (sqrt(v̂_t) + ε))
        θ_{t+1} = (1 - η·wd)·θ_t - η·m̂_t / (sqrt(v̂_t) + ε) + λ_t·(ema_{t-1} - θ_t)
        ema_t   = (1 - β_t)·ema_{t-1} + β_t·θ_{t+1},     ema_0 = θ_1

    θ are the *live* weights, where gradients are taken; ema is the *average*, which is the model to
    evaluate, save and return. m̂ and v̂ are Adam's bias-corrected moments, η the scheduled learning
    rate of the step. With c = 0 the live weights are those of `torch.optim.AdamW`, and the average
    watches ("EMA-evaluated AdamW"). With a constant averaging weight (`averaging=EMA(0.01)`) β_t is
    that constant, and the gain has no β_t in it.

        opt = PACE(model.parameters(), lr=4e-3)  # about four times AdamW's rate
        for batch in batches:                # any training loop
            model(batch).loss.backward()
            opt.step()
            opt.zero_grad()
        with opt.averaged():                 # the model to return
            evaluate(model)
        torch.save(opt.averaged_state_dict(model), "model.pt")

    The pull wants a fast average, the model to return a slow one: `return_kappa=0.7` keeps a second
    average in the same pass over memory, and returns that. `returns={"slow": "ema:kappa=0.7",
    "mean": "uniform"}` keeps several: `opt.averaged("mean")` and `opt.averaged_state_dict(model,
    "mean")` ask for one by name; without a name it is the first.

    A parameter that has no gradient at a step stands still, and its averages go on toward it. One
    that does not require a gradient is returned as it is, and may be of any dtype; where none of
    the optimizer's does, as in evaluation, that counts which was frozen at the last step. To change
    weights after a step, use `register_projection`.

    State for each parameter, created at its first step (`paceline.state`): two counts, and
    `exp_avg` (m), `exp_avg_sq` (v) and `average`, all of the parameter's shape and in float32
    (float64 for a float64 parameter): 12 bytes a parameter. While the average is swapped in,
    `average` keeps the live weights, for 16-bit parameters in packed form. Each further average is
    `return_<name>`, 4 bytes a parameter (8 for a float64 one), whatever `state_dtype` says.

    With `state_dtype=torch.bfloat16` all three take 6 bytes a parameter, and float32 parameters
    have `offset`, the average minus the live weights, in place of `average`: changing the weights
    between steps then moves the average with them.

    Every option below except `params` can be set for each parameter group.

    Args:
        params: parameters, named parameters, or groups (dicts) of them.
        lr: learning rate η >= 0, a number or one-element tensor. LR schedulers work as usual. The
            default pull wants about four times AdamW's rate, and is slow at AdamW's own: in
            results/trial it was 0.37 nats above an EMA there.
        betas: decay of the first and second moment, each in [0, 1): numbers, or one-element tensors
            that are read at each step.
        eps: ε >= 0, in the unit of a gradient; 0 counts as 1.2e-38, so that 0/0 is 0.
        weight_decay: decoupled weight decay wd >= 0.
        pullback: strength c >= 0, in the unit of a gradient: its best value moves with the scale
            of the gradients (the paper: 0.15-0.25 fine-tuning 1-2B models, 0.03 a 135M one, 0.002
            to 0.003 pretraining GPT-2). Or "auto", a gain that sets itself at each step, the same
            for all coordinates of its groups, from what the step can change the loss by
            (`paceline.auto`): up to half a nat nothing pulls. It is made for cross-entropy in nats;
            parameters of 2^16 elements or more count by every 251st; of shards that are no DTensors
            (ZeRO) this rank's alone count, and ranks that hold DTensors wait for each other
            and must step the same ones. Ours, not the paper's (docs/averages.md). Default: the
            saturated pull, gain="scalar" with c = 1.
        gain: "adam" as above; or "scalar", λ_t = c for all coordinates: c is in [0, 1] and has no
            unit then, and the pull amounts to the learning rate η·β_t/(β_t + c·(1 - β_t)).
        kappa: κ in [0, 1], how fast the averaging weight decays. Larger is a slower average. Short
            for averaging=PowerEMA(kappa).
        averaging: the average that the pull goes toward: a rule of `paceline.averaging`, one of
            your own, or its text, as in Uniform(start=100) or "ema:half_life=200". β_t is what its
            `falloff` says. The pull is applied at every step, also where the rule takes in every
            few. LAWA and BEMA keep more state than the average, take a second pass, also over
            guarded coordinates, and go with neither state_dtype nor capturable. Default: κ = 0.5
            where a strength is given, κ = 0.7 where it is 0. Else κ = 0.3, and a second average is
            returned: κ = 0.7, or κ = 0.6 with pullback="auto". Groups that leave averages open
            share those of the pull given here, else of the first of them that pulls.
        return_kappa: κ in [0, 1] of a second average, to be returned; nothing pulls toward it.
            Short for returns=PowerEMA(return_kappa).
        returns: averages to be returned, which nothing pulls toward: one, or a mapping of names of
            letters and digits to such, of which `eval()` puts in the first. LAWA and BEMA do not go
            with capturable here.
        clip: hold the gain to at most 1, so that the pull never goes past the average.
        fused: step in one pass over memory (`paceline.kernels`): True demands it, False does not
            use it. None uses it for those parameters of a group that it can step if they have 2^18
            elements or more in all: contiguous float32, bfloat16 and float64 parameters, on the CPU
            if a C++ compiler works, on CUDA if Triton does. On CUDA it first compares one small
            step with torch operations, once in a process. It warns once where it does without.
            No GPU has run it yet. Without it, tensors are stepped together, with some four times
            2^18 elements of scratch on the CPU and 2^24 on accelerators.
        capturable: keep `step` on the parameter's device and wait for nothing there, as a CUDA
            graph needs; take a step before the one that goes into the graph. Costs more launches.
        state_dtype: torch.bfloat16, or its name, keeps m, v and the average in it, rounded
            stochastically; for float32 and bfloat16 parameters. None: float32 as said above.
        stochastic_round: round bfloat16 parameters stochastically when they are written; to
            nearest, updates below 1/512 of a weight are lost. Not for float16; wider parameters
            are not rounded.
        seed: of the stochastic rounding, which is a function of the seed, the parameter's place in
            the optimizer, its step and the element: nothing to save, the same on replay.
        nonfinite: what a gradient that is not finite, or whose square is not, does. "guard": its
            coordinates stand still at this step, all bits of weight, moments and average kept. It
            takes no memory traffic in the kernel; on accelerators it copies what is stepped
            together. "skip": no parameter of the groups with this option steps, on
            any rank, and the step does not count. "raise": FloatingPointError
            before anything has changed, on all ranks. These two read the gradients once more, and
            go by each tensor's sum of squares; all ranks of the default process group must step
            together. "skip" keeps `step` on accelerators, and waits for none. "ignore": what
            torch's own optimizers do, which is to lose the weights, and here the average.
        maximize: ascend instead of descend.
        track_stats: measure each step for `stats()`; costs time, and scratch memory of some four
            times the parameters that are stepped together. Of sharded parameters, this rank's.
        foreach: taken, because trainers pass it to every optimizer, and not needed: tensors are
            stepped together anyway. It is no option of groups, and not to be True with fused=True.

    Raises:
        ValueError: an argument is out of its range; the message names it and its value.
        TypeError: params are no parameters, a module for one.

    Source: Au & Block, Training for the Model You Return, arXiv:2606.25086 (2026).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = LR,
        betas: Sequence[float | Tensor] = BETAS,
        eps: float = 1e-8,
        weight_decay: float = WEIGHT_DECAY,
        *,
        pullback: float | Literal["auto"] | None = None,
        gain: str | None = None,
        kappa: float | None = None,
        averaging: Averaging | str | None = None,
        return_kappa: float | None = None,
        returns: Averaging | str | Mapping[str, Averaging | str] | None = None,
        clip: bool = True,
        fused: bool | None = None,
        capturable: bool = False,
        state_dtype: torch.dtype | None = None,
        stochastic_round: bool = False,
        seed: int = 0,
        nonfinite: str = "guard",
        maximize: bool = False,
        track_stats: bool = False,
        foreach: bool | None = None,
    ) -> None:
        defaults = {k: x for k, x in locals().items() if k not in ("self", "params", "__class__")}
        if not isinstance(params, Iterable):
            raise TypeError(
                "params must be parameters, or groups of them, as of model.parameters(); got "
                f"{type(params).__name__}"
            )
        self._forget()
        expand_short(defaults)
        # Where each group gives its own strength there is none here.
        checked = defaults | ({"pullback": 0.0} if pullback is None and gain == "adam" else {})
        check_pace(checked)
        if pullback is None:  # a group may give its own
            checked |= {name: defaults[name] for name in PULL}
        given: list[Any] = list(params)
        groups = [x for x in given if isinstance(x, dict)] or [{}]
        checked |= averages_left_open(groups, defaults, pace=True)
        super().__init__(given, checked)
        if any(group["pullback"] == AUTO for group in self.param_groups):
            warnings.warn(auto.EXPERIMENTAL, stacklevel=2)

    def _forget(self) -> None:
        super()._forget()
        self._plans: dict[int, Plan] = {}  # by the group's index
        self._states: list[State] = []  # of all parameters, when the plans were made

    def add_param_group(self, param_group: Group) -> None:
        """Add a group of parameters with options of its own.

        Raises:
            ValueError: an option is out of range or misspelt, or a parameter is flattened by FSDP1,
                is a DTensor of Partial placement, is not floating-point or does not go with an
                option.
            RuntimeError: `fused=True`, and the device's kernel cannot be used here.
        """
        if isinstance(param_group, dict):  # else torch says what is wrong
            check_spelling(param_group, {*self.defaults, *SHORT})
            expand_short(param_group)
        super().add_param_group(param_group)
        try:
            check_pace(param_group)
            self._check_params(len(self.param_groups) - 1)
        except (ValueError, kernels.BuildError):
            self.param_groups.pop()
            raise
        live: list[Swapped | None] = [None] * len(param_group["params"])
        param_group[SWAPPED] = write_record(live) if self.swapped else ""

    def restart_averages(self) -> None:
        """As every optimizer with averages; what is planned for steps goes by the old ones."""
        super().restart_averages()
        self._plans, self._states = {}, []

    def _check_params(self, group: int) -> None:
        """Raises: ValueError: a parameter is given twice, or does not go with an option."""
        refuse_layouts(self.param_groups, group, ValueError)
        options = self.param_groups[group]
        if len(set(options["params"])) < len(options["params"]):
            raise ValueError(f"params must be given once each, got one twice in group {group}")
        trained = [(i, p) for i, p in enumerate(options["params"]) if p.requires_grad]
        self._check_dtypes(group, trained, ValueError)

    @torch.no_grad()
    def _check_dtypes(
        self, group: int, members: list[tuple[int, Tensor]], error: type[Exception]
    ) -> None:
        """Raises: `error`: one of these parameters of a group cannot be stepped by its options."""
        options = self.param_groups[group]
        for index, p in members:
            says = None
            if p.dtype not in WIDE and not p.is_complex():
                says = "params must be 16-, 32- or 64-bit floating-point tensors"
            elif options["state_dtype"] and p.dtype not in (torch.float32, torch.bfloat16):
                says = "state_dtype is for float32 and bfloat16 parameters"
            elif options["stochastic_round"] and p.dtype == torch.float16:
                says = "stochastic_round is for bfloat16 parameters"
            if says:
                where = describe(self.param_groups, group, index)
                raise error(f"{says}, got {p.dtype} in {where}")
        if not options["fused"]:
            return
        for index, p in members:
            grad = None if p.grad is None else shards.local(p.grad)
            reason = kernels.reason_against(shards.local(p), state_dtype(p, options), grad)
            if reason:
                raise error(
                    f"fused=True {reason}, got {describe(self.param_groups, group, index)}; "
                    "nothing was changed, and fused=None steps it another way"
                )
        for p in {(p.device, p.dtype): p for _, p in members}.values():
            kernels.prepare(shards.local(p), state_dtype(p, options), options)

    # ---- stepping -----------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @_disable_dynamo  # which cannot trace it; torch has this on methods of its own, too
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step on every parameter that has a gradient.

        Args:
            closure: re-evaluates the model under gradients and returns the loss, which is passed
                back.

        Raises:
            RuntimeError: the averaged weights are swapped in; a gradient is sparse or not of real
                floats; a parameter, its gradient and its state have different shapes, or less
                memory than they say; or two of them share memory. Nothing has changed then.
            ValueError: a rate or another number of a group has been set out of its range since.
            FloatingPointError: with `nonfinite="raise"`, as said there.
        """
        if closure is None and (probed := self._is_state_probe()):
            for group, p in probed:
                self._begin_averages(group, p)
            self._state_is_provisional = True
            return None
        self._refuse_while_swapped()
        self._refuse_in_graph()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        held = self._plans_that_hold()
        for index, (group, plan) in enumerate(zip(self.param_groups, held, strict=True)):
            if plan is None:
                refuse_layouts(self.param_groups, index, RuntimeError)
                stepped = [x for x in enumerate(group["params"]) if x[1].grad is not None]
                self._check_dtypes(index, stepped, RuntimeError)
                self._check_gradients(self.param_groups, index)
        self._compare_ranks()
        skip = self._skips_step()
        self._drop_provisional_state()
        if not any(p.grad is not None for group in self.param_groups for p in group["params"]):
            return loss
        self._check_options()

        change = auto.expected_loss_change(self.param_groups, self.state)
        plans = self._completed(held, skip)
        # Complete before the first change.
        work = [list(plan.work(_skips(plan.group, skip), change)) for plan in plans]

        self._note_frozen()
        projected = self._to_project(work) if self._projections else []
        measured: list[list[dict[str, Any]]] = []
        for plan, items in zip(plans, work, strict=True):
            measured.append([])
            for kernel, _, grads, keys, numbers in items:
                s = numbers.without_averages() if self._projections else numbers
                measured[-1] += kernel.step(grads, keys, s, measure=plan.group["track_stats"])
            plan.count_step()
        if projected:
            self._project()
            for slot, s, before in projected:
                rest_([slot], s, before)
        skipped = [x.pop("skipped") for group in measured for x in group if "skipped" in x]
        for plan in plans:
            # A skip that a device decides is asked for only where it is needed.
            if plan.averages.kept and not _skips(plan.group, skip):
                plan.take_in()
        self._count_faults(skipped, skip)
        self._stats = summarize(measured)
        return loss

    def _begin_averages(self, group: Group, param: Tensor) -> None:
        ensure(self.state[param], param, group, averages_of(group))

    def _refuse_in_graph(self) -> None:
        """Raises: RuntimeError: a CUDA graph is being made that would hold this step's numbers."""
        others = [group for group in self.param_groups if not group["capturable"]]
        if any(kernels.capturing(p.device) for group in others for p in group["params"][:1]):
            raise RuntimeError(
                "step() goes into a CUDA graph with capturable=True only; nothing was changed"
            )

    def _check_options(self) -> None:
        """Raises: ValueError: an option was set out of its range since the last step."""
        for index, group in enumerate(self.param_groups):
            check_lr(group)
            values = [x for name, x in group.items() if name not in UNCHECKED]
            if values != self._checked.get(index):
                checked = {**group, "lr": 0.0}  # which may be on a device that nobody waits for
                check_pace(checked)
                group |= checked | {"lr": group["lr"]}
                self._checked[index] = values

    def _to_project(
        self, work: list[list["Work"]]
    ) -> list[tuple[Slot, Scalars, tuple[Tensor, Tensor] | None]]:
        """What `rest_` takes once the weights of the coming step have been projected."""
        return [
            (
                x._replace(key=None if keys is None else keys[i] ^ ANOTHER),
                s.of(i),
                (x.param.clone(), x.average.clone())
                if x.average.itemsize < x.param.itemsize
                else None,
            )
            for items in work
            for _, slots, _, keys, s in items
            for i, x in enumerate(slots)
        ]

    def _plans_that_hold(self) -> list["Plan | None"]:
        """Of each group the plan of the step before, if the coming step goes by it, too."""
        if not _identical(list(self.state.values()), self._states):
            self._plans, self._states = {}, []
        first, held = 0, []
        for index, group in enumerate(self.param_groups):
            plan = self._plans.get(index)
            held.append(plan if plan is not None and plan.holds(group, first) else None)
            first += len(group["params"])
        return held

    def _completed(self, held: list["Plan | None"], skip: bool | Tensor) -> list["Plan"]:
        """The plan of each group for the coming step; of no tensors where the host skips it."""
        first, plans = 0, []
        for index, (group, plan) in enumerate(zip(self.param_groups, held, strict=True)):
            if _skips(group, skip) is True:
                plan = Plan(self.param_groups, index, first, self.state, [])
            elif plan is None:
                self._plans.pop(index, None)
                plan = Plan(self.param_groups, index, first, self.state, group["params"])
                if plan.may_be_kept:
                    self._plans[index] = plan
            plans.append(plan)
            first += len(group["params"])
        if plans != held:
            self._check_memory(plans)
            self._states = list(self.state.values()) if self._plans else []
        return plans

    def _check_memory(self, plans: list["Plan"]) -> None:
        """Raises: RuntimeError: two of the tensors that a step writes share memory."""
        written = [(x, plan, place) for plan in plans for place, x in plan.written]
        tensors = [x for x, *_ in written]
        spans = memory.spans(tensors)
        if spans == self._spans:  # those of the step before
            return
        if found := memory.shared(tensors, spans):
            names = [plan.name_of(place) for _, plan, place in (written[i] for i in found)]
            raise RuntimeError(f"{' and '.join(names)} share memory; nothing was changed")
        self._spans = spans

    # ---- checkpoints --------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a `state_dict()`; state keeps its dtype whatever the parameters'.

        One saved while the average was swapped in says so, and goes with model weights saved at
        the same time: `train()` then brings back the live weights.

        One of `torch.optim.AdamW` is a start: moments, steps and AdamW's options are taken over, a
        warning says so, and the averages begin from the weights that are there at the next step,
        as if all steps before had been there: give Uniform, SWA and BEMA that step as their start.

        State that another tool has put beside PACE's is carried along, with a warning.

        Raises:
            ValueError: state of another class, missing, left over, misshapen, or of a shard; groups
                that do not match; or an option out of its range. The message names the parameter
                or option. Nothing has changed then.
        """
        check_is_dict(state_dict)
        loaded: dict[str, Any] = {}

        def validate(_: Optimizer, final: dict[str, Any]) -> dict[str, Any]:
            loaded.update(
                validated_checkpoint(
                    final,
                    self.param_groups,
                    keys=PACE_KEYS,
                    count=STEP,
                    complete=_complete,
                    checker=_checker,
                )
            )
            return loaded

        def restore_ours(_: Optimizer) -> None:
            # A copy, for two optimizers that share tensors would swap each other's averages.
            for saved, group in zip(loaded["param_groups"], self.param_groups, strict=True):
                averages = averages_of(group)
                keys = PACE_KEYS | averages.extra_keys
                for key, p in zip(saved["params"], group["params"], strict=True):
                    source, own = loaded["state"].get(key, {}), state_dtype(p, group)
                    if source:
                        restore(self.state[p], source, keys, p, averages, own)
                        ensure_counters(self.state[p], p, group)

        # The first sees what the user's own hooks made of the state, the second runs before theirs.
        hooks = [
            self.register_load_state_dict_pre_hook(validate),
            self.register_load_state_dict_post_hook(restore_ours, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()
        self._stats, self._state_is_provisional = None, False
        self._tell_of_projections()
        self._plans, self._states = {}, []
        states = [self.state.get(p) for group in self.param_groups for p in group["params"]]
        if any(state and not {AVERAGE, OFFSET} & state.keys() for state in states):
            warnings.warn(
                "the checkpoint keeps no averages, as those of torch.optim.AdamW: its moments, "
                "steps and options are taken over, and averages begin from the weights that are "
                "there at the next step",
                stacklevel=2,
            )


# ---- the plan of a step -------------------------------------------------------------------------

# Of some tensors: how they step, themselves, their gradients, keys of rounding, and numbers.
Work: TypeAlias = tuple[kernels.Kernel, list[Slot], list[Tensor], Any | None, Scalars]
ANOTHER = 0x2545F491  # turns a key of rounding into that of other noise


@dataclass
class Batch:
    """Tensors that step together: of one device, one set of dtypes and one pair of counts."""

    slots: list[Slot]  # without gradients and keys
    params: list[Tensor]
    places: list[int]  # of each parameter its place in the optimizer
    states: list[State]
    grads: list[Tensor]  # this rank's, of a plan for one step; a plan that is kept holds none
    idle: bool  # whether they have no gradients: their averages alone go on
    counts: tuple[int, int] | None  # steps, and idle ones; None if the host must not read them
    kernel: kernels.Kernel
    cells: list[ctypes.c_double]  # of a plan that is kept: the counts that move, in their memory

    def now(self, key: str) -> Tensor:
        """The counts of one kind, as a vector on their device."""
        return torch.stack([state[key] for state in self.states])

    def agrees(self) -> bool:
        """Whether the counts that move, which are where they were, are those it was made for."""
        return self.counts is None or {x.value for x in self.cells} == {self.counts[self.idle]}


class Plan:
    """How the tensors of a group step: kept between steps, for as long as it holds.

    Parameters without a gradient that have stepped before are in it, too: their averages go on.

    Args:
        groups: the optimizer's groups, whose parameters have the gradients of the coming step.
        index: of the group.
        first: the place of its first parameter in the optimizer.
        states: the optimizer's `state`; what the options ask for is made there.
        params: the group's parameters, or none where it does not step.

    Raises:
        RuntimeError: a parameter, its gradient and its state do not go together in memory.
    """

    def __init__(
        self, groups: list[Group], index: int, first: int, states: Any, params: list[Tensor]
    ) -> None:
        self.groups, self.index, self.first = groups, index, first
        self.group = group = groups[index]
        self.averages = averages_of(group)
        self.shaped_by = _shaping(group, first)
        self.params = list(params)
        self.rounds = group["state_dtype"] is not None or group["stochastic_round"]
        self.stepped = [p for p in self.params if p.grad is not None]
        members = [
            (place, p)
            for place, p in enumerate(self.params, first)
            if p.grad is not None or states.get(p)
        ]
        # Only where the kernel's table saves time, for a plan keeps the state's tensors alive.
        self.may_be_kept = all(
            type(p) in PLAIN and kernels.device_kind(p.device) and p.layout is torch.strided
            for _, p in members
        )
        self.written: list[tuple[int, Tensor]] = []  # what a step writes, by the parameter's place
        alike: dict[tuple[Any, ...], list[tuple[Slot, Tensor, int]]] = defaultdict(list)
        for place, p in members:
            state = states[p]
            self._check(place, state)
            ensure(state, p, group, self.averages)
            slot = self._slot(p, state)
            idle = slot.grad is None
            written = slot.param, *slot[2:5], *slot.extra, state[IDLE if idle else STEP]
            self.written += [(place, x) for x in written]
            counts = None
            if not counts_on_device(p, group):
                counts = int(state[STEP].item()), int(state[IDLE].item())
            fits = kernels.reason_against(slot.param, slot.exp_avg.dtype, slot.grad) is None
            alone = None if type(slot.param) in PLAIN else place
            dtypes = (slot.param.dtype, None if slot.grad is None else slot.grad.dtype)
            alike[slot.param.device, dtypes, fits, alone, idle, counts].append((slot, p, place))
        self.batches = []
        for (*_, fits, _, idle, counts), found in alike.items():
            slots, own, places = map(list, zip(*found, strict=True))
            count = [states[p][IDLE if idle else STEP] for p in own]
            together = counts is not None
            chosen = kernels.choose(slots, count, group, fits=fits, together=together)
            grads = [] if self.may_be_kept or idle else [slot.grad for slot in slots]
            theirs = [states[p] for p in own]
            slots = [x._replace(grad=None) for x in slots]
            read = together and self.may_be_kept
            places_of_counts = [x.data_ptr() for x in count] if read else []
            cells = [ctypes.c_double.from_address(at) for at in places_of_counts if at]
            made = Batch(slots, own, places, theirs, grads, idle, counts, chosen, cells)
            self.batches.append(made)
        self._remember()

    def _slot(self, param: Tensor, state: State) -> Slot:
        return Slot(
            shards.local(param),
            None if param.grad is None else shards.local_grad(param),
            shards.local(state[EXP_AVG]),
            shards.local(state[EXP_AVG_SQ]),
            shards.local(state[AVERAGE] if AVERAGE in state else state[OFFSET]),
            start=shards.first_element(param) if self.rounds else 0,
            extra=tuple(shards.local(state[key]) for key in self.averages.extra),
        )

    # ---- whether it can be taken

    def name_of(self, place: int) -> str:
        """The parameter at this place in the optimizer, for messages."""
        return describe(self.groups, self.index, place - self.first)

    def _refuse(self, place: int, why: str) -> NoReturn:
        raise RuntimeError(f"{self.name_of(place)} cannot step: {why}; nothing was changed")

    def _check(self, place: int, state: State) -> None:
        """Refuse a parameter that does not go together with its gradient and its state."""
        p = self.params[place - self.first]
        tensors = {key: state[key] for key in sorted(shaped_keys(state, self.averages))}
        if p.grad is not None:
            tensors["gradient"] = p.grad
        if why := memory.first_fault(p, tensors):
            self._refuse(place, why)

    # ---- whether it holds

    def _remember(self) -> None:
        """Keep what `holds` compares with."""
        self.states = [x for batch in self.batches for x in batch.states]
        self.values = [x for state in self.states for x in state.values()]
        self.tensors = [x for _, x in self.written]
        if self.may_be_kept:
            self.layout = _layout(self.tensors)
            self.shapes = [p.shape for p in self.stepped]
            self.kinds = _kinds([p.grad for p in self.stepped])

    def holds(self, group: Group, first: int) -> bool:
        """Whether the coming step goes as this plan has it.

        Not if a parameter, option, gradient or state has come, gone or become another, or if a
        tensor's memory, shape, strides or dtype, or a count of steps, has changed.
        """
        params = group["params"]
        return (
            self.group is group
            and self.shaped_by == _shaping(group, first)
            and _identical(params, self.params)
            and _identical([p for p in params if p.grad is not None], self.stepped)
            and _identical([x for state in self.states for x in state.values()], self.values)
            and _layout(self.tensors) == self.layout
            and [p.shape for p in self.stepped] == self.shapes
            and _kinds([p.grad for p in self.stepped]) == self.kinds
            and all(batch.agrees() for batch in self.batches)
        )

    # ---- the step

    def work(self, skip: bool | Tensor, change: float | Tensor) -> Iterator[Work]:
        """Each kernel with gradients, keys of stochastic rounding and numbers of the coming step.

        Args:
            skip: a tensor that says on the device whether the step is skipped, or False.
            change: the expected loss change (`paceline.auto`).

        Raises:
            RuntimeError: the memory of a gradient has been freed.
        """
        for batch in self.batches:
            grads = batch.grads or [p.grad for p in batch.params if p.grad is not None]
            for i, g in enumerate(grads):
                # The bytes first, for that is quick, and few gradients are a view of more.
                if g.nbytes != g.untyped_storage().nbytes() and memory.lacks_memory(g):
                    self._refuse(batch.places[i], "its gradient has been freed")
            device = batch.params[0].device
            # Counts that the host may not read: vectors, and vectors of scalars from them.
            step, idle = batch.counts or (batch.now(STEP), batch.now(IDLE))
            step, idle = step + (not batch.idle), idle + batch.idle
            expected = change.to(device) if isinstance(change, Tensor) else change
            numbers = scalars(step, self.group, self.averages, expected, idle=idle)
            if isinstance(skip, Tensor):
                numbers = numbers._replace(skip_nonfinite=skip.to(device))
            keys = None
            if self.rounds:
                keys = _keys(self.group["seed"], batch.places, step + idle, device)
            yield batch.kernel, batch.slots, grads, keys, numbers

    def count_step(self) -> None:
        """Have the batches know of the step that their kernels have counted."""
        for batch in self.batches:
            if batch.counts is not None:
                step, idle = batch.counts
                batch.counts = step + (not batch.idle), idle + batch.idle

    def take_in(self) -> None:
        """Have averages whose rules keep more tensors take in the weights of the step."""
        for batch in self.batches:
            for p, state in zip(batch.params, batch.states, strict=True):
                take_in(self.averages, int(state[STEP] + state[IDLE]), [(p, state)])


def _skips(group: Group, skip: bool | Tensor) -> bool | Tensor:
    """Whether a group skips a step that groups with nonfinite="skip" do."""
    return skip if group["nonfinite"] == "skip" else False


def _shaping(group: Group, first: int) -> tuple[Any, ...]:
    # Averages of workers that meet stand still in steps.
    return (first, ELASTIC_STEPS in group, *(group[name] for name in SHAPING))


def _identical(a: list[Any], b: list[Any]) -> bool:
    """Whether two lists are of the same objects."""
    return len(a) == len(b) and all(map(operator.is_, a, b))


def _layout(tensors: list[Tensor]) -> tuple[list[Any], ...]:
    """Where tensors are in memory, and how."""
    return (
        list(map(Tensor.data_ptr, tensors)),
        list(map(Tensor.numel, tensors)),
        list(map(Tensor.is_contiguous, tensors)),
        [x.dtype for x in tensors],
    )


def _kinds(grads: list[Any]) -> tuple[list[Any], ...]:
    """What decides whether gradients can be stepped, and by which kernel."""
    return (
        [x.dtype for x in grads],
        [x.layout for x in grads],
        [x.shape for x in grads],
        list(map(type, grads)),
        list(map(Tensor.is_neg, grads)),
    )


def _keys(
    seed: int, places: list[int], step: int | Tensor, device: torch.device
) -> list[int] | Tensor:
    """The keys of stochastic rounding for parameters at these places in the optimizer."""
    if not isinstance(step, Tensor):
        keys: list[int] = rounding.keys(
            seed, torch.tensor(places, dtype=torch.int32), step
        ).tolist()
        return keys
    # Made on the device from nothing, for a CUDA graph cannot hold a copy from the host.
    all_places = torch.arange(max(places) + 1, dtype=torch.int32, device=device)
    return rounding.keys(seed, torch.stack([all_places[i] for i in places]), step.long().int())


# ---- checkpoints --------------------------------------------------------------------------------


def _complete(saved: Group, mine: Group, index: int) -> Group:
    """All options of a saved group of PACE or of torch.optim.AdamW, checked."""
    ours = "pullback" in saved
    # Adam's weight decay is another; torch before 2.7 does not tell the two apart.
    if not ours and not ("amsgrad" in saved and saved.get("decoupled_weight_decay", True)):
        raise ValueError(
            f"group {index} of the checkpoint is neither PACE's nor torch.optim.AdamW's, it has "
            f"{sorted(saved.keys() - {'params'})}; nothing was changed"
        )
    if not ours and saved["amsgrad"]:
        raise ValueError(
            f"group {index} of the checkpoint is of AdamW with amsgrad, which PACE does not have; "
            "nothing was changed"
        )
    taken = saved.keys() - (set() if ours else ADAMW_ONLY)
    group = {**mine, **{key: saved[key] for key in taken}}
    check_pace(group)
    if FROZEN in mine or FROZEN in saved:
        group[FROZEN] = saved.get(FROZEN, "")
    frozen_places(group | {"params": mine["params"]})
    return group


def _checker(group: Group, members: list[tuple[Tensor, State]]) -> StateCheck:
    """What raises a ValueError for a saved state that PACE cannot load under a group's options."""
    # No average in all the group: they are yet to begin, as after a checkpoint of AdamW.
    averaged = any({AVERAGE, OFFSET} & state.keys() for _, state in members)
    needed = averages_of(group).extra_keys

    def check(state: State, param: Tensor, record: Swapped | None) -> None:
        if not state:
            if record:
                raise ValueError(
                    "the checkpoint has no state for it, but had its average swapped in"
                )
            return  # it had no gradient yet
        moments = {STEP, EXP_AVG, EXP_AVG_SQ}
        if missing := sorted(moments - state.keys()):
            raise ValueError(
                f"its state lacks {missing} and has {sorted(map(str, state))}; PACE loads "
                "checkpoints of PACE and of torch.optim.AdamW"
            )
        averages = {AVERAGE, OFFSET} & state.keys()
        if averages and (missing := sorted(needed - state.keys())):
            raise ValueError(f"its state lacks {missing}, which its averages are made of")
        if extra := sorted(extra_keys_in(state) - needed):
            raise ValueError(f"its state has {extra}, which its averages are not made of")
        if len(averages) == 2 or ((averaged or record) and not averages):
            raise ValueError(f"its state must have 'average' or 'offset', got {sorted(averages)}")
        for key in sorted(state.keys() & (PACE_KEYS | needed)):
            (check_count if key in COUNTS else check_tensor)(key, state[key], param)

    return check
