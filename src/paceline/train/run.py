"""`paceline train`: a run by a recipe, which writes a folder with the model it returns."""

import errno
import itertools
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from datetime import date, datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar, cast

import datasets
import torch
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from rich.console import Console
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    TensorBoardCallback,
    get_available_reporting_integrations,
)

from ..averaging import EMA, Averaging, PowerEMA
from ..elastic import Elastic
from ..files import remove, whole
from ..state import averages_of
from ..sums import CARD, write_sums
from . import InputError, counted, folder, reporting
from .build import RunTrainer, build_fitting, digest_of, processes
from .callbacks import EvalAndSaveAtEnd, JsonlMetrics, ProgressBar, Stop
from .chat import show_example
from .choose import choose, is_chosen, rule_facts
from .find_lr import with_found_rate
from .held_out import held_out_of, sequences
from .manifest import environment, model_card, write_json
from .options import LENGTHS, Show, Train, keeps_length
from .page import write_page
from .recipe import RESUMABLE_CHANGES, Recipe, RecipeCommand, read_recipe
from .talk import samples
from .terminal import progress_bars, quiet, say
from .verdict import Lag, measured, verdict

METRICS_MEAN = {
    "loss": "live weights, training batches, mean over the steps since the last line",
    "eval_live_*": "live weights, evaluation data",
    "eval_*": "returned model, evaluation data",
}
RATE_OF_SATURATED = (
    "lr: a gain of 1 wants about four times the rate that AdamW likes, and is slow at that one "
    "(docs/pace.md). The rate is {:g}."
)
# How torch.save and safetensors report a full disk, and the system.
DISK_FULL = (
    *("iostream error", "unexpected pos", "Writer failed"),
    *("No space left", "File too large", "Disk quota exceeded"),
)
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
T = TypeVar("T")


# ---- running ------------------------------------------------------------------------------------


def train(
    options: Train, console: Console, callbacks: Sequence[TrainerCallback] = ()
) -> Path | None:
    """Train by a recipe, with the same options in all processes.

    Ctrl-C and SIGTERM end a run of one process at the next step, with a checkpoint.

    Returns:
        The run's folder; None if the recipe was only printed or the run was interrupted.

    Raises:
        InputError: something given cannot be used, or memory or disk are too small for it.
            Checkpoints that were saved stay.
    """
    recipe = options.plain
    if options.print_recipe:
        say(console, recipe.to_yaml(), end="")
        return None
    quiet()
    processes()
    _require_reporters(recipe.report_to)
    run = _on_main(lambda: _run_folder(options))
    if recipe.date is None:  # the run keeps the day of its start
        recipe = recipe.model_copy(update={"date": _on_main(date.today)})
    with ExitStack() as stack:
        _on_main(lambda: stack.enter_context(folder.locked(run)))
        finished, checkpoint = _on_main(lambda: _starting_point(options, run))
        if checkpoint:
            _require_on_all(checkpoint)
        if finished:
            if recipe.choose and not _on_main(lambda: is_chosen(run)):
                halves = held_out_of(run / folder.MODEL, recipe)  # it was killed while it chose
                if processes().is_main_process:
                    choose(run, recipe, halves, console)
                return run
            say(console, f"{run} is finished.")
            return run
        checkpoints = run / folder.CHECKPOINTS
        is_new = not checkpoints.exists()
        with _one_line_errors(run):
            try:
                data = None
                if options.find_lr:
                    recipe, data = with_found_rate(recipe, console)
                recipe, trainer = build_fitting(recipe, checkpoints, prepared=data)
                names = recipe.eval_data or recipe.data_names
                dataset, collate = trainer.eval_dataset, trainer.data_collator
                held_out = partial(sequences, dataset, collate, recipe, names)
                if recipe.choose:
                    held_out()  # before the training: there must be enough
                facts = _start(trainer, recipe, run, checkpoint, console)
                if note := note_on_batch(options, recipe, trainer.args.max_steps):
                    say(console, note)
                if recipe.parsed.is_saturated and has_default_rate(options):
                    say(console, RATE_OF_SATURATED.format(recipe.parsed.lr))
            except BaseException:
                if is_new:  # the Trainer makes it before everything has been checked
                    with suppress(OSError):
                        checkpoints.rmdir()
                raise
            ended = _fit(trainer, recipe, run, checkpoint, facts, console, callbacks)
            del trainer  # for the memory
            if ended and recipe.choose and processes().is_main_process:
                choose(run, recipe, held_out(), console)
            return ended


def _on_main(call: Callable[[], T]) -> T:
    """What the main process finds, for all; an InputError, too."""
    found: tuple[Any, str | None] = None, None
    if processes().is_main_process:
        try:
            found = call(), None
        except InputError as error:
            found = None, str(error)
    [(result, refused)] = broadcast_object_list([found])
    if refused is not None:
        raise InputError(refused)
    return cast(T, result)


@contextmanager
def _one_line_errors(run: Path) -> Iterator[None]:
    """Report a lack of memory or of room on the disk, and what cannot be read, in one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        said = " ".join(str(getattr(error, "strerror", None) or error).split())[:200]
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in said:
            raise InputError(
                f"out of memory: {said}; a smaller --micro-batch gives the same result in less "
                "memory, and so does --gradient-checkpointing; then try --precision bf16, a method "
                "with state=bf16, --fsdp on several devices, or a shorter --context"
            ) from error
        full = False
        cause: BaseException | None = error
        while cause and not full:  # libraries raise others on their way out
            full = getattr(cause, "errno", None) in NO_ROOM or any(
                x in str(cause) for x in DISK_FULL
            )
            said = os.strerror(errno.ENOSPC) if full and cause is not error else said
            cause = cause.__cause__ or cause.__context__
        if isinstance(error, BrokenPipeError) or not (full or isinstance(error, OSError)):
            raise
        place = getattr(error, "filename", None)
        cache = "" if place or folder.is_begun(run) else f" or {datasets.config.HF_DATASETS_CACHE}"
        what = f"cannot write to {place or run}{cache}" if full else f"{place or 'the run stopped'}"
        then = (
            f"paceline train --resume {run} continues from the last checkpoint"
            if folder.is_begun(run)
            else "start the run again"
        )
        raise InputError(f"{what}: {said}; when that is fixed, {then}") from error


def train_command(options: Train, console: Console) -> int:
    """`train`, as an exit status."""
    return 0 if train(options, console) or options.print_recipe else 130


def show_command(options: Show, console: Console) -> None:
    """Print some of the examples that a recipe trains on, as the model gets them."""
    quiet()
    with TemporaryDirectory() as scratch:
        recipe, trainer = build_fitting(options.plain, Path(scratch), only_data=True)
    data = trainer.train_dataset
    for number, example in enumerate(itertools.islice(data, options.show), 1):
        batch = trainer.data_collator([example])
        ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
        learned = sum(label != -100 for label in labels)
        console.rule(f"example {number}: {len(ids)} tokens, {learned} of them learned")
        show_example(trainer.processing_class, ids, labels, console)
    if isinstance(data, Dataset):
        console.rule()
        say(
            console,
            f"{counted(len(data), 'sequence')} to train on, {len(trainer.eval_dataset)} to evaluate on; "
            f"{counted(trainer.args.max_steps, 'step')} of {recipe.batch}",
        )


def _require_reporters(names: Sequence[str]) -> None:
    """Refuse integrations of transformers whose package is not installed."""
    for name in {*names} - {"none", "tensorboard", *get_available_reporting_integrations()}:
        with reporting(f"report_to: {name}", ImportError, RuntimeError):
            INTEGRATION_TO_CALLBACK[name]()


def _run_folder(options: Train) -> Path:
    """The folder of the run to resume, or of a new one."""
    if options.resume is None:
        if options.from_checkpoint is not None:
            raise InputError("from: it needs the run to --resume")
        name = Path(options.recipe).stem if options.recipe else options.task
        return options.out or Path("runs") / f"{name}-{datetime.now():%Y-%m-%d_%H%M%S}"
    if options.find_lr:
        raise InputError("find_lr: a run that is resumed keeps its rate; leave it out")
    if options.out is not None or options.recipe is not None:
        raise InputError(
            "resume: a run continues in its own folder by its own recipe; leave out --out and "
            "the recipe"
        )
    before = folder.recipe_of(options.resume)
    if any(getattr(options, name) != before.get(name) for name in LENGTHS):
        raise keeps_length(options.resume)
    _require_same(options, before, RESUMABLE_CHANGES)
    return options.resume


def _require_same(options: Recipe, before: dict[str, Any], changes: frozenset[str]) -> None:
    """Refuse a resumed run by another recipe, except for the keys that may change."""
    earlier = Recipe(**before)
    for name in Recipe.model_fields.keys() - changes:
        if getattr(earlier, name) != getattr(options, name):
            raise InputError(
                f"{name}: it must stay {getattr(earlier, name)} when a run is resumed; what may "
                f"change: {', '.join(sorted(changes))}"
            )


def _starting_point(options: Train, run: Path) -> tuple[bool, Path | None]:
    """Whether a run is finished, and the checkpoint to resume from, after both were checked."""
    if options.resume is None:
        folder.require_empty(run, f", or --resume {run}")
        return False, None
    if not folder.is_finished(run):
        return False, folder.checkpoint_to_resume(run, options.from_checkpoint)
    model = run / folder.MODEL
    if options.from_checkpoint is not None:
        raise InputError(f"from: {run} is finished; delete {model} to train on from a checkpoint")
    folder.require_whole(
        model, "resume", f"delete {model}, and paceline train --resume {run} writes it again"
    )
    return True, None


def _require_on_all(checkpoint: Path) -> None:
    """Refuse, in all processes, a checkpoint of which one does not see what another does."""
    names = gather_object([{path.name for path in checkpoint.glob("*")}])
    for process, own in enumerate(names):
        if missing := sorted(set().union(*names) - own):
            raise InputError(
                f"resume: process {process} has no {checkpoint / missing[0]}, and others have; give "
                "all of them one disk, or a copy of the checkpoint"
            )


def _start(
    trainer: RunTrainer, recipe: Recipe, run: Path, checkpoint: Path | None, console: Console
) -> dict[str, Any]:
    """Write recipe and manifest, and of a resumed run check its data; returns the manifest."""
    model: Any = trainer.model
    data: Any = trainer.train_dataset
    evaluation: Any = trainer.eval_dataset
    digest, evaluated = digest_of(data), digest_of(evaluation)
    facts: dict[str, Any] = {}
    if resumed := (run / folder.MANIFEST).is_file():
        facts = folder.manifest_of(run)
        _require_same(recipe, facts["recipe"], RESUMABLE_CHANGES)
        if (facts["data"]["digest"], facts["data"]["evaluation_digest"]) != (digest, evaluated):
            raise InputError(
                "data: they have changed since the run began; restore them to continue exactly, or "
                f"start a new run from one of {run / folder.CHECKPOINTS} as its --model"
            )
    if trainer.is_world_process_zero():
        parameters = sum(p.numel() for p in model.parameters())
        this = environment()
        this |= {"processes": trainer.args.world_size, "from": checkpoint and checkpoint.name}
        facts = facts or {
            **this,
            "recipe": recipe.model_dump(mode="json"),
            "parameters": parameters,
            "steps": trainer.args.max_steps,
            "data": {
                "sequences": len(data) if isinstance(data, Dataset) else None,
                "digest": digest,
                "evaluation_sequences": len(evaluation),
                "evaluation_digest": evaluated,
            },
            "seconds": 0.0,
            "resumed": [],
        }
        if resumed:
            facts["resumed"].append(this)
        folder.make(run)
        with whole(run / folder.RECIPE) as partial:
            partial.write_text(recipe.to_yaml(), encoding="utf-8")
        write_json(run / folder.MANIFEST, facts)
        say(
            console,
            f"{recipe.parsed.label}, lr {recipe.lr:g}: "
            f"{counted(trainer.args.max_steps, 'step')} of {counted(recipe.batch, 'sequence')}, {parameters / 1e6:.3g}M parameters, in {run}",
        )
        for path in folder.set_aside_newer(checkpoint) if checkpoint else ():
            say(console, f"Set aside: {path}")
    if checkpoint:
        say(console, f"Resuming from {checkpoint.name}.")
    return facts


def has_default_rate(options: Train) -> bool:
    """Whether a new run's rate is given by nobody: neither options, nor its recipe, nor a search."""
    if options.resume or options.find_lr or options.parsed.lr != Recipe.model_fields["lr"].default:
        return False
    return options.recipe is None or "lr" not in read_recipe(options.recipe)


def note_on_batch(options: RecipeCommand, recipe: Recipe, steps: int) -> str | None:
    """What another batch does to the returned average, or why it does nothing, in one line.

    Args:
        options: of the command.
        recipe: that is trained by, whose batch may have been made to fit.
        steps: of the run.

    Returns:
        None where the average stays the same function of the data.
    """
    if recipe.scale != 1 and recipe.parsed.pulls and len(recipe.rules(steps)) == 1:
        return (
            "average_batch: it changes nothing here. The average that is returned is the one that "
            "the pull goes toward, and that stays (docs/averages.md)."
        )
    if options.recipe is None or options.average_batch is not None:
        return None
    default = Recipe.model_fields["batch"].default
    file = read_recipe(options.recipe)
    written = file.get("batch", default)
    if written == recipe.batch or ("batch" not in file and options.batch == default):
        return None  # in the second case nobody gave one, and one was made to fit
    now = recipe.rules(steps)
    told = (
        f"batch: {counted(recipe.batch, 'sequence')} in place of the recipe's {written}. The average stays "
        f"{_short(now[-1]) if now else recipe.parsed.label} in steps, each now "
        f"{recipe.batch / written:.3g} times the data"
    )
    if recipe.parsed.pulls and len(now) == 1:
        return f"{told}. A pull toward a scaled average had a higher loss: docs/averages.md."
    try:
        same = Recipe(**{**recipe.model_dump(), "average_batch": written})
    except InputError as error:
        return f"{told}, and cannot be kept the same function of it ({error})."
    # At a round number of steps, where starts that are a share of them are whole.
    if all(map(_are_close, recipe.rules(10**6), same.rules(10**6))):
        return None
    then = same.rules(steps)
    lives = [_half_life(rules[-1], steps) for rules in (now, then)]
    if lives[0] and lives[1]:
        told += f"; at the end its half-life has {lives[0] / lives[1]:.2g} times as much data"
    return (
        f"{told}. --average-batch {written} keeps it the same function of the data, "
        f"{_short(then[-1])}."
    )


def _half_life(rule: Averaging, steps: int) -> float | None:
    """Steps after which an iterate counts half as much; None where it is no EMA."""
    is_ema = isinstance(rule, EMA | PowerEMA)
    return rule_facts(rule, steps)["half_life_steps"] if is_ema else None


def _short(rule: Averaging) -> str:
    """A rule's text with three digits of its numbers."""
    return re.sub(r"\d+\.\d+(e[-+]\d+)?", lambda found: f"{float(found[0]):.3g}", str(rule))


def _are_close(rule: Averaging, other: Averaging) -> bool:
    """Whether two rules of one kind differ by rounding alone."""
    pairs = [(getattr(rule, x), getattr(other, x)) for x in vars(rule)]
    return all(a == b or math.isclose(a, b, rel_tol=1e-5) for a, b in pairs)


def _fit(
    trainer: RunTrainer,
    recipe: Recipe,
    run: Path,
    checkpoint: Path | None,
    facts: dict[str, Any],
    console: Console,
    callbacks: Sequence[TrainerCallback],
) -> Path | None:
    """Train from a checkpoint, or from the start, to the end."""
    began, main = time.time(), trainer.is_world_process_zero()
    done = folder.step_of(checkpoint) if checkpoint else None
    if main:
        trainer.snapshots.tell = partial(say, console)
    if main and checkpoint is None:  # what a run left that was killed before its first checkpoint
        remove(run / folder.AVERAGES)
    trainer.args.eval_on_start = checkpoint is None
    stop = Stop()
    bars = progress_bars(console) if main else nullcontext()
    with bars as progress, stop.on_signals(trainer.args.world_size):
        own: list[TrainerCallback] = [EvalAndSaveAtEnd(), stop]
        if main:
            own += [ProgressBar(progress), JsonlMetrics(run / folder.METRICS)]
        if main and "tensorboard" in recipe.report_to:
            events = SummaryWriter(str(run / folder.TENSORBOARD), purge_step=done and done + 1)
            own.append(TensorBoardCallback(events))
        for callback in (*own, *callbacks):
            trainer.add_callback(callback)
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    if main:
        facts["seconds"] = round(facts["seconds"] + time.time() - began, 1)
        if recipe.times_kept:
            kept = facts.setdefault("snapshots", {"bytes_each": 0, "seconds": 0.0})
            kept["bytes_each"] = trainer.snapshots.bytes
            kept["seconds"] = round(kept["seconds"] + trainer.snapshots.seconds, 3)
        write_json(run / folder.MANIFEST, facts)
    if trainer.state.global_step < trainer.args.max_steps:
        say(
            console,
            f"Stopped at step {trainer.state.global_step} of {trainer.args.max_steps}; continue "
            f"with paceline train --resume {run}",
        )
        return None
    last, average = _finish(trainer, recipe, run, facts)
    if main:
        say(
            console,
            f"Evaluation loss: live {last['eval_live_loss']:.4f}, returned "
            f"{last['eval_loss']:.4f} nats a token.\n{average['verdict']}\nThe model: {run / folder.MODEL}\n"
            f"Report: {run / folder.REPORT}\nTalk to it: paceline chat {run}",
        )
    return run


# ---- the end ------------------------------------------------------------------------------------


def _finish(
    trainer: RunTrainer, recipe: Recipe, run: Path, facts: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write the report and both models, the returned one last.

    Returns:
        The last evaluation, and what is said of the average.
    """
    main, history = trainer.is_world_process_zero(), trainer.state.log_history
    average = average_facts(trainer)
    if main:  # of an earlier end, whose model was deleted
        remove(run / folder.CHOICE)
        remove(run / folder.FORMER)
    evaluations = [entry for entry in history if "eval_loss" in entry]
    first, last = evaluations[0], evaluations[-1]
    if main:
        rule = returned_rule(trainer)
        lag = None if rule is None else Lag.at(rule, trainer.state.global_step)
        average["verdict"] = verdict(first, last, measured(trainer, recipe), lag)
        write_json(run / folder.SAMPLES, {"greedy": samples(trainer, recipe)})
        meaning = {"weights": folder.WEIGHTS_IN, "metrics": METRICS_MEAN}
        write_json(run / folder.AVERAGE_FACTS, {**average, **meaning})
        write_page(recipe, history, average, facts, run)
    for name, save in ((folder.LIVE, trainer.save_live_model), (folder.MODEL, trainer.save_model)):
        with whole(run / name) if main else nullcontext(run / name) as partial:
            save(str(partial))
            if main:
                (partial / "training_args.bin").unlink(missing_ok=True)  # a pickle
                about = {**average, "weights": folder.WEIGHTS_IN[name]}
                write_json(partial / folder.AVERAGE_FACTS, about)
                card = _card(name, recipe, average, last, facts)
                (partial / CARD).write_text(card, encoding="utf-8")
                write_sums(partial)
        trainer.accelerator.wait_for_everyone()
    return last, average


def returned_rule(trainer: RunTrainer) -> Averaging | None:
    """The rule of the average that the optimizer returns; None if it keeps none of ours."""
    group = trainer.bare_optimizer.param_groups[0]
    if "averaging" not in group or isinstance(trainer.bare_optimizer, Elastic):
        return None
    return [*averages_of(group).rules.values()][:2][-1]


def average_facts(trainer: RunTrainer) -> dict[str, Any]:
    """The optimizer's average: its rule, how far back it reaches, and how often it was updated."""
    optimizer = trainer.bare_optimizer
    facts: dict[str, Any] = {"method": trainer.method.label, "steps": trainer.state.global_step}
    group = optimizer.param_groups[0]
    if "averaging" not in group:
        return {**facts, "rule": None, "optimizer": type(optimizer).__name__}
    own, *others = averages_of(group).rules.items()
    if isinstance(optimizer, Elastic):
        center = f"the center of {trainer.args.world_size} workers"
        said = f"{group['exchange']} every {group['every']} steps"
        if others:  # the first is returned
            moved = "the mean of the workers" if group["exchange"] == "average" else "the center"
            center = f"{others[0][1]} of {moved} at each exchange, around {center}"
        return {
            **facts,
            "optimizer": "Elastic",
            "pullback": group["pullback"],
            "rule": f"{center}, {said}",
        }
    key, rule = others[0] if others else own
    kept = [s for s in optimizer.state.values() if "step" in s or "average_step" in s]
    updates = max((int(s.get("average_step", s.get("step", 0))) for s in kept), default=0)
    held = next((s.get(key, s.get("offset")) for s in kept), None)
    return {
        **facts,
        "optimizer": type(optimizer).__name__,
        "pullback": group["pullback"],
        "pulled_toward": str(own[1]),
        **rule_facts(rule, updates),
        "updates": updates,
        "dtype": None if held is None else str(held.dtype).removeprefix("torch."),
    }


def _card(
    name: str,
    recipe: Recipe,
    average: dict[str, Any],
    last: dict[str, Any],
    facts: dict[str, Any],
) -> str:
    """The card of a run's model."""
    data = recipe.data_names
    on_hub = [d for d in data if d.count("/") == 1 and not Path(d).exists()]
    rows = {
        "weights": folder.WEIGHTS_IN[name],
        "method": f"{average['method']}, learning rate {recipe.lr:g}, {recipe.schedule}",
        "rule of the average": average["rule"],
        "updates of the average": average.get("updates"),
        "data": ", ".join(data),
        "steps": f"{average['steps']} of {counted(recipe.batch, 'sequence')}, each up to {recipe.context} tokens",
        "evaluation loss, returned": f"{last['eval_loss']:.4f} nats a token",
        "evaluation loss, live": f"{last['eval_live_loss']:.4f} nats a token",
        "seed": recipe.seed,
        "versions": ", ".join(f"{k} {v}" for k, v in facts["versions"].items()),
    }
    return model_card(rows, facts["command"], recipe.model, on_hub)
