"""Build a trainer from a recipe: data, tokenizer, model, batches and steps."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import peft
import pyarrow.compute as pc
import torch
from accelerate import PartialState
from datasets import Dataset, Features, IterableDataset, Sequence, Value, concatenate_datasets
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PrinterCallback,
    set_seed,
)
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from ..averaging import PowerEMA
from ..options import parse_returns, returns_text
from ..state import averages_of
from . import InputError, counted, folder, read_small, reporting, sources, unknown
from .chat import conversation_encoder, use_chatml
from .data import make_tokenizer
from .folder import AVERAGES
from .methods import steps_of
from .model import (
    check_files,
    check_output,
    check_sizes,
    load_model,
    make_gpt2,
    new_model,
    one_line,
)
from .recipe import Recipe
from .terminal import tell, told_to
from .trainer import OneMethodTrainer

FEWEST_STEPS = 8  # of an epoch, where the batch is made to fit
SHORTEST = 16  # tokens of a piece of text, where the context is made to fit
TOKENS = Sequence(Value("int64"))
ENCODED = Features(
    {"input_ids": TOKENS, "assistant_masks": TOKENS}
    | dict.fromkeys(sources.ABOUT_ROWS, Value("string"))
)

# ---- the trainer --------------------------------------------------------------------------------


class PerToken(SFTTrainer):
    """TRL's trainer with evaluation losses that are means over tokens instead of batches."""

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate, with the loss as a mean over all learned tokens of all processes."""
        self._sum, self._learned = 0.0, 0
        output = super().evaluation_loop(*args, **kwargs)
        ours = torch.tensor([self._sum, self._learned], device=self.args.device)
        total, learned = self.accelerator.reduce(ours, "sum").tolist()
        metrics = output.metrics or {}
        losses = {name: total / learned for name in metrics if name.endswith("_loss")}
        return output._replace(metrics={**metrics, **losses})

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """The Trainer's loader, whose last batches are filled with sequences without labels.

        Several processes would get the first sequences a second time instead.
        """
        data: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(data, str):  # a name: there are several sets
            data = self.eval_dataset[data]  # type: ignore[index]
        missing = -len(data) % (self.args.per_device_eval_batch_size * self.args.world_size)
        if missing and self.args.world_size > 1:
            nothing = {**data[0], "labels": [-100] * len(data[0]["labels"])}
            more = Dataset.from_list([nothing] * missing, features=data.features)
            data = concatenate_datasets([data, more])
        return super().get_eval_dataloader(data)

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Compute a batch's loss, and add it to the sum over tokens."""
        learned = int((inputs["labels"][..., 1:] != -100).sum())
        loss, logits, labels = super().prediction_step(model, inputs, *args, **kwargs)
        if learned:
            self._sum += loss.item() * learned
            self._learned += learned
        return loss, logits, labels

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write no card for checkpoints; a run writes its own beside the model."""


SLOW = PowerEMA(0.9)  # from which, and from a fast one, most others can be rebuilt


def keep_slow(group: dict[str, Any]) -> None:
    """Have a group keep a slow average, too; what it returns stays the same."""
    own, *others = averages_of(group).rules.values()
    if any(isinstance(x, PowerEMA) and x.kappa >= 0.8 for x in (own, *others)):
        return
    returns = parse_returns(group["returns"]) or {"returned": own}
    group["returns"] = returns_text({**returns, "slow": SLOW})


class RunTrainer(OneMethodTrainer, PerToken):
    """Trains one method by a recipe, and keeps a fingerprint of the data's order for resuming.

    `order` is the sum, modulo 2^64, over all sequences trained on, of a hash of their tokens times
    a factor of the step. It does not depend on how a batch is split into micro-batches and
    processes.
    """

    order: Any = 0  # a tensor on the device: reading it would wait
    keeps_slow = False  # whether it keeps a slow average, for a choice at the end

    def create_optimizer(self, model: Any = None) -> Any:
        """The method's optimizer, with a slow average if that is asked for."""
        made = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if made and self.keeps_slow:
            for group in optimizer.param_groups:
                keep_slow(group)
        return optimizer

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Train on a micro-batch, and add it to `order`."""
        self.order = self.order + (2 * self.state.global_step + 1) * _fingerprint(inputs)
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log without `train_loss`, which a resumed run would compute from a part of its steps."""
        logs.pop("train_loss", None)
        super().log(logs, start_time)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        total = self.accelerator.reduce(torch.as_tensor(self.order, device=self.args.device), "sum")
        kept: Any = self.state.stateful_callbacks
        kept["paceline"] = {
            "order": int(total),
            # The next line of metrics also covers the steps since the last line.
            "logged": self._globalstep_last_logged,
            "loss": float(self.accelerator.reduce(self._tr_loss.clone(), "mean")),
            "metrics": dict(self._metrics["train"]),
            "tokens": self._total_train_tokens,
        }
        super()._save_checkpoint(model, trial)

    def _damage(self, checkpoint: str) -> str | None:
        """None in the main process: `paceline train` compares check sums there, to say more."""
        return None if self.is_world_process_zero() else super()._damage(checkpoint)

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        position = super()._init_training_state(*args, **kwargs)
        self.state.save_steps = int(self.args.save_steps)  # the recipe's, which may have changed
        kept: Any = self.state.stateful_callbacks
        self._resumed: dict[str, Any] = dict(kept.get("paceline", {}))
        self.order = self._resumed.get("order", 0) if self.is_world_process_zero() else 0
        return position

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self._resumed:
            self._globalstep_last_logged = self._resumed["logged"]
            self._tr_loss = self._tr_loss + self._resumed["loss"]
            self._metrics["train"].update(self._resumed["metrics"])
            self._total_train_tokens = self._resumed["tokens"]
            self._resumed = {}
        super()._run_epoch(*args, **kwargs)


def _fingerprint(inputs: dict[str, Any]) -> Tensor:
    ids = inputs["input_ids"]
    # A row may have several packed sequences, each with positions from 0.
    in_a_row = torch.arange(ids.shape[-1], device=ids.device).expand_as(ids)
    places = inputs.get("position_ids", in_a_row)
    sequence = (places == 0).flatten().cumsum(0) - 1
    real = inputs.get("attention_mask", torch.ones_like(ids))
    hashes = ((ids + 1) * real * _mixed(places + 1)).flatten()
    return _mixed(torch.zeros_like(hashes).index_add(0, sequence, hashes)).sum()


def _mixed(x: Tensor) -> Tensor:
    x = x * -0x61C8864680B583EB  # 2^64 over the golden ratio; products wrap
    return x ^ (x >> 32)


EVALUATED_TOKENS = 8192  # at a time, at least

# ---- building -----------------------------------------------------------------------------------


def processes() -> Any:
    """Accelerate's state of this process and the others, also on CPUs."""
    return PartialState(cpu=not torch.accelerator.is_available())


class Prepared(NamedTuple):
    """Sequences of tokens for a trainer, and the tokenizer that made them."""

    train: Any
    evaluation: Any
    tokenizer: Any
    split: str = ""  # what is said of rows that were held out


def build_trainer(
    recipe: Recipe,
    folder: Path,
    kind: Callable[..., Any] = RunTrainer,
    *,
    only_data: bool = False,
    prepared: Prepared | None = None,
) -> Any:
    """Load data, tokenizer and model, and make the trainer of a run.

    Args:
        recipe: what is trained on what, and how.
        folder: for the checkpoints.
        kind: makes the trainer, an `OneMethodTrainer`.
        only_data: replace the model by a tiny stand-in; the data are as for the real one.
        prepared: the data of an earlier trainer, which are used again to save time; all keys with
            the role DATA were the same for it.

    Raises:
        InputError: something in the recipe cannot be loaded or used, or does not fit together.
    """
    state = processes()
    micro, accumulation = _split_batch(recipe, state.num_processes)
    check_fsdp(recipe, state)
    if recipe.elastic is not None and state.num_processes == 1:
        raise InputError("elastic: it needs several processes; start them by torchrun")
    conversations = recipe.task == "sft"
    skipped = {"skip_prepare_dataset": True} if prepared else {}
    is_new = prepared is None
    refused: InputError | None = None
    with state.main_process_first():  # the others then read the cache
        try:
            prepared = prepared or _prepare(recipe)
        except InputError as error:  # raised within, it would leave the others waiting
            refused = error
    if refused is not None:
        raise refused
    assert prepared is not None
    tokenizer = prepared.tokenizer
    if conversations and not recipe.packing:  # before the model is loaded
        _check_batch(recipe, prepared.train, state.num_processes)
    set_seed(recipe.seed)
    if only_data:
        model: Any = make_gpt2(tokenizer, width=8, layers=1, heads=1, positions=8, seed=0)
    else:
        model = _model(recipe, tokenizer)
    arguments = SFTConfig(
        output_dir=str(folder),
        max_length=recipe.context,
        dataset_kwargs=skipped,
        packing=recipe.packing or not conversations,
        packing_strategy="bfd" if conversations else "wrapped",
        max_steps=1,  # until the data's length is known
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=evaluated_together(recipe, micro),
        gradient_accumulation_steps=accumulation,
        max_grad_norm=recipe.max_grad_norm,
        use_cpu=state.device.type == "cpu",
        bf16=recipe.precision == "bf16",
        gradient_checkpointing=False,  # TRL's default is True; see the next line
        activation_checkpointing=recipe.gradient_checkpointing and not recipe.fsdp,
        torch_compile=recipe.compile,
        fsdp=recipe.fsdp or None,  # type: ignore[arg-type]  # documented so
        fsdp_config={"activation_checkpointing": recipe.gradient_checkpointing}
        if recipe.fsdp
        else None,
        ddp_find_unused_parameters=False,
        average_tokens_across_devices=recipe.elastic is None,
        seed=recipe.seed,
        data_seed=recipe.seed,
        eval_strategy="steps",
        logging_steps=recipe.log_every,
        logging_nan_inf_filter=False,  # a diverged batch is a diverged loss
        save_strategy="steps",
        save_total_limit=recipe.keep_checkpoints,
        report_to=[name for name in recipe.report_to if name != "tensorboard"],
        disable_tqdm=True,
        dataloader_num_workers=recipe.loaders,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = kind(
        model,
        arguments,
        method=recipe.parsed,
        warmup=0,
        weight_decay=recipe.weight_decay,
        betas=recipe.betas,
        stochastic_round=recipe.precision == "pure-bf16",
        scale=recipe.scale,
        snapshots=recipe.times_kept,
        snapshot_dtype=getattr(torch, recipe.snapshot_dtype),
        snapshot_dir=folder.with_name(AVERAGES),
        train_dataset=prepared.train,
        eval_dataset=prepared.evaluation,
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(
            r=recipe.lora_rank,
            lora_alpha=recipe.lora_alpha,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        if recipe.lora_rank and not only_data
        else None,
    )
    trainer.keeps_slow = recipe.choose
    trainer.elastic = recipe.elastic_options
    trainer.remove_callback(PrinterCallback)
    trainer.data_collator = partial(_without_first_labels, trainer.data_collator)
    evaluation = trainer.eval_dataset
    if not len(evaluation):
        given = ", ".join(recipe.eval_data or recipe.data_names)
        raise InputError(
            f"data: no token of {given} counts in the evaluation loss within a --context of "
            f"{recipe.context} tokens; give a larger one"
        )
    kept = min(recipe.eval_examples, len(evaluation))  # a document is many sequences
    trainer.eval_dataset = evaluation.select([i * len(evaluation) // kept for i in range(kept)])
    if prepared.split and is_new:  # where nothing has been refused
        tell(f"data: {prepared.split}")
    steps = recipe.steps
    if recipe.tokens is not None and (recipe.streaming or not conversations):
        steps = math.ceil(recipe.tokens / (recipe.batch * recipe.context))
    if isinstance(trainer.train_dataset, Dataset):
        count = len(trainer.train_dataset)
        _check_batch(recipe, trainer.train_dataset, state.num_processes)
        # Whole batches only: a smaller last one would count as a step. Each epoch leaves out the
        # same few sequences.
        if rest := count % recipe.batch:
            tell(
                f"data: kept {count - rest} of {counted(count, 'sequence')} to train on: {rest} "
                f"{'does' if rest == 1 else 'do'} not fill a batch of {recipe.batch}"
            )
        trainer.train_dataset = trainer.train_dataset.select(range(count - count % recipe.batch))
        steps = steps or _steps_of_data(recipe, trainer.train_dataset)
    assert steps is not None
    trainer.warmup = steps_of(recipe.warmup, steps)
    if trainer.warmup >= steps:
        raise InputError(
            f"warmup: {trainer.warmup} steps must be fewer than the {steps} steps of the run"
        )
    if (elastic := recipe.elastic_options) and elastic["every"] > steps:
        raise InputError(
            f"elastic: the workers would meet first at step {elastic['every']}, after the {steps} "
            "steps of the run, and the start would be returned; give fewer steps between"
        )
    if elastic and (rest := steps % elastic["every"]):
        tell(f"elastic: the last {rest} of {steps} steps are not in the returned model")
    arguments.max_steps = steps
    arguments.eval_steps = math.ceil(steps / recipe.evaluations)
    arguments.save_steps = recipe.save_every or arguments.eval_steps
    return trainer


class DoesNotFit(InputError):
    """A batch or a context does not fit the data or the model; `instead` has keys that fit."""

    def __init__(self, what: str, advice: str, instead: dict[str, Any]) -> None:
        super().__init__(f"{what}; {advice}")
        self.what, self.instead = what, instead


def build_fitting(recipe: Recipe, *args: Any, **options: Any) -> tuple[Recipe, Any]:
    """`build_trainer` with a batch and a context that fit the data and the model; says so.

    Returns:
        The recipe with what was taken, and the trainer.

    Raises:
        InputError: as `build_trainer` does.
    """
    taken: list[dict[str, Any]] = []
    said: list[str] = []
    of_data: list[str] = []  # said again for each batch that is tried
    try:
        with told_to(of_data.append):
            while True:
                try:
                    trainer = build_trainer(recipe, *args, **options)
                    break
                except DoesNotFit as error:
                    what, instead = error.what, error.instead
                    if instead in taken:  # data and model leave no context
                        raise
                taken.append(instead)
                recipe = Recipe(**{**recipe.model_dump(), **instead})
                flags = [f"--{key.replace('_', '-')} {x}" for key, x in instead.items() if x]
                said.append(f"{what}, so {' and '.join(flags)} is taken")
    except BaseException:
        said = []  # it is not
        raise
    finally:
        for line in dict.fromkeys([*said, *of_data]):
            tell(line)
    return recipe, trainer


def _check_batch(recipe: Recipe, data: Any, processes: int) -> None:
    """Refuse a batch of more sequences than there are.

    What fits is the largest power of two that leaves an epoch eight steps, of pieces of text that
    are short enough for that.
    """
    if not isinstance(data, Dataset) or (count := len(data)) >= recipe.batch:
        return
    what = (
        f"batch: {counted(recipe.batch, 'sequence')} a step are more than the {count} in the data"
    )
    advice = "give a smaller --batch or more --data"
    if count < processes:
        raise InputError(f"{what}, and than the {processes} processes; give more --data")
    if recipe.task == "pretrain" and count < FEWEST_STEPS:
        tokens = sum(map(len, data["input_ids"]))
        shorter = _power_of_two(tokens // FEWEST_STEPS)
        if SHORTEST <= shorter < recipe.context:
            raise DoesNotFit(what, advice, {"context": shorter})
    each = _power_of_two(count // (FEWEST_STEPS * processes))
    micro = recipe.micro_batch and min(each, _power_of_two(recipe.micro_batch))
    raise DoesNotFit(what, advice, {"batch": each * processes, "micro_batch": micro})


def _power_of_two(most: int) -> int:
    """The largest power of two up to this number, at least 1."""
    return 1 << max(0, most.bit_length() - 1)


def _prepare(recipe: Recipe) -> Prepared:
    """Load the data and the tokenizer; conversations are tokenized, text is not yet."""
    data = sources.load_sources(recipe)
    tokenizer = _tokenizer(recipe, data.train)
    if recipe.task == "pretrain":
        return Prepared(data.train, data.evaluation, tokenizer, data.split)
    encode = conversation_encoder(tokenizer, recipe.date)
    parts = []
    for part, what, names in (
        (data.train, "to train on", recipe.data_names),
        (data.evaluation, "to evaluate on", recipe.eval_data or recipe.data_names),
    ):
        rows = part.map(
            partial(_encoded, encode=encode, skip_bad=recipe.skip_bad_rows),
            remove_columns=["conversation"],
            features=ENCODED if recipe.skip_bad_rows else None,
        )
        name = ", ".join(names)
        rows = sources.usable(rows, name) if recipe.skip_bad_rows else rows
        parts.append(_within(rows, recipe.context, what, name))
    train, evaluation = parts
    return Prepared(train, evaluation, tokenizer, data.split)


def _encoded(row: dict[str, str], *, encode: Any, skip_bad: bool) -> dict[str, Any]:
    """The tokens of a conversation and which are learned; with `skip_bad` also why there are none.

    Raises:
        InputError: the template cannot write the conversation, and it is not to be skipped.
    """
    conversation = json.loads(row["conversation"])
    about: dict[str, Any] = dict.fromkeys(sources.ABOUT_ROWS) if skip_bad else {}
    try:
        return {**encode(**conversation), **about}
    except InputError as error:
        if not skip_bad:
            raise InputError(f"{error}; {sources.SKIP_BAD}") from error
        where = conversation.get("at", "a conversation")
        reason = str(error).removeprefix(f"data: {where}: ").removesuffix(f" ({where})")
        return about | {"input_ids": [], "assistant_masks": [], "left_out": reason, "at": where}


def _within(data: Any, context: int, what: str, name: str) -> Any:
    """The conversations of which something is learned within the context; says how many are not.

    Messages say `what` they are for, and the `name` of the data.

    Raises:
        DoesNotFit: there are none.
    """
    told = isinstance(data, Dataset)

    def is_learned(masks: list[int]) -> bool:
        nonlocal told
        if not any(masks[1:context]) and not told:  # of a stream, at the first one
            tell(
                f"data: conversations {what} are left out that have nothing to learn within the "
                f"context of {context} tokens"
            )
            told = True
        return any(masks[1:context])

    kept = data.filter(is_learned, input_columns=["assistant_masks"])
    if not isinstance(data, Dataset):
        return kept
    longer, cut = (int((_lengths(part) > context).sum()) for part in (data, kept))
    silent = len(data) - len(kept) - (longer - cut)
    reasons = {
        "longer than the context, with nothing to learn within it": longer - cut,
        "with nothing to learn": silent,
        "longer than the context, and cut off there": cut,
    }
    if not len(kept):
        room = int(_lengths(data).max(initial=0))
        within = f"has anything to learn in its first {context} tokens"
        said = f"data: no conversation {what} in {name} {within}"
        if room <= context:
            raise InputError(f"{said}; give other data")
        raise DoesNotFit(said, "give a larger --context", {"context": room})
    if said := ", ".join(f"{count} {why}" for why, count in reasons.items() if count):
        tell(
            f"data: kept {len(kept)} of {len(data)} conversations {what}, context {context}: {said}"
        )
    return kept


def _lengths(data: Dataset) -> Any:
    """Tokens of each conversation."""
    rows = data.with_format("arrow").iter(1000) if len(data) else ()
    parts = [pc.list_value_length(r["assistant_masks"].combine_chunks()).to_numpy() for r in rows]
    return np.concatenate([np.zeros(0, int), *parts])


def _without_first_labels(collator: Callable[[Any], Any], examples: Any) -> Any:
    """A collator's batch without labels for first tokens, which nothing predicts.

    The Trainer divides the loss by the number of labels, so these must not count.
    """
    batch = collator(examples)
    batch["labels"][:, 0] = -100
    return batch


def evaluated_together(recipe: Recipe, micro: int) -> int:
    """Sequences that an evaluation, which keeps no activations, computes at a time."""
    return max(micro, EVALUATED_TOKENS // recipe.context)


def check_fsdp(recipe: Recipe, state: Any) -> None:
    """Refuse FSDP on one process or without accelerators, which accelerate would ignore."""
    if recipe.fsdp and (state.num_processes == 1 or state.device.type == "cpu"):
        raise InputError(
            "fsdp: it needs several processes with an accelerator each, got "
            f"{state.num_processes} on {state.device.type}; start them by torchrun"
        )


def _split_batch(recipe: Recipe, processes: int) -> tuple[int, int]:
    """Sequences that a process computes at a time, and how many such micro-batches make a step."""
    micro = recipe.micro_batch or recipe.batch // processes
    if micro == 0 or recipe.batch % (micro * processes):
        raise InputError(
            f"batch: {counted(recipe.batch, 'sequence')} a step cannot be split into micro-batches "
            f"of {max(micro, 1)} on {processes} processes; change --batch or --micro-batch"
        )
    return micro, recipe.batch // (micro * processes)


def digest_of(data: Any) -> str | None:
    """A hash of all sequences: tokens, and which of them are learned; None of a stream."""
    if not isinstance(data, Dataset):
        return None
    sha = sha256()
    for rows in data.with_format("arrow").iter(1000):
        for name in sorted(rows.column_names):
            column = rows[name].combine_chunks()
            for part in (pc.list_value_length(column), column.flatten()):
                sha.update(part.cast("int64").to_numpy(zero_copy_only=False).tobytes())
    return sha.hexdigest()


def _steps_of_data(recipe: Recipe, data: Dataset) -> int:
    """Steps of the recipe's epochs or tokens; sequences may be shorter than the context."""
    if recipe.tokens is None:
        return math.ceil((recipe.epochs or 1) * (len(data) // recipe.batch))
    lengths = pc.list_value_length(data.data.column("input_ids"))
    return math.ceil(recipe.tokens / (recipe.batch * pc.mean(lengths).as_py()))


@contextmanager
def _loading(what: str, name: str) -> Iterator[None]:
    """Report in one line why a model or tokenizer cannot be loaded."""
    local = sources.is_here(name)
    if not local and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise InputError(f"{what}: no such folder: {name}")
    with (
        sources.from_hub(what, name, name, local=local),
        one_line(f"{what}: {name}", but=(OSError, ValueError)),
    ):
        check_files(what, name)
        try:
            yield
        except ValueError as error:
            if "trust_remote_code" not in str(error):
                raise
            raise InputError(f"{what}: {name} needs code of its own, which is never run") from error


def _tokenizer(recipe: Recipe, data: Any) -> PreTrainedTokenizerBase:
    tokenizer: Any
    if recipe.tokenizer == "bpe":
        if isinstance(data, IterableDataset):
            raise InputError("tokenizer: bpe cannot be trained on a stream; name another tokenizer")
        if recipe.task == "pretrain":
            texts = list(data["text"])
        else:
            talks = map(json.loads, data["conversation"])
            texts = [message["content"] for talk in talks for message in talk["messages"]]
        tokenizer = make_tokenizer(texts, recipe.vocabulary)
    else:
        name = recipe.tokenizer or recipe.model
        assert name is not None
        with _loading("tokenizer" if recipe.tokenizer else "model", name):
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    if recipe.task == "sft" and not tokenizer.is_fast:
        raise InputError(
            "tokenizer: it has no fast version, which says which characters a token is of; name "
            "another tokenizer"
        )
    if tokenizer.eos_token is None:
        raise InputError("tokenizer: it has no token for the end of text; name another tokenizer")
    chosen = recipe.chat_template
    if chosen is None and recipe.task == "sft" and tokenizer.chat_template is None:
        chosen = "chatml"
    if chosen == "chatml":
        use_chatml(tokenizer)
    elif chosen is not None:
        failed = f"chat_template: {chosen!r} is neither chatml nor a text file"
        with reporting(failed, OSError, UnicodeDecodeError):
            tokenizer.chat_template = read_small(Path(chosen))
    return tokenizer


def _model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Any:
    options: dict[str, Any] = {
        "dtype": torch.bfloat16 if recipe.precision == "pure-bf16" else torch.float32
    }
    if recipe.attention:
        options["attn_implementation"] = recipe.attention
    changes = recipe.config or {}
    if recipe.model is None:
        special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        config = AutoConfig.for_model(**{"vocab_size": len(tokenizer), **special, **changes})
    else:
        folder.require_whole(Path(recipe.model), "model")
        with _loading("model", recipe.model):
            config = AutoConfig.from_pretrained(recipe.model, trust_remote_code=False)
        for key, value in changes.items():
            if not hasattr(config, key):
                raise InputError(f"config: {unknown(key, config.to_dict())}")
            if key == "model_type" and value != config.model_type:
                raise InputError(f"config: model_type of {recipe.model} is {config.model_type!r}")
            with one_line("config"):
                setattr(config, key, value)
    check_sizes(config)
    room = getattr(config.get_text_config(), "max_position_embeddings", recipe.context)
    if recipe.context > room:
        what = f"context: {recipe.context} tokens are more than the model's {room}"
        raise DoesNotFit(what, f"give --context {room} or less", {"context": room})
    if recipe.model is None or recipe.from_scratch:
        model = new_model(config, **options)
    else:
        with _loading("model", recipe.model):
            model = load_model(recipe.model, config=config, **options)
    if (changes or recipe.from_scratch) and recipe.attention in (None, "eager", "sdpa"):
        check_output(model)
    # A model may have fewer embeddings than the tokenizer has entries; more are no problem.
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    for settings in filter(None, (model.config.get_text_config(), model.generation_config)):
        ends = settings.eos_token_id
        if tokenizer.eos_token_id not in (ends if isinstance(ends, list) else [ends]):
            settings.eos_token_id = tokenizer.eos_token_id
    return model
