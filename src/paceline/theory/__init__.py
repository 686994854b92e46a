"""The theory lab: the model that PACE is derived in, solved exactly; needs the extra `[theory]`.

`quadratic` has the moments of live weights and average, `twin` what a pull amounts to, `control`
the problem that the gain comes from, `frontier` what each method comes to at its best, `simulate`
the same by the real optimizers. docs/theory.md walks through it.
"""

from .control import certainty_equivalent_gain, long_horizon_gain, optimal_gain, optimal_value
from .quadratic import (
    Quadratic,
    better_gain,
    half_life,
    largest_gain,
    limit,
    limiting_error,
    moments,
    spectral_radius,
)
from .twin import twin_epsilon, twin_rate, twin_ratio

__all__ = [
    "Quadratic",
    "better_gain",
    "certainty_equivalent_gain",
    "half_life",
    "largest_gain",
    "limit",
    "limiting_error",
    "long_horizon_gain",
    "moments",
    "optimal_gain",
    "optimal_value",
    "spectral_radius",
    "twin_epsilon",
    "twin_rate",
    "twin_ratio",
]
