"""Tables and verdicts of the blind trial, by the rules in results/trial/PROTOCOL.md.

    python benchmarks/trial_tables.py results/trial

Writes losses.csv with all runs of the folder, tables.md and the picture, rates.svg and rates.png.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from regret import FOUND, READ_OUTS, SATURATED
from regret_tables import (
    CELL,
    HORIZON,
    best_settings,
    chosen_by_most,
    difference,
    edges_of,
    rows_of,
    write,
)
from tasks import BLIND_RATES

from paceline.study.rates import rate_picture
from paceline.study.statistics import EDGE, Listing, holds, paired

AVERAGES = tuple(READ_OUTS)
TEN, AUTO = "pace:pullback=10:kappa=0.3", "pace:pullback=auto:kappa=0.3"
POWER, TWIN = "adamw:power:kappa=0.3", "adamw:twin:twin_gain=0.5:kappa=0.3"
TEN_PACE, ONE, FOUND_RATE, OWN = (
    "PACE, c = 10",
    "PACE, gain 1",
    "PACE, gain 1, rate found",
    "PACE, auto",
)


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
    TEN_PACE: Family((TEN,)),
    ONE: Family((SATURATED,)),
    FOUND_RATE: Family((FOUND,)),
    OWN: Family((AUTO,)),
}
RIVALS = ("AdamW, best schedule", "EMA", "power or twin, and average", "Schedule-Free")
CLAIMS = {  # one family less another
    "1": [(TEN_PACE, rival) for rival in RIVALS],
    "2": [(ONE, "power, and average")],
    "4": [(FOUND_RATE, ONE), (FOUND_RATE, "AdamW, best schedule")],
    "5b": [(OWN, TEN_PACE)],
}
LOWER = (
    "the difference is below 0 after Holm's correction",
    lambda mean, high, p: mean < 0 and holds(p),
)
MORE = (
    "the difference is above 0 after Holm's correction",
    lambda mean, high, p: mean > 0 and holds(p),
)
AT_MOST = "the upper end of the interval is below {}"
RULES = {  # of each row of a claim: what must hold of its mean, upper end and corrected p-value
    "1": (LOWER,) * len(RIVALS),
    "2": (LOWER,),
    "3": (MORE,) * len(RIVALS),
    "4": ((AT_MOST.format(0.02), lambda mean, high, p: high < 0.02), LOWER),
    "5a": ((AT_MOST.format(0.01), lambda mean, high, p: high < 0.01),) * len(BLIND_RATES),
    "5b": ((AT_MOST.format(0.02), lambda mean, high, p: high < 0.02),),
}
RATES = tuple(float(f"{lr:.3g}") for lr in BLIND_RATES)
NEAR = 0.05  # nats above the best of all, up to which a rate counts as near it


def over_tasks(these: pd.Series, those: pd.Series | None = None) -> list[float | None]:
    """Mean over tasks of a difference, its interval and its p-value."""
    others = those if those is not None else 0 * these
    return paired(dict(enumerate(these)), dict(enumerate(others)))


def compared(chosen: dict[str, pd.DataFrame]) -> Iterator[Listing]:
    """Claims 1, 2, 4 and 5b: over tasks, then for each task over seeds."""
    for claim, pairs in CLAIMS.items():
        found = {
            f"{one} − {other}": difference(chosen[one], chosen[other], HORIZON)
            for one, other in pairs
        }
        means = [[x, len(each), *over_tasks(each.difference)] for x, each in found.items()]
        yield Listing.of_differences(f"Claim {claim}, over tasks", ["", "tasks"], means)
        rows = [
            [name, task, *row]
            for name, each in found.items()
            for (task, _), row in zip(each.index, each.to_numpy().tolist(), strict=True)
        ]
        yield Listing.of_differences(f"Claim {claim}, for each task", ["", "task"], rows)


def excess(losses: pd.DataFrame, best: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Each family's loss at each rate above the best of all of its task: tasks × rates.

    At each rate it is the best of the family's methods and averages, chosen by the other seeds.
    """
    lowest = best.groupby("task").report.mean()
    found = {}
    for name, family in FAMILIES.items():
        if name != FOUND_RATE:
            own = best_settings(family.of(losses)).groupby(["task", "lr"]).report.mean().unstack()
            found[name] = own[list(RATES)].sub(lowest, axis=0)
    return found


def near(above: dict[str, pd.DataFrame]) -> Iterator[Listing]:
    """The picture's numbers, and claim 3."""
    columns = ["", *(f"{lr:g}" for lr in RATES)]
    rows = [[name, *map(float, x.mean())] for name, x in above.items()]
    yield Listing("Loss above the best of all, mean over tasks, by learning rate", columns, rows)
    counts = {name: (x <= NEAR).sum(axis=1) for name, x in above.items()}
    rows = [[x, float(counts[x].mean()), *over_tasks(counts[TEN_PACE], counts[x])] for x in RIVALS]
    title = f"Claim 3: rates within {NEAR} nats of the best of all; {TEN_PACE} "
    title += f"({counts[TEN_PACE].mean():.2f} of {len(RATES)}) less each"
    yield Listing.of_differences(title, ["", "rates"], rows)


def untuned(losses: pd.DataFrame) -> Listing:
    """Claim 5a: auto less the EMA, κ = 0.6 of both, at each rate, over tasks."""
    found = difference(*(rows_of(losses, method, "k60") for method in (AUTO, "adamw")))
    by_rate = found.difference.groupby("lr")
    rows = [[f"{lr:g}", len(x), *over_tasks(x)] for lr, x in by_rate]
    title = "Claim 5a: auto less the EMA, κ 0.6 of both, at each rate, over tasks"
    return Listing.of_differences(title, ["lr", "tasks"], rows)


def dropped_in(losses: pd.DataFrame) -> Listing:
    """Pulls less the EMA at the EMA's best rate, κ = 0.7 of all, over tasks. Not registered."""
    ema = rows_of(losses, "adamw", "k70")
    best = ema.groupby(CELL).choose.mean().groupby("task").idxmin()
    rows = []
    for name, method in ((ONE, SATURATED), (TEN_PACE, TEN), (OWN, AUTO)):
        found = difference(rows_of(losses, method, "k70"), ema).difference.loc[list(best)]
        above = f"{(found > 0).sum()} of {len(found)}"
        rows.append([name, above, *over_tasks(found)])
    title = "Not registered: at the EMA's best rate, less the EMA, κ 0.7 of both, over tasks"
    return Listing.of_differences(title, ["", "tasks above"], rows)


def settings(chosen: dict[str, pd.DataFrame], tried: dict[str, pd.DataFrame]) -> Listing:
    """What the most seeds chose, with the mean loss."""
    rows = []
    for name, own in chosen.items():
        edge, means = edges_of(own, tried[name], HORIZON).edge, own.groupby(HORIZON).report.mean()
        for cell, setting in chosen_by_most(own, HORIZON).items():
            said = f"{setting.method} {setting.average}"
            rows.append([cell[0], name, said, f"{setting.lr:g}", edge[cell], float(means[cell])])
    columns = ["task", "family", "setting", "lr", EDGE, "loss"]
    return Listing("What the most seeds chose", columns, sorted(rows, key=lambda row: row[0]))


def verdicts(listings: list[Listing]) -> Listing:
    """Whether each part of each claim holds, by the protocol's rules."""
    rows = []
    for claim, rules in RULES.items():
        listing = next(
            x for x in listings if x.title.startswith((f"Claim {claim}, over", f"Claim {claim}: "))
        )
        for (said, rule), (name, *_, mean, _, high, p) in zip(rules, listing.rows, strict=True):
            known = mean is not None and high is not None
            verdict = ("holds" if rule(mean, high, p) else "does not hold") if known else "open"
            rows.append([claim, name, said, verdict])
    return Listing("Verdicts", ["claim", "", "holds if", "verdict"], rows)


PICTURE = {  # a line each
    "AdamW, cosine": Family(("adamw:cosine",), ("live",)),
    "EMA of AdamW": FAMILIES["EMA"],
    "Schedule-Free": FAMILIES["Schedule-Free"],
    "power schedule and EMA": FAMILIES["power, and average"],
    "PACE, c = 10": FAMILIES[TEN_PACE],
    "PACE, auto": FAMILIES[OWN],
}


def picture(losses: pd.DataFrame, path: Path) -> list[str]:
    """Draw the loss above the best of all over the rate, each method with its best average.

    Returns:
        The sentences that the losses bear out.
    """
    lowest = best_settings(losses[losses.method != FOUND], HORIZON).groupby("task").report.mean()
    parts = []
    for name, family in PICTURE.items():
        own = best_settings(family.of(losses))
        own = own[own.lr.isin(RATES)].assign(loss=own.report - own.task.map(lowest))
        mean = own.groupby(["lr", "seed"]).loss.mean().reset_index()
        parts.append(mean.assign(method=name))
    label = f"loss above the best of all,\nnats a token, mean of {len(lowest)} tasks"
    return rate_picture(pd.concat(parts), path, label=label)


def tables(losses: pd.DataFrame) -> Iterator[Listing]:
    losses = losses.copy()
    found = losses.method == FOUND  # another rate for each seed: their median stands for all
    losses.loc[found, "lr"] = losses[found].groupby(HORIZON).lr.transform("median")
    tried = {name: family.of(losses) for name, family in FAMILIES.items()}
    chosen = {name: best_settings(x, HORIZON) for name, x in tried.items()}
    best = best_settings(losses[losses.method != FOUND], HORIZON)
    decisive = [*compared(chosen), *near(excess(losses, best)), untuned(losses)]
    yield from (verdicts(decisive), *decisive, dropped_in(losses), settings(chosen, tried))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for sentence in picture(write(folder, tables), folder / "rates"):
        print(sentence)
