"""Fixtures of several files of this room. What is optional is imported where it is needed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working directory, and a cache of datasets beside it."""
    import datasets

    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    return place


@pytest.fixture
def quiet():
    """No bars and no warnings of the libraries."""
    from paceline.train.terminal import quiet

    quiet()


@pytest.fixture
def few(monkeypatch):
    """A chitchat of twenty conversations."""
    from conversing import talk

    from paceline.train import sources

    monkeypatch.setattr(sources, "chitchat", lambda: map(talk, range(20)))


@pytest.fixture
def refused(folder, capfd):
    """Call with the arguments of a command that is refused: what it says, without the name."""
    from recipes import contents

    from paceline.cli import main

    def call(*arguments):
        before = contents(folder)
        capfd.readouterr()
        assert main(list(arguments)) == 2
        out, error = capfd.readouterr()
        assert out == ""
        assert error.count("\n") == 1, error
        assert error.startswith("paceline: ")
        assert contents(folder) == before
        return error.removeprefix("paceline: ").rstrip("\n")

    return call


# ---- whole runs ------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def drawn():
    """What draws the curves of pages."""
    from paceline.train.page import svg

    return svg


@pytest.fixture(scope="module")
def surroundings(drawn, tmp_path_factory):
    """One thread, as the models are tiny; the datasets' cache among the temporary files; and no
    curves on pages, for they take a third of such a run's time.
    """
    import datasets

    from paceline.train import page

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("data")))
        patch.setattr(page, "svg", lambda figure: "")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    """The keys and values of the recipe that the tests vary."""
    import training

    return training.values_in(tmp_path_factory.mktemp("conversations"))


@pytest.fixture(scope="module")
def recorded(surroundings, drawn, values, tmp_path_factory):
    """A run that nothing happened to, with its curves, and what was recorded of it."""
    from training import Recorder, go

    from paceline.train import page

    recorder = Recorder()
    folder = tmp_path_factory.mktemp("recorded") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "svg", drawn)
        assert go(folder, values, recorder)
    return folder, recorder


@pytest.fixture(scope="module")
def finished(recorded):
    return recorded[0]


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of it, to be spoilt."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture(scope="module")
def forked(surroundings):
    """Runs a command as `python -m` does, in forks of a process that has imported all.

    `forked(command, processes, out, errors)` is its exit status; it writes to the files.
    """
    script, pipe = Path(__file__).parents[1] / "forking.py", subprocess.PIPE
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, script]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as server:

        def run(command, processes, out, errors):
            given = {"command": [str(word) for word in command], "processes": processes}
            files = {"folder": str(Path.cwd()), "out": str(out), "errors": str(errors)}
            server.stdin.write(f"{json.dumps(given | files)}\n")
            server.stdin.flush()
            return int(server.stdout.readline())

        yield run
        server.stdin.close()
