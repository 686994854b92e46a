"""Swap of live weights and average, in place: nothing is lost, and no third copy is kept.

Also the record of it: what each parameter of a group holds. It is text, because
checkpoint engines refuse other values.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, groupby
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from . import kernels

Records: TypeAlias = Sequence[tuple[dict[str, Any], str]]

SWAPPED = "swapped"  # the option of a group that holds its record
SLICE = 2**20  # elements swapped at a time, which bounds the scratch


class Swapped(NamedTuple):
    """An average that is in a parameter now."""

    dtype: str  # of the parameter when it came in, as in "torch.float32"
    average: str  # its name; "" for the average that the pull goes toward


def write_record(records: Iterable[Swapped | None]) -> str:
    """A group's record, in the order of its parameters; None: it holds its live weights.

    A word a parameter, runs of one word in short, as in `torch.float32@slow*3,*1`. Never empty,
    for that is a group's record while it is live.
    """
    words = ["" if x is None else f"{x.dtype}@{x.average}".removesuffix("@") for x in records]
    return ",".join(f"{word}*{len(list(run))}" for word, run in groupby(words)) or "*0"


def read_record(record: str | None, count: int) -> list[Swapped | None]:
    """The records of a group of `count` parameters from their text; None or "": all are live.

    Raises:
        ValueError: the text is not of so many parameters.
    """
    runs = [run.rpartition("*") for run in (record or f"*{count}").split(",")]
    words = [word for word, _, n in runs for _ in range(min(int(n), count + 1))]
    if len(words) != count:
        raise ValueError(f"swapped is of {len(words)} parameters, the group has {count}")
    parts = [word.partition("@") for word in words]
    return [Swapped(dtype, average) if dtype else None for dtype, _, average in parts]


def swap_in(
    pairs: Iterable[tuple[Tensor, Tensor]], records: Records = (), *, fused: bool = True
) -> None:
    """Put each average into its parameter; the second tensor then keeps the live weights.

    Of equal dtypes the two trade contents. A second tensor narrower than the parameter holds the
    average's offset from the live weights, which is added and stays where it is.

    Of a 16-bit parameter and its float32 average, the parameter takes the average rounded to 16
    bits. The average's place takes the live weights in its upper 16 bits and, in its lower 16, what
    the rounding left out, in float32 units in the last place.

    `swap_back` brings both back bit for bit, except that an average's NaN comes back as some NaN,
    and a float16 parameter's average below 2^-16 to within 2^-25. An exception on the way,
    Ctrl-C too, leaves everything as it was.

    Args:
        pairs: parameter and average, of equal shapes and dtypes, or 16-bit and float32; or
            parameter and narrower offset, such that (param + offset) - offset is param in the
            parameter's arithmetic. `update.step_` sees to that.
        records: groups, each with what its record is to be at the end.
        fused: take a one-pass kernel where there is one (`kernels.swaps`); the bits are the
            same, except for which NaN.
    """
    _all(pairs, records, back=False, fused=fused)


def swap_back(
    pairs: Iterable[tuple[Tensor, Tensor]], records: Records = (), *, fused: bool = True
) -> None:
    """Undo `swap_in` for the same pairs."""
    _all(pairs, records, back=True, fused=fused)


def _all(
    pairs: Iterable[tuple[Tensor, Tensor]], records: Records, *, back: bool, fused: bool
) -> None:
    in_one_pass, pairs = kernels.swaps(pairs) if fused else ([], pairs)
    earlier = [(group, group.get(SWAPPED, "")) for group, _ in records]
    done: list[tuple[Tensor, Tensor]] = []
    doing: tuple[int, tuple[Tensor, Tensor], list[Tensor]] | None = None
    try:
        for kernel in in_one_pass:
            kernel.run(back=back)
            for x in chain.from_iterable(kernel.pairs):
                torch.autograd.graph.increment_version(x)  # as torch's own operations do
        for pair in pairs:
            for part in _parts(*pair):
                doing = (len(done), part, [x.clone() for x in part])
                swap_pair_(*part, back=back)
                done.append(part)
        for group, record in records:
            group[SWAPPED] = record
    except BaseException:
        if doing and doing[0] == len(done):  # it was at this part, and may have written half
            for x, before in zip(doing[1], doing[2], strict=True):
                x.copy_(before)
        for part in reversed(done):
            swap_pair_(*part, back=not back)
        for kernel in in_one_pass:
            if kernel.done:
                kernel.run(back=not back)
        for group, record in earlier:
            group[SWAPPED] = record
        raise


def _parts(param: Tensor, average: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    if param.ndim == 0:
        param, average = param[None], average[None]
    rows = max(1, SLICE * len(param) // max(1, param.numel()))
    yield from zip(torch.split(param, rows), torch.split(average, rows), strict=True)


def swap_pair_(param: Tensor, average: Tensor, *, back: bool) -> None:
    """The swap of one pair, or what undoes it, in torch operations."""
    _pair_back(param, average) if back else _pair_in(param, average)


def _pair_in(param: Tensor, average: Tensor) -> None:
    # Everything is computed before the first write: no failure can leave it half done.
    if average.itemsize < param.itemsize:
        param.add_(average)
        return
    if param.dtype == average.dtype:
        live = param.clone()
        param.copy_(average)
        average.copy_(live)
        return
    bits = average.view(torch.int32)
    rounded = average.to(param.dtype)
    rest = bits - rounded.to(average.dtype).view(torch.int32)
    if param.dtype == torch.bfloat16:
        # A tie that was rounded down: rounded up, what is left out fits into 16 bits.
        tie = (rest == 0x8000) & ~average.isnan()
        rounded.view(torch.int16).add_(tie)
        rest.sub_(tie.to(torch.int32) << 16)
    live = param.view(torch.int16).to(torch.int32) << 16
    packed = live | (rest.clamp_(-0x8000, 0x7FFF) & 0xFFFF)
    param.copy_(rounded)
    bits.copy_(packed)


def _pair_back(param: Tensor, average: Tensor) -> None:
    if average.itemsize < param.itemsize:
        param.sub_(average)
        return
    if param.dtype == average.dtype:
        _pair_in(param, average)
        return
    bits = average.view(torch.int32)
    live = (bits >> 16).to(torch.int16).view(param.dtype)
    rest = (bits << 16) >> 16  # the lower half, with its sign
    exact = param.to(average.dtype).view(torch.int32) + rest
    param.copy_(live)
    bits.copy_(exact)
