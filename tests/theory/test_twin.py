"""The twin of a pull: an EMA at another learning rate."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn import Parameter

pytest.importorskip("scipy")

from recursions import GAINS, HESSIAN, NOISE, grid, linear_maps, pull

from paceline import EMA, PACE, PowerEMA, Pullback, Uniform
from paceline.theory.quadratic import Pull, Quadratic, limit, limiting_error, moments, radius
from paceline.theory.twin import twin_epsilon, twin_modes, twin_rate, twin_ratio

# ---- the twin -----------------------------------------------------------------------------------


def test_twin_rate_needs_no_scipy():
    """Training takes it from here, and does not install SciPy."""
    code = "import sys; sys.modules['scipy'] = None; from paceline.theory.twin import twin_rate"
    code += "; print(float(twin_rate(0.2, 0.5)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(run.stdout) == 0.2 / (0.2 + 0.5 * (1.0 - 0.2))


def test_twin_rate():
    beta, gain = np.meshgrid([0.01, 0.3, 1.0], [0, 0.2, 1.0, 3.0])
    np.testing.assert_allclose(twin_rate(beta, gain), beta / (beta + gain * (1 - beta)), rtol=1e-15)
    np.testing.assert_allclose(twin_rate(beta, gain, simple=True), beta / (beta + gain), rtol=1e-15)
    np.testing.assert_allclose(twin_rate(beta, 1.0), beta, rtol=1e-15)
    assert (twin_rate(beta, 1.0, simple=True) < 0.999 * beta).all()
    np.testing.assert_allclose(  # "the same for small β"
        twin_rate(1e-6, gain), twin_rate(1e-6, gain, simple=True), rtol=2e-6
    )


@pytest.mark.parametrize("simple", [False, True])
def test_twin_ratio_is_that_of_the_limits(simple):
    a, beta, gain = grid(least=1e-4, most=1.99, share=(0, 1e-3, 0.1, 0.5, 0.9, 0.99))
    r = beta / (beta + gain * (1 if simple else 1 - beta))
    expected = limiting_error(a, beta, gain) / limiting_error(r * a, beta, 0, r**2)
    found = twin_ratio(a, beta, gain, simple=simple)
    np.testing.assert_allclose(found, expected, rtol=1e-11)  # 99 % of the bound loses two digits
    assert (found[gain > 0] > 1).all()
    np.testing.assert_allclose(found[gain == 0], 1, rtol=1e-14)


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
    a, beta, gain = scale * np.array([0.5, 1, 4])[:, None], scale, np.array([0.1, 0.5, 0.9])
    r, w, s = beta / (beta + gain * (1 - beta)), (1 - a) * (1 - beta), gain * (1 - beta)
    first = a * beta / 2 * (1 / (1 + w - s) - r / 2)
    more = beta * gain / (a + beta + gain)
    close = np.broadcast_to(20 * scale, (4, 3, 3))  # what is left out is of order e more
    assert (
        abs((twin_ratio(a, beta, gain) - 1) / first - 1)[:2] < close[:2]
    ).all()  # later: roundings
    simple = twin_ratio(a, beta, gain, simple=True) - 1
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
    a, beta, gain, z = 0.3, 0.2, 0.4, 0.9 + 0.3j
    r, u, s = beta / (beta + gain * (1 - beta)), 1 - z, gain * (1 - beta)
    for rule, square in ((pull(a, beta, gain), 1.0), (pull(r * a, beta), 1 / r)):
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
    a, beta, gain = grid(least=1e-3, share=(0, 0.01, 0.1, 0.3, 0.6, 0.9))
    ours, twins = twin_modes(a, beta, gain)
    s = gain * (1 - beta)
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
    # By 1 + a/(β+s) where the twin's average is faster, except for the slow mode's share, u1/(β+s).
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
    a, beta, gain = 0.2, 0.05, 0.3
    r = float(twin_rate(beta, gain))
    sums = []
    for method in (Pull(1.0, beta, gain), Pull(r, beta)):
        means = itertools.islice(moments(method, Quadratic([a])), 4000)
        sums.append(sum(m.mean[-1, 0] for m in means))
    expected = (a + beta + gain * (1 - beta)) / (a * beta) - 1
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


# ---- the twin where the minimum drifts -----------------------------------------------------------


@pytest.mark.parametrize("gain", [0.01, 0.1, 0.5])
@pytest.mark.parametrize(("a", "beta"), [(1e-3, 2e-3), (5e-3, 1e-3), (1e-2, 1e-3)])
def test_drift_is_followed_as_a_mass_on_a_spring_does(a, beta, gain):
    """q²(f/(2aβ) + m/(2f)), with the friction f = a+β+b, the mass m 1, and 1/r for the twin."""
    r = float(twin_rate(beta, gain))
    f = a + beta + gain * (1 - beta)
    for found, mass in (
        (limiting_error(a, beta, gain, 0.0, 1.0), 1.0),
        (limiting_error(a * r, beta, 0.0, 0.0, 1.0), 1 / r),
    ):
        # To leading order in the modes, of which the fastest is f.
        assert float(found) == pytest.approx(f / (2 * a * beta) + mass / (2 * f), rel=f)


def test_under_drift_alone_a_pull_that_is_clipped_is_better_than_its_twin():
    a, beta, gain = np.meshgrid(
        np.linspace(0.01, 1, 40), np.geomspace(1e-4, 0.99, 40), np.linspace(0.01, 1, 40)
    )
    ratio = limiting_error(a, beta, gain, 0.0, 1.0)
    ratio /= limiting_error(a * twin_rate(beta, gain), beta, 0.0, 0.0, 1.0)
    assert ratio.max() < 1
    assert ratio.min() == pytest.approx(0.8, abs=2e-3)


# ---- a saturated pull and momentum ---------------------------------------------------------------


def test_momentum_turns_a_saturated_pull_from_worse_than_its_twin_to_better():
    """Limiting errors at β = 0.15, which a power EMA of κ = 0.3 has after some 550 steps."""
    beta, a = 0.15, np.array([0.1, 0.3, 1.0])
    ratios = {}
    for momentum in (0.0, 0.9):
        pull, twin = Pull(1.0, beta, 1.0, momentum), Pull(beta, beta, 0.0, momentum)
        errors = [limit(x, Quadratic(a)).second(Quadratic(a)) for x in (pull, twin)]
        ratios[momentum] = errors[0] / errors[1]
    np.testing.assert_allclose(ratios[0.0], [1.008, 1.029, 1.987], atol=5e-4)
    np.testing.assert_allclose(ratios[0.9], [0.955, 0.884, 0.737], atol=5e-4)


@pytest.mark.parametrize("gain", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_the_largest_stable_rate_with_momentum(momentum, gain):
    """(1+μ)/(1-μ) times that without, (2(2-β) - 2λ(1-β))/(2-β): at z = -1 only a is filtered."""
    beta = 0.15
    largest = (
        (2 * (2 - beta) - 2 * gain * (1 - beta)) / (2 - beta) * (1 + momentum) / (1 - momentum)
    )
    below, above = radius(
        Pull(1.0, beta, gain, momentum), Quadratic(largest * np.array([0.99, 1.01]))
    )
    assert below < 1 < above
