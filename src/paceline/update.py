"""The mathematics of PACE: one step of the rule, as pure functions of tensors.

With gradient g at the live weights θ_t (steps t = 1, 2, ...), scheduled learning rate η, Adam's
bias-corrected moments m̂ and v̂, pullback strength c and running average `ema` (ema_0 = θ_1):

    β_t     = max((1 + γ·max(0, t - ρ))^-κ, 1e-4)            averaging weight
    λ_t     = min(1, η·c·β_t / (sqrt(v̂_t) + ε))               gain, one for each coordinate
    θ_{t+1} = (1 - η·wd)·θ_t - η·m̂_t / (sqrt(v̂_t) + ε)        AdamW
              + λ_t·(ema_{t-1} - θ_t)                         and the pull toward the average
    ema_t   = (1 - β_t)·ema_{t-1} + β_t·θ_{t+1}               at every `ema_every`-th step

With a constant averaging weight the gain has no β_t in it. Every path of every optimizer here is
made from `step_`; it works on lists, so that one call serves one tensor or a whole model.

Source: Au & Block, Training for the Model You Return, arXiv:2606.25086 (2026).
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

MIN_AVERAGING_WEIGHT = 1e-4


def averaging_weight(
    step: int,
    *,
    power: float | None = None,
    rate: float = 1.0,
    start: float = 0,
    beta: float | None = None,
) -> float:
    """Weight β_t in (0, 1] that the average gives to the newest weights at a step.

        β_t = max((1 + rate·max(0, step - start))^-power, 1e-4),   or `beta` where it is given.

    Until `start` the weight is 1: the average is the live weights themselves.

    Args:
        step: t, counted from 1.
        power: κ in [0, 1]. 1 is nearly a uniform average, 0 no average at all. Not read with beta.
        rate: γ > 0, steps⁻¹.
        start: ρ >= 0, steps.
        beta: a constant weight in (0, 1] instead of the power.

    Source: Au & Block, arXiv:2606.25086.
    """
    if beta is not None:
        return beta
    assert power is not None
    return max(float((1.0 + rate * max(0.0, step - start)) ** -power), MIN_AVERAGING_WEIGHT)


class Scalars(NamedTuple):
    """All that one step needs to know besides its tensors; plain floats."""

    beta1: float  # decay of the first moment
    beta2: float  # decay of the second moment
    eps: float  # ε
    root_bias2: float  # sqrt(1 - beta2^t): sqrt(v) / root_bias2 = sqrt(v̂)
    step_size: float  # η / (1 - beta1^t): step_size·m = η·m̂
    shrink: float  # 1 - η·wd
    gain: float  # numerator of λ: η·c·β_t, or η·c with a constant averaging weight; 0 = no pull
    clip: bool  # gain at most 1
    weight: float  # β_t; 0 = the average stays as it is at this step
    ascend: bool  # maximize instead of minimize


def scalars(step: int, group: dict[str, Any]) -> Scalars:
    """The scalars of step t = `step` (from 1) under a PACE parameter group's options."""
    lr = float(group["lr"])
    beta1, beta2 = group["betas"]
    weight = averaging_weight(
        step,
        power=group["ema_power"],
        rate=group["ema_rate"],
        start=group["ema_start"],
        beta=group["ema_beta"],
    )
    falloff = weight if group["ema_beta"] is None else 1.0
    return Scalars(
        beta1=beta1,
        beta2=beta2,
        eps=group["eps"],
        root_bias2=math.sqrt(1.0 - beta2**step),
        step_size=lr / (1.0 - beta1**step),
        shrink=1.0 - lr * group["weight_decay"],
        gain=lr * group["pullback"] * falloff,
        clip=group["clip"],
        weight=weight if step % group["ema_every"] == 0 else 0.0,
        ascend=group["maximize"],
    )


def step_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    averages: list[Tensor] | None,
    s: Scalars,
    *,
    measure: bool = False,
) -> dict[str, Tensor]:
    """One PACE step on a list of tensors of one device and dtype, in place.

    Arithmetic is in the state's dtype (float32, or float64 for float64 parameters). Narrower
    parameters are widened, stepped and rounded to nearest once; the average is of the weights as
    stored, so that it averages what the model really held.

    Args:
        params: θ_t, becomes θ_{t+1}. Any shapes.
        grads: g, of the same shapes. Not changed.
        exp_avgs: m, updated.
        exp_avg_sqs: v, updated.
        averages: ema_{t-1}, becomes ema_t; None where no average is kept (then `s.gain` is 0).
        s: the step's scalars.
        measure: return what `measurements` documents; costs time, and scratch of some four times
            the state's `exp_avg` of these tensors.

    Returns:
        Measurements of the step as 0-dim tensors; empty unless asked for.
    """
    theta = [p.to(m.dtype) for p, m in zip(params, exp_avgs, strict=True)]  # p itself if equal
    grads = [g.to(m.dtype) for g, m in zip(grads, exp_avgs, strict=True)]
    if s.ascend:
        grads = list(torch._foreach_neg(grads))
    before = [x.clone() for x in theta] if measure else []
    assert averages is not None or not s.gain

    torch._foreach_lerp_(exp_avgs, grads, 1.0 - s.beta1)
    torch._foreach_mul_(exp_avg_sqs, s.beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1.0 - s.beta2)
    denom = list(torch._foreach_sqrt(exp_avg_sqs))
    torch._foreach_div_(denom, s.root_bias2)
    torch._foreach_add_(denom, s.eps)

    pull: list[Tensor] = []
    if s.gain and averages:
        pull = list(torch._foreach_sub(averages, theta))  # starts at θ_t, before AdamW moves it

    torch._foreach_mul_(theta, s.shrink)
    torch._foreach_addcdiv_(theta, exp_avgs, denom, -s.step_size)
    adamw = list(torch._foreach_sub(theta, before)) if measure else []

    gain: list[Tensor] = []
    if pull:
        torch._foreach_reciprocal_(denom)
        torch._foreach_mul_(denom, s.gain)
        gain = denom
        if s.clip:
            torch._foreach_clamp_max_(gain, 1.0)
        torch._foreach_mul_(pull, gain)
        torch._foreach_add_(theta, pull)

    for p, x in zip(params, theta, strict=True):
        if x is not p:
            p.copy_(x)
            x.copy_(p)
    if s.weight and averages:
        torch._foreach_lerp_(averages, theta, s.weight)
    if not measure:
        return {}
    return measurements(before, adamw, theta, pull, gain, averages, s.clip)


def measurements(
    before: list[Tensor],
    adamw: list[Tensor],
    after: list[Tensor],
    pull: list[Tensor],
    gain: list[Tensor],
    averages: list[Tensor] | None,
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

    def squares(tensors: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
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
        "update_sq": squares(torch._foreach_sub(after, before)),
        "distance_sq": squares(torch._foreach_sub(after, averages)) if averages else zero,
    }
