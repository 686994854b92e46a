"""The ledger: who has which cell, and what came of it."""

import math
import os
import shutil
import sqlite3
import threading
import time
from collections import Counter

import pytest

pytest.importorskip("optuna")
pytest.importorskip("transformers")

import sqlalchemy
from optuna.exceptions import StorageInternalError
from studies import BASE, TASK, cell_of, finish
from sweeping import result_of

from paceline.study import ledger as ledgers
from paceline.study.ledger import Ledger
from paceline.train import InputError


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


def test_it_stops_where_the_first_of_every_method_fail_alike(worker):
    a = worker(*FIVE)
    first = a.claim()
    assert first.name == FIVE[0].name
    a.fail(first, "no such model")
    assert a.stopped() is None  # of one method alone
    second = a.claim()
    assert second.name == FIVE[3].name  # of the other, before the rest of the first
    a.fail(second, "no such model")
    b = worker(*FIVE)
    for ledger in (a, b):
        assert ledger.stopped() == "no such model"
        assert ledger.claim() is None
        assert not ledger.may_have_more()
    b.forget_failures()
    assert b.stopped() is None
    assert b.claim().name == FIVE[0].name


@pytest.mark.parametrize("how", ["another reason", "one that finished"])
def test_it_goes_on_where_they_do_not_all_fail_alike(how, worker):
    a = worker(*FIVE)
    a.fail(a.claim(), "no such model")
    if how == "another reason":
        a.fail(a.claim(), "no memory")
    else:
        finish(a, a.claim(), FIVE[3])
    assert a.stopped() is None
    assert a.may_have_more()
    assert a.claim().name == FIVE[1].name


def test_what_the_dashboard_shows_of_a_cell(worker):
    text = "pace:twin:pullback=2:kappa=0.4:twin_gain=0.5:lr=1e-2:every=3"
    cell = cell_of(f"{text},{text}:return_kappa=0.8", seed=2)
    a = worker(cell)
    finish(a, a.claim(), cell)
    (study,) = a.studies.values()
    (trial,) = study.get_trials()
    assert trial.params == {
        **{
            "lr": 0.01,
            "pullback": 2.0,
            "kappa": 0.4,
            "twin_gain": 0.5,
            "every": 3,
            "schedule": "twin",
        }
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
    study.add_trial(ledgers._new_trial(cell))
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
    with pytest.raises(
        InputError, match=r"storage: .*network is away; run the same command to resume$"
    ):
        a.look()


@pytest.mark.parametrize("option", ["lr", "pullback"])
@pytest.mark.parametrize("value", [1e-300, 1e300])
def test_no_value_is_too_large_or_small_to_be_written_down(worker, option, value):
    given = {"pullback": 1, "lr": 1, "kappa": 0.3} | {option: value}
    cell = cell_of(":".join(["pace", *(f"{name}={x}" for name, x in given.items())]))
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
