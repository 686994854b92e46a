"""What the documents say of the tests is so."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_promise_of_the_readme_names_a_test_that_exists():
    section = (ROOT / "README.md").read_text().split("## What we promise")[1].split("\n## ")[0]
    rows = [line.split("|")[2] for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 24
    for row in rows:
        files = re.findall(r"`([\w/]*test_\w+\.py)`(?: \(([^)]*)\))?", row)
        assert files, row
        for file, words in files:
            tests = re.findall(r"def (test_\w+)", (ROOT / "tests" / file).read_text())
            for word in re.findall(r"`(\w+)`", words):
                assert any(word in test for test in tests), f"{file}: {word}"


def test_links_between_the_documents_lead_somewhere():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/*/*.md")]
    assert len(pages) > 5
    for page in pages:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
