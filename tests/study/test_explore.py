"""`paceline report`: what is read, and what is computed of it."""

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("plotly")

from exploring import (
    STEPS,
    Parsed,
    ending,
    rows_of,
    write,
    write_comparison,
    write_run,
    write_sweep,
)
from rich.console import Console

from paceline.cli import _parse
from paceline.study.explore import (
    WORDS,
    ReportOptions,
    best,
    configurations,
    curve_series,
    default_baseline,
    difference,
    find,
    gather,
    map_points,
    read,
    report_command,
    tables,
    tell_apart,
)
from paceline.study.statistics import WIDEN
from paceline.train import InputError
from paceline.train.methods import all_options


def cells_of(*folders):
    sources = [read(folder) for folder in find(folders)]
    tell_apart(sources)
    return gather(sources), [f"{s.folder.name}: {note}" for s in sources for note in s.notes]


def cell(cells, label, lr=0.003, setting=""):
    [found] = [c for c in cells if (c.label, c.lr) == (label, lr) and setting in c.setting]
    return found


PACE_ITSELF = "pace pullback=1 kappa=0.3 gain=scalar return_kappa=0.7"  # as recipes write "pace"


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
    run = cell(cells, PACE_ITSELF, 0.01, "llama")
    [rows] = run.runs.values()
    assert [row.step for row in rows] == [0, 10, 20]
    assert [row.tokens for row in rows] == [0, 4000, 8000]
    assert [row.gain_mean for row in rows] == [None, 0.9, 0.9]
    assert (run.losses("live"), run.losses()) == ({0: 6.0}, {0: 5.9})
    assert (run.first.family, run.lr, run.first.options["kappa"]) == ("pace gain=scalar", 0.01, 0.3)
    assert set(run.first.options) == set(all_options()) - set(WORDS)
    assert cell(cells, "pace pullback=1 kappa=0.3", 0.01, "sft").losses()[1] == math.inf
    assert cell(cells, "ema kappa=0.3", setting="books").losses("selection") == {0: None}


@pytest.mark.parametrize(
    ("text", "family"),
    [
        ("adamw", "adamw"),
        ("ema:twin:kappa=0.5", "ema twin"),
        ("pullback:muon:pullback=2:gain=own", "pullback muon gain=own"),
        ("pace:pullback=1:state=bf16", "pace state=bf16"),
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
        ("llama on chitchat, batch 16", PACE_ITSELF, 2),
        ("llama on chitchat, batch 16", "ema kappa=0.7", 1),
        ("llama on chitchat, batch 32", PACE_ITSELF, 1),
    }


def test_sweeps_of_one_name_and_different_tasks_are_told_apart(tmp_path):
    for name, tasks in (
        ("a", {"s": {"recipe": {"task": "sft", "batch": 8}}}),
        ("b", {"s": {"recipe": {"task": "sft"}}}),
        ("pullback", {}),
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
        "0: the last line of metrics.jsonl is torn, and was skipped",
        "0: unfinished, and not in the tables: 0 ends at step 10",
        "2: the same training (method, rate and seed) is in a folder that was read before; this "
        "copy is not used: 2",
        "3: unfinished, and not in the tables: 3 ends at step 10",
    ]
    assert [(c.label, list(c.runs), c.finished) for c in cells] == [
        (PACE_ITSELF, [1], True),
        ("ema kappa=0.7", [0], False),
    ]
    [table] = tables(cells)
    assert [entry.cell.label for entry in table.entries] == [PACE_ITSELF]
    assert [series["finished"] for series in curve_series(cells)] == [True, False]


def test_a_run_that_stopped_where_it_diverged_is_finished(tmp_path):
    rows = rows_of("ema", 0.01, 0, [(4.0, 4.0), (None, None)], setting="s")
    [found], notes = cells_of(write(tmp_path / "x", rows))
    assert (found.finished, found.show(), notes) == (True, "diverged", [])


def test_a_run_that_has_only_begun_has_curves_and_no_table(tmp_path):
    folder = write_run(tmp_path / "run", last=10)
    report_command(ReportOptions(runs=(folder,), out=tmp_path / "x.html"), Console(quiet=True))
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
        (edit_row(live_loss="gone"), "line 1: live_loss: it is missing; .*not an evaluation"),
        (edit_row(lr="fast"), "line 1: lr: must be a valid number"),
        (lambda f: (f / "metrics.jsonl").write_text(""), "there is no evaluation in .*cmp"),
    ],
)
def test_what_cannot_be_read_is_named_in_one_line(tmp_path, damage, message):
    folder = write_comparison(tmp_path / "cmp")
    damage(folder)
    with pytest.raises(InputError, match=message) as caught:
        report_command(
            ReportOptions(runs=(folder,), out=tmp_path / "report.html"), Console(quiet=True)
        )
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
        report_command(ReportOptions(runs=(folder,), out=tmp_path / out), Console(quiet=True))
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_options_are_parsed_as_the_command_line_gives_them():
    options = _parse("report", ReportOptions, ["a", "b/c", "--out", "x.html"])
    assert options == ReportOptions(runs=(Path("a"), Path("b/c")), out=Path("x.html"))
    with pytest.raises(InputError, match="at least one"):
        report_command(ReportOptions(runs=()), Console(quiet=True))


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


def numbers(text):
    """Those in a cell of a table."""
    return [float(x) for x in re.findall(r"[+-]\d+\.\d+", text.replace("−", "-"))]


T95 = {2: 12.7062, 3: 4.30265, 5: 2.77645, 9: 2.30600}  # of Student's t with n - 1 degrees


@pytest.mark.parametrize("count", T95)
def test_differences_are_paired_and_have_an_interval(tmp_path, count):
    mine, its = np.random.default_rng(count).normal(5, 0.1, size=(2, count))
    a = cell_from(tmp_path / "a", "ema", dict(enumerate(mine)))
    b = cell_from(tmp_path / "b", "adamw", {**dict(enumerate(its)), 77: 1.0})
    key, text, _ = difference(a, b)
    mean, half = fmean(mine - its), T95[count] * np.std(mine - its, ddof=1) / math.sqrt(count)
    assert float(key) == pytest.approx(mean)
    assert numbers(text) == pytest.approx([mean, mean - half, mean + half], abs=6e-5)
    assert text.endswith(f"], {count} seeds")
    assert numbers(difference(b, a).text)[0] == pytest.approx(-mean, abs=6e-5)


def test_differences_that_hold_for_all_lines_are_marked(tmp_path):
    """Of two lines, one has p = 0.003, and one p = 0.03, which is not enough after it."""
    seeds = range(4)
    noise = [-0.01, 0.01, -0.02, 0.02]
    adamw = cell_from(tmp_path / "a", "adamw", dict.fromkeys(seeds, 2.0))
    others = {
        f"pace:pullback={c}": {s: 2 - c * x + noise[s] for s in seeds}
        for c, x in ((1, 0.08), (2, 0.015), (3, 0.001))
    }
    cells = [adamw, *(cell_from(tmp_path / n, n, losses) for n, losses in others.items())]
    found = next(table for table in tables(cells) if len(table.entries) == 4)
    marked = {
        x.name: text for x, (_, text) in zip(found.entries, found.differences[0], strict=True)
    }
    ps = {cell.label: difference(cell, adamw).p for cell in cells[1:]}
    assert ps["pace pullback=1 kappa=0.3"] < 0.05 / 3
    assert 0.025 < ps["pace pullback=2 kappa=0.3"] < 0.05
    assert {name for name, text in marked.items() if text.endswith("*")} == {
        "pace pullback=1 kappa=0.3"
    }


def test_a_best_at_the_edge_of_its_grid_is_named(tmp_path):
    cells = [
        cell_from(tmp_path / str(c), f"pace:pullback={c}", {0: loss}, selection=loss)
        for c, loss in ((1, 3.0), (2, 2.0), (3, 2.5))
    ]
    kinds = tables(cells)[0]
    assert [(x.cell.label, x.edge) for x in kinds.entries] == [("pace pullback=2 kappa=0.3", "")]
    assert WIDEN not in kinds.notes
    kinds = tables(cells[:2])[0]
    assert [x.edge for x in kinds.entries] == ["pullback at the top"]
    assert WIDEN in kinds.notes


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
    assert difference(a, b) == (key, text, None)
    assert difference(b, b) == ("0", "baseline", None)


def test_the_best_is_chosen_by_the_selection_loss_over_common_seeds(tmp_path):
    good = cell_from(tmp_path / "a", "pace:pullback=1", {0: 2.0, 1: 2.0}, selection=3.0)
    chosen = cell_from(tmp_path / "b", "pace:pullback=2", {0: 2.5, 1: 2.5}, selection=2.9)
    assert best([good, chosen]) is chosen
    bare = [cell_from(tmp_path / n, f"pace:pullback={c}", losses) for n, c, losses in (
        ("c", 1, {0: 2.0, 1: 4.0}), ("d", 2, {0: 2.1}), ("e", 3, {0: None, 1: 0.0}))]  # fmt: skip
    for one in bare:  # without selection losses, as of comparisons
        for rows in one.runs.values():
            rows[:] = [row.model_copy(update={"selection_loss": None}) for row in rows]
    assert best(bare) is bare[0]  # over seed 0
    assert best(bare[1:]) is bare[1]
    assert best([chosen, bare[1]]) is bare[1]  # where one has none, by what is shown


def test_the_baseline_is_that_of_the_sweep(tmp_path):
    """Another would turn the signs of its tables."""
    folder = write_sweep(tmp_path / "sweep")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "baseline": "ema kappa=0.3"}))
    cells, _ = cells_of(folder)
    sweep, other = read(folder), read(write_comparison(tmp_path / "cmp"))
    for sources in ([sweep], [other, sweep]):
        found = tables(cells, default_baseline(sources))
        first = ["ema", "ema kappa=0.3", "ema kappa=0.3"]
        assert [table.baselines[0] for table in found] == first
    line = next(i for i, x in enumerate(found[-1].entries) if x.name == "adamw")
    assert float(found[-1].differences[0][line][0]) == pytest.approx(0.1)
    assert default_baseline([other]) == {"adamw"}
    another = dataclasses.replace(other, manifest={"baseline": "adamw"})
    assert default_baseline([sweep, another]) == {"adamw"}  # they do not agree


def test_tables_compare_the_best_and_the_equal(tmp_path):
    cells, _ = cells_of(write_sweep(tmp_path / "sweep"), write_comparison(tmp_path / "cmp"))
    kinds, methods, equal = tables(cells)
    assert [len(table.entries) for table in (kinds, methods, equal)] == [8, 14, 26]
    for table in (kinds, methods, equal):
        assert table.baselines[0] == "adamw"
        for name, differences in zip(table.baselines, table.differences, strict=True):
            for entry, shown in zip(table.entries, differences, strict=True):
                there = [b for b in table.entries if (b.group, b.name) == (entry.group, name)]
                expected = [difference(entry.cell, b.cell)[:2] for b in there]
                assert [shown] == (expected or [("", f"no {name} here")])
    first = kinds.entries[0]
    assert (first.cell.setting, first.cell.label) == (
        "tiny-sft on smol",
        "pace pullback=10 kappa=0.7",
    )
    assert (first.name, first.best, first.cell.lr) == ("pace", True, 0.003)
    half = T95[2] * 0.35 / 2  # of -0.35 and -0.7
    # pace at c=10, kappa=0.7 is lower than adamw by 0.35 with seed 0 and 0.7 with seed 1
    key, text = kinds.differences[0][0]
    assert float(key) == pytest.approx(-0.525)
    assert numbers(text) == pytest.approx([-0.525, -0.525 - half, -0.525 + half], abs=6e-5)
    assert kinds.notes == [
        "tiny-sft on smol; tiny-pretrain on nano: chosen by the returned model's loss on another "
        "split than the losses shown, of the same runs.",
        WIDEN,
    ]
    assert first.edge == "lr at the bottom, kappa at the top, pullback at the top"  # of two each
    lost = [entry for entry in equal.entries if entry.cell.show() == "diverged in 1 of 2"]
    assert {entry.cell.label for entry in lost} == {
        "pace pullback=1 kappa=0.3",
        "pace pullback=1 kappa=0.7",
    }
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
    assert "x: chosen by the losses shown" in methods.notes[0]
    assert [entry.cell.lr for entry in methods.entries] == [0.01, 0.01]
    texts = dict(zip([e.cell.lr for e in equal.entries], equal.differences[0], strict=True))
    assert texts[0.03] == ("", "no adamw here")


def test_curves_are_means_with_ranges_up_to_divergence(tmp_path):
    cells, _ = cells_of(write_sweep(tmp_path / "sweep"))
    series = {(s["setting"][:8], s["label"], s["lr"]): s for s in curve_series(cells)}
    one = series["tiny-sft", "pace pullback=10 kappa=0.7", 0.003]
    assert one["steps"] == list(STEPS)
    assert one["tokens"] == [0, 6400, 12800]
    ends = [2.03 - 0.35, 2.04 - 0.7]
    assert one["returned"] == pytest.approx([4, fmean(ends) + 0.5, fmean(ends)])
    assert (one["low"][-1], one["high"][-1]) == pytest.approx((ends[1], ends[0]))
    assert one["live"][-1] == pytest.approx(2.035)
    assert one["gain"] == pytest.approx([0.25, 0.3, 0.35])
    assert (one["seeds"], one["best"]) == (2, True)
    assert not series["tiny-sft", "pace pullback=10 kappa=0.7", 0.01]["best"]
    lost = series["tiny-sft", "pace pullback=1 kappa=0.3", 0.01]
    assert (lost["returned"], lost["live"], lost["low"]) == ([4, None, None],) * 3
    adamw, ema = (series["tiny-sft", label, 0.01] for label in ("adamw", "ema kappa=0.3"))
    assert adamw["training"] == ema["training"] != one["training"]
    assert ema["gain"] == [None] * 3


def test_maps_are_of_what_varies_in_two_options(tmp_path):
    cells, _ = cells_of(write_sweep(tmp_path / "sweep"))
    found = map_points(cells)
    assert [(m["setting"], m["family"]) for m in found] == [
        ("tiny-sft on smol", "pace"),
        ("tiny-pretrain on nano", "pace"),
    ]
    assert found[0]["axes"] == ["lr", "kappa", "pullback"]
    points = {tuple(p["at"]): p["loss"] for p in found[0]["points"]}
    assert points[0.003, 0.7, 10] == pytest.approx(1.51)
    assert points[0.01, 0.3, 1] is None
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
    assert differing["lr"] == ["0.003", "0.003", "0.01"]
    assert rest["versions.torch"] == ["2.13.0"] * 3
    assert rest["config.hidden_size"] == ["", "", "128"]
    assert not differing.keys() & rest.keys()
    assert dict(configurations(sources[:1])[0]) == {"name": ["adamw, ema"]}
