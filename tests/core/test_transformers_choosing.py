"""PaceTrainer(load_best_average_at_end=True): the best average in the model, and what is saved."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("trl")

from safetensors.torch import load_file
from trainers import EVAL, OPTIMIZERS, far, logged, loss_by_hand, prepare, prepare_sft, weights

from paceline import PACE
from paceline.integrations.transformers import PaceTrainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),  # peft
    pytest.mark.usefixtures("quick"),
]


def choosing(*args, **given):
    return PaceTrainer(*args, load_best_average_at_end=True, **given)


def three(lr):
    returns = {"slow": "ema:kappa=0.9", "mean": "uniform"}
    return lambda params: PACE(params, lr=lr, pullback=0.1, returns=returns)


def by_hand(trainer):
    """The loss of each average and of the live weights, and the weights themselves."""
    optimizer = trainer.bare_optimizer
    found = {}
    with optimizer.restoring():
        for name in ("slow", "mean", "average", "live"):
            optimizer.train() if name == "live" else optimizer.eval(name)
            found[name] = weights(trainer.model)
    return {name: loss_by_hand(x) for name, x in found.items()}, found


@pytest.mark.parametrize(("lr", "expected"), [(0.01, "live"), (0.05, "average")])
def test_the_best_is_in_the_model_and_in_what_is_saved(lr, expected, tmp_path):
    """By default it would return the slow one."""
    trainer = prepare(tmp_path, three(lr), cls=choosing)
    output = trainer.train()
    held = weights(trainer.model)
    losses, of = by_hand(trainer)
    best = min(losses, key=losses.get)
    assert best == expected
    assert trainer.best_average.best == best
    assert trainer.best_average.scores == pytest.approx(losses, rel=1e-4)
    assert far(held, of[best]) == 0
    trainer.save_model(str(tmp_path / "saved"))
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert far(saved, {name: of[best][name] for name in saved}) == 0
    # it is said
    assert output.metrics["best_average"] == best
    for name, loss in losses.items():
        assert output.metrics[f"choice_{name}"] == pytest.approx(loss, rel=1e-4)
        assert logged(trainer, f"choice_{name}") == {6: output.metrics[f"choice_{name}"]}
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(losses[best], rel=1e-4)
    assert metrics["eval_live_loss"] == pytest.approx(losses["live"], rel=1e-4)
    with trainer.averaged() as differs:
        assert differs == (best != "live")
        assert far(weights(trainer.model), of[best]) == 0


def test_it_changes_nothing_before_the_end(tmp_path):
    plain = prepare(tmp_path / "plain", three(0.05), eval_strategy="steps", eval_steps=2)
    plain.train()
    other = prepare(
        tmp_path / "other", three(0.05), cls=choosing, eval_strategy="steps", eval_steps=2
    )
    other.train()
    for key in ("loss", "eval_loss", "eval_live_loss", "eval_mean_loss"):
        assert logged(plain, key) == logged(other, key)
    with plain.live(), other.live():
        assert far(weights(plain.model), weights(other.model)) == 0
    # trained again, it is chosen anew
    assert other.best_average is not None
    other.args.max_steps = 8
    other.train()
    assert other.state.global_step == 8


def test_by_another_metric_that_is_to_be_high(tmp_path):
    trainer = prepare(
        tmp_path,
        three(0.05),
        cls=choosing,
        compute_metrics=lambda _: {"badness": loss_by_hand(weights(trainer.model))},
        metric_for_best_model="badness",
        greater_is_better=True,
    )
    trainer.train()
    losses, _ = by_hand(trainer)
    assert trainer.best_average.best == max(losses, key=losses.get)


def test_sets_by_name_and_trl(tmp_path):
    sets = {"a": EVAL[:4], "b": EVAL[4:]}
    trainer = prepare(
        tmp_path, three(0.05), cls=choosing, eval_dataset=sets, metric_for_best_model="b_loss"
    )
    trainer.train()
    with trainer.bare_optimizer.averaged("mean"):
        expected = loss_by_hand(weights(trainer.model), EVAL[4:])
    assert trainer.best_average.scores["mean"] == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ValueError, match="needs the metric 'eval_loss', and there are eval_a_li"):
        prepare(tmp_path / "o", three(0.05), cls=choosing, eval_dataset=sets).train()
    sft = prepare_sft(tmp_path / "sft", kind=three(0.05))
    sft.load_best_average_at_end = True
    sft.train()
    losses, _ = by_hand(sft)
    assert sft.best_average.scores == pytest.approx(losses, rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("adamw", {}, "needs PACE or Pullback"),
        ("schedule-free", {}, "needs PACE or Pullback"),
        ("pace", {"eval_dataset": None}, "needs an eval_dataset"),
        (
            "pace",
            {
                "load_best_model_at_end": True,
                **{f"{x}_strategy": "steps" for x in ("save", "eval")},
                **{f"{x}_steps": 2 for x in ("save", "eval")},
            },
            "needs load_best_model_at_end=False",
        ),
    ],
)
def test_what_it_needs_is_said_before_the_training(kind, options, message, tmp_path):
    trainer = prepare(tmp_path, OPTIMIZERS[kind], cls=choosing, **options)
    with pytest.raises(ValueError, match=f"^load_best_average_at_end {message}"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_the_live_weights_come_back_for_more_steps(tmp_path):
    trainer = prepare(tmp_path, three(0.05), cls=choosing)
    trainer.train()
    trainer.bare_optimizer.train()
    again = prepare(tmp_path, three(0.05))
    again.train()
    again.bare_optimizer.train()
    assert far(weights(trainer.model), weights(again.model)) == 0
    assert torch.isfinite(torch.tensor(list(trainer.best_average.scores.values()))).all()
