"""PaceTrainer: which weights it evaluates, saves and leaves behind; resuming; faults; the examples.

Run as a program it trains in forks of itself that are killed in the middle of a save.
"""

import copy
import errno
import functools
import gc
import inspect
import json
import os
import runpy
import signal
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from problems import same

pytest.importorskip("transformers")
pytest.importorskip("trl")

import peft
import pytorch_optimizer
import transformers.modeling_utils
from datasets import Dataset
from safetensors.torch import load_file
from schedulefree import SGDScheduleFree
from tokenizers import Tokenizer, models
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from transformers import (
    AutoModelForCausalLM,
    EarlyStoppingCallback,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

from paceline import PACE, Pullback
from paceline.integrations.transformers import PaceTrainer

EXAMPLES = Path(__file__).parents[1] / "examples"
BATCH, EPOCH = 4, 4  # sequences a step, steps an epoch
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft


@pytest.fixture(autouse=True, scope="module")
def _quick():
    """What takes longer than training a model this small, and decides nothing here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()  # the Trainer collects garbage at each start, over all that is imported
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield
    gc.unfreeze()
    torch.set_num_threads(threads)


# ---- a model, its data, and its training by hand -----------------------------------------------


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
SWAPPING = [kind for kind in OPTIMIZERS if kind != "adamw"]


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
    optimizer = OPTIMIZERS[kind] if isinstance(kind, str) else kind
    optimizers = (optimizer(list(trained(model).values())), None)
    return cls(model, arguments, optimizers=optimizers, **parts)


def on(event, call):
    """A callback: at this event of the Trainer's, call with the step and what callbacks get."""

    def happen(self, args, state, control, **given):
        call(state.global_step, control=control, **given)

    return type("On", (TrainerCallback,), {event: happen})()


def logged(trainer, key):
    """Step -> what was logged under this name."""
    return {entry["step"]: entry[key] for entry in trainer.state.log_history if key in entry}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_training_is_that_by_hand(kind, tmp_path):
    """Which makes what follows mean something."""
    trainer = prepare(tmp_path, kind)
    seen = {}

    def note(step, model, **_):
        seen[step] = which(model, kind, step)

    trainer.add_callback(on("on_step_end", note))
    trainer.train()
    assert seen == {step: called("live", kind, step) for step in range(1, 7)}


# ---- evaluation ------------------------------------------------------------------------------


class Watched(PaceTrainer):
    """Notes what is evaluated."""

    def prediction_step(self, model, inputs, *args, **kwargs):
        vars(self).setdefault("batches", []).append(inputs["input_ids"].tolist())
        return super().prediction_step(model, inputs, *args, **kwargs)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_live_and_returned_weights_are_evaluated_on_the_same_batches(kind, tmp_path):
    evaluated = []
    batches = [stacked(EVAL[i : i + BATCH])["input_ids"].tolist() for i in range(0, 12, BATCH)]

    def note(step, metrics, model, **_):
        once = kind == "adamw" or (step == 0 and kind in ("pace", "pullback"))
        assert trainer.batches == batches * (1 if once else 2)
        trainer.batches.clear()
        held = "live" if trainer.is_in_train else "returned"
        assert which(model, kind, step) == called(held, kind, step)
        evaluated.append((step, metrics["eval_live_loss"], metrics["eval_loss"]))

    trainer = prepare(
        tmp_path, kind, cls=Watched, eval_strategy="steps", eval_steps=2, eval_on_start=True
    )
    trainer.add_callback(on("on_evaluate", note))
    trainer.train()
    hand = by_hand(kind)
    assert [step for step, *_ in evaluated] == [0, 2, 4, 6]
    for step, live, returned in evaluated:
        # of losses near 3, the rounding of float32
        assert live == pytest.approx(loss_by_hand(hand.live[step]), abs=1e-5)
        assert returned == pytest.approx(loss_by_hand(hand.returned[step]), abs=1e-5)
        assert abs(live - returned) > 1e-3 or kind == "adamw" or step == 0
        assert live == returned or kind != "adamw"
        assert logged(trainer, "eval_live_loss")[step] == live
        assert logged(trainer, "eval_loss")[step] == returned
    # after the training the model holds what it returns, and goes on to
    trainer.evaluate()
    assert evaluated[4:] == [pytest.approx(evaluated[3], abs=1e-5)]


def test_further_averages_are_evaluated_by_name(tmp_path):
    def several(params):
        return PACE(
            params, lr=0.01, pullback=0.5, returns={"slow": "ema:power=0.7", "mean": "uniform"}
        )

    trainer = prepare(tmp_path, several)
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    found = trainer.evaluate()
    for name, key in (("slow", "eval_loss"), ("mean", "eval_mean_loss")):
        with optimizer.averaged(name):
            expected = loss_by_hand(weights(trainer.model))
        assert found[key] == pytest.approx(expected, abs=1e-5)
    assert abs(found["eval_loss"] - found["eval_mean_loss"]) > 1e-3
    assert found.keys() & {"eval_slow_loss", "eval_average_loss"} == set()
    with optimizer.averaged("mean"):
        before = weights(trainer.model)
        trainer.evaluate()  # leaves in the model what it found there
        assert loss_by_hand(weights(trainer.model)) == loss_by_hand(before)


def spread(prediction):
    # the second under a name that is complete already
    return {"spread": prediction.predictions.std(), "eval_peak": prediction.predictions.max()}


@pytest.mark.parametrize("kind", ["pace", "schedule-free", "adamw"])
def test_metrics_datasets_and_prefixes(kind, tmp_path):
    parts = {"one": EVAL[:4], "two": EVAL[4:]}
    trainer = prepare(tmp_path, kind, compute_metrics=spread, eval_dataset=parts)
    evaluations = []
    trainer.add_callback(on("on_evaluate", lambda step, metrics, **_: evaluations.append(metrics)))
    trainer.train()
    live, returned = by_hand(kind).live[6], by_hand(kind).returned[6]

    def check(metrics, prefix, rows):
        for weights, name in ((live, f"{prefix}_live"), (returned, prefix)):
            logits = logits_by_hand(weights, rows)
            assert metrics[f"{name}_loss"] == pytest.approx(loss_by_hand(weights, rows), abs=1e-5)
            expected = logits.numpy().std().item()
            assert metrics[f"{name}_spread"] == pytest.approx(expected, abs=1e-5)
        ends = ("loss", "live_loss", "spread", "live_spread", "runtime", "samples_per_second")
        assert {f"{prefix}_{end}" for end in ends} <= metrics.keys()

    metrics = trainer.evaluate()
    for name, rows in parts.items():
        check(metrics, f"eval_{name}", rows)
    assert len(evaluations) == 2  # one for each dataset
    check(evaluations[0], "eval_one", parts["one"])
    check(evaluations[1], "eval_two", parts["two"])
    check(trainer.evaluate(parts["one"], metric_key_prefix="test"), "test", parts["one"])
    metrics = trainer.evaluate(EVAL)
    check(metrics, "eval", EVAL)
    peak = logits_by_hand(returned).max().item()
    assert metrics["eval_peak"] == pytest.approx(peak, abs=1e-5)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_predictions_are_the_returned_models(kind, tmp_path):
    trainer = prepare(tmp_path, kind)
    hand, seen = by_hand(kind), []

    def predict(step, **_):
        predicted = trainer.predict(EVAL)
        expected = logits_by_hand(hand.returned[step])
        torch.testing.assert_close(
            torch.from_numpy(predicted.predictions), expected, atol=1e-5, rtol=0
        )
        assert predicted.metrics["test_loss"] == pytest.approx(
            loss_by_hand(hand.returned[step]), abs=1e-5
        )
        assert not [name for name in predicted.metrics if "live" in name]
        seen.append(which(trainer.model, kind, step))

    trainer.add_callback(on("on_step_end", predict))
    trainer.train()
    predict(6)
    assert seen[:6] == [called("live", kind, step) for step in range(1, 7)]
    assert seen[6:] == [called("returned", kind, 6)]


def stops(losses, patience):
    """The step at which a run of this patience stops, and the best until then."""
    best = 0
    for step, loss in enumerate(losses):
        if loss < losses[best]:
            best = step
        elif step - best == patience:
            return step + 1, best + 1
    raise AssertionError(losses)


def test_early_stopping_goes_by_the_returned_model(tmp_path):
    hand = by_hand("pullback", steps=15)
    stop, best = stops([loss_by_hand(x) for x in hand.returned[1:]], patience=3)
    assert stops([loss_by_hand(x) for x in hand.live[1:]], patience=3)[0] < stop < 15
    trainer = prepare(
        tmp_path,
        "pullback",
        max_steps=15,
        eval_strategy="steps",
        eval_steps=1,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        callbacks=[EarlyStoppingCallback(3)],
    )
    trainer.train()
    assert trainer.state.global_step == stop
    assert trainer.state.best_metric == pytest.approx(loss_by_hand(hand.returned[best]), abs=1e-5)


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


def test_the_metrics_of_trl_are_of_one_model_each(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 2, "prediction_loss_only": True}
    trainer = prepare_sft(tmp_path / "a", max_steps=4, **options)
    trainer.train()
    silent = prepare_sft(tmp_path / "b", max_steps=4)
    silent.train()
    for key in ("loss", "entropy", "mean_token_accuracy"):  # those of the training batches
        assert logged(trainer, key) == logged(silent, key)
        assert len(logged(trainer, key)) == 4
    entries = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert [entry["step"] for entry in entries] == [2, 4]
    metrics = trainer.evaluate()
    # It holds the returned model now, and the live weights wait where the average was.
    returned = weights(trainer.model)
    state = trainer.optimizer.optimizer.state
    live = {name: state[p]["average"] for name, p in trained(trainer.model).items()}
    labels = stacked(EVAL)["labels"][:, 1:]
    for found in (metrics, entries[-1]):
        for prefix, x in (("eval_live", live), ("eval", returned)):
            chances = logits_by_hand(x)[:, :-1].log_softmax(-1)
            entropy = -(chances.exp() * chances).sum(-1).mean().item()
            hits = (chances.argmax(-1) == labels).float().mean().item()
            assert found[f"{prefix}_entropy"] == pytest.approx(entropy, abs=1e-5)
            assert found[f"{prefix}_mean_token_accuracy"] == pytest.approx(hits, abs=1e-6)
            assert found[f"{prefix}_loss"] == pytest.approx(loss_by_hand(x), abs=1e-5)
    assert abs(metrics["eval_entropy"] - metrics["eval_live_entropy"]) > 1e-3
    # a prediction leaves nothing for the next evaluation
    trainer.predict(trainer.eval_dataset)
    assert trainer.evaluate()["eval_entropy"] == metrics["eval_entropy"]


# ---- which weights are where -----------------------------------------------------------------


def stored(folder):
    """The weights of a model folder, by their names in the model."""
    if (folder / "adapter_model.safetensors").exists():
        x = load_file(folder / "adapter_model.safetensors")
        return {name.replace(".weight", ".default.weight"): value for name, value in x.items()}
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("kind", "form"),
    [*product(SWAPPING, ["float32"]), ("pace", "bfloat16"), ("pace", "lora"), ("pullback", "lora")],
)
def test_every_model_folder_holds_the_returned_model(kind, form, tmp_path):
    trainer = prepare(
        tmp_path,
        kind,
        MODELS[form](),
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=1,
    )

    def at_step(step, lr_scheduler=None, **_):
        if step == 0 and lr_scheduler:
            trainer._save_checkpoint(trainer.model, None)
        trainer.save_model(str(tmp_path / f"returned-{step}"))
        trainer.save_live_model(str(tmp_path / f"live-{step}"))

    at_step(0)
    trainer.add_callback(on("on_step_begin", at_step))
    trainer.train()
    trainer.save_model(str(tmp_path / "returned-6"))
    trainer.save_live_model(str(tmp_path / "live-6"))
    trainer.model.save_pretrained(tmp_path / "held-6")
    found = {}
    for folder in tmp_path.iterdir():
        step = folder.name.partition("-")[2]
        assert {x.dtype for x in stored(folder).values()} == {
            torch.bfloat16 if form == "bfloat16" else torch.float32
        }
        found[folder.name] = which(stored(folder), kind, int(step), form)
    kinds = {"checkpoint": "returned", "returned": "returned", "live": "live"}
    expected = {f"{x}-{i}": called(y, kind, i) for x, y in kinds.items() for i in range(7)}
    assert found == expected | {"held-6": "returned"}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_holding_one_or_the_other_nests_and_ends_whatever_happens(kind, tmp_path):
    trainer = prepare(tmp_path, kind, max_steps=3)
    trainer.train()
    holding = {"live": trainer.live, "returned": trainer.averaged}

    def held():
        return which(trainer.model, kind, 3)

    def nest(names):
        before = held()
        with holding[names[0]]() as differs:
            assert held() == called(names[0], kind, 3)
            assert differs == (kind != "adamw")
            if names[1:]:
                nest(names[1:])
        assert held() == before
        with pytest.raises(ZeroDivisionError), holding[names[0]]():
            raise ZeroDivisionError
        assert held() == before

    assert held() == called("returned", kind, 3)
    for names in product(holding, repeat=3):
        nest(names)


@pytest.mark.parametrize("form", MODELS)
def test_after_an_exception_in_an_evaluation_the_model_holds_the_live_weights(form, tmp_path):
    calls, live = [], []

    def failing(prediction):
        calls.append(live.append(weights(trainer.model)))
        if len(calls) == 4:  # of the returned model
            raise ZeroDivisionError
        return {}

    options = {"compute_metrics": failing, "eval_strategy": "steps", "eval_steps": 2}
    trainer = prepare(tmp_path, "pace", MODELS[form](), **options)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert not same(live[3], live[2])
    assert same(weights(trainer.model), live[2])
    trainer.compute_metrics = None
    assert trainer.evaluate().keys() > {"eval_loss", "eval_live_loss"}


# ---- resuming --------------------------------------------------------------------------------


class Run(NamedTuple):
    """How a run is made."""

    kind: object = "pace"
    model: object = functools.partial(small, 0.1)  # dropout: it needs the random state
    prepare: object = prepare
    options: object = None


RUNS = {
    "float32": Run(),
    "accumulation": Run(
        options={"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    ),
    "bfloat16": Run(model=functools.partial(small, 0.1, torch.bfloat16)),
    "bfloat16 state": Run(
        lambda params: PACE(params, lr=0.05, pullback=0.1, state_dtype=torch.bfloat16)
    ),
    "lora": Run(model=functools.partial(adapted, 0.1)),
    "pullback": Run("pullback"),
    "schedule-free": Run("schedule-free"),
    "schedule-free wrapper": Run("schedule-free wrapper"),
    "sft": Run(prepare=prepare_sft),
    "sft lora": Run(model=functools.partial(adapted, 0.1), prepare=prepare_sft),
}


def start(folder, run, **given):
    """With warm-up and decay, clipping, evaluations, shuffled data; checkpoints 3, 4, 6 and 7."""
    options = {
        "max_steps": 7,
        "lr_scheduler_type": "linear",
        "warmup_steps": 2,
        "max_grad_norm": 1.0,
        "train_sampling_strategy": "random",
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 3,
    }
    return run.prepare(
        folder, kind=run.kind, model=run.model(), **options | (run.options or {}) | given
    )


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


@pytest.mark.parametrize("name", RUNS)
def test_resumed_from_any_checkpoint_a_run_ends_bit_for_bit_as_if_undisturbed(name, tmp_path):
    run = RUNS[name]
    whole, live = start(tmp_path / "whole", run), {}

    def note(step, model, control, **_):
        live[step] = weights(model)
        control.should_save |= step == EPOCH  # the random state is loaded elsewhere there

    whole.add_callback(on("on_step_end", note))
    whole.train()
    expected = outcome(whole)
    assert len(expected["history"]["loss"]) == 7
    begun, seen = [], []
    callbacks = [
        on("on_train_begin", lambda _, model, **__: begun.append(weights(model))),
        on("on_evaluate", lambda _, metrics, **__: seen.append(metrics)),
    ]
    for step in (3, 4, 6, 7):
        seen.clear()
        trainer = start(tmp_path / f"from-{step}", run, eval_on_start=True, callbacks=callbacks)
        trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        ended = outcome(trainer)
        assert seen[0]["eval_live_loss"] != seen[0]["eval_loss"]
        # What is logged last of a step counts: of the one that it goes on from, that is what was
        # evaluated before going on.
        past, again = expected.pop("history"), ended.pop("history")
        for key, values in past.items():
            assert again[key].keys() - values.keys() <= {step}
            again[key] = {i: again[key][i] for i in values}
        if name.startswith("schedule-free"):  # it computes its live weights back
            assert far(begun[-1], live[step]) < 1e-5
            for key in ("live", "returned"):
                assert far(ended[key], expected[key]) < 1e-5
            for key in ("loss", "eval_live_loss", "eval_loss"):
                assert again[key] == pytest.approx(past[key], abs=1e-5)
            assert ended["step"] == 7
        else:
            assert same(begun[-1], live[step])
            assert again == past
            for key in expected:
                assert same(ended[key], expected[key]), key
        expected["history"] = past


def test_the_plain_trainer_goes_past_the_end_and_this_one_does_not(tmp_path):
    for cls, expected in ((Trainer, 7), (PaceTrainer, 6)):
        folder = tmp_path / cls.__name__
        options = {"cls": cls, "save_strategy": "steps", "save_steps": 6}
        prepare(folder, "adamw", **options).train()
        trainer = prepare(folder, "adamw", **options)
        trainer.train(resume_from_checkpoint=True)
        assert trainer.state.global_step == expected
    # unless it is asked to
    trainer = prepare(folder, "adamw", **options, max_steps=9)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 9


@pytest.mark.parametrize(
    ("kind", "before"),
    [("pace", "nothing"), ("pace", "trained"), ("schedule-free", "evaluated")],
)
@pytest.mark.parametrize("missing", ["all", "optimizer.pt", "scheduler.pt"])
def test_a_checkpoint_without_optimizer_state_is_refused(missing, kind, before, tmp_path):
    """The Trainer would load nothing, and take the returned model for the live weights."""
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    prepare(tmp_path, kind, **options, save_only_model=missing == "all").train()
    if missing != "all":
        (tmp_path / "checkpoint-2" / missing).unlink()
    trainer = prepare(tmp_path / "other", kind, **options)
    if before == "evaluated":
        trainer.evaluate()
    elif before == "trained":
        trainer.train()
    with pytest.raises(ValueError, match=r"checkpoint-2 has no optimizer state.* no live weights"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    plain = prepare(tmp_path, "adamw", **options | {"max_steps": 3})  # it has no others
    plain.train(resume_from_checkpoint=True)
    assert plain.state.global_step == 3


def test_a_checkpoint_from_before_the_first_step_is_a_start(tmp_path):
    trainer = prepare(tmp_path)
    trainer.add_callback(
        on("on_train_begin", lambda *_, **__: trainer._save_checkpoint(trainer.model, None))
    )
    trainer.train()
    resumed = prepare(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-0"))
    assert same(outcome(resumed), outcome(trainer))


def test_one_trainer_trains_again(tmp_path):
    """From a checkpoint, or on from where it was, whatever weights it holds."""
    trainer = prepare(tmp_path, save_strategy="steps", save_steps=2, max_steps=EPOCH)
    trainer.train()
    expected = outcome(trainer)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(outcome(trainer), expected)
    trainer.args.max_steps = 2  # of another epoch
    trainer.train()
    assert which(trainer.model, "pace", 6) == "returned"
    with trainer.live():
        assert which(trainer.model, "pace", 6) == "live"


# ---- the best checkpoint -----------------------------------------------------------------------


BEST = {
    "max_steps": 15,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "save_strategy": "steps",
    "save_steps": 3,
    "metric_for_best_model": "eval_loss",
    "greater_is_better": False,
}


@functools.cache
def losses_by_hand(kind):
    return [loss_by_hand(x) for x in by_hand(kind, steps=15).returned]


def best_by_hand(kind, until=15, every=3):
    return min(range(every, until + 1, every), key=losses_by_hand(kind).__getitem__)


@pytest.mark.parametrize("strategy", ["steps", "best"])
def test_the_best_checkpoints_returned_model_is_what_is_left(strategy, tmp_path):
    folder = tmp_path / "run"
    options = BEST | {"save_strategy": strategy, "load_best_model_at_end": True}
    trainer = prepare(folder, "pullback", **options)
    trainer.train()
    hand, best = by_hand("pullback", steps=15), best_by_hand("pullback")
    assert trainer.state.best_global_step == best != 15
    assert trainer.state.best_model_checkpoint == str(folder / f"checkpoint-{best}")
    for checkpoint in folder.glob("checkpoint-*"):
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        step = int(checkpoint.name.partition("-")[2])
        until = best_by_hand("pullback", step)
        assert state["best_model_checkpoint"] == str(folder / f"checkpoint-{until}")
        assert step == until or strategy == "steps"

    def is_the_best(x):
        return far(x, hand.returned[best]) < 2e-6 and far(x, hand.returned[15]) > 1e-3

    assert is_the_best(weights(trainer.model))
    predictions = torch.from_numpy(trainer.predict(EVAL).predictions)
    torch.testing.assert_close(predictions, logits_by_hand(hand.returned[best]), atol=1e-5, rtol=0)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == metrics["eval_live_loss"]
    assert metrics["eval_loss"] == pytest.approx(losses_by_hand("pullback")[best], abs=1e-5)
    for save in (trainer.save_model, trainer.save_live_model):
        save(str(tmp_path / "model"))
        assert is_the_best(stored(tmp_path / "model"))
    with trainer.averaged() as differs:
        assert not differs
        assert is_the_best(weights(trainer.model))
    # and another training is one of the optimizer's own average again
    trainer.args.load_best_model_at_end = False
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{best}"))
    assert far(weights(trainer.model), hand.returned[15]) < 2e-6


def test_the_best_adapter_is_what_is_left(tmp_path):
    options = BEST | {"max_steps": 9, "load_best_model_at_end": True, "greater_is_better": True}
    trainer = prepare(tmp_path, "pullback", adapted(), **options)
    trainer.train()
    assert trainer.state.best_global_step != 9
    best = stored(Path(trainer.state.best_model_checkpoint))
    assert same(weights(trainer.model), {name: best[name] for name in weights(trainer.model)})
    assert not same(best, stored(tmp_path / "checkpoint-9"))


def test_the_best_checkpoint_is_found_again_where_the_folder_was_moved(tmp_path):
    before, after = tmp_path / "before", tmp_path / "after"
    options = BEST | {"load_best_model_at_end": True}
    whole = prepare(before, "pullback", **options)
    whole.train()
    best = whole.state.best_global_step
    before.rename(after)
    trainer = prepare(after, "pullback", **options)
    trainer.train(resume_from_checkpoint=str(after / f"checkpoint-{best + 3}"))
    assert trainer.state.best_model_checkpoint == str(after / f"checkpoint-{best}")
    state = TrainerState.load_from_json(str(after / "checkpoint-15" / "trainer_state.json"))
    assert state.best_model_checkpoint == str(after / f"checkpoint-{best}")
    assert same(weights(trainer.model), weights(whole.model))


@pytest.mark.parametrize("limit", [1, 2, 3])
@pytest.mark.parametrize("loads_best", [False, True])
def test_rotation_keeps_the_last_and_the_best(limit, loads_best, tmp_path):
    options = BEST | {"save_total_limit": limit, "load_best_model_at_end": loads_best}
    trainer = prepare(tmp_path, "pullback", **options)
    kept = {}

    def note(step, **_):
        kept[step] = {int(x.name.partition("-")[2]) for x in tmp_path.iterdir()}

    trainer.add_callback(on("on_save", note))
    trainer.train()
    for step in range(3, 16, 3):
        best = best_by_hand("pullback", step)
        last = range(3, step + 1, 3)[-limit:]
        if best not in last:
            last = [best, *last[1 if limit > 1 else 0 :]]
        assert kept[step] == set(last)
    assert best == 9  # two before the last: it was to be kept
    after = {x.name for x in tmp_path.iterdir()}
    assert after == {f"checkpoint-{i}" for i in ({9} if limit == 1 else kept[15])}


def test_rotation_keeps_what_was_saved_last_where_a_run_goes_back(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1}
    prepare(tmp_path, **options, max_steps=4).train()
    for step in range(1, 5):  # by which the Trainer goes where they differ
        os.utime(tmp_path / f"checkpoint-{step}", (step * 1000.0, step * 1000.0))
    trainer = prepare(tmp_path, **options, max_steps=2, save_total_limit=2)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert {x.name for x in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-4"}


# ---- faults in a save ------------------------------------------------------------------------


def sabotage(point, do, patch=setattr, step=4):
    """At this point of the save of a step's checkpoint, do that."""
    here = f"checkpoint-{step}"

    def half(save):
        def saved(value, file, **options):
            path = Path(file)
            save(value, file, **options)
            if here in path.parts and path.name == files[point]:
                os.truncate(path, path.stat().st_size // 2)
                do()

        return saved

    def instead(act, which, after=False):
        def acted(path, *args):
            if Path(which(path, *args)).name == here:
                if after:
                    act(path, *args)
                do()
            return act(path, *args)

        return acted

    files = {
        "model": "model.safetensors",
        "adapter": "adapter_model.safetensors",
        "optimizer": "optimizer.pt",
        "scheduler": "scheduler.pt",
        "random": "rng_state.pth",
    }
    if point in ("model", "adapter"):
        for module in (transformers.modeling_utils, peft.peft_model):
            patch(module, "safe_save_file", half(module.safe_save_file))
    elif point in files:
        patch(torch, "save", half(torch.save))
    elif point == "state":
        save = TrainerState.save_to_json
        patch(TrainerState, "save_to_json", instead(save, lambda state, path: Path(path).parent))
    else:
        after = point == "renamed"
        patch(Path, "replace", instead(Path.replace, lambda source, target: target, after))


def disk_full():
    raise OSError(errno.ENOSPC, "No space left on device")


FATAL = ["model", "state", "renaming", "renamed"]


def saving(folder, form="float32", **given):
    options = BEST | {"max_steps": 6, "eval_steps": 2, "save_steps": 2}
    return prepare(folder, "pace", MODELS[form](), **options | given)


def content(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Model form -> the outcome of the run that is disturbed, and the folder of its checkpoints."""
    ended = {}
    for form in MODELS:
        folder = tmp_path_factory.mktemp(form)
        trainer = saving(folder, form)
        trainer.train()
        ended[form] = (outcome(trainer), folder)
    return ended


@pytest.mark.parametrize(
    ("point", "form"),
    [
        *product(["model", "optimizer", "random", "state", "renaming"], ["float32"]),
        ("scheduler", "bfloat16"),
        ("adapter", "lora"),
    ],
)
def test_a_save_that_fails_leaves_what_was_there(point, form, undisturbed, tmp_path, monkeypatch):
    trainer = saving(tmp_path, form)
    live, before = {}, {}

    def note(step, model, **_):
        live[step] = weights(model)
        before[step] = content(tmp_path)

    trainer.add_callback(on("on_step_end", note))
    with monkeypatch.context() as patch:
        sabotage(point, disk_full, patch.setattr)
        with pytest.raises((OSError, RuntimeError), match="No space left"):
            trainer.train()
    assert trainer.state.global_step == 4
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    assert content(tmp_path) == before[4]
    assert same(weights(trainer.model), live[4])
    assert which(trainer.model, "pace", 4, form) == "live"
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    # With room on the disk it can be saved after all, by the same trainer,
    trainer._save_checkpoint(trainer.model, None)
    assert which(stored(tmp_path / "checkpoint-4"), "pace", 4, form) == "returned"
    assert same(weights(trainer.model), live[4])
    # and a new one goes on.
    resumed = saving(tmp_path, form)
    resumed.train(resume_from_checkpoint=True)
    assert same(outcome(resumed), undisturbed[form][0])


def test_what_a_killed_save_left_is_cleared(tmp_path):
    for left in (".partial/checkpoint-2/stale", ".partial/checkpoint-1/model.safetensors"):
        (tmp_path / left).parent.mkdir(parents=True)
        (tmp_path / left).touch()
    prepare(tmp_path, save_strategy="steps", save_steps=2, max_steps=2).train()
    assert [x.name for x in tmp_path.iterdir()] == ["checkpoint-2"]
    assert not (tmp_path / "checkpoint-2" / "stale").exists()


def killed(folder, points):
    """Train in forks of this process, each killed at one of these points; print how they ended."""
    torch.set_num_threads(1)
    for point in points:
        if not (child := os.fork()):
            sabotage(point, lambda: os.kill(os.getpid(), signal.SIGKILL))
            saving(folder / point).train()
            os._exit(0)
        print(point, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_killed_in_a_save_a_run_goes_on_from_a_whole_checkpoint(undisturbed, tmp_path):
    program = [sys.executable, __file__, str(tmp_path), *FATAL]
    told = subprocess.run(program, capture_output=True, text=True, check=False)
    for point in FATAL:
        assert f"{point} -9\n" in told.stdout, told.stderr
        folder = tmp_path / point
        checkpoint = Path(get_last_checkpoint(str(folder)))
        assert checkpoint.name == ("checkpoint-4" if point == "renamed" else "checkpoint-2")
        assert (folder / ".partial").exists()  # it was in the middle
        whole = undisturbed["float32"][1] / checkpoint.name
        assert {p.name for p in checkpoint.iterdir()} == {p.name for p in whole.iterdir()}
        assert same(stored(checkpoint), stored(whole))
        trainer = saving(folder)
        trainer.train(resume_from_checkpoint=True)
        assert same(outcome(trainer), undisturbed["float32"][0])
        assert {p.name for p in folder.iterdir()} == {f"checkpoint-{i}" for i in (2, 4, 6)}


# ---- the examples ----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:'pin_memory'")  # without an accelerator
@pytest.mark.parametrize("name", ["trainer", "sft_trainer", "plain_loop"])
def test_an_example_writes_the_average_of_what_it_trained(name, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    iterates = []  # before the first step, and after each

    def note(optimizer, *_):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        iterates.append([(p, p.detach().double()) for p in params])

    def note_first(optimizer, *_):
        if not iterates:
            note(optimizer)

    monkeypatch.setattr(sys, "argv", [name, "--out", str(out)])
    hooks = [
        register_optimizer_step_pre_hook(note_first),
        register_optimizer_step_post_hook(note),
    ]
    try:
        ended = runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    finally:
        for hook in hooks:
            hook.remove()
    assert "live weights" in capsys.readouterr().out
    assert len(iterates) == 61
    model = ended["trainer"].model if "trainer" in ended else ended["model"]
    names = {p: name for name, p in model.named_parameters()}
    saved = AutoModelForCausalLM.from_pretrained(out).state_dict()
    for (p, average), *following in zip(*iterates, strict=True):
        for t, (same_p, x) in enumerate(following, 1):
            assert same_p is p
            average = average + (1 + t) ** -0.5 * (x - average)
        # float32's rounding over sixty steps
        torch.testing.assert_close(saved[names[p]], average.float(), atol=2e-6, rtol=1e-5)
        assert (x - average).abs().max() > 1e-4


if __name__ == "__main__":
    killed(Path(sys.argv[1]), sys.argv[2:])
