"""A batch and a context that fit the data and the model."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers")
pytest.importorskip("trl")

from datasets import Dataset
from training import read, write_recipe

from paceline.cli import main
from paceline.train import InputError, build
from paceline.train.build import build_fitting, build_trainer
from paceline.train.recipe import Recipe, read_recipe

pytestmark = pytest.mark.usefixtures("surroundings", "quiet")

FITS = [  # sequences, batch, micro-batch, processes -> what fits
    ((36, 128, None, 1), {"batch": 4, "micro_batch": None}),
    ((127, 128, 32, 1), {"batch": 8, "micro_batch": 8}),
    ((127, 128, 3, 1), {"batch": 8, "micro_batch": 2}),
    ((7, 8, None, 1), {"batch": 1, "micro_batch": None}),
    ((40, 128, 16, 2), {"batch": 4, "micro_batch": 2}),
    ((2, 128, None, 2), {"batch": 2, "micro_batch": None}),
]


@pytest.mark.parametrize(("given", "instead"), FITS, ids=str)
def test_a_batch_that_fits_leaves_an_epoch_eight_steps(given, instead):
    count, batch, micro, processes = given
    recipe = SimpleNamespace(batch=batch, micro_batch=micro, task="sft", context=32)
    data = Dataset.from_dict({"input_ids": [[1, 2]] * count})
    with pytest.raises(build.DoesNotFit, match=f"^batch: {batch} .* the {count} in") as error:
        build._check_batch(recipe, data, processes)
    assert error.value.instead == instead
    recipe.batch = count
    build._check_batch(recipe, data, processes)


def test_of_a_short_text_the_pieces_are_shorter():
    recipe = SimpleNamespace(batch=128, micro_batch=None, task="pretrain", context=1280)
    data = Dataset.from_dict({"input_ids": [[1] * 700]})
    with pytest.raises(build.DoesNotFit) as error:
        build._check_batch(recipe, data, 1)
    assert error.value.instead == {"context": 64}
    with pytest.raises(InputError, match=r"more than the 1 in the data, and than the 2 processes"):
        build._check_batch(recipe, data, 2)


def test_what_fits_is_taken_aloud(values, tmp_path, capfd):
    changes = {"batch": 100, "context": 2000, "micro_batch": 50, "eval_data": None}
    recipe, trainer = build_fitting(Recipe(**{**values, **changes}), tmp_path)
    assert (recipe.batch, recipe.micro_batch, recipe.context) == (8, 8, 64)
    assert trainer.args.per_device_train_batch_size == 8
    assert trainer.args.max_length == 64
    assert capfd.readouterr().err == (
        "paceline: batch: 100 sequences a step are more than the 65 in the data, so --batch 8 and "
        "--micro-batch 8 is taken\n"
        "paceline: context: 2000 tokens are more than the model's 64, so --context 64 is taken\n"
        "paceline: data: kept 65 of 65 conversations to train on, context 64: 3 longer than the "
        "context, and cut off there\n"
        "paceline: data: 7 of 72 rows are held out to evaluate on\n"
        "paceline: data: kept 64 of 65 sequences to train on: 1 does not fill a batch of 8\n"
    )
    recipe, trainer = build_fitting(Recipe(**{**values, "context": 3}), tmp_path, only_data=True)
    assert recipe.context > 3
    assert "has anything to learn in its first 3 tokens, so --context" in capfd.readouterr().err
    with pytest.raises(
        InputError, match="^context: 2000 tokens are more than the model's 64; give"
    ):
        build_trainer(Recipe(**{**values, "context": 2000}), tmp_path)


def test_half_lives_of_data_are_those_of_the_batch_that_fits(values, tmp_path):
    """Which a run that is resumed reads in its recipe."""
    changes = {"batch": 100, "eval_data": None, "method": "ema:half_life=800 samples"}
    recipe, _ = build_fitting(Recipe(**{**values, **changes}), tmp_path, only_data=True)
    assert recipe.batch == 8
    assert recipe.parsed.half_life == 100
    assert Recipe(**recipe.model_dump()).parsed == recipe.parsed


def test_what_does_not_fit_leaves_no_process_waiting(values, tmp_path, monkeypatch):
    """An error that leaves `main_process_first` would skip the barrier that others wait at."""
    ended = []

    @contextmanager
    def first(self):
        try:
            yield
        except BaseException:
            ended.append("by an error")
            raise
        ended.append("in order")

    monkeypatch.setattr("accelerate.PartialState.main_process_first", first)
    for changes in ({"context": 3}, {"data": (str(tmp_path / "nothing.jsonl"),)}):
        with pytest.raises(InputError):
            build_trainer(Recipe(**{**values, **changes}), tmp_path, only_data=True)
    assert ended == ["in order"] * 2


def test_a_run_of_few_conversations_takes_what_fits_and_resumes(values, tmp_path, capfd):
    run = tmp_path / "run"
    recipe = write_recipe(tmp_path / "recipe.yaml", values, batch=128, context=1280, steps=2)
    assert main(["train", str(recipe), "--out", str(run)]) == 0
    said = capfd.readouterr().err
    assert "so --batch 8 is taken" in said
    assert "so --context 64 is taken" in said
    own = read_recipe(str(run / "recipe.yaml"))
    assert (own["batch"], own["context"]) == (8, 64)
    assert read(run / "manifest.json")["recipe"]["batch"] == 8
    assert main(["train", "--resume", str(run)]) == 0
    assert capfd.readouterr().err == ""
