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
from ..study.statistics import DIFFERENCE, Listing, interval, paired
from ..train.methods import Method
from ..train.page import COLOURS
from .plans import RETURN_KAPPA, SCHEDULES, TUNING, Grid, ScaleRuns, shortened

LOSS = "validation loss, nats a token"
# Every method has the same colour, dash and width in all figures. Dashes and widths tell methods
# apart in print, and for colour-blind people.
LOOKS = {
    "AdamW": (COLOURS[6], "--", 1.3),
    "EMA": (COLOURS[1], "-", 1.3),
    "an average at a constant rate": (COLOURS[5], ":", 1.5),
    "EMA, power or twin schedule": (COLOURS[3], "-.", 1.5),
    "Schedule-Free": (COLOURS[2], (0, (5, 1, 1, 1, 1, 1)), 1.5),
    "PACE": (COLOURS[0], "-", 2.2),
    "PACE, constant": (COLOURS[0], "-", 2.2),
    "PACE, constant, slower average": (COLOURS[4], (0, (6, 2)), 2.0),
    "PACE's own twin": (COLOURS[5], (0, (1, 1)), 1.8),
}
MARKERS = "os^Dv"
DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
COLUMNS = [
    *("setting", "label", "name", "schedule", "lr", "pullback", "kappa", "every", "return_kappa"),
    *("twin_gain", "seed", "step", "tokens"),
    *("live_loss", "returned_loss", "selection_loss", "gain_mean", "clipped"),
]
CURVES = ("AdamW", "EMA", "Schedule-Free", "PACE, constant")  # of figures 5 and 7


class Drawn(NamedTuple):
    """A figure."""

    figure: Figure
    table: pd.DataFrame  # the numbers that are drawn
    ends: Listing  # losses of the methods at the end


# ---- parts --------------------------------------------------------------------------------------


def _finished(
    figure: Figure, table: pd.DataFrame, ends: Listing, zoom: float | None = None
) -> Drawn:
    """A figure with its legend, zoomed to the end after a share of the steps."""
    if zoom is not None:
        _zoom_to_end(figure, zoom)
    _legend(figure)
    return Drawn(figure, table, ends)


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


def _legend(figure: Figure) -> None:
    found: dict[str, Any] = {}
    for axis in figure.axes:
        handles, labels = axis.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    place: Any = {"loc": "outside lower center", "ncols": min(4, max(1, len(found)))}
    figure.legend(found.values(), found.keys(), frameon=False, fontsize=8, **place)


def _look(index: int, *, marked: bool = True) -> dict[str, Any]:
    """Colour, dash and marker of the line with this number."""
    look = {"color": COLOURS[index % 5], "ls": DASHES[index % 5]}
    return {**look, "marker": MARKERS[index % 5]} if marked else look


def _mean_curve(axis: Axes, rows: pd.DataFrame, label: str, look: Any) -> None:
    """The mean returned loss over seeds against steps, with the range over seeds."""
    colour, dash, width = look
    by_step = rows.groupby("step").returned_loss
    mean = by_step.mean()
    axis.plot(mean.index, mean, color=colour, ls=dash, lw=width, label=label)
    if rows.seed.nunique() > 1:
        axis.fill_between(mean.index, by_step.min(), by_step.max(), color=colour, alpha=0.15, lw=0)


def _method_curves(
    axis: Axes, runs: ScaleRuns, task: Task, methods: dict[str, Method], seeds: Any = None
) -> list[pd.DataFrame]:
    """A curve for each method, in the look of its label; returns their points."""
    parts = []
    for label, method in methods.items():
        parts.append(_points(runs, task, method, seeds))
        _mean_curve(axis, parts[-1], label, LOOKS[label])
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


def _basin(axis: Axes, rows: pd.DataFrame, lines: str) -> None:
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
    return f"{ {'kappa': 'κ'}.get(option, option) } = {value:g}"


def _level(axis: Axes, losses: pd.Series, label: str, look: Any) -> None:
    """A baseline that does not depend on x: its mean and range over seeds."""
    if len(losses) and np.isfinite(losses.mean()):
        axis.axhline(losses.mean(), color=look[0], ls=look[1], lw=1.2, label=label)
        if len(losses) > 1:
            axis.axhspan(losses.min(), losses.max(), color=look[0], alpha=0.12, lw=0)


# ---- rows ---------------------------------------------------------------------------------------


def _points(
    runs: ScaleRuns, task: Task, method: Method, seeds: Iterable[int] | None = None
) -> pd.DataFrame:
    """All evaluations of a method's runs, of some seeds or of all."""
    own = {} if seeds is None else {"seed": list(seeds)}
    return runs.select(runs.points, task, label=method.label, lr=method.lr, **own)


def _ends(runs: ScaleRuns, task: Task, **fixed: Any) -> pd.DataFrame:
    """The last rows of a task's runs with such options."""
    return runs.select(runs.ends, task, **fixed)


def _ends_of(runs: ScaleRuns, task: Task, method: Method, seeds: Sequence[int]) -> pd.DataFrame:
    return _ends(runs, task, label=method.label, lr=method.lr, seed=tuple(seeds))


def _pulled(runs: ScaleRuns, task: Task, **fixed: Any) -> pd.DataFrame:
    """The ends of PACE's own average, of the runs that settings were chosen from."""
    fixed = {"schedule": "constant", "every": None, "seed": TUNING, **fixed}
    return _ends(runs, task, name="pace", return_kappa=None, **fixed)


def _log_of(runs: ScaleRuns, task: Task, rows: pd.DataFrame) -> pd.DataFrame:
    """The log of the trainings that some rows were read out of."""
    return runs.select(runs.training, task, trained_with=list(rows.trained_with))


def _csv_table(*parts: pd.DataFrame) -> pd.DataFrame:
    table = pd.concat(parts, ignore_index=True)[COLUMNS].drop_duplicates()
    return table.dropna(axis="columns", how="all").reset_index(drop=True)


def _listed(
    runs: ScaleRuns,
    groups: Iterable[tuple[Task, dict[str, Method]]],
    seeds: Any = None,
    to: str = "",
) -> Listing:
    """Methods at their end: loss, and its difference to that of one of them, paired by seed.

    Args:
        runs: the results.
        groups: methods that are compared with each other, by their names.
        seeds: that are compared. None: the headline's.
        to: the start of the baseline's name. Default: PACE's.
    """
    rows: list[list[Any]] = []
    for task, methods in groups:
        own = runs.scale.seeds_of(task) if seeds is None else seeds
        losses = {
            label: _ends_of(runs, task, method, own).set_index("seed").returned_loss.to_dict()
            for label, method in methods.items()
        }
        baseline = next(x for label, x in losses.items() if label.startswith(to or "PACE"))
        for label, method in methods.items():
            mean = float(np.mean(list(losses[label].values())))
            rows.append(
                [
                    *(f"{task.name}: {label}", method.label, f"{method.lr:g}"),
                    *(len(losses[label]), mean if math.isfinite(mean) else "diverged"),
                    *paired(losses[label], baseline),
                ]
            )
    columns = ["method", "setting", "lr", "seeds", "loss", *DIFFERENCE]
    return Listing(f"Difference to {to or 'PACE'}", columns, rows)


# ---- figures ------------------------------------------------------------------------------------

Grids = Sequence[tuple[Task, Grid]]


def _listed_headline(runs: ScaleRuns) -> Listing:
    return _listed(runs, [(task, runs.with_own_twin(task)) for task in runs.scale.models])


def draw_headline(runs: ScaleRuns, *, since: float = 0.0) -> Drawn:
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
    return _finished(figure, _csv_table(*parts), _listed_headline(runs), max(0.3, since))


def draw_training(runs: ScaleRuns) -> Drawn:
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
    return _finished(
        figure, pd.concat(parts, ignore_index=True)[columns], _listed_headline(runs), 0.25
    )


def _listed_maps(runs: ScaleRuns, grids: Grids) -> Listing:
    """PACE at its best c and κ against the best of AdamW's averages at each rate, all constant."""

    def best(task: Task, lr: float) -> dict[str, Method]:
        pace = runs.best_pace(task, lr=lr)
        return {
            f"PACE at {lr:g}": pace,
            f"EMA at {lr:g}": runs.best(task, "ema", lr=lr),
            f"AdamW at {lr:g}": runs.best(task, "adamw", lr=lr),
            f"EMA of the same κ at {lr:g}": runs.best(task, "ema", lr=lr, kappa=pace.kappa),
        }

    groups = [(task, best(task, lr)) for task, grid in grids for lr in grid.rates]
    return _listed(runs, groups, TUNING)


def draw_maps(runs: ScaleRuns, grids: Grids) -> Drawn:
    """6 and 9: loss against c for each κ; a column for each rate, a row for each model."""
    figure, axes = _panels(len(grids), max(len(grid.rates) for _, grid in grids))
    parts = []
    for line, (task, grid) in zip(axes, grids, strict=True):
        for axis, lr in zip(line, grid.rates, strict=True):
            rows = _pulled(runs, task, lr=lr, pullback=grid.pullbacks, kappa=grid.kappas)
            _basin(axis, rows, "kappa")
            averaged = _ends(runs, task, lr=lr, schedule="constant", seed=TUNING)
            for index, kappa in enumerate(grid.kappas):
                ema = averaged[(averaged.name == "ema") & (averaged.kappa == kappa)]
                look = (COLOURS[index % 5], (0, (1, 2)))
                _level(axis, ema.returned_loss, f"EMA, κ = {kappa:g}", look)
            adamw = averaged[averaged.name == "adamw"]
            _level(axis, adamw.returned_loss, "AdamW", LOOKS["AdamW"])
            _dress(axis, "c", title=f"{task.name}\nlr {lr:g}")
            parts += [rows, averaged[averaged.name.isin(["ema", "adamw"])]]
    return _finished(figure, _csv_table(*parts), _listed_maps(runs, grids))


def draw_rarer(runs: ScaleRuns, kappas: Sequence[float]) -> Drawn:
    """3 and 8: loss against c for each update frequency; a column for each rate."""
    task, grid = runs.scale.main, runs.scale.tuned
    figure, axes = _panels(len(kappas), len(grid.rates))
    parts = []
    for line, kappa in zip(axes, kappas, strict=True):
        for axis, lr in zip(line, grid.rates, strict=True):
            own = {"lr": lr, "kappa": kappa, "schedule": "constant", "seed": TUNING}
            pace = {"name": "pace", "return_kappa": None, "pullback": grid.pullbacks}
            rows = _ends(runs, task, **pace, **own)
            _basin(axis, rows.assign(every=rows.every.fillna(1)), "every")
            ema = _ends(runs, task, name="ema", **own)
            _level(axis, ema.returned_loss, f"EMA, κ = {kappa:g}", LOOKS["EMA"])
            _dress(axis, "c", title=f"κ = {kappa:g}, lr {lr:g}")
            parts += [rows, ema]

    def best(lr: float) -> dict[str, Method]:
        found = {
            f"PACE at {lr:g}, {_option_label('every', every)}": runs.best_pace(
                task, lr=lr, every=every
            )
            for every in (None, *runs.scale.every)
        }
        return {**found, f"EMA at {lr:g}": runs.best(task, "ema", lr=lr)}

    ends = _listed(runs, [(task, best(lr)) for lr in grid.rates], TUNING)
    return _finished(figure, _csv_table(*parts), ends)


def draw_clipping(runs: ScaleRuns, grids: Grids) -> Drawn:
    """4 and 12: the share of clipped coordinates over training for each c; a column for each κ."""
    panels = [(task, grid, lr) for task, grid in grids for lr in grid.rates[1:]]
    figure, axes = _panels(len(panels), max(len(grid.kappas) for _, grid, _ in panels))
    parts = []
    for line, (task, grid, lr) in zip(axes, panels, strict=True):
        for axis, kappa in zip(line, grid.kappas, strict=True):
            for index, c in enumerate(grid.pullbacks):
                rows = _log_of(runs, task, _pulled(runs, task, lr=lr, pullback=c, kappa=kappa))
                look = _look(index, marked=False)
                axis.plot(rows.step, rows.clipped, label=f"c = {c:g}", lw=1.4, **look)
                facts = {"label": f"pace pullback={c:g} kappa={kappa:g}", "lr": lr}
                parts.append(rows[["setting", "step", "gain_mean", "clipped"]].assign(**facts))
            axis.set_ylim(-0.02, 1.02)
            _dress(axis, "step", "share clipped", f"{task.name}\nκ = {kappa:g}, lr {lr:g}")
    columns = ["setting", "label", "lr", "step", "gain_mean", "clipped"]
    table = pd.concat(parts, ignore_index=True)[columns]
    return _finished(figure, table, _listed_clipping(runs, grids))


def draw_clipped_at_end(runs: ScaleRuns) -> Drawn:
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
    return _finished(figure, _csv_table(*parts), _listed_clipping(runs, [(task, grid)]))


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


def _budget_runs(
    runs: ScaleRuns, task: Task
) -> tuple[dict[str, Method], list[tuple[str, Task, Method]]]:
    """The constant runs, and the decays over the last fifth of 50, 75 and 100 % of the steps."""
    constant = {"PACE": runs.best_pace(task), "EMA": runs.best(task, "ema")}
    tasks = {share: shortened(task, share) for share in (0.5, 0.75)} | {1: task}
    return constant, [
        (f"AdamW, WSD over {share:.0%} of the steps", each, runs.best(each, "adamw", "wsd"))
        for share, each in tasks.items()
    ]


def _draw_budgets(runs: ScaleRuns, task: Task, axis: Axes) -> pd.DataFrame:
    """Decays at three budgets beside one constant run."""
    seeds = runs.scale.seeds
    constant, decays = _budget_runs(runs, task)
    parts = []
    for label, method in constant.items():
        parts.append(_points(runs, task, method, seeds))
        _mean_curve(axis, parts[-1], f"{label}, constant", LOOKS[label])
    for index, (label, each, method) in enumerate(decays):
        parts.append(_points(runs, each, method, seeds))
        _mean_curve(axis, parts[-1], label, (COLOURS[6], DASHES[index], 1.2))
    _dress(axis, "step", title=task.name)
    return _csv_table(*parts)


def _listed_budgets(runs: ScaleRuns, task: Task) -> Listing:
    """Each decay at its end against the constant runs at the same step, interpolated linearly."""
    seeds = runs.scale.seeds
    constant, decays = _budget_runs(runs, task)
    rows: list[list[Any]] = []
    for label, each, method in decays:
        ends = _ends_of(runs, each, method, seeds).set_index("seed")
        decayed = ends.returned_loss.to_dict()
        for other, its in constant.items():
            there = {
                seed: float(np.interp(ends.step[seed], run.step, run.returned_loss))
                for seed, run in _points(runs, task, its, seeds).groupby("seed")
                if seed in decayed
            }
            means = [float(np.mean(list(x.values()))) for x in (decayed, there)]
            rows.append([label, other, *means, len(there), *paired(decayed, there)])
    columns = ["decay", "constant run at the same step", "decay's loss", "constant's loss", "seeds"]
    return Listing("Decay less constant run", [*columns, *DIFFERENCE], rows)


def draw_schedule_free(runs: ScaleRuns) -> Drawn:
    """5: Schedule-Free, AdamW, EMA and PACE; in the last panel one run against three decays."""
    models = runs.scale.models[:2]
    figure, axes = _panels(1, len(models) + 1, 4.2, 3.6)
    parts = []
    for axis, task in zip(axes[0], models, strict=False):
        best = runs.best_of_each(task)
        shown = {label: best[label] for label in CURVES}
        parts += _method_curves(axis, runs, task, shown, runs.scale.seeds_of(task))
        _dress(axis, "step", title=task.name)
    parts.append(_draw_budgets(runs, runs.scale.main, axes[0][-1]))
    return _finished(figure, _csv_table(*parts), _listed_budgets(runs, runs.scale.main), 0.4)


def draw_branches(runs: ScaleRuns) -> Drawn:
    """20: one run against three decays, from scratch."""
    figure, axes = _panels(1, 1, 6.0, 4.0)
    table = _draw_budgets(runs, runs.scale.from_scratch, axes[0][0])
    return _finished(figure, table, _listed_budgets(runs, runs.scale.from_scratch), 0.4)


def draw_other_data(runs: ScaleRuns) -> Drawn:
    """10: loss at the end against the rate for each κ, and curves at the middle rate."""
    task, grid = runs.scale.other_data, runs.scale.others
    figure, axes = _panels(1, 2, 4.6, 3.8)
    left, right = axes[0]
    averaged = _ends(runs, task, schedule="constant", seed=TUNING)
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
    methods = {"AdamW": "adamw", "EMA": "ema", "PACE": "pace"}
    chosen = {label: runs.best(task, name, **own) for label, name in methods.items()}
    parts += _method_curves(right, runs, task, chosen)
    _dress(right, "step", title=f"lr {rate:g}")
    return _finished(figure, _csv_table(*parts), _listed_maps(runs, [(task, grid)]))


def _best_at_rate(runs: ScaleRuns, task: Task, lr: float) -> dict[str, Method]:
    """Each method at its best setting with one learning rate."""
    return {
        "AdamW": runs.best(task, "adamw", SCHEDULES, lr=lr),
        "EMA": runs.best(task, "ema", SCHEDULES, lr=lr),
        "EMA, power or twin schedule": runs.best(task, "ema", ["power", "twin"], lr=lr),
        "Schedule-Free": runs.best(task, "schedule-free", lr=lr),
        "PACE, constant": runs.best_pace(task, lr=lr),
        "PACE, constant, slower average": runs.best_pace(task, lr=lr, return_kappa=RETURN_KAPPA),
    }


def _rates(runs: ScaleRuns) -> tuple[float, ...]:
    return (*runs.scale.tuned.rates, runs.scale.high)


def _listed_rates(runs: ScaleRuns) -> Listing:
    task = runs.scale.main
    return _listed(runs, [(task, _best_at_rate(runs, task, lr)) for lr in _rates(runs)], TUNING)


def draw_across_rates(runs: ScaleRuns) -> Drawn:
    """14: loss at the end against the learning rate."""
    task = runs.scale.main
    figure, axes = _panels(1, 1, 6.0, 4.2)
    axis = axes[0][0]
    best = [_best_at_rate(runs, task, lr) for lr in _rates(runs)]
    parts = []
    for label in best[0]:
        rows = pd.concat([_ends_of(runs, task, methods[label], TUNING) for methods in best])
        colour, dash, width = LOOKS[label]
        look = {"color": colour, "ls": dash, "lw": width, "marker": "o"}
        axis.plot(rows.lr, rows.returned_loss, label=label, **look)
        parts.append(rows)
    axis.set_xscale("log")
    _dress(axis, "learning rate", title=f"{task.name}: each at its best of each rate")
    return _finished(figure, _csv_table(*parts), _listed_rates(runs))


def draw_curves_across_rates(runs: ScaleRuns) -> Drawn:
    """15: curves, a panel for each learning rate."""
    task = runs.scale.main
    figure, axes = _panels(1, len(_rates(runs)), 3.6, 3.4)
    parts = []
    for axis, lr in zip(axes[0], _rates(runs), strict=True):
        parts += _method_curves(axis, runs, task, _best_at_rate(runs, task, lr), TUNING)
        _dress(axis, "step", title=f"{task.name}\nlr {lr:g}")
    return _finished(figure, _csv_table(*parts), _listed_rates(runs), 0.4)


def draw_by_schedule(runs: ScaleRuns) -> Drawn:
    """16: AdamW and EMA at their best rate with each schedule; PACE at a constant rate."""
    figure, axes = _panels(1, len(runs.scale.models), 3.8, 3.4)
    kinds = [*SCHEDULES, "power", "twin"]
    parts, groups = [], []
    for axis, task in zip(axes[0], runs.scale.models, strict=True):
        pace = runs.best_pace(task)
        methods = {"PACE, constant": pace}
        for label, name, marker in (("AdamW", "adamw", "x"), ("EMA", "ema", "o")):
            for place, schedule in enumerate(SCHEDULES if name == "adamw" else kinds):
                best = runs.best(task, name, schedule)
                methods[f"{label}, {schedule}"] = best
                rows = _ends_of(runs, task, best, TUNING)
                colour = LOOKS[label][0]
                axis.plot(place, rows.returned_loss.mean(), marker, color=colour, label=label)
                parts.append(rows)
        rows = _ends_of(runs, task, pace, TUNING)
        _level(axis, rows.returned_loss, "PACE, constant", LOOKS["PACE"])
        parts.append(rows)
        groups.append((task, methods))
        axis.set_xticks(range(len(kinds)), kinds, rotation=20)
        _dress(axis, "schedule", title=task.name)
    return _finished(figure, _csv_table(*parts), _listed(runs, groups, TUNING))


def draw_seeds(runs: ScaleRuns) -> Drawn:
    """17: AdamW, EMA and PACE, constant and WSD, over seeds."""
    models, seeds = runs.scale.models, runs.scale.seeds
    figure, axes = _panels(2, len(models), 3.8, 3.0)
    groups = [(task, runs.constant_and_decaying(task)) for task in models]
    parts = []
    for column, (task, methods) in zip(axes.T, groups, strict=True):
        for name, method in methods.items():
            label, _, schedule = name.partition(", ")
            axis = column[0 if schedule == "constant" else 1]
            parts += _method_curves(axis, runs, task, {label: method}, seeds)
            _dress(axis, "step", title=f"{task.name}, {schedule}")
    return _finished(
        figure, _csv_table(*parts), _listed(runs, groups, seeds, "PACE, constant"), 0.4
    )


def draw_pull_alone(runs: ScaleRuns) -> Drawn:
    """2: the pull alone at κ = 0.5: curves, and loss against c, constant and with WSD."""
    task, rate = runs.scale.from_scratch, runs.middle_rate()
    figure, axes = _panels(1, 3, 4.0, 3.4)
    fixed: dict[str, Any] = {"lr": rate, "kappa": 0.5}
    shown = {"EMA": runs.best(task, "ema", **fixed), "PACE": runs.best_pace(task, **fixed)}
    parts = _method_curves(axes[0][0], runs, task, shown, TUNING)
    _zoom_to_end(figure, 0.4)
    _dress(axes[0][0], "step", title=f"{task.name}, lr {rate:g}, κ = 0.5")
    for axis, schedule in zip(axes[0][1:], ("constant", "wsd"), strict=True):
        cs = runs.scale.scratch.pullbacks
        rows = _pulled(runs, task, schedule=schedule, pullback=cs, **fixed)
        _basin(axis, rows, "kappa")
        ema = _ends(runs, task, name="ema", schedule=schedule, seed=TUNING, **fixed)
        _level(axis, ema.returned_loss, "EMA, κ = 0.5", LOOKS["EMA"])
        adamw = _ends(runs, task, name="adamw", schedule=schedule, seed=TUNING, lr=rate)
        _level(axis, adamw.returned_loss, "AdamW", LOOKS["AdamW"])
        _dress(axis, "c", title=schedule)
        parts += [rows, ema, adamw]
    best = {
        f"{label}, {schedule}": runs.best(task, name, schedule, return_kappa=None, **fixed)
        for schedule in ("constant", "wsd")
        for label, name in (("PACE", "pace"), ("EMA", "ema"))
    }
    ends = _listed(runs, [(task, best)], TUNING, "EMA, constant")
    return _finished(figure, _csv_table(*parts), ends)


def draw_under_schedules(runs: ScaleRuns, *, by_kappa: bool) -> Drawn:
    """18 and 19: loss against c with each schedule, over seeds or for each κ."""
    task, grid, rate = runs.scale.from_scratch, runs.scale.scratch, runs.middle_rate()
    figure, axes = _panels(1, len(SCHEDULES), 3.8, 3.4)
    seeds = TUNING if by_kappa else runs.scale.seeds
    kappas = grid.kappas if by_kappa else (0.5,)
    parts, groups = [], []
    for axis, schedule in zip(axes[0], SCHEDULES, strict=True):
        fixed = {"lr": rate, "seed": seeds, "schedule": schedule}
        rows = _pulled(runs, task, pullback=grid.pullbacks, kappa=kappas, **fixed)
        _basin(axis, rows, "kappa")
        adamw = _ends(runs, task, name="adamw", **fixed)
        ema = _ends(runs, task, name="ema", **fixed)
        best = ema.groupby("kappa").selection_loss.mean().idxmin()
        _level(axis, adamw.returned_loss, "AdamW", LOOKS["AdamW"])
        _level(axis, ema[ema.kappa == best].returned_loss, "EMA at its best κ", LOOKS["EMA"])
        _dress(axis, "c", title=f"{schedule}, lr {rate:g}")
        parts += [rows, adamw, ema]
        for kappa in kappas:
            pace = runs.best_pace(task, schedule, kappa=kappa, lr=rate)
            methods = {f"PACE, κ = {kappa:g}, {schedule}": pace}
            methods[f"EMA, {schedule}"] = runs.best(task, "ema", schedule, lr=rate)
            methods[f"AdamW, {schedule}"] = runs.best(task, "adamw", schedule, lr=rate)
            groups.append((task, methods))
    return _finished(figure, _csv_table(*parts), _listed(runs, groups, seeds))


def draw_twins(runs: ScaleRuns) -> Drawn:
    """PACE less its own twin: the EMA at the twin's rate for PACE's measured mean gain."""
    found: list[dict[str, Any]] = []
    for task, grid in runs.scale.twinned:
        for lr in grid.rates:
            pace = runs.best_pace(task, lr=lr)
            other = runs.twin_of(task, pace)
            mine, its = (
                _ends_of(runs, task, x, runs.scale.seeds).set_index("seed").returned_loss
                for x in (pace, other)
            )
            pairs = [mine[seed] - its[seed] for seed in mine.index if seed in its.index]
            low, high = interval(pairs) or (math.nan, math.nan)
            found.append(
                {
                    **{"setting": task.name, "lr": lr, "pace": pace.label, "twin": other.label},
                    **{"pace_loss": mine.mean(), "twin_loss": its.mean(), "seeds": len(pairs)},
                    **{"difference": float(np.mean(pairs)), "low": low, "high": high},
                }
            )
    table = pd.DataFrame(found)
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
    rows = table.assign(lr=table.lr.map("{:g}".format)).astype(object)
    ends = Listing("PACE less its own twin", list(rows.columns), rows.to_numpy().tolist())
    return _finished(figure, table, ends)
