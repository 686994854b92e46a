"""Checkpoints for a plain training loop: one file, whole or not there, exact to resume from."""

import os
import random
import sys
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .base import AveragedOptimizer
from .files import whole
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
        optimizer: PACE or another; one that swaps without saying so (`swapped`) has to hold its
            live weights now.
        parts: the rest of the run: objects with a `state_dict()` (schedulers, scalers, loaders),
            `torch.Generator`s, and plain values: numbers, strings, tensors, lists and dicts.

    Raises:
        ValueError: the model is sharded, or a part holds what `load_checkpoint` could not read.
        OSError: it could not be written; what was there before still is.
    """
    if any(is_sharded(p) for p in model.parameters()):
        raise ValueError("model must not be sharded; save it by torch.distributed.checkpoint")
    path = Path(path)
    states = {name: _state(part) for name, part in parts.items() if _has_state(part)}
    with _live_weights(optimizer):
        run = {
            "model": model.state_dict(),
            "optimizer": _plain(optimizer.state_dict(), "optimizer"),
            "random": _random_state(),
            "states": {name: _plain(state, name) for name, state in states.items()},
            "values": {name: _plain(parts[name], name) for name in parts.keys() - states.keys()},
        }
        with whole(path) as partial:
            torch.save(run, partial)


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
        ValueError: it is no such file, has other parts, or is of another model; or PACE refuses
            its state. Nothing has changed then.
        OSError: the file cannot be opened.
    """
    name = repr(os.fspath(path))
    with open(path, "rb") as file:  # noqa: PTH123 - a path of any kind
        try:
            run: Any = torch.load(file, map_location="cpu", weights_only=True)
            ours = {"model", "optimizer", "random", "states", "values"} <= run.keys()
        except Exception as error:  # torch raises all sorts for what is no file of torch
            raise ValueError(f"{name} cannot be read: {type(error).__name__}") from error
    if not ours:
        raise ValueError(f"{name} was not written by save_checkpoint")
    if parts.keys() != run["states"].keys():
        raise ValueError(f"{name} has the parts {sorted(run['states'])}, got {sorted(parts)}")
    mine = {key: _shape(value) for key, value in model.state_dict().items()}
    theirs = {key: _shape(value) for key, value in run["model"].items()}
    if wrong := sorted(key for key in mine | theirs if mine.get(key) != theirs.get(key)):
        raise ValueError(
            f"{name} is of another model: {wrong[0]!r} is {theirs.get(wrong[0], 'not')} in the "
            f"file and {mine.get(wrong[0], 'not')} in the model"
        )
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
    if isinstance(optimizer, AveragedOptimizer):  # of several averages the one that is there
        with optimizer.restoring():
            optimizer.train()
            yield
        return
    optimizer.train()
    try:
        yield
    finally:
        optimizer.eval()


def _plain(x: Any, part: str) -> Any:
    """The same in what `weights_only=True` reads back: NumPy's numbers become Python's."""
    if isinstance(x, dict):
        kind = type(x) if type(x) in (OrderedDict, Counter) else dict
        return kind({_plain(key, part): _plain(value, part) for key, value in x.items()})
    if isinstance(x, (list, tuple)):
        items = [_plain(value, part) for value in x]
        return tuple(items) if isinstance(x, tuple) else items
    if not isinstance(x, Tensor) and getattr(x, "shape", None) == ():
        return x.item()
    if x is None or isinstance(x, (Tensor, bool, int, float, str, bytes, torch.dtype)):
        return x
    raise ValueError(
        f"part {part!r} holds a {type(x).__name__}; a checkpoint takes tensors, numbers, strings, "
        "and lists and dicts of them"
    )


def _shape(value: Any) -> str:
    return f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else "no tensor"


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
