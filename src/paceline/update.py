"""The mathematics of PACE: one step of the rule, as pure functions of tensors.

With gradient g at the live weights θ_t (steps t = 1, 2, ...), scheduled learning rate η, Adam's
bias-corrected moments m̂ and v̂, pullback strength c and running average `ema` (ema_0 = θ_1):

    β_t     = max((1 + γ·max(0, t - ρ))^-κ, 1e-4)            averaging weight (paceline.averaging)
    λ_t     = min(1, η·c·β_t / (sqrt(v̂_t) + ε))               gain, one for each coordinate
    θ_{t+1} = (1 - η·wd)·θ_t - η·m̂_t / (sqrt(v̂_t) + ε)        AdamW
              + λ_t·(ema_{t-1} - θ_t)                         and the pull toward the average
    ema_t   = (1 - β_t)·ema_{t-1} + β_t·θ_{t+1}               every `every`-th step

With a constant averaging weight the gain has no β_t in it; with a uniform gain λ_t is one number
for all coordinates. Extra averages, which are only returned, take in θ_{t+1} and pull nothing.

`step_` is the rule for lists of tensors of any size. The kernels of CPUs and GPUs write it once
more (kernels/cpu.cpp, kernels/gpu.py), held to the same reference. `pull_` is its second half
alone, after another optimizer's step.

State narrower than its parameter keeps d = ema - θ, the *offset* of the average from the live
weights, instead of the average: small beside the weights, it loses little to bfloat16's 8 bits
where the average itself would lose what training had changed in it.

    d_t = (1 - β_t)·(d_{t-1} - (θ_{t+1} - θ_t))

Source: Au & Block, Training for the Model You Return, arXiv:2606.25086 (2026).
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from . import auto, rounding
from .averaging import lerp_
from .defaults import AUTO
from .state import AVERAGE, PLAIN, Averages

# Elements stepped together, which bounds the scratch; a CPU's share of them stays in its cache.
TOGETHER = 2**24
TOGETHER_ON_CPU = 2**18
# Stands for ε = 0: no sum with a root changes by it, and without gradients it makes 0/ε = 0.
TINY = torch.finfo(torch.float32).tiny


# ---- what a step takes --------------------------------------------------------------------------


class Scalars(NamedTuple):
    """All that one step needs to know besides its tensors."""

    beta1: float  # decay of the first moment
    beta2: float  # decay of the second moment
    eps: float  # ε
    root_bias2: float | Tensor  # sqrt(1 - beta2^t): sqrt(v) / root_bias2 = sqrt(v̂)
    step_size: float | Tensor  # η / (1 - beta1^t): step_size·m = η·m̂
    shrink: float | Tensor  # 1 - η·wd
    gain: float | Tensor  # numerator of λ: η·c·β_t, or η·c with a constant weight; 0.0 = no pull
    uniform_gain: bool  # λ is `gain` itself, for all coordinates
    clip: bool  # gain at most 1
    weight: float | Tensor  # β_t; 0.0 = the average stays as it is at this step
    maximize: bool  # ascend instead of descend
    stochastic: bool = False  # round bfloat16 parameters stochastically
    # True: skip coordinates whose gradient is not finite. A 0-dim bool tensor: skip all if true.
    skip_nonfinite: bool | Tensor = False
    extra_weights: tuple[float | Tensor, ...] = ()  # as `weight`, of each extra average

    def without_averages(self) -> "Scalars":
        """The same step, in which no average takes anything in."""
        return self._replace(weight=0.0, extra_weights=(0.0,) * len(self.extra_weights))

    def of(self, i: int) -> "Scalars":
        """Those of the i-th tensor, where some are vectors of a number for each."""

        def one(x: Any) -> Any:
            return x[i] if isinstance(x, Tensor) and x.ndim else x

        own = Scalars._make(map(one, self))
        return own._replace(extra_weights=tuple(map(one, self.extra_weights)))


def scalars(
    step: int | Tensor,
    group: dict[str, Any],
    averages: Averages,
    expected_loss_change: float | Tensor = 0.0,
    *,
    idle: int | Tensor = 0,
) -> Scalars:
    """The scalars of step t = `step` (from 1) under a PACE parameter group's options.

    With a tensor of steps, or a learning rate on an accelerator, what depends on them comes as
    tensors, so that no device has to be waited for; it is computed in float64.

    Args:
        step: t, a whole number, or a tensor of them on the parameters' device.
        group: the options.
        averages: of the group.
        expected_loss_change: E_t of `paceline.auto`, for groups whose pull sets itself.
        idle: steps without a gradient, which averages count besides; like `step`.
    """
    lr = group["lr"]
    if isinstance(step, Tensor):
        step = step.double()
    taken_in = step + idle  # t of the averages
    done = step if isinstance(step, Tensor) else max(step, 1)  # 0 before a first gradient
    if isinstance(lr, Tensor):
        lr = float(lr) if lr.device.type in ("cpu", "mps") else lr.double().reshape(())
    beta1, beta2 = map(float, group["betas"])
    own, strength = averages.own, group["pullback"]
    if strength == AUTO:
        gain = auto.gain(expected_loss_change)
    elif group["gain"] == "scalar":
        gain = strength
    else:
        gain = lr * strength * own.falloff(taken_in) if strength else 0.0
    return Scalars(
        beta1=beta1,
        beta2=beta2,
        eps=group["eps"] or TINY,
        root_bias2=(1.0 - beta2**done) ** 0.5,
        step_size=lr / (1.0 - beta1**done),
        shrink=1.0 - lr * group["weight_decay"],
        gain=gain,
        uniform_gain=group["gain"] == "scalar" or strength == AUTO,
        clip=group["clip"],
        weight=averages.weight(AVERAGE, taken_in),
        maximize=group["maximize"],
        stochastic=group["stochastic_round"],
        # One that is misspelt between steps guards, too.
        skip_nonfinite=group["nonfinite"] not in ("ignore", "raise", "skip"),
        extra_weights=tuple(averages.weight(key, taken_in) for key in averages.extra),
    )


class Slot(NamedTuple):
    """One tensor with its state, or a piece of one, as a step takes it."""

    param: Tensor  # θ_t, becomes θ_{t+1}; any shape
    grad: Tensor | None  # g; not changed; None in a plan that is kept between steps
    exp_avg: Tensor  # m, updated
    exp_avg_sq: Tensor  # v, updated
    average: Tensor  # ema, or the offset d where narrower than the parameter; updated
    key: int | Tensor | None = None  # seed of stochastic rounding (`rounding.keys`)
    start: int = 0  # place of the first element within its parameter, before shards and slices
    extra: tuple[Tensor, ...] = ()  # extra averages, in float32 or wider; updated

    def at_step(self, grads: list[Tensor], keys: Any | None, i: int) -> "Slot":
        """Itself as the i-th tensor of a step with these gradients and keys."""
        return self._replace(grad=grads[i], key=keys[i] if keys else None)

    def pieces(self, size: int) -> Iterator["Slot"]:
        """Itself, or if it has more than `size` elements, slices of about that size."""
        for start, tensors in _slices([*self[:5], *self.extra], size):
            own, extra = tensors[:5], tuple(tensors[5:])
            yield Slot(*own, self.key, self.start + start, extra)  # type: ignore[arg-type, call-arg]


class PullScalars(NamedTuple):
    """All that a pull after another optimizer's step needs to know besides its tensors."""

    gain: float | Tensor  # numerator of λ, or λ where there is no second moment; 0.0 = no pull
    root_bias2: float  # as of `Scalars`
    eps: float  # ε
    clip: bool  # gain at most 1
    weight: float | Tensor  # β_t; 0.0 = the average stays as it is at this step
    extra_weights: tuple[float | Tensor, ...] = ()  # as `weight`, of each extra average

    def without_averages(self) -> "PullScalars":
        """The same pull, in which no average takes anything in."""
        return self._replace(weight=0.0, extra_weights=(0.0,) * len(self.extra_weights))


class MovedSlot(NamedTuple):
    """One tensor that another optimizer has moved, with what pulls it and its average."""

    param: Tensor  # θ', becomes θ_{t+1}; any shape
    average: Tensor  # in float32 or wider; updated
    before: Tensor | None = None  # θ_t, where there is a pull
    second_moment: Tensor | None = None  # v; None: one gain for all coordinates
    extra: tuple[Tensor, ...] = ()  # extra averages, in float32 or wider; updated

    def pieces(self, size: int) -> Iterator["MovedSlot"]:
        """As those of a `Slot`."""
        for _, tensors in _slices([*self[:4], *self.extra], size):
            yield MovedSlot(*tensors[:4], tuple(tensors[4:]))  # type: ignore[arg-type, call-arg]


def _slices(
    tensors: Sequence[Tensor | None], size: int
) -> Iterator[tuple[int, Sequence[Tensor | None]]]:
    """The tensors of one shape, or slices of some `size` elements with where they start."""
    first = tensors[0]
    assert first is not None
    total = first.numel()
    if total <= size or type(first) not in PLAIN:
        yield 0, tensors
        return
    if all(x is None or x.is_contiguous() for x in tensors):
        tensors = [None if x is None else x.view(-1) for x in tensors]
        first = first.view(-1)
    length = len(first)
    rows = max(1, size * length // total)
    for row in range(0, length, rows):
        part = [None if x is None else x[row : row + rows] for x in tensors]
        yield row * (total // length), part


AnySlot = TypeVar("AnySlot", Slot, MovedSlot)


def batches(slots: Iterable[AnySlot], size: int) -> Iterator[list[AnySlot]]:
    """The same tensors in batches of at most about `size` elements, large ones in slices."""
    batch: list[AnySlot] = []
    elements = 0
    for slot in slots:
        for piece in slot.pieces(size):
            if batch and elements + piece.param.numel() > size:
                yield batch
                batch, elements = [], 0
            batch.append(piece)
            elements += piece.param.numel()
    if batch:
        yield batch


def in_batches(slots: list[AnySlot]) -> Iterator[list[AnySlot]]:
    """Batches that bound a step's scratch."""
    on_cpu = slots[0].param.device.type == "cpu"
    return batches(slots, TOGETHER_ON_CPU if on_cpu else TOGETHER)


# ---- the rule -----------------------------------------------------------------------------------


def step_(slots: list[Slot], s: Scalars, *, measure: bool = False) -> dict[str, Tensor]:
    """One PACE step on tensors of one device, one dtype and one dtype of state, in place.

    Arithmetic is in float32 (float64 for float64 parameters). What is stored narrower is widened,
    stepped and rounded once: parameters to nearest, or stochastically where `s.stochastic`; state
    stochastically. The average takes in the weights as stored: what the model really held.

    With `s.skip_nonfinite` a coordinate whose gradient, or its square, is not finite stands still:
    its weight, moments and averages keep their bits.

    Args:
        slots: the tensors, with gradients.
        s: the step's scalars.
        measure: return what `measurements` documents; costs time, and scratch of some four times
            the size of these tensors.

    Returns:
        0-dim tensors: `skipped`, how many coordinates stood still, unless the host knows that none
        did; and the measurements, if asked for.
    """
    params, stored = [x.param for x in slots], [x.average for x in slots]
    offset = stored[0].itemsize < params[0].itemsize
    dtype = torch.promote_types(params[0].dtype, torch.float32)
    theta, averages = _wide(params, dtype), _wide(stored, dtype)
    m, v = _wide([x.exp_avg for x in slots], dtype), _wide([x.exp_avg_sq for x in slots], dtype)
    g = _wide([x.grad for x in slots], dtype)
    finite = _finite(g, s.skip_nonfinite)
    untouched = _copies_of_skipped(slots, finite)
    g = _gradients(g, finite, s.maximize)
    noise = [rounding.noise(x.param, x.key, x.start) for x in slots if x.key is not None]
    before = [x.clone() for x in theta] if measure or offset else []

    torch._foreach_lerp_(m, g, 1.0 - s.beta1)  # m_t
    torch._foreach_mul_(v, s.beta2)
    torch._foreach_addcmul_(v, g, g, 1.0 - s.beta2)  # v_t
    denom = list(torch._foreach_sqrt(v))
    torch._foreach_div_(denom, s.root_bias2)
    torch._foreach_add_(denom, s.eps)  # sqrt(v̂_t) + ε
    pull = _from_live(averages, theta, offset) if _may_act(s.gain) else []  # ema_{t-1} - θ_t
    torch._foreach_mul_(theta, s.shrink)
    torch._foreach_addcdiv_(theta, torch._foreach_mul(m, s.step_size), denom, -1.0)  # AdamW
    adamw = _minus(theta, before) if measure else []
    gain = (
        _add_pull_(theta, pull, None if s.uniform_gain else denom, s.gain, s.clip) if pull else []
    )
    if offset:
        averages = _take_in_offset_(stored, averages, theta, before, s.weight, noise)  # d_t
    _store_(params, theta, noise if s.stochastic else [], rounding.PARAM)  # θ_{t+1}
    if not offset and _may_act(s.weight):
        lerp_(averages, _wide(params, dtype), s.weight)
        _store_(stored, averages, noise, rounding.AVERAGE)  # ema_t

    _store_([x.exp_avg for x in slots], m, noise, rounding.EXP_AVG)
    _store_([x.exp_avg_sq for x in slots], v, noise, rounding.EXP_AVG_SQ)
    _lerp_extra_(slots, s.extra_weights)
    for x, old, ok in untouched:
        x.copy_(torch.where(ok, x, old))
    found: dict[str, Tensor] = {}
    if finite and s.skip_nonfinite is True:
        found["skipped"] = torch.stack([(~ok).sum() for ok in finite]).sum()
    if not measure:
        return found
    after, averages = _wide(params, dtype), _wide(stored, dtype)
    distance = averages if offset else _minus(averages, after)
    return found | measurements(before, adamw, after, pull, gain, distance, s.clip)


def pull_(slots: list[MovedSlot], p: PullScalars, *, measure: bool = False) -> dict[str, Tensor]:
    """What PACE does beside AdamW's step, after another optimizer's: the pull, and the average.

        θ_{t+1} = θ' + min(1, gain / (sqrt(v̂) + ε))·(average - θ_t)
        average = (1 - weight)·average + weight·θ_{t+1}

    Args:
        slots: tensors of one device and dtype, changed in place; all with a pull or none, and all
            with a second moment or none. Without one λ is min(1, gain).
        p: the numbers.
        measure: return what `measurements` documents.

    Returns:
        The measurements, where asked for and pulled.
    """
    params, averages = [x.param for x in slots], [x.average for x in slots]
    dtype = averages[0].dtype
    before = _wide([x.before for x in slots], dtype)
    if before:
        theta = _wide(params, dtype)
        moved = _minus(theta, before) if measure else []
        pull = _minus(averages, before)
        denom = None
        if slots[0].second_moment is not None:
            denom = list(torch._foreach_sqrt(_wide([x.second_moment for x in slots], dtype)))
            torch._foreach_div_(denom, p.root_bias2)
            torch._foreach_add_(denom, p.eps)
        gains = _add_pull_(theta, pull, denom, p.gain, p.clip)
        _store_(params, theta, [], rounding.PARAM)
    after = _wide(params, dtype)
    lerp_(averages, after, p.weight)
    _lerp_extra_(slots, p.extra_weights)
    if not before or not measure:
        return {}
    return measurements(before, moved, after, pull, gains, _minus(averages, after), p.clip)


def rest_(slots: list[Slot], s: Scalars, before: tuple[Tensor, Tensor] | None = None) -> None:
    """Have averages take in weights that stood still, or that something else has moved.

        ema_t = (1 - β_t)·ema_{t-1} + β_t·θ,     d_t = (1 - β_t)·(d_{t-1} - (θ - θ_{t-1}))

    Args:
        slots: tensors of one device, one dtype and one dtype of state; averages change in place.
        s: the step's scalars.
        before: of one tensor that has an offset and was moved, θ_{t-1} and d_{t-1}.
    """
    params, stored = [x.param for x in slots], [x.average for x in slots]
    noise = [rounding.noise(x.param, x.key, x.start) for x in slots if x.key is not None]
    if isinstance(s.skip_nonfinite, Tensor):  # the step may be skipped
        weights = [torch.where(s.skip_nonfinite, 0.0, x) for x in (s.weight, *s.extra_weights)]
        s = s._replace(weight=weights[0], extra_weights=tuple(weights[1:]))
    if _may_act(s.weight) or before:
        dtype = torch.promote_types(params[0].dtype, torch.float32)
        theta, averages = _wide(params, dtype), _wide(stored, dtype)
        if stored[0].itemsize < params[0].itemsize:
            old = [x.clone() for x in stored]
            if before:
                averages = [before[1].to(dtype) - (theta[0] - before[0])]
            shrunk = list(torch._foreach_mul(averages, 1.0 - s.weight))
            _store_(stored, shrunk, noise, rounding.AVERAGE)
            for x, d, other in zip(theta, stored, old, strict=True):
                for kept in (other, torch.zeros_like(d)):  # what a swap can give back
                    d.copy_(torch.where((x + d) - d == x, d, kept))
        else:
            lerp_(averages, theta, s.weight)
            _store_(stored, averages, noise, rounding.AVERAGE)
    _lerp_extra_(slots, s.extra_weights)


def count_(counts: list[Tensor], s: Scalars) -> None:
    """Add 1 to each count, except where a device says that the step is skipped."""
    if isinstance(s.skip_nonfinite, Tensor):
        for count in counts:
            count.add_(~s.skip_nonfinite.to(count.device))
    elif counts:
        torch._foreach_add_(counts, 1.0)


# ---- its helpers --------------------------------------------------------------------------------


def _wide(tensors: Iterable[Tensor | None], dtype: torch.dtype) -> list[Tensor]:
    """The tensors in the dtype of the arithmetic; themselves where they are in it."""
    return [x.to(dtype) for x in tensors if x is not None]


def _minus(a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
    return list(torch._foreach_sub(a, b))


def _may_act(factor: float | Tensor) -> bool:
    """Whether a factor is not known to be 0."""
    return isinstance(factor, Tensor) or factor != 0


def _from_live(averages: list[Tensor], theta: list[Tensor], offset: bool) -> list[Tensor]:
    """ema_{t-1} - θ_t, in memory of its own."""
    return [d.clone() for d in averages] if offset else _minus(averages, theta)


def _add_pull_(
    theta: list[Tensor],
    pull: list[Tensor],
    denom: list[Tensor] | None,
    gain: float | Tensor,
    clip: bool,
) -> list[Tensor]:
    """θ += λ·(average - θ_t), in place, with λ = gain/denom, at most 1 if clipped.

    Args:
        theta: θ' after the optimizer's own step; updated.
        pull: average - θ_t; scaled by λ.
        denom: sqrt(v̂) + ε; becomes λ. None: λ is one number, the gain, at most 1 if clipped.
        gain: numerator of λ.
        clip: gain at most 1.

    Returns:
        λ, in the memory of `denom`.
    """
    if denom is None:
        one = torch.as_tensor(gain, dtype=theta[0].dtype, device=theta[0].device)
        one = one.clamp_max(1.0) if clip else one
        for x, d in zip(theta, pull, strict=True):
            x.add_(d.mul_(one))
        return [one.expand_as(x) for x in theta]
    torch._foreach_reciprocal_(denom)
    torch._foreach_mul_(denom, gain)
    if clip:
        torch._foreach_clamp_max_(denom, 1.0)
    torch._foreach_mul_(pull, denom)
    torch._foreach_add_(theta, pull)
    return denom


def _take_in_offset_(
    stored: list[Tensor],
    offsets: list[Tensor],
    theta: list[Tensor],
    before: list[Tensor],
    weight: float | Tensor,
    noise: list[Tensor],
) -> list[Tensor]:
    """Store d_t, and make θ_{t+1} what it is after a swap (paceline.swap), which adds d_t.

    Args:
        stored: d_{t-1} in its own dtype; becomes d_t.
        offsets: the same, wide; changed.
        theta: θ_{t+1}; rounded so that (θ + d_t) - d_t is θ.
        before: θ_t.
        weight: β_t.
        noise: of the stochastic rounding.

    Returns:
        d_t as stored, wide.
    """
    torch._foreach_sub_(offsets, _minus(theta, before))
    torch._foreach_mul_(offsets, 1.0 - weight)
    _store_(stored, offsets, noise, rounding.AVERAGE)
    offsets = _wide(stored, theta[0].dtype)
    torch._foreach_add_(theta, offsets)
    torch._foreach_sub_(theta, offsets)
    return offsets


def _store_(out: list[Tensor], values: list[Tensor], noise: list[Tensor], which: int) -> None:
    """Write values where they are kept: stochastically rounded if there is noise, or to nearest."""
    for i, (x, value) in enumerate(zip(out, values, strict=True)):
        if x is value:
            continue
        if noise:
            rounding.round_(x, value, noise[i], which)
        else:
            x.copy_(value)


def _lerp_extra_(slots: Sequence[Slot | MovedSlot], weights: Sequence[float | Tensor]) -> None:
    """Have the extra averages take in the weights as stored."""
    for i, weight in enumerate(weights):
        if _may_act(weight):
            averages = [slot.extra[i] for slot in slots]
            lerp_(averages, [slot.param.to(averages[0].dtype) for slot in slots], weight)


def _finite(grads: list[Tensor], skip_nonfinite: bool | Tensor) -> list[Tensor]:
    """Masks of the coordinates to step; none where the host knows that all are."""
    if isinstance(skip_nonfinite, Tensor):
        return [~skip_nonfinite for _ in grads]
    on_host = grads[0].device.type == "cpu"
    if not skip_nonfinite or (on_host and squared_norm(grads).isfinite()):
        return []
    limit = math.sqrt(torch.finfo(grads[0].dtype).max)
    return [g.abs() <= limit for g in grads]


def _copies_of_skipped(
    slots: list[Slot], finite: list[Tensor]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """All that a step changes, copies of it, and masks of what is to be put back where false."""
    return [
        (x, x.clone(), ok)
        for slot, ok in zip(slots, finite, strict=False)
        for x in (slot.param, slot.exp_avg, slot.exp_avg_sq, slot.average, *slot.extra)
    ]


def _gradients(grads: list[Tensor], finite: list[Tensor], maximize: bool) -> list[Tensor]:
    """The gradients to descend along, 0 at skipped coordinates; the given tensors do not change."""
    if finite:
        grads = [torch.where(ok, g, 0.0) for ok, g in zip(finite, grads, strict=True)]
    return list(torch._foreach_neg(grads)) if maximize else grads


def squared_norm(grads: list[Tensor]) -> Tensor:
    """The largest of their squared 2-norms, 0-dim: finite only if all elements' squares are."""
    dtype = torch.promote_types(grads[0].dtype, torch.float32)
    if grads[0].device.type == "cpu":  # where torch's norm takes three times as long
        flat = [g.to(dtype).reshape(-1) for g in grads]
        return torch.stack([torch.dot(g, g) for g in flat]).max()
    # Squared, for the norm of one element is taken without its square.
    return torch.stack(torch._foreach_norm(grads, 2, dtype=dtype)).max().square()


def measurements(
    before: list[Tensor],
    adamw: list[Tensor],
    after: list[Tensor],
    pull: list[Tensor],
    gain: list[Tensor],
    distance: list[Tensor],
    clip: bool,
) -> dict[str, Tensor]:
    """What one step did, as 0-dim tensors that add up over batches (`gain_min` and `_max` aside).

    `count` coordinates; `gain_sum`, `gain_min`, `gain_max`, `clipped` (coordinates whose gain the
    clip holds at 1); the squared norms `adamw_sq` of the AdamW step, `pull_sq` of the pull,
    `update_sq` of the weights' change as stored, and `distance_sq` from the average afterwards.
    Nothing of shards that are all empty, which have no smallest gain.
    """
    if not any(x.numel() for x in after):
        return {}
    zero = torch.zeros((), dtype=after[0].dtype, device=after[0].device)

    def total(tensors: list[Tensor]) -> Tensor:
        return torch.stack([zero, *(x.sum() for x in tensors)]).sum()

    def squares(tensors: list[Tensor]) -> Tensor:
        return torch.stack([zero, *(x.square().sum() for x in tensors)]).sum()

    some = [x for x in gain if x.numel()]
    return {
        "count": zero + sum(x.numel() for x in after),
        "gain_sum": total(gain),
        "gain_min": torch.stack([x.min() for x in some]).min() if some else zero,
        "gain_max": torch.stack([x.max() for x in some]).max() if some else zero,
        "clipped": total([x >= 1.0 for x in gain]) if clip else zero,
        "adamw_sq": squares(adamw),
        "pull_sq": squares(pull),
        "update_sq": squares(_minus(after, before)),
        "distance_sq": squares(distance),
    }
