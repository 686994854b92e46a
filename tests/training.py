"""Whole runs of tiny models, and what is read of them."""

import json
import random
import re
import shutil

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from transformers import TrainerCallback

from paceline.cli import main
from paceline.train.run import Train, train

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}

FAMILIES = {
    "llama": LLAMA,
    "qwen3": {**LLAMA, "model_type": "qwen3", "head_dim": 16},
    "gemma3_text": {
        **LLAMA,
        "model_type": "gemma3_text",
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 8,
    },
    "gpt2": {"model_type": "gpt2", "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2},
}

STEPS, EVERY, SEQUENCES = 12, 3, 72  # evaluated and saved every so many; trained on

WORDS = ("cat", "sat", "mat", "and", "dog", "runs", "fast", "blue", "red", "why", "yes", "maybe")

TIMES = re.compile("runtime|per_second")


def conversations(count, seed):
    """Of very different lengths, so that means over batches are not means over tokens."""
    rng = random.Random(seed)

    def say(role, longest):
        words = rng.choices(WORDS, k=rng.randint(1, longest))
        return {"role": role, "content": " ".join(words)}

    return [[say("user", 3), say("assistant", 12)] * rng.randint(1, 2) for _ in range(count)]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return path


class Recorder(TrainerCallback):
    """The live weights in float64, before the first step and after each; and the learning rates."""

    def on_train_begin(self, args, state, control, model=None, **_):
        self.weights, self.rates, self.first = [], [], state.global_step
        self.note(model)

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **_):
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_step_end(self, args, state, control, model=None, **_):
        self.note(model)

    def note(self, model):
        self.weights.append({n: p.detach().double() for n, p in model.named_parameters()})

    @property
    def steps(self):
        return len(self.weights) - 1


def go(folder, values, *callbacks, **changes):
    """A run; True if it came to its end."""
    return bool(train(Train(out=folder, **{**values, **changes}), Console(quiet=True), callbacks))


def go_on(folder, *arguments):
    return main(["train", "--resume", str(folder), *arguments])


def write_recipe(path, values, **changes):
    plain = {**values, **changes}
    plain = {k: list(x) if isinstance(x, tuple) else x for k, x in plain.items()}
    path.write_text(yaml.safe_dump(plain))
    return path


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and a[k].equal(b[k]) for k in a)


def apart(a, b):
    """The largest difference; `a` may have more, as tied weights have two names in some files."""
    assert a.keys() >= b.keys()
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in b)


def read(path):
    return json.loads(path.read_text())


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def timeless(rows):
    return [{k: x for k, x in row.items() if not TIMES.search(k)} for row in rows]


def checkpoints(run):
    return sorted(int(p.name.rpartition("-")[2]) for p in (run / "checkpoints").glob("check*"))


def order(run):
    last = run / "checkpoints" / f"checkpoint-{checkpoints(run)[-1]}"
    return read(last / "trainer_state.json")["stateful_callbacks"]["paceline"]["order"]


def optimizer(run):
    last = run / "checkpoints" / f"checkpoint-{checkpoints(run)[-1]}"
    state = torch.load(last / "optimizer.pt", weights_only=True)["state"]
    return {f"{i} {k}": torch.as_tensor(x) for i, kept in state.items() for k, x in kept.items()}


def assert_ended_alike(a, b):
    """Bit for bit: both models, the optimizer, the order of the data, and all that was logged."""
    for part in (
        (weights(a / "live"), weights(b / "live")),
        (weights(a / "model"), weights(b / "model")),
    ):
        assert same(*part)
    assert same(optimizer(a), optimizer(b))
    assert order(a) == order(b)
    assert timeless(lines(a)) == timeless(lines(b))


def nothing_half_written(folder):
    return not [p for p in folder.rglob("*") if "partial" in p.name or "replaced" in p.name]


def unfinished(run):
    """As if it had been killed at step 9."""
    for folder in (run / "model", run / "live", run / "checkpoints" / f"checkpoint-{STEPS}"):
        shutil.rmtree(folder)


def near(run, other):
    """As far apart as two orders of summation are."""
    assert order(run) == order(other)
    for name in ("live", "model"):
        assert apart(weights(run / name), weights(other / name)) < 1e-5
    for mine, theirs in zip(lines(run), lines(other), strict=True):
        for key in theirs.keys() & {"loss", "eval_loss", "eval_live_loss"}:
            assert mine[key] == pytest.approx(theirs[key], rel=1e-4)


def values_in(folder):
    """The keys and values of a recipe, whose data are written into the folder."""
    return {
        "config": LLAMA,
        "tokenizer": "bpe",
        "vocabulary": 300,
        "data": (str(write_jsonl(folder / "train.jsonl", conversations(SEQUENCES, 0))),),
        "eval_data": (str(write_jsonl(folder / "eval.jsonl", conversations(7, 1))),),
        "context": 32,
        "lr": 1e-2,
        "pullback": 1.0,
        "kappa": 0.3,
        "warmup": 0.0,
        "batch": 4,
        "steps": STEPS,
        "evaluations": STEPS // EVERY,
        "log_every": 2,
        "report_to": (),
    }
