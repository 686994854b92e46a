"""Where things made once are kept between runs."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$PACELINE_CACHE`, or else `paceline` in `$XDG_CACHE_HOME` (by default `~/.cache`).

    Raises:
        OSError: it is not there and cannot be made.
    """
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("PACELINE_CACHE") or Path(base) / "paceline")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
