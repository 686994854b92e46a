"""The comparison: data, methods, the trainer's two losses, the command and its report."""

import dataclasses
import json
import math
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

from safetensors.torch import load_file, save_file
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from paceline import PACE, Pullback
from paceline.averaging import BEMA, EMA, LAWA, SWA, PowerEMA, Uniform
from paceline.cli import main
from paceline.options import averaging_of, returns_of
from paceline.study.compare import Comparison, Setting, _affordable_steps
from paceline.study.report import Results, best_at, verdict
from paceline.study.runs import Run, share_runs
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
from paceline.train.methods import BASES, OPTIONS, make_optimizer, parse_method, scheduler
from paceline.train.model import make_gpt2
from paceline.train.terminal import show_losses
from paceline.train.trainer import train

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
    # another corpus from the same files never has what this one holds out
    earlier = read_corpus(files, 10**9, held_out=corpus.validation)
    assert sorted(earlier.train + earlier.validation) == sorted(corpus.train)


def test_one_huge_document_does_not_become_the_validation_part(tmp_path):
    for i in range(12):
        (tmp_path / f"{i}.txt").write_text(f"document {i} " * (20 if i else 2000))
    corpus = read_corpus(files_below([tmp_path]), 10**9)
    assert corpus.validation
    assert all(len(document) < 500 for document in corpus.validation)


@pytest.mark.parametrize("count", [1, 5])
def test_of_few_documents_the_last_tenth_is_held_out(tmp_path, count):
    for i in range(count):
        (tmp_path / f"{i}.md").write_text(f"{i}\n{TEXT}")
    corpus = read_corpus(files_below([tmp_path]), 10**9)
    assert len(corpus.train) == len(corpus.validation) == count
    whole = {a + b for a, b in zip(corpus.train, corpus.validation, strict=True)}
    assert whole == {f"{i}\n{TEXT}" for i in range(count)}
    assert all(document.startswith("line") for document in corpus.validation)
    assert 0.09 < sum(map(len, corpus.validation)) / characters(corpus) < 0.16
    assert read_corpus(files_below([tmp_path]), 500).train
    with pytest.raises(InputError, match="empty"):
        read_corpus(files_below([tmp_path]), 10**9, held_out=corpus.validation)


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


def method_of(text):
    return parse_method(text, **DEFAULTS)


def test_methods_are_written_as_documented():
    method = method_of("ema:twin:g=0.25:lr=3e-3")
    assert (method.name, method.schedule, method.g, method.lr) == ("ema", "twin", 0.25, 3e-3)
    assert method.label == "ema twin g=0.25 κ=0.3"
    assert method_of("pace").label == "pace c=3 κ=0.3"
    assert method_of("adamw:cosine").label == "adamw cosine"
    assert method_of("uniform:start=0.25").label == "uniform start=0.25"
    assert method_of("swa:every=5").label == "swa start=0.75 every=5"
    assert method_of("lawa:window=4").label == "lawa every=40 window=4"
    assert method_of("bema:eta=0.4").label == "bema κ=0.5 η=0.4"
    assert method_of("ema:half_life=50").label == "ema half-life=50"
    assert method_of("ema:eps=1e-3").label == "ema κ=0.3 ε=0.001"
    assert method_of("lookahead:alpha=0.8").label == "lookahead k=5 α=0.8"
    assert method_of("pullback:muon:c=1").label == "pullback muon c=1 κ=0.3"
    assert method_of("pullback:sgd:cosine:gain=scalar").label == (
        "pullback sgd cosine c=3 κ=0.3 gain=scalar"
    )


# Every method with every option that it has, and none of them with a default's value.
WRITTEN = [
    *("adamw", "adamw:cosine:lr=3e-5:eps=1e-3", "adamw:twin:kappa=0.7:g=0.1", "adamw:power"),
    *("ema", "ema:wsd:kappa=0.123456789:state=bf16", "ema:half_life=12.5:eps=0.1"),
    *(
        "ema:twin:kappa=1:g=1",
        "uniform:start=0.1:eps=1",
        "uniform:power:start=0",
        "swa:start=0.5:every=7:eps=1",
    ),
    *(
        "lawa:window=3:every=2:eps=1",
        "bema:kappa=0.4:eta=0.1:every=3:eps=1",
        "lookahead:k=7:alpha=0.25",
    ),
    *("schedule-free", "schedule-free:lr=1e30", "pace", "pace:c=0:kappa=0"),
    *("pace:wsd:c=2e-7:every=5:eps=1e-4:state=bf16:return_kappa=0.7", "pace:power:return_kappa=0"),
    *("pace:c=auto", "pace:gain=scalar:c=0.5"),
    *("pullback:muon", "pullback:sgd:cosine:c=1:kappa=0.9:gain=own:return_kappa=0.2"),
]


@pytest.mark.parametrize("text", WRITTEN)
def test_a_method_is_what_its_written_form_says(text):
    method = method_of(text)
    others = {"lr": 9.0, "c": 9.0, "kappa": 0.99, "g": 0.99, "schedule": "wsd"}
    if method.schedule == "constant":  # which has no name there
        others.pop("schedule")
    for one in (method, method.trajectory):
        assert parse_method(one.written, **others) == one
        assert hash(parse_method(one.written, **others)) == hash(one)
        assert parse_method(one.written, **others).label == one.label


def test_every_option_is_written_somewhere():
    given = {(m.name, o) for m in map(method_of, WRITTEN) for o in m.model_dump(exclude_none=True)}
    assert given >= {(name, option) for name, options in OPTIONS.items() for option in options}


def test_what_returns_a_slower_average_shares_the_training():
    texts = ["pace", "pace:return_kappa=0.7", "pace:return_kappa=0.5", "pace:every=2"]
    texts += ["pace:every=2:return_kappa=0.7", "pullback:sgd", "pullback:sgd:return_kappa=0.7"]
    assert [[m.label for m in run.methods] for run in share_runs(map(method_of, texts), (0,))] == [
        ["pace c=3 κ=0.3", "pace c=3 κ=0.3 returned-κ=0.7", "pace c=3 κ=0.3 returned-κ=0.5"],
        ["pace c=3 κ=0.3 every=2", "pace c=3 κ=0.3 every=2 returned-κ=0.7"],
        ["pullback sgd c=3 κ=0.3", "pullback sgd c=3 κ=0.3 returned-κ=0.7"],
    ]


def test_averages_of_methods():
    averages = {
        "ema": PowerEMA(0.3),
        "ema:half_life=50": EMA(half_life=50),
        "uniform:start=0.25": Uniform(50),
        "swa:start=0.1:every=5": SWA(20, 5),
        "lawa:window=4:every=7": LAWA(4, 7),
        "bema:every=3": BEMA(every=3),
        "bema:kappa=0.4:eta=0.1": BEMA(0.4, 0.1),
        "adamw": None,
        "pace": None,  # PACE keeps its own
        "pace:return_kappa=0.7": PowerEMA(0.7),
        "pullback:sgd:return_kappa=0.7": PowerEMA(0.7),
    }
    assert {text: method_of(text).averaging(200) for text in averages} == averages


def test_methods_that_only_watch_share_their_training():
    texts = ["adamw", "ema", "pace", "uniform", "ema:state=bf16", "lawa", "bema", "ema:wsd"]
    texts += ["ema:eps=0.1", "adamw:eps=0.1", "ema:eps=0.01"]
    runs = share_runs(map(method_of, texts), (0,))
    assert [[m.label for m in run.methods] for run in runs[4:]] == [
        ["ema κ=0.3 ε=0.1", "adamw ε=0.1"],  # of another AdamW
        ["ema κ=0.3 ε=0.01"],
    ]
    assert runs[5].name == "ema-kappa0.3-eps0.01-lr0.01-seed0"
    texts = texts[:-3]
    texts += ["ema:twin", "uniform:twin", "uniform:twin:kappa=0.5", "ema:kappa=0.7", "adamw:wsd"]
    runs = share_runs(map(method_of, texts), (0, 1))
    assert [[m.label for m in run.methods] for run in runs[:6]] == [
        ["adamw", "ema κ=0.3", "uniform start=0.75", "lawa every=40 window=10",
         "bema κ=0.5 η=0.2", "ema κ=0.7"],
        ["pace c=3 κ=0.3"],
        ["ema κ=0.3 state=bf16"],
        ["ema wsd κ=0.3", "adamw wsd"],
        ["ema twin g=0.5 κ=0.3", "uniform twin g=0.5 κ=0.3 start=0.75"],
        ["uniform twin g=0.5 κ=0.5 start=0.75"],
    ]  # fmt: skip
    assert [run.seed for run in runs] == [0] * 6 + [1] * 6


def schedule_of(text, warmup=0, steps=50):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=DEFAULTS["lr"])
    schedule = scheduler(method_of(text), optimizer, warmup, steps)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"] / DEFAULTS["lr"])
        optimizer.step()
        schedule.step()
    return rates


def test_schedules():
    beta = [(1 + t) ** -0.3 for t in range(1, 51)]
    assert schedule_of("adamw:power") == pytest.approx(beta)
    assert schedule_of("adamw:twin:g=1") == pytest.approx(beta)
    assert schedule_of("adamw:twin:g=0.5") == pytest.approx([2 * b / (1 + b) for b in beta])
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
        ("pace:steep", "unknown schedule 'steep'"),
        ("pace:k=3", "has no option 'k'; it has .*'c', 'kappa'"),
        ("adamw:c=3", "has no option 'c'"),
        ("adamw:state=bf16", "has no option 'state'"),
        ("schedule-free:eps=0.1", "has no option 'eps'"),
        ("ema:eps=0", "eps: .*greater than 0"),
        ("pace:state=fp8", "state: Input should be 'fp32' or 'bf16', got 'fp8'"),
        ("ema:g=0.5", "has no option 'g'"),
        ("ema:return_kappa=0.7", "has no option 'return_kappa'"),
        ("ema:every=2", "has no option 'every'"),
        ("pullback:sgd:every=2", "has no option 'every'"),
        ("pace:every=0", "every: .*greater than or equal to 1"),
        ("pace:return_kappa=2", "return_kappa: .*less than or equal to 1"),
        ("pace:kappa=1.5", "method 'pace:kappa=1.5': kappa: .*less than or equal to 1"),
        ("ema:lr=0", "lr: .*greater than 0"),
        ("ema:half_life=5:kappa=0.3", "half_life and kappa are two ways"),
        ("ema:twin:half_life=5", "half_life and kappa are two ways"),
        ("ema:half_life=0", "half_life: .*greater than 0"),
        ("uniform:start=1", "start: .*less than 1"),
        ("uniform:kappa=0.3", "has no option 'kappa'; it has .*'start'"),
        ("lawa:window=0", "window: .*greater than or equal to 1"),
        ("lawa:every=1.5", "every: .*integer"),
        ("lookahead:alpha=0", "alpha: .*greater than 0"),
        ("pullback", "unknown optimizer '' in method 'pullback'; pullback:NAME knows sgd, adam"),
        ("pullback:sophiah", "unknown optimizer 'sophiah'"),
        ("pullback:muon:gain=big", "gain: Input should be 'adam', 'own' or 'scalar'"),
        ("ema:lr=nan", "lr: .*finite"),
        ("schedule-free:cosine", "unknown schedule 'cosine' in method .*; known: none"),
    ],
)
def test_bad_methods(text, message):
    with pytest.raises(InputError, match=message):
        method_of(text)


# ---- training --------------------------------------------------------------------------------


OTHER = TEXT[::-1]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Tokens of two different texts, and a function that trains a fresh tiny model on them."""
    patch = pytest.MonkeyPatch()
    patch.setenv("PACELINE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    tokenizer = make_tokenizer([TEXT, OTHER], 300)
    tokens = load_file(tokenize(Corpus([TEXT], [OTHER]), tokenizer))
    patch.undo()

    def run(text, **options):
        model = make_gpt2(tokenizer, width=16, layers=1, heads=2, positions=16, seed=0)
        seen = {True: [], False: []}
        model.register_forward_pre_hook(
            lambda model, _, inputs: seen[model.training].append(inputs["input_ids"].clone()),
            with_kwargs=True,
        )
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
        methods = [method_of(part) for part in text.split(",")]
        trained = train(model, tokens, methods, tmp_path_factory.mktemp("log"), **options)
        trained.trainer.curve = trained.trainer.curves[0]
        return trained, seen

    return tokens, run


def loss_by_hand(model, tokens):
    """Mean over the predicted tokens of 32 blocks from all over the validation part."""
    ids = blocks(tokens["validation"], 16)
    ids = ids[:: max(1, len(ids) // 32)][:32]
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids, labels=ids).loss.item()


@pytest.mark.parametrize(
    "method", ["adamw", "ema", "uniform", "lookahead", "schedule-free", "pace", "pullback:muon"]
)
def test_both_models_are_scored_and_the_live_one_stays(tiny, method):
    tokens, run = tiny
    trained, _ = run(method)
    trainer = trained.trainer
    assert not trained.stopped
    assert [point["step"] for point in trainer.curve] == [0, 4, 8, 12]
    start, end = trainer.curve[0], trainer.curve[-1]
    assert start["live_loss"] == start["returned_loss"]
    assert end["train_loss"] < start["returned_loss"]
    with trainer.live():
        assert loss_by_hand(trainer.model, tokens) == pytest.approx(end["live_loss"], rel=1e-5)
        assert (end["live_loss"] == end["returned_loss"]) == (method == "adamw")
        optimizer = trainer.optimizer.optimizer
        if isinstance(optimizer, PACE):
            trainer.model.load_state_dict(optimizer.averaged_state_dict(trainer.model))
            returned = loss_by_hand(trainer.model, tokens)
            assert returned == pytest.approx(end["returned_loss"], rel=1e-5)
    assert ("gain_mean" in end) == (method in ("pace", "pullback:muon"))


def test_all_methods_train_on_the_same_batches_and_are_scored_on_the_same_text(tiny):
    tokens, run = tiny
    train_blocks, held_out = (blocks(tokens[part], 16) for part in ("train", "validation"))
    rows = {tuple(row.tolist()) for row in train_blocks}
    _, first = run("adamw")
    assert len(first[True]) == 12
    for name in ("ema", "schedule-free", "pace"):
        _, seen = run(name)
        assert all(map(torch.equal, seen[True], first[True]))
    for batch in first[True]:
        assert all(tuple(row.tolist()) in rows for row in batch)
    scored = torch.cat(first[False][: len(first[False]) // 4])  # of four evaluations the first
    assert len(scored) == 32
    assert torch.equal(scored, held_out[:: len(held_out) // 32][:32])
    _, other = run("adamw", seed=4)
    assert not all(map(torch.equal, other[True], first[True]))


def test_watching_changes_nothing(tiny):
    """AdamW and the EMA that only watches it are the same run."""
    _, run = tiny
    live = [point["live_loss"] for point in run("adamw")[0].trainer.curve]
    ema = [point["live_loss"] for point in run("ema")[0].trainer.curve]
    assert ema == pytest.approx(live, rel=1e-6)


def test_read_outs_are_the_averages_of_the_run_that_they_share(tiny):
    """Each as `Pullback` keeps it around the same AdamW, from a run of its own."""
    tokens, run = tiny
    texts = ["adamw", "ema", "uniform", "swa:every=2", "lawa:window=2:every=3", "bema"]
    shared, seen = run(",".join(texts))
    assert len(seen[True]) == 12
    trainer = shared.trainer
    for text, curve in zip(texts[1:], trainer.curves[1:], strict=True):
        alone, _ = run(text)
        assert [p["live_loss"] for p in curve] == [p["live_loss"] for p in trainer.curve]
        assert alone.trainer.curve == curve
        with trainer.returned(method_of(text)):
            loss = loss_by_hand(trainer.model, tokens)
        assert loss == pytest.approx(curve[-1]["returned_loss"], rel=1e-5)
    ends = [curve[-1]["returned_loss"] for curve in trainer.curves]
    assert len(set(ends)) == len(ends)
    assert loss_by_hand(trainer.model, tokens) == pytest.approx(ends[0], rel=1e-5)


def test_a_read_out_is_what_the_optimizer_of_its_average_returns(tiny):
    _, run = tiny
    ema = run("ema")[0].trainer.curve
    pull = run("pullback:adamw:c=0")[0].trainer.curve
    for a, b in zip(ema, pull, strict=True):
        assert a["returned_loss"] == pytest.approx(b["returned_loss"], rel=1e-6)
        assert a["live_loss"] == pytest.approx(b["live_loss"], rel=1e-6)


@pytest.mark.parametrize("base", BASES)
def test_every_base_trains_and_is_pulled(tiny, base):
    _, run = tiny
    rate = {"sgd": 0.3, "shampoo": 0.1, "radam": 0.05}.get(base, 0.01)
    trainer = run(f"pullback:{base}:c=0.1:lr={rate}", warmup=0)[0].trainer
    start, end = trainer.curve[0], trainer.curve[-1]
    assert end["live_loss"] < start["live_loss"]
    assert end["returned_loss"] < start["returned_loss"]
    assert end["returned_loss"] != end["live_loss"]
    assert 0 < end["gain_mean"] <= 1
    groups = trainer.optimizer.param_groups
    assert {group["initial_lr"] for group in groups} == {rate}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.1}
    if base == "muon":  # of width 16: attention and MLP, in and out; not the embeddings, nor biases
        assert sum(len(group["params"]) for group in groups if group["use_muon"]) == 4


def weights_of_each_step(run, text):
    """A trainer, and its live weights after each step, flat, with those at the start."""
    weights = []

    def note(optimizer, *_):
        if not isinstance(optimizer, PACE | Pullback):  # what one of them goes around
            return
        params = [p for group in optimizer.param_groups for p in group["params"]]
        weights.append(torch.cat([p.detach().flatten().double() for p in params]))

    hooks = [
        register_optimizer_step_pre_hook(lambda *of: None if weights else note(*of)),
        register_optimizer_step_post_hook(note),
    ]
    try:
        trainer = run(text)[0].trainer
    finally:
        for hook in hooks:
            hook.remove()
    return trainer, weights


@pytest.mark.parametrize(
    ("texts", "kappa", "every"),
    [
        ("pace,pace:return_kappa=0.7", 0.7, 1),
        ("pullback:adamw,pullback:adamw:return_kappa=0.7", 0.7, 1),
        ("pace:every=5", 0.3, 5),
        ("pace:every=5,pace:every=5:return_kappa=0.7", 0.7, 1),
    ],
)
def test_which_average_is_returned(tiny, texts, kappa, every):
    """By hand, in float64, from the weights after each of 12 steps."""
    tokens, run = tiny
    trainer, weights = weights_of_each_step(run, texts)
    assert len(weights) == 13
    average = weights[0].clone()
    for step in range(every, 13, every):
        average += (1 + step) ** -kappa * (weights[step] - average)
    last = method_of(texts.split(",")[-1])
    with trainer.returned(last):
        params = [p for group in trainer.optimizer.param_groups for p in group["params"]]
        returned = torch.cat([p.detach().flatten().double() for p in params])
        loss = loss_by_hand(trainer.model, tokens)
    torch.testing.assert_close(returned, average, rtol=1e-4, atol=1e-6)
    assert loss == pytest.approx(trainer.curves[-1][-1]["returned_loss"], rel=1e-5)
    # To read it out changes nothing of the training, nor of the pull's own average.
    alone = run(texts.split(",")[0])[0].trainer
    assert alone.curve == trainer.curves[0]
    lives = [[point["live_loss"] for point in curve] for curve in trainer.curves]
    assert all(live == lives[0] for live in lives)


@pytest.mark.parametrize("base", ["pace:every=5", "pullback:sgd"])
def test_a_pull_is_never_toward_the_slower_average(base):
    """Also where one optimizer does both."""
    model = torch.nn.Linear(2, 2)
    method = parse_method(f"{base}:return_kappa=0.7:kappa=0.3:c=2", lr=0.1)
    facts = {"decayed": set(), "weight_decay": 0.0, "warmup": 0, "steps": 9}
    opt = make_optimizer(method, model, **facts)
    group = opt.param_groups[0]
    every = method.every or 1
    assert averaging_of(group) == PowerEMA(0.3, every=every)
    assert returns_of(group) == {"returned": PowerEMA(0.7)}
    assert group["pullback"] == 2


def test_lookahead_returns_its_slow_weights(tiny):
    tokens, run = tiny
    trainer = run("lookahead:k=5")[0].trainer  # of 12 steps: two after the last exchange
    end = trainer.curve[-1]
    assert end["returned_loss"] != end["live_loss"]
    with trainer.live():
        assert loss_by_hand(trainer.model, tokens) == pytest.approx(end["live_loss"], rel=1e-5)
    slow = trainer.optimizer.optimizer.state
    for p in trainer.model.parameters():
        p.data.copy_(slow[p]["slow_params"])
    assert loss_by_hand(trainer.model, tokens) == pytest.approx(end["returned_loss"], rel=1e-5)


def test_rate_warm_up_decay_and_clipping_reach_the_optimizer(tiny):
    _, run = tiny
    rates = []

    def follow(optimizer, args, kwargs):
        rates.append(optimizer.param_groups[0]["lr"] / 1e-2)

    hook = register_optimizer_step_pre_hook(follow)
    try:
        trainer = run("adamw:wsd", steps=10, warmup=4)[0].trainer
    finally:
        hook.remove()
    assert rates == pytest.approx([0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 0.5])
    assert {g["weight_decay"] for g in trainer.optimizer.param_groups} == {0.1, 0.0}
    free = run("schedule-free", warmup=4)[0].trainer.optimizer.optimizer
    assert free.param_groups[0]["warmup_steps"] == 4
    loose, tight = (run("adamw", max_grad_norm=x)[0].trainer.curve for x in (100.0, 1e-9))
    assert tight[-1]["train_loss"] != loose[-1]["train_loss"]


@pytest.mark.parametrize(("steps", "evaluations"), [(12, 3), (15, 8), (23, 12), (50, 8)])
def test_evaluations_are_as_many_as_asked_for_at_most(tiny, steps, evaluations):
    curve = tiny[1]("pace", steps=steps, evaluations=evaluations)[0].trainer.curve
    assert len(curve) - 1 <= evaluations
    assert all("gain_mean" in point for point in curve[1:])
    assert [curve[0]["step"], curve[-1]["step"]] == [0, steps]


def test_divergence_shows(tiny):
    trained, _ = tiny[1]("adamw:lr=1e30", warmup=0)
    assert not math.isfinite(trained.trainer.curve[-1]["returned_loss"])
    # Nor is one bad batch among many dropped from the mean, which is the Trainer's default.
    assert not trained.trainer.args.logging_nan_inf_filter


def test_the_saved_model_is_the_returned_one(tiny, tmp_path):
    tokens, run = tiny
    trainer = run("pace")[0].trainer
    trainer.save_returned(method_of("pace"), str(tmp_path))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    returned = trainer.curve[-1]["returned_loss"]
    assert loss_by_hand(saved, tokens) == pytest.approx(returned, rel=1e-5)
    live = trainer.curve[-1]["live_loss"]
    with trainer.live():
        assert loss_by_hand(trainer.model, tokens) == pytest.approx(live, rel=1e-5)


def test_a_stopped_run_says_so(tiny):
    _, run = tiny
    trained, _ = run("adamw", watch=lambda step, losses: step == 5)
    assert trained.stopped
    assert trained.trainer.state.global_step == 5


@pytest.mark.parametrize("gain", [0.1, 0.5, 1.0])
def test_an_average_that_is_pulled_toward_moves_as_under_the_twin(gain):
    """Under a steady gradient, when both have settled; β itself falls by 6e-4 a step then."""
    steps = 500
    p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    pull = Pullback(torch.optim.SGD([p], lr=1.0), gain, PowerEMA(0.3), gain="scalar")
    twin = schedule_of(f"adamw:twin:kappa=0.3:g={gain}", steps=steps)
    other = average = 0.0
    averages = []
    for step in range(1, steps + 1):
        p.grad = torch.ones_like(p)
        pull.step()
        other -= twin[step - 1]
        average += (other - average) * (1 + step) ** -0.3
        averages.append((float(pull.state[p]["average"]), average))
    ours, its = (now - before for before, now in zip(*averages[-2:], strict=True))
    assert ours == pytest.approx(its, rel=5e-3)


def test_the_twin_of_a_saturated_pull_is_a_schedule():
    """power and twin use the averaging weight that PACE itself uses."""
    assert schedule_of("adamw:power")[9] == pytest.approx(PowerEMA(0.3).weight(10))
    model = torch.nn.Linear(2, 2)
    rest = {"decayed": {"weight"}, "weight_decay": 0.1, "warmup": 5, "steps": 10}
    pace = make_optimizer(method_of("pace"), model, **rest)
    facts = {"lr": 1e-2, "pullback": 3.0, "ema_power": 0.3, "state_dtype": None}
    assert facts.items() <= pace.param_groups[0].items()
    ema = make_optimizer(method_of("ema:state=bf16"), model, **rest).param_groups
    assert (ema[0]["pullback"], ema[0]["state_dtype"]) == (0.0, torch.bfloat16)
    assert [(len(group["params"]), group["weight_decay"]) for group in ema] == [(1, 0.1), (1, 0)]
    (ema, _) = make_optimizer(method_of("ema:half_life=7:state=bf16"), model, **rest).param_groups
    assert (ema["averaging"], ema["state_dtype"]) == ("ema:half_life=7", torch.bfloat16)
    for text in ("adamw", "ema", "uniform", "pace"):
        for eps in (1e-8, 0.25):
            method = method_of(text if eps == 1e-8 else f"{text}:eps={eps}")
            for group in make_optimizer(method, model, **rest).param_groups:
                assert group["eps"] == eps


def test_a_bar_shows_the_best_returned_model_also_while_the_live_one_is_ahead():
    losses = {"eval_live_loss": 2.0, "eval_loss": 2.5, "eval_ema κ=0.7_loss": 2.25, "loss": 1.0}
    assert show_losses(losses) == "live 2.000  returned 2.250"
    assert show_losses({"eval_live_loss": 2.0}) == "live 2.000  returned 2.000"  # AdamW alone
    assert show_losses({"loss": 1.0}) == ""


# ---- the report ------------------------------------------------------------------------------


def row(label, lr, seed, returned, **facts):
    name = label.split()[0]
    options = {"kappa": 0.3, "g": None, "eps": None, "c": 2.0}
    facts = {"name": name, "schedule": "constant", **options, **facts}
    return {
        "run": f"{label}-{lr}-{seed}",
        "trained_with": f"{label}-{lr}-{seed}",
        "label": label,
        "lr": lr,
        "seed": seed,
        "step": 10,
        "live_loss": returned,
        "returned_loss": returned,
        "gain_mean": 0.8 + seed / 10,
        "clipped": 0.5,
        **facts,
    }


def verdict_of(*rows):
    return verdict(Results(len(rows), list(rows)))


def test_verdict_says_who_won_by_how_much_over_how_many_seeds():
    pace = [row("pace", 0.01, 0, 2.0), row("pace", 0.01, 1, 2.1)]
    ema = [row("ema", 0.01, 0, 2.3), row("ema", 0.01, 1, 2.2)]
    twin = [row("ema twin", 0.01, s, 2.0, schedule="twin", g=0.9) for s in (0, 1)]
    adamw = [row("adamw", 0.01, 0, None), row("adamw", 0.01, 1, 2.5)]
    assert verdict_of(*pace, *ema, *adamw, *twin) == [
        "At learning rate 0.01: ema twin returns the best model, 2.000 ±0.000, 0.050 nats lower "
        "(-0.100 to +0.000, lower in 1 of 2 seeds) than pace.",
        "What the pull alone does there: pace returns a model 0.200 nats lower "
        "(-0.300 to -0.100, lower in 2 of 2 seeds) than ema.",
        "And against the schedule that a gain of 0.9 amounts to: pace returns a model 0.050 nats "
        "higher (+0.000 to +0.100, higher in 1 of 2 seeds) than ema twin.",
        "The gain of pace is 0.85 in the mean at the end, and 50.0% of the coordinates are "
        "clipped.",
        "At learning rate 0.01 adamw diverged.",
    ]
    amounts_to = [row("ema ε=0.02", 0.01, s, 2.1, eps=0.02) for s in (0, 1)]  # 0.01 · 2
    other = [row("ema ε=0.03", 0.01, s, 2.2, eps=0.03) for s in (0, 1)]
    assert verdict_of(*pace, *amounts_to, *other)[1:3] == [
        "And against the ε that its pull amounts to: pace returns a model 0.050 nats lower "
        "(-0.100 to +0.000, lower in 1 of 2 seeds) than ema ε=0.02.",
        "The gain of pace is 0.85 in the mean at the end, and 50.0% of the coordinates are "
        "clipped.",
    ]
    one = verdict_of(pace[0], ema[0])
    assert one[0] == (
        "At learning rate 0.01: pace returns the best model, 2.000, 0.300 nats lower than ema."
    )
    assert "One seed" in one[-1]


def test_verdict_compares_over_the_seeds_that_all_finished():
    """Ctrl-C in the second seed: pace's worse second run has nothing to be compared with."""
    said = verdict_of(row("pace", 1, 0, 2.0), row("pace", 1, 1, 9.0), row("ema", 1, 0, 2.1))
    assert said[0].endswith("pace returns the best model, 2.000, 0.100 nats lower than ema.")
    assert said[-1].startswith("All this is of seed 0, which every method here finished;")
    said = verdict_of(row("pace", 1, 0, 2.0), row("ema", 1, 1, 2.1))
    assert "shares no seed with" in said[0]
    assert "No seed was finished by all methods" in said[-1]


def test_verdict_on_ties_and_divergence():
    assert "2.000, equal to that of" in verdict_of(row("a", 1, 0, 2.0), row("b", 1, 0, 2.0002))[0]
    said = verdict_of(row("pace", 1, 0, None, gain_mean=None), row("ema", 1, 0, None))
    assert said[:2] == ["At learning rate 1: all diverged.", "At learning rate 1 pace diverged."]
    said = verdict_of(row("pace", 1, 0, 2.0, gain_mean=None), row("ema", 1, 0, None))
    assert "2.000, while there was divergence in ema" in said[0]


def test_verdict_over_rates():
    rows = [row("pace", 0.1, 0, 2.0), row("ema", 0.1, 0, 2.5), row("ema", 0.2, 0, 1.5)]
    said = verdict_of(*rows)
    assert not any("rate 0.2:" in sentence for sentence in said)  # nothing to compare there
    best = next(sentence for sentence in said if sentence.startswith("Each at its best"))
    assert "ema at 0.2 returns the best model, 1.500, 0.500 nats lower than pace at 0.1" in best
    assert "picked on" in best
    fixed = verdict_of(rows[0], rows[2])  # each had one rate: nothing was picked
    assert not any("picked on" in sentence for sentence in fixed)


def test_pull_alone_means_that_nothing_else_differs():
    said = verdict_of(
        row("pace twin", 1, 0, 2.0, schedule="twin", g=0.5),
        row("ema twin", 1, 0, 2.1, schedule="twin", g=1.0),
        row("ema slow", 1, 0, 2.1, kappa=0.7),
    )
    assert not any("pull alone" in sentence for sentence in said)


def test_the_best_returned_model_is_the_one_marked():
    cells = Results(2, [row("a", 1, 0, 2.0), row("b", 1, 0, 1.0)]).cells()
    assert best_at(cells, 1) == 1.0


# ---- the command -----------------------------------------------------------------------------

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
    assert manifest["text"] == text
    assert manifest["pretrain_text"] is None
    page = (out / "report.html").read_text()
    assert "<svg" in page
    assert "9 of 9 runs" in page
    assert "in 3 of 3 seeds" in page or "in 2 of 3 seeds" in page
    assert page.count('class="best"') == 1
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
    finished = int(re.search(r"Interrupted: (\d+) of 20 runs were finished", said)[1])
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert 1 <= finished < 20
    assert {r["step"] for r in rows} == {0, 150, 300}  # whole runs only
    assert len(rows) == 3 * finished
    assert "Traceback" not in errors
    assert "Interrupted" in (out / "report.html").read_text()
    assert json.loads((out / "manifest.json").read_text())["interrupted"] is True


@pytest.mark.parametrize("delay", [0.3, 2.0])
def test_ctrl_c_while_the_workers_start(text, tmp_path, delay):
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "paceline", "compare", *SMALL, "--text", text, "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not (out / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGINT)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "Failed" not in said
    assert "Interrupted: " in said


def test_a_run_that_fails_does_not_stop_the_others(text, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.chdir(tmp_path)
    (out / "tensorboard").mkdir(parents=True)
    blocked = out / "tensorboard" / "adamw-wsd-lr0.01-seed0"
    options = [*SMALL, "--text", text, "--methods", "adamw:wsd,ema", "--lr", "1e-2"]

    def block(folder):  # a file where the run's folder must be
        blocked.write_text("")
        return folder

    monkeypatch.setattr("paceline.study.compare._new_folder", block)
    assert main(["compare", *options, "--out", str(out)]) == 1
    said = capsys.readouterr().out
    assert "Failed: adamw-wsd-lr0.01-seed0: " in said
    assert "ema" in said
    assert "adamw-wsd-lr0.01-seed0" in json.loads((out / "manifest.json").read_text())["failed"]
    assert "Failed: adamw-wsd-lr0.01-seed0" in (out / "report.html").read_text()


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
        (["--seeds", "5000000000"], "seeds: Input should be less than"),
        (["--steps", "25"], "warmup: 20 steps leave nothing of 25"),
        (["--methods", "adamw,adamw:c=5"], "has no option 'c'"),
        (["--text", "EMPTY"], "the text is empty"),
        (["--text", "SHORT"], "the text is too short"),
        (["--context", "65"], "context: 65 tokens are more than the model's 64 positions"),
        (["--methods", "sgd"], "unknown method 'sgd'"),
        (["--methods", "ema,ema"], "methods: give at least one, and each only once"),
        (["--methods", "ema,ema:kappa=0.3"], "are the same run"),
        (["--methods", "ema,ema:state=fp32"], "are the same run"),
        (["--methods", "pace,pace:kappa=0.30000001"], "are the same run"),  # in the same folder
        (["--lr", "0.01,0.0100000001"], "are the same run"),
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
    (tmp_path / "LONG").write_text(TEXT)
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
        option = name.replace("_", "-")
        (entry,) = re.findall(
            rf"^[│ ] --{option}(?![\w-]).*?(?=^[│ ] --|\Z)", said, re.DOTALL | re.MULTILINE
        )
        assert len(re.findall(r"[A-Za-z]{2,}", entry)) > 4, entry
