"""Fixtures of several files of this room. What is optional is imported where it is needed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def server():
    """Forks workers on request: see tests/sweeping.py."""
    from studies import Server

    pipe = subprocess.PIPE
    environment = {**os.environ, "PYTHONHASHSEED": "1", "COLUMNS": "200"}
    script = str(Path(__file__).parents[1] / "sweeping.py")
    with subprocess.Popen(
        [sys.executable, script], stdin=pipe, stdout=pipe, text=True, env=environment
    ) as process:
        assert process.stdout.readline() == "ready\n"
        yield Server(process)
        process.kill()
