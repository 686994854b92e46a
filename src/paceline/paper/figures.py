"""`paceline figure`: the paper's figures at a scale that this machine can carry."""

import shlex
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from ..files import whole, write_text
from ..study.cells import Cell
from ..study.ledger import Outcomes, open_ledger, work_off, write_rows
from ..train import InputError
from ..train.folder import locked
from ..train.page import save
from ..train.terminal import quiet, say
from . import drawing, plans
from .drawing import Drawn
from .options import FigureOptions
from .plans import Scale, ScaleRuns, Stages, scale_of


class PaperFigure(NamedTuple):
    """A figure of the paper: its title, the runs that it needs, and how it is drawn."""

    title: str
    plan: Callable[[ScaleRuns], Stages]
    draw: Callable[[ScaleRuns], Drawn]


def _scratch_maps(runs: ScaleRuns) -> Drawn:
    return drawing.maps(runs, [(runs.scale.from_scratch, runs.scale.scratch)])


FIGURES = {
    "1": PaperFigure(
        "fine-tuning three models, each method at its best", plans.headline, drawing.headline
    ),
    "2": PaperFigure("pretraining, the pull alone", plans.pull_alone, drawing.pull_alone),
    "3": PaperFigure(
        "update frequency × c × learning rate at κ = 0.3",
        lambda runs: plans.rarer(runs, (0.3,)),
        lambda runs: drawing.rarer(runs, (0.3,)),
    ),
    "4": PaperFigure(
        "clipped coordinates over training",
        plans.maps,
        lambda runs: drawing.clipping(runs, runs.scale.grids[:1]),
    ),
    "5": PaperFigure(
        "against Schedule-Free, and decays at three budgets",
        plans.schedule_free,
        drawing.schedule_free,
    ),
    "6": PaperFigure(
        "κ × c × learning rate, three models",
        plans.maps,
        lambda runs: drawing.maps(runs, runs.scale.grids),
    ),
    "7": PaperFigure("training loss, each method at its best", plans.headline, drawing.training),
    "8": PaperFigure(
        "update frequency × c × learning rate at two κ",
        lambda runs: plans.rarer(runs, (0.3, 0.5)),
        lambda runs: drawing.rarer(runs, (0.3, 0.5)),
    ),
    "9": PaperFigure("κ × c × learning rate, pretraining", plans.pretraining, _scratch_maps),
    "10": PaperFigure("other data: κ × learning rate", plans.other_data, drawing.other_data),
    "11": PaperFigure(
        "the last quarter of figure 1",
        plans.headline,
        lambda runs: drawing.headline(runs, since=0.75),
    ),
    "12": PaperFigure(
        "clipped coordinates over training, further models",
        plans.maps,
        lambda runs: drawing.clipping(runs, runs.scale.grids[1:] or runs.scale.grids),
    ),
    "13": PaperFigure(
        "clipped coordinates at the end against c and rate", plans.maps, drawing.clipped_at_end
    ),
    "14": PaperFigure(
        "across learning rates, baselines under their best schedule",
        plans.across_rates,
        drawing.across_rates,
    ),
    "15": PaperFigure(
        "across learning rates: curves", plans.across_rates, drawing.curves_across_rates
    ),
    "16": PaperFigure("under every schedule", plans.by_schedule, drawing.by_schedule),
    "17": PaperFigure("over seeds, constant and WSD", plans.over_seeds, drawing.over_seeds),
    "18": PaperFigure(
        "c under every schedule, over seeds, pretraining",
        lambda runs: plans.under_schedules(runs, by_kappa=False),
        lambda runs: drawing.under_schedules(runs, by_kappa=False),
    ),
    "19": PaperFigure(
        "figure 18 by κ",
        lambda runs: plans.under_schedules(runs, by_kappa=True),
        lambda runs: drawing.under_schedules(runs, by_kappa=True),
    ),
    "20": PaperFigure(
        "decays at three budgets beside one constant run", plans.branches, drawing.branches
    ),
    "twin": PaperFigure("PACE against its own twin", plans.twins, drawing.twins),
}


class FigurePlan:
    """The cells of some figures at a scale."""

    def __init__(self, scale: Scale, figures: Iterable[str]) -> None:
        self.scale, self.figures = scale, tuple(figures)
        self.name = f"figures, {scale.name}"

    def wanted(self, outcomes: Outcomes) -> list[Cell]:
        """All cells; those of a figure's next stage once the stages before it have ended."""
        runs = ScaleRuns(self.scale, outcomes)
        found = {cell.key: cell for figure in self.figures for cell in cells_of(figure, runs)}
        return list(found.values())


def cells_of(figure: str, runs: ScaleRuns) -> list[Cell]:
    """The cells that a figure needs, as far as the results tell; settings are chosen from these."""
    found: list[Cell] = []
    runs.asked = set()
    for stage in FIGURES[figure].plan(runs):
        found += stage
        runs.asked.update(cell.key for cell in stage)
        if not runs.asked <= runs.outcomes.ended:
            break
    return found


def draw(figure: str, runs: ScaleRuns) -> Drawn:
    """A figure whose runs have all ended.

    Raises:
        InputError: so many runs have failed that there is nothing to choose a setting from.
    """
    cells_of(figure, runs)
    return FIGURES[figure].draw(runs)


# ---- the command --------------------------------------------------------------------------------


def figure_command(options: FigureOptions, console: Console) -> int:
    """Run what is missing if asked to, and draw; an exit status.

    Raises:
        InputError: the recipe, the folder or the storage cannot be used.
    """
    quiet()
    figures = tuple(FIGURES) if "all" in options.figures else options.figures
    folder = options.out or Path("runs") / f"figures-{options.scale}"
    plan = FigurePlan(scale_of(options.scale, options.recipe), figures)
    with locked(folder, shared=True), open_ledger(options, plan, folder) as ledger:
        if options.run:
            work_off(ledger, options.workers, console, folder)
        ledger.look()
        runs = ScaleRuns(plan.scale, ledger.outcomes)
        for figure in figures:
            show_figure(figure, runs, options, folder, console)
        write_rows(ledger, folder, {"scale": options.scale, "figures": figures})
    return 130 if ledger.interrupted else 1 if ledger.failures() else 0


def show_figure(
    figure: str, runs: ScaleRuns, options: FigureOptions, folder: Path, console: Console
) -> None:
    """Draw a figure whose runs have ended into files, or say how many runs are missing."""
    needed = cells_of(figure, runs)
    missing = [cell for cell in needed if cell.key not in runs.outcomes.ended]
    for cell in needed:
        if reason := runs.outcomes.failed.get(cell.key):
            console.print(f"Failed: {cell.name}: {reason}", style="red", markup=False)
    if missing:
        count = f"{len(missing)} of {len(needed)} trainings are missing"
        end = "." if options.run else "; --run runs them."
        console.print(f"Figure {figure}: {count}{end}", highlight=False)
        if options.scale == "paper" and not options.run:
            script = write_script(figure, missing, folder)
            console.print(f"Their commands: {script}", highlight=False, markup=False)
        return
    try:
        drawn = draw(figure, runs)
    except InputError as error:
        console.print(f"Figure {figure} cannot be drawn: {error}", style="red", markup=False)
        return
    name = f"figure-{int(figure):02}" if figure.isdigit() else f"figure-{figure}"
    save(drawn.figure, folder / name)
    with whole(folder / f"{name}.csv") as partial:
        drawn.table.to_csv(partial, index=False, lineterminator="\n", float_format="%.6g")
    command = f"paceline figure {figure} --scale {options.scale} --run"
    command += f" --recipe {options.recipe}" if options.recipe else ""
    title = f"Figure {figure}: {FIGURES[figure].title}"
    text = (
        f"# {title}\n\n![{title}]({name}.svg)\n\n    {command}\n\n{drawn.ends.title}, nats a token:"
    )
    text += f"\n\n{drawn.ends.markdown()}\nNumbers in the figure: [{name}.csv]({name}.csv)\n"
    write_text(folder / f"{name}.md", text)
    if len(options.figures) == 1:
        console.print(drawn.ends.shown(console))
    say(console, f"{title}: {folder / name}.svg, .png, .csv, .md")


def write_script(figure: str, missing: list[Cell], folder: Path) -> Path:
    """Write the commands of `paceline train` that make a figure's runs one by one.

    On several GPUs, put torchrun in front of a command. `paceline report` shows such runs. The
    figure itself is drawn from the runs of `paceline figure --run`, which uses one GPU a cell.
    """
    recipes = folder / "recipes"
    recipes.mkdir(exist_ok=True)
    lines = [
        "#!/bin/sh",
        f"# Figure {figure}: {FIGURES[figure].title}.",
        "# To run all of it, on as many GPUs and machines as run this line, with resuming:",
        f"# paceline figure {figure} --scale paper --run --storage postgresql://USER@HOST/NAME",
        "# Or run these one by one, as far as settings are known; `paceline report` shows them:",
        "set -e",
    ]
    for cell in missing:
        name = "".join(x if x.isalnum() else "-" for x in cell.task.name).replace("--", "-")
        recipe = recipes / f"{name}.yaml"
        write_text(recipe, cell.task.recipe.to_yaml())
        for run, method in zip(cell.run.names, cell.run.methods, strict=True):
            if method.get("return_kappa") is None:
                words = ["paceline", "train", str(recipe), "--method", method.written]
                words += ["--seed", str(cell.run.seed)]
                lines.append(shlex.join([*words, "--out", str(folder / "runs" / name / run)]))
    path = folder / f"figure-{figure}.sh"
    write_text(path, "\n".join(lines) + "\n")
    return path
