"""What it is worth to choose the average after the training, and how many data that needs.

    python benchmarks/choice_tables.py results/choice

Writes tables.md from the runs of the two trials, and from those of benchmarks/choice.py. Each
training kept seven averages. One is chosen on half of the held-out data, and its loss is that of
the other half.
"""

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from choice import BLOCKS, REBUILT, Cell
from choice import CHOICES as CHOSEN_FROM
from choice import written as chosen_runs
from regret import READ_OUTS, SATURATED, written
from regret_tables import HORIZON, THREE, chosen_after, frame
from tasks import CONTEXT
from trial_tables import AUTO, TEN, over_tasks

from paceline.study.statistics import Listing

RESULTS = Path(__file__).parents[1] / "results"
TRIALS = {  # title -> folder, and the tasks
    "Blind trial": ("trial", ""),
    "Finetune, scratch and SmolLM2's last layers": ("regret", "finetune|scratch|smollm2"),
}
METHODS = {
    "AdamW, constant rate": "adamw",
    "PACE, c = 10": TEN,
    "PACE, gain 1": SATURATED,
    "PACE, auto": AUTO,
}
FIXED = "κ 0.7, fixed"
CHOICES = {
    FIXED: ("k70",),
    "κ 0.6, fixed": ("k60",),
    "best of κ 0.5, 0.6, 0.7": THREE,
    "best of seven": tuple(READ_OUTS),
}
RUN = [*HORIZON, "lr", "seed"]


def best_rates(losses: pd.DataFrame, method: str) -> pd.DataFrame:
    """The trainings of a method at each task's best rate, by κ = 0.7 on the half to choose by."""
    own = losses[losses.method == method]
    means = own[own.average == "k70"].groupby([*HORIZON, "lr"]).choose.mean()
    best = {cell[:2]: cell[2] for cell in means.groupby(HORIZON).idxmin()}
    at = pd.Series([best[cell] for cell in zip(own.task, own.steps, strict=True)], own.index)
    return own[own.lr == at]


def compared(losses: pd.DataFrame, where: str, *, tuned: bool) -> Listing:
    """Each choice: its loss above the best average of each run, and less that of κ = 0.7.

    Over the seeds and rates of a task, then over tasks.
    """
    rows = []
    for name, method in METHODS.items():
        own = best_rates(losses, method) if tuned else losses[losses.method == method]
        by_choice = {
            choice: chosen_after(own, method, averages).set_index(RUN).report
            for choice, averages in CHOICES.items()
        }
        seven = own[own.average.isin(CHOICES["best of seven"])]
        lowest = seven.set_index(RUN).report.groupby(RUN).min()
        for choice, found in by_choice.items():
            regret = (found - lowest).groupby(HORIZON).mean()
            less = (found - by_choice[FIXED]).groupby(HORIZON).mean()
            against = over_tasks(less) if choice != FIXED else [None] * 4
            rows.append([name, choice, len(regret), float(regret.mean()), *against])
    at = "at the best rate" if tuned else "over all rates"
    columns = ["", "returned", "tasks", "above the run's best"]
    return Listing.of_differences(f"{where}, {at}; less κ 0.7", columns, rows)


def by_data(runs: dict[Cell, dict[str, Any]], best: dict[str, float] | None) -> Listing:
    """Each choice on so many tokens, over the seeds and rates of a task, then over tasks.

    Args:
        runs: of benchmarks/choice.py.
        best: the only rate of each task that counts; None: all do.
    """
    rows = []
    for name, (at, number) in itertools.product(
        (*CHOSEN_FROM, *REBUILT.values()), enumerate(BLOCKS)
    ):
        by_task: dict[str, list[list[float]]] = {}
        for cell, found in runs.items():
            if best is None or cell.lr == best[cell.task]:
                by_task.setdefault(cell.task, []).append(found[name][at])
        less, above = pd.DataFrame({k: np.mean(x, 0) for k, x in by_task.items()}).to_numpy()
        row = [name, number * CONTEXT, len(less), float(above.mean())]
        rows.append([*row, *over_tasks(pd.Series(less))])
    columns = ["", "tokens to choose by", "tasks", "above the run's best"]
    where = "over all rates" if best is None else "at the best rate"
    return Listing.of_differences(f"Choice by few data, {where}; less κ 0.7", columns, rows)


def errors(runs: dict[Cell, dict[str, Any]]) -> Listing:
    """Of κ = 0.7 as it was rebuilt, as a share of its distance from the live weights."""
    found = {name: [x[f"error, {name}"] for x in runs.values()] for name in REBUILT.values()}
    rows = [[name, len(x), float(np.median(x)), max(x)] for name, x in found.items()]
    return Listing("Error of κ 0.7, rebuilt", ["", "trainings", "median", "largest"], rows)


def tables() -> Iterator[Listing]:
    if runs := chosen_runs(RESULTS / "choice"):
        trial = best_rates(frame(written(RESULTS / "trial")), SATURATED)
        best = trial.groupby("task").lr.first().to_dict()
        yield by_data(runs, None)
        yield by_data(runs, best)
        yield errors(runs)
    for where, (folder, tasks) in TRIALS.items():
        losses = frame(written(RESULTS / folder))
        losses = losses[losses.task.str.match(tasks)]
        for tuned in (False, True):
            yield compared(losses, where, tuned=tuned)


if __name__ == "__main__":
    parts = [f"## {x.title}\n\n{x.markdown()}" for x in tables()]
    (Path(sys.argv[1]) / "tables.md").write_text("\n".join(parts), encoding="utf-8")
