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


def values_of(*arguments):
    rows = list(rows_of(*arguments))
    assert not any(row.broken for row in rows)
    return [row.value for row in rows]


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
    assert values_of(place, "csv" if name == "a.csv" else "json") == rows


def test_values_of_json_are_as_they_are():
    rows = [{"a": {"x": None}}, {"a": {"y": 2**70}}, {"b": ["1", 2, None]}, {}]
    Path("a.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\r\n \n")
    assert values_of("a.jsonl", "json") == rows
    Path("tabs.csv").write_text("a\tb\n\n1,\t\n")
    assert values_of("tabs.csv", "csv", "\t") == [{"a": "1,", "b": ""}]


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("json", "[" * 100_000, "the file is nested too deeply"),
        ("json", '[{"a": 1}\n', r"the file is not JSON: Expecting ',' delimiter \(line 2, col"),
        # with the file's own lines, those that are blank among them
        ("json", '\n[{"a": 1},\n\n{"a": [}]', r"the file is not JSON: .*\(line 4, column 8\)"),
        ("json", '\n\n{\n "a": 1\n\n "b": 2}', r"the file is not JSON: .*\(line 6, column 2\)"),
        ("csv", "a,a\n1,2\n", "the header names a column twice"),
        ("csv", 'a,b\n1,2\n\n"1,2\n', "line 4: unexpected end"),
    ],
)
def test_what_is_not_of_its_kind(kind, text, message):
    Path("x").write_text(text)
    with pytest.raises(ValueError, match=f"^{message}"):
        list(rows_of("x", kind))


@pytest.mark.parametrize(
    ("kind", "text", "place", "reason"),
    [
        (
            "json",
            '{"a": 1}\n{"a": [}\n',
            "line 2",
            "is not JSON: Expecting value (line 2, column 8)",
        ),
        ("json", '\n{"a": 1}\n\n \n{"a": [}\n', "line 5", "is not JSON: Expecting value"),
        ("json", '{"a": [}\n{"a": 1}\n', "line 1", "is not JSON: Expecting value"),
        ("json", 'hello\n{"a": 1}\n', "line 1", "is not JSON: Expecting value"),
        ("json", '{"a": 1}\n{"a":\n', "line 2", "is not JSON: Expecting value"),
        ("json", '{"a": 1, "a": 2}\n{"a": 1}', "line 1", "is not JSON: a key is given twice"),
        ("json", '{"a": 1}\n{"a": NaN}', "line 2", "is not JSON: NaN is not a number"),
        ("json", '{"a": 1}\n' + '{"a":' * 100_000, "line 2", "is nested too deeply"),
        ("json", '{"a": 1}\n{"a": %s}' % ("1" * 5000), "line 2", "is not JSON: Exceeds the limit"),
        ("csv", 'a,b\n\n"1\n1",2\n1\n', "line 5", "has 1 fields, and the header has 2"),
        ("csv", "a,b\n1,2,3\n1,2\n", "line 2", "has 3 fields"),
    ],
)
def test_a_line_that_is_no_row_has_its_own_number(kind, text, place, reason):
    Path("x").write_text(text)
    (broken,) = [row for row in rows_of("x", kind) if row.broken]
    assert broken.place == place
    assert broken.broken.startswith(reason)
    assert len(list(rows_of("x", kind))) == 2  # the other one is read


def test_of_lines_the_first_may_be_broken():
    """A line that was cut off is no beginning of a JSON text of several lines."""
    Path("x").write_text('{"messages": [\n{"a": 1}\n{"a": 2}\n')
    first, *others = rows_of("x", "json")
    assert first.broken.startswith("is not JSON")
    assert [(row.place, row.value) for row in others] == [
        ("line 2", {"a": 1}),
        ("line 3", {"a": 2}),
    ]
    Path("x").write_text('{"messages": [\n"a", }\n]}\n')
    with pytest.raises(ValueError, match=r"the file is not JSON: .*line 2, column 6"):
        list(rows_of("x", "json"))


@pytest.mark.parametrize("indent", [None, 1])
def test_a_list_may_be_the_data_of_an_object(indent):
    rows = [{"a": "1"}, {"a": "2"}]
    Path("a.json").write_text(json.dumps({"version": 2, "data": rows}, indent=indent))
    assert list(rows_of("a.json", "json")) == [("row 0", rows[0], None), ("row 1", rows[1], None)]
    # but in a file of several objects it is a column
    Path("a.jsonl").write_text("\n".join(json.dumps({"data": rows}) for _ in range(2)))
    assert values_of("a.jsonl", "json") == [{"data": rows}] * 2
    Path("one.json").write_text(json.dumps({"a": "1"}, indent=indent))
    assert values_of("one.json", "json") == [{"a": "1"}]
