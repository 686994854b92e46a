"""Cells: who trains what."""

import datetime
import io
import json
import pickle

import pytest

pytest.importorskip("optuna")
pytest.importorskip("transformers")


from rich.console import Console
from studies import BASE, RECIPE, TASK, cell_of

from paceline.averaging import EMA, PowerEMA
from paceline.study.cells import Task, cells
from paceline.train import folder
from paceline.train.folder import locked
from paceline.train.recipe import Recipe

TEXT = "\n".join(f"line {i}: the quick brown fox jumps over {i * i} lazy dogs" for i in range(300))


@pytest.mark.parametrize(
    ("other", "same"),
    [
        (cell_of(BASE), True),
        (cell_of("pace:lr=0.01:kappa=0.30:pullback=1.0"), True),
        (cell_of(BASE, micro_batch=1), True),
        (cell_of(BASE, loaders=2), True),
        (cell_of(BASE, snapshots=3, choose=True), True),
        (cell_of(BASE, save_every=3), True),
        (cell_of(BASE, report_to=("none",)), True),
        (cell_of(BASE, gradient_checkpointing=True), True),
        (cell_of(BASE, seed=0, lr=0.5, pullback=7, kappa=0.9), True),  # the cell has its own
        (cell_of(BASE, seed=1), False),
        (cell_of(f"{BASE}:every=2"), False),
        (cell_of(f"{BASE}:return_kappa=0.7"), False),
        (cell_of(f"{BASE},{BASE}:return_kappa=0.7"), False),
        (cell_of("pace:pullback=1:kappa=0.3:lr=1.0000001e-2"), False),
        (cell_of("pace:cosine:pullback=1:kappa=0.3:lr=1e-2"), False),
        (cell_of(BASE, steps=7), False),
        (cell_of(BASE, batch=4), False),
        (cell_of(BASE, context=15), False),
        (cell_of(BASE, weight_decay=0.1), False),
        (cell_of(BASE, eval_examples=100), False),
        (cell_of(BASE, precision="bf16"), False),
        (cell_of(BASE, config={**RECIPE["config"], "n_embd": 16}), False),
        (cell_of(BASE, task=Task("tiny", TASK.recipe, TASK.recipe)), False),
        (cell_of(BASE, task=Task("another name", TASK.recipe)), True),
    ],
)
def test_a_cell_is_known_by_all_that_decides_it(other, same):
    assert (other.key == cell_of(BASE).key) == same


def test_where_a_start_comes_from_is_part_of_a_cell():
    starts = [Recipe(**{**RECIPE, **change}) for change in ({}, {"steps": 9}, {"lr": 0.5})]
    tasks = [Task("tiny", TASK.recipe, start) for start in starts]
    assert len({cell_of(BASE, task=task).key for task in tasks}) == 3
    assert len({task.start_folder for task in tasks}) == 3
    assert Task("tiny", TASK.recipe, Recipe(**RECIPE, loaders=2)).start_folder == (
        tasks[0].start_folder
    )
    assert TASK.start_folder is None


def test_methods_that_share_a_trajectory_are_one_cell():
    texts = ["adamw:lr=1e-2", "ema:kappa=0.3:lr=1e-2", "uniform:lr=1e-2", "pace:lr=1e-2"]
    texts += ["pace:lr=1e-2:return_kappa=0.7", "adamw:lr=1e-3", "ema:kappa=0.3:lr=1e-2"]
    methods = [TASK.recipe.method_of(text) for text in texts]
    found = cells(TASK, methods, (3, 4))
    assert [(len(cell.run.methods), cell.run.seed) for cell in found] == [
        *((3, 3), (2, 3), (1, 3)),
        *((3, 4), (2, 4), (1, 4)),
    ]
    assert [cell.trajectory.name for cell in found[:3]] == ["adamw", "pace", "adamw"]
    assert found[1].trajectory.get("return_kappa") is None
    # In whatever order they were asked for.
    assert found[0].key == cells(TASK, [methods[2], methods[1], methods[0]], (3,))[0].key


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.md"
    path.write_text(TEXT)
    return {"data": (str(path),)}


def test_a_real_cell(data, monkeypatch):
    """A worker's second cell is what it would have been as its first, and so is a shared one."""
    from paceline.study import cells as module

    first = cell_of(f"{BASE},{BASE}:return_kappa=0.7", **data)
    job = pickle.loads(pickle.dumps(first.train))  # as a worker gets it
    told = []
    result = job(lambda step, losses: told.append(step))
    assert told == sorted(told)
    assert told[-1] == 1000  # thousandths: what the bar of a job counts
    rows, log = result
    facts = {"setting": "tiny", "cell": first.key, "steps": 6, "name": "pace", "pullback": 1.0}
    facts |= {"lr": 0.01, "schedule": "constant", "seed": 0, "trained_with": first.run.name}
    facts |= {"tokens": 6 * 2 * 16}
    assert [row["step"] for row in rows] == [0, 3, 6] * 2
    assert [row["run"] for row in rows[2::3]] == first.run.names
    assert [row["label"] for row in rows[2::3]] == [m.label for m in first.run.methods]
    assert [row["return_kappa"] for row in rows[2::3]] == [None, 0.7]
    for row in rows[2::3]:
        assert facts.items() <= row.items()
        losses = [row[f"{name}_loss"] for name in ("train", "live", "returned", "selection")]
        assert len(set(losses)) == 4
        assert all(1 < loss < 7 for loss in losses)
        assert row["seconds"] > 0
        assert 0 < row["gain_mean"] <= 1
    assert rows[2]["live_loss"] == rows[5]["live_loss"]
    assert rows[2]["returned_loss"] != rows[5]["returned_loss"]
    assert [line["step"] for line in log] == [2, 4, 6]
    assert all({"step", "loss", "gain_mean", "clipped"} == set(line) for line in log)
    json.dumps([rows, log], allow_nan=False)

    def curve(cell, method=0):
        rows = cell.train(lambda step, losses: False).rows[3 * method : 3 * method + 3]
        return [[row["live_loss"], row["returned_loss"], row["selection_loss"]] for row in rows]

    seen = [[row["live_loss"], row["returned_loss"], row["selection_loss"]] for row in rows]
    watching = cell_of("adamw:lr=1e-2,ema:kappa=0.3:lr=1e-2", seed=1, **data)
    assert module._last_prepared is not None
    again = curve(watching, 1)  # on the first one's data
    assert curve(cell_of(f"{BASE}:return_kappa=0.7", **data)) == seen[3:]
    monkeypatch.setattr(module, "_last_prepared", None)
    alone = curve(cell_of("ema:kappa=0.3:lr=1e-2", seed=1, **data))
    assert alone == again
    assert again[0][0] != seen[0][0]  # from other weights
    # Another recipe gets its own data.
    other = cell_of(BASE, **data, context=8)
    assert curve(other) != seen[:3]
    assert cell_of(BASE, **data).train(lambda step, losses: step >= 500) is None


def test_cells_of_all_days_have_one_day(data, monkeypatch):
    from paceline.study import cells as module

    seen = []

    def assemble(recipe, *_):
        seen.append(recipe.date)
        raise InterruptedError

    monkeypatch.setattr(module, "_assemble", assemble)
    day = datetime.date(2024, 2, 29)
    for changes in ({}, {"date": day}):
        with pytest.raises(InterruptedError):
            cell_of(BASE, **data, **changes).train(lambda *_: False)
    assert seen == [module.DAY, day]


def test_cells_keep_no_averages(data, monkeypatch):
    from paceline.study import cells as module

    def assemble(recipe, *_):
        assert recipe.times_kept == 0
        raise InterruptedError

    monkeypatch.setattr(module, "_assemble", assemble)
    for method in (BASE, "adamw:lr=1e-2"):
        with pytest.raises(InterruptedError):
            cell_of(method, **data, snapshots=3, choose=True).train(lambda *_: False)


def test_what_watches_is_for_another_batch_too(data, tmp_path):
    """And its half-life of 64 tokens is the same at any batch: 2 steps of 32."""
    from paceline.study.cells import _assemble

    texts = "adamw:lr=1e-2,ema:kappa=0.3:lr=1e-2,ema:half_life=64 tokens:lr=1e-2"
    cell = cell_of(texts, **data, average_batch=1)
    recipe = Recipe(**cell.task.recipe.model_dump() | {"method": cell.trajectory.written})
    trainer = _assemble(recipe, tmp_path, cell.run.methods)
    trainer.create_optimizer()
    watching = next(iter(trainer.read_outs.values())).func.__self__
    assert watching.rules == [PowerEMA(0.3).scaled(2), EMA(half_life=2)]


def test_the_two_halves_share_nothing(data, tmp_path):
    from paceline.study.cells import _assemble

    cell = cell_of(BASE, **data)
    recipe = Recipe(**cell.task.recipe.model_dump() | {"method": cell.trajectory.written})
    trainer = _assemble(recipe, tmp_path, cell.run.methods)
    halves = {name: data["input_ids"] for name, data in trainer.eval_dataset.items()}
    assert list(halves) == ["selection", "test"]
    chosen_by, reported = ({tuple(ids) for ids in halves[name]} for name in halves)
    assert min(len(chosen_by), len(reported)) > 5
    assert abs(len(halves["selection"]) - len(halves["test"])) <= 1
    assert not chosen_by & reported


def test_a_start_that_was_killed_goes_on(tmp_path, monkeypatch):
    """By the run's own folder, in the cache; and it is made once."""
    from paceline.study import cells as module

    monkeypatch.setattr(module, "cache_folder", lambda: tmp_path)
    task = Task("tiny", TASK.recipe, Recipe(**RECIPE, seed=5))
    run = tmp_path / f"{task.start_folder.name}-run"
    given = []

    def killed(options, console):
        given.append(options)
        (run / "checkpoints").mkdir(parents=True)
        if len(given) == 2:  # the first was killed before it wrote its recipe
            (run / "recipe.yaml").write_text(options.to_yaml())
        raise SystemExit

    def finished(options, console):
        given.append(options)
        (run / "model").mkdir()
        (run / "model/config.json").write_text("{}")
        return run

    for train, error in ((killed, SystemExit), (killed, SystemExit), (lambda *_: None, None)):
        monkeypatch.setattr(module, "train_by", train)
        with pytest.raises(error or KeyboardInterrupt):
            task.make_start(Console(quiet=True))
    monkeypatch.setattr(module, "train_by", finished)
    for _ in range(2):
        task.make_start(Console(quiet=True))
    assert [options.resume for options in given] == [None, None, run]
    assert [options.out for options in given] == [run, run, None]
    assert given[2].seed == 5
    assert [path.name for path in tmp_path.iterdir()] == [task.start_folder.name]
    assert (task.start_folder / "config.json").exists()


def test_a_start_that_another_process_trains_is_waited_for(tmp_path, monkeypatch):
    from paceline.study import cells as module

    monkeypatch.setattr(module, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(folder, "WAIT", 0.01)
    monkeypatch.setattr(module, "train_by", lambda *_: pytest.fail("it is trained elsewhere"))
    task = Task("tiny", TASK.recipe, Recipe(**RECIPE, seed=6))
    waits = []

    def other(seconds):
        waits.append(seconds)
        if len(waits) == 2:
            task.start_folder.mkdir()

    monkeypatch.setattr(folder.time, "sleep", other)
    console = Console(file=io.StringIO(), width=300)
    with locked(tmp_path / f"{task.start_folder.name}-lock"):
        task.make_start(console)
    assert waits == [0.01, 0.01]
    assert console.file.getvalue().count("Waiting for another process: out: ") == 1
