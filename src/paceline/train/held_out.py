"""Halves of held-out examples: `paceline choose` chooses by one, and reports on the other."""

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import InputError, counted, folder
from .build import DoesNotFit, build_trainer, digest_of, evaluated_together, processes
from .evaluate import day_of, load_tasks, of_examples, scores_of, silenced
from .intervals import interval
from .options import Scoring
from .recipe import Recipe
from .sandbox import clock
from .sources import hub_is_there
from .terminal import tell, told_to

LEAST = 4  # examples: an interval needs two in each half


class Half(NamedTuple):
    """One half of the held-out examples."""

    counts: list[int]  # of each example: the tokens that count; 1 for an example of a task
    costs: Callable[[Any], list[float]]  # a model -> the cost of each example; lower is better


class HeldOut(NamedTuple):
    """Examples to score models on, and what their scores are."""

    choosing: Half
    reporting: Half
    names: tuple[str, ...]  # of the data, or of the task
    measure: str = "loss, nats a token"
    higher_is_better: bool = False

    @property
    def sign(self) -> int:
        """Of a score as it is shown: sign * (sum of costs) / (sum of counts)."""
        return -1 if self.higher_is_better else 1

    def score(self, costs: list[float], half: Half) -> float:
        """A model's score by its costs of one half, as it is shown."""
        return self.sign * sum(costs) / sum(half.counts)

    @property
    def examples(self) -> dict[str, Any]:
        """How many there are to choose by and to report on, and of what."""
        sizes = (len(half.counts) for half in (self.choosing, self.reporting))
        return {**dict(zip(("choosing", "reporting"), sizes, strict=True)), "data": [*self.names]}


def held_out_by(options: Scoring, model: Path, recipe: Recipe) -> HeldOut:
    """What the options say to score on.

    Args:
        options: of the command.
        model: the folder of a model, which has the tokenizer.
        recipe: by which data are read.

    Raises:
        InputError: they contradict each other, or what they name cannot be used.
    """
    if options.task is None:
        for name in ("metric", "include"):
            if getattr(options, name) is not None:
                raise InputError(f"{name}: it is of a task; name that by --task")
        return held_out_of(model, recipe, options.data, options.examples)
    if options.data is not None:
        raise InputError("data: a task has its own data; give --data or --task, not both")
    return task_of(model, options.task, options.metric, options.include, options.examples)


# ---- losses of sequences ------------------------------------------------------------------------


def held_out_of(
    model: Path, recipe: Recipe, names: tuple[str, ...] | None = None, most: int | None = None
) -> HeldOut:
    """A run's own sequences to evaluate on, which must be as they were, or those of other data.

    Args:
        model: the folder of a model, which has the tokenizer; without names one of a run.
        recipe: says how the data are read.
        names: of other data.
        most: sequences at most.

    Raises:
        InputError: they cannot be read, have changed, or are too few.
    """
    # What was trained on is loaded where a part of it was held out.
    once: dict[str, Any] = {"batch": processes().num_processes, "micro_batch": None}
    once |= {"steps": 1, "epochs": None, "tokens": None, "warmup": 0.0}
    once |= {"snapshots": 0, "choose": False, "fsdp": False, "elastic": None, "report_to": ()}
    once |= {"tokenizer": str(model), "chat_template": None}
    if names is not None:
        once |= {"data": names, "eval_data": names, "streaming": False}
        once |= {"examples": None, "eval_split": None, "skip_bad_rows": True}
        once |= {} if most is None else {"eval_examples": most}
    read: Recipe = recipe.model_copy(update=once)
    said: list[str] = []  # of its own data the run has said it
    with TemporaryDirectory() as place, told_to(said.append):
        try:
            trainer = build_trainer(read, Path(place), only_data=True)
        except DoesNotFit as error:  # the context is the run's
            raise InputError(f"{error.what}; give other data") from error
    for line in dict.fromkeys(said) if names is not None else ():
        if "to train on" not in line:
            tell(line)
    data = trainer.eval_dataset
    if names is None:
        run = folder.run_of(model)
        assert run is not None
        if digest_of(data) != folder.manifest_of(run)["data"]["evaluation_digest"]:
            raise InputError(
                "data: those that the run evaluated on have changed; give others by --data"
            )
        data = data.select(range(min(len(data), most or len(data))))
    names = names or recipe.eval_data or recipe.data_names
    return sequences(data, trainer.data_collator, recipe, names)


def sequences(
    data: Any, collate: Callable[[Any], Any], recipe: Recipe, names: tuple[str, ...]
) -> HeldOut:
    """The halves of a dataset's sequences, in its order. Their cost is the loss in nats.

    Raises:
        InputError: there are too few sequences.
    """
    rows = list(data)
    counts = [int((collate([row])["labels"][..., 1:] != -100).sum()) for row in rows]
    found = [(row, count) for row, count in zip(rows, counts, strict=True) if count]
    _require(len(found), "data", ", ".join(names), "sequence")
    # A packed row is not put together with others, so that it has a loss of its own.
    size = 1 if recipe.packing else evaluated_together(recipe, 1)
    halves = []
    for part in (found[: len(found) // 2], found[len(found) // 2 :]):
        chunks = [part[i : i + size] for i in range(0, len(part), size)]
        batches = [dict(collate([row for row, _ in chunk])) for chunk in chunks]
        halves.append(Half([count for _, count in part], _losses(batches, recipe.precision)))
    return HeldOut(halves[0], halves[1], names)


def _require(number: int, option: str, name: str, kind: str) -> None:
    if number < LEAST:
        raise InputError(
            f"{option}: {name} has {counted(number, kind)} to score on, and at least {LEAST} are "
            "needed, half of them to choose by and half to report on"
        )


def _losses(batches: list[dict[str, Tensor]], precision: str) -> Callable[[Any], list[float]]:
    @torch.no_grad()
    def losses(model: Any) -> list[float]:
        """The loss of each sequence in nats, summed over its tokens."""
        device, found = model.device, []
        for batch in batches:
            inputs = {name: x.to(device) for name, x in batch.items() if name != "labels"}
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                logits = model(**inputs, use_cache=False).logits
            for row, labels in zip(logits, batch["labels"].to(device), strict=True):
                loss = F.cross_entropy(
                    row[:-1].float(), labels[1:], ignore_index=-100, reduction="sum"
                )
                found.append(loss.item())
        return found

    return losses


# ---- scores of a task ---------------------------------------------------------------------------


def task_of(
    model: Path, name: str, metric: str | None, include: Path | None, most: int | None
) -> HeldOut:
    """The halves of the examples of a task of lm-eval, in its order.

    Args:
        model: the folder of a model, which has the tokenizer.
        name: of the task.
        metric: as `paceline eval` prints it: a mean over examples. None: the task's only one.
        include: folder with task files, if it is not one of lm-eval's.
        most: examples at most; None: all.

    Raises:
        InputError: lm-eval, the task or the metric is not there, or it has too few examples.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError("task: lm-eval is not installed: pip install 'paceline[eval]'")
    hub_is_there()  # otherwise its libraries would try for a minute
    with silenced():
        tasks = load_tasks([name], include)
    if list(tasks["tasks"]) != [name]:
        raise InputError(f"task: {name} is a group; give one of {', '.join(tasks['tasks'])}")
    task = tasks["tasks"][name]
    better = task.higher_is_better()
    if metric is None and len(better) == 1:
        [metric] = better
    higher = better.get(metric.partition(",")[0]) if metric else None
    if metric is None or higher is None:
        got = "name one by --metric" if metric is None else f"got {metric!r}"
        raise InputError(f"metric: {name} has {', '.join(better) or 'none'}; {got}")
    number = min(len(task.eval_docs), most or len(task.eval_docs))
    _require(number, "task", name, "example")
    asked, tokenizer, day = metric, str(model), day_of(model)

    def half(examples: range) -> Half:
        def costs(model: Any) -> list[float]:
            with silenced(), clock(day):
                found = scores_of(model, tokenizer, tasks, samples={name: [*examples]})
            scores = _of_each(found, name, asked)
            return [-x for x in scores] if higher else scores

        return Half([1] * len(examples), costs)

    middle = number // 2
    return HeldOut(half(range(middle)), half(range(middle, number)), (name,), metric, higher)


def _of_each(found: dict[str, Any], task: str, metric: str) -> list[float]:
    """A metric of each example.

    Raises:
        InputError: it has several filters, or is not a mean over examples.
    """
    keys = [key for key in found["results"][task] if metric in (key, key.partition(",")[0])]
    if metric + ",none" in keys:
        keys = [metric + ",none"]
    if len(keys) != 1:
        there = [x for x in found["results"][task] if "," in x and "_stderr" not in x]
        raise InputError(f"metric: {task} has no {metric!r}; it has {' and '.join(there)}")
    if numbers := of_examples(found, task, keys[0]):
        return numbers
    raise InputError(f"metric: {metric} of {task} is no mean over examples; name another")


# ---- differences --------------------------------------------------------------------------------


class Difference(NamedTuple):
    """A difference of two mean costs or scores, and its 95 % interval."""

    difference: float
    low: float
    high: float

    @classmethod
    def of(cls, row: dict[str, Any]) -> "Difference":
        """That of a row of results, which has its three numbers."""
        return cls(*(row[name] for name in cls._fields))

    def times(self, sign: int) -> "Difference":
        """Itself, or with -1 that of the opposite scores."""
        return self if sign == 1 else Difference(-self.difference, -self.high, -self.low)

    @property
    def excludes_0(self) -> bool:
        """Whether the interval has no 0 in it; never where there is none."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        ends = f"[{self.low:+.4f}, {self.high:+.4f}]"
        return f"{self.difference:+.4f} {'(no interval)' if math.isnan(self.low) else ends}"


def difference(costs: list[float], others: list[float], counts: list[int]) -> Difference:
    """Of mean costs, paired by example: with d the differences of sums over n tokens each,

        mean = Σd / Σn,     interval of Student's t over mean + (d - mean·n) / (Σn / examples)

    Args:
        costs: of each example, summed over its tokens.
        others: likewise, which are subtracted.
        counts: n of each example.

    Returns:
        With NaN for an interval where all examples differ alike: they have no spread to judge by.
    """
    gaps = [a - b for a, b in zip(costs, others, strict=True)]
    mean, size = sum(gaps) / sum(counts), fmean(counts)
    found = interval([mean + (d - mean * n) / size for d, n in zip(gaps, counts, strict=True)])
    if found is None or found[0] == found[1]:
        found = math.nan, math.nan
    return Difference(mean, *found)
