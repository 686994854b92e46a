"""The experiment of benchmarks/elastic.py: its workers in threads, and its table."""

import importlib
import json
import math

import numpy as np
import pytest
import torch
from torch.nn import Parameter
from workers import advance, base_of, held, simulated, start

CASES = {
    "EASGD": ("SGD", {"every": 3}),
    "DiLoCo": ("PACE", {"every": 2, "exchange": "diloco"}),
    "average": ("PACE", {"every": 1, "exchange": "average"}),
}


@pytest.fixture(scope="module")
def elastic():
    """Imported here, for what it imports takes seconds."""
    return importlib.import_module("elastic")


@pytest.mark.parametrize("case", CASES)
def test_workers_in_threads_do_what_workers_in_processes_do(case, elastic):
    """tests/core/test_elastic.py holds those to the same simulation."""
    base, options = CASES[case]
    crowd = elastic.Crowd(4)

    def work(worker):
        params = [Parameter(torch.tensor(x)) for x in start()]
        opt = elastic.InCrowd(crowd, worker, base_of(base, params), **options)
        moments = []
        for step in range(1, 8):
            advance(params, opt, 1, first=step, worker=worker)
            moments.append(held(params, opt))
        assert opt.bytes == 8 * 17 * (7 // options["every"])
        return moments

    for mine, want in zip(crowd.run(work), simulated(base, options, 7, 4), strict=True):
        for a, b in zip(mine, want, strict=True):
            for x, y in zip(a, b, strict=True):
                for p, q in zip(x, y, strict=True):
                    np.testing.assert_allclose(p.numpy(), q, 1e-12, 1e-12)


def test_a_worker_that_fails_ends_all(elastic):
    crowd = elastic.Crowd(2)

    def work(worker):
        if worker:
            raise ZeroDivisionError
        crowd.all_reduce(worker, torch.ones(1), "SUM")

    with pytest.raises((ZeroDivisionError, elastic.threading.BrokenBarrierError)):
        crowd.run(work)


@pytest.mark.parametrize("variant", ["ddp", "pulled", "local", "easgd", "diloco", "average"])
def test_trainings_are_as_said(variant, elastic, monkeypatch):
    """Batches, steps, pulls, exchanges and bytes, by what the optimizers got."""
    tasks, seen = importlib.import_module("tasks"), []

    def make(seed, batch):
        return tasks.quadratic(0.0, seed)._replace(judge=lambda: [float(seed), float(batch)])

    def fit(problem, optimizer, schedule, steps, clip):
        group = optimizer.param_groups[0]
        names = ("pullback", "averaging", "exchange", "pull", "every")
        seen.append([steps, *(group.get(name) for name in names)])
        tasks.fit(problem, optimizer, schedule, steps, clip)

    made = elastic.PACE
    monkeypatch.setattr(elastic, "finetune", make)
    monkeypatch.setattr(elastic, "fit", fit)
    monkeypatch.setattr(elastic, "PACE", lambda *x, fused, **given: made(*x, **given))
    every = 0 if variant in ("ddp", "pulled") else 5
    cell = elastic.Cell(variant, every, 0.01, 3)
    found, losses = elastic.trained(20, cell)
    pull = [10.0, "ema:kappa=0.3"] if variant in ("pulled", "average") else [0.0, "ema:kappa=0"]
    exchange = {
        "local": ["average", 1.0, 5],
        "easgd": ["easgd", None, 5],
        "diloco": ["diloco", None, 5],
        "average": ["average", None, 5],
    }.get(variant, [None, None, None])
    assert seen == [[20, *pull, *exchange]] * (4 if every else 1)
    assert found == cell
    size = 64 * 4
    assert losses.pop("bytes") == (size * 4 if every else size * 20)
    assert losses == {name: [3.0, 4.0 if every else 16.0] for name in ("own", "slow")}


def test_the_table(elastic, tmp_path):
    """Rates are chosen on the first half, by the mean over seeds; half a line is no training."""
    lines = []
    for variant, every, worse in (("ddp", 0, 0.0), ("diloco", 20, 0.25)):
        for lr, seed in ((0.001, 0), (0.001, 1), (0.01, 0), (0.01, 1)):
            choose = {0.001: 1.0, 0.01: 2.0}[lr] + seed
            more = seed * (1 + worse)
            found = {"own": [choose, 3.0 + more + worse], "slow": [choose, 2.0 + more + worse]}
            lines.append(json.dumps([variant, every, lr, seed, {**found, "bytes": 2_500_000}]))
    (tmp_path / "runs.jsonl").write_text("\n".join([*lines, lines[0][:30]]))
    done = elastic.written(tmp_path / "runs.jsonl")
    assert len(done) == 8
    table = elastic.tables(done, 2).splitlines()
    rate = "2.5 MB | 0.001 | lr at the bottom"
    assert table[2] == f"| ddp: own | DDP | {rate} | 3.5000 |  |"
    assert table[4].startswith(f"| diloco: own | 20 | {rate} | 3.8750 | 0.3750 [")


def test_rates_are_added_until_the_best_has_neighbours(elastic, monkeypatch):
    """The first seed's best is at the top, the mean's one below, and the slow average's lower."""
    monkeypatch.setattr(elastic, "KINDS", [("ddp", 0)])
    done, asked = {}, []
    best = {"own": [4, 3, 3], "slow": [1, 1, 1]}  # places, by seed
    while todo := elastic.lacking(done, 3):
        asked.append(sorted((cell.seed, cell.lr) for cell in todo))
        for cell in todo:
            place = round(2 * math.log10(cell.lr) + 5.5)
            losses = {x: [abs(place - own[cell.seed]), 0.0] for x, own in best.items()}
            done[cell] = {**losses, "bytes": 1}
    rates = [0.00178, 0.00562, 0.0178, 0.0562, 0.178, 0.562]
    assert asked[0] == [(0, lr) for lr in rates[:4]]
    others = [(seed, lr) for seed in (1, 2) for lr in rates[:5]]
    assert asked[1] == [(0, rates[4]), *others]
    assert len(asked) == 2
    assert elastic.best_rate(done, ("ddp", 0), "own", 3) == rates[3]
    assert elastic.best_rate(done, ("ddp", 0), "slow", 3) == rates[1]
