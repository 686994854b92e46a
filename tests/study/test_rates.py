"""The picture of losses over the learning rate, and what is said of it, on made-up losses."""

import io
import math
import re

import numpy as np
import pytest

pytest.importorskip("transformers")

from matplotlib.colors import to_rgba
from rich.console import Console

from paceline.study import rates
from paceline.study.rates import (
    MAX_LINES,
    curves_of,
    headline,
    looks,
    rate_figure,
    rate_picture,
    rate_sentences,
    rate_table,
    show_difference,
    show_loss,
)

GRID = (0.001, 0.002, 0.004, 0.008)
LOST = math.inf


def curves(**losses):
    """Curves of methods over GRID; a number a rate, or a tuple of numbers, one a seed."""
    return curves_of(
        {
            method.replace("_", "-"): {
                lr: dict(enumerate(loss if isinstance(loss, tuple) else (loss,)))
                for lr, loss in zip(GRID, row, strict=False)
                if loss is not None
            }
            for method, row in losses.items()
        }
    )


def said(**losses):
    return rate_sentences(curves(**losses))


def lines_of(axis):
    """Label -> points of the lines, and (colour, rate) of each mark at the top edge."""
    lines = {line.get_label(): line for line in axis.lines if line.get_linestyle() != "None"}
    edge = {
        (line.get_markeredgecolor(), line.get_xdata()[0])
        for line in axis.lines
        if line.get_linestyle() == "None"
    }
    return lines, edge


# ---- the picture --------------------------------------------------------------------------------


def test_lines_are_means_over_the_seeds(monkeypatch):
    monkeypatch.setattr(rates, "interval", lambda x: (min(x) - 1, max(x) + 1) if x[1:] else None)
    rng = np.random.default_rng(0)
    losses = rng.uniform(3, 4, (2, len(GRID), 3))
    rows = {name: [*map(tuple, part)] for name, part in zip(("ema", "pace"), losses, strict=True)}
    (axis,) = rate_figure(curves(**rows)).axes
    lines, _ = lines_of(axis)
    for name, part in zip(("ema", "pace"), losses, strict=True):
        assert lines[name].get_xdata() == pytest.approx(GRID)
        assert lines[name].get_ydata() == pytest.approx(part.mean(axis=1))
    drawn = {bars.get_color()[0].tobytes(): bars.get_segments() for bars in axis.collections}
    for name, part in zip(("ema", "pace"), losses, strict=True):
        segments = drawn[np.array(to_rgba(lines[name].get_color(), 0.6)).tobytes()]
        ends = np.stack([part.min(axis=1) - 1, part.max(axis=1) + 1], axis=1)
        assert np.array(segments) == pytest.approx(
            np.stack([np.tile(GRID, (2, 1)).T, ends], axis=2)
        )
    assert axis.get_xscale() == "log"
    assert [label.get_text() for label in axis.get_xticklabels()] == [f"{lr:g}" for lr in GRID]


def test_one_seed_has_no_interval():
    (axis,) = rate_figure(curves(ema=(3, 2, 3, 4))).axes
    assert not axis.collections


@pytest.mark.parametrize(("half", "seen"), [(0.3, True), (30, False)], ids=["short", "long"])
def test_intervals_are_in_view_unless_they_dwarf_the_lines(monkeypatch, half, seen):
    monkeypatch.setattr(rates, "interval", lambda x: (x[0] - half, x[0] + half))
    (axis,) = rate_figure(curves(ema=(3, 2, 3, 3))).axes
    bottom, top = axis.get_ylim()
    assert (bottom <= 2 - half) == seen
    assert top - bottom < 2


def test_runs_that_diverged_are_marks_at_the_top_edge_and_break_the_line():
    (axis,) = rate_figure(curves(ema=(3, 2, LOST, 3.1), pace=(3, 2, LOST, LOST))).axes
    lines, edge = lines_of(axis)
    np.testing.assert_equal(lines["ema"].get_ydata(), [3, 2, math.nan, 3.1])
    colours = {name: line.get_color() for name, line in lines.items()}
    assert edge == {
        (colours["ema"], 0.004),
        (colours["pace"], 0.004),
        (colours["pace"], 0.008),
    }
    heights = [line.get_ydata()[0] for line in axis.lines if line.get_linestyle() == "None"]
    assert len(set(heights)) == 2  # two marks at one rate do not hide each other
    assert all(0.8 < height < 1 for height in heights)  # of the axis
    assert "diverged" in axis.get_title("right")


def test_losses_far_above_the_others_leave_the_chart_with_a_mark():
    rows = {f"ema{i}": (3.0 + i / 100, 3.1, 3.2, 3.1) for i in range(4)}
    (axis,) = rate_figure(curves(**rows, adamw=(3.1, 3.2, 9.0, 3.2))).axes
    lines, edge = lines_of(axis)
    assert edge == {(lines["adamw"].get_color(), 0.004)}
    assert lines["adamw"].get_ydata()[2] == 9.0
    assert axis.get_ylim()[1] < 4
    shown = [y for line in lines.values() for y in line.get_ydata() if y != 9.0]
    assert axis.get_ylim()[0] < min(shown) < max(shown) < axis.get_ylim()[1]
    (axis,) = rate_figure(curves(ema=(3.3, 3.2, 3.1, 3.4))).axes  # nothing is far above here
    assert lines_of(axis)[1] == set()
    assert axis.get_title("right") == ""


def test_all_diverged_everywhere():
    (axis,) = rate_figure(curves(ema=(LOST,) * 4, pace=(LOST,) * 4)).axes
    assert len(lines_of(axis)[1]) == 8


def test_of_many_methods_the_lowest_are_drawn():
    rows = {f"m-{chr(97 + i)}": (3.0 + i / 10, 3.5) for i in range(MAX_LINES + 3)}
    (axis,) = rate_figure(curves(**rows)).axes
    assert [*lines_of(axis)[0]] == [*rows][:MAX_LINES]
    assert axis.get_title("right").startswith("the lowest 6 of 9 methods")


def test_methods_have_the_colours_of_the_papers_figures():
    from paceline.paper.drawing import LOOKS

    own = looks(["adamw cosine", "ema kappa=0.7", "schedule-free", "ema power", "pace pullback=1"])
    papers = ("AdamW", "EMA", "Schedule-Free", "EMA, power or twin schedule", "PACE")
    assert [look.colour for look in own.values()] == [LOOKS[name][0] for name in papers]
    assert looks([*reversed(own)]) == own
    many = looks([f"ema kappa=0.{i}" for i in range(1, 10)])
    assert len(set(many.values())) == 9
    assert many["ema kappa=0.1"].colour == LOOKS["EMA"][0]
    seven = looks([f"ema kappa=0.{i}" for i in range(1, 8)])
    assert len({look.colour for look in seven.values()}) == 7
    assert len({look.marker for look in seven.values()}) == 7


def test_rate_picture_of_a_table(tmp_path):
    pandas = pytest.importorskip("pandas")
    rows = [
        (method, lr, seed, 3 + abs(i - best) / 10 + seed / 100)
        for method, best in (("PACE, c = 10", 2), ("EMA of AdamW", 1))
        for i, lr in enumerate(GRID)
        for seed in (0, 1, 2)
    ]
    frame = pandas.DataFrame(rows, columns=["method", "lr", "seed", "loss"]).sample(
        frac=1, random_state=0
    )
    sentences = rate_picture(frame, tmp_path / "rates.svg")
    assert "at 0.004, equal to that of EMA of AdamW at 0.002" in sentences[0] or (
        "at 0.002, equal to that of PACE, c = 10 at 0.004" in sentences[0]
    )
    drawn = (tmp_path / "rates.svg").read_text()
    for text in ("PACE, c = 10", "EMA of AdamW", "learning rate", "0.008"):
        assert f">{text}<" in drawn
    assert (tmp_path / "rates.png").read_bytes()[:4] == b"\x89PNG"
    columns = {name: list(frame[name]) for name in frame}
    rate_picture(columns, tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_text() == drawn


@pytest.mark.parametrize("lost", [None, math.nan, math.inf])
def test_a_table_may_have_losses_that_are_none(tmp_path, lost):
    table = {"method": ["ema"] * 3, "lr": [1, 2, 3], "seed": [0] * 3, "loss": [3.0, 2.0, lost]}
    assert "ema diverged at 3." in rate_picture(table, tmp_path / "x")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"method": [], "lr": [], "loss": []}, "the table has no column seed"),
        (
            {"method": ["ema"] * 2, "lr": [1, 1], "seed": [0, 0], "loss": [1, 2]},
            "has ema at lr 1 with seed 0 twice",
        ),
        (
            {"method": ["ema"] * 2, "lr": [1, 1], "seed": [0, 1], "loss": [1, 2]},
            "needs at least two rates",
        ),
    ],
    ids=["column", "twice", "one-rate"],
)
def test_tables_that_make_no_picture(tmp_path, table, message):
    with pytest.raises(ValueError, match=message):
        rate_picture(table, tmp_path / "x")
    assert not [*tmp_path.iterdir()]


# ---- the table ----------------------------------------------------------------------------------


def test_the_table_marks_the_lowest_of_each_rate():
    console = Console(width=100, file=io.StringIO())
    made = curves(
        ema=(3.0, 2.5, LOST, LOST), pace=(3.1, 2.4, 2.3, LOST), sf=(None, None, 2.3, LOST)
    )
    console.print(rate_table(made))
    text = console.file.getvalue()
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.split()}
    assert rows["method"] == ["0.001", "0.002", "0.004", "0.008"]
    assert rows["ema"] == ["3.000*", "2.500", "diverged", "diverged"]
    assert rows["pace"] == ["3.100", "2.400*", "2.300*", "diverged"]
    assert rows["sf"] == ["2.300*", "diverged"]


# ---- in words -----------------------------------------------------------------------------------


def test_lowest_at_its_best_rate_and_by_how_much(monkeypatch):
    assert said(ema=(3.2, 3.0, 3.3, 3.5), pace=(3.5, 3.2, 2.96, 3.1)) == [
        "Each at its best rate, pace has the lowest loss: 2.960 at 0.004, 0.040 nats lower than "
        "ema at 0.002 (one seed: no interval).",
        "The best rates were chosen on these same losses.",
        "The lowest loss at each rate: ema at 0.001 and 0.002, pace at 0.004 and 0.008.",
        "Within 0.05 nats of the lowest loss, 2.960: pace at 0.004 alone; ema at 0.002 alone.",
    ]
    given = []
    monkeypatch.setattr(rates, "interval", lambda x: given.append(x) or (-0.3, -0.1))
    (first, *_) = said(
        ema=((3.2, 3.2), (3.0, 3.2), (3.3, 3.3)), pace=((3.2, 3.2), (2.7, 3.1), (3.3, 3.3))
    )
    assert first == (
        "Each at its best rate, pace has the lowest loss: 2.900 ±0.100 at 0.002, 0.200 nats lower "
        "than ema at 0.002 (95 % interval -0.300 to -0.100, lower in 2 of 2 seeds)."
    )
    assert any(values == pytest.approx([-0.3, -0.1]) for values in given)  # paired by seed


def test_a_difference_that_may_be_chance_is_said_to_be(monkeypatch):
    monkeypatch.setattr(rates, "interval", lambda x: (-0.4, 0.2))
    pair = {0: 3.0, 1: 3.1}, {0: 3.2, 1: 3.1}
    assert show_difference(*pair, "ema") == (
        "0.100 nats lower than ema (95 % interval -0.400 to +0.200, lower in 1 of 2 seeds, "
        "so it may be chance)"
    )
    monkeypatch.setattr(rates, "interval", lambda x: (0.1, 0.2))
    assert "chance" not in show_difference(*pair, "ema")


def test_differences_that_are_none():
    assert show_difference({0: 3.0}, {1: 2.0}, "b").startswith("not comparable with b, which has")
    assert show_difference({0: 3.0}, {0: LOST}, "b") == "not comparable with b, as a run diverged"
    assert show_difference({0: 3.0}, {0: 3.0004}, "b") == "equal to that of b"
    assert show_difference({0: 3.1}, {0: 3.0}, "b").startswith("0.100 nats higher than b")
    assert show_loss([3.0]) == "3.000"
    assert show_loss([3.0, LOST]) == "diverged"


@pytest.mark.parametrize(
    ("row", "end"),
    [((2.0, 3.0, 3.1, 3.2), "lowest rate, 0.001"), ((3.2, 3.1, 3.0, 2.0), "highest rate, 0.008")],
    ids=["lowest", "highest"],
)
def test_nothing_is_claimed_from_an_edge(row, end):
    text = said(pace=row, ema=(3.2, 3.0, 3.3, 3.5), adamw=(3.4, 3.1, 3.3, 3.5))
    assert text[0].startswith(
        "Of the 2 methods with a best rate inside the rates tried, ema has the lowest loss: 3.000"
    )
    assert text[2] == f"No best was found for pace, which is lowest at the {end}: widen the rates."
    alone = said(pace=row, ema=row)
    assert not any("has the lowest loss:" in sentence for sentence in alone)
    assert sum("No best was found" in sentence for sentence in alone) == 2
    assert not any("chosen" in sentence for sentence in alone)


def test_a_best_as_low_as_an_end_is_not_found():
    assert said(ema=(3.0, 2.0, 2.0))[0].startswith("No best was found for ema")
    assert said(ema=(2.0, 2.0, 3.0))[0].startswith("No best was found for ema")


def test_rates_that_diverged_bound_a_best():
    text = said(ema=(3.0, 2.0, LOST, LOST), pace=(3.0, 2.5, 2.6, 2.7))
    assert text[0].startswith("Each at its best rate, ema has the lowest loss")
    assert "ema diverged at 0.004 and 0.008." in text


def test_a_seed_that_diverged_makes_no_best():
    text = said(ema=((3, 3), (2, LOST), (3.1, 3.1)), pace=((3, 3), (2.5, 2.5), (3, 3)))
    assert not any("ema has the lowest loss" in sentence for sentence in text)
    assert "ema diverged in 1 of 2 seeds at 0.002." in text


def test_a_method_with_one_rate_of_its_own():
    made = curves(ema=(3.2, 3.0, 3.3, 3.5), pace=(None, None, 2.0, None), sf=(3.2, 2.9, 3, 3))
    text = rate_sentences(made)
    assert text[0].startswith("Of the 2 methods with a best rate inside the rates tried, sf has")
    assert "pace was run at one rate, 0.004, so its best is not known." in text
    (axis,) = rate_figure(made).axes
    assert [*lines_of(axis)[0]["pace"].get_xdata()] == [0.004]


def test_each_method_at_one_rate_of_its_own():
    """Rates that the user has chosen before are compared as they are."""
    assert said(ema=(3.0,), pace=(None, None, 2.9), sf=(None, LOST)) == [
        "Each at its own rate, pace has the lowest loss: 2.900 at 0.004, 0.100 nats lower than "
        "ema at 0.001 (one seed: no interval).",
        "sf diverged at 0.002.",
    ]


def test_diverged_everywhere():
    assert said(ema=(LOST,) * 4, pace=(LOST,) * 4) == [
        "ema diverged at every rate.",
        "pace diverged at every rate.",
    ]
    text = said(ema=(LOST,) * 4, pace=(3.0, 2.5, 2.6, 2.7))
    assert not any("has the lowest loss:" in sentence for sentence in text)
    assert any(re.search("pace at 0.002 alone; ema nowhere", sentence) for sentence in text)


def test_how_wide_each_stays_near_the_lowest():
    text = said(
        a=(3.02, 3.0, 3.2, 3.01),
        b=(3.4, 3.04, 3.03, 3.04),
        c=(3.1, 3.06, 3.1, 3.2),
        d=(3.03, 3, 3, 3),
    )
    assert text[-1] == (
        "Within 0.05 nats of the lowest loss, 3.000: "
        "a from 0.001 or less to 0.002, a factor of 2; "
        "d from 0.001 or less to 0.008 or more, a factor of 8; "
        "b from 0.002 to 0.008 or more, a factor of 4; c nowhere."
    )


def test_the_lowest_at_each_rate_needs_two_methods():
    text = said(a=(3.0, 2.0, 3.0, LOST), b=(None, 2.5, 2.4, LOST))
    assert "The lowest loss at each rate: a at 0.002, b at 0.004." in text


def test_one_method_alone():
    assert said(ema=(3.0, 2.0, 3.0)) == ["The best rates were chosen on these same losses."]


def test_the_headline_compares_methods_whose_best_rate_is_known():
    near = [(x, x + 0.01, x - 0.01) for x in (3, 2, 3.1, 3.2)]
    far = [(x + 0.51, x + 0.5, x + 0.49) for x in (3, 2, 3.1, 3.2)]
    text = headline(curves(ema=near, pace=far))
    assert text == (
        "ema has the lowest loss, 0.500 nats lower than pace, the next. Each method is at its best "
        "rate, chosen on these same losses."
    )
    falling = (3.0, 2.9, 2.8, 2.0)
    assert headline(curves(ema=near, pace=far, adamw=falling)).endswith(
        "at its best rate, chosen on these same losses; 1 without one inside the rates tried are "
        "left out."
    )
    assert headline(curves(ema=near, adamw=falling)) == (
        "No difference shown: only ema has a best rate inside the rates tried. Widen the rates."
    )
    assert headline(curves(ema=falling, adamw=falling)).startswith(
        "No difference shown: no method has a best rate"
    )
    assert headline(curves(ema=near[:1], pace=far[:1])).startswith("ema has the lowest loss, 0.500")
