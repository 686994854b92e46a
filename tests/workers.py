"""Workers on gradients that are known, by Elastic and by NumPy in float64, for tests of it."""

import numpy as np
import torch
import torch.distributed as dist
from torch import optim
from torch.nn import Parameter

from paceline import PACE, Elastic, Pullback

SHAPES = ((3, 4), (5,))
LR, MOMENTUM, DECAY, C, KAPPA = 0.05, 0.9, 0.01, 0.8, 0.3
BETA1, BETA2, EPS = 0.9, 0.99, 1e-8
SLOW = 0.1  # β of an average to return


def start():
    return [np.random.default_rng(i).normal(size=shape) for i, shape in enumerate(SHAPES)]


def gradient(x, worker, step, place):
    noise = np.random.default_rng([worker, step, place]).normal(size=x.shape)
    return (1 + place) * x + noise


def base_of(name, params):
    pace = {"lr": LR, "betas": (BETA1, BETA2), "eps": EPS, "weight_decay": DECAY}
    return {
        "SGD": lambda: optim.SGD(params, lr=LR),
        "Nesterov": lambda: optim.SGD(params, lr=LR, momentum=MOMENTUM, nesterov=True),
        "PACE": lambda: PACE(params, pullback=C, kappa=KAPPA, returns=f"ema:beta={SLOW}", **pace),
        "Pullback": lambda: Pullback(
            optim.SGD(params, lr=LR), pullback=0.1, gain="scalar", averaging=f"ema:beta={SLOW}"
        ),
    }[name]()


def made(base, options, dtype=torch.float64):
    params = [Parameter(torch.tensor(x, dtype=dtype)) for x in start()]
    return params, Elastic(base_of(base, params), **options)


def give(params, worker, step):
    for place, p in enumerate(params):
        g = gradient(p.detach().double().numpy(), worker, step, place)
        p.grad = torch.tensor(g, dtype=p.dtype)


def advance(params, opt, steps, first=1, worker=None):
    worker = dist.get_rank() if worker is None else worker
    for step in range(first, first + steps):
        give(params, worker, step)
        opt.step()


def held(params, opt):
    """Live weights, centers, and the models to return."""
    live = [p.detach().clone() for p in params]
    centers = [opt.state[p]["average"].clone() for p in params]
    with opt.averaged():
        returned = [p.detach().clone() for p in params]
    assert all(torch.equal(p, x) for p, x in zip(params, live, strict=True))
    return [live, centers, returned]


def trajectory(base, options, steps, dtype=torch.float64):
    """What this worker holds after each step."""
    params, opt = made(base, options, dtype)
    moments = []
    for step in range(1, steps + 1):
        advance(params, opt, 1, first=step)
        moments.append(held(params, opt))
    return moments


# ---- the same in NumPy --------------------------------------------------------------------------


def power_weight(k, kappa, every):
    """Of a power EMA over `every` steps at the k-th exchange, by the formulas of its scaling."""
    rate = every * every ** (-1 / kappa)
    begin = (every ** (1 / kappa) - 1) / every
    return max((1 + rate * max(0.0, k - begin)) ** -kappa, 1e-4)


class Worker:
    """One worker's weights of one parameter, and what its optimizer keeps."""

    def __init__(self, x):
        self.x, self.m, self.v = x.copy(), np.zeros_like(x), np.zeros_like(x)

    def step(self, base, g, t, center):
        if base in ("SGD", "Pullback"):
            pull = 0.1 * (center - self.x) if base == "Pullback" else 0.0
            self.x = self.x - LR * g + pull
        elif base == "Nesterov":
            self.m = MOMENTUM * self.m + g
            self.x = self.x - LR * (g + MOMENTUM * self.m)
        else:
            self.m = BETA1 * self.m + (1 - BETA1) * g
            self.v = BETA2 * self.v + (1 - BETA2) * g**2
            below = np.sqrt(self.v / (1 - BETA2**t)) + EPS
            gain = np.minimum(1, LR * C * (1 + t) ** -KAPPA / below)
            adamw = (1 - LR * DECAY) * self.x - LR * self.m / (1 - BETA1**t) / below
            self.x = adamw + gain * (center - self.x)


def simulated(base, options, steps, workers):
    """After each step, of each worker what `held` has."""
    every, exchange = options["every"], options.get("exchange", "easgd")
    moments = [[] for _ in range(steps)]
    for place, begin in enumerate(start()):
        crowd = [Worker(begin) for _ in range(workers)]
        z, outer, slow = begin.copy(), np.zeros_like(begin), begin.copy()
        for t in range(1, steps + 1):
            for i, worker in enumerate(crowd):
                worker.step(base, gradient(worker.x, i, t, place), t, z)
            if t % every == 0:
                mean, k = sum(worker.x for worker in crowd) / workers, t // every
                taken = mean
                if exchange == "easgd":
                    pull = options.get("pull", 0.9 / workers)
                    for worker in crowd:
                        worker.x = worker.x + pull * (z - worker.x)
                    taken = z = z + workers * pull * (mean - z)
                elif exchange == "diloco":
                    rate, momentum = (
                        options.get("outer_lr", 0.7),
                        options.get("outer_momentum", 0.9),
                    )
                    outer = momentum * outer + (z - mean)
                    taken = z = z - rate * ((z - mean) + momentum * outer)
                    for worker in crowd:
                        worker.x = z.copy()
                else:
                    b = {"PACE": power_weight(k, KAPPA, every), "Pullback": 1 - (1 - SLOW) ** every}
                    z = z + b.get(base, 1.0) * (mean - z)
                    for worker in crowd:
                        worker.x = worker.x + options.get("pull", 0.0) * (z - worker.x)
                slow = slow + (1 - (1 - SLOW) ** every) * (taken - slow)
            returned = slow if base == "PACE" else z
            moments[t - 1].append([[worker.x for worker in crowd], z, returned])
    return [
        [[[own[i] for own, *_ in m], [z for _, z, _ in m], [r for *_, r in m]] for m in moments]
        for i in range(workers)
    ]
