"""The plan of a step: kept between steps, and made anew once anything about it has changed."""

import copy
import weakref

import pytest
import torch
from problems import same
from torch.nn import Parameter

from paceline import PACE, optimizer

SHAPES = [(40, 30), (7,), (), (64, 3)]


def made(**options):
    torch.manual_seed(0)
    params = [Parameter(torch.randn(shape)) for shape in SHAPES]
    return params, PACE(params, lr=0.05, **{"pullback": 3.0, "fused": True, **options})


def give(params, t):
    for i, p in enumerate(params):
        seeded = torch.Generator().manual_seed(100 * t + i)
        p.grad = torch.randn(p.shape, generator=seeded).to(p.dtype)


def held(params, opt):
    return [[p.detach().clone(), copy.deepcopy(dict(opt.state[p]))] for p in params]


@pytest.fixture
def plans(monkeypatch):
    """How many plans were made."""
    count, plan = [], optimizer.Plan

    def counted(*arguments):
        count.append(1)
        return plan(*arguments)

    monkeypatch.setattr(optimizer, "Plan", counted)
    return count


def freeze(params, opt):
    params[1].requires_grad_(False)
    params[1].grad = None


def add_a_group(params, opt):
    late = Parameter(torch.ones(9, 4))
    opt.add_param_group({"params": [late], "lr": 0.01})
    params.append(late)


def set_option(name, value):
    def change(params, opt):
        opt.param_groups[0][name] = value

    return change


def load(params, opt):
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))


def replace_state(params, opt):
    opt.state[params[0]]["exp_avg"] = opt.state[params[0]]["exp_avg"].clone()


def replace_all_state(params, opt):
    opt.state[params[0]] = {k: v.clone() for k, v in opt.state[params[0]].items()}


def move(params, opt):
    params[0].data = params[0].data.clone()


def move_state(params, opt):
    average = opt.state[params[0]]["average"]
    average.data = average.data.clone()


def transpose(params, opt):
    params[0].data = params[0].data.t().contiguous().t()


def count(params, opt):
    opt.state[params[1]]["step"].fill_(9)


def swap_parameter(params, opt):
    fresh = Parameter(params[3].detach().clone())
    opt.state[fresh] = opt.state.pop(params[3])
    opt.param_groups[0]["params"][3] = params[3] = fresh


CHANGES = {
    "a parameter frozen": freeze,
    "a group added": add_a_group,
    "the average": set_option("averaging", "uniform"),
    "an average more": set_option("returns", "slow=ema:kappa=0.8"),
    "the kernel": set_option("fused", False),
    "narrow state": set_option("state_dtype", torch.bfloat16),
    "a state loaded": load,
    "a state's tensor replaced": replace_state,
    "a state replaced": replace_all_state,
    "a parameter moved": move,
    "a state moved": move_state,
    "other strides": lambda params, opt: (set_option("fused", None)(params, opt),
                                          transpose(params, opt)),
    "a count": count,
    "a parameter replaced": swap_parameter,
}  # fmt: skip
KEPT = {
    "nothing": lambda params, opt: None,
    "the rate": set_option("lr", 0.001),
    "the pull": set_option("pullback", 0.5),
    "no pull": set_option("pullback", 0.0),
    "the decay": set_option("weight_decay", 0.5),
    "the clip": set_option("clip", False),
    "a uniform gain": lambda params, opt: (set_option("pullback", 0.5)(params, opt),
                                           set_option("gain", "scalar")(params, opt)),
    "the betas": set_option("betas", (0.5, 0.9)),
    "a gradient elsewhere": lambda params, opt: None,
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES | KEPT)
def test_a_change_between_steps_is_noticed(change, plans, kernel):
    """An optimizer that has never kept a plan, made from copies, takes the same step."""
    params, opt = made()
    for t in range(3):
        give(params, t)
        opt.step()
    assert len(plans) == 1
    give(params, 3)
    (CHANGES | KEPT)[change](params, opt)
    fresh, again = copy.deepcopy((params, opt))  # without plans: they are not copied
    for p, q in zip(params, fresh, strict=True):
        q.grad = None if p.grad is None else p.grad.clone()
    assert not again._plans
    plans.clear()
    opt.step()
    assert bool(plans) == (change in CHANGES)
    again.step()
    assert same(held(params, opt), held(fresh, again))


def test_the_plan_holds_no_gradient(kernel):
    """Setting gradients to None frees them."""
    params, opt = made()
    give(params, 0)
    address = params[0].grad.data_ptr()
    opt.step()
    opt.zero_grad()
    grabbed = [torch.empty(40, 30) for _ in range(1)]
    tensors = [x for plan in opt._plans.values() for x in plan.tensors]
    assert address not in {x.data_ptr() for x in tensors}
    del grabbed


@pytest.mark.parametrize("fused", [True, False])
def test_a_kept_plan_steps_as_one_made_at_each_step(fused, kernel):
    ends = []
    for keeps in (True, False):
        params, opt = made(fused=fused, state_dtype=torch.bfloat16, returns="uniform")
        for t in range(6):
            give(params, t)
            if not keeps:
                opt._plans = {}
            opt.step()
        ends.append(held(params, opt))
    assert same(*ends)


def test_loading_frees_the_state_of_before(kernel):
    params, opt = made()
    give(params, 0)
    opt.step()
    before = weakref.ref(opt.state[params[0]]["exp_avg"])
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert before() is None
