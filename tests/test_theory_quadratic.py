"""The stochastic quadratic and the twin: closed forms = Lyapunov = the recursion written out again.

The recursions below move weights, not covariances: `propagate` reads off what a step does to each
unit vector, so that it shares no algebra with the package.
"""

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch.nn import Parameter

pytest.importorskip("scipy")

from paceline import EMA, PACE, PowerEMA, Pullback, Uniform
from paceline.theory.quadratic import (
    Lookahead,
    Moments,
    Pull,
    Quadratic,
    ScheduleFree,
    better_gain,
    half_life,
    largest_gain,
    limit,
    limiting_error,
    lookahead_error,
    moments,
    radius,
    require,
    spectral_radius,
    transition,
)
from paceline.theory.twin import twin_epsilon, twin_modes, twin_rate, twin_ratio

# ---- the methods once more, as they act on weights ---------------------------------------------
# Each is a function of the step, the state and the gradient's function; the rows of a state are
# the live weights, the returned ones, and what is no place, which a moving minimum leaves alone.


def at(value, k):
    return np.asarray(value(k) if callable(value) else value, dtype=float)


def pull(lr, beta=1.0, gain=0.0, momentum=0.0):
    def step(k, state, gradient):
        theta, average, m = state
        m = momentum * m + (1 - momentum) * gradient(theta)
        new = theta - at(lr, k) * m + at(gain, k) * (average - theta)
        return np.array([new, average + at(beta, k) * (new - average), m])

    return step


def schedule_free(lr, mu=0.9):
    def step(k, state, gradient):
        z, x, rest = state
        z = z - at(lr, k) * gradient((1 - mu) * z + mu * x)
        return np.array([z, x + (z - x) / k, 0 * rest])

    return step


def lookahead(lr, every=5, alpha=0.5):
    def step(k, state, gradient):
        fast, slow, rest = state
        fast = fast - at(lr, k) * gradient(fast)
        if k % every == 0:
            slow = fast = slow + alpha * (fast - slow)
        return np.array([fast, slow, 0 * rest])

    return step


def linear_maps(rule, k, hessian):
    """What one step does to the state, to the gradient's noise and to the minimum's move."""
    d = len(hessian)
    zero, places = np.zeros((3, d)), np.array([[1.0], [1.0], [0.0]])
    a = [rule(k, x.reshape(3, d), lambda w: hessian @ w).ravel() for x in np.eye(3 * d)]
    b = [rule(k, zero, lambda w, x=x: hessian @ w + x).ravel() for x in np.eye(d)]
    return np.array(a).T, np.array(b).T, np.array([(places * x).ravel() for x in np.eye(d)]).T


def propagate(rule, hessian, noise, drift, start, steps):
    """Mean (2, d) and covariance (2, d, 2, d) of live and returned weights, from the start on."""
    d = len(hessian)
    mean, cov = np.concatenate([start, start, np.zeros(d)]), np.zeros((3 * d, 3 * d))
    for k in range(steps + 1):
        if k:
            a, b, places = linear_maps(rule, k, hessian)
            mean = a @ mean
            cov = a @ cov @ a.T + b @ noise @ b.T + places @ drift @ places.T
        yield mean.reshape(3, d)[:2], cov.reshape(3, d, 3, d)[:2, :, :2]


def live_and_returned(found, problem):
    """The same two of the package's moments."""
    ends, d = [0, -1], problem.size
    if problem.general:
        full = found.cov.reshape(-1, d, len(found.cov) // d, d)
        return found.mean.reshape(-1, d)[ends], full[ends][:, :, ends]
    cov = found.cov[np.ix_(ends, ends)]
    mean = np.broadcast_to(found.mean[ends], (2, d))
    return mean, np.einsum("ijn,nm->injm", np.broadcast_to(cov, (2, 2, d)), np.eye(d))


def after(method, problem, steps):
    return next(itertools.islice(moments(method, problem), steps, None))


RATES, GAINS, WEIGHTS = np.array([[0.1, 0.3, 0.2], [0.2, 0.5, 0.9], [0.3, 0.05, 0.6]])
SHARES = np.array([0.2, 0.5, 1.0])


def lowered(k):
    return 0.3 * k**-0.5


def lowered_each(k):
    return RATES * k**-0.5


def rising(k):
    return GAINS * (1 - 0.8**k)


BOTH = {  # the package's, and ours
    "SGD": (Pull(0.3), pull(0.3)),
    "EMA": (Pull(0.3, 0.2), pull(0.3, 0.2)),
    "pull": (Pull(0.3, 0.2, 0.4), pull(0.3, 0.2, 0.4)),
    "all the way": (Pull(0.3, 0.2, 1.0), pull(0.3, 0.2, 1.0)),
    "gains": (Pull(0.3, 0.2, GAINS), pull(0.3, 0.2, GAINS)),
    "rates": (Pull(RATES, 0.2, 0.4), pull(RATES, 0.2, 0.4)),
    "weights": (Pull(0.3, WEIGHTS, 0.4), pull(0.3, WEIGHTS, 0.4)),
    "uniform": (Pull(0.3, Uniform().weight), pull(0.3, lambda k: 1 / k)),
    "power": (
        Pull(0.3, PowerEMA(0.7).weight, 0.4),
        pull(0.3, lambda k: max((1 + k) ** -0.7, 1e-4), 0.4),
    ),
    "all change": (
        Pull(lowered_each, Uniform(2).weight, rising),
        pull(lowered_each, lambda k: 1 / max(1, k - 2), rising),
    ),
    "momentum": (Pull(0.3, 0.2, 0.4, 0.8), pull(0.3, 0.2, 0.4, 0.8)),
    "momentum, rates and gains": (
        Pull(RATES, 0.2, GAINS, 0.5),
        pull(RATES, 0.2, GAINS, 0.5),
    ),
    "schedule-free": (ScheduleFree(0.3), schedule_free(0.3)),
    "schedule-free, rates change": (
        ScheduleFree(lowered_each, 0.5),
        schedule_free(lowered_each, 0.5),
    ),
    "schedule-free, nearness": (ScheduleFree(0.3, SHARES / 2), schedule_free(0.3, SHARES / 2)),
    "lookahead": (Lookahead(0.3), lookahead(0.3)),
    "lookahead, rates": (Lookahead(RATES, 3, 0.7), lookahead(RATES, 3, 0.7)),
    "lookahead, each step": (Lookahead(lowered, 1, 0.7), lookahead(lowered, 1, 0.7)),
    "lookahead, shares": (Lookahead(0.3, 3, SHARES), lookahead(0.3, 3, SHARES)),
}
START = np.array([1.0, -2.0, 0.5])
HESSIAN = np.array([[2.0, 0.3, -0.4], [0.3, 1.0, 0.2], [-0.4, 0.2, 0.7]])
NOISE = np.array([[1.0, 0.4, 0.0], [0.4, 2.0, -0.5], [0.0, -0.5, 0.5]])
DRIFT = np.array([[0.02, 0.01, 0.0], [0.01, 0.01, 0.0], [0.0, 0.0, 0.0]])  # one direction stands
PROBLEMS = {
    "coordinates": Quadratic([2.0, 1.0, 0.3], [1.0, 2.0, 0.0], [0.0, 0.1, 0.01], START),
    "matrix": Quadratic(HESSIAN, NOISE, DRIFT, START),
    "matrix, numbers": Quadratic(HESSIAN, 0.5, 0.1, -2.0),
}
SAME = {  # the same problems written out
    "coordinates": (
        np.diag([2.0, 1.0, 0.3]),
        np.diag([1.0, 2.0, 0.0]),
        np.diag([0.0, 0.1, 0.01]),
        START,
    ),
    "matrix": (HESSIAN, NOISE, DRIFT, START),
    "matrix, numbers": (HESSIAN, 0.5 * np.eye(3), 0.1 * np.eye(3), np.full(3, -2.0)),
}


@pytest.mark.parametrize("drifts", [False, True], ids=["still", "moving"])
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("method", BOTH)
def test_moments_are_those_of_the_recursion(method, problem, drifts):
    ours, rule = BOTH[method]
    quadratic, (hessian, noise, drift, start) = PROBLEMS[problem], SAME[problem]
    if method in ("weights", "lookahead, shares") and quadratic.general:
        with pytest.raises(ValueError, match="must be one number for a curvature that is a matrix"):
            next(moments(ours, quadratic))
        return
    if not drifts:
        quadratic = Quadratic(quadratic.curvature, quadratic.noise, start=quadratic.start)
    written = propagate(rule, hessian, noise, drift * drifts, start, steps=12)
    for k, (expected, found) in enumerate(zip(written, moments(ours, quadratic), strict=False)):
        for x, y in zip(live_and_returned(found, quadratic), expected, strict=True):
            # Some thousand float64 operations on numbers of order 1.
            np.testing.assert_allclose(x, y, rtol=1e-11, atol=1e-12, err_msg=f"after step {k}")


def test_moments_begin_at_the_start_without_variance():
    for problem in PROBLEMS.values():
        for method in (Pull(0.3, 0.2, 0.4), Pull(0.3, 0.2, 0.4, 0.8), Lookahead(0.3)):
            mean, cov = live_and_returned(after(method, problem, 0), problem)
            np.testing.assert_array_equal(mean, np.broadcast_to(problem.start, (2, 3)))
            assert not cov.any()
    m = after(Pull(0.3, 0.2, 0.4, 0.8), PROBLEMS["coordinates"], 0)
    assert m.mean.shape == (3, 3)
    assert not m.mean[1].any()  # momentum


def test_second_moments_are_of_the_block_that_is_asked_for():
    for name in ("coordinates", "matrix"):
        problem = PROBLEMS[name]
        found = after(Pull(0.3, 0.2, 0.4, 0.8), problem, 7)
        mean, cov = live_and_returned(found, problem)
        for block, which in ((0, 0), (-3, 0), (2, 1), (-1, 1)):
            full = np.outer(mean[which], mean[which]) + cov[which, :, which]
            expected = full if problem.general else np.diag(full)
            np.testing.assert_allclose(found.second(problem, block), expected, rtol=1e-13)
        np.testing.assert_array_equal(found.second(problem), found.second(problem, -1))


def test_the_mean_of_all_iterates_is_the_mean_of_all_iterates():
    # θ_k = (1-a)^k·θ_0 + Σ_j (1-a)^(k-j)·ξ_j, summed over k in closed form.
    a, steps, start = np.array([0.05, 0.4, 1.3]), 37, 3.0
    stay = (1 - a)[:, None]
    ages = np.arange(steps)  # of a step's noise, at the end
    sums = (1 - stay ** (ages + 1)) / (1 - stay)  # of (1-a)^i over i = 0 ... age
    mean = start * (stay * (1 - stay**steps) / (1 - stay))[:, 0] / steps
    found = after(Pull(1.0, Uniform().weight), Quadratic(a, noise=2.0, start=start), steps)
    np.testing.assert_allclose(found.mean[-1], mean, rtol=1e-12)
    np.testing.assert_allclose(found.cov[-1, -1], 2 * (sums**2).sum(1) / steps**2, rtol=1e-12)


def test_a_problem_of_coordinates_is_one_with_a_diagonal_matrix():
    each = PROBLEMS["coordinates"]
    matrix = Quadratic(*(np.diag(x) for x in (each.curvature, each.noise, each.drift)), START)
    for method in (Pull(RATES, 0.2, GAINS), Pull(0.3, 0.2, GAINS, 0.5), Lookahead(RATES, 3)):
        for x, y in (
            (limit(method, each), limit(method, matrix)),
            (after(method, each, 6), after(method, matrix, 6)),
        ):
            for block in (0, -1):
                np.testing.assert_allclose(
                    np.diag(y.second(matrix, block)), x.second(each, block), rtol=1e-9, atol=1e-15
                )
            np.testing.assert_allclose(
                matrix.loss(y.second(matrix)), each.loss(x.second(each)), rtol=1e-9
            )
        np.testing.assert_allclose(radius(method, matrix), radius(method, each).max(), rtol=1e-12)


def test_turning_the_coordinates_changes_nothing_for_a_scalar_gain():
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    q = PROBLEMS["matrix"]
    turned = Quadratic(
        *((x + x.T) / 2 for x in (turn @ y @ turn.T for y in (q.curvature, q.noise, q.drift))),
        turn @ START,
    )
    for method in (
        Pull(0.3, 0.2, 0.4),
        Pull(0.3, 0.2, 0.4, 0.8),
        ScheduleFree(0.3),
        Lookahead(0.3),
    ):
        x, y = after(method, q, 9).second(q), after(method, turned, 9).second(turned)
        np.testing.assert_allclose(y, turn @ x @ turn.T, atol=1e-13)
        np.testing.assert_allclose(turned.loss(y), q.loss(x), rtol=1e-12)
    # And does for gains of coordinates: what the test would miss if it did nothing.
    x, y = (after(Pull(0.3, 0.2, GAINS), p, 9).second(p) for p in (q, turned))
    assert abs(turned.loss(y) / q.loss(x) - 1) > 1e-3


def test_many_settings_at_once_are_each_on_its_own():
    problem, rates, gains = PROBLEMS["coordinates"], np.array([0.1, 0.3]), np.array([0.2, 0.9])
    both = Pull(rates[:, None], 0.2, gains[:, None])
    together, end, rho = after(both, problem, 8), limit(both, problem), radius(both, problem)
    assert together.mean.shape == (2, 2, 3)
    for i in range(2):
        alone = Pull(rates[i], 0.2, gains[i])
        x, y = after(alone, problem, 8).second(problem), limit(alone, problem).second(problem)
        np.testing.assert_allclose(together.second(problem)[i], x, rtol=1e-13)
        np.testing.assert_allclose(end.second(problem)[i], y, rtol=1e-10)
        np.testing.assert_allclose(rho[i], radius(alone, problem), rtol=1e-13)
        np.testing.assert_allclose(problem.loss(together.second(problem))[i], problem.loss(x))


def test_loss_is_half_the_expected_form():
    rng = np.random.default_rng(0)
    samples = rng.normal(size=(500, 3)) + START
    moment = samples.T @ samples / 500
    form = np.mean([x @ HESSIAN @ x for x in samples]) / 2
    np.testing.assert_allclose(PROBLEMS["matrix"].loss(moment), form, rtol=1e-13)
    each = PROBLEMS["coordinates"]
    form = (samples**2 @ np.array([2.0, 1.0, 0.3])).mean() / 2
    np.testing.assert_allclose(each.loss(np.diag(moment)), form, rtol=1e-13)
    assert each.loss(np.ones((4, 5, 3))).shape == (4, 5)


# ---- limits -------------------------------------------------------------------------------------


def test_the_numbers_of_the_method():
    found = limiting_error(0.05, 0.02, [0, 0.1, 0.5, 0.9])
    np.testing.assert_allclose(found, [2.899, 1.198, 0.358, 0.210], atol=5e-4)  # as printed
    e = np.array([1e-1, 1e-2, 1e-3, 1e-4])
    ratio = limiting_error(e, e, 0) / limiting_error(e, e, 0.9)
    np.testing.assert_allclose(ratio, [5.25, 45.8, 451, 4501], rtol=1.2e-3)
    np.testing.assert_allclose(ratio[2:], (e + e + 0.9)[2:] / (2 * e)[2:], rtol=1e-2)


def grid(least=0.02, most=1.95, share=(0, 0.05, 0.3, 0.7, 0.95)):
    """a, β and c over the stable region, as shares of the bound, which is written out here."""
    a, beta, part = np.meshgrid(
        np.geomspace(least, most, 9), [0.02, 0.1, 0.3, 0.6, 0.9, 0.99], share, indexing="ij"
    )
    return a, beta, part * (2 - a) * (2 - beta) / (2 * (1 - beta))


def impulses(a, beta, c, steps, live, average):
    """Σ θ̂² of what an impulse leaves, over the steps."""
    x, y = np.broadcast_arrays(live * np.ones_like(a), average * np.ones_like(a))
    total = 0.0
    for _ in range(steps):
        total = total + y**2
        x = (1 - a - c) * x + c * y
        y = (1 - beta) * y + beta * x if beta is not None else x
    return total


def test_limiting_error_is_the_sum_over_impulses():
    a, beta, c = grid()
    slow = spectral_radius(a, beta, c) < 0.985  # so that 2500 steps leave 1e-16
    assert slow.mean() > 0.6
    a, beta, c = a[slow], beta[slow], c[slow]
    noise = impulses(a, beta, c, 2500, 1.0, beta)
    drift = impulses(a, beta, c, 2500, 1.0, 1.0)
    np.testing.assert_allclose(limiting_error(a, beta, c), noise, rtol=1e-10)
    np.testing.assert_allclose(limiting_error(a, beta, c, 0, 1), drift, rtol=1e-10)
    np.testing.assert_allclose(
        limiting_error(a, beta, c, 0.3, 2.0), 0.3 * noise + 2 * drift, rtol=1e-10
    )


def test_limiting_error_is_exact_for_all_sizes_of_its_arguments():
    # In rational arithmetic: the formula of the docstring, and without drift the other known form.
    sizes = [1e-12, 1e-8, 1e-4, 0.05, 0.5, 1.0, 1.5]
    for a, beta, c in itertools.product(sizes, [1e-12, 1e-8, 1e-4, 0.5, 1.0], [0, *sizes[:-2]]):
        if c >= 0.9 * (2 - a) * (2 - beta) / (2 * (1 - beta) or 1e-9):  # worse conditioned
            continue
        x, b, g, s, q = map(Fraction, (a, beta, c, 0.7, 0.3))
        phi1, phi2 = 2 - x - b - g * (1 - b), -(1 - b) * (1 - x - g)
        below = (1 + phi2) * ((1 - phi2) ** 2 - phi1**2)
        noise = b**2 * s * (1 - phi2) / below
        drift = q * ((1 + phi2**2) * (1 - phi2) + 2 * phi1 * phi2) / below
        other = b * s * (2 - x - b - g + b * x + b * g)
        other /= (x * (x + b + g - b * x - b * g)) * (4 - 2 * x - 2 * b - 2 * g + b * x + 2 * b * g)
        assert other == noise
        for found, exact in (
            (limiting_error(a, beta, c, 0.7), noise),
            (limiting_error(a, beta, c, 0, 0.3), drift),
            (limiting_error(a, beta, c, 0.7, 0.3), noise + drift),
        ):
            assert abs(float(found) / float(exact) - 1) < 2e-14, (a, beta, c)  # some 50 roundings


@pytest.mark.parametrize(
    ("method", "closed"),
    [
        (Pull(0.4), lambda a, s, q: limiting_error(a, 1, 0, s, q)),
        (Pull(0.4, 0.15), lambda a, s, q: limiting_error(a, 0.15, 0, s, q)),
        (Pull(0.4, 0.15, 0.5), lambda a, s, q: limiting_error(a, 0.15, 0.5, s, q)),
        (Pull(0.4, WEIGHTS, GAINS), lambda a, s, q: limiting_error(a, WEIGHTS, GAINS, s, q)),
        (Lookahead(0.4, 1, 0.5), lambda a, s, q: lookahead_error(a, 1, 0.5, s, q)),
        (Lookahead(0.4, 5, 0.5), lambda a, s, q: lookahead_error(a, 5, 0.5, s, q)),
        (Lookahead(0.4, 4, SHARES), lambda a, s, q: lookahead_error(a, 4, SHARES, s, q)),
    ],
    ids=["SGD", "EMA", "PACE", "PACE, each", "Lookahead 1", "Lookahead 5", "Lookahead, each"],
)
def test_the_closed_form_is_the_limit_and_where_moments_go(method, closed):
    problem = PROBLEMS["coordinates"]
    rate, steps = 0.4, 1500  # all have forgotten the start by then, to 1e-15
    exact = closed(rate * problem.curvature, rate**2 * problem.noise, problem.drift)
    np.testing.assert_allclose(limit(method, problem).second(problem), exact, rtol=1e-11)
    np.testing.assert_allclose(after(method, problem, steps).second(problem), exact, rtol=1e-11)


@pytest.mark.parametrize(
    "method",
    [
        Pull(RATES, 0.2, GAINS),
        Pull(RATES, 0.2, GAINS, 0.6),
        Lookahead(RATES, 4, 0.5),
    ],
    ids=["pull", "momentum", "lookahead"],
)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_limit_is_where_moments_go(method, problem):
    q = PROBLEMS[problem]
    end, late = limit(method, q), after(method, q, 1200)
    assert not end.mean.any()
    assert end.mean.shape == late.mean.shape
    np.testing.assert_allclose(end.cov, late.cov, rtol=1e-9, atol=1e-12)


def test_lookahead_error_is_the_sum_over_cycles():
    a, every, alpha = np.meshgrid([0.05, 0.5, 1.0, 1.7], [1, 2, 5, 8], [0.1, 0.5, 1.0])
    cycles = 4000
    noise = drift = 0.0
    for j in range(8):  # an impulse j steps before a synchronisation
        inside = j < every
        cycle = (1 - alpha + alpha * (1 - a) ** every) ** 2
        repeats = (1 - cycle**cycles) / (1 - cycle)
        noise = noise + inside * (alpha * (1 - a) ** j) ** 2 * repeats
        drift = drift + inside * (1 - alpha + alpha * (1 - a) ** j) ** 2 * repeats
    np.testing.assert_allclose(lookahead_error(a, every, alpha), noise, rtol=1e-12)
    np.testing.assert_allclose(lookahead_error(a, every, alpha, 0, 1), drift, rtol=1e-12)
    # With α = 1 the slow weights are SGD's.
    sgd = limiting_error(a, 1, 0, 0.3, 0.2)
    np.testing.assert_allclose(lookahead_error(a, every, 1.0, 0.3, 0.2), sgd, rtol=1e-12)


# ---- stability and forgetting -------------------------------------------------------------------


def test_spectral_radius_is_that_of_the_matrix():
    a, beta, c = grid(share=(0, 0.1, 0.9, 0.999, 1.001, 3))
    rows = [[1 - a - c, c], [beta * (1 - a - c), 1 - beta + beta * c]]
    matrix = np.moveaxis(np.array(rows), (0, 1), (-2, -1))
    # Where both eigenvalues are the same, NumPy's have the square root of float64's accuracy.
    expected = abs(np.linalg.eigvals(matrix)).max(-1)
    np.testing.assert_allclose(spectral_radius(a, beta, c), expected, rtol=3e-8)
    assert np.isclose(spectral_radius(a, beta, c), expected, rtol=1e-12).mean() > 0.9
    problem = Quadratic(a.ravel())
    ours = radius(Pull(1.0, beta.ravel(), c.ravel()), problem)
    np.testing.assert_allclose(ours.reshape(a.shape), expected, rtol=3e-8)


def test_spectral_radius_is_exact_for_slow_modes():
    # Of the roots u = 1 - z of u² - (a+β+s)·u + aβ the smaller one without cancellation; equal
    # roots, at a = β and c = 0, are where a careless square root loses half of the digits.
    sizes = np.geomspace(1e-7, 0.5, 18)
    a, beta, c = np.meshgrid(sizes, sizes, [0, *sizes], indexing="ij")
    s = c * (1 - beta)
    apart = np.sqrt((a - beta) ** 2 + 2 * s * (a + beta) + s**2)
    slow = 2 * a * beta / (a + beta + s + apart)
    found = spectral_radius(a, beta, c)
    assert (found < 1).all()
    np.testing.assert_allclose(found, 1 - slow, rtol=1e-15)


@pytest.mark.parametrize(
    ("method", "rule"),
    [BOTH[name] for name in ("gains", "momentum", "momentum, rates and gains", "lookahead, rates")],
    ids=["gains", "momentum", "momentum, rates and gains", "lookahead"],
)
def test_radius_is_that_of_the_recursion(method, rule):
    for name in ("coordinates", "matrix"):
        hessian, *_ = SAME[name]
        cycle = np.eye(9)
        for k in range(1, method.period + 1):
            cycle = linear_maps(rule, k, hessian)[0] @ cycle
        expected = abs(np.linalg.eigvals(cycle)).max() ** (1 / method.period)
        found = radius(method, PROBLEMS[name])
        assert found.shape == (() if name == "matrix" else (3,))
        np.testing.assert_allclose(found.max(), expected, rtol=1e-7)


def test_largest_gain_is_where_stability_ends():
    a, beta, _ = grid(share=(1,))
    bound = largest_gain(a, beta)
    tiny = 1e-9 * bound
    assert (spectral_radius(a, beta, bound - tiny) < 1).all()
    assert (spectral_radius(a, beta, bound + tiny) >= 1).all()
    # At the bound an eigenvalue is -1: z² = φ1·z + φ2 there.
    phi1, phi2 = 2 - a - beta - bound * (1 - beta), -(1 - beta) * (1 - a - bound)
    np.testing.assert_allclose(1 + phi1 - phi2, 0, atol=1e-12 * bound.max())
    # Below it every gain is stable, not only those near it.
    a, beta, c = grid(least=1e-3, most=1.999, share=np.linspace(0, 0.999, 40))
    assert (spectral_radius(a, beta, c) < 1).all()
    assert np.isposinf(largest_gain([0.5, 1.5], 1.0)).all()
    assert spectral_radius(0.5, 1.0, 1e6) == 0.5  # the pull has nothing to pull to
    assert (spectral_radius([2.0, 2.5], 0.1, [[0.0], [0.5]]) >= 1).all()  # and none helps there


def test_the_start_is_forgotten_with_the_spectral_radius():
    a, beta, c = (x.ravel() for x in grid(share=(0, 0.05, 0.3, 0.7)))
    rho = spectral_radius(a, beta, c)
    other = (1 - beta) * abs(1 - a - c) / rho  # the roots' product is -φ2
    apart = (other < 0.8 * rho) & (rho > 0.3)
    a, beta, c, rho = a[apart], beta[apart], c[apart], rho[apart]
    assert len(a) > 80
    # After 120 steps the other root has 0.8^120 = 2e-12 of the first's share.
    means = itertools.islice(moments(Pull(1.0, beta, c), Quadratic(a)), 120, 122)
    before, now = (abs(m.mean[-1]) for m in means)
    np.testing.assert_allclose(now / before, rho, rtol=1e-9)
    half = half_life(rho)
    np.testing.assert_allclose(rho**half, 0.5, rtol=1e-11)


def test_half_life():
    np.testing.assert_allclose(half_life([0.5, 0.25, 2**-0.01]), [1, 0.5, 100], rtol=1e-13)
    assert half_life(0.0) == 0  # in no time, and without a warning


# ---- where a pull helps ------------------------------------------------------------------------


def test_better_gain_is_where_the_pull_stops_helping():
    a, beta, _ = grid(most=1.99, share=(1,))
    c, bound, plain = better_gain(a, beta), largest_gain(a, beta), limiting_error(a, beta, 0)
    helps = c > 1e-3
    assert helps.any()
    assert (~helps).any()
    below, above = (np.where(helps, c * x, 0) for x in (1, 0.99))
    np.testing.assert_allclose(limiting_error(a, beta, below)[helps], plain[helps], rtol=1e-9)
    assert (limiting_error(a, beta, above) < plain)[helps].all()
    for share in np.linspace(0.01, 0.99, 25):
        inside = np.where(helps, c * share, 0)
        assert (limiting_error(a, beta, inside) < plain)[helps].all()
        beyond = np.maximum(c, 0) + (bound - np.maximum(c, 0)) * share
        assert (limiting_error(a, beta, beyond) > plain).all()
    w = (1 - a) * (1 - beta)
    gap = a * beta * (1 - w) / (2 * (1 + w) * (1 - beta))
    np.testing.assert_allclose(bound - c, gap, rtol=1e-9, atol=1e-12 * bound.max())


def test_a_clipped_gain_never_harms_up_to_a_of_1():
    a, beta, c = np.meshgrid(
        np.linspace(0, 1, 61)[1:], np.linspace(0, 1, 41)[1:-1], np.linspace(0, 1, 41)[1:]
    )
    assert better_gain(a, beta).min() >= 1 - 1e-14  # roundings, at a = 1
    assert better_gain(1.0, 1e-9) < 1 + 1e-8  # no larger number would do
    assert (limiting_error(a, beta, c) <= limiting_error(a, beta, 0) * (1 + 1e-13)).all()
    assert better_gain(1.9, 0.9) < 0  # where a is larger, no pull may help


# ---- the twin -----------------------------------------------------------------------------------


def test_twin_rate():
    beta, c = np.meshgrid([0.01, 0.3, 1.0], [0, 0.2, 1.0, 3.0])
    np.testing.assert_allclose(twin_rate(beta, c), beta / (beta + c * (1 - beta)), rtol=1e-15)
    np.testing.assert_allclose(twin_rate(beta, c, simple=True), beta / (beta + c), rtol=1e-15)
    np.testing.assert_allclose(twin_rate(beta, 1.0), beta, rtol=1e-15)
    assert (twin_rate(beta, 1.0, simple=True) < 0.999 * beta).all()
    np.testing.assert_allclose(  # "the same for small β"
        twin_rate(1e-6, c), twin_rate(1e-6, c, simple=True), rtol=2e-6
    )


@pytest.mark.parametrize("simple", [False, True])
def test_twin_ratio_is_that_of_the_limits(simple):
    a, beta, c = grid(least=1e-4, most=1.99, share=(0, 1e-3, 0.1, 0.5, 0.9, 0.99))
    r = beta / (beta + c * (1 if simple else 1 - beta))
    expected = limiting_error(a, beta, c) / limiting_error(r * a, beta, 0, r**2)
    found = twin_ratio(a, beta, c, simple=simple)
    np.testing.assert_allclose(found, expected, rtol=1e-11)  # 99 % of the bound loses two digits
    assert (found[c > 0] > 1).all()
    np.testing.assert_allclose(found[c == 0], 1, rtol=1e-14)


def test_twin_ratio_in_numbers():
    assert round(float(twin_ratio(0.01, 0.1, 0.3, simple=True)), 2) == 1.08
    # At β = 1 the pull has nothing to pull to, and is its twin; the simple rate is another.
    assert twin_ratio(0.5, 1.0, 0.3) == 1
    np.testing.assert_allclose(
        twin_ratio(0.5, 1.0, 0.3, simple=True),
        limiting_error(0.5, 1, 0) / limiting_error(0.5 / 1.3, 1, 0, 1 / 1.3**2),
    )


def test_twin_ratio_to_leading_order():
    scale = np.geomspace(1e-2, 1e-5, 4)[:, None, None]
    a, beta, c = scale * np.array([0.5, 1, 4])[:, None], scale, np.array([0.1, 0.5, 0.9])
    r, w, s = beta / (beta + c * (1 - beta)), (1 - a) * (1 - beta), c * (1 - beta)
    first = a * beta / 2 * (1 / (1 + w - s) - r / 2)
    more = beta * c / (a + beta + c)
    close = np.broadcast_to(20 * scale, (4, 3, 3))  # what is left out is of order e more
    assert (abs((twin_ratio(a, beta, c) - 1) / first - 1)[:2] < close[:2]).all()  # later: roundings
    simple = twin_ratio(a, beta, c, simple=True) - 1
    assert (abs(simple / (first + more) - 1) < close).all()
    assert (abs(simple / first - 1) > 1).all()  # the part that is more is not small


def transfer(rule, hessian, z):
    """Of a gradient's noise to the average: C·(zI - A)⁻¹·B."""
    d = len(hessian)
    a, b, _ = linear_maps(rule, 1, hessian)
    return np.linalg.solve(z * np.eye(3 * d) - a, b)[d : 2 * d]


@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_the_twin_differs_in_the_square_alone(momentum):
    # β·z/G = R⁻¹·u²/F - (A + (β+S)/F)·u + βA; the z is a step's shift, and the same in both.
    lr, beta, eye = 0.3, 0.2, np.eye(3)
    for gain in (0.4, GAINS):
        s = (1 - beta) * np.diag(np.broadcast_to(gain, 3))
        rates = beta / (beta + np.diag(s))  # R
        a = lr * HESSIAN
        for z in (1.5, 0.9 + 0.3j, -0.4 + 1.1j, np.exp(0.01j)):
            u, filter_ = 1 - z, (1 - momentum) * z / (z - momentum)
            same = -u * (a + (beta * eye + s) / filter_) + beta * a
            for rule, square in (
                (pull(lr, beta, gain, momentum), eye),
                (pull(lr * rates, beta, 0.0, momentum), np.diag(1 / rates)),
            ):
                # The noise enters with the gradient, and so passes the filter and the rate.
                g = transfer(rule, HESSIAN, z) / -lr
                np.testing.assert_allclose(
                    beta * z * np.linalg.inv(g), square * u**2 / filter_ + same, atol=1e-10
                )


def test_the_twin_differs_in_the_square_alone_for_one_coordinate():
    a, beta, c, z = 0.3, 0.2, 0.4, 0.9 + 0.3j
    r, u, s = beta / (beta + c * (1 - beta)), 1 - z, c * (1 - beta)
    for rule, square in ((pull(a, beta, c), 1.0), (pull(r * a, beta), 1 / r)):
        g = transfer(rule, np.eye(1), z)[0, 0] / -a
        np.testing.assert_allclose(
            beta * z / g, square * u**2 - (a + beta + s) * u + a * beta, rtol=1e-12
        )


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("gain", [0.4, GAINS], ids=["scalar", "gains"])
def test_the_twin_has_the_error_of_the_pull_for_any_noise(gain, momentum):
    gaps = []
    for e in (1e-1, 1e-2, 1e-3):
        problem, beta = Quadratic(e * HESSIAN, NOISE), 0.5 * e
        rates = np.broadcast_to(twin_rate(beta, gain), 3)
        x = limit(Pull(1.0, beta, gain, momentum), problem).second(problem)
        y = limit(Pull(rates, beta, 0.0, momentum), problem).second(problem)
        gaps.append(abs(np.trace(x) / np.trace(y) - 1))
        assert abs(x / y - 1).max() < 40 * e  # element by element, correlations, too
    assert gaps[0] > 4 * gaps[1] > 16 * gaps[2]  # to first order in e or better
    assert gaps[-1] < 1e-3


def test_twin_modes():
    a, beta, c = grid(least=1e-3, share=(0, 0.01, 0.1, 0.3, 0.6, 0.9))
    ours, twins = twin_modes(a, beta, c)
    s = c * (1 - beta)
    r = beta / (beta + s)
    total = a + beta + s
    # The pull's modes by NumPy: roots of u² - (a+β+s)·u + aβ.
    roots = np.array(
        [np.roots([1, p, q]) for p, q in zip((-total).flat, (a * beta).flat, strict=True)]
    )
    np.testing.assert_allclose(ours.ravel(), abs(1 - roots).max(1), rtol=3e-8)
    np.testing.assert_allclose(twins, np.maximum(abs(1 - r * a), 1 - beta), rtol=1e-13)
    harmonic = (1 / roots).sum(1).reshape(a.shape)
    np.testing.assert_allclose(harmonic.real, 1 / (r * a) + 1 / beta, rtol=1e-10)
    np.testing.assert_allclose(harmonic.real, total / (a * beta), rtol=1e-10)
    # The slow mode is slower than the twin's by up to 2, never faster.
    slow = roots.real.min(1).reshape(a.shape)
    slower = np.minimum(r * a, beta) / slow
    assert slower.min() > 1 - 1e-7
    assert slower.max() < 2
    # By 1 + a/(β+s) where the twin's average is faster, but for the slow mode's share, u1/(β+s).
    faster = (beta > r * a) & (a < 0.1 * (beta + s))
    off = slower / (1 + a / (beta + s)) - 1
    assert (abs(off) <= slow / (beta + s) + 1e-7)[faster].all()
    # And close to 2 at ra = β, for small β.
    a, beta = 0.2, 1e-4
    s = a - beta  # so that r·a = β
    ours, twins = twin_modes(a, beta, s / (1 - beta))
    np.testing.assert_allclose((1 - twins) / (1 - ours), 2, rtol=1e-3)


def test_both_twins_remember_the_start_as_long():
    # Σ over the steps of the start's share is Σ 1/u but for a step, which both have.
    a, beta, c = 0.2, 0.05, 0.3
    r = float(twin_rate(beta, c))
    sums = []
    for method in (Pull(1.0, beta, c), Pull(r, beta)):
        means = itertools.islice(moments(method, Quadratic([a])), 4000)
        sums.append(sum(m.mean[-1, 0] for m in means))
    expected = (a + beta + c * (1 - beta)) / (a * beta) - 1
    np.testing.assert_allclose(sums, expected, rtol=1e-12)


def test_twin_epsilon():
    lr, c, eps, beta = 0.01, 0.1, 1e-3, np.array([0.02, 0.5, 1.0])
    root = np.geomspace(1e-4, 10, 7)[:, None]  # of v̂
    r = twin_rate(beta, lr * c * beta / (root + eps))
    found = twin_epsilon(lr, c, beta, eps)
    np.testing.assert_allclose(lr * r / (root + eps), lr / (root + found), rtol=1e-13)
    np.testing.assert_array_equal(twin_epsilon(lr, 0.0, beta), 1e-8)  # no pull: AdamW's own
    np.testing.assert_array_equal(twin_epsilon(lr, c, 1.0), 1e-8)


@pytest.mark.parametrize("averaging", [PowerEMA(0.5), PowerEMA(0.9, rate=0.3), EMA(beta=0.07)])
def test_a_saturated_clip_is_adamw_at_a_lower_rate(averaging):
    """The average moves as AdamW at the rate β_t·η, with gradients at the live weights."""
    lr, (beta1, beta2), eps = 0.05, (0.9, 0.99), 1e-8
    rng = np.random.default_rng(0)
    average = rng.normal(size=5)
    weights = Parameter(torch.tensor(average))
    optimizer = PACE(
        [weights],
        lr=lr,
        betas=(beta1, beta2),
        eps=eps,
        weight_decay=0,
        pullback=1e12,
        averaging=averaging,
    )
    live, m, v = average, 0.0, 0.0
    for k in range(1, 40):
        g = 3 * live**3 - live + rng.normal(size=5)
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        step = (m / (1 - beta1**k)) / (np.sqrt(v / (1 - beta2**k)) + eps)
        weights.grad = torch.tensor(g)
        optimizer.step()
        live = average - lr * step
        average = average - float(averaging.weight(k)) * lr * step
        np.testing.assert_allclose(weights.detach(), live, rtol=1e-12, atol=1e-14)
        with optimizer.averaged():
            np.testing.assert_allclose(weights.detach(), average, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("averaging", [PowerEMA(0.5), EMA(beta=0.07), Uniform()])
def test_a_gain_of_1_is_sgd_at_a_lower_rate(averaging):
    lr, rng = 0.2, np.random.default_rng(0)
    average = rng.normal(size=5)
    live, weights = average, Parameter(torch.tensor(average))
    sgd = torch.optim.SGD([weights], lr=lr)
    optimizer = Pullback(sgd, pullback=1.0, averaging=averaging, gain="scalar")
    for k in range(1, 40):
        g = live**3 - live + rng.normal(size=5)
        weights.grad = torch.tensor(g)
        optimizer.step()
        live = average - lr * g
        average = average - float(averaging.weight(k)) * lr * g
        np.testing.assert_allclose(weights.detach(), live, rtol=1e-12, atol=1e-14)
        with optimizer.averaged():
            np.testing.assert_allclose(weights.detach(), average, rtol=1e-12, atol=1e-14)


# ---- refusals -----------------------------------------------------------------------------------

EYE, NAN = np.eye(2), float("nan")
REFUSED = {
    "momentum and a changing rate": (
        lambda: Pull(lowered, momentum=0.5),
        ["momentum goes with a constant lr"],
    ),
    "below": (lambda: require("x", [3, -1, -2], 0, 5), ["x must be in [0, 5], got -2, 2 below"]),
    "above": (lambda: require("x", [7, 6], 0, 5, open_="high"), ["in [0, 5), got 7, 2 above"]),
    "low end": (lambda: require("x", 0, 0, 5, open_="low"), ["(0, 5], got 0", "the end itself"]),
    "high end": (lambda: require("x", 5, 0, 5, open_="both"), ["(0, 5), got 5", "the end itself"]),
    "nan": (lambda: require("x", [1, NAN], 0, np.inf), ["x must be finite", "[0, inf)", "got nan"]),
    "inf": (lambda: require("x", np.inf, 0, np.inf), ["x must be finite", "got inf"]),
    "a of 2": (lambda: largest_gain(2.0, 0.1), ["a must be in (0, 2)", "the end itself"]),
    "a of 0": (lambda: better_gain(0.0, 0.1), ["a must be in (0, 2)"]),
    "beta of 1": (lambda: better_gain(0.1, 1.0), ["beta must be in (0, 1)"]),
    "beta of 0": (lambda: largest_gain(0.1, 0.0), ["beta must be in (0, 1]"]),
    "radius": (lambda: spectral_radius(-0.1, 0.1, 0), ["a must be in (0, inf), got -0.1, 0.1 be"]),
    "radius's c": (lambda: spectral_radius(0.1, 0.1, -2), ["c must be in [0, inf), got -2"]),
    "half-life of 1": (lambda: half_life(1.0), ["radius must be in [0, 1)", "the end itself"]),
    "half-life": (lambda: half_life(1.25), ["got 1.25, 0.25 above"]),
    "error's a": (lambda: limiting_error([0.1, 2.5], 0.1, 0), ["not stable", "got 2.5, 0.5 above"]),
    "error's beta": (lambda: limiting_error(0.1, 1.5, 0), ["beta must be in (0, 1], got 1.5, 0.5"]),
    "error's c": (
        # The bound is 1.5·1.5/1 = 2.25 there, and 1.5·1.1/0.2 = 8.25 at β = 0.9.
        lambda: limiting_error(0.5, [0.9, 0.5], [[0.1], [2.5]]),
        ["not stable: c must be below", "2.25 at a = 0.5 and beta = 0.5, got 2.5, 0.25 above"],
    ),
    "error at the bound": (lambda: limiting_error(0.5, 0.5, 2.25), ["not stable: c must be below"]),
    "error's noise": (lambda: limiting_error(0.1, 0.1, 0, -1), ["noise must be in [0, inf)"]),
    "error's drift": (lambda: limiting_error(0.1, 0.1, 0, 1, -1), ["drift must be in [0, inf)"]),
    "lookahead's a": (lambda: lookahead_error(2.0, 5, 0.5), ["a must be in (0, 2)"]),
    "lookahead's K": (
        lambda: lookahead_error(0.1, 0, 0.5),
        ["every must be in [1, inf), got 0, 1"],
    ),
    "lookahead's share": (lambda: lookahead_error(0.1, 5, 0), ["alpha must be in (0, 1]"]),
    "lookahead's noise": (lambda: lookahead_error(0.1, 5, 0.5, -1), ["noise must be"]),
    "lookahead's drift": (lambda: lookahead_error(0.1, 5, 0.5, 1, -1), ["drift must be"]),
    "curvature": (lambda: Quadratic([1.0, -1.0]), ["curvature must be in (0, inf), got -1, 1 be"]),
    "noise": (lambda: Quadratic([1.0], noise=-2), ["noise must be in [0, inf), got -2, 2 below"]),
    "drift": (lambda: Quadratic([1.0], drift=-2), ["drift must be in [0, inf), got -2"]),
    "start": (lambda: Quadratic([1.0], start=NAN), ["start must be finite"]),
    "indefinite": (
        lambda: Quadratic([[1, 2], [2, 1]]),
        ["curvature must be positive definite; its least eigenvalue is -1"],
    ),
    "askew": (lambda: Quadratic([[2, 0.5], [0, 1]]), ["curvature must be symmetric", "by 0.5"]),
    "oblong": (lambda: Quadratic(np.ones((2, 3))), ["square matrix", "(2, 3)"]),
    "a cube": (lambda: Quadratic(np.ones((2, 2, 2))), ["square matrix", "(2, 2, 2)"]),
    "curvature nan": (lambda: Quadratic(EYE * NAN), ["curvature must be finite"]),
    "noise's shape": (lambda: Quadratic(EYE, noise=[1, 2]), ["noise must be", "(2, 2)", "(2,)"]),
    "noise a number": (lambda: Quadratic(EYE, noise=-1), ["noise must be in [0, inf), got -1"]),
    "noise askew": (lambda: Quadratic(EYE, [[1, 1], [0, 1]]), ["noise must be symmetric", "by 1"]),
    "noise indefinite": (
        lambda: Quadratic(EYE, noise=[[1, 2], [2, 1]]),
        ["noise has a negative variance, -1, in some direction"],
    ),
    "drift indefinite": (lambda: Quadratic(EYE, drift=-EYE), ["drift has a negative variance, -1"]),
    "pull's rate": (lambda: Pull(0.0), ["lr must be in (0, inf)"]),
    "pull's weight": (lambda: Pull(0.1, 0.0), ["beta must be in (0, 1]"]),
    "pull's gain": (lambda: Pull(0.1, 0.1, [0.5, -0.5]), ["gain must be in [0, inf), got -0.5"]),
    "momentum": (lambda: Pull(0.1, momentum=1.0), ["momentum must be in [0, 1)"]),
    "nearness": (lambda: ScheduleFree(0.1, 1.0), ["mu must be in [0, 1)"]),
    "cycle": (lambda: Lookahead(0.1, 0), ["every must be in [1, inf), got 0, 1 below"]),
    "share": (lambda: Lookahead(0.1, 5, 1.5), ["alpha must be in (0, 1], got 1.5, 0.5 above"]),
    "no limit": (
        lambda: limit(Pull(0.1, Uniform().weight), Quadratic([1.0])),
        ["Pull changes with the step"],
    ),
    "no limit of gains": (lambda: limit(Pull(0.1, 0.1, rising), Quadratic([1.0])), ["no limit"]),
    "no limit of a rate": (lambda: limit(Pull(lowered), Quadratic([1.0])), ["Pull changes"]),
    "no limit of rates": (
        lambda: radius(Lookahead(lowered), Quadratic([1.0])),
        ["Lookahead chang"],
    ),
    "no cycle": (lambda: transition(ScheduleFree(0.1), Quadratic([1.0])), ["ScheduleFree changes"]),
    "unstable": (
        lambda: limit(Pull(1.0), Quadratic([0.5, 2.25])),
        ["not stable", "below 1, it is 1.25, 0.25 above"],
    ),
    "unstable matrix": (lambda: limit(Pull(1.0), Quadratic(2.25 * EYE)), ["it is 1.25, 0.25"]),
    "twin's beta": (lambda: twin_rate(0.0, 1.0), ["beta must be in (0, 1]"]),
    "twin's c": (lambda: twin_rate(0.1, -1.0), ["c must be in [0, inf), got -1, 1 below"]),
    "ratio": (lambda: twin_ratio(0.5, 0.5, 2.5), ["not stable", "0.25 above"]),
    "modes' a": (lambda: twin_modes(0.0, 0.1, 0.1), ["a must be in (0"]),
    "ε's rate": (lambda: twin_epsilon(0.0, 0.1, 0.1), ["lr must be in (0, inf)"]),
    "ε's c": (lambda: twin_epsilon(0.1, -0.1, 0.1), ["c must be in [0, inf)"]),
    "ε's beta": (lambda: twin_epsilon(0.1, 0.1, 1.1), ["beta must be in (0, 1], got 1.1"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_with_the_condition_and_by_how_much(case):
    call, parts = REFUSED[case]
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the parts are the match
        call()
    for part in parts:
        assert part in str(caught.value)


def test_takes_what_is_at_the_ends_of_the_ranges():
    np.testing.assert_array_equal(require("x", [0, 5], 0, 5), [0.0, 5.0])
    assert require("x", 1, 0, 5).dtype == np.float64
    assert limiting_error(0.5, 1.0, 1e9) == limiting_error(0.5, 1.0, 0)
    assert limiting_error(0.5, 0.5, 0, 0, 0) == 0
    tiny = Quadratic(EYE, noise=[[1, 1], [1, 1 - 1e-15]])  # singular, but for rounding
    assert tiny.general
    assert tiny.size == 2
    assert Quadratic(3.0).curvature.shape == (1,)
    assert isinstance(limit(Pull(0.1, 0.2), tiny), Moments)


# ---- the twin where the minimum drifts -----------------------------------------------------------


@pytest.mark.parametrize("c", [0.01, 0.1, 0.5])
@pytest.mark.parametrize(("a", "beta"), [(1e-3, 2e-3), (5e-3, 1e-3), (1e-2, 1e-3)])
def test_drift_is_followed_as_a_mass_on_a_spring_does(a, beta, c):
    """q²(f/(2aβ) + m/(2f)), with the friction f = a+β+b, the mass m 1, and 1/r for the twin."""
    r = float(twin_rate(beta, c))
    f = a + beta + c * (1 - beta)
    for found, mass in (
        (limiting_error(a, beta, c, 0.0, 1.0), 1.0),
        (limiting_error(a * r, beta, 0.0, 0.0, 1.0), 1 / r),
    ):
        # To leading order in the modes, of which the fastest is f.
        assert float(found) == pytest.approx(f / (2 * a * beta) + mass / (2 * f), rel=f)


def test_under_drift_alone_a_pull_that_is_clipped_is_better_than_its_twin():
    a, beta, c = np.meshgrid(
        np.linspace(0.01, 1, 40), np.geomspace(1e-4, 0.99, 40), np.linspace(0.01, 1, 40)
    )
    ratio = limiting_error(a, beta, c, 0.0, 1.0)
    ratio /= limiting_error(a * twin_rate(beta, c), beta, 0.0, 0.0, 1.0)
    assert ratio.max() < 1
    assert ratio.min() == pytest.approx(0.8, abs=2e-3)
