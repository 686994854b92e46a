"""The optimal control of many coordinates in continuous time."""

import re

import numpy as np
import pytest

pytest.importorskip("scipy")

from scipy.integrate import quad, solve_ivp

from paceline.theory.control import (
    Regulator,
    certainty_equivalent_gain,
    influence,
    matrix_control,
    optimal_gain,
    optimal_value,
)

ROTATION = np.linalg.qr(np.random.default_rng(5).normal(size=(3, 3)))[0]
SEMI = np.array([[2.0, 1.0, 0.0], [1.0, 0.5, 0.0], [0.0, 0.0, 0.3]])  # of rank 2
COVARIANCE = np.array([[1.0, 0.5, -0.2], [0.5, 0.8, 0.1], [-0.2, 0.1, 0.3]])
STIFF = np.array([[0.9, 0.5, -0.2], [0.5, 0.8, 0.1], [-0.2, 0.1, 0.3]])  # curvature, rate per step


def riccati(curvature, horizon, penalty, terminal, t):
    """The value of (X, S) at t by SciPy's integration of its differential equation."""
    d = len(curvature)
    f = np.block([[-curvature, np.zeros((d, d))], [np.eye(d), np.zeros((d, d))]])
    b = np.vstack([np.eye(d), np.zeros((d, d))])
    end = np.pad(terminal, (d, 0)) / horizon**2

    def back(_, v):
        v = v.reshape(2 * d, 2 * d)
        return (f.T @ v + v @ f - v @ b @ b.T @ v / penalty).ravel()

    found = solve_ivp(back, (0, horizon - t), end.ravel(), rtol=1e-10, atol=1e-13)
    return found.y[:, -1].reshape(2 * d, 2 * d)


@pytest.mark.parametrize("terminal", [np.eye(3), SEMI], ids=["identity", "of rank 2"])
@pytest.mark.parametrize("t", [0.0, 1.3, 2.9])
def test_the_matrix_solution_solves_the_riccati_equation(t, terminal):
    """z = S + g·X, so that zᵀPz is the value of (X, S), and u* = -gain·z."""
    found = matrix_control(t, 3.0, STIFF, 0.2, terminal)
    both = np.hstack([found.influence, np.eye(3)])
    expected = riccati(STIFF, 3.0, 0.2, terminal, t)
    np.testing.assert_allclose(both.T @ found.value @ both, expected, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(found.gain @ both, expected[:3] / 0.2, rtol=1e-7, atol=1e-8)


def test_a_matrix_has_the_formulas_of_a_coordinate_in_its_eigendirections():
    values = np.array([0.0, 0.4, 1.7])
    found = matrix_control(1.0, 5.0, ROTATION * values @ ROTATION.T, 0.3)
    for matrix, formula in (
        (found.influence, influence(1.0, 5.0, values)),
        (found.value, optimal_value(1.0, 5.0, values, 0.3)),
        (found.gain, optimal_gain(1.0, 5.0, values, 0.3)),
        (found.gain @ found.influence, certainty_equivalent_gain(1.0, 5.0, values, 0.3)),
    ):
        np.testing.assert_allclose(ROTATION.T @ matrix @ ROTATION, np.diag(formula), atol=1e-12)


@pytest.mark.parametrize("terminal", [np.eye(3), SEMI], ids=["identity", "of rank 2"])
def test_fine_steps_come_to_the_matrix_solution(terminal):
    """Gains and cost of the discrete Riccati recursion; the gap halves with the step."""
    horizon, penalty, start = 3.0, 0.3, np.array([1.0, -2.0, 3.0])
    gaps = []
    for n in (300, 600):
        dt = horizon / n
        problem = Regulator(
            STIFF * dt, 1 / np.arange(2.0, n + 2), penalty / dt, COVARIANCE * dt, start, terminal
        )
        gains, best = problem.solve()
        off = []
        for k in range(0, n // 2, n // 10):
            found = matrix_control(k * dt, horizon, STIFF, penalty, terminal)
            expected = np.hstack([found.gain @ found.influence, found.gain * (k + 1) * dt])
            off.append(abs(gains[k] / dt - expected).max() / abs(expected).max())

        def of_noise(s):
            x = matrix_control(s, horizon, STIFF, penalty, terminal)
            return np.trace(x.influence @ COVARIANCE @ x.influence.T @ x.value)

        x = matrix_control(0.0, horizon, STIFF, penalty, terminal)
        z = x.influence @ start
        cost = z @ x.value @ z + quad(of_noise, 0, horizon)[0]
        gaps.append([max(off), abs(best.cost / cost - 1)])
    assert max(gaps[1]) < 0.02
    np.testing.assert_allclose(np.divide(*gaps), 2, rtol=0.05)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"t": 6.0}, "t must be at most the horizon, got 1 above"),
        ({"penalty": 0.0}, "penalty must be in (0, inf), got 0"),
        ({"curvature": -np.eye(2)}, "curvature must be positive semidefinite"),
        ({"curvature": np.ones((2, 3))}, "curvature must be of the shape (2, 2), got (2, 3)"),
        ({"terminal": np.eye(3)}, "terminal must be of the shape (2, 2), got (3, 3)"),
    ],
)
def test_the_matrix_solution_says_what_is_wrong(arguments, says):
    good = {"t": 1.0, "horizon": 5.0, "curvature": np.eye(2), "penalty": 1.0}
    with pytest.raises(ValueError, match=re.escape(says)):
        matrix_control(**good | arguments)
