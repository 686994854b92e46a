"""Averages to return beside the one that the pull goes toward."""

import copy
import math

import numpy as np
import pytest
import torch
from problems import gradients, walk
from test_averaging import RULES
from torch.nn import Linear, Parameter, Sequential

from paceline import PACE, Pullback
from paceline.averaging import BEMA, EMA, LAWA, PowerEMA, Uniform

ALL = {f"r{index}": rule for index, (rule, _) in enumerate(RULES.values())}
DIRECT = {f"r{index}": direct for index, (_, direct) in enumerate(RULES.values())}
PATHS = {
    "kernel": {"fused": True},
    "together": {"fused": False},
    "measured": {"track_stats": True},
    "capturable": {"capturable": True},
}
SIMPLE = {"slow": PowerEMA(0.7), "mean": Uniform(start=3), "rare": EMA(0.5, every=3)}


def make(kind, params, **options):
    if kind == "pace":
        return PACE(params, lr=0.05, **{"pullback": 3.0, **options})
    pullback = options.pop("pullback", 3.0)
    return Pullback(torch.optim.AdamW(params, lr=0.05), pullback, **options)


KINDS = ("pace", "pullback")
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_rule_at_once_is_the_direct_computation(kind, dtype):
    torch.manual_seed(0)
    p = Parameter(torch.randn(7).to(dtype))
    opt = make(kind, [p], returns=ALL)
    iterates = [p.detach().double().numpy().copy()]
    for t in range(25):
        walk(opt, [p], t, t + 1)
        iterates.append(p.detach().double().numpy().copy())
        for name, direct in DIRECT.items():
            found = opt.state[p][f"return_{name}"]
            assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            # float32 holds it: 25 roundings of 6e-8 of weights around 1
            np.testing.assert_allclose(found, direct(iterates), atol=3e-6, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_returned_changes_nothing_else(kind):
    torch.manual_seed(0)
    start = torch.randn(9, 5)
    models = []
    for returns in (None, ALL):
        p = Parameter(start.clone())
        opt = make(kind, [p], returns=returns)
        walk(opt, [p], 0, 8)
        models.append((p, opt.state[p]["average"], opt.state[p]["exp_avg_sq"]))
    for a, b in zip(*models, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("dtype", "state"),
    [*((dtype, None) for dtype in DTYPES), *((dtype, torch.bfloat16) for dtype in DTYPES[:2])],
)
def test_every_path_takes_in_the_weights_as_stored(path, dtype, state, kernel):
    torch.manual_seed(0)
    shapes = [(64, 70), (3,), (), (0, 4), (5000,)]  # more than a block of the kernel, and none
    params = [Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    opt = PACE(
        params, lr=0.05, pullback=3.0, returns=SIMPLE, state_dtype=state,
        stochastic_round=dtype == torch.bfloat16, **PATHS[path],
    )  # fmt: skip
    expected = {name: [p.detach().double().clone() for p in params] for name in SIMPLE}
    for t in range(1, 8):
        walk(opt, params, t, t + 1)
        for name, rule in SIMPLE.items():
            for average, p in zip(expected[name], params, strict=True):
                average += rule.weight(t) * (p.detach().double() - average)
    for name, averages in expected.items():
        for average, p in zip(averages, params, strict=True):
            # some ten roundings of 6e-8 of weights up to 4
            found = opt.state[p][f"return_{name}"].double()
            torch.testing.assert_close(found, average, rtol=0, atol=4e-6)


@pytest.mark.parametrize("path", ["kernel", "together"])
def test_guarded_coordinates_stand_still(path, kernel):
    torch.manual_seed(0)
    p = Parameter(torch.randn(5000))
    opt = PACE([p], lr=0.05, pullback=3.0, returns=SIMPLE, **PATHS[path])
    walk(opt, [p], 0, 5)
    before = {name: opt.state[p][f"return_{name}"].clone() for name in SIMPLE}
    p.grad = gradients(p, 7)
    p.grad[[0, 2047, 2048, 4999]] = torch.tensor([math.nan, math.inf, -math.inf, 1e30])
    opt.step()
    for name in ("slow", "mean"):
        same = opt.state[p][f"return_{name}"] == before[name]
        assert same.nonzero().flatten().tolist() == [0, 2047, 2048, 4999]


@pytest.mark.parametrize("kind", KINDS)
def test_skipped_steps_take_nothing_in(kind):
    p = Parameter(torch.ones(4))
    opt = make(kind, [p], returns={**SIMPLE, "window": LAWA(2)}, nonfinite="skip")
    walk(opt, [p], 0, 3)
    before = copy.deepcopy(opt.state[p])
    p.grad = torch.full((4,), math.nan)
    opt.step()
    for key, value in before.items():
        assert torch.equal(opt.state[p][key], value), key


@pytest.mark.parametrize(
    ("kind", "capturable"), [("pace", False), ("pace", True), ("pullback", False)]
)
def test_a_parameter_that_joins_late_begins_then(kind, capturable):
    """Each by its own count of steps, also where that is on a device and steps come as one."""
    torch.manual_seed(0)
    early, late = Parameter(torch.randn(5)), Parameter(torch.randn(5))
    start = late.detach().clone()
    options = {"capturable": True} if capturable else {}
    opt = make(kind, [early, late], returns=SIMPLE, **options)
    walk(opt, [early], 0, 2)
    assert late not in opt.state
    expected = {name: start.clone() for name in SIMPLE}
    for t in range(1, 6):
        walk(opt, [early, late], 1 + t, 2 + t)
        for name, rule in SIMPLE.items():
            expected[name].lerp_(late.detach(), rule.weight(t))
            torch.testing.assert_close(opt.state[late][f"return_{name}"], expected[name])


@pytest.mark.parametrize("path", ["kernel", "together"])
def test_a_model_may_change_its_dtype_between_steps(path, kernel):
    """Averages go along, for steps and swaps, whether it gets wider or narrower."""
    torch.manual_seed(0)
    p = Parameter(torch.randn(4000))
    opt = PACE([p], lr=0.05, pullback=3.0, returns={**SIMPLE, "two": LAWA(2)}, **PATHS[path])
    expected = {name: p.detach().double().clone() for name in SIMPLE}
    last = []
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float32, torch.bfloat16]
    for t, dtype in enumerate(dtypes, 1):
        p.data, p.grad = p.data.to(dtype), None
        walk(opt, [p], t, t + 1)
        last = [*last[-1:], p.detach().double()]
        for name, rule in SIMPLE.items():
            expected[name].lerp_(p.detach().double(), rule.weight(t))
        live = p.detach().clone()
        for name in opt.returns:
            with opt.averaged(name):
                pass
        assert torch.equal(p, live)
        for name, average in {**expected, "two": sum(last) / len(last)}.items():
            found = opt.state[p][f"return_{name}"]
            assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            torch.testing.assert_close(found.double(), average, rtol=0, atol=4e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_rate_that_is_a_tensor(kind):
    torch.manual_seed(0)
    start, ends = torch.randn(5), []
    for rate in (0.05, torch.tensor(0.05)):
        p = Parameter(start.clone())
        opt = make(kind, [p], returns=ALL)
        opt.param_groups[0]["lr"] = rate
        walk(opt, [p], 0, 6)
        ends.append({name: opt.state[p][f"return_{name}"] for name in ALL})
    torch.testing.assert_close(*ends)


# ---- in and out ----------------------------------------------------------------------------------


def trained(kind="pace", dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = Sequential(Linear(4, 3), Linear(3, 2)).to(dtype)
    options = {"returns": {"slow": PowerEMA(0.7), "window": LAWA(2)}, **options}
    opt = make(kind, model.parameters(), **options)
    walk(opt, list(model.parameters()), 0, 6)
    return model, opt


def held(model):
    return [p.detach().clone() for p in model.parameters()]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_averages_go_in_and_out_by_name(kind, dtype):
    # LAWA's mean of two bfloat16 weights is often between two: a swap rounds those its own way.
    window = LAWA(2) if dtype == torch.float32 else LAWA(1)
    model, opt = trained(kind, dtype, returns={"slow": PowerEMA(0.7), "window": window})
    assert opt.returns == ("slow", "window", "average")
    live = held(model)
    saved = copy.deepcopy(opt.state_dict())
    of = {
        name: [opt.state[p][key].to(dtype, copy=True) for p in model.parameters()]
        for name, key in zip(opt.returns, ("return_slow", "return_window", "average"), strict=True)
    }
    assert not equal(of["slow"], of["average"])
    for first in (None, *opt.returns):
        opt.eval(first)
        assert equal(held(model), of[first or "slow"])
        for second in (None, *opt.returns):
            with opt.averaged(second):
                assert equal(held(model), of[second or "slow"])
                exported = opt.averaged_state_dict(model, first)
                assert equal(exported.values(), of[first or "slow"])
            assert equal(held(model), of[first or "slow"])
        opt.eval("average")
        assert equal(held(model), of["average"])
        opt.train()
        assert equal(held(model), live)
    for name in opt.returns:
        with pytest.raises(ZeroDivisionError), opt.averaged(name):
            raise ZeroDivisionError
        assert equal(held(model), live)
        assert equal(opt.averaged_state_dict(model, name).values(), of[name])
    assert equal(opt.averaged_state_dict(model).values(), of["slow"])
    for p, state in zip(model.parameters(), saved["state"].values(), strict=True):
        for key, value in state.items():
            assert torch.equal(opt.state[p][key], value), key
    with pytest.raises(ValueError, match="one of slow, window, average, got 'fast'"):
        opt.eval("fast")


def test_beside_state_in_bfloat16():
    model, opt = trained(returns=SIMPLE, state_dtype=torch.bfloat16)
    live = held(model)
    for p in model.parameters():
        assert opt.state[p]["offset"].dtype == torch.bfloat16
        assert opt.state[p]["return_slow"].dtype == torch.float32
    of = {}
    for name in ("slow", "average", "mean"):
        opt.eval(name)
        of[name] = held(model)
    assert equal(of["slow"], opt.averaged_state_dict(model, "slow").values())
    assert equal(of["average"], opt.averaged_state_dict(model, "average").values())
    opt.train()
    assert equal(held(model), live)


@pytest.mark.parametrize("kind", KINDS)
def test_groups_return_their_own(kind):
    a, b, c = (Parameter(torch.ones(3)) for _ in range(3))
    groups = [
        {"params": [a], "return_kappa": 0.9},
        {"params": [b], "returns": {"mean": "uniform", "slow": "ema:kappa=0.8"}},
        {"params": [c]},
    ]
    opt = make(kind, groups, pullback=0.0)
    assert all("return_kappa" not in group for group in opt.param_groups)  # it has become returns
    assert [group["returns"] for group in opt.param_groups] == [
        *("returned=ema:kappa=0.9", "mean=uniform,slow=ema:kappa=0.8", None),
    ]
    assert opt.returns == ("returned", "mean", "slow", "average")
    walk(opt, [a, b, c], 0, 4)
    for name, keys in {
        None: ("return_returned", "return_mean", "average"),
        "slow": ("average", "return_slow", "average"),
    }.items():
        expected = [opt.state[p][key].clone() for p, key in zip((a, b, c), keys, strict=True)]
        with opt.averaged(name):
            assert equal([a, b, c], expected)


def test_a_group_that_is_added_while_swapped():
    model, opt = trained()
    live = held(model)
    extra = Parameter(torch.ones(2))
    with opt.averaged("window"):
        opt.add_param_group({"params": [extra]})
        with opt.averaged("slow"):
            assert equal([extra], [torch.ones(2)])
    assert equal(held(model), live)
    walk(opt, [*model.parameters(), extra], 6, 8)
    assert "return_slow" in opt.state[extra]


# ---- saved and changed ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "state"), [("pace", None), ("pace", torch.bfloat16), ("pullback", None)]
)
@pytest.mark.parametrize("inside", [None, "slow", "window", "average"])
def test_resume_is_bit_for_bit(kind, state, inside, tmp_path):
    options = {"state_dtype": state} if state else {}
    model, opt = trained(kind, **options)
    if inside:
        opt.eval(inside)
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, tmp_path / "run.pt")
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    other = Sequential(Linear(4, 3), Linear(3, 2))
    resumed = make(
        kind, other.parameters(), returns={"slow": "ema", "window": "lawa:window=2"}, **options
    )
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["opt"])
    assert resumed.returns == opt.returns
    for o, m in ((opt, model), (resumed, other)):
        o.train()
        walk(o, list(m.parameters()), 6, 9)
    for name in opt.returns:
        theirs, mine = (
            opt.averaged_state_dict(model, name),
            resumed.averaged_state_dict(other, name),
        )
        assert equal(theirs.values(), mine.values())
    assert equal(held(model), held(other))


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_without_them_is_a_start(kind):
    model, opt = trained(kind, returns=None)
    saved = opt.state_dict()
    live = held(model)
    resumed = make(kind, model.parameters(), return_kappa=0.7)
    resumed.load_state_dict(saved)
    assert resumed.returns == ("average",)  # the checkpoint's options count
    for group in resumed.param_groups:
        group["returns"] = "slow=ema:kappa=0.7"
    with resumed.averaged():  # not there yet: its own
        assert (
            equal(held(model), [resumed.state[p]["average"] for p in model.parameters()]) is False
        )
    walk(resumed, list(model.parameters()), 6, 7)
    weight = PowerEMA(0.7).weight(7)
    for p, before in zip(model.parameters(), live, strict=True):
        torch.testing.assert_close(resumed.state[p]["return_slow"], before.lerp(p.detach(), weight))


@pytest.mark.parametrize("kind", KINDS)
def test_they_may_change_between_steps(kind):
    model, opt = trained(kind)
    params = list(model.parameters())
    for returns, keys in {
        "slow=ema:kappa=0.7": {"return_slow"},
        "slow=bema": {"return_slow", "return_slow_ema", "return_slow_initial"},
        "other=ema:kappa=0.7,slow=lawa:window=1": {
            *("return_other", "return_slow", "return_slow_snapshot_0"),
        },
        None: set(),
    }.items():
        for group in opt.param_groups:
            group["returns"] = returns
        walk(opt, params, 6, 8)
        for p in params:
            assert {key for key in opt.state[p] if key.startswith("return_")} == keys


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("key", ["return_slow", "return_window", "return_window_snapshot_1"])
def test_a_checkpoint_that_lacks_one_is_refused(kind, key):
    _, opt = trained(kind)
    saved = copy.deepcopy(opt.state_dict())
    del saved["state"][2][key]
    with pytest.raises(ValueError, match=rf"parameter 2 .* lacks \['{key}'\]"):
        opt.load_state_dict(saved)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("before", "now"), [(torch.float32, torch.float64), (torch.float64, torch.float32)]
)
def test_a_checkpoint_of_another_dtype_swaps_and_steps(kind, before, now):
    model, opt = trained(kind, before)
    other, resumed = trained(kind, now)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(opt.state_dict())
    live = held(other)
    for name in resumed.returns:
        with resumed.averaged(name):
            theirs = opt.averaged_state_dict(model, name).values()
            for p, average in zip(other.parameters(), theirs, strict=True):
                torch.testing.assert_close(p.detach(), average.to(now))
    assert equal(held(other), live)
    for o, m in ((opt, model), (resumed, other)):
        walk(o, list(m.parameters()), 6, 7)
    for name in resumed.returns:
        mine = resumed.averaged_state_dict(other, name)
        for key, average in opt.averaged_state_dict(model, name).items():
            # other gradients, for they are drawn in float32 and LAWA's snapshots are exact
            torch.testing.assert_close(mine[key], average.to(now), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("given", [PowerEMA(0.7), "ema:kappa=0.7", {"returned": "ema:kappa=0.7"}])
def test_they_may_be_set_in_any_form_and_are_saved_as_text(kind, given):
    model, opt = trained(kind)
    for group in opt.param_groups:
        group["returns"] = given
    walk(opt, list(model.parameters()), 6, 7)
    assert opt.returns == ("returned", "average")
    saved = opt.state_dict()
    assert saved["param_groups"][0]["returns"] == "returned=ema:kappa=0.7"
    opt.load_state_dict(saved)
    assert opt.returns == ("returned", "average")


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_swapped_to_what_is_not_there_are_refused(kind):
    _, opt = trained(kind, returns=None)
    opt.eval()
    saved = opt.state_dict()
    for group in saved["param_groups"]:
        group["swapped"] = "torch.float32@slow*4"
    with pytest.raises(ValueError, match="had its average 'slow' swapped in, and lacks that"):
        opt.load_state_dict(saved)


BAD = [
    ({"return_kappa": 1.5}, r"return_kappa must be in \[0, 1\], got 1.5"),
    ({"return_kappa": 0.5, "returns": "uniform"}, "returns must be left out with return_kappa"),
    ({"returns": 0.7}, "returns must be an average"),
    ({"returns": {}}, "returns must be an average"),
    ({"returns": {"slow": 0.7}}, "returns must be an average"),
    ({"returns": "swift"}, "unknown average 'swift'"),
    ({"returns": "slow=swift"}, "unknown average 'swift'"),
    ({"returns": "slow=ema,junk"}, "unknown average ''"),
    ({"returns": {"a_b": "ema"}}, "letters and digits"),
    ({"returns": {"a=b": "ema"}}, "letters and digits"),
    ({"returns": {3: "ema"}}, "letters and digits"),
    ({"returns": {"average": "ema"}}, "letters and digits, not 'average' or 'live', got 'average'"),
    ({"returns": {"live": "ema"}}, "got 'live'"),
    ({"returns": "a=ema,a=uniform"}, "each name once"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("options", "says"), BAD)
def test_bad_options(kind, options, says):
    with pytest.raises(ValueError, match=says):
        make(kind, [Parameter(torch.ones(2))], **options)


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_says_it_one_way(kind):
    group = {"params": [Parameter(torch.ones(2))], "return_kappa": 0.5, "returns": "uniform"}
    with pytest.raises(ValueError, match="returns must be left out with return_kappa"):
        make(kind, [group])
    opt = make(kind, [Parameter(torch.ones(2))], returns="uniform")
    opt.add_param_group({"params": [Parameter(torch.ones(2))], "return_kappa": 0.5})
    assert opt.param_groups[1]["returns"] == "returned=ema:kappa=0.5"
    with pytest.raises(ValueError, match="returns must be left out with return_kappa"):
        opt.add_param_group({**group, "params": [Parameter(torch.ones(2))]})
    assert len(opt.param_groups) == 2


def test_what_they_do_not_go_with():
    with pytest.raises(ValueError, match="returns='returned=bema:.*' needs capturable left out"):
        PACE([Parameter(torch.ones(2))], pullback=0, capturable=True, returns=BEMA())
