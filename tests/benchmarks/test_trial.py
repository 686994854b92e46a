"""The blind trial: its tables decide the claims by its protocol, its tasks are those it names."""

import importlib
import itertools
import json
import math
import re

import numpy as np
import pytest
from scipy import stats

SEEDS = range(5)


@pytest.fixture(scope="module")
def regret():
    return importlib.import_module("regret")


@pytest.fixture(scope="module")
def trial():
    return importlib.import_module("trial_tables")


def losses_of(regret, trial, seed=0):
    """Made-up losses: by task, rate, method, average and seed, with a valley in the rate."""
    random = np.random.default_rng(seed)
    best = {"adamw": 2e-3, "schedule-free": 8e-3, trial.TEN: 1.6e-2, regret.SATURATED: 1.6e-2}
    lowest = {trial.TEN: 3.0, trial.POWER: 3.1, "schedule-free": 3.15}
    found = {}
    for task, method, s in itertools.product(
        importlib.import_module("tasks").BLIND, regret.BLIND_METHODS, SEEDS
    ):
        rates = (0.013 + s / 1000,) if method == regret.FOUND else trial.RATES
        for lr in rates:
            away = math.log10(lr / best.get(method, 4e-3)) ** 2
            loss = lowest.get(method, 3.3) + 0.2 * away
            names = ("own",) if method == "schedule-free" else ("live", *regret.READ_OUTS)
            found[regret.Cell(task, 600, lr, method, s)] = {
                name: [loss + 0.01 * i + x for x in random.normal(0, 0.01, 2)]
                for i, name in enumerate(names)
            }
    return found


@pytest.fixture(scope="module")
def made(regret, trial, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trial")
    done = losses_of(regret, trial)
    lines = (json.dumps([*cell, pairs]) + "\n" for cell, pairs in done.items())
    (folder / "runs.jsonl").write_text("".join(lines))
    losses = trial.write(folder, trial.tables)
    return done, losses, folder


def lowest_by_the_others(regret, done, task, seed, methods, averages):
    """The loss to report of what four seeds would choose, by plain loops."""
    settings = {
        (cell.method, cell.lr, name)
        for cell, pairs in done.items()
        if cell.task == task and cell.method in methods
        for name in pairs
        if name in averages
    }

    def others(setting):
        method, lr, name = setting
        return sum(done[regret.Cell(task, 600, lr, method, s)][name][0] for s in SEEDS if s != seed)

    method, lr, name = min(settings, key=others)
    return done[regret.Cell(task, 600, lr, method, seed)][name][1]


def test_the_first_claim_by_hand(regret, trial, made):
    done, _, folder = made
    tasks = sorted({cell.task for cell in done})
    means = []
    for task in tasks:
        pairs = [
            lowest_by_the_others(regret, done, task, s, {trial.TEN}, trial.AVERAGES)
            - lowest_by_the_others(
                regret, done, task, s, {"adamw", "adamw:cosine", "adamw:wsd"}, {"live"}
            )
            for s in SEEDS
        ]
        means.append(np.mean(pairs))
    middle = np.mean(means)
    half = stats.t.ppf(0.975, 7) * np.std(means, ddof=1) / math.sqrt(8)
    text = (folder / "tables.md").read_text().partition("## Claim 1, over tasks")[2]
    row = next(x for x in text.splitlines() if "AdamW, best schedule" in x)
    numbers = [float(x) for x in re.findall(r"-?\d+\.\d+", row)]
    assert numbers == pytest.approx([middle, middle - half, middle + half], abs=6e-5)
    assert row.rstrip(" |").endswith("*")


def test_the_verdicts_follow_the_rules_of_the_protocol(trial):
    """Made-up rows: mean, lower end, upper end, corrected p-value."""
    sure, unsure = [-0.02, -0.03, -0.01, 0.001], [-0.02, -0.05, 0.015, 0.3]
    higher, none = [0.03, 0.01, 0.05, 0.001], [None] * 4
    rows = {
        "1, over": [sure, unsure, higher, none],
        "2, over": [higher],
        "3: ": [higher, sure, unsure, sure],
        "4, over": [unsure, unsure],
        "5a: ": [sure, unsure, sure, higher, sure, sure],
        "5b, over": [higher],
    }
    listings = [
        trial.Listing(
            f"Claim {claim} tasks", ["", "tasks", "", "", "", ""], [["x", 8, *y] for y in z]
        )
        for claim, z in rows.items()
    ]
    found = {}
    for claim, _, _, verdict in trial.verdicts(listings).rows:
        found.setdefault(claim, []).append(verdict)
    yes, no = "holds", "does not hold"
    assert found == {
        "1": [yes, no, no, "open"],
        "2": [no],
        "3": [yes, no, no, no],
        "4": [yes, no],
        "5a": [yes, no, yes, no, yes, yes],
        "5b": [no],
    }


def test_a_found_rate_is_one_setting(regret, trial, made):
    """Its seeds have other rates; the setting's rate is their median."""
    text = (made[2] / "tables.md").read_text().partition("## What the most seeds chose")[2]
    rows = [x for x in text.splitlines() if trial.FOUND_RATE in x]
    assert len(rows) == 8
    assert all("| 0.015 |" in row for row in rows)


def test_rates_near_the_best(regret, trial, made):
    """Of the six rates, PACE's own valley holds two or three within 0.05 nats."""
    text = (made[2] / "tables.md").read_text()
    title = re.search(r"Claim 3: .*\((\d\.\d\d) of 6\)", text)
    assert 1.5 < float(title[1]) < 4.5


def test_the_picture_is_of_the_means_over_tasks(regret, trial, made):
    _, losses, folder = made
    sentences = trial.picture(losses, folder / "rates")
    assert "PACE, c = 10 has the lowest loss" in sentences[0]
    assert re.search(r"Within 0.05 nats of the lowest loss, 0.0[0-5]", sentences[-1])
    assert (folder / "rates.svg").is_file()
    assert (folder / "rates.png").is_file()


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3", "gemma3", "lstm"])
def test_models_of_the_trial(monkeypatch, kind):
    """Of about 0.13M parameters, the same for a seed, and they learn from their loss."""
    torch = importlib.import_module("torch")
    tasks = importlib.import_module("tasks")
    tokenizer = importlib.import_module("paceline.train.data").make_tokenizer(["ab " * 99], 512)
    monkeypatch.setattr(tasks, "blind_texts", lambda: (tokenizer, {}))
    ids = torch.randint(0, 257, (8, tasks.CONTEXT), generator=torch.Generator().manual_seed(0))
    data = tasks.Data((ids, ids), (ids, ids))
    model = tasks.blind_model(kind, 1)
    assert 100_000 < sum(p.numel() for p in model.parameters()) < 150_000
    first = tasks.language(model, data, seed=0)
    again = tasks.language(tasks.blind_model(kind, 1), data, seed=0)
    other = tasks.language(tasks.blind_model(kind, 2), data, seed=0)
    losses = [problem.loss() for problem in (first, again, other)]
    assert losses[0] == losses[1] != losses[2]
    losses[0].backward()
    assert all(p.grad is not None and p.grad.any() for p in first.parameters)
