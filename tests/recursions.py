"""The methods once more, as they act on weights.

The recursions below move weights, not covariances: `propagate` reads off what a step does to each
unit vector, so that it shares no algebra with the package.
"""

import numpy as np

from paceline import PowerEMA, Uniform
from paceline.theory.quadratic import Lookahead, Pull, Quadratic, ScheduleFree

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
    "momentum, rates change": (
        Pull(lowered_each, 0.2, GAINS, 0.8),
        pull(lowered_each, 0.2, GAINS, 0.8),
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


def grid(least=0.02, most=1.95, share=(0, 0.05, 0.3, 0.7, 0.95)):
    """a, β and λ over the stable region, as shares of the bound, which is written out here."""
    a, beta, part = np.meshgrid(
        np.geomspace(least, most, 9), [0.02, 0.1, 0.3, 0.6, 0.9, 0.99], share, indexing="ij"
    )
    return a, beta, part * (2 - a) * (2 - beta) / (2 * (1 - beta))
