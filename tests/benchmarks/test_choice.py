"""The choice of an average after the training: its tables beside plain loops."""

import importlib
import itertools
import json

import numpy as np
import pytest
import torch

SEEDS, RATES = range(5), (1e-3, 1e-2)


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Made-up losses of two tasks, as `benchmarks/regret.py` writes them."""
    choice, regret = map(importlib.import_module, ("choice_tables", "regret"))
    random, done = np.random.default_rng(0), {}
    for folder in ("trial", "regret"):
        (tmp_path / folder).mkdir()
        lines = []
        for task, lr, method, seed in itertools.product(
            ("finetune", "smollm2"), RATES, choice.METHODS.values(), SEEDS
        ):
            cell = regret.Cell(task, 600, lr, method, seed)
            names = ("live", *regret.READ_OUTS)
            done[folder, cell] = {name: list(3 + lr + random.normal(0, 0.1, 2)) for name in names}
            lines.append(json.dumps([*cell, done[folder, cell]]))
        (tmp_path / folder / "runs.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(choice, "RESULTS", tmp_path)
    return choice, done


def rates_of(done, folder, task, method, tuned):
    """All, or the one with the lowest mean of κ = 0.7's losses to choose by."""
    means = {
        lr: np.mean(
            [
                x["k70"][0]
                for (at, cell), x in done.items()
                if (at, cell.task, cell.method, cell.lr) == (folder, task, method, lr)
            ]
        )
        for lr in RATES
    }
    return [min(means, key=means.__getitem__)] if tuned else RATES


def by_hand(choice, done, folder, method, averages, tuned):
    """Mean over tasks of the loss above the run's best, and of that less κ = 0.7's."""
    above, less = [], []
    for task in ("finetune", "smollm2"):
        rates = rates_of(done, folder, task, method, tuned)
        runs = [
            x
            for (at, cell), x in done.items()
            if (at, cell.task, cell.method) == (folder, task, method) and cell.lr in rates
        ]
        chosen = [x[min(averages, key=lambda name: x[name][0])][1] for x in runs]
        best = [min(x[name][1] for name in choice.READ_OUTS) for x in runs]
        above.append(np.mean(np.subtract(chosen, best)))
        less.append(np.mean(np.subtract(chosen, [x["k70"][1] for x in runs])))
    return np.mean(above), np.mean(less)


def test_tables_are_those_of_plain_loops(made):
    choice, done = made
    listings = list(choice.tables())
    cases = list(itertools.product(("trial", "regret"), (False, True)))
    for listing, (folder, tuned) in zip(listings, cases, strict=True):
        assert len(listing.rows) == len(choice.METHODS) * len(choice.CHOICES)
        for name, returned, tasks, above, less, *_ in listing.rows:
            averages = choice.CHOICES[returned]
            exact = by_hand(choice, done, folder, choice.METHODS[name], averages, tuned)
            assert tasks == 2
            assert above == pytest.approx(exact[0])
            assert less is None if returned == choice.FIXED else less == pytest.approx(exact[1])


def test_the_choice_by_few_data_is_over_draws():
    """On all blocks it is the best of them; on one, the mean over what each block picks."""
    choice = importlib.import_module("choice")
    random = np.random.default_rng(1)
    losses = {name: torch.tensor(random.normal(3, 0.1, (2, 128))) for name in "abc"}
    means = {name: x.mean(1).tolist() for name, x in losses.items()}
    found = choice.chosen(losses, 3.0, 2.5, seed=0)
    least = min(means, key=lambda name: means[name][0])
    assert found[-1] == pytest.approx([means[least][1] - 3, means[least][1] - 2.5], abs=1e-6)
    picked = [min("abc", key=lambda name: float(losses[name][0, n])) for n in range(128)]
    by_block = [means[name][1] - 3 for name in picked]
    error = np.std(by_block) / np.sqrt(choice.DRAWS)
    assert abs(found[0][0] - np.mean(by_block)) < 4 * error


def test_tables_by_data_are_over_tasks(made, tmp_path):
    """A task is the mean over its rates and seeds, or over seeds at the trial's best rate."""
    tables, done = made
    choice, random = importlib.import_module("choice"), np.random.default_rng(2)
    runs, names = {}, (*choice.CHOICES, *choice.REBUILT.values())
    tasks = ("finetune", "smollm2")
    for task, lr, seed in itertools.product(tasks, RATES, range(2)):
        found = {name: random.normal(0, 1, (len(choice.BLOCKS), 2)).tolist() for name in names}
        runs[choice.Cell(task, lr, seed)] = found | {
            f"error, {name}": float(random.uniform()) for name in choice.REBUILT.values()
        }
    (tmp_path / "choice").mkdir()
    lines = [json.dumps([*cell, found]) for cell, found in runs.items()]
    (tmp_path / "choice" / "runs.jsonl").write_text("\n".join(lines))
    overall, tuned, errors = itertools.islice(tables.tables(), 3)
    for listing, at_best in ((overall, False), (tuned, True)):
        rates = {x: rates_of(done, "trial", x, tables.SATURATED, at_best) for x in tasks}
        cases = itertools.product(names, range(len(choice.BLOCKS)))
        for row, (name, at) in zip(listing.rows, cases, strict=True):
            own = {cell: x[name][at] for cell, x in runs.items() if cell.lr in rates[cell.task]}
            of = [np.mean([x for c, x in own.items() if c.task == task], 0) for task in tasks]
            less, above = np.mean(of, axis=0)
            assert row[:3] == [name, 32 * choice.BLOCKS[at], 2]
            assert row[3:5] == pytest.approx([above, less])
    for row, name in zip(errors.rows, choice.REBUILT.values(), strict=True):
        own = [x[f"error, {name}"] for x in runs.values()]
        assert row == [name, 8, pytest.approx(np.median(own)), max(own)]
