"""Averages of a run on the disk, from which others can be rebuilt after it.

    step-600/slow.safetensors     an average, by the name that `returns` gives it
    step-600/average.safetensors  the one that the pull goes toward
    step-600/checksums.json       of both

Each file has, in the metadata `paceline_snapshot`, what it is an average of: an object with

    run     a word, the same for all snapshots in a folder
    name    of the average
    rule    its text
    step    t, the steps that it has seen
    begun   the t at which it began, 0 if it began with its tensors
    others  of tensors for which these differ: the tensor's name -> [rule, step, begun]
    tied    further names of tensors in the model: each -> the name that the file has

`paceline average` reads them (`paceline.train.rebuild`).
"""

import json
import logging
import os
import re
import secrets
import tempfile
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import shards
from .base import AveragedOptimizer
from .files import remove, whole
from .hosts import unwrapped
from .loading import WRAPPERS
from .options import Group
from .safetensors import Form, in_order, read_metadata, write_safetensors
from .state import AVERAGE, BEGUN, HISTORY, OFFSET, averages_of, read_history, taken_in
from .sums import write_sums
from .synthesis import snapshot_steps

SNAPSHOT = "paceline_snapshot"
STEP = re.compile(r"step-(\d+)")  # a folder's name
DTYPES = (torch.float32, torch.bfloat16)
PROBE = 8 * 2**20  # bytes


@torch.no_grad()
def save_averages(
    folder: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Any,
    *,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write the averages of an optimizer to a folder step-N, whole or not at all.

        returns = {"fast": "ema:kappa=0.5", "slow": "ema:kappa=0.9"}
        opt = PACE(model.parameters(), lr=1e-3, pullback=0.1, returns=returns)
        times = snapshot_steps(steps, 12)
        ...
            if step in times:
                save_averages("run/averages", model, opt)

    They are of the parameters that have stepped: of a LoRA run the adapters alone. Sharded
    parameters are gathered one at a time. On several ranks all call this, and rank 0 writes.

    Averages of rules that keep more tensors (LAWA and BEMA) are left out. So is, with a warning,
    one that has had several rules, that `register_projection` has changed, or of which it is not
    known when it began: torch's distributed checkpoint may lose that.

    Args:
        folder: of the snapshots of this run alone; it is made if it is not there. A step-N that is
            there is replaced, as after a resume.
        model: the module whose parameters the optimizer steps, itself or wrapped.
        optimizer: PACE or Pullback, or a wrapper that has it as `optimizer`, as accelerate's.
        dtype: torch.float32, or torch.bfloat16, which takes half, and costs accuracy where the
            averages are closer together than its 8 bits (docs/choose.md).

    Returns:
        The folder step-N.

    Raises:
        ValueError: the dtype is another; the optimizer keeps no averages, or none of this model or
            of such rules; or DeepSpeed's ZeRO has its weights.
        OSError: it cannot be written; what was there before still is.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be torch.float32 or torch.bfloat16, got {dtype}")
    optimizer = unwrapped(optimizer)
    if not isinstance(optimizer, AveragedOptimizer):
        raise ValueError(f"optimizer must be PACE or Pullback, got {type(optimizer).__name__}")
    optimizer._refuse_copies(model)
    with optimizer.restoring():
        optimizer.train()
        found = {name: _members(model, optimizer, name) for name in optimizer.returns}
        found = _without_doubles({name: x for name, x in found.items() if x})
        if not found:
            raise ValueError(
                "optimizer must keep averages of this model's parameters, of one rule each, other "
                "than LAWA and BEMA, got none"
            )
        step = max(step for members in found.values() for *_, (_, step, _) in members.values())
        path = Path(folder) / f"step-{step}"
        if shards.rank() != 0:
            for members in found.values():
                deque(_tensors(members, dtype), maxlen=0)
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        facts = {"run": _run_of(path), "tied": _tied(model)}
        with whole(path) as partial:
            partial.mkdir()
            for name, members in found.items():
                _write(partial / f"{name}.safetensors", members, dtype, facts | {"name": name})
            write_sums(partial)
    return path


def averages_bytes(optimizer: Any, *, dtype: torch.dtype = torch.float32) -> int:
    """The bytes of one snapshot of an optimizer, before its first step, too: of all its averages.

    Of each group those that it returns and the pull's; of parameters that require a gradient.
    """
    return sum(
        p.numel() * dtype.itemsize
        for group in unwrapped(optimizer).param_groups
        for p in group["params"]
        if p.requires_grad
        if not (averages := averages_of(group)).still
        for rule in set(averages.rules.values())
        if not rule.keeps
    )


class Snapshots:
    """Keeps the averages of an optimizer at some steps of a run, closer together toward its end.

    A host calls `begin` before the first step, and `keep` after each.

    Attributes:
        steps: at which they are kept.
        bytes: of one snapshot.
        seconds: that this process has spent on writing them.
        tell: is given a line with the cost, before the first step. Default: the log.

    Args:
        count: how many.
        folder: of the snapshots; of an earlier run there must be none in it.
        dtype: torch.float32 or torch.bfloat16.
    """

    def __init__(self, count: int, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        self.count, self.folder, self.dtype = count, folder, dtype
        self.steps: list[int] = []
        self.bytes, self.seconds = 0, 0.0
        self.tell: Callable[[str], object] = logging.getLogger(__name__).info

    def begin(self, optimizer: Any, step: int, steps: int) -> None:
        """Refuse what cannot be kept; remove what a resumed run had kept after its checkpoint.

        Args:
            optimizer: PACE or Pullback, or a wrapper of it.
            step: that the run goes on from; 0 of a new one.
            steps: of the whole run.

        Raises:
            ValueError: the optimizer has no average to keep, or the folder is of another run.
        """
        optimizer = unwrapped(optimizer)
        average = isinstance(optimizer, AveragedOptimizer)
        self.bytes = averages_bytes(optimizer, dtype=self.dtype) if average else 0
        if not self.bytes:
            raise ValueError(
                "snapshots needs PACE or Pullback with an average of another rule than LAWA and "
                f"BEMA, got {type(optimizer).__name__}"
            )
        if optimizer._host:
            raise ValueError("snapshots must be 0 under DeepSpeed's ZeRO, which keeps flat copies")
        for path in [*self.folder.iterdir()] if self.folder.is_dir() else []:
            found = STEP.fullmatch(path.name)
            if found and not step:
                raise ValueError(
                    f"{self.folder} has snapshots of an earlier run; resume that, or name another "
                    "folder"
                )
            if found and int(found[1]) > step and shards.rank() == 0:
                remove(path)
        self.steps = snapshot_steps(steps, self.count)
        size, count = self.bytes / 2**20, len(self.steps)
        if shards.rank() == 0:
            seconds = self.bytes / _writing_speed(self.folder)
            self.tell(
                f"Snapshots of the averages: {count} of {size:.4g} MiB each, "
                f"{count * size:.4g} MiB in all, in {self.folder}; to write one takes some "
                f"{seconds:.2g} s."
            )

    def keep(self, step: int, model: nn.Module, optimizer: Any) -> None:
        """Keep them if it is time."""
        if step in self.steps:
            began = time.perf_counter()
            save_averages(self.folder, model, optimizer, dtype=self.dtype)
            self.seconds += time.perf_counter() - began


def _writing_speed(folder: Path) -> float:
    """Bytes a second that a disk takes, by a file of 8 MiB that is removed again."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    with tempfile.TemporaryFile(dir=there) as file:
        began = time.perf_counter()
        file.write(bytes(PROBE))
        file.flush()
        os.fsync(file.fileno())
        return PROBE / (time.perf_counter() - began)


Kind = tuple[str, int, int]  # rule, step, and the one at which it began
Member = tuple[Tensor, dict[str, Any], str, Kind]  # parameter, state, key, and what it is


def _members(model: nn.Module, optimizer: AveragedOptimizer, name: str) -> dict[str, Member]:
    """The parameters of a model that have an average of this name, by their names."""
    keys = optimizer._average_keys(name)
    groups: dict[Tensor, Group] = {p: g for g in optimizer.param_groups for p in g["params"]}
    found: dict[str, Member] = {}
    known: dict[tuple[int, str], bool] = {}  # by group and key
    for full, p in model.named_parameters():
        if p not in keys:
            continue
        state, own = optimizer.state[p], AVERAGE if keys[p] == OFFSET else keys[p]
        rule = averages_of(groups[p]).rules[own]
        if rule.keeps:
            continue
        if (place := (id(groups[p]), own)) not in known:
            known[place] = _is_known(optimizer, groups[p], own, str(rule))
        if not known[place]:
            warnings.warn(
                f"the average {name!r} is left out of the snapshot: it has not had one rule since "
                "it began, or when that was is not known",
                stacklevel=4,
            )
            return {}
        begun = int(state.get(BEGUN + own, 0))
        found[WRAPPERS.sub("", full)] = (p, state, keys[p], (str(rule), taken_in(state), begun))
    return found


def _without_doubles(found: dict[str, dict[str, Member]]) -> dict[str, dict[str, Member]]:
    """Averages by name, without those that are what another is: the pull's is often returned."""
    kinds = {name: {n: kind for n, (*_, kind) in x.items()} for name, x in found.items()}
    first = {str(kind): name for name, kind in reversed(kinds.items())}
    return {name: x for name, x in found.items() if first[str(kinds[name])] == name}


def _is_known(optimizer: AveragedOptimizer, group: Group, key: str, rule: str) -> bool:
    """Whether an average of a group has had one rule since it began, and it is known when."""
    had, late = read_history(group.get(HISTORY)).get(key, (None, False))
    states = [optimizer.state.get(p, {}) for p in group["params"]]
    return had == rule and (not late or any(BEGUN + key in state for state in states))


def _tied(model: nn.Module) -> dict[str, str]:
    """Further names of a model's parameters -> the name that `named_parameters` has first."""
    first: dict[Tensor, str] = {}
    tied = {}
    for full, p in model.named_parameters(remove_duplicate=False):
        name = WRAPPERS.sub("", full)
        if first.setdefault(p, name) != name:
            tied[name] = first[p]
    return tied


def _tensors(members: dict[str, Member], dtype: torch.dtype) -> Iterator[Tensor]:
    """Each average, whole and on the CPU, as a file has them; empty on other ranks than 0."""
    for name in in_order(_forms(members, dtype)):
        p, state, key, _ = members[name]
        if shards.rank() != 0 and not shards.is_sharded(p):
            continue
        average = p.detach() + state[key] if key == OFFSET else state[key]
        gathered = shards.gathered(average.to(dtype))
        yield torch.empty(0) if gathered is None else gathered.cpu().contiguous()


def _forms(members: dict[str, Member], dtype: torch.dtype) -> dict[str, Form]:
    return {name: Form(dtype, tuple(p.shape)) for name, (p, *_) in members.items()}


def _write(
    path: Path, members: dict[str, Member], dtype: torch.dtype, facts: dict[str, Any]
) -> None:
    kinds = {name: kind for name, (*_, kind) in members.items()}
    [(most, _)] = Counter(kinds.values()).most_common(1)
    others = {name: kind for name, kind in kinds.items() if kind != most}
    facts = {**facts, **dict(zip(("rule", "step", "begun"), most, strict=True)), "others": others}
    tensors = _tensors(members, dtype)
    try:
        metadata = {SNAPSHOT: json.dumps(facts)}
        write_safetensors(path, _forms(members, dtype), tensors, metadata)
    finally:
        deque(tensors, maxlen=0)  # the other ranks wait for each


def _run_of(path: Path) -> str:
    """The word of the run whose snapshot a folder step-N is to be; a new one if it is the first."""
    step = int(path.name.removeprefix("step-"))
    run = None
    for other in path.parent.iterdir():
        if not (found := STEP.fullmatch(other.name)) or int(found[1]) == step:
            continue
        if int(found[1]) > step:
            warnings.warn(
                f"{other} is of a later step than {step}: if it is of another run, give this one a "
                "folder of its own",
                stacklevel=4,
            )
            continue
        for file in other.glob("*.safetensors"):
            with suppress(OSError, ValueError, TypeError, KeyError):
                run = str(json.loads(read_metadata(file)[SNAPSHOT])["run"])
    return run or secrets.token_hex(4)
