"""PaceTrainer: what it trains, which weights it evaluates, and the examples."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("trl")

from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from trainers import (
    BATCH,
    EVAL,
    OPTIMIZERS,
    by_hand,
    called,
    logged,
    logits_by_hand,
    loss_by_hand,
    on,
    prepare,
    prepare_sft,
    stacked,
    trained,
    weights,
    which,
)
from transformers import AutoModelForCausalLM, EarlyStoppingCallback

from paceline import PACE
from paceline.integrations.transformers import PaceTrainer

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),  # peft
    pytest.mark.usefixtures("quick"),
]


# ---- a model, its data, and its training by hand -----------------------------------------------


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_training_is_that_by_hand(kind, tmp_path):
    """Which makes what follows mean something."""
    trainer = prepare(tmp_path, kind)
    seen = {}

    def note(step, model, **_):
        seen[step] = which(model, kind, step)

    trainer.add_callback(on("on_step_end", note))
    trainer.train()
    assert seen == {step: called("live", kind, step) for step in range(1, 7)}


# ---- evaluation ------------------------------------------------------------------------------


class Watched(PaceTrainer):
    """Notes what is evaluated."""

    def prediction_step(self, model, inputs, *args, **kwargs):
        self.model.batches.append(inputs["input_ids"].tolist())  # its own would be put back
        return super().prediction_step(model, inputs, *args, **kwargs)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_live_and_returned_weights_are_evaluated_on_the_same_batches(kind, tmp_path):
    evaluated = []
    batches = [stacked(EVAL[i : i + BATCH])["input_ids"].tolist() for i in range(0, 12, BATCH)]

    def note(step, metrics, model, **_):
        once = kind == "adamw" or (step == 0 and kind in ("pace", "pullback"))
        assert model.batches == batches * (1 if once else 2)
        model.batches.clear()
        held = "live" if trainer.is_in_train else "returned"
        assert which(model, kind, step) == called(held, kind, step)
        evaluated.append((step, metrics["eval_live_loss"], metrics["eval_loss"]))

    trainer = prepare(
        tmp_path, kind, cls=Watched, eval_strategy="steps", eval_steps=2, eval_on_start=True
    )
    trainer.model.batches = []
    trainer.add_callback(on("on_evaluate", note))
    trainer.train()
    hand = by_hand(kind)
    assert [step for step, *_ in evaluated] == [0, 2, 4, 6]
    for step, live, returned in evaluated:
        # of losses near 3, the rounding of float32
        assert live == pytest.approx(loss_by_hand(hand.live[step]), abs=1e-5)
        assert returned == pytest.approx(loss_by_hand(hand.returned[step]), abs=1e-5)
        assert abs(live - returned) > 1e-3 or kind == "adamw" or step == 0
        assert live == returned or kind != "adamw"
        assert logged(trainer, "eval_live_loss")[step] == live
        assert logged(trainer, "eval_loss")[step] == returned
    # after the training the model holds what it returns, and goes on to
    trainer.evaluate()
    assert evaluated[4:] == [pytest.approx(evaluated[3], abs=1e-5)]


def test_further_averages_are_evaluated_by_name(tmp_path):
    def several(params):
        return PACE(
            params, lr=0.01, pullback=0.5, returns={"slow": "ema:kappa=0.7", "mean": "uniform"}
        )

    trainer = prepare(tmp_path, several)
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    found = trainer.evaluate()
    for name, key in (("slow", "eval_loss"), ("mean", "eval_mean_loss")):
        with optimizer.averaged(name):
            expected = loss_by_hand(weights(trainer.model))
        assert found[key] == pytest.approx(expected, abs=1e-5)
    assert abs(found["eval_loss"] - found["eval_mean_loss"]) > 1e-3
    assert found.keys() & {"eval_slow_loss", "eval_average_loss"} == set()
    with optimizer.averaged("mean"):
        before = weights(trainer.model)
        trainer.evaluate()  # leaves in the model what it found there
        assert loss_by_hand(weights(trainer.model)) == loss_by_hand(before)


def spread(prediction):
    # the second under a name that is complete already
    return {"spread": prediction.predictions.std(), "eval_peak": prediction.predictions.max()}


@pytest.mark.parametrize("kind", ["pace", "schedule-free", "adamw"])
def test_metrics_datasets_and_prefixes(kind, tmp_path):
    parts = {"one": EVAL[:4], "two": EVAL[4:]}
    trainer = prepare(tmp_path, kind, compute_metrics=spread, eval_dataset=parts)
    evaluations = []
    trainer.add_callback(on("on_evaluate", lambda step, metrics, **_: evaluations.append(metrics)))
    trainer.train()
    live, returned = by_hand(kind).live[6], by_hand(kind).returned[6]

    def check(metrics, prefix, rows):
        for state, name in ((live, f"{prefix}_live"), (returned, prefix)):
            logits = logits_by_hand(state, rows)
            assert metrics[f"{name}_loss"] == pytest.approx(loss_by_hand(state, rows), abs=1e-5)
            expected = logits.numpy().std().item()
            assert metrics[f"{name}_spread"] == pytest.approx(expected, abs=1e-5)
        ends = ("loss", "live_loss", "spread", "live_spread", "runtime", "samples_per_second")
        assert {f"{prefix}_{end}" for end in ends} <= metrics.keys()

    metrics = trainer.evaluate()
    for name, rows in parts.items():
        check(metrics, f"eval_{name}", rows)
    assert len(evaluations) == 2  # one for each dataset
    check(evaluations[0], "eval_one", parts["one"])
    check(evaluations[1], "eval_two", parts["two"])
    check(trainer.evaluate(parts["one"], metric_key_prefix="test"), "test", parts["one"])
    metrics = trainer.evaluate(EVAL)
    check(metrics, "eval", EVAL)
    for name, state in (("eval_peak", returned), ("eval_live_peak", live)):
        assert metrics[name] == pytest.approx(logits_by_hand(state).max().item(), abs=1e-5)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_predictions_are_the_returned_models(kind, tmp_path):
    trainer = prepare(tmp_path, kind)
    hand, seen = by_hand(kind), []

    def predict(step, **_):
        predicted = trainer.predict(EVAL)
        expected = logits_by_hand(hand.returned[step])
        torch.testing.assert_close(
            torch.from_numpy(predicted.predictions), expected, atol=1e-5, rtol=0
        )
        assert predicted.metrics["test_loss"] == pytest.approx(
            loss_by_hand(hand.returned[step]), abs=1e-5
        )
        assert not [name for name in predicted.metrics if "live" in name]
        seen.append(which(trainer.model, kind, step))

    trainer.add_callback(on("on_step_end", predict))
    trainer.train()
    predict(6)
    assert seen[:6] == [called("live", kind, step) for step in range(1, 7)]
    assert seen[6:] == [called("returned", kind, 6)]


def stops(losses, patience):
    """The step at which a run of this patience stops, and the best until then."""
    best = 0
    for step, loss in enumerate(losses):
        if loss < losses[best]:
            best = step
        elif step - best == patience:
            return step + 1, best + 1
    raise AssertionError(losses)


def test_early_stopping_goes_by_the_returned_model(tmp_path):
    hand = by_hand("pullback", steps=15)
    stop, best = stops([loss_by_hand(x) for x in hand.returned[1:]], patience=3)
    assert stops([loss_by_hand(x) for x in hand.live[1:]], patience=3)[0] < stop < 15
    trainer = prepare(
        tmp_path,
        "pullback",
        max_steps=15,
        eval_strategy="steps",
        eval_steps=1,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        callbacks=[EarlyStoppingCallback(3)],
    )
    trainer.train()
    assert trainer.state.global_step == stop
    assert trainer.state.best_metric == pytest.approx(loss_by_hand(hand.returned[best]), abs=1e-5)


def test_the_metrics_of_trl_are_of_one_model_each(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 2, "prediction_loss_only": True}
    trainer = prepare_sft(tmp_path / "a", max_steps=4, **options)
    trainer.train()
    silent = prepare_sft(tmp_path / "b", max_steps=4)
    silent.train()
    for key in ("loss", "entropy", "mean_token_accuracy"):  # those of the training batches
        assert logged(trainer, key) == logged(silent, key)
        assert len(logged(trainer, key)) == 4
    entries = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert [entry["step"] for entry in entries] == [2, 4]
    metrics = trainer.evaluate()
    # It holds the returned model now, and the live weights wait where the average was.
    returned = weights(trainer.model)
    state = trainer.optimizer.optimizer.state
    live = {name: state[p]["average"] for name, p in trained(trainer.model).items()}
    labels = stacked(EVAL)["labels"][:, 1:]
    for found in (metrics, entries[-1]):
        for prefix, x in (("eval_live", live), ("eval", returned)):
            chances = logits_by_hand(x)[:, :-1].log_softmax(-1)
            entropy = -(chances.exp() * chances).sum(-1).mean().item()
            hits = (chances.argmax(-1) == labels).float().mean().item()
            assert found[f"{prefix}_entropy"] == pytest.approx(entropy, abs=1e-5)
            assert found[f"{prefix}_mean_token_accuracy"] == pytest.approx(hits, abs=1e-6)
            assert found[f"{prefix}_loss"] == pytest.approx(loss_by_hand(x), abs=1e-5)
    assert abs(metrics["eval_entropy"] - metrics["eval_live_entropy"]) > 1e-3
    # a prediction leaves nothing for the next evaluation
    trainer.predict(trainer.eval_dataset)
    assert trainer.evaluate()["eval_entropy"] == metrics["eval_entropy"]


# ---- the examples ----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:'pin_memory'")  # without an accelerator
@pytest.mark.parametrize("name", ["trainer", "sft_trainer", "plain_loop"])
def test_an_example_writes_the_average_of_what_it_trained(name, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    iterates = []  # before the first step, and after each

    def note(optimizer, *_):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        iterates.append([(p, p.detach().double()) for p in params])

    def note_first(optimizer, *_):
        if not iterates:
            note(optimizer)

    monkeypatch.setattr(sys, "argv", [name, "--out", str(out)])
    hooks = [
        register_optimizer_step_pre_hook(note_first),
        register_optimizer_step_post_hook(note),
    ]
    try:
        ended = runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    finally:
        for hook in hooks:
            hook.remove()
    said = capsys.readouterr().out
    *_, (live, returned) = re.findall(r"live weights ([\d.]+), returned ([\d.]+)", said)
    assert float(returned) < float(
        live
    )  # and not by luck: the data are noisy, and there are enough
    assert len(iterates) == 301
    model = ended["trainer"].model if "trainer" in ended else ended["model"]
    names = {p: name for name, p in model.named_parameters()}
    saved = AutoModelForCausalLM.from_pretrained(out).state_dict()
    for (p, average), *following in zip(*iterates, strict=True):
        for t, (same_p, x) in enumerate(following, 1):
            assert same_p is p
            average = average + (1 + t) ** -0.7 * (x - average)
        # float32's rounding over the steps
        torch.testing.assert_close(saved[names[p]], average.float(), atol=2e-6, rtol=1e-5)
        assert (x - average).abs().max() > 1e-4


# ---- engines that keep the weights elsewhere ---------------------------------------------------


def test_flattened_weights_are_refused_before_anything_is_trained(tmp_path):
    trainer = prepare(tmp_path)
    for p in trainer.model.parameters():
        p._fsdp_flattened = True  # FSDP1's mark
    with pytest.raises(ValueError, match="flattened by FSDP1.*FSDP2"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert which(trainer.model, "pace", 0) == "both"


def test_an_optimizer_of_copies_is_refused_before_anything_is_trained(tmp_path):
    """As DeepSpeed's ZeRO has it: the average of copies would never get into the model."""

    def of_copies(make):
        return lambda params: make([p.detach().clone().requires_grad_() for p in params])

    trainer = prepare(tmp_path, of_copies(OPTIMIZERS["pace"]))
    with pytest.raises(ValueError, match="must step parameters of the model, .*DeepSpeed's ZeRO"):
        trainer.train()
    assert trainer.state.global_step == 0
    prepare(tmp_path, of_copies(OPTIMIZERS["adamw"]), max_steps=1).train()  # returns the live ones


def test_an_optimizer_that_is_not_used_is_refused(tmp_path):
    """As transformers drops one of `optimizers` under DeepSpeed, and makes its own."""

    class Dropping(PaceTrainer):
        def create_optimizer(self, model=None):
            self.optimizer = torch.optim.AdamW(self.model.parameters())
            return self.optimizer

    with pytest.raises(ValueError, match="AdamW took the place of the given PACE, .*DeepSpeed"):
        prepare(tmp_path, cls=Dropping).train()
