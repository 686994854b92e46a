"""The controller that does not know the minimum, and estimates it."""

import math

import numpy as np
import pytest

pytest.importorskip("scipy")

from paceline.theory.control import Regulator, certainty_equivalent_gain

GENERATOR = np.random.default_rng(5)
ROTATION = np.linalg.qr(GENERATOR.normal(size=(3, 3)))[0]
CURVATURE = ROTATION * [0.05, 0.4, 1.7] @ ROTATION.T
CURVATURE = (CURVATURE + CURVATURE.T) / 2
SEMI = np.array([[2.0, 1.0, 0.0], [1.0, 0.5, 0.0], [0.0, 0.0, 0.3]])  # of rank 2
COVARIANCE = np.array([[1.0, 0.5, -0.2], [0.5, 0.8, 0.1], [-0.2, 0.1, 0.3]])


def mean_of_all(steps):
    return 1 / np.arange(2.0, steps + 2)


PROBLEMS = {
    "ema": Regulator([0.1, 1.9], np.full(14, 0.2), 0.05, [0.5, 2.0], [3.0, -1.0]),
    "matrix": Regulator(CURVATURE, mean_of_all(12), 0.1, 0.4, [1.0, -2.0, 3.0]),
    "all general": Regulator(
        CURVATURE, GENERATOR.uniform(0, 1, 12), 0.1, COVARIANCE, [1.0, -2.0, 3.0], SEMI
    ),
}


def unknowing(problem, gains, minimum, generator, runs):
    """E x̄_TᵀM·x̄_T, Σ E|u|² and the estimate's error, from weights and controls alone.

    The controller sees θ and its own controls; the estimate is the mean of θ_k + a⁻¹(Δθ_k - u_k).
    """
    d, newton = len(problem.curvature), np.linalg.inv(problem.curvature)
    theta = mean = np.repeat((minimum + problem.start)[:, None], runs, 1)
    seen, effort = np.zeros((d, runs)), 0
    for k, (beta, gain) in enumerate(zip(problem.beta, gains, strict=True)):
        u = np.zeros((d, runs))
        if k:
            u = -gain @ np.vstack([theta - seen / k, mean - seen / k])
        noise = generator.multivariate_normal(np.zeros(d), problem.noise, runs).T
        new = theta - problem.curvature @ (theta - minimum[:, None]) + u + noise
        seen = seen + theta + newton @ (new - theta - u)
        theta, mean, effort = new, (1 - beta) * mean + beta * new, effort + (u**2).sum(0)

    def error(x):
        x = x - minimum[:, None]
        return (x * (problem.terminal @ x)).sum(0)

    return error(mean), effort, error(seen / problem.steps)


@pytest.mark.parametrize("name", ["ema", "matrix", "all general"])
def test_the_estimate_in_the_minimums_place_is_what_a_simulation_finds(name):
    problem, runs = PROBLEMS[name], 20_000
    gains, _ = problem.solve()
    minimum = 7.0 + np.arange(len(problem.curvature))
    samples = unknowing(problem, gains, minimum, np.random.default_rng(0), runs)
    found = problem.outcome(problem.estimated(gains))
    for sample, exact in zip(
        samples, (found.error, found.effort, problem.estimate_error()), strict=True
    ):
        assert abs(sample.mean() - exact) < 4 * sample.std() / math.sqrt(runs)  # standard errors
        assert sample.std() / math.sqrt(runs) < 0.03 * exact  # or it would see nothing


@pytest.mark.parametrize("name", PROBLEMS)
def test_separation(name):
    """What not knowing the minimum costs: each step's error of the estimate, by its own price.

    Σ tr(Kₖᵀ·Wₖ·Kₖ·cov eₖ), Kₖ the gain on a move of both x and x̄ and Wₖ the price of a control that
    is off. It follows by completing the square, for any controller.
    """
    problem = PROBLEMS[name]
    gains, best = problem.solve()
    d, newton = len(problem.curvature), np.linalg.inv(problem.curvature)
    value, prices = np.pad(problem.terminal, (d, 0)), []
    for k in reversed(range(problem.steps)):  # Riccati once more, in Joseph's form
        one, beta = np.eye(d), problem.beta[k]
        a = np.block(
            [
                [one - problem.curvature, 0 * one],
                [beta * (one - problem.curvature), (1 - beta) * one],
            ]
        )
        b = np.vstack([one, beta * one])
        prices.insert(0, problem.penalty * one + b.T @ value @ b)
        closed = a - b @ gains[k]
        value = closed.T @ value @ closed + problem.penalty * gains[k].T @ gains[k]
    extra = 0.0
    for k, (gain, price) in enumerate(zip(gains, prices, strict=True)):
        both = gain[:, :d] + gain[:, d:]
        x = problem.start
        cov = newton @ problem.noise @ newton.T / k if k else np.outer(x, x)  # u_0 = 0
        extra += np.trace(both.T @ price @ both @ cov)
    found = problem.outcome(problem.estimated(gains))
    assert found.cost - best.cost == pytest.approx(extra, rel=1e-9)


def test_no_other_estimate_that_is_right_from_every_start_does_better():
    """Any mean of the y_k with weights that add up to 1, in any step, costs more; by its square."""
    problem = PROBLEMS["matrix"]
    gains, _ = problem.solve()
    d, steps, newton = 3, problem.steps, np.linalg.inv(problem.curvature)
    generator = np.random.default_rng(3)

    def cost(change):
        """By the responses to start and noises; column blocks: start, ξ_0 ... ξ_{T-1}."""
        x = np.zeros((d, d * (1 + steps)))
        x[:, :d] = np.eye(d)
        mean, controls = x.copy(), []
        for k in range(steps):
            u = np.zeros_like(x)
            if k:
                e = np.zeros_like(x)
                for j in range(k):
                    e[:, d * (1 + j) : d * (2 + j)] = newton * (1 / k + change[k, j])
                u = -gains[k] @ np.vstack([x - e, mean - e])
            controls.append(u)
            noise = np.zeros_like(x)
            noise[:, d * (1 + k) : d * (2 + k)] = np.eye(d)
            x = x - problem.curvature @ x + u + noise
            mean = mean + problem.beta[k] * (x - mean)
        second = np.kron(np.eye(1 + steps), problem.noise)
        second[:d, :d] = np.outer(problem.start, problem.start)
        parts = [problem.terminal, *[problem.penalty * np.eye(d)] * steps]
        return sum(
            np.trace(w @ y @ second @ y.T) for w, y in zip(parts, [mean, *controls], strict=True)
        )

    nothing = np.zeros((steps, steps))
    least = cost(nothing)
    assert least == pytest.approx(problem.outcome(problem.estimated(gains)).cost, rel=1e-10)
    for _ in range(5):
        change = np.tril(generator.normal(size=(steps, steps)), -1)
        for k in range(1, steps):
            change[k, :k] -= change[k, :k].mean()
        rises = [cost(s * 1e-2 * change) - least for s in (-1, 1, 2)]
        assert min(rises) > 0
        assert rises[0] == pytest.approx(rises[1], rel=0.05)
        assert rises[2] == pytest.approx(4 * rises[1], rel=0.05)


def test_the_price_of_the_estimate_in_the_lab():
    """The setting of docs/theory.md: the running mean is the wrong estimate, not the controller."""
    a, t = 0.3 / np.arange(1.0, 17), np.arange(400.0)[:, None]
    pull = certainty_equivalent_gain(t, 400.0, a, 0.01)
    errors = []
    for start in (0.4, 3.0):
        problem = Regulator(a, mean_of_all(400), 0.01, 0.3 * a, start)
        gains, best = problem.solve()
        toward = problem.outcome(problem.feedback(pull, -pull)).error
        errors += [best.error, problem.outcome(problem.estimated(gains)).error, toward]
        # The estimate is the mean of all, less what start and end say: Σ s²/(a²T) = Σ i/400
        assert problem.estimate_error() == pytest.approx(136 / 400)
    assert errors == pytest.approx([0.002818, 0.3476, 0.3292, 0.002909, 0.3477, 2.374], rel=1e-3)
