"""`paceline report`: what is read, what is computed of it, and the page in a browser."""

import html.parser
import itertools
import json
import math
import re
import shutil
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from urllib.parse import unquote

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("plotly")

from rich.console import Console

from paceline.cli import _parse
from paceline.study.explore import (
    WORDS,
    Report,
    best,
    configurations,
    curves,
    difference,
    find,
    gather,
    maps,
    read,
    report,
    tables,
    tell_apart,
)
from paceline.train import InputError
from paceline.train.methods import Method, parse_method
from paceline.train.recipe import Recipe, read_recipe

EVIL = '</script><img src=x onerror="alert(1)"> <b>%{y}</b> & {{ 7 * 7 }} [red]'
STEPS = (0, 50, 100)


def rows_of(text, lr, seed, losses, *, setting=None, selection=None, trained_with=None):
    """A run's rows as sweeps write them; losses: (live, returned) at STEPS, None for diverged."""
    method = parse_method(text, lr=lr, c=1.0, kappa=0.3, g=1.0)
    run = f"{method.label} lr={lr:g} seed={seed} {setting}"
    rows = []
    for step, (live, returned) in zip(STEPS, losses, strict=False):
        row = {"run": run, "label": method.label, **method.model_dump(), "seed": seed}
        row |= {"trained_with": trained_with or run, "seconds": 1.0, "train_loss": live}
        row |= {"step": step, "tokens": step * 128, "live_loss": live, "returned_loss": returned}
        if method.name == "pace":
            row |= {"gain_mean": 0.25 + step / 1000, "clipped": 0.5}
        if setting is not None:
            row |= {"setting": setting, "steps": STEPS[-1], "selection_loss": selection}
        rows.append(row)
    return rows


def ending(live, returned):
    return [(4.0, 4.0), (live + 0.5, returned + 0.5), (live, returned)]


def write(folder, rows, **manifest):
    folder.mkdir(parents=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


FACTS = {
    "command": "paceline sweep tiny --seeds 0,1",
    "started": "2026-11-22T10:00:00+00:00",
    "versions": {"paceline": "0.1.0", "torch": "2.13.0"},
    "hardware": {"cpu": "one", "cores": 2},
}


def write_sweep(folder, seeds=(0, 1), extra=()):
    """Two settings; pace over c, κ and rate, with a diverged corner; adamw; an ema of adamw."""
    rows = list(extra)
    for number, setting in enumerate(("tiny-sft on smol", "tiny-pretrain on nano")):
        for lr, seed in itertools.product((0.003, 0.01), seeds):
            base = 2.0 + number + 10 * lr + seed / 100
            adamw = rows_of("adamw", lr, seed, ending(base, base), setting=setting, selection=base)
            rows += adamw
            rows += rows_of(
                "ema",
                lr,
                seed,
                ending(base, base - 0.1),
                setting=setting,
                selection=base - 0.1,
                trained_with=adamw[0]["run"],
            )
            for c, kappa in itertools.product((1, 10), (0.3, 0.7)):
                end = base - 0.05 * c * kappa * (1 + seed)
                losses = ending(base, end)
                if c == 1 and lr == 0.01:
                    losses = [(4.0, 4.0), (None, None), (None, None)] if seed else losses
                text = f"pace:c={c}:kappa={kappa}"
                rows += rows_of(text, lr, seed, losses, setting=setting, selection=losses[-1][1])
    configuration = {"seeds": list(seeds), "lr": [0.003, 0.01], "batch": 8}
    return write(folder, rows, **FACTS, configuration=configuration, failed={"x": "<i>no</i>"})


def write_comparison(folder, steps=100, seeds=(0,), batch=4, **losses):
    """By default adamw and ema; `width` and `layers` name the setting."""
    losses = losses or {"adamw": 3.0, "ema": 2.9}
    rows = []
    for seed, (name, loss) in itertools.product(seeds, losses.items()):
        rows += rows_of(name, 0.003, seed, ending(loss, loss))
    configuration = {"width": 64, "layers": 2, "batch": batch, "steps": 2000, "lr": [0.003]}
    facts = {**FACTS, "command": "paceline compare", "text": "books", "steps": steps}
    return write(folder, rows, **facts, configuration=configuration)


def write_run(folder, method="pace", seed=0, steps=20, last=20, **changes):
    """As `paceline train` leaves it: the Trainer's log, the recipe, the manifest."""
    values = {**read_recipe("demo-sft"), "method": method, "seed": seed, "steps": steps, **changes}
    recipe = Recipe(**values)
    lines = [{"eval_live_loss": 7.5, "eval_loss": 7.5, "eval_num_tokens": 0.0, "step": 0}]
    for step in (10, 20):
        if step <= last:
            lines.append({"loss": 6.8, "gain_mean": 0.9, "clipped": 0.5, "step": step})
            loss = {"eval_live_loss": 7 - step / 20, "eval_loss": 6.9 - step / 20}
            lines.append({**loss, "eval_num_tokens": 400.0 * step, "step": step})
    facts = {**FACTS, "command": "paceline train demo-sft", "steps": steps}
    write(folder, lines, **facts, recipe=json.loads(recipe.model_dump_json()))
    (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    return folder


def cells_of(*folders):
    sources = [read(folder) for folder in find(folders)]
    tell_apart(sources)
    return gather(sources), [f"{s.folder.name}: {note}" for s in sources for note in s.notes]


def cell(cells, label, lr=0.003, setting=""):
    [found] = [c for c in cells if (c.label, c.lr) == (label, lr) and setting in c.setting]
    return found


# ---- reading ----------------------------------------------------------------------------------


def test_three_kinds_of_folders_are_read_as_one(tmp_path):
    write_sweep(tmp_path / "a/sweep")
    write_comparison(tmp_path / "b/deep/cmp")
    write_run(tmp_path / "run")
    (tmp_path / "run/checkpoints").mkdir()
    folders = find([tmp_path, tmp_path / "run", tmp_path / "b/../b"])
    assert [f.name for f in folders] == ["sweep", "cmp", "run"]
    cells, notes = cells_of(tmp_path)
    assert notes == ["sweep: x failed: <i>no</i>"]
    assert len(cells) == 2 * 2 * 6 + 2 + 1
    settings = {c.setting for c in cells}
    assert settings == {
        *("tiny-sft on smol", "tiny-pretrain on nano", "GPT-2 64×2 on books", "llama on chitchat")
    }
    run = cell(cells, "pace c=1 κ=0.3", setting="llama")
    [rows] = run.runs.values()
    assert [row.step for row in rows] == [0, 10, 20]
    assert [row.tokens for row in rows] == [0, 4000, 8000]
    assert [row.gain_mean for row in rows] == [None, 0.9, 0.9]
    assert (run.losses("live"), run.losses()) == ({0: 6.0}, {0: 5.9})
    assert (run.first.family, run.lr, run.first.options["kappa"]) == ("pace", 0.003, 0.3)
    assert set(run.first.options) == set(Method.model_fields) - set(WORDS)
    assert cell(cells, "pace c=1 κ=0.3", 0.01, "sft").losses()[1] == math.inf
    assert cell(cells, "ema κ=0.3", setting="books").losses("selection") == {0: None}


@pytest.mark.parametrize(
    ("text", "family"),
    [
        ("adamw", "adamw"),
        ("ema:twin:kappa=0.5", "ema twin"),
        ("pullback:muon:c=2:gain=own", "pullback muon gain=own"),
        ("pace:c=1:state=bf16", "pace state=bf16"),
    ],
)
def test_a_family_is_a_method_without_its_numbers(tmp_path, text, family):
    source = read(write(tmp_path / "x", rows_of(text, 0.01, 0, ending(2, 2), setting="s")))
    assert source.rows[0].family == family


def test_runs_of_one_setting_are_pooled_and_of_others_are_not(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / f"pace{seed}", seed=seed)
    write_run(tmp_path / "ema", "ema", micro_batch=4)
    write_run(tmp_path / "longer", batch=32)
    cells, _ = cells_of(tmp_path)
    assert {(c.setting, c.label, c.count) for c in cells} == {
        ("llama on chitchat, batch 16", "pace c=1 κ=0.3", 2),
        ("llama on chitchat, batch 16", "ema κ=0.3", 1),
        ("llama on chitchat, batch 32", "pace c=1 κ=0.3", 1),
    }


def test_sweeps_of_one_name_and_different_tasks_are_told_apart(tmp_path):
    for name, tasks in (
        ("a", {"s": {"recipe": {"task": "sft", "batch": 8}}}),
        ("b", {"s": {"recipe": {"task": "sft"}}}),
        ("c", {}),
    ):
        write(tmp_path / name, rows_of("ema", 0.01, 0, ending(2, 2), setting="s"), tasks=tasks)
    cells, _ = cells_of(tmp_path)
    assert {c.setting for c in cells} == {"s, recipe.batch 8", "s, recipe.batch default", "s"}


def test_unfinished_torn_and_repeated_runs_are_noted(tmp_path):
    write_run(tmp_path / "0", last=10)
    path = tmp_path / "0/metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"eval_loss": 3, "s\xc3')
    write_run(tmp_path / "1", seed=1)
    write_run(tmp_path / "2", seed=1)
    write_run(tmp_path / "3", "ema", last=10)
    cells, notes = cells_of(tmp_path)
    assert notes == [
        "0: the last line of metrics.jsonl is torn, and was passed over",
        "0: unfinished, and not in the tables: 0 ends at step 10",
        "2: in an earlier folder too, and not used: 2",
        "3: unfinished, and not in the tables: 3 ends at step 10",
    ]
    assert [(c.label, list(c.runs), c.finished) for c in cells] == [
        ("pace c=1 κ=0.3", [1], True),
        ("ema κ=0.3", [0], False),
    ]
    [table] = tables(cells)
    assert [entry.cell.label for entry in table.entries] == ["pace c=1 κ=0.3"]
    assert [series["finished"] for series in curves(cells)] == [True, False]


def test_a_run_that_stopped_where_it_diverged_is_finished(tmp_path):
    rows = rows_of("ema", 0.01, 0, [(4.0, 4.0), (None, None)], setting="s")
    [found], notes = cells_of(write(tmp_path / "x", rows))
    assert (found.finished, found.show(), notes) == (True, "diverged", [])


def test_a_run_that_has_only_begun_has_curves_and_no_table(tmp_path):
    folder = write_run(tmp_path / "run", last=10)
    report(Report(runs=(folder,), out=tmp_path / "x.html"), Console(quiet=True))
    text = (tmp_path / "x.html").read_text(encoding="utf-8")
    assert "No run is finished yet." in text
    assert json.loads(Parsed(text).scripts["data"])["curves"][0]["steps"] == [0, 10]


def break_manifest(folder):
    (folder / "manifest.json").write_text('{"command": ')


def break_line(folder):
    text = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join([text[0], '{"run": \n', *text[1:]]))


def edit_row(**values):
    def edit(folder):
        first, *others = (folder / "metrics.jsonl").read_text().splitlines()
        row = {k: v for k, v in {**json.loads(first), **values}.items() if v != "gone"}
        (folder / "metrics.jsonl").write_text("\n".join([json.dumps(row), *others]) + "\n")

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: shutil.rmtree(f), "there is no folder .*cmp"),
        (lambda f: (f / "metrics.jsonl").unlink(), "no metrics.jsonl in .*cmp"),
        (lambda f: (f / "manifest.json").unlink(), "cannot read .*manifest.json: No such file"),
        (break_manifest, "manifest.json is not JSON .*leave out"),
        (lambda f: (f / "manifest.json").write_text("[1]"), "manifest.json is not a JSON object"),
        (break_line, "metrics.jsonl, line 2 is not a JSON object .*mend or delete"),
        (lambda f: (f / "metrics.jsonl").write_bytes(b"\xff\n"), "metrics.jsonl, line 1 is not"),
        (lambda f: (f / "metrics.jsonl").write_text("[]\n"), "line 1 is not a JSON object"),
        (edit_row(live_loss="gone"), "line 1: live_loss: Field required; .*no evaluation"),
        (edit_row(lr="fast"), "line 1: lr: Input should be a valid number"),
        (lambda f: (f / "metrics.jsonl").write_text(""), "there is no evaluation in .*cmp"),
    ],
)
def test_what_cannot_be_read_is_named_in_one_line(tmp_path, damage, message):
    folder = write_comparison(tmp_path / "cmp")
    damage(folder)
    with pytest.raises(InputError, match=message) as caught:
        report(Report(runs=(folder,), out=tmp_path / "report.html"), Console(quiet=True))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "report.html").exists()


def test_a_recipe_that_cannot_be_used_is_named(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "recipe.yaml").write_text("task: sft\nmodle: x\n")
    with pytest.raises(InputError, match=r"recipe\.yaml cannot be used: .*did you mean 'model'"):
        read(folder)


@pytest.mark.parametrize("out", ["page", "folder.html", "cmp/metrics.jsonl"])
def test_the_page_replaces_no_folder_and_no_data(tmp_path, out):
    folder = write_comparison(tmp_path / "cmp")
    (tmp_path / "folder.html").mkdir()
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(InputError, match="out: .* is no name of a page"):
        report(Report(runs=(folder,), out=tmp_path / out), Console(quiet=True))
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_options_are_parsed_as_the_command_line_gives_them():
    options = _parse("report", Report, ["a", "b/c", "--out", "x.html"])
    assert options == Report(runs=(Path("a"), Path("b/c")), out=Path("x.html"))
    with pytest.raises(InputError, match="at least one"):
        report(Report(runs=()), Console(quiet=True))


# ---- statistics -------------------------------------------------------------------------------


def cell_from(folder, method, losses, **more):
    """A cell from returned losses by seed."""
    rows = [
        row
        for seed, loss in losses.items()
        for row in rows_of(method, 0.01, seed, [*ending(9, 9)[:2], (9, loss)], setting="s", **more)
    ]
    [found], _ = cells_of(write(folder, rows))
    return found


def resampled(pairs):
    """Ends of the bootstrap interval of the mean, from its definition."""
    if len(pairs) > 5:
        means = np.random.default_rng(5).choice(pairs, size=(200_000, len(pairs))).mean(1)
    else:
        means = [fmean(resample) for resample in itertools.product(pairs, repeat=len(pairs))]
    return list(np.quantile(means, [0.025, 0.975], method="inverted_cdf"))


def numbers(text):
    """Those in a cell of a table."""
    return [float(x) for x in re.findall(r"[+-]\d+\.\d+", text.replace("−", "-"))]


@pytest.mark.parametrize("count", [2, 3, 5, 9])
def test_differences_are_paired_and_have_a_bootstrap_interval(tmp_path, count):
    mine, its = np.random.default_rng(count).normal(5, 0.1, size=(2, count))
    a = cell_from(tmp_path / "a", "ema", dict(enumerate(mine)))
    b = cell_from(tmp_path / "b", "adamw", {**dict(enumerate(its)), 77: 1.0})
    key, text = difference(a, b)
    assert float(key) == pytest.approx(fmean(mine - its))
    expected = [fmean(mine - its), *resampled(mine - its)]
    assert numbers(text) == pytest.approx(expected, abs=6e-5 if count < 7 else 2e-3)
    assert text.endswith(f"], {count} seeds")
    assert numbers(difference(b, a)[1])[0] == pytest.approx(-expected[0], abs=6e-5)


@pytest.mark.parametrize(
    ("mine", "its", "key", "text"),
    [
        ({0: 2.0}, {0: 2.5}, "-0.5", "−0.5000, one seed"),
        ({0: 2.0}, {1: 2.5}, "", "no seed in common"),
        ({0: None, 1: 2.0}, {0: 2.0, 1: 2.0}, "Infinity", "diverged"),
        ({0: 2.0, 1: 2.0}, {0: 2.0, 1: None}, "-Infinity", "baseline diverged"),
        ({0: None}, {0: None}, "Infinity", "diverged"),
        ({0: math.nan}, {0: 2.0}, "Infinity", "diverged"),
    ],
)
def test_differences_that_have_no_interval(tmp_path, mine, its, key, text):
    a, b = cell_from(tmp_path / "a", "ema", mine), cell_from(tmp_path / "b", "adamw", its)
    assert difference(a, b) == (key, text)
    assert difference(b, b) == ("0", "baseline")


def test_the_best_is_chosen_by_the_selection_loss_over_common_seeds(tmp_path):
    good = cell_from(tmp_path / "a", "pace:c=1", {0: 2.0, 1: 2.0}, selection=3.0)
    chosen = cell_from(tmp_path / "b", "pace:c=2", {0: 2.5, 1: 2.5}, selection=2.9)
    assert best([good, chosen]) is chosen
    bare = [cell_from(tmp_path / n, f"pace:c={c}", losses) for n, c, losses in (
        ("c", 1, {0: 2.0, 1: 4.0}), ("d", 2, {0: 2.1}), ("e", 3, {0: None, 1: 0.0}))]  # fmt: skip
    for one in bare:  # without selection losses, as of comparisons
        for rows in one.runs.values():
            rows[:] = [row.model_copy(update={"selection_loss": None}) for row in rows]
    assert best(bare) is bare[0]  # over seed 0
    assert best(bare[1:]) is bare[1]
    assert best([chosen, bare[1]]) is bare[1]  # where one has none, by what is shown


def test_tables_compare_the_best_and_the_equal(tmp_path):
    cells, _ = cells_of(write_sweep(tmp_path / "sweep"), write_comparison(tmp_path / "cmp"))
    kinds, methods, equal = tables(cells)
    assert [len(table.entries) for table in (kinds, methods, equal)] == [8, 14, 26]
    for table in (kinds, methods, equal):
        assert table.baselines[0] == "adamw"
        for name, differences in zip(table.baselines, table.differences, strict=True):
            for entry, shown in zip(table.entries, differences, strict=True):
                there = [b for b in table.entries if (b.group, b.name) == (entry.group, name)]
                expected = [difference(entry.cell, b.cell) for b in there]
                assert [shown] == (expected or [("", f"no {name} here")])
    first = kinds.entries[0]
    assert (first.cell.setting, first.cell.label) == ("tiny-sft on smol", "pace c=10 κ=0.7")
    assert (first.name, first.best, first.cell.lr) == ("pace", True, 0.003)
    # pace at c=10, κ=0.7 is lower than adamw by 0.35 with seed 0 and 0.7 with seed 1
    key, text = kinds.differences[0][0]
    assert float(key) == pytest.approx(-0.525)
    assert numbers(text) == pytest.approx([-0.525, *resampled([-0.35, -0.7])], abs=6e-5)
    assert kinds.notes == [
        "tiny-sft on smol; tiny-pretrain on nano: chosen by the returned model's loss on another "
        "split than the one that is shown."
    ]
    lost = [entry for entry in equal.entries if entry.cell.show() == "diverged in 1 of 2"]
    assert {entry.cell.label for entry in lost} == {"pace c=1 κ=0.3", "pace c=1 κ=0.7"}
    for group in {entry.group for entry in equal.entries}:
        means = [entry.cell.mean() for entry in equal.entries if entry.group == group]
        assert means == sorted(means)
    assert sum(entry.best for entry in equal.entries) == 5


def test_a_choice_by_the_numbers_that_are_shown_is_said_to_be_one(tmp_path):
    rows = [
        *rows_of("ema", 0.01, 0, ending(2, 2)),
        *rows_of("ema", 0.03, 0, ending(3, 3)),
        *rows_of("adamw", 0.01, 0, ending(3, 3)),
    ]
    cells, _ = cells_of(write(tmp_path / "x", rows))
    methods, equal = tables(cells)
    assert "x: chosen by the very numbers that are shown" in methods.notes[0]
    assert [entry.cell.lr for entry in methods.entries] == [0.01, 0.01]
    texts = dict(zip([e.cell.lr for e in equal.entries], equal.differences[0], strict=True))
    assert texts[0.03] == ("", "no adamw here")


def test_curves_are_means_with_ranges_up_to_divergence(tmp_path):
    cells, _ = cells_of(write_sweep(tmp_path / "sweep"))
    series = {(s["setting"][:8], s["label"], s["lr"]): s for s in curves(cells)}
    one = series["tiny-sft", "pace c=10 κ=0.7", 0.003]
    assert one["steps"] == list(STEPS)
    assert one["tokens"] == [0, 6400, 12800]
    ends = [2.03 - 0.35, 2.04 - 0.7]
    assert one["returned"] == pytest.approx([4, fmean(ends) + 0.5, fmean(ends)])
    assert (one["low"][-1], one["high"][-1]) == pytest.approx((ends[1], ends[0]))
    assert one["live"][-1] == pytest.approx(2.035)
    assert one["gain"] == pytest.approx([0.25, 0.3, 0.35])
    assert (one["seeds"], one["best"]) == (2, True)
    assert not series["tiny-sft", "pace c=10 κ=0.7", 0.01]["best"]
    lost = series["tiny-sft", "pace c=1 κ=0.3", 0.01]
    assert (lost["returned"], lost["live"], lost["low"]) == ([4, None, None],) * 3
    adamw, ema = (series["tiny-sft", label, 0.01] for label in ("adamw", "ema κ=0.3"))
    assert adamw["training"] == ema["training"] != one["training"]
    assert ema["gain"] == [None] * 3


def test_maps_are_of_what_varies_in_two_options(tmp_path):
    cells, _ = cells_of(write_sweep(tmp_path / "sweep"))
    found = maps(cells)
    assert [(m["setting"], m["family"]) for m in found] == [
        ("tiny-sft on smol", "pace"),
        ("tiny-pretrain on nano", "pace"),
    ]
    assert found[0]["axes"] == ["lr", "c", "kappa"]
    points = {tuple(p["at"]): p["loss"] for p in found[0]["points"]}
    assert points[0.003, 10, 0.7] == pytest.approx(1.51)
    assert points[0.01, 1, 0.3] is None
    assert len(points) == 8


def test_configurations_differ_between_folders_or_within_one(tmp_path):
    write_comparison(tmp_path / "a", batch=4)
    write_comparison(tmp_path / "b", batch=8)
    write_run(tmp_path / "c")
    sources = [read(folder) for folder in find([tmp_path])]
    tell_apart(sources)
    differing, rest = map(dict, configurations(sources))
    assert differing["batch"] == ["4", "8", "16"]
    assert differing["name"] == ["adamw, ema", "adamw, ema", "pace"]
    assert differing["setting"][0] == "GPT-2 64×2 on books, batch 4"
    assert rest["width"] == ["64", "64", ""]
    assert rest["lr"] == ["0.003"] * 3
    assert rest["versions.torch"] == ["2.13.0"] * 3
    assert rest["config.hidden_size"] == ["", "", "128"]
    assert not differing.keys() & rest.keys()
    assert dict(configurations(sources[:1])[0]) == {"name": ["adamw, ema"]}


# ---- the page ---------------------------------------------------------------------------------


class Parsed(html.parser.HTMLParser):
    """Tags, links, and the texts of scripts and of table cells."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.scripts, self.cells = [("", {})], [], {}, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.links += [value for name, value in attributes if name == "href"]

    def handle_data(self, text):
        tag, attributes = self.tags[-1]
        if tag == "script":
            self.scripts[attributes.get("id")] = self.scripts.get(attributes.get("id"), "") + text
        if tag == "td":
            self.cells.append(text)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A page over all kinds of folders, with a label and a setting that would break out."""
    folder = tmp_path_factory.mktemp("made")
    extra = []
    for seed in (0, 1):
        extra += rows_of("adamw", 0.003, seed, ending(2.5, 2.4), setting="tiny-sft on smol")
        extra += rows_of("adamw", 0.003, seed, ending(2.5, 2.4), setting=EVIL)
    for row in extra:
        row |= {"label": EVIL, "name": EVIL, "run": f"{EVIL} {row['seed']}"}
    write_sweep(folder / "runs" / 'a "sweep" & <b>', extra=extra)
    write_comparison(folder / "runs/cmp")
    write_run(folder / "runs/run")
    out = folder / "pages/page.html"
    with (folder / "said").open("w") as said:
        console = Console(file=said, width=200)
        report(Report(runs=(folder / "runs",), out=out), console)
    text = out.read_text(encoding="utf-8")
    return SimpleNamespace(
        out=out, text=text, parsed=Parsed(text), said=(folder / "said").read_text()
    )


def test_nothing_that_users_wrote_becomes_markup(made):
    assert EVIL not in made.text
    assert made.text.count("</script>") == 3
    assert not [tag for tag, _ in made.parsed.tags if tag in ("img", "b")]
    assert not [tag for tag, values in made.parsed.tags if "src" in values or tag == "link"]
    data = json.loads(made.parsed.scripts["data"])
    assert EVIL in {series["label"] for series in data["curves"]}
    assert EVIL in made.parsed.cells[0] + "".join(made.parsed.cells)
    assert "NaN" not in made.parsed.scripts["data"]


def test_the_page_is_light_and_its_links_lead_to_the_data(made):
    assert 1e6 < made.out.stat().st_size < 3e6
    assert len(made.parsed.links) == 2 + 2 + 3
    for link in made.parsed.links:
        assert not link.startswith("/")
        assert (made.out.parent / unquote(link)).is_file()
    assert [path.name for path in made.out.parent.iterdir()] == ["page.html"]


def test_the_terminal_shows_the_first_table_and_where_the_page_is(made):
    lines = made.said.splitlines()
    assert "Each kind of method at its best" in lines[0]
    [line] = [line for line in lines if "tiny-sft" in line and "pace c=10 κ=0.7" in line]
    assert "−0.5250 [−0." in line
    assert "x failed: <i>no</i>" in made.said
    assert "[red]" in made.said
    assert lines[-1].startswith(f"Report: {made.out} (2.")


def test_a_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    folder = write_comparison(tmp_path / "cmp")
    (tmp_path / "report.html").write_text("before")

    def full(self, *_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(InputError, match="cannot write .*No space left"):
        report(Report(runs=(folder,), out=tmp_path / "report.html"), Console(quiet=True))
    assert (tmp_path / "report.html").read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cmp", "report.html"]


# ---- in a browser -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("needs Chromium")
    with playwright.sync_playwright() as running:
        started = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def opened(browser, made):
    """The page where there is no network, and what went wrong on it."""
    context = browser.new_context(offline=True, viewport={"width": 1280, "height": 900})
    page = context.new_page()
    wrong = []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: wrong.append("dialog"))
    page.on("request", lambda r: r.url.startswith(("file:", "blob:")) or wrong.append(r.url))
    page.goto(made.out.as_uri())
    page.wait_for_selector("#map .heatmaplayer image", timeout=20_000)
    yield page, wrong
    context.close()


@pytest.fixture
def page(opened):
    page, wrong = opened
    yield page
    assert wrong == []


def column(table, number):
    return table.locator(f"tbody tr:visible > :nth-child({number})").all_inner_texts()


def test_tables_sort_filter_and_change_their_baseline(page):
    table = page.locator(".results").last
    returned = table.locator("th").nth(5)

    def keys(column=6):
        return table.locator(f"td:nth-child({column})").evaluate_all(
            "cells => cells.map(cell => cell.dataset.sort).filter(key => key).map(Number)"
        )

    assert returned.get_attribute("aria-sort") == "none"
    returned.locator("button").click()
    up = keys()
    assert up == sorted(up)
    assert up[-1] == math.inf
    assert returned.get_attribute("aria-sort") == "ascending"
    returned.locator("button").press("Enter")
    assert keys() == up[::-1]
    assert returned.get_attribute("aria-sort") == "descending"
    table.locator("th").nth(6).locator("button").click()
    assert keys(7) == sorted(keys(7))
    assert column(table, 7)[-1] == "no adamw here"
    table.locator("th").nth(1).locator("button").press("Space")
    labels = column(table, 2)
    assert labels == sorted(labels) != []
    assert returned.get_attribute("aria-sort") == "none"

    table.locator("input").fill("pace  0.01 NANO")
    assert {tuple(x) for x in zip(column(table, 1), column(table, 3), strict=True)} == {
        ("tiny-pretrain on nano", "0.01")
    }
    assert table.locator("[role=status]").inner_text().startswith("4 of ")
    table.locator("select").select_option(label="pace c=10 κ=0.3, at the same rate")
    assert table.locator("th").nth(6).inner_text().strip().startswith("returned − pace c=10 κ=0.3")
    shown = dict(zip(column(table, 2), column(table, 7), strict=True))
    assert shown["pace c=10 κ=0.3"] == "baseline"
    assert shown["pace c=1 κ=0.7"] == "diverged"
    assert shown["pace c=10 κ=0.7"].startswith("−0.3000")  # 0.05·10·0.4 · (1 + 2)/2


def test_curves_can_be_hidden_and_follow_their_controls(page):
    visible = "document.getElementById('curves')._fullData.filter(t => t.visible === true).length"
    names = page.locator("#curves .legendtext").all_text_contents()
    assert f"{EVIL}, 0.003" in names
    before = page.evaluate(visible)
    page.locator("#curves .legendtoggle").nth(names.index("pace c=10 κ=0.7, 0.003")).click()
    page.wait_for_function(f"{visible} === {before - 5}")  # band, returned, live, gain, clipped
    caption = page.locator("#curve-caption")
    assert caption.inner_text() == "tiny-sft on smol, each method at its best learning rate"
    page.select_option("#curve-rate", label="0.01")
    page.select_option("#curve-x", label="tokens")
    assert caption.inner_text() == "tiny-sft on smol, learning rate 0.01"
    traces = page.evaluate(
        "document.getElementById('curves').data.map(t => [t.name, t.x, t.y, t.line.dash])"
    )
    ema = [trace for trace in traces if trace[0] == "ema κ=0.3"]
    assert [trace[3] for trace in ema] == ["solid", "dot"]  # adamw's own live is its returned
    assert ema[0][1] == [0, 6400, 12800]
    assert ema[0][2] == pytest.approx([4, 2.505, 2.005])
    page.select_option("#curve-setting", label=EVIL)
    assert caption.inner_text() == f"{EVIL}, learning rate 0.003"
    page.select_option("#curve-setting", label="llama on chitchat")
    assert page.locator("#curve-rate option").all_inner_texts() == ["0.003"]


def test_the_map_is_drawn_with_its_best_and_its_diverged(page):
    drawn = (
        "(({data, layout}) => [data[0].x, data[0].y, data[0].text, data[1].text, "
        "layout.shapes.map(s => [s.x0, s.y0])])(document.getElementById('map'))"
    )
    page.select_option("#map-setting", label="tiny-sft on smol")
    assert page.locator("#map-caption").inner_text() == "tiny-sft on smol: pace, kappa 0.7"
    x, y, text, lost, frames = page.evaluate(drawn)
    assert (x, y) == (["0.003", "0.01"], ["1", "10"])
    assert float(text[0].pop(0)) == pytest.approx(1.9825, abs=6e-4)
    assert text == [[""], ["★ 1.510", "1.580"]]
    assert lost == [["", "✕"], ["", ""]]
    assert frames == [[-0.5, 0.5]]
    page.select_option("#map-fixed-2", label="0.3")
    assert page.evaluate(drawn)[2][1] == ["★ 1.810", "1.880"]
    page.select_option("#map-y", label="lr")  # which x had
    assert page.eval_on_selector("#map-x", "x => x.value") == '"c"'
    assert page.evaluate(drawn)[0] == ["1", "10"]


@pytest.mark.parametrize(
    ("scheme", "ink", "behind"),
    [("light", "#1b1f24", "rgb(255, 255, 255)"), ("dark", "#e4e8ed", "rgb(20, 24, 29)")],
)
def test_a_phone_scrolls_tables_and_not_the_page(page, scheme, ink, behind):
    page.set_viewport_size({"width": 390, "height": 844})
    page.emulate_media(color_scheme=scheme)
    page.wait_for_function(f"document.getElementById('curves').layout.font.color === '{ink}'")
    page.wait_for_function("document.getElementById('curves').layout.legend.orientation === 'h'")
    page.wait_for_function("document.querySelector('#curves svg').clientWidth < 390")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    box = page.locator(".results .wide").first
    assert box.evaluate("box => box.scrollWidth > box.clientWidth")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == behind


def test_paper_has_whole_tables_no_controls_and_light_charts(page):
    page.set_viewport_size({"width": 390, "height": 844})
    page.emulate_media(color_scheme="dark")
    table = page.locator(".results").last
    table.locator("input").fill("nothing like this")
    assert column(table, 2) == []
    page.evaluate(
        "addEventListener('beforeprint', () => window.printed = "
        "[document.getElementById('curves').layout.width, "
        "document.getElementById('curves').layout.font.color])"
    )
    assert page.pdf(format="A4").startswith(b"%PDF")
    assert page.evaluate("window.printed") == [680, "#1b1f24"]
    assert page.evaluate("document.getElementById('curves').layout.width") is None
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 700, "height": 1000})
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert len(column(table, 2)) == table.locator("tbody tr").count() > 0
    assert page.locator("select:visible, input:visible, details:visible").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= 704
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
