"""`paceline average`: merge the checkpoints of a run by an averaging rule.

Every average is linear in the iterates, so it is a weighted sum of the checkpoints. Tensors are
merged and written one at a time: the memory needed is a few times the largest tensor.
"""

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from importlib.metadata import version
from itertools import pairwise
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
from ..sums import SUMS, write_sums
from . import InputError, Options, folder, reporting
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
# The format's names of dtypes. Floating-point numbers below 16 bits are left out: their scales are
# separate tensors, and a product of averages is not the average of products.
SAFETENSORS_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8},
    "BOOL": torch.bool,
}
DTYPE_KEYS = {"dtype", "torch_dtype"}  # of config.json
# What says that a model is quantized: files beside it, keys of config.json, and beside integers the
# names of tensors, of which several make one weight.
QUANTIZED_FILES = ("*quant*config*.json", "*qmap.json")
QUANTIZED_KEY = re.compile("quant|^compression_config$|^load_in_[48]bit$", re.IGNORECASE)
QUANTIZED_NAME = re.compile(
    r"(^|[._:])(q(weight|zeros|data)|g_idx|absmax|quant_\w+|scb|scales|zeros|zero_points?"
    r"|weight_(scale|packed|zero)\w*|packed_weight|(weight|input)_quantizer|_(data|scale|shift))"
    r"([.:]|$)",
    re.IGNORECASE,
)
# A number in a name, such as 500, 1.5, 1e3 or 20k; by the second reading 1_000, too.
NUMBERS = [
    re.compile(rf"({digits}(?:\.\d+)?(?:e\+?\d+)?)([kmb](?![a-z]))?", re.IGNORECASE)
    for digits in (r"\d+", r"(?:\d{1,3}(?:[_,]\d{3})+(?!\d)|\d+)")
]
UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9}
# Of adapter_config.json: by how much the product of an adapter's factors counts; and the ends of
# such keys, and of those that say which random factors or places are not in the file.
ADAPTER_SCALES = ("peft_type", "r", "use_rslora", "rank_pattern", "alpha_pattern")
ADAPTER_ENDS = ("alpha", "scaling", "seed", "prng_key")
CHECKPOINTS = arg(metavar="CHECKPOINT…", help_behavior_hint="(required)")
SAFETENSORS_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


class Merge(Options):
    """Merge checkpoints into one model, which is their average.

    Checkpoints are folders of a model (model.safetensors, whole or in shards), folders of an
    adapter (adapter_model.safetensors), or .safetensors files, all of one kind. One folder with
    checkpoint-N folders stands for all of those. Checkpoints whose names differ only in numbers,
    such as step_500 and step_1000, are put in the order of the numbers. Others stay in the order
    given, in which the last number of a name must not fall.

    They count as the iterates of steps 1, 2, ..., and the first also as the weights before step 1.
    So start, every, window, lag and half_life of a rule count checkpoints. Rules are written
    name[:option=value]...:

    uniform[:start=0], the mean of all;

    ema[:kappa=0.5][:rate=1][:start=0][:every=1], or ema:beta=B or ema:half_life=H [:every=1];

    swa[:start=0][:every=1], the mean of every so-many-th;

    lawa:window=K[:every=1], the mean of the last K;

    bema[:kappa=0.5][:bias_power=0.2][:lag=10][:rate=1][:start=0][:every=1].

    Sums are made in float32, or in float64 for float64 tensors, and rounded once. A
    counter, a single integer, is taken from the last checkpoint; other integers and masks must be
    equal in all. The last checkpoint's configuration and tokenizer are copied.
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
    """The checkpoints from first to last, and a text that says how they were ordered.

    Raises:
        InputError: the numbers in their names leave it open, or fall in the order given.
    """
    if len(paths) == 1:
        paths = folder.checkpoints_in(paths[0]) or paths
    parts = [[x.removesuffix(".safetensors") for x in p.absolute().parts[::-1]] for p in paths]
    # of step_500/model and step_1000/model the folders
    names = next((x for x in zip(*parts, strict=False) if len(set(x)) > 1), ())
    alike = False
    for reading in NUMBERS:
        texts, numbers = [reading.sub("#", x) for x in names], [_numbers(x, reading) for x in names]
        if len(set(texts)) != 1:
            continue
        alike = True
        rising = (column == tuple(sorted(column)) for column in zip(*sorted(numbers), strict=True))
        if all(rising):
            order = sorted(range(len(paths)), key=numbers.__getitem__)
            return [paths[i] for i in order], "by number"
    if alike:
        raise InputError(
            f"checkpoints: the numbers in {names[0]} and {names[1]} leave their order open; rename "
            "them"
        )
    numbered = [(x, found[-1]) for x in names if (found := _numbers(x, NUMBERS[0]))]
    for (before, one), (after, other) in pairwise(numbered):
        if other < one:
            raise InputError(
                f"checkpoints: {after} comes after {before}, but its number is smaller; give them "
                "from first to last, or rename them"
            )
    return paths, "as given"


def _numbers(name: str, reading: re.Pattern[str]) -> tuple[float, ...]:
    found = reading.findall(name)
    return tuple(float(digits.replace(",", "_")) * UNITS[unit.lower()] for digits, unit in found)


def _read_headers(path: Path) -> Checkpoint:
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
        with _opened(file) as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no dict
                if index.get(name, file.name) != file.name:  # another file's, by the index
                    continue
                if name in tensors:
                    both = f"{tensors[name].file} and {file.name} both have tensor {name!r}"
                    raise InputError(f"{both}, which {INDEX} does not list")
                part = opened.get_slice(name)
                dtype, shape = part.get_dtype(), tuple(part.get_shape())
                if dtype not in SAFETENSORS_DTYPES:
                    what = f"{file}: tensor {name!r} is of dtype {dtype}"
                    raise InputError(f"{what}, which cannot be averaged")
                tensors[name] = TensorHeader(file, SAFETENSORS_DTYPES[dtype], shape)
    if missing := index.keys() - tensors.keys():
        name = min(missing)
        raise InputError(f"{path / INDEX} lists {name!r} in {index[name]}, which does not have it")
    if not tensors:
        raise InputError(f"{path} has no tensors")
    return Checkpoint(path, kind, tensors)


def _is_shard(name: object) -> bool:
    return isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")


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
        if first.kind == "an adapter folder":
            ours, theirs = (_adapter_config(checkpoint.path) for checkpoint in (first, other))
            keys = [x for x in ours | theirs if x in ADAPTER_SCALES or x.endswith(ADAPTER_ENDS)]
            for key in keys:
                if ours.get(key) != theirs.get(key):
                    raise InputError(
                        f"{key!r} is {ours.get(key)} in {first.path} and {theirs.get(key)} in "
                        f"{other.path}; adapters of different scales cannot be averaged"
                    )
    for checkpoint in checkpoints:
        if sign := _sign_of_quantization(checkpoint):
            what = f"{checkpoint.path} is a quantized model, which cannot be averaged"
            raise InputError(f"{what}: it has {sign}")
    if (out.suffix == ".safetensors") != (last.kind == "a file"):
        be = "end in .safetensors" if last.kind == "a file" else "be a folder, as the checkpoints"
        raise InputError(f"out: {out} must {be}")
    if out.exists() or out.is_symlink():
        raise InputError(f"out: {out} exists; name another")
    if not out.parent.is_dir():
        raise InputError(f"out: there is no folder {out.parent} for {out.name}")


def _adapter_config(path: Path) -> dict[str, Any]:
    config = path / "adapter_config.json"
    return read_json(config) if config.is_file() else {}


def _described(checkpoint: Checkpoint, name: str) -> str:
    if not (entry := checkpoint.tensors.get(name)):
        return "missing"
    return f"{SAFETENSORS_NAMES[entry.dtype]} of shape {entry.shape}"


def _sign_of_quantization(checkpoint: Checkpoint) -> str | None:
    """What says that the checkpoint is a quantized model, if anything does."""
    headers = checkpoint.tensors
    if any(not x.dtype.is_floating_point and math.prod(x.shape) > 1 for x in headers.values()):
        for name in sorted(headers):
            if QUANTIZED_NAME.search(name):
                return f"integers, and the tensor {name!r}"
    if checkpoint.kind == "a file":
        return None
    for pattern in QUANTIZED_FILES:
        for path in checkpoint.path.glob(pattern):
            return path.name
    config = checkpoint.path / "config.json"
    parts = [read_json(config)] if config.is_file() else []
    for part in parts:  # grows: configurations may have parts
        for key, value in part.items():
            # numbers are sizes, as in num_quantizers
            if QUANTIZED_KEY.search(key) and (
                value is True or isinstance(value, dict | list | str)
            ):
                return f"{key!r} in {config.name}"
        parts += [value for value in part.values() if isinstance(value, dict)]
    return None


# ---- the average, tensor by tensor -------------------------------------------------------------


def _average(
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


def _running_mean(
    name: str, checkpoints: Sequence[Checkpoint], weights: Sequence[float], scale: float = 1.0
) -> Tensor:
    """The mean times a power of two, in float32, or in float64 for float64 tensors.

    A running mean, unlike a sum, keeps values that are equal in all checkpoints exactly as they
    are. It runs from last to first, so that BEMA's negative weight, the first, never divides.
    """
    like = checkpoints[-1].tensors[name]
    wide = torch.promote_types(like.dtype, torch.float32)
    average = torch.zeros(like.shape, dtype=wide)
    so_far = 0.0
    for checkpoint, weight in zip(reversed(checkpoints), reversed(weights), strict=True):
        if weight:
            so_far += weight
            tensor = _load_tensor(checkpoint, name).to(wide)
            average.lerp_(tensor if scale == 1 else tensor * scale, weight / so_far)
            del tensor  # before the next is loaded
    return average


def _load_equal(name: str, checkpoints: Sequence[Checkpoint], weights: Sequence[float]) -> Tensor:
    """The last checkpoint's tensor of integers or masks, equal in all or a counter."""
    last = _load_tensor(checkpoints[-1], name)
    for checkpoint, weight in zip(checkpoints[:-1], weights, strict=False):
        if weight and last.numel() > 1 and not torch.equal(last, _load_tensor(checkpoint, name)):
            raise InputError(
                f"tensor {name!r} of {SAFETENSORS_NAMES[last.dtype]} differs between "
                f"{checkpoint.path} and {checkpoints[-1].path}; only floating-point numbers can be "
                "averaged, so quantized models cannot"
            )
    return last


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
        write_sums(partial)


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
