"""Tensors of which each rank holds a part, and what the ranks have to agree on.

The step works on elements, so it works on each rank's own part (`torch.distributed.tensor`), plain
memory to every kernel, without a word to the other ranks.
"""

import hashlib
import sys
from collections.abc import Iterable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

LOOKS = 10  # steps in which other ranks' options are looked for
WAIT = timedelta(seconds=10)  # for them, by a rank that will wait for the others anyway
FSDP1 = (
    "params must not be flattened by FSDP1, where a look at the average would change the training "
    "after it; shard the model by FSDP2 (fully_shard, in accelerate fsdp_version 2)"
)
PARTIAL = (
    "params must not be DTensors of Partial placement, whose weights are a sum over ranks; "
    "redistribute them to Shard or Replicate"
)
ZERO = (
    "DeepSpeed's ZeRO steps flat copies of the weights, so the average would not reach the model; "
    "call paceline.integrations.deepspeed.attach(engine) first"
)
ZERO_EXPORT = (
    "DeepSpeed's ZeRO steps flat copies of this model's weights; export it by "
    "paceline.integrations.deepspeed.averaged_state_dict(engine)"
)


def is_sharded(x: Tensor) -> bool:
    """Whether this is a DTensor, which may be replicated, too."""
    return hasattr(x, "to_local")


def is_flattened(x: Tensor) -> bool:
    """Whether FSDP1 keeps this parameter in a flat one, or it is a flat one itself."""
    return getattr(x, "_fsdp_flattened", False)


def reason_against(x: Tensor) -> str | None:
    """Why a parameter cannot be stepped as it is laid out over ranks; None: it can."""
    if is_flattened(x):
        return FSDP1
    partial = is_sharded(x) and any(y.is_partial() for y in x.placements)  # type: ignore[attr-defined]
    return PARTIAL if partial else None


def is_partitioned(x: Tensor) -> bool:
    """Whether DeepSpeed's ZeRO stage 3 has taken this parameter's data away, or it is the data."""
    return hasattr(x, "ds_id")


def is_flat_copy(x: Tensor) -> bool:
    """Whether DeepSpeed's ZeRO stage 1 or 2 steps this flat copy in the place of parameters."""
    return "deepspeed" in sys.modules and x.ndim == 1 and not isinstance(x, torch.nn.Parameter)


def local(x: Tensor) -> Tensor:
    """This rank's part of a DTensor, in the same memory; any other tensor itself. Needs no_grad."""
    if not is_sharded(x):
        return x
    part: Any = x.to_local()  # type: ignore[attr-defined]
    return part.wait() if hasattr(part, "wait") else part  # type: ignore[no-any-return]


def local_grad(param: Tensor) -> Tensor:
    """This rank's part of the parameter's gradient: the part that goes with `local(param)`."""
    grad: Any = param.grad
    if is_sharded(param) and grad.placements != param.placements:  # type: ignore[attr-defined]
        grad = grad.redistribute(param.device_mesh, param.placements)  # type: ignore[attr-defined]
    return local(grad)


def full(x: Tensor) -> Tensor:
    """The whole of a DTensor, on every rank; all of them must call this together."""
    whole: Tensor = x.full_tensor()  # type: ignore[attr-defined]
    return whole


def gathered(x: Tensor) -> Tensor | None:
    """The whole of a DTensor in CPU memory on rank 0, None on others; any other tensor itself."""
    if not is_sharded(x):
        return x
    whole = full(x)  # all ranks take part
    return whole.cpu() if rank() == 0 else None


def rank() -> int:
    """This process's in the default process group; 0 where there is none."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def drop_gathered_copies(params: Iterable[Tensor]) -> None:
    """Where parameters are sharded, have FSDP2's modules hold their shards and nothing else.

    A forward pass may leave what it gathered in the model, at the root by default; the next would
    not see that the shards have changed. Nothing is sent.
    """
    if not any(map(is_sharded, params)):
        return
    from torch.distributed._composable_state import _module_state_mapping
    from torch.distributed.fsdp import FSDPModule

    for module in list(_module_state_mapping):
        if isinstance(module, FSDPModule):
            module.reshard()


def first_element(x: Tensor) -> int:
    """Where this rank's part begins, as a place in the whole tensor; 0 for a plain tensor."""
    if not is_sharded(x):
        return 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offsets = compute_local_shape_and_global_offset(x.shape, x.device_mesh, x.placements)  # type: ignore[attr-defined]
    return sum(at * step for at, step in zip(offsets, x.stride(), strict=True))


def holders(x: Tensor) -> Any:
    """What two tensors have in common whose parts are with the same ranks; None of a whole one."""
    if not is_sharded(x):
        return None
    return x.device_mesh, tuple(y.is_replicate() for y in x.placements)  # type: ignore[attr-defined]


def total(part: Tensor, like: Tensor) -> Tensor:
    """A sum over this rank's part of a DTensor as that over all of it, on every rank.

    Those that hold the parts must call this together. What comes from a plain tensor is whole.
    """
    if not is_sharded(like):
        return part
    from torch.distributed.tensor import DTensor, Partial, Replicate

    # Not by is_shard, for torch's strided shards say that they are none.
    over = [Replicate() if x.is_replicate() else Partial() for x in like.placements]  # type: ignore[attr-defined]
    return full(DTensor.from_local(part, like.device_mesh, over, run_check=False))  # type: ignore[attr-defined]


def on_any_rank(flags: Tensor) -> Tensor:
    """Which of these flags is up on any rank of the default process group, where there is one.

    All of its ranks must call this together.

    Args:
        flags: bool, of any shape; on a device that the group's backend knows.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return flags
    up = flags.to(torch.int32)
    dist.all_reduce(up, op=dist.ReduceOp.MAX)
    return up > 0


def mean_over_ranks(value: float, device: torch.device) -> float:
    """The mean of a number over the ranks of the default process group, where there is one.

    All of its ranks must call this together, and get the same.

    Args:
        value: this rank's.
        device: one that the group's backend knows.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return value
    total = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


def digest(value: Any) -> int:
    """A number of 62 bits that other values hardly share; the same in every process."""
    return int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:8]) >> 2


def check_sum(tensors: list[Tensor]) -> int:
    """A number of 61 bits of what is in tensors, and of their order; meta tensors count as 0."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = [
        x.contiguous().view(whole[x.itemsize]).sum(dtype=torch.int64)
        for x in tensors
        if not x.is_meta and x.numel()
    ]
    total = 0
    for one in torch.stack([x.to(bits[0].device) for x in bits]).tolist() if bits else ():
        total = (total * 1_000_003 + one) % 2**61
    return total


class Announcement:
    """Options of this rank, told to the others by the process group's store, to be compared.

    Args:
        options: as text.
        kind: what the same object on other ranks has in common with it.
    """

    def __init__(self, options: str, kind: str) -> None:
        self.options, self.looks = options, 0
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return
        if dist.get_backend() == "fake":  # torch's process group of one rank without the others
            return
        from torch.distributed.distributed_c10d import _get_default_store

        self.store, rank, count = _get_default_store(), dist.get_rank(), dist.get_world_size()
        # Counted where the others read it, for a process may have been in another group before.
        name = f"paceline/{kind}/{self.store.add(f'paceline/{kind} of {rank}', 1)}"
        self.store.set(f"{name}/{rank}", options)
        # Rank 0 and the next one: each rank reads two, and some rank sees any difference.
        self.others = {other: f"{name}/{other}" for other in {0, (rank + 1) % count} - {rank}}
        self.looks = LOOKS

    def difference(self, *, wait: bool) -> str | None:
        """What another rank has that differs; None where nothing does, or is known yet.

        Args:
            wait: for the others, a while.
        """
        if not self.looks:
            return None
        self.looks -= 1
        if wait and self.looks == LOOKS - 1:
            with suppress(RuntimeError):  # it takes too long: they may have other optimizers
                self.store.wait(list(self.others.values()), WAIT)
        if not self.store.check(list(self.others.values())):
            return None
        self.looks = 0
        theirs = {rank: self.store.get(key).decode() for rank, key in self.others.items()}
        found = [f"rank {rank} has {x}" for rank, x in theirs.items() if x != self.options]
        return f"{found[0]}, this rank {self.options}" if found else None
