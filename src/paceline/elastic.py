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
from .defaults import AUTO
from .loading import check_count, check_outline, in_one_line, load_hooks, one_line
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

OPTIONS = ("every", *EXCHANGE)
# Options of the optimizer inside that have to be the same on all workers, too.
INNER = ("pullback", "gain", "averaging", "returns", "nonfinite")
MOVING_RATE = 0.9  # β of EASGD, as published
OUTER_LR, OUTER_MOMENTUM = 0.7, 0.9  # of DiLoCo, as published
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

    All workers make it from the same weights, call `step` equally often, and read other data. Steps
    that one of them skips count, whether `nonfinite="skip"` or its GradScaler skips them. Without
    gradients on a worker a parameter stands still there, and meets those of the others. Once it has
    stepped it goes on to meet them when it is frozen, and its center is returned.

    EASGD's momentum form (EAMSGD) is that around SGD with `nesterov=True`. The velocity stays with
    the worker; torch keeps the weights at the point where the gradient is taken, and that is what
    meets the center. The paper takes gradient and pull at the same x^i, here the pull is after it.

    A worker may be several ranks: DDP over a group of its own; or FSDP2 over one dimension of a
    device mesh. `process_group` is then the other dimension, and each rank sends its shards:

        mesh = init_device_mesh("cuda", (workers, ranks), mesh_dim_names=("across", "inside"))
        fully_shard(model, mesh=mesh["inside"])
        opt = Elastic(base, every=100, process_group=mesh["across"])

    The center takes a copy of the model in float32 (of PACE its average), diloco another, and an
    exchange one more in what is sent. Options, model, step and center are compared by one small
    message before the first step, after a load, and before each step that ends with an exchange.
    All of an exchange is received before anything is written. If a worker has ended, the others
    raise at the exchange, within the process group's timeout. `nonfinite="skip"` and "raise" are
    for each worker alone; weights that are not finite end the run on all ranks at the exchange.

    Projections are made in each step, and after an exchange on center, averages and live weights.
    Buffers are each worker's own: docs/elastic.md has how to compute BatchNorm's statistics of the
    center.

    Each worker saves a checkpoint of its own, with its live weights and moments. A run goes on with
    other workers if each loads one of these files, of one step: the center loses nothing, live
    weights and moments of files that nobody loads are gone, and workers that load the same file
    start from the same live weights. α = 0.9/N is that of the new number.

    Every option below but the first and the last is kept in all parameter groups, with one value.
    A load replaces it by the checkpoint's, as torch's optimizers do. Set it in the groups between
    steps, on all workers, to change it.

    Args:
        base: PACE, Pullback, or any optimizer that Pullback takes, which one with κ = 0 then holds.
            Its averages must be one tensor each (not LAWA or BEMA).
        every: H >= 1, steps between exchanges.
        exchange: one of easgd, diloco, average, as above.
        pull: α in [0, 1]; with "easgd" at most 1/N. Default: as above. "average" without a pull of
            the optimizer needs it.
        outer_lr: η > 0 of diloco. Default: 0.7.
        outer_momentum: μ in [0, 1) of diloco. Default: 0.9.
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
    _own_option = "exchange"
    _step_supports_amp_scaling = True  # a GradScaler then calls `step` also where it skips

    def __init__(
        self,
        base: Optimizer,
        every: int,
        *,
        exchange: str = EXCHANGE["exchange"],
        pull: float | None = EXCHANGE["pull"],
        outer_lr: float | None = EXCHANGE["outer_lr"],
        outer_momentum: float | None = EXCHANGE["outer_momentum"],
        exchange_dtype: torch.dtype | str | None = None,
        process_group: Any = None,
    ) -> None:
        given = locals()
        ours = {name: given[name] for name in OPTIONS}
        self.process_group = getattr(process_group, "get_group", lambda: process_group)()
        check_exchange(ours, self._workers)
        if not isinstance(base, AveragedOptimizer):
            if exchange == "average" and not pull:
                raise ValueError(NO_PULL)  # before a Pullback writes its options into the base
            base = Pullback(base, averaging=PowerEMA(0.0))
        if any(ELASTIC_STEPS in group for group in base.param_groups):
            raise ValueError("base must not have been in an Elastic before; make it anew")
        _checked_groups([group | ours for group in base.param_groups], self._workers)
        self.base = base
        for group in base.param_groups:
            group |= ours | {ELASTIC_STEPS: _steps_of(base)}
        self._forget()
        # In place of Optimizer's __init__, which would make groups and a state of its own.
        super().__setstate__({"defaults": base.defaults | ours})

    def __setattr__(self, name: str, value: Any) -> None:
        if name in OPTIONS:
            raise AttributeError(
                f"{name} is an option of parameter groups: set group[{name!r}] in each of "
                "param_groups, on all workers"
            )
        super().__setattr__(name, value)

    def _forget(self) -> None:
        super()._forget()
        self._is_compared = False  # whether workers are known to go together

    def __getstate__(self) -> dict[str, Any]:
        names = ("base", "defaults", "_state_is_provisional")
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
        group = (groups := self.base.param_groups)[-1]
        group |= {name: first[name] for name in (*OPTIONS, ELASTIC_STEPS)}
        try:
            _checked_groups([group], self._workers)
        except ValueError:
            groups.pop()
            raise
        self._is_compared = False

    def restart_averages(self) -> None:
        """Refused: the center is all workers', and does not follow one of them.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("Elastic's center is common to all workers; load a checkpoint instead")

    def stats(self) -> dict[str, Any]:
        """The base's own."""
        return self.base.stats()

    def register_projection(self, projection: Callable[[], object]) -> RemovableHandle:
        """The base's own, made in each step; and after an exchange on what has moved in it."""
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
                step or options, or one has ended; or as the base. At an exchange: a worker has
                ended. The step has been taken and counted, and nothing exchanged.
            ValueError: an option was set out of its range since the last step, or is not the same
                in all groups. Nothing has changed then.
            FloatingPointError: the weights of a worker are not finite, at an exchange. The step has
                been taken and counted, and nothing exchanged.
        """
        given = (closure,) if closure is not None else ()
        if not given and self._is_state_probe():
            self._base_step()
            self._ensure_outer_buffers()
            return None
        self._refuse_while_swapped()
        self._check_options()
        self._drop_provisional_state()
        group, loss = self.param_groups[0], None
        steps = int(group[ELASTIC_STEPS]) + 1
        meets = steps % group["every"] == 0
        if meets or not self._is_compared:
            self._compare_workers()
        if not self._is_compared:
            self.base._compare_ranks()  # here, for a GradScaler may skip the base's first step
            self._is_compared = True
        if not self._scaler_skips():
            loss = self._base_step(*given, **options)
        self._ensure_outer_buffers()
        for group in self.param_groups:
            group[ELASTIC_STEPS] = steps
        if meets:
            self._exchange(steps)
        return loss

    def _check_options(self) -> None:
        """Raises: ValueError: options were set since the last step that cannot be."""
        names = (*OPTIONS, *INNER)
        values = [[group[name] for name in names] for group in self.param_groups]
        if values != self._checked.get(0):
            for group, checked in zip(
                self.param_groups, _checked_groups(self.param_groups, self._workers), strict=True
            ):
                group |= {name: checked[name] for name in OPTIONS}
            self._checked[0] = values

    def _scaler_skips(self) -> bool:
        """Whether a GradScaler skips this step; else its scale is taken out of the gradients."""
        found_inf, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if found_inf is None:
            return False
        params = [p for group in self.param_groups for p in group["params"]]
        found = torch.as_tensor(found_inf, device=params[0].device) > 0
        skips = bool(self._on_any_rank(found))
        self.base._count_faults([], skips)
        if scale is not None and not skips:
            inverse = scale.double().reciprocal().float()  # as it does itself
            for p in params:
                if p.grad is not None:
                    shards.local(p.grad).mul_(inverse.to(p.device))
        return skips

    def _ensure_outer_buffers(self) -> None:
        if self.param_groups[0]["exchange"] == "diloco":
            for state in self.state.values():
                if AVERAGE in state and OUTER_BUFFER not in state:
                    state[OUTER_BUFFER] = torch.zeros_like(state[AVERAGE])

    def _members(self) -> list["_Member"]:
        """The parameters that train, or have, in the same order on all workers."""
        return [
            _Member(p, self.state.get(p, {}), group, averages)
            for group in self.param_groups
            for averages in [averages_of(group)]
            for p in group["params"]
            if p.requires_grad or AVERAGE in self.state.get(p, {})
        ]

    def _exchange(self, steps: int) -> None:
        """Meet the other workers; nothing is written before everything is here."""
        options, workers = self.param_groups[0], self._workers
        members = self._members()
        shards.drop_gathered_copies(x.param for x in members)
        batches: dict[Any, list[_Member]] = defaultdict(list)
        for x in members:
            dtype = _sent(options) or wide_dtype(x.param)
            batches[x.param.device, dtype].append(x)
        means: list[tuple[_Member, Tensor]] = []
        for (device, dtype), own in batches.items():
            sizes = [shards.local(x.param).numel() for x in own]
            flat = torch.empty(sum(sizes), dtype=dtype, device=device)
            pieces = torch.split(flat, sizes)
            for x, piece in zip(own, pieces, strict=True):
                piece.copy_(x.movement().flatten())
            self._meet(flat, "SUM", steps)
            flat.div_(workers)
            means += zip(own, pieces, strict=True)
        broken, moved = self._found_in([mean for _, mean in means])
        for (x, _), is_broken in zip(means, broken, strict=True):
            if is_broken:
                raise FloatingPointError(
                    f"{self._name(x.param)} is not finite on a worker at step {steps}; nothing was "
                    "exchanged"
                )
        for (x, _), has_moved in zip(means, moved, strict=True):
            if has_moved and AVERAGE not in x.state:  # on other workers alone
                self.base._begin_averages(x.group, x.param)
        self._ensure_outer_buffers()
        met = [(x._replace(state=self.state.get(x.param, {})), mean) for x, mean in means]
        met = [(x, mean) for x, mean in met if AVERAGE in x.state]
        k, project = steps // options["every"], self.base._project
        for x, mean in met:
            x.move_center(mean, k, workers)
        if self.base._projections:
            self.base._project_averages([AVERAGE], project)
        for x, _ in met:
            x.follow_center(k)
        if self.base._projections:
            project()
            self.base._project_averages(self._keys_of_averages(), project)

    def _found_in(self, means: list[Tensor]) -> list[list[bool]]:
        """Whether each mean is not finite on a rank of this worker, and whether any has moved."""
        if not means or means[0].is_meta:
            return [[False] * len(means), [True] * len(means)]
        found = [torch.stack([~x.isfinite().all(), x.any()]).to(means[0].device) for x in means]
        rows: list[list[bool]] = self._on_any_rank(torch.stack(found, 1)).tolist()
        return rows

    def _meet(self, x: Tensor, op: str, steps: int) -> None:
        """Raises: RuntimeError: `_all_reduce` does."""
        try:
            self._all_reduce(x, op)
        except RuntimeError as error:  # what torch raises differs between backends
            raise RuntimeError(
                f"the exchange at step {steps} failed, as it does when a worker has ended: "
                f"{one_line(error)}; nothing was exchanged"
            ) from error

    def _all_reduce(self, x: Tensor, op: str = "SUM") -> None:
        """All that workers send each other, in place."""
        dist.all_reduce(x, getattr(dist.ReduceOp, op), self.process_group)

    # ---- workers that differ --------------------------------------------------------------------

    def _compare_workers(self) -> None:
        """Compare what has to be the same on all workers, by one small message.

        Raises:
            RuntimeError: something is not; on all ranks of all workers.
        """
        options, members = self.param_groups[0], self._members()
        steps = int(options[ELASTIC_STEPS])
        forms = [(tuple(x.center().shape), x.param.dtype) for x in members]
        words = [[f"{name}={group[name]!r}" for name in OPTIONS] for group in self.param_groups]
        for own, group in zip(words, self.param_groups, strict=True):
            own += [f"{name}={group[name]!r}" for name in INNER]
        ours = {
            "options": "; ".join(dict.fromkeys(", ".join(x) for x in words)),
            "model": f"{len(forms)} parameters of {sum(math.prod(x) for x, _ in forms)} numbers",
            "step": f"step {steps}",
            "center": "the same shapes and other numbers",
        }
        numbers = [shards.digest(words), shards.digest(forms), steps]
        numbers.append(shards.check_sum([x.center() for x in members]))
        device = members[0].param.device if members else torch.device("cpu")
        device = torch.device("cpu") if device.type == "meta" else device
        most = torch.tensor([*numbers, *(-x for x in numbers)], dtype=torch.int64, device=device)
        self._meet(most, "MAX", steps + 1)
        high, low = most.view(2, -1)
        differs = self._on_any_rank(high != -low).tolist()
        if True in differs:
            at = differs.index(True)
            (what, said), own_number = list(ours.items())[at], numbers[at]
            theirs: list[Any] = [None] * self._workers
            dist.all_gather_object(theirs, (own_number, said), group=self.process_group)
            found = [f"worker {i} has {x[1]}" for i, x in enumerate(theirs) if x[0] != own_number]
            found = found or ["other ranks of a worker have others"]
            raise RuntimeError(
                f"workers must have the same {what}: {found[0]}, this one {said}; nothing was "
                "changed"
            )

    # ---- checkpoints --------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a `state_dict()` of a worker, or of the optimizer inside alone.

        The latter is a start: the center is its average, and its steps count. All workers must load
        files of one step, which the next step compares; which worker's does not matter.

        Options of the exchange are the checkpoint's from then on, where it has them.

        Raises:
            ValueError: as the base's; an option of the exchange is out of its range; diloco's
                momentum is missing; or its averages cannot be exchanged, as those in bfloat16.
                Nothing has changed then.
        """
        begun = False

        def check(_: Optimizer, final: dict[str, Any]) -> None:
            nonlocal begun
            begun = self._check_checkpoint(final)

        with load_hooks(self, state_dict) as saved:
            # The last of the base's hooks, which sees what those of the user made of it.
            hook = self.base.register_load_state_dict_pre_hook(check)
            try:
                with self._calling_base():
                    self.base.load_state_dict(saved)
            finally:
                hook.remove()
            steps = int(self.param_groups[0][ELASTIC_STEPS]) if begun else _steps_of(self.base)
            for group in self.param_groups:
                group[ELASTIC_STEPS] = steps
            self._is_compared = False

    def _check_checkpoint(self, saved: dict[str, Any]) -> bool:
        """Whether a checkpoint is of an Elastic.

        Raises:
            ValueError: it cannot be loaded.
        """
        check_outline(saved)
        groups = saved["param_groups"]
        with in_one_line("the checkpoint"):
            begun = [group for group in groups if ELASTIC_STEPS in group]
            if begun and begun != groups:
                raise ValueError(
                    f"the checkpoint's groups must all have {ELASTIC_STEPS!r}, or none"
                )
            for group in begun:
                check_count(ELASTIC_STEPS, group[ELASTIC_STEPS])
                if missing := sorted(set(OPTIONS) - group.keys()):
                    raise ValueError(f"the checkpoint's groups lack {missing}; nothing was changed")
            mine = (self.param_groups + self.param_groups[-1:] * len(groups))[: len(groups)]
            checked = _checked_groups(
                [a | b for a, b in zip(mine, groups, strict=True)], self._workers
            )
            for group in checked[: len(begun)]:
                met = group[ELASTIC_STEPS] >= group["every"] and group["exchange"] == "diloco"
                own = [saved["state"].get(key, {}) for key in group["params"]]
                if met and any(AVERAGE in x and OUTER_BUFFER not in x for x in own):
                    raise ValueError("the checkpoint lacks diloco's momentum; nothing was changed")
        return bool(begun)


class _Member(NamedTuple):
    """A parameter that meets those of other workers."""

    param: Tensor
    state: State  # without averages if it has not stepped
    group: Group
    averages: Averages

    def center(self) -> Tensor:
        """z, this rank's part."""
        return shards.local(self.state.get(AVERAGE, self.param))

    def movement(self) -> Tensor:
        """x^i - z, as wide as z."""
        center = self.center()
        return shards.local(self.param).to(center.dtype) - center

    def move_center(self, mean: Tensor, k: int, workers: int) -> None:
        """Move the center, in place; and what goes by x̄ or by the center of before.

        Args:
            mean: x̄ - z, flat.
            k: of the exchange, from 1.
            workers: N.
        """
        center, options = self.center(), self.group
        mean = mean.view(center.shape).to(center.dtype)
        if options["exchange"] == "easgd":
            pull = MOVING_RATE / workers if options["pull"] is None else options["pull"]
            self._pull(pull)
            center.add_(mean, alpha=workers * pull)
        elif options["exchange"] == "diloco":
            rate, momentum = options["outer_lr"], options["outer_momentum"]
            rate = OUTER_LR if rate is None else rate
            momentum = OUTER_MOMENTUM if momentum is None else momentum
            buffer = shards.local(self.state[OUTER_BUFFER]).mul_(momentum).sub_(mean)
            center.add_(mean, alpha=rate).sub_(buffer, alpha=rate * momentum)
        else:
            self._take_in(center + mean, k)
            center.add_(mean, alpha=self._weight(AVERAGE, k))

    def follow_center(self, k: int) -> None:
        """Move what goes by the new center, in place: at the k-th exchange."""
        if self.group["exchange"] == "average":
            self._pull(self.group["pull"] or 0.0)
            return
        if self.group["exchange"] == "diloco":
            shards.local(self.param).copy_(self.center())
        self._take_in(self.center(), k)

    def _pull(self, pull: float) -> None:
        """Move the live weights toward the center."""
        if pull:
            x, center = shards.local(self.param), self.center()
            x.copy_(x.to(center.dtype).lerp(center, pull))

    def _take_in(self, taken: Tensor, k: int) -> None:
        """Move the averages of `returns`."""
        for key in self.averages.extra:
            shards.local(self.state[key]).lerp_(taken, self._weight(key, k))

    def _weight(self, key: str, k: int) -> float:
        """What an average takes in at the k-th exchange."""
        return float(self.averages.rules[key].scaled(self.group["every"]).weight(k))


def _checked_groups(groups: list[Group], workers: int) -> list[Group]:
    """Groups with options of the exchange that are checked, plain numbers and text.

    Raises:
        ValueError: one is out of its range or differs between groups, or averages of a group cannot
            be exchanged.
    """
    checked = [dict(group) for group in groups]
    for group in checked:
        check_exchange(group, workers)
        for name in OPTIONS:
            same = group[name] == checked[0][name]
            require(group, name, same, f"{checked[0][name]!r} as in the first group")
        for name in ("state_dtype", "capturable"):
            require(group, name, name not in group or not group[name], "left out in Elastic")
        for key, rule in averages_of(group).rules.items():
            name = "averaging" if key == AVERAGE else "returns"
            require(group, name, not rule.keeps, "of averages that are one tensor each in Elastic")
            rule.scaled(group["every"])
        if group["exchange"] == "average" and not group["pullback"] and not group["pull"]:
            raise ValueError(NO_PULL)
        if group["gain"] == "scalar" and not _leaves_room(group["pullback"], group["every"]):
            raise ValueError(
                f"pullback={group['pullback']!r} with one gain holds workers at their center, "
                f"which stands still for every={group['every']} steps; give pullback=c with "
                "gain='adam', or at most 1/every"
            )
    return checked


def _leaves_room(gain: float | str, every: int) -> bool:
    """Whether workers can move `every` steps away from a center that pulls them with a gain."""
    return every == 1 or (gain != AUTO and float(gain) * every <= 1)


def _sent(options: Group) -> torch.dtype | None:
    return torch.bfloat16 if options["exchange_dtype"] else None


def _steps_of(optimizer: AveragedOptimizer) -> int:
    """The steps that an optimizer has taken."""
    states = [x for x in optimizer.state.values() if AVERAGE in x]
    return max(map(taken_in, states), default=0)
