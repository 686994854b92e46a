"""What tables say: differences over seeds with intervals, and edges of grids."""

import csv
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text
from scipy.special import stdtr

from ..files import whole
from ..train.intervals import interval as interval

HELD = 0.05  # differences with a smaller corrected p-value are marked

# ---- differences --------------------------------------------------------------------------------


def p_value(values: Sequence[float]) -> float | None:
    """Two-sided p-value of a mean of 0: below 0.05 where `interval` leaves 0 out.

    None for fewer than two values, for equal ones, or if one is not finite.
    """
    if len(values) < 2 or not all(map(math.isfinite, values)) or not (spread := stdev(values)):
        return None
    n = len(values)
    return 2 * float(stdtr(n - 1, -abs(fmean(values)) / spread * math.sqrt(n)))


def holm(p_values: Iterable[float | None]) -> list[float | None]:
    """The p-values corrected by Holm's method, for comparisons that are picked out of many.

    The chance that any of the true null hypotheses has a corrected value below 0.05 is 5 % at most.
    A comparison without a p-value, None, is not counted.

    Source: Holm, *A simple sequentially rejective multiple test procedure* (1979).
    """
    corrected = list(p_values)
    known = sorted((p, i) for i, p in enumerate(corrected) if p is not None)
    largest = 0.0
    for rank, (p, i) in enumerate(known):
        largest = corrected[i] = max(largest, min(1.0, (len(known) - rank) * p))
    return corrected


def holds(corrected: float | None) -> bool:
    """Whether a difference with this corrected p-value is marked as one that holds."""
    return corrected is not None and corrected < HELD


DIFFERENCE = ["difference", "low", "high", "Holm p"]
INTERVAL = "difference [95 %]"  # these four in one column
BRACKETS = (
    "Brackets: 95 % intervals of Student's t of the mean paired difference, each alone. "
    "*: p < 0.05 after Holm's correction for all differences of the table."
)


def paired(losses: Mapping[int, float], baseline: Mapping[int, float]) -> list[float | None]:
    """Mean, interval and p-value of the differences of two methods' losses, paired by seed.

    Both map seeds to nats a token; the baseline is subtracted.

    Returns:
        Mean, lower end, upper end and p-value, not yet corrected; None where there is none: without
        a common seed, or if a run diverged.
    """
    pairs = [losses[seed] - baseline[seed] for seed in losses if seed in baseline]
    if not pairs or not all(map(math.isfinite, pairs)):
        return [None] * 4
    return [fmean(pairs), *(interval(pairs) or (None, None)), p_value(pairs)]


# ---- verdicts -----------------------------------------------------------------------------------

NAMED = 4  # names in a sentence; of more, their number
HOW_SHOWN = (
    "A difference is shown where p < 0.05 for the paired differences over the seeds, after Holm's "
    "correction for all pairs of methods."
)


def verdict_among(losses: Mapping[str, Mapping[int, float]]) -> str:
    """Which method's loss is shown to be the lowest, in a sentence or two.

    Differences are paired by seed and corrected for all pairs of methods, as the lowest is picked
    out of them.

    Args:
        losses: method -> seed -> nats a token; infinite after divergence.
    """
    finite = {name: own for name, own in losses.items() if all(map(math.isfinite, own.values()))}
    ranked = sorted(finite, key=lambda name: fmean(finite[name].values()))
    if len(ranked) < 2:
        if len(losses) < 2:
            return "No difference shown: there is one method."
        which = f"only {ranked[0]} ended" if ranked else "no method ended"
        return f"No difference shown: {which} without a diverged run."
    pairs = list(itertools.combinations(ranked, 2))
    found = [paired(finite[a], finite[b]) for a, b in pairs]
    corrected = dict(zip(pairs, holm(p for *_, p in found), strict=True))
    first, second, *_ = ranked
    higher = [name for name in ranked[1:] if holds(corrected[first, name])]
    level = [name for name in ranked[1:] if name not in higher]
    lost = [name for name in losses if name not in finite]
    end = ""
    if lost:
        end = f" {named(lost)} diverged with some seed, and {'are' if lost[1:] else 'is'} left out."
    if not level:
        gap = nats(fmean(finite[second].values()) - fmean(finite[first].values()))
        return f"{first} has the lowest loss, {gap} lower than {second}, the next.{end}"
    text = (
        f"No difference shown between {first}, which has the lowest mean loss, and {named(level)}"
    )
    if higher:
        return f"{text}. Its loss is lower than that of {named(higher)}.{end}"
    few = max(len(finite[a].keys() & finite[b].keys()) for a, b in pairs) < 2
    return f"{text}: one seed cannot show one.{end}" if few else f"{text}.{end}"


def verdict_against(
    baseline: str, found: Iterable[tuple[str, float | None, float | None]], what: str = "methods"
) -> str:
    """Whose loss is shown to be lower or higher than the baseline's, in a few sentences.

    Args:
        baseline: its name.
        found: of each other method its name, the mean difference (negative: its loss is lower; None
            or infinite: there is none) and the corrected p-value.
        what: they are, in the plural.
    """
    sides: dict[str, list[str]] = {"lower": [], "higher": [], "level": [], "lost": []}
    for name, gap, p in found:
        if gap is None or not math.isfinite(gap):
            sides["lost"].append(name)
        elif not holds(p):
            sides["level"].append(name)
        else:
            sides["lower" if gap < 0 else "higher"].append(f"{name} ({nats(abs(gap))})")
    texts = [
        f"{word.capitalize()} loss than {baseline}: {named(sides[word], what)}."
        for word in ("lower", "higher")
        if sides[word]
    ]
    if sides["level"]:
        to = "" if texts else f" from {baseline}"
        texts.append(f"No difference shown{to}: {named(sides['level'], what)}.")
    if sides["lost"]:
        texts.append(f"Not comparable: {named(sides['lost'], what)}.")
    return " ".join(texts) or f"No difference shown: nothing can be compared with {baseline}."


def nats(gap: float) -> str:
    """A difference, >= 0, with at least one digit that is not 0."""
    return f"{gap:.3f} nats" if gap >= 0.0005 or not gap else f"{gap:.1g} nats"


def named(names: Sequence[str], what: str = "others") -> str:
    """Names as a list in words; of many, their number."""
    if len(names) > NAMED:
        return f"{len(names)} {what}"
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


# ---- edges of grids -----------------------------------------------------------------------------

WORDS = ("name", "schedule", "base", "gain", "state")  # options whose values have no order
SHARE = (0.0, 1.0)
# Where an option's own range ends no grid goes further, so the lowest or highest value is no edge.
RANGES = {
    **dict.fromkeys(("kappa", "return_kappa", "twin_gain", "alpha", "start", "bias_power"), SHARE),
    **dict.fromkeys(("every", "window"), (1.0, math.inf)),
    "pullback": (0.0, math.inf),
}
EDGE = "edge of its grid"  # the column of a table
WIDEN = "Where an edge of the grid is named, no best was found: widen the grid."


def edges(best: Mapping[str, Any], tried: Iterable[Mapping[str, Any]]) -> str:
    """The options of a chosen setting whose value is the lowest or highest that was tried.

    Only settings with the same words count, such as those of one schedule. A c so large that nearly
    all is clipped is an edge, although a larger one would change little.

    Args:
        best: the chosen setting, values by option, as `Method.row` has them.
        tried: the settings that it was chosen from, itself among them.

    Returns:
        A text such as `lr at the top, kappa at the bottom`; empty if there is no edge.
    """
    same = [x for x in tried if all(x.get(word) == best.get(word) for word in WORDS)]
    found = []
    for option, value in best.items():
        values = {x[option] for x in same if _is_number(x.get(option))}
        if len(values) < 2 or value not in values:
            continue
        low, high = RANGES.get(option, (-math.inf, math.inf))
        if option == "pullback" and best.get("gain") == "scalar":
            low, high = SHARE
        if value == max(values) < high:
            found.append(f"{option} at the top")
        elif value == min(values) > low:
            found.append(f"{option} at the bottom")
    return ", ".join(found)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and value == value


# ---- tables -------------------------------------------------------------------------------------


class Listing(NamedTuple):
    """A table: a title, columns, and rows of texts and numbers.

    The last columns may be those of `DIFFERENCE`, and one may be `EDGE`.
    """

    title: str
    columns: list[str]
    rows: list[list[Any]]

    @classmethod
    def of_differences(cls, title: str, columns: list[str], rows: list[list[Any]]) -> "Listing":
        """A table of these columns and `DIFFERENCE`; each row ends in what `paired` gives."""
        corrected = holm(row[-1] for row in rows)
        rows = [[*row[:-1], p] for row, p in zip(rows, corrected, strict=True)]
        return cls(title, [*columns, *DIFFERENCE], rows)

    @property
    def notes(self) -> list[str]:
        """Sentences on what the marks in its cells mean."""
        found = []
        if self._has_differences and any(row[-2] is not None for row in self.rows):
            found.append(BRACKETS)
        if EDGE in self.columns and any(row[self.columns.index(EDGE)] for row in self.rows):
            found.append(WIDEN)
        return found

    @property
    def _has_differences(self) -> bool:
        return self.columns[-len(DIFFERENCE) :] == DIFFERENCE

    def shown(self, console: Console) -> Table:
        """The table for the terminal.

        Where it is too wide, the last two columns stand beside the first, and the others below it.
        """
        columns, rows = self._texts()
        wide = self._table(columns, rows)
        unbounded = console.options.update(max_width=10**4)
        if console.measure(wide, options=unbounded).maximum <= console.width or len(columns) < 4:
            return wide
        first, *middle = columns[:-2]
        stacked = []
        for name, *values in rows:
            below = zip(middle, values[:-2], strict=True)
            text = ", ".join(f"{column} {value}" for column, value in below if value)
            stacked.append([f"{name}\n{text}", *values[-2:]])
        return self._table([first, *columns[-2:]], stacked)

    def _table(self, columns: list[str], rows: list[list[str]]) -> Table:
        table = Table(title=self.title, caption="\n".join(self.notes) or None)
        for column in columns:
            first = column == columns[0]
            table.add_column(Text(column), justify="left" if first else "right", no_wrap=not first)
        for row in rows:
            table.add_row(*map(Text, row))
        return table

    def markdown(self) -> str:
        """The table as Markdown."""
        columns, rows = self._texts()
        lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
        table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
        return table + "".join(f"\n{note}\n" for note in self.notes)

    def _texts(self) -> tuple[list[str], list[list[str]]]:
        """Columns and rows with the difference in one: `-0.1000 [-0.1200, -0.0800]*`."""
        if not self._has_differences:
            return self.columns, [list(map(_cell_text, row)) for row in self.rows]
        joined = []
        for *row, middle, low, high, p in self.rows:
            text = _cell_text(middle)
            if low is not None:
                text += f" [{_cell_text(low)}, {_cell_text(high)}]{'*' if holds(p) else ''}"
            joined.append([*map(_cell_text, row), text])
        return [*self.columns[: -len(DIFFERENCE)], INTERVAL], joined

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
