"""HTML pages that need no network: the report of a run, and the tools of other reports."""

import io
import math
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..files import whole
from .folder import MODEL, REPORT, SAMPLES
from .manifest import read_json
from .recipe import Recipe

# Okabe and Ito's colours, which colour-blind people can tell apart. More lines get dashes.
COLOURS = ["#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]


def svg(figure: Figure) -> str:
    """A figure as an SVG element of a page."""
    text = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "paceline"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def save(figure: Figure, path: Path) -> None:
    """Write a figure to PATH.svg and PATH.png; equal figures give equal files."""
    FigureCanvasAgg(figure)
    with mpl.rc_context({"svg.hashsalt": "paceline", "svg.fonttype": "none"}):
        for kind, options in (("svg", {"metadata": {"Date": None}}), ("png", {"dpi": 150})):
            with whole(path.with_suffix(f".{kind}")) as partial:
                figure.savefig(partial, format=kind, **options)


def render(path: Path, package: str, template: str, **values: Any) -> None:
    """Write a page from a template in the package's folder, whole or not at all."""
    folders = [jinja2.PackageLoader(name, ".") for name in (package, "paceline.train")]
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(folders), autoescape=True, trim_blocks=True
    )
    page = environment.get_template(template).render(**values)
    with whole(path) as partial:
        partial.write_text(page, encoding="utf-8")


def write_page(
    recipe: Recipe,
    history: list[dict[str, Any]],
    average: dict[str, Any],
    manifest: dict[str, Any],
    run: Path,
    choice: tuple[str, Figure] | None = None,
) -> None:
    """Write a run's report.html: curves, final losses, settings, and what a choice found."""
    evaluations = [entry for entry in history if "eval_loss" in entry]
    render(
        run / REPORT,
        "paceline.train",
        "run.html.j2",
        recipe=recipe.model_dump(mode="json"),
        label=recipe.parsed.label,
        first=evaluations[0],
        last=evaluations[-1],
        average=average,
        manifest=manifest,
        svg=svg(_curves(history)),
        samples=read_json(run / SAMPLES)["greedy"] if (run / SAMPLES).is_file() else [],
        run=str(run),
        model=str(run / MODEL),
        choice=choice and (choice[0], svg(choice[1])),
    )


def _curves(history: list[dict[str, Any]]) -> Figure:
    losses = {
        "training batches, live": ("loss", "#999999", 0.8),
        "live": ("eval_live_loss", COLOURS[1], 1.2),
        "returned": ("eval_loss", COLOURS[0], 2.0),
    }
    gains = {
        "mean gain": ("gain_mean", COLOURS[2], 1.2),
        "share of clipped coordinates": ("clipped", COLOURS[3], 1.2),
    }
    panels = [losses, gains] if any("gain_mean" in entry for entry in history) else [losses]
    figure = Figure(figsize=(9, 1.6 + 2.4 * len(panels)), layout="constrained", dpi=150)
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axis, lines in zip(axes, panels, strict=True):
        for label, (key, colour, width) in lines.items():
            points = [(e["step"], e[key]) for e in history if key in e and math.isfinite(e[key])]
            if points:
                axis.plot(*zip(*points, strict=True), color=colour, lw=width, label=label)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
        axis.legend(frameon=False)
    axes[0].set_ylabel("loss, nats a token")
    if len(axes) > 1:
        axes[1].set_ylim(0, 1)
    axes[-1].set_xlabel("step")
    return figure
