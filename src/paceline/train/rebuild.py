"""Averages rebuilt from snapshots of others, which `paceline.snapshots` has written."""

import json
import math
import re
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from ..averaging import Averaging
from ..safetensors import read_metadata
from ..snapshots import SNAPSHOT
from ..synthesis import LIMIT, NOISE, Snapshot, Synthesis, synthesize, walk_distance
from . import InputError, folder, reporting
from .weighted import Checkpoint, load_tensor, read_headers, weighted_sum, write

ROUNDING = {torch.float32: 2.0**-25.2, torch.bfloat16: 2.0**-9.2}  # rms, as a share of a weight
Weights = Callable[[str], Synthesis]  # of a tensor's name


class Kept(NamedTuple):
    """A snapshot of an average on the disk."""

    checkpoint: Checkpoint
    run: str
    snapshot: Snapshot
    others: dict[str, Snapshot]  # of tensors for which it is another
    tied: dict[str, str]  # further names of tensors in the model

    def of(self, tensor: str) -> Snapshot:
        """What a tensor is a snapshot of."""
        return self.others.get(tensor, self.snapshot)


# ---- reading -----------------------------------------------------------------------------------


def snapshot_files(paths: Sequence[Path]) -> list[Path]:
    """The files of snapshots that are meant; none if the paths are of iterates.

    Args:
        paths: files, folders step-N of them, or folders of those.

    Raises:
        InputError: some are of snapshots, and some are not.
    """
    files, others = [], []
    for path in paths:
        inside = [path]
        if path.is_dir():
            inside = [*sorted(path.glob("*.safetensors")), *path.glob("step-*/*.safetensors")]
        found = [file for file in inside if file.is_file() and _is_snapshot(file)]
        files += found
        others += [file for file in inside if file not in found] or [path] * (not found)
    if files and others:
        raise InputError(
            f"{files[0]} is an average at a step, and {others[0]} is not: averages are no iterates "
            "to be merged with others; give only such files, to rebuild one from them"
        )
    return sorted(files, key=lambda file: (folder.step_of(file.parent) or 0, file.name))


def _is_snapshot(file: Path) -> bool:
    try:
        return SNAPSHOT in read_metadata(file)
    except (OSError, ValueError, RecursionError):
        return False


def read_snapshots(files: Sequence[Path]) -> list[Kept]:
    """Snapshots by their headers, which must be of one run and go together.

    Raises:
        InputError: one is damaged, of another run or model, or there twice.
    """
    kept: list[Kept] = []
    for file in files:
        one = _read(file)
        for other in kept:
            _check_together(other, one)
        twins = [x for x in kept if (x.snapshot, x.others) == (one.snapshot, one.others)]
        if not twins:
            kept.append(one)
        elif twins[0].checkpoint.path.parent != file.parent:  # else two names of one average
            raise InputError(
                f"{twins[0].checkpoint.path} and {file} are both {one.snapshot}; leave one out"
            )
    return kept


def _read(file: Path) -> Kept:
    checkpoint = read_headers(file)
    try:
        facts = json.loads(read_metadata(file)[SNAPSHOT])
        others = {
            name: Snapshot(rule, step, begun)
            for name, (rule, step, begun) in facts["others"].items()
        }
        tied = {str(name): str(own) for name, own in facts["tied"].items()}
        snapshot = Snapshot(facts["rule"], facts["step"], facts["begun"])
        return Kept(checkpoint, str(facts["run"]), snapshot, others, tied)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        said = " ".join(str(error).split())
        raise InputError(
            f"{file} does not say which average it is: {type(error).__name__}: {said}"
        ) from error


def _check_together(a: Kept, b: Kept) -> None:
    first, second = a.checkpoint, b.checkpoint
    if a.run != b.run:
        raise InputError(
            f"{first.path} is of the run {a.run} and {second.path} of {b.run}; give snapshots of "
            "one run"
        )
    for name in sorted(first.tensors.keys() | second.tensors.keys()):
        shapes = [
            x.tensors[name].form.shape if name in x.tensors else None for x in (first, second)
        ]
        if shapes[0] != shapes[1]:
            said = ["missing" if x is None else f"of shape {x}" for x in shapes]
            raise InputError(
                f"tensor {name!r} is {said[0]} in {first.path} and {said[1]} in {second.path}"
            )


# ---- the weights -------------------------------------------------------------------------------


def weights_of(
    kept: Sequence[Kept], rule: Averaging, noise: float | None = None, limit: float = LIMIT
) -> Weights:
    """How to rebuild each tensor of an average at the last step of the snapshots.

    Args:
        kept: the snapshots.
        rule: of the average.
        noise: what `rounding_noise` has found of them, if that is known.
        limit: of the expected error.

    Raises (also what is returned):
        InputError: it cannot be rebuilt from them; the line names the nearest that can.
    """
    noise = rounding_noise(kept) if noise is None else noise
    found: dict[tuple[Snapshot, ...], Synthesis] = {}

    def weights(tensor: str) -> Synthesis:
        snapshots = tuple(one.of(tensor) for one in kept)
        if snapshots not in found:
            with reporting("rule", ValueError):
                found[snapshots] = synthesize(snapshots, rule, noise=noise, limit=limit)
        return found[snapshots]

    return weights


def rounding_noise(kept: Sequence[Kept]) -> float:
    """The rounding error of a snapshot, as a share of what one step moves the weights by.

    Measured on the last snapshot and the one before it in time or of another rule, as if the
    weights had walked.
    """
    *_, last = kept
    others = [one for one in kept if walk_distance(one.snapshot, last.snapshot) > 0]
    if not others:
        return NOISE
    other = max(others, key=lambda one: one.snapshot.step)
    square, moved = 0.0, 0.0
    dtypes = {x.form.dtype for one in kept for x in one.checkpoint.tensors.values()}
    for name in last.checkpoint.tensors:
        x, y = (load_tensor(one.checkpoint, name).float() for one in (last, other))
        square += float(x.square().sum(dtype=torch.float64))
        moved += float((x - y).square().sum(dtype=torch.float64))
    if not moved:
        return NOISE
    unit = max(ROUNDING.get(dtype, 0.0) for dtype in dtypes)
    step = math.sqrt(moved) / walk_distance(other.snapshot, last.snapshot)
    return unit * math.sqrt(square) / step


# ---- the command -------------------------------------------------------------------------------


def rebuild(
    kept: Sequence[Kept],
    rule: Averaging,
    out: Path,
    model: Path | None,
    dtype: str | None,
    console: Console,
) -> None:
    """Print the snapshots with their weights, and write the average, whole or not at all.

    Args:
        kept: the snapshots.
        rule: of the average.
        out: a .safetensors file, or the folder of a model.
        model: the folder of the model whose weights the average replaces, for a folder.
        dtype: of floating-point tensors. By default float32 in a file, and the model's in a folder.
        console: for the table and a bar.

    Raises:
        InputError: something given cannot be used; nothing is written then.
    """
    last = kept[-1]
    like, names = model_like(last, out, model)
    weights = weights_of(kept, rule)
    found = {name: weights(name) for name in last.checkpoint.tensors}
    main = weights(next(name for name in last.checkpoint.tensors if name not in last.others))
    error = max(x.error for x in found.values())

    table = Table(box=MARKDOWN)
    table.add_column("snapshot", overflow="fold")
    table.add_column(str(rule), justify="right", no_wrap=True)
    for one, weight in zip(kept, main.weights, strict=True):
        table.add_row(Text(f"{one.checkpoint.path}, {one.snapshot.rule}"), f"{weight:.4g}")
    console.print(table)
    console.print(f"Expected error: {error:.2%} of the average's distance from the live weights.")
    facts: dict[str, Any] = {
        "rule": str(rule),
        "rebuilt_at_step": last.snapshot.step,
        "expected_error": error,
        "snapshots": [f"{one.checkpoint.path}, {one.snapshot}" for one in kept],
        "weights": list(main.weights),
        "dtype": dtype or ("float32" if like.kind == "a file" else "as in the model"),
        "paceline": version("paceline"),
    }

    tensor = rebuilt_tensor(kept, weights, like, names)
    write(out, like, tensor, facts, console, dtype or ("float32" * (like.kind == "a file") or None))


def rebuilt_tensor(
    kept: Sequence[Kept], weights: Weights | None, like: Checkpoint, names: dict[str, str]
) -> Callable[[str, torch.dtype], Tensor]:
    """From a name and a dtype a tensor of a model: rebuilt, or as it was if it has not trained.

    Args:
        kept: the snapshots.
        weights: how to rebuild each tensor; None: all are as they were.
        like: the model.
        names: of its tensors that are rebuilt, the names in the snapshots.
    """
    checkpoints = [one.checkpoint for one in kept]

    def tensor(name: str, dtype: torch.dtype) -> Tensor:
        own = names.get(name)
        if own is None or weights is None:
            return load_tensor(like, name).to(dtype)
        return weighted_sum(own, checkpoints, weights(own).weights, dtype)

    return tensor


def model_like(kept: Kept, out: Path, model: Path | None) -> tuple[Checkpoint, dict[str, str]]:
    """What the result is made like; and of its tensors that are rebuilt, their names in snapshots.

    Raises:
        InputError: a model is needed and there is none, or it is not that of the snapshots.
    """
    last = kept.checkpoint
    if out.suffix == ".safetensors":
        if model is not None:
            raise InputError(f"model: leave it out where the average is written to a file, {out}")
        return last, {name: name for name in last.tensors}
    near = last.path.parent.parent.parent / folder.MODEL
    if model is None and not near.is_dir():
        raise InputError(
            "model: give the folder of the model that the snapshots are of, or let out end in "
            ".safetensors"
        )
    like = read_headers(model or near)
    names = {name: name for name in last.tensors}
    if like.kind == "an adapter folder":
        names = {re.sub(r"\.default(?=\.|$)", "", name): name for name in last.tensors}
    for name, own in names.items():
        theirs = like.tensors[name].form.shape if name in like.tensors else None
        if theirs != (shape := last.tensors[own].form.shape):
            what = "missing" if theirs is None else f"of shape {theirs}"
            raise InputError(
                f"tensor {own!r} of the snapshots, of shape {shape}, is {what} in {like.path}"
            )
    # Some files have tied weights twice.
    twice = kept.tied.keys() & like.tensors.keys()
    return like, names | {
        name: kept.tied[name] for name in twice if kept.tied[name] in last.tensors
    }
