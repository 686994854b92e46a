"""The kernel of accelerators, without one: what it computes, in Triton's interpreter, and what it
becomes, from Triton's compiler. Both run on the CPU (tests/tritons.py).
"""

import copy
import importlib.util
import re
import warnings
from unittest.mock import patch

import pytest
import torch
from problems import pace_options
from reference import Reference
from test_kernels import DTYPES
from torch.nn import Parameter
from tritons import resources, spills

from paceline import EMA, PACE, PowerEMA, kernels
from paceline.kernels import Eager, cpu
from paceline.update import MovedSlot, PullScalars, Scalars, Slot

pytestmark = pytest.mark.skipif(
    not importlib.util.find_spec("triton"), reason="triton is not installed (extra `gpu`)"
)

FLOAT32, BFLOAT16, FLOAT64 = torch.float32, torch.bfloat16, torch.float64
SHAPES = [(3, 350), (1024,), (0,), (7,), ()]  # a whole chunk and a tail, or one of them, or none
RETURNS = {"slow": PowerEMA(0.7), "seldom": EMA(0.5, every=3)}
RULES = {  # the reference's options
    "power": {"pullback": 0.3, "ema_power": 0.5},
    "strong": {"pullback": 50.0, "ema_power": 0.3},
    "clip off": {"pullback": 2.0, "ema_power": 0.3, "clip": False},
    "seldom": {"pullback": 0.5, "ema_power": 0.7, "ema_start": 3, "ema_every": 3},
    "uniform": {"pullback": 0.3, "gain": "scalar", "ema_power": 0.3},
    "watching": {"pullback": 0.0, "ema_power": 0.2},
}


# ---- what it computes ----------------------------------------------------------------------------


def trainer(shapes, dtype, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    params = [Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    return params, PACE(params, **{"lr": 0.05, "pullback": 0.3, **options})


def give(params, t):
    generator = torch.Generator().manual_seed(1000 + t)
    for p in params:
        p.grad = (1 + torch.randn(p.shape, generator=generator)).to(p.dtype)


def as_a_gpu():
    """The CPU, by Triton's interpreter, stands for a GPU."""
    return patch.object(kernels, "device_kind", lambda device: "gpu")


def step(opt):
    """With the kernel of GPUs where PACE would take the CPU's."""
    with as_a_gpu():
        opt.step()


def flat(params, opt, key):
    """The parameters, or a tensor of their state, in float64."""
    tensors = params if key == "param" else [opt.state[p][key] for p in params]
    return torch.cat([x.detach().double().reshape(-1) for x in tensors])


def steps_as_the_others(dtype, state_dtype, stochastic, rule):
    """At each step: the CPU's kernel, torch operations, and the reference with this arithmetic."""
    options = {"state_dtype": state_dtype, "stochastic_round": stochastic, "returns": RETURNS}
    options |= pace_options(RULES[rule]) | {"maximize": rule == "strong", "weight_decay": 0.1}
    params, opt = trainer(SHAPES, dtype, fused=True, **options)
    others = [trainer(SHAPES, dtype, fused=fused, **options) for fused in (True, False)]
    refs = [Reference(p.detach().double(), weight_decay=0.1, **RULES[rule]) for p in params]
    returned = {f"return_{name}": flat(params, opt, "param") for name in RETURNS}
    for t in range(1, 7):
        lr = 0.0 if t == 1 else 0.05 * (1 - t / 20)  # no pull at first, as in a warm-up
        for given, optimizer in ((params, opt), *others):
            give(given, t)
            optimizer.param_groups[0]["lr"] = lr
        step(opt)
        state = opt.state[params[0]]
        tensors = {"param": params[0], **state}
        tensors = {key: x.dtype for key, x in tensors.items() if key not in ("step", "idle_steps")}
        rounded = BFLOAT16 in tensors.values()
        if "offset" in tensors:  # a swap gives the weights back (paceline.swap)
            x, d = ([x.float() for x in params], [opt.state[p]["offset"] for p in params])
            assert all(torch.equal((a + b) - b, a) for a, b in zip(x, d, strict=True))
        for given, optimizer in others:
            optimizer.step()
            for key, kept_as in tensors.items():
                x, y = flat(params, opt, key), flat(given, optimizer, key)
                off, unit = (x - y).abs(), torch.finfo(kept_as).eps * y.abs().max()
                if not rounded:
                    assert off.max() <= 20 * unit, key
                elif kept_as == BFLOAT16:
                    assert off.max() <= 4 * unit, key
                    assert (off > 0).double().mean() < 0.02, key
                else:  # a rounding that went the other way, seldom
                    assert off.mean() < 20 * unit, key
            assert [opt.state[p]["step"] for p in params] == [t] * len(params)
        for average, kept_by in zip(returned.values(), RETURNS.values(), strict=True):
            average += kept_by.weight(t) * (flat(params, opt, "param") - average)
        exact = dict(returned)
        if not rounded:
            for p, ref in zip(params, refs, strict=True):
                ref.step((-p.grad if options["maximize"] else p.grad).numpy(), lr)
            names = {"param": "theta", "average": "ema", "exp_avg": "m", "exp_avg_sq": "v"}
            for key, name in names.items():
                exact[key] = torch.cat([torch.tensor(getattr(x, name)).reshape(-1) for x in refs])
        for key, y in exact.items():
            x, unit = flat(params, opt, key), torch.finfo(tensors[key]).eps * y.abs().max()
            assert (x - y).abs().max() <= 20 * unit, key


@pytest.mark.parametrize(
    ("dtype", "state_dtype", "stochastic", "rule"),
    [
        (*dtypes, rule)
        for dtypes in DTYPES
        for rule in (RULES if dtypes in (DTYPES[0], DTYPES[4]) else ("power", "strong"))
    ],
    ids=str,
)
def test_every_step_is_the_cpu_kernels_and_the_references(
    dtype, state_dtype, stochastic, rule, interpreted, kernel
):
    interpreted(steps_as_the_others, dtype, state_dtype, stochastic, rule)


def slots_of(shapes, dtype, state_dtype, *, start=0, extra=1, seed=0):
    """Tensors in the middle of a training, and counts for them."""
    generator = torch.Generator().manual_seed(seed)

    def some(shape, dtype, scale=1.0):
        return (scale * torch.randn(shape, generator=generator)).to(dtype)

    wide, offset = torch.promote_types(dtype, FLOAT32), state_dtype.itemsize < dtype.itemsize
    slots = [
        Slot(
            some(shape, dtype),
            None,
            some(shape, state_dtype),
            some(shape, state_dtype).abs(),
            some(shape, state_dtype, 0.01 if offset else 1.0),
            start=start,
            extra=tuple(some(shape, wide) for _ in range(extra)),
        )
        for shape in shapes
    ]
    return slots, [torch.zeros((), dtype=FLOAT64) for _ in slots]


def written(slots):
    return [x for s in slots for x in (s.param, s.exp_avg, s.exp_avg_sq, s.average, *s.extra)]


def bits(tensors):
    return [x.numpy().tobytes() if x.dtype != BFLOAT16 else bits([x.view(torch.int16)])[0]
            for x in tensors]  # fmt: skip


# Sums and products of few bits, the same in any order: what is left is the rounding.
EXACT = Scalars(
    *(0.5, 0.625, 1e-8),
    root_bias2=1.0,
    step_size=0.0,
    shrink=0.9375,
    gain=0.0,
    uniform_gain=False,
    clip=True,
    weight=0.5,
    maximize=False,
    stochastic=True,
    extra_weights=(0.25,),
)


def rounds_as_the_cpu(dtype, state_dtype, start, stochastic):
    from paceline.kernels import gpu

    shapes, keys = [(2500,), (3,), ()], [-(2**31), 7, 2**31 - 1]
    ends = []
    for made in (gpu.Kernel, cpu.Kernel):
        slots, counts = slots_of(shapes, dtype, state_dtype, start=start)
        for x in written(slots):
            x.copy_((64 * x).round() / 64)
        grads = [(64 * x.param).round() / 64 for x in slots_of(shapes, dtype, dtype, seed=1)[0]]
        before = bits(written(slots))
        numbers = EXACT._replace(stochastic=stochastic)
        made(slots, counts).step(grads, keys, numbers, measure=False)
        ends.append(bits(written(slots)))
    assert ends[0] == ends[1] != before


@pytest.mark.parametrize("start", [0, 2**32 - 1000, 5 * 2**32 + 3])
@pytest.mark.parametrize(
    ("dtype", "state_dtype", "stochastic"), [x for x in DTYPES if BFLOAT16 in x[:2]], ids=str
)
def test_rounding_is_the_cpu_kernels_bit_for_bit(
    dtype, state_dtype, stochastic, start, interpreted, kernel
):
    """Also of shards, which begin somewhere in their parameters, and of ties to nearest."""
    interpreted(rounds_as_the_cpu, dtype, state_dtype or FLOAT32, start, stochastic)


def holds_what_is_not_finite(dtype, state_dtype):
    from paceline.kernels import gpu

    shapes = [(1030,), (5,)]
    limit = torch.finfo(torch.promote_types(dtype, FLOAT32)).max ** 0.5
    bad = [float("nan"), float("inf"), -float("inf"), 1.01 * limit]
    slots, counts = slots_of(shapes, dtype, state_dtype)
    grads = [torch.ones_like(x.param) for x in slots]
    held = [(0, 3), (0, 1026), (0, 1029), (1, 4)]
    for (i, k), value in zip(held, bad, strict=True):
        grads[i][k] = value
    before = copy.deepcopy(slots)
    numbers = EXACT._replace(step_size=0.1, gain=0.1, skip_nonfinite=True, stochastic=False)
    made = gpu.Kernel(slots, counts)
    for _ in range(2):
        (found,) = made.step(grads, [1, 2], numbers, measure=False)
        assert found["skipped"].item() == 4
    moved = [torch.ones_like(x.param, dtype=torch.bool) for x in slots]
    for i, k in held:
        moved[i][k] = False
    for i, (x, old) in enumerate(zip(slots, before, strict=True)):
        for a, b in zip(written([x]), written([old]), strict=True):
            assert torch.equal(a[~moved[i]], b[~moved[i]])
        assert (x.param != old.param)[moved[i]].double().mean() > 0.9
    # A weight where the device says so skips the step, and no other does.
    before = bits(written(slots))
    for skip in (True, False):
        (found,) = made.step(
            grads, [1, 2], numbers._replace(skip_nonfinite=torch.tensor(skip)), measure=False
        )
        assert not found
        assert (bits(written(slots)) == before) == skip
        assert [x.item() for x in counts] == [2.0 if skip else 3.0] * 2
    assert slots[0].param[3].isnan()


@pytest.mark.parametrize(
    "dtypes",
    [(FLOAT32, FLOAT32), (FLOAT32, BFLOAT16), (BFLOAT16, BFLOAT16), (FLOAT64, FLOAT64)],
    ids=str,
)
def test_coordinates_that_are_not_finite_keep_their_bits(dtypes, interpreted):
    interpreted(holds_what_is_not_finite, *dtypes)


def leaves_the_average(dtype, state_dtype):
    from paceline.kernels import gpu

    slots, counts = slots_of([(1030,)], dtype, state_dtype)
    for x in (slots[0].average, slots[0].extra[0]):
        x.fill_(float("inf"))
    before = bits([slots[0].average, slots[0].extra[0]])
    numbers = EXACT._replace(weight=0.0, extra_weights=(0.0,), stochastic=False)
    gpu.Kernel(slots, counts).step([torch.ones_like(slots[0].param)], [1], numbers, measure=False)
    assert slots[0].param.isfinite().all()
    assert bits([slots[0].average, slots[0].extra[0]]) == before


@pytest.mark.parametrize("dtypes", [(FLOAT32, FLOAT32), (BFLOAT16, BFLOAT16)], ids=str)
def test_a_gain_or_weight_of_zero_is_none(dtypes, interpreted):
    interpreted(leaves_the_average, *dtypes)


def keeps_nans(pattern):
    from paceline.kernels import gpu

    slots, counts = slots_of([(2000,)], FLOAT32, BFLOAT16)
    grad = torch.full((2000,), pattern, dtype=torch.int32).view(FLOAT32)
    gpu.Kernel(slots, counts).step([grad], [5], EXACT._replace(stochastic=False), measure=False)
    assert slots[0].exp_avg.isnan().all()
    assert slots[0].exp_avg_sq.isnan().all()


@pytest.mark.parametrize("pattern", [0x7FFFFFFF, -1, 0x7FC00000])
def test_noise_carries_no_nan_over_to_zero(pattern, interpreted):
    """NVIDIA's own NaN is the first of these."""
    interpreted(keeps_nans, pattern)


def takes_numbers_that_are_on_the_device(state_dtype):
    from paceline.kernels import gpu

    ends, launches = [], []

    class Launched:
        def __getitem__(self, grid):
            launches.append(grid)
            return launch[grid]

    launch = gpu._step
    for path in ("kernel", "torch"):
        lr = torch.tensor(0.05)
        options = {"capturable": True, "fused": path == "kernel", "state_dtype": state_dtype}
        options |= {"returns": RETURNS}
        params, opt = trainer([(300,), (7,), (2000,)], FLOAT32, lr=lr, nonfinite="skip", **options)
        with as_a_gpu():
            for t in range(4):
                give(params, t)
                if t < 2:
                    params[1].grad = None  # so that the counts of steps differ
                lr.mul_(0.9)
                with patch.object(gpu, "_step", Launched() if t == 3 else launch):
                    opt.step()
        keys = ("param", "exp_avg", "return_slow", "step")
        ends.append(torch.cat([flat(params, opt, key) for key in keys]))
    assert launches == [(1 + 1 + 2,)]  # one for all, though each has numbers of its own
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-4 if state_dtype else 1e-6)


@pytest.mark.parametrize("state_dtype", [None, BFLOAT16])
def test_numbers_may_be_on_the_device(state_dtype, interpreted):
    interpreted(takes_numbers_that_are_on_the_device, state_dtype)


def launches_once(count):
    from paceline.kernels import gpu

    launches, written_anew = [], []

    class Counted(gpu.Kernel):
        def _put(self, values, dtype):
            written_anew.append(len(values))
            return super()._put(values, dtype)

    class Launched:
        def __getitem__(self, grid):
            launches.append(grid)
            return launch[grid]

    launch = gpu._step
    slots, counts = slots_of([(3,)] * count, FLOAT32, FLOAT32, extra=0)
    expected = copy.deepcopy(slots)
    grads = [torch.ones(3) for _ in slots]
    numbers = EXACT._replace(step_size=0.1, stochastic=False, extra_weights=())
    with patch.object(gpu, "_step", Launched()):
        made = Counted(slots, counts)
        for _ in range(2):
            made.step(grads, None, numbers, measure=False)
    assert launches == [(count,)] * 2  # of a program for each
    # The table; then the gradients' addresses, once, and each step's numbers.
    assert written_anew == [7 * count, count, 12, 12]
    other = Eager(expected, [x.clone() for x in counts])
    for _ in range(2):
        other.step(grads, None, numbers, measure=False)
    for x, y in zip(written(slots), written(expected), strict=True):
        torch.testing.assert_close(x, y)
    assert sum(counts) == 2 * count


@pytest.mark.parametrize("count", [1, 70])
def test_all_tensors_are_one_launch(count, interpreted):
    interpreted(launches_once, count)


def launches_nothing():
    from paceline.kernels import gpu

    class Refusing:
        def __getitem__(self, grid):
            raise AssertionError("a device refuses a launch of no programs")

    with patch.multiple(gpu, _step=Refusing(), _follow=Refusing(), _swap=Refusing()):
        slots, counts = slots_of([(0,), (3, 0)], FLOAT32, FLOAT32)
        grads = [torch.ones_like(x.param) for x in slots]
        gpu.Kernel(slots, counts).step(grads, None, EXACT, measure=False)
        assert counts == [1.0, 1.0]
        pull = PullScalars(0.3, 0.4, 1e-8, clip=True, weight=0.2, extra_weights=(0.1,))
        gpu.follow([MovedSlot(x.param, x.average, extra=x.extra) for x in slots], pull)
        gpu.Swap([(x.param, x.average) for x in slots]).run(back=False)


def test_empty_tensors_are_no_launch(interpreted):
    interpreted(launches_nothing)


def takes_strided_gradients():
    from paceline.kernels import gpu

    ends = []
    for strided in (False, True):
        slots, counts = slots_of([(30, 40)], FLOAT32, FLOAT32)
        g = torch.randn(30, 40, generator=torch.Generator().manual_seed(0))
        g = g.t().contiguous().t() if strided else g
        gpu.Kernel(slots, counts).step([g], None, EXACT, measure=False)
        ends.append(bits(written(slots)))
    assert ends[0] == ends[1]


def test_a_strided_gradient_is_no_obstacle(interpreted):
    interpreted(takes_strided_gradients)


def steps_far_elements():
    from paceline.kernels import gpu

    chunk = 2**32 // gpu.BLOCK + 3
    far = chunk * gpu.BLOCK
    ends = []
    for begin in (0, far):
        slots, counts = slots_of([(1500,)], FLOAT32, BFLOAT16, start=far - begin)
        grads = [torch.ones(1500)]
        made = gpu.Kernel(slots, counts)
        # Addresses move back by `begin` elements, and chunks forward: what is stepped is in memory.
        wide, narrow = 4 * begin, 2 * begin
        made.table -= torch.tensor([wide, narrow, narrow, narrow, -begin, 0, 0, wide])
        made.chunks[:, 1] += begin // gpu.BLOCK
        made.addresses = [grads[0].data_ptr()]
        made.grads = torch.tensor([grads[0].data_ptr() - wide])
        made.step(grads, [9], EXACT._replace(step_size=0.1, stochastic=False), measure=False)
        ends.append(bits(written(slots)))
    assert ends[0] == ends[1] != bits(written(slots_of([(1500,)], FLOAT32, BFLOAT16)[0]))


def test_tensors_of_more_than_four_billion_elements(interpreted):
    interpreted(steps_far_elements)


def masks(shift, which):
    from paceline.kernels import gpu

    seen, ends = [], []
    ranges = gpu._range

    def seeing(*arguments):
        seen.append(arguments[4] is not None)
        return ranges(*arguments)

    for at in (0, shift):
        slots, counts = slots_of([(2048,)], FLOAT32, FLOAT32)
        grad, (slot,) = torch.ones(2048), slots

        def shifted(x, at=at):
            return torch.cat([torch.zeros(at), x])[at:]

        if which == "grad":
            grad = shifted(grad)
        elif which == "extra":
            slot = slot._replace(extra=(shifted(slot.extra[0]),))
        else:
            slot = slot._replace(**{which: shifted(getattr(slot, which))})
        with patch.object(gpu, "_range", seeing):
            gpu.Kernel([slot], counts).step([grad], None, EXACT, measure=False)
        ends.append(bits(written([slot])))
    assert ends[0] == ends[1]
    return seen


@pytest.mark.parametrize("which", ["param", "grad", "exp_avg", "exp_avg_sq", "average", "extra"])
def test_memory_off_boundaries_of_16_bytes_is_stepped_with_a_mask(which, interpreted):
    """As gradients in a bucket of DDP's can be; loads of 16 bytes would fail there."""
    assert interpreted(masks, 1, which) == [False] * 2 + [True] * 8


# ---- who takes it --------------------------------------------------------------------------------


def chooses(made_wrong):
    """What `fused=None` and True do where the kernel works, or what is `made_wrong` of it."""
    from paceline.kernels import gpu

    class Broken:
        def __getitem__(self, grid):
            raise RuntimeError("out of resources: registers\nand more")

    def numbers(s):
        found = list(cpu.numbers(s))
        where, value = made_wrong
        found[where] = value(found[where])
        return found

    wrong = {"_step": Broken()} if made_wrong == "raises" else {"numbers": numbers}
    wrong = {} if made_wrong == "nothing" else wrong
    kernels._fault_on_gpu.cache_clear()
    kernels._warn.cache_clear()
    made, checked, fault, make = [], [], gpu.fault, gpu.Kernel
    with as_a_gpu(), pytest.MonkeyPatch.context() as change:
        change.setattr(kernels, "WORTH_BUILDING", 1000)
        for name, value in wrong.items():
            change.setattr(gpu, name, value)
        change.setattr(gpu, "Kernel", lambda *x: made.append(len(x[0])) or make(*x))
        change.setattr(gpu, "fault", lambda *x: checked.append(x) or fault(*x))
        told = []
        for _ in range(2):  # two optimizers in one process
            params, opt = trainer([(30, 40), (5,)], FLOAT32, returns=RETURNS)
            others, plain = trainer([(30, 40), (5,)], FLOAT32, returns=RETURNS, fused=False)
            for t in range(3):
                give(params, t)
                give(others, t)
                with warnings.catch_warnings(record=True) as seen:
                    warnings.simplefilter("always")
                    opt.step()
                told += [str(x.message) for x in seen]
                plain.step()
            used = bool({2} & set(made[1:]))
            same = all(map(torch.equal, params, others))
            assert same != used
            torch.testing.assert_close(params, others, rtol=1e-5, atol=1e-5)
        for small in ([(30,)], [(5,)]):  # not worth it
            made.clear()
            params, opt = trainer(small, FLOAT32)
            give(params, 0)
            opt.step()
            assert not made
        # True demands it.
        params, opt = trainer([(5,)], FLOAT32, returns=RETURNS)
        opt.param_groups[0]["fused"] = True
        give(params, 0)
        before = params[0].clone()
        raised = None
        try:
            opt.step()
        except RuntimeError as error:
            raised = str(error)
            assert torch.equal(params[0], before)
            assert not opt.state
            with pytest.raises(RuntimeError, match=re.escape(raised)):
                trainer([(5,)], FLOAT32, returns=RETURNS, fused=True)
    kernels._fault_on_gpu.cache_clear()
    kernels._warn.cache_clear()
    return used, told, raised, len(checked)


def test_the_kernel_is_taken_once_it_is_known_to_be_right(interpreted, kernel):
    used, told, raised, checked = interpreted(chooses, "nothing")
    assert used
    assert not told
    assert raised is None
    assert checked == 1  # once, whatever the number of optimizers and steps


def twice(x):
    return 2 * x


def nothing(x):
    return 0.0


def infinity(x):
    return float("inf")


@pytest.mark.parametrize(
    ("made_wrong", "reason"),
    [
        ("raises", "it failed on cpu: RuntimeError: out of resources: registers$"),
        ((0, twice), "it steps exp_avg otherwise|it steps param otherwise"),
        ((1, nothing), "it steps (param|exp_avg_sq) otherwise"),
        ((5, twice), "it steps param otherwise"),
        ((7, twice), "it steps param otherwise"),
        ((8, infinity), "it steps param otherwise"),
        ((9, nothing), "it steps average otherwise"),
        ((12, twice), "it steps an average otherwise"),
    ],
    ids=lambda x: x if isinstance(x, str) else f"{x[0]}-{x[1].__name__}",
)
def test_one_that_is_wrong_or_fails_is_not_taken(made_wrong, reason, interpreted, kernel):
    """Then it warns once, in one line, and steps as before; True raises."""
    used, told, raised, checked = interpreted(chooses, made_wrong)
    assert not used
    assert len(told) == 1
    assert re.search(f"^PACE steps without its one-pass kernel, slower: .*({reason})", told[0])
    assert re.search(f"^the GPU's one-pass kernel cannot be used: .*({reason})", raised)
    assert "\n" not in told[0] + raised
    assert checked == 1


def finds_fault(variant):
    """Of the kernel as it is, and of one that does not look at what it should."""
    from paceline.kernels import gpu

    ways = (gpu.COORDINATES, gpu._mix)
    right = gpu.fault(torch.device("cpu"), *variant)
    with patch.object(gpu, "Kernel", Careless):
        careless = gpu.fault(torch.device("cpu"), *variant)
    assert ways == (gpu.COORDINATES, gpu._mix)
    return right, careless


class Careless:
    """Torch operations that draw other noise, or hold nothing."""

    def __init__(self, slots, counts):
        self.inner = Eager(slots, counts)

    def step(self, grads, keys, s, *, measure):
        s = s._replace(skip_nonfinite=False) if s.skip_nonfinite is True else s
        return self.inner.step(grads, keys and [key + 1 for key in keys], s, measure=measure)


@pytest.mark.parametrize("skip", [True, False, None])
@pytest.mark.parametrize(("dtype", "state_dtype", "stochastic"), DTYPES, ids=str)
def test_each_form_of_it_is_compared_with_torch_operations(
    dtype, state_dtype, stochastic, skip, interpreted
):
    state_dtype = state_dtype or torch.promote_types(dtype, FLOAT32)
    variant = (dtype, state_dtype, 1, False, stochastic, skip)
    right, careless = interpreted(finds_fault, variant)
    assert right is None
    assert bool(careless) == (skip is True or stochastic or state_dtype == BFLOAT16)


def finds_little(how):
    from paceline.kernels import gpu

    class Made:
        """Torch operations, but for one thing."""

        def __init__(self, slots, counts):
            self.inner, self.slots = Eager(slots, counts), slots

        def step(self, grads, keys, s, *, measure):
            (found,) = self.inner.step(grads, keys and [0 for _ in keys], s, measure=measure)
            if how == "one element":
                self.slots[0].param[5] += 1e-3
            if how == "the count":
                found["skipped"] += 1
            return [found]

    state_dtype = BFLOAT16 if how == "the key" else FLOAT32
    with patch.object(gpu, "Kernel", Made):
        return gpu.fault(torch.device("cpu"), FLOAT32, state_dtype, 0, False, False, True)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("nothing", None),
        ("one element", "steps param otherwise"),
        ("the count", "skips other coordinates"),
        ("the key", "steps .* otherwise"),
    ],
)
def test_a_little_that_is_wrong_is_found(how, reason, interpreted):
    found = interpreted(finds_little, how)
    assert found is None if reason is None else re.search(reason, found)


def keeps_its_plan():
    from paceline.optimizer import Plan

    made = []
    params, opt = trainer([(30, 40), (5,)], FLOAT32, fused=True)
    with patch("paceline.optimizer.Plan", lambda *x: made.append(1) or Plan(*x)):
        for t in range(3):
            give(params, t)
            step(opt)
    return len(made)


def test_its_tables_are_kept_between_steps(interpreted, kernel):
    assert interpreted(keeps_its_plan) == 1


def goes_into_a_graph():
    from paceline.kernels import gpu

    copied = []

    class Watched(gpu.Kernel):
        def _put(self, values, dtype):
            if not isinstance(values, torch.Tensor):
                copied.append(not any(isinstance(x, torch.Tensor) for x in values))
            return super()._put(values, dtype)

    def in_graph(yes):
        return patch.multiple(gpu, capturing=lambda _: yes, Kernel=Watched)

    ends = []
    for watched in (True, False):
        lr = torch.tensor(0.05)
        options = {"capturable": True, "fused": watched, "state_dtype": BFLOAT16, "lr": lr}
        params, opt = trainer([(300,), (2000,)], FLOAT32, **options)
        give(params, 0)
        first = [p.grad for p in params]
        with as_a_gpu(), in_graph(False):
            opt.step()
        give(params, 1)
        copied.clear()
        with as_a_gpu(), in_graph(watched):
            opt.step()
        assert not any(copied)  # from the host, whose memory a graph would read at each replay
        for p, grad in zip(params, first, strict=True):
            p.grad = grad  # where they were
        with as_a_gpu(), in_graph(False):
            opt.step()
        assert any(copied) == watched  # what went into the graph has not been done yet
        ends.append(torch.cat([flat(params, opt, key) for key in ("param", "exp_avg")]))
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-4)


def test_a_graph_holds_the_addresses_of_its_own_gradients(interpreted):
    """What a device would do later, the interpreter does at once."""
    interpreted(goes_into_a_graph)


def begins_in_a_graph():
    kernels._fault_on_gpu.cache_clear()
    params, opt = trainer([(30, 40)], FLOAT32, capturable=True)
    give(params, 0)
    with as_a_gpu(), pytest.MonkeyPatch.context() as change, warnings.catch_warnings():
        warnings.simplefilter("error")
        change.setattr(kernels, "WORTH_BUILDING", 0)
        change.setattr(kernels, "capturing", lambda device: True)
        opt.step()  # as it did before there was a kernel
        others, demanding = trainer([(30, 40)], FLOAT32, capturable=True)
        demanding.param_groups[0]["fused"] = True
        give(others, 0)
        for opt, message in (
            (demanding, "fused=True must take a step with these tensors before"),
            (trainer([(5,)], FLOAT32)[1], r"step\(\) goes into a CUDA graph with capturable=True"),
        ):
            with pytest.raises(RuntimeError, match=f"^{message}.*; nothing was changed$"):
                opt.step()
            assert not opt.state
    return kernels._fault_on_gpu.cache_info().currsize


def test_nothing_begins_in_a_graph(interpreted):
    assert interpreted(begins_in_a_graph) == 0


# ---- what it becomes -----------------------------------------------------------------------------

CASES = {  # parameters, state, extra averages -> bytes read and written for each parameter
    (FLOAT32, FLOAT32, 0): 36,
    (FLOAT32, FLOAT32, 1): 44,
    (FLOAT32, BFLOAT16, 0): 24,
    (BFLOAT16, FLOAT32, 0): 30,
    (BFLOAT16, BFLOAT16, 0): 18,
    (FLOAT64, FLOAT64, 0): 72,
}


def take_a_step(shapes, dtype, state_dtype, extra=0, **numbers):
    from paceline.kernels import gpu

    slots, counts = slots_of(shapes, dtype, state_dtype, extra=extra)
    numbers = {"skip_nonfinite": True, "stochastic": dtype == BFLOAT16, **numbers}
    numbers = EXACT._replace(extra_weights=(0.25,) * extra, **numbers)
    grads = [x.param.clone() for x in slots]
    gpu.Kernel(slots, counts).step(grads, [1] * len(slots), numbers, measure=False)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_on_nvidia_it_moves_the_floors_bytes_in_wide_words(target, case, compiled, tmp_path):
    from paceline.kernels import gpu

    made = compiled(target)
    take_a_step([(5000,), ()], *case)
    (kernel,) = made
    ptx, each = kernel.asm["ptx"], gpu.BLOCK // gpu.THREADS
    found = re.findall(r"(@%p\d+ )?(ld|st)\.global(?:\.v(\d))?\.b(\d+)", ptx)
    # Without a mask: a whole chunk's vectors, of which a thread takes four elements; and words of
    # the tables, which are read and not written.
    wide = [int(count) * int(bits) // 8 for mask, _, count, bits in found if not mask and count]
    assert sum(wide) == each * CASES[case]
    assert set(wide) == {min(16, each * x.itemsize) for x in case[:2]}
    words = [(which, bits) for mask, which, count, bits in found if not mask and not count]
    assert set(words) == {("ld", "32"), ("ld", "64")}
    assert words.count(("ld", "32")) == 2  # a chunk's row and place
    # With a mask: each thread takes one element.
    one = [int(bits) // 8 for mask, _, count, bits in found if mask and not count]
    assert sum(one) == CASES[case]
    # Roots and quotients are rounded to nearest, numbers below the normal range are kept.
    assert not re.search(r"\.(approx|full|ftz)\b", ptx)
    assert "fma.rn" in ptx  # as on the CPU; Triton's default is to change
    # A NaN is known as one: NVIDIA's has all bits set that noise could carry over from.
    assert ("setp.num.f32" in ptx) == (BFLOAT16 in case[:2])
    assert "arith.shrsi" not in kernel.asm["ttir"]  # the hash is one of unsigned numbers

    used = resources(kernel, tmp_path)
    assert used["STACK"] == used["LOCAL"] == "0"
    assert int(used["REG"]) <= {FLOAT32: 64, BFLOAT16: 72, FLOAT64: 96}[case[0]]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_amd_nothing_is_spilled(case, compiled):
    made = compiled("gfx942")
    take_a_step([(5000,), ()], *case)
    (kernel,) = made
    assert not spills(kernel)
    assert "buffer_load_dwordx4" in kernel.asm["amdgcn"] or case[:2] == (BFLOAT16, BFLOAT16)


def test_no_number_shape_or_count_has_it_compiled_anew(compiled):
    made = compiled("sm_90")
    for shapes in ([(3,)], [(16, 1024)], [(5,), (1024,), (), (0,), (99,)], [(2,)] * 300):
        for numbers in (
            {"step_size": 0.1, "gain": 0.3},
            {"step_size": 1.0, "weight": 0.0, "shrink": 1.0, "clip": False, "maximize": True},
            {"step_size": torch.tensor(0.3), "root_bias2": torch.tensor(0.5, dtype=FLOAT64)},
        ):
            take_a_step(shapes, FLOAT32, FLOAT32, **numbers)
    assert len(made) == 1
    take_a_step([(3,)], FLOAT32, FLOAT32, uniform_gain=True)  # an option of the group's
    assert len(made) == 2
