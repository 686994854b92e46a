"""The report of a comparison: in the terminal, as pictures, and as a page without network."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, FigureBase
from matplotlib.lines import Line2D
from rich.console import Console
from rich.table import Table

from ..defaults import AUTO
from ..train.folder import REPORT
from ..train.methods import Method, all_options, beside_the_pull, method_of_row
from ..train.page import (
    PHONE,
    Look,
    LossCurve,
    coinciding,
    draw_differences,
    draw_losses,
    handle,
    late_limits,
    looks,
    name_of,
    put_legend,
    render,
    save,
    settings,
    shown,
    svg,
)
from .rates import (
    RateCurve,
    curves_of,
    diverged,
    headline,
    lowest_at,
    rate_figure,
    rate_sentences,
    rate_table,
    rates_of,
    show_difference,
    show_loss,
)
from .runs import loss_of
from .statistics import HOW_SHOWN

PANELS = 3  # beside each other, of the curves
OPTIONS = [name for name in all_options() if name != "lr"]


@dataclass
class Results:
    """The results of a comparison: one row for each evaluation of each finished run."""

    total_runs: int
    rows: list[dict[str, Any]] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)  # run: reason
    interrupted: bool = False

    def final(self) -> "FinalTable":
        """Final losses: method label -> learning rate -> one row a seed.

        If every method finished some of the seeds, others are left out, so that means compare.
        """
        last = {row["run"]: row for row in self.rows}  # rows of a run are in order of steps
        cells: FinalTable = {}
        for row in last.values():
            cell = cells.setdefault(row["label"], {}).setdefault(row["lr"], FinalLosses({}))
            cell.rows[row["seed"]] = row
        every = [cell for by_rate in cells.values() for cell in by_rate.values()]
        common = set.intersection(*(set(cell.rows) for cell in every)) if every else set()
        if common:
            for cell in every:
                for seed in cell.rows.keys() - common:
                    del cell.rows[seed]
        return cells

    def curves(self) -> list[RateCurve]:
        """The returned losses of each method at the end, by learning rate."""
        cells = self.final()
        return curves_of({x: {lr: c.losses() for lr, c in cells[x].items()} for x in cells})


class FinalLosses(NamedTuple):
    """The last row of each seed's run, of one method at one learning rate."""

    rows: dict[int, dict[str, Any]]

    @property
    def first(self) -> dict[str, Any]:
        """A row, for the values that all rows share."""
        return next(iter(self.rows.values()))

    @property
    def method(self) -> Method:
        """The method."""
        return method_of_row(self.first)

    def losses(self, which: str = "returned") -> dict[int, float]:
        """The `live` or `returned` loss of each seed, nats a token; infinite after divergence."""
        return {seed: loss_of(row, which) for seed, row in self.rows.items()}

    def mean(self, which: str = "returned") -> float:
        """Mean loss over the seeds, nats a token."""
        return fmean(self.losses(which).values())

    def show(self, which: str = "returned") -> str:
        """The mean, with half its interval over several seeds; or `diverged`."""
        return show_loss(self.losses(which).values())


FinalTable = dict[str, dict[float, FinalLosses]]


def write_report(
    results: Results, manifest: dict[str, Any], folder: Path, console: Console
) -> None:
    """Print the table and its sentences; write curves.png and report.html into the folder."""
    finished = len({row["run"] for row in results.rows})
    if results.interrupted:
        console.print(f"Interrupted: {finished} of {results.total_runs} runs were finished.")
    for reason in dict.fromkeys(results.failed.values()):
        names = [name for name, why in results.failed.items() if why == reason]
        console.print(f"Failed: {', '.join(names)}: {reason}", style="red", markup=False)
    if not finished:
        console.print("No run was finished, so there is no report.")
        return
    cells, curves, sentences = results.final(), results.curves(), verdict(results)
    rates, said = rates_of(curves), headline(curves)
    several = len(rates) > 1
    console.print(rate_table(curves) if several else _loss_table(cells, curves))
    console.print(f"{said}\n", style="bold", highlight=False, markup=False)
    for sentence in sentences:
        console.print(f"• {sentence}", highlight=False, markup=False)
    charts = Charts(results)
    FigureCanvasAgg(charts.all()).print_png(str(folder / "curves.png"))
    if several:
        save(rate_figure(curves), folder / "rates.svg")
    methods = {label: next(iter(by_rate.values())).method.row for label, by_rate in cells.items()}
    render(
        folder / REPORT,
        "paceline.study",
        "report.html.j2",
        name=name_of(folder),
        headline=said,
        how_shown=HOW_SHOWN if len(cells) > 1 else "",
        sentences=sentences,
        cells=cells,
        rates=rates,
        lowest={lr: lowest_at(curves, lr) for lr in rates},
        seeds=max(len(cell.rows) for by_rate in cells.values() for cell in by_rate.values()),
        picture=svg(rate_figure(curves)) if several else None,
        charts=[(lr, svg(charts.at(lr))) for lr in rates],
        legend=svg(charts.legend()),
        with_difference=bool(charts.differing),
        methods={label: {k: shown(x) for k, x in row.items()} for label, row in methods.items()},
        options=[k for k in OPTIONS if any(row[k] is not None for row in methods.values())],
        settings=settings({**manifest["configuration"], "steps taken": manifest.get("steps")}),
        manifest=manifest,
        results=results,
        finished=finished,
    )
    if several:
        console.print(f"\nPicture: {folder / 'rates.png'}", highlight=False, markup=False)
    console.print(f"Report: {folder / 'report.html'}", highlight=False, markup=False)


def _loss_table(cells: FinalTable, curves: Sequence[RateCurve]) -> Table:
    """Live and returned losses at the one learning rate."""
    (lr,) = rates_of(curves)
    table = Table(title="Validation loss, nats a token: live weights → returned model")
    table.add_column("method")
    table.add_column(f"lr {lr:g}", justify="right")
    for label, by_rate in cells.items():
        cell = by_rate[lr]
        lowest = cell.mean() == lowest_at(curves, lr) < math.inf
        returned = f"[bold]{cell.show()}[/]" if lowest else cell.show()
        table.add_row(label, f"{cell.show('live').split(' ')[0]} → {returned}")
    return table


# ---- in words -----------------------------------------------------------------------------------


def verdict(results: Results) -> list[str]:
    """Sentences on which method has the lowest loss, by how much, and over how many seeds."""
    cells, curves = results.final(), results.curves()
    rates = rates_of(curves)
    sentences = rate_sentences(curves) if len(rates) > 1 else _at_one_rate(cells, *rates)
    for lr in rates:
        here = {label: by_rate[lr] for label, by_rate in cells.items() if lr in by_rate}
        for label, cell in here.items():
            if cell.first["name"] == "pace" and math.isfinite(cell.mean()):
                sentences += _about_the_pull(label, cell, here, lr)
    seeds = [set(cell.rows) for by_rate in cells.values() for cell in by_rate.values()]
    every = {row["seed"] for row in results.rows}
    if not set.intersection(*seeds):
        sentences.append("No seed was finished by all methods, so their means do not compare.")
    elif max(map(len, seeds)) == 1 and len(seeds) > 1:
        more = "; give --seeds 0,1,2" if len(every) == 1 and not results.interrupted else ""
        sentences.append(f"Small differences of one seed may be chance{more}.")
    elif len(seeds) > 2 and any("95 % interval" in sentence for sentence in sentences):
        sentences.append(
            "Each interval is for its difference alone: which method has the lowest loss was not "
            "known before."
        )
    used = set.union(*seeds)
    if used < every:
        sentences.append(
            f"Losses are those of seed {', '.join(map(str, sorted(used)))}, which every method "
            "finished. The curves and metrics.jsonl have the other finished runs too."
        )
    return sentences


def _at_one_rate(cells: FinalTable, lr: float) -> list[str]:
    """The returned model with the lowest loss, its lead over the next, and what diverged."""
    here = {label: by_rate[lr] for label, by_rate in cells.items()}
    ranked = sorted(here, key=lambda label: here[label].mean())
    lost = {label: how for label in here if (how := diverged(here[label].losses()))}
    sentences = [f"At learning rate {lr:g} {label} {how}." for label, how in lost.items()]
    if len(here) > len(lost) and len(here) > 1:
        first, second = (here[label] for label in ranked[:2])
        lead = show_difference(first.losses(), second.losses(), ranked[1])
        sentences.insert(
            0,
            f"At learning rate {lr:g} {ranked[0]} has the lowest loss: {first.show()}, {lead}.",
        )
    return sentences


def _about_the_pull(
    label: str, cell: FinalLosses, here: dict[str, FinalLosses], lr: float
) -> list[str]:
    """Sentences on PACE against the EMA without its pull, and against its twins."""
    sentences = []
    pace = cell.method
    if not pace.pulls:
        return []
    for other, its in here.items():
        if its.first["name"] != "ema":
            continue
        ema = its.method
        differing = beside_the_pull(pace, ema)
        # The ε that the pull amounts to where it is not clipped; see docs/theory.md.
        with_unit = pace.get("pullback") != AUTO and pace.get("gain") in (None, "adam")
        amounts_to = (pace.get("eps") or 1e-8) + lr * (
            pace.get("pullback") if with_unit else math.nan
        )
        if not differing:
            against = "the same average without the pull"
        elif differing == {"eps"} and math.isclose(
            ema.get("eps") or 1e-8, amounts_to, rel_tol=0.01
        ):
            against = "the ε that its pull amounts to"
        elif differing == {"schedule", "twin_gain"} and (
            (ema.schedule, pace.schedule) == ("twin", "constant")
        ):
            against = f"the schedule of a gain of {ema.twin_gain:g}"
        else:
            continue
        loss = show_difference(cell.losses(), its.losses(), other)
        at = f"At learning rate {lr:g}, against {against}"
        sentences.append(f"{at}, the loss of {label} is {loss}.")
    ends = [row for row in cell.rows.values() if row.get("gain_mean") is not None]
    if sentences and ends and not pace.is_saturated:  # whose gain is 1
        gain, clipped = (fmean(row[name] for row in ends) for name in ("gain_mean", "clipped"))
        hardly = " It hardly pulls then." if gain < 0.005 else ""
        sentences.append(
            f"At learning rate {lr:g}, the mean gain of {label} at the end is {gain:.2f}, and "
            f"{clipped:.1%} of the coordinates are clipped.{hardly}"
        )
    return sentences


# ---- as curves ----------------------------------------------------------------------------------


class Charts:
    """Loss against steps, a chart a learning rate, all in the same looks and limits."""

    def __init__(self, results: Results) -> None:
        rows = results.rows
        self.looks = looks(list(dict.fromkeys(row["label"] for row in rows)))
        self.rates = rates_of(results.curves())
        late = [row for row in rows if row["step"] >= max(row["step"] for row in rows) / 4]
        self.limits = late_limits(loss_of(r, which) for r in late for which in ("live", "returned"))
        self.curves = {
            lr: list(self._curves([r for r in rows if r["lr"] == lr])) for lr in self.rates
        }
        self.differing = {
            lr: found for lr in self.rates if (found := coinciding(self.curves[lr], self.limits))
        }

    def _curves(self, rows: list[dict[str, Any]]) -> Iterator[LossCurve]:
        trainings: set[str] = set()  # those whose live weights are drawn
        for label, look in self.looks.items():
            own = [row for row in rows if row["label"] == label]
            live = {row["trained_with"] for row in own}
            if own:
                yield _curve(own, look, with_live=not live <= trainings)
            trainings |= live

    def at(self, lr: float) -> Figure:
        """The chart of one learning rate, without a legend."""
        figure = Figure(figsize=(PHONE, 3.4 + 1.4 * (lr in self.differing)), layout="constrained")
        self._draw(figure, lr)
        return figure

    def legend(self) -> Figure:
        """The legend of all charts."""
        handles = self._handles()
        figure = Figure(figsize=(PHONE, 0.3 + 0.24 * len(handles)), layout="constrained")
        put_legend(figure, handles)
        return figure

    def all(self) -> Figure:
        """All charts, PANELS beside each other, and the legend below them."""
        columns = min(len(self.rates), PANELS)
        lines = math.ceil(len(self.rates) / columns)
        height = 3.4 + 1.4 * bool(self.differing)
        size = (PHONE * columns, height * lines + 0.3 + 0.24 * len(self.looks))
        figure = Figure(figsize=size, layout="constrained", dpi=150)
        parts = figure.subfigures(lines, columns, squeeze=False).flatten()
        for part, lr in zip(parts, self.rates, strict=False):
            self._draw(part, lr)
        put_legend(figure, self._handles())
        return figure

    def _handles(self) -> dict[str, Line2D]:
        handles = {label: handle(look) for label, look in self.looks.items()}
        if any(list(x.live) != list(x.returned) for own in self.curves.values() for x in own):
            handles["live weights"] = handle(Look("#5a6572", "", ""), live=True)
        return handles

    def _draw(self, figure: FigureBase, lr: float) -> None:
        heights = [2.8, *[1.4] * (lr in self.differing)]
        axes = figure.subplots(
            len(heights), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights}
        )[:, 0]
        draw_losses(axes[0], self.curves[lr], self.limits)
        axes[0].set_title(f"learning rate {lr:g}", fontsize=11)
        if lr in self.differing:
            draw_differences(axes[1], self.differing[lr])
        axes[-1].set_xlabel("step", fontsize=11)


def _curve(rows: list[dict[str, Any]], look: Look, *, with_live: bool) -> LossCurve:
    """The means of a method over its seeds, and the range of its returned losses."""
    steps = sorted({row["step"] for row in rows})

    def losses(which: str) -> list[list[float]]:
        return [[loss_of(row, which) for row in rows if row["step"] == step] for step in steps]

    returned, live = losses("returned"), losses("live")
    several = any(len(group) > 1 for group in returned)
    return LossCurve(
        look,
        steps,
        list(map(fmean, live)),
        list(map(fmean, returned)),
        low=list(map(min, returned)) if several else (),
        high=list(map(max, returned)) if several else (),
        with_live=with_live,
    )
