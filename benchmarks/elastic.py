"""Four workers that meet every H steps beside DDP: loss and bytes, of the same tokens.

    python benchmarks/elastic.py results/elastic    # hours; skips what runs.jsonl has

The task is `finetune` of benchmarks/tasks.py. A worker takes 4 sequences a step, and DDP 16, with
all workers' gradients at each step. The workers of a training are threads of one process, whose
exchange is `paceline.Elastic`'s with a sum in place of the network's: a test holds it to the same
simulation as real workers. Bytes are what a worker gives to an all-reduce, in float32: the model at
each exchange, and the gradients at each step of DDP.

- ddp: AdamW, and pulled: PACE with c = 10, toward κ = 0.3
- local: every H steps all take the mean of their weights ("average", κ = 0, α = 1)
- easgd, diloco: around AdamW, as published
- average: PACE with the same pull, toward the common average

Each returns its weights or its center ("own") and an average of them with κ = 0.7 ("slow"). Rates
are half a decade apart. They are chosen on one half of the held-out data and losses are of the
other. The first seed tries four rates; the others the best of those and its neighbours. Rates are
added for all seeds until the best of their mean has a neighbour on both sides.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from tasks import BATCH, TASKS, WEIGHT_DECAY, finetune, fit, records
from torch import Tensor

from paceline import PACE, Elastic, PowerEMA
from paceline.study.statistics import EDGE, Listing, edges, paired
from paceline.train.methods import parse_method

WORKERS, STEPS = 4, 1000
EVERY = (1, 5, 20, 100, 500)
C, PULL, SLOW, LAST = 10.0, PowerEMA(0.3), PowerEMA(0.7), PowerEMA(0.0)
ELASTIC: dict[str, dict[str, Any]] = {
    "local": {"exchange": "average", "pull": 1.0},
    "easgd": {"exchange": "easgd"},
    "diloco": {"exchange": "diloco"},
    "average": {"exchange": "average"},
}
PULLED = ("pulled", "average")
VARIANTS = ("ddp", "pulled", *ELASTIC)
TASK = TASKS["finetune"]
KINDS = [(x, every) for x in VARIANTS for every in (EVERY if x in ELASTIC else (0,))]
AVERAGES = ("own", "slow")
FIRST_RATES = range(4)  # of the first seed, by their place


class Cell(NamedTuple):
    """One training."""

    variant: str
    every: int  # H; 0 of DDP
    lr: float
    seed: int


def rate(place: int) -> float:
    """The learning rate at a place of the grid: 0.00178 at 0, and half a decade more at 1."""
    return float(f"{10 ** (place / 2 - 2.75):.3g}")


class Crowd:
    """Workers in threads, which meet as ranks of a process group do."""

    def __init__(self, count: int) -> None:
        self.count, self.meeting = count, threading.Barrier(count)
        self.brought: list[Tensor] = [torch.empty(0)] * count

    def all_reduce(self, worker: int, x: Tensor, op: str) -> None:
        """Replace x by the sum, or another, of what all have brought, in the order of workers."""
        self.brought[worker] = x
        self.meeting.wait()
        stacked = torch.stack(self.brought)
        together = stacked.sum(0) if op == "SUM" else stacked.amax(0)
        self.meeting.wait()
        x.copy_(together)

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """What `work` returns for each worker."""

        def guarded(worker: int) -> Any:
            try:
                return work(worker)
            except BaseException:
                self.meeting.abort()  # the others would wait
                raise

        with ThreadPoolExecutor(self.count) as pool:
            return list(pool.map(guarded, range(self.count)))


class InCrowd(Elastic):
    """An Elastic whose other workers are threads of this process."""

    def __init__(self, crowd: Crowd, worker: int, *args: Any, **options: Any) -> None:
        self.crowd, self.worker, self.bytes = crowd, worker, 0
        super().__init__(*args, **options)

    @property
    def _workers(self) -> int:
        return self.crowd.count

    def _all_reduce(self, x: Tensor, op: str = "SUM") -> None:
        self.bytes += x.nbytes * (op == "SUM")
        self.crowd.all_reduce(self.worker, x, op)


def work(cell: Cell, steps: int, crowd: Crowd | None, worker: int = 0) -> dict[str, Any]:
    """One worker's training, or DDP's: losses of both halves by name, and bytes."""
    problem = finetune(1000 * worker + cell.seed, BATCH * (WORKERS if crowd is None else 1))
    optimizer: Any = PACE(
        problem.parameters,
        lr=cell.lr,
        weight_decay=WEIGHT_DECAY,
        pullback=C if cell.variant in PULLED else 0.0,
        averaging=PULL if cell.variant in PULLED else LAST,
        returns={"slow": SLOW},
        fused=True,
    )
    size = sum(p.nbytes for p in problem.parameters)
    if crowd is not None:
        optimizer = InCrowd(crowd, worker, optimizer, cell.every, **ELASTIC[cell.variant])
    schedule = parse_method("adamw:lr=1").make_scheduler(
        optimizer, round(TASK.warmup * steps), steps
    )
    fit(problem, optimizer, schedule, steps, TASK.clip)
    sent = size * steps if crowd is None else optimizer.bytes
    if worker:  # all have the same center
        return {"bytes": sent}
    found: dict[str, Any] = {"bytes": sent}
    with torch.no_grad():
        for name, average in (("own", "average"), ("slow", "slow")):
            with optimizer.averaged(average):
                found[name] = problem.judge()
    return found


def trained(steps: int, cell: Cell) -> tuple[Cell, dict[str, Any]]:
    """Run a training; losses are infinite after divergence."""
    if cell.every:
        crowd = Crowd(WORKERS)
        found = crowd.run(partial(work, cell, steps, crowd))[0]
    else:
        found = work(cell, steps, None)
    sent = found.pop("bytes")
    losses = {
        name: [round(x, 5) if math.isfinite(x) else math.inf for x in pair]
        for name, pair in found.items()
    }
    return cell, {**losses, "bytes": sent}


def written(path: Path) -> dict[Cell, dict[str, Any]]:
    """The trainings so far."""
    return {Cell(*cell): found for *cell, found in records(path)}


def lacking(done: dict[Cell, dict[str, Any]], seeds: int) -> list[Cell]:
    """The trainings to run next: those of the first rates, then those around the best ones."""
    asked = [Cell(*kind, rate(place), 0) for kind in KINDS for place in FIRST_RATES]
    if set(asked) <= done.keys():
        asked = []
        for kind, average in itertools.product(KINDS, AVERAGES):
            best = best_rate(done, kind, average, seeds)
            place = next(x for x in itertools.count(-20) if rate(x) >= best)
            near = [rate(place + x) for x in (-1, 0, 1)]
            asked += [Cell(*kind, lr, seed) for seed in range(seeds) for lr in near]
    return [cell for cell in sorted(set(asked), key=lambda x: x.seed) if cell not in done]


def best_rate(
    done: dict[Cell, dict[str, Any]], kind: tuple[str, int], average: str, seeds: int
) -> float:
    """The rate of the lowest mean loss to choose by, of those that most seeds have."""
    losses: dict[float, list[float]] = {}
    for cell, found in done.items():
        if cell[:2] == kind and cell.seed < seeds:
            losses.setdefault(cell.lr, []).append(found[average][0])
    most = max(map(len, losses.values()))
    return min((sum(x), lr) for lr, x in losses.items() if len(x) == most)[1]


def run(path: Path, steps: int, seeds: int, workers: int) -> None:
    """Run the trainings that the file lacks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    done = written(path)
    torch.set_num_threads(1)  # as in the workers
    finetune(0)  # its start is made once, before many want it
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(workers, torch.set_num_threads, (1,)) as pool, path.open("a") as file:
        while todo := lacking(done, seeds):
            print(f"{len(todo)} trainings to run", flush=True)
            for cell, found in pool.imap_unordered(partial(trained, steps), todo):
                print(json.dumps([*cell, found]), file=file, flush=True)
                done[cell] = found


def tables(done: dict[Cell, dict[str, Any]], seeds: int) -> str:
    """Loss of each variant at each H at its best rate, less that of DDP, and the bytes."""
    lines: list[list[Any]] = []
    ddp: dict[str, dict[int, float]] = {}
    for kind, average in itertools.product(KINDS, AVERAGES):
        tried = [cell for cell in done if cell[:2] == kind]
        if not tried:
            continue
        lr = best_rate(done, kind, average, seeds)
        found = {cell.seed: done[cell] for cell in tried if cell.lr == lr and cell.seed < seeds}
        losses = {seed: x[average][1] for seed, x in found.items()}
        beside = paired(losses, ddp.setdefault(average, losses))  # DDP is the first kind
        edge = edges({"lr": lr}, [{"lr": cell.lr} for cell in tried])
        megabytes = f"{found[0]['bytes'] / 1e6:.4g} MB"
        lines.append([f"{kind[0]}: {average}", str(kind[1] or "DDP"), megabytes, f"{lr:g}", edge])
        lines[-1] += [fmean(losses.values())]
        lines[-1] += beside if kind[0] != "ddp" else [None] * 4
    columns = ["workers: returned", "H", "bytes", "rate", EDGE, "loss"]
    return Listing.of_differences("", columns, lines).markdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder for runs.jsonl and tables.md")
    parser.add_argument("--steps", type=int, default=STEPS, help="of each worker, and of DDP")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread a worker")
    given = parser.parse_args()
    path = given.out / "runs.jsonl"
    run(path, given.steps, given.seeds, given.workers)
    (given.out / "tables.md").write_text(tables(written(path), given.seeds))


if __name__ == "__main__":
    main()
