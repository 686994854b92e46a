"""PaceTrainer: which weights it saves and leaves behind, and faults in a save."""

import contextlib
import errno
import functools
import json
import os
import signal
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from problems import same

pytest.importorskip("transformers")
pytest.importorskip("trl")

import peft
import transformers.modeling_utils
from safetensors.torch import load_file
from trainers import (
    EVAL,
    MODELS,
    OPTIMIZERS,
    adapted,
    by_hand,
    called,
    far,
    logits_by_hand,
    loss_by_hand,
    on,
    outcome,
    prepare,
    weights,
    which,
)
from transformers import TrainerState
from transformers.trainer_utils import get_last_checkpoint

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),  # peft
    pytest.mark.usefixtures("quick"),
]


SWAPPING = [kind for kind in OPTIMIZERS if kind != "adamw"]


# ---- which weights are where -----------------------------------------------------------------


def stored(folder):
    """The weights of a model folder, by their names in the model."""
    if (folder / "adapter_model.safetensors").exists():
        x = load_file(folder / "adapter_model.safetensors")
        return {name.replace(".weight", ".default.weight"): value for name, value in x.items()}
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("kind", "form"),
    [*product(SWAPPING, ["float32"]), ("pace", "bfloat16"), ("pace", "lora"), ("pullback", "lora")],
)
def test_every_model_folder_holds_the_returned_model(kind, form, tmp_path):
    trainer = prepare(
        tmp_path,
        kind,
        MODELS[form](),
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=1,
    )

    def at_step(step, lr_scheduler=None, **_):
        if step == 0 and lr_scheduler:
            trainer._save_checkpoint(trainer.model, None)
        trainer.save_model(str(tmp_path / f"returned-{step}"))
        trainer.save_live_model(str(tmp_path / f"live-{step}"))

    at_step(0)
    trainer.add_callback(on("on_step_begin", at_step))
    trainer.train()
    trainer.save_model(str(tmp_path / "returned-6"))
    trainer.save_live_model(str(tmp_path / "live-6"))
    trainer.model.save_pretrained(tmp_path / "held-6")
    found = {}
    for folder in tmp_path.iterdir():
        step = folder.name.partition("-")[2]
        assert {x.dtype for x in stored(folder).values()} == {
            torch.bfloat16 if form == "bfloat16" else torch.float32
        }
        found[folder.name] = which(stored(folder), kind, int(step), form)
    kinds = {"checkpoint": "returned", "returned": "returned", "live": "live"}
    expected = {f"{x}-{i}": called(y, kind, i) for x, y in kinds.items() for i in range(7)}
    assert found == expected | {"held-6": "returned"}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_callbacks_find_the_returned_model_at_the_end(kind, tmp_path):
    """As those of transformers do that upload it."""
    trainer = prepare(tmp_path, kind, max_steps=3)
    found = []
    trainer.add_callback(on("on_train_end", lambda _, model, **__: found.append(weights(model))))
    trainer.train()
    assert which(found[0], kind, 3) == called("returned", kind, 3)
    assert same(weights(trainer.model), found[0])


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_holding_one_or_the_other_nests_and_ends_whatever_happens(kind, tmp_path):
    trainer = prepare(tmp_path, kind, max_steps=3)
    trainer.train()
    holding = {"live": trainer.live, "returned": trainer.averaged}

    def held():
        return which(trainer.model, kind, 3)

    def nest(names):
        before = held()
        with holding[names[0]]() as differs:
            assert held() == called(names[0], kind, 3)
            assert differs == (kind != "adamw")
            if names[1:]:
                nest(names[1:])
        assert held() == before
        with pytest.raises(ZeroDivisionError), holding[names[0]]():
            raise ZeroDivisionError
        assert held() == before

    assert held() == called("returned", kind, 3)
    for names in product(holding, repeat=3):
        nest(names)


@pytest.mark.parametrize("form", MODELS)
def test_after_an_exception_in_an_evaluation_the_model_holds_the_live_weights(form, tmp_path):
    calls, live = [], []

    def failing(prediction):
        calls.append(live.append(weights(trainer.model)))
        if len(calls) == 4:  # of the returned model
            raise ZeroDivisionError
        return {}

    options = {"compute_metrics": failing, "eval_strategy": "steps", "eval_steps": 2}
    trainer = prepare(tmp_path, "pace", MODELS[form](), **options)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert not same(live[3], live[2])
    assert same(weights(trainer.model), live[2])
    trainer.compute_metrics = None
    assert trainer.evaluate().keys() > {"eval_loss", "eval_live_loss"}


# ---- the best checkpoint -----------------------------------------------------------------------


BEST = {
    "max_steps": 15,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "save_strategy": "steps",
    "save_steps": 3,
    "metric_for_best_model": "eval_loss",
    "greater_is_better": False,
}


@functools.cache
def losses_by_hand(kind):
    return [loss_by_hand(x) for x in by_hand(kind, steps=15).returned]


def best_by_hand(kind, until=15, every=3):
    return min(range(every, until + 1, every), key=losses_by_hand(kind).__getitem__)


@pytest.mark.parametrize("strategy", ["steps", "best"])
def test_the_best_checkpoints_returned_model_is_what_is_left(strategy, tmp_path):
    folder = tmp_path / "run"
    options = BEST | {"save_strategy": strategy, "load_best_model_at_end": True}
    trainer = prepare(folder, "pullback", **options)
    trainer.train()
    hand, best = by_hand("pullback", steps=15), best_by_hand("pullback")
    assert trainer.state.best_global_step == best != 15
    assert trainer.state.best_model_checkpoint == str(folder / f"checkpoint-{best}")
    for checkpoint in folder.glob("checkpoint-*"):
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        step = int(checkpoint.name.partition("-")[2])
        until = best_by_hand("pullback", step)
        assert state["best_model_checkpoint"] == str(folder / f"checkpoint-{until}")
        assert step == until or strategy == "steps"

    def is_the_best(x):
        return far(x, hand.returned[best]) < 2e-6 and far(x, hand.returned[15]) > 1e-3

    assert is_the_best(weights(trainer.model))
    assert not trainer.bare_optimizer.swapped  # its average is not overwritten
    predictions = torch.from_numpy(trainer.predict(EVAL).predictions)
    torch.testing.assert_close(predictions, logits_by_hand(hand.returned[best]), atol=1e-5, rtol=0)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == metrics["eval_live_loss"]
    assert metrics["eval_loss"] == pytest.approx(losses_by_hand("pullback")[best], abs=1e-5)
    for save in (trainer.save_model, trainer.save_live_model):
        save(str(tmp_path / "model"))
        assert is_the_best(stored(tmp_path / "model"))
    with trainer.averaged() as differs:
        assert not differs
        assert is_the_best(weights(trainer.model))
    # and another training is one of the optimizer's own average again
    trainer.args.load_best_model_at_end = False
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{best}"))
    assert far(weights(trainer.model), hand.returned[15]) < 2e-6


def test_the_best_adapter_is_what_is_left(tmp_path):
    options = BEST | {"max_steps": 9, "load_best_model_at_end": True, "greater_is_better": True}
    trainer = prepare(tmp_path, "pullback", adapted(), **options)
    trainer.train()
    assert trainer.state.best_global_step != 9
    best = stored(Path(trainer.state.best_model_checkpoint))
    assert same(weights(trainer.model), {name: best[name] for name in weights(trainer.model)})
    assert not same(best, stored(tmp_path / "checkpoint-9"))


def test_the_best_checkpoint_is_found_again_where_the_folder_was_moved(tmp_path):
    before, after = tmp_path / "before", tmp_path / "after"
    options = BEST | {"load_best_model_at_end": True}
    whole = prepare(before, "pullback", **options)
    whole.train()
    best = whole.state.best_global_step
    before.rename(after)
    trainer = prepare(after, "pullback", **options)
    trainer.train(resume_from_checkpoint=str(after / f"checkpoint-{best + 3}"))
    assert trainer.state.best_model_checkpoint == str(after / f"checkpoint-{best}")
    state = TrainerState.load_from_json(str(after / "checkpoint-15" / "trainer_state.json"))
    assert state.best_model_checkpoint == str(after / f"checkpoint-{best}")
    assert same(weights(trainer.model), weights(whole.model))


@pytest.mark.parametrize("saved", [False, True])
def test_the_best_model_is_not_another_runs(saved, tmp_path):
    other = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    prepare(tmp_path, "adamw", **other).train()
    options = BEST | {"eval_steps": 2, "save_steps": 2 if saved else 4, "max_steps": 6}
    options |= {"greater_is_better": True, "load_best_model_at_end": True}  # the first is it
    trainer = prepare(tmp_path, "pace", **options)
    told = "the best model, checkpoint-2, was not saved, and none is loaded as the best"
    with contextlib.nullcontext() if saved else pytest.warns(match=told):
        trainer.train()
    assert trainer.state.best_global_step == 2
    assert which(trainer.model, "pace", 2 if saved else 6) == "returned"


@pytest.mark.parametrize("limit", [1, 2, 3])
@pytest.mark.parametrize("loads_best", [False, True])
def test_rotation_keeps_the_last_and_the_best(limit, loads_best, tmp_path):
    options = BEST | {"save_total_limit": limit, "load_best_model_at_end": loads_best}
    trainer = prepare(tmp_path, "pullback", **options)
    kept = {}

    def note(step, **_):
        kept[step] = {int(x.name.partition("-")[2]) for x in tmp_path.iterdir()}

    trainer.add_callback(on("on_save", note))
    trainer.train()
    for step in range(3, 16, 3):
        best = best_by_hand("pullback", step)
        last = range(3, step + 1, 3)[-limit:]
        if best not in last:
            last = [best, *last[1 if limit > 1 else 0 :]]
        assert kept[step] == set(last)
    assert best == 9  # two before the last: it was to be kept
    after = {x.name for x in tmp_path.iterdir()}
    assert after == {f"checkpoint-{i}" for i in ({9} if limit == 1 else kept[15])}


def test_rotation_keeps_what_was_saved_last_where_a_run_goes_back(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1}
    prepare(tmp_path, **options, max_steps=4).train()
    trainer = prepare(tmp_path, **options, max_steps=2, save_total_limit=2)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert {x.name for x in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-4"}


@pytest.mark.parametrize("limit", [1, 2])
def test_rotation_goes_by_steps_and_not_by_dates(limit, tmp_path):
    others = ("checkpoint-2-mine", "checkpoint-x", "my-checkpoint-1")
    for name in ("checkpoint-1", "checkpoint-10", *others):
        (tmp_path / name).mkdir()
    options = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": limit}
    trainer = prepare(tmp_path, **options, max_steps=8)
    kept = []

    def note(step, **_):
        for path in tmp_path.glob("checkpoint-*"):  # the earlier, the further in the future
            number = int("0" + "".join(filter(str.isdigit, path.name)))
            os.utime(path, (4e9 - 1e6 * number, 4e9 - 1e6 * number))
        assert (tmp_path / f"checkpoint-{step}" / "model.safetensors").exists()
        kept.append({x.name for x in tmp_path.iterdir()} - {*others})

    trainer.add_callback(on("on_save", note))
    trainer.train()
    steps = [[i, 10][:limit] for i in (2, 4, 6, 8)]
    assert kept == [{f"checkpoint-{i}" for i in x} for x in steps]
    assert {*others} <= {x.name for x in tmp_path.iterdir()}


# ---- faults in a save ------------------------------------------------------------------------


def sabotage(point, do, patch=setattr, step=4):
    """At this point of the save of a step's checkpoint, do that."""
    here = f"checkpoint-{step}"

    def half(save):
        def saved(value, file, **options):
            path = Path(file)
            save(value, file, **options)
            if here in path.parts and path.name == files[point]:
                os.truncate(path, path.stat().st_size // 2)
                do()

        return saved

    def instead(act, which, after=False):
        def acted(path, *args):
            if Path(which(path, *args)).name == here:
                if after:
                    act(path, *args)
                do()
            return act(path, *args)

        return acted

    files = {
        "model": "model.safetensors",
        "adapter": "adapter_model.safetensors",
        "optimizer": "optimizer.pt",
        "scheduler": "scheduler.pt",
        "random": "rng_state.pth",
    }
    if point in ("model", "adapter"):
        for module in (transformers.modeling_utils, peft.peft_model):
            patch(module, "safe_save_file", half(module.safe_save_file))
    elif point in files:
        patch(torch, "save", half(torch.save))
    elif point == "state":
        save = TrainerState.save_to_json
        patch(TrainerState, "save_to_json", instead(save, lambda state, path: Path(path).parent))
    else:
        after = point == "renamed"
        patch(Path, "replace", instead(Path.replace, lambda source, target: target, after))


def disk_full():
    raise OSError(errno.ENOSPC, "No space left on device")


FATAL = ["model", "state", "renaming", "renamed"]


def saving(folder, form="float32", **given):
    options = BEST | {"max_steps": 6, "eval_steps": 2, "save_steps": 2}
    return prepare(folder, "pace", MODELS[form](), **options | given)


def content(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Model form -> the outcome of the run that is disturbed, and the folder of its checkpoints."""
    ended = {}
    for form in MODELS:
        folder = tmp_path_factory.mktemp(form)
        trainer = saving(folder, form)
        trainer.train()
        ended[form] = (outcome(trainer), folder)
    return ended


@pytest.mark.parametrize(
    ("point", "form"),
    [
        *product(["model", "optimizer", "random", "state", "renaming"], ["float32"]),
        ("scheduler", "bfloat16"),
        ("adapter", "lora"),
    ],
)
def test_a_save_that_fails_leaves_what_was_there(point, form, undisturbed, tmp_path, monkeypatch):
    trainer = saving(tmp_path, form)
    live, before = {}, {}

    def note(step, model, **_):
        live[step] = weights(model)
        before[step] = content(tmp_path)

    trainer.add_callback(on("on_step_end", note))
    with monkeypatch.context() as patch:
        sabotage(point, disk_full, patch.setattr)
        with pytest.raises((OSError, RuntimeError), match="No space left"):
            trainer.train()
    assert trainer.state.global_step == 4
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    assert content(tmp_path) == before[4]
    assert same(weights(trainer.model), live[4])
    assert which(trainer.model, "pace", 4, form) == "live"
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    # With room on the disk it can be saved after all, by the same trainer,
    trainer._save_checkpoint(trainer.model, None)
    assert which(stored(tmp_path / "checkpoint-4"), "pace", 4, form) == "returned"
    assert same(weights(trainer.model), live[4])
    # and a new one goes on.
    resumed = saving(tmp_path, form)
    resumed.train(resume_from_checkpoint=True)
    assert same(outcome(resumed), undisturbed[form][0])


def test_what_a_killed_save_left_is_cleared(tmp_path):
    for left in ("_partial/checkpoint-2/stale", "_partial/checkpoint-1/model.safetensors"):
        (tmp_path / left).parent.mkdir(parents=True)
        (tmp_path / left).touch()
    prepare(tmp_path, save_strategy="steps", save_steps=2, max_steps=2).train()
    assert [x.name for x in tmp_path.iterdir()] == ["checkpoint-2"]
    assert not (tmp_path / "checkpoint-2" / "stale").exists()


def killed(folder, points):
    """Train in forks of this process, each killed at one of these points; print how they ended."""
    torch.set_num_threads(1)
    for point in points:
        if not (child := os.fork()):
            sabotage(point, lambda: os.kill(os.getpid(), signal.SIGKILL))
            saving(folder / point).train()
            os._exit(0)
        print(point, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_killed_in_a_save_a_run_goes_on_from_a_whole_checkpoint(undisturbed, tmp_path):
    program = [sys.executable, __file__, str(tmp_path), *FATAL]
    path = {"PYTHONPATH": os.pathsep.join(sys.path)}  # with the modules beside the rooms
    told = subprocess.run(
        program, capture_output=True, text=True, check=False, env=os.environ | path
    )
    for point in FATAL:
        assert f"{point} -9\n" in told.stdout, told.stderr
        folder = tmp_path / point
        checkpoint = Path(get_last_checkpoint(str(folder)))
        assert checkpoint.name == ("checkpoint-4" if point == "renamed" else "checkpoint-2")
        assert (folder / "_partial").exists()  # it was in the middle
        whole = undisturbed["float32"][1] / checkpoint.name
        assert {p.name for p in checkpoint.iterdir()} == {p.name for p in whole.iterdir()}
        assert same(stored(checkpoint), stored(whole))
        trainer = saving(folder)
        trainer.train(resume_from_checkpoint=True)
        assert same(outcome(trainer), undisturbed["float32"][0])
        assert {p.name for p in folder.iterdir()} == {f"checkpoint-{i}" for i in (2, 4, 6)}


if __name__ == "__main__":
    killed(Path(sys.argv[1]), sys.argv[2:])
