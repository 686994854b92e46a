"""The best average, or the live weights, chosen by a function of one's own."""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from problems import RETURNS, advance, assert_same, problem, same, snapshot
from sharding import advance as advance_wrapped
from sharding import net, whole, wrapped
from torch import nn

from paceline import PACE, Choice, Pullback

KINDS = {
    "pace": lambda params, **o: PACE(params, lr=0.05, pullback=2.0, **o),
    "bfloat16 state": lambda params, **o: PACE(
        params, lr=0.05, pullback=2.0, state_dtype=torch.bfloat16, **o
    ),
    "pullback": lambda params, **o: Pullback(torch.optim.AdamW(params, lr=0.05), 2.0, **o),
}
NAMES = ["slow", "mean", "average", "live"]


def trained(kind="pace", dtype=torch.float32, **options):
    model, generator = problem(dtype)
    opt = KINDS[kind](model.parameters(), **{"returns": RETURNS, **options})
    advance(model, opt, generator, 5)
    return model, opt, generator


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def each(model, opt):
    """The weights of each average, and the live ones, by the swap that users know."""
    found = {}
    for name in opt.returns:
        with opt.averaged(name):
            found[name] = weights(model)
    return {**found, "live": weights(model)}


def scoring(model, models, numbers):
    """A score that knows the model by its weights."""

    def score():
        assert torch.is_grad_enabled()
        (name,) = [name for name, x in models.items() if same(x, weights(model))]
        return numbers[name]

    return score


@pytest.mark.parametrize("best", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_best_is_in_the_model_and_the_live_weights_come_back(kind, dtype, best):
    model, opt, generator = trained(kind, dtype)
    before, models = snapshot(model, opt), each(model, opt)
    assert not same(models["slow"], models["live"])
    numbers = {name: 2.0 + i for i, name in enumerate(NAMES)} | {best: 1.0}
    assert opt.choose(scoring(model, models, numbers)) == Choice(best, numbers)
    assert same(weights(model), models[best])
    assert opt.swapped == (best != "live")
    if opt.swapped:
        with pytest.raises(RuntimeError, match="call train"):
            opt.step()
    opt.train()
    assert_same(snapshot(model, opt), before)
    advance(model, opt, generator, 1)


def test_scores_may_be_to_be_maximized():
    model, opt, _ = trained()
    models = each(model, opt)
    numbers = {"slow": 0.1, "mean": math.inf, "average": 0.3, "live": -math.inf}
    assert opt.choose(scoring(model, models, numbers)).best == "live"
    opt.train()
    assert opt.choose(scoring(model, models, numbers), maximize=True).best == "mean"


def test_of_equal_scores_the_default_wins():
    opt = trained()[1]
    assert opt.choose(lambda: 1.0) == Choice("slow", dict.fromkeys(NAMES, 1.0))
    assert list(opt.choose(lambda: 1.0).scores) == NAMES


def test_the_averages_of_one_rule():
    model, opt, _ = trained(returns=None)
    models = each(model, opt)
    assert opt.choose(scoring(model, models, {"average": 3, "live": 2})).best == "live"
    assert same(weights(model), models["live"])


@pytest.mark.parametrize(
    "kind", [float, int, np.float32, np.float64, torch.tensor], ids=lambda x: x.__name__
)
def test_numbers_of_any_kind(kind):
    """As evaluations return them."""
    model, opt, _ = trained()
    numbers = {name: kind(i) for i, name in enumerate(reversed(NAMES))}
    found = opt.choose(scoring(model, each(model, opt), numbers))
    assert found == Choice("live", {name: 3.0 - i for i, name in enumerate(NAMES)})
    assert {type(x) for x in found.scores.values()} == {float}


BAD = {"nan": math.nan, "none": None, "text": "1.0", "list": [1.0], "flag": True}


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("held", [None, "mean"])
def test_what_is_no_number_is_refused(held, value):
    model, opt, _ = trained()
    models = each(model, opt)
    if held:
        opt.eval(held)
    before = snapshot(model, opt)
    score = scoring(model, models, {"slow": 1.0, "mean": 2.0, "average": BAD[value]})
    with pytest.raises(ValueError, match=r"^score must return one number .* for 'average'$"):
        opt.choose(score)
    assert opt.swapped == bool(held)
    assert_same(snapshot(model, opt), before)


@pytest.mark.parametrize("held", [None, "mean"])
@pytest.mark.parametrize("error", [OSError("no data"), KeyboardInterrupt()], ids=["error", "stop"])
def test_after_an_exception_all_is_as_before(held, error):
    model, opt, _ = trained()
    if held:
        opt.eval(held)
    before = snapshot(model, opt)
    calls = []

    def score():
        calls.append(1)
        if len(calls) == 3:
            raise error
        return 1.0

    with pytest.raises(type(error)):
        opt.choose(score)
    assert_same(snapshot(model, opt), before)


def test_without_averages_it_is_refused():
    model, _ = problem()
    opt = PACE(model.parameters(), lr=0.1, pullback=1.0)
    with pytest.raises(RuntimeError, match=r"^choose\(\) needs averages; call it after the first"):
        opt.choose(lambda: 1.0)


# ---- several ranks ----------------------------------------------------------------------------


def choose(engine, numbers):
    """What is chosen, what is in the model then, and whether the live weights came back."""
    model = wrapped(net(), engine)
    opt = PACE(model.parameters(), lr=0.05, pullback=2.0, returns=RETURNS)
    advance_wrapped(model, opt, engine, 3)
    live = [whole(p) for p in model.parameters()]
    mine, rank = iter(numbers), dist.get_rank() if engine else 0

    def score():
        model(torch.zeros(2, 6))  # takes part in gathering
        value = next(mine)[rank]
        if isinstance(value, Exception):
            raise value
        return value

    try:
        found = opt.choose(score)
    except (ValueError, OSError) as error:
        assert all(torch.equal(whole(p), x) for p, x in zip(model.parameters(), live, strict=True))
        return str(error)
    held = [whole(p) for p in model.parameters()]
    opt.train()
    assert all(torch.equal(whole(p), x) for p, x in zip(model.parameters(), live, strict=True))
    with opt.averaged(None if found.best == "live" else found.best):
        expected = live if found.best == "live" else [whole(p) for p in model.parameters()]
    assert all(map(torch.equal, held, expected))
    assert isinstance(model, nn.Module)
    return found


def close(error):
    return error.split(", got")[1]


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_ranks_agree_on_the_mean(engine, ranks):
    """Each alone would choose another."""
    numbers = [(1.0, 9.0), (9.0, 1.5), (3.0, 4.0), (7.0, 7.0)]
    expected = Choice("average", dict(zip(NAMES, [5.0, 5.25, 3.5, 7.0], strict=True)))
    assert ranks(choose, engine, numbers) == [expected, expected]


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
def test_what_one_rank_lacks_is_refused_on_all(ranks):
    """None of them waits for the other."""
    refused = ranks(choose, "fsdp", [(1.0, 1.0), (2.0, None)])
    assert list(map(close, refused)) == [" none for 'mean' on a rank", " None for 'mean'"]
    refused = ranks(choose, "fsdp", [(1.0, 1.0), (OSError("no data"), 1.0)])
    assert refused[0] == "no data"
    assert close(refused[1]) == " none for 'mean' on a rank"
