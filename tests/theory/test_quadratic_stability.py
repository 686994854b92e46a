"""The stochastic quadratic: stability, forgetting, and where a pull helps."""

import itertools

import numpy as np
import pytest

pytest.importorskip("scipy")

from recursions import BOTH, PROBLEMS, SAME, grid, linear_maps

from paceline.theory.quadratic import (
    Pull,
    Quadratic,
    better_gain,
    half_life,
    largest_gain,
    limiting_error,
    moments,
    radius,
    spectral_radius,
)

# ---- stability and forgetting -------------------------------------------------------------------


def test_spectral_radius_is_that_of_the_matrix():
    a, beta, gain = grid(share=(0, 0.1, 0.9, 0.999, 1.001, 3))
    rows = [[1 - a - gain, gain], [beta * (1 - a - gain), 1 - beta + beta * gain]]
    matrix = np.moveaxis(np.array(rows), (0, 1), (-2, -1))
    # Where both eigenvalues are the same, NumPy's have the square root of float64's accuracy.
    expected = abs(np.linalg.eigvals(matrix)).max(-1)
    np.testing.assert_allclose(spectral_radius(a, beta, gain), expected, rtol=3e-8)
    assert np.isclose(spectral_radius(a, beta, gain), expected, rtol=1e-12).mean() > 0.9
    problem = Quadratic(a.ravel())
    ours = radius(Pull(1.0, beta.ravel(), gain.ravel()), problem)
    np.testing.assert_allclose(ours.reshape(a.shape), expected, rtol=3e-8)


def test_spectral_radius_is_exact_for_slow_modes():
    # Of the roots u = 1 - z of u² - (a+β+s)·u + aβ the smaller one without cancellation; equal
    # roots, at a = β and λ = 0, are where a careless square root loses half of the digits.
    sizes = np.geomspace(1e-7, 0.5, 18)
    a, beta, gain = np.meshgrid(sizes, sizes, [0, *sizes], indexing="ij")
    s = gain * (1 - beta)
    apart = np.sqrt((a - beta) ** 2 + 2 * s * (a + beta) + s**2)
    slow = 2 * a * beta / (a + beta + s + apart)
    found = spectral_radius(a, beta, gain)
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
    a, beta, gain = grid(least=1e-3, most=1.999, share=np.linspace(0, 0.999, 40))
    assert (spectral_radius(a, beta, gain) < 1).all()
    assert np.isposinf(largest_gain([0.5, 1.5], 1.0)).all()
    assert spectral_radius(0.5, 1.0, 1e6) == 0.5  # the pull has nothing to pull to
    assert (spectral_radius([2.0, 2.5], 0.1, [[0.0], [0.5]]) >= 1).all()  # and none helps there


def test_the_start_is_forgotten_with_the_spectral_radius():
    a, beta, gain = (x.ravel() for x in grid(share=(0, 0.05, 0.3, 0.7)))
    rho = spectral_radius(a, beta, gain)
    other = (1 - beta) * abs(1 - a - gain) / rho  # the roots' product is -φ2
    apart = (other < 0.8 * rho) & (rho > 0.3)
    a, beta, gain, rho = a[apart], beta[apart], gain[apart], rho[apart]
    assert len(a) > 80
    # After 120 steps the other root has 0.8^120 = 2e-12 of the first's share.
    means = itertools.islice(moments(Pull(1.0, beta, gain), Quadratic(a)), 120, 122)
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
    gain, bound, plain = better_gain(a, beta), largest_gain(a, beta), limiting_error(a, beta, 0)
    helps = gain > 1e-3
    assert helps.any()
    assert (~helps).any()
    below, above = (np.where(helps, gain * x, 0) for x in (1, 0.99))
    np.testing.assert_allclose(limiting_error(a, beta, below)[helps], plain[helps], rtol=1e-9)
    assert (limiting_error(a, beta, above) < plain)[helps].all()
    for share in np.linspace(0.01, 0.99, 25):
        inside = np.where(helps, gain * share, 0)
        assert (limiting_error(a, beta, inside) < plain)[helps].all()
        beyond = np.maximum(gain, 0) + (bound - np.maximum(gain, 0)) * share
        assert (limiting_error(a, beta, beyond) > plain).all()
    w = (1 - a) * (1 - beta)
    gap = a * beta * (1 - w) / (2 * (1 + w) * (1 - beta))
    np.testing.assert_allclose(bound - gain, gap, rtol=1e-9, atol=1e-12 * bound.max())


def test_a_clipped_gain_never_harms_up_to_a_of_1():
    a, beta, gain = np.meshgrid(
        np.linspace(0, 1, 61)[1:], np.linspace(0, 1, 41)[1:-1], np.linspace(0, 1, 41)[1:]
    )
    assert better_gain(a, beta).min() >= 1 - 1e-14  # roundings, at a = 1
    assert better_gain(1.0, 1e-9) < 1 + 1e-8  # no larger number would do
    assert (limiting_error(a, beta, gain) <= limiting_error(a, beta, 0) * (1 + 1e-13)).all()
    assert better_gain(1.9, 0.9) < 0  # where a is larger, no pull may help
