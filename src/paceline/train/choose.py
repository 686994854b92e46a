"""`paceline choose`: which average a run returns, chosen on held-out data after its training.

Averages that were not kept are rebuilt from snapshots of those that were (`paceline.synthesis`),
one at a time and in the place of the model's weights: the memory needed is that of one model and a
few times its largest tensor.
"""

import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from matplotlib.figure import Figure
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import Trainer

from ..averaging import Averaging, PowerEMA, parse
from ..files import put, remove, scratch, whole
from ..snapshots import save_averages
from ..sums import CARD, find_damage, write_sums
from ..synthesis import LIMIT
from . import InputError, folder, reporting, reporting_disk
from .evaluate import find_device
from .held_out import Difference, Half, HeldOut, difference, held_out_by
from .manifest import environment, read_json, without_nan, write_json
from .methods import Setup
from .model import load_to_score, tensors_by_name
from .options import Choose
from .page import COLOURS, MARKERS, PHONE, dress, put_legend, save, write_page
from .rebuild import (
    Kept,
    Weights,
    model_like,
    read_snapshots,
    rebuilt_tensor,
    rounding_noise,
    snapshot_files,
    weights_of,
)
from .recipe import Recipe
from .terminal import quiet, say, steady_bars
from .weighted import Checkpoint, load_tensor, put_sums, read_headers, write

KAPPAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)  # of the power EMAs that are tried
LIVE, DEFAULT, KEPT, REBUILT = "live", "default", "kept", "rebuilt"
WEIGHTS = "what paceline choose found best after the training, on held-out data"
FEWEST = 30  # examples in a half: of fewer, the best score is chance, and the default stays
WIDTH = 40  # of the curve in the terminal


def choose_command(options: Choose, console: Console) -> None:
    """Choose, print a table and a curve, and write the result to the run's folder.

    Raises:
        InputError: something given cannot be used; nothing has changed then.
    """
    run = options.run
    if not folder.is_begun(run):
        raise InputError(f"run: {run} is no folder of a run: it has no {folder.RECIPE}")
    if not folder.is_finished(run):
        raise InputError(
            f"run: {run} is not finished; paceline train --resume {run} goes on with it"
        )
    rules = None if options.rules is None else _parsed(options.rules)
    device = find_device(options.device)
    quiet()
    with folder.locked(run), reporting_disk(run):
        recipe = Recipe(**folder.recipe_of(run, option="run"))
        held_out = held_out_by(options, run / folder.MODEL, recipe)
        choose(run, recipe, held_out, console, rules=rules, device=device)


def _parsed(texts: Sequence[str]) -> list[Averaging]:
    with reporting("rules", ValueError):
        return [parse(text) for text in texts]


# ---- what can be chosen ------------------------------------------------------------------------


class Candidate(NamedTuple):
    """Weights that may be returned."""

    name: str  # a rule as text, or "live"
    kind: str
    rule: Averaging | None = None
    weights: Weights | None = None  # how to rebuild it
    error: float = 0.0  # that is to be expected of it


def _candidates(
    kept: Sequence[Kept], default: Averaging | None, rules: Sequence[Averaging] | None
) -> tuple[list[Candidate], list[str]]:
    """The averages that the snapshots give besides the default, and the rules that they do not."""
    last = max(one.snapshot.step for one in kept)
    there = [one.snapshot.rule for one in kept if one.snapshot.step == last]
    wanted = [PowerEMA(kappa) for kappa in KAPPAS] if rules is None else rules
    noise, names = rounding_noise(kept), list(kept[-1].checkpoint.tensors)
    found, left_out = [], []
    for rule in dict.fromkeys([*there, *wanted]):
        if rule == default:
            continue
        try:
            weights = weights_of(kept, rule, noise, math.inf)
            error = max(weights(name).error for name in names)
        except InputError:  # of a rule that keeps more tensors
            error = math.inf
        if error > LIMIT:
            left_out.append(str(rule))
        else:
            kind = KEPT if rule in there else REBUILT
            found.append(Candidate(str(rule), kind, rule, weights, error))
    return found, left_out


@contextmanager
def _snapshots(run: Path, recipe: Recipe) -> Iterator[list[Kept]]:
    """The snapshots of a run; without any, those of the averages in its checkpoints."""
    with ExitStack() as stack:
        place = run / folder.AVERAGES
        if not place.is_dir() or not any(place.glob("step-*")):
            place = stack.enter_context(scratch(run, folder.AVERAGES))
            _write_snapshots(run, recipe, place)
        files = snapshot_files([place])
        if not files:
            raise InputError(f"run: the files in {place} do not say which averages they are")
        for file in files:
            folder.require_whole(file.parent, "run")
        yield read_snapshots(files)


def _write_snapshots(run: Path, recipe: Recipe, place: Path) -> None:
    """Write snapshots of the averages that checkpoints have.

    Raises:
        InputError: they have none that can be read.
    """
    advice = "train with --snapshots 12 to choose among averages"
    checkpoints = folder.checkpoints_in(run / folder.CHECKPOINTS)
    if recipe.lora_rank or not checkpoints:
        what = "its checkpoints hold adapters" if checkpoints else "it has no checkpoints"
        raise InputError(f"run: {run} has no snapshots of averages, and {what}; {advice}")
    for checkpoint in checkpoints:
        if damage := find_damage(checkpoint):
            raise InputError(f"run: {damage}; remove that checkpoint, or {advice}")
        file = checkpoint / "optimizer.pt"
        if not file.is_file():
            raise InputError(f"run: {checkpoint} has no optimizer.pt to take averages from")
        model = load_to_score(checkpoint)
        decayed = set(Trainer.get_decay_parameter_names(cast(Any, None), model))
        setup = Setup(model, decayed, recipe.weight_decay, 0, folder.step_of(checkpoint) or 1)
        optimizer = recipe.parsed.build(setup)
        with reporting(f"run: no averages can be taken from {file}", ValueError, RuntimeError):
            optimizer.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
            save_averages(place, model, optimizer)


def _parameters(model: Any, last: Checkpoint) -> dict[str, Tensor]:
    """The parameters of a model by the names that they have in snapshots.

    Raises:
        InputError: the snapshots are of another model.
    """
    found = {}
    for name, own in tensors_by_name(model, last.tensors).items():
        header = last.tensors[name]
        if own is None or tuple(own.shape) != header.form.shape:
            what = "missing" if own is None else f"of shape {tuple(own.shape)}"
            raise InputError(
                f"run: tensor {name!r} of the snapshots, of shape {header.form.shape}, is {what} "
                "in the model: they are of another one"
            )
        found[name] = own
    return found


def _check_same_run(
    kept: Sequence[Kept], default: Averaging | None, parameters: dict[str, Tensor]
) -> None:
    """Refuse snapshots whose last average of the default's rule is not the default.

    Raises:
        InputError: they are of another run, or of an earlier step.
    """
    last = max(one.snapshot.step for one in kept)
    for one in kept:
        if one.snapshot.rule != default or one.snapshot.step != last:
            continue
        for name, p in parameters.items():
            x = load_tensor(one.checkpoint, name)
            narrow = min(x.itemsize, p.itemsize) < 4
            most = (2.0**-7 if narrow else 1e-5) * float(x.float().abs().max())
            if float((x.float() - p.detach().float().cpu()).abs().max()) > most:
                raise InputError(
                    f"run: {one.checkpoint.path} is not what the run returned: the snapshots are "
                    "of another run, or of an earlier step"
                )


# ---- choosing ----------------------------------------------------------------------------------


def is_chosen(run: Path) -> bool:
    """Whether a choice was made in a run and has been written to its end."""
    return (run / folder.CHOICE).is_file()


def choose(
    run: Path,
    recipe: Recipe,
    held_out: HeldOut,
    console: Console,
    *,
    rules: Sequence[Averaging] | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Choose the average that a finished run returns, and write it.

    Args:
        run: the folder, which this process has locked.
        recipe: of the run.
        held_out: examples; half of them to choose by.
        console: for a table, a curve and a sentence.
        rules: what to try; by default power EMAs of `KAPPAS`.
        device: to compute on; by default an accelerator, if there is one.

    Returns:
        The content of choice.json.

    Raises:
        InputError: something cannot be used; nothing has changed then.
    """
    with reporting_disk(run):
        return _choose(run, recipe, held_out, console, rules, device or find_device(None))


def _choose(
    run: Path,
    recipe: Recipe,
    held_out: HeldOut,
    console: Console,
    rules: Sequence[Averaging] | None,
    device: str,
) -> dict[str, Any]:
    began, facts = time.perf_counter(), environment()
    if recipe.elastic is not None:
        raise InputError(f"choose: {run} is of elastic workers, which keep no averages to rebuild")
    before = _default_of(run)
    about = read_json(before / folder.AVERAGE_FACTS)
    rule = parse(about["rule"]) if about.get("rule") else None
    default = Candidate(str(rule or about["method"]), DEFAULT, rule)
    choosing, reporting_on = held_out.choosing, held_out.reporting
    with _snapshots(run, recipe) as kept, steady_bars(console) as progress:
        like, names = model_like(kept[-1], run / folder.MODEL, before)
        averages, left_out = _candidates(kept, rule, rules)
        bar = progress.add_task("choosing", total=len(averages) + 5, losses="")

        def score(model: Any, candidate: Candidate, half: Half) -> list[float]:
            progress.update(bar, advance=1, losses=candidate.name)
            return half.costs(model)

        live = Candidate(LIVE, LIVE)
        model = load_to_score(run / folder.LIVE, device, recipe.attention)
        scores = {live: score(model, live, choosing)}
        reported = {live: score(model, live, reporting_on)}
        del model  # before there is another
        model = load_to_score(before, device, recipe.attention)
        parameters = _parameters(model, kept[-1].checkpoint)
        _check_same_run(kept, rule, parameters)
        scores[default] = score(model, default, choosing)
        reported[default] = score(model, default, reporting_on)
        for candidate in averages:
            _put(candidate, kept, parameters)
            scores[candidate] = score(model, candidate, choosing)
        best = _best(scores, default)
        if best not in reported:
            _put(best, kept, parameters)
            reported[best] = score(model, best, reporting_on)
        del model, parameters
        result = _result(scores, best, default, held_out)
        result |= _reported(best, default, result, reported, held_out)
        result |= {"left_out": left_out, "snapshots": len(kept)}
        result["examples"] = held_out.examples
        progress.stop()
        if result["flat"]:
            if before.name == folder.FORMER:
                put(before, run / folder.MODEL)
            remove(run / folder.FORMER)  # which a kill may have left
        else:
            about |= rule_facts(best.rule, about.get("updates") or 0)
            about |= {
                "weights": WEIGHTS,
                "expected_error": best.error,
                "choice": without_nan(result),
            }
            if best.weights is None:
                like = read_headers(run / folder.LIVE)
            tensor = rebuilt_tensor(kept, best.weights, like, names)
            _install(run, before, like, tensor, about, _card(before, best, result), console)
    _note(run, result["chosen"])
    _show(result, console)
    save(_curve(result), run / folder.CHOICE_PICTURE)
    _report(run, recipe, result)
    result |= {"seconds": round(time.perf_counter() - began, 1), **facts}
    write_json(run / folder.CHOICE, without_nan(result))
    say(console, f"The model: {run / folder.MODEL}\nThe scores: {run / folder.CHOICE}")
    return result


def _default_of(run: Path) -> Path:
    """The folder of the model that the run itself returned, which is whole, as are live weights.

    Raises:
        InputError: a file is damaged, or the model is gone.
    """
    before = run / folder.MODEL
    if "choice" in read_json(before / folder.AVERAGE_FACTS):
        before = run / folder.FORMER
        if not before.is_dir():
            raise InputError(
                f"run: {run / folder.MODEL} was chosen, and {before} is gone; delete model/, and "
                f"paceline train --resume {run} writes the default again"
            )
    for path in (before, run / folder.LIVE):
        folder.require_whole(path, "run")
    return before


def _best(scores: dict[Candidate, list[float]], default: Candidate) -> Candidate:
    """The one of the lowest cost; of equal ones the default, and the live weights last.

    Raises:
        InputError: no cost is finite.
    """
    costs = {x: sum(found) for x, found in scores.items() if math.isfinite(sum(found))}
    if not costs:
        raise InputError("run: neither an average nor the live weights have a finite score")
    return min(costs, key=lambda x: (costs[x], x is not default, x.kind == LIVE))


def _result(
    scores: dict[Candidate, list[float]], best: Candidate, default: Candidate, held_out: HeldOut
) -> dict[str, Any]:
    """What was scored on the first half, and which is chosen by it."""
    rows, counts, sign = [], held_out.choosing.counts, held_out.sign
    gaps = {x: difference(found, scores[default], counts) for x, found in scores.items()}
    for x, found in scores.items():
        rows.append({"average": x.name, "kind": x.kind, "kappa": _kappa(x)})
        rows[-1] |= {"expected_error": x.error, "score": held_out.score(found, held_out.choosing)}
        rows[-1] |= gaps[x].times(sign)._asdict()
    few = min(len(counts), len(held_out.reporting.counts)) < FEWEST
    flat = few or best is default or not gaps[best].excludes_0
    chosen = default if flat else best
    return {
        "chosen": chosen.name,
        "best": best.name,
        "default": default.name,
        "flat": flat,
        "few": few,
        "measure": held_out.measure,
        "higher_is_better": held_out.higher_is_better,
        "averages": rows,
    }


def _reported(
    best: Candidate,
    default: Candidate,
    result: dict[str, Any],
    costs: dict[Candidate, list[float]],
    held_out: HeldOut,
) -> dict[str, Any]:
    """The best and the default on the other half, and what is to be said."""
    counts, sign, measure = held_out.reporting.counts, held_out.sign, held_out.measure
    gap = difference(costs[best], costs[default], counts).times(sign)
    other = (
        f"On the other half, {len(counts)} examples, its difference from the default is {gap} "
        f"({measure}){'' if gap.excludes_0 else ', which may be chance'}."
    )
    by = next(Difference.of(x) for x in result["averages"] if x["average"] == best.name)
    if result["few"]:
        said = (
            f"Too few to choose by: {len(held_out.choosing.counts)} and {len(counts)} examples in "
            f"the halves, and {FEWEST} are needed in each. The best may be chance: {best.name}, "
            f"{by} from the default. The default stays: {default.name}. Give more by --examples or "
            "--data."
        )
    elif best is default:
        said = f"The default is the best and stays: {default.name}."
    elif result["flat"]:
        said = (
            f"The curve is flat: {best.name} differs from the default by {by} ({measure}), which "
            f"may be chance. The default stays: {default.name}. {other}"
        )
    else:
        said = f"Chosen: {best.name}, in place of {default.name}. {other}"
    means = {
        name: held_out.score(costs[x], held_out.reporting)
        for name, x in zip(("score", "default_score"), (best, default), strict=True)
    }
    return {"said": said, "reported": {**means, **gap._asdict()}}


def _put(candidate: Candidate, kept: Sequence[Kept], parameters: dict[str, Tensor]) -> None:
    """Put a rebuilt average into a model, a tensor at a time."""
    weights = candidate.weights
    assert weights is not None
    checkpoints = [one.checkpoint for one in kept]
    put_sums(parameters, checkpoints, lambda name: weights(name).weights)


def _kappa(candidate: Candidate) -> float | None:
    """κ of a plain power EMA, and 0 of the live weights, which are one; else None."""
    if candidate.kind == LIVE:
        return 0.0
    rule = candidate.rule
    return rule.kappa if isinstance(rule, PowerEMA) and rule == PowerEMA(rule.kappa) else None


# ---- writing -----------------------------------------------------------------------------------


def rule_facts(rule: Averaging | None, updates: int) -> dict[str, Any]:
    """What paceline.json says of an average's rule, and how far back it reaches."""
    newest = float(rule.weight(updates)) if rule and updates else 1.0
    return {
        "rule": None if rule is None else str(rule),
        "kappa": getattr(rule, "kappa", None),
        "weight_of_newest": newest,
        "half_life_steps": math.log(0.5) / math.log1p(-newest) if 0 < newest < 1 else None,
    }


def _install(
    run: Path,
    before: Path,
    like: Checkpoint,
    tensor: Callable[[str, torch.dtype], Tensor],
    facts: dict[str, Any],
    card: str,
    console: Console,
) -> None:
    """Write model/, once the default is whole beside it."""

    def finish(partial: Path) -> None:
        (partial / CARD).write_text(card, encoding="utf-8")
        write_sums(partial)
        if before.name == folder.MODEL:
            with whole(run / folder.FORMER) as copy:
                shutil.copytree(before, copy)

    try:
        write(run / folder.MODEL, like, tensor, facts, console, finish=finish)
    except BaseException:
        if "choice" not in read_json(run / folder.MODEL / folder.AVERAGE_FACTS):
            remove(run / folder.FORMER)  # it is what model/ still is
        raise


def _note(run: Path, chosen: str) -> None:
    """Have the run's paceline.json say what model/ is; its rule and metrics are the default's."""
    facts = read_json(run / folder.AVERAGE_FACTS)
    weights = dict(folder.WEIGHTS_IN)
    if (run / folder.FORMER).is_dir():
        weights[folder.FORMER] = weights[folder.MODEL]
        weights[folder.MODEL] = f"{WEIGHTS}: {chosen}"
    write_json(run / folder.AVERAGE_FACTS, facts | {"weights": weights})


def _report(run: Path, recipe: Recipe, result: dict[str, Any]) -> None:
    """Write the run's report once more, with the choice."""
    lines, _ = folder.read_lines(run / folder.METRICS)
    history = [{k: math.nan if x is None else x for k, x in line.items()} for _, line in lines]
    average = read_json(run / folder.AVERAGE_FACTS)
    average = {k: x for k, x in average.items() if not isinstance(x, dict)}
    choice = (result["said"], _curve(result))
    write_page(recipe, history, average, folder.manifest_of(run), run, choice)


def _card(before: Path, chosen: Candidate, result: dict[str, Any]) -> str:
    """The default's card with a section on the choice."""
    path = before / CARD
    text = path.read_text(encoding="utf-8") if path.is_file() else "# A model trained by paceline\n"
    rows = {"weights": WEIGHTS, "rule of the average": chosen.name}
    lines = []
    for line in text.splitlines():
        name = line.removeprefix("| ").partition(" |")[0]
        if line.startswith("| ") and name in rows:
            line = f"| {name} | {rows[name]} |"
        lines.append(line)
    return "\n".join(lines) + f"\n\n## Chosen after the training\n\n{result['said']}\n"


# ---- showing -----------------------------------------------------------------------------------


def _show(result: dict[str, Any], console: Console) -> None:
    """Print the table, the curve over κ, and what came of it."""
    rows, size = result["averages"], result["examples"]
    table = Table(box=MARKDOWN)
    table.add_column("average", overflow="fold")
    for title in ("error", "score", "difference from the default [95 %]"):
        table.add_column(
            title, justify="right", no_wrap=title != "difference from the default [95 %]"
        )
    for x in rows:
        error = f"{x['expected_error']:.1%}" if x["kind"] == REBUILT else ""
        mark = " ←" if x["average"] == result["chosen"] else ""
        shown = x["average"] if x["average"] == x["kind"] else f"{x['average']}, {x['kind']}"
        table.add_row(
            Text(shown + mark),
            error,
            f"{x['score']:.4f}",
            "" if x["kind"] == DEFAULT else str(Difference.of(x)),
        )
    better = "higher" if result["higher_is_better"] else "lower"
    where = f"on {size['choosing']} examples to choose by"
    say(console, f"Score: {result['measure']}, {better} is better, {where}:")
    console.print(table)
    if left_out := result["left_out"]:
        say(
            console,
            f"Left out, because the snapshots cannot give them: {len(left_out)} "
            f"({', '.join(left_out)}).",
        )
    points = sorted((x["kappa"], x["score"]) for x in rows if x["kappa"] is not None)
    points = [(kappa, score) for kappa, score in points if math.isfinite(score)]
    if points:
        low, high = min(x for _, x in points), max(x for _, x in points)
        say(console, "\nScore over κ (0: the live weights):")
    for kappa, score in points:
        place = round(WIDTH * (score - low) / (high - low)) if high > low else 0
        say(console, f"  {kappa:<5g} {score:.4f}  {'·' * place}●")
    say(console, f"\n{result['said']}")


def _curve(result: dict[str, Any]) -> Figure:
    """Score over κ, with what was kept, the default and the choice."""
    figure = Figure(figsize=(PHONE, 4.2), layout="constrained", dpi=150)
    axis = figure.subplots()
    rows = [x for x in result["averages"] if math.isfinite(x["score"])]
    points = sorted((x["kappa"], x["score"]) for x in rows if x["kappa"])
    axis.plot(*zip(*points, strict=True), color="#8a939d", lw=1.2, zorder=1) if points else None
    kinds = {REBUILT: "rebuilt", KEPT: "kept in training", DEFAULT: "default", LIVE: "live weights"}
    handles: dict[str, Any] = {}
    for colour, marker, (kind, label) in zip(COLOURS[1:], MARKERS, kinds.items(), strict=False):
        own = [x for x in rows if x["kind"] == kind and x["kappa"] is not None]
        if own:
            at = [x["kappa"] for x in own], [x["score"] for x in own]
            handles[label] = axis.scatter(*at, s=42, color=colour, marker=marker)
    for x in rows:
        if x["kappa"] is None:  # of other rules
            axis.axhline(x["score"], color="#8a939d", lw=0.8, ls=":")
            axis.text(0.0, x["score"], x["average"], fontsize=9, va="bottom")
        if x["average"] == result["chosen"] and x["kappa"] is not None:
            ring: Any = {"s": 160, "facecolors": "none", "edgecolors": "#000000"}
            handles["chosen"] = axis.scatter([x["kappa"]], [x["score"]], **ring)
    dress(axis, result["measure"])
    axis.set_xlabel("κ of the power EMA (0: the live weights)", fontsize=11)
    put_legend(figure, handles)
    return figure
