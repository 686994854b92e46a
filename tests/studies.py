"""A tiny task, its cells and its sweep."""

import json
import os

import pytest
from sweeping import result_of

from paceline.study import sweep
from paceline.study.cells import Cell, Task
from paceline.study.ledger import Outcomes
from paceline.study.runs import Run
from paceline.train.recipe import Recipe

RECIPE = {
    "task": "pretrain",
    "config": {"model_type": "gpt2", "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 1},
    "tokenizer": "bpe",
    "vocabulary": 300,
    "context": 16,
    "pullback": 0.1,
    "kappa": 0.3,
    "warmup": 0.0,
    "batch": 2,
    "steps": 6,
    "evaluations": 2,
    "log_every": 2,
}

TASK = Task("tiny", Recipe(**RECIPE))


def cell_of(text="adamw:lr=1e-2", seed=0, task=TASK, **changes):
    if changes:
        task = Task(task.name, Recipe(**{**RECIPE, **changes}), task.start)
    methods = tuple(task.recipe.method_of(part) for part in text.split(","))
    return Cell(task, Run(methods, seed))


BASE = "pace:pullback=1:kappa=0.3:lr=1e-2"


def finish(ledger, job, cell):
    ledger.finish(job, result_of(cell))


SWEEP = """
recipe: RECIPE
methods:
  adamw: {lr: [1e-3, 1e-2], schedule: [constant, wsd]}
  ema: {lr: [1e-3, 1e-2], kappa: [0.3, 0.7]}
  pace: {lr: [1e-3, 1e-2], pullback: [0.1, 1], kappa: 0.3}
seeds: [0, 1]
"""
# Two rates of AdamW, two with wsd, four of pace; then seed 1 of what was chosen: of AdamW's average
# it is the training of AdamW itself.
TRAININGS = 8 + 2

QUICK = {"HEARTBEAT": 1, "GRACE": 1, "POLL": 0.05}


class Server:
    """Workers in processes of their own, forked from one that has imported everything."""

    def __init__(self, process):
        self.process = process

    def ask(self, **request):
        self.process.stdin.write(f"{json.dumps(request)}\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, folder, *options, acts=None, claims_only=False):
        """The process of a worker on a folder's sweep.yaml."""
        arguments = [] if claims_only else ["sweep", str(folder / "sweep.yaml"), *options]
        if arguments:
            arguments += ["--out", str(folder)]
        facts = {"folder": str(folder), "acts": acts or {}, "constants": QUICK}
        return self.ask(arguments=arguments, **facts)

    def wait(self, process):
        return self.ask(wait=process)

    def run(self, folder, *options, **facts):
        return self.wait(self.start(folder, *options, **facts))


def sweep_in(folder, text=SWEEP):
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(json.dumps(RECIPE))
    text = text.replace("RECIPE", str(folder / "recipe.yaml"))
    (folder / "sweep.yaml").write_text(text)
    return folder


def study_in(folder, text=SWEEP):
    return sweep.read_study(sweep_in(folder, text) / "sweep.yaml")


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")


def worked_off(plan, losses=None, keep=lambda cell: True, failing=lambda cell: False):
    """What came of all cells, taken as they become known; those that fail have no rows."""
    finished, failed = {}, {}
    while True:
        outcomes = Outcomes(finished, failed)
        left = [cell for cell in plan.wanted(outcomes) if cell.key not in outcomes.ended]
        if not (left := [cell for cell in left if keep(cell)]):
            return outcomes
        for cell in left:
            if failing(cell):
                failed[cell.key] = "it had to be"
            else:
                finished[cell.key] = result_of(cell, *([losses] if losses else []))
