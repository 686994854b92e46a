"""Elastic: workers that differ, that end, and what is refused."""

import copy
import itertools
import os
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from test_elastic import Collectives
from torch import optim
from torch.nn import Parameter
from workers import advance, give, made, start

from paceline import PACE, Elastic, Pullback
from paceline.state import taken_in

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")

# ---- workers that differ, and that end ----------------------------------------------------------


def difference(what):
    """What is said, and whether weights and state are as before."""
    rank = dist.get_rank()
    options = {"every": 2 + (rank if what == "every" else 0), "exchange": "average", "pull": 1.0}
    if what == "pull":
        options["pull"] = 1.0 - rank / 4
    nonfinite = "ignore" if what == "nonfinite" and rank else "skip"
    params = [Parameter(torch.ones(3 + (rank if what == "model" else 0)))]
    if what == "weights":
        params[0].data.add_(rank)
    base = Pullback(optim.SGD(params, lr=0.1), nonfinite=nonfinite)
    opt = Elastic(base, **options)
    if what == "step" and rank:
        for group in opt.param_groups:
            group["elastic_steps"] = 5
    params[0].grad = torch.ones_like(params[0])
    before = params[0].detach().clone()
    try:
        opt.step()
    except RuntimeError as error:
        return str(error), torch.equal(params[0], before) and not opt.state
    return "none", False


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("every", "same options: worker {} has every={}, "),
        ("pull", "same options: worker {} has every=2, exchange='average', pull="),
        ("nonfinite", "same options: worker {} has every=2, exchange='average', pull=1.0, "),
        ("model", "same model: worker {} has 1 parameters of {} numbers"),
        ("weights", "same center: worker {} has the same shapes and other numbers"),
        ("step", "same step: worker {} has step "),
    ],
)
def test_workers_that_differ_are_told_before_anything_changes(what, says, ranks):
    for rank, (said, unchanged) in enumerate(ranks(difference, what)):
        other = 1 - rank
        numbers = {"every": 2 + other, "model": 3 + other}
        assert said.startswith("workers must have the " + says.format(other, numbers.get(what)))
        assert said.endswith("; nothing was changed")
        assert "\n" not in said
        assert unchanged


def death():
    """Two workers of which one is killed after three steps; what the other says, and holds."""
    group = dist.new_group(timeout=timedelta(seconds=20))
    params, opt = made("SGD", {"every": 4, "process_group": group})
    advance(params, opt, 3)
    if dist.get_rank():
        os._exit(1)
    try:
        advance(params, opt, 1, first=4)
    except RuntimeError as error:
        begin = zip(params, start(), strict=True)
        still = [torch.equal(opt.state[p]["average"], torch.tensor(x)) for p, x in begin]
        return str(error), still, opt.param_groups[0]["elastic_steps"]


def test_a_killed_worker_ends_the_others_at_the_next_exchange(tmp_path):
    (said, centers, steps), killed = Ranks(2, tmp_path)(death, last=True)
    assert killed is None
    assert said.startswith("the exchange at step 4 failed, as it does when a worker has ended: ")
    assert said.endswith("; nothing was exchanged")
    assert "\n" not in said
    assert centers == [True, True]
    assert steps == 3


def infinite():
    params, opt = made("SGD", {"every": 2})
    advance(params, opt, 1)
    if dist.get_rank():
        params[1].data[2] = float("inf")
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.zeros_like(p)
    try:
        opt.step()
    except FloatingPointError as error:
        same = [torch.equal(a, b) for a, b in zip(params, before, strict=True)]
        steps = taken_in(opt.state[params[0]]), opt.param_groups[0]["elastic_steps"]
        return str(error), same, steps


def test_weights_that_are_not_finite_end_the_run_on_all(ranks):
    for said, same, steps in ranks(infinite):
        assert said == (
            "parameter 1 of group 0 of shape (5,) is not finite on a worker at step 2; nothing was "
            "exchanged"
        )
        assert same == [True, True]
        assert steps == (2, 2)  # the step itself was taken


def restarted():
    with pytest.raises(RuntimeError, match="center is common to all workers; load a checkpoint"):
        made("PACE", {"every": 2, "exchange": "average"})[1].restart_averages()


def test_a_center_is_not_restarted_by_one_worker(ranks):
    ranks(restarted)


def skipped():
    """A step that one worker alone skips, and what is sent in it."""
    params, opt = made("SGD", {"every": 3})
    advance(params, opt, 1)
    give(params, dist.get_rank(), 2)
    if dist.get_rank():
        params[0].grad[0, 0] = float("nan")
    with Collectives() as mode:
        opt.step()
    advance(params, opt, 1, first=3)
    finite = all(bool(p.isfinite().all()) for p in params)
    return opt.stats()["skipped_steps"], mode.sent, finite, opt.param_groups[0]["elastic_steps"]


def test_a_worker_skips_a_step_alone(ranks):
    assert ranks(skipped) == [(0, [], True, 3), (1, [], True, 3)]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"every": 0}, "every must be a whole number of steps >= 1, got 0"),
        ({"every": True}, "every must be a whole number of steps >= 1, got True"),
        ({"exchange": "gossip"}, "exchange must be one of easgd, diloco, average, got 'gossip'"),
        ({"pull": 0.6}, "pull must be a number at most 1/2 for 2 workers, got 0.6"),
        ({"exchange": "average", "pull": 1.1}, "pull must be a number in [0, 1], got 1.1"),
        ({"exchange": "average"}, "exchange='average' needs a pull, or the workers never meet"),
        ({"exchange": "diloco", "pull": 0.5}, "pull must be left out with diloco"),
        ({"exchange": "diloco", "outer_lr": 0.0}, "outer_lr must be a number > 0, got 0.0"),
        ({"exchange": "diloco", "outer_momentum": 1}, "outer_momentum must be in [0, 1), got 1"),
        ({"outer_lr": 0.5}, "outer_lr must be left out with easgd, got 0.5"),
        ({"outer_momentum": 0.5}, "outer_momentum must be left out with easgd, got 0.5"),
        ({"exchange_dtype": torch.float16}, "exchange_dtype must be None or torch.bfloat16"),
    ],
)
def test_options_out_of_their_range_are_refused(options, says, ranks):
    for said in ranks(refusal, options):
        assert said.startswith(says)


def stepped_before(exchange):
    """Centers before and after a step between exchanges, of an optimizer that had stepped alone."""
    found = []
    for make in (lambda p: PACE(p, pullback=0.1), lambda p: Pullback(optim.SGD(p, lr=0.1))):
        p = Parameter(torch.ones(3))
        base = make([p])
        for _ in range(2):
            p.grad = torch.ones(3)
            base.step()
        opt = Elastic(base, every=4, exchange=exchange)
        before = opt.state[p]["average"].clone()
        p.grad = torch.ones(3)
        opt.step()
        found.append(torch.equal(before, opt.state[p]["average"]))
    return found


def past():
    """What is said of steps, loads and groups that go past an Elastic around a stepped PACE."""
    p = Parameter(torch.ones(3))
    base = PACE([p], pullback=0.1)
    p.grad = torch.ones(3)
    base.step()
    opt = Elastic(base, every=4)
    opt.step()
    opt.load_state_dict(opt.state_dict())
    said = []
    group = {"params": [Parameter(torch.ones(2))]}
    for call in (
        base.step,
        lambda: base.load_state_dict(opt.state_dict()),
        lambda: (base.add_param_group(group), opt.step()),
    ):
        try:
            call()
        except RuntimeError as error:
            said.append(str(error))
    return said


def test_the_base_does_not_step_load_or_grow_past_it(ranks):
    for said in ranks(past):
        assert len(said) == 3
        assert said[0].startswith("PACE.step() goes past the Elastic around it")
        assert said[2].startswith("PACE.add_param_group() went past the Elastic around it")


def test_the_center_of_an_optimizer_that_stepped_before_stands_still(ranks):
    for found in ranks(stepped_before, "easgd"):
        assert found == [True, True]


def loaded(options):
    """What a load of a state that cannot be exchanged says, and whether the weights stayed."""
    p = Parameter(torch.ones(3))
    other = PACE([Parameter(torch.ones(3))], **{"pullback": 0.1, **options})
    other.param_groups[0]["params"][0].grad = torch.ones(3)
    other.step()
    opt = Elastic(PACE([p], pullback=0.1), every=2, exchange="average")
    try:
        opt.load_state_dict(other.state_dict())
    except ValueError as error:
        return str(error), not opt.state[p] if p in opt.state else True
    return "", False


def test_a_state_that_cannot_be_exchanged_is_not_loaded(ranks):
    for options, name in (
        ({"state_dtype": torch.bfloat16}, "state_dtype"),
        ({"averaging": "lawa:window=2"}, "averaging"),
        ({"pullback": 0.0}, "exchange='average' needs a pull"),
    ):
        for said, unchanged in ranks(loaded, options):
            assert said.startswith(name)
            assert unchanged


def refusal(options):
    p = Parameter(torch.ones(2))
    base = optim.SGD([p], lr=0.1)
    before = dict(base.param_groups[0])
    try:
        Elastic(base, **{"every": 2, **options})
    except ValueError as error:
        assert base.param_groups[0] == before
        return str(error)


def refused_bases():
    p = Parameter(torch.ones(2))
    found = []
    for base in (
        PACE([p], pullback=0.1, state_dtype=torch.bfloat16),
        PACE([p], pullback=0.1, returns="lawa:window=2"),
        PACE([p]),
        Pullback(optim.SGD([p], lr=0.1), pullback=0.6, gain="scalar"),
        Elastic(optim.SGD([p], lr=0.1), every=2),
    ):
        try:
            Elastic(base, every=2)
        except ValueError as error:
            found.append(str(error).split(",")[0])
    return found


def test_bases_that_cannot_be_exchanged_are_refused(ranks):
    for found in ranks(refused_bases):
        assert found == [
            "state_dtype must be left out in Elastic",
            "returns must be of averages that are one tensor each in Elastic",
            "pullback=1.0 with one gain holds workers at their center",
            "pullback=0.6 with one gain holds workers at their center",
            "base must not have been in an Elastic before; make it anew",
        ]


def test_without_a_process_group_it_is_refused():
    base = Pullback(optim.SGD([Parameter(torch.ones(2))], lr=0.1))
    with pytest.raises(
        RuntimeError, match=r"^Elastic needs a process group: .*Nothing was changed$"
    ):
        Elastic(base, every=2)
    assert "every" not in base.param_groups[0]


def copied():
    params, opt = made("SGD", {"every": 2})
    advance(params, opt, 1)
    other = copy.deepcopy(opt)
    again = [p for group in other.param_groups for p in group["params"]]
    give(again, 0, 2)
    try:
        other.step()
    except RuntimeError as error:
        return str(error)


def test_a_copy_says_that_it_has_no_process_group(ranks):
    assert all(x.startswith("Elastic needs a process group: ") for x in ranks(copied))


# ---- options that are set ------------------------------------------------------------------------


def written(options):
    """Options of an Elastic as its groups have them."""
    group = Elastic(optim.SGD([Parameter(torch.ones(2))], lr=0.1), **options).param_groups[0]
    return {name: group[name] for name in options}


def test_options_are_plain_numbers(ranks):
    given = {
        **{"every": np.int64(2), "exchange": "diloco", "outer_lr": torch.tensor(0.5)},
        **{"outer_momentum": np.float32(0.25), "exchange_dtype": torch.bfloat16},
    }
    for found in ranks(written, given):
        assert list(map(type, found.values())) == [int, str, float, float, str]
        assert list(found.values()) == [2, "diloco", 0.5, 0.25, "bfloat16"]
    assert [type(found["pull"]) for found in ranks(written, {"every": 1, "pull": 0})] == [float] * 2


def set_between(how):
    """What is said where an option is set between steps on this worker, and what has changed."""
    params, opt = made("SGD", {"every": 2, "pull": 0.25})
    opt.add_param_group({"params": [Parameter(torch.ones(3, dtype=torch.float64))]})
    advance(params, opt, 1)
    before, rank = [p.detach().clone() for p in params], dist.get_rank()
    first, second = opt.param_groups
    try:
        if how == "attribute":
            opt.every = 3
        if how == "range":
            first["pull"] = second["pull"] = 0.6
        if how == "groups":
            second["every"] = 3
        if how == "workers":
            first["pull"] = second["pull"] = 0.25 - rank / 8
        if how == "every":
            first["every"] = second["every"] = 2 + rank
        advance(params, opt, 3, first=2)
    except (AttributeError, ValueError, RuntimeError) as error:
        same = all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
        return f"{type(error).__name__}: {error}", same
    return "", False


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("attribute", "AttributeError: every is an option of parameter groups: set group['every']"),
        ("range", "ValueError: pull must be a number at most 1/2 for 2 workers, got 0.6"),
        ("groups", "ValueError: every must be 2 as in the first group, got 3"),
        ("workers", "RuntimeError: workers must have the same options: worker "),
        ("every", "RuntimeError: workers must have the same options: worker "),
    ],
)
def test_options_set_between_steps_are_checked(how, says, ranks):
    for rank, (said, unchanged) in enumerate(ranks(set_between, how)):
        assert said.startswith(says)
        assert unchanged or (how, rank) == ("every", 1)  # which steps once more before it meets
        assert "\n" not in said


def set_together():
    """Centers at which workers have met, where all set another H after the first exchange."""
    params, opt = made("SGD", {"every": 2})
    centers = []
    for step in range(1, 7):
        advance(params, opt, 1, first=step)
        centers.append(opt.state[params[0]]["average"].clone())
        if step == 2:
            opt.param_groups[0]["every"] = 3
    return [torch.equal(a, b) for a, b in itertools.pairwise(centers)]


def test_workers_may_set_another_h_together(ranks):
    assert ranks(set_together) == [[False, False, True, True, False]] * 2


# ---- checkpoints ---------------------------------------------------------------------------------


def hooked(base):
    """The hooks that run at a load, and whether what one made was loaded."""
    params, opt = made(base, {"every": 2})
    advance(params, opt, 2)
    saved, ran = opt.state_dict(), []
    _, other = made(base, {"every": 2})

    def change(optimizer, state):
        ran.append("own, before")
        return state | {"param_groups": [x | {"lr": 0.125} for x in state["param_groups"]]}

    other.register_load_state_dict_pre_hook(change)
    other.register_load_state_dict_post_hook(lambda _: ran.append("own, after"))
    inner = other.base
    while inner is not None:
        inner.register_load_state_dict_pre_hook(lambda *_: ran.append("base, before"))
        inner.register_load_state_dict_post_hook(lambda _: ran.append("base, after"))
        inner = getattr(inner, "base", None)
    other.load_state_dict(saved)
    return ran, other.param_groups[0]["lr"]


@pytest.mark.parametrize(("base", "inside"), [("PACE", 1), ("SGD", 2)])
def test_load_hooks_run_those_of_bases_too(base, inside, ranks):
    for ran, lr in ranks(hooked, base):
        bases = ["base, before"] * inside + ["base, after"] * inside
        assert ran == ["own, before", *bases, "own, after"]
        assert lr == 0.125


DAMAGES = {
    "no dict": lambda saved: [],
    "groups": lambda saved: saved | {"param_groups": 3},
    "state": lambda saved: saved | {"state": [1]},
    "a group": lambda saved: saved | {"param_groups": [[]]},
    "params": lambda saved: in_group(saved, params=5),
    "elastic_steps": lambda saved: in_group(saved, elastic_steps=[1]),
    "every": lambda saved: in_group(saved, every="often"),
    "pull": lambda saved: in_group(saved, pull=torch.ones(2)),
    "averaging": lambda saved: in_group(saved, averaging=5),
    "pullback": lambda saved: in_group(saved, averaging=None, exchange={}),
    "of a state": lambda saved: saved | {"state": dict.fromkeys(saved["state"], 4)},
    "outer_buffer": lambda saved: in_state(saved, outer_buffer=None),
    "not finite": lambda saved: in_state(saved, outer_buffer=torch.full((3, 4), torch.inf)),
}


def in_group(saved, **values):
    return saved | {"param_groups": [x | values for x in saved["param_groups"]]}


def in_state(saved, **values):
    first, *others = saved["state"]
    own = {key: x for key, x in (saved["state"][first] | values).items() if x is not None}
    return saved | {"state": {first: own} | {key: saved["state"][key] for key in others}}


def damaged(base):
    """What loads of damaged checkpoints say, and whether they changed anything."""
    params, opt = made(base, {"every": 2, "exchange": "diloco"})
    advance(params, opt, 2)
    saved, found = copy.deepcopy(opt.state_dict()), []
    before = repr(opt.state_dict())
    for damage in DAMAGES.values():
        try:
            opt.load_state_dict(damage(saved))
            found.append("loaded")
        except ValueError as error:
            found.append(str(error))
    return found, repr(opt.state_dict()) == before


@pytest.mark.parametrize("base", ["PACE", "SGD"])
def test_damaged_checkpoints_are_refused_in_one_line(base, ranks):
    for found, unchanged in ranks(damaged, base):
        for what, said in zip(DAMAGES, found, strict=True):
            assert said != "loaded", what
            assert "Error: " not in said or what == "averaging", said
            assert "\n" not in said
        assert unchanged


def options_loaded(base):
    """Options after a load of a checkpoint with others, and after one of the base's alone."""
    _, opt = made(base, {"every": 2, "pull": 0.25})
    params, other = made(base, {"every": 3, "exchange": "diloco", "outer_lr": 0.5})
    advance(params, other, 3)
    opt.load_state_dict(other.state_dict())
    names = ("every", "exchange", "pull", "outer_lr", "elastic_steps")
    return [opt.param_groups[0][name] for name in names]


@pytest.mark.parametrize("base", ["PACE", "Pullback", "SGD"])
def test_a_load_takes_the_options_of_the_checkpoint(base, ranks):
    assert ranks(options_loaded, base) == [[3, "diloco", None, 0.5, 3]] * 2
