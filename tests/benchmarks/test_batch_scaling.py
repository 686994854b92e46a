"""The experiment of benchmarks/batch_scaling.py: which averages it compares, and its table."""

import importlib
import itertools
import json
import math

import pytest
import torch

from paceline import PACE
from paceline.options import parse_returns


@pytest.fixture(scope="module")
def scaling():
    """Imported here, for what it imports takes seconds."""
    return importlib.import_module("batch_scaling")


def test_trainings_are_scaled_as_said(scaling, monkeypatch):
    """Batches, steps, rates, pulls and averages, by what the optimizer got."""
    tasks, seen = importlib.import_module("tasks"), []

    def start(seed, batch):
        return tasks.quadratic(0.0, seed)._replace(judge=lambda: [float(seed), float(batch)])

    def fit(problem, optimizer, schedule, steps, clip):
        group = optimizer.param_groups[0]
        seen.append([steps, group["initial_lr"], group["pullback"], group["averaging"]])
        returns.append(group["returns"])
        tasks.fit(problem, optimizer, schedule, steps, clip)

    returns = []
    monkeypatch.setattr(scaling, "finetune", start)
    monkeypatch.setattr(scaling, "fit", fit)
    monkeypatch.setattr(scaling, "PACE", lambda *x, fused, **given: PACE(*x, **given))
    scaled = str(scaling.PULL.scaled(4))
    for variant, k, *expected in (
        ("watched", 1, 16, 0.01, 0.0, "ema:kappa=0.3"),
        ("pulled", 4, 4, 0.02, 10.0, "ema:kappa=0.3"),
        ("pulled, scaled", 4, 4, 0.02, 10.0, scaled),
        ("pulled, scaled, c/k", 4, 4, 0.02, 2.5, scaled),
    ):
        cell = scaling.Cell(k, variant, 0.01, 3)
        found, losses = scaling.trained(16, cell)
        assert found == cell
        assert seen.pop() == expected
        assert all(pair == [3.0, 4.0 * k] for pair in losses.values())
        names = ["power", "halflife", "powerscaled", "halflifescaled"]
        assert list(losses) == ["live", *names]
        own = list(scaling.RETURNED.values())
        expected = dict(zip(names, own + [rule.scaled(k) for rule in own], strict=True))
        assert parse_returns(returns.pop()) == expected


def test_all_batches_see_the_same_data(scaling):
    tasks = importlib.import_module("tasks")
    seen = []

    class Model(torch.nn.Module):
        def base_model(self, input_ids, use_cache):
            seen.append(input_ids[:, 0])
            return (torch.zeros(*input_ids.shape, 4),)

        def lm_head(self, hidden):
            return hidden

    rows = torch.arange(97)[:, None].expand(97, 3) * torch.tensor([1, 0, 0])
    data = tasks.Data((rows, rows % 4), (rows, rows))
    small, large = (tasks.language(Model(), data, 5, batch=batch) for batch in (4, 16))
    for _ in range(8):
        small.loss()
    for _ in range(2):
        large.loss()
    assert torch.cat(seen[:8]).tolist() == torch.cat(seen[8:]).tolist()
    assert len(seen[-1]) == 16


def test_the_table(scaling, tmp_path):
    """Rates are chosen on the first half, by the mean over seeds; half a line is no training."""
    lines = []
    for lr, seed in ((0.001, 0), (0.001, 1), (0.01, 0), (0.01, 1)):
        choose = {0.001: 1.0, 0.01: 2.0}[lr] + seed
        losses = {"power": [choose, 3.0 + seed], "powerscaled": [choose, 2.5 + 1.2 * seed]}
        losses |= {"halflife": [math.inf, 9.0], "halflifescaled": [1.0, 8.0 + seed]}
        lines.append(json.dumps([2, "watched", lr, seed, losses]))
    (tmp_path / "runs.jsonl").write_text("\n".join([*lines, lines[0][:30]]))
    done = scaling.written(tmp_path / "runs.jsonl")
    assert len(done) == 4
    returned, pulls = (part.splitlines() for part in scaling.tables(done).split("## ")[1:])
    assert "| rate | rate, scaled | edge of its grid |" in returned[2]
    same = "× 2 | 0.001 | 0.001 | lr at the bottom | 3.5000 | 3.1000 | -0.4000 ["
    assert returned[5].startswith(f"| watched: power | {same}")
    assert returned[4].startswith("| watched: halflife | × 2 | 0.001 | 0.001 | lr at the bottom |")
    assert "no best was found" in returned[-1] or "no best was found" in returned[-2]
    assert len(pulls) == 4  # a title, and a table without rows


def test_pulls_are_compared_at_their_own_rates(scaling):
    done = {}
    for variant, better in (("watched", 0.01), ("pulled", 0.02), ("pulled, scaled", 0.01)):
        for lr, seed in itertools.product((0.01, 0.02, 0.04), (0, 1)):
            loss = 1.0 if lr == better else 2.0
            loss += seed + (0.25 if variant == "pulled" else 0.0) + lr * seed
            found = {name: [loss, loss] for name in ("power", "halflife")}
            found |= {f"{name}scaled": pair for name, pair in found.items()}
            done[scaling.Cell(4, variant, lr, seed)] = found
    *_, pulls = scaling.tables(done).split("## ")
    rows = [x for x in pulls.splitlines() if x.startswith("| pulled")]
    assert len(rows) == 3
    assert rows[0].startswith(
        "| pulled, less watched | × 4 | 0.02 | 0.01 | lr at the bottom | 0.2550 ["
    )
    assert rows[1].startswith("| pulled, scaled, less watched | × 4 | 0.01 | 0.01 |")
    assert rows[2].startswith("| pulled, scaled, less pulled | × 4 | 0.01 | 0.02 |")
