"""The returned loss over the learning rate: its picture, its table, and what may be said of it."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import NullLocator
from rich import box
from rich.table import Table

from ..train.page import PHONE, looks, put_legend, save
from .statistics import interval, verdict_among

NEAR = 0.05  # nats above the lowest loss; one run is up to 0.02 away from the mean over seeds
MAX_LINES = 6
SHOWN_SHARE = 0.8  # of the losses; higher ones are marks at the top edge
LOSS = "loss of the returned model, nats a token"


@dataclass(frozen=True)
class RateCurve:
    """The returned losses of one method at each of its learning rates."""

    method: str
    losses: dict[float, dict[int, float]]  # rate, ascending -> seed -> nats; infinite: diverged

    @property
    def means(self) -> dict[float, float]:
        """The mean over the seeds at each rate; infinite where a run diverged."""
        return {lr: fmean(by_seed.values()) for lr, by_seed in self.losses.items()}

    @property
    def best(self) -> float:
        """The rate of the lowest mean."""
        return min(self.means, key=self.means.__getitem__)

    @property
    def lowest(self) -> float:
        """The lowest mean; infinite if runs diverged at every rate."""
        return min(self.means.values())

    @property
    def best_is_found(self) -> bool:
        """Whether both ends of the rates have a higher mean than the lowest."""
        return all(self.means[end] > self.lowest for end in self.ends)

    @property
    def ends(self) -> tuple[float, float]:
        """The lowest and the highest rate."""
        return min(self.losses), max(self.losses)

    def near(self, limit: float) -> list[float]:
        """The rates around the best up to the first on each side with a mean above the limit."""
        rates = list(self.means)
        first = last = rates.index(self.best)
        if self.lowest > limit:
            return []
        while first > 0 and self.means[rates[first - 1]] <= limit:
            first -= 1
        while last < len(rates) - 1 and self.means[rates[last + 1]] <= limit:
            last += 1
        return rates[first : last + 1]


def rate_picture(table: Mapping[str, Iterable[Any]], path: Path, *, label: str = LOSS) -> list[str]:
    """Draw losses over the learning rate, a line a method, to PATH.svg and PATH.png.

    Args:
        table: a data frame, or a dict of columns: `method`, `lr`, `seed`, and `loss` in nats, which
            is infinite, NaN or None where the run diverged.
        path: of both files; its ending is replaced.
        label: of the vertical axis.

    Returns:
        The sentences that the losses bear out, for the text under the picture.

    Raises:
        ValueError: a column is missing, a run is there twice, or there are fewer than two rates.
    """
    if missing := {"method", "lr", "seed", "loss"} - set(table):
        raise ValueError(f"the table has no column {', '.join(sorted(missing))}")
    losses: dict[str, dict[float, dict[int, float]]] = {}
    columns = (table[name] for name in ("method", "lr", "seed", "loss"))
    for method, lr, seed, loss in zip(*columns, strict=True):
        by_seed = losses.setdefault(str(method), {}).setdefault(float(lr), {})
        if seed in by_seed:
            raise ValueError(f"the table has {method} at lr {lr:g} with seed {seed} twice")
        by_seed[seed] = math.inf if loss is None or not math.isfinite(loss) else float(loss)
    curves = curves_of(losses)
    if len(rates_of(curves)) < 2:
        raise ValueError("a picture over the learning rate needs at least two rates")
    save(rate_figure(curves, label), path)
    return rate_sentences(curves)


def curves_of(losses: Mapping[str, Mapping[float, dict[int, float]]]) -> list[RateCurve]:
    """A curve for each method, from method -> rate -> seed -> loss."""
    return [RateCurve(method, dict(sorted(by_rate.items()))) for method, by_rate in losses.items()]


def rates_of(curves: Iterable[RateCurve]) -> list[float]:
    """All learning rates, ascending."""
    return sorted({lr for curve in curves for lr in curve.losses})


def lowest_at(curves: Iterable[RateCurve], lr: float) -> float:
    """The lowest mean loss at a learning rate."""
    return min(curve.means[lr] for curve in curves if lr in curve.means)


# ---- the picture --------------------------------------------------------------------------------


def rate_figure(curves: Sequence[RateCurve], label: str = LOSS) -> Figure:
    """Mean losses over the learning rate; vertical lines are their intervals over the seeds.

    The chart is as wide as a phone shows it well. Of more than six methods it has the lowest six.
    Runs that diverged, or ended far above the others, are hollow marks at the top edge.
    """
    look = looks([curve.method for curve in curves])
    shown = sorted(curves, key=lambda curve: curve.lowest)[:MAX_LINES]
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08)  # inches
    figure = Figure(figsize=(PHONE, 4.3 + 0.22 * len(shown)), layout=layout, dpi=150)
    axis = figure.subplots()
    top = _set_limits(axis, [mean for curve in shown for mean in curve.means.values()])
    bottom = axis.get_ylim()[0]
    lows: list[float] = []
    at_the_edge: dict[float, int] = {}  # rate -> marks
    for place, curve in enumerate(shown):
        colour, marker, dash = look[curve.method]
        style: Any = {"color": colour, "marker": marker, "ms": 7, "mec": "white", "mew": 0.8}
        rates = list(curve.means)
        line = [mean if math.isfinite(mean) else math.nan for mean in curve.means.values()]
        width = 3.0 if place == 0 else 2.0
        order = 3 + len(shown) - place  # the lowest in front
        axis.plot(rates, line, dash, lw=width, label=curve.method, zorder=order, **style)
        within = {lr: ends for lr, x in curve.losses.items() if (ends := interval([*x.values()]))}
        if within:
            low, high = zip(*within.values(), strict=True)
            axis.vlines(list(within), low, high, colors=colour, lw=1.6, alpha=0.6, zorder=2)
            lows += low
        for lr, mean in curve.means.items():
            if mean > top:
                height = 0.975 - 0.05 * at_the_edge.setdefault(lr, 0)
                at_the_edge[lr] += 1
                edge: Any = style | {"mfc": "white", "mec": colour, "mew": 1.8, "ls": "none"}
                transform = axis.get_xaxis_transform()
                axis.plot(lr, height, transform=transform, zorder=20, **edge)
    # Intervals are in view, unless few seeds make them much longer than the chart.
    axis.set_ylim(bottom=max(min([bottom, *lows]), bottom - 0.4 * (top - bottom)))
    rates = rates_of(curves)
    every = 1 + len(rates) // 8
    axis.set_xscale("log")
    axis.set_xticks(rates, ["" if i % every else f"{lr:g}" for i, lr in enumerate(rates)])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel("learning rate", fontsize=12)
    axis.set_ylabel(label, fontsize=12)
    axis.tick_params(labelsize=11.5)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
    handles, names = axis.get_legend_handles_labels()
    put_legend(figure, dict(zip(names, handles, strict=True)))
    notes = [f"the lowest {MAX_LINES} of {len(curves)} methods"] if len(curves) > MAX_LINES else []
    notes += ["hollow: above the chart, or diverged"] if at_the_edge else []
    axis.set_title("\n".join(notes), fontsize=10.5, color="#5a6572", loc="right")
    return figure


def _set_limits(axis: Any, means: Iterable[float]) -> float:
    """Show the lower losses, so that their differences are seen; returns the highest in view."""
    finite = [mean for mean in means if math.isfinite(mean)]
    if not finite:
        axis.set_ylim(0, 1)
        axis.set_yticks([])
        return 1.0
    low, high, most = min(finite), max(finite), float(np.quantile(finite, SHOWN_SHARE))
    top = most if high - low > 1.5 * (most - low) else high
    margin = 0.06 * (top - low) or 0.05
    axis.set_ylim(low - margin, top + 2 * margin)
    return top + margin


# ---- the table ----------------------------------------------------------------------------------


def rate_table(curves: Sequence[RateCurve]) -> Table:
    """Methods down, learning rates across; the lowest loss of each rate has a star."""
    title = "Loss of the returned model by learning rate, nats a token; *: the lowest"
    table = Table(title=title, box=box.SIMPLE_HEAD)
    table.add_column("method")
    for lr in rates_of(curves):
        table.add_column(f"{lr:g} ", justify="right")
    for curve in curves:
        cells = dict.fromkeys(rates_of(curves), "")
        for lr, by_seed in curve.losses.items():
            lowest = curve.means[lr] == lowest_at(curves, lr) < math.inf
            mean, *spread = show_loss(by_seed.values()).split(" ")
            text = f"[bold]{mean}*[/]" if lowest else f"{mean} "
            cells[lr] = "\n".join([text, *(f"{part} " for part in spread)])
        table.add_row(curve.method, *cells.values())
    return table


def show_loss(losses: Iterable[float]) -> str:
    """The mean over seeds, with half the width of its 95 % interval; or `diverged`."""
    values = list(losses)
    if not all(map(math.isfinite, values)):
        return "diverged"
    ends = interval(values)
    return f"{fmean(values):.3f}" + (f" ±{(ends[1] - ends[0]) / 2:.3f}" if ends else "")


# ---- in words -----------------------------------------------------------------------------------


def show_difference(mine: Mapping[int, float], its: Mapping[int, float], name: str) -> str:
    """Losses relative to those of the method with this name, paired by seed."""
    pairs = [mine[seed] - its[seed] for seed in mine if seed in its]
    if not pairs:
        return f"not comparable with {name}, which has no seed in common"
    if not all(map(math.isfinite, pairs)):
        return f"not comparable with {name}, as a run diverged"
    mean, ends = fmean(pairs), interval(pairs)
    if all(abs(pair) < 0.0005 for pair in pairs):
        return f"equal to that of {name}"
    if abs(mean) < 0.0005:
        said = "" if ends is None else f" (95 % interval {ends[0]:+.3f} to {ends[1]:+.3f})"
        return f"level with {name} on average{said}"
    word = "lower" if mean < 0 else "higher"
    text = f"{abs(mean):.3f} nats {word} than {name}"
    if ends is None:
        return f"{text} (one seed: no interval)"
    seeds = f"{word} in {sum(pair * mean > 0 for pair in pairs)} of {len(pairs)} seeds"
    chance = ", so it may be chance" if ends[0] <= 0 <= ends[1] else ""
    return f"{text} (95 % interval {ends[0]:+.3f} to {ends[1]:+.3f}, {seeds}{chance})"


def headline(curves: Sequence[RateCurve]) -> str:
    """The verdict in a sentence or two: which method is shown to have the lowest loss, if any.

    Methods are compared at their best rates; only those count whose best lies inside the rates
    tried. Where each was run at one rate, they are compared at these.
    """
    fixed = all(len(curve.losses) == 1 for curve in curves)
    if len(curves) < 2 or fixed:
        return verdict_among({curve.method: curve.losses[curve.best] for curve in curves})
    inside = [x for x in curves if x.best_is_found and math.isfinite(x.lowest)]
    if len(inside) < 2:
        what = f"only {inside[0].method} has" if inside else "no method has"
        return f"No difference shown: {what} a best rate inside the rates tried. Widen the rates."
    text = verdict_among({curve.method: curve.losses[curve.best] for curve in inside})
    left_out = len(curves) - len(inside)
    which = f"; {left_out} without one inside the rates tried are left out" if left_out else ""
    return f"{text} Each method is at its best rate, chosen on these same losses{which}."


def rate_sentences(curves: Sequence[RateCurve]) -> list[str]:
    """What the losses bear out: who is lowest at its best rate, and over which rates it is near.

    A best rate counts only if a lower and a higher rate were tried and have higher losses.
    """
    fixed = all(len(curve.losses) == 1 for curve in curves)  # by the methods' own texts
    finite = sorted((c for c in curves if math.isfinite(c.lowest)), key=lambda curve: curve.lowest)
    found = [curve for curve in finite if curve.best_is_found or fixed]
    open_ended = [curve for curve in finite if curve not in found]
    sentences = []
    if len(found) > 1:
        first, second = found[:2]
        other = f"{second.method} at {second.best:g}"
        lead = show_difference(first.losses[first.best], second.losses[second.best], other)
        which = "own" if fixed else "best"
        among = (
            f"Of the {len(found)} methods with a best rate inside the rates tried, {first.method}"
            if open_ended
            else f"Each at its {which} rate, {first.method}"
        )
        loss = show_loss(first.losses[first.best].values())
        sentences.append(f"{among} has the lowest loss: {loss} at {first.best:g}, {lead}.")
    if found and not fixed:
        sentences.append("The best rates were chosen on these same losses.")
    for curve in open_ended:
        if len(curve.losses) == 1:
            text = f"{curve.method} was run at one rate, {curve.best:g}, so its best is not known."
        else:
            end = "lowest" if curve.best == curve.ends[0] else "highest"
            text = (
                f"No best was found for {curve.method}, which is lowest at the {end} rate, "
                f"{curve.best:g}: widen the rates."
            )
        sentences.append(text)
    if len(curves) > 1:
        sentences += _lowest_by_rate(curves)
    if len(curves) > 1 and not fixed:
        sentences += _how_wide(curves)
    for curve in curves:
        where: dict[str, list[float]] = {}
        for lr, by_seed in curve.losses.items():
            if how := diverged(by_seed):
                where.setdefault(how, []).append(lr)
        for how, lost in where.items():
            at = "every rate" if len(lost) == len(curve.losses) > 1 else _listed(lost)
            sentences.append(f"{curve.method} {how} at {at}.")
    return sentences


def diverged(losses: Mapping[int, float]) -> str:
    """`diverged`, with how many of the seeds if not all did; empty if none did."""
    lost = sum(not math.isfinite(loss) for loss in losses.values())
    if 0 < lost < len(losses):
        return f"diverged in {lost} of {len(losses)} seeds"
    return "diverged" if lost else ""


def _lowest_by_rate(curves: Sequence[RateCurve]) -> list[str]:
    """The methods with the lowest loss at each rate at which there are several."""
    where: dict[str, list[float]] = {}
    for lr in rates_of(curves):
        here = [curve for curve in curves if lr in curve.means]
        lowest = lowest_at(here, lr)
        if len(here) > 1 and math.isfinite(lowest):
            methods = " and ".join(x.method for x in here if x.means[lr] == lowest)
            where.setdefault(methods, []).append(lr)
    parts = [f"{method} at {_listed(rates)}" for method, rates in where.items()]
    return [f"The lowest loss at each rate: {', '.join(parts)}."] if parts else []


def _how_wide(curves: Sequence[RateCurve]) -> list[str]:
    """Over which rates each method stays near the lowest loss of all."""
    lowest = min(curve.lowest for curve in curves)
    if not math.isfinite(lowest):
        return []
    parts, nowhere = [], []
    for curve in sorted(curves, key=lambda curve: curve.lowest):
        near = curve.near(lowest + NEAR)
        if not near:
            nowhere.append(curve.method)
        elif len(near) == 1:
            parts.append(f"{curve.method} at {near[0]:g} alone")
        else:
            # At an end of the rates it may go on.
            less = " or less" if near[0] == curve.ends[0] else ""
            more = " or more" if near[-1] == curve.ends[1] else ""
            factor = f"a factor of {near[-1] / near[0]:.3g}"
            parts.append(f"{curve.method} from {near[0]:g}{less} to {near[-1]:g}{more}, {factor}")
    parts += [f"{method} nowhere" for method in nowhere]
    return [f"Within {NEAR:g} nats of the lowest loss, {lowest:.3f}: {'; '.join(parts)}."]


def _listed(rates: Sequence[float]) -> str:
    *others, last = [f"{lr:g}" for lr in rates]
    return f"{', '.join(others)} and {last}" if others else last
