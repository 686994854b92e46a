"""The page of `paceline report`: its markup, and its use in a browser."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import pytest

pytest.importorskip("transformers")
pytest.importorskip("plotly")

from exploring import Parsed, ending, rows_of, write_comparison, write_run, write_sweep
from rich.console import Console

from paceline.study.explore import ReportOptions, report_command
from paceline.train import InputError

EVIL = '</script><img src=x onerror="alert(1)"> <b>%{y}</b> & {{ 7 * 7 }} [red]'


# ---- the page ---------------------------------------------------------------------------------


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
        report_command(ReportOptions(runs=(folder / "runs",), out=out), console)
    text = out.read_text(encoding="utf-8")
    return SimpleNamespace(
        out=out, text=text, parsed=Parsed(text), said=(folder / "said").read_text()
    )


def test_nothing_that_users_wrote_becomes_markup(made):
    assert EVIL not in made.text
    assert made.text.count("</script>") == 4
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
    assert lines[0].startswith("Higher loss than adamw: ")
    assert "Each kind of method at its best" in lines[1]
    [line] = [line for line in lines if "tiny-sft" in line and "pace pullback=10 kappa=0.7" in line]
    assert "−0.5250 [−2." in line
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
        report_command(
            ReportOptions(runs=(folder,), out=tmp_path / "report.html"), Console(quiet=True)
        )
    assert (tmp_path / "report.html").read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cmp", "report.html"]


# ---- in a browser -----------------------------------------------------------------------------


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
    table.locator("select").select_option(label="pace pullback=10 kappa=0.3, at the same rate")
    assert (
        table.locator("th")
        .nth(6)
        .inner_text()
        .strip()
        .startswith("returned − pace pullback=10 kappa=0.3")
    )
    verdict = table.locator(".verdict").inner_text()
    assert verdict.startswith("No difference shown from pace pullback=10 kappa=0.3: ")
    shown = dict(zip(column(table, 2), column(table, 7), strict=True))
    assert shown["pace pullback=10 kappa=0.3"] == "baseline"
    assert shown["pace pullback=1 kappa=0.7"] == "diverged"
    assert shown["pace pullback=10 kappa=0.7"].startswith("−0.3000")  # 0.05·10·0.4 · (1 + 2)/2


def test_curves_can_be_hidden_and_follow_their_controls(page):
    visible = "document.getElementById('curves')._fullData.filter(t => t.visible === true).length"
    names = page.locator("#curves .legendtext").all_text_contents()
    assert f"{EVIL}, 0.003" in names
    before = page.evaluate(visible)
    page.locator("#curves .legendtoggle").nth(
        names.index("pace pullback=10 kappa=0.7, 0.003")
    ).click()
    page.wait_for_function(f"{visible} === {before - 5}")  # band, returned, live, gain, clipped
    caption = page.locator("#curve-caption")
    assert caption.inner_text() == "tiny-sft on smol, each method at its best learning rate"
    page.select_option("#curve-rate", label="0.01")
    page.select_option("#curve-x", label="tokens")
    assert caption.inner_text() == "tiny-sft on smol, learning rate 0.01"
    traces = page.evaluate(
        "document.getElementById('curves').data.map(t => [t.name, t.x, t.y, t.line.dash])"
    )
    ema = [trace for trace in traces if trace[0] == "ema kappa=0.3"]
    assert [trace[3] for trace in ema] == ["solid", "dot"]  # adamw's own live is its returned
    assert ema[0][1] == [0, 6400, 12800]
    assert ema[0][2] == pytest.approx([4, 2.505, 2.005])
    page.select_option("#curve-setting", label=EVIL)
    assert caption.inner_text() == f"{EVIL}, learning rate 0.003"
    page.select_option("#curve-setting", label="llama on chitchat")
    assert page.locator("#curve-rate option").all_inner_texts() == ["0.01"]


def test_the_map_is_drawn_with_its_best_and_its_diverged(page):
    drawn = (
        "(({data, layout}) => [data[0].x, data[0].y, data[0].text, data[1].text, "
        "layout.shapes.map(s => [s.x0, s.y0])])(document.getElementById('map'))"
    )
    page.select_option("#map-setting", label="tiny-sft on smol")
    page.select_option("#map-y", label="pullback")
    assert page.locator("#map-caption").inner_text() == "tiny-sft on smol: pace, kappa 0.7"
    x, y, text, lost, frames = page.evaluate(drawn)
    assert (x, y) == (["0.003", "0.01"], ["1", "10"])
    assert float(text[0].pop(0)) == pytest.approx(1.9825, abs=6e-4)
    assert text == [[""], ["★ 1.510", "1.580"]]
    assert lost == [["", "✕"], ["", ""]]
    assert frames == [[-0.5, 0.5]]
    page.select_option("#map-fixed-1", label="0.3")
    assert page.evaluate(drawn)[2][1] == ["★ 1.810", "1.880"]
    page.select_option("#map-y", label="lr")  # which x had
    assert page.eval_on_selector("#map-x", "x => x.value") == '"kappa"'
    assert page.evaluate(drawn)[0] == ["0.3", "0.7"]


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
    for box in page.locator(".wide:visible").all():
        scrolls = box.evaluate("box => box.scrollWidth > box.clientWidth + 1")
        assert box.evaluate("box => box.nextElementSibling.checkVisibility()") == scrolls
    for box in page.locator(".results .wide").all():  # every value is in view
        assert box.evaluate("box => box.scrollWidth <= box.clientWidth")
    names = page.locator("#curves .legendtext").first.bounding_box()
    ticks = page.locator("#curves .xtick").first.bounding_box()
    assert names["y"] > ticks["y"] + ticks["height"]
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == behind


def test_the_map_fills_its_chart_after_a_phone_was_turned(page):
    share = (
        "document.querySelector('#map .heatmaplayer image').getBoundingClientRect().width"
        " / document.getElementById('map').clientWidth"
    )
    for width in (390, 1280):
        page.set_viewport_size({"width": width, "height": 844})
        page.wait_for_function(f"document.getElementById('map').clientWidth > {width / 2}")
        page.wait_for_function(f"{share} > 0.6", timeout=5000)


def test_differences_too_small_to_see_have_a_panel(page):
    """One of tiny-sft's settings is EVIL's, with 0.1 of 2.5 nats between live and returned."""
    page.select_option("#curve-setting", label=EVIL)
    panel = "document.getElementById('curves').layout.yaxis3"
    assert page.locator("#curve-differences").is_hidden() == (page.evaluate(panel) is None)
    for coincide, wanted in ((1e-9, False), (0.9, True)):
        page.evaluate(f"data.coincide = {coincide}; drawCurves()")
        assert (page.evaluate(panel) is not None) == wanted
        assert page.locator("#curve-differences").is_visible() == wanted
    gaps = "document.getElementById('curves').data.filter(t => t.yaxis === 'y3').map(t => t.y)"
    assert page.evaluate(gaps)[0] == pytest.approx([0, -0.1, -0.1])


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
