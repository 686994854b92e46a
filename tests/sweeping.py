"""Sweeps whose trainings are a formula: workers to be killed, interrupted and raced.

Served from one process that has imported everything: each worker is a fork of it, and so are the
processes that it trains in, which takes milliseconds.
"""

import json
import math
import multiprocessing
import os
import signal
import sqlite3
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sqlalchemy

from paceline.cli import main
from paceline.study import ledger, runs, sweep
from paceline.study.cells import Cell, Result
from paceline.train.methods import Method

STEPS = 20
Losses = Callable[[Method, int], tuple[float, float]]  # of the halves: to choose by, to report


def valley(method: Method, seed: int) -> tuple[float, float]:
    """Lowest at a rate of 0.01, lower with a pull, and another for each seed."""
    loss = (math.log10(method.lr) + 2) ** 2 - 0.1 * (method.get("pullback") or 0)
    loss += 0.2 * (method.get("return_kappa") or method.kappa or 0.5)
    return 2 + loss, 2.5 + loss + 0.01 * seed


def result_of(cell: Cell, losses: Losses = valley) -> Result:
    """What a cell gives whose returned models have such losses."""
    curves = []
    for method in cell.run.methods:
        chosen_by, reported = losses(method, cell.run.seed)
        start = {"step": 0, "live_loss": 5.0, "returned_loss": 5.0, "selection_loss": 5.0}
        end = {"step": STEPS, "live_loss": 4.0, "returned_loss": reported}
        curves.append([start, {**end, "selection_loss": chosen_by}])
    facts = {"setting": cell.task.name, "cell": cell.key, "steps": STEPS}
    rows = [{**facts, **row} for row in cell.run.rows(curves, 1.0, 64)]
    return Result(rows, [{"step": STEPS, "loss": 4.0}])


@sqlalchemy.event.listens_for(sqlalchemy.Engine, "connect")
def hurry(connection: Any, _: Any) -> None:
    """Do not wait for the disk: nothing here outlives a power failure."""
    if isinstance(connection, sqlite3.Connection):
        connection.execute("PRAGMA synchronous = OFF")


# ---- in a worker --------------------------------------------------------------------------------

folder = Path()
acts: dict[str, Any] = {}  # part of a cell's name -> seconds that it takes, or how it ends


class Odd(Exception):
    """Pickled, but not made anew: that calls it with one argument."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


def train(cell: Cell, watch: Callable[[int, dict[str, float]], bool]) -> Result | None:
    """Note who trains what, then do what `acts` has for it."""
    with (folder / "trained").open("a", encoding="utf-8") as file:
        file.write(f"{os.getpid()} {cell.name}\n")
    act = next((act for part, act in acts.items() if part in cell.name), 0)
    if act == "raise":
        raise Odd("no such", "data")
    if act == "die in a put":
        before = (folder / "trained").read_text()
        time.sleep(0.3)
        if before.count(cell.name) == 2 and (folder / "trained").read_text() != before:
            (folder / "not alone").touch()
        runs._news._wlock.acquire()  # as if it was killed while it had what all need to write
    while act == "die when stopped" and not watch(500, {}):
        time.sleep(0.01)
    if isinstance(act, str):
        os._exit(3)
    end = time.monotonic() + act
    while time.monotonic() < end:
        if watch(500, {}):
            return None
        time.sleep(0.01)
    return result_of(cell)


def work(request: dict[str, Any]) -> int:
    """A worker: the command, or claims as fast as they can be made; an exit status."""
    global folder
    folder = Path(request["folder"])
    acts.update(request["acts"])
    for name, value in request["constants"].items():
        setattr(ledger, name, value)
    if request["arguments"]:
        return main(request["arguments"])
    plan = sweep.Tuning(sweep.read_study(folder / "sweep.yaml"))
    with ledger.Ledger(f"sqlite:///{folder / 'sweep.db'}", plan) as queue:
        (folder / f"{os.getpid()}.ready").touch()
        while len(list(folder.glob("*.ready"))) < 2:
            time.sleep(0.001)
        while queue.may_have_more():
            if job := queue.claim():
                queue.finish(job, job.call(lambda step, losses: False))
    return 0


# ---- the server ---------------------------------------------------------------------------------


def serve() -> None:
    """For each line, a request in JSON: start a worker and say its process, or wait for its end."""
    Cell.train = train  # type: ignore[method-assign]
    context = multiprocessing.get_context
    multiprocessing.get_context = lambda kind: context("fork")  # type: ignore[assignment]
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            print(status_of(request["wait"]), flush=True)
        elif "keys" in request:
            plan = sweep.Tuning(sweep.read_study(Path(request["keys"])))
            cells = plan.wanted(ledger.Outcomes({}, {}))
            print(json.dumps([cell.key for cell in cells]), flush=True)
        elif child := os.fork():
            print(child, flush=True)
        else:
            begin(request)


def begin(request: dict[str, Any]) -> None:
    """Be a worker, in a process group and with a terminal of its own."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    said = os.open(Path(request["folder"]) / "said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    status = 99
    try:
        status = work(request)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def status_of(child: int) -> int:
    """How a worker ended; -9 also if it did not, and had to be."""
    end = time.monotonic() + 120
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.002)
    return os.waitstatus_to_exitcode(ended[1])


if __name__ == "__main__":
    serve()
