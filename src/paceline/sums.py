"""Check sums of a folder's files: written with them, and compared before they are used."""

import json
import os
import zlib
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from .files import check_regular

SUMS = "checksums.json"
CARD = "README.md"  # a model's, which may be edited
CHUNK = 1 << 20  # bytes read at a time


def write_sums(folder: Path) -> None:
    """Write the CRC-32 of each file in a folder and below, but model cards, to checksums.json."""
    files = sorted(x for x in folder.rglob("*") if x.is_file() and x.name not in (SUMS, CARD))
    sums = {path.relative_to(folder).as_posix(): _crc32(path) for path in files}
    (folder / SUMS).write_text(json.dumps({"crc32": sums}, indent=1) + "\n", encoding="utf-8")


def find_damage(path: Path, but: Sequence[str] = ()) -> str | None:
    """Compare a folder, or one file beside them, with its check sums; reads each byte once.

    Args:
        path: the folder or the file.
        but: patterns of files to leave out, as paths in the folder.

    Returns:
        What is damaged, as the main clause of a line; None if all is as it was written, or there
        are no check sums.
    """
    if not os.path.exists(path):  # noqa: PTH110 - a name of any length or kind
        return None
    folder = path if path.is_dir() else path.parent
    try:
        text = (folder / SUMS).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        return f"{folder / SUMS} cannot be read: {error.strerror}"
    try:
        sums = {name: str(value) for name, value in json.loads(text)["crc32"].items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"{folder / SUMS} is damaged: it holds no check sums"
    for name, value in sums.items():
        file = folder / name
        if path not in (folder, file) or any(fnmatch(name, pattern) for pattern in but):
            continue
        try:
            check_regular(file)  # a device may never end
            if _crc32(file) != value:
                return f"{file} is damaged: it does not have its check sum in {SUMS}"
        except FileNotFoundError:
            return f"{file} is missing"
        except OSError as error:
            return f"{file} cannot be read: {error.strerror}"
        except ValueError:
            return f"{folder / SUMS} is damaged: it names {name!r}"
    return None


def _crc32(path: Path) -> str:
    value, buffer = 0, memoryview(bytearray(CHUNK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            value = zlib.crc32(buffer[:count], value)
    return f"{value:08x}"
