"""What differences over seeds say."""

import itertools
import math
from collections.abc import Sequence

import numpy as np

EXACT = 6  # seeds, up to which all resamples are looked at
RESAMPLES = 10_000


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float] | None:
    """Percentile bootstrap interval of the mean.

    Of up to six values all nⁿ resamples are taken, so that it is exact; of more, 10,000 drawn with
    a fixed seed. It is honest about few values only in so far as it cannot leave their range.

    Args:
        values: paired differences, say, one a seed.
        level: share of the resamples' means inside, in (0, 1).

    Returns:
        Its ends; None for fewer than two values, or where one is not finite.

    Source: Efron, *Bootstrap methods: another look at the jackknife* (1979).
    """
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    n = len(values)
    if n <= EXACT:
        means = np.array(list(itertools.product(values, repeat=n))).mean(axis=1)
    else:
        means = np.random.default_rng(0).choice(values, (RESAMPLES, n)).mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
