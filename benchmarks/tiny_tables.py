"""Comparisons that the tiny figures' own tables leave out: with a slower average, and under WSD.

    python benchmarks/tiny_tables.py results/tiny

Reads figures 1, 14 and 17 of the folder, their tables and their numbers, and writes tables.md.
"""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from paceline.study.statistics import EDGE, Listing, paired

TASK = "tiny-sft on "
OWN = "PACE, constant"
SLOWER = f"{OWN}, slower average"
ONE_GAIN = "PACE, one gain, slower average"
SIDES = ("PACE", "other")
FALLING = "EMA, power or twin schedule, slower average"


class Chosen(NamedTuple):
    """What a figure's table says of a method at its best, and its losses."""

    edge: str
    losses: dict[int, float]  # seed -> nats a token after the last step


Choices = dict[tuple[str, str, str], Chosen]  # model, method, rate


def chosen_in(folder: Path, figure: str) -> Choices:
    """The methods of a figure's table."""
    runs = pd.read_csv(folder / f"figure-{figure}.csv")
    runs = runs[runs.step == runs.step.max()]
    page, found = (folder / f"figure-{figure}.md").read_text("utf-8"), {}
    for line in page.splitlines():
        cells = [x.strip() for x in line.strip("|").split("|")]
        if len(cells) != 7 or not cells[4].isdigit():
            continue
        name, label, lr, edge, *_ = cells
        model, _, method = name.partition(": ")
        own = runs[runs.setting.isin((name, model)) & (runs.label == label)]
        own = own[own.lr == float(lr)]
        found[model, method, lr] = Chosen(edge, dict(zip(own.seed, own.returned_loss, strict=True)))
    return found


def best_of(found: Choices, methods: Iterable[str]) -> dict[str, dict[str, Chosen]]:
    """Of each model these methods, at one rate each."""
    models: dict[str, dict[str, Chosen]] = {}
    for (model, method, _), chosen in found.items():
        if method in methods:
            models.setdefault(model, {})[method] = chosen
    return models


def differences(title: str, places: dict[str, dict[str, Chosen]], one: str) -> Listing:
    """One method less each of the others, at each place."""
    rows = []
    for place, methods in places.items():
        for rival, other in methods.items():
            if rival == one:
                continue
            pair = methods[one], other
            edge = "; ".join(f"{x}: {y.edge}" for x, y in zip(SIDES, pair, strict=True) if y.edge)
            seeds = len(pair[0].losses.keys() & pair[1].losses.keys())
            rows.append(
                [
                    f"{place.removeprefix(TASK)}: less {rival}",
                    edge,
                    seeds,
                    *paired(*(x.losses for x in pair)),
                ]
            )
    return Listing.of_differences(title, ["", EDGE, "seeds"], rows)


def tables(folder: Path) -> Iterator[Listing]:
    """The tables of a folder's figures."""
    found = chosen_in(folder, "01")
    rivals = ("AdamW", "EMA", FALLING, "Schedule-Free", OWN)
    for one in (ONE_GAIN, SLOWER):
        yield differences(f"{one}, each at its best", best_of(found, (one, *rivals)), one)

    found = chosen_in(folder, "14")
    for one in (ONE_GAIN, SLOWER):
        rates: dict[str, dict[str, Chosen]] = {}
        for (model, method, lr), chosen in found.items():
            if method in (one, "EMA", FALLING, "Schedule-Free"):
                rates.setdefault(f"{model} at {lr}", {})[method] = chosen
        yield differences(f"{one}, at each rate", rates, one)

    found = chosen_in(folder, "17")
    methods = ("PACE, wsd", "AdamW, wsd", "EMA, wsd")
    yield differences("PACE under WSD", best_of(found, methods), methods[0])


def main() -> None:
    folder = Path(sys.argv[1])
    parts = [f"## {x.title}\n\n{x.markdown()}" for x in tables(folder)]
    (folder / "tables.md").write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
