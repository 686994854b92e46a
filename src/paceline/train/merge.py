"""`paceline average`: merge the checkpoints of a run by an averaging rule.

Every average is linear in the iterates, so it is a weighted sum of the checkpoints. Tensors are
merged and written one at a time: the memory needed is a few times the largest tensor.
"""

import math
import re
from collections.abc import Sequence
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from ..averaging import parse
from ..safetensors import NAMES, read_metadata
from . import InputError, folder, reporting, reporting_disk
from .manifest import read_json
from .options import Merge
from .rebuild import read_snapshots, rebuild, snapshot_files
from .weighted import Checkpoint, read_headers, weighted_sum, write

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
OF_FACTORS = "Each factor of the adapters is averaged by itself, and not their products."


def merge(options: Merge, console: Console) -> None:
    """Print the checkpoints with their weights, and write their average, whole or not at all.

    Raises:
        InputError: something given cannot be used, or the result cannot be written; nothing is
            written then.
    """
    with reporting("rule", ValueError):
        rule = parse(options.rule)
    with reporting_disk(options.out):
        if files := snapshot_files(options.checkpoints):
            _check_out(options.out)
            model = options.model and Path(folder.model_of_run(str(options.model), "model"))
            rebuild(read_snapshots(files), rule, options.out, model, options.dtype, console)
            console.print(Text(f"Rebuilt: {options.out}"), soft_wrap=True)
            return
        if options.model is not None:
            raise InputError("model: it is for averages at a step; leave it out for checkpoints")
        paths, order = _in_order(options.checkpoints)
        checkpoints = [read_headers(path) for path in paths]
        check_mergeable(checkpoints, options.out)
        initial, first, *later = rule.coefficients(len(checkpoints)).tolist()
        weights = [initial + first, *later]  # the first also stands for the initial weights

        table = Table(box=MARKDOWN)
        table.add_column(f"checkpoint, {order}", overflow="fold")
        table.add_column(str(rule), justify="right", no_wrap=True)
        for path, weight in zip(paths, weights, strict=True):
            table.add_row(Text(str(path)), f"{weight:.4g}")
        console.print(table)
        if averaged := [path for path in paths if is_average(path)]:
            say = f"{len(averaged)} of these {len(paths)} are averages already, such as"
            hint = "what paceline train --snapshots keeps gives any average of the live weights"
            console.print(Text(f"{say} {averaged[-1]}: this averages averages; {hint}."))
        if checkpoints[-1].kind == "an adapter folder":
            console.print(OF_FACTORS)
        facts = {
            "rule": str(rule),
            "checkpoints": [str(path) for path in paths],
            "weights": weights,
            "dtype": options.dtype or "as in the checkpoints",
            "paceline": version("paceline"),
        }

        def tensor(name: str, dtype: torch.dtype) -> Tensor:
            return weighted_sum(name, checkpoints, weights, dtype)

        write(options.out, checkpoints[-1], tensor, facts, console, options.dtype)
    console.print(Text(f"Merged: {options.out}"), soft_wrap=True)


# ---- reading -----------------------------------------------------------------------------------


def is_average(path: Path) -> bool:
    """Whether a checkpoint is known to hold an average and not an iterate."""
    if path.is_file():
        return "paceline" in read_metadata(path)
    run = folder.run_of(path)
    if run and path.absolute().parent.name == folder.CHECKPOINTS:
        text = (run / folder.RECIPE).read_text(encoding="utf-8")
        return not re.search(r"^method: ['\"]?adamw\b", text, re.MULTILINE)
    about = path / folder.AVERAGE_FACTS
    facts = read_json(about) if about.is_file() else {}
    return bool(facts.get("rule")) and facts.get("weights") != folder.WEIGHTS_IN[folder.LIVE]


def _in_order(paths: Sequence[Path]) -> tuple[Sequence[Path], str]:
    """The checkpoints from first to last, and a text that says how they were ordered.

    Raises:
        InputError: the numbers in their names leave it open, or fall in the order given.
    """
    if len(paths) == 1:
        in_run = folder.checkpoints_in(paths[0] / folder.CHECKPOINTS)
        paths = folder.checkpoints_in(paths[0]) or in_run or paths
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


def check_mergeable(checkpoints: Sequence[Checkpoint], out: Path) -> None:
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
            ours, theirs = (adapter_config(checkpoint.path) for checkpoint in (first, other))
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
    _check_out(out)


def _check_out(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise InputError(f"out: {out} exists; name another")
    if not out.parent.is_dir():
        raise InputError(f"out: there is no folder {out.parent} for {out.name}")


def adapter_config(path: Path) -> dict[str, Any]:
    """What adapter_config.json in a folder says; nothing where there is none."""
    config = path / "adapter_config.json"
    return read_json(config) if config.is_file() else {}


def _described(checkpoint: Checkpoint, name: str) -> str:
    if not (entry := checkpoint.tensors.get(name)):
        return "missing"
    return f"{NAMES[entry.form.dtype]} of shape {entry.form.shape}"


def _sign_of_quantization(checkpoint: Checkpoint) -> str | None:
    """What says that the checkpoint is a quantized model, if anything does."""
    headers = checkpoint.tensors
    forms = [x.form for x in headers.values()]
    if any(not x.dtype.is_floating_point and math.prod(x.shape) > 1 for x in forms):
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
