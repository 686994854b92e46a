"""The run folder: its files, how they are read and written, and the checks of a folder.

    recipe.yaml       every key of the recipe with its value; what a run resumes by
    manifest.json     an object: command, versions, commit, hardware, configuration, data, steps,
                      seconds; of a run also when it was resumed
    metrics.jsonl     an object a line: of a run, losses as they were logged; of a comparison or a
                      sweep, one evaluation of one method. A number that is not finite is null
    progress.txt      of a sweep: how far its trainings are, while they run
    training.jsonl    of a sweep: an object a line, the log of each of its trainings
    checkpoints/      of a run: checkpoint-STEP folders, the newest with all that resuming needs.
                      Their weights are the returned model's. set-aside-checkpoint-STEP folders
                      were newer than the one that --from named
    averages/         of a run with --snapshots: step-N folders, averages at some steps, from which
                      `paceline average` and `paceline choose` rebuild others
    live/             of a run: the live weights at the end, as a model that transformers loads
    model/            of a run: the returned model, likewise. Written last: it says "finished"
    samples.json      of a run: what live weights and returned model say to a few held-out prompts
    choice.json       of `paceline choose`: what it scored and chose, written last; choice.svg and
                      choice.png are the picture of it
    model-before-choice/  the model that the run returned, where `paceline choose` took another
    paceline.json     which average the weights are, in the run's folder, live/, model/ and what
                      `paceline average` and `paceline soup` make
    checksums.json    of each file beside it, in checkpoint-STEP/, live/, model/, and what
                      `paceline average` and `paceline soup` make
    .lock             who writes the folder now, as an object: host, process, since, command
    models/           of a comparison: the returned model of each of its runs
    tensorboard/      events, of a comparison in one folder a run
    report.html       of a run or a comparison: a page with curves, results and settings
    eval.json         what `paceline eval` has found
    certificate.json  of `paceline verify-resume`: what is equal; its runs are in whole/ and killed/

`paceline train` writes the files "of a run". `compare` and `sweep` write manifest.json,
metrics.jsonl and their own files. A file is complete or missing (`paceline.files.whole`), except
metrics.jsonl: lines are appended to it, and a kill may tear its last line.
"""

import itertools
import json
import math
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ..files import put, remove
from ..sums import SUMS, find_damage
from . import InputError, reporting
from .manifest import read_json

if TYPE_CHECKING:
    from rich.console import Console

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

RECIPE, MANIFEST, METRICS = "recipe.yaml", "manifest.json", "metrics.jsonl"
CHECKPOINTS, LIVE, MODEL, MODELS = "checkpoints", "live", "model", "models"
AVERAGES, AVERAGE_FACTS = "averages", "paceline.json"
CHOICE, CHOICE_PICTURE, FORMER = "choice.json", "choice", "model-before-choice"
TENSORBOARD, REPORT, SAMPLES = "tensorboard", "report.html", "samples.json"
TRAINING, EVALUATION, CERTIFICATE = "training.jsonl", "eval.json", "certificate.json"
PROGRESS = "progress.txt"
LOCK, SET_ASIDE = ".lock", "set-aside-"
WEIGHTS_IN = {  # as paceline.json says it
    MODEL: "the returned model: the average, or what the method returns instead",
    LIVE: "the live weights after the last step",
    CHECKPOINTS: "the returned model; the live weights are in the optimizer's state",
}
# What a checkpoint has besides the model.
TRAINING_STATE = (
    *("optimizer*", "scheduler*", "rng_state*", "trainer_state.json", "latest", "zero_to_fp32.py"),
)

JsonLines = list[tuple[int, dict[str, Any]]]

WAIT = 5.0  # seconds, while another process makes what is made once


class InUse(InputError):
    """Another process holds the lock of a folder."""


def require_empty(folder: Path, instead: str = "") -> None:
    """Refuse a folder for results that holds something; `instead` ends the message.

    Raises:
        InputError: it is a file, or not empty, or cannot be looked into.
    """
    with reporting(f"out: cannot use {folder}", OSError):
        if folder.is_dir():
            taken = any(path.name != LOCK for path in folder.iterdir())
        else:
            taken = folder.exists()
        if taken:
            raise InputError(f"out: {folder} is not an empty folder; name another{instead}")


def make(folder: Path) -> Path:
    """Make a folder for results, with its parents, unless it is there; returns it.

    Raises:
        InputError: it cannot be made.
    """
    with reporting(f"out: cannot make the folder {folder}", OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


# ---- one writer at a time -----------------------------------------------------------------------

_held: set[IO[bytes]] = set()  # open locks of this process


def _let_go() -> None:
    """Close the locks in a forked process, which would hold them longer than its parent lives."""
    for file in _held:
        file.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


@contextmanager
def locked(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold the lock of a folder for results, which is made if it is not there.

    It ends with the process. At the end, folders that were made and are empty are removed.

    Args:
        folder: the folder.
        shared: others that share it may hold it, too.

    Raises:
        InUse: another process holds it; the line names it.
        InputError: it cannot be made or written to.
    """
    if not os.path.isdir(folder):  # noqa: PTH112 - a name of any length
        require_empty(folder)
    made = [part for part in (folder, *folder.parents) if not part.exists()]
    path = make(folder) / LOCK
    try:
        with reporting(f"out: cannot write to {folder}", OSError):
            file = _take(path, shared)
        _held.add(file)
        try:
            yield
        finally:
            with suppress(OSError):
                if fcntl and shared:  # others may hold it
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            _held.discard(file)
            file.close()
    finally:
        for part in made:
            with suppress(OSError):
                part.rmdir()


def made_once(folder: Path, make: Callable[[Path], None], console: "Console") -> None:
    """Have one process make a folder, and others wait; nothing if it is there.

    Args:
        folder: of a model, in the cache.
        make: writes `MODEL` to the folder that it gets. That folder stays where it is killed, so
            that the next process can go on from what is there.
        console: says who is waited for.
    """
    said, lock = False, folder.with_name(f"{folder.name}-lock")
    while not folder.exists():
        try:
            with locked(lock):
                if not folder.exists():
                    begun = folder.with_name(f"{folder.name}-run")
                    make(begun)
                    put(begun / MODEL, folder)
                    remove(begun)
            with suppress(OSError):
                lock.rmdir()  # of a process that was killed
        except InUse as error:
            if not said:
                console.print(f"Waiting for another process: {error}", markup=False)
            said = True
            time.sleep(WAIT)


def _take(path: Path, shared: bool) -> IO[bytes]:
    while True:
        file = path.open("a+b", buffering=0)
        try:
            if instead := _refusal(file, shared):
                who = _holder(file)
                raise InUse(f"out: {path.parent} is in use by {who}; {instead}")
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                mine = {"host": platform.node(), "process": os.getpid()}
                mine |= {"since": datetime.now().astimezone().isoformat(timespec="seconds")}
                mine |= {"command": shlex.join(["paceline", *sys.argv[1:]])}
                try:
                    file.truncate(0)
                    file.write(json.dumps(mine).encode() + b"\n")
                except OSError:
                    path.unlink()
                    raise
                return file
        except BaseException:
            file.close()
            raise
        file.close()  # the last holder has just removed it


def _refusal(file: IO[bytes], shared: bool) -> str:
    """What to do instead if the lock is another's; otherwise it is ours, and the text is empty."""
    try:
        if not fcntl:
            raise OSError("no locks")
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return "wait for its end"
    except OSError:  # the file system has no locks: go by what the file says
        psutil = import_module("psutil")  # comes with accelerate
        file.seek(0)
        with suppress(ValueError, TypeError, KeyError):
            holder = json.loads(file.read())
            here = holder["host"] == platform.node()
            if not shared and not (here and not psutil.pid_exists(holder["process"])):
                return f"wait for its end, or delete {file.name} if it is no more"
    return ""


def _holder(file: IO[bytes]) -> str:
    file.seek(0)
    try:
        holder = json.loads(file.read())
        place = f"process {holder['process']} on {holder['host']} since {holder['since']}"
        return f"{place} ({holder['command']})"
    except (ValueError, TypeError, KeyError):
        return "another process, which has just begun"


# ---- runs ---------------------------------------------------------------------------------------


def is_begun(run: Path) -> bool:
    """Whether a run has written its recipe, so that it can be resumed."""
    return (run / RECIPE).is_file()


def run_of(path: Path) -> Path | None:
    """The folder of the run that a path is, or that has it as a model or a checkpoint."""
    path = path.absolute()  # the run's folder may be above the working directory
    above = path.parent.parent if path.parent.name in (CHECKPOINTS, AVERAGES) else path
    return next((part for part in (path, path.parent, above) if is_begun(part)), None)


def is_finished(run: Path) -> bool:
    """Whether a run has written its returned model, which it does last."""
    return (run / MODEL / AVERAGE_FACTS).is_file()


def unfinished(run: Path, option: str) -> InputError:
    """What to say of a run without its returned model; `option` named the folder."""
    newest = last_checkpoint(run)
    there = f"; or take {newest}" if newest else ""
    return InputError(
        f"{option}: {run} is not finished; paceline train --resume {run} goes on with it{there}"
    )


def model_of_run(name: str, option: str) -> str:
    """The folder of the returned model, where a name is that of a run's folder; else the name.

    Raises:
        InputError: the run is not finished.
    """
    run = Path(name)
    with suppress(OSError):  # of a name too long for a file
        if is_begun(run) and not (run / "config.json").is_file():
            if not is_finished(run):
                raise unfinished(run, option)
            return str(run / MODEL)
    return name


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


def checkpoint_to_resume(run: Path, name: str | None = None) -> Path | None:
    """The newest checkpoint of a run, or the one of that name; each byte has its check sum.

    Returns:
        The folder; None if the run has no checkpoint yet.

    Raises:
        InputError: there is no such checkpoint, or a file of it is damaged; the line names the
            newest other one that is whole.
    """
    found = {path.name: path for path in checkpoints_in(run / CHECKPOINTS)}
    if name is not None and name not in found:
        raise InputError(f"from: {run} has no {name!r}; it has {', '.join(found) or 'none'}")
    checkpoint = found.get(name or next(reversed(found), ""))
    if checkpoint is None or (damage := _damage(checkpoint)) is None:
        return checkpoint
    others = (path for path in reversed(found.values()) if path != checkpoint)
    whole = next((path for path in others if _damage(path) is None), None)
    raise InputError(
        f"resume: {damage}; "
        + (
            f"paceline train --resume {run} --from {whole.name} continues from an earlier step"
            if whole
            else f"no other checkpoint is whole: without {run / CHECKPOINTS} the run starts anew"
        )
    )


def checkpoint_to_continue(run: Path) -> Path | None:
    """The newest whole checkpoint of what is made once; None if there is none."""
    found = reversed(checkpoints_in(run / CHECKPOINTS))
    return next((path for path in found if _damage(path) is None), None)


def _damage(checkpoint: Path) -> str | None:
    """What is damaged in a checkpoint of a run, all of which have check sums."""
    sums = checkpoint / SUMS
    return find_damage(checkpoint) if sums.exists() else f"{sums} is missing"


def set_aside_newer(checkpoint: Path) -> list[Path]:
    """Rename the checkpoints after this one, so that they no longer count; returns the paths."""
    found = checkpoints_in(checkpoint.parent)
    newer = found[found.index(checkpoint) + 1 :]
    aside = [_free(path.with_name(SET_ASIDE + path.name)) for path in newer]
    for path, target in zip(newer, aside, strict=True):
        put(path, target)
    return aside


def _free(path: Path) -> Path:
    """The path, or with .2, .3, ... at its end where something has it."""
    numbered = (path.with_name(f"{path.name}.{i}") for i in itertools.count(2))
    return next(one for one in itertools.chain([path], numbered) if not one.exists())


def require_whole(path: Path, what: str, then: str = "") -> None:
    """Refuse a model's folder or file whose check sums are not right; without any, all is fine.

    In the folder of a checkpoint, training state is left out, which a model does not need.

    Args:
        path: what is about to be read.
        what: the option that named it, for the message.
        then: what to do about it. By default, that a change on purpose is made known.

    Raises:
        InputError: a file is damaged or missing; the line names it.
    """
    if damage := find_damage(path, TRAINING_STATE):
        sums = (path if path.is_dir() else path.parent) / SUMS
        raise InputError(
            f"{what}: {damage}; "
            + (then or f"restore it, or delete {sums} if it was changed on purpose")
        )


# ---- lines of JSON ------------------------------------------------------------------------------


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
        except (ValueError, RecursionError) as error:  # not UTF-8 among them
            if number > len(complete):
                return lines, True
            raise InputError(
                f"{path}, line {number} is not a JSON object ({error}); mend or delete that line"
            ) from error
        lines.append((number, values))
    return lines, False
