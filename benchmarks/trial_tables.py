"""Tables and verdicts of the blind trial, by the rules in results/trial/PROTOCOL.md.

    python benchmarks/trial_tables.py results/trial

Writes losses.csv with all runs of the folder, and tables.md.
"""

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from regret import FOUND, SATURATED
from regret_tables import HORIZON, best_settings, difference, most_chosen, rows_of, write
from tasks import BLIND_RATES

from paceline.study.statistics import DIFFERENCE, Listing, interval

AVERAGES = ("k20", "k30", "k50", "k60", "k70", "k85", "k95")
TEN, AUTO = "pace:pullback=10:kappa=0.3", "pace:pullback=auto:kappa=0.3"
POWER, TWIN = "adamw:power:kappa=0.3", "adamw:twin:twin_gain=0.5:kappa=0.3"


class Family(NamedTuple):
    """Methods and averages, of which the best is chosen, at the best rate."""

    methods: tuple[str, ...]
    averages: tuple[str, ...] = AVERAGES

    def of(self, losses: pd.DataFrame) -> pd.DataFrame:
        """Its rows."""
        return losses[losses.method.isin(self.methods) & losses.average.isin(self.averages)]


FAMILIES = {
    "AdamW, best schedule": Family(("adamw", "adamw:cosine", "adamw:wsd"), ("live",)),
    "EMA": Family(("adamw",)),
    "decay and average": Family(("adamw:cosine", "adamw:wsd")),
    "power or twin, and average": Family((POWER, TWIN)),
    "power, and average": Family((POWER,)),
    "Schedule-Free": Family(("schedule-free",), ("own",)),
    "PACE, c = 10": Family((TEN,)),
    "PACE, gain 1": Family((SATURATED,)),
    "PACE, gain 1, rate found": Family((FOUND,)),
    "PACE, auto": Family((AUTO,)),
}
COMPARED = {  # claim: one family, and another that it is compared with
    "1a": ("PACE, c = 10", "AdamW, best schedule"),
    "1b": ("PACE, c = 10", "EMA"),
    "1c": ("PACE, c = 10", "power or twin, and average"),
    "1d": ("PACE, c = 10", "Schedule-Free"),
    "2": ("PACE, gain 1", "power, and average"),
    "4a": ("PACE, gain 1, rate found", "PACE, gain 1"),
    "4b": ("PACE, gain 1, rate found", "AdamW, best schedule"),
    "5b": ("PACE, auto", "PACE, c = 10"),
}
NEAR = 0.05  # nats above the best of all, up to which a rate counts as near it


def by_task(these: pd.DataFrame, those: pd.DataFrame) -> pd.DataFrame:
    """Mean differences over seeds of what was chosen for each task, with intervals."""
    return difference(these, those, HORIZON)


def over_tasks(differences: pd.Series) -> list[float]:
    """Mean over tasks, and its interval."""
    return [differences.mean(), *(interval(list(differences)) or (math.nan, math.nan))]


def compared(chosen: dict[str, pd.DataFrame]) -> Iterator[Listing]:
    """Claims 1, 2, 4 and 5b: for each task over seeds, and over tasks."""
    rows, means = [], []
    for claim, (one, other) in COMPARED.items():
        found = by_task(chosen[one], chosen[other])
        rows += [
            [claim, task, *row]
            for (task, _), row in zip(found.index, found.to_numpy(), strict=True)
        ]
        means.append([claim, f"{one} − {other}", len(found), *over_tasks(found.difference)])
    yield Listing("Over tasks: one less another", ["claim", "", "tasks", *DIFFERENCE], means)
    yield Listing("For each task, over seeds", ["claim", "task", *DIFFERENCE], rows)


def excess(losses: pd.DataFrame, best: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Each family's loss at each rate above the best of all of its task: tasks × rates.

    At each rate it is the best of the family's methods and averages, chosen by the other seeds.
    """
    lowest = best.groupby("task").report.mean()
    found = {}
    for name, family in FAMILIES.items():
        if name != "PACE, gain 1, rate found":
            own = best_settings(family.of(losses))
            at = own.groupby(["task", "lr"]).report.mean().unstack()
            found[name] = at.sub(lowest, axis=0)[[float(f"{x:.3g}") for x in BLIND_RATES]]
    return found


def near(above: dict[str, pd.DataFrame]) -> Iterator[Listing]:
    """Claim 3 and the picture's numbers."""
    columns = ["", *(f"{lr:g}" for lr in BLIND_RATES)]
    rows = [[name, *x.mean()] for name, x in above.items()]
    yield Listing("Loss above the best of all, mean over tasks, by learning rate", columns, rows)
    counts = {name: (x <= NEAR).sum(axis=1) for name, x in above.items()}
    ours = counts["PACE, c = 10"]
    rows = [
        [name, float(x.mean()), *(over_tasks(ours - x) if name != "PACE, c = 10" else [None] * 3)]
        for name, x in counts.items()
    ]
    title = f"Rates within {NEAR} nats of the best of all; PACE, c = 10, less each"
    yield Listing(title, ["", "rates", *DIFFERENCE], rows)


def untuned(losses: pd.DataFrame) -> Listing:
    """Claim 5a: auto less the EMA, κ = 0.6 of both, at each rate, over tasks."""
    found = difference(*(rows_of(losses, method, "k60") for method in (AUTO, "adamw")))
    by_rate = found.difference.groupby("lr")
    rows = [[f"{lr:g}", len(x), *over_tasks(x)] for lr, x in by_rate]
    return Listing(
        "auto less the EMA, κ 0.6, at each rate, over tasks", ["lr", "tasks", *DIFFERENCE], rows
    )


def settings(chosen: dict[str, pd.DataFrame]) -> Listing:
    """What the most seeds chose, with the mean loss."""
    names = list(chosen)
    means = pd.DataFrame({name: x.groupby("task").report.mean() for name, x in chosen.items()})
    said = pd.DataFrame({name: most_chosen(x, ["task"], rate=True) for name, x in chosen.items()})
    rows: list[list[Any]] = [
        [task, name, said[name][task], means[name][task]] for task in means.index for name in names
    ]
    return Listing("Chosen settings", ["task", "family", "setting", "loss"], rows)


def tables(losses: pd.DataFrame) -> Iterator[Listing]:
    losses = losses.copy()
    losses.loc[losses.method == FOUND, "lr"] = 0.0  # not chosen, and another for each seed
    chosen = {name: best_settings(x.of(losses), HORIZON) for name, x in FAMILIES.items()}
    best = best_settings(losses[losses.method != FOUND], HORIZON)
    yield from compared(chosen)
    yield from near(excess(losses, best))
    yield untuned(losses)
    yield settings(chosen)


if __name__ == "__main__":
    write(Path(sys.argv[1]), tables)
