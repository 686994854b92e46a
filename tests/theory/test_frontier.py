"""The frontier: what is found is the least, is what it says it is, and is above the floor."""

import dataclasses
import itertools
import math
import re

import numpy as np
import pytest

pytest.importorskip("scipy")

from paceline.theory import quadratic
from paceline.theory.frontier import (
    AT_A_HORIZON,
    EVERY,
    IN_THE_LIMIT,
    Best,
    best_at_a_horizon,
    best_in_the_limit,
    best_of_each,
    floor,
    search,
)
from paceline.theory.quadratic import Lookahead, Pull, Quadratic, ScheduleFree

LOOKAHEAD = f"Lookahead, K = {EVERY}"
FAR = Quadratic([1.0, 0.3, 0.05], [1.0, 0.5, 0.04], 1e-3, [3.0, 5.0, 8.0])
ONE = Quadratic(0.8, 4.0, 0.0, 2.0)  # a pull with one gain does better than an EMA here
LAW = np.arange(1.0, 17)
MOVING = Quadratic(1 / LAW, 1.0, 1e-4 * LAW)


# ---- the methods once more, in plain loops ------------------------------------------------------


def of(problem, variance):
    return np.broadcast_to(getattr(problem, variance), (problem.size,))


def after(method, problem, steps):
    """Expected excess loss, by the moments."""
    states = quadratic.moments(method, problem)
    return problem.loss(next(itertools.islice(states, steps, None)).second(problem))


def responses(name, x, problem, i, steps):
    """Of the returned weights of coordinate i: to the start, each gradient's noise, each move."""
    alpha, deviation = problem.curvature[i], math.sqrt(of(problem, "noise")[i])
    adam = "Adam" in name or name == "PACE"
    noisiest = math.sqrt(of(problem, "noise").max())  # whose rate is the one that is searched
    eta = x["lr"] * (noisiest + x.get("eps", 0)) if adam else x["lr"]
    lr = eta / (deviation + x.get("eps", 0)) if adam else x["lr"]
    theta = np.zeros(1 + 2 * steps)
    theta[0] = 1
    average, fast, total, many = theta, theta, 0 * theta, 0
    for k in range(1, steps + 1):
        noise, move = np.zeros_like(theta), np.zeros_like(theta)
        noise[k] = move[steps + k] = 1
        if name == "Schedule-Free":
            at = (1 - x["mu"]) * theta + x["mu"] * average
            theta = theta - lr * (alpha * at + noise)
            average = (1 - 1 / k) * average + theta / k
            theta, average = theta - move, average - move
            continue
        if name == LOOKAHEAD:
            fast = fast - lr * (alpha * fast + noise)
            if k % 10 == 0:
                theta = fast = (1 - x["alpha"]) * theta + x["alpha"] * fast
            theta, fast = theta - move, fast - move
            average = theta
            continue
        rate = lr * (steps - k + 1) / steps if name == "SGD, decay" else lr
        weight = x.get("beta", float(k) ** -x.get("kappa", 0.0))
        gain = x.get("gain", 0.0)
        if name == "PACE":
            falls = 1 if "beta" in x else weight  # a constant weight is no factor of the gain
            gain = min(1, eta * x["pullback"] * falls / deviation)
        theta = theta - rate * (alpha * theta + noise) + gain * (average - theta)
        average = (1 - weight) * average + weight * theta
        if name == "uniform tail":
            inside = k > x["start"] * steps
            total, many = total + inside * theta, many + inside
            average = total / many if many else theta
        theta, average, total = theta - move, average - move, total - many * move
    return average


def loss(name, x, problem, steps):
    """Expected excess loss after so many steps."""
    total = 0
    for i, alpha in enumerate(problem.curvature):
        start, noise, drift = (of(problem, v)[i] for v in ("start", "noise", "drift"))
        squares = responses(name, x, problem, i, steps) ** 2
        second = start**2 * squares[0] + noise * squares[1 : steps + 1].sum()
        total += alpha / 2 * (second + drift * squares[steps + 1 :].sum())
    return total


def columns(x):
    return {name: np.array(value, dtype=np.float64).reshape(-1, 1) for name, value in x.items()}


# Two sets of parameters each; with the first, PACE's gain is clipped where the noise is least.
PARAMETERS = {
    "lr": [0.3, 0.05],
    "kappa": [0.4, 0.9],
    "beta": [0.2, 0.03],
    "gain": [0.1, 0.8],
    "alpha": [0.6, 0.3],
    "eps": [0.5, 1e-3],
    "pullback": [0.5, 0.3],
    "start": [0.4, 0.71],
    "mu": [0.9, 0.3],
}


@pytest.mark.parametrize("steps", [20, 30])
@pytest.mark.parametrize("name", AT_A_HORIZON)
def test_a_family_is_the_method_it_is_named_for(name, steps):
    """Its moments are those of plain loops, for all candidates at once."""
    family = AT_A_HORIZON[name]
    x = {key: PARAMETERS[key] for key in family.box}
    method = family.make(columns(x), FAR, steps)
    found = after(method, FAR, steps)
    each = [{key: value[m] for key, value in x.items()} for m in (0, 1)]
    # float64: some dozens of steps
    np.testing.assert_allclose(found, [loss(name, one, FAR, steps) for one in each], rtol=1e-10)


@pytest.mark.parametrize("name", IN_THE_LIMIT)
def test_a_family_without_end_is_the_method_it_is_named_for(name):
    """By the limit of its moments: what plain loops come to once the start is forgotten."""
    family, problem = IN_THE_LIMIT[name], Quadratic([1.0, 0.3], [1.0, 0.04], 1e-3, 0.0)
    x = {key: PARAMETERS[key][0] for key in family.box}
    method = family.make({key: np.array(value) for key, value in x.items()}, problem, None)
    at_limit = quadratic.limit(method, problem)
    steps = 320  # the slowest of these forgets by a factor of 0.96 a step: 1e-11 of squares is left
    assert quadratic.radius(method, problem).max() < 0.96
    expected = loss(name, x, problem, steps)
    found = problem.loss(at_limit.second(problem))
    if name == LOOKAHEAD:  # the last move of the loops is in it, as it is in the limit
        assert isinstance(method, Lookahead)
        assert method.every == 10
    assert found == pytest.approx(expected, rel=1e-9)


def test_what_make_makes():
    x = columns({"lr": [0.5, 0.1], "beta": [0.3, 0.2], "gain": [0.7, 0.1], "alpha": [0.4, 1.0]})
    problem = Quadratic([1.0, 0.5], [4.0, 0.01])
    sgd = IN_THE_LIMIT["SGD"].make(x, problem, None)
    assert (sgd.beta, sgd.gain, sgd.momentum) == (1, 0, 0)
    adam = IN_THE_LIMIT["Adam, EMA"].make(x, problem, None)
    # η/√v, coordinatewise, with an η that the noisiest coordinate has 0.5 and 0.1 of
    np.testing.assert_allclose(adam.lr, [[0.5, 10.0], [0.1, 2.0]])
    damped = IN_THE_LIMIT["Adam with ε, EMA"].make(x | columns({"eps": [2, 0.4]}), problem, None)
    np.testing.assert_allclose(damped.lr, [[0.5, 0.5 * 4 / 2.1], [0.1, 0.1 * 2.4 / 0.5]])
    assert adam.gain == damped.gain == 0
    # η·c/√v with c = 1 is 0.5 and 10; 0.1 and 2: at most 1
    x |= columns({"pullback": [1, 1]})
    pace = IN_THE_LIMIT["PACE"].make(x, problem, None)
    np.testing.assert_allclose(pace.gain, [[0.5, 1.0], [0.1, 1.0]])
    np.testing.assert_allclose(pace.lr, adam.lr)
    at_end = AT_A_HORIZON["PACE"].make(
        {"kappa": np.array([[0.5]]), "lr": np.array([[0.5]]), "pullback": np.array([[1.0]])},
        problem,
        9,
    )
    np.testing.assert_allclose(at_end.beta(4), 0.5)
    np.testing.assert_allclose(at_end.gain(4), [[0.25, 1.0]])
    np.testing.assert_allclose(at_end.gain(400), [[0.025, 0.5]])
    decay = AT_A_HORIZON["SGD, decay"].make(x, problem, 10)
    np.testing.assert_allclose(decay.lr(1), x["lr"])
    np.testing.assert_allclose(decay.lr(10), x["lr"] / 10)
    # of 10 steps, the last 6 and the last 3
    tail = AT_A_HORIZON["uniform tail"].make(columns({"lr": [1, 1], "start": [0.4, 0.75]}), ONE, 10)
    weights = np.array([tail.beta(k)[:, 0] for k in range(1, 11)])
    np.testing.assert_allclose(weights[:, 0], 1 / np.array([1, 1, 1, 1, 1, 2, 3, 4, 5, 6]))
    np.testing.assert_allclose(weights[:, 1], 1 / np.array([1, 1, 1, 1, 1, 1, 1, 1, 2, 3]))
    assert isinstance(
        AT_A_HORIZON["Schedule-Free"].make(columns({"lr": 1, "mu": 0.5}), ONE, 10), ScheduleFree
    )


@pytest.mark.parametrize("families", [IN_THE_LIMIT, AT_A_HORIZON], ids=["limit", "horizon"])
def test_what_contains_a_family_has_it_in_its_box(families):
    """With its own parameters at their least it is that method, to a relative 1e-6 or so."""
    names = list(families)
    contained = {n: family.contains for n, family in families.items() if family.contains}
    assert contained == {
        "pull, one gain": "EMA",
        "Adam with ε, EMA": "Adam, EMA",
        "PACE": "Adam, EMA",
    }
    for name, inner in contained.items():
        assert names.index(inner) < names.index(name)
        box, inside = families[name].box, families[inner].box
        for key, (low, high) in inside.items():
            assert box[key][0] <= low
            assert high <= box[key][1]
        x = {key: [math.sqrt(low * high)] for key, (low, high) in inside.items()}
        least = {key: [low] for key, (low, _) in box.items()}
        losses = []
        for family, given in ((families[name], least | x), (families[inner], x)):
            method = family.make(columns(given), FAR, 10)
            losses.append(after(method, FAR, 10)[0])
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # ε = 1e-6 beside √v = 0.2


# ---- the search ---------------------------------------------------------------------------------

BOX = {"p": (1e-3, 1.0), "q": (1.0, 1e4)}


def bowl(x):
    """Least, 1, at p = 0.02 and q = 30."""
    assert list(x) == ["p", "q"]
    p, q = x["p"], x["q"]
    assert p.shape == q.shape == (len(p), 1)
    away = np.log(p / 0.02) ** 2 + 0.3 * np.log(p / 0.02) * np.log(q / 30) + np.log(q / 30) ** 2
    return 1 + away[:, 0]


def test_search_finds_a_minimum_in_logarithms():
    found = search(bowl, BOX, 20, 60)
    assert found.loss == pytest.approx(1, abs=1e-5)
    assert found.parameters == pytest.approx({"p": 0.02, "q": 30.0}, rel=1e-2)
    assert float(bowl(columns(found.parameters))[0]) == found.loss
    assert search(bowl, BOX, 20, 60) == found  # no luck in it


@pytest.mark.parametrize("forbidden", [math.inf, math.nan])
def test_search_keeps_to_what_is_allowed(forbidden):
    """Where q < 100 nothing is: the least is at the edge, which p follows."""

    def objective(x):
        return np.where(x["q"][:, 0] < 100, forbidden, bowl(x))

    found = search(objective, BOX, 30, 150)
    away = math.log(100 / 30)
    assert found.parameters["q"] == pytest.approx(100, rel=1e-2)
    assert found.parameters["q"] >= 100
    assert found.parameters["p"] == pytest.approx(0.02 * math.exp(-0.15 * away), rel=1e-2)
    assert found.loss == pytest.approx(1 + away**2 * (1 - 0.15**2), rel=1e-3)


def test_search_stays_in_its_box_and_within_its_rounds():
    seen = []

    def objective(x):
        seen.append(x)
        return np.sqrt(x["p"] * x["q"])[:, 0]  # least in a corner

    found = search(objective, BOX, 7, 5)
    assert [len(x["p"]) for x in seen] == [14] * 6  # candidates for each parameter; a first round
    for name, (low, high) in BOX.items():
        every = np.concatenate([x[name] for x in seen])
        assert every.min() >= low * (1 - 1e-12)
        assert every.max() <= high * (1 + 1e-12)
    assert found.loss == min(np.sqrt(x["p"] * x["q"]).min() for x in seen)


def test_search_of_nothing_allowed():
    found = search(lambda x: np.full(len(x["p"]), math.inf), BOX, 5, 3)
    assert found == Best(math.inf, {})

    # which tells the next nothing: a needle in the corner stays unseen
    def objective(x):
        corner = (abs(x["p"] / 1e-3 - 1) < 1e-9) & (abs(x["q"] - 1) < 1e-9)
        return np.where(corner, 0.5, bowl(x).reshape(-1, 1))[:, 0]

    assert search(objective, BOX, 10, 20, known=found).loss > 0.9
    assert search(objective, BOX, 10, 20, known=Best(0.5, {"else": 1.0})).loss == 0.5


def test_search_is_not_worse_than_what_is_known():
    """A needle in a field: at what is known, with what that lacks at its least."""

    def objective(x):
        needle = (abs(x["p"] / 0.3 - 1) < 1e-9) & (abs(x["q"] - 1) < 1e-9)
        return np.where(needle, 0.5, bowl(x).reshape(-1, 1))[:, 0]

    assert search(objective, BOX, 10, 20).loss > 0.9
    found = search(objective, BOX, 10, 20, known=Best(0.5, {"p": 0.3, "else": 7.0}))
    assert found.loss == 0.5
    assert found.parameters == pytest.approx({"p": 0.3, "q": 1.0}, rel=1e-9)
    better = search(bowl, BOX, 10, 40, known=Best(99.0, {"p": 0.9, "q": 9e3}))
    assert better.loss < 1.01


@pytest.mark.parametrize(
    ("best", "name", "limit"),
    [(best_in_the_limit, "PACE", 5.0), (best_at_a_horizon, "uniform tail", 20)],
)
def test_best_passes_on_what_is_known(monkeypatch, best, name, limit):
    family = (IN_THE_LIMIT | AT_A_HORIZON)[name]
    seen = {}

    def instead(objective, box, **options):
        seen.update(options, box=box)
        return Best(1.0, {})

    monkeypatch.setattr("paceline.theory.frontier.search", instead)
    known = Best(2.0, {"lr": 0.1})
    assert best(family, ONE, limit, known) == Best(1.0, {})
    assert seen["known"] is known
    assert seen["box"] == family.box


@pytest.mark.parametrize("box", [(0.02, 2.0), (1e-3, 3.0), (0.3, 0.5)])
def test_search_begins_at_the_ends_of_its_box(box):
    """Where what is known lacks a parameter, which is then at its least."""
    found = search(lambda x: 1 + x["p"][:, 0], {"p": box}, 5, 2, known=Best(9.0, {"q": 1.0}))
    assert found.loss == pytest.approx(1 + box[0], rel=1e-12)


# ---- in the limit -------------------------------------------------------------------------------


@pytest.mark.parametrize("life", [2.0, 10.0, 100.0, 1000.0])
def test_one_curvature_is_a_tie(life):
    """At any rate of forgetting, the best EMA has a = β = 1 - ρ, and no pull does better.

    With lr·α = a and noise in proportion, the error is one of the two roots alone, and falls in
    either: αᵢ·E θ̂² = (1-ρ)(1+ρ²)/(1+ρ)³·s²/α at the best, where both are ρ.
    """
    rho = 0.5 ** (1 / life)
    problem = Quadratic(0.8, 3.0)
    scale = 3.0 / 0.8 / 2
    tie = scale * (1 - rho) * (1 + rho**2) / (1 + rho) ** 3
    found = best_of_each(
        {name: IN_THE_LIMIT[name] for name in ("SGD", "EMA", "pull, one gain", "PACE")},
        best_in_the_limit,
        problem,
        life,
    )
    ema = found["EMA"]
    # 120 rounds: to the edge of what forgets fast enough, to some 1e-4. Below it by rounding alone:
    # of a double root, which is known to the square root of 1e-16.
    least = tie * (1 - 1e-6)
    assert ema.loss == pytest.approx(tie, rel=1e-3)
    assert ema.loss >= least
    assert ema.parameters == pytest.approx({"lr": (1 - rho) / 0.8, "beta": 1 - rho}, rel=1e-2)
    if life >= 100:  # f/4·s²/α for small f
        assert ema.loss == pytest.approx(scale * (1 - rho) / 4, rel=0.01)
    for name in ("pull, one gain", "PACE"):
        assert found[name].loss == pytest.approx(tie, rel=1e-3)
        assert found[name].loss >= least
    a = 1 - rho
    assert found["SGD"].loss == pytest.approx(scale * a / (2 - a), rel=1e-3)
    assert found["SGD"].parameters == pytest.approx({"lr": a / 0.8}, rel=1e-3)


SPECTRUM = Quadratic([1.0, 0.2], [1.0, 0.3], [1e-3, 2e-3])


def grid_of_pulls(lr, beta, gain, life):
    """The least loss of all combinations that forget fast enough, by 400 steps of impulses."""
    lr, beta, gain = np.meshgrid(lr, beta, gain, indexing="ij")
    total, fast = 0, True
    for i, alpha in enumerate(SPECTRUM.curvature):
        kept = 1 - lr * alpha - gain
        matrix = np.array([[kept, gain], [beta * kept, 1 - beta + beta * gain]])
        eigenvalues = np.linalg.eigvals(np.moveaxis(matrix, (0, 1), (-2, -1)))
        fast &= abs(eigenvalues).max(-1) ** life <= 0.5
        noise, drift = (lr, beta * lr), (np.ones_like(lr), np.ones_like(lr))
        for variance, (x, mean) in ((SPECTRUM.noise[i], noise), (SPECTRUM.drift[i], drift)):
            with np.errstate(over="ignore", invalid="ignore"):  # of those that diverge
                for _ in range(400):
                    total = total + alpha / 2 * variance * mean**2
                    x = kept * x + gain * mean
                    mean = (1 - beta) * mean + beta * x
    return np.where(fast, total, np.inf).min()


@pytest.mark.parametrize("life", [8.0, 25.0])
def test_best_in_the_limit_is_the_best_of_a_grid(life):
    found = best_of_each(
        {name: IN_THE_LIMIT[name] for name in ("SGD", "EMA", "pull, one gain")},
        best_in_the_limit,
        SPECTRUM,
        life,
    )
    # The steps of the grids are 1, 4 and 12 percent, and their best above the best of all by that,
    # of two parameters where the rate of forgetting is what holds both.
    lr = np.geomspace(0.01, 1.9, 500)
    grids = {
        "SGD": grid_of_pulls(lr, [1.0], [0.0], life),
        "EMA": grid_of_pulls(lr[::4], np.geomspace(0.01, 1, 125), [0.0], life),
        "pull, one gain": grid_of_pulls(
            lr[::10], np.geomspace(0.01, 1, 40), np.r_[0, np.geomspace(0.01, 1, 8)], life
        ),
    }
    for name, least in grids.items():
        assert found[name].loss <= least * (1 + 1e-4), name
        assert found[name].loss > (0.75 if "pull" in name else 0.92) * least, name


@pytest.mark.parametrize("name", IN_THE_LIMIT)
def test_what_is_found_is_so_in_the_limit(name):
    """The loss, and that the slowest coordinate forgets half of its start in 12 steps."""
    found = best_in_the_limit(IN_THE_LIMIT[name], SPECTRUM, 12.0)
    x = found.parameters
    assert set(x) == set(IN_THE_LIMIT[name].box)
    still = Quadratic(SPECTRUM.curvature, SPECTRUM.noise, SPECTRUM.drift, 0.0)
    # 240 steps are 20 half-lives: 1e-12 of squares is left
    assert found.loss == pytest.approx(loss(name, x, still, 240), rel=1e-9)
    forgotten = []
    for i in range(2):
        late = [abs(responses(name, x, SPECTRUM, i, t)[0]) for t in (120, 240)]
        forgotten.append(late[1] / late[0] if late[0] > 1e-30 else 0)
    # Ten half-lives; twice that leaves room for what is not one exponential, or oscillates.
    assert max(forgotten) < 2 * 0.5**10


def test_lookahead_in_the_limit_is_the_best_of_a_grid():
    lr, alpha = np.meshgrid(np.linspace(0.01, 1.9, 400), np.linspace(0.01, 1, 100), indexing="ij")
    total, fast = 0, True
    for i, curvature in enumerate(SPECTRUM.curvature):
        stay = 1 - lr * curvature
        cycle = 1 - alpha + alpha * stay**10
        fast &= abs(cycle) <= 0.5 ** (10 / 12)
        # of a cycle of 10: each noise and each move, by the time it has to the end
        added = 0
        for j in range(10):
            added += SPECTRUM.noise[i] * (alpha * lr * stay**j) ** 2
            added += SPECTRUM.drift[i] * (1 - alpha + alpha * stay**j) ** 2
        total = total + curvature / 2 * added / (1 - cycle**2)
    least = np.where(fast, total, np.inf).min()
    found = best_in_the_limit(IN_THE_LIMIT[LOOKAHEAD], SPECTRUM, 12.0)
    assert 0.95 * least < found.loss <= least * (1 + 1e-6)


def test_forgetting_at_once_is_not_allowed():
    """Two curvatures: no one rate forgets both in a hundredth of a step."""
    assert best_in_the_limit(IN_THE_LIMIT["EMA"], SPECTRUM, 0.01) == Best(math.inf, {})


def test_a_moving_minimum_is_where_a_pull_is_ahead():
    """On a power law with one rate and one weight; and all of them are above the filter."""
    found = best_of_each(IN_THE_LIMIT, best_in_the_limit, MOVING)
    losses = {name: best.loss for name, best in found.items()}
    assert losses["pull, one gain"] == pytest.approx(0.2235, abs=1e-4)
    assert losses["EMA"] == losses["Adam, EMA"] == pytest.approx(0.2336, abs=1e-4)
    assert losses["PACE"] == pytest.approx(losses["pull, one gain"], rel=1e-4)  # the noise is even
    assert floor(MOVING) == pytest.approx(0.2227, abs=1e-4)
    assert min(losses.values()) > floor(MOVING)
    assert max(losses.values()) == losses["SGD"]


# ---- at a horizon -------------------------------------------------------------------------------


@pytest.mark.parametrize(("problem", "steps"), [(FAR, 20), (ONE, 30)], ids=["far", "one"])
def test_what_is_found_at_a_horizon_is_so(problem, steps):
    """Of all families: the loss, by plain loops; nesting; the floor; and some grids."""
    found = best_of_each(AT_A_HORIZON, best_at_a_horizon, problem, steps)
    assert list(found) == list(AT_A_HORIZON)
    for name, best in found.items():
        family, x = AT_A_HORIZON[name], best.parameters
        assert set(x) == set(family.box)
        for key, (low, high) in family.box.items():
            assert low * (1 - 1e-12) <= x[key] <= high * (1 + 1e-12)
        assert best.loss == pytest.approx(loss(name, x, problem, steps), rel=1e-9), name
        assert best.loss > floor(problem, steps), name
        # none that is near does better: 25 rounds find it to 1 percent
        for key in x:
            for factor in (0.9, 1.1):
                near = x | {key: float(np.clip(factor * x[key], *family.box[key]))}
                assert loss(name, near, problem, steps) > 0.99 * best.loss, (name, key)
        if family.contains:
            # What it adds is at its least 1e-6, not 0.
            assert best.loss <= found[family.contains].loss * (1 + 1e-6), name
    if problem is ONE:
        assert found["pull, one gain"].loss < 0.99 * found["EMA"].loss
        assert found["PACE"].loss < found["Adam, EMA"].loss


@pytest.mark.parametrize("name", ["SGD", "SGD, decay", "EMA", "uniform tail"])
def test_best_at_a_horizon_is_the_best_of_a_grid(name):
    family, steps = AT_A_HORIZON[name], 10
    axes = [np.geomspace(*ends, 24) for ends in family.box.values()]
    grid = np.stack(np.meshgrid(*axes), -1).reshape(-1, len(axes))
    least = min(
        loss(name, dict(zip(family.box, map(float, x), strict=True)), ONE, steps) for x in grid
    )
    found = best_at_a_horizon(family, ONE, steps)
    # The grid's steps are as wide as 1.5; at a minimum that costs a few percent.
    assert 0.9 * least < found.loss <= least * (1 + 1e-3)


def test_schedule_free_has_room_for_its_best_rate():
    """Its gradients are damped: it is stable beyond SGD's 2/α, and on this problem best there."""
    spectrum = 1 / LAW
    problem, family = Quadratic(spectrum, spectrum, start=3.0), AT_A_HORIZON["Schedule-Free"]
    wide = dataclasses.replace(family, box=family.box | {"lr": (1e-4, 20.0)})
    found = best_at_a_horizon(family, problem, 30).loss
    assert found < 1.01 * best_at_a_horizon(wide, problem, 30).loss


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        (0, "steps must be in [1, inf), got 0, 1 below"),
        (-3, "steps must be in [1, inf), got -3, 4 below"),
        (math.inf, "steps must be finite numbers"),
    ],
)
def test_no_steps_are_refused(steps, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        best_at_a_horizon(AT_A_HORIZON["SGD"], ONE, steps)


# ---- the floor and the nesting ------------------------------------------------------------------


def filtered(problem, steps):
    """Excess loss of the Kalman filter's prediction, and its gains: a step at a time."""
    n = problem.size
    seen, drift = problem.noise / problem.curvature**2, np.broadcast_to(problem.drift, (n,))
    variance, gains = np.broadcast_to(problem.start**2, (n,)), []
    for _ in range(steps):
        gain = variance / (variance + seen)
        gains.append(gain)
        variance = (1 - gain) ** 2 * variance + gain**2 * seen + drift
    return (problem.curvature * variance).sum() / 2, gains


@pytest.mark.parametrize("problem", [SPECTRUM, MOVING, Quadratic(3.0, 0.2, 0.5)])
def test_floor_is_the_kalman_filter(problem):
    """In the limit, with the last move unseen; and SGD at the filter's own rates attains it."""
    best, gains = filtered(problem, 10000)
    assert floor(problem) == pytest.approx(best, rel=1e-12)
    limit = quadratic.limit(Pull(gains[-1] / problem.curvature), problem)
    assert problem.loss(limit.second(problem)) == pytest.approx(best, rel=1e-9)
    # what stands still is found in the end
    assert floor(Quadratic(problem.curvature, problem.noise)) == 0


@pytest.mark.parametrize("steps", [1, 7, 50])
def test_floor_at_a_horizon_is_bayes_rule(steps):
    """Of T looks and a start of known variance; SGD at the filter's rates attains it."""
    problem = Quadratic([1.0, 0.3, 0.05], [1.0, 0.5, 0.04], 0.0, [3.0, 5.0, 8.0])
    best, gains = filtered(problem, steps)
    assert floor(problem, steps) == pytest.approx(best, rel=1e-12)
    method = Pull(lambda k: gains[k - 1] / problem.curvature)
    assert after(method, problem, steps) == pytest.approx(best, rel=1e-10)


def test_floor_is_below_all_of_them_in_the_limit():
    for problem in (SPECTRUM, Quadratic(0.5, 2.0, 0.3), Quadratic([1.0, 0.01], [0.1, 5.0], 1e-2)):
        for family in IN_THE_LIMIT.values():
            assert best_in_the_limit(family, problem).loss >= floor(problem) * (1 - 1e-12)


def test_frontier_tells_each_what_it_contains():
    calls = []

    def best(family, problem, *limits, known=None):
        calls.append((family, problem, limits, known))
        return Best(float(len(calls)), {"lr": 1.0})

    found = best_of_each(IN_THE_LIMIT, best, ONE, 5.0)
    assert list(found) == list(IN_THE_LIMIT)
    assert [x.loss for x in found.values()] == [1, 2, 3, 4, 5, 6, 7]
    for family, problem, limits, known in calls:
        assert problem is ONE
        assert limits == (5.0,)
        assert known is (found[family.contains] if family.contains else None)
    assert [family for family, *_ in calls] == list(IN_THE_LIMIT.values())


@pytest.mark.parametrize("life", [5.0, 100.0])
def test_what_contains_another_is_not_worse(life):
    """At a half-life, too, where the least of a further parameter may be too slow by a hair."""
    names = ("EMA", "pull, one gain", "Adam, EMA", "Adam with ε, EMA", "PACE")
    problem = Quadratic([1.0, 0.1])
    found = best_of_each({n: IN_THE_LIMIT[n] for n in names}, best_in_the_limit, problem, life)
    for name in names:
        inner = IN_THE_LIMIT[name].contains
        if inner:
            assert found[name].loss <= found[inner].loss * (1 + 1e-9), name
