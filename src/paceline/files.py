"""Files and folders that are there whole, or not at all."""

import errno
import glob
import os
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

DAY = 86_400  # seconds


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path to write a file or folder to, which is renamed to the final one at the end.

    What is written is on the disk before it gets its name, and replaces what had it, whose mode it
    keeps. Others may write the same path now: the last one's stays. After an exception nothing is
    left; after a kill, one `.NAME.*.partial`, which the next call removes.

    Args:
        path: the final path; of a link, what it leads to is replaced.

    Raises:
        OSError: it could not be written, its folder is not there, or the path has something else
            than a file or folder; what was there before still is.
    """
    path = Path(os.path.realpath(path))
    with suppress(FileNotFoundError):
        check_regular(path)
    with scratch(path.parent, path.name) as own:
        yield own / "whole"
        put(own / "whole", path)


@contextmanager
def scratch(folder: Path, name: str) -> Iterator[Path]:
    """A folder of one's own in a folder, gone at the end, when killed processes' go, too.

    Args:
        folder: where; it exists.
        name: what it is for, for its own name.
    """
    start, end = f".{name[:50]}.", ".partial"
    for left in folder.iterdir():
        if left.name.startswith(start) and left.name.endswith(end):
            _remove_if_left(left)
    while True:
        own, lock = Path(tempfile.mkdtemp(end, start, folder)), None
        try:
            lock = _lock(own)
        except (BlockingIOError, FileNotFoundError):  # another has just taken it for left
            continue
        except OSError:  # no locks here
            pass
        break
    try:
        yield own
    finally:
        shutil.rmtree(own, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _remove_if_left(own: Path) -> None:
    """Remove a `scratch` whose process is no more: without locks, one that is a day old."""
    lock = None
    with suppress(OSError):  # it is gone, in use, or another user's
        try:
            lock = _lock(own)
        except BlockingIOError:
            return
        except OSError:  # no locks here
            if time.time() - own.stat().st_mtime < DAY:
                return
        shutil.rmtree(own, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _lock(own: Path) -> int:
    """A descriptor that holds a folder, as long as it is open.

    Raises:
        OSError: another holds it, it is gone, or the file system has no locks.
    """
    if not fcntl:
        raise OSError("no locks")
    descriptor = os.open(own, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        own.stat()
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def write_text(path: Path, text: str) -> None:
    """Write a text to a file, whole or not at all; see `whole`."""
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def put(source: Path, target: Path) -> None:
    """Rename a file or folder once it is on the disk; replaces what has that name.

    Both paths are in one file system. A file keeps the mode of the one that it replaces; it does
    not replace a folder, nor a folder a file.
    """
    for part in (*source.rglob("*"), source):
        sync(part)
    if source.is_file() and target.is_file():
        _copy_mode(target, source)
    replaced = target.with_name(f".{target.name}.{secrets.token_hex(4)}.replaced")
    if folder := source.is_dir() and target.is_dir():  # which nothing can be renamed onto
        target.replace(replaced)
    try:
        source.replace(target)
    except BaseException:
        if folder:
            replaced.replace(target)
        raise
    sync(target.parent)
    if folder:
        for old in target.parent.glob(f".{glob.escape(target.name)}.{'?' * 8}.replaced"):
            shutil.rmtree(old, ignore_errors=True)


def _copy_mode(source: Path, target: Path) -> None:
    """Give a file the mode of another, and its group where this user may."""
    found = source.stat()
    if os.name == "posix" and found.st_gid != target.stat().st_gid:
        with suppress(PermissionError):
            os.chown(target, -1, found.st_gid)
    target.chmod(stat.S_IMODE(found.st_mode))


def check_regular(path: Path) -> None:
    """Raises: OSError: there is nothing, or something else than a file or folder, as a device."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError(errno.EINVAL, "Not a regular file", str(path))


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
