"""The run folder: its files, how they are read and written, and the checks of a folder.

    recipe.yaml       every key of the recipe with its value; what a run resumes by
    manifest.json     an object: command, versions, commit, hardware, configuration, data, steps,
                      seconds; of a run also when it was resumed
    metrics.jsonl     an object a line: of a run, losses as they were logged; of a comparison or a
                      sweep, one evaluation of one method. A number that is not finite is null
    training.jsonl    of a sweep: an object a line, the log of each of its trainings
    checkpoints/      of a run: checkpoint-STEP folders, the newest with all that resuming needs.
                      Their weights are the returned model's
    live/             of a run: the live weights at the end, as a model that transformers loads
    model/            of a run: the returned model, likewise. Written last: it says "finished"
    paceline.json     which average the weights are, in the run's folder, live/, model/ and what
                      `paceline average` makes
    models/           of a comparison: the returned model of each of its runs
    tensorboard/      events, of a comparison in one folder a run
    report.html       of a run or a comparison: a page with curves, results and settings
    eval.json         what `paceline eval` has found
    certificate.json  of `paceline verify-resume`: what is equal; its runs are in whole/ and killed/

`paceline train` writes the files "of a run". `compare` and `sweep` write manifest.json,
metrics.jsonl and their own files. A file is complete or missing (`paceline.files.whole`), except
metrics.jsonl: lines are appended to it, and a kill may tear its last line.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

from . import InputError, reporting
from .manifest import read_json

RECIPE, MANIFEST, METRICS = "recipe.yaml", "manifest.json", "metrics.jsonl"
CHECKPOINTS, LIVE, MODEL, MODELS = "checkpoints", "live", "model", "models"
AVERAGE_FACTS, TENSORBOARD, REPORT = "paceline.json", "tensorboard", "report.html"
TRAINING, EVALUATION, CERTIFICATE = "training.jsonl", "eval.json", "certificate.json"

JsonLines = list[tuple[int, dict[str, Any]]]


def require_empty(folder: Path, instead: str = "") -> None:
    """Refuse a folder for results that holds something; `instead` ends the message.

    Raises:
        InputError: it is a file, or not empty, or cannot be looked into.
    """
    with reporting(f"out: cannot use {folder}", OSError):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"out: {folder} is not an empty folder; name another{instead}")


def make_empty(folder: Path) -> Path:
    """Make an empty folder for results, with its parents; returns it.

    Raises:
        InputError: it is not empty, or cannot be made.
    """
    require_empty(folder)
    return make(folder)


def make(folder: Path) -> Path:
    """Make a folder for results, with its parents, unless it is there; returns it.

    Raises:
        InputError: it cannot be made.
    """
    with reporting(f"out: cannot make the folder {folder}", OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def is_begun(run: Path) -> bool:
    """Whether a run has written its recipe, so that it can be resumed."""
    return (run / RECIPE).is_file()


def is_finished(run: Path) -> bool:
    """Whether a run has written its returned model, which it does last."""
    return (run / MODEL).is_dir()


def recipe_of(run: Path, *, option: str = "resume") -> dict[str, Any]:
    """The keys and values of a run's own recipe; `option` named the folder.

    Raises:
        InputError: it is no folder of a run.
    """
    from .recipe import read_recipe  # loads transformers, which `paceline average` does not need

    if not is_begun(run):
        raise InputError(f"{option}: {run} is no folder of a run: it has no {RECIPE}")
    return read_recipe(str(run / RECIPE))


def manifest_of(folder: Path) -> dict[str, Any]:
    """A folder's manifest.

    Raises:
        InputError: it is missing, or not a JSON object.
    """
    return read_json(folder / MANIFEST)


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoint-STEP folders in a folder, by step."""
    found = [path for path in folder.glob("checkpoint-*") if path.is_dir()]
    steps = {path: step for path in found if (step := step_of(path)) is not None}
    return sorted(steps, key=steps.__getitem__)


def step_of(checkpoint: Path) -> int | None:
    """The number that the name of a checkpoint's folder or file ends in, if it ends in one."""
    found = re.search(r"-(\d+)$", checkpoint.name.removesuffix(".safetensors"))
    return int(found[1]) if found else None


def last_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint of a run, if it has one."""
    return next(reversed(checkpoints_in(run / CHECKPOINTS)), None)


def json_line(values: dict[str, Any]) -> str:
    """An object as a line of metrics.jsonl; numbers that are not finite become null."""
    finite = {
        k: None if isinstance(x, float) and not math.isfinite(x) else x for k, x in values.items()
    }
    return json.dumps(finite, ensure_ascii=False) + "\n"


def read_lines(path: Path) -> tuple[JsonLines, bool]:
    """The objects of a file of JSON lines with their line numbers, from 1; NaN is read as None.

    Returns:
        The lines, and whether the last one is torn, as a kill leaves it; it is left out then.

    Raises:
        InputError: the file cannot be read, or another line is not a JSON object.
    """
    with reporting(f"cannot read {path}", OSError):
        *complete, rest = path.read_bytes().split(b"\n")
    lines: JsonLines = []
    for number, line in enumerate([*complete, rest], 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line, parse_constant=lambda _: None)
            if not isinstance(values, dict):
                raise ValueError("no object")
        except ValueError as error:  # not UTF-8 among them
            if number > len(complete):
                return lines, True
            raise InputError(
                f"{path}, line {number} is not a JSON object ({error}); mend or delete that line"
            ) from error
        lines.append((number, values))
    return lines, False
