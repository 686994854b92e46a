"""`paceline sweep`: tune methods over their own grids by one protocol, on many machines."""

import itertools
import json
import math
import random
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal, NamedTuple, Self

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.samplers import RandomSampler, TPESampler
from pydantic import Field, model_validator
from rich.console import Console

from ..files import write_text
from ..train import InputError, Options, Positive, read_small, unknown
from ..train.folder import locked
from ..train.methods import Method, beside_the_pull, refuse_untaken
from ..train.page import name_of
from ..train.recipe import METHOD, Recipe, keys_with, parse_yaml, read_recipe
from ..train.terminal import quiet
from .cells import Cell, Task
from .ledger import Ledger, Outcomes, open_ledger, work_off, write_rows
from .options import Sweep
from .runs import Row, Run, loss_of, share_runs
from .statistics import EDGE, Listing, edges, paired, verdict_against

FAILED = ["all diverged or failed", None]  # instead of a setting and a learning rate
TRIALS_AT_A_TIME = 4  # that TPE draws before it gets their losses
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class Study(Options):
    """The keys of a sweep's YAML file: methods, task, and how settings are chosen."""

    recipe: str
    """Model, data and budget: a shipped recipe or a file."""
    start: str | None = None
    """A recipe that is trained once; every training starts from its returned model."""
    change: dict[str, Any] = Field(default_factory=dict)
    """Keys of the recipe with other values."""
    methods: dict[str, dict[str, Any]]
    """Name -> `method` as in `paceline compare`, and options. An option is a value, a list of
    values, or a range `{low: x, high: y}` on a logarithmic scale."""
    baseline: str | None = None
    """Name of the method that others are compared with. Default: the first."""
    sampler: Literal["grid", "random", "tpe"] = "grid"
    """Trainings of each method: its whole grid, a random part, or drawn by Optuna's TPE."""
    trials: Positive | None = None
    """Number of trainings that each method chooses its setting from. Default: the whole grid."""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0, 1, 2, 3)
    """Seeds of initial weights and data order."""
    tuning_seeds: Positive = 1
    """How many of the seeds, from the first, choose the settings. Losses are reported of the
    others: a setting is lucky with the seed that chose it."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.tuning_seeds >= max(2, len(self.seeds)):
            raise InputError(
                f"tuning_seeds: {self.tuning_seeds} leaves none of the {len(self.seeds)} seeds to "
                "report; give more seeds"
            )
        if len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"seeds: give each only once, got {self.seeds}")
        if not self.methods:
            raise InputError("methods: give at least one")
        if self.baseline is not None and self.baseline not in self.methods:
            raise InputError(f"baseline: {unknown(self.baseline, self.methods, 'method')}")
        ranges = any(isinstance(x, dict) for own in self.methods.values() for x in own.values())
        if self.trials is None and (self.sampler == "tpe" or (self.sampler == "random" and ranges)):
            raise InputError(f"trials: give a number of trials with sampler {self.sampler}")
        return self

    @property
    def tuned_on(self) -> tuple[int, ...]:
        """The seeds that choose the settings."""
        return self.seeds[: self.tuning_seeds]

    @property
    def reported(self) -> tuple[int, ...]:
        """The other seeds, which losses are reported of; the only one, if it is one."""
        return self.seeds[self.tuning_seeds :] or self.seeds

    @property
    def compared_with(self) -> str:
        """The baseline, also if that is the default."""
        return self.baseline or next(iter(self.methods))

    @cached_property
    def task(self) -> Task:
        """The recipe and the recipe that it starts from."""
        recipe = Recipe(**{**read_recipe(self.recipe), **self.change})
        start = None if self.start is None else Recipe(**read_recipe(self.start))
        names = (name for name in (self.recipe, self.start) if name is not None)
        return Task(" on ".join(Path(name).stem for name in names), recipe, start)

    @cached_property
    def families(self) -> dict[str, "MethodGrid"]:
        """The methods, each with its grid.

        Raises:
            InputError: a method cannot be used, or `change` has an option that no method takes.
        """
        found = {name: MethodGrid(name, self, options) for name, options in self.methods.items()}
        texts = [text for family in found.values() for text in family.texts]
        try:
            refuse_untaken(keys_with(METHOD) & self.change.keys(), texts, self.task.recipe.schedule)
        except InputError as error:
            raise InputError(f"change: {error}") from error
        return found


Training = tuple[Method, ...]  # the methods that are read out of it


class MethodGrid:
    """A method and the grid that its setting is chosen from.

    Averages of AdamW need no trainings of their own: each training has all of their options.

    Raises:
        InputError: the method has no such option, or a value is out of its range.
    """

    def __init__(self, name: str, study: Study, options: dict[str, Any]) -> None:
        self.name, self.study, options = name, study, dict(options)
        self.written = str(options.pop("method", name))
        self.lists: dict[str, list[Any]] = {}
        self.ranges: dict[str, FloatDistribution] = {}
        for option, value in options.items():
            if value == []:
                raise InputError(f"{name}: {option}: the list is empty; give at least one value")
            if isinstance(value, dict):
                if study.sampler == "grid":
                    raise InputError(
                        f"{name}: {option}: sampler grid needs a list of values, got {value}"
                    )
                try:
                    self.ranges[option] = FloatDistribution(**value, log=True)
                except (TypeError, ValueError) as error:
                    raise InputError(f"{name}: {option}: {error}, got {value}") from error
            else:
                self.lists[option] = value if isinstance(value, list) else [value]
        self.texts: set[str] = set()  # of all its settings
        self.grid()  # raises InputError for a wrong option or value
        self.grid({option: d.high for option, d in self.ranges.items()})

    def method(self, values: dict[str, Any]) -> Method:
        """The method with these options."""
        values = dict(values)
        schedule = values.pop("schedule", None)
        parts = [self.written, *([str(schedule)] if schedule not in (None, "constant") else [])]
        text = ":".join([*parts, *(f"{k}={x}" for k, x in values.items())])
        self.texts.add(text)
        try:
            return self.study.task.recipe.method_of(text)
        except InputError as error:
            raise InputError(f"{self.name}: {error}") from error

    def grid(self, drawn: dict[str, Any] | None = None) -> list[Training]:
        """Its trainings with these drawn options; other ranges are at their low ends."""
        single = {**{name: d.low for name, d in self.ranges.items()}, **(drawn or {})}
        choices = {**self.lists, **{name: [value] for name, value in single.items()}}
        found: dict[Method, list[Method]] = {}
        for values in itertools.product(*choices.values()):
            method = self.method(dict(zip(choices, values, strict=True)))
            found.setdefault(method.trajectory, []).append(method)
        return [tuple(dict.fromkeys(methods)) for methods in found.values()]

    @cached_property
    def space(self) -> dict[str, BaseDistribution]:
        """The options that a sampler draws: those that change a training."""
        trained = [methods[0].trajectory for methods in self.grid()]
        changing = {
            option: CategoricalDistribution(values)
            for option, values in self.lists.items()
            if any(method.get(option) is not None for method in trained)
        }
        return {**self.ranges, **changing}

    def tried(self, told: Callable[[Training], float | None]) -> list[Training]:
        """The trainings that it chooses from; with TPE, those that can be drawn so far.

        Args:
            told: returns the loss of a training, or None while it is unknown.
        """
        sampler, trials = self.study.sampler, self.study.trials
        if sampler == "grid" or (sampler == "random" and not self.ranges):
            every = self.grid()
            if trials is None or trials >= len(every):
                return every
            kept = sorted(random.Random(0).sample(range(len(every)), trials))
            return [every[i] for i in kept]
        assert trials is not None
        tpe = sampler == "tpe"
        drawing = optuna.create_study(
            sampler=TPESampler(seed=0, constant_liar=True) if tpe else RandomSampler(seed=0)
        )
        found: list[Training] = []
        while len(found) < trials:
            count = min(TRIALS_AT_A_TIME, trials - len(found))
            asked = [drawing.ask(self.space) for _ in range(count)]
            new = [self.grid(each.params)[0] for each in asked]
            found += new
            values = [told(each) for each in new] if tpe else [0.0] * len(new)
            if None in values:
                break
            for each, value in zip(asked, values, strict=True):
                drawing.tell(each, value)
        return found


# ---- the plan -----------------------------------------------------------------------------------


class Chosen(NamedTuple):
    """A method's chosen setting, and how many it was chosen from."""

    name: str  # in the sweep's file
    method: Method | None  # None: no training was finished without divergence
    selection: float  # mean selection loss, nats a token
    trainings: int
    models: int  # read out of the trainings
    edge: str  # options at an edge of its grid, where no best was found


class Tuning:
    """The plan of a sweep: all settings with the tuning seeds, then the chosen with the others."""

    def __init__(self, study: Study) -> None:
        self.study, self.name = study, "sweep"

    def wanted(self, outcomes: Outcomes) -> list[Cell]:
        """All cells; those of the chosen settings once the tuning has ended."""
        trainings = self._shared(self.tried(outcomes))
        tuning = self._cells(trainings, self.study.tuned_on)
        if any(cell.key not in outcomes.ended for cell in tuning):
            return tuning
        of = {method: training for training in trainings for method in training}
        # With all their methods, so that they are the same cells as in the tuning.
        best = [of[chosen.method] for chosen in self.chosen(outcomes) if chosen.method]
        more = self._cells(dict.fromkeys(best), self.study.reported)
        return list({cell.key: cell for cell in [*tuning, *more]}.values())

    def losses(self, outcomes: Outcomes) -> dict[Method, dict[int, float]]:
        """Final losses on the reported half: method -> seed -> nats a token."""
        found: dict[Method, dict[int, float]] = {}
        for cell in self.wanted(outcomes):
            if cell.key in outcomes.finished:
                for method in cell.run.methods:
                    loss = loss_of(last_row(outcomes, cell, method), "returned")
                    found.setdefault(method, {}).setdefault(cell.run.seed, loss)
        return found

    def _cells(self, trainings: Iterable[Training], seeds: Iterable[int]) -> list[Cell]:
        return [Cell(self.study.task, Run(each, seed)) for seed in seeds for each in trainings]

    def _shared(self, tried: dict[str, list[Training]]) -> list[Training]:
        """The trainings of all methods, merged where they share a trajectory.

        Trainings that TPE draws stay apart: each method's draws depend on its own losses.
        """
        trainings = list(itertools.chain(*tried.values()))
        if self.study.sampler == "tpe":
            return list(dict.fromkeys(trainings))
        methods = dict.fromkeys(itertools.chain(*trainings))
        return [run.methods for run in share_runs(methods, (0,))]

    def tried(self, outcomes: Outcomes) -> dict[str, list[Training]]:
        """The trainings that each method chooses from, as far as they are known."""

        def told(training: Training) -> float | None:
            own = self._cells([training], self.study.tuned_on)
            if any(cell.key not in outcomes.ended for cell in own):
                return None
            return min(self._chosen_by([training], outcomes).values())

        return {name: family.tried(told) for name, family in self.study.families.items()}

    def _chosen_by(self, trainings: Iterable[Training], outcomes: Outcomes) -> dict[Method, float]:
        """Mean selection loss of each method over the tuning seeds; infinite if a run failed."""
        found: dict[Method, float] = {}
        for methods in trainings:
            same = self._cells([methods], self.study.tuned_on)
            done = [cell for cell in same if cell.key in outcomes.finished]
            for method in methods:
                losses = [loss_of(last_row(outcomes, cell, method), "selection") for cell in done]
                loss = fmean(losses) if len(done) == len(same) else math.inf
                found[method] = min(loss, found.get(method, math.inf))
        return found

    def chosen(self, outcomes: Outcomes) -> list[Chosen]:
        """The best setting of each method of the file."""
        tried = self.tried(outcomes)
        losses = self._chosen_by(self._shared(tried), outcomes)
        found = []
        for name, own in tried.items():
            methods = set(itertools.chain(*own))
            best = min(itertools.chain(*own), key=losses.__getitem__)
            least = losses[best]
            method = best if least < math.inf else None
            edge = edges(method.row, (x.row for x in methods)) if method else ""
            found.append(Chosen(name, method, least, len(set(own)), len(methods), edge))
        return found


def last_row(outcomes: Outcomes, cell: Cell, method: Method) -> Row:
    """The last evaluation of a method in a cell."""
    own = method.row.items()
    rows = outcomes.finished[cell.key].rows
    return next(row for row in reversed(rows) if all(row.get(k) == x for k, x in own))


# ---- the command --------------------------------------------------------------------------------


def sweep_command(options: Sweep, console: Console) -> int:
    """Run the remaining trainings of a sweep, and write its tables; an exit status.

    Raises:
        InputError: the file, the folder or the storage cannot be used.
    """
    quiet()
    study = read_study(options.sweep)
    assert study.families  # raises InputError before a folder is made
    folder = options.out or Path("runs") / options.sweep.stem
    plan = Tuning(study)
    with locked(folder, shared=True), open_ledger(options, plan, folder) as ledger:
        if not options.show:
            work_off(ledger, options.workers, console, folder)
        ledger.look()
        write_rows(ledger, folder, json.loads(study.model_dump_json()), **baseline_of(plan, ledger))
        report_sweep(plan, ledger, folder, console)
    return 130 if ledger.interrupted else 1 if ledger.failures() else 0


def read_study(path: Path) -> Study:
    """A sweep from its file.

    Raises:
        InputError: it cannot be read, or is not a sweep.
    """
    try:
        values = parse_yaml(read_small(path))
    except OSError as error:
        raise InputError(f"cannot read the sweep {path}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise InputError(f"{path} is not a mapping of keys to values")
    return Study(**values)


def baseline_of(plan: Tuning, ledger: Ledger) -> dict[str, Any]:
    """What others are compared with, for the manifest; nothing before all trainings have ended."""
    if ledger.left():
        return {}
    chosen = next(x for x in plan.chosen(ledger.outcomes) if x.name == plan.study.compared_with)
    return {"baseline": chosen.method.label} if chosen.method else {}


def report_sweep(plan: Tuning, ledger: Ledger, folder: Path, console: Console) -> None:
    """Print the protocol and the tables; write them as CSV and report.md."""
    outcomes = ledger.outcomes
    if ledger.interrupted or ledger.left():
        left = f"{len(ledger.left())} of {len(ledger.wanted)} trainings are left"
        console.print(f"{left}." if ledger.stopped() else f"{left}; the same command resumes.")
        return
    for name, reason in ledger.failures().items():
        console.print(f"Failed: {name}: {reason}", style="red", markup=False, highlight=False)
    sentences = protocol(plan, outcomes)
    tables = [best_table(plan, outcomes), equal_table(plan, outcomes)]
    said = verdict(plan, tables[0])
    console.print(said, style="bold", highlight=False, markup=False)
    for sentence in sentences:
        console.print(f"• {sentence}", highlight=False, markup=False)
    text = f"# {name_of(folder)}\n\n**{said}**\n\n"
    text += "".join(f"- {sentence}\n" for sentence in sentences)
    for name, table in zip(("best", "equal"), tables, strict=True):
        if table.rows:
            console.print(table.shown(console))
            table.write(folder / f"{name}.csv")
            text += f"\n{table.title}\n\n{table.markdown()}"
    write_text(folder / "report.md", text)
    console.print(f"Tables and curves: {folder}", highlight=False, markup=False)


def verdict(plan: Tuning, best: Listing) -> str:
    """What the table of best settings shows, in a few sentences."""
    baseline = plan.study.compared_with
    others = [row for row in best.rows if row[0] != baseline]
    return verdict_against(baseline, [(row[0], row[-4], row[-1]) for row in others])


def protocol(plan: Tuning, outcomes: Outcomes) -> list[str]:
    """Sentences on what was fixed before the runs, and what each method chose from."""
    study = plan.study
    chosen = plan.chosen(outcomes)
    own = "; ".join(f"{x.name} {x.trainings} trainings, {x.models} models" for x in chosen)
    all_ = "Every method" if len({each.trainings for each in chosen}) == 1 else "Not every method"
    several = any(len(cell.run.methods) > 1 for cell in plan.wanted(outcomes))
    shared = " Averages of AdamW are read out of shared trainings." if several else ""
    return [
        f"{study.task.name}: with one seed, all methods start from the same weights and see the "
        "same batches for the same number of steps.",
        f"Settings: {study.sampler}, tried with seed {_listed(study.tuned_on)}. "
        f"{all_} chose from the same number of trainings: {own}.{shared}",
        "Settings were chosen on one half of the evaluation data. Losses are from the other half, "
        f"of the chosen settings with seed {_listed(study.reported)}. {_chose(study)} A diverged "
        "run counts as an infinite loss.",
        *(
            f"No best was found for {x.name}: {x.edge} of its grid. Widen the grid."
            for x in chosen
            if x.edge
        ),
    ]


def _listed(seeds: Iterable[int]) -> str:
    return ", ".join(map(str, seeds))


def _chose(study: Study) -> str:
    """A sentence on whether the reported seeds chose the settings."""
    if set(study.reported) & set(study.tuned_on):
        return "This seed also chose the settings, so the losses are too low; give more seeds."
    return "These seeds chose nothing."


def best_table(plan: Tuning, outcomes: Outcomes) -> Listing:
    """Each method at its best setting, and its difference to the baseline."""
    chosen = plan.chosen(outcomes)
    of = plan.losses(outcomes)
    reported = plan.study.reported
    losses = {
        each.name: {seed: x for seed, x in of[each.method].items() if seed in reported}
        for each in chosen
        if each.method
    }
    baseline = plan.study.compared_with
    rows: list[list[Any]] = []
    for each in chosen:
        own = losses.get(each.name, {})
        setting = [each.method.label, f"{each.method.lr:g}"] if each.method else FAILED
        ends = [len(own), fmean(own.values()) if own else math.inf]
        compared = paired(own, losses.get(baseline, {}))
        facts = [each.edge, each.trainings, each.selection]
        rows.append([each.name, *setting, *facts, *ends, *compared])
    columns = ["method", "setting", "lr", EDGE, "trainings", "selection loss", "seeds", "loss"]
    title = f"Each method at its best setting; difference to {baseline}"
    # Failed methods come after methods with a diverged seed.
    ranked = sorted(rows, key=lambda row: (row[7], not row[6]))
    return Listing.of_differences(title, columns, ranked)


def equal_table(plan: Tuning, outcomes: Outcomes) -> Listing:
    """Each pull against the same average without a pull, at equal returned κ, schedule and rate.

    Seeds that chose settings are left out where both have others.
    """
    losses, tuned_on = plan.losses(outcomes), set(plan.study.tuned_on)
    rows = []
    for method in sorted((m for m in losses if m.pulls), key=lambda m: (m.lr, m.label)):
        if method.name == "pullback" and method.get("base") != "adamw":
            continue
        for other in losses:
            if other.name != "ema" or beside_the_pull(method, other):
                continue
            if both := losses[method].keys() & losses[other].keys():
                seeds = sorted((both - tuned_on) or both)
                mine, its = ({x: losses[each][x] for x in seeds} for each in (method, other))
                means = [fmean(mine.values()), fmean(its.values())]
                first = [method.label, other.label, f"{method.lr:g}", len(seeds), *means]
                rows.append([*first, *paired(mine, its)])
    columns = ["method", "without the pull", "lr", "seeds", "loss", "without"]
    title = "Each pull against the same returned average without it, at equal learning rate"
    return Listing.of_differences(title, columns, rows)
