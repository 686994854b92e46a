"""The options of `paceline theory`; importing them loads neither torch nor SciPy."""

from pathlib import Path
from typing import Annotated

import tyro
from pydantic import Field

from ..train import Options

AtLeastOne = Annotated[int, Field(ge=1)]
AtLeastTwo = Annotated[int, Field(ge=2)]


class TheoryOptions(Options):
    """Options of every theory command; a subclass `NameOptions` is of `paceline theory name`."""

    sections = {"out": "output"}  # noqa: RUF012 - a ClassVar of Options

    out: Path = Path("runs/theory")
    """Folder for the figure, as SVG and PNG."""
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print JSON instead of tables."""


class LimitOptions(TheoryOptions):
    """The returned model's limiting error on one coordinate, by formula, equation and experiment.

    A step's noise has the variance 1. The experiment runs the library's own Pullback around
    torch's SGD until less than 1 % of a start would be left.
    """

    a: float = 0.05
    """Learning rate times curvature, in (0, 2)."""
    beta: float = 0.02
    """Averaging weight, in (0, 1)."""
    gain: tuple[float, ...] = (0.0, 0.1, 0.5, 0.9)
    """Gains λ of the pull, >= 0 and stable."""
    runs: AtLeastTwo = 5000
    """Independent runs of the experiment, >= 2."""
    seed: int = 0
    """Seed of the experiment."""


class FamilyOptions(TheoryOptions):
    """Instances on which the improvement over an EMA grows without bound: a = β = e, e to 0.

    The tables also have EMAs tuned to forget the start as slowly as the pull.
    """

    gain: float = 0.9
    """Gain λ of the pull, >= 0 and stable."""
    e: tuple[float, ...] = (1e-1, 1e-2, 1e-3, 1e-4)
    """Values of a = β, in (0, 1)."""


class ControlOptions(TheoryOptions):
    """From the optimal controller to PACE's gain, one approximation after another, with its cost.

    The spectrum is a power law, aᵢ = a/i, and the gradient noise's variance is proportional to the
    curvature. The returned model is the mean of all iterates, or an EMA in the last rows.
    """

    a: float = 0.3
    """Learning rate times the largest curvature, in (0, 2)."""
    coordinates: AtLeastOne = 16
    """Coordinates of the spectrum, >= 1."""
    horizon: AtLeastTwo = 400
    """T, steps, >= 2."""
    penalty: Annotated[float, Field(gt=0)] = 0.01
    """ρ > 0 on the control."""
    starts: tuple[float, ...] = (0.4, 3.0)
    """Distances from the minimum in each coordinate: about SGD's own spread, and far."""


class FrontierOptions(TheoryOptions):
    """The least loss of each method at its own best learning rate and average, by a search.

    Three settings: in the limit, among parameters with a half-life of the start; in the limit with
    a minimum that drifts; and at a horizon, from a distant start. Losses are relative to the EMA's.
    """

    coordinates: AtLeastOne = 16
    """Coordinates of the spectra, >= 1."""
    half_lives: tuple[float, ...] = (30.0, 300.0, 3000.0)
    """Largest half-lives of the slowest coordinate, steps."""
    steps: tuple[int, ...] = (30, 180)
    """Horizons, multiples of 10."""
    start: float = 3.0
    """Distance of the start from the minimum in each coordinate."""
    drift: tuple[float, ...] = (1e-6, 1e-4, 1e-2)
    """Variances q² of the minimum's move in a step, for a curvature of 1; q²/α for α."""


class TwinOptions(TheoryOptions):
    """The pull against its twin, the EMA at the learning rate η·β/(β+λ(1-β)).

    Tables: exact ratios of limiting errors and half-lives; spectra with a gain for each coordinate,
    correlated noise, and momentum; PACE itself against AdamW with a larger ε.
    """

    beta: Annotated[float, Field(gt=0, le=1)] = 0.05
    """Averaging weight, in (0, 1]."""
    a: tuple[float, ...] = (0.001, 0.01, 0.1, 0.5)
    """Learning rates times curvature, in (0, 2)."""
    gain: tuple[float, ...] = (0.1, 0.5, 1.0)
    """Gains λ of the pull, >= 0 and stable."""
    steps: AtLeastOne = 1000
    """Steps of PACE and AdamW, >= 1."""
    runs: AtLeastTwo = 200
    """Independent runs of PACE and AdamW, >= 2."""
    seed: int = 0
    """Seed of these runs and of the spectra."""


class RateOptions(TheoryOptions):
    """The rate on convex Lipschitz problems: excess loss against the horizon, and a bound.

    First, f(x) = Σ 2^-i·|xᵢ - 1/i| from 0, with subgradient noise of variance 1/i² and the learning
    rate 1/√T. The library's own Pullback runs around torch's SGD; the gain is c·β_t. Then the bound
    for a constant gain and weight: on random problems, and where its two terms are reached.
    """

    horizons: tuple[int, ...] = (64, 256, 1024, 4096)
    """T, steps, two or more."""
    pullback: Annotated[float, Field(ge=0, le=1)] = 1.0
    """c of the pull, in [0, 1]."""
    runs: AtLeastTwo = 32
    """Independent runs, >= 2."""
    problems: AtLeastOne = 300
    """Random problems for the bound, >= 1."""
    seed: int = 0
    """Seed of the noise and of the problems."""


class BatchOptions(TheoryOptions):
    """Steps to a loss, and the least loss, against the batch: each method at its own best.

    The noisy quadratic of Zhang et al., arXiv:1907.04164: curvatures 1/i, and noise of variance
    1/(i·B) at a batch of B. Losses are exact. Parameters are searched on grids, and a best at the
    edge of its grid is said to be.
    """

    coordinates: AtLeastOne = 10_000
    """Coordinates of the spectrum, >= 1."""
    target: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the start's loss that is to be reached, in (0, 1)."""
    horizon: AtLeastOne = 500
    """Steps after which the least loss is taken, >= 1."""
    batches: tuple[float, ...] = tuple(2.0**i for i in range(3, 15))
    """Batch sizes B > 0, ascending."""


class RiverOptions(TheoryOptions):
    """A valley with a river in it: how far methods come along it, and how high above it they stay.

    PACE itself runs all methods, with Adam's moments and a warm-up. The constant rate returns its
    live weights, and so does the decay. The others return averages: of κ = 0.7, or Schedule-Free's.
    The pull has a gain of 1 and κ = 0.3, and the power schedule falls as its twin's rate does.
    """

    slope: float = 0.02
    """Fall of the river for a unit along it, >= 0."""
    hills: tuple[float, ...] = (10.0,)
    """Curvatures of the hillsides, > 0."""
    bend: float = 0.3
    """How far the river swings to each side, >= 0."""
    noise: tuple[float, ...] = (0.3, 1.0)
    """Standard deviations of the gradient's noise on a hill of curvature 1, >= 0: valleys."""
    rates: tuple[float, ...] = tuple(2.0**i for i in range(-4, 4))
    """Learning rates, > 0, ascending."""
    steps: AtLeastTwo = 1000
    """Steps, >= 2."""
    runs: AtLeastTwo = 128
    """Independent runs, >= 2."""
    seed: int = 0
    """Seed of the noise, which all methods share."""
