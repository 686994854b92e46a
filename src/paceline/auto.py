"""The pull that sets itself, `PACE(pullback="auto")`: its gain, and what it measures.

One gain for all coordinates of the groups that ask for it, from what a step can change the loss by:

    E_t = Σ_groups η_t·Σ_i sqrt(v̂_{t-1,i})
    λ_t = min(1, max(0, (E_t - 1/2)/2))

E_t is in the unit of the loss, made for cross-entropy in nats: the change that a step of AdamW
would make, to first order, were every coordinate's gradient its root mean square with the sign of
its step. In a quadratic whose gradients are mostly noise the live weights settle E/4 above the
minimum, to first order in the rate, whatever the curvature: where it is α the variance is
η·sqrt(v)/2α. So E = 1/2 means that steps cost an eighth of a nat; below it nothing pulls.

Ours, not the paper's; docs/averages.md has the trial that its constants come from.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import shards
from .defaults import AUTO

# Expected loss change up to which nothing pulls, and from which the gain is 1.
UNPULLED, SATURATED = 0.5, 2.5
# Of larger tensors every STRIDE-th element counts: a prime, so that no row or column is missed.
LARGE, STRIDE = 2**16, 251

EXPERIMENTAL = (
    'pullback="auto" is experimental: it pulls where a step can change the loss by more than half '
    "a nat of cross-entropy. That was set on models of 0.1M parameters, with gradients clipped to "
    'norm 1. gain="scalar" with pullback=1 has no unit, and wants about four times AdamW\'s rate'
)


def gain(expected_loss_change: float | Tensor) -> float | Tensor:
    """λ_t in [0, 1] from E_t."""
    share = (expected_loss_change - UNPULLED) / (SATURATED - UNPULLED)
    if isinstance(share, Tensor):  # a NaN, of gradients that nothing guards, is 0
        return share.nan_to_num(0.0).clamp(0.0, 1.0)
    return min(1.0, max(0.0, share))


def expected_loss_change(groups: list[dict[str, Any]], states: Any) -> float | Tensor:
    """E_t of the step to come, over the groups whose pull sets itself; 0 where there are none.

    Ranks that hold parts of one DTensor must call this together.

    Args:
        groups: PACE's parameter groups.
        states: the optimizer's `state`.

    Returns:
        A float on the CPU; on accelerators a 0-dim tensor, and nothing is read.
    """
    alike: dict[Any, list[tuple[Tensor, Any]]] = defaultdict(list)
    for group in groups:
        for p in group["params"] if group["pullback"] == AUTO else ():
            if p.grad is None or not states.get(p):
                continue
            step, lr = states[p]["step"], group["lr"]
            on_device = group["capturable"] or step.device.type != "cpu"
            count = step.double().clamp_min(1.0) if on_device else max(1.0, step.item())
            if isinstance(lr, Tensor):
                lr = float(lr) if lr.device.type == "cpu" else lr.reshape(())
            rate = lr / (1.0 - float(group["betas"][1]) ** count) ** 0.5
            # Tensors go together whose parts are with the same ranks, with rates of one kind.
            alike[p.device, shards.holders(p), type(rate)].append((p, rate))
    parts = []
    for members in alike.values():
        params, rates = zip(*members, strict=True)
        sums = root_sums(
            [shards.local(states[p]["exp_avg_sq"]) for p in params],
            [shards.first_element(p) for p in params],
            [p.numel() for p in params],
        )
        part = torch.stack(torch._foreach_mul(sums, rates)).sum()
        parts.append(shards.total(part, params[0]))
    if not parts:
        return 0.0
    total = torch.stack([part.to(parts[0].device) for part in parts]).sum()
    return total.item() if total.device.type == "cpu" else total


def root_sums(
    second_moments: Sequence[Tensor], starts: Sequence[int], sizes: Sequence[int]
) -> list[Tensor]:
    """Σ_i sqrt(v_i) of each tensor, 0-dim float32 or wider; of large ones an estimate.

    Args:
        second_moments: v, or this rank's part of it, of any shapes, on one device.
        starts: place of the first element of each within its parameter, so that shards look at the
            same elements as the whole.
        sizes: elements of each whole parameter.
    """
    seen, factors = [], []
    for v, start, size in zip(second_moments, starts, sizes, strict=True):
        whole = size < LARGE
        seen.append(v if whole else v.reshape(-1)[-start % STRIDE :: STRIDE])
        factors.append(1.0 if whole else float(STRIDE))
    roots = torch._foreach_sqrt([x.to(torch.promote_types(x.dtype, torch.float32)) for x in seen])
    return list(torch._foreach_mul(torch._foreach_norm(roots, 1), factors))
