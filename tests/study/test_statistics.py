"""Intervals and p-values of few values, Holm's correction, and edges of grids."""

import itertools
import math
import random

import numpy as np
import pytest
from rich.console import Console

pytest.importorskip("transformers")

from paceline.study.statistics import (
    BRACKETS,
    DIFFERENCE,
    EDGE,
    WIDEN,
    Listing,
    edges,
    holds,
    holm,
    interval,
    p_value,
    paired,
    verdict_against,
    verdict_among,
)

# ---- intervals ----------------------------------------------------------------------------------


def test_interval_by_hand():
    """Student's t has closed forms with one and two degrees of freedom."""
    one = math.tan(math.pi * 0.475)
    assert interval([0.0, 1.0]) == pytest.approx((0.5 - one / 2, 0.5 + one / 2))
    two = 0.95 * math.sqrt(2 / (1 - 0.95**2))
    assert interval([1.0, 2.0, 6.0]) == pytest.approx(
        (3 - two * math.sqrt(7 / 3), 3 + two * math.sqrt(7 / 3))
    )
    assert interval([0.0, 1.0], 0.5) == pytest.approx((0, 1))  # tan(π/4) = 1


def test_p_value_by_hand():
    t = 0.5 / 0.5  # mean 1/2, standard error 1/2
    assert p_value([0.0, 1.0]) == pytest.approx(1 - 2 / math.pi * math.atan(t))
    t = -3 / math.sqrt(7 / 3)
    assert p_value([-1.0, -2.0, -6.0]) == pytest.approx(1 - abs(t) / math.sqrt(2 + t**2))


@pytest.mark.parametrize("seed", range(5))
def test_the_interval_leaves_0_out_where_the_p_value_is_small(seed):
    for values in np.random.default_rng(seed).normal(0.7, 1, size=(200, 2 + seed)).tolist():
        low, high = interval(values)
        assert (low <= 0 <= high) == (p_value(values) >= 0.05)


COVERED = {  # by samples of 2, 3 and 5, as the docstring says
    "normal": (0.0, (0.95, 0.95, 0.95)),
    "exponential": (1.0, (0.91, 0.88, 0.88)),
    "heavy": (0.0, (0.96, 0.97, 0.97)),
    "bad": (4.0, (0.71, 0.33, 0.41)),
}


def drawn(kind, rng, size):
    if kind == "exponential":
        return rng.exponential(size=size)
    if kind == "heavy":
        return rng.standard_t(2, size=size)
    return rng.normal(size=size) + 40 * (rng.random(size) < 0.1) * (kind == "bad")


@pytest.mark.parametrize("kind", COVERED)
def test_coverage(kind):
    """4,000 samples have a standard error of at most 0.8 %."""
    mean, expected = COVERED[kind]
    rng = np.random.default_rng(1)
    for n, share in zip((2, 3, 5), expected, strict=True):
        ends = [interval(values) for values in drawn(kind, rng, (4000, n)).tolist()]
        covered = np.mean([low <= mean <= high for low, high in ends])
        error = math.sqrt(share * (1 - share) / 4000)
        assert covered == pytest.approx(share, abs=0.005 + 3 * error), n
        said = (interval.__doc__ or "").replace("\n", " ")
        a, b, c = (round(100 * x) for x in expected)
        assert kind == "normal" or f": {a}, {b} and {c} %" in said


@pytest.mark.parametrize("values", [(), (1.0,), (1.0, math.inf), (1.0, math.nan)])
def test_no_interval(values):
    assert interval(values) is None
    assert p_value(values) is None


def test_equal_values_have_no_spread_to_judge_by():
    assert interval([0.1, 0.1, 0.1]) == pytest.approx((0.1, 0.1), abs=1e-15)
    assert p_value([0.1, 0.1, 0.1]) is None
    assert paired({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}) == [0, 0, 0, None]


def test_differences_are_paired():
    found = paired({0: 5.0, 1: 1.0, 2: 9.0}, {1: 0.5, 0: 4.0})
    assert found == [0.75, *interval([1.0, 0.5]), p_value([1.0, 0.5])]
    assert paired({0: 5.0}, {0: 4.0}) == [1, None, None, None]
    assert paired({0: 5.0}, {1: 4.0}) == [None] * 4
    assert paired({0: 5.0, 1: math.inf}, {0: 4.0, 1: 4.0}) == [None] * 4


# ---- many comparisons ---------------------------------------------------------------------------


def closed(p_values):
    """Holm as a closed test: the largest Bonferroni p of all sets that a value is in."""
    n = range(len(p_values))
    sets = [x for size in n for x in itertools.combinations(n, size + 1)]
    return [max(min(1, len(s) * min(p_values[j] for j in s)) for s in sets if i in s) for i in n]


@pytest.mark.parametrize("count", range(7))
def test_holm_is_the_closed_test(count):
    rng = random.Random(count)
    for scale in (1, 0.1, 0.01):
        values = [scale * rng.random() for _ in range(count)]
        assert holm(values) == pytest.approx(closed(values))


def test_holm_by_hand():
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.01, None, 0.02]) == [0.02, None, 0.02]  # of two
    assert holm([0.5, 0.5]) == [1, 1]
    assert [holds(p) for p in (0.049, 0.05, None)] == [True, False, False]


def test_holm_holds_for_all_together():
    """Of ten null hypotheses at a time, one is rejected in 5 % of the cases at most."""
    rng = np.random.default_rng(0)
    alone = together = 0
    for values in rng.normal(size=(1000, 10, 4)).tolist():
        ps = [p_value(x) for x in values]
        alone += min(ps) < 0.05
        together += min(holm(ps)) < 0.05
    assert alone / 1000 == pytest.approx(1 - 0.95**10, abs=0.05)  # 40 %
    assert together / 1000 == pytest.approx(0.05, abs=0.02)


# ---- edges of grids -----------------------------------------------------------------------------


def grid(**options):
    every = [dict(zip(options, x, strict=True)) for x in itertools.product(*options.values())]
    return [{"name": "pace", "gain": None, **x} for x in every]


def test_the_lowest_and_highest_values_are_edges():
    tried = grid(lr=(1e-3, 3e-3, 1e-2), kappa=(0.3, 0.5, 0.7), every=(None,))
    texts = {(x["lr"], x["kappa"]): edges(x, tried) for x in tried}
    assert texts == {
        (1e-3, 0.3): "lr at the bottom, kappa at the bottom",
        (1e-3, 0.5): "lr at the bottom",
        (1e-3, 0.7): "lr at the bottom, kappa at the top",
        (3e-3, 0.3): "kappa at the bottom",
        (3e-3, 0.5): "",
        (3e-3, 0.7): "kappa at the top",
        (1e-2, 0.3): "lr at the top, kappa at the bottom",
        (1e-2, 0.5): "lr at the top",
        (1e-2, 0.7): "lr at the top, kappa at the top",
    }


def test_one_value_is_no_grid():
    tried = grid(lr=(1e-2,), kappa=(0.3, 0.5, 0.7))
    assert edges(tried[1], tried) == ""


@pytest.mark.parametrize(
    ("option", "values", "at_the_ends"),
    [
        ("kappa", (0.0, 0.5, 1.0), ("", "")),
        ("return_kappa", (0.0, 0.5, 1.0), ("", "")),
        ("twin_gain", (0.1, 0.5, 1.0), ("twin_gain at the bottom", "")),
        ("every", (1, 5, 10), ("", "every at the top")),
        ("pullback", (0.0, 1.0, 3.0), ("", "pullback at the top")),
        ("lr", (0.0, 0.5, 1.0), ("lr at the bottom", "lr at the top")),
    ],
)
def test_no_grid_goes_beyond_the_range_of_an_option(option, values, at_the_ends):
    tried = grid(**{option: values})
    assert (edges(tried[0], tried), edges(tried[-1], tried)) == at_the_ends


def test_a_saturated_pull_cannot_go_further():
    tried = grid(pullback=(0.5, 1.0))
    assert edges(tried[1], tried) == "pullback at the top"
    scalar = [{**x, "gain": "scalar"} for x in tried]
    assert edges(scalar[1], scalar) == ""
    assert edges(scalar[0], scalar) == "pullback at the bottom"
    mixed = [*tried, *({**x, "pullback": 9 * x["pullback"]} for x in scalar)]
    assert edges(tried[1], mixed) == "pullback at the top"  # among those of its own gain


def test_what_was_not_tried_has_no_edge():
    tried = grid(twin_gain=(0.1, 0.5, 0.9))
    assert edges({**tried[0], "twin_gain": 0.05}, tried) == ""
    tried = [*grid(pullback=(0.1, 1.0)), *grid(pullback=("auto", None, math.nan))]
    assert edges(tried[2], tried) == ""  # "auto" is beside the numbers
    assert edges(tried[1], tried) == "pullback at the top"


# ---- tables -------------------------------------------------------------------------------------


def test_a_difference_is_shown_with_its_interval(tmp_path):
    rows = [
        ["one", -0.1, -0.2, 0.0, 0.02],
        ["two", 0.5, None, None, None],
        ["three", None, None, None, None],
        ["four", 0.5, 0.4, 0.6, 0.03],
    ]
    table = Listing.of_differences("title", ["a"], rows)
    assert [row[-1] for row in table.rows] == [0.04, None, None, 0.04]
    assert table.markdown().splitlines() == [
        "| a | difference [95 %] |",
        "| --- | ---: |",
        "| one | -0.1000 [-0.2000, 0.0000]* |",
        "| two | 0.5000 |",
        "| three |  |",
        "| four | 0.5000 [0.4000, 0.6000]* |",
        "",
        BRACKETS,
    ]
    lost = Listing.of_differences("title", ["a"], [[*row[:-1], row[-1] and 0.04] for row in rows])
    assert "]*" not in lost.markdown()
    table.write(tmp_path / "table.csv")
    said = (tmp_path / "table.csv").read_text()
    assert said.startswith("a,difference,low,high,Holm p\none,-0.1,-0.2,0.0,0.04\n")


def test_notes_are_only_of_what_a_table_has():
    plain = Listing("title", ["a"], [["one"]])
    one_seed = Listing.of_differences("title", ["a", EDGE], [["one", "", 0.5, None, None, None]])
    assert plain.notes == one_seed.notes == []
    edge = Listing("title", [EDGE, *DIFFERENCE], [["lr at the top", 0.5, None, None, None]])
    assert edge.notes == [WIDEN]
    assert edge.shown(Console()).caption == WIDEN


def test_tables_as_text(tmp_path):
    rows = [["one", "3e-05", None], ["two", "0.01", math.inf], ["three", "1", 0.123456]]
    table = Listing("title", ["a", "lr", "x"], rows)
    assert table.markdown().splitlines() == [
        "| a | lr | x |",
        "| --- | ---: | ---: |",
        "| one | 3e-05 |  |",
        "| two | 0.01 | inf |",
        "| three | 1 | 0.1235 |",
    ]
    table.write(tmp_path / "table.csv")
    assert (tmp_path / "table.csv").read_text() == (
        "a,lr,x\none,3e-05,\ntwo,0.01,inf\nthree,1,0.123456\n"
    )


# ---- verdicts ---------------------------------------------------------------------------------


def around(mean, *shifts):
    """A loss a seed, around a mean."""
    return {seed: mean + shift for seed, shift in enumerate(shifts)}


SMALL = (0.0, 0.001, -0.001, 0.0005, -0.0005)
OTHER = (0.001, -0.001, 0.0005, 0.0, -0.0005)
LARGE = (0.5, -0.4, 0.3, -0.6, 0.2)


def test_the_lowest_loss_is_claimed_only_where_it_is_shown():
    low, mid, wide = around(2.0, *SMALL), around(2.1, *OTHER), around(2.05, *LARGE)
    assert verdict_among({"b": mid, "a": low}) == (
        "a has the lowest loss, 0.100 nats lower than b, the next."
    )
    assert verdict_among({"a": low, "w": wide, "b": mid}) == (
        "No difference shown between a, which has the lowest mean loss, and w. "
        "Its loss is lower than that of b."
    )
    assert verdict_among({"w": wide, "a": low}) == (
        "No difference shown between a, which has the lowest mean loss, and w."
    )
    assert verdict_among({"a": {0: 2.0}, "b": {0: 1.0}}) == (
        "No difference shown between b, which has the lowest mean loss, and a: one seed cannot "
        "show one."
    )
    many = {f"m{i}": around(2.1, *LARGE) for i in range(6)}
    assert "and 5 others" in verdict_among(many)


def test_nothing_is_claimed_of_what_diverged_or_is_alone():
    fine, lost = around(2.0, *SMALL), around(2.0, math.inf, 0.0)
    assert verdict_among({"a": fine}) == "No difference shown: there is one method."
    assert "only a ended without a diverged run" in verdict_among({"a": fine, "b": lost})
    assert "no method ended without" in verdict_among({"a": lost, "b": lost})


def test_the_lowest_is_picked_out_so_all_pairs_are_corrected():
    """With p = 0.03 for one pair alone; a third and a fourth method make it chance."""
    a, b = around(0.0, 0, 0, 0, 0, 0), around(0.0, 0.5, 1.0, 1.5, 0.1, 1.9)
    assert p_value([b[s] - a[s] for s in a]) == pytest.approx(0.037, abs=0.01)
    assert "a has the lowest loss" in verdict_among({"a": a, "b": b})
    others = {name: around(0.9, *LARGE[i:], *LARGE[:i]) for i, name in enumerate("cdef")}
    assert verdict_among({"a": a, "b": b, **others}).startswith("No difference shown")


def test_the_verdict_against_a_baseline():
    found = [("a", -0.1, 0.01), ("b", 0.0002, 0.001), ("c", -0.2, 0.06), ("d", math.inf, None)]
    assert verdict_against("x", found) == (
        "Lower loss than x: a (0.100 nats). Higher loss than x: b (0.0002 nats). "
        "No difference shown: c. Not comparable: d."
    )
    assert verdict_against("x", [("c", -0.2, None)]) == "No difference shown from x: c."
    assert verdict_against("x", []) == "No difference shown: nothing can be compared with x."
    many = [(name, -0.1, 0.5) for name in "abcde"]
    assert verdict_against("x", many, "lines") == "No difference shown from x: 5 lines."
