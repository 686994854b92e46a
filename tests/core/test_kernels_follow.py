"""The pull after another optimizer's step, in one pass: beside NumPy and torch."""

import copy
import sys

import numpy as np
import pytest
import torch
from pulled import AVERAGE, OWN, adamw, give, params_of, sgd
from reference import Followed
from torch.nn import Parameter

from paceline import PACE, Pullback, kernels
from paceline.averaging import PowerEMA
from paceline.kernels import cpu
from paceline.update import MovedSlot, PullScalars, pull_

SHAPES = [(150, 151), (7,), (), (0,), (64, 64)]
FLOAT32, BFLOAT16, FLOAT64 = torch.float32, torch.bfloat16, torch.float64
DTYPES = [  # of parameters, of second moments
    (FLOAT32, FLOAT32),
    (FLOAT32, BFLOAT16),
    (BFLOAT16, FLOAT32),
    (BFLOAT16, BFLOAT16),
    (FLOAT64, FLOAT64),
]
PULL = PullScalars(
    0.3, root_bias2=0.4, eps=1e-3, clip=True, weight=0.2, extra_weights=(0.7, 0.0, 0.4)
)
RULES = {
    "pull": {},
    "clip off": {"clip": False, "gain": 2.0},
    "clipped": {"gain": 50.0},
    "uniform": {"second_moment": None},
    "watching": {"before": None, "second_moment": None},
    "seldom": {"weight": 0.0},
}


def moved(dtype, of_v, seed=0, **without):
    generator = torch.Generator().manual_seed(seed)

    def some(shape, dtype):
        return torch.randn(shape, generator=generator).to(dtype)

    wide = torch.promote_types(dtype, FLOAT32)
    return [
        MovedSlot(
            some(shape, dtype),
            some(shape, wide),
            some(shape, dtype),
            some(shape, of_v).abs(),
            tuple(some(shape, wide) for _ in range(3)),
        )._replace(**without)
        for shape in SHAPES
    ]


def by_hand(x, pull):
    """The formulas in float64."""
    theta, average, before, v = (None if y is None else y.double().numpy() for y in x[:4])
    if before is not None:
        gain = pull.gain if v is None else pull.gain / (np.sqrt(v) / pull.root_bias2 + pull.eps)
        gain = np.minimum(gain, 1.0) if pull.clip else gain
        theta = theta + gain * (average - before)
        theta = torch.as_tensor(theta).to(x.param.dtype).double().numpy()  # as it is stored
    extra = [y.double().numpy() for y in x.extra]
    weights = (pull.weight, *pull.extra_weights)
    return theta, [a + w * (theta - a) for w, a in zip(weights, (average, *extra), strict=True)]


def close(x, exact, dtype, flips):
    """To rounding; where weights are bfloat16, some few of them go the other way."""
    exact = torch.as_tensor(exact)
    if not x.numel():
        return True
    off = (x.double() - exact).abs()
    unit = torch.finfo(dtype).eps * max(1.0, float(exact.abs().max()))
    return float((off > 20 * unit).double().mean()) <= (0.01 if flips else 0.0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("dtype", "of_v"), DTYPES, ids=str)
def test_it_is_the_formula_and_torchs_operations(dtype, of_v, rule, kernel):
    without = {k: x for k, x in RULES[rule].items() if k in MovedSlot._fields}
    pull = PULL._replace(**{k: x for k, x in RULES[rule].items() if k in PullScalars._fields})
    slots = moved(dtype, of_v, **without)
    others, start = copy.deepcopy(slots), copy.deepcopy(slots)
    cpu.follow(slots, pull)
    pull_(others, pull)
    wide = torch.promote_types(dtype, FLOAT32)
    for x, y, old in zip(slots, others, start, strict=True):
        theta, averages = by_hand(old, pull)
        flips = dtype == BFLOAT16
        for theirs in (theta, y.param.double().numpy()):
            assert close(x.param, theirs, wide, flips)
        for own, exact, torchs in zip(
            (x.average, *x.extra), averages, (y.average, *y.extra), strict=True
        ):
            assert close(own, exact, wide, flips)
            assert close(own, torchs.double().numpy(), wide, flips)
        assert torch.equal(x.extra[1], old.extra[1])  # of weight 0
        if "weight" in RULES[rule]:
            assert torch.equal(x.average, old.average)
        if x.before is not None:
            assert torch.equal(x.before, old.before)
        if x.second_moment is not None:
            assert torch.equal(x.second_moment, old.second_moment)


def test_no_gain_is_no_pull_and_a_nan_stays_one(kernel):
    (x, *_) = moved(FLOAT32, FLOAT32)
    x.average.fill_(float("inf"))
    before = x.param.clone()
    cpu.follow([x], PULL._replace(gain=0.0, weight=0.0))
    assert torch.equal(x.param, before)
    x.average.zero_()
    x.second_moment[0, 3] = float("nan")
    cpu.follow([x], PULL)
    assert x.param.isnan().nonzero().tolist() == [[0, 3]]


def test_threads_change_nothing(kernel, monkeypatch):
    threads, ends = torch.get_num_threads(), []
    monkeypatch.setattr("test_kernels_follow.SHAPES", [(700, 1000), (3,)])
    try:
        for count, openmp in ((1, cpu._openmp()), (2, cpu._openmp()), (3, None)):
            torch.set_num_threads(count)
            monkeypatch.setattr(cpu, "_openmp", lambda found=openmp: found)
            slots = moved(FLOAT32, FLOAT32)
            cpu.follow(slots, PULL)
            ends.append([y for x in slots for y in (x.param, x.average, *x.extra)])
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, ends[0], ends[1]))
    assert all(map(torch.equal, ends[0], ends[2]))


# ---- who takes it --------------------------------------------------------------------------------


@pytest.fixture
def taken(monkeypatch):
    """How many tensors each call of the kernel had."""
    calls, follow = [], cpu.follow
    monkeypatch.setattr(kernels, "WORTH_BUILDING", 100)
    monkeypatch.setattr(
        cpu, "follow", lambda slots, pull: calls.append(len(slots)) or follow(slots, pull)
    )
    return calls


@pytest.mark.parametrize("gain", ["own", "scalar"])
def test_around_sgd_it_is_the_reference(gain, taken, kernel):
    rule = {"gain": gain, "pullback": 0.7}
    params = params_of((50, 80), (), (0,), (3,))
    opt = Pullback(sgd(params), averaging=PowerEMA(0.5), **rule)
    refs = [Followed(p.detach().double().numpy(), **rule) for p in params]
    for step in range(8):
        opt.param_groups[0]["lr"] = lr = 0.1 / (1 + step / 10)
        give(params, step)
        for p, ref in zip(params, refs, strict=True):
            ref.step(p.grad.double().numpy(), lr)
        opt.step()
        for p, ref in zip(params, refs, strict=True):
            np.testing.assert_allclose(p.detach(), ref.theta, atol=3e-6, rtol=3e-6)
            np.testing.assert_allclose(opt.state[p][AVERAGE], ref.average, atol=3e-6, rtol=3e-6)
            assert (OWN in opt.state[p]) == (gain == "own")
    assert taken == [4] * 8


@pytest.mark.parametrize("c", [0.0, 3.0])
def test_around_adamw_it_is_pace(c, taken, kernel):
    ends = []
    for around in (True, False):
        params = params_of((40, 50), (7,))
        options = {"pullback": c, "returns": "slow=ema:kappa=0.7"}
        opt = Pullback(adamw(params), **options) if around else PACE(params, lr=0.05, **options)
        for step in range(8):
            give(params, step)
            opt.step()
        states = [opt.state[p] for p in params]
        ends.append([*params, *(s[k] for s in states for k in (AVERAGE, "return_slow"))])
    assert taken == [2] * 8
    for x, y in zip(*ends, strict=True):
        torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-6)


def test_what_it_cannot_follow_goes_through_torch(taken, kernel):
    strided = Parameter(params_of((40, 50))[0].detach().t())
    half = params_of((40, 50), dtype=torch.float16)[0]
    dense = params_of((40, 50))[0]
    for params, options, expected in (
        ([strided, dense], {}, []),
        ([half], {}, []),
        ([dense], {"track_stats": True}, []),
        (params_of((9,)), {}, []),  # not worth it
        ([dense], {}, [1]),
    ):
        taken.clear()
        opt = Pullback(sgd(params), pullback=0.3, gain="scalar", **options)
        give(params, 0)
        opt.step()
        assert taken == expected, options


ALIKE = {  # what a kernel cannot follow, made from what it can
    "as they are": lambda x, y: [x, y],
    "of two kinds": lambda x, y: [x, y._replace(second_moment=y.second_moment.bfloat16())],
    "one is not pulled": lambda x, y: [x, y._replace(before=None)],
    "a second moment of another dtype": lambda x, y: [
        s._replace(second_moment=s.second_moment.double()) for s in (x, y)
    ],
    "float16": lambda x, y: [s._replace(param=s.param.half()) for s in (x, y)],
    "another device": lambda x, y: [
        s._replace(**{name: getattr(s, name).to("meta") for name in s._fields[:4]}, extra=())
        for s in (x, y)
    ],
    "a strided average more": lambda x, y: [
        x,
        y._replace(extra=(*y.extra[:2], y.extra[2].t().contiguous().t())),
    ],
    "a sparse one": lambda x, y: [x, y._replace(before=y.before.to_sparse())],
    "a negated one": lambda x, y: [
        x,
        y._replace(average=torch._neg_view(y.average)),
    ],
}


@pytest.mark.parametrize("case", ALIKE)
def test_tensors_that_a_kernel_can_follow_are_alike_and_in_one_piece(case, kernel, monkeypatch):
    x, y = (moved(FLOAT32, FLOAT32)[i] for i in (0, 4))
    slots = ALIKE[case](x, y)
    assert kernels._can_follow(slots) == (case == "as they are")
    monkeypatch.setattr(cpu, "available", lambda: False)
    assert not kernels._can_follow(slots)


@pytest.mark.parametrize("of_v", [FLOAT32, BFLOAT16, None])
@pytest.mark.parametrize("pulls", [True, False])
def test_a_gpu_is_asked_for_just_what_it_will_follow(of_v, pulls, monkeypatch):
    asked = []
    monkeypatch.setattr(kernels, "device_kind", lambda device: "gpu")
    monkeypatch.setattr(kernels, "_fault_of_follow", lambda *kind: asked.append(kind))
    slots = [
        x._replace(
            second_moment=x.second_moment if of_v else None, before=x.before if pulls else None
        )
        for x in moved(FLOAT32, of_v or FLOAT32)
    ]
    assert kernels._can_follow(slots)
    assert asked == [(torch.device("cpu"), FLOAT32, of_v, 3, pulls)]
    monkeypatch.setattr(kernels, "capturing", lambda device: True)
    assert not kernels._can_follow(slots)
    assert len(asked) == 1


def test_without_triton_a_gpu_is_followed_by_torch(monkeypatch):
    monkeypatch.setattr(kernels, "device_kind", lambda device: "gpu")
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "paceline.kernels.gpu", raising=False)
    monkeypatch.delattr(kernels, "gpu", raising=False)
    kernels._fault_of_follow.cache_clear()
    kernels._warn.cache_clear()
    with pytest.warns(UserWarning, match=r"slower: .*triton.*; pip install 'paceline\[gpu\]'$"):
        assert not kernels._can_follow(moved(FLOAT32, FLOAT32))
    assert not kernels._can_follow(moved(FLOAT32, FLOAT32))  # says it once
    kernels._fault_of_follow.cache_clear()
    kernels._warn.cache_clear()


def test_the_copy_of_the_weights_is_kept_only_while_there_is_a_pull(taken, kernel):
    params = params_of((40, 50), (7,))
    opt = Pullback(sgd(params), pullback=0.3, gain="scalar")
    held = []
    for step in range(3):
        give(params, step)
        opt.step()
        held.append([x.data_ptr() for x in opt._copies.values()])
    assert [len(x) for x in held] == [0, 2, 2]  # at the first step averages may keep it
    assert held[1] == held[2]
    assert not set(held[2]) & {x.data_ptr() for p in params for x in opt.state[p].values()}
    assert not copy.deepcopy(opt)._copies
    opt.param_groups[0]["pullback"] = 0.0
    opt.step()
    assert not opt._copies
