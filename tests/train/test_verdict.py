"""The line at the end of a run: whether it got worse, how returned and live differ, its length."""

import math
from itertools import islice

import pytest

pytest.importorskip("transformers")
pytest.importorskip("trl")

from training import go, lines, read

from paceline.averaging import BEMA, EMA, LAWA, SWA, PowerEMA, Uniform
from paceline.train.held_out import Difference
from paceline.train.verdict import Lag, Measured, verdict

FIRST = {"eval_loss": 3.2, "eval_live_loss": 3.2}
LAST = {"eval_loss": 3.0, "eval_live_loss": 3.1}
FITS, SHORT = Lag(5, 100, 100), Lag(30.4, 100, 1234)


@pytest.mark.parametrize(
    ("found", "lag", "said"),
    [
        (
            Difference(-0.041, -0.052, -0.03),
            SHORT,
            "Returned 0.0410 nats lower than live (95 % interval 0.0300 to 0.0520).",
        ),
        (
            Difference(0.041, 0.03, 0.052),
            FITS,
            "Returned 0.0410 nats higher than live (95 % interval 0.0300 to 0.0520).",
        ),
        (
            Difference(0.041, 0.03, 0.052),
            SHORT,
            "Returned 0.0410 nats higher than live (95 % interval 0.0300 to 0.0520). This run is "
            "too short for its average, which is 30 of 100 steps behind. Take a faster average, or "
            "about 1300 steps.",
        ),
        (
            Difference(-0.001, -0.004, 0.002),
            FITS,
            "No difference shown: returned less live is -0.0010 nats (95 % interval -0.0040 to "
            "0.0020).",
        ),
        (
            Difference(-0.001, -0.004, 0.002),
            SHORT._replace(needed=None),
            "No difference shown: returned less live is -0.0010 nats (95 % interval -0.0040 to "
            "0.0020). The average is too slow: it is 30 of 100 steps behind. Take a faster one.",
        ),
        (
            Difference(0.0, math.nan, math.nan),
            FITS,
            "No difference shown: returned less live is 0.0000 nats, without an interval.",
        ),
        (
            None,
            FITS,
            "No difference shown: returned less live is -0.1000 nats, without an interval.",
        ),
    ],
)
def test_the_line(found, lag, said):
    assert verdict(FIRST, LAST, Measured(Difference(3.0, 2.9, 3.1), found), lag) == said


def test_without_an_average_and_after_divergence():
    same = {"eval_loss": 3.0, "eval_live_loss": 3.0}
    assert verdict(FIRST, same, Measured(), None).startswith("The live weights are returned")
    lost = (
        "The training has diverged: no finite loss of {} (3.2000 nats before training). Take a "
        "lower learning rate."
    )
    for live, returned, who in (
        (math.nan, 3.0, "live weights"),
        (3.0, math.inf, "returned model"),
        (math.nan, math.inf, "live weights and returned model"),
    ):
        last = {"eval_loss": returned, "eval_live_loss": live}
        assert verdict(FIRST, last, Measured(), FITS) == lost.format(who)
    both = {"eval_loss": math.nan, "eval_live_loss": math.nan}
    assert verdict(FIRST, both, Measured(), None).startswith("The training has diverged")


@pytest.mark.parametrize(
    ("now", "interval", "worse"),
    [
        (90.0, (40.0, 140.0), True),
        (90.0, (math.nan, math.nan), True),
        (90.0, None, True),
        (1.75, (1.69, 1.81), True),
        (1.75, (1.5, 2.0), False),  # may be chance
        (1.75, None, False),  # likewise, for all that is known
        (1.6, (1.5, 1.7), False),
    ],
)
@pytest.mark.parametrize("keeps_average", [True, False])
def test_a_model_that_got_worse_is_not_praised(now, interval, worse, keeps_average):
    first = {"eval_loss": 1.67, "eval_live_loss": 1.67}
    last = {"eval_loss": now, "eval_live_loss": now + 132.8 * keeps_average}
    gap = Difference(-132.8, -140.0, -120.0) if keeps_average else None
    found = Measured(interval and Difference(now, *interval), gap)
    said = verdict(first, last, found, SHORT if keeps_average else None)
    then = "Returned 132.8" if keeps_average else "The live weights are returned"
    lead = (
        f"The model got worse: 1.6700 nats before training, {now:.4f} now; lower the rate or train "
        "less. "
    )
    assert said.startswith((lead if worse else "") + then)


def test_a_model_that_got_worse_is_not_to_be_trained_longer():
    said = verdict({"eval_loss": 1.0}, LAST, Measured(), SHORT)
    assert said.startswith("The model got worse")
    assert "too short" not in said


RULES = [
    *(PowerEMA(0.7), PowerEMA(0.3, every=3), PowerEMA(0.5, start=7), EMA(half_life=9), SWA(5, 3)),
    *(Uniform(4), LAWA(3, every=4), BEMA(start=2)),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_lag_is_the_mean_age_of_what_is_in_the_average(rule):
    for steps, age in enumerate(islice(rule.ages(), 30), 1):
        shares = rule.coefficients(steps).tolist()
        assert age == pytest.approx(sum(c * (steps - s) for s, c in enumerate(shares)))
    assert Lag.at(rule, 30).steps == age


def test_the_steps_that_an_average_needs():
    """It is a fifth of them behind; an EMA in the end (1 - β)/β steps, so it needs five times."""
    beta = 0.02
    assert Lag.at(EMA(beta), 60).needed == pytest.approx(5 * (1 - beta) / beta, abs=3)
    for rule in (PowerEMA(0.7), PowerEMA(0.8), EMA(half_life=40)):
        lag = Lag.at(rule, 50)
        assert lag.is_too_long
        assert Lag.at(rule, lag.needed) == (
            pytest.approx(lag.needed / 5, rel=0.02),
            *[lag.needed] * 2,
        )
        assert Lag.at(rule, lag.needed - 1).is_too_long
    assert not Lag.at(PowerEMA(0.3), 50).is_too_long
    assert Lag.at(Uniform(), 50)[1:] == (50, None)  # half of any run behind


@pytest.mark.parametrize("method", ["pace", "adamw"])
def test_a_run_at_a_rate_that_is_too_high(surroundings, values, method, tmp_path):
    run = tmp_path / "run"
    own = {"pullback": None, "kappa": None}
    assert go(run, values, lr=1.0, method=method, steps=4, evaluations=1, **own)
    said = read(run / "paceline.json")["verdict"]
    first, last = (x["eval_loss"] for x in lines(run) if "eval_loss" in x)
    assert said.startswith(f"The model got worse: {first:.4f} nats before training, {last:.4f} now")
    assert said in (run / "report.html").read_text(encoding="utf-8")
