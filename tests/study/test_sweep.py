"""Sweeps: what is tried, and which sweeps are refused."""

import itertools
import json
import math
import re
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("optuna")
pytest.importorskip("transformers")

from rich.console import Console
from studies import RECIPE, SWEEP, TASK, TRAININGS, needs_fork, study_in, sweep_in, worked_off
from sweeping import result_of

from paceline.cli import main
from paceline.study.cells import Task
from paceline.study.ledger import Outcomes
from paceline.study.sweep import Study, Tuning
from paceline.train import InputError
from paceline.train.folder import locked
from paceline.train.recipe import Recipe

NOTHING = Outcomes({}, {})


# ---- what is tried ---------------------------------------------------------------------------


def test_a_grid_is_all_of_each_family_and_then_the_chosen_on_other_seeds(tmp_path):
    plan = Tuning(study_in(tmp_path))
    first = plan.wanted(NOTHING)
    assert [cell.run.seed for cell in first] == [0] * 8
    assert [len(cell.run.methods) for cell in first] == [3, 1, 3, 1, 1, 1, 1, 1]
    assert [m.name for m in first[0].run.methods] == ["adamw", "ema", "ema"]
    assert len({cell.key for cell in first}) == 8
    # Until the last has ended, nothing is chosen.
    most = Outcomes({cell.key: result_of(cell) for cell in first[:-1]}, {})
    assert [cell.key for cell in plan.wanted(most)] == [cell.key for cell in first]
    outcomes = worked_off(plan)
    wanted = plan.wanted(outcomes)
    assert [cell.key for cell in wanted[:8]] == [cell.key for cell in first]
    assert len(wanted) == TRAININGS == len({cell.key for cell in wanted})
    assert {cell.run.seed for cell in wanted[8:]} == {1}
    assert [cell.run.methods for cell in wanted[8:]] == [
        next(c.run.methods for c in first if chosen.method in c.run.methods)
        for chosen in plan.chosen(outcomes)
        if chosen.name != "ema" or chosen.method not in wanted[8].run.methods
    ][: len(wanted[8:])]


def test_settings_may_be_tried_with_several_seeds(tmp_path):
    text = SWEEP.replace("seeds: [0, 1]", "seeds: [3, 1, 2]\ntuning_seeds: 2")
    plan = Tuning(study_in(tmp_path, text))
    assert [cell.run.seed for cell in plan.wanted(NOTHING)] == [3] * 8 + [1] * 8

    def losses(method, seed):  # 0.001 is the better one with one seed, 0.01 in the mean
        return {(3, 0.001): 1.0, (1, 0.001): 9.0}.get((seed, method.lr), 4.0), 1.0

    outcomes = worked_off(plan, losses)
    assert [chosen.method.lr for chosen in plan.chosen(outcomes)] == [0.01] * 3
    assert [chosen.selection for chosen in plan.chosen(outcomes)] == [4.0] * 3
    assert {cell.run.seed for cell in plan.wanted(outcomes)[16:]} == {2}


@needs_fork
@pytest.mark.parametrize("sampler", ["grid", "random", "tpe"])
def test_all_workers_want_the_same(server, tmp_path, sampler):
    """Also one whose hashes of texts are others."""
    rates = "{low: 1e-4, high: 1e-1}" if sampler != "grid" else "[1e-3, 1e-2]"
    text = f"""
    recipe: RECIPE
    methods:
      adamw: {{lr: {rates}, schedule: [constant, wsd]}}
      ema: {{lr: {rates}, kappa: [0.3, 0.7]}}
      pace: {{lr: {rates}, pullback: [0.1, 1], kappa: 0.3}}
    sampler: {sampler}
    trials: 3
    """
    plan = Tuning(study_in(tmp_path, text))
    keys = [cell.key for cell in plan.wanted(NOTHING)]
    assert server.ask(keys=str(tmp_path / "sweep.yaml")) == keys
    assert len(set(keys)) == len(keys)
    outcomes = worked_off(plan)
    trainings = {chosen.name: chosen.trainings for chosen in plan.chosen(outcomes)}
    assert trainings == {"adamw": 3, "ema": 2 if sampler == "grid" else 3, "pace": 3}
    models = [chosen.models for chosen in plan.chosen(outcomes)]
    assert models[1] == 2 * trainings["ema"]  # both averages of each training


RANGES = """
recipe: RECIPE
methods:
  ema: {lr: {low: 1e-4, high: 1e-1}, kappa: [0.3, 0.7]}
  pace: {lr: {low: 1e-4, high: 1e-1}, pullback: [0.1, 1], schedule: [constant, wsd]}
sampler: SAMPLER
trials: 10
seeds: [0]
"""


def test_random_trials_are_within_their_ranges_and_lists(tmp_path):
    plan = Tuning(study_in(tmp_path, RANGES.replace("SAMPLER", "random")))
    own = plan.tried(NOTHING)
    for name in ("ema", "pace"):
        assert len(own[name]) == len(set(own[name])) == 10
        rates = [trial[0].lr for trial in own[name]]
        assert all(1e-4 <= rate <= 1e-1 for rate in rates)
        assert 2 < sum(rate < 3e-3 for rate in rates) < 8  # on a logarithmic scale
    assert all({m.kappa for m in trial} == {0.3, 0.7} for trial in own["ema"])
    assert {(trial[0].get("pullback"), trial[0].schedule) for trial in own["pace"]} == set(
        itertools.product((0.1, 1.0), ("constant", "wsd"))
    )


def test_a_part_of_a_grid_is_drawn_at_random(tmp_path):
    text = SWEEP + "sampler: random\ntrials: 3\n"
    plan = Tuning(study_in(tmp_path, text))
    own = plan.tried(NOTHING)
    assert {name: len(trials) for name, trials in own.items()} == {"adamw": 3, "ema": 2, "pace": 3}
    grid = {name: set(trials) for name, trials in Tuning(study_in(tmp_path)).tried(NOTHING).items()}
    assert all(set(trials) <= grid[name] for name, trials in own.items())


def test_tpe_goes_on_round_by_round_and_hears_what_came_of_each(tmp_path):
    study = study_in(tmp_path, RANGES.replace("SAMPLER", "tpe").replace("10", "14"))
    plan = Tuning(study)
    # One by one, and the last first: until a family's round has ended, it wants nothing else.
    finished, before, grew = {}, [], []
    while left := [c for c in plan.wanted(Outcomes(finished, {})) if c.key not in finished]:
        count = Counter(cell.trajectory.name for cell in plan.wanted(Outcomes(finished, {})))
        if count != before:
            grew.append(count)
            before = count
        finished[left[-1].key] = result_of(left[-1])
    assert grew[0] == {"adamw": 4, "pace": 4}  # of ema AdamW
    assert [count["pace"] for count in grew[1:]][:3] == [8, 12, 14]
    assert [count["adamw"] for count in grew[1:]][-3:] == [8, 12, 14]
    again = worked_off(Tuning(study))
    assert again.finished.keys() == finished.keys()
    assert [chosen.trainings for chosen in plan.chosen(again)] == [14, 14]
    # Others come of other losses, but not before there are any.
    other = worked_off(Tuning(study), lambda method, seed: (5 - math.log10(method.lr), 1.0))
    common = other.finished.keys() & finished.keys()
    assert 8 <= len(common) < 28
    near = [cell.trajectory.lr for cell in plan.wanted(Outcomes(finished, {}))]
    far = [cell.trajectory.lr for cell in Tuning(study).wanted(other)]
    assert max(far) == pytest.approx(0.1, rel=0.3)
    assert sum(map(math.log, far[-4:])) > sum(map(math.log, near[-4:]))


def test_tpe_hears_of_failures_and_divergence(tmp_path):
    plan = Tuning(study_in(tmp_path, RANGES.replace("SAMPLER", "tpe")))
    outcomes = worked_off(
        plan,
        lambda method, seed: (math.inf if method.lr > 1e-2 else 1.0, 1.0),
        failing=lambda cell: cell.trajectory.lr < 1e-3,
    )
    assert outcomes.failed
    for chosen in plan.chosen(outcomes):
        assert chosen.trainings == 10
        assert 1e-3 <= chosen.method.lr <= 1e-2


def test_tpe_hears_of_the_best_model_of_each_training(tmp_path):
    text = """
    recipe: RECIPE
    methods: {ema: {lr: {low: 1e-4, high: 1e-1}, kappa: [0.3, 0.7]}}
    sampler: tpe
    trials: 16
    seeds: [0]
    """
    study = study_in(tmp_path, text)

    def of_others(loss):  # what the worse model of each training has
        def losses(method, seed):
            best = (math.log10(method.lr) + 2) ** 2
            return (best if method.kappa == 0.3 else 9 + loss(best)), 1.0

        return worked_off(Tuning(study), losses).finished.keys()

    assert of_others(lambda best: 0) == of_others(lambda best: -best)


def test_trials_of_tpe_that_are_the_same_count_once(tmp_path):
    text = "recipe: RECIPE\nmethods: {adamw: {lr: [1e-3, 1e-2]}}\nsampler: tpe\ntrials: 9\n"
    plan = Tuning(study_in(tmp_path, text))
    outcomes = worked_off(plan)
    (chosen,) = plan.chosen(outcomes)
    assert (chosen.trainings, chosen.models) == (2, 2)


# ---- input -----------------------------------------------------------------------------------


GOOD = {"recipe": "RECIPE", "methods": {"adamw": {"lr": [1e-3, 1e-2]}, "ema": {}}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipe": "tiny-gtp2"}, "unknown recipe 'tiny-gtp2'; did you mean"),
        ({"recipe": None}, "recipe: "),
        ({"start": "nothing-like-it"}, "unknown recipe 'nothing-like-it'"),
        ({"change": {"step": 3}}, "unknown key 'step'; did you mean 'steps'?"),
        ({"change": {"steps": 0}}, "steps: .*greater than or equal to 1"),
        ({"change": {"epochs": 1}}, "steps, epochs, tokens: give only one of them"),
        ({"change": 3}, "change: .*dictionary"),
        ({"methods": None}, "methods: .*dictionary"),
        ({"methods": {}}, "methods: give at least one"),
        ({"methods": {"adamw": None}}, "methods: .*dictionary"),
        ({"methods": {"adamv": {}}}, "adamv: unknown method 'adamv'; did you mean 'adamw'"),
        ({"methods": {"x": {"method": 3}}}, "x: unknown method '3'"),
        (
            {"methods": {"x": {"method": "pullback:sdg"}}},
            "x: method 'pullback:sdg': unknown optimizer 'sdg'",
        ),
        ({"methods": {"adamw": {"pullback": 1}}}, "adamw: method .* has no option 'pullback'"),
        ({"methods": {"adamw": {"lr": []}}}, "adamw: lr: the list is empty"),
        ({"methods": {"adamw": {"lr": [1e-3, -1]}}}, "adamw: .*lr: .*greater than 0"),
        ({"methods": {"adamw": {"lr": None}}}, "adamw: .*lr: .*valid number"),
        ({"methods": {"adamw": {"schedule": 5}}}, "adamw: method .*unknown schedule '5'"),
        ({"methods": {"adamw": {"lr": {"low": 1e-3, "high": 1}}}}, "lr: sampler grid needs a list"),
        ({"sampler": "grit"}, "sampler: must be 'grid', 'random' or 'tpe'"),
        ({"sampler": "tpe"}, "trials: give a number of trials with sampler tpe"),
        ({"sampler": "random", "methods": {"adamw": {"lr": {"low": 1e-3, "high": 1}}}},
         "trials: give a number of trials with sampler random"),
        *(
            ({"sampler": "tpe", "trials": 3, "methods": {"ema": {"kappa": value}}}, message)
            for value, message in (
                ({"low": 0.1}, "ema: kappa: .*high"),
                ({"low": 0, "high": 1}, "ema: kappa: .*low"),
                ({"low": 0.5, "high": 0.1}, "ema: kappa: "),
                ({"low": 0.1, "high": 2}, "ema: .*kappa: .*less than or equal to 1"),
                ({"low": "a", "high": 2}, "ema: kappa: "),
                ({"low": 0.1, "high": 1, "log": False}, "ema: kappa: "),
            )
        ),
        ({"trials": 0}, "trials: .*greater than or equal to 1"),
        ({"seeds": []}, "seeds: .*at least 1"),
        ({"seeds": [0, 0]}, "seeds: give each only once"),
        ({"seeds": [-1]}, "seeds: .*greater than or equal to 0"),
        ({"seeds": 3}, "seeds: .*tuple"),
        ({"tuning_seeds": 4}, "tuning_seeds: 4 leaves none of the 4 seeds to report; give more"),
        ({"baseline": "adam"}, "baseline: unknown method 'adam'; did you mean 'adamw'?"),
        ({"methdos": {}}, "unknown key 'methdos'; did you mean 'methods'?"),
        ({"method": "pace"}, "unknown key 'method'; did you mean 'methods'?"),
        ({"change": {"learning_rate": 3}}, "unknown key 'learning_rate'; did you mean 'lr'?"),
        ({"change": {"seed": 3}}, "change: seed: "),
        (
            {"methods": {"pace": {"pullback": 1}}, "change": {"pullback": 3}},
            "change: pullback: pace:pullback=1 has its own, or none; leave pullback out",
        ),
    ],
)  # fmt: skip
def test_bad_sweeps_are_one_line_and_status_2(change, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweep_in(tmp_path, json.dumps({**GOOD, **change}))
    refused(["sweep.yaml"], message, capsys)


def refused(arguments, message, capsys):
    assert main(["sweep", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("paceline: ")
    assert re.search(message, error), error
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("", ["nowhere.yaml"], "cannot read the sweep nowhere.yaml: No such file"),
        ("", ["."], "cannot read the sweep .: Is a directory"),
        ("a: [1", [], "sweep.yaml is not YAML"),
        ("a: 1\na: 2", [], "'a' is given twice"),
        ("- 1", [], "is not a mapping of keys to values"),
        ("", [], "is not a mapping of keys to values"),
        ("1: 2", [], "is not a mapping of keys to values"),
        (b"\xff\xfe\x00\xd8", [], "is not YAML"),
    ],
)
def test_bad_files_are_one_line_and_status_2(
    text, arguments, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("sweep.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(arguments or ["sweep.yaml"], message, capsys)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("sweep.db", "storage: sweep.db: .*give a database such as sqlite:///"),
        ("oracel://x/y", "storage: oracel://x/y: "),
        ("redis://localhost", "storage: redis://localhost: "),
        ("sqlite:////nowhere/at/all/sweep.db", "storage: .*unable to open database file"),
        ("sqlite:///sweep.yaml", "storage: .*not a database"),
        ("sqlite:///recipe.yaml?mode", "storage: "),
    ],
)
def test_unusable_storages_are_one_line_and_status_2(url, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between tries to open it
    sweep_in(tmp_path, json.dumps(GOOD))
    assert main(["sweep", "sweep.yaml", "--storage", url, "--out", "out"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error), error


def test_an_unusable_folder(tmp_path, capsys):
    sweep_in(tmp_path, json.dumps(GOOD))
    out = str(tmp_path / "sweep.yaml" / "out")
    assert main(["sweep", str(tmp_path / "sweep.yaml"), "--out", out]) == 2
    assert "out: cannot make the folder" in capsys.readouterr().err


def test_a_folder_that_a_run_or_a_comparison_writes(tmp_path, capsys):
    sweep_in(tmp_path)
    command = ["sweep", str(tmp_path / "sweep.yaml"), "--show", "--out", str(tmp_path / "out")]
    with locked(tmp_path / "out"):
        assert main(command) == 2
    assert "out is in use by process" in capsys.readouterr().err
    with locked(tmp_path / "out", shared=True):  # as another worker of this sweep
        assert main(command) == 0
    (tmp_path / "out" / "recipe.yaml").touch()
    (tmp_path / "out" / "checkpoints").mkdir()
    assert main(command) == 2
    assert "out is the folder of a run; name another" in capsys.readouterr().err


def test_a_sweep_with_a_start_trains_it_once(tmp_path, monkeypatch):
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "cache"))
    study = study_in(tmp_path, json.dumps({**GOOD, "start": "RECIPE"}))
    assert study.task.name == "recipe on recipe"
    made = []

    def train_by(options, console):
        made.append(options)
        (options.out / "model").mkdir(parents=True)
        (options.out / "model" / "weights").write_text("trained")
        return options.out

    monkeypatch.setattr("paceline.study.cells.train_by", train_by)
    for _ in range(2):
        study.task.make_start(Console(quiet=True))
    assert len(made) == 1
    assert made[0].steps == 6
    assert (study.task.start_folder / "weights").read_text() == "trained"
    assert list((tmp_path / "cache").iterdir()) == [study.task.start_folder]
    monkeypatch.setattr("paceline.study.cells.train_by", lambda *_: None)  # Ctrl-C
    other = Task("other", TASK.recipe, Recipe(**RECIPE, lr=0.5))
    with pytest.raises(KeyboardInterrupt):
        other.make_start(Console(quiet=True))


def test_study_keys_are_as_documented():
    assert set(Study.model_fields) == {
        *("recipe", "start", "change", "methods", "baseline", "sampler", "trials", "seeds"),
        "tuning_seeds",
    }
    with pytest.raises(InputError, match="methods: "):
        Study(recipe="tiny-gpt2")
