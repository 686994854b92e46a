"""A ledger on a real PostgreSQL server, where Debian's package has put one."""

import os
import pwd
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import pytest

pytest.importorskip("optuna")
pytest.importorskip("transformers")
pytest.importorskip("psycopg")

from studies import BASE, cell_of, finish
from sweeping import result_of
from test_ledger import Fixed

from paceline.study import ledger as ledgers
from paceline.study.ledger import Ledger

PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
pytestmark = pytest.mark.skipif(not PROGRAMS, reason="needs Debian's package postgresql")
CELLS = [cell_of("adamw:lr=1e-3"), cell_of("adamw:lr=1e-2"), cell_of(BASE), cell_of(BASE, seed=1)]


class Server:
    """A server of its own, reached by a socket in its folder."""

    def __init__(self, folder):
        self.folder = folder
        self.user = "postgres" if os.getuid() == 0 else None  # it does not run as root
        owner = self.user or pwd.getpwuid(os.getuid()).pw_name
        if self.user:
            shutil.chown(folder, self.user)
        self.url = f"postgresql://{owner}@/postgres?host={folder}"
        self.call("initdb", "-D", f"{folder}/data", "--no-sync", "-A", "trust")

    def call(self, program, *arguments):
        command = [str(PROGRAMS[-1] / program), *arguments]
        out = subprocess.DEVNULL
        subprocess.run(command, user=self.user, check=True, cwd=self.folder, stdout=out, stderr=out)

    def start(self):
        options = f"-k {self.folder} -c listen_addresses= -c fsync=off"
        data = f"{self.folder}/data"
        self.call("pg_ctl", "start", "-w", "-D", data, "-o", options, "-l", f"{self.folder}/log")

    def stop(self):
        self.call("pg_ctl", "stop", "-w", "-D", f"{self.folder}/data", "-m", "immediate")


@pytest.fixture(scope="module")
def server():
    folder = tempfile.mkdtemp(prefix="pg-", dir="/tmp")  # a socket's path has 107 characters
    try:
        server = Server(folder)
        server.start()
        yield server
        server.stop()
    finally:
        shutil.rmtree(folder)


def test_two_workers_share_a_server_that_is_killed_on_the_way(server, monkeypatch):
    monkeypatch.setattr(ledgers, "POLL", 0)
    monkeypatch.setattr(ledgers, "PAUSES", (0.2,) * 50)
    by_name = {cell.name: cell for cell in CELLS}
    with Ledger(server.url, Fixed(*CELLS)) as a, Ledger(server.url, Fixed(*CELLS)) as b:
        jobs = [(ledger, ledger.claim()) for ledger in (a, b, a, b)]
        assert [job.name for _, job in jobs] == [cell.name for cell in CELLS]
        assert a.claim() is b.claim() is None
        server.stop()
        back = threading.Timer(0.5, server.start)
        back.start()
        for ledger, job in jobs:
            finish(ledger, job, by_name[job.name])
        back.join()
        for ledger in (a, b):
            ledger.look()
            assert not ledger.may_have_more()
            assert ledger.outcomes.finished == {cell.key: result_of(cell) for cell in CELLS}
