"""`paceline compare`: fine-tune one model by each method, and score what each returns."""

import contextlib
import json
import math
import multiprocessing
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import traceback
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from datetime import datetime
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, NamedTuple, Self

import torch
import transformers
import tyro
from pydantic import Field, model_validator
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from ..train import InputError, Options
from ..train.data import (
    cache_folder,
    content_key,
    files_below,
    make_tokenizer,
    read_corpus,
    standard_library_files,
    tokenize,
    torch_files,
)
from ..train.methods import Method, Schedule, parse_method
from ..train.model import make_gpt2
from ..train.trainer import train
from .report import Results, write_report

PACKAGES = (
    *("paceline", "torch", "transformers", "accelerate", "tokenizers"),
    *("schedulefree", "numpy", "pydantic", "tyro"),
)
Positive = Annotated[int, Field(ge=1)]
# On the command line one argument, separated by commas; pydantic makes numbers of the parts.
Listed = tyro.constructors.PrimitiveConstructorSpec(
    nargs=1,
    metavar="A,B,…",
    instance_from_str=lambda arguments: tuple(arguments[0].split(",")),
    is_instance=lambda value: isinstance(value, tuple),
    str_from_instance=lambda value: [",".join(map(str, value))],
)


class Comparison(Options):
    """Fine-tune one small language model by several methods, and score the model each returns.

    Every method starts from the same weights and sees the same batches in the same order; the
    validation loss of the live weights and of the returned model is measured on the same text.

    A method is written name[:schedule][:option=value]... with the names adamw, ema (AdamW whose
    EMA is returned), schedule-free and pace, the schedules constant, cosine, wsd, power and twin,
    and the options lr, c, kappa and g: for example ema:twin:g=0.5 or pace:c=1:kappa=0.5:lr=3e-3.
    """

    methods: Annotated[tuple[str, ...], Listed] = (
        "adamw",
        "adamw:wsd",
        "ema",
        "ema:kappa=0.7",
        "ema:twin",
        "schedule-free",
        "pace",
    )
    """Methods to compare, separated by commas."""
    lr: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Listed] = (3e-3, 1e-2)
    """Peak learning rates > 0, separated by commas; each method is run at each of them."""
    schedule: Schedule = "constant"
    """Schedule of the methods that name none: constant; cosine (to 0); wsd (constant, then linear
    to 0 over the last fifth); power, lr·(1+t)^-kappa; twin, lr·b/(b+g) with b = (1+t)^-kappa,
    which a pull of gain g amounts to. schedule-free never has one."""
    c: Annotated[float, Field(ge=0)] = 10.0
    """Strength of the pull of pace, >= 0, in the unit of a gradient."""
    kappa: Annotated[float, Field(ge=0, le=1)] = 0.3
    """Power κ in [0, 1] of the averages of ema and pace, and of the schedules power and twin."""
    g: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Gain in (0, 1] that the schedule twin stands for."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Listed] = (0,)
    """Seeds >= 0 of the order of the batches (and of the initial weights with --from-scratch),
    separated by commas; every method is run with each of them."""
    steps: Positive = 2000
    """Fine-tuning steps of each run."""
    minutes: Annotated[float, Field(gt=0)] | None = None
    """Time for all fine-tuning runs together, minutes. If they would take longer, all get the same
    smaller number of steps, measured before the first."""
    warmup: Annotated[int, Field(ge=0)] = 20
    """Steps of linear warm-up."""
    batch: Positive = 4
    """Sequences a step."""
    context: Annotated[int, Field(ge=2)] = 32
    """Tokens a sequence, at most --positions."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled weight decay >= 0, on matrices."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are clipped to this 2-norm, > 0."""

    text: tuple[Path, ...] = ()
    """Files or folders to fine-tune on. Default: the sources of the installed torch package."""
    pretrain_text: tuple[Path, ...] = ()
    """Files or folders to pretrain on. Default: the standard library's own sources."""
    text_mb: Annotated[float, Field(gt=0)] = 16.0
    """Megabytes of each text to use at most; a random part of more."""
    vocabulary: Annotated[int, Field(ge=257)] = 1024
    """Entries of the byte-level BPE, at least 257."""
    from_scratch: bool = False
    """Skip the pretraining, and start from random weights."""
    pretrain_steps: Positive = 2000
    """Steps of the pretraining (AdamW with wsd, 16 sequences of --positions tokens a step). Its
    result is kept in the cache."""
    pretrain_lr: Annotated[float, Field(gt=0)] = 3e-3
    """Peak learning rate of the pretraining, > 0."""
    width: Positive = 64
    """Width of the GPT-2, a multiple of --heads."""
    layers: Positive = 2
    """Layers of the GPT-2."""
    heads: Positive = 2
    """Attention heads of each layer."""
    positions: Annotated[int, Field(ge=2)] = 64
    """Longest sequence that the model takes, tokens."""

    evaluations: Positive = 8
    """Evaluations of both models over a run, besides the one at the start."""
    eval_tokens: Positive = 16384
    """Validation tokens that each evaluation reads, at most."""
    workers: Positive | None = None
    """Runs at a time. Default: one for each processor core, or one where there is a GPU."""
    out: Path | None = None
    """Folder for the results, new or empty. Default: runs/<time>."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.context > self.positions:
            raise InputError(
                f"context: {self.context} tokens are more than the model's {self.positions} "
                "positions; give a smaller --context or a larger --positions"
            )
        if self.width % self.heads:
            raise InputError(f"width: {self.width} is not a multiple of {self.heads} heads")
        for name in ("methods", "lr", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise InputError(f"{name}: give at least one, and each only once, got {values}")
        if len(set(self.runs)) < len(self.runs):
            raise InputError(f"methods: two of {', '.join(self.methods)} are the same run")
        return self

    @cached_property
    def runs(self) -> list["Run"]:
        """Every run, seed by seed, so that an interrupted comparison has whole seeds first."""
        defaults = {"schedule": self.schedule, "c": self.c, "kappa": self.kappa, "g": self.g}
        methods: list[Method] = []
        for text in self.methods:
            own = defaults | ({"schedule": "constant"} if text.startswith("schedule-free") else {})
            found = [parse_method(text, {**own, "lr": lr}) for lr in self.lr]
            methods += dict.fromkeys(found)  # one run, not one a rate, where the text has its own
        return [Run(method, seed) for seed in self.seeds for method in methods]


class Run(NamedTuple):
    """One method with one seed."""

    method: Method
    seed: int

    @property
    def name(self) -> str:
        """Of its folders, as in `pace-c10-kappa0.3-lr0.01-seed0`."""
        label = f"{self.method.label} lr={self.method.lr:g} seed={self.seed}"
        return label.replace("κ", "kappa").replace("=", "").replace(" ", "-")


class Start(NamedTuple):
    """What all runs share: where they start, and what they see."""

    model: Path | None  # pretrained weights; None: random ones, from each run's seed
    tokens: Path  # as `tokenize` gives it
    tokenizer: PreTrainedTokenizerFast


def compare(options: Comparison, console: Console) -> Results:
    """Run the comparison, and write report, curves, metrics, models and manifest to its folder.

    Ctrl-C ends it early: what is finished is reported all the same.

    Raises:
        InputError: something given cannot be used; nothing has been trained then.
    """
    began = time.time()
    quiet()
    corpora = [
        read_corpus(files_below(paths) if paths else default(), int(options.text_mb * 1e6))
        for paths, default in (
            (options.text, torch_files),
            (options.pretrain_text, standard_library_files),
        )
        if not (options.from_scratch and default is standard_library_files)
    ]
    tokenizer = make_tokenizer(corpora[-1].train, options.vocabulary)
    tokens = [tokenize(corpus, tokenizer) for corpus in corpora]
    for path, length in zip(tokens, (options.context, options.positions), strict=False):
        for part, ids in load_file(path).items():
            if len(ids) < length:
                raise InputError(
                    f"the text is too short: its {part} part has {len(ids)} tokens, and one "
                    f"sequence needs {length}; give more text"
                )
    folder = options.out or Path("runs") / datetime.now().strftime("%Y-%m-%d_%H%M%S")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"out: {folder} is not an empty folder; name another")
    folder.mkdir(parents=True, exist_ok=True)

    manifest: dict[str, Any] = {
        "command": ["paceline", *sys.argv[1:]],
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **{p: version(p) for p in PACKAGES}},
        "git_commit": _git_commit(),
        "hardware": _hardware(),
        "data_sha256": [corpus.digest() for corpus in corpora],
        "configuration": json.loads(options.model_dump_json()),
    }
    _write_json(folder / "manifest.json", manifest)
    workers = options.workers or (1 if torch.cuda.is_available() else _cores())
    workers = min(workers, len(options.runs))
    threads = max(1, _cores() // workers)

    results = Results(total_runs=len(options.runs))
    try:
        pretrained = None
        if not options.from_scratch:
            pretrained = _pretrained(options, tokens[-1], tokenizer, console)
        start = Start(pretrained, tokens[0], tokenizer)
        steps = options.steps
        if options.minutes is not None:
            steps = _affordable_steps(options, start, workers, threads)
            if steps < options.steps:
                console.print(
                    f"{options.minutes:g} minutes are enough for {steps} of {options.steps} steps."
                )
        manifest |= {"steps": steps, "workers": workers, "threads_per_worker": threads}
        _run_all(options, start, steps, workers, threads, folder, console, results)
    except KeyboardInterrupt:
        results.interrupted = True
    order = [run.name for run in options.runs]
    results.rows.sort(key=lambda row: order.index(row["run"]))
    manifest |= {
        "seconds": round(time.time() - began, 1),
        "interrupted": results.interrupted,
        "failed": results.failed,
    }
    _write_json(folder / "manifest.json", manifest)
    write_report(results, manifest, folder, console)
    return results


# ---- the shared start ---------------------------------------------------------------------------


def _pretrained(
    options: Comparison,
    tokens: Path,
    tokenizer: PreTrainedTokenizerFast,
    console: Console,
) -> Path:
    """A folder with the model that every run starts from; made once, then found in the cache."""
    method = parse_method("adamw:wsd", {"lr": options.pretrain_lr, "c": 0, "kappa": 0, "g": 1})
    shape = options.model_dump(include={"width", "layers", "heads", "positions"})
    recipe: dict[str, Any] = {
        "steps": options.pretrain_steps,
        "batch": 16,
        "context": options.positions,
        "warmup": 100,
        "weight_decay": options.weight_decay,
        "max_grad_norm": options.max_grad_norm,
        "seed": 0,
        "evaluations": 4,
        "eval_tokens": options.eval_tokens,
    }
    key = content_key(shape, method, recipe, tokens.name, torch.__version__)
    folder = cache_folder() / f"start-{key}"
    if folder.exists():
        console.print(f"Starting from the pretrained model in {folder}.")
        return folder
    model = make_gpt2(tokenizer, **shape, seed=0)
    console.print(f"Pretraining a GPT-2 of {model.num_parameters() / 1e6:.2f}M parameters, once.")
    with TemporaryDirectory(dir=cache_folder()) as scratch, _progress(console) as progress:
        task = progress.add_task("pretraining", total=options.pretrain_steps, losses="")

        def watch(step: int, losses: dict[str, float]) -> bool:
            progress.update(task, completed=step, losses=_losses(losses))
            return False

        train(model, load_file(tokens), method, Path(scratch) / "log", **recipe, watch=watch)
        model.save_pretrained(Path(scratch) / "model")
        with contextlib.suppress(OSError):  # another process was faster: its model is the same
            (Path(scratch) / "model").rename(folder)
    return folder


def _affordable_steps(options: Comparison, start: Start, workers: int, threads: int) -> int:
    """Steps for which all runs fit into `options.minutes`, from a short run as they will be."""
    probe, before = 60, torch.get_num_threads()
    torch.set_num_threads(threads)
    marks: list[tuple[int, float]] = []

    def watch(step: int, losses: dict[str, float]) -> bool:
        marks.append((step, time.perf_counter()))
        return False

    with TemporaryDirectory() as scratch:
        trained = _train_run(options, start, options.runs[-1], probe, 1, Path(scratch), watch)
    torch.set_num_threads(before)
    (first, begin), (last, end) = marks[10], marks[-1]
    runtimes = [h for h in trained.trainer.state.log_history if "eval_runtime" in h]
    evaluation = 2 * runtimes[-1]["eval_runtime"] * (options.evaluations + 1)
    rounds = math.ceil(len(options.runs) / workers)
    # Workers get in each other's way, and each spends about 10 s on starting.
    seconds = (options.minutes or 0) * 60 / rounds / 1.25 - 10 / rounds - evaluation
    return max(1, min(options.steps, int(seconds / ((end - begin) / (last - first)))))


# ---- the runs -----------------------------------------------------------------------------------


def _run_all(
    options: Comparison,
    start: Start,
    steps: int,
    workers: int,
    threads: int,
    folder: Path,
    console: Console,
    results: Results,
) -> None:
    """Train every run in worker processes; fills `results` and metrics.jsonl as they finish."""
    context = multiprocessing.get_context("spawn")
    with (
        contextlib.ExitStack() as stack,
        open(folder / "metrics.jsonl", "w", encoding="utf-8") as metrics,  # noqa: PTH123
    ):
        manager = stack.enter_context(context.Manager())
        news, stop = manager.Queue(), manager.Event()
        pool = stack.enter_context(ProcessPoolExecutor(workers, context, _start_worker, (threads,)))
        progress = stack.enter_context(_progress(console))
        whole = progress.add_task("all runs", total=steps * len(options.runs), losses="")
        tasks: dict[str, Any] = {}
        done_steps: dict[str, int] = {}
        pending: dict[Future[list[dict[str, Any]] | None], Run] = {
            pool.submit(_run_one, options, start, run, steps, folder, news, stop): run
            for run in options.runs
        }

        def show_news() -> None:
            while not news.empty():
                name, step, losses = news.get()
                if name not in tasks:
                    tasks[name] = progress.add_task(name, total=steps, losses="")
                progress.update(tasks[name], completed=step, losses=_losses(losses))
                done_steps[name] = step
            progress.update(whole, completed=sum(done_steps.values()))

        while pending:
            try:
                finished, _ = wait(pending, timeout=0.25, return_when=FIRST_COMPLETED)
                show_news()
            except KeyboardInterrupt:
                results.interrupted = True
                stop.set()
                for future in pending:
                    future.cancel()
                continue
            for future in finished:
                run = pending.pop(future)
                if future.cancelled():
                    continue
                if run.name in tasks:
                    progress.remove_task(tasks.pop(run.name))
                done_steps[run.name] = steps
                if error := future.exception():
                    results.failed[run.name] = f"{type(error).__name__}: {error}"
                    console.print(f"[red]failed:[/] {run.name}: {error}", highlight=False)
                    continue
                for row in future.result() or []:
                    results.rows.append(row)
                    metrics.write(json.dumps(row, ensure_ascii=False) + "\n")
                metrics.flush()


def _start_worker(threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when to stop
    torch.set_num_threads(threads)
    quiet()


def _run_one(
    options: Comparison, start: Start, run: Run, steps: int, folder: Path, news: Any, stop: Any
) -> list[dict[str, Any]] | None:
    """One run in a worker: its rows of metrics, or None if it was stopped."""

    def watch(step: int, losses: dict[str, float]) -> bool:
        news.put((run.name, step, losses))
        return bool(stop.is_set())

    if stop.is_set():
        return None
    began = time.perf_counter()
    try:
        trained = _train_run(
            options,
            start,
            run,
            steps,
            options.evaluations,
            folder / "tensorboard" / run.name,
            watch,
        )
    except Exception as error:
        raise RuntimeError("".join(traceback.format_exception_only(error)).strip()) from error
    if trained.stopped:
        return None
    model = folder / "models" / run.name
    trained.trainer.save_returned(str(model))
    start.tokenizer.save_pretrained(model)
    facts = {
        "run": run.name,
        "label": run.method.label,
        **run.method.model_dump(),
        "seed": run.seed,
        "seconds": round(time.perf_counter() - began, 2),
    }
    return [
        {
            **facts,
            **{k: v if math.isfinite(v) else None for k, v in point.items()},
            "tokens": point["step"] * options.batch * options.context,
        }
        for point in trained.trainer.curve
    ]


def _train_run(
    options: Comparison,
    start: Start,
    run: Run,
    steps: int,
    evaluations: int,
    folder: Path,
    watch: Any,
) -> Any:
    if start.model is None:
        shape = options.model_dump(include={"width", "layers", "heads", "positions"})
        model: Any = make_gpt2(start.tokenizer, **shape, seed=run.seed)
    else:
        model = AutoModelForCausalLM.from_pretrained(start.model)
    return train(
        model,
        load_file(start.tokens),
        run.method,
        folder,
        steps=steps,
        evaluations=evaluations,
        watch=watch,
        seed=run.seed,
        **options.model_dump(
            include={"batch", "context", "warmup", "weight_decay", "max_grad_norm", "eval_tokens"}
        ),
    )


def quiet() -> None:
    """Leave the terminal to our own bars and tables."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


# ---- small things -------------------------------------------------------------------------------


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[losses]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )


def _losses(losses: dict[str, float]) -> str:
    if "eval_loss" not in losses:
        return ""
    live = losses.get("eval_live_loss", losses["eval_loss"])
    return f"live {live:.3f}  returned {losses['eval_loss']:.3f}"


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _git_commit() -> str | None:
    """Commit of the sources that are running, with `-dirty` if they were changed since."""
    here = Path(__file__).parent
    git = shutil.which("git")
    if git is None:
        return None
    tracked = [git, "-C", str(here), "ls-files", "--error-unmatch", __file__]
    if subprocess.run(tracked, capture_output=True, check=False).returncode:
        return None
    describe = [git, "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40"]
    return subprocess.run(describe, capture_output=True, text=True, check=False).stdout.strip()


def _hardware() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
                break
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"system": platform.platform(), "cpu": cpu, "cores": _cores(), "gpus": gpus}


def _write_json(path: Path, value: Any) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)
