"""What is changed about tensors between steps is refused by name before a step writes to memory."""

import copy

import pytest
import torch
from problems import same
from torch.nn import Parameter

from paceline import PACE, Pullback

FUSED = [None, True, False]


def made(fused, n=600):
    params = [Parameter(torch.ones(n, n - 20)), Parameter(torch.ones(7))]
    opt = PACE(params, lr=0.1, pullback=0.1, fused=fused, returns="uniform")
    give(params)
    opt.step()
    give(params)
    return params, opt


def give(params):
    for p in params:
        p.grad = torch.ones_like(p)


def grow(p, state):
    p.data = torch.ones(700, 700)


def shrink(p, state):
    p.data = torch.ones(3, 3)


def turn(p, state):
    p.data = p.data.t().contiguous()


def flatten(p, state):
    p.data = p.data.view(-1)


def free(p, state):
    p.untyped_storage().resize_(0)


def free_the_gradient(p, state):
    p.grad.untyped_storage().resize_(0)


def cut_the_gradient(p, state):
    p.grad.untyped_storage().resize_(64)


def shorten(key):
    def change(p, state):
        state[key] = torch.ones(3)

    return change


def free_state(key):
    def change(p, state):
        state[key].untyped_storage().resize_(16)

    return change


def turn_state(p, state):
    state["exp_avg"].data = state["exp_avg"].data.t().contiguous()


CHANGES = {
    "grown": (grow, "shape"),
    "shrunk": (shrink, "shape"),
    "transposed": (turn, "shape"),
    "flattened": (flatten, "shape"),
    "freed": (free, "freed"),
    "gradient freed": (free_the_gradient, "gradient has been freed"),
    "gradient cut": (cut_the_gradient, "gradient has been freed"),
    "m short": (shorten("exp_avg"), r"exp_avg has shape \(3,\)"),
    "v short": (shorten("exp_avg_sq"), r"exp_avg_sq has shape \(3,\)"),
    "average short": (shorten("average"), r"average has shape \(3,\)"),
    "another average short": (shorten("return_returned"), r"return_returned has shape \(3,\)"),
    "m freed": (free_state("exp_avg"), "exp_avg has been freed"),
    "average freed": (free_state("average"), "average has been freed"),
    "m transposed": (turn_state, "exp_avg has shape"),
}


@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize("change", CHANGES)
def test_tensors_that_do_not_go_together_are_refused(change, fused, kernel):
    params, opt = made(fused)
    do, message = CHANGES[change]
    before = copy.deepcopy((params[1].detach(), dict(opt.state[params[1]])))
    do(params[0], opt.state[params[0]])
    with pytest.raises(RuntimeError, match=rf"^parameter 0 of group 0 .*cannot step.*{message}"):
        opt.step()
    assert same((params[1].detach(), dict(opt.state[params[1]])), before)


def one_storage(params):
    params[0].data = params[1].data = torch.ones(6, 4)


def overlapping(params):
    both = torch.ones(40)
    params[0].data, params[1].data = both[:24].view(6, 4), both[16:].view(6, 4)


def tied_by_data(params):
    square = torch.ones(5, 5)
    params[0].data, params[1].data = square, square.t()


@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize("tie", [one_storage, overlapping, tied_by_data])
def test_parameters_that_share_memory_are_refused(tie, fused, kernel):
    params = [Parameter(torch.ones(6, 4)) for _ in range(2)]
    opt = PACE([{"params": params[:1]}, {"params": params[1:]}], pullback=0.1, fused=fused)
    tie(params)
    give(params)
    if tie is tied_by_data and fused:  # which takes contiguous tensors
        opt.param_groups[1]["fused"] = False
    with pytest.raises(RuntimeError, match="parameter 0 of group . .* and .* share memory"):
        opt.step()
    assert all((p == 1).all() for p in params)


def test_views_of_one_storage_that_do_not_overlap_step(kernel):
    flat = torch.ones(30)
    params = [Parameter(flat[:12].view(3, 4)), Parameter(flat[12:]), Parameter(flat[30:])]
    opt = PACE(params, lr=0.1, pullback=0.1, fused=True)
    give(params)
    opt.step()
    assert (flat < 1).all()


@pytest.mark.parametrize("name", ["lr", "weight_decay", "eps", "pullback"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, None, "auto?"])
def test_an_option_set_out_of_its_range_between_steps_is_refused(name, value):
    params, opt = made(None, n=30)
    before = copy.deepcopy(dict(opt.state[params[0]]))
    opt.param_groups[0][name] = value
    says = "a finite number >= 0|given with gain='adam'"
    with pytest.raises(ValueError, match=f"{name} must be ({says})"):
        opt.step()
    assert same(dict(opt.state[params[0]]), before)


@pytest.mark.parametrize("betas", [(float("nan"), 0.9), (0.9, 1.0), (0.9,), None])
def test_betas_set_out_of_their_range_between_steps_are_refused(betas):
    params, opt = made(None, n=30)
    opt.param_groups[0]["betas"] = betas
    with pytest.raises(ValueError, match=r"betas must be two numbers in \[0, 1\), got"):
        opt.step()
    assert opt.state[params[0]]["step"] == 1


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_no_epsilon_and_no_gradient_make_no_nan(dtype, fused, kernel):
    p = Parameter(torch.linspace(-1, 1, 8).to(dtype))
    opt = PACE([p], lr=0.1, eps=0.0, weight_decay=0.0, pullback=0.1, fused=fused)
    for t in range(3):
        p.grad = torch.where(torch.arange(8) < 4, 0.0, 1.0 + t).to(dtype)
        opt.step()
    assert torch.equal(p[:4], torch.linspace(-1, 1, 8).to(dtype)[:4])
    assert p.isfinite().all()
    assert (p[4:] < torch.linspace(-1, 1, 8).to(dtype)[4:]).all()


def to_bfloat16(key):
    return lambda s: s.__setitem__(key, s[key].bfloat16())


def other_bits(key):
    def change(state):
        state[key].data = state[key].data.view(torch.int32)

    return change


@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "average", "return_returned"])
def test_state_of_another_dtype_is_cast_back(key, fused, kernel):
    ends = []
    for change in (lambda state: None, to_bfloat16(key)):
        params, opt = made(fused)
        change(opt.state[params[0]])
        opt.step()
        assert opt.state[params[0]][key].dtype == torch.float32
        ends.append(params[0].detach().clone())
    torch.testing.assert_close(*ends, rtol=0, atol=1e-3)


@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "average"])
@pytest.mark.parametrize(
    "change",
    [
        lambda s, key: s.__setitem__(key, s[key].to(torch.int8)),
        lambda s, key: s.__setitem__(key, s[key].to("meta")),
        lambda s, key: s.__setitem__(key, torch._neg_view(s[key])),
        lambda s, key: other_bits(key)(s),
    ],
    ids=["int8", "meta", "negative", "bits"],
)
def test_state_of_another_kind_is_refused(change, key, fused, kernel):
    params, opt = made(fused)
    change(opt.state[params[0]], key)
    with pytest.raises(RuntimeError, match=rf"^parameter 0 .* cannot step: its {key} is "):
        opt.step()
    assert opt.state[params[1]]["step"] == 1


@pytest.mark.parametrize("fused", [None, False])
def test_a_gradient_that_is_a_negative_view_descends(fused, kernel):
    params, opt = made(fused)
    before = params[0].detach().clone()
    params[0].grad = torch._neg_view(-torch.ones_like(params[0]))
    opt.step()
    assert (params[0] < before).all()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda w: w[:, :3], lambda w: w[:, 1:]),
        (lambda w: w[:, 0], lambda w: w[2]),
        (lambda w: w[0, :1].expand(4), lambda w: w[1]),
    ],
)
def test_strided_parameters_that_share_memory_are_refused(one, other):
    w = torch.ones(4, 4)
    params = [Parameter(one(w)), Parameter(other(w))]
    opt = PACE(params, pullback=0.1)
    give(params)
    with pytest.raises(RuntimeError, match="share memory; nothing was changed"):
        opt.step()
    assert (w == 1).all()


def test_strided_parameters_side_by_side_step():
    w = torch.ones(4, 4)
    params = [Parameter(w[:, :2]), Parameter(w[:, 2:])]
    opt = PACE(params, lr=0.1, pullback=0.1)
    give(params)
    opt.step()
    assert (w < 1).all()


@pytest.mark.parametrize("name", ["gain", "clip", "maximize", "seed", "nonfinite", "averaging"])
def test_any_option_set_out_of_its_range_between_steps_is_refused(name):
    params, opt = made(None, n=30)
    opt.param_groups[0][name] = "rase"
    with pytest.raises(ValueError, match=f"{name} must be|unknown average .rase"):
        opt.step()
    assert opt.state[params[0]]["step"] == 1


def test_a_dtype_of_state_may_be_set_by_its_name():
    params, opt = made(None, n=30)
    opt.param_groups[0]["state_dtype"] = "bfloat16"
    opt.step()
    assert opt.state[params[0]]["exp_avg"].dtype == torch.bfloat16


class Named(Parameter):
    """As libraries have them, which keep a note beside the weights."""


@pytest.mark.parametrize("make", [PACE, lambda ps, **o: Pullback(torch.optim.AdamW(ps), **o)])
@pytest.mark.parametrize("kind", ["a subclass of Parameter", "without an address"])
def test_parameters_that_adamw_steps(make, kind, monkeypatch):
    """A subclass of Parameter, whose state is plain; a device without addresses, as TPUs."""
    if kind == "without an address":
        monkeypatch.setattr(torch.Tensor, "data_ptr", lambda x: 0)
    params = [(Named if kind != "without an address" else Parameter)(torch.ones(4)) for _ in "ab"]
    opt = make(params, pullback=0.1)
    for _ in range(2):
        give(params)
        opt.step()
    before = [p.tolist() for p in params]
    with opt.averaged():
        assert all(p.tolist() != x for p, x in zip(params, before, strict=True))
    assert [p.tolist() for p in params] == before
