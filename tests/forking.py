"""Starts `python -m MODULE ...` or a script; each process is a fork of this one.

This one has imported all, so they start in milliseconds. A line of input is a request in JSON,
with the arguments of `serve`. The answer is the exit status, negative for a signal; of several
processes that of the first that failed.
"""

import json
import os
import runpy
import signal
import socket
import sys
import traceback
import warnings
from typing import Any

import trl.trainer.sft_trainer  # noqa: F401
from transformers.models import gpt2, llama  # noqa: F401

from paceline.train import verify  # noqa: F401


def serve(command: list[str], processes: int, folder: str, out: str, errors: str) -> int:
    """Run a command in a folder, as ranks if in several processes; they write to two files."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running, failed = set(), 0
    for rank in range(processes):
        ranked = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
        if child := os.fork():
            running.add(child)
        else:
            os.environ |= {k: str(x) for k, x in ranked.items() if processes > 1}
            run(command, folder, out, errors)
    while running:
        child, status = os.wait()
        running.remove(child)
        if status and not failed:
            failed = os.waitstatus_to_exitcode(status)
            for other in running:
                os.kill(other, signal.SIGTERM)
    return failed


def run(command: list[str], folder: str, out: str, errors: str) -> None:
    """Be the command, and end with it."""
    os.chdir(folder)
    for number, path in enumerate((out, errors), 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    module, *sys.argv[1:] = command
    warnings.filterwarnings("ignore", module="runpy")  # that it has been imported
    start: Any = runpy.run_path if module.endswith(".py") else runpy.run_module
    status: Any = 0
    try:
        start(module, run_name="__main__")
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    for line in sys.stdin:
        print(serve(**json.loads(line)), flush=True)
