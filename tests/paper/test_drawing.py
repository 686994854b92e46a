"""Every figure is drawn from results."""

import pytest

pytest.importorskip("optuna")
pytest.importorskip("pandas")

from papers import work_off
from rich.console import Console

from paceline.paper import figures
from paceline.paper.figures import FIGURES, FigurePlan, cells_of, draw
from paceline.paper.plans import ScaleRuns
from paceline.study.ledger import Outcomes


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
