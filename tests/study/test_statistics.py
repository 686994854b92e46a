"""Intervals of few values."""

import itertools
import math
from collections import Counter

import pytest

pytest.importorskip("optuna")
pytest.importorskip("transformers")


from paceline.study.statistics import EXACT, interval


def by_hand(values, level=0.95):
    """Ends of the interval from every resample, counted by how often each value is in it."""
    n = len(values)
    means = []
    for chosen in itertools.combinations_with_replacement(range(n), n):
        times = math.factorial(n)
        for count in Counter(chosen).values():
            times //= math.factorial(count)
        means += [sum(values[i] for i in chosen) / n] * times
    assert len(means) == n**n
    means.sort()
    ends = []
    for share in ((1 - level) / 2, (1 + level) / 2):
        ends.append(means[math.ceil(share * len(means) - 1e-9) - 1])  # no point between two
    return tuple(ends)


@pytest.mark.parametrize(
    "values",
    [(0.0, 1.0), (0.3, 0.3, 0.3), (-1.0, 2.0, 5.0), (0.1, 0.4, -0.3, 2.0), (1, 2, 3, 4, 50)],
)
@pytest.mark.parametrize("level", [0.5, 0.95])
def test_of_few_values_the_interval_is_exact(values, level):
    assert interval(values, level) == pytest.approx(by_hand(values, level), abs=1e-12)


def test_interval_by_hand():
    assert interval([0.0, 1.0]) == (0, 1)  # of 0, ½, ½, 1
    assert interval([0.0, 1.0], 0.5) == (0, 0.5)
    # Of 27 means one is 9: more than 2.5 %, and less than 5 %.
    assert interval([0.0, 0.0, 9.0], 0.95) == (0, 9)
    assert interval([0.0, 0.0, 9.0], 0.9) == (0, 6)


def test_of_more_values_the_interval_is_near_the_exact_one():
    values = [(i * 37 % 11) / 3 for i in range(EXACT + 1)]
    low, high = by_hand(values)
    spread = high - low
    assert interval(values) == pytest.approx((low, high), abs=0.05 * spread)
    many = [math.sin(i * i) for i in range(400)]
    assert interval(many) == interval(many)  # the same each time
    mean = sum(many) / 400
    error = math.sqrt(sum((x - mean) ** 2 for x in many) / 400 / 400)
    assert interval(many) == pytest.approx(
        (mean - 1.96 * error, mean + 1.96 * error), abs=error / 5
    )


@pytest.mark.parametrize("values", [(), (1.0,), (1.0, math.inf), (1.0, math.nan)])
def test_no_interval(values):
    assert interval(values) is None
