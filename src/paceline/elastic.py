"""Workers that train apart and meet every H steps: elastic averaging, DiLoCo, a common average."""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import Optimizer
from torch.utils.hooks import RemovableHandle

from . import shards
from .averaging import PowerEMA
from .base import Around, AveragedOptimizer
from .loading import check_count, check_is_dict, one_line
from .options import EXCHANGE, Group, check_exchange, require
from .pullback import Pullback
from .state import (
    AVERAGE,
    ELASTIC_STEPS,
    OUTER_BUFFER,
    Averages,
    State,
    averages_of,
    taken_in,
    wide_dtype,
)

ALIKE = ("pullback", "averaging", "returns", "nonfinite")  # options that workers share, too
MOVING_RATE = 0.9  # β of EASGD, as published
NO_PULL = (
    "exchange='average' needs a pull, or the workers never meet: pullback in the optimizer, or pull"
)


class Elastic(Around):
    r"""Experimental. Workers train apart, each its own live weights, and meet every H steps.

    At t = H, 2H, ... of N workers, after each has taken its own step to x^i:

        x̄ = (x^1 + ... + x^N)/N                     all that is sent: x^i - z, one model
        "easgd"     x^i ← x^i + α·(z - x^i)          and, from the same x^i,
                    z   ← z + N·α·(x̄ - z)            α = 0.9/N
        "diloco"    m   ← μ·m + (z - x̄)              m = 0 at first
                    z   ← z - η·((z - x̄) + μ·m)      η = 0.7, μ = 0.9, both z on the right as before
                    x^i ← z
        "average"   z   ← z + B_k·(x̄ - z)            k = t/H
                    x^i ← x^i + α·(z - x^i)          toward the new z; α = 0

    z is the center, the same bits on all workers at every step, and the model to return. It is the
    `average` of the optimizer inside: `eval`, exports, checkpoints and resuming are those of PACE
    and Pullback, and a pull of theirs goes toward it at each step. With "average" that is PACE
    across workers: z is the average over time and workers. B_k is the weight of the optimizer's
    own rule over H steps, that of `averaging.scaled(H)` at k. With κ = 0 it is the mean of the
    workers, and with H = 1 and α = 1 all is plain averaging. Averages of `returns` take in x̄ with
    "average", and z with the others, by their own rules, and nothing more is sent.

        dist.init_process_group()                          # under torchrun, say
        opt = Elastic(torch.optim.AdamW(model.parameters(), lr=1e-3), every=100, exchange="diloco")
        opt = Elastic(PACE(model.parameters(), lr=1e-3, pullback=0.1), every=20, exchange="average")

    All workers make it from the same weights, call `step` equally often, and read other data.
    EASGD's momentum form (EAMSGD) is that around SGD with `nesterov=True`. The velocity stays with
    the worker; torch keeps the weights at the point where the gradient is taken, and that is what
    meets the center. The paper takes gradient and pull at the same x^i, here the pull is after it.

    A worker may be several ranks: DDP over a group of its own; or FSDP2 over one dimension of a
    device mesh. `process_group` is then the other dimension, and each rank sends its shards:

        mesh = init_device_mesh("cuda", (workers, ranks), mesh_dim_names=("across", "inside"))
        fully_shard(model, mesh=mesh["inside"])
        opt = Elastic(base, every=100, process_group=mesh["across"])

    The center takes a copy of the model in float32 (of PACE its average), diloco another, and an
    exchange one more in what is sent. Before the first step, and after a load, some numbers are
    compared. All of an exchange is received before anything is written. If a worker has ended, the
    others raise at the exchange, within the process group's timeout. `nonfinite="skip"` and
    "raise" are for each worker alone; weights that are not finite end the run on all at the
    exchange.

    Each worker saves a checkpoint of its own, with its live weights and moments. A run goes on with
    other workers if each loads one of these files, of one step: the center loses nothing, live
    weights and moments of files that nobody loads are gone, and workers that load the same file
    start from the same live weights. α = 0.9/N is that of the new number.

    Args:
        base: PACE, Pullback, or any optimizer that Pullback takes, which one with κ = 0 then holds.
            Its averages must be one tensor each (not LAWA or BEMA).
        every: H >= 1, steps between exchanges.
        exchange: one of easgd, diloco, average, as above.
        pull: α in [0, 1]; with "easgd" at most 1/N. Default: as above. "average" without a pull of
            the optimizer needs it.
        outer_lr: η > 0 of diloco.
        outer_momentum: μ in [0, 1) of diloco.
        exchange_dtype: torch.bfloat16 sends x^i - z, and sums it, in that: half the bytes. What is
            lost is of the movement's size. Default: as wide as the center.
        process_group: of the workers, one rank of each; or a one-dimensional device mesh. Default:
            all ranks.

    Raises:
        ValueError: an argument is out of its range, or the optimizer cannot be used.
        RuntimeError: there is no process group. Nothing has changed then.

    Source: Zhang, Choromanska & LeCun, Deep learning with Elastic Averaging SGD, arXiv:1412.6651
    (2015); Douillard et al., DiLoCo, arXiv:2311.08105 (2023).
    """

    base: AveragedOptimizer

    def __init__(
        self,
        base: Optimizer,
        every: int,
        *,
        exchange: str = EXCHANGE["exchange"],
        pull: float | None = EXCHANGE["pull"],
        outer_lr: float = EXCHANGE["outer_lr"],
        outer_momentum: float = EXCHANGE["outer_momentum"],
        exchange_dtype: torch.dtype | str | None = None,
        process_group: Any = None,
    ) -> None:
        given = locals()
        ours = {name: given[name] for name in ("every", *EXCHANGE)}
        self.process_group = getattr(process_group, "get_group", lambda: process_group)()
        check_exchange(ours, self._workers)
        if not isinstance(base, AveragedOptimizer):
            if exchange == "average" and not pull:
                raise ValueError(NO_PULL)  # before a Pullback writes its options into the base
            base = Pullback(base, averaging=PowerEMA(0.0))
        if any(ELASTIC_STEPS in group for group in base.param_groups):
            raise ValueError("base must not have been in an Elastic before; make it anew")
        for group in base.param_groups:
            _check_group(group | ours)
        self.base, self._ours = base, ours
        for group in base.param_groups:
            group |= ours | {ELASTIC_STEPS: _steps_of(base)}
        self._forget()
        # In place of Optimizer's __init__, which would make groups and a state of its own.
        super().__setstate__({"defaults": base.defaults | ours})

    def _forget(self) -> None:
        super()._forget()
        self._are_alike = False  # whether workers have been compared

    def __getstate__(self) -> dict[str, Any]:
        names = ("base", "defaults", "_ours", "_state_is_provisional")
        return {name: getattr(self, name) for name in names}  # no copy has a process group

    @property
    def _state_is_provisional(self) -> bool:
        return self.base._state_is_provisional

    @_state_is_provisional.setter
    def _state_is_provisional(self, value: bool) -> None:
        self.base._state_is_provisional = value

    @property
    def _workers(self) -> int:
        if not (dist.is_available() and dist.is_initialized() and hasattr(self, "process_group")):
            raise RuntimeError(
                "Elastic needs a process group: call torch.distributed.init_process_group() in "
                "each worker first; a copy has none, so make a new one. Nothing was changed"
            )
        return dist.get_world_size(self.process_group)

    def add_param_group(self, param_group: Group) -> None:
        """Add a group to the base, on all workers alike.

        Raises:
            ValueError: as the base, or its averages cannot be exchanged. Nothing has changed then.
        """
        first = self.param_groups[0]
        self.base.add_param_group(param_group)
        group = self.param_groups[-1]
        group |= {name: first[name] for name in (*self._ours, ELASTIC_STEPS)}
        try:
            _check_group(group)
        except ValueError:
            self.param_groups.pop()
            raise
        self._are_alike = False

    def stats(self) -> dict[str, Any]:
        """The base's own."""
        return self.base.stats()

    def register_projection(self, projection: Callable[[], object]) -> RemovableHandle:
        """The base's own: made in each step, before an exchange."""
        return self.base.register_projection(projection)

    # ---- stepping -----------------------------------------------------------------------------

    @_disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, **options: Any) -> Any:
        """Have the base take one step; at every H-th, meet the other workers.

        Args:
            closure: re-evaluates the model under gradients and returns the loss, for the base.
            options: what else the base's `step` takes.

        Returns:
            What the base's returns.

        Raises:
            RuntimeError: before anything has changed: other workers have another model, weights,
                step or options; or as the base. At an exchange: a worker has ended, or a parameter
                has had gradients on other workers and none here. Nothing has been exchanged then.
            FloatingPointError: the weights of a worker are not finite. Nothing has been exchanged.
        """
        given = (closure,) if closure is not None else ()
        if not given and self._is_state_probe():
            self._base_step()
            self._ensure_outer_buffers()
            return None
        self._refuse_while_swapped()
        if not self._are_alike:
            self._compare_workers()
        loss = self._base_step(*given, **options)
        steps = int(self.param_groups[0][ELASTIC_STEPS]) + 1
        if steps % self.param_groups[0]["every"] == 0:
            self._exchange(steps)
        for group in self.param_groups:
            group[ELASTIC_STEPS] = steps
        return loss

    def _ensure_outer_buffers(self) -> None:
        if self.param_groups[0]["exchange"] == "diloco":
            for state in self.state.values():
                if AVERAGE in state and OUTER_BUFFER not in state:
                    state[OUTER_BUFFER] = torch.zeros_like(state[AVERAGE])

    def _members(self) -> list["_Member"]:
        """The parameters that train, in the same order on all workers."""
        return [
            _Member(p, state if AVERAGE in state else {}, group, averages)
            for group in self.param_groups
            for averages in [averages_of(group)]
            for p in group["params"]
            for state in [self.state.get(p, {})]
            if p.requires_grad
        ]

    def _exchange(self, steps: int) -> None:
        """Meet the other workers; nothing is written before everything is here."""
        options, workers = self.param_groups[0], self._workers
        members = self._members()
        shards.drop_gathered_copies(x.param for x in members)
        alike: dict[Any, list[_Member]] = defaultdict(list)
        for x in members:
            dtype = _sent(options) or wide_dtype(x.param)
            alike[x.param.device, dtype].append(x)
        means: list[tuple[_Member, Tensor]] = []
        for (device, dtype), own in alike.items():
            sizes = [shards.local(x.param).numel() for x in own]
            flat = torch.empty(sum(sizes), dtype=dtype, device=device)
            pieces = torch.split(flat, sizes)
            for x, piece in zip(own, pieces, strict=True):
                piece.copy_(x.movement().flatten()) if x.state else piece.zero_()
            try:
                self._all_reduce(flat)
            except RuntimeError as error:  # what torch raises differs between backends
                raise RuntimeError(
                    f"the exchange at step {steps} failed, as it does when a worker has ended: "
                    f"{one_line(error)}; nothing was exchanged"
                ) from error
            flat.div_(workers)
            means += zip(own, pieces, strict=True)
        for x, mean in means:
            if not mean.is_meta and not bool(mean.isfinite().all()):
                raise FloatingPointError(
                    f"{self._name(x.param)} is not finite on a worker at step {steps}; nothing was "
                    "exchanged"
                )
            if not x.state and bool(mean.any()):
                raise RuntimeError(
                    f"{self._name(x.param)} has had gradients on other workers, and none on this; "
                    "give it a gradient of zeros, or freeze it on all; nothing was exchanged"
                )
        self._ensure_outer_buffers()
        for x, mean in means:
            if x.state:
                x.meet(mean, steps // options["every"], workers)

    def _all_reduce(self, x: Tensor, op: str = "SUM") -> None:
        """All that workers send each other, in place."""
        dist.all_reduce(x, getattr(dist.ReduceOp, op), self.process_group)

    # ---- workers that differ --------------------------------------------------------------------

    def _compare_workers(self) -> None:
        """Compare what has to be the same on all workers, by one small message.

        Raises:
            RuntimeError: something is not.
        """
        options, members = self.param_groups[0], self._members()
        forms = [(tuple(x.center().shape), x.param.dtype) for x in members]
        names = (*self._ours, *ALIKE)
        words = [[f"{name}={group[name]!r}" for name in names] for group in self.param_groups]
        ours = {
            "options": "; ".join(dict.fromkeys(", ".join(x) for x in words)),
            "model": f"{len(forms)} parameters of {sum(math.prod(x) for x, _ in forms)} numbers",
            "step": f"step {options[ELASTIC_STEPS]}",
            "center": "the same shapes and other numbers",
        }
        numbers = [shards.digest(words), shards.digest(forms), int(options[ELASTIC_STEPS])]
        numbers.append(shards.check_sum([x.center() for x in members]))
        device = members[0].param.device if members else torch.device("cpu")
        device = torch.device("cpu") if device.type == "meta" else device
        mine = torch.tensor([*numbers, *(-x for x in numbers)], dtype=torch.int64, device=device)
        workers, most = self._workers, mine.clone()
        self._all_reduce(most, "MAX")
        high, low = most.tolist()[: len(numbers)], most.tolist()[len(numbers) :]
        for (what, said), a, b in zip(ours.items(), high, low, strict=True):
            if a != -b:
                theirs: list[Any] = [None] * workers
                own = (numbers[list(ours).index(what)], said)
                dist.all_gather_object(theirs, own, group=self.process_group)
                rank = next(i for i, x in enumerate(theirs) if x != own)
                raise RuntimeError(
                    f"workers must have the same {what}: worker {rank} has {theirs[rank][1]}, this "
                    f"one {said}; nothing was changed"
                )
        self._are_alike = True

    # ---- checkpoints --------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a `state_dict()` of a worker, or of the optimizer inside alone.

        The latter is a start: the center is its average, and its steps count. All workers must load
        files of one step, which the next step compares; which worker's does not matter.

        Raises:
            ValueError: as the base's; an option of the exchange is out of its range; diloco's
                momentum is missing; or its averages cannot be exchanged, as those in bfloat16.
                Nothing has changed then.
        """
        check_is_dict(state_dict)
        groups = state_dict.get("param_groups")
        for group in groups if isinstance(groups, list) else []:
            if isinstance(group, dict) and ELASTIC_STEPS in group:
                check_count(ELASTIC_STEPS, group[ELASTIC_STEPS])
                if missing := sorted(self._ours.keys() - group.keys()):
                    raise ValueError(f"the checkpoint's groups lack {missing}; nothing was changed")
                check_exchange(dict(group), self._workers)
                met = group[ELASTIC_STEPS] >= group["every"] and group["exchange"] == "diloco"
                own = [state_dict.get("state", {}).get(key, {}) for key in group["params"]]
                if met and any(AVERAGE in x and OUTER_BUFFER not in x for x in own):
                    raise ValueError("the checkpoint lacks diloco's momentum; nothing was changed")
        for group in groups if isinstance(groups, list) else []:
            if isinstance(group, dict):
                _check_group(self.param_groups[0] | group)
        self.base.load_state_dict(state_dict)
        begun = all(ELASTIC_STEPS in group for group in groups or [])
        steps = int(self.param_groups[0][ELASTIC_STEPS]) if begun else _steps_of(self.base)
        for group in self.param_groups:
            group[ELASTIC_STEPS] = steps
        self._are_alike = False


class _Member(NamedTuple):
    """A parameter that meets those of other workers."""

    param: Tensor
    state: State  # empty if it has not stepped
    group: Group
    averages: Averages

    def center(self) -> Tensor:
        """z, this rank's part."""
        return shards.local(self.state.get(AVERAGE, self.param))

    def movement(self) -> Tensor:
        """x^i - z, as wide as z."""
        center = self.center()
        return shards.local(self.param).to(center.dtype) - center

    def meet(self, mean: Tensor, k: int, workers: int) -> None:
        """Move center, live weights and further averages, in place.

        Args:
            mean: x̄ - z, flat.
            k: of the exchange, from 1.
            workers: N.
        """
        center, x, options = self.center(), shards.local(self.param), self.group
        mean = mean.view(center.shape).to(center.dtype)
        pull, taken = options["pull"] or 0.0, center
        if options["exchange"] == "easgd":
            pull = MOVING_RATE / workers if options["pull"] is None else pull
            x.copy_(x.to(center.dtype).lerp(center, pull))
            center.add_(mean, alpha=workers * pull)
        elif options["exchange"] == "diloco":
            rate, momentum = options["outer_lr"], options["outer_momentum"]
            buffer = shards.local(self.state[OUTER_BUFFER]).mul_(momentum).sub_(mean)
            center.add_(mean, alpha=rate).sub_(buffer, alpha=rate * momentum)
            x.copy_(center)
        else:
            taken = center + mean
            center.add_(mean, alpha=self._weight(AVERAGE, k))
            if pull:
                x.copy_(x.to(center.dtype).lerp(center, pull))
        for key in self.averages.extra:
            shards.local(self.state[key]).lerp_(taken, self._weight(key, k))

    def _weight(self, key: str, k: int) -> float:
        """What an average takes in at the k-th exchange."""
        return float(self.averages.rules[key].scaled(self.group["every"]).weight(k))


def _check_group(group: Group) -> None:
    """Raises: ValueError: the averages of a group cannot be exchanged."""
    for name in ("state_dtype", "capturable"):
        require(group, name, name not in group or not group[name], "left out in Elastic")
    averages = averages_of(group)
    for key, rule in averages.rules.items():
        name = "averaging" if key == AVERAGE else "returns"
        require(group, name, not rule.keeps, "of averages that are one tensor each in Elastic")
        rule.scaled(group["every"])
    if group["exchange"] == "average" and not group["pullback"] and not group["pull"]:
        raise ValueError(NO_PULL)


def _sent(options: Group) -> torch.dtype | None:
    return torch.bfloat16 if options["exchange_dtype"] else None


def _steps_of(optimizer: AveragedOptimizer) -> int:
    """The steps that an optimizer has taken."""
    states = [x for x in optimizer.state.values() if AVERAGE in x]
    return max(map(taken_in, states), default=0)
