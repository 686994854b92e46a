"""Averages rebuilt from others, against those computed from the stored iterates."""

import math
import re
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch.nn import Parameter

import paceline
from paceline import PACE, Averaging, Snapshot, snapshot_steps, synthesis, synthesize
from paceline.averaging import EMA, SWA, PowerEMA, Uniform, parse

LIVE = "ema:beta=1"
RULES = [
    *("ema:kappa=0.5", "ema:kappa=0.9:rate=2:start=4", "ema:kappa=0.3:every=3", "ema:kappa=0"),
    *("ema:half_life=7", "ema:beta=0.3:every=4", LIVE),
    *("uniform", "uniform:start=5", "swa:start=4:every=3", "ema:kappa=1:rate=1e6"),
]


def shares_by_recursion(rule, step, steps, begun=0):
    """How much of θ_0 to θ_k is in the average at the step: the rule's own updates, summed up."""
    iterates = torch.eye(steps + 1, dtype=torch.float64)
    average = iterates[begun].clone()
    for t in range(begun + 1, step + 1):
        rule.update_(t, [iterates[t]], [average], [{}])
    return average.cumsum(0)[:-1].numpy()


@pytest.mark.parametrize("begun", [0, 6])
def test_shares_are_those_of_the_recursion(begun, monkeypatch):
    """In float64, to rounding; also where chunks end within them."""
    monkeypatch.setattr(synthesis, "CHUNK", 7)
    snapshots = [Snapshot(rule, step, begun) for rule in RULES for step in (6, 7, 20, 30)]
    found = torch.cat(list(synthesis._Shares(30).chunks(snapshots))).numpy()
    assert found.shape == (30, len(snapshots))
    for x, column in zip(snapshots, found.T, strict=True):
        direct = shares_by_recursion(x.rule, x.step, 30, begun)
        np.testing.assert_allclose(column, direct, rtol=1e-12, atol=1e-13, err_msg=str(x))


@pytest.mark.parametrize("rule", [x for x in RULES if x != LIVE])
def test_an_average_is_rebuilt_from_the_one_before_and_the_live_weights(rule):
    """What an average is made of, at a step that takes in."""
    weight = parse(rule).weight(24)
    found = synthesize([Snapshot(rule, 23), Snapshot(LIVE, 24)], rule, 24, noise=0.0)
    # κ = 0 is the live weights, and swa took none in at this step
    np.testing.assert_allclose(found.weights, [1 - weight, weight], atol=1e-9)
    assert found.error < 1e-9


def test_a_later_start_is_a_difference_of_means():
    kept = [Snapshot("uniform", 10), Snapshot("uniform", 30), Snapshot("ema:kappa=0.5", 30)]
    found = synthesize(kept, Uniform(10), noise=0.0)
    np.testing.assert_allclose(found.weights, [-0.5, 1.5, 0.0], atol=1e-9)


def test_what_was_kept_is_taken_as_it_is():
    kept = [Snapshot(rule, step) for rule in ("ema:kappa=0.5", "uniform") for step in (20, 40)]
    assert synthesize(kept, "uniform").weights == (0, 0, 0, 1)
    assert synthesize(kept, "uniform").error == 0
    assert synthesize(kept, PowerEMA(0.5), 20).weights == (1, 0, 0, 0)
    # another rule that is the same average
    assert synthesize([*kept, Snapshot(LIVE, 40)], "ema:kappa=0").weights == (0, 0, 0, 0, 1)


def by_normal_equations(snapshots, target, at, noise):
    """The weights from the shares of the recursion, with a multiplier for their sum."""
    steps, n = max(at, *(x.step for x in snapshots)), len(snapshots)
    f = np.stack([shares_by_recursion(x.rule, x.step, steps) for x in snapshots])
    t = shares_by_recursion(parse(target), at, steps)
    matrix = np.ones((n + 1, n + 1))
    matrix[:n, :n] = f @ f.T + noise**2 * np.eye(n)
    matrix[n, n] = 0
    return np.linalg.solve(matrix, [*(f @ t), 1])[:n], t - f.T @ np.linalg.solve(
        matrix, [*(f @ t), 1]
    )[:n]


@pytest.mark.parametrize("noise", [1e-3, 0.3])
@pytest.mark.parametrize(
    ("target", "at"), [("ema:kappa=0.7", 60), ("ema:half_life=9", 50), ("uniform:start=20", 60)]
)
def test_weights_are_the_least_squares(target, at, noise, monkeypatch):
    monkeypatch.setattr(synthesis, "CHUNK", 13)
    kept = [Snapshot(f"ema:kappa={k}", s) for k in (0.5, 0.9) for s in (20, 40, 60)]
    found = synthesize(kept, target, at, noise=noise, limit=math.inf)
    weights, residual = by_normal_equations(kept, target, at, noise)
    np.testing.assert_allclose(found.weights, weights, rtol=1e-6, atol=1e-7)
    assert sum(found.weights) == pytest.approx(1, abs=1e-12)
    live = shares_by_recursion(EMA(1.0), at, 60)
    far = shares_by_recursion(parse(target), at, 60) - live
    walk = (residual**2).sum() / (far**2).sum()
    rounding = noise**2 * (weights**2).sum() / (far**2).sum()
    assert found.error**2 >= walk + rounding - 1e-12


# ---- the error that is expected ---------------------------------------------------------------


def iterates(process, steps, dims=1500):
    """Weights after each step, of many coordinates."""
    generator = np.random.default_rng(0)
    noise = generator.normal(size=(steps + 1, dims))
    ages = np.arange(1, steps + 2)[:, None]
    if process == "walk":
        return noise.cumsum(0)
    if process == "slowing":
        return (noise / np.sqrt(np.maximum(ages - 1, 1))).cumsum(0)
    if process == "drift and noise":
        return 0.1 * ages * generator.normal(size=dims) + noise
    if process == "approach and noise":  # half the way in a twentieth of the run
        return 0.5 ** (20 * ages / steps) * 3 * generator.normal(size=dims) + noise
    kept = 0.0 if process == 0 else math.exp(-1 / process)
    x = [noise[0]]
    for one in noise[1:]:
        x.append(kept * x[-1] + math.sqrt(1 - kept**2) * one)
    return np.stack(x)


PROCESSES = ["walk", "slowing", "drift and noise", "approach and noise", 0, 4, 16, 64, 256]
KEPT = [Snapshot(f"ema:kappa={k}", s) for k in (0.5, 0.9) for s in range(60, 601, 60)]


def measured(found, kept, target, steps, process):
    """The error of the rebuilt average, from the iterates themselves."""
    path = iterates(process, steps)
    wanted = parse(target).coefficients(steps).numpy() @ path
    tensors = [x.rule.coefficients(x.step).numpy() @ path[: x.step + 1] for x in kept]
    rebuilt = sum(a * x for a, x in zip(found.weights, tensors, strict=True))
    return np.linalg.norm(rebuilt - wanted) / np.linalg.norm(wanted - path[-1])


@pytest.mark.parametrize(
    "target", ["ema:kappa=0.6", "ema:half_life=100", "ema:half_life=50", "uniform:start=300"]
)
def test_the_expected_error_is_the_largest_of_those_measured(target):
    """It covers each process, to sampling, and none of them by much too much."""
    found = synthesize(KEPT, target, limit=math.inf)
    errors = [measured(found, KEPT, target, 600, process) for process in PROCESSES]
    assert max(errors) < 1.25 * found.error
    assert max(errors) > 0.75 * found.error


def test_errors_of_a_table():
    """Those of docs/choose.md: 10 snapshots over 600 and 3,000 steps, evenly and as advised."""
    rows = {
        (600, "even"): [1.4, 0.8, 0.3],
        (3000, "even"): [6.8, 3.3, 0.9],
        (3000, "as advised"): [0.8, 0.9, 0.6],
    }
    for (steps, spacing), expected in rows.items():
        even = [steps * i // 10 for i in range(1, 11)]
        times = even if spacing == "even" else snapshot_steps(steps, 10)
        kept = [Snapshot(f"ema:kappa={k}", s) for k in (0.5, 0.9) for s in times]
        for kappa, error in zip((0.6, 0.7, 0.8), expected, strict=True):
            found = synthesize(kept, PowerEMA(kappa), limit=math.inf)
            assert 100 * found.error == pytest.approx(error, abs=0.06)
            assert sum(map(abs, found.weights)) < 10


def test_single_iterates_are_not_to_be_had():
    """An average of every 50th iterate jitters as they do, which the sum of all does not show."""
    found = synthesize(KEPT, SWA(300, 50), limit=math.inf)
    assert found.error > 0.3
    assert measured(found, KEPT, "swa:start=300:every=50", 600, 0) > 0.3
    assert measured(found, KEPT, "swa:start=300:every=50", 600, "walk") < 0.12


def test_a_long_run():
    """A million steps, some thousand at a time."""
    kept = [Snapshot(f"ema:kappa={k}", s) for k in (0.5, 0.6) for s in snapshot_steps(10**6, 6)]
    rows = [len(x) for x in synthesis._Shares(10**6).chunks(kept[:1])]
    assert sum(rows) == 10**6
    assert max(rows) <= synthesis.CHUNK
    assert 0.02 < synthesize(kept, "ema:kappa=0.51").error < 0.05


# ---- snapshots of an optimizer ----------------------------------------------------------------


def run(param, steps, kept_at, **options):
    """What an optimizer keeps at some steps, and at the end."""
    torch.manual_seed(0)
    other = Parameter(torch.zeros(1))  # which steps while the first stands still
    opt = PACE([param, other], lr=1e-2, pullback=0.1, fused=False, **options)
    curvature, snapshots = torch.logspace(-2, 0, param.numel()), []
    for step in range(1, steps + 1):
        param.grad = (curvature * param.detach().float() + torch.randn(param.shape)).to(param.dtype)
        if step % 7 == 3:
            param.grad = None  # it stands still, and its averages go on
        other.grad = torch.ones(1)
        opt.step()
        if step in kept_at:
            state = opt.state[param]
            assert state["step"] + state["idle_steps"] == step
            snapshots.append({k: x.clone() for k, x in state.items() if k.startswith("return_")})
    return opt, snapshots


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_averages_of_an_optimizer_are_rebuilt(dtype):
    """Through idle steps and `every`, from float32 and bfloat16 snapshots, to what is expected."""
    returns = {"a": "ema:kappa=0.5", "b": "ema:kappa=0.9:every=2", "c": "ema:kappa=0.7"}
    steps = snapshot_steps(400, 10)
    param = Parameter(torch.ones(3000))
    opt, snapshots = run(param, 400, steps, returns=returns)
    kept = [Snapshot(returns[name], step) for name in "ab" for step in steps]
    tensors = [x[f"return_{name}"] for name in "ab" for x in snapshots]
    average = opt.state[param]["return_c"]
    far = (average - param.detach()).norm()
    roundings = [(x.to(dtype).double() - x).square().mean() for x in tensors]
    move = (tensors[9] - tensors[19]).double().square().mean().sqrt()
    apart = [shares_by_recursion(x.rule, x.step, 400) for x in (kept[9], kept[19])]
    noise = math.sqrt(sum(roundings) / 20) / float(move) * np.linalg.norm(apart[0] - apart[1])
    found = synthesize(kept, returns["c"], noise=max(noise, 1e-4), limit=math.inf)
    rebuilt = sum(a * x.to(dtype).double() for a, x in zip(found.weights, tensors, strict=True))
    error = float((rebuilt - average).norm() / far)
    assert error < 1.25 * found.error
    if dtype == torch.float32:
        assert found.error < 0.05  # of the jitter, from every second step alone
    else:
        plain = synthesize(kept, returns["c"], limit=math.inf)
        mixed = sum(a * x.to(dtype).double() for a, x in zip(plain.weights, tensors, strict=True))
        assert error < float((mixed - average).norm() / far)  # it is what the ridge is for


# ---- when to keep, and what is refused --------------------------------------------------------


def test_steps_to_keep():
    assert snapshot_steps(600, 10) == [114, 216, 306, 384, 450, 504, 546, 576, 594, 600]
    assert snapshot_steps(5, 12) == [1, 2, 3, 4, 5]
    assert snapshot_steps(7, 1) == [7]
    for steps, count in ((0, 3), (3, 0), (2.5, 1), (3, True)):
        with pytest.raises(ValueError, match=r"must be a whole number >= 1, got"):
            snapshot_steps(steps, count)


def test_more_can_be_rebuilt_from_the_advised_steps_than_from_even_ones():
    def worst(steps):
        kept = [Snapshot(f"ema:kappa={k}", s) for k in (0.3, 0.9) for s in steps]
        targets = [PowerEMA(k) for k in (0.4, 0.5, 0.6, 0.7, 0.8, 0.95)]
        return max(synthesize(kept, x, limit=math.inf).error for x in targets)

    assert worst(snapshot_steps(3000, 10)) < 0.051
    assert worst([300 * i for i in range(1, 11)]) > 0.3


FAST = [Snapshot(f"ema:kappa={k}", s) for k in (0.3, 0.9) for s in range(60, 601, 60)]


@pytest.mark.parametrize(
    ("target", "nearest"),
    [
        ("ema:kappa=0.4", "ema:kappa=0.3"),
        ("ema:half_life=3", "ema:half_life=4.2"),
        ("ema:beta=0.5", "ema:beta=0.15"),
        ("uniform:start=550", "uniform:start=540"),
        ("swa:start=300:every=50", None),
    ],
)
def test_what_cannot_be_rebuilt_is_refused_with_the_nearest_that_can(target, nearest):
    ends = f"nearest that can: {nearest}" if nearest else "none like it can"
    with pytest.raises(ValueError, match=rf"cannot be rebuilt .* {re.escape(ends)}$"):
        synthesize(FAST, target)
    if nearest:
        assert synthesize(FAST, nearest).error <= synthesis.LIMIT
        assert synthesize(FAST, target, limit=math.inf).error > synthesis.LIMIT


@dataclass(frozen=True)
class Louder(Averaging):
    name: ClassVar[str] = "louder"

    def falloff(self, step):
        return 1.0

    def weight(self, step):
        return 1.5


@dataclass(frozen=True)
class Rising(Averaging):
    name: ClassVar[str] = "rising"

    def falloff(self, step):
        return 2.0 / (step + 1.0)

    def weight(self, step):
        return self.falloff(step)


def test_a_rule_of_ones_own():
    kept = [Snapshot(Rising(), 29), Snapshot(LIVE, 30)]
    np.testing.assert_allclose(synthesize(kept, Rising(), 30, noise=0).weights, [29 / 31, 2 / 31])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: synthesize([], "uniform"), "snapshots must be one or more, got none"),
        (
            lambda: synthesize([Snapshot("uniform", 3), Snapshot(Uniform(), 3)], "uniform"),
            "snapshots must differ, got uniform at step 3 twice",
        ),
        (lambda: Snapshot("lawa:window=3", 9), "keeps more tensors than its average: nothing"),
        (lambda: synthesize(FAST, "bema"), "keeps more tensors than its average: nothing"),
        (lambda: synthesize(FAST, Louder()), r"louder has weights that are not in \[0, 1\]"),
        (lambda: Snapshot("uniform", -1), "step must be a whole number"),
        (lambda: Snapshot("uniform", 2.0), "step must be a whole number"),
        (lambda: Snapshot("uniform", 10**9), "step must be a whole number"),
        (lambda: Snapshot("uniform", 3, 4), "step must be a whole number"),
        (lambda: Snapshot("median", 3), "unknown average 'median'"),
        (lambda: synthesize(FAST, "uniform", 0), "at must be a step >= 1, got 0"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_what_is_public():
    assert {"Snapshot", "Synthesis", "snapshot_steps", "synthesize"} <= set(paceline.__all__)
