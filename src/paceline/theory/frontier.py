"""The fair frontier: the least loss of each method at its own best parameters.

There are two questions. In the limit: how small is the returned model's excess loss, at a given
half-life of the start? At a horizon T from a distant start: how small is the excess loss? Each
method's learning rate and its average's parameters are searched, in boxes for problems whose
largest curvature and noise are about 1. Lookahead's K, Adam's momentum (0) and, unless a method
names it, ε are fixed. `floor` is the loss of the best linear estimator on the same gradients.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, TypeAlias

import numpy as np
from scipy.optimize import differential_evolution

from .quadratic import (
    Array,
    LinearMethod,
    Lookahead,
    Pull,
    Quadratic,
    ScheduleFree,
    half_life,
    in_range,
    largest_gain,
    limiting_error,
    lookahead_error,
    moments,
    spectral_radius,
)

Parameters: TypeAlias = dict[str, Array]  # columns (m, 1) of m candidates
Box: TypeAlias = dict[str, tuple[float, float]]  # name -> (least, largest) > 0
EVERY = 10  # steps between Lookahead's synchronisations


@dataclass(frozen=True)
class TunedMethod:
    """A method whose parameters are searched.

    Args:
        box: range of each parameter.
        make: builds the method from the parameters, the problem, and the number of steps, None in
            the limit. Adam's second moment is held at the noise's variance.
        contains: name of the method that this one nearly is with its extra parameters at their
            least.
    """

    box: Box
    make: Callable[[Parameters, Quadratic, int | None], LinearMethod]
    contains: str | None = None


def _deviation(problem: Quadratic) -> Array:
    """Adam's √v where the noise outweighs the signal."""
    return np.asarray(np.sqrt(np.broadcast_to(problem.noise, (problem.size,))))


def _adam_lr(x: Parameters, problem: Quadratic) -> Array:
    """Adam's η/(√v+ε) of each coordinate; the searched lr is the noisiest one's, whatever ε is."""
    below = _deviation(problem) + x.get("eps", 0)
    return np.asarray(x["lr"] * below.max(-1, keepdims=True) / below)


def _beta(x: Parameters) -> Array | Callable[[int], Array]:
    """The averaging weight: β in the limit, k^-κ at a horizon."""
    return x["beta"] if "beta" in x else lambda k: k ** -x["kappa"]


def _pace_gain(x: Parameters, problem: Quadratic) -> Array | Callable[[int], Array]:
    """PACE's gain, min(1, η·c·β_k/√v); with a constant weight it lacks the factor β_k."""
    beta, deviation = _beta(x), _deviation(problem)
    strength = x["lr"] * deviation.max() * x["pullback"] / deviation
    if callable(beta):
        return lambda k: np.minimum(1, strength * beta(k))
    return np.asarray(np.minimum(1, strength))


LR: Box = {"lr": (1e-4, 1e3)}
BETA: Box = {"beta": (1e-4, 1.0)}
KAPPA: Box = {"kappa": (0.01, 1.0)}
GAIN: Box = {"gain": (1e-12, 1.0)}
PULLBACK: Box = {"pullback": (1e-9, 1e4)}
EPS: Box = {"eps": (1e-9, 1e3)}


def _methods(average: Box) -> dict[str, TunedMethod]:
    return {
        "SGD": TunedMethod(LR, lambda x, p, _: Pull(x["lr"])),
        "EMA": TunedMethod(LR | average, lambda x, p, _: Pull(x["lr"], _beta(x))),
        "pull, one gain": TunedMethod(
            LR | average | GAIN, lambda x, p, _: Pull(x["lr"], _beta(x), x["gain"]), "EMA"
        ),
        f"Lookahead, K = {EVERY}": TunedMethod(
            LR | {"alpha": (1e-3, 1.0)}, lambda x, p, _: Lookahead(x["lr"], EVERY, x["alpha"])
        ),
        "Adam, EMA": TunedMethod(LR | average, lambda x, p, _: Pull(_adam_lr(x, p), _beta(x))),
        "Adam with ε, EMA": TunedMethod(
            LR | average | EPS, lambda x, p, _: Pull(_adam_lr(x, p), _beta(x)), "Adam, EMA"
        ),
        "PACE": TunedMethod(
            LR | average | PULLBACK,
            lambda x, p, _: Pull(_adam_lr(x, p), _beta(x), _pace_gain(x, p)),
            "Adam, EMA",
        ),
    }


IN_THE_LIMIT = _methods(BETA)
AT_A_HORIZON = {
    **_methods(KAPPA),
    "SGD, decay": TunedMethod(
        LR, lambda x, p, steps: Pull(lambda k: x["lr"] * (1 - (k - 1) / (steps or k)))
    ),
    "uniform tail": TunedMethod(
        LR | {"start": (1e-2, 0.99)},
        lambda x, p, steps: Pull(
            x["lr"], lambda k: 1 / np.maximum(1, np.ceil(k - x["start"] * (steps or 0)))
        ),
    ),
    "Schedule-Free": TunedMethod(
        LR | {"mu": (1e-2, 0.999)}, lambda x, p, _: ScheduleFree(x["lr"], x["mu"])
    ),
}


class Best(NamedTuple):
    """The least excess loss of a method, and its parameters there."""

    loss: float
    parameters: dict[str, float]


def search(
    objective: Callable[[Parameters], Array],
    box: Box,
    candidates: int,
    rounds: int,
    known: Best | None = None,
) -> Best:
    """Minimise over a box, by SciPy's differential evolution on the parameters' logarithms.

    Args:
        objective: takes m candidates and returns their losses (m,), >= 0. Candidates with a
            negative or NaN loss are not allowed.
        box: range of each parameter.
        candidates: number of candidates per parameter and round.
        rounds: number of rounds.
        known: a result to start from, its missing parameters at their least. It is returned if
            the search finds nothing better.

    Returns:
        The best candidate; an infinite loss and no parameters if none is allowed.
    """

    def columns(x: Array) -> Parameters:
        return {name: np.exp(row).reshape(-1, 1) for name, row in zip(box, x, strict=True)}

    def values(x: Array) -> Array:
        found = objective(columns(x.reshape(len(box), -1)))
        return np.where(found >= 0, found, math.inf)  # divergence gives any number

    ends, start = np.log(np.array(list(box.values()))), None
    if known is not None and known.parameters:
        filled = {name: known.parameters.get(name, low) for name, (low, _) in box.items()}
        known = Best(known.loss, filled)
        hair = 1e-12 * np.diff(ends) * [1, -1]  # SciPy rounds when it scales to [0, 1]
        start = np.clip(np.log(list(filled.values())), *(ends + hair).T)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # differences of infinities
        result = differential_evolution(
            values,
            ends.tolist(),
            popsize=candidates,
            maxiter=rounds,
            tol=1e-6,
            rng=0,
            polish=False,
            vectorized=True,
            updating="deferred",
            x0=start,
        )
    if known is not None and not result.fun < known.loss:
        return known
    if not math.isfinite(result.fun):
        return Best(math.inf, {})
    return Best(float(result.fun), {k: float(v[0, 0]) for k, v in columns(result.x).items()})


def best_in_the_limit(
    method: TunedMethod,
    problem: Quadratic,
    max_half_life: float = math.inf,
    known: Best | None = None,
) -> Best:
    """The least excess loss in the limit, among parameters that forget the start fast enough.

    Args:
        method: one of `IN_THE_LIMIT`.
        problem: independent coordinates.
        max_half_life: largest half-life of the slowest coordinate, steps, > 0.
        known: the result of `method.contains`.

    Raises:
        ValueError: curvature is a matrix, or max_half_life is out of its range.
    """
    _independent(problem)
    in_range("max_half_life", min(max_half_life, 1e300), "(0, inf)")

    def objective(x: Parameters) -> Array:
        made = method.make(x, problem, None)
        a, noise = made.lr * problem.curvature, made.lr**2 * problem.noise
        stable = a < 2
        a = np.where(stable, a, 1.0)
        if isinstance(made, Lookahead):
            alpha, every = made.alpha, made.every
            error = lookahead_error(a, every, alpha, noise, problem.drift)
            radius = (1 - alpha + alpha * abs(1 - a) ** every) ** (1 / every)
        else:
            assert isinstance(made, Pull)
            stable &= made.gain < largest_gain(a, made.beta)
            gain = np.where(stable, made.gain, 0.0)
            error = limiting_error(a, made.beta, gain, noise, problem.drift)
            radius = spectral_radius(a, made.beta, gain)
        allowed = stable & (half_life(np.minimum(radius, 1 - 1e-15)) <= max_half_life)
        return np.where(allowed.all(-1), problem.loss(error), math.inf)

    return search(objective, method.box, candidates=40, rounds=120, known=known)


def best_at_a_horizon(
    method: TunedMethod, problem: Quadratic, steps: int, known: Best | None = None
) -> Best:
    """The least excess loss after some steps from the problem's start.

    Args:
        method: one of `AT_A_HORIZON`.
        problem: independent coordinates.
        steps: T >= 1; a multiple of `EVERY` for Lookahead.
        known: the result of `method.contains`.

    Raises:
        ValueError: curvature is a matrix, or steps is not a whole number >= 1.
    """
    _independent(problem)
    in_range("steps", steps, "[1, inf)", whole=True)

    def objective(x: Parameters) -> Array:
        with np.errstate(over="ignore", invalid="ignore"):  # candidates may diverge
            states = moments(method.make(x, problem, steps), problem)
            return problem.loss(next(islice(states, steps, None)).second(problem))

    return search(objective, method.box, candidates=30, rounds=25, known=known)


def floor(problem: Quadratic, steps: int | None = None) -> float:
    """The least expected excess loss of any linear estimator that sees the same noisy gradients.

    A gradient measures the minimum's position with noise of variance r = s_g²/α². For a start at a
    known distance in an unknown direction, T gradients and the drift leave the variance V_T:

        V_0 = start²,      V_{k+1} = V_k·r/(V_k + r) + q²

    Its limit is (q² + √(q⁴ + 4q²r))/2. This is a Kalman filter: with normal noise and a normal
    start of variance start², no other estimator does better either.

    Args:
        problem: independent coordinates.
        steps: T >= 1; None: in the limit.

    Raises:
        ValueError: curvature is a matrix, or steps is not a whole number >= 1.
    """
    _independent(problem)
    seen, drift = problem.noise / problem.curvature**2, problem.drift
    if steps is None:
        return float(problem.loss((drift + np.sqrt(drift**2 + 4 * drift * seen)) / 2))
    in_range("steps", steps, "[1, inf)", whole=True)
    left = np.broadcast_to(problem.start, (problem.size,)) ** 2
    for _ in range(steps):
        left = left * seen / np.maximum(left + seen, 1e-300) + drift
    return float(problem.loss(left))


def _independent(problem: Quadratic) -> None:
    if problem.general:
        raise ValueError("curvature must be a vector, of independent coordinates, got a matrix")


def best_of_each(
    methods: dict[str, TunedMethod], best: Callable[..., Best], problem: Quadratic, *limits: float
) -> dict[str, Best]:
    """The best of each method, none worse than the method that it contains.

    Args:
        methods: in an order in which contained methods come first.
        best: `best_in_the_limit` or `best_at_a_horizon`.
        problem: independent coordinates.
        limits: further arguments of `best`: the half-life, or the steps.
    """
    found: dict[str, Best] = {}
    for name, method in methods.items():
        found[name] = best(method, problem, *limits, known=found.get(method.contains or ""))
    return found
