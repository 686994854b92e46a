"""Fixtures of several files of this room. What is optional is imported where it is needed."""

import pytest


@pytest.fixture(scope="session")
def small():
    """The tiny scale with smaller grids and fewer models and seeds."""
    from papers import task

    from paceline.paper.plans import Grid, Scale

    own = Grid.full((1e-3, 1e-2), (0.1, 1.0), (0.3, 0.5))
    return Scale(
        name="tiny",
        models=(
            task("one", "tiny-sft", "tiny-smollm2"),
            task("two", "tiny-sft", "tiny-qwen3"),
        ),
        tuned=own,
        others=own,
        other_data=task("other", "tiny-torch", "tiny-qwen3"),
        from_scratch=task("scratch", "tiny-gpt2"),
        scratch=own,
        every=(5,),
        seeds=(1, 2),
        headline=(1, 2, 3),
    )


@pytest.fixture(scope="session")
def everything(small):
    from papers import work_off

    from paceline.paper.figures import FIGURES, FigurePlan
    from paceline.paper.plans import ScaleRuns
    from paceline.study.ledger import Outcomes

    outcomes = Outcomes({}, {})
    work_off(FigurePlan(small, FIGURES), outcomes)
    return ScaleRuns(small, outcomes)
