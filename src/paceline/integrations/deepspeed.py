"""DeepSpeed engines whose model can hold the average, and exports of it, at every ZeRO stage."""

from collections import defaultdict
from typing import Any

import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor

from .. import shards
from ..base import AveragedOptimizer
from ..batchnorm import warn_of_statistics
from ..defaults import AUTO
from ..elastic import Elastic
from ..hosts import check_reach, unwrapped
from ..options import Group
from ..state import AVERAGE, OFFSET, RETURN, averages_of


def attach(engine: Any) -> None:
    """Have the average reach an engine's model, at every ZeRO stage.

        engine, *_ = deepspeed.initialize(model=model, optimizer=PACE(...), config=config)
        attach(engine)
        with engine.optimizer.optimizer.averaged():  # opt.averaged(), of the PACE that you gave
            evaluate(engine)

    DeepSpeed steps flat float32 copies, and copies them into the model's weights after each step.
    From now on `eval()`, `train()` and `averaged()` do so, too, and all ranks must take part. At
    stages 1 and 2 that is one all-gather of the weights each; at stage 3 each rank writes its own
    part, and weights that DeepSpeed keeps whole are gathered.

    A checkpoint that `engine.save_checkpoint` writes while the average is in has it as the model,
    and the live weights in the optimizer's files. After `engine.load_checkpoint` of such a one call
    `opt.train()`, which brings the live weights back bit for bit.

    At stage 0 in float32 the optimizer steps the model's own weights, and nothing is changed.

    Raises:
        ValueError: the optimizer is not PACE or Pullback, its pull sets itself ("auto"), or the
            engine has another optimizer around it than that of ZeRO without offloading.
    """
    optimizer, zero = _averaging(engine), engine.optimizer
    if zero is optimizer:
        check_reach(optimizer, engine.module)
    elif (host := _host_of(zero, optimizer)) is not None:
        optimizer._host = host
    else:
        raise ValueError(
            "attach() is for ZeRO without offloading, got stage "
            f"{engine.zero_optimization_stage()} and {type(zero).__name__}"
        )
    warn_of_statistics(engine.module, stacklevel=2)


def _averaging(engine: Any) -> AveragedOptimizer:
    optimizer = unwrapped(engine.optimizer)
    if not isinstance(optimizer, AveragedOptimizer):
        raise ValueError(f"the engine must step PACE or Pullback, got {type(optimizer).__name__}")
    if isinstance(optimizer, Elastic):
        raise ValueError("Elastic's workers each hold a model, so ZeRO cannot split it over them")
    if any(group["pullback"] == AUTO for group in optimizer.param_groups):
        raise ValueError(
            "pullback='auto' does not go with ZeRO, where each rank would set another gain; give "
            "pullback=1.0 with gain='scalar', or a strength"
        )
    return optimizer


def _host_of(zero: Any, optimizer: AveragedOptimizer) -> "_Copies | None":
    """What brings the average into the model; None if state or weights are offloaded."""
    if any(getattr(zero, x, False) for x in ("cpu_offload", "offload_optimizer", "offload_param")):
        return None
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        return _Partitions(zero)
    served = hasattr(zero, "update_lp_params") and _steps_flat_copies(optimizer)
    return _Copies(zero) if served else None


def _steps_flat_copies(optimizer: AveragedOptimizer) -> bool:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return bool(params) and all(map(shards.is_flat_copy, params))


class _Copies:
    """Of stages 1 and 2: in the groups; the model's weights are gathered from all ranks."""

    def __init__(self, zero: Any) -> None:
        self.zero = zero

    def groups(self) -> list[Group]:
        return self.zero.optimizer.param_groups

    def to_model(self) -> None:
        self.zero.update_lp_params()


class _Partitions(_Copies):
    """Of stage 3: in the groups during a step alone; the model has this rank's parts."""

    def groups(self) -> list[Group]:
        zero, stepped = self.zero, defaultdict(list)
        for part, flat in enumerate(zero.fp32_partitioned_groups_flat):
            stepped[zero.sub_group_to_group_id[part]].append(flat)
        groups = enumerate(super().groups())
        return [group | {"params": stepped[place]} for place, group in groups]

    def to_model(self) -> None:
        self.zero.checkpoint_event_prologue()  # no weight is gathered
        for part in range(len(self.zero.fp32_partitioned_groups_flat)):
            self.zero._reassign_or_swap_out_partitioned_parameters(part)
        self.zero.checkpoint_event_epilogue()  # those that it keeps whole are gathered


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
    optimizer = _averaging(engine)
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
