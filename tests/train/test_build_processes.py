"""`paceline train` in two processes: one model, or two workers."""

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("trl")

import torch
from merged import average
from safetensors.torch import load_file
from training import (
    STEPS,
    apart,
    lines,
    near,
    order,
    read,
    same,
    timeless,
    unfinished,
    weights,
    write_recipe,
)

from paceline.cli import main

APART = str(Path(__file__).parents[1] / "disks_apart.py")

pytestmark = pytest.mark.usefixtures("surroundings")


def evaluated(run):
    return [row for row in timeless(lines(run)) if "eval_loss" in row]


def by_torchrun(*arguments, processes):
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", processes, "-m"]
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command), "paceline", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def launch(forked, tmp_path):
    """Run a command in several processes; what it says, or which errors."""
    numbers = itertools.count()

    def run(*arguments, processes, module="paceline", succeeds=True):
        number = next(numbers)
        out, errors = (tmp_path / f"{name}-{number}" for name in ("out", "errors"))
        status = forked([module, *arguments], processes, out, errors)
        assert (status == 0) == succeeds, out.read_text() + errors.read_text()
        return (out if succeeds else errors).read_text()

    return run


@pytest.mark.slow
def test_sharded_over_two_processes(values, finished, launch, tmp_path):
    recipe, run = write_recipe(tmp_path / "recipe.yaml", values), tmp_path / "run"
    script = str(Path(__file__).parents[1] / "fsdp_on_cpu.py")
    arguments = ("--out", run, "--fsdp", "--snapshots", 2)
    said = launch("train", recipe, *arguments, processes=2, module=script)
    assert said.count("The model: ") == 1  # one speaks
    near(run, finished)
    assert read(run / "manifest.json")["processes"] == 2
    kept = load_file(run / "averages" / f"step-{STEPS}" / "average.safetensors")
    model = weights(run / "model")
    assert torch.equal(model.pop("lm_head.weight"), model["model.embed_tokens.weight"])  # tied
    assert same(kept, model)
    arguments = ("--rule", "ema:kappa=0.31", "--out", tmp_path / "rebuilt")
    average(run / "averages", *arguments)
    rebuilt = weights(tmp_path / "rebuilt")
    assert torch.equal(rebuilt["lm_head.weight"], rebuilt["model.embed_tokens.weight"])
    assert not torch.equal(rebuilt["lm_head.weight"], model["model.embed_tokens.weight"])
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


@pytest.mark.slow
def test_two_workers_meet_and_resume(values, finished, launch, tmp_path, capsys):
    recipe, run = write_recipe(tmp_path / "recipe.yaml", values, elastic=5), tmp_path / "run"
    said = by_torchrun("train", recipe, "--out", run, processes=2)
    assert said.count("The model: ") == 1
    assert order(run) == order(finished)  # the same data
    assert apart(weights(run / "model"), weights(run / "live")) > 1e-4
    facts = read(run / "paceline.json")
    assert facts["rule"] == "the center of 2 workers, easgd every 5 steps"
    for step in (9, 12):
        folder = run / "checkpoints" / f"checkpoint-{step}"
        states = [torch.load(folder / f"optimizer{x}.pt", weights_only=True) for x in ("", "-1")]
        live = [x["state"][0]["average"] for x in states]  # where the center is in the model
        assert not torch.equal(*live)
        assert states[1]["param_groups"][0]["elastic_steps"] == step
    # They met at step 10 last: the center has stood still since.
    rows = {x["step"]: x["eval_loss"] for x in evaluated(run)}
    assert rows[0] == rows[3] != rows[6] == rows[9] != rows[12]
    again, others = (shutil.copytree(run, tmp_path / name) for name in ("again", "others"))
    unfinished(again)
    launch("train", "--resume", again, processes=2)
    for name in ("live", "model"):
        assert same(weights(again / name), weights(run / name))
    assert evaluated(again) == evaluated(run)
    goes_on_with_others(launch, others, run, capsys)


def goes_on_with_others(launch, run, before, capsys):
    """With four workers, two from each file; not with one worker, nor without a file."""
    unfinished(run)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(run.parent)
        said = launch("train", "--resume", run.name, module=APART, processes=2, succeeds=False)
    missing = f"{run.name}/checkpoints/checkpoint-9/optimizer-1.pt"
    told = f"paceline: resume: process 1 has no {missing}, and others have; give all of them one"
    assert said.count(told) == 1  # one speaks
    assert main(["train", "--resume", str(run)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("paceline: elastic: it needs several processes; start them by torchrun")
    launch("train", "--resume", run, processes=4)
    facts = [read(x / "paceline.json")["rule"] for x in (before, run)]
    assert facts[1] == facts[0].replace("2 workers", "4 workers")
    rows = [{x["step"]: x["eval_loss"] for x in evaluated(x)} for x in (before, run)]
    assert rows[0][9] == rows[1][9]  # the same center
    assert 0 < abs(rows[1][STEPS] - rows[0][STEPS]) < 0.5
    states = [
        torch.load(run / "checkpoints" / f"checkpoint-{STEPS}" / name, weights_only=True)
        for name in ("optimizer.pt", *(f"optimizer-{rank}.pt" for rank in (1, 2, 3)))
    ]
    assert [x["param_groups"][0]["elastic_steps"] for x in states] == [STEPS] * 4
