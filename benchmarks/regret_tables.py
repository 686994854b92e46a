"""Tables of the runs of benchmarks/regret.py: regrets and differences of methods over seeds.

    python benchmarks/regret_tables.py results/regret

Writes losses.csv with all runs of the folder, and tables.md.
"""

import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
from regret import SATURATED, SEEDS, Cell, written
from tasks import TASKS

from paceline.study.statistics import DIFFERENCE, Listing, interval

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
    losses = losses[seeds == len(SEEDS)]
    others = losses.groupby(setting).choose.transform("sum") - losses.choose
    return losses.loc[others.groupby([losses[key] for key in (*over, "seed")]).idxmin()]


def difference(these: pd.DataFrame, those: pd.DataFrame, over: list[str] = CELL) -> pd.DataFrame:
    """Mean difference of reported losses over seeds, with its interval.

    A cell is left out if a seed is missing, or if both diverged.
    """
    one, other = (x.set_index([*over, "seed"]).report for x in (these, those))
    rows = {
        cell: (x.mean(), *(interval(list(x)) or (math.nan, math.nan)))
        for cell, x in (one - other).dropna().groupby(over)
        if len(x) == len(SEEDS)
    }
    index = pd.MultiIndex.from_tuples(rows, names=over)
    return pd.DataFrame(rows.values(), index=index, columns=DIFFERENCE)


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
        return f"{x.difference.median():.3f}, {x.difference.max():.3f}"

    def share(x: pd.DataFrame) -> str:
        shares = (x.difference / there).dropna()
        return f"{shares.median():.0%}, {shares.max():.0%} ({len(shares)})" if len(shares) else ""

    untuned = {name: rows_of(losses, *setting) for name, setting in UNTUNED.items()}
    untuned |= {name: chosen_after(losses, *setting) for name, setting in CHOSEN_AFTER.items()}
    chosen = {name: best_settings(x) for name, x in families.items()}
    for title, compared in {"Not tuned": untuned, "Tuned at each rate": chosen}.items():
        found = {name: difference(x, tuned) for name, x in compared.items()}
        title += ": regret, median and worst, "
        yield by_task(title + "in the loss", found, loss, nats=True)
        title += "as shares of the distance (of so many settings)"
        yield by_task(title, found, share, nats=False)


def rate_tuned(
    losses: pd.DataFrame, rivals: pd.DataFrame, families: dict[str, pd.DataFrame]
) -> Iterator[Listing]:
    tuned = best_settings(rivals, HORIZON)
    compared = {name: rows_of(losses, *UNTUNED[name]) for name in ("auto", "EMA κ 0.6")} | families
    chosen = {"best": tuned} | {name: best_settings(x, HORIZON) for name, x in compared.items()}

    def by_horizon(title: str, columns: dict[str, pd.Series]) -> Listing:
        found = pd.DataFrame(columns, index=tuned.groupby(HORIZON).size().index).fillna("")
        rows = [[task, str(steps), *texts] for (task, steps), *texts in found.itertuples()]
        return Listing("Tuned, the rate too: " + title, [*HORIZON, *columns], rows)

    def said(these: str, those: str, say: Callable[..., str]) -> pd.Series:
        found = difference(chosen[these], chosen[those], HORIZON)
        return pd.Series([say(*row) for row in found.to_numpy()], found.index, dtype=object)

    def regret(x: float, low: float, high: float) -> str:
        return f"{x:.3f}{'*' if low > 0 else ''}"

    def with_interval(x: float, low: float, high: float) -> str:
        return f"{x:+.3f} [{low:+.3f}, {high:+.3f}]"

    loss = tuned.groupby(HORIZON).report.mean()
    columns = {"best's loss": loss} | {name: said(name, "best", regret) for name in compared}
    yield by_horizon("regret (*: beyond its interval)", columns)
    yield by_horizon(
        "one less another", {f"{x} − {y}": said(x, y, with_interval) for x, y in VERSUS}
    )
    settings = {name: most_chosen(x, HORIZON, rate=True) for name, x in chosen.items()}
    yield by_horizon("what the most seeds chose, of a tie the first", settings)


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
    regret, which = difference(auto, tuned).difference, most_chosen(tuned, CELL)
    rows = []
    for cell in against.index:
        at = [x.set_index(CELL).loc[[cell]] for x in (adamw, tuned, auto)]
        share = f"{regret[cell] / there[cell]:.0%}" if cell in there else ""
        task, steps, lr = cell
        said = [which[cell], share, *against.loc[cell]]
        rows.append([task, str(steps), f"{lr:.3g}", *(x.report.mean() for x in at), *said])
    means, said = ["AdamW, live", "best tuned", "auto"], ["which", "regret"]
    names = [*means, *said, *DIFFERENCE]
    return Listing("auto at each rate; difference to the EMA κ 0.6", [*CELL, *names], rows)


def rivals_of(losses: pd.DataFrame) -> pd.DataFrame:
    """The tuned methods: all except `auto`, and rules for a gain that are no longer in the code."""
    return losses[~losses.method.str.contains("auto|[+]")]


def in_families(rivals: pd.DataFrame) -> dict[str, pd.DataFrame]:
    return {
        name: rivals[rivals.method.str.match("|".join(starts))] for name, starts in FAMILIES.items()
    }


def tables(losses: pd.DataFrame) -> Iterator[Listing]:
    rivals = rivals_of(losses)
    families = in_families(rivals)
    tuned = best_settings(rivals)
    yield from regrets(losses, families, tuned)
    yield from rate_tuned(losses, rivals, families)
    yield from differences(losses)
    yield at_each_rate(losses, tuned)


def most_chosen(chosen: pd.DataFrame, over: list[str], rate: bool = False) -> pd.Series:
    """The setting that most seeds chose."""
    said = chosen.method + " " + chosen.average
    if rate:
        said += " at " + chosen.lr.astype(str)
    return said.groupby([chosen[key] for key in over]).agg(lambda x: x.mode()[0])


def write(out: Path, tables: Callable[[pd.DataFrame], Iterator[Listing]]) -> None:
    """Write losses.csv with all runs of a folder, and tables.md with the tables made of them."""
    losses = frame(written(out))
    wide = losses.pivot(index=list(Cell._fields), columns="average", values=["choose", "report"])
    wide.columns = [f"{average}:{half}" for half, average in wide.columns]
    wide.to_csv(out / "losses.csv")
    parts = [f"## {x.title}\n\n{x.markdown()}" for x in tables(losses)]
    (out / "tables.md").write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]), tables)
