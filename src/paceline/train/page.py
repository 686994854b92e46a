"""HTML pages that need no network: the report of a run, and the tools of other reports."""

import io
import json
import math
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..files import whole
from .folder import REPORT
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
            with whole(path.with_suffix(f".{kind}"), shared=True) as partial:
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
) -> None:
    """Write a run's report.html: curves, final losses and settings."""
    evaluations = [entry for entry in history if "eval_loss" in entry]
    render(
        run / REPORT,
        "paceline.train",
        "run.html.j2",
        recipe=json.loads(recipe.model_dump_json()),
        label=recipe.parsed.label,
        first=evaluations[0],
        last=evaluations[-1],
        average=average,
        manifest=manifest,
        svg=svg(_curves(history)),
    )


def _curves(history: list[dict[str, Any]]) -> Figure:
    pulled = any("gain_mean" in entry for entry in history)
    figure = Figure(figsize=(9, 6.4 if pulled else 4), layout="constrained", dpi=150)
    panels = figure.subplots(2 if pulled else 1, 1, sharex=True, squeeze=False)[:, 0]
    lines = {
        "training batches, live": ("loss", "#999999", 0.8),
        "live": ("eval_live_loss", COLOURS[1], 1.2),
        "returned": ("eval_loss", COLOURS[0], 2.0),
    }
    _plot(panels[0], history, lines)
    panels[0].set_ylabel("loss, nats a token")
    if pulled:
        gains = {
            "mean gain": ("gain_mean", COLOURS[2], 1.2),
            "share of clipped coordinates": ("clipped", COLOURS[3], 1.2),
        }
        _plot(panels[1], history, gains)
        panels[1].set_ylim(0, 1)
    panels[-1].set_xlabel("step")
    return figure


def _plot(
    axis: Any, history: list[dict[str, Any]], lines: dict[str, tuple[str, str, float]]
) -> None:
    for label, (key, colour, width) in lines.items():
        points = [(e["step"], e[key]) for e in history if key in e and math.isfinite(e[key])]
        if points:
            axis.plot(*zip(*points, strict=True), color=colour, lw=width, label=label)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
    axis.legend(frameon=False)
