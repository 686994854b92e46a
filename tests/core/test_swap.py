"""The swap of live weights and average, down to the bits."""

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paceline import kernels, swap
from paceline.swap import swap_back, swap_in

finite = st.floats(-2, 2, width=32)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@given(st.lists(st.tuples(finite, finite), min_size=1, max_size=8), st.sampled_from(DTYPES))
def test_swap_loses_nothing(pairs, dtype):
    lives, means = zip(*pairs, strict=True)
    param = torch.tensor(lives).to(dtype)
    average = torch.tensor(means).to(torch.promote_types(dtype, torch.float32))
    live, mean = param.clone(), average.clone()
    swap_in([(param, average)])
    assert (param - mean).abs().max() <= torch.finfo(dtype).eps  # rounded: half a unit of at most 2
    swap_back([(param, average)])
    assert torch.equal(param, live)
    exact = mean.abs() >= (2**-16 if dtype == torch.float16 else 0)
    assert torch.equal(average[exact], mean[exact])
    assert ((average - mean).abs() <= 2**-25).all()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_every_bfloat16_bit_pattern_comes_back(seed, fused, kernel, monkeypatch):
    monkeypatch.setattr(kernels, "WORTH_BUILDING", 0)
    live = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**31), 2**31, (2**16,), generator=generator).to(torch.int32)
    bits[::5] = (bits[::5] & ~0xFFFF) | 0x8000  # ties
    bits[:2] = torch.tensor([0x7F7FFFFF, 0x7F800000])  # rounds to infinity; infinity
    for start in range(2, 66):  # NaNs, at every place of a vectorised conversion
        bits[start] = [0x7FFFFFFF, 0x7F800001, -1, 0x7FFF8000, -0x8000, 0x7FC08000][start % 6]
    bits[-3:] = torch.tensor([-0x8000, 0x7FC08000, 0x7FFF8000])
    mean = bits.view(torch.float32)
    param, average = live.clone(), mean.clone()
    swap_in([(param, average)], fused=fused)
    nan = mean.isnan()
    assert torch.equal(param.isnan(), nan)
    nearest = mean.to(torch.bfloat16)
    tie = (bits & 0xFFFF) == 0x8000
    assert torch.equal(param[~nan & ~tie], nearest[~nan & ~tie])
    swap_back([(param, average)], fused=fused)
    assert torch.equal(param.view(torch.int16), live.view(torch.int16))
    assert torch.equal(average.isnan(), nan)
    assert torch.equal(average.view(torch.int32)[~nan], bits[~nan])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (7,), (5, 3), (3, 0), (2, 3, 4)])
def test_slices_cover_all_of_a_tensor(shape, dtype, monkeypatch):
    monkeypatch.setattr(swap, "SLICE", 4)
    param = torch.randn(shape, dtype=torch.float64).to(dtype)
    param = param.transpose(0, -1) if shape else param
    average = torch.randn(param.shape).to(torch.promote_types(dtype, torch.float32))
    live, mean = param.clone(), average.clone()
    swap_in([(param, average)])
    torch.testing.assert_close(param, mean.to(dtype))
    swap_back([(param, average)])
    assert torch.equal(param, live)
    torch.testing.assert_close(average, mean, rtol=0, atol=2**-25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("failing", [1, 3])
def test_an_interrupted_swap_is_undone(dtype, failing, monkeypatch):
    monkeypatch.setattr(swap, "SLICE", 4)
    pairs = [(torch.randn(6).to(dtype), torch.randn(6)) for _ in range(3)]
    before = [(p.clone(), a.clone()) for p, a in pairs]
    pair_in, calls = swap._pair_in, []

    def interrupted(param, average):
        calls.append(1)
        if len(calls) == failing + 1:
            raise KeyboardInterrupt
        pair_in(param, average)

    monkeypatch.setattr(swap, "_pair_in", interrupted)
    with pytest.raises(KeyboardInterrupt):
        swap_in(pairs)
    for (p, a), (q, b) in zip(pairs, before, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(a, b)


def test_scratch_is_bounded_by_a_slice(kernel):
    """The kernel takes none."""
    from torch.profiler import ProfilerActivity, profile

    for dtype, fused in product((torch.float32, torch.bfloat16), (True, False)):
        param, average = torch.randn(8 * swap.SLICE).to(dtype), torch.randn(8 * swap.SLICE)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            swap_in([(param, average)], fused=fused)
            swap_back([(param, average)], fused=fused)
        held = peak = 0
        for event in seen.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                peak = max(peak, held)
        assert (peak == 0) == fused
        assert peak <= 32 * swap.SLICE  # bytes
