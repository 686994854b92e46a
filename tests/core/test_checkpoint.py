"""Checkpoint files: exact, and whole or not there."""

import io
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from problems import RETURNS, advance, assert_same, problem, same, snapshot

from paceline import PACE, load_checkpoint, save_checkpoint
from paceline.testing import SCHEDULERS

# ---- killed at any moment --------------------------------------------------------------------


@pytest.fixture
def run():
    """run(folder, seconds, fatal): the exit status of tests/killed.py, killed after so long."""
    script = str(Path(__file__).parents[1] / "killed.py")
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, script], stdin=pipe, stdout=pipe, text=True) as server:
        assert server.stdout.readline() == "ready\n"

        def run(folder, seconds=1000.0, fatal=""):
            server.stdin.write(f"{folder} {seconds} {fatal}\n")
            server.stdin.flush()
            return int(server.stdout.readline())

        yield run
        server.stdin.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_killed_at_twenty_moments_a_run_ends_as_if_it_had_not_been(run, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    start = time.monotonic()
    assert run(whole) == 0
    seconds = time.monotonic() - start
    moments = random.Random(0)
    in_a_save = ["writing", "synced", "renaming"] * 2
    kills = [(moments.uniform(0, 0.1) * seconds, "") for _ in range(14)]
    kills += [(1000.0, point) for point in in_a_save]
    moments.shuffle(kills)
    partial, reached = 0, {0}

    def check_the_end():
        assert same(*(torch.load(folder / "end.pt") for folder in (whole, killed)))
        assert not (killed / ".run.pt.partial").exists()

    while kills:
        if run(killed, *kills[-1]) == 0:  # done before that moment came: once more from the start
            check_the_end()
            (killed / "run.pt").unlink()
            continue
        kills.pop()
        partial += (killed / ".run.pt.partial").exists()
        if (killed / "run.pt").exists():
            reached.add(torch.load(killed / "run.pt", weights_only=True)["values"]["step"])
    assert partial >= len(in_a_save)
    assert len(reached) > 8  # it went on between the kills
    assert run(killed) == 0
    check_the_end()


# ---- save_checkpoint -------------------------------------------------------------------------


@pytest.mark.parametrize("returns", [None, RETURNS])
def test_a_file_holds_live_weights_whatever_the_moment(returns, tmp_path):
    model, generator = problem(torch.bfloat16)
    opt = PACE(model.parameters(), lr=0.05, pullback=0.3, returns=returns)
    advance(model, opt, generator, 5)
    live = snapshot(model, opt)
    save_checkpoint(tmp_path / "live.pt", model, opt, step=5)
    opt.eval(opt.returns[:2][-1])  # which is still in the model after the save
    swapped = snapshot(model, opt)
    save_checkpoint(tmp_path / "averaged.pt", model, opt, step=5)
    assert opt.swapped
    assert_same(snapshot(model, opt), swapped)
    for name in ("live.pt", "averaged.pt"):
        other, _ = problem(torch.bfloat16, seed=2)
        resumed = PACE(other.parameters(), pullback=1.0)
        assert load_checkpoint(tmp_path / name, other, resumed) == {"step": 5}
        assert not resumed.swapped
        assert_same(snapshot(other, resumed), live)


def test_a_save_that_fails_leaves_the_file_before_it_and_the_mode(tmp_path, monkeypatch):
    model, generator = problem()
    opt = PACE(model.parameters(), lr=0.05, pullback=0.3)
    advance(model, opt, generator, 2)
    save_checkpoint(tmp_path / "run.pt", model, opt)
    before = (tmp_path / "run.pt").read_bytes()
    opt.eval()
    swapped = snapshot(model, opt)

    def full(run, file):
        Path(file).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path / "run.pt", model, opt)
    assert [file.name for file in tmp_path.iterdir()] == ["run.pt"]
    assert (tmp_path / "run.pt").read_bytes() == before
    assert_same(snapshot(model, opt), swapped)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_what_schedulers_and_numpy_leave_is_read_back(name, tmp_path):
    model, generator = problem()
    opt = PACE(model.parameters(), lr=0.05, pullback=0.3)
    schedule = SCHEDULERS[name](opt)
    advance(model, opt, generator, 3)
    schedule.step(*([np.float32(1.0)] if name == "ReduceLROnPlateau" else []))
    opt.param_groups[0]["lr"] = np.float64(0.125)  # as LambdaLR has it from np.cos
    saved = torch.load(io_of(opt.state_dict()), weights_only=True)
    assert type(saved["param_groups"][0]["lr"]) is float
    values = {
        "loss": np.float32(0.5),
        "step": np.int64(3),
        "done": np.bool_(True),
        "seen": (1, [2]),
    }
    save_checkpoint(tmp_path / "run.pt", model, opt, schedule=schedule, **values)
    other, _ = problem(seed=2)
    resumed = PACE(other.parameters(), lr=0.05, pullback=0.3)
    again = SCHEDULERS[name](resumed)
    assert load_checkpoint(tmp_path / "run.pt", other, resumed, schedule=again) == values
    kinds = [{k: type(x) for k, x in each.state_dict().items()} for each in (again, schedule)]
    assert kinds[0] == kinds[1]
    assert resumed.param_groups[0]["lr"] == 0.125


def io_of(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


def test_what_could_not_be_read_back_is_not_written(tmp_path):
    model, _ = problem()
    opt = PACE(model.parameters(), pullback=0.3)
    save_checkpoint(tmp_path / "run.pt", model, opt, step=1)
    before = (tmp_path / "run.pt").read_bytes()
    with pytest.raises(ValueError, match="part 'sampler' holds a Random; a checkpoint takes"):
        save_checkpoint(tmp_path / "run.pt", model, opt, sampler=[random.Random(0)])
    assert (tmp_path / "run.pt").read_bytes() == before


@pytest.mark.parametrize("swapped", [False, True])
def test_a_file_of_another_model_changes_nothing(swapped, tmp_path):
    model, generator = problem()
    opt = PACE(model.parameters(), pullback=0.3)
    advance(model, opt, generator, 2)
    renamed = torch.nn.ModuleDict({"inner": model})
    save_checkpoint(tmp_path / "run.pt", renamed, opt)
    other, stream = problem(seed=1)
    theirs = PACE(other.parameters(), lr=0.1, pullback=0.5)
    advance(other, theirs, stream, 3)
    if swapped:
        theirs.eval()
    before = snapshot(other, theirs)
    with pytest.raises(ValueError, match=r"of another model: '0.bias' is not in the file"):
        load_checkpoint(tmp_path / "run.pt", other, theirs)
    assert_same(snapshot(other, theirs), before)
    assert (theirs.swapped, theirs.param_groups[0]["lr"]) == (swapped, 0.1)


def test_parts_are_restored_and_must_be_those_that_were_saved(tmp_path):
    model, generator = problem()
    opt = PACE(model.parameters(), lr=0.05, pullback=0.3)
    schedule = torch.optim.lr_scheduler.StepLR(opt, 2)
    advance(model, opt, generator, 3)
    schedule.step()
    path = tmp_path / "run.pt"
    save_checkpoint(path, model, opt, schedule=schedule, data=generator, seen={"tokens": 12})
    drawn = [torch.rand(1), random.random(), np.random.rand(), torch.rand(1, generator=generator)]
    other, stream = problem(seed=1)
    resumed = PACE(other.parameters(), pullback=0.0)
    after = torch.optim.lr_scheduler.StepLR(resumed, 7)
    with pytest.raises(ValueError, match=r"has the parts \['data', 'schedule'\], got \['data'\]"):
        load_checkpoint(path, other, resumed, data=stream)
    assert not resumed.state
    values = load_checkpoint(path, other, resumed, schedule=after, data=stream)
    assert values == {"seen": {"tokens": 12}}
    assert after.state_dict() == schedule.state_dict()
    again = [torch.rand(1), random.random(), np.random.rand(), torch.rand(1, generator=stream)]
    assert same(again, drawn)


def test_a_file_of_something_else_is_refused(tmp_path):
    model, _ = problem()
    opt = PACE(model.parameters(), pullback=0.0)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"model.pt' was not written by save_checkpoint"):
        load_checkpoint(tmp_path / "model.pt", model, opt)
    for content in (b"", b"hello world", b"PK\x03\x04 and no more"):
        (tmp_path / "broken.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"broken.pt' cannot be read: "):
            load_checkpoint(tmp_path / "broken.pt", model, opt)
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "none.pt", model, opt)
