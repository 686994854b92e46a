"""`paceline theory`: the theory in numbers and pictures; each command a table and a figure."""

import json
import math
from abc import abstractmethod
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

import matplotlib as mpl
import numpy as np
import torch
import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from pydantic import Field
from rich.console import Console
from rich.table import Table
from scipy.optimize import minimize_scalar

from ..averaging import EMA, PowerEMA, Uniform
from ..optimizer import PACE
from ..pullback import Pullback
from ..train import InputError, Options
from .control import (
    Outcome,
    Regulator,
    certainty_equivalent_gain,
    influence,
    long_horizon_gain,
    optimal_gain,
)
from .frontier import (
    AT_A_HORIZON,
    EVERY,
    IN_THE_LIMIT,
    best_at_a_horizon,
    best_in_the_limit,
    floor,
    frontier,
)
from .quadratic import (
    Pull,
    Quadratic,
    better_gain,
    half_life,
    largest_gain,
    limit,
    limiting_error,
    moments,
    spectral_radius,
)
from .simulate import Stylised, convex_errors, simulate, slope
from .twin import twin_epsilon, twin_modes, twin_rate, twin_ratio

LONGEST = 100_000  # steps of an experiment
Share = Annotated[float, Field(gt=0, le=1)]
Steps = Annotated[int, Field(ge=1)]


class Rows(NamedTuple):
    """A table: the names of its columns, and its rows."""

    title: str
    columns: list[str]
    rows: list[list[Any]]


class Finding(NamedTuple):
    """What a command says: tables, sentences, and a figure."""

    tables: list[Rows]
    notes: list[str]
    figure: Figure


class Lab(Options):
    """What all commands have."""

    name: ClassVar[str]

    out: Path = Path("runs/theory")
    """Folder for the figure, as SVG and PNG."""
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print JSON instead of a table."""

    @abstractmethod
    def find(self) -> Finding:
        """Compute it."""

    @property
    def command(self) -> str:
        """The command line that remakes it, without its defaults."""
        words = ["paceline", "theory", self.name]
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if name not in Lab.model_fields and value != field.default:
                several = value if isinstance(value, tuple) else (value,)
                words += [f"--{name.replace('_', '-')}", *(f"{x:g}" for x in several)]
        return " ".join(words)


def show(options: Lab, console: Console) -> None:
    """Compute what a command is about, write its figure, and print its tables.

    Raises:
        InputError: a number is out of its range; by how much.
    """
    try:
        with console.status(options.command):
            finding = options.find()
    except ValueError as error:
        raise InputError(str(error)) from error
    paths = [options.out / f"{options.name}.{kind}" for kind in ("svg", "png")]
    finding.figure.text(0.5, 0.01, options.command, ha="center", family="monospace", size=8)
    FigureCanvasAgg(finding.figure)
    options.out.mkdir(parents=True, exist_ok=True)
    # The same figure is the same file, whenever it is made.
    with mpl.rc_context({"svg.hashsalt": "paceline", "svg.fonttype": "none"}):
        finding.figure.savefig(paths[0], metadata={"Date": None})
    finding.figure.savefig(paths[1], dpi=150)
    if options.as_json:
        said = {
            "command": options.command,
            "tables": [
                {
                    "title": title,
                    "columns": columns,
                    "rows": [[_plain(x) for x in row] for row in rows],
                }
                for title, columns, rows in finding.tables
            ],
            "notes": finding.notes,
            "figures": [str(path) for path in paths],
        }
        console.print(json.dumps(said), highlight=False, markup=False, soft_wrap=True)
        return
    for title, columns, rows in finding.tables:
        table = Table(title=title)
        for name in columns:
            table.add_column(name, justify="left" if name == columns[0] else "right")
        for row in rows:
            table.add_row(*(x if isinstance(x, str) else _written(x) for x in row))
        console.print(table)
    for note in finding.notes:
        console.print(f"• {note}", highlight=False, markup=False)
    console.print(f"Figure: {paths[0]}", highlight=False, markup=False, soft_wrap=True)


def _plain(x: Any) -> "str | float | None":
    """For JSON, which has no infinity."""
    return x if isinstance(x, str) else float(x) if math.isfinite(x) else None


def _written(x: float) -> str:
    return "—" if not math.isfinite(x) else f"{x:.4g}"


def _figure(columns: int, rows: int = 1) -> tuple[Figure, Any]:
    size = (4.6 * columns, 3.6 * rows + 0.4)
    below = 0.3 / size[1]  # room for the command
    layout = ConstrainedLayoutEngine(rect=(0, below, 1, 1 - below))
    figure = Figure(figsize=size, layout=layout)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _power_law(coordinates: int) -> Any:
    return 1 / np.arange(1.0, coordinates + 1)


# ---- limit --------------------------------------------------------------------------------------


class Limit(Lab):
    """The returned model's limiting error on one coordinate, by formula, equation and experiment.

    With a step's noise of variance 1. The experiment is the library's own Pullback around torch's
    SGD, until less than 1 % of a start would be left.
    """

    name = "limit"

    a: float = 0.05
    """Learning rate times curvature, in (0, 2)."""
    beta: float = 0.02
    """Averaging weight, in (0, 1)."""
    c: tuple[float, ...] = (0.0, 0.1, 0.5, 0.9)
    """Gains, >= 0 and stable."""
    runs: Annotated[int, Field(ge=2)] = 5000
    """Independent runs of the experiment, >= 2."""
    seed: int = 0
    """Of the experiment."""

    def find(self) -> Finding:
        """Compute it."""
        a, beta = self.a, self.beta
        formula, plain = limiting_error(a, beta, self.c), limiting_error(a, beta, 0)
        radius = spectral_radius(a, beta, self.c)
        best, bound = better_gain(a, beta), largest_gain(a, beta)
        problem, rows, measured = Quadratic([a], start=0.0), [], []
        for gain, exact, rho in zip(self.c, formula, radius, strict=True):

            def make(parameters: list[Any], gain: float = gain) -> Pullback:
                base, rule = torch.optim.SGD(parameters, lr=1.0), EMA(beta=beta)
                return Pullback(base, gain, rule, gain="scalar", gain_clip=False)

            steps = math.ceil(math.log(1e-4) / (2 * math.log(max(rho, 1e-9))))
            if steps > LONGEST:
                raise ValueError(
                    f"c = {gain:g} forgets so slowly that the experiment would take {steps} steps, "
                    f"more than {LONGEST}"
                )
            found = simulate(make, problem, steps, self.runs, self.seed).returned
            measured.append(found)
            equation = limit(Pull(1.0, beta, gain), problem).second(problem)
            experiment = f"{found.mean[0]:.4g} ± {1.96 * found.error[0]:.2g}"
            rows.append([gain, exact, equation[0], experiment, plain / exact, rho, half_life(rho)])
        figure, axes = _figure(2)
        c = np.linspace(0, 0.9999 * float(bound), 2000)
        left, right = axes[0]
        left.plot(c, limiting_error(a, beta, c), label="exact")
        left.axhline(float(plain), color="grey", ls="--", label="EMA, c = 0")
        error = [1.96 * float(x.error[0]) for x in measured]
        left.errorbar(
            self.c, [float(x.mean[0]) for x in measured], error, fmt="o", label="measured, 95 %"
        )
        left.set(xlabel="gain c", ylabel="limiting error E θ̂²", yscale="log")
        left.legend()
        right.plot(c, half_life(spectral_radius(a, beta, c)))
        right.set(xlabel="gain c", ylabel="half-life of the start, steps", yscale="log")
        columns = ["c", "formula", "Lyapunov", "measured, 95 %", "EMA / this"]
        columns += ["radius", "half-life"]
        return Finding(
            [Rows(f"Limiting error at a = {a:g}, β = {beta:g}", columns, rows)],
            [
                f"Stable for c < {bound:.6g}; below the EMA's error for 0 < c < {best:.6g}.",
                "What is gained in error is paid for in forgetting: see the half-life.",
            ],
            figure,
        )


# ---- family -------------------------------------------------------------------------------------


class Instances(Lab):
    """Instances on which the improvement over an EMA grows without bound: a = β = e, e to 0.

    And beside them what an EMA comes to that is tuned to forget the start as slowly as the pull.
    """

    name = "family"

    gain: float = 0.9
    """c of the pull, >= 0 and stable."""
    e: tuple[float, ...] = (1e-1, 1e-2, 1e-3, 1e-4)
    """Values of a = β, in (0, 1)."""

    def find(self) -> Finding:
        """Compute it."""
        e, c = np.asarray(self.e), self.gain
        ema, pulled = limiting_error(e, e, 0), limiting_error(e, e, c)
        lives = [half_life(spectral_radius(e, e, x)) for x in (0, c)]
        slow = 1 - spectral_radius(e, e, c)  # the share of the start that is lost in a step
        smaller_weight = limiting_error(e, slow, 0)
        tuned = limiting_error(slow, slow, 0, (slow / e) ** 2)  # at the learning rate slow/e
        rows = np.stack(
            [
                e,
                ema,
                pulled,
                ema / pulled,
                (2 * e + c) / (2 * e),
                *lives,
                smaller_weight / pulled,
                tuned / pulled,
            ]
        ).T.tolist()
        figure, axes = _figure(2)
        left, right = axes[0]
        left.loglog(e, ema / pulled, "o-", label="EMA at the same a and β")
        left.loglog(e, smaller_weight / pulled, "s-", label="EMA, β chosen")
        left.loglog(e, tuned / pulled, "^-", label="EMA, β and learning rate chosen")
        left.axhline(1, color="grey", ls="--")
        left.set(xlabel="e = a = β", ylabel=f"limiting error / that of c = {c:g}")
        left.legend()
        for life, name in zip(lives, ("EMA", f"c = {c:g}"), strict=True):
            right.loglog(e, life, "o-", label=name)
        right.set(xlabel="e = a = β", ylabel="half-life of the start, steps")
        right.legend()
        columns = ["e", "EMA", "pull", "ratio", "(a+β+c)/(a+β)", "half-life", "pull's"]
        columns += ["EMA β* / pull", "EMA β*, η* / pull"]
        return Finding(
            [Rows(f"a = β = e, c = {c:g}", columns, rows)],
            [
                "β* and β*, η*: EMAs that forget the start as slowly as the pull, by a smaller β "
                "alone, or with a smaller learning rate, too.",
            ],
            figure,
        )


# ---- control ------------------------------------------------------------------------------------


class Control(Lab):
    """From the optimal controller to PACE's gain, one approximation after another, and its price.

    A power-law spectrum, aᵢ = a/i, with gradient noise whose variance is proportional to the
    curvature; what is returned is the mean of all iterates, until an EMA takes its place.
    """

    name = "control"

    a: float = 0.3
    """Learning rate times the largest curvature, in (0, 2)."""
    coordinates: Steps = 16
    """Of the spectrum, >= 1."""
    horizon: Annotated[int, Field(ge=2)] = 400
    """T, steps, >= 2."""
    penalty: Annotated[float, Field(gt=0)] = 0.01
    """ρ > 0 on the control."""
    starts: tuple[float, ...] = (0.4, 3.0)
    """Distances from the minimum, in each coordinate: about SGD's own spread, and far."""

    def find(self) -> Finding:
        """Compute it."""
        a = self.a * _power_law(self.coordinates)
        noise, t = self.a * a, np.arange(self.horizon, dtype=np.float64)[:, None]
        columns = ["", "chosen", "knows μ*", "error", "Σ E u²", "cost", "/ best"]
        tables, all_rows = [], []
        for start in self.starts:
            rows = self._chain(a, noise, start, t)
            all_rows.append(rows)
            title = f"T = {self.horizon}, ρ = {self.penalty:g}, from a distance of {start:g}"
            tables.append(Rows(title, columns, rows))
        figure, axes = _figure(2)
        left, right = axes[0]
        for value, colour in zip((a[0], a[-1]), ("C0", "C1"), strict=True):
            exact = certainty_equivalent_gain(t[:, 0], self.horizon, value, self.penalty)
            left.plot(t[:, 0], exact, colour, label=f"certainty-equivalent, a = {value:.3g}")
            lasting = float(long_horizon_gain(self.horizon, value, self.penalty))
            left.axhline(lasting, color=colour, ls="--", label="long before the end")
        left.set(xlabel="step", ylabel="gain toward the average", yscale="log")
        left.legend(fontsize=8)
        at = np.arange(len(all_rows[0]))
        for i, (start, rows) in enumerate(zip(self.starts, all_rows, strict=True)):
            right.barh(at + 0.4 * i, [float(row[3]) for row in rows], 0.4, label=f"from {start:g}")
        right.set_yticks(at + 0.2, [str(row[0]) for row in all_rows[0]], fontsize=7)
        right.invert_yaxis()
        right.set(xlabel="error of the returned model", xscale="log")
        right.legend(fontsize=8, loc="lower left")
        return Finding(
            tables,
            [
                "Training does not know the minimum μ*: the pull toward the running mean is what "
                "is left of the optimum without it.",
                f"Long before the end the derived gain is at most 1/T = {1 / self.horizon:.2g}.",
            ],
            figure,
        )

    def _chain(self, a: Any, noise: Any, start: float, t: Any) -> list[list[Any]]:
        steps, rho = self.horizon, self.penalty
        uniform = Regulator(a, 1 / (t[:, 0] + 2), rho, noise, start)
        gains, best = uniform.solve()
        of_z = optimal_gain(t, steps, a, rho)
        # In the mean of all, S_k is (k+1) times the average so far.
        foreseen = uniform.feedback(of_z * influence(t, steps, a), of_z * (t + 1))
        lasting = long_horizon_gain(steps, a, rho)
        root = np.sqrt(a)  # √v, up to a factor that c has as well

        def pulled(problem: Regulator, gain: Any) -> Outcome:
            return problem.outcome(problem.feedback(gain, -np.asarray(gain)))

        def with_ema(beta: float) -> Regulator:
            return Regulator(a, np.full(steps, beta), rho, noise, start)

        beta = _least(lambda x: pulled(with_ema(x), 0.0).cost, 1e-4, 1.0)
        ema = with_ema(beta)
        c = _least(lambda x: pulled(ema, np.minimum(1, x / root)).error, 1e-9, 1e3)
        named = [
            ("mean of all, no control", "", "—", uniform.outcome(np.zeros_like(gains))),
            ("exact optimum", "", "yes", best),
            ("gain of continuous time", "", "yes", uniform.outcome(foreseen)),
            (
                "the same to the running mean",
                "",
                "no",
                pulled(uniform, certainty_equivalent_gain(t, steps, a, rho)),
            ),
            ("gain of long horizons", "", "no", pulled(uniform, lasting)),
            ("EMA, no control", f"β = {beta:.2g}", "—", pulled(ema, 0.0)),
            ("EMA, exact optimum", "", "yes", ema.solve()[1]),
            ("EMA, gain of long horizons", "", "no", pulled(ema, lasting)),
            ("EMA, min(1, c/√v)", f"c = {c:.1g}", "no", pulled(ema, np.minimum(1, c / root))),
        ]
        return [[*names, *x, x.cost / best.cost] for *names, x in named]


def _least(cost: Any, low: float, high: float) -> float:
    """Where a cost is least between two positive numbers: the best of a grid, made better."""
    grid = np.linspace(math.log(low), math.log(high), 25)
    at = int(np.argmin([cost(math.exp(x)) for x in grid]))
    ends = grid[max(at - 1, 0)], grid[min(at + 1, 24)]
    found = minimize_scalar(lambda x: cost(math.exp(x)), bounds=ends, method="bounded")
    return math.exp(found.x)


# ---- frontier -----------------------------------------------------------------------------------


class Frontier(Lab):
    """What each method comes to at its own best learning rate and average, which are searched.

    In the limit, among those that forget the start by a half-life; with a minimum that moves; and
    at a horizon, from a distant start. Losses are relative to the EMA's.
    """

    name = "frontier"

    coordinates: Steps = 16
    """Of the spectra, >= 1."""
    half_lives: tuple[float, ...] = (30.0, 300.0, 3000.0)
    """Of the slowest coordinate, at most, steps."""
    steps: tuple[int, ...] = (30, 180)
    """Horizons, multiples of 10."""
    start: float = 3.0
    """Distance of the start from the minimum in each coordinate."""
    drift: tuple[float, ...] = (1e-6, 1e-4, 1e-2)
    """Variances q² of the minimum's moves in a step, for a curvature of 1; q²/α for α."""

    def find(self) -> Finding:
        """Compute it."""
        if any(steps % EVERY or steps < EVERY for steps in self.steps):
            raise ValueError(f"steps must be multiples of {EVERY}, got {self.steps}")
        spectrum = _power_law(self.coordinates)
        problems = {
            "one curvature": (np.ones(1), np.ones(1)),
            "power law": (spectrum, np.ones(self.coordinates)),
            "power law, noise ∝ curvature": (spectrum, spectrum),
            "power law, noise ∝ 1/curvature": (spectrum, 1 / spectrum),
        }
        limits, drifts, horizons = [], [], []
        for name, (curvature, noise) in problems.items():
            still = Quadratic(curvature, noise)
            for life in self.half_lives:
                found = frontier(IN_THE_LIMIT, best_in_the_limit, still, life)
                limits.append([name, life, *_relative(found)])
            for q in self.drift:
                moving = Quadratic(curvature, noise, drift=q / curvature)
                found = frontier(IN_THE_LIMIT, best_in_the_limit, moving)
                drifts.append([name, q, *_relative(found), floor(moving) / found["EMA"].loss])
            far = Quadratic(curvature, noise, start=self.start)
            for steps in self.steps:
                found = frontier(AT_A_HORIZON, best_at_a_horizon, far, steps)
                horizons.append(
                    [name, steps, *_relative(found), floor(far, steps) / found["EMA"].loss]
                )
        tables = [
            Rows(
                "In the limit, by half-life",
                ["problem", "half-life", "EMA's loss", *IN_THE_LIMIT],
                limits,
            ),
            Rows(
                "In the limit, by drift",
                ["problem", "drift", "EMA's loss", *IN_THE_LIMIT, "floor"],
                drifts,
            ),
            Rows(
                f"After T steps from a distance of {self.start:g}",
                ["problem", "T", "EMA's loss", *AT_A_HORIZON, "floor"],
                horizons,
            ),
        ]
        return Finding(
            tables,
            [
                "Losses are divided by the EMA's; smaller is better. Adam's second moment is held "
                "at the noise's variance.",
                "floor: what the best linear estimator makes of the same gradients.",
            ],
            _dots(tables, list(problems)),
        )


def _relative(found: dict[str, Any]) -> list[float]:
    plain = found["EMA"].loss
    possible = math.isfinite(plain)
    return [plain, *(best.loss / plain if possible else math.nan for best in found.values())]


def _dots(tables: Sequence[Rows], problems: Sequence[str]) -> Figure:
    figure, axes = _figure(len(problems), len(tables))
    for line, table in zip(axes, tables, strict=True):
        for axis, problem in zip(line, problems, strict=True):
            rows = [row for row in table.rows if row[0] == problem]
            names, at = table.columns[3:], np.arange(len(table.columns) - 3)
            found = [x for row in rows for x in row[3:] if math.isfinite(x)]
            for i, row in enumerate(rows):
                places = at + (i - (len(rows) - 1) / 2) * 0.8 / len(rows)
                axis.plot(
                    row[3:], places, "os^D"[i % 4], ms=3, label=f"{table.columns[1]} {row[1]:g}"
                )
                for x, place in zip(row[3:], places, strict=True):
                    if math.isfinite(x):
                        axis.annotate(
                            f"{x:.3f}",
                            (x, place),
                            (4, 0),
                            textcoords="offset points",
                            size=6,
                            va="center",
                        )
            axis.set_yticks(at, names, fontsize=8)
            axis.invert_yaxis()
            axis.axvline(1, color="grey", ls="--", lw=0.8)
            axis.set(xscale="log", xlim=(min([0.9, *found]) * 0.97, max([1.1, *found]) * 1.3))
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_formatter("{x:g}")
            axis.tick_params(axis="x", which="both", labelsize=7)
            axis.set_title(f"{table.title}\n{problem}", fontsize=9)
            axis.legend(fontsize=7, loc="lower right")
    return figure


# ---- twin ---------------------------------------------------------------------------------------


class Twin(Lab):
    """The pull against the EMA that it amounts to: its twin, at the learning rate η·β/(β+c(1-β)).

    Exact ratios of limiting errors and half-lives; spectra with a gain for each coordinate, noise
    and curvature of any directions, momentum; and PACE itself against AdamW with a larger ε.
    """

    name = "twin"

    beta: Share = 0.05
    """Averaging weight of the figure, in (0, 1]."""
    a: tuple[float, ...] = (0.001, 0.01, 0.1, 0.5)
    """Learning rate times curvature, in (0, 2)."""
    c: tuple[float, ...] = (0.1, 0.5, 1.0)
    """Gains, >= 0 and stable."""
    steps: Steps = 1000
    """Of PACE and AdamW, >= 1."""
    runs: Annotated[int, Field(ge=2)] = 200
    """Independent runs of those, >= 2."""
    seed: int = 0
    """Of those."""

    def find(self) -> Finding:
        """Compute it."""
        rows = []
        for a in self.a:
            for c in self.c:
                ratios = [twin_ratio(a, self.beta, c, simple=x) for x in (False, True)]
                lives = [half_life(x) for x in twin_modes(a, self.beta, c)]
                r = twin_rate(self.beta, c)
                drifting = limiting_error(a, self.beta, c, 0, 1)
                drifting /= limiting_error(a * r, self.beta, 0, 0, 1)
                rows.append([a, c, r, *ratios, drifting, *lives])
        tables = [
            Rows(
                f"One coordinate, β = {self.beta:g}: error by noise alone, by drift alone",
                [
                    "a",
                    "c",
                    "r",
                    "noise / twin's",
                    "at β/(β+c)",
                    "drift / twin's",
                    "half-life",
                    "twin's",
                ],
                rows,
            ),
            Rows(
                f"16 coordinates, β = {self.beta:g}, gains 0.02 to 1: error / twin's",
                ["curvature and noise", "momentum", "a <=", "least", "largest"],
                self._spectra(),
            ),
            Rows(
                f"PACE and AdamW + EMA, κ = 0.5, after {self.steps} steps: excess loss, 95 %",
                ["η·c / largest √v", "clipped", "PACE", "ε = η·c", "ε = 1e-8", "PACE / ε = η·c"],
                self._adam(),
            ),
        ]
        figure, axes = _figure(2)
        left, right = axes[0]
        grid_a, grid_c = np.meshgrid(np.geomspace(1e-3, 1, 120), np.geomspace(1e-3, 1, 120))
        above = 100 * (twin_ratio(grid_a, self.beta, grid_c) - 1)
        shown = left.pcolormesh(grid_a, grid_c, above, norm=LogNorm(1e-3), rasterized=True)
        left.set(xscale="log", yscale="log", xlabel="a", ylabel="gain c")
        left.set_title(f"error above the twin's, %, β = {self.beta:g}", fontsize=9)
        figure.colorbar(shown, ax=left)
        middle = self.c[len(self.c) // 2]
        for i, share in enumerate(self.a):
            problem, rate = Quadratic([share], noise=0.0), float(twin_rate(self.beta, middle))
            for method, style in (
                (Pull(1.0, self.beta, middle), "-"),
                (Pull(rate, self.beta), "--"),
            ):
                means = [x.mean[-1, 0] for x in islice(moments(method, problem), 2000)]
                label = f"a = {share:g}" if style == "-" else None
                right.plot(np.arange(2000), np.maximum(means, 1e-9), f"C{i}{style}", label=label)
        right.set(xscale="symlog", yscale="log", ylim=(1e-4, 2), xlabel="step")
        right.set_ylabel("share of the start in the returned model")
        right.set_title(f"c = {middle:g}; dashed: the twin", fontsize=9)
        right.legend(fontsize=8)
        return Finding(
            tables,
            [
                "The two differ in fast motions alone: with noise alone the pull's error is never "
                "below its twin's on one coordinate, with drift alone never above.",
                "Without decay and clip, PACE's own twin is AdamW with ε + (1-β)·η·c for its ε. "
                "Clipped coordinates move as at the learning rate η·β_t.",
            ],
            figure,
        )

    def _spectra(self) -> list[list[Any]]:
        rng, n = np.random.default_rng(self.seed), 16
        found: list[list[Any]] = []
        spectrum, gains = _power_law(n), np.geomspace(0.02, 1, n)
        directions, _ = np.linalg.qr(rng.standard_normal((n, n)))
        shaking = rng.standard_normal((n, n))
        slant = Quadratic(
            (directions * spectrum) @ directions.T, shaking @ shaking.T / n + 0.1 * np.eye(n)
        )
        straight = Quadratic(spectrum, spectrum)
        for name, problem in (("diagonal", straight), ("general", slant)):
            for mu in (0.0, 0.9):
                for lr in (0.05, 0.5):
                    pull = Pull(lr, self.beta, gains, mu)
                    twin = Pull(lr * twin_rate(self.beta, gains), self.beta, 0.0, mu)
                    errors = [limit(x, problem).second(problem) for x in (pull, twin)]
                    ratio = errors[0] / errors[1]
                    ratio = np.diag(ratio) if problem.general else ratio
                    found.append([name, mu, lr, ratio.min(), ratio.max()])
        return found

    def _adam(self) -> list[list[Any]]:
        spectrum, lr, rule = _power_law(16), 0.01, PowerEMA(0.5)
        problem = Quadratic(spectrum, noise=spectrum)
        rows: list[list[Any]] = []
        options: dict[str, Any] = {"lr": lr, "weight_decay": 0.0, "averaging": rule}

        def loss(**changed: Any) -> tuple[float, float]:
            def make(parameters: list[Any]) -> PACE:
                return PACE(parameters, **{**options, **changed})

            found = simulate(make, problem, self.steps, self.runs, self.seed).returned
            spread = math.sqrt(((spectrum * found.error / 2) ** 2).sum())
            return float(problem.loss(found.mean)), 1.96 * spread

        plain = loss(pullback=0.0)
        weights = np.array([rule.weight(t) for t in range(1, self.steps + 1)])[:, None]
        for share in (0.03, 0.1, 0.3, 1.0):
            clipped = float(np.mean(share * weights >= np.sqrt(spectrum)))
            pace = loss(pullback=share / lr)
            twin = loss(pullback=0.0, eps=float(twin_epsilon(lr, share / lr, 1e-4)))
            written = [f"{x:.3g} ± {y:.1g}" for x, y in (pace, twin, plain)]
            rows.append([share, f"{clipped:.0%}", *written, pace[0] / twin[0]])
        return rows


# ---- rate ---------------------------------------------------------------------------------------


class Rate(Lab):
    """The rate on a convex Lipschitz problem: excess loss against the horizon, pulled and not.

    f(x) = Σ 2^-i·|xᵢ - 1/i| from 0, subgradients with noise of variance 1/i², the learning rate
    1/√T, by the library's own Pullback around torch's SGD; the gain is g·β_t.
    """

    name = "rate"

    horizons: tuple[int, ...] = (64, 256, 1024, 4096)
    """T, steps, two or more."""
    pull: Annotated[float, Field(ge=0, le=1)] = 1.0
    """g in [0, 1]."""
    runs: Annotated[int, Field(ge=2)] = 32
    """Independent runs, >= 2."""
    seed: int = 0
    """Of the noise."""

    def find(self) -> Finding:
        """Compute it."""
        rules = {
            "mean of all": Uniform(),
            "EMA, κ = 0.8": PowerEMA(0.8),
            "EMA, κ = 0.5": PowerEMA(0.5),
            "EMA, β = 0.05": EMA(beta=0.05),
        }
        methods = [Stylised(rule, g) for rule in rules.values() for g in (0.0, self.pull)]
        found = [
            convex_errors(methods, steps, runs=self.runs, seed=self.seed + i)
            for i, steps in enumerate(self.horizons)
        ]
        figure, axes = _figure(1)
        rows: list[list[Any]] = []
        axis = axes[0, 0]
        for i, method in enumerate(methods):
            name = list(rules)[i // 2] + (f", pull {method.pull:g}" if i % 2 else "")
            errors = [each[i] for each in found]
            trend = slope(self.horizons, errors)
            constants = [
                float(e.mean) * math.sqrt(t) for e, t in zip(errors, self.horizons, strict=True)
            ]
            rows.append([name, f"{trend.mean:.3f} ± {1.96 * trend.error:.2g}", *constants])
            means = [float(e.mean) for e in errors]
            axis.plot(
                self.horizons,
                means,
                f"C{i // 2}{'o--' if i % 2 else 'o-'}",
                mfc="white" if i % 2 else None,
                label=name,
            )
        first = rows[0][2] / math.sqrt(self.horizons[0])
        guide = [first * math.sqrt(self.horizons[0] / t) for t in self.horizons]
        axis.plot(self.horizons, guide, color="grey", ls=":", label="slope -1/2")
        axis.set(
            xscale="log",
            yscale="log",
            xlabel="horizon T",
            ylabel="excess loss of the returned model",
        )
        axis.legend(fontsize=7, handlelength=4)
        columns = ["loss·√T at T =", "slope, 95 %", *map(str, self.horizons)]
        return Finding(
            [Rows("Excess loss on Σ 2^-i·|xᵢ - 1/i|", columns, rows)],
            [
                "The paper's promise: a slope of -1/2 or steeper, up to a factor of the average.",
            ],
            figure,
        )
