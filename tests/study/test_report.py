"""The verdict of a comparison."""

import io
import math
import re

import pytest

pytest.importorskip("transformers")

from rich.console import Console

from paceline.study.rates import lowest_at
from paceline.study.report import Charts, Results, verdict, write_report
from paceline.study.statistics import interval


def row(label, lr, seed, returned, **facts):
    name = label.split()[0]
    options = {"kappa": 0.3, "twin_gain": None, "eps": None, "pullback": 2.0}
    facts = {"name": name, "schedule": "constant", **options, **facts}
    return {
        "run": f"{label}-{lr}-{seed}",
        "trained_with": f"{label}-{lr}-{seed}",
        "label": label,
        "lr": lr,
        "seed": seed,
        "step": 10,
        "live_loss": returned,
        "returned_loss": returned,
        "gain_mean": 0.8 + seed / 10,
        "clipped": 0.5,
        **facts,
    }


def verdict_of(*rows):
    return verdict(Results(len(rows), list(rows)))


def test_verdict_says_who_won_by_how_much_over_how_many_seeds():
    pace = [row("pace", 0.01, 0, 2.0), row("pace", 0.01, 1, 2.1)]
    ema = [row("ema", 0.01, 0, 2.2), row("ema", 0.01, 1, 2.3)]
    twin = [row("ema twin", 0.01, s, 2.0, schedule="twin", twin_gain=0.9) for s in (0, 1)]
    adamw = [row("adamw", 0.01, 0, None), row("adamw", 0.01, 1, 2.5)]
    found = verdict_of(*pace, *ema, *adamw, *twin)
    assert [re.sub(r"[-+][0-9.]+ to [-+][0-9.]+", "A to B", sentence) for sentence in found] == [
        "At learning rate 0.01 ema twin has the lowest loss: 2.000 ±0.000, 0.050 nats lower "
        "than pace (95 % interval A to B, lower in 1 of 2 seeds, so it may be chance).",
        "At learning rate 0.01 adamw diverged in 1 of 2 seeds.",
        "At learning rate 0.01, against the same average without the pull, the loss of pace is "
        "0.200 nats lower than ema (95 % interval A to B, lower in 2 of 2 seeds).",
        "At learning rate 0.01, against the schedule of a gain of 0.9, the loss of pace is 0.050 "
        "nats higher than ema twin (95 % interval A to B, higher in 1 of 2 seeds, so it may be "
        "chance).",
        "At learning rate 0.01, the mean gain of pace at the end is 0.85, and 50.0% of the "
        "coordinates are clipped.",
        "Each interval is for its difference alone: which method has the lowest loss was not "
        "known before.",
    ]
    low, high = interval([-0.2, -0.2])
    assert f"(95 % interval {low:+.3f} to {high:+.3f}, lower in 2 of 2 seeds" in found[2]
    amounts_to = [row("ema eps=0.02", 0.01, s, 2.1, eps=0.02) for s in (0, 1)]  # 0.01 · 2
    other = [row("ema eps=0.03", 0.01, s, 2.2, eps=0.03) for s in (0, 1)]
    found = verdict_of(*pace, *amounts_to, *other)
    assert "against the ε that its pull amounts to, the loss of pace is 0.050 nats" in found[1]
    assert "than ema eps=0.02" in found[1]
    assert "the mean gain of pace at the end is 0.85" in found[2]
    whole = [x | {"gain": "scalar", "pullback": 1.0} for x in pace]
    assert "mean gain" not in " ".join(verdict_of(*whole, *ema))
    one = verdict_of(pace[0], ema[0])
    assert one[0] == (
        "At learning rate 0.01 pace has the lowest loss: 2.000, 0.200 nats lower than ema "
        "(one seed: no interval)."
    )
    assert "one seed may be chance" in one[-1]


def test_verdict_compares_over_the_seeds_that_all_finished():
    """Ctrl-C in the second seed: pace's worse second run has nothing to be compared with."""
    said = verdict_of(row("pace", 1, 0, 2.0), row("pace", 1, 1, 9.0), row("ema", 1, 0, 2.1))
    assert "pace has the lowest loss: 2.000, 0.100 nats lower than ema (one" in said[0]
    assert said[-1].startswith("Losses are those of seed 0, which every method finished.")
    said = verdict_of(row("pace", 1, 0, 2.0), row("ema", 1, 1, 2.1))
    assert "not comparable with ema, which has no seed in common" in said[0]
    assert "No seed was finished by all methods" in said[-1]


def test_verdict_on_ties_and_divergence():
    assert "2.000, equal to that of" in verdict_of(row("a", 1, 0, 2.0), row("b", 1, 0, 2.0002))[0]
    said = verdict_of(row("pace", 1, 0, None, gain_mean=None), row("ema", 1, 0, None))
    assert said[:2] == ["At learning rate 1 pace diverged.", "At learning rate 1 ema diverged."]
    said = verdict_of(row("pace", 1, 0, 2.0, gain_mean=None), row("ema", 1, 0, None))
    assert "2.000, not comparable with ema, as a run diverged" in said[0]


def test_verdict_over_rates():
    rows = [row("pace", lr, 0, loss) for lr, loss in ((0.1, 2.0), (0.2, 1.8), (0.4, 2.2))]
    rows += [row("ema", lr, 0, loss) for lr, loss in ((0.1, 1.9), (0.2, 1.5), (0.4, 2.4))]
    said = verdict_of(*rows)
    assert said[0].startswith(
        "Each at its best rate, ema has the lowest loss: 1.500 at 0.2, 0.300 nats lower than pace"
    )
    pulls = [sentence for sentence in said if "without the pull" in sentence]
    assert [sentence.split(",")[0] for sentence in pulls] == [
        f"At learning rate {lr}" for lr in (0.1, 0.2, 0.4)
    ]
    assert "0.100 nats higher than ema" in pulls[0]


def test_curves_are_the_last_losses_of_the_common_seeds():
    first = row("pace", 0.1, 0, 9.0) | {"step": 5}
    rows = [first, row("pace", 0.1, 0, 2.0), row("pace", 0.1, 1, 7.0), row("ema", 0.2, 0, None)]
    curves = {curve.method: curve.losses for curve in Results(3, rows).curves()}
    assert curves == {"pace": {0.1: {0: 2.0}}, "ema": {0.2: {0: math.inf}}}


def test_an_interrupted_comparison_draws_what_it_has(tmp_path):
    rows = [row("ema", lr, 0, loss) for lr, loss in ((0.1, 1.9), (0.2, 1.5), (0.4, 2.4))]
    rows += [row("pace", 0.1, 0, 1.4)]
    results = Results(6, rows, interrupted=True)
    console = Console(width=200, file=io.StringIO())
    manifest = {"configuration": {"seeds": [0]}, "versions": {"paceline": "0"}}
    write_report(results, manifest, tmp_path, console)
    said = console.file.getvalue()
    assert "Interrupted: 4 of 6 runs were finished." in said
    assert "pace was run at one rate, 0.1, so its best is not known." in said
    assert "has the lowest loss:" not in said  # one best alone is compared with nothing
    assert {path.name for path in tmp_path.iterdir()} == {
        *("curves.png", "rates.png", "rates.svg", "report.html")
    }
    assert (tmp_path / "report.html").read_text().count("<svg") == 5
    one = Results(1, rows[:1])
    (tmp_path / "one").mkdir()
    write_report(one, manifest, tmp_path / "one", console)
    assert {path.name for path in (tmp_path / "one").iterdir()} == {"curves.png", "report.html"}
    assert "1.900 → 1.900" in console.file.getvalue()


def test_curves_have_a_chart_a_rate_in_lines_of_three():
    rows = [row("pace", lr, 0, 2.0) | {"step": s} for lr in (1, 2, 3, 4) for s in (0, 10)]
    charts = Charts(Results(4, rows))
    axes = [axis for part in charts.all().subfigs for axis in part.axes]
    assert [axis.get_title() for axis in axes] == [f"learning rate {lr}" for lr in (1, 2, 3, 4)]
    columns = {round(axis.figure.bbox.x0) for axis in axes}
    assert len(columns) == 3
    assert [axis.get_title() for axis in charts.at(3).axes] == ["learning rate 3"]


@pytest.mark.parametrize(("gap", "panels"), [(0.01, 2), (0.5, 1), (0.0, 1)])
def test_differences_too_small_to_see_have_a_panel(gap, panels):
    """Of 2 nats that the upper panel shows."""
    rows = [
        row("pace", 1, 0, 2.0 + (10 - s) / 4 - gap) | {"step": s, "live_loss": 2.0 + (10 - s) / 4}
        for s in (2, 4, 10)
    ]
    axes = Charts(Results(1, rows)).at(1).axes
    assert len(axes) == panels
    if panels == 2:
        [zero, line] = axes[1].lines
        assert list(zero.get_ydata()) == [0, 0]
        assert list(line.get_ydata()) == pytest.approx([-gap] * 3)
        assert axes[1].get_ylabel() == "returned − live"


def test_pull_alone_means_that_nothing_else_differs():
    said = verdict_of(
        row("pace twin", 1, 0, 2.0, schedule="twin", twin_gain=0.5),
        row("ema twin", 1, 0, 2.1, schedule="twin", twin_gain=1.0),
        row("ema slow", 1, 0, 2.1, kappa=0.7),
    )
    assert not any("without the pull" in sentence for sentence in said)
    slower = row("pace slower", 1, 0, 2.0, return_kappa=0.7)  # another average is returned
    said = verdict_of(slower, row("ema", 1, 0, 2.1), row("ema slow", 1, 0, 2.2, kappa=0.7))
    found = [sentence for sentence in said if "without the pull" in sentence]
    assert len(found) == 1
    assert "of pace slower is 0.200 nats lower than ema slow" in found[0]  # the same is returned
    for other in ({"every": 3}, {"state": "bf16"}, {"pullback": 0.0}):
        said = verdict_of(row("pace other", 1, 0, 2.0, **other), row("ema", 1, 0, 2.1))
        assert not any("without the pull" in sentence for sentence in said)


def test_a_pull_that_is_off_has_no_gain_to_speak_of():
    """Its rows have none, and nothing is said of it."""
    off = row("pace off", 1, 0, 2.0, pullback=0.0)
    del off["gain_mean"], off["clipped"]
    assert [x.split(",")[0] for x in verdict_of(off, row("ema", 1, 0, 2.1))] == [
        "At learning rate 1 pace off has the lowest loss: 2.000",
        "Small differences of one seed may be chance; give --seeds 0",
    ]
    hardly = row("pace", 1, 0, 2.0, gain_mean=0.001, clipped=0.0)
    said = verdict_of(hardly, row("ema", 1, 0, 2.1))
    assert (
        "pace at the end is 0.00, and 0.0% of the coordinates are clipped. It hardly pulls then."
        in said[2]
    )
    assert "hardly" not in "".join(verdict_of(row("pace", 1, 0, 2.0), row("ema", 1, 0, 2.1)))


def test_the_epsilon_of_a_pull_is_of_a_gain_with_a_unit():
    ema = row("ema eps=2", 1, 0, 2.1, eps=2.0)
    said = verdict_of(row("pace", 1, 0, 2.0), ema)
    assert "the ε that its pull amounts to" in said[1]
    other = row("ema eps=1", 1, 0, 2.1, eps=1.0)
    for facts in ({"gain": "scalar", "pullback": 1.0}, {"pullback": "auto"}):
        said = verdict_of(row("pace x", 1, 0, 2.0, **facts), ema, other)
        assert not any("amounts to" in sentence for sentence in said)


def test_of_one_run_nothing_is_compared():
    assert verdict_of(row("a", 1, 0, 2.0)) == []
    rows = [row("a", 1, 0, 2.0), row("b", 1, 0, 2.5), row("a", 1, 1, 2.0)]
    said = verdict(Results(4, rows, interrupted=True))
    assert said[1] == "Small differences of one seed may be chance."  # it was given more


def test_equal_on_average_is_not_equal():
    rows = [row("a", 1, 0, 2.0), row("a", 1, 1, 3.0), row("b", 1, 0, 3.0), row("b", 1, 1, 2.0)]
    assert "equal" not in verdict_of(*rows)[0]
    assert "level with b on average (95 % interval -12." in verdict_of(*rows)[0]


def test_all_with_the_lowest_loss_are_named():
    rows = [row(x, lr, 0, lr) for x in "ab" for lr in (1, 2)] + [
        row("c", lr, 0, 9) for lr in (1, 2)
    ]
    assert "The lowest loss at each rate: a and b at 1 and 2." in verdict_of(*rows)


def test_the_best_returned_model_is_the_one_marked():
    curves = Results(2, [row("a", 1, 0, 2.0), row("b", 1, 0, 1.0)]).curves()
    assert lowest_at(curves, 1) == 1.0
