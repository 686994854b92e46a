"""Workers of a sweep, killed and not."""

import csv
import json
import os
import signal
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("optuna")
pytest.importorskip("transformers")

from studies import TRAININGS, cell_of, finish, needs_fork, study_in, sweep_in
from sweeping import result_of

from paceline.cli import main
from paceline.study import ledger as ledgers
from paceline.study.ledger import Ledger, Outcomes
from paceline.study.sweep import Tuning

TABLES = ("best.csv", "equal.csv", "report.md", "metrics.jsonl", "training.jsonl")


def trained(folder):
    """How often each cell's training was begun."""
    path = folder / "trained"
    lines = path.read_text().splitlines() if path.exists() else []
    return Counter(line.partition(" ")[2] for line in lines)


def wait_for(condition):
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def tables(folder):
    return {name: (folder / name).read_text() for name in TABLES}


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):
    """The folder of a sweep that nothing happened to."""
    folder = sweep_in(tmp_path_factory.mktemp("whole"))
    assert server.run(folder) == 0, (folder / "said").read_text()
    assert set(trained(folder).values()) == {1}
    assert len(trained(folder)) == TRAININGS
    return folder


@needs_fork
def test_what_a_sweep_leaves(whole, server):
    assert json.loads((whole / "manifest.json").read_text())["baseline"] == "adamw"
    metrics = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    # Two points of each model: of AdamW's trainings three, with wsd one, one of each pull; and
    # with the other seed.
    assert len(metrics) == 2 * (2 * 3 + 2 * 1 + 4 * 1 + 3 + 1)
    keys = {"setting", "cell", "run", "trained_with", "label", "name", "lr", "seed", "step"}
    keys |= {"steps", "live_loss", "returned_loss", "selection_loss", "seconds", "tokens"}
    assert all(keys <= set(row) for row in metrics)
    manifest = json.loads((whole / "manifest.json").read_text())
    assert (manifest["trainings"], manifest["finished"], manifest["failed"]) == (10, 10, {})
    assert manifest["configuration"]["seeds"] == [0, 1]
    assert manifest["tasks"]["recipe"]["recipe"]["steps"] == 6
    best = list(csv.DictReader((whole / "best.csv").read_text().splitlines()))
    assert [(row["method"], float(row["lr"]), row["trainings"], row["seeds"]) for row in best] == [
        ("pace", 0.01, "4", "1"),
        ("ema", 0.01, "2", "1"),
        ("adamw", 0.01, "4", "1"),
    ]
    said = (whole / "said").read_text()
    report = (whole / "report.md").read_text()
    for line in (
        "of the chosen settings with seed 1. These seeds chose nothing.",
        "No best was found for adamw: lr at the top of its grid. Widen the grid.",
        "No best was found for pace: lr at the top, pullback at the top of its grid.",
    ):
        assert line in " ".join(said.split())
        assert line in report
    title, verdict, first = [line for line in report.splitlines() if line][:3]
    assert title == f"# {whole.name}"
    assert verdict == "**No difference shown from adamw: pace and ema.**"
    assert first.startswith("- ")
    assert verdict.strip("*") in said
    assert "Not every method chose from the same number of trainings" in said
    assert "adamw 4 trainings, 4 models; ema 2 trainings, 4 models; pace 4 trainings" in said
    # Nothing is run to show it, or to do it again.
    before = tables(whole)
    for options in ((), ("--show",)):
        assert server.run(whole, *options) == 0
        assert tables(whole) == before
    assert set(trained(whole).values()) == {1}
    assert not list(whole.glob(".*"))


@needs_fork
def test_two_workers_that_claim_as_fast_as_they_can(server, tmp_path):
    rates = [f"{i}e-3" for i in range(1, 17)]
    text = f"recipe: RECIPE\nmethods: {{adamw: {{lr: [{', '.join(rates)}]}}}}\nseeds: [0]\n"
    folder = sweep_in(tmp_path, text)
    workers = [server.start(folder, claims_only=True) for _ in range(2)]
    assert [server.wait(process) for process in workers] == [0, 0], (folder / "said").read_text()
    assert len(trained(folder)) == 16
    assert set(trained(folder).values()) == {1}
    lines = (folder / "trained").read_text().splitlines()
    assert len({line.partition(" ")[0] for line in lines}) == 2  # both had some


@needs_fork
def test_killed_and_started_twice_it_ends_as_if_it_had_not_been(server, whole, tmp_path):
    folder = sweep_in(tmp_path / whole.name)
    process = server.start(folder, "--workers", "1", acts={"": 0.1})
    wait_for(lambda: len(trained(folder)) >= 4)
    os.kill(process, signal.SIGKILL)
    assert server.wait(process) == -signal.SIGKILL
    begun = list(trained(folder))
    child = int((folder / "trained").read_text().split()[0])
    wait_for(lambda: not Path(f"/proc/{child}").exists() or os.name != "posix")
    workers = [server.start(folder, "--workers", "2", acts={"": 0.1}) for _ in range(2)]
    assert [server.wait(process) for process in workers] == [0, 0], (folder / "said").read_text()
    twice = [name for name, times in trained(folder).items() if times > 1]
    assert twice in ([], [begun[-1]])  # the one that was under way
    assert max(trained(folder).values()) <= 2
    assert len(trained(folder)) == TRAININGS
    for name, text in tables(whole).items():
        assert tables(folder)[name] == text, name


@needs_fork
def test_failures_are_recorded_and_the_rest_goes_on(server, tmp_path):
    folder = sweep_in(tmp_path)
    dying = {f"recipe: adamw-{name}-seed0" for name in ("lr0.001", "wsd-lr0.001")}
    raising = "recipe: adamw-wsd-lr0.01-seed0"
    acts = {**dict.fromkeys(dying, "die in a put"), raising: "raise", "": 0.02}
    sudden = "recipe: pace-pullback1-kappa0.3-lr0.001-seed0"  # while the next cell is claimed
    acts, dying = {sudden: "die", **acts}, {*dying, sudden}
    assert server.run(folder, "--workers", "2", acts=acts) == 1, (folder / "said").read_text()
    failed = json.loads((folder / "manifest.json").read_text())["failed"]
    assert set(failed) == {*dying, raising}
    assert failed[raising] == "Odd: no such data"
    assert all("worker process died" in failed[name] for name in dying)
    said = " ".join((folder / "said").read_text().split())
    for name, reason in failed.items():
        assert f"Failed: {name}: {reason}" in said
    times = trained(folder)
    assert [times.pop(name) for name in dying] == [2, 2, 2]  # once more, alone
    assert not (folder / "not alone").exists()
    assert times.pop(raising) == 1
    assert len(times) == TRAININGS - 4
    assert max(times.values()) <= 2  # of what was under way as one died
    best = list(csv.DictReader((folder / "best.csv").read_text().splitlines()))
    assert {row["method"] for row in best} == {"adamw", "ema", "pace"}
    # Not again, until that is asked for; then nothing else.
    before = trained(folder)
    assert server.run(folder) == 1
    assert trained(folder) == before
    assert server.run(folder, "--retry-failed") == 0
    assert sorted((trained(folder) - before).elements()) == sorted(failed)
    assert json.loads((folder / "manifest.json").read_text())["failed"] == {}


@needs_fork
def test_ctrl_c_gives_back_what_is_under_way(server, whole, tmp_path):
    folder = sweep_in(tmp_path / whole.name)
    # One stops when it is told to; the other's process dies then, which is not its failure.
    acts = {"pace-pullback0.1-kappa0.3-lr0.001": "die when stopped", "pace": 60}
    process = server.start(folder, "--workers", "2", acts=acts)
    wait_for(lambda: sum("pace" in name for name in trained(folder)) == 2)
    os.killpg(process, signal.SIGINT)  # as a terminal does: to parent and workers alike
    assert server.wait(process) == 130
    said = (folder / "said").read_text()
    assert "4 of 8 trainings are left; the same command resumes." in said
    assert "Traceback" not in said
    assert "Failed" not in said
    assert json.loads((folder / "manifest.json").read_text())["failed"] == {}
    assert not (folder / "best.csv").exists()
    assert not list(folder.glob(".*"))
    stopped = [name for name in trained(folder) if "pace" in name]
    assert server.run(folder) == 0
    assert {name for name, times in trained(folder).items() if times > 1} == set(stopped)
    for name, text in tables(whole).items():
        assert tables(folder)[name] == text, name


def test_failures_of_another_sweep_on_the_storage_are_not_ours(tmp_path, capsys):
    text = "recipe: RECIPE\nmethods: {adamw: {lr: 1e-3}}\nseeds: [SEED]\n"
    for seed in (7, 8):
        plan = Tuning(study_in(tmp_path, text.replace("SEED", str(seed))))
        with Ledger(f"sqlite:///{tmp_path / 'sweep.db'}", plan) as ledger:
            job = ledger.claim()
            if seed == 7:
                ledger.fail(job, "no memory")
            else:
                finish(ledger, job, *ledger.wanted)
    assert main(["sweep", str(tmp_path / "sweep.yaml"), "--out", str(tmp_path)]) == 0
    assert "Failed" not in capsys.readouterr().out
    assert json.loads((tmp_path / "manifest.json").read_text())["failed"] == {}


def test_two_workers_may_write_the_tables_at_once(tmp_path):
    """As those that wait for the last cell do."""
    cell = cell_of()
    outcomes = Outcomes({cell.key: result_of(cell)}, {})
    inner = SimpleNamespace(outcomes=outcomes, wanted=[cell], failures=dict)

    class Slow(dict):
        def __getitem__(self, key):  # while this one writes its lines
            ledgers.write_rows(inner, tmp_path, {})
            return super().__getitem__(key)

    outer = SimpleNamespace(
        outcomes=Outcomes(Slow(outcomes.finished), {}), wanted=[cell], failures=dict
    )
    ledgers.write_rows(outer, tmp_path, {})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == result_of(cell).rows
    assert not list(tmp_path.glob(".*"))
