"""The average and the pull around other optimizers: beside PACE, NumPy, and the bases alone."""

import copy
import functools
import io
import math
import pickle

import numpy as np
import pytest
import pytorch_optimizer
import torch
import torch.distributed.checkpoint as dcp
from reference import Followed
from torch import nn, optim
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.nn import Parameter

from paceline import PACE, Pullback, update
from paceline.averaging import BEMA, EMA, LAWA, SWA, PowerEMA, Uniform
from paceline.testing import SCHEDULERS, check_optimizer
from paceline.testing import _same as same

AVERAGE, STEP, OWN = "average", "average_step", "pullback_exp_avg_sq"


def adamw(params, **options):
    return optim.AdamW(params, **{"lr": 0.05, **options})


def sgd(params, **options):
    return optim.SGD(params, **{"lr": 0.05, **options})


def params_of(*shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def give(params, seed):
    """Gradients of the seed's, the same for the same shapes."""
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def go(params, opt, steps, first=0):
    for step in range(first, first + steps):
        give(params, 100 + step)
        opt.step()


def held(params, opt):
    """Weights, state and options, copied."""
    return copy.deepcopy(([p.detach().clone() for p in params], opt.state_dict()))


# ---- around AdamW it is PACE -----------------------------------------------------------------

AVERAGES = [
    PowerEMA(0.4, rate=2.0, start=3, every=2),
    EMA(0.05),
    Uniform(),
    SWA(2, 3),
    LAWA(3, every=2),
    BEMA(start=2),
]


def beside_pace(c, averaging, dtype, options, base):
    """Weights and averages after each step, of PACE and of this around AdamW.

    Two groups, the second with options of its own and a parameter that joins late; a learning rate
    that changes; gradients that do not come from the weights, so that differences do not grow.
    """
    ours = {"pullback": c, "averaging": averaging}
    runs = []
    for make in ("PACE", "Pullback"):
        params = params_of((4, 7), (5,), (), (3,), dtype=dtype)
        groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.02, "betas": (0.8, 0.95)}]
        if make == "PACE":
            groups[1] |= {"pullback": c / 2, "clip": False, "averaging": "ema:power=0.7"}
            named = {"clip" if name == "gain_clip" else name: x for name, x in options.items()}
            opt = PACE(groups, **{"lr": 0.05, **base}, **ours, **named)
        else:
            groups[1] |= {"pullback": c / 2, "gain_clip": False, "averaging": "ema:power=0.7"}
            opt = Pullback(adamw(groups, **base), **ours, **options)
        seen = []
        for step in range(20):
            give(params, step)
            if step < 6:
                params[3].grad = None
            for group, lr in zip(opt.param_groups, (0.05, 0.02), strict=True):
                group["lr"] = lr * (1 + math.cos(step / 7)) / 2
            opt.step()
            averages = [opt.state[p].get(AVERAGE, p.detach()).clone() for p in params]
            seen.append([p.detach().clone() for p in params] + averages)
        assert [opt.state[p][STEP if make == "Pullback" else "step"] for p in params] == [
            *(20, 20, 20, 14)
        ]
        runs.append(seen)
    return runs


@pytest.mark.parametrize("averaging", AVERAGES, ids=str)
@pytest.mark.parametrize("c", [0.0, 0.3, 3.0, 50.0])
def test_around_adamw_it_is_pace(c, averaging):
    for ours, theirs in zip(*beside_pace(c, averaging, torch.float32, {}, {}), strict=True):
        for x, y in zip(ours, theirs, strict=True):
            # 20 steps of some five roundings of 6e-8 that mostly do not add up, of weights up to 3
            torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "base"),
    [
        ({"gain_clip": False}, {"eps": 0.1}),  # which keeps gains below 2, where it is stable
        ({}, {"weight_decay": 0.3, "betas": (0.5, 0.9)}),
        ({}, {"maximize": True}),
        ({}, {"foreach": False}),
        ({"track_stats": True}, {}),
    ],
    ids=str,
)
def test_around_adamw_it_is_pace_with_other_options(options, base, monkeypatch):
    monkeypatch.setattr(update, "TOGETHER_ON_CPU", 10)  # in slices, too
    given = {name: x for name, x in base.items() if name != "foreach"}
    ours, _ = beside_pace(2.0, PowerEMA(), torch.float32, options, given)
    _, theirs = beside_pace(2.0, PowerEMA(), torch.float32, options, base)
    for xs, ys in zip(ours, theirs, strict=True):
        for x, y in zip(xs, ys, strict=True):
            torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-6)


# Differences from PACE after 20 steps, relative to weights of up to 3. In 16 bits each step rounds
# twice here (the base, then the pull) and once in PACE: by half a unit of 2^-8 or 2^-11, at random.
# So some sqrt(20·3) times that; a quarter of the worst seen would fail.
CLOSE = {torch.float64: 1e-13, torch.bfloat16: 8 * 2**-8, torch.float16: 8 * 2**-11}


@pytest.mark.parametrize("averaging", [PowerEMA(), LAWA(3, every=2)], ids=str)
@pytest.mark.parametrize("c", [0.0, 3.0])
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_around_adamw_it_is_pace_in_other_dtypes(dtype, c, averaging):
    for ours, theirs in zip(*beside_pace(c, averaging, dtype, {}, {}), strict=True):
        for x, y in zip(ours, theirs, strict=True):
            assert x.dtype == y.dtype
            assert ((x.double() - y.double()).abs() <= CLOSE[dtype] * 3).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_are_pulled_in_float32_and_rounded_once_more(dtype):
    """One step from the base's: to a bit, for there is one rounding only that could differ."""
    params = params_of((400,), dtype=dtype)
    opt = Pullback(sgd(params), pullback=0.2, gain="scalar")
    alone = params_of((400,), dtype=dtype)
    base = sgd(alone)
    for step in range(5):
        before = params[0].detach().clone()
        average = opt.state[params[0]].get(AVERAGE, before.float()).clone()
        alone[0].data.copy_(before)
        go(alone, base, 1, step)
        go(params, opt, 1, step)
        expected = (alone[0].double() + 0.2 * (average.double() - before.double())).to(dtype)
        # Where the sum is a tie but for float32's rounding, the other neighbour is as near.
        assert (params[0] == expected).float().mean() > 0.99
        taken = (1 - (2 + step) ** -0.5) * average + (2 + step) ** -0.5 * params[0].float()
        torch.testing.assert_close(opt.state[params[0]][AVERAGE], taken, atol=1e-6, rtol=0)
        assert opt.state[params[0]][AVERAGE].dtype == torch.float32


def test_amsgrads_gain_is_of_the_largest_second_moment():
    params, alone = params_of((30,), dtype=torch.float64), params_of((30,), dtype=torch.float64)
    opt = Pullback(adamw(params, amsgrad=True, betas=(0.9, 0.7)), pullback=2.0)
    base = adamw(alone, amsgrad=True, betas=(0.9, 0.7))
    told = 0
    for step in range(12):
        before = params[0].detach().clone()
        average = opt.state[params[0]].get(AVERAGE, before).clone()
        alone[0].data.copy_(before)
        go(alone, base, 1, step)
        go(params, opt, 1, step)
        state = base.state[alone[0]]
        root = (state["max_exp_avg_sq"] / (1 - 0.7 ** (step + 1))).sqrt() + 1e-8
        gain = (0.05 * 2.0 * (2 + step) ** -0.5 / root).clamp_max(1)
        torch.testing.assert_close(params[0].detach(), alone[0] + gain * (average - before))
        told += (state["max_exp_avg_sq"] > 2 * state["exp_avg_sq"]).sum()
    assert told > 10


# ---- around SGD, beside NumPy ----------------------------------------------------------------


@pytest.mark.parametrize(
    "rule",
    [
        {"gain": "own", "pullback": 0.7},
        {"gain": "own", "pullback": 3.0, "beta2": 0.9, "eps": 0.1, "clip": False, "power": 0.3},
        {"gain": "own", "pullback": 40.0, "momentum": 0.9, "weight_decay": 0.1},
        {"gain": "own", "pullback": 0.7, "beta2": 0.0},
        {"gain": "scalar", "pullback": 0.3},
        {"gain": "scalar", "pullback": 1.4, "momentum": 0.5},
        {"gain": "scalar", "pullback": 1.4, "clip": False, "power": 0.3},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("dtype", "close"),
    [(torch.float32, 3e-6), (torch.float64, 1e-13)],  # 30 steps of some five roundings
    ids=["float32", "float64"],
)
def test_around_sgd_it_is_the_reference(rule, dtype, close, monkeypatch):
    monkeypatch.setattr(update, "TOGETHER_ON_CPU", 16)
    params = params_of((5, 8), (), (0,), (3,), dtype=dtype)
    params.append(Parameter(params_of((6, 4), dtype=dtype)[0].detach().t()))
    names = {"beta2": "gain_beta2", "eps": "gain_eps", "clip": "gain_clip"}
    ours = {names.get(key, key): x for key, x in rule.items()}
    base = {key: ours.pop(key) for key in ("momentum", "weight_decay") if key in ours}
    opt = Pullback(
        sgd(params, **base),
        averaging=PowerEMA(ours.pop("power", 0.5)),
        track_stats=True,
        **ours,
    )
    refs = [Followed(p.detach().double().numpy(), **rule) for p in params]
    for step in range(30):
        opt.param_groups[0]["lr"] = lr = 0.1 / (1 + step / 10)
        give(params, step)
        before = [p.detach().clone() for p in params]
        pulls = [ref.average - ref.theta for ref in refs]
        gains = [ref.step(p.grad.double().numpy(), lr) for p, ref in zip(params, refs, strict=True)]
        opt.step()
        for p, ref in zip(params, refs, strict=True):
            state = opt.state[p]
            np.testing.assert_allclose(p.detach(), ref.theta, atol=close, rtol=close)
            np.testing.assert_allclose(state[AVERAGE], ref.average, atol=close, rtol=close)
            assert (OWN in state) == (rule["gain"] == "own")
            if OWN in state:
                np.testing.assert_allclose(state[OWN], ref.v, atol=close, rtol=1e-5)
        together = [np.concatenate([x.ravel() for x in xs]) for xs in (gains, pulls)]
        moved = np.concatenate(
            [(p.detach() - b).double().numpy().ravel() for p, b in zip(params, before, strict=True)]
        )
        gain, pull = together[0], together[0] * together[1]
        far = np.concatenate([(x.average - x.theta).ravel() for x in refs])
        expected = {
            "gain_mean": gain.mean(),
            "gain_min": gain.min(),
            "gain_max": gain.max(),
            "clipped": (gain >= 1).mean() if rule.get("clip", True) else 0.0,
            "base_norm": np.linalg.norm(moved - pull),
            "pull_norm": np.linalg.norm(pull),
            "update_norm": np.linalg.norm(moved),
            "distance": np.linalg.norm(far),
        }
        stats = opt.stats()
        for name, value in expected.items():
            assert stats[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("gain", ["adam", "own", "scalar"])
def test_the_pull_starts_at_the_weights_before_the_bases_step(gain):
    """Where the average is the weights themselves, at the first step, there is nothing to pull."""
    params, alone = params_of((50,)), params_of((50,))
    opt = Pullback(adamw(params), pullback=30.0, gain=gain)
    go(params, opt, 1)
    go(alone, adamw(alone), 1)
    assert torch.equal(params[0], alone[0])
    go(params, opt, 1, 1)
    go(alone, adamw(alone), 1, 1)
    assert not torch.equal(params[0], alone[0])


# ---- a table of bases ------------------------------------------------------------------------

SHAPES = 8, 12
po = pytorch_optimizer


# How each is made, and whose second moment its pull goes by: its own ("adam") or ours.
BASES = {
    "SGD": (functools.partial(optim.SGD, lr=0.2), "own"),
    "SGD momentum": (functools.partial(optim.SGD, lr=0.1, momentum=0.9), "own"),
    "Adam": (functools.partial(optim.Adam, lr=0.02), "adam"),
    "AdamW": (functools.partial(optim.AdamW, lr=0.02), "adam"),
    "AdamW fused": (functools.partial(optim.AdamW, lr=0.02, fused=True), "adam"),
    "AdamW amsgrad": (functools.partial(optim.AdamW, lr=0.02, amsgrad=True), "adam"),
    "NAdam": (functools.partial(optim.NAdam, lr=0.02), "adam"),
    "RAdam": (functools.partial(optim.RAdam, lr=0.02), "adam"),
    "Adafactor": (functools.partial(optim.Adafactor, lr=0.05), "own"),
    "Muon": (functools.partial(optim.Muon, lr=0.02), "own"),
    "LBFGS": (functools.partial(optim.LBFGS, lr=0.1, max_iter=4), "own"),
    "Adagrad": (functools.partial(optim.Adagrad, lr=0.1), "own"),
    "RMSprop": (functools.partial(optim.RMSprop, lr=0.01), "own"),
    "SOAP": (functools.partial(po.SOAP, lr=0.02), "own"),  # its exp_avg_sq is in another basis
    "Shampoo": (functools.partial(po.Shampoo, lr=0.02), "own"),
    "AdEMAMix": (functools.partial(po.AdEMAMix, lr=0.02), "adam"),
    "SophiaH": (functools.partial(po.SophiaH, lr=0.02, update_period=2), "own"),
    "Lion": (functools.partial(po.Lion, lr=0.005), "own"),
}


def net(name="", seed=0):
    torch.manual_seed(seed)
    bias = name != "Muon"  # which takes matrices only
    return nn.Sequential(
        nn.Linear(SHAPES[0], SHAPES[1], bias), nn.Tanh(), nn.Linear(SHAPES[1], SHAPES[0], bias)
    )


def loss_of(model, batch):
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(32, SHAPES[0], generator=generator)
    return (model(x) - x.flip(1) / 2).square().mean()


def train(name, model, opt, steps, first=0, seen=None):
    """Steps as this base wants them; the weights after each go into `seen`."""
    for step in range(first, first + steps):
        torch.manual_seed(step)  # SophiaH draws

        def closure(step=step):
            opt.zero_grad()
            loss = loss_of(model, step)
            loss.backward(create_graph=name == "SophiaH")
            return loss.detach()

        if name == "LBFGS":
            opt.step(closure)
        else:
            closure()
            opt.step()
        if seen is not None:
            seen.append([p.detach().clone() for p in model.parameters()])
    opt.zero_grad()  # with SophiaH's graph


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


def assert_one(opt):
    assert opt.state is opt.base.state
    assert opt.param_groups is opt.base.param_groups


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


def test_state_is_float32_whatever_the_default_dtype():
    """A count in bfloat16 would stop at 256."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        params = params_of((3,))
        opt = Pullback(sgd(params))
        go(params, opt, 2)
        opt.load_state_dict(opt.state_dict())
        assert opt.state[params[0]][STEP].dtype == torch.float32
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


# ---- torch.distributed.checkpoint ------------------------------------------------------------

DCP = {
    "AdamW": BASES["AdamW"],
    "Adam": BASES["Adam"],
    "SGD": BASES["SGD"],
    "SGD momentum": BASES["SGD momentum"],
    "Lion": BASES["Lion"],
    "AdEMAMix": BASES["AdEMAMix"],  # it counts in its groups
    "SOAP": BASES["SOAP"],
    "AdamW gain of our own": (BASES["AdamW"][0], "own"),
}


@pytest.mark.parametrize("moment", [(0, False), (0, True), (3, False), (3, True)], ids=str)
@pytest.mark.parametrize("name", DCP)
def test_asking_for_a_distributed_checkpoint_disturbs_nothing(name, moment):
    make, gain = DCP[name]
    first, swapped = moment
    ends = []
    for asked in ("", "get", "get, set", "get, set, flat", "copy"):
        if (
            asked.endswith("flat") and name == "SOAP"
        ):  # it keeps lists, which torch does not flatten
            continue
        model = net()
        opt = Pullback(make(model.parameters()), pullback=0.3, gain=gain, averaging=BEMA())
        train(name, model, opt, first)
        if swapped:
            opt.eval()
        if asked:
            options = StateDictOptions(flatten_optimizer_state_dict="flat" in asked)
            states = get_state_dict(model, opt, options=options)
        if "set" in asked:
            set_state_dict(
                model, opt, model_state_dict=states[0], optim_state_dict=states[1], options=options
            )
        if asked == "copy" and name not in ("Lion", "AdEMAMix", "SOAP"):  # which do not survive it
            model, opt = copy.deepcopy((model, opt))
        assert opt.swapped == swapped
        opt.train()
        if not first:  # other weights come in before the first step: the average begins with them
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(0.5)
        exported = opt.averaged_state_dict(model)
        assert first or same(list(exported.values()), list(model.parameters()))
        train(name, model, opt, 3, first)
        ends.append((list(model.parameters()), opt.state_dict()))
    for end in ends[1:]:
        counts = end[1]["param_groups"][0].get("step")
        assert counts == ends[0][1]["param_groups"][0].get("step")
        assert same(end, ends[0])


@pytest.mark.filterwarnings("ignore:.*torch.distributed.*:UserWarning")
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("name", DCP)
def test_a_distributed_checkpoint_resumes(name, swapped, tmp_path):
    make, gain = DCP[name]
    model = net()
    opt = Pullback(make(model.parameters()), pullback=0.3, gain=gain, averaging=BEMA())
    train(name, model, opt, 4)
    if swapped:
        opt.eval()
    state = dict(zip(("model", "optimizer"), get_state_dict(model, opt), strict=True))
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    opt.train()
    train(name, model, opt, 3, 4)
    other = net(seed=1)
    fresh = Pullback(make(other.parameters()), pullback=0.7, gain=gain, averaging=BEMA())
    state = dict(zip(("model", "optimizer"), get_state_dict(other, fresh), strict=True))
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(
        other, fresh, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    fresh.train()
    train(name, other, fresh, 3, 4)
    assert same(list(other.parameters()), list(model.parameters()))
    assert same(fresh.state_dict(), opt.state_dict())


# ---- the conformance kit ---------------------------------------------------------------------


def around_adamw(params):
    return Pullback(adamw(params), pullback=2.0)


CONFORMS = {
    "AdamW, pulled": (around_adamw, set()),
    # What is not there is the base's own, and the base does not mind.
    "AdamW": (lambda params: Pullback(adamw(params)), {"missing state"}),
    # The foreign state is of an SGD with momentum: not foreign.
    "SGD": (
        lambda params: Pullback(sgd(params, momentum=0.9)),
        {"foreign state", "missing state"},
    ),
    "SGD, pulled": (
        lambda params: Pullback(sgd(params), pullback=0.3, averaging=LAWA(3)),
        {"foreign state"},
    ),
    "SGD, scalar": (
        lambda params: Pullback(sgd(params), pullback=0.3, gain="scalar", averaging=BEMA()),
        {"foreign state"},
    ),
}


@pytest.mark.parametrize("name", CONFORMS)
def test_conformance(name):
    """The checks on several ranks are those of test_distributed.py."""
    make, failures = CONFORMS[name]
    report = check_optimizer(make, ranks=0)
    assert {check.name for check in report.failures} == failures, report
    assert {check.reason for check in report.checks if check.outcome == "not run"} == {"ranks=0"}


# ---- gradients that are not finite -----------------------------------------------------------

FAULTS = (math.nan, math.inf, -math.inf, 1e25)  # the square of the last is not finite


def faulty(params, opt, value, closure):
    """A step with one such gradient; the closure's loss."""
    give(params, 7)
    params[1].grad[2] = value
    if not closure:
        return opt.step()
    calls = []

    def evaluate():
        calls.append(len(calls))
        return torch.tensor(3.5)

    loss = opt.step(evaluate)
    assert calls == [0]
    return loss


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("value", FAULTS)
@pytest.mark.parametrize("c", [0.0, 0.3])
def test_a_step_with_a_gradient_that_is_not_finite_is_skipped(c, value, closure):
    params, others = params_of((4, 3), (3,)), params_of((4, 3), (3,))
    opt, plain = Pullback(adamw(params), pullback=c), Pullback(adamw(others), pullback=c)
    for before_first in (True, False):
        before = held(params, opt)
        loss = faulty(params, opt, value, closure)
        assert loss == (3.5 if closure else None)
        assert same(held(params, opt), before)
        assert opt.stats()["skipped_steps"] == (1 if before_first else 2)
        go(params, opt, 2)
        go(others, plain, 2)
    assert same(held(params, opt), held(others, plain))
    assert plain.stats()["skipped_steps"] == 0


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("value", FAULTS)
def test_a_gradient_that_is_not_finite_raises(value, closure):
    params = params_of((4, 3), (3,))
    base = adamw(zip(("first", "second"), params, strict=True))
    opt = Pullback(base, pullback=0.3, nonfinite="raise")
    go(params, opt, 2)
    before = held(params, opt)
    with pytest.raises(FloatingPointError, match=r"gradient of parameter 'second' of shape \(3,\)"):
        faulty(params, opt, value, closure)
    assert same(held(params, opt), before)
    assert opt.stats()["skipped_steps"] == 0


def test_a_gradient_that_is_not_finite_can_be_left_to_the_base():
    params = params_of((4, 3), (3,))
    opt = Pullback(sgd(params), pullback=0.3, nonfinite="ignore")
    go(params, opt, 1)
    faulty(params, opt, math.nan, False)
    assert params[1].isnan().nonzero().tolist() == [[2]]
    assert opt.state[params[1]][STEP] == 2
    assert opt.stats()["skipped_steps"] == 0


def test_one_group_has_all_skipped():
    params = params_of((4, 3), (3,), (3,))
    groups = [
        {"params": [p], "nonfinite": way}
        for p, way in zip(params, ("ignore", "skip", "raise"), strict=True)
    ]
    opt = Pullback(sgd(groups))
    before = held(params, opt)
    faulty(params, opt, math.nan, False)
    assert same(held(params, opt), before)


def test_lbfgs_takes_its_first_gradient_for_the_pull_and_many_for_a_step():
    """The step counts once; our second moment is of the gradient where the step began."""
    model = net()
    opt = Pullback(optim.LBFGS(model.parameters(), lr=0.1, max_iter=4), pullback=0.3)
    first = []

    def closure():
        opt.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        first.append([p.grad.clone() for p in model.parameters()])
        return loss

    opt.step(closure)
    assert len(first) == 4
    for p, grad in zip(model.parameters(), first[0], strict=True):
        assert opt.state[p][STEP] == 1
        torch.testing.assert_close(opt.state[p][OWN], 0.001 * grad.square())


# ---- bad input -------------------------------------------------------------------------------


class FirstStep(optim.SGD):
    def first_step(self):
        """As SAM has it."""


class FusedBackward(optim.SGD):
    def fused_backward(self):
        """As LOMO has it."""


class Collides(optim.SGD):
    def __init__(self, params):
        super().__init__(params, lr=0.1)
        self.defaults["gain"] = self.param_groups[0]["gain"] = 1.0


def stepped(cls, **options):
    params = params_of((3,))
    base = cls(params, lr=0.1, **options)
    go(params, base, 1)
    return base


def wrapped_before():
    base = sgd(params_of((3,)))
    Pullback(base)
    return base


def schedulefree_sgd():
    schedulefree = pytest.importorskip("schedulefree")
    return schedulefree.SGDScheduleFree(params_of((3,)), lr=0.1)


BAD_BASES = {
    "no optimizer": (lambda: nn.Linear(2, 2), "must be a torch.optim.Optimizer, got Linear"),
    "PACE": (lambda: PACE(params_of((3,)), pullback=0), "in step.. only, got a PACE, whose eval"),
    "Pullback": (
        lambda: Pullback(sgd(params_of((3,)))),
        "a Pullback, whose eval.. and train.. may",
    ),
    "Schedule-Free": (schedulefree_sgd, "got a SGDScheduleFree, whose eval.. and train.. may move"),
    "SAM": (lambda: FirstStep(params_of((3,)), lr=0.1), "a FirstStep, whose first_step.. may move"),
    "LOMO": (
        lambda: FusedBackward(params_of((3,)), lr=0.1),
        "whose fused_backward.. may move them",
    ),
    "our options": (
        lambda: Collides(params_of((3,))),
        r"our names, got a Collides with \['gain'\]",
    ),
    "twice": (wrapped_before, "must not have been in a Pullback before, got a SGD"),
    "Lookahead": (
        lambda: po.Lookahead(sgd(params_of((3,)))),
        r"in state and param_groups, got a Lookahead, whose state_dict.. has \['base_optimizer'",
    ),
    "stepped AdamW": (lambda: stepped(optim.AdamW), "must not have stepped yet .* got a AdamW"),
    "stepped SGD": (lambda: stepped(optim.SGD, momentum=0.9), "must not have stepped yet .* a SGD"),
    "stepped Adagrad": (lambda: stepped(optim.Adagrad), "must not have stepped yet"),
    "complex": (
        lambda: sgd([Parameter(torch.ones(2, dtype=torch.complex64))]),
        r"floating-point tensors, got torch.complex64 in parameter 0 of group 0 of shape \(2,\)",
    ),
    "integer": (
        lambda: sgd([("n", Parameter(torch.ones(2, dtype=torch.int32), requires_grad=False))]),
        "got torch.int32 in parameter 'n' of shape",
    ),
}


@pytest.mark.parametrize("name", BAD_BASES)
def test_bases_that_cannot_be_used(name):
    make, message = BAD_BASES[name]
    base = make()
    groups = copy.copy(getattr(base, "param_groups", None))
    options = [set(group) for group in groups or []]
    with pytest.raises(ValueError, match=message) as raised:
        Pullback(base, pullback=0.1)
    assert "\n" not in str(raised.value)
    assert [set(group) for group in groups or []] == options


BAD_OPTIONS = [
    ({"pullback": -1.0}, "pullback must be a finite number >= 0, got -1.0"),
    ({"pullback": math.inf}, "pullback must be a finite"),
    ({"pullback": None}, "pullback must be a finite"),
    ({"averaging": None}, "averaging must be an average, or its text, got None"),
    ({"averaging": 0.5}, "averaging must be an average of paceline.averaging"),
    ({"averaging": "mean"}, "unknown average 'mean'"),
    ({"gain": "own "}, "gain must be one of adam, own, scalar, got 'own '"),
    ({"gain": None}, "gain must be one of"),
    ({"gain_beta2": 1.0}, r"gain_beta2 must be in \[0, 1\), got 1.0"),
    ({"gain_beta2": -0.1}, "gain_beta2 must be"),
    ({"gain_eps": -1e-8}, "gain_eps must be a number >= 0, got -1e-08"),
    ({"gain_eps": math.inf}, "gain_eps must be"),
    ({"gain_clip": 1}, "gain_clip must be True or False, got 1"),
    ({"track_stats": "yes"}, "track_stats must be True or False"),
    ({"nonfinite": "guard"}, "nonfinite must be one of skip, raise, ignore, got 'guard'"),
    ({"nonfinite": "skips"}, "nonfinite must be one of"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS, ids=str)
def test_options_out_of_their_range(options, message):
    base = sgd(params_of((3,)))
    before = {**base.param_groups[0]}
    with pytest.raises(ValueError, match=message):
        Pullback(base, **options)
    assert base.param_groups[0] == before
    good, bad = params_of((3,)), params_of((3,))
    base = sgd([{"params": good}, {"params": bad, **options}])
    with pytest.raises(ValueError, match=message):
        Pullback(base)
    opt = Pullback(sgd(good))
    with pytest.raises(ValueError, match=message):
        opt.add_param_group({"params": bad, **options})
    assert len(opt.param_groups) == 1
    state = copy.deepcopy(opt.state_dict())
    state["param_groups"][0] |= options
    before = held(good, opt)
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(state)
    assert same(held(good, opt), before)


def test_options_at_the_ends_of_their_range():
    params = params_of((3,))
    opt = Pullback(sgd(params), pullback=1, gain_beta2=0, gain_eps=0, averaging="ema:beta=1")
    go(params, opt, 3)
    assert opt.param_groups[0]["pullback"] == 1.0
    assert params[0].isfinite().all()


def test_a_base_that_has_stepped_is_averaged_from_now():
    params = params_of((4, 3))
    base = adamw(params)
    go(params, base, 3)
    opt = Pullback(base)
    start = params[0].detach().clone()
    go(params, opt, 1)
    state = opt.state[params[0]]
    assert state[STEP] == state["step"] == 4  # its steps go on from the base's
    expected = start + 5**-0.5 * (params[0] - start)
    torch.testing.assert_close(state[AVERAGE], expected.detach())
    # So do those of a base that counts for its groups.
    params = params_of((4, 3))
    base = po.AdEMAMix(params, lr=0.1)
    go(params, base, 3)
    opt = Pullback(base)
    go(params, opt, 1)
    assert opt.state[params[0]][STEP] == 4


def test_a_step_that_cannot_be_taken_changes_nothing():
    params = params_of((4, 3), (3,))
    opt = Pullback(adamw(zip(("first", "second"), params, strict=True)), pullback=0.3)
    go(params, opt, 2)
    before = held(params, opt)
    give(params, 9)
    params[1].grad = params[1].grad.to_sparse()
    for call in (opt.step, lambda: opt.step(lambda: 1.0)):
        with pytest.raises(RuntimeError, match="not support sparse gradients, got .* 'second'"):
            call()
        assert same(held(params, opt), before)
    opt.eval()
    before = held(params, opt)
    give(params, 9)
    for call in (opt.step, lambda: opt.step(lambda: 1.0)):
        with pytest.raises(RuntimeError, match=r"call train\(\) first"):
            call()
        assert same(held(params, opt), before)


def test_a_base_that_raises_leaves_what_is_ours():
    class Fails(optim.SGD):
        def step(self, closure=None):
            if self.fails:
                raise MemoryError
            return super().step(closure)

    params = params_of((4, 3))
    opt = Pullback(Fails(params, lr=0.1), pullback=0.3)
    opt.base.fails = False
    go(params, opt, 2)
    before = held(params, opt)
    opt.base.fails = True
    with pytest.raises(MemoryError):
        go(params, opt, 1)
    assert same(held(params, opt), before)


# ---- checkpoints that do not fit, or not quite -----------------------------------------------


def saved(base=sgd, steps=2, **options):
    params = params_of((4, 3), (3,))
    opt = Pullback(base(params), **{"pullback": 0.3, **options})
    go(params, opt, steps)
    return copy.deepcopy(opt.state_dict())


def without(name, which=1):
    def change(state):
        del state["state"][which][name]

    return change


def put(name, value, which=1):
    def change(state):
        state["state"][which][name] = value

    return change


def regrouped(state):
    state["param_groups"][0]["params"] = [0]


def of_adam(state):
    params = params_of((4, 3), (3,))
    opt = optim.Adam(params)
    go(params, opt, 1)
    state.update(copy.deepcopy(opt.state_dict()))


def of_pace(state):
    params = params_of((4, 3), (3,))
    opt = PACE(params, pullback=0.3)
    go(params, opt, 1)
    state.update(copy.deepcopy(opt.state_dict()))


def swapped_without(state):
    state["state"] = {}
    state["param_groups"][0]["swapped"] = "torch.float32*2"


UNFIT = {
    "no average": (without(AVERAGE), r"'second' of shape \(3,\) cannot .* lacks \['average'\]"),
    "no step": (without(STEP), r"lacks \['average_step'\]; nothing was changed"),
    "no second moment": (without(OWN), r"'second' .* lacks \['pullback_exp_avg_sq'\]"),
    "nothing of the rule": (without("average_ema", 0), r"'first' .* lacks \['average_ema'\]"),
    "shape of the average": (put(AVERAGE, torch.ones(2)), r"its 'average' has shape \(2,\)"),
    "shape of the moment": (put(OWN, torch.ones(2)), r"'pullback_exp_avg_sq' has shape \(2,\)"),
    "shape of the rule's": (put("average_initial", torch.ones(2)), "'average_initial' has shape"),
    "kind of the average": (put(AVERAGE, torch.ones(3).int()), "must be a floating-point tensor"),
    "kind of the moment": (put(OWN, 3.0), "must be a floating-point tensor, got float"),
    "steps": (put(STEP, torch.ones(2)), "its 'average_step' must be one number"),
    "groups": (regrouped, r"groups have \[1\] parameters, the optimizer's \[2\]: make the same"),
    "Adam's": (of_adam, r"group 0 of the checkpoint is not of SGD: it lacks \['dampening'"),
    "PACE's": (of_pace, "group 0 of the checkpoint is not of SGD"),
    "swapped": (swapped_without, r"'first' .* lacks \['average', 'average_ema'"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_checkpoints_that_do_not_fit(name):
    change, message = UNFIT[name]
    state = saved(averaging=BEMA())
    change(state)
    params = params_of((4, 3), (3,))
    opt = Pullback(sgd(zip(("first", "second"), params, strict=True)), pullback=0.1)
    go(params, opt, 1)
    before = held(params, opt)
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(state)
    assert same(held(params, opt), before)
    assert_one(opt)


@pytest.mark.parametrize("make", [adamw, functools.partial(sgd, momentum=0.9)])
def test_a_checkpoint_of_the_base_alone_is_a_start(make):
    params, others = params_of((4, 3), (3,)), params_of((4, 3), (3,))
    base = make(params)
    go(params, base, 3)
    opt = Pullback(make(others, lr=0.7), pullback=0.3, averaging=Uniform())
    for p, q in zip(others, params, strict=True):
        p.data.copy_(q)
    with pytest.warns(
        UserWarning, match="keeps no averages, as those of (AdamW|SGD): its state is"
    ):
        opt.load_state_dict(base.state_dict())
    group = opt.param_groups[0]
    assert [group[name] for name in ("lr", "pullback", "averaging")] == [0.05, 0.3, "uniform"]
    for p, q in zip(others, params, strict=True):
        assert same(opt.state[p], base.state[q])
    start = others[0].detach().clone()
    go(params, base, 1)
    go(others, opt, 1)
    assert same(others, params)  # nothing to pull to at first
    counted = make is adamw
    expected = start + (others[0] - start) / (4 if counted else 1)
    torch.testing.assert_close(opt.state[others[0]][AVERAGE], expected.detach())


@pytest.mark.parametrize("name", ["Adagrad", "SGD momentum"])
def test_a_checkpoint_from_before_the_first_step_is_taken_as_such(name):
    """Without a warning, which is an error here; some bases have state by then."""
    make, _ = BASES[name]
    params, others = params_of((4, 3), (3,)), params_of((4, 3), (3,))
    opt, fresh = (Pullback(make(x), pullback=0.3) for x in (params, others))
    fresh.load_state_dict(opt.state_dict())
    go(params, opt, 3)
    go(others, fresh, 3)
    assert same(held(params, opt), held(others, fresh))


@pytest.mark.parametrize("swapped", [False, True])
def test_state_of_narrow_parameters_is_loaded_as_it_was(swapped):
    params = params_of((4, 3), (3,), dtype=torch.bfloat16)
    opt = Pullback(sgd(params), pullback=0.3, averaging=BEMA())
    go(params, opt, 300)
    if swapped:
        opt.eval()
    others = params_of((4, 3), (3,), dtype=torch.bfloat16)
    fresh = Pullback(sgd(others))
    fresh.load_state_dict(opt.state_dict())
    for p, q in zip(params, others, strict=True):
        assert same(fresh.state[q], opt.state[p])
        assert not any(
            x is y for x, y in zip(fresh.state[q].values(), opt.state[p].values(), strict=True)
        )
    assert fresh.state[others[0]][STEP] == 300


def test_state_of_wider_parameters_is_loaded_as_these_need_it():
    params, others = params_of((4, 3), dtype=torch.float64), params_of((4, 3))
    opt, fresh = Pullback(sgd(params), pullback=0.3), Pullback(sgd(others))
    go(params, opt, 2)
    fresh.load_state_dict(opt.state_dict())
    go(others, fresh, 2)
    assert fresh.state[others[0]][AVERAGE].dtype == torch.float32
    assert fresh.state[others[0]][OWN].dtype == torch.float32
    fresh.eval()


def test_tensors_of_the_bases_state_are_its_own_after_loading():
    for base in (functools.partial(sgd, momentum=0.9), functools.partial(optim.LBFGS, lr=0.1)):
        model = net()
        opt = Pullback(base(model.parameters()), pullback=0.3)
        train("LBFGS", model, opt, 2)
        state = opt.state_dict()
        before = copy.deepcopy(state)
        fresh = Pullback(base(net().parameters()))
        fresh.load_state_dict(state)
        train("LBFGS", model, opt, 2)
        assert same(fresh.state_dict(), before)


# ---- changes in mid-run ----------------------------------------------------------------------


def test_a_pull_that_is_raised_from_0_takes_the_first_gradient_for_those_before():
    params = params_of((40,), dtype=torch.float64)
    opt = Pullback(sgd(params), gain_beta2=0.9)
    go(params, opt, 10)
    assert OWN not in opt.state[params[0]]
    opt.param_groups[0]["pullback"] = 0.3
    state = copy.deepcopy(opt.state_dict())  # saved before it has a second moment: it is to begin
    others = params_of((40,), dtype=torch.float64)
    others[0].data.copy_(params[0])
    fresh = Pullback(sgd(others))
    fresh.load_state_dict(state)
    go(others, fresh, 1, 10)
    before = params[0].detach().clone()
    average = opt.state[params[0]][AVERAGE].clone()
    go(params, opt, 1, 10)
    assert same(held(params, opt), held(others, fresh))
    g = params[0].grad
    gain = (0.05 * 0.3 * 12**-0.5 / (g.abs() + 1e-8)).clamp_max(1)  # v̂ is its square
    torch.testing.assert_close(params[0].detach(), before - 0.05 * g + gain * (average - before))


@pytest.mark.parametrize("off", [{"pullback": 0.0}, {"gain": "scalar"}, {"gain": "adam"}], ids=str)
def test_a_second_moment_that_is_not_kept_up_is_not_kept(off):
    """Or gains would go by it, far too large, when it is needed again."""
    params = params_of((40,))
    opt = Pullback(adamw(params), pullback=0.3, gain="own", track_stats=True)
    go(params, opt, 2)
    on = {name: opt.param_groups[0][name] for name in off}
    opt.param_groups[0].update(off)
    go(params, opt, 1)
    assert OWN not in opt.state[params[0]]
    go(params, opt, 200)
    opt.param_groups[0].update(on)
    go(params, opt, 1)
    expected = 0.05 * 0.3 * 205**-0.5 / params[0].grad.abs()
    assert opt.stats()["gain_max"] == pytest.approx(expected.max().item(), rel=1e-3)


def test_another_average_can_be_asked_for():
    params = params_of((4, 3))
    opt = Pullback(sgd(params))
    go(params, opt, 4)
    opt.param_groups[0]["averaging"] = "lawa:window=2"
    go(params, opt, 1, 4)
    last = params[0].detach().clone()
    go(params, opt, 1, 5)
    torch.testing.assert_close(opt.state[params[0]][AVERAGE], (last + params[0].detach()) / 2)


def test_a_smaller_window_in_mid_run_begins_anew():
    """Or its mean would have snapshots in it that are not the last."""
    p = Parameter(torch.zeros(3))
    opt = Pullback(optim.SGD([p], lr=1.0), averaging="lawa:window=4")
    seen = []
    for step in range(9):
        if step == 6:
            opt.param_groups[0]["averaging"] = "lawa:window=2"
        p.grad = torch.full((3,), float(step + 1))
        opt.step()
        seen.append(p.detach().clone())
    assert sorted(k for k in opt.state[p] if "snapshot" in k) == [
        f"average_snapshot_{i}" for i in range(2)
    ]
    torch.testing.assert_close(opt.state[p]["average"], (seen[-1] + seen[-2]) / 2)
