"""The fair frontier: what each method comes to at its own best parameters.

Two questions. In the limit: how small is the returned model's excess loss, for what it forgets the
start by? And at a horizon T from a distant start: how small is it at all? Every method has its
learning rate and the parameters of its average searched, in boxes for problems whose largest
curvature and noise are about 1; fixed are Lookahead's K, Adam's momentum at 0, and ε where it is
not named. `floor` is what the best linear estimator would make of the same gradients.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.optimize import differential_evolution

from .quadratic import (
    Array,
    Lookahead,
    Method,
    Pull,
    Quadratic,
    ScheduleFree,
    half_life,
    largest_gain,
    limiting_error,
    lookahead_error,
    moments,
    require,
    spectral_radius,
    whole,
)

EVERY = 10  # steps between Lookahead's synchronisations


@dataclass(frozen=True)
class Family:
    """A method with parameters to be searched.

    Args:
        box: name -> (least, largest) of each.
        make: the method, from the parameters as columns (m, 1), the problem, and the steps that
            there are, None for no end. Adam's second moment is held fixed at the noise's variance.
        contains: the family that this one is where its further parameters are next to nothing.
    """

    box: dict[str, tuple[float, float]]
    make: Callable[[dict[str, Array], Quadratic, int | None], Method]
    contains: str | None = None


def _deviation(problem: Quadratic) -> Array:
    """√v of Adam where the noise outweighs the signal."""
    return np.asarray(np.sqrt(np.broadcast_to(problem.noise, (problem.size,))))


def _eta(x: dict[str, Array], problem: Quadratic) -> Array:
    """Adam's η, of which lr is what the noisiest coordinate has: not tied to the size of ε."""
    return np.asarray(x["lr"] * (_deviation(problem).max() + x.get("eps", np.zeros(()))))


def _adam(x: dict[str, Array], problem: Quadratic) -> Array:
    return np.asarray(_eta(x, problem) / (_deviation(problem) + x.get("eps", np.zeros(()))))


def _weight(x: dict[str, Array]) -> "Array | Callable[[int], Array]":
    """The averaging weight: β where there is no end, else k^-κ."""
    return x["beta"] if "beta" in x else lambda k: k ** -x["kappa"]


def _clipped_pull(x: dict[str, Array], problem: Quadratic) -> "Array | Callable[[int], Array]":
    """PACE's gain: min(1, η·c·β_k/√v); with a constant weight it has no such factor."""
    weight, strength = _weight(x), _eta(x, problem) * x["c"] / _deviation(problem)
    if callable(weight):
        return lambda k: np.minimum(1, strength * weight(k))
    return np.minimum(1, strength)


RATE, WEIGHT, POWER = {"lr": (1e-4, 1e3)}, {"beta": (1e-4, 1.0)}, {"kappa": (0.01, 1.0)}
GAIN, STRENGTH, EPSILON = {"gain": (1e-12, 1.0)}, {"c": (1e-9, 1e4)}, {"eps": (1e-9, 1e3)}


def _families(weight: dict[str, tuple[float, float]]) -> dict[str, Family]:
    return {
        "SGD": Family(RATE, lambda x, p, _: Pull(x["lr"])),
        "EMA": Family(RATE | weight, lambda x, p, _: Pull(x["lr"], _weight(x))),
        "pull, one gain": Family(
            RATE | weight | GAIN, lambda x, p, _: Pull(x["lr"], _weight(x), x["gain"]), "EMA"
        ),
        f"Lookahead, K = {EVERY}": Family(
            RATE | {"alpha": (1e-3, 1.0)}, lambda x, p, _: Lookahead(x["lr"], EVERY, x["alpha"])
        ),
        "Adam, EMA": Family(RATE | weight, lambda x, p, _: Pull(_adam(x, p), _weight(x))),
        "Adam with ε, EMA": Family(
            RATE | weight | EPSILON,
            lambda x, p, _: Pull(_adam(x, p), _weight(x)),
            "Adam, EMA",
        ),
        "PACE": Family(
            RATE | weight | STRENGTH,
            lambda x, p, _: Pull(_adam(x, p), _weight(x), _clipped_pull(x, p)),
            "Adam, EMA",
        ),
    }


IN_THE_LIMIT = _families(WEIGHT)
AT_A_HORIZON = {
    **_families(POWER),
    "SGD, decay": Family(
        RATE, lambda x, p, steps: Pull(lambda k: x["lr"] * (1 - (k - 1) / (steps or k)))
    ),
    "uniform tail": Family(
        RATE | {"start": (1e-2, 0.99)},
        lambda x, p, steps: Pull(
            x["lr"], lambda k: 1 / np.maximum(1, np.ceil(k - x["start"] * (steps or 0)))
        ),
    ),
    "Schedule-Free": Family(
        RATE | {"mu": (1e-2, 0.999)}, lambda x, p, _: ScheduleFree(x["lr"], x["mu"])
    ),
}


class Best(NamedTuple):
    """The least excess loss of a family, and the parameters that it has it at."""

    loss: float
    parameters: dict[str, float]


def search(
    objective: Callable[[dict[str, Array]], Array],
    box: dict[str, tuple[float, float]],
    candidates: int,
    rounds: int,
    known: Best | None = None,
) -> Best:
    """The least of an objective over a box, by SciPy's differential evolution of logarithms.

    Args:
        objective: of columns (m, 1) of parameters, an array (m,), >= 0; anything else than such
            numbers is not allowed.
        box: name -> (least, largest) > 0.
        candidates: in each round, for each parameter.
        rounds: of candidates.
        known: what it is not to be worse than; it starts from there, with the parameters that it
            lacks at their least, and returns it if it finds nothing better.

    Returns:
        An infinite loss, and no parameters, where nothing is allowed.
    """

    def columns(x: Array) -> dict[str, Array]:
        return {name: np.exp(row).reshape(-1, 1) for name, row in zip(box, x, strict=True)}

    def values(x: Array) -> Array:
        found = objective(columns(x.reshape(len(box), -1)))
        return np.where(found >= 0, found, math.inf)  # what diverged is anything

    ends, start = np.log(np.array(list(box.values()))), None
    if known is not None and known.parameters:
        filled = {name: known.parameters.get(name, low) for name, (low, _) in box.items()}
        known = Best(known.loss, filled)
        hair = 1e-12 * (ends[:, 1] - ends[:, 0])  # SciPy's own rounding
        start = np.clip(np.log(list(filled.values())), ends[:, 0] + hair, ends[:, 1] - hair)
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
    family: Family, problem: Quadratic, forgets: float = math.inf, known: Best | None = None
) -> Best:
    """The least excess loss in the limit, among parameters that forget fast enough.

    Args:
        family: one of `IN_THE_LIMIT`.
        problem: independent coordinates.
        forgets: largest half-life of the slowest coordinate, steps, > 0.
        known: the best of a family that is this one without some of its parameters.

    Raises:
        ValueError: the problem is not of independent coordinates, or the half-life out of range.
    """
    _independent(problem)
    require("forgets", min(forgets, 1e300), 0, math.inf, open_="low")
    curvature = problem.curvature

    def objective(x: dict[str, Array]) -> Array:
        method = family.make(x, problem, None)
        lr = method.lr
        a = lr * curvature
        stable = a < 2
        a = np.where(stable, a, 1.0)
        noise = lr**2 * problem.noise
        if isinstance(method, Lookahead):
            error = lookahead_error(a, method.every, method.alpha, noise, problem.drift)
            alpha = method.alpha
            radius = (1 - alpha + alpha * abs(1 - a) ** method.every) ** (1 / method.every)
        else:
            assert isinstance(method, Pull)
            beta, gain = method.beta, method.gain
            stable &= gain < largest_gain(a, beta)
            gain = np.where(stable, gain, 0.0)
            error = limiting_error(a, beta, gain, noise, problem.drift)
            radius = spectral_radius(a, beta, gain)
        allowed = stable & (half_life(np.minimum(radius, 1 - 1e-15)) <= forgets)
        return np.where(allowed.all(-1), problem.loss(error), math.inf)

    return search(objective, family.box, candidates=40, rounds=120, known=known)


def best_at_a_horizon(
    family: Family, problem: Quadratic, steps: int, known: Best | None = None
) -> Best:
    """The least excess loss after so many steps from the problem's start.

    Args:
        family: one of `AT_A_HORIZON`.
        problem: independent coordinates.
        steps: T >= 1; for Lookahead's sake a multiple of `EVERY`.
        known: the best of a family that is this one without some of its parameters.

    Raises:
        ValueError: the problem is not of independent coordinates, or steps no number of steps.
    """
    _independent(problem)
    require("steps", steps, 1, math.inf)
    whole("steps", steps)

    def objective(x: dict[str, Array]) -> Array:
        with np.errstate(over="ignore", invalid="ignore"):  # what diverges is not the least
            for k, state in enumerate(moments(family.make(x, problem, steps), problem)):
                if k == steps:
                    return problem.loss(state.second(problem))
        raise AssertionError

    return search(objective, family.box, candidates=30, rounds=25, known=known)


def floor(problem: Quadratic, steps: int | None = None) -> float:
    """The least expected excess loss that a linear estimator has, of the same noisy gradients.

    A gradient tells the place of a minimum up to noise of variance r = s_g²/α². Of a start at a
    distance of known size, but not direction, T of them and the drift make the variance

        V_0 = start²,      V_{k+1} = V_k·r/(V_k + r) + q²

    and in the limit (q² + √(q⁴ + 4q²r))/2: a Kalman filter. With normal noise and a normal start
    of that variance no other estimator does better, either.

    Args:
        problem: independent coordinates.
        steps: T >= 1; None: in the limit.

    Raises:
        ValueError: the problem is not of independent coordinates, or steps no number of steps.
    """
    _independent(problem)
    seen, drift = problem.noise / problem.curvature**2, problem.drift
    if steps is None:
        return float(problem.loss((drift + np.sqrt(drift**2 + 4 * drift * seen)) / 2))
    require("steps", steps, 1, math.inf)
    whole("steps", steps)
    left = np.broadcast_to(problem.start, (problem.size,)) ** 2
    for _ in range(steps):
        left = left * seen / np.maximum(left + seen, 1e-300) + drift
    return float(problem.loss(left))


def _independent(problem: Quadratic) -> None:
    if problem.general:
        raise ValueError("curvature must be a vector, of independent coordinates, got a matrix")


def frontier(
    families: dict[str, Family], best: Callable[..., Best], problem: Quadratic, *limits: float
) -> dict[str, Best]:
    """The best of each family, none worse than that of a family that it contains.

    Args:
        families: those that others contain come before these.
        best: `best_in_the_limit` or `best_at_a_horizon`.
        problem: independent coordinates.
        limits: what else it takes: the half-life, or the steps.
    """
    found: dict[str, Best] = {}
    for name, family in families.items():
        found[name] = best(family, problem, *limits, known=found.get(family.contains or ""))
    return found
