"""Bounds on chat templates, and their clock."""

import datetime
import random

import pytest

pytest.importorskip("transformers")

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from paceline.train import sandbox

DAY = datetime.date(2024, 2, 29)


def rendered(template, day=None):
    with sandbox.clock(day):
        return render_jinja_template([[{"role": "user", "content": "x"}]], chat_template=template)[
            0
        ][0]


MANY = "range(99999)"
ENDLESS = {
    "loops": f"{{% for i in {MANY} %}}{{% for j in {MANY} %}}{{% endfor %}}{{% endfor %}}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "filters": f"{{% for i in {MANY} %}}{{% set x = {MANY}|list|sort|join %}}{{% endfor %}}",
}
HUGE = {
    "product": "{{ 'x' * 10000000000 }}",
    "doubled": "{% set n = namespace(s='x') %}{% for i in range(50) %}{% set n.s = n.s ~ n.s %}"
    "{% endfor %}",
    "filter": "{{ 'x'|center(10000000000) }}",
    "method": "{{ messages[0].content.ljust(10000000000) }}",
    "format": "{{ '%10000000000d' % 1 }}",
    "list": "{% set x = [0] * 10000000000 %}",
}
NUMBERS = {
    "power": "{{ 10 ** 10000000000 }}",
    "computed power": "{{ (messages|length + 9) ** 10000000000 }}",
    "products": "{% set n = namespace(x=3) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}"
    "{% endfor %}",
}


# The error may come in another function that Python calls, and is lost there; it comes again.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", ENDLESS)
def test_endless_templates_are_stopped(name, monkeypatch):
    monkeypatch.setattr(sandbox, "SECONDS", 0.3)
    with pytest.raises(TemplateError, match=r"it computes for more than 0\.3 s on one conv"):
        rendered(ENDLESS[name])


@pytest.mark.parametrize("name", HUGE)
def test_huge_texts_are_refused(name, monkeypatch):
    monkeypatch.setattr(sandbox, "BYTES", 2**26)
    with pytest.raises(TemplateError, match="it needs more than 64 MiB for one conversation"):
        rendered(HUGE[name])


@pytest.mark.parametrize("name", NUMBERS)
def test_huge_numbers_are_refused(name):
    with pytest.raises(TemplateError, match="it computes with huge integers"):
        rendered(NUMBERS[name])


def test_what_is_small_is_computed():
    assert (
        rendered("{{ 2 ** 10 * 3 }} {{ 'ab' * 2 }} {{ 2 ** -1 }} {{ 1.5 ** 2 }}")
        == "3072 abab 0.5 2.25"
    )


def test_the_clock_shows_the_given_day():
    template = "{{ strftime_now('%d %b %Y %H:%M') }}"
    assert rendered(template, DAY) == "29 Feb 2024 00:00"
    assert rendered(template) != rendered(template, DAY)


def test_random_choices_are_the_same_each_time():
    template = "{{ range(10**4)|random }} {{ lipsum(1) }}"
    said = set()
    for seed in range(3):
        random.seed(seed)
        state = random.getstate()
        said.add(rendered(template))
        assert random.getstate() == state
    assert len(said) == 1
