"""Rows of files of JSON, JSON lines and CSV, in which text is text: nothing is guessed."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import fsspec

csv.field_size_limit(2**31 - 1)


class Row(NamedTuple):
    """A row of a file."""

    place: str  # `line 7`, counted from 1 as editors do; `row 7` of a list, counted from 0
    value: Any
    broken: str | None = None  # why this line is no row; there is no value then


def rows_of(file: str, kind: str, separator: str = ",") -> Iterator[Row]:
    """The rows of a file: of CSV by its header, as text; of JSON any values.

    Args:
        file: a path; or an address, whose ending says whether it is compressed.
        kind: json (an object a line, a list of them, or an object with such a list as `data`) or
            csv.
        separator: of the fields in CSV.

    Raises:
        ValueError: it is not of this kind, or not UTF-8; it names the line.
        OSError: it cannot be read.
    """
    # Lines of JSON end in \n alone; fields of CSV may hold any line breaks.
    how: Any = {"encoding": "utf-8-sig", "newline": "\n" if kind == "json" else ""}
    far = "://" in file
    with (
        fsspec.open(file, "rt", compression="infer", **how)
        if far
        else Path(file).open(**how) as lines
    ):
        yield from _csv_rows(lines, separator) if kind == "csv" else _json_rows(lines)


def _json_rows(file: Any) -> Iterator[Row]:
    numbered = enumerate(file, 1)
    filled = ((number, line) for number, line in numbered if not line.isspace())
    number, first = next(filled, (0, ""))
    if not number:
        return
    if first.lstrip().startswith("[") or _goes_on(first):
        lines = [(number, first), *numbered]
        try:
            whole = parse_json("".join(line for _, line in lines), "the file", number)
        except ValueError:
            rows = [_json_row(line, at) for at, line in lines if not line.isspace()]
            if len(rows) < 2 or rows[1].broken is not None:
                raise
            yield from rows  # of lines, the first of which is broken
        else:
            yield from _listed(whole, number)
        return
    following = next(filled, None)
    row = _json_row(first, number)
    if following is None and row.broken is None:
        yield from _listed(row.value, number)
        return
    yield row
    if following is not None:
        yield _json_row(following[1], following[0])
    for number, line in filled:
        yield _json_row(line, number)


def _goes_on(line: str) -> bool:
    """Whether a line is the beginning of a JSON text of several lines."""
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        return error.pos >= len(line.rstrip())
    except (ValueError, RecursionError):
        return False
    return False


def _json_row(line: str, number: int) -> Row:
    place = f"line {number}"
    try:
        return Row(place, parse_json(line, place, number))
    except ValueError as error:
        return Row(place, None, str(error).removeprefix(f"{place} "))


def _listed(value: Any, number: int) -> Iterator[Row]:
    """The rows of the one value in a file, which begins in the line of this number."""
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
    if isinstance(value, list):
        yield from (Row(f"row {index}", row) for index, row in enumerate(value))
    else:
        yield Row(f"line {number}", value)


def parse_json(text: str, what: str, line: int = 1) -> Any:
    """The value of a JSON text, which `what` names; its first line has this number.

    Raises:
        ValueError: it is not JSON, nested too deeply, or gives a key twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_no_number)
    except RecursionError as error:
        raise ValueError(f"{what} is nested too deeply") from error
    except json.JSONDecodeError as error:
        place = f"line {line + error.lineno - 1}, column {error.colno}"
        raise ValueError(f"{what} is not JSON: {error.msg} ({place})") from error
    except ValueError as error:
        raise ValueError(f"{what} is not JSON: {error}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is given twice in one object")
    return found


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is not a number in JSON")


def _csv_rows(lines: Any, separator: str) -> Iterator[Row]:
    reader = csv.reader(lines, delimiter=separator, strict=True)
    header: list[str] = []
    while True:
        place = f"line {reader.line_num + 1}"  # its first: quoted fields may have several
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(f"{place}: {error}") from error
        if not row:
            continue
        if not header:
            if len(set(row)) < len(row):
                raise ValueError("the header names a column twice")
            header = row
        elif len(row) != len(header):
            fields = f"has {len(row)} fields, and the header has {len(header)}"
            yield Row(place, None, fields)
        else:
            yield Row(place, dict(zip(header, row, strict=True)))
