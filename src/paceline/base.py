"""What PACE and Pullback share: averages in and out, export, faults, reports, checkpoints."""

import math
import warnings
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer
from torch.utils.hooks import RemovableHandle

from . import memory, shards, swap
from .averaging import Averaging
from .options import Group, number, parse_returns, returns_text
from .state import (
    AVERAGE,
    ELASTIC_STEPS,
    FROZEN,
    OFFSET,
    RETURN,
    WIDE,
    averages_of,
    begun_keys_in,
    extra_keys_in,
    forget_history,
    frozen_places,
)
from .update import squared_norm

HOOKED: Any = Optimizer.profile_hook_step(repr).__code__  # of each `step` that torch has hooks on
LIVE = "live"  # the name of the live weights, beside those of averages


class Choice(NamedTuple):
    """What `choose` found."""

    best: str
    """The name of what is in the model now: an average's, or "live"."""
    scores: dict[str, float]
    """By name: of each average, in the order of `returns`, and of the live weights."""


def describe(groups: list[Group], group: int, index: int) -> str:
    """A parameter by its name where the user gave names, else by its place; and its shape."""
    names = groups[group].get("param_names")
    name = f"parameter {names[index]!r}" if names else f"parameter {index} of group {group}"
    return f"{name} of shape {tuple(groups[group]['params'][index].shape)}"


class Host(Protocol):
    """A host that has an optimizer step copies of the model's weights."""

    def groups(self) -> list[Group]:
        """The optimizer's groups with the copies that it steps; they are read only."""

    def to_model(self) -> None:
        """Put what is in the copies into the model."""


class AveragedOptimizer(Optimizer):
    """An optimizer that keeps averages of each parameter, as `paceline.state` has them.

    A subclass steps.
    """

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_stats" not in self.__dict__:  # unpickled or copied
            self._forget()
            self._state_is_provisional = bool(state.get("_state_is_provisional"))

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_state_is_provisional": self._state_is_provisional}

    def _forget(self) -> None:
        self._stats: dict[str, Any] | None = None
        self._counts: Tensor | None = None  # guarded coordinates, guarded steps, skipped steps
        self._state_is_provisional = False  # made by a step that only asked for state
        self._announced: shards.Announcement | None = None
        self._spans: list[tuple[int, int, int]] = []  # of memory that does not overlap
        self._checked: dict[int, list[Any]] = {}  # by the group's index: options as checked
        self._host: Host | None = None  # that has it step copies of the weights
        self._projections: OrderedDict[int, Callable[[], object]] = OrderedDict()

    # ---- the model to return ------------------------------------------------------------------

    @property
    def swapped(self) -> bool:
        """Whether the average is in the parameters now, and the live weights are put aside."""
        return any(group.get(swap.SWAPPED) for group in self.param_groups)

    def _refuse_while_swapped(self, method: str = "step") -> None:
        if self.swapped:
            raise RuntimeError(
                f"{method}() was called while the averaged weights are in the model; call train() "
                "first. Nothing was changed"
            )

    def _compare_ranks(self) -> None:
        """Say where another rank has other options, at one of the first steps.

        Raises:
            RuntimeError: they are such that ranks wait for each other.
        """
        if self._announced and not self._announced.looks:
            return
        options = "; ".join(
            f"nonfinite={g['nonfinite']!r}, pullback={g['pullback']!r}" for g in self.param_groups
        )
        if self._announced is None:
            sizes = ",".join(str(len(group["params"])) for group in self.param_groups)
            self._announced = shards.Announcement(options, f"{type(self).__name__}/{sizes}")

        def wait_for_each_other(said: str) -> bool:
            return any(f"'{word}'" in said for word in ("skip", "raise", "auto"))

        if found := self._announced.difference(wait=wait_for_each_other(options)):
            found = f"{type(self).__name__} must have the same options on all ranks: {found}"
            if wait_for_each_other(found):
                raise RuntimeError(f"{found}; they would wait for each other. Nothing was changed")
            warnings.warn(found, stacklevel=5)

    @property
    def returns(self) -> tuple[str, ...]:
        """Names of the averages: what `eval()` puts in, the others, and "average", the pull's."""
        texts = [returns_text(group["returns"]) for group in self.param_groups]
        return (*dict.fromkeys(name for text in texts for name in parse_returns(text)), AVERAGE)

    def _name(self, param: Tensor) -> str:
        """A parameter of this optimizer, for messages."""
        places = ((g, i) for g, x in enumerate(self.param_groups) for i in range(len(x["params"])))
        found = (x for x in places if self.param_groups[x[0]]["params"][x[1]] is param)
        return describe(self.param_groups, *next(found))

    def _note_frozen(self) -> None:
        """Keep in the groups, at a step, which parameters do not train."""
        for group in self.param_groups:
            places = [str(i) for i, p in enumerate(group["params"]) if not p.requires_grad]
            if places or FROZEN in group:
                group[FROZEN] = ",".join(places)

    def _refuse_copies(self, model: torch.nn.Module) -> None:
        """Raises: ValueError: this steps DeepSpeed's copies of the model's weights."""
        partitioned = any(map(shards.is_partitioned, model.parameters()))
        if partitioned or any(map(shards.is_flat_copy, self.state)):
            raise ValueError(shards.ZERO_EXPORT)

    def _groups(self) -> list[Group]:
        """The groups with what is stepped; a host may take it out of them between steps."""
        groups: list[Group] = self._host.groups() if self._host else self.param_groups
        return groups

    def _average_keys(self, name: str | None) -> dict[Tensor, str]:
        """The key of the average of this name in the state of each parameter that has one.

        None: what its group returns. A parameter without that average returns its `average`. One
        that does not train is left out, for it is returned as it is; of Elastic, where each worker
        has its own, one that never trained.
        """
        if name is not None and name not in self.returns:
            raise ValueError(f"name must be one of {', '.join(self.returns)}, got {name!r}")
        if self._host is None and any(map(shards.is_partitioned, self.state)):
            raise RuntimeError(shards.ZERO)
        found: dict[Tensor, str] = {}
        if self._state_is_provisional:
            return found
        # Where all are frozen it is for evaluation, and those count that were at the last step.
        groups = self._groups()
        params = [p for group in groups for p in group["params"]]
        frozen = {p for p in params if not p.requires_grad}
        if len(frozen) == len(params):
            frozen = {g["params"][i] for g in groups for i in frozen_places(g)}
        for group in groups:
            wanted = averages_of(group).returned if name is None else RETURN + name
            for p in group["params"]:
                state = self.state.get(p, {}) if p not in frozen or ELASTIC_STEPS in group else {}
                there = [key for key in (wanted, AVERAGE, OFFSET) if key in state]
                if there:  # it has stepped
                    found[p] = there[0]
        return found

    @torch.no_grad()
    def eval(self, name: str | None = None) -> None:
        """Put an average into the parameters; the live weights wait where the average was.

        In place, without a third copy (`paceline.swap`). Free if it is there already; parameters
        that have not stepped stay as they are. Sharded parameters take no communication.

        Args:
            name: of the average, one of `returns`. Default: the first of them, the model to return.

        Raises:
            ValueError: no average has this name.
            RuntimeError: the model's dtype was changed after the first step, or it is under ZeRO,
                and not by `paceline.integrations.deepspeed`. Nothing has changed.
        """
        averages = self._average_keys(name)
        if self.swapped:
            if self._swapped_in() == averages:
                return
            self.train()
        self._swap_in(averages)

    @torch.no_grad()
    def _swap_in(self, averages: dict[Tensor, str]) -> None:
        for p, key in averages.items():
            average = self.state[p][key]
            if why := memory.fault(p, key, average):
                raise RuntimeError(f"{self._name(p)} cannot hold its average: {why}")
            narrower = average.itemsize < p.itemsize
            if narrower != (key == OFFSET) or average.dtype not in (
                torch.bfloat16,
                torch.promote_types(p.dtype, torch.float32),
            ):
                raise RuntimeError(
                    f"a parameter of shape {tuple(p.shape)} is {p.dtype} now, which does not go "
                    f"with its {average.dtype} average; convert models before the first step"
                )
        if self._host is None and any(map(shards.is_flat_copy, averages)):
            raise RuntimeError(shards.ZERO)
        shards.drop_gathered_copies(averages)
        names = {p: key.partition(RETURN)[2] for p, key in averages.items()}
        now = {p: swap.Swapped(str(p.dtype), name) for p, name in names.items()}
        words = [swap.write_record(map(now.get, group["params"])) for group in self._groups()]
        records = list(zip(self.param_groups, words, strict=True))
        swap.swap_in(self._pairs(averages), records, fused=self._swaps_fused())
        if self._host:
            self._host.to_model()

    def _pairs(self, averages: dict[Tensor, str]) -> Iterator[tuple[Tensor, Tensor]]:
        return ((shards.local(p), shards.local(self.state[p][k])) for p, k in averages.items())

    def _swaps_fused(self) -> bool:
        """Whether a swap may take a kernel: no group does without."""
        return not any(group.get("fused") is False for group in self.param_groups)

    def _swapped_in(self, *, checked: bool = False) -> dict[Tensor, str]:
        """The key of the average that each parameter holds now, of those that hold one.

        Raises:
            RuntimeError: `checked`, and a parameter has another dtype than when it came in.
        """
        found = {}
        for group in self._groups():
            records = swap.read_record(group[swap.SWAPPED], len(group["params"]))
            for p, record in zip(group["params"], records, strict=True):
                if record is None:
                    continue
                if checked and record.dtype != str(p.dtype):
                    raise RuntimeError(
                        f"an average was swapped into a parameter of {record.dtype}, which is "
                        f"{p.dtype} now; convert it back, then call train()"
                    )
                own = AVERAGE if AVERAGE in self.state[p] else OFFSET
                found[p] = RETURN + record.average if record.average else own
        return found

    @torch.no_grad()
    def train(self) -> None:
        """Put the live weights back into the parameters. Free if they are there already.

        Raises:
            RuntimeError: the model's dtype is not that of the moment when the average came in, or
                a checkpoint's of that moment. Nothing has changed.
        """
        if not self.swapped:
            return
        swapped = self._swapped_in(checked=True)
        shards.drop_gathered_copies(swapped)
        records = [(group, "") for group in self.param_groups]
        swap.swap_back(self._pairs(swapped), records, fused=self._swaps_fused())
        if self._host:
            self._host.to_model()

    @contextmanager
    def averaged(self, name: str | None = None) -> Iterator[None]:
        """Hold an average in the parameters inside a `with`; go back whatever happens there.

        Args:
            name: as `eval` takes it.
        """
        with self.restoring():
            self.eval(name)
            yield

    @contextmanager
    def restoring(self) -> Iterator[None]:
        """Put back, at the end of a `with`, what is in the parameters now: an average, or none."""
        before = self._swapped_in() if self.swapped else None
        try:
            yield
        finally:
            if before is None:
                self.train()
            elif self._swapped_in() != before or not self.swapped:
                self.train()
                self._swap_in(before)

    def restart_averages(self) -> None:
        """Have all averages begin anew, at the next step, from what the parameters hold then.

            model.load_state_dict(best)   # other weights, in the middle of a run
            opt.restart_averages()        # else a pull goes back toward the old average

        Moments, and counts of steps, which the rules go by, stay. Until the next step there is no
        average, and `eval()` leaves the live weights.

        Raises:
            RuntimeError: an average is in the parameters. Nothing has changed then.
        """
        self._refuse_while_swapped("restart_averages")
        for state in self.state.values():
            for key in extra_keys_in(state) | begun_keys_in(state) | {AVERAGE, OFFSET}:
                state.pop(key, None)

    def choose(self, score: Callable[[], Any], *, maximize: bool = False) -> Choice:
        """Score each average and the live weights, and leave the best of them in the model.

            found = opt.choose(lambda: evaluate(model))  # a loss: the lowest wins
            torch.save(model.state_dict(), "model.pt")   # the best: found.best, by found.scores
            opt.train()                                  # the live weights again, bit for bit

        Choose on data that nothing else is measured on afterwards: the lowest of several losses is
        too low. Of equal scores the first in the order of `returns` wins.

        Where torch.distributed is initialised, all ranks must call this together, and what counts
        is the mean of the scores over ranks: the same on all of them, whether each has scored all
        of the data or an equal part.

        Args:
            score: measures the model as it is when it is called, and returns one number. It must
                not put averages in or take steps itself.
            maximize: the highest score wins, as of an accuracy.

        Raises:
            RuntimeError: there are no averages, as before the first step.
            ValueError: a score is NaN or no number. The weights are as they were before then, as
                after any exception of `score`.
        """
        averages = self._average_keys(None)
        if not averages:
            raise RuntimeError("choose() needs averages; call it after the first step")
        scores = {}
        with self.restoring():
            for name in (*self.returns, LIVE):
                self._hold(name)
                scores[name] = _score(score, name, next(iter(averages)).device)
        best = (max if maximize else min)(scores, key=scores.__getitem__)
        self._hold(best)
        return Choice(best, scores)

    def _hold(self, name: str) -> None:
        self.train() if name == LIVE else self.eval(name)

    @torch.no_grad()
    def averaged_state_dict(
        self, model: torch.nn.Module, name: str | None = None
    ) -> dict[str, Any]:
        """The returned model's `state_dict()`: a snapshot that leaves the live weights alone.

        Parameters that have stepped have their average, in the parameter's dtype; others, and
        buffers, are copied as they are. Names of one tied parameter share one tensor.

        Sharded parameters are gathered, one at a time, into the CPU memory of rank 0; all ranks
        must call this, and the others get an empty dict. To save shards as they are:
        `with opt.averaged(): torch.distributed.checkpoint.save(get_model_state_dict(model), ...)`.

        Args:
            model: the module whose parameters this optimizer steps, itself or wrapped.
            name: of the average, as `eval` takes it.

        Raises:
            ValueError: no average has this name; or the optimizer keeps averages, but none for a
                parameter of this model, or one of them does not show as itself in the model's
                `state_dict(keep_vars=True)`; or DeepSpeed's ZeRO has its weights.
        """
        self._refuse_copies(model)
        averages = self._average_keys(name)
        if self.swapped and self._swapped_in() != averages:
            with self.averaged(name):
                return self.averaged_state_dict(model, name)
        shards.drop_gathered_copies(averages)
        ours = [name for name, p in model.named_parameters() if p in averages]
        if averages and not ours:
            raise ValueError(
                f"model must hold parameters of this optimizer, got {type(model).__name__} "
                "with none of them"
            )
        returned = model.state_dict(keep_vars=True)
        snapshots: dict[Tensor, Tensor | None] = {}
        for key, value in returned.items():
            if isinstance(value, Tensor):
                if value not in snapshots:
                    source = value
                    if value in averages and not self.swapped:
                        source = self.state[value][averages[value]]
                    if source.itemsize < value.itemsize:
                        source = value.detach() + source
                    snapshots[value] = shards.gathered(source.detach().to(value.dtype, copy=True))
                returned[key] = snapshots[value]
        for key in ours:
            if model.get_parameter(key) not in snapshots:
                raise ValueError(
                    f"model must show its parameters in state_dict(), got another tensor for {key}"
                )
        return {} if None in snapshots.values() else returned  # on another rank than 0

    # ---- weights that are changed after a step ---------------------------------------------------

    @torch.no_grad()
    def register_projection(self, projection: Callable[[], object]) -> RemovableHandle:
        """Have every step end with a change of the weights that averages are to take in.

            opt.register_projection(lambda: model.weight.mul_(mask))          # pruning
            opt.register_projection(lambda: critic.weight.clamp_(-0.01, 0.01))

        A change after `step()` comes too late: the average has taken in the weights before it. This
        one is made in the step, before averages take in, without gradients. It is made once now,
        too, to the live weights, to each average, and to what LAWA and BEMA keep, so that averages
        of convex sets stay in them; BEMA's, with negative coefficients, may leave one. Register it
        anew when what it does changes, a mask for example.

        A step with a projection takes a second pass over memory, in which averages take in guarded
        coordinates, too. Copies and checkpoints do not have it: register it after loading one,
        which projects what was loaded.

        Args:
            projection: changes parameters of this optimizer in place; twice is as once.

        Returns:
            A handle whose `remove()` ends it.

        Raises:
            RuntimeError: the averaged weights are swapped in.
        """
        self._refuse_while_swapped("register_projection")
        projection()
        self._project_averages(self._keys_of_averages(), projection)
        handle = RemovableHandle(self._projections)
        self._projections[handle.id] = projection
        return handle

    def _keys_of_averages(self) -> list[str]:
        """The keys in the state of averages, and of what their rules keep."""
        own = {AVERAGE, OFFSET}
        return sorted(own.union(*(averages_of(group).extra_keys for group in self.param_groups)))

    def _project_averages(self, keys: Iterable[str], projection: Callable[[], object]) -> None:
        """Project what the state holds under these keys, by way of the parameters."""
        groups = [] if self._state_is_provisional else self.param_groups
        params = [p for group in groups for p in group["params"] if self.state.get(p)]
        for key in keys:
            held = {p: self.state[p][key] for p in params if key in self.state[p]}
            local = {shards.local(p): shards.local(x) for p, x in held.items()}
            # Of shards no rank knows whether another's have changed.
            if _project_held(local, projection) or any(map(shards.is_sharded, held)):
                for group in groups:
                    forget_history(group, AVERAGE if key == OFFSET else key)

    def _tell_of_projections(self) -> None:
        """Warn, at a load, that projections have not seen the averages that came in."""
        if self._projections:
            warnings.warn(
                "averages were loaded after register_projection(), and are as they were saved; "
                "register the projection anew, which projects them",
                stacklevel=4,
            )

    def _project(self) -> None:
        for projection in self._projections.values():
            projection()

    # ---- faults, and what a step did ----------------------------------------------------------

    def _check_gradients(self, groups: list[Group], index: int) -> None:
        """Raises: RuntimeError: a gradient in this group is sparse, or not of real floats."""
        for i, p in enumerate(groups[index]["params"]):
            grad = p.grad
            if grad is None or (grad.layout is torch.strided and grad.dtype in WIDE):
                continue
            kind = str(grad.dtype) if grad.layout is torch.strided else "sparse"
            kind = "complex" if grad.is_complex() else kind
            raise RuntimeError(
                f"{type(self).__name__} does not support {kind} gradients, got one in "
                f"{describe(groups, index, i)}; nothing was changed"
            )

    def _skips_step(self) -> bool | Tensor:
        """Whether groups with nonfinite="skip" skip the step; a tensor if a device decides that.

        Raises:
            FloatingPointError: a gradient of a group with nonfinite="raise" is not finite.
        """
        modes = {group["nonfinite"] for group in self.param_groups}
        if not modes & {"raise", "skip"}:
            return False
        # Once: it may send messages, in which all ranks take part.
        checked = [
            (group["nonfinite"], g, i, shards.local_grad(p))
            for g, group in enumerate(self.param_groups)
            for i, p in enumerate(group["params"])
            if group["nonfinite"] in ("raise", "skip") and p.grad is not None
        ]
        devices = [p.device for group in self.param_groups for p in group["params"]]
        no = torch.zeros((), dtype=torch.bool, device=devices[0] if devices else None)
        flags = []
        for mode in ("raise", "skip"):
            alike = defaultdict(list)  # of one device and dtype
            for wanted, *_, grad in checked:
                if wanted == mode:
                    alike[grad.device, grad.dtype].append(grad)
            bad = [~squared_norm(grads).isfinite() for grads in alike.values()]
            flags.append(torch.stack([no, *(x.to(no.device) for x in bad)]).any())
        raises, skips = self._on_any_rank(torch.stack(flags))
        if "raise" in modes and raises:
            where = "a parameter on another rank"
            for mode, g, i, grad in reversed(checked):
                if mode == "raise" and not squared_norm([grad]).isfinite():
                    where = describe(self.param_groups, g, i)
            raise FloatingPointError(f"the gradient of {where} is not finite; nothing was changed")
        on_device = all(device.type != "cpu" for device in devices)
        return skips if on_device and "skip" in modes else bool(skips)

    def _on_any_rank(self, flags: Tensor) -> Tensor:
        """Which flags are up on any rank that steps with this one; of Elastic, in its worker."""
        if not any(ELASTIC_STEPS in group for group in self.param_groups):
            return shards.on_any_rank(flags)
        params = (p for group in self.param_groups for p in group["params"])
        return shards.total(flags.int(), next(filter(shards.is_sharded, params), flags)) > 0

    def _count_faults(self, guarded: list[int | Tensor], skip: bool | Tensor) -> None:
        """Add to what `stats()` tells, without waiting for a device.

        Args:
            guarded: coordinates that the guard kept as they were, in parts.
            skip: whether the step was skipped.
        """
        tensors = [x for x in (*guarded, skip) if isinstance(x, Tensor)]
        if not tensors and not any((*guarded, skip)):
            return
        if self._counts is None:
            self._counts = torch.zeros(3, dtype=torch.int64)
        # The host's numbers go to a device, never the other way.
        for device in {x.device for x in tensors if x.device.type != "cpu"}:
            if self._counts.device.type == "cpu":
                self._counts = self._counts.to(device)
        total = sum(x.to(self._counts.device) if isinstance(x, Tensor) else x for x in guarded)
        for count, n in zip(self._counts.unbind(), (total, total > 0, skip), strict=True):
            count.add_(n)

    def stats(self) -> dict[str, Any]:
        """Faults met so far, and what the last step did if `track_stats=True`.

        Returns:
            Since this object was made: `guarded_steps` in which non-finite gradients held
            coordinates, `guarded_coordinates`, how many in all (of sharded parameters, this
            rank's), and `skipped_steps`.

            Of the last step, if tracked: `gain_mean`, `gain_min`, `gain_max` of λ over coordinates;
            `clipped`, the fraction of coordinates that the clip holds at 1; 2-norms `adamw_norm` of
            the AdamW step, `pull_norm` of the pull and `update_norm` of the whole update;
            `distance`, the 2-norm of live weights minus average after the step (LAWA's and BEMA's
            from before they took it in). Over all tracked parameters that had a gradient, and under
            "groups" the same for each group, or None for one that had none on this rank. Guarded
            coordinates are among them with a gradient of 0. A rank that holds no coordinate of
            any group has none of these.
        """
        counts = [0, 0, 0] if self._counts is None else self._counts.tolist()
        names = ("guarded_coordinates", "guarded_steps", "skipped_steps")
        numbers: dict[str, Any] = _as_numbers(self._stats or {})
        return dict(zip(names, counts, strict=True)) | numbers

    # ---- distributed, and checkpoints ----------------------------------------------------------

    def _begin_averages(self, group: Group, param: Tensor) -> None:
        """Have a parameter that has not stepped hold averages, which begin from its weights."""
        raise NotImplementedError

    def _drop_provisional_state(self) -> None:
        """Have averages begin from what is in the parameters now, if no step has been taken."""
        if self._state_is_provisional:
            self.state.clear()
            self._state_is_provisional = False

    def _is_state_probe(self) -> list[tuple[Group, Tensor]]:
        """Parameters with their groups, if this is a step that only asks for state; else none.

        `torch.distributed.checkpoint` has an optimizer without state step on gradients of zeros at
        a rate of 0, to see its state or to load into it. Such a step must not count. DeepSpeed's
        ZeRO, which steps one group at a time, does not do so.
        """
        stepped = [(g, p) for g in self.param_groups for p in g["params"] if p.grad is not None]
        if self.state or any(shards.is_flat_copy(p) for _, p in stepped):
            return []
        for lr in (group.get("lr", 1.0) for group, _ in stepped):
            if (isinstance(lr, Tensor) and lr.device.type != "cpu") or lr != 0:
                return []
        # Shards first: of those all ranks see the same, and must look together.
        for _, p in sorted(stepped, key=lambda x: not shards.is_sharded(x[1])):
            found = p.grad.any()
            if bool(shards.full(found) if shards.is_sharded(found) else found):
                return []
        return stepped

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """torch's: `state` by parameter and `param_groups`; tensors, numbers and strings.

        Saved while the average is swapped in it says so, and goes with model weights saved at the
        same time.
        """
        state = super().state_dict()
        for group in state["param_groups"]:
            # Schedulers leave NumPy's floats, and engines refuse what is no number or string.
            group |= {key: float(x) for key, x in group.items() if isinstance(x, float)}
            if isinstance(group["averaging"], Averaging):
                group["averaging"] = str(group["averaging"])
            group["returns"] = returns_text(group["returns"])
            if group.get("state_dtype") is not None:
                group["state_dtype"] = str(group["state_dtype"]).removeprefix("torch.")
        return state


class Around(AveragedOptimizer):
    """One that steps another optimizer, on that one's own `state` and `param_groups`."""

    base: Optimizer
    _own_option: str  # one that it adds to each group

    def _forget(self) -> None:
        super()._forget()
        self._calls_base = False
        ours = weakref.ref(self)
        for register, called in (
            (self.base.register_step_pre_hook, "step"),
            (self.base.register_load_state_dict_pre_hook, "load_state_dict"),
        ):
            register(partial(_refuse_past, ours, called))

    @contextmanager
    def _calling_base(self) -> Iterator[None]:
        """In it the base's own methods may be called."""
        self._calls_base = True
        try:
            yield
        finally:
            self._calls_base = False

    # The same objects as the base's, whoever assigns new ones.

    @property
    def state(self) -> Any:
        """The base's state, with ours in it."""
        return self.base.state

    @state.setter
    def state(self, value: Any) -> None:
        self.base.state = value

    @property
    def param_groups(self) -> Any:
        """The base's groups, with our options in them.

        Raises:
            RuntimeError: a group was added to the base past this optimizer.
        """
        for index, group in enumerate(groups := self.base.param_groups):
            if self._own_option not in group:
                base, name = type(self.base).__name__, type(self).__name__
                raise RuntimeError(
                    f"{base}.add_param_group() went past the {name} around it with group {index}: "
                    f"take that group out of the {base}'s param_groups, and add it with "
                    "add_param_group() of the optimizer that you step"
                )
        return groups

    @param_groups.setter
    def param_groups(self, value: Any) -> None:
        self.base.param_groups = value

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The base's own."""
        self.base.zero_grad(set_to_none)

    def _base_step(self, *arguments: Any, **options: Any) -> Any:
        """The base's step with its own hooks; those on all optimizers run around ours."""
        base: Any = self.base
        step: Any = type(base).step
        torchs = getattr(step, "__code__", None) is HOOKED
        with self._calling_base():
            if not torchs or "step" in vars(base):  # another has wrapped it
                return base.step(*arguments, **options)
            step = step.__wrapped__  # without torch's hooks
            given: tuple[Any, ...] = (base, *arguments)
            for hook in list(base._optimizer_step_pre_hooks.values()):
                changed = hook(base, given, options)
                given, options = (given, options) if changed is None else changed
            loss = step(*given, **options)
            for hook in list(base._optimizer_step_post_hooks.values()):
                hook(base, given, options)
            return loss


def refuse_layouts(groups: list[Group], index: int, error: type[Exception]) -> None:
    """Raises: `error`: FSDP1 holds a parameter of this group, or ranks are yet to add it up."""
    for i, p in enumerate(groups[index]["params"]):
        if reason := shards.reason_against(p):
            where = describe(groups, index, i)
            raise error(f"{reason}, got {where}; nothing was changed")


def _refuse_past(
    around: "weakref.ref[Around]", called: str, base: Optimizer, *_arguments: Any
) -> None:
    """A hook of a base.

    Raises:
        RuntimeError: it is called by others than the optimizer around it, where there is one still.
    """
    ours = around()
    if ours is not None and not ours._calls_base:
        name = type(ours).__name__
        raise RuntimeError(
            f"{type(base).__name__}.{called}() goes past the {name} around it, whose averages "
            f"would not follow: call {name}.{called}(); nothing was changed"
        )


def _score(score: Callable[[], Any], name: str, device: torch.device) -> float:
    """What `score` returns, as the mean over ranks.

    Raises:
        ValueError: it is no number on some rank.
    """
    found, failed = None, None
    try:
        found = score()
    except Exception as error:  # the other ranks wait for a number
        failed = error
    value = number(found, tensors=True)
    mean = shards.mean_over_ranks(value, device)
    if failed is not None:
        raise failed
    if math.isnan(mean):
        here = f"{found!r} for {name!r}" if math.isnan(value) else f"none for {name!r} on a rank"
        raise ValueError(f"score must return one number that is not NaN, got {here}")
    return mean


def _project_held(held: dict[Tensor, Tensor], projection: Callable[[], object]) -> bool:
    """Project what the state holds of parameters, by way of the parameters.

    Returns whether that changed any of it.

    Args:
        held: this rank's part of each parameter, with a tensor like it, or an offset from it.
        projection: of the parameters.
    """
    live, changed = {p: p.clone() for p in held}, False
    try:
        for p, x in held.items():
            p.copy_(live[p] + x if x.itemsize < p.itemsize else x)
        before = {p: p.clone() for p in held}
        projection()
        after = {p: p.clone() for p in held}
    finally:
        for p, weights in live.items():
            p.copy_(weights)
    for p, x in held.items():
        now = after[p].to(x.dtype)
        if x.itemsize < p.itemsize:
            now = (after[p] - p).to(x.dtype)
            now = torch.where((p + now) - now == p, now, 0.0)  # what a swap gives back
        now = torch.where(after[p] == before[p], x, now)
        changed = changed or not torch.equal(now, x)
        x.copy_(now)
    return changed


def summarize(
    measured: list[list[dict[str, Tensor]]], *, own_step: str = "adamw_norm"
) -> dict[str, Any] | None:
    """Batches' measurements as those of each group and of all; tensors, so that no device waits.

    `own_step` is the name of the norm of what was done without the pull.
    """

    def summary(batches: list[dict[str, Tensor]]) -> dict[str, Any] | None:
        if not batches:
            return None
        device = batches[0]["count"].device

        def over(key: str) -> Tensor:
            return torch.stack([batch[key].to(device, torch.float32) for batch in batches])

        count = over("count").sum().clamp_min(1)
        return {
            "gain_mean": over("gain_sum").sum() / count,
            "gain_min": over("gain_min").min(),
            "gain_max": over("gain_max").max(),
            "clipped": over("clipped").sum() / count,
            own_step: over("adamw_sq").sum().sqrt(),
            "pull_norm": over("pull_sq").sum().sqrt(),
            "update_norm": over("update_sq").sum().sqrt(),
            "distance": over("distance_sq").sum().sqrt(),
        }

    tracked = [[batch for batch in group if batch] for group in measured]
    overall = summary([batch for group in tracked for batch in group])
    return None if overall is None else {**overall, "groups": [summary(group) for group in tracked]}


def _as_numbers(value: Any) -> Any:
    """Tensors inside dicts and lists as plain floats."""
    if isinstance(value, dict):
        return {key: _as_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_as_numbers(item) for item in value]
    return value.item() if isinstance(value, Tensor) else value
