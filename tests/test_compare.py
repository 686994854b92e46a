"""The comparison: data, methods, the trainer's two losses, the command and its report."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from paceline import PACE
from paceline.cli import main
from paceline.study.compare import Comparison
from paceline.study.report import Results, verdict
from paceline.train import InputError
from paceline.train.data import (
    Corpus,
    blocks,
    files_below,
    make_tokenizer,
    read_corpus,
    standard_library_files,
    tokenize,
)
from paceline.train.methods import optimizer_and_options, parse_method, scheduler
from paceline.train.model import make_gpt2
from paceline.train.trainer import train
from paceline.update import averaging_weight

DEFAULTS = {"lr": 1e-2, "c": 3.0, "kappa": 0.3, "g": 0.5}
TEXT = "\n".join(f"line {i}: the quick brown fox jumps over {i * i} lazy dogs" for i in range(400))


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.getbasetemp() / "cache"  # one for the session
    monkeypatch.setenv("PACELINE_CACHE", str(folder))
    return folder


# ---- data ------------------------------------------------------------------------------------


def characters(corpus):
    return sum(len(document) for part in corpus for document in part)


def test_corpus_splits_whole_documents_the_same_way_each_time(tmp_path):
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text(f"document {i} " * 20)
    (tmp_path / "copy.txt").write_text("document 3 " * 20)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / ".hidden").write_text("secret")
    files = files_below([tmp_path])
    corpus = read_corpus(files, 10**9)
    assert sorted(corpus.train + corpus.validation) == sorted(
        (f"document {i} " * 20).strip() for i in range(40)
    )
    assert len(corpus.validation) == 4
    assert corpus == read_corpus(files, 10**9)
    assert 1000 < characters(read_corpus(files, 2000)) <= 2000


def test_a_single_document_is_cut_so_that_both_parts_have_text(tmp_path):
    path = tmp_path / "one.md"
    path.write_text(TEXT)
    corpus = read_corpus([path], 10**9)
    assert sum(len(part) for part in corpus) >= 20
    assert characters(corpus) == len(TEXT)
    assert 0.08 < sum(map(len, corpus.validation)) / len(TEXT) < 0.2
    one_line = tmp_path / "line.txt"
    one_line.write_text("x" * 1000)
    assert characters(read_corpus([one_line], 10**9)) == 1000


def test_the_default_text_has_no_tests_in_it():
    files = standard_library_files()
    assert len(files) > 500
    assert not any({"test", "tests", "site-packages"} & set(file.parts) for file in files)


def test_tokens_are_the_text():
    corpus = Corpus(["hello wörld\n", "x"], [TEXT])
    tokenizer = make_tokenizer([TEXT], 300)
    tokens = load_file(tokenize(corpus, tokenizer))
    assert tokenizer.decode(tokens["train"]) == "hello wörld\n<|endoftext|>x<|endoftext|>"
    assert torch.equal(load_file(tokenize(corpus, tokenizer))["train"], tokens["train"])  # cached
    part = blocks(tokens["validation"], 16)
    assert part.shape == (len(tokens["validation"]) // 16, 16)
    assert torch.equal(part.flatten(), tokens["validation"][: part.numel()].long())


# ---- methods ---------------------------------------------------------------------------------


def test_methods_are_written_as_documented():
    method = parse_method("ema:twin:g=0.25:lr=3e-3", DEFAULTS)
    assert (method.name, method.schedule, method.g, method.lr) == ("ema", "twin", 0.25, 3e-3)
    assert method.label == "ema twin g=0.25 κ=0.3"
    assert parse_method("pace", DEFAULTS).label == "pace c=3 κ=0.3"
    assert parse_method("adamw:cosine", DEFAULTS).label == "adamw cosine"


def schedule_of(text, warmup=0, steps=50):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=DEFAULTS["lr"])
    schedule = scheduler(parse_method(text, DEFAULTS), optimizer, warmup, steps)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"] / DEFAULTS["lr"])
        optimizer.step()
        schedule.step()
    return rates


def test_schedules():
    beta = [(1 + t) ** -0.3 for t in range(1, 51)]
    assert schedule_of("adamw:power") == pytest.approx(beta)
    assert schedule_of("adamw:twin") == pytest.approx([b / (b + 0.5) for b in beta])
    assert schedule_of("adamw") == pytest.approx([1.0] * 50)
    wsd = schedule_of("adamw:wsd")
    assert wsd[:41] == pytest.approx([1.0] * 41)
    assert wsd[41:] == pytest.approx([1 - i / 10 for i in range(1, 10)])
    cosine = schedule_of("adamw:cosine")
    assert cosine == sorted(cosine, reverse=True)
    assert cosine[25] == pytest.approx(0.5)
    for name in ("constant", "cosine", "wsd", "power", "twin"):
        warm = schedule_of(f"adamw:{name}", warmup=10)
        assert warm[0] == 0
        assert warm[:8] == sorted(warm[:8])
    assert schedule_of("schedule-free", warmup=10) == [1.0] * 50  # warms up by itself


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pase", "unknown method 'pase'; known: adamw, ema"),
        ("pace:steep", "unknown part 'steep'"),
        ("pace:k=3", "unknown part 'k=3'"),
        ("pace:kappa=1.5", "method 'pace:kappa=1.5': kappa: .*less than or equal to 1"),
        ("ema:lr=0", "lr: .*greater than 0"),
        ("ema:lr=nan", "lr: .*finite"),
        ("schedule-free:cosine", "schedule-free takes no schedule, got 'cosine'"),
    ],
)
def test_bad_methods(text, message):
    with pytest.raises(InputError, match=message):
        parse_method(text, DEFAULTS)


# ---- training --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A corpus's tokens, and a function that trains a fresh tiny model on them."""
    patch = pytest.MonkeyPatch()
    patch.setenv("PACELINE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    tokenizer = make_tokenizer([TEXT], 300)
    tokens = load_file(tokenize(Corpus([TEXT] * 3, [TEXT]), tokenizer))
    patch.undo()

    def run(text, **options):
        model = make_gpt2(tokenizer, width=16, layers=1, heads=2, positions=16, seed=0)
        options = {
            "steps": 12,
            "batch": 2,
            "context": 16,
            "warmup": 2,
            "weight_decay": 0.1,
            "max_grad_norm": 1.0,
            "seed": 3,
            "evaluations": 3,
            "eval_tokens": 512,
            **options,
        }
        folder = tmp_path_factory.mktemp("log")
        return train(model, tokens, parse_method(text, DEFAULTS), folder, **options).trainer

    return tokens, run


def loss_by_hand(model, tokens):
    ids = blocks(tokens["validation"], 16)[:32]
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids, labels=ids).loss.item()


@pytest.mark.parametrize("method", ["adamw", "ema", "schedule-free", "pace"])
def test_both_models_are_scored_and_the_live_one_stays(tiny, method):
    tokens, run = tiny
    trainer = run(method)
    assert [point["step"] for point in trainer.curve] == [0, 4, 8, 12]
    start, end = trainer.curve[0], trainer.curve[-1]
    assert start["live_loss"] == start["returned_loss"]
    assert end["returned_loss"] < start["returned_loss"]
    assert loss_by_hand(trainer.model, tokens) == pytest.approx(end["live_loss"], rel=1e-5)
    assert (end["live_loss"] == end["returned_loss"]) == (method == "adamw")
    optimizer = trainer.optimizer.optimizer
    if isinstance(optimizer, PACE):
        trainer.model.load_state_dict(optimizer.averaged_state_dict(trainer.model))
        returned = loss_by_hand(trainer.model, tokens)
        assert returned == pytest.approx(end["returned_loss"], rel=1e-5)
    assert ("gain_mean" in end) == (method == "pace")


def test_methods_see_the_same_batches_and_watching_changes_nothing(tiny):
    """AdamW and the EMA that only watches it are the same run; another seed is another."""
    _, run = tiny
    adamw, ema = run("adamw"), run("ema")
    live = [point["live_loss"] for point in adamw.curve]
    assert [point["live_loss"] for point in ema.curve] == pytest.approx(live, rel=1e-6)
    assert run("adamw", seed=4).curve[-1]["live_loss"] != pytest.approx(live[-1], rel=1e-6)


def test_the_saved_model_is_the_returned_one(tiny, tmp_path):
    tokens, run = tiny
    trainer = run("pace")
    trainer.save_returned(str(tmp_path))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    returned = trainer.curve[-1]["returned_loss"]
    assert loss_by_hand(saved, tokens) == pytest.approx(returned, rel=1e-5)
    live = trainer.curve[-1]["live_loss"]
    assert loss_by_hand(trainer.model, tokens) == pytest.approx(live, rel=1e-5)


def test_a_stopped_run_says_so(tiny):
    _, run = tiny
    trainer = run("adamw", watch=lambda step, losses: step == 5)
    assert trainer.state.global_step == 5


def test_the_twin_of_a_saturated_pull_is_a_schedule():
    """power and twin use the averaging weight that PACE itself uses."""
    assert schedule_of("adamw:power")[9] == pytest.approx(averaging_weight(10, power=0.3))
    _, options = optimizer_and_options(parse_method("pace", DEFAULTS), 5)
    assert options == {"lr": 1e-2, "pullback": 3.0, "ema_power": 0.3, "track_stats": True}


# ---- the report ------------------------------------------------------------------------------


def row(label, lr, seed, live, returned, **facts):
    facts = {"name": label.split()[0], "schedule": "constant", "kappa": 0.3, "g": 0.5, **facts}
    return {
        "run": f"{label}-{lr}-{seed}",
        "label": label,
        "lr": lr,
        "seed": seed,
        "step": 10,
        "live_loss": live,
        "returned_loss": returned,
        "gain_mean": 0.8,
        "clipped": 0.5,
        **facts,
    }


def test_verdict_says_who_won_by_how_much_over_how_many_seeds():
    rows = [
        row("pace", 0.01, 0, 2.2, 2.0),
        row("pace", 0.01, 1, 2.2, 2.1),
        row("ema", 0.01, 0, 2.4, 2.3),
        row("ema", 0.01, 1, 2.4, 2.2),
        row("adamw", 0.01, 0, None, None),
        row("adamw", 0.01, 1, 2.5, 2.5),
    ]
    sentences = verdict(Results(6, rows).cells())
    assert sentences[0] == (
        "At learning rate 0.01 the best returned model is that of pace, 2.050 nats: 0.200 lower "
        "(-0.300 to -0.100, lower in 2 of 2 seeds) than ema, the next."
    )
    assert "The pull alone makes pace return a model 0.200 lower" in sentences[1]
    assert "gain is 0.80 at the end, 50% of it clipped" in sentences[1]
    assert not any("One seed" in sentence for sentence in sentences)
    one = verdict(Results(2, [r for r in rows if r["seed"] == 0]).cells())
    assert one[0].startswith("At learning rate 0.01 the best returned model is that of pace")
    assert "One seed" in one[-1]
    lost = verdict(Results(2, [row("pace", 1, 0, 3, 3.0), row("ema", 1, 0, 3, 2.5)]).cells())
    assert "that of ema, 2.500 nats: 0.500 lower than pace" in lost[0]
    assert "0.500 higher than ema" in lost[1]


# ---- the command -----------------------------------------------------------------------------

SMALL = [
    *("--from-scratch", "--width", "16", "--layers", "1", "--heads", "2", "--vocabulary", "300"),
    *("--steps", "12", "--eval-tokens", "512", "--evaluations", "2", "--context", "16"),
]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.md"
    path.write_text(TEXT)
    return str(path)


def test_compare_from_start_to_report(text, tmp_path, capsys):
    out = tmp_path / "out"
    status = main(
        [
            *("compare", *SMALL, "--text", text, "--out", str(out), "--lr", "1e-2"),
            *("--methods", "ema,schedule-free,pace", "--seeds", "0,1,2"),
        ]
    )
    assert status == 0
    said = capsys.readouterr().out
    assert "9 of 9" not in said
    assert "±" in said
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 9 * 3
    assert {(r["name"], r["seed"]) for r in rows} == {
        (name, seed) for name in ("ema", "schedule-free", "pace") for seed in range(3)
    }
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["configuration"]["seeds"] == [0, 1, 2]
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["steps"] == 12
    assert len(manifest["data_sha256"]) == 1
    page = (out / "report.html").read_text()
    assert "<svg" in page
    assert "9 of 9 runs" in page
    assert "in 3 of 3 seeds" in page or "in 2 of 3 seeds" in page
    assert not any(f'{attribute}="http' in page for attribute in ("src", "href"))  # offline
    assert (out / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert list(out.glob("tensorboard/pace*/events*"))
    model = next(out.glob("models/pace-*-seed0"))
    final = [r for r in rows if r["run"] == model.name][-1]
    tokens = load_file(
        tokenize(read_corpus([Path(text)], 10**9), AutoTokenizer.from_pretrained(model))
    )
    loaded = AutoModelForCausalLM.from_pretrained(model)
    assert loss_by_hand(loaded, tokens) == pytest.approx(final["returned_loss"], rel=1e-4)
    # the same again: nothing is overwritten
    assert main(["compare", *SMALL, "--text", text, "--out", str(out)]) == 2
    assert "is not an empty folder" in capsys.readouterr().err


def test_pretraining_is_done_once_and_shared(text, tmp_path, capsys, cache):
    options = [o for o in SMALL if o != "--from-scratch"]
    options += ["--pretrain-steps", "10", "--pretrain-text", text, "--text", text]
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
    firsts = {r["live_loss"] for r in a if r["step"] == 0}
    assert len(firsts) == 1  # one start for all


def test_ctrl_c_reports_what_is_finished(text, tmp_path):
    out = tmp_path / "out"
    options = ["--methods", "ema,pace", "--seeds", "0,1,2,3,4,5,6,7,8,9", "--workers", "1"]
    options += ["--text", text, "--out", str(out), "--steps", "300", "--lr", "1e-2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "paceline", "compare", *SMALL, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # even under nohup
    )
    metrics = out / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to parent and workers alike
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Interrupted: " in said
    assert " of 20 runs were finished." in said
    assert "Traceback" not in errors
    assert "Interrupted" in (out / "report.html").read_text()
    assert json.loads((out / "manifest.json").read_text())["interrupted"] is True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "nowhere.txt"], "no such file or folder: nowhere.txt"),
        (["--text", "EMPTY"], "the text is empty"),
        (["--text", "SHORT"], "the text is too short"),
        (["--context", "65"], "context: 65 tokens are more than the model's 64 positions"),
        (["--methods", "sgd"], "unknown method 'sgd'"),
        (["--methods", "ema,ema"], "methods: give at least one, and each only once"),
        (["--methods", "ema,ema:kappa=0.3"], "are the same run"),
        (["--kapa", "0.3"], "Unrecognized options: --kapa, 0.3; did you mean --kappa?"),
        (["--kappa", "1.5"], "kappa: Input should be less than or equal to 1, got 1.5"),
        (["--kappa", "much"], "--kappa"),
        (["--c", "-1"], "c: Input should be greater than or equal to 0"),
        (["--lr", "1e-3,0"], "lr: Input should be greater than 0"),
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
    assert main(["compare", "--from-scratch", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("paceline: ")
    assert re.search(message.replace("(", r"\("), error), error
    assert not (tmp_path / "runs").exists()


def test_every_option_is_explained(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["compare", "--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    for name in Comparison.model_fields:
        assert f"--{name.replace('_', '-')}" in said
