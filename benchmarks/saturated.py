"""Why a saturated pull has a lower loss than its twin: one training loop, one change at a time.

    nice -n 10 python benchmarks/saturated.py results/saturated   # 23 minutes of one core

With the gain 1 the pull and its twin are one method: AdamW at the rate β_t·lr, which moves y. They
differ in where the gradient is taken. `lead` is that place, in undamped steps ahead of y:

    y_t = y_{t-1} - β_t·lr·s_t,      x_{t+1} = y_t - lead·(1-β_t)·lr·s_t,      gradient at x_{t+1}

Lead 1 is the saturated pull with x for its live weights, lead 0 the twin. The returned model is the
average of x with κ = 0.7. Each training adds a line to losses.csv; what is there is not run again.
"""

import argparse
import csv
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from scipy import stats
from tasks import WEIGHT_DECAY, Problem, finetune, scratch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from paceline import PowerEMA

STEPS = 600
PULL, RETURNED = PowerEMA(0.3), PowerEMA(0.7)

SEEDS = range(5)


class Task(NamedTuple):
    """A training problem of benchmarks/tasks.py."""

    start: Callable[[int], Problem]
    warmup: float  # share of the steps
    rates: tuple[float, ...]  # near the best of pull and twin
    more: tuple[float, ...]  # for these two, to see that the best is among them


TASKS = {
    "finetune": Task(finetune, 0.05, (1e-2, 1.8e-2), (5.6e-3, 3.2e-2)),
    "scratch": Task(scratch, 0.2, (5.6e-3, 1e-2), (1.8e-2,)),
}


class Variant(NamedTuple):
    """One change to the saturated pull."""

    lead: float = 1.0  # steps ahead of y at which the gradient is taken
    random: bool = False  # each coordinate of the lead has a random sign
    momentum: float = 0.9  # Adam's first beta
    begins: float = 0.0  # the lead holds from this share of the training
    ends: float = 1.0  # to this one, and is 0 otherwise
    split: str = ""  # "m" or "v": the moment with gradients from x; the other's are from y
    more: bool = False  # whether it is trained at more rates


CELL = ["task", "variant", "lr", "seed"]
HALVES = ("choose", "report")
NOISE = 0.01  # standard deviation of the noise on the weights that measures how flat a minimum is
VARIANTS = {
    "twin (lead 0)": Variant(lead=0, more=True),
    "pull (lead 1)": Variant(more=True),
    "lead 0.5": Variant(lead=0.5),
    "lead 2": Variant(lead=2),
    "lead -1": Variant(lead=-1),
    "random signs": Variant(random=True),
    "first third": Variant(ends=1 / 3),
    "last two thirds": Variant(begins=1 / 3),
    "only v ahead": Variant(split="v"),
    "only m ahead": Variant(split="m"),
    "no momentum, twin": Variant(lead=0, momentum=0, more=True),
    "no momentum, pull": Variant(momentum=0, more=True),
}


def train(
    problem: Problem,
    variant: Variant,
    lr: float,
    steps: int,
    warmup: int,
    seed: int = 0,
    other: Problem | None = None,
) -> dict[str, Tensor]:
    """Train, and return the weights that a run ends with.

    Args:
        problem: where the gradients at x are taken.
        variant: the change.
        lr: after the warm-up.
        steps: number of steps.
        warmup: steps of a linear warm-up.
        seed: of the random signs.
        other: a second copy of the problem, for the gradients at y. Needed for a split alone.

    Returns:
        "returned", the average of x; "of y", the average of y; and "y".
    """
    signs = torch.Generator().manual_seed(seed)

    def gradient(problem: Problem, weights: Tensor) -> Tensor:
        vector_to_parameters(weights, problem.parameters)
        problem.loss().backward()
        nn.utils.clip_grad_norm_(problem.parameters, 1.0)
        found = torch.cat([p.grad.flatten() for p in problem.parameters])
        for p in problem.parameters:
            p.grad = None
        return found

    y = parameters_to_vector(problem.parameters).detach().clone()
    x, returned, of_y = y.clone(), y.clone(), y.clone()
    m, v = torch.zeros_like(y), torch.zeros_like(y)
    for t in range(1, steps + 1):
        at_x = gradient(problem, x)
        at_y = gradient(other, y) if variant.split and other else at_x
        m.lerp_(at_y if variant.split == "v" else at_x, 1 - variant.momentum)
        v.lerp_((at_y if variant.split == "m" else at_x) ** 2, 0.001)
        root = (v / (1 - 0.999**t)).sqrt() + 1e-8
        step = m / (1 - variant.momentum**t) / root + WEIGHT_DECAY * x
        step *= lr * min(1.0, (t - 1) / warmup)
        beta = PULL.weight(t)
        y = y - beta * step
        led = variant.begins * steps < t <= variant.ends * steps
        lead = variant.lead if led else 0.0
        if variant.random:
            step *= torch.randint(2, step.shape, generator=signs) * 2 - 1
        x = y - lead * (1 - beta) * step
        returned.lerp_(x, RETURNED.weight(t))
        of_y.lerp_(y, RETURNED.weight(t))
    return {"returned": returned, "of y": of_y, "y": y}


def measure(task: str, name: str, lr: float, seed: int) -> dict[str, float]:
    """Train once; losses in nats on the half to choose by and the half to report."""
    variant, problem = VARIANTS[name], TASKS[task].start(seed)
    other = TASKS[task].start(seed) if variant.split else None
    found = train(problem, variant, lr, STEPS, round(TASKS[task].warmup * STEPS), seed, other)

    @torch.no_grad()
    def judge(weights: Tensor) -> list[float]:
        vector_to_parameters(weights, problem.parameters)
        return problem.judge()

    losses = {key: judge(weights) for key, weights in found.items()}
    noise = torch.Generator().manual_seed(seed)
    draws = [torch.randn(found["y"].shape, generator=noise) for _ in range(4)]
    shaken = [judge(found["returned"] + NOISE * draw)[1] for draw in draws]
    row = {
        f"{key}:{half}": pair[i] for key, pair in losses.items() for i, half in enumerate(HALVES)
    }
    return row | {"rise": sum(shaken) / len(shaken) - losses["returned"][1]}


def run(path: Path) -> None:
    """Run the trainings that the file lacks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    done = set()
    if path.exists():
        done = set(pd.read_csv(path)[CELL].itertuples(index=False, name=None))
    for seed, (name, variant), (task, setting) in itertools.product(
        SEEDS, VARIANTS.items(), TASKS.items()
    ):
        for lr in setting.rates + setting.more * variant.more:
            if (cell := (task, name, lr, seed)) in done:
                continue
            row = dict(zip(CELL, cell, strict=True)) | {
                key: round(x, 5) for key, x in measure(*cell).items()
            }
            with path.open("a", newline="") as file:
                writer = csv.DictWriter(file, list(row))
                if not file.tell():
                    writer.writeheader()
                writer.writerow(row)


def interval(differences: pd.Series) -> str:
    """Mean and 95 % interval by Student's t over the seeds; a dash for a method against itself."""
    if not differences.any():
        return "–"
    low, high = stats.ttest_1samp(differences, 0).confidence_interval()
    return f"{differences.mean():+.4f} [{low:+.4f}, {high:+.4f}]"


def tables(path: Path) -> str:
    """Each variant at its best rate and at each rate, against the twin and the pull.

    Rates are chosen by the mean over the seeds on one half of the held-out data; losses are from
    the other half, and differences are within a seed.
    """
    frame, lines = pd.read_csv(path), []
    for task in TASKS:
        runs = frame[frame.task == task].set_index(["variant", "lr", "seed"]).sort_index()
        means = runs["returned:choose"].groupby(["variant", "lr"]).mean()
        best = {name: means[name].idxmin() for name in VARIANTS}
        twin, pull = (
            runs.loc[name, best[name]]["returned:report"]
            for name in ("twin (lead 0)", "pull (lead 1)")
        )
        lines += [f"## {task}: each at its best rate\n"]
        lines += ["| variant | rate | loss | less the twin's | less the pull's | of y | rise |"]
        lines += ["|---|---:|---:|---:|---:|---:|---:|"]
        for name, lr in best.items():
            found = runs.loc[name, lr]
            loss = found["returned:report"]
            cells = [name, f"{lr:g}", f"{loss.mean():.4f}", interval(loss - twin)]
            cells += [interval(loss - pull), f"{found['of y:report'].mean():.4f}"]
            lines.append(f"| {' | '.join([*cells, f'{found.rise.mean():.4f}'])} |")
        lines += [f"\n## {task}: at each rate\n", "| variant | rate | loss | less the twin's |"]
        lines += ["|---|---:|---:|---:|"]
        for name, lr in means.index:
            loss = runs.loc[name, lr]["returned:report"]
            difference = interval(loss - runs.loc["twin (lead 0)", lr]["returned:report"])
            lines.append(f"| {name} | {lr:g} | {loss.mean():.4f} | {difference} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder for losses.csv and tables.md")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    run(out / "losses.csv")
    (out / "tables.md").write_text(tables(out / "losses.csv"))


if __name__ == "__main__":
    main()
