"""What is chosen from what, and what the tables of a sweep say of it."""

import io
import math
import re
from types import SimpleNamespace

import pytest

pytest.importorskip("optuna")
pytest.importorskip("transformers")

from rich.console import Console
from studies import SWEEP, cell_of, study_in, worked_off
from sweeping import result_of

from paceline.study import sweep
from paceline.study.ledger import Outcomes
from paceline.study.statistics import EDGE, WIDEN, holm, interval, p_value
from paceline.study.sweep import Tuning


def test_settings_are_chosen_by_one_half_and_numbers_are_from_the_other(tmp_path):
    plan = Tuning(study_in(tmp_path))

    def losses(method, seed):  # the smaller rate is better on the first half only
        return (1.0, 7.0 + seed) if method.lr < 5e-3 else (2.0, 3.0)

    outcomes = worked_off(plan, losses)
    assert {(x.method.lr, x.selection) for x in plan.chosen(outcomes)} == {(0.001, 1.0)}
    table = sweep.best_table(plan, outcomes)
    facts = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    assert [(row["selection loss"], row["loss"], row["seeds"]) for row in facts] == [
        (1.0, 8.0, 1)  # of seed 1; seed 0 chose
    ] * 3


def test_a_seed_that_chose_is_not_reported(tmp_path):
    plan = Tuning(study_in(tmp_path, SWEEP.replace("seeds: [0, 1]", "seeds: [5, 0, 7]")))
    outcomes = worked_off(plan, lambda method, seed: (1.0, {5: 1.0, 0: 2.0, 7: 4.0}[seed]))
    table = sweep.best_table(plan, outcomes)
    assert {(row[-6], row[-5]) for row in table.rows} == {(2, 3.0)}
    said = sweep.protocol(plan, outcomes)
    assert "tried with seed 5." in said[1]
    assert "with seed 0, 7. These seeds chose nothing." in said[2]


def test_one_seed_alone_chooses_and_is_reported(tmp_path):
    plan = Tuning(study_in(tmp_path, SWEEP.replace("seeds: [0, 1]", "seeds: [3]")))
    outcomes = worked_off(plan)
    assert {row[-6] for row in sweep.best_table(plan, outcomes).rows} == {1}
    assert "This seed also chose the settings, so" in sweep.protocol(plan, outcomes)[2]


def test_no_best_at_the_edge_of_a_grid(tmp_path):
    text = SWEEP.replace("[1e-3, 1e-2], kappa", "[1e-3, 1e-2, 1e-1], kappa")
    plan = Tuning(study_in(tmp_path, text))
    outcomes = worked_off(plan)  # a rate of 1e-2 is best, and more of the pull
    table = sweep.best_table(plan, outcomes)
    at = table.columns.index(EDGE)
    assert {row[0]: row[at] for row in table.rows} == {
        "adamw": "lr at the top",
        "ema": "kappa at the bottom",
        "pace": "lr at the top, pullback at the top",
    }
    assert WIDEN in table.markdown()
    assert sweep.protocol(plan, outcomes)[-3:] == [
        f"No best was found for {name}: {edge} of its grid. Widen the grid."
        for name, edge in (
            ("adamw", "lr at the top"),
            ("ema", "kappa at the bottom"),
            ("pace", "lr at the top, pullback at the top"),
        )
    ]
    wider = text.replace("[0.3, 0.7]", "[0.1, 0.3, 0.7]")
    plan = Tuning(study_in(tmp_path, wider))
    chosen = plan.chosen(worked_off(plan))
    assert [(x.method.kappa, x.edge) for x in chosen if x.name == "ema"] == [
        (0.1, "kappa at the bottom")
    ]


def test_a_setting_that_diverges_is_not_chosen_and_counts_as_infinite(tmp_path):
    plan = Tuning(study_in(tmp_path))

    def losses(method, seed):
        if method.name == "pace" and method.get("pullback") == 1:
            return math.nan, math.nan  # all of them
        if method.name == "ema" and seed == 1:
            return 2.0, math.inf  # after it was chosen
        return (math.inf if method.lr > 5e-3 else 3.0), 3.0

    outcomes = worked_off(plan, losses)
    assert {(x.method.lr, x.method.get("pullback")) for x in plan.chosen(outcomes)} == {
        *((0.001, None), (0.001, 0.1))
    } | {(x.method.lr, None) for x in plan.chosen(outcomes) if x.name == "ema"}
    table = sweep.best_table(plan, outcomes)
    rows = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert rows["ema"]["loss"] == math.inf
    assert rows["ema"]["seeds"] == 1
    assert rows["ema"]["difference"] is rows["ema"]["low"] is None
    assert table.rows[-1][0] == "ema"  # the last
    assert "inf" in table.markdown()


def test_a_method_of_which_nothing_was_finished_is_in_the_table(tmp_path):
    plan = Tuning(study_in(tmp_path))
    outcomes = worked_off(
        plan,
        lambda method, seed: (math.nan, math.nan) if method.name == "pace" else (1.0, 1.0),
        failing=lambda cell: cell.trajectory.schedule == "wsd",
    )
    table = sweep.best_table(plan, outcomes)
    assert [row[0] for row in table.rows][-1] == "pace"
    assert table.rows[-1][table.columns.index("loss")] == math.inf
    (pace,) = [chosen for chosen in plan.chosen(outcomes) if chosen.name == "pace"]
    assert (pace.method, pace.selection, pace.trainings) == (None, math.inf, 4)
    adamw = next(chosen for chosen in plan.chosen(outcomes) if chosen.name == "adamw")
    assert adamw.method.schedule == "constant"  # a failure is no better than a divergence
    assert adamw.trainings == 4
    assert not any(cell.run.seed for cell in plan.wanted(outcomes) if cell.trajectory.pulls)


def test_differences_are_paired_by_seed(tmp_path):
    text = SWEEP.replace("seeds: [0, 1]", "seeds: [4, 0, 1, 2, 3]\nbaseline: ema")
    plan = Tuning(study_in(tmp_path, text))
    harder = [0.0, 5.0, 1.0, 9.0]  # seeds
    better = [0.1, 0.3, 0.2, 0.4]  # than the EMA with each of them

    def losses(method, seed):
        seed = seed % 4
        pull = 1 + better[seed] if method.get("pullback") == 1 and method.lr == 0.01 else 0
        return 3 - pull, 4 + harder[seed] - (better[seed] if pull else 0)

    outcomes = worked_off(plan, losses)
    table = sweep.best_table(plan, outcomes)
    assert table.title.endswith("difference to ema")
    rows = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert rows["pace"]["loss"] == pytest.approx(4 + 3.75 - 0.25)
    assert rows["pace"]["difference"] == pytest.approx(-0.25)
    low, high = interval([-x for x in better])
    assert (rows["pace"]["low"], rows["pace"]["high"]) == pytest.approx((low, high))
    assert [rows["ema"][name] for name in ("difference", "low", "high")] == [0.0, 0.0, 0.0]
    assert rows["ema"]["Holm p"] is rows["adamw"]["Holm p"] is None  # of equal differences
    assert rows["pace"]["Holm p"] == pytest.approx(holm([p_value(better)])[0])
    assert table.rows[0][0] == "pace"


def equal_of(plan, outcomes):
    table = sweep.equal_table(plan, outcomes)
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]


def test_at_equal_rate_and_average_only_the_pull_differs(tmp_path):
    plan = Tuning(study_in(tmp_path))
    outcomes = worked_off(plan)
    rows = equal_of(plan, outcomes)
    # Each pull and rate once, against the EMA of its κ, 0.3, and not that of 0.7 or of wsd.
    assert [(row["method"], row["lr"]) for row in rows] == [
        *(("pace pullback=0.1 kappa=0.3", "0.001"), ("pace pullback=1 kappa=0.3", "0.001")),
        *(("pace pullback=0.1 kappa=0.3", "0.01"), ("pace pullback=1 kappa=0.3", "0.01")),
    ]
    assert {row["without the pull"] for row in rows} == {"ema kappa=0.3"}
    for row in rows:
        c = float(re.search(r"pullback=([\d.]+)", row["method"])[1])
        assert row["difference"] == pytest.approx(-0.1 * c)
        assert row["loss"] - row["without"] == pytest.approx(row["difference"])  # of equal seeds
    assert [row["seeds"] for row in rows] == [1, 1, 1, 1]
    # The chosen one with seed 1, which is 0.01 harder; the others with seed 0.
    assert rows[3]["loss"] - rows[2]["loss"] == pytest.approx(0.01 - 0.09)


def test_equal_means_that_nothing_else_differs(tmp_path):
    text = """
    recipe: RECIPE
    methods:
      ema: {lr: 1e-2, kappa: 0.3}
      rare: {method: pace, lr: 1e-2, pullback: 1, kappa: 0.3, every: 4}
      slower: {method: pace, lr: 1e-2, pullback: 1, kappa: 0.3, return_kappa: 0.7}
      small: {method: pace, lr: 1e-2, pullback: 1, kappa: 0.3, eps: 1e-3}
      other: {method: "pullback:sgd", lr: 1e-2, pullback: 1, kappa: 0.3}
      around: {method: "pullback:adamw", lr: 1e-2, pullback: 1, kappa: 0.3}
      warm: {method: pace, lr: 1e-2, pullback: 1, kappa: 0.3, schedule: cosine}
    seeds: [0]
    """
    plan = Tuning(study_in(tmp_path, text))
    rows = equal_of(plan, worked_off(plan))
    assert [row["method"] for row in rows] == ["pullback adamw pullback=1 kappa=0.3"]


def test_a_pull_is_compared_at_the_kappa_that_it_returns(tmp_path):
    text = """
    recipe: RECIPE
    methods:
      ema: {lr: 1e-2, kappa: [0.3, 0.7]}
      slower: {method: pace, lr: 1e-2, pullback: 1, kappa: 0.3, return_kappa: 0.7}
    seeds: [0]
    """
    plan = Tuning(study_in(tmp_path, text))
    (row,) = equal_of(plan, worked_off(plan))
    assert row["without the pull"] == "ema kappa=0.7"


def test_what_is_said_of_a_sweep_is_so(tmp_path):
    alone = "recipe: RECIPE\nmethods: {pace: {lr: [1e-3, 1e-2], pullback: 1}}\nseeds: [0, 1]\n"
    for text, shared in ((alone, False), (SWEEP, True)):
        plan = Tuning(study_in(tmp_path, text))
        said = " ".join(sweep.protocol(plan, worked_off(plan)))
        assert ("Averages of AdamW are read out of shared trainings" in said) == shared


def test_tables_fit_80_columns(tmp_path):
    plan = Tuning(study_in(tmp_path, SWEEP.replace("[0, 1]", "[0, 1, 2]")))
    outcomes = worked_off(plan)
    for table in (sweep.best_table(plan, outcomes), sweep.equal_table(plan, outcomes)):
        for width in (80, 200):
            console = Console(width=width, file=io.StringIO())
            console.print(table.shown(console))
            said = console.file.getvalue()
            assert "…" not in said
            # Numbers are whole, and in one line: a row's loss and difference.
            assert re.search(r"(\d\.\d{4}) │ +-\d\.\d{4} \[-\d\.\d{4}, -\d\.\d{4}\]", said)
            for row in table.rows:
                name, where = str(row[1]), " ".join(re.sub(r"[│\s]+", " ", said).split())
                assert name in where


def test_the_manifest_names_the_baseline(tmp_path):
    plan = Tuning(study_in(tmp_path, SWEEP + "baseline: ema\n"))
    ledger = SimpleNamespace(outcomes=worked_off(plan), left=list)
    assert sweep.baseline_of(plan, ledger) == {"baseline": "ema kappa=0.3"}
    assert sweep.baseline_of(plan, SimpleNamespace(left=lambda: [1])) == {}


def test_the_same_tables_from_whatever_order(tmp_path):
    """Of hashes, too: of two that could be compared to, one is taken the same each time."""
    plan = Tuning(study_in(tmp_path))
    outcomes = worked_off(plan)
    turned = Outcomes(dict(reversed(outcomes.finished.items())), {})
    assert equal_of(plan, outcomes) == equal_of(plan, turned)
    assert sweep.best_table(plan, outcomes) == sweep.best_table(plan, turned)


def test_methods_whose_labels_are_the_same_are_told_apart():
    """A label has six digits."""
    cell = cell_of("ema:kappa=0.3:lr=1e-2,ema:kappa=0.30000001:lr=1e-2")
    first, second = cell.run.methods
    assert first.label == second.label
    rows = result_of(cell).rows
    for number, row in enumerate(rows):
        row["returned_loss"] = number
    outcomes = Outcomes({cell.key: result_of(cell)._replace(rows=rows)}, {})
    ends = [sweep.last_row(outcomes, cell, method) for method in (first, second)]
    assert [row["kappa"] for row in ends] == [0.3, 0.30000001]
