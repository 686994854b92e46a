"""What the documents say of the tests is so."""

import re
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent


def test_every_promise_names_a_test_that_exists():
    page = (ROOT / "docs" / "guarantees.md").read_text().split("\n# ")[0]
    promises = [" ".join(x.split()) for x in re.findall(r"(?m)^- (?:.|\n  )+", page)]
    assert len(promises) == 32
    for promise in promises:
        files = re.findall(r"`([\w/]*test_\w+\.py)`(?: \(([^)]*)\))?", promise)
        assert files, promise
        for file, words in files:
            tests = re.findall(r"def (test_\w+)", (ROOT / "tests" / file).read_text())
            for word in re.findall(r"`(\w+)`", words):
                assert any(word in test for test in tests), f"{file}: {word}"


def test_the_readme_is_short_and_its_code_runs():
    """As pasted: a linear model finds its target, and the average is in it."""
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 1000
    [code] = re.findall(r"(?s)```python\n(.*?)```", text)
    names = {}
    torch.manual_seed(0)
    exec(code, names)
    model = names["model"]
    assert (model.weight - 1).abs().max() < 0.1
    returned = model.weight.clone()
    names["opt"].train()
    assert not torch.equal(model.weight, returned)


def test_links_between_the_documents_lead_somewhere():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/*/*.md")]
    assert len(pages) > 5
    for page in pages:
        for link, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text()):
            target = page.parent / link if link else page
            assert target.exists(), f"{page.name}: {link}"
            assert not anchor or anchor in anchors(target), f"{page.name}: {link}#{anchor}"


def anchors(page):
    """The names in a page that links can end with: of its headings, and its own."""
    text = page.read_text()
    headings = re.findall(r"^#+ (.+)$", re.sub(r"(?ms)^```.*?^```", "", text), re.M)
    words = (re.sub(r"[^\w\- ]", "", x.lower()).replace(" ", "-") for x in headings)
    return {*words, *re.findall(r'<a id="([\w-]+)">', text)}


LEDGER = ROOT / "results" / "README.md"
TEXTS = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]


def ledger():
    """The ledger's rows by their name, a list of cells."""
    lines = [x for x in LEDGER.read_text().splitlines() if x.startswith('| <a id="')]
    rows = {re.search(r'id="([\w-]+)"', x)[1]: x.strip("|").split(" | ") for x in lines}
    assert len(rows) == len(lines) > 20
    return rows


def numbers(text):
    """Its decimal numbers, signs aside, as they are written."""
    return set(re.findall(r"\d+\.\d+", text))


def test_each_row_of_the_ledger_is_whole_and_its_numbers_are_on_its_page():
    for name, cells in ledger().items():
        assert len(cells) == 6, name
        _, number, _, _, command, date = cells
        assert re.fullmatch(r"2026-\d\d-\d\d", date.strip()), name
        page = re.search(r"`.+`, \[page\]\(([^#]+)(#.+)?\)", command)
        assert page, name
        known = numbers((LEDGER.parent / page[1]).read_text())
        assert numbers(number) <= known, f"{name}: {sorted(numbers(number) - known)}"


def test_what_texts_link_to_the_ledger_is_in_the_row():
    """The numbers in the text of a link to a row are the row's; every row that stands is linked."""
    rows, linked = ledger(), set()
    for page in TEXTS:
        for said, name in re.findall(
            r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\([./]*results/README\.md#([\w-]+)\)", page.read_text()
        ):
            assert name in rows, f"{page.name}: {name}"
            assert numbers(said) <= numbers(rows[name][1]), f"{page.name}: {said}"
            linked.add(name)
    standing = {name for name, cells in rows.items() if "**Withdrawn**" not in cells[0]}
    assert linked == standing, (sorted(standing - linked), sorted(linked - standing))
