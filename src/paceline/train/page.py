"""HTML pages that need no network: the report of a run, and what all reports share."""

import io
import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, FigureBase
from matplotlib.lines import Line2D

from ..files import whole
from .folder import FORMER, MODEL, REPORT, SAMPLES
from .manifest import read_json
from .recipe import Recipe

# Okabe and Ito's colours, which colour-blind people can tell apart, and a marker for each.
COLOURS = ["#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = "osD^vPX"
DASHES = ("-", "--", "-.")  # dotted lines are live weights
# Words of a method's name -> the colour that every chart draws it in, if it is still free.
OWN_COLOURS = (
    ({"pace"}, 0),
    ({"power", "twin"}, 3),
    ({"schedule-free"}, 2),
    ({"ema"}, 1),
    ({"adamw"}, 6),
)
PHONE = 5.4  # inches: a figure of this width is legible on a phone
COINCIDE = 0.03  # of a panel's height: curves as near as this look like one
# Colours of a figure that a page's own replace, so that it can be dark.
OF_THE_PAGE = {"#000000": "currentColor", "#ffffff": "var(--page)", "#5a6572": "var(--soft)"}


# ---- methods in charts --------------------------------------------------------------------------


class Look(NamedTuple):
    """How a method is drawn."""

    colour: str
    marker: str
    dash: str


def looks(methods: Sequence[str]) -> dict[str, Look]:
    """A colour, a marker and a dash for each method, the same in every chart of these methods."""
    indices: dict[str, int] = {}
    for method in methods:
        words = set(re.findall(r"(?<![\w=-])[a-z]+(?:-[a-z]+)*", method.lower()))  # no values
        own = next((index for names, index in OWN_COLOURS if names & words), None)
        if own is not None and own not in indices.values():
            indices[method] = own
    n, taken = len(COLOURS), {index for _, index in OWN_COLOURS}
    free = [index for index in range(len(DASHES) * n) if index not in indices.values()]
    free.sort(key=lambda index: (index // n, index in taken))  # those of other methods last
    others = [method for method in methods if method not in indices]
    indices |= {method: free[place % len(free)] for place, method in enumerate(others)}
    return {
        method: Look(COLOURS[i % n], MARKERS[i % n], DASHES[i // n])
        for method, i in indices.items()
    }


class LossCurve(NamedTuple):
    """The losses of one method at some steps, nats a token; infinite or NaN after divergence."""

    look: Look
    steps: Sequence[int]
    live: Sequence[float]
    returned: Sequence[float]
    low: Sequence[float] = ()  # of the returned losses of several seeds
    high: Sequence[float] = ()
    with_live: bool = True  # False: the live weights are those of another curve

    def coincides(self, height: float) -> bool:
        """Whether live and returned losses differ, but too little to see in a panel."""
        gaps = [abs(a - b) for a, b in zip(self.live, self.returned, strict=True)]
        gaps = [gap for gap in gaps if math.isfinite(gap)]
        return bool(gaps) and 0 < max(gaps) < COINCIDE * height


def late_limits(values: Iterable[float]) -> tuple[float, float] | None:
    """The limits of a panel of these losses; None if they are equal or none is finite."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite or max(finite) == min(finite):
        return None
    margin = 0.05 * (max(finite) - min(finite))
    return min(finite) - margin, max(finite) + margin


def coinciding(curves: Iterable[LossCurve], limits: tuple[float, float] | None) -> list[LossCurve]:
    """The curves whose live and returned losses look like one within these limits."""
    return [x for x in curves if limits and x.coincides(limits[1] - limits[0])]


def draw_losses(
    axis: Axes, curves: Iterable[LossCurve], limits: tuple[float, float] | None
) -> None:
    """Returned losses thick with markers, live losses thin and dotted, seeds as a band."""
    for curve in curves:
        colour, marker, dash = curve.look
        if curve.with_live and list(curve.live) != list(curve.returned):
            axis.plot(curve.steps, curve.live, ":", color=colour, lw=1.2)
        axis.plot(curve.steps, curve.returned, dash, color=colour, lw=1.8, **_marks(curve, marker))
        if curve.low:
            axis.fill_between(curve.steps, curve.low, curve.high, color=colour, alpha=0.15, lw=0)
    if limits:
        axis.set_ylim(*limits)
    dress(axis, "loss, nats a token")


def draw_differences(axis: Axes, curves: Iterable[LossCurve]) -> None:
    """Returned minus live losses: below 0 the returned model has the lower loss."""
    axis.axhline(0, color="#000000", lw=0.8)
    for curve in curves:
        colour, marker, dash = curve.look
        gaps = [a - b for a, b in zip(curve.returned, curve.live, strict=True)]
        axis.plot(curve.steps, gaps, dash, color=colour, lw=1.8, **_marks(curve, marker))
    dress(axis, "returned − live")


def _marks(curve: LossCurve, marker: str) -> dict[str, Any]:
    return {
        **{"marker": marker, "ms": 5, "mec": "white", "mew": 0.6},
        "markevery": 1 + len(curve.steps) // 12,
    }


def dress(axis: Axes, label: str) -> None:
    """Label an axis of losses and take away what is not data."""
    axis.set_ylabel(label, fontsize=11)
    axis.tick_params(labelsize=10.5)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)


def handle(look: Look, *, live: bool = False) -> Line2D:
    """A method's line for a legend, of its returned model or of its live weights."""
    colour, marker, dash = look
    if live:
        return Line2D([], [], ls=":", lw=1.2, color=colour)
    return Line2D([], [], ls=dash, lw=1.8, color=colour, marker=marker, ms=5, mec="white", mew=0.6)


def put_legend(figure: FigureBase, handles: Mapping[str, Any]) -> None:
    """A legend below all panels, its long names in several lines."""
    names = ["\n".join(textwrap.wrap(name, 56)) for name in handles]
    place: Any = {"loc": "outside lower left", "frameon": False}
    figure.legend(handles.values(), names, fontsize=11, handlelength=2.4, **place)


# ---- pages --------------------------------------------------------------------------------------


def svg(figure: Figure) -> str:
    """A figure as an SVG element of a page, in the page's ink and on its background."""
    text = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "paceline"}):
        figure.savefig(text, format="svg", metadata={"Date": None}, transparent=True)
    element = text.getvalue()[text.getvalue().index("<svg") :]
    for colour, own in OF_THE_PAGE.items():
        element = element.replace(colour, own)
    return element


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
    environment.globals["infinity"] = math.inf
    page = environment.get_template(template).render(**values)
    with whole(path) as partial:
        partial.write_text(page, encoding="utf-8")


def name_of(folder: Path) -> str:
    """The name of a run's folder, which titles its report."""
    return folder.resolve().name


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as one: `config.hidden_size`."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        found |= flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return found


def shown(value: Any, nothing: str = "") -> str:
    """A value as a short text; what None is, is given."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(shown, value)) or nothing
    return nothing if value is None else str(value)


def settings(values: dict[str, Any]) -> dict[str, str]:
    """Keys and values of a configuration as texts."""
    return {key: shown(value, "not set") for key, value in flat(values).items()}


def write_page(
    recipe: Recipe,
    history: list[dict[str, Any]],
    average: dict[str, Any],
    manifest: dict[str, Any],
    run: Path,
    choice: tuple[str, Figure] | None = None,
) -> None:
    """Write a run's report.html: verdict, losses, samples, settings, and what a choice found."""
    evaluations = [entry for entry in history if "eval_loss" in entry]
    first, last = evaluations[0], evaluations[-1]
    live, returned = last["eval_live_loss"], last["eval_loss"]
    finite = [loss for loss in (live, returned) if math.isfinite(loss)]
    unmarked = ("No difference shown", "The model got worse")  # neither loss is a good one
    is_shown = not average["verdict"].startswith(unmarked)
    lower = min(finite) if finite and live != returned and is_shown else None
    label = recipe.parsed.label
    curves, with_difference = _curves(history, looks([label])[label])
    render(
        run / REPORT,
        "paceline.train",
        "run.html.j2",
        name=name_of(run),
        recipe=recipe.model_dump(mode="json"),
        settings=settings(recipe.model_dump(mode="json")),
        label=label,
        verdict=average["verdict"],
        first=first,
        last=last,
        lower=lower,
        average={key: shown(x) for key, x in average.items() if x is not None and key != "verdict"},
        manifest=manifest,
        svg=svg(curves),
        with_difference=with_difference,
        samples=read_json(run / SAMPLES)["greedy"] if (run / SAMPLES).is_file() else [],
        run=str(run),
        model=str(run / MODEL),
        returned_in=FORMER if (run / FORMER).is_dir() else MODEL,
        choice=choice and (choice[0], svg(choice[1])),
    )


def _curves(history: list[dict[str, Any]], look: Look) -> tuple[Figure, bool]:
    """Losses over the steps, their difference if it is not seen in them, and the pull's gain.

    Returns:
        The figure, and whether it has a panel of differences.
    """
    evaluated = [entry for entry in history if "eval_loss" in entry]
    steps, live, returned = (
        [entry[key] for entry in evaluated] for key in ("step", "eval_live_loss", "eval_loss")
    )
    curve = LossCurve(look, steps, live, returned)
    keys = ("eval_live_loss", "eval_loss", "loss")
    late = [entry for entry in history if entry["step"] >= steps[-1] / 4]
    limits = late_limits(entry[key] for entry in late for key in keys if key in entry)
    differing = coinciding([curve], limits)
    pulled = any("gain_mean" in entry for entry in history)
    heights = [2.8, *[1.4] * bool(differing), *[1.4] * pulled]
    figure = Figure(figsize=(PHONE, sum(heights) + 1.6), layout="constrained", dpi=150)
    axes = figure.subplots(
        len(heights), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights}
    )[:, 0]

    def line(axis: Axes, key: str, **style: Any) -> Line2D:
        points = [(e["step"], e[key]) for e in history if key in e and math.isfinite(e[key])]
        return axis.plot(*zip(*points, strict=True), **style)[0] if points else Line2D([], [])

    handles = {"returned": handle(look)}
    if live != returned:
        handles["live"] = handle(look, live=True)
    handles["live, training batches"] = line(axes[0], "loss", color="#8a939d", lw=0.8)
    draw_losses(axes[0], [curve], limits)
    if differing:
        draw_differences(axes[1], differing)
    if pulled:
        style = {"color": COLOURS[2], "lw": 1.4}
        handles["mean gain"] = line(axes[-1], "gain_mean", **style)
        handles["share clipped"] = line(axes[-1], "clipped", ls="--", **style)
        axes[-1].set_ylim(0, 1)
        dress(axes[-1], "the pull")
    axes[-1].set_xlabel("step", fontsize=11)
    put_legend(figure, handles)
    return figure, bool(differing)
