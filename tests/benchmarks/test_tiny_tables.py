"""The tables beside the tiny figures, on made-up losses and on those that are committed."""

import shutil
from pathlib import Path
from statistics import fmean, stdev

import pandas as pd
import pytest
import tiny_tables

RESULTS = Path(__file__).parents[2] / "results" / "tiny"


def test_the_committed_tables_are_those_of_the_committed_figures(tmp_path, monkeypatch):
    for path in [*RESULTS.glob("figure-*.csv"), *RESULTS.glob("figure-*.md")]:
        shutil.copy(path, tmp_path)
    monkeypatch.setattr("sys.argv", ["tiny_tables.py", str(tmp_path)])
    tiny_tables.main()
    assert (tmp_path / "tables.md").read_text() == (RESULTS / "tables.md").read_text()


def test_a_difference_is_that_of_the_last_losses_by_seed():
    """Of figure 1's main model: PACE's slower average less the EMA, from the CSV alone."""
    runs = pd.read_csv(RESULTS / "figure-01.csv")
    runs = runs[runs.step == 636]
    losses = {
        name: runs[runs.setting == f"tiny-sft on tiny-smollm2: {name}"].set_index("seed")
        for name in (tiny_tables.ONE_GAIN, "EMA")
    }
    pairs = [
        losses[tiny_tables.ONE_GAIN].returned_loss[seed] - losses["EMA"].returned_loss[seed]
        for seed in (1, 2, 3, 4, 5)
    ]
    [table, *_] = tiny_tables.tables(RESULTS)
    [row] = [x for x in table.rows if x[0] == "tiny-smollm2: less EMA"]
    assert row[2] == 5
    half = 2.776445 * stdev(pairs) / 5**0.5  # Student's t of 4 degrees of freedom
    assert row[3:6] == pytest.approx([fmean(pairs), fmean(pairs) - half, fmean(pairs) + half])


def test_edges_of_both_sides_are_named():
    chosen = {
        "PACE": tiny_tables.Chosen("lr at the top", {1: 2.0, 2: 2.1}),
        "EMA": tiny_tables.Chosen("", {1: 2.2, 2: 2.2}),
        "AdamW": tiny_tables.Chosen("kappa at the top", {2: 2.4, 3: 2.5}),
    }
    table = tiny_tables.differences("", {"tiny-sft on m": chosen}, "PACE")
    assert [row[:3] for row in table.rows] == [
        ["m: less EMA", "PACE: lr at the top", 2],
        ["m: less AdamW", "PACE: lr at the top; other: kappa at the top", 1],
    ]
