"""The cells of sweeps: trainings by a recipe, each identified by a hash of its settings."""

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from rich.console import Console
from transformers.trainer_utils import SaveStrategy

from ..cache import cache_folder
from ..files import remove
from ..train import InputError
from ..train.build import PerToken, Prepared, build_trainer
from ..train.data import content_key
from ..train.folder import is_begun, made_once, recipe_of
from ..train.methods import Method
from ..train.options import Train
from ..train.recipe import DATA, METHOD, RESUMABLE_CHANGES, Recipe, keys_with
from ..train.run import train as train_by
from ..train.trainer import MethodTrainer, Watcher
from .runs import Row, Run, Watch, finite_values, share_runs

# On the clock of chat templates, where the recipe gives no date: cells may run on many days.
DAY = date(2026, 1, 1)


@dataclass(frozen=True)
class Task:
    """A model, data and a budget; with methods and a seed it makes a cell."""

    name: str
    recipe: Recipe
    start: Recipe | None = None  # trained first; the recipe starts from its returned model

    @cached_property
    def fixed(self) -> dict[str, Any]:
        """Everything that a training depends on, except methods and seed."""
        return {
            "recipe": _dump(self.recipe, keys_with(METHOD)),
            "start": self.start and _dump(self.start),
        }

    @cached_property
    def digest(self) -> str:
        """The fixed settings as one line of JSON."""
        return json.dumps(self.fixed, sort_keys=True)

    @cached_property
    def start_folder(self) -> Path | None:
        """The folder of the model to start from, which `make_start` makes."""
        if self.start is None:
            return None
        key = content_key(json.dumps(_dump(self.start), sort_keys=True))
        return cache_folder() / f"start-{key}"

    def make_start(self, console: Console) -> None:
        """Train the model to start from, unless it is in the cache.

        One process trains it, and others wait. A training that was killed goes on from its last
        checkpoint.
        """
        if self.start is not None and self.start_folder is not None:
            made_once(self.start_folder, partial(self._train_start, self.start, console), console)

    def _train_start(self, start: Recipe, console: Console, run: Path) -> None:
        if is_begun(run):
            said = f"Going on with the training of the model that {self.name} starts from: {run}"
            options = Train(**recipe_of(run), resume=run)
        else:
            said = f"Training the model that {self.name} starts from, once: {run}"
            remove(run)  # of a training that was killed before its first step
            options = Train(**start.model_dump(), out=run)
        console.print(said, highlight=False, markup=False)
        if train_by(options, console) is None:
            raise KeyboardInterrupt


def _dump(recipe: Recipe, but: Iterable[str] = ()) -> dict[str, Any]:
    """The keys that a result depends on, without defaults: a new key changes no hash."""
    names = set(Recipe.model_fields) - RESUMABLE_CHANGES - set(but)
    dumped = recipe.model_dump_json(include=names, exclude_defaults=True)
    return dict(json.loads(dumped))


class Result(NamedTuple):
    """The measurements of a cell's training."""

    rows: list[Row]  # one for each evaluation of each method
    log: list[dict[str, Any]]  # of the training: step, loss, mean gain, share clipped


@dataclass(frozen=True)
class Cell:
    """A training, and the methods that are read out of it."""

    task: Task
    run: Run

    @cached_property
    def key(self) -> str:
        """A hash of everything that it depends on."""
        methods = sorted(method.written for method in self.run.methods)
        return content_key(self.task.digest, methods, self.run.seed)

    @property
    def name(self) -> str:
        """The task's and the training's name."""
        return f"{self.task.name}: {self.run.name}"

    @property
    def trajectory(self) -> Method:
        """The method that trains."""
        return self.run.methods[0].trajectory

    def train(self, watch: Watch) -> Result | None:
        """Train it; None if `watch` stopped it."""
        own = self.trajectory
        changes: dict[str, Any] = {"method": own.written, "schedule": own.schedule, "lr": own.lr}
        changes |= {"seed": self.run.seed, "report_to": ("none",)}
        changes |= {"snapshots": 0, "choose": False}  # nothing of the run stays
        changes["date"] = self.task.recipe.date or DAY
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
        seconds = time.perf_counter() - began
        rows = self.run.rows(trainer.curves, seconds, recipe.batch * recipe.context)
        facts = {"setting": self.task.name, "cell": self.key, "steps": steps}
        kept = ("step", "loss", "gain_mean", "clipped")
        log = [
            finite_values({key: entry[key] for key in kept if key in entry})
            for entry in state.log_history
            if "loss" in entry
        ]
        return Result([{**facts, **row} for row in rows], log)


class _CellTrainer(MethodTrainer, PerToken):
    """Methods that share a trajectory, on a recipe's data."""


_last_prepared: tuple[str, Prepared] | None = None  # a worker's data, for its next cell


def _assemble(recipe: Recipe, folder: Path, methods: tuple[Method, ...]) -> _CellTrainer:
    global _last_prepared
    key = recipe.model_dump_json(include=set(keys_with(DATA)))
    prepared = _last_prepared[1] if _last_prepared and _last_prepared[0] == key else None
    kind = partial(_CellTrainer, methods=methods)
    trainer: _CellTrainer = build_trainer(recipe, folder, kind, prepared=prepared)
    data: Any = trainer.eval_dataset
    if not recipe.streaming:  # the order of a stream depends on the seed
        _last_prepared = key, Prepared(trainer.train_dataset, data, trainer.processing_class)
    half = len(data) // 2
    if not half:
        raise InputError(
            f"eval_examples: {len(data)} is too few to choose settings on one half; give at least 2"
        )
    rest = range(half, len(data))
    trainer.eval_dataset = {"selection": data.select(range(half)), "test": data.select(rest)}
    trainer.args.save_strategy = SaveStrategy.NO
    return trainer


def cells(task: Task, methods: Iterable[Method], seeds: Iterable[int]) -> list[Cell]:
    """The trainings that these methods need; methods of one trajectory share one."""
    return [Cell(task, run) for run in share_runs(dict.fromkeys(methods), seeds)]
