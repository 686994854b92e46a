"""Monte Carlo by the real optimizers, against the exact moments and against NumPy."""

import itertools
import math

import numpy as np
import pytest
import torch

pytest.importorskip("scipy")

from paceline import EMA, PACE, PowerEMA, Pullback, Uniform
from paceline.theory.quadratic import Pull, Quadratic, limit, limiting_error, moments
from paceline.theory.simulate import (
    Estimate,
    StylisedPACE,
    convex_errors,
    estimate,
    simulate,
    slope,
)

# ---- on quadratics ------------------------------------------------------------------------------

LR = 0.3
PROBLEMS = {
    "coordinates": Quadratic([1.0, 0.5, 2.0], [1.0, 0.0, 3.0], [0.0, 0.02, 0.05], [1.0, -2.0, 0.0]),
    "numbers": Quadratic([1.0, 0.5], noise=2.0, drift=0.1, start=-1.0),
    "matrix": Quadratic(
        [[1.0, 0.4], [0.4, 0.6]],
        noise=[[1.0, -0.7], [-0.7, 2.0]],
        drift=[[0.05, 0.05], [0.05, 0.05]],  # in one direction alone
        start=[2.0, -1.0],
    ),
    "still": Quadratic([[1.0, 0.4], [0.4, 0.6]], noise=1.5, start=3.0),
}
RULES = {
    "last": EMA(beta=1.0),
    "ema": EMA(beta=0.2),
    "power": PowerEMA(0.6),
    "uniform": Uniform(),
}


def pulled(averaging, pull):
    def make(params):
        return Pullback(
            torch.optim.SGD(params, lr=LR), pullback=pull, averaging=averaging, gain="scalar"
        )

    return make


def squares(found, problem, block):
    second = found.second(problem, block)
    return np.diag(second) if problem.general else np.broadcast_to(second, problem.size)


def assert_within_4(found, problem, exact):
    for name, block in (("live", 0), ("returned", -1)):
        got = getattr(found, name)
        expected = squares(exact, problem, block)
        assert got.mean.shape == got.error.shape == (problem.size,)
        # Without noise there is no error but rounding.
        off = abs(got.mean - expected) / (got.error + 1e-12)
        assert off.max() < 4, f"{name} {off}"
        assert (got.error < 0.1 * expected + 1e-12).all()  # or the test would see nothing


@pytest.mark.parametrize("pull", [0.0, 0.5])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_optimizer_has_the_exact_moments_after_some_steps(problem, rule, pull):
    quadratic, averaging = PROBLEMS[problem], RULES[rule]
    method = Pull(LR, averaging.weight, pull)
    for steps in (1, 12):
        exact = next(itertools.islice(moments(method, quadratic), steps, None))
        found = simulate(pulled(averaging, pull), quadratic, steps, runs=3000, seed=steps)
        assert_within_4(found, quadratic, exact)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_optimizer_comes_to_the_limit(problem):
    quadratic = PROBLEMS[problem]
    # The start is forgotten to 1e-4 after 100 steps, which is far below the standard errors.
    for beta, pull, runs in ((1.0, 0.0, 3000), (0.2, 0.0, 3000), (0.3, 0.4, 3000)):
        found = simulate(pulled(EMA(beta=beta), pull), quadratic, 100, runs)
        assert_within_4(found, quadratic, limit(Pull(LR, beta, pull), quadratic))


def test_the_optimizer_comes_to_the_limiting_error():
    a, noise, drift = np.array([0.3, 0.6, 0.9]), 1.0, np.array([0.0, 0.3, 0.1])
    for gain in (0.0, 0.4, 1.0):
        problem = Quadratic(a / LR, noise / LR**2, drift)
        found = simulate(pulled(EMA(beta=0.2), gain), problem, 120, runs=3000).returned
        exact = limiting_error(a, 0.2, gain, noise, drift)
        assert (abs(found.mean - exact) < 4 * found.error).all()


def test_no_step_is_the_start():
    for problem in PROBLEMS.values():
        found = simulate(pulled(EMA(beta=0.2), 0.5), problem, 0, runs=3)
        for got in found:
            expected = np.broadcast_to(problem.start, (problem.size,)) ** 2
            np.testing.assert_array_equal(got.mean, expected)
            np.testing.assert_array_equal(got.error, 0)


def test_noise_in_one_direction_alone_is_drawn_though_rounding_makes_it_negative():
    for direction in ([1, 5], [3, 9], [4, 7], [9, 6]):  # least eigenvalues of about -1e-17
        noise = np.outer(direction, direction) / 100
        problem = Quadratic(np.eye(2), noise=noise, start=0.0)
        found = simulate(pulled(EMA(beta=1.0), 0), problem, 1, runs=50).live
        ratio = (direction[0] / direction[1]) ** 2
        np.testing.assert_allclose(found.mean[0] / found.mean[1], ratio, rtol=1e-6)


def test_the_same_seed_is_the_same_noise_for_another_optimizer():
    problem = PROBLEMS["matrix"]

    def run(make, seed):
        return simulate(make, problem, 20, runs=50, seed=seed).returned.mean

    a, b = (run(pulled(EMA(beta=0.2), gain), 1) for gain in (0.4, 0.4 + 1e-9))
    assert (a != b).all()
    np.testing.assert_allclose(a, b, rtol=1e-7)
    assert abs(run(pulled(EMA(beta=0.2), 0.4), 2) / a - 1).min() > 1e-3
    # Two writings of one optimizer, so that all they share is the noise.
    options = {"lr": 0.1, "weight_decay": 0.0, "eps": 1e-3}
    x = run(lambda p: PACE(p, pullback=0.2, **options), 1)
    y = run(lambda p: Pullback(torch.optim.AdamW(p, **options), pullback=0.2), 1)
    np.testing.assert_allclose(x, y, rtol=1e-10)


def test_runs_have_noise_of_their_own_at_every_step():
    # Means over 60 seeds spread as the standard errors say; 4 standard errors of a spread.
    problem = Quadratic([1.0], noise=1.0, drift=0.2, start=0.5)
    make = pulled(EMA(beta=0.5), 0.2)
    found = [simulate(make, problem, 5, runs=60, seed=seed).returned for seed in range(60)]
    spread = np.std([x.mean for x in found], ddof=1)
    expected = math.sqrt(np.mean([x.error**2 for x in found]))
    assert abs(spread / expected - 1) < 4 / math.sqrt(2 * 59)


# ---- estimates ----------------------------------------------------------------------------------


def test_estimate_is_mean_and_standard_error():
    samples = np.random.default_rng(0).normal(3, 2, size=(50, 4, 5))
    found = estimate(torch.tensor(samples))
    np.testing.assert_allclose(found.mean, samples.mean(0), rtol=1e-14)
    np.testing.assert_allclose(found.error, samples.std(0, ddof=1) / math.sqrt(50), rtol=1e-13)


def test_intervals_hold_the_truth_in_95_of_100():
    samples = np.random.default_rng(0).normal(3, 2, size=(200, 10_000))
    mean, error = estimate(torch.tensor(samples))
    held = (abs(mean - 3) < 1.96 * error).mean()
    # Of 10,000: a standard error of 0.0022. The t of 199 degrees has 0.9486 within 1.96.
    assert abs(held - 0.9486) < 4 * 0.0022


# ---- convex and Lipschitz -----------------------------------------------------------------------

METHODS = [
    StylisedPACE(Uniform()),
    StylisedPACE(Uniform(), 1.0),
    StylisedPACE(PowerEMA(0.7), 1.0),
    StylisedPACE(PowerEMA(0.7)),
    StylisedPACE(EMA(beta=0.1), 2.0),
    StylisedPACE(EMA(beta=0.1), 20.0),  # the clip holds it at 1
]


def written_out(method, steps, runs, n, lr, seed):
    """The problem and the method in NumPy; the generator alone is the package's."""
    generator = torch.Generator().manual_seed(seed)
    i = np.arange(1, n + 1)
    x = average = np.zeros((runs, n))
    for k in range(1, steps + 1):
        noise = torch.randn((runs, n), generator=generator, dtype=torch.float64).numpy() / i
        gradient = 0.5**i * np.sign(x - 1 / i) + noise
        weight = float(method.averaging.weight(k))
        gain = min(1.0, method.pullback * weight)
        x = x - lr / math.sqrt(steps) * gradient + gain * (average - x)
        average = average + weight * (x - average)
    losses = (0.5**i * abs(average - 1 / i)).sum(1)
    return losses.mean(), losses.std(ddof=1) / math.sqrt(runs)


def test_convex_errors_are_those_of_the_method_written_out():
    settings = {"runs": 7, "lr": 1.5, "seed": 3}
    found = convex_errors(METHODS, 40, coordinates=5, **settings)
    for method, got in zip(METHODS, found, strict=True):
        mean, error = written_out(method, 40, n=5, **settings)
        # Seldom does a rounding turn a sign, and not with this seed.
        np.testing.assert_allclose(got.mean, mean, rtol=1e-11)
        np.testing.assert_allclose(got.error, error, rtol=1e-9)
    assert len({float(x.mean) for x in found}) == len(METHODS)


@pytest.fixture(scope="module")
def convex():
    """Errors of the first three methods at horizons, and the horizons."""
    horizons = [256, 1024, 4096]
    return horizons, [convex_errors(METHODS[:3], t, seed=t) for t in horizons]


def test_the_rate_is_that_of_convex_problems_with_and_without_a_pull(convex):
    horizons, errors = convex
    found = [slope(horizons, [x[method] for x in errors]) for method in range(3)]
    for x in found:
        assert x.error < 0.05
        assert x.mean < -0.5 + 4 * x.error + 0.05  # lower orders show at these horizons
    for method in (0, 1):  # the mean of all: no faster either
        assert found[method].mean > -0.5 - 4 * found[method].error - 0.05
        scaled = [math.sqrt(t) * x[method].mean for t, x in zip(horizons, errors, strict=True)]
        assert max(scaled) / min(scaled) < 1.3


def test_slope_is_that_of_least_squares(convex):
    horizons, errors = convex
    for method in range(3):
        means = [float(x[method].mean) for x in errors]
        found = slope(horizons, [x[method] for x in errors])
        expected = np.polyfit(np.log(horizons), np.log(means), 1)[0]
        np.testing.assert_allclose(found.mean, expected, rtol=1e-12)
    line = [Estimate(3 * t**-0.75, 0.0) for t in horizons]
    np.testing.assert_allclose(slope(horizons, line), [-0.75, 0.0], atol=1e-14)


def test_the_error_of_a_slope_is_its_spread():
    # 2000 experiments whose relative errors are 1 to 5 %; 4 standard errors of a spread.
    rng, horizons = np.random.default_rng(0), np.array([10.0, 30.0, 200.0, 500.0])
    truth, relative = horizons**-0.5, np.array([0.01, 0.05, 0.02, 0.03])
    found = [
        slope(horizons, [Estimate(m, e) for m, e in zip(means, relative * truth, strict=True)])
        for means in truth * (1 + relative * rng.normal(size=(2000, 4)))
    ]
    slopes, errors = np.array(found).T
    assert abs(slopes.std() / errors.mean() - 1) < 4 / math.sqrt(2 * 2000)
    assert abs(slopes.mean() + 0.5) < 4 * errors.mean() / math.sqrt(2000)


# ---- refusals -----------------------------------------------------------------------------------

ONE = Estimate(np.array(1.0), np.array(0.1))
METHOD = [StylisedPACE(Uniform())]
REFUSED = {
    "steps": (
        lambda: simulate(pulled(EMA(beta=0.2), 0), PROBLEMS["still"], -1),
        ["steps must be in [0, inf), got -1, 1 below"],
    ),
    "runs": (
        lambda: simulate(pulled(EMA(beta=0.2), 0), PROBLEMS["still"], 1, runs=1),
        ["runs must be in [2, inf), got 1, 1 below"],
    ),
    "horizon": (lambda: convex_errors(METHOD, 0), ["steps must be in [1, inf), got 0, 1 below"]),
    "convex runs": (lambda: convex_errors(METHOD, 5, runs=1), ["runs must be in [2, inf), got 1"]),
    "coordinates": (
        lambda: convex_errors(METHOD, 5, coordinates=0),
        ["coordinates must be in [1, inf), got 0, 1 below"],
    ),
    "lr": (lambda: convex_errors(METHOD, 5, lr=0), ["lr must be in (0, inf), got 0, which"]),
    "one horizon": (lambda: slope([4], [ONE]), ["two or more", "got 1 and 1"]),
    "as many": (lambda: slope([4, 8, 16], [ONE, ONE]), ["as many of each, got 3 and 2"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_with_the_condition_and_by_how_much(case):
    call, parts = REFUSED[case]
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the parts are the match
        call()
    for part in parts:
        assert part in str(caught.value)
