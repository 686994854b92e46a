"""Intervals of differences over seeds, and tables."""

import csv
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from ..files import whole

EXACT = 5  # seeds; up to so many, all resamples are taken
RESAMPLES = 10_000


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float] | None:
    """Percentile bootstrap interval of the mean.

    Up to five values it is exact: all nⁿ resamples are taken. Of more values, 10,000 resamples are
    drawn with a fixed seed. With few values it is too narrow, since it cannot leave their range.

    Args:
        values: one a seed, such as paired differences.
        level: share of the resamples' means that lie inside, in (0, 1).

    Returns:
        The ends of the interval; None for fewer than two values, or if one is not finite.

    Source: Efron, *Bootstrap methods: another look at the jackknife* (1979).
    """
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    n = len(values)
    if n <= EXACT:
        means = np.array(list(itertools.product(values, repeat=n))).mean(axis=1)
    else:
        means = np.random.default_rng(0).choice(values, (RESAMPLES, n)).mean(axis=1)
    # Interpolated quantiles of few values would be narrower still.
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf")
    return float(low), float(high)


class Listing(NamedTuple):
    """A table: a title, columns, and rows of texts and numbers."""

    title: str
    columns: list[str]
    rows: list[list[Any]]

    def shown(self) -> Table:
        """The table for the terminal."""
        columns, rows = self._texts()
        table = Table(title=self.title)
        for column in columns:
            justify: Any = "left" if column == columns[0] else "right"
            table.add_column(column, justify=justify, no_wrap=column == INTERVAL)
        for row in rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """The table as Markdown."""
        columns, rows = self._texts()
        lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)

    def _texts(self) -> tuple[list[str], list[list[str]]]:
        """Columns and rows with difference and interval in one: `-0.1000 [-0.1200, -0.0800]`."""
        rows = [list(map(_cell_text, row)) for row in self.rows]
        if self.columns[-3:] != DIFFERENCE:
            return self.columns, rows
        joined = [
            [*row, f"{middle} [{low}, {high}]" if low else middle]
            for *row, middle, low, high in rows
        ]
        return [*self.columns[:-3], INTERVAL], joined

    def write(self, path: Path) -> None:
        """Write a CSV file with all digits."""
        with (
            whole(path) as partial,
            partial.open("w", newline="", encoding="utf-8") as file,
        ):
            csv.writer(file, lineterminator="\n").writerows([self.columns, *self.rows])


def _cell_text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if isinstance(value, float) else str(value)


DIFFERENCE = ["difference", "low", "high"]
INTERVAL = "difference [95 %]"  # these three in one column


def paired(losses: Mapping[int, float], baseline: Mapping[int, float]) -> list[float | None]:
    """Mean and interval of the differences of two methods' losses, paired by seed.

    Both map seeds to nats a token; the baseline is subtracted.

    Returns:
        Mean, lower end and upper end; None without a common seed, or if a run diverged.
    """
    pairs = [losses[seed] - baseline[seed] for seed in losses if seed in baseline]
    if not pairs or not all(map(math.isfinite, pairs)):
        return [None, None, None]
    return [fmean(pairs), *(interval(pairs) or (None, None))]
