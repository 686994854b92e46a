"""Made-up results of the figures' cells."""

import math
import random

from paceline.study.cells import Result, Task
from paceline.train.recipe import Recipe, read_recipe

STEPS = (0, 200, 400, 600)


def task(name, recipe, start=None, **changes):
    begun = None if start is None else Recipe(**read_recipe(start))
    return Task(name, Recipe(**{**read_recipe(recipe), **changes}), begun)


def loss_of(method, seed):
    """A landscape: the best rate is 3e-3, the best c 1, and slower averages are better."""
    off = abs(math.log10(method.lr / 3e-3)) * 0.2
    off += 0.3 if method.get("pullback") is None else 0.05 * abs(math.log10(method.get("pullback")))
    off -= 0.1 * (method.get("return_kappa") or method.kappa or 0)
    return 3 + off + random.Random(f"{method.written}{seed}").random() * 0.01


def made_up(cell, loss=loss_of):
    """What a training might have given."""
    curves = []
    for method in cell.run.methods:
        end = loss(method, cell.run.seed)
        curve = []
        for step in STEPS:
            fall = end + 2 * math.exp(-step / 100)
            point = {"step": step, "train_loss": fall, "live_loss": fall + 0.1}
            point |= {"returned_loss": fall, "selection_loss": fall + 0.05}
            if method.pulls and step:
                point |= {"gain_mean": 0.25, "clipped": 0.5}
            curve.append(point)
        curves.append(curve)
    facts = {"setting": cell.task.name, "cell": cell.key, "steps": STEPS[-1]}
    pulled = {"gain_mean": 0.25, "clipped": 0.5} if cell.trajectory.pulls else {}
    log = [{"step": step, "loss": 3.0, **pulled} for step in range(20, 601, 20)]
    return Result([{**facts, **row} for row in cell.run.rows(curves, 1.0, 256)], log)


def work_off(plan, outcomes, most=10**6):
    """Do what a plan wants, in its order; whether all has ended."""
    while left := [c for c in plan.wanted(outcomes) if c.key not in outcomes.ended]:
        for cell in left:
            if not most:
                return False
            outcomes.finished[cell.key] = made_up(cell)
            most -= 1
    return True
