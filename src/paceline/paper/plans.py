"""What the paper's figures train at each scale, and which settings they choose."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import pandas as pd

from ..study.cells import Cell, Task, cells
from ..study.ledger import Outcomes
from ..study.statistics import edges
from ..train import InputError
from ..train.methods import Method, method_of_row, parse_method
from ..train.recipe import Recipe, read_recipe

RETURN_KAPPA = 0.7  # κ of the slower average that is read out of every PACE run besides its own
# κ of the averages that are read out of every AdamW run, from its weights to their mean.
EMA_KAPPAS = (0.0, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0)
GAINS = (0.5, 1.0)  # of one gain for all coordinates, at κ = PULL_KAPPA
PULL_KAPPA = 0.3
POWER_KAPPAS = (0.15, 0.3, 0.5)  # of the power schedule
SCHEDULES = ("constant", "cosine", "wsd")
NAMES = {"AdamW": "adamw", "EMA": "ema", "PACE": "pace"}  # by their labels in figures
ONE_GAIN, FALLING = "PACE, one gain", "EMA, power or twin schedule"
TULU: dict[str, Any] = {"data": ("allenai/tulu-3-sft-mixture",), "eval_split": None}
TUNING = (0,)  # the seed that settings are chosen with; figures over seeds show others

# ---- scales -------------------------------------------------------------------------------------


class Grid(NamedTuple):
    """The settings that are trained with one seed, and chosen from."""

    pulls: tuple[tuple[float, float, float], ...]  # learning rate, c and κ of each run of PACE
    low: tuple[float, ...] = ()  # rates below those, for AdamW at a constant rate

    @classmethod
    def full(
        cls, rates: Iterable[float], pullbacks: Iterable[float], kappas: Iterable[float]
    ) -> "Grid":
        """Every combination."""
        return cls(tuple(itertools.product(rates, pullbacks, kappas)))

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates of all methods, ascending."""
        return tuple(sorted({lr for lr, _, _ in self.pulls}))

    @property
    def pullbacks(self) -> tuple[float, ...]:
        """The strengths c of PACE, ascending."""
        return tuple(sorted({c for _, c, _ in self.pulls}))

    @property
    def kappas(self) -> tuple[float, ...]:
        """The κ of PACE, ascending."""
        return tuple(sorted({kappa for _, _, kappa in self.pulls}))


@dataclass(frozen=True)
class Scale:
    """The models and data that are trained, and their grids."""

    name: str
    models: tuple[Task, ...]  # fine-tuned; SmolLM2, Qwen3 and Gemma 3 in the paper
    tuned: Grid  # of the first model
    others: Grid  # of the other models
    other_data: Task  # Tulu 3 in the paper
    from_scratch: Task  # GPT-2 in the paper
    scratch: Grid
    every: tuple[int, ...]  # steps between updates of the average
    seeds: tuple[int, ...] = (1, 2, 3)
    headline: tuple[int, ...] = (1, 2, 3, 4, 5)  # seeds of the first model

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


def _pruned(pullbacks: dict[float, tuple[float, ...]]) -> Grid:
    """A grid of these c at each learning rate, without settings that are far from any best.

    A fast average, κ = 0.2, gets only the two largest c of a rate. A slow one, κ = 0.7, gets only
    the two smallest, since a strong pull toward it starves.
    """
    pulls: list[tuple[float, float, float]] = []
    for lr, cs in pullbacks.items():
        by_kappa = {0.2: cs[-2:], 0.3: cs, 0.5: cs, 0.7: cs[:2]}
        pulls += [(lr, c, kappa) for kappa, own in by_kappa.items() for c in own]
    return Grid(tuple(pulls), low=(3e-4,))


def _tiny() -> Scale:
    """Models of 0.2M parameters, on text and conversations that need no network."""
    starts = ("tiny-smollm2", "tiny-qwen3", "tiny-gemma3")
    own = _pruned(
        {
            1e-3: (0.03, 0.3, 3.0),
            3e-3: (0.03, 0.3, 3.0, 30.0),
            1e-2: (0.03, 0.3, 3.0, 30.0, 100.0),
            1.8e-2: (0.3, 3.0, 30.0, 100.0),
            3.2e-2: (3.0, 30.0, 100.0),
        }
    )
    scratch = _pruned(
        {
            1e-3: (0.01, 0.1, 1.0),
            3e-3: (0.01, 0.1, 1.0, 10.0),
            1e-2: (0.1, 1.0, 10.0, 100.0),
            1.8e-2: (1.0, 10.0, 100.0),
            3.2e-2: (1.0, 10.0, 100.0),
        }
    )
    return Scale(
        name="tiny",
        models=tuple(_task("tiny-sft", start) for start in starts),
        tuned=own,
        others=own,
        other_data=_task("tiny-torch", "tiny-qwen3"),
        from_scratch=_task("tiny-gpt2"),
        scratch=scratch,
        every=(10,),
    )


def _small() -> Scale:
    """The paper's smallest models on a part of its tokens, for one GPU."""
    kappas = (0.3, 0.5, 0.7)
    tuned = Grid.full((1e-3, 3e-3, 1e-2, 3e-2), (0.003, 0.03, 0.3, 3.0, 30.0), kappas)
    budget: dict[str, Any] = {"steps": 300, "epochs": None}
    return Scale(
        name="small",
        models=(_task("smollm2-135m", name="smollm2-135m, 300 steps", **budget),),
        tuned=tuned._replace(low=(3e-4,)),
        others=tuned._replace(low=(3e-4,)),
        other_data=_task(
            "smollm2-135m", name="smollm2-135m on Tulu 3, 300 steps", **budget, **TULU
        ),
        from_scratch=_task(
            "gpt2-124m", name="gpt2-124m, 0.1B tokens", tokens=1e8, batch=96, micro_batch=32
        ),
        scratch=Grid.full((3e-4, 1e-3, 3e-3, 1e-2), (3e-4, 1e-3, 3e-3, 1e-2, 0.1), kappas),
        every=(5, 20),
    )


def _paper() -> Scale:
    """The paper's own models, data and budgets."""
    kappas = (0.2, 0.3, 0.5)
    return Scale(
        name="paper",
        models=tuple(map(_task, ("smollm2-135m", "smollm2-1.7b", "qwen3-1.7b", "gemma3-1b"))),
        tuned=Grid.full((1e-3, 3e-3, 5e-3, 1e-2), (0.003, 0.01, 0.03, 0.1), kappas),
        others=Grid.full((3e-4, 1e-3, 3e-3), (0.015, 0.05, 0.15, 0.5), kappas),
        other_data=_task("qwen3-1.7b", name="qwen3-1.7b on Tulu 3", **TULU),
        from_scratch=_task("gpt2-124m"),
        scratch=Grid.full((3e-4, 6e-4, 1.2e-3), (3e-4, 1e-3, 3e-3, 1e-2), kappas),
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
        chosen = rows.setting == task.name
        for column, value in fixed.items():
            values = value if isinstance(value, list | tuple) else [value]
            chosen &= rows[column].isna() if value is None else rows[column].isin(values)
        return rows[chosen]

    def best(
        self, task: Task, names: Sequence[str], schedules: Sequence[str] = "constant", **fixed: Any
    ) -> Method:
        """The setting with the lowest selection loss at the end, with the tuning seed.

        It has one of the methods' names, one of the schedules, and these options; None: not set.
        It returns its own average, and has no gain for all, unless they say so. Only runs that the
        figure asks for count, so that it does not depend on other figures.

        Raises:
            InputError: no such run is finished.
        """
        own = {"return_kappa": None, "gain": None, **fixed}
        rows = self._tried(task, name=names, schedule=schedules, **own)
        if rows.empty:
            wanted = names if isinstance(names, str) else ", ".join(names)
            raise InputError(f"{task.name}: no run of {wanted} was finished to choose from")
        return method_of_row(rows.loc[rows.selection_loss.idxmin()])

    def _tried(self, task: Task, **fixed: Any) -> pd.DataFrame:
        """The runs that settings are chosen from."""
        rows = self.select(task, seed=TUNING, **fixed)
        return rows if self.asked is None else rows[rows.cell.isin(self.asked)]

    def edge(self, task: Task, method: Method, *fixed: str) -> str:
        """The options of a chosen setting that are at an edge of what it was chosen from.

        Options that are fixed were the same for all. Empty also if the method was not chosen.
        """
        same = {key: method.row[key] for key in ("name", "return_kappa", "every", *fixed)}
        rows = self._tried(task, **same).to_dict("records")
        tried = [method_of_row({str(k): x for k, x in row.items()}).row for row in rows]
        return edges(method.row, tried) if method.row in tried else ""

    def best_pace(self, task: Task, schedule: str = "constant", **fixed: Any) -> Method:
        """PACE with its own average, which is updated at every step, at its best setting."""
        return self.best(task, "pace", schedule, **{"every": None, **fixed})

    def best_one_gain(self, task: Task, **fixed: Any) -> Method:
        """PACE with one gain for all coordinates at its best setting."""
        return self.best_pace(task, gain="scalar", **fixed)

    def best_falling(self, task: Task, **fixed: Any) -> Method:
        """The EMA under the schedules that a pull of one gain amounts to, at its best setting."""
        return self.best(task, "ema", ["power", "twin"], **fixed)

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
            FALLING: self.best_falling(task, **fixed),
            f"{FALLING}, slower average": self.best_falling(task, **slower),
            "Schedule-Free": self.best(task, "schedule-free", **fixed),
            "PACE, constant": self.best_pace(task, **fixed),
            "PACE, constant, slower average": self.best_pace(task, **slower),
            ONE_GAIN: self.best_one_gain(task, **fixed),
            f"{ONE_GAIN}, slower average": self.best_one_gain(task, **slower),
        }

    def with_own_twin(self, task: Task) -> dict[str, Method]:
        """The methods of the headline, and the twin of PACE's best run."""
        best = self.best_of_each(task)
        return {**best, "PACE's own twin": self.twin_of(task, best["PACE, constant"])}

    def twin_of(self, task: Task, method: Method) -> Method:
        """The EMA at the learning rate that the measured mean gain of a PACE run amounts to."""
        own = self.select(task, label=method.label, lr=method.lr, seed=TUNING)
        gains = self.select(task, self.points, run=list(own.run))
        gain = min(1.0, max(round(float(gains.gain_mean.mean()), 3), 0.001))
        return parse_method(f"ema:twin:kappa={method.kappa}:twin_gain={gain}:lr={method.lr}")

    def constant_and_decaying(
        self, task: Task, labels: Iterable[str] = NAMES, **fixed: Any
    ) -> dict[str, Method]:
        """The best AdamW, EMA and PACE at a constant rate, and with WSD."""
        return {
            f"{label}, {schedule}": self.best(task, NAMES[label], schedule, every=None, **fixed)
            for schedule in ("constant", "wsd")
            for label in labels
        }

    def over_seeds(self, task: Task) -> dict[str, Method]:
        """The same, and one gain and its schedules, which are in place of WSD."""
        further = {ONE_GAIN: self.best_one_gain(task), FALLING: self.best_falling(task)}
        return {**self.constant_and_decaying(task), **further}

    def middle_rate(self) -> float:
        """The learning rate of figures that show one: the best of the constant EMA at κ = 0.5."""
        task, rates = self.scale.from_scratch, self.scale.scratch.rates
        return self.best(task, "ema", kappa=0.5, lr=rates).lr


# ---- methods and cells --------------------------------------------------------------------------


def methods_on(task: Task, text: str, **lists: Iterable[Any]) -> list[Method]:
    """The methods of a text with every combination of option values."""
    options = [[f"{name}={value}" for value in values] for name, values in lists.items()]
    return [task.recipe.method_of(":".join([text, *x])) for x in itertools.product(*options)]


def _with_slower(methods: Iterable[Method]) -> list[Method]:
    """The methods, and each with a slower average of the same training."""
    own = list(methods)
    return [*own, *(x.model_copy(update={"return_kappa": RETURN_KAPPA}) for x in own)]


def _pulled(
    task: Task, pulls: Iterable[tuple[float, float, float]], text: str = "pace"
) -> list[Method]:
    """PACE at these learning rates, c and κ."""
    return _with_slower(
        method
        for lr, c, kappa in pulls
        for method in methods_on(task, text, lr=(lr,), pullback=(c,), kappa=(kappa,))
    )


def _averages(task: Task, schedule: str, rates: Iterable[float]) -> list[Method]:
    """AdamW and its EMAs, and at a constant rate its other averages too."""
    rates = tuple(rates)
    found = [
        *methods_on(task, f"adamw:{schedule}", lr=rates),
        *methods_on(task, f"ema:{schedule}", kappa=EMA_KAPPAS, lr=rates),
    ]
    if schedule == "constant":
        for name in ("uniform", "lawa:every=20", "bema"):
            found += methods_on(task, name, lr=rates)
    return found


def _uniform_gains(task: Task, rates: Iterable[float]) -> list[Method]:
    """One gain for all coordinates, and the schedules that such a pull amounts to."""
    own: dict[str, Any] = {"kappa": (PULL_KAPPA,), "lr": tuple(rates)}
    return _with_slower(
        [
            *methods_on(task, "pace:gain=scalar", pullback=GAINS, **own),
            *methods_on(task, "ema:power", **{**own, "kappa": POWER_KAPPAS}),
            *methods_on(task, "ema:twin", twin_gain=GAINS[:1], **own),  # of gain 1: the power's
        ]
    )


def _tried(task: Task, grid: Grid) -> list[Method]:
    """AdamW and its averages at a constant rate, PACE, one gain for all, and its schedules."""
    return [
        *_averages(task, "constant", (*grid.low, *grid.rates)),
        *_pulled(task, grid.pulls),
        *_uniform_gains(task, grid.rates),
    ]


def _scheduled(task: Task, grid: Grid) -> list[Method]:
    """AdamW and its EMAs with a decay, and Schedule-Free."""
    return [
        *_averages(task, "cosine", grid.rates),
        *_averages(task, "wsd", grid.rates),
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
    if trained.name in ("adamw", "pace"):
        return _with_slower([method.model_copy(update={"return_kappa": None})])
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
    pulls = [pull for pull in grid.pulls if pull[2] in kappas]
    tried = [*_averages(task, "constant", grid.rates), *_pulled(task, pulls)]
    for every in runs.scale.every:
        tried += _pulled(task, pulls, f"pace:every={every}")
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
    """14, 15: each method at its best setting of each learning rate, over seeds."""
    yield from by_schedule(runs)
    task, grid = runs.scale.main, runs.scale.tuned
    best = [method for lr in grid.rates for method in runs.best_of_each(task, lr=lr).values()]
    yield cells_over_seeds(task, best, runs.scale.seeds)


def over_seeds(runs: ScaleRuns) -> Stages:
    """17: constant and WSD, over seeds."""
    yield from by_schedule(runs)
    for task, grid in runs.scale.grids:
        best = runs.best_pace(task)
        pulls = [(lr, best.get("pullback"), best.get("kappa")) for lr in grid.rates]
        yield cells(task, _pulled(task, pulls, "pace:wsd"), TUNING)
    for task in runs.scale.models:
        yield cells_over_seeds(task, runs.over_seeds(task).values(), runs.scale.seeds)


def pretraining(runs: ScaleRuns) -> Stages:
    """9: κ × c × learning rate from scratch, and the baselines with every schedule."""
    task, grid = runs.scale.from_scratch, runs.scale.scratch
    yield cells(task, _tried(task, grid), TUNING)
    yield cells(task, _scheduled(task, grid), TUNING)


def pull_alone(runs: ScaleRuns) -> Stages:
    """2: the pull alone at κ = 0.5, constant and WSD."""
    yield from pretraining(runs)
    task, rate = runs.scale.from_scratch, runs.middle_rate()
    pulls = [pull for pull in runs.scale.scratch.pulls if (pull[0], pull[2]) == (rate, 0.5)]
    yield cells(task, _pulled(task, pulls, "pace:wsd"), TUNING)


def under_schedules(runs: ScaleRuns, *, by_kappa: bool) -> Stages:
    """18, 19: c with each schedule, at κ = 0.5 over seeds or at each κ with one seed."""
    yield from pretraining(runs)
    task, grid, rate = runs.scale.from_scratch, runs.scale.scratch, runs.middle_rate()
    pulls = [x for x in grid.pulls if x[0] == rate and (by_kappa or x[2] == 0.5)]
    seeds = TUNING if by_kappa else (*TUNING, *runs.scale.seeds)
    for schedule in SCHEDULES:
        tried = [*_pulled(task, pulls, f"pace:{schedule}"), *_averages(task, schedule, (rate,))]
        yield cells(task, tried, seeds)


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
