"""Tables of the runs of benchmarks/regret.py: regrets and differences of methods over seeds.

    python benchmarks/regret_tables.py results/regret

Writes losses.csv with all runs of the folder, and tables.md.
"""

import functools
import itertools
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from regret import ALL_TASKS, READ_OUTS, SATURATED, Cell, written
from tasks import TASKS

from paceline.study.statistics import DIFFERENCE, Listing, edges, holds, holm, interval, p_value
from paceline.train.methods import parse_method

AUTO = ("pace:pullback=auto:kappa=0.3", "k60")  # a method, and the average that it returns
UNTUNED = {
    "auto": AUTO,
    "EMA κ 0.6": ("adamw", "k60"),
    "EMA κ 0.5": ("adamw", "k50"),
    "cosine": ("adamw:cosine", "live"),
    "Schedule-Free": ("schedule-free", "own"),
    "power κ 0.3, EMA κ 0.6": ("adamw:power:kappa=0.3", "k60"),
    "scalar gain 0.1, EMA κ 0.6": ("pace:gain=scalar:pullback=0.1:kappa=0.3", "k60"),
    "scalar gain 0.5, EMA κ 0.6": ("pace:gain=scalar:pullback=0.5:kappa=0.3", "k60"),
    "PACE c 0.1, EMA κ 0.6": ("pace:pullback=0.1:kappa=0.3", "k60"),
    "PACE c 1, EMA κ 0.6": ("pace:pullback=1:kappa=0.3", "k60"),
}
THREE = ("k50", "k60", "k70")
CHOSEN_AFTER = {  # of these averages, or of all and the last weights, the best after each training
    "auto, best of κ 0.5, 0.6, 0.7": (AUTO[0], THREE),
    "auto, best of all": (AUTO[0], ()),
    "EMA, best of κ 0.5, 0.6, 0.7": ("adamw", THREE),
    "EMA, best of all": ("adamw", ()),
}
FAMILIES = {  # methods that begin so, at the best of them with the best average
    "AdamW, constant rate": ("adamw$",),
    "AdamW, cosine or WSD": ("adamw:cosine", "adamw:wsd"),
    "AdamW, power": ("adamw:power",),
    "AdamW, twin": ("adamw:twin",),
    "AdamW, any schedule": ("adamw",),
    "Schedule-Free": ("schedule-free",),
    "PACE": ("pace:pullback=[0-9]",),
    "PACE, scalar gain": ("pace:gain",),
}
VERSUS = (  # of these, the first less the second
    ("PACE", "PACE, scalar gain"),
    ("PACE", "AdamW, any schedule"),
    ("PACE, scalar gain", "AdamW, any schedule"),
    ("PACE, scalar gain", "AdamW, twin"),
    ("PACE, scalar gain", "Schedule-Free"),
    ("auto", "AdamW, any schedule"),
)
PULLS = {  # each with its twin
    "scalar gain 0.1": (
        "pace:gain=scalar:pullback=0.1:kappa=0.3",
        "adamw:twin:twin_gain=0.1:kappa=0.3",
    ),
    "scalar gain 0.5": (
        "pace:gain=scalar:pullback=0.5:kappa=0.3",
        "adamw:twin:twin_gain=0.5:kappa=0.3",
    ),
    "scalar gain 1": (SATURATED, "adamw:power:kappa=0.3"),
}
SEEDS = {name: task.seeds for name, task in ALL_TASKS.items()}
CELL = ["task", "steps", "lr"]
HORIZON = CELL[:2]


def frame(done: dict[Cell, dict[str, list[float]]]) -> pd.DataFrame:
    """A row for each training and average: losses to choose by and to report."""
    rows = [
        (*cell, average, *pair) for cell, losses in done.items() for average, pair in losses.items()
    ]
    found = pd.DataFrame(rows, columns=[*Cell._fields, "average", "choose", "report"])
    return found.sort_values([*Cell._fields, "average"], ignore_index=True)


def rows_of(losses: pd.DataFrame, method: str, average: str) -> pd.DataFrame:
    """The rows of one method with one average."""
    return losses[(losses.method == method) & (losses.average == average)]


def chosen_after(losses: pd.DataFrame, method: str, averages: tuple[str, ...]) -> pd.DataFrame:
    """Rows of each training's best average on the half to choose by, of some averages or all."""
    losses = losses[losses.method == method]
    losses = losses[losses.average.isin(averages)] if averages else losses
    return losses.loc[losses.groupby([*CELL, "seed"]).choose.idxmin()]


def best_settings(losses: pd.DataFrame, over: list[str] = CELL) -> pd.DataFrame:
    """Rows of the best setting of each task, horizon and rate; a seed's is chosen by the others.

    If `over` has no rate, the rate is part of the setting.
    """
    setting = [*CELL, "method", "average"]
    seeds = losses.groupby(setting).choose.transform("count")
    losses = losses[seeds == losses.task.map(SEEDS)]
    others = losses.groupby(setting).choose.transform("sum") - losses.choose
    return losses.loc[others.groupby([losses[key] for key in (*over, "seed")]).idxmin()]


def difference(these: pd.DataFrame, those: pd.DataFrame, over: list[str] = CELL) -> pd.DataFrame:
    """Mean difference of reported losses over seeds, with its interval and p-value.

    A cell is left out if a seed is missing, or if both diverged.
    """
    one, other = (x.set_index([*over, "seed"]).report for x in (these, those))
    rows = {
        cell: (x.mean(), *(interval(list(x)) or (math.nan, math.nan)), p_value(list(x)))
        for cell, x in (one - other).dropna().groupby(over)
        if len(x) == SEEDS[cell[0]]
    }
    index = pd.MultiIndex.from_tuples(rows, names=over)
    return pd.DataFrame(rows.values(), index=index, columns=DIFFERENCE, dtype=float)


class Setting(NamedTuple):
    """What is chosen: a method, the average that it returns, and a rate."""

    method: str
    average: str
    lr: float

    @property
    def options(self) -> dict[str, Any]:
        """Values by option; κ of the average is `return_kappa`, of the live weights 0."""
        average = (
            parse_method(READ_OUTS[self.average], lr=1.0) if self.average in READ_OUTS else None
        )
        kappa = {"live": 0.0}.get(self.average, average and average.kappa)
        return {**_parsed(self.method, self.lr), "return_kappa": kappa}


@functools.cache
def _parsed(method: str, lr: float) -> dict[str, Any]:
    return parse_method(method.partition("+")[0], lr=lr).row


def settings_in(x: pd.DataFrame) -> list[Setting]:
    return [Setting(*values) for values in x[list(Setting._fields)].itertuples(index=False)]


def chosen_by_most(chosen: pd.DataFrame, over: list[str]) -> dict[tuple[Any, ...], Setting]:
    """The setting that most seeds chose, of a tie the first, by task, horizon and rate."""
    counts = {cell: Counter(settings_in(x)) for cell, x in chosen.groupby(over)}
    return {cell: max(sorted(x), key=x.__getitem__) for cell, x in counts.items()}


def edges_of(chosen: pd.DataFrame, tried: pd.DataFrame, over: list[str]) -> pd.DataFrame:
    """Options of the settings that most seeds chose which are at an edge of what was tried."""
    grids = {
        cell: [x.options for x in set(settings_in(rows))] for cell, rows in tried.groupby(over)
    }
    found = {
        cell: edges(setting.options, grids[cell])
        for cell, setting in chosen_by_most(chosen, over).items()
    }
    index = pd.MultiIndex.from_tuples(found, names=over)
    return pd.DataFrame({"edge": found.values()}, index)


def by_task(
    title: str, cells: dict[str, pd.DataFrame], say: Callable[[pd.DataFrame], str], nats: bool
) -> Listing:
    """A text on each row's cells for every task, and for all tasks, or all in nats, together."""
    known = {task for x in cells.values() for task in x.index.get_level_values("task")}
    tasks = [task for task in TASKS if task in known]
    together = [task for task in tasks if not (nats and task.startswith("quadratic"))]
    rows = []
    for name, x in cells.items():
        own = x.index.get_level_values("task")
        parts = [x[own.isin(part)] for part in (*([task] for task in tasks), together)]
        rows.append([name, *(say(part) if len(part) else "" for part in parts)])
    return Listing(title, ["", *tasks, "all in nats" if nats else "all"], rows)


def signs(x: pd.DataFrame) -> str:
    low, high = (x.high < 0).sum(), (x.low > 0).sum()
    mean, median = x.difference.mean(), x.difference.median()
    return f"{mean:+.3f}, {median:+.3f} ({low}, {len(x) - low - high}, {high})"


def distance(losses: pd.DataFrame, tuned: pd.DataFrame) -> pd.Series:
    """AdamW's final loss at a constant rate above the best, where its interval is above 0."""
    found = difference(rows_of(losses, "adamw", "live"), tuned)
    return found[found.low > 0].difference


def regrets(
    losses: pd.DataFrame, families: dict[str, pd.DataFrame], tuned: pd.DataFrame
) -> Iterator[Listing]:
    there = distance(losses, tuned)

    def loss(x: pd.DataFrame) -> str:
        numbers = (x.difference.mean(), x.difference.median(), x.difference.max())
        return ", ".join(f"{number:.3f}" for number in numbers)

    def share(x: pd.DataFrame) -> str:
        shares = (x.difference / there).dropna()
        numbers = ", ".join(f"{x:.0%}" for x in (shares.mean(), shares.median(), shares.max()))
        return f"{numbers} ({len(shares)})" if len(shares) else ""

    untuned = {name: rows_of(losses, *setting) for name, setting in UNTUNED.items()}
    untuned |= {name: chosen_after(losses, *setting) for name, setting in CHOSEN_AFTER.items()}
    chosen = {name: best_settings(x) for name, x in families.items()}
    for title, compared in {"Not tuned": untuned, "Tuned at each rate": chosen}.items():
        found = {name: difference(x, tuned) for name, x in compared.items()}
        title += ": regret, mean, median and worst, "
        yield by_task(title + "in the loss", found, loss, nats=True)
        title += "as shares of the distance (of so many settings)"
        yield by_task(title, found, share, nats=False)

    def at_an_edge(x: pd.DataFrame) -> str:
        return f"{(x.edge != '').sum()} of {len(x)}"

    at = {name: edges_of(x, families[name], CELL) for name, x in chosen.items()}
    title = "Tuned at each rate: settings where no best was found, as it is at the edge of its grid"
    yield by_task(title, at, at_an_edge, nats=False)


def rate_tuned(
    losses: pd.DataFrame, rivals: pd.DataFrame, families: dict[str, pd.DataFrame]
) -> Iterator[Listing]:
    tried = {name: rows_of(losses, *UNTUNED[name]) for name in ("auto", "EMA κ 0.6")} | families
    compared = list(tried)
    tried = {"best": rivals} | tried
    chosen = {name: best_settings(x, HORIZON) for name, x in tried.items()}
    most = {name: chosen_by_most(x, HORIZON) for name, x in chosen.items()}
    edge = {name: edges_of(x, tried[name], HORIZON).edge for name, x in chosen.items()}

    def by_horizon(title: str, columns: dict[str, pd.Series]) -> Listing:
        found = pd.DataFrame(columns, index=chosen["best"].groupby(HORIZON).size().index).fillna("")
        rows = [[task, str(steps), *texts] for (task, steps), *texts in found.itertuples()]
        return Listing("Tuned, the rate too: " + title, [*HORIZON, *columns], rows)

    def marked(found: pd.DataFrame, names: tuple[str, ...], say: Callable[[Any], str]) -> pd.Series:
        """The text on each row, with a † where one of the methods is at the edge of its grid."""
        texts = {
            row.Index: say(row) + "†" * any(edge[name].get(row.Index) for name in names)
            for row in found.itertuples()
        }
        return pd.Series(list(texts.values()), found.index, dtype=object)

    def regret(row: Any) -> str:
        return f"{row.difference:.3f}{'*' if row.low > 0 else ''}"

    def with_interval(row: Any) -> str:
        text = f"{row.difference:+.3f} [{row.low:+.3f}, {row.high:+.3f}]"
        return text + "*" * holds(row.corrected)

    loss = chosen["best"].groupby(HORIZON).report.mean()
    regrets = {x: difference(chosen[x], chosen["best"], HORIZON) for x in compared}
    columns = {x: marked(found, (x, "best"), regret) for x, found in regrets.items()}
    title = "regret (*: beyond its interval, †: one of the two is at the edge of its grid)"
    yield by_horizon(title, {"best's loss": loss} | columns)
    pairs = {pair: difference(*(chosen[x] for x in pair), HORIZON) for pair in VERSUS}
    ps = itertools.chain(*(found[DIFFERENCE[-1]] for found in pairs.values()))
    corrected = iter(holm(None if math.isnan(p) else p for p in ps))
    for found in pairs.values():
        found["corrected"] = list(itertools.islice(corrected, len(found)))
    columns = {" − ".join(x): marked(found, x, with_interval) for x, found in pairs.items()}
    title = "one less another (*: holds after Holm's correction for the table, † as above)"
    yield by_horizon(title, columns)
    settings = {
        name: pd.Series(
            {
                cell: f"{x.method} {x.average} at {x.lr}"
                + (f" ({edge[name][cell]})" if edge[name][cell] else "")
                for cell, x in found.items()
            }
        )
        for name, found in most.items()
    }
    yield by_horizon("what the most seeds chose, of a tie the first (edge of its grid)", settings)


def differences(losses: pd.DataFrame) -> Iterator[Listing]:
    def with_slow_average(one: str, other: str) -> pd.DataFrame:
        return difference(*(rows_of(losses, method, AUTO[1]) for method in (one, other)))

    compared = {
        "A pull less its twin": {x: with_slow_average(*pair) for x, pair in PULLS.items()},
        "auto less no pull": {"auto": with_slow_average(AUTO[0], "adamw")},
    }
    for title, found in compared.items():
        title += ", κ 0.6 of both: mean, median (settings where lower, the same, higher)"
        yield by_task(title, found, signs, nats=True)


def at_each_rate(losses: pd.DataFrame, tuned: pd.DataFrame) -> Listing:
    settings = (("adamw", "live"), AUTO, UNTUNED["EMA κ 0.6"])
    adamw, auto, ema = (rows_of(losses, *x) for x in settings)
    there, against = distance(losses, tuned), difference(auto, ema)
    regret, which = difference(auto, tuned).difference, chosen_by_most(tuned, CELL)
    rows = []
    for cell in against.index:
        at = [x.set_index(CELL).loc[[cell]] for x in (adamw, tuned, auto)]
        share = f"{regret[cell] / there[cell]:.0%}" if cell in there else ""
        task, steps, lr = cell
        setting = f"{which[cell].method} {which[cell].average}"
        compared = [None if math.isnan(x) else x for x in against.loc[cell]]
        rows.append(
            [
                task,
                str(steps),
                f"{lr:.3g}",
                *(x.report.mean() for x in at),
                setting,
                share,
                *compared,
            ]
        )
    names = ["AdamW, live", "best tuned", "auto", "which", "regret"]
    title = "auto at each rate; difference to the EMA κ 0.6"
    return Listing.of_differences(title, [*CELL, *names], rows)


def rivals_of(losses: pd.DataFrame) -> pd.DataFrame:
    """The tuned methods: all except `auto`, and rules for a gain that are no longer in the code."""
    return losses[~losses.method.str.contains("auto|[+]")]


def in_families(rivals: pd.DataFrame) -> dict[str, pd.DataFrame]:
    return {
        name: rivals[rivals.method.str.match("|".join(starts))] for name, starts in FAMILIES.items()
    }


def at_common_rates(losses: pd.DataFrame) -> pd.DataFrame:
    """The rows at the rates of each task's own grid, which all methods have."""
    rates = {(name, float(f"{lr:.3g}")) for name, task in ALL_TASKS.items() for lr in task.rates}
    is_common = [cell in rates for cell in zip(losses.task, losses.lr, strict=True)]
    return losses[is_common]


def tables(losses: pd.DataFrame) -> Iterator[Listing]:
    common = at_common_rates(losses)
    tuned = best_settings(rivals_of(common))
    yield from regrets(common, in_families(rivals_of(common)), tuned)
    rivals = rivals_of(losses)
    yield from rate_tuned(losses, rivals, in_families(rivals))
    yield from differences(losses)
    yield at_each_rate(common, tuned)


def write(out: Path, tables: Callable[[pd.DataFrame], Iterator[Listing]]) -> pd.DataFrame:
    """Write losses.csv with all runs of a folder, and tables.md; returns the runs."""
    losses = frame(written(out))
    wide = losses.pivot(index=list(Cell._fields), columns="average", values=["choose", "report"])
    wide.columns = [f"{average}:{half}" for half, average in wide.columns]
    wide.to_csv(out / "losses.csv")
    parts = [f"## {x.title}\n\n{x.markdown()}" for x in tables(losses)]
    (out / "tables.md").write_text("\n".join(parts), encoding="utf-8")
    return losses


if __name__ == "__main__":
    write(Path(sys.argv[1]), tables)
