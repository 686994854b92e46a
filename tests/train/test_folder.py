"""The run folder: its checks, its checkpoints, and its lines of JSON."""

import json
import math
import os
import resource
import subprocess
import sys

import pytest

pytest.importorskip("pydantic")

from paceline.sums import write_sums
from paceline.train import InputError, folder
from paceline.train.manifest import read_json, write_json


def test_only_an_empty_or_new_folder_is_taken(tmp_path):
    new = folder.make(tmp_path / "a" / "b")
    assert new.is_dir()
    folder.require_empty(new)
    (new / "x").touch()
    with pytest.raises(
        InputError, match=r"^out: .*b is not an empty folder; name another, or wait$"
    ):
        folder.require_empty(new, ", or wait")
    with pytest.raises(InputError, match="x is not an empty folder; name another$"):
        folder.require_empty(new / "x")
    with pytest.raises(InputError, match="^out: cannot use .*: File name too long"):
        folder.require_empty(tmp_path / ("x" * 300))
    with pytest.raises(InputError, match="^out: cannot make the folder .*: Not a directory"):
        folder.make(new / "x" / "y")


def test_states_of_a_run(tmp_path):
    assert not folder.is_begun(tmp_path)
    with pytest.raises(
        InputError, match=r"^resume: .* is no folder of a run: it has no recipe\.yaml"
    ):
        folder.recipe_of(tmp_path)
    (tmp_path / folder.RECIPE).write_text("lr: 1e-3\n")
    assert folder.is_begun(tmp_path)
    assert folder.recipe_of(tmp_path) == {"lr": 1e-3}
    assert not folder.is_finished(tmp_path)
    (tmp_path / folder.MODEL).mkdir()
    assert not folder.is_finished(tmp_path)
    (tmp_path / folder.MODEL / folder.AVERAGE_FACTS).touch()
    assert folder.is_finished(tmp_path)


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    assert folder.last_checkpoint(tmp_path) is None
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-x", ".checkpoint-11", "other-12"):
        (tmp_path / folder.CHECKPOINTS / name).mkdir(parents=True)
    (tmp_path / folder.CHECKPOINTS / "checkpoint-13").touch()  # a file
    found = folder.checkpoints_in(tmp_path / folder.CHECKPOINTS)
    assert [path.name for path in found] == ["checkpoint-9", "checkpoint-10"]
    assert folder.last_checkpoint(tmp_path) == found[-1]
    assert folder.step_of(found[-1]) == 10


# ---- one writer at a time ------------------------------------------------------------------------


def test_a_lock_is_held_by_one_and_names_it(tmp_path):
    new = tmp_path / "a" / "b"
    with folder.locked(new):
        folder.require_empty(new)
        refused = (
            rf"^out: .*b is in use by process {os.getpid()} on .* since 20.*; wait for its end$"
        )
        with pytest.raises(InputError, match=refused), folder.locked(new):
            pass
        with pytest.raises(InputError, match="is in use"), folder.locked(new, shared=True):
            pass
    assert not list(tmp_path.iterdir())
    with folder.locked(new):
        (new / "x").touch()
    assert [path.name for path in new.iterdir()] == ["x"]


def test_a_folder_that_cannot_be_locked(tmp_path):
    (tmp_path / "file").touch()
    for name, message in (
        ("file", "file is not an empty folder"),
        ("x" * 300, "^out: cannot use .*: File name too long"),
        ("file/below", "^out: cannot make the folder .*: Not a directory"),
    ):
        with pytest.raises(InputError, match=message), folder.locked(tmp_path / name):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_those_who_share_a_lock_hold_out_others(tmp_path):
    with folder.locked(tmp_path, shared=True):
        with folder.locked(tmp_path, shared=True):
            pass
        with pytest.raises(InputError, match="is in use"), folder.locked(tmp_path):
            pass
    assert not list(tmp_path.iterdir())


HOLDER = """
import os, sys
from pathlib import Path
from paceline.train import folder

with folder.locked(Path(sys.argv[1])):
    if not os.fork():  # it has let the lock go by now
        print(os.getppid(), flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_lock_ends_with_its_process_whatever_its_children_do(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True) as holder:
        pid = holder.stdout.readline().strip()
        with pytest.raises(InputError, match=f"process {pid} on"), folder.locked(tmp_path):
            pass
        holder.kill()
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
        with folder.locked(tmp_path):  # its child waits for the end of its input
            assert json.loads((tmp_path / folder.LOCK).read_text())["process"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_without_locks_of_the_system_the_file_decides(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "fcntl", None)
    lock = tmp_path / folder.LOCK
    with folder.locked(tmp_path):
        held = json.loads(lock.read_text())
        refused = r"or delete .*\.lock if it is no more$"
        with pytest.raises(InputError, match=refused), folder.locked(tmp_path):
            pass
    assert not lock.exists()
    for left, taken in ({**held, "process": 2**22 + 1}, True), ({**held, "host": "other"}, False):
        lock.write_text(json.dumps(left))
        try:
            with folder.locked(tmp_path):
                assert taken
        except InputError:
            assert not taken
    lock.write_text("{")
    with folder.locked(tmp_path):
        pass


def test_a_lock_that_cannot_be_written_leaves_nothing(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        refused = "^out: cannot write to .*new: File too large$"
        with pytest.raises(InputError, match=refused), folder.locked(tmp_path / "new"):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


# ---- damage --------------------------------------------------------------------------------------


def saved(run, *steps):
    """Checkpoints with one file each; of the last one the folder."""
    for step in steps:
        place = run / folder.CHECKPOINTS / f"checkpoint-{step}"
        place.mkdir(parents=True)
        (place / "optimizer.pt").write_bytes(bytes(9))
        write_sums(place)
    return place


def spoil(place):
    (place / "optimizer.pt").write_bytes(b"x" + bytes(8))


def test_the_checkpoint_to_resume_is_whole(tmp_path):
    assert folder.checkpoint_to_resume(tmp_path) is None
    last = saved(tmp_path, 3, 6, 9)
    assert folder.checkpoint_to_resume(tmp_path) == last
    assert folder.checkpoint_to_resume(tmp_path, "checkpoint-3").name == "checkpoint-3"
    with pytest.raises(InputError, match="^from: .* has no 'checkpoint-4'; it has checkpoint-3, "):
        folder.checkpoint_to_resume(tmp_path, "checkpoint-4")
    spoil(last)
    spoil(last.with_name("checkpoint-6"))
    with pytest.raises(
        InputError, match=r"checkpoint-9/optimizer\.pt is damaged: .*--from check.*-3 "
    ):
        folder.checkpoint_to_resume(tmp_path)
    (last / "checksums.json").unlink()
    with pytest.raises(InputError, match=r"checkpoint-9/checksums\.json is missing; "):
        folder.checkpoint_to_resume(tmp_path)
    spoil(last.with_name("checkpoint-3"))
    with pytest.raises(InputError, match="no other checkpoint is whole"):
        folder.checkpoint_to_resume(tmp_path)


def test_newer_checkpoints_are_set_aside(tmp_path):
    last = saved(tmp_path, 3, 6, 9)
    assert folder.set_aside_newer(last) == []
    (aside,) = folder.set_aside_newer(last.with_name("checkpoint-6"))
    assert (aside.name, (aside / "optimizer.pt").exists()) == ("set-aside-checkpoint-9", True)
    assert folder.last_checkpoint(tmp_path).name == "checkpoint-6"
    saved(tmp_path, 9)  # the run has come by there again
    assert folder.set_aside_newer(last.with_name("checkpoint-6"))[0].name == f"{aside.name}.2"


def test_a_model_that_is_read_is_whole_and_its_training_state_may_not_be(tmp_path):
    place = saved(tmp_path, 3)
    (place / "config.json").touch()
    write_sums(place)
    spoil(place)
    folder.require_whole(place, "model")
    (place / "config.json").write_text(" ")
    with pytest.raises(InputError, match=r"^model: .*config\.json is damaged.*delete .*sums\.json"):
        folder.require_whole(place, "model")
    with pytest.raises(InputError, match=r"config\.json is damaged.*; then$"):
        folder.require_whole(place / "config.json", "model", "then")


def test_lines_of_json(tmp_path):
    path = tmp_path / folder.METRICS
    rows = [{"step": 1, "loss": 2.5, "κ": "ä"}, {"loss": math.nan, "other": -math.inf}]
    path.write_text("".join(map(folder.json_line, rows)) + "\n" + '{"loss": NaN}\n', "utf-8")
    assert folder.read_lines(path) == (
        [(1, rows[0]), (2, {"loss": None, "other": None}), (4, {"loss": None})],
        False,
    )
    with path.open("a") as file:
        file.write('{"step": 3, "lo')
    lines, torn = folder.read_lines(path)
    assert (len(lines), torn) == (3, True)
    for broken in ('{"a": 1}\n{"b"\n{"c": 1}\n', '{"a": 1}\n[]\n'):
        path.write_text(broken)
        with pytest.raises(InputError, match="line 2 is not a JSON object .*mend or delete"):
            folder.read_lines(path)
    with pytest.raises(InputError, match="^cannot read .*: No such file"):
        folder.read_lines(tmp_path / "nowhere")


def test_objects_in_files(tmp_path):
    path = tmp_path / folder.MANIFEST
    write_json(path, {"κ": [1, None]})
    assert folder.manifest_of(tmp_path) == read_json(path) == {"κ": [1, None]}
    for broken, message in (
        (b"[1]", "is not a JSON object; mend it or leave out"),
        (b"{", "is not JSON .*; mend it or leave out"),
        (b'{"a": "\xff"}', "is not JSON"),
        (json.dumps("x").encode(), "is not a JSON object"),
    ):
        path.write_bytes(broken)
        with pytest.raises(InputError, match=message):
            folder.manifest_of(tmp_path)
    path.unlink()
    with pytest.raises(InputError, match=r"^cannot read .*manifest\.json: No such file"):
        folder.manifest_of(tmp_path)


def test_what_was_set_aside_before_is_kept(tmp_path):
    for number in range(3):
        for step in (10, 20):
            folder.make(tmp_path / f"checkpoint-{step}")
        (tmp_path / "checkpoint-20" / "file").write_text(str(number))
        (aside,) = folder.set_aside_newer(tmp_path / "checkpoint-10")
        assert aside.name == "set-aside-checkpoint-20" + ("", ".2", ".3")[number]
    found = sorted(tmp_path.glob("set-aside-*/file"))
    assert [file.read_text() for file in found] == ["0", "1", "2"]
    assert folder.checkpoints_in(tmp_path) == [tmp_path / "checkpoint-10"]
