"""A run's report: its sentences on made-up results, and the page in a browser."""

import json
import math
import re

import pytest

pytest.importorskip("transformers")

from exploring import FACTS

from paceline.train.page import looks, write_page
from paceline.train.recipe import Recipe, read_recipe


def test_methods_of_one_family_take_no_others_colour_while_one_is_free():
    own = looks(["pace", "pace pullback=10", "ema"])
    others = looks(["adamw", "schedule-free", "ema", "ema power", "pace"]).values()
    assert own["pace pullback=10"].colour not in {look.colour for look in others}
    base = looks(["pullback base=adamw", "adamw"])  # adamw is the value of an option there
    assert base["adamw"] == looks(["adamw"])["adamw"]


def write(folder, gap=0.001, last=(2.0, 2.0), verdict="Returned lower.", **changes):
    """A report whose live and returned losses differ by `gap` before the end, and end at `last`."""
    folder.mkdir()
    recipe = Recipe(**{**read_recipe("demo-sft"), **changes})
    history = []
    for step in (0, 100, 200):
        loss = 7 - step / 50
        history += [{"loss": loss, "gain_mean": 0.5, "clipped": 0.5, "step": step}]
        history += [{"eval_live_loss": loss, "eval_loss": loss - gap, "step": step}]
    history.append(dict(zip(("eval_live_loss", "eval_loss"), last, strict=True)) | {"step": 300})
    said = dict.fromkeys(("prompt", "returned", "live", "data"), "well " * 40)
    (folder / "samples.json").write_text(json.dumps({"greedy": [said]}))
    manifest = {**FACTS, "command": "paceline train", "steps": 300, "parameters": 1e6}
    manifest |= {"resumed": [], "data": {"evaluation_sequences": 9}}
    average = {"rule": "power:0.3", "kappa": 0.3, "verdict": verdict}
    write_page(recipe, history, average, manifest, folder)
    return (folder / "report.html").read_text(encoding="utf-8")


def marked(page):
    return re.findall(r' best">([^<]*)<', page)


def test_the_lower_loss_is_marked_and_a_diverged_one_is_named(tmp_path):
    assert marked(write(tmp_path / "lower", last=(2.0, 1.5))) == ["1.5000"]
    assert marked(write(tmp_path / "higher", last=(2.0, 2.5))) == ["2.0000"]
    assert marked(write(tmp_path / "same")) == []
    none = "No difference shown: returned less live is 0.5000 nats, without an interval."
    assert marked(write(tmp_path / "not-shown", last=(2.0, 1.5), verdict=none)) == []
    worse = "The model got worse: 1.6700 nats before training, 90.0000 now; lower the rate."
    assert marked(write(tmp_path / "worse", last=(222.7, 90.0), verdict=worse)) == []
    lost = write(tmp_path / "lost", last=(math.nan, 2.5))
    assert marked(lost) == ["2.5000"]
    assert lost.count(">diverged<") == 1


def test_what_the_page_says_of_its_data_and_its_model(tmp_path):
    first = write(tmp_path / "first")
    assert "9 sequences, held out of the training data; what the assistant says" in first
    assert "; resumed" not in first
    assert "<code>model/</code>" in first
    other = write(tmp_path / "other", eval_data=("mine.jsonl",))
    assert "9 sequences of mine.jsonl; what" in other


@pytest.mark.parametrize(("gap", "panels"), [(0.001, 3), (0.5, 2), (0.0, 2)])
def test_a_difference_too_small_to_see_has_a_panel(tmp_path, gap, panels):
    page = write(tmp_path / "run", gap=gap, last=(2.0, 2.0 - gap))
    assert len(re.findall(r'<g id="axes_\d+">', page)) == panels
    assert ("look like one line" in page) == (panels == 3)


# ---- in a browser -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "my run"
    write(folder)
    return folder / "report.html"


@pytest.fixture
def page(on_a_phone, made):
    return on_a_phone(made)


def test_on_a_phone_all_is_in_view_and_dark(page):
    assert page.title() == "my run · paceline train"
    assert page.locator("h1").inner_text() == "my run"
    verdict, table = (page.locator(x).first.bounding_box() for x in (".verdict", "table"))
    assert verdict["y"] < table["y"]
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 24, 29)"
    for box in page.locator(".wide").all():
        assert box.evaluate("box => box.scrollWidth <= box.clientWidth")
    assert page.locator(".hint:visible").count() == 0
    assert (
        page.locator("td.text").first.evaluate("cell => getComputedStyle(cell, '::before').content")
        == '"prompt"'
    )
    settings = page.locator(".settings").last.inner_text()
    assert "config.hidden_size\n128" in settings


def test_paper_is_light_and_cuts_nothing_off(page):
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 703, "height": 1000})
    assert page.evaluate("document.documentElement.scrollWidth") <= 703
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    ends = page.locator("tr > :last-child").evaluate_all(
        "cells => cells.map(cell => cell.getBoundingClientRect().right)"
    )
    assert max(ends) <= 704
    assert page.locator("details:visible").count() == 0
