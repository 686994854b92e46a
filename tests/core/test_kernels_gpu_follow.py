"""The pull after another optimizer's step, on GPUs, without one: as test_kernels_gpu.py."""

import copy
import importlib.util
import warnings
from unittest.mock import patch

import pytest
import torch
from pulled import AVERAGE, adamw, give, params_of
from test_kernels_follow import DTYPES, PULL, RULES, by_hand, close, moved
from tritons import TARGETS, resources, spills, vector_widths

from paceline import Pullback, kernels
from paceline.kernels import cpu
from paceline.update import MovedSlot, PullScalars, pull_

pytestmark = pytest.mark.skipif(
    not importlib.util.find_spec("triton"), reason="triton is not installed (extra `gpu`)"
)

FLOAT32, BFLOAT16, FLOAT64 = torch.float32, torch.bfloat16, torch.float64
SHAPES = [(3, 350), (1024,), (0,), (7,), ()]  # a whole chunk and a tail, or one of them, or none


# ---- what it computes ----------------------------------------------------------------------------


def follows(dtype, of_v, rule):
    from paceline.kernels import gpu

    without = {k: x for k, x in RULES[rule].items() if k in MovedSlot._fields}
    pull = PULL._replace(**{k: x for k, x in RULES[rule].items() if k in PullScalars._fields})
    with patch("test_kernels_follow.SHAPES", SHAPES):
        slots = moved(dtype, of_v, **without)
    others, start = copy.deepcopy(slots), copy.deepcopy(slots)
    gpu.follow(slots, pull)
    cpu.follow(others, pull)
    wide, flips = torch.promote_types(dtype, FLOAT32), dtype == BFLOAT16
    for x, y, old in zip(slots, others, start, strict=True):
        theta, averages = by_hand(old, pull)
        for exact in (theta, y.param.double().numpy()):
            assert close(x.param, exact, wide, flips)
        kept, theirs = (x.average, *x.extra), (y.average, *y.extra)
        for own, exact, other in zip(kept, averages, theirs, strict=True):
            assert close(own, exact, wide, flips)
            assert close(own, other.double().numpy(), wide, flips)
        assert torch.equal(x.extra[1], old.extra[1])  # of weight 0
        if "weight" in RULES[rule]:
            assert torch.equal(x.average, old.average)
    # Numbers that are on the device; no gain is no pull; a NaN stays one.
    with patch("test_kernels_follow.SHAPES", [(1030,)]):
        (x,), (y,) = (moved(dtype, of_v) for _ in range(2))
    gpu.follow([x], PULL._replace(gain=torch.tensor(0.3, dtype=FLOAT64)))
    gpu.follow([y], PULL)
    assert torch.equal(x.param, y.param)
    before = x.param.clone()
    x.average.fill_(float("inf"))
    gpu.follow([x], PULL.without_averages()._replace(gain=0.0))
    assert torch.equal(x.param, before)
    x.average.zero_()
    x.second_moment[1029] = float("nan")
    gpu.follow([x], PULL)
    assert x.param.isnan().nonzero().tolist() == [[1029]]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("dtype", "of_v"), DTYPES, ids=str)
def test_it_is_the_cpu_kernels_and_the_formula(dtype, of_v, rule, interpreted, kernel):
    interpreted(follows, dtype, of_v, rule)


def chooses(wrong):
    from paceline.kernels import gpu

    class Broken:
        def __getitem__(self, grid):
            raise RuntimeError("no such instruction")

    def off(slots, pull):
        pull_(slots, pull._replace(weight=1.01 * pull.weight))

    kernels._fault_of_follow.cache_clear()
    kernels._warn.cache_clear()
    told, calls, ends = [], [], []
    with pytest.MonkeyPatch.context() as change:
        change.setattr(kernels, "WORTH_BUILDING", 100)
        if wrong:
            change.setattr(
                gpu, *{"raises": ("_follow", Broken()), "differs": ("follow", off)}[wrong]
            )
        follow = gpu.follow
        change.setattr(gpu, "follow", lambda *x: calls.append(1) or follow(*x))
        for kind in ("gpu", None):
            change.setattr(kernels, "device_kind", lambda device, kind=kind: kind)
            params = params_of((40, 50), (7,))
            opt = Pullback(adamw(params), pullback=3.0)
            for t in range(3):
                give(params, t)
                with warnings.catch_warnings(record=True) as seen:
                    warnings.simplefilter("always")
                    opt.step()
                told += [str(x.message) for x in seen]
            ends.append([*params, *(opt.state[p][AVERAGE] for p in params)])
    kernels._fault_of_follow.cache_clear()
    kernels._warn.cache_clear()
    same = all(map(torch.equal, *ends))
    assert same == bool(wrong)
    for x, y in zip(*ends, strict=True):
        torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-6)
    return len(calls), told


def test_it_is_taken_once_it_is_known_to_be_right(interpreted, kernel):
    calls, told = interpreted(chooses, None)
    assert calls == 1 + 3  # one to compare
    assert not told


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [("raises", "RuntimeError: no such instruction"), ("differs", "otherwise than torch")],
)
def test_one_that_is_wrong_or_fails_is_not_taken(wrong, reason, interpreted, kernel):
    calls, told = interpreted(chooses, wrong)
    assert calls == 1
    assert len(told) == 1
    assert reason in told[0]
    assert "\n" not in told[0]


def compares(pulls, of_v):
    from paceline.kernels import gpu

    seen, follow = [], gpu.follow

    def seeing(slots, pull):
        seen.extend((x.before is not None, x.second_moment is not None) for x in slots)
        follow(slots, pull)

    with patch.object(gpu, "follow", seeing):
        assert gpu.fault_of_follow(torch.device("cpu"), FLOAT32, of_v, 1, pulls) is None
    return set(seen)


@pytest.mark.parametrize(("pulls", "of_v"), [(True, FLOAT32), (True, None), (False, None)])
def test_it_is_compared_in_the_form_that_is_asked_for(pulls, of_v, interpreted):
    assert interpreted(compares, pulls, of_v) == {(pulls, of_v is not None)}


# ---- what it becomes -----------------------------------------------------------------------------

CASES = {  # parameters, second moments, extra averages, pulls -> bytes for each parameter
    (FLOAT32, FLOAT32, 0, True): 24,
    (FLOAT32, FLOAT32, 1, True): 32,
    (FLOAT32, None, 0, True): 20,
    (FLOAT32, None, 0, False): 12,
    (BFLOAT16, BFLOAT16, 0, True): 16,
    (FLOAT64, FLOAT64, 0, True): 48,
}


def take(dtype, of_v, extra, pulls, **numbers):
    from paceline.kernels import gpu

    slots = [
        x._replace(extra=x.extra[:extra], second_moment=x.second_moment if of_v else None)
        for x in moved(dtype, of_v or dtype)
    ]
    slots = slots if pulls else [x._replace(before=None) for x in slots]
    gpu.follow(slots, PULL._replace(extra_weights=(0.1,) * extra, **numbers))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_it_moves_the_floors_bytes_in_wide_words_and_spills_nothing(
    target, case, compiled, tmp_path
):
    from paceline.kernels import gpu

    made = compiled(target)
    take(*case)
    (kernel,) = made
    if target == "gfx942":
        assert not spills(kernel)
        return
    wide, each = vector_widths(kernel), gpu.BLOCK // gpu.THREADS
    assert sum(wide) == each * CASES[case]
    assert set(wide) <= {16, each * case[0].itemsize}
    used = resources(kernel, tmp_path)
    assert used["STACK"] == used["LOCAL"] == "0"
    assert int(used["REG"]) <= {FLOAT32: 56, BFLOAT16: 56, FLOAT64: 72}[case[0]]


def test_no_number_has_it_compiled_anew(compiled):
    made = compiled("sm_90")
    for numbers in ({}, {"gain": 1.0, "weight": 0.0, "clip": False}, {"gain": torch.tensor(0.1)}):
        take(FLOAT32, FLOAT32, 0, True, **numbers)
    assert len(made) == 1
