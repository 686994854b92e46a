"""What optimizers that keep an average have in common: swap in and out, export, faults."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from . import shards
from .averaging import Averaging
from .options import Group, decoded, describe, encoded
from .swap import swap_back, swap_in
from .update import squared_norm


class AveragedOptimizer(Optimizer):
    """An optimizer that keeps, for each parameter, the model to return as `state[p]["average"]`.

    Or as `"offset"`, which is the average minus the live weights. A subclass steps.
    """

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_stats" not in self.__dict__:  # unpickled or copied
            self._forget()
            self._rehearsed = bool(state.get("_rehearsed"))

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_rehearsed": self._rehearsed}

    def _forget(self) -> None:
        self._stats: dict[str, Any] | None = None
        self._counts: Tensor | None = None  # guarded coordinates, guarded steps, skipped steps
        self._rehearsed = False

    # ---- the model to return ------------------------------------------------------------------

    @property
    def swapped(self) -> bool:
        """Whether the average is in the parameters now, and the live weights are put aside."""
        return any(group.get("swapped") for group in self.param_groups)

    def _refuse_while_swapped(self) -> None:
        if self.swapped:
            raise RuntimeError(
                "step() was called while the averaged weights are in the model; call train() "
                "first. Nothing was changed"
            )

    def _averages(self) -> dict[Tensor, Tensor]:
        """Parameter -> average or offset, for those that keep one and have stepped."""
        kept = {
            p: self.state[p].get("average", self.state[p].get("offset"))
            for group in self.param_groups
            if group.get("average", True) and not self._rehearsed
            for p in group["params"]
            if p in self.state
        }
        return {p: average for p, average in kept.items() if average is not None}

    @torch.no_grad()
    def eval(self) -> None:
        """Put the average into the parameters; the live weights wait where the average was.

        In place, without a third copy (`paceline.swap`). Free if it is there already; parameters
        that keep no average or have not stepped stay as they are. Sharded parameters take no
        communication.

        Raises:
            RuntimeError: the model's dtype was changed after the first step. Nothing has changed.
        """
        if self.swapped:
            return
        averages = self._averages()
        for p, average in averages.items():
            narrower = average.itemsize < p.itemsize
            if narrower != ("offset" in self.state[p]) or average.dtype not in (
                torch.bfloat16,
                torch.promote_types(p.dtype, torch.float32),
            ):
                raise RuntimeError(
                    f"a parameter of shape {tuple(p.shape)} is {p.dtype} now, which does not go "
                    f"with its {average.dtype} average; convert models before the first step"
                )
        shards.drop_gathered_copies(averages)
        swap_in((shards.local(p), shards.local(average)) for p, average in averages.items())
        for group in self.param_groups:
            group["swapped"] = encoded(
                str(p.dtype) if p in averages else "" for p in group["params"]
            )

    @torch.no_grad()
    def train(self) -> None:
        """Put the live weights back into the parameters. Free if they are there already.

        Raises:
            RuntimeError: the model's dtype is not that of the moment when the average came in, or
                a checkpoint's of that moment. Nothing has changed.
        """
        if not self.swapped:
            return
        exchanged = {}
        for group in self.param_groups:
            for p, dtype in zip(group["params"], decoded(group["swapped"]), strict=False):
                if not dtype:
                    continue
                if dtype != str(p.dtype):
                    raise RuntimeError(
                        f"an average was swapped into a parameter of {dtype}, which is {p.dtype} "
                        "now; convert it back, then call train()"
                    )
                average = self.state[p].get("average", self.state[p].get("offset"))
                assert average is not None
                exchanged[p] = average
        shards.drop_gathered_copies(exchanged)
        swap_back((shards.local(p), shards.local(average)) for p, average in exchanged.items())
        for group in self.param_groups:
            group["swapped"] = ""

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Hold the average in the parameters inside a `with`; go back whatever happens there."""
        restore = self.eval if self.swapped else self.train
        self.eval()
        try:
            yield
        finally:
            restore()

    @torch.no_grad()
    def averaged_state_dict(self, model: torch.nn.Module) -> dict[str, Any]:
        """The returned model's `state_dict()`: a snapshot that leaves the live weights alone.

        Averaged parameters have their average in the parameter's dtype; frozen parameters, those
        that keep no average, and buffers are copied as they are. Names of one tied parameter share
        one tensor.

        Sharded parameters are gathered, one at a time, into the CPU memory of rank 0; all ranks
        must call this, and the others get an empty dict. To save shards as they are:
        `with opt.averaged(): torch.distributed.checkpoint.save(get_model_state_dict(model), ...)`.

        Args:
            model: the module whose parameters this optimizer steps, itself or wrapped.

        Raises:
            ValueError: the optimizer keeps averages, but none for a parameter of this model, or one
                of them does not show as itself in the model's `state_dict(keep_vars=True)`.
        """
        averages = self._averages()
        shards.drop_gathered_copies(averages)
        ours = [name for name, p in model.named_parameters() if p in averages]
        if averages and not ours:
            raise ValueError(
                f"model must hold parameters of this optimizer, got {type(model).__name__} "
                "with none of them"
            )
        returned = model.state_dict(keep_vars=True)
        snapshots: dict[Tensor, Tensor | None] = {}
        for name, value in returned.items():
            if isinstance(value, Tensor):
                if value not in snapshots:
                    source = value if self.swapped else averages.get(value, value)
                    if source.itemsize < value.itemsize:
                        source = value.detach() + source
                    snapshots[value] = shards.gathered(source.detach().to(value.dtype, copy=True))
                returned[name] = snapshots[value]
        for name in ours:
            if model.get_parameter(name) not in snapshots:
                raise ValueError(
                    f"model must show its parameters in state_dict(), got another tensor for {name}"
                )
        return {} if None in snapshots.values() else returned  # on another rank than 0

    # ---- faults, and what a step did ----------------------------------------------------------

    def _check_gradients(self) -> None:
        for g, group in enumerate(self.param_groups):
            for i, p in enumerate(group["params"]):
                if p.grad is not None and (p.grad.layout != torch.strided or p.grad.is_complex()):
                    kind = "complex" if p.grad.is_complex() else "sparse"
                    raise RuntimeError(
                        f"{type(self).__name__} does not support {kind} gradients, got one in "
                        f"{describe(self.param_groups, g, i)}; nothing was changed"
                    )

    def _judge_gradients(self) -> bool | Tensor:
        """Whether groups with nonfinite="skip" skip the step; a tensor if a device decides that."""
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
        raises, skips = shards.on_any_rank(torch.stack(flags))
        if "raise" in modes and raises:
            where = "a parameter on another rank"
            for mode, g, i, grad in reversed(checked):
                if mode == "raise" and not squared_norm([grad]).isfinite():
                    where = describe(self.param_groups, g, i)
            raise FloatingPointError(f"the gradient of {where} is not finite; nothing was changed")
        on_device = all(device.type != "cpu" for device in devices)
        return skips if on_device and "skip" in modes else bool(skips)

    def _count_faults(self, held: list[int | Tensor], skip: bool | Tensor) -> None:
        """Add to what `stats()` tells, without waiting for a device."""
        tensors = [x for x in (*held, skip) if isinstance(x, Tensor)]
        if not tensors and not any(held) and not skip:
            return
        if self._counts is None:
            self._counts = torch.zeros(3, dtype=torch.int64)
        # The host's numbers go to a device, never the other way.
        for device in {x.device for x in tensors if x.device.type != "cpu"}:
            if self._counts.device.type == "cpu":
                self._counts = self._counts.to(device)
        total = sum(x.to(self._counts.device) if isinstance(x, Tensor) else x for x in held)
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
            "groups" the same for each group (None for one without any). Guarded coordinates are
            among them with a gradient of 0.
        """
        counts = [0, 0, 0] if self._counts is None else self._counts.tolist()
        names = ("guarded_coordinates", "guarded_steps", "skipped_steps")
        numbers: dict[str, Any] = _as_numbers(self._stats or {})
        return dict(zip(names, counts, strict=True)) | numbers

    # ---- distributed, and checkpoints ----------------------------------------------------------

    def _rehearsal(self) -> list[tuple[Group, Tensor]]:
        """Parameters with their groups, if this is a step that only asks for state; else none.

        `torch.distributed.checkpoint` has an optimizer without state step on gradients of zeros at
        a rate of 0, to see its state or to load into it. Such a step must not count.
        """
        if self.state:
            return []
        stepped = [(g, p) for g in self.param_groups for p in g["params"] if p.grad is not None]
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
            if group.get("state_dtype") is not None:
                group["state_dtype"] = str(group["state_dtype"]).removeprefix("torch.")
        return state


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
