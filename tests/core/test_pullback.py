"""The average and the pull around other optimizers: beside PACE and NumPy."""

import copy
import math

import numpy as np
import pytest
import torch
from problems import same
from pulled import AVERAGE, OWN, STEP, adamw, give, go, held, params_of, sgd
from reference import Followed
from torch import optim
from torch.nn import Parameter

from paceline import PACE, Pullback, update
from paceline.averaging import BEMA, EMA, LAWA, SWA, PowerEMA, Uniform
from paceline.testing import check_optimizer

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
            groups[1] |= {"pullback": c / 2, "clip": False, "averaging": "ema:kappa=0.7"}
            named = {"clip" if name == "gain_clip" else name: x for name, x in options.items()}
            opt = PACE(groups, **{"lr": 0.05, **base}, **ours, **named)
        else:
            groups[1] |= {"pullback": c / 2, "gain_clip": False, "averaging": "ema:kappa=0.7"}
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
        ({"track_stats": True}, {}),
    ],
    ids=str,
)
def test_around_adamw_it_is_pace_with_other_options(options, base, monkeypatch):
    monkeypatch.setattr(update, "TOGETHER_ON_CPU", 10)  # in slices, too
    runs = beside_pace(2.0, PowerEMA(), torch.float32, options, base)
    for xs, ys in zip(*runs, strict=True):
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
        {"gain": "scalar", "pullback": 1.0, "momentum": 0.5},
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
    opt = Pullback(adamw(params), pullback=1.0 if gain == "scalar" else 30.0, gain=gain)
    go(params, opt, 1)
    go(alone, adamw(alone), 1)
    assert torch.equal(params[0], alone[0])
    go(params, opt, 1, 1)
    go(alone, adamw(alone), 1, 1)
    assert not torch.equal(params[0], alone[0])


# ---- the conformance kit ---------------------------------------------------------------------


def around_adamw(params):
    return Pullback(adamw(params), pullback=2.0)


CONFORMS = {
    "AdamW, pulled": (around_adamw, set()),
    "AdamW": (lambda params: Pullback(adamw(params)), set()),
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
    """The checks on several ranks are those of test_shards.py."""
    make, failures = CONFORMS[name]
    report = check_optimizer(make, ranks=0)
    assert {check.name for check in report.failures} == failures, report
    assert {check.reason for check in report.checks if check.outcome == "not run"} == {"ranks=0"}


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
    gain = (0.05 * 0.3 * 12**-0.7 / (g.abs() + 1e-8)).clamp_max(1)  # v̂ is its square
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
