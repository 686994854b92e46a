"""`paceline figure`: the paper's figures, at a scale that the machine at hand can carry."""

import itertools
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import pandas as pd
import tyro
from pydantic import model_validator
from rich.console import Console

from ..files import whole
from ..train import InputError, unknown
from ..train.methods import Method, method_of_row, parse_method
from ..train.page import save
from ..train.recipe import Names, Recipe, read_recipe
from ..train.terminal import quiet
from .cells import Cell, Task, cells
from .ledger import Outcomes, Shared, open_ledger, work_off, write_rows

SLOWER = 0.7  # κ of the slower average that is read out of every PACE run beside its own
EMAS = (0.2, 0.3, 0.5, 0.7, 0.9)  # κ of the averages that are read out of every AdamW run
TUNING = (0,)  # the seed that settings are chosen with

# ---- scales -------------------------------------------------------------------------------------


class Grid(NamedTuple):
    """What settings are chosen from."""

    rates: tuple[float, ...]
    cs: tuple[float, ...]
    kappas: tuple[float, ...]  # of PACE


@dataclass(frozen=True)
class Scale:
    """What is trained, and over which grids."""

    name: str
    models: tuple[Task, ...]  # fine-tuned; the paper's SmolLM2, Qwen3, Gemma 3
    tuned: Grid  # the first of them
    others: Grid  # the others
    high: float  # a rate above those, of the first
    other_data: Task  # the paper's Tulu 3
    from_scratch: Task  # the paper's GPT-2
    scratch: Grid
    every: tuple[int, ...]  # steps between updates of the average
    seeds: tuple[int, ...] = (0, 1, 2)
    headline: tuple[int, ...] = (0, 1, 2, 3, 4)  # of the first model

    def seeds_of(self, task: Task) -> tuple[int, ...]:
        """Over which a model's headline is."""
        return self.headline if task == self.main else self.seeds

    @property
    def main(self) -> Task:
        """The model that most figures are of."""
        return self.models[0]


def scale(name: str, recipe: str | None = None) -> Scale:
    """A scale by its name, with another recipe for the model that most figures are of."""
    found = {"tiny": _tiny, "small": _small, "paper": _paper}[name]()
    if recipe is not None:
        main = _task(recipe)
        found = replace(found, models=(main, *found.models[1:]), from_scratch=main)
    return found


def _task(recipe: str, start: str | None = None, name: str | None = None, **changes: Any) -> Task:
    made = Recipe(**{**read_recipe(recipe), **changes})
    begun = None if start is None else Recipe(**read_recipe(start))
    return Task(name or (recipe if start is None else f"{recipe} on {start}"), made, begun)


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
    """What one GPU carries: the paper's smallest models, on a part of its tokens."""
    tuned = Grid((1e-3, 3e-3, 1e-2), (0.003, 0.03, 0.3, 3.0), (0.3, 0.5, 0.7))
    main = _task("smollm2-135m", name="smollm2-135m, 300 steps", steps=300, epochs=None)
    return Scale(
        name="small",
        models=(main,),
        tuned=tuned,
        others=tuned,
        high=3e-2,
        other_data=replace(
            main,
            name="smollm2-135m on Tulu 3, 300 steps",
            recipe=_with(main.recipe, data=("allenai/tulu-3-sft-mixture",), eval_split=None),
        ),
        from_scratch=_task(
            "gpt2-124m", name="gpt2-124m, 0.1B tokens", tokens=1e8, batch=96, micro_batch=32
        ),
        scratch=Grid((3e-4, 1e-3, 3e-3), (3e-4, 1e-3, 3e-3, 1e-2), (0.3, 0.5, 0.7)),
        every=(5, 20),
    )


def _paper() -> Scale:
    """The paper's own models, data and budgets."""
    rates, kappas = (3e-4, 1e-3, 3e-3), (0.2, 0.3, 0.5)
    cs = (0.015, 0.05, 0.15, 0.5)
    main = _task("smollm2-135m")
    return Scale(
        name="paper",
        models=(main, _task("smollm2-1.7b"), _task("qwen3-1.7b"), _task("gemma3-1b")),
        tuned=Grid((1e-3, 3e-3, 5e-3), (0.003, 0.01, 0.03, 0.1), kappas),
        others=Grid(rates, cs, kappas),
        high=1e-2,
        other_data=_task(
            "qwen3-1.7b",
            name="qwen3-1.7b on Tulu 3",
            data=["allenai/tulu-3-sft-mixture"],
            eval_split=None,
        ),
        from_scratch=_task("gpt2-124m"),
        scratch=Grid((3e-4, 6e-4, 1.2e-3), (3e-4, 1e-3, 3e-3, 1e-2), kappas),
        every=(5, 20),
    )


def _with(recipe: Recipe, **changes: Any) -> Recipe:
    return Recipe(**{**recipe.model_dump(), **changes})


def budget(task: Task, share: float) -> Task:
    """The same with a share of its steps."""
    recipe = task.recipe
    unit = next(x for x in ("steps", "tokens", "epochs") if getattr(recipe, x) is not None)
    part = share * getattr(recipe, unit)
    changed = _with(recipe, **{unit: round(part) if unit == "steps" else part})
    return replace(task, name=f"{task.name}, {share:.0%} of the steps", recipe=changed)


# ---- what is run --------------------------------------------------------------------------------

Stages = Iterator[list[Cell]]  # each is asked for when those before have ended


class Lab:
    """A scale, and what came of its cells up to now."""

    def __init__(self, scale: Scale, outcomes: Outcomes) -> None:
        self.scale, self.outcomes = scale, outcomes
        self.asked: set[str] | None = None  # keys of the cells of the figure at hand; None: of all

    @cached_property
    def points(self) -> pd.DataFrame:
        """A row for each evaluation of each method, in an order that no worker decides."""
        rows = pd.DataFrame([row for x in self.outcomes.finished.values() for row in x.rows])
        keys = ["setting", "label", "lr", "seed", "cell", "step"]
        return rows.sort_values(keys, ignore_index=True) if len(rows) else rows

    @cached_property
    def training(self) -> pd.DataFrame:
        """A row for each line of each training's log, in such an order."""
        rows = pd.DataFrame(
            [
                {"setting": x.rows[0]["setting"], "trained_with": x.rows[0]["trained_with"], **line}
                for x in self.outcomes.finished.values()
                for line in x.log
            ]
        )
        keys = ["setting", "trained_with", "step"]
        return rows.sort_values(keys, ignore_index=True, kind="stable") if len(rows) else rows

    @cached_property
    def ends(self) -> pd.DataFrame:
        """A row for each method of each training: its end. Divergence is an infinite loss."""
        ends = self.points[self.points.step == self.points.steps].copy()
        losses = ["live_loss", "returned_loss", "selection_loss"]
        ends[losses] = ends[losses].astype(float).fillna(float("inf"))
        return ends

    def best(
        self, task: Task, names: Sequence[str], schedules: Sequence[str], **fixed: Any
    ) -> Method:
        """The setting that returned the best model on the selection split, with the tuning seed.

        Of the figure's own runs: what it shows does not depend on which others were made.

        Args:
            task: that it was tried on.
            names: of methods.
            schedules: that may be chosen.
            fixed: options that are given; None: that it has not.
        """
        ends = self.ends
        rows = ends[
            (ends.setting == task.name)
            & ends.name.isin(names)
            & ends.schedule.isin(schedules)
            & ends.seed.isin(TUNING)
            & (self.asked is None or ends.cell.isin(self.asked or ()))
        ]
        for option, value in fixed.items():
            rows = rows[rows[option].isna() if value is None else rows[option] == value]
        if rows.empty:
            raise InputError(
                f"{task.name}: no run of {', '.join(names)} was finished to choose from"
            )
        row = rows.loc[rows.selection_loss.idxmin()]
        return method_of_row(row)


def grid(task: Task, text: str, **lists: Iterable[Any]) -> list[Method]:
    """All methods of such options."""
    return [
        parse_method(
            ":".join([text, *(f"{k}={x}" for k, x in zip(lists, values, strict=True))]),
            **task.parse(),
        )
        for values in itertools.product(*lists.values())
    ]


def _pace(task: Task, text: str = "pace", **lists: Iterable[Any]) -> list[Method]:
    """PACE, and a slower average of the same trainings."""
    return [*grid(task, text, **lists), *grid(task, f"{text}:return_kappa={SLOWER}", **lists)]


def _averages(task: Task, schedule: str, rates: Iterable[float]) -> list[Method]:
    """AdamW and what watches it: under a constant rate every average, else EMAs."""
    found = [
        *grid(task, f"adamw:{schedule}", lr=rates),
        *grid(task, f"ema:{schedule}", kappa=EMAS, lr=rates),
    ]
    if schedule == "constant":
        for name in ("uniform", "lawa:every=20", "bema"):
            found += grid(task, name, lr=rates)
    return found


def _tried(task: Task, grid_: Grid) -> list[Method]:
    """PACE at every setting, AdamW and its averages at every rate: constant."""
    return [
        *_averages(task, "constant", grid_.rates),
        *_pace(task, lr=grid_.rates, kappa=grid_.kappas, pullback=grid_.cs),
    ]


def _scheduled(task: Task, grid_: Grid) -> list[Method]:
    """Every baseline: AdamW and its EMAs under every schedule, and Schedule-Free."""
    rates = grid_.rates
    return [
        *_averages(task, "cosine", rates),
        *_averages(task, "wsd", rates),
        *grid(task, "ema:power", kappa=(0.3, 0.5), lr=rates),
        *grid(task, "ema:twin", kappa=(0.3,), twin_gain=(0.5,), lr=rates),
        *grid(task, "schedule-free", lr=rates),
    ]


DECAYING = ("cosine", "wsd")
SCHEDULES = ("constant", *DECAYING)


def grids(scale: Scale) -> list[tuple[Task, Grid]]:
    """The models that are fine-tuned, each with its own."""
    return [(task, scale.tuned if task == scale.main else scale.others) for task in scale.models]


def _all(parts: Iterable[list[Cell]]) -> list[Cell]:
    return list(itertools.chain(*parts))


def _maps(lab: Lab) -> Stages:
    """6: κ × c × rate, of all models."""
    yield [
        cell for task, own in grids(lab.scale) for cell in cells(task, _tried(task, own), TUNING)
    ]


def _by_schedule(lab: Lab) -> Stages:
    """16: the baselines under every schedule."""
    yield from _maps(lab)
    yield [
        cell
        for task, own in grids(lab.scale)
        for cell in cells(task, _scheduled(task, own), TUNING)
    ]


def contenders(lab: Lab, task: Task) -> dict[str, Method]:
    """Each at its best setting: what the headline is about."""
    averages = ("ema", "uniform", "lawa", "bema")
    return {
        "AdamW": lab.best(task, ["adamw"], SCHEDULES),
        "EMA": lab.best(task, ["ema"], SCHEDULES),
        "an average at a constant rate": lab.best(task, averages, ["constant"]),
        "EMA, power or twin schedule": lab.best(task, ["ema"], ["power", "twin"]),
        "Schedule-Free": lab.best(task, ["schedule-free"], ["constant"]),
        "PACE, constant": lab.best(task, ["pace"], ["constant"], return_kappa=None, every=None),
        "PACE, constant, slower average": lab.best(
            task, ["pace"], ["constant"], return_kappa=SLOWER, every=None
        ),
    }


def twin(lab: Lab, task: Task, method: Method) -> Method:
    """The EMA at the rate that a PACE run's own mean gain amounts to."""
    ends = lab.ends
    row = ends[(ends.setting == task.name) & (ends.label == method.label) & (ends.lr == method.lr)]
    gains = lab.points[lab.points.run.isin(row.run) & (lab.points.setting == task.name)]
    g = round(float(gains.gain_mean.mean()), 3)
    text = f"ema:twin:kappa={method.kappa}:twin_gain={min(1.0, max(g, 0.001))}:lr={method.lr}"
    return parse_method(text)


def _headline(lab: Lab) -> Stages:
    """1, 7, 11: each at its best setting, over seeds, with PACE's own twin."""
    yield from _by_schedule(lab)
    for task in lab.scale.models:
        best = contenders(lab, task)
        own = twin(lab, task, best["PACE, constant"])
        yield seeded(task, [*best.values(), own], lab.scale.seeds_of(task))


def seeded(task: Task, methods: Iterable[Method], seeds: Iterable[int]) -> list[Cell]:
    """These methods over seeds, in cells with all that is read out of them elsewhere."""
    return cells(task, [each for method in methods for each in _whole(task, method)], seeds)


def _whole(task: Task, method: Method) -> list[Method]:
    trained = method.trajectory
    if trained.name == "adamw" and trained.schedule in SCHEDULES:
        return _averages(task, trained.schedule, (trained.lr,))
    if trained.name == "pace":
        return [trained, trained.model_copy(update={"return_kappa": SLOWER})]
    return [method]


def _rarer(lab: Lab, kappas: Sequence[float]) -> Stages:
    """3, 8: the average is updated every so many steps; with every step as in 6."""
    task, own = lab.scale.main, lab.scale.tuned
    tried = [
        *_averages(task, "constant", own.rates),
        *_pace(task, lr=own.rates, kappa=kappas, pullback=own.cs),
        *_pace(task, lr=own.rates, kappa=kappas, pullback=own.cs, every=lab.scale.every),
    ]
    yield cells(task, tried, TUNING)


def _clipping(lab: Lab) -> Stages:
    """4, 12, 13: what 6 runs."""
    yield from _maps(lab)


def _budgets(lab: Lab, task: Task) -> Stages:
    """A decay at half and three quarters of the steps, at each rate, and then over seeds."""
    own = lab.scale.scratch if task == lab.scale.from_scratch else lab.scale.tuned
    short = [budget(task, share) for share in (0.5, 0.75)]
    yield _all(cells(each, _averages(each, "wsd", own.rates), TUNING) for each in short)
    seeds = lab.scale.seeds
    decaying = lab.best(task, ["adamw"], ["wsd"])
    pace = lab.best(task, ["pace"], ["constant"], return_kappa=None, every=None)
    ema = lab.best(task, ["ema"], ["constant"])
    yield seeded(task, [decaying, pace, ema], seeds)
    for each in short:
        yield seeded(each, [lab.best(each, ["adamw"], ["wsd"])], seeds)


def _free(lab: Lab) -> Stages:
    """5: against Schedule-Free on two models; one constant run against decays at three budgets."""
    yield from _headline(lab)
    yield from _budgets(lab, lab.scale.main)


def _other_data(lab: Lab) -> Stages:
    """10: other data."""
    task, own = lab.scale.other_data, lab.scale.others
    yield cells(task, _tried(task, own), TUNING)


def _rates(lab: Lab) -> Stages:
    """14, 15: across rates, up to one that is too high, baselines under every schedule."""
    yield from _by_schedule(lab)
    task, own = lab.scale.main, lab.scale.tuned
    high = own._replace(rates=(lab.scale.high,))
    yield cells(task, [*_tried(task, high), *_scheduled(task, high)], TUNING)


def _seeds(lab: Lab) -> Stages:
    """17: constant and WSD, over seeds."""
    yield from _by_schedule(lab)
    for task, own in grids(lab.scale):
        best = lab.best(task, ["pace"], ["constant"], return_kappa=None, every=None)
        yield cells(
            task,
            _pace(
                task, "pace:wsd", pullback=[best.get("pullback")], kappa=[best.kappa], lr=own.rates
            ),
            TUNING,
        )
    for task in lab.scale.models:
        yield seeded(task, constant_and_decaying(lab, task).values(), lab.scale.seeds)


def constant_and_decaying(lab: Lab, task: Task) -> dict[str, Method]:
    """The best AdamW, EMA and PACE of both."""
    return {
        f"{label}, {schedule}": lab.best(task, [name], [schedule], return_kappa=None, every=None)
        for schedule in ("constant", "wsd")
        for label, name in (("AdamW", "adamw"), ("EMA", "ema"), ("PACE", "pace"))
    }


def _pretraining(lab: Lab) -> Stages:
    """9: κ × c × rate from scratch; with the baselines under every schedule."""
    task, own = lab.scale.from_scratch, lab.scale.scratch
    yield cells(task, _tried(task, own), TUNING)
    yield cells(task, _scheduled(task, own), TUNING)


def middle_rate(lab: Lab) -> float:
    """The rate of the figures that are of one: the constant EMA's best at κ = 0.5."""
    return lab.best(lab.scale.from_scratch, ["ema"], ["constant"], kappa=0.5).lr


def _alone(lab: Lab) -> Stages:
    """2: the pull alone, at κ = 0.5, constant and under WSD."""
    yield from _pretraining(lab)
    task, own = lab.scale.from_scratch, lab.scale.scratch
    rate = middle_rate(lab)
    yield cells(task, _pace(task, "pace:wsd", pullback=own.cs, kappa=(0.5,), lr=(rate,)), TUNING)


def _under_schedules(lab: Lab) -> Stages:
    """18: c under each schedule at κ = 0.5, over seeds."""
    yield from _pretraining(lab)
    task, own = lab.scale.from_scratch, lab.scale.scratch
    rate = middle_rate(lab)
    for schedule in SCHEDULES:
        tried = _pace(task, f"pace:{schedule}", pullback=own.cs, kappa=(0.5,), lr=(rate,))
        yield cells(task, [*tried, *_averages(task, schedule, (rate,))], lab.scale.seeds)


def _under_schedules_by_kappa(lab: Lab) -> Stages:
    """19: the same at each κ, one seed."""
    yield from _pretraining(lab)
    task, own = lab.scale.from_scratch, lab.scale.scratch
    rate = middle_rate(lab)
    for schedule in SCHEDULES:
        tried = _pace(task, f"pace:{schedule}", pullback=own.cs, kappa=own.kappas, lr=(rate,))
        yield cells(task, [*tried, *_averages(task, schedule, (rate,))], TUNING)


def _branches(lab: Lab) -> Stages:
    """20: decays at three budgets, from scratch."""
    yield from _pretraining(lab)
    yield from _budgets(lab, lab.scale.from_scratch)


def twinned(scale: Scale) -> list[tuple[Task, Grid]]:
    """What PACE is held against its twin on at each rate."""
    return [(scale.main, scale.tuned), (scale.from_scratch, scale.scratch)]


def _twins(lab: Lab) -> Stages:
    """PACE against its own twin, at each rate, fine-tuning and from scratch, over seeds."""
    yield from _maps(lab)
    yield from _pretraining(lab)
    for task, own in twinned(lab.scale):
        for rate in own.rates:
            best = lab.best(task, ["pace"], ["constant"], return_kappa=None, every=None, lr=rate)
            yield seeded(task, [best, twin(lab, task, best)], lab.scale.seeds)


class Figure(NamedTuple):
    """One figure: what it shows, and what it needs."""

    title: str
    stages: Callable[[Lab], Stages]


FIGURES = {
    "1": Figure("fine-tuning three models, each method at its best", _headline),
    "2": Figure("pretraining, the pull alone", _alone),
    "3": Figure("update frequency × c × learning rate at κ = 0.3", lambda lab: _rarer(lab, (0.3,))),
    "4": Figure("clipped coordinates over training", _clipping),
    "5": Figure("against Schedule-Free, and decays at three budgets", _free),
    "6": Figure("κ × c × learning rate, three models", _maps),
    "7": Figure("training loss, each method at its best", _headline),
    "8": Figure(
        "update frequency × c × learning rate at two κ", lambda lab: _rarer(lab, (0.3, 0.5))
    ),
    "9": Figure("κ × c × learning rate, pretraining", _pretraining),
    "10": Figure("other data: κ × learning rate", _other_data),
    "11": Figure("the last quarter of figure 1", _headline),
    "12": Figure("clipped coordinates over training, further models", _clipping),
    "13": Figure("clipped coordinates at the end against c and rate", _clipping),
    "14": Figure("across learning rates, baselines under their best schedule", _rates),
    "15": Figure("across learning rates: curves", _rates),
    "16": Figure("under every schedule", _by_schedule),
    "17": Figure("over seeds, constant and WSD", _seeds),
    "18": Figure("c under every schedule, over seeds, pretraining", _under_schedules),
    "19": Figure("figure 18 by κ", _under_schedules_by_kappa),
    "20": Figure("decays at three budgets beside one constant run", _branches),
    "twin": Figure("PACE against its own twin", _twins),
}


class Plan:
    """The cells of some figures at a scale."""

    def __init__(self, scale: Scale, figures: Iterable[str]) -> None:
        self.scale, self.figures = scale, tuple(figures)
        self.name = f"figures, {scale.name}"

    def wanted(self, outcomes: Outcomes) -> list[Cell]:
        """All, each stage of a figure once those before have ended."""
        lab = Lab(self.scale, outcomes)
        found: dict[str, Cell] = {}
        for figure in self.figures:
            found |= {cell.key: cell for cell in cells_of(figure, lab)}
        return list(found.values())


def cells_of(figure: str, lab: Lab) -> list[Cell]:
    """What a figure needs, as far as that is known."""
    found: list[Cell] = []
    lab.asked = set()
    for stage in FIGURES[figure].stages(lab):
        found += stage
        lab.asked.update(cell.key for cell in stage)
        if any(cell.key not in lab.outcomes.ended for cell in stage):
            break
    return found


# ---- the command --------------------------------------------------------------------------------


class Figures(Shared):
    """Make figures of the paper at a scale, from what was run for them.

    Runs that are there are never run again, whichever figure asked for them; the same command goes
    on where it was killed, and shares the work with others that reach the storage.
    """

    figures: tyro.conf.Positional[Annotated[tuple[str, ...], Names]]
    """1 to 20, twin, or all; several separated by commas."""
    scale: Literal["tiny", "small", "paper"] = "tiny"
    """tiny: 2 processor cores, 10 to 50 minutes a figure, less with those of others; small: one GPU; paper: the paper's models, data and budgets."""
    run: bool = False
    """Run what is not there. Without it, say what that is, and draw what can be drawn."""
    recipe: str | None = None
    """Another recipe for the model that is fine-tuned, or pretrained."""
    out: Path | None = None
    """Folder for figures, tables and runs. Default: runs/figures-<scale>."""

    @model_validator(mode="after")
    def _known(self) -> Self:
        for figure in self.figures:
            if figure != "all" and figure not in FIGURES:
                raise InputError(f"figures: {unknown(figure, FIGURES, 'figure')}")
        return self


def figure_command(options: Figures, console: Console) -> int:
    """Run what is wanted, and draw; an exit status.

    Raises:
        InputError: the recipe, the folder or the storage cannot be used.
    """
    quiet()
    wanted = tuple(FIGURES) if "all" in options.figures else options.figures
    folder = options.out or Path("runs") / f"figures-{options.scale}"
    plan = Plan(scale(options.scale, options.recipe), wanted)
    with open_ledger(options, plan, folder) as ledger:
        if options.run:
            work_off(ledger, options.workers, console)
        ledger.look()
        lab = Lab(plan.scale, ledger.outcomes)
        for figure in wanted:
            _show(figure, lab, options, folder, console)
        write_rows(ledger, folder, {"scale": options.scale, "figures": wanted})
    return 130 if ledger.interrupted else 1 if ledger.failures() else 0


def _show(figure: str, lab: Lab, options: Figures, folder: Path, console: Console) -> None:
    """Draw a figure whose runs have ended; of another say what is missing."""
    from .draw import draw  # which draws these

    found = cells_of(figure, lab)
    failed = [cell for cell in found if cell.key in lab.outcomes.failed]
    missing = [cell for cell in found if cell.key not in lab.outcomes.ended]
    for cell in failed:
        reason = lab.outcomes.failed[cell.key]
        console.print(f"Failed: {cell.name}: {reason}", style="red", markup=False)
    if missing:
        console.print(
            f"Figure {figure}: {len(missing)} of {len(found)} trainings are not there"
            f"{' yet' if options.run else '; --run runs them'}.",
            highlight=False,
        )
        if options.scale == "paper" and not options.run:
            script = write_script(figure, missing, folder)
            console.print(f"Their commands: {script}", highlight=False, markup=False)
        return
    try:
        drawn = draw(figure, lab)
    except InputError as error:  # too much has failed
        console.print(f"Figure {figure} cannot be drawn: {error}", style="red", markup=False)
        return
    name = f"figure-{int(figure):02}" if figure.isdigit() else f"figure-{figure}"
    save(drawn.figure, folder / name)
    with whole(folder / f"{name}.csv", shared=True) as partial:
        drawn.table.to_csv(partial, index=False, lineterminator="\n", float_format="%.6g")
    command = f"paceline figure {figure} --scale {options.scale} --run"
    command += f" --recipe {options.recipe}" if options.recipe else ""
    title = f"Figure {figure}: {FIGURES[figure].title}"
    with whole(folder / f"{name}.md", shared=True) as partial:
        partial.write_text(
            f"# {title}\n\n![{title}]({name}.svg)\n\n    {command}\n\n{drawn.ends.title}, nats a "
            f"token:\n\n{drawn.ends.markdown()}\nWhat is drawn: [{name}.csv]({name}.csv)\n",
            encoding="utf-8",
        )
    if len(options.figures) == 1:
        console.print(drawn.ends.shown())
    console.print(
        f"{title}: {folder / name}.svg, .png, .csv, .md",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def write_script(figure: str, missing: list[Cell], folder: Path) -> Path:
    """The commands that make a figure's runs one by one, as `paceline train` takes them.

    On several GPUs, put torchrun in front. What is run so is shown by `paceline report`; to have the
    figure drawn, `paceline figure --run` runs the cells itself, a GPU each.
    """
    recipes = folder / "recipes"
    recipes.mkdir(exist_ok=True)
    lines = [
        "#!/bin/sh",
        f"# Figure {figure}: {FIGURES[figure].title}.",
        "# All of it, resumable, by as many GPUs and machines as run this line:",
        f"# paceline figure {figure} --scale paper --run --storage postgresql://USER@HOST/NAME",
        "# Or one by one, as far as the settings are known; `paceline report` shows them:",
        "set -e",
    ]
    for cell in missing:
        name = "".join(x if x.isalnum() else "-" for x in cell.task.name).replace("--", "-")
        recipe = recipes / f"{name}.yaml"
        with whole(recipe, shared=True) as partial:
            partial.write_text(cell.task.recipe.to_yaml(), encoding="utf-8")
        for run, method in zip(cell.run.names, cell.run.methods, strict=True):
            if method.get("return_kappa") is None:
                words = ["paceline", "train", str(recipe), "--method", method.written]
                words += ["--lr", f"{method.lr:g}", "--seed", str(cell.run.seed)]
                lines.append(shlex.join([*words, "--out", str(folder / "runs" / name / run)]))
    path = folder / f"figure-{figure}.sh"
    with whole(path, shared=True) as partial:
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
