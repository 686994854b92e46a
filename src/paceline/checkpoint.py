"""Checkpoints for a plain training loop: one file, whole or not there, exact to resume from."""

import copy
import errno
import functools
import io
import os
import random
import sys
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.serialization import get_crc32_options, set_crc32_options

from .base import AveragedOptimizer
from .files import check_regular, whole
from .hosts import check_reach, is_swapped, restoring, unwrapped
from .loading import check_keeps_averages, one_line
from .shards import is_sharded
from .state import PLAIN

# What `weights_only=True` reads back by its value, or by torch's version.
SOMETIMES = (int, bytes, bytearray, complex, set, torch.dtype, torch.device, torch.Size)
PARTS = ("model", "optimizer", "random", "states", "values")


def save_checkpoint(
    path: str | bytes | os.PathLike[str], model: nn.Module, optimizer: Optimizer, **parts: Any
) -> None:
    """Write all that a run needs to go on exactly: under its final name whole, or not at all.

    Whatever the moment, the model weights in the file are the live ones, and the average is in the
    optimizer's state: where it is swapped in, it is put aside while the file is written. The random
    states of torch, Python and NumPy are saved, too.

        save_checkpoint("run.pt", model, opt, scheduler=scheduler, shuffle=generator, step=step)
        values = load_checkpoint("run.pt", model, opt, scheduler=scheduler, shuffle=generator)
        step = values["step"]

    Args:
        path: the file; one that is there is replaced when the new one is on the disk, which gets
            its mode. Of a link, what it leads to is replaced.
        model: on this process alone, or wrapped by DDP; then call this on one rank, or on all.
        optimizer: PACE or another, also in the wrapper of accelerate or Lightning. One that swaps
            without saying so (`swapped`, Schedule-Free's `train_mode`) has to hold its live
            weights now.
        parts: the rest of the run: objects with a `state_dict()` (schedulers, scalers, loaders),
            `torch.Generator`s, and plain values: numbers, strings, tensors, lists and dicts.

    Raises:
        ValueError: the model is sharded; the optimizer steps none of its parameters, as DeepSpeed's
            ZeRO has it; or a part holds what `load_checkpoint` could not read; the
            message says where.
        OSError: it could not be written, its folder is not there, or the path is a folder's or a
            device's; what was there before still is.
    """
    if any(is_sharded(p) for p in model.parameters()):
        raise ValueError("model must not be sharded; save it by torch.distributed.checkpoint")
    check_reach(optimizer, model)
    optimizer = unwrapped(optimizer)
    path = Path(os.fsdecode(path))
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    states = {name: _state(part) for name, part in parts.items() if _has_state(part)}
    with _live_weights(optimizer):
        run = {
            "model": _plain(model.state_dict(), "model"),
            "optimizer": _plain(optimizer.state_dict(), "optimizer"),
            "random": _random_state(),
            "states": {name: _plain(state, name) for name, state in states.items()},
            "values": {name: _plain(parts[name], name) for name in parts.keys() - states.keys()},
        }
        _write_run(run, path)


def load_checkpoint(
    path: str | bytes | os.PathLike[str], model: nn.Module, optimizer: Optimizer, **parts: Any
) -> dict[str, Any]:
    """Go on from a file of `save_checkpoint`, in objects made as those that were saved.

    Read with `weights_only=True`: the file cannot run code. Each byte is compared with the file's
    check sums, which reads it once more.

    Args:
        path: the file.
        model: gets the live weights.
        optimizer: gets its state, the average in it and not swapped in.
        parts: the objects that were saved with a state, by the same names.

    Returns:
        The plain values that were saved.

    Raises:
        ValueError: it is damaged, no such file, has other parts, or is of another model; or the
            model, the optimizer or a part refuses its state. Nothing has changed then.
        OSError: the file cannot be opened, or the path is a folder's or a device's.
    """
    check_reach(optimizer, model)
    optimizer = unwrapped(optimizer)
    path = Path(os.fsdecode(path))
    name = repr(str(path))
    run = _read(path, name)
    if not isinstance(run, dict) or not all(isinstance(run.get(key), dict) for key in PARTS):
        raise ValueError(f"{name} was not written by save_checkpoint")
    if parts.keys() != run["states"].keys():
        theirs = sorted(map(str, run["states"]))
        raise ValueError(f"{name} has the parts {theirs}, got {sorted(parts)}")
    mine = model.state_dict()
    _check_model(run["model"], mine, name)
    # Whatever refuses, all before it is undone.
    with ExitStack() as undo:
        what = "random states"
        try:
            _check_random_state(run["random"])
            for key, part in parts.items():
                what, before = f"part {key!r}", copy.deepcopy(_state(part))
                if isinstance(before, dict) and not isinstance(run["states"][key], dict):
                    raise ValueError(f"its state is a {type(run['states'][key]).__name__}")
                undo.callback(_set_state, part, before)
                _set_state(part, run["states"][key])
            what = "model"
            tensors = *model.parameters(), *model.buffers()
            held = [(x, x.detach().to("cpu", copy=True)) for x in tensors]
            undo.callback(_put_back, model, held, copy.deepcopy(_extra(mine)))
            model.load_state_dict(run["model"])
            what = "optimizer"
            if not isinstance(optimizer, AveragedOptimizer):  # which changes nothing
                check_keeps_averages(optimizer, run["optimizer"], "the state")
                undo.callback(optimizer.load_state_dict, optimizer.state_dict())
            optimizer.load_state_dict(run["optimizer"])
        except Exception as error:  # of any kind, for states of any kind
            raise ValueError(f"{name}: {what} cannot be loaded: {one_line(error)}") from error
        undo.pop_all()
    _set_random_state(run["random"])
    values: dict[str, Any] = run["values"]
    return values


# ---- the file ----------------------------------------------------------------------------------


def _write_run(run: dict[str, Any], path: Path) -> None:
    sums = get_crc32_options()
    set_crc32_options(True)
    try:
        with whole(path) as partial, partial.open("wb") as file:
            torch.save(run, file)
    except Exception as error:
        # torch, which closes the file first, may raise another on its way out.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError) or cause.filename:
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from error
    finally:
        set_crc32_options(sums)


def _read(path: Path, name: str) -> Any:
    check_regular(path)
    with path.open("rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                for part in archive.infolist():
                    # Torch writes no other. There is no check sum of this, and torch goes by it: it
                    # reads as much as the size says, and nothing if the part is a folder.
                    is_stored = not part.compress_type and part.file_size == part.compress_size
                    if not is_stored or part.external_attr:
                        raise zipfile.BadZipFile(f"{part.filename} is not as torch writes it")
                damaged = archive.testzip()
            file.seek(0)
            run = None if damaged else torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # zipfile and torch raise all sorts
            raise ValueError(
                f"{name} cannot be read: {type(error).__name__}; it is damaged, or was not written "
                "by save_checkpoint"
            ) from error
    if damaged:
        raise ValueError(f"{name} is damaged: {damaged!r} in it does not have its check sum")
    return run


# ---- optimizer and model -----------------------------------------------------------------------


@contextmanager
def _live_weights(optimizer: Any) -> Iterator[None]:
    if not is_swapped(optimizer):
        yield
        return
    with restoring(optimizer):
        optimizer.train()
        yield


def _check_model(theirs: dict[str, Any], mine: dict[str, Any], name: str) -> None:
    """Raises: ValueError: weights in a file are not as those of the model, which they go into."""
    forms = [{item[0]: _form(item) for item in x.items()} for x in (theirs, mine)]
    wrong = [key for key in forms[0] | forms[1] if forms[0].get(key) != forms[1].get(key)]
    if wrong:
        key = min(wrong, key=str)
        raise ValueError(
            f"{name} is of another model: {key!r} is {forms[0].get(key, 'not')} in the file and "
            f"{forms[1].get(key, 'not')} in the model"
        )
    versions = getattr(theirs, "_metadata", {})
    for x in versions.values() if isinstance(versions, dict) else [None]:
        if not isinstance(x, dict) or not isinstance(x.get("version", 0), int | None):
            raise ValueError(f"{name} has {x!r} where the version of a module should be")


def _form(item: tuple[str, Any]) -> str:
    """What has to be the same of an item of two models' states."""
    _, value = item
    if _is_extra(item):
        return "extra state"
    words = [f"{value.dtype} of shape {tuple(value.shape)}"]
    words += [str(value.layout)] * (value.layout != torch.strided)
    words += ["sharded"] * is_sharded(value) + ["without data"] * value.is_meta
    return ", ".join(words)


def _is_extra(item: tuple[str, Any]) -> bool:
    """Whether an item of a model's state is for the module's own `set_extra_state`, or a hook."""
    key, value = item
    return not isinstance(value, Tensor) or str(key).endswith("_extra_state")


def _extra(state: dict[str, Any]) -> dict[str, Any]:
    return dict(filter(_is_extra, state.items()))


@torch.no_grad()
def _put_back(model: nn.Module, held: list[tuple[Tensor, Tensor]], extra: dict[str, Any]) -> None:
    """Give a model its parameters, buffers and extra states of before, by no hook if it can be."""
    for x, before in held:
        x.copy_(before)
    if extra:
        with suppress(Exception):  # a hook that refuses every load has refused the other one, too
            model.load_state_dict(extra, strict=False)


# ---- parts -------------------------------------------------------------------------------------


def _plain(x: Any, part: str) -> Any:
    """The same in what `weights_only=True` reads back: NumPy's numbers become Python's."""
    try:
        return _walk(x, part, part, {})
    except RecursionError:
        raise ValueError(f"part {part!r} holds itself, or is nested too deeply") from None


def _walk(x: Any, part: str, where: str, seen: dict[int, tuple[Any, Any]]) -> Any:
    """One value of a part; `seen` holds dicts, lists and tuples, and what was made of them."""
    if not isinstance(x, Tensor) and getattr(x, "shape", None) == ():
        x = x.item()
    if id(x) in seen:
        return seen[id(x)][1]
    kind = type(x)
    if kind in (dict, OrderedDict, Counter):
        made: Any = kind()
        for key, value in x.items():
            at = f"{where}[{key!r}]"
            made[_walk(key, part, f"the key of {at}", seen)] = _walk(value, part, at, seen)
        if kind is OrderedDict:  # of a model: the versions of its modules
            vars(made).update(_walk(vars(x), part, f"vars({where})", seen))
        seen[id(x)] = x, made
        return made
    if kind in (list, tuple):
        made = kind(_walk(value, part, f"{where}[{i}]", seen) for i, value in enumerate(x))
        seen[id(x)] = x, made
        return made
    if x is None or kind in (bool, float, str) or (kind is int and x.bit_length() < 64):
        return x
    if kind in PLAIN and not vars(x) and _dtype_reads_back(x.dtype):
        return x
    if (isinstance(x, Tensor) or kind in SOMETIMES) and _reads_back(x):
        return x
    what = f"Tensor of {x.dtype}" if kind in PLAIN and not vars(x) else kind.__name__
    raise ValueError(
        f"part {part!r} holds a {what}; a checkpoint takes tensors, numbers, strings, and "
        f"lists and dicts of them, of just these types: {where}"
    )


@functools.cache
def _dtype_reads_back(dtype: torch.dtype) -> bool:
    """Whether each tensor of this dtype can be read back; torch cannot write uint4."""
    with suppress(RuntimeError):  # a quantized dtype, of which each tensor is tried
        return _reads_back(torch.empty(0, dtype=dtype))
    return False


def _reads_back(x: Any) -> bool:
    """Whether `load_checkpoint` can read a value of a rarer type, found by trying."""
    file = io.BytesIO()
    try:
        torch.save(x, file)
        file.seek(0)
        return type(torch.load(file, map_location="cpu", weights_only=True)) is type(x)
    except Exception:  # pickle and torch raise all sorts
        return False


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


def _check_random_state(state: dict[str, Any]) -> None:
    """Raises: all sorts, for what `_set_random_state` cannot set."""
    torch.Generator().set_state(state["torch"])
    random.Random().setstate(state["python"])
    for i, own in enumerate(_cuda_states(state)):
        torch.Generator(f"cuda:{i}").set_state(own)
    if "numpy" in state and (numpy := sys.modules.get("numpy")):
        numpy.random.RandomState().set_state(state["numpy"])
        if not 0 <= state["numpy"][2] <= len(state["numpy"][1]):  # where NumPy reads next
            raise ValueError(f"NumPy's position is {state['numpy'][2]}")


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    for i, own in enumerate(_cuda_states(state)):
        torch.cuda.set_rng_state(own, i)
    if "numpy" in state and (numpy := sys.modules.get("numpy")):
        numpy.random.set_state(state["numpy"])


def _cuda_states(state: dict[str, Any]) -> list[Tensor]:
    """Of the devices that are there now."""
    states: list[Tensor] = state.get("cuda", [])
    return states[: torch.cuda.device_count()]
