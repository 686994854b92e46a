"""What the figures train, and which settings they choose."""

import math

import pytest

pytest.importorskip("optuna")
pytest.importorskip("pandas")

from papers import task, work_off

from paceline.paper.figures import FIGURES, FigurePlan, cells_of, draw
from paceline.paper.plans import RETURN_KAPPA, ScaleRuns, cells_over_seeds, scale_of, shortened
from paceline.study.cells import Cell
from paceline.study.ledger import Outcomes
from paceline.train.recipe import Recipe, read_recipe


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
