"""`paceline check-device`: whether PACE is right on this machine's accelerator, and how fast.

The reference is `update.step_` in float64 on the CPU. A device may be off from it by twice what the
same step in torch operations on the CPU is, and the rounding of the arithmetic.
"""

import copy
import io
import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import Parameter

from .. import kernels
from ..files import whole
from ..optimizer import PACE
from ..pullback import Pullback
from ..train import InputError
from ..train.manifest import environment
from .bench import bench, shapes
from .options import Bench, CheckDevice, Model

SHAPES = [(65, 64), (1024,), (3,), ()]
STEPS = 6
BF16 = torch.bfloat16
FORMS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "float32, bfloat16 state": (torch.float32, {"state_dtype": BF16}),
    "bfloat16": (BF16, {}),
    "bfloat16, stochastic": (BF16, {"state_dtype": BF16, "stochastic_round": True}),
    "float64": (torch.float64, {}),
}
RULES: dict[str, dict[str, Any]] = {
    "pull": {"pullback": 0.3, "returns": "slow=ema:kappa=0.7"},
    "no clip": {"pullback": 2.0, "clip": False, "kappa": 0.3, "maximize": True},
    "uniform gain": {"pullback": 0.3, "gain": "scalar"},
    "watching": {"pullback": 0.0, "averaging": "ema:every=3"},
}
COMPARED = ("AdamW for-loop", "AdamW foreach", "AdamW fused + EMA", "schedulefree AdamW")
OURS = ("PACE fused", "PACE fused bf16 state", "Pullback(AdamW fused)")
NO_TIME = "no time was left"
BYTES = 48  # a parameter that a bench of one optimizer beside AdamW takes, at most
Check = Callable[[torch.device], None]


class Outcome(NamedTuple):
    """What one check found."""

    name: str
    fault: str | None  # None: it is right
    skipped: bool = False


class Failed(Exception):
    """A check has found something wrong; the message says what."""


def check_device(options: CheckDevice, console: Console) -> int:
    """Run the checks and the benchmark, and write the file.

    Returns:
        0, or 1 if a check has failed.

    Raises:
        InputError: there is no accelerator, or the file cannot be written.
    """
    device = accelerator()
    if device is None:
        raise InputError("check-device: torch finds no accelerator on this machine")
    if options.out.is_dir() or not options.out.parent.is_dir():
        raise InputError(f"out: {options.out} cannot be written; name a file in a folder")
    until = time.monotonic() + options.seconds
    outcomes = []
    for outcome in checked(device, until):
        word = "not run" if outcome.skipped else "FAILED" if outcome.fault else "right"
        console.print(f"{word:8} {outcome.name}{f': {outcome.fault}' * bool(outcome.fault)}")
        outcomes.append(outcome)
    tables = list(_measured(device, options, until)) if options.bench else []
    with whole(options.out) as partial:
        partial.write_text(_page(device, outcomes, tables), encoding="utf-8")
    console.print(f"Results: {options.out}")
    return int(any(x.fault and not x.skipped for x in outcomes))


def accelerator() -> torch.device | None:
    """The device that torch computes on besides the CPU, if there is one."""
    if not torch.accelerator.is_available():
        return None
    return torch.accelerator.current_accelerator()


def checked(device: torch.device, until: float = math.inf) -> Iterator[Outcome]:
    """The outcome of each check on a device; none raises.

    Args:
        device: where to check.
        until: what has not begun by then, of `time.monotonic()`, is left out.
    """
    for name, check in _checks().items():
        if time.monotonic() >= until:
            yield Outcome(name, NO_TIME, skipped=True)
            continue
        try:
            check(device)
            yield Outcome(name, None)
        except NotImplementedError as error:
            yield Outcome(name, _line(error), skipped=True)
        except Exception as error:
            yield Outcome(name, _line(error))


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or ["no message"]
    return lines[0] if isinstance(error, Failed) else f"{type(error).__name__}: {lines[0]}"


# ---- training, the same everywhere --------------------------------------------------------------


def _params(device: torch.device, dtype: torch.dtype) -> list[Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [
        Parameter(torch.randn(shape, generator=generator).to(BF16).to(device, dtype))
        for shape in SHAPES
    ]


def _give(params: list[Parameter], t: int) -> None:
    generator = torch.Generator().manual_seed(1 + t)
    for p in params:
        grad = 1.0 + torch.randn(p.shape, generator=generator)
        p.grad = grad.to(BF16).to(p.device, p.dtype)  # the same in each dtype


def _train(
    opt: torch.optim.Optimizer, params: list[Parameter], first: int = 0, steps: int = STEPS
) -> None:
    for t in range(first, first + steps):
        _give(params, t)
        opt.param_groups[0]["lr"] = 0.05 * (1 - t / 20)
        opt.step()


def _averaged(opt: PACE | Pullback, params: list[Parameter]) -> dict[str, Tensor]:
    """Weights and averages, in float64 on the CPU."""
    found = {"weights": _flat(params)}
    for name in opt.returns:
        with opt.averaged(name):
            found[f"the average {name!r}"] = _flat(params)
    return found


def _flat(tensors: list[Any]) -> Tensor:
    return torch.cat([x.detach().cpu().double().reshape(-1) for x in tensors])


def _hold(
    made: Callable[[torch.device, torch.dtype, bool], tuple[PACE | Pullback, list[Parameter]]],
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Raises: Failed: a training on the device is further from the reference than allowed."""
    cpu = torch.device("cpu")
    runs = []
    for place, kind, on_device in (
        (device, dtype, True),
        (cpu, dtype, False),
        (cpu, torch.float64, False),
    ):
        opt, params = made(place, kind, on_device)
        # On the device the kernel, though these are few elements; beside it torch operations.
        with patch.object(kernels, "WORTH_BUILDING", 0 if on_device else 2**62):
            _train(opt, params)
        runs.append(_averaged(opt, params))
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    for name, exact in runs[2].items():
        off, usual = ((run[name] - exact).abs() for run in runs[:2])
        unit = eps * float(exact.abs().max())
        for measure in (torch.Tensor.max, torch.Tensor.mean):
            most = 2 * float(measure(usual)) + 50 * unit
            if not float(measure(off)) <= most:
                raise Failed(f"{name} are off by {float(measure(off)):.1e}, allowed are {most:.1e}")


# ---- the checks ---------------------------------------------------------------------------------


def _checks() -> dict[str, Check]:
    found: dict[str, Check] = {}
    for form in FORMS:
        for rule in RULES:
            for fused in (True, False):
                name = f"step, {form}, {rule}, {'kernel' if fused else 'operations'}"
                found[name] = lambda d, x=(form, rule, fused): _step(d, *x)  # type: ignore[misc]
    for c in (0.0, 3.0):
        found[f"Pullback(AdamW), c = {c:g}"] = lambda d, c=c: _around(d, c)  # type: ignore[misc]
    return found | {
        "capturable step, one launch": _capturable,
        "swap, bit for bit": _swap,
        "CUDA graph": _graph,
        "resume, bit for bit": _resume,
        "guard": _guard,
        "GradScaler": _scaler,
        "compiled model": _compiled,
    }


def _step(device: torch.device, form: str, rule: str, fused: bool) -> None:
    dtype, options = FORMS[form]
    if dtype == torch.float64 and device.type == "mps":
        raise NotImplementedError("the device has no float64")

    def made(place: torch.device, kind: torch.dtype, own: bool) -> tuple[PACE, list[Parameter]]:
        params = _params(place, kind)
        exact = kind == torch.float64 and not own
        narrow = {} if exact else options
        return PACE(params, fused=fused and own, **RULES[rule], **narrow), params

    _hold(made, device, dtype)


def _capturable(device: torch.device) -> None:
    def made(place: torch.device, kind: torch.dtype, own: bool) -> tuple[PACE, list[Parameter]]:
        params = _params(place, kind)
        return PACE(params, pullback=0.3, fused=own, capturable=own), params

    _hold(made, device, torch.float32)


@contextmanager
def _by_kernels() -> Iterator[None]:
    """Fail where torch operations take a kernel's place: they would be held to themselves."""
    kernels._warn.cache_clear()  # it says each fault once
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*without its one-pass kernel")
        try:
            yield
        except UserWarning as fault:
            raise Failed(str(fault)) from None


@_by_kernels()
def _around(device: torch.device, c: float) -> None:
    def made(place: torch.device, kind: torch.dtype, own: bool) -> tuple[Pullback, list[Parameter]]:
        params = _params(place, kind)
        return Pullback(torch.optim.AdamW(params, fused=own), pullback=c, returns="uniform"), params

    _hold(made, device, torch.float32)


def _bits(tensors: list[Any]) -> list[bytes]:
    flat = [x.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for x in tensors]
    return [x.numpy().tobytes() for x in flat]


def _held(opt: PACE, params: list[Parameter]) -> list[bytes]:
    """The bits of weights and state."""
    state = [opt.state[p][key] for p in params for key in sorted(opt.state[p])]
    return _bits([*params, *state])


@_by_kernels()
def _swap(device: torch.device) -> None:
    for form, (dtype, options) in FORMS.items():
        if dtype == torch.float64 and device.type == "mps":
            continue
        params = _params(device, dtype)
        opt = PACE(params, pullback=0.3, returns="slow=ema:kappa=0.7", **options)
        _train(opt, params)
        before, live = _held(opt, params), _bits(list(params))
        for name in opt.returns:
            put_in = []
            for least in (0, 2**62):  # by the kernel, and by torch operations
                with patch.object(kernels, "WORTH_BUILDING", least):
                    opt.eval(name)
                    put_in.append(_bits(list(params)))
                    opt.train()
                if _held(opt, params) != before:
                    raise Failed(f"train() after eval({name!r}) gives other bits back, with {form}")
            if put_in[0] != put_in[1]:
                raise Failed(f"by the kernel eval({name!r}) puts other weights in, with {form}")
            if put_in[0] == live:
                raise Failed(f"eval({name!r}) changes nothing, with {form}")


def _graph(device: torch.device) -> None:
    if device.type != "cuda":
        raise NotImplementedError("CUDA alone has them")
    ends = []
    for replayed in (True, False):
        params = _params(device, torch.float32)
        opt = PACE(params, lr=torch.tensor(0.05, device=device), pullback=0.3, capturable=True)
        opt.param_groups[0]["fused"] = True
        static = [torch.empty_like(p) for p in params]

        def give(t: int, params: Any = params, static: Any = static) -> None:
            _give(params, t)
            for p, g in zip(params, static, strict=True):
                p.grad = g.copy_(p.grad)

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for t in range(2):
                give(t)
                opt.step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        if replayed:
            for p, g in zip(params, static, strict=True):
                p.grad = g
            with torch.cuda.graph(graph):
                opt.step()
        for t in range(2, STEPS):
            give(t)
            opt.param_groups[0]["lr"].mul_(0.9)
            graph.replay() if replayed else opt.step()
        torch.cuda.synchronize()
        ends.append(_held(opt, params))
    if ends[0] != ends[1]:
        raise Failed("replayed steps give other bits than steps that are taken one by one")


def _resume(device: torch.device) -> None:
    params = _params(device, torch.float32)
    opt = PACE(params, pullback=0.3, state_dtype=BF16, returns="slow=ema:kappa=0.7")
    _train(opt, params)
    others = [Parameter(p.detach().clone()) for p in params]
    again = PACE(others, pullback=0.3, state_dtype=BF16, returns="slow=ema:kappa=0.7")
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    for one, theirs in ((opt, params), (again, others)):
        _train(one, theirs, STEPS, 3)
    if _held(opt, params) != _held(again, others):
        raise Failed("a loaded run goes on with other bits")


def _guard(device: torch.device) -> None:
    for fused in (True, False):
        params = _params(device, torch.float32)
        opt = PACE(params, pullback=0.3, fused=fused)
        _train(opt, params)
        _give(params, STEPS)
        assert params[0].grad is not None
        params[0].grad[3, 5] = float("nan")
        state = [opt.state[params[0]][k] for k in ("exp_avg", "exp_avg_sq", "average")]
        tensors = [params[0], *state]
        before = _bits([x[3, 5] for x in tensors])
        opt.step()
        if _bits([x[3, 5] for x in tensors]) != before:
            raise Failed("a coordinate whose gradient is NaN has moved")
        if not all(x.isfinite().all() for x in tensors):
            raise Failed("a NaN of the gradient has spread")
        if (opt.stats() or {}).get("guarded_coordinates") != 1:
            raise Failed("the guarded coordinate was not counted")


def _scaler(device: torch.device) -> None:
    ends = []
    for scaled in (True, False):
        params = _params(device, torch.float32)
        opt = PACE(params, pullback=0.3)
        scaler = torch.amp.GradScaler(device.type, init_scale=1024.0, enabled=scaled)
        for t in range(STEPS):
            _give(params, t)
            overflows = t == 2
            for p in params:
                if scaled:
                    scaler.scale(torch.zeros((), device=device))
                    assert p.grad is not None
                    p.grad.mul_(float("inf") if overflows else scaler.get_scale())
            if scaled or not overflows:
                scaler.step(opt)
            scaler.update()
        ends.append(_averaged(opt, params))
    for name, x in ends[0].items():
        if not torch.allclose(x, ends[1][name], rtol=1e-5, atol=1e-5):
            raise Failed(f"{name} differ from those of a run without the step that overflowed")


def _compiled(device: torch.device) -> None:
    ends = []
    for compiles in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)).to(device)
        opt = PACE(model.parameters(), lr=0.01, pullback=0.3)
        backend = "eager" if device.type == "cpu" else "inductor"
        run: Any = torch.compile(model, backend=backend) if compiles else model
        x = torch.linspace(-1, 1, 32 * 8).view(32, 8).to(device)
        for _ in range(STEPS):
            run(x).square().mean().backward()
            opt.step()
            opt.zero_grad()
        ends.append(_averaged(opt, list(model.parameters())))
    for name, y in ends[0].items():
        if not torch.allclose(y, ends[1][name], rtol=1e-3, atol=1e-3):
            raise Failed(f"{name} differ from those of the model that is not compiled")


# ---- measuring ----------------------------------------------------------------------------------


def _measured(device: torch.device, options: CheckDevice, until: float) -> Iterator[str]:
    """Tables of the benchmark, in Markdown; or why there is none."""
    if device.type not in ("cpu", "cuda"):
        yield f"`paceline bench` does not measure on {device.type}."
        return
    together: list[tuple[str, ...]] = [(*COMPARED, *OURS)]
    apart: list[tuple[str, ...]] = [
        (name,) for name in OURS
    ]  # one after another, or the large ones would not fit
    plan: list[tuple[Model, list[tuple[str, ...]]]] = [
        ("gpt2", together),
        ("small", together),
        ("large", apart),
    ]
    for model, names in plan:
        elements = sum(math.prod(shape) for shape in shapes(model))
        need = BYTES * elements * max(1, len(names[0]) // 3)
        free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else need
        if free < need:
            yield f"{model}: not measured, for it takes {need / 1e9:.0f} GB of the device's memory."
            continue
        for only in names:
            if time.monotonic() >= until:
                yield f"{model}, {', '.join(only)}: not measured, for {NO_TIME}."
                continue
            text = io.StringIO()
            on: Any = device.type
            wanted = Bench(models=(model,), only=only, rounds=options.rounds, device=on)
            try:
                bench(wanted, Console(file=text, width=140))
            except Exception as error:  # the checks are written whatever happens here
                yield f"{model}: not measured: {_line(error)}"
                continue
            yield text.getvalue().strip()


def _page(device: torch.device, outcomes: list[Outcome], tables: list[str]) -> str:
    made = environment()
    versions = {"triton": "none", **made["versions"]}
    try:
        import triton

        versions["triton"] = triton.__version__
    except ImportError:
        pass
    failed = [x for x in outcomes if x.fault and not x.skipped]
    right = sum(not x.fault for x in outcomes)
    left_out = sum(x.fault == NO_TIME for x in outcomes)
    lines = [
        f"# paceline check-device, {made['started'][:10]}: {right} right, {len(failed)} wrong"
        + f", {left_out} left out" * bool(left_out),
        "",
        f"    {made['command']}",
        "",
        f"- Device: {device.type}, {', '.join(made['hardware']['gpus']) or 'no CUDA GPU'}; "
        f"CUDA {torch.version.cuda}, HIP {torch.version.hip}",
        f"- System: {made['hardware']['system']}, {made['hardware']['cpu']}",
        f"- Versions: {', '.join(f'{name} {x}' for name, x in versions.items())}",
        f"- Commit: {made['git_commit']}",
        "",
        "| check | outcome |",
        "|---|---|",
    ]
    for x in outcomes:
        fault = (x.fault or "").replace("|", "\\|")
        word = f"not run: {fault}" if x.skipped else f"**wrong**: {fault}" if fault else "right"
        lines.append(f"| {x.name} | {word} |")
    for table in tables:
        lines += ["", table]
    if tables:
        lines += [
            "",
            "*Of a copy*: the bandwidth that a step reaches, by the bytes that it needs to move, "
            "as a share of that of a copy on the device in the same rounds.",
        ]
    return "\n".join(lines) + "\n"
