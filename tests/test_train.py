"""`paceline train` and `paceline verify-resume`: whole runs of tiny models."""

import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml

pytest.importorskip("transformers")
pytest.importorskip("trl")

import datasets
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from paceline.cli import main
from paceline.train import InputError
from paceline.train.build import RunTrainer, _fingerprint, _split_batch, build
from paceline.train.recipe import Recipe
from paceline.train.run import Train, train
from paceline.train.verify import _compare

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


@pytest.fixture(autouse=True, scope="module")
def _surroundings(tmp_path_factory):
    """One thread, as the models are tiny; and the datasets' cache among the temporary files."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("data")))
        yield
    torch.set_num_threads(threads)


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


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    """The keys and values of the recipe that the tests vary."""
    folder = tmp_path_factory.mktemp("conversations")
    return {
        "config": LLAMA,
        "tokenizer": "bpe",
        "vocabulary": 300,
        "data": (str(write_jsonl(folder / "train.jsonl", conversations(SEQUENCES, 0))),),
        "eval_data": (str(write_jsonl(folder / "eval.jsonl", conversations(7, 1))),),
        "context": 32,
        "lr": 1e-2,
        "c": 1.0,
        "batch": 4,
        "steps": STEPS,
        "evaluations": STEPS // EVERY,
        "log_every": 2,
        "report_to": (),
    }


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


@pytest.fixture(scope="module")
def recorded(values, tmp_path_factory):
    """A run that nothing happened to, and what was recorded of it."""
    recorder = Recorder()
    folder = tmp_path_factory.mktemp("recorded") / "run"
    assert go(folder, values, recorder)
    return folder, recorder


@pytest.fixture(scope="module")
def finished(recorded):
    return recorded[0]


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of it, to be spoilt."""
    return shutil.copytree(finished, tmp_path / "run")


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


def evaluated(run):
    return [row for row in timeless(lines(run)) if "eval_loss" in row]


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


def one_line(capsys, *parts):
    said = capsys.readouterr().err
    assert said.startswith("paceline: ")
    assert said.count("\n") == 1
    for part in parts:
        assert part in said
    assert "Traceback" not in said
    return said


def at_step(monkeypatch, step, what):
    """Have something done within a step of the run to come."""
    usual = RunTrainer.training_step

    def training_step(trainer, *args, **kwargs):
        if trainer.state.global_step == step:
            what()
        return usual(trainer, *args, **kwargs)

    monkeypatch.setattr(RunTrainer, "training_step", training_step)


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


# ---- what a run leaves ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_families_train_and_load(values, family, tmp_path, capsys):
    recipe = write_recipe(tmp_path / "recipe.yaml", values, config=FAMILIES[family])
    run = tmp_path / "run"
    assert main(["train", str(recipe), "--out", str(run)]) == 0
    assert "run/model" in capsys.readouterr().out.replace("\n", "")
    evaluations = [row for row in lines(run) if "eval_loss" in row]
    for key in ("eval_live_loss", "eval_loss"):
        assert evaluations[-1][key] < evaluations[0][key] - 0.5
    assert evaluations[-1]["eval_live_loss"] != evaluations[-1]["eval_loss"]
    last = run / "checkpoints" / f"checkpoint-{STEPS}"
    assert same(weights(run / "model"), weights(last))
    assert not same(weights(run / "model"), weights(run / "live"))
    for name in ("model", "live"):
        assert not [p for p in (run / name).iterdir() if p.suffix in (".bin", ".pt", ".pth")]
        model = AutoModelForCausalLM.from_pretrained(run / name)
        assert model.config.model_type == family
        tokenizer = AutoTokenizer.from_pretrained(run / name)
        turn = [{"role": "user", "content": "why not"}]
        given = tokenizer.apply_chat_template(
            turn, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        answer = model.generate(**given, max_new_tokens=4, do_sample=False)
        assert given["input_ids"].shape[1] < answer.shape[1]
        assert isinstance(tokenizer.decode(answer[0]), str)


def test_page_manifest_and_cards_have_the_facts(finished):
    last = [row for row in lines(finished) if "eval_loss" in row][-1]
    page = (finished / "report.html").read_text()
    assert "<svg" in page
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", page)
    assert not re.search(r"@import|url\(\s*[\"']?(?:https?:)?//", page)
    for key in ("eval_live_loss", "eval_loss"):
        assert f"{last[key]:.4f}" in page
    facts = read(finished / "manifest.json")
    model = AutoModelForCausalLM.from_pretrained(finished / "model")
    assert facts["steps"] == STEPS
    assert facts["parameters"] == model.num_parameters()
    assert facts["processes"] == 1
    assert facts["resumed"] == []
    assert facts["seconds"] > 0
    assert facts["data"]["sequences"] == SEQUENCES
    assert facts["data"]["evaluation_sequences"] == 7
    assert facts["recipe"]["lr"] == 1e-2
    assert {"torch", "transformers", "paceline"} <= facts["versions"].keys()
    assert Recipe(**yaml.safe_load((finished / "recipe.yaml").read_text())).steps == STEPS
    for name, what in (("model", "returned"), ("live", "last weights")):
        card = (finished / name / "README.md").read_text()
        head = yaml.safe_load(card.split("---")[1])
        assert head["library_name"] == "transformers"
        assert what in card
        assert f"{last['eval_loss']:.4f}" in card
        assert read(finished / name / "paceline.json")["updates"] == STEPS
    assert nothing_half_written(finished)


def test_evaluated_logged_and_saved_when_asked(finished, values, tmp_path):
    rows = lines(finished)
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 3, 6, 9, 12]
    assert [row["step"] for row in rows if "loss" in row] == [2, 4, 6, 8, 10, 12]
    assert sorted(row["step"] for row in rows) == [row["step"] for row in rows]
    assert checkpoints(finished) == [9, 12]
    # the last step counts, a multiple or not
    changes = {"steps": 7, "evaluations": 2, "save_every": 2, "keep_checkpoints": 3, "log_every": 5}
    assert go(tmp_path / "run", values, **changes)
    rows = lines(tmp_path / "run")
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 4, 7]
    assert [row["step"] for row in rows if "loss" in row] == [5, 7]
    assert checkpoints(tmp_path / "run") == [4, 6, 7]


# ---- which models those are ----------------------------------------------------------------------


def recursive(thetas, weight):
    average = thetas[0]
    for step, theta in enumerate(thetas[1:], 1):
        average = {n: (1 - weight(step)) * average[n] + weight(step) * theta[n] for n in theta}
    return average


def mean(thetas):
    return {n: sum(theta[n] for theta in thetas) / len(thetas) for n in thetas[0]}


def slow(thetas, k=5, alpha=0.5):
    """Of Lookahead: each k steps a way toward the fast ones, which go on from there."""
    return thetas[len(thetas) - 1 - (len(thetas) - 1) % k]


def power(kappa):
    return lambda thetas: recursive(thetas, lambda step: (1 + step) ** -kappa)


# The rule that is written down, and the model from the live weights after 0, 1, ... steps.
METHODS = {
    "adamw": (None, lambda thetas: thetas[-1]),
    "adamw:wsd": (None, lambda thetas: thetas[-1]),
    "adamw:cosine": (None, lambda thetas: thetas[-1]),
    "ema": ("ema:power=0.3", power(0.3)),
    "ema:half_life=3": (
        "ema:half_life=3",
        lambda thetas: recursive(thetas, lambda step: 1 - 0.5 ** (1 / 3)),
    ),
    "uniform": ("uniform:start=4", lambda thetas: mean(thetas[5:])),
    "lawa:window=2:every=2": ("lawa:window=2:every=2", lambda thetas: mean([thetas[4], thetas[6]])),
    "bema": ("bema:power=0.5", None),
    "schedule-free": (None, None),
    "lookahead": (None, slow),
    "pullback:sgd": ("ema:power=0.3", power(0.3)),
    "pace:state=bf16": ("ema:power=0.3", power(0.3)),
}


@pytest.mark.parametrize("method", METHODS)
def test_methods_return_what_they_say(values, method, tmp_path):
    rule, model = METHODS[method]
    recorder, run = Recorder(), tmp_path / "run"
    assert go(run, values, recorder, method=method, steps=6, evaluations=1)
    facts = read(run / "paceline.json")
    assert facts["method"] == read(run / "model" / "paceline.json")["method"]
    assert facts["rule"] == rule
    assert facts["steps"] == 6
    if rule:
        assert facts["updates"] == 6
        assert facts["dtype"] == ("bfloat16" if "bf16" in method else "float32")
        assert facts["kappa"] == {"ema:power=0.3": 0.3, "bema:power=0.5": 0.5}.get(rule)
    if rule == "ema:half_life=3":
        assert facts["half_life_steps"] == pytest.approx(3)
        assert facts["weight_of_newest"] == pytest.approx(1 - 0.5 ** (1 / 3))
    live, returned = weights(run / "live"), weights(run / "model")
    assert same(live, returned) == method.startswith("adamw")
    last = [row for row in lines(run) if "eval_loss" in row][-1]
    assert (last["eval_loss"] == last["eval_live_loss"]) == method.startswith("adamw")
    assert apart(live, recorder.weights[-1]) == 0 or method in ("schedule-free", "lookahead")
    if model:
        tolerance = 5e-3 if "bf16" in method else 1e-6
        assert apart(returned, model(recorder.weights)) <= tolerance


def test_losses_of_text_are_means_over_predicted_tokens(values, tmp_path):
    """A step of all sequences has the loss that they have in evaluation: first tokens not in it."""
    texts = (str(write_texts(tmp_path / "texts.jsonl", 20)),)
    changes = {**values, "task": "pretrain", "data": texts, "eval_data": texts, "steps": 1}
    count = len(build(Recipe(**{**changes, "batch": 1}), tmp_path / "build").train_dataset)
    assert count > 4
    changes |= {"batch": count, "eval_examples": 20, "log_every": 1, "micro_batch": 1}
    assert go(tmp_path / "run", changes)
    evaluation, step, *_ = lines(tmp_path / "run")
    assert step["loss"] == pytest.approx(evaluation["eval_live_loss"], rel=1e-6)


def test_the_average_is_that_of_the_weights_passed_through(recorded):
    run, recorder = recorded
    assert recorder.steps == STEPS
    assert apart(weights(run / "live"), recorder.weights[-1]) == 0
    assert apart(weights(run / "model"), power(0.3)(recorder.weights)) < 1e-6
    facts = read(run / "paceline.json")
    newest = (1 + STEPS) ** -0.3
    assert facts["rule"] == "ema:power=0.3"
    assert facts["kappa"] == 0.3
    assert facts["updates"] == STEPS
    assert facts["weight_of_newest"] == pytest.approx(newest)
    assert facts["half_life_steps"] == pytest.approx(math.log(0.5) / math.log(1 - newest))


@pytest.mark.parametrize("name", ["model", "live"])
def test_evaluation_loss_is_a_mean_over_tokens(values, finished, name):
    model = AutoModelForCausalLM.from_pretrained(finished / name)
    tokenizer = AutoTokenizer.from_pretrained(finished / name)
    total, learned, means = 0.0, 0, []
    for messages in conversations(7, 1):
        given = tokenizer.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True
        )
        ids = torch.tensor(given["input_ids"][:32])
        mask = torch.tensor(given["assistant_masks"][:32]).bool()[1:]
        with torch.no_grad():
            logits = model(ids[None]).logits[0, :-1]
        losses = F.cross_entropy(logits.double(), ids[1:], reduction="none")[mask]
        total, learned = total + float(losses.sum()), learned + len(losses)
        means.append(float(losses.mean()))
    last = [row for row in lines(finished) if "eval_loss" in row][-1]
    assert last["eval_loss" if name == "model" else "eval_live_loss"] == pytest.approx(
        total / learned, rel=1e-5
    )
    assert total / learned != pytest.approx(sum(means) / len(means), rel=1e-3)  # it matters


# ---- the same result -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"micro_batch": 1},
        {"micro_batch": 2},
        {"gradient_checkpointing": True},
        {"loaders": 1},
    ],
    ids=str,
)
def test_the_same_in_less_memory(values, recorded, changes, tmp_path):
    """All losses too: of batches, and over the tokens of the evaluation."""
    run, _ = recorded
    assert go(tmp_path / "run", values, **changes)
    assert order(tmp_path / "run") == order(run)
    for name in ("live", "model"):
        assert apart(weights(tmp_path / "run" / name), weights(run / name)) < 5e-6
    for mine, usual in zip(lines(tmp_path / "run"), lines(run), strict=True):
        for key in usual.keys() & {"loss", "eval_loss", "eval_live_loss", "grad_norm"}:
            assert mine[key] == pytest.approx(usual[key], rel=2e-5)


def test_the_order_number_is_of_tokens_places_and_steps(values, finished, tmp_path):
    def number(*rows, mask=None):
        inputs = {"input_ids": torch.tensor(rows)}
        return int(_fingerprint(inputs | ({} if mask is None else {"attention_mask": mask})))

    a, b = [5, 6, 7], [6, 5, 0]
    assert number(a, b) == number(b, a)
    wrap = 2**64
    assert (number(a, b) - number(a) - number(b)) % wrap == 0
    assert number(b, mask=torch.tensor([[1, 1, 0]])) == number(b[:2])
    packed = {"input_ids": torch.tensor([a + b]), "position_ids": torch.tensor([[0, 1, 2] * 2])}
    assert int(_fingerprint(packed)) == number(a, b)
    others = [
        number(*x) for x in ([a], [b], [b[:2]], [a[::-1]], [[5, 6, 8]], [[0, *a]], [[5, 5, 0]])
    ]
    assert len(set(others)) == len(others)
    assert go(tmp_path / "run", values, seed=1)
    assert order(tmp_path / "run") != order(finished)


# ---- precision, adapters, packing ----------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16", "pure-bf16"])
def test_precisions(values, finished, precision, tmp_path):
    run = tmp_path / "run"
    assert go(run, values, precision=precision)
    dtype = torch.float32 if precision == "bf16" else torch.bfloat16
    for name in ("model", "live"):
        assert {x.dtype for x in weights(run / name).values()} == {dtype}
        loaded = AutoModelForCausalLM.from_pretrained(run / name, dtype="auto")
        assert loaded.dtype == dtype
    assert read(run / "paceline.json")["dtype"] == "float32"
    assert not same(weights(run / "model"), weights(run / "live"))
    losses = [[row["eval_loss"] for row in lines(r) if "eval_loss" in row] for r in (run, finished)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.03)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft
def test_adapters_of_low_rank(values, finished, tmp_path):
    """Only adapters are trained and returned; both load upon the model they are of."""
    run = tmp_path / "run"
    base = str(finished / "model")
    changes = {"model": base, "config": None, "tokenizer": None, "lora_rank": 2, "seed": 1}
    assert go(run, values, **changes)
    states = {}
    for name in ("model", "live"):
        assert read(run / name / "adapter_config.json")["r"] == 2
        states[name] = load_file(run / name / "adapter_model.safetensors")
        assert all("lora_" in key for key in states[name])
        assert AutoModelForCausalLM.from_pretrained(run / name).num_parameters() > 0
        assert not [p for p in (run / name).iterdir() if p.suffix in (".bin", ".pt", ".pth")]
    assert not same(states["model"], states["live"])
    evaluations = [row["eval_loss"] for row in lines(run) if "eval_loss" in row]
    last = [row["eval_loss"] for row in lines(finished) if "eval_loss" in row][-1]
    assert evaluations[0] == pytest.approx(last, rel=1e-5)  # it starts as the model it is of
    assert evaluations[-1] < evaluations[0]
    head = yaml.safe_load((run / "model" / "README.md").read_text().split("---")[1])
    assert head["base_model"] == base


@pytest.mark.parametrize("family", FAMILIES)
def test_packing_puts_several_into_one_and_keeps_them_apart(values, family, tmp_path):
    short = write_jsonl(tmp_path / "short.jsonl", [row[:2] for row in conversations(40, 3)])
    changes = {"config": FAMILIES[family], "context": 64, "packing": True, "data": (str(short),)}
    trainer = build(Recipe(**{**values, **changes}), tmp_path)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    assert len(starts) > 2
    assert batch["labels"][0].ne(-100).any()
    model = trainer.model.eval()
    with torch.no_grad():
        packed = model(**{k: x for k, x in batch.items() if k != "labels"}).logits[0]
        for start, end in zip(starts, [*starts[1:], len(packed)], strict=True):
            alone = model(batch["input_ids"][:, start:end]).logits[0]
            assert float((packed[start:end] - alone).abs().max()) < 1e-5


def test_packed_runs_see_all_in_fewer_steps(values, finished, tmp_path):
    changes = {"context": 64, "packing": True, "steps": None, "epochs": 1.0}
    assert go(tmp_path / "run", values, **changes)
    assert go(tmp_path / "micro", values, **changes, micro_batch=1)
    assert order(tmp_path / "run") == order(tmp_path / "micro")
    assert apart(weights(tmp_path / "run" / "live"), weights(tmp_path / "micro" / "live")) < 5e-6
    rows = [row for row in lines(tmp_path / "run") if "eval_loss" in row]
    assert rows[-1]["step"] < SEQUENCES // 4
    assert rows[-1]["eval_loss"] < rows[0]["eval_loss"]
    assert not same(weights(tmp_path / "run" / "model"), weights(tmp_path / "run" / "live"))


# ---- how long ------------------------------------------------------------------------------------


def steps_of(values, tmp_path, **changes):
    recipe = Recipe(**{**values, "steps": None, **changes})
    trainer = build(recipe, tmp_path)
    return trainer.args.max_steps, trainer


def test_epochs_and_tokens_are_numbers_of_steps(values, tmp_path):
    steps, trainer = steps_of(values, tmp_path)
    assert steps == SEQUENCES // 4
    lengths = [len(ids) for ids in trainer.train_dataset["input_ids"]]
    assert max(lengths) == 32 > min(lengths)
    assert steps_of(values, tmp_path, epochs=0.5)[0] == SEQUENCES // 8
    assert steps_of(values, tmp_path, epochs=2.3)[0] == math.ceil(2.3 * SEQUENCES / 4)
    steps, trainer = steps_of(values, tmp_path, batch=5, epochs=2.0)  # each leaves out the same few
    assert steps == 2 * (SEQUENCES // 5)
    assert len(trainer.train_dataset) == SEQUENCES // 5 * 5
    per_step = 4 * sum(lengths) / len(lengths)
    assert steps_of(values, tmp_path, tokens=3.0 * sum(lengths))[0] == 3 * SEQUENCES // 4
    assert steps_of(values, tmp_path, tokens=2.5 * per_step)[0] == 3


def write_texts(path, count):
    rows = [{"text": " ".join(m["content"] for m in row)} for row in conversations(count, 2)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(("tokens", "steps"), [(128, 1), (129, 2), (1280, 10), (1e6, 7813)])
def test_tokens_of_text_are_full_sequences(values, tmp_path, tokens, steps):
    texts = write_texts(tmp_path / "texts.jsonl", 200)
    changes = {"task": "pretrain", "data": (str(texts),), "eval_data": None, "tokens": tokens}
    got, trainer = steps_of(values, tmp_path, **changes)
    assert got == steps
    assert {len(ids) for ids in trainer.train_dataset["input_ids"]} == {32}


@pytest.mark.parametrize("warmup", [0.5, 6.0])
def test_warmup_is_a_share_or_a_number_of_steps(values, warmup, tmp_path):
    recorder = Recorder()
    assert go(tmp_path / "run", values, recorder, warmup=warmup, evaluations=1)
    assert recorder.rates == pytest.approx([1e-2 * min(1, t / 6) for t in range(STEPS)])


# ---- going on ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "family"), [(3, "llama"), (7, "llama"), (10, "gpt2")], ids=["evaluated", "odd", "drop"]
)
def test_stopped_and_resumed_as_if_not(
    values, finished, step, family, tmp_path, capsys, monkeypatch
):
    """With GPT-2's dropout too, which draws random numbers at each step."""
    whole, run = finished, tmp_path / "run"
    recipe = write_recipe(tmp_path / "recipe.yaml", values, config=FAMILIES[family])
    if family != "llama":
        whole = tmp_path / "whole"
        assert main(["train", str(recipe), "--out", str(whole)]) == 0
    with monkeypatch.context() as patch:
        at_step(patch, step, interrupt)
        before = signal.getsignal(signal.SIGINT)
        assert main(["train", str(recipe), "--out", str(run)]) == 130
        assert signal.getsignal(signal.SIGINT) is before
    said = capsys.readouterr().out
    assert f"Stopped at step {step + 1} of {STEPS}" in said
    assert f"paceline train --resume {run}" in said
    assert checkpoints(run)[-1] == step + 1
    assert not (run / "model").exists()
    assert nothing_half_written(run)
    assert go_on(run) == 0
    assert f"Going on from checkpoint-{step + 1}" in capsys.readouterr().out
    assert_ended_alike(whole, run)
    assert read(run / "manifest.json")["resumed"][0]["from"] == f"checkpoint-{step + 1}"


def test_a_second_signal_ends_at_once(values, tmp_path, monkeypatch, capsys):
    recipe = write_recipe(tmp_path / "recipe.yaml", values)

    def twice():
        interrupt()
        interrupt()

    at_step(monkeypatch, 5, twice)
    assert main(["train", str(recipe), "--out", str(tmp_path / "run")]) == 130
    assert "interrupted" in one_line(capsys)
    assert checkpoints(tmp_path / "run") == [3]


def test_killed_between_the_last_checkpoint_and_the_models(finished, copied, monkeypatch):
    for name in ("model", "live"):
        shutil.rmtree(copied / name)
    (copied / "live").mkdir()  # it was about to be replaced
    at_step(monkeypatch, STEPS, lambda: pytest.fail("a step more"))
    assert go_on(copied) == 0
    assert_ended_alike(finished, copied)


def test_killed_before_the_first_checkpoint_starts_anew(finished, values, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def kill():
        raise Killed

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_step(patch, 2, kill)
        with pytest.raises(Killed):
            go(run, values)
    assert lines(run)
    assert go_on(run) == 0
    assert_ended_alike(finished, run)


def test_a_finished_run_says_so(finished, capsys, monkeypatch):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*")}
    assert go_on(finished) == 0
    assert "is finished" in capsys.readouterr().out.replace("\n", " ")
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*")} == before


def unfinished(run):
    """As if it had been killed at step 9."""
    for folder in (run / "model", run / "live", run / "checkpoints" / f"checkpoint-{STEPS}"):
        shutil.rmtree(folder)


def test_goes_on_with_what_may_change(finished, copied):
    unfinished(copied)
    assert go_on(copied, "--micro-batch", "2", "--save-every", "2", "--keep-checkpoints", "5") == 0
    assert checkpoints(copied) == [9, 10, 12]
    assert order(copied) == order(finished)
    for name in ("live", "model"):
        assert apart(weights(copied / name), weights(finished / name)) < 5e-6
    facts = read(copied / "manifest.json")
    assert facts["recipe"]["micro_batch"] is None
    assert facts["resumed"][0]["from"] == "checkpoint-9"
    assert Recipe(**yaml.safe_load((copied / "recipe.yaml").read_text())).micro_batch == 2


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--lr", "1e-3"], ["lr: a run goes on as it began", "micro_batch"]),
        (["--steps", "24"], ["steps: a run goes on as it began"]),
        (["--out", "elsewhere"], ["resume: a run goes on in its own folder"]),
    ],
    ids=["lr", "steps", "out"],
)
def test_does_not_go_on_with_what_may_not(copied, arguments, parts, capsys):
    unfinished(copied)
    assert go_on(copied, *arguments) == 2
    one_line(capsys, *parts)
    assert checkpoints(copied) == [9]
    assert not (copied / "model").exists()


def test_does_not_go_on_with_other_data(values, tmp_path, capsys):
    data, run = tmp_path / "data.jsonl", tmp_path / "run"
    write_jsonl(data, conversations(SEQUENCES, 0))
    assert go(run, values, data=(str(data),))
    unfinished(run)
    rows = conversations(SEQUENCES, 0)
    rows[-1][0]["content"] += " no"
    write_jsonl(data, rows)
    assert go_on(run) == 2
    one_line(capsys, "data: it is not what the run began with")
    assert not (run / "model").exists()


def test_no_run_and_no_empty_folder(values, tmp_path, capsys):
    assert go_on(tmp_path) == 2
    one_line(capsys, "no folder of a run", str(tmp_path))
    assert go_on(tmp_path / "nowhere") == 2
    one_line(capsys, "no folder of a run")
    recipe = write_recipe(tmp_path / "recipe.yaml", values)
    assert main(["train", str(recipe), "--out", str(tmp_path)]) == 2
    one_line(capsys, "not an empty folder", "--resume")
    assert main(["train", str(recipe), "--out", str(recipe)]) == 2
    one_line(capsys, "not an empty folder")
    assert sorted(tmp_path.iterdir()) == [recipe]


# ---- what cannot be done -------------------------------------------------------------------------


def raises(error):
    def fail(*_, **__):
        raise error

    return fail


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"),
    ],
    ids=["device", "cpu"],
)
def test_out_of_memory_is_one_line(values, error, tmp_path, capsys, monkeypatch):
    recipe, run = write_recipe(tmp_path / "recipe.yaml", values), tmp_path / "run"
    at_step(monkeypatch, 4, raises(error))
    assert main(["train", str(recipe), "--out", str(run)]) == 2
    one_line(capsys, "out of memory", "--micro-batch", "--gradient-checkpointing")
    assert checkpoints(run) == [3]
    assert nothing_half_written(run)


def test_other_errors_are_not_taken_for_that(values, tmp_path, monkeypatch):
    at_step(monkeypatch, 1, raises(RuntimeError("shapes do not match")))
    with pytest.raises(RuntimeError, match="shapes"):
        go(tmp_path / "run", values)


def test_full_disk_in_a_checkpoint(finished, values, tmp_path, capsys, monkeypatch):
    recipe, run = write_recipe(tmp_path / "recipe.yaml", values), tmp_path / "run"
    with monkeypatch.context() as patch:
        full = raises(OSError(28, "No space left on device"))
        at_step(patch, 4, lambda: patch.setattr(torch, "save", full))
        assert main(["train", str(recipe), "--out", str(run)]) == 2
    one_line(capsys, f"cannot write to {run}: No space left", f"paceline train --resume {run}")
    assert checkpoints(run) == [3]
    assert nothing_half_written(run)
    assert go_on(run) == 0
    assert_ended_alike(finished, run)


@pytest.mark.parametrize("limit", [100_000, 200_000], ids=["model", "optimizer"])
def test_files_that_cannot_grow(values, limit, tmp_path, capsys, monkeypatch):
    """By the system's limit of a file's size, which is met as a full disk is."""
    recipe, run = write_recipe(tmp_path / "recipe.yaml", values), tmp_path / "run"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        at_step(monkeypatch, 4, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard)))
        assert main(["train", str(recipe), "--out", str(run)]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    one_line(capsys, f"cannot write to {run}: ", f"paceline train --resume {run}")
    assert checkpoints(run) == [3]
    assert nothing_half_written(run)


@pytest.mark.parametrize("save", ["save_live_model", "save_model"])
def test_full_disk_at_the_end(finished, copied, save, capsys, monkeypatch):
    """In writing the models: the last checkpoint is there, and enough."""
    for name in ("model", "live"):
        shutil.rmtree(copied / name)
    with monkeypatch.context() as patch:
        full = raises(OSError(28, "No space left on device"))
        patch.setattr(RunTrainer, save, full)
        assert go_on(copied) == 2
    one_line(capsys, "No space left", f"paceline train --resume {copied}")
    assert not (copied / "model").exists()
    assert nothing_half_written(copied)
    assert go_on(copied) == 0
    assert_ended_alike(finished, copied)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"batch": 100}, [f"batch: 100 sequences a step are more than the {SEQUENCES}"]),
        ({"context": 65}, ["context: 65 tokens are more than the model's 64"]),
        ({"fsdp": True}, ["fsdp: ", "torchrun"]),
        ({"micro_batch": 3}, ["micro_batch: 3 does not divide the batch of 4"]),
        ({"warmup": 12.0}, ["warmup: 12 steps leave nothing of 12"]),
    ],
    ids=lambda x: next(iter(x)),
)
def test_what_does_not_go_together_is_one_line(values, changes, parts, tmp_path, capsys):
    recipe = write_recipe(tmp_path / "recipe.yaml", values, **changes)
    assert main(["train", str(recipe), "--out", str(tmp_path / "run")]) == 2
    one_line(capsys, *parts)
    assert not [p for p in (tmp_path / "run").rglob("*") if p.is_file()]


def test_a_batch_is_split_evenly_among_processes():
    recipe = Recipe(config=LLAMA, tokenizer="bpe", batch=6)
    assert _split_batch(recipe, 2) == (3, 1)
    assert _split_batch(Recipe(config=LLAMA, tokenizer="bpe", batch=8, micro_batch=2), 2) == (2, 2)
    for processes in (4, 12):
        with pytest.raises(InputError, match=f"batch: 6 .* on {processes} processes"):
            _split_batch(recipe, processes)


# ---- the certificate -----------------------------------------------------------------------------


def flip(path, last=False):
    """One bit of the first or last tensor of a file."""
    tensors = load_file(path)
    name = sorted(tensors)[-last]
    tensors[name].view(torch.int32).view(-1)[0] ^= 1
    save_file(tensors, path, metadata={"format": "pt"})


def flip_optimizer(path):
    saved = torch.load(path, weights_only=True)
    saved["state"][0]["exp_avg"].view(torch.int32).view(-1)[0] ^= 1
    torch.save(saved, path)


def change_state(what):
    def change(path):
        state = read(path)
        what(state)
        path.write_text(json.dumps(state))

    return change


def other_order(state):
    state["stateful_callbacks"]["paceline"]["order"] += 1


def other_loss(key):
    def change(state):
        entry = [entry for entry in state["log_history"] if key in entry][1]
        entry[key] = math.nextafter(entry[key], 9)

    return change


LAST = f"checkpoints/checkpoint-{STEPS}"
SPOILT = {
    "live": ("live weights", "live/model.safetensors", flip),
    "model": ("returned model", "model/model.safetensors", flip),
    "model's last": ("returned model", "model/model.safetensors", lambda p: flip(p, last=True)),
    "optimizer": ("optimizer", f"{LAST}/optimizer.pt", flip_optimizer),
    "order": ("data order", f"{LAST}/trainer_state.json", change_state(other_order)),
    "loss": (
        "evaluation losses",
        f"{LAST}/trainer_state.json",
        change_state(other_loss("eval_loss")),
    ),
    "live loss": (
        "evaluation losses",
        f"{LAST}/trainer_state.json",
        change_state(other_loss("eval_live_loss")),
    ),
}


@pytest.mark.parametrize("spoilt", SPOILT)
def test_the_comparison_tells_what_is_not_equal(finished, copied, spoilt):
    assert all(row["equal"] for row in _compare(finished, copied))
    what, path, change = SPOILT[spoilt]
    change(copied / path)
    rows = list(_compare(finished, copied))
    assert [row["what"] for row in rows if not row["equal"]] == [what]
    assert all(bool(row["drift"]) for row in rows if row["what"] == what)


def test_the_comparison_tells_what_is_missing_or_of_another_kind(finished, copied):
    tensors = weights(copied / "live")
    first, *_ = tensors
    save_file({k: x for k, x in tensors.items() if k != first}, copied / "live/model.safetensors")
    tensors = weights(copied / "model")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].double()
    save_file(tensors, copied / "model/model.safetensors")
    rows = {row["what"]: row for row in _compare(finished, copied)}
    assert not rows["live weights"]["equal"]
    assert not rows["returned model"]["equal"]
    assert rows["optimizer"]["equal"]


def launch(*arguments, processes=1, module="paceline"):
    several = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    where = [module] if module.endswith(".py") else ["-m", module]
    command = [sys.executable, "-m", *(several if processes > 1 else []), *where, *arguments]
    if processes == 1:
        command.remove("-m")
    done = subprocess.run(
        [str(word) for word in command],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_verify_resume_kills_and_certifies(values, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    recipe, out = write_recipe(tmp_path / "recipe.yaml", values), tmp_path / "out"
    assert main(["verify-resume", str(recipe), "--kills", "3", "--out", str(out)]) == 0
    assert capsys.readouterr().out.count("bit for bit equal") == 5
    certificate = read(out / "certificate.json")
    assert certificate["passed"]
    assert [row["what"] for row in certificate["rows"]] == [
        *("live weights", "returned model", "optimizer", "data order", "evaluation losses")
    ]
    assert all(row["equal"] for row in certificate["rows"])
    assert [kill["at"] for kill in certificate["kills"]] == ["evaluation", "save", "step"]
    begun = read(out / "killed" / "manifest.json")["resumed"]
    assert len(begun) == 3  # so each kill happened, and before the end
    assert begun[-1]["from"] == certificate["kills"][-1]["resumed from"]
    assert_ended_alike(out / "whole", out / "killed")


@pytest.mark.slow
def test_verify_resume_at_another_number_of_processes(values, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    recipe, out = write_recipe(tmp_path / "recipe.yaml", values), tmp_path / "out"
    options = ["--kills", "1", "--resume-processes", "2", "--out", str(out)]
    assert main(["verify-resume", str(recipe), *options]) == 0
    assert "of the norm apart" in capsys.readouterr().out
    certificate = read(out / "certificate.json")
    assert certificate["processes"] == [1, 2]
    assert read(out / "killed" / "manifest.json")["resumed"][-1]["processes"] == 2
    near(out / "killed", out / "whole")


# ---- several processes ---------------------------------------------------------------------------


def near(run, other):
    """As far apart as two orders of summation are."""
    assert order(run) == order(other)
    for name in ("live", "model"):
        assert apart(weights(run / name), weights(other / name)) < 1e-5
    for mine, theirs in zip(lines(run), lines(other), strict=True):
        for key in theirs.keys() & {"loss", "eval_loss", "eval_live_loss"}:
            assert mine[key] == pytest.approx(theirs[key], rel=1e-4)


@pytest.mark.slow
def test_two_processes_train_as_one(values, finished, tmp_path):
    recipe, run = write_recipe(tmp_path / "recipe.yaml", values), tmp_path / "run"
    said = launch("train", recipe, "--out", run, processes=2)
    assert said.count("The model: ") == 1  # one speaks
    near(run, finished)
    assert read(run / "manifest.json")["processes"] == 2
    unfinished(run)
    assert go_on(run) == 0  # on one
    near(run, finished)
    assert nothing_half_written(run)


@pytest.mark.slow
def test_sharded_over_two_processes(values, finished, tmp_path):
    recipe, run = write_recipe(tmp_path / "recipe.yaml", values), tmp_path / "run"
    script = str(Path(__file__).with_name("fsdp_on_cpu.py"))
    launch("train", recipe, "--out", run, "--fsdp", processes=2, module=script)
    near(run, finished)
    for step in (9, 12):
        averaged = weights(run / "checkpoints" / f"checkpoint-{step}")
        usual = weights(finished / "checkpoints" / f"checkpoint-{step}")
        assert apart(averaged, usual) < 1e-5
    assert same(weights(run / "checkpoints" / f"checkpoint-{STEPS}"), weights(run / "model"))
    again = shutil.copytree(run, tmp_path / "again")
    unfinished(again)
    launch("train", "--resume", again, processes=2, module=script)
    for name in ("live", "model"):
        assert same(weights(again / name), weights(run / name))
    near(again, run)
    assert evaluated(again) == evaluated(run)


# ---- what comes with the package -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["demo-sft", "demo-pretrain"])
def test_the_demos_run(name, tmp_path):
    few = ["--steps", "4", "--examples", "64", "--eval-examples", "8", "--report-to", "tensorboard"]
    run = tmp_path / "run"
    assert main(["train", name, "--out", str(run), *few]) == 0
    rows = [row for row in lines(run) if "eval_loss" in row]
    assert rows[-1]["step"] == 4
    assert rows[-1]["eval_live_loss"] < rows[0]["eval_live_loss"]
    assert list((run / "tensorboard").iterdir())
    assert AutoModelForCausalLM.from_pretrained(run / "model").num_parameters() > 0
