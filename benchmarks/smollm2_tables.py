"""Tables of the runs on all of SmolLM2-135M.

    python benchmarks/smollm2_tables.py results/smollm2

Writes losses.csv with all runs of the folder, tables.md and the picture, rates.svg and rates.png.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
from regret import SATURATED
from regret_tables import HORIZON, best_settings, chosen_by_most, difference, edges_of, write
from trial_tables import AUTO, OWN, POWER, Family

from paceline.study.rates import rate_picture
from paceline.study.statistics import EDGE, Listing

SMALL = "pace:pullback=0.03:kappa=0.3"  # the paper's c
FAMILIES = {
    "AdamW, last weights": Family(("adamw",), ("live",)),
    "AdamW, cosine": Family(("adamw:cosine",), ("live",)),
    "EMA": Family(("adamw",)),
    "power and EMA": Family((POWER,)),
    "Schedule-Free": Family(("schedule-free",), ("own",)),
    "PACE, c = 0.03, κ 0.7": Family((SMALL,), ("k70",)),
    "PACE, c = 0.03": Family((SMALL,)),
    "PACE, gain 1, κ 0.7": Family((SATURATED,), ("k70",)),
    "PACE, gain 1": Family((SATURATED,)),
    OWN: Family((AUTO,)),
}
OURS = ("PACE, c = 0.03", "PACE, gain 1", OWN)
RIVALS = ("AdamW, cosine", "EMA", "power and EMA", "Schedule-Free")
PICTURE = (*RIVALS, "PACE, c = 0.03", "PACE, gain 1")


def at_each_rate(chosen: dict[str, pd.DataFrame]) -> Listing:
    """Mean losses over seeds: methods × rates."""
    rates = sorted({lr for x in chosen.values() for lr in x.lr})
    means = {name: x.groupby("lr").report.mean() for name, x in chosen.items()}
    rows = [[name, *(x.get(lr) for lr in rates)] for name, x in means.items()]
    return Listing("Loss at each learning rate", ["", *(f"{lr:g}" for lr in rates)], rows)


def at_the_same_rate(chosen: dict[str, pd.DataFrame]) -> Listing:
    """PACE less the EMA at each rate."""
    found = {one: difference(chosen[one], chosen["EMA"]) for one in OURS}
    rows = [
        [f"{one} − EMA at {lr:g}", *values.tolist()]
        for one, x in found.items()
        for lr, values in zip(x.index.get_level_values("lr"), x.to_numpy(), strict=True)
    ]
    return Listing.of_differences("PACE less the EMA, at each rate", [""], rows)


def at_the_best(losses: pd.DataFrame) -> Iterator[Listing]:
    """Each family at its best rate and average, and PACE less the others."""
    tried = {name: family.of(losses) for name, family in FAMILIES.items()}
    chosen = {name: best_settings(x, HORIZON) for name, x in tried.items()}
    rows = []
    for name, own in chosen.items():
        (setting,) = chosen_by_most(own, HORIZON).values()
        (edge,) = edges_of(own, tried[name], HORIZON).edge
        rows.append([name, f"{setting.lr:g}", setting.average, edge, float(own.report.mean())])
    yield Listing("Each at its best rate", ["", "lr", "average", EDGE, "loss"], rows)
    rows = [
        [
            f"{one} − {other}",
            *difference(chosen[one], chosen[other], HORIZON).to_numpy()[0].tolist(),
        ]
        for one in OURS
        for other in RIVALS
    ]
    yield Listing.of_differences("PACE less the others, each at its best rate", [""], rows)


def tables(losses: pd.DataFrame) -> Iterator[Listing]:
    chosen = {name: best_settings(x.of(losses)) for name, x in FAMILIES.items()}
    yield at_each_rate(chosen)
    yield from at_the_best(losses)
    yield at_the_same_rate(chosen)


def picture(losses: pd.DataFrame, path: Path) -> list[str]:
    """Draw the loss over the rate, and return the sentences that the losses bear out."""
    parts = [
        best_settings(FAMILIES[name].of(losses)).assign(method=name)[
            ["method", "lr", "seed", "report"]
        ]
        for name in PICTURE
    ]
    return rate_picture(pd.concat(parts).rename(columns={"report": "loss"}), path)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for sentence in picture(write(folder, tables), folder / "rates"):
        print(sentence)
