"""The theory lab: the model that PACE is derived in, solved exactly; needs the extra `[theory]`.

- `quadratic`: exact moments of live weights and average.
- `twin`: the EMA that a pull amounts to.
- `control`: the control problem that the gain comes from.
- `rate`: the bound on convex problems, and where it is reached.
- `frontier`: each method's least loss at its own best parameters.
- `batch`: steps and losses against the batch size, of tuned methods.
- `river`: PACE's runs in a valley with a river at its bottom.
- `simulate`: measurements with the library's own optimizers.

docs/theory.md explains them. Importing this package does not import SciPy.
"""

from .control import (
    certainty_equivalent_gain,
    long_horizon_gain,
    matrix_control,
    optimal_gain,
    optimal_value,
)
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
from .rate import rate_bound, step_factor
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
    "matrix_control",
    "moments",
    "optimal_gain",
    "optimal_value",
    "rate_bound",
    "spectral_radius",
    "step_factor",
    "twin_epsilon",
    "twin_rate",
    "twin_ratio",
]
