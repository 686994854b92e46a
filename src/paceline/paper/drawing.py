"""How the paper's figures are drawn: each as a plot, its numbers, and a table of the ends."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from ..study.cells import Task
from ..study.statistics import DIFFERENCE, EDGE, Listing, paired
from ..train.methods import Method
from ..train.page import COLOURS
from .plans import FALLING, NAMES, ONE_GAIN, SCHEDULES, TUNING, Grid, ScaleRuns, shortened

LOSS = "validation loss, nats a token"
# Every method has the same colour, dash and width in all figures. Dashes and widths tell methods
# apart in print, and for colour-blind people.
LOOKS = {
    "AdamW": (COLOURS[6], "--", 1.3),
    "EMA": (COLOURS[1], "-", 1.3),
    "an average at a constant rate": (COLOURS[5], ":", 1.5),
    FALLING: (COLOURS[3], "-.", 1.5),
    f"{FALLING}, slower average": (COLOURS[3], ":", 1.5),
    "Schedule-Free": (COLOURS[2], (0, (5, 1, 1, 1, 1, 1)), 1.5),
    "PACE": (COLOURS[0], "-", 2.2),
    "PACE, constant": (COLOURS[0], "-", 2.2),
    "PACE, constant, slower average": (COLOURS[0], (0, (6, 2)), 2.0),
    ONE_GAIN: (COLOURS[4], "-", 1.6),
    f"{ONE_GAIN}, slower average": (COLOURS[4], (0, (3, 1, 1, 1)), 1.6),
    "PACE's own twin": (COLOURS[5], (0, (1, 1)), 1.8),
}
MARKERS = "os^Dv"
DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
COLUMNS = [
    *("setting", "label", "name", "schedule", "gain", "lr", "pullback", "kappa", "every"),
    *("return_kappa", "twin_gain", "seed", "step", "tokens"),
    *("live_loss", "returned_loss", "selection_loss", "gain_mean", "clipped"),
]
CURVES = ("AdamW", "EMA", FALLING, "Schedule-Free", "PACE, constant", ONE_GAIN)  # of 5 and 7


class Drawn(NamedTuple):
    """A figure."""

    figure: Figure
    table: pd.DataFrame  # the numbers that are drawn
    ends: Listing  # losses of the methods at the end


# ---- parts --------------------------------------------------------------------------------------


def _finished(
    figure: Figure,
    parts: Iterable[pd.DataFrame],
    ends: Listing,
    zoom: float | None = None,
    columns: Sequence[str] = COLUMNS,
) -> Drawn:
    """A figure with its legend, zoomed to the end after a share of the steps, and its numbers."""
    if zoom is not None:
        _zoom_to_end(figure, zoom)
    found: dict[str, Any] = {}
    for axis in figure.axes:
        handles, labels = axis.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    columns_that_fit = max(1, min(4, int(figure.get_size_inches()[0] / 3)))
    place: Any = {"loc": "outside lower center", "ncols": columns_that_fit}
    figure.legend(found.values(), found.keys(), frameon=False, fontsize=8, **place)
    table = pd.concat(parts)[list(columns)].drop_duplicates().dropna(axis="columns", how="all")
    return Drawn(figure, table.reset_index(drop=True), ends)


def _panels(rows: int, columns: int, width: float = 3.6, height: float = 3.0) -> tuple[Figure, Any]:
    size = (width * columns + 0.4, height * rows + 0.9)
    figure = Figure(figsize=size, layout="constrained", dpi=150)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _dress(axis: Axes, x: str, y: str = LOSS, title: str = "") -> None:
    """Set a panel's title, grid and labels; inner panels get no labels."""
    place = axis.get_subplotspec()
    assert place is not None
    axis.set_xlabel(x if place.is_last_row() else "")
    axis.set_ylabel(y if place.is_first_col() else "")
    axis.set_title(title, fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
    if axis.get_xscale() == "log":
        axis.xaxis.set_minor_formatter(NullFormatter())


def _look(index: int) -> dict[str, Any]:
    """Colour, dash and marker of the line with this number."""
    index %= 5
    return {"color": COLOURS[index], "ls": DASHES[index], "marker": MARKERS[index]}


def _mean_curve(axis: Axes, rows: pd.DataFrame, label: str, look: Any) -> None:
    """The mean returned loss over seeds against steps, with the range over seeds."""
    colour, dash, width = look
    by_step = rows.groupby("step").returned_loss
    mean = by_step.mean()
    axis.plot(mean.index, mean, color=colour, ls=dash, lw=width, label=label)
    if rows.seed.nunique() > 1:
        axis.fill_between(mean.index, by_step.min(), by_step.max(), color=colour, alpha=0.15, lw=0)


def _method_curves(
    axis: Axes, runs: ScaleRuns, task: Task, methods: dict[str, Method], seeds: Sequence[int]
) -> list[pd.DataFrame]:
    """A curve for each method, in the look of its label; returns their points."""
    parts = [_points(runs, task, method, seeds) for method in methods.values()]
    for label, rows in zip(methods, parts, strict=True):
        _mean_curve(axis, rows, label, LOOKS[label])
    return parts


def _zoom_to_end(figure: Figure, share: float = 0.25) -> None:
    """Set the losses' axes to the range after this share of the steps, without the first fall."""
    for axis in figure.axes:
        lines = [np.asarray(line.get_xydata()) for line in axis.lines]
        lines = [xy for xy in lines if len(xy) > 2]
        if not lines:
            continue
        end = max(xy[:, 0].max() for xy in lines)
        late = np.concatenate([xy[xy[:, 0] >= share * end, 1] for xy in lines])
        late = late[np.isfinite(late)]
        if len(late) and late.max() > late.min():
            margin = 0.06 * (late.max() - late.min())
            axis.set_ylim(late.min() - margin, late.max() + margin)


def _basin(axis: Axes, rows: pd.DataFrame, lines: str = "kappa") -> None:
    """Loss at the end against c, a line for each value of an option; × at the top: diverged."""
    for index, (value, group) in enumerate(rows.groupby(lines, dropna=False)):
        by_c = group.groupby("pullback").returned_loss
        mean, spread = by_c.mean(), by_c.std().fillna(0.0)
        label, look = f"PACE, {_option_label(lines, value)}", _look(index)
        finite = mean[np.isfinite(mean)]
        axis.errorbar(
            finite.index, finite, spread[finite.index], label=label, lw=1.5, ms=4, capsize=2, **look
        )
        for lost in mean.index[~np.isfinite(mean)]:
            axis.plot(lost, 0.97, "x", color=look["color"], transform=axis.get_xaxis_transform())
    axis.set_xscale("log")


def _option_label(option: str, value: Any) -> str:
    if option == "every":
        return "every step" if pd.isna(value) else f"every {value:g} steps"
    return f"κ = {value:g}"


def _level(axis: Axes, rows: pd.DataFrame, label: str, look: Any = None) -> pd.DataFrame:
    """A baseline that does not depend on x, as its mean and range over seeds; returns the rows."""
    losses = rows.returned_loss
    colour, dash = (look or LOOKS[label])[:2]
    if len(losses) and np.isfinite(losses.mean()):
        axis.axhline(losses.mean(), color=colour, ls=dash, lw=1.2, label=label)
        if len(losses) > 1:
            axis.axhspan(losses.min(), losses.max(), color=colour, alpha=0.12, lw=0)
    return rows


# ---- rows ---------------------------------------------------------------------------------------


def _points(runs: ScaleRuns, task: Task, method: Method, seeds: Sequence[int]) -> pd.DataFrame:
    """All evaluations of a method's runs with these seeds."""
    return runs.select(task, runs.points, label=method.label, lr=method.lr, seed=seeds)


def _ends_of(runs: ScaleRuns, task: Task, method: Method, seeds: Sequence[int]) -> pd.DataFrame:
    return runs.select(task, label=method.label, lr=method.lr, seed=seeds)


def _pulled(runs: ScaleRuns, task: Task, **fixed: Any) -> pd.DataFrame:
    """The ends of PACE's own average, of the runs that settings were chosen from."""
    fixed = {"schedule": "constant", "every": None, "seed": TUNING, **fixed}
    return runs.select(task, name="pace", gain=None, return_kappa=None, **fixed)


def _log_of(runs: ScaleRuns, task: Task, rows: pd.DataFrame) -> pd.DataFrame:
    """The log of the trainings that some rows were read out of."""
    return runs.select(task, runs.training, trained_with=list(rows.trained_with))


def _listed(
    runs: ScaleRuns,
    groups: Iterable[tuple[Task, dict[str, Method]]],
    seeds: Any = None,
    to: str = "PACE",
    fixed: Sequence[str] = (),
) -> Listing:
    """The loss of each group's methods at the end, and its difference to the baseline.

    The baseline is the first with a name that starts with `to`. Differences are paired over these
    seeds; None: the headline's. Settings were chosen at the same values of the fixed options.
    """
    rows: list[list[Any]] = []
    for task, methods in groups:
        own = runs.scale.seeds_of(task) if seeds is None else seeds
        losses = {
            label: _ends_of(runs, task, method, own).set_index("seed").returned_loss.to_dict()
            for label, method in methods.items()
        }
        baseline = next(x for label, x in losses.items() if label.startswith(to))
        for label, method in methods.items():
            mean = float(np.mean(list(losses[label].values())))
            ends = [len(losses[label]), mean if math.isfinite(mean) else "diverged"]
            compared = [*ends, *paired(losses[label], baseline)]
            setting = [method.label, f"{method.lr:g}", runs.edge(task, method, *fixed)]
            rows.append([f"{task.name}: {label}", *setting, *compared])
    columns = ["method", "setting", "lr", EDGE, "seeds", "loss"]
    by = "the seed that chose the settings" if seeds == TUNING else "seeds that chose nothing"
    return Listing.of_differences(f"Difference to {to}, with {by}", columns, rows)


# ---- figures ------------------------------------------------------------------------------------

Grids = Sequence[tuple[Task, Grid]]


def _listed_headline(runs: ScaleRuns) -> Listing:
    return _listed(runs, [(task, runs.with_own_twin(task)) for task in runs.scale.models])


def headline(runs: ScaleRuns, *, since: float = 0.0) -> Drawn:
    """1 and 11: each method at its best setting, over seeds, from a share of the steps on."""
    figure, axes = _panels(1, len(runs.scale.models), 4.2, 3.6)
    parts = []
    for axis, task in zip(axes[0], runs.scale.models, strict=True):
        for label, method in runs.with_own_twin(task).items():
            rows = _points(runs, task, method, runs.scale.seeds_of(task))
            rows = rows[rows.step >= since * rows.step.max()]
            _mean_curve(axis, rows, label, LOOKS[label])
            parts.append(rows.assign(setting=f"{task.name}: {label}"))
        _dress(axis, "step", title=task.name)
    return _finished(figure, parts, _listed_headline(runs), max(0.3, since))


def training(runs: ScaleRuns) -> Drawn:
    """7: the training loss of figure 5's methods, a running mean."""
    figure, axes = _panels(1, len(runs.scale.models), 4.2, 3.6)
    parts = []
    for axis, task in zip(axes[0], runs.scale.models, strict=True):
        best = runs.best_of_each(task)
        for label in CURVES:
            rows = _points(runs, task, best[label], runs.scale.seeds_of(task))
            log = _log_of(runs, task, rows)
            mean = log.groupby("step").loss.mean().rolling(5, min_periods=1).mean()
            colour, dash, width = LOOKS[label]
            axis.plot(mean.index, mean, color=colour, ls=dash, lw=width, label=label)
            smooth = pd.DataFrame({"step": mean.index, "training_loss": mean.to_numpy()})
            parts.append(smooth.assign(setting=task.name, label=f"{label}: {best[label].label}"))
        _dress(axis, "step", "training loss, live weights, nats a token", task.name)
    columns = ["setting", "label", "step", "training_loss"]
    return _finished(figure, parts, _listed_headline(runs), 0.25, columns)


def _listed_maps(runs: ScaleRuns, grids: Grids) -> Listing:
    """PACE at its best c and κ against the best of AdamW's averages at each rate, all constant."""

    def best(task: Task, lr: float) -> dict[str, Method]:
        pace = runs.best_pace(task, lr=lr)
        return {
            f"PACE at {lr:g}": pace,
            f"EMA at {lr:g}": runs.best(task, "ema", lr=lr),
            f"AdamW at {lr:g}": runs.best(task, "adamw", lr=lr),
            f"EMA of the same κ at {lr:g}": runs.best(task, "ema", lr=lr, kappa=pace.kappa),
            f"{ONE_GAIN} at {lr:g}": runs.best_one_gain(task, lr=lr),
            f"{FALLING} at {lr:g}": runs.best_falling(task, lr=lr),
        }

    groups = [(task, best(task, lr)) for task, grid in grids for lr in grid.rates]
    return _listed(runs, groups, TUNING, fixed=("lr",))


def maps(runs: ScaleRuns, grids: Grids) -> Drawn:
    """6 and 9: loss against c for each κ; a column for each rate, a row for each model."""
    figure, axes = _panels(len(grids), max(len(grid.rates) for _, grid in grids))
    parts = []
    for line, (task, grid) in zip(axes, grids, strict=True):
        for axis, lr in zip(line, grid.rates, strict=True):
            rows = _pulled(runs, task, lr=lr, pullback=grid.pullbacks, kappa=grid.kappas)
            _basin(axis, rows)
            fixed = {"lr": lr, "schedule": "constant", "seed": TUNING}
            averaged = runs.select(task, name=("ema", "adamw"), **fixed)
            for index, kappa in enumerate(grid.kappas):
                look = (COLOURS[index % 5], (0, (1, 2)))
                _level(axis, averaged[averaged.kappa == kappa], f"EMA, κ = {kappa:g}", look)
            _level(axis, averaged[averaged.name == "adamw"], "AdamW")
            beside = {ONE_GAIN: runs.best_one_gain, FALLING: runs.best_falling}
            for label, best in beside.items():
                ends = _ends_of(runs, task, best(task, lr=lr), TUNING)
                parts.append(_level(axis, ends, label))
            _dress(axis, "c", title=f"{task.name}\nlr {lr:g}")
            parts += [rows, averaged]
    return _finished(figure, parts, _listed_maps(runs, grids))


def rarer(runs: ScaleRuns, kappas: Sequence[float]) -> Drawn:
    """3 and 8: loss against c for each update frequency; a column for each rate."""
    task, grid = runs.scale.main, runs.scale.tuned
    figure, axes = _panels(len(kappas), len(grid.rates))
    parts = []
    for line, kappa in zip(axes, kappas, strict=True):
        for axis, lr in zip(line, grid.rates, strict=True):
            own = {"lr": lr, "kappa": kappa, "schedule": "constant", "seed": TUNING}
            pace = {"name": "pace", "return_kappa": None, "pullback": grid.pullbacks}
            rows = runs.select(task, **pace, **own)
            _basin(axis, rows.assign(every=rows.every.fillna(1)), "every")
            ema = runs.select(task, name="ema", **own)
            parts += [rows, _level(axis, ema, f"EMA, κ = {kappa:g}", LOOKS["EMA"])]
            _dress(axis, "c", title=f"κ = {kappa:g}, lr {lr:g}")

    def best(lr: float) -> dict[str, Method]:
        found = {}
        for every in (None, *runs.scale.every):
            label = f"PACE at {lr:g}, {_option_label('every', every)}"
            found[label] = runs.best_pace(task, lr=lr, every=every)
        return {**found, f"EMA at {lr:g}": runs.best(task, "ema", lr=lr)}

    ends = _listed(runs, [(task, best(lr)) for lr in grid.rates], TUNING, fixed=("lr",))
    return _finished(figure, parts, ends)


def clipping(runs: ScaleRuns, grids: Grids) -> Drawn:
    """4 and 12: the share of clipped coordinates over training for each c; a column for each κ."""
    panels = [(task, grid, lr) for task, grid in grids for lr in grid.rates[1:]]
    figure, axes = _panels(len(panels), max(len(grid.kappas) for _, grid, _ in panels))
    parts = []
    for line, (task, grid, lr) in zip(axes, panels, strict=True):
        for axis, kappa in zip(line, grid.kappas, strict=True):
            for index, c in enumerate(grid.pullbacks):
                rows = _log_of(runs, task, _pulled(runs, task, lr=lr, pullback=c, kappa=kappa))
                if rows.empty:
                    continue
                look = {**_look(index), "marker": None}
                axis.plot(rows.step, rows.clipped, label=f"c = {c:g}", lw=1.4, **look)
                facts = {"label": f"pace pullback={c:g} kappa={kappa:g}", "lr": lr}
                parts.append(rows[["setting", "step", "gain_mean", "clipped"]].assign(**facts))
            axis.set_ylim(-0.02, 1.02)
            _dress(axis, "step", "share clipped", f"{task.name}\nκ = {kappa:g}, lr {lr:g}")
    columns = ["setting", "label", "lr", "step", "gain_mean", "clipped"]
    return _finished(figure, parts, _listed_clipping(runs, grids), columns=columns)


def clipped_at_end(runs: ScaleRuns) -> Drawn:
    """13: the share of clipped coordinates at the end against c for each κ; a column a rate."""
    task, grid = runs.scale.main, runs.scale.tuned
    figure, axes = _panels(1, len(grid.rates))
    parts = []
    for axis, lr in zip(axes[0], grid.rates, strict=True):
        rows = _pulled(runs, task, lr=lr, pullback=grid.pullbacks, kappa=grid.kappas)
        for index, (kappa, group) in enumerate(rows.groupby("kappa")):
            shown = group.sort_values("pullback")
            axis.plot(shown.pullback, shown.clipped, label=f"κ = {kappa:g}", **_look(index))
        axis.set_xscale("log")
        axis.set_ylim(-0.02, 1.02)
        _dress(axis, "c", "share clipped at the end", f"{task.name}\nlr {lr:g}")
        parts.append(rows)
    return _finished(figure, parts, _listed_clipping(runs, [(task, grid)]))


def _listed_clipping(runs: ScaleRuns, grids: Grids) -> Listing:
    order = ["lr", "kappa", "pullback"]
    rows = [
        [task.name, *(f"{getattr(row, key):g}" for key in order), row.gain_mean, row.clipped]
        for task, grid in grids
        for row in _pulled(runs, task, lr=grid.rates, pullback=grid.pullbacks, kappa=grid.kappas)
        .sort_values(order)
        .itertuples()
    ]
    return Listing("At the end", ["model", *order, "mean gain", "share clipped"], rows)


def _draw_budgets(runs: ScaleRuns, task: Task, axis: Axes) -> tuple[list[pd.DataFrame], Listing]:
    """Decays over the last fifth of 50, 75 and 100 % of the steps, beside one constant run.

    The table compares each decay at its end with the constant runs at the same step, interpolated
    linearly.
    """
    seeds = runs.scale.seeds
    constant = {"PACE": runs.best_pace(task), "EMA": runs.best(task, "ema")}
    curves = {label: _points(runs, task, method, seeds) for label, method in constant.items()}
    for label, points in curves.items():
        _mean_curve(axis, points, f"{label}, constant", LOOKS[label])
    parts = [*curves.values()]
    rows: list[list[Any]] = []
    for index, share in enumerate((0.5, 0.75, 1)):
        each = task if share == 1 else shortened(task, share)
        method = runs.best(each, "adamw", "wsd")
        label = f"AdamW, WSD over {share:.0%} of the steps"
        parts.append(_points(runs, each, method, seeds))
        _mean_curve(axis, parts[-1], label, (COLOURS[6], DASHES[index], 1.2))
        ends = _ends_of(runs, each, method, seeds).set_index("seed")
        decayed = ends.returned_loss.to_dict()
        for other, points in curves.items():
            there = {
                seed: float(np.interp(ends.step[seed], run.step, run.returned_loss))
                for seed, run in points.groupby("seed")
                if seed in decayed
            }
            means = [float(np.mean(list(x.values()))) for x in (decayed, there)]
            chosen = {"decay": (each, method), "constant": (task, constant[other])}
            at = [f"{x}: {edge}" for x, y in chosen.items() if (edge := runs.edge(*y))]
            rows.append([label, other, ", ".join(at), *means, len(there), *paired(decayed, there)])
    _dress(axis, "step", title=task.name)
    columns = ["decay", "constant run at the same step", EDGE]
    columns += ["decay's loss", "constant's loss", "seeds"]
    return parts, Listing.of_differences("Decay less constant run", columns, rows)


def schedule_free(runs: ScaleRuns) -> Drawn:
    """5: Schedule-Free, AdamW, EMA and PACE; in the last panel one run against three decays."""
    models = runs.scale.models[:2]
    figure, axes = _panels(1, len(models) + 1, 4.2, 3.6)
    parts = []
    for axis, task in zip(axes[0], models, strict=False):
        best = runs.best_of_each(task)
        shown = {label: best[label] for label in CURVES}
        parts += _method_curves(axis, runs, task, shown, runs.scale.seeds_of(task))
        _dress(axis, "step", title=task.name)
    decays, ends = _draw_budgets(runs, runs.scale.main, axes[0][-1])
    return _finished(figure, [*parts, *decays], ends, 0.4)


def branches(runs: ScaleRuns) -> Drawn:
    """20: one run against three decays, from scratch."""
    figure, axes = _panels(1, 1, 6.0, 4.0)
    parts, ends = _draw_budgets(runs, runs.scale.from_scratch, axes[0][0])
    return _finished(figure, parts, ends, 0.4)


def other_data(runs: ScaleRuns) -> Drawn:
    """10: loss at the end against the rate for each κ, and curves at the middle rate."""
    task, grid = runs.scale.other_data, runs.scale.others
    figure, axes = _panels(1, 2, 4.6, 3.8)
    left, right = axes[0]
    averaged = runs.select(task, schedule="constant", seed=TUNING)
    adamw = averaged[averaged.name == "adamw"].sort_values("lr")
    left.plot(adamw.lr, adamw.returned_loss, "k--", marker="x", label="AdamW")
    parts = [adamw]
    for index, kappa in enumerate(grid.kappas):
        ema = averaged[(averaged.name == "ema") & (averaged.kappa == kappa)].sort_values("lr")
        pulled = _pulled(runs, task, kappa=kappa, pullback=grid.pullbacks)
        best = pulled.loc[pulled.groupby("lr").selection_loss.idxmin()]
        look = {"color": COLOURS[index % 5], "marker": MARKERS[index % 5]}
        left.plot(ema.lr, ema.returned_loss, ":", label=f"EMA, κ = {kappa:g}", **look)
        label = f"PACE at its best c, κ = {kappa:g}"
        left.plot(best.lr, best.returned_loss, "-", label=label, **look)
        parts += [ema, pulled]
    left.set_xscale("log")
    _dress(left, "learning rate", title=task.name)
    rate = grid.rates[len(grid.rates) // 2]
    own: dict[str, Any] = {"return_kappa": None, "every": None, "lr": rate}
    chosen = {label: runs.best(task, name, **own) for label, name in NAMES.items()}
    parts += _method_curves(right, runs, task, chosen, TUNING)
    _dress(right, "step", title=f"lr {rate:g}")
    return _finished(figure, parts, _listed_maps(runs, [(task, grid)]))


def _across_rates(runs: ScaleRuns) -> tuple[dict[float, dict[str, Method]], Listing]:
    """Each method of the main model at its best setting with each learning rate; their ends."""
    task, rates = runs.scale.main, runs.scale.tuned.rates
    best = {lr: runs.best_of_each(task, lr=lr) for lr in rates}
    groups = [(task, methods) for methods in best.values()]
    return best, _listed(runs, groups, runs.scale.seeds, fixed=("lr",))


def across_rates(runs: ScaleRuns) -> Drawn:
    """14: loss at the end against the learning rate, with the range over seeds."""
    task, seeds = runs.scale.main, runs.scale.seeds
    figure, axes = _panels(1, 1, 6.0, 4.2)
    axis = axes[0][0]
    best, ends = _across_rates(runs)
    parts = []
    for label in next(iter(best.values())):
        rows = pd.concat([_ends_of(runs, task, x[label], seeds) for x in best.values()])
        by_rate = rows.groupby("lr").returned_loss
        mean = by_rate.mean()
        colour, dash, width = LOOKS[label]
        look = {"color": colour, "ls": dash, "lw": width, "marker": "o"}
        axis.plot(mean.index, mean, label=label, **look)
        axis.fill_between(mean.index, by_rate.min(), by_rate.max(), color=colour, alpha=0.1, lw=0)
        parts.append(rows)
    axis.set_xscale("log")
    _dress(axis, "learning rate", title=f"{task.name}: each at its best of each rate")
    return _finished(figure, parts, ends)


def curves_across_rates(runs: ScaleRuns) -> Drawn:
    """15: curves, a panel for each learning rate."""
    task = runs.scale.main
    best, ends = _across_rates(runs)
    figure, axes = _panels(1, len(best), 3.6, 3.4)
    parts = []
    for axis, (lr, methods) in zip(axes[0], best.items(), strict=True):
        parts += _method_curves(axis, runs, task, methods, runs.scale.seeds)
        _dress(axis, "step", title=f"{task.name}\nlr {lr:g}")
    return _finished(figure, parts, ends, 0.4)


def by_schedule(runs: ScaleRuns) -> Drawn:
    """16: AdamW and EMA at their best rate with each schedule; PACE at a constant rate."""
    figure, axes = _panels(1, len(runs.scale.models), 3.8, 3.4)
    kinds = [*SCHEDULES, "power", "twin"]
    parts, groups = [], []
    for axis, task in zip(axes[0], runs.scale.models, strict=True):
        methods = {"PACE, constant": runs.best_pace(task)}
        for label, name, marker in (("AdamW", "adamw", "x"), ("EMA", "ema", "o")):
            for place, schedule in enumerate(SCHEDULES if name == "adamw" else kinds):
                best = methods[f"{label}, {schedule}"] = runs.best(task, name, schedule)
                rows = _ends_of(runs, task, best, TUNING)
                colour = LOOKS[label][0]
                axis.plot(place, rows.returned_loss.mean(), marker, color=colour, label=label)
                parts.append(rows)
        methods[ONE_GAIN] = runs.best_one_gain(task)
        for label in ("PACE, constant", ONE_GAIN):
            parts.append(_level(axis, _ends_of(runs, task, methods[label], TUNING), label))
        groups.append((task, methods))
        axis.set_xticks(range(len(kinds)), kinds, rotation=20)
        _dress(axis, "schedule", title=task.name)
    return _finished(figure, parts, _listed(runs, groups, TUNING))


def over_seeds(runs: ScaleRuns) -> Drawn:
    """17: AdamW, EMA and PACE, constant and WSD, over seeds; one gain and its schedules."""
    models, seeds = runs.scale.models, runs.scale.seeds
    figure, axes = _panels(2, len(models), 3.8, 3.0)
    groups = [(task, runs.over_seeds(task)) for task in models]
    parts = []
    for column, (task, methods) in zip(axes.T, groups, strict=True):
        for name, method in methods.items():
            decays = name.endswith(", wsd")
            label = name.removesuffix(", wsd").removesuffix(", constant")
            axis = column[1 if decays else 0]
            parts += _method_curves(axis, runs, task, {label: method}, seeds)
            _dress(axis, "step", title=f"{task.name}, {'wsd' if decays else 'without a decay'}")
    return _finished(figure, parts, _listed(runs, groups, seeds, "PACE, constant"), 0.4)


def pull_alone(runs: ScaleRuns) -> Drawn:
    """2: the pull alone at κ = 0.5: curves, and loss against c, constant and with WSD."""
    task, rate = runs.scale.from_scratch, runs.middle_rate()
    figure, axes = _panels(1, 3, 4.0, 3.4)
    fixed: dict[str, Any] = {"lr": rate, "kappa": 0.5}
    best = runs.constant_and_decaying(task, ("PACE", "EMA"), **fixed)
    shown = {label: best[f"{label}, constant"] for label in ("EMA", "PACE")}
    parts = _method_curves(axes[0][0], runs, task, shown, TUNING)
    _zoom_to_end(figure, 0.4)
    _dress(axes[0][0], "step", title=f"{task.name}, lr {rate:g}, κ = 0.5")
    for axis, schedule in zip(axes[0][1:], ("constant", "wsd"), strict=True):
        cs = runs.scale.scratch.pullbacks
        rows = _pulled(runs, task, schedule=schedule, pullback=cs, **fixed)
        _basin(axis, rows)
        ema = runs.select(task, name="ema", schedule=schedule, seed=TUNING, **fixed)
        adamw = runs.select(task, name="adamw", schedule=schedule, seed=TUNING, lr=rate)
        parts += [rows, _level(axis, ema, "EMA, κ = 0.5", LOOKS["EMA"])]
        parts.append(_level(axis, adamw, "AdamW"))
        _dress(axis, "c", title=schedule)
    ends = _listed(runs, [(task, best)], TUNING, "EMA, constant", ("lr", "kappa"))
    return _finished(figure, parts, ends)


def under_schedules(runs: ScaleRuns, *, by_kappa: bool) -> Drawn:
    """18 and 19: loss against c with each schedule, over seeds or for each κ."""
    task, grid, rate = runs.scale.from_scratch, runs.scale.scratch, runs.middle_rate()
    figure, axes = _panels(1, len(SCHEDULES), 3.8, 3.4)
    seeds = TUNING if by_kappa else runs.scale.seeds
    kappas = grid.kappas if by_kappa else (0.5,)
    parts, groups = [], []
    for axis, schedule in zip(axes[0], SCHEDULES, strict=True):
        fixed = {"lr": rate, "seed": seeds, "schedule": schedule}
        rows = _pulled(runs, task, pullback=grid.pullbacks, kappa=kappas, **fixed)
        _basin(axis, rows)
        ema = runs.select(task, name="ema", **fixed)
        best = runs.best(task, "ema", schedule, lr=rate).kappa
        parts += [rows, _level(axis, runs.select(task, name="adamw", **fixed), "AdamW"), ema]
        _level(axis, ema[ema.kappa == best], "EMA at its best κ", LOOKS["EMA"])
        _dress(axis, "c", title=f"{schedule}, lr {rate:g}")
        for kappa in kappas:
            pace = runs.best_pace(task, schedule, kappa=kappa, lr=rate)
            methods = {f"PACE, κ = {kappa:g}, {schedule}": pace}
            for label in ("EMA", "AdamW"):
                methods[f"{label}, {schedule}"] = runs.best(task, NAMES[label], schedule, lr=rate)
            groups.append((task, methods))
    return _finished(figure, parts, _listed(runs, groups, seeds, fixed=("lr", "kappa")))


def twins(runs: ScaleRuns) -> Drawn:
    """PACE less its own twin: the EMA at the twin's rate for PACE's measured mean gain."""
    found: list[list[Any]] = []
    for task, grid in runs.scale.twinned:
        for lr in grid.rates:
            pace = runs.best_pace(task, lr=lr)
            twin = runs.twin_of(task, pace)
            mine, its = (
                _ends_of(runs, task, x, runs.scale.seeds).set_index("seed").returned_loss
                for x in (pace, twin)
            )
            edge = runs.edge(task, pace, "lr")
            setting = [task.name, f"{lr:g}", pace.label, twin.label, edge]
            ends = [mine.mean(), its.mean(), len(mine)]
            found.append([*setting, *ends, *paired(mine.to_dict(), its.to_dict())])
    columns = ["setting", "lr", "pace", "twin", EDGE, "pace_loss", "twin_loss", "seeds"]
    listed = Listing.of_differences("PACE less its own twin", columns, found)
    numbers = dict.fromkeys(["lr", *DIFFERENCE], float)
    table = pd.DataFrame(listed.rows, columns=listed.columns).astype(numbers)
    figure, axes = _panels(1, 1, 7.0, 4.0)
    axis = axes[0][0]
    for index, (setting, group) in enumerate(table.groupby("setting", sort=False)):
        places = np.log10(group.lr) + 0.03 * (index - 1.5)
        error = np.abs([group.difference - group.low, group.high - group.difference])
        look = {"fmt": MARKERS[index % 5], "color": COLOURS[index % 7], "capsize": 3}
        axis.errorbar(10**places, group.difference, error, label=setting, **look)
    axis.axhline(0, color="black", lw=0.8)
    axis.set_xscale("log")
    _dress(axis, "learning rate", "PACE less its twin, nats a token")
    return _finished(figure, [table], listed, columns=table.columns)
