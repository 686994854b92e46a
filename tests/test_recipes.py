"""Recipes, and what `paceline train` and `paceline data` say to what they cannot use."""

import io
import math
import re
import time
from pathlib import Path

import pytest
import yaml

pytest.importorskip("transformers")

import datasets
import huggingface_hub
import torch
from rich.console import Console
from transformers import GPT2Config, GPT2LMHeadModel

from paceline import cli
from paceline.cli import main
from paceline.train import InputError, run, sources
from paceline.train.methods import BASES
from paceline.train.recipe import Recipe, read_recipe, shipped
from paceline.train.run import Show, Train, show_command, train

# What a recipe needs at least.
LEAST = {"model": "somewhere/model"}
NEW = {"config": {"model_type": "llama"}, "tokenizer": "bpe"}
CONVERSATION = '{"prompt": "Hello?", "completion": "Yes, number %d."}\n'
TINY = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty working directory, and a cache of datasets beside it."""
    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    return place


@pytest.fixture
def refused(folder, capfd):
    """Call with the arguments of a command that is refused: what it says, without the name."""

    def call(*arguments):
        before = contents(folder)
        capfd.readouterr()
        assert main(list(arguments)) == 2
        out, error = capfd.readouterr()
        assert out == ""
        assert error.count("\n") == 1, error
        assert error.startswith("paceline: ")
        assert contents(folder) == before
        return error.removeprefix("paceline: ").rstrip("\n")

    return call


def contents(folder):
    return {p: p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def printed(*arguments, capsys):
    """The values that `--print` prints."""
    assert main(["train", *arguments, "--print"]) == 0
    out, error = capsys.readouterr()
    assert error == ""
    return yaml.safe_load(out)


# ---- those that are shipped ------------------------------------------------------------------


PAPER = {  # arXiv 2606.25086: model, learning rate, c, κ
    "smollm2-1.7b": ("HuggingFaceTB/SmolLM2-1.7B", 1e-3, 0.15, 0.2),
    "qwen3-1.7b": ("Qwen/Qwen3-1.7B-Base", 5e-4, 0.25, 0.5),
    "gemma3-1b": ("google/gemma-3-1b-pt", 1e-3, 0.15, 0.5),
    "smollm2-135m": ("HuggingFaceTB/SmolLM2-135M", 5e-3, 0.03, 0.3),
}
OF_FIGURES = {f"tiny-{name}" for name in ("smollm2", "qwen3", "gemma3", "sft", "torch", "gpt2")}
SHIPPED = {*PAPER, *OF_FIGURES, "gpt2-124m", "demo-sft", "demo-pretrain"}


def shipped_recipe(name):
    return Recipe(**read_recipe(name))


def test_what_is_shipped_is_what_is_said():
    assert set(shipped()) == SHIPPED
    (told,) = re.findall(r"one of the shipped: (.*)\.", Path(run.__file__).read_text("utf-8"))
    assert set(told.split(", ")) == SHIPPED


@pytest.mark.parametrize("name", PAPER)
def test_recipes_of_the_paper(name):
    recipe = shipped_recipe(name)
    assert (recipe.model, recipe.lr, recipe.c, recipe.kappa) == PAPER[name]
    assert (recipe.task, recipe.method, recipe.schedule) == ("sft", "pace", "constant")
    assert recipe.context == 1280
    assert (recipe.batch, recipe.micro_batch) == (128, 32)
    assert (recipe.epochs, recipe.steps, recipe.tokens) == (1, None, None)
    assert (recipe.warmup, recipe.packing, recipe.lora_rank) == (0, False, 0)
    assert recipe.data == ("HuggingFaceTB/smol-smoltalk",)
    assert recipe.split != recipe.eval_split
    assert not recipe.from_scratch
    assert recipe.parsed.c == recipe.c
    assert recipe.parsed.kappa == recipe.kappa
    assert recipe.parsed.schedule == "constant"


def test_gpt2_has_twenty_tokens_a_parameter():
    recipe = shipped_recipe("gpt2-124m")
    with torch.device("meta"):
        parameters = GPT2LMHeadModel(GPT2Config()).num_parameters()
    assert recipe.tokens == pytest.approx(20 * parameters, rel=0.01)
    assert 2e-3 <= recipe.c <= 3e-3
    assert (recipe.kappa, recipe.method, recipe.schedule) == (0.5, "pace", "constant")
    assert (recipe.task, recipe.from_scratch, recipe.streaming) == ("pretrain", True, True)
    assert recipe.context == GPT2Config().n_positions


@pytest.mark.parametrize("name", ["demo-sft", "demo-pretrain"])
def test_demos_need_no_network(name):
    recipe = shipped_recipe(name)
    assert set(recipe.data) <= set(sources.BUILT_IN)
    assert (recipe.model, recipe.tokenizer, recipe.eval_data) == (None, "bpe", None)


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_shipped_recipes_are_strict(name, folder, refused):
    text = shipped()[name].read_text(encoding="utf-8")
    (folder / "mine.yaml").write_text(f"{text}\ntypo: 1\n")
    assert "mine.yaml: unknown key 'typo'" in refused("train", "mine.yaml")
    with pytest.raises(InputError, match="unknown key 'lrr'; did you mean 'lr'"):
        Recipe(**read_recipe(name), lrr=1)


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_a_printed_recipe_reads_back_as_the_same(name, folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")  # nothing is wrapped
    assert main(["train", name, "--print"]) == 0
    (folder / "mine.yaml").write_text(capsys.readouterr().out, encoding="utf-8")
    assert list(read_recipe("mine.yaml")) == list(Recipe.model_fields)
    assert Recipe(**read_recipe("mine.yaml")) == shipped_recipe(name)
    assert [p.name for p in folder.iterdir()] == ["mine.yaml"]


# ---- YAML ------------------------------------------------------------------------------------


def test_options_override_the_file(folder, capsys):
    (folder / "mine.yaml").write_text(yaml.safe_dump({**NEW, "lr": 0.5, "c": 7, "epochs": 3}))
    arguments = [
        "--c",
        "1e-2",
        "--betas",
        "0.8",
        "0.95",
        "--data",
        "a,b",
        "--gradient-checkpointing",
    ]
    arguments += ["--config", "{model_type: gpt2, layer_norm_epsilon: 1e-6}", "--epochs", "None"]
    values = printed("mine.yaml", *arguments, "--steps", "9", capsys=capsys)
    assert (values["lr"], values["c"], values["betas"]) == (0.5, 0.01, [0.8, 0.95])
    assert (values["data"], values["gradient_checkpointing"]) == (["a", "b"], True)
    assert (values["epochs"], values["steps"]) == (None, 9)
    assert values["config"] == {"model_type": "gpt2", "layer_norm_epsilon": 1e-6}
    assert values["seed"] == Recipe.model_fields["seed"].default


def test_options_stand_alone(capsys):
    values = printed("--model", "x", "--lr", "1e-4", capsys=capsys)
    assert Recipe(**values) == Recipe(model="x", lr=1e-4)


def test_options_come_before_the_recipe_too(capsys):
    before = printed("--seed", "3", "demo-sft", capsys=capsys)
    assert before == printed("demo-sft", "--seed", "3", capsys=capsys)


def test_what_an_option_is_given_is_no_recipe(capsys):
    expected = printed("--model", "x", capsys=capsys)
    assert printed("--model", "x", "--out", "demo-sft", capsys=capsys) == expected
    named = printed("demo-sft", "--text-column", "x.yaml", capsys=capsys)
    assert named == printed("--text-column", "x.yaml", "demo-sft", capsys=capsys)


@pytest.mark.parametrize("number", ["1e-3", "1E-3", "+1e-3", ".1e-2", "1.e-3", "0.001", "1.0e-03"])
def test_numbers_as_one_writes_them(number, folder):
    text = f"model: x\nlr: {number}\nconfig: {{model_type: gpt2, layer_norm_epsilon: {number}}}\n"
    (folder / "mine.yaml").write_text(text)
    recipe = Recipe(**read_recipe("mine.yaml"))
    assert recipe.lr == 1e-3
    assert recipe.config == {"model_type": "gpt2", "layer_norm_epsilon": 1e-3}


NAMES = [
    "1e-3",
    "1e5",
    "no",
    "null",
    "~",
    "3",
    "a: b",
    "- x",
    "ünï 🦊",
    "#x",
    "'\"",
    " x ",
    "2024-01-01",
]


@pytest.mark.parametrize("name", NAMES)
def test_any_name_is_read_back(name, folder):
    recipe = Recipe(model=name, data=(name, "b"), lr=1e-5, tokens=2.5e9, weight_decay=1e-10)
    (folder / "mine.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    assert Recipe(**read_recipe("mine.yaml")) == recipe
    assert Recipe(**yaml.safe_load(recipe.to_yaml())) == recipe


def test_one_name_needs_no_brackets(folder):
    (folder / "mine.yaml").write_text("model: x\ndata: a.jsonl\neval_data: b,c\n")
    recipe = Recipe(**read_recipe("mine.yaml"))
    assert (recipe.data, recipe.eval_data) == (("a.jsonl",), ("b", "c"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model: x\nlearnin_rate: 1\n", "bad.yaml: unknown key 'learnin_rate'; known: attention,"),
        (b"model: x\nmicrobatch: 1\n", "unknown key 'microbatch'; did you mean 'micro_batch'?"),
        (b"model: x\nLR: 1\n", "bad.yaml: unknown key 'LR'"),
        (b"model: x\nmicro-batch: 1\n", "did you mean 'micro_batch'?"),
        # what is of the command and not of the recipe
        *(
            (b"model: x\n%b: y\n" % k, "unknown key")
            for k in (b"recipe", b"out", b"resume", b"show")
        ),
        (
            b"config: {model_type: llama, hiden_size: 3}\ntokenizer: bpe\n",
            "config: unknown key 'hiden_size'; did you mean 'hidden_size'?",
        ),
        (b"config: {model_type: lama}\ntokenizer: bpe\n", "transformers has no model_type 'lama'"),
        (b"config: {model_type: [a]}\ntokenizer: bpe\n", "no model_type ['a']"),
        (
            b"config: {hidden_size: 3}\ntokenizer: bpe\n",
            "the config of a new one with its model_type",
        ),
        (
            b"config: {model_type: gpt2, n_embd: wide}\ntokenizer: bpe\n",
            "config: .*'n_embd' expected int, got str",
        ),
        (
            b"config: {model_type: llama, hidden_size: 10, num_attention_heads: 3}\n"
            b"tokenizer: bpe\n",
            "config: .*10.* is not a multiple of .*3",
        ),
        (b"model: x\nlr: 1\nlr: 2\n", "bad.yaml is not YAML: 'lr' is given twice"),
        (b"config: {model_type: a, model_type: b}\n", "'model_type' is given twice"),
        (b"a: [1\nb: 2", "bad.yaml is not YAML: .*line 2"),
        (b"\tmodel: x", "bad.yaml is not YAML"),
        (b"model: caf\xe9\n", "bad.yaml is not YAML: .*utf-8"),
        (b"model: caf\x00\n", "bad.yaml is not YAML"),
        (b"model: !!python/object/apply:os.mkdir [owned]\n", "bad.yaml is not YAML"),
        (b"? [a, b]\n: 1\n", "bad.yaml is not"),
        (b"[" * 1100, "bad.yaml is not YAML"),
        (b"", "bad.yaml is not a mapping of keys to values"),
        (b"hello", "bad.yaml is not a mapping"),
        (b"- a\n- b\n", "bad.yaml is not a mapping"),
        (b"1: 2\n", "bad.yaml is not a mapping"),
    ],
)
def test_bad_files(content, message, folder, refused):
    (folder / "bad.yaml").write_bytes(content)
    assert re.search(message.replace("[", r"\["), refused("train", "bad.yaml"))
    assert not (folder / "owned").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("demo-sfft", "unknown recipe 'demo-sfft'; did you mean 'demo-sft'?"),
        ("smollm-135m", "did you mean 'smollm2-135m'?"),
        ("missing.yaml", "unknown recipe 'missing.yaml'; known: demo-pretrain, demo-sft"),
        ("xyz", "known: .*, smollm2-135m, .*or give the path of a YAML file"),
        (".", "cannot read the recipe .: Is a directory"),
        ("file/x", "cannot read the recipe file/x: Not a directory"),
        ("x" * 300, "cannot read the recipe xxx.*: File name too long"),
    ],
)
@pytest.mark.parametrize("command", ["train", "data"])
def test_no_such_recipe(command, name, message, folder, refused):
    (folder / "file").touch()
    assert re.search(message.replace("?", r"\?"), refused(command, name))


def test_a_recipe_that_may_not_be_read(monkeypatch, refused):
    def forbidden(self, **_):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_text", forbidden)
    assert refused("train", "x.yaml") == "cannot read the recipe x.yaml: Permission denied"


# ---- values ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"task": "rl"}, "task: Input should be 'sft' or 'pretrain', got 'rl'"),
        ({"batch": True}, "batch: this is no switch, got True"),  # in YAML: yes
        ({"c": False}, "c: this is no switch, got False"),
        ({"model": 3}, "model: Input should be a valid string, got 3"),
        ({"model": None}, "model: give one, or the config of a new one"),
        ({"config": "gpt2"}, "config: Input should be a valid dictionary"),
        ({"vocabulary": 259}, "vocabulary: .*greater than or equal to 260"),
        ({"data": []}, "data: give at least one name"),
        ({"data": ["a", ""]}, "data: .*no empty ones"),
        ({"data": ""}, "data: .*no empty ones"),
        ({"data": 3}, "data: "),
        ({"eval_data": [""]}, "eval_data: .*no empty ones"),
        ({"eval_examples": 0}, "eval_examples: .*greater than or equal to 1"),
        ({"examples": 0}, "examples: "),
        ({"context": 1}, "context: .*greater than or equal to 2"),
        ({"method": "sgd"}, "unknown method 'sgd'; known: adamw"),
        ({"method": "pace:d=1"}, "method 'pace:d=1' has no option 'd'"),
        ({"method": "pullback"}, "unknown optimizer ''"),
        ({"method": "pace:kappa=2"}, "method 'pace:kappa=2': kappa: .*less than or equal to 1"),
        ({"lr": 0}, "lr: Input should be greater than 0, got 0"),
        ({"lr": "much"}, "lr: Input should be a valid number.*got 'much'"),
        ({"lr": math.nan}, "lr: Input should be a finite number"),
        ({"lr": math.inf}, "lr: Input should be a finite number"),
        ({"lr": None}, "lr: "),
        ({"schedule": "linear"}, "schedule: "),
        ({"c": -0.1}, "c: Input should be greater than or equal to 0"),
        ({"kappa": 1.1}, "kappa: Input should be less than or equal to 1"),
        ({"kappa": -0.1}, "kappa: "),
        ({"g": 0}, "g: "),
        ({"betas": [0.9, 1.0]}, "betas: Input should be less than 1, got 1.0"),
        ({"betas": [0.9]}, "betas: "),
        ({"weight_decay": -1}, "weight_decay: "),
        ({"max_grad_norm": -1}, "max_grad_norm: "),
        ({"warmup": -0.1}, "warmup: "),
        ({"batch": 0}, "batch: "),
        ({"batch": 1.5}, "batch: Input should be a valid integer"),
        ({"micro_batch": 0}, "micro_batch: "),
        ({"steps": 0}, "steps: "),
        ({"steps": "2024-01-01"}, "steps: "),
        ({"epochs": 0}, "epochs: "),
        ({"tokens": 0}, "tokens: "),
        ({"seed": -1}, "seed: "),
        ({"seed": 2**32}, "seed: Input should be less than 4294967296"),
        ({"precision": "fp16"}, "precision: "),
        ({"lora_rank": -1}, "lora_rank: "),
        ({"lora_alpha": 0}, "lora_alpha: "),
        ({"evaluations": 0}, "evaluations: "),
        ({"save_every": 0}, "save_every: "),
        ({"keep_checkpoints": 0}, "keep_checkpoints: "),
        ({"log_every": 0}, "log_every: "),
        ({"loaders": -1}, "loaders: "),
        ({"packing": "perhaps"}, "packing: "),
        # what does not go together
        ({"steps": 1, "epochs": 1}, "steps, epochs, tokens: give one of them"),
        ({"steps": 1, "tokens": 1}, "steps, epochs, tokens: give one of them"),
        ({"epochs": 1, "tokens": 1}, "steps, epochs, tokens: give one of them"),
        ({"streaming": True}, "streaming: a stream has no known length; give steps or tokens"),
        ({"streaming": True, "epochs": 1}, "epochs: a stream has no known length"),
        ({"from_scratch": True, "model": None, **NEW}, "from_scratch: a config without a model"),
        ({"model": None, "config": NEW["config"]}, "tokenizer: a new model needs one"),
        ({"task": "pretrain", "packing": True}, "packing: text is always packed"),
        ({"lora_rank": 4, "from_scratch": True}, "lora_rank: adapters of random weights"),
        ({"lora_rank": 4, "model": None, **NEW}, "lora_rank: adapters of random weights"),
        ({"batch": 6, "micro_batch": 4}, "micro_batch: 4 does not divide the batch of 6"),
        ({"batch": 4, "micro_batch": 8}, "micro_batch: 8 does not divide the batch of 4"),
        ({"method": "pullback:muon", "betas": [0.8, 0.9]}, "betas: pullback:muon has its own"),
    ],
)
def test_bad_values_name_their_key(values, message):
    with pytest.raises(InputError) as error:
        Recipe(**LEAST | values)
    assert re.match(message, str(error.value))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "values",
    [
        {"streaming": True, "steps": 1},
        {"streaming": True, "tokens": 1.0},
        {"task": "pretrain"},
        {"lora_rank": 4},
        {"from_scratch": True},
        {"config": {"resid_pdrop": 0.0}},  # changes of the model's
        {"model": None, **NEW},
        {"model": None, "config": {"model_type": "gpt2", "hidden_size": 96}, "tokenizer": "x"},
        {"batch": 6, "micro_batch": 3},
        {"c": 0, "kappa": 0, "weight_decay": 0, "max_grad_norm": 0, "warmup": 0},
        {"c": 20, "warmup": 500, "weight_decay": 2, "max_grad_norm": 50, "epochs": 0.1},
        {"kappa": 1, "g": 1, "betas": [0, 0]},
        {"vocabulary": 260, "context": 2, "seed": 2**32 - 1},
        {"method": "adamw", "betas": [0.8, 0.9]},
        *({"method": f"pullback:{base}:c=2"} for base in BASES),
    ],
)
def test_values_at_their_bounds_are_good(values):
    recipe = Recipe(**LEAST | values)
    assert all(getattr(recipe, k) == (tuple(v) if k == "betas" else v) for k, v in values.items())


def test_the_method_gets_what_it_needs_of_the_recipe():
    given = {"lr": 2e-3, "c": 0.7, "kappa": 0.4, "g": 0.3, "schedule": "twin"}
    method = Recipe(**LEAST, **given).parsed
    assert {name: getattr(method, name) for name in given} == given
    own = Recipe(**LEAST, method="pace:cosine:c=3:lr=5e-4", **given).parsed
    assert (own.c, own.lr, own.kappa, own.schedule) == (3, 5e-4, 0.4, "cosine")
    assert Recipe(**LEAST, method="adamw", c=0.7).parsed.c is None


# ---- the command line ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("traim", "unknown command 'traim'; did you mean 'train'?"),
        ("verfy-resume", "unknown command 'verfy-resume'; did you mean 'verify-resume'?"),
        ("nonsense", "unknown command 'nonsense'; known: average, bench, "),
        ("train", "model: give one, or the config of a new one with its model_type"),
        ("data", "model: give one"),
        ("train demo-sft --kapa 0.3", "Unrecognized options: --kapa, 0.3; did you mean --kappa?"),
        ("train demo-sft --strem", "Unrecognized options: --strem; did you mean --streaming?"),
        ("train demo-sft --wieght-decay 1", "did you mean --weight-decay?"),
        ("train demo-sft --max-norm 1", "did you mean --max-grad-norm?"),
        ("train demo-sft --nonsense", "Unrecognized options: --nonsense"),
        ("data demo-sft --shw 3", "did you mean --show?"),
        ("data demo-sft --print", "Unrecognized options: --print"),
        ("data demo-sft --show 0", "show: Input should be greater than or equal to 1, got 0"),
        ("train demo-sft demo-pretrain", "Unrecognized options: demo-pretrain"),
        ("train demo-sft --lr", "Missing value for argument '--lr'"),
        ("train demo-sft --lr much", "Error parsing --lr: .*'much'"),
        ("train demo-sft --lr 0", "lr: Input should be greater than 0"),
        ("train demo-sft --steps 1.5", "Error parsing --steps"),
        ("train demo-sft --betas 0.9", "Missing value for argument '--betas'. Expected 2"),
        ("train demo-sft --task rl", "invalid choice 'rl' for argument '--task'"),
        ("train demo-sft --precision fp16", "invalid choice 'fp16'"),
        ("train demo-sft --config {model_type:", "Error parsing --config"),
        ("train demo-sft --config 3", "config: Input should be a valid dictionary"),
        ("train demo-sft --config {model_type:llama}", "model: give one, or the config"),
        ("train demo-sft --data ,", "data: .*no empty ones"),
        ("train demo-sft --data=", "data: .*no empty ones"),
        ("train demo-sft --epochs 1", "give one of them; None takes back a recipe's own"),
        ("train demo-sft --tokenizer None", "tokenizer: a new model needs one"),
        ("train demo-sft --micro-batch 5", "micro_batch: 5 does not divide the batch of 16"),
        ("train demo-sft --fsdp", "fsdp: "),
        ("train demo-sft --data missing.jsonl", "data: no such file or folder: missing.jsonl"),
        (
            "train demo-sft --data python",
            "data: python is the sources of .*this task takes chitchat",
        ),
        ("train demo-pretrain --data chitchat", "this task takes python, torch"),
        ("train demo-sft --data two\nlines.jsonl", "no such file or folder: two lines.jsonl"),
        ("train demo-sft --out file", "out: file is not an empty folder"),
        ("train demo-sft --out full", "out: full is not an empty folder"),
        ("train --resume missing", "resume: missing is no folder of a run"),
        ("train --resume", "Missing value for argument '--resume'"),
        ("train demo-sft --resume full", "resume: full is no folder of a run"),
        # made it as far as the data
        (
            "train small.yaml --chat-template no.jinja",
            "chat_template: 'no.jinja' is neither chatml",
        ),
        ("train small.yaml --chat-template full", "chat_template: 'full' is neither chatml nor a"),
        ("train small.yaml --chat-template latin", "chat_template: "),
        ("train small.yaml --chat-template bad.jinja", "chat_template: Expected an expression"),
        ("train small.yaml --model ./missing", "model: no such folder: ./missing"),
        ("train small.yaml --tokenizer a/b/c", "tokenizer: no such folder: a/b/c"),
        ("train small.yaml --tokenizer full", "tokenizer: full: "),
        ("train small.yaml --context 65", "context: 65 tokens are more than the model's 64"),
        ("train small.yaml --warmup 3", "warmup: 3 steps leave nothing of 3"),
        (
            "train small.yaml --batch 99",
            "batch: 99 sequences a step are more than the 36 there are",
        ),
        ("train small.yaml --attention fast", "model: .*attn_implementation"),
        ("train small.yaml --report-to wandbb", "report_to: .*wandbb"),
        ("train act.yaml", "model: .*foo"),
        ("train small.yaml --eval-data long.jsonl", "data: .*long.jsonl"),
    ],
)
def test_what_cannot_be_used_is_one_line_and_status_2(arguments, message, folder, refused):
    (folder / "file").touch()
    (folder / "full").mkdir()
    (folder / "full" / "x").touch()
    (folder / "latin").write_bytes(b"\xe9")
    (folder / "bad.jinja").write_text("{% for %}")
    small(folder)
    small(folder, "act.yaml", config=TINY | {"hidden_act": "foo"})
    (folder / "long.jsonl").write_text(CONVERSATION.replace("Hello", "Hello " * 99) % 0)
    said = refused(*arguments.split(" "))
    assert re.search(re.sub(r"([?(){}])", r"\\\1", message), said)


def small(folder, name="small.yaml", **changes):
    """A recipe that is built in a second."""
    (folder / "few.jsonl").write_text("".join(CONVERSATION % i for i in range(40)))
    values = {"config": TINY, "tokenizer": "bpe", "vocabulary": 300, "data": ["few.jsonl"]}
    values |= {"context": 32, "batch": 4, "steps": 3, "report_to": ["none"], **changes}
    (folder / name).write_text(yaml.safe_dump(values))


@pytest.mark.parametrize("name", ["x" * 300, "x" * 300 + "/y"])
def test_names_too_long_for_a_file(name, folder, refused, no_hub):
    small(folder)
    for option in ("data", "model", "tokenizer"):
        assert f"{option}: " in refused("train", "small.yaml", f"--{option}", name)


def test_other_processes_are_silent(monkeypatch, capfd):
    monkeypatch.setenv("RANK", "1")
    assert main(["train", "nonsense"]) == 2
    assert capfd.readouterr() == ("", "")


def test_ctrl_c_is_a_line(monkeypatch, capfd):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "show_command", interrupted)
    assert main(["data", "demo-sft"]) == 130
    assert capfd.readouterr() == ("", "paceline: interrupted before there were results\n")


def test_what_is_not_installed_is_a_line(monkeypatch, refused):
    def missing(name):
        raise ModuleNotFoundError("No module named 'trl'")

    monkeypatch.setattr(cli, "import_module", missing)
    said = refused("train", "demo-sft")
    assert said == "No module named 'trl'; pip install 'paceline[train]'"


def test_without_a_command_it_explains_itself(capsys):
    for arguments in ([], ["--help"], ["-h"]):
        assert main(arguments) == 0
        out, error = capsys.readouterr()
        assert error == ""
        assert all(re.search(rf"^  {name} +[a-z]", out, re.MULTILINE) for name in cli.COMMANDS)
    assert main(["--version"]) == 0
    assert re.fullmatch(r"paceline \d+\.\d+.*\n", capsys.readouterr().out)


@pytest.mark.parametrize(("command", "options"), [("train", Train), ("data", Show)])
def test_every_option_is_explained(command, options, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    for name in set(options.model_fields) - {"recipe"}:
        option = {"print_recipe": "print"}.get(name, name).replace("_", "-")
        (entry,) = re.findall(
            rf"^[│ ] --{option}(?![\w-]).*?(?=^[│ ] --|\Z)", said, re.DOTALL | re.MULTILINE
        )
        assert len(re.findall(r"[A-Za-z]{2,}", entry)) > 4, entry


def test_help_shows_what_a_recipe_says(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "smollm2-135m", "--help"])
    assert stop.value.code == 0
    assert "default: 0.005" in capsys.readouterr().out


# ---- names on the Hub ------------------------------------------------------------------------


CLOSED = "http://127.0.0.1:9"


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """No Hub to reach, and nothing cached of it; afterwards all is as it was."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    huggingface_hub.close_session()  # which may know of a proxy
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", CLOSED)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", CLOSED)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    sources.hub_is_there.cache_clear()
    yield
    sources.hub_is_there.cache_clear()
    huggingface_hub.close_session()


@pytest.mark.parametrize(
    ("what", "name", "arguments"),
    [
        ("data", "HuggingFaceTB/smol-smoltalk", ["smollm2-135m"]),
        ("data", "some/dataset", ["small.yaml", "--data", "few.jsonl,some/dataset"]),
        ("data", "dataset", ["small.yaml", "--data", "dataset", "--streaming"]),
        ("data", "some/other", ["small.yaml", "--eval-data", "some/other"]),
        ("model", "HuggingFaceTB/SmolLM2-135M", ["smollm2-135m", "--data", "few.jsonl"]),
        ("model", "gpt2", ["small.yaml", "--model", "gpt2", "--tokenizer", "None"]),
        ("tokenizer", "some/tokenizer", ["small.yaml", "--tokenizer", "some/tokenizer"]),
    ],
)
@pytest.mark.parametrize("command", ["train", "data"])
def test_without_the_hub_it_says_how_to_do_without(
    command, what, name, arguments, folder, refused, no_hub
):
    small(folder)
    began = time.monotonic()
    said = refused(command, *arguments)
    assert time.monotonic() - began < 10
    kind = "--repo-type dataset " if what == "data" else ""
    assert said == (
        f"{what}: cannot reach {CLOSED} for {name!r}, which is not in the local cache either; "
        f"where there is a network, hf download {kind}{name} --local-dir FOLDER, copy the folder "
        f"here, and give --{what} FOLDER"
    )


def test_where_no_hub_is_its_libraries_look_into_their_caches(no_hub):
    assert not sources.hub_is_there()
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    assert datasets.config.HF_HUB_OFFLINE


def test_the_hub_is_asked_once(no_hub, monkeypatch):
    asked = []

    class Session:
        def head(self, url, timeout):
            asked.append((url, timeout))

    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    assert sources.hub_is_there()
    assert sources.hub_is_there()
    assert asked == [(CLOSED, 10)]
    assert not datasets.config.HF_HUB_OFFLINE


def test_a_hub_that_has_no_such_dataset(monkeypatch, folder, refused):
    def missing(*_, **__):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' doesn't exist\non the Hub.")

    monkeypatch.setattr(sources, "hub_is_there", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", missing)
    small(folder)
    assert refused("train", "small.yaml", "--data", "a/b") == (
        "data: 'a/b' is no file here, and the Hub has no such dataset: "
        "Dataset 'a/b' doesn't exist on the Hub."
    )


# ---- what a recipe trains on -----------------------------------------------------------------


def test_data_shows_what_is_learned_and_writes_nothing(folder, capfd):
    small(folder)
    before = contents(folder)
    assert main(["data", "small.yaml", "--show", "2"]) == 0
    out, error = capfd.readouterr()
    assert error == ""
    assert re.findall(r"example (\d): (\d+) tokens, (\d+) of them learned", out)
    assert len(re.findall(r"^example|─ example", out, re.MULTILINE)) == 2
    learned = re.findall("⟦.*?⟧", out, re.DOTALL)
    assert len(learned) == 2
    assert all(re.fullmatch(r"⟦Yes, number \d+\.<\|im_end\|>⟧", text) for text in learned)
    assert "<|im_start|>user\nHello?<|im_end|>" in out
    assert "36 sequences to train on, 4 to evaluate on; 3 steps of 4" in out
    assert contents(folder) == before


def test_data_shows_all_there_is(folder, capfd):
    small(folder)
    assert main(["data", "small.yaml", "--show", "99", "--batch", "36"]) == 0
    assert capfd.readouterr().out.count("⟦") == 36


def test_data_shows_the_same_as_is_called(folder):
    small(folder)
    output = io.StringIO()
    show_command(
        Show(**read_recipe("small.yaml"), show=1), Console(file=output, width=200, no_color=True)
    )
    assert output.getvalue().count("⟦") == 1


def test_printing_trains_nothing(folder):
    output = io.StringIO()
    options = Train(**read_recipe("demo-sft"), recipe="demo-sft", print_recipe=True)
    assert train(options, Console(file=output, width=40)) is None
    assert Recipe(**yaml.safe_load(output.getvalue())) == shipped_recipe("demo-sft")
    assert not list(folder.iterdir())
