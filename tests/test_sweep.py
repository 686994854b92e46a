"""Sweeps: who trains what, what is chosen from what, and what the tables say of it."""

import csv
import itertools
import json
import math
import os
import pickle
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("optuna")
pytest.importorskip("transformers")

import sqlalchemy
from optuna.exceptions import StorageInternalError
from rich.console import Console
from sweeping import result_of

from paceline.cli import main
from paceline.study import ledger as ledgers
from paceline.study import sweep
from paceline.study.cells import Cell, Task, cells
from paceline.study.ledger import Ledger, Outcomes
from paceline.study.runs import Run
from paceline.study.statistics import DIFFERENCE, EXACT, Listing, interval
from paceline.study.sweep import Study, Tuning
from paceline.train import InputError
from paceline.train.methods import parse_method
from paceline.train.recipe import Recipe

TEXT = "\n".join(f"line {i}: the quick brown fox jumps over {i * i} lazy dogs" for i in range(300))
RECIPE = {
    "task": "pretrain",
    "config": {"model_type": "gpt2", "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 1},
    "tokenizer": "bpe",
    "vocabulary": 300,
    "context": 16,
    "batch": 2,
    "steps": 6,
    "evaluations": 2,
    "log_every": 2,
}
TASK = Task("tiny", Recipe(**RECIPE))
NOTHING = Outcomes({}, {})


def cell_of(text="adamw:lr=1e-2", seed=0, task=TASK, **changes):
    if changes:
        task = Task(task.name, Recipe(**{**RECIPE, **changes}), task.start)
    methods = tuple(parse_method(part, **task.parse()) for part in text.split(","))
    return Cell(task, Run(methods, seed))


# ---- cells -----------------------------------------------------------------------------------

BASE = "pace:c=1:kappa=0.3:lr=1e-2"


@pytest.mark.parametrize(
    ("other", "same"),
    [
        (cell_of(BASE), True),
        (cell_of("pace:lr=0.01:kappa=0.30:c=1.0"), True),
        (cell_of(BASE, micro_batch=1), True),
        (cell_of(BASE, loaders=2), True),
        (cell_of(BASE, save_every=3), True),
        (cell_of(BASE, report_to=("none",)), True),
        (cell_of(BASE, gradient_checkpointing=True), True),
        (cell_of(BASE, seed=0, lr=0.5, c=7, kappa=0.9), True),  # the cell has its own
        (cell_of(BASE, seed=1), False),
        (cell_of(f"{BASE}:every=2"), False),
        (cell_of(f"{BASE}:return_kappa=0.7"), False),
        (cell_of(f"{BASE},{BASE}:return_kappa=0.7"), False),
        (cell_of("pace:c=1:kappa=0.3:lr=1.0000001e-2"), False),
        (cell_of("pace:cosine:c=1:kappa=0.3:lr=1e-2"), False),
        (cell_of(BASE, steps=7), False),
        (cell_of(BASE, batch=4), False),
        (cell_of(BASE, context=15), False),
        (cell_of(BASE, weight_decay=0.1), False),
        (cell_of(BASE, eval_examples=100), False),
        (cell_of(BASE, precision="bf16"), False),
        (cell_of(BASE, config={**RECIPE["config"], "n_embd": 16}), False),
        (cell_of(BASE, task=Task("tiny", TASK.recipe, TASK.recipe)), False),
        (cell_of(BASE, task=Task("another name", TASK.recipe)), True),
    ],
)
def test_a_cell_is_known_by_all_that_decides_it(other, same):
    assert (other.key == cell_of(BASE).key) == same


def test_where_a_start_comes_from_is_part_of_a_cell():
    starts = [Recipe(**{**RECIPE, **change}) for change in ({}, {"steps": 9}, {"lr": 0.5})]
    tasks = [Task("tiny", TASK.recipe, start) for start in starts]
    assert len({cell_of(BASE, task=task).key for task in tasks}) == 3
    assert len({task.start_folder for task in tasks}) == 3
    assert Task("tiny", TASK.recipe, Recipe(**RECIPE, loaders=2)).start_folder == (
        tasks[0].start_folder
    )
    assert TASK.start_folder is None


def test_methods_that_share_a_trajectory_are_one_cell():
    texts = ["adamw:lr=1e-2", "ema:kappa=0.3:lr=1e-2", "uniform:lr=1e-2", "pace:lr=1e-2"]
    texts += ["pace:lr=1e-2:return_kappa=0.7", "adamw:lr=1e-3", "ema:kappa=0.3:lr=1e-2"]
    methods = [parse_method(text, **TASK.parse()) for text in texts]
    found = cells(TASK, methods, (3, 4))
    assert [(len(cell.run.methods), cell.run.seed) for cell in found] == [
        *((3, 3), (2, 3), (1, 3)),
        *((3, 4), (2, 4), (1, 4)),
    ]
    assert [cell.trajectory.name for cell in found[:3]] == ["adamw", "pace", "adamw"]
    assert found[1].trajectory.return_kappa is None
    # In whatever order they were asked for.
    assert found[0].key == cells(TASK, [methods[2], methods[1], methods[0]], (3,))[0].key


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.md"
    path.write_text(TEXT)
    return {"data": (str(path),)}


def test_a_real_cell(data, monkeypatch):
    """A worker's second cell is what it would have been as its first, and so is a shared one."""
    from paceline.study import cells as module

    first = cell_of(f"{BASE},{BASE}:return_kappa=0.7", **data)
    job = pickle.loads(pickle.dumps(first.train))  # as a worker gets it
    told = []
    result = job(lambda step, losses: told.append(step))
    assert told == sorted(told)
    assert told[-1] == 1000  # thousandths: what the bar of a job counts
    rows, log = result
    facts = {"setting": "tiny", "cell": first.key, "steps": 6, "name": "pace", "c": 1.0}
    facts |= {"lr": 0.01, "schedule": "constant", "seed": 0, "trained_with": first.run.name}
    facts |= {"tokens": 6 * 2 * 16}
    assert [row["step"] for row in rows] == [0, 3, 6] * 2
    assert [row["run"] for row in rows[2::3]] == first.run.names
    assert [row["label"] for row in rows[2::3]] == [m.label for m in first.run.methods]
    assert [row["return_kappa"] for row in rows[2::3]] == [None, 0.7]
    for row in rows[2::3]:
        assert facts.items() <= row.items()
        losses = [row[f"{name}_loss"] for name in ("train", "live", "returned", "selection")]
        assert len(set(losses)) == 4
        assert all(1 < loss < 7 for loss in losses)
        assert row["seconds"] > 0
        assert 0 < row["gain_mean"] <= 1
    assert rows[2]["live_loss"] == rows[5]["live_loss"]
    assert rows[2]["returned_loss"] != rows[5]["returned_loss"]
    assert [line["step"] for line in log] == [2, 4, 6]
    assert all({"step", "loss", "gain_mean", "clipped"} == set(line) for line in log)
    json.dumps([rows, log], allow_nan=False)

    def curve(cell, method=0):
        rows = cell.train(lambda step, losses: False).rows[3 * method : 3 * method + 3]
        return [[row["live_loss"], row["returned_loss"], row["selection_loss"]] for row in rows]

    seen = [[row["live_loss"], row["returned_loss"], row["selection_loss"]] for row in rows]
    watching = cell_of("adamw:lr=1e-2,ema:kappa=0.3:lr=1e-2", seed=1, **data)
    assert module._last is not None
    again = curve(watching, 1)  # on the first one's data
    assert curve(cell_of(f"{BASE}:return_kappa=0.7", **data)) == seen[3:]
    monkeypatch.setattr(module, "_last", None)
    alone = curve(cell_of("ema:kappa=0.3:lr=1e-2", seed=1, **data))
    assert alone == again
    assert again[0][0] != seen[0][0]  # from other weights
    # Another recipe gets its own data.
    other = cell_of(BASE, **data, context=8)
    assert curve(other) != seen[:3]
    assert cell_of(BASE, **data).train(lambda step, losses: step >= 500) is None


def test_the_two_halves_share_nothing(data, tmp_path):
    from paceline.study.cells import _assemble

    cell = cell_of(BASE, **data)
    trainer = _assemble(cell.task.recipe, tmp_path, cell.run.methods)
    halves = {name: data["input_ids"] for name, data in trainer.eval_dataset.items()}
    assert list(halves) == ["selection", "test"]
    chosen_by, reported = ({tuple(ids) for ids in halves[name]} for name in halves)
    assert min(len(chosen_by), len(reported)) > 5
    assert abs(len(halves["selection"]) - len(halves["test"])) <= 1
    assert not chosen_by & reported


# ---- the ledger ------------------------------------------------------------------------------


class Fixed:
    """A plan that wants the same, whatever comes of it."""

    name = "fixed"

    def __init__(self, *cells):
        self.cells = list(cells)

    def wanted(self, outcomes):
        return self.cells


FIVE = [cell_of(f"adamw:lr={i}e-3") for i in range(1, 4)] + [cell_of(BASE), cell_of(BASE, seed=1)]


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    """A storage with nothing in it: to make its tables takes most of a second."""
    path = tmp_path_factory.mktemp("storage") / "empty.db"
    with Ledger(f"sqlite:///{path}", Fixed()):
        pass
    return path


@pytest.fixture
def worker(tmp_path, empty, monkeypatch):
    """worker(cell, ...): the ledger of one more worker on the same storage."""
    path = tmp_path / "sweep.db"
    shutil.copy(empty, path)
    monkeypatch.setattr(ledgers, "POLL", 0)
    made = []

    def worker(*cells):
        made.append(Ledger(f"sqlite:///{path}", Fixed(*cells)))
        return made[-1]

    yield worker
    for ledger in made:
        ledger.__exit__()


def states(ledger):
    return Counter(t.state.name for s in ledger.studies.values() for t in s.get_trials())


def finish(ledger, job, cell):
    ledger.finish(job, result_of(cell))


def die(ledger):
    """What is left of a worker that was killed long ago."""
    ledger.ended.set()
    ledger.heart.join()
    with ledger.storage.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE trial_heartbeats SET heartbeat = '2000-01-01 00:00:00'")


def test_two_workers_share_cells_and_see_what_came_of_each(worker):
    a, b = worker(*FIVE), worker(*FIVE)
    by_name = {cell.name: cell for cell in FIVE}
    jobs = [(ledger, ledger.claim()) for ledger in (a, b, a, b, b)]
    assert [job.name for _, job in jobs] == [cell.name for cell in FIVE]
    assert a.claim() is b.claim() is None
    assert a.may_have_more()
    assert b.progress() == (0, 5000)
    for ledger, job in jobs[:4]:
        finish(ledger, job, by_name[job.name])
    b.fail(jobs[4][1], "it had to be")
    third = worker(*FIVE)
    for ledger in (a, b, third):
        assert ledger.claim() is None
        assert not ledger.may_have_more()
        assert ledger.progress() == (5000, 5000)
        ledger.look()
        assert ledger.outcomes.failed == {FIVE[4].key: "it had to be"}
        assert ledger.outcomes.finished == {cell.key: result_of(cell) for cell in FIVE[:4]}
    assert states(third) == {"COMPLETE": 4, "FAIL": 1}


def test_what_the_dashboard_shows_of_a_cell(worker):
    cell = cell_of("pace:twin:c=2:kappa=0.4:g=0.5:lr=1e-2:every=3,pace:twin:c=2:kappa=0.4:g=0.5:"
                   "lr=1e-2:every=3:return_kappa=0.8", seed=2)  # fmt: skip
    a = worker(cell)
    finish(a, a.claim(), cell)
    (study,) = a.studies.values()
    (trial,) = study.get_trials()
    assert trial.params == {
        **{"lr": 0.01, "c": 2.0, "kappa": 0.4, "g": 0.5, "every": 3, "schedule": "twin"}
    }
    shown = {"cell": cell.key, "name": cell.name, "seed": 2, "configuration": TASK.fixed}
    assert shown.items() <= trial.user_attrs.items()
    assert trial.user_attrs["worker"].endswith(f":{os.getpid()}")
    assert trial.user_attrs["methods"] == [method.written for method in cell.run.methods]
    assert trial.user_attrs["versions"]
    # Of its models the best, by the half that settings are chosen by.
    assert trial.value == min(row["selection_loss"] for row in result_of(cell).rows)


def test_divergence_is_written_down_as_infinite(worker):
    cell = FIVE[0]
    result = result_of(cell, lambda method, seed: (math.nan, math.inf))
    a = worker(cell)
    a.finish(a.claim(), result)
    (study,) = a.studies.values()
    assert study.get_trials()[0].value == math.inf
    b = worker(cell)
    assert b.outcomes.finished == {cell.key: result}
    assert not b.outcomes.failed


def test_a_cell_that_two_offer_at_once_is_run_once(worker):
    cell = FIVE[0]
    a, b = worker(cell), worker(cell)
    for ledger in (a, b):
        (study,) = ledger.studies.values()
        add = study.add_trial
        # By the time that it has offered the cell, the other has done so, too.
        study.add_trial = lambda trial, add=add: (add(trial), add(trial))
    jobs = [ledger.claim() for ledger in (a, b)]
    assert jobs[1] is None
    assert states(b) == {"RUNNING": 1, "PRUNED": 1}
    finish(a, jobs[0], cell)
    assert worker(cell).claim() is None


def test_of_two_that_claim_at_once_one_gets_the_cell(worker):
    """The other comes when the first has read that nobody has it, and not yet written."""
    cell = FIVE[0]
    a, b = worker(cell), worker(cell)
    (study,) = a.studies.values()
    study.add_trial(ledgers._offer(cell))
    for ledger in (a, b):  # there is more time between the two if this is not new
        ledger.look()
    got = []
    other = threading.Thread(target=lambda: got.append(b.claim()))

    def meanwhile(*arguments):
        if arguments[2].startswith("UPDATE trials") and not other.ident:
            other.start()
            other.join(1)

    sqlalchemy.event.listen(a.storage.engine, "before_cursor_execute", meanwhile)
    got.append(a.claim())
    other.join(60)
    assert other.ident
    assert len(got) == 2
    assert got.count(None) == 1


def test_a_failure_is_not_tried_again_unless_that_is_asked_for(worker):
    a, b = worker(*FIVE[:2]), worker(*FIVE[:2])
    a.fail(a.claim(), "no memory")
    finish(b, b.claim(), FIVE[1])
    assert a.claim() is b.claim() is None
    assert worker(*FIVE[:2]).claim() is None
    for ledger in (a, b):  # both are started to try again
        ledger.forget_failures()
        assert not ledger.outcomes.failed
    job = b.claim()
    assert job.name == FIVE[0].name
    assert a.claim() is None
    finish(b, job, FIVE[0])
    a.look()
    assert len(a.outcomes.finished) == 2
    assert not a.outcomes.failed
    assert a.claim() is b.claim() is None


def test_what_fails_again_has_its_new_reason(worker):
    a = worker(FIVE[0])
    for reason in ("first", "second"):
        a.fail(a.claim(), reason)
        a.look()
        assert a.outcomes.failed == {FIVE[0].key: reason}
        assert a.claim() is None
        a.forget_failures()


def test_a_cell_given_back_is_another_workers(worker):
    a, b = worker(FIVE[0]), worker(FIVE[0])
    a.give_back(a.claim())
    assert not b.outcomes.ended
    job = b.claim()
    assert a.claim() is None
    finish(b, job, FIVE[0])
    a.look()
    assert len(a.outcomes.finished) == 1


def test_a_dead_workers_cell_is_another_workers(worker):
    a, b = worker(*FIVE[:2]), worker(*FIVE[:2])
    finish(a, a.claim(), FIVE[0])
    a.claim()
    assert b.claim() is None  # it is alive
    die(a)
    job = b.claim()
    assert job.name == FIVE[1].name
    finish(b, job, FIVE[1])
    assert b.outcomes.ended == {FIVE[0].key} or len(b.outcomes.ended) == 2
    assert states(b) == {"COMPLETE": 2, "FAIL": 1}


@pytest.mark.parametrize("retried", [False, True])
def test_a_worker_that_died_between_its_claim_and_its_first_heartbeat(worker, monkeypatch, retried):
    a, b = worker(FIVE[0]), worker(FIVE[0])
    if retried:
        a.fail(a.claim(), "no memory")
        a.forget_failures()

    def killed(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(a.storage, "record_heartbeat", killed)
    with pytest.raises(ZeroDivisionError):
        a.claim()
    assert states(b)["RUNNING"] == 1
    assert b.claim() is None
    monkeypatch.setattr(ledgers, "GRACE", 0)
    b.look()
    assert b.claim() is not None


def test_clocks_of_other_machines_do_not_matter(worker, monkeypatch):
    """One that is a day behind has just claimed its cell."""
    a, b = worker(FIVE[0]), worker(FIVE[0])
    with monkeypatch.context() as patch:
        patch.setattr(a.storage, "record_heartbeat", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            a.claim()
    with a.storage.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE trials SET datetime_start = '2000-01-01 00:00:00'")
    assert b.claim() is None


@pytest.mark.parametrize(
    ("end", "first"), [("finish", True), ("finish", False), ("fail", True), ("give_back", True)]
)
def test_a_worker_taken_for_dead_that_ends_late_breaks_nothing(worker, end, first):
    a, b = worker(FIVE[0]), worker(FIVE[0])
    late = a.claim()
    die(a)
    job = b.claim()
    if not first:
        finish(b, job, FIVE[0])
    what = {"finish": [result_of(FIVE[0])], "fail": ["no memory"], "give_back": []}
    getattr(a, end)(late, *what[end])
    if first:
        finish(b, job, FIVE[0])
    for ledger in (a, b, worker(FIVE[0])):
        ledger.look()
        assert ledger.outcomes.finished == {FIVE[0].key: result_of(FIVE[0])}
        assert not ledger.outcomes.failed
        assert ledger.claim() is None
    assert states(a) == {"COMPLETE": 1, "FAIL": 1}


def test_a_worker_taken_for_dead_does_not_take_its_own_cell_twice(worker):
    """While it is still at it: its end would be the other's."""
    a, b = worker(FIVE[0]), worker(FIVE[0])
    late = a.claim()
    die(a)
    b.look()
    assert states(b) == {"FAIL": 1}
    assert a.claim() is None
    assert a.may_have_more()
    finish(a, late, FIVE[0])
    job = a.claim()
    if job is not None:  # unless what came late was taken after all
        finish(a, job, FIVE[0])
    b.look()
    assert len(b.outcomes.finished) == 1


def test_a_machine_that_was_asleep_keeps_its_cells(worker):
    """Its own look at the ledger comes after a heartbeat."""
    a, b = worker(FIVE[0]), worker(FIVE[0])
    a.claim()
    die(a)
    a.look()
    assert b.claim() is None
    assert states(a) == {"RUNNING": 1}


def test_cells_of_one_name_are_not_under_way_at_once(worker):
    """As of two rates that differ in the seventh digit: jobs are known by their names."""
    twins = [cell_of("adamw:lr=1e-3"), cell_of("adamw:lr=1.0000001e-3")]
    assert twins[0].name == twins[1].name
    a = worker(*twins)
    for cell in twins:
        job = a.claim()
        assert a.claim() is None
        finish(a, job, cell)
    a.look()
    assert a.outcomes.finished.keys() == {cell.key for cell in twins}


def test_the_heart_beats_on_after_a_failed_beat(worker, monkeypatch):
    monkeypatch.setattr(ledgers, "HEARTBEAT", 0.02)
    a = worker(FIVE[0])
    beats = []

    def beat(trial):
        beats.append(trial)
        if len(beats) == 2:
            raise StorageInternalError("the network is away")

    job = None
    monkeypatch.setattr(a.storage, "record_heartbeat", beat)
    job = a.claim()
    end = time.monotonic() + 10
    while len(beats) < 4 and time.monotonic() < end:
        time.sleep(0.01)
    assert len(beats) >= 4
    assert len(set(beats)) == 1
    finish(a, job, FIVE[0])
    time.sleep(0.05)
    count = len(beats)
    time.sleep(0.1)
    assert len(beats) == count  # not of what has ended


@pytest.mark.parametrize("where", ["set_trial_user_attr", "set_trial_state_values"])
def test_a_storage_that_is_away_for_a_while_loses_no_training(worker, monkeypatch, where):
    monkeypatch.setattr(ledgers, "PAUSES", (0.01,) * 3)
    a, b = worker(FIVE[0]), worker(FIVE[0])
    job = a.claim()
    real, calls = getattr(a.storage, where), []

    def away(*arguments, **options):
        calls.append(1)
        if len(calls) <= 3:
            raise StorageInternalError("the network is away")
        return real(*arguments, **options)

    monkeypatch.setattr(a.storage, where, away)
    finish(a, job, FIVE[0])
    b.look()
    assert b.outcomes.finished == {FIVE[0].key: result_of(FIVE[0])}


def test_a_storage_that_stays_away_is_one_clear_line(worker, monkeypatch):
    monkeypatch.setattr(ledgers, "PAUSES", (0.01,) * 3)
    a = worker(FIVE[0])

    def away(*_):
        raise sqlalchemy.exc.OperationalError("SELECT", {}, OSError("the network is away"))

    sqlalchemy.event.listen(a.storage.engine, "before_cursor_execute", away)
    with pytest.raises(InputError, match=r"storage: .*network is away; the same command goes on$"):
        a.look()


@pytest.mark.parametrize("option", ["lr", "c"])
@pytest.mark.parametrize("value", [1e-300, 1e300])
def test_no_value_is_too_large_or_small_to_be_written_down(worker, option, value):
    cell = cell_of(f"pace:c=1:lr=1:kappa=0.3:{option}={value}")
    a = worker(cell)
    finish(a, a.claim(), cell)
    assert a.left() == []


def test_killed_in_the_middle_of_writing_down_a_cell(worker, monkeypatch):
    a, b = worker(FIVE[0]), worker(FIVE[0])
    job = a.claim()
    monkeypatch.setattr(a.storage, "set_trial_state_values", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        finish(a, job, FIVE[0])
    b.look()
    assert not b.outcomes.ended
    die(a)
    job = b.claim()
    finish(b, job, FIVE[0])
    assert worker(FIVE[0]).outcomes.finished == {FIVE[0].key: result_of(FIVE[0])}


def test_two_workers_may_make_the_storage_at_once(tmp_path, monkeypatch):
    real, calls = ledgers.RDBStorage, []

    def slower(*arguments, **options):
        calls.append(1)
        if len(calls) == 1:
            why = sqlite3.OperationalError("table studies already exists")
            raise sqlalchemy.exc.OperationalError("CREATE TABLE studies", {}, why)
        return real(*arguments, **options)

    monkeypatch.setattr(ledgers, "RDBStorage", slower)
    with Ledger(f"sqlite:///{tmp_path / 'sweep.db'}", Fixed(FIVE[0])) as ledger:
        assert ledger.claim()


# ---- workers, killed and not -----------------------------------------------------------------

SWEEP = """
recipe: RECIPE
methods:
  adamw: {lr: [1e-3, 1e-2], schedule: [constant, wsd]}
  ema: {lr: [1e-3, 1e-2], kappa: [0.3, 0.7]}
  pace: {lr: [1e-3, 1e-2], c: [0.1, 1], kappa: 0.3}
seeds: [0, 1]
"""
# Two rates of AdamW, two with wsd, four of pace; then seed 1 of what was chosen: of AdamW's average
# it is the training of AdamW itself.
TRAININGS = 8 + 2
QUICK = {"HEARTBEAT": 1, "GRACE": 1, "POLL": 0.05}
TABLES = ("best.csv", "equal.csv", "report.md", "metrics.jsonl", "training.jsonl")


class Server:
    """Workers in processes of their own, forked from one that has imported everything."""

    def __init__(self, process):
        self.process = process

    def ask(self, **request):
        self.process.stdin.write(f"{json.dumps(request)}\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, folder, *options, acts=None, claims_only=False):
        """The process of a worker on a folder's sweep.yaml."""
        arguments = [] if claims_only else ["sweep", str(folder / "sweep.yaml"), *options]
        if arguments:
            arguments += ["--out", str(folder)]
        facts = {"folder": str(folder), "acts": acts or {}, "constants": QUICK}
        return self.ask(arguments=arguments, **facts)

    def wait(self, process):
        return self.ask(wait=process)

    def run(self, folder, *options, **facts):
        return self.wait(self.start(folder, *options, **facts))


@pytest.fixture(scope="module")
def server():
    pipe = subprocess.PIPE
    environment = {**os.environ, "PYTHONHASHSEED": "1", "COLUMNS": "200"}
    script = str(Path(__file__).with_name("sweeping.py"))
    with subprocess.Popen(
        [sys.executable, script], stdin=pipe, stdout=pipe, text=True, env=environment
    ) as process:
        assert process.stdout.readline() == "ready\n"
        yield Server(process)
        process.kill()


def sweep_in(folder, text=SWEEP):
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(json.dumps(RECIPE))
    text = text.replace("RECIPE", str(folder / "recipe.yaml"))
    (folder / "sweep.yaml").write_text(text)
    return folder


def study_in(folder, text=SWEEP):
    return sweep.read_study(sweep_in(folder, text) / "sweep.yaml")


def trained(folder):
    """How often each cell's training was begun."""
    path = folder / "trained"
    lines = path.read_text().splitlines() if path.exists() else []
    return Counter(line.partition(" ")[2] for line in lines)


def wait_for(condition):
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def tables(folder):
    return {name: (folder / name).read_text() for name in TABLES}


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):
    """The folder of a sweep that nothing happened to."""
    folder = sweep_in(tmp_path_factory.mktemp("whole"))
    assert server.run(folder) == 0, (folder / "said").read_text()
    assert set(trained(folder).values()) == {1}
    assert len(trained(folder)) == TRAININGS
    return folder


@needs_fork
def test_what_a_sweep_leaves(whole, server):
    metrics = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    # Two points of each model: of AdamW's trainings three, with wsd one, one of each pull; and
    # with the other seed.
    assert len(metrics) == 2 * (2 * 3 + 2 * 1 + 4 * 1 + 3 + 1)
    keys = {"setting", "cell", "run", "trained_with", "label", "name", "lr", "seed", "step"}
    keys |= {"steps", "live_loss", "returned_loss", "selection_loss", "seconds", "tokens"}
    assert all(keys <= set(row) for row in metrics)
    manifest = json.loads((whole / "manifest.json").read_text())
    assert (manifest["trainings"], manifest["finished"], manifest["failed"]) == (10, 10, {})
    assert manifest["configuration"]["seeds"] == [0, 1]
    assert manifest["tasks"]["recipe"]["recipe"]["steps"] == 6
    best = list(csv.DictReader((whole / "best.csv").read_text().splitlines()))
    assert [(row["method"], float(row["lr"]), row["trainings"], row["seeds"]) for row in best] == [
        ("pace", 0.01, "4", "2"),
        ("ema", 0.01, "2", "2"),
        ("adamw", 0.01, "4", "2"),
    ]
    said = (whole / "said").read_text()
    assert "2 seeds" in said or "seeds 0, 1" in said
    assert "Not every method chose from as many trainings" in said
    assert "adamw 4 trainings, 4 models; ema 2 trainings, 4 models; pace 4 trainings" in said
    # Nothing is run to show it, or to do it again.
    before = tables(whole)
    for options in ((), ("--show",)):
        assert server.run(whole, *options) == 0
        assert tables(whole) == before
    assert set(trained(whole).values()) == {1}
    assert not list(whole.glob(".*"))


@needs_fork
def test_two_workers_that_claim_as_fast_as_they_can(server, tmp_path):
    rates = [f"{i}e-3" for i in range(1, 17)]
    text = f"recipe: RECIPE\nmethods: {{adamw: {{lr: [{', '.join(rates)}]}}}}\nseeds: [0]\n"
    folder = sweep_in(tmp_path, text)
    workers = [server.start(folder, claims_only=True) for _ in range(2)]
    assert [server.wait(process) for process in workers] == [0, 0], (folder / "said").read_text()
    assert len(trained(folder)) == 16
    assert set(trained(folder).values()) == {1}
    lines = (folder / "trained").read_text().splitlines()
    assert len({line.partition(" ")[0] for line in lines}) == 2  # both had some


@needs_fork
def test_killed_and_started_twice_it_ends_as_if_it_had_not_been(server, whole, tmp_path):
    folder = sweep_in(tmp_path / whole.name)
    process = server.start(folder, "--workers", "1", acts={"": 0.1})
    wait_for(lambda: len(trained(folder)) >= 4)
    os.kill(process, signal.SIGKILL)
    assert server.wait(process) == -signal.SIGKILL
    begun = list(trained(folder))
    child = int((folder / "trained").read_text().split()[0])
    wait_for(lambda: not Path(f"/proc/{child}").exists() or os.name != "posix")
    workers = [server.start(folder, "--workers", "2", acts={"": 0.1}) for _ in range(2)]
    assert [server.wait(process) for process in workers] == [0, 0], (folder / "said").read_text()
    twice = [name for name, times in trained(folder).items() if times > 1]
    assert twice in ([], [begun[-1]])  # the one that was under way
    assert max(trained(folder).values()) <= 2
    assert len(trained(folder)) == TRAININGS
    for name, text in tables(whole).items():
        assert tables(folder)[name] == text, name


@needs_fork
def test_failures_are_recorded_and_the_rest_goes_on(server, tmp_path):
    folder = sweep_in(tmp_path)
    dying = {f"recipe: adamw-{name}-seed0" for name in ("lr0.001", "wsd-lr0.001")}
    raising = "recipe: adamw-wsd-lr0.01-seed0"
    acts = {**dict.fromkeys(dying, "die in a put"), raising: "raise", "": 0.02}
    sudden = "recipe: pace-c1-kappa0.3-lr0.001-seed0"  # while the next cell is claimed
    acts, dying = {sudden: "die", **acts}, {*dying, sudden}
    assert server.run(folder, "--workers", "2", acts=acts) == 1, (folder / "said").read_text()
    failed = json.loads((folder / "manifest.json").read_text())["failed"]
    assert set(failed) == {*dying, raising}
    assert failed[raising] == "Odd: no such data"
    assert all("worker process died" in failed[name] for name in dying)
    said = " ".join((folder / "said").read_text().split())
    for name, reason in failed.items():
        assert f"Failed: {name}: {reason}" in said
    times = trained(folder)
    assert [times.pop(name) for name in dying] == [2, 2, 2]  # once more, alone
    assert not (folder / "not alone").exists()
    assert times.pop(raising) == 1
    assert len(times) == TRAININGS - 4
    assert max(times.values()) <= 2  # of what was under way as one died
    best = list(csv.DictReader((folder / "best.csv").read_text().splitlines()))
    assert {row["method"] for row in best} == {"adamw", "ema", "pace"}
    # Not again, until that is asked for; then nothing else.
    before = trained(folder)
    assert server.run(folder) == 1
    assert trained(folder) == before
    assert server.run(folder, "--retry-failed") == 0
    assert sorted((trained(folder) - before).elements()) == sorted(failed)
    assert json.loads((folder / "manifest.json").read_text())["failed"] == {}


@needs_fork
def test_ctrl_c_gives_back_what_is_under_way(server, whole, tmp_path):
    folder = sweep_in(tmp_path / whole.name)
    # One stops when it is told to; the other's process dies then, which is not its failure.
    acts = {"pace-c0.1-kappa0.3-lr0.001": "die when stopped", "pace": 60}
    process = server.start(folder, "--workers", "2", acts=acts)
    wait_for(lambda: sum("pace" in name for name in trained(folder)) == 2)
    os.killpg(process, signal.SIGINT)  # as a terminal does: to parent and workers alike
    assert server.wait(process) == 130
    said = (folder / "said").read_text()
    assert "4 of 8 trainings are left; the same command goes on." in said
    assert "Traceback" not in said
    assert "Failed" not in said
    assert json.loads((folder / "manifest.json").read_text())["failed"] == {}
    assert not (folder / "best.csv").exists()
    assert not list(folder.glob(".*"))
    stopped = [name for name in trained(folder) if "pace" in name]
    assert server.run(folder) == 0
    assert {name for name, times in trained(folder).items() if times > 1} == set(stopped)
    for name, text in tables(whole).items():
        assert tables(folder)[name] == text, name


def test_failures_of_another_sweep_on_the_storage_are_not_ours(tmp_path, capsys):
    text = "recipe: RECIPE\nmethods: {adamw: {lr: 1e-3}}\nseeds: [SEED]\n"
    for seed in (7, 8):
        plan = Tuning(study_in(tmp_path, text.replace("SEED", str(seed))))
        with Ledger(f"sqlite:///{tmp_path / 'sweep.db'}", plan) as ledger:
            job = ledger.claim()
            if seed == 7:
                ledger.fail(job, "no memory")
            else:
                finish(ledger, job, *ledger.wanted)
    assert main(["sweep", str(tmp_path / "sweep.yaml"), "--out", str(tmp_path)]) == 0
    assert "Failed" not in capsys.readouterr().out
    assert json.loads((tmp_path / "manifest.json").read_text())["failed"] == {}


def test_two_workers_may_write_the_tables_at_once(tmp_path):
    """As those that wait for the last cell do."""
    cell = cell_of()
    outcomes = Outcomes({cell.key: result_of(cell)}, {})
    inner = SimpleNamespace(outcomes=outcomes, wanted=[cell], failures=dict)

    class Slow(dict):
        def __getitem__(self, key):  # while this one writes its lines
            ledgers.write_rows(inner, tmp_path, {})
            return super().__getitem__(key)

    outer = SimpleNamespace(
        outcomes=Outcomes(Slow(outcomes.finished), {}), wanted=[cell], failures=dict
    )
    ledgers.write_rows(outer, tmp_path, {})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == result_of(cell).rows
    assert not list(tmp_path.glob(".*"))


# ---- what is tried ---------------------------------------------------------------------------


def worked_off(plan, losses=None, keep=lambda cell: True, failing=lambda cell: False):
    """What came of all cells, taken as they become known; those that fail have no rows."""
    finished, failed = {}, {}
    while True:
        outcomes = Outcomes(finished, failed)
        left = [cell for cell in plan.wanted(outcomes) if cell.key not in outcomes.ended]
        if not (left := [cell for cell in left if keep(cell)]):
            return outcomes
        for cell in left:
            if failing(cell):
                failed[cell.key] = "it had to be"
            else:
                finished[cell.key] = result_of(cell, *([losses] if losses else []))


def test_a_grid_is_all_of_each_family_and_then_the_chosen_on_all_seeds(tmp_path):
    plan = Tuning(study_in(tmp_path))
    first = plan.wanted(NOTHING)
    assert [cell.run.seed for cell in first] == [0] * 8
    assert [len(cell.run.methods) for cell in first] == [3, 1, 3, 1, 1, 1, 1, 1]
    assert [m.name for m in first[0].run.methods] == ["adamw", "ema", "ema"]
    assert len({cell.key for cell in first}) == 8
    # Until the last has ended, nothing is chosen.
    most = Outcomes({cell.key: result_of(cell) for cell in first[:-1]}, {})
    assert [cell.key for cell in plan.wanted(most)] == [cell.key for cell in first]
    outcomes = worked_off(plan)
    wanted = plan.wanted(outcomes)
    assert [cell.key for cell in wanted[:8]] == [cell.key for cell in first]
    assert len(wanted) == TRAININGS == len({cell.key for cell in wanted})
    assert {cell.run.seed for cell in wanted[8:]} == {1}
    assert [cell.run.methods for cell in wanted[8:]] == [
        next(c.run.methods for c in first if chosen.method in c.run.methods)
        for chosen in plan.chosen(outcomes)
        if chosen.family != "ema" or chosen.method not in wanted[8].run.methods
    ][: len(wanted[8:])]


def test_settings_may_be_tried_with_several_seeds(tmp_path):
    text = SWEEP.replace("seeds: [0, 1]", "seeds: [3, 1, 2]\ntuning_seeds: 2")
    plan = Tuning(study_in(tmp_path, text))
    assert [cell.run.seed for cell in plan.wanted(NOTHING)] == [3] * 8 + [1] * 8

    def losses(method, seed):  # 0.001 is the better one with one seed, 0.01 in the mean
        return {(3, 0.001): 1.0, (1, 0.001): 9.0}.get((seed, method.lr), 4.0), 1.0

    outcomes = worked_off(plan, losses)
    assert [chosen.method.lr for chosen in plan.chosen(outcomes)] == [0.01] * 3
    assert [chosen.selection for chosen in plan.chosen(outcomes)] == [4.0] * 3


@needs_fork
@pytest.mark.parametrize("sampler", ["grid", "random", "tpe"])
def test_all_workers_want_the_same(server, tmp_path, sampler):
    """Also one whose hashes of texts are others."""
    rates = "{low: 1e-4, high: 1e-1}" if sampler != "grid" else "[1e-3, 1e-2]"
    text = f"""
    recipe: RECIPE
    methods:
      adamw: {{lr: {rates}, schedule: [constant, wsd]}}
      ema: {{lr: {rates}, kappa: [0.3, 0.7]}}
      pace: {{lr: {rates}, c: [0.1, 1], kappa: 0.3}}
    sampler: {sampler}
    trials: 3
    """
    plan = Tuning(study_in(tmp_path, text))
    keys = [cell.key for cell in plan.wanted(NOTHING)]
    assert server.ask(keys=str(tmp_path / "sweep.yaml")) == keys
    assert len(set(keys)) == len(keys)
    outcomes = worked_off(plan)
    trainings = {chosen.family: chosen.trainings for chosen in plan.chosen(outcomes)}
    assert trainings == {"adamw": 3, "ema": 2 if sampler == "grid" else 3, "pace": 3}
    read_outs = [chosen.read_outs for chosen in plan.chosen(outcomes)]
    assert read_outs[1] == 2 * trainings["ema"]  # both averages of each training


RANGES = """
recipe: RECIPE
methods:
  ema: {lr: {low: 1e-4, high: 1e-1}, kappa: [0.3, 0.7]}
  pace: {lr: {low: 1e-4, high: 1e-1}, c: [0.1, 1], schedule: [constant, wsd]}
sampler: SAMPLER
trials: 10
seeds: [0]
"""


def test_random_trials_are_within_their_ranges_and_lists(tmp_path):
    plan = Tuning(study_in(tmp_path, RANGES.replace("SAMPLER", "random")))
    own = plan.tried(NOTHING)
    for name in ("ema", "pace"):
        assert len(own[name]) == len(set(own[name])) == 10
        rates = [trial[0].lr for trial in own[name]]
        assert all(1e-4 <= rate <= 1e-1 for rate in rates)
        assert 2 < sum(rate < 3e-3 for rate in rates) < 8  # on a logarithmic scale
    assert all({m.kappa for m in trial} == {0.3, 0.7} for trial in own["ema"])
    assert {(trial[0].c, trial[0].schedule) for trial in own["pace"]} == set(
        itertools.product((0.1, 1.0), ("constant", "wsd"))
    )


def test_a_part_of_a_grid_is_drawn_at_random(tmp_path):
    text = SWEEP + "sampler: random\ntrials: 3\n"
    plan = Tuning(study_in(tmp_path, text))
    own = plan.tried(NOTHING)
    assert {name: len(trials) for name, trials in own.items()} == {"adamw": 3, "ema": 2, "pace": 3}
    grid = {name: set(trials) for name, trials in Tuning(study_in(tmp_path)).tried(NOTHING).items()}
    assert all(set(trials) <= grid[name] for name, trials in own.items())


def test_tpe_goes_on_round_by_round_and_hears_what_came_of_each(tmp_path):
    study = study_in(tmp_path, RANGES.replace("SAMPLER", "tpe").replace("10", "14"))
    plan = Tuning(study)
    # One by one, and the last first: until a family's round has ended, it wants nothing else.
    finished, before, grew = {}, [], []
    while left := [c for c in plan.wanted(Outcomes(finished, {})) if c.key not in finished]:
        count = Counter(cell.trajectory.name for cell in plan.wanted(Outcomes(finished, {})))
        if count != before:
            grew.append(count)
            before = count
        finished[left[-1].key] = result_of(left[-1])
    assert grew[0] == {"adamw": 4, "pace": 4}  # of ema AdamW
    assert [count["pace"] for count in grew[1:]][:3] == [8, 12, 14]
    assert [count["adamw"] for count in grew[1:]][-3:] == [8, 12, 14]
    again = worked_off(Tuning(study))
    assert again.finished.keys() == finished.keys()
    assert [chosen.trainings for chosen in plan.chosen(again)] == [14, 14]
    # Others come of other losses, but not before there are any.
    other = worked_off(Tuning(study), lambda method, seed: (5 - math.log10(method.lr), 1.0))
    common = other.finished.keys() & finished.keys()
    assert 8 <= len(common) < 28
    near = [cell.trajectory.lr for cell in plan.wanted(Outcomes(finished, {}))]
    far = [cell.trajectory.lr for cell in Tuning(study).wanted(other)]
    assert max(far) == pytest.approx(0.1, rel=0.3)
    assert sum(map(math.log, far[-4:])) > sum(map(math.log, near[-4:]))


def test_tpe_hears_of_failures_and_divergence(tmp_path):
    plan = Tuning(study_in(tmp_path, RANGES.replace("SAMPLER", "tpe")))
    outcomes = worked_off(
        plan,
        lambda method, seed: (math.inf if method.lr > 1e-2 else 1.0, 1.0),
        failing=lambda cell: cell.trajectory.lr < 1e-3,
    )
    assert outcomes.failed
    for chosen in plan.chosen(outcomes):
        assert chosen.trainings == 10
        assert 1e-3 <= chosen.method.lr <= 1e-2


def test_tpe_hears_of_the_best_model_of_each_training(tmp_path):
    text = """
    recipe: RECIPE
    methods: {ema: {lr: {low: 1e-4, high: 1e-1}, kappa: [0.3, 0.7]}}
    sampler: tpe
    trials: 16
    seeds: [0]
    """
    study = study_in(tmp_path, text)

    def of_others(loss):  # what the worse model of each training has
        def losses(method, seed):
            best = (math.log10(method.lr) + 2) ** 2
            return (best if method.kappa == 0.3 else 9 + loss(best)), 1.0

        return worked_off(Tuning(study), losses).finished.keys()

    assert of_others(lambda best: 0) == of_others(lambda best: -best)


def test_trials_of_tpe_that_are_the_same_count_once(tmp_path):
    text = "recipe: RECIPE\nmethods: {adamw: {lr: [1e-3, 1e-2]}}\nsampler: tpe\ntrials: 9\n"
    plan = Tuning(study_in(tmp_path, text))
    outcomes = worked_off(plan)
    (chosen,) = plan.chosen(outcomes)
    assert (chosen.trainings, chosen.read_outs) == (2, 2)


# ---- what is chosen, and what the tables say -------------------------------------------------


def test_settings_are_chosen_by_one_half_and_numbers_are_from_the_other(tmp_path):
    plan = Tuning(study_in(tmp_path))

    def losses(method, seed):  # the smaller rate is better on the first half only
        return (1.0, 7.0 + seed) if method.lr < 5e-3 else (2.0, 3.0)

    outcomes = worked_off(plan, losses)
    assert {(x.method.lr, x.selection) for x in plan.chosen(outcomes)} == {(0.001, 1.0)}
    table = sweep.best_table(plan, outcomes)
    facts = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    assert [(row["selection loss"], row["loss"], row["seeds"]) for row in facts] == [
        (1.0, 7.5, 2)
    ] * 3


def test_a_setting_that_diverges_is_not_chosen_and_counts_as_infinite(tmp_path):
    plan = Tuning(study_in(tmp_path))

    def losses(method, seed):
        if method.name == "pace" and method.c == 1:
            return math.nan, math.nan  # all of them
        if method.name == "ema" and seed == 1:
            return 2.0, math.inf  # after it was chosen
        return (math.inf if method.lr > 5e-3 else 3.0), 3.0

    outcomes = worked_off(plan, losses)
    assert {(x.method.lr, x.method.c) for x in plan.chosen(outcomes)} == {
        *((0.001, None), (0.001, 0.1))
    } | {(x.method.lr, None) for x in plan.chosen(outcomes) if x.family == "ema"}
    table = sweep.best_table(plan, outcomes)
    rows = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert rows["ema"]["loss"] == math.inf
    assert rows["ema"]["seeds"] == 2
    assert rows["ema"]["difference"] is rows["ema"]["low"] is None
    assert table.rows[-1][0] == "ema"  # the last
    assert "inf" in table.markdown()


def test_a_method_of_which_nothing_was_finished_is_in_the_table(tmp_path):
    plan = Tuning(study_in(tmp_path))
    outcomes = worked_off(
        plan,
        lambda method, seed: (math.nan, math.nan) if method.name == "pace" else (1.0, 1.0),
        failing=lambda cell: cell.trajectory.schedule == "wsd",
    )
    table = sweep.best_table(plan, outcomes)
    assert [row[0] for row in table.rows][-1] == "pace"
    assert table.rows[-1][table.columns.index("loss")] == math.inf
    (pace,) = [chosen for chosen in plan.chosen(outcomes) if chosen.family == "pace"]
    assert (pace.method, pace.selection, pace.trainings) == (None, math.inf, 4)
    adamw = next(chosen for chosen in plan.chosen(outcomes) if chosen.family == "adamw")
    assert adamw.method.schedule == "constant"  # a failure is no better than a divergence
    assert adamw.trainings == 4
    assert not any(cell.run.seed for cell in plan.wanted(outcomes) if cell.trajectory.c)


def test_differences_are_paired_by_seed(tmp_path):
    text = SWEEP.replace("seeds: [0, 1]", "seeds: [0, 1, 2, 3]\nbaseline: ema")
    plan = Tuning(study_in(tmp_path, text))
    harder = [0.0, 5.0, 1.0, 9.0]  # seeds
    better = [0.1, 0.3, 0.2, 0.4]  # than the EMA with each of them

    def losses(method, seed):
        pull = 1 + better[seed] if method.c == 1 and method.lr == 0.01 else 0
        return 3 - pull, 4 + harder[seed] - (better[seed] if pull else 0)

    outcomes = worked_off(plan, losses)
    table = sweep.best_table(plan, outcomes)
    assert table.title.endswith("difference to ema")
    rows = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert rows["pace"]["loss"] == pytest.approx(4 + 3.75 - 0.25)
    assert rows["pace"]["difference"] == pytest.approx(-0.25)
    low, high = interval([-x for x in better])
    assert (rows["pace"]["low"], rows["pace"]["high"]) == pytest.approx((low, high))
    assert [rows["ema"][name] for name in ("difference", "low", "high")] == [0.0, 0.0, 0.0]
    assert table.rows[0][0] == "pace"


def equal_of(plan, outcomes):
    table = sweep.equal_table(plan.losses(outcomes))
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]


def test_at_equal_rate_and_average_only_the_pull_differs(tmp_path):
    plan = Tuning(study_in(tmp_path))
    outcomes = worked_off(plan)
    rows = equal_of(plan, outcomes)
    # Each pull and rate once, against the EMA of its κ, 0.3, and not that of 0.7 or of wsd.
    assert [(row["method"], row["lr"]) for row in rows] == [
        *(("pace c=0.1 κ=0.3", "0.001"), ("pace c=1 κ=0.3", "0.001")),
        *(("pace c=0.1 κ=0.3", "0.01"), ("pace c=1 κ=0.3", "0.01")),
    ]
    assert {row["without the pull"] for row in rows} == {"ema κ=0.3"}
    for row in rows:
        c = float(re.search(r"c=([\d.]+)", row["method"])[1])
        assert row["difference"] == pytest.approx(-0.1 * c)
        assert row["loss"] - row["without"] == pytest.approx(row["difference"])  # of equal seeds
    assert [row["seeds"] for row in rows] == [1, 1, 1, 2]


def test_equal_means_that_nothing_else_differs(tmp_path):
    text = """
    recipe: RECIPE
    methods:
      ema: {lr: 1e-2, kappa: 0.3}
      rare: {method: pace, lr: 1e-2, c: 1, kappa: 0.3, every: 4}
      slower: {method: pace, lr: 1e-2, c: 1, kappa: 0.3, return_kappa: 0.7}
      small: {method: pace, lr: 1e-2, c: 1, kappa: 0.3, eps: 1e-3}
      other: {method: "pullback:sgd", lr: 1e-2, c: 1, kappa: 0.3}
      around: {method: "pullback:adamw", lr: 1e-2, c: 1, kappa: 0.3}
      warm: {method: pace, lr: 1e-2, c: 1, kappa: 0.3, schedule: cosine}
    seeds: [0]
    """
    plan = Tuning(study_in(tmp_path, text))
    rows = equal_of(plan, worked_off(plan))
    assert [row["method"] for row in rows] == ["pullback adamw c=1 κ=0.3"]


def test_the_same_tables_from_whatever_order(tmp_path):
    """Of hashes, too: of two that could be compared to, one is taken the same each time."""
    plan = Tuning(study_in(tmp_path))
    outcomes = worked_off(plan)
    turned = Outcomes(dict(reversed(outcomes.finished.items())), {})
    assert equal_of(plan, outcomes) == equal_of(plan, turned)
    assert sweep.best_table(plan, outcomes) == sweep.best_table(plan, turned)


def test_methods_whose_labels_are_the_same_are_told_apart():
    """A label has six digits."""
    cell = cell_of("ema:kappa=0.3:lr=1e-2,ema:kappa=0.30000001:lr=1e-2")
    first, second = cell.run.methods
    assert first.label == second.label
    rows = result_of(cell).rows
    for number, row in enumerate(rows):
        row["returned_loss"] = number
    outcomes = Outcomes({cell.key: result_of(cell)._replace(rows=rows)}, {})
    ends = [sweep.last_row(outcomes, cell, method) for method in (first, second)]
    assert [row["kappa"] for row in ends] == [0.3, 0.30000001]


def test_a_difference_is_shown_with_its_interval(tmp_path):
    rows = [["one", -0.1, -0.2, 0.0], ["two", 0.5, None, None], ["three", None, None, None]]
    table = Listing("title", ["a", *DIFFERENCE], rows)
    assert table.markdown().splitlines() == [
        "| a | difference [95 %] |",
        "| --- | ---: |",
        "| one | -0.1000 [-0.2000, 0.0000] |",
        "| two | 0.5000 |",
        "| three |  |",
    ]
    table.write(tmp_path / "table.csv")
    assert (tmp_path / "table.csv").read_text().startswith("a,difference,low,high\none,-0.1,-0.2,0")


def test_tables_as_text(tmp_path):
    rows = [["one", "3e-05", None], ["two", "0.01", math.inf], ["three", "1", 0.123456]]
    table = Listing("title", ["a", "lr", "x"], rows)
    assert table.markdown().splitlines() == [
        "| a | lr | x |",
        "| --- | ---: | ---: |",
        "| one | 3e-05 |  |",
        "| two | 0.01 | inf |",
        "| three | 1 | 0.1235 |",
    ]
    table.write(tmp_path / "table.csv")
    assert (tmp_path / "table.csv").read_text() == (
        "a,lr,x\none,3e-05,\ntwo,0.01,inf\nthree,1,0.123456\n"
    )


# ---- intervals -------------------------------------------------------------------------------


def by_hand(values, level=0.95):
    """Ends of the interval from every resample, counted by how often each value is in it."""
    n = len(values)
    means = []
    for chosen in itertools.combinations_with_replacement(range(n), n):
        times = math.factorial(n)
        for count in Counter(chosen).values():
            times //= math.factorial(count)
        means += [sum(values[i] for i in chosen) / n] * times
    assert len(means) == n**n
    means.sort()
    ends = []
    for share in ((1 - level) / 2, (1 + level) / 2):
        ends.append(means[math.ceil(share * len(means) - 1e-9) - 1])  # no point between two
    return tuple(ends)


@pytest.mark.parametrize(
    "values",
    [(0.0, 1.0), (0.3, 0.3, 0.3), (-1.0, 2.0, 5.0), (0.1, 0.4, -0.3, 2.0), (1, 2, 3, 4, 50)],
)
@pytest.mark.parametrize("level", [0.5, 0.95])
def test_of_few_values_the_interval_is_exact(values, level):
    assert interval(values, level) == pytest.approx(by_hand(values, level), abs=1e-12)


def test_interval_by_hand():
    assert interval([0.0, 1.0]) == (0, 1)  # of 0, ½, ½, 1
    assert interval([0.0, 1.0], 0.5) == (0, 0.5)
    # Of 27 means one is 9: more than 2.5 %, and less than 5 %.
    assert interval([0.0, 0.0, 9.0], 0.95) == (0, 9)
    assert interval([0.0, 0.0, 9.0], 0.9) == (0, 6)


def test_of_more_values_the_interval_is_near_the_exact_one():
    values = [(i * 37 % 11) / 3 for i in range(EXACT + 1)]
    low, high = by_hand(values)
    spread = high - low
    assert interval(values) == pytest.approx((low, high), abs=0.05 * spread)
    many = [math.sin(i * i) for i in range(400)]
    assert interval(many) == interval(many)  # the same each time
    mean = sum(many) / 400
    error = math.sqrt(sum((x - mean) ** 2 for x in many) / 400 / 400)
    assert interval(many) == pytest.approx(
        (mean - 1.96 * error, mean + 1.96 * error), abs=error / 5
    )


@pytest.mark.parametrize("values", [(), (1.0,), (1.0, math.inf), (1.0, math.nan)])
def test_no_interval(values):
    assert interval(values) is None


# ---- input -----------------------------------------------------------------------------------

GOOD = {"recipe": "RECIPE", "methods": {"adamw": {"lr": [1e-3, 1e-2]}, "ema": {}}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipe": "tiny-gtp2"}, "unknown recipe 'tiny-gtp2'; did you mean"),
        ({"recipe": None}, "recipe: "),
        ({"start": "nothing-like-it"}, "unknown recipe 'nothing-like-it'"),
        ({"change": {"step": 3}}, "unknown key 'step'; did you mean 'steps'?"),
        ({"change": {"steps": 0}}, "steps: .*greater than or equal to 1"),
        ({"change": {"epochs": 1}}, "steps, epochs, tokens: give one of them"),
        ({"change": 3}, "change: .*dictionary"),
        ({"methods": None}, "methods: .*dictionary"),
        ({"methods": {}}, "methods: give at least one"),
        ({"methods": {"adamw": None}}, "methods: .*dictionary"),
        ({"methods": {"adamv": {}}}, "adamv: unknown method 'adamv'; known: adamw"),
        ({"methods": {"x": {"method": 3}}}, "x: unknown method '3'"),
        ({"methods": {"x": {"method": "pullback:sdg"}}}, "x: unknown optimizer 'sdg'"),
        ({"methods": {"adamw": {"c": 1}}}, "adamw: method .* has no option 'c'"),
        ({"methods": {"adamw": {"lr": []}}}, "adamw: lr: an empty list"),
        ({"methods": {"adamw": {"lr": [1e-3, -1]}}}, "adamw: .*lr: .*greater than 0"),
        ({"methods": {"adamw": {"lr": None}}}, "adamw: .*lr: .*valid number"),
        ({"methods": {"adamw": {"schedule": 5}}}, "adamw: unknown schedule '5'"),
        ({"methods": {"adamw": {"lr": {"low": 1e-3, "high": 1}}}}, "lr: a grid needs a list"),
        ({"sampler": "grit"}, "sampler: Input should be 'grid', 'random' or 'tpe'"),
        ({"sampler": "tpe"}, "trials: tpe needs to know how many"),
        ({"sampler": "random", "methods": {"adamw": {"lr": {"low": 1e-3, "high": 1}}}},
         "trials: random needs to know how many"),
        *(
            ({"sampler": "tpe", "trials": 3, "methods": {"ema": {"kappa": value}}}, message)
            for value, message in (
                ({"low": 0.1}, "ema: kappa: .*high"),
                ({"low": 0, "high": 1}, "ema: kappa: .*low"),
                ({"low": 0.5, "high": 0.1}, "ema: kappa: "),
                ({"low": 0.1, "high": 2}, "ema: .*kappa: .*less than or equal to 1"),
                ({"low": "a", "high": 2}, "ema: kappa: "),
                ({"low": 0.1, "high": 1, "log": False}, "ema: kappa: "),
            )
        ),
        ({"trials": 0}, "trials: .*greater than or equal to 1"),
        ({"seeds": []}, "seeds: .*at least 1"),
        ({"seeds": [0, 0]}, "seeds: each only once"),
        ({"seeds": [-1]}, "seeds: .*greater than or equal to 0"),
        ({"seeds": 3}, "seeds: .*tuple"),
        ({"tuning_seeds": 4}, "tuning_seeds: 4 of 3 seeds"),
        ({"baseline": "adam"}, "baseline: unknown method 'adam'; did you mean 'adamw'?"),
        ({"methdos": {}}, "unknown key 'methdos'; did you mean 'methods'?"),
    ],
)  # fmt: skip
def test_bad_sweeps_are_one_line_and_status_2(change, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweep_in(tmp_path, json.dumps({**GOOD, **change}))
    refused(["sweep.yaml"], message, capsys)


def refused(arguments, message, capsys):
    assert main(["sweep", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("paceline: ")
    assert re.search(message, error), error
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("", ["nowhere.yaml"], "cannot read the sweep nowhere.yaml: No such file"),
        ("", ["."], "cannot read the sweep .: Is a directory"),
        ("a: [1", [], "sweep.yaml is not YAML"),
        ("a: 1\na: 2", [], "'a' is given twice"),
        ("- 1", [], "is not a mapping of keys to values"),
        ("", [], "is not a mapping of keys to values"),
        ("1: 2", [], "is not a mapping of keys to values"),
        (b"\xff\xfe\x00\xd8", [], "is not YAML"),
    ],
)
def test_bad_files_are_one_line_and_status_2(
    text, arguments, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("sweep.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(arguments or ["sweep.yaml"], message, capsys)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("sweep.db", "storage: sweep.db: .*give a database such as sqlite:///"),
        ("oracel://x/y", "storage: oracel://x/y: "),
        ("redis://localhost", "storage: redis://localhost: "),
        ("sqlite:////nowhere/at/all/sweep.db", "storage: .*unable to open database file"),
        ("sqlite:///sweep.yaml", "storage: .*not a database"),
        ("sqlite:///recipe.yaml?mode", "storage: "),
    ],
)
def test_unusable_storages_are_one_line_and_status_2(url, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between tries to open it
    sweep_in(tmp_path, json.dumps(GOOD))
    assert main(["sweep", "sweep.yaml", "--storage", url, "--out", "out"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error), error


def test_an_unusable_folder(tmp_path, capsys):
    sweep_in(tmp_path, json.dumps(GOOD))
    out = str(tmp_path / "sweep.yaml" / "out")
    assert main(["sweep", str(tmp_path / "sweep.yaml"), "--out", out]) == 2
    assert "out: cannot make the folder" in capsys.readouterr().err


def test_a_sweep_with_a_start_trains_it_once(tmp_path, monkeypatch):
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "cache"))
    study = study_in(tmp_path, json.dumps({**GOOD, "start": "RECIPE"}))
    assert study.task.name == "recipe on recipe"
    made = []

    def train_by(options, console):
        made.append(options)
        (options.out / "model").mkdir(parents=True)
        (options.out / "model" / "weights").write_text("trained")
        return options.out

    monkeypatch.setattr("paceline.study.cells.train_by", train_by)
    for _ in range(2):
        study.task.make_start(Console(quiet=True))
    assert len(made) == 1
    assert made[0].steps == 6
    assert (study.task.start_folder / "weights").read_text() == "trained"
    assert list((tmp_path / "cache").iterdir()) == [study.task.start_folder]
    monkeypatch.setattr("paceline.study.cells.train_by", lambda *_: None)  # Ctrl-C
    other = Task("other", TASK.recipe, Recipe(**RECIPE, lr=0.5))
    with pytest.raises(KeyboardInterrupt):
        other.make_start(Console(quiet=True))


def test_study_keys_are_as_documented():
    assert set(Study.model_fields) == {
        *("recipe", "start", "change", "methods", "baseline", "sampler", "trials", "seeds"),
        "tuning_seeds",
    }
    with pytest.raises(InputError, match="methods: "):
        Study(recipe="tiny-gpt2")
