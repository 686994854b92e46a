"""PACE in float64 NumPy, straight from the paper's formulas; shares nothing with the package."""

import numpy as np


class Reference:
    """The rule for one array: theta (live), ema, m, v, t; `g` gradients come to `step`."""

    def __init__(
        self,
        theta,
        *,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.01,
        pullback,
        gain="adam",
        ema_power=0.5,
        ema_beta=None,
        ema_rate=1.0,
        ema_start=0,
        ema_every=1,
        clip=True,
        store=lambda x: x,
    ):
        self.theta = np.array(theta, dtype=np.float64)
        self.ema = self.theta.copy()
        self.m = np.zeros_like(self.theta)
        self.v = np.zeros_like(self.theta)
        self.t = self.idle = 0
        self.betas, self.eps, self.wd, self.c = betas, eps, weight_decay, pullback
        self.kappa, self.beta = ema_power, ema_beta
        self.gamma, self.rho, self.uf, self.clip = ema_rate, ema_start, ema_every, clip
        self.scalar = gain == "scalar"
        self.store = store  # how the live weights are rounded when stored

    def step(self, g, lr):
        g = np.asarray(g, dtype=np.float64)
        self.t += 1
        t, (b1, b2) = self.t, self.betas
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * g**2
        m_hat = self.m / (1 - b1**t)
        v_hat = self.v / (1 - b2**t)
        root = np.sqrt(v_hat) + self.eps

        averaging = self.weight()
        gain = lr * self.c / root * (averaging if self.beta is None else 1)
        if self.scalar:
            gain = np.full_like(root, self.c)
        if self.clip:
            gain = np.minimum(1.0, gain)

        adamw = (1 - lr * self.wd) * self.theta - lr * m_hat / root
        self.theta = self.store(adamw + gain * (self.ema - self.theta))
        self.take_in()
        return gain

    def weight(self):
        """β at the step that is the t-th of the average's, whether with a gradient or without."""
        if self.beta is not None:
            return self.beta
        since = max(0, self.t + self.idle - self.rho)
        return max((1 + self.gamma * since) ** (-self.kappa), 1e-4)

    def take_in(self):
        if (self.t + self.idle) % self.uf == 0:
            self.ema = (1 - self.weight()) * self.ema + self.weight() * self.theta

    def rest(self):
        """A step without a gradient: the weights stand still, and the average takes them in."""
        self.idle += 1
        self.take_in()


class Followed:
    """SGD with momentum, pulled toward a power EMA of its iterates; gain "own" or "scalar"."""

    def __init__(
        self,
        theta,
        *,
        momentum=0.0,
        weight_decay=0.0,
        pullback,
        gain,
        beta2=0.999,
        eps=1e-8,
        clip=True,
        power=0.5,
    ):
        self.theta = np.array(theta, dtype=np.float64)
        self.average = self.theta.copy()
        self.buffer = np.zeros_like(self.theta)
        self.v = np.zeros_like(self.theta)
        self.t = 0
        self.momentum, self.wd, self.c, self.gain = momentum, weight_decay, pullback, gain
        self.beta2, self.eps, self.clip, self.power = beta2, eps, clip, power

    def step(self, g, lr):
        g = np.asarray(g, dtype=np.float64)
        self.t += 1
        self.buffer = self.momentum * self.buffer + g + self.wd * self.theta
        moved = self.theta - lr * self.buffer
        beta = (1 + self.t) ** -self.power
        if self.gain == "own":
            self.v = self.beta2 * self.v + (1 - self.beta2) * g**2
            v_hat = self.v / (1 - self.beta2**self.t)
            gain = lr * self.c * beta / (np.sqrt(v_hat) + self.eps)
        else:
            gain = np.full_like(self.theta, self.c)
        if self.clip:
            gain = np.minimum(1.0, gain)
        self.theta = moved + gain * (self.average - self.theta)
        self.average = (1 - beta) * self.average + beta * self.theta
        return gain
