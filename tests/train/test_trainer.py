"""The trainer's two losses, and the averages that its methods return."""

import math

import pytest
import torch

pytest.importorskip("transformers")

from comparing import loss_by_hand, method_of, schedule_of, tiny_runs
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from transformers import AutoModelForCausalLM

from paceline import PACE, Pullback
from paceline.averaging import PowerEMA
from paceline.state import averages_of
from paceline.train.data import blocks
from paceline.train.methods import BASES, Setup, parse_method
from paceline.train.terminal import show_losses


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_runs(tmp_path_factory)


@pytest.mark.parametrize(
    "method", ["adamw", "ema", "uniform", "lookahead", "schedule-free", "pace", "pullback:muon"]
)
def test_both_models_are_scored_and_the_live_one_stays(tiny, method):
    tokens, run = tiny
    trained, _ = run(method)
    trainer = trained.trainer
    assert not trained.stopped
    assert [point["step"] for point in trainer.curve] == [0, 4, 8, 12]
    start, end = trainer.curve[0], trainer.curve[-1]
    assert start["live_loss"] == start["returned_loss"]
    assert end["train_loss"] < start["returned_loss"]
    with trainer.live():
        assert loss_by_hand(trainer.model, tokens) == pytest.approx(end["live_loss"], rel=1e-5)
        assert (end["live_loss"] == end["returned_loss"]) == (method == "adamw")
        optimizer = trainer.optimizer.optimizer
        if isinstance(optimizer, PACE):
            trainer.model.load_state_dict(optimizer.averaged_state_dict(trainer.model))
            returned = loss_by_hand(trainer.model, tokens)
            assert returned == pytest.approx(end["returned_loss"], rel=1e-5)
    assert ("gain_mean" in end) == (method in ("pace", "pullback:muon"))


def test_all_methods_train_on_the_same_batches_and_are_scored_on_the_same_text(tiny):
    tokens, run = tiny
    train_blocks, held_out = (blocks(tokens[part], 16) for part in ("train", "validation"))
    rows = {tuple(row.tolist()) for row in train_blocks}
    _, first = run("adamw")
    assert len(first[True]) == 12
    for name in ("ema", "schedule-free", "pace"):
        _, seen = run(name)
        assert all(map(torch.equal, seen[True], first[True]))
    for batch in first[True]:
        assert all(tuple(row.tolist()) in rows for row in batch)
    scored = torch.cat(first[False][: len(first[False]) // 4])  # of four evaluations the first
    assert len(scored) == 32
    assert torch.equal(scored, held_out[:: len(held_out) // 32][:32])
    _, other = run("adamw", seed=4)
    assert not all(map(torch.equal, other[True], first[True]))


def test_watching_changes_nothing(tiny):
    """AdamW and the EMA that only watches it are the same run."""
    _, run = tiny
    live = [point["live_loss"] for point in run("adamw")[0].trainer.curve]
    ema = [point["live_loss"] for point in run("ema")[0].trainer.curve]
    assert ema == pytest.approx(live, rel=1e-6)


def test_read_outs_are_the_averages_of_the_run_that_they_share(tiny):
    """Each as `Pullback` keeps it around the same AdamW, from a run of its own."""
    tokens, run = tiny
    texts = ["adamw", "ema", "uniform", "swa:every=2", "lawa:window=2:every=3", "bema"]
    shared, seen = run(",".join(texts))
    assert len(seen[True]) == 12
    trainer = shared.trainer
    for text, curve in zip(texts[1:], trainer.curves[1:], strict=True):
        alone, _ = run(text)
        assert [p["live_loss"] for p in curve] == [p["live_loss"] for p in trainer.curve]
        assert alone.trainer.curve == curve
        with trainer.returned(method_of(text)):
            loss = loss_by_hand(trainer.model, tokens)
        assert loss == pytest.approx(curve[-1]["returned_loss"], rel=1e-5)
    ends = [curve[-1]["returned_loss"] for curve in trainer.curves]
    assert len(set(ends)) == len(ends)
    assert loss_by_hand(trainer.model, tokens) == pytest.approx(ends[0], rel=1e-5)


def test_a_read_out_is_what_the_optimizer_of_its_average_returns(tiny):
    _, run = tiny
    ema = run("ema")[0].trainer.curve
    pull = run("pullback:adamw:pullback=0")[0].trainer.curve
    for a, b in zip(ema, pull, strict=True):
        assert a["returned_loss"] == pytest.approx(b["returned_loss"], rel=1e-6)
        assert a["live_loss"] == pytest.approx(b["live_loss"], rel=1e-6)


@pytest.mark.parametrize("base", BASES)
def test_every_base_trains_and_is_pulled(tiny, base):
    _, run = tiny
    rate = {"sgd": 0.3, "shampoo": 0.1, "radam": 0.05}.get(base, 0.01)
    trainer = run(f"pullback:{base}:pullback=0.1:lr={rate}", warmup=0)[0].trainer
    start, end = trainer.curve[0], trainer.curve[-1]
    assert end["live_loss"] < start["live_loss"]
    assert end["returned_loss"] < start["returned_loss"]
    assert end["returned_loss"] != end["live_loss"]
    assert 0 < end["gain_mean"] <= 1
    groups = trainer.optimizer.param_groups
    assert {group["initial_lr"] for group in groups} == {rate}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.1}
    if base == "muon":  # of width 16: attention and MLP, in and out; not the embeddings, nor biases
        assert sum(len(group["params"]) for group in groups if group["use_muon"]) == 4


def weights_of_each_step(run, text):
    """A trainer, and its live weights after each step, flat, with those at the start."""
    weights = []

    def note(optimizer, *_):
        if not isinstance(optimizer, PACE | Pullback):  # what one of them goes around
            return
        params = [p for group in optimizer.param_groups for p in group["params"]]
        weights.append(torch.cat([p.detach().flatten().double() for p in params]))

    hooks = [
        register_optimizer_step_pre_hook(lambda *of: None if weights else note(*of)),
        register_optimizer_step_post_hook(note),
    ]
    try:
        trainer = run(text)[0].trainer
    finally:
        for hook in hooks:
            hook.remove()
    return trainer, weights


@pytest.mark.parametrize(
    ("texts", "kappa", "every"),
    [
        ("pace,pace:return_kappa=0.7", 0.7, 1),
        ("pullback:adamw,pullback:adamw:return_kappa=0.7", 0.7, 1),
        ("pace:every=5", 0.3, 5),
        ("pace:every=5,pace:every=5:return_kappa=0.7", 0.7, 1),
    ],
)
def test_which_average_is_returned(tiny, texts, kappa, every):
    """By hand, in float64, from the weights after each of 12 steps."""
    tokens, run = tiny
    trainer, weights = weights_of_each_step(run, texts)
    assert len(weights) == 13
    average = weights[0].clone()
    for step in range(every, 13, every):
        average += (1 + step) ** -kappa * (weights[step] - average)
    last = method_of(texts.split(",")[-1])
    with trainer.returned(last):
        params = [p for group in trainer.optimizer.param_groups for p in group["params"]]
        returned = torch.cat([p.detach().flatten().double() for p in params])
        loss = loss_by_hand(trainer.model, tokens)
    torch.testing.assert_close(returned, average, rtol=1e-4, atol=1e-6)
    assert loss == pytest.approx(trainer.curves[-1][-1]["returned_loss"], rel=1e-5)
    # To read it out changes nothing of the training, nor of the pull's own average.
    alone = run(texts.split(",")[0])[0].trainer
    assert alone.curve == trainer.curves[0]
    lives = [[point["live_loss"] for point in curve] for curve in trainer.curves]
    assert all(live == lives[0] for live in lives)


@pytest.mark.parametrize("base", ["pace:every=5", "pullback:sgd"])
def test_a_pull_is_never_toward_the_slower_average(base):
    """Also where one optimizer does both."""
    model = torch.nn.Linear(2, 2)
    method = parse_method(f"{base}:return_kappa=0.7:kappa=0.3:pullback=2", lr=0.1)
    facts = {"decayed": set(), "weight_decay": 0.0, "warmup": 0, "steps": 9}
    opt = method.build(Setup(model, **facts))
    group = opt.param_groups[0]
    every = method.get("every") or 1
    expected = {"average": PowerEMA(0.3, every=every), "return_returned": PowerEMA(0.7)}
    assert averages_of(group).rules == expected
    assert group["pullback"] == 2


def test_lookahead_returns_its_slow_weights(tiny):
    tokens, run = tiny
    trainer = run("lookahead:every=5")[
        0
    ].trainer  # of 12 steps: two after the slow weights moved last
    end = trainer.curve[-1]
    assert end["returned_loss"] != end["live_loss"]
    with trainer.live():
        assert loss_by_hand(trainer.model, tokens) == pytest.approx(end["live_loss"], rel=1e-5)
    slow = trainer.optimizer.optimizer.state
    for p in trainer.model.parameters():
        p.data.copy_(slow[p]["slow_params"])
    assert loss_by_hand(trainer.model, tokens) == pytest.approx(end["returned_loss"], rel=1e-5)


def test_rate_warm_up_decay_and_clipping_reach_the_optimizer(tiny):
    _, run = tiny
    rates = []

    def follow(optimizer, args, kwargs):
        rates.append(optimizer.param_groups[0]["lr"] / 1e-2)

    hook = register_optimizer_step_pre_hook(follow)
    try:
        trainer = run("adamw:wsd", steps=10, warmup=4)[0].trainer
    finally:
        hook.remove()
    assert rates == pytest.approx([0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 0.5])
    assert {g["weight_decay"] for g in trainer.optimizer.param_groups} == {0.1, 0.0}
    free = run("schedule-free", warmup=4)[0].trainer.optimizer.optimizer
    assert free.param_groups[0]["warmup_steps"] == 4
    loose, tight = (run("adamw", max_grad_norm=x)[0].trainer.curve for x in (100.0, 1e-9))
    assert tight[-1]["train_loss"] != loose[-1]["train_loss"]


@pytest.mark.parametrize(("steps", "evaluations"), [(12, 3), (15, 8), (23, 12), (50, 8)])
def test_evaluations_are_as_many_as_asked_for_at_most(tiny, steps, evaluations):
    curve = tiny[1]("pace", steps=steps, evaluations=evaluations)[0].trainer.curve
    assert len(curve) - 1 <= evaluations
    assert all("gain_mean" in point for point in curve[1:])
    assert [curve[0]["step"], curve[-1]["step"]] == [0, steps]


def test_divergence_shows(tiny):
    trained, _ = tiny[1]("adamw:lr=1e30", warmup=0)
    assert not math.isfinite(trained.trainer.curve[-1]["returned_loss"])
    # Nor is one bad batch among many dropped from the mean, which is the Trainer's default.
    assert not trained.trainer.args.logging_nan_inf_filter


def test_the_saved_model_is_the_returned_one(tiny, tmp_path):
    tokens, run = tiny
    trainer = run("pace")[0].trainer
    trainer.save_returned(method_of("pace"), str(tmp_path))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    returned = trainer.curve[-1]["returned_loss"]
    assert loss_by_hand(saved, tokens) == pytest.approx(returned, rel=1e-5)
    live = trainer.curve[-1]["live_loss"]
    with trainer.live():
        assert loss_by_hand(trainer.model, tokens) == pytest.approx(live, rel=1e-5)


def test_a_stopped_run_says_so(tiny):
    _, run = tiny
    trained, _ = run("adamw", watch=lambda step, losses: step == 5)
    assert trained.stopped
    assert trained.trainer.state.global_step == 5


@pytest.mark.parametrize("gain", [0.1, 0.5, 1.0])
def test_an_average_that_is_pulled_toward_moves_as_under_the_twin(gain):
    """Under a steady gradient, when both have settled; β itself falls by 6e-4 a step then."""
    steps = 500
    p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    pull = Pullback(torch.optim.SGD([p], lr=1.0), gain, PowerEMA(0.3), gain="scalar")
    twin = schedule_of(f"adamw:twin:kappa=0.3:twin_gain={gain}", steps=steps)
    other = average = 0.0
    averages = []
    for step in range(1, steps + 1):
        p.grad = torch.ones_like(p)
        pull.step()
        other -= twin[step - 1]
        average += (other - average) * (1 + step) ** -0.3
        averages.append((float(pull.state[p]["average"]), average))
    ours, its = (now - before for before, now in zip(*averages[-2:], strict=True))
    assert ours == pytest.approx(its, rel=5e-3)


def test_the_twin_of_a_saturated_pull_is_a_schedule():
    """power and twin use the averaging weight that PACE itself uses."""
    assert schedule_of("adamw:power")[9] == pytest.approx(PowerEMA(0.3).weight(10))
    model = torch.nn.Linear(2, 2)
    rest = {"decayed": {"weight"}, "weight_decay": 0.1, "warmup": 5, "steps": 10}
    pace = method_of("pace").build(Setup(model, **rest))
    facts = {"lr": 1e-2, "pullback": 3.0, "averaging": "ema:kappa=0.3", "state_dtype": None}
    assert facts.items() <= pace.param_groups[0].items()
    ema = method_of("ema:state=bf16").build(Setup(model, **rest)).param_groups
    assert (ema[0]["pullback"], ema[0]["state_dtype"]) == (0.0, torch.bfloat16)
    assert [(len(group["params"]), group["weight_decay"]) for group in ema] == [(1, 0.1), (1, 0)]
    (ema, _) = method_of("ema:half_life=7:state=bf16").build(Setup(model, **rest)).param_groups
    assert (ema["averaging"], ema["state_dtype"]) == ("ema:half_life=7", torch.bfloat16)
    for text in ("pace:return_kappa=0.7", "pullback:sgd:return_kappa=0.7"):
        group = method_of(text).build(Setup(model, **rest, scale=4)).param_groups[0]
        assert group["averaging"] == "ema:kappa=0.3"
        assert group["returns"] == f"returned={PowerEMA(0.7).scaled(4)}"
    for text in ("adamw", "ema", "uniform", "pace"):
        for eps in (1e-8, 0.25):
            method = method_of(text if eps == 1e-8 else f"{text}:eps={eps}")
            for group in method.build(Setup(model, **rest)).param_groups:
                assert group["eps"] == eps


def test_a_bar_shows_the_best_returned_model_also_while_the_live_one_is_ahead():
    losses = {"eval_live_loss": 2.0, "eval_loss": 2.5, "eval_ema kappa=0.7_loss": 2.25, "loss": 1.0}
    assert show_losses(losses) == "live 2.000 returned 2.250"
    assert show_losses({"eval_live_loss": 2.0}) == "live 2.000 returned 2.000"  # AdamW alone
    assert show_losses({"loss": 1.0}) == ""
