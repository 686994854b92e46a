"""`paceline theory`: the theory in numbers and pictures. Each command makes tables and a figure."""

import json
import math
from abc import abstractmethod
from collections.abc import Sequence
from itertools import islice, product
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from rich.console import Console
from rich.table import Table
from scipy.optimize import minimize_scalar

from ..averaging import EMA, PowerEMA, Uniform
from ..optimizer import PACE
from ..pullback import Pullback
from ..train import InputError
from ..train.intervals import interval
from . import batch, control, frontier, river
from .options import (
    BatchOptions,
    ControlOptions,
    FamilyOptions,
    FrontierOptions,
    LimitOptions,
    RateOptions,
    RiverOptions,
    TheoryOptions,
    TwinOptions,
)
from .quadratic import (
    Pull,
    Quadratic,
    better_gain,
    half_life,
    in_range,
    largest_gain,
    limit,
    limiting_error,
    moments,
    spectral_radius,
)
from .rate import hardest_starts, mean_loss, rate_bound, step_factor
from .simulate import StylisedPACE, convex_errors, simulate, slope
from .twin import twin_epsilon, twin_modes, twin_rate, twin_ratio

LONGEST = 100_000  # steps of an experiment
BETA, GAINS = 0.1, (0.0, 0.1, 0.5, 1.0)  # of the bound's table
# Colours that the colour-blind can tell apart (Okabe and Ito), markers, and sizes: lines that lie
# upon another show.
LOOKS: dict[str, dict[str, Any]] = {
    name: {"color": colour, "marker": marker, "ms": size, "lw": 1.2, "zorder": 10 - size}
    for name, colour, marker, size in (
        ("SGD", "#000000", "o", 5),
        ("constant", "#000000", "o", 5),
        ("power", "#009E73", "D", 8),
        ("EMA", "#0072B2", "s", 6),
        ("decay", "#E69F00", "P", 6),
        ("gain 1", "#E69F00", "P", 6),
        ("pull", "#D55E00", "^", 4),
        ("Schedule-Free", "#CC79A7", "v", 5),
        ("its schedule", "#56B4E9", "X", 5),
    )
}


class Rows(NamedTuple):
    """A table with its column names and its rows."""

    title: str
    columns: list[str]
    rows: list[list[Any]]


class Finding(NamedTuple):
    """The result of a command: tables, sentences, and a figure."""

    tables: list[Rows]
    notes: list[str]
    figure: Figure


class TheoryCommand(TheoryOptions):
    """A theory command: `NameOptions` with what `paceline theory name` finds."""

    @abstractmethod
    def find(self) -> Finding:
        """Compute the tables and draw the figure."""

    @property
    def name(self) -> str:
        """The command's name, which is also the figure's."""
        return type(self).__name__.removesuffix("Command").lower()

    @property
    def command(self) -> str:
        """The command line that makes the figure again; options at their default are left out."""
        words = ["paceline", "theory", self.name]
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if name not in TheoryCommand.model_fields and value != field.default:
                several = value if isinstance(value, tuple) else (value,)
                words += [f"--{name.replace('_', '-')}", *(f"{x:g}" for x in several)]
        return " ".join(words)


def run_theory(given: TheoryOptions, console: Console) -> None:
    """Run the command of these options: write its figure and print its tables.

    Raises:
        InputError: a number is out of its range.
    """
    kind = type(given).__name__.replace("Options", "Command")
    options: TheoryCommand = globals()[kind](**given.model_dump())
    try:
        with console.status(options.command):
            tables, notes, figure = options.find()
    except ValueError as error:
        raise InputError(str(error)) from error
    paths = [options.out / f"{options.name}.{kind}" for kind in ("svg", "png")]
    figure.text(0.5, 0.01, options.command, ha="center", family="monospace", size=8)
    FigureCanvasAgg(figure)
    options.out.mkdir(parents=True, exist_ok=True)
    # Without a date and random ids, the same figure is the same file.
    with mpl.rc_context({"svg.hashsalt": "paceline", "svg.fonttype": "none"}):
        figure.savefig(paths[0], metadata={"Date": None})
    figure.savefig(paths[1], dpi=150)
    if options.as_json:
        report = {
            "command": options.command,
            "tables": [
                table._replace(rows=[[_json_value(x) for x in row] for row in table.rows])._asdict()
                for table in tables
            ],
            "notes": notes,
            "figures": list(map(str, paths)),
        }
        console.print(json.dumps(report), highlight=False, markup=False, soft_wrap=True)
        return
    for title, columns, rows in tables:
        printed = Table(title=title)
        for name in columns:
            printed.add_column(name, justify="left" if name == columns[0] else "right")
        for row in rows:
            printed.add_row(*(x if isinstance(x, str) else _cell(x) for x in row))
        console.print(printed)
    for note in notes:
        console.print(f"• {note}", highlight=False, markup=False)
    console.print(f"Figure: {paths[0]}", highlight=False, markup=False, soft_wrap=True)


def _json_value(x: Any) -> "str | float | None":
    """The value for JSON, which has no infinity."""
    return x if isinstance(x, str) else float(x) if math.isfinite(x) else None


def _cell(x: float) -> str:
    if not math.isfinite(x):
        return "—"
    return f"{x:.0f}" if x == round(x) and abs(x) < 1e6 else f"{x:.4g}"


def _subplots(columns: int, rows: int = 1) -> tuple[Figure, Any]:
    height = 3.6 * rows + 0.4
    below = 0.3 / height  # room for the command
    layout = ConstrainedLayoutEngine(rect=(0, below, 1, 1 - below))
    figure = Figure(figsize=(4.6 * columns, height), layout=layout)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _power_law(coordinates: int) -> Any:
    return 1 / np.arange(1.0, coordinates + 1)


class LimitCommand(LimitOptions, TheoryCommand):
    """`paceline theory limit`."""

    def find(self) -> Finding:
        a, beta = self.a, self.beta
        formula, ema = limiting_error(a, beta, self.gain), limiting_error(a, beta, 0)
        radii = spectral_radius(a, beta, self.gain)
        best, bound = better_gain(a, beta), largest_gain(a, beta)
        problem, rows, measured = Quadratic([a], start=0.0), [], []
        for gain, exact, radius in zip(self.gain, formula, radii, strict=True):

            def make(parameters: list[Any], gain: float = gain) -> Pullback:
                base, rule = torch.optim.SGD(parameters, lr=1.0), EMA(beta=beta)
                return Pullback(base, gain, rule, gain="scalar", gain_clip=False)

            steps = math.ceil(math.log(1e-4) / (2 * math.log(max(radius, 1e-9))))
            if steps > LONGEST:
                raise ValueError(
                    f"gain = {gain:g} forgets too slowly: the experiment would take {steps} steps, "
                    f"at most {LONGEST} are allowed; raise a or beta"
                )
            found = simulate(make, problem, steps, self.runs, self.seed).returned
            mean, error = float(found.mean[0]), 1.96 * float(found.error[0])
            measured.append((mean, error))
            equation = limit(Pull(1.0, beta, gain), problem).second(problem)[0]
            written = f"{mean:.4g} ± {error:.2g}"
            rows.append([gain, exact, equation, written, ema / exact, radius, half_life(radius)])
        figure, ((left, right),) = _subplots(2)
        gains = np.linspace(0, 0.9999 * float(bound), 2000)
        left.plot(gains, limiting_error(a, beta, gains), label="exact")
        left.axhline(float(ema), color="grey", ls="--", label="EMA, λ = 0")
        means, errors = zip(*measured, strict=True)
        left.errorbar(self.gain, means, errors, fmt="o", label="measured, 95 %")
        left.set(xlabel="gain λ", ylabel="limiting error E θ̂²", yscale="log")
        left.legend()
        right.plot(gains, half_life(spectral_radius(a, beta, gains)))
        right.set(xlabel="gain λ", ylabel="half-life of the start, steps", yscale="log")
        results = ["formula", "Lyapunov", "measured, 95 %", "EMA / this", "radius", "half-life"]
        notes = [
            f"The pull is stable for a gain < {bound:.6g}; its error is below the EMA's for "
            f"0 < gain < {best:.6g}.",
            "A lower error costs memory: the half-life of the start grows.",
        ]
        title = f"Limiting error at a = {a:g}, β = {beta:g}"
        return Finding([Rows(title, ["gain", *results], rows)], notes, figure)


class FamilyCommand(FamilyOptions, TheoryCommand):
    """`paceline theory family`."""

    def find(self) -> Finding:
        e, gain = np.asarray(self.e), self.gain
        ema, pulled = limiting_error(e, e, 0), limiting_error(e, e, gain)
        lives = [half_life(spectral_radius(e, e, x)) for x in (0, gain)]
        slow = 1 - spectral_radius(e, e, gain)  # the share of the start that a step forgets
        smaller_beta = limiting_error(e, slow, 0)
        tuned = limiting_error(slow, slow, 0, (slow / e) ** 2)  # at the learning rate slow/e
        ratio, approximate = ema / pulled, (2 * e + gain) / (2 * e)
        values = [e, ema, pulled, ratio, approximate, *lives, smaller_beta / pulled, tuned / pulled]
        figure, ((left, right),) = _subplots(2)
        left.loglog(e, ratio, "o-", label="EMA at the same a and β")
        left.loglog(e, smaller_beta / pulled, "s-", label="EMA, β chosen")
        left.loglog(e, tuned / pulled, "^-", label="EMA, β and learning rate chosen")
        left.axhline(1, color="grey", ls="--")
        left.set(xlabel="e = a = β", ylabel=f"limiting error / that of λ = {gain:g}")
        left.legend()
        for life, name in zip(lives, ("EMA", f"λ = {gain:g}"), strict=True):
            right.loglog(e, life, "o-", label=name)
        right.set(xlabel="e = a = β", ylabel="half-life of the start, steps")
        right.legend()
        columns = ["e", "EMA", "pull", "ratio", "(a+β+λ)/(a+β)", "half-life", "pull's"]
        columns += ["EMA β* / pull", "EMA β*, η* / pull"]
        note = (
            "EMAs with β* or β*, η* forget the start as slowly as the pull: by a smaller β alone, "
            "or by a smaller β and learning rate."
        )
        table = Rows(f"a = β = e, λ = {gain:g}", columns, np.stack(values).T.tolist())
        return Finding([table], [note], figure)


class ControlCommand(ControlOptions, TheoryCommand):
    """`paceline theory control`."""

    def find(self) -> Finding:
        a = self.a * _power_law(self.coordinates)
        t = np.arange(self.horizon, dtype=np.float64)
        tables = [self._chain(a, start, t[:, None]) for start in self.starts]
        figure, ((left, middle, right),) = _subplots(3)
        for value, colour in zip((a[0], a[-1]), ("C0", "C1"), strict=True):
            exact = control.certainty_equivalent_gain(t, self.horizon, value, self.penalty)
            left.plot(t, exact, colour, label=f"certainty-equivalent, a = {value:.3g}")
            lasting = float(control.long_horizon_gain(self.horizon, value, self.penalty))
            left.axhline(lasting, color=colour, ls="--", label="long before the end")
        left.set(xlabel="step", ylabel="gain toward the average", yscale="log")
        left.legend(fontsize=8)
        at = np.arange(len(tables[0].rows))
        for i, (start, table) in enumerate(zip(self.starts, tables, strict=True)):
            errors = [float(row[3]) for row in table.rows]
            right.barh(at + 0.4 * i, errors, 0.4, label=f"from {start:g}")
        right.set_yticks(at + 0.2, [row[0] for row in tables[0].rows], fontsize=7)
        right.invert_yaxis()
        right.set(xlabel="error of the returned model", xscale="log")
        right.legend(fontsize=8, loc="lower left")
        self._against_the_start(a, t[:, None], middle)
        notes = [
            "Training does not know the minimum μ*. With the maximum-likelihood (ML) estimate in "
            "its place the error is about the estimate's own, from any start. The running mean is "
            "a poor estimate: the start and the pull itself move it.",
            f"Long before the end the derived gain is at most 1/T = {1 / self.horizon:.2g}.",
        ]
        return Finding(tables, notes, figure)

    def _regulator(self, a: Any, start: float, beta: Any) -> control.Regulator:
        return control.Regulator(a, beta, self.penalty, self.a * a, start)

    def _against_the_start(self, a: Any, t: Any, axis: Any) -> None:
        """Draw the mean of all's error by its start, a constant plus a square."""
        distances = np.geomspace(0.1, 10, 50)
        problems = [self._regulator(a, start, 1 / (t[:, 0] + 2)) for start in (0.0, 1.0)]
        best, _ = problems[0].solve()
        pull = control.certainty_equivalent_gain(t, self.horizon, a, self.penalty)
        for name, gains in {
            "no control": problems[0].feedback(0.0, 0.0),
            "optimum, running mean for μ*": problems[0].feedback(pull, -pull),
            "optimum, ML estimate for μ*": problems[0].estimated(best),
            "optimum, knows μ*": best,
        }.items():
            near, one = (problem.outcome(gains).error for problem in problems)
            axis.plot(distances, near + (one - near) * distances**2, label=name)
        axis.set(xscale="log", yscale="log", xlabel="distance of the start in each coordinate")
        axis.set_ylabel("error of the mean of all iterates")
        axis.legend(fontsize=7)

    def _chain(self, a: Any, start: float, t: Any) -> Rows:
        steps, rho = self.horizon, self.penalty

        def pulled(problem: control.Regulator, gain: Any) -> control.ControlOutcome:
            return problem.outcome(problem.feedback(gain, -np.asarray(gain)))

        def with_ema(beta: float) -> control.Regulator:
            return self._regulator(a, start, np.full(steps, beta))

        def clipped(pullback: float) -> Any:
            return np.minimum(1, pullback / np.sqrt(a))  # √a is √v up to a factor

        uniform = self._regulator(a, start, 1 / (t[:, 0] + 2))
        gains, best = uniform.solve()
        estimate = uniform.estimate_error()
        of_z = control.optimal_gain(t, steps, a, rho)
        # With the mean of all iterates, S_k is (k+1) times the average so far.
        foreseen = uniform.feedback(of_z * control.influence(t, steps, a), of_z * (t + 1))
        certain = control.certainty_equivalent_gain(t, steps, a, rho)
        lasting = control.long_horizon_gain(steps, a, rho)
        beta = _least(lambda x: pulled(with_ema(x), 0.0).cost, 1e-4, 1.0)
        ema = with_ema(beta)
        c = _least(lambda x: pulled(ema, clipped(x)).error, 1e-9, 1e3)
        chain = [
            ("mean of all, no control", "", "—", pulled(uniform, 0.0)),
            ("exact optimum", "", "yes", best),
            ("gain of continuous time", "", "yes", uniform.outcome(foreseen)),
            ("exact, ML estimate", "", "no", uniform.outcome(uniform.estimated(gains))),
            ("the ML estimate itself", "", "no", control.ControlOutcome(estimate, 0.0, estimate)),
            ("continuous, running mean", "", "no", pulled(uniform, certain)),
            ("gain of long horizons", "", "no", pulled(uniform, lasting)),
            ("EMA, no control", f"β = {beta:.2g}", "—", pulled(ema, 0.0)),
            ("EMA, exact optimum", "", "yes", ema.solve()[1]),
            ("EMA, gain of long horizons", "", "no", pulled(ema, lasting)),
            ("EMA, min(1, c/√v)", f"c = {c:.1g}", "no", pulled(ema, clipped(c))),
        ]
        title = f"T = {steps}, ρ = {rho:g}, from a distance of {start:g}"
        columns = ["", "chosen", "knows μ*", "error", "Σ E u²", "cost", "/ best"]
        return Rows(title, columns, [[*names, *x, x.cost / best.cost] for *names, x in chain])


def _least(cost: Any, low: float, high: float) -> float:
    """The minimiser of a cost between two positive numbers: the best of a grid, then Brent."""
    grid = np.linspace(math.log(low), math.log(high), 25)
    at = int(np.argmin([cost(math.exp(x)) for x in grid]))
    ends = grid[max(at - 1, 0)], grid[min(at + 1, 24)]
    found = minimize_scalar(lambda x: cost(math.exp(x)), bounds=ends, method="bounded")
    return math.exp(found.x)


class FrontierCommand(FrontierOptions, TheoryCommand):
    """`paceline theory frontier`."""

    def find(self) -> Finding:
        every = frontier.EVERY
        if any(steps % every or steps < every for steps in self.steps):
            raise ValueError(f"steps must be multiples of {every}, got {self.steps}")
        in_range("drift", self.drift, "[0, inf)")
        spectrum = _power_law(self.coordinates)
        problems = {
            "one curvature": (np.ones(1), np.ones(1)),
            "power law": (spectrum, np.ones(self.coordinates)),
            "power law, noise ∝ curvature": (spectrum, spectrum),
            "power law, noise ∝ 1/curvature": (spectrum, 1 / spectrum),
        }
        in_the_limit = frontier.IN_THE_LIMIT, frontier.best_in_the_limit
        limits, drifts, horizons = [], [], []
        for name, (curvature, noise) in problems.items():
            for life in self.half_lives:
                losses = _losses(*in_the_limit, Quadratic(curvature, noise), life)
                limits.append([name, life, *losses])
            for q in self.drift:
                moving = Quadratic(curvature, noise, drift=q / curvature)
                losses = _losses(*in_the_limit, moving)
                drifts.append([name, q, *losses, frontier.floor(moving) / losses[0]])
            far = Quadratic(curvature, noise, start=self.start)
            for steps in self.steps:
                losses = _losses(frontier.AT_A_HORIZON, frontier.best_at_a_horizon, far, steps)
                horizons.append([name, steps, *losses, frontier.floor(far, steps) / losses[0]])
        loss, methods = "EMA's loss", list(frontier.IN_THE_LIMIT)
        tables = [
            Rows("In the limit, by half-life", ["problem", "half-life", loss, *methods], limits),
            Rows("In the limit, by drift", ["problem", "drift", loss, *methods, "floor"], drifts),
            Rows(
                f"After T steps from a distance of {self.start:g}",
                ["problem", "T", loss, *frontier.AT_A_HORIZON, "floor"],
                horizons,
            ),
        ]
        notes = [
            "Losses are divided by the EMA's; smaller is better. Adam's second moment is held at "
            "the noise's variance.",
            "floor: the loss of the best linear estimator on the same gradients.",
        ]
        return Finding(tables, notes, _dots(tables, list(problems)))


def _losses(
    methods: dict[str, frontier.TunedMethod], best: Any, problem: Quadratic, *limits: float
) -> list[float]:
    """The EMA's least loss, and the least losses of all methods divided by it."""
    found = [x.loss for x in frontier.best_of_each(methods, best, problem, *limits).values()]
    ema = found[list(methods).index("EMA")]
    return [ema, *(loss / ema if math.isfinite(ema) else math.nan for loss in found)]


def _dots(tables: Sequence[Rows], problems: Sequence[str]) -> Figure:
    figure, axes = _subplots(len(problems), len(tables))
    for line, table in zip(axes, tables, strict=True):
        for axis, problem in zip(line, problems, strict=True):
            rows = [row for row in table.rows if row[0] == problem]
            names, at = table.columns[3:], np.arange(len(table.columns) - 3)
            found = [x for row in rows for x in row[3:] if math.isfinite(x)]
            for i, row in enumerate(rows):
                places = at + (i - (len(rows) - 1) / 2) * 0.8 / len(rows)
                label = f"{table.columns[1]} {row[1]:g}"
                axis.plot(row[3:], places, "os^D"[i % 4], ms=3, label=label)
                for x, place in zip(row[3:], places, strict=True):
                    if math.isfinite(x):
                        axis.text(x, place, f"   {x:.3f}", size=6, va="center")
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


class TwinCommand(TwinOptions, TheoryCommand):
    """`paceline theory twin`."""

    def find(self) -> Finding:
        beta, rows = self.beta, []
        for a, gain in product(self.a, self.gain):
            ratios = [twin_ratio(a, beta, gain, simple=x) for x in (False, True)]
            lives = [half_life(x) for x in twin_modes(a, beta, gain)]
            r = twin_rate(beta, gain)
            drift = limiting_error(a, beta, gain, 0, 1) / limiting_error(a * r, beta, 0, 0, 1)
            rows.append([a, gain, r, *ratios, drift, *lives])
        columns = ["a", "gain", "r", "noise / twin's", "at β/(β+λ)", "drift / twin's", "half-life"]
        title = f"One coordinate, β = {beta:g}: error by noise alone, by drift alone"
        tables = [Rows(title, [*columns, "twin's"], rows), self._spectra(), self._adam()]
        notes = [
            "Pull and twin differ in fast motions alone. On one coordinate the pull's error is "
            "never below its twin's with noise alone, and never above with drift alone.",
            "Without decay and clip, PACE's twin is AdamW with ε + (1-β)·η·c for its ε. Clipped "
            "coordinates move as at the learning rate η·β_t.",
        ]
        return Finding(tables, notes, self._figure())

    def _figure(self) -> Figure:
        beta = self.beta
        figure, ((left, right),) = _subplots(2)
        grid = np.meshgrid(np.geomspace(1e-3, 1, 120), np.geomspace(1e-3, 1, 120))
        above = 100 * (twin_ratio(grid[0], beta, grid[1]) - 1)
        shown = left.pcolormesh(*grid, above, norm=LogNorm(1e-3), rasterized=True)
        left.set(xscale="log", yscale="log", xlabel="a", ylabel="gain λ")
        left.set_title(f"error above the twin's, %, β = {beta:g}", fontsize=9)
        figure.colorbar(shown, ax=left)
        middle = self.gain[len(self.gain) // 2]
        pull, twin = Pull(1.0, beta, middle), Pull(float(twin_rate(beta, middle)), beta)
        for i, a in enumerate(self.a):
            for method, style, label in ((pull, "-", f"a = {a:g}"), (twin, "--", None)):
                states = islice(moments(method, Quadratic([a], noise=0.0)), 2000)
                shares = np.maximum([x.mean[-1, 0] for x in states], 1e-9)
                right.plot(np.arange(2000), shares, f"C{i}{style}", label=label)
        right.set(xscale="symlog", yscale="log", ylim=(1e-4, 2), xlabel="step")
        right.set_ylabel("share of the start in the returned model")
        right.set_title(f"λ = {middle:g}; dashed: the twin", fontsize=9)
        right.legend(fontsize=8)
        return figure

    def _spectra(self) -> Rows:
        rng, n = np.random.default_rng(self.seed), 16
        spectrum, gains, rows = _power_law(n), np.geomspace(0.02, 1, n), []
        directions, _ = np.linalg.qr(rng.standard_normal((n, n)))
        factor = rng.standard_normal((n, n))
        noise = factor @ factor.T / n + 0.1 * np.eye(n)
        general = Quadratic((directions * spectrum) @ directions.T, noise)
        problems = {"diagonal": Quadratic(spectrum, spectrum), "general": general}
        for name, momentum, lr in product(problems, (0.0, 0.9), (0.05, 0.5)):
            problem = problems[name]
            pull = Pull(lr, self.beta, gains, momentum)
            twin = Pull(lr * twin_rate(self.beta, gains), self.beta, 0.0, momentum)
            errors = [limit(x, problem).second(problem) for x in (pull, twin)]
            ratio = errors[0] / errors[1]
            ratio = np.diag(ratio) if problem.general else ratio
            rows.append([name, momentum, lr, ratio.min(), ratio.max()])
        title = f"16 coordinates, β = {self.beta:g}, gains 0.02 to 1: error / twin's"
        return Rows(title, ["curvature and noise", "momentum", "a <=", "least", "largest"], rows)

    def _adam(self) -> Rows:
        spectrum, lr, rule, rows = _power_law(16), 0.01, PowerEMA(0.5), []
        problem = Quadratic(spectrum, noise=spectrum)

        def loss(**options: Any) -> tuple[float, float]:
            def make(parameters: list[Any]) -> PACE:
                return PACE(parameters, lr=lr, weight_decay=0.0, averaging=rule, **options)

            found = simulate(make, problem, self.steps, self.runs, self.seed).returned
            spread = math.sqrt(((spectrum * found.error / 2) ** 2).sum())
            return float(problem.loss(found.mean)), 1.96 * spread

        adamw = loss(pullback=0.0)
        weights = np.array([rule.weight(t) for t in range(1, self.steps + 1)])[:, None]
        for share in (0.03, 0.1, 0.3, 1.0):
            clipped = float(np.mean(share * weights >= np.sqrt(spectrum)))
            pace = loss(pullback=share / lr)
            twin = loss(pullback=0.0, eps=float(twin_epsilon(lr, share / lr, 1e-4)))
            written = [f"{x:.3g} ± {y:.1g}" for x, y in (pace, twin, adamw)]
            rows.append([share, f"{clipped:.0%}", *written, pace[0] / twin[0]])
        columns = ["η·c / largest √v", "clipped", "PACE", "ε = η·c", "ε = 1e-8", "PACE / ε = η·c"]
        title = f"PACE and AdamW + EMA, κ = 0.5, after {self.steps} steps: excess loss, 95 %"
        return Rows(title, columns, rows)


def _largest_of_linear(rng: np.random.Generator) -> tuple[Any, float, Any]:
    """A random f(x) = max_i aᵢ·x with Σ aᵢ = 0, which is least at 0; its G, and a start."""
    a = rng.standard_normal((rng.integers(2, 8), rng.integers(1, 7)))
    a -= a.mean(0)

    def problem(x: Any) -> tuple[float, Any]:
        values = a @ x
        return values.max(), a[values.argmax()]

    return problem, np.linalg.norm(a, axis=1).max(), rng.standard_normal(a.shape[1])


def _distance(x: Any) -> tuple[float, Any]:
    """f(x) = |x|, and a subgradient."""
    return float(abs(x[0])), np.where(x >= 0, 1.0, -1.0)


class RateCommand(RateOptions, TheoryCommand):
    """`paceline theory rate`."""

    def find(self) -> Finding:
        figure, ((left, right),) = _subplots(2)
        notes = [
            "The paper promises a slope of -1/2 or steeper, up to a factor of the averaging rule.",
            "The bound is D²/(2rηT) + C·ηG²/2 for the mean loss of the live weights. Its terms are "
            "reached on |x|, by swinging across the minimum and by travelling to it.",
        ]
        return Finding([self._slopes(left), self._bound(right)], notes, figure)

    def _slopes(self, axis: Any) -> Rows:
        rules = {
            "mean of all": Uniform(),
            "EMA, κ = 0.8": PowerEMA(0.8),
            "EMA, κ = 0.5": PowerEMA(0.5),
            "EMA, β = 0.05": EMA(beta=0.05),
        }
        methods = [StylisedPACE(rule, c) for rule in rules.values() for c in (0.0, self.pullback)]
        found = [
            convex_errors(methods, steps, runs=self.runs, seed=self.seed + i)
            for i, steps in enumerate(self.horizons)
        ]
        rows, roots = [], np.sqrt(self.horizons)
        for i, errors in enumerate(zip(*found, strict=True)):
            rule, pulled = divmod(i, 2)
            name = list(rules)[rule] + (f", c = {self.pullback:g}" if pulled else "")
            trend = slope(self.horizons, errors)
            means = np.array([float(e.mean) for e in errors])
            rows.append([name, f"{trend.mean:.3f} ± {1.96 * trend.error:.2g}", *means * roots])
            style, fill = ("o--", "white") if pulled else ("o-", None)
            axis.plot(self.horizons, means, f"C{rule}{style}", mfc=fill, label=name)
        axis.plot(self.horizons, rows[0][2] / roots, color="grey", ls=":", label="slope -1/2")
        axis.set(xscale="log", yscale="log", xlabel="horizon T")
        axis.set_ylabel("excess loss of the returned model")
        axis.legend(fontsize=7, handlelength=4)
        columns = ["loss·√T at T =", "slope, 95 %", *map(str, self.horizons)]
        return Rows("Excess loss on Σ 2^-i·|xᵢ - 1/i|", columns, rows)

    def _bound(self, axis: Any) -> Rows:
        lr, rng, rows = 1.0, np.random.default_rng(self.seed), []
        points = []  # gain, steps, measured / bound
        for _ in range(self.problems):
            problem, steepest, start = _largest_of_linear(rng)
            start = start * 10 ** rng.uniform(-1, 2)
            beta, gain = 10 ** rng.uniform(-2, 0), float(rng.choice(GAINS))
            steps = int(10 ** rng.uniform(0, 3))
            bound = rate_bound(np.linalg.norm(start), lr, steps, beta, gain, steepest)
            loss = mean_loss(problem, start, lr, steps, beta, gain)
            points.append((gain, steps, loss / float(bound)))
        axis.plot(*np.array(points).T[1:], ".", color="grey", ms=3, label="random problems")
        for i, gain in enumerate(GAINS):
            reached = []
            for steps in self.horizons:
                starts = hardest_starts(lr, steps, BETA, gain)
                found = [mean_loss(_distance, [x], lr, steps, BETA, gain) for x in starts]
                reached.append(found / rate_bound(starts, lr, steps, BETA, gain))
            for style, ratios in zip(("-", "--"), np.transpose(reached), strict=True):
                label = f"λ = {gain:g}" if style == "-" else None
                axis.plot(self.horizons, ratios, f"C{i}{style}", label=label)
            worst = max((x for x in points if x[0] == gain), key=lambda x: x[2], default=[math.nan])
            r, factor = twin_rate(BETA, gain), step_factor(BETA, gain)
            rows.append([gain, 1 / r, factor, np.sqrt(factor / r), *reached[-1], worst[-1]])
        axis.axhline(1, color="black", lw=0.8)
        axis.set(xscale="log", xlabel="horizon T", ylabel="mean loss / bound")
        axis.set_title(f"|x| at β = {BETA:g}: swinging, dashed: travelling", fontsize=9)
        axis.legend(fontsize=7)
        columns = ["gain", "1/r", "C", "√(C/r)", "swinging", "travelling", "random, largest"]
        return Rows(f"Mean loss / bound; β = {BETA:g}, T = {self.horizons[-1]}", columns, rows)


class BatchCommand(BatchOptions, TheoryCommand):
    """`paceline theory batch`."""

    def find(self) -> Finding:
        if not self.batches or list(self.batches) != sorted(set(self.batches)):
            raise ValueError(f"batches must be at least one, ascending, got {self.batches}")
        spectrum = batch.power_law(self.coordinates)
        start = float(spectrum.loss(np.ones(spectrum.problem.size)))
        found = batch.best_of_each(batch.METHODS, spectrum, self.batches, self.target, self.horizon)
        steps = {name: np.array([x.value for x in each.steps]) for name, each in found.items()}
        losses = {
            name: np.array([x.value for x in each.loss]) / start for name, each in found.items()
        }
        rates = {
            name: [float(batch.learning_rate(x.parameters)) for x in each.steps]
            for name, each in found.items()
        }
        goal = f"steps to {self.target:.0%} of the start's loss"
        least = f"loss after {self.horizon} steps / the start's"
        saved = {
            name: steps[name] / steps[method.base]
            for name, method in batch.METHODS.items()
            if name != method.base
        }
        figure, (axes,) = _subplots(3)
        drawn = (
            (steps, goal),
            (saved, "steps / those without an average"),
            (losses, least),
        )
        for axis, (values, label) in zip(axes, drawn, strict=True):
            for name, value in values.items():
                look = LOOKS[name.removesuffix(", momentum")]
                if batch.METHODS[name].base == batch.HEAVY:
                    look = look | {"ls": "--", "mfc": "white"}
                axis.plot(self.batches, value, label=name if axis is axes[0] else None, **look)
            axis.set(xlabel="batch", ylabel=label, yscale="log")
            axis.set_xscale("log", base=2)
        few = np.array(self.batches[:5])
        perfect = steps[batch.SGD][0] * few[0] / few
        axes[0].plot(few, perfect, color="grey", ls=":", label="1 / batch")
        axes[1].axhline(1, color="grey", ls=":")
        axes[1].set_yscale("linear")
        figure.set_figwidth(16)
        figure.legend(loc="outside right center", fontsize=8)
        names, batches = list(found), self.batches
        tables = [
            Rows(
                title[0].upper() + title[1:],
                ["batch", *names],
                [[b, *row] for b, row in zip(batches, zip(*x.values(), strict=True), strict=True)],
            )
            for title, x in (
                (goal, steps),
                (least, losses),
                ("its learning rate, for steps", rates),
            )
        ]
        tables += [self._regimes(steps), self._parameters(found)]
        return Finding(tables, self._notes(found), figure)

    def _regimes(self, steps: dict[str, Any]) -> Rows:
        rows = []
        for name, method in batch.METHODS.items():
            mine, base = steps[name], steps[method.base]
            pays = batch.pays_up_to(self.batches, mine, base)
            ends = [batch.perfect_up_to(self.batches, mine), batch.useful_up_to(self.batches, mine)]
            rows.append([name, self.batches[0] * mine[0], *ends, mine[-1], pays])
        columns = ["", "examples", "perfect up to", "useful up to", "fewest steps", "pays up to"]
        return Rows("Examples at the smallest batch, and batches of the regimes", columns, rows)

    def _parameters(self, found: dict[str, batch.Found]) -> Rows:
        rows, shown = [], sorted({0, len(self.batches) // 2, len(self.batches) - 1})
        names = ["momentum", "mu", "kappa", "gain", "fall", "warmup"]
        for (name, each), i in product(found.items(), shown):
            x = each.steps[i].parameters
            rows.append([name, self.batches[i], *(x.get(key, math.nan) for key in names)])
        return Rows("Its other parameters, for steps", ["", "batch", *names], rows)

    def _notes(self, found: dict[str, batch.Found]) -> list[str]:
        edges: dict[str, list[str]] = {}
        for name, each in found.items():
            for what, bests in zip(("steps", "loss"), each, strict=True):
                for b, best in zip(self.batches, bests, strict=True):
                    for edge in best.edges:
                        edges.setdefault(f"{name}: {edge}, for {what}", []).append(f"{b:g}")
        at_edges = [f"{which} at {', '.join(at)}" for which, at in edges.items()]
        return [
            "Perfect: examples within 20 % of the smallest batch's. Useful: larger batches save "
            "less than 20 % of the steps. Pays: saves at least 5 % of the steps without average.",
            "`gain 1` and `its schedule` move the average by the same rate, and differ in where "
            "the gradient is taken: one undamped step ahead, and at the weights.",
            "At an edge of its grid: " + ("; ".join(at_edges) or "none") + ".",
        ]


def _mean_and_half(values: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean over the last axis, and half of Student's 95 % interval; NaN where there is none."""
    ends = [interval(row.tolist()) or (math.nan, math.nan) for row in values]
    low, high = np.array(ends).T
    return (low + high) / 2, (high - low) / 2


class RiverCommand(RiverOptions, TheoryCommand):
    """`paceline theory river`."""

    def find(self) -> Finding:
        if not self.rates or list(self.rates) != sorted(set(self.rates)):
            raise ValueError(f"rates must be at least one, ascending, got {self.rates}")
        if not self.noise:
            raise ValueError("noise must be one number or more, got none")
        figure, axes = _subplots(2, 1 + (len(self.noise) + 1) // 2)
        losses, best, against = axes[1:].ravel(), [], []
        for noise, axis in zip(self.noise, losses, strict=False):
            valley = river.River(self.slope, self.hills, self.bend, noise=noise)
            fixed = (valley, self.rates, self.steps, self.runs, self.seed)
            journeys = {name: river.travel(x, *fixed) for name, x in river.METHODS.items()}
            places = {"constant": journeys["EMA"].live}
            for name, journey in journeys.items():
                places[name] = journey.live if name == "decay" else journey.returned
            found = {name: _mean_and_half(valley.loss(x)) for name, x in places.items()}
            best += self._best(valley, journeys, places, found)
            still = {x: river.travel(river.METHODS[x], *fixed, momentum=0.0) for x in river.PAIR}
            against += self._against(valley, journeys, still)
            self._draw_losses(axis, found, labelled=axis is losses[0])
            axis.set_title(f"noise {noise:g}; shaded: pull below EMA", fontsize=9)
        for axis in losses[len(self.noise) :]:
            axis.remove()
        self._draw_map(axes[0, 0], valley, journeys, int(np.nanargmin(found["pull"][0])))
        self._draw_heights(axes[0, 1], valley, journeys)
        figure.set_figwidth(12)
        figure.legend(loc="outside right center", fontsize=8)
        columns = ["noise", "", "best rate", "edge", "loss, 95 %"]
        columns += ["less the pull's", "along", "above", "live above"]
        pair = ["noise", "rate", "momentum 0.9, 95 %", "no momentum, 95 %"]
        tables = [
            Rows("Each at its best rate, returned model", columns, best),
            Rows("Loss of the pull less the power schedule's, paired", pair, against),
        ]
        notes = [
            "Shaded: rates at which the pull's returned model has a lower loss than the EMA's.",
            "The pull and the power schedule move the average by the same rate. They differ in "
            "where the gradient is taken: one undamped step ahead of it, and at the weights.",
        ]
        return Finding(tables, notes, figure)

    def _best(
        self,
        valley: river.River,
        journeys: dict[str, river.Journey],
        places: dict[str, Any],
        found: dict[str, Any],
    ) -> list[list[Any]]:
        at = {name: int(np.nanargmin(mean)) for name, (mean, _) in found.items()}
        own = {name: valley.loss(places[name][i]) for name, i in at.items()}
        rows = []
        for name, i in at.items():
            edge = {0: "bottom", len(self.rates) - 1: "top"}.get(i, "")
            live = journeys.get(name, journeys["EMA"]).live[i]
            numbers = (places[name][i, :, 0], *map(valley.height, (places[name][i], live)))
            gaps = [_mean_and_half(x[None]) for x in (own[name], own[name] - own["pull"])]
            written = [f"{mean[0]:.4f} ± {half[0]:.4f}" for mean, half in gaps]
            written[1] = "" if name == "pull" else written[1]
            rows.append([valley.noise, name, self.rates[i], edge, *written])
            rows[-1] += [float(x.mean()) for x in numbers]
        return rows

    def _against(self, valley: river.River, *groups: dict[str, river.Journey]) -> list[list[Any]]:
        """The pull less the power schedule at each rate, a column for each group."""
        cells = []
        for journeys in groups:
            pull, power = (valley.loss(journeys[name].returned) for name in river.PAIR)
            mean, half = _mean_and_half(pull - power)
            cells.append([f"{x:.4f} ± {y:.4f}" for x, y in zip(mean, half, strict=True)])
        return [[valley.noise, *row] for row in zip(self.rates, *cells, strict=True)]

    def _draw_losses(self, axis: Any, found: dict[str, Any], *, labelled: bool) -> None:
        """The returned models' losses against the rate; shaded where the pull is below the EMA."""
        for name, (mean, half) in found.items():
            label = name if labelled else None
            axis.errorbar(self.rates, mean, half, label=label, **LOOKS[name])
        below = found["pull"][0] < found["EMA"][0]
        for rate, shaded in zip(self.rates, below, strict=True):
            if shaded:
                axis.axvspan(
                    rate / 2**0.5, rate * 2**0.5, color=LOOKS["pull"]["color"], alpha=0.12, lw=0
                )
        lowest = min(np.nanmin(mean) for mean, _ in found.values())
        axis.set(xlabel="learning rate", ylabel="loss", ylim=(1.3 * lowest, 0.5 * abs(lowest)))
        axis.set_xscale("log", base=2)

    def _draw_map(
        self, axis: Any, valley: river.River, journeys: dict[str, river.Journey], i: int
    ) -> None:
        """One run of some methods at one rate, on the valley: that of the pull's median way."""
        ways = journeys["pull"].returned[i, : river.FOLLOWED, 0]
        run = int(ways.argsort()[len(ways) // 2])
        paths = {"constant": journeys["EMA"].path[:, i, run]}
        paths["pull"] = journeys["pull"].path[:, i, run]
        ends = {name: x.returned[i, run] for name, x in journeys.items()}
        places = torch.cat([*paths.values(), torch.stack([*ends.values()])])
        low, high = places[:, 0].min().item(), places[:, 0].max().item()
        x = torch.linspace(low - 0.3, high + 0.3, 400, dtype=torch.float64)
        bottom = valley.floor(x[:, None])[0][:, 0]
        sides = places[:, 1].abs().max().item()
        y = torch.linspace(-1.1 * sides, 1.1 * sides, 200, dtype=torch.float64)
        height = valley.hills[0] / 2 * (y[:, None] - bottom) ** 2
        axis.pcolormesh(
            x.numpy(), y.numpy(), height.sqrt().numpy(), cmap="Greys", alpha=0.5, rasterized=True
        )
        axis.plot(x, bottom, color="#56B4E9", lw=2, label="the river")
        for name, path in paths.items():
            look = {"color": LOOKS[name]["color"], "lw": 0.5, "alpha": 0.8, "rasterized": True}
            axis.plot(path[:, 0], path[:, 1], **look)
        for name, end in ends.items():
            axis.plot(end[0], end[1], **(LOOKS[name] | {"mec": "white", "ls": ""}))
        axis.set(xlabel="along the river", ylabel="across it")
        axis.set_title(
            f"one run at {self.rates[i]:g}: live weights, and the returned models", fontsize=9
        )

    def _draw_heights(
        self, axis: Any, valley: river.River, journeys: dict[str, river.Journey]
    ) -> None:
        """Along against above, a point for each rate: returned filled, live hollow."""
        for name, each in journeys.items():
            for places, look in ((each.returned, {}), (each.live, {"mfc": "white", "ls": ":"})):
                x, above = places[..., 0].mean(1), valley.height(places).mean(1)
                axis.plot(x, above, **(LOOKS[name] | look))
        axis.set(xlabel="along the river", ylabel="height above it", yscale="log")
        axis.set_title("a point for each rate: returned, and hollow: live", fontsize=9)
