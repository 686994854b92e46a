"""What the figures train, and which settings they choose."""

import math
from dataclasses import replace

import pytest

pytest.importorskip("optuna")
pytest.importorskip("pandas")

from papers import task, work_off

from paceline.paper.figures import FIGURES, FigurePlan, cells_of, draw
from paceline.paper.plans import (
    EMA_KAPPAS,
    RETURN_KAPPA,
    TUNING,
    Grid,
    ScaleRuns,
    cells_over_seeds,
    scale_of,
    shortened,
)
from paceline.study.cells import Cell
from paceline.study.ledger import Outcomes
from paceline.study.statistics import EDGE, WIDEN
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
    assert {cell.run.seed for cell in second} == {0}  # schedules; other seeds come last
    work_off(plan, outcomes)
    seeds = {
        name: {c.run.seed for c in plan.wanted(outcomes) if c.task.name == name}
        for name in ("one", "two")
    }
    assert seeds == {"one": {0, 1, 2, 3}, "two": {0, 1, 2}}


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
    constant = [cell for cell in watching if cell.trajectory.schedule == "constant"]
    assert len(constant) == 2  # rates
    names = [method.name for method in constant[0].run.methods]
    assert names.count("ema") == len(EMA_KAPPAS) == 7
    assert {"adamw", "uniform", "lawa", "bema"} < set(names)
    falling = [cell for cell in watching if cell not in constant]
    assert len(falling) == 2 * 4  # three powers and a twin
    for cell in falling:  # its own average, and the slower one of PACE
        assert [method.get("return_kappa") for method in cell.run.methods] == [None, RETURN_KAPPA]


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
    """Figure 6 tries κ = 0.5 beside 0.3, which is all that figure 3 has; here it is better."""
    plan, outcomes = FigurePlan(small, ["3", "6"]), Outcomes({}, {})
    work_off(plan, outcomes)
    runs = ScaleRuns(small, outcomes)
    for figure, kappa in (("3", 0.3), ("6", 0.5), ("3", 0.3)):
        draw(figure, runs)
        assert runs.best_pace(small.main).kappa == kappa


@pytest.mark.parametrize("name", ["tiny", "small", "paper"])
def test_no_seed_that_chooses_is_reported(name):
    scale = scale_of(name)
    assert not set(TUNING) & {*scale.seeds, *scale.headline}


@pytest.mark.parametrize("figure", ["1", "5", "11", "14", "15", "17", "18", "20"])
def test_figures_over_seeds_show_those_that_chose_nothing(figure, small, everything):
    drawn = draw(figure, ScaleRuns(small, everything.outcomes))
    assert set(drawn.table.seed) <= {1, 2, 3}
    if "seeds" in drawn.ends.columns:
        at = drawn.ends.columns.index("seeds")
        assert {row[at] for row in drawn.ends.rows} <= {2, 3}
    assert figure in ("5", "20") or "seeds that chose nothing" in drawn.ends.title


def test_figures_of_one_seed_say_that_it_chose(small, everything):
    runs = ScaleRuns(small, everything.outcomes)
    for figure in ("2", "3", "6", "9", "10", "16", "19"):
        assert draw(figure, runs).ends.title.endswith("the seed that chose the settings")


def test_other_seeds_change_no_choice(small):
    """Of figures over seeds, too, where other settings would be better with all seeds."""
    plan, outcomes = FigurePlan(small, ["18"]), Outcomes({}, {})
    work_off(plan, outcomes)
    runs = ScaleRuns(small, outcomes)
    before = [row[:4] for row in draw("18", runs).ends.rows]
    for result in outcomes.finished.values():
        for row in result.rows:
            if row["seed"] not in TUNING:
                row["selection_loss"] -= 1 / (row["pullback"] or 1)
                row["selection_loss"] -= 5 * (1 - (row["kappa"] or 0))
    assert [row[:4] for row in draw("18", ScaleRuns(small, outcomes)).ends.rows] == before


def test_a_chosen_setting_at_the_edge_of_its_grid_is_named(small):
    grid = Grid.full((1e-3, 3e-3, 1e-2), (0.1, 1.0, 10.0), (0.2, 0.3, 0.5))
    wider = replace(small, models=small.models[:1], tuned=grid)
    plan, outcomes = FigurePlan(wider, ["14", "16"]), Outcomes({}, {})
    work_off(plan, outcomes)  # best at 3e-3 and c = 1; a larger κ is better
    runs = ScaleRuns(wider, outcomes)
    drawn = draw("16", runs)
    at = drawn.ends.columns.index(EDGE)
    edges = {row[0].removeprefix("one: "): row[at] for row in drawn.ends.rows}
    assert edges["PACE, constant"] == "kappa at the top"
    assert edges["AdamW, constant"] == edges["EMA, constant"] == ""  # no κ is above 1
    assert edges["EMA, power"] == "kappa at the top"
    assert edges["EMA, twin"] == ""
    assert edges["PACE, one gain"] == ""  # a gain of 1 is saturated
    assert WIDEN in drawn.ends.markdown()
    across = draw("14", runs).ends  # a rate that is fixed is at no edge
    assert {row[at] for row in across.rows} >= {"", "kappa at the top"}
    assert not any("lr" in row[at] for row in across.rows)
    for result in outcomes.finished.values():
        for row in result.rows:
            row["selection_loss"] -= row["lr"] == 1e-3
    drawn = draw("16", ScaleRuns(wider, outcomes))
    edges = {row[0].removeprefix("one: "): row[at] for row in drawn.ends.rows}
    assert edges["PACE, constant"] == "lr at the bottom, kappa at the top"
    assert edges["AdamW, constant"] == "lr at the bottom"


@pytest.mark.parametrize("name", ["tiny", "small", "paper"])
def test_one_gain_and_its_schedules_are_tried_beside_pace(name):
    """At the same rates, with the same averages returned."""
    runs = ScaleRuns(scale_of(name), Outcomes({}, {}))
    for figure in ("6", "9"):
        tried = [(c.task.name, m) for c in cells_of(figure, runs) for m in c.run.methods]
        for setting in {where for where, _ in tried}:
            kinds = {
                kind: {
                    (m.lr, m.get("return_kappa"))
                    for where, m in tried
                    if (where, m.name, m.get("gain"), m.schedule) == (setting, *kind)
                }
                for kind in (
                    ("pace", None, "constant"),
                    ("pace", "scalar", "constant"),
                    ("ema", None, "power"),
                    ("ema", None, "twin"),
                )
            }
            assert len(kinds["pace", None, "constant"]) >= 6
            assert len(set(map(frozenset, kinds.values()))) == 1


def test_the_pulls_of_the_tiny_scale():
    for grid in (scale_of("tiny").tuned, scale_of("tiny").scratch):
        assert grid.rates == (1e-3, 3e-3, 1e-2, 1.8e-2, 3.2e-2)
        assert grid.kappas == (0.2, 0.3, 0.5, 0.7)
        assert grid.pullbacks[-1] == 100
        assert len(set(grid.pulls)) == len(grid.pulls)
        for lr in grid.rates:
            cs = {k: sorted(c for x, c, kappa in grid.pulls if (x, kappa) == (lr, k)) for k in
                  grid.kappas}  # fmt: skip
            assert cs[0.3] == cs[0.5]
            assert (cs[0.2], cs[0.7]) == (cs[0.3][-2:], cs[0.3][:2])


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
