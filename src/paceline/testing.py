"""The conformance kit: what a training run asks of an optimizer, as checks anyone can run.

    from paceline.testing import check_optimizer

    def make(params):
        return MyOptimizer(params, lr=0.05)

    def test_conformance():
        report = check_optimizer(make)
        assert report.passed, report

Each check trains a small net and states one promise. They are about PACE's kind of optimizer, which
keeps an average and swaps it in with `eval()` and out with `train()`; for one that does not, the
checks about that are not run.
"""

import copy
import io
import pickle
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

Make = Callable[[Iterable[nn.Parameter]], Optimizer]
Outcome = Literal["passed", "failed", "not run"]

TIMEOUT = timedelta(seconds=60)  # of a rank that waits for another


@dataclass(frozen=True)
class Check:
    """One promise, and whether it was kept."""

    name: str
    promise: str
    outcome: Outcome
    reason: str = ""  # why it failed or was not run


@dataclass(frozen=True)
class Report:
    """What `check_optimizer` found; as text, a table."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return not self.failures

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if check.outcome == "failed")

    def __str__(self) -> str:
        width = max(len(check.name) for check in self.checks)
        lines = []
        for check in self.checks:
            lines.append(f"{check.outcome:8} {check.name:{width}}  {check.promise}")
            if check.reason:
                lines.append(" " * 9 + f"{'':{width}}  -> {check.reason}")
        counts = [sum(c.outcome == x for c in self.checks) for x in ("passed", "failed", "not run")]
        return "\n".join([*lines, "{} passed, {} failed, {} not run".format(*counts)])


def check_optimizer(make_optimizer: Make, *, ranks: int = 2) -> Report:
    """Check an optimizer against the promises that a training run rests on.

    Args:
        make_optimizer: makes one for these parameters, the same each time: float32, 64 or 16-bit,
            of any shape; learning rate and the like as you please, above 0.
        ranks: processes of the distributed checks, joined by gloo and a file. They import
            `make_optimizer` by its name, which must so be a function of a module. 0: do without.

    Returns:
        A report, some 10 seconds later. Nothing is raised for a check that fails.
    """
    with torch.random.fork_rng():
        checks = [_run(check, make_optimizer) for check in _CHECKS]
    return Report((*checks, *_run_on_ranks(make_optimizer, ranks)))


# ---- how checks run --------------------------------------------------------------------------

_CHECKS: list[Callable[[Make], None]] = []
_RANK_CHECKS: list[Callable[[Make, Path], None]] = []


class _NotRun(Exception):
    """The check does not apply; the message says why."""


def _check(function: Callable[[Make], None]) -> Callable[[Make], None]:
    _CHECKS.append(function)
    return function


def _rank_check(function: Callable[[Make, Path], None]) -> Callable[[Make, Path], None]:
    _RANK_CHECKS.append(function)
    return function


def _title(check: Callable[..., None]) -> tuple[str, str]:
    return check.__name__.strip("_").replace("_", " "), (check.__doc__ or "").strip()


def _run(check: Callable[..., None], *arguments: Any) -> Check:
    name, promise = _title(check)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check(*arguments)
    except _NotRun as why:
        return Check(name, promise, "not run", str(why))
    except Exception as error:
        said = str(error).strip().splitlines() or [""]
        kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
        return Check(name, promise, "failed", kind + said[0])
    return Check(name, promise, "passed")


def _run_on_ranks(make: Make, ranks: int) -> list[Check]:
    def all_of_them(outcome: Outcome, why: str) -> list[Check]:
        return [Check(*_title(check), outcome, why) for check in _RANK_CHECKS]

    if not ranks:
        return all_of_them("not run", "ranks=0")
    if not dist.is_available():
        return all_of_them("not run", "this torch has no torch.distributed")
    from torch.multiprocessing.spawn import spawn

    try:
        pickle.dumps(make)
    except Exception:
        why = "other processes cannot import make_optimizer; make it a module's function"
        return all_of_them("not run", why)
    with tempfile.TemporaryDirectory() as folder:
        try:
            spawn(_on_rank, (ranks, folder, make), nprocs=ranks)  # type: ignore[no-untyped-call]
        except Exception as error:
            why = f"a process ended: {str(error).strip().splitlines()[-1]}"
            return all_of_them("failed", why)
        files = [Path(folder, f"{rank}.pickle") for rank in range(ranks)]
        found = [pickle.loads(file.read_bytes()) for file in files]
    # Of each check the first rank that failed, or the first.
    return [
        next((check for check in same if check.outcome == "failed"), same[0])
        for same in zip(*found, strict=True)
    ]


def _on_rank(rank: int, ranks: int, folder: str, make: Make) -> None:
    torch.set_num_threads(1)
    place = f"file://{Path(folder, 'store')}"
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=ranks, timeout=TIMEOUT)
    found = [_run(check, make, Path(folder)) for check in _RANK_CHECKS]
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(found))
    dist.destroy_process_group()


# ---- a run -----------------------------------------------------------------------------------


class _Net(nn.Module):
    """Rows that do not divide by two ranks, and a weight used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.norm = nn.LayerNorm(5)
        self.middle = nn.Linear(5, 5)
        self.last = nn.Linear(5, 1)
        self.tied = nn.Linear(5, 5)
        self.tied.weight = self.middle.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(torch.tanh(self.norm(self.first(x))))
        out: Tensor = self.last(torch.tanh(self.tied(x)))
        return out


class _Training:
    """A net, its optimizer and its data: the same for the same seed."""

    def __init__(
        self,
        make: Make,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
    ) -> None:
        torch.manual_seed(seed)
        self.model = wrap(_Net().to(dtype))
        self.optimizer: Any = make(self.model.parameters())
        self.data = torch.Generator().manual_seed(seed)
        self.dtype = dtype
        self.train()

    @property
    def swaps(self) -> bool:
        return hasattr(self.optimizer, "eval") and hasattr(self.optimizer, "train")

    def must_swap(self) -> None:
        if not self.swaps:
            raise _NotRun("it has no eval() and train()")

    def train(self) -> None:
        if self.swaps:
            self.optimizer.train()

    def backward(self, x: Tensor, scale: float = 1.0) -> None:
        (scale * (self.model(x) - x[:, :1]).square().mean()).backward()

    def steps(self, count: int, share: int = 0, shares: int = 1) -> None:
        """Steps, on one of so many equal shares of each batch."""
        for _ in range(count):
            x = torch.randn(16, 6, generator=self.data).to(self.dtype).chunk(shares)[share]
            self.optimizer.zero_grad()
            self.backward(x)
            self.optimizer.step()
        self.optimizer.zero_grad()

    def weights(self) -> list[Tensor]:
        return [_whole(p) for p in self.model.parameters()]

    def returned(self) -> list[Tensor]:
        """The weights that the optimizer would have evaluated and saved."""
        if not self.swaps:
            return self.weights()
        self.optimizer.eval()
        weights = self.weights()
        self.optimizer.train()
        return weights

    def held(self) -> dict[str, Any]:
        """Weights, and the optimizer's state and options."""
        return {"weights": self.weights(), "optimizer": copy.deepcopy(self.optimizer.state_dict())}

    def save(self) -> io.BytesIO:
        run = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "data": self.data.get_state(),
            "random": torch.get_rng_state(),
        }
        file = io.BytesIO()
        torch.save(run, file)
        file.seek(0)
        return file

    def load(self, file: io.BytesIO) -> None:
        run = torch.load(file, weights_only=True)
        self.model.load_state_dict(run["model"])
        self.optimizer.load_state_dict(run["optimizer"])
        self.data.set_state(run["data"])
        torch.set_rng_state(run["random"])
        self.train()


def _whole(x: Tensor) -> Tensor:
    x = x.detach()
    return x.full_tensor() if hasattr(x, "full_tensor") else x.clone()


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)


def _must(ok: bool, otherwise: str) -> None:
    if not ok:
        raise AssertionError(otherwise)


def _distance(a: list[Tensor], b: list[Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True) if x.numel())


def _must_be_close(a: list[Tensor], b: list[Tensor], otherwise: str) -> None:
    far = _distance(a, b)
    _must(far < 1e-5, f"{otherwise}, by up to {far:.1g}")


def _must_be_finite(run: _Training, after: str) -> None:
    for name, weights in (("live", run.weights()), ("returned", run.returned())):
        _must(all(x.isfinite().all() for x in weights), f"{name} weights are not finite {after}")


def _must_refuse(run: _Training, state: dict[str, Any]) -> None:
    before = run.held()
    try:
        run.optimizer.load_state_dict(state)
    except Exception as error:
        said = f"{type(error).__name__} was raised"
    else:
        raise AssertionError("load_state_dict() took it without an error")
    _must(_same(run.held(), before), f"{said} when half of it had been loaded")


# ---- stepping --------------------------------------------------------------------------------


@_check
def _optimizer_class(make: Make) -> None:
    """It is a torch.optim.Optimizer with flat state and groups."""
    run = _Training(make)
    _must(isinstance(run.optimizer, Optimizer), "it is no torch.optim.Optimizer")
    run.steps(1)
    params = set(run.model.parameters())
    _must(set(run.optimizer.state) <= params, "its state has other keys than parameters")


@_check
def _closure(make: Make) -> None:
    """step(closure) returns the closure's loss."""
    run = _Training(make)
    run.backward(torch.ones(4, 6))
    _must(run.optimizer.step(lambda: 2.5) == 2.5, "it does not")


@_check
def _hooks(make: Make) -> None:
    """Hooks before and after a step are called."""
    run, calls = _Training(make), []
    run.optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    run.optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    run.steps(1)
    _must(calls == ["before", "after"], f"called were {calls}")


@_check
def _gradients_missing(make: Make) -> None:
    """Parameters that are frozen or have no gradient stand still, live and returned."""
    run = _Training(make)
    frozen = run.model.get_parameter("norm.weight").requires_grad_(False)
    before = frozen.detach().clone()
    run.steps(3)
    _must(torch.equal(frozen, before), "a frozen parameter moved")
    run.returned()
    _must(torch.equal(frozen, before), "a frozen parameter moved when the average was swapped in")


@_check
def _unfrozen_mid_run(make: Make) -> None:
    """A parameter that is unfrozen in mid-run starts there and trains."""
    run = _Training(make)
    late = run.model.get_parameter("norm.weight").requires_grad_(False)
    run.steps(3)
    late.requires_grad_(True)
    before = late.detach().clone()
    run.steps(3)
    _must(not torch.equal(late, before), "it did not move")
    _must_be_finite(run, "after that")


@_check
def _group_added_mid_run(make: Make) -> None:
    """A group that is added in mid-run trains, and the others go on as without it."""
    runs = [_Training(make) for _ in range(2)]
    late = nn.Parameter(torch.ones(3))
    for run in runs:
        run.steps(3)
    runs[0].optimizer.add_param_group({"params": [late]})
    late.grad = torch.ones(3)
    x = torch.ones(4, 6)
    for run in runs:
        run.backward(x)
        run.optimizer.step()
    _must(not torch.equal(late, torch.ones(3)), "it did not move")
    _must(_same(runs[0].weights(), runs[1].weights()), "the others went elsewhere")


@_check
def _empty_group(make: Make) -> None:
    """A group without parameters is stepped, saved and loaded like any other."""
    run = _Training(make)
    run.optimizer.add_param_group({"params": []})
    run.steps(2)
    run.optimizer.load_state_dict(run.optimizer.state_dict())
    run.steps(2)
    _must_be_finite(run, "after that")


@_check
def _odd_shapes(make: Make) -> None:
    """Scalar, empty and non-contiguous parameters step as others do."""
    torch.manual_seed(0)
    plain = torch.randn(3, 4)
    ours = [nn.Parameter(x) for x in (torch.tensor(1.0), torch.empty(0), plain.clone().t())]
    twin = nn.Parameter(plain.clone())
    optimizers: list[Any] = [make(ours), make([twin])]
    for optimizer in optimizers:
        if hasattr(optimizer, "train"):
            optimizer.train()
    for _ in range(3):
        twin.grad = torch.randn(3, 4)
        for p, grad in zip(ours, (torch.tensor(1.0), torch.empty(0), twin.grad.t()), strict=True):
            p.grad = grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    _must(ours[0].item() < 1, "the scalar did not move")
    _must_be_close([ours[2].t()], [twin], "strides make a difference")


@_check
def _mixed_dtypes(make: Make) -> None:
    """Parameters of several dtypes in one optimizer each step as alone."""
    torch.manual_seed(0)
    dtypes = (torch.float32, torch.bfloat16, torch.float64)
    starts, grads = ([torch.randn(20).to(dtype) for dtype in dtypes] for _ in range(2))

    def trained(which: list[int]) -> list[Tensor]:
        params = [nn.Parameter(starts[i].clone()) for i in which]
        optimizer: Any = make(params)
        if hasattr(optimizer, "train"):
            optimizer.train()
        for _ in range(3):
            for i, p in zip(which, params, strict=True):
                p.grad = grads[i].clone()
            optimizer.step()
        return [p.detach() for p in params]

    together = trained([0, 1, 2])
    alone = [trained([i])[0] for i in range(3)]
    for dtype, a, b in zip(dtypes, together, alone, strict=True):
        _must(torch.allclose(a, b), f"{dtype} goes elsewhere in company")


@_check
def _accumulation(make: Make) -> None:
    """Two halves of a batch, accumulated, are one step of the whole, of live and returned."""
    halves, whole = _Training(make), _Training(make)
    for _ in range(4):
        x = torch.randn(16, 6, generator=halves.data)
        for part in x.chunk(2):
            halves.backward(part, 0.5)
            halves.train()  # as the Trainer of transformers calls it
        whole.backward(x)
        for run in (halves, whole):
            run.optimizer.step()
            run.optimizer.zero_grad()
    _must_be_close(halves.weights(), whole.weights(), "live weights differ")
    _must_be_close(halves.returned(), whole.returned(), "returned weights differ")


# Every scheduler of torch, by name, as made for an optimizer: for up to 30 steps.
SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda step: min(1, step / 10)),
    "MultiplicativeLR": lambda opt: lr_scheduler.MultiplicativeLR(opt, lambda step: 0.9),
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, 7, 0.5),
    "MultiStepLR": lambda opt: lr_scheduler.MultiStepLR(opt, [5, 18], 0.3),
    "ConstantLR": lambda opt: lr_scheduler.ConstantLR(opt, 0.5, total_iters=18),
    "LinearLR": lambda opt: lr_scheduler.LinearLR(opt, 0.1, total_iters=20),
    "ExponentialLR": lambda opt: lr_scheduler.ExponentialLR(opt, 0.95),
    "PolynomialLR": lambda opt: lr_scheduler.PolynomialLR(opt, 25, 2.0),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 30),
    "CosineAnnealingWarmRestarts": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 7, 2),
    "CyclicLR": lambda opt: lr_scheduler.CyclicLR(
        opt, 0.01, 0.1, step_size_up=4, cycle_momentum=_has_momentum(opt)
    ),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(
        opt, 0.1, total_steps=30, cycle_momentum=_has_momentum(opt)
    ),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.LinearLR(opt), lr_scheduler.CosineAnnealingLR(opt, 25)], [5]
    ),
    "ChainedScheduler": lambda opt: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(opt), lr_scheduler.ExponentialLR(opt, 0.9)]
    ),
    "ReduceLROnPlateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, factor=0.5, patience=2),
}


def _has_momentum(optimizer: Optimizer) -> bool:
    return "betas" in optimizer.defaults or "momentum" in optimizer.defaults


@_check
def _schedulers(make: Make) -> None:
    """Every learning-rate scheduler of torch sets the rates that it sets for torch.optim.AdamW."""
    for name, schedule in SCHEDULERS.items():
        run = _Training(make)
        rate = run.optimizer.param_groups[0]["lr"]
        adamw = torch.optim.AdamW([nn.Parameter(torch.ones(1))], lr=float(rate))
        schedulers = [schedule(run.optimizer), schedule(adamw)]
        for _ in range(8):
            run.steps(1)
            adamw.step()
            for scheduler in schedulers:
                scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
            rates = [float(x.param_groups[0]["lr"]) for x in (run.optimizer, adamw)]
            _must(abs(rates[0] - rates[1]) < 1e-9, f"{name} set {rates[0]}, not {rates[1]}")
        _must_be_finite(run, f"under {name}")


# ---- the average in and out ------------------------------------------------------------------


@_check
def _swap_and_back(make: Make) -> None:
    """eval() and train() are idempotent, and train() brings back the live weights bit for bit."""
    run = _Training(make)
    run.must_swap()
    for _ in range(10):
        run.steps(1)
        live = run.weights()
        run.optimizer.train()
        _must(_same(run.weights(), live), "train() changed live weights")
        run.optimizer.eval()
        average = run.weights()
        run.optimizer.eval()
        _must(_same(run.weights(), average), "a second eval() changed the weights")
        run.optimizer.train()
        far = _distance(run.weights(), live)
        _must(far == 0, f"the live weights came back changed, by up to {far:.1g}")


@_check
def _step_while_averaged(make: Make) -> None:
    """step() with the average in the model raises, and changes nothing."""
    run = _Training(make)
    run.must_swap()
    run.steps(3)
    run.optimizer.eval()
    before = run.held()
    try:
        run.steps(1)
    except Exception:
        _must(_same(run.held(), before), "it raised, but something changed")
        return
    raise AssertionError("it stepped")


@_check
def _averaged_context(make: Make) -> None:
    """`with averaged()` brings the live weights back after an exception."""
    run = _Training(make)
    if not hasattr(run.optimizer, "averaged"):
        raise _NotRun("it has no averaged()")
    run.steps(3)
    live = run.weights()
    try:
        with run.optimizer.averaged():
            raise KeyError
    except KeyError:
        pass
    _must(_same(run.weights(), live), "it does not")


@_check
def _copies(make: Make) -> None:
    """Deep copies and pickles go on as the original does."""
    run = _Training(make)
    run.steps(3)
    copies = copy.deepcopy(run), pickle.loads(pickle.dumps((run.model, run.optimizer)))
    other = _Training(make)
    other.model, other.optimizer = copies[1]
    other.data.set_state(run.data.get_state())
    run.steps(3)
    live, returned = run.weights(), run.returned()
    for name, twin in (("deep copy", copies[0]), ("pickle", other)):
        twin.steps(3)
        _must(_same(twin.weights(), live), f"the {name} goes elsewhere")
        _must(_same(twin.returned(), returned), f"the {name} returns another model")


# ---- checkpoints -----------------------------------------------------------------------------


def _must_resume(make: Make, *, averaged: bool = False, dtype: torch.dtype = torch.float32) -> None:
    run = _Training(make, dtype=dtype)
    if averaged:
        run.must_swap()
    run.steps(4)
    if averaged:
        run.optimizer.eval()
    file = run.save()
    run.train()
    run.steps(4)
    other = _Training(make, seed=1, dtype=dtype)
    other.load(file)
    other.steps(4)
    _must(_same(other.weights(), run.weights()), "live weights differ from the unbroken run's")
    _must(_same(other.held(), run.held()), "state differs from the unbroken run's")
    _must(_same(other.returned(), run.returned()), "returned weights differ")


@_check
def _resume(make: Make) -> None:
    """Saved, loaded with weights_only=True into fresh objects, it goes on bit for bit."""
    _must_resume(make)


@_check
def _resume_averaged(make: Make) -> None:
    """The same when it was saved with the average in the model."""
    _must_resume(make, averaged=True)


@_check
def _resume_bfloat16(make: Make) -> None:
    """The same for bfloat16 parameters: loading keeps the dtypes of the state."""
    _must_resume(make, dtype=torch.bfloat16)


@_check
def _loaded_state_is_its_own(make: Make) -> None:
    """Two optimizers that load one state do not share tensors."""
    run = _Training(make)
    run.steps(3)
    state = run.optimizer.state_dict()
    other = _Training(make)
    other.optimizer.load_state_dict(state)
    before = other.held()
    run.steps(2)
    run.returned()
    _must(_same(other.held(), before), "a step of one changed the other")


def _with_state(run: _Training) -> dict[str, Any]:
    state: dict[str, Any] = copy.deepcopy(run.optimizer.state_dict())
    first = state.get("state", {}).get(0, {})
    tensors = [x for x in first.values() if isinstance(x, Tensor) and x.ndim]
    if not tensors:
        raise _NotRun("its state_dict has no tensors by parameter")
    return state


@_check
def _misshapen_state(make: Make) -> None:
    """A checkpoint whose state has other shapes than the parameters is refused."""
    run = _Training(make)
    run.steps(2)
    state = _with_state(run)
    for key, value in state["state"][0].items():
        if isinstance(value, Tensor) and value.ndim:
            state["state"][0][key] = value[:1, :1].clone()
    _must_refuse(run, state)


@_check
def _missing_state(make: Make) -> None:
    """A checkpoint that lacks part of a parameter's state is refused."""
    run = _Training(make)
    run.steps(2)
    state = _with_state(run)
    tensors = {k: v for k, v in state["state"][0].items() if isinstance(v, Tensor) and v.ndim}
    del state["state"][0][max(tensors)]
    _must_refuse(run, state)


@_check
def _foreign_state(make: Make) -> None:
    """A checkpoint of another class (SGD with momentum) is refused."""
    run = _Training(make)
    run.steps(2)
    sgd = _Training(lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9))
    if type(run.optimizer) is type(sgd.optimizer):
        raise _NotRun("it is that class")
    sgd.steps(2)
    _must_refuse(run, sgd.optimizer.state_dict())


def _must_come_through(make: Make, *, first: int, averaged: bool) -> None:
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    runs = [_Training(make) for _ in range(2)]
    for i, run in enumerate(runs):
        if averaged:
            run.must_swap()
        if first:
            run.steps(first)
        if averaged:
            run.optimizer.eval()
        if i:
            model, optimizer = get_state_dict(run.model, run.optimizer)
            set_state_dict(
                run.model, run.optimizer, model_state_dict=model, optim_state_dict=optimizer
            )
        run.train()
        run.steps(3)
    _must(_same(runs[0].weights(), runs[1].weights()), "live weights go elsewhere after that")
    _must(_same(runs[0].returned(), runs[1].returned()), "it returns another model after that")


@_check
def _distributed_checkpoint_first(make: Make) -> None:
    """torch.distributed.checkpoint's get and set before the first step disturb nothing."""
    _must_come_through(make, first=0, averaged=False)


@_check
def _distributed_checkpoint_later(make: Make) -> None:
    """Nor do they after three steps."""
    _must_come_through(make, first=3, averaged=False)


@_check
def _distributed_checkpoint_averaged(make: Make) -> None:
    """Nor with the average in the model, before and after the first step."""
    _must_come_through(make, first=3, averaged=True)
    _must_come_through(make, first=0, averaged=True)


# ---- faults ----------------------------------------------------------------------------------


@_check
def _non_finite_gradient(make: Make) -> None:
    """One NaN or infinity among the gradients destroys neither live nor returned weights."""
    for value in (float("nan"), float("inf")):
        run = _Training(make)
        run.steps(2)
        run.backward(torch.ones(4, 6))
        grad = run.model.get_parameter("first.weight").grad
        assert grad is not None
        grad[1, 2] = value
        run.optimizer.step()
        run.steps(3)
        _must_be_finite(run, f"three steps after a gradient of {value}")


@_check
def _skipped_by_the_scaler(make: Make) -> None:
    """A step that GradScaler skips changes nothing."""
    run = _Training(make)
    twin = _Training(make)
    for each in (run, twin):
        each.steps(3)
    before = run.held()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale((run.model(torch.ones(4, 6)) * float("inf")).sum()).backward()
    scaler.step(run.optimizer)
    scaler.update()
    _must(scaler.get_scale() == 2.0, "the scaler did not see the infinity")
    _must(_same(run.held(), before), "state changed")
    _must(_same(run.returned(), twin.returned()), "the returned weights changed")


# ---- several processes -----------------------------------------------------------------------


def _ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def _fsdp(model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model, mesh=mesh)
    return model


def _must_agree(make: Make, wrap: Callable[[nn.Module], nn.Module]) -> None:
    alone = _Training(make)
    alone.steps(5)
    run = _Training(make, wrap=wrap)
    run.steps(5, dist.get_rank(), dist.get_world_size())
    _must_be_close(run.weights(), alone.weights(), "live weights differ from one process's")
    x = torch.ones(4, 6)
    for swap in ("eval", "train") if run.swaps else ():
        outputs = []
        for each in (alone, run):
            with torch.no_grad():
                each.model(x)  # what that gathers must not be taken for what is swapped in
                getattr(each.optimizer, swap)()
                outputs.append(each.model(x))
        _must_be_close(outputs[1:], outputs[:1], f"after {swap}() the model computes otherwise")
    for each in (alone, run):
        each.steps(1, *(() if each is alone else (dist.get_rank(), dist.get_world_size())))
    _must_be_close(run.weights(), alone.weights(), "live weights differ after a swap and a step")
    _must_be_close(run.returned(), alone.returned(), "returned weights differ from one process's")


@_rank_check
def _data_parallel(make: Make, folder: Path) -> None:
    """Under DistributedDataParallel it goes where one process goes."""
    _must_agree(make, _ddp)


@_rank_check
def _sharded(make: Make, folder: Path) -> None:
    """Under FSDP2 (fully_shard, uneven shards) it goes where one process goes."""
    _must_agree(make, _fsdp)


@_rank_check
def _sharded_checkpoint(make: Make, folder: Path) -> None:
    """A distributed checkpoint of shards resumes, on these ranks and on one."""
    from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    rank, ranks = dist.get_rank(), dist.get_world_size()
    run = _Training(make, wrap=_fsdp)
    run.steps(4, rank, ranks)
    model, optimizer = get_state_dict(run.model, run.optimizer)
    state_dict_saver.save(
        {"model": model, "optimizer": optimizer}, checkpoint_id=str(folder / "sharded")
    )
    run.steps(3, rank, ranks)
    live, returned = run.weights(), run.returned()
    for alone in (False, True):
        other = _Training(make) if alone else _Training(make, wrap=_fsdp)
        model, optimizer = get_state_dict(other.model, other.optimizer)
        state: dict[str, Any] = {"model": model, "optimizer": optimizer}
        state_dict_loader.load(state, checkpoint_id=str(folder / "sharded"), no_dist=alone)
        set_state_dict(
            other.model,
            other.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        other.train()
        for _ in range(4):
            torch.randn(16, 6, generator=other.data)  # what the saved run has seen
        other.steps(3, *(() if alone else (rank, ranks)))
        where = "on one rank" if alone else "on the same ranks"
        _must_be_close(other.weights(), live, f"live weights differ {where}")
        _must_be_close(other.returned(), returned, f"returned weights differ {where}")
