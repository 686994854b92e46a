"""The kernel of accelerators: PACE in one pass over memory, one launch for all tensors, in Triton.

As cpu.cpp it writes the rule of update.py once more. What changes from step to step (rate, weights,
sizes, number of tensors) is read from memory, so that nothing of it has anything compiled anew.
"""

import functools
import itertools
import operator
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..swap import swap_pair_
from ..update import MovedSlot, PullScalars, Scalars, Slot, count_, pull_
from . import Eager, capturing
from .cpu import numbers, pull_numbers

BLOCK = 1024  # elements of a chunk, which one program steps
THREADS = 256  # of a program: each takes 4 elements, 16 bytes of float32
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float64: tl.float64}
# A row of the table: the addresses of these; how many elements; the first one's place within its
# parameter; the bits that are set in any address. The extra averages' addresses follow.
PARAM, EXP_AVG, EXP_AVG_SQ, AVERAGE, SIZE, START, ADDRESSES, ROW = map(tl.constexpr, range(8))
# The step's numbers, as `cpu.numbers` gives them. The extra averages' weights follow.
W1, BETA2, W2, EPS, UNBIAS, STEP_SIZE, SHRINK, GAIN, CAP, WEIGHT, SIGN, SKIP, NUMBERS = map(
    tl.constexpr, range(13)
)
# The same of what another optimizer has moved, whose parameter stands at PARAM, too; its numbers.
MOVED_AVERAGE, BEFORE, SECOND_MOMENT, MOVED_SIZE, MOVED_ADDRESSES, MOVED_ROW = map(
    tl.constexpr, range(1, 7)
)
PULL_GAIN, PULL_UNBIAS, PULL_EPS, PULL_CAP, PULL_WEIGHT, PULL_NUMBERS = map(tl.constexpr, range(6))
# And of a pair that trades places: the parameter's at PARAM, the average's, size, bits of both.
PAIR_AVERAGE, PAIR_SIZE, PAIR_ADDRESSES, PAIR_ROW = map(tl.constexpr, range(1, 5))
BITS = {2: tl.uint16, 4: tl.uint32, 8: tl.uint64}  # by bytes: what trades places as bits
COORDINATES, STEP = tl.constexpr(1), tl.constexpr(2)  # what the guard has stand still
LIMIT32 = tl.constexpr(torch.finfo(torch.float32).max ** 0.5)  # the largest with a finite square
LIMIT64 = tl.constexpr(torch.finfo(torch.float64).max ** 0.5)


class Kernel:
    """The kernel for some tensors; its tables of them are kept between steps.

    Args:
        slots: tensors of one device and one pair of dtypes, contiguous. Gradients and keys of
            stochastic rounding are given at each step.
        counts: of each tensor its count of steps, 0-dim float64.
    """

    def __init__(self, slots: list[Slot], counts: list[Tensor]) -> None:
        self.counts, first = counts, slots[0]
        self.device, self.extra = first.param.device, len(first.extra)
        self.dtypes = DTYPES[first.param.dtype], DTYPES[first.exp_avg.dtype]
        rows: list[int] = []
        for x in slots:
            tensors = (x.param, x.exp_avg, x.exp_avg_sq, x.average, *x.extra)
            addresses = [tensor.data_ptr() for tensor in tensors]
            bits = functools.reduce(operator.or_, addresses)
            rows += [*addresses[:4], x.param.numel(), x.start, bits, *addresses[4:]]
        self.table = self._put(rows, torch.int64)
        self.chunks = _chunks([x.param.numel() for x in slots], self.device)
        self.addresses: list[int] = []  # of the gradients
        self.grads = self.keys = self.skipped = self.table  # until a step gives others

    def step(
        self, grads: list[Tensor], keys: Any | None, s: Scalars, *, measure: bool
    ) -> list[dict[str, Any]]:
        """`update.step_` in one launch, without measurements.

        What varies from tensor to tensor in `s` is a vector on their device.
        """
        grads = [g.contiguous() for g in grads]  # kept until the launch is in the stream
        self._point_to(grads)
        if keys is not None:
            self.keys = self._put(keys, torch.int64)
        guard = STEP if isinstance(s.skip_nonfinite, Tensor) else int(s.skip_nonfinite)
        if guard == COORDINATES:
            self.skipped = torch.zeros((), dtype=torch.int64, device=self.device)
        given = self._put(numbers(s), torch.float64)
        each = given.ndim == 2
        if len(self.chunks):
            with torch.cuda.device_of(self.table):  # on the CPU, in Triton's interpreter, no device
                _step[len(self.chunks),](
                    self.chunks,
                    self.table,
                    self.grads,
                    self.keys,
                    given.t().contiguous() if each else given,
                    self.skipped,
                    *self.dtypes,
                    each=each,
                    uniform=s.uniform_gain,
                    stochastic=s.stochastic,
                    guard=guard,
                    extra=self.extra,
                    block=BLOCK,
                    tail=THREADS,
                    **_compiled_for(),
                )
        count_(self.counts, s)
        return [{"skipped": self.skipped} if s.skip_nonfinite is True else {}]

    def _point_to(self, grads: list[Tensor]) -> None:
        """Have the gradients' addresses on the device."""
        addresses = [g.data_ptr() for g in grads]
        if capturing(self.device):
            # A graph holds no copy from the host, but arguments of launches. They are written as
            # often as it is replayed, and not yet: no other step may rely on them.
            self.grads = torch.zeros(len(grads), dtype=torch.int64, device=self.device)
            torch._foreach_add_(list(self.grads.unbind()), addresses)
            self.addresses = []
        elif addresses != self.addresses:
            self.grads, self.addresses = self._put(addresses, torch.int64), addresses

    def _put(self, values: Sequence[float | Tensor] | Tensor, dtype: torch.dtype) -> Tensor:
        return _put(values, dtype, self.device)


def follow(slots: list[MovedSlot], pull: PullScalars) -> None:
    """`update.pull_` in one launch, without measurements.

    A gain of 0 is no pull: then an average that is not finite moves no weights.

    Args:
        slots: tensors alike in dtypes and in what they have, contiguous.
        pull: the numbers.
    """
    first = slots[0]
    device, v = first.param.device, first.second_moment
    pulls = first.before is not None and (isinstance(pull.gain, Tensor) or pull.gain != 0)
    rows: list[int] = []
    for x in slots:
        own = [0 if y is None else y.data_ptr() for y in x[:4]]
        extra = [y.data_ptr() for y in x.extra]
        rows += [*own, x.param.numel(), functools.reduce(operator.or_, own + extra), *extra]
    chunks = _chunks([x.param.numel() for x in slots], device)
    if len(chunks):
        with torch.cuda.device_of(chunks):
            _follow[len(chunks),](
                chunks,
                _put(rows, torch.int64, device),
                _put(pull_numbers(pull), torch.float64, device),
                DTYPES[first.param.dtype],
                DTYPES[(first.param if v is None else v).dtype],
                pulls=pulls,
                uniform=v is None,
                extra=len(first.extra),
                block=BLOCK,
                tail=THREADS,
                **_compiled_for(),
            )


class Swap:
    """Parameters and averages that trade places, as in `paceline.swap`, in one launch.

    Args:
        pairs: parameters and averages, of one device and one pair of dtypes, contiguous.
    """

    def __init__(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        self.pairs, (param, average) = pairs, pairs[0]
        device = param.device
        self.dtypes = (BITS[param.itemsize], BITS[average.itemsize])
        if average.itemsize < param.itemsize:  # an offset, which is added
            self.dtypes = (DTYPES[param.dtype], DTYPES[average.dtype])
        rows: list[int] = []
        for x, y in pairs:
            addresses = x.data_ptr(), y.data_ptr()
            rows += [*addresses, x.numel(), operator.or_(*addresses)]
        self.table = _put(rows, torch.int64, device)
        self.chunks = _chunks([x.numel() for x, _ in pairs], device)
        self.flag = torch.zeros((), dtype=torch.int32, device=device)

    @property
    def done(self) -> bool:
        """Whether they have traded places; also after an exception. Waits for the device."""
        return bool(self.flag)

    def run(self, *, back: bool) -> None:
        """Swap all of them; no Ctrl-C comes between two."""
        if len(self.chunks):
            with torch.cuda.device_of(self.table):
                _swap[len(self.chunks),](
                    self.chunks,
                    self.table,
                    self.flag,
                    *self.dtypes,
                    back=back,
                    block=BLOCK,
                    tail=THREADS,
                    **_compiled_for(),
                )


def _compiled_for() -> dict[str, Any]:
    return {"num_warps": THREADS // (64 if torch.version.hip else 32), "enable_fp_fusion": True}


def _chunks(sizes: list[int], device: torch.device) -> Tensor:
    """Of each program the row of its tensor and which chunk of that it steps, [n, 2] int32."""
    counts = [-(-size // BLOCK) for size in sizes]
    total = sum(counts)
    firsts = list(itertools.accumulate(counts, initial=0))[:-1]
    first, count = _put([*firsts, *counts], torch.int32, device).chunk(2)
    rows = torch.arange(len(counts), dtype=torch.int32, device=device)
    rows = torch.repeat_interleave(rows, count, output_size=total)
    programs = torch.arange(total, dtype=torch.int32, device=device)
    return torch.stack([rows, programs - first[rows]], dim=1)


def _put(
    values: Sequence[float | Tensor] | Tensor, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Numbers on a device, without waiting for it; it may have some of them already.

    Where some are vectors of n, the others are repeated, and n is the last dimension.
    """
    if isinstance(values, Tensor):
        return values.to(device, dtype)
    if not any(isinstance(x, Tensor) for x in values):
        made = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
        return made.to(device, non_blocking=True)
    there = (
        x.to(device, dtype)
        if isinstance(x, Tensor)
        else torch.full((), x, dtype=dtype, device=device)
        for x in values
    )
    return torch.stack(torch.broadcast_tensors(*there))


# ---- whether it can be used ---------------------------------------------------------------------


@torch.no_grad()
def fault(
    device: torch.device,
    dtype: torch.dtype,
    state_dtype: torch.dtype,
    extra: int,
    uniform_gain: bool,
    stochastic: bool,
    skip: bool | None,
) -> str | None:
    """Take one step of small tensors on a device, by the kernel and by `update.step_`.

    Returns:
        Why the kernel is not to be used there: what failed, or differs. None: nothing.
    """
    s = Scalars(
        *(0.9, 0.99, 1e-8),
        root_bias2=0.3,
        step_size=0.1,
        shrink=0.999,
        gain=0.3,
        uniform_gain=uniform_gain,
        clip=True,
        weight=0.2,
        maximize=False,
        stochastic=stochastic,
        skip_nonfinite=torch.tensor(False, device=device) if skip is None else skip,
        extra_weights=(0.1,) * extra,
    )
    rounds = stochastic or torch.bfloat16 in (dtype, state_dtype)
    try:
        ends = []
        for make in (Kernel, Eager):
            slots = [_some(n, device, dtype, state_dtype, extra) for n in (BLOCK + 5, 3)]
            counts = [torch.zeros((), dtype=torch.float64) for _ in slots]
            grads = [1.0 + x.param for x in slots]
            if skip:
                grads[0][BLOCK + 1] = float("nan")
            keys = [3, -7] if state_dtype == torch.bfloat16 or stochastic else None
            (found,) = make(slots, counts).step(grads, keys, s, measure=False)
            ends.append((slots, int(found.get("skipped", 0))))
        (slots, skipped), (expected, known) = ends
        for x, y in zip(slots, expected, strict=True):
            for name in ("param", "exp_avg", "exp_avg_sq", "average"):
                if not _agree(getattr(x, name), getattr(y, name), rounds):
                    return f"on {device} it steps {name} otherwise than torch operations do"
            if not all(_agree(*pair, rounds) for pair in zip(x.extra, y.extra, strict=True)):
                return f"on {device} it steps an average otherwise than torch operations do"
        if skipped != known:
            return f"on {device} it skips other coordinates than torch operations do"
    except Exception as error:  # of the compiler, of its tools, of the driver: we do without
        return _failed(device, error)
    return None


@torch.no_grad()
def fault_of_follow(
    device: torch.device,
    dtype: torch.dtype,
    of_v: torch.dtype | None,
    extra: int,
    pulls: bool,
) -> str | None:
    """As `fault`, of `follow` and `update.pull_`.

    Args:
        device: where to try it.
        dtype: of the parameters.
        of_v: of second moments; None: there are none.
        extra: averages besides the pull's.
        pulls: whether there is a pull.
    """
    pull = PullScalars(0.3, 0.4, 1e-8, clip=True, weight=0.2, extra_weights=(0.1,) * extra)
    wide = torch.promote_types(dtype, torch.float32)
    try:
        ends = []
        for way in (follow, pull_):
            slots = []
            for n in (BLOCK + 5, 3):
                x, y = (_some(n + i, device, dtype, wide, extra) for i in range(2))
                v = None if of_v is None else y.exp_avg_sq[:n].to(of_v)
                before = y.param[:n].clone() if pulls else None
                slots.append(MovedSlot(x.param, x.average, before, v if pulls else None, x.extra))
            way(slots, pull)
            ends.append([y for x in slots for y in (x.param, x.average, *x.extra)])
        if not all(_agree(x, y, dtype == torch.bfloat16) for x, y in zip(*ends, strict=True)):
            return f"on {device} it follows a step otherwise than torch operations do"
    except Exception as error:
        return _failed(device, error)
    return None


@torch.no_grad()
def fault_of_swap(device: torch.device, dtype: torch.dtype, of_average: torch.dtype) -> str | None:
    """As `fault`, of `Swap` and `swap.swap_pair_`, bit for bit and there and back.

    Args:
        device: where to try it.
        dtype: of the parameters.
        of_average: of the averages, or of their offsets where that is narrower.
    """
    try:
        slots = [_some(n, device, dtype, of_average, 0) for n in (BLOCK + 5, 3)]
        pairs = [(x.param, x.average) for x in slots]
        others = [(x.clone(), y.clone()) for x, y in pairs]
        made = Swap(pairs)
        for back in (False, True):
            made.run(back=back)
            for pair, other in zip(pairs, others, strict=True):
                swap_pair_(*other, back=back)
                if not all(map(torch.equal, pair, other)):
                    return f"on {device} it swaps otherwise than torch operations do"
            if made.done == back:
                return f"on {device} it does not say that it has swapped"
    except Exception as error:
        return _failed(device, error)
    return None


def _failed(device: torch.device, error: Exception) -> str:
    lines = str(error).strip().splitlines() or ["no message"]
    return f"it failed on {device}: {type(error).__name__}: {lines[0]}"


def _some(
    size: int, device: torch.device, dtype: torch.dtype, state_dtype: torch.dtype, extra: int
) -> Slot:
    """A tensor in the middle of a training; the same at each call."""
    generator = torch.Generator().manual_seed(size)

    def normal(dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(size, generator=generator)).to(device, dtype)

    offset = state_dtype.itemsize < dtype.itemsize
    return Slot(
        normal(dtype),
        None,
        normal(state_dtype),
        normal(state_dtype).abs(),
        normal(state_dtype, 0.01 if offset else 1.0),
        extra=tuple(normal(torch.promote_types(dtype, torch.float32)) for _ in range(extra)),
    )


def _agree(x: Tensor, y: Tensor, rounds: bool) -> bool:
    """Equal but for rounding: of sums everywhere; of what is kept in bfloat16 at few elements.

    Args:
        x: a tensor after a step.
        y: the same after another.
        rounds: whether any tensor of the step is bfloat16, of which others take something in.
    """
    off = (x.double() - y.double()).abs()
    unit = torch.finfo(x.dtype).eps * float(y.double().abs().max())
    if x.dtype == torch.bfloat16:
        return float(off.max()) <= 4 * unit and int((off > 0).sum()) <= 0.02 * len(x) + 1
    return float(off.mean() if rounds else off.max()) <= 20 * unit


@triton.jit
def _step(
    chunks,
    table,
    grads,
    keys,
    numbers,
    skipped,
    param: tl.constexpr,
    state: tl.constexpr,
    each: tl.constexpr,
    uniform: tl.constexpr,
    stochastic: tl.constexpr,
    guard: tl.constexpr,
    extra: tl.constexpr,
    block: tl.constexpr,
    tail: tl.constexpr,
):
    """One chunk of one tensor: whole and on boundaries of 16 bytes without a mask, or with one."""
    chunk = chunks + 2 * tl.program_id(0)
    row = tl.load(chunk)
    begin = tl.load(chunk + 1).to(tl.int64) * block
    table += row * (ROW + extra)
    if each:
        numbers += row * (NUMBERS + extra)
    grad, key = tl.load(grads + row), tl.load(keys + row)
    size, addresses = tl.load(table + SIZE), tl.load(table + ADDRESSES) | grad
    if (begin + block <= size) & (addresses % 16 == 0):
        _range(
            table, grad, key, begin, None, numbers, skipped,
            param, state, uniform, stochastic, guard, extra, block,
        )  # fmt: skip
    else:
        length = tl.minimum(size - begin, block).to(tl.int32)
        for at in range(0, length, tail):
            first = begin + at
            mask = first + tl.arange(0, tail) < size
            _range(
                table, grad, key, first, mask, numbers, skipped,
                param, state, uniform, stochastic, guard, extra, tail,
            )  # fmt: skip


@triton.jit
def _range(
    table,
    grad,
    key,
    begin,
    mask,
    numbers,
    skipped,
    param: tl.constexpr,
    state: tl.constexpr,
    uniform: tl.constexpr,
    stochastic: tl.constexpr,
    guard: tl.constexpr,
    extra: tl.constexpr,
    block: tl.constexpr,
):
    """The rule for one chunk, as cpu.cpp's function of this name has it."""
    wide: tl.constexpr = tl.float64 if param == tl.float64 else tl.float32  # arithmetic
    offset: tl.constexpr = state.primitive_bitwidth < param.primitive_bitwidth
    params = _at(tl.load(table + PARAM), begin, param, mask, block)
    exp_avgs = _at(tl.load(table + EXP_AVG), begin, state, mask, block)
    exp_avg_sqs = _at(tl.load(table + EXP_AVG_SQ), begin, state, mask, block)
    averages = _at(tl.load(table + AVERAGE), begin, state, mask, block)
    old_param = tl.load(params, mask)
    g = tl.load(_at(grad, begin, param, mask, block), mask).to(wide)
    old_m, old_v = tl.load(exp_avgs, mask), tl.load(exp_avg_sqs, mask)
    old_average = tl.load(averages, mask)

    noise = tl.zeros((block,), tl.uint32)
    if stochastic or state == tl.bfloat16:
        i = (begin + tl.load(table + START)).to(tl.uint32) + tl.arange(0, block).to(tl.uint32)
        noise = _mix(i ^ key.to(tl.uint32))
    free = None
    if guard == STEP:
        free = tl.zeros((block,), tl.float64) == tl.load(numbers + SKIP)
    if guard == COORDINATES:
        limit: tl.constexpr = LIMIT64 if wide == tl.float64 else LIMIT32
        free = tl.abs(g) <= limit  # no NaN is
        count = tl.sum((~free if mask is None else ~free & mask).to(tl.int32))
        if count > 0:
            tl.atomic_add(skipped, count.to(tl.int64), sem="relaxed")

    theta, kept = old_param.to(wide), old_average.to(wide)
    m, v = old_m.to(wide), old_v.to(wide)
    g = tl.load(numbers + SIGN).to(wide) * g
    m += tl.load(numbers + W1).to(wide) * (g - m)
    v = tl.load(numbers + BETA2).to(wide) * v + tl.load(numbers + W2).to(wide) * g * g
    root = tl.sqrt(v) if wide == tl.float64 else tl.sqrt_rn(v)
    denom = root * tl.load(numbers + UNBIAS).to(wide) + tl.load(numbers + EPS).to(wide)
    inverse = 1 / denom if wide == tl.float64 else tl.div_rn(tl.full((block,), 1, wide), denom)
    next = tl.load(numbers + SHRINK).to(wide) * theta
    next -= tl.load(numbers + STEP_SIZE).to(wide) * m * inverse
    gain, cap = tl.load(numbers + GAIN).to(wide), tl.load(numbers + CAP).to(wide)
    factor = gain if uniform else gain * inverse
    factor = tl.where(cap < factor, cap, factor)  # a NaN stays
    if gain != 0:  # or an average that is infinite would pull, too
        next += factor * (kept if offset else kept - theta)

    _store(exp_avgs, m, old_m, free, mask, noise & 0xFFFF, True)
    _store(exp_avg_sqs, v, old_v, free, mask, noise >> 16, True)
    third = (noise * 0x9E3779B9) >> 16
    weight = tl.load(numbers + WEIGHT).to(wide)
    if offset:
        taken = (1 - weight) * (kept - (next - theta))
        d = _store(averages, taken, old_average, free, mask, third, True)
        next = (next + d) - d
    fourth = (noise * 0x85EBCA6B) >> 16
    next = _store(params, next, old_param, free, mask, fourth, stochastic)
    if not offset:
        if weight != 0:
            kept += weight * (next - kept)
        _store(averages, kept, old_average, free, mask, third, True)
    for j in tl.static_range(extra):
        weight = tl.load(numbers + NUMBERS + j).to(wide)
        if weight != 0:
            average = _at(tl.load(table + ROW + j), begin, wide, mask, block)
            kept = tl.load(average, mask)
            _store(average, kept + weight * (next - kept), kept, free, mask, noise, False)


@triton.jit
def _follow(
    chunks,
    table,
    numbers,
    param: tl.constexpr,
    second: tl.constexpr,
    pulls: tl.constexpr,
    uniform: tl.constexpr,
    extra: tl.constexpr,
    block: tl.constexpr,
    tail: tl.constexpr,
):
    """One chunk of a tensor that another optimizer has moved, as `_step` takes one."""
    chunk = chunks + 2 * tl.program_id(0)
    begin = tl.load(chunk + 1).to(tl.int64) * block
    table += tl.load(chunk) * (MOVED_ROW + extra)
    size = tl.load(table + MOVED_SIZE)
    if (begin + block <= size) & (tl.load(table + MOVED_ADDRESSES) % 16 == 0):
        _moved(table, begin, None, numbers, param, second, pulls, uniform, extra, block)
    else:
        length = tl.minimum(size - begin, block).to(tl.int32)
        for at in range(0, length, tail):
            first = begin + at
            mask = first + tl.arange(0, tail) < size
            _moved(table, first, mask, numbers, param, second, pulls, uniform, extra, tail)


@triton.jit
def _moved(
    table,
    begin,
    mask,
    numbers,
    param: tl.constexpr,
    second: tl.constexpr,
    pulls: tl.constexpr,
    uniform: tl.constexpr,
    extra: tl.constexpr,
    block: tl.constexpr,
):
    """The pull and the averages of one chunk, as cpu.cpp's `follow` has them."""
    wide: tl.constexpr = tl.float64 if param == tl.float64 else tl.float32  # arithmetic
    params = _at(tl.load(table + PARAM), begin, param, mask, block)
    averages = _at(tl.load(table + MOVED_AVERAGE), begin, wide, mask, block)
    old, kept = tl.load(params, mask), tl.load(averages, mask)
    next = old.to(wide)
    if pulls:
        before = _at(tl.load(table + BEFORE), begin, param, mask, block)
        factor = tl.load(numbers + PULL_GAIN).to(wide)
        if not uniform:
            at = _at(tl.load(table + SECOND_MOMENT), begin, second, mask, block)
            v = tl.load(at, mask).to(wide)
            root = tl.sqrt(v) if wide == tl.float64 else tl.sqrt_rn(v)
            eps = tl.load(numbers + PULL_EPS).to(wide)
            denom = root * tl.load(numbers + PULL_UNBIAS).to(wide) + eps
            one = tl.full((block,), 1, wide)
            factor *= one / denom if wide == tl.float64 else tl.div_rn(one, denom)
        cap = tl.load(numbers + PULL_CAP).to(wide)
        factor = tl.where(cap < factor, cap, factor)  # a NaN stays
        next += factor * (kept - tl.load(before, mask).to(wide))
        next = _store(params, next, old, None, mask, None, False)
    weight = tl.load(numbers + PULL_WEIGHT).to(wide)
    if weight != 0:
        tl.store(averages, kept + weight * (next - kept), mask)
    for j in tl.static_range(extra):
        weight = tl.load(numbers + PULL_NUMBERS + j).to(wide)
        if weight != 0:
            average = _at(tl.load(table + MOVED_ROW + j), begin, wide, mask, block)
            kept = tl.load(average, mask)
            tl.store(average, kept + weight * (next - kept), mask)


@triton.jit
def _swap(
    chunks,
    table,
    done,
    param: tl.constexpr,
    average: tl.constexpr,
    back: tl.constexpr,
    block: tl.constexpr,
    tail: tl.constexpr,
):
    """One chunk of a parameter and its average, as `_step` takes one."""
    chunk = chunks + 2 * tl.program_id(0)
    begin = tl.load(chunk + 1).to(tl.int64) * block
    table += tl.load(chunk) * PAIR_ROW
    size = tl.load(table + PAIR_SIZE)
    if (begin + block <= size) & (tl.load(table + PAIR_ADDRESSES) % 16 == 0):
        _trade(table, begin, None, param, average, back, block)
    else:
        length = tl.minimum(size - begin, block).to(tl.int32)
        for at in range(0, length, tail):
            first = begin + at
            mask = first + tl.arange(0, tail) < size
            _trade(table, first, mask, param, average, back, tail)
    if tl.program_id(0) == 0:
        tl.store(done, 1 - tl.load(done))


@triton.jit
def _trade(
    table,
    begin,
    mask,
    param: tl.constexpr,
    average: tl.constexpr,
    back: tl.constexpr,
    block: tl.constexpr,
):
    """The swap of one chunk, as cpu.cpp's `swap_pair` has it."""
    params = _at(tl.load(table + PARAM), begin, param, mask, block)
    averages = _at(tl.load(table + PAIR_AVERAGE), begin, average, mask, block)
    x, y = tl.load(params, mask), tl.load(averages, mask)
    if average.primitive_bitwidth < param.primitive_bitwidth:
        tl.store(params, x - y.to(param) if back else x + y.to(param), mask)
    elif average == param:
        tl.store(params, y, mask)
        tl.store(averages, x, mask)
    else:
        rest, upper = y & 0xFFFF, x.to(average) << 16
        if back:
            tl.store(params, (y >> 16).to(param), mask)
            tl.store(averages, upper + rest - ((rest & 0x8000) << 1), mask)
        else:
            nan = (y & 0x7FFFFFFF) > 0x7F800000
            rounded = tl.where(nan, 0x7FC0, (y + 0x8000) >> 16)
            tl.store(params, rounded.to(param), mask)
            tl.store(averages, upper | rest, mask)


@triton.jit
def _at(address, begin, dtype: tl.constexpr, mask, block: tl.constexpr):
    """Pointers to a chunk; without a mask it begins on a boundary, and loads are 16 bytes wide."""
    first = (address + begin * (dtype.primitive_bitwidth // 8)).to(tl.pointer_type(dtype))
    if mask is None:
        first = tl.multiple_of(first, 16)
    return first + tl.arange(0, block)


@triton.jit
def _store(pointers, value, old, free, mask, noise, stochastic: tl.constexpr):
    """Store a value, to bfloat16 by noise or to nearest, or `old` where not free; returns it."""
    dtype: tl.constexpr = old.dtype
    if dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        added = noise if stochastic else 0x7FFF + ((bits >> 16) & 1)
        bits = tl.where(value == value, bits + added, 0x7FC00000)  # a NaN's could carry over to 0
        stored = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        stored = value.to(dtype)
    if free is not None:
        stored = tl.where(free, stored, old)
    tl.store(pointers, stored, mask)
    return stored.to(value.dtype)


@triton.jit
def _mix(x):
    """rounding.py's `mix`, of uint32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)
