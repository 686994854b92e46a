"""The suggestion of a run over rising rates."""

import math

import numpy as np
import pytest
from rich.console import Console
from training import LLAMA

from paceline.train import find_lr
from paceline.train.find_lr import rising_rates, suggested_rate
from paceline.train.recipe import Recipe


def test_rates_rise_in_equal_factors():
    rates = rising_rates(50)
    assert rates[0] == 1e-5
    assert max(rates) < 1
    np.testing.assert_allclose(np.diff(np.log10(rates)), 0.1)


@pytest.mark.parametrize("best", [3e-4, 1e-2, 0.1])
def test_the_lowest_of_noisy_losses(best):
    """A valley in the logarithm of the rate, with noise that hides it step by step."""
    rates = rising_rates()
    noise = np.random.default_rng(0).normal(0, 0.2, len(rates))
    losses = 4 + 0.3 * np.log10(np.array(rates) / best) ** 2 + noise
    found = suggested_rate(rates, losses)
    assert best / 2 < found < best * 2
    assert found != pytest.approx(rates[int(losses.argmin())], rel=0.01)


@pytest.mark.parametrize("broken", [math.nan, math.inf, 1e30])
def test_losses_after_divergence_do_not_hide_the_valley(broken):
    rates = np.array(rising_rates())
    losses = np.where(rates < 0.05, 4 + np.log10(rates / 1e-2) ** 2, broken)
    assert 5e-3 < suggested_rate(rates, losses) < 2e-2


@pytest.mark.parametrize("sign", [1, -1])
def test_none_where_the_lowest_is_at_an_end(sign):
    rates = rising_rates()
    assert suggested_rate(rates, [4 + sign * math.log10(x) / 10 for x in rates]) is None


def test_the_short_run_keeps_no_averages(monkeypatch):
    def build(recipe, *_):
        assert recipe.times_kept == 0
        raise InterruptedError

    monkeypatch.setattr(find_lr, "build_fitting", build)
    recipe = Recipe(config=LLAMA, tokenizer="bpe", snapshots=3, choose=True)
    with pytest.raises(InterruptedError):
        find_lr.with_found_rate(recipe, Console(quiet=True))
