"""`paceline train`: one run from a recipe to a folder that is the model it returns."""

import itertools
import json
import math
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, TypeVar

import torch
import tyro
import yaml
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from pydantic import Field
from rich.console import Console
from safetensors import SafetensorError
from torch.utils.tensorboard import SummaryWriter
from transformers import (
    TrainerCallback,
)
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.trainer_utils import get_last_checkpoint

from ..files import whole
from ..state import averages_of
from . import InputError
from .build import RunTrainer, build, processes
from .callbacks import AtTheEnd, Lines, Progress, Stop
from .chat import show
from .data import content_key
from .manifest import environment, write_json
from .page import write_page
from .recipe import Recipe, read_recipe
from .terminal import progress_bars, quiet

RECIPE = "recipe.yaml"
# What may be another when a run goes on: it leaves what the run computes as it is.
FREE = frozenset(
    {
        *("micro_batch", "attention", "gradient_checkpointing", "compile", "fsdp", "loaders"),
        *("save_every", "keep_checkpoints", "report_to"),
    }
)
WEIGHTS = {
    "model": "the returned model's: the average, or what the method returns instead",
    "live": "the last weights that were trained",
    "checkpoints": "the returned model's; the live ones are in the optimizer's state",
}
METRICS = {
    "loss": "live weights, training batches, mean over the steps since the line before",
    "eval_live_*": "live weights, evaluation data",
    "eval_*": "returned model, evaluation data",
}
# What torch.save says of a disk that is full: as its file's writer puts it.
FULL = ("iostream error", "unexpected pos", "Writer failed")


class Train(Recipe):
    """Train a language model by a recipe, and write the model to return.

    A recipe is a YAML file of the keys below, or the name of a shipped one; options change its
    values, and can also stand alone. With torchrun or accelerate launch in front (-m paceline
    train ...) it runs on several processes.
    """

    recipe: tyro.conf.Positional[str | None] = None
    """YAML file, or one of the shipped: demo-sft, demo-pretrain, smollm2-135m, smollm2-1.7b, qwen3-1.7b, gemma3-1b, gpt2-124m, tiny-smollm2, tiny-qwen3, tiny-gemma3, tiny-sft, tiny-torch, tiny-gpt2."""
    out: Path | None = None
    """Folder for the run, new or empty. Default: runs/<recipe>-<time>."""
    resume: Path | None = None
    """Folder of a run to go on with, exactly; its own recipe is used."""
    print_recipe: Annotated[bool, tyro.conf.arg(name="print")] = False
    """Print the whole recipe and stop."""

    @classmethod
    def starting(cls, arguments: list[str]) -> "Train | None":
        """What options are changes of: the recipe that the arguments name, or a run's own."""
        if run := _value(arguments, "--resume"):
            return cls(resume=Path(run), **stored(Path(run)))
        return named(cls, arguments)


class Show(Recipe):
    """Show what a recipe trains on: a few examples, with the tokens that are learned in green."""

    recipe: tyro.conf.Positional[str | None] = None
    """YAML file, or the name of a shipped one."""
    show: Annotated[int, Field(ge=1)] = 3
    """Examples to show, >= 1."""

    @classmethod
    def starting(cls, arguments: list[str]) -> "Show | None":
        """The recipe that the arguments name."""
        return named(cls, arguments)


Command = TypeVar("Command", bound=Recipe)


def named(command: type[Command], arguments: list[str]) -> Command | None:
    """The command with the values of the recipe that is named among the options, if one is."""
    before = ""
    for name in arguments:
        option = before.startswith("--") and "=" not in before
        field = command.model_fields.get(before.strip("-").removeprefix("no-").replace("-", "_"))
        switch = before == "--print" or (field is not None and field.annotation is bool)
        if not name.startswith("-") and (switch or not option):
            return command(**{"recipe": name, **read_recipe(name)})
        before = name
    return None


def _value(arguments: list[str], option: str) -> str | None:
    for argument, following in itertools.pairwise([*arguments, None]):
        if argument == option:
            return following
        if argument and argument.startswith(f"{option}="):
            return argument.partition("=")[2]
    return None


# ---- running ------------------------------------------------------------------------------------


def train(
    options: Train, console: Console, callbacks: Sequence[TrainerCallback] = ()
) -> Path | None:
    """Train by a recipe; the folder of the run, or None if it was only printed or interrupted.

    Ctrl-C and SIGTERM end a run of one process at the next step, with a checkpoint.

    Args:
        options: what to train and where to; all processes get the same.
        console: for progress and result.
        callbacks: further ones of transformers.

    Raises:
        InputError: something given cannot be used, or does not fit into memory or on the disk.
            What checkpoints there were are still there.
    """
    recipe = Recipe(**options.model_dump(include=set(Recipe.model_fields)))
    if options.print_recipe:
        console.print(recipe.to_yaml(), end="", highlight=False, markup=False, soft_wrap=True)
        return None
    quiet()
    state = processes()
    folder = _folder(options, state)
    if (folder / "model").is_dir():
        console.print(f"{folder} is finished.", highlight=False, markup=False)
        return folder
    made = [part for part in (folder / "checkpoints", folder, *folder.parents) if not part.exists()]
    try:
        with _in_a_line(folder):
            trainer = build(recipe, folder / "checkpoints")
            facts = _begin(trainer, recipe, folder, console)
    except InputError:
        for part in made:  # the Trainer makes its folder before all is known to be right
            with suppress(OSError):
                part.rmdir()
        raise
    with _in_a_line(folder, writing=True):
        return _go_on(trainer, recipe, folder, facts, console, callbacks)


@contextmanager
def _in_a_line(folder: Path, *, writing: bool = False) -> Iterator[None]:
    """Say in one line what there is too little of: memory or room on the disk."""
    try:
        yield
    except (RuntimeError, OSError, SafetensorError) as error:
        said = " ".join(str(getattr(error, "strerror", None) or error).split())[:200]
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in said:
            raise InputError(
                f"out of memory: {said}; a smaller --micro-batch gives the same result in less, "
                "and so does --gradient-checkpointing; then --precision bf16, a method with "
                "state=bf16, --fsdp on several devices, a shorter --context"
            ) from error
        if not writing or (isinstance(error, RuntimeError) and not any(x in said for x in FULL)):
            raise
        raise InputError(
            f"cannot write to {folder}: {said}; when that is mended, paceline train --resume "
            f"{folder} goes on from the last checkpoint"
        ) from error


def train_command(options: Train, console: Console) -> int:
    """`train`, as an exit status."""
    return 0 if train(options, console) or options.print_recipe else 130


def show_command(options: Show, console: Console) -> None:
    """Print some of the examples that a recipe trains on, as the model gets them.

    Raises:
        InputError: something in the recipe cannot be had or used.
    """
    quiet()
    recipe = Recipe(**options.model_dump(include=set(Recipe.model_fields)))
    with TemporaryDirectory() as folder:
        trainer = build(recipe, Path(folder), only_data=True)
    data: Any = trainer.train_dataset
    evaluation: Any = trainer.eval_dataset
    for number, example in enumerate(itertools.islice(data, options.show), 1):
        batch = trainer.data_collator([example])
        ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
        learned = sum(label != -100 for label in labels)
        console.rule(f"example {number}: {len(ids)} tokens, {learned} of them learned")
        tokenizer: Any = trainer.processing_class
        show(tokenizer, ids, labels, console)
    if isinstance(data, Dataset):
        console.rule()
        console.print(
            f"{len(data)} sequences to train on, {len(evaluation)} to evaluate on; "
            f"{trainer.args.max_steps} steps of {recipe.batch}",
            highlight=False,
        )


def stored(run: Path) -> dict[str, Any]:
    """The keys and values of a run's own recipe.

    Raises:
        InputError: it is no folder of a run.
    """
    if not (run / RECIPE).is_file():
        raise InputError(f"resume: {run} is no folder of a run: it has no {RECIPE}")
    return read_recipe(str(run / RECIPE))


def last_checkpoint(run: Path) -> Path | None:
    """A run's newest, if it has one."""
    folder = run / "checkpoints"
    found = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    return Path(found) if found else None


def _folder(options: Train, state: Any) -> Path:
    if options.resume is not None:
        if options.out is not None or options.recipe is not None:
            raise InputError("resume: a run goes on in its own folder by its own recipe")
        before = Recipe(**stored(options.resume))
        for name in set(Recipe.model_fields) - FREE:
            if getattr(before, name) != getattr(options, name):
                raise InputError(
                    f"{name}: a run goes on as it began; what may change: {', '.join(sorted(FREE))}"
                )
        return options.resume
    name = Path(options.recipe).stem if options.recipe else options.task
    default = Path("runs") / f"{name}-{datetime.now():%Y-%m-%d_%H%M%S}"
    [folder] = broadcast_object_list([options.out or default])  # all by one clock
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(
                f"out: {folder} is not an empty folder; name another, or --resume {folder}"
            )
    except OSError as error:
        raise InputError(f"out: cannot use {folder}: {error.strerror}") from error
    return Path(folder)


def _begin(trainer: RunTrainer, recipe: Recipe, folder: Path, console: Console) -> dict[str, Any]:
    """Write recipe and manifest, or look whether they are this run's; returns the manifest."""
    main = trainer.is_world_process_zero()
    digest = _digest(trainer.train_dataset)
    manifest = folder / "manifest.json"
    facts: dict[str, Any] = {}
    if manifest.is_file():
        facts = json.loads(manifest.read_text(encoding="utf-8"))
        if facts["data"]["digest"] != digest:
            raise InputError(
                "data: it is not what the run began with; bring that back to go on exactly, or "
                f"start a new run from one of {folder}/checkpoints as its --model"
            )
    checkpoint = last_checkpoint(folder)
    model: Any = trainer.model
    evaluation: Any = trainer.eval_dataset
    parameters = sum(p.numel() for p in model.parameters())
    if main:
        this = {"command": shlex.join(["paceline", *sys.argv[1:]]), **environment()}
        this |= {"processes": trainer.args.world_size, "from": checkpoint and checkpoint.name}
        facts = facts or {
            **this,
            "recipe": json.loads(recipe.model_dump_json()),
            "parameters": parameters,
            "steps": trainer.args.max_steps,
            "data": {
                "sequences": len(trainer.train_dataset)
                if isinstance(trainer.train_dataset, Dataset)
                else None,
                "digest": digest,
                "evaluation_sequences": len(evaluation),
            },
            "seconds": 0.0,
            "resumed": [],
        }
        if manifest.is_file():
            facts["resumed"].append(this)
        folder.mkdir(parents=True, exist_ok=True)
        with whole(folder / RECIPE) as partial:
            partial.write_text(recipe.to_yaml(), encoding="utf-8")
        write_json(manifest, facts)
        console.print(
            f"{recipe.parsed.label}, lr {recipe.lr:g}: {trainer.args.max_steps} steps of "
            f"{recipe.batch} sequences, {parameters / 1e6:.3g}M parameters, in {folder}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    if checkpoint:
        console.print(f"Going on from {checkpoint.name}.", highlight=False)
    return facts


def _go_on(
    trainer: RunTrainer,
    recipe: Recipe,
    folder: Path,
    facts: dict[str, Any],
    console: Console,
    callbacks: Sequence[TrainerCallback],
) -> Path | None:
    """Train from the last checkpoint, or from the start, to the end."""
    began, manifest = time.time(), folder / "manifest.json"
    main, checkpoint = trainer.is_world_process_zero(), last_checkpoint(folder)
    done = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    trainer.args.eval_on_start = checkpoint is None
    trainer.add_callback(AtTheEnd())
    if "tensorboard" in recipe.report_to and main:
        writer = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1 if done else None)
        trainer.add_callback(TensorBoardCallback(writer))
    stop = Stop()
    bars = progress_bars(console) if main else nullcontext()
    with bars as progress, stop.on_signals(trainer.args.world_size):
        trainer.add_callback(stop)
        if main:
            trainer.add_callback(Progress(progress))
            trainer.add_callback(Lines(folder / "metrics.jsonl"))
        for callback in callbacks:
            trainer.add_callback(callback)
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    if main:
        facts["seconds"] = round(facts["seconds"] + time.time() - began, 1)
        write_json(manifest, facts)
    if trainer.state.global_step < trainer.args.max_steps:
        console.print(
            f"Stopped at step {trainer.state.global_step} of {trainer.args.max_steps}; go on with "
            f"paceline train --resume {folder}",
            highlight=False,
            markup=False,
            soft_wrap=True,  # to be copied
        )
        return None
    _finish(trainer, recipe, folder, facts)
    if main:
        last = _last(trainer.state.log_history)
        console.print(
            f"Evaluation loss: live {last['eval_live_loss']:.4f}, returned "
            f"{last['eval_loss']:.4f} nats a token.\nThe model: {folder / 'model'}\n"
            f"Report: {folder / 'report.html'}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    return folder


def _digest(data: Any) -> str | None:
    """Of the number of sequences, and of the tokens of the first and last thousand."""
    if not isinstance(data, Dataset):
        return None
    ends = {*range(min(1000, len(data))), *range(max(0, len(data) - 1000), len(data))}
    return content_key(len(data), data.select(sorted(ends)).to_dict())


def _last(history: list[dict[str, Any]]) -> dict[str, Any]:
    return [entry for entry in history if "eval_loss" in entry][-1]


# ---- the end ------------------------------------------------------------------------------------


def _finish(trainer: RunTrainer, recipe: Recipe, folder: Path, facts: dict[str, Any]) -> None:
    """Write both models, and last of all what marks the run as finished: model/."""
    main = trainer.is_world_process_zero()
    average = average_facts(trainer)
    last = _last(trainer.state.log_history)
    if main:
        write_json(folder / "paceline.json", {**average, "weights": WEIGHTS, "metrics": METRICS})
        write_page(recipe, trainer.state.log_history, average, facts, folder)
    for name, save in (("live", trainer.save_live_model), ("model", trainer.save_model)):
        with whole(folder / name) if main else nullcontext(folder / name) as partial:
            save(str(partial))
            if main:
                (partial / "training_args.bin").unlink(missing_ok=True)  # a pickle
                write_json(partial / "paceline.json", {**average, "weights": WEIGHTS[name]})
                card = _card(name, recipe, average, last, facts)
                (partial / "README.md").write_text(card, encoding="utf-8")
        trainer.accelerator.wait_for_everyone()


def average_facts(trainer: RunTrainer) -> dict[str, Any]:
    """What the optimizer keeps: its rule, how far back it reaches, how often it was updated."""
    optimizer: Any = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    facts: dict[str, Any] = {"method": trainer.method.label, "steps": trainer.state.global_step}
    group = optimizer.param_groups[0]
    if "averaging" not in group:
        return {**facts, "rule": None, "optimizer": type(optimizer).__name__}
    own, *further = averages_of(group).rules.items()
    key, rule = further[0] if further else own
    kept = [
        state for state in optimizer.state.values() if "step" in state or "average_step" in state
    ]
    updates = max((int(s.get("average_step", s.get("step", 0))) for s in kept), default=0)
    newest = float(rule.weight(updates)) if updates else 1.0
    held = next((s.get(key, s.get("offset")) for s in kept), None)
    return {
        **facts,
        "optimizer": type(optimizer).__name__,
        "pullback": group["pullback"],
        "pulled_toward": str(own[1]),
        "rule": str(rule),
        "kappa": getattr(rule, "kappa", None),
        "weight_of_newest": newest,
        "half_life_steps": math.log(0.5) / math.log1p(-newest) if 0 < newest < 1 else None,
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
    """A model card: what the Hub reads in front, then the run's facts."""
    head: dict[str, Any] = {"library_name": "transformers", "tags": ["paceline"]}
    if recipe.model:
        head["base_model"] = recipe.model
    data = recipe.data or (("chitchat",) if recipe.task == "sft" else ("python",))
    if on_hub := [d for d in data if d.count("/") == 1 and not Path(d).exists()]:
        head["datasets"] = on_hub
    rows = {
        "weights": WEIGHTS[name],
        "method": f"{average['method']}, learning rate {recipe.lr:g}, {recipe.schedule}",
        "rule of the average": average["rule"],
        "updates of the average": average.get("updates"),
        "data": ", ".join(data),
        "steps": f"{average['steps']} of {recipe.batch} sequences, each up to {recipe.context} tokens",
        "evaluation loss, returned": f"{last['eval_loss']:.4f} nats a token",
        "evaluation loss, live": f"{last['eval_live_loss']:.4f} nats a token",
        "seed": recipe.seed,
        "versions": ", ".join(f"{k} {v}" for k, v in facts["versions"].items()),
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items() if value is not None)
    return (
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n# A model trained by paceline\n\n"
        f"| | |\n|---|---|\n{table}\n\n    {facts['command']}\n"
    )
