"""The line at the end of a run: how returned and live differ, and whether the run is too short."""

import math
from itertools import islice

import pytest

pytest.importorskip("transformers")

from paceline.averaging import BEMA, EMA, LAWA, SWA, PowerEMA, Uniform
from paceline.train.held_out import Difference
from paceline.train.verdict import Lag, verdict

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
    assert verdict(LAST, found, lag) == said


def test_without_an_average_and_after_divergence():
    same = {"eval_loss": 3.0, "eval_live_loss": 3.0}
    assert verdict(same, None, None).startswith("The live weights are returned")
    lost = "The training has diverged: no finite loss of {}. Take a lower learning rate."
    for live, returned, who in (
        (math.nan, 3.0, "live weights"),
        (3.0, math.inf, "returned model"),
        (math.nan, math.inf, "live weights and returned model"),
    ):
        last = {"eval_loss": returned, "eval_live_loss": live}
        assert verdict(last, None, FITS) == lost.format(who)


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
