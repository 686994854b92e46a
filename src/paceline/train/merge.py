"""`paceline average`: merge the checkpoints of a run by an averaging rule.

Every average is linear in the iterates, so it is a weighted sum of the checkpoints. Tensors are
merged and written one at a time: the memory needed is a few times the largest tensor.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from rich.box import MARKDOWN
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tyro.conf import Positional, arg

from ..averaging import parse
from ..files import whole
from . import InputError, Options, folder, reporting
from .manifest import read_json, write_json

MODEL_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_model.safetensors"
# Files that are not copied into a merged folder: weights that are not merged, and training state.
LEFT_OUT = (
    *("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth"),
    *("*.h5", "*.msgpack", "*.gguf", "*.onnx", "*.distcp", "pytorch_model*"),
    *("optimizer*", "scheduler*", "rng_state*", "trainer_state.json", "latest", "zero_to_fp32.py"),
)
# The format's names of dtypes. Floating-point numbers below 16 bits are left out: their scales are
# separate tensors, and a product of averages is not the average of products.
SAFETENSORS_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8},
    "BOOL": torch.bool,
}
DTYPE_KEYS = {"dtype", "torch_dtype"}  # of config.json
CHECKPOINTS = arg(metavar="CHECKPOINT…", help_behavior_hint="(required)")
SAFETENSORS_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


class Merge(Options):
    """Merge checkpoints into one model, which is their average.

    Checkpoints are folders of a model (model.safetensors, whole or in shards), folders of an
    adapter (adapter_model.safetensors), or .safetensors files, all of one kind. One folder with
    checkpoint-N folders stands for all of those. If all names end in -NUMBER, the checkpoints are
    put in the order of the numbers; otherwise they stay in the order given.

    They count as the iterates of steps 1, 2, ..., and the first also as the weights before step 1.
    So start, every, window, lag and half_life of a rule count checkpoints. Rules are written
    name[:option=value]...:

    uniform[:start=0], the mean of all;

    ema[:kappa=0.5][:rate=1][:start=0][:every=1], or ema:beta=B or ema:half_life=H [:every=1];

    swa[:start=0][:every=1], the mean of every so-many-th;

    lawa:window=K[:every=1], the mean of the last K;

    bema[:kappa=0.5][:bias_power=0.2][:lag=10][:rate=1][:start=0][:every=1].

    Sums are made in float32, or in float64 for float64 tensors, and rounded once. Integers and
    masks are taken from the last checkpoint; its configuration and tokenizer are copied.
    """

    checkpoints: Annotated[Positional[tuple[Path, ...]], CHECKPOINTS]
    """Two or more, or one folder that holds them."""
    rule: str = "uniform"
    """Averaging rule; its start, every and so on count checkpoints."""
    out: Path
    """Folder to make, or file if the checkpoints are .safetensors files; it must not exist."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of floating-point tensors. Default: as in the checkpoints."""


class TensorHeader(NamedTuple):
    """A tensor of a safetensors file, as its header describes it."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]


class Checkpoint(NamedTuple):
    """A checkpoint by the headers of its files."""

    path: Path
    kind: str
    tensors: dict[str, TensorHeader]


def merge(options: Merge, console: Console) -> None:
    """Print the checkpoints with their weights, and write their average, whole or not at all.

    Raises:
        InputError: something given cannot be used, or the result cannot be written; nothing is
            written then.
    """
    with reporting("rule", ValueError):
        rule = parse(options.rule)
    try:
        paths, order = _in_order(options.checkpoints)
        checkpoints = [_read_headers(path) for path in paths]
        _check_mergeable(checkpoints, options.out)
        initial, first, *later = rule.coefficients(len(checkpoints)).tolist()
        weights = [initial + first, *later]  # the first also stands for the initial weights

        table = Table(box=MARKDOWN)
        table.add_column(f"checkpoint, {order}", overflow="fold")
        table.add_column(str(rule), justify="right", no_wrap=True)
        for path, weight in zip(paths, weights, strict=True):
            table.add_row(Text(str(path)), f"{weight:.4g}")
        console.print(table)
        if checkpoints[-1].kind == "an adapter folder":
            console.print(
                "Each factor of the adapters is averaged by itself, and not their products."
            )
        facts = {
            "rule": str(rule),
            "checkpoints": [str(path) for path in paths],
            "weights": weights,
            "dtype": options.dtype or "as in the checkpoints",
            "paceline": version("paceline"),
        }
        _write(checkpoints, weights, options, facts, console)
    except OSError as error:
        name = error.filename or options.out
        raise InputError(f"{name}: {error.strerror or error}") from error
    console.print(Text(f"Merged: {options.out}"), soft_wrap=True)


# ---- reading -----------------------------------------------------------------------------------


def _in_order(paths: Sequence[Path]) -> tuple[Sequence[Path], str]:
    """The checkpoints from first to last, and a text that says how they were ordered."""
    if len(paths) == 1:
        paths = folder.checkpoints_in(paths[0]) or paths
    steps = [(step, path) for path in paths if (step := folder.step_of(path)) is not None]
    if len(steps) < len(paths):
        return paths, "as given"
    return [path for _, path in sorted(steps, key=lambda pair: pair[0])], "by number"


def _read_headers(path: Path) -> Checkpoint:
    """A checkpoint by its headers, which must be complete and in the safetensors format."""
    index = None
    if path.is_file():
        kind, files = "a file", [path]
    elif not path.is_dir():
        raise InputError(f"no such file or folder: {path}")
    elif (path / MODEL_FILE).is_file():
        kind, files = "a model folder", [path / MODEL_FILE]
    elif (path / INDEX).is_file():
        kind, index = "a model folder", read_json(path / INDEX).get("weight_map")
        shards = set(index.values()) if isinstance(index, dict) else set()
        # Plain names only: files are written by the same names, and must stay in the new folder.
        if not shards or not all(isinstance(x, str) and Path(x).name == x for x in shards):
            raise InputError(f"{path / INDEX} has no weight_map of tensors to files beside it")
        files = [path / shard for shard in sorted(shards)]
    elif (path / ADAPTER).is_file():
        kind, files = "an adapter folder", [path / ADAPTER]
    else:
        hint = ""
        if any(path.glob("*_model*.bin")):
            hint = "; convert its .bin by from_pretrained() and save_pretrained()"
        raise InputError(f"{path} holds neither {MODEL_FILE}, {INDEX} nor {ADAPTER}{hint}")
    tensors = {}
    for file in files:
        with _opened(file) as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no dict
                part = opened.get_slice(name)
                dtype, shape = part.get_dtype(), tuple(part.get_shape())
                if dtype not in SAFETENSORS_DTYPES:
                    what = f"{file}: tensor {name!r} is of dtype {dtype}"
                    raise InputError(f"{what}, which cannot be averaged")
                tensors[name] = TensorHeader(file, SAFETENSORS_DTYPES[dtype], shape)
    if missing := (index or {}).keys() - tensors.keys():
        raise InputError(f"{path / INDEX} lists {min(missing)!r}, which none of its files has")
    return Checkpoint(path, kind, tensors)


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    failed = reporting(f"{file} cannot be read as safetensors", SafetensorError, OSError)
    with failed, safe_open(file, framework="pt") as opened:
        yield opened


def _check_mergeable(checkpoints: Sequence[Checkpoint], out: Path) -> None:
    """Raise InputError if the checkpoints cannot be merged, or not be written to `out`."""
    if len(checkpoints) < 2:
        raise InputError(f"give at least two checkpoints, got {len(checkpoints)}")
    first, last = checkpoints[0], checkpoints[-1]
    if len({checkpoint.path.resolve() for checkpoint in checkpoints}) < len(checkpoints):
        raise InputError("checkpoints: give each only once")
    for other in checkpoints[1:]:
        if other.kind != first.kind:
            raise InputError(f"{first.path} is {first.kind}, and {other.path} is {other.kind}")
        for name in sorted(first.tensors.keys() | other.tensors.keys()):
            a, b = (_described(checkpoint, name) for checkpoint in (first, other))
            if a != b:
                raise InputError(f"tensor {name!r} is {a} in {first.path} and {b} in {other.path}")
    config = last.path / "config.json"
    if config.is_file() and "quantization_config" in read_json(config):
        raise InputError(f"{last.path} is a quantized model, which cannot be averaged")
    if (out.suffix == ".safetensors") != (last.kind == "a file"):
        be = "end in .safetensors" if last.kind == "a file" else "be a folder, as the checkpoints"
        raise InputError(f"out: {out} must {be}")
    if out.exists() or out.is_symlink():
        raise InputError(f"out: {out} exists; name another")
    if not out.parent.is_dir():
        raise InputError(f"out: there is no folder {out.parent} for {out.name}")


def _described(checkpoint: Checkpoint, name: str) -> str:
    if not (entry := checkpoint.tensors.get(name)):
        return "missing"
    return f"{SAFETENSORS_NAMES[entry.dtype]} of shape {entry.shape}"


# ---- the average, tensor by tensor -------------------------------------------------------------


def _average(
    name: str, checkpoints: Sequence[Checkpoint], weights: Sequence[float], dtype: torch.dtype
) -> Tensor:
    """The merged tensor of that name, in that dtype, which must be finite."""
    last = checkpoints[-1]
    if not dtype.is_floating_point:  # a mean of masks or counters makes no sense
        return _load_tensor(last, name)
    wide = torch.promote_types(last.tensors[name].dtype, torch.float32)
    average = torch.zeros(last.tensors[name].shape, dtype=wide)
    so_far = 0.0
    # A running mean, unlike a sum, keeps values that are equal in all checkpoints exactly as they
    # are. It runs from last to first, so that BEMA's negative weight, the first, never divides.
    for checkpoint, weight in zip(reversed(checkpoints), reversed(weights), strict=True):
        if weight:
            so_far += weight
            average.lerp_(_load_tensor(checkpoint, name).to(wide), weight / so_far)
    average = average.to(dtype)
    if not _is_finite(average):
        raise InputError(f"the average of {name!r} is too large for {dtype}; give another --dtype")
    return average


def _load_tensor(checkpoint: Checkpoint, name: str) -> Tensor:
    # Opened anew for each tensor: pages that were read stay in memory while a file is open.
    with _opened(checkpoint.tensors[name].file) as opened:
        tensor: Tensor = opened.get_tensor(name)
    if not _is_finite(tensor):
        raise InputError(f"tensor {name!r} of {checkpoint.path} holds a NaN or infinity")
    return tensor


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return all(math.isfinite(x) for x in torch.aminmax(tensor))  # isfinite() needs memory


# ---- writing -----------------------------------------------------------------------------------


def _write(
    checkpoints: Sequence[Checkpoint],
    weights: Sequence[float],
    options: Merge,
    facts: dict[str, Any],
    console: Console,
) -> None:
    """Write the merged folder or file under another name, and rename it when it is complete."""
    last, out = checkpoints[-1], options.out
    entries = dict(last.tensors)
    if options.dtype:
        wanted = getattr(torch, options.dtype)
        floats = {name: entry for name, entry in entries.items() if entry.dtype.is_floating_point}
        entries |= {name: entry._replace(dtype=wanted) for name, entry in floats.items()}
    progress = Progress(console=console, transient=True)
    bar = progress.add_task("merging", total=len(entries))

    def average(name: str) -> Tensor:
        progress.advance(bar)
        return _average(name, checkpoints, weights, entries[name].dtype)

    extra = {"paceline": json.dumps(facts, ensure_ascii=False)}
    with progress, whole(out) as partial:
        if last.kind == "a file":
            _write_safetensors(partial, last.path, entries, average, extra)
            return
        partial.mkdir()
        for file in sorted({entry.file for entry in entries.values()}):
            part = {name: entry for name, entry in entries.items() if entry.file == file}
            _write_safetensors(partial / file.name, file, part, average, {})
        if not (last.path / MODEL_FILE).is_file() and last.kind == "a model folder":
            index = {
                "metadata": {"total_size": sum(map(_size, entries.values()))},
                "weight_map": {name: entry.file.name for name, entry in entries.items()},
            }
            write_json(partial / INDEX, index)
        _copy_the_rest(last.path, partial, options.dtype)
        write_json(partial / folder.AVERAGE_FACTS, facts)


def _write_safetensors(
    path: Path,
    like: Path,
    entries: dict[str, TensorHeader],
    tensor: Callable[[str], Tensor],
    metadata: dict[str, str],
) -> None:
    """Write a safetensors file with only one tensor at a time in memory; adds `like`'s metadata.

    The format: the header's length in 8 bytes, little-endian; the header, JSON, with shape, dtype
    and place of each tensor; then the bytes of the tensors.
    """
    with _opened(like) as opened:
        metadata = (opened.metadata() or {}) | {"format": "pt"} | metadata
    # Wide dtypes first, so that each tensor starts at a multiple of its item size.
    names = sorted(entries, key=lambda name: (-entries[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name in names:
        start, end = end, end + _size(entries[name])
        header[name] = {
            "dtype": SAFETENSORS_NAMES[entries[name].dtype],
            "shape": entries[name].shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(tensor(name).reshape(-1).view(torch.uint8).numpy().data)


def _size(entry: TensorHeader) -> int:
    return math.prod(entry.shape) * entry.dtype.itemsize


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
