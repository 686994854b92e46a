"""The experiment of benchmarks/saturated.py: its ends are the library's pull and its twin."""

import importlib
import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from paceline.train.methods import parse_method


@pytest.fixture(scope="module")
def regret():
    """Imported here, for what it imports takes seconds."""
    return importlib.import_module("regret")


@pytest.fixture(scope="module")
def saturated(regret):
    return importlib.import_module("saturated")


def trained(saturated, regret, variant, steps=40, seed=0):
    problem, other = (regret.TASKS["digits-mlp"].start(0) for _ in range(2))
    return saturated.train(problem, variant, 0.02, steps, 5, seed, other), problem


def judged(problem, weights):
    with torch.no_grad():
        vector_to_parameters(weights, problem.parameters)
        return problem.judge()


@pytest.mark.parametrize(
    ("name", "method", "average"),
    [
        ("pull (lead 1)", "pace:gain=scalar:pullback=1:kappa=0.3:lr=0.02", "k30"),
        ("twin (lead 0)", "adamw:power:kappa=0.3:lr=0.02", "live"),
    ],
)
def test_the_ends_are_the_librarys(saturated, regret, name, method, average):
    """What is returned, and y: the pull's own average, or the twin's live weights."""
    found, problem = trained(saturated, regret, saturated.VARIANTS[name])
    expected = regret.train(regret.TASKS["digits-mlp"].start(0), parse_method(method), 40, 5)
    assert judged(problem, found["returned"]) == pytest.approx(expected["k70"], abs=1e-5)
    assert judged(problem, found["y"]) == pytest.approx(expected[average], abs=1e-5)


def by_hand(regret, steps, lead, first="x", second="x", momentum=0.9):
    """y, spelled out: gradients of the first and the second moment at x or y, lead of each step."""
    problem, other = (regret.TASKS["digits-mlp"].start(0) for _ in range(2))
    y = parameters_to_vector(problem.parameters).detach()
    x, m, v = y, 0, 0
    for t in range(1, steps + 1):
        g = {}
        for name, copy, at in (("x", problem, x), ("y", other, y)):
            vector_to_parameters(at, copy.parameters)
            grads = torch.autograd.grad(copy.loss(), copy.parameters)
            flat = torch.cat([p.flatten() for p in grads])
            g[name] = flat * min(1.0, 1 / (float(flat.norm()) + 1e-6))
        m = momentum * m + (1 - momentum) * g[first]
        v = 0.999 * v + 0.001 * g[second] ** 2
        s = m / (1 - momentum**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8) + 0.01 * x
        beta, lr = (1 + t) ** -0.3, 0.02 * min(1, (t - 1) / 5)
        y = y - beta * lr * s
        x = y - lead(t) * (1 - beta) * lr * s
    return y


CHANGES = {  # of the variant, and by hand
    "lead 0.5": {"lead": lambda t: 0.5},
    "lead -1": {"lead": lambda t: -1},
    "first third": {"lead": lambda t: float(t <= 10)},
    "last two thirds": {"lead": lambda t: float(t > 10)},
    "only v ahead": {"lead": lambda t: 1, "first": "y"},
    "only m ahead": {"lead": lambda t: 1, "second": "y"},
    "no momentum, pull": {"lead": lambda t: 1, "momentum": 0.0},
}


@pytest.mark.parametrize("name", CHANGES)
def test_each_change_by_hand(saturated, regret, name):
    found, _ = trained(saturated, regret, saturated.VARIANTS[name], steps=30)
    expected = by_hand(regret, 30, **CHANGES[name])
    plain = by_hand(regret, 30, lambda t: 1)
    # Rounding moves single coordinates with hardly a gradient by up to a step of Adam.
    assert torch.isclose(found["y"], expected, rtol=1e-3, atol=2e-4).float().mean() > 0.999
    assert torch.isclose(plain, expected, rtol=1e-3, atol=2e-4).float().mean() < 0.5


def test_random_signs_are_of_the_same_size(saturated, regret):
    """A lead of one step in both; and the signs follow the seed."""
    plain, signed = (saturated.VARIANTS[name] for name in ("pull (lead 1)", "random signs"))
    after = [
        trained(saturated, regret, x, steps=2, seed=s)[0] for x, s in ((plain, 0), (signed, 0))
    ]
    # After two steps x = y - lead; the average of x has moved by β_2·(x - start) beyond the start's
    leads = [(x["returned"] - x["of y"]).abs() for x in after]
    torch.testing.assert_close(*leads, rtol=1e-3, atol=1e-7)
    other = trained(saturated, regret, signed, steps=2, seed=1)[0]
    share = (after[1]["returned"] == other["returned"]).float().mean()
    assert 0.4 < float(share) < 0.6


def test_tables_choose_on_one_half_and_report_the_other(saturated, tmp_path, monkeypatch):
    random, rows = np.random.default_rng(0), []
    monkeypatch.setattr(saturated, "TASKS", {"finetune": None})
    for name in saturated.VARIANTS:
        for lr, seed in ((lr, seed) for lr in (0.01, 0.018) for seed in range(5)):
            chosen = 1.0 if lr == 0.018 else 2.0
            row = {"returned:choose": chosen, "returned:report": random.normal(3, 0.1)}
            rows.append(["finetune", name, lr, seed, *row.values(), 1.5, 0.25])
    columns = [*saturated.CELL, "returned:choose", "returned:report", "of y:report", "rise"]
    frame = pd.DataFrame(rows, columns=columns)
    frame.to_csv(tmp_path / "losses.csv", index=False)
    lines = saturated.tables(tmp_path / "losses.csv").splitlines()
    line = next(x for x in lines if x.startswith("| lead 2 |"))

    def losses(name):
        found = frame[(frame.variant == name) & (frame.lr == 0.018)]
        return found["returned:report"].to_numpy()

    loss = losses("lead 2")
    apart = loss - losses("twin (lead 0)")
    half = stats.t.ppf(0.975, 4) * apart.std(ddof=1) / math.sqrt(5)
    written = f"{apart.mean():+.4f} [{apart.mean() - half:+.4f}, {apart.mean() + half:+.4f}]"
    assert line.startswith(f"| lead 2 | 0.018 | {loss.mean():.4f} | {written} |")
    assert line.endswith("| 1.5000 | 0.2500 |")


def test_what_ran_is_not_run_again(saturated, tmp_path, monkeypatch):
    calls = []

    def measure(*cell):
        calls.append(cell)
        return {"returned:choose": 1.0}

    monkeypatch.setattr(saturated, "measure", measure)
    monkeypatch.setattr(saturated, "SEEDS", range(1))
    saturated.run(tmp_path / "new" / "losses.csv")
    first, calls[:] = list(calls), []
    assert len(first) == len(set(first)) == 32 + 28
    lines = (tmp_path / "new" / "losses.csv").read_text().splitlines()
    (tmp_path / "new" / "losses.csv").write_text("\n".join(lines[:-3]) + "\n")
    saturated.run(tmp_path / "new" / "losses.csv")
    assert calls == first[-3:]
