"""Settings beyond the tiny figures' edges, on made-up losses and on those that are committed."""

import shutil
from pathlib import Path

import pandas as pd
import pytest
import tiny_edges

from paceline.study.cells import Result
from paceline.study.ledger import Outcomes

RESULTS = Path(__file__).parents[2] / "results" / "tiny"


@pytest.fixture(scope="module")
def figure():
    return pd.read_csv(RESULTS / "figure-01.csv")


def outcomes_of(cells, low, loss=3.0):
    """Outcomes of cells in which one setting, by model, label and rate, has a loss of 2."""
    finished = {}
    for cell in cells:
        rows = []
        for x in cell.run.methods:
            own = 2.0 if (cell.task.name, x.label, x.lr) == low else loss
            facts = {"setting": cell.task.name, "label": x.label, "seed": cell.run.seed}
            ends = {"step": 9, "steps": 9, "returned_loss": own, "selection_loss": own}
            rows.append({**x.row, **facts, **ends})
        finished[cell.key] = Result(rows, [])
    return Outcomes(finished, {})


def test_the_committed_tables_are_those_of_the_committed_losses(tmp_path, monkeypatch):
    for name in ("figure-01.csv", "edges.csv"):
        shutil.copy(RESULTS / name, tmp_path)
    monkeypatch.setattr("sys.argv", ["tiny_edges.py", str(tmp_path), "--tables"])
    tiny_edges.main()
    assert (tmp_path / "edges.md").read_text() == (RESULTS / "edges.md").read_text()


def test_all_choices_of_figure_1_are_among_the_settings(figure):
    losses = tiny_edges.Losses(pd.DataFrame(), figure)
    assert len([losses.choice(x) for x in tiny_edges.families()]) == 15


def test_a_lower_setting_beyond_is_trained_over_seeds_with_the_choice(figure):
    plan = tiny_edges.EdgePlan(figure)
    tuned = plan.wanted(Outcomes({}, {}))
    assert {cell.run.seed for cell in tuned} == {0}
    level = outcomes_of(tuned, None)  # a tie leaves the choice
    assert plan.wanted(level) == tuned

    low = ("tiny-sft on tiny-qwen3", "ema power kappa=0.7", 0.1)
    over_seeds = plan.wanted(outcomes_of(tuned, low))[len(tuned) :]
    assert {cell.run.seed for cell in over_seeds} == {1, 2, 3}
    trained = {(x.label, x.lr) for cell in over_seeds for x in cell.run.methods}
    assert trained == {low[1:], ("ema power kappa=0.5", 0.032)}

    losses = tiny_edges.Losses(tiny_edges.table_of(outcomes_of([*tuned, *over_seeds], low)), figure)
    chosen, replaced, _ = tiny_edges.tables(losses)
    [row] = [x for x in chosen.rows if x[0] == "tiny-qwen3: EMA, power or twin schedule"]
    assert row[2:] == [
        3.0,
        "ema power kappa=0.7 at 0.1",
        2.0,
        "lr at the top, kappa at the top",
    ]
    assert replaced.rows[0][:3] == [f"{row[0]}: {row[3]}", 3, -1.0]


def test_edges_are_those_of_the_figures_grid_and_the_settings_beyond():
    """Within the settings beyond alone the lowest rate and κ would be edges."""
    family = next(x for x in tiny_edges.families() if x.name == tiny_edges.PACE)
    low, *_, high = family.methods
    grids = tiny_edges.Grids()
    assert (low.lr, low.get("kappa"), grids.edge(family, low)) == (0.01, 0.3, "")
    assert grids.edge(family, high) == "lr at the top, kappa at the top"


def test_a_diverged_training_has_an_infinite_loss(figure):
    [cell, *_] = tiny_edges.EdgePlan(figure).wanted(Outcomes({}, {}))
    table = tiny_edges.table_of(outcomes_of([cell], None, loss=None))
    assert set(table.returned_loss) == set(table.selection_loss) == {float("inf")}
