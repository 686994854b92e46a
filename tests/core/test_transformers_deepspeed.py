"""PaceTrainer under DeepSpeed's ZeRO, on one and two ranks."""

import functools
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from problems import same

pytest.importorskip("deepspeed")
pytest.importorskip("trl")

import trainers
from safetensors.torch import load_file
from test_deepspeed import partly_stepped
from trainers import EPOCH, OPTIMIZERS, by_hand, logged, loss_by_hand, on, small, trained

from paceline import PACE
from paceline.integrations.transformers import PaceTrainer

LOST = r"(?i)connection (closed|reset)|broken pipe"  # gloo's word for it
CLOSE = 1e-5  # float32, whose sums two ranks round otherwise


@pytest.fixture(scope="module")
def ranks(ranks_of_deepspeed):
    """Processes of their own, because DeepSpeed is imported."""
    return ranks_of_deepspeed


def prepare(folder, stage, kind="pace", **given):
    """The trainer of the training by hand, on all ranks together."""
    import deepspeed
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # another test's stage
    rank, count = dist.get_rank(), dist.get_world_size()
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": 1}
    os.environ |= {name: str(x) for name, x in place.items()}
    os.environ |= {"DS_ACCELERATOR": "cpu", "MASTER_ADDR": "the group is there already"}
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo; it would be compiled
    zero = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}
    zero["stage3_param_persistence_threshold"] = 8  # biases stay whole, matrices are in parts
    names = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    options = {
        "deepspeed": {"zero_optimization": zero, "bf16": {"enabled": "auto"}}
        | {"zero_allow_untested_optimizer": True}
        | dict.fromkeys(names, "auto"),
        "optimizer_cls_and_kwargs": (factory(OPTIMIZERS.get(kind, kind)), {}),
        "per_device_train_batch_size": trainers.BATCH // count,
        "model": small(),
    }
    return trainers.prepare(folder, **options | given)


def factory(make):
    """What transformers takes for a class that makes an optimizer of a whole model."""
    return lambda: lambda model: make(list(trained(model).values()))


@torch.no_grad()
def held(trainer):
    """Names and whole weights of the model."""
    from deepspeed import zero

    named = dict(trainer.model.named_parameters())
    with zero.GatheredParameters(list(named.values())):
        return {name: p.detach().clone() for name, p in named.items()}


def masters(trainer):
    """The whole float32 weights that are stepped."""
    from deepspeed.utils import safe_get_full_fp32_param

    return [safe_get_full_fp32_param(p) for p in trainer.model.parameters()]


def stored(folder):
    """The weights in a folder of a model; DeepSpeed's have the tied one twice."""
    found = load_file(folder / "model.safetensors")
    tied = found.pop("lm_head.weight", None)
    assert tied is None or torch.equal(tied, found["transformer.wte.weight"])
    return found


def far(a, b):
    """The largest difference, but in the keys' bias, whose gradient is rounding alone."""
    assert a.keys() == b.keys()
    return trainers.far(*({k: x for k, x in y.items() if "c_attn.bias" not in k} for y in (a, b)))


def evaluated_and_saved(stage, kind, folder):
    folder = folder / f"stage-{stage}"
    given = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 4}
    trainer = prepare(folder, stage, kind, **given)
    trainer.train()
    live, returned = by_hand(kind)
    assert far(live[6], returned[6]) > 100 * CLOSE
    for step in (2, 4, 6):
        assert logged(trainer, "eval_loss")[step] == pytest.approx(
            loss_by_hand(returned[step]), abs=CLOSE
        )
        assert logged(trainer, "eval_live_loss")[step] == pytest.approx(
            loss_by_hand(live[step]), abs=CLOSE
        )
    assert far(held(trainer), returned[6]) < CLOSE
    with trainer.live():
        assert far(held(trainer), live[6]) < CLOSE
        trainer.save_model(str(folder / "saved"))
        trainer.save_live_model(str(folder / "live"))
    assert trainer.evaluate()["eval_loss"] == logged(trainer, "eval_loss")[6]
    dist.barrier()
    expected = {"checkpoint-4": returned[4], "saved": returned[6], "live": live[6]}
    for name, x in expected.items():
        assert far(stored(folder / name), x) < CLOSE, name


@pytest.mark.parametrize(
    ("stage", "kind"), [(1, "pace"), (2, "pace"), (3, "pace"), (1, "pullback"), (3, "pullback")]
)
def test_average_and_live_weights_are_where_they_should_be(stage, kind, ranks, tmp_path):
    ranks(evaluated_and_saved, stage, kind, tmp_path)


def whole_and_resumed(stage, kind, folder, **more):
    """With dropout, shuffled data, warm-up, clipping; from an epoch's middle and its end."""
    given = more | {
        "max_steps": 7,
        "lr_scheduler_type": "linear",
        "warmup_steps": 2,
        "max_grad_norm": 1.0,
        "train_sampling_strategy": "random",
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 3,
    }

    def run(name, checkpoint=None):
        trainer = prepare(folder / name, stage, kind, model=small(dropout=0.1), **given)
        trainer.add_callback(on("on_step_end", save_after_an_epoch))
        trainer.train(resume_from_checkpoint=checkpoint)
        returned = held(trainer)
        with trainer.live():
            live = held(trainer)
            states = [
                {key: x.clone() if isinstance(x, torch.Tensor) else x for key, x in state.items()}
                for state in trainer.bare_optimizer.state.values()
            ] + masters(trainer)
        keys = ("loss", "grad_norm", "learning_rate", "eval_loss", "eval_live_loss")
        return returned, live, states, {key: logged(trainer, key) for key in keys}

    def save_after_an_epoch(step, control, **_):
        control.should_save |= step == EPOCH

    *expected, history = run("whole")
    for step in (3, EPOCH):
        *ended, again = run(f"from-{step}", str(folder / "whole" / f"checkpoint-{step}"))
        assert same(ended, expected)
        assert again == history


BFLOAT16 = {"bf16": True, "optimizer_cls_and_kwargs": (PACE, {"lr": 0.05, "pullback": 0.1})}


def in_bfloat16(stage, folder):
    """The average by its formula from the float32 weights, rounded where the model has it."""
    saved = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    trainer = prepare(folder, stage, **BFLOAT16, **saved, max_steps=4)
    average, rounded, before = [], {}, []

    def begin(step, **_):
        if before:  # evaluations and saves
            assert same(before, [masters(trainer), held(trainer)])
        average[:] = average or masters(trainer)

    def end(step, **_):
        before[:] = masters(trainer), held(trainer)
        for a, x in zip(average, before[0], strict=True):
            a += (1 + step) ** -0.5 * (x - a)
        rounded[step] = {key: a.bfloat16() for key, a in zip(before[1], average, strict=True)}

    trainer.add_callback(on("on_step_begin", begin))
    trainer.add_callback(on("on_step_end", end))
    trainer.train()
    for step in (2, 4):
        file = stored(folder / f"checkpoint-{step}")
        assert same(file, {name: rounded[step][name] for name in file})  # bfloat16 and all
        score, live = (logged(trainer, key)[step] for key in ("eval_loss", "eval_live_loss"))
        assert abs(score - loss_by_hand(rounded[step])) < 0.002 < abs(score - live) / 5
    assert same(held(trainer), rounded[4])
    with trainer.live():
        assert same(before, [masters(trainer), held(trainer)])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_in_bfloat16_the_model_has_the_rounded_average(stage, ranks, tmp_path):
    ranks(in_bfloat16, stage, tmp_path)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_resumed_a_run_ends_bit_for_bit_as_if_undisturbed(stage, ranks, tmp_path):
    ranks(functools.partial(whole_and_resumed, **BFLOAT16), stage, "pace", tmp_path)


def test_one_rank_serves(one, tmp_path):
    for stage in (1, 2, 3):
        one(partly_stepped, stage)
    one(evaluated_and_saved, 2, "pace", tmp_path / "evaluated")
    one(whole_and_resumed, 1, "pullback", tmp_path / "one")
    one(whole_and_resumed, 3, "pace", tmp_path / "three")


# The highest loss counts as the best, which is not the last.
HIGHEST = {"metric_for_best_model": "loss", "greater_is_better": True, "eval_strategy": "steps"}


def best_checkpoint(stage, folder):
    saved = {"save_strategy": "steps", "save_steps": 1, "eval_steps": 1, "max_steps": 4}
    _, returned = by_hand("pace")
    trainer = prepare(folder, stage, load_best_model_at_end=True, **HIGHEST | saved)
    trainer.train()
    step = trainer.state.best_global_step
    assert step < 4
    trainer.save_model(str(folder / "saved"))
    best = held(trainer)
    assert far(best, returned[step]) < CLOSE < far(best, returned[4])
    with trainer.live():  # of the best step there is nothing else
        assert same(held(trainer), best)
    assert trainer.evaluate()["eval_loss"] == trainer.state.best_metric
    dist.barrier()
    for name in (f"checkpoint-{step}", "saved"):
        assert same(stored(folder / name), {name: best[name] for name in stored(folder / name)})


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_best_checkpoint_is_loaded_and_saved(stage, ranks, tmp_path):
    ranks(best_checkpoint, stage, tmp_path / "model")


def best_average(folder):
    live, returned = by_hand("pace")
    choosing = functools.partial(PaceTrainer, load_best_average_at_end=True)
    trainer = prepare(folder, 1, cls=choosing, **HIGHEST)
    trainer.train()
    scores = {"average": loss_by_hand(returned[6]), "live": loss_by_hand(live[6])}
    assert trainer.best_average.scores == pytest.approx(scores, abs=CLOSE)
    assert trainer.best_average.best == max(scores, key=scores.get)
    assert (
        far(held(trainer), {"average": returned, "live": live}[trainer.best_average.best][6])
        < CLOSE
    )


def test_the_best_average_is_left_in_the_model(ranks, tmp_path):
    ranks(best_average, tmp_path)


def refused(folder):
    trainer = prepare(folder / "whole", 1, max_steps=1)
    trainer.train()
    with pytest.raises(ValueError, match="once under DeepSpeed.*make a new trainer"):
        trainer.train()
    for reason, given in {
        "AdamW took the place of the given PACE": {"optimizer_cls_and_kwargs": None},
        "snapshots must be 0 under DeepSpeed's ZeRO": {
            "cls": functools.partial(PaceTrainer, snapshots=2)
        },
        "must step PACE or Pullback, got SGDScheduleFree": {"kind": "schedule-free"},
    }.items():
        trainer = prepare(folder / "other", 2, **given)
        with pytest.raises(ValueError, match=reason):
            trainer.train()
        assert trainer.state.global_step == 0


def test_what_cannot_be_served_is_refused_before_anything_is_trained(ranks, tmp_path):
    ranks(refused, tmp_path)


def damaged(folder):
    saved = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    prepare(folder, 1, **saved).train()
    [file] = (folder / "checkpoint-1").rglob("*optim_states.pt")
    file.write_bytes(file.read_bytes()[:-1])
    trainer = prepare(folder, 1, **saved)
    with pytest.raises(ValueError, match="optim_states.pt is damaged"):
        trainer.train(resume_from_checkpoint=True)


def test_a_damaged_checkpoint_is_refused(one, tmp_path):
    one(damaged, tmp_path)


def dies(place, folder):
    """Rank 1, after checkpoint-2: while it writes its part of the next one, or in a step."""
    saved = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    trainer = prepare(folder, 3, **saved)

    def half(state, file, *_, **__):
        Path(file).write_bytes(b"PK")
        os._exit(1)

    def begin(step, **_):
        if step == 3 and dist.get_rank() == 1:
            if place == "save":
                torch.save = half
            else:
                trainer.bare_optimizer.register_step_pre_hook(lambda *_: os._exit(1))

    trainer.add_callback(on("on_step_begin", begin))
    with pytest.raises(RuntimeError, match=LOST):
        trainer.train(resume_from_checkpoint=place == "step")  # from checkpoint-2
    assert not trainer.bare_optimizer.swapped
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-2"]


def test_of_a_rank_that_dies_the_last_whole_checkpoint_is_resumed(ranks, tmp_path):
    for place in ("save", "step"):
        ranks(dies, place, tmp_path, last=True)
