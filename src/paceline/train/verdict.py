"""The verdict at the end of a run: whether the returned model has a lower loss than the live."""

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


def measured(trainer: RunTrainer, recipe: Recipe) -> Difference | None:
    """Loss of the returned model less that of the live weights, nats a token, at the end of a run.

    The interval is over the held-out sequences of this run. Another seed would give another
    difference. Neither weights nor random numbers change.

    Args:
        trainer: after its training.
        recipe: of the run.

    Returns:
        None where the live weights are returned, where the model is in parts (FSDP), where there
        are too few sequences, or where it fails, which a line says.
    """
    if recipe.fsdp:
        return None
    try:
        return _measured(trainer, recipe)
    except InputError:  # too few
        return None
    except Exception as error:  # of any model; the run has ended, and is worth more
        why = " ".join(f"{type(error).__name__}: {error}".split())
        tell(f"returned and live are compared without an interval: {why}")
        return None


def _measured(trainer: RunTrainer, recipe: Recipe) -> Difference | None:
    model: Any = trainer.model
    names = recipe.eval_data or recipe.data_names
    held_out = sequences(trainer.eval_dataset, trainer.data_collator, recipe, names)
    halves = (held_out.choosing, held_out.reporting)
    was_training = model.training
    model.eval()
    try:
        with trainer.averaged() as differs:
            if not differs:
                return None
            returned = [cost for half in halves for cost in half.costs(model)]
        with trainer.live():
            live = [cost for half in halves for cost in half.costs(model)]
    finally:
        model.train(was_training)
    return difference(returned, live, [n for half in halves for n in half.counts])


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


def verdict(last: dict[str, Any], found: Difference | None, lag: Lag | None) -> str:
    """What is shown of the returned model beside the live weights, in one line.

    Args:
        last: the evaluation at the end.
        found: returned less live, with its interval, if it is known.
        lag: of the returned average, if there is one.
    """
    if lag is None and found is None and last["eval_loss"] == last["eval_live_loss"]:
        return "The live weights are returned: the method keeps no average."
    losses = {"live weights": last["eval_live_loss"], "returned model": last["eval_loss"]}
    lost = " and ".join(name for name, loss in losses.items() if not math.isfinite(loss))
    if lost:
        return f"The training has diverged: no finite loss of {lost}. Take a lower learning rate."
    gap = last["eval_loss"] - last["eval_live_loss"] if found is None else found.difference
    shown = found is not None and found.excludes_0
    if found is None or math.isnan(found.low):
        said = f"No difference shown: returned less live is {gap:.4f} nats, without an interval."
    elif shown:
        low, high = sorted(map(abs, found[1:]))
        than = f"{'lower' if gap < 0 else 'higher'} than live"
        said = f"Returned {abs(gap):.4f} nats {than} (95 % interval {low:.4f} to {high:.4f})."
    else:
        said = (
            f"No difference shown: returned less live is {gap:.4f} nats (95 % interval "
            f"{found.low:.4f} to {found.high:.4f})."
        )
    lower = shown and gap < 0
    if lag is not None and lag.is_too_long and not lower:
        said += f" {lag}."
    return said
