"""The runs on all of SmolLM2-135M: their tables, from made-up losses."""

import importlib
import itertools
import json
import math

import numpy as np
import pytest

RATES, SEEDS = (1e-4, 1.78e-4, 3e-4, 1e-3, 2e-3, 5e-3), range(3)


def test_tables_are_those_of_plain_loops(tmp_path):
    regret, smollm2 = map(importlib.import_module, ("regret", "smollm2_tables"))
    random, done = np.random.default_rng(0), {}
    for method, lr, seed in itertools.product(regret.WHOLE_METHODS, RATES, SEEDS):
        names = ("own",) if method == "schedule-free" else ("live", *regret.READ_OUTS)
        loss = 3 + math.log10(lr / 1e-3) ** 2
        done[regret.Cell("smollm2-whole", 60, lr, method, seed)] = {
            name: list(loss + random.normal(0, 0.02, 2)) for name in names
        }
    assert set(regret.cells(["smollm2-whole"], regret.WHOLE_METHODS)) == set(done)
    lines = (json.dumps([*cell, pairs]) for cell, pairs in done.items())
    (tmp_path / "runs.jsonl").write_text("\n".join(lines))
    losses = smollm2.write(tmp_path, smollm2.tables)
    at_each, at_best, less, same_rate = smollm2.tables(losses)

    def of(method, name, lr):
        cells = (regret.Cell("smollm2-whole", 60, lr, method, seed) for seed in SEEDS)
        return np.array([done[cell][name][1] for cell in cells])

    rows = {name: row for name, *row in at_each.rows}
    for name, (method, average) in {
        "AdamW, last weights": ("adamw", "live"),
        "Schedule-Free": ("schedule-free", "own"),
        "PACE, gain 1, κ 0.7": (regret.SATURATED, "k70"),
    }.items():
        assert rows[name] == pytest.approx([of(method, average, lr).mean() for lr in RATES])
    best = {name: (lr, loss) for name, lr, _, _, loss in at_best.rows}
    assert {lr for lr, _ in best.values()} == {"0.001"}
    assert best["AdamW, cosine"][1] == pytest.approx(of("adamw:cosine", "live", 1e-3).mean())
    differences = {name: row[0] for name, *row in less.rows}
    for one, other in itertools.product(smollm2.OURS, smollm2.RIVALS):
        found = differences[f"{one} − {other}"]
        assert found == pytest.approx(best[one][1] - best[other][1])
    assert len(same_rate.rows) == len(smollm2.OURS) * len(RATES)
    named = {f"{lr:g}": i for i, lr in enumerate(RATES)}
    for name, found, *_ in same_rate.rows:
        one, lr = name.split(" − EMA at ")
        assert found == pytest.approx(rows[one][named[lr]] - rows["EMA"][named[lr]])
    assert smollm2.picture(losses, tmp_path / "rates")
    assert (tmp_path / "rates.svg").is_file()
