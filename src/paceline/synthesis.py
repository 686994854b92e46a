"""Averages that were not kept, rebuilt from those that were: weights, and the error to expect.

An average whose rule has a `weight` is linear in the iterates θ_0, θ_1, ... Up to θ_k it holds the
share, at step s,

    F_s(k) = Π_{j=k+1..s} (1 - weight(j))    for k < s,        1 from k = s on

Snapshots i of averages, added up with weights a_i whose sum is 1, stand for a target average T.
What they miss depends on the residual E(k) = F_T(k) - Σ_i a_i·F_i(k), and on the steps of the run:

    T - Σ_i a_i·snapshot_i = -Σ_k E(k)·(θ_{k+1} - θ_k)

Weights are those of least Σ_k E(k)²: the squared error where the iterates are a random walk. That
norm is close to the best one for other processes, too, while least squares on the profiles, the
shares of single iterates, is several times worse where the iterates drift (docs/choose.md).

Source: rebuilding averages after the run is Karras et al., Analyzing and Improving the Training
Dynamics of Diffusion Models, arXiv:2312.02696 (2024), with power functions and least squares on
profiles. The rules, the norm and the error are ours.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .averaging import EMA, SWA, Averaging, PowerEMA, Uniform, as_rule

MAX_STEP = 10**8  # a step takes some 16 bytes for each rule
CHUNK = 2**14  # steps at a time
LIMIT = 0.05  # of the error
EXACT = 1e-8  # the norm of a residual that is rounding
NOISE = 1e-4  # float32: weights of 0.1, rounded by 3e-9, that a step moves by 3e-5


@dataclass(frozen=True)
class Snapshot:
    """An average at a step: what it is made of, without its tensors.

    The live weights are one, too, of the rule `ema:beta=1`; so are the weights before the first
    step, of any rule at step 0.

    Args:
        rule: a rule of `paceline.averaging` that needs no more tensors than the average, or its
            text. Its `every` says which iterates it took in.
        step: t, the steps that it has seen, those without a gradient among them.
        begun: the step before its first: it began as θ_begun.

    Raises:
        ValueError: an argument is out of its range.
    """

    rule: Averaging
    step: int
    begun: int = 0

    def __init__(self, rule: Averaging | str, step: int, begun: int = 0) -> None:
        object.__setattr__(self, "rule", as_rule(rule))
        object.__setattr__(self, "step", step)
        object.__setattr__(self, "begun", begun)
        if self.rule.keeps:
            raise ValueError(
                f"{self.rule} keeps more tensors than its average: nothing can be rebuilt from it, "
                "nor it from others"
            )
        whole = all(isinstance(x, int) and not isinstance(x, bool) for x in (step, begun))
        if not whole or not 0 <= begun <= step <= MAX_STEP:
            raise ValueError(
                "step must be a whole number from begun to 10^8, and begun from 0, "
                f"got step={step!r} and begun={begun!r}"
            )

    def __str__(self) -> str:
        return f"{self.rule} at step {self.step}"


@dataclass(frozen=True)
class Synthesis:
    """How an average is rebuilt from snapshots."""

    weights: tuple[float, ...]
    """Of each snapshot, in their order; they add up to 1, and some are negative."""
    error: float
    """Expected 2-norm of what is wrong, as a share of the average's distance from the live weights.

    The largest of those for a random walk, for one whose steps fall as 1/√t, and for weights that
    jitter around a point, with correlation times from none to the length of the run.
    """


def synthesize(
    snapshots: Sequence[Snapshot],
    target: Averaging | str,
    at: int | None = None,
    *,
    limit: float = LIMIT,
    noise: float = NOISE,
) -> Synthesis:
    """The weights that rebuild an average from snapshots of others, of one run.

        rules, steps = ("ema:kappa=0.5", "ema:kappa=0.9"), (200, 400, 500, 600)
        kept = [Snapshot(rule, step) for rule in rules for step in steps]
        found = synthesize(kept, "ema:kappa=0.7")
        average = sum(a * x for a, x in zip(found.weights, tensors))

    Args:
        snapshots: what was kept.
        target: the rule to rebuild, or its text. It begins as the first snapshot that began.
        at: its step. Default: the last of the snapshots.
        limit: of the error, above which it is refused; math.inf refuses nothing.
        noise: rounding error of a snapshot, as a share of the distance that one step moves the
            weights; larger weights cost more. For bfloat16 measure it: it is some 2^-9.2 of a
            weight.

    Raises:
        ValueError: there are no snapshots, or one twice; a rule cannot be rebuilt, or its error is
            above the limit; the message names the nearest rule that can be.
    """
    if not snapshots:
        raise ValueError("snapshots must be one or more, got none")
    for i, snapshot in enumerate(snapshots):
        if snapshot in snapshots[:i]:
            raise ValueError(f"snapshots must differ, got {snapshot} twice")
    at = max(x.step for x in snapshots) if at is None else at
    if at < 1:
        raise ValueError(f"at must be a step >= 1, got {at}")
    wanted = Snapshot(target, at, min(at, *(x.begun for x in snapshots)))
    shares = _Shares(max(at, *(x.step for x in snapshots)))
    found = _synthesize(shares, snapshots, wanted, noise)
    if found.error <= limit:
        return found
    near = (
        rule
        for rule in _neighbours(wanted)
        if _synthesize(shares, snapshots, replace(wanted, rule=rule), noise).error <= limit
    )
    nearest = next(near, None)
    raise ValueError(
        f"{wanted} cannot be rebuilt from these snapshots: the expected error is "
        f"{found.error:.1%} of its distance from the live weights, and {limit:.1%} the limit; "
        + (f"nearest that can: {nearest}" if nearest else "none like it can")
    )


def walk_distance(a: Snapshot, b: Snapshot) -> float:
    """The expected distance of two averages of a random walk whose steps are of length 1."""
    chunks = _Shares(max(a.step, b.step)).chunks([a, b])
    return math.sqrt(sum(float((x[:, 0] - x[:, 1]).square().sum()) for x in chunks))


def snapshot_steps(steps: int, count: int) -> list[int]:
    """Steps of a run to keep averages at, so that others can be rebuilt at its end.

    They come closer together toward the end, in proportion to what is left: fast averages are of
    the last steps alone. The last is the last step of the run.

    Args:
        steps: of the run, >= 1.
        count: snapshots, >= 1; fewer are given where steps would be one twice.

    Raises:
        ValueError: an argument is out of its range.
    """
    for name, value in (("steps", steps), ("count", count)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")
    left = (1.0 - i / count for i in range(1, count + 1))
    return sorted({max(1, round(steps * (1.0 - x * x))) for x in left})


class _Shares:
    """F of any snapshots, up to the last step of a run."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        # By rule, at each step: log Π (1 - weight) but for weights of 1, and the last of those.
        self.logs: dict[Averaging, tuple[Tensor, Tensor]] = {}

    def _logs(self, rule: Averaging) -> tuple[Tensor, Tensor]:
        if rule not in self.logs:
            steps = torch.arange(self.steps + 1, dtype=torch.float64)
            weight = torch.as_tensor(rule.weight(steps[1:]), dtype=torch.float64)
            weight = torch.cat([torch.zeros(1).double(), weight.expand(self.steps)])
            if not bool(((weight >= 0) & (weight <= 1)).all()):
                raise ValueError(
                    f"{rule} has weights that are not in [0, 1], and cannot be rebuilt"
                )
            whole = weight == 1
            logs = torch.log1p(-weight.masked_fill(whole, 0.0)).cumsum(0)
            self.logs[rule] = logs, torch.where(whole, steps, 0.0).cummax(0).values
        return self.logs[rule]

    def chunks(self, snapshots: Sequence[Snapshot]) -> Iterator[Tensor]:
        """F(k) at k = 0, ..., steps - 1, a column a snapshot, in float64; some rows at a time."""
        known = [self._logs(x.rule) for x in snapshots]
        for first in range(0, self.steps, CHUNK):
            rows = slice(first, min(first + CHUNK, self.steps))
            k = torch.arange(rows.start, rows.stop)
            columns = []
            for x, (logs, whole) in zip(snapshots, known, strict=True):
                share = torch.exp(logs[x.step] - logs[rows])
                share[k < max(float(whole[x.step]), x.begun)] = 0.0
                share[k >= x.step] = 1.0
                columns.append(share)
            yield torch.stack(columns, 1)


def _synthesize(
    shares: _Shares, snapshots: Sequence[Snapshot], wanted: Snapshot, noise: float
) -> Synthesis:
    live = Snapshot(EMA(1.0), wanted.step)
    columns, n = [*snapshots, wanted, live], len(snapshots)
    triangle = torch.zeros(0, n + 2, dtype=torch.float64)  # its norms are those of all rows
    for rows in shares.chunks(columns):
        triangle = torch.linalg.qr(torch.cat([triangle, rows]), mode="r").R
    apart = (triangle[:, :n] - triangle[:, n : n + 1]).norm(dim=0)
    if apart.min() < EXACT:  # it was kept
        return Synthesis(tuple(float(i == apart.argmin()) for i in range(n)), 0.0)
    weights = _least_squares(triangle[:, :n], triangle[:, n], noise)
    mixture = torch.cat([-weights, torch.tensor([1.0, 0.0]).double()])
    distance = torch.cat([torch.zeros(n), torch.tensor([1.0, -1.0])]).double()
    both = torch.stack([mixture, distance], 1)
    missed, far = torch.cat([rows @ both for rows in shares.chunks(columns)]).unbind(1)
    rounding = (noise * weights.norm() / far.norm()) ** 2
    errors = _squares(missed) / _squares(far)
    return Synthesis(tuple(weights.tolist()), math.sqrt(errors.max() + rounding))


def _least_squares(columns: Tensor, target: Tensor, noise: float) -> Tensor:
    """Weights a, with the sum 1, of the least |columns·a - target|² + noise²·|a|²."""
    n = columns.shape[1]
    columns = torch.cat([columns, noise * torch.eye(n, dtype=columns.dtype)])
    target = torch.cat([target, torch.zeros(n, dtype=target.dtype)])
    last = columns[:, -1]
    free = torch.linalg.lstsq(
        columns[:, :-1] - last[:, None], (target - last)[:, None], driver="gelsd"
    ).solution[:, 0]
    return torch.cat([free, 1.0 - free.sum(0, keepdim=True)])


def _squares(residual: Tensor) -> Tensor:
    """The expected squared 2-norm of Σ_k E(k)·(θ_{k+1} - θ_k), for each process of the iterates."""
    steps = len(residual)
    walk = residual.square()
    slowing = walk / torch.arange(1, steps + 1)
    # Of jitter: of the shares of single iterates, their correlations at each lag.
    profile = torch.diff(residual, prepend=residual.new_zeros(1), append=residual.new_zeros(1))
    size = 2 ** math.ceil(math.log2(2 * len(profile)))
    power = torch.fft.rfft(profile, size).abs().square()
    lags = torch.fft.irfft(power, size)[: len(profile)]
    lags[1:] *= 2.0
    lag = torch.arange(len(lags), dtype=torch.float64)
    times = [4.0**i for i in range(-1, math.ceil(math.log(steps, 4)))]  # 1/4 is as good as 0
    jitters = [lags @ torch.exp(-lag / time) for time in times]
    return torch.stack([walk.sum(), slowing.sum(), *jitters])


def _neighbours(wanted: Snapshot) -> list[Averaging]:
    """Rules like a target's, the nearest first."""
    rule = wanted.rule
    if isinstance(rule, PowerEMA):
        kappas = sorted((i / 20 for i in range(21)), key=lambda x: abs(x - rule.kappa))
        return [replace(rule, kappa=kappa) for kappa in kappas]
    if isinstance(rule, EMA):
        factors = [2.0 ** (sign * i / 4) for i in range(1, 25) for sign in (1, -1)]
        if rule.half_life is not None:
            lives = [float(f"{rule.half_life * x:.2g}") for x in factors]
            return [replace(rule, half_life=x) for x in lives]
        assert rule.beta is not None
        betas = [float(f"{rule.beta * x:.2g}") for x in factors]
        return [replace(rule, beta=x) for x in betas if x <= 1]
    if isinstance(rule, Uniform | SWA):
        starts = (wanted.step * i // 20 for i in range(20))
        return [replace(rule, start=x) for x in sorted(starts, key=lambda x: abs(x - rule.start))]
    return []
