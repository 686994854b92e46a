"""Training runs in worker processes, with news of them while they go on."""

import json
import math
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Empty
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from ..train.methods import Method
from ..train.model import make_gpt2
from ..train.terminal import progress_bars, quiet, show_losses
from ..train.trainer import Trained, train
from .report import Results

Row = dict[str, Any]


class Run(NamedTuple):
    """One training with one seed, and the methods that read their models out of it."""

    methods: tuple[Method, ...]  # of one trajectory
    seed: int

    @property
    def names(self) -> list[str]:
        """Of the methods' folders, as in `pace-c10-kappa0.3-lr0.01-seed0`."""
        labels = [f"{m.label} lr={m.lr:g} seed={self.seed}" for m in self.methods]
        plain = str.maketrans(
            {"κ": "kappa", "η": "eta", "α": "alpha", "ε": "eps", "=": "", " ": "-"}
        )
        return [label.translate(plain) for label in labels]

    @property
    def name(self) -> str:
        """Of the training: the first method's."""
        return self.names[0]


def share_runs(methods: Iterable[Method], seeds: Iterable[int]) -> list[Run]:
    """The trainings that all methods need, seed by seed: one for those that only watch AdamW."""
    shared: dict[Method, list[Method]] = {}
    for method in methods:
        shared.setdefault(method.trajectory, []).append(method)
    return [Run(tuple(same), seed) for seed in seeds for same in shared.values()]


@dataclass(frozen=True)
class Setting:
    """What all runs share: where they start, what they see, and how they are trained."""

    start: Path | None  # pretrained weights; None: random ones, from each run's seed
    tokens: Path  # as `tokenize` gives it
    tokenizer: PreTrainedTokenizerFast
    shape: dict[str, int]  # of the model, as `make_gpt2` takes it
    recipe: dict[str, Any]  # of the training, as `train` takes it
    steps: int
    evaluations: int

    def train(
        self, run: Run, folder: Path, watch: Callable[[int, dict[str, float]], bool]
    ) -> Trained:
        """Train one run from its start; see `paceline.train.trainer.train`."""
        model: Any
        if self.start is None:
            model = make_gpt2(self.tokenizer, **self.shape, seed=run.seed)
        else:
            model = AutoModelForCausalLM.from_pretrained(self.start)
        return train(
            model,
            load_file(self.tokens),
            run.methods,
            folder,
            steps=self.steps,
            evaluations=self.evaluations,
            seed=run.seed,
            watch=watch,
            **self.recipe,
        )


def run_all(
    setting: Setting,
    runs: list[Run],
    workers: int,
    threads: int,
    folder: Path,
    console: Console,
    results: Results,
) -> None:
    """Train every run in one of `workers` processes of `threads` threads each.

    Rows go to `results` and to metrics.jsonl as runs finish. Ctrl-C stops the runs under way and
    starts no more; a run that fails is noted, and does not stop the others.
    """
    context = multiprocessing.get_context("spawn")
    news, stop = context.Queue(), context.Event()

    def interrupt(*_: Any) -> None:
        results.interrupted = True

    previous = signal.signal(signal.SIGINT, interrupt)
    try:
        with (
            (folder / "metrics.jsonl").open("w", encoding="utf-8") as metrics,
            ProcessPoolExecutor(workers, context, _begin, (threads, news, stop)) as pool,
            progress_bars(console) as progress,
        ):
            with _sigint_blocked():  # in the workers for good: they start here, and inherit it
                pending: dict[Future[list[Row] | None], Run] = {
                    pool.submit(_run_one, setting, run, folder): run for run in runs
                }
            bars = _Bars(progress, setting.steps, len(runs))
            while pending:
                if results.interrupted and not stop.is_set():
                    stop.set()
                    for future in pending:
                        future.cancel()
                finished, _ = wait(pending, timeout=0.25, return_when=FIRST_COMPLETED)
                bars.show(news)
                for future in finished:
                    run = pending.pop(future)
                    bars.end(run.name)
                    if future.cancelled():
                        continue
                    if error := future.exception():
                        results.failed |= dict.fromkeys(run.names, _reason(error))
                        continue
                    for row in future.result() or []:
                        results.rows.append(row)
                        metrics.write(json.dumps(row, ensure_ascii=False) + "\n")
                    metrics.flush()
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def _sigint_blocked() -> Iterator[None]:
    """Keep Ctrl-C waiting. A terminal sends it to all, but the parent says when workers stop."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Bars:
    """A bar for all runs together, and one for each that is under way."""

    def __init__(self, progress: Progress, steps: int, runs: int) -> None:
        self.progress, self.steps = progress, steps
        self.whole = progress.add_task("all runs", total=steps * runs, losses="")
        self.tasks: dict[str, Any] = {}
        self.done: dict[str, int] = {}

    def show(self, news: Any) -> None:
        while True:
            try:
                name, step, losses = news.get_nowait()
            except Empty:
                break
            if self.done.get(name) == self.steps:  # news that came after the end
                continue
            if name not in self.tasks:
                self.tasks[name] = self.progress.add_task(name, total=self.steps, losses="")
            self.progress.update(self.tasks[name], completed=step, losses=show_losses(losses))
            self.done[name] = step
        self.progress.update(self.whole, completed=sum(self.done.values()))

    def end(self, name: str) -> None:
        if name in self.tasks:
            self.progress.remove_task(self.tasks.pop(name))
        self.done[name] = self.steps
        self.progress.update(self.whole, completed=sum(self.done.values()))


def _reason(error: BaseException) -> str:
    if isinstance(error, BrokenProcessPool):
        return "a worker process died (out of memory?), and the runs that were not done with it"
    return " ".join(f"{type(error).__name__}: {error}".split())


# ---- in the workers -----------------------------------------------------------------------------

_news: Any = None
_stop: Any = None


def _begin(threads: int, news: Any, stop: Any) -> None:
    global _news, _stop
    _news, _stop = news, stop
    torch.set_num_threads(threads)
    quiet()


def _run_one(setting: Setting, run: Run, folder: Path) -> list[Row] | None:
    """One run: its rows of metrics, or None if it was stopped."""

    def watch(step: int, losses: dict[str, float]) -> bool:
        _news.put((run.name, step, losses))
        return bool(_stop.is_set())

    if _stop.is_set():
        return None
    began = time.perf_counter()
    trained = setting.train(run, folder / "tensorboard" / run.name, watch)
    if trained.stopped:
        return None
    seconds = round(time.perf_counter() - began, 2)
    tokens = setting.recipe["batch"] * setting.recipe["context"]
    rows = []
    for name, method, curve in zip(run.names, run.methods, trained.trainer.curves, strict=True):
        model = folder / "models" / name
        trained.trainer.save_returned(method, str(model))
        setting.tokenizer.save_pretrained(model)
        facts = {"run": name, "label": method.label, **method.model_dump(), "seed": run.seed}
        facts |= {"trained_with": run.name, "seconds": seconds}  # of all that share the training
        for point in curve:
            numbers = {k: v if math.isfinite(v) else None for k, v in point.items()}
            rows.append({**facts, **numbers, "tokens": point["step"] * tokens})
    return rows
