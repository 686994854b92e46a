"""`paceline bench`: time, bytes and compile time of a step of each optimizer, side by side."""

import os
import tempfile
import time
from collections.abc import Callable, Iterable
from statistics import median, quantiles
from typing import Any, NamedTuple, cast
from unittest.mock import patch

import schedulefree
import torch
from rich.box import MARKDOWN
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn import Parameter
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .. import kernels, update
from ..optimizer import PACE
from ..pullback import Pullback
from ..train import InputError, unknown
from ..train.manifest import environment, write_json
from .options import Bench, Model

FUSED_ADAMW = "AdamW fused"
TABLE = {  # of the printed table, each with the format of a row's value
    "ms": "{milliseconds:.1f}",
    "× AdamW fused": "{ratio:.2f}",
    "quartiles": "{ratio_quartiles[0]:.2f}-{ratio_quartiles[1]:.2f}",
    "× byte floor": "{times_byte_floor:.2f}",
    "of a copy": "{share_of_copy:.0%}",
    "state B": "{state_bytes_per_parameter:.2f}",
    "scratch MB": "{scratch_megabytes:.1f}",
    "first step s": "{first_step_seconds:.2f}",
    "share": "{share_of_training_step:.1%}",  # of the model training
}


class Contender(NamedTuple):
    """An optimizer to measure."""

    name: str
    make: Callable[[list[Parameter]], "Stepper"]
    bytes: int  # that a step reads and writes for each parameter, at least
    by_name: bool = False  # measured only if named: all together do not fit into 16 GB


class Stepper(NamedTuple):
    """An optimizer with its parameters."""

    step: Callable[[], Any]
    state: Callable[[], int]  # bytes of its state


def bench(options: Bench, console: Console) -> dict[str, Any]:
    """Run the benchmark; print a table for each model, and write the JSON file if there is a path.

    Raises:
        InputError: an option cannot be used, or the CPU's kernel cannot be built.
    """
    known = [contender.name for contender in _contenders()]
    for name in options.only:
        if name not in known:
            raise InputError(f"only: {unknown(name, known, 'optimizer')}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise InputError("device: torch finds no cuda device here; give cpu")
    if options.out:  # before the measurement, which takes minutes
        folder = options.out.parent
        if options.out.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            raise InputError(
                f"out: {options.out} cannot be written; name a file in a folder that exists"
            )
    if options.threads:
        torch.set_num_threads(options.threads)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    results: dict[str, Any] = environment() | {
        "device": device,
        "threads": torch.get_num_threads(),
        "rounds": options.rounds,
        "kernel_build_seconds": _build_seconds() if device == "cpu" else None,
    }
    console.width = max(console.width, 132)  # all columns of the tables
    if device == "cpu":
        console.print(f"Cold build of the CPU's kernel: {results['kernel_build_seconds']:.1f} s")
    for model in options.models:
        results[model] = _measure(model, device, options)
        console.print(_bench_table(model, results[model]))
    if options.out:
        write_json(options.out, results)
        console.print(f"Results: {options.out}")
    return results


# ---- what is measured --------------------------------------------------------------------------


def _maker(kind: Callable[..., torch.optim.Optimizer], **options: Any) -> Callable[..., Stepper]:
    def make(params: list[Parameter]) -> Stepper:
        opt = kind(params, **options)
        kept = opt.state.values
        return Stepper(opt.step, lambda: _tensor_bytes(x for s in kept() for x in s.values()))

    return make


def _with_ema(params: list[Parameter]) -> Stepper:
    adamw = _maker(torch.optim.AdamW, fused=True)(params)
    model = torch.nn.ParameterList(params)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))

    def step() -> None:
        adamw.step()
        average.update_parameters(model)

    return Stepper(step, lambda: adamw.state() + _tensor_bytes(average.parameters()))


def _schedule_free(params: list[Parameter]) -> torch.optim.Optimizer:
    opt = schedulefree.AdamWScheduleFree(params, warmup_steps=10)
    opt.train()
    return opt


def _patched(make: Callable[..., Stepper], replaced: Any) -> Callable[..., Stepper]:
    """The same optimizer, with a part of the package replaced while it steps."""

    def made(params: list[Parameter]) -> Stepper:
        inner = make(params)
        return Stepper(replaced(inner.step), inner.state)

    return made


def _pace(**options: Any) -> Callable[..., Stepper]:
    return _maker(PACE, **{"pullback": 0.1, **options})


def _around_adamw(params: list[Parameter], pullback: float) -> torch.optim.Optimizer:
    return Pullback(torch.optim.AdamW(params, fused=True), pullback=pullback)


def _contenders() -> list[Contender]:
    AdamW = torch.optim.AdamW
    whole = patch.multiple(update, TOGETHER_ON_CPU=2**62, TOGETHER=2**62)
    bf16 = torch.bfloat16
    # Bytes: parameters, moments and averages are read and written (8 each in float32), gradients
    # read (4); the EMA of swa_utils and that of Pullback read the weights once more; its pull
    # copies the weights (8), and reads the copy and v, and reads and writes the weights (16).
    # BEMA reads θ and θ_0 (8), and reads and writes its EMA and the average (16), besides PACE.
    return [
        Contender(FUSED_ADAMW, _maker(AdamW, fused=True), 28),
        Contender("AdamW foreach", _maker(AdamW, foreach=True), 28),
        Contender("AdamW for-loop", _maker(AdamW, foreach=False, fused=False), 28),
        Contender("AdamW fused + EMA", _with_ema, 40),
        Contender("schedulefree AdamW", _maker(_schedule_free), 28),
        Contender("PACE eager unsliced", _patched(_pace(fused=False), whole), 36),
        Contender("PACE eager", _pace(fused=False), 36),
        Contender("Pullback(AdamW fused), c = 0", _maker(_around_adamw, pullback=0.0), 40, True),
        Contender("Pullback(AdamW fused)", _maker(_around_adamw, pullback=0.1), 60, True),
        Contender("PACE fused", _pace(fused=True), 36),
        Contender("PACE fused, auto", _pace(fused=True, pullback="auto", kappa=0.3), 36, True),
        Contender("PACE fused, returned apart", _pace(fused=True, return_kappa=0.7), 44, True),
        Contender("PACE fused, BEMA", _pace(fused=True, averaging="bema"), 60, True),
        Contender("PACE fused bf16 state", _pace(fused=True, state_dtype=bf16), 24),
    ]


def _tensor_bytes(values: Iterable[Any]) -> int:
    return sum(x.nbytes for x in values if isinstance(x, Tensor))


def shapes(model: Model) -> list[tuple[int, ...]]:
    """The shapes of the parameters of GPT-2 124M, of SmolLM2-1.7B, or of 2,000 small tensors."""
    if model == "large":
        layer = [(2048, 2048)] * 4 + [(8192, 2048)] * 2 + [(2048, 8192)] + [(2048,)] * 2
        return [(49152, 2048), *layer * 24, (2048,)]
    if model == "gpt2":
        layer = [(2304, 768), (768, 768), (3072, 768), (768, 3072), (2304,), (3072,)]
        layer += [(768,)] * 6
        return [(50257, 768), (1024, 768), *layer * 12, (768,), (768,)]
    return [(8, 768), (768, 8)] * 800 + [(64, 768)] * 200 + [(1024, 64)] * 100 + [(768,)] * 100


def _small_gpt2(device: str) -> tuple[list[Parameter], Callable[[], None]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    shape: dict[str, Any] = {"n_positions": 256, "n_embd": 256, "n_layer": 4, "n_head": 4}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=8192, **shape, bos_token_id=0, eos_token_id=0))
    cast(torch.nn.Module, model).to(device)
    tokens = torch.randint(8192, (8, 128), device=device)

    def backward() -> None:
        model.zero_grad(set_to_none=False)
        logits = model(input_ids=tokens).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()

    return list(model.parameters()), backward


# ---- measuring ---------------------------------------------------------------------------------


def _measure(model: Model, device: str, options: Bench) -> dict[str, Any]:
    backward: Callable[[], None] | None = None
    if model == "training":
        params, backward = _small_gpt2(device)
        backward()
    else:
        torch.manual_seed(0)
        params = [Parameter(0.02 * torch.randn(s, device=device)) for s in shapes(model)]
        for p in params:
            p.grad = torch.randn_like(p)
    elements = sum(p.numel() for p in params)
    wanted = {FUSED_ADAMW, *options.only}
    every = [c for c in _contenders() if not c.by_name or c.name in wanted]
    contenders = [c for c in every if c.name in wanted or not options.only]
    steppers, first = {}, {}
    with (
        tempfile.TemporaryDirectory() as cold,
        patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=cold),
    ):
        for contender in contenders:
            steppers[contender.name] = contender.make(params)
            first[contender.name] = _time(steppers[contender.name].step, device)
            steppers[contender.name].step()
    scratch = {name: _scratch(stepper.step, device) for name, stepper in steppers.items()}
    times: dict[str, list[float]] = {name: [] for name in steppers}
    ratios: dict[str, list[float]] = {name: [] for name in steppers}
    stream = torch.ones(elements, device=device)
    target, source = stream[: 2 * (elements // 2)].chunk(2)
    passes: list[float] = []
    streams: list[float] = []
    copies: list[float] = []
    for _ in track(range(options.rounds), description=model, transient=True):
        for name, stepper in steppers.items():
            if backward:
                passes.append(_time(backward, device))
            beside = _time(steppers[FUSED_ADAMW].step, device)
            if backward:
                passes.append(_time(backward, device))
            times[name].append(_time(stepper.step, device))
            ratios[name].append(times[name][-1] / beside)
        streams.append(_time(lambda: stream.mul_(1.0000001), device))
        copies.append(_time(lambda: target.copy_(source), device))
    bandwidth = 8 * elements / median(streams)
    copied = 8 * len(source) / median(copies)
    rows = {}
    for contender in contenders:
        name, own = contender.name, median(times[contender.name])
        low, _, high = quantiles(ratios[name], n=4)
        rows[name] = {
            "milliseconds": 1e3 * own,
            "ratio": median(ratios[name]),
            "ratio_quartiles": [low, high],
            "state_bytes_per_parameter": steppers[name].state() / elements,
            "scratch_megabytes": scratch[name] / 1e6,
            "first_step_seconds": first[name],
            "times_byte_floor": own * bandwidth / (contender.bytes * elements),
            "share_of_copy": contender.bytes * elements / own / copied,
            "share_of_training_step": own / (own + median(passes)) if passes else None,
        }
    return {
        "parameters": elements,
        "tensors": len(params),
        "largest_tensor_megabytes": max(p.nbytes for p in params) / 1e6,
        "bandwidth_gigabytes_per_second": bandwidth / 1e9,
        "copy_gigabytes_per_second": copied / 1e9,
        "forward_and_backward_milliseconds": 1e3 * median(passes) if passes else None,
        "optimizers": rows,
    }


def _time(work: Callable[[], Any], device: str) -> float:
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def _scratch(work: Callable[[], Any], device: str) -> int:
    """The largest number of bytes that torch allocates during `work`."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it logs its start and stop to stderr
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    held = peak = 0
    assert seen.profiler is not None
    for event in cast(Any, seen.profiler.kineto_results).events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def _build_seconds() -> float:
    """Time to build the CPU's kernel with an empty cache."""
    with tempfile.TemporaryDirectory() as cold, patch.dict(os.environ, PACELINE_CACHE=cold):
        try:
            return _time(kernels.cpu.build.__wrapped__, "cpu")
        except kernels.BuildError as error:
            raise InputError(f"the benchmark needs the one-pass kernel: {error}") from error


def _bench_table(model: Model, result: dict[str, Any]) -> Table:
    title = (
        f"{model}: {result['parameters'] / 1e6:.1f}M parameters in {result['tensors']} tensors, "
        f"{result['bandwidth_gigabytes_per_second']:.0f} GB/s, "
        f"a copy {result['copy_gigabytes_per_second']:.0f} GB/s"
    )
    if result["forward_and_backward_milliseconds"]:
        title += f", forward and backward {result['forward_and_backward_milliseconds']:.0f} ms"
    table = Table(title=title, title_justify="left", box=MARKDOWN)
    table.add_column("optimizer", no_wrap=True)
    columns = [column for column in TABLE if column != "share" or model == "training"]
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for name, row in result["optimizers"].items():
        table.add_row(name, *(TABLE[column].format(**row) for column in columns))
    return table
