import math
import random
import shlex

import pandas as pd
import pytest

pytest.importorskip("optuna")
pytest.importorskip("pandas")

from rich.console import Console

from paceline.cli import _parse, main
from paceline.paper import figures
from paceline.paper.figures import FIGURES, FigurePlan, cells_of, draw
from paceline.paper.plans import (
    RETURN_KAPPA,
    Grid,
    Scale,
    ScaleRuns,
    cells_over_seeds,
    scale_of,
    shortened,
)
from paceline.study.cells import Cell, Result, Task
from paceline.study.ledger import Outcomes
from paceline.train.methods import parse_method
from paceline.train.recipe import Recipe, read_recipe
from paceline.train.run import Train

STEPS = (0, 200, 400, 600)


def task(name, recipe, start=None, **changes):
    begun = None if start is None else Recipe(**read_recipe(start))
    return Task(name, Recipe(**{**read_recipe(recipe), **changes}), begun)


@pytest.fixture(scope="module")
def small():
    """The tiny scale with less of everything: what is asked is the same."""
    own = Grid((1e-3, 1e-2), (0.1, 1.0), (0.3, 0.5))
    return Scale(
        name="tiny",
        models=(
            task("one", "tiny-sft", "tiny-smollm2"),
            task("two", "tiny-sft", "tiny-qwen3"),
        ),
        tuned=own,
        others=own,
        high=3e-2,
        other_data=task("other", "tiny-torch", "tiny-qwen3"),
        from_scratch=task("scratch", "tiny-gpt2"),
        scratch=own,
        every=(5,),
        seeds=(0, 1),
        headline=(0, 1, 2),
    )


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


@pytest.fixture(scope="module")
def everything(small):
    outcomes = Outcomes({}, {})
    work_off(FigurePlan(small, FIGURES), outcomes)
    return ScaleRuns(small, outcomes)


# ---- what is run ---------------------------------------------------------------------------------


@pytest.mark.parametrize("figure", FIGURES)
def test_a_figure_is_drawn_once_its_stages_have_ended(figure, everything):
    runs = everything
    assert not [c for c in cells_of(figure, runs) if c.key not in runs.outcomes.ended]
    drawn = draw(figure, runs)
    assert any(axis.lines or axis.containers for axis in drawn.figure.axes)
    assert len(drawn.table) > 0
    assert not drawn.table.isna().all().any()  # no column of nothing
    turned = Outcomes(dict(reversed(runs.outcomes.finished.items())), {})
    assert draw(figure, ScaleRuns(runs.scale, turned)).table.equals(drawn.table)
    drawn.figure.canvas.draw()


def test_a_stage_is_wanted_when_those_before_have_ended(small):
    outcomes = Outcomes({}, {})
    plan = FigurePlan(small, ["1"])
    first = plan.wanted(outcomes)
    assert {cell.run.seed for cell in first} == {0}
    assert not work_off(plan, outcomes, most=len(first) - 1)
    assert plan.wanted(outcomes) == first
    work_off(plan, outcomes, most=1)
    second = plan.wanted(outcomes)
    assert second[: len(first)] == first
    assert len(second) > len(first)
    assert {cell.run.seed for cell in second} == {0}  # schedules; seeds come last
    work_off(plan, outcomes)
    seeds = {
        name: {c.run.seed for c in plan.wanted(outcomes) if c.task.name == name}
        for name in ("one", "two")
    }
    assert seeds == {"one": {0, 1, 2}, "two": {0, 1}}


def test_what_failed_does_not_hold_up_the_rest(small):
    plan = FigurePlan(small, ["6"])
    wanted = plan.wanted(Outcomes({}, {}))
    pulled = next(cell for cell in wanted if cell.trajectory.name == "pace")
    outcomes = Outcomes({}, {pulled.key: "no memory"})
    assert work_off(plan, outcomes)
    assert len(draw("6", ScaleRuns(small, outcomes)).table) > 0


def test_a_figure_of_which_too_much_failed_is_not_drawn(small, tmp_path, capsys):
    plan = FigurePlan(small, ["6"])
    wanted = plan.wanted(Outcomes({}, {}))
    watching = next(cell for cell in wanted if cell.trajectory.name == "adamw")
    outcomes = Outcomes({}, {watching.key: "no memory"})
    work_off(plan, outcomes)
    options = figures.FigureOptions(figures=("6",))
    figures.show_figure("6", ScaleRuns(small, outcomes), options, tmp_path, Console(width=200))
    said = capsys.readouterr().out
    assert f"Failed: {watching.name}: no memory" in said
    assert "Figure 6 cannot be drawn: one: no run of ema was finished" in said
    assert not list(tmp_path.iterdir())


def test_figures_share_their_trainings(small, everything):
    runs = everything
    each = [{cell.key for cell in cells_of(figure, runs)} for figure in FIGURES]
    assert len(set.union(*each)) < 0.35 * sum(map(len, each))
    assert each[list(FIGURES).index("13")] == each[list(FIGURES).index("6")]


def test_one_adamw_is_what_every_average_reads(everything):
    watching = [
        cell
        for cell in cells_of("6", everything)
        if cell.task.name == "one" and cell.trajectory.name == "adamw"
    ]
    assert len(watching) == 2  # rates
    names = [method.name for method in watching[0].run.methods]
    assert names.count("ema") == 5
    assert {"adamw", "uniform", "lawa", "bema"} < set(names)


def test_seeds_go_on_with_the_same_cells(small, everything):
    """A chosen setting's run with the tuning seed is not run again for fewer read-outs."""
    tried = {cell.key for cell in cells_of("16", everything)}
    best = everything.best_of_each(small.main)
    again = cells_over_seeds(small.main, best.values(), (0,))
    assert {cell.key for cell in again} <= tried


def test_the_settings_are_chosen_on_the_selection_split(small):
    plan = FigurePlan(small, ["16"])
    outcomes = Outcomes({}, {})
    work_off(plan, outcomes)
    rows = [r for x in outcomes.finished.values() for r in x.rows if r["setting"] == "one"]
    pace = [r for r in rows if r["name"] == "pace" and r["return_kappa"] is None]
    for row in pace:
        wanted = (row["pullback"], row["lr"], row["kappa"]) == (0.1, 1e-2, 0.3)
        row["selection_loss"] = 1.0 if wanted else 2.0
        row["returned_loss"] = 9.0 if wanted else 1.0
    best = ScaleRuns(small, outcomes).best_of_each(small.main)["PACE, constant"]
    assert (best.pullback, best.lr, best.kappa) == (0.1, 1e-2, 0.3)


def test_a_figure_chooses_among_its_own_runs(small):
    """Figure 14 tries a rate above those of figure 16; here it is the best."""
    plan, outcomes = FigurePlan(small, ["14"]), Outcomes({}, {})
    work_off(plan, outcomes)
    for result in outcomes.finished.values():
        for row in result.rows:
            row["selection_loss"] -= row["lr"] == small.high
    runs = ScaleRuns(small, outcomes)
    for figure, high in (("16", False), ("14", True), ("16", False)):
        draw(figure, runs)
        found = runs.best_of_each(small.main).values()
        assert {method.lr == small.high for method in found} == {high}


def test_divergence_is_the_worst(small):
    plan = FigurePlan(small, ["16"])
    outcomes = Outcomes({}, {})
    work_off(plan, outcomes)
    for result in outcomes.finished.values():
        for row in result.rows:
            if row["name"] == "pace" and row["pullback"] == 1.0:
                row |= dict.fromkeys(("selection_loss", "returned_loss", "live_loss"), None)
    runs = ScaleRuns(small, outcomes)
    assert runs.best_of_each(small.main)["PACE, constant"].pullback == 0.1
    drawn = draw("6", runs)
    assert math.inf in set(drawn.table.returned_loss)  # shown, not left out


def test_the_twin_has_the_gain_that_was_measured(small, everything):
    best = everything.best_of_each(small.main)["PACE, constant"]
    other = everything.twin_of(small.main, best)
    assert (other.name, other.schedule, other.twin_gain) == ("ema", "twin", 0.25)
    assert (other.kappa, other.lr) == (best.kappa, best.lr)


def test_a_slower_average_is_not_taken_for_the_pulls_own(small, everything):
    """It is better in this landscape, so that it would be chosen."""
    best = everything.best_of_each(small.main)
    assert best["PACE, constant"].get("return_kappa") is None
    assert best["PACE, constant, slower average"].get("return_kappa") == RETURN_KAPPA
    assert best["EMA"].get("return_kappa") is None
    for figure in ("2", "14", "17"):
        labels = draw(figure, everything).table.label
        assert figure == "14" or not labels.str.contains("return_kappa").any()


@pytest.mark.parametrize(
    ("recipe", "key", "half"),
    [("tiny-gpt2", "steps", 300), ("gpt2-124m", "tokens", 1.25e9), ("smollm2-135m", "epochs", 0.5)],
)
def test_a_budget_is_a_share_of_what_the_recipe_says(recipe, key, half):
    whole = task("x", recipe)
    part = shortened(whole, 0.5)
    assert getattr(part.recipe, key) == half
    assert part.name == "x, 50% of the steps"
    assert part.recipe.model_dump(exclude={key}) == whole.recipe.model_dump(exclude={key})


@pytest.mark.parametrize("name", ["tiny", "small", "paper"])
def test_every_scale_has_what_every_figure_needs(name):
    runs = ScaleRuns(scale_of(name), Outcomes({}, {}))
    for figure in FIGURES:
        cells = cells_of(figure, runs)
        assert cells
        assert len({cell.key for cell in cells}) == len(cells)
        assert all(isinstance(cell, Cell) for cell in cells)


def test_another_recipe_is_what_is_trained(small):
    cells = cells_of("6", ScaleRuns(scale_of("tiny", "demo-sft"), Outcomes({}, {})))
    assert cells[0].task.recipe == Recipe(**read_recipe("demo-sft"))


# ---- the command ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["21"], "unknown figure '21'"),
        (["6", "--recipe", "tiny-gtp2"], "did you mean 'tiny-gpt2'?"),
        (["6", "--storage", "nothing://x"], "storage: nothing://x: "),
        (["6", "--out", "FILE"], "out: cannot make the folder FILE: "),
    ],
)
def test_bad_input(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("")
    assert main(["figure", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("paceline: ")
    assert said.count("\n") == 1
    assert message in said


def test_what_is_missing_is_said(tmp_path, capsys):
    assert main(["figure", "6,13", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "Figure 6: 117 of 117 trainings are missing; --run runs them." in said
    assert "Figure 13: 117 of 117" in said
    assert not list(tmp_path.glob("*.svg"))


def test_paper_scale_writes_commands_that_paceline_takes(tmp_path, capsys):
    assert main(["figure", "6", "--scale", "paper", "--out", str(tmp_path)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"{tmp_path}/figure-6.sh" in said.replace(" ", "").replace("Theircommands:", "")
    lines = (tmp_path / "figure-6.sh").read_text().splitlines()
    commands = [shlex.split(line) for line in lines if line.startswith("paceline train")]
    assert len(commands) > 100
    found = set()
    for words in random.Random(0).sample(commands, 12):
        options = _parse("train", Train, words[2:])
        assert options.parsed == parse_method(options.method)
        found.add(options.out)
    assert len(found) == 12
    outs = [words[words.index("--out") + 1] for words in commands]
    assert len(set(outs)) == len(outs)


def test_figures_are_files_that_say_the_same_each_time(small, everything, tmp_path, monkeypatch):
    """SVG, PNG, and the data beside them."""
    written = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        options = figures.FigureOptions(figures=("13",))
        figures.show_figure("13", everything, options, folder, Console(quiet=True))
        assert sorted(p.name for p in folder.iterdir()) == [
            f"figure-13.{kind}" for kind in ("csv", "md", "png", "svg")
        ]
        written.append([p.read_bytes() for p in sorted(folder.iterdir())])
    assert written[0] == written[1]
    table = pd.read_csv(tmp_path / "a" / "figure-13.csv")
    assert set(table.setting) == {"one"}
    assert {"pullback", "kappa", "lr", "seed", "clipped"} <= set(table.columns)
