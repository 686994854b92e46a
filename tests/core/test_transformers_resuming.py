"""PaceTrainer: resumed runs."""

import functools
from typing import NamedTuple

import pytest
import torch
from problems import same

pytest.importorskip("transformers")
pytest.importorskip("trl")

from trainers import EPOCH, adapted, far, on, outcome, prepare, prepare_sft, small, weights, which
from transformers import Trainer, TrainerCallback

from paceline import PACE
from paceline.integrations.transformers import PaceTrainer
from paceline.sums import write_sums

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),  # peft
    pytest.mark.usefixtures("quick"),
]


class Run(NamedTuple):
    """How a run is made."""

    kind: object = "pace"
    model: object = functools.partial(small, 0.1)  # dropout: it needs the random state
    prepare: object = prepare
    options: object = None


RUNS = {
    "float32": Run(),
    "accumulation": Run(
        options={"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    ),
    "bfloat16": Run(model=functools.partial(small, 0.1, torch.bfloat16)),
    "bfloat16 state": Run(
        lambda params: PACE(params, lr=0.05, pullback=0.1, state_dtype=torch.bfloat16)
    ),
    "lora": Run(model=functools.partial(adapted, 0.1)),
    "pullback": Run("pullback"),
    "schedule-free": Run("schedule-free"),
    "schedule-free wrapper": Run("schedule-free wrapper"),
    "sft": Run(prepare=prepare_sft),
    "sft lora": Run(model=functools.partial(adapted, 0.1), prepare=prepare_sft),
}


def start(folder, run, **given):
    """With warm-up and decay, clipping, evaluations, shuffled data; checkpoints 3, 4, 6 and 7."""
    options = {
        "max_steps": 7,
        "lr_scheduler_type": "linear",
        "warmup_steps": 2,
        "max_grad_norm": 1.0,
        "train_sampling_strategy": "random",
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 3,
    }
    return run.prepare(
        folder, kind=run.kind, model=run.model(), **options | (run.options or {}) | given
    )


@pytest.mark.parametrize("name", RUNS)
def test_resumed_from_any_checkpoint_a_run_ends_bit_for_bit_as_if_undisturbed(name, tmp_path):
    run = RUNS[name]
    whole, live = start(tmp_path / "whole", run), {}

    def note(step, model, control, **_):
        live[step] = weights(model)
        control.should_save |= step == EPOCH  # the random state is loaded elsewhere there

    whole.add_callback(on("on_step_end", note))
    whole.train()
    expected = outcome(whole)
    assert len(expected["history"]["loss"]) == 7
    begun, seen = [], []
    callbacks = [
        on("on_train_begin", lambda _, model, **__: begun.append(weights(model))),
        on("on_evaluate", lambda _, metrics, **__: seen.append(metrics)),
    ]
    for step in (3, 4, 6, 7):
        seen.clear()
        trainer = start(tmp_path / f"from-{step}", run, eval_on_start=True, callbacks=callbacks)
        trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        ended = outcome(trainer)
        assert seen[0]["eval_live_loss"] != seen[0]["eval_loss"]
        # What is logged last of a step counts: of the one that it goes on from, that is what was
        # evaluated before going on.
        past, again = expected.pop("history"), ended.pop("history")
        for key, values in past.items():
            assert again[key].keys() - values.keys() <= {step}
            again[key] = {i: again[key][i] for i in values}
        if name.startswith("schedule-free"):  # it computes its live weights back
            assert far(begun[-1], live[step]) < 1e-5
            for key in ("live", "returned"):
                assert far(ended[key], expected[key]) < 1e-5
            for key in ("loss", "eval_live_loss", "eval_loss"):
                assert again[key] == pytest.approx(past[key], abs=1e-5)
            assert ended["step"] == 7
        else:
            assert same(begun[-1], live[step])
            assert again == past
            for key in expected:
                assert same(ended[key], expected[key]), key
        expected["history"] = past


def test_the_plain_trainer_goes_past_the_end_and_this_one_does_not(tmp_path):
    for cls, expected in ((Trainer, 7), (PaceTrainer, 6)):
        folder = tmp_path / cls.__name__
        options = {"cls": cls, "save_strategy": "steps", "save_steps": 6}
        prepare(folder, "adamw", **options).train()
        trainer = prepare(folder, "adamw", **options)
        trainer.train(resume_from_checkpoint=True)
        assert trainer.state.global_step == expected
    # unless it is asked to
    trainer = prepare(folder, "adamw", **options, max_steps=9)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 9


def test_a_checkpoint_with_an_average_is_refused_without_one(tmp_path, caplog):
    """AdamW would go on from the average, without the live weights."""
    options = {"save_strategy": "steps", "save_steps": 6}
    prepare(tmp_path, "pace", **options).train()
    assert "keeps no average" not in caplog.text
    for kind, name in (("adamw", "AdamW"), ("schedule-free", "SGDScheduleFree")):
        trainer = prepare(tmp_path, kind, **options, max_steps=9)
        with pytest.raises(ValueError, match=rf"written with PACE or Pullback; {name} would drop"):
            trainer.train(resume_from_checkpoint=True)
    prepare(tmp_path / "other", "adamw", max_steps=1).train()
    assert "AdamW keeps no average: what is evaluated and saved are the live" in caplog.text


def test_rate_and_decay_are_of_the_arguments(tmp_path):
    options = {"learning_rate": 0.25, "weight_decay": 0.125}
    for said, rate in (({}, 0.25), ({"lr": 0.5}, 0.5)):
        given = options | {"optimizer_cls_and_kwargs": (PACE, said)}
        groups = prepare(tmp_path, **given).create_optimizer().param_groups
        assert [(group["lr"], group["weight_decay"]) for group in groups] == [
            (rate, 0.125),
            (rate, 0.0),  # of norms and biases
        ]
    with pytest.raises(ValueError, match=r"^weight_decay of optimizer_cls_and_kwargs would not"):
        prepare(tmp_path, optimizer_cls_and_kwargs=(PACE, {"lr": 0.1, "weight_decay": 0.1}))


@pytest.mark.parametrize(
    ("kind", "before"),
    [("pace", "nothing"), ("pace", "trained"), ("schedule-free", "evaluated")],
)
@pytest.mark.parametrize("missing", ["all", "optimizer.pt", "scheduler.pt"])
def test_a_checkpoint_without_optimizer_state_is_refused(missing, kind, before, tmp_path):
    """The Trainer would load nothing, and take the returned model for the live weights."""
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    prepare(tmp_path, kind, **options, save_only_model=missing == "all").train()
    if missing != "all":
        (tmp_path / "checkpoint-2" / missing).unlink()
        write_sums(tmp_path / "checkpoint-2")  # as if it had been saved so
    trainer = prepare(tmp_path / "other", kind, **options)
    if before == "evaluated":
        trainer.evaluate()
    elif before == "trained":
        trainer.train()
    with pytest.raises(
        ValueError, match=r"checkpoint-2 has no optimizer state, which holds the live weights"
    ):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    (tmp_path / "checkpoint-2" / "optimizer.pt").unlink(missing_ok=True)
    write_sums(tmp_path / "checkpoint-2")
    plain = prepare(tmp_path, "adamw", **options | {"max_steps": 3})  # it has no others
    plain.train(resume_from_checkpoint=True)
    assert plain.state.global_step == 3


def test_a_checkpoint_in_which_a_bit_has_flipped_is_refused(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    prepare(tmp_path, **options).train()
    trainer = prepare(tmp_path / "other", **options)
    before = weights(trainer.model)
    files = [x for x in (tmp_path / "checkpoint-2").iterdir() if x.name != "checksums.json"]
    assert {"model.safetensors", "optimizer.pt", "trainer_state.json"} < {x.name for x in files}
    for file in files:
        whole = file.read_bytes()
        middle = len(whole) // 2
        file.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
        with pytest.raises(
            ValueError, match=f"checkpoint-2/{file.name} is damaged.*resume from an"
        ):
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        file.write_bytes(whole)
    assert far(weights(trainer.model), before) == 0
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_the_best_checkpoint_is_whole_or_not_loaded(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2, "eval_strategy": "steps"}
    trainer = prepare(tmp_path, **options, eval_steps=2, load_best_model_at_end=True)

    class Spoil(TrainerCallback):
        def on_save(self, args, state, control, **_):
            (tmp_path / "checkpoint-2" / "config.json").write_text("{}")

    trainer.add_callback(Spoil())
    with pytest.raises(ValueError, match=r"checkpoint-2/config\.json is damaged"):
        trainer.train()


def test_a_checkpoint_from_before_the_first_step_is_a_start(tmp_path):
    trainer = prepare(tmp_path)
    trainer.add_callback(
        on("on_train_begin", lambda *_, **__: trainer._save_checkpoint(trainer.model, None))
    )
    trainer.train()
    resumed = prepare(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-0"))
    assert same(outcome(resumed), outcome(trainer))


def test_one_trainer_trains_again(tmp_path):
    """From a checkpoint, or on from where it was, whatever weights it holds."""
    trainer = prepare(tmp_path, save_strategy="steps", save_steps=2, max_steps=EPOCH)
    trainer.train()
    expected = outcome(trainer)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(outcome(trainer), expected)
    trainer.args.max_steps = 2  # of another epoch
    trainer.train()
    assert which(trainer.model, "pace", 6) == "returned"
    with trainer.live():
        assert which(trainer.model, "pace", 6) == "live"
