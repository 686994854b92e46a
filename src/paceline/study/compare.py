"""`paceline compare`: fine-tune one model by each method, and score the returned models."""

import dataclasses
import json
import math
import time
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal, Self, TextIO

import torch
import transformers
from pydantic import Field, model_validator
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from ..cache import cache_folder
from ..files import put
from ..sums import write_sums
from ..train import Gain, InputError, NonNegative, Number, Options, Positive, Power
from ..train import data as texts
from ..train import folder as folders
from ..train.manifest import cores, environment, write_json
from ..train.methods import (
    WSD_DECAY_SHARE,
    Method,
    ScheduleName,
    methods_help,
    parse_method,
    refuse_untaken,
)
from ..train.model import make_gpt2
from ..train.recipe import Names
from ..train.terminal import progress_bars, quiet, show_losses
from ..train.trainer import Trained, train_blocks
from .report import Results, write_report
from .runs import Job, Queue, Row, Run, Watch, run_all, share_runs, threads_each


class Comparison(Options):
    """Fine-tune one small language model by several methods, and score the model each returns.

    Every method starts from the same weights and sees the same batches in the same order. The
    validation loss of live weights and returned model is measured on the same text.

    A method is written name[:schedule][:option=value]..., as in ema:twin:twin_gain=0.5,
    pace:pullback=1:kappa=0.5:lr=3e-3 or pace:pullback=auto. All have the option lr. With
    return_kappa a method returns another average than the one of kappa, which it pulls toward.
    Averages of AdamW share one training.

    The default rates and options were chosen on the validation part of the default text.
    """

    methods: Annotated[tuple[str, ...], Names] = (
        "adamw:cosine",
        "ema:kappa=0.7",
        "schedule-free",
        "ema:power:return_kappa=0.7",
        "pace:return_kappa=0.7",
    )
    """Methods to compare, separated by commas."""
    lr: Annotated[tuple[Number, ...], Names] = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
    """Peak learning rates > 0, separated by commas; each method is run at each of them."""
    schedule: ScheduleName = "constant"
    pullback: NonNegative | Literal["auto"] = 10.0
    """Strength c >= 0 of the pull of pace and pullback, in the unit of a gradient; or auto, with which pace sets it itself and, unless kappa is given, pulls toward κ 0.3 and returns κ 0.6."""
    kappa: Power | None = None
    """Power κ in [0, 1] of the averages of ema, pace and pullback, and of the schedules power and twin. Default: 0.3, and PACE's own with --pullback auto."""
    twin_gain: Gain = 1.0
    """Gain in (0, 1] of the pull that the schedule twin stands for."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**32)], ...], Names] = (0,)
    """Seeds >= 0 of the order of the batches (and of the initial weights with --from-scratch), separated by commas; every method is run with each of them."""
    steps: Positive = 2000
    """Fine-tuning steps of each run, >= 1."""
    minutes: Annotated[float, Field(gt=0, le=10**9)] | None = None
    """Time for all fine-tuning runs together, minutes > 0. If they would take longer, a short measurement sets a smaller number of steps for all."""
    warmup: Annotated[int, Field(ge=0)] = 20
    """Steps of linear warm-up, >= 0 and less than four fifths of the steps."""
    batch: Positive = 4
    """Sequences a step, >= 1."""
    context: Annotated[int, Field(ge=2)] = 32
    """Tokens a sequence, from 2 to --positions."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled weight decay >= 0, on matrices."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are clipped to this 2-norm, > 0."""

    text: tuple[Path, ...] | None = None
    """Files or folders to fine-tune on. Default: the sources of the installed torch package."""
    pretrain_text: tuple[Path, ...] | None = None
    """Files or folders to pretrain on. Default: the standard library's own sources."""
    text_mb: Annotated[float, Field(gt=0, le=10**6)] = 16.0
    """Million characters of each text to use at most, > 0 and at most 10^6; a random part of more."""
    vocabulary: Annotated[int, Field(ge=257, le=2**20)] = 1024
    """Entries of the byte-level BPE, from 257 to 2^20."""
    from_scratch: bool = False
    """Skip the pretraining and start from random weights."""
    pretrain_steps: Annotated[int, Field(ge=10)] = 2000
    """Steps of the pretraining (AdamW with wsd, 16 sequences of --positions tokens a step), >= 10. Its result is kept in the cache."""
    pretrain_lr: Number = 3e-3
    """Peak learning rate of the pretraining, > 0."""
    width: Positive = 64
    """Width of the GPT-2, a multiple of --heads."""
    layers: Positive = 2
    """Layers of the GPT-2, >= 1."""
    heads: Positive = 2
    """Attention heads of each layer, >= 1."""
    positions: Annotated[int, Field(ge=2)] = 64
    """Longest sequence that the model takes, tokens, >= 2."""

    evaluations: Positive = 8
    """Evaluations of live and returned weights, >= 1, after the one at the start."""
    eval_tokens: Positive = 16384
    """Validation tokens that an evaluation reads at most, >= 1, spread over the whole part."""
    workers: Positive | None = None
    """Runs at a time, >= 1. Default: one a processor core, or one with a GPU."""
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
        if self.from_scratch and self.pretrain_text is not None:
            raise InputError("pretrain-text: there is no pretraining with --from-scratch")
        for name in ("methods", "lr", "seeds", "text", "pretrain_text"):
            values = getattr(self, name)
            if values is not None and not len(set(values)) == len(values) > 0:
                shown = ", ".join(map(str, values)) or "nothing"
                raise InputError(f"{name}: give at least one, and each only once, got {shown}")
        names = [name for run in share_runs(self.compared, (0,)) for name in run.names]
        if len(set(names)) < len(names):
            raise InputError(f"methods: two of {', '.join(self.methods)} are the same run")
        _check_warmup(self.warmup, self.steps)
        return self

    def refuse_unused(self, given: Collection[str]) -> None:
        """Refuse options of methods that no method takes."""
        names = {"lr", "pullback", "kappa", "twin_gain", "schedule"}
        refuse_untaken(names.intersection(given), self.methods, self.schedule)

    @cached_property
    def compared(self) -> list[Method]:
        """Every method at each of its rates."""
        compared: list[Method] = []
        defaults = self.model_dump(include={"pullback", "kappa", "twin_gain", "schedule"})
        for text in self.methods:
            found = (parse_method(text, lr=lr, **defaults) for lr in self.lr)
            in_steps = [x.in_steps(self.batch, self.batch * self.context) for x in found]
            compared += dict.fromkeys(in_steps)  # one, not one a rate, where the text has its own
        return compared

    @cached_property
    def runs(self) -> list[Run]:
        """Every training, seed by seed, so that an interruption leaves whole seeds."""
        return share_runs(self.compared, self.seeds)

    @property
    def shape(self) -> dict[str, int]:
        """The arguments of `make_gpt2`."""
        return self.model_dump(include={"width", "layers", "heads", "positions"})

    @property
    def recipe(self) -> dict[str, Any]:
        """The arguments of `train_blocks`."""
        names = {"batch", "context", "warmup", "weight_decay", "max_grad_norm", "eval_tokens"}
        return self.model_dump(include=names)


Comparison.__doc__ = f"{Comparison.__doc__}\n{methods_help()}"


def _check_warmup(warmup: int, steps: int) -> None:
    if warmup and warmup >= (1 - WSD_DECAY_SHARE) * steps:
        raise InputError(
            f"warmup: {warmup} steps are too many for a run of {steps}; "
            "give a smaller --warmup, or more --steps or --minutes"
        )


def compare_command(options: Comparison, console: Console) -> int:
    """Run a comparison; an exit status."""
    results = compare(options, console)
    return 130 if results.interrupted else 1 if results.failed else 0


def compare(options: Comparison, console: Console) -> Results:
    """Run the comparison, and write report, curves, metrics, models and manifest to its folder.

    After Ctrl-C the finished runs are reported.

    Raises:
        InputError: an option cannot be used. Nothing was trained then, except for a short
            measurement if `minutes` are too few for the warm-up.
    """
    out = options.out or Path(f"runs/{datetime.now():%Y-%m-%d_%H%M%S}")
    with folders.locked(out):
        folders.require_empty(out)
        return _compare(options, out, console)


def _compare(options: Comparison, folder: Path, console: Console) -> Results:
    began = time.time()
    quiet()
    size = int(options.text_mb * 1e6)
    files = texts.files_below(options.text) if options.text else texts.torch_files()
    corpus = texts.read_corpus(files, size)
    earlier = earlier_tokens = None
    if not options.from_scratch:
        given = options.pretrain_text
        files = texts.files_below(given) if given else texts.standard_library_files()
        earlier = texts.read_corpus(files, size, held_out=corpus.validation)
    tokenizer = texts.make_tokenizer((earlier or corpus).train, options.vocabulary)
    tokens = _enough(texts.tokenize(corpus, tokenizer), options.context)
    if earlier:
        earlier_tokens = _enough(texts.tokenize(earlier, tokenizer), options.positions)

    manifest: dict[str, Any] = {
        **environment(),
        "text": _text_name(options.text, "sources of the installed torch"),
        "text_sha256": corpus.digest(),
        "pretrain_text": earlier and _text_name(options.pretrain_text, "the standard library"),
        "pretrain_text_sha256": earlier and earlier.digest(),
        "configuration": json.loads(options.model_dump_json()),
    }
    write_json(folder / folders.MANIFEST, manifest)
    results = Results(total_runs=len(options.compared) * len(options.seeds))
    try:
        start = earlier_tokens and _pretrained(options, earlier_tokens, tokenizer, console)
        workers = options.workers or (1 if torch.cuda.is_available() else cores())
        workers = min(workers, len(options.runs))
        threads = threads_each(workers)
        budget = options.steps, options.evaluations
        setting = Setting(start, tokens, tokenizer, options.shape, options.recipe, *budget)
        if options.minutes is not None:
            steps = _affordable_steps(setting, options.runs, options.minutes, workers, threads)
            if steps < options.steps:
                enough = f"{steps} of {options.steps} steps"
                console.print(f"{options.minutes:g} minutes are enough for {enough}.")
                _check_warmup(options.warmup, steps)
                setting = dataclasses.replace(setting, steps=steps)
        manifest |= {"steps": setting.steps, "workers": workers, "threads_per_worker": threads}
        with (folder / folders.METRICS).open("w", encoding="utf-8") as metrics:
            queue = _Comparing(setting, options.runs, folder, metrics, results)
            run_all(queue, workers, threads, console)
            results.interrupted = queue.interrupted
    except KeyboardInterrupt:  # before the first run; `run_all` handles it later
        results.interrupted = True
    order = [(method.label, method.lr) for method in options.compared]
    results.rows.sort(key=lambda row: (row["seed"], order.index((row["label"], row["lr"]))))
    manifest["seconds"] = round(time.time() - began, 1)
    manifest |= {"interrupted": results.interrupted, "failed": results.failed}
    write_json(folder / folders.MANIFEST, manifest)
    write_report(results, manifest, folder, console)
    return results


@dataclass(frozen=True)
class Setting:
    """The start, data and training that all runs share."""

    start: Path | None  # folder of the pretrained model; None: random weights from each run's seed
    tokens: Path  # the file that `tokenize` writes
    tokenizer: PreTrainedTokenizerFast
    shape: dict[str, int]  # arguments of `make_gpt2`
    recipe: dict[str, Any]  # arguments of `train_blocks`
    steps: int
    evaluations: int

    def train(self, run: Run, folder: Path, watch: Watch) -> Trained:
        """Train one run from its start; see `paceline.train.trainer.train_blocks`."""
        model: Any
        if self.start is None:
            model = make_gpt2(self.tokenizer, **self.shape, seed=run.seed)
        else:
            model = AutoModelForCausalLM.from_pretrained(self.start, trust_remote_code=False)
        own: dict[str, Any] = {"steps": self.steps, "evaluations": self.evaluations}
        own |= {"seed": run.seed, "watch": watch}
        return train_blocks(
            model, load_file(self.tokens), run.methods, folder, **own, **self.recipe
        )

    def rows(self, run: Run, folder: Path, watch: Watch) -> list[Row] | None:
        """Train and save the returned models; returns rows of metrics, or None if stopped."""
        began = time.perf_counter()
        trained = self.train(run, folder / folders.TENSORBOARD / run.name, watch)
        if trained.stopped:
            return None
        seconds = time.perf_counter() - began
        for name, method in zip(run.names, run.methods, strict=True):
            model = folder / folders.MODELS / name
            trained.trainer.save_returned(method, str(model))
            self.tokenizer.save_pretrained(model)
            write_sums(model)
        tokens = self.recipe["batch"] * self.recipe["context"]
        return run.rows(trained.trainer.curves, seconds, tokens)


class _Comparing(Queue):
    """The runs in their order; their rows go to the results and to metrics.jsonl."""

    def __init__(
        self, setting: Setting, runs: list[Run], folder: Path, metrics: TextIO, results: Results
    ) -> None:
        self.setting, self.folder, self.metrics, self.results = setting, folder, metrics, results
        self.runs = {run.name: run for run in runs}
        self.waiting, self.ended = iter(runs), 0

    def claim(self) -> Job | None:
        if (run := next(self.waiting, None)) is None:
            return None
        return Job(run.name, self.setting.steps, partial(self.setting.rows, run, self.folder))

    def finish(self, job: Job, result: list[Row]) -> None:
        self.ended += 1
        self.results.rows += result
        self.metrics.writelines(map(folders.json_line, result))
        self.metrics.flush()

    def fail(self, job: Job, reason: str) -> None:
        self.ended += 1
        self.results.failed |= dict.fromkeys(self.runs[job.name].names, reason)

    def progress(self) -> tuple[int, int]:
        return self.ended * self.setting.steps, len(self.runs) * self.setting.steps


def _enough(tokens: Path, length: int) -> Path:
    for part, ids in load_file(tokens).items():
        if len(ids) < length:
            raise InputError(
                f"the text is too short: its {part} part has {len(ids)} tokens, and one sequence "
                f"needs {length}; give more text"
            )
    return tokens


def _text_name(paths: tuple[Path, ...] | None, default: str) -> str:
    return default if paths is None else ", ".join(map(str, paths))


def _pretrained(
    options: Comparison, tokens: Path, tokenizer: PreTrainedTokenizerFast, console: Console
) -> Path:
    """The folder of the model that every run starts from; it is made once and kept in the cache."""
    method = parse_method("adamw:wsd", lr=options.pretrain_lr)
    steps = options.pretrain_steps
    recipe: dict[str, Any] = {
        "batch": 16,
        "context": options.positions,
        "warmup": min(100, steps // 10),
        "weight_decay": options.weight_decay,
        "max_grad_norm": options.max_grad_norm,
        "seed": 0,
    }
    key = texts.content_key(
        *(options.shape, method, recipe, steps, WSD_DECAY_SHARE, tokens.name),
        *(torch.__version__, transformers.__version__),
    )
    folder = cache_folder() / f"start-{key}"
    if folder.exists():
        folders.require_whole(folder, "start", f"delete {folder}, and it is made again")
        console.print(f"Starting from the pretrained model in {folder}.", markup=False)
        return folder
    model = make_gpt2(tokenizer, **options.shape, seed=0)
    console.print(f"Pretraining a GPT-2 of {model.num_parameters() / 1e6:.2f}M parameters, once.")
    with TemporaryDirectory(dir=cache_folder()) as scratch, progress_bars(console) as progress:
        task = progress.add_task("pretraining", total=steps, losses="")

        def watch(step: int, losses: dict[str, float]) -> bool:
            progress.update(task, completed=step, losses=show_losses(losses))
            return False

        recipe |= {"steps": steps, "evaluations": 4, "eval_tokens": options.eval_tokens}
        log = Path(scratch) / "log"
        train_blocks(model, load_file(tokens), (method,), log, watch=watch, **recipe)
        model.save_pretrained(Path(scratch) / "model")
        write_sums(Path(scratch) / "model")
        if not folder.exists():  # or another process was faster
            put(Path(scratch) / "model", folder)
    return folder


def _affordable_steps(
    setting: Setting, runs: list[Run], minutes: float, workers: int, threads: int
) -> int:
    """Steps for which all runs fit into the time, from a short run of each kind."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    probes: dict[tuple[str, str | None], tuple[float, float]] = {}
    per_step = evaluating = 0.0
    for run in sorted(runs, key=lambda run: -len(run.methods)):
        kind = run.methods[0].trajectory.name, run.methods[0].trajectory.get("base")
        if kind not in probes:
            probes[kind] = _probe(setting, run)
        step, evaluation = probes[kind]
        per_step += step
        evaluating += evaluation * _evaluated(run) * (setting.evaluations + 1)
    torch.set_num_threads(before)
    # Workers slow each other down, take some 10 s to start, and may wait for the last run.
    share = math.ceil(len(runs) / workers) / len(runs)
    seconds = (60 * minutes - 10) / share / 1.25 - evaluating
    return max(1, min(setting.steps, int(seconds / per_step)))


def _probe(setting: Setting, run: Run) -> tuple[float, float]:
    """Seconds of a step of the run, and of one evaluation of one model."""
    marks: list[float] = []

    def watch(step: int, losses: dict[str, float]) -> bool:
        marks.append(time.perf_counter())
        return False

    short = dataclasses.replace(setting, steps=40, evaluations=1)
    with TemporaryDirectory() as scratch:
        log = short.train(run, Path(scratch), watch).trainer.state.log_history
    runtimes = [entry["eval_runtime"] for entry in log if "eval_runtime" in entry]
    # The first steps warm the caches.
    return (marks[-1] - marks[10]) / (len(marks) - 11), runtimes[-1] / _evaluated(run)


def _evaluated(run: Run) -> int:
    """Number of models that an evaluation scores: the live one and the averages."""
    return len({method for method in run.methods if method.name != "adamw"}) + 1
