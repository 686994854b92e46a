"""The stochastic quadratic: closed forms = Lyapunov = the recursion written out again."""

import itertools
from fractions import Fraction

import numpy as np
import pytest

pytest.importorskip("scipy")

from recursions import (
    BOTH,
    GAINS,
    HESSIAN,
    PROBLEMS,
    RATES,
    SAME,
    SHARES,
    START,
    WEIGHTS,
    grid,
    linear_maps,
    lowered,
    rising,
)

from paceline import Uniform
from paceline.theory.quadratic import (
    Lookahead,
    Moments,
    Pull,
    Quadratic,
    ScheduleFree,
    better_gain,
    half_life,
    in_range,
    largest_gain,
    limit,
    limiting_error,
    lookahead_error,
    moments,
    radius,
    spectral_radius,
    transition,
)
from paceline.theory.twin import twin_epsilon, twin_modes, twin_rate, twin_ratio

# ---- moments ---------------------------------------------------------------------------------


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


def impulses(a, beta, gain, steps, live, average):
    """Σ θ̂² of what an impulse leaves, over the steps."""
    x, y = np.broadcast_arrays(live * np.ones_like(a), average * np.ones_like(a))
    total = 0.0
    for _ in range(steps):
        total = total + y**2
        x = (1 - a - gain) * x + gain * y
        y = (1 - beta) * y + beta * x if beta is not None else x
    return total


def test_limiting_error_is_the_sum_over_impulses():
    a, beta, gain = grid()
    slow = spectral_radius(a, beta, gain) < 0.985  # so that 2500 steps leave 1e-16
    assert slow.mean() > 0.6
    a, beta, gain = a[slow], beta[slow], gain[slow]
    noise = impulses(a, beta, gain, 2500, 1.0, beta)
    drift = impulses(a, beta, gain, 2500, 1.0, 1.0)
    np.testing.assert_allclose(limiting_error(a, beta, gain), noise, rtol=1e-10)
    np.testing.assert_allclose(limiting_error(a, beta, gain, 0, 1), drift, rtol=1e-10)
    np.testing.assert_allclose(
        limiting_error(a, beta, gain, 0.3, 2.0), 0.3 * noise + 2 * drift, rtol=1e-10
    )


def test_limiting_error_is_exact_for_all_sizes_of_its_arguments():
    # In rational arithmetic: the formula of the docstring, and without drift the other known form.
    sizes = [1e-12, 1e-8, 1e-4, 0.05, 0.5, 1.0, 1.5]
    for a, beta, gain in itertools.product(sizes, [1e-12, 1e-8, 1e-4, 0.5, 1.0], [0, *sizes[:-2]]):
        if gain >= 0.9 * (2 - a) * (2 - beta) / (2 * (1 - beta) or 1e-9):  # worse conditioned
            continue
        x, b, g, s, q = map(Fraction, (a, beta, gain, 0.7, 0.3))
        phi1, phi2 = 2 - x - b - g * (1 - b), -(1 - b) * (1 - x - g)
        below = (1 + phi2) * ((1 - phi2) ** 2 - phi1**2)
        noise = b**2 * s * (1 - phi2) / below
        drift = q * ((1 + phi2**2) * (1 - phi2) + 2 * phi1 * phi2) / below
        other = b * s * (2 - x - b - g + b * x + b * g)
        other /= (x * (x + b + g - b * x - b * g)) * (4 - 2 * x - 2 * b - 2 * g + b * x + 2 * b * g)
        assert other == noise
        for found, exact in (
            (limiting_error(a, beta, gain, 0.7), noise),
            (limiting_error(a, beta, gain, 0, 0.3), drift),
            (limiting_error(a, beta, gain, 0.7, 0.3), noise + drift),
        ):
            assert abs(float(found) / float(exact) - 1) < 2e-14, (
                a,
                beta,
                gain,
            )  # some 50 roundings


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


# ---- refusals -----------------------------------------------------------------------------------


EYE, NAN = np.eye(2), float("nan")

REFUSED = {
    "below": (
        lambda: in_range("x", [3, -1, -2], "[0, 5]"),
        ["x must be in [0, 5], got -2, 2 below"],
    ),
    "above": (lambda: in_range("x", [7, 6], "[0, 5)"), ["in [0, 5), got 7, 2 above"]),
    "low end": (lambda: in_range("x", 0, "(0, 5]"), ["(0, 5], got 0", "the end itself"]),
    "high end": (lambda: in_range("x", 5, "(0, 5)"), ["(0, 5), got 5", "the end itself"]),
    "nan": (
        lambda: in_range("x", [1, NAN], "[0, inf)"),
        ["x must be finite", "[0, inf)", "got nan"],
    ),
    "inf": (lambda: in_range("x", np.inf, "[0, inf)"), ["x must be finite", "got inf"]),
    "a of 2": (lambda: largest_gain(2.0, 0.1), ["a must be in (0, 2)", "the end itself"]),
    "a of 0": (lambda: better_gain(0.0, 0.1), ["a must be in (0, 2)"]),
    "beta of 1": (lambda: better_gain(0.1, 1.0), ["beta must be in (0, 1)"]),
    "beta of 0": (lambda: largest_gain(0.1, 0.0), ["beta must be in (0, 1]"]),
    "radius": (lambda: spectral_radius(-0.1, 0.1, 0), ["a must be in (0, inf), got -0.1, 0.1 be"]),
    "radius's gain": (lambda: spectral_radius(0.1, 0.1, -2), ["gain must be in [0, inf), got -2"]),
    "half-life of 1": (lambda: half_life(1.0), ["radius must be in [0, 1)", "the end itself"]),
    "half-life": (lambda: half_life(1.25), ["got 1.25, 0.25 above"]),
    "error's a": (lambda: limiting_error([0.1, 2.5], 0.1, 0), ["not stable", "got 2.5, 0.5 above"]),
    "error's beta": (lambda: limiting_error(0.1, 1.5, 0), ["beta must be in (0, 1], got 1.5, 0.5"]),
    "error's gain": (
        # The bound is 1.5·1.5/1 = 2.25 there, and 1.5·1.1/0.2 = 8.25 at β = 0.9.
        lambda: limiting_error(0.5, [0.9, 0.5], [[0.1], [2.5]]),
        ["not stable: gain must be below", "2.25 at a = 0.5 and beta = 0.5, got 2.5, 0.25 above"],
    ),
    "error at the bound": (
        lambda: limiting_error(0.5, 0.5, 2.25),
        ["not stable: gain must be below"],
    ),
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
        ["noise must be positive semidefinite; its least eigenvalue is -1"],
    ),
    "drift indefinite": (
        lambda: Quadratic(EYE, drift=-EYE),
        ["drift must be positive semidefinite; its least eigenvalue is -1"],
    ),
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
    "twin's gain": (lambda: twin_rate(0.1, -1.0), ["gain must be in [0, inf), got -1, 1 below"]),
    "ratio": (lambda: twin_ratio(0.5, 0.5, 2.5), ["not stable", "0.25 above"]),
    "modes' a": (lambda: twin_modes(0.0, 0.1, 0.1), ["a must be in (0"]),
    "ε's rate": (lambda: twin_epsilon(0.0, 0.1, 0.1), ["lr must be in (0, inf)"]),
    "ε's pullback": (lambda: twin_epsilon(0.1, -0.1, 0.1), ["pullback must be in [0, inf)"]),
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
    np.testing.assert_array_equal(in_range("x", [0, 5], "[0, 5]"), [0.0, 5.0])
    assert in_range("x", 1, "[0, 5]").dtype == np.float64
    assert limiting_error(0.5, 1.0, 1e9) == limiting_error(0.5, 1.0, 0)
    assert limiting_error(0.5, 0.5, 0, 0, 0) == 0
    tiny = Quadratic(EYE, noise=[[1, 1], [1, 1 - 1e-15]])  # singular, but for rounding
    assert tiny.general
    assert tiny.size == 2
    assert Quadratic(3.0).curvature.shape == (1,)
    assert isinstance(limit(Pull(0.1, 0.2), tiny), Moments)


def test_momentum_goes_on_after_no_rate_of_0():
    """A rate may fall to 0 and stay there; what momentum had is lost after it."""
    fall = after(Pull(lambda k: max(0.3 - 0.1 * k, 0), 0.2, 0.4, 0.8), PROBLEMS["coordinates"], 6)
    assert np.isfinite(fall.mean).all()
    with pytest.raises(ValueError, match=r"lr must stay at 0 once it is 0, with momentum, got 0.1"):
        after(Pull(lambda k: 0.1 * (k - 1), 0.2, 0.4, 0.8), PROBLEMS["coordinates"], 3)
