"""`paceline train`: runs that go on, runs that cannot, and the demos."""

import datetime
import errno
import itertools
import json
import os
import platform
import resource
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
import yaml

pytest.importorskip("transformers")
pytest.importorskip("trl")

from training import (
    FAMILIES,
    SEQUENCES,
    STEPS,
    apart,
    assert_ended_alike,
    checkpoints,
    conversations,
    go,
    go_on,
    lines,
    nothing_half_written,
    order,
    read,
    unfinished,
    weights,
    write_jsonl,
    write_recipe,
)
from transformers import AutoModelForCausalLM

from paceline import PACE, Elastic
from paceline.cli import main
from paceline.train import build, chat, folder
from paceline.train import run as run_module
from paceline.train.build import RunTrainer
from paceline.train.callbacks import JsonlMetrics
from paceline.train.recipe import Recipe

pytestmark = pytest.mark.usefixtures("surroundings")


def one_line(capsys, *parts):
    lines = capsys.readouterr().err.splitlines(keepends=True)
    said = "".join(line for line in lines if not line.startswith("paceline: data: kept "))
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
    assert f"Resuming from checkpoint-{step + 1}" in capsys.readouterr().out
    assert_ended_alike(whole, run)
    assert read(run / "manifest.json")["resumed"][0]["from"] == f"checkpoint-{step + 1}"


CLOCK = "{{ strftime_now('%d %b %Y') }}\n"


@pytest.mark.parametrize("given", [None, datetime.date(2024, 2, 29)])
def test_a_run_keeps_its_day(values, given, tmp_path, monkeypatch):
    """Also where the datasets' cache is empty, as on another machine."""

    class Day(datetime.date):
        now = 1

        @classmethod
        def today(cls):
            return datetime.date(2025, 5, cls.now)

    for module in (run_module, chat):
        monkeypatch.setattr(module, "date", Day)
    (tmp_path / "clock.jinja").write_text(CLOCK + chat.CHATML)
    changes = {
        "chat_template": str(tmp_path / "clock.jinja"),
        "steps": 2,
        "date": given,
        "context": 64,
    }
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_step(patch, 0, interrupt)
        assert not go(run, values, **changes)
    day = given or datetime.date(2025, 5, 1)
    assert Recipe(**folder.recipe_of(run)).date == day
    Day.now = 2
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "other"))
    seen = []
    monkeypatch.setattr(JsonlMetrics, "on_train_begin", lambda *_, **x: seen.append(x))
    assert go_on(run) == 0
    loader = next(iter(seen[0]["train_dataloader"]))
    said = seen[0]["processing_class"].decode(loader["input_ids"][0])
    assert said.startswith(f"{day:%d %b %Y}")


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
        (["--lr", "1e-3"], ["lr: it must stay 0.01 when a run is resumed", "micro_batch"]),
        *(
            (longer, ["resume: a run that is resumed keeps its length; a new run with --model"])
            for longer in (["--steps", "24"], ["--epochs", "3"], ["--steps=None", "--epochs=3"])
        ),
        (["--out", "elsewhere"], ["resume: a run continues in its own folder"]),
    ],
    ids=["lr", "steps", "both", "epochs", "out"],
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
    one_line(capsys, "data: they have changed since the run began")
    assert not (run / "model").exists()


def test_the_digest_is_of_each_token_and_label():
    rows = [{"input_ids": [i, 1], "labels": [-100, 1]} for i in range(5000)]
    found = {build.digest_of(datasets.Dataset.from_list(rows))}
    for place, key in itertools.product((0, 2500, 4999), rows[0]):
        changed = [*rows]
        changed[place] = {**rows[place], key: [7, 7]}
        found.add(build.digest_of(datasets.Dataset.from_list(changed)))
    joined = [{"input_ids": [*a["input_ids"][:1]], "labels": a["labels"]} for a in rows[:1]]
    found.add(build.digest_of(datasets.Dataset.from_list([*joined, *rows[1:]])))
    assert len(found) == 8
    data = datasets.Dataset.from_list(rows)
    assert build.digest_of(data.select([*range(4999), 4999])) in found


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


# ---- damage --------------------------------------------------------------------------------------


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_a_damaged_checkpoint_is_named_and_another_one_serves(finished, copied, capsys):
    unfinished(copied)
    last, again = copied / "checkpoints/checkpoint-9", copied / "checkpoints/checkpoint-12"
    shutil.copytree(finished / "checkpoints/checkpoint-12", again)
    for file in sorted(again.iterdir()):
        whole = file.read_bytes()
        flip(file)
        assert go_on(copied) == 2
        said = one_line(capsys, f"resume: {again}/", f"train --resume {copied} --from checkpoint-9")
        assert f"{file} is damaged" in said or file.name == "checksums.json"
        file.write_bytes(whole)
    (again / "optimizer.pt").unlink()
    assert go_on(copied) == 2
    one_line(capsys, f"{again}/optimizer.pt is missing; ", "--from checkpoint-9")
    flip(last / "model.safetensors")
    assert go_on(copied) == 2
    one_line(capsys, f"{again}/optimizer.pt is missing; no other checkpoint is whole")
    flip(last / "model.safetensors")
    assert go_on(copied, "--from", "checkpoint-8") == 2
    one_line(capsys, "from: ", "has no 'checkpoint-8'; it has checkpoint-9, checkpoint-12")
    assert go_on(copied, "--from", "checkpoint-9") == 0
    out = capsys.readouterr().out
    assert f"Set aside: {copied}/checkpoints/set-aside-checkpoint-12\nResuming from check" in out
    assert_ended_alike(finished, copied)
    assert read(copied / "manifest.json")["resumed"][0]["from"] == "checkpoint-9"


def test_an_empty_checkpoint_is_damaged(copied, capsys):
    unfinished(copied)
    (copied / "checkpoints/checkpoint-11").mkdir()
    assert go_on(copied) == 2
    one_line(capsys, "checkpoint-11/checksums.json is missing; ", "--from checkpoint-9")


def test_an_empty_model_is_not_finished(finished, copied):
    shutil.rmtree(copied / "model")
    (copied / "model").mkdir()
    assert go_on(copied) == 0
    assert_ended_alike(finished, copied)


def test_a_damaged_model_is_not_finished(finished, copied, values, capsys):
    model = copied / "model"
    (model / "README.md").write_text("My model.")  # which is no damage
    assert go_on(copied) == 0
    flip(model / "model.safetensors")
    recipe = write_recipe(copied.parent / "recipe.yaml", values, config=None, model=str(model))
    assert main(["train", str(recipe), "--out", str(copied.parent / "next")]) == 2
    one_line(capsys, f"model: {model}/model.safetensors is damaged: ", f"delete {model}/checksums")
    assert not (copied.parent / "next").exists()
    assert go_on(copied, "--from", "checkpoint-9") == 2
    one_line(capsys, f"from: {copied} is finished; delete {model}")
    assert go_on(copied) == 2
    one_line(capsys, f"resume: {model}/model.safetensors is damaged: ", f"; delete {model}, and")
    shutil.rmtree(model)
    assert go_on(copied) == 0
    assert_ended_alike(finished, copied)


def test_a_recipe_that_has_changed_since_is_refused(copied, capsys):
    unfinished(copied)
    recipe = copied / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("lr: 0.01", "lr: 0.11"))
    assert go_on(copied) == 2
    one_line(capsys, "lr: it must stay 0.01 when a run is resumed")


# ---- two at once ---------------------------------------------------------------------------------


def test_two_do_not_train_in_one_folder(finished, values, tmp_path, monkeypatch, capsys):
    recipe, run = write_recipe(tmp_path / "recipe.yaml", values), tmp_path / "run"
    said = []

    def meet():
        for arguments in ([str(recipe), "--out", str(run)], ["--resume", str(run)]):
            assert main(["train", *arguments]) == 2
            said.append(one_line(capsys, f"out: {run} is in use by process {os.getpid()} on "))

    at_step(monkeypatch, 4, meet)
    assert main(["train", str(recipe), "--out", str(run)]) == 0
    assert len(said) == 2
    assert_ended_alike(finished, run)
    assert not (run / ".lock").exists()


def test_a_lock_that_a_kill_left_is_taken_over(finished, values, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    left = {"host": platform.node(), "process": 1, "since": "long ago", "command": "paceline"}
    (run / ".lock").write_text(json.dumps(left))
    assert go(run, values)
    assert_ended_alike(finished, run)


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


@pytest.mark.parametrize("path", ["recipe.yaml", "manifest.json"])
def test_full_disk_at_the_start(finished, values, path, tmp_path, capsys, monkeypatch):
    recipe, run = write_recipe(tmp_path / "recipe.yaml", values), tmp_path / "run"
    usual = Path.write_text

    def write_text(self, *args, **kwargs):
        if path in str(self) and self != recipe:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return usual(self, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", write_text)
    assert main(["train", str(recipe), "--out", str(run)]) == 2
    again = "start the run again" if path == "recipe.yaml" else f"paceline train --resume {run} "
    one_line(capsys, f"cannot write to {run}", ": No space left on device; when that", again)
    assert run.exists() is (path != "recipe.yaml")
    monkeypatch.undo()
    assert (go_on(run) if run.exists() else main(["train", str(recipe), "--out", str(run)])) == 0
    assert_ended_alike(finished, run)


def test_full_disk_that_a_library_reports_as_another_error(values, tmp_path, capsys, monkeypatch):
    def fail(*_, **__):
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            raise ValueError("I/O operation on closed file")

    recipe, run = write_recipe(tmp_path / "recipe.yaml", values), tmp_path / "run"
    monkeypatch.setattr("paceline.train.run.build_fitting", fail)
    assert main(["train", str(recipe), "--out", str(run)]) == 2
    one_line(capsys, f"cannot write to {run} or ", ": No space left on device; when that", "again")
    assert not run.exists()


def test_what_cannot_be_read_is_not_said_to_be_written(values, tmp_path, capsys, monkeypatch):
    recipe, run = write_recipe(tmp_path / "recipe.yaml", values), tmp_path / "run"
    at_step(monkeypatch, 4, raises(ConnectionError("the Hub\nis away")))
    assert main(["train", str(recipe), "--out", str(run)]) == 2
    one_line(
        capsys, "the run stopped: the Hub is away; when that is fixed, paceline train --resume"
    )


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
        ({"fsdp": True}, ["fsdp: ", "torchrun"]),
        ({"micro_batch": 3}, ["micro_batch: 3 does not divide the batch of 4"]),
        ({"warmup": 12.0}, ["warmup: 12 steps must be fewer than the 12 steps of the run"]),
    ],
    ids=lambda x: next(iter(x)),
)
def test_what_does_not_go_together_is_one_line(values, changes, parts, tmp_path, capsys):
    recipe = write_recipe(tmp_path / "recipe.yaml", values, **changes)
    assert main(["train", str(recipe), "--out", str(tmp_path / "run")]) == 2
    one_line(capsys, *parts)
    assert not [p for p in (tmp_path / "run").rglob("*") if p.is_file()]


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


def test_the_rate_is_found_by_a_short_run(tmp_path, values, capsys):
    """It is in the run's recipe, and the run is that of this rate; the short run leaves nothing."""
    own = {**values, "method": "pace:gain=scalar:pullback=1", "steps": 4}
    recipe = write_recipe(tmp_path / "recipe.yaml", own)
    assert main(["train", str(recipe), "--find-lr", "--out", str(tmp_path / "found")]) == 0
    rate = yaml.safe_load((tmp_path / "found" / folder.RECIPE).read_text())["lr"]
    assert f"Learning rate {rate:g}" in capsys.readouterr().out
    assert 1e-5 < rate < 1
    assert main(["train", str(recipe), f"--lr={rate}", "--out", str(tmp_path / "given")]) == 0
    assert_ended_alike(tmp_path / "found", tmp_path / "given")
    facts = [folder.manifest_of(tmp_path / name)["data"] for name in ("found", "given")]
    assert facts[0] == facts[1]
    assert sorted(p.name for p in (tmp_path / "found").iterdir()) == sorted(
        p.name for p in (tmp_path / "given").iterdir()
    )


def test_a_rate_that_cannot_be_looked_for(tmp_path, values, finished, capsys):
    own = write_recipe(tmp_path / "own.yaml", {**values, "method": "pace:lr=0.02"})
    assert main(["train", str(own), "--find-lr", "--out", str(tmp_path / "run")]) == 2
    one_line(capsys, "find_lr", "leave its lr out")
    assert not (tmp_path / "run" / folder.RECIPE).exists()
    assert main(["train", "--resume", str(finished), "--find-lr"]) == 2
    one_line(capsys, "find_lr", "keeps its rate")


# ---- what a card says ----------------------------------------------------------------------------


class OfTwo(Elastic):
    """One of two workers, which never meet."""

    @property
    def _workers(self):
        return 2


@pytest.mark.parametrize(
    ("returns", "exchange", "rule"),
    [
        (None, "easgd", "the center of 2 workers, easgd every 5 steps"),
        (
            *("ema:kappa=0.7", "easgd"),
            "ema:kappa=0.7 of the center at each exchange, around the center of 2 workers, easgd "
            "every 5 steps",
        ),
        (
            *("ema:kappa=0.7", "average"),
            "ema:kappa=0.7 of the mean of the workers at each exchange, around the center of 2 "
            "workers, average every 5 steps",
        ),
    ],
)
def test_a_card_names_what_elastic_workers_return(returns, exchange, rule):
    base = PACE([torch.nn.Parameter(torch.ones(2))], pullback=0.1, returns=returns)
    trainer = SimpleNamespace(
        bare_optimizer=OfTwo(base, every=5, exchange=exchange),
        method=SimpleNamespace(label="pace"),
        state=SimpleNamespace(global_step=10),
        args=SimpleNamespace(world_size=2),
    )
    assert run_module.average_facts(trainer)["rule"] == rule
