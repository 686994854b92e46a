"""A learning rate from one short run over rising rates, `paceline train --find-lr`.

The rate of step k of K rises from a low to a high one in equal factors. The loss of the steps falls
while they are small, and rises where they are too large. The suggestion is the rate at which the
loss, smoothed over some three tenths of a decade to each side, is lowest.

Source: rising rates are Smith's, *Cyclical Learning Rates* (2015, arXiv:1506.01186). That the
lowest loss is near the best rate of a saturated pull, and above that of AdamW, was found by trying.
"""

import math
from collections.abc import Sequence

import numpy as np

LOWEST, HIGHEST, STEPS = 1e-5, 1.0, 125
WIDTH = 0.3  # decades; standard deviation of the weights that losses are smoothed with


def rising_rates(steps: int = STEPS) -> list[float]:
    """The learning rate of each step, from 1e-5 to below 1 in equal factors."""
    return [LOWEST * (HIGHEST / LOWEST) ** (k / steps) for k in range(steps)]


def suggested_rate(rates: Sequence[float], losses: Sequence[float]) -> float | None:
    """The rate at which the smoothed loss of a run over rising rates is lowest.

    Args:
        rates: learning rates of the steps, > 0 and rising.
        losses: training loss of each step, taken before it; those that are not finite, or more than
            twice the first, count as twice the first.

    Returns:
        The rate; None if it is the lowest or the highest of all, where no best was found.
    """
    x, y = np.log10(rates), np.asarray(losses, dtype=np.float64)
    y = np.where(np.isfinite(y), np.minimum(y, 2 * y[0]), 2 * y[0])
    weights = np.exp(-0.5 * ((x[:, None] - x) / WIDTH) ** 2)
    best = int((weights @ y / weights.sum(axis=1)).argmin())
    return None if best in (0, len(x) - 1) else float(f"{math.pow(10, x[best]):.2g}")
