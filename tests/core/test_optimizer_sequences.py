"""After any sequence of calls PACE holds what the float64 reference holds.

A step must come to within rounding of the reference; what is no step (swaps, files, groups, refused
steps) must keep every bit, as must coordinates that stand still. PACELINE_EXAMPLES: how many tries.
"""

import contextlib
import copy
import functools
import io
import os

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings, stateful
from hypothesis import strategies as st
from problems import pace_options
from reference import Reference
from torch import nn
from torch.nn import Parameter

from paceline import PACE, kernels

# Largest deviation from the reference, relative to the largest value the coordinate has had. A step
# rounds some five times, by 6e-8 in float32 and 1.1e-16 in float64, and a sequence has up to 40
# steps, most of whose errors do not add up: the worst seen are a tenth and a thousandth of these.
TOLERANCE = {np.dtype("float32"): 1e-5, np.dtype("float64"): 1e-12}
TOO_LARGE = {torch.float32: 1e25, torch.float64: 1e200}  # finite, but its square is not
SIZES = (1.0, 1.0, 1.0, 1e-3, 0.0, 1e6, 1e18, None)  # of gradients; None is none
NOT_OF_THE_RULE = ("lr", "returns", "nonfinite", "fused")
# Averages to return: what PACE is told, and the weight of the t-th iterate.
RETURNED = {
    "slow": ("ema:kappa=0.7", lambda t: (1 + t) ** -0.7),
    "mean": ("uniform", lambda t: 1 / t),
    "rare": ("ema:beta=0.5:every=2", lambda t: 0.5 * (t % 2 == 0)),
}
FAULTS = ("guarded_coordinates", "guarded_steps", "skipped_steps")


@functools.cache
def has_kernel():
    with contextlib.suppress(kernels.BuildError):
        return bool(kernels.cpu.build())
    return False


pick = st.sampled_from
names = pick([None, *RETURNED, "average"])  # of an average; None is what groups return
seeds = st.integers(0, 2**32 - 1)
trainings = pick(["", "step", "step again", "step faults step", "faults", "again", "refused"])


@st.composite
def new_groups(draw, most):
    """A dtype, the options of a group, shapes of its parameters, and a seed for their values."""
    choices = {
        "lr": [0.1],
        "betas": [(0.9, 0.999), (0.5, 0.9), (0.0, 0.99), (0.9, 0.5)],
        "weight_decay": [0.0, 0.1],
        "pullback": [0.3, 3.0, 10.0, 0.0],
        "ema_power": [0.3, 0.5, 1.0, None],
        "ema_rate": [1.0, 0.2],
        "ema_start": [0, 3],
        "ema_every": [1, 2, 3],
        "clip": [True, False],
        "gain": ["adam", "adam", "scalar"],
        "returns": [(), (), ("slow", "rare"), ("rare", "mean")],
        "nonfinite": ["guard", "skip", "raise"],
    }
    options = {name: draw(pick(values)) for name, values in choices.items()}
    if options["ema_power"] is None:
        options["ema_beta"] = draw(pick([0.1, 0.5]))
    # Without a clip a gain above 2 would be unstable, and magnify the rounding.
    options["eps"] = 1e-8 if options["clip"] else 0.5
    if options["gain"] == "scalar":
        options["pullback"] = min(options["pullback"], 1.0 if options["clip"] else 0.3)
    options["returns"] = {name: RETURNED[name][0] for name in options["returns"]} or None
    options["fused"] = draw(pick([None, False, has_kernel()]))
    shapes = draw(st.lists(pick([(1,), (3,), (), (2, 2)]), min_size=1, max_size=most))
    return draw(pick([torch.float32, torch.float64])), options, shapes, draw(seeds)


def call(**arguments):
    """A rule, and some training: Hypothesis leaves half of the rules out of each example."""

    def decorate(function):
        @stateful.rule(**arguments, seed=seeds, then=trainings)
        @functools.wraps(function)
        def call_and_train(self, seed, then, **drawn):
            result = function(self, **drawn)
            self.train_on(seed, then)
            return result

        return call_and_train

    return decorate


class Expected(Reference):
    """What the optimizer must hold for one parameter."""

    def __init__(self, start, options):
        super().__init__(start, **{k: options[k] for k in options.keys() - NOT_OF_THE_RULE})
        self.options = options
        self.returned = tuple(options["returns"] or ())
        for name in self.returned:
            setattr(self, name, self.theta.copy())
        self.names = ("theta", "m", "v", "ema", *self.returned)
        self.weights = ("theta", "ema", *self.returned)
        self.largest = dict.fromkeys(self.names, 0.0) | dict.fromkeys(self.weights, abs(start))
        # What PACE was last seen to hold, to the bit: before its first step the weights alone.
        self.bits = {"theta": start}

    def look_at(self, g):
        """Take the next step's gradient; which coordinates are finite, and have a finite square?"""
        self.g, self.free = g.astype(np.float64), abs(g) <= np.sqrt(np.finfo(g.dtype).max)

    def step(self):
        """One step, in which coordinates without such a gradient stand still."""
        before = {name: getattr(self, name) for name in self.names}
        super().step(np.where(self.free, self.g, 0.0), self.options["lr"])
        self.hold(before)

    def rest(self):
        """One step without a gradient: the averages alone go on."""
        before = {name: getattr(self, name) for name in self.names}
        self.free = np.ones_like(self.theta, dtype=bool)
        super().rest()
        self.hold(before)

    def take_in(self):
        super().take_in()
        for name in self.returned:
            weight = RETURNED[name][1](self.t + self.idle)
            setattr(self, name, (1 - weight) * getattr(self, name) + weight * self.theta)

    def hold(self, before):
        """Put coordinates that stand still back, and remember how large all have been."""
        for name, old in before.items():
            now = np.where(self.free, getattr(self, name), old)
            setattr(self, name, now)
            self.largest[name] = np.maximum(self.largest[name], abs(now))

    def compare(self, seen):
        """After a step: near the reference, and bit for bit as before where it stood still."""
        assert seen.keys() == {*self.names}
        for name, value in seen.items():
            allowed = TOLERANCE[value.dtype] * self.largest[name]
            assert (abs(value - getattr(self, name)) <= allowed).all(), name
            start = self.bits["theta"] if name in self.weights else 0.0 * value
            before = self.bits.get(name, start)
            assert (self.free | (value == before)).all(), name
        self.bits = {name: value.copy() for name, value in seen.items()}

    def asked(self, name):
        """Which of ours is the average of this name: without one like it, the pull's."""
        name = next(iter(self.returned), "ema") if name is None else name
        return name if name in self.returned else "ema"


class Sequences(stateful.RuleBasedStateMachine):
    """The optimizer and, in the same order, what is expected of it."""

    saves = stateful.Bundle("saves")

    @stateful.initialize(target=saves, first=new_groups(3), seed=seeds, then=trainings)
    def create(self, first, seed, then):
        self.model, self.groups = nn.ParameterList(), []
        self.opt = PACE(**self.new_group(*first))
        self.inside = ()  # the name of the average that is in the model, if one is
        self.counts = dict.fromkeys(FAULTS, 0)
        self.looks = 0
        self.train_on(seed, then)
        return self.saved()

    def new_group(self, dtype, options, shapes, seed):
        """New parameters in the model, and what is expected of them; the group, for PACE."""
        rng = np.random.default_rng(seed)
        # Away from zero, for rounding is measured by a weight's own size.
        starts = [rng.uniform(0.5, 2.0, shape) * rng.choice([-1, 1], shape) for shape in shapes]
        new = [Parameter(torch.tensor(start, dtype=dtype)) for start in starts]
        self.model.extend(new)
        self.groups.append([Expected(p.detach().numpy().copy(), options) for p in new])
        return {"params": new, **pace_options(options)}

    def pairs(self):
        """Each parameter, and what is expected of it."""
        return zip(self.model, (x for group in self.groups for x in group), strict=True)

    def seen(self, p, expected):
        """What PACE holds for a parameter, by the reference's names."""
        seen, state = {"theta": p.detach().numpy()}, self.opt.state.get(p)
        if state:
            names = {"m": "exp_avg", "v": "exp_avg_sq", "ema": "average"}
            names |= {name: f"return_{name}" for name in RETURNED}
            seen |= {name: state[key].numpy() for name, key in names.items() if key in state}
        if self.inside and "ema" in seen:
            there = expected.asked(*self.inside)
            seen["theta"], seen[there] = seen[there], seen["theta"]
        return seen

    @stateful.invariant()
    def holds_what_is_expected(self):
        every = {name for group in self.groups for name in group[0].returned}
        assert {*self.opt.returns} == {*every, "average"}
        self.looks += 1  # one export a time, each in its turn
        name = (None, *self.opt.returns)[self.looks % (1 + len(self.opt.returns))]
        exported = self.opt.averaged_state_dict(self.model, name)
        for (p, expected), average in zip(self.pairs(), exported.values(), strict=True):
            bits, seen = expected.bits, self.seen(p, expected)
            assert seen.keys() == bits.keys()
            for key, value in seen.items():
                assert value.tobytes() == bits[key].tobytes(), key
            returned = bits.get(expected.asked(name), bits["theta"])
            assert average.numpy().tobytes() == returned.tobytes(), name
            assert float(self.opt.state.get(p, {}).get("step", 0)) == expected.t
        assert self.opt.stats() == self.counts

    @stateful.rule(seed=seeds, then=trainings)
    def step(self, seed, then):
        self.train_on(seed, f"step {then}")

    @call(to_none=st.booleans())
    def zero_grad(self, to_none):
        self.opt.zero_grad(set_to_none=to_none)

    def train_on(self, seed, kinds):
        rng = np.random.default_rng(seed)
        self.holds_what_is_expected()
        for kind in kinds.split():
            if kind == "refused":
                if self.inside:
                    with pytest.raises(RuntimeError, match=r"call train\(\) first"):
                        self.opt.step()
                continue
            self.opt.train()  # free if it is there, as transformers' Trainer has it at each step
            self.inside = ()
            for expected, group in zip(self.groups, self.opt.param_groups, strict=True):
                if rng.random() < 0.2:  # as an LR scheduler does
                    group["lr"] = expected[0].options["lr"] = (0.1, 0.03, 0.01)[rng.integers(3)]
            if kind != "again":  # on the gradients of the last time, or what zero_grad made of them
                self.set_gradients(rng)
            if kind == "faults":
                self.spoil_gradients(rng)
            self.step_with_these_gradients()

    def set_gradients(self, rng):
        for p in self.model:
            size = SIZES[rng.integers(len(SIZES))]
            g = rng.normal(size=p.shape) * (size or 0.0) * (rng.random(p.shape) < 0.8)
            p.grad = None if size is None else torch.tensor(g, dtype=p.dtype)

    def spoil_gradients(self, rng):
        for i in {*rng.integers(len(self.model), size=2).tolist()}:
            p = self.model[i]
            p.grad = torch.ones_like(p) if p.grad is None else p.grad
            bad = rng.random(p.numel()) < 0.5
            bad[rng.integers(p.numel())] = True
            fault = (np.nan, np.inf, -np.inf, TOO_LARGE[p.dtype])[rng.integers(4)]
            p.grad.view(-1)[torch.from_numpy(bad)] = fault

    def step_with_these_gradients(self):
        stepping = [(p, expected) for p, expected in self.pairs() if p.grad is not None]
        for p, expected in stepping:
            expected.look_at(p.grad.numpy())
        faulty = {x.options["nonfinite"] for _, x in stepping if not x.free.all()}
        if "raise" in faulty:
            with pytest.raises(FloatingPointError, match="nothing was changed"):
                self.opt.step()
            return
        self.opt.step()
        held = 0
        for p, expected in self.pairs() if stepping else ():
            if expected.options["nonfinite"] == "skip" and "skip" in faulty:
                continue
            if p.grad is not None:
                expected.step()
                held += int((~expected.free).sum())
            elif expected.t:
                weights = expected.bits["theta"].tobytes()
                expected.rest()
                assert self.seen(p, expected)["theta"].tobytes() == weights
            else:
                continue
            expected.compare(self.seen(p, expected))
        for name, n in zip(FAULTS, (held, held > 0, "skip" in faulty), strict=True):
            self.counts[name] += n

    def known(self, name):
        """Whether there is an average of this name; one that is not is refused."""
        if name is None or name in self.opt.returns:
            return True
        with pytest.raises(ValueError, match="name must be one of"):
            self.opt.eval(name)
        return False

    @call(name=names)
    def eval(self, name):
        if self.known(name):
            self.opt.eval(name)
            self.inside = (name,)

    @call()
    def train(self):
        self.opt.train()
        self.inside = ()

    @call(target=saves, inside=pick(["nothing", "train", "another", "save", "fail"]), name=names)
    def averaged(self, inside, name):
        before, result = self.inside, stateful.multiple()
        if not self.known(name):
            return result
        with contextlib.suppress(ZeroDivisionError), self.opt.averaged(name):
            self.inside = (name,)
            self.train_on(0, "refused")
            if inside == "train":
                self.opt.train()
            if inside == "another":
                self.opt.eval("average")
            if inside == "save":
                result = self.saved()
            if inside == "fail":
                raise ZeroDivisionError
        self.inside = before
        return result

    @stateful.precondition(lambda self: len(self.groups) < 3)
    @call(added=new_groups(2))
    def add_param_group(self, added):
        self.opt.add_param_group(self.new_group(*added))

    @call(target=saves)
    def save(self):
        return self.saved()

    def saved(self):
        file = io.BytesIO()
        torch.save({"model": self.model.state_dict(), "optimizer": self.opt.state_dict()}, file)
        file.seek(0)
        # Read once for all loads, so that one load that keeps its tensors spoils the next.
        read = functools.cache(lambda: torch.load(file, weights_only=True))
        return read, copy.deepcopy(self.groups), self.inside, self.opt

    @call(saved=saves, into_this=st.booleans())
    def load(self, saved, into_this):
        """Into an optimizer made anew; or back to where this one was, if it has the same groups."""
        read, groups, self.inside, opt = saved
        content = read()
        if opt is not self.opt or len(groups) < len(self.groups) or not into_this:
            fresh = [Parameter(torch.full_like(x, 9.0)) for x in content["model"].values()]
            self.model, rest = nn.ParameterList(fresh), iter(fresh)
            self.opt = PACE([{"params": [next(rest) for _ in g]} for g in groups], pullback=0.7)
            self.counts = dict.fromkeys(FAULTS, 0)  # they are of an object, not of a run
        self.groups = copy.deepcopy(groups)
        self.model.load_state_dict(content["model"])
        self.opt.load_state_dict(content["optimizer"])


TestSequences = Sequences.TestCase
TestSequences.settings = settings(
    max_examples=int(os.environ.get("PACELINE_EXAMPLES", 300)),
    stateful_step_count=10,
    suppress_health_check=list(HealthCheck),
)
