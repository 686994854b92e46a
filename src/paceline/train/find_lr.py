"""A learning rate from one short run over rising rates, `paceline train --find-lr`.

The rate of step k of K rises from a low to a high one in equal factors. The loss of the steps falls
while they are small, and rises where they are too large. The suggestion is the rate at which the
loss, smoothed over some three tenths of a decade to each side, is lowest.

Source: rising rates are Smith's, *Cyclical Learning Rates* (2015, arXiv:1506.01186). That the
lowest loss is near the best rate of a saturated pull, and above that of AdamW, was found by trying.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from rich.console import Console
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from . import InputError
from .build import Prepared, RunTrainer, build_fitting
from .recipe import Recipe
from .terminal import say

LOWEST, HIGHEST, STEPS = 1e-5, 1.0, 125
WIDTH = 0.3  # decades; standard deviation of the weights that losses are smoothed with


def rising_rates(steps: int = STEPS) -> list[float]:
    """The learning rate of each step, from 1e-5 to below 1 in equal factors."""
    return [LOWEST * (HIGHEST / LOWEST) ** (k / steps) for k in range(steps)]


def suggested_rate(rates: Sequence[float], losses: Sequence[float]) -> float | None:
    """The rate at which the smoothed loss of a run over rising rates is lowest.

    Args:
        rates: learning rates of the steps, > 0 and rising.
        losses: training loss of each step, taken before it; those that are not finite, or more than
            twice the first, count as twice the first.

    Returns:
        The rate; None if it is the lowest or the highest of all, where no best was found.
    """
    x, y = np.log10(rates), np.asarray(losses, dtype=np.float64)
    y = np.where(np.isfinite(y), np.minimum(y, 2 * y[0]), 2 * y[0])
    weights = np.exp(-0.5 * ((x[:, None] - x) / WIDTH) ** 2)
    best = int((weights @ y / weights.sum(axis=1)).argmin())
    return None if best in (0, len(x) - 1) else float(f"{math.pow(10, x[best]):.2g}")


class RisingTrainer(RunTrainer):
    """Trains a recipe's method for a few steps at rising rates, and measures nothing else."""

    def create_scheduler(
        self, num_training_steps: int, optimizer: Optimizer | None = None
    ) -> LambdaLR:
        """The rising rates in place of the method's schedule."""
        if self.lr_scheduler is None:
            made: Any = optimizer or self.optimizer
            rates, base = rising_rates(num_training_steps), self.method.lr
            # The scheduler asks for one more than the steps.
            self.lr_scheduler = LambdaLR(made, lambda k: rates[min(k, len(rates) - 1)] / base)
        return self.lr_scheduler


def with_found_rate(recipe: Recipe, console: Console) -> tuple[Recipe, Prepared]:
    """The recipe with the learning rate that a short run over rising rates suggests; and its data.

    The run has the recipe's model, data, batches, method and seed, and leaves nothing behind.

    Raises:
        InputError: the method has a rate of its own, or no lowest loss was found inside the rates.
    """
    if recipe.parsed.lr != recipe.lr:
        raise InputError(f"find_lr: {recipe.method!r} has a rate of its own; leave its lr out")
    short: dict[str, Any] = {"steps": STEPS, "epochs": None, "tokens": None, "warmup": 0.0}
    short |= {"log_every": 1, "report_to": ("none",), "snapshots": 0, "choose": False}
    say(console, f"Looking for a learning rate: {STEPS} steps from {LOWEST:g} to {HIGHEST:g}.")
    with TemporaryDirectory() as scratch:
        fitting, trainer = build_fitting(
            Recipe(**{**recipe.model_dump(), **short}), Path(scratch), RisingTrainer
        )
        trainer.args.eval_strategy = IntervalStrategy.NO
        trainer.args.save_strategy = SaveStrategy.NO
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    rate = suggested_rate(rising_rates(), losses)
    if rate is None:
        raise InputError(
            f"find_lr: the loss was lowest at an end of the rates from {LOWEST:g} to {HIGHEST:g}; "
            "give --lr"
        )
    say(console, f"Learning rate {rate:g}: there the loss of the short run was lowest.")
    data = Prepared(trainer.train_dataset, trainer.eval_dataset, trainer.processing_class)
    fits = {key: getattr(fitting, key) for key in ("batch", "micro_batch", "context")}
    return Recipe(**{**recipe.model_dump(), **fits, "lr": rate}), data
