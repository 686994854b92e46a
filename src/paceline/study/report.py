"""What a comparison says: in the terminal, as curves, and as one page that needs no network."""

import io
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import jinja2
import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

# Okabe and Ito's colours, which the colour-blind can tell apart; then dashes tell apart more.
COLOURS = ["#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
DASHES = ("-", "--", ":")


@dataclass
class Results:
    """What the finished runs measured: one row for each evaluation of each run."""

    total_runs: int
    rows: list[dict[str, Any]] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)  # run: reason
    interrupted: bool = False

    def cells(self) -> dict[str, dict[float, "Cell"]]:
        """Final losses: method label -> learning rate -> one value a seed."""
        last = {row["run"]: row for row in self.rows}  # rows of a run are in order of steps
        cells: dict[str, dict[float, Cell]] = {}
        for row in last.values():
            cell = cells.setdefault(row["label"], {}).setdefault(row["lr"], Cell({}, {}, row))
            cell.live[row["seed"]] = _loss(row["live_loss"])
            cell.returned[row["seed"]] = _loss(row["returned_loss"])
        return cells


class Cell(NamedTuple):
    """Final losses, nats a token, of one method at one learning rate: seed -> loss."""

    live: dict[int, float]
    returned: dict[int, float]
    facts: dict[str, Any]

    @property
    def mean(self) -> float:
        """Of the returned models' losses."""
        return fmean(self.returned.values())


def _loss(value: float | None) -> float:
    return math.inf if value is None else value  # a diverged run is the worst, not missing


def write_report(
    results: Results, manifest: dict[str, Any], folder: Path, console: Console
) -> None:
    """Print the table and the verdict; write curves.png and report.html into the folder."""
    finished = len({row["run"] for row in results.rows})
    if results.interrupted:
        console.print(f"Interrupted: {finished} of {results.total_runs} runs were finished.")
    if not finished:
        console.print(f"No run was finished, so there is no report; see {folder}/manifest.json.")
        return
    cells = results.cells()
    sentences = verdict(cells)
    console.print(_table(cells))
    for sentence in sentences:
        console.print(f"• {sentence}", highlight=False)
    figure = curves(results)
    FigureCanvasAgg(figure).print_png(str(folder / "curves.png"))
    svg = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "paceline"}):
        figure.savefig(svg, format="svg", metadata={"Date": None})
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("paceline.study", "."), autoescape=True, trim_blocks=True
    )
    environment.filters["loss"] = show_loss
    environment.filters["spread"] = show_spread
    page = environment.get_template("report.html.j2").render(
        cells=cells,
        rates=rates(cells),
        best={lr: min(c[lr].mean for c in cells.values() if lr in c) for lr in rates(cells)},
        sentences=sentences,
        svg=svg.getvalue()[svg.getvalue().index("<svg") :],
        manifest=manifest,
        results=results,
        finished=finished,
    )
    (folder / "report.html").write_text(page, encoding="utf-8")
    console.print(f"\nReport: {folder / 'report.html'}", highlight=False)


def rates(cells: dict[str, dict[float, Cell]]) -> list[float]:
    """All learning rates, ascending."""
    return sorted({lr for by_rate in cells.values() for lr in by_rate})


def show_loss(value: float) -> str:
    """Three decimals; `diverged` if there is no finite loss."""
    return f"{value:.3f}" if math.isfinite(value) else "diverged"


def show_spread(values: Iterable[float]) -> str:
    """Half the range over seeds, where there are several; empty for one."""
    values = list(values)
    return f"±{(max(values) - min(values)) / 2:.3f}" if len(values) > 1 else ""


def _table(cells: dict[str, dict[float, Cell]]) -> Table:
    table = Table(
        title="Validation loss, nats a token, of the live weights → of the returned model"
    )
    table.add_column("method")
    for lr in rates(cells):
        table.add_column(f"lr {lr:g}", justify="right")
    for label, by_rate in cells.items():
        row = []
        for lr in rates(cells):
            if lr not in by_rate:
                row.append("")
                continue
            cell = by_rate[lr]
            best = cell.mean == min(c[lr].mean for c in cells.values() if lr in c)
            returned = f"{show_loss(cell.mean)} {show_spread(cell.returned.values())}".strip()
            returned = f"[bold]{returned}[/]" if best else returned
            row.append(f"{show_loss(fmean(cell.live.values()))} → {returned}")
        table.add_row(label, *row)
    return table


# ---- in words -----------------------------------------------------------------------------------


def verdict(cells: dict[str, dict[float, Cell]]) -> list[str]:
    """Which method won, by how much and over how many seeds, as sentences."""
    sentences = []
    for lr in rates(cells):
        ranked = sorted((c[lr].mean, label) for label, c in cells.items() if lr in c)
        if len(ranked) > 1:
            (best, winner), (_, second) = ranked[:2]
            sentences.append(
                f"At learning rate {lr:g} the best returned model is that of {winner}, "
                f"{show_loss(best)} nats: {_difference(cells[winner][lr], cells[second][lr])} "
                f"than {second}, the next."
            )
        for label, by_rate in cells.items():
            if lr in by_rate and by_rate[lr].facts["name"] == "pace":
                sentences += _about_the_pull(label, by_rate[lr], cells, lr)
    if len(rates(cells)) > 1 and len(cells) > 1:
        own = sorted(
            (min((c.mean, lr) for lr, c in r.items()), label) for label, r in cells.items()
        )
        listed = ", ".join(f"{label} {show_loss(mean)} (lr {lr:g})" for (mean, lr), label in own)
        sentences.append(
            f"Each at the better of its rates: {listed}. The rates were picked on the validation "
            "text that the numbers are from."
        )
    seeds = {seed for r in cells.values() for c in r.values() for seed in c.returned}
    if len(seeds) == 1:
        sentences.append(
            "One seed: there is no spread here by which to judge small differences; "
            "--seeds 0,1,2 gives one."
        )
    return sentences


def _about_the_pull(
    label: str, cell: Cell, cells: dict[str, dict[float, Cell]], lr: float
) -> list[str]:
    """PACE against the EMA that differs in the pull alone, and against its twin schedule."""
    sentences = []
    for other, by_rate in cells.items():
        facts = by_rate[lr].facts if lr in by_rate else {}
        if facts.get("name") != "ema" or facts["kappa"] != cell.facts["kappa"]:
            continue
        if facts["schedule"] == cell.facts["schedule"]:
            what = f"The pull alone makes {label} return a model"
        elif facts["schedule"] == "twin" and cell.facts["schedule"] == "constant":
            what = f"Against the schedule that a gain of {facts['g']:g} amounts to it is"
        else:
            continue
        sentences.append(f"{what} {_difference(cell, by_rate[lr])} than {other} at that rate.")
    if sentences:
        gain, clipped = cell.facts["gain_mean"], cell.facts["clipped"]
        sentences[-1] += f" Its gain is {gain:.2f} at the end, {clipped:.0%} of it clipped."
    return sentences


def _difference(a: Cell, b: Cell) -> str:
    """`a` relative to `b`, paired over the seeds that both have."""
    pairs = [a.returned[s] - b.returned[s] for s in a.returned if s in b.returned]
    if not all(map(math.isfinite, pairs)):
        return "incomparable, as one of them diverged,"
    mean = fmean(pairs)
    word = "lower" if mean < 0 else "higher"
    text = f"{abs(mean):.3f} {word}"
    if len(pairs) > 1:
        agreeing = sum((d < 0) == (mean < 0) for d in pairs)
        text += (
            f" ({min(pairs):+.3f} to {max(pairs):+.3f}, {word} in {agreeing} of {len(pairs)} seeds)"
        )
    return text


# ---- as curves ----------------------------------------------------------------------------------


def curves(results: Results) -> Figure:
    """Loss against steps, a panel for each learning rate: returned thick, live thin and dotted."""
    cells = results.cells()
    columns = rates(cells)
    figure = Figure(figsize=(1.5 + 4.6 * len(columns), 4.4), layout="constrained", dpi=150)
    axes = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axis, lr in zip(axes, columns, strict=True):
        for index, label in enumerate(cells):
            rows = [r for r in results.rows if r["label"] == label and r["lr"] == lr]
            if rows:
                colour = COLOURS[index % len(COLOURS)]
                _curve(axis, rows, label, colour, DASHES[index // len(COLOURS) % len(DASHES)])
        axis.set_title(f"learning rate {lr:g}")
        axis.set_xlabel("step")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("validation loss, nats a token")
    late = [
        _loss(r[key])
        for r in results.rows
        for key in ("live_loss", "returned_loss")
        if r["step"] * 4 >= max(row["step"] for row in results.rows)
    ]
    late = [x for x in late if math.isfinite(x)]
    if late and max(late) > min(late):
        margin = 0.05 * (max(late) - min(late))
        axes[0].set_ylim(min(late) - margin, max(late) + margin)
    handles = {h.get_label(): h for axis in axes for h in axis.lines if h.get_label()[0] != "_"}
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside right center",
        frameon=False,
        title="returned",
    )
    return figure


def _curve(axis: Axes, rows: list[dict[str, Any]], label: str, colour: str, dash: str) -> None:
    steps = sorted({row["step"] for row in rows})

    def values(key: str) -> list[list[float]]:
        return [[_loss(r[key]) for r in rows if r["step"] == step] for step in steps]

    returned, live = values("returned_loss"), values("live_loss")
    axis.plot(steps, list(map(fmean, returned)), dash, color=colour, label=label, lw=1.8)
    if live != returned:
        axis.plot(steps, list(map(fmean, live)), ":", color=colour, lw=0.9, label="_live")
    if any(len(group) > 1 for group in returned):
        low, high = list(map(min, returned)), list(map(max, returned))
        axis.fill_between(steps, low, high, color=colour, alpha=0.15, lw=0)
