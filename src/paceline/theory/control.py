r"""The pull as optimal control: the problem that PACE's gain comes from, solved.

In continuous time, for one coordinate at distance x from the minimum, with steps of unit length,

    dx = (-a·x + u) dt + σ dW,      S_t = ∫_0^t x ds,      minimise  E[(S_T/T)²] + ρ·E ∫ u² dt

z_t = S_t + g(t)·x_t predicts S_T without control and noise, with g(t) = (1 - e^{-a(T-t)})/a. It
obeys dz = g·u dt + g·σ dW, so that

    u*(t) = -(g(t)·P(t)/ρ)·z_t,      1/P(t) = T² + (1/ρ)·∫_t^T g(s)² ds

For many coordinates, dX = (-A·X + u) dt + Σ dW and the cost E S_TᵀM·S_T/T² + ρ·E ∫|u|² dt, a, g
and P become matrices, and the same steps give

    u*(t) = -(1/ρ)·g(t)ᵀ·P(t)·z_t,      P⁻¹(t) = T²·M⁻¹ + (1/ρ)·∫_t^T g(s)·g(s)ᵀ ds

In discrete time, for any number of coordinates and any average,

    x_{k+1} = (1-a)·x_k + u_k + ξ_k,      x̄_k = (1-β_k)·x̄_{k-1} + β_k·x_k,      x̄_0 = x_0
    minimise  E x̄_TᵀM·x̄_T + ρ·Σ E|u_k|²

has an exact solution by a Riccati recursion on (x, x̄).

Training does not know the minimum μ*, but each step of the live weights θ = x + μ* shows it under
noise: y_k = θ_k + a⁻¹·(Δθ_k - u_k) = μ* + a⁻¹·ξ_k. The maximum-likelihood estimate after k steps is
the mean of y_0 ... y_{k-1}, whatever the control was.

Source: the problem is that of Au & Block, arXiv:2606.25086 (2026); the solutions were derived here.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from .quadratic import Array, Numbers, eigenvalues, in_range, semidefinite

# ---- one coordinate, continuous time ------------------------------------------------------------


def _horizon(t: ArrayLike, horizon: ArrayLike, a: ArrayLike) -> tuple[Array, Array, Array]:
    horizon, t = in_range("horizon", horizon, "(0, inf)"), in_range("t", t, "[0, inf)")
    if (t > horizon).any():
        raise ValueError(f"t must be at most the horizon, got {(t - horizon).max():g} above")
    return horizon - t, horizon, in_range("a", a, "[0, inf)")


def influence(t: ArrayLike, horizon: ArrayLike, a: ArrayLike) -> Array:
    """g(t) = (1 - e^{-a(T-t)})/a, the integral of a unit of x_t until T; T - t for a = 0.

    Arguments and errors are those of `optimal_value`.
    """
    left, _, a = _horizon(t, horizon, a)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(a * left > 0, -np.expm1(-a * left) / a, left)


def _information(left: Array, a: Array) -> Array:
    """∫ g(s)² ds over the time that is left."""
    y = a * left
    # ∫g² is (y - 2(1-e^-y) + (1-e^-2y)/2) / a³; its first terms cancel for small y.
    series = left**3 * (1 / 3 - y / 4 + 7 * y**2 / 60 - y**3 / 24 + 31 * y**4 / 2520)
    with np.errstate(invalid="ignore", divide="ignore"):
        exact = (y + 2 * np.expm1(-y) - np.expm1(-2 * y) / 2) / a**3
    return np.where(y < 1e-2, series, exact)


def optimal_value(t: ArrayLike, horizon: ArrayLike, a: ArrayLike, penalty: ArrayLike) -> Array:
    """P(t), the cost of z_t² = 1 from time t on: 1/P(t) = T² + (1/ρ)·∫_t^T g(s)² ds.

    Args:
        t: time, in [0, T], steps; any shape.
        horizon: T > 0, steps; broadcasts.
        a: learning rate times curvature, >= 0; broadcasts.
        penalty: ρ > 0 on the control; broadcasts.

    Raises:
        ValueError: an argument is out of its range.
    """
    left, horizon, a = _horizon(t, horizon, a)
    penalty = in_range("penalty", penalty, "(0, inf)")
    return np.asarray(1 / (horizon**2 + _information(left, a) / penalty))


def optimal_gain(t: ArrayLike, horizon: ArrayLike, a: ArrayLike, penalty: ArrayLike) -> Array:
    """The factor of -z_t in the optimal control u*(t): g(t)·P(t)/ρ.

    Arguments and errors are those of `optimal_value`.
    """
    value = optimal_value(t, horizon, a, penalty)
    return np.asarray(influence(t, horizon, a) * value / np.asarray(penalty))


def certainty_equivalent_gain(
    t: ArrayLike, horizon: ArrayLike, a: ArrayLike, penalty: ArrayLike
) -> Array:
    """The factor of -(θ_t - θ̄_t) with the running average in the minimum's place: g²P/ρ.

    The sum so far is then 0, so that z_t = g·(θ_t - θ̄_t): a pull toward the average. Arguments and
    errors are those of `optimal_value`.
    """
    return np.asarray(influence(t, horizon, a) * optimal_gain(t, horizon, a, penalty))


def long_horizon_gain(horizon: ArrayLike, a: ArrayLike, penalty: ArrayLike) -> Array:
    """The certainty-equivalent gain long before the end, for aT >> 1: 1/(ρa²T² + T).

    It falls with the curvature and is at most 1/T. Arguments and errors are those of
    `optimal_value` at t = 0.
    """
    _, horizon, a = _horizon(0.0, horizon, a)
    penalty = in_range("penalty", penalty, "(0, inf)")
    return np.asarray(1 / (penalty * a**2 * horizon**2 + horizon))


# ---- any number of coordinates, continuous time -------------------------------------------------


class MatrixControl(NamedTuple):
    """The solution at one time; all are (d, d)."""

    influence: Array  # g = (I - e^{-A(T-t)})·A⁻¹; z = S + g·x
    value: Array  # P; z costs zᵀPz from here on, besides what noise adds
    gain: Array  # u* = -gain·z; toward the running average, u = -gain·g·(θ - θ̄)


def matrix_control(
    t: float,
    horizon: float,
    curvature: ArrayLike,
    penalty: float,
    terminal: ArrayLike | None = None,
) -> MatrixControl:
    """The optimal control of dX = (-A·X + u) dt + Σ dW, whatever Σ is.

    The cost is E S_TᵀM·S_T/T² + ρ·E ∫|u|² dt. With M the identity, all three are functions of the
    matrix A: the coordinate's formulas in its eigendirections.

    Args:
        t: time, in [0, T], steps.
        horizon: T > 0, steps.
        curvature: A = η·H, (d, d), symmetric and positive semidefinite.
        penalty: ρ > 0 on the control.
        terminal: M, (d, d), symmetric and positive semidefinite. Default: the identity.

    Raises:
        ValueError: an argument is out of its range or has a wrong shape.
    """
    matrix = np.atleast_2d(np.asarray(curvature, dtype=np.float64))
    semidefinite("curvature", matrix, d := len(matrix))
    values, vectors = np.linalg.eigh(matrix)
    left, _, a = _horizon(t, horizon, values.clip(0))
    in_range("penalty", penalty, "(0, inf)")
    weights, directions = np.linalg.eigh(
        np.eye(d) if terminal is None else semidefinite("terminal", terminal, d)
    )
    root = directions * np.sqrt(weights.clip(0)) @ directions.T  # of M, which may be singular
    influence_ = vectors * influence(t, horizon, a) @ vectors.T
    information = vectors * _information(left, a) @ vectors.T / penalty
    value = root @ np.linalg.solve(horizon**2 * np.eye(d) + root @ information @ root, root)
    return MatrixControl(influence_, value, influence_ @ value / penalty)


# ---- any number of coordinates, discrete time ---------------------------------------------------


def beta_of_weights(weights: ArrayLike) -> Array:
    """The averaging weights β_1 ... β_T of the average Σ w_k·x_k: β_k = w_k / (w_0 + ... + w_k).

    Equal weights give 1/(k+1).

    Args:
        weights: w_0 ... w_T, of any sign, with the sum 1.

    Raises:
        ValueError: the sum is not 1, or a partial sum is 0.
    """
    weights = in_range("weights", weights, "(-inf, inf)")
    if weights.ndim != 1 or len(weights) < 2:
        raise ValueError(f"weights must be two or more in a row, got the shape {weights.shape}")
    so_far = np.cumsum(weights)
    if abs(so_far[-1] - 1) > 1e-9:
        raise ValueError(f"weights must add up to 1, they are {so_far[-1] - 1:+g} off")
    nothing = abs(so_far[1:]) <= 1e-12 * abs(weights).max()
    if nothing.any():
        raise ValueError(f"the first {int(nothing.argmax()) + 2} weights must not add up to 0")
    return np.asarray(weights[1:] / so_far[1:])


class ControlOutcome(NamedTuple):
    """Expected result of a controller."""

    error: float  # E x̄_TᵀM·x̄_T
    effort: float  # Σ E|u|²
    cost: float  # error + ρ·effort


@dataclass(frozen=True)
class Regulator:
    """The discrete problem.

    Args:
        curvature: a = η·H: (n,), coordinates in (0, 2), or (d, d), symmetric.
        beta: averaging weights β_1 ... β_T, from `beta_of_weights` or a rule of
            `paceline.averaging`.
        penalty: ρ > 0 on the control.
        noise: variance of a step's noise, >= 0, one number or one per coordinate; or (d, d).
        start: x_0, one number or one per coordinate.
        terminal: M, (d, d), symmetric and positive semidefinite. Default: the identity.

    Raises:
        ValueError: an argument is out of its range or has a wrong shape.
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
        in_range("curvature", eigenvalues("curvature", matrix), "(0, 2)")
        in_range("penalty", self.penalty, "(0, inf)")
        beta = in_range("beta", self.beta, "(-inf, inf)")
        if beta.ndim != 1 or not len(beta):
            raise ValueError(f"beta must be one or more in a row, got the shape {beta.shape}")
        for name in ("noise", "start"):
            shape = np.shape(getattr(self, name))
            if shape not in ((), (1,), (d,)) and (name, len(shape)) != ("noise", 2):
                raise ValueError(f"{name} must be of the shape () or ({d},), got {shape}")
        noise = np.asarray(self.noise, dtype=np.float64)
        noise = noise if noise.ndim == 2 else np.diag(np.broadcast_to(noise, (d,)))
        start = in_range("start", self.start, "(-inf, inf)")
        terminal = np.eye(d) if self.terminal is None else self.terminal
        vars(self).update(
            curvature=matrix,
            beta=beta,
            noise=semidefinite("noise", noise, d),
            start=np.broadcast_to(start, (d,)),
            terminal=semidefinite("terminal", terminal, d),
        )

    @property
    def steps(self) -> int:
        """T."""
        return len(self.beta)

    def _step(self, k: int) -> tuple[Array, Array]:
        """A and B of (x, x̄)_{k+1} = A·(x, x̄)_k + B·(u_k + ξ_k)."""
        one, new = np.eye(len(self.curvature)), self.beta[k]
        stay = one - self.curvature
        a = np.block([[stay, 0 * one], [new * stay, (1 - new) * one]])
        return a, np.vstack([one, new * one])

    def solve(self) -> tuple[Array, ControlOutcome]:
        """The best of all controllers.

        Returns:
            Its gains (T, d, 2d), with u_k = -gains[k] @ (x_k, x̄_k), and its outcome.
        """
        d = len(self.curvature)
        value = np.pad(self.terminal, (d, 0))
        gains = np.empty((self.steps, d, 2 * d))
        for k in reversed(range(self.steps)):
            a, b = self._step(k)
            pulled = b.T @ value
            gains[k] = np.linalg.solve(self.penalty * np.eye(d) + pulled @ b, pulled @ a)
            value = a.T @ value @ (a - b @ gains[k])
            value = (value + value.T) / 2
        return gains, self.outcome(gains)

    def feedback(self, live: ArrayLike, average: ArrayLike) -> Array:
        """The gains of u_k = -live_k·x_k - average_k·x̄_k, coordinate by coordinate.

        Args:
            live: broadcasts to (T, d).
            average: broadcasts to (T, d). `feedback(λ, -λ)` is a pull to the average of gain λ.

        Returns:
            gains (T, d, 2d).
        """
        shape = (self.steps, len(self.curvature))
        parts = [np.broadcast_to(np.asarray(x, dtype=np.float64), shape) for x in (live, average)]
        return np.concatenate([x[..., None] * np.eye(shape[1]) for x in parts], axis=-1)

    def estimated(self, gains: Array) -> Array:
        """A controller's gains with the maximum-likelihood estimate in the minimum's place.

        Certainty equivalence: distances are measured from the estimate, not from the minimum. In
        step 0 there is no estimate yet, and the control is 0.

        Args:
            gains: (T, d, 2d), with u_k = -gains[k] @ (x_k, x̄_k).

        Returns:
            gains (T, d, 3d), with u_k = -gains[k] @ (x_k, x̄_k, e_k) and the estimate's error e_k.
        """
        live, average = np.split(gains, 2, axis=-1)
        known = np.arange(self.steps)[:, None, None] > 0
        return np.concatenate([live, average, -live - average], axis=-1) * known

    def outcome(self, gains: Array) -> ControlOutcome:
        """Error and effort of a linear controller, exactly.

        Args:
            gains: (T, d, 2d), with u_k = -gains[k] @ (x_k, x̄_k), or (T, d, 3d), of `estimated`.

        Raises:
            ValueError: gains has another shape.
        """
        d, start = len(self.curvature), np.tile(self.start, 2)
        shapes = [(self.steps, d, n * d) for n in (2, 3)]
        if np.shape(gains) not in shapes:
            raise ValueError(f"gains must be of the shape {shapes[0]}, got {np.shape(gains)}")
        gains = np.pad(gains, ((0, 0), (0, 0), (0, 3 * d - gains.shape[-1])))
        second, effort = np.zeros((3 * d, 3 * d)), 0.0  # of (x, x̄, e)
        second[: 2 * d, : 2 * d] = np.outer(start, start)
        for k, gain in enumerate(gains):
            a, b = self._step(k)
            effort += float(np.trace(gain @ second @ gain.T))
            # e_{k+1} = (k·e_k + a⁻¹·ξ_k) / (k+1), and no control moves it
            closed = np.pad(a, (0, d))
            closed[: 2 * d] -= b @ gain
            closed[2 * d :, 2 * d :] = k / (k + 1) * np.eye(d)
            noise = np.vstack([b, np.linalg.inv(self.curvature) / (k + 1)])
            second = closed @ second @ closed.T + noise @ self.noise @ noise.T
        error = float(np.trace(self.terminal @ second[d : 2 * d, d : 2 * d]))
        return ControlOutcome(error, effort, error + self.penalty * effort)

    def estimate_error(self) -> float:
        """The error if the maximum-likelihood estimate itself is returned; no control changes it.

        It is tr(M·a⁻¹·Q·a⁻¹)/T with the noise's covariance Q.
        """
        newton = np.linalg.inv(self.curvature)
        return float(np.trace(self.terminal @ newton @ self.noise @ newton)) / self.steps
