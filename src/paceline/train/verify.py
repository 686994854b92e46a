"""`paceline verify-resume`: compare a run that is killed and resumed with one that is not."""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import date, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback

from . import InputError, folder
from .build import evaluated_together
from .manifest import write_json
from .options import Train, Verify
from .recipe import Recipe
from .run import train
from .terminal import say

KILL_MOMENTS = ("evaluation", "save", "step")  # in turn


def verify(options: Verify, console: Console) -> int:
    """Train both, print the certificate, and write it to certificate.json.

    Returns:
        0 if all is equal bit for bit, or on other processes the order of the data; otherwise 1.

    Raises:
        InputError: the recipe cannot be trained, or a run failed for another reason than a kill.
    """
    out = options.out or Path("runs") / f"verify-{datetime.now():%Y-%m-%d_%H%M%S}"
    with folder.locked(out):
        folder.require_empty(out)
        return _verify(options, out, console)


def _verify(options: Verify, out: Path, console: Console) -> int:
    recipe = options.plain
    recipe = recipe.model_copy(update={"date": recipe.date or date.today()})  # of both runs
    (out / folder.RECIPE).write_text(recipe.to_yaml(), encoding="utf-8")
    whole, killed = out / "whole", out / "killed"
    resumed_on = options.resume_processes or options.processes

    def run(title: str, log: Path, moment: dict[str, Any], to: Path, processes: int) -> int:
        place = {"resume" if folder.is_begun(to) else "out": str(to)}
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        several = [*launcher, str(processes)] if processes > 1 else []
        words = [json.dumps(moment), json.dumps(place)]
        command = [sys.executable, *several, "-m", __name__, *words]
        with console.status(title), log.open("w") as file:
            status = subprocess.run(command, stdout=file, stderr=file, check=False).returncode
        if not moment and status:
            *_, last = log.read_text().strip().splitlines() or ["no word"]
            raise InputError(f"the run in {to} failed: {last.removeprefix('paceline: ')}")
        return status

    run("training without a kill", out / "whole.log", {}, whole, options.processes)
    facts = folder.manifest_of(whole)
    given, recipe = recipe, Recipe(**facts["recipe"])  # with a batch and a context that fit
    for key in ("batch", "micro_batch", "context"):
        if getattr(recipe, key) != getattr(given, key):
            say(console, f"• trained with {key} {getattr(recipe, key)}, which fits")
    together = evaluated_together(recipe, recipe.micro_batch or recipe.batch)
    batches = -(-facts["data"]["evaluation_sequences"] // together)
    rng = random.Random(0)
    kills: list[dict[str, Any]] = []
    for number in range(1, options.kills + 1):
        # The next evaluation and the next save come after this step.
        after = facts["steps"] * (number - 1 + rng.random()) / options.kills
        moment = {
            "at": KILL_MOMENTS[(number - 1) % len(KILL_MOMENTS)],
            "step": min(int(after), facts["steps"] - 1),
            "count": 1 + rng.randrange(2 * batches),
        }
        title = f"training until kill {number}, in the middle of {moment['at']}"
        on, log = resumed_on if kills else options.processes, out / f"kill-{number}.log"
        if not run(title, log, moment, killed, on) or not folder.is_begun(killed):
            raise InputError(f"kill {number} did not happen; see {log}")
        last = folder.last_checkpoint(killed)
        kills.append({**moment, "resumed from": last.name if last else "start"})
    run("training to the end", out / "end.log", {}, killed, resumed_on)
    rows = list(compare_runs(whole, killed))
    order = next(row["equal"] for row in rows if row["what"] == "data order")
    certificate = {
        "passed": all(row["equal"] for row in rows) or (order and resumed_on != options.processes),
        "rows": rows,
        "kills": kills,
        "processes": [options.processes, resumed_on],
        "manifest": facts,
    }
    write_json(out / folder.CERTIFICATE, certificate)
    table = Table("", "", title=f"Killed {len(kills)} times and resumed, beside never killed")
    for row in rows:
        drift = "bit for bit equal" if row["equal"] else row["drift"]
        fine = row["equal"] or certificate["passed"]
        table.add_row(row["what"], drift, style="" if fine else "red")
    console.print(table)
    for kill in kills:
        place = f"in the middle of {kill['at']} after step {kill['step']}"
        say(console, f"• killed {place}, resumed from {kill['resumed from']}")
    say(console, f"Certificate: {out / folder.CERTIFICATE}")
    return 0 if certificate["passed"] else 1


def compare_runs(whole: Path, killed: Path) -> Iterator[dict[str, Any]]:
    """Compare two finished runs: `what` is compared, whether it is `equal`, and its `drift`.

    Raises:
        InputError: a file does not have its check sum.
    """
    for what, name in (("live weights", folder.LIVE), ("returned model", folder.MODEL)):
        for run in (whole, killed):
            folder.require_whole(run / name, "out")
        a, b = (_weights(run / name) for run in (whole, killed))
        yield _tensor_row(what, a, b)
    ends = [folder.checkpoint_to_resume(run) or run for run in (whole, killed)]
    if all((end / "optimizer.pt").is_file() for end in ends):
        a, b = (_optimizer(end) for end in ends)
        yield _tensor_row("optimizer", a, b)
    states = [json.loads((end / "trainer_state.json").read_text("utf-8")) for end in ends]
    orders = [state["stateful_callbacks"]["paceline"]["order"] for state in states]
    equal = orders[0] == orders[1]
    drift = "" if equal else "other sequences or another order"
    yield {"what": "data order", "equal": equal, "drift": drift}
    losses = [
        {
            f"{key} {entry['step']}": torch.tensor(entry[key], dtype=torch.float64)
            for entry in state["log_history"]
            for key in ("eval_live_loss", "eval_loss")
            if key in entry
        }
        for state in states
    ]
    yield _tensor_row("evaluation losses", *losses)


def _weights(model: Path) -> dict[str, Tensor]:
    files = sorted(model.glob("*.safetensors"))
    return {name: x for file in files for name, x in load_file(file).items()}


def _optimizer(checkpoint: Path) -> dict[str, Tensor]:
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    return {
        f"{index} {name}": x
        for index, of_parameter in state.items()
        for name, x in of_parameter.items()
        if isinstance(x, Tensor)
    }


def _tensor_row(what: str, a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Any]:
    """Whether all tensors are equal bit for bit, and otherwise how far apart they are."""
    if a.keys() != b.keys():
        return {"what": what, "equal": False, "drift": "different names of tensors"}
    pairs = [(a[k], b[k]) for k in a]
    if all(x.dtype == y.dtype and torch.equal(_bits(x), _bits(y)) for x, y in pairs):
        return {"what": what, "equal": True, "drift": ""}
    norm = sum(x.double().square().sum() for x in a.values()) ** 0.5
    far = sum((x.double() - y.double()).square().sum() for x, y in pairs) ** 0.5
    largest = max(float((x.double() - y.double()).abs().max()) for x, y in pairs)
    drift = f"{float(far / norm):.1e} of the norm apart, {largest:.1e} at most"
    return {"what": what, "equal": False, "drift": drift}


def _bits(x: Tensor) -> Tensor:
    return x.reshape(-1).view(torch.uint8)


# ---- in the runs -------------------------------------------------------------------------------


class _Kill(TrainerCallback):
    """Kills its own process with SIGKILL: after a step, or in the next evaluation or save."""

    def __init__(self, at: str, step: int, count: int) -> None:
        self.at, self.step, self.count = at, step, count

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step < self.step:
            return
        if self.at == "step":
            _die()
        if self.at == "save":
            torch.save = _die

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.at == "evaluation" and state.global_step >= self.step:
            self.count -= 1
            if not self.count:
                _die()


def _die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _main() -> int:
    moment, place = map(json.loads, sys.argv[1:])
    run = Path(place["resume"]) if "resume" in place else Path(place["out"]).parent
    options = Train(**place, **folder.recipe_of(run))
    try:
        return 0 if train(options, Console(), [_Kill(**moment)] if moment else []) else 130
    except InputError as error:
        print(f"paceline: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(_main())
