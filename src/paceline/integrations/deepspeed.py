"""DeepSpeed engines whose model can hold the average, and exports of it, at every ZeRO stage."""

from collections import defaultdict
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor

from .. import shards
from ..base import AveragedOptimizer
from ..batchnorm import warn_of_statistics
from ..defaults import AUTO
from ..elastic import Elastic
from ..hosts import check_reach, unwrapped
from ..options import Group

OFFLOADING = ("cpu_offload", "offload_optimizer", "offload_param")


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
    elif any(getattr(zero, x, False) for x in OFFLOADING):
        raise ValueError(_unserved("attach", engine))
    optimizer._host = _host_of(engine, "attach")
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


def _host_of(engine: Any, method: str) -> "_Copies | None":
    """What reads and shows the copies that are stepped; None where the model's own weights are."""
    zero = engine.optimizer
    if zero is unwrapped(zero):
        return None
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        return _Partitions(zero)
    if hasattr(zero, "update_lp_params"):
        return _Copies(zero)
    raise ValueError(_unserved(method, engine))


def _unserved(method: str, engine: Any) -> str:
    stage, kind = engine.zero_optimization_stage(), type(engine.optimizer).__name__
    return f"{method}() is for ZeRO without offloading, got stage {stage} and {kind}"


class _Copies:
    """Of stages 1 and 2: in the groups; the model's weights are gathered from all ranks."""

    def __init__(self, zero: Any) -> None:
        self.zero = zero

    def groups(self) -> list[Group]:
        return self.zero.optimizer.param_groups

    def to_model(self) -> None:
        self.zero.update_lp_params()

    def whole(self, p: Tensor) -> Tensor:
        """A weight of the model in float32, as it is stepped; one that is not, as it is."""
        copy: Tensor | None = safe_get_full_fp32_param(p)
        return p if copy is None else copy


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

    def whole(self, p: Tensor) -> Tensor:
        if not any(p is x for part in self.zero.fp16_groups for x in part):  # it has no copy
            with deepspeed.zero.GatheredParameters([p]):
                return p.detach().clone()
        trains = p.requires_grad
        try:
            return super().whole(p.requires_grad_())  # DeepSpeed tells it of no frozen one
        finally:
            p.requires_grad_(trains)


@torch.no_grad()
def averaged_state_dict(engine: Any, name: str | None = None) -> dict[str, Tensor]:
    """The returned model's weights, whole and in float32, at ZeRO stages 1, 2 and 3.

    All ranks must call this. Each weight is gathered on all of them, one at a time, and kept in the
    CPU memory of rank 0; the others get an empty dict. Weights that have not stepped, and buffers,
    are as they are in the model; a tied weight is there under its first name.

    Args:
        engine: of `deepspeed.initialize`. At stage 0, in float32 alone.
        name: of the average, one of `opt.returns`. Default: the first, the model to return.

    Raises:
        ValueError: no average has this name, or DeepSpeed has another optimizer around it.
    """
    optimizer, host = _averaging(engine), _host_of(engine, "averaged_state_dict")
    if host:  # swapped in the copies alone, the average stays out of the model
        host.to_model = lambda: None  # type: ignore[method-assign]
    attached, optimizer._host = optimizer._host, host
    found: dict[str, Tensor] = {}
    try:
        with optimizer.averaged(name):
            for key, p in engine.module.named_parameters():
                weight = host.whole(p) if host else p
                if shards.rank() == 0:
                    found[key] = weight.to("cpu", torch.float32, copy=True)
    finally:
        optimizer._host = attached
    if shards.rank() == 0:
        found |= {key: x.cpu().clone() for key, x in engine.module.named_buffers()}
    return found
