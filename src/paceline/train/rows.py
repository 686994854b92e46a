"""Rows of files of JSON, JSON lines and CSV, in which text is text: nothing is guessed."""

import csv
import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import fsspec

csv.field_size_limit(2**31 - 1)


def rows_of(file: str, kind: str, separator: str = ",") -> Iterator[Any]:
    """The rows of a file: of CSV by its header, as text; of JSON any values.

    Args:
        file: a path; or an address, whose ending says whether it is compressed.
        kind: json (an object a line, or a list of them) or csv.
        separator: of the fields in CSV.

    Raises:
        ValueError: it is not of this kind, or not UTF-8; it names the row.
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


def _json_rows(lines: Any) -> Iterator[Any]:
    lines = (line for line in lines if not line.isspace())
    first = next(lines, None)
    if first is None:
        return
    if first.lstrip().startswith("["):
        yield from parse_json(first + "".join(lines), "the list")
        return
    for number, line in enumerate(chain([first], lines)):
        yield parse_json(line, f"row {number}")


def parse_json(text: str, what: str) -> Any:
    """The value of a JSON text, which `what` names.

    Raises:
        ValueError: it is not JSON, nested too deeply, or gives a key twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_no_number)
    except RecursionError as error:
        raise ValueError(f"{what} is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{what} is not JSON: {error}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is given twice in one object")
    return found


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is not a number in JSON")


def _csv_rows(lines: Any, separator: str) -> Iterator[dict[str, str]]:
    number = -1
    try:
        rows = (row for row in csv.reader(lines, delimiter=separator, strict=True) if row)
        header = next(rows, [])
        if len(set(header)) < len(header):
            raise ValueError("the header names a column twice")
        for number, row in enumerate(rows):
            if len(row) != len(header):
                raise ValueError(
                    f"row {number} has {len(row)} fields, and the header has {len(header)}"
                )
            yield dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise ValueError(f"after row {number}: {error}") from error
