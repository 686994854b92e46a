"""The mathematics of PACE: one step of the rule, as pure functions of tensors.

With gradient g at the live weights θ_t (steps t = 1, 2, ...), scheduled learning rate η, Adam's
bias-corrected moments m̂ and v̂, pullback strength c and running average `ema` (ema_0 = θ_1):

    β_t     = max((1 + γ·max(0, t - ρ))^-κ, 1e-4)            averaging weight (paceline.averaging)
    λ_t     = min(1, η·c·β_t / (sqrt(v̂_t) + ε))               gain, one for each coordinate
    θ_{t+1} = (1 - η·wd)·θ_t - η·m̂_t / (sqrt(v̂_t) + ε)        AdamW
              + λ_t·(ema_{t-1} - θ_t)                         and the pull toward the average
    ema_t   = (1 - β_t)·ema_{t-1} + β_t·θ_{t+1}               at every `ema_every`-th step

With a constant averaging weight the gain has no β_t in it. A pull that sets itself (`auto_gain`)
has one gain for all coordinates. Further averages, which are there to be returned (`returns`), take
in θ_{t+1} beside that one, and pull nothing. `step_` works on lists, so
that one call serves one tensor or a whole model, and compiles. The one other writing of the rule is
the CPU's one-pass kernel, kernel.cpp, which is held to the same reference.

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

from . import rounding
from .averaging import lerp_
from .options import AUTO, averaging_of, returns_of

# Elements stepped together, which bounds the scratch; a CPU's share of them stays in its cache.
TOGETHER = 2**24
TOGETHER_ON_CPU = 2**18
PLAIN = (Tensor, torch.nn.Parameter)  # not a DTensor or another subclass
# Of tensors of so many elements only every so-many-th is looked at for the stake: a prime, so that
# no row or column is left out.
SAMPLED, STRIDE = 2**16, 251
# Nats at stake: up to the first nothing pulls, from the second on the pull goes all the way.
UNPULLED, SATURATED = 0.5, 2.5


class Scalars(NamedTuple):
    """All that one step needs to know besides its tensors."""

    beta1: float  # decay of the first moment
    beta2: float  # decay of the second moment
    eps: float  # ε
    root_bias2: float | Tensor  # sqrt(1 - beta2^t): sqrt(v) / root_bias2 = sqrt(v̂)
    step_size: float | Tensor  # η / (1 - beta1^t): step_size·m = η·m̂
    shrink: float | Tensor  # 1 - η·wd
    gain: float | Tensor  # numerator of λ: η·c·β_t, or η·c with a constant weight; 0.0 = no pull
    scalar: bool  # λ is `gain` itself, for all coordinates
    clip: bool  # gain at most 1
    weight: float | Tensor  # β_t; 0.0 = the average stays as it is at this step
    ascend: bool  # maximize instead of minimize
    stochastic: bool = False  # round bfloat16 parameters stochastically
    # True: hold each coordinate whose gradient is not finite; 0-dim bool tensor: hold all if true.
    hold: bool | Tensor = False
    weights: tuple[float | Tensor, ...] = ()  # as `weight`, of each further average


def scalars(step: int | Tensor, group: dict[str, Any], stake: float | Tensor = 0.0) -> Scalars:
    """The scalars of step t = `step` (from 1) under a PACE parameter group's options.

    `stake` is E_t of `auto_gain`, where that asks for it.

    With a tensor of steps, or a learning rate on an accelerator, what depends on them comes as
    tensors, so that no device has to be waited for; it is computed in float64.
    """
    lr = group["lr"]
    if isinstance(step, Tensor):
        step = step.double()
    if isinstance(lr, Tensor):
        lr = float(lr) if lr.device.type in ("cpu", "mps") else lr.double()
    beta1, beta2 = group["betas"]
    rule = averaging_of(group)
    return Scalars(
        beta1=beta1,
        beta2=beta2,
        eps=group["eps"],
        root_bias2=(1.0 - beta2**step) ** 0.5,
        step_size=lr / (1.0 - beta1**step),
        shrink=1.0 - lr * group["weight_decay"],
        gain=_gain(group, lr, rule.falloff(step), stake) if group["pullback"] else 0.0,
        scalar=group["gain"] == "scalar" or group["pullback"] == AUTO,
        clip=group["clip"],
        weight=rule.weight(step),
        ascend=group["maximize"],
        stochastic=group["stochastic_round"],
        hold=group["nonfinite"] not in ("ignore", "raise", "skip"),  # a misspelt one guards, too
        weights=tuple(rule.weight(step) for rule in returns_of(group).values() if not rule.keeps),
    )


def _gain(
    group: dict[str, Any], lr: float | Tensor, falloff: float | Tensor, stake: float | Tensor
) -> float | Tensor:
    if group["pullback"] == AUTO:
        return auto_gain(stake)
    strength: float = group["pullback"]
    return strength if group["gain"] == "scalar" else lr * strength * falloff


def auto_gain(stake: float | Tensor) -> float | Tensor:
    """λ_t = min(1, max(0, (E_t - 1/2)/2)), the gain of a pull that sets itself.

        E_t = Σ_groups η_t·Σ_i sqrt(v̂_{t-1,i})

    is what a step of AdamW puts at stake, in the unit of the loss: what that would change by, to
    first order, were every coordinate's gradient its root mean square, with the sign of its step.
    In a quadratic whose gradients are mostly noise the live weights settle E/4 above the minimum,
    to first order in the rate, whatever the curvature: where it is α the variance is η·sqrt(v)/2α.
    So half a nat at stake is an eighth that steps cost.
    """
    share = (stake - UNPULLED) / (SATURATED - UNPULLED)
    if isinstance(share, Tensor):  # a NaN, of gradients that nothing guards, is 0
        return share.nan_to_num(0.0).clamp(0.0, 1.0)
    return min(1.0, max(0.0, share))


def root_sums(
    second_moments: Sequence[Tensor], starts: Sequence[int], sizes: Sequence[int]
) -> list[Tensor]:
    """Σ_i sqrt(v_i) of each tensor, 0-dim float32 or wider; of large ones an estimate.

    Args:
        second_moments: v, or this rank's part of it, of any shapes, on one device.
        starts: place of the first element of each within its parameter: of shards the same elements
            are looked at as of the whole.
        sizes: elements of each whole parameter.
    """
    seen, factors = [], []
    for v, start, size in zip(second_moments, starts, sizes, strict=True):
        few = size < SAMPLED
        seen.append(v if few else v.reshape(-1)[-start % STRIDE :: STRIDE])
        factors.append(1.0 if few else float(STRIDE))
    roots = torch._foreach_sqrt([x.to(torch.promote_types(x.dtype, torch.float32)) for x in seen])
    return list(torch._foreach_mul(torch._foreach_norm(roots, 1), factors))


class Slot(NamedTuple):
    """One tensor with its state, or a piece of one, as a step takes it."""

    param: Tensor  # θ_t, becomes θ_{t+1}; any shape
    grad: Tensor  # g; not changed
    exp_avg: Tensor  # m, updated
    exp_avg_sq: Tensor  # v, updated
    average: Tensor | None  # ema, or the offset d where narrower than the parameter; updated
    key: int | Tensor | None = None  # seed of stochastic rounding (`rounding.keys`)
    start: int = 0  # place of the first element within its parameter, before shards and slices
    returned: tuple[Tensor, ...] = ()  # further averages, in float32 or wider; updated

    def pieces(self, size: int) -> Iterator["Slot"]:
        """Itself, or if it has more than `size` elements, slices of about that size."""
        for start, tensors in _slices([*self[:5], *self.returned], size):
            own, returned = tensors[:5], tuple(tensors[5:])
            yield Slot(*own, self.key, self.start + start, returned)  # type: ignore[arg-type, call-arg]


class Follower(NamedTuple):
    """One tensor that another optimizer has moved, with what pulls it and its average."""

    param: Tensor  # θ', becomes θ_{t+1}; any shape
    average: Tensor  # in float32 or wider; updated
    before: Tensor | None = None  # θ_t, where there is a pull
    second_moment: Tensor | None = None  # v; None: one gain for all coordinates
    returned: tuple[Tensor, ...] = ()  # further averages, in float32 or wider; updated

    def pieces(self, size: int) -> Iterator["Follower"]:
        """As those of a `Slot`."""
        for _, tensors in _slices([*self[:4], *self.returned], size):
            yield Follower(*tensors[:4], tuple(tensors[4:]))  # type: ignore[arg-type, call-arg]


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


Piece = TypeVar("Piece", Slot, Follower)


def batches(slots: Iterable[Piece], size: int) -> Iterator[list[Piece]]:
    """The same tensors in batches of at most about `size` elements, large ones in slices."""
    batch: list[Piece] = []
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


def in_batches(slots: list[Piece]) -> Iterator[list[Piece]]:
    """Batches that bound a step's scratch."""
    on_cpu = slots[0].param.device.type == "cpu"
    return batches(slots, TOGETHER_ON_CPU if on_cpu else TOGETHER)


def step_(slots: list[Slot], s: Scalars, *, measure: bool = False) -> dict[str, Tensor]:
    """One PACE step on tensors of one device, one dtype and one dtype of state, in place.

    Arithmetic is in float32 (float64 for float64 parameters). What is stored narrower is widened,
    stepped and rounded once: parameters to nearest, or stochastically where `s.stochastic`; state
    stochastically. The average is of the weights as stored: of what the model really held.

    With `s.hold` a coordinate whose gradient, or its square, is not finite stands still: its
    weight, moments and average keep their bits.

    Args:
        slots: the tensors; all with an average or none, then with a `gain` of 0.
        s: the step's scalars.
        measure: return what `measurements` documents; costs time, and scratch of some four times
            the size of these tensors.

    Returns:
        0-dim tensors: `held`, how many coordinates stood still, unless the host knows that none
        did; and the measurements, if asked for.
    """
    params = [slot.param for slot in slots]
    kept = [slot.average for slot in slots if slot.average is not None]
    offset = bool(kept) and kept[0].itemsize < params[0].itemsize
    dtype = torch.promote_types(params[0].dtype, torch.float32)

    def wide(tensors: list[Tensor]) -> list[Tensor]:
        return [x.to(dtype) for x in tensors]  # x itself if it is wide already

    theta, grads = wide(params), wide([slot.grad for slot in slots])
    free = _free(grads, s.hold)
    held: list[tuple[Tensor, Tensor, Tensor]] = []
    if free:
        grads = [torch.where(ok, g, 0.0) for ok, g in zip(free, grads, strict=True)]
        for slot, ok in zip(slots, free, strict=True):
            tensors = (slot.param, slot.exp_avg, slot.exp_avg_sq, slot.average, *slot.returned)
            held += [(x, x.clone(), ok) for x in tensors if x is not None]
    m, v = wide([slot.exp_avg for slot in slots]), wide([slot.exp_avg_sq for slot in slots])
    averages = wide(kept)
    pulls = bool(averages) and (isinstance(s.gain, Tensor) or s.gain != 0)
    moves = bool(averages) and (isinstance(s.weight, Tensor) or s.weight != 0)
    if s.ascend:
        grads = list(torch._foreach_neg(grads))
    before = [x.clone() for x in theta] if measure or offset else []

    torch._foreach_lerp_(m, grads, 1.0 - s.beta1)
    torch._foreach_mul_(v, s.beta2)
    torch._foreach_addcmul_(v, grads, grads, 1.0 - s.beta2)
    denom = list(torch._foreach_sqrt(v))
    torch._foreach_div_(denom, s.root_bias2)
    torch._foreach_add_(denom, s.eps)

    pull: list[Tensor] = []
    if pulls:  # starts at θ_t, before AdamW moves it
        pull = [d.clone() for d in averages] if offset else _minus(averages, theta)

    torch._foreach_mul_(theta, s.shrink)
    torch._foreach_addcdiv_(theta, torch._foreach_mul(m, s.step_size), denom, -1.0)
    adamw = _minus(theta, before) if measure else []

    gain = pull_(theta, pull, None if s.scalar else denom, s.gain, s.clip) if pulls else []

    bits = [rounding.noise(x.param, x.key, x.start) for x in slots if x.key is not None]

    def store(out: list[Tensor], values: list[Tensor], which: int, stochastic: bool = True) -> None:
        for i, (x, value) in enumerate(zip(out, values, strict=True)):
            if x is value:
                continue
            if stochastic:
                rounding.round_(x, value, bits[i], which)
            else:
                x.copy_(value)

    store([slot.exp_avg for slot in slots], m, rounding.EXP_AVG)
    store([slot.exp_avg_sq for slot in slots], v, rounding.EXP_AVG_SQ)
    if offset:
        torch._foreach_sub_(averages, _minus(theta, before))
        torch._foreach_mul_(averages, 1.0 - s.weight)
        store(kept, averages, rounding.AVERAGE)
        # θ as it comes back from an exchange (paceline.swap), so that exchanges change nothing.
        averages = wide(kept)
        torch._foreach_add_(theta, averages)
        torch._foreach_sub_(theta, averages)
    store(params, theta, rounding.PARAM, s.stochastic)
    if moves and not offset:
        lerp_(averages, wide(params), s.weight)
        store(kept, averages, rounding.AVERAGE)
    take_in_(slots, s.weights)
    for x, old, ok in held:
        x.copy_(torch.where(ok, x, old))
    found: dict[str, Tensor] = {}
    if free and s.hold is True:
        found["held"] = torch.stack([(~ok).sum() for ok in free]).sum()
    if not measure:
        return found
    after, averages = wide(params), wide(kept)
    offsets = averages if offset or not averages else _minus(averages, after)
    return found | measurements(before, adamw, after, pull, gain, offsets, s.clip)


def take_in_(slots: Sequence[Slot | Follower], weights: Sequence[float | Tensor]) -> None:
    """Have the further averages take in the weights as stored."""
    for i, weight in enumerate(weights):
        if isinstance(weight, Tensor) or weight:
            averages = [slot.returned[i] for slot in slots]
            lerp_(averages, [slot.param.to(averages[0].dtype) for slot in slots], weight)


def pull_(
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
        clip: as `Scalars` has it.

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


def follow_(
    slots: list[Follower],
    *,
    gain: float | Tensor,
    root_bias2: float,
    eps: float,
    clip: bool,
    weight: float | Tensor,
    weights: Sequence[float | Tensor] = (),
    measure: bool = False,
) -> dict[str, Tensor]:
    """What PACE does beside AdamW's step, after another optimizer's: the pull, and the average.

        θ_{t+1} = θ' + min(1, gain / (sqrt(v̂) + ε))·(average - θ_t)
        average = (1 - weight)·average + weight·θ_{t+1}

    Args:
        slots: tensors of one device and dtype, changed in place; all with a pull or none, and all
            with a second moment or none. Without one λ is min(1, gain).
        gain: numerator of λ.
        root_bias2: sqrt(1 - beta2^t).
        eps: ε.
        clip: gain at most 1.
        weight: of the new weights in the average.
        weights: the same of each further average.
        measure: return what `measurements` documents.

    Returns:
        The measurements, where asked for and pulled.
    """
    params, averages = [slot.param for slot in slots], [slot.average for slot in slots]
    dtype = averages[0].dtype

    def wide(tensors: Iterable[Tensor | None]) -> list[Tensor]:
        return [x.to(dtype) for x in tensors if x is not None]

    before = wide(slot.before for slot in slots)
    if before:
        theta = wide(params)
        moved = _minus(theta, before) if measure else []
        pull = _minus(averages, before)
        denom = None
        if slots[0].second_moment is not None:
            denom = list(torch._foreach_sqrt(wide(slot.second_moment for slot in slots)))
            torch._foreach_div_(denom, root_bias2)
            torch._foreach_add_(denom, eps)
        gains = pull_(theta, pull, denom, gain, clip)
        for param, x in zip(params, theta, strict=True):
            if param is not x:
                param.copy_(x)
    after = wide(params)
    lerp_(averages, after, weight)
    take_in_(slots, weights)
    if not before or not measure:
        return {}
    return measurements(before, moved, after, pull, gains, _minus(averages, after), clip)


def squared_norm(grads: list[Tensor]) -> Tensor:
    """The largest of their squared 2-norms, 0-dim: finite only if all elements' squares are."""
    dtype = torch.promote_types(grads[0].dtype, torch.float32)
    if grads[0].device.type == "cpu":  # where torch's norm takes three times as long
        flat = [g.to(dtype).reshape(-1) for g in grads]
        return torch.stack([torch.dot(g, g) for g in flat]).max()
    # Squared, for the norm of one element is taken without its square.
    return torch.stack(torch._foreach_norm(grads, 2, dtype=dtype)).max().square()


def _free(grads: list[Tensor], hold: bool | Tensor) -> list[Tensor]:
    """Masks of the coordinates to step; none where the host knows that all are."""
    if isinstance(hold, Tensor):
        return [~hold for _ in grads]
    on_host = grads[0].device.type == "cpu" and not torch.compiler.is_compiling()
    if not hold or (on_host and squared_norm(grads).isfinite()):
        return []
    limit = math.sqrt(torch.finfo(grads[0].dtype).max)
    return [g.abs() <= limit for g in grads]


def _minus(a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
    return list(torch._foreach_sub(a, b))


def measurements(
    before: list[Tensor],
    adamw: list[Tensor],
    after: list[Tensor],
    pull: list[Tensor],
    gain: list[Tensor],
    offsets: list[Tensor],
    clip: bool,
) -> dict[str, Tensor]:
    """What one step did, as 0-dim tensors that add up over batches (`gain_min` and `_max` aside).

    `count` coordinates; `gain_sum`, `gain_min`, `gain_max`, `clipped` (coordinates whose gain the
    clip holds at 1); the squared norms `adamw_sq` of the AdamW step, `pull_sq` of the pull,
    `update_sq` of the weights' change as stored, and `distance_sq` from the average afterwards.
    """
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
        "distance_sq": squares(offsets),
    }
