"""`paceline compare`: fine-tune one model by each method, and score the returned models."""

import dataclasses
import json
import math
import time
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TextIO

import torch
import transformers
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from ..cache import cache_folder
from ..sums import write_sums
from ..train import InputError
from ..train import data as texts
from ..train import folder as folders
from ..train.manifest import cores, environment, write_json
from ..train.methods import (
    WSD_DECAY_SHARE,
    parse_method,
)
from ..train.model import make_gpt2
from ..train.terminal import progress_bars, quiet, show_losses
from ..train.trainer import Trained, train_blocks
from .options import Comparison, check_warmup
from .report import Results, write_report
from .runs import Job, Queue, Row, Run, Watch, run_all, threads_each


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
                check_warmup(options.warmup, steps)
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

    def pretrain(run: Path) -> None:
        model = make_gpt2(tokenizer, **options.shape, seed=0)
        checkpoint = folders.checkpoint_to_continue(run)
        size = f"a GPT-2 of {model.num_parameters() / 1e6:.2f}M parameters"
        console.print(
            f"Pretraining {size}, once."
            if checkpoint is None
            else f"Going on with the pretraining of {size}: {checkpoint}",
            markup=False,
        )
        with progress_bars(console) as progress:
            task = progress.add_task("pretraining", total=steps, losses="")

            def watch(step: int, losses: dict[str, float]) -> bool:
                progress.update(task, completed=step, losses=show_losses(losses))
                return False

            own: dict[str, Any] = {"steps": steps, "evaluations": 4, "watch": watch}
            own |= {
                "eval_tokens": options.eval_tokens,
                "checkpoints": run / folders.CHECKPOINTS,
                "resume": checkpoint,
            }
            log = run / folders.TENSORBOARD
            train_blocks(model, load_file(tokens), (method,), log, **own, **recipe)
        model.save_pretrained(run / folders.MODEL)
        write_sums(run / folders.MODEL)

    folders.made_once(folder, pretrain, console)
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
