"""What results were made with: command, versions, commit, hardware; JSON files and model cards."""

import contextlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..files import whole
from . import InputError, reporting

PACKAGES = (
    *("paceline", "torch", "transformers", "accelerate", "tokenizers"),
    *("schedulefree", "numpy", "pydantic", "tyro"),
)


def environment() -> dict[str, Any]:
    """Command, start time, versions, git commit (None outside a checkout) and hardware."""
    import torch

    return {
        "command": shlex.join(["paceline", *sys.argv[1:]]),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **{p: version(p) for p in PACKAGES}},
        "git_commit": _git_commit(),
        "hardware": {
            "system": platform.platform(),
            "cpu": _cpu(),
            "cores": cores(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
    }


def cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def write_json(path: Path, value: Any) -> None:
    """Write an object to a file, whole or not at all; see `paceline.files.whole`."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def without_nan(value: dict[str, Any]) -> dict[str, Any]:
    """For JSON, which has no NaN: null instead."""
    return dict(json.loads(json.dumps(value), parse_constant=lambda _: None))


def model_card(
    rows: dict[str, Any], command: str, base_model: str | None = None, datasets: Sequence[str] = ()
) -> str:
    """A model card: the header that the Hub reads, a table of facts, and the command.

    Args:
        rows: of the table; those that are None are left out.
        command: that made the model.
        base_model: that it was trained from.
        datasets: names on the Hub.
    """
    import yaml

    head: dict[str, Any] = {"library_name": "transformers", "tags": ["paceline"]}
    head |= {"base_model": base_model} if base_model else {}
    head |= {"datasets": list(datasets)} if datasets else {}
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items() if value is not None)
    return (
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n# A model trained by paceline\n\n"
        f"| | |\n|---|---|\n{table}\n\n    {command}\n"
    )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        InputError: the file cannot be read, or does not hold a JSON object.
    """
    advice = f"mend it or leave out {path.parent}"
    try:
        with reporting(f"cannot read {path}", OSError):
            value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # not UTF-8 among them
        raise InputError(f"{path} is not JSON ({error}); {advice}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} is not a JSON object; {advice}")
    return value


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git_commit() -> str | None:
    """The commit, with `-dirty` appended if tracked files have changed since."""
    if not (git := shutil.which("git")):
        return None

    def ask(*words: str) -> str | None:
        command = [git, "-C", str(Path(__file__).parent), *words]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        return None if run.returncode else run.stdout.strip()

    if ask("ls-files", "--error-unmatch", __file__) is None:
        return None
    changed = ask("status", "--porcelain", "--untracked-files=no")
    return f"{ask('rev-parse', 'HEAD')}{'-dirty' if changed else ''}"
