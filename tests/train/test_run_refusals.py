"""What `paceline train` and `paceline data` say to what they cannot use."""

import io
import re
import time

import pytest
import yaml

pytest.importorskip("transformers")

import datasets
import huggingface_hub
from recipes import contents, shipped_recipe
from rich.console import Console

from paceline import cli
from paceline.cli import main
from paceline.train import run, sources
from paceline.train.recipe import Recipe, read_recipe
from paceline.train.run import Show, Train, show_command, train

pytestmark = pytest.mark.usefixtures("folder")

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


# ---- the command line ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("traim", "unknown command 'traim'; did you mean 'train'?"),
        ("verfy-resume", "unknown command 'verfy-resume'; did you mean 'verify-resume'?"),
        ("nonsense", "unknown command 'nonsense'; the nearest of \\d+: "),
        ("train demo-sft --gain 1", "gain goes into the method, as in --method pace:gain=scalar:"),
        ("train demo-sft --half-life 9", "half_life goes into .* --method ema:half_life=200"),
        ("train demo-sft --learing-rate 1", "did you mean --lr?"),
        ("train", "model: give one, or give a config with the model_type of a new one"),
        ("data", "model: give one"),
        ("train demo-sft --kapa 0.3", "Unrecognized options: --kapa, 0.3; did you mean --kappa?"),
        ("train demo-sft --strem", "Unrecognized options: --strem; did you mean --streaming?"),
        ("train demo-sft --wieght-decay 1", "did you mean --weight-decay?"),
        ("train demo-sft --max-norm 1", "did you mean --max-grad-norm?"),
        ("train demo-sft --nonsense", "Unrecognized options: --nonsense"),
        ("train demo-sft --learning-rate 1", "did you mean --lr?"),
        ("train demo-sft --c 1", "did you mean --pullback?"),
        ("train demo-sft --per-device-train-batch-size 1", "did you mean --micro-batch?"),
        ("train named.yaml", "named.yaml: unknown key 'learning_rate'; did you mean 'lr'?"),
        # options that change nothing
        (
            "train demo-sft --method schedule-free --pullback 3",
            "pullback: schedule-free has",
        ),
        (
            "train demo-sft --method pace:pullback=1 --pullback 2",
            "pullback: pace:pullback=1 has",
        ),
        (
            "train demo-sft --method=ema:half_life=9 --kappa=0.5",
            "kappa: ema:half_life=9 has",
        ),
        (
            "data demo-sft --twin_gain 0.5",
            "twin_gain: pace has its own, or none; leave",
        ),
        ("train demo-sft --method schedule-free --schedule wsd", "schedule: schedule-free has"),
        (
            "train demo-sft --method pace:gain=scalar --pullback 2",
            "is the gain itself, in [0, 1]",
        ),
        ("data demo-sft --shw 3", "did you mean --show?"),
        ("data demo-sft --print", "Unrecognized options: --print"),
        ("data demo-sft --show 0", "show: must be greater than or equal to 1, got 0"),
        ("train demo-sft demo-pretrain", "Unrecognized options: demo-pretrain"),
        ("train demo-sft --lr", "Missing value for argument '--lr'"),
        ("train demo-sft --lr much", "lr: must be a valid number, got 'much'"),
        (
            "train demo-sft --pullback autoo",
            "pullback: must be a valid number or 'auto', got 'autoo'",
        ),
        ("train demo-sft --betas 0.9 x", "betas: must be a valid number, got 'x'"),
        ("train demo-sft --method pase", "unknown method 'pase'; did you mean 'pace'"),
        ("train demo-sft --lr 0", "lr: must be greater than 0"),
        ("train demo-sft --steps 1.5", "steps: must be a valid integer, got '1.5'"),
        ("train demo-sft --betas 0.9", "Missing value for argument '--betas'. Expected 2"),
        ("train demo-sft --task rl", "task: must be 'sft' or 'pretrain', got 'rl'"),
        (
            "train demo-sft --precision fp16",
            "precision: must be 'fp32', 'bf16' or 'pure-bf16', got 'fp16'",
        ),
        ("train demo-sft --config {model_type:", "config: must be a valid dictionary"),
        ("train demo-sft --config 3", "config: must be a valid dictionary"),
        ("train demo-sft --config {model_type:llama}", "model: give one, or give a config"),
        ("train demo-sft --data ,", "data: .*no empty ones"),
        ("train demo-sft --data=", "data: .*no empty ones"),
        ("train demo-sft --epochs 1", "give only one of them; None takes back a recipe's value"),
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
        (
            "train small.yaml --chat-template /dev/zero",
            "chat_template: '/dev/zero' is neither .* it has more than 1,000,000 characters",
        ),
        (
            "train small.yaml --data /dev/zero",
            "data: /dev/zero has other files|/dev/zero is a device",
        ),
        ("train demo-pretrain --data /dev/zero", "/dev/zero is a device or a pipe"),
        ("train small.yaml --config 'x", "config: "),
        ("train small.yaml --model ./missing", "model: no such folder: ./missing"),
        ("train small.yaml --tokenizer a/b/c", "tokenizer: no such folder: a/b/c"),
        ("train small.yaml --tokenizer full", "tokenizer: full: "),
        (
            "train small.yaml --warmup 3",
            "warmup: 3 steps must be fewer than the 3 steps of the run",
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
    (folder / "named.yaml").write_text("learning_rate: 1\n")
    small(folder, "act.yaml", config=TINY | {"hidden_act": "foo"})
    (folder / "long.jsonl").write_text(CONVERSATION.replace("Hello", "Hello " * 99) % 0)
    said = refused(*arguments.split(" "))
    assert re.search(re.sub(r"([?(){}\[\]])", r"\\\1", message), said)


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
        f"{what}: there is no {name!r} here or in the local cache, and {CLOSED} cannot be reached; "
        f"on a machine with a network run hf download {kind}{name} --local-dir FOLDER, copy the "
        f"folder here, and give its path as the {what}"
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
    monkeypatch.setattr(datasets, "load_dataset_builder", missing)
    small(folder)
    assert refused("train", "small.yaml", "--data", "a/b") == (
        "data: 'a/b' is not a file here, and the Hub has no such dataset: "
        "Dataset 'a/b' doesn't exist on the Hub."
    )


# ---- what a recipe trains on -----------------------------------------------------------------


def test_data_shows_what_is_learned_and_writes_nothing(folder, capfd):
    small(folder)
    before = contents(folder)
    assert main(["data", "small.yaml", "--show", "2"]) == 0
    out, error = capfd.readouterr()
    assert error == "paceline: data: 4 of 40 rows are held out to evaluate on\n"
    assert re.findall(r"example (\d): (\d+) tokens, (\d+) of them learned", out)
    assert len(re.findall(r"^example|─ example", out, re.MULTILINE)) == 2
    learned = re.findall("⟦.*?⟧", out, re.DOTALL)
    assert len(learned) == 2
    assert all(re.fullmatch(r"⟦Yes, number \d+\.<\|im_end\|>⟧", text) for text in learned)
    assert "<|im_start|>user\nHello?<|im_end|>" in out
    assert "36 sequences to train on, 4 to evaluate on; 3 steps of 4" in out
    assert contents(folder) == before


def test_data_shows_few_rows_whatever_batch_and_context(folder, capfd):
    small(folder, batch=128, steps=None)
    assert main(["data", "small.yaml", "--show", "2", "--context", "4"]) == 0
    out, error = capfd.readouterr()
    assert len(re.findall(r"⟦Yes, number \d+\.<\|im_end\|>⟧", out)) == 2
    assert "36 sequences to train on, 4 to evaluate on; 9 steps of 4" in out
    assert re.search(r"so --context \d\d is taken\n.*so --batch 4 is taken\n.* data: 4 of", error)


def test_options_that_some_method_takes_are_not_refused(folder):
    for arguments in (
        "--pullback 2",
        "--method ema --kappa 0.5",
        "--method pullback:sgd --kappa 1",
    ):
        assert main(["train", "demo-sft", "--print", *arguments.split()]) == 0


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
