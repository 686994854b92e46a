"""A training run to be killed: resumes from its checkpoint, and leaves what it ended with.

Served from one process that has imported torch: each run is a fork of it, which takes milliseconds.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from paceline import PACE, load_checkpoint, save_checkpoint

STEPS = 150


def main(folder: Path, fatal: str = "") -> None:
    """Trains to the last step.

    Args:
        folder: has or gets run.pt; end.pt is the state after the last step.
        fatal: kill this process in the middle of its third save, at this point of it.
    """
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    model = nn.Sequential(nn.Linear(6, 60), nn.Dropout(0.2), nn.Linear(60, 60), nn.Linear(60, 2))
    opt = PACE(model.parameters(), lr=0.05, pullback=1.0, state_dtype=torch.bfloat16, seed=5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, STEPS)
    order = torch.Generator().manual_seed(7)
    parts = {"schedule": schedule, "order": order}
    step = 0
    if (folder / "run.pt").exists():
        step = load_checkpoint(folder / "run.pt", model, opt, **parts)["step"]
    first = step
    while step < STEPS:
        x = torch.randn(8, 6, generator=order) + random.random() + np.random.rand()
        (model(x) - x[:, :2]).square().mean().backward()
        opt.step()
        opt.zero_grad()
        schedule.step()
        step += 1
        if step % 2:  # in live and in averaged mode in turn
            opt.eval()
        if step == first + 3:
            die_at(fatal)
        save_checkpoint(folder / "run.pt", model, opt, **parts, step=step)
        opt.train()
    end = {"random": [torch.rand(1), random.random(), np.random.rand(), order.get_state()]}
    end |= {
        "model": model.state_dict(),
        "optimizer": opt.state_dict(),
        "lr": schedule.get_last_lr(),
    }
    torch.save(end, folder / "end.pt")


def die_at(point: str) -> None:
    def killed(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    if point == "writing":
        save = torch.save

        def half(run, path):
            save(run["model"], path)
            killed()

        torch.save = half
    elif point == "synced":
        os.fsync = killed
    elif point == "renaming":
        Path.replace = killed


def serve() -> None:
    """For each line "folder seconds fatal": run, kill after so many seconds, say how it ended."""
    torch.set_num_threads(1)
    PACE([torch.zeros(1)], pullback=0.0)  # the first optimizer makes torch import half of itself
    print("ready", flush=True)
    for line in sys.stdin:
        folder, seconds, *fatal = line.split()
        if not (child := os.fork()):
            status = 1
            try:
                main(Path(folder), *fatal)
                status = 0
            finally:
                os._exit(status)
        end = time.monotonic() + float(seconds)
        while not (ended := os.waitpid(child, os.WNOHANG))[0]:
            if time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.0005)
        print(os.waitstatus_to_exitcode(ended[1]), flush=True)


if __name__ == "__main__":
    serve()
