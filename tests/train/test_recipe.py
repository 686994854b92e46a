"""Recipes: those that are shipped, their YAML and their values."""

import datetime
import math
import re
from pathlib import Path

import pytest
import yaml

pytest.importorskip("transformers")

import torch
from recipes import shipped_recipe
from transformers import GPT2Config, GPT2LMHeadModel

from paceline.averaging import EMA, PowerEMA
from paceline.cli import _parse, main
from paceline.options import EXCHANGE
from paceline.train import InputError, sources
from paceline.train.methods import BASES
from paceline.train.recipe import Recipe, RecipeCommand, read_recipe, shipped
from paceline.train.run import Train, note_on_batch

pytestmark = pytest.mark.usefixtures("folder")

# What a recipe needs at least.
LEAST = {"model": "somewhere/model"}

NEW = {"config": {"model_type": "llama"}, "tokenizer": "bpe"}


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


def test_what_is_shipped_is_what_is_said():
    assert set(shipped()) == SHIPPED
    (told,) = re.findall(
        r"one of the shipped: (.*?)\.'", str(RecipeCommand.model_fields["recipe"].metadata)
    )
    assert set(told.split(", ")) == SHIPPED


@pytest.mark.parametrize("name", PAPER)
def test_recipes_of_the_paper(name):
    recipe = shipped_recipe(name)
    assert (recipe.model, recipe.lr, recipe.pullback, recipe.kappa) == PAPER[name]
    assert (recipe.task, recipe.method, recipe.schedule) == ("sft", "pace", "constant")
    assert recipe.context == 1280
    assert (recipe.batch, recipe.micro_batch) == (128, 32)
    assert (recipe.epochs, recipe.steps, recipe.tokens) == (1, None, None)
    assert (recipe.warmup, recipe.packing, recipe.lora_rank) == (0, False, 0)
    assert recipe.data == ("HuggingFaceTB/smol-smoltalk",)
    assert recipe.split != recipe.eval_split
    assert not recipe.from_scratch
    assert recipe.parsed.get("pullback") == recipe.pullback
    assert recipe.parsed.kappa == recipe.kappa
    assert recipe.parsed.schedule == "constant"


def test_gpt2_has_twenty_tokens_a_parameter():
    recipe = shipped_recipe("gpt2-124m")
    with torch.device("meta"):
        parameters = GPT2LMHeadModel(GPT2Config()).num_parameters()
    assert recipe.tokens == pytest.approx(20 * parameters, rel=0.01)
    assert 2e-3 <= recipe.pullback <= 3e-3
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
    (folder / "mine.yaml").write_text(
        yaml.safe_dump({**NEW, "lr": 0.5, "pullback": 7, "epochs": 3})
    )
    arguments = [
        "--pullback",
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
    assert (values["lr"], values["pullback"], values["betas"]) == (0.5, 0.01, [0.8, 0.95])
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


def test_a_date_is_read_back(folder):
    for given in ("2026-11-29", "'2026-11-29'"):
        (folder / "mine.yaml").write_text(f"model: x\ndate: {given}\n")
        recipe = Recipe(**read_recipe("mine.yaml"))
        assert recipe.date == datetime.date(2026, 11, 29)
        (folder / "mine.yaml").write_text(recipe.to_yaml())
        assert Recipe(**read_recipe("mine.yaml")) == recipe


def test_one_name_needs_no_brackets(folder):
    (folder / "mine.yaml").write_text("model: x\ndata: a.jsonl\neval_data: b,c\n")
    recipe = Recipe(**read_recipe("mine.yaml"))
    assert (recipe.data, recipe.eval_data) == (("a.jsonl",), ("b", "c"))


def bomb(levels):
    """YAML of a few lines that stands for 9 ** levels values."""
    lists = (f"l{i + 1}: &l{i + 1} [{', '.join([f'*l{i}'] * 9)}]" for i in range(levels))
    return "\n".join(["l0: &l0 [x]", *lists]).encode()


def merging(levels):
    lists = bomb(levels) + b"\n"
    return lists.replace(b"[x]", b"{x: 1}").replace(b"[*", b"{<<: [*").replace(b"]\n", b"]}\n")


def test_aliases_are_good_in_measure(folder):
    (folder / "mine.yaml").write_text("model: &a x\ntokenizer: *a\ndata: [*a, *a]\n")
    assert read_recipe("mine.yaml") == {"model": "x", "tokenizer": "x", "data": ["x", "x"]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model: x\nlearing_rate: 1\n", "unknown key 'learing_rate'; did you mean 'lr'"),
        (b"model: x\ngain: scalar\n", "'gain'; gain goes .*pace:gain=scalar:pullback=1$"),
        (b"model: x\nreturn_kappa: 0.7\n", "goes .* --method pace:return_kappa=0.7$"),
        (b"model: x\nxyz: 1\n", r"unknown key 'xyz'; the nearest of \d+: \w+, \w+, \w+$"),
        (b"model: x\nmicrobatch: 1\n", "unknown key 'microbatch'; did you mean 'micro_batch'?"),
        (b"model: x\nLR: 1\n", "bad.yaml: unknown key 'LR'; did you mean 'lr'"),
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
            "give a config with the model_type of a new one",
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
        (bomb(9), "bad.yaml is not YAML: it has more than 100,000 values"),
        (merging(9), "bad.yaml is not YAML: it has more than 100,000 values"),
        (b"config: &a {b: *a}\n", "bad.yaml is not YAML: .* or a part that holds itself"),
        (b"data: &a [*a]\n", "bad.yaml is not YAML: .* or a part that holds itself"),
        (b"config: &a {<<: *a}\n", "bad.yaml is not YAML: .* or a part that holds itself"),
        (b"packing: !!bool x\n", "bad.yaml is not YAML: "),
        (b"lr: !!int ''\n", "bad.yaml is not YAML: "),
        (b"config: {? {a: b}: c}\n", "bad.yaml is not YAML: .*unhashable"),
        (b"seed: " + b"1" * 5000, "bad.yaml is not YAML: Exceeds the limit"),
        (
            b"#" * 1_000_001,
            "cannot read the recipe bad.yaml: it has more than 1,000,000 characters",
        ),
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
        (".", ". is a folder and no recipe; give it by --data or --model"),
        (
            "run1",
            "run1 is a folder .* by --model to start .*, by --resume to go on, or run1/recipe",
        ),
        ("my.jsonl", "my.jsonl is data; give it by --data$"),
        ("missing.parquet", "missing.parquet is data; give it by --data$"),
        ("list.json", "list.json is data; give it by --data$"),
        ("lines.json", "lines.json is data; give it by --data$"),
        ("/dev/zero", "cannot read the recipe /dev/zero: it has more than 1,000,000 characters"),
        ("file/x", "cannot read the recipe file/x: Not a directory"),
        ("x" * 300, "cannot read the recipe xxx.*: File name too long"),
    ],
)
@pytest.mark.parametrize("command", ["train", "data"])
def test_no_such_recipe(command, name, message, folder, refused):
    (folder / "file").touch()
    (folder / "run1").mkdir()
    (folder / "run1" / "recipe.yaml").touch()
    (folder / "my.jsonl").write_text(2 * '{"messages": []}\n')
    (folder / "lines.json").write_text(2 * '{"messages": []}\n')
    (folder / "list.json").write_text("[{}]")
    assert re.search(message.replace("?", r"\?"), refused(command, name))


def test_a_recipe_may_be_json(folder):
    (folder / "mine.json").write_text('{"lr": 1}')
    assert read_recipe("mine.json") == {"lr": 1}


def test_the_folder_of_a_run_stands_for_its_model(folder):
    """In the recipe and on the command line; what has a configuration is a model."""
    (folder / "run1" / "model").mkdir(parents=True)
    (folder / "run1" / "recipe.yaml").touch()
    (folder / "run1" / "checkpoints" / "checkpoint-9").mkdir(parents=True)
    for key in ("model", "tokenizer"):
        refusal = f"{key}: run1 is not finished; .*--resume run1 .* or take run1/.*checkpoint-9$"
        with pytest.raises(InputError, match=refusal):
            Recipe(**LEAST | {key: "run1"})
    (folder / "run1" / "model" / "paceline.json").touch()
    for key in ("model", "tokenizer"):
        assert getattr(Recipe(**LEAST | {key: "run1"}), key) == "run1/model"
    (folder / "run1" / "config.json").touch()
    assert Recipe(**LEAST | {"model": "run1"}).model == "run1"


def test_a_recipe_that_may_not_be_read(monkeypatch, refused):
    def forbidden(self, **_):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", forbidden)
    assert refused("train", "x.yaml") == "cannot read the recipe x.yaml: Permission denied"


# ---- values ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"task": "rl"}, "task: must be 'sft' or 'pretrain', got 'rl'"),
        (
            {"batch": True},
            "batch: expected a value that is not true or false, got True",
        ),  # in YAML: yes
        ({"pullback": False}, "pullback: expected a value that is not true or false, got False"),
        ({"model": 3}, "model: must be a valid string, got 3"),
        ({"model": None}, "model: give one, or give a config with the model"),
        ({"config": "gpt2"}, "config: must be a valid dictionary"),
        ({"vocabulary": 10**12}, "vocabulary: .*less than or equal to 1048576"),
        ({"date": "yesterday"}, "date: must be a valid date"),
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
        ({"method": "pullback"}, "method 'pullback': unknown optimizer ''"),
        ({"method": "pace:kappa=2"}, "method 'pace:kappa=2': kappa: .*less than or equal to 1"),
        ({"lr": 0}, "lr: must be greater than 0, got 0"),
        ({"lr": "much"}, "lr: must be a valid number.*got 'much'"),
        ({"lr": math.nan}, "lr: must be a finite number"),
        ({"lr": math.inf}, "lr: must be a finite number"),
        ({"lr": None}, "lr: "),
        ({"schedule": "linear"}, "schedule: .* known: constant, cosine, power, twin, wsd$"),
        ({"schedule": "cosin"}, "schedule: unknown schedule 'cosin'; did you mean 'cosine'"),
        ({"pullback": -0.1}, "pullback: must be greater than or equal to 0"),
        ({"kappa": 1.1}, "kappa: must be less than or equal to 1"),
        ({"kappa": -0.1}, "kappa: "),
        ({"twin_gain": 0}, "twin_gain: "),
        ({"betas": [0.9, 1.0]}, "betas: must be less than 1, got 1.0"),
        ({"betas": [0.9]}, "betas: "),
        ({"weight_decay": -1}, "weight_decay: "),
        ({"max_grad_norm": -1}, "max_grad_norm: "),
        ({"warmup": -0.1}, "warmup: "),
        ({"batch": 0}, "batch: "),
        ({"batch": 1.5}, "batch: must be a valid integer"),
        ({"micro_batch": 0}, "micro_batch: "),
        ({"steps": 0}, "steps: "),
        ({"steps": "2024-01-01"}, "steps: "),
        ({"epochs": 0}, "epochs: "),
        ({"tokens": 0}, "tokens: "),
        ({"seed": -1}, "seed: "),
        ({"seed": 2**32}, "seed: must be less than 4294967296"),
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
        ({"steps": 1, "epochs": 1}, "steps, epochs, tokens: give only one of them"),
        ({"steps": 1, "tokens": 1}, "steps, epochs, tokens: give only one of them"),
        ({"epochs": 1, "tokens": 1}, "steps, epochs, tokens: give only one of them"),
        ({"streaming": True}, "streaming: a stream has no known length; give steps or tokens"),
        ({"streaming": True, "epochs": 1}, "epochs: a stream has no known length"),
        ({"from_scratch": True, "model": None, **NEW}, "from_scratch: it needs a --model"),
        ({"model": None, "config": NEW["config"]}, "tokenizer: a new model needs one"),
        (
            {"task": "pretrain", "packing": True},
            "packing: it is for conversations; text is always packed",
        ),
        ({"lora_rank": 4, "from_scratch": True}, "lora_rank: adapters of random weights"),
        ({"lora_rank": 4, "model": None, **NEW}, "lora_rank: adapters of random weights"),
        ({"average_batch": 0}, "average_batch: "),
        (
            {"average_batch": 32, "method": "bema"},
            "average_batch: bema:kappa=0.5 has no scaling by 4: every=1 over 4 is no whole number",
        ),
        ({"average_batch": 32, "method": "lookahead"}, "average_batch: lookahead has no scaling"),
        (
            {"average_batch": 1, "method": "lawa:window=3:every=2"},
            "average_batch: lawa:window=3:every=2 has no scaling by 128: its 6 steps are within",
        ),
        ({"method": "ema:half_life=4M tokens"}, "half_life: conversations have different numbers"),
        ({"batch": 6, "micro_batch": 4}, "micro_batch: 4 does not divide the batch of 6"),
        ({"batch": 4, "micro_batch": 8}, "micro_batch: 8 does not divide the batch of 4"),
        (
            {"method": "pullback:muon", "betas": [0.8, 0.9]},
            "betas: they do not reach the optimizer in 'pullback:muon'",
        ),
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
        {"pullback": 0, "kappa": 0, "weight_decay": 0, "max_grad_norm": 0, "warmup": 0},
        {"pullback": 20, "warmup": 500, "weight_decay": 2, "max_grad_norm": 50, "epochs": 0.1},
        {"kappa": 1, "twin_gain": 1, "betas": [0, 0]},
        {"vocabulary": 260, "context": 2, "seed": 2**32 - 1},
        {"method": "adamw", "betas": [0.8, 0.9]},
        *({"method": f"pullback:{base}:pullback=2"} for base in BASES),
    ],
)
def test_values_at_their_bounds_are_good(values):
    recipe = Recipe(**LEAST | values)
    assert all(getattr(recipe, k) == (tuple(v) if k == "betas" else v) for k, v in values.items())


def test_half_lives_of_the_recipes_data():
    """128 sequences a step, of 1000 tokens; also where the average is for another batch."""
    given = {"task": "pretrain", "context": 1000, "method": "ema:half_life=4M tokens"}
    recipe = Recipe(**LEAST, **given)
    assert recipe.method == "ema:half_life=4M tokens"
    assert recipe.rules(9) == [EMA(half_life=31.25)]
    assert Recipe(**LEAST, **given, batch=256).rules(9) == [EMA(half_life=15.625)]
    assert Recipe(**LEAST, **given, average_batch=64).rules(9) == [EMA(half_life=31.25)]
    packed = {**given, "task": "sft", "packing": True}
    assert Recipe(**LEAST, **packed).rules(9) == [EMA(half_life=31.25)]
    samples = {"method": "ema:half_life=256 samples"}
    assert Recipe(**LEAST, **samples).rules(9) == [EMA(half_life=2)]


def test_averages_for_another_batch():
    for batch, k in ((32, 4), (512, 0.25)):
        scaled = Recipe(**LEAST, average_batch=batch, method="pace:return_kappa=0.7")
        assert scaled.rules(9) == [PowerEMA(0.3), PowerEMA(0.7).scaled(k)]
        scaled = Recipe(**LEAST, average_batch=batch, method="ema:kappa=0.3")
        assert scaled.rules(9) == [PowerEMA(0.3).scaled(k)]
    assert Recipe(**LEAST, average_batch=32, method="adamw").rules(9) == []


def note(folder, *options, steps=2000, **file):
    """What is said of a recipe's file with these options, in a run of so many steps."""
    (folder / "mine.yaml").write_text(yaml.safe_dump({**LEAST, "task": "pretrain", **file}))
    given = _parse("train", Train, ["mine.yaml", *options])
    return note_on_batch(given, given.plain, steps)


def test_another_batch_than_the_files(folder):
    said = note(folder, "--batch", "512", batch=128, method="ema:kappa=0.3")
    reach = [math.log1p(-w) for w in (4 * (1 + 4 * 2000) ** -0.3, 2001**-0.3)]
    assert said == (
        "batch: 512 sequences in place of the recipe's 128. The average stays ema:kappa=0.3 in "
        "steps, each now 4 times the data; at the end its half-life has "
        f"{reach[0] / reach[1]:.2g} times as much data. --average-batch 128 keeps it the same "
        "function of the data, ema:kappa=0.3:rate=0.0394:start=25.1."
    )
    said = note(folder, "--batch", "32", method="ema:half_life=200")  # the default is 128
    assert "its half-life has 0.25 times as much data" in said
    assert said.endswith("--average-batch 128 keeps it the same function of the data, "
                         "ema:half_life=800.")  # fmt: skip
    said = note(folder, "--batch", "256", method="pace:return_kappa=0.7")
    assert "stays ema:kappa=0.7 in steps" in said
    assert "keeps it the same function of the data, ema:kappa=0.7:rate=0.743:" in said
    said = note(folder, "--batch", "256", method="pace:kappa=0.3")
    assert said.endswith(
        "The average stays ema:kappa=0.3 in steps, each now 2 times the data. A pull toward "
        "a scaled average had a higher loss: docs/averages.md."
    )
    for options, file in (
        (["--average-batch", "32"], {}),
        (["--batch", "256"], {"average_batch": 128}),
    ):
        said = note(folder, *options, method="pace", pullback=0.1, **file)
        assert said.startswith("average_batch: it changes nothing here.")
    assert "half-life" not in note(folder, "--batch", "256", method="swa")
    for method in ("bema", "lookahead"):
        said = note(folder, "--batch", "256", method=method)
        assert f"stays {method}" in said
        assert "cannot be kept the same function of it (average_batch: " in said
        assert "\n" not in said


def test_a_batch_that_was_made_to_fit_is_the_one_that_counts(folder):
    (folder / "mine.yaml").write_text(yaml.safe_dump({**LEAST, "batch": 128}))
    given = _parse("train", Train, ["mine.yaml"])
    assert note_on_batch(given, given.plain, 2000) is None
    fitted = Recipe(**{**given.plain.model_dump(), "batch": 4})
    said = note_on_batch(given, fitted, 2000)
    assert said.startswith("batch: 4 sequences in place of the recipe's 128.")
    assert "each now 0.0312 times the data" in said
    (folder / "mine.yaml").write_text(yaml.safe_dump(LEAST))  # nobody gives one
    given = _parse("train", Train, ["mine.yaml"])
    assert note_on_batch(given, Recipe(**{**given.plain.model_dump(), "batch": 4}), 2000) is None


@pytest.mark.parametrize(
    ("options", "file"),
    [
        ([], {}),
        (["--batch", "128"], {}),
        (["--lr", "0.1"], {"batch": 64}),
        (["--batch", "64", "--average-batch", "128"], {}),
        (["--batch", "64"], {"average_batch": 32}),
        *(
            (["--batch", "384"], {"method": f"ema:half_life=4M {unit}"})
            for unit in ("tokens", "samples")
        ),
        *(
            (["--batch", "384"], {"method": method})
            for method in ("uniform", "adamw", "swa:every=1")
        ),
    ],
)
def test_nothing_is_said_where_the_average_stays(options, file, folder):
    assert note(folder, *options, **file) is None
    assert note(folder, *options, steps=10, **file) is None  # starts are rounded


def test_the_method_gets_what_it_needs_of_the_recipe():
    given = {"lr": 2e-3, "pullback": 0.7, "kappa": 0.4, "twin_gain": 0.3, "schedule": "twin"}
    method = Recipe(**LEAST, **given).parsed
    assert {name: method.get(name) for name in given} == given
    own = Recipe(**LEAST, method="pace:cosine:pullback=3:lr=5e-4", **given).parsed
    assert own.get("pullback") == 3
    assert (own.lr, own.kappa, own.schedule) == (5e-4, 0.4, "cosine")
    assert Recipe(**LEAST, method="adamw", pullback=0.7).parsed.get("pullback") is None


# ---- elastic workers -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "options"),
    [
        (8, {"every": 8}),
        ("8", {"every": 8}),
        ("100:diloco", {"every": 100, "exchange": "diloco"}),
        (
            "20:average:pull=0.5:exchange_dtype=bfloat16",
            {"every": 20, "exchange": "average", "pull": 0.5, "exchange_dtype": "bfloat16"},
        ),
        ("5:pull=0.1", {"every": 5, "pull": 0.1}),
    ],
)
def test_elastic_is_written_as_a_text(text, options):
    assert Recipe(**NEW, pullback=0.1, elastic=text).elastic_options == {**EXCHANGE, **options}
    assert Recipe(**NEW).elastic_options is None


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"elastic": "often"}, "elastic: every must be a whole number of steps >= 1, got 'often'"),
        ({"elastic": "8:gossip"}, "elastic: exchange must be one of easgd, diloco, average"),
        ({"elastic": "8:diloco:outer=1"}, "elastic: unknown option 'outer'; did you mean 'outer_"),
        ({"elastic": "8:diloco:outer_lr=-1"}, "elastic: outer_lr must be a number > 0, got -1"),
        ({"elastic": "8:outer_lr=.7"}, "elastic: outer_lr must be left out with easgd, got 0.7"),
        ({"elastic": "8:diloco:outer_lr=.5:outer_lr=.7"}, "elastic: give outer_lr once, got '8:d"),
        ({"elastic": "8:easgd:exchange=diloco"}, "elastic: give exchange once, got '8:easgd:exch"),
        ({"elastic": "8:every=9"}, "elastic: give every once, got '8:every=9'"),
        ({"elastic": 8, "fsdp": True}, "elastic: each process holds its model alone; leave out fs"),
        ({"elastic": 8, "snapshots": 2}, "elastic: its averages cannot be rebuilt; leave out snap"),
        ({"elastic": 8, "method": "ema"}, "elastic: easgd returns its center, and no average of"),
        ({"elastic": 8}, "elastic: 'pace "),
        ({"elastic": 8, "pullback": "auto"}, "elastic: 'pace "),
        ({"elastic": True}, "elastic: expected a value that is not true or false, got True"),
    ],
)
def test_elastic_that_cannot_be_is_refused(values, says):
    with pytest.raises(InputError, match=f"^{re.escape(says)}"):
        Recipe(**NEW, **values)


def test_elastic_needs_several_processes(folder, refused):
    (folder / "mine.yaml").write_text(
        yaml.safe_dump({**NEW, "steps": 2, "elastic": 8, "method": "adamw"})
    )
    assert refused("train", "mine.yaml", "--out", "run").startswith(
        "elastic: it needs several processes; start them by torchrun"
    )
