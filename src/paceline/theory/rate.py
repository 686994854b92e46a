r"""The rate of a pull on convex problems: a bound with its proof, and where it is reached.

SGD with a pull of constant gain λ in [0, 1] toward an EMA of constant weight β, from θ_1 = ema_0:

    θ_{t+1} = θ_t - η·g_t + λ·(ema_{t-1} - θ_t),      ema_t = (1-β)·ema_{t-1} + β·θ_{t+1}

With subgradients |g_t| <= G of a convex f and D = |θ_1 - x*|,

    mean over t = 1 ... T of f(θ_t) - f*  <=  D²/(2rηT) + C·ηG²/2
    r = β/(β + λ(1-β)),      C = 1 + λ(1-β)/(1 + (1-λ)(1-β)) = (2-β)/(2-β-λ(1-β))

because (1-λ)|θ_t - x*|² + (λ/β)|ema_{t-1} - x*|² + λ/(1-β)·|θ_t - ema_{t-1}|² falls in a step by at
least 2η·(f(θ_t) - f*) - C·η²|g_t|². docs/theory.md has the steps.

Source: that the rate 1/√T stays is Au & Block's, arXiv:2606.25086 (2026); this bound, its constants
and its proof were derived here.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from .quadratic import Array, in_range
from .twin import twin_rate


def step_factor(beta: ArrayLike, gain: ArrayLike) -> Array:
    """C, the factor of the pull on the bound's term of steps: 1 for λ = 0, 2 - β for λ = 1.

    Args:
        beta: averaging weight, in (0, 1]; any shape.
        gain: λ, in [0, 1]; broadcasts.

    Raises:
        ValueError: an argument is out of its range.
    """
    beta, gain = in_range("beta", beta, "(0, 1]"), in_range("gain", gain, "[0, 1]")
    return np.asarray((2 - beta) / (2 - beta - gain * (1 - beta)))


def rate_bound(
    distance: ArrayLike,
    lr: ArrayLike,
    steps: ArrayLike,
    beta: ArrayLike,
    gain: ArrayLike,
    slope: ArrayLike = 1.0,
) -> Array:
    """What the mean excess loss of the live weights cannot exceed: D²/(2rηT) + C·ηG²/2.

    The loss at the mean of the live weights cannot, either. With noise it holds in expectation, if
    E|g|² <= G². Without a pull it is the bound of SGD, D²/(2ηT) + ηG²/2.

    Args:
        distance: D >= 0 from the start to a minimum; any shape.
        lr: η > 0; broadcasts.
        steps: T >= 1; broadcasts.
        beta: averaging weight, in (0, 1]; broadcasts.
        gain: λ, in [0, 1]; broadcasts.
        slope: G >= 0, the largest norm of a subgradient; broadcasts.

    Raises:
        ValueError: an argument is out of its range.
    """
    factor, r = step_factor(beta, gain), twin_rate(beta, gain)
    distance, lr = in_range("distance", distance, "[0, inf)"), in_range("lr", lr, "(0, inf)")
    steps = in_range("steps", steps, "[1, inf)", whole=True)
    slope = in_range("slope", slope, "[0, inf)")
    return np.asarray(distance**2 / (2 * r * lr * steps) + factor * lr * slope**2 / 2)


def mean_loss(
    problem: Callable[[Array], tuple[float, Array]],
    start: ArrayLike,
    lr: float,
    steps: int,
    beta: float,
    gain: float,
) -> float:
    """The mean over t = 1 ... T of f(θ_t), as measured.

    Args:
        problem: f and a subgradient of it at the weights.
        start: θ_1, (d,).
        lr: η.
        steps: T >= 1.
        beta: averaging weight, in (0, 1].
        gain: λ.
    """
    live = np.array(start, dtype=np.float64)
    average, total = live.copy(), 0.0
    for _ in range(steps):
        loss, gradient = problem(live)
        total += loss
        live = live - lr * gradient + gain * (average - live)
        average = average + beta * (live - average)
    return total / steps


def hardest_starts(lr: float, steps: int, beta: float, gain: float) -> tuple[float, float]:
    """The starts on f(x) = |x| from which the two terms of the bound are reached as T grows.

    Returns:
        rη/2, from where the live weights swing across the minimum, by C·η/2 to each side in the
        end; and rηT, from where they come to travel by rη a step, and arrive in step T.
    """
    r = float(twin_rate(beta, gain))
    return r * lr / 2, r * lr * steps
