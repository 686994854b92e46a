"""`paceline eval`: score the live weights and the returned model of a run on tasks of lm-eval."""

import importlib.util
import io
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from datetime import date
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, stdev
from types import SimpleNamespace
from typing import Any

import torch
from rich.box import MARKDOWN
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError
from transformers import AutoTokenizer, set_seed

from . import InputError, folder, reporting
from .manifest import environment, write_json
from .model import load_model
from .options import BATCH, Evaluation
from .recipe import Recipe
from .sandbox import clock
from .sources import from_hub, hub_is_there, is_here
from .terminal import progress_bars, say

COMPARED = {"live": folder.LIVE, "returned": folder.MODEL}
SEED = 1234  # lm-eval's own, for the same few-shot examples as its command shows
RESAMPLINGS = 1000  # for standard errors without a formula
Scores = dict[str, dict[str, dict[str, dict[str, Any]]]]


def evaluate(options: Evaluation, console: Console) -> dict[str, Any]:
    """Evaluate, print a table, and write the JSON file.

    Returns:
        The content of the file. `results` has task -> metric -> "live", "returned" and "difference"
        (returned - live), or only "model" -> `value` and `stderr`, in the metric's unit.

    Raises:
        InputError: something given cannot be used or reached.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError("lm-eval is not installed: pip install 'paceline[eval]'")
    models = _models(options.model)
    for path in models.values():
        folder.require_whole(Path(path), "model")
    device = find_device(options.device)
    out = options.out or (Path(options.model, folder.EVALUATION) if "returned" in models else None)
    if out and (out.is_dir() or not out.parent.is_dir()):
        raise InputError(f"out: {out} is a folder, or its folder does not exist; name a file")
    facts = environment()
    hub_is_there()  # otherwise its libraries would try for a minute
    with _quiet(console) as progress:
        reading = progress.add_task("tasks", total=None)
        tasks = load_tasks(options.tasks, options.include, options.few_shot)
        progress.remove_task(reading)
        tokenizer = [*models.values()][-1]
        with clock(day_of(Path(options.model))):
            scored = {
                name: _score(name, path, tokenizer, tasks, options, device, progress)
                for name, path in models.items()
            }
    last = [*scored.values()][-1]
    results = _by_task(scored)
    console.print(_score_table(results, last))
    facts["versions"] |= {package: version(package) for package in ("lm_eval", "datasets")}
    facts |= {
        "models": models,
        "device": device,
        "seed": SEED,
        **options.model_dump(mode="json", include={"limit", "few_shot", "batch", "chat"}),
        "tasks": {
            name: {
                "version": last["versions"][name],
                "few_shot": last["n-shot"][name],
                "examples": last["n-samples"][name],
                "config": json.loads(json.dumps(config, default=str)),
            }
            for name, config in last["configs"].items()
        },
        "results": results,
    }
    if out:
        with reporting(f"out: {out}", OSError):
            write_json(out, facts)
        say(console, f"Written: {out}")
    return facts


# ---- input --------------------------------------------------------------------------------------


def _models(given: str) -> dict[str, str]:
    """The models to evaluate: "live" and "returned" of a run, or "model" -> folder or Hub name."""
    path = Path(given)
    run = {name: str(path / part) for name, part in COMPARED.items() if _is_model(path / part)}
    if "returned" in run:
        return run
    if is_here(given) and not _is_model(path):
        if folder.is_begun(path):
            raise folder.unfinished(path, "model")
        raise InputError(
            f"{given} is neither the folder of a run (with model/ and live/) nor that of a model "
            "(with config.json)"
        )
    if not is_here(given) and (given.startswith((".", "/", "~")) or given.count("/") > 1):
        raise InputError(f"model: no such folder: {given}")
    return {"model": given}


def day_of(path: Path) -> date | None:
    """The day of a run, or of the run that a model is a part of; None without one."""
    run = folder.run_of(path)
    return None if run is None else Recipe(**folder.recipe_of(run)).date


def _is_model(path: Path) -> bool:
    return (path / "config.json").is_file() or (path / "adapter_config.json").is_file()


def find_device(given: str | None) -> str:
    """A device that can be used: the given one, or an accelerator, or the CPU."""
    if given is None:
        there = torch.accelerator.is_available()
        return str(torch.accelerator.current_accelerator()) if there else "cpu"
    try:
        torch.empty(0, device=given)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without it
        raise InputError(f"device: {given!r} cannot be used: {_first_line(error)}") from error
    return given


def load_tasks(
    names: Sequence[str], include: Path | None = None, few_shot: int | None = None
) -> Any:
    """The named tasks and groups with their data, as a `TaskDict` of lm-eval.

    Args:
        names: of tasks, groups or tags.
        include: folder with task files.
        few_shot: solved examples in each prompt; by default the task's own number.

    Raises:
        InputError: there is no such folder or task, or a task cannot be made.
    """
    from lm_eval.tasks import TaskManager

    if include and not include.is_dir():
        raise InputError(f"include: no such folder: {include}")
    # Only the user's own tasks if they suffice: reading all of lm-eval's files takes 9 seconds.
    manager = TaskManager(include_path=include, include_defaults=False)
    if not set(names) <= set(manager.all_subtasks):
        manager = TaskManager(include_path=include)
    for name in names:
        if name not in manager.all_tasks:
            near = get_close_matches(name, manager.all_tasks)
            hint = f"did you mean {' or '.join(near)}?" if near else "lm-eval ls tasks lists them"
            raise InputError(f"unknown task {name!r}; {hint}")
    try:
        tasks = manager.load([*names])
    except Exception as error:  # a task file can run any code
        hint = ""
        if isinstance(error, ConnectionError):
            hint = "; --include takes tasks of your own, on local data"
        raise InputError(f"tasks: {_first_line(error)}{hint}") from error
    for task in tasks["tasks"].values():  # as lm-eval's command does
        own = task.get_config("num_fewshot")
        if own is None or (own and few_shot is not None):
            task.set_config("num_fewshot", few_shot or 0)
    return tasks


def _first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


# ---- evaluating ---------------------------------------------------------------------------------


@contextmanager
def silenced() -> Iterator[None]:
    """Silence what the libraries log and print."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


@contextmanager
def _quiet(console: Console) -> Iterator[Progress]:
    """Show progress bars, and silence what the libraries log and print."""
    progress = progress_bars(
        Console(file=console.file),  # not the redirected stdout
        MofNCompleteColumn(),
        TextColumn("requests"),
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    with progress, silenced():
        yield progress


def _score(
    name: str,
    path: str,
    tokenizer: str,
    tasks: Any,
    options: Evaluation,
    device: str,
    progress: Progress,
) -> dict[str, Any]:
    """lm-eval's results for one model, with the scores of each example."""
    try:
        failed = f"there is no folder {path!r} here, and no such model on the Hub"
        with from_hub("model", path, failed) if not is_here(path) else nullcontext():
            model: Any = load_model(path, dtype="auto")
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{path} cannot be loaded: {_first_line(error)}") from error
    bar = progress.add_task(name, total=None)

    def answered(*_: Any) -> None:
        requests = sum(len(task.instances) for task in tasks["tasks"].values())
        progress.update(bar, advance=1, total=requests)

    how = options.model_dump(include={"limit", "few_shot", "batch", "chat"})
    return scores_of(model.to(device), tokenizer, tasks, answered=answered, **how)


def scores_of(
    model: Any,
    tokenizer: str,
    tasks: Any,
    *,
    samples: dict[str, list[int]] | None = None,
    limit: int | None = None,
    few_shot: int | None = None,
    batch: int = BATCH,
    chat: bool = False,
    answered: Callable[..., Any] = lambda *_: None,
) -> dict[str, Any]:
    """lm-eval's results for a model, with the scores of each example.

    Args:
        model: on its device.
        tokenizer: its folder, or its name on the Hub.
        tasks: of `load_tasks`.
        samples: numbers of the examples by task; by default all.
        limit: first so many examples of each task.
        few_shot: that was asked for, for the message where it is too many.
        batch: sequences computed at a time.
        chat: put each request into the model's chat template.
        answered: called after each request.

    Raises:
        InputError: the tokenizer cannot be loaded, or a task cannot be run.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    try:
        loaded = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{tokenizer} cannot be loaded: {_first_line(error)}") from error
    lm = HFLM(pretrained=model, tokenizer=loaded, batch_size=batch, softmax_dtype="float32")
    lm.set_cache_hook(SimpleNamespace(add_partial=answered))
    set_seed(SEED)
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(SEED)
    try:  # not simple_evaluate(), which runs git and pip to describe the machine
        return lm_eval.evaluate(
            lm=lm,
            task_dict=tasks,
            limit=limit,
            samples=samples,
            bootstrap_iters=RESAMPLINGS,
            apply_chat_template=chat,
        )
    except (ValueError, AssertionError) as error:
        hint = f"; --few-shot {few_shot} may be more examples than there are" if few_shot else ""
        raise InputError(f"tasks: {_first_line(error)}{hint}") from error


# ---- results ------------------------------------------------------------------------------------


def _by_task(scored: dict[str, dict[str, Any]]) -> Scores:
    """Value and standard error by task, metric, and model or "difference"."""
    results: Scores = {}
    for task, row in [*scored.values()][-1]["results"].items():
        for key, value in row.items():  # acc,FILTER and acc_stderr,FILTER among others
            metric, comma, which = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            cells: dict[str, dict[str, Any]] = {}
            for name, found in scored.items():
                numbers = found["results"][task]
                stderr = numbers.get(f"{metric}_stderr,{which}")  # "N/A" if there is none
                stderr = float(stderr) if isinstance(stderr, int | float) else None
                cells[name] = {"value": float(numbers[key]), "stderr": stderr}
            if len(cells) == 2:
                live, returned = (cell["value"] for cell in cells.values())
                stderr = _paired_stderr([*scored.values()], task, key)
                cells["difference"] = {"value": returned - live, "stderr": stderr}
            results.setdefault(task, {})[key.removesuffix(",none")] = cells
    return results


def _paired_stderr(scored: list[dict[str, Any]], task: str, key: str) -> float | None:
    """Standard error of the mean difference over the examples; None if the metric is not a mean.

    With the differences d of n examples it is stdev(d) / √n, with n - 1 degrees of freedom.
    """
    columns = [of_examples(found, task, key) for found in scored]
    if not all(columns) or len(columns[0]) < 2:
        return None
    differences = [after - before for before, after in zip(*columns, strict=True)]
    if not all(map(math.isfinite, differences)):
        return None
    return stdev(differences) / math.sqrt(len(differences))


def of_examples(found: dict[str, Any], task: str, key: str) -> list[float]:
    """A metric of each example of a task; none if the metric is not their mean.

    Args:
        found: lm-eval's results for a model.
        task: its name; a group has no examples.
        key: the metric and its filter, as in "acc,none".
    """
    metric, _, which = key.partition(",")
    samples = found["samples"].get(task, ())
    column = [sample.get(metric) for sample in samples if sample["filter"] == which]
    numbers = [float(x) for x in column if isinstance(x, int | float)]
    if not numbers or len(numbers) < len(column):
        return []
    mean, whole = fmean(numbers), found["results"][task][key]
    both_nan = math.isnan(mean) and math.isnan(whole)  # a model that has diverged
    return numbers if both_nan or math.isclose(mean, whole, abs_tol=1e-12) else []


def _score_table(results: Scores, found: dict[str, Any]) -> Table:
    table = Table(box=MARKDOWN)
    for title in ("task", "metric"):
        table.add_column(title, overflow="fold")
    first = next((cells for metrics in results.values() for cells in metrics.values()), {})
    for name in first:
        table.add_column(name, justify="right", no_wrap=True)
    for task, metrics in results.items():
        shots = found["n-shot"].get(task)
        for metric, cells in metrics.items():
            better = found["higher_is_better"].get(task, {}).get(metric.partition(",")[0])
            table.add_row(
                Text(f"{task}, {shots}-shot" if shots else task),
                Text(metric + {True: " ↑", False: " ↓", None: ""}[better]),
                *(
                    f"{cell['value']:{'+' if name == 'difference' else ''}.4f}"
                    + (f" ±{cell['stderr']:.4f}" if cell["stderr"] is not None else "")
                    for name, cell in cells.items()
                ),
            )
    return table
