r"""The pull as optimal control: the problem that PACE's gain comes from, solved.

In continuous time, for one coordinate at distance x from the minimum, with steps of unit length,

    dx = (-a·x + u) dt + σ dW,      S_t = ∫_0^t x ds,      minimise  E[(S_T/T)²] + ρ·E ∫ u² dt

The sum that is to come is foreseen: z_t = S_t + g(t)·x_t is what S_T will be without control, with
g(t) = (1 - e^{-a(T-t)})/a. It obeys dz = g·u dt + g·σ dW, so that

    u*(t) = -(g(t)·P(t)/ρ)·z_t,      1/P(t) = T² + (1/ρ)·∫_t^T g(s)² ds

In discrete time, for any number of coordinates and any average,

    x_{k+1} = (1-a)·x_k + u_k + ξ_k,      x̄_k = (1-β_k)·x̄_{k-1} + β_k·x_k,      x̄_0 = x_0
    minimise  E x̄_TᵀM·x̄_T + ρ·Σ E|u_k|²

is solved exactly by a Riccati recursion on (x, x̄).

Source: the problem is that of Au & Block, arXiv:2606.25086 (2026); the solutions are ours.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from .quadratic import Array, Numbers, eigenvalues, require

# ---- one coordinate, continuous time ------------------------------------------------------------


def _horizon(t: ArrayLike, horizon: ArrayLike, a: ArrayLike) -> tuple[Array, Array, Array]:
    horizon = require("horizon", horizon, 0, math.inf, open_="low")
    t = require("t", t, 0, math.inf)
    if (t > horizon).any():
        raise ValueError(f"t must be at most the horizon, got {(t - horizon).max():g} above")
    return horizon - t, horizon, require("a", a, 0, math.inf)


def influence(t: ArrayLike, horizon: ArrayLike, a: ArrayLike) -> Array:
    """g(t) = (1 - e^{-a(T-t)})/a: how much of x_t is yet to be summed up; T - t for a = 0.

    Args:
        t: time, in [0, T], steps; any shape.
        horizon: T > 0, steps; broadcasts.
        a: learning rate times curvature, >= 0; broadcasts.

    Raises:
        ValueError: an argument is out of its range.
    """
    left, _, a = _horizon(t, horizon, a)
    return _influence(left, a)


def _influence(left: Array, a: Array) -> Array:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(a * left > 0, -np.expm1(-a * left) / a, left)


def _influence_squared(left: Array, a: Array) -> Array:
    """∫ g² over what is left."""
    y = a * left
    # (y - 2(1-e^-y) + (1-e^-2y)/2) / a³, whose first terms cancel for small y.
    series = left**3 * (1 / 3 - y / 4 + 7 * y**2 / 60 - y**3 / 24 + 31 * y**4 / 2520)
    with np.errstate(invalid="ignore", divide="ignore"):
        exact = (y + 2 * np.expm1(-y) - np.expm1(-2 * y) / 2) / a**3
    return np.where(y < 1e-2, series, exact)


def optimal_value(t: ArrayLike, horizon: ArrayLike, a: ArrayLike, penalty: ArrayLike) -> Array:
    """P(t): what z_t² costs from time t on; 1/P(t) = T² + (1/ρ)·∫_t^T g(s)² ds.

    Args:
        t: time, in [0, T], steps; any shape.
        horizon: T > 0, steps; broadcasts.
        a: learning rate times curvature, >= 0; broadcasts.
        penalty: ρ > 0 on the control; broadcasts.

    Raises:
        ValueError: an argument is out of its range.
    """
    left, horizon, a = _horizon(t, horizon, a)
    penalty = require("penalty", penalty, 0, math.inf, open_="low")
    return np.asarray(1 / (horizon**2 + _influence_squared(left, a) / penalty))


def optimal_gain(t: ArrayLike, horizon: ArrayLike, a: ArrayLike, penalty: ArrayLike) -> Array:
    """The factor of -z_t in the optimal control u*(t): g(t)·P(t)/ρ.

    Arguments and errors are those of `optimal_value`.
    """
    value = optimal_value(t, horizon, a, penalty)
    return np.asarray(influence(t, horizon, a) * value / np.asarray(penalty))


def certainty_equivalent_gain(
    t: ArrayLike, horizon: ArrayLike, a: ArrayLike, penalty: ArrayLike
) -> Array:
    """The factor of -(θ_t - θ̄_t) when the running average stands for the minimum: g²P/ρ.

    The sum so far is then 0, and z_t = g·(θ_t - θ̄_t): a pull toward the average. Arguments and
    errors are those of `optimal_value`.
    """
    return np.asarray(influence(t, horizon, a) * optimal_gain(t, horizon, a, penalty))


def long_horizon_gain(horizon: ArrayLike, a: ArrayLike, penalty: ArrayLike) -> Array:
    """What the certainty-equivalent gain is long before the end, for aT >> 1: 1/(ρa²T² + T).

    It falls with the curvature, and is never more than 1/T. Arguments and errors are those of
    `optimal_value` at t = 0.
    """
    _, horizon, a = _horizon(0.0, horizon, a)
    penalty = require("penalty", penalty, 0, math.inf, open_="low")
    return np.asarray(1 / (penalty * a**2 * horizon**2 + horizon))


# ---- any number of coordinates, discrete time ---------------------------------------------------


def newest_weights(weights: ArrayLike) -> Array:
    """β_1 ... β_T of the average Σ w_k·x_k: β_k = w_k / (w_0 + ... + w_k).

    Equal weights give 1/(k+1).

    Args:
        weights: w_0 ... w_T, of any sign, that add up to 1.

    Raises:
        ValueError: they do not, or a partial sum is 0.
    """
    weights = require("weights", weights, -math.inf, math.inf)
    if weights.ndim != 1 or len(weights) < 2:
        raise ValueError(f"weights must be two or more in a row, got the shape {weights.shape}")
    so_far = np.cumsum(weights)
    if abs(so_far[-1] - 1) > 1e-9:
        raise ValueError(f"weights must add up to 1, they are {so_far[-1] - 1:+g} off")
    nothing = abs(so_far[1:]) <= 1e-12 * abs(weights).max()
    if nothing.any():
        raise ValueError(f"the first {int(nothing.argmax()) + 2} weights must not add up to 0")
    return np.asarray(weights[1:] / so_far[1:])


class Outcome(NamedTuple):
    """What a controller comes to: E x̄_TᵀM·x̄_T, Σ E|u|², and both with the penalty."""

    error: float
    effort: float
    cost: float


@dataclass(frozen=True)
class Regulator:
    """The discrete problem.

    Args:
        curvature: a = η·H: (n,), coordinates in (0, 2), or (d, d), symmetric.
        beta: β_1 ... β_T, the newest iterate's weight in the average, as `newest_weights` or a
            rule of `paceline.averaging` has them.
        penalty: ρ > 0.
        noise: variance of a step's noise, >= 0, for each coordinate or all; or (d, d).
        start: x_0, for each coordinate or all.
        terminal: M, (d, d), symmetric and positive semidefinite. Default: the identity.

    Raises:
        ValueError: an argument is out of its range, by how much.
    """

    curvature: Numbers
    beta: Numbers
    penalty: float
    noise: Numbers = 1.0
    start: Numbers = 0.0
    terminal: Numbers = None

    def __post_init__(self) -> None:
        curvature = np.atleast_1d(np.asarray(self.curvature, dtype=np.float64))
        matrix = np.diag(curvature) if curvature.ndim == 1 else curvature
        d = len(matrix)
        require("curvature", eigenvalues("curvature", matrix), 0, 2, open_="both")
        require("penalty", self.penalty, 0, math.inf, open_="low")
        beta = require("beta", self.beta, -math.inf, math.inf)
        if beta.ndim != 1 or not len(beta):
            raise ValueError(f"beta must be one or more in a row, got the shape {beta.shape}")
        for name in ("noise", "start"):
            shape = np.shape(getattr(self, name))
            if shape not in ((), (1,), (d,)) and (name, len(shape)) != ("noise", 2):
                raise ValueError(f"{name} must be of the shape () or ({d},), got {shape}")
        noise = np.asarray(self.noise, dtype=np.float64)
        covariance = noise if noise.ndim == 2 else np.diag(np.broadcast_to(noise, (d,)))
        terminal = np.eye(d) if self.terminal is None else np.asarray(self.terminal, np.float64)
        for name, given in (("noise", covariance), ("terminal", terminal)):
            if given.shape != (d, d):
                raise ValueError(f"{name} must be of the shape {(d, d)}, got {given.shape}")
            least = eigenvalues(name, given)[0]
            if least < -1e-12 * abs(given).max():
                raise ValueError(
                    f"{name} must be positive semidefinite; its least eigenvalue is {least:g}"
                )
        start = require("start", self.start, -math.inf, math.inf)
        for name, value in (
            ("curvature", matrix),
            ("beta", beta),
            ("noise", covariance),
            ("start", np.broadcast_to(start, (d,))),
            ("terminal", terminal),
        ):
            object.__setattr__(self, name, value)

    @property
    def steps(self) -> int:
        """T."""
        return len(self.beta)

    def _step(self, k: int) -> tuple[Array, Array]:
        """(x, x̄)_{k+1} = A·(x, x̄)_k + B·(u_k + ξ_k)."""
        one, new = np.eye(len(self.curvature)), self.beta[k]
        stay = one - self.curvature
        return (
            np.block([[stay, 0 * one], [new * stay, (1 - new) * one]]),
            np.vstack([one, new * one]),
        )

    def solve(self) -> tuple[Array, Outcome]:
        """The best of all controllers, and what it comes to.

        Returns:
            gains (T, d, 2d), with u_k = -gains[k] @ (x_k, x̄_k); and their outcome.
        """
        d = len(self.curvature)
        value = np.zeros((2 * d, 2 * d))
        value[d:, d:] = self.terminal
        gains = np.empty((self.steps, d, 2 * d))
        for k in reversed(range(self.steps)):
            a, b = self._step(k)
            pulled = b.T @ value
            gains[k] = np.linalg.solve(self.penalty * np.eye(d) + pulled @ b, pulled @ a)
            value = a.T @ value @ (a - b @ gains[k])
            value = (value + value.T) / 2
        return gains, self.outcome(gains)

    def feedback(self, live: ArrayLike, average: ArrayLike) -> Array:
        """The gains of u_k = -live_k·x_k - average_k·x̄_k, each coordinate by itself.

        Args:
            live: broadcasts to (T, d).
            average: broadcasts to (T, d). `feedback(λ, -λ)` is a pull of gain λ to the average.

        Returns:
            gains (T, d, 2d).
        """
        shape = (self.steps, len(self.curvature))
        parts = [np.broadcast_to(np.asarray(x, dtype=np.float64), shape) for x in (live, average)]
        return np.concatenate([x[..., None] * np.eye(shape[1]) for x in parts], axis=-1)

    def outcome(self, gains: Array) -> Outcome:
        """Error and effort of a linear controller, exactly.

        Args:
            gains: (T, d, 2d), with u_k = -gains[k] @ (x_k, x̄_k).

        Raises:
            ValueError: they are of another shape.
        """
        d = len(self.curvature)
        if np.shape(gains) != (self.steps, d, 2 * d):
            shape = (self.steps, d, 2 * d)
            raise ValueError(f"gains must be of the shape {shape}, got {np.shape(gains)}")
        start = np.concatenate([self.start, self.start])
        second, effort = np.outer(start, start), 0.0
        for k, gain in enumerate(gains):
            a, b = self._step(k)
            effort += float(np.trace(gain @ second @ gain.T))
            closed = a - b @ gain
            second = closed @ second @ closed.T + b @ self.noise @ b.T
        error = float(np.trace(self.terminal @ second[d:, d:]))
        return Outcome(error, effort, error + self.penalty * effort)
