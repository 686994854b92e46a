"""The swap of live weights and average, on GPUs, without one: as test_kernels_gpu.py."""

import importlib.util
import sys
import warnings

import pytest
import torch
from pulled import params_of
from test_kernels_swap import BFLOAT16, DTYPES, FLOAT32, bits, same, some_pairs
from tritons import TARGETS, resources, spills, vector_widths

from paceline import kernels
from paceline.kernels import cpu
from paceline.swap import swap_back, swap_in, swap_pair_

pytestmark = pytest.mark.skipif(
    not importlib.util.find_spec("triton"), reason="triton is not installed (extra `gpu`)"
)

SHAPES = [(3, 350), (1024,), (0,), (7,), (), (2,)]  # six programs


# ---- what it computes ----------------------------------------------------------------------------


def trades(dtype, of_average):
    from paceline.kernels import gpu

    pairs, others = (some_pairs(dtype, of_average, SHAPES) for _ in range(2))
    before = bits(pairs)
    made, beside = gpu.Swap(pairs), cpu.Swap(others)
    assert not made.done
    for back in (False, True):
        made.run(back=back)
        beside.run(back=back)
        assert same(bits(pairs), bits(others))
        assert same(bits(pairs), before) == back
        assert made.done == beside.done == (not back)


@pytest.mark.parametrize(("dtype", "of_average"), DTYPES, ids=str)
def test_it_is_the_cpu_kernels_there_and_back(dtype, of_average, interpreted, kernel):
    interpreted(trades, dtype, of_average)


def masks(which):
    from paceline.kernels import gpu

    seen, trade = [], gpu._trade
    with pytest.MonkeyPatch.context() as change:
        change.setattr(gpu, "_trade", lambda *x: seen.append(x[2] is not None) or trade(*x))
        for at in (0, 1):
            (pair,) = some_pairs(FLOAT32, FLOAT32, [(2048,)])
            before = bits([pair])
            moved = [x if i != which else torch.cat([torch.zeros(at), x])[at:]
                     for i, x in enumerate(pair)]  # fmt: skip
            gpu.Swap([tuple(moved)]).run(back=False)
            assert same(bits([moved]), before[::-1])
    return seen


@pytest.mark.parametrize("which", [0, 1])
def test_memory_off_boundaries_of_16_bytes_trades_with_a_mask(which, interpreted):
    assert interpreted(masks, which) == [False] * 2 + [True] * 8


def trades_nans():
    from paceline.kernels import gpu

    patterns = torch.tensor([0x7FFFFFFF, 0x7F800001, -1, 0x7FFF8000, -0x8000, 0x7FC08000, 3 << 29])
    average = patterns.to(torch.int32).view(FLOAT32)
    param = torch.arange(7.0).to(BFLOAT16)
    made = gpu.Swap([(param, average)])
    made.run(back=False)
    assert param.isnan().tolist() == [True] * 6 + [False]
    made.run(back=True)
    assert torch.equal(param.float(), torch.arange(7.0))
    assert average.isnan().tolist() == [True] * 6 + [False]


def test_a_nan_comes_back_as_some_nan(interpreted):
    interpreted(trades_nans)


# ---- who takes it --------------------------------------------------------------------------------


def chooses(wrong):
    from paceline.kernels import gpu

    class Broken:
        def __getitem__(self, grid):
            raise RuntimeError("no such instruction")

    class Off(gpu.Swap):
        def run(self, *, back):
            super().run(back=back)
            if wrong in ("there", "back") and back == (wrong == "back"):
                self.pairs[0][0][1027].add_(1.0)
            if wrong == "silent":
                self.flag.zero_()

    kernels._fault_of_swap.cache_clear()
    kernels._warn.cache_clear()
    made = []
    with pytest.MonkeyPatch.context() as change, warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        change.setattr(kernels, "WORTH_BUILDING", 100)
        change.setattr(kernels, "device_kind", lambda device: "gpu")
        change.setattr(kernels, "capturing", lambda device: wrong == "capturing")
        change.setattr(gpu, "_swap", Broken() if wrong == "raises" else gpu._swap)
        kind = Off if wrong else gpu.Swap
        change.setattr(gpu, "Swap", lambda pairs: made.append(1) or kind(pairs))
        pairs = list(zip(params_of((40, 50), (7,)), params_of((40, 50), (7,), seed=1), strict=True))
        pairs = [(x.detach(), y.detach()) for x, y in pairs]
        before, others = bits(pairs), [(x.clone(), y.clone()) for x, y in pairs]
        for _ in range(2):
            swap_in(pairs)
            for other in others:
                swap_pair_(*other, back=False)
            assert same(bits(pairs), bits(others))
            swap_back(pairs)
            for other in others:
                swap_pair_(*other, back=True)
            assert same(bits(pairs), before)
    asked = kernels._fault_of_swap.cache_info().currsize
    kernels._fault_of_swap.cache_clear()
    kernels._warn.cache_clear()
    return len(made), asked, [str(x.message) for x in seen]


def test_it_is_taken_once_it_is_known_to_be_right(interpreted):
    assert interpreted(chooses, None) == (1 + 4, 1, [])  # one to compare


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ("raises", "RuntimeError: no such instruction"),
        ("there", "it swaps otherwise than torch"),
        ("back", "it swaps otherwise than torch"),
        ("silent", "does not say that it has swapped"),
    ],
)
def test_one_that_is_wrong_or_fails_is_not_taken(wrong, reason, interpreted):
    made, asked, told = interpreted(chooses, wrong)
    assert (made, asked, len(told)) == (1, 1, 1)
    assert reason in told[0]
    assert "\n" not in told[0]


def test_nothing_begins_in_a_graph(interpreted):
    assert interpreted(chooses, "capturing") == (0, 0, [])


def test_without_triton_it_warns_once(monkeypatch):
    monkeypatch.setattr(kernels, "device_kind", lambda device: "gpu")
    monkeypatch.setattr(kernels, "WORTH_BUILDING", 0)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "paceline.kernels.gpu", raising=False)
    monkeypatch.delattr(kernels, "gpu", raising=False)
    kernels._fault_of_swap.cache_clear()
    kernels._warn.cache_clear()
    pairs = some_pairs(FLOAT32, FLOAT32, [(400,)])
    before = bits(pairs)
    with pytest.warns(UserWarning, match=r"slower: .*triton.*; pip install 'paceline\[gpu\]'$"):
        swap_in(pairs)
    swap_back(pairs)  # says it once
    assert same(bits(pairs), before)
    kernels._fault_of_swap.cache_clear()
    kernels._warn.cache_clear()


# ---- what it becomes -----------------------------------------------------------------------------

CASES = dict(zip(DTYPES, (16, 10, 12, 8, 32), strict=True))  # bytes for each parameter


def take(dtype, of_average, shapes=((5000,), ())):
    from paceline.kernels import gpu

    made = gpu.Swap(some_pairs(dtype, of_average, shapes))
    made.run(back=False)
    made.run(back=True)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_it_moves_the_floors_bytes_in_wide_words_and_spills_nothing(
    target, case, compiled, tmp_path
):
    from paceline.kernels import gpu

    made = compiled(target)
    take(*case)
    assert len(made) == 2  # there, and back
    for kernel in made:
        if target == "gfx942":
            assert not spills(kernel)
            continue
        wide, each = vector_widths(kernel), gpu.BLOCK // gpu.THREADS
        assert sum(wide) == each * CASES[case]
        assert set(wide) == {min(16, each * x.itemsize) for x in case}
        used = resources(kernel, tmp_path)
        assert used["STACK"] == used["LOCAL"] == "0"
        assert int(used["REG"]) <= 40


def test_no_shape_or_number_of_tensors_has_it_compiled_anew(compiled):
    made = compiled("sm_90")
    for shapes in ([(3,)], [(16, 1024)], [(5,), (1024,), (), (0,)], [(2,)] * 99):
        take(FLOAT32, FLOAT32, shapes)
    assert len(made) == 2
