r"""Batch sizes on the noisy quadratic: steps to a loss, and the least loss, of tuned methods.

The curvatures are a power law, hᵢ = 1/i, and the gradient's noise at a batch of B has the variance
hᵢ/B. A method's mean moves by the start alone, and its covariance by the noise alone. So the
expected excess loss of the returned model is exactly

    loss(k; B) = ½·Σ hᵢ·mean(k)ᵢ² + ½·Σ hᵢ·cov(k)ᵢ / B

where neither `mean` nor `cov`, at B = 1, depends on the batch. One recursion of a grid of
parameters tells the best of them at all batches.

Source: the problem is that of Zhang et al., Which Algorithmic Choices Matter at Which Batch Sizes?,
arXiv:1907.04164 (2019): these curvatures, noise and start. The split above, the target, and the
methods other than SGD, momentum and the EMA are ours.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from .frontier import Parameters
from .quadratic import Array, LinearMethod, Pull, Quadratic, ScheduleFree, in_range, moments

Grid: TypeAlias = dict[str, tuple[float, ...]]  # name -> values in ascending order

LEADING, NODES = 8, 32  # curvatures that stand for themselves, and points that stand for the others
# Where a parameter's own range ends no grid goes further.
ENDS = {
    **dict.fromkeys(("kappa", "gain"), (0.0, 1.0)),
    **dict.fromkeys(("fall", "mu", "momentum"), (0.0,)),
    "warmup": (1.0,),
}


class Spectrum(NamedTuple):
    """Curvatures 1/i from a start of 1, and how many coordinates each of them stands for."""

    problem: Quadratic  # at a batch of 1
    counts: Array  # (n,)

    def loss(self, moment: Array) -> Array:
        """Expected excess loss, of second moments (..., n)."""
        return self.problem.loss(self.counts * moment)


def power_law(coordinates: int) -> Spectrum:
    """The curvatures 1/i, i = 1 ... d, with noise of the same variances.

    The first 8 stand for themselves. The sum over the others is an integral over log i, by
    Gauss-Legendre: of 10,000, losses are within 1 % of the full sum's, and within 0.02 % without
    momentum (a test).

    Args:
        coordinates: d >= 1.

    Raises:
        ValueError: d is not a whole number >= 1.
    """
    in_range("coordinates", coordinates, "[1, inf)", whole=True)
    index, counts = np.arange(1.0, coordinates + 1), np.ones(coordinates)
    if coordinates > LEADING + NODES:
        low, high = np.log([LEADING + 0.5, coordinates + 0.5])
        points, weights = np.polynomial.legendre.leggauss(NODES)
        others = np.exp(low + (points + 1) / 2 * (high - low))
        index = np.append(index[:LEADING], others)
        counts = np.append(counts[:LEADING], weights / 2 * (high - low) * others)
    return Spectrum(Quadratic(1 / index, noise=1 / index), counts)


def _edges(grid: Grid, found: Mapping[str, float]) -> list[str]:
    """Parameters that are the lowest or highest of the grid, and not of their own range."""
    return [
        f"{name} at the {side}"
        for name, values in grid.items()
        for end, side in ((values[0], "bottom"), (values[-1], "top"))
        if len(values) > 1 and found[name] == end and end not in ENDS.get(name, ())
    ]


class GridMethod(NamedTuple):
    """A method whose parameters are searched on a grid."""

    grid: Grid
    make: Callable[[Parameters], LinearMethod]
    base: str  # the method without an average that it is compared to
    contains: str | None = None  # the method that this one is with its extra parameters at 0

    def candidates(self) -> Parameters:
        """All points of the grid, as columns (m, 1)."""
        points = np.array(list(product(*self.grid.values())), dtype=np.float64)
        return {name: points[:, i, None] for i, name in enumerate(self.grid)}


def learning_rate(x: Mapping[str, Any]) -> Any:
    """The rate of a `share` of the largest that is stable where the curvature is 1.

    That is 2·(1+μ)/(1-μ) with momentum μ. Schedule-Free's is 2/(1-μ) in the long run.
    """
    share, mu = x.get("share", np.nan), x.get("momentum", 0.0)
    return share * 2 / (1 - x["mu"]) if "mu" in x else share * 2 * (1 + mu) / (1 - mu)


def _pull(x: Parameters) -> Pull:
    """SGD with what the parameters name: momentum, an average, a pull, a rate that falls.

    The weight of the average is k^-κ, and the rate falls as k^-`fall`. With `same` it falls as the
    weight does, which is the schedule that a pull of gain 1 amounts to.
    """
    lr, fall = learning_rate(x), x.get("kappa" if "same" in x else "fall")
    beta = (lambda k: k ** -x["kappa"]) if "kappa" in x else 1.0
    rate = lr if fall is None else lambda k: lr * k**-fall
    return Pull(rate, beta, x.get("gain", 0.0), x.get("momentum", 0.0))


def _schedule_free(x: Parameters) -> ScheduleFree:
    """Schedule-Free after a linear warm-up: its first step is a whole one of SGD."""
    lr = learning_rate(x)
    return ScheduleFree(lambda k: lr * np.minimum(1, k / x["warmup"]), x["mu"])


def _shares(low: float, high: float, parts: int) -> tuple[float, ...]:
    """From low to high, so many to a factor of 2."""
    return tuple(2.0 ** (np.arange(np.log2(low) * parts, np.log2(high) * parts + 0.5) / parts))


FINE: Grid = {"share": _shares(2**-8, 2**0.5, 16)}
SHARE: Grid = {"share": _shares(2**-8, 2 ** (1 / 3), 3)}
HIGH: Grid = {"share": SHARE["share"][15:]}  # with an average no best is below
KAPPA: Grid = {"kappa": (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)}
GAIN: Grid = {"gain": (0.003, 0.01, 0.1, 1.0)}
FALL: Grid = {"fall": (0.03, 0.1, 0.3)}
MOMENTUM: Grid = {"momentum": (0.0, 0.8, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.998)}
COARSE: Grid = HIGH | {"kappa": (0.3, 0.6, 0.8, 1.0), "momentum": (0.8, 0.9, 0.95, 0.98, 0.998)}
NEAR: Grid = {"mu": (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999)}
SGD, HEAVY, SATURATED, SCHEDULE = "SGD", "SGD, momentum", "gain 1, momentum", "its schedule"

METHODS = {
    SGD: GridMethod(FINE, _pull, SGD),
    "EMA": GridMethod(SHARE | KAPPA, _pull, SGD),
    "pull": GridMethod(HIGH | KAPPA | GAIN, _pull, SGD, "EMA"),
    "power": GridMethod(HIGH | KAPPA | FALL, _pull, SGD, "EMA"),
    "Schedule-Free": GridMethod(
        HIGH | NEAR | {"warmup": (1, 5, 20, 80, 320)}, _schedule_free, HEAVY
    ),
    HEAVY: GridMethod(SHARE | MOMENTUM, _pull, HEAVY),
    "EMA, momentum": GridMethod(HIGH | KAPPA | MOMENTUM, _pull, HEAVY, HEAVY),
    "pull, momentum": GridMethod(COARSE | GAIN, _pull, HEAVY, "EMA, momentum"),
    "power, momentum": GridMethod(COARSE | FALL, _pull, HEAVY, "EMA, momentum"),
    # One pair at the same κ, which differs in where the gradient is taken.
    SATURATED: GridMethod(HIGH | KAPPA | MOMENTUM | {"gain": (1.0,)}, _pull, HEAVY),
    SCHEDULE: GridMethod(HIGH | KAPPA | MOMENTUM | {"same": (1.0,)}, _pull, HEAVY),
}


class Best(NamedTuple):
    """The best of a method's candidates at one batch; NaN and {} if none is allowed."""

    value: float  # steps to the target, or the loss
    parameters: dict[str, float]
    edges: list[str] = []  # noqa: RUF012  # texts such as "mu at the top" of its grid


class Found(NamedTuple):
    """What a method comes to at each batch."""

    steps: list[Best]  # to the target
    loss: list[Best]  # after the horizon


def best_by_batch(
    method: GridMethod,
    spectrum: Spectrum,
    batches: Sequence[float],
    target: float,
    horizon: int,
    longest: int = 100_000,
) -> Found:
    """The fewest steps to a loss and the least loss after some steps, of a grid, at each batch.

    A candidate whose returned model ever has a higher loss than the start is left out: no training
    would survive that, though the quadratic does.

    Args:
        method: its grid has all candidates.
        spectrum: the problem.
        batches: B > 0, noise of variance h/B.
        target: share of the start's loss that is to be reached, in (0, 1).
        horizon: steps after which the least loss is taken, >= 1.
        longest: steps after which a target counts as not reached, >= horizon.

    Raises:
        ValueError: an argument is out of its range.
    """
    sizes = in_range("batches", batches, "(0, inf)")
    in_range("target", target, "(0, 1)")
    in_range("horizon", horizon, "[1, inf)", whole=True)
    in_range("longest", longest, f"[{horizon}, inf)", whole=True)
    x, nothing = method.candidates(), Best(np.nan, {})
    steps, least = [nothing] * len(batches), [nothing] * len(batches)
    start = float(spectrum.loss(np.ones(spectrum.problem.size)))
    allowed = np.ones((len(next(iter(x.values()))), len(batches)), dtype=bool)

    def best(losses: Array, j: int, value: float | None = None) -> Best:
        i = losses[:, j].argmin()
        if not allowed[i, j]:
            return nothing
        found = {name: float(column[i, 0]) for name, column in x.items()}
        return Best(losses[i, j] if value is None else value, found, _edges(method.grid, found))

    with np.errstate(over="ignore", invalid="ignore"):  # candidates may diverge
        for k, state in enumerate(moments(method.make(x), spectrum.problem)):
            by_start, by_noise = (
                spectrum.loss(y) for y in (state.mean[-1] ** 2, state.cov[-1, -1])
            )
            losses = by_start[..., None] + by_noise[..., None] / sizes
            allowed &= losses <= start * (1 + 1e-12)
            losses = np.where(allowed, losses, np.inf)
            for j in map(int, np.flatnonzero(losses.min(0) <= target * start)):
                if not steps[j].parameters:
                    steps[j] = best(losses, j, k)
            if k == horizon:
                least = [best(losses, j) for j in range(len(batches))]
            if k == longest or (k >= horizon and all(s.parameters for s in steps)):
                return Found(steps, least)
    raise AssertionError("moments end")


def _better(known: Best, own: Best) -> Best:
    """The lower of two, the first of equal ones; one that is NaN only if both are."""
    return own if own.value < known.value or not known.parameters else known


def best_of_each(
    methods: Mapping[str, GridMethod], spectrum: Spectrum, *options: Any
) -> dict[str, Found]:
    """The best of each method, none worse than the method that it contains.

    Args:
        methods: in an order in which contained methods come first.
        spectrum: the problem.
        options: further arguments of `best_by_batch`.
    """
    found: dict[str, Found] = {}
    for name, method in methods.items():
        own = best_by_batch(method, spectrum, *options)
        known = found[method.contains] if method.contains else own
        pairs = (zip(*each, strict=True) for each in zip(known, own, strict=True))
        found[name] = Found(*([_better(*x) for x in each] for each in pairs))
    return found


def perfect_up_to(batches: Sequence[float], steps: Sequence[float]) -> float:
    """The largest batch up to which examples, B·steps, are within 20 % of the smallest batch's."""
    good = [b for b, k in zip(batches, steps, strict=True) if b * k <= 1.2 * batches[0] * steps[0]]
    return good[-1] if good else np.nan


def useful_up_to(batches: Sequence[float], steps: Sequence[float]) -> float:
    """The smallest batch whose steps are within 20 % of the largest batch's."""
    return next((b for b, k in zip(batches, steps, strict=True) if k <= 1.2 * steps[-1]), np.nan)


def pays_up_to(
    batches: Sequence[float], steps: Sequence[float], others: Sequence[float], share: float = 0.05
) -> float:
    """The largest batch at which a method needs fewer steps than another by this share; else NaN.

    Batches count up to the first at which it does not.
    """
    found = np.nan
    for b, k, other in zip(batches, steps, others, strict=True):
        if not k <= (1 - share) * other:
            break
        found = b
    return found
