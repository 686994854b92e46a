"""What the scaling rule of averages does: one task at batches × 1, 2, 4 and 8, of the same data.

    python benchmarks/batch_scaling.py results/batch-scaling    # skips what runs.jsonl has

All batches see the same sequences in the same order, and take 1/k of the steps. The learning rate
is √k times as high (Malladi et al., arXiv:2205.10287); β1, β2 and ε stay. Averages are kept as they
are at the first batch, and as `Averaging.scaled(k)` makes them, beside one training. Of a pull the
average stays, or is scaled, or is scaled with c divided by k, which keeps its gain over the data.

Each training writes a line to runs.jsonl as it ends, so that the command can be stopped and started
again. Rates are chosen on one half of the held-out data and losses are of the other.
"""

import argparse
import itertools
import json
import math
import multiprocessing
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from tasks import BATCH, TASKS, WEIGHT_DECAY, finetune, fit, records

from paceline import EMA, PACE, PowerEMA
from paceline.study.statistics import EDGE, Listing, edges, paired
from paceline.train.methods import parse_method

FACTORS = (1, 2, 4, 8)
STEPS = 1200  # at the first batch
RETURNED = {"power": PowerEMA(0.7), "halflife": EMA(half_life=STEPS / 12)}
PULL, C = PowerEMA(0.3), 10.0
VARIANTS = ("watched", "pulled", "pulled, scaled", "pulled, scaled, c/k")
COMPARED = (*((x, "watched") for x in VARIANTS[1:3]), (VARIANTS[2], "pulled"), VARIANTS[:1:-1])
TASK = TASKS["finetune"]
RATES = (*TASK.rates[1:], 0.0178, 0.0316)  # at the first batch; a pull's best is above the task's


class Cell(NamedTuple):
    """One training."""

    factor: int  # k
    variant: str
    lr: float  # at the first batch
    seed: int


def trained(steps: int, cell: Cell) -> tuple[Cell, dict[str, list[float]]]:
    """Run a training of so many steps at the first batch; losses are infinite after divergence."""
    k, problem = cell.factor, finetune(cell.seed, cell.factor * BATCH)
    pulled = cell.variant.startswith("pulled")
    scaled = {f"{name}scaled": rule.scaled(k) for name, rule in RETURNED.items()}
    optimizer = PACE(
        problem.parameters,
        lr=cell.lr * math.sqrt(k),
        weight_decay=WEIGHT_DECAY,
        pullback=(C / k if "c/k" in cell.variant else C) if pulled else 0.0,
        averaging=PULL.scaled(k) if "scaled" in cell.variant else PULL,
        returns={**RETURNED, **scaled},
        fused=True,
    )
    warmup = round(TASK.warmup * steps / k)
    schedule = parse_method("adamw:lr=1").make_scheduler(optimizer, warmup, steps // k)
    fit(problem, optimizer, schedule, steps // k, TASK.clip)
    with torch.no_grad():
        found = {"live": problem.judge()}
        for name in (*RETURNED, *scaled):
            with optimizer.averaged(name):
                found[name] = problem.judge()
    return cell, {
        name: [round(x, 5) if math.isfinite(x) else math.inf for x in pair]
        for name, pair in found.items()
    }


def written(path: Path) -> dict[Cell, dict[str, list[float]]]:
    """The trainings so far: average -> losses to choose by and to report."""
    return {Cell(*cell): losses for *cell, losses in records(path)}


def run(path: Path, steps: int, seeds: int, workers: int) -> None:
    """Run the trainings that the file lacks; those of a seed before those of the next."""
    path.parent.mkdir(parents=True, exist_ok=True)
    done = written(path)
    asked = itertools.product(range(seeds), FACTORS, VARIANTS, RATES)
    cells = [Cell(k, variant, float(f"{lr:.3g}"), seed) for seed, k, variant, lr in asked]
    # At the first batch the scaled pulls are the pull.
    todo = [cell for cell in cells if cell not in done and (cell.factor > 1 or "," not in cell[1])]
    print(f"{len(todo)} trainings to run", flush=True)
    torch.set_num_threads(1)  # as in the workers
    finetune(0)  # its start is made once, before many want it
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(workers, torch.set_num_threads, (1,)) as pool, path.open("a") as file:
        for cell, losses in pool.imap_unordered(partial(trained, steps), todo):
            print(json.dumps([*cell, losses]), file=file, flush=True)


def tables(done: dict[Cell, dict[str, list[float]]]) -> str:
    """What scaling changed: of the average that is returned, and of the one that is pulled toward.

    Each at its best rate, chosen on the other half of the held-out data.
    """
    rows = [
        {**cell._asdict(), "average": name, "choose": pair[0], "report": pair[1]}
        for cell, losses in done.items()
        for name, pair in losses.items()
    ]
    keys = ["variant", "average", "factor", "lr", "seed"]
    frame = pd.DataFrame(rows).set_index(keys).sort_index()
    means = frame.choose.groupby(keys[:-1]).mean()
    tried = [{"lr": lr} for lr in means.index.unique("lr")]
    rates = {at: own.idxmin()[-1] for at, own in means.groupby(keys[:-2])}
    lines = []
    for (variant, average, k), lr in rates.items():
        if average in RETURNED:
            scaled = f"{average}scaled"
            lr_scaled = rates[variant, scaled, k]
            pair = [frame.report.loc[variant, scaled, k, lr_scaled]]
            pair.append(frame.report.loc[variant, average, k, lr])
            edge = "; ".join(dict.fromkeys(edges({"lr": x}, tried) for x in (lr, lr_scaled)))
            means_of = [float(x.mean()) for x in (pair[1], pair[0])]
            at = [f"{variant}: {average}", f"× {k}", f"{lr:g}", f"{lr_scaled:g}", edge.strip("; ")]
            lines.append([*at, *means_of, *paired(*map(dict, pair))])
    columns = ["training: average", "batch", "rate", "rate, scaled", EDGE, "loss", "scaled"]
    returned = Listing.of_differences("The average that is returned", columns, lines)

    lines = []
    for k, (one, other) in itertools.product(FACTORS, COMPARED):
        both = [(variant, "powerscaled", k) for variant in (one, other)]
        if all(at in rates for at in both):
            pair = [frame.report.loc[(*at, rates[at])] for at in both]
            edge = "; ".join(dict.fromkeys(edges({"lr": rates[at]}, tried) for at in both))
            at = [f"{one}, less {other}", f"× {k}", *(f"{rates[at]:g}" for at in both)]
            lines.append([*at, edge.strip("; "), *paired(*map(dict, pair))])
    columns = ["training", "batch", "rate", "rate of the other", EDGE]
    pulls = Listing.of_differences("The average that is pulled toward", columns, lines)
    return "\n".join(f"## {x.title}\n\n{x.markdown()}" for x in (returned, pulls))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder for runs.jsonl and tables.md")
    parser.add_argument("--steps", type=int, default=STEPS, help="at the first batch, in eights")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread")
    given = parser.parse_args()
    if given.steps < 1 or given.steps % max(FACTORS):
        parser.error(f"--steps must be a multiple of {max(FACTORS)}, got {given.steps}")
    path = given.out / "runs.jsonl"
    run(path, given.steps, given.seeds, given.workers)
    (given.out / "tables.md").write_text(tables(written(path)))


if __name__ == "__main__":
    main()
