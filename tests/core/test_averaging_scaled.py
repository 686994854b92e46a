"""`Averaging.scaled`: what the data weigh in an average at one batch and at k times it.

The expected sums are NumPy's, in float64, from each rule's definition at the small batch.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest

from paceline import Averaging
from paceline.averaging import BEMA, EMA, LAWA, SWA, PowerEMA, Uniform, parse


def sums(coefficients):
    """What came after step 0, 1, ..., T weighs: the sums of the coefficients after it."""
    return np.append(np.cumsum(np.asarray(coefficients)[:0:-1])[::-1], 0.0)


def recursion(weights):
    """The coefficients of θ_0, ..., θ_T, from the weight of each step's iterate."""
    kept = np.append(np.cumprod(1 - np.asarray(weights)[::-1])[::-1], 1.0)
    return np.append(kept[0], weights * kept[1:])


def mean(steps, of):
    found = np.zeros(steps + 1)
    found[list(of)] = 1 / len(of)
    return found


def powers(steps, kappa=0.5, rate=1.0, start=0.0, every=1):
    t = np.arange(1, steps + 1)
    return (1 + rate * np.maximum(0, t - start)) ** -kappa * (t % every == 0)


def bema(steps, kappa, bias, lag, rate, start, every):
    """θ_t is in the EMA and, at the last update, in the correction."""
    t = np.arange(1, steps + 1)
    age = lag + rate * t
    updates = (t > start) & ((t - start) % every == 0)
    found = recursion(np.where(t <= start, 1.0, age**-kappa * updates))
    found[t[updates][-1]] += age[updates][-1] ** -bias
    found[start] -= age[updates][-1] ** -bias
    return found


def numbers(rule):
    return {name: x for name, x in vars(rule).items() if x is not None}


STEPS = 120
# Of each rule: k, the coefficients at the small batch, and the rule at the large one.
EXACT = {
    "half-life": (EMA(half_life=7), 4, recursion(np.full(STEPS, 1 - 2 ** (-1 / 7))),
                  EMA(half_life=1.75)),
    "beta": (EMA(0.1), 4, recursion(np.full(STEPS, 0.1)), EMA(1 - 0.9**4)),
    "beta of 1": (EMA(1.0), 4, mean(STEPS, [STEPS]), EMA(1.0)),
    "the same points": (EMA(0.1, every=12), 4,
                        recursion(0.1 * (np.arange(1, STEPS + 1) % 12 == 0)), EMA(0.1, every=3)),
    "more than a point": (EMA(0.1, every=2), 6,
                          recursion(0.1 * (np.arange(1, STEPS + 1) % 2 == 0)), EMA(1 - 0.9**3)),
    "half-life and points": (EMA(half_life=6, every=3), 3,
                             recursion((1 - 0.5**0.5) * (np.arange(1, STEPS + 1) % 3 == 0)),
                             EMA(half_life=2)),
    "power at the same points": (PowerEMA(0.3, rate=2, start=24, every=4), 4,
                                 recursion(powers(STEPS, 0.3, 2, 24, 4)),
                                 PowerEMA(0.3, rate=8, start=6)),
    "power of 1": (PowerEMA(1.0), 4, recursion(powers(STEPS, 1.0)), PowerEMA(1.0, start=0.75)),
    "power of 0": (PowerEMA(0.0), 4, mean(STEPS, [STEPS]), PowerEMA(0.0)),
    "uniform": (Uniform(), 4, mean(STEPS, range(1, STEPS + 1)), Uniform()),
    "uniform from": (Uniform(60), 4, mean(STEPS, range(61, STEPS + 1)), Uniform(15)),
    "swa": (SWA(24, 8), 4, mean(STEPS, range(32, STEPS + 1, 8)), SWA(6, 2)),
    "lawa": (LAWA(5, every=8), 4, mean(STEPS, range(88, STEPS + 1, 8)), LAWA(5, every=2)),
    "lawa of all": (LAWA(20), 4, mean(STEPS, range(101, STEPS + 1)), LAWA(5)),
    "bema": (BEMA(0.6, 0.4, 3, 0.5, start=24, every=4), 4,
             bema(STEPS, 0.6, 0.4, 3, 0.5, 24, 4), BEMA(0.6, 0.4, 3, 2.0, start=6)),
}  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_the_same_sums(name):
    """Equal to rounding, wherever a step of the large batch ends."""
    rule, k, coefficients, expected = EXACT[name]
    np.testing.assert_allclose(rule.coefficients(STEPS), coefficients, atol=1e-14)
    scaled = rule.scaled(k)
    assert type(scaled) is type(expected)
    assert numbers(scaled) == pytest.approx(numbers(expected), rel=1e-14)
    assert parse(str(scaled)) == scaled
    found = sums(scaled.coefficients(STEPS // k).numpy())
    np.testing.assert_allclose(found, sums(coefficients)[::k], atol=1e-13)


def largest_difference(k, steps, **options):
    scaled = PowerEMA(**options).scaled(k)
    weights = [scaled.weight(t) for t in range(1, steps // k + 1)]
    expected = sums(recursion(powers(steps, **options)))[::k]
    return np.abs(sums(recursion(np.array(weights))) - expected).max()


@pytest.mark.parametrize("k", [2, 8])
@pytest.mark.parametrize("kappa", [0.5, 0.7, 0.9])
def test_a_power_ema_to_first_order(kappa, k):
    """The sums differ by (k-1)/(2e)·β_T, with more of it in β_T² the larger k·β_T."""
    differences = [largest_difference(k, steps, kappa=kappa) for steps in (2**11, 2**15)]
    order = [(k - 1) / (2 * math.e) * (1 + steps) ** -kappa for steps in (2**11, 2**15)]
    assert differences[1] == pytest.approx(order[1], rel=0.25)
    assert differences[0] / differences[1] == pytest.approx(order[0] / order[1], rel=0.25)


def test_with_every_option():
    options = {"kappa": 0.6, "rate": 0.5, "start": 100, "every": 2}
    scaled = PowerEMA(**options).scaled(8)  # 4 updates in one
    assert scaled == PowerEMA(0.6, 8 * 0.5 * 4 ** (-1 / 0.6), 100 / 8 + (4 ** (1 / 0.6) - 1) / 4)
    order = 3 / (2 * math.e) * (1 + 0.5 * (2**15 - 100)) ** -0.6
    assert largest_difference(8, 2**15, **options) == pytest.approx(order, rel=0.1)


def test_a_rate_alone_would_not_do():
    """γ' = k·γ keeps the weight of a step the same at the same data, which is k-fold too little."""
    steps, k = 2**15, 4
    late = powers(steps // k, rate=k)
    np.testing.assert_allclose(late, powers(steps)[k - 1 :: k])
    apart = sums(recursion(late)) - sums(recursion(powers(steps)))[::k]
    assert np.abs(apart).max() > 0.4
    assert largest_difference(k, steps, kappa=0.5) < 0.01


@pytest.mark.parametrize(
    "rule", [EMA(0.1), EMA(half_life=7, every=6), PowerEMA(0.3), PowerEMA(0.7, 2, 9, 4), LAWA(9, 4)]
)
def test_there_and_back(rule):
    """A smaller batch is the same rule with 1/k."""
    assert numbers(rule.scaled(2).scaled(0.5)) == pytest.approx(numbers(rule), rel=1e-12)


def test_what_a_smaller_batch_does():
    assert EMA(0.19).scaled(0.5).beta == pytest.approx(0.1)
    assert PowerEMA(0.5).scaled(0.5) == PowerEMA(0.5, rate=2.0)  # a start below 0 is 0
    assert Uniform(50).scaled(0.5) == Uniform(100)
    assert SWA(5).scaled(0.5) == SWA(10)
    assert LAWA(5).scaled(0.5) == LAWA(5, every=2)
    assert BEMA(rate=2.0).scaled(0.5) == BEMA(every=2)


def test_what_is_rounded():
    assert EMA(0.1, every=5).scaled(2).every == 2
    # 4/5 of 5 steps, over which as much is forgotten as before
    assert (1 - EMA(0.1, every=5).scaled(2).beta) ** 5 == pytest.approx(0.9**4)
    assert Uniform(10).scaled(4) == Uniform(2)
    assert SWA(10, every=7).scaled(4) == SWA(2, every=2)
    assert LAWA(10, every=3).scaled(2) == LAWA(8, every=2)
    assert LAWA(3).scaled(2) == LAWA(2)


@dataclass(frozen=True)
class Unscaled(Averaging):
    """A rule that does not say how it scales."""

    name: ClassVar[str] = "unscaled"

    def falloff(self, step):
        return 1.0

    def weight(self, step):
        return 0.5


@dataclass(frozen=True)
class Halved(Unscaled):
    """One that says that it stays the same."""

    name: ClassVar[str] = "halved"

    def scaling(self, k):
        return {}


def test_rules_of_ones_own():
    assert Halved().scaled(4) == Halved()
    assert Unscaled().scaled(1) == Unscaled()


REFUSED = {
    "of one's own": (Unscaled(), 4, "unscaled has no scaling by 4: Unscaled does not define"),
    "bema": (BEMA(), 4, "bema:kappa=0.5 has no scaling by 4: every=1 over 4 is no whole number"),
    "bema's every": (BEMA(every=6), 4, "every=6 over 4 is no whole number; give a mult"),
    "a short window": (LAWA(3), 8, "lawa:window=3 has no scaling by 8: its 3 steps are within"),
    "a long window": (LAWA(1000, every=2**53), 1e-3, "every of lawa must be at most 2^53"),
    "a small power": (PowerEMA(0.01), 8, "has no scaling by 8: start of ema must be at most 2^53"),
    "a tiny power": (PowerEMA(1e-5), 8, "has no scaling by 8: its numbers would be too large"),
    "and a small batch": (PowerEMA(1e-5), 0.5, "its numbers would be too large"),
    "nothing": (EMA(0.1), 0, "k must be a number in [2^-53, 2^53], got 0"),
    "less": (EMA(0.1), -2.0, "k must be a number in [2^-53, 2^53], got -2.0"),
    "all": (EMA(0.1), math.inf, "k must be a number in [2^-53, 2^53], got inf"),
    "no number": (EMA(0.1), math.nan, "k must be a number in [2^-53, 2^53], got nan"),
    "a text": (EMA(0.1), "4", "k must be a number in [2^-53, 2^53], got '4'"),
    "yes": (EMA(0.1), True, "k must be a number in [2^-53, 2^53], got True"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    rule, k, says = REFUSED[name]
    with pytest.raises(ValueError, match="^[^\n]+$") as error:
        rule.scaled(k)
    assert says in str(error.value)
