"""PACE for JAX: the tests of optax_apart.py, in a process of their own.

JAX has threads, so that a process which has imported it should not fork; other tests do.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_pace_for_jax():
    if not importlib.util.find_spec("optax"):
        pytest.skip("optax is not installed (extra `jax`)")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    path = Path(__file__).with_name("optax_apart.py")
    done = subprocess.run([*command, path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
