"""A pull that sets itself: one gain for all its coordinates, from what a step puts at stake."""

import copy
import math
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from gains import FAST, LARGE, SLOW
from problems import gradients, walk
from reference import Reference
from torch.nn import Parameter

from paceline import PACE, Pullback, auto, optimizer, state
from paceline.auto import root_sums

FAST_TEXT, SLOW_TEXT = "ema:kappa=0.3", "returned=ema:kappa=0.6"


def weights(params):
    return [p.detach().clone() for p in params]


def starts(*shapes):
    torch.manual_seed(0)
    return [torch.randn(shape) for shape in shapes]


# ---- the rule ------------------------------------------------------------------------------------


# Of every form the largest error of weights up to 5: float32's is some 30 roundings of 2e-7.
# bfloat16 weights differ by a last place, 2^-6 there, where float32 and float64 round to two sides;
# bfloat16 state is off by some of its own 2^-8 at each step.
FORMS = {
    "together": (torch.float32, {"fused": False}, 1e-5),
    "kernel": (torch.float32, {"fused": True}, 1e-5),
    "measured": (torch.float32, {"track_stats": True}, 1e-5),
    "capturable": (torch.float32, {"capturable": True}, 1e-5),
    "no clip": (torch.float32, {"clip": False}, 1e-5),
    "scalar gain": (torch.float32, {"gain": "scalar"}, 1e-5),
    "float64": (torch.float64, {}, 1e-12),
    "float64 kernel": (torch.float64, {"fused": True}, 1e-12),
    "bfloat16": (torch.bfloat16, {}, 2**-5),
    "bfloat16 kernel": (torch.bfloat16, {"fused": True}, 2**-5),
    "bfloat16 state": (torch.float32, {"state_dtype": torch.bfloat16}, 0.04),
}


def gain_at(stake):
    """Half of what is above half a nat, and at most 1."""
    return min(1.0, max(0.0, (float(stake) - 0.5) / 2))


def gain_of(rates, references):
    """λ of the step to come, from references of those parameters that have a gradient at it."""
    stake = sum(
        lr * np.sqrt(r.v / (1 - r.betas[1] ** r.t)).sum()
        for lr, r in zip(rates, references, strict=True)
        if r.t
    )
    return gain_at(stake)


@pytest.mark.parametrize("form", FORMS)
def test_the_rule(form, kernel):
    dtype, options, close = FORMS[form]
    # Two groups of other rates and β2, whose stakes add up, and one that is not pulled.
    own = [{}, {"lr": 0.02, "betas": (0.8, 0.9)}, {"pullback": 0.0}]
    params = [Parameter(x.to(dtype)) for x in starts((4, 5), (3,), (7,), (), (6,))]
    members = [params[:2], params[2:4], params[4:]]
    groups = [{"params": p, **o} for p, o in zip(members, own, strict=True)]
    opt = PACE(groups, lr=0.05, pullback="auto", **options)
    wide = dtype != torch.bfloat16
    rounded = np.asarray if wide else lambda x: torch.tensor(x).bfloat16().double().numpy()
    references = {
        p: Reference(
            p.detach().double().numpy(), betas=group["betas"], pullback=0.0, gain="scalar",
            ema_power=FAST, store=rounded,
        )
        for group in opt.param_groups
        for p in group["params"]
    }  # fmt: skip
    returned = {p: r.theta.copy() for p, r in references.items()}
    gains = []
    for t in range(30):
        for group, peak in zip(opt.param_groups, (0.05, 0.02, 0.05), strict=True):
            group["lr"] = peak * (1.1 - math.cos(t / 4))  # up to where the gain is 1, and down
        for i, p in enumerate(params):
            # One comes late, another misses steps: neither is at stake at a step without gradient.
            absent = (i == 1 and t < 5) or (i == 2 and t % 4 == 1)
            p.grad = None if absent else gradients(p, 100 * t + i)
        opt.step()
        stepped = [(g, p) for g in opt.param_groups for p in g["params"] if p.grad is not None]
        pulled = [(g["lr"], references[p]) for g, p in stepped if g["pullback"] == "auto"]
        gains.append(gain_of(*zip(*pulled, strict=True)))
        for group, p in stepped:
            r = references[p]
            r.c = gains[-1] if group["pullback"] == "auto" else 0.0
            r.step(p.grad.double().numpy(), group["lr"])
        for p, r in references.items():
            if p.grad is None and r.t:
                r.rest()
            returned[p] += (1 + r.t + r.idle) ** -SLOW * (r.theta - returned[p])
            np.testing.assert_allclose(p.detach().double(), r.theta, atol=close, rtol=0)
    assert gains[0] == 0.0  # nothing is known of the gradients yet
    assert max(gains) == 1.0
    assert 0 < sorted(gains)[len(gains) // 2] < 0.5  # and it was between for long enough
    with opt.averaged():
        for p, average in returned.items():
            np.testing.assert_allclose(p.detach().double(), average, atol=close, rtol=0)
    with opt.averaged("average"):
        for p, r in references.items():
            np.testing.assert_allclose(p.detach().double(), r.ema, atol=close, rtol=0)


def test_parameters_of_all_dtypes_are_at_stake_together():
    """float32, 64 and 16 bits: each has the gain that all of them make."""
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    params = [Parameter(torch.ones(8, dtype=dtype)) for dtype in dtypes]
    opt = PACE(params, lr=0.05, pullback="auto", track_stats=True)
    for _ in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
        opt.step()
    found = opt.stats()
    expected = gain_at(0.05 * 32)
    # float32's own error of squares and roots of 1
    assert found["gain_min"] == pytest.approx(expected, rel=1e-5)
    assert found["gain_max"] == pytest.approx(expected, rel=1e-5)


def test_the_layout_in_memory_does_not_matter():
    (start,) = starts((300, 4, 8, 8))  # a large one, of which some are looked at
    ends = []
    for layout in (torch.contiguous_format, torch.channels_last):
        p = Parameter(start.clone(memory_format=layout))
        opt = PACE([p], lr=2.5e-5, pullback="auto", track_stats=True)
        walk(opt, [p], 0, 3)
        ends.append((opt.stats()["gain_mean"], p.detach().contiguous()))
    assert 0 < ends[0][0] < 1
    torch.testing.assert_close(*ends)


def test_parameters_without_elements_and_groups_without_parameters():
    p, none = Parameter(torch.ones(4)), Parameter(torch.ones(0, 3))
    opt = PACE([{"params": []}, {"params": [none, p]}], lr=0.2, pullback="auto", track_stats=True)
    for _ in range(2):
        p.grad, none.grad = torch.ones_like(p), torch.ones_like(none)
        opt.step()
    assert opt.stats()["gain_max"] == pytest.approx(gain_at(0.8))


@pytest.mark.parametrize("form", [float, torch.tensor])
def test_any_stake_gives_a_gain(form):
    stakes = {0.0: 0.0, 0.5: 0.0, 1.0: 0.25, 2.5: 1.0, 3.0: 1.0, 1e308: 1.0, math.inf: 1.0}
    for stake, gain in stakes.items():
        value = form(stake) if form is float else torch.tensor(stake, dtype=torch.float64)
        assert float(auto.gain(value)) == gain
    # A NaN, with nonfinite="ignore", is not to go from one parameter into all.
    assert float(auto.gain(form(math.nan))) == 0.0


def test_up_to_half_a_nat_it_is_an_ema_of_adamw():
    params, others = ([Parameter(x) for x in starts((6, 4), (5,))] for _ in range(2))
    opt = PACE(params, lr=0.01, pullback="auto", track_stats=True)  # at stake: 0.01 · 29 · 0.8
    alike = PACE(others, lr=0.01, pullback=0.0, kappa=FAST, return_kappa=SLOW, track_stats=True)
    for t in range(5):
        walk(opt, params, t, t + 1)
        walk(alike, others, t, t + 1)
        assert opt.stats()["gain_max"] == 0
    for p, q in zip(params, others, strict=True):
        assert all(torch.equal(opt.state[p][key], alike.state[q][key]) for key in opt.state[p])
        assert torch.equal(p, q)


def test_a_quarter_of_the_stake_is_what_noise_costs():
    """Where weights have settled in a quadratic, of whatever curvatures and noise."""
    torch.manual_seed(0)
    curvature = torch.logspace(-1, 0, 32)
    noise = torch.rand(32) + 0.5
    p = Parameter(torch.zeros(200, 32))
    opt = PACE([p], lr=0.02, pullback=0.0, weight_decay=0.0)
    losses = []
    for step in range(2000):
        p.grad = curvature * p.detach() + noise * torch.randn(p.shape)
        opt.step()
        if step >= 1000:
            losses.append(float((curvature * p.detach().square()).sum(1).mean()) / 2)
    stake = 0.02 * float(opt.state[p]["exp_avg_sq"].sqrt().sum(1).mean()) / (1 - 0.999**2000) ** 0.5
    # 200 runs of 32 coordinates, over 2 times the memory of each or more: good to 2 %; to first
    # order in η·curvature/noise, up to 0.03, and v has the curvature's part besides.
    assert sum(losses) / len(losses) == pytest.approx(stake / 4, rel=0.05)


# ---- large tensors -------------------------------------------------------------------------------


def test_of_a_large_tensor_every_251st_element_is_looked_at():
    (v,) = starts((2 * LARGE,))
    v = v.square()
    for size, step in ((LARGE - 1, 1), (LARGE, 251), (2 * LARGE, 251)):
        (found,) = root_sums([v[:size]], [0], [size])
        expected = step * v[:size:step].double().sqrt().sum()
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    # The standard error of 523 draws of |N(0, 1)| is 3.3 % of their mean.
    torch.testing.assert_close(found, v.sqrt().sum(), rtol=0.1, atol=0)
    (looked_at,) = root_sums([v.view(256, 512)], [0], [v.numel()])
    torch.testing.assert_close(looked_at, found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_shards_of_rows_add_up_to_the_whole(dtype):
    rows, columns = 700, 100
    v = starts((rows, columns))[0].square().to(dtype)
    (whole,) = root_sums([v], [0], [v.numel()])
    assert whole.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    ends = [0, 1, 2, 350, 699, 700, 700]  # parts of a row and of none among them
    parts = [v[a:b] for a, b in pairwise(ends)]
    sums = root_sums(parts, [columns * a for a in ends[:-1]], [v.numel()] * len(parts))
    # sums of 279 numbers in another order
    torch.testing.assert_close(torch.stack(sums).sum(), whole, rtol=1e-5, atol=0)


def test_a_large_parameter_is_pulled_by_its_estimate():
    p, small = Parameter(torch.zeros(256, 257)), Parameter(torch.zeros(3))
    opt = PACE([p, small], lr=2e-5, pullback="auto", track_stats=True)
    p.grad, small.grad = gradients(p, 0), torch.full((3,), 1000.0)
    first = p.grad.flatten()
    for _ in range(2):
        opt.step()
    stake = 2e-5 * (251 * first[::251].abs().double().sum() + 3000.0)
    assert opt.stats()["gain_mean"] == pytest.approx(gain_at(stake), rel=1e-4)


# ---- saved and changed ---------------------------------------------------------------------------


def trained(**options):
    params = [Parameter(x) for x in starts((6, 4), (5,))]
    opt = PACE(params, lr=0.03, **{"pullback": "auto", **options})
    walk(opt, params, 0, 5)
    return params, opt


@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("inside", [None, "returned", "average"])
def test_resume_is_bit_for_bit(state_dtype, inside, tmp_path):
    params, opt = trained(state_dtype=state_dtype)
    if inside:
        opt.eval(inside)
    saved = {"params": weights(params), "opt": opt.state_dict()}
    torch.save(saved, tmp_path / "run.pt")
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    group = saved["opt"]["param_groups"][0]
    assert (group["pullback"], group["averaging"], group["returns"]) == (
        "auto",
        FAST_TEXT,
        SLOW_TEXT,
    )
    own = {"step", "idle_steps", "exp_avg", "exp_avg_sq", "offset" if state_dtype else "average"}
    assert saved["opt"]["state"][0].keys() == own | {"return_returned"}  # nothing new is kept
    others = [Parameter(x) for x in saved["params"]]
    resumed = PACE(others, lr=9.0, pullback=1.0)
    resumed.load_state_dict(saved["opt"])
    copied_params, copied = copy.deepcopy((params, opt))
    runs = ((opt, params), (resumed, others), (copied, copied_params))
    for o, p in runs:
        o.train()
        walk(o, p, 5, 8)
    for o, p in runs[1:]:
        for mine, theirs in zip(p, params, strict=True):
            assert torch.equal(mine, theirs)
            for key, value in opt.state[theirs].items():
                assert torch.equal(o.state[mine][key], value), key


def test_it_may_be_turned_on_and_off_between_steps():
    """From a step on the gain is what an optimizer that was so from the start has."""
    params, opt = trained(pullback=0.1, kappa=FAST, track_stats=True)
    (group,) = opt.param_groups
    for pullback in ("auto", 0.1, "auto"):
        stake = 0.03 * sum(
            (opt.state[p]["exp_avg_sq"] / (1 - 0.999 ** opt.state[p]["step"].double())).sqrt().sum()
            for p in params
        )
        group["pullback"] = pullback
        t = int(opt.state[params[0]]["step"])
        walk(opt, params, t, t + 1)
        found = opt.stats()
        if pullback == "auto":
            assert found["gain_min"] == found["gain_max"]
            assert found["gain_mean"] == pytest.approx(gain_at(stake), rel=1e-5)
        else:
            assert found["gain_min"] < found["gain_max"]


def test_a_misspelt_one_that_was_set_between_steps_does_not_pass_for_it():
    params, opt = trained()
    opt.param_groups[0]["pullback"] = "Auto"
    before = weights(params)
    with pytest.raises((TypeError, ValueError)):
        walk(opt, params, 5, 6)
    assert all(torch.equal(p, x) for p, x in zip(params, before, strict=True))


def test_checkpoints_of_other_optimizers():
    params, opt = trained(pullback=0.1)
    resumed = PACE(params, pullback="auto")
    resumed.load_state_dict(opt.state_dict())  # the checkpoint's options count
    (group,) = resumed.param_groups
    assert (group["pullback"], group["averaging"], group["returns"]) == (0.1, "ema:kappa=0.5", None)

    adamw = torch.optim.AdamW(params, lr=0.03)
    walk(adamw, params, 5, 6)
    resumed = PACE(params, pullback="auto", track_stats=True)
    with pytest.warns(UserWarning, match="keeps no averages"):
        resumed.load_state_dict(adamw.state_dict())
    walk(resumed, params, 6, 7)
    (group,) = resumed.param_groups
    assert (group["pullback"], group["averaging"], group["returns"]) == (
        "auto",
        FAST_TEXT,
        SLOW_TEXT,
    )
    assert resumed.stats()["gain_mean"] > 0  # from the moments that were taken over


@pytest.mark.parametrize("capturable", [False, True])
def test_a_first_step_that_failed_can_be_taken_again(capturable, monkeypatch):
    """State of step 0 is there then, as after a lack of memory for the next parameter's."""
    runs = []
    for fails in (False, True):
        params = [Parameter(x) for x in starts((5,), (3,), (4,))]
        opt = PACE(params, lr=0.2, pullback="auto", capturable=capturable, track_stats=True)
        walk(opt, params[:1], 0, 2)
        if fails:
            with monkeypatch.context() as patch:
                ensure = state.ensure

                def short_of_memory(made, p, *rest, ensure=ensure, last=params[2]):
                    if p is last:
                        raise torch.OutOfMemoryError
                    ensure(made, p, *rest)

                patch.setattr(optimizer, "ensure", short_of_memory)
                with pytest.raises(torch.OutOfMemoryError):
                    walk(opt, params, 2, 3)
            assert opt.state[params[1]]["step"] == 0
        walk(opt, params, 2, 4)
        assert opt.stats()["gain_mean"] > 0
        runs.append(params)
    assert all(torch.equal(p, q) for p, q in zip(*runs, strict=True))


# ---- rates and faults ----------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"capturable": True}, {"lr": torch.tensor(0.03)}], ids=str)
def test_counts_and_rates_as_tensors(options):
    """The gain comes from scalars of float64 either way, as the rest of the step does."""
    params, others = ([Parameter(x) for x in starts((6, 4), (5,))] for _ in range(2))
    opts = [PACE(params, lr=0.03, pullback="auto", track_stats=True)]
    opts += [PACE(others, **{"lr": 0.03} | options, pullback="auto", track_stats=True)]
    for t in range(5):
        found = []
        for opt, p in zip(opts, (params, others), strict=True):
            walk(opt, p, t, t + 1)
            found.append(opt.stats()["gain_mean"])
        # a few roundings of float32; a bias correction in float32 would be 1e-5 off
        assert found[1] == pytest.approx(found[0], rel=1e-6)
        for p, q in zip(params, others, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"capturable": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("nonfinite", ["guard", "skip"])
def test_gradients_that_are_not_finite_do_not_spoil_the_stake(nonfinite, options, kernel):
    params, others = ([Parameter(x) for x in starts((6, 4), (5,))] for _ in range(2))
    options = options | {"track_stats": not options.get("fused")}
    opt = PACE(params, lr=0.03, pullback="auto", nonfinite=nonfinite, **options)
    alike = PACE(others, lr=0.03, pullback="auto", **options)
    for t in range(8):
        if t in (0, 3, 4):  # also at the first step
            for p in params:
                p.grad = gradients(p, t)
            params[0].grad[2, 1] = (math.nan, 0, 0, math.inf, 1e30)[t]
            before = params[0].detach().clone()
            opt.step()
            assert params[0][2, 1] == before[2, 1]
        if nonfinite == "skip" or t not in (0, 3, 4):
            walk(opt, params, t, t + 1)
            walk(alike, others, t, t + 1)
            if t and options["track_stats"]:
                assert 0 < opt.stats()["gain_mean"] < 1
        assert all(p.isfinite().all() for p in params)
        if nonfinite == "skip":  # as if those steps had not been
            assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))
    with opt.averaged():
        assert all(p.isfinite().all() for p in params)


def test_a_closure_may_make_the_gradients():
    params, others = ([Parameter(x) for x in starts((6, 4), (5,))] for _ in range(2))
    one, two = (PACE(p, lr=0.03, pullback="auto") for p in (params, others))
    for t in range(4):
        walk(one, params, t, t + 1)

        def closure(t=t):
            for i, p in enumerate(others):
                p.grad = gradients(p, 100 * t + i)
            return 1.0

        two.step(closure)
        two.zero_grad()
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


# ---- options -------------------------------------------------------------------------------------


DEFAULTS = [  # what is said; averaging and returns of the group
    ({}, (FAST_TEXT, "returned=ema:kappa=0.7")),
    ({"kappa": 0.4}, ("ema:kappa=0.4", None)),
    ({"return_kappa": 0.9}, (FAST_TEXT, "returned=ema:kappa=0.9")),
    ({"pullback": "auto"}, (FAST_TEXT, SLOW_TEXT)),
    ({"pullback": "auto", "kappa": 0.5}, ("ema:kappa=0.5", None)),
    ({"pullback": "auto", "averaging": "uniform"}, ("uniform", None)),
    ({"pullback": "auto", "return_kappa": 0.7}, (FAST_TEXT, "returned=ema:kappa=0.7")),
    ({"pullback": "auto", "returns": "uniform"}, (FAST_TEXT, "returned=uniform")),
    ({"pullback": 0.1}, ("ema:kappa=0.5", None)),
    ({"pullback": 0.1, "averaging": "uniform"}, ("uniform", None)),
    ({"pullback": 0.1, "return_kappa": 0.7}, ("ema:kappa=0.5", "returned=ema:kappa=0.7")),
]


@pytest.mark.parametrize(("said", "expected"), DEFAULTS)
def test_what_is_left_out(said, expected):
    opt = PACE([Parameter(torch.ones(2))], **said)
    opt.add_param_group({"params": [Parameter(torch.ones(2))]})
    for group in opt.param_groups:
        assert group["pullback"] == said.get("pullback", 1.0)
        assert group["gain"] == ("adam" if "pullback" in said else "scalar")
        assert (group["averaging"], group["returns"]) == expected
        assert not {"kappa", "return_kappa"} & group.keys()
    for p in (p for group in opt.param_groups for p in group["params"]):
        p.grad = torch.ones_like(p)
    opt.step()  # and such groups step
    averages = {key for key in opt.state[p] if key.startswith(("average", "return"))}
    assert averages == {"average"} | ({"return_returned"} if expected[-1] else set())


def test_groups_with_options_of_their_own():
    own = [
        {"pullback": 0.1},
        {"return_kappa": 0.7},
        {"returns": None, "kappa": 0.3},
        {"pullback": 0},
    ]
    groups = [{"params": [Parameter(torch.ones(2))], **o} for o in own]
    opt = PACE(copy.deepcopy(groups[:3]), pullback="auto")
    opt.add_param_group(groups[3])
    assert [group["pullback"] for group in opt.param_groups] == [0.1, "auto", "auto", 0.0]
    assert [(group["averaging"], group["returns"]) for group in opt.param_groups] == [
        (FAST_TEXT, SLOW_TEXT),  # what PACE was told is every group's
        (FAST_TEXT, "returned=ema:kappa=0.7"),
        (FAST_TEXT, None),
        (FAST_TEXT, SLOW_TEXT),
    ]


def test_every_group_may_give_the_pullback():
    groups = [{"params": [Parameter(torch.ones(2))], "pullback": c} for c in (0.1, "auto")]
    opt = PACE(groups, gain="adam")
    # The first group's, or the returned model would be of two averages.
    assert [group["averaging"] for group in opt.param_groups] == ["ema:kappa=0.5"] * 2
    assert [group["returns"] for group in opt.param_groups] == [None] * 2
    with pytest.raises(ValueError, match="^pullback must be given with gain='adam'"):
        opt.add_param_group({"params": [Parameter(torch.ones(2))]})
    assert len(opt.param_groups) == 2
    opt.add_param_group({"params": [Parameter(torch.ones(2))], "gain": "scalar"})
    assert opt.param_groups[2]["pullback"] == 1.0


BAD = ["automatic", "", -1, math.nan, math.inf, True, ["auto"]]


@pytest.mark.parametrize("value", BAD)
def test_bad_strengths(value):
    with pytest.raises(ValueError, match=r"^pullback must be a .* >= 0, or 'auto', got ") as raised:
        PACE([Parameter(torch.ones(2))], pullback=value)
    assert str(raised.value).endswith(f"got {value!r}")
    with pytest.raises(ValueError, match=r"^pullback must be a .* >= 0, or 'auto', got "):
        PACE([{"params": [Parameter(torch.ones(2))], "pullback": value}], pullback="auto")


def test_what_it_does_not_go_with():
    adamw = torch.optim.AdamW([Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match=r"^pullback must be a finite number >= 0, got 'auto'$"):
        Pullback(adamw, "auto")


def test_it_says_that_it_is_experimental():
    """With what its threshold depends on and what to use instead; nothing else warns."""
    with pytest.warns(UserWarning, match="experimental.*nats? of cross-entropy.*scalar.*rate"):
        PACE([Parameter(torch.ones(2))], lr=0.1, pullback="auto")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        PACE([Parameter(torch.ones(2))], lr=0.1, pullback=1.0, gain="scalar")
    assert not found
