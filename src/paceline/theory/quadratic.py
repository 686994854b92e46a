r"""The stochastic quadratic, solved: exact means and covariances of live weights and average.

Weights are distances from the minimum. The gradient is α·θ plus noise of variance s_g². At the
learning rate η a step therefore has a = ηα and noise of variance s² = η²·s_g². A method's state
holds the live weights θ, the average θ̂ if there is one, and its own buffers. It moves by

    x_{k+1} = A_k·x_k + B_k·ξ_k - 1·δ_k,      ξ_k ~ N(0, s²),   δ_k ~ N(0, q²)

where δ is the move of the minimum in a step; it shifts all of the state except momentum. So

    mean_{k+1} = A_k·mean_k,      cov_{k+1} = A_k·cov_k·A_kᵀ + s²·B_k·B_kᵀ + q²·1·1ᵀ

The closed forms come first. They are for one coordinate and take arrays that broadcast:

    θ_{k+1} = (1-a-λ)·θ_k + λ·θ̂_k + ξ_k,      θ̂_{k+1} = (1-β)·θ̂_k + β·θ_{k+1}

is PACE with the gain λ and the averaging weight β. λ = 0 is an EMA of SGD, β = 1 is SGD.

Source: the model is that of Au & Block, arXiv:2606.25086 (2026), appendix; the closed forms were
derived here. All values are float64.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array: TypeAlias = NDArray[np.float64]
StepFunction: TypeAlias = Callable[[int], ArrayLike]  # takes the step k = 1, 2, ...
Numbers: TypeAlias = Any  # a dataclass takes an ArrayLike and keeps a float64 array


def in_range(name: str, values: ArrayLike, range_: str, *, whole: bool = False) -> Array:
    """Check that all values are in a range.

    Args:
        name: the argument, for the message.
        values: any shape.
        range_: such as "[0, inf)"; an end in a round bracket is outside.
        whole: accept whole numbers only.

    Returns:
        The values as float64.

    Raises:
        ValueError: a value is not finite, outside the range, or not whole.
    """
    array = np.asarray(values, dtype=np.float64)
    low, high = map(float, range_[1:-1].split(","))
    odd = array[~np.isfinite(array)]
    if odd.size:
        raise ValueError(f"{name} must be finite numbers in {range_}, got {odd[0]}")
    below = array <= low if range_[0] == "(" else array < low
    above = array >= high if range_[-1] == ")" else array > high
    for outside, end, side in ((below, low, "below"), (above, high, "above")):
        if outside.any():
            worst = array[outside].min() if side == "below" else array[outside].max()
            by = f"{abs(worst - end):g} {side}" if worst != end else "which is the end itself"
            raise ValueError(f"{name} must be in {range_}, got {worst:g}, {by}")
    if whole and (array != np.floor(array)).any():
        raise ValueError(f"{name} must be whole, got {array[array != np.floor(array)][0]:g}")
    return array


def eigenvalues(name: str, matrix: Array) -> Array:
    """Eigenvalues of a symmetric matrix, in ascending order.

    Raises:
        ValueError: the matrix is not square, not finite, or not symmetric.
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


def semidefinite(name: str, matrix: ArrayLike, d: int) -> Array:
    """Check that a (d, d) matrix is symmetric and positive semidefinite; return it as float64.

    Raises:
        ValueError: the matrix has another shape, is not symmetric, or has a negative eigenvalue.
    """
    array = np.asarray(matrix, dtype=np.float64)
    if array.shape != (d, d):
        raise ValueError(f"{name} must be of the shape {(d, d)}, got {array.shape}")
    least = eigenvalues(name, array)[0]
    if least < -1e-12 * abs(array).max():
        raise ValueError(f"{name} must be positive semidefinite; its least eigenvalue is {least:g}")
    return array


# ---- one coordinate, closed forms ---------------------------------------------------------------


def _coordinate(a: ArrayLike, beta: ArrayLike, gain: ArrayLike) -> tuple[Array, Array, Array]:
    a, beta = in_range("a", a, "(0, inf)"), in_range("beta", beta, "(0, 1]")
    return a, beta, in_range("gain", gain, "[0, inf)")


def largest_gain(a: ArrayLike, beta: ArrayLike) -> Array:
    """The gain below which PACE is stable.

        λ < (2 - a)·(2 - β) / (2·(1 - β))

    At this bound an eigenvalue is -1. The bound is infinite for β = 1, where the average is the
    live weights and the pull does nothing.

    Args:
        a: learning rate times curvature, in (0, 2); any shape.
        beta: averaging weight, in (0, 1]; broadcasts.

    Raises:
        ValueError: an argument is out of its range.
    """
    a, beta = in_range("a", a, "(0, 2)"), in_range("beta", beta, "(0, 1]")
    with np.errstate(divide="ignore"):
        return np.asarray((2 - a) * (2 - beta) / (2 * (1 - beta)))


def better_gain(a: ArrayLike, beta: ArrayLike) -> Array:
    """The gain below which PACE's limiting error is below that of the EMA with the same β.

        λ* = ((2-a)·(2-β)/(1+w) - (1-w)) / (1-β),      w = (1-a)·(1-β)

    λ* is smaller than the stability bound by aβ(1-w) / (2(1+w)(1-β)). It is at least 1 for all a
    in (0, 1]: without drift, a gain of at most 1 never raises the limiting error there. (With
    A = 1-a and B = 1-β, (1+w)·B·(λ*-1) = A·(1 + B - B² + AB²).) For larger a it can be negative;
    then no pull lowers the error.

    Arguments and errors are those of `largest_gain`, with beta below 1.
    """
    a, beta = in_range("a", a, "(0, 2)"), in_range("beta", beta, "(0, 1)")
    w = (1 - a) * (1 - beta)
    return np.asarray(((2 - a) * (2 - beta) / (1 + w) - (1 - w)) / (1 - beta))


def spectral_radius(a: ArrayLike, beta: ArrayLike, gain: ArrayLike) -> Array:
    """The factor by which a step shrinks the influence of the start, in the long run.

    It is below 1 if the recursion is stable. It is the larger absolute value of the roots of
    z² = φ1·z + φ2, with

        φ1 = 2 - a - β - λ·(1-β),      φ2 = -(1-β)·(1-a-λ)

    Arguments and errors are those of `limiting_error`, but any a > 0 and gain >= 0 may be.
    """
    a, beta, gain = _coordinate(a, beta, gain)
    # In u = 1 - z the roots are real, with the sum a + β + s and the product aβ. The slow root
    # comes from a division, because a difference would lose its digits.
    s = gain * (1 - beta)
    fast = (a + beta + s + np.sqrt((a - beta) ** 2 + 2 * s * (a + beta) + s**2)) / 2
    return np.asarray(np.maximum(abs(1 - a * beta / fast), abs(1 - fast)))


def half_life(radius: ArrayLike) -> Array:
    """Steps after which half of the start is forgotten: log(1/2) / log(radius).

    Args:
        radius: spectral radius, in [0, 1); any shape.

    Raises:
        ValueError: the radius is out of its range.
    """
    radius = in_range("radius", radius, "[0, 1)")
    with np.errstate(divide="ignore"):
        return np.asarray(math.log(0.5) / np.log(radius))


def limiting_error(
    a: ArrayLike, beta: ArrayLike, gain: ArrayLike, noise: ArrayLike = 1.0, drift: ArrayLike = 0.0
) -> Array:
    """The returned model's mean squared distance from the minimum in the limit, lim E θ̂².

        β²s²(1-φ2) + q²((1+φ2²)(1-φ2) + 2φ1φ2)
        --------------------------------------,    φ1 = 2-a-β-λ(1-β),  φ2 = -(1-β)(1-a-λ)
               (1+φ2)·((1-φ2)² - φ1²)

    Args:
        a: learning rate times curvature, > 0; any shape.
        beta: averaging weight, in (0, 1]; broadcasts.
        gain: λ, >= 0 and below `largest_gain(a, beta)`; broadcasts. 0: an EMA.
        noise: variance s² of a step's noise, >= 0; broadcasts.
        drift: variance q² of the minimum's move in a step, >= 0; broadcasts.

    Raises:
        ValueError: an argument is out of its range, or the recursion is not stable.
    """
    a, beta, gain = _coordinate(a, beta, gain)
    noise, drift = in_range("noise", noise, "[0, inf)"), in_range("drift", drift, "[0, inf)")
    if (a >= 2).any():
        raise ValueError(f"not stable: a must be below 2, got {a.max():g}, {a.max() - 2:g} above")
    bound = largest_gain(a, beta)
    if (gain >= bound).any():
        above = gain - bound
        at = np.unravel_index(above.argmax(), above.shape)
        values = [np.broadcast_to(x, above.shape)[at] for x in (bound, a, beta, gain, above)]
        raise ValueError(
            "not stable: gain must be below {:.6g} at a = {:g} and beta = {:g}, "
            "got {:g}, {:.3g} above".format(*values)
        )
    # The formula above, rewritten by φ1 = 1-φ2-aβ without differences of nearly equal numbers.
    s, w = gain * (1 - beta), (1 - a) * (1 - beta)
    phi2, one_minus, one_plus = s - w, 1 + w - s, a + beta - a * beta + s
    of_noise = beta**2 * noise * one_minus
    of_drift = drift * (one_minus * one_plus**2 - 2 * phi2 * a * beta)
    last = (2 - a) * (2 - beta) - 2 * s  # 1 + φ1 - φ2
    return np.asarray((of_noise + of_drift) / (one_plus * a * beta * last))


def lookahead_error(
    a: ArrayLike, every: ArrayLike, alpha: ArrayLike, noise: ArrayLike = 1.0, drift: ArrayLike = 0.0
) -> Array:
    """The limiting error of Lookahead's slow weights, just after a synchronisation.

    From one synchronisation to the next, in K steps, with f = (1-a)^K,

        φ' = (1-α+αf)·φ + α·Σ_j (1-a)^j ξ_j - Σ_j (1-α+α(1-a)^j)·δ_j,      j = 0 ... K-1

    Args:
        a: learning rate times curvature, in (0, 2); any shape.
        every: K, steps between synchronisations, whole, >= 1; broadcasts.
        alpha: α, the slow weights' step toward the fast ones as a share, in (0, 1]; broadcasts.
        noise: variance s² of a step's noise, >= 0; broadcasts.
        drift: variance q² of the minimum's move in a step, >= 0; broadcasts.

    Raises:
        ValueError: an argument is out of its range.

    Source: Zhang et al., Lookahead Optimizer, arXiv:1907.08610 (2019), for the method.
    """
    a, every = in_range("a", a, "(0, 2)"), in_range("every", every, "[1, inf)", whole=True)
    alpha = in_range("alpha", alpha, "(0, 1]")
    noise, drift = in_range("noise", noise, "[0, inf)"), in_range("drift", drift, "[0, inf)")
    stay, kept = 1 - a, 1 - alpha
    f = stay**every
    squares = (1 - f**2) / (a * (2 - a))  # Σ (1-a)^2j
    weights = every * kept**2 + 2 * kept * alpha * (1 - f) / a + alpha**2 * squares
    cycle = kept + alpha * f
    return np.asarray((alpha**2 * noise * squares + drift * weights) / (1 - cycle**2))


# ---- any number of coordinates, any method ------------------------------------------------------


@dataclass(frozen=True)
class Quadratic:
    """A quadratic loss ½·θᵀHθ, the noise in its gradients, its drift, and the start.

    Args:
        curvature: H. Of shape (n,): n independent coordinates, > 0. Of shape (d, d): a symmetric,
            positive definite matrix.
        noise: variance s_g² >= 0 of the gradients' noise. With n coordinates it broadcasts; with a
            matrix H it is a number or a covariance (d, d).
        drift: variance of the minimum's move in a step, in the same forms as noise.
        start: distance of the first weights from the minimum; broadcasts.

    Raises:
        ValueError: a variance is negative, a shape does not fit, or a matrix is not symmetric or
            not definite.
    """

    curvature: Numbers
    noise: Numbers = 1.0
    drift: Numbers = 0.0
    start: Numbers = 1.0

    def __post_init__(self) -> None:
        curvature = np.atleast_1d(np.asarray(self.curvature, dtype=np.float64))
        d, checked = len(curvature), {"curvature": curvature}
        if curvature.ndim == 1:
            in_range("curvature", curvature, "(0, inf)")
            for name in ("noise", "drift", "start"):
                range_ = "(-inf, inf)" if name == "start" else "[0, inf)"
                checked[name] = in_range(name, getattr(self, name), range_)
                last = checked[name].shape[-1:]
                if last not in ((), (1,), (d,)):
                    raise ValueError(
                        f"{name} must be one number or {d}, as many as curvature has, got {last[0]}"
                    )
        else:
            least = eigenvalues("curvature", curvature)[0]
            if least <= 0:
                raise ValueError(
                    f"curvature must be positive definite; its least eigenvalue is {least:g}"
                )
            for name in ("noise", "drift"):
                given = getattr(self, name)
                if np.ndim(given) == 0:
                    given = in_range(name, given, "[0, inf)") * np.eye(d)
                checked[name] = semidefinite(name, given, d)
            start = in_range("start", self.start, "(-inf, inf)")
            checked["start"] = np.broadcast_to(start, (d,))
        vars(self).update(checked)

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
            moment: second moments of the weights: (..., n), or (d, d) with a matrix H.
        """
        axes = (-2, -1) if self.general else -1
        return np.asarray((self.curvature * np.asarray(moment)).sum(axes) / 2)


class Blocks(NamedTuple):
    """One step of a method, by blocks of its state: live weights first, returned weights last."""

    transition: list[list[Any]]
    noise: list[Any]  # each block's share of ξ
    place: list[float]  # 1 for a position, which starts at `start` and drifts; 0 for a velocity


@dataclass(frozen=True)
class LinearMethod(ABC):
    """A method whose step is linear in its state. Numbers may be arrays over the coordinates.

    Args:
        lr: learning rate η > 0, one number or one per coordinate, or a function of the step
            k = 1, 2, ...
    """

    lr: Numbers  # or a StepFunction

    def __post_init__(self) -> None:
        if not callable(self.lr):
            in_range("lr", self.lr, "(0, inf)")

    @property
    def constant(self) -> bool:
        """Whether no number depends on the step, so that a limit exists."""
        return not any(map(callable, vars(self).values()))

    @property
    def period(self) -> int:
        """Steps in a cycle."""
        return 1

    @abstractmethod
    def blocks(self, k: int, a: Any, one: Any) -> Blocks:
        """Step k = 1, 2, ...

        Args:
            k: the step.
            a: η·H, one value per coordinate or a matrix.
            one: 1, or the identity matrix.
        """


@dataclass(frozen=True)
class Pull(LinearMethod):
    """SGD with an average and a pull toward it; covers SGD, EMA, uniform average and PACE.

        m_k     = μ·m_{k-1} + (1-μ)·g_k
        θ_k     = θ_{k-1} - η·m_k + λ·(θ̂_{k-1} - θ_{k-1})
        θ̂_k     = (1-β_k)·θ̂_{k-1} + β_k·θ_k,      θ̂_0 = θ_0

    Args:
        lr: η.
        beta: averaging weight in (0, 1], or a function of k, such as `PowerEMA(0.5).weight`.
            1 is SGD; `Uniform().weight` gives the mean of all iterates.
        gain: λ >= 0, one number or one per coordinate, or a function of k. 0: no pull.
        momentum: μ in [0, 1), as Adam's β1. 0: no momentum and no state for it.
    """

    beta: Numbers = 1.0  # or a StepFunction
    gain: Numbers = 0.0  # or a StepFunction
    momentum: Numbers = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, range_ in (("beta", "(0, 1]"), ("gain", "[0, inf)")):
            if not callable(getattr(self, name)):
                in_range(name, getattr(self, name), range_)
        in_range("momentum", self.momentum, "[0, 1)")

    def blocks(self, k: int, a: Any, one: Any) -> Blocks:
        """One step."""
        beta, mu = _shared("beta", self.beta, k, one), _shared("momentum", self.momentum, k, one)
        pull, rest = _diagonal(_at(self.gain, k), one), 1 - mu
        live, kept = one - rest * a - pull, (1 - beta) * one + beta * pull
        if not mu.any():
            return Blocks([[live, pull], [beta * live, kept]], [1.0, beta], [1, 1])
        # The momentum block holds -η_k·m_k, so that it adds to the weights.
        m = mu * _diagonal(self._growth(k), one)
        rows = [[live, m, pull], [-rest * a, m, 0 * one], [beta * live, beta * m, kept]]
        return Blocks(rows, [rest, rest, beta * rest], [1, 0, 1])

    def _growth(self, k: int) -> Any:
        """η_k / η_{k-1}, 0 where both are 0.

        Raises:
            ValueError: a rate is above 0 after one of 0, when the block has lost m.
        """
        if not callable(self.lr) or k == 1:
            return 1.0
        now, before = np.asarray(_at(self.lr, k)), np.asarray(_at(self.lr, k - 1))
        if ((before == 0) & (now != 0)).any():
            raise ValueError(
                f"lr must stay at 0 once it is 0, with momentum, got {now} at step {k}"
            )
        return np.divide(now, before, out=np.zeros(now.shape), where=before != 0)


@dataclass(frozen=True)
class ScheduleFree(LinearMethod):
    """Schedule-Free SGD.

        y_k = (1-μ)·z_{k-1} + μ·x_{k-1}
        z_k = z_{k-1} - η·∇f(y_k)
        x_k = (1-1/k)·x_{k-1} + z_k/k

    The state is z and the returned x.

    Args:
        lr: η.
        mu: μ in [0, 1), the average's share in the point where the gradient is taken.

    Source: Defazio et al., The Road Less Scheduled, arXiv:2405.15682 (2024).
    """

    mu: Numbers = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range("mu", self.mu, "[0, 1)")

    @property
    def constant(self) -> bool:
        """False: the averaging weight 1/k changes with every step."""
        return False

    def blocks(self, k: int, a: Any, one: Any) -> Blocks:
        """One step."""
        # The gradient is a·((1-μ)·z + μ·x): its parts that multiply z and x.
        z, x, new = one - a * (1 - self.mu), -a * self.mu, 1 / k
        return Blocks([[z, x], [new * z, (1 - new) * one + new * x]], [1.0, new], [1, 1])


@dataclass(frozen=True)
class Lookahead(LinearMethod):
    """SGD with slow weights: every K steps they move toward SGD's, and SGD restarts from them.

    Args:
        lr: η.
        every: K >= 1, steps.
        alpha: α in (0, 1], the slow weights' step toward SGD's as a share.

    Source: Zhang et al., Lookahead Optimizer, arXiv:1907.08610 (2019).
    """

    every: int = 5
    alpha: Numbers = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range("every", self.every, "[1, inf)", whole=True)
        in_range("alpha", self.alpha, "(0, 1]")

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


def _diagonal(value: Any, one: Any) -> Any:
    """One number or one per coordinate, as what multiplies the weights."""
    return value * one if np.ndim(one) == 0 or np.ndim(value) == 0 else np.diag(value)


def _shared(name: str, value: Any, k: int, one: Any) -> Array:
    """The value at step k, which must be one number if the curvature is a matrix."""
    at = _at(value, k)
    if np.ndim(one) and at.ndim:
        raise ValueError(
            f"{name} must be one number for a curvature that is a matrix, got the shape {at.shape}"
        )
    return at


# ---- moments ------------------------------------------------------------------------------------


class Moments(NamedTuple):
    """Mean and covariance of a method's state after a step.

    Live weights are the first block of the state, returned weights the last. For coordinates the
    shapes are mean (m, ...) and cov (m, m, ...): m blocks, then the coordinates and what the
    method's numbers broadcast to. With a matrix H they are (m·d,) and (m·d, m·d).
    """

    mean: Array
    cov: Array

    def second(self, problem: Quadratic, block: int = -1) -> Array:
        """E θθᵀ of a block: one value per coordinate, or (d, d) with a matrix H."""
        if not problem.general:
            return np.asarray(self.mean[block] ** 2 + self.cov[block, block])
        mean = self.mean.reshape(-1, problem.size)
        cov = self.cov.reshape(*mean.shape, *mean.shape)
        return np.asarray(np.outer(mean[block], mean[block]) + cov[block, :, block])


def _step(method: LinearMethod, problem: Quadratic, k: int) -> tuple[Array, Array, list[float]]:
    """A_k, the covariance that the step adds, and `Blocks.place`; the matrix axes come first."""
    lr, curvature = _at(method.lr, k), problem.curvature
    if problem.general:
        one = np.eye(problem.size)
        rates = lr * one if lr.ndim == 0 else np.diag(lr)
        rows, enters, place = method.blocks(k, rates @ curvature, one)
        b = np.vstack([x * rates for x in enters])
        moved = np.vstack([x * one for x in place])
        added = b @ problem.noise @ b.T + moved @ problem.drift @ moved.T
        return np.block(rows), added, place
    rows, enters, place = method.blocks(k, lr * curvature, 1.0)
    noise, each = lr**2 * problem.noise, list(zip(enters, place, strict=True))
    added = [[x * y * noise + p * r * problem.drift for y, r in each] for x, p in each]
    # All of one shape: `curvature` is there for the shape alone.
    *flat, _ = np.broadcast_arrays(*(x for row in (*rows, *added) for x in row), curvature)
    a, q = np.reshape(flat, (2, len(rows), len(rows), *flat[0].shape))
    return a, q, place


def _times(a: Array, b: Array) -> Array:
    return np.asarray(np.einsum("ij...,jk...->ik...", a, b))


def moments(method: LinearMethod, problem: Quadratic) -> Iterator[Moments]:
    """Exact mean and covariance of the state after 0, 1, 2, ... steps, without end.

    All blocks start at `problem.start`, except momentum, which starts at 0.

    Args:
        method: its numbers broadcast against the problem's coordinates.
        problem: the quadratic.
    """
    a, _, place = _step(method, problem, 1)
    blocks = np.split(np.zeros(a.shape[1:]), len(place))
    mean = np.concatenate([x + p * problem.start for x, p in zip(blocks, place, strict=True)])
    cov = np.zeros_like(a)
    for k in count(1):
        yield Moments(mean, cov)
        a, q, _ = _step(method, problem, k)
        mean = np.einsum("ij...,j...->i...", a, mean)
        cov = _times(_times(a, cov), np.swapaxes(a, 0, 1)) + q


def transition(method: LinearMethod, problem: Quadratic) -> tuple[Array, Array]:
    """A of a whole cycle, and the covariance that a cycle adds.

    Returns:
        Two arrays (m, m, ...), or (m·d, m·d) with a matrix H.

    Raises:
        ValueError: the method changes with the step, so that it has no cycle.
    """
    if not method.constant:
        raise ValueError(f"{type(method).__name__} changes with the step; it has no limit")
    a, q, _ = _step(method, problem, 1)
    for k in range(2, method.period + 1):
        b, added, _ = _step(method, problem, k)
        a, q = _times(b, a), _times(_times(b, q), np.swapaxes(b, 0, 1)) + added
    return a, q


def radius(method: LinearMethod, problem: Quadratic) -> Array:
    """The spectral radius per step: of each coordinate, or of the whole state with a matrix H.

    Raises:
        ValueError: the method changes with the step.
    """
    a, _ = transition(method, problem)
    values = np.linalg.eigvals(np.moveaxis(a, (0, 1), (-2, -1)))
    return np.asarray(abs(values).max(-1) ** (1 / method.period))


def limit(method: LinearMethod, problem: Quadratic) -> Moments:
    """Mean, which is 0, and covariance of the state in the limit: cov = A·cov·Aᵀ + Q.

    For Lookahead this is the state just after a synchronisation.

    Raises:
        ValueError: the method changes with the step, or is not stable.

    Source: SciPy's solver of the discrete Lyapunov equation.
    """
    from scipy.linalg import solve_discrete_lyapunov  # here, because `twin` must not need SciPy

    a, q = transition(method, problem)
    worst = float(radius(method, problem).max())
    if worst >= 1:
        raise ValueError(
            f"not stable: the spectral radius must be below 1, it is {worst:.6g}, "
            f"{worst - 1:.3g} above; lower lr or the gain"
        )
    if problem.general:
        return Moments(np.zeros(len(a)), solve_discrete_lyapunov(a, q))
    cov = np.empty_like(q)
    for at in np.ndindex(a.shape[2:]):
        cov[(..., *at)] = solve_discrete_lyapunov(a[(..., *at)], q[(..., *at)])
    return Moments(np.zeros(a.shape[1:]), cov)
