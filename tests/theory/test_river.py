"""The river: PACE's runs against NumPy at the true learning rates, and what they show."""

import numpy as np
import pytest
import torch

pytest.importorskip("scipy")

from paceline.theory.river import METHODS, PAIR, River, Traveller, travel

VALLEY = River(slope=0.05, hills=(8.0, 2.0), bend=0.4, length=1.5, noise=0.5)

# ---- the valley ----------------------------------------------------------------------------------


def test_the_gradient_is_that_of_the_loss():
    place = torch.randn((7, 3), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    place.requires_grad_()
    (expected,) = torch.autograd.grad(VALLEY.loss(place).sum(), place)
    with torch.no_grad():
        found = VALLEY.gradient(place, torch.zeros((7, 2), dtype=torch.float64))
        noisy = VALLEY.gradient(place, torch.ones((7, 2), dtype=torch.float64))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    added = torch.tensor([0, 0.5 * 8**0.5, 0.5 * 2**0.5], dtype=torch.float64)
    torch.testing.assert_close(noisy - found, added.expand(7, 3), rtol=1e-12, atol=1e-12)


def test_on_the_river_there_is_no_height_and_it_starts_at_0():
    x = torch.linspace(-3, 9, 20, dtype=torch.float64)[:, None]
    bottom, bent = VALLEY.floor(x)
    place = torch.cat([x, bottom], -1)
    torch.testing.assert_close(VALLEY.height(place), torch.zeros(20, dtype=torch.float64))
    torch.testing.assert_close(VALLEY.loss(place), -0.05 * x[:, 0])
    assert VALLEY.floor(torch.zeros(1, dtype=torch.float64))[0].tolist() == [0, 0]
    step = 1e-6
    np.testing.assert_allclose((VALLEY.floor(x + step)[0] - bottom) / step, bent, atol=1e-6)


@pytest.mark.parametrize("hills", [1, 2, 5])
def test_the_turn_makes_every_weight_part_of_the_river(hills):
    turn = River(hills=(1.0,) * hills).turn().numpy()
    np.testing.assert_allclose(turn @ turn, np.eye(1 + hills), atol=1e-15)
    np.testing.assert_allclose(turn[0], (1 + hills) ** -0.5)
    np.testing.assert_array_equal(turn, turn.T)


# ---- the runs ------------------------------------------------------------------------------------


def gradient(place, noise):
    """Of VALLEY, in NumPy."""
    x, y = place[:, :1], place[:, 1:]
    hills, phase = np.array([8.0, 2.0]), np.arange(2.0)
    uphill = hills * (y - 0.4 * (np.sin(x / 1.5 + phase) - np.sin(phase)))
    along = -0.05 - (uphill * 0.4 / 1.5 * np.cos(x / 1.5 + phase)).sum(1, keepdims=True)
    return np.concatenate([along, uphill + 0.5 * np.sqrt(hills) * noise], 1)


def written_out(name, lr, steps, runs, seed, momentum):
    """One method at one rate, with Adam's moments, the averages and the pull."""
    generator, turn = torch.Generator().manual_seed(seed), VALLEY.turn().numpy()
    beta1 = 0 if name == "Schedule-Free" else momentum
    w, m, v, pulled, average = np.zeros((5, runs, 3))
    path = [w]
    for k in range(1, steps + 1):
        noise = torch.randn((runs, 2), generator=generator, dtype=torch.float64).numpy()
        at = 0.1 * w + 0.9 * average if name == "Schedule-Free" else w
        g = gradient(at @ turn, noise) @ turn
        m, v = beta1 * m + (1 - beta1) * g, 0.999 * v + 0.001 * g**2
        rate = lr * min(1, k / max(1, round(0.05 * steps)))
        rate *= {"power": (1 + k) ** -0.3, "decay": min(1, (steps - k + 1) / (0.2 * steps))}.get(
            name, 1
        )
        step = rate * m / (1 - beta1**k) / (np.sqrt(v / (1 - 0.999**k)) + 1e-8)
        w = (pulled if name == "pull" else w) - step  # gain 1: all the way to the average
        pulled = pulled + (1 + k) ** -0.3 * (w - pulled)
        weight = 1 / k if name == "Schedule-Free" else (1 + k) ** -0.7
        average = average + weight * (w - average)
        path.append(w)
    return w @ turn, average @ turn, np.array(path)[:, :9] @ turn


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("name", METHODS)
def test_runs_are_those_written_out_at_each_rate(name, momentum):
    rates, steps, runs = (0.05, 0.7), 60, 11
    found = travel(METHODS[name], VALLEY, rates, steps, runs, 5, momentum)
    for i, lr in enumerate(rates):
        expected = written_out(name, lr, steps, runs, 5, momentum)
        got = (found.live[i], found.returned[i], found.path[:, i])
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9)
    assert (found.live[0] - found.returned[0]).abs().min() > 1e-6


# ---- what they show ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found():
    river, rates = River(), (0.25, 1.0)
    journeys = {name: travel(x, river, rates, 200, 24) for name, x in METHODS.items()}
    still = {name: travel(METHODS[name], river, rates, 200, 24, momentum=0.0) for name in PAIR}
    return river, journeys, still


def test_averages_come_down_to_the_river(found):
    river, journeys, _ = found
    for name, x in journeys.items():
        if name != "decay":  # its live weights come down themselves
            assert (river.height(x.returned).mean(1) < 0.5 * river.height(x.live).mean(1)).all()


def test_pull_and_power_schedule_are_slower_along_it(found):
    _, journeys, _ = found
    x = {name: each.returned[..., 0].mean(1) for name, each in journeys.items()}
    for name in PAIR:
        assert (x[name] < 0.7 * x["EMA"]).all()


def test_without_momentum_the_step_ahead_has_the_higher_loss(found):
    river, _, still = found
    pull, power = (river.loss(still[name].returned) for name in PAIR)
    difference = pull - power
    error = difference.std(1) / 24**0.5
    assert (difference.mean(1) > 3 * error).all()


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: River(slope=-1), "slope must be in [0, inf), got -1"),
        (lambda: River(noise=-1), "noise must be in [0, inf), got -1"),
        (lambda: River(bend=-0.5), "bend must be in [0, inf), got -0.5"),
        (lambda: River(length=0), "length must be in (0, inf), got 0"),
        (lambda: River(hills=(1, 0)), "hills must be in (0, inf), got 0"),
        (lambda: River(hills=()), "hills must be one curvature or more, got none"),
        (lambda: travel(Traveller({}), VALLEY, [0], 3, 1), "rates must be in (0, inf), got 0"),
        (lambda: travel(Traveller({}), VALLEY, [1], 0, 1), "steps must be in [1, inf), got 0"),
        (lambda: travel(Traveller({}), VALLEY, [1], 3, 0), "runs must be in [1, inf), got 0"),
    ],
)
def test_refuses_what_is_out_of_range(call, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the message is the match
        call()
    assert message in str(caught.value)
