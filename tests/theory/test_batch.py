"""Batch sizes on the noisy quadratic, against a recursion of our own, and what is published."""

from itertools import islice, product

import numpy as np
import pytest

pytest.importorskip("scipy")

from recursions import linear_maps, pull, schedule_free

from paceline.theory import batch
from paceline.theory.batch import (
    COARSE,
    HEAVY,
    KAPPA,
    METHODS,
    SATURATED,
    SCHEDULE,
    SGD,
    Best,
    Found,
    GridMethod,
    Spectrum,
    best_by_batch,
    best_of_each,
    learning_rate,
    pays_up_to,
    perfect_up_to,
    power_law,
    useful_up_to,
)
from paceline.theory.quadratic import Pull, Quadratic, ScheduleFree, moments

# ---- against a recursion written out -------------------------------------------------------------


def rule(x):
    """The method of one candidate, on weights."""
    if "mu" in x:
        top = x["share"] * 2 / (1 - x["mu"])
        return schedule_free(lambda k: top * min(1, k / x["warmup"]), x["mu"])
    mu = x.get("momentum", 0)
    top = x["share"] * 2 * (1 + mu) / (1 - mu)
    fall = x["kappa"] if "same" in x else x.get("fall", 0)
    return pull(lambda k: top * k**-fall, lambda k: k ** -x.get("kappa", 0), x.get("gain", 0), mu)


def losses(x, coordinates, size, steps):
    """Expected excess losses after 0 ... steps, by each coordinate's mean and covariance."""
    total = np.zeros(steps + 1)
    for i in range(1, coordinates + 1):
        mean, cov = np.array([1.0, 1.0, 0.0]), np.zeros((3, 3))
        total[0] += 0.5 / i
        for k in range(1, steps + 1):
            a, b, _ = linear_maps(rule(x), k, np.array([[1 / i]]))
            mean, cov = a @ mean, a @ cov @ a.T + b @ b.T / (i * size)
            total[k] += 0.5 / i * (mean[1] ** 2 + cov[1, 1])
    return total


GRIDS = {
    "SGD": {"share": (0.2, 0.7, 1.1)},
    "momentum": {"share": (0.1, 0.4), "momentum": (0.0, 0.8)},
    "pull": {"share": (0.3, 0.9), "kappa": (0.5,), "gain": (0.0, 0.4), "momentum": (0.7,)},
    "power": {"share": (0.4, 1.6), "kappa": (0.8,), "fall": (0.0, 0.5)},
    "its schedule": {"share": (0.4, 0.8), "kappa": (0.3, 0.6), "same": (1.0,)},
    "Schedule-Free": {"share": (0.3, 0.8), "mu": (0.0, 0.8), "warmup": (1, 4)},
}


@pytest.mark.parametrize("name", GRIDS)
def test_bests_are_those_of_the_recursion_written_out(name):
    grid, coordinates, horizon, steps = GRIDS[name], 3, 12, 25
    make = METHODS["Schedule-Free" if "mu" in grid else SGD].make
    sizes, target = (0.5, 4.0, 1000.0), 0.25
    found = best_by_batch(
        GridMethod(grid, make, SGD), power_law(coordinates), sizes, target, horizon, steps
    )
    reached = 0
    for size, fewest, least in zip(sizes, *found, strict=True):
        quickest, lowest = np.inf, np.inf
        for point in product(*grid.values()):
            path = losses(dict(zip(grid, point, strict=True)), coordinates, size, steps)
            survives = np.cumsum(path > path[0] * (1 + 1e-12)) == 0
            below = np.flatnonzero(survives & (path <= target * path[0]))
            quickest = min([quickest, *below])
            if survives[horizon]:
                lowest = min(lowest, path[horizon])
        if lowest < np.inf:
            np.testing.assert_allclose(least.value, lowest, rtol=1e-9)
            path = losses(least.parameters, coordinates, size, horizon)
            np.testing.assert_allclose(least.value, path[-1], rtol=1e-9)
        else:  # none survives
            assert np.isnan(least.value)
        if quickest < np.inf:
            reached += 1
            assert fewest.value == quickest
            path = losses(fewest.parameters, coordinates, size, int(quickest))
            assert path[-1] <= target * path[0] < path[:-1].min()
        else:
            assert np.isnan(fewest.value)
            assert fewest.parameters == {}
    assert reached  # or the test saw nothing


def test_a_candidate_that_blows_up_first_is_left_out():
    # At 2.4 times the largest stable rate the first step multiplies the weights by 3.8, and the
    # falling rate brings them back, to a lower loss than any other candidate's.
    grid = {"share": (0.1, 2.4), "fall": (1.0,)}
    spectrum = power_law(1)
    found = best_by_batch(GridMethod(grid, METHODS[SGD].make, SGD), spectrum, [1e6], 0.7, 40)
    path = losses({"share": 2.4, "fall": 1.0}, 1, 1e6, 40)
    assert path[1] > path[0] > 100 * path[-1]
    assert found.loss[0].parameters["share"] == 0.1
    assert path[-1] < found.loss[0].value


# ---- the spectrum --------------------------------------------------------------------------------


def test_few_coordinates_are_themselves():
    spectrum = power_law(40)
    np.testing.assert_array_equal(spectrum.counts, 1)
    np.testing.assert_allclose(spectrum.problem.curvature, 1 / np.arange(1, 41))
    np.testing.assert_array_equal(spectrum.problem.noise, spectrum.problem.curvature)


@pytest.mark.parametrize(
    ("method", "within"),
    [
        (Pull(1.915), 2e-4),
        (Pull(2.0, lambda k: k**-0.7), 2e-4),
        (Pull(49.0, lambda k: k**-0.9, 0.01, 0.95), 1e-2),
        (Pull(49.0, 1.0, 0.0, 0.95), 1e-2),
        (ScheduleFree(lambda k: 158 * min(1, k / 80), 0.995), 1e-2),
    ],
)
def test_the_sum_over_ten_thousand_is_that_of_all(method, within):
    index = np.arange(1.0, 10_001)
    full = Spectrum(Quadratic(1 / index, noise=1 / index), np.ones(10_000))
    short = power_law(10_000)
    assert len(short.counts) == batch.LEADING + batch.NODES
    for k, *states in zip(
        range(101), *(moments(method, x.problem) for x in (short, full)), strict=False
    ):
        if k in (1, 20, 60, 100):
            for size in (8, 16384):
                found, expected = (
                    spectrum.loss(x.mean[-1] ** 2) + spectrum.loss(x.cov[-1, -1]) / size
                    for spectrum, x in zip((short, full), states, strict=True)
                )
                np.testing.assert_allclose(found, expected, rtol=within)


# ---- what is published, and what is ours ---------------------------------------------------------


@pytest.fixture(scope="module")
def steps():
    """Steps to a tenth of the start's loss on 1,000 coordinates, on thinner grids."""
    sizes, spectrum = (4, 16, 64, 4096), power_law(1000)
    shares = {"share": (*2.0 ** np.arange(-6, 0, 0.5), 0.92, 0.96)}
    high = {"share": (0.25, 0.35, 0.5, 0.7, 1.0)}
    momentum = {"momentum": (0.0, 0.9)}
    grids = {
        SGD: shares,
        "EMA": high | {"kappa": (0.3, 0.6, 0.8, 0.9)},
        HEAVY: shares | momentum,
        "EMA, momentum": high | {"kappa": (0.0, 0.8, 1.0)} | momentum,
        SATURATED: high | {"kappa": (0.0, 0.4, 0.6)} | momentum | {"gain": (1.0,)},
        SCHEDULE: high | {"kappa": (0.0, 0.4, 0.6)} | momentum | {"same": (1.0,)},
    }
    found = {
        name: best_by_batch(METHODS[name]._replace(grid=grid), spectrum, sizes, 0.1, 30)
        for name, grid in grids.items()
    }
    return {name: np.array([x.value for x in each.steps]) for name, each in found.items()}


def test_scaling_is_perfect_at_small_batches_and_ends_at_large_ones(steps):
    first, second, third, last = steps[HEAVY]
    assert 3.6 < first / second < 4.4  # of 4; the grid of rates is coarse
    assert third / last < 8  # of 64
    first, _, third, last = steps[SGD]
    assert first / third < 8  # of 16: it ends sooner without momentum
    assert third / last < 2


def test_momentum_helps_at_large_batches_and_hardly_at_small_ones(steps):
    ratio = steps[SGD] / steps[HEAVY]
    assert 1 <= ratio[0] < 1.5
    assert ratio[-1] > 3
    assert (np.diff(ratio) > 0).all()


@pytest.mark.parametrize(("ema", "base"), [("EMA", SGD), ("EMA, momentum", HEAVY)])
def test_an_average_helps_at_small_batches_and_hardly_at_large_ones(steps, ema, base):
    left = steps[ema] / steps[base]
    assert left[0] < 0.6
    assert left[-1] > 0.85


def test_the_gradient_a_step_ahead_saves_steps_with_momentum(steps):
    ratio = steps[SATURATED] / steps[SCHEDULE]
    assert ratio[0] < 0.95
    assert ratio[-1] == 1  # at large batches the best of both is no average


# ---- regimes, edges, and what contains what ------------------------------------------------------


def test_regimes_of_a_curve():
    sizes = [1, 2, 4, 8, 16]
    curve = [100, 50, 29, 26, 25]
    assert perfect_up_to(sizes, curve) == 4  # 116 examples
    assert useful_up_to(sizes, curve) == 4  # 29 <= 30
    assert np.isnan(perfect_up_to(sizes, [np.nan] * 5))
    assert np.isnan(useful_up_to(sizes, [np.nan] * 5))
    assert pays_up_to(sizes, [94, 47, 29, 20, 20], curve) == 2  # not again after 4
    assert np.isnan(pays_up_to(sizes, curve, curve))


def test_a_best_at_the_edge_of_its_grid_says_so_but_not_at_the_end_of_its_range():
    method = GridMethod({"share": (0.02, 0.04)} | KAPPA, METHODS[SGD].make, SGD)
    [best] = best_by_batch(method, power_law(5), [1e6], 0.5, 5).loss
    assert best.parameters == {"share": 0.04, "kappa": 0.0}
    assert best.edges == ["share at the top"]
    method = GridMethod({"share": (0.5, 0.9)}, METHODS[SGD].make, SGD)
    [best] = best_by_batch(method, power_law(1), [1e6], 0.5, 5).loss
    assert best.edges == ["share at the bottom"]


def test_no_method_is_worse_than_the_one_that_it_contains(monkeypatch):
    own = {
        "a": Found(
            [Best(5, {"x": 1}), Best(np.nan, {})], [Best(0.5, {"x": 3}), Best(0.1, {"x": 4})]
        ),
        "b": Found(
            [Best(6, {"x": 5}), Best(7, {"x": 2})], [Best(0.4, {"x": 6}), Best(0.2, {"x": 7})]
        ),
    }
    monkeypatch.setattr(batch, "best_by_batch", lambda method, *_: own[method.base])
    methods = {x: GridMethod({}, None, x, "a" if x == "b" else None) for x in "ab"}
    found = best_of_each(methods, power_law(1))
    assert found["a"] == own["a"]
    assert [x.value for x in found["b"].steps] == [5, 7]
    assert [x.value for x in found["b"].loss] == [0.4, 0.1]


def test_what_a_method_contains_comes_before_it_and_grids_ascend():
    for i, (name, method) in enumerate(METHODS.items()):
        assert method.contains is None or list(METHODS).index(method.contains) < i, name
        assert METHODS[method.base].base == method.base
        for values in method.grid.values():
            assert list(values) == sorted(set(values))
    assert min(COARSE["kappa"]) > 0


def test_the_learning_rate_is_a_share_of_the_largest_stable_one():
    for mu in (0.0, 0.5, 0.9):
        lr = learning_rate({"share": 1.0, "momentum": mu})
        for factor, stable in ((0.999, True), (1.001, False)):
            a = linear_maps(pull(factor * lr, 1.0, 0.0, mu), 1, np.eye(1))[0][::2, ::2]
            assert (abs(np.linalg.eigvals(a)).max() < 1) == stable
    np.testing.assert_allclose(learning_rate({"share": 0.5, "mu": 0.75}), 4)
    assert np.isnan(learning_rate({}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batches": [1, 0]}, "batches must be in (0, inf), got 0"),
        ({"target": 1}, "target must be in (0, 1), got 1"),
        ({"horizon": 0}, "horizon must be in [1, inf), got 0"),
        ({"horizon": 9, "longest": 8}, "longest must be in [9, inf), got 8"),
    ],
)
def test_refuses_what_is_out_of_range(options, message):
    given = {"batches": [1], "target": 0.5, "horizon": 3} | options
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the message is the match
        best_by_batch(METHODS[SGD], power_law(3), **given)
    assert message in str(caught.value)
    with pytest.raises(ValueError, match=r"coordinates must be in \[1, inf\), got 0"):
        power_law(0)


def test_steps_beyond_the_longest_are_not_reached():
    [fewest] = best_by_batch(METHODS[SGD], power_law(100), [1], 1e-6, 3, longest=5).steps
    assert np.isnan(fewest.value)
    first = next(islice(moments(Pull(1.0), power_law(3).problem), 1, None))
    assert first.mean.shape == (2, 3)
