"""Writes docs/conformance.md: what `paceline.testing.check_optimizer` finds for four optimizers.

    python benchmarks/conformance.py

needs `pip install '.[train,test]'`.
"""

import platform
from importlib.metadata import version
from pathlib import Path

import pytorch_optimizer
import schedulefree
import torch

from paceline import PACE
from paceline.testing import check_optimizer

PAGE = Path(__file__).parent.parent / "docs" / "conformance.md"
MARKS = {"passed": "yes", "failed": "**no**", "not run": "–"}


def pace(params):
    return PACE(params, lr=0.05, pullback=2.0)


def adamw(params):
    return torch.optim.AdamW(params, lr=0.05)


def schedule_free(params):
    return schedulefree.AdamWScheduleFree(params, lr=0.05)


def lookahead(params):
    return pytorch_optimizer.Lookahead(torch.optim.AdamW(params, lr=0.05), k=2)


OPTIMIZERS = {
    "PACE": pace,
    "`torch.optim.AdamW`": adamw,
    "`schedulefree.AdamWScheduleFree`": schedule_free,
    "`pytorch_optimizer.Lookahead` of AdamW": lookahead,
}
TEXT = """\
# Conformance

What a training run asks of an optimizer, as checks that anyone can run on theirs:

```python
from paceline.testing import check_optimizer


def make(params):  # a function of a module: other processes import it
    return MyOptimizer(params, lr=0.05)


def test_conformance():
    report = check_optimizer(make)
    assert report.passed, report
```

Each check trains a small net; together they take some 10 seconds. `ranks=0` leaves out the last
three, which start two processes. The checks about swapping are not run (–) for an optimizer without
`eval()` and `train()`. This table is `python benchmarks/conformance.py`, with torch {torch},
schedulefree {schedulefree}, pytorch_optimizer {pytorch_optimizer}, Python {python}, on the CPU.

| promise | {names} |
|---|{rules}|
{rows}

## Why not

{reasons}

Looked into: schedulefree recomputes the live weights from the averaged ones, which rounds. Its
state has empty entries after `train()`, so that torch.distributed.checkpoint takes it for there,
and loads none of it. And FSDP2 computes with what an earlier forward pass gathered, until the
model's `reshard()` is called after a swap.

## Hosts

`check_host` asks a trainer which weights it measures, saves and hands on, and whether it resumes
bit for bit. You write one function, which runs its loop on the small task that it is given:

```python
import torch

from paceline import load_checkpoint, save_checkpoint
from paceline.testing.hosts import Driven, check_host


def drive(task, folder, stop, resume):
    model = task.model()
    opt = task.optimizer(model.parameters())
    start = load_checkpoint(folder / "run.pt", model, opt)["epoch"] if resume else 0
    losses, evaluated = [], []
    for epoch in range(start, stop):
        for batch in task.batches():
            loss = task.loss(model, batch)
            loss.backward()
            opt.step()
            opt.zero_grad()
            losses.append(loss.item())
        with torch.no_grad(), opt.averaged():
            evaluated.append(task.loss(model, task.held_out).item())
        save_checkpoint(folder / "run.pt", model, opt, epoch=epoch + 1)
    saved = torch.load(folder / "run.pt")["model"].values()
    return Driven(losses, evaluated, saved, model.parameters())


report = check_host(drive, checkpoint="live", after="live")  # both are "average" by default
assert report.passed, report
```

A trainer that steps by another rate than it was given is seen as well: it goes elsewhere than a
plain loop. Turn off what a plain loop does not do, such as clipping of gradients.
"""


def main() -> None:
    """Run the checks and write the page."""
    reports = {name: check_optimizer(make) for name, make in OPTIMIZERS.items()}
    rows = [
        " | ".join([f"| *{same[0].name}*: {same[0].promise}", *(MARKS[x.outcome] for x in same)])
        + " |"
        for same in zip(*(report.checks for report in reports.values()), strict=True)
    ]
    reasons = []
    for name, report in reports.items():
        if report.failures:
            reasons += [f"{name}:", ""]
            reasons += [f"- {check.name}: {check.reason}" for check in report.failures]
            reasons.append("")
    packages = ("torch", "schedulefree", "pytorch_optimizer")
    page = TEXT.format(
        names=" | ".join(reports),
        rules="|".join(":-:" for _ in reports),
        rows="\n".join(rows),
        reasons="\n".join(reasons).strip(),
        python=platform.python_version(),
        **{name: version(name) for name in packages},
    )
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page, encoding="utf-8")
    for name, report in reports.items():
        print(name, str(report).splitlines()[-1])


if __name__ == "__main__":
    main()
