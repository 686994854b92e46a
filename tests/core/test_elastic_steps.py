"""Elastic: steps that workers skip, parameters without gradients, projections, buffers."""

import copy

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn, optim
from torch.nn import Parameter
from workers import gradient, start

from paceline import PACE, Elastic, Pullback, recomputed_statistics

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")

STEPS, LR, MOVING_RATE = 6, 0.05, 0.9

BASES = {
    "AdamW": lambda params: optim.AdamW(params, lr=LR),
    "a pull around AdamW": lambda params: Pullback(
        optim.AdamW(params, lr=LR), pullback=1e-9, nonfinite="skip"
    ),
    "PACE": lambda params: PACE(params, lr=LR, pullback=0.0, nonfinite="skip"),
}
# What does not step: worker, step and place of a parameter -> whether it stands still.
CASES = {
    "a skip at the first step": lambda worker, step, place: worker and step == 1,
    "skips up to the first exchange": lambda worker, step, place: worker and step <= 2,
    "no gradients at first": lambda worker, step, place: worker and step <= 3,
    "one without gradients": lambda worker, step, place: worker and place == 0,
    "frozen on all": lambda worker, step, place: place == 1 and step > 3,
    "a GradScaler": lambda worker, step, place: worker and step in (1, 4),
    "a GradScaler, unscaled before": lambda worker, step, place: worker and step in (1, 4),
}


def reference(stands, every):
    """EASGD around torch's AdamW by its formula: after each step live weights, and centers."""
    moments = [[[], []] for _ in range(STEPS)]
    for place, begin in enumerate(start()):
        live = [Parameter(torch.tensor(begin)) for _ in range(2)]
        opts = [optim.AdamW([p], lr=LR) for p in live]
        z = torch.tensor(begin)
        for step in range(1, STEPS + 1):
            for worker, (p, opt) in enumerate(zip(live, opts, strict=True)):
                if not stands(worker, step, place):
                    p.grad = torch.tensor(gradient(p.detach().numpy(), worker, step, place))
                    opt.step()
            if step % every == 0:
                mean, pull = sum(p.detach() for p in live) / 2, MOVING_RATE / 2
                for p in live:
                    p.data += pull * (z - p.data)
                z = z + 2 * pull * (mean - z)
            moments[step - 1][0].append([p.detach().clone() for p in live])
            moments[step - 1][1].append(z)
    return moments


def trajectory(case, base, every, resumes):
    """After each step live weights and what is returned; at `resumes` it goes on from a state."""
    stands, worker = CASES[case], dist.get_rank()
    params = [Parameter(torch.tensor(x)) for x in start()]
    opt = Elastic(BASES[base](params), every=every)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled="Scaler" in case)
    moments = []
    for step in range(1, STEPS + 1):
        opt.zero_grad()
        for place, p in enumerate(params):
            g = torch.tensor(gradient(p.detach().numpy(), worker, step, place))
            if still := stands(worker, step, place):
                p.requires_grad_(case != "frozen on all")
            if not still or (p.requires_grad and "gradients" not in case):
                scaler.scale((p * (torch.inf if still else g)).sum()).backward()
        if "unscaled" in case:
            scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        if step == resumes:
            saved, weights = copy.deepcopy(opt.state_dict()), params
            params = [Parameter(p.detach().clone(), p.requires_grad) for p in weights]
            opt = Elastic(BASES[base](params), every=every)
            opt.load_state_dict(saved)
        with opt.averaged():
            returned = [p.detach().clone() for p in params]
        moments.append(([p.detach().clone() for p in params], returned))
    return moments


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("case", CASES)
def test_steps_that_a_worker_does_not_take(case, base, ranks):
    for every, resumes in ((1, 0), (2, 2)):
        want = reference(CASES[case], every)
        for rank, found in enumerate(ranks(trajectory, case, base, every, resumes)):
            for (live, returned), (all_live, centers) in zip(found, want, strict=True):
                for place in range(2):
                    close = {"rtol": 1e-6, "atol": 1e-7}
                    np.testing.assert_allclose(live[place], all_live[place][rank], **close)
                    np.testing.assert_allclose(returned[place], centers[place], **close)


# ---- projections ---------------------------------------------------------------------------------

OPTIONS = {
    "easgd": {"exchange": "easgd"},
    "diloco": {"exchange": "diloco", "outer_lr": 1.0},
    "average": {"exchange": "average", "pull": 0.5, "exchange_dtype": torch.bfloat16},
}


def projected(exchange, kind):
    """How far live weights, center and further average have been from their set at most."""
    params = [Parameter(torch.tensor(x, dtype=torch.float32)) for x in start()]

    def project():
        for p in params:
            p.clamp_(-0.5, 0.5) if kind == "box" else p.div_(p.norm())

    base = PACE(params, lr=0.1, pullback=0.1, returns="ema:beta=0.1")
    opt = Elastic(base, every=2, **OPTIONS[exchange])
    opt.register_projection(project)  # of the start, too
    far, slow = [0.0], params[0].detach().clone()
    for step in range(1, 9):
        for place, p in enumerate(params):
            g = gradient(p.detach().numpy(), dist.get_rank(), step, place)
            p.grad = torch.tensor(g - 2.0, dtype=torch.float32)
        opt.step()
        for p in params if step % 2 == 0 else ():
            for x in (p, opt.state[p]["average"], opt.state[p]["return_returned"]):
                off = x.abs().max() - 0.5 if kind == "box" else (x.norm() - 1.0).abs()
                far.append(float(off))
        if step % 2 == 0 and (kind, exchange) == ("box", "diloco"):  # takes in the center as it is
            slow = slow.lerp(opt.state[params[0]]["average"], 1 - 0.9**2)
            torch.testing.assert_close(opt.state[params[0]]["return_returned"], slow)
    with opt.averaged("average"):
        return max(far), [p.detach().clone() for p in params]


@pytest.mark.parametrize("kind", ["box", "sphere"])
@pytest.mark.parametrize("exchange", OPTIONS)
def test_an_exchange_ends_in_the_set_of_a_projection(exchange, kind, ranks):
    (far, center), (other, same) = ranks(projected, exchange, kind)
    assert max(far, other) <= (0.0 if kind == "box" else 1e-6)
    assert all(map(torch.equal, center, same))


# ---- buffers -------------------------------------------------------------------------------------


def statistics():
    """Running statistics of the live model, and those of the center on the same batches."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(torch.linspace(-1, 1, p.numel()).view_as(p) + i)
    opt = Elastic(optim.SGD(model.parameters(), lr=0.1), every=2)
    for step in range(4):
        seed = torch.Generator().manual_seed(10 * step + dist.get_rank())
        model(torch.randn(8, 3, generator=seed)).square().mean().backward()
        opt.step()
        opt.zero_grad()
    batches = torch.randn(4, 8, 3, generator=torch.Generator().manual_seed(1))
    own = [x.clone() for x in model.buffers()]
    with opt.averaged(), recomputed_statistics(model, batches):
        common = {key: x.clone() for key, x in model.state_dict().items()}
    return own, common


def test_statistics_of_the_center_are_the_same_on_all_workers(ranks):
    (own, common), (others, same) = ranks(statistics)
    assert not torch.equal(own[0], others[0])
    assert all(torch.equal(common[key], same[key]) for key in common)
    assert not torch.equal(common["1.running_mean"], own[0])
