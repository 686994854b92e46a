"""The step against an independent reference, against AdamW, and against the theory."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import pace_options
from reference import Reference
from torch.nn import Parameter

from paceline import EMA, PACE

# Largest float32 deviation from the float64 reference that we allow, relative to the largest
# weight. 500 steps accumulate rounding of about sqrt(500)·6e-8 = 1.3e-6 of a weight.
TOLERANCE = 1e-5


def relative(ours, exact):
    """Largest deviation over a list of tensors, relative to the largest exact entry."""
    ours = np.concatenate([x.detach().double().numpy().ravel() for x in ours])
    exact = np.concatenate([np.ravel(x) for x in exact])
    return np.abs(ours - exact).max() / np.abs(exact).max()


RULES = {
    "power": {"pullback": 0.3, "ema_power": 0.5},
    "strong": {"pullback": 50.0, "ema_power": 0.3},
    "clip off": {"pullback": 2.0, "ema_power": 0.3, "clip": False},
    "constant weight": {"pullback": 0.3, "ema_power": None, "ema_beta": 0.05},
    "late and seldom": {
        "pullback": 0.5,
        "ema_power": 0.7,
        "ema_rate": 0.3,
        "ema_start": 20,
        "ema_every": 3,
    },
    "scalar": {"pullback": 0.3, "gain": "scalar", "ema_power": 0.3},
    "whole": {"pullback": 1.0, "gain": "scalar"},  # all the way to the average
    "watching": {"pullback": 0.0, "ema_power": 0.2},
}


PATHS = {  # and the steps on each
    "together": ({"fused": False}, 100),
    "kernel": ({"fused": True}, 500),
    "capturable": ({"capturable": True}, 100),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rule", RULES)
def test_every_step_equals_the_reference(rule, path, kernel):
    """On mixed shapes, with groups that have options of their own, and a schedule."""
    path, steps = PATHS[path]
    rng = np.random.default_rng(0)
    shapes = [[(4, 3), (7,), ()], [(2, 3, 2), (5,)], [(3,)], [(6,), (1, 2)]]
    groups = [
        {},
        {"weight_decay": 0.0, "betas": (0.8, 0.95), "ema_every": 2, "maximize": True},
        {"eps": 1e-3, "pullback": 0.1, "lr": 1e-2, "clip": False},
        {"ema_start": 7, "ema_rate": 0.5, "ema_power": 0.6, "ema_beta": None},
    ]
    params, refs, signs = [], [], []
    for group, its_shapes in zip(groups, shapes, strict=True):
        starts = [np.float32(rng.normal(size=shape)) for shape in its_shapes]
        group["params"] = [Parameter(torch.tensor(start)) for start in starts]
        params += group["params"]
        own = {k: v for k, v in group.items() if k not in ("params", "lr", "maximize")}
        refs += [Reference(start, **{**RULES[rule], **own}) for start in starts]
        signs += [-1 if group.get("maximize") else 1 for _ in starts]
    groups = [pace_options(group, RULES[rule]) for group in groups]
    opt = PACE(groups, lr=3e-2, **path, **pace_options(RULES[rule]))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
    targets = [np.float32(rng.normal(size=p.shape)) for p in params]
    late = 4  # the index of a parameter that gets its first gradient at step 11

    for t in range(1, steps + 1):
        rates = [group["lr"] for group in opt.param_groups for _ in group["params"]]
        for i, (p, ref, target) in enumerate(zip(params, refs, targets, strict=True)):
            if i == late and t <= 10:
                continue
            # A noisy quadratic, its gradient taken at the reference's weights for both.
            g = np.float32(ref.theta - target + rng.normal(size=np.shape(target)))
            p.grad = torch.tensor(signs[i] * g)
            ref.step(g, rates[i])
        opt.step()
        schedule.step()
        assert relative(params, [ref.theta for ref in refs]) < TOLERANCE
        if t <= 10:
            continue
        states = [opt.state[p] for p in params]
        assert relative([s["average"] for s in states], [ref.ema for ref in refs]) < TOLERANCE
        assert relative([s["exp_avg"] for s in states], [ref.m for ref in refs]) < TOLERANCE
        assert relative([s["exp_avg_sq"] for s in states], [ref.v for ref in refs]) < TOLERANCE
        assert all(s["step"] == ref.t for s, ref in zip(states, refs, strict=True))
    with opt.averaged():
        assert relative(params, [ref.ema for ref in refs]) < TOLERANCE


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
def test_without_a_pull_it_is_adamw(maximize, fused, kernel):
    torch.manual_seed(0)
    ours = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    theirs = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    theirs.load_state_dict(ours.state_dict())
    options = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.99), "maximize": maximize}
    opt = PACE(ours.parameters(), pullback=0, fused=fused, **options)
    adamw = torch.optim.AdamW(theirs.parameters(), **options)
    sign = -1 if maximize else 1
    for _ in range(200):
        x = torch.randn(32, 8)
        for model, optimizer in ((ours, opt), (theirs, adamw)):
            optimizer.zero_grad()
            (sign * (model(x) - x[:, :1].sin()).square().mean()).backward()
            optimizer.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6 if fused else 1e-7)
    kept = {key for state in opt.state.values() for key in state}
    assert kept == {"step", "idle_steps", "exp_avg", "exp_avg_sq", "average"}


def test_saturated_clip_is_adamw_with_a_decaying_rate():
    """Gain 1 everywhere: ema_t = ema_{t-1} - β_t·η·s_t, s_t AdamW's direction (method, limits)."""
    torch.manual_seed(0)
    eta, kappa = 0.05, 0.4
    p = Parameter(torch.randn(50, dtype=torch.float64))
    opt = PACE([p], lr=eta, pullback=1e30, kappa=kappa, weight_decay=0, track_stats=True)
    exact, m, v = p.detach().clone(), torch.zeros(50), torch.zeros(50)
    for t in range(1, 101):
        p.grad = torch.randn(50, dtype=torch.float64) + p.detach()
        m = 0.9 * m + 0.1 * p.grad
        v = 0.999 * v + 0.001 * p.grad**2
        s = m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        exact = exact - (1 + t) ** -kappa * eta * s
        opt.step()
        assert opt.stats()["clipped"] == 1
        torch.testing.assert_close(opt.state[p]["average"], exact, rtol=1e-12, atol=1e-12)


@st.composite
def states(draw):
    """A parameter some random steps into training, with its optimizer's options."""
    size = draw(st.integers(1, 6))
    seed = draw(st.integers(0, 2**16))
    options = {
        "lr": draw(st.floats(1e-4, 1.0)),
        "weight_decay": 0.0,
        "pullback": draw(st.sampled_from([0.0, 1e-2, 1.0, 100.0])),
        "ema_power": draw(st.floats(0, 1)),
        "ema_every": draw(st.integers(1, 4)),
        "ema_start": draw(st.integers(0, 4)),
        "clip": draw(st.booleans()),
    }
    if draw(st.booleans()):
        options |= {"ema_power": None, "ema_beta": draw(st.floats(0.01, 1.0))}
    return size, seed, options, draw(st.integers(1, 8))


def trained(size, seed, options, steps):
    generator = torch.Generator().manual_seed(seed)
    p = Parameter(torch.randn(size, dtype=torch.float64, generator=generator))
    opt = PACE([p], **pace_options(options))
    for _ in range(steps):
        p.grad = torch.randn(size, dtype=torch.float64, generator=generator)
        opt.step()
    p.grad = torch.randn(size, dtype=torch.float64, generator=generator)
    return p, opt


@given(states())
def test_pull_points_to_the_average_and_never_past_it(case):
    p, opt = trained(*case)
    watching, without = trained(*case)
    without.load_state_dict(opt.state_dict() | {"state": {}})  # the options; state stays below
    watching.data.copy_(p.data)
    for key, value in opt.state[p].items():
        without.state[watching][key] = value.clone()
    without.param_groups[0]["pullback"] = 0.0
    gap = opt.state[p]["average"] - p.detach()
    opt.step()
    without.step()
    pull = p.detach() - watching.detach()
    slack = 1e-12 * max(1, p.detach().abs().max())  # rounding in float64
    assert (pull * gap.sign() >= -slack).all()
    if case[2]["clip"]:
        assert (pull.abs() <= gap.abs() + slack).all()


@given(states())
def test_no_pull_where_the_weights_are_their_average(case):
    p, opt = trained(*case)
    q, plain = trained(*case)
    with torch.no_grad():
        opt.state[p]["average"].copy_(p)
        plain.state[q] = {k: v.clone() for k, v in opt.state[p].items()}
        q.copy_(p)
    plain.param_groups[0]["pullback"] = 0.0
    opt.step()
    plain.step()
    assert torch.equal(p, q)


@given(states(), st.randoms(use_true_random=False))
def test_permuting_and_splitting_parameters_changes_nothing(case, random):
    size, seed, options, steps = case
    p, opt = trained(size, seed, options, steps)
    order = list(range(size))
    random.shuffle(order)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(size, dtype=torch.float64, generator=generator)
    parts = [Parameter(start[i].clone()) for i in order]
    split = PACE(parts, **pace_options(options))
    for _ in range(steps):
        g = torch.randn(size, dtype=torch.float64, generator=generator)
        for i, part in zip(order, parts, strict=True):
            part.grad = g[i]
        split.step()
    for i, part in zip(order, parts, strict=True):
        torch.testing.assert_close(part, p[i], rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(
            split.state[part]["average"], opt.state[p]["average"][i], rtol=1e-12, atol=1e-13
        )


@pytest.mark.parametrize(
    ("dtype", "fused"),
    [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float16, False)],
)
def test_narrow_parameters_have_float32_state_and_round_once(dtype, fused, kernel):
    """The reference rounds the live weights as they are stored, and nothing else."""
    torch.manual_seed(0)

    def store(x):
        return torch.tensor(x).float().to(dtype).double().numpy()

    p = Parameter(torch.randn(200).to(dtype))
    opt = PACE([p], lr=1e-2, pullback=5.0, kappa=0.4, fused=fused)
    ref = Reference(p.detach().double().numpy(), pullback=5.0, ema_power=0.4, store=store)
    rounding = torch.finfo(dtype).eps
    for _ in range(100):
        p.grad = (p.detach().float() + torch.randn(200)).to(dtype)
        opt.step()
        ref.step(p.grad.double().numpy(), 1e-2)
        # A float32 value next to a rounding boundary may round the other way: one unit, seldom.
        off = np.abs(p.detach().double().numpy() - ref.theta)
        assert off.max() <= 4 * rounding
        assert (off > 0).mean() < 0.02
        ref.theta = p.detach().double().numpy()
        assert relative([opt.state[p]["average"]], [ref.ema]) < 1e-3
    for key in ("exp_avg", "exp_avg_sq", "average"):
        assert opt.state[p][key].dtype == torch.float32
    assert p.dtype == dtype


def test_float32_average_moves_where_a_bfloat16_one_would_stall():
    p = Parameter(torch.ones(1, dtype=torch.bfloat16))
    opt = PACE([p], lr=0.0, pullback=0.0, averaging=EMA(1e-3))
    p.grad = torch.ones_like(p)
    opt.step()
    p.data.fill_(2.0)
    for _ in range(2000):
        opt.step()
    # 1 + (1 - 0.999^2000) = 1.8648
    assert opt.state[p]["average"].item() == pytest.approx(2 - 0.999**2000, abs=1e-4)
