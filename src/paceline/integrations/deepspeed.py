"""DeepSpeed engines whose model can hold the average, and exports of it at every ZeRO stage."""

from typing import Any

import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor

from .. import shards
from ..base import AveragedOptimizer
from ..batchnorm import warn_of_statistics
from ..hosts import unwrapped
from ..state import AVERAGE, OFFSET, RETURN, averages_of


def attach(engine: Any) -> None:
    """Have the average reach an engine's model at ZeRO stages 1 and 2.

        engine, *_ = deepspeed.initialize(model=model, optimizer=PACE(...), config=config)
        attach(engine)
        with engine.optimizer.optimizer.averaged():  # opt.averaged(), of the PACE that you gave
            evaluate(engine)

    DeepSpeed steps flat float32 copies, and copies them into the model's weights after each step.
    From now on `eval()`, `train()` and `averaged()` do so, too: one all-gather of the weights each,
    in which all ranks must take part.

    A checkpoint that `engine.save_checkpoint` writes while the average is in has it as the model,
    and the live weights in the optimizer's files. After `engine.load_checkpoint` of such a one call
    `opt.train()`, which brings the live weights back bit for bit.

    At stage 3 the model cannot hold the average: `averaged_state_dict` exports it.

    Raises:
        ValueError: the optimizer is none of paceline's, or the engine has another optimizer around
            it than that of ZeRO stage 1 or 2.
    """
    optimizer, zero = unwrapped(engine.optimizer), engine.optimizer
    if not isinstance(optimizer, AveragedOptimizer):
        raise ValueError(f"the engine must step PACE or Pullback, got {type(optimizer).__name__}")
    if not callable(getattr(zero, "update_lp_params", None)) or not _copies(optimizer):
        raise ValueError(
            "attach() is for ZeRO stages 1 and 2 without offloading, got stage "
            f"{engine.zero_optimization_stage()} and {type(zero).__name__}"
        )
    warn_of_statistics(engine.module, stacklevel=2)
    optimizer._reach = zero.update_lp_params


def _copies(optimizer: AveragedOptimizer) -> bool:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return bool(params) and all(map(shards.is_flat_copy, params))


@torch.no_grad()
def averaged_state_dict(engine: Any, name: str | None = None) -> dict[str, Tensor]:
    """The returned model's weights, whole and in float32, at ZeRO stages 1, 2 and 3.

    All ranks must call this. Each weight is gathered on all of them, one at a time, and kept in the
    CPU memory of rank 0; the others get an empty dict. Weights that do not train, and buffers, are
    as they are in the model; a tied weight is there under its first name.

    Args:
        engine: which has stepped.
        name: of the average, one of `opt.returns`. Default: the first, the model to return.

    Raises:
        ValueError: no average has this name, or groups return different ones.
        RuntimeError: the average is in the model now, or there is none yet.
    """
    optimizer = unwrapped(engine.optimizer)
    if not isinstance(optimizer, AveragedOptimizer):
        raise ValueError(f"the engine must step PACE or Pullback, got {type(optimizer).__name__}")
    if optimizer.swapped:
        raise RuntimeError(
            "averaged_state_dict() needs the live weights in the model; call train()"
        )
    if name is not None and name not in optimizer.returns:
        raise ValueError(f"name must be one of {', '.join(optimizer.returns)}, got {name!r}")
    keys = {
        averages_of(group).returned if name is None else RETURN + name
        for group in optimizer.param_groups
    }
    if len(keys) > 1:
        raise ValueError(f"groups must return one average, got {', '.join(sorted(keys))}")
    kept = set.intersection(*map(set, optimizer.state.values())) if optimizer.state else set()
    there = [key for key in (*keys, AVERAGE, OFFSET) if key in kept]
    if not there:
        raise RuntimeError(
            "averaged_state_dict() needs averages; call it after the engine's first step"
        )

    def average(p: Tensor) -> Tensor:
        whole: Tensor = safe_get_full_optimizer_state(p, there[0])
        return whole + safe_get_full_fp32_param(p) if there[0] == OFFSET else whole

    found: dict[str, Tensor] = {}
    for key, p in engine.module.named_parameters():
        if (whole := average(p) if p.requires_grad else safe_get_full_fp32_param(p)) is None:
            whole = p  # frozen, and as it is in the model
        if shards.rank() == 0:
            found[key] = whole.float().cpu()
    if shards.rank() == 0:
        found |= {key: x.cpu().clone() for key, x in engine.module.named_buffers()}
    return found
