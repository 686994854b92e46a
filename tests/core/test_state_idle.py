"""Parameters that do not step: without a gradient for a while, or frozen; and what counts them."""

import copy

import pytest
import torch
from problems import same
from torch import nn
from torch.nn import Parameter

from paceline import PACE, Pullback
from paceline.averaging import parse

RULES = ["ema:kappa=0.5", "ema:beta=0.2:every=3", "uniform", "lawa:window=3", "bema"]


def pace(params, **options):
    return PACE(params, lr=0.1, **{"pullback": 0.1, **options})


def around_sgd(params, **options):
    return Pullback(torch.optim.SGD(params, lr=0.1), **{"pullback": 0.1, **options})


def around_adamw(params, **options):
    return Pullback(torch.optim.AdamW(params, lr=0.1), **{"pullback": 0.1, **options})


MAKERS = [pace, around_sgd, around_adamw]


def two():
    return [Parameter(torch.randn(5, generator=torch.Generator().manual_seed(i))) for i in (0, 1)]


def step(params, opt, t, absent=()):
    for i, p in enumerate(params):
        seeded = torch.Generator().manual_seed(10 * t + i)
        p.grad = None if i in absent else torch.randn(p.shape, generator=seeded).to(p.dtype)
    opt.step()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("make", MAKERS)
def test_an_average_goes_on_toward_weights_without_a_gradient(make, rule):
    params = two()
    opt = make(params, averaging=rule, returns={"slow": "ema:kappa=0.7", "three": "swa:every=3"})
    seen = [params[1].detach().double()]
    for t in range(12):
        step(params, opt, t, absent=[1] if 4 <= t < 9 else [])
        seen.append(params[1].detach().double())
    assert all(torch.equal(x, seen[4]) for x in seen[5:10])  # live weights stand still
    for name, of in (("average", rule), ("slow", "ema:kappa=0.7"), ("three", "swa:every=3")):
        expected = parse(of).coefficients(12) @ torch.stack(seen)
        key = name if name == "average" else f"return_{name}"
        torch.testing.assert_close(opt.state[params[1]][key].double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("make", MAKERS)
def test_the_moments_do_not_count_steps_without_a_gradient(make):
    """With a gradient again it steps as if the steps between had not been; at β_t of them all."""
    weights = []
    for idle in (0, 5):
        params = two()
        opt = make(params, pullback=0.0)
        for t in range(8 + idle):
            step(params, opt, t if t < 4 else t - idle, absent=[1] if 4 <= t < 4 + idle else [])
        weights.append(params[1].detach().clone())
    assert torch.equal(*weights)


@pytest.mark.parametrize("make", MAKERS)
def test_a_step_without_any_gradient_is_none(make):
    params = two()
    opt = make(params)
    step(params, opt, 0)
    before = copy.deepcopy(opt.state_dict())
    step(params, opt, 1, absent=[0, 1])
    assert same(opt.state_dict(), before)


@pytest.mark.parametrize("make", MAKERS)
def test_what_is_frozen_is_returned_as_it_is(make):
    params = two()
    opt = make(params, returns={"slow": "uniform"})
    for t in range(4):
        step(params, opt, t)
    params[1].requires_grad_(False)
    for t in range(4, 8):
        step(params, opt, t, absent=[1])
    live = [p.detach().clone() for p in params]
    model = nn.ParameterList(params)
    for name in (None, "slow", "average"):
        with opt.averaged(name):
            assert torch.equal(params[1], live[1])
            assert not torch.equal(params[0], live[0])
        exported = opt.averaged_state_dict(model, name)
        assert torch.equal(exported["1"], live[1])
        assert not torch.equal(exported["0"], live[0])
    # Frozen as a whole, for evaluation: that says nothing of what has trained. Nor do copies.
    params[0].requires_grad_(False)
    others = [Parameter(p.detach().clone(), requires_grad=False) for p in params]
    resumed = make(others, returns={"slow": "uniform"})
    resumed.load_state_dict(opt.state_dict())
    for held, o in ((params, opt), copy.deepcopy((params, opt)), (others, resumed)):
        with o.averaged():
            assert torch.equal(held[1], live[1])
            assert not torch.equal(held[0], live[0])


@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_averages_go_on_and_swap_exactly(dtype, state_dtype):
    torch.manual_seed(0)
    params = [Parameter(torch.randn(2000).to(dtype)) for _ in range(2)]
    opt = pace(params, state_dtype=state_dtype, averaging="ema:beta=0.1")
    for t in range(3):
        step(params, opt, t)
    live = params[1].detach().clone()
    distances = []
    for t in range(3, 43):
        step(params, opt, t, absent=[1])
        with opt.averaged("average"):
            distances.append((params[1] - live).float().norm().item())
        assert torch.equal(params[1], live)
    assert distances[-1] < 0.1 * distances[0]  # 0.9^39 = 0.016, and what 16 bits round


@pytest.mark.parametrize("make", MAKERS)
def test_idle_steps_are_saved(make):
    params = two()
    opt = make(params)
    for t in range(6):
        step(params, opt, t, absent=[1] if t > 2 else [])
    others = [Parameter(p.detach().clone()) for p in params]
    resumed = make(others)
    resumed.load_state_dict(opt.state_dict())
    for t in range(6, 9):
        step(params, opt, t, absent=[1] if t < 8 else [])
        step(others, resumed, t, absent=[1] if t < 8 else [])
    assert same(opt.state_dict(), resumed.state_dict())
    assert opt.state[params[1]]["idle_steps"] == 5


@pytest.mark.parametrize("make", MAKERS)
def test_frozen_parameters_of_any_dtype_are_taken(make):
    base = Parameter(torch.zeros(8, dtype=torch.uint8), requires_grad=False)
    adapter = Parameter(torch.ones(3))
    opt = make([base, adapter])
    adapter.grad = torch.ones(3)
    opt.step()
    assert base in set(opt.param_groups[0]["params"])
    assert opt.state[base] == {}
    base.grad = torch.ones(8, dtype=torch.uint8)
    before = adapter.detach().clone()
    with pytest.raises(RuntimeError, match=r"uint8.* in parameter 0 of group 0"):
        opt.step()
    assert torch.equal(adapter, before)


@pytest.mark.parametrize("start", [2**24 - 2, 2**31 - 2, 2**40])
@pytest.mark.parametrize("make", MAKERS)
def test_counts_go_on_beyond_the_whole_numbers_of_float32(make, start):
    (p,) = params = [Parameter(torch.zeros(2))]
    opt = make(params, pullback=0.0, averaging="ema:beta=0.5:every=4")
    step(params, opt, 0)
    name = "step" if make is pace else "average_step"
    opt.state[p][name].fill_(start)
    changes = []
    for t in range(8):
        before = opt.state[p]["average"].clone()
        step(params, opt, t)
        assert opt.state[p][name] == start + t + 1
        changes.append(not torch.equal(opt.state[p]["average"], before))
    assert changes == [(start + t + 1) % 4 == 0 for t in range(8)]
    # A checkpoint whose counts are float32 is read, and counts in float64 from there.
    saved = opt.state_dict()
    saved["state"][0][name] = saved["state"][0][name].float()
    opt.load_state_dict(saved)
    assert opt.state[p][name].dtype == torch.float64


def test_the_noise_of_rounding_goes_on_beyond_them():
    torch.manual_seed(0)
    (p,) = params = [Parameter(torch.full((1000,), 1.0, dtype=torch.bfloat16))]
    opt = PACE(params, lr=1e-4, weight_decay=0.0, pullback=0.0, stochastic_round=True, fused=False)
    p.grad = torch.ones_like(p)
    opt.step()
    for start in (2**24, 2**32 + 7):
        opt.state[p]["step"].fill_(start)
        p.data.fill_(1.0)
        for _ in range(60):  # each moves a coordinate with a probability of some 1/40
            p.grad = torch.ones_like(p)
            opt.step()
        assert (p != 1).float().mean() > 0.5
