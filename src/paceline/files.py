"""Files and folders that are there whole, or not at all."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """A path beside the final one, to write a file or folder to; it is renamed at the end.

    What is written is on the disk before it gets its name, and replaces what had it. After an
    exception nothing is left of it; after a kill, one `.NAME.partial`, which the next call removes.

    Args:
        path: the final path; its parent exists.
        shared: other processes may write the same now. The last one's stays.

    Raises:
        OSError: it could not be written; what was there before still is.
    """
    # One name, so that kills leave one thing.
    mine = f".{secrets.token_hex(4)}" if shared else ""
    partial = path.with_name(f".{path.name}{mine}.partial")
    remove(partial)
    try:
        yield partial
        put(partial, path)
    except BaseException:
        remove(partial)
        raise


def write_text(path: Path, text: str, *, shared: bool = False) -> None:
    """Write a text to a file, whole or not at all; see `whole`."""
    with whole(path, shared=shared) as partial:
        partial.write_text(text, encoding="utf-8")


def put(source: Path, target: Path) -> None:
    """Rename a file or folder once it is on the disk; replaces what has that name.

    Both paths are in one file system.
    """
    for part in (*source.rglob("*"), source):
        sync(part)
    replaced = target.with_name(f".{target.name}.replaced")
    remove(replaced)
    if folder := target.is_dir():  # which nothing can be renamed onto
        target.replace(replaced)
    try:
        source.replace(target)
    except BaseException:
        if folder:
            replaced.replace(target)
        raise
    sync(target.parent)
    remove(replaced)


def remove(path: Path) -> None:
    """Remove a file or folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """See to it that a file or folder is as it is now after a power failure, where possible."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
