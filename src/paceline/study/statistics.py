"""What differences over seeds say, and tables of it."""

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

EXACT = 5  # seeds, up to which all resamples are looked at
RESAMPLES = 10_000


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float] | None:
    """Percentile bootstrap interval of the mean.

    Of up to five values all nⁿ resamples are taken, so that it is exact; of more, 10,000 drawn with
    a fixed seed. It is honest about few values only in so far as it cannot leave their range.

    Args:
        values: paired differences, say, one a seed.
        level: share of the resamples' means inside, in (0, 1).

    Returns:
        Its ends; None for fewer than two values, or where one is not finite.

    Source: Efron, *Bootstrap methods: another look at the jackknife* (1979).
    """
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    n = len(values)
    if n <= EXACT:
        means = np.array(list(itertools.product(values, repeat=n))).mean(axis=1)
    else:
        means = np.random.default_rng(0).choice(values, (RESAMPLES, n)).mean(axis=1)
    # Means that occur, not points between them: with few values those would be too narrow.
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf")
    return float(low), float(high)


class Listing(NamedTuple):
    """A table: a title, columns, and rows of texts and numbers."""

    title: str
    columns: list[str]
    rows: list[list[Any]]

    def shown(self) -> Table:
        """For the terminal."""
        columns, rows = self._texts()
        table = Table(title=self.title)
        for column in columns:
            justify: Any = "left" if column == columns[0] else "right"
            table.add_column(column, justify=justify, no_wrap=column == INTERVAL)
        for row in rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """For a page."""
        columns, rows = self._texts()
        lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)

    def _texts(self) -> tuple[list[str], list[list[str]]]:
        """Columns and rows, a difference and its interval in one: `-0.1000 [-0.1200, -0.0800]`."""
        rows = [list(map(_short, row)) for row in self.rows]
        if self.columns[-3:] != DIFFERENCE:
            return self.columns, rows
        joined = [
            [*row, f"{middle} [{low}, {high}]" if low else middle]
            for *row, middle, low, high in rows
        ]
        return [*self.columns[:-3], INTERVAL], joined

    def write(self, path: Path) -> None:
        """As CSV, all digits."""
        with (
            whole(path, shared=True) as partial,
            partial.open("w", newline="", encoding="utf-8") as file,
        ):
            csv.writer(file, lineterminator="\n").writerows([self.columns, *self.rows])


def _short(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if isinstance(value, float) else str(value)


DIFFERENCE = ["difference", "low", "high"]
INTERVAL = "difference [95 %]"  # the three in one


def paired(losses: Mapping[int, float], baseline: Mapping[int, float]) -> list[float | None]:
    """Mean and interval of paired differences of losses (seed -> nats) over the seeds of both.

    None where there are none, or where one diverged.
    """
    pairs = [losses[seed] - baseline[seed] for seed in losses if seed in baseline]
    if not pairs or not all(map(math.isfinite, pairs)):
        return [None, None, None]
    return [fmean(pairs), *(interval(pairs) or (None, None))]
