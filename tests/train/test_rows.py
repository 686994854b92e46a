"""Rows of files, in which text is text."""

import gzip
import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from paceline.train.rows import rows_of

pytestmark = pytest.mark.usefixtures("folder")

# What readers that guess take for something else.
TEXTS = [
    *("NA", "None", "null", "nan", "N/A", "NaN", "-inf", "n/a", "<NA>", "#N/A", "NULL"),
    *("2024-03-01", "2024-04-01 10:00:00", "10:00", "2024-03-01T10:00:00Z", "March 1"),
    *("007", "1.10", "1e5", "True", "false", "0x10", "1_000", " 1 ", "+1", "1,5", "{}", "[1]"),
    *('say "hi"', "a\nb", "a\r\nb", "a\u2028b", "tab\there", "ünï 🦊", "#x", "'", "\\n"),
]


def csv_text(texts):
    quoted = (x.replace('"', '""') for x in texts)
    return "a,b\n" + "".join(f'{i},"{x}"\n' for i, x in enumerate(quoted))


@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json", "a.jsonl.gz"])
def test_text_is_text(name, bom):
    rows = [{"a": str(i), "b": x} for i, x in enumerate(TEXTS)]
    text = {"a.csv": csv_text(TEXTS), "a.json": json.dumps(rows, indent=1)}
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    data = (bom + text.get(name, lines)).encode()
    packed = name.endswith("gz")
    Path(name).write_bytes(gzip.compress(data) if packed else data)
    place = Path(name).resolve().as_uri() if packed else name
    assert list(rows_of(place, "csv" if name == "a.csv" else "json")) == rows


def test_values_of_json_are_as_they_are():
    rows = [{"a": {"x": None}}, {"a": {"y": 2**70}}, {"b": ["1", 2, None]}, {}]
    Path("a.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\r\n \n")
    assert list(rows_of("a.jsonl", "json")) == rows
    Path("tabs.csv").write_text("a\tb\n\n1,\t\n")
    assert list(rows_of("tabs.csv", "csv", "\t")) == [{"a": "1,", "b": ""}]


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("json", '{"a": 1}\n{"a": [}', "row 1 is not JSON: Expecting value"),
        ("json", '{"a": 1, "a": 2}', "row 0 is not JSON: a key is given twice"),
        ("json", '{"a": NaN}', "row 0 is not JSON: NaN is not a number"),
        ("json", "[" * 100_000, "the list is nested too deeply"),
        ("json", '{"a":' * 100_000, "row 0 is nested too deeply"),
        ("json", '{"a": %s}' % ("1" * 5000), "row 0 is not JSON: Exceeds the limit"),
        ("json", '[{"a": 1}\n', "the list is not JSON"),
        ("csv", "a,b\n1,2\n1\n", "row 1 has 1 fields, and the header has 2"),
        ("csv", "a,b\n1,2,3\n", "row 0 has 3 fields"),
        ("csv", "a,a\n1,2\n", "the header names a column twice"),
        ("csv", 'a,b\n1,2\n"1,2\n', "after row 0: unexpected end"),
    ],
)
def test_what_is_not_of_its_kind(kind, text, message):
    Path("x").write_text(text)
    with pytest.raises(ValueError, match=f"^{message}"):
        list(rows_of("x", kind))
