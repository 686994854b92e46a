"""How many held-out data a choice of the average needs, and what rebuilding and rounding cost.

    python benchmarks/choice.py results/choice          # skips what runs.jsonl has
    python benchmarks/choice_tables.py results/choice

Trains on the tasks of the blind trial with a pull of gain 1 at every rate. Each training keeps
seven averages to its end, and 12 snapshots of two in float32 and in bfloat16, from which eight are
rebuilt as `paceline choose` does. One is chosen on so many blocks of 32 tokens, drawn at random
from half of the held-out ones, and its loss is that of the other half.
"""

import argparse
import itertools
import json
import math
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from regret import READ_OUTS, SATURATED, optimizer_of
from regret_tables import THREE
from tasks import BLIND, Problem, fit, records
from torch import Tensor

from paceline import PowerEMA, snapshot_steps
from paceline.snapshots import DTYPES, save_averages
from paceline.train.choose import KAPPAS
from paceline.train.methods import parse_method
from paceline.train.rebuild import read_snapshots, snapshot_files, weights_of
from paceline.train.weighted import weighted_sum

RETURNS = {**READ_OUTS, "slow": "ema:kappa=0.9"}
KEPT = (PowerEMA(0.3), PowerEMA(0.9))  # what averages are rebuilt from
SEEDS, SNAPSHOTS = range(2), 12
BLOCKS, DRAWS = (1, 2, 4, 8, 16, 32, 64, 128), 50
FIXED, TARGET = "k70", PowerEMA(0.7)
REBUILT = {torch.float32: "eight, rebuilt", torch.bfloat16: "eight, rebuilt from bfloat16"}
CHOICES = {"three, kept": THREE, "seven, kept": tuple(READ_OUTS)}


class Cell(NamedTuple):
    """One training."""

    task: str
    lr: float
    seed: int


def trained(cell: Cell) -> tuple[Cell, dict[str, Any]]:
    """Train, and choose on so many blocks: see `chosen`; and the errors of rebuilding κ = 0.7."""
    task = BLIND[cell.task]
    [steps], problem = task.horizons, task.start(cell.seed)
    assert problem.model is not None
    method = parse_method(f"{SATURATED}:lr={cell.lr}")
    optimizer: Any = optimizer_of(method, problem.parameters, 0, RETURNS)
    schedule = method.make_scheduler(optimizer, round(task.warmup * steps), steps)
    with TemporaryDirectory() as place:
        folders = {dtype: Path(place, str(dtype)) for dtype in DTYPES}
        times = snapshot_steps(steps, SNAPSHOTS)

        def keep(step: int) -> None:
            for dtype, folder in folders.items() if step in times else ():
                save_averages(folder, problem.model, optimizer, dtype=dtype)

        fit(problem, optimizer, schedule, steps, task.clip, keep)
        with torch.no_grad():
            return cell, _measured(problem, optimizer, folders, cell.seed)


def _measured(
    problem: Problem, optimizer: Any, folders: dict[torch.dtype, Path], seed: int
) -> dict[str, Any]:
    assert problem.model is not None
    assert problem.blocks is not None
    parameters = dict(problem.model.named_parameters())
    live = {name: p.clone() for name, p in parameters.items()}
    losses, found = {}, {}
    for name in READ_OUTS:
        with optimizer.averaged(name):
            losses[name] = problem.blocks()
            if name == FIXED:
                exact = {key: p.clone() for key, p in parameters.items()}
    far = sum(float((exact[key] - live[key]).square().sum()) for key in live)
    sets = dict(CHOICES)
    for dtype, folder in folders.items():
        kept = [x for x in read_snapshots(snapshot_files([folder])) if x.snapshot.rule in KEPT]
        checkpoints = [one.checkpoint for one in kept]
        for rule in map(PowerEMA, KAPPAS):
            weights = weights_of(kept, rule, limit=math.inf)
            for key, p in parameters.items():
                p.copy_(weighted_sum(key, checkpoints, weights(key).weights, torch.float32))
            losses[f"{rule}, {dtype}"] = problem.blocks()
            if rule == TARGET:
                missed = sum(
                    float((p - exact[key]).square().sum()) for key, p in parameters.items()
                )
                found[f"error, {REBUILT[dtype]}"] = math.sqrt(missed / far)
        sets[REBUILT[dtype]] = tuple(f"{PowerEMA(kappa)}, {dtype}" for kappa in KAPPAS)
    best = min(float(x[1].mean()) for name, x in losses.items())
    return found | {
        name: chosen({key: losses[key] for key in keys}, losses[FIXED][1].mean(), best, seed)
        for name, keys in sets.items()
    }


def chosen(losses: dict[str, Tensor], fixed: float, best: float, seed: int) -> list[list[float]]:
    """Choose among averages on so many blocks, for each of `BLOCKS`: means over draws.

    Args:
        losses: of each average, (2, blocks): to choose by and to report.
        fixed: the reported loss of the average that is not chosen.
        best: the lowest reported loss of all.
        seed: of the draws.

    Returns:
        For each number of blocks the reported loss of the chosen less `fixed`, and less `best`.
    """
    generator = torch.Generator().manual_seed(seed)
    choose, report = torch.stack([*losses.values()]).unbind(1)
    found = []
    for number in BLOCKS:
        drawn = [torch.randperm(choose.shape[1], generator=generator) for _ in range(DRAWS)]
        took = [int(choose[:, order[:number]].mean(1).argmin()) for order in drawn]
        loss = float(report.mean(1)[took].mean())
        found.append([round(loss - float(fixed), 6), round(loss - best, 6)])
    return found


def written(folder: Path) -> dict[Cell, dict[str, Any]]:
    """The trainings so far."""
    return {Cell(*cell): found for *cell, found in records(folder / "runs.jsonl")}


def cells() -> Iterator[Cell]:
    """All trainings; those of a seed before those of the next."""
    for seed, (name, task) in itertools.product(SEEDS, BLIND.items()):
        yield from (Cell(name, lr, seed) for lr in task.rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder for the runs")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread")
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    for task in BLIND.values():
        task.start(0)  # what it is made of is made once, before many want it
    todo = [cell for cell in cells() if cell not in written(given.out)]
    spawn = multiprocessing.get_context("spawn")
    with (
        spawn.Pool(given.workers, torch.set_num_threads, (1,)) as pool,
        (given.out / "runs.jsonl").open("a") as file,
    ):
        for cell, found in pool.imap_unordered(trained, todo):
            print(json.dumps([*cell, found]), file=file, flush=True)


if __name__ == "__main__":
    main()
