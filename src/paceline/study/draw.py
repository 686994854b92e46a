"""How each figure is drawn, and the table of what is in it."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from ..train.methods import Method
from ..train.page import COLOURS
from .cells import Task
from .figures import (
    SCHEDULES,
    SLOWER,
    TUNING,
    Lab,
    budget,
    cells_of,
    constant_and_decaying,
    contenders,
    grids,
    middle_rate,
    twin,
    twinned,
)
from .statistics import DIFFERENCE, Listing, interval, paired

LOSS = "validation loss, nats a token"
# The same look for the same method everywhere: colour, dash, and width, so that print and
# the colour-blind can tell them apart.
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
    *(
        "setting",
        "label",
        "name",
        "schedule",
        "lr",
        "pullback",
        "kappa",
        "every",
        "return_kappa",
        "twin_gain",
    ),
    *("seed", "step", "tokens"),
    *("live_loss", "returned_loss", "selection_loss", "gain_mean", "clipped"),
]


class Drawn(NamedTuple):
    """A figure, the numbers in it, and what they say of its methods at the end."""

    figure: Figure
    table: pd.DataFrame
    ends: Listing


# ---- parts --------------------------------------------------------------------------------------


def _figure(rows: int, columns: int, width: float = 3.6, height: float = 3.0) -> tuple[Figure, Any]:
    figure = Figure(
        figsize=(width * columns + 0.4, height * rows + 0.9), layout="constrained", dpi=150
    )
    return figure, figure.subplots(rows, columns, squeeze=False)


def _dress(axis: Axes, x: str, y: str = LOSS, title: str = "") -> None:
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


def _of(lab: Lab, task: Task, method: Method, seeds: Iterable[int] | None = None) -> pd.DataFrame:
    """All points of a method's runs."""
    points = lab.points
    rows = points[
        (points.setting == task.name) & (points.label == method.label) & (points.lr == method.lr)
    ]
    return rows if seeds is None else rows[rows.seed.isin(list(seeds))]


def _curve(axis: Axes, rows: pd.DataFrame, label: str, look: Any, y: str = "returned_loss") -> None:
    """Mean over seeds against steps, with their range."""
    colour, dash, width = look
    by_step = rows.groupby("step")[y]
    mean = by_step.mean()
    axis.plot(mean.index, mean, color=colour, ls=dash, lw=width, label=label)
    if rows.seed.nunique() > 1:
        axis.fill_between(mean.index, by_step.min(), by_step.max(), color=colour, alpha=0.15, lw=0)


def _late(figure: Figure, share: float = 0.25) -> None:
    """Have the losses' axes show what is there in the last part, and not the fall before."""
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


def _basin(axis: Axes, rows: pd.DataFrame, lines: str, x: str = "pullback") -> None:
    """Loss at the end against c, a line for each value of an option; × on top is divergence."""
    for index, (value, group) in enumerate(rows.groupby(lines, dropna=False)):
        by_x = group.groupby(x).returned_loss
        mean, spread = by_x.mean(), by_x.std().fillna(0.0)
        label = f"PACE, {_named(lines, value)}"
        look = {"color": COLOURS[index % 5], "ls": DASHES[index % 5], "marker": MARKERS[index % 5]}
        finite = mean[np.isfinite(mean)]
        axis.errorbar(
            finite.index, finite, spread[finite.index], label=label, lw=1.5, ms=4, capsize=2, **look
        )
        for lost in mean.index[~np.isfinite(mean)]:
            axis.plot(lost, 0.97, "x", color=look["color"], transform=axis.get_xaxis_transform())
    axis.set_xscale("log")


def _named(option: str, value: Any) -> str:
    if option == "every":
        return "every step" if pd.isna(value) else f"every {value:g} steps"
    return f"{ {'kappa': 'κ', 'lr': 'lr'}.get(option, option) } = {value:g}"


def _level(axis: Axes, losses: pd.Series, label: str, look: Any) -> None:
    """A baseline that does not depend on x."""
    if len(losses) and np.isfinite(losses.mean()):
        axis.axhline(losses.mean(), color=look[0], ls=look[1], lw=1.2, label=label)
        if len(losses) > 1:
            axis.axhspan(losses.min(), losses.max(), color=look[0], alpha=0.12, lw=0)


def _ends(lab: Lab, task: Task, **fixed: Any) -> pd.DataFrame:
    """Ends of a task's runs with such options; of a list, any of them."""
    rows = lab.ends[lab.ends.setting == task.name]
    for option, value in fixed.items():
        if value is None:
            rows = rows[rows[option].isna()]
        else:
            rows = rows[rows[option].isin(value if isinstance(value, list | tuple) else [value])]
    return rows


def _pulled(lab: Lab, task: Task, **fixed: Any) -> pd.DataFrame:
    """PACE's own average, at the end of the runs that settings were chosen from."""
    fixed = {"schedule": "constant", "every": None, "seed": TUNING, **fixed}
    return _ends(lab, task, name="pace", return_kappa=None, **fixed)


def _table(*parts: pd.DataFrame) -> pd.DataFrame:
    table = pd.concat(parts, ignore_index=True)[COLUMNS].drop_duplicates()
    return table.dropna(axis="columns", how="all").reset_index(drop=True)


def _listed(
    lab: Lab, groups: Iterable[tuple[Task, dict[str, Method]]], seeds: Any = None, to: str = ""
) -> Listing:
    """Methods at their end: loss, and how much it differs from that of one of them, by seed.

    Args:
        lab: what has come of the runs.
        groups: what is compared with one another.
        seeds: of a task, or of all; None: each task's own.
        to: the start of that one's name. Default: PACE's.
    """
    rows: list[list[Any]] = []
    for task, methods in groups:
        own = lab.scale.seeds_of(task) if seeds is None else seeds
        losses = {
            label: _ends(lab, task, label=method.label, lr=method.lr, seed=own)
            .set_index("seed")
            .returned_loss.to_dict()
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


def _headline(lab: Lab, task: Task) -> dict[str, Method]:
    best = contenders(lab, task)
    return {**best, "PACE's own twin": twin(lab, task, best["PACE, constant"])}


def headline(lab: Lab, *, since: float = 0.0) -> Drawn:
    """1 and 11: each at its best setting, over seeds."""
    figure, axes = _figure(1, len(lab.scale.models), 4.2, 3.6)
    parts = []
    for axis, task in zip(axes[0], lab.scale.models, strict=True):
        for label, method in _headline(lab, task).items():
            rows = _of(lab, task, method, lab.scale.seeds_of(task))
            rows = rows[rows.step >= since * rows.step.max()]
            _curve(axis, rows, label, LOOKS[label])
            parts.append(rows.assign(setting=f"{task.name}: {label}"))
        _dress(axis, "step", title=task.name)
    _late(figure, max(0.3, since))
    _legend(figure)
    ends = _listed(lab, [(task, _headline(lab, task)) for task in lab.scale.models])
    return Drawn(figure, _table(*parts), ends)


def training(lab: Lab) -> Drawn:
    """7: training loss of figure 5's methods, a running mean."""
    shown = ("AdamW", "EMA", "Schedule-Free", "PACE, constant")
    figure, axes = _figure(1, len(lab.scale.models), 4.2, 3.6)
    parts = []
    for axis, task in zip(axes[0], lab.scale.models, strict=True):
        best = contenders(lab, task)
        for label in shown:
            ends = _of(lab, task, best[label], lab.scale.seeds_of(task))
            log = lab.training
            rows = log[(log.setting == task.name) & log.trained_with.isin(ends.trained_with)]
            mean = rows.groupby("step").loss.mean().rolling(5, min_periods=1).mean()
            colour, dash, width = LOOKS[label]
            axis.plot(mean.index, mean, color=colour, ls=dash, lw=width, label=label)
            smooth = pd.DataFrame({"step": mean.index, "training_loss": mean.to_numpy()})
            parts.append(smooth.assign(setting=task.name, label=f"{label}: {best[label].label}"))
        _dress(axis, "step", "training loss, live weights, nats a token", task.name)
    _late(figure)
    _legend(figure)
    columns = ["setting", "label", "step", "training_loss"]
    ends = _listed(lab, [(task, _headline(lab, task)) for task in lab.scale.models])
    return Drawn(figure, pd.concat(parts, ignore_index=True)[columns], ends)


def _at_each_rate(lab: Lab, pairs: Any, **fixed: Any) -> Listing:
    """PACE at its best c and κ against the best of AdamW's averages, all constant."""
    own = {"return_kappa": None, "every": None, **fixed}

    def best(task: Task, lr: float) -> dict[str, Method]:
        found = {
            f"PACE at {lr:g}": lab.best(task, ["pace"], ["constant"], lr=lr, **own),
            f"EMA at {lr:g}": lab.best(task, ["ema"], ["constant"], lr=lr),
            f"AdamW at {lr:g}": lab.best(task, ["adamw"], ["constant"], lr=lr),
        }
        same = found[f"PACE at {lr:g}"].kappa
        alone = lab.best(task, ["ema"], ["constant"], lr=lr, kappa=same)
        return {**found, f"EMA of the same κ at {lr:g}": alone}

    groups = [(task, best(task, lr)) for task, grid in pairs for lr in grid.rates]
    return _listed(lab, groups, TUNING)


def maps(lab: Lab, pairs: Any) -> Drawn:
    """6 and 9: loss against c for each κ; a column for each rate, a row for each model."""
    pairs = list(pairs)
    figure, axes = _figure(len(pairs), max(len(own.rates) for _, own in pairs))
    parts = []
    for line, (task, own) in zip(axes, pairs, strict=True):
        for axis, lr in zip(line, own.rates, strict=True):
            rows = _pulled(lab, task, lr=lr, pullback=own.cs, kappa=own.kappas)
            _basin(axis, rows, "kappa")
            watching = _ends(lab, task, lr=lr, schedule="constant", seed=TUNING)
            for index, kappa in enumerate(own.kappas):
                ema = watching[(watching.name == "ema") & (watching.kappa == kappa)]
                look = (COLOURS[index % 5], (0, (1, 2)))
                _level(axis, ema.returned_loss, f"EMA, κ = {kappa:g}", look)
            adamw = watching[watching.name == "adamw"]
            _level(axis, adamw.returned_loss, "AdamW", LOOKS["AdamW"])
            _dress(axis, "c", title=f"{task.name}\nlr {lr:g}")
            parts += [rows, watching[watching.name.isin(["ema", "adamw"])]]
    _legend(figure)
    return Drawn(figure, _table(*parts), _at_each_rate(lab, pairs))


def rarer(lab: Lab, kappas: Sequence[float]) -> Drawn:
    """3 and 8: loss against c for each update frequency; a column for each rate."""
    task, own = lab.scale.main, lab.scale.tuned
    figure, axes = _figure(len(kappas), len(own.rates))
    parts = []
    for line, kappa in zip(axes, kappas, strict=True):
        for axis, lr in zip(line, own.rates, strict=True):
            rows = _ends(
                lab,
                task,
                **{"name": "pace", "return_kappa": None, "lr": lr, "kappa": kappa},
                **{"pullback": own.cs, "schedule": "constant", "seed": TUNING},
            )
            _basin(axis, rows.assign(every=rows.every.fillna(1)), "every")
            ema = _ends(lab, task, name="ema", lr=lr, kappa=kappa, schedule="constant", seed=TUNING)
            _level(axis, ema.returned_loss, f"EMA, κ = {kappa:g}", LOOKS["EMA"])
            _dress(axis, "c", title=f"κ = {kappa:g}, lr {lr:g}")
            parts += [rows, ema]
    _legend(figure)

    def best(lr: float) -> dict[str, Method]:
        found = {
            f"PACE at {lr:g}, {_named('every', every)}": lab.best(
                task, ["pace"], ["constant"], return_kappa=None, lr=lr, every=every
            )
            for every in (None, *lab.scale.every)
        }
        return {**found, f"EMA at {lr:g}": lab.best(task, ["ema"], ["constant"], lr=lr)}

    ends = _listed(lab, [(task, best(lr)) for lr in own.rates], TUNING)
    return Drawn(figure, _table(*parts), ends)


def clipping(lab: Lab, pairs: Any) -> Drawn:
    """4 and 12: the share of clipped coordinates over training, for each c; a column each κ."""
    rows_of = [(task, own, lr) for task, own in pairs for lr in own.rates[1:]]
    figure, axes = _figure(len(rows_of), max(len(own.kappas) for _, own, _ in rows_of))
    parts = []
    for line, (task, own, lr) in zip(axes, rows_of, strict=True):
        for axis, kappa in zip(line, own.kappas, strict=True):
            for index, c in enumerate(own.cs):
                ends = _pulled(lab, task, lr=lr, pullback=c, kappa=kappa)
                log = lab.training
                rows = log[(log.setting == task.name) & log.trained_with.isin(ends.trained_with)]
                look = {"color": COLOURS[index % 5], "ls": DASHES[index % 5]}
                axis.plot(rows.step, rows.clipped, label=f"c = {c:g}", lw=1.4, **look)
                facts = {"label": f"pace pullback={c:g} kappa={kappa:g}", "lr": lr}
                parts.append(rows[["setting", "step", "gain_mean", "clipped"]].assign(**facts))
            axis.set_ylim(-0.02, 1.02)
            _dress(axis, "step", "share clipped", f"{task.name}\nκ = {kappa:g}, lr {lr:g}")
    _legend(figure)
    columns = ["setting", "label", "lr", "step", "gain_mean", "clipped"]
    table = pd.concat(parts, ignore_index=True)[columns]
    return Drawn(figure, table, _clipped(lab, pairs))


def clipped_at_the_end(lab: Lab) -> Drawn:
    """13: against c, for each κ; a column for each rate."""
    task, own = lab.scale.main, lab.scale.tuned
    figure, axes = _figure(1, len(own.rates))
    parts = []
    for axis, lr in zip(axes[0], own.rates, strict=True):
        rows = _pulled(lab, task, lr=lr, pullback=own.cs, kappa=own.kappas)
        for index, (kappa, group) in enumerate(rows.groupby("kappa")):
            shown = group.sort_values("pullback")
            look = {"color": COLOURS[index % 5], "ls": DASHES[index % 5]}
            marker = MARKERS[index % 5]
            axis.plot(shown.pullback, shown.clipped, marker=marker, label=f"κ = {kappa:g}", **look)
        axis.set_xscale("log")
        axis.set_ylim(-0.02, 1.02)
        _dress(axis, "c", "share clipped at the end", f"{task.name}\nlr {lr:g}")
        parts.append(rows)
    _legend(figure)
    return Drawn(figure, _table(*parts), _clipped(lab, [(task, own)]))


def _clipped(lab: Lab, pairs: Any) -> Listing:
    rows = [
        [
            task.name,
            f"{row.lr:g}",
            f"{row.kappa:g}",
            f"{row.pullback:g}",
            row.gain_mean,
            row.clipped,
        ]
        for task, own in pairs
        for row in _pulled(lab, task, lr=own.rates, pullback=own.cs, kappa=own.kappas)
        .sort_values(["lr", "kappa", "pullback"])
        .itertuples()
    ]
    columns = ["model", "lr", "κ", "c", "mean gain", "share clipped"]
    return Listing("At the end", columns, rows)


def _budgets(lab: Lab, task: Task) -> tuple[dict[str, Method], list[tuple[str, Task, Method]]]:
    """The constant runs, and the decays over the last fifth of 50, 75 and 100 % of the steps."""
    constant = {
        "PACE": lab.best(task, ["pace"], ["constant"], return_kappa=None, every=None),
        "EMA": lab.best(task, ["ema"], ["constant"]),
    }
    return constant, [
        (f"AdamW, WSD over {share:.0%} of the steps", each, lab.best(each, ["adamw"], ["wsd"]))
        for share, each in ((0.5, budget(task, 0.5)), (0.75, budget(task, 0.75)), (1, task))
    ]


def budgets(lab: Lab, task: Task, axis: Axes) -> pd.DataFrame:
    """Decays at three budgets beside one constant run."""
    seeds = lab.scale.seeds
    constant, decays = _budgets(lab, task)
    parts = []
    for label, method in constant.items():
        rows = _of(lab, task, method, seeds)
        _curve(axis, rows, f"{label}, constant", LOOKS[label])
        parts.append(rows)
    for index, (label, each, method) in enumerate(decays):
        rows = _of(lab, each, method, seeds)
        _curve(axis, rows, label, (COLOURS[6], DASHES[index], 1.2))
        parts.append(rows)
    _dress(axis, "step", title=task.name)
    return _table(*parts)


def _at_budgets(lab: Lab, task: Task) -> Listing:
    """Each decay's end against the constant runs at the same step, between two evaluations."""
    seeds = lab.scale.seeds
    constant, decays = _budgets(lab, task)
    rows: list[list[Any]] = []
    for label, each, method in decays:
        ends = _ends(lab, each, label=method.label, lr=method.lr, seed=seeds).set_index("seed")
        decayed = ends.returned_loss.to_dict()
        for other, its in constant.items():
            points = _of(lab, task, its, seeds)
            there = {
                seed: float(np.interp(ends.step[seed], run.step, run.returned_loss))
                for seed, run in points.groupby("seed")
                if seed in decayed
            }
            means = [float(np.mean(list(x.values()))) for x in (decayed, there)]
            rows.append([label, other, *means, len(there), *paired(decayed, there)])
    columns = ["decay", "constant run at the same step", "decay's loss", "constant's loss", "seeds"]
    return Listing("Decay less constant run", [*columns, *DIFFERENCE], rows)


def free(lab: Lab) -> Drawn:
    """5: against Schedule-Free, AdamW and EMA; on the right one run against three decays."""
    models = lab.scale.models[:2]
    shown = ("AdamW", "EMA", "Schedule-Free", "PACE, constant")
    figure, axes = _figure(1, len(models) + 1, 4.2, 3.6)
    parts = []
    for axis, task in zip(axes[0], models, strict=False):
        best = contenders(lab, task)
        for label in shown:
            rows = _of(lab, task, best[label], lab.scale.seeds_of(task))
            _curve(axis, rows, label, LOOKS[label])
            parts.append(rows)
        _dress(axis, "step", title=task.name)
    parts.append(budgets(lab, lab.scale.main, axes[0][-1]))
    _late(figure, 0.4)
    _legend(figure)
    return Drawn(figure, _table(*parts), _at_budgets(lab, lab.scale.main))


def branches(lab: Lab) -> Drawn:
    """20: the same from scratch."""
    figure, axes = _figure(1, 1, 6.0, 4.0)
    table = budgets(lab, lab.scale.from_scratch, axes[0][0])
    _late(figure, 0.4)
    _legend(figure)
    return Drawn(figure, table, _at_budgets(lab, lab.scale.from_scratch))


def other_data(lab: Lab) -> Drawn:
    """10: loss at the end against the rate, for each κ; and curves at the middle rate."""
    task, own = lab.scale.other_data, lab.scale.others
    figure, axes = _figure(1, 2, 4.6, 3.8)
    left, right = axes[0]
    parts = []
    watching = _ends(lab, task, schedule="constant", seed=TUNING)
    adamw = watching[watching.name == "adamw"].sort_values("lr")
    left.plot(adamw.lr, adamw.returned_loss, "k--", marker="x", label="AdamW")
    for index, kappa in enumerate(own.kappas):
        ema = watching[(watching.name == "ema") & (watching.kappa == kappa)].sort_values("lr")
        colour, marker = COLOURS[index % 5], MARKERS[index % 5]
        left.plot(
            ema.lr, ema.returned_loss, ":", color=colour, marker=marker, label=f"EMA, κ = {kappa:g}"
        )
        pulled = _pulled(lab, task, kappa=kappa, pullback=own.cs)
        best = pulled.loc[pulled.groupby("lr").selection_loss.idxmin()]
        left.plot(
            *(best.lr, best.returned_loss, "-"),
            **{"color": colour, "marker": marker, "label": f"PACE at its best c, κ = {kappa:g}"},
        )
        parts += [ema, pulled]
    left.set_xscale("log")
    _dress(left, "learning rate", title=task.name)
    rate = own.rates[len(own.rates) // 2]
    for label, name in (("AdamW", "adamw"), ("EMA", "ema"), ("PACE", "pace")):
        method = lab.best(task, [name], ["constant"], return_kappa=None, every=None, lr=rate)
        rows = _of(lab, task, method)
        _curve(right, rows, label, LOOKS[label])
        parts.append(rows)
    _dress(right, "step", title=f"lr {rate:g}")
    _legend(figure)
    return Drawn(figure, _table(adamw, *parts), _at_each_rate(lab, [(task, own)]))


def _at_rate(lab: Lab, task: Task, lr: float) -> dict[str, Method]:
    """Each at its best setting of one rate."""
    own = {"return_kappa": None, "every": None}
    return {
        "AdamW": lab.best(task, ["adamw"], SCHEDULES, lr=lr),
        "EMA": lab.best(task, ["ema"], SCHEDULES, lr=lr),
        "EMA, power or twin schedule": lab.best(task, ["ema"], ["power", "twin"], lr=lr),
        "Schedule-Free": lab.best(task, ["schedule-free"], ["constant"], lr=lr),
        "PACE, constant": lab.best(task, ["pace"], ["constant"], lr=lr, **own),
        "PACE, constant, slower average": lab.best(
            task, ["pace"], ["constant"], lr=lr, every=None, return_kappa=SLOWER
        ),
    }


def across_rates(lab: Lab) -> Drawn:
    """14: loss at the end against the rate."""
    task = lab.scale.main
    rates = (*lab.scale.tuned.rates, lab.scale.high)
    figure, axes = _figure(1, 1, 6.0, 4.2)
    axis = axes[0][0]
    best = {lr: _at_rate(lab, task, lr) for lr in rates}
    parts = []
    for label in next(iter(best.values())):
        rows = pd.concat(
            [_ends(lab, task, label=best[lr][label].label, lr=lr, seed=TUNING) for lr in rates]
        )
        colour, dash, width = LOOKS[label]
        axis.plot(
            rows.lr, rows.returned_loss, color=colour, ls=dash, lw=width, marker="o", label=label
        )
        parts.append(rows)
    axis.set_xscale("log")
    _dress(axis, "learning rate", title=f"{task.name}: each at its best of each rate")
    _legend(figure)
    return Drawn(figure, _table(*parts), _listed_at_rates(lab, rates))


def _listed_at_rates(lab: Lab, rates: Iterable[float]) -> Listing:
    task = lab.scale.main
    return _listed(lab, [(task, _at_rate(lab, task, lr)) for lr in rates], TUNING)


def curves_across_rates(lab: Lab) -> Drawn:
    """15: curves, a panel for each rate."""
    task = lab.scale.main
    rates = (*lab.scale.tuned.rates, lab.scale.high)
    figure, axes = _figure(1, len(rates), 3.6, 3.4)
    parts = []
    for axis, lr in zip(axes[0], rates, strict=True):
        for label, method in _at_rate(lab, task, lr).items():
            rows = _of(lab, task, method, TUNING)
            _curve(axis, rows, label, LOOKS[label])
            parts.append(rows)
        _dress(axis, "step", title=f"{task.name}\nlr {lr:g}")
    _late(figure, 0.4)
    _legend(figure)
    return Drawn(figure, _table(*parts), _listed_at_rates(lab, rates))


def by_schedule(lab: Lab) -> Drawn:
    """16: AdamW and EMA at their best rate of each schedule; PACE at a constant rate."""
    figure, axes = _figure(1, len(lab.scale.models), 3.8, 3.4)
    kinds = [*SCHEDULES, "power", "twin"]
    parts, groups = [], []
    for axis, task in zip(axes[0], lab.scale.models, strict=True):
        pace = lab.best(task, ["pace"], ["constant"], return_kappa=None, every=None)
        methods = {"PACE, constant": pace}
        for label, name, marker in (("AdamW", "adamw", "x"), ("EMA", "ema", "o")):
            for place, schedule in enumerate(kinds):
                if name == "adamw" and schedule not in SCHEDULES:
                    continue
                best = lab.best(task, [name], [schedule])
                methods[f"{label}, {schedule}"] = best
                rows = _ends(lab, task, label=best.label, lr=best.lr, seed=TUNING)
                axis.plot(
                    place, rows.returned_loss.mean(), marker, color=LOOKS[label][0], label=label
                )
                parts.append(rows)
        rows = _ends(lab, task, label=pace.label, lr=pace.lr, seed=TUNING)
        _level(axis, rows.returned_loss, "PACE, constant", LOOKS["PACE"])
        parts.append(rows)
        groups.append((task, methods))
        axis.set_xticks(range(len(kinds)), kinds, rotation=20)
        _dress(axis, "schedule", title=task.name)
    _legend(figure)
    return Drawn(figure, _table(*parts), _listed(lab, groups, TUNING))


def over_seeds(lab: Lab) -> Drawn:
    """17: AdamW, EMA and PACE, constant and WSD."""
    figure, axes = _figure(2, len(lab.scale.models), 3.8, 3.0)
    parts = []
    for column, task in zip(axes.T, lab.scale.models, strict=True):
        for name, method in constant_and_decaying(lab, task).items():
            label, _, schedule = name.partition(", ")
            rows = _of(lab, task, method, lab.scale.seeds)
            axis = column[0 if schedule == "constant" else 1]
            _curve(axis, rows, label, LOOKS[label])
            _dress(axis, "step", title=f"{task.name}, {schedule}")
            parts.append(rows)
    _late(figure, 0.4)
    _legend(figure)
    groups = [(task, constant_and_decaying(lab, task)) for task in lab.scale.models]
    return Drawn(figure, _table(*parts), _listed(lab, groups, lab.scale.seeds, "PACE, constant"))


def alone(lab: Lab) -> Drawn:
    """2: what the pull alone does at κ = 0.5: curves, and c, constant and under WSD."""
    task, own, rate = lab.scale.from_scratch, lab.scale.scratch, middle_rate(lab)
    figure, axes = _figure(1, 3, 4.0, 3.4)
    fixed = {"lr": rate, "kappa": 0.5}
    pace = lab.best(task, ["pace"], ["constant"], return_kappa=None, every=None, **fixed)
    ema = lab.best(task, ["ema"], ["constant"], **fixed)
    parts = []
    for label, method in (("EMA", ema), ("PACE", pace)):
        rows = _of(lab, task, method, TUNING)
        _curve(axes[0][0], rows, label, LOOKS[label])
        parts.append(rows)
    _late(figure, 0.4)
    _dress(axes[0][0], "step", title=f"{task.name}, lr {rate:g}, κ = 0.5")
    for axis, schedule in zip(axes[0][1:], ("constant", "wsd"), strict=True):
        rows = _pulled(lab, task, schedule=schedule, pullback=own.cs, **fixed)
        _basin(axis, rows, "kappa")
        watching = _ends(lab, task, name="ema", schedule=schedule, seed=TUNING, **fixed)
        _level(axis, watching.returned_loss, "EMA, κ = 0.5", LOOKS["EMA"])
        adamw = _ends(lab, task, name="adamw", schedule=schedule, seed=TUNING, lr=rate)
        _level(axis, adamw.returned_loss, "AdamW", LOOKS["AdamW"])
        _dress(axis, "c", title=schedule)
        parts += [rows, watching, adamw]
    _legend(figure)
    best = {
        f"{label}, {schedule}": lab.best(task, [name], [schedule], return_kappa=None, **fixed)
        for schedule in ("constant", "wsd")
        for label, name in (("PACE", "pace"), ("EMA", "ema"))
    }
    return Drawn(figure, _table(*parts), _listed(lab, [(task, best)], TUNING, "EMA, constant"))


def under_schedules(lab: Lab, *, by_kappa: bool) -> Drawn:
    """18 and 19: loss against c under each schedule: over seeds, or for each κ."""
    task, own, rate = lab.scale.from_scratch, lab.scale.scratch, middle_rate(lab)
    figure, axes = _figure(1, len(SCHEDULES), 3.8, 3.4)
    seeds = TUNING if by_kappa else lab.scale.seeds
    kappas = own.kappas if by_kappa else (0.5,)
    parts, groups = [], []
    for axis, schedule in zip(axes[0], SCHEDULES, strict=True):
        fixed = {"lr": rate, "seed": seeds, "schedule": schedule}
        rows = _pulled(lab, task, pullback=own.cs, kappa=kappas, **fixed)
        _basin(axis, rows, "kappa")
        adamw = _ends(lab, task, name="adamw", **fixed)
        ema = _ends(lab, task, name="ema", **fixed)
        best = ema.groupby("kappa").selection_loss.mean().idxmin()
        _level(axis, adamw.returned_loss, "AdamW", LOOKS["AdamW"])
        _level(axis, ema[ema.kappa == best].returned_loss, "EMA at its best κ", LOOKS["EMA"])
        _dress(axis, "c", title=f"{schedule}, lr {rate:g}")
        parts += [rows, adamw, ema]
        for kappa in kappas:
            own_c = {"return_kappa": None, "every": None, "kappa": kappa, "lr": rate}
            pace = lab.best(task, ["pace"], [schedule], **own_c)
            methods = {f"PACE, κ = {kappa:g}, {schedule}": pace}
            methods[f"EMA, {schedule}"] = lab.best(task, ["ema"], [schedule], lr=rate)
            methods[f"AdamW, {schedule}"] = lab.best(task, ["adamw"], [schedule], lr=rate)
            groups.append((task, methods))
    _legend(figure)
    return Drawn(figure, _table(*parts), _listed(lab, groups, seeds))


def twins(lab: Lab) -> Drawn:
    """PACE less its own twin: the EMA at the twin's rate, by the mean gain that PACE had."""
    rows: list[dict[str, Any]] = []
    for task, own in twinned(lab.scale):
        for lr in own.rates:
            pace = lab.best(task, ["pace"], ["constant"], return_kappa=None, every=None, lr=lr)
            other = twin(lab, task, pace)
            mine, its = (
                _ends(lab, task, label=x.label, lr=lr, seed=lab.scale.seeds)
                .set_index("seed")
                .returned_loss
                for x in (pace, other)
            )
            pairs = [mine[seed] - its[seed] for seed in mine.index if seed in its.index]
            low, high = interval(pairs) or (math.nan, math.nan)
            rows.append(
                {
                    **{"setting": task.name, "lr": lr, "pace": pace.label, "twin": other.label},
                    **{"pace_loss": mine.mean(), "twin_loss": its.mean(), "seeds": len(pairs)},
                    **{"difference": float(np.mean(pairs)), "low": low, "high": high},
                }
            )
    table = pd.DataFrame(rows)
    figure, axes = _figure(1, 1, 7.0, 4.0)
    axis = axes[0][0]
    for index, (setting, group) in enumerate(table.groupby("setting", sort=False)):
        places = np.log10(group.lr) + 0.03 * (index - 1.5)
        error = np.abs([group.difference - group.low, group.high - group.difference])
        axis.errorbar(
            *(10**places, group.difference, error),
            **{"fmt": MARKERS[index % 5], "color": COLOURS[index % 7], "capsize": 3},
            label=setting,
        )
    axis.axhline(0, color="black", lw=0.8)
    axis.set_xscale("log")
    _dress(axis, "learning rate", "PACE less its twin, nats a token")
    _legend(figure)
    said = table.assign(lr=table.lr.map("{:g}".format)).astype(object)
    ends = Listing("PACE less its own twin", list(said.columns), said.to_numpy().tolist())
    return Drawn(figure, table, ends)


def draw(figure: str, lab: Lab) -> Drawn:
    """One figure, all of whose runs have ended."""
    cells_of(figure, lab)  # which settings are chosen from
    pairs = grids(lab.scale)
    return {
        "1": headline,
        "2": alone,
        "3": lambda lab: rarer(lab, (0.3,)),
        "4": lambda lab: clipping(lab, pairs[:1]),
        "5": free,
        "6": lambda lab: maps(lab, pairs),
        "7": training,
        "8": lambda lab: rarer(lab, (0.3, 0.5)),
        "9": lambda lab: maps(lab, [(lab.scale.from_scratch, lab.scale.scratch)]),
        "10": other_data,
        "11": lambda lab: headline(lab, since=0.75),
        "12": lambda lab: clipping(lab, pairs[1:] or pairs),
        "13": clipped_at_the_end,
        "14": across_rates,
        "15": curves_across_rates,
        "16": by_schedule,
        "17": over_seeds,
        "18": lambda lab: under_schedules(lab, by_kappa=False),
        "19": lambda lab: under_schedules(lab, by_kappa=True),
        "20": branches,
        "twin": twins,
    }[figure](lab)
