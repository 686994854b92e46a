"""The control problem's solutions: quadrature, fine steps, brute force and simulation agree."""

import inspect
import math
import re
from fractions import Fraction

import numpy as np
import pytest

pytest.importorskip("scipy")

from scipy.integrate import quad

from paceline.averaging import EMA, PowerEMA, Uniform
from paceline.theory import quadratic
from paceline.theory.control import (
    ControlOutcome,
    Regulator,
    beta_of_weights,
    certainty_equivalent_gain,
    influence,
    long_horizon_gain,
    optimal_gain,
    optimal_value,
)

# time, horizon, learning rate times curvature, penalty
TIMES = [
    (0.0, 1.0, 0.0, 1.0),
    (2.0, 5.0, 0.0, 0.03),
    (0.5, 3.0, 0.5, 2.0),
    (0.0, 100.0, 0.1, 0.01),
    (99.0, 100.0, 0.1, 1e-6),
    (10.0, 40.0, 2.5, 5.0),
    (7.0, 7.0, 0.3, 1.0),
    (1.0, 3.0, 1e-9, 0.1),
]


# ---- one coordinate, continuous time ------------------------------------------------------------


@pytest.mark.parametrize(("t", "horizon", "a", "penalty"), TIMES)
def test_the_formulas_are_their_integrals(t, horizon, a, penalty):
    """g is what x_t = 1 adds to the sum if nothing is done; 1/P = T² + ∫g²/ρ."""

    def g(s):
        return quad(lambda r: math.exp(-a * (r - s)), s, horizon, epsabs=0, epsrel=1e-12)[0]

    inverse = (
        horizon**2 + quad(lambda s: g(s) ** 2, t, horizon, epsabs=0, epsrel=1e-11)[0] / penalty
    )
    close = {"rel": 1e-10, "abs": 0}  # of quadrature
    assert influence(t, horizon, a) == pytest.approx(g(t), **close)
    assert optimal_value(t, horizon, a, penalty) == pytest.approx(1 / inverse, **close)
    gain = g(t) / inverse / penalty
    assert optimal_gain(t, horizon, a, penalty) == pytest.approx(gain, **close)
    assert certainty_equivalent_gain(t, horizon, a, penalty) == pytest.approx(g(t) * gain, **close)


def test_the_integral_is_exact_on_both_sides_of_the_switch():
    """∫g² as a power series, in fractions, from far below to far above where series gives way.

    ∫_0^1 ((1-e^{-as})/a)² ds = Σ_n (-1)^n (2^n-2) / (n!·(n+1)) · a^{n-2},    n = 2, 3, ...
    """
    a = np.concatenate([[0.0, 1e-300, 1e-12], np.logspace(-6, 0, 121), [0.00999999, 0.01000001]])
    terms = [Fraction((-1) ** n * (2**n - 2), math.factorial(n) * (n + 1)) for n in range(2, 26)]
    direct = [math.fsum(float(term) * x**n for n, term in enumerate(terms)) for x in a.tolist()]
    tiny = 1e-12  # of a penalty: all that counts in 1/P is the integral
    found = (1 / optimal_value(0.0, 1.0, a, tiny) - 1) * tiny
    # Cancellation is worst just above the switch: 1e-16 of 2e-2, over an integral of 3e-7.
    np.testing.assert_allclose(found, direct, rtol=1e-10)
    # and it scales as a cube of time
    scaled = (1 / optimal_value(3.0, 10.0, a / 7, 1e-8) - 100) * 1e-8
    np.testing.assert_allclose(scaled, 343 * np.array(direct), rtol=1e-10)


def test_the_value_solves_its_differential_equation():
    """P' = g²P²/ρ, P(T) = 1/T²: the least of ρu² + d/dt P·z² over u is 0, at the optimal gain."""
    t = np.linspace(0.1, 3.9, 20)[:, None]
    a, penalty, h = np.array([0.0, 0.01, 0.3, 2.0]), 0.2, 1e-4
    p, g = optimal_value(t, 4.0, a, penalty), influence(t, 4.0, a)
    slope = (optimal_value(t + h, 4.0, a, penalty) - optimal_value(t - h, 4.0, a, penalty)) / 2 / h
    # central differences: h² and rounding over h
    np.testing.assert_allclose(slope, g**2 * p**2 / penalty, rtol=1e-6, atol=1e-10)
    gain = optimal_gain(t, 4.0, a, penalty)
    # a control -k·z costs ρk² - 2gPk a unit of time, of z²
    for k in (0.9 * gain, 1.1 * gain):
        assert (penalty * k**2 - 2 * g * p * k > penalty * gain**2 - 2 * g * p * gain).all()
    np.testing.assert_allclose(penalty * gain**2 - 2 * g * p * gain + slope, 0, atol=1e-8)


@pytest.mark.parametrize("a", [0.0, 0.5, 3.0])
def test_fine_steps_come_to_continuous_time(a):
    """A step of dt: noise σ²dt, u·dt for u, ρ/dt for ρ. The gap halves with the step."""
    horizon, penalty, variance, start = 3.0, 0.3, 0.7, 1.5
    gaps = []
    for n in (300, 600):
        dt = horizon / n
        problem = Regulator(a * dt or 1e-9, mean_of_all(n), penalty / dt, variance * dt, start)
        gains, best = problem.solve()
        t = np.arange(n) * dt
        k, g = optimal_gain(t, horizon, a, penalty), influence(t, horizon, a)
        # ∫x is the average times the time so far: z = g·x + t·x̄
        live, average = gains[:, 0, 0] / dt, gains[:, 0, 1] / dt
        inner = slice(0, n // 2)
        # P·z² of the start, and what the noise adds to z² in each bit of time, times P
        cost = (
            optimal_value(0.0, horizon, a, penalty) * (g[0] * start) ** 2
            + quad(
                lambda s: influence(s, horizon, a) ** 2 * optimal_value(s, horizon, a, penalty),
                0,
                horizon,
            )[0]
            * variance
        )
        gaps.append(
            [
                abs(live / (k * g) - 1)[inner].max(),
                abs(average / (k * (t + dt)) - 1)[inner].max(),
                abs(best.cost / cost - 1),
            ]
        )
    assert max(gaps[1]) < 0.02
    np.testing.assert_allclose(np.divide(*gaps), 2, rtol=0.05)


def test_ends_and_limits():
    horizon, a, penalty = np.array([1.0, 30.0, 400.0])[:, None], np.array([0.0, 0.02, 1.5]), 0.4
    assert (optimal_gain(horizon, horizon, a, penalty) == 0).all()
    assert (certainty_equivalent_gain(horizon, horizon, a, penalty) == 0).all()
    assert (influence(horizon, horizon, a) == 0).all()
    np.testing.assert_allclose(optimal_value(horizon, horizon, a, penalty) * horizon**2, 1)
    np.testing.assert_array_equal(influence(0.25, 1.0, 0.0), 0.75)
    # a = 0: g = T - t, and ∫g² = (T-t)³/3
    flat = certainty_equivalent_gain(2.0, 5.0, 0.0, 0.7)
    assert flat == pytest.approx(9 / (0.7 * 25 + 9), rel=1e-12)
    assert influence(np.zeros((2, 1)), np.ones(3), 0.1).shape == (2, 3)


def test_long_before_the_end():
    """The gain comes to 1/(ρa²T² + T) as aT grows, is at most 1/T, and falls with the curvature."""
    a, penalty = np.array([0.05, 0.3, 1.0]), np.array([[1e-3], [0.1], [10.0]])
    for horizon in (1e3, 1e4, 1e5):
        gain = certainty_equivalent_gain(0.0, horizon, a, penalty)
        simple = long_horizon_gain(horizon, a, penalty)
        # ∫g² is (T - 3/(2a))/a², to what e^{-aT} leaves: a relative 3/(2aT) at most
        gap = 1.6 / (a * horizon)
        np.testing.assert_array_less(abs(gain / simple - 1), gap + 0 * penalty)
        np.testing.assert_allclose(simple, 1 / (penalty * (a * horizon) ** 2 + horizon))
    grid = np.logspace(-6, 1, 50)
    for horizon in (1.0, 50.0, 1e4):
        simple = long_horizon_gain(horizon, grid, penalty)
        assert (simple <= 1 / horizon).all()
        assert (np.diff(simple, axis=1) < 0).all()
        assert (np.diff(certainty_equivalent_gain(0.0, horizon, grid, penalty), axis=1) < 0).all()
    assert long_horizon_gain(8.0, 0.0, 3.0) == 1 / 8


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"t": 5.5}, "t must be at most the horizon, got 0.5 above"),
        ({"t": [1.0, 8.0]}, "t must be at most the horizon, got 3 above"),
        ({"t": -1.0}, "t must be in [0, inf), got -1, 1 below"),
        ({"horizon": 0.0, "t": 0.0}, "horizon must be in (0, inf), got 0, which is the end itself"),
        ({"horizon": -2.0}, "horizon must be in (0, inf), got -2, 2 below"),
        ({"a": -0.25}, "a must be in [0, inf), got -0.25, 0.25 below"),
        ({"a": math.nan}, "a must be finite numbers"),
        ({"penalty": 0.0}, "penalty must be in (0, inf), got 0"),
        ({"penalty": [1.0, -3.0]}, "penalty must be in (0, inf), got -3, 3 below"),
    ],
)
def test_continuous_time_says_what_is_wrong(arguments, says):
    """Of every function that has such arguments."""
    functions = [influence, optimal_value, optimal_gain, certainty_equivalent_gain]
    for function in [*functions, long_horizon_gain]:
        given = {"t": 1.0, "horizon": 5.0, "a": 0.1, "penalty": 1.0} | arguments
        for name in given.keys() - inspect.signature(function).parameters.keys():
            del given[name]
        if arguments.keys() <= given.keys():
            with pytest.raises(ValueError, match=re.escape(says)):
                function(**given)


# ---- any number of coordinates, discrete time ---------------------------------------------------


def mean_of_all(steps):
    return 1 / np.arange(2.0, steps + 2)


def weights_of(beta):
    """w_0 ... w_T of the iterates in the average: unrolled."""
    weights = np.array([1.0])
    for b in beta:
        weights = np.append((1 - b) * weights, b)
    return weights


GENERATOR = np.random.default_rng(5)
ROTATION = np.linalg.qr(GENERATOR.normal(size=(3, 3)))[0]
CURVATURE = ROTATION * [0.05, 0.4, 1.7] @ ROTATION.T
CURVATURE = (CURVATURE + CURVATURE.T) / 2
SEMI = np.array([[2.0, 1.0, 0.0], [1.0, 0.5, 0.0], [0.0, 0.0, 0.3]])  # of rank 2
COVARIANCE = np.array([[1.0, 0.5, -0.2], [0.5, 0.8, 0.1], [-0.2, 0.1, 0.3]])

PROBLEMS = {
    "one": Regulator(0.2, mean_of_all(9), 0.3, 0.5, 2.0),
    "one step": Regulator(0.2, [0.4], 0.3, 0.5, 2.0),
    "ema": Regulator([0.1, 1.9], np.full(14, 0.2), 0.05, [0.5, 2.0], [3.0, -1.0]),
    "any numbers": Regulator([0.3], GENERATOR.normal(size=8), 0.7, 1.0, -1.5),
    "from the last": Regulator([0.3, 0.7], np.ones(6), 0.2, 1.0, 1.0),
    "matrix": Regulator(CURVATURE, mean_of_all(12), 0.1, 0.4, [1.0, -2.0, 3.0]),
    "all general": Regulator(
        CURVATURE, GENERATOR.uniform(0, 1, 12), 0.1, COVARIANCE, [1.0, -2.0, 3.0], SEMI
    ),
}


def plain_step(problem, beta, x, mean, u, noise):
    """The module's equations, for columns."""
    x = x - problem.curvature @ x + u + noise
    return x, (1 - beta) * mean + beta * x


def responses(problem, gains):
    """Of x̄_T, and of every u, to a unit of each coordinate of the start and of every noise.

    Returns:
        (d, d·(1+T)) and (T, d, d·(1+T)): the start's columns come first.
    """
    d, steps = len(problem.curvature), len(problem.beta)
    x = np.zeros((d, d * (1 + steps)))
    x[:, :d] = np.eye(d)
    mean, controls = x.copy(), []
    for k in range(steps):
        noise = np.zeros_like(x)
        noise[:, d * (1 + k) : d * (2 + k)] = np.eye(d)
        u = -(gains[k][:, :d] @ x + gains[k][:, d:] @ mean)
        controls.append(u)
        x, mean = plain_step(problem, problem.beta[k], x, mean, u, noise)
    return mean, np.array(controls)


def expectation(problem, gains):
    """Error, effort and cost, by the responses."""
    d, steps = len(problem.curvature), len(problem.beta)
    mean, controls = responses(problem, gains)
    second = np.kron(np.eye(1 + steps), problem.noise)  # of start and noises
    second[:d, :d] = np.outer(problem.start, problem.start)
    error = np.trace(problem.terminal @ mean @ second @ mean.T)
    effort = sum(np.trace(u @ second @ u.T) for u in controls)
    return ControlOutcome(error, effort, error + problem.penalty * effort)


def close(outcome, other, rel=1e-10):  # float64, through some dozens of products
    assert outcome == pytest.approx(other, rel=rel, abs=1e-12)


@pytest.mark.parametrize("name", PROBLEMS)
def test_without_noise_the_controls_are_the_least_squares_solution(name):
    """x̄_T is linear in all the controls: min |R(f + G·u)|² + ρ|u|², with RᵀR = M."""
    problem = PROBLEMS[name]
    d, steps = len(problem.curvature), problem.steps
    assert steps == len(problem.beta)
    weights = weights_of(problem.beta)
    powers = [np.linalg.matrix_power(np.eye(d) - problem.curvature, k) for k in range(steps + 1)]
    # u_j is in x_k, k > j, with the power k-1-j
    g = np.hstack(
        [sum(weights[k] * powers[k - 1 - j] for k in range(j + 1, steps + 1)) for j in range(steps)]
    )
    f = sum(w * p for w, p in zip(weights, powers, strict=True)) @ problem.start
    values, vectors = np.linalg.eigh(problem.terminal)
    r = np.sqrt(np.maximum(values, 0))[:, None] * vectors.T
    stacked = np.vstack([r @ g, math.sqrt(problem.penalty) * np.eye(d * steps)])
    wanted = np.concatenate([-r @ f, np.zeros(d * steps)])
    controls = np.linalg.lstsq(stacked, wanted)[0]

    gains, _ = problem.solve()
    quiet = Regulator(
        problem.curvature, problem.beta, problem.penalty, 0.0, problem.start, problem.terminal
    )
    same, best = quiet.solve()
    np.testing.assert_array_equal(gains, same)  # noise changes nothing of what is best
    x = mean = problem.start
    for k in range(steps):
        u = -gains[k] @ np.concatenate([x, mean])
        np.testing.assert_allclose(u, controls[d * k : d * (k + 1)], rtol=1e-9, atol=1e-11)
        x, mean = plain_step(problem, problem.beta[k], x, mean, u, 0)
    error, effort = ((r @ (f + g @ controls)) ** 2).sum(), (controls**2).sum()
    close(best, (error, effort, error + problem.penalty * effort))


@pytest.mark.parametrize("name", PROBLEMS)
def test_outcome_is_the_sum_of_all_responses(name):
    """Of the best gains and of any others."""
    problem = PROBLEMS[name]
    gains, best = problem.solve()
    assert gains.shape == (problem.steps, len(problem.curvature), 2 * len(problem.curvature))
    close(best, expectation(problem, gains))
    any_ = 0.3 * np.random.default_rng(1).normal(size=gains.shape)
    close(problem.outcome(any_), expectation(problem, any_))


def test_outcome_is_what_a_simulation_finds():
    problem = PROBLEMS["all general"]
    gains, best = problem.solve()
    generator, many = np.random.default_rng(0), 40000
    x = mean = np.repeat(problem.start[:, None], many, 1)
    effort = 0
    for beta, gain in zip(problem.beta, gains, strict=True):
        u = -gain @ np.vstack([x, mean])
        effort = effort + (u**2).sum(0)
        noise = generator.multivariate_normal(np.zeros(3), COVARIANCE, many).T
        x, mean = plain_step(problem, beta, x, mean, u, noise)
    error = (mean * (SEMI @ mean)).sum(0)
    for sample, exact in zip((error, effort, error + 0.1 * effort), best, strict=True):
        assert abs(sample.mean() - exact) < 4 * sample.std() / math.sqrt(many)  # standard errors


@pytest.mark.parametrize("name", PROBLEMS)
def test_no_other_gains_do_better(name):
    """The cost rises with the square of a change of the gains, whatever the change."""
    problem = PROBLEMS[name]
    gains, best = problem.solve()
    generator = np.random.default_rng(2)
    for _ in range(8):
        change = generator.normal(size=gains.shape)
        change *= 1e-3 / abs(change).max()
        rises = [problem.outcome(gains + s * change).cost - best.cost for s in (-1, 1, 2)]
        assert min(rises) > 0
        # a slope would set the two sides apart; the fourth order is some 1e-3 of the second
        assert rises[0] == pytest.approx(rises[1], rel=0.05)
        assert rises[2] == pytest.approx(4 * rises[1], rel=0.05)
    nothing = problem.outcome(np.zeros_like(gains))
    assert nothing.effort == 0
    assert nothing.cost > best.cost


AVERAGES = {
    "ema": np.full(15, 0.15),
    "power": np.array([PowerEMA(0.6).weight(k) for k in range(1, 16)]),
    "all": mean_of_all(15),
    "all but the first": np.array([Uniform().weight(k) for k in range(1, 16)]),
}


@pytest.mark.parametrize("name", AVERAGES)
def test_feedback_is_a_pull(name):
    """(λ, -λ) is PACE: error and effort of the method of theory.quadratic, coordinates and all."""
    beta, gain = AVERAGES[name], np.array([0.3, 0.9])
    curvature, noise, start = [0.1, 0.8], [0.5, 2.0], [3.0, -1.0]
    problem = Regulator(curvature, beta, 0.2, noise, start)
    found = problem.outcome(problem.feedback(gain, -gain))

    method = quadratic.Pull(1.0, lambda k: beta[k - 1], gain)
    line = quadratic.Quadratic(curvature, noise, start=start)
    effort = 0
    for k, state in enumerate(quadratic.moments(method, line)):
        if k == len(beta):
            break
        apart = state.cov[0, 0] - 2 * state.cov[0, 1] + state.cov[1, 1]
        effort += (gain**2 * (apart + (state.mean[0] - state.mean[1]) ** 2)).sum()
    error = state.second(line).sum()
    close(found, (error, effort, error + 0.2 * effort))


def test_a_constant_average_is_pace_with_constant_beta():
    beta, gain = 0.1, 0.6
    problem = Regulator(0.3, np.full(400, beta), 1.0, start=5.0)
    found = problem.outcome(problem.feedback(gain, -gain)).error
    # 400 steps forget the start: the radius is below 0.97
    assert quadratic.spectral_radius(0.3, beta, gain) < 0.97
    assert found == pytest.approx(float(quadratic.limiting_error(0.3, beta, gain)), rel=1e-9)


def test_feedback_broadcasts():
    """Gains for each step, each coordinate, or all; each coordinate by itself."""
    problem = Regulator([0.2, 0.4, 0.6], mean_of_all(4), 1.0)
    live, average = np.arange(4.0)[:, None], np.array([1.0, 2.0, 3.0])
    gains = problem.feedback(live, average)
    assert gains.shape == (4, 3, 6)
    for k in range(4):
        np.testing.assert_array_equal(gains[k] @ np.r_[np.ones(3), np.zeros(3)], [k, k, k])
        np.testing.assert_array_equal(gains[k] @ np.r_[0, 1, 0, 0, 10, 0], [0, k + 20, 0])


@pytest.mark.parametrize("weights", ["ema", "uniform", "any sign"])
def test_beta_of_weights_are_those_of_the_running_average(weights):
    """With them the average is Σ w_k·x_k over the weights' sum, at every step."""
    given = {
        "ema": weights_of(np.full(20, EMA(0.3).weight(1))),
        "uniform": np.full(21, 1 / 21),
        "any sign": np.array([0.5, -0.2, 0.4, -0.6, 0.9]),
    }[weights]
    beta = beta_of_weights(given)
    x = np.random.default_rng(3).normal(size=len(given))
    mean = x[0]
    for k in range(1, len(given)):
        mean = (1 - beta[k - 1]) * mean + beta[k - 1] * x[k]
        so_far = given[: k + 1]
        assert mean == pytest.approx(so_far @ x[: k + 1] / so_far.sum(), rel=1e-11)
    np.testing.assert_allclose(weights_of(beta), given, rtol=1e-11)
    if weights == "uniform":
        np.testing.assert_allclose(beta, mean_of_all(20), rtol=1e-12)
    if weights == "ema":
        np.testing.assert_allclose(beta, 0.3, rtol=1e-12)


def test_a_matrix_is_its_coordinates_turned():
    """What is rotated costs the same, and independent coordinates add up."""
    values, noise, start = np.array([0.05, 0.4, 1.7]), np.array([1.0, 0.3, 2.0]), [1.0, -2.0, 3.0]
    beta = AVERAGES["power"]
    apart = [
        Regulator(v, beta, 0.1, n, x).solve() for v, n, x in zip(values, noise, start, strict=True)
    ]
    together = Regulator(values, beta, 0.1, noise, start).solve()
    turned = Regulator(
        CURVATURE, beta, 0.1, ROTATION * noise @ ROTATION.T, ROTATION @ start
    ).solve()
    total = np.sum([outcome for _, outcome in apart], axis=0)
    close(together[1], total)
    close(turned[1], total)
    for i, (gains, _) in enumerate(apart):
        np.testing.assert_allclose(together[0][:, i, [i, 3 + i]], gains[:, 0], rtol=1e-10)
    both = np.kron(np.eye(2), ROTATION)
    np.testing.assert_allclose(turned[0], ROTATION @ together[0] @ both.T, rtol=1e-8, atol=1e-10)
    assert Regulator(values, beta, 0.1).noise == pytest.approx(np.eye(3))
    assert Regulator(values, beta, 0.1).terminal == pytest.approx(np.eye(3))
    assert not Regulator(values, beta, 0.1).start.any()


@pytest.mark.parametrize(
    ("a", "penalty", "within"),
    [(0.01, 1.0, 1e-3), (0.1, 1.0, 1e-3), (0.1, 0.01, 1e-2), (0.5, 1.0, 2e-3)],
)
def test_continuous_gains_are_nearly_the_best_of_discrete_steps(a, penalty, within):
    """T = 100 steps; S_k is (k+1) times the mean so far."""
    t = np.arange(100.0)[:, None]
    problem = Regulator(a, mean_of_all(100), penalty, start=1.0)
    k = optimal_gain(t, 100.0, a, penalty)
    found = problem.outcome(problem.feedback(k * influence(t, 100.0, a), k * (t + 1)))
    _, best = problem.solve()
    assert best.cost < found.cost < (1 + within) * best.cost


def test_the_price_of_not_knowing_the_minimum():
    """The running mean in the minimum's place loses nearly all that the optimum gains.

    At a = 0.1, T = 100, ρ = 0.01, s² = 1 from the minimum; and from a distance of 10 the pull costs
    more than doing nothing.
    """
    t = np.arange(100.0)[:, None]
    pull = certainty_equivalent_gain(t, 100.0, 0.1, 0.01)
    ratios = []
    for start in (0.0, 10.0):
        problem = Regulator(0.1, mean_of_all(100), 0.01, start=start)
        best = problem.solve()[1].cost
        ratios.append(problem.outcome(problem.feedback(pull, -pull)).cost / best)
        ratios.append(problem.outcome(problem.feedback(0.0, 0.0)).cost / best)
    # of cost: toward the mean and without control, from 0 and from 10
    assert ratios == pytest.approx([18.133, 18.234, 51.38, 31.57], rel=1e-3)


GOOD = {"curvature": [0.1, 0.2], "beta": [0.5, 0.5], "penalty": 1.0}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"penalty": 0.0}, "penalty must be in (0, inf), got 0"),
        ({"penalty": -2.0}, "penalty must be in (0, inf), got -2, 2 below"),
        ({"curvature": [0.1, 2.5]}, "curvature must be in (0, 2), got 2.5, 0.5 above"),
        ({"curvature": [0.1, 2.0]}, "curvature must be in (0, 2), got 2, which is the end itself"),
        ({"curvature": [0.0, 1.0]}, "curvature must be in (0, 2), got 0, which is the end itself"),
        ({"curvature": [[1.0, 1.5], [1.5, 1.0]]}, "curvature must be in (0, 2), got "),
        (
            {"curvature": [[0.2, 0.1], [0.3, 0.2]]},
            "curvature must be symmetric; it differs from its transpose by 0.2",
        ),
        (
            {"curvature": [[0.2, 0.1]]},
            "curvature must be a vector or a square matrix, got the shape (1, 2)",
        ),
        ({"curvature": [0.1, math.nan]}, "curvature must be finite"),
        ({"beta": [0.5, math.inf]}, "beta must be finite numbers"),
        ({"beta": [[0.5, 0.5]]}, "beta must be one or more in a row, got the shape (1, 2)"),
        ({"beta": []}, "beta must be one or more in a row, got the shape (0,)"),
        ({"beta": 0.5}, "beta must be one or more in a row, got the shape ()"),
        ({"noise": -1.0}, "noise must "),
        ({"noise": -1.0}, "must be positive semidefinite; its least eigenvalue is -1"),
        (
            {"noise": [[1.0, 2.0], [2.0, 1.0]]},
            "must be positive semidefinite; its least eigenvalue is -1",
        ),
        ({"noise": [[1.0, 2.0], [0.0, 1.0]]}, "noise must be symmetric; it differs from its "),
        ({"noise": np.eye(3)}, "noise must be of the shape (2, 2), got (3, 3)"),
        ({"noise": math.inf}, "noise must be finite"),
        (
            {"terminal": [[0.0, 1.0], [1.0, 0.0]]},
            "must be positive semidefinite; its least eigenvalue is -1",
        ),
        ({"terminal": [[1.0, 0.5], [0.0, 1.0]]}, "terminal must be symmetric; it differs from "),
        ({"terminal": [1.0, 1.0]}, "terminal must be of the shape (2, 2), got (2,)"),
        ({"start": [1.0, math.nan]}, "start must be finite numbers"),
        ({"start": [1.0, 2.0, 3.0]}, "shape"),
        ({"noise": [1.0, 2.0, 3.0]}, "shape"),
    ],
)
def test_a_problem_says_what_is_wrong(arguments, says):
    Regulator(**GOOD)
    with pytest.raises(ValueError, match=re.escape(says)):
        Regulator(**GOOD | arguments)


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ([0.5, 0.4], "weights must add up to 1, they are -0.1 off"),
        ([0.75, 0.75], "weights must add up to 1, they are +0.5 off"),
        ([0.5, -0.5, 1.0], "the first 2 weights must not add up to 0"),
        ([1.0, -1.0, -1.0, 2.0], "the first 2 weights must not add up to 0"),
        ([0.1, 0.2, -0.3, 1.0], "the first 3 weights must not add up to 0"),  # but for rounding
        ([1.0], "weights must be two or more in a row, got the shape (1,)"),
        ([[0.5, 0.5]], "weights must be two or more in a row, got the shape (1, 2)"),
        ([0.5, math.nan], "weights must be finite numbers"),
    ],
)
def test_beta_of_weights_say_what_is_wrong(weights, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        beta_of_weights(weights)
