"""Checkpoints of Pullback: resumed, and refused where they do not fit."""

import copy
import functools

import pytest
import torch
import torch.distributed.checkpoint as dcp
from problems import same
from pulled import (
    AVERAGE,
    BASES,
    OWN,
    STEP,
    adamw,
    assert_one,
    go,
    held,
    net,
    params_of,
    sgd,
    train,
)
from torch import optim
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from paceline import PACE, Pullback
from paceline.averaging import BEMA, Uniform

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
    "steps below 0": (put(STEP, -1), "'second' .* 'average_step' must be a whole number >= 0"),
    "no steps": (put(STEP, None), "'second' .* 'average_step' must be a whole number >= 0"),
    "the base's steps": (put("step", float("nan")), "'second' .* its 'step' must be a whole"),
    "a negative moment": (put(OWN, -torch.ones(3)), "'pullback_exp_avg_sq' must not be negative"),
    "the base's moment": (put("exp_avg_sq", -torch.ones(3)), "'exp_avg_sq' must not be negative"),
    "no dict": (lambda x: x["state"].update({1: [1]}), "the state of 1 of the checkpoint must be"),
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


OF_ADAM = {
    "no count": (without("step"), r"'second' .* its state lacks \['step'\]"),
    "no moment": (without("exp_avg"), r"'second' .* its state lacks \['exp_avg'\]"),
    "a list": (put("exp_avg", [0.0] * 3), "'exp_avg' must be a floating-point tensor, got list"),
    "a shape": (put("exp_avg", torch.ones(1)), r"its 'exp_avg' has shape \(1,\)"),
    "a count": (put("step", torch.tensor(0.5)), "'step' must be a whole number >= 0 .* got 0.5"),
    "lr": (lambda x: x["param_groups"][0].update(lr="x"), "lr must be as 0.1, got 'x'"),
    "betas": (lambda x: x["param_groups"][0].update(betas=[0.9]), r"betas must be as \(0.9, 0"),
    "amsgrad": (
        lambda x: x["param_groups"][0].update(amsgrad=3),
        "amsgrad must be as False, got 3",
    ),
}


@pytest.mark.parametrize("name", OF_ADAM)
def test_state_of_adam_that_could_not_step(name):
    change, message = OF_ADAM[name]
    params = params_of((4, 3), (3,))
    opt = Pullback(adamw(zip(("first", "second"), params, strict=True), lr=0.1), pullback=0.1)
    go(params, opt, 2)
    state = copy.deepcopy(opt.state_dict())
    change(state)
    before = held(params, opt)
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(state)
    assert same(held(params, opt), before)
    assert_one(opt)


def test_options_that_a_base_lacks_stay():
    params = params_of((4, 3), (3,))
    opt = Pullback(adamw(params, lr=0.1), pullback=0.1)
    go(params, opt, 1)
    state = copy.deepcopy(opt.state_dict())
    del state["param_groups"][0]["eps"]
    state["param_groups"][0]["foreach"] = False
    opt.param_groups[0]["eps"] = 0.5
    opt.load_state_dict(state)
    assert [opt.param_groups[0][name] for name in ("eps", "foreach")] == [0.5, False]
    go(params, opt, 1)


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
