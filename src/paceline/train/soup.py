"""`paceline soup`: several models that were trained from one start, averaged into one.

Soups are scored in the place of one model's weights, a tensor at a time: the memory needed is that
of one model and twice its largest tensor, whatever the number of models. Wortsman et al. 2022,
arXiv:2203.05482.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import AutoConfig

from ..sums import CARD, write_sums
from . import InputError, folder, reporting, reporting_disk
from .evaluate import find_device
from .held_out import Difference, HeldOut, difference, held_out_by
from .manifest import environment, model_card, read_json, without_nan
from .merge import OF_FACTORS, adapter_config, check_mergeable
from .model import load_to_score, tensors_by_name
from .options import Soup
from .recipe import Recipe, read_recipe
from .terminal import quiet, say, steady_bars
from .weighted import Checkpoint, put_sums, read_headers, weighted_sum, write

# Keys of config.json in which models of one start may differ.
FREE_KEYS = re.compile(
    r"^(_name_or_path|transformers_version|use_cache|(bos|eos|pad)_token_id)$|dtype$|drop"
)
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model")
SET_IN_USE = ("truncation", "padding")  # of tokenizer.json
Kind = Literal["greedy", "uniform"]
Members = tuple[int, ...]  # places of ingredients in the order given


def soup_command(options: Soup, console: Console) -> None:
    """Score, print a table, and write the soup, whole or not at all.

    Raises:
        InputError: something given cannot be used; nothing is written then.
    """
    device = find_device(options.device)
    quiet()
    with reporting_disk(options.out):
        paths = [
            Path(folder.model_of_run(str(path), "ingredients")) for path in options.ingredients
        ]
        checkpoints = [read_headers(path) for path in paths]
        for path, checkpoint in zip(paths, checkpoints, strict=True):
            if checkpoint.kind == "a file":
                raise InputError(f"ingredients: {path} is a file; give the folder of a model")
        check_mergeable(checkpoints, options.out)
        start = _common_start([checkpoint.path for checkpoint in checkpoints])
        first = next((path for path in paths if folder.run_of(path)), paths[0])
        recipe = _recipe(options, first)
        held_out = held_out_by(options, _with_tokenizer(first), recipe)
        found = score_soups(checkpoints, held_out, console, device, recipe.attention)
        names = [str(path) for path in options.ingredients]
        facts = _facts(found, names, held_out, options.kind, start)
        _show(facts, console)
        if checkpoints[0].kind == "an adapter folder":
            say(console, OF_FACTORS)
        _write(options.out, checkpoints, found, facts, console)
    say(console, f"{facts['said']}\nThe model: {options.out}")


def _recipe(options: Soup, model: Path) -> Recipe:
    """The recipe by which data are read."""
    if options.recipe is not None and options.data is None:
        raise InputError("recipe: it says how --data are read; give --data, or leave it out")
    run = folder.run_of(model)
    if options.data is None and options.task is None and run is None:
        raise InputError("data: no ingredient is in the folder of a run; give --data or --task")
    if options.recipe is None and run is not None:
        return Recipe(**folder.recipe_of(run, option="ingredients"))
    values = {} if options.recipe is None else read_recipe(options.recipe)
    # Of the recipe's own model, which is another one, nothing is taken.
    own = {"model": str(model), "config": None, "from_scratch": False, "lora_rank": 0}
    recipe = Recipe(**values | own)
    room = _config(_base_of(model)).get("max_position_embeddings", recipe.context)
    return recipe.model_copy(update={"context": min(recipe.context, room)})


def _with_tokenizer(path: Path) -> Path:
    """The folder itself, or of an adapter without a tokenizer its base model."""
    has_one = any((path / name).is_file() for name in TOKENIZER_FILES)
    return path if has_one else Path(_base_of(path))


def _base_of(path: Path) -> str:
    """The model that an adapter in a folder is for, or the folder itself."""
    return str(adapter_config(path).get("base_model_name_or_path") or path)


def _config(name: str) -> dict[str, Any]:
    """The configuration of a language model, with all defaults."""
    with reporting(f"{name} cannot be loaded", OSError, ValueError):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    return dict(config.get_text_config().to_dict())


# ---- one start ---------------------------------------------------------------------------------


def _common_start(paths: Sequence[Path]) -> str | None:
    """What all models were trained from, if a run's folder says it.

    Raises:
        InputError: two of them differ in something that those of one start have in common.
    """
    known: dict[str, tuple[Path, Any]] = {}
    for path in paths:
        for what, value in _signs_of_start(path):
            other, before = known.setdefault(what, (path, value))
            if before != value:
                said = f": {before} and {value}" if isinstance(value, str | int | float) else ""
                raise InputError(
                    f"ingredients: {other} and {path} differ in their {what}{said}; only models "
                    "that were trained from one start can be averaged"
                )
    return known["start"][1] if "start" in known else None


def _signs_of_start(path: Path) -> Iterator[tuple[str, Any]]:
    """What a folder has that is the same for all models of one start, with its name."""
    adapter = adapter_config(path)
    if base := adapter.get("base_model_name_or_path"):
        yield "base model", _one_name(base)
        yield "revision of the base model", adapter.get("revision")
    if (path / "config.json").is_file():
        for key, value in _config(str(path)).items():
            if not FREE_KEYS.search(key):
                yield f"architecture, {key} of config.json", value
    for name in TOKENIZER_FILES:
        if (path / name).is_file():
            content: Any = (path / name).read_bytes()
            if name == "tokenizer.json":
                values = read_json(path / name)
                content = {k: x for k, x in values.items() if k not in SET_IN_USE}
            yield f"tokenizer, {name}", content
    if start := _start_of(path):
        yield "start", start


def _start_of(path: Path) -> str | None:
    """The weights that a chain of runs began with; None for a model outside of runs."""
    start, seen = None, set[Path]()
    while path.exists() and (run := folder.run_of(path)) and run not in seen:
        seen.add(run)
        recipe = folder.recipe_of(run, option="ingredients")
        model = recipe.get("model")
        if model is None or recipe.get("from_scratch"):
            config = {"model": model, **(recipe.get("config") or {})}
            known = ", ".join(f"{key} {x}" for key, x in sorted(config.items()) if x is not None)
            return f"random weights of seed {recipe.get('seed', 0)} ({known})"
        start, path = _one_name(model), Path(model)
        if recipe.get("lora_rank") and not adapter_config(path):
            return f"{start}, and LoRA's random factors of seed {recipe.get('seed', 0)}"
    return start


def _one_name(name: str) -> str:
    """One name for one folder, however it is written."""
    return str(Path(name).resolve()) if Path(name).exists() else name


# ---- scoring -----------------------------------------------------------------------------------


class Found(NamedTuple):
    """Costs of each example, lower is better, by the ingredients whose mean was scored."""

    choosing: dict[Members, list[float]]
    reporting: dict[Members, list[float]]
    best: Members  # one ingredient
    greedy: Members
    uniform: Members

    def of(self, kind: Kind) -> Members:
        """The ingredients of a soup."""
        return self.greedy if kind == "greedy" else self.uniform


def score_soups(
    checkpoints: Sequence[Checkpoint],
    held_out: HeldOut,
    console: Console,
    device: str = "cpu",
    attention: str | None = None,
) -> Found:
    """Score all ingredients and soups on one half; the soups and the best one on the other.

    Args:
        checkpoints: folders of models or adapters that can be merged.
        held_out: examples; half of them to choose by.
        console: shows a bar.
        device: to compute on.
        attention: implementation by its name in transformers; by default its choice.

    Raises:
        InputError: a model cannot be loaded, or no ingredient has a finite score.
    """
    number = len(checkpoints)
    uniform: Members = tuple(range(number))
    with steady_bars(console) as progress:
        bar = progress.add_task("scoring", total=2 * number + 3, losses="")
        model = load_to_score(checkpoints[0].path, device, attention)
        tensors = _tensors(model, checkpoints[0])

        def costs(members: Members, of: Callable[[Any], list[float]]) -> list[float]:
            progress.update(bar, advance=1, losses=f"{len(members)} of {number}")
            shares = [1 / len(members)] * len(members)
            put_sums(tensors, [checkpoints[i] for i in members], lambda _: shares)
            return of(model)

        singles: list[Members] = [(i,) for i in range(number)]
        choosing = {x: costs(x, held_out.choosing.costs) for x in (*singles, uniform)}

        def total(members: Members) -> float:
            if members not in choosing:
                choosing[members] = costs(members, held_out.choosing.costs)
            found = sum(choosing[members])
            return found if math.isfinite(found) else math.inf

        best, *others = sorted(singles, key=total)
        if total(best) == math.inf:
            raise InputError("ingredients: none of them has a finite score")
        greedy = best
        for other in others:
            trial = tuple(sorted(greedy + other))
            if total(trial) < total(greedy):
                greedy = trial
        reported = dict.fromkeys((best, greedy, uniform))
        reporting_on = {x: costs(x, held_out.reporting.costs) for x in reported}
    return Found(choosing, reporting_on, best, greedy, uniform)


def _tensors(model: Any, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The tensors of a model that a checkpoint of it has, by their names there.

    Raises:
        InputError: the model has others, as where several tensors of a file become one.
    """
    found = tensors_by_name(model, checkpoint.tensors)
    missing = [name for name, x in found.items() if x is None]
    kept = {name: x for name, x in found.items() if x is not None}
    own = {id(x) for x in kept.values()}
    if missing and any(id(x) not in own for x in model.parameters()):
        raise InputError(
            f"ingredients: {checkpoint.path} has the tensor {missing[0]!r}, which the model has by "
            "no such name, so that its mean cannot be scored; paceline average merges without"
        )
    return kept


# ---- the result --------------------------------------------------------------------------------


def _facts(
    found: Found, names: Sequence[str], held_out: HeldOut, kind: Kind, start: str | None
) -> dict[str, Any]:
    """What paceline.json says of a soup."""
    members, base = found.of(kind), found.reporting[found.best]
    best, counts = names[found.best[0]], held_out.reporting.counts
    reported = {}
    for name, x in {"best": found.best, "uniform": found.uniform, "greedy": found.greedy}.items():
        gap = difference(found.reporting[x], base, counts).times(held_out.sign)
        reported[name] = {
            "ingredients": [names[i] for i in x],
            "score": held_out.score(found.choosing[x], held_out.choosing),
            "other_half": held_out.score(found.reporting[x], held_out.reporting),
            **gap._asdict(),
        }
    if members == found.best:
        said = f"No mean of {best}, the best, and another ingredient has a better score: the soup "
        said += "is the best alone."
    else:
        said = (
            f"The {kind} soup is the mean of {len(members)} of {len(names)} ingredients. On the "
            f"other half, {len(counts)} examples, its difference from the best, {best}, is "
            f"{Difference.of(reported[kind])} ({held_out.measure})."
        )
    ingredients = [
        {
            "ingredient": name,
            "weight": (i in members) / len(members),
            "score": held_out.score(found.choosing[(i,)], held_out.choosing),
        }
        for i, name in enumerate(names)
    ]
    return {
        "rule": f"{kind} soup",
        "start": start,
        "ingredients": ingredients,
        "measure": held_out.measure,
        "higher_is_better": held_out.higher_is_better,
        "examples": held_out.examples,
        "reported": reported,
        "said": said,
        "paceline": version("paceline"),
    }


def _show(facts: dict[str, Any], console: Console) -> None:
    """Print the scores on both halves."""
    table = Table(box=MARKDOWN)
    table.add_column("model", overflow="fold")
    for title in ("score", "on the other half", "difference from the best [95 %]"):
        table.add_column(title, justify="right", no_wrap=title == "score")
    reported = dict(facts["reported"])
    best = reported.pop("best")
    for x in facts["ingredients"]:
        is_best = [x["ingredient"]] == best["ingredients"]
        other = f"{best['other_half']:.4f}" if is_best else ""
        table.add_row(Text(x["ingredient"]), f"{x['score']:.4f}", other, "")
    for kind, x in reported.items():
        mark = " ←" if facts["rule"] == f"{kind} soup" else ""
        other, gap = f"{x['other_half']:.4f}", str(Difference.of(x))
        name = f"{kind} soup of {len(x['ingredients'])}{mark}"
        table.add_row(
            name, f"{x['score']:.4f}", other, gap if x["ingredients"] != best["ingredients"] else ""
        )
    better = "higher" if facts["higher_is_better"] else "lower"
    where = f"on {facts['examples']['choosing']} examples to choose by"
    say(console, f"Score: {facts['measure']}, {better} is better, {where}:")
    console.print(table)


def _write(
    out: Path,
    checkpoints: Sequence[Checkpoint],
    found: Found,
    facts: dict[str, Any],
    console: Console,
) -> None:
    """Write the folder, with what belongs to the best ingredient beside the weights."""
    shares = {i: x["weight"] for i, x in enumerate(facts["ingredients"]) if x["weight"]}
    chosen = [checkpoints[i] for i in shares]

    def finish(partial: Path) -> None:
        (partial / CARD).write_text(_card(facts), encoding="utf-8")
        write_sums(partial)

    write(
        out,
        checkpoints[found.best[0]],
        lambda name, dtype: weighted_sum(name, chosen, [*shares.values()], dtype),
        without_nan(facts),
        console,
        finish=finish,
    )


def _card(facts: dict[str, Any]) -> str:
    """The card of a soup, which names its ingredients and those left out."""
    about = environment()
    size = facts["examples"]
    rows = {
        "weights": f"{facts['rule']}: a mean of models that were trained from one start",
        "start": facts["start"],
        "score": f"{facts['measure']}, on {size['choosing']} examples of {', '.join(size['data'])}",
        "versions": ", ".join(f"{k} {v}" for k, v in about["versions"].items()),
    }
    lines = [
        f"| {x['ingredient']} | {x['score']:.4f} | "
        + (f"{x['weight']:.4g} |" if x["weight"] else "left out |")
        for x in facts["ingredients"]
    ]
    table = "\n".join(["| ingredient | score | weight |", "|---|---:|---:|", *lines])
    return f"{model_card(rows, about['command'])}\n## Ingredients\n\n{table}\n\n{facts['said']}\n"
