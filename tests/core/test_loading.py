"""Saved state: resumed exactly, and refused with a reason where it does not fit."""

import copy
import io
import pickle

import pytest
import torch
from problems import RETURNS, advance, assert_same, problem, same, snapshot
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

from paceline import PACE, Pullback
from paceline.averaging import parse

# ---- state_dict ------------------------------------------------------------------------------


@pytest.mark.parametrize("averaging", [None, "lawa:window=3:every=2", "bema:start=2"])
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_resume_is_bit_for_bit(dtype, swapped, averaging):
    model, generator = problem(dtype)
    opt = PACE(model.parameters(), lr=0.05, pullback=0.3, averaging=averaging)
    advance(model, opt, generator, 7)
    if swapped:
        opt.eval()
    file = io.BytesIO()
    torch.save(
        {"model": model.state_dict(), "opt": opt.state_dict(), "rng": generator.get_state()}, file
    )
    opt.train()
    advance(model, opt, generator, 7)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    model2, generator2 = problem(dtype, seed=9)
    opt2 = PACE(model2.parameters(), lr=1.0, pullback=9.0)
    model2.load_state_dict(saved["model"])
    opt2.load_state_dict(saved["opt"])
    generator2.set_state(saved["rng"])
    assert opt2.param_groups[0]["pullback"] == 0.3
    if swapped:
        with pytest.raises(RuntimeError, match="averaged"):
            opt2.step()
    opt2.train()
    advance(model2, opt2, generator2, 7)
    assert_same(snapshot(model2, opt2), snapshot(model, opt))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for name, value in opt2.state[model2[0].weight].items():
        exact = "snapshot" in name or "initial" in name  # the parameter's own bits
        count = name in ("step", "idle_steps")
        assert value.dtype == (torch.float64 if count else dtype if exact else wide)


@pytest.mark.parametrize("averaging", ["lawa:window=2", "bema"])
@pytest.mark.parametrize(
    ("before", "now"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
    ],
)
def test_a_model_goes_on_in_another_dtype(before, now, averaging):
    """What the average is made of holds the weights exactly in that one, too."""
    model, generator = problem(before)
    opt = PACE(model.parameters(), lr=0.05, pullback=0.3, averaging=averaging)
    advance(model, opt, generator, 3)
    other, generator = problem(now)
    resumed = PACE(other.parameters(), lr=0.05, pullback=0.3)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(opt.state_dict())
    advance(other, resumed, generator, 1)
    state, weight = resumed.state[other[0].weight], other[0].weight.detach()
    if averaging == "bema":
        begun = opt.state[model[0].weight]
        ema = begun["average_ema"] + 14**-0.5 * (weight - begun["average_ema"])
        expected = ema + 14**-0.2 * (weight - begun["average_initial"])
    else:
        assert torch.equal(state["average_snapshot_1"], weight)  # of step 4
        expected = (weight + model[0].weight.detach()) / 2
    torch.testing.assert_close(state["average"], expected.to(now), atol=1e-6, rtol=1e-6)


def test_another_rule_in_mid_run_begins_anew_and_is_saved():
    model, generator = problem()
    opt = PACE(model.parameters(), lr=0.05, pullback=0.3, averaging="lawa:window=4")
    advance(model, opt, generator, 6)
    for text in ("lawa:window=2", "bema", "uniform"):
        opt.param_groups[0]["averaging"] = text
        advance(model, opt, generator, 2)
        other, _ = problem(seed=1)
        resumed = PACE(other.parameters(), pullback=0.0)
        resumed.load_state_dict(opt.state_dict())
        assert parse(resumed.param_groups[0]["averaging"]) == parse(text)
        keeps = {f"average_{name}" for name in parse(text).keeps}
        assert resumed.state[other[0].weight].keys() - {"average"} >= keeps
        assert len(resumed.state[other[0].weight]) == 5 + len(keeps)


def test_loaded_state_is_a_copy_and_stats_are_not_the_old_ones():
    model, generator = problem()
    opt = PACE(model.parameters(), lr=0.05, pullback=0.3, track_stats=True)
    advance(model, opt, generator, 3)
    other = copy.deepcopy(model)
    opt2 = PACE(other.parameters(), lr=0.05, pullback=0.3)
    opt2.load_state_dict(opt.state_dict())
    before = snapshot(other, opt2)
    advance(model, opt, generator, 2)
    opt.eval()
    assert_same(snapshot(other, opt2), before)
    opt.load_state_dict(opt2.state_dict())
    assert "gain_mean" not in opt.stats()


def test_loading_sees_what_the_users_hooks_made_of_it():
    model, generator = problem(torch.bfloat16)
    opt = PACE(model.parameters(), pullback=0.1)
    advance(model, opt, generator, 2)

    def set_averages(_, state_dict):
        states = {
            i: {**s, "average": torch.full_like(s["average"], 1 + 2**-20)}
            for i, s in state_dict["state"].items()
        }
        return {**state_dict, "state": states}

    seen = []
    opt.register_load_state_dict_pre_hook(set_averages)
    opt.register_load_state_dict_post_hook(
        lambda opt: seen.append(opt.state[model[0].weight]["average"].dtype)
    )
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert (opt.state[model[0].weight]["average"] == 1 + 2**-20).all()
    assert seen == [torch.float32]


@pytest.mark.parametrize("returns", [None, RETURNS])
@pytest.mark.parametrize("swapped", [False, True])
def test_pickling_and_deepcopy(swapped, returns):
    model, generator = problem()
    opt = PACE(model.parameters(), lr=0.05, pullback=0.3, returns=returns, track_stats=True)
    advance(model, opt, generator, 3)
    live = snapshot(model, opt)
    if swapped:
        opt.eval(opt.returns[:2][-1])
    copies = [copy.deepcopy((model, opt)), pickle.loads(pickle.dumps((model, opt)))]
    at, before = generator.get_state(), snapshot(model, opt)
    opt.train()
    advance(model, opt, generator, 2)
    for other_model, other in copies:
        assert_same(snapshot(other_model, other), before)
        assert "gain_mean" not in other.stats()
        assert other.swapped == swapped
        other.train()
        assert_same(snapshot(other_model, other), live)
        again = torch.Generator()
        again.set_state(at)
        advance(other_model, other, again, 2)
        assert_same(snapshot(other_model, other), snapshot(model, opt))
        assert other.stats() == opt.stats()


@pytest.mark.parametrize(
    "copied", [lambda x: x, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_state_that_was_asked_for_before_the_first_step_is_not_yet_an_average(copied):
    model, generator = problem()
    opt = PACE(model.parameters(), lr=0.05, pullback=0.3)
    state = get_optimizer_state_dict(model, opt)["state"]
    assert {float(x["step"]) for x in state.values()} == {0.0}
    model, opt = copied((model, opt))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    weights = copy.deepcopy(model.state_dict())
    assert same(dict(opt.averaged_state_dict(model)), dict(weights))
    with opt.averaged():
        assert same(dict(model.state_dict()), dict(weights))
    other, again = problem()
    other.load_state_dict(weights)
    fresh = PACE(other.parameters(), lr=0.05, pullback=0.3)
    advance(model, opt, generator, 2)
    advance(other, fresh, again, 2)
    assert_same(snapshot(model, opt), snapshot(other, fresh))


FORMS = [
    {},
    {"state_dtype": torch.bfloat16, "stochastic_round": True},
    {"averaging": "lawa:window=2"},
    {"averaging": "bema"},
    {"returns": {**RETURNS, "window": "lawa:window=2"}},
]

WAYS = [
    {"full_state_dict": True},
    {"cpu_offload": True},
    {"full_state_dict": True, "cpu_offload": True},
]


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("way", [*WAYS, {"flatten_optimizer_state_dict": True}], ids=str)
def test_distributed_checkpoints_of_each_form_resume(way, form, swapped):
    """What torch's engine takes: of each option the same kind of value, swapped or not."""
    options = StateDictOptions(**way)
    model, generator = problem()
    opt = PACE(model.parameters(), lr=0.05, pullback=0.3, **form)
    advance(model, opt, generator, 3)
    live = snapshot(model, opt)
    if swapped:
        opt.eval(opt.returns[:2][-1])  # of several not the one that needs no name
    states = copy.deepcopy(get_state_dict(model, opt, options=options))
    other, stream = problem(seed=1)
    resumed = PACE(other.parameters(), lr=0.05, pullback=0.3, **form)
    set_state_dict(
        other,
        resumed,
        model_state_dict=states[0],
        optim_state_dict=states[1],
        options=options,
    )
    assert resumed.swapped == swapped
    assert_same(snapshot(other, resumed), snapshot(model, opt))
    stream.set_state(generator.get_state())
    for net, optimizer, data in ((model, opt, generator), (other, resumed, stream)):
        optimizer.train()
        assert_same(snapshot(net, optimizer), live)
        advance(net, optimizer, data, 2)
    assert_same(snapshot(other, resumed), snapshot(model, opt))


# ---- what does not fit -----------------------------------------------------------------------


def named(model, **options):
    return PACE(model.named_parameters(), **{"lr": 0.05, "pullback": 0.3, **options})


def broken(kind):
    """A checkpoint of `problem()` after three steps, with one thing wrong."""
    model, generator = problem()
    if kind == "another class":
        opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    elif kind == "sgd":
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
    elif kind == "adam":
        opt = torch.optim.Adam(model.parameters(), lr=0.1, weight_decay=0.1)
    elif kind == "radam":
        opt = torch.optim.RAdam(model.parameters(), lr=0.1)
    elif kind == "amsgrad":
        opt = torch.optim.AdamW(model.parameters(), lr=0.1, amsgrad=True)
    else:
        opt = named(model)
    advance(model, opt, generator, 3)
    saved = copy.deepcopy(opt.state_dict())
    state, group = saved["state"].get(2), saved["param_groups"][0]
    if kind == "no moment":
        del state["exp_avg_sq"]
    elif kind == "no average":
        del state["average"]
    elif kind == "average and offset":
        state["offset"] = state["average"].bfloat16()
    elif kind == "extra":
        state["return_slow"] = state["average"]
    elif kind == "misshapen":
        state["average"] = torch.zeros(1)  # would broadcast
    elif kind == "integers":
        state["exp_avg"] = state["exp_avg"].int()
    elif kind == "not a tensor":
        state["exp_avg"] = {}
    elif kind == "many steps":
        state["step"] = torch.ones(5)
    elif kind == "of nobody":
        saved["state"][17] = state
    elif kind == "sizes":
        group["params"].pop()
    elif kind == "groups":
        saved["param_groups"].append(group)
    elif kind == "option":
        group["averaging"] = "ema:every=0"
    elif kind == "no snapshots":
        group["averaging"] = "lawa:window=2"
    elif kind == "swapped without":
        group["swapped"] = "torch.float32*6"
        del saved["state"][2]
    return saved


WRONG = {
    "another class": r"group 0 of the checkpoint is neither PACE's nor .*AdamW's, it has \['damp",
    "sgd": r"group 0 of the checkpoint is neither PACE's nor .*AdamW's, it has \['dampening', ",
    "adam": r"group 0 of the checkpoint is neither PACE's nor torch.optim.AdamW's",
    "radam": r"group 0 of the checkpoint is neither PACE's nor torch.optim.AdamW's",
    "amsgrad": r"group 0 of the checkpoint is of AdamW with amsgrad",
    "no moment": r"'1.weight' of shape \(5,\) cannot be loaded: its state lacks \['exp_avg_sq'\]",
    "no average": r"'1.weight' .* must have 'average' or 'offset', got \[\]",
    "average and offset": r"'1.weight' .* got \['average', 'offset'\]",
    "extra": r"'1.weight' .* \['return_slow'\], which its averages are not made of",
    "misshapen": r"'1.weight' of shape \(5,\) cannot be loaded: its 'average' has shape \(1,\)",
    "integers": r"'1.weight' .* 'exp_avg' must be a floating-point tensor, got torch.int32",
    "not a tensor": r"'1.weight' .* 'exp_avg' must be a floating-point tensor, got dict",
    "many steps": r"'1.weight' .* 'step' must be one number, got shape \(5,\)",
    "of nobody": "the checkpoint has state for 17, which is in none of its groups",
    "sizes": r"groups have \[5\] parameters, the optimizer's \[6\]",
    "groups": r"groups have \[6, 6\] parameters, the optimizer's \[6\]",
    "option": "averaging 'ema:every=0': every of ema must be >= 1, got 0",
    "no snapshots": r"'0.weight' .* lacks \['average_snapshot_0', 'average_snapshot_1'\], which",
    "swapped without": "'1.weight' .* has no state for it, but had its average swapped in",
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_checkpoint_that_does_not_fit_is_refused_and_nothing_changes(kind):
    model, generator = problem(seed=4)
    opt = named(model, lr=0.07)
    advance(model, opt, generator, 2)
    before = snapshot(model, opt), copy.deepcopy(opt.state_dict()["param_groups"])
    with pytest.raises(ValueError, match=WRONG[kind]):
        opt.load_state_dict(broken(kind))
    assert_same(snapshot(model, opt), before[0])
    assert opt.state_dict()["param_groups"] == before[1]


def pair(order, prefix="", **options):
    """An optimizer of two named parameters after a step, in an order."""
    values = {"a": torch.zeros(2), "b": torch.full((2,), 9.0)}
    params = {name: torch.nn.Parameter(values[name]) for name in order}
    opt = PACE([(prefix + name, p) for name, p in params.items()], pullback=0.1, **options)
    for p in params.values():
        p.grad = torch.ones(2)
    opt.step()
    return opt, params


def test_names_in_another_order_are_refused_and_wrappers_are_not_another_name():
    opt, _ = pair("ab")
    other, params = pair("ba", lr=0.5)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match="0 of group 0 is 'a' in the checkpoint and 'b' in the op"):
        other.load_state_dict(opt.state_dict())
    assert same(other.state_dict(), before)
    wrapped, params = pair("ab", "module._orig_mod.", lr=0.5)
    wrapped.load_state_dict(opt.state_dict())
    assert wrapped.param_groups[0]["param_names"] == ["module._orig_mod.a", "module._orig_mod.b"]
    assert (wrapped.state[params["b"]]["average"] > 5).all()


def test_states_that_torch_orders_by_name_load_in_any_order():
    (opt, saved), (other, params) = pair("ab"), pair("ba", lr=0.5)
    old, new = torch.nn.ParameterDict(saved), torch.nn.ParameterDict(params)
    state = copy.deepcopy(get_optimizer_state_dict(old, opt))
    set_optimizer_state_dict(new, other, state)
    assert same(other.state[params["b"]]["average"], opt.state[saved["b"]]["average"])
    assert other.param_groups[0]["param_names"] == ["b", "a"]


NAN, INF, BELOW = float("nan"), float("inf"), torch.full((5,), -1e-9)
RUBBISH = {
    "no state": (("state",), "del", "'state' of the checkpoint must be a dict, got None"),
    "state": (("state",), [1], r"'state' of the checkpoint must be a dict, got \[1\]"),
    "groups": (("param_groups",), {}, "'param_groups' of the checkpoint must be a list, got {}"),
    "group": (("param_groups", 0), "x", "group 0 of the checkpoint must be a dict, got 'x'"),
    "no params": (("param_groups", 0, "params"), "del", "'params' of group 0 of .* got None"),
    "params": (("param_groups", 0, "params"), "012345", "'params' of group 0 of .* got '012345'"),
    "unhashable": (("param_groups", 0, "params", 0), [0], r"'params' of group 0 .* got \[\[0\]"),
    "twice": (("param_groups", 0, "params", 0), 1, "a parameter twice in its groups"),
    "names": (("param_groups", 0, "param_names"), ["a"], "'param_names' of group 0 .* 6 names"),
    "record": (("param_groups", 0, "swapped"), [1], r"swapped=\[1\] cannot be loaded"),
    "record's": (
        ("param_groups", 0, "swapped"),
        "what",
        "swapped='what' cannot be loaded: invalid",
    ),
    "dtype": (("param_groups", 0, "swapped"), "a.b*6", r"swapped='a.b\*6' .* it names no dtype"),
    "betas": (("param_groups", 0, "betas"), [[], 1], "betas must be two numbers"),
    "lr": (("param_groups", 0, "lr"), torch.ones(9, 9), "lr must be a finite number"),
    **{
        f"{key} {value}": (("state", 2, key), BELOW + 1 + value, f"'1.weight' .* its {key!r} is no")
        for key in ("exp_avg", "exp_avg_sq", "average")
        for value in (NAN, INF, torch.tensor([1e300], dtype=torch.float64))
    },
    "own": (("state", 2), None, "the state of 2 of the checkpoint must be a dict of names, got"),
    "list": (("state", 2), [1], "the state of 2 of the checkpoint must be a dict of names, got"),
    "keys": (("state", 2, 5), 1, "the state of 2 of the checkpoint must be a dict of names, got"),
    **{
        f"step {x!r:.20}": (("state", 2, "step"), x, rf"'1.weight' .* its 'step' must be .*{says}")
        for x, says in (
            *((-5, "got -5"), (NAN, "got nan"), (2.5, "got 2.5"), (None, "got None")),
            *(("3", "got '3'"), ([3], r"got \[3\]"), ({}, "got {}"), (True, "got True")),
            *((torch.tensor(NAN), "got nan"), (torch.tensor(-5.0), "got -5"), (10**400, "got 10")),
            *(
                (torch.tensor(0.5), "got 0.5"),
                (torch.tensor(1j), "got "),
                (float("inf"), "got inf"),
            ),
            *((1e300, "got 1e.300"), (2.0**53, r"< 2\*\*53, got 9007199254740992")),
            (torch.tensor(True), r"got tensor\(True\)"),
        )
    },
    "no data": (("state", 2, "step"), torch.ones((), device="meta"), "'1.weight' .* cannot be"),
    "negative": (("state", 2, "exp_avg_sq"), BELOW, "'1.weight' .* 'exp_avg_sq' must not be neg"),
    "meta": (("state", 2, "average"), BELOW.to("meta"), "its 'average' must be in memory as"),
    "sparse": (("state", 2, "exp_avg"), BELOW.to_sparse(), "its 'exp_avg' must be in memory as"),
    "complex": (("state", 2, "exp_avg"), BELOW + 0j, "'exp_avg' must be a floating-point tensor"),
}


@pytest.mark.parametrize("kind", RUBBISH)
def test_rubbish_is_refused_by_name_and_nothing_changes(kind):
    keys, value, message = RUBBISH[kind]
    saved = place = broken("nothing")
    for key in keys[:-1]:
        place = place[key]
    if isinstance(value, str) and value == "del":
        del place[keys[-1]]
    else:
        place[keys[-1]] = value
    model, generator = problem(seed=4)
    opt = named(model, lr=0.07)
    advance(model, opt, generator, 2)
    before = snapshot(model, opt), copy.deepcopy(opt.state_dict()["param_groups"])
    with pytest.raises(ValueError, match=message) as error:
        opt.load_state_dict(saved)
    assert len(str(error.value).splitlines()) == 1
    assert_same(snapshot(model, opt), before[0])
    assert opt.state_dict()["param_groups"] == before[1]


def test_a_run_that_steps_with_nan_goes_on_with_a_warning():
    opt, params = pair("ab", nonfinite="ignore", returns={"slow": "ema:kappa=0.9"})
    params["b"].grad = torch.tensor([1.0, NAN])
    opt.step()
    fresh, own = pair("ab")
    with pytest.warns(UserWarning, match="not finite: 'average' of .* 'b' .*, 'exp_avg' of"):
        fresh.load_state_dict(opt.state_dict())
    assert fresh.state[own["b"]]["return_slow"].isnan().tolist() == [False, True]


BASE = {"lr": -1, "weight_decay": INF, "eps": torch.ones(1), "betas": torch.ones(9, 9)}
BASE |= {"foreach": torch.ones(9, 9), "fused": "yes", "lr tensor": torch.tensor(True)}


@pytest.mark.parametrize("option", BASE)
def test_options_that_torch_would_refuse_are_refused_for_a_base(option):
    params = [torch.nn.Parameter(torch.ones(2))]
    opt = Pullback(torch.optim.AdamW(params, lr=0.1), pullback=0.1)
    saved = copy.deepcopy(opt.state_dict())
    name = option.split()[0]
    saved["param_groups"][0][name] = BASE[option]
    with pytest.raises(ValueError, match=f"{name} must be ") as error:
        opt.load_state_dict(saved)
    assert "\n" not in str(error.value)
    assert opt.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("kind", [float, int, torch.float64, torch.int64, torch.float32])
def test_a_count_is_read_by_its_value(kind):
    saved = broken("nothing")
    for state in saved["state"].values():
        state["step"] = torch.tensor(3, dtype=kind) if isinstance(kind, torch.dtype) else kind(3)
    model, _ = problem()
    opt = named(model)
    opt.load_state_dict(saved)
    assert {int(opt.state[p]["step"]) for p in model.parameters()} == {3}


def test_parameters_without_state_and_options_left_out_are_no_fault():
    saved = broken("nothing")
    del saved["state"][2], saved["param_groups"][0]["clip"]
    saved["param_groups"][0]["swapped"] = None  # as it was said once
    model, generator = problem()
    opt = named(model, clip=False)
    opt.load_state_dict(saved)
    assert opt.param_groups[0]["clip"] is False
    advance(model, opt, generator, 1)
    assert [int(opt.state[p]["step"]) for p in model.parameters()] == [4, 4, 1, 4, 4, 4]


# ---- from torch.optim.AdamW ------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}, {"maximize": True}])
def test_a_checkpoint_of_adamw_is_a_start(options):
    model, generator = problem()
    adamw = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.2, **options)
    schedule = torch.optim.lr_scheduler.LinearLR(adamw, 1.0, 0.1, 20)
    advance(model, adamw, generator, 3)
    schedule.step()
    rate = adamw.param_groups[0]["lr"]
    other, _ = problem(seed=3)
    opt = PACE(other.parameters(), lr=9.0, pullback=0.0, kappa=0.4, fused=False)
    with pytest.warns(UserWarning, match=r"keeps no averages.*AdamW.*begin from the weights"):
        opt.load_state_dict(adamw.state_dict())
    group = opt.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (rate, 0.2)
    assert group["averaging"] == "ema:kappa=0.4"
    assert (group["fused"], {"foreach", "amsgrad"} & group.keys()) == (False, set())
    assert group["initial_lr"] == 0.05
    # The model comes after the optimizer: averages begin from the weights of the next step.
    other.load_state_dict(model.state_dict())
    start = [p.detach().clone() for p in other.parameters()]
    saved = opt.state_dict()
    again, _ = problem(seed=3)
    resumed = PACE(again.parameters(), pullback=0.0)
    with pytest.warns(UserWarning, match="keeps no averages"):
        resumed.load_state_dict(copy.deepcopy(saved))
    again.load_state_dict(model.state_dict())
    at = generator.get_state()
    ends = []
    for net, optimizer in ((model, adamw), (other, opt), (again, resumed)):
        generator.set_state(at)
        advance(net, optimizer, generator, 1)
        ends.append(list(net.parameters()))
    weight = 5.0**-0.4  # the fourth step's
    for p, q, r, first in zip(*ends, start, strict=True):
        torch.testing.assert_close(q, p, atol=1e-6, rtol=1e-6)
        assert torch.equal(q, r)
        average = first + weight * (q.detach() - first)
        torch.testing.assert_close(opt.state[q]["average"], average, atol=1e-6, rtol=1e-6)
        assert torch.equal(opt.state[q]["average"], resumed.state[r]["average"])


# ---- what other tools put in -----------------------------------------------------------------


def test_state_of_another_tool_is_carried_along_with_a_warning():
    model, generator = problem()
    opt = PACE(model.parameters(), lr=0.05, pullback=0.3)
    advance(model, opt, generator, 3)
    mask = torch.ones(5, 6, dtype=torch.float64)
    opt.state[model[0].weight] |= {"mask": mask, "visits": 3}
    opt.state["tool"] = {"scale": torch.tensor(0.5)}
    saved = copy.deepcopy(opt.state_dict())
    other, _ = problem()
    resumed = PACE(other.parameters(), pullback=0.3)
    other.load_state_dict(model.state_dict())
    says = "state has 'tool', 'mask', 'visits' of another tool; it is carried along"
    with pytest.warns(UserWarning, match=says):
        resumed.load_state_dict(saved)
    assert resumed.state["tool"]["scale"] == 0.5
    assert resumed.state[other[0].weight]["visits"] == 3
    at = generator.get_state()
    for m, o in ((model, opt), (other, resumed)):
        generator.set_state(at)
        advance(m, o, generator, 2)
        with o.averaged():
            pass
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True)
    )
    again = resumed.state_dict()
    assert again["state"][0]["visits"] == 3
    assert torch.equal(again["state"][0]["mask"], mask.to(again["state"][0]["mask"].dtype))
    assert again["state"]["tool"]["scale"] == 0.5


def test_a_wrapper_that_keeps_state_of_its_own_resumes():
    """pytorch_optimizer's TRAC, around PACE as around AdamW."""
    wrappers = pytest.importorskip("pytorch_optimizer")
    ends = []
    for breaks in (False, True):
        model, generator = problem()
        opt = wrappers.TRAC(PACE(model.parameters(), lr=0.05, pullback=0.3))
        advance(model, opt, generator, 3)
        if breaks:
            saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
            model, _ = problem(seed=1)
            opt = wrappers.TRAC(PACE(model.parameters(), lr=0.05, pullback=0.3))
            model.load_state_dict(saved[0])
            with pytest.warns(UserWarning, match="state has 'trac' of another tool"):
                opt.load_state_dict(saved[1])
        advance(model, opt, generator, 3)
        ends.append(snapshot(model, opt))
    assert_same(*ends)
