"""The trial of benchmarks/regret.py: tables follow from the losses, trainings are comparable."""

import importlib
import itertools
import json
import math
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import schedulefree
import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters

SEEDS = range(5)


@pytest.fixture(scope="module")
def regret():
    """Imported here, for what it imports takes seconds."""
    return importlib.import_module("regret")


@pytest.fixture(scope="module")
def tables():
    return importlib.import_module("regret_tables")


def losses_of(regret, tasks=("finetune",), methods=("adamw", "pace:pullback=1:kappa=0.3"), seed=0):
    """Random losses of all averages: Cell -> {average: [to choose by, to report]}."""
    random = np.random.default_rng(seed)
    cells = itertools.product(tasks, (300,), (0.001, 0.01), methods, SEEDS)
    names = ("live", *regret.READ_OUTS)
    return {
        regret.Cell(*cell): {name: list(random.uniform(1, 2, 2)) for name in names}
        for cell in cells
    }


@pytest.mark.parametrize("over", [["task", "steps", "lr"], ["task", "steps"]])
def test_chosen_by_the_other_seeds(regret, tables, over):
    done = losses_of(regret)
    found = tables.best_settings(tables.frame(done), over)
    settings = {
        (*(getattr(cell, key) for key in over), cell.method, cell.lr, name)
        for cell, pairs in done.items()
        for name in pairs
    }
    where = {setting[: len(over)] for setting in settings}
    assert len(found) == len(where) * 5
    for place, seed in itertools.product(where, SEEDS):

        def others(setting, place=place, seed=seed):
            *_, method, lr, name = setting
            return sum(
                done[regret.Cell(place[0], place[1], lr, method, x)][name][0]
                for x in SEEDS
                if x != seed
            )

        *_, method, lr, name = min((x for x in settings if x[: len(over)] == place), key=others)
        row = found[(found[over] == list(place)).all(axis=1) & (found.seed == seed)].iloc[0]
        assert (row.method, row.lr, row.average) == (method, lr, name)
        cell = regret.Cell(place[0], place[1], lr, method, seed)
        assert row.report == done[cell][name][1]


@pytest.mark.parametrize("averages", [(), ("k50", "k70")])
def test_an_average_chosen_after_its_training(regret, tables, averages):
    done = losses_of(regret)
    found = tables.chosen_after(tables.frame(done), "adamw", averages)
    assert len(found) == 10
    for row in found.itertuples():
        pairs = done[regret.Cell(row.task, row.steps, row.lr, "adamw", row.seed)]
        known = [pair for name, pair in pairs.items() if name in averages or not averages]
        assert pairs[row.average] == min(known)  # by the first of the pair
        assert row.report == pairs[row.average][1]


def test_a_setting_that_lacks_a_seed_is_not_chosen(regret, tables):
    done = losses_of(regret)
    lucky = regret.Cell("finetune", 300, 0.001, "adamw", 0)
    for seed in SEEDS[1:]:
        done[lucky._replace(seed=seed)]["k50"] = [0.0, 0.0]
    done[lucky].pop("k50")
    found = tables.best_settings(tables.frame(done))
    assert not ((found.lr == 0.001) & (found.method == "adamw") & (found.average == "k50")).any()


def test_differences_are_paired_by_seed(regret, tables):
    done = losses_of(regret)
    for cell, pairs in done.items():
        pairs["k50"] = [0.0, pairs["live"][1] - 0.1 * cell.seed]
    frame = tables.frame(done)
    adamw = tables.rows_of(frame, "adamw", "live")
    found = tables.difference(adamw, tables.rows_of(frame, "adamw", "k50"))
    assert list(found.index) == [("finetune", 300, 0.001), ("finetune", 300, 0.01)]
    for row in found.itertuples():
        assert row.difference == pytest.approx(0.2)
        assert 0 < row.low < 0.2 < row.high < 0.4  # within the range of the seeds
    some = adamw[(adamw.lr == 0.01) | (adamw.seed > 0)]
    assert list(tables.difference(some, adamw).index) == [("finetune", 300, 0.01)]


def test_the_table_of_known_losses(regret, tables, tmp_path):
    """AdamW's weights at 2, the best at 1: shares of auto are 25 % and 75 %, and 5 %.

    The rates are 0.001 and 0.01. The lower one is not of the quadratic's grid, and counts only
    where the rate is tuned.
    """
    earlier = "pace:gain=scalar:pullback=0:kappa=0.3+gap"  # no longer in the code, among the losses
    methods = ("adamw", "pace:pullback=1:kappa=0.3", tables.AUTO[0], earlier)
    done = losses_of(regret, tasks=("finetune", "quadratic"), methods=methods)
    for cell, pairs in done.items():
        hard = cell.lr == 0.01
        for name, pair in pairs.items():
            pair[:] = [3.0 + cell.seed / 100] * 2
            setting = (cell.method, name)
            known = {
                ("adamw", "live"): 2.0,
                ("adamw", "k60"): 1.5,
                ("pace:pullback=1:kappa=0.3", "k70"): 1.0,
                tables.AUTO: 1.05 if cell.task == "quadratic" else 1.75 if hard else 1.25,
                # of what is ours nothing is among the tuned
                (tables.AUTO[0], "k20"): 0.1,
                (earlier, "k20"): 0.1,
            }
            if setting in known:
                pair[:] = [known[setting] + cell.seed / 100] * 2
            if setting == ("adamw", "k60") and cell.task == "quadratic":
                pair[1] = 1.04 + 0.1 * (cell.seed - 2)  # 0.02 above the best, or it is chance
    write(tmp_path / "runs.jsonl", done)
    tables.write(tmp_path, tables.tables)
    text = (tmp_path / "tables.md").read_text()
    losses, shares, rates, chosen, auto = (
        text.partition(f"## {title}")[2].partition("\n## ")[0]
        for title in (
            "Not tuned: regret, mean, median and worst, in",
            "Not tuned: regret, mean, median and worst, as",
            "Tuned, the rate too: regret",
            "Tuned, the rate too: what",
            "auto at",
        )
    )
    assert "| auto | 0.500, 0.500, 0.750 | 0.050, 0.050, 0.050 | 0.500, 0.500, 0.750 |" in losses
    assert "| auto | 50%, 50%, 75% (2) | 5%, 5%, 5% (1) | 35%, 25%, 75% (3) |" in shares
    assert "| EMA κ 0.6 | 50%, 50%, 50% (2) | 2%, 2%, 2% (1) | 34%, 50%, 50% (3) |" in shares
    # Of two rates each is at the edge.
    assert "| finetune | 300 | 1.0200 | 0.250*† | 0.500*† |" in rates
    assert "| quadratic | 300 | 1.0200 | 0.050*† | 0.020† |" in rates
    settings = ("pace:pullback=1:kappa=0.3 k70", f"{tables.AUTO[0]} k60", "adamw k60")
    at = " at 0.001 (lr at the bottom) |"
    assert f"| finetune | 300 | {f'{at} '.join(settings)}{at}" in chosen
    row = (
        "| finetune | 300 | 0.01 | 2.0200 | 1.0200 | 1.7700 | pace:pullback=1:kappa=0.3 k70 | 75% |"
    )
    assert f"{row} 0.2500 [0.2500, 0.2500] |" in auto


def test_the_families_of_every_method(regret, tables):
    """PACE's own gains, without what is scalar; auto is of none."""
    frame = tables.rivals_of(tables.frame(losses_of(regret, methods=regret.METHODS)))
    names = {name: set(x.method) for name, x in tables.in_families(frame).items()}
    assert names.pop("AdamW, any schedule") == {
        *names["AdamW, constant rate"],
        *names["AdamW, cosine or WSD"],
        *names["AdamW, power"],
        *names["AdamW, twin"],
    }
    sizes = {name: len(x) for name, x in names.items()}
    assert sizes["AdamW, constant rate"] == sizes["Schedule-Free"] == 1
    assert sizes["AdamW, cosine or WSD"] == 2
    assert names["PACE"] == {f"pace:pullback={c}:kappa=0.3" for c in (0.1, 1, 10, 100)}
    assert set().union(*names.values()) == set(regret.METHODS) - {tables.AUTO[0]}


def test_edges_of_what_most_seeds_chose(tables):
    """Four seeds of five choose the inner c, and the largest average."""
    rows = [
        ("finetune", 300, lr, f"pace:pullback={c}:kappa=0.3", seed, average)
        for lr, c, seed in itertools.product((1e-3, 3e-3), (0.1, 1, 10), range(5))
        for average in ("live", "k20", "k95")
    ]
    tried = pd.DataFrame(rows, columns=["task", "steps", "lr", "method", "seed", "average"])

    def at(lr, average, most=1, other=10):
        cs = tried.seed.map(lambda seed: other if seed == 3 else most)
        methods = cs.map("pace:pullback={}:kappa=0.3".format)
        same = (tried.lr == lr) & (tried.average == average) & (tried.method == methods)
        return list(tables.edges_of(tried[same], tried, ["task", "steps"]).edge)

    assert at(1e-3, "k95") == ["lr at the bottom, return_kappa at the top"]
    assert at(3e-3, "k20") == ["lr at the top"]  # beside the live weights, κ = 0
    assert at(3e-3, "live", most=10, other=1) == ["lr at the top, pullback at the top"]
    chosen = tried[(tried.lr == 3e-3) & (tried.average == "k20")]
    chosen = chosen[chosen.method == "pace:pullback=1:kappa=0.3"]
    same_rate = tables.edges_of(chosen, tried, ["task", "steps", "lr"])
    assert list(same_rate.edge) == [""]


def test_differences_picked_out_of_a_table_are_corrected(regret, tables, tmp_path):
    """One difference of some p-value alone, and among equally many of other tasks."""
    found = []
    for tasks in (("finetune",), tuple(regret.TASKS)):
        done = losses_of(regret, tasks=tasks, methods=("adamw", "pace:pullback=1:kappa=0.3"))
        for cell, pairs in done.items():
            better = 0.2 if cell.method != "adamw" and cell.task == "finetune" else 0.0
            noise = [0.1, -0.1, 0.12, -0.12, 0.0][cell.seed] * (cell.method != "adamw")
            for pair in pairs.values():
                pair[:] = [2 - better + 0.01 * (cell.lr == 0.01), 2 - better + noise]
        write(tmp_path / "runs.jsonl", done)
        tables.write(tmp_path, tables.tables)
        (tmp_path / "losses.csv").unlink()
        text = (tmp_path / "tables.md").read_text().partition("one less another")[2]
        row = next(line for line in text.splitlines() if line.startswith("| finetune"))
        found.append("]*†" in row)
    assert found == [True, False]


@pytest.mark.parametrize("lost", [0.3, -0.1])
def test_no_share_where_seeds_differ_on_the_distance(regret, tables, tmp_path, lost):
    """The best gains 0.1 on AdamW's weights in all seeds but one."""
    done = losses_of(regret, methods=("adamw", tables.AUTO[0]))
    for cell, pairs in done.items():
        for name, pair in pairs.items():
            best = cell.method == "adamw" and name == "k50"
            pair[:] = [1.0 if best else 1.5, 1.5 + best * (lost if cell.seed == 0 else -0.1)]
    write(tmp_path / "runs.jsonl", done)
    tables.write(tmp_path, tables.tables)
    shares = (tmp_path / "tables.md").read_text().partition("## auto at")[2].count("100% |")
    assert shares == (2 if lost < 0 else 0)


def write(path, done):
    path.write_text("".join(json.dumps([*cell, pairs]) + "\n" for cell, pairs in done.items()))


def test_what_ran_is_not_run_again(regret, tables, tmp_path):
    """From lines and from the CSV; but what is not whole is."""
    done = losses_of(regret, tasks=("finetune", "quadratic"))
    free = regret.Cell("finetune", 300, 0.001, "schedule-free", 0)
    done[free] = {"own": [1.5, math.inf]}
    write(tmp_path / "runs.jsonl", done)
    tables.write(tmp_path, tables.tables)
    (tmp_path / "runs.jsonl").unlink()
    assert regret.written(tmp_path) == done

    wide = pd.read_csv(tmp_path / "losses.csv")
    wide.loc[0, "k20:choose"] = math.nan
    wide.to_csv(tmp_path / "losses.csv", index=False)
    further = free._replace(seed=1)
    more = {further: {"own": [1.0, 2.0]}, free: {"own": [1.4, 1.6]}}  # one was run anew
    write(tmp_path / "more.jsonl", more)
    with (tmp_path / "more.jsonl").open("a") as file:
        file.write(json.dumps([*free._replace(seed=2)])[:-9])
    found = regret.written(tmp_path)
    del done[regret.Cell(*wide.loc[0, list(regret.Cell._fields)])]
    assert found == done | more


@pytest.mark.parametrize("task", ["digits-mlp", "digits-conv", "logistic", "quadratic"])
def test_a_seed_is_one_problem_for_all_methods(regret, task):
    @torch.no_grad()
    def seen(seed):
        problem = regret.TASKS[task].start(seed)
        return [*problem.judge(), *(float(problem.loss()) for _ in range(3))]

    assert seen(0) == seen(0)
    start, other = seen(0), seen(1)
    assert start[2:] != other[2:]
    assert (start[:2] != other[:2]) == (task != "quadratic")  # which starts at ones


def by_hand(problem, lr, steps, clip, c=0.0, kappa=0.5, warmup=3):
    """Losses of the live weights and of their average with κ = 0.5, each operation spelled out."""
    theta = parameters_to_vector(problem.parameters).detach()
    pulled = slow = theta
    m = v = torch.zeros_like(theta)
    for t in range(1, steps + 1):
        rate = lr * (min(1.0, (t - 1) / warmup) if warmup else 1.0)
        problem.loss().backward()
        g = torch.cat([p.grad.flatten() for p in problem.parameters])
        g = g * min(1.0, clip / (float(g.norm()) + 1e-6))
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g * g
        step = m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        theta = theta - rate * 0.01 * theta - rate * step - c * (theta - pulled)
        pulled = torch.lerp(pulled, theta, (1 + t) ** -kappa)
        slow = torch.lerp(slow, theta, (1 + t) ** -0.5)
        for p in problem.parameters:
            p.grad = None
        vector_to_parameters(theta, problem.parameters)

    def judged(weights):
        with torch.no_grad():
            vector_to_parameters(weights, problem.parameters)
            return problem.judge()

    return judged(theta), judged(slow)


@pytest.mark.parametrize(
    ("task", "method", "rest"),
    [
        ("quadratic", "adamw", {}),  # without clipping
        ("logistic", "adamw", {}),
        ("logistic", "pace:gain=scalar:pullback=0.5:kappa=0.3", {"c": 0.5, "kappa": 0.3}),
    ],
)
def test_a_training_by_hand(regret, task, method, rest):
    """With its warm-up, clipping and pull; without any of them the losses would be others."""
    cell = regret.Cell(task, 60, 0.2, method, 0)
    _, found = regret.trained(cell)
    clip = math.inf if task == "quadratic" else 1.0

    def expected(**changed):
        live, slow = by_hand(
            regret.TASKS[task].start(0), 0.2, 60, **({"clip": clip} | rest | changed)
        )
        return [*live, *slow]

    ours = [*found["live"], *found["k50"]]
    assert ours == pytest.approx(expected(), abs=1e-4)
    assert ours != pytest.approx(expected(warmup=0), abs=1e-3)
    assert ours != pytest.approx(expected(clip=1.0 if task == "quadratic" else 0.1), abs=1e-3)
    if rest:
        assert ours != pytest.approx(expected(c=0.0), abs=1e-3)


def test_schedule_free_returns_its_average(regret):
    cell = regret.Cell("logistic", 60, 0.05, "schedule-free", 0)
    _, found = regret.trained(cell)
    problem = regret.TASKS["logistic"].start(0)
    optimizer = schedulefree.AdamWScheduleFree(
        problem.parameters, lr=0.05, warmup_steps=3, weight_decay=0.01
    )
    optimizer.train()
    for _ in range(60):
        problem.loss().backward()
        torch.nn.utils.clip_grad_norm_(problem.parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        live = problem.judge()
        optimizer.eval()
        returned = problem.judge()
    assert found == {"own": pytest.approx(returned, abs=1e-5)}
    assert live != pytest.approx(returned, abs=1e-3)


def test_losses_of_every_average(regret):
    """By the judge at the weights that each average has: of what the training returns, not live."""
    cell = regret.Cell("quadratic", 40, 0.03, "pace:gain=scalar:pullback=0.1:kappa=0.3", 0)
    _, found = regret.trained(cell)
    assert found.keys() == {"live", *regret.READ_OUTS}
    problem = regret.TASKS["quadratic"].start(0)
    method = regret.parse_method(f"{cell.method}:lr={cell.lr}")
    optimizer = regret.optimizer_of(method, problem.parameters, 2)
    schedule = method.make_scheduler(optimizer, 2, 40)
    (theta,) = problem.parameters
    averages = {kappa: theta.detach().clone() for kappa in regret.KAPPAS}
    for step in range(1, 41):
        problem.loss().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        for kappa, average in averages.items():
            average.lerp_(theta.detach(), (1.0 + step) ** -kappa)
    for kappa, average in averages.items():
        with torch.no_grad():
            theta.copy_(average)
            expected = problem.judge()
        assert found[f"k{100 * kappa:.0f}"] == pytest.approx(expected, abs=2e-5)


def test_grids_are_widened_until_the_best_rate_is_inside(regret):
    """By the mean loss to choose by of the best average; a diverged seed counts."""
    cells = [
        regret.Cell("finetune", 300, lr, method, seed)
        for method in ("adamw", "schedule-free", "pace:pullback=1+found")
        for lr in (0.01, 0.003, 0.001)
        for seed in SEEDS
    ]
    high = {"adamw": 2.0, "schedule-free": 1.0, "pace:pullback=1+found": 1.0}
    low = {0.01: None, 0.003: 1.6, 0.001: 1.5}
    done = {x: {"k50": [low[x.lr] or high[x.method], 0.0]} for x in cells}
    above, below = (
        [regret.Cell("finetune", 300, lr, method, seed) for seed in SEEDS]
        for lr, method in ((0.0178, "schedule-free"), (0.000316, "adamw"))
    )
    assert sorted(regret.widened(done, cells)) == sorted([*above, *below])
    for x in cells:
        if x.method == "schedule-free" and x.lr == 0.01 and x.seed == SEEDS[0]:
            done[x]["k50"] = [math.inf, 0.0]
        if x.lr == 0.003 and x.method != "pace:pullback=1+found":
            done[x]["k50"] = [1.4, 0.0]
    assert regret.widened(done, cells) == []


def test_all_trainings_of_a_seed_come_before_those_of_the_next(regret):
    cells = list(regret.cells(["finetune", "smollm2-whole"], ["adamw", "adamw:cosine"]))
    assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)
    counts = Counter((cell.task, cell.method, cell.seed) for cell in cells)
    assert counts == {
        **{
            ("finetune", method, seed): 10 for method in ("adamw", "adamw:cosine") for seed in SEEDS
        },
        **{
            ("smollm2-whole", method, seed): 6
            for method in ("adamw", "adamw:cosine")
            for seed in range(3)
        },
    }


def test_a_rate_that_rises_finds_where_the_loss_is_lowest(regret):
    """On the digits' linear model the rate that is found is within the decade of the best."""
    method = regret.parse_method(f"{regret.SATURATED}:lr=1")
    assert 0.01 < regret.found_rate(method, regret.TASKS["logistic"], 0) < 0.5
