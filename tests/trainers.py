"""A small model, its data, and its training by hand, for the tests of PaceTrainer."""

import copy
import functools
import inspect
from typing import NamedTuple

import peft
import pytorch_optimizer
import torch
import torch.nn.functional as F
from datasets import Dataset
from schedulefree import SGDScheduleFree
from tokenizers import Tokenizer, models
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from paceline import PACE, Pullback
from paceline.integrations.transformers import PaceTrainer

BATCH, EPOCH = 4, 4  # sequences a step, steps an epoch


def sequences(count, stride, seed):
    starts = torch.randint(16, (count, 1), generator=torch.Generator().manual_seed(seed))
    ids = (starts + stride * torch.arange(8)) % 16
    # The first token is predicted from nothing, but the Trainer would count its label.
    labels = torch.cat([torch.full((count, 1), -100), ids[:, 1:]], 1)
    return [{"input_ids": x, "labels": y} for x, y in zip(ids, labels, strict=True)]


TRAIN = sequences(BATCH * EPOCH, 1, seed=1)

EVAL = sequences(6, 1, seed=2) + sequences(6, 3, seed=3)  # half of them are never learned


def small(dropout=0.0, dtype=torch.float32):
    torch.manual_seed(0)
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    size = {"vocab_size": 16, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    config = GPT2Config(**size, **rates, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).to(dtype).train()


def adapted(dropout=0.0):
    config = peft.LoraConfig(
        r=2, target_modules=["c_attn"], fan_in_fan_out=True, lora_dropout=dropout
    )
    return peft.get_peft_model(small(dropout), config)


MODELS = {
    "float32": small,
    "bfloat16": functools.partial(small, dtype=torch.bfloat16),
    "lora": adapted,
}

OPTIMIZERS = {
    "pace": lambda params: PACE(params, lr=0.05, pullback=0.1),
    "pullback": lambda params: Pullback(
        torch.optim.SGD(params, lr=1.0, momentum=0.9), pullback=0.1, averaging="uniform"
    ),
    "schedule-free": lambda params: SGDScheduleFree(params, lr=1.0),
    # Its mode is an attribute of its own, and not in its groups.
    "schedule-free wrapper": lambda params: pytorch_optimizer.ScheduleFreeWrapper(
        torch.optim.SGD(params, lr=1.0)
    ),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.05, weight_decay=0.0),
}


def trained(model):
    """Names and parameters."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def weights(model):
    return {name: p.detach().clone() for name, p in trained(model).items()}


def stacked(rows):
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


class ByHand(NamedTuple):
    """Weights after each step, from 0 on: the live ones, and in float64 what is returned."""

    live: list
    returned: list


@functools.cache
def by_hand(kind="pace", form="float32", steps=6):
    """What a plain loop over TRAIN comes by, and the average by its formula from the iterates."""
    model = MODELS[form]()
    optimizer = OPTIMIZERS[kind](list(trained(model).values()))
    live, gradients = [weights(model)], []
    for step in range(steps):
        first = BATCH * (step % EPOCH)
        batch = stacked(TRAIN[first : first + BATCH])
        if hasattr(optimizer, "train"):
            optimizer.train()
        model(**batch, num_items_in_batch=torch.tensor(BATCH * 7)).loss.backward()
        gradients.append({name: p.grad.double() for name, p in trained(model).items()})
        optimizer.step()
        optimizer.zero_grad()
        live.append(weights(model))
    returned = []
    for name in live[0]:
        iterates = [x[name].double() for x in live]
        if kind == "pace":
            average = [iterates[0]]
            for t, x in enumerate(iterates[1:], 1):
                average.append(average[-1] + (1 + t) ** -0.5 * (x - average[-1]))
        elif kind == "adamw":
            average = iterates
        else:
            points = iterates[1:]
            if kind != "pullback":  # Schedule-Free's x is the mean of SGD's z
                moves = torch.stack([-1.0 * gradient[name] for gradient in gradients])
                points = list(iterates[0] + moves.cumsum(0))
            means = [torch.stack(points[:t]).mean(0) for t in range(1, steps + 1)]
            average = [iterates[0], *means]
        returned.append(average)
    returned = [dict(zip(live[0], x, strict=True)) for x in zip(*returned, strict=True)]
    return ByHand(live, returned)


def far(a, b):
    """The largest difference between two models' weights."""
    assert a.keys() == b.keys()
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)


# Float32's rounding over six steps; and Schedule-Free has no average, but computes it back from
# the live weights, with 1 / 0.9 of their rounding each time. A bfloat16 below 1 is that close.
CLOSE = {"float32": 2e-6, "lora": 2e-6, "bfloat16": 2**-8}


def which(model, kind, step, form="float32"):
    """Whether these weights are "live" or "returned" of a step by hand, or both."""
    mine = model if isinstance(model, dict) else weights(model)
    hand = by_hand(kind, form)
    found = {
        name: far(mine, {key: x[key].to(mine[key].dtype) for key in mine})
        for name, x in {"live": hand.live[step], "returned": hand.returned[step]}.items()
    }
    close = [name for name, distance in found.items() if distance <= CLOSE[form]]
    if len(close) == 2:
        return "both"
    assert close, found
    assert sum(found.values()) >= 4 * CLOSE[form]  # the other is another
    return close[0]


def called(name, kind, step):
    """What `which` calls them: most averages begin as the weights after the first step."""
    return "both" if kind == "adamw" or step < (1 if kind == "pace" else 2) else name


@torch.no_grad()
def logits_by_hand(x, rows=EVAL):
    model = small()
    model.load_state_dict({name: value.float() for name, value in x.items()}, strict=False)
    model.tie_weights()
    return model.eval()(stacked(rows)["input_ids"]).logits


def loss_by_hand(x, rows=EVAL):
    logits, labels = logits_by_hand(x, rows)[:, :-1], stacked(rows)["labels"][:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()


def prepare(folder, kind="pace", model=None, cls=PaceTrainer, config=TrainingArguments, **given):
    """A trainer of the training by hand; `given` are arguments of it and of its configuration."""
    model = small() if model is None else model
    parts = {"train_dataset": TRAIN, "eval_dataset": EVAL}
    for key in inspect.signature(Trainer).parameters.keys() & given.keys():
        parts[key] = given.pop(key)
    options = {
        "max_steps": 6,
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": BATCH,
        "train_sampling_strategy": "sequential",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    arguments = config(str(folder), **options | given)
    if not parts.get("optimizer_cls_and_kwargs"):
        optimizer = OPTIMIZERS[kind] if isinstance(kind, str) else kind
        parts["optimizers"] = (optimizer(list(trained(model).values())), None)
    return cls(model, arguments, **parts)


def on(event, call):
    """A callback: at this event of the Trainer's, call with the step and what callbacks get."""

    def happen(self, args, state, control, **given):
        call(state.global_step, control=control, **given)

    return type("On", (TrainerCallback,), {event: happen})()


def logged(trainer, key):
    """Step -> what was logged under this name."""
    return {entry["step"]: entry[key] for entry in trainer.state.log_history if key in entry}


class SFT(PaceTrainer, SFTTrainer):
    """As a user makes it."""


def tokens():
    words = Tokenizer(models.WordLevel({str(i): i for i in range(16)}, unk_token="0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="0", pad_token="0")


def prepare_sft(folder, **given):
    def data(rows):
        return Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in rows])

    options = {"config": SFTConfig, "bf16": False, "activation_checkpointing": False}
    parts = {"train_dataset": data(TRAIN), "eval_dataset": data(EVAL), "processing_class": tokens()}
    return prepare(folder, cls=SFT, **options | parts | given)


def outcome(trainer):
    """All that a training computes."""
    with trainer.live():
        live = weights(trainer.model)
        state = copy.deepcopy(trainer.optimizer.state_dict())
    with trainer.averaged():
        returned = weights(trainer.model)
    keys = ("loss", "grad_norm", "learning_rate", "eval_loss", "eval_live_loss", "eval_entropy")
    history = {key: logged(trainer, key) for key in keys}
    return {
        "live": live,
        "returned": returned,
        "optimizer": state,
        "scheduler": trainer.lr_scheduler.state_dict(),
        "history": history,
        "step": trainer.state.global_step,
        "best": trainer.state.best_metric,
    }
