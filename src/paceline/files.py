"""Files and folders that are there whole, or not at all."""

import ctypes
import errno
import glob
import os
import secrets
import shutil
import stat
import sys
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
TRIES = 20  # to replace a folder, while others replace it
LOST = (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path to write a file or folder to, which is renamed to the final one at the end.

    What is written is on the disk before it gets its name. It replaces a file or folder of that
    name; a file takes over the old one's mode. Others may write the same path now: the last one's
    stays. After an exception nothing is left. After a kill one `.NAME.*.partial` is left, which the
    next call removes. Where a kill left an old folder as `.NAME.*.replaced` and none as NAME, the
    next call first gives it its name back.

    Args:
        path: the final path; of a link, what it leads to is replaced.

    Raises:
        OSError: it could not be written, its folder is not there, or the path has something else
            than a file or folder; what was there before still is.
    """
    path = Path(os.path.realpath(path))
    with suppress(FileNotFoundError):
        check_regular(path)
    _put_back(path)
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
        except (BlockingIOError, FileNotFoundError):  # another call just removed it as a leftover
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
    not replace a folder, nor a folder a file. A folder trades names with the old one in one step on
    Linux's own file systems. Elsewhere it takes two, and no folder has the name between them.
    """
    for part in (*source.rglob("*"), source):
        sync(part)
    if source.is_file() and target.is_file():
        _copy_mode(target, source)
    folder = source.is_dir()
    for left in reversed(range(TRIES)):
        try:
            _replace(source, target)
            break
        except OSError as error:  # another may have put a folder there meanwhile, or taken it
            if not left or not folder or error.errno not in LOST:
                raise
    sync(target.parent)
    if folder:
        shutil.rmtree(source, ignore_errors=True)  # where they have traded names
        for old in _replaced(target):
            with suppress(OSError):  # renamed first: what is half removed is never put back
                shutil.rmtree(old.replace(old.with_suffix(".partial")), ignore_errors=True)


def _replace(source: Path, target: Path) -> None:
    if not (source.is_dir() and target.is_dir()):
        source.replace(target)
    elif not _exchange(source, target):
        old = target.with_name(f".{target.name}.{secrets.token_hex(4)}.replaced")
        target.replace(old)
        try:
            source.replace(target)
        except BaseException:
            with suppress(OSError):  # another has put one there
                old.replace(target)
            raise


def _exchange(a: Path, b: Path) -> bool:
    """Whether two paths have traded what they name, by Linux's renameat2(2)."""
    call = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    return call is not None and call(-100, os.fsencode(a), -100, os.fsencode(b), 2) == 0


def _replaced(path: Path) -> list[Path]:
    """Folders that had a path's name until they were replaced, and are still there."""
    return list(path.parent.glob(f".{glob.escape(path.name)}.{'?' * 8}.replaced"))


def _put_back(path: Path) -> None:
    """Give a folder its name back if a process was killed while it replaced that."""
    with suppress(OSError):  # another has done so
        left = _replaced(path)
        if left and not path.exists():
            max(left, key=lambda old: old.stat().st_mtime).replace(path)


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
