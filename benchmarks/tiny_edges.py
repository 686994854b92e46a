"""The tiny fine-tunings beyond the edges of their grids: higher rates, larger κ and smaller gains.

    python benchmarks/tiny_edges.py results/tiny            # 1 hour of two cores
    python benchmarks/tiny_edges.py results/tiny --tables   # from edges.csv

Some settings that figure 1 chooses are at an edge of the grid. They are trained again with seed 0,
and settings beyond beside them, on one machine. A setting beyond with a lower loss is trained with
the seeds of figure 1, and so is the choice. It reads figure-01.csv, and writes edges.csv, edges.md
and a folder `edges` with the trainings; those that are there are not run again.
"""

import argparse
import itertools
from collections.abc import Iterable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from rich.console import Console

from paceline.files import whole, write_text
from paceline.paper.plans import (
    FALLING,
    GAINS,
    ONE_GAIN,
    PULL_KAPPA,
    RETURN_KAPPA,
    TUNING,
    ScaleRuns,
    maps,
    methods_on,
    scale_of,
)
from paceline.study.cells import Cell, Task, cells
from paceline.study.ledger import Outcomes, open_ledger, work_off
from paceline.study.options import SharedOptions
from paceline.study.statistics import EDGE, Listing, edges, paired
from paceline.train.methods import Method
from paceline.train.terminal import quiet

SCALE = scale_of("tiny")
PACE = "PACE, constant"
# Of PACE at each rate: the c of each κ.
PULLS: dict[float, dict[float, tuple[float, ...]]] = {
    1e-2: {0.3: (30.0,)},
    1.8e-2: {0.3: (30.0,), 0.5: (30.0,)},
    3.2e-2: {0.5: (30.0, 100.0, 300.0), 0.7: (100.0,)},
    5.6e-2: {0.5: (30.0, 100.0), 0.7: (100.0,)},
    1e-1: {0.5: (100.0,), 0.7: (100.0,)},
}
# Of the power schedule at each rate: its κ.
POWERS: dict[float, tuple[float, ...]] = {
    1e-2: (0.3,),
    1.8e-2: (0.5,),
    3.2e-2: (0.5, 0.7),
    5.6e-2: (0.5, 0.7),
    1e-1: (0.5, 0.7),
}
# Of one gain at each rate: the gains.
ONE_GAINS: dict[float, tuple[float, ...]] = {
    3e-3: (0.25, 0.5),
    1e-2: (0.25, *GAINS),
    1.8e-2: (1.0,),
}
OPTIONS = ["name", "schedule", "gain", "lr", "pullback", "kappa", "return_kappa"]
LOSSES = ["returned_loss", "selection_loss"]
[SEED] = TUNING


class Family(NamedTuple):
    """A method of figure 1 on one model."""

    task: Task
    name: str  # in figure 1
    methods: list[Method]


def settings(task: Task) -> dict[str, list[Method]]:
    """Of each method the choice of figure 1, and settings about and beyond it."""
    on = partial(methods_on, task)
    pulled = [
        on("pace", lr=(lr,), pullback=cs, kappa=(kappa,))
        for lr, by_kappa in PULLS.items()
        for kappa, cs in by_kappa.items()
    ]
    power = [on("ema:power", lr=(lr,), kappa=kappas) for lr, kappas in POWERS.items()]
    gains = [
        on("pace:gain=scalar", lr=(lr,), pullback=gains, kappa=(PULL_KAPPA,))
        for lr, gains in ONE_GAINS.items()
    ]
    lists = {PACE: pulled, FALLING: power, ONE_GAIN: gains}
    return {name: list(itertools.chain(*own)) for name, own in lists.items()}


def slower(methods: Iterable[Method]) -> list[Method]:
    """The same, returned with a slower average."""
    return [x.model_copy(update={"return_kappa": RETURN_KAPPA}) for x in methods]


def families() -> Iterator[Family]:
    """The methods of which figure 1 has a choice at an edge on some model, on each model."""
    for task in SCALE.models:
        for name, methods in settings(task).items():
            yield Family(task, name, methods)
            if name != PACE:  # its slower average has its best inside the figure's grid
                yield Family(task, f"{name}, slower average", slower(methods))


class Losses:
    """The losses of trainings, and the choices of figure 1.

    Args:
        table: a row for each method and seed.
        figure: figure-01.csv.
    """

    def __init__(self, table: pd.DataFrame, figure: pd.DataFrame) -> None:
        self.table, self.figure = table, figure

    def by_seed(self, task: Task, method: Method, column: str) -> dict[int, float]:
        """The losses in a column, by seed."""
        rows = self.table[self.table.setting == task.name]
        rows = rows[(rows.label == method.label) & (rows.lr == method.lr)]
        return dict(zip(rows.seed, rows[column], strict=True))

    def chosen_by(self, task: Task, method: Method) -> float | None:
        """The loss that settings are chosen by; None before the training has ended."""
        return self.by_seed(task, method, "selection_loss").get(SEED)

    def choice(self, family: Family) -> Method:
        """What figure 1 chose."""
        rows = self.figure[self.figure.setting == f"{family.task.name}: {family.name}"]
        label, lr = rows.iloc[0][["label", "lr"]]
        [found] = [x for x in family.methods if x.label == label and x.lr == lr]
        return found

    def best(self, family: Family) -> Method | None:
        """The method with the lowest loss; None before all have ended."""
        losses = {x.written: self.chosen_by(family.task, x) for x in family.methods}
        if None in losses.values():
            return None
        return min(family.methods, key=lambda x: (losses[x.written], x != self.choice(family)))

    def pairs(self) -> Iterator[tuple[Family, Method, Method]]:
        """Each family that has ended, figure 1's choice and the best."""
        for family in families():
            if (best := self.best(family)) is not None:
                yield family, self.choice(family), best


class EdgePlan:
    """All settings with the tuning seed, then over seeds those that replace a choice."""

    name = "beyond the edges, tiny"

    def __init__(self, figure: pd.DataFrame) -> None:
        self.figure = figure

    def wanted(self, outcomes: Outcomes) -> list[Cell]:
        """All cells to run."""
        found = []
        for task in SCALE.models:
            own = list(itertools.chain(*settings(task).values()))
            found += cells(task, [*own, *slower(own)], TUNING)
        for family, *pair in Losses(table_of(outcomes), self.figure).pairs():
            if pair[0] != pair[1]:
                found += cells(family.task, pair, SCALE.seeds_of(family.task))
        return list({cell.key: cell for cell in found}.values())


def table_of(outcomes: Outcomes) -> pd.DataFrame:
    """The losses at the end of each finished training."""
    columns = ["setting", "label", *OPTIONS, "seed", *LOSSES]
    rows = [
        {column: row.get(column) for column in columns}
        for result in outcomes.finished.values()
        for row in result.rows
        if row["step"] == row["steps"]
    ]
    found = pd.DataFrame(rows, columns=columns)
    found[LOSSES] = found[LOSSES].astype(float).fillna(float("inf"))  # after divergence
    return found.sort_values(["setting", "label", "lr", "seed"], ignore_index=True)


# ---- tables -------------------------------------------------------------------------------------


class Grids:
    """The grids of the figures."""

    @cached_property
    def methods(self) -> dict[str, list[Method]]:
        """The methods that settings of each model are chosen from."""
        [first, *_] = maps(ScaleRuns(SCALE, Outcomes({}, {})))
        found: dict[str, list[Method]] = {}
        for cell in first:
            found.setdefault(cell.task.name, []).extend(cell.run.methods)
        return found

    def edge(self, family: Family, method: Method) -> str:
        """The options that are at an edge of the figure's grid and the settings beyond it."""
        own = method.row
        tried = [x.row for x in (*self.methods[family.task.name], *family.methods)]
        same = ("name", "return_kappa", "every")
        return edges(own, [x for x in tried if all(x[key] == own[key] for key in same)])


def _said(method: Method) -> str:
    return f"{method.label} at {method.lr:g}"


def tables(losses: Losses) -> Iterator[Listing]:
    """Figure 1's choices beside the best of the wider grids, and the loss at each rate."""
    grids, rows, replaced = Grids(), [], []
    for family, choice, best in losses.pairs():
        task = family.task
        name = f"{task.name.removeprefix('tiny-sft on ')}: {family.name}"
        loss, lowest = (losses.chosen_by(task, x) for x in (choice, best))
        beyond = "" if best == choice else _said(best)
        rows.append([name, _said(choice), loss, beyond, lowest, grids.edge(family, best)])
        if beyond:
            pair = [losses.by_seed(task, x, "returned_loss") for x in (best, choice)]
            own, others = ({s: x for s, x in side.items() if s != SEED} for side in pair)
            seeds = len(own.keys() & others.keys())
            replaced.append([f"{name}: {beyond}", seeds, *paired(own, others)])
    title = "Loss on the half to choose by, seed 0, figure 1's choice and the best of wider grids"
    yield Listing(title, ["method", "choice", "loss", "lower beyond", "lowest", EDGE], rows)
    if replaced:
        title = "The setting beyond less the choice, over seeds, on the half to report"
        yield Listing.of_differences(title, ["method", "seeds"], replaced)

    rates, rows = sorted({*PULLS, *POWERS, *ONE_GAINS}), []
    for family in families():
        row: list[object] = [f"{family.task.name.removeprefix('tiny-sft on ')}: {family.name}"]
        for rate in rates:
            found = [losses.chosen_by(family.task, x) for x in family.methods if x.lr == rate]
            row.append(min((x for x in found if x is not None), default=None))
        rows.append(row)
    title = "Loss on the half to choose by, seed 0, the best of these settings at each rate"
    yield Listing(title, ["method", *(f"{x:g}" for x in rates)], rows)


def main() -> None:
    """Train what is missing, unless only tables are asked for, and write the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tables", action="store_true")
    asked = parser.parse_args()
    figure = pd.read_csv(asked.folder / "figure-01.csv")
    losses, runs = asked.folder / "edges.csv", asked.folder / "edges"
    if not asked.tables:
        quiet()
        with open_ledger(SharedOptions(), EdgePlan(figure), runs) as ledger:
            work_off(ledger, None, Console(), runs)
            ledger.look()
            finished = ledger.outcomes.finished
            keys = [cell.key for cell in ledger.wanted if cell.key in finished]
            if len(keys) < len(ledger.wanted):
                raise SystemExit(f"{len(ledger.wanted) - len(keys)} trainings have not finished")
            table = table_of(Outcomes({key: finished[key] for key in keys}, {}))
        with whole(losses) as written:
            table.to_csv(written, index=False, lineterminator="\n", float_format="%.6g")
    found = tables(Losses(pd.read_csv(losses), figure))
    parts = [f"## {x.title}\n\n{x.markdown()}" for x in found]
    write_text(asked.folder / "edges.md", "\n".join(parts))


if __name__ == "__main__":
    main()
