"""`paceline report`: one interactive page over any set of runs, which needs no network."""

import base64
import functools
import gzip
import itertools
import math
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, NamedTuple, TypeVar
from urllib.parse import quote

from plotly.offline import get_plotlyjs
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError
from rich import box
from rich.console import Console
from rich.table import Table as Printed
from rich.text import Text

from ..defaults import AUTO
from ..train import InputError, reason
from ..train import folder as folders
from ..train.folder import METRICS, JsonLines
from ..train.methods import all_options
from ..train.page import COINCIDE, flat, looks, render, shown
from ..train.recipe import MEASURING, METHOD, RESUMABLE, Recipe, keys_with
from .options import ReportOptions
from .statistics import (
    NAMED,
    WIDEN,
    WORDS,
    edges,
    holds,
    holm,
    interval,
    named,
    p_value,
    verdict_against,
)

LINKED_FILES = (METRICS, folders.MANIFEST, folders.RECIPE, folders.TRAINING, folders.REPORT)
AXES = tuple(name for name in all_options() if name not in WORDS)  # numeric options
# Keys that may differ within a setting: they belong to a method or a seed, or change no loss.
WITHIN_SETTING = keys_with(METHOD, RESUMABLE, MEASURING) | {
    *("methods", "seeds", "minutes", "workers", "out", *AXES)
}
DEFAULT_BASELINE = "adamw"


# ---- reading ------------------------------------------------------------------------------------

Diverged = BeforeValidator(lambda loss: math.inf if loss is None else loss)


class Point(BaseModel):
    """One evaluation of one method in one training run; all folders are read into this format.

    Losses are in nats a token, and infinite after divergence. None: there is no such number.
    """

    model_config = ConfigDict(frozen=True)

    setting: str = ""  # model, data and budget
    run: str
    label: str  # the method with its options, without the learning rate
    name: str
    schedule: str = "constant"
    base: str | None = None
    gain: str | None = None
    state: str | None = None
    lr: float
    options: dict[str, float | None]  # by the names of AXES
    seed: int
    trained_with: str  # the training run that it was read out of
    step: int
    steps: int | None = None  # budget
    tokens: float | None = None
    live_loss: Annotated[float, Diverged]
    returned_loss: Annotated[float, Diverged]
    selection_loss: Annotated[float | None, Diverged] = None
    gain_mean: float | None = None
    clipped: float | None = None

    @property
    def family(self) -> str:
        """The method without its numbers."""
        schedule = None if self.schedule == "constant" else self.schedule
        gain = self.gain and f"gain={self.gain}"
        state = "state=bf16" if self.state == "bf16" else None
        return " ".join(filter(None, (self.name, self.base, schedule, gain, state)))

    @property
    def setting_values(self) -> dict[str, Any]:
        """Every option of its method."""
        return {**self.options, **{word: getattr(self, word) for word in WORDS}}


@dataclass
class Source:
    """The content of one folder."""

    folder: Path
    manifest: dict[str, Any]
    configuration: dict[str, Any]  # flat: `config.hidden_size`
    rows: list[Point]
    settings: dict[str, dict[str, Any]]  # name -> the keys that define it, as far as known
    notes: list[str]


def find(paths: Iterable[Path]) -> list[Path]:
    """The folders that hold metrics among the given ones and below them, each once.

    Raises:
        InputError: one is no folder, or holds no metrics.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if not path.is_dir():
            raise InputError(f"runs: there is no folder {path}; name one that holds a {METRICS}")
        here = []
        for name, below, files in os.walk(path):
            below[:] = sorted(folder for folder in below if not folder.startswith("."))
            if METRICS in files:
                here.append(Path(name))
                below.clear()
        if not here:
            raise InputError(
                f"runs: there is no {METRICS} in {path} or below it; name a folder that "
                "paceline train, compare or sweep has written"
            )
        for folder in here:
            found.setdefault(folder.resolve(), folder)
    if not found:
        raise InputError("runs: name at least one folder")
    return list(found.values())


def read(folder: Path) -> Source:
    """Rows, manifest and configuration of one folder.

    Raises:
        InputError: a file of it is missing or broken.
    """
    manifest = folders.manifest_of(folder)
    trained = "recipe" in manifest and folders.is_begun(folder)
    configuration = flat(_object(manifest.get("recipe" if trained else "configuration")))
    if "steps" in manifest:  # the steps taken, for runs by epochs or minutes
        configuration["steps"] = manifest["steps"]
    lines, torn = folders.read_lines(folder / METRICS)
    rows = []
    for number, values in _trained(folder, lines) if trained else lines:
        try:
            numbers = {k: None if x == AUTO else x for k, x in values.items()}
            options = {axis: numbers.get(axis) for axis in AXES}
            rows.append(Point(**{**values, "options": options}))
        except ValidationError as error:
            errors = error.errors()
            raise InputError(
                f"{folder / METRICS}, line {number}: {errors[0]['loc'][0]}: {reason(errors[:1])}; "
                f"it is not an evaluation that paceline wrote, leave out {folder}"
            ) from error
    failed = _grouped(_object(manifest.get("failed")).items(), lambda item: item[1])
    notes = [f"{', '.join(run for run, _ in all_)} failed: {why}" for why, all_ in failed.items()]
    notes += ["it was interrupted"] if manifest.get("interrupted") else []
    notes += [f"the last line of {METRICS} is torn, and was skipped"] if torn else []
    notes += [] if rows else ["there is no evaluation in it"]
    named = dict.fromkeys(row.setting for row in rows if row.setting)
    tasks = _object(manifest.get("tasks"))
    settings = {name: flat(_object(tasks.get(name))) for name in named}
    if not named:
        short = _setting(folder, configuration, manifest)
        settings = {short: {k: v for k, v in configuration.items() if k not in WITHIN_SETTING}}
        rows = [row.model_copy(update={"setting": short}) for row in rows]
    return Source(folder, manifest, configuration, rows, settings, notes)


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _trained(folder: Path, lines: JsonLines) -> JsonLines:
    """A training run's evaluations, in the format of the others."""
    try:
        recipe = Recipe(**folders.recipe_of(folder, option="runs"))
    except InputError as error:
        raise InputError(f"{folder / folders.RECIPE} cannot be used: {error}") from error
    method, name = recipe.parsed, folder.resolve().name
    facts = {"run": name, "trained_with": name, "label": method.label, **method.row}
    names = {"eval_live_loss": "live_loss", "eval_loss": "returned_loss"}
    names |= {"step": "step", "eval_num_tokens": "tokens"}
    rows: JsonLines = []
    for number, entry in lines:  # an evaluation has the pull that was logged last
        facts |= {key: entry[key] for key in ("gain_mean", "clipped") if key in entry}
        if "eval_loss" in entry:
            numbers = {to: entry[key] for key, to in names.items() if key in entry}
            rows.append((number, {**facts, "seed": recipe.seed, **numbers}))
    return rows


def _setting(folder: Path, configuration: dict[str, Any], manifest: dict[str, Any]) -> str:
    """The name of a source's setting, from its configuration."""
    if "task" in configuration:
        model = configuration.get("model") or configuration.get("config.model_type")
        default = "chitchat" if configuration["task"] == "sft" else "python"
        data = ", ".join(Path(name).name for name in configuration.get("data") or [default])
        return f"{Path(str(model)).name} on {data}"
    if {"width", "layers"} <= configuration.keys():
        shape = f"GPT-2 {configuration['width']}×{configuration['layers']}"
        return f"{shape} on {manifest.get('text', 'text')}"
    return folder.resolve().name


Item = TypeVar("Item")


def _grouped(items: Iterable[Item], key: Callable[[Item], Any]) -> dict[Any, list[Item]]:
    groups: dict[Any, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def tell_apart(sources: Iterable[Source]) -> None:
    """Add the differing keys to settings of one name, so that only equal settings are pooled."""
    pairs = [(source, name) for source in sources for name in source.settings]
    for name, group in _grouped(pairs, lambda pair: pair[1]).items():
        known = [source.settings[name] for source, _ in group if source.settings[name]]
        keys = dict.fromkeys(itertools.chain(*known))
        differing = [k for k in keys if len({shown(values.get(k)) for values in known}) > 1]
        for source, _ in group:
            values = source.settings[name]
            parts = [f"{key} {shown(values.get(key)) or 'default'}" for key in differing if values]
            setting = {"setting": ", ".join([name, *parts])}
            source.rows = [
                row.model_copy(update=setting) if row.setting == name else row
                for row in source.rows
            ]


# ---- cells and statistics -----------------------------------------------------------------------


@dataclass(frozen=True)
class MethodRuns:
    """The runs of one method at one learning rate in one setting."""

    setting: str
    label: str
    lr: float
    runs: dict[int, list[Point]]  # seed -> rows by steps
    finished: bool  # False: the runs ended before their budget

    @property
    def first(self) -> Point:
        """A row, for the values that all rows share."""
        return next(iter(self.runs.values()))[0]

    @property
    def count(self) -> int:
        """Number of seeds."""
        return len(self.runs)

    def losses(self, which: str = "returned") -> dict[int, float]:
        """The `live`, `returned` or `selection` loss of each seed at the end, nats a token."""
        return {seed: getattr(rows[-1], f"{which}_loss") for seed, rows in self.runs.items()}

    def mean(self, which: str = "returned", seeds: Iterable[int] = ()) -> float:
        """Mean loss over these seeds, or all; infinite if a run diverged."""
        losses = self.losses(which)
        return fmean([losses[seed] for seed in seeds] or losses.values())

    def show(self, which: str = "returned") -> str:
        """Mean and range over seeds, or the number of diverged runs."""
        losses = self.losses(which).values()
        if lost := sum(map(math.isinf, losses)):
            return "diverged" if len(losses) == 1 else f"diverged in {lost} of {len(losses)}"
        spread = (
            f" [{min(losses):.4f},\N{NO-BREAK SPACE}{max(losses):.4f}]" if len(losses) > 1 else ""
        )
        return f"{fmean(losses):.4f}{spread}"


def gather(sources: Iterable[Source]) -> list[MethodRuns]:
    """All runs by setting, method and learning rate, in order of appearance.

    Unfinished runs are left out if other runs of their method, rate and setting are finished. The
    sources get notes of them, and of runs that another folder has too.
    """
    cells: dict[tuple[str, str, float], dict[int, tuple[list[Point], bool]]] = {}
    for source in sources:
        longest = max((row.step for row in source.rows), default=0)
        budget = source.configuration.get("steps")
        budget = budget if isinstance(budget, int) else longest
        unfinished, twice = [], []
        groups = _grouped(source.rows, lambda row: (row.setting, row.label, row.lr, row.seed))
        for (setting, label, lr, seed), found in groups.items():
            by_step = {row.step: row for row in found}  # the last row, if a step was run twice
            rows = [by_step[step] for step in sorted(by_step)]
            last = rows[-1]
            finished = last.step >= (last.steps or budget) or math.isinf(last.returned_loss)
            runs = cells.setdefault((setting, label, lr), {})
            if seed in runs and (runs[seed][1] or not finished):
                twice.append(last.run)
                continue
            runs[seed] = (rows, finished)
            unfinished += [] if finished else [f"{last.run} ends at step {last.step}"]
        if unfinished:
            source.notes.append(f"unfinished, and not in the tables: {', '.join(unfinished)}")
        if twice:
            source.notes.append(
                "the same training (method, rate and seed) is in a folder that was read before; "
                f"this copy is not used: {', '.join(twice)}"
            )
    gathered = []
    for names, runs in cells.items():
        finished = any(done for _, done in runs.values())
        kept = {seed: rows for seed, (rows, done) in sorted(runs.items()) if done == finished}
        gathered.append(MethodRuns(*names, kept, finished))
    return gathered


class Difference(NamedTuple):
    """A difference in a table."""

    key: str  # the number that the table sorts by, or ""
    text: str
    p: float | None = None  # not corrected


def difference(a: MethodRuns, b: MethodRuns) -> Difference:
    """Returned loss of `a` less that of `b`, paired over the seeds of both, nats a token."""
    if a is b:
        return Difference("0", "baseline")
    mine, its = a.losses(), b.losses()
    seeds = sorted(mine.keys() & its.keys())
    if not seeds:
        return Difference("", "no seed in common")
    if any(math.isinf(mine[seed]) for seed in seeds):
        return Difference("Infinity", "diverged")
    if any(math.isinf(its[seed]) for seed in seeds):
        return Difference("-Infinity", "baseline diverged")
    pairs = [mine[seed] - its[seed] for seed in seeds]
    within = interval(pairs)
    text = f"{fmean(pairs):+.4f}"
    text += f" [{within[0]:+.4f},\N{NO-BREAK SPACE}{within[1]:+.4f}]" if within else ", one seed"
    if within and len(pairs) < max(len(mine), len(its)):
        text += f", {len(pairs)} seeds"
    return Difference(repr(fmean(pairs)), text.replace("-", "−"), p_value(pairs))


# ---- tables -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TableLine:
    """A line of a table."""

    cell: MethodRuns
    name: str  # its name as the baseline of its group
    group: tuple[Any, ...]
    best: bool  # of its group
    edge: str = ""  # options at an edge of the grid that it was chosen from


@dataclass
class Table:
    """Lines that are compared within groups, with any name as the baseline."""

    title: str
    at: str  # which run of the baseline is meant, such as "at the same rate"
    entries: list[TableLine]
    notes: Sequence[str] = ()
    default: Collection[str] = (DEFAULT_BASELINE,)  # names of the baseline to begin with

    @property
    def baselines(self) -> list[str]:
        """Names, the default first."""
        names = dict.fromkeys(entry.name for entry in self.entries)
        return sorted(names, key=lambda name: name not in self.default)

    @functools.cached_property
    def _differences(self) -> list[list[Difference]]:
        """The difference of each line to each baseline, the p-value corrected by Holm's method."""
        cells = {(entry.group, entry.name): entry.cell for entry in self.entries}

        def to(name: str, entry: TableLine) -> Difference:
            baseline = cells.get((entry.group, name))
            return (
                difference(entry.cell, baseline) if baseline else Difference("", f"no {name} here")
            )

        tables = []
        for name in self.baselines:
            found = [to(name, entry) for entry in self.entries]
            corrected = holm(gap.p for gap in found)
            tables.append([x._replace(p=p) for x, p in zip(found, corrected, strict=True)])
        return tables

    @property
    def differences(self) -> list[list[tuple[str, str]]]:
        """The difference of each line to each baseline: what to sort by, and the text.

        A * marks those that hold after Holm's correction for all lines.
        """
        return [
            [(gap.key, f"{gap.text}*" if holds(gap.p) else gap.text) for gap in found]
            for found in self._differences
        ]

    @property
    def verdicts(self) -> list[str]:
        """What the differences to each baseline show, in a few sentences."""
        several = len({entry.group[0] for entry in self.entries}) > 1
        names = []
        for entry in self.entries:
            setting, *rate = entry.group
            at = f" at {rate[0]:g}" if rate else ""
            names.append(f"{entry.name}{at}{f' in {setting}' if several else ''}")
        said = []
        for baseline, found in zip(self.baselines, self._differences, strict=True):
            lines = zip(self.entries, names, found, strict=True)
            others = [(name, x) for entry, name, x in lines if entry.name != baseline and x.key]
            compared = [(name, float(x.key), x.p) for name, x in others]
            said.append(verdict_against(baseline, compared, "lines"))
        return said


def default_baseline(sources: Iterable[Source]) -> set[str]:
    """Label and kind of the method that all sweeps among the sources compare with; or AdamW."""
    labels = {label for x in sources if isinstance(label := x.manifest.get("baseline"), str)}
    rows = (row for source in sources for row in source.rows if {row.label} == labels)
    return next(({row.label, row.family} for row in rows), {DEFAULT_BASELINE})


def tables(
    cells: Iterable[MethodRuns], baseline: Collection[str] = (DEFAULT_BASELINE,)
) -> list[Table]:
    """Tables of methods at their best options, at their best rates, and at equal rates.

    Differences are to the method of one of the names in `baseline`, until another is picked.
    """
    done = [cell for cell in cells if cell.finished]
    kinds = "Each kind of method at its best options and learning rate", "at its best"
    labels = "Each method at its best learning rate", "at its best rate"
    equal = "All methods at equal learning rate", "at the same rate"
    found = [
        _at_the_best(*kinds, done, lambda cell: cell.first.family),
        _at_the_best(*labels, done, lambda cell: cell.label),
        Table(*equal, _entries([(cell, cell.label, (cell.setting, cell.lr)) for cell in done])),
    ]
    # Tables that would have the same lines again are left out.
    families, methods, everything = (len(table.entries) for table in found)
    rates = {(cell.setting, cell.lr) for cell in done}
    several = everything > methods or len(rates) > len({cell.setting for cell in done})
    kept = found[0 if families < methods else 1 : 3 if several else 2]
    return [replace(table, default=baseline) for table in kept]


def _at_the_best(
    title: str, at: str, cells: Iterable[MethodRuns], name: Callable[[MethodRuns], str]
) -> Table:
    """The best runs of each name in each setting, and a note on how they were chosen."""
    groups = _grouped(cells, lambda cell: (cell.setting, name(cell)))
    found = _entries([(best(group), key[1], key[:1]) for key, group in groups.items()])
    entries = [
        replace(entry, edge=_edge(entry.cell, groups[entry.cell.setting, entry.name]))
        for entry in found
    ]
    several = [group for group in groups.values() if len(group) > 1]
    notes = []
    for by, choices in _grouped(several, _selected).items():
        settings = "; ".join(dict.fromkeys(group[0].setting for group in choices))
        how = (
            "by the returned model's loss on another split than the losses shown, of the same runs"
            if by
            else "by the losses shown, as there is no selection loss: this flatters methods with "
            "more settings"
        )
        notes.append(f"{settings}: chosen {how}.")
    if any(entry.edge for entry in entries):
        notes.append(WIDEN)
    return Table(title, at, entries, notes)


def _edge(chosen: MethodRuns, tried: Iterable[MethodRuns]) -> str:
    """The options of the chosen runs that are at an edge of what was tried."""
    return edges(chosen.first.setting_values, (cell.first.setting_values for cell in tried))


def _entries(lines: list[tuple[MethodRuns, str, tuple[Any, ...]]]) -> list[TableLine]:
    """Group by group, the best first."""
    return [
        TableLine(cell, name, group, cell.mean() == here[0][0].mean() < math.inf)
        for group, unsorted in _grouped(lines, lambda line: line[2]).items()
        for here in [sorted(unsorted, key=lambda line: line[0].mean())]
        for cell, name, _ in here
    ]


def best(cells: Sequence[MethodRuns]) -> MethodRuns:
    """The runs with the lowest mean loss over common seeds, by selection loss if all have one."""
    seeds = set.intersection(*(set(cell.runs) for cell in cells))
    which = "selection" if _selected(cells) else "returned"
    return min(cells, key=lambda cell: cell.mean(which, sorted(seeds)))


def _selected(cells: Iterable[MethodRuns]) -> bool:
    return all(loss is not None for cell in cells for loss in cell.losses("selection").values())


# ---- curves and maps ----------------------------------------------------------------------------


def curve_series(cells: Sequence[MethodRuns]) -> list[dict[str, Any]]:
    """One series for each method and rate: means over seeds at each step, and the loss's range.

    A value is None after divergence, or if there is no such number.
    """
    done = [cell for cell in cells if cell.finished]
    groups = _grouped(done, lambda cell: (cell.setting, cell.label))
    rates = {key: best(group).lr for key, group in groups.items()}
    look = looks(list(dict.fromkeys(cell.label for cell in cells)))
    series = []
    for cell in cells:
        by_step = _grouped(itertools.chain(*cell.runs.values()), lambda row: row.step)
        steps = sorted(by_step)
        at = [by_step[step] for step in steps]
        series.append(
            {
                "setting": cell.setting,
                "label": cell.label,
                "look": look[cell.label],
                "lr": cell.lr,
                "best": rates.get((cell.setting, cell.label), cell.lr) == cell.lr,
                "finished": cell.finished,
                "seeds": cell.count,
                "training": sorted({run[0].trained_with for run in cell.runs.values()}),
                "steps": steps,
                "tokens": _over(at, "tokens"),
                "live": _over(at, "live_loss"),
                "returned": _over(at, "returned_loss"),
                "low": _over(at, "returned_loss", min),
                "high": _over(at, "returned_loss", max),
                "gain": _over(at, "gain_mean"),
                "clipped": _over(at, "clipped"),
            }
        )
    return series


def _over(
    groups: list[list[Point]], key: str, how: Callable[[list[float]], float] = fmean
) -> list[float | None]:
    values = [[getattr(row, key) for row in group] for group in groups]
    lost = {None, math.inf}
    return [None if lost & {*here} else _rounded(how(here)) for here in values]


def _rounded(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def map_points(cells: Iterable[MethodRuns]) -> list[dict[str, Any]]:
    """The points of kinds of methods with two varied options or more, most points first."""
    done = [cell for cell in cells if cell.finished]
    found = []
    groups = _grouped(done, lambda cell: (cell.setting, cell.first.family))
    for (setting, family), group in groups.items():
        axes = [axis for axis in AXES if len({cell.first.options[axis] for cell in group}) > 1]
        if len(axes) > 1:
            points = []
            for cell in group:
                at = [cell.first.options[axis] for axis in axes]
                points.append({"at": at, "loss": _rounded(cell.mean()), "seeds": cell.count})
            found.append({"setting": setting, "family": family, "axes": axes, "points": points})
    return sorted(found, key=lambda one: -len(one["points"]))


# ---- configurations -----------------------------------------------------------------------------

Line = tuple[str, list[str]]  # a key, and its value in each folder


def configurations(sources: Iterable[Source]) -> tuple[list[Line], list[Line]]:
    """The keys that differ between folders or within one, and the other keys.

    A key that some folders lack counts as equal, unless it differs among those that have it.
    """
    columns: list[dict[str, str]] = []
    varied: set[str] = set()
    for source in sources:
        made = {key: source.manifest.get(key) for key in ("versions", "hardware", "git_commit")}
        facts = {k: shown(v, "not set") for k, v in source.configuration.items()}
        found: dict[str, dict[str, None]] = {}  # of the rows: ordered sets
        for row in source.rows:
            own = {"setting": row.setting, "steps": row.steps, "seed": row.seed}
            for key, value in (own | row.setting_values).items():
                if value is not None:
                    found.setdefault(key, {})[shown(value)] = None
        varied |= {key for key, values in found.items() if len(values) > 1}
        facts |= {key: ", ".join(values) for key, values in found.items()}
        columns.append(facts | {key: shown(value) for key, value in flat(made).items() if value})
    differing: list[Line] = []
    rest: list[Line] = []
    for key in dict.fromkeys(itertools.chain(*columns)):
        if key != "out":
            values = [facts.get(key, "") for facts in columns]
            differs = key in varied or len({facts[key] for facts in columns if key in facts}) > 1
            (differing if differs else rest).append((key, values))
    return differing, rest


# ---- the page -----------------------------------------------------------------------------------


def report_command(options: ReportOptions, console: Console) -> None:
    """Write the page; print its first table and its path.

    Raises:
        InputError: a folder cannot be read, or the page cannot be written.
    """
    out = options.out
    if out.suffix != ".html" or out.is_dir():
        raise InputError(f"out: {out} is no name of a page; give a name that ends in .html")
    sources = [read(folder) for folder in find(options.runs)]
    tell_apart(sources)
    cells = gather(sources)
    if not cells:
        raise InputError(f"runs: there is no evaluation in {sources[0].folder} yet; train longer")
    found = tables(cells, default_baseline(sources))
    names = _folder_names(sources)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        render(
            out,
            "paceline.study",
            "explore.html.j2",
            name=_title(names),
            cells=cells,
            tables=found,
            names=names,
            sources=[(name, s, _links(out, s)) for name, s in zip(names, sources, strict=True)],
            configurations=configurations(sources),
            data={
                "coincide": COINCIDE,
                "tables": [table.differences for table in found],
                "verdicts": [table.verdicts for table in found],
                "curves": curve_series(cells),
                "maps": map_points(cells),
            },
            # A third of its size; the browser unpacks it.
            plotly=base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode(),
        )
    except OSError as error:
        raise InputError(f"out: cannot write {out}: {error.strerror}; name another") from error
    for said in found[0].verdicts[:1]:
        console.print(said, style="bold", highlight=False, markup=False)
    console.print(_printed(found[0]))
    for name, source in zip(names, sources, strict=True):
        for note in source.notes:
            console.print(f"{name}: {note}", style="yellow", highlight=False, markup=False)
    size = out.stat().st_size / 1e6
    console.print(f"Report: {out} ({size:.1f} MB)", highlight=False, markup=False, soft_wrap=True)


def _folder_names(sources: Sequence[Source]) -> list[str]:
    """Names of the folders, relative to their common parent."""
    folders = [source.folder.resolve() for source in sources]
    common = os.path.commonpath([folder.parent for folder in folders])
    return [folder.relative_to(common).as_posix() for folder in folders]


def _title(names: Sequence[str]) -> str:
    """The title of the page: the names of its folders, or of the first and how many others."""
    return named(names) if len(names) <= NAMED else f"{names[0]} and {len(names) - 1} others"


def _links(out: Path, source: Source) -> dict[str, str]:
    """Files of a folder, by name: addresses relative to the page."""
    there = [name for name in LINKED_FILES if (source.folder / name).exists()]
    folder = Path(os.path.relpath(source.folder.resolve(), out.resolve().parent))
    return {name: quote((folder / name).as_posix()) for name in there}


def _printed(table: Table) -> Printed:
    printed = Printed(title=f"{table.title}, nats a token", box=box.SIMPLE_HEAD)
    for name in ("setting", "method", "rate", "seeds", "live", "returned"):
        printed.add_column(name, justify="right" if name in ("rate", "seeds") else "left")
    printed.add_column(f"− {next(iter(table.baselines), '')}")
    for entry, (_, gap) in zip(table.entries, next(iter(table.differences), ()), strict=True):
        cell = entry.cell
        values = (cell.lr, cell.count, cell.show("live"), cell.show(), gap)
        label = f"{cell.label} ({entry.edge})" if entry.edge else cell.label
        parts = [cell.setting, label, *map(shown, values)]
        printed.add_row(*map(Text, parts), style="bold" if entry.best else "")
    return printed
