"""Stochastic rounding: unbiased, independent where it must be, the same on replay."""

import io

import numpy as np
import pytest
import torch
from reference import Reference
from torch.nn import Parameter

from paceline import EMA, PACE, rounding

SIZE = 30_000


def key(index=0, step=1, seed=0):
    return int(rounding.keys(seed, torch.tensor([index], dtype=torch.int32), step))


def rounded(values, which=rounding.EXP_AVG, **place):
    out = torch.empty(values.shape, dtype=torch.bfloat16)
    rounding.round_(out, values, rounding.noise(values, key(**place)), which)
    return out


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("scale", [1.0, -3e-9, 1e30])
def test_goes_up_as_often_as_the_value_is_near_the_upper_neighbour(which, share, scale):
    low = torch.tensor(scale).bfloat16()
    high = (low.view(torch.int16) + 1).view(torch.bfloat16)  # away from zero
    value = low.float() + share * (high.float() - low.float())
    out = rounded(value.expand(SIZE).contiguous(), which)
    assert ((out == low) | (out == high)).all()
    up = (out == high).double().mean().item()
    assert abs(up - share) < 4 * (share * (1 - share) / SIZE) ** 0.5 + 2**-16


def test_what_bfloat16_can_hold_stays_as_it_is():
    values = torch.tensor([0.0, -0.0, 1.5, -2e-39, float("inf"), -float("inf")]).bfloat16()
    for which in range(4):
        out = rounded(values.float(), which)
        assert torch.equal(out.view(torch.int16), values.view(torch.int16))
    bits = torch.tensor([-1, 0x7FFFFFFF, 0x7F800001, 0x7FC00000], dtype=torch.int32)
    assert rounded(bits.view(torch.float32)).isnan().all()


def test_noise_is_independent_between_tensors_steps_seeds_and_parameters():
    values = torch.full((SIZE,), 1 + 0.5 / 128)  # halfway: a coin each
    draws = [(which, {}) for which in range(4)]
    draws += [(0, {"step": 2}), (0, {"step": 3}), (0, {"seed": 1}), (0, {"index": 1})]
    draws += [(1, {"seed": 1, "step": 2}), (2, {"index": 2, "step": 2})]
    coins = torch.stack([(rounded(values, which, **at) > 1).double() for which, at in draws])
    shifted = torch.stack([coin.roll(by) for coin in coins[:4] for by in (1, 2, 64)])
    correlation = torch.corrcoef(torch.cat([coins, shifted]))
    off = correlation - torch.eye(len(correlation))
    assert off.abs().max() < 4.5 * SIZE**-0.5  # 4.5 sigma over 231 pairs


def test_noise_of_a_piece_is_a_piece_of_the_noise():
    whole = rounding.noise(torch.empty(300, 7), key())
    assert torch.equal(rounding.noise(torch.empty(100, 7), key(), start=700), whole[100:200])
    far = rounding.noise(torch.empty(4), key(), start=2**32)  # wraps, and says nothing
    assert torch.equal(far, rounding.noise(torch.empty(4), key()))


def run(steps, *, dtype=torch.float32, seed=0, size=20_000, **options):
    """Steps on noisy gradients that depend on the step alone; returns parameter and optimizer."""
    p = Parameter(torch.ones(size, dtype=dtype))
    opt = PACE([p], **{"lr": 1e-2, "pullback": 0.3, "seed": seed, **options})
    for t in steps:
        generator = torch.Generator().manual_seed(t)
        p.grad = (1 + torch.randn(size, generator=generator)).to(dtype)
        opt.step()
    return p, opt


NARROW = [
    {"state_dtype": torch.bfloat16},
    {"state_dtype": torch.bfloat16, "dtype": torch.bfloat16},
    {"stochastic_round": True, "dtype": torch.bfloat16},
    {"state_dtype": torch.bfloat16, "stochastic_round": True, "dtype": torch.bfloat16},
]


@pytest.mark.parametrize("options", NARROW, ids=str)
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_replays_resumes_and_swaps_bit_for_bit(options, swapped, fused, kernel):
    options = {**options, "fused": fused}
    p, opt = run(range(20), **options)
    q, half = run(range(10), **options)
    if swapped:
        half.eval()
    file = io.BytesIO()
    torch.save((q.detach(), half.state_dict()), file)
    file.seek(0)
    dtype = options.get("dtype", torch.float32)
    q = Parameter(torch.zeros_like(q))
    resumed = PACE([q], pullback=9.0)
    weights, state = torch.load(file, weights_only=True)
    q.data.copy_(weights)
    resumed.load_state_dict(state)
    resumed.train()
    for t in range(10, 20):
        generator = torch.Generator().manual_seed(t)
        q.grad = (1 + torch.randn(q.shape, generator=generator)).to(dtype)
        resumed.step()
        resumed.eval()
        resumed.train()
    assert torch.equal(p, q)
    for name, value in opt.state[p].items():
        assert torch.equal(value, resumed.state[q][name]), name
        assert value.dtype == resumed.state[q][name].dtype
    other, _ = run(range(20), **{**options, "seed": 1})
    assert not torch.equal(p, other)


def test_narrow_state_of_wide_weights_keeps_the_offset_and_averages_exactly():
    p, opt = run(range(30), state_dtype=torch.bfloat16)
    state = opt.state[p]
    assert state.keys() == {"step", "idle_steps", "exp_avg", "exp_avg_sq", "offset"}
    assert sum(x.nbytes for name, x in state.items() if x.ndim) == 6 * p.numel()
    live = p.detach().clone()
    returned = opt.averaged_state_dict(torch.nn.ParameterList([p]))["0"]
    with opt.averaged():
        assert torch.equal(p, returned)
        assert torch.equal(p, live + state["offset"].float())
    assert torch.equal(p, live)


@pytest.mark.parametrize("fused", [False, True])
def test_swap_with_an_offset_is_exact_for_all_sizes_of_both(fused, kernel):
    """(θ + d) - d = θ after a step, whatever the exponents of θ and d, ties included."""
    generator = torch.Generator().manual_seed(0)
    size = 30_000

    def wild(mantissa):
        exponents = torch.randint(-30, 31, (size,), generator=generator)
        whole = torch.randint(-(2**mantissa), 2**mantissa, (size,), generator=generator)
        return whole.float() * exponents.float().exp2()

    for theta, d in ((wild(24), wild(8)), (wild(24), wild(2)), (wild(3), wild(8))):
        p = Parameter(theta.clone())
        opt = PACE([p], lr=0.0, pullback=0.0, state_dtype=torch.bfloat16, fused=fused)
        p.grad = torch.zeros(size)
        opt.step()
        opt.state[p]["offset"].copy_(d)
        opt.step()
        live = p.detach().clone()
        offset = opt.state[p]["offset"].clone()
        # The step moved θ by what it takes, which is less than rounding either or both.
        unit = torch.finfo(torch.float32).eps * torch.maximum(theta.abs(), (theta + d).abs())
        assert ((live - theta).abs() <= unit).all()
        opt.eval()
        opt.train()
        assert torch.equal(p, live)
        assert torch.equal(opt.state[p]["offset"], offset)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_average_in_bfloat16_follows_a_drift_of_float32_size(dtype, fused, kernel):
    """Each step moves the average by 1/200 of its unit in the last place; all it gets is noise."""
    size, steps, beta = 30_000, 400, 1e-3
    p = Parameter(torch.ones(size, dtype=dtype))
    opt = PACE(
        [p],
        lr=0.0,
        pullback=0.0,
        averaging=EMA(beta),
        state_dtype=torch.bfloat16,
        fused=fused,
    )
    p.grad = torch.ones_like(p)
    opt.step()
    p.data.fill_(1.0 + 2.0**-5)
    if dtype == torch.float32:
        opt.state[p]["offset"].fill_(-(2.0**-5))  # where the average was
    for _ in range(steps):
        opt.step()
    state = opt.state[p]
    average = state["average"] if dtype == torch.bfloat16 else p.detach() + state["offset"].float()
    exact = 1 + 2.0**-5 * (1 - (1 - beta) ** steps)  # 1.0103
    error = average.double() - exact
    assert abs(error.mean()) < 4 * error.std() / size**0.5
    # Rounded to nearest it would not have moved at all; an offset is finer than the average is.
    assert error.std() < (2e-2 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.parametrize("fused", [False, True])
def test_bfloat16_weights_follow_small_steps_where_nearest_rounding_stalls(fused, kernel):
    ends = {}
    for stochastic in (False, True):
        p = Parameter(torch.ones(30_000, dtype=torch.bfloat16))
        opt = PACE(
            [p],
            lr=1e-4,
            weight_decay=0.0,
            pullback=0.0,
            stochastic_round=stochastic,
            fused=fused,
        )
        for _ in range(200):
            p.grad = torch.ones_like(p)
            opt.step()
        ends[stochastic] = p.detach().double()
    assert (ends[False] == 1.0).all()  # 1e-4 is less than half of 2^-8
    off = ends[True] - (1 - 200e-4)
    assert abs(off.mean()) < 4 * off.std() / 30_000**0.5


@pytest.mark.parametrize("fused", [False, True])
def test_to_nearest_ties_go_to_even(fused, kernel):
    p = Parameter(torch.tensor([1.0, 1 + 2.0**-7]).bfloat16())
    opt = PACE([p], 2.0**-8, (0.0, 0.0), 0.0, 0.0, pullback=0.0, fused=fused)  # moves by the rate
    p.grad = -torch.ones_like(p)
    opt.step()
    assert p.tolist() == [1.0, 1 + 2.0**-6]


def test_bfloat16_state_stays_near_the_reference():
    """300 steps: the mean over coordinates of each error is within 4 standard errors of zero."""
    rng = np.random.default_rng(0)
    size = 20_000
    p = Parameter(torch.ones(size))
    opt = PACE([p], lr=1e-3, pullback=0.05, kappa=0.5, state_dtype=torch.bfloat16)
    ref = Reference(np.ones(size), pullback=0.05, ema_power=0.5)
    for _ in range(300):
        g = np.float32(rng.normal(size=size))
        p.grad = torch.tensor(g)
        opt.step()
        ref.step(g, 1e-3)
    for value, exact in (
        (opt.state[p]["exp_avg"], ref.m),
        (opt.state[p]["exp_avg_sq"], ref.v),
        (p, ref.theta),
        (p.detach() + opt.state[p]["offset"].float(), ref.ema),
    ):
        error = value.detach().double().numpy() - exact
        assert abs(error.mean()) < 4 * error.std() / size**0.5
    spread = np.std(p.detach().numpy() - ref.theta) / np.std(ref.theta)
    assert spread < 0.02  # of what the training moved


def test_parameters_draw_noise_of_their_own_in_every_group():
    groups = [{"params": [Parameter(torch.ones(500)) for _ in range(2)]} for _ in range(2)]
    params = [p for group in groups for p in group["params"]]
    for capturable in (False, True):
        opt = PACE(groups, pullback=0.0, state_dtype=torch.bfloat16, capturable=capturable)
        opt.add_param_group({"params": [Parameter(torch.ones(500))]})
        params = [p for group in opt.param_groups for p in group["params"]]
        for p in params:
            p.grad = torch.full_like(p, 1.234)
        opt.step()
        moments = [opt.state[p]["exp_avg"] for p in params]
        for i, first in enumerate(moments):
            assert all(not torch.equal(first, second) for second in moments[:i])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("bits", [-1, 0x7FFFFFFF, 0x7F800001, 0x7FC00000])
def test_a_nan_stays_a_nan_whatever_its_bits(bits, fused, kernel):
    """Noise added to the bits of some NaNs would carry over to zero."""
    p = Parameter(torch.ones(40))
    opt = PACE([p], pullback=0.1, state_dtype=torch.bfloat16, fused=fused, nonfinite="ignore")
    p.grad = torch.full((40,), bits, dtype=torch.int32).view(torch.float32)
    opt.step()
    for x in (p, *(opt.state[p][name] for name in ("exp_avg", "exp_avg_sq", "offset"))):
        assert x.isnan().all()


def test_a_model_converted_after_the_first_step_keeps_its_average():
    model = torch.nn.Linear(4, 4)
    p = model.weight
    p.data.fill_(1.0)
    opt = PACE([p], lr=0.1, pullback=0.1, state_dtype=torch.bfloat16)
    for _ in range(3):
        p.grad = torch.ones_like(p)
        opt.step()
    average = p.detach() + opt.state[p]["offset"].float()
    model.to(torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"is torch.bfloat16 now, .*torch.bfloat16 average"):
        opt.eval()
    p.grad = torch.zeros_like(p)
    opt.param_groups[0].update(lr=0.0, averaging="ema:every=1000")
    opt.step()
    assert opt.state[p].keys() == {"step", "idle_steps", "exp_avg", "exp_avg_sq", "average"}
    # The weights, the offset and their sum were each rounded to bfloat16; all are below 1.
    torch.testing.assert_close(opt.state[p]["average"].float(), average, rtol=0, atol=3 * 2**-8)


def test_changing_the_state_dtype_between_steps_converts_the_state():
    p, opt = run(range(10))
    average = opt.state[p]["average"].clone()
    opt.param_groups[0].update(state_dtype=torch.bfloat16, lr=0.0, averaging="ema:every=1000")
    p.grad = torch.zeros_like(p)
    opt.step()
    unit = 2.0**-8 * (average - p.detach()).abs()
    assert "average" not in opt.state[p]
    assert ((p.detach() + opt.state[p]["offset"].float() - average).abs() <= 2 * unit + 1e-7).all()
    opt.param_groups[0]["state_dtype"] = None
    opt.step()
    assert "offset" not in opt.state[p]
    assert opt.state[p]["exp_avg"].dtype == torch.float32
    assert ((opt.state[p]["average"] - average).abs() <= 2 * unit + 1e-7).all()


def test_what_does_not_go_together_is_refused():
    for dtype in (torch.float16, torch.float64):
        p = Parameter(torch.ones(3, dtype=dtype))
        with pytest.raises(ValueError, match=f"state_dtype is for .*got {dtype} in parameter 0"):
            PACE([p], pullback=0.1, state_dtype=torch.bfloat16)
    p = Parameter(torch.ones(3, dtype=torch.float16))
    with pytest.raises(ValueError, match="stochastic_round is for bfloat16 parameters"):
        PACE([p], pullback=0.1, stochastic_round=True)
