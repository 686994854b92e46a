"""Where things made once are kept between runs."""

import os
import stat
import warnings
from pathlib import Path


def cache_folder() -> Path:
    """`$PACELINE_CACHE`, or else `paceline` in `$XDG_CACHE_HOME` (by default `~/.cache`).

    Raises:
        OSError: it is not there and cannot be made, or this user has no home.
    """
    given, base = os.environ.get("PACELINE_CACHE"), os.environ.get("XDG_CACHE_HOME")
    try:
        folder = Path(given or Path(base or Path.home() / ".cache") / "paceline")
    except RuntimeError as error:
        raise FileNotFoundError(f"{error}; set PACELINE_CACHE") from None
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def code_folder() -> Path | None:
    """The cache folder, if what is there may be run; None if it cannot be made or is not safe.

    It is safe if it belongs to this user, and nobody else may write to it. A warning says if not.
    """
    try:
        folder = cache_folder().resolve()
        safe = is_ours(folder)
    except OSError:
        return None
    if not safe:
        warnings.warn(
            f"others may write to the cache folder {str(folder)!r}, so the kernel is built anew at "
            f"every start: make the folder yours alone (chmod 700), or set PACELINE_CACHE to one "
            "that is",
            stacklevel=3,
        )
    return folder if safe else None


def is_ours(path: Path) -> bool:
    """Whether a file or folder belongs to this user, and nobody else may write to it; no link."""
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode):
        return False
    return os.name != "posix" or (found.st_uid == os.geteuid() and not found.st_mode & 0o022)
