"""Changes of the weights after a step: `register_projection` has averages take them in."""

import pytest
import torch
from problems import same
from torch.nn import Parameter

from paceline import PACE, Pullback
from paceline.averaging import parse

BOUND = 0.02


def pace(p, **options):
    return PACE([p], lr=0.01, **{"pullback": 0.1, **options})


def around(p, **options):
    return Pullback(torch.optim.SGD([p], lr=0.01), **{"pullback": 0.1, **options})


def run(opt, p, steps, seen=None):
    for t in range(steps):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(t)).to(p.dtype) - 1
        opt.step()
        if seen is not None:
            seen.append(p.detach().double().clone())


def weights(dtype=torch.float32, n=200):
    return Parameter(torch.randn(n, generator=torch.Generator().manual_seed(9)).to(dtype))


@pytest.mark.parametrize("rule", ["ema:kappa=0.5", "uniform", "lawa:window=3", "ema:half_life=4"])
@pytest.mark.parametrize("make", [pace, around])
def test_averages_are_of_the_projected_weights(make, rule):
    p = weights()
    opt = make(p, averaging=rule, returns={"slow": "ema:kappa=0.7"})
    opt.register_projection(lambda: p.clamp_(-BOUND, BOUND))
    seen = [p.detach().double().clone()]
    run(opt, p, 9, seen)
    assert all(x.abs().max() <= BOUND for x in seen)
    for key, of in (("average", rule), ("return_slow", "ema:kappa=0.7")):
        expected = parse(of).coefficients(9) @ torch.stack(seen)
        torch.testing.assert_close(opt.state[p][key].double(), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_that_comes_in_mid_run_holds_for_both_models(dtype, state_dtype):
    p = weights(dtype)
    opt = pace(p, state_dtype=state_dtype, returns={"slow": "uniform"})
    run(opt, p, 5)
    mask = torch.arange(200) % 10 == 0
    opt.register_projection(lambda: p.mul_(mask))
    for _ in range(2):
        live = p.detach().clone()
        assert (p[~mask] == 0).all()
        for name in opt.returns:
            with opt.averaged(name):
                assert (p[~mask] == 0).all()
                assert (p[mask] != 0).all()
            assert torch.equal(p, live)
        run(opt, p, 5)


def test_what_a_projection_leaves_alone_is_as_without_one():
    a, b = weights(), weights()
    first, second = pace(a, fused=True), pace(b, fused=True)
    run(first, a, 3)
    run(second, b, 3)
    handle = second.register_projection(lambda: None)
    assert same(first.state_dict(), second.state_dict())
    run(first, a, 3)
    run(second, b, 3)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-7)
    torch.testing.assert_close(first.state[a]["average"], second.state[b]["average"])
    handle.remove()
    moved = b.detach().clone()
    second.register_projection(lambda: b.zero_()).remove()
    assert (b == 0).all()
    assert not (moved == 0).all()


def test_a_projection_is_refused_while_the_average_is_in_the_model():
    p = weights()
    opt = pace(p)
    run(opt, p, 1)
    opt.eval()
    with pytest.raises(
        RuntimeError, match=r"register_projection\(\) was called while the averaged"
    ):
        opt.register_projection(lambda: p.zero_())


@pytest.mark.parametrize("rule", ["lawa:window=5", "bema", "uniform"])
@pytest.mark.parametrize("make", [pace, around])
def test_what_rules_keep_is_projected_too(make, rule):
    p = weights()
    opt = make(p, averaging=rule)
    run(opt, p, 6)
    mask = torch.arange(200) % 10 == 0
    opt.register_projection(lambda: p.mul_(mask))
    run(opt, p, 1)
    with opt.averaged():
        assert (p[~mask] == 0).all()


def test_averages_of_frozen_parameters_are_projected_too():
    a, b = weights(n=4), weights(n=4)
    opt = PACE([a, b], lr=0.01, pullback=0.1)
    for p in (a, b):
        p.grad = torch.ones(4)
    opt.step()
    b.requires_grad_(False)
    opt.register_projection(lambda: b.clamp_(-BOUND, BOUND))
    b.requires_grad_(True)
    with opt.averaged():
        assert b.abs().max() <= BOUND


@pytest.mark.parametrize("kind", [KeyboardInterrupt, ValueError])
def test_a_projection_that_fails_on_an_average_leaves_the_live_weights(kind):
    p = weights()
    opt = pace(p)
    run(opt, p, 3)
    live, calls = p.detach().clone(), []

    def fails():
        calls.append(1)
        if len(calls) > 1:
            raise kind

    with pytest.raises(kind):
        opt.register_projection(fails)
    assert torch.equal(p, live)
    run(opt, p, 1)
    assert len(calls) == 2


@pytest.mark.parametrize("make", [pace, around])
def test_averages_that_are_loaded_after_it_are_told_of(make):
    p = weights()
    opt = make(p)
    run(opt, p, 3)
    saved = opt.state_dict()
    mask = torch.arange(200) % 10 == 0
    opt.register_projection(lambda: p.mul_(mask))
    with pytest.warns(UserWarning, match="register the projection anew, which projects them"):
        opt.load_state_dict(saved)
    opt.register_projection(lambda: p.mul_(mask))
    with opt.averaged():
        assert (p[~mask] == 0).all()
