"""`paceline compare`: from its options to its report."""

import dataclasses
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

from comparing import OTHER, TEXT, loss_by_hand, method_of, pretrained, tiny_runs
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from paceline.cli import main
from paceline.study import runs
from paceline.study.compare import Comparison, Setting, _affordable_steps
from paceline.study.runs import Run, threads_each
from paceline.sums import find_damage
from paceline.train.data import make_tokenizer, read_corpus, tokenize
from paceline.train.folder import locked


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_runs(tmp_path_factory)


@pytest.fixture(autouse=True, scope="module")
def workers():
    """Workers of comparisons in this process are forks of one that has imported all."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["paceline.study.compare"])
    parent = multiprocessing.parent_process
    with pytest.MonkeyPatch.context() as patch:
        own = SimpleNamespace(get_context=lambda kind: context, parent_process=parent)
        patch.setattr(runs, "multiprocessing", own)
        yield


@pytest.fixture
def cache():
    return Path(os.environ["PACELINE_CACHE"])


SMALL = [
    *("--from-scratch", "--width", "16", "--layers", "1", "--heads", "2", "--vocabulary", "300"),
    *("--steps", "12", "--eval-tokens", "512", "--evaluations", "2", "--context", "16"),
    *("--warmup", "2"),
]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.md"
    path.write_text(TEXT)
    return str(path)


def test_half_lives_of_the_comparisons_data():
    """4 sequences of 32 tokens a step, in three texts."""
    texts = ("ema:half_life=1280 tokens", "ema:half_life=40 samples", "ema:half_life=20")
    methods = [Comparison(methods=(text,), lr=(1e-3,)).compared for text in texts]
    assert [[method.half_life for method in own] for own in methods] == [[10.0], [10.0], [20.0]]


def one_line(text):
    return " ".join(text.split())


@pytest.mark.slow
def test_compare_from_start_to_report(text, tmp_path, capsys):
    out = tmp_path / "out"
    status = main(
        [
            *("compare", *SMALL, "--text", text, "--out", str(out), "--lr", "1e-2,2e-2"),
            *("--methods", "ema,schedule-free:lr=5e-3,pace", "--seeds", "0,1,2"),
        ]
    )
    assert status == 0
    said = capsys.readouterr().out
    assert "±" in said
    assert "schedule-free was run at one rate, 0.005, so its best is not known." in one_line(said)
    assert "No best was found for ema" in said  # two rates are two ends
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 15 * 3
    assert {(r["name"], r["seed"]) for r in rows} == {
        (name, seed) for name in ("ema", "schedule-free", "pace") for seed in range(3)
    }
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["configuration"]["seeds"] == [0, 1, 2]
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["steps"] == 12
    assert manifest["text"] == text
    assert manifest["pretrain_text"] is None
    page = (out / "report.html").read_text()
    assert "<svg" in page
    assert page.count("<svg") == 5  # over the rate, one a rate, their legend
    assert "15 of 15 runs" in page
    assert " of 3 seeds" in page
    assert page.count(' best">') == 3  # one a rate
    assert not any(f'{attribute}="http' in page for attribute in ("src", "href"))  # offline
    for name in ("curves.png", "rates.png"):
        assert (out / name).read_bytes()[:4] == b"\x89PNG"
    assert ">ema kappa=0.7<" in (out / "rates.svg").read_text()
    assert list(out.glob("tensorboard/pace*/events*"))
    model = next(out.glob("models/pace-*-lr0.01-seed0"))
    final = [r for r in rows if r["run"] == model.name][-1]
    tokens = load_file(
        tokenize(read_corpus([Path(text)], 10**9), AutoTokenizer.from_pretrained(model))
    )
    loaded = AutoModelForCausalLM.from_pretrained(model)
    assert loss_by_hand(loaded, tokens) == pytest.approx(final["returned_loss"], rel=1e-4)
    # the same again: nothing is overwritten
    assert main(["compare", *SMALL, "--text", text, "--out", str(out)]) == 2
    assert "is not an empty folder" in capsys.readouterr().err


@pytest.mark.slow
def test_pretraining_is_done_once_shared_and_not_taken_if_damaged(text, tmp_path, capsys, cache):
    earlier = tmp_path / "earlier.txt"
    earlier.write_text(OTHER)
    options = [o for o in SMALL if o != "--from-scratch"]
    options += ["--pretrain-steps", "20", "--pretrain-text", str(earlier), "--text", text]
    options += ["--methods", "adamw,ema", "--lr", "1e-2", "--workers", "1"]
    starts = set(cache.glob("start-*"))
    assert main(["compare", *options, "--out", str(tmp_path / "a")]) == 0
    assert "Pretraining a GPT-2" in capsys.readouterr().out
    assert len(set(cache.glob("start-*")) - starts) == 1
    assert main(["compare", *options, "--minutes", "60", "--out", str(tmp_path / "b")]) == 0
    said = capsys.readouterr().out
    assert "Pretraining a GPT-2" not in said
    a, b = (
        [json.loads(x) for x in (tmp_path / n / "metrics.jsonl").read_text().splitlines()]
        for n in "ab"
    )
    for x, y in zip(a, b, strict=True):  # and a comparison repeats itself
        assert x["returned_loss"] == y["returned_loss"]
    (folder,) = set(cache.glob("start-*")) - starts
    start = AutoModelForCausalLM.from_pretrained(folder)
    tokens = load_file(
        tokenize(
            read_corpus([Path(text)], 10**9),
            AutoTokenizer.from_pretrained(next(tmp_path.glob("a/models/*"))),
        )
    )
    for r in a:
        if r["step"] == 0:
            assert r["live_loss"] == pytest.approx(loss_by_hand(start, tokens), rel=1e-4)

    # a damaged one is refused, and what to do is said
    assert find_damage(tmp_path / "a/models/adamw, lr 0.01") is None
    (folder / "config.json").write_text("{}")
    assert main(["compare", *options, "--out", str(tmp_path / "c")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"paceline: start: {folder}/config.json is damaged: ")
    assert f"; delete {folder}, and it is made again" in said


def test_a_pretraining_that_was_killed_goes_on_exactly(tmp_path, monkeypatch):
    monkeypatch.setenv("PACELINE_CACHE", "")  # which `pretrained` sets
    whole, said, saves = pretrained(tmp_path / "whole")
    assert said.startswith("Pretraining a GPT-2 of ")
    assert saves == 4
    killed = multiprocessing.get_context("forkserver").Process(
        target=pretrained, args=(tmp_path / "killed", 3)
    )
    killed.start()
    killed.join(120)
    assert killed.exitcode == -signal.SIGKILL
    assert not [*(tmp_path / "killed").glob("start-*/model.safetensors")]
    again, said, saves = pretrained(tmp_path / "killed")
    assert said.startswith("Going on with the pretraining of a GPT-2 of ")
    assert "checkpoint-15" in said
    assert saves == 1
    assert [path.name for path in again.parent.glob("*start-*")] == [whole.name]
    one, other = (load_file(start / "model.safetensors") for start in (whole, again))
    assert all(torch.equal(one[name], other[name]) for name in one)


def interrupted(options, out, ready, seconds=0):
    """Ctrl-C to a comparison once it is ready, and some seconds later; what it said."""
    process = subprocess.Popen(
        [sys.executable, "-m", "paceline", "compare", *SMALL, *options, "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # even under nohup
    )
    deadline = time.monotonic() + 120
    while process.poll() is None and not ready(out / "metrics.jsonl"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to parent and workers alike
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "Interrupted: " in said
    return said


@pytest.mark.slow
def test_ctrl_c_reports_what_is_finished(text, tmp_path):
    options = ["--methods", "ema,pace", "--seeds", "0,1,2,3,4,5,6,7,8,9", "--workers", "1"]
    options += ["--text", text, "--steps", "300", "--lr", "1e-2"]
    out = tmp_path / "out"
    said = interrupted(options, out, lambda x: x.exists() and x.stat().st_size)
    finished = int(re.search(r"Interrupted: (\d+) of 20 runs were finished", said)[1])
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert 1 <= finished < 20
    assert {r["step"] for r in rows} == {0, 150, 300}  # whole runs only
    assert len(rows) == 3 * finished
    assert "Interrupted" in (out / "report.html").read_text()
    assert json.loads((out / "manifest.json").read_text())["interrupted"] is True


def test_ctrl_c_while_the_workers_start(text, tmp_path):
    options = ["--text", text, "--workers", "1"]
    assert "Failed" not in interrupted(options, tmp_path / "out", Path.exists, seconds=1)


def test_a_run_that_fails_does_not_stop_the_others(text, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.chdir(tmp_path)
    (out / "tensorboard").mkdir(parents=True)
    blocked = out / "tensorboard" / "adamw-wsd-lr0.01-seed0"
    options = [*SMALL, "--text", text, "--methods", "adamw:wsd,ema", "--lr", "1e-2"]
    options += ["--workers", "1"]

    def block(folder):  # a file where the run's folder must be
        blocked.write_text("")

    monkeypatch.setattr("paceline.study.compare.folders.require_empty", block)
    assert main(["compare", *options, "--out", str(out)]) == 1
    said = capsys.readouterr().out
    assert "Failed: adamw-wsd-lr0.01-seed0: " in said
    assert "ema" in said
    assert "adamw-wsd-lr0.01-seed0" in json.loads((out / "manifest.json").read_text())["failed"]
    assert "Failed: adamw-wsd-lr0.01-seed0" in (out / "report.html").read_text()
    assert not list(out.glob("rates.*"))  # one rate makes no picture


def test_a_time_budget_shortens_all_runs_alike(tiny, tmp_path):
    tokens, _ = tiny
    save_file(tokens, tmp_path / "tokens")
    setting = Setting(
        start=None,
        tokens=tmp_path / "tokens",
        tokenizer=make_tokenizer([TEXT, OTHER], 300),
        shape={"width": 16, "layers": 1, "heads": 2, "positions": 16},
        recipe={
            **{"batch": 2, "context": 16, "warmup": 2, "weight_decay": 0.1},
            **{"max_grad_norm": 1.0, "eval_tokens": 512},
        },
        steps=10**7,
        evaluations=2,
    )
    runs = [Run((method_of("pace"),), seed) for seed in range(4)]
    steps = [_affordable_steps(setting, runs, minutes, 2, 1) for minutes in (1, 30)]
    assert 1 <= steps[0] < steps[1] / 5  # noisy machines: the true ratio is about 40
    assert steps[1] < 10**7
    assert _affordable_steps(dataclasses.replace(setting, steps=50), runs, 30, 2, 1) == 50


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "nowhere.txt"], "no such file or folder: nowhere.txt"),
        (["--text", "x" * 300], "no such file or folder: xxx"),
        (["--text"], "text: give at least one"),
        (["--pretrain-text", "EMPTY"], "there is no pretraining with --from-scratch"),
        (["--out", "EMPTY/x", "--text", "LONG"], "out: cannot make the folder EMPTY/x"),
        (["--out", "LONG", "--text", "LONG"], "out: LONG is not an empty folder"),
        (["--seeds", "5000000000"], "seeds: must be less than"),
        (["--steps", "25", "--warmup", "20"], "warmup: 20 steps are too many for a run of 25"),
        (["--methods", "adamw,adamw:pullback=5"], "has no option 'pullback'"),
        (["--text", "EMPTY"], "the text is empty"),
        (["--text", "SHORT"], "the text is too short"),
        (["--context", "65"], "context: 65 tokens are more than the model's 64 positions"),
        (["--methods", "sgd"], "unknown method 'sgd'"),
        (["--methods", "ema,ema"], "methods: give at least one, and each only once"),
        (["--methods", "ema,ema:kappa=0.7"], "are the same run"),
        (["--methods", "ema,ema:state=fp32"], "are the same run"),
        (
            ["--methods", "pace:kappa=0.3,pace:kappa=0.30000001"],
            "are the same run",
        ),  # in the same folder
        (["--lr", "0.01,0.0100000001"], "are the same run"),
        (
            ["--methods", "adamw,ema", "--pullback", "3"],
            "pullback: adamw, ema have their own, or none",
        ),
        (
            ["--methods", "pace:kappa=0.3,ema:kappa=0.7", "--kappa", "1"],
            "kappa: ema:kappa=0.7, pace:ka",
        ),
        (["--twin-gain", "0.5"], "twin_gain: adamw:cosine, ema, ema:power"),
        (["--kapa", "0.3"], "Unrecognized options: --kapa, 0.3; did you mean --kappa?"),
        (["--gain", "1"], "gain goes into the method, as in --methods pace:gain=scalar"),
        (["--kappa", "1.5"], "kappa: must be less than or equal to 1, got 1.5"),
        (["--kappa", "much"], "kappa: must be a valid number"),
        (["--pullback", "-1"], "pullback: must be greater than or equal to 0"),
        (["--lr", "1e-3,0"], "lr: must be greater than 0"),
        (["--seeds", "0,x"], "seeds: .*'x'"),
        (["--steps", "0"], "steps: "),
        (["--width", "63"], "width: 63 is not a multiple of 2 heads"),
        (["--schedule", "linear"], "linear"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").write_text("\n")
    (tmp_path / "SHORT").write_text("too short")
    (tmp_path / "LONG").write_text(TEXT)
    assert main(["compare", "--from-scratch", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("paceline: ")
    assert re.search(message.replace("(", r"\("), error), error
    assert not (tmp_path / "runs").exists()


def test_one_comparison_at_a_time_writes_a_folder(text, tmp_path, capsys):
    out = tmp_path / "out"
    with locked(out):
        assert main(["compare", *SMALL, "--text", text, "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"paceline: out: {out} is in use by process {os.getpid()} on ")


@pytest.mark.parametrize(
    ("cores", "own", "workers", "threads"), [(8, 8, 2, 4), (8, 1, 2, 1), (8, 4, 1, 4), (2, 2, 3, 1)]
)
def test_threads_of_workers(cores, own, workers, threads, monkeypatch):
    monkeypatch.setattr("paceline.study.runs.cores", lambda: cores)
    monkeypatch.setattr(torch, "get_num_threads", lambda: own)
    assert threads_each(workers) == threads
