"""The swap of live weights and average in one pass: beside torch operations, bit for bit."""

import pytest
import torch
from pulled import adamw, give, params_of
from torch.nn import Parameter

from paceline import PACE, Pullback, kernels, swap
from paceline.kernels import cpu
from paceline.kernels.cpu import Swap
from paceline.swap import swap_back, swap_in, swap_pair_

FLOAT32, BFLOAT16, FLOAT64 = torch.float32, torch.bfloat16, torch.float64
SHAPES = [(150, 151), (7,), (), (0,), (64, 64)]
DTYPES = [*cpu.DTYPES]  # of parameters, of averages
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def some_pairs(dtype, of_average, shapes, seed=0):
    """Any bits, NaNs among them, where they trade places; offsets that a swap gives back."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for shape in shapes:
        if of_average.itemsize < dtype.itemsize:
            param = torch.randn(shape, generator=generator).to(dtype)
            d = (0.01 * torch.randn(shape, generator=generator)).to(of_average)
            made.append(((param + d) - d, d))
            continue
        pair = []
        for kind in (dtype, of_average):
            whole = torch.randint(-(2**63), 2**63 - 1, (*shape, 1), generator=generator)
            bits = whole.view(BITS[kind.itemsize])[..., :1].reshape(shape).clone()
            pair.append(bits.view(kind))
        if dtype != of_average:  # whose NaN comes back as some NaN, elsewhere in each conversion
            pair[1].nan_to_num_(0.5)
        made.append(tuple(pair))
    return made


def bits(pairs):
    return [x.detach().view(BITS[x.itemsize]).clone() for pair in pairs for x in pair]


def same(one, other):
    return all(map(torch.equal, one, other))


@pytest.fixture
def taken(monkeypatch, kernel):
    """How many pairs each kernel had."""
    calls, made = [], cpu.Swap
    monkeypatch.setattr(kernels, "WORTH_BUILDING", 100)
    monkeypatch.setattr(cpu, "Swap", lambda pairs: calls.append(len(pairs)) or made(pairs))
    return calls


@pytest.mark.parametrize(("dtype", "of_average"), DTYPES, ids=str)
def test_it_is_torchs_operations_there_and_back(dtype, of_average, taken):
    pairs = some_pairs(dtype, of_average, SHAPES)
    others = some_pairs(dtype, of_average, SHAPES)
    before = bits(pairs)
    swap_in(pairs)
    for pair in others:
        swap_pair_(*pair, back=False)
    assert same(bits(pairs), bits(others))
    assert not same(bits(pairs), before)
    swap_back(pairs)
    assert same(bits(pairs), before)
    assert taken == [len(SHAPES)] * 2
    for pair in others:
        swap_pair_(*pair, back=True)
    assert same(bits(others), before)


def test_either_undoes_the_other(taken):
    for dtype, of_average in DTYPES:
        pairs = some_pairs(dtype, of_average, SHAPES)
        before = bits(pairs)
        for ways in ((True, False), (False, True)):
            swap_in(pairs, fused=ways[0])
            swap_back(pairs, fused=ways[1])
            assert same(bits(pairs), before)
    assert taken == [len(SHAPES)] * 2 * len(DTYPES)


def test_threads_and_pieces_change_nothing(taken, monkeypatch):
    threads = torch.get_num_threads()
    pairs = some_pairs(BFLOAT16, FLOAT32, [(700, 1000), (3,)])
    ends, before = [], bits(pairs)
    try:
        for count, openmp in ((1, cpu._openmp()), (2, cpu._openmp()), (3, None)):
            torch.set_num_threads(count)
            monkeypatch.setattr(cpu, "_openmp", lambda found=openmp: found)
            swap_in(pairs)
            ends.append(bits(pairs))
            swap_back(pairs)
            assert same(bits(pairs), before)
    finally:
        torch.set_num_threads(threads)
    assert same(ends[0], ends[1])
    assert same(ends[0], ends[2])


@pytest.mark.parametrize("state_dtype", [None, BFLOAT16], ids=str)
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT64], ids=str)
def test_pace_puts_the_same_weights_in_and_out(dtype, state_dtype, taken):
    """Each average by its name: offsets and further averages, too."""
    if (dtype, state_dtype) == (FLOAT64, BFLOAT16):
        return
    ends = []
    for fused in (True, False):
        params = params_of((40, 50), (7,), (), dtype=dtype)
        options = {"returns": "slow=ema:kappa=0.7", "state_dtype": state_dtype}
        opt = PACE(params, lr=0.05, pullback=0.3, fused=False, **options)
        for step in range(3):
            give(params, step)
            opt.step()
        opt.param_groups[0]["fused"] = fused
        live, seen = bits([params]), []
        for name in opt.returns:
            opt.eval(name)
            seen += bits([params])
            assert not same(bits([params]), live)
            opt.train()
            assert same(bits([params]), live)
        state = [x for p in params for k, x in opt.state[p].items() if k != "step" and x.ndim]
        ends.append([*seen, *bits([state])])
    assert taken == [3] * 4
    assert same(*ends)


def test_pullback_and_idle_parameters_take_it(taken):
    params = params_of((40, 50), (7,))
    opt = Pullback(adamw(params), pullback=0.3)
    for step in range(3):
        give(params, step)
        if step:
            params[1].grad = None
        opt.step()
    live, average = params[0].detach().clone(), opt.state[params[0]]["average"].clone()
    with opt.averaged():
        assert torch.equal(params[0], average)
    assert torch.equal(params[0], live)
    assert taken == [2, 2]


# ---- who takes it --------------------------------------------------------------------------------


def test_what_it_cannot_swap_goes_through_torch(taken):
    x, y = torch.randn(20, 10), torch.randn(20, 10)
    half = torch.randn(20, 10).half()
    cases = {
        "as it is": (x, y, [1]),
        "strided": (x.t(), y.t(), []),
        "its average strided": (x, y.reshape(10, 20).t(), []),
        "float16": (half, y, []),
        "negated": (torch._neg_view(torch.randn(200)), torch.randn(200), []),
        "a subclass": (x.as_subclass(type("Other", (torch.Tensor,), {})), y, []),
        "small": (torch.randn(9), torch.randn(9), []),
    }
    for name, (param, average, expected) in cases.items():
        taken.clear()
        mean = average.clone()
        swap_in([(param, average)])
        assert taken == expected, name
        torch.testing.assert_close(torch.Tensor(param.float()), mean, rtol=1e-3, atol=1e-3)


def test_what_is_not_there_raises_as_before(taken):
    """Of another shape, or freed: a kernel would read and write where it must not."""
    freed = torch.randn(400)
    freed.untyped_storage().resize_(0)
    for pair in ((torch.randn(400), torch.randn(200)), (freed, torch.randn(400))):
        for fused in (True, False):
            with pytest.raises(RuntimeError):
                swap_in([pair], fused=fused)
    assert not taken


def test_a_swap_alone_builds_no_kernel_and_false_does_without(taken, monkeypatch):
    pairs = some_pairs(FLOAT32, FLOAT32, [(400,)])
    before = bits(pairs)
    with monkeypatch.context() as change:
        change.setattr(cpu, "is_built", lambda: False)
        swap_in(pairs)
    swap_back(pairs, fused=False)
    assert same(bits(pairs), before)
    assert not taken
    assert cpu.is_built()
    cpu.build.cache_clear()
    assert not cpu.is_built()
    cpu.build()


def test_pairs_are_swapped_with_those_of_their_kind(taken):
    pairs = [
        x for dtypes in DTYPES[:3] for seed in range(2) for x in some_pairs(*dtypes, [(300,)], seed)
    ]
    pairs.insert(3, (torch.randn(300).half(), torch.randn(300)))
    expected = [(x.clone(), y.clone()) for x, y in pairs]
    swap_in(pairs)
    for pair in expected:
        swap_pair_(*pair, back=False)
    assert same(bits(pairs), bits(expected))
    assert taken == [2, 2, 2]


def test_other_devices_are_left_alone(taken):
    here, there = (torch.randn(300) for _ in range(2)), (torch.empty(300, device="meta"),) * 2
    pairs = [tuple(here), there, (torch.randn(300), there[0])]
    made, others = kernels.swaps(pairs)
    assert [x.pairs for x in made] == [pairs[:1]]
    assert all(x is y for x, y in zip(others, pairs[1:], strict=True))


# ---- all or nothing ------------------------------------------------------------------------------


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("moment", ["before", "after", "the others", "the record"])
def test_an_interrupt_leaves_everything_as_it_was(moment, back, taken, monkeypatch):
    pairs = [x for dtypes in DTYPES for x in some_pairs(*dtypes, SHAPES)]
    pairs.append((torch.randn(300).half(), torch.randn(300)))
    group = {swap.SWAPPED: "as it was"}
    if back:
        swap_in(pairs)
    before, runs, failed = bits(pairs), [], []
    by_torch, run = swap.swap_pair_, Swap.run

    def interrupted(self, *, back):
        runs.append(1)
        if moment == "before" and len(runs) == 2:
            raise KeyboardInterrupt
        run(self, back=back)
        if moment == "after" and len(runs) == 2:
            raise KeyboardInterrupt

    def fails(param, average, *, back):
        if moment == "the others" and not failed:
            failed.append(1)
            raise KeyboardInterrupt
        by_torch(param, average, back=back)

    class Refusing(dict):
        def __setitem__(self, key, value):
            super().__setitem__(key, value)
            if value == "as it is to be" and moment == "the record":
                raise KeyboardInterrupt

    group = Refusing(group)
    monkeypatch.setattr(Swap, "run", interrupted)
    monkeypatch.setattr(swap, "swap_pair_", fails)
    with pytest.raises(KeyboardInterrupt):
        (swap_back if back else swap_in)(pairs, [(group, "as it is to be")])
    assert same(bits(pairs), before)
    assert group == {swap.SWAPPED: "as it was"}


def test_autograd_notices(taken):
    """What a graph has saved of the weights was changed in place, as by torch's operations."""
    for fused in (True, False):
        p, average = Parameter(torch.randn(300)), torch.randn(300)
        loss = p.square().sum()
        with torch.no_grad():
            swap_in([(p, average)], fused=fused)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    assert taken == [1]
