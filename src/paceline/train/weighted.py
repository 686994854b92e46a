"""Weighted sums of checkpoints: their headers, the sums, and the folder or file that gets them.

Tensors are summed up and written one at a time: the memory needed is a few times the largest
tensor.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..files import whole
from ..safetensors import DTYPES, NAMES, Form, in_order, write_safetensors
from ..snapshots import SNAPSHOT
from ..sums import SUMS, write_sums
from . import InputError, folder, reporting
from .manifest import read_json, write_json

MODEL_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_model.safetensors"
# Files that are not copied into a merged folder: weights that are not merged, and training state.
LEFT_OUT = (
    *("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth"),
    *("*.h5", "*.msgpack", "*.gguf", "*.onnx", "*.distcp", "pytorch_model*"),
    *(*folder.TRAINING_STATE, SUMS),
)
DTYPE_KEYS = {"dtype", "torch_dtype"}  # of config.json


class TensorHeader(NamedTuple):
    """A tensor of a safetensors file, as its header describes it."""

    file: Path
    form: Form


class Checkpoint(NamedTuple):
    """A checkpoint by the headers of its files."""

    path: Path
    kind: str
    tensors: dict[str, TensorHeader]


# ---- reading -----------------------------------------------------------------------------------


def read_headers(path: Path) -> Checkpoint:
    """A checkpoint by its headers, which must be complete and in the safetensors format."""
    folder.require_whole(path, "checkpoints")
    index: dict[str, Any] = {}
    if path.is_file():
        kind, files = "a file", [path]
    elif not path.is_dir():
        raise InputError(f"no such file or folder: {path}")
    elif (path / MODEL_FILE).is_file():
        kind, files = "a model folder", [path / MODEL_FILE]
    elif (path / INDEX).is_file():
        kind, index = "a model folder", read_json(path / INDEX).get("weight_map", {})
        # Plain names only: files are written by the same names, and must stay in the new folder,
        # where no other file has the suffix.
        if not isinstance(index, dict) or not index or not all(map(_is_shard, index.values())):
            raise InputError(
                f"{path / INDEX} has no weight_map of tensors to .safetensors files beside it"
            )
        files = [path / shard for shard in sorted(set(index.values()))]
    elif (path / ADAPTER).is_file():
        kind, files = "an adapter folder", [path / ADAPTER]
    else:
        hint = ""
        if any(path.glob("*_model*.bin")):
            hint = "; convert its .bin by from_pretrained() and save_pretrained()"
        raise InputError(f"{path} holds neither {MODEL_FILE}, {INDEX} nor {ADAPTER}{hint}")
    tensors: dict[str, TensorHeader] = {}
    for file in files:
        with opened_file(file) as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no dict
                if index.get(name, file.name) != file.name:  # another file's, by the index
                    continue
                if name in tensors:
                    both = f"{tensors[name].file} and {file.name} both have tensor {name!r}"
                    raise InputError(f"{both}, which {INDEX} does not list")
                part = opened.get_slice(name)
                dtype, shape = part.get_dtype(), tuple(part.get_shape())
                if dtype not in DTYPES:
                    what = f"{file}: tensor {name!r} is of dtype {dtype}"
                    raise InputError(f"{what}, which cannot be averaged")
                tensors[name] = TensorHeader(file, Form(DTYPES[dtype], shape))
    if missing := index.keys() - tensors.keys():
        name = min(missing)
        raise InputError(f"{path / INDEX} lists {name!r} in {index[name]}, which does not have it")
    if not tensors:
        raise InputError(f"{path} has no tensors")
    return Checkpoint(path, kind, tensors)


def _is_shard(name: object) -> bool:
    return isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")


@contextmanager
def opened_file(file: Path) -> Iterator[Any]:
    """A safetensors file, open; what is wrong with it is an InputError."""
    failed = reporting(f"{file} cannot be read as safetensors", SafetensorError, OSError)
    with failed, safe_open(file, framework="pt") as opened:
        yield opened


# ---- the average, tensor by tensor -------------------------------------------------------------


def weighted_sum(
    name: str, checkpoints: Sequence[Checkpoint], weights: Sequence[float], dtype: torch.dtype
) -> Tensor:
    """The merged tensor of that name, in that dtype, which must be finite."""
    if not dtype.is_floating_point:  # a mean of codes, masks or counters makes no sense
        return _load_equal(name, checkpoints, weights)
    average = _running_mean(name, checkpoints, weights)
    if not _is_finite(average):  # differences overflow earlier than means: these in a quarter
        quarter = _running_mean(name, checkpoints, weights, 0.25)
        average = average.where(average.isfinite(), 4 * quarter)
    average = average.to(dtype)
    if not _is_finite(average):
        raise InputError(f"the average of {name!r} is too large for {dtype}; give another --dtype")
    return average


@torch.no_grad()
def put_sums(
    tensors: Mapping[str, Tensor],
    checkpoints: Sequence[Checkpoint],
    weights: Callable[[str], Sequence[float]],
) -> None:
    """Put weighted sums of checkpoints into a model, a tensor at a time.

    Args:
        tensors: of the model, by their names in the checkpoints.
        checkpoints: what is summed up.
        weights: from a tensor's name, the weights of the checkpoints.
    """
    for name, x in tensors.items():
        x.copy_(weighted_sum(name, checkpoints, weights(name), x.dtype))


def _running_mean(
    name: str, checkpoints: Sequence[Checkpoint], weights: Sequence[float], scale: float = 1.0
) -> Tensor:
    """The mean times a power of two, in float32, or in float64 for float64 tensors.

    A running mean, unlike a sum, keeps values that are equal in all checkpoints exactly as they
    are. It runs from last to first, and takes negative weights after the others: what it divides
    by, the sum of weights so far, falls to 1 then, and not to 0.
    """
    like = checkpoints[-1].tensors[name].form
    wide = torch.promote_types(like.dtype, torch.float32)
    average: Tensor | None = None
    so_far = 0.0
    pairs = zip(reversed(checkpoints), reversed(weights), strict=True)
    for checkpoint, weight in sorted(pairs, key=lambda pair: pair[1] < 0):
        if weight:
            so_far += weight
            tensor = load_tensor(checkpoint, name).to(wide)
            if scale != 1:
                tensor = tensor * scale
            average = tensor if average is None else average.lerp_(tensor, weight / so_far)
            del tensor  # before the next is loaded
    assert average is not None  # weights sum to 1
    return average


def _load_equal(name: str, checkpoints: Sequence[Checkpoint], weights: Sequence[float]) -> Tensor:
    """The last checkpoint's tensor of integers or masks, equal in all or a counter."""
    last = load_tensor(checkpoints[-1], name)
    for checkpoint, weight in zip(checkpoints[:-1], weights, strict=False):
        if weight and last.numel() > 1 and not torch.equal(last, load_tensor(checkpoint, name)):
            raise InputError(
                f"tensor {name!r} of {NAMES[last.dtype]} differs between "
                f"{checkpoint.path} and {checkpoints[-1].path}; only floating-point numbers can be "
                "averaged, so quantized models cannot"
            )
    return last


def load_tensor(checkpoint: Checkpoint, name: str) -> Tensor:
    """A tensor of a checkpoint, which must be finite."""
    # Opened anew for each tensor: pages that were read stay in memory while a file is open.
    with opened_file(checkpoint.tensors[name].file) as opened:
        tensor: Tensor = opened.get_tensor(name)
    if not _is_finite(tensor):
        raise InputError(f"tensor {name!r} of {checkpoint.path} holds a NaN or infinity")
    return tensor


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return all(math.isfinite(x) for x in torch.aminmax(tensor))  # isfinite() needs memory


# ---- writing -----------------------------------------------------------------------------------


def write(
    out: Path,
    like: Checkpoint,
    tensor: Callable[[str, torch.dtype], Tensor],
    facts: dict[str, Any],
    console: Console,
    dtype: str | None = None,
    finish: Callable[[Path], object] = write_sums,
) -> None:
    """Write a folder or file under another name, and rename it when it is complete.

    Args:
        out: the folder or file.
        like: what it is made like: its tensors' names, files and dtypes, and the files beside.
        tensor: from a name and a dtype, what to write.
        facts: of the average, for its paceline.json or metadata.
        console: shows a bar.
        dtype: of floating-point tensors, instead of their own.
        finish: called with a folder before it gets its name; by default its check sums are written.
    """
    forms = {name: entry.form for name, entry in like.tensors.items()}
    if dtype:
        wanted = getattr(torch, dtype)
        floats = {name: form for name, form in forms.items() if form.dtype.is_floating_point}
        forms |= {name: form._replace(dtype=wanted) for name, form in floats.items()}
    progress = Progress(console=console, transient=True)
    bar = progress.add_task("merging", total=len(forms))

    def write_file(path: Path, file: Path, extra: dict[str, str]) -> None:
        part = {name: form for name, form in forms.items() if like.tensors[name].file == file}
        with opened_file(file) as opened:
            metadata = opened.metadata() or {}
        metadata.pop(SNAPSHOT, None)  # it is none any more
        write_safetensors(path, part, map(one, in_order(part)), metadata | extra)

    def one(name: str) -> Tensor:
        progress.advance(bar)
        return tensor(name, forms[name].dtype)

    with progress, whole(out) as partial:
        if like.kind == "a file":
            extra = {"paceline": json.dumps(facts, ensure_ascii=False)}
            write_file(partial, like.path, extra)
            return
        partial.mkdir()
        files = {name: entry.file for name, entry in like.tensors.items()}
        for file in sorted(set(files.values())):
            write_file(partial / file.name, file, {})
        if not (like.path / MODEL_FILE).is_file() and like.kind == "a model folder":
            index = {
                "metadata": {"total_size": sum(form.nbytes for form in forms.values())},
                "weight_map": {name: file.name for name, file in files.items()},
            }
            write_json(partial / INDEX, index)
        _copy_the_rest(like.path, partial, dtype)
        write_json(partial / folder.AVERAGE_FACTS, facts)
        finish(partial)


def _copy_the_rest(source: Path, target: Path, dtype: str | None) -> None:
    """Copy configurations, tokenizer and other files that belong to the weights."""
    for path in source.iterdir():
        if path.is_file() and not any(fnmatch(path.name, pattern) for pattern in LEFT_OUT):
            shutil.copyfile(path, target / path.name)
    config = target / "config.json"
    if dtype and config.is_file():  # it would be loaded in the old dtype
        values = json.loads(
            config.read_text("utf-8"),
            object_hook=lambda part: part | dict.fromkeys(part.keys() & DTYPE_KEYS, dtype),
        )
        write_json(config, values)
