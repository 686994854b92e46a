"""The command line: errors that nothing foresaw, outputs that nobody reads, and no telemetry."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytest.importorskip("transformers")

from paceline import cli
from paceline.cli import main
from paceline.train import InputError, Options, run
from paceline.train.data import make_tokenizer
from paceline.train.recipe import Recipe, read_recipe

pytestmark = pytest.mark.usefixtures("folder")


def shown(monkeypatch, error):
    """Have `paceline data` raise an error."""

    def fail(*_):
        raise error

    monkeypatch.setattr(run, "show_command", fail)


# ---- the last resort -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        KeyError("attention\nmask"),
        RuntimeError("two\nlines"),
        OSError(28, "No space left on device", "some/file"),
        AssertionError(),
        MemoryError(),
        RecursionError("maximum recursion depth exceeded"),
        UnicodeEncodeError("ascii", "κ", 0, 1, "ordinal not in range"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_that_nothing_foresaw_is_one_line_with_its_place(error, monkeypatch, capfd):
    shown(monkeypatch, error)
    assert main(["data", "demo-sft"]) == 1
    out, said = capfd.readouterr()
    assert (out, said.count("\n")) == ("", 1)
    assert said.startswith(f"paceline: {type(error).__name__}: ")
    assert f"({__file__}:" in said
    assert f", from {Path(cli.__file__)}:" in said
    assert said.endswith("; --trace shows the whole trace)\n")


def test_a_panic_of_a_library_in_rust_is_one_line(folder, capfd):
    """A pattern in tokenizer.json that its engine gives up; a panic is no Exception."""
    make_tokenizer(["a b c"] * 9, 300).save_pretrained("model")
    file = folder / "model" / "tokenizer.json"
    values = json.loads(file.read_text())
    pattern = {"Regex": "(?:a|aa)+(?=[^ab])"}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    file.write_text(json.dumps({**values, "pre_tokenizer": split}))
    rows = [{"prompt": f"question {i}", "completion": "a" * 60 + "b"} for i in range(9)]
    (folder / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["data", "demo-sft", "--data", "x.jsonl", "--tokenizer", "model"]) == 1
    said = capfd.readouterr().err
    assert "\npaceline: PanicException: Onig: Regex search error" in f"\n{said}"
    assert "Traceback" not in said


def test_ctrl_c_while_it_starts_is_one_line(monkeypatch, capfd):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_main", interrupted)
    assert main(["data", "demo-sft"]) == 130
    assert capfd.readouterr().err == "paceline: interrupted before there were results\n"


@pytest.mark.parametrize("how", ["option", "variable"])
@pytest.mark.parametrize("error", [KeyError("x"), InputError("of the input")])
def test_the_whole_trace_is_there_for_those_who_ask(how, error, monkeypatch, capfd):
    shown(monkeypatch, error)
    monkeypatch.setenv("PACELINE_TRACE", str(int(how == "variable")))
    status = main(["data", "demo-sft", *(["--trace"] if how == "option" else [])])
    assert status == (2 if isinstance(error, InputError) else 1)
    said = capfd.readouterr().err
    assert said.startswith("Traceback (most recent call last):\n")
    assert f'File "{__file__}", line ' in said
    assert main(["data", "demo-sft"]) == status
    assert ("Traceback" in capfd.readouterr().err) is (how == "variable")


def test_no_character_breaks_the_line(monkeypatch, capfd):
    shown(monkeypatch, InputError("a\r\nb \x1b[2J\0\udcff κ"))
    assert main(["data", "demo-sft"]) == 2
    assert capfd.readouterr().err == "paceline: a b \\x1b[2J\\x00\\udcff κ\n"


# ---- outputs that nobody reads -------------------------------------------------------------------


def test_a_closed_pipe_ends_it_quietly():
    """As of `paceline … | head`."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "paceline"]
    found = subprocess.run(command, stdout=writing, stderr=-1, check=False)
    os.close(writing)
    assert (found.returncode, found.stderr) == (141, b"")


class Closed(io.StringIO):
    """A text file whose reader has gone."""

    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize("arguments", [["train", "demo-sft", "--print"], ["train", "--help"]])
def test_a_closed_pipe_within_a_command(arguments, monkeypatch, capfd):
    output = Closed()
    with Path(os.devnull).open("wb") as descriptor:
        output.fileno = descriptor.fileno
        monkeypatch.setattr(sys, "stdout", output)
        assert main(arguments) == 141
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_an_output_on_a_full_disk_is_one_line():
    with Path("/dev/full").open("wb") as full:
        command = [sys.executable, "-m", "paceline", "--version"]
        found = subprocess.run(command, stdout=full, stderr=-1, check=False, text=True)
    assert found.returncode == 1
    assert found.stderr.startswith("paceline: OSError: [Errno 28] No space left on device (")
    assert found.stderr.count("\n") == 1


# ---- values that cannot be -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "train demo-sft --steps None --epochs 1e308",
            "epochs: must be less than or equal",
        ),
        ("train demo-sft --steps None --epochs 1e7", "epochs: must be less than or equal"),
        (
            "train demo-sft --steps None --tokens 1e308",
            "tokens: must be less than or equal",
        ),
        ("train demo-sft --warmup 1e308", "warmup: must be less than or equal"),
        ("train demo-sft --steps 1" + 400 * "0", "steps: "),
        ("train demo-sft --vocabulary 1000000000000", "vocabulary: must be less than"),
        ("train demo-sft --context 10000000000000", "context: must be less than"),
        ("train demo-sft --loaders 100000", "loaders: must be less than or equal to 256"),
        ("train demo-sft --lora-rank 1000000", "lora_rank: must be less than"),
        ("train demo-sft --examples 10000000000000000000", "examples: must be less than"),
        ("data demo-sft --show 10000000000000000000", "show: must be less than"),
        ("verify-resume demo-sft --processes 100000", "processes: must be less than"),
        ("train demo-sft --report-to none,wandb", "report_to: none goes alone"),
        ("train demo-sft --out a\0b", "out: PosixPath('a\\x00b') has a NUL or a byte that is not"),
        ("train demo-sft --out a\udcffb", "out: PosixPath('a\\udcffb') has a NUL or a byte that"),
        ("train demo-sft --data a\0b", "data: ('a\\x00b',) has a NUL"),
        ("train demo-sft --method a\0b", "method: 'a\\x00b' has a NUL"),
        ("train --resume a\0b", "resume: a\\x00b is no folder of a run"),
        ("train a\0b", "a\\x00b is not YAML: embedded null byte"),
        ("average a\0b --out c", "checkpoints: (PosixPath('a\\x00b'),) has a NUL"),
        ("eval a\0b --tasks x", "model: 'a\\x00b' has a NUL"),
        ("compare --text-mb 1e308", "text_mb: must be less than"),
        ("compare --minutes 1e308", "minutes: must be less than"),
        ("compare --vocabulary 1000000000000", "vocabulary: must be less than"),
        ("compare --out a\0b", "out: PosixPath('a\\x00b') has a NUL"),
        ("sweep a\0b", "sweep: PosixPath('a\\x00b') has a NUL"),
    ],
)
def test_values_out_of_all_range_are_one_line(arguments, message, refused):
    assert message in refused(*arguments.split(" "))


def test_a_nul_within_a_recipe(folder, refused):
    values = read_recipe("demo-sft") | {"config": {"model_type": "lla\0ma"}}
    (folder / "nul.yaml").write_text(yaml.safe_dump(values))
    assert refused("train", "nul.yaml").startswith("config: {'model_type': 'lla\\x00ma'} has")


def test_what_may_be_large():
    Recipe(**read_recipe("demo-sft") | {"steps": 10**12, "eval_examples": 2**53, "loaders": 256})
    with pytest.raises(InputError, match="NUL"):
        Options(anything={"a": [("\0",)]})


@pytest.mark.parametrize("name", ["wandb", "flyte", "clearml"])
def test_a_reporter_that_is_not_installed(name, refused):
    said = refused("train", "demo-sft", "--report-to", f"tensorboard,{name}")
    assert said.startswith(f"report_to: {name}: ")
    assert "to be installed. Run `pip install " in said


# ---- no telemetry --------------------------------------------------------------------------------

NO_SOCKETS = """
import socket, sys, threading, _socket

opened = []

def refuse(*arguments, **_):
    opened.append(arguments)
    raise OSError("a socket")

for name in ("getaddrinfo", "gethostbyname", "create_connection", "socketpair"):
    setattr(socket, name, refuse)
_socket.getaddrinfo = _socket.gethostbyname = refuse
socket.socket.__init__ = socket.socket.connect = socket.socket.connect_ex = refuse

from paceline.cli import main

for command in " ".join(sys.argv[1:]).split(" then "):
    if status := main(command.split()):
        break
for thread in threading.enumerate():  # a queue of telemetry would be emptied in one
    if thread.name.startswith("Thread-"):
        thread.join(5)
print("opened", opened)
sys.exit(status or bool(opened))
"""


@pytest.mark.slow
def test_runs_on_local_data_open_no_socket(folder, tmp_path):
    few = "train demo-sft --steps 1 --warmup 0 --batch 4 --examples 16 --eval-examples 4"
    few += " --vocabulary 300 --out"
    rows = (f'{{"prompt": "Hello?", "completion": "Yes, {i}."}}\n' for i in range(40))
    (folder / "few.jsonl").write_text("".join(rows))
    commands = f"{few} run then {few} another --data few.jsonl"
    found = subprocess.run(
        [sys.executable, "-c", NO_SOCKETS, commands],
        env={**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "datasets")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert "opened []" in found.stdout
    for name in ("run", "another"):
        assert (folder / name / "model" / "paceline.json").is_file()
