"""The verdict of a comparison."""

import pytest

pytest.importorskip("transformers")


from paceline.study.report import Results, best_at, verdict


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
    ema = [row("ema", 0.01, 0, 2.3), row("ema", 0.01, 1, 2.2)]
    twin = [row("ema twin", 0.01, s, 2.0, schedule="twin", twin_gain=0.9) for s in (0, 1)]
    adamw = [row("adamw", 0.01, 0, None), row("adamw", 0.01, 1, 2.5)]
    assert verdict_of(*pace, *ema, *adamw, *twin) == [
        "At learning rate 0.01: ema twin has the lowest loss, 2.000 ±0.000, 0.050 nats lower "
        "(95 % interval -0.685 to +0.585, lower in 1 of 2 seeds) than pace.",
        "Against the same average without the pull, the loss of pace is 0.200 nats lower "
        "(95 % interval -1.471 to +1.071, lower in 2 of 2 seeds) than ema.",
        "Against the schedule of a gain of 0.9, the loss of pace is 0.050 nats "
        "higher (95 % interval -0.585 to +0.685, higher in 1 of 2 seeds) than ema twin.",
        "At the end, the mean gain of pace is 0.85, and 50.0% of the coordinates are clipped.",
        "At learning rate 0.01 adamw diverged.",
        "Each interval is for its difference alone: which method has the lowest loss was not known "
        "before.",
    ]
    amounts_to = [row("ema eps=0.02", 0.01, s, 2.1, eps=0.02) for s in (0, 1)]  # 0.01 · 2
    other = [row("ema eps=0.03", 0.01, s, 2.2, eps=0.03) for s in (0, 1)]
    assert verdict_of(*pace, *amounts_to, *other)[1:3] == [
        "Against the ε that its pull amounts to, the loss of pace is 0.050 nats lower "
        "(95 % interval -0.685 to +0.585, lower in 1 of 2 seeds) than ema eps=0.02.",
        "At the end, the mean gain of pace is 0.85, and 50.0% of the coordinates are clipped.",
    ]
    one = verdict_of(pace[0], ema[0])
    assert one[0] == (
        "At learning rate 0.01: pace has the lowest loss, 2.000, 0.300 nats lower than ema."
    )
    assert "With one seed" in one[-1]


def test_verdict_compares_over_the_seeds_that_all_finished():
    """Ctrl-C in the second seed: pace's worse second run has nothing to be compared with."""
    said = verdict_of(row("pace", 1, 0, 2.0), row("pace", 1, 1, 9.0), row("ema", 1, 0, 2.1))
    assert said[0].endswith("pace has the lowest loss, 2.000, 0.100 nats lower than ema.")
    assert said[-1].startswith("Losses are those of seed 0, which every method finished.")
    said = verdict_of(row("pace", 1, 0, 2.0), row("ema", 1, 1, 2.1))
    assert "not comparable with ema, which has no seed in common" in said[0]
    assert "No seed was finished by all methods" in said[-1]


def test_verdict_on_ties_and_divergence():
    assert "2.000, equal to that of" in verdict_of(row("a", 1, 0, 2.0), row("b", 1, 0, 2.0002))[0]
    said = verdict_of(row("pace", 1, 0, None, gain_mean=None), row("ema", 1, 0, None))
    assert said[:2] == ["At learning rate 1: all diverged.", "At learning rate 1 pace diverged."]
    said = verdict_of(row("pace", 1, 0, 2.0, gain_mean=None), row("ema", 1, 0, None))
    assert "2.000, not comparable with ema, as a run diverged" in said[0]


def best_of(said):
    return next(sentence for sentence in said if sentence.startswith("Each method at its best"))


def test_verdict_over_rates():
    rows = [row("pace", lr, 0, loss) for lr, loss in ((0.1, 2.4), (0.2, 2.0), (0.3, 2.2))]
    rows += [row("ema", lr, 0, loss) for lr, loss in ((0.1, 2.1), (0.2, 1.5), (0.3, None))]
    said = best_of(verdict_of(*rows, row("adamw", 0.4, 0, 2.5)))
    assert "ema at 0.2 has the lowest loss, 1.500, 0.500 nats lower than pace at 0.2" in said
    assert "All: ema at 0.2 1.500, pace at 0.2 2.000, adamw at 0.4 2.500." in said
    assert "rates were chosen" in said
    said = verdict_of(rows[0], rows[4])  # each had one rate: nothing was picked
    assert not any("rate 0.2:" in sentence for sentence in said)  # nothing to compare there
    assert "rates were chosen" not in best_of(said)
    assert "ema at 0.2 has the lowest loss" in best_of(said)


def test_no_verdict_where_the_best_rate_is_the_last_that_was_tried():
    rows = [row("ema", lr, 0, loss) for lr, loss in ((0.1, 2.1), (0.2, 1.5), (0.3, 1.6))]
    rows += [row("pace", lr, 0, lr) for lr in (0.1, 0.2, 0.3)]
    rows += [row("adamw", lr, 0, -lr) for lr in (0.1, 0.2, 0.3)]
    rows += [row("bema", lr, 0, -lr) for lr in (0.1, 0.3)]
    said = best_of(verdict_of(*rows))
    assert said.startswith(
        "Each method at its best learning rate: no best was found for pace (lr at the bottom of "
        "its grid); adamw, bema (lr at the top of its grid): widen the grid with --lr. All: adamw"
    )
    assert "has the lowest loss" not in said


def test_pull_alone_means_that_nothing_else_differs():
    said = verdict_of(
        row("pace twin", 1, 0, 2.0, schedule="twin", twin_gain=0.5),
        row("ema twin", 1, 0, 2.1, schedule="twin", twin_gain=1.0),
        row("ema slow", 1, 0, 2.1, kappa=0.7),
    )
    assert not any("without the pull" in sentence for sentence in said)
    slower = row("pace slower", 1, 0, 2.0, return_kappa=0.7)
    said = verdict_of(slower, row("ema", 1, 0, 2.1))  # another average is returned
    assert not any("without the pull" in sentence for sentence in said)


def test_the_best_returned_model_is_the_one_marked():
    cells = Results(2, [row("a", 1, 0, 2.0), row("b", 1, 0, 1.0)]).final()
    assert best_at(cells, 1) == 1.0
