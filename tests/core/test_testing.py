"""The conformance kit: PACE passes it, and each of its checks can fail."""

import os
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist

from paceline import PACE, testing
from paceline.testing import Check, Report, check_optimizer


def pace(params):
    return PACE(params, lr=0.05, pullback=2.0)


def adamw(params):
    return torch.optim.AdamW(params, lr=0.05)


@pytest.fixture(scope="module")
def report():
    return check_optimizer(pace)


@pytest.mark.slow
def test_pace_passes_every_check(report):
    assert [check.name for check in report.checks if check.outcome != "passed"] == []
    assert report.passed, report


def test_adamw_fails_where_the_documentation_says_so():
    report = check_optimizer(adamw, ranks=0)
    assert [check.name for check in report.failures] == [
        "loaded state is its own",
        "misshapen state",
        "missing state",
        "foreign state",
        "distributed checkpoint first",
        "non finite gradient",
    ]
    assert not report.passed
    not_run = {check.reason for check in report.checks if check.outcome == "not run"}
    assert not_run == {"it has no eval() and train()", "it has no averaged()", "ranks=0"}


def test_the_report_reads_as_a_table():
    checks = (
        Check("resume", "It goes on.", "passed"),
        Check("closure", "It returns.", "failed", "it does not"),
    )
    assert str(Report(checks)).splitlines() == [
        "passed   resume   It goes on.",
        "failed   closure  It returns.",
        "                  -> it does not",
        "1 passed, 1 failed, 0 not run",
    ]


def test_a_function_that_other_processes_cannot_find_is_said():
    report = check_optimizer(lambda params: pace(params))
    reasons = {check.reason for check in report.checks[-3:]}
    assert len(reasons) == 1
    assert "make it a module's function" in reasons.pop()


# ---- every check can fail: PACE with one thing broken ----------------------------------------


class Wrapper:
    """Has all that an optimizer has, and is none."""

    def __init__(self, params):
        self.inner = pace(params)

    def __getattr__(self, name):
        return getattr(self.inner, name)


class Broken(PACE):
    def __init__(self, params, **options):
        super().__init__(params, lr=0.05, pullback=2.0, **options)
        self.params = list(self.param_groups[0]["params"])
        self.taken = 0  # which no state_dict knows


class LosesTheLoss(Broken):
    def step(self, closure=None):
        super().step(closure)


class Deaf(Broken):
    def register_step_post_hook(self, hook):
        pass


class Decays(Broken):
    @torch.no_grad()
    def step(self, closure=None):
        loss = super().step(closure)
        for p in self.params:
            p.mul_(0.99)
        return loss


class ChoosesAtFirst(Broken):
    def step(self, closure=None):
        for p in self.params:
            if self.state and p not in self.state:
                p.grad = None
        return super().step(closure)


class FirstGroupOnly(Broken):
    def step(self, closure=None):
        for group in self.param_groups[1:]:
            for p in group["params"]:
                p.grad = None
        return super().step(closure)


class NeedsParameters(Broken):
    def step(self, closure=None):
        for group in self.param_groups:
            group["params"][0]
        return super().step(closure)


class Contiguous(Broken):
    def step(self, closure=None):
        for p in self.params:
            p.detach().view(-1)
        return super().step(closure)


class FirstDtypeOnly(Broken):
    def step(self, closure=None):
        for p in self.params:
            if p.dtype != self.params[0].dtype:
                p.grad = None
        return super().step(closure)


class ClearsGradients(Broken):
    def train(self):
        super().train()
        self.zero_grad()


class OwnRate(Broken):
    def step(self, closure=None):
        self.param_groups[0]["lr"] = 0.05
        return super().step(closure)


class Inexact(Broken):
    @torch.no_grad()
    def train(self):
        if self.swapped:
            super().train()
            self.params[0].add_(1e-6)


class StepsAnyway(Broken):
    def step(self, closure=None):
        self.train()
        return super().step(closure)


class StaysAveraged(Broken):
    @contextmanager
    def averaged(self):
        self.eval()
        yield
        self.train()


class CountsOutside(Broken):
    def step(self, closure=None):
        self.taken += 1
        self.param_groups[0]["lr"] = 0.05 / self.taken
        return super().step(closure)

    def __setstate__(self, state):
        super().__setstate__(state)
        self.taken = 0


class ForgetsTheSwap(Broken):
    def state_dict(self):
        state = super().state_dict()
        for group in state["param_groups"]:
            group["swapped"] = None
        return state


class LoadsAsTorch(Broken):
    def load_state_dict(self, state_dict):
        torch.optim.Optimizer.load_state_dict(self, state_dict)


class CountsProbes(Broken):
    def _is_state_probe(self):
        return []


class SuffersBeingAsked(Broken):
    @torch.no_grad()
    def state_dict(self):
        self.params[0].mul_(0.9)
        return super().state_dict()


class Trusting(Broken):
    def __init__(self, params):
        super().__init__(params, nonfinite="ignore")


class SkipsNothing(Broken):
    _step_supports_amp_scaling = True  # GradScaler leaves it to the optimizer, which does not


BROKEN = {
    "optimizer class": Wrapper,
    "closure": LosesTheLoss,
    "hooks": Deaf,
    "gradients missing": Decays,
    "unfrozen mid run": ChoosesAtFirst,
    "group added mid run": FirstGroupOnly,
    "empty group": NeedsParameters,
    "odd shapes": Contiguous,
    "mixed dtypes": FirstDtypeOnly,
    "accumulation": ClearsGradients,
    "schedulers": OwnRate,
    "swap and back": Inexact,
    "step while averaged": StepsAnyway,
    "averaged context": StaysAveraged,
    "copies": CountsOutside,
    "resume": CountsOutside,
    "resume averaged": ForgetsTheSwap,
    "resume bfloat16": LoadsAsTorch,
    "loaded state is its own": LoadsAsTorch,
    "misshapen state": LoadsAsTorch,
    "missing state": LoadsAsTorch,
    "foreign state": LoadsAsTorch,
    "distributed checkpoint first": CountsProbes,
    "distributed checkpoint later": SuffersBeingAsked,
    "distributed checkpoint averaged": CountsProbes,
    "non finite gradient": Trusting,
    "skipped by the scaler": SkipsNothing,
}


@pytest.mark.parametrize("name", [testing._title(check)[0] for check in testing._CHECKS])
def test_every_check_fails_for_what_it_is_about(name):
    check = next(check for check in testing._CHECKS if testing._title(check)[0] == name)
    assert testing._run(check, pace).outcome == "passed"
    found = testing._run(check, BROKEN[name])
    assert found.outcome == "failed", found


class Crashes(Broken):
    def step(self, closure=None):
        if dist.is_initialized() and dist.get_rank() == 1:
            os._exit(3)
        super().step(closure)


def test_a_process_that_ends_is_a_failure():
    found = testing._run_on_ranks(Crashes, 2)
    assert [check.outcome for check in found] == ["failed"] * 3
    assert "process 1 terminated with exit code 3" in found[0].reason


def test_the_callers_random_state_is_left_alone():
    state = torch.get_rng_state()
    check_optimizer(pace, ranks=0)
    assert torch.equal(torch.get_rng_state(), state)


class DriftsByRank(Broken):
    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        if dist.is_initialized():
            for p in self.params:
                getattr(p, "_local_tensor", p).add_(1e-3 * dist.get_rank())


def test_every_check_on_ranks_fails_for_what_differs_between_them():
    found = testing._run_on_ranks(DriftsByRank, 2)
    assert [check.outcome for check in found] == ["failed"] * 3
