"""A small net to train, and what its optimizer holds, for every test that needs them."""

import torch
from torch import Tensor, nn

from paceline.averaging import EMA, PowerEMA

OF_THE_AVERAGE = ("ema_power", "ema_beta", "ema_rate", "ema_start", "ema_every")
RETURNS = {"slow": "ema:kappa=0.7", "mean": "uniform"}  # averages to return, by name


def same(a, b):
    """Equal in every tensor's dtype and bits, however they are nested; NaN equals nothing."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(x, b[key]) for key, x in a.items())
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def pace_options(options, defaults=()):
    """PACE's options for the reference's, whose five of the average are one rule here."""
    given = {**dict(defaults), **options}
    power, beta, rate, start, every = (given.get(name) for name in OF_THE_AVERAGE)
    if beta is None:
        power = 0.5 if power is None else power
        rule = PowerEMA(power, 1.0 if rate is None else rate, start or 0, every or 1)
    else:
        rule = EMA(beta, every=every or 1)
    return {k: v for k, v in options.items() if k not in OF_THE_AVERAGE} | {"averaging": rule}


def problem(dtype=torch.float32, seed=0):
    """A small net that takes a `loss()`; the same data at each call of one instance."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 2))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return model.to(dtype), generator


def advance(model, opt, generator, steps):
    for _ in range(steps):
        x = torch.randn(16, 6, generator=generator).to(next(model.parameters()).dtype)
        opt.zero_grad()
        (model(x) - x[:, :2]).square().mean().backward()
        opt.step()


def snapshot(model, opt):
    params = [p.detach().clone() for p in model.parameters()]
    states = [{k: v.clone() for k, v in opt.state[p].items()} for p in model.parameters()]
    return params, states


def assert_same(a, b):
    for p, q in zip(a[0], b[0], strict=True):
        assert torch.equal(p, q)
    for s, t in zip(a[1], b[1], strict=True):
        assert s.keys() == t.keys()
        for key in s:
            assert s[key].dtype == t[key].dtype
            assert torch.equal(s[key], t[key]), key


def gradients(p, seed):
    """Of the shape and dtype of a parameter."""
    return torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)).to(p.dtype)


def walk(opt, params, first, last):
    """Steps on gradients that depend on the step and on the parameter's place alone."""
    for t in range(first, last):
        for i, p in enumerate(params):
            p.grad = gradients(p, 100 * t + i)
        opt.step()
