"""The cells of sweeps: trainings by a recipe, each known by the hash of all that decides it."""

import json
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from rich.console import Console
from transformers.trainer_utils import SaveStrategy

from ..cache import cache_folder
from ..files import put
from ..train import InputError
from ..train.build import PerToken, Prepared, assemble
from ..train.data import content_key
from ..train.methods import Method
from ..train.recipe import DATA, METHOD, RESUMABLE_CHANGES, Recipe, keys_with
from ..train.run import Train
from ..train.run import train as train_by
from ..train.trainer import MethodTrainer, Watcher
from .runs import Row, Run, share_runs
from .runs import Watch as Watching


@dataclass(frozen=True)
class Task:
    """What is trained on what, for how long; with methods and a seed, that makes a cell."""

    name: str
    recipe: Recipe
    start: Recipe | None = None  # whose returned model is the recipe's model

    @cached_property
    def fixed(self) -> dict[str, Any]:
        """All that decides a training, but for methods and seed."""
        return {
            "recipe": _dump(self.recipe, keys_with(METHOD)),
            "start": self.start and _dump(self.start),
        }

    @cached_property
    def digest(self) -> str:
        """The same in a line."""
        return json.dumps(self.fixed, sort_keys=True)

    @cached_property
    def start_folder(self) -> Path | None:
        """Where the model to start from is, once it is made."""
        if self.start is None:
            return None
        return (
            cache_folder() / f"start-{content_key(json.dumps(_dump(self.start), sort_keys=True))}"
        )

    def make_start(self, console: Console) -> None:
        """Train the model to start from, if that was not done before."""
        folder = self.start_folder
        if self.start is None or folder is None or folder.exists():
            return
        console.print(f"Training what {self.name} starts from, once.", highlight=False)
        with TemporaryDirectory(dir=cache_folder()) as scratch:
            run = train_by(Train(**self.start.model_dump(), out=Path(scratch) / "run"), console)
            if run is None:
                raise KeyboardInterrupt
            if not folder.exists():  # or another process was faster
                put(run / "model", folder)

    def parse(self) -> dict[str, Any]:
        """What methods that leave options open get for them."""
        return self.recipe.method_defaults


def _dump(recipe: Recipe, but: Iterable[str] = ()) -> dict[str, Any]:
    """All keys that decide what is computed, but for defaults: a new key changes no old name."""
    names = set(Recipe.model_fields) - RESUMABLE_CHANGES - set(but)
    dumped = recipe.model_dump_json(include=names, exclude_defaults=True)
    return dict(json.loads(dumped))


class Result(NamedTuple):
    """What a cell's training measured."""

    rows: list[Row]  # of evaluations, of each method
    log: list[dict[str, Any]]  # of the training: step, loss, and what the pull does


@dataclass(frozen=True)
class Cell:
    """A training, and the methods that are read out of it."""

    task: Task
    run: Run

    @cached_property
    def key(self) -> str:
        """A hash of all that decides it."""
        methods = sorted(method.written for method in self.run.methods)
        return content_key(self.task.digest, methods, self.run.seed)

    @property
    def name(self) -> str:
        """Of the training."""
        return f"{self.task.name}: {self.run.name}"

    @property
    def trajectory(self) -> Method:
        """What is stepped by."""
        return self.run.methods[0].trajectory

    def train(self, watch: Watching) -> Result | None:
        """Train it; None if it was stopped."""
        method = self.trajectory
        changes = {
            "method": method.written,
            "schedule": method.schedule,
            "lr": method.lr,
            "seed": self.run.seed,
            "report_to": ("none",),
        }
        if self.task.start_folder is not None:
            changes["model"] = str(self.task.start_folder)
        recipe = Recipe(**{**self.task.recipe.model_dump(), **changes})
        with TemporaryDirectory() as scratch:
            trainer = _assemble(recipe, Path(scratch), self.run.methods)
            steps = trainer.args.max_steps

            def tell(step: int, losses: dict[str, float]) -> bool:
                return watch(1000 * step // steps, losses)  # thousandths of a cell

            trainer.add_callback(Watcher(tell, max(1, steps // 200)))
            trainer.evaluate()
            began = time.perf_counter()
            trainer.train()
        state = trainer.state
        if state.global_step < steps:
            return None
        rows = self.run.rows(
            trainer.curves, time.perf_counter() - began, recipe.batch * recipe.context
        )
        facts = {"setting": self.task.name, "cell": self.key, "steps": steps}
        kept = ("step", "loss", "gain_mean", "clipped")
        log = [
            {key: _plain(entry[key]) for key in kept if key in entry}
            for entry in state.log_history
            if "loss" in entry
        ]
        return Result([{**facts, **row} for row in rows], log)


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


class _CellTrainer(MethodTrainer, PerToken):
    """Methods that share a trajectory, on a recipe's data."""


_last: tuple[str, Prepared] | None = None  # a worker's data, for its next cell


def _assemble(recipe: Recipe, folder: Path, methods: tuple[Method, ...]) -> _CellTrainer:
    global _last
    key = recipe.model_dump_json(include=set(keys_with(DATA)))
    prepared = _last[1] if _last is not None and _last[0] == key else None
    kind = partial(_CellTrainer, methods=methods)
    trainer = assemble(recipe, folder, kind, prepared=prepared)
    data: Any = trainer.eval_dataset
    if not recipe.streaming:  # whose order is the seed's
        _last = key, Prepared(trainer.train_dataset, data, trainer.processing_class)
    half = len(data) // 2
    if not half:
        raise InputError("eval_examples: two parts need two sequences; give more")
    trainer.eval_dataset = {
        "selection": data.select(range(half)),
        "test": data.select(range(half, len(data))),
    }
    trainer.args.save_strategy = SaveStrategy.NO
    return trainer


def cells(task: Task, methods: Iterable[Method], seeds: Iterable[int]) -> list[Cell]:
    """The trainings that these methods need: one for those that share a trajectory."""
    return [Cell(task, run) for run in share_runs(dict.fromkeys(methods), seeds)]
