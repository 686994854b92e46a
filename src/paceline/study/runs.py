"""Trainings in worker processes, with progress bars."""

import math
import multiprocessing
import os
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path
from queue import Empty
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import Progress

from ..train.manifest import cores
from ..train.methods import Method
from ..train.terminal import progress_bars, quiet, shortened, show_losses

TOLD_EVERY = 5.0  # seconds between writings of the file that says how far the runs are
Row = dict[str, Any]
Watch = Callable[[int, dict[str, float]], bool]


class Run(NamedTuple):
    """One training with one seed, and the methods whose models are read out of it."""

    methods: tuple[Method, ...]  # of one trajectory
    seed: int

    @property
    def names(self) -> list[str]:
        """Names of the methods' folders, as in `pace-pullback10-kappa0.3-lr0.01-seed0`."""
        labels = [f"{m.label} lr={m.lr:g} seed={self.seed}" for m in self.methods]
        return [label.replace("=", "").replace(" ", "-") for label in labels]

    @property
    def name(self) -> str:
        """The name of the training: that of its first method."""
        return self.names[0]

    def rows(
        self, curves: Iterable[list[dict[str, float]]], seconds: float, tokens: float
    ) -> list[Row]:
        """A row for each point of each method's curve in `MethodTrainer.curves`.

        The training took these seconds for all its methods, and reads so many tokens a step.
        """
        rows = []
        for name, method, curve in zip(self.names, self.methods, curves, strict=True):
            facts = {"run": name, "label": method.label, **method.row, "seed": self.seed}
            facts |= {"trained_with": self.name, "seconds": round(seconds, 2)}
            for point in curve:
                rows.append({**facts, **finite_values(point), "tokens": point["step"] * tokens})
        return rows


def finite_values(values: Mapping[str, float]) -> dict[str, float | None]:
    """The values with None for those that are not finite, as JSON takes them."""
    return {k: v if math.isfinite(v) else None for k, v in values.items()}


def loss_of(row: Row, which: str) -> float:
    """The `live`, `returned` or `selection` loss of a row, nats a token; inf if it diverged."""
    loss = row[f"{which}_loss"]
    return math.inf if loss is None else float(loss)


def share_runs(methods: Iterable[Method], seeds: Iterable[int]) -> list[Run]:
    """The trainings that all methods need, seed by seed; averages of one AdamW share one."""
    shared: dict[Method, list[Method]] = {}
    for method in methods:
        shared.setdefault(method.trajectory, []).append(method)
    return [Run(tuple(same), seed) for seed in seeds for same in shared.values()]


class Job(NamedTuple):
    """A training, for a worker process."""

    name: str
    steps: int
    call: Callable[[Watch], Any]  # pickled; returns None if it was stopped


class Queue(ABC):
    """A source of jobs that takes their results."""

    interrupted = False

    @abstractmethod
    def claim(self) -> Job | None:
        """The next job; None if there is none at the moment."""

    @abstractmethod
    def finish(self, job: Job, result: Any) -> None:
        """Take the result of a job."""

    @abstractmethod
    def fail(self, job: Job, reason: str) -> None:
        """Record why a job failed."""

    def give_back(self, job: Job) -> None:
        """Return a job that was stopped to the queue."""
        return

    def may_have_more(self) -> bool:
        """Whether there may be jobs later if there are none now."""
        return False

    @abstractmethod
    def progress(self) -> tuple[int, int]:
        """Steps done, without the jobs that run here, and steps in total."""


def threads_each(workers: int) -> int:
    """Threads of each of so many processes: their share of the cores, and at most torch's own.

    So OMP_NUM_THREADS holds for the workers, too.
    """
    import torch

    return max(1, min(cores() // workers, torch.get_num_threads()))


def run_all(
    queue: Queue, workers: int, threads: int, console: Console, told: Path | None = None
) -> None:
    """Do all jobs, each in one of `workers` processes of `threads` threads each.

    The file `told`, if one is named, says how far they are, in lines of 80 columns.

    Ctrl-C stops the running jobs and starts no others. A job that fails is recorded, and the others
    continue. If a process dies, the jobs that ran are tried once more, one at a time.
    """
    context = multiprocessing.get_context("spawn")

    def interrupt(*_: Any) -> None:
        queue.interrupted = True

    def new_pool() -> tuple[ProcessPoolExecutor, Any, Any]:
        # A process that died may have left the old queue and event locked.
        told = context.Queue(), context.Event()
        return ProcessPoolExecutor(workers, context, _init_worker, (threads, *told)), *told

    pool, news, stop = new_pool()
    pending: dict[Future[Any], Job] = {}
    again: list[Job] = []  # jobs that ran when a process died
    tried: set[str] = set()

    def next_job() -> Job | None:
        if queue.interrupted or len(pending) == workers:
            return None
        if again or any(job.name in tried for job in pending.values()):
            return None if pending else again.pop()
        return queue.claim()

    previous = signal.signal(signal.SIGINT, interrupt)
    try:
        with progress_bars(console) as progress:
            bars = _Bars(progress, queue, told)
            while True:
                died = False
                while job := next_job():
                    try:
                        with _sigint_blocked():  # workers inherit the mask for good
                            pending[pool.submit(_work, job)] = job
                    except BrokenProcessPool:  # another job broke it since the last wait
                        again.append(job)
                        died = True
                        break
                    bars.begin(job)
                if not pending and not again and not queue.may_have_more():
                    break
                if queue.interrupted:
                    stop.set()
                    for future in pending:
                        future.cancel()
                    if not pending:
                        break
                if not pending:  # other machines have the remaining jobs
                    time.sleep(0.25)
                finished, _ = wait(pending, timeout=0.25, return_when=FIRST_COMPLETED)
                bars.show(news)
                for future in finished:
                    job = pending.pop(future)
                    bars.end(job)
                    error = None if future.cancelled() else future.exception()
                    if isinstance(error, BrokenProcessPool):
                        died = True
                        if queue.interrupted:
                            queue.give_back(job)
                        elif job.name in tried:
                            queue.fail(job, "its worker process died (out of memory?), twice")
                        else:
                            again.append(job)
                            tried.add(job.name)
                    elif error is not None:
                        queue.fail(job, _one_line(error))
                    elif future.cancelled() or (result := future.result()) is None:
                        queue.give_back(job)
                    elif isinstance(result, _Failed):
                        queue.fail(job, result.reason)
                    else:
                        queue.finish(job, result)
                if died:
                    pool.shutdown()
                    pool, news, stop = new_pool()
            for job in again:
                queue.give_back(job)
            bars.tell()
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
        signal.signal(signal.SIGINT, previous)


@contextmanager
def _sigint_blocked() -> Iterator[None]:
    """Hold back Ctrl-C, which a terminal sends to workers too; the parent stops them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Bars:
    """A bar for all jobs together, and one for each running job; and a file that says the same."""

    def __init__(self, progress: Progress, queue: Queue, told: Path | None) -> None:
        self.progress, self.queue, self.told, self.told_at = progress, queue, told, 0.0
        done, total = queue.progress()
        self.whole = progress.add_task("all runs", total=total, completed=done, losses="")
        self.tasks: dict[str, Any] = {}  # of the running jobs

    def show(self, news: Any) -> None:
        with suppress(Empty):
            while True:
                name, step, losses = news.get_nowait()
                if name in self.tasks:  # or the job has ended
                    shown = show_losses(losses)
                    self.progress.update(self.tasks[name], completed=step, losses=shown)
        done, total = self.queue.progress()
        here = sum(task.completed for task in self.progress.tasks if task.id != self.whole)
        self.progress.update(self.whole, completed=done + here, total=total)
        if time.monotonic() > self.told_at + TOLD_EVERY:
            self.tell()

    def tell(self) -> None:
        """Write the file: a line for all jobs, and two for each that runs here."""
        if self.told is None:
            return
        self.told_at = time.monotonic()
        whole, *others = sorted(self.progress.tasks, key=lambda task: task.id != self.whole)
        left = "" if whole.time_remaining is None else f", {_clock(whole.time_remaining)} left"
        lines = [
            f"{whole.percentage:.0f} % of all runs after {_clock(whole.elapsed or 0)}{left}",
            f"{datetime.now():%Y-%m-%d %H:%M:%S}, {len(others)} running in process {os.getpid()}",
        ]
        for task in others:
            lines += [shortened(task.description, 80)]
            losses = task.fields["losses"]
            lines += [f"    step {task.completed:.0f} of {task.total:.0f}  {losses}".rstrip()]
        with suppress(OSError):  # the runs matter more
            self.told.write_text("\n".join(lines) + "\n", encoding="utf-8")  # no trace of a kill

    def begin(self, job: Job) -> None:
        self.tasks[job.name] = self.progress.add_task(job.name, total=job.steps, losses="")

    def end(self, job: Job) -> None:
        self.progress.remove_task(self.tasks.pop(job.name))


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


# ---- in the workers -----------------------------------------------------------------------------

_news: Any = None
_stop: Any = None


def _init_worker(threads: int, news: Any, stop: Any) -> None:
    import torch

    global _news, _stop
    _news, _stop = news, stop
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    quiet()


def _end_with_parent() -> None:
    """Exit if the parent was killed; a pool's workers would wait for its jobs forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


class _Failed(NamedTuple):
    reason: str


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _work(job: Job) -> Any:
    """The result of a job; None if it was stopped."""

    def watch(step: int, losses: dict[str, float]) -> bool:
        _news.put((job.name, step, losses))
        return bool(_stop.is_set())

    try:
        return None if _stop.is_set() else job.call(watch)
    except Exception as error:  # as text: not every exception can be pickled
        return _Failed(_one_line(error))
