r"""The stochastic quadratic, solved: exact means and covariances of live weights and average.

Weights are told as their distance from the minimum, so that the gradient is α·θ plus noise of
variance s_g², and with the learning rate η a step has a = ηα and noise of variance s² = η²·s_g².
A method keeps the live weights θ and, with an average, its own state; all of it moves by

    x_{k+1} = A_k·x_k + B_k·ξ_k - 1·δ_k,      ξ_k ~ N(0, s²),   δ_k ~ N(0, q²)

where δ is how far the minimum moves in a step, away from all of the state but momentum. So

    mean_{k+1} = A_k·mean_k,      cov_{k+1} = A_k·cov_k·A_kᵀ + s²·B_k·B_kᵀ + q²·1·1ᵀ

The first formulas of this file are for one coordinate, with arrays that broadcast:

    θ_{k+1} = (1-a-c)·θ_k + c·θ̂_k + ξ_k,      θ̂_{k+1} = (1-β)·θ̂_k + β·θ_{k+1}

is PACE with the gain c and the averaging weight β; c = 0 is an EMA of SGD, β = 1 is SGD itself.

Source: the model is that of Au & Block, arXiv:2606.25086 (2026), appendix; closed forms are ours.
All is float64.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import solve_discrete_lyapunov

Array: TypeAlias = NDArray[np.float64]
Schedule: TypeAlias = Callable[[int], ArrayLike]  # of the step, from 1
Numbers: TypeAlias = Any  # of a dataclass: ArrayLike goes in, float64 arrays are kept


# ---- one coordinate, closed forms ---------------------------------------------------------------


def require(name: str, values: ArrayLike, low: float, high: float, *, open_: str = "") -> Array:
    """The values as float64, all of them in a range.

    Args:
        name: of the argument, for the message.
        values: any shape.
        low: least value.
        high: largest value.
        open_: "low", "high" or "both": that end does not belong to the range.

    Raises:
        ValueError: one is outside, by how much, or is no finite number.
    """
    array = np.asarray(values, dtype=np.float64)
    range_ = f"in {'(' if open_ in ('low', 'both') else '['}{low:g}, {high:g}"
    range_ += ")" if open_ in ("high", "both") or high == math.inf else "]"
    if not np.isfinite(array).all():
        raise ValueError(
            f"{name} must be finite numbers {range_}, got {array[~np.isfinite(array)][0]}"
        )
    below = array <= low if open_ in ("low", "both") else array < low
    above = array >= high if open_ in ("high", "both") else array > high
    for outside, end, side in ((below, low, "below"), (above, high, "above")):
        if outside.any():
            worst = array[outside].min() if side == "below" else array[outside].max()
            by = f"{abs(worst - end):g} {side}" if worst != end else "which is the end itself"
            raise ValueError(f"{name} must be {range_}, got {worst:g}, {by}")
    return array


def _coordinate(a: ArrayLike, beta: ArrayLike, c: ArrayLike) -> tuple[Array, Array, Array]:
    return (
        require("a", a, 0, math.inf, open_="low"),
        require("beta", beta, 0, 1, open_="low"),
        require("c", c, 0, math.inf),
    )


def largest_gain(a: ArrayLike, beta: ArrayLike) -> Array:
    """The gain below which PACE is stable.

        c < (2 - a)·(2 - β) / (2·(1 - β))

    At that bound an eigenvalue is -1. Infinite for β = 1, where the pull has nothing to pull to.

    Args:
        a: learning rate times curvature, in (0, 2); any shape.
        beta: averaging weight, in (0, 1]; broadcasts.

    Raises:
        ValueError: an argument is out of its range.
    """
    a, beta = require("a", a, 0, 2, open_="both"), require("beta", beta, 0, 1, open_="low")
    with np.errstate(divide="ignore"):
        return np.asarray((2 - a) * (2 - beta) / (2 * (1 - beta)))


def better_gain(a: ArrayLike, beta: ArrayLike) -> Array:
    """The gain below which PACE's limiting error is below that of the EMA with the same β.

        c* = ((2-a)·(2-β)/(1+w) - (1-w)) / (1-β),      w = (1-a)·(1-β)

    It is short of the stability bound by aβ(1-w) / (2(1+w)(1-β)), and at least 1 for all a in
    (0, 1]: without drift a pull that does not go past the average never does harm to the limiting
    error there. (With A = 1-a and B = 1-β, (1+w)·B·(c*-1) = A·(1 + B - B² + AB²).) For larger a it
    can be negative: no pull helps there.

    Args:
        a: learning rate times curvature, in (0, 2); any shape.
        beta: averaging weight, in (0, 1); broadcasts.

    Raises:
        ValueError: an argument is out of its range.
    """
    a = require("a", a, 0, 2, open_="both")
    beta = require("beta", beta, 0, 1, open_="both")
    w = (1 - a) * (1 - beta)
    return np.asarray(((2 - a) * (2 - beta) / (1 + w) - (1 - w)) / (1 - beta))


def spectral_radius(a: ArrayLike, beta: ArrayLike, c: ArrayLike) -> Array:
    """The factor by which the start is forgotten in a step, in the long run; < 1 if stable.

    The larger absolute value of the roots of z² = φ1·z + φ2, with

        φ1 = 2 - a - β - c·(1-β),      φ2 = -(1-β)·(1-a-c)

    Args:
        a: learning rate times curvature, > 0; any shape.
        beta: averaging weight, in (0, 1]; broadcasts.
        c: gain, >= 0; broadcasts.

    Raises:
        ValueError: an argument is out of its range. Unstable parameters have a radius >= 1.
    """
    a, beta, c = _coordinate(a, beta, c)
    # In u = 1 - z the roots are real, with the sum a + β + s and the product aβ; the slow one by
    # division, for it may be far smaller than what it would be a difference of.
    s = c * (1 - beta)
    fast = (a + beta + s + np.sqrt((a - beta) ** 2 + 2 * s * (a + beta) + s**2)) / 2
    return np.asarray(np.maximum(abs(1 - a * beta / fast), abs(1 - fast)))


def half_life(radius: ArrayLike) -> Array:
    """Steps after which half of the start is forgotten: log(1/2) / log(radius).

    Args:
        radius: spectral radius, in [0, 1); any shape.

    Raises:
        ValueError: it is out of its range.
    """
    radius = require("radius", radius, 0, 1, open_="high")
    with np.errstate(divide="ignore"):
        return np.asarray(math.log(0.5) / np.log(radius))


def limiting_error(
    a: ArrayLike, beta: ArrayLike, c: ArrayLike, noise: ArrayLike = 1.0, drift: ArrayLike = 0.0
) -> Array:
    """The returned model's mean squared distance from the minimum in the limit, lim E θ̂².

        β²s²(1-φ2) + q²((1+φ2²)(1-φ2) + 2φ1φ2)
        --------------------------------------,    φ1 = 2-a-β-c(1-β),  φ2 = -(1-β)(1-a-c)
               (1+φ2)·((1-φ2)² - φ1²)

    Args:
        a: learning rate times curvature, > 0; any shape.
        beta: averaging weight, in (0, 1]; broadcasts.
        c: gain of the pull, >= 0 and below `largest_gain(a, beta)`; broadcasts. 0: an EMA.
        noise: variance s² of the noise of a step, >= 0; broadcasts.
        drift: variance q² of what the minimum moves in a step, >= 0; broadcasts.

    Raises:
        ValueError: an argument is out of its range, or the recursion is not stable; by how much.
    """
    a, beta, c = _coordinate(a, beta, c)
    noise, drift = require("noise", noise, 0, math.inf), require("drift", drift, 0, math.inf)
    if (a >= 2).any():
        raise ValueError(f"not stable: a must be below 2, got {a.max():g}, {a.max() - 2:g} above")
    bound = largest_gain(a, beta)
    if (c >= bound).any():
        over = np.where(c >= bound, c - bound, -math.inf)
        at = np.unravel_index(over.argmax(), over.shape)
        values = [np.broadcast_to(x, over.shape)[at] for x in (c, bound, a, beta)]
        raise ValueError(
            "not stable: c must be below {1:.6g} at a = {2:g} and beta = {3:g}, "
            "got {0:g}, {4:.3g} above".format(*values, over[at])
        )
    # The formula above with its differences of nearly equal numbers worked out; with φ1 = 1-φ2-aβ.
    s, w = c * (1 - beta), (1 - a) * (1 - beta)
    phi2, one_minus, one_plus = s - w, 1 + w - s, a + beta - a * beta + s
    of_noise = beta**2 * noise * one_minus
    of_drift = drift * (one_minus * one_plus**2 - 2 * phi2 * a * beta)
    last = (2 - a) * (2 - beta) - 2 * s  # 1 + φ1 - φ2
    return np.asarray((of_noise + of_drift) / (one_plus * a * beta * last))


def whole(name: str, values: ArrayLike) -> None:
    """Refuse numbers that are not whole.

    Raises:
        ValueError: one is not.
    """
    for value in np.ravel(values):
        if value != np.floor(value):
            raise ValueError(f"{name} must be whole, got {value:g}")


def lookahead_error(
    a: ArrayLike,
    every: ArrayLike,
    alpha: ArrayLike,
    noise: ArrayLike = 1.0,
    drift: ArrayLike = 0.0,
) -> Array:
    """The same limit for Lookahead's slow weights, just after a synchronisation.

    From one synchronisation to the next, in K steps, with f = (1-a)^K,

        φ' = (1-α+αf)·φ + α·Σ_j (1-a)^j ξ_j - Σ_j (1-α+α(1-a)^j)·δ_j,      j = 0 ... K-1

    Args:
        a: learning rate times curvature, in (0, 2); any shape.
        every: K, steps between synchronisations, whole, >= 1; broadcasts.
        alpha: α, share of the way that the slow weights go, in (0, 1]; broadcasts.
        noise: variance s² of the noise of a step, >= 0; broadcasts.
        drift: variance q² of what the minimum moves in a step, >= 0; broadcasts.

    Raises:
        ValueError: an argument is out of its range.

    Source: Zhang et al., Lookahead Optimizer, arXiv:1907.08610 (2019), for the method.
    """
    a = require("a", a, 0, 2, open_="both")
    every, alpha = require("every", every, 1, math.inf), require("alpha", alpha, 0, 1, open_="low")
    whole("every", every)
    noise, drift = require("noise", noise, 0, math.inf), require("drift", drift, 0, math.inf)
    stay, kept = 1 - a, 1 - alpha
    f = stay**every
    squares = (1 - f**2) / (a * (2 - a))  # Σ (1-a)^2j
    weights = every * kept**2 + 2 * kept * alpha * (1 - f) / a + alpha**2 * squares
    cycle = kept + alpha * f
    return np.asarray((alpha**2 * noise * squares + drift * weights) / (1 - cycle**2))


# ---- any number of coordinates, any method ------------------------------------------------------


@dataclass(frozen=True)
class Quadratic:
    """A quadratic loss ½·θᵀHθ, noise in its gradients, and where training starts.

    Args:
        curvature: H. Of shape (n,): n independent coordinates, > 0. Of shape (d, d): symmetric
            and positive definite.
        noise: variance s_g² >= 0 of the gradients' noise, which broadcasts against n coordinates;
            or with a matrix H, a number or the covariance, (d, d).
        drift: the same of what the minimum moves in a step.
        start: distance of the first weights from the minimum, which broadcasts, too.

    Raises:
        ValueError: a variance is negative, or H or a covariance is not symmetric or definite; by
            how much.
    """

    curvature: Numbers
    noise: Numbers = 1.0
    drift: Numbers = 0.0
    start: Numbers = 1.0

    def __post_init__(self) -> None:
        curvature = np.atleast_1d(np.asarray(self.curvature, dtype=np.float64))
        object.__setattr__(self, "curvature", curvature)
        if curvature.ndim == 1:
            require("curvature", curvature, 0, math.inf, open_="low")
            for name in ("noise", "drift"):
                object.__setattr__(self, name, require(name, getattr(self, name), 0, math.inf))
            for name in ("noise", "drift", "start"):
                last = np.shape(getattr(self, name))[-1:]
                if last not in ((), (1,), curvature.shape):
                    raise ValueError(
                        f"{name} must be one or as many as the {len(curvature)} of curvature, got "
                        f"{last[0]}"
                    )
        else:
            least = eigenvalues("curvature", curvature)[0]
            if least <= 0:
                raise ValueError(
                    f"curvature must be positive definite; its least eigenvalue is {least:g}"
                )
            for name in ("noise", "drift"):
                given = np.asarray(getattr(self, name), dtype=np.float64)
                full = (
                    require(name, given, 0, math.inf) * np.eye(self.size)
                    if given.ndim == 0
                    else given
                )
                if full.shape != curvature.shape:
                    raise ValueError(
                        f"{name} must be a number or of the shape {curvature.shape} of curvature, "
                        f"got {full.shape}"
                    )
                least, scale = eigenvalues(name, full)[0], abs(full).max()
                if least < -1e-12 * scale:
                    raise ValueError(
                        f"{name} has a negative variance, {least:g}, in some direction"
                    )
                object.__setattr__(self, name, full)
        start = require("start", self.start, -math.inf, math.inf)
        object.__setattr__(
            self, "start", np.broadcast_to(start, (self.size,)) if self.general else start
        )

    @property
    def general(self) -> bool:
        """Whether H is a matrix."""
        return bool(self.curvature.ndim == 2)

    @property
    def size(self) -> int:
        """Number of coordinates."""
        return len(self.curvature)

    def loss(self, moment: ArrayLike) -> Array:
        """Expected excess loss, ½·Σ αᵢ·E θᵢ² or ½·tr(H·E θθᵀ).

        Args:
            moment: second moments of the weights: (..., n), or with a matrix H (d, d).
        """
        return np.asarray(
            (self.curvature * np.asarray(moment)).sum((-2, -1) if self.general else -1) / 2
        )


def eigenvalues(name: str, matrix: Array) -> Array:
    """Of a symmetric matrix, from the least.

    Raises:
        ValueError: it is not square, finite and symmetric; by how much.
    """
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(
            f"{name} must be a vector or a square matrix, got the shape {matrix.shape}"
        )
    if not np.isfinite(matrix).all():
        raise ValueError(f"{name} must be finite")
    skew = abs(matrix - matrix.T).max()
    if skew > 1e-12 * abs(matrix).max():
        raise ValueError(f"{name} must be symmetric; it differs from its transpose by {skew:g}")
    return np.asarray(np.linalg.eigvalsh(matrix))


class Blocks(NamedTuple):
    """A step of a method, of the blocks of its state: the live weights first, the returned last."""

    transition: list[list[Any]]
    noise: list[Any]  # how much of ξ enters each block
    place: list[float]  # 1 for a place, which begins at the start and drifts; 0 for a velocity


@dataclass(frozen=True)
class Method(ABC):
    """A linear method. Numbers may be arrays that broadcast against the coordinates.

    Args:
        lr: learning rate η > 0, for each coordinate or all, or a function of the step k = 1, 2, ...
    """

    lr: Numbers  # or a Schedule

    def __post_init__(self) -> None:
        if not callable(self.lr):
            require("lr", self.lr, 0, math.inf, open_="low")

    @property
    @abstractmethod
    def constant(self) -> bool:
        """Whether every cycle of `period` steps is the same, so that there is a limit."""

    @property
    def period(self) -> int:
        """Steps of a cycle."""
        return 1

    @abstractmethod
    def blocks(self, k: int, a: Any, one: Any) -> Blocks:
        """Step k = 1, 2, ...

        Args:
            k: the step.
            a: η·H: coordinates' values, or a matrix.
            one: 1, or the identity matrix.
        """


@dataclass(frozen=True)
class Pull(Method):
    """SGD with an average and a pull toward it: SGD, EMA, uniform average and PACE in one.

        m_k     = μ·m_{k-1} + (1-μ)·g_k
        θ_k     = θ_{k-1} - η·m_k + c·(θ̂_{k-1} - θ_{k-1})
        θ̂_k     = (1-β_k)·θ̂_{k-1} + β_k·θ_k,      θ̂_0 = θ_0

    Args:
        lr: η.
        beta: averaging weight in (0, 1], or a function of k, such as `PowerEMA(0.5).weight`.
            1: SGD itself; `Uniform().weight`: the mean of all iterates.
        gain: c >= 0, for each coordinate or all, or a function of k. 0: the average watches.
        momentum: μ in [0, 1), as Adam's β1. 0: none, and no state for it.
    """

    beta: Numbers = 1.0  # or a Schedule
    gain: Numbers = 0.0  # or a Schedule
    momentum: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, high, open_ in (("beta", 1, "low"), ("gain", math.inf, "")):
            if not callable(getattr(self, name)):
                require(name, getattr(self, name), 0, high, open_=open_)
        require("momentum", self.momentum, 0, 1, open_="high")
        if self.momentum and callable(self.lr):
            raise ValueError("momentum goes with a constant lr; got a function for it")

    @property
    def constant(self) -> bool:
        """Whether nothing depends on the step."""
        return not any(map(callable, (self.lr, self.beta, self.gain)))

    def blocks(self, k: int, a: Any, one: Any) -> Blocks:
        """One step."""
        beta, gain, mu = _shared("beta", self.beta, k, one), _at(self.gain, k), self.momentum
        c = gain * one if np.ndim(one) == 0 or np.ndim(gain) == 0 else np.diag(gain)
        rest = 1 - mu
        live = [one - rest * a - c, c]
        average = [beta * live[0], (1 - beta) * one + beta * c]
        if not mu:
            return Blocks([live, average], [1.0, beta], [1, 1])
        # The state m holds η·m, with the sign of a step.
        return Blocks(
            [
                [live[0], mu * one, live[1]],
                [-rest * a, mu * one, 0 * one],
                [average[0], beta * mu * one, average[1]],
            ],
            [rest, rest, beta * rest],
            [1, 0, 1],
        )


@dataclass(frozen=True)
class ScheduleFree(Method):
    """Schedule-Free SGD.

        y_k = (1-μ)·z_{k-1} + μ·x_{k-1}
        z_k = z_{k-1} - η·∇f(y_k)
        x_k = (1-1/k)·x_{k-1} + z_k/k

    The state is z and the returned x.

    Args:
        lr: η.
        mu: μ in [0, 1), how near to the average the gradient is taken.

    Source: Defazio et al., The Road Less Scheduled, arXiv:2405.15682 (2024).
    """

    mu: Numbers = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        require("mu", self.mu, 0, 1, open_="high")

    @property
    def constant(self) -> bool:
        """Never: its average is of all iterates."""
        return False

    def blocks(self, k: int, a: Any, one: Any) -> Blocks:
        """One step."""
        # The gradient's product with a point between z and x: of a matrix, its columns.
        z, x, new = one - a * (1 - self.mu), -a * self.mu, 1 / k
        return Blocks([[z, x], [new * z, (1 - new) * one + new * x]], [1.0, new], [1, 1])


@dataclass(frozen=True)
class Lookahead(Method):
    """Slow weights that go a share of the way to SGD's every K steps, and SGD's back to them.

    Args:
        lr: η.
        every: K >= 1, steps.
        alpha: α in (0, 1].

    Source: Zhang et al., Lookahead Optimizer, arXiv:1907.08610 (2019).
    """

    every: int = 5
    alpha: Numbers = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require("every", self.every, 1, math.inf)
        whole("every", self.every)
        require("alpha", self.alpha, 0, 1, open_="low")

    @property
    def constant(self) -> bool:
        """Whether the learning rate is one."""
        return not callable(self.lr)

    @property
    def period(self) -> int:
        """K."""
        return self.every

    def blocks(self, k: int, a: Any, one: Any) -> Blocks:
        """One step."""
        alpha = _shared("alpha", self.alpha, k, one)
        if k % self.every:
            return Blocks([[one - a, 0 * one], [0 * one, one]], [1.0, 0.0], [1, 1])
        slow = [alpha * (one - a), (1 - alpha) * one]
        return Blocks([slow, slow], [alpha, alpha], [1, 1])


def _at(value: Any, k: int) -> Array:
    return np.asarray(value(k) if callable(value) else value, dtype=np.float64)


def _shared(name: str, value: Any, k: int, one: Any) -> Array:
    """A number that all coordinates of a matrix share; without one, any that broadcast."""
    at = _at(value, k)
    if np.ndim(one) and at.ndim:
        raise ValueError(f"{name} must be one number for a curvature that is a matrix")
    return at


# ---- moments ------------------------------------------------------------------------------------


class Moments(NamedTuple):
    """Mean and covariance of a method's state after a step.

    The blocks of the state come first: mean (m, ...) and cov (m, m, ...), where ... are the
    coordinates, with whatever the method's numbers broadcast to; or, with a matrix H, (m·d,) and
    (m·d, m·d). Live weights are the first block, the returned ones the last.
    """

    mean: Array
    cov: Array

    def second(self, problem: Quadratic, block: int = -1) -> Array:
        """E θθᵀ of a block: of each coordinate, or with a matrix H, (d, d)."""
        d = problem.size if problem.general else 1
        last = len(self.mean) // d + block if block < 0 else block
        if not problem.general:
            return np.asarray(self.mean[last] ** 2 + self.cov[last, last])
        part = slice(last * d, (last + 1) * d)
        return np.asarray(np.outer(self.mean[part], self.mean[part]) + self.cov[part, part])


def _step(method: Method, problem: Quadratic, k: int) -> tuple[Array, Array, list[float]]:
    """A_k, the covariance of what is added, and which blocks are places; matrix axes first."""
    lr, curvature = _at(method.lr, k), problem.curvature
    noise, drift = problem.noise, problem.drift
    if problem.general:
        one = np.eye(problem.size)
        rates = lr * one if lr.ndim == 0 else np.diag(lr)
        rows, enters, place = method.blocks(k, rates @ curvature, one)
        b = np.vstack([x * rates for x in enters])
        moved = np.vstack([x * one for x in place])
        return np.block(rows), b @ noise @ b.T + moved @ drift @ moved.T, place
    rows, enters, place = method.blocks(k, lr * curvature, 1.0)
    shape = np.broadcast_shapes(
        *(np.shape(x) for row in rows for x in row),
        *(np.shape(x) for x in enters),
        *(np.shape(x) for x in (lr, noise, drift, curvature)),
    )
    a = np.array([[np.broadcast_to(x, shape) for x in row] for row in rows])
    noise = lr**2 * noise
    each = list(zip(enters, place, strict=True))
    added = [[x * y * noise + p * r * drift for y, r in each] for x, p in each]
    q = np.array([[np.broadcast_to(x, shape) for x in row] for row in added])
    return a, q, place


def _times(a: Array, b: Array) -> Array:
    return np.asarray(np.einsum("ij...,jk...->ik...", a, b))


def moments(method: Method, problem: Quadratic) -> Iterator[Moments]:
    """Exact mean and covariance of the state after 0, 1, 2, ... steps, without end.

    All blocks start where the weights do, but for momentum, which starts from 0.

    Args:
        method: its numbers broadcast against the coordinates of the problem.
        problem: the quadratic.
    """
    a, q, place = _step(method, problem, 1)
    d = problem.size if problem.general else 1
    mean = np.zeros(a.shape[1:])
    for block, is_place in enumerate(place):
        mean[block * d : (block + 1) * d] = is_place * problem.start
    cov, k = np.zeros_like(a), 0
    while True:
        yield Moments(mean, cov)
        k += 1
        a, q, _ = _step(method, problem, k)
        mean = np.einsum("ij...,j...->i...", a, mean)
        cov = _times(_times(a, cov), np.swapaxes(a, 0, 1)) + q


def transition(method: Method, problem: Quadratic) -> tuple[Array, Array]:
    """A of a whole cycle, and the covariance of what a cycle adds.

    Returns:
        Both (m, m, ...), or with a matrix H, (m·d, m·d).

    Raises:
        ValueError: the method changes with the step, and has no cycle.
    """
    if not method.constant:
        raise ValueError(f"{type(method).__name__} changes with the step; it has no limit")
    a, q, _ = _step(method, problem, 1)
    for k in range(2, method.period + 1):
        b, added, _ = _step(method, problem, k)
        a, q = _times(b, a), _times(_times(b, q), np.swapaxes(b, 0, 1)) + added
    return a, q


def radius(method: Method, problem: Quadratic) -> Array:
    """The spectral radius a step: of each coordinate, or with a matrix H of all together.

    Raises:
        ValueError: the method changes with the step.
    """
    a, _ = transition(method, problem)
    eigenvalues = np.linalg.eigvals(np.moveaxis(a, (0, 1), (-2, -1)))
    return np.asarray(abs(eigenvalues).max(-1) ** (1 / method.period))


def limit(method: Method, problem: Quadratic) -> Moments:
    """Mean, which is 0, and covariance of the state in the limit: cov = A·cov·Aᵀ + Q.

    Of Lookahead, just after a synchronisation.

    Raises:
        ValueError: the method changes with the step, or is not stable; by how much.

    Source: SciPy's solver of the discrete Lyapunov equation.
    """
    a, q = transition(method, problem)
    worst = float(radius(method, problem).max())
    if worst >= 1:
        raise ValueError(
            f"not stable: the spectral radius must be below 1, it is {worst:.6g}, "
            f"{worst - 1:.3g} above"
        )
    if problem.general:
        return Moments(np.zeros(len(a)), solve_discrete_lyapunov(a, q))
    cov = np.empty_like(q)
    for at in np.ndindex(a.shape[2:]):
        cov[(..., *at)] = solve_discrete_lyapunov(a[(..., *at)], q[(..., *at)])
    return Moments(np.zeros(a.shape[1:]), cov)
