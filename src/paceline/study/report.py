"""The report of a comparison: in the terminal, as curves, and as a page without network."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from ..auto import AUTO
from ..train.folder import REPORT
from ..train.page import COLOURS, render, svg
from .runs import loss_of
from .statistics import edges, interval

LINE_STYLES = ("-", "--", ":")


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


class FinalLosses(NamedTuple):
    """The last row of each seed's run, of one method at one learning rate."""

    rows: dict[int, dict[str, Any]]

    def losses(self, which: str = "returned") -> dict[int, float]:
        """The `live` or `returned` loss of each seed, nats a token; infinite after divergence."""
        return {seed: loss_of(row, which) for seed, row in self.rows.items()}

    def mean(self, which: str = "returned") -> float:
        """Mean loss over the seeds, nats a token."""
        return fmean(self.losses(which).values())

    def show(self, which: str = "returned") -> str:
        """The mean, with half the range over several seeds; or `diverged`."""
        losses = self.losses(which).values()
        if not math.isfinite(self.mean(which)):
            return "diverged"
        spread = f" ±{(max(losses) - min(losses)) / 2:.3f}" if len(losses) > 1 else ""
        return f"{self.mean(which):.3f}{spread}"


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
    cells = results.final()
    sentences = verdict(results)
    console.print(_loss_table(cells))
    for sentence in sentences:
        console.print(f"• {sentence}", highlight=False, markup=False)
    figure = draw_curves(results)
    FigureCanvasAgg(figure).print_png(str(folder / "curves.png"))
    render(
        folder / REPORT,
        "paceline.study",
        "report.html.j2",
        cells=cells,
        rates=rates(cells),
        best={lr: best_at(cells, lr) for lr in rates(cells)},
        sentences=sentences,
        svg=svg(figure),
        manifest=manifest,
        results=results,
        finished=finished,
    )
    console.print(f"\nReport: {folder / 'report.html'}", highlight=False, markup=False)


def rates(cells: FinalTable) -> list[float]:
    """All learning rates, ascending."""
    return sorted({lr for by_rate in cells.values() for lr in by_rate})


def best_at(cells: FinalTable, lr: float) -> float:
    """The lowest mean loss of a returned model at a learning rate."""
    return min(by_rate[lr].mean() for by_rate in cells.values() if lr in by_rate)


def _loss_table(cells: FinalTable) -> Table:
    table = Table(title="Validation loss, nats a token: live weights → returned model")
    table.add_column("method")
    for lr in rates(cells):
        table.add_column(f"lr {lr:g}", justify="right")
    for label, by_rate in cells.items():
        row = dict.fromkeys(rates(cells), "")
        for lr, cell in by_rate.items():
            best = cell.mean() == best_at(cells, lr)
            returned = f"[bold]{cell.show()}[/]" if best else cell.show()
            row[lr] = f"{cell.show('live').split(' ')[0]} → {returned}"
        table.add_row(label, *row.values())
    return table


# ---- in words -----------------------------------------------------------------------------------


def verdict(results: Results) -> list[str]:
    """Sentences on which method has the lowest loss, by how much, and over how many seeds."""
    cells = results.final()
    sentences = []
    for lr in rates(cells):
        here = {label: by_rate[lr] for label, by_rate in cells.items() if lr in by_rate}
        if len(here) > 1:
            sentences.append(f"At learning rate {lr:g}: {_winner(here)}")
        for label, cell in here.items():
            if cell.mean() == math.inf:
                sentences.append(f"At learning rate {lr:g} {label} diverged.")
            elif next(iter(cell.rows.values()))["name"] == "pace":
                sentences += _about_the_pull(label, cell, here, lr)
    if len(rates(cells)) > 1 and len(cells) > 1:
        sentences.append(_at_best_rates(cells))
    seeds = [set(cell.rows) for by_rate in cells.values() for cell in by_rate.values()]
    if not set.intersection(*seeds):
        sentences.append("No seed was finished by all methods, so their means do not compare.")
    elif max(map(len, seeds)) == 1:
        sentences.append(
            "With one seed there is no spread to judge small differences by; give --seeds 0,1,2."
        )
    elif len(cells) > 2:
        sentences.append(
            "Each interval is for its difference alone: which method has the lowest loss was not "
            "known before."
        )
    used = set.union(*seeds)
    if used < {row["seed"] for row in results.rows}:
        sentences.append(
            f"Losses are those of seed {', '.join(map(str, sorted(used)))}, which every method "
            "finished. The curves and metrics.jsonl have the other finished runs too."
        )
    return sentences


def _at_best_rates(cells: FinalTable) -> str:
    """Which method has the lowest loss at its best rate, unless a best rate was not found."""
    best = {
        label: min(by_rate, key=lambda lr: by_rate[lr].mean()) for label, by_rate in cells.items()
    }
    at = {f"{label} at {lr:g}": cells[label][lr] for label, lr in best.items()}
    missed = {
        label: edge
        for label, lr in best.items()
        if (edge := edges({"lr": lr}, [{"lr": x} for x in cells[label]]))
    }
    if missed:
        where = "; ".join(
            f"{', '.join(label for label in missed if missed[label] == edge)} ({edge} of its grid)"
            for edge in sorted(set(missed.values()))
        )
        said = f"no best was found for {where}: widen the grid with --lr."
    else:
        said = _winner(at)
    ranked = sorted(at, key=lambda label: at[label].mean())
    listed = ", ".join(f"{label} {at[label].show().split(' ')[0]}" for label in ranked)
    chosen = any(len(by_rate) > 1 for by_rate in cells.values())
    return f"Each method at its best learning rate: {said} All: {listed}." + (
        " The rates were chosen on the same text as these losses." if chosen else ""
    )


def _winner(cells: dict[str, FinalLosses]) -> str:
    """The returned model with the lowest loss, and its lead over the next."""
    winner, second = sorted(cells, key=lambda label: cells[label].mean())[:2]
    if cells[winner].mean() == math.inf:
        return "all diverged."
    lead = _difference(cells[winner], cells[second], second)
    return f"{winner} has the lowest loss, {cells[winner].show()}, {lead}."


def _about_the_pull(
    label: str, cell: FinalLosses, here: dict[str, FinalLosses], lr: float
) -> list[str]:
    """Sentences on PACE against the EMA without its pull, and against its twins."""
    sentences = []
    mine = next(iter(cell.rows.values()))
    for other, its in here.items():
        facts = next(iter(its.rows.values()))
        same = all(facts.get(key) == mine.get(key) for key in ("kappa", "return_kappa"))
        if facts["name"] != "ema" or not same:
            continue
        alike = all(facts[key] == mine[key] for key in ("schedule", "twin_gain"))
        # The ε that the pull amounts to where it is not clipped; see docs/theory.md.
        c = math.nan if mine["pullback"] == AUTO else mine["pullback"]
        amounts_to = (mine["eps"] or 1e-8) + lr * c
        if alike and facts["eps"] == mine["eps"]:
            against = "the same average without the pull"
        elif alike and math.isclose(facts["eps"] or 1e-8, amounts_to, rel_tol=0.01):
            against = "the ε that its pull amounts to"
        elif not alike and facts["schedule"] == "twin" and mine["schedule"] == "constant":
            against = f"the schedule of a gain of {facts['twin_gain']:g}"
        else:
            continue
        difference = _difference(cell, its, other)
        sentences.append(f"Against {against}, the loss of {label} is {difference}.")
    gains = [row["gain_mean"] for row in cell.rows.values() if row["gain_mean"] is not None]
    if sentences and gains:
        clipped = fmean(row["clipped"] for row in cell.rows.values())
        sentences.append(
            f"At the end, the mean gain of {label} is {fmean(gains):.2f}, and "
            f"{clipped:.1%} of the coordinates are clipped."
        )
    return sentences


def _difference(a: FinalLosses, b: FinalLosses, name: str) -> str:
    """The loss of `a` relative to `b`, which has this name, paired by seed."""
    mine, its = a.losses(), b.losses()
    pairs = [mine[seed] - its[seed] for seed in mine if seed in its]
    if not pairs:
        return f"not comparable with {name}, which has no seed in common"
    if not all(map(math.isfinite, pairs)):
        return f"not comparable with {name}, as a run diverged"
    mean = fmean(pairs)
    if abs(mean) < 0.0005:
        return f"equal to that of {name}"
    word = "lower" if mean < 0 else "higher"
    spread = ""
    if within := interval(pairs):
        agreeing = sum(d * mean > 0 for d in pairs)
        spread = (
            f" (95 % interval {within[0]:+.3f} to {within[1]:+.3f}, {word} in {agreeing} of "
            f"{len(pairs)} seeds)"
        )
    return f"{abs(mean):.3f} nats {word}{spread} than {name}"


# ---- as curves ----------------------------------------------------------------------------------


def draw_curves(results: Results) -> Figure:
    """Loss against steps, a panel a learning rate: returned thick, live thin and dotted."""
    cells = results.final()
    columns = rates(cells)
    figure = Figure(figsize=(1.5 + 4.6 * len(columns), 4.4), layout="constrained", dpi=150)
    axes = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axis, lr in zip(axes, columns, strict=True):
        trainings: set[str] = set()  # those whose live weights are drawn
        for index, label in enumerate(cells):
            rows = [r for r in results.rows if r["label"] == label and r["lr"] == lr]
            if rows:
                colour = COLOURS[index % len(COLOURS)]
                dash = LINE_STYLES[index // len(COLOURS) % len(LINE_STYLES)]
                live = {r["trained_with"] for r in rows}
                _draw_method(axis, rows, label, colour, dash, with_live=not live <= trainings)
                trainings |= live
        axis.set_title(f"learning rate {lr:g}")
        axis.set_xlabel("step")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("validation loss, nats a token")
    quarter = max(row["step"] for row in results.rows) / 4
    ends = [row for row in results.rows if row["step"] >= quarter]
    late = [loss_of(row, which) for row in ends for which in ("live", "returned")]
    late = [loss for loss in late if math.isfinite(loss)]
    if late and max(late) > min(late):
        margin = 0.05 * (max(late) - min(late))
        axes[0].set_ylim(min(late) - margin, max(late) + margin)
    handles = {h.get_label(): h for axis in axes for h in axis.lines if h.get_label()[0] != "_"}
    place: Any = {"loc": "outside right center", "title": "returned"}
    figure.legend(handles.values(), handles.keys(), frameon=False, **place)
    return figure


def _draw_method(
    axis: Axes, rows: list[dict[str, Any]], label: str, colour: str, dash: str, *, with_live: bool
) -> None:
    steps = sorted({row["step"] for row in rows})

    def losses(which: str) -> list[list[float]]:
        return [[loss_of(r, which) for r in rows if r["step"] == step] for step in steps]

    returned, live = losses("returned"), losses("live")
    axis.plot(steps, list(map(fmean, returned)), dash, color=colour, label=label, lw=1.8)
    if with_live and live != returned:
        axis.plot(steps, list(map(fmean, live)), ":", color=colour, lw=0.9, label="_live")
    if any(len(group) > 1 for group in returned):
        low, high = list(map(min, returned)), list(map(max, returned))
        axis.fill_between(steps, low, high, color=colour, alpha=0.15, lw=0)
