"""The cache folder: code is run from it only where nobody else can have put it."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from paceline.cache import cache_folder
from paceline.kernels import cpu

pytestmark = pytest.mark.skipif(os.name != "posix", reason="modes of POSIX")


@pytest.fixture
def folder(kernel, tmp_path, monkeypatch):
    """An empty cache, and a compiler that takes no time and counts in `builds`."""
    cpu.build()
    (built,) = cache_folder().glob("kernel-*.so")
    compiler = tmp_path / "c++"
    compiler.write_text(
        f"#!/bin/sh\necho >> {tmp_path}/builds\nfor made; do :; done\ncp {built} $made\n"
    )
    compiler.chmod(0o700)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "cache"))
    cpu.build.cache_clear()
    yield tmp_path / "cache"
    cpu.build.cache_clear()


def builds(folder):
    """The times that the kernel was built."""
    return len((folder.parent / "builds").read_text())


def start():
    """As in another process."""
    cpu.build.cache_clear()
    assert cpu.build().step.argtypes


def test_only_this_user_can_write_there(folder):
    umask = os.umask(0)
    try:
        start()
    finally:
        os.umask(umask)
    (library,) = folder.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert library.stat().st_mode & 0o777 == 0o700
    start()
    assert builds(folder) == 1


def other_architecture(data):
    return data[:18] + b"\xb7\x00" + data[20:]


DAMAGE = {
    "empty": lambda data: b"",
    "truncated": lambda data: data[: len(data) // 2],
    "a bit": lambda data: data[:5000] + bytes([data[5000] ^ 4]) + data[5001:],
    "other architecture": other_architecture,
    "text": lambda data: b"#!/bin/sh\n",
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_library_is_built_once_more(kind, folder):
    start()
    (library,) = folder.iterdir()
    data = library.read_bytes()
    library.unlink()  # a new file, for this process has the old one in memory
    library.write_bytes(DAMAGE[kind](data))
    library.chmod(0o700)
    start()
    start()
    assert builds(folder) == 2
    assert [path.read_bytes() for path in folder.iterdir()] == [data]


@pytest.mark.parametrize("kind", ["link", "mode", "folder", "fifo"])
def test_a_planted_library_is_not_run(kind, folder, monkeypatch):
    start()
    (library,) = folder.iterdir()
    data = library.read_bytes()
    loaded = []
    load = cpu.ctypes.CDLL
    monkeypatch.setattr(cpu.ctypes, "CDLL", lambda path: loaded.append(path) or load(path))
    if kind == "mode":
        library.chmod(0o722)
    else:
        library.unlink()
        planted = folder.parent / "planted"
        planted.write_bytes(data)
        {
            "link": lambda: library.symlink_to(planted),
            "folder": library.mkdir,
            "fifo": lambda: os.mkfifo(library),
        }[kind]()
    start()
    assert [path.rpartition("/")[2] for path in loaded] == ["made.so"]
    start()
    assert builds(folder) == 2
    assert [path.read_bytes() for path in folder.iterdir()] == [data]


def test_a_whole_library_of_something_else_is_built_once_more(folder):
    start()
    (library,) = folder.iterdir()
    library.unlink()
    other = Path(torch._C.__file__)
    planted = folder / cpu._kept_name(library.name.rpartition("-")[0], other)
    planted.write_bytes(other.read_bytes())
    planted.chmod(0o700)
    start()
    start()
    assert builds(folder) == 2
    assert list(folder.iterdir()) == [library]


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_folder_that_others_can_write_to_is_not_used(mode, folder):
    start()
    folder.chmod(mode)
    for n in (2, 3):
        with pytest.warns(UserWarning, match=f"write to the cache folder '{folder}'.*chmod 700"):
            start()
        assert builds(folder) == n
    assert len(list(folder.iterdir())) == 1
    folder.chmod(0o700)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        start()
    assert builds(folder) == 3


def test_a_user_without_a_home_has_a_kernel(folder, monkeypatch):
    def none():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", none)
    start()
    assert len(list(folder.iterdir())) == 1
    monkeypatch.delenv("PACELINE_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    start()
    with pytest.raises(OSError, match="home directory.; set PACELINE_CACHE"):
        cache_folder()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root")
def test_what_belongs_to_another_is_not_used(folder):
    start()
    (library,) = folder.iterdir()
    os.chown(library, 12345, -1)
    start()
    assert builds(folder) == 2
    os.chown(folder, 12345, -1)
    with pytest.warns(UserWarning, match="write to the cache folder"):
        start()
    assert builds(folder) == 3


def test_what_killed_builds_leave_goes(folder):
    script = "from paceline.kernels import cpu; cpu.build()"
    killer = folder.parent / "killer"
    killer.write_text("#!/bin/sh\nkill -9 $PPID\n")
    killer.chmod(0o700)
    env = {**os.environ, "CXX": str(killer)}
    run = subprocess.run([sys.executable, "-c", script], env=env, check=False)
    assert run.returncode == -9
    assert [path.suffix for path in folder.iterdir()] == [".partial"]
    start()
    assert [path.suffix for path in folder.iterdir()] == [".so"]


def test_compilers_that_say_odd_things(folder, monkeypatch):
    odd = folder.parent / "odd"
    odd.write_text("#!/bin/sh\nprintf 'caf\\351: error: z\\351ro\\n' >&2\nexit 1\n", "utf-8")
    odd.chmod(0o700)
    said = {
        str(odd): "odd failed: caf.: error: z.ro$",
        "g++ '-O2": r"CXX=\"g\+\+ '-O2\" is no command: No closing quotation",
        "g++ \\": "CXX=.* is no command: No escaped character",
        str(folder.parent): "Permission denied",
        "\udcff": "No such file",
    }
    for command, message in said.items():
        monkeypatch.setenv("CXX", command)
        cpu.build.cache_clear()
        with pytest.raises(cpu.BuildError, match=message) as error:
            cpu.build()
        assert len(str(error.value).splitlines()) == 1
