"""Stochastic rounding to bfloat16: unbiased, and a function of (seed, parameter, step, element).

A value between two neighbours of bfloat16 goes to either with a probability that makes the
expected result the value itself. The noise comes from a counter-based hash, not from a generator:
nothing has to be saved to replay it, and every path of the step draws the same.
"""

import torch
from torch import Tensor

# Which 16 bits of noise a tensor of the step uses: its word of 32 bits, and which half of it.
EXP_AVG, EXP_AVG_SQ, AVERAGE, PARAM = range(4)

_ODD = {AVERAGE: 0x9E3779B9, PARAM: 0x85EBCA6B}  # a product's upper half is independent of either


def _int32(x: int) -> int:
    """The 32-bit pattern as torch's signed int32 takes it."""
    return (x + 2**31) % 2**32 - 2**31


def mix(x: Tensor) -> Tensor:
    """A bijection of int32 in which each bit of the input flips each of the output half the time.

    Source: C. Wellons, Prospecting for Hash Functions (2018), `lowbias32`; public domain.
    """
    x = (x ^ ((x >> 16) & 0xFFFF)) * _int32(0x7FEB352D)
    x = (x ^ ((x >> 15) & 0x1FFFF)) * _int32(0x846CA68B)
    return x ^ ((x >> 16) & 0xFFFF)


def keys(seed: int, indices: Tensor, step: int | Tensor) -> Tensor:
    """One int32 key for each parameter at a step, from which its elements' noise is drawn.

    Args:
        seed: any whole number; its low 32 bits count.
        indices: int32, the parameters' places in the optimizer.
        step: t, the same for all, or an int32 tensor like `indices`.
    """
    # Scrambled, or the second parameter of seed 0 would draw what the first of seed 1 draws.
    scrambled = mix(torch.full((), _int32(seed), dtype=torch.int32, device=indices.device))
    return mix(mix(indices ^ scrambled) ^ step)


def noise(like: Tensor, key: int | Tensor, start: int = 0) -> Tensor:
    """32 random bits for each element of a tensor, as int32 of its shape.

    Args:
        like: gives shape and device.
        key: from `keys`.
        start: index of the first element within its parameter, where `like` is a piece of one.
    """
    at = torch.arange(like.numel(), dtype=torch.int32, device=like.device) + _int32(start)
    return mix(at ^ key).view(like.shape)


def round_(out: Tensor, value: Tensor, bits: Tensor, which: int) -> None:
    """Write `value` into the bfloat16 tensor `out`, rounded stochastically.

    Args:
        out: bfloat16.
        value: of the same shape, rounded by way of float32. NaN stays NaN, infinities themselves.
        bits: from `noise`; one word serves all four tensors of a step.
        which: EXP_AVG, EXP_AVG_SQ, AVERAGE or PARAM.
    """
    value = value.to(torch.float32)
    if which in _ODD:
        bits = bits * _int32(_ODD[which])
    half = bits & 0xFFFF if which == EXP_AVG else (bits >> 16) & 0xFFFF
    rounded = ((value.view(torch.int32) + half) >> 16).to(torch.int16).view(torch.bfloat16)
    out.copy_(torch.where(value.isnan(), value.to(torch.bfloat16), rounded))
