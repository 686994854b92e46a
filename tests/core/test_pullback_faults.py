"""Pullback with gradients that are not finite, and with bad input."""

import copy
import gc
import math

import pytest
import torch
from problems import same
from pulled import AVERAGE, OWN, STEP, adamw, give, go, held, loss_of, net, params_of, po, sgd
from torch import nn, optim
from torch.nn import Parameter

from paceline import PACE, Pullback

# ---- gradients that are not finite -----------------------------------------------------------


FAULTS = (math.nan, math.inf, -math.inf, 1e25)  # the square of the last is not finite


def faulty(params, opt, value, closure):
    """A step with one such gradient; the closure's loss."""
    give(params, 7)
    params[1].grad[2] = value
    if not closure:
        return opt.step()
    calls = []

    def evaluate():
        calls.append(len(calls))
        return torch.tensor(3.5)

    loss = opt.step(evaluate)
    assert calls == [0]
    return loss


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("value", FAULTS)
@pytest.mark.parametrize("c", [0.0, 0.3])
def test_a_step_with_a_gradient_that_is_not_finite_is_skipped(c, value, closure):
    params, others = params_of((4, 3), (3,)), params_of((4, 3), (3,))
    opt, plain = Pullback(adamw(params), pullback=c), Pullback(adamw(others), pullback=c)
    for before_first in (True, False):
        before = held(params, opt)
        loss = faulty(params, opt, value, closure)
        assert loss == (3.5 if closure else None)
        assert same(held(params, opt), before)
        assert opt.stats()["skipped_steps"] == (1 if before_first else 2)
        go(params, opt, 2)
        go(others, plain, 2)
    assert same(held(params, opt), held(others, plain))
    assert plain.stats()["skipped_steps"] == 0


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("value", FAULTS)
def test_a_gradient_that_is_not_finite_raises(value, closure):
    params = params_of((4, 3), (3,))
    base = adamw(zip(("first", "second"), params, strict=True))
    opt = Pullback(base, pullback=0.3, nonfinite="raise")
    go(params, opt, 2)
    before = held(params, opt)
    with pytest.raises(FloatingPointError, match=r"gradient of parameter 'second' of shape \(3,\)"):
        faulty(params, opt, value, closure)
    assert same(held(params, opt), before)
    assert opt.stats()["skipped_steps"] == 0


def test_a_gradient_that_is_not_finite_can_be_left_to_the_base():
    params = params_of((4, 3), (3,))
    opt = Pullback(sgd(params), pullback=0.3, nonfinite="ignore")
    go(params, opt, 1)
    faulty(params, opt, math.nan, False)
    assert params[1].isnan().nonzero().tolist() == [[2]]
    assert opt.state[params[1]][STEP] == 2
    assert opt.stats()["skipped_steps"] == 0


def test_one_group_has_all_skipped():
    params = params_of((4, 3), (3,), (3,))
    groups = [
        {"params": [p], "nonfinite": way}
        for p, way in zip(params, ("ignore", "skip", "raise"), strict=True)
    ]
    opt = Pullback(sgd(groups))
    before = held(params, opt)
    faulty(params, opt, math.nan, False)
    assert same(held(params, opt), before)


def test_lbfgs_takes_its_first_gradient_for_the_pull_and_many_for_a_step():
    """The step counts once; our second moment is of the gradient where the step began."""
    model = net()
    opt = Pullback(optim.LBFGS(model.parameters(), lr=0.1, max_iter=4), pullback=0.3)
    first = []

    def closure():
        opt.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        first.append([p.grad.clone() for p in model.parameters()])
        return loss

    opt.step(closure)
    assert len(first) == 4
    for p, grad in zip(model.parameters(), first[0], strict=True):
        assert opt.state[p][STEP] == 1
        torch.testing.assert_close(opt.state[p][OWN], 0.001 * grad.square())


# ---- bad input -------------------------------------------------------------------------------


class FirstStep(optim.SGD):
    def first_step(self):
        """As SAM has it."""


class FusedBackward(optim.SGD):
    def fused_backward(self):
        """As LOMO has it."""


class Collides(optim.SGD):
    def __init__(self, params):
        super().__init__(params, lr=0.1)
        self.defaults["gain"] = self.param_groups[0]["gain"] = 1.0


def stepped(cls, **options):
    params = params_of((3,))
    base = cls(params, lr=0.1, **options)
    go(params, base, 1)
    return base


def wrapped_before():
    base = sgd(params_of((3,)))
    Pullback(base)
    return base


def schedulefree_sgd():
    schedulefree = pytest.importorskip("schedulefree")
    return schedulefree.SGDScheduleFree(params_of((3,)), lr=0.1)


BAD_BASES = {
    "no optimizer": (lambda: nn.Linear(2, 2), "must be a torch.optim.Optimizer, got Linear"),
    "PACE": (lambda: PACE(params_of((3,)), pullback=0), "in step.. only, got a PACE, whose eval"),
    "Pullback": (
        lambda: Pullback(sgd(params_of((3,)))),
        "a Pullback, whose eval.. and train.. may",
    ),
    "Schedule-Free": (schedulefree_sgd, "got a SGDScheduleFree, whose eval.. and train.. may move"),
    "SAM": (lambda: FirstStep(params_of((3,)), lr=0.1), "a FirstStep, whose first_step.. may move"),
    "LOMO": (
        lambda: FusedBackward(params_of((3,)), lr=0.1),
        "whose fused_backward.. may move them",
    ),
    "our options": (
        lambda: Collides(params_of((3,))),
        r"our names, got a Collides with \['gain'\]",
    ),
    "twice": (wrapped_before, "must not have been in a Pullback before, got a SGD"),
    "Lookahead": (
        lambda: po.Lookahead(sgd(params_of((3,)))),
        r"in state and param_groups, got a Lookahead, whose state_dict.. has \['base_optimizer'",
    ),
    "stepped AdamW": (lambda: stepped(optim.AdamW), "must not have stepped yet .* got a AdamW"),
    "stepped SGD": (lambda: stepped(optim.SGD, momentum=0.9), "must not have stepped yet .* a SGD"),
    "stepped Adagrad": (lambda: stepped(optim.Adagrad), "must not have stepped yet"),
    "complex": (
        lambda: sgd([Parameter(torch.ones(2, dtype=torch.complex64))]),
        r"floating-point tensors, got torch.complex64 in parameter 0 of group 0 of shape \(2,\)",
    ),
}


@pytest.mark.parametrize("name", BAD_BASES)
def test_bases_that_cannot_be_used(name):
    make, message = BAD_BASES[name]
    base = make()
    groups = copy.copy(getattr(base, "param_groups", None))
    options = [set(group) for group in groups or []]
    with pytest.raises(ValueError, match=message) as raised:
        Pullback(base, pullback=0.1)
    assert "\n" not in str(raised.value)
    assert [set(group) for group in groups or []] == options


BAD_OPTIONS = [
    ({"pullback": -1.0}, "pullback must be a finite number >= 0, got -1.0"),
    ({"pullback": math.inf}, "pullback must be a finite"),
    ({"pullback": None}, "pullback must be a finite"),
    ({"averaging": 0.5}, "averaging must be an average of paceline.averaging"),
    ({"averaging": "mean"}, "unknown average 'mean'"),
    ({"gain": "own "}, "gain must be one of adam, own, scalar, got 'own '"),
    ({"gain": None}, "gain must be one of"),
    ({"gain_beta2": 1.0}, r"gain_beta2 must be in \[0, 1\), got 1.0"),
    ({"gain_beta2": -0.1}, "gain_beta2 must be"),
    ({"gain_eps": -1e-8}, "gain_eps must be a number >= 0, got -1e-08"),
    ({"gain_eps": math.inf}, "gain_eps must be"),
    ({"gain_clip": 1}, "gain_clip must be True or False, got 1"),
    ({"track_stats": "yes"}, "track_stats must be True or False"),
    ({"nonfinite": "guard"}, "nonfinite must be one of skip, raise, ignore, got 'guard'"),
    ({"nonfinite": "skips"}, "nonfinite must be one of"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS, ids=str)
def test_options_out_of_their_range(options, message):
    base = sgd(params_of((3,)))
    before = {**base.param_groups[0]}
    with pytest.raises(ValueError, match=message):
        Pullback(base, **options)
    assert base.param_groups[0] == before
    good, bad = params_of((3,)), params_of((3,))
    base = sgd([{"params": good}, {"params": bad, **options}])
    with pytest.raises(ValueError, match=message):
        Pullback(base)
    opt = Pullback(sgd(good))
    with pytest.raises(ValueError, match=message):
        opt.add_param_group({"params": bad, **options})
    assert len(opt.param_groups) == 1
    state = copy.deepcopy(opt.state_dict())
    state["param_groups"][0] |= options
    before = held(good, opt)
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(state)
    assert same(held(good, opt), before)


def test_options_at_the_ends_of_their_range():
    params = params_of((3,))
    opt = Pullback(sgd(params), pullback=1, gain_beta2=0, gain_eps=0, averaging="ema:beta=1")
    go(params, opt, 3)
    assert opt.param_groups[0]["pullback"] == 1.0
    assert params[0].isfinite().all()


def test_a_base_that_has_stepped_is_averaged_from_now():
    params = params_of((4, 3))
    base = adamw(params)
    go(params, base, 3)
    opt = Pullback(base)
    start = params[0].detach().clone()
    go(params, opt, 1)
    state = opt.state[params[0]]
    assert state[STEP] == state["step"] == 4  # its steps go on from the base's
    expected = start + 5**-0.7 * (params[0] - start)
    torch.testing.assert_close(state[AVERAGE], expected.detach())
    # So do those of a base that counts for its groups.
    params = params_of((4, 3))
    base = po.AdEMAMix(params, lr=0.1)
    go(params, base, 3)
    opt = Pullback(base)
    go(params, opt, 1)
    assert opt.state[params[0]][STEP] == 4


def test_a_step_that_cannot_be_taken_changes_nothing():
    params = params_of((4, 3), (3,))
    opt = Pullback(adamw(zip(("first", "second"), params, strict=True)), pullback=0.3)
    go(params, opt, 2)
    before = held(params, opt)
    give(params, 9)
    params[1].grad = params[1].grad.to_sparse()
    for call in (opt.step, lambda: opt.step(lambda: 1.0)):
        with pytest.raises(RuntimeError, match="not support sparse gradients, got .* 'second'"):
            call()
        assert same(held(params, opt), before)
    opt.eval()
    before = held(params, opt)
    give(params, 9)
    for call in (opt.step, lambda: opt.step(lambda: 1.0)):
        with pytest.raises(RuntimeError, match=r"call train\(\) first"):
            call()
        assert same(held(params, opt), before)


def test_a_base_that_raises_leaves_what_is_ours():
    class Fails(optim.SGD):
        def step(self, closure=None):
            if self.fails:
                raise MemoryError
            return super().step(closure)

    params = params_of((4, 3))
    opt = Pullback(Fails(params, lr=0.1), pullback=0.3)
    opt.base.fails = False
    go(params, opt, 2)
    before = held(params, opt)
    opt.base.fails = True
    with pytest.raises(MemoryError):
        go(params, opt, 1)
    assert same(held(params, opt), before)


# Hooks of a base whose step is wrapped by a scheduler run another way.
@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("copied", [False, True])
def test_the_base_does_not_step_or_load_past_it(copied, scheduled):
    params = params_of((4, 3))
    opt = Pullback(sgd(params, momentum=0.9))
    if copied:
        opt = copy.deepcopy(opt)
        params = opt.param_groups[0]["params"]
    if scheduled:
        optim.lr_scheduler.ConstantLR(opt.base)
    go(params, opt, 2)
    opt.load_state_dict(opt.state_dict())
    saved, before = opt.state_dict(), held(params, opt)
    for called, call in (
        ("step", opt.base.step),
        ("load_state_dict", lambda: opt.base.load_state_dict(saved)),
    ):
        said = rf"SGD\.{called}\(\) goes past the Pullback .*: call Pullback\.{called}\(\);"
        with pytest.raises(RuntimeError, match=said):
            call()
        assert same(held(params, opt), before)
    go(params, opt, 1)
    assert opt.state[params[0]]["average_step"] == 3


def test_a_group_that_is_added_past_it_is_named_until_it_is_taken_out():
    params, more = params_of((4, 3)), params_of((2, 2))
    opt = Pullback(sgd(params, momentum=0.9), pullback=0.1, gain="scalar")
    go(params, opt, 1)
    opt.base.add_param_group({"params": more})
    said = r"SGD\.add_param_group\(\) went past the Pullback .* group 1: .* the SGD's param_groups"
    before, third = params[0].clone(), {"params": params_of((3,))}
    for call in (opt.step, opt.state_dict, opt.eval, lambda: opt.add_param_group(third)):
        with pytest.raises(RuntimeError, match=said):
            call()
    assert torch.equal(params[0], before)
    assert len(opt.base.param_groups) == 2
    opt.base.param_groups.pop()
    opt.add_param_group({"params": more})
    go([*params, *more], opt, 1)
    assert [opt.state[p]["average_step"].item() for p in (*params, *more)] == [2, 1]


def test_a_base_that_is_kept_alone_steps():
    params = params_of((4, 3))
    base = sgd(params)
    go(params, Pullback(base), 1)
    gc.collect()
    go(params, base, 1)
