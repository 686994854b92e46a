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

import contextlib
import copy
import io
import pickle
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

Make = Callable[[Iterable[nn.Parameter]], Optimizer]
Wrap = Callable[[nn.Module], nn.Module]
Models = dict[str, list[Tensor]]  # by name, the weights of each
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


class _NotRun(Exception):
    """The check does not apply; the message says why."""


def _title(check: Callable[..., None]) -> tuple[str, str]:
    return check.__name__.replace("_", " "), " ".join((check.__doc__ or "").split())


def _run(check: Callable[..., None], make: Make, *folder: Path) -> Check:
    return _outcome(check, lambda: check((_RankChecks if folder else _Checks)(make), *folder))


def _outcome(check: Callable[..., None], call: Callable[[], None]) -> Check:
    name, promise = _title(check)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call()
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
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        wrap: Wrap | None = None,
    ) -> None:
        torch.manual_seed(seed)
        model = _Net().to(dtype)
        self.make, self.dtype = make, dtype
        self.model = wrap(model) if wrap else model
        # A wrapped model trains on its rank's share of each batch.
        self.share, self.shares = (dist.get_rank(), dist.get_world_size()) if wrap else (0, 1)
        self.optimizer: Any = make(self.model.parameters())
        self.data = torch.Generator().manual_seed(seed)
        _train(self.optimizer)

    def fresh(self, **options: Any) -> Self:
        """One more with such an optimizer, which has not begun."""
        return type(self)(self.make, **options)

    @property
    def swaps(self) -> bool:
        return hasattr(self.optimizer, "eval") and hasattr(self.optimizer, "train")

    def must_swap(self) -> None:
        if not self.swaps:
            raise _NotRun("it has no eval() and train()")

    def backward(self, x: Tensor, scale: float = 1.0) -> None:
        (scale * (self.model(x) - x[:, :1]).square().mean()).backward()

    def batch(self) -> Tensor:
        x = torch.randn(16, 6, generator=self.data).to(self.dtype)
        return x.chunk(self.shares)[self.share]

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.optimizer.zero_grad()
            self.backward(self.batch())
            self.optimizer.step()
        self.optimizer.zero_grad()

    def weights(self) -> list[Tensor]:
        return [_whole(p) for p in self.model.parameters()]

    def models(self) -> Models:
        """The live weights, and those that the optimizer would have evaluated and saved."""
        live = returned = self.weights()
        if self.swaps:
            self.optimizer.eval()
            returned = self.weights()
            self.optimizer.train()
        return {"live weights": live, "returned weights": returned}

    def held(self) -> dict[str, Any]:
        """Weights, and the optimizer's state and options."""
        return {"weights": self.weights(), "optimizer": copy.deepcopy(self.optimizer.state_dict())}

    def save(self) -> bytes:
        run = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "data": self.data.get_state(),
            "random": torch.get_rng_state(),
        }
        file = io.BytesIO()
        torch.save(run, file)
        return file.getvalue()

    def load(self, saved: bytes) -> None:
        run = torch.load(io.BytesIO(saved), weights_only=True)
        self.model.load_state_dict(run["model"])
        self.optimizer.load_state_dict(run["optimizer"])
        self.data.set_state(run["data"])
        torch.set_rng_state(run["random"])
        _train(self.optimizer)

    def state_dicts(self) -> dict[str, Any]:
        """Those of torch.distributed.checkpoint, by the names that `set_state_dict` takes."""
        from torch.distributed.checkpoint.state_dict import get_state_dict

        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model_state_dict": model, "optim_state_dict": optimizer}

    def set_state_dicts(self, state: dict[str, Any]) -> None:
        from torch.distributed.checkpoint.state_dict import set_state_dict

        set_state_dict(self.model, self.optimizer, **state)
        _train(self.optimizer)


def _train(optimizer: Any) -> None:
    if hasattr(optimizer, "train"):
        optimizer.train()


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


def _must_be_same(a: Models, b: Models, otherwise: str) -> None:
    for name in a:
        _must(_same(a[name], b[name]), f"{name} {otherwise}")


def _must_be_close(a: Models, b: Models, otherwise: str) -> None:
    for name in a:
        far = _distance(a[name], b[name])
        _must(far < 1e-5, f"{name} {otherwise}, by up to {far:.1g}")


def _must_be_finite(run: _Training, after: str) -> None:
    for name, weights in run.models().items():
        _must(all(x.isfinite().all() for x in weights), f"{name} are not finite {after}")


def _must_refuse(run: _Training, call: Callable[[], Any], accepted: str, half_done: str) -> None:
    before = run.held()
    try:
        call()
    except Exception as error:
        _must(_same(run.held(), before), f"{type(error).__name__} was raised {half_done}")
    else:
        raise AssertionError(accepted)


# ---- the checks --------------------------------------------------------------------------------


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


def _fsdp(model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model, mesh=mesh)
    return model


class _Checks(_Training):
    """A method is a check, by its name, on a run that has not begun; its docstring, the promise."""

    # ---- stepping ----------------------------------------------------------------------------

    def optimizer_class(self) -> None:
        """It is a torch.optim.Optimizer with flat state and groups."""
        _must(isinstance(self.optimizer, Optimizer), "it is no torch.optim.Optimizer")
        self.steps(1)
        params = set(self.model.parameters())
        _must(set(self.optimizer.state) <= params, "its state has other keys than parameters")

    def closure(self) -> None:
        """step(closure) returns the closure's loss."""
        self.backward(torch.ones(4, 6))
        _must(self.optimizer.step(lambda: 2.5) == 2.5, "it does not")

    def hooks(self) -> None:
        """Hooks before and after a step are called."""
        calls: list[str] = []
        self.optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
        self.optimizer.register_step_post_hook(lambda *_: calls.append("after"))
        self.steps(1)
        _must(calls == ["before", "after"], f"called were {calls}")

    def gradients_missing(self) -> None:
        """Parameters that are frozen or have no gradient stand still, live and returned."""
        frozen = self.model.get_parameter("norm.weight").requires_grad_(False)
        before = frozen.detach().clone()
        self.steps(3)
        _must(torch.equal(frozen, before), "a frozen parameter moved")
        self.models()
        _must(torch.equal(frozen, before), "a frozen parameter moved when the average came in")

    def unfrozen_mid_run(self) -> None:
        """A parameter that is unfrozen in mid-run starts there and trains."""
        late = self.model.get_parameter("norm.weight").requires_grad_(False)
        self.steps(3)
        late.requires_grad_(True)
        before = late.detach().clone()
        self.steps(3)
        _must(not torch.equal(late, before), "it did not move")
        _must_be_finite(self, "after that")

    def group_added_mid_run(self) -> None:
        """A group that is added in mid-run trains, and the others go on as without it."""
        late, without = nn.Parameter(torch.ones(3)), self.fresh()
        for each in (self, without):
            each.steps(3)
        self.optimizer.add_param_group({"params": [late]})
        late.grad = torch.ones(3)
        for each in (self, without):
            each.backward(torch.ones(4, 6))
            each.optimizer.step()
        _must(not torch.equal(late, torch.ones(3)), "it did not move")
        _must(_same(self.weights(), without.weights()), "the others went elsewhere")

    def empty_group(self) -> None:
        """A group without parameters is stepped, saved and loaded like any other."""
        self.optimizer.add_param_group({"params": []})
        self.steps(2)
        self.optimizer.load_state_dict(self.optimizer.state_dict())
        self.steps(2)
        _must_be_finite(self, "after that")

    def odd_shapes(self) -> None:
        """Scalar, empty and non-contiguous parameters step as others do."""
        plain = torch.randn(3, 4)
        ours = [nn.Parameter(x) for x in (torch.tensor(1.0), torch.empty(0), plain.clone().t())]
        twin = nn.Parameter(plain.clone())
        optimizers = self.make(ours), self.make([twin])
        for optimizer in optimizers:
            _train(optimizer)
        for _ in range(3):
            twin.grad = torch.randn(3, 4)
            grads = torch.tensor(1.0), torch.empty(0), twin.grad.t()
            for p, grad in zip(ours, grads, strict=True):
                p.grad = grad.clone()
            for optimizer in optimizers:
                optimizer.step()
        _must(ours[0].item() < 1, "the scalar did not move")
        _must_be_close({"strides": [ours[2].t()]}, {"strides": [twin]}, "make a difference")

    def mixed_dtypes(self) -> None:
        """Parameters of several dtypes in one optimizer each step as alone."""
        dtypes = (torch.float32, torch.bfloat16, torch.float64)
        starts, grads = ([torch.randn(20).to(dtype) for dtype in dtypes] for _ in range(2))

        def trained(which: list[int]) -> list[Tensor]:
            params = [nn.Parameter(starts[i].clone()) for i in which]
            optimizer = self.make(params)
            _train(optimizer)
            for _ in range(3):
                for i, p in zip(which, params, strict=True):
                    p.grad = grads[i].clone()
                optimizer.step()
            return [p.detach() for p in params]

        together = trained([0, 1, 2])
        alone = [trained([i])[0] for i in range(3)]
        for dtype, a, b in zip(dtypes, together, alone, strict=True):
            _must(torch.allclose(a, b), f"{dtype} goes elsewhere in company")

    def accumulation(self) -> None:
        """Two halves of a batch, accumulated, are one step of the whole, of live and returned."""
        whole = self.fresh()
        for _ in range(4):
            x = whole.batch()
            for part in x.chunk(2):
                self.backward(part, 0.5)
                _train(self.optimizer)  # as the Trainer of transformers calls it
            whole.backward(x)
            for each in (self, whole):
                each.optimizer.step()
                each.optimizer.zero_grad()
        _must_be_close(self.models(), whole.models(), "differ")

    def schedulers(self) -> None:
        """Every learning-rate scheduler of torch sets the rates that it sets for
        torch.optim.AdamW.
        """
        for name, schedule in SCHEDULERS.items():
            run = self.fresh()
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

    # ---- the average in and out --------------------------------------------------------------

    def swap_and_back(self) -> None:
        """eval() and train() are idempotent, and train() brings back the live weights bit for
        bit.
        """
        self.must_swap()
        for _ in range(10):
            self.steps(1)
            live = self.weights()
            self.optimizer.train()
            _must(_same(self.weights(), live), "train() changed live weights")
            self.optimizer.eval()
            average = self.weights()
            self.optimizer.eval()
            _must(_same(self.weights(), average), "a second eval() changed the weights")
            self.optimizer.train()
            far = _distance(self.weights(), live)
            _must(far == 0, f"the live weights came back changed, by up to {far:.1g}")

    def step_while_averaged(self) -> None:
        """step() with the average in the model raises, and changes nothing."""
        self.must_swap()
        self.steps(3)
        self.optimizer.eval()
        _must_refuse(self, lambda: self.steps(1), "it stepped", "but something changed")

    def averaged_context(self) -> None:
        """`with averaged()` brings the live weights back after an exception."""
        if not hasattr(self.optimizer, "averaged"):
            raise _NotRun("it has no averaged()")
        self.steps(3)
        live = self.weights()
        with contextlib.suppress(KeyError), self.optimizer.averaged():
            raise KeyError
        _must(_same(self.weights(), live), "it does not")

    def copies(self) -> None:
        """Deep copies and pickles go on as the original does."""
        self.steps(3)
        pair, data = (self.model, self.optimizer), self.data.get_state()
        copies = {"deep copy": copy.deepcopy(pair), "pickle": pickle.loads(pickle.dumps(pair))}
        self.steps(3)
        models = self.models()
        for name, (model, optimizer) in copies.items():
            twin = self.fresh()
            twin.model, twin.optimizer = model, optimizer
            twin.data.set_state(data)
            twin.steps(3)
            _must_be_same(twin.models(), models, f"of the {name} differ")

    # ---- checkpoints -------------------------------------------------------------------------

    def _must_resume(self, *, averaged: bool = False) -> None:
        self.steps(4)
        if averaged:
            self.must_swap()
            self.optimizer.eval()
        saved = self.save()
        _train(self.optimizer)
        self.steps(4)
        other = self.fresh(seed=1, dtype=self.dtype)
        other.load(saved)
        other.steps(4)
        states = [each.held()["optimizer"] for each in (other, self)]
        _must_be_same(other.models(), self.models(), "differ from the unbroken run's")
        _must(_same(*states), "state differs from the unbroken run's")

    def resume(self) -> None:
        """Saved, loaded with weights_only=True into fresh objects, it goes on bit for bit."""
        self._must_resume()

    def resume_averaged(self) -> None:
        """The same when it was saved with the average in the model."""
        self._must_resume(averaged=True)

    def resume_bfloat16(self) -> None:
        """The same for bfloat16 parameters: loading keeps the dtypes of the state."""
        self.fresh(dtype=torch.bfloat16)._must_resume()

    def loaded_state_is_its_own(self) -> None:
        """Two optimizers that load one state do not share tensors."""
        self.steps(3)
        other = self.fresh()
        other.optimizer.load_state_dict(self.optimizer.state_dict())
        before = other.held()
        self.steps(2)
        self.models()
        _must(_same(other.held(), before), "a step of one changed the other")

    def _state_and_first(self) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
        """A copy of its state_dict, of that the first parameter's state, and the tensors' names."""
        self.steps(2)
        state = copy.deepcopy(self.optimizer.state_dict())
        first = state.get("state", {}).get(0, {})
        names = [name for name, x in first.items() if isinstance(x, Tensor) and x.ndim]
        if not names:
            raise _NotRun("its state_dict has no tensors by parameter")
        return state, first, names

    def _must_refuse_to_load(self, state: dict[str, Any]) -> None:
        said = "load_state_dict() took it without an error", "when half of it had been loaded"
        _must_refuse(self, lambda: self.optimizer.load_state_dict(state), *said)

    def misshapen_state(self) -> None:
        """A checkpoint whose state has other shapes than the parameters is refused."""
        state, first, names = self._state_and_first()
        for name in names:
            first[name] = first[name][:1, :1].clone()
        self._must_refuse_to_load(state)

    def missing_state(self) -> None:
        """A checkpoint that lacks part of a parameter's state is refused."""
        state, first, names = self._state_and_first()
        del first[max(names)]
        self._must_refuse_to_load(state)

    def foreign_state(self) -> None:
        """A checkpoint of another class (SGD with momentum) is refused."""
        self.steps(2)
        sgd = _Training(lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9))
        if type(self.optimizer) is type(sgd.optimizer):
            raise _NotRun("it is that class")
        sgd.steps(2)
        self._must_refuse_to_load(sgd.optimizer.state_dict())

    def _must_come_through(self, *, first: int, averaged: bool = False) -> None:
        twin = self.fresh()
        for each in (self, twin):
            each.steps(first)
            if averaged:
                each.must_swap()
                each.optimizer.eval()
            if each is twin:
                each.set_state_dicts(each.state_dicts())
            _train(each.optimizer)
            each.steps(3)
        _must_be_same(self.models(), twin.models(), "go elsewhere after that")

    def distributed_checkpoint_first(self) -> None:
        """torch.distributed.checkpoint's get and set before the first step disturb nothing."""
        self._must_come_through(first=0)

    def distributed_checkpoint_later(self) -> None:
        """Nor do they after three steps."""
        self._must_come_through(first=3)

    def distributed_checkpoint_averaged(self) -> None:
        """Nor with the average in the model, before and after the first step."""
        for first in (3, 0):
            self.fresh()._must_come_through(first=first, averaged=True)

    # ---- faults ------------------------------------------------------------------------------

    def non_finite_gradient(self) -> None:
        """One NaN or infinity among the gradients destroys neither live nor returned weights."""
        for value in (float("nan"), float("inf")):
            run = self.fresh()
            run.steps(2)
            run.backward(torch.ones(4, 6))
            grad = run.model.get_parameter("first.weight").grad
            assert grad is not None
            grad[1, 2] = value
            run.optimizer.step()
            run.steps(3)
            _must_be_finite(run, f"three steps after a gradient of {value}")

    def skipped_by_the_scaler(self) -> None:
        """A step that GradScaler skips changes nothing."""
        twin = self.fresh()
        for each in (self, twin):
            each.steps(3)
        before = self.held()
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        scaler.scale((self.model(torch.ones(4, 6)) * float("inf")).sum()).backward()
        scaler.step(self.optimizer)
        scaler.update()
        _must(scaler.get_scale() == 2.0, "the scaler did not see the infinity")
        _must(_same(self.held(), before), "state changed")
        _must_be_same(self.models(), twin.models(), "changed")


class _RankChecks(_Training):
    """Checks of several processes, which have a folder in common."""

    def _must_agree(self, wrap: Wrap) -> None:
        both = self.fresh(wrap=wrap), self
        for each in both:
            each.steps(5)
        live = [{"live weights": each.weights()} for each in both]
        _must_be_close(live[0], live[1], "differ from one process's")
        x = torch.ones(4, 6)
        for swap in ("eval", "train") if self.swaps else ():
            outputs: list[Models] = []
            for each in both:
                with torch.no_grad():
                    each.model(x)  # what that gathers must not be taken for what is swapped in
                    getattr(each.optimizer, swap)()
                    outputs.append({f"after {swap}() the model": [each.model(x)]})
            _must_be_close(outputs[0], outputs[1], "computes otherwise")
        for each in both:
            each.steps(1)
        after = "differ from one process's after a swap and a step"
        _must_be_close(both[0].models(), self.models(), after)

    def data_parallel(self, folder: Path) -> None:
        """Under DistributedDataParallel it goes where one process goes."""
        self._must_agree(nn.parallel.DistributedDataParallel)

    def sharded(self, folder: Path) -> None:
        """Under FSDP2 (fully_shard, uneven shards) it goes where one process goes."""
        self._must_agree(_fsdp)

    def sharded_checkpoint(self, folder: Path) -> None:
        """A distributed checkpoint of shards resumes, on these ranks and on one."""
        from torch.distributed.checkpoint import state_dict_loader, state_dict_saver

        saved, place = self.fresh(wrap=_fsdp), str(folder / "sharded")
        saved.steps(4)
        state_dict_saver.save(saved.state_dicts(), checkpoint_id=place)
        data = saved.data.get_state()
        saved.steps(3)
        models = saved.models()
        for where, other in (("the same ranks", self.fresh(wrap=_fsdp)), ("one rank", self)):
            state = other.state_dicts()
            state_dict_loader.load(state, checkpoint_id=place, no_dist=other is self)
            other.set_state_dicts(state)
            other.data.set_state(data)
            other.steps(3)
            _must_be_close(other.models(), models, f"differ on {where}")


_CHECKS, _RANK_CHECKS = (
    [check for name, check in vars(kind).items() if not name.startswith("_")]
    for kind in (_Checks, _RankChecks)
)
