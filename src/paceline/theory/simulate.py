"""Monte Carlo of the theory by the library's own optimizers, with many runs side by side.

Each run is a row of one float64 parameter and has its own noise. `paceline.PACE` and `Pullback`
work elementwise, so that one step advances all runs at once.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from ..averaging import Averaging
from ..base import AveragedOptimizer
from ..pullback import Pullback
from .quadratic import Array, Quadratic, in_range

OptimizerFactory = Callable[[list[Parameter]], AveragedOptimizer]


class Estimate(NamedTuple):
    """A mean over independent runs, and its standard error."""

    mean: Array
    error: Array  # times 1.96: half of the normal distribution's 95 % interval


class Estimates(NamedTuple):
    """Estimates for the live weights and for the returned model."""

    live: Estimate
    returned: Estimate


def estimate(samples: Tensor) -> Estimate:
    """Mean and standard error over the first axis, which holds two runs or more."""
    error = samples.std(0) / math.sqrt(len(samples))
    return Estimate(samples.mean(0).numpy(), error.numpy())


def read_out(optimizer: AveragedOptimizer, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Copies of the live and of the returned weights."""
    live = weights.detach().clone()
    with optimizer.averaged():
        return live, weights.detach().clone()


def simulate(
    make: OptimizerFactory, problem: Quadratic, steps: int, runs: int = 1000, seed: int = 0
) -> Estimates:
    """E θᵢ² of each coordinate after some steps on a quadratic, measured with a real optimizer.

    Args:
        make: builds the optimizer from a list of one float64 parameter (runs, n). Its learning
            rate times the curvature is the theory's a.
        problem: the quadratic; gradient noise and drift are normal.
        steps: >= 0.
        runs: number of independent runs, >= 2.
        seed: of the noise; optimizers with the same seed see the same noise.

    Returns:
        Estimates of arrays (n,).

    Raises:
        ValueError: steps or runs is out of its range or not whole.
    """
    in_range("steps", steps, "[0, inf)", whole=True)
    in_range("runs", runs, "[2, inf)", whole=True)
    generator = torch.Generator().manual_seed(seed)
    hessian = torch.from_numpy(problem.curvature)
    shape = (runs, problem.size)

    def factor(variance: Array) -> Tensor:
        """L, where L·Lᵀ is the covariance; for coordinates their standard deviations."""
        if not problem.general:
            return torch.from_numpy(np.sqrt(np.broadcast_to(variance, shape[1:])))
        values, vectors = np.linalg.eigh(variance)
        return torch.from_numpy(vectors * np.sqrt(values.clip(0)))

    noise, drift = factor(problem.noise), factor(problem.drift)

    def drawn(deviation: Tensor) -> Tensor:
        normal = torch.randn(shape, generator=generator, dtype=torch.float64)
        return normal @ deviation.T if problem.general else normal * deviation

    minimum = torch.zeros(shape, dtype=torch.float64)
    weights = Parameter(torch.from_numpy(np.broadcast_to(problem.start, shape).copy()))
    optimizer = make([weights])
    for _ in range(steps):
        distance = weights.detach() - minimum
        slope = distance @ hessian if problem.general else distance * hessian
        weights.grad = slope + drawn(noise)
        optimizer.step()
        if drift.any():
            minimum += drawn(drift)
    live, returned = read_out(optimizer, weights)
    return Estimates(estimate((live - minimum) ** 2), estimate((returned - minimum) ** 2))


# ---- convex and Lipschitz -----------------------------------------------------------------------


class StylisedPACE(NamedTuple):
    """SGD with an average, and a pull toward it of the gain min(1, c·β_t)."""

    averaging: Averaging
    pullback: float = 0.0  # c >= 0


def convex_errors(
    methods: Sequence[StylisedPACE],
    steps: int,
    *,
    runs: int = 32,
    coordinates: int = 16,
    lr: float = 1.0,
    seed: int = 0,
) -> list[Estimate]:
    """Excess loss of the methods' returned models on a convex Lipschitz problem, at one horizon.

        f(x) = Σ 2^-i·|xᵢ - 1/i|,  i = 1 ... n,    from x = 0,    subgradients with N(0, 1/i²) noise

    At every horizon T the noise of T steps hides the slopes of some coordinates, while distance
    and noise stay bounded for any n. The methods see the same noise.

    Args:
        methods: their averaging rules must keep no state besides the average.
        steps: T >= 1.
        runs: number of independent runs, >= 2.
        coordinates: n >= 1; 2^-n should be well below 1/√T.
        lr: > 0; the learning rate is lr/√T.
        seed: of the noise.

    Returns:
        For each method, mean and standard error of f over the runs.

    Raises:
        ValueError: an argument is out of its range, or a rule keeps further state.
    """
    in_range("steps", steps, "[1, inf)", whole=True)
    in_range("runs", runs, "[2, inf)", whole=True)
    in_range("coordinates", coordinates, "[1, inf)", whole=True)
    in_range("lr", lr, "(0, inf)")
    for method in methods:
        in_range("pullback", method.pullback, "[0, inf)")
        if method.averaging.keeps:
            raise ValueError(
                f"averaging must keep no state besides the average, got {method.averaging}"
            )
    generator = torch.Generator().manual_seed(seed)
    index = torch.arange(1, coordinates + 1, dtype=torch.float64)
    slopes, places, shape = 0.5**index, 1 / index, (runs, coordinates)
    weights = [Parameter(torch.zeros(shape, dtype=torch.float64)) for _ in methods]
    groups = [{"params": [p]} for p in weights]
    optimizer = Pullback(torch.optim.SGD(groups, lr=lr / math.sqrt(steps)), gain="scalar")
    for group, method in zip(optimizer.param_groups, methods, strict=True):
        group["averaging"] = str(method.averaging)
    for k in range(1, steps + 1):
        noise = places * torch.randn(shape, generator=generator, dtype=torch.float64)
        for p, group, method in zip(weights, optimizer.param_groups, methods, strict=True):
            p.grad = slopes * torch.sign(p.detach() - places) + noise
            if method.pullback:
                group["pullback"] = min(1.0, method.pullback * float(method.averaging.weight(k)))
        optimizer.step()
    found = [read_out(optimizer, p)[1] for p in weights]
    return [estimate(((x - places).abs() * slopes).sum(-1)) for x in found]


def slope(horizons: Sequence[int], errors: Sequence[Estimate]) -> Estimate:
    """Slope of log error against log T by least squares, with its standard error.

    Args:
        horizons: T, two or more.
        errors: an independent estimate at each horizon.

    Raises:
        ValueError: the lengths differ, or there are fewer than two different horizons.
    """
    if len(horizons) != len(errors) or len(set(horizons)) < 2:
        raise ValueError(
            f"horizons and errors must be two or more, as many of each, got "
            f"{len(horizons)} and {len(errors)}"
        )
    x = np.log(np.asarray(horizons, dtype=np.float64))
    x -= x.mean()
    means = np.array([e.mean for e in errors])
    relative = np.array([e.error for e in errors]) / means
    share = x / (x @ x)
    return Estimate(np.asarray(share @ np.log(means)), np.asarray(np.sqrt(share**2 @ relative**2)))
