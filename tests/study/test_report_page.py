"""The page of `paceline compare` in a browser, on made-up results."""

import io
import itertools

import pytest

pytest.importorskip("transformers")

from exploring import FACTS
from rich.console import Console

from paceline.study.rates import headline
from paceline.study.report import Results, write_report
from paceline.train.methods import parse_method

METHODS = ("adamw", "ema:kappa=0.7", "ema:power:return_kappa=0.7", "pace:return_kappa=0.7")
RATES = tuple(0.001 * 2**i for i in range(10))  # more than fit beside each other
PACE = "pace pullback=10 kappa=0.3 return_kappa=0.7"


def results(lead):
    """PACE's returned loss lies below those of the others, which differ by less than the seeds."""
    rows = []
    for seed, (i, text), (j, lr) in itertools.product(
        range(5), enumerate(METHODS), enumerate(RATES)
    ):
        method = parse_method(text, lr=lr, pullback=10.0, kappa=0.3, twin_gain=1.0)
        noise = 0.01 * ((7 * seed + 3 * i + j) % 5)
        end = 3 + 0.01 * (j - 5) ** 2 + noise - lead * (method.name == "pace")
        run = f"{method.label} {lr} {seed}"
        facts = {"run": run, "trained_with": run, "label": method.label, **method.row}
        for step in (0, 50, 100):
            live = end + (100 - step) / 100
            gap = 0.001 * (method.name != "adamw")
            facts |= {"live_loss": live, "returned_loss": live - gap, "step": step, "seed": seed}
            pulled = {"gain_mean": 0.5, "clipped": 0.5} if method.pulls else {}
            rows.append({**facts, **pulled})
    return Results(len(METHODS) * len(RATES) * 5, rows)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The page, and what was printed."""
    folder = tmp_path_factory.mktemp("made") / "my comparison"
    folder.mkdir()
    configuration = {"width": 64, "layers": 2, "seeds": [0, 1], "lr": list(RATES), "kappa": None}
    manifest = {**FACTS, "configuration": configuration, "steps": 100, "text": "books"}
    said = Console(width=200, file=io.StringIO())
    write_report(results(0.5), manifest, folder, said)
    return folder / "report.html", said.file.getvalue()


@pytest.fixture
def page(on_a_phone, made):
    return on_a_phone(made[0])


def test_the_page_has_its_runs_name_and_the_verdict_before_the_rest(made, page):
    assert page.title() == "my comparison · paceline compare"
    assert page.locator("h1").inner_text() == "my comparison"
    verdict = page.locator(".verdict")
    assert verdict.inner_text().startswith(f"{PACE} has the lowest loss, 0.")
    assert verdict.bounding_box()["y"] < page.locator("li").first.bounding_box()["y"]
    assert made[1].index(verdict.inner_text()[:60]) < made[1].index("• ")
    settings = dict(
        line.split("\n")[:2] for line in page.locator(".settings > div").all_inner_texts()
    )
    assert settings["width"] == "64"
    assert settings["kappa"] == "not set"
    assert settings["lr"].startswith("0.001, 0.002, ")


def test_no_difference_is_claimed_that_is_not_shown():
    assert headline(results(0.0).curves()).startswith("No difference shown between ")


@pytest.mark.parametrize("width", [390, 768, 1280])
def test_a_table_scrolls_and_not_the_page(page, width):
    page.set_viewport_size({"width": width, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") == width
    box = page.locator(".wide").first
    assert box.evaluate("box => box.scrollWidth > box.clientWidth")
    page.wait_for_function("document.querySelector('.wide').classList.contains('scrolls')")
    assert page.locator(".wide + .hint").first.is_visible()
    box.evaluate("box => box.scrollTo(1e4, 0)")
    name = page.locator(".wide tbody th").first.bounding_box()
    assert 0 <= name["x"] <= box.bounding_box()["x"]  # methods stay in view
    charts = page.locator(".charts svg").all()
    assert all(0 < chart.bounding_box()["width"] <= width for chart in charts)
    panels, legend = charts[1].bounding_box(), charts[-1].bounding_box()
    assert legend["y"] >= panels["y"] + panels["height"]


def test_the_page_is_dark_and_its_charts_are_of_its_colours(page):
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 24, 29)"
    ink = "getComputedStyle(document.querySelector('.charts svg path.none, .charts svg')).fill"
    assert page.evaluate(ink) == "rgb(228, 232, 237)"
    assert "#000000" not in page.locator(".charts").first.inner_html()


def test_paper_cuts_no_column_off(page):
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 703, "height": 1000})  # A4 within its margins
    assert page.evaluate("document.documentElement.scrollWidth") <= 703
    cut_off = (
        "cells => cells.filter(cell => cell.getBoundingClientRect().right > 704"
        " || cell.scrollWidth > cell.clientWidth + 1).length"
    )
    assert page.locator(".wide tr > :last-child").evaluate_all(cut_off) == 0
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.locator("details:visible, .hint:visible").count() == 0
