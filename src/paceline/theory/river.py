r"""The river in a valley: how far methods come along it, and how high above it they stay.

Weights are a place x along the valley and a place yᵢ across it for each hillside. The river lies at
the bottom, falls by `slope` for each unit of x, and bends:

    loss(x, y) = -slope·x + ½·Σ αᵢ·(yᵢ - floorᵢ(x))²
    floorᵢ(x)  = bend·(sin(x/length + i) - sin(i)),      i = 0, 1, ...

The gradient's noise is in the hills alone, of variance noise²·αᵢ for the i-th. The optimizer sees
the weights turned, so that every one of them is part river and part hill.

Source: the picture is that of Wen et al., Understanding Warmup-Stable-Decay Learning Rates,
arXiv:2410.05192 (2024), and of Song et al., Through the River, arXiv:2507.09846 (2025); this
function and its numbers are ours.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from ..averaging import Uniform
from ..optimizer import PACE
from ..state import AVERAGE
from .quadratic import in_range
from .simulate import read_out

KAPPA, RETURN_KAPPA = 0.3, 0.7  # of the pull and of the power schedule; of the returned average
NEARNESS = 0.9  # of Schedule-Free's gradient to the average
WARMUP, DECAY = 0.05, 0.2  # shares of the steps, of all methods, and of the decay to 0
FOLLOWED = 9  # runs whose way is kept


@dataclass(frozen=True)
class River:
    """A valley.

    Args:
        slope: fall of the river for a unit of x, >= 0.
        hills: curvatures αᵢ > 0 of the hillsides.
        bend: how far the river swings to each side, >= 0; 0: a straight one.
        length: > 0, of a bend over 2π.
        noise: >= 0, standard deviation of the gradient's noise on a hill of curvature 1.

    Raises:
        ValueError: an argument is out of its range.
    """

    slope: float = 0.02
    hills: Sequence[float] = (10.0,)
    bend: float = 0.3
    length: float = 1.0
    noise: float = 0.3

    def __post_init__(self) -> None:
        for name in ("slope", "bend", "noise"):
            in_range(name, getattr(self, name), "[0, inf)")
        in_range("length", self.length, "(0, inf)")
        if not in_range("hills", self.hills, "(0, inf)").size:
            raise ValueError("hills must be one curvature or more, got none")

    def turn(self) -> Tensor:
        """An orthogonal, symmetric matrix whose first row is the same for all weights."""
        n = 1 + len(self.hills)
        v = torch.full((n,), 1 / math.sqrt(n), dtype=torch.float64)
        v[0] -= 1
        return torch.eye(n, dtype=torch.float64) - 2 * torch.outer(v, v) / (v @ v)

    def floor(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The river's place across the valley and its derivative at x, (..., 1): (..., hills)."""
        phase = torch.arange(len(self.hills), dtype=x.dtype)
        angle = x / self.length + phase
        bend = self.bend
        return bend * (angle.sin() - phase.sin()), bend / self.length * angle.cos()

    def height(self, place: Tensor) -> Tensor:
        """Height above the river of places (..., 1 + hills)."""
        across = place[..., 1:] - self.floor(place[..., :1])[0]
        return (torch.tensor(self.hills, dtype=place.dtype) * across**2).sum(-1) / 2

    def loss(self, place: Tensor) -> Tensor:
        """The loss of places (..., 1 + hills)."""
        return self.height(place) - self.slope * place[..., 0]

    def gradient(self, place: Tensor, noise: Tensor) -> Tensor:
        """The gradient at places (..., 1 + hills).

        Args:
            place: x, and the yᵢ.
            noise: standard normal, (..., hills).
        """
        hills = torch.tensor(self.hills, dtype=place.dtype)
        bottom, bent = self.floor(place[..., :1])
        uphill = hills * (place[..., 1:] - bottom)
        along = -self.slope - (uphill * bent).sum(-1, keepdim=True)
        return torch.cat([along, uphill + self.noise * hills.sqrt() * noise], -1)


class Traveller(NamedTuple):
    """A method: PACE's options, and what multiplies its learning rate."""

    options: Mapping[str, Any]
    schedule: Callable[[int, int], float] = lambda k, steps: 1.0  # of the step k, from 1
    nearness: float = 0.0  # of the gradient's place to the average, in [0, 1)


def _decay(k: int, steps: int) -> float:
    """Linear to 0 over the last fifth."""
    return min(1.0, (steps - k + 1) / (DECAY * steps))


AVERAGED = {"pullback": 0.0, "kappa": RETURN_KAPPA}
PULLED = {"pullback": 1.0, "gain": "scalar", "kappa": KAPPA, "return_kappa": RETURN_KAPPA}
METHODS = {
    "EMA": Traveller(AVERAGED),  # its live weights are those of the constant rate
    "decay": Traveller(AVERAGED, _decay),
    "power": Traveller(AVERAGED, lambda k, _: (1 + k) ** -KAPPA),
    "pull": Traveller(PULLED),
    "Schedule-Free": Traveller(
        {"pullback": 0.0, "averaging": Uniform(), "betas": (0.0, 0.999)}, nearness=NEARNESS
    ),
}
PAIR = ("pull", "power")  # they differ in where the gradient is taken


class Journey(NamedTuple):
    """Places (rates, runs, 1 + hills) after the last step, and the first runs' on the way."""

    live: Tensor
    returned: Tensor
    path: Tensor  # (steps + 1, rates, at most 9 runs, 1 + hills), of the live weights


def travel(
    method: Traveller,
    river: River,
    rates: Sequence[float],
    steps: int,
    runs: int,
    seed: int = 0,
    momentum: float = 0.9,
) -> Journey:
    """Let a method run down a river with PACE, at many learning rates at once, from 0.

    AdamW without decay moves weights in proportion to its rate, and a pull of one gain is linear.
    So PACE moves u = weights / rate at the rate 1, fed with the gradient at the weights: exactly
    its run at that rate, and one step moves all rates and runs.

    Args:
        method: one of `METHODS`. All have a linear warm-up.
        river: the valley.
        rates: learning rates η > 0.
        steps: >= 1.
        runs: independent runs, >= 1.
        seed: of the noise; all methods and rates with the same seed see the same.
        momentum: Adam's β1, in [0, 1), where the method does not say it.

    Raises:
        ValueError: an argument is out of its range.
    """
    in_range("steps", steps, "[1, inf)", whole=True)
    in_range("runs", runs, "[1, inf)", whole=True)
    rate = torch.from_numpy(in_range("rates", rates, "(0, inf)"))[:, None, None]
    generator = torch.Generator().manual_seed(seed)
    turn, n, warmup = river.turn(), len(river.hills), max(1, round(WARMUP * steps))
    u = Parameter(torch.zeros((len(rate), runs, 1 + n), dtype=torch.float64))
    fixed: dict[str, Any] = {"weight_decay": 0.0, "nonfinite": "ignore"}
    options = {"betas": (momentum, 0.999)} | fixed | dict(method.options)
    optimizer = PACE([u], lr=1.0, **options)
    path = [u.detach()[:, :FOLLOWED].clone()]
    for k in range(1, steps + 1):
        at = u.detach()
        if method.nearness and k > 1:
            at = torch.lerp(at, optimizer.state[u][AVERAGE], method.nearness)
        noise = torch.randn((runs, n), generator=generator, dtype=torch.float64)
        u.grad = river.gradient(rate * at @ turn, noise.expand(len(rate), -1, -1)) @ turn
        optimizer.param_groups[0]["lr"] = min(1.0, k / warmup) * method.schedule(k, steps)
        optimizer.step()
        path.append(u.detach()[:, :FOLLOWED].clone())
    live, returned = (rate * x @ turn for x in read_out(optimizer, u))
    return Journey(live, returned, rate * torch.stack(path) @ turn)
