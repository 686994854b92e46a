"""`paceline train`: what whole runs of tiny models leave, and which models those are."""

import json
import math
import re

import pytest
import torch
import torch.nn.functional as F
import yaml

pytest.importorskip("transformers")
pytest.importorskip("trl")

from safetensors.torch import load_file
from training import (
    FAMILIES,
    LLAMA,
    SEQUENCES,
    STEPS,
    Recorder,
    apart,
    checkpoints,
    conversations,
    go,
    lines,
    nothing_half_written,
    order,
    read,
    same,
    weights,
    write_jsonl,
    write_recipe,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer

from paceline.averaging import PowerEMA
from paceline.cli import main
from paceline.train import InputError
from paceline.train import run as run_module
from paceline.train.build import _fingerprint, _split_batch, build_trainer
from paceline.train.data import make_tokenizer
from paceline.train.recipe import Recipe

pytestmark = pytest.mark.usefixtures("surroundings")


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
    for name, what in (("model", "returned"), ("live", "live weights after the last step")):
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
    "ema": ("ema:kappa=0.3", power(0.3)),
    "ema:half_life=3": (
        "ema:half_life=3",
        lambda thetas: recursive(thetas, lambda step: 1 - 0.5 ** (1 / 3)),
    ),
    "uniform": ("uniform:start=4", lambda thetas: mean(thetas[5:])),
    "lawa:window=2:every=2": ("lawa:window=2:every=2", lambda thetas: mean([thetas[4], thetas[6]])),
    "bema": ("bema:kappa=0.5", None),
    "schedule-free": (None, None),
    "lookahead": (None, slow),
    "pullback:sgd": ("ema:kappa=0.3", power(0.3)),
    "pace:state=bf16": ("ema:kappa=0.3", power(0.3)),
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
        assert facts["kappa"] == {"ema:kappa=0.3": 0.3, "bema:kappa=0.5": 0.5}.get(rule)
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


def test_an_average_for_another_batch(values, tmp_path, capsys, monkeypatch):
    """Twice the recipe's batch: the note, and the rule that it names."""
    rules = []

    def fit(trainer, *_):
        rules.append(trainer.create_optimizer().param_groups[0]["averaging"])

    monkeypatch.setattr(run_module, "_fit", fit)
    recipe = str(write_recipe(tmp_path / "recipe.yaml", values | {"method": "ema:kappa=0.3"}))
    arguments = ["train", recipe, "--batch", "8", "--out"]
    assert main([*arguments, str(tmp_path / "stays")]) == 130
    (said,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith("batch: "))
    assert said.endswith(
        "--average-batch 4 keeps it the same function of the data, "
        "ema:kappa=0.3:rate=0.198:start=4.54."
    )
    assert main([*arguments, str(tmp_path / "scaled"), "--average-batch", "4"]) == 130
    assert "batch: " not in capsys.readouterr().out
    assert rules == ["ema:kappa=0.3", str(PowerEMA(0.3).scaled(2))]


@pytest.mark.parametrize(
    ("method", "options", "is_said"),
    [
        ("pace", {}, True),
        ("pullback:sgd:gain=scalar:pullback=1", {}, True),
        ("pace", {"lr": 1e-3}, False),  # the recipe gives it
        ("pace", {"--lr": "4e-3"}, False),
        ("pace:lr=4e-3", {}, False),
        ("pace:pullback=1", {}, False),
        ("pace:gain=scalar:pullback=0.5", {}, False),
        ("pace:pullback=auto", {}, False),
        ("ema", {}, False),
    ],
)
def test_the_rate_that_a_saturated_pull_wants(
    method, options, is_said, values, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(run_module, "_fit", lambda *_: None)
    values = {k: x for k, x in values.items() if k not in ("pullback", "kappa", "lr")}
    given = [x for pair in options.items() for x in pair if "--lr" in options]
    values |= {"method": method} | (options if not given else {})
    recipe = str(write_recipe(tmp_path / "recipe.yaml", values))
    main(["train", recipe, "--out", str(tmp_path / "run"), *given])
    said = [
        x for x in capsys.readouterr().out.splitlines() if x.startswith("lr: a gain of 1 wants")
    ]
    assert len(said) == is_said
    assert all("The rate is 0.001." in x for x in said)


def test_losses_of_text_are_means_over_predicted_tokens(values, tmp_path):
    """A step of all sequences has the loss that they have in evaluation: first tokens not in it."""
    texts = (str(write_texts(tmp_path / "texts.jsonl", 20)),)
    changes = {**values, "task": "pretrain", "data": texts, "eval_data": texts, "steps": 1}
    count = len(build_trainer(Recipe(**{**changes, "batch": 1}), tmp_path / "build").train_dataset)
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
    assert facts["rule"] == "ema:kappa=0.3"
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
    for name in ("live", "model"):  # sums in another order, which processors round differently
        assert apart(weights(tmp_path / "run" / name), weights(run / name)) < 2e-5
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
    trainer = build_trainer(Recipe(**{**values, **changes}), tmp_path)
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
    # Sums in another order, which Adam's ratio magnifies where v is small: 6e-6 on some processors.
    # Micro-batches that counted wrongly would be apart by steps of the rate, 1e-3.
    assert apart(weights(tmp_path / "run" / "live"), weights(tmp_path / "micro" / "live")) < 2e-5
    rows = [row for row in lines(tmp_path / "run") if "eval_loss" in row]
    assert rows[-1]["step"] < SEQUENCES // 4
    assert rows[-1]["eval_loss"] < rows[0]["eval_loss"]
    assert not same(weights(tmp_path / "run" / "model"), weights(tmp_path / "run" / "live"))


# ---- how long ------------------------------------------------------------------------------------


def steps_of(values, tmp_path, **changes):
    recipe = Recipe(**{**values, "steps": None, **changes})
    trainer = build_trainer(recipe, tmp_path)
    return trainer.args.max_steps, trainer


def test_epochs_and_tokens_are_numbers_of_steps(values, tmp_path, capfd):
    steps, trainer = steps_of(values, tmp_path)
    assert steps == SEQUENCES // 4
    lengths = [len(ids) for ids in trainer.train_dataset["input_ids"]]
    assert max(lengths) == 32 > min(lengths)
    assert steps_of(values, tmp_path, epochs=0.5)[0] == SEQUENCES // 8
    assert steps_of(values, tmp_path, epochs=2.3)[0] == math.ceil(2.3 * SEQUENCES / 4)
    steps, trainer = steps_of(values, tmp_path, batch=5, epochs=2.0)  # each leaves out the same few
    assert steps == 2 * (SEQUENCES // 5)
    assert len(trainer.train_dataset) == SEQUENCES // 5 * 5
    kept = (
        f"data: kept {SEQUENCES // 5 * 5} of {SEQUENCES} sequences to train on: {SEQUENCES % 5} do"
    )
    assert kept in capfd.readouterr().err
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


# ---- parts of a batch ------------------------------------------------------------------------


def test_a_batch_is_split_evenly_among_processes():
    recipe = Recipe(config=LLAMA, tokenizer="bpe", batch=6)
    assert _split_batch(recipe, 2) == (3, 1)
    assert _split_batch(Recipe(config=LLAMA, tokenizer="bpe", batch=8, micro_batch=2), 2) == (2, 2)
    for processes in (4, 12):
        with pytest.raises(InputError, match=f"batch: 6 .* on {processes} processes"):
            _split_batch(recipe, processes)


# ---- tokenizers and models that cannot be used ---------------------------------------------------


def test_a_slow_tokenizer_is_one_line(values, tmp_path):
    ByT5Tokenizer().save_pretrained(tmp_path / "bytes")
    recipe = Recipe(**{**values, "tokenizer": str(tmp_path / "bytes")})
    with pytest.raises(InputError, match="^tokenizer: it has no fast version"):
        build_trainer(recipe, tmp_path / "run")


@pytest.mark.parametrize("part", ["config", "tokenizer"])
def test_code_of_a_model_is_never_run(values, part, tmp_path, monkeypatch):
    model, ran = tmp_path / "mine", tmp_path / "ran"
    model.mkdir()
    (model / "code.py").write_text(f"open({str(ran)!r}, 'w')\nclass Mine: pass\n")
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "code.Mine"}}
    own = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["code.Mine", None]}}
    (model / "config.json").write_text(json.dumps(config if part == "config" else {}))
    (model / "tokenizer_config.json").write_text(json.dumps(own))
    asked = []
    monkeypatch.setattr("builtins.input", lambda *_: asked.append(1) or "y")
    changes = {"model": str(model), "config": None, "tokenizer": "bpe"}
    if part == "tokenizer":
        changes = {"tokenizer": str(model)}
    name = "model" if part == "config" else "tokenizer"
    with pytest.raises(InputError, match=f"^{name}: .*mine needs code of its own, which is never"):
        build_trainer(Recipe(**{**values, **changes}), tmp_path / "run")
    assert not asked
    assert not ran.exists()


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    "text", [DEEP, DEEP.replace("[", '{"a":'), "[1]", "3", '{"model": 3}', "{"]
)
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer_is_one_line(values, file, text, tmp_path):
    folder = tmp_path / "damaged"
    make_tokenizer(["a"], 260).save_pretrained(folder)
    (folder / file).write_text(text)
    recipe = Recipe(**{**values, "tokenizer": str(folder)})
    with pytest.raises(InputError, match="^tokenizer: .") as error:
        build_trainer(recipe, tmp_path / "run", only_data=True)
    assert "\n" not in str(error.value)
