"""Checkpoints for a plain training loop: one file, whole or not there, exact to resume from."""

import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from .shards import is_sharded


def save_checkpoint(
    path: str | os.PathLike[str], model: nn.Module, optimizer: Optimizer, **parts: Any
) -> None:
    """Write all that a run needs to go on exactly: under its final name whole, or not at all.

    Whatever the moment, the model weights in the file are the live ones, and the average is in the
    optimizer's state: where it is swapped in, it is put aside while the file is written. The random
    states of torch, Python and NumPy are saved, too.

        save_checkpoint("run.pt", model, opt, scheduler=scheduler, shuffle=generator, step=step)
        values = load_checkpoint("run.pt", model, opt, scheduler=scheduler, shuffle=generator)
        step = values["step"]

    Args:
        path: the file; one that is there is replaced when the new one is on the disk.
        model: on this process alone, or wrapped by DDP; then call this on one rank.
        optimizer: PACE or any other.
        parts: the rest of the run: objects with a `state_dict()` (schedulers, scalers, loaders),
            `torch.Generator`s, and plain values: numbers, strings, tensors, lists and dicts.

    Raises:
        ValueError: the model is sharded.
        OSError: it could not be written; what was there before still is.
    """
    if any(is_sharded(p) for p in model.parameters()):
        raise ValueError("model must not be sharded; save it by torch.distributed.checkpoint")
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")  # one name, so that kills leave one file
    states = {name: _state(part) for name, part in parts.items() if _has_state(part)}
    with _live_weights(optimizer):
        run = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "random": _random_state(),
            "states": states,
            "values": {name: part for name, part in parts.items() if name not in states},
        }
        try:
            with partial.open("wb") as file:
                torch.save(run, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    _sync(path.parent)


def load_checkpoint(
    path: str | os.PathLike[str], model: nn.Module, optimizer: Optimizer, **parts: Any
) -> dict[str, Any]:
    """Go on from a file of `save_checkpoint`, in objects made as those that were saved.

    Read with `weights_only=True`: the file cannot run code.

    Args:
        path: the file.
        model: gets the live weights.
        optimizer: gets its state, the average in it and not swapped in.
        parts: the objects that were saved with a state, by the same names.

    Returns:
        The plain values that were saved.

    Raises:
        ValueError: it is no such file, or has other parts; or the optimizer refuses its state.
            Nothing has changed then.
        RuntimeError: the model or a part refuses its state, as torch says.
        OSError: the file cannot be read.
    """
    run: Any = torch.load(path, map_location="cpu", weights_only=True)
    name = repr(os.fspath(path))
    if not isinstance(run, dict) or not {"model", "optimizer", "states", "values"} <= run.keys():
        raise ValueError(f"{name} was not written by save_checkpoint")
    if parts.keys() != run["states"].keys():
        raise ValueError(f"{name} has the parts {sorted(run['states'])}, got {sorted(parts)}")
    optimizer.load_state_dict(run["optimizer"])
    model.load_state_dict(run["model"])
    for key, part in parts.items():
        _set_state(part, run["states"][key])
    _set_random_state(run["random"])
    values: dict[str, Any] = run["values"]
    return values


@contextmanager
def _live_weights(optimizer: Any) -> Iterator[None]:
    if not getattr(optimizer, "swapped", False):
        yield
        return
    optimizer.train()
    try:
        yield
    finally:
        optimizer.eval()


def _has_state(part: Any) -> bool:
    return isinstance(part, torch.Generator) or hasattr(part, "load_state_dict")


def _state(part: Any) -> Any:
    return part.get_state() if isinstance(part, torch.Generator) else part.state_dict()


def _set_state(part: Any, state: Any) -> None:
    if isinstance(part, torch.Generator):
        part.set_state(state)
    else:
        part.load_state_dict(state)


def _random_state() -> dict[str, Any]:
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if numpy := sys.modules.get("numpy"):
        kind, words, *rest = numpy.random.get_state()
        state["numpy"] = (kind, words.tolist(), *rest)
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    if "numpy" in state and (numpy := sys.modules.get("numpy")):
        numpy.random.set_state(state["numpy"])


def _sync(folder: Path) -> None:
    """See to it that a renamed file is found after a power failure, where the system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
