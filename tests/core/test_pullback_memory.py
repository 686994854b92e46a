"""Pullback: what does not go together in memory or in its options is refused before the base."""

import pytest
import torch
from pulled import adamw, give, params_of, sgd
from torch.nn import Parameter

from paceline import Pullback

BASES = [sgd, adamw]


def made(base, **options):
    params = params_of((4, 4), (3,))
    opt = Pullback(base(params), **options)
    give(params, 0)
    opt.step()
    give(params, 1)
    return params, opt


def freed(p, state):
    state["average"].untyped_storage().resize_(0)


def aliased(p, state):
    state["average"] = p.data


def broadcast(p, state):
    p.data = torch.ones(1)


def reshaped(p, state):
    p.data = torch.ones(8, 4)


def whole_numbers(p, state):
    state["average"] = state["average"].long()


@pytest.mark.parametrize("pullback", [0.0, 0.1])
@pytest.mark.parametrize("change", [freed, aliased, broadcast, reshaped, whole_numbers])
@pytest.mark.parametrize("base", BASES)
def test_a_step_that_memory_does_not_allow_is_refused_before_the_base_moves(base, change, pullback):
    params, opt = made(base, pullback=pullback)
    change(params[0], opt.state[params[0]])
    before = params[1].detach().clone()
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 0 .*nothing was changed"):
        opt.step()
    assert torch.equal(params[1], before)
    assert opt.state[params[0]]["average_step"] == 1


def test_parameters_that_share_memory_are_refused():
    w = torch.ones(4)
    params = [Parameter(w), Parameter(w[1:])]
    opt = Pullback(sgd(params))
    give(params, 0)
    with pytest.raises(RuntimeError, match="share memory; nothing was changed"):
        opt.step()
    assert (w == 1).all()


def test_an_average_of_another_dtype_is_cast_back():
    params, opt = made(sgd)
    opt.state[params[0]]["average"] = opt.state[params[0]]["average"].bfloat16()
    opt.step()
    assert opt.state[params[0]]["average"].dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gain_eps", float("nan")),
        ("gain_beta2", 2.0),
        ("gain", "adm"),
        ("gain_clip", "no"),
        ("pullback", -1.0),
        ("nonfinite", "rase"),
        ("lr", float("nan")),
    ],
)
@pytest.mark.parametrize("base", BASES)
def test_an_option_set_out_of_its_range_between_steps_is_refused(base, name, value):
    params, opt = made(base, pullback=0.1)
    before = params[0].detach().clone()
    opt.param_groups[0][name] = value
    with pytest.raises(ValueError, match=rf"{name} must be "):
        opt.step()
    assert torch.equal(params[0], before)


@pytest.mark.parametrize("base", BASES)
def test_no_epsilon_no_gradient_and_no_rate_make_no_nan(base):
    params = params_of((4,))
    opt = Pullback(base(params, lr=0.0), pullback=0.1, gain_eps=0.0)
    for _ in range(2):
        params[0].grad = torch.zeros(4)
        opt.step()
    assert params[0].isfinite().all()
    with pytest.raises(ValueError, match="gain_clip=False needs gain_eps > 0"):
        Pullback(base(params), pullback=0.1, gain_eps=0.0, gain_clip=False)
