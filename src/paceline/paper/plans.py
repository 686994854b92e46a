"""What the paper's figures train at each scale, and which settings they choose."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import pandas as pd

from ..study.cells import Cell, Task, cells
from ..study.ledger import Outcomes
from ..train import InputError
from ..train.methods import Method, method_of_row, parse_method
from ..train.recipe import Recipe, read_recipe

RETURN_KAPPA = 0.7  # κ of the slower average that is read out of every PACE run besides its own
EMA_KAPPAS = (0.2, 0.3, 0.5, 0.7, 0.9)  # of the averages that are read out of every AdamW run
SCHEDULES = ("constant", "cosine", "wsd")
NAMES = {"AdamW": "adamw", "EMA": "ema", "PACE": "pace"}  # by their labels in figures
TULU: dict[str, Any] = {"data": ("allenai/tulu-3-sft-mixture",), "eval_split": None}
TUNING = (0,)  # the seed that settings are chosen with

# ---- scales -------------------------------------------------------------------------------------


class Grid(NamedTuple):
    """The values that settings are chosen from."""

    rates: tuple[float, ...]
    pullbacks: tuple[float, ...]
    kappas: tuple[float, ...]  # of PACE


@dataclass(frozen=True)
class Scale:
    """The models and data that are trained, and their grids."""

    name: str
    models: tuple[Task, ...]  # fine-tuned; SmolLM2, Qwen3 and Gemma 3 in the paper
    tuned: Grid  # of the first model
    others: Grid  # of the other models
    high: float  # a learning rate above the grid of the first model
    other_data: Task  # Tulu 3 in the paper
    from_scratch: Task  # GPT-2 in the paper
    scratch: Grid
    every: tuple[int, ...]  # steps between updates of the average
    seeds: tuple[int, ...] = (0, 1, 2)
    headline: tuple[int, ...] = (0, 1, 2, 3, 4)  # seeds of the first model

    def seeds_of(self, task: Task) -> tuple[int, ...]:
        """The seeds that a model's headline numbers are from."""
        return self.headline if task == self.main else self.seeds

    @property
    def main(self) -> Task:
        """The model that most figures show."""
        return self.models[0]

    @property
    def grids(self) -> list[tuple[Task, Grid]]:
        """The models that are fine-tuned, each with its grid."""
        return [(x, self.tuned if x == self.main else self.others) for x in self.models]

    @property
    def twinned(self) -> list[tuple[Task, Grid]]:
        """The tasks on which PACE is compared with its twin at each rate."""
        return [(self.main, self.tuned), (self.from_scratch, self.scratch)]


def scale_of(name: str, recipe: str | None = None) -> Scale:
    """A scale by its name, with another recipe for the main model and the one from scratch."""
    found = {"tiny": _tiny, "small": _small, "paper": _paper}[name]()
    if recipe is not None:
        main = _task(recipe)
        found = replace(found, models=(main, *found.models[1:]), from_scratch=main)
    return found


def _task(recipe: str, start: str | None = None, name: str | None = None, **changes: Any) -> Task:
    begun = None if start is None else Recipe(**read_recipe(start))
    default = recipe if start is None else f"{recipe} on {start}"
    return Task(name or default, Recipe(**{**read_recipe(recipe), **changes}), begun)


def _tiny() -> Scale:
    """Models of 0.2M parameters, on text and conversations that need no network."""
    starts = ("tiny-smollm2", "tiny-qwen3", "tiny-gemma3")
    own = Grid((1e-3, 3e-3, 1e-2), (0.03, 0.3, 3.0, 30.0), (0.3, 0.5, 0.7))
    return Scale(
        name="tiny",
        models=tuple(_task("tiny-sft", start) for start in starts),
        tuned=own,
        others=own,
        high=3e-2,
        other_data=_task("tiny-torch", "tiny-qwen3"),
        from_scratch=_task("tiny-gpt2"),
        scratch=Grid((1e-3, 3e-3, 1e-2), (0.01, 0.1, 1.0, 10.0), (0.3, 0.5, 0.7)),
        every=(10,),
    )


def _small() -> Scale:
    """The paper's smallest models on a part of its tokens, for one GPU."""
    tuned = Grid((1e-3, 3e-3, 1e-2), (0.003, 0.03, 0.3, 3.0), (0.3, 0.5, 0.7))
    budget: dict[str, Any] = {"steps": 300, "epochs": None}
    return Scale(
        name="small",
        models=(_task("smollm2-135m", name="smollm2-135m, 300 steps", **budget),),
        tuned=tuned,
        others=tuned,
        high=3e-2,
        other_data=_task(
            "smollm2-135m", name="smollm2-135m on Tulu 3, 300 steps", **budget, **TULU
        ),
        from_scratch=_task(
            "gpt2-124m", name="gpt2-124m, 0.1B tokens", tokens=1e8, batch=96, micro_batch=32
        ),
        scratch=Grid((3e-4, 1e-3, 3e-3), (3e-4, 1e-3, 3e-3, 1e-2), (0.3, 0.5, 0.7)),
        every=(5, 20),
    )


def _paper() -> Scale:
    """The paper's own models, data and budgets."""
    kappas = (0.2, 0.3, 0.5)
    return Scale(
        name="paper",
        models=tuple(map(_task, ("smollm2-135m", "smollm2-1.7b", "qwen3-1.7b", "gemma3-1b"))),
        tuned=Grid((1e-3, 3e-3, 5e-3), (0.003, 0.01, 0.03, 0.1), kappas),
        others=Grid((3e-4, 1e-3, 3e-3), (0.015, 0.05, 0.15, 0.5), kappas),
        high=1e-2,
        other_data=_task("qwen3-1.7b", name="qwen3-1.7b on Tulu 3", **TULU),
        from_scratch=_task("gpt2-124m"),
        scratch=Grid((3e-4, 6e-4, 1.2e-3), (3e-4, 1e-3, 3e-3, 1e-2), kappas),
        every=(5, 20),
    )


def shortened(task: Task, share: float) -> Task:
    """The same task with a share, in (0, 1], of its steps, tokens or epochs."""
    values = task.recipe.model_dump()
    unit = next(x for x in ("steps", "tokens", "epochs") if values[x] is not None)
    part = share * values[unit]
    recipe = Recipe(**{**values, unit: round(part) if unit == "steps" else part})
    return replace(task, name=f"{task.name}, {share:.0%} of the steps", recipe=recipe)


# ---- results ------------------------------------------------------------------------------------


def _sorted(rows: list[dict[str, Any]], *keys: str) -> pd.DataFrame:
    """A table of rows in an order that no worker decides."""
    table = pd.DataFrame(rows)
    return table.sort_values(list(keys), ignore_index=True) if rows else table


class ScaleRuns:
    """A scale, and the results of its cells so far."""

    def __init__(self, scale: Scale, outcomes: Outcomes) -> None:
        self.scale, self.outcomes = scale, outcomes
        self.asked: set[str] | None = None  # keys of the current figure's cells; None: all cells

    @cached_property
    def points(self) -> pd.DataFrame:
        """A row for each evaluation of each method."""
        rows = [row for x in self.outcomes.finished.values() for row in x.rows]
        return _sorted(rows, "setting", "label", "lr", "seed", "cell", "step")

    @cached_property
    def training(self) -> pd.DataFrame:
        """A row for each line of each training's log."""
        keys = ("setting", "trained_with")
        rows = [
            {**{key: x.rows[0][key] for key in keys}, **line}
            for x in self.outcomes.finished.values()
            for line in x.log
        ]
        return _sorted(rows, *keys, "step")

    @cached_property
    def ends(self) -> pd.DataFrame:
        """The last row of each method of each training. After divergence losses are infinite."""
        ends = self.points[self.points.step == self.points.steps].copy()
        losses = ["live_loss", "returned_loss", "selection_loss"]
        ends[losses] = ends[losses].astype(float).fillna(float("inf"))
        return ends

    def select(self, task: Task, table: pd.DataFrame | None = None, **fixed: Any) -> pd.DataFrame:
        """The ends of a task, or another table's rows, with such values.

        A list of values allows each of its items, and None no value.
        """
        rows = self.ends if table is None else table
        rows = rows[rows.setting == task.name]
        for column, value in fixed.items():
            values = value if isinstance(value, list | tuple) else [value]
            rows = rows[rows[column].isna() if value is None else rows[column].isin(values)]
        return rows

    def best(
        self, task: Task, names: Sequence[str], schedules: Sequence[str] = "constant", **fixed: Any
    ) -> Method:
        """The setting with the lowest selection loss at the end, with the tuning seed.

        It has one of the methods' names, one of the schedules, and these options; None: not set.
        Only runs that the figure asks for count, so that it does not depend on other figures.

        Raises:
            InputError: no such run is finished.
        """
        fixed = {"name": names, "schedule": schedules, "seed": TUNING, **fixed}
        rows = self.select(task, **fixed)
        rows = rows if self.asked is None else rows[rows.cell.isin(self.asked)]
        if rows.empty:
            wanted = names if isinstance(names, str) else ", ".join(names)
            raise InputError(f"{task.name}: no run of {wanted} was finished to choose from")
        return method_of_row(rows.loc[rows.selection_loss.idxmin()])

    def best_pace(self, task: Task, schedule: str = "constant", **fixed: Any) -> Method:
        """PACE with its own average, which is updated at every step, at its best setting."""
        return self.best(task, "pace", schedule, **{"return_kappa": None, "every": None, **fixed})

    def best_of_each(self, task: Task, **fixed: Any) -> dict[str, Method]:
        """The methods of the headline, each at its best setting.

        With values of options that are fixed, the average at a constant rate is left out.
        """
        averages = ("ema", "uniform", "lawa", "bema")
        slower = {"return_kappa": RETURN_KAPPA, **fixed}
        return {
            "AdamW": self.best(task, "adamw", SCHEDULES, **fixed),
            "EMA": self.best(task, "ema", SCHEDULES, **fixed),
            **({} if fixed else {"an average at a constant rate": self.best(task, averages)}),
            "EMA, power or twin schedule": self.best(task, "ema", ["power", "twin"], **fixed),
            "Schedule-Free": self.best(task, "schedule-free", **fixed),
            "PACE, constant": self.best_pace(task, **fixed),
            "PACE, constant, slower average": self.best_pace(task, **slower),
        }

    def with_own_twin(self, task: Task) -> dict[str, Method]:
        """The methods of the headline, and the twin of PACE's best run."""
        best = self.best_of_each(task)
        return {**best, "PACE's own twin": self.twin_of(task, best["PACE, constant"])}

    def twin_of(self, task: Task, method: Method) -> Method:
        """The EMA at the learning rate that the measured mean gain of a PACE run amounts to."""
        own = self.select(task, label=method.label, lr=method.lr)
        gains = self.select(task, self.points, run=list(own.run))
        gain = min(1.0, max(round(float(gains.gain_mean.mean()), 3), 0.001))
        return parse_method(f"ema:twin:kappa={method.kappa}:twin_gain={gain}:lr={method.lr}")

    def constant_and_decaying(
        self, task: Task, labels: Iterable[str] = NAMES, **fixed: Any
    ) -> dict[str, Method]:
        """The best AdamW, EMA and PACE at a constant rate, and with WSD."""
        own = {"return_kappa": None, "every": None, **fixed}
        return {
            f"{label}, {schedule}": self.best(task, NAMES[label], schedule, **own)
            for schedule in ("constant", "wsd")
            for label in labels
        }

    def middle_rate(self) -> float:
        """The learning rate of figures that show one: the best of the constant EMA at κ = 0.5."""
        return self.best(self.scale.from_scratch, "ema", kappa=0.5).lr


# ---- methods and cells --------------------------------------------------------------------------


def methods_on(task: Task, text: str, **lists: Iterable[Any]) -> list[Method]:
    """The methods of a text with every combination of option values."""
    defaults = task.recipe.method_defaults
    options = [[f"{name}={value}" for value in values] for name, values in lists.items()]
    return [parse_method(":".join([text, *x]), **defaults) for x in itertools.product(*options)]


def _with_slower(task: Task, text: str = "pace", **lists: Iterable[Any]) -> list[Method]:
    """PACE, and the slower average of the same trainings."""
    slower = f"{text}:return_kappa={RETURN_KAPPA}"
    return [*methods_on(task, text, **lists), *methods_on(task, slower, **lists)]


def _averages(task: Task, schedule: str, rates: Iterable[float]) -> list[Method]:
    """AdamW and its EMAs, and at a constant rate its other averages too."""
    found = [
        *methods_on(task, f"adamw:{schedule}", lr=rates),
        *methods_on(task, f"ema:{schedule}", kappa=EMA_KAPPAS, lr=rates),
    ]
    if schedule == "constant":
        for name in ("uniform", "lawa:every=20", "bema"):
            found += methods_on(task, name, lr=rates)
    return found


def _tried(task: Task, grid: Grid) -> list[Method]:
    """PACE at every setting, AdamW and its averages at every rate, all at a constant rate."""
    return [
        *_averages(task, "constant", grid.rates),
        *_with_slower(task, lr=grid.rates, kappa=grid.kappas, pullback=grid.pullbacks),
    ]


def _scheduled(task: Task, grid: Grid) -> list[Method]:
    """The baselines with a schedule: AdamW and its EMAs, and Schedule-Free."""
    return [
        *_averages(task, "cosine", grid.rates),
        *_averages(task, "wsd", grid.rates),
        *methods_on(task, "ema:power", kappa=(0.3, 0.5), lr=grid.rates),
        *methods_on(task, "ema:twin", kappa=(0.3,), twin_gain=(0.5,), lr=grid.rates),
        *methods_on(task, "schedule-free", lr=grid.rates),
    ]


def cells_over_seeds(task: Task, methods: Iterable[Method], seeds: Iterable[int]) -> list[Cell]:
    """These methods over seeds, in cells with all averages that other figures read out of them."""
    return cells(task, [x for method in methods for x in _trained_with(task, method)], seeds)


def _trained_with(task: Task, method: Method) -> list[Method]:
    """All methods of a method's cell."""
    trained = method.trajectory
    if trained.name == "adamw" and trained.schedule in SCHEDULES:
        return _averages(task, trained.schedule, (trained.lr,))
    if trained.name == "pace":
        return [trained, trained.model_copy(update={"return_kappa": RETURN_KAPPA})]
    return [method]


# ---- the plan of each figure --------------------------------------------------------------------

Stages = Iterator[list[Cell]]  # each is asked for when those before it have ended


def maps(runs: ScaleRuns) -> Stages:
    """4, 6, 12, 13: κ × c × learning rate, all models."""
    yield [x for task, grid in runs.scale.grids for x in cells(task, _tried(task, grid), TUNING)]


def by_schedule(runs: ScaleRuns) -> Stages:
    """16: the baselines with every schedule."""
    yield from maps(runs)
    grids = runs.scale.grids
    yield [x for task, grid in grids for x in cells(task, _scheduled(task, grid), TUNING)]


def headline(runs: ScaleRuns) -> Stages:
    """1, 7, 11: each method at its best setting, over seeds, with PACE's own twin."""
    yield from by_schedule(runs)
    for task in runs.scale.models:
        methods = runs.with_own_twin(task).values()
        yield cells_over_seeds(task, methods, runs.scale.seeds_of(task))


def rarer(runs: ScaleRuns, kappas: Sequence[float]) -> Stages:
    """3, 8: the average is updated every step as in 6, and every so many steps."""
    task, grid = runs.scale.main, runs.scale.tuned
    own: dict[str, Any] = {"lr": grid.rates, "kappa": kappas, "pullback": grid.pullbacks}
    tried = [
        *_averages(task, "constant", grid.rates),
        *_with_slower(task, **own),
        *_with_slower(task, **own, every=runs.scale.every),
    ]
    yield cells(task, tried, TUNING)


def _budgets(runs: ScaleRuns, task: Task) -> Stages:
    """A decay at half and three quarters of the steps, at each rate and then over seeds."""
    scale = runs.scale
    rates = (scale.scratch if task == scale.from_scratch else scale.tuned).rates
    short = [shortened(task, share) for share in (0.5, 0.75)]
    yield [x for each in short for x in cells(each, _averages(each, "wsd", rates), TUNING)]
    best = [runs.best(task, "adamw", "wsd"), runs.best_pace(task), runs.best(task, "ema")]
    yield cells_over_seeds(task, best, scale.seeds)
    for each in short:
        yield cells_over_seeds(each, [runs.best(each, "adamw", "wsd")], scale.seeds)


def schedule_free(runs: ScaleRuns) -> Stages:
    """5: against Schedule-Free on two models; one constant run against decays at three budgets."""
    yield from headline(runs)
    yield from _budgets(runs, runs.scale.main)


def other_data(runs: ScaleRuns) -> Stages:
    """10: other data."""
    task = runs.scale.other_data
    yield cells(task, _tried(task, runs.scale.others), TUNING)


def across_rates(runs: ScaleRuns) -> Stages:
    """14, 15: across rates up to one that is too high, baselines with every schedule."""
    yield from by_schedule(runs)
    task, high = runs.scale.main, runs.scale.tuned._replace(rates=(runs.scale.high,))
    yield cells(task, [*_tried(task, high), *_scheduled(task, high)], TUNING)


def over_seeds(runs: ScaleRuns) -> Stages:
    """17: constant and WSD, over seeds."""
    yield from by_schedule(runs)
    for task, grid in runs.scale.grids:
        best = runs.best_pace(task)
        own = {"pullback": [best.get("pullback")], "kappa": [best.kappa], "lr": grid.rates}
        yield cells(task, _with_slower(task, "pace:wsd", **own), TUNING)
    for task in runs.scale.models:
        yield cells_over_seeds(task, runs.constant_and_decaying(task).values(), runs.scale.seeds)


def pretraining(runs: ScaleRuns) -> Stages:
    """9: κ × c × learning rate from scratch, and the baselines with every schedule."""
    task, grid = runs.scale.from_scratch, runs.scale.scratch
    yield cells(task, _tried(task, grid), TUNING)
    yield cells(task, _scheduled(task, grid), TUNING)


def pull_alone(runs: ScaleRuns) -> Stages:
    """2: the pull alone at κ = 0.5, constant and WSD."""
    yield from pretraining(runs)
    task = runs.scale.from_scratch
    own = {"kappa": (0.5,), "lr": (runs.middle_rate(),)}
    pulled = _with_slower(task, "pace:wsd", pullback=runs.scale.scratch.pullbacks, **own)
    yield cells(task, pulled, TUNING)


def under_schedules(runs: ScaleRuns, *, by_kappa: bool) -> Stages:
    """18, 19: c with each schedule, at κ = 0.5 over seeds or at each κ with one seed."""
    yield from pretraining(runs)
    task, grid, rates = runs.scale.from_scratch, runs.scale.scratch, (runs.middle_rate(),)
    kappas, seeds = (grid.kappas, TUNING) if by_kappa else ((0.5,), runs.scale.seeds)
    for schedule in SCHEDULES:
        own = {"pullback": grid.pullbacks, "kappa": kappas, "lr": rates}
        tried = _with_slower(task, f"pace:{schedule}", **own)
        yield cells(task, [*tried, *_averages(task, schedule, rates)], seeds)


def branches(runs: ScaleRuns) -> Stages:
    """20: decays at three budgets, from scratch."""
    yield from pretraining(runs)
    yield from _budgets(runs, runs.scale.from_scratch)


def twins(runs: ScaleRuns) -> Stages:
    """PACE against its own twin, at each rate, fine-tuning and from scratch, over seeds."""
    yield from maps(runs)
    yield from pretraining(runs)
    for task, grid in runs.scale.twinned:
        for rate in grid.rates:
            best = runs.best_pace(task, lr=rate)
            yield cells_over_seeds(task, [best, runs.twin_of(task, best)], runs.scale.seeds)
