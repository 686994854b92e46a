"""The bound on convex problems: never exceeded, and not a percent too large."""

import itertools
import math
import re

import numpy as np
import pytest
import torch

pytest.importorskip("scipy")

from paceline import EMA, Pullback
from paceline.theory.rate import hardest_starts, mean_loss, rate_bound, step_factor


def largest_of_linear(rng, dimension, pieces):
    """max_i a_i·x, where the a_i add up to 0: its least value is 0, at 0; and its G."""
    a = rng.normal(size=(pieces, dimension))
    a -= a.mean(0)

    def problem(x):
        values = a @ x
        return values.max(), a[values.argmax()]

    return problem, np.linalg.norm(a, axis=1).max()


def absolute(rng, dimension, pieces):
    """Σ_i |a_i·x|, and its G by trying all signs."""
    a = rng.normal(size=(pieces, dimension))

    def problem(x):
        values = a @ x
        return abs(values).sum(), a.T @ np.where(values >= 0, 1.0, -1.0)

    signs = np.array(list(itertools.product((-1, 1), repeat=pieces)))
    return problem, np.linalg.norm(signs @ a, axis=1).max()


def norm(rng, dimension, pieces):
    """|x|."""

    def problem(x):
        length = float(np.linalg.norm(x))
        return length, x / length if length else 0 * x

    return problem, 1.0


@pytest.mark.parametrize("family", [largest_of_linear, absolute, norm])
def test_no_random_problem_exceeds_the_bound(family):
    rng, ratios = np.random.default_rng(0), []
    for _ in range(400):
        dimension, pieces = (int(x) for x in rng.integers(1, 7, 2))
        problem, slope = family(rng, dimension, pieces + 1)
        start = rng.normal(size=dimension) * 10 ** rng.uniform(-2, 1)
        beta, gain = 10 ** rng.uniform(-3, 0), rng.choice([0, 1, rng.uniform()])
        lr, steps = 10 ** rng.uniform(-3, 1), int(10 ** rng.uniform(0, 2.7))
        found = mean_loss(problem, start, lr, steps, beta, gain)
        distance = np.linalg.norm(start)
        ratios.append(found / float(rate_bound(distance, lr, steps, beta, gain, slope)))
    assert max(ratios) < 1 + 1e-12  # a step of SGD on |x| from a distance of lr is the bound itself
    assert max(ratios) > 0.9  # and so the problems are not easy


@pytest.mark.parametrize("noise", ["signs", "dropped coordinates"])
def test_noise_keeps_the_bound_in_the_mean(noise):
    """Unbiased gradients with E|g|² = G²: 400 runs of |x₁| + |x₂|, to 4 standard errors."""
    rng, lr, steps, beta, gain = np.random.default_rng(1), 0.3, 60, 0.1, 0.7
    means = []

    def problem(x):
        g = np.where(x >= 0, 1.0, -1.0)
        if noise == "signs":
            return abs(x).sum(), g + rng.choice([-2.0, 2.0], 2)
        kept = rng.integers(2)
        return abs(x).sum(), np.array([2 * g[0] * kept, 2 * g[1] * (1 - kept)])

    slope = math.sqrt(10 if noise == "signs" else 4)
    for _ in range(400):
        means.append(mean_loss(problem, [1.0, -0.5], lr, steps, beta, gain))
    bound = float(rate_bound(math.hypot(1, 0.5), lr, steps, beta, gain, slope))
    assert np.mean(means) + 4 * np.std(means) / 20 < bound


def distance(x):
    return float(abs(x[0])), np.where(x >= 0, 1.0, -1.0)


CASES = [*itertools.product((0.02, 0.1, 0.5, 1.0), (0.0, 0.1, 0.5, 1.0))]


@pytest.mark.parametrize(("beta", "gain"), CASES)
def test_both_terms_are_reached(beta, gain):
    """From near the term of steps is all there is, from far that of the distance."""
    lr, steps = 0.7, 20_000
    near, far = hardest_starts(lr, steps, beta, gain)
    assert rate_bound(near, lr, steps, beta, gain) < 1.001 * step_factor(beta, gain) * lr / 2
    assert rate_bound(far, lr, steps, beta, gain) < 1.01 * far / 2
    for start, least in ((near, 0.9995), (far, 0.99)):
        found = mean_loss(distance, [start], lr, steps, beta, gain)
        ratio = found / float(rate_bound(start, lr, steps, beta, gain))
        assert least < ratio <= 1 + 1e-9  # so that neither could be a percent smaller
    # Where it swings: 'as far on both sides, by C·η/2'
    late = mean_loss(distance, [near], lr, 400, beta, gain) * 400
    late = (mean_loss(distance, [near], lr, 402, beta, gain) * 402 - late) / 2
    assert late == pytest.approx(float(step_factor(beta, gain)) * lr / 2, rel=1e-3)


def test_a_potential_falls_as_the_proof_says():
    """Step by step, for gradients of any kind: they need not be those of a function."""
    rng = np.random.default_rng(2)
    for beta, gain, lr in rng.uniform(0.01, 0.99, (200, 3)):
        theta = average = rng.normal(size=3)

        def potential(theta, average, beta=beta, gain=gain):
            parts = (1 - gain) * theta @ theta, gain / beta * average @ average
            return sum(parts) + gain / (1 - beta) * (theta - average) @ (theta - average)

        assert potential(theta, average) == pytest.approx(
            theta @ theta * (beta + gain * (1 - beta)) / beta
        )
        for _ in range(20):
            g, before = rng.normal(size=3), potential(theta, average)
            bound = -2 * lr * theta @ g + float(step_factor(beta, gain)) * lr**2 * g @ g
            theta = theta - lr * g + gain * (average - theta)
            average = (1 - beta) * average + beta * theta
            assert potential(theta, average) - before <= bound + 1e-12


def test_the_library_keeps_the_bound_and_its_averages_do():
    """`Pullback` around SGD, with the loss of its live weights and of its average."""
    lr, steps, beta, gain = 0.05, 300, 0.1, 0.6
    x = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer = Pullback(torch.optim.SGD([x], lr=lr), gain, EMA(beta=beta), gain="scalar")
    live = returned = 0.0
    for _ in range(steps):
        with torch.no_grad():
            live += float(x.abs().sum())
            with optimizer.averaged():
                returned += float(x.abs().sum())
        x.grad = x.detach().sign()
        optimizer.step()

    def problem(x):
        return float(abs(x).sum()), np.sign(x)

    found = mean_loss(problem, [1.0, -2.0], lr, steps, beta, gain)
    assert live / steps == pytest.approx(found, rel=1e-12)
    size, slope = math.sqrt(5), math.sqrt(2)
    bound = float(rate_bound(size, lr, steps, beta, gain, slope))
    assert found < bound
    assert returned / steps < bound + slope * size * (1 - beta) / (beta * steps)


def test_the_bound_in_numbers():
    assert rate_bound(2.0, 0.1, 50, 0.3, 0.0, 3.0) == pytest.approx(4 / 10 + 0.1 * 9 / 2)  # SGD
    assert rate_bound(2.0, 0.1, 50, 1.0, 0.8) == pytest.approx(4 / 10 + 0.1 / 2)  # no average
    assert rate_bound(1.0, 0.1, 100, 0.2, 1.0) == pytest.approx(1 / (2 * 0.2 * 10) + 1.8 * 0.05)
    # 1 + λ(1-β)/(1 + (1-λ)(1-β))
    assert step_factor(0.2, 0.5) == pytest.approx(1 + 0.4 / 1.4)
    beta, gain = np.meshgrid(np.linspace(0.01, 1, 30), np.linspace(0, 1, 30))
    r = beta / (beta + gain * (1 - beta))
    assert (step_factor(beta, gain) <= 3 - 2 * r + 1e-12).all()  # a simpler bound, which is larger


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"beta": 0.0}, "beta must be in (0, 1], got 0"),
        ({"gain": 1.5}, "gain must be in [0, 1], got 1.5, 0.5 above"),
        ({"lr": 0.0}, "lr must be in (0, inf), got 0"),
        ({"steps": 0}, "steps must be in [1, inf), got 0"),
        ({"steps": 2.5}, "steps must be whole, got 2.5"),
        ({"distance": -1.0}, "distance must be in [0, inf), got -1"),
        ({"slope": -1.0}, "slope must be in [0, inf), got -1"),
    ],
)
def test_it_says_what_is_wrong(arguments, says):
    good = {"distance": 1.0, "lr": 0.1, "steps": 10, "beta": 0.1, "gain": 0.5}
    with pytest.raises(ValueError, match=re.escape(says)):
        rate_bound(**good | arguments)
