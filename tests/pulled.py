"""Optimizers, a net and its training for the tests of Pullback."""

import copy
import functools

import pytorch_optimizer
import torch
from torch import nn, optim
from torch.nn import Parameter

AVERAGE, STEP, OWN = "average", "average_step", "pullback_exp_avg_sq"


def adamw(params, **options):
    return optim.AdamW(params, **{"lr": 0.05, **options})


def sgd(params, **options):
    return optim.SGD(params, **{"lr": 0.05, **options})


def params_of(*shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def give(params, seed):
    """Gradients of the seed's, the same for the same shapes."""
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def go(params, opt, steps, first=0):
    for step in range(first, first + steps):
        give(params, 100 + step)
        opt.step()


def held(params, opt):
    """Weights, state and options, copied."""
    return copy.deepcopy(([p.detach().clone() for p in params], opt.state_dict()))


SHAPES = 8, 12

po = pytorch_optimizer


# How each is made, and whose second moment its pull goes by: its own ("adam") or ours.
BASES = {
    "SGD": (functools.partial(optim.SGD, lr=0.2), "own"),
    "SGD momentum": (functools.partial(optim.SGD, lr=0.1, momentum=0.9), "own"),
    "Adam": (functools.partial(optim.Adam, lr=0.02), "adam"),
    "AdamW": (functools.partial(optim.AdamW, lr=0.02), "adam"),
    "AdamW fused": (functools.partial(optim.AdamW, lr=0.02, fused=True), "adam"),
    "AdamW amsgrad": (functools.partial(optim.AdamW, lr=0.02, amsgrad=True), "adam"),
    "NAdam": (functools.partial(optim.NAdam, lr=0.02), "adam"),
    "RAdam": (functools.partial(optim.RAdam, lr=0.02), "adam"),
    "Adafactor": (functools.partial(optim.Adafactor, lr=0.05), "own"),
    "Muon": (functools.partial(optim.Muon, lr=0.02), "own"),
    "LBFGS": (functools.partial(optim.LBFGS, lr=0.1, max_iter=4), "own"),
    "Adagrad": (functools.partial(optim.Adagrad, lr=0.1), "own"),
    "RMSprop": (functools.partial(optim.RMSprop, lr=0.01), "own"),
    "SOAP": (functools.partial(po.SOAP, lr=0.02), "own"),  # its exp_avg_sq is in another basis
    "Shampoo": (functools.partial(po.Shampoo, lr=0.02), "own"),
    "AdEMAMix": (functools.partial(po.AdEMAMix, lr=0.02), "adam"),
    "SophiaH": (functools.partial(po.SophiaH, lr=0.02, update_period=2), "own"),
    "Lion": (functools.partial(po.Lion, lr=0.005), "own"),
}


def net(name="", seed=0):
    torch.manual_seed(seed)
    bias = name != "Muon"  # which takes matrices only
    return nn.Sequential(
        nn.Linear(SHAPES[0], SHAPES[1], bias), nn.Tanh(), nn.Linear(SHAPES[1], SHAPES[0], bias)
    )


def loss_of(model, batch):
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(32, SHAPES[0], generator=generator)
    return (model(x) - x.flip(1) / 2).square().mean()


def train(name, model, opt, steps, first=0, seen=None):
    """Steps as this base wants them; the weights after each go into `seen`."""
    for step in range(first, first + steps):
        torch.manual_seed(step)  # SophiaH draws

        def closure(step=step):
            opt.zero_grad()
            loss = loss_of(model, step)
            loss.backward(create_graph=name == "SophiaH")
            return loss.detach()

        if name == "LBFGS":
            opt.step(closure)
        else:
            closure()
            opt.step()
        if seen is not None:
            seen.append([p.detach().clone() for p in model.parameters()])
    opt.zero_grad()  # with SophiaH's graph


def assert_one(opt):
    assert opt.state is opt.base.state
    assert opt.param_groups is opt.base.param_groups
