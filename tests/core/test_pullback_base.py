"""One optimizer with its base: a table of bases, and how each goes on beside itself alone."""

import copy
import functools
import io
import math
import pickle

import pytest
import torch
from problems import same
from pulled import (
    AVERAGE,
    BASES,
    OWN,
    STEP,
    adamw,
    assert_one,
    give,
    go,
    held,
    loss_of,
    net,
    params_of,
    po,
    sgd,
    train,
)
from torch import optim
from torch.nn import Parameter
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from paceline import PACE, Pullback
from paceline.averaging import PowerEMA, Uniform
from paceline.testing import SCHEDULERS

# ---- a table of bases ------------------------------------------------------------------------


def file_of(model, opt):
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": opt.state_dict()}, file)
    file.seek(0)
    return file


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize("c", [0.0, 0.3])
@pytest.mark.parametrize("name", BASES)
def test_bases(name, c):
    """Each trains, averages, is swapped and resumes; without a pull it goes where it would."""
    make, source = BASES[name]
    check_base(name, make, c, own=source == "own")


def check_base(name, make, c, own, steps=12):
    model = net(name)
    params = list(model.parameters())
    opt = Pullback(make(params), pullback=c, averaging=PowerEMA(0.6))
    seen = [[p.detach().clone() for p in params]]
    at_first = loss_of(model, 999)
    train(name, model, opt, steps, seen=seen)
    assert loss_of(model, 999) < 0.99 * at_first
    if not c:
        alone = net(name)
        train(name, alone, make(list(alone.parameters())), steps)
        assert same(list(alone.parameters()), params)
    for i, p in enumerate(params):
        assert (OWN in opt.state[p]) == (own and c > 0)
        average = seen[0][i].double()
        for t, x in enumerate(seen[1:], 1):
            average = average + (1 + t) ** -0.6 * (x[i] - average)
        torch.testing.assert_close(opt.state[p][AVERAGE].double(), average, atol=1e-6, rtol=0)

    averages = [opt.state[p][AVERAGE].clone() for p in params]
    files = [file_of(model, opt)]
    with opt.averaged():
        assert loss_of(model, 999) < at_first
        assert same([p.detach() for p in params], averages)
        files.append(file_of(model, opt))
    assert same([p.detach() for p in params], seen[-1])
    assert same([opt.state[p][AVERAGE] for p in params], averages)

    def ended(model, opt):
        """Live and returned weights four steps later."""
        live = []
        train(name, model, opt, 4, steps, seen=live)
        return live, list(opt.averaged_state_dict(model).values())

    expected = ended(model, opt)
    for file in files:
        read = torch.load(file, weights_only=True)
        model = net(name, seed=1)
        opt = Pullback(make(list(model.parameters())), pullback=0.7)  # it is the file's that count
        model.load_state_dict(read["model"])
        opt.load_state_dict(read["optimizer"])
        opt.train()
        assert same(ended(model, opt), expected)


def test_bases_that_keep_objects_cannot_be_saved_safely():
    """ScalableShampoo has its preconditioners in its state: trains, but no weights_only file."""
    model = net()
    opt = Pullback(po.ScalableShampoo(model.parameters(), lr=0.02), pullback=0.3)
    train("", model, opt, 2)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        torch.load(file_of(model, opt), weights_only=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # which torchao gives when it is imported
@pytest.mark.parametrize("c", [0.0, 0.3])
def test_a_base_with_quantized_state(c):
    """Where torchao is there. Last run: torchao 0.18.0 beside torch 2.13.0, on the CPU."""
    torchao = pytest.importorskip("torchao.optim")
    check_base("AdamW8bit", functools.partial(torchao.AdamW8bit, lr=0.02), c, own=False)


class Keeps(optim.Optimizer):
    """SGD that keeps what it is told as its `exp_avg_sq`, and notes its steps in its groups."""

    def __init__(self, params, square, **options):
        super().__init__(params, {"lr": 0.1, **options})
        self.square = square

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["noted"] = True
            for p in group["params"]:
                p.sub_(0.1 * p.grad)
                self.state[p]["exp_avg_sq"] = self.square(p)


ADAMS = {"betas": (0.9, 0.99), "eps": 1e-8}


@pytest.mark.parametrize(
    ("square", "options", "own"),
    [
        (torch.ones_like, ADAMS, False),
        (torch.ones_like, {"betas": (0.9, 0.99)}, True),
        (torch.ones_like, {"eps": 1e-8}, True),
        (lambda p: torch.ones(3), ADAMS, True),  # as of one for each row
        (lambda p: 1.0, ADAMS, True),
    ],
)
def test_a_second_moment_is_the_bases_if_it_is_adams(square, options, own):
    params = params_of((3, 4))
    opt = Pullback(Keeps(params, square, **options), pullback=0.3)
    opt.param_groups[0]["lr"] = 0.0  # as torch.distributed.checkpoint asks for state
    params[0].grad = torch.zeros(3, 4)
    opt.step()
    assert "noted" not in opt.param_groups[0]
    assert (OWN in opt.state[params[0]]) == own
    opt.param_groups[0]["lr"] = 0.1
    go(params, opt, 3)
    assert (OWN in opt.state[params[0]]) == own
    assert opt.state[params[0]][STEP] == 3


# ---- one optimizer with its base -------------------------------------------------------------


def test_it_has_its_bases_state_and_groups():
    model = net()
    opt = Pullback(adamw(model.parameters()), pullback=0.3, track_stats=True)
    assert_one(opt)
    assert opt.defaults["betas"] == (0.9, 0.999)
    assert opt.defaults["pullback"] == 0.3
    train("", model, opt, 2)
    opt.load_state_dict(opt.state_dict())
    assert_one(opt)
    assert opt.stats().keys() == {"guarded_coordinates", "guarded_steps", "skipped_steps"}
    late = Parameter(torch.ones(3))
    opt.add_param_group({"params": [late], "averaging": Uniform()})
    assert_one(opt)
    assert opt.param_groups[1]["pullback"] == 0.3
    assert opt.param_groups[1]["averaging"] == "uniform"
    opt.eval()
    opt.add_param_group({"params": [Parameter(torch.ones(3))]})
    opt.train()
    copies = [copy.deepcopy((model, opt)), pickle.loads(pickle.dumps((model, opt)))]
    train("", model, opt, 2)
    for twin, other in copies:
        assert_one(other)
        assert type(other.base) is optim.AdamW
        assert set(other.state) <= set(twin.parameters())
        train("", twin, other, 2)
        assert same(list(twin.parameters()), list(model.parameters()))
        assert same(other.state_dict(), opt.state_dict())
    base = copy.deepcopy(
        opt.base
    )  # a copy of the base alone is one, with our options in its groups
    assert base.state is not opt.state


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name):
    """They set for it what they set for its base, and the base steps with that."""
    runs = []
    for wrapped in (True, False):
        params = params_of((4, 3), (3,))
        base = sgd(params, momentum=0.9)
        opt = Pullback(base) if wrapped else base
        scheduler = SCHEDULERS[name](opt)
        seen = []
        for step in range(12):
            go(params, opt, 1, step)
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
            group = opt.param_groups[0]
            seen.append([float(group["lr"]), group["momentum"], *(p.detach() + 0 for p in params)])
        runs.append(seen)
        if wrapped:  # their options in a checkpoint do not make it another base's
            Pullback(sgd(params_of((4, 3), (3,)))).load_state_dict(opt.state_dict())
    assert same(*runs)


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_unscales_for_the_base_and_skips(fused):
    """A scale that is a power of two leaves no trace."""
    runs = []
    for scaled in (False, True):
        params = params_of((4, 3), (3,))
        opt = Pullback(adamw(params, fused=fused), pullback=0.3)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=scaled)
        for step in range(4):
            for value in (math.inf, 1.0) if scaled and step == 2 else (1.0,):
                opt.zero_grad()
                generator = torch.Generator().manual_seed(step)
                loss = sum((p * torch.randn(p.shape, generator=generator)).sum() for p in params)
                scaler.scale(loss * value).backward()
                before = held(params, opt)
                scaler.step(opt)
                scaler.update(4.0 if scaled else None)
                assert same(held(params, opt), before) == (value > 1)
        runs.append(held(params, opt))
        assert opt.stats()["skipped_steps"] == 0  # the scaler did not call it
    assert same(*runs)


def test_accelerate_prepares_it():
    accelerate = pytest.importorskip("accelerate")
    runs = []
    for prepared in (True, False):
        model = net()
        opt = ours = Pullback(adamw(model.parameters()), pullback=0.3)
        if prepared:
            accelerator = accelerate.Accelerator(cpu=True)
            model, opt = accelerator.prepare(model, opt)
            assert opt.optimizer is ours
        assert_one(ours)
        for step in range(4):
            loss = loss_of(model, step)
            accelerator.backward(loss) if prepared else loss.backward()
            opt.step()
            opt.zero_grad()
        runs.append([p.detach().clone() for p in model.parameters()])
        runs.append(ours.averaged_state_dict(model))
    assert same(runs[:2], runs[2:])


def test_hooks_closures_and_options_of_a_step_reach_whom_they_are_for():
    class Base(optim.Optimizer):
        def step(self, closure=None, *, extra=None):
            calls.append(extra)
            return closure and closure()

        def zero_grad(self, set_to_none=True):
            calls.append(set_to_none)

    params, calls = params_of((3,)), []
    opt = Pullback(Base(params, {"lr": 0.1}), pullback=0.1)
    opt.register_step_pre_hook(lambda *_: calls.append("before"))
    opt.register_step_post_hook(lambda *_: calls.append("after"))
    opt.base.register_step_pre_hook(lambda *_: calls.append("base before"))
    opt.base.register_step_post_hook(lambda *_: calls.append("base after"))
    give(params, 0)

    def closure():
        assert torch.is_grad_enabled()
        calls.append("closure")
        return 2.5

    assert opt.step(closure, extra=7) == 2.5
    around = ["before", "base before", 7, "closure", "base after", "after"]
    assert calls == around
    assert opt.step(extra=8) is None
    opt.zero_grad(False)
    assert calls[6:] == [*around[:2], 8, *around[4:], False]
    opt.register_load_state_dict_pre_hook(lambda _, state: calls.append("loading"))
    opt.register_load_state_dict_pre_hook(lambda _, state: {**state, "param_groups": groups})
    opt.register_load_state_dict_post_hook(lambda _: calls.append("loaded"))
    groups = copy.deepcopy(opt.state_dict()["param_groups"])
    groups[0]["lr"] = 0.7
    opt.load_state_dict(opt.state_dict())
    assert calls[-2:] == ["loading", "loaded"]
    assert opt.param_groups[0]["lr"] == 0.7


def test_a_base_without_a_learning_rate_steps():
    class Signs(optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

        @torch.no_grad()
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                p.sub_(0.1 * p.grad.sign())

    params = params_of((5,))
    opt = Pullback(Signs(params), pullback=0.3, gain="scalar")
    go(params, opt, 2)
    assert opt.state[params[0]][STEP] == 2
    with pytest.raises(ValueError, match="lr must be an option of the base's groups, got 'Signs'"):
        Pullback(Signs(params_of((5,))), pullback=0.3)


@pytest.mark.parametrize("gain", ["own", "scalar"])
def test_a_learning_rate_can_be_a_tensor(gain):
    ends = []
    for lr in (0.05, torch.tensor(0.05)):
        params = params_of((4, 3))
        opt = Pullback(sgd(params, lr=lr), pullback=0.3, gain=gain)
        go(params, opt, 4)
        ends.append([params[0].detach(), opt.state[params[0]][AVERAGE]])
    torch.testing.assert_close(*ends, atol=1e-6, rtol=1e-6)  # the tensor's is rounded to float32


def test_mixed_dtypes_and_groups_without_parameters():
    shapes = [(4, 3), (3,)]
    dtypes = (torch.float32, torch.bfloat16, torch.float64)
    groups = [params_of(*shapes, dtype=dtype) for dtype in dtypes]
    together = Pullback(
        sgd([{"params": []}, {"params": [p for g in groups for p in g]}]), pullback=0.3
    )
    alone = [params_of(*shapes, dtype=dtype) for dtype in dtypes]
    opts = [Pullback(sgd(params), pullback=0.3) for params in alone]
    for step in range(4):
        for params in groups:
            give(params, step)
        together.step()
        for params, opt in zip(alone, opts, strict=True):
            go(params, opt, 1, step - 100)
    together.load_state_dict(together.state_dict())
    for params, others, opt in zip(groups, alone, opts, strict=True):
        for p, q in zip(params, others, strict=True):
            assert torch.equal(p, q)
            assert same(together.state[p], opt.state[q])
            assert together.state[p][AVERAGE].dtype == torch.promote_types(p.dtype, torch.float32)


def test_counts_are_exact_whatever_the_default_dtype():
    """A count in bfloat16 would stop at 256."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        params = params_of((3,))
        opt = Pullback(sgd(params))
        go(params, opt, 2)
        opt.load_state_dict(opt.state_dict())
        assert opt.state[params[0]][STEP].dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("make", [adamw, functools.partial(po.AdEMAMix, lr=0.05)])
def test_a_parameter_that_joins_late_begins_then(make):
    """Also where the base counts the steps of its groups, as all of pytorch_optimizer do."""
    params = params_of((4, 3), (3,))
    opt = Pullback(make(params), pullback=0.3, averaging=Uniform())
    for step in range(5):
        give(params, step)
        params[1].grad = None
        opt.step()
    assert params[1] not in opt.state
    go(params, opt, 1)
    assert [opt.state[p][STEP] for p in params] == [6, 1]
    assert torch.equal(opt.state[params[1]][AVERAGE], params[1])


def test_hooks_on_all_optimizers_run_once_around_base_and_pull():
    (p,) = params = params_of((4,))
    opt = Pullback(sgd(params), pullback=1.0, gain="scalar", averaging="ema:beta=0.5")
    go(params, opt, 2)
    average = opt.state[p][AVERAGE].clone()
    seen = []
    handles = [
        register_optimizer_step_pre_hook(lambda o, *_: seen.append(("before", o, p.clone()))),
        register_optimizer_step_post_hook(lambda o, *_: seen.append(("after", o, p.clone()))),
        opt.base.register_step_post_hook(lambda o, *_: seen.append(("base", o, p.clone()))),
    ]
    before = p.detach().clone()
    try:
        go(params, opt, 1, first=2)
    finally:
        for handle in handles:
            handle.remove()
    assert [(name, o) for name, o, _ in seen] == [
        ("before", opt),
        ("base", opt.base),
        ("after", opt),
    ]
    assert torch.equal(seen[0][2], before)
    torch.testing.assert_close(seen[2][2], seen[1][2] + (average - before))  # with the pull
    assert torch.equal(seen[2][2], p)
    go(params, opt, 1, first=3)
    assert len(seen) == 3


@pytest.mark.parametrize("saved", [None, 3, "x", [], ("state", 1)])
def test_what_is_no_dict_is_refused(saved):
    params = params_of((4,))
    for opt in (PACE(params, pullback=0.1), Pullback(sgd(params))):
        with pytest.raises(ValueError, match=r"^the checkpoint must be a dict, got .*nothing was"):
            opt.load_state_dict(saved)


def test_what_wraps_the_step_of_the_bases_class_is_called():
    """It has torch's own step as `__wrapped__`, which must not be taken for it."""

    class Base(torch.optim.SGD):
        pass

    Base([Parameter(torch.ones(1))], lr=0.1)  # torch puts its hooks around `step`
    own, calls = Base.step, []

    @functools.wraps(own)
    def step(self, closure=None):
        calls.append("wrapper")
        return own(self, closure)

    Base.step = step
    p = Parameter(torch.ones(1))
    opt = Pullback(Base([p], lr=0.1))
    opt.base.register_step_post_hook(lambda *_: calls.append("hook"))
    p.grad = torch.ones(1)
    opt.step()
    assert calls == ["wrapper", "hook"]
