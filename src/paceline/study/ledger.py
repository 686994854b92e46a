"""The ledger of a sweep: an Optuna storage with the owner and the result of every cell.

Every worker on every machine reads and writes the same storage, and nothing else:

- A cell is one trial, in the study of its task and kind of method. A worker adds the trial
  (WAITING), and claims it in one transaction (RUNNING). If two workers add a trial of one cell at
  once, the trial with the lower number counts; the other is PRUNED.
- The trial holds the result: the curves, or the reason of a failure (FAIL).
- A worker's claims have a heartbeat. If there is none for `GRACE` seconds, the claim expires, and
  the cell gets a new trial.
"""

import math
import os
import platform
import sys
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from functools import wraps
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar

import optuna
import torch
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.exceptions import ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage, fail_stale_trials
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState, create_trial
from rich.console import Console
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from ..defaults import AUTO
from ..files import write_text
from ..train import InputError
from ..train import folder as folders
from ..train.manifest import cores, environment, write_json
from .cells import Cell, Result
from .options import SharedOptions
from .runs import Job, Queue, loss_of, run_all, threads_each

P = ParamSpec("P")
T = TypeVar("T")

HEARTBEAT = 5  # seconds
GRACE = 30  # seconds
PAUSES = (1.0, 2.0, 5.0, 10.0, 20.0)  # seconds before the storage is asked again
POLL = 3.0  # seconds between reads of the storage while other machines have the remaining cells
STORAGE_ERRORS = (StorageInternalError, SQLAlchemyError)
CELL_ATTRIBUTES = ("cell", "name", "methods", "seed", "configuration")  # of a new trial
# Options that a trial shows as parameters. Ranges are wide: all trials of a study need the same.
SHOWN_OPTIONS: dict[str, BaseDistribution] = {
    "lr": FloatDistribution(sys.float_info.min, sys.float_info.max, log=True),
    "pullback": FloatDistribution(0, sys.float_info.max),
    "kappa": FloatDistribution(0, 1),
    "twin_gain": FloatDistribution(0, 1),
    "every": IntDistribution(1, 10**9),
    "schedule": CategoricalDistribution(["constant", "cosine", "wsd", "power", "twin"]),
}


class Outcomes(NamedTuple):
    """Results and failures of cells, by their keys."""

    finished: dict[str, Result]
    failed: dict[str, str]  # reasons

    @property
    def ended(self) -> set[str]:
        """Keys of the finished and the failed cells."""
        return self.finished.keys() | self.failed.keys()


class CellPlan(Protocol):
    """A plan of cells to run."""

    name: str

    def wanted(self, outcomes: Outcomes) -> list[Cell]:
        """All cells to run, in order; there may be more once earlier ones have ended.

        It depends on the outcomes alone, so that all workers want the same cells.
        """


def _reason(error: BaseException) -> str:
    cause = error.__cause__ or error
    return " ".join(str(getattr(cause, "orig", cause)).split())


def _patiently(call: Callable[P, T]) -> Callable[P, T]:
    """Call again while the storage does not answer; a failure would lose hours of training."""

    @wraps(call)
    def tried(*args: P.args, **kwargs: P.kwargs) -> T:
        pauses = list(PAUSES)
        while True:
            try:
                return call(*args, **kwargs)
            except STORAGE_ERRORS as error:
                if not pauses:
                    why = f"{_reason(error)}; run the same command to resume"
                    raise InputError(f"storage: no answer: {why}") from error
                time.sleep(pauses.pop(0))

    return tried


class Ledger(Queue, AbstractContextManager["Ledger"]):
    """The cells of a plan as jobs, in a storage that other workers share.

    Args:
        url: a database of Optuna's RDBStorage: sqlite:///FILE, mysql:// or postgresql://.
        plan: the cells to run.

    Raises:
        InputError: the storage cannot be used.
    """

    def __init__(self, url: str, plan: CellPlan) -> None:
        self.plan = plan
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        warnings.simplefilter("ignore", ExperimentalWarning)  # of heartbeats
        try:
            self.storage = _open(url)
        except (*STORAGE_ERRORS, ImportError, ValueError, RuntimeError) as error:
            raise InputError(
                f"storage: {url}: {_reason(error)}; give a database such as sqlite:///sweep.db or "
                "postgresql://USER@HOST/NAME"
            ) from error
        self.studies: dict[str, Study] = {}
        self.mine: dict[str, int] = {}  # name of a job -> its trial's ID
        self.results: dict[str, Result] = {}
        self.outcomes = Outcomes({}, {})
        self.taken: set[str] = set()  # keys of cells that a worker has claimed
        self.unsigned: dict[tuple[str, int], float] = {}  # claims without a worker -> first seen
        self.looked = -math.inf
        self.wanted: list[Cell] = []
        self.look()
        self.ended = threading.Event()
        self.heart = threading.Thread(target=self._keep_beating, daemon=True)
        self.heart.start()

    def __exit__(self, *_: object) -> None:
        """Stop the heartbeat; cells that are still claimed expire."""
        self.ended.set()
        self.heart.join()
        self.storage.engine.dispose()

    # ---- a queue of jobs --------------------------------------------------------------------

    @_patiently
    def claim(self) -> Job | None:
        """The next cell that no worker has claimed; None if there is none now."""
        if self.stopped():
            return None
        left = self.left()
        if self.outcomes.failed and not self._any_finished():  # does every method fail?
            tried = {_study_name(x) for x in self.wanted if x.key in self.outcomes.failed}
            left.sort(key=lambda cell: _study_name(cell) in tried)
        for cell in left:
            # A cell of this name still runs here; it may be this one, whose claim has expired.
            if cell.key in self.taken or cell.name in self.mine:
                continue
            if (job := self._claim(cell)) is not None:
                return job
        return None

    def may_have_more(self) -> bool:
        """Whether cells have not ended; other workers have them, and may give them back."""
        return bool(self.left()) and not self.stopped()

    def stopped(self) -> str | None:
        """Why no more cells are claimed: all that ended failed alike, some of every method.

        None if there is no such reason, or no cell is left.
        """
        left = self.left()
        failed = [cell for cell in self.wanted if cell.key in self.outcomes.failed]
        reasons = {self.outcomes.failed[cell.key] for cell in failed}
        untried = {_study_name(cell) for cell in self.wanted} - {_study_name(x) for x in failed}
        alike = len(reasons) == 1 and len(failed) > 1 and not untried
        return reasons.pop() if left and alike and not self._any_finished() else None

    def _any_finished(self) -> bool:
        return any(cell.key in self.outcomes.finished for cell in self.wanted)

    def finish(self, job: Job, result: Result) -> None:
        """Record the result of a cell."""
        last = [row for row in result.rows if row["step"] == row["steps"]]
        attributes: dict[str, Any] = {"log": result.log, **environment()}
        for row in result.rows:  # an attribute a method: databases limit the length of a text
            attributes.setdefault(f"rows of {row['label']}", []).append(row)
        loss = min(loss_of(row, "selection") for row in last)
        self._end(job, attributes, TrialState.COMPLETE, loss)

    def fail(self, job: Job, reason: str) -> None:
        """Record why a cell failed; it is not tried again."""
        self._end(job, {"reason": reason}, TrialState.FAIL)

    def give_back(self, job: Job) -> None:
        """Release a cell that was stopped, for other workers."""
        self._end(job, {}, TrialState.FAIL)

    def progress(self) -> tuple[int, int]:
        """Thousandths of cells that have ended, and of all."""
        left = len(self.left())
        return 1000 * (len(self.wanted) - left), 1000 * len(self.wanted)

    def failures(self) -> dict[str, str]:
        """The reasons of failures, by the names of cells."""
        failed = self.outcomes.failed
        return {cell.name: failed[cell.key] for cell in self.wanted if cell.key in failed}

    def forget_failures(self) -> None:
        """Let failed cells be tried again."""
        for study in self.studies.values():
            for trial in _current_trials(study):
                if trial.state == TrialState.FAIL:
                    attributes = {k: trial.user_attrs[k] for k in CELL_ATTRIBUTES}
                    study.add_trial(_waiting(trial.params, attributes))
        self.look()

    def left(self) -> list[Cell]:
        """The cells that have not ended."""
        self.look(POLL)
        return [cell for cell in self.wanted if cell.key not in self.outcomes.ended]

    # ---- the storage ------------------------------------------------------------------------

    @_patiently
    def look(self, every: float = 0.0) -> None:
        """Read the storage, unless it was read in the last `every` seconds."""
        if time.monotonic() - self.looked < every:
            return
        changed = self._read()
        while changed or not self.wanted:
            self.wanted = self.plan.wanted(self.outcomes)
            for name in (unknown := {_study_name(c) for c in self.wanted} - self.studies.keys()):
                title = f"{self.plan.name}: {name}"
                self.studies[name] = optuna.create_study(
                    storage=self.storage, study_name=title, load_if_exists=True
                )
            if not unknown:
                break
            changed = self._read()
        self.looked = time.monotonic()

    def _read(self) -> bool:
        """Read all trials; returns whether cells have ended since the last time."""
        self._beat()  # or our own claims would expire after the machine has slept
        before = self.outcomes.finished.keys(), self.outcomes.failed.keys()
        self.outcomes, self.taken = Outcomes({}, {}), set()
        for study in self.studies.values():
            self._expire_stale(study)
            for trial in _current_trials(study):
                facts, key = trial.user_attrs, trial.user_attrs["cell"]
                if trial.state == TrialState.COMPLETE:
                    if key not in self.results:
                        rows = [v for k, v in facts.items() if k.startswith("rows of ")]
                        self.results[key] = Result(list(chain(*rows)), facts["log"])
                    self.outcomes.finished[key] = self.results[key]
                elif trial.state == TrialState.FAIL:
                    self.outcomes.failed[key] = facts["reason"]
                elif trial.state == TrialState.RUNNING:
                    self.taken.add(key)
        return (self.outcomes.finished.keys(), self.outcomes.failed.keys()) != before

    def _expire_stale(self, study: Study) -> None:
        """Expire the claims of workers without a heartbeat."""
        fail_stale_trials(study)
        # A worker may have died between its claim and its first heartbeat.
        for trial in study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
            if "worker" not in trial.user_attrs:  # timed here: other machines' clocks may be wrong
                seen = self.unsigned.setdefault((study.study_name, trial.number), time.monotonic())
                if time.monotonic() - seen > GRACE:
                    self._set(self._id(study, trial), TrialState.FAIL)

    def _claim(self, cell: Cell) -> Job | None:
        study = self.studies[_study_name(cell)]

        def trials() -> list[FrozenTrial]:
            return [t for t in _current_trials(study) if t.user_attrs["cell"] == cell.key]

        if not trials():
            study.add_trial(_new_trial(cell))
        first, *more = sorted(trials(), key=lambda trial: trial.number)
        for trial in more:  # two workers added one at once
            if trial.state == TrialState.WAITING:
                self._set(self._id(study, trial), TrialState.PRUNED)
        trial_id = self._id(study, first)
        claimed = first.state == TrialState.WAITING and self._set(trial_id, TrialState.RUNNING)
        self.taken.add(cell.key)
        if not claimed:
            return None
        self.storage.record_heartbeat(trial_id)
        self.storage.set_trial_user_attr(trial_id, "worker", f"{platform.node()}:{os.getpid()}")
        self.mine[cell.name] = trial_id
        return Job(cell.name, 1000, cell.train)

    @_patiently
    def _end(self, job: Job, attributes: dict[str, Any], state: TrialState, *loss: float) -> None:
        trial_id = self.mine[job.name]
        # If our claim has expired, another worker has the cell now.
        with suppress(UpdateFinishedTrialError):
            for name, value in attributes.items():
                self.storage.set_trial_user_attr(trial_id, name, value)
            self._set(trial_id, state, *loss)
        del self.mine[job.name]
        self.looked = -math.inf

    def _set(self, trial_id: int, state: TrialState, *loss: float) -> bool:
        """Set a trial's state; returns False if another worker was faster."""
        try:
            return self.storage.set_trial_state_values(trial_id, state, loss or None)
        except UpdateFinishedTrialError:
            return False

    def _id(self, study: Study, trial: FrozenTrial) -> int:
        study_id = self.storage.get_study_id_from_name(study.study_name)
        return self.storage.get_trial_id_from_study_id_trial_number(study_id, trial.number)

    def _keep_beating(self) -> None:
        while not self.ended.wait(HEARTBEAT):
            with suppress(*STORAGE_ERRORS):  # the next beat may succeed
                self._beat()

    def _beat(self) -> None:
        for trial_id in list(self.mine.values()):
            self.storage.record_heartbeat(trial_id)


def _open(url: str) -> RDBStorage:
    """Open the storage; tries again if two workers create its tables at once."""
    sqlite = url.startswith("sqlite")
    options = {"connect_args": {"timeout": 60}} if sqlite else {}
    for tries in range(5):
        try:
            storage = RDBStorage(
                url, engine_kwargs=options, heartbeat_interval=HEARTBEAT, grace_period=GRACE
            )
            break
        except DBAPIError:
            if tries == 4:
                raise
            time.sleep(0.2)
    if sqlite:  # without SELECT ... FOR UPDATE, two workers could claim one trial
        storage.engine.dispose()
        event.listen(storage.engine, "connect", _by_hand)
        event.listen(storage.engine, "begin", lambda x: x.exec_driver_sql("BEGIN IMMEDIATE"))
    return storage


def _by_hand(connection: Any, _: Any) -> None:
    connection.isolation_level = None


def _current_trials(study: Study) -> list[FrozenTrial]:
    """The trials of a study that count.

    Left out are expired claims, cells that were given back, second trials of one cell, and failures
    that were tried again.
    """
    trials = [t for t in study.get_trials(deepcopy=False) if t.state != TrialState.PRUNED]
    last = {trial.user_attrs["cell"]: trial.number for trial in trials}
    return [
        trial
        for trial in trials
        if trial.state != TrialState.FAIL
        or ("reason" in trial.user_attrs and trial.number == last[trial.user_attrs["cell"]])
    ]


def _study_name(cell: Cell) -> str:
    return f"{cell.task.name}, {cell.trajectory.name}"


def _new_trial(cell: Cell) -> FrozenTrial:
    options = cell.trajectory.row.items()
    methods = [method.written for method in cell.run.methods]
    facts = (cell.key, cell.name, methods, cell.run.seed, cell.task.fixed)
    return _waiting(
        {k: x for k, x in options if k in SHOWN_OPTIONS and x not in (None, AUTO)},
        dict(zip(CELL_ATTRIBUTES, facts, strict=True)),
    )


def _waiting(options: dict[str, Any], attributes: dict[str, Any]) -> FrozenTrial:
    return create_trial(
        state=TrialState.WAITING,
        params=options,
        distributions={name: SHOWN_OPTIONS[name] for name in options},
        user_attrs=attributes,
    )


# ---- commands over a ledger ---------------------------------------------------------------------


def open_ledger(options: SharedOptions, plan: CellPlan, folder: Path) -> Ledger:
    """The ledger of a plan; without a storage in a file of its own.

    Raises:
        InputError: the folder or the storage cannot be used.
    """
    if folders.is_begun(folders.make(folder)) and (folder / folders.CHECKPOINTS).exists():
        raise InputError(f"out: {folder} is the folder of a run; name another")
    ledger = Ledger(options.storage or f"sqlite:///{folder / 'sweep.db'}", plan)
    if options.retry_failed:
        ledger.forget_failures()
    return ledger


def work_off(ledger: Ledger, workers: int | None, console: Console, folder: Path) -> None:
    """Run the remaining cells of a plan, until all have ended here or on other machines.

    The folder's progress.txt says how far they are.
    """
    left = ledger.left()
    if not left:
        return
    try:
        for task in {cell.task.name: cell.task for cell in left}.values():
            task.make_start(console)
    except KeyboardInterrupt:
        ledger.interrupted = True
        return
    workers = workers or (1 if torch.cuda.is_available() else cores())
    run_all(ledger, workers, threads_each(workers), console, folder / folders.PROGRESS)
    if reason := ledger.stopped():
        console.print(
            f"Stopped: the first trainings of every method failed alike: {reason}. When that is "
            "mended, --retry-failed tries them again.",
            style="red",
            markup=False,
            highlight=False,
        )


def write_rows(ledger: Ledger, folder: Path, configuration: dict[str, Any], **facts: Any) -> None:
    """Write metrics.jsonl, training.jsonl and manifest.json with the results of the cells.

    The manifest has the configuration and these further facts.
    """
    finished = ledger.outcomes.finished
    ended = [cell for cell in ledger.wanted if cell.key in finished]

    metrics = [folders.json_line(row) for cell in ended for row in finished[cell.key].rows]
    training: list[str] = []
    for cell in ended:
        of = {"setting": cell.task.name, "trained_with": cell.run.name}
        training += [folders.json_line({**of, **line}) for line in finished[cell.key].log]
    write_text(folder / folders.METRICS, "".join(metrics))
    write_text(folder / folders.TRAINING, "".join(training))
    manifest = {
        **environment(),
        "configuration": configuration,
        **facts,
        "tasks": {cell.task.name: cell.task.fixed for cell in ledger.wanted},
        "trainings": len(ledger.wanted),
        "finished": len(ended),
        "failed": ledger.failures(),
    }
    write_json(folder / folders.MANIFEST, manifest)
