"""Averages of the weights: what each takes in, and when. One protocol for all of them.

θ_t are the weights after step t = 1, 2, ... and θ_0 those before the first: θ_t here is θ_{t+1} of
`paceline.update`. A rule says what the average becomes at each step; `PACE`, `Pullback`, and what
else keeps an average, hold the tensors and ask the rule. Every average is linear in the iterates,
so that `coefficients` can tell how much of each is in it.

Rules are also written as text, which is how parameter groups, checkpoints and the command line
have them: the name, then options, as in `uniform:start=100`, `lawa:window=10:every=50`,
`ema:kappa=0.5` and `ema:half_life=200`. `parse` reads that, `str` writes it.
"""

import itertools
import math
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, ClassVar, Self, TypeAlias

import torch
from torch import Tensor

Tensors: TypeAlias = list[Tensor]
Kept: TypeAlias = Sequence[dict[str, Tensor]]  # of each parameter, what its rule keeps

MIN_WEIGHT = 1e-4  # of a power EMA
MAX_STEPS = 2**53  # up to which float64, which texts are read in, has all whole numbers
MAX_WINDOW = 1000  # snapshots that LAWA keeps, each as large as the model
RULES: dict[str, list[type["Averaging"]]] = {}  # by name; PowerEMA and EMA share one
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")


@dataclass(frozen=True)
class Averaging(ABC):
    """What an average of the iterates θ_1, θ_2, ... becomes at each step.

    Most rules need the average and one number, the weight of the newest iterate:

        average_t = (1 - weight(t))·average_{t-1} + weight(t)·θ_t,     average_0 = θ_0

    A rule of your own is a subclass, which PACE, Pullback, checkpoints and the command line take as
    they take those of this module:

        @dataclass(frozen=True)
        class Linear(Averaging):
            # Iterate s counts in proportion to s.
            name: ClassVar[str] = "linear"

            def falloff(self, step):
                return 2.0 / (step + 1.0)

            def weight(self, step):
                return self.falloff(step)

        opt = PACE(model.parameters(), lr=1e-3, pullback=0.1, averaging=Linear())

    It must be a frozen dataclass whose fields are numbers, for `str` writes them and `parse` reads
    them back; have a `name` of its own; and define `falloff` and `weight`. Both get whole numbers,
    a tensor of steps where the host does not read the count (`capturable=True`), or a traced array
    under JAX. A rule that needs more tensors than the average names them in `keeps`, makes them in
    `begin`, and does all in `update_` instead of `weight`. One that can follow a change of the
    batch defines `scaling`; {} says that nothing changes. Define the class before a checkpoint is
    loaded.
    """

    name: ClassVar[str]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        name = cls.__dict__.get("name")
        if name is None:  # a base of further rules
            return
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ValueError(
                f"name of {cls.__name__} must be letters, digits, _ or -, got {name!r}"
            )
        same = (cls.__module__, cls.__qualname__)  # a class defined once more replaces itself
        others = [x for x in RULES.get(name, []) if (x.__module__, x.__qualname__) != same]
        if others and cls.__module__ != __name__:
            raise ValueError(f"name of {cls.__name__} must be its own, got {name!r}, {others[0]}'s")
        RULES[name] = [*others, cls]

    def __post_init__(self) -> None:
        """Check that all fields are numbers, and whole ones at most 2^53.

        Raises:
            ValueError: one is not finite, not whole where it must be, or out of its range.
        """
        for field in fields(self):
            value = getattr(self, field.name)
            kinds = (int,) if field.type in (int, "int") else (int, float)
            real = isinstance(value, kinds) and not isinstance(value, bool)
            fine = real and abs(value) <= sys.float_info.max  # of whole numbers, too
            optional = value is None and field.default is None
            kind = "a finite number" if float in kinds else "a whole number"
            self._require(field.name, fine or optional, kind)
            if field.name in ("every", "window"):
                self._require(field.name, value >= 1, ">= 1")
            if float not in kinds or field.name in ("start", "lag", "rate"):
                self._require(field.name, optional or abs(value) <= MAX_STEPS, "at most 2^53")
            if field.name == "start":
                self._require(field.name, value >= 0, "a number of steps >= 0")

    @property
    def keeps(self) -> tuple[str, ...]:
        """Names of the tensors, shaped like the parameter, that it needs besides the average."""
        return ()

    def begin(self, weights: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Those tensors before the first step, from θ_0; `dtype` is the average's."""
        return {}

    def weight(self, step: int | Tensor) -> float | Tensor:
        """Weight in [0, 1] of the newest iterate at step t = `step`, from 1, or a tensor of such.

        0 at a step that takes nothing in. 1 while the average is the live weights themselves.
        """
        return 0.0

    @abstractmethod
    def falloff(self, step: int | Tensor) -> float | Tensor:
        """What a pull toward this average falls with: the factor β_t in PACE's gain, in (0, 1]."""

    def update_(self, step: int, weights: Tensors, averages: Tensors, kept: Kept) -> None:
        """Take in θ_t, in place.

        Args:
            step: t, from 1.
            weights: θ_t, floating-point tensors of any shape.
            averages: of the same shapes, in float32 or wider; updated.
            kept: of each, the tensors that `begin` made; updated.
        """
        weight = self.weight(step)
        if isinstance(weight, Tensor) or weight:
            wide = [x.to(average.dtype) for x, average in zip(weights, averages, strict=True)]
            lerp_(averages, wide, weight)

    def coefficients(self, steps: int) -> Tensor:
        """How much of θ_0, θ_1, ..., θ_steps is in the average after `steps` steps.

        Returns:
            float64, of steps + 1 elements that add up to 1 (of BEMA's some are negative).
        """
        iterates = torch.eye(steps + 1, dtype=torch.float64)
        average = iterates[0].clone()
        kept = self.begin(iterates[0], average.dtype)
        for step in range(1, steps + 1):
            self.update_(step, [iterates[step]], [average], [kept])
        return average

    def ages(self) -> Iterator[float]:
        """How many steps old the iterates in the average are, in the mean, after step 1, 2, ...

            age_t = Σ_s c_s·(t - s),     c the `coefficients` after t steps

        By so many steps the average lags behind weights that move steadily.
        """
        average = torch.zeros(1, dtype=torch.float64)  # of the numbers of the steps
        kept = self.begin(average, average.dtype)
        age = 0.0
        for step in itertools.count(1):
            if self.keeps:
                here = torch.full_like(average, step)
                self.update_(step, [here], [average], [kept])
                age = step - average.item()
            else:
                age = (1.0 - float(self.weight(step))) * (age + 1.0)
            yield age

    def scaled(self, k: float) -> Self:
        """The rule that makes the same average of the data when the batch grows k-fold.

        Step t of the large batch ends where step k·t of the small one does. What came after it
        shall weigh the same in both averages. With c and c' their `coefficients`, for all t:

            Σ_{j>t} c'_j = Σ_{s>k·t} c_s

        | rule | changes | agrees |
        |---|---|---|
        | EMA | β' = 1 - (1 - β)^k, half_life' = half_life/k | exactly |
        | PowerEMA | γ' = γ·k^(1-1/κ), ρ' = ρ/k + (k^(1/κ) - 1)/(k·γ) | k ≥ 1: to (k-1)/(2e)·β_T |
        | Uniform, SWA | ρ' = ρ/k | exactly, if it is a whole number |
        | LAWA | window'·every' = window·every/k | exactly, if they are whole numbers |
        | BEMA | γ' = k·γ, τ' = τ/k | exactly; without φ/k in whole numbers there is no rule |

        All of them take in every (every/k)-th iterate. Where that is a whole number, the average
        takes in the same points of the data with the same weights: β stays, and a power EMA has
        γ' = k·γ, ρ' = ρ/k, exactly. Else `every` is rounded to a whole number of steps, at least 1,
        and starts to a whole step. `every=1`, which takes in all, stays; except that of LAWA and
        BEMA with k < 1. `PowerEMA.scaling` has the derivation.

        Args:
            k: the new batch over the old one, in [2^-53, 2^53]; below 1 for a smaller one.

        Raises:
            ValueError: k is out of its range; or the rule has no scaling by k, and why.

        Source: the constant EMA is that of Busbridge et al., How to Scale Your EMA,
        arXiv:2307.13813 (2023).
        """
        real = isinstance(k, (int, float)) and not isinstance(k, bool)
        if not real or not 1 / MAX_STEPS <= k <= MAX_STEPS:
            raise ValueError(f"k must be a number in [2^-53, 2^53], got {k!r}")
        if k == 1:
            return self
        try:
            return replace(self, **self.scaling(k))
        except (ValueError, ArithmeticError) as error:
            why = "its numbers would be too large" if isinstance(error, ArithmeticError) else error
            raise ValueError(f"{self} has no scaling by {k:g}: {why}") from error

    def scaling(self, k: float) -> dict[str, Any]:
        """The fields that `scaled` changes, and their values, for a k that is not 1.

        Raises:
            ValueError: no values make the same average; the message says why.
        """
        raise ValueError(f"{type(self).__name__} does not define scaling()")

    def __str__(self) -> str:
        parts = [self.name]
        for at, field in enumerate(fields(self)):
            value = getattr(self, field.name)
            if value is not None and (value != field.default or (at == 0 and value)):
                plain = value if isinstance(value, int) else float(value)  # NumPy's say their type
                parts.append(f"{field.name}={plain!r}")
        return ":".join(parts)

    def _require(self, name: str, ok: bool, range_: str) -> None:
        if not ok:
            raise ValueError(f"{name} of {self.name} must be {range_}, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class PowerEMA(Averaging):
    """An EMA whose weight falls as a power of the step: it forgets the start, and never stops.

        β_t = max((1 + γ·max(0, t - ρ))^-κ, 1e-4)

    Until ρ the weight is 1: the average is the live weights themselves.

    Args:
        kappa: κ in [0, 1]. 1 is nearly a uniform average, 0 no average at all.
        rate: γ > 0, steps⁻¹.
        start: ρ >= 0, steps.
        every: the average takes in every this-many-th iterate, >= 1.

    Raises:
        ValueError: an argument is out of its range.

    Source: Au & Block, arXiv:2606.25086 (2026).
    """

    kappa: float = 0.5
    rate: float = 1.0
    start: float = 0
    every: int = 1
    name: ClassVar[str] = "ema"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("kappa", 0 <= self.kappa <= 1, "in [0, 1]")
        self._require("rate", self.rate > 0, "> 0")

    def falloff(self, step: int | Tensor) -> float | Tensor:
        """β_t."""
        weight: float | Tensor = (1.0 + self.rate * _at_least(0, step - self.start)) ** -self.kappa
        return _at_least(MIN_WEIGHT, weight)

    def weight(self, step: int | Tensor) -> float | Tensor:
        """β_t at every `every`-th step."""
        return _where(step % self.every == 0, self.falloff(step))

    def scaling(self, k: float) -> dict[str, Any]:
        """κ stays; γ and ρ change.

        An update of the large batch stands for r = k·every'/every of the small one, at k times its
        step. It has to weigh 1 - Π(1 - β) over those r, which is r·β to first order. Again a power
        of the step, it is the same rule with other numbers:

            r·(1 + γ·(k·t - ρ))^-κ = (1 + γ'·(t - ρ'))^-κ
            γ' = k·γ·r^(-1/κ),       ρ' = ρ/k + (r^(1/κ) - 1)/(k·γ)

        Up to ρ' the small batch's average forgets within a step of the large one, so that the large
        one's is the live weights. A ρ' below 0, of a smaller batch, is 0. The bound below is for
        r ≥ 1.

        The second order of the product, (r-1)/2·β of the weight, is left out. At step T of the
        small batch it moves the sums of `scaled` by at most (r-1)/(2e)·β_T + O(β_T²), with β_T
        above the floor of 1e-4, which does not change. With r = 1, and with κ = γ = 1, they are
        equal.
        """
        every, updates = _scaled_every(self.every, k)
        if self.kappa == 0:  # the live weights
            return {"every": every}
        longer = updates ** (1.0 / self.kappa)
        start = self.start / k + (longer - 1.0) / (k * self.rate)
        return {"rate": k * self.rate / longer, "start": max(0.0, start), "every": every}


@dataclass(frozen=True)
class EMA(Averaging):
    """An EMA with a constant weight β, which may be given by its half-life.

        β = 1 - 2^(-every/half_life)

    After `half_life` steps an iterate counts half as much as when it came in.

    Args:
        beta: β in (0, 1] of each iterate taken in. The "decay" of others is 1 - β.
        half_life: > 0, steps, instead of `beta`.
        every: the average takes in every this-many-th iterate, >= 1.

    Raises:
        ValueError: an argument is out of its range; or both beta and half_life, or none is given.

    Source: as the returned model, Tarvainen & Valpola, Mean teachers are better role models,
    arXiv:1703.01780 (2017).
    """

    beta: float | None = None
    half_life: float | None = None
    every: int = 1
    name: ClassVar[str] = "ema"

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.beta is None) == (self.half_life is None):
            raise ValueError(
                "an EMA must have either beta or half_life, "
                f"got beta={self.beta!r} and half_life={self.half_life!r}"
            )
        self._require("beta", self.beta is None or 0 < self.beta <= 1, "in (0, 1]")
        self._require("half_life", self.half_life is None or self.half_life > 0, "> 0")

    def falloff(self, step: int | Tensor) -> float | Tensor:
        """1: the weight does not fall."""
        return 1.0

    def weight(self, step: int | Tensor) -> float | Tensor:
        """β at every `every`-th step."""
        beta = self.beta
        if beta is None:
            assert self.half_life is not None
            beta = -math.expm1(-math.log(2) * self.every / self.half_life)
        return _where(step % self.every == 0, beta)

    def scaling(self, k: float) -> dict[str, Any]:
        """β' = 1 - (1 - β)^r, for the r = k·every'/every updates that one stands for."""
        every, updates = _scaled_every(self.every, k)
        if self.half_life is not None:
            return {"half_life": self.half_life / k, "every": every}
        assert self.beta is not None
        kept = -math.inf if self.beta == 1 else math.log1p(-self.beta)
        return {"beta": -math.expm1(updates * kept), "every": every}


@dataclass(frozen=True)
class SWA(Averaging):
    """Stochastic weight averaging: the mean of every k-th iterate from a start on.

        average_t = mean of θ_{ρ+k}, θ_{ρ+2k}, ..., the last of them at or before t

    Until the first of these the average is the live weights themselves.

    Args:
        start: ρ >= 0, steps.
        every: k >= 1, steps; the length of a cycle where the learning rate goes in cycles.

    Raises:
        ValueError: an argument is out of its range.

    Source: Izmailov et al., Averaging Weights Leads to Wider Optima, arXiv:1803.05407 (2018).
    """

    start: int = 0
    every: int = 1
    name: ClassVar[str] = "swa"

    def falloff(self, step: int | Tensor) -> float | Tensor:
        """1/n, where n iterates are in."""
        return 1.0 / _at_least(1, (step - self.start) // self.every)

    def weight(self, step: int | Tensor) -> float | Tensor:
        """1/n, where the n-th iterate comes in."""
        since = step - self.start
        return _where((since < self.every) | (since % self.every == 0), self.falloff(step))

    def scaling(self, k: float) -> dict[str, Any]:
        """ρ' = ρ/k and every' = every/k."""
        return {"start": round(self.start / k), "every": _scaled_every(self.every, k)[0]}


@dataclass(frozen=True)
class Uniform(Averaging):
    """The mean of all iterates from a start on: Polyak-Ruppert averaging.

        average_t = (θ_{ρ+1} + ... + θ_t) / (t - ρ)

    Until ρ + 1 the average is the live weights themselves.

    Args:
        start: ρ >= 0, steps.

    Raises:
        ValueError: start is out of its range.

    Source: Polyak & Juditsky, Acceleration of Stochastic Approximation by Averaging (1992);
    Ruppert, Efficient Estimations from a Slowly Convergent Robbins-Monro Process (1988).
    """

    start: int = 0
    name: ClassVar[str] = "uniform"

    def falloff(self, step: int | Tensor) -> float | Tensor:
        """1/n, where n iterates are in."""
        return 1.0 / _at_least(1, step - self.start)

    weight = falloff

    def scaling(self, k: float) -> dict[str, Any]:
        """ρ' = ρ/k."""
        return {"start": round(self.start / k)}


@dataclass(frozen=True)
class LAWA(Averaging):
    """The mean of the last K snapshots, taken every k steps: latest weight averaging.

        average_t = mean of θ_{k·(n-K+1)}, ..., θ_{k·n},   n = t // k, and of fewer while n < K

    Until the first snapshot the average is the live weights themselves. The K snapshots are kept
    in the parameter's dtype, which holds them exactly.

    Args:
        window: K snapshots, from 1 to 1000.
        every: k >= 1, steps.

    Raises:
        ValueError: an argument is out of its range.

    Source: Kaddour, Stop Wasting My Time!, arXiv:2209.14981 (2022).
    """

    window: int
    every: int = 1
    name: ClassVar[str] = "lawa"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("window", self.window <= MAX_WINDOW, f"at most {MAX_WINDOW}")

    @property
    def keeps(self) -> tuple[str, ...]:
        """The snapshots, in a ring."""
        return tuple(f"snapshot_{i}" for i in range(self.window))

    def begin(self, weights: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Room for the snapshots."""
        return {name: weights.detach().clone() for name in self.keeps}

    def falloff(self, step: int | Tensor) -> float | Tensor:
        """1: the window's length is constant."""
        return 1.0

    def update_(self, step: int, weights: Tensors, averages: Tensors, kept: Kept) -> None:
        """Take a snapshot if it is time, and the mean of all anew: a running one would drift."""
        if step < self.every:
            for average, x in zip(averages, weights, strict=True):
                average.copy_(x)
        if step % self.every:
            return
        taken = step // self.every
        here = self.keeps[(taken - 1) % self.window]
        there = self.keeps[: min(taken, self.window)]
        for average, x, own in zip(averages, weights, kept, strict=True):
            own[here].copy_(x)
            for count, name in enumerate(there, 1):  # what is equal in all stays as it is
                average.lerp_(own[name].to(average.dtype), 1.0 / count)

    def scaling(self, k: float) -> dict[str, Any]:
        """K'·every' = K·every/k: fewer steps between snapshots, and where that is 1, fewer of them.

        Raises:
            ValueError: all K are within half a step of the large batch.
        """
        every = max(1, round(self.every / k))
        window = round(self.window * self.every / (k * every))
        if window == 0:
            raise ValueError(f"its {self.window * self.every} steps are within half a new one")
        return {"window": window, "every": every}


@dataclass(frozen=True)
class BEMA(Averaging):
    """The bias-corrected EMA: it takes back some of the EMA's lag behind the live weights.

        β_t = (ρ + γ·t)^-κ        ema_t = (1 - β_t)·ema_{t-1} + β_t·θ_t
        α_t = (ρ + γ·t)^-η        average_t = ema_t + α_t·(θ_t - θ_τ),     ema_τ = θ_τ

    at t = τ + φ, τ + 2φ, ...; until τ the average is the live weights themselves. The defaults are
    those published but for φ, which is 400 there: an average that has not moved by step 399 is not
    what one expects.

    Args:
        kappa: κ in [0, 1], of the EMA.
        bias_power: η in [0, 1], of the correction.
        lag: ρ >= 1 steps of age that both begin with.
        rate: γ > 0, steps⁻¹.
        start: τ >= 0, steps.
        every: φ >= 1, steps.

    Raises:
        ValueError: an argument is out of its range.

    Source: Block & Zhang, EMA Without the Lag: Bias-Corrected Iterate Averaging Schemes,
    arXiv:2508.00180 (2025).
    """

    kappa: float = 0.5
    bias_power: float = 0.2
    lag: float = 10
    rate: float = 1.0
    start: int = 0
    every: int = 1
    name: ClassVar[str] = "bema"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("kappa", 0 <= self.kappa <= 1, "in [0, 1]")
        self._require("bias_power", 0 <= self.bias_power <= 1, "in [0, 1]")
        self._require("lag", self.lag >= 1, ">= 1")
        self._require("rate", self.rate > 0, "> 0")

    @property
    def keeps(self) -> tuple[str, ...]:
        """The EMA, and θ_τ."""
        return ("ema", "initial")

    def begin(self, weights: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Both are θ_0; the second in the parameter's dtype, which holds it exactly."""
        ema, initial = self.keeps
        return {ema: weights.detach().to(dtype, copy=True), initial: weights.detach().clone()}

    def falloff(self, step: int | Tensor) -> float | Tensor:
        """β_t."""
        weight: float | Tensor = (self.lag + self.rate * step) ** -self.kappa
        return weight

    def update_(self, step: int, weights: Tensors, averages: Tensors, kept: Kept) -> None:
        """One step of both equations."""
        since = step - self.start
        if since > 0 and since % self.every:
            return
        age = self.lag + self.rate * step
        for average, x, own in zip(averages, weights, kept, strict=True):
            ema, initial = (own[name] for name in self.keeps)
            if since <= 0:
                for tensor in (average, ema, initial):
                    tensor.copy_(x)
                continue
            x = x.to(average.dtype)
            ema.lerp_(x.to(ema.dtype), age**-self.kappa)
            torch.sub(x, initial, out=average)
            average.mul_(age**-self.bias_power).add_(ema)

    def scaling(self, k: float) -> dict[str, Any]:
        """γ' = k·γ, τ' = τ/k, φ' = φ/k: the same powers at the same points of the data.

        Raises:
            ValueError: φ/k is no whole number. A step would then stand for r > 1 updates, and β
                would have to grow r-fold where α stays. Both are powers of the same ρ + γ·t.
        """
        every = round(self.every / k)
        if not math.isclose(k * every, self.every):
            raise ValueError(f"every={self.every} over {k:g} is no whole number; give a multiple")
        return {"rate": k * self.rate, "start": round(self.start / k), "every": every}


def parse(text: str) -> Averaging:
    """A rule from its text: `ema` (with kappa, or with beta or half_life), `uniform`, `swa`, ...

    Raises:
        ValueError: an unknown name or option, an option without its value, or what the rule raises.
    """
    name, *parts = text.strip().split(":")
    given: dict[str, Any] = {}
    for part in parts:
        option, equals, value = part.partition("=")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if option in given:
            raise ValueError(f"averaging {text!r} gives {option!r} twice")
        if not equals or math.isnan(number):
            raise ValueError(f"averaging {text!r}: {part!r} must be one option=number")
        given[option] = int(number) if number.is_integer() else number
    if name not in RULES:
        raise ValueError(f"unknown average {name!r} in {text!r}; known: {', '.join(RULES)}")
    # Of two rules with one name, the one that has more of the options.
    rule = max(RULES[name], key=lambda rule: len(given.keys() & {x.name for x in fields(rule)}))
    names = [field.name for field in fields(rule)]
    for option in given:
        if option not in names:
            raise ValueError(f"averaging {text!r} has no option {option!r}; it has {names}")
    for field in fields(rule):
        if field.default is MISSING and field.name not in given:
            raise ValueError(f"averaging {text!r} needs {field.name}=")
    try:
        return rule(**given)
    except ValueError as error:
        raise ValueError(f"averaging {text!r}: {error}") from None


def as_rule(value: Averaging | str) -> Averaging:
    """The rule itself, or the rule of a text.

    Raises:
        ValueError: the text is of no rule; or the rule cannot be kept as text, which options and
            checkpoints need; the message says what its class has to be.
    """
    if isinstance(value, str):
        return parse(value)
    kind = type(value)
    if kind not in RULES.get(getattr(kind, "name", ""), []):
        raise ValueError(f"averaging {kind.__name__} must have a class attribute `name` of its own")
    if "__dataclass_params__" not in kind.__dict__:
        raise ValueError(f"averaging {kind.__name__} must be a @dataclass(frozen=True)")
    if kind.update_ is not Averaging.update_ and not value.keeps:
        raise ValueError(f"averaging {kind.__name__} has update_, and must name tensors in `keeps`")
    if kind.update_ is Averaging.update_ and kind.weight is Averaging.weight:
        raise ValueError(f"averaging {kind.__name__} must have weight(), or keeps and update_()")
    if "step" in value.keeps:
        raise ValueError(f"averaging {kind.__name__} must not name a tensor 'step' in `keeps`")
    if parse(str(value)) != value:
        raise ValueError(
            f"averaging {kind.__name__} must have fields that are numbers, got {value!r}, which is "
            f"{parse(str(value))!r} when it is read from its text {str(value)!r}"
        )
    return value


def lerp_(averages: Tensors, weights: Tensors, weight: float | Tensor) -> None:
    """Move averages by the weight toward the weights, in place; all of the averages' dtype."""
    if isinstance(weight, Tensor):
        for average, x in zip(averages, weights, strict=True):
            average.lerp_(x, weight.to(average.dtype))
    elif weight:
        torch._foreach_lerp_(averages, weights, weight)


def _scaled_every(every: int, k: float) -> tuple[int, float]:
    """`every` in steps of k times the data, and how many old updates a new one stands for."""
    new = 1 if every == 1 else max(1, round(every / k))
    return new, k * new / every


def _at_least(least: float, x: float | Tensor) -> float | Tensor:
    if isinstance(x, Tensor):
        return x.clamp_min(least)
    if arrays := _arrays_of(x):
        return arrays.maximum(x, least)  # type: ignore[no-any-return]
    return max(least, x)


def _where(condition: bool | Tensor, value: float | Tensor) -> float | Tensor:
    """The value, or 0 where the condition does not hold."""
    if isinstance(condition, Tensor):
        return condition.double() * value
    if arrays := _arrays_of(condition):
        return arrays.where(condition, value, 0.0)  # type: ignore[no-any-return]
    return value if condition else 0.0


def _arrays_of(x: Any) -> Any:
    """The functions for an array of another library, such as a step that JAX traces; else None."""
    return x.__array_namespace__() if hasattr(x, "__array_namespace__") else None
