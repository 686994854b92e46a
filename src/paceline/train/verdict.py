"""The verdict at the end of a run: whether it got worse, and how returned and live differ."""

import math
from itertools import count
from typing import Any, NamedTuple

from ..averaging import Averaging
from . import InputError
from .build import RunTrainer
from .held_out import Difference, difference, sequences
from .recipe import Recipe
from .terminal import tell

SHARE = 5  # an average that lags behind by more than a fifth of a run is too slow for it
MOST = 10**5  # further steps, among which the number that it needs is looked for
RISE = 1.1  # without an interval, a loss that is a tenth higher than at the start got worse


class Measured(NamedTuple):
    """What was measured on the held-out sequences at the end of a run, nats a token.

    The intervals are over the sequences of this run. Another seed would give other losses.
    """

    returned: Difference | None = None  # loss of the returned model; None: not measured
    gap: Difference | None = None  # returned less live; None also where live is returned


def measured(trainer: RunTrainer, recipe: Recipe) -> Measured:
    """Losses at the end of a run with their intervals. Neither weights nor random numbers change.

    Nothing is measured where the model is in parts (FSDP), where there are too few sequences, or
    where it fails, which a line says.

    Args:
        trainer: after its training.
        recipe: of the run.
    """
    if recipe.fsdp:
        return Measured()
    try:
        return _measured(trainer, recipe)
    except InputError:  # too few
        return Measured()
    except Exception as error:  # of any model; the run has ended, and is worth more
        why = " ".join(f"{type(error).__name__}: {error}".split())
        tell(f"returned and live are compared without an interval: {why}")
        return Measured()


def _measured(trainer: RunTrainer, recipe: Recipe) -> Measured:
    model: Any = trainer.model
    names = recipe.eval_data or recipe.data_names
    held_out = sequences(trainer.eval_dataset, trainer.data_collator, recipe, names)
    halves = (held_out.choosing, held_out.reporting)
    was_training = model.training
    model.eval()
    try:
        with trainer.averaged() as differs:
            returned = [cost for half in halves for cost in half.costs(model)]
        counts = [n for half in halves for n in half.counts]
        alone = difference(returned, [0.0] * len(counts), counts)
        if not differs:
            return Measured(alone)
        with trainer.live():
            live = [cost for half in halves for cost in half.costs(model)]
    finally:
        model.train(was_training)
    return Measured(alone, difference(returned, live, counts))


class Lag(NamedTuple):
    """How far a run's average is behind its live weights."""

    steps: float  # the mean age of the iterates in it
    of: int  # steps of the run
    needed: int | None  # steps of a run in which it lags by a fifth; None: too many to say

    @classmethod
    def at(cls, rule: Averaging, steps: int) -> "Lag":
        """That of a rule after so many steps."""
        ages = rule.ages()
        now = next(age for t, age in zip(count(1), ages, strict=False) if t == steps)
        if now <= steps / SHARE:
            return cls(now, steps, steps)
        later = zip(range(steps + 1, steps + MOST), ages, strict=False)
        return cls(now, steps, next((t for t, age in later if age <= t / SHARE), None))

    @property
    def is_too_long(self) -> bool:
        """Whether it is more than a fifth of the run."""
        return self.needed != self.of

    def __str__(self) -> str:
        said = f"{self.steps:.0f} of {self.of} steps behind"
        if self.needed is None:
            return f"The average is too slow: it is {said}. Take a faster one"
        return (
            f"This run is too short for its average, which is {said}. Take a faster average, or "
            f"about {_rounded_up(self.needed)} steps"
        )


def _rounded_up(steps: int) -> int:
    """To two digits."""
    unit = 10 ** max(0, len(str(steps)) - 2)
    return -(-steps // unit) * unit


def is_worse(before: float, now: float, found: Difference | None) -> bool:
    """Whether a loss is really above that at the start: outside its interval, if it has one."""
    if found is None or math.isnan(found.low):
        return now > RISE * before
    return now > before and found.low > before


def verdict(first: dict[str, Any], last: dict[str, Any], found: Measured, lag: Lag | None) -> str:
    """What is shown of the returned model beside the start and the live weights, in one line.

    Args:
        first: the evaluation before the training.
        last: the evaluation at the end.
        found: what is known of both with an interval.
        lag: of the returned average, if there is one.
    """
    before, now = first["eval_loss"], last["eval_loss"]
    start = f"{before:.4f} nats before training"
    losses = {"live weights": last["eval_live_loss"], "returned model": now}
    lost = " and ".join(name for name, loss in losses.items() if not math.isfinite(loss))
    if lost:
        return (
            f"The training has diverged: no finite loss of {lost} ({start}). Take a lower learning "
            "rate."
        )
    worse = ""
    if is_worse(before, now, found.returned):
        worse = f"The model got worse: {start}, {now:.4f} now; lower the rate or train less. "
    if lag is None and found.gap is None and now == last["eval_live_loss"]:
        return f"{worse}The live weights are returned: the method keeps no average."
    gap = now - last["eval_live_loss"] if found.gap is None else found.gap.difference
    shown = found.gap is not None and found.gap.excludes_0
    if found.gap is None or math.isnan(found.gap.low):
        said = f"No difference shown: returned less live is {gap:.4f} nats, without an interval."
    elif shown:
        low, high = sorted(map(abs, found.gap[1:]))
        than = f"{'lower' if gap < 0 else 'higher'} than live"
        said = f"Returned {abs(gap):.4f} nats {than} (95 % interval {low:.4f} to {high:.4f})."
    else:
        said = (
            f"No difference shown: returned less live is {gap:.4f} nats (95 % interval "
            f"{found.gap.low:.4f} to {found.gap.high:.4f})."
        )
    lower = shown and gap < 0
    if lag is not None and lag.is_too_long and not lower and not worse:
        said += f" {lag}."
    return worse + said
