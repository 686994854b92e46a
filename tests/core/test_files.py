"""Files that are there whole: whoever else writes, and whatever has the path."""

import os
import stat
import time
from pathlib import Path

import pytest

from paceline import files
from paceline.files import put, scratch, whole


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_two_writers_leave_one_whole_file_or_folder(tmp_path):
    for path in (tmp_path / "file", tmp_path / "folder"):

        def write(partial, text, path=path):
            if path.name == "folder":
                partial.mkdir()
                (partial / text).write_text(text)
            else:
                partial.write_text(text)

        def text(path=path):
            return path.read_text() if path.is_file() else names(path)[0]

        with whole(path) as first:
            write(first, "first")
            with whole(path) as second:  # removes what is left there, and not this
                write(second, "second")
            assert text() == "second"
        assert text() == "first"
    assert names(tmp_path) == ["file", "folder"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_what_a_killed_process_leaves_goes_with_the_next_call(tmp_path):
    if not (child := os.fork()):
        with whole(tmp_path / "file") as partial:
            partial.write_text("half")
            os._exit(0)
    os.waitpid(child, 0)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".file.")
    (tmp_path / ".file.empty.partial").mkdir()  # killed while it was made or removed
    with scratch(tmp_path, "another"):
        assert left.exists()
    with whole(tmp_path / "file") as partial:
        assert not left.exists()
        partial.write_text("whole")
    assert names(tmp_path) == ["file"]


def test_without_locks_what_is_left_goes_after_a_day(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "fcntl", None)
    days = {0: ".file.a.partial", 2: ".file.b.partial"}
    for age, name in days.items():
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - age * 86_400,) * 2)
    with whole(tmp_path / "file") as partial:
        partial.write_text("text")
    assert names(tmp_path) == [days[0], "file"]


def test_with_locks_a_partial_in_use_stays_whatever_the_clock_says(tmp_path):
    pytest.importorskip("fcntl")
    with scratch(tmp_path, "file") as own:
        os.utime(own, (time.time() - 3 * 86_400,) * 2)
        with scratch(tmp_path, "file"):
            assert own.exists()


@pytest.mark.parametrize("moment", ["in use", "gone"])
def test_a_partial_that_was_taken_for_left_is_made_again(moment, tmp_path, monkeypatch):
    make, made = files.tempfile.mkdtemp, []

    def taken(*args):
        made.append(make(*args))
        if len(made) > 1:
            return made[-1]
        if moment == "gone":
            Path(made[0]).rmdir()
        else:
            files._lock(tmp_path / made[0])
        return made[0]

    monkeypatch.setattr(files.tempfile, "mkdtemp", taken)
    with whole(tmp_path / "file") as partial:
        partial.write_text("text")
    assert len(made) == 2
    assert (tmp_path / "file").read_text() == "text"


# ---- folders that replace one ------------------------------------------------------------------


def write_folder(path, text):
    with whole(path) as partial:
        partial.mkdir()
        (partial / text).write_text(text)


@pytest.fixture
def two_steps(monkeypatch):
    """A file system that cannot have two folders trade names."""
    monkeypatch.setattr(files, "_exchange", lambda *_: False)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.usefixtures("two_steps")
def test_a_folder_is_back_after_a_kill_between_two_renames(tmp_path, monkeypatch):
    path = tmp_path / "folder"
    write_folder(path, "old")
    if not (child := os.fork()):
        real = Path.replace
        monkeypatch.setattr(
            Path, "replace", lambda a, b: os._exit(0) if a.name == "whole" else real(a, b)
        )
        write_folder(path, "new")
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert not path.exists()
    with whole(path) as partial:
        assert names(path) == ["old"]
        partial.mkdir()
        (partial / "new").write_text("text")
    assert names(path) == ["new"]
    assert names(tmp_path) == ["folder"]


@pytest.mark.usefixtures("two_steps")
def test_a_lost_race_for_a_folder_tries_again(tmp_path, monkeypatch):
    path, real, others = tmp_path / "folder", Path.replace, ["second", "third"]
    write_folder(path, "old")

    def replace(a, b):
        made = real(a, b)
        if str(b).endswith(".replaced") and others:
            write_folder(path, others.pop())  # and that one's is in the way
        return made

    monkeypatch.setattr(Path, "replace", replace)
    write_folder(path, "first")
    assert not others
    assert names(path) == ["first"]
    assert names(tmp_path) == ["folder"]


def test_where_folders_can_trade_names_one_is_always_there(tmp_path, monkeypatch):
    for name in ("a", "b", "folder"):
        (tmp_path / name).mkdir()
    if not files._exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("a file system that cannot")
    monkeypatch.delattr(Path, "replace")
    write_folder(tmp_path / "folder", "new")
    assert names(tmp_path / "folder") == ["new"]
    assert names(tmp_path) == ["a", "b", "folder"]


# ---- names, modes and links --------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 255])
def test_any_name(length, tmp_path):
    path = tmp_path / ("[" * length)
    with whole(path) as partial:
        partial.write_text("text")
    assert names(tmp_path) == [path.name]


@pytest.mark.skipif(os.name != "posix", reason="modes of POSIX")
def test_the_mode_is_that_of_before_or_of_any_new_file(tmp_path):
    for before, after in ((None, 0o640), (0o600, 0o600), (0o664, 0o664), (0o444, 0o444)):
        path = tmp_path / f"{before}"
        if before:
            path.touch()
            path.chmod(before)
        umask = os.umask(0o027)
        try:
            with whole(path) as partial:
                partial.write_text("text")
                assert not stat.S_IMODE(partial.parent.stat().st_mode) & 0o077
        finally:
            os.umask(umask)
        assert stat.S_IMODE(path.stat().st_mode) == after


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "old").write_text("old")
    for name in ("old", "new"):  # which is not there yet
        link = tmp_path / name
        link.symlink_to(tmp_path / "there" / name)
        with whole(link) as partial:
            partial.write_text("text")
        assert link.is_symlink()
        assert (tmp_path / "there" / name).read_text() == "text"
    assert names(tmp_path / "there") == ["new", "old"]


def test_what_is_no_file_stays(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "kept").write_text("")
    before = names(tmp_path)
    refused = {
        "/dev/null": "Not a regular file: '/dev/null'",
        tmp_path / "fifo": "Not a regular file: '.*fifo'",
        tmp_path / "loop": "Too many levels of symbolic links: '.*loop'",
        tmp_path / "folder": "Is a directory",
        tmp_path / "none" / "file": "No such file or directory: '.*none'$",
        tmp_path / "folder" / "kept" / "file": "Not a directory: '.*file'",
    }
    for path, message in refused.items():
        with pytest.raises(OSError, match=message), whole(path) as partial:
            partial.write_text("text")
        assert names(tmp_path) == before
    assert names(tmp_path / "folder") == ["kept"]
    (tmp_path / "file").write_text("text")
    with pytest.raises(OSError, match="Is a directory"):
        put(tmp_path / "file", tmp_path / "folder")
    assert stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode)
