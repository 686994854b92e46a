"""The conformance kit for hosts: which weights a trainer evaluates, saves and hands on.

A host is whatever owns the loop. Each column of the table in docs/hosts.md is a check.
"""

import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..optimizer import PACE
from . import Make, Report, _distance, _must, _NotRun, _outcome, _same

Which = Literal["average", "live"]
Batch = tuple[Tensor, Tensor]
EPOCH, EPOCHS, BATCH = 3, 2, 4  # steps, epochs, rows


@dataclass(frozen=True)
class Task:
    """What a host is to train: 6 steps, which are 2 epochs of 3 batches in their order.

    After each epoch it measures its model on `held_out` and saves a checkpoint.
    """

    optimizer: Make  # for these parameters
    dtype: torch.dtype = torch.float32

    def model(self) -> nn.Module:
        """A new one, always the same: (n, 3) -> (n, 1)."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
        return net.to(self.dtype)

    def _data(self, seed: int, rows: int) -> Batch:
        x = torch.randn(rows, 3, generator=torch.Generator().manual_seed(seed))
        return x.to(self.dtype), x.sin().sum(1, keepdim=True).to(self.dtype)

    @property
    def train(self) -> Batch:
        """The rows of an epoch: x (12, 3), y (12, 1)."""
        return self._data(0, EPOCH * BATCH)

    @property
    def held_out(self) -> Batch:
        """One batch to measure on: x (4, 3), y (4, 1)."""
        return self._data(1, BATCH)

    def batches(self) -> list[Batch]:
        """Those of an epoch, of 4 rows each."""
        return list(zip(*(part.chunk(EPOCH) for part in self.train), strict=True))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean squared error."""
        return nn.functional.mse_loss(model(batch[0]), batch[1])


@dataclass
class Driven:
    """What came of a host's loop.

    Args:
        losses: of each training step that this loop took.
        evaluated: the held-out loss after each epoch, as the host measures it.
        checkpoint: the model's weights in the last checkpoint, as one who loads it has them.
        after: the weights that are in the model at the end.
        live: the held-out loss of the live weights after each epoch, where the host measures both.
    """

    losses: Sequence[float]
    evaluated: Sequence[float]
    checkpoint: Iterable[Tensor]
    after: Iterable[Tensor]
    live: Sequence[float] | None = None

    def __post_init__(self) -> None:
        self.checkpoint, self.after = _copied(self.checkpoint), _copied(self.after)


# (task, folder, stop, resume): trains up to epoch `stop`, or goes on from the folder's checkpoint.
Drive = Callable[[Task, Path, int, bool], Driven]
_PACE: Make = partial(PACE, lr=0.05, pullback=0.3)


def check_host(
    drive: Drive,
    make_optimizer: Make = _PACE,
    *,
    dtype: torch.dtype = torch.float32,
    evaluated: Which = "average",
    checkpoint: Which = "average",
    after: Which = "average",
) -> Report:
    """Check that a host trains, evaluates, saves, hands on and resumes the weights that it should.

    Args:
        drive: runs the host's loop: all epochs, the first alone, the rest from its checkpoint.
        make_optimizer: makes the optimizer for these parameters; one whose `eval()` and `train()`
            swap. Default: PACE.
        dtype: of the model and its data.
        evaluated: the weights that the host is to measure.
        checkpoint: those that it is to save as the model.
        after: those that are to be in the model at the end.

    Returns:
        A report of six checks. Nothing is raised for one that fails; what `drive` raises, is.

    Raises:
        ValueError: the optimizer's average is too close to its live weights to tell them apart.
    """
    task = Task(make_optimizer, dtype)
    trained, expected = _by_hand(task)
    near = 1e-5 if dtype.itemsize > 2 else 2**-8
    if min(map(_distance, *(x.weights for x in expected.values()))) < 2 * near:
        raise ValueError("make_optimizer must make one whose average is far from its live weights")
    runs = []
    with tempfile.TemporaryDirectory() as place:
        for name, stop, resuming in (("whole", 2, False), ("parts", 1, False), ("parts", 2, True)):
            folder = Path(place, name)
            folder.mkdir(exist_ok=True)
            runs.append(drive(task, folder, stop, resuming))
    whole, first, rest = runs

    def must_be_close(a: Sequence[float], b: Sequence[float]) -> None:
        _must(len(a) == len(b), f"there are {len(a)} losses, where {len(b)} were to be")
        far = [abs(x - y) for x, y in zip(a, b, strict=True)]
        _must(all(x < near for x in far), f"losses are others, by up to {max(far):.1g}")

    def must_be(found: Iterable[Tensor], which: Which, epoch: int) -> None:
        far = {name: _distance(list(found), x.weights[epoch]) for name, x in expected.items()}
        names = [name for name in far if far[name] < near] or ["neither"]
        _must(names == [which], f"weights are {names[0]}, and were to be {which}")

    def trajectory() -> None:
        """Training goes where a plain loop goes."""
        must_be_close(whole.losses, trained)

    def evaluation() -> None:
        """After each epoch the weights that should be are measured."""
        must_be_close(whole.evaluated, expected[evaluated].losses)

    def live_evaluation() -> None:
        """The live weights are measured besides."""
        if whole.live is None:
            raise _NotRun("the host measures one model")
        must_be_close(whole.live, expected["live"].losses)

    def checkpoints() -> None:
        """A checkpoint has the weights that it should, in the middle and at the end."""
        must_be(first.checkpoint, checkpoint, 0)
        must_be(whole.checkpoint, checkpoint, 1)

    def after_training() -> None:
        """The weights in the model at the end are those that should be."""
        must_be(whole.after, after, 1)

    def resume() -> None:
        """From a checkpoint it goes on bit for bit."""
        _must(list(rest.losses) == list(whole.losses)[EPOCH:], "training losses differ")
        _must(list(rest.evaluated) == list(whole.evaluated)[1:], "losses on held-out data differ")
        _must(_same(rest.after, whole.after), "the weights at the end differ")

    checks = (trajectory, evaluation, live_evaluation, checkpoints, after_training, resume)
    return Report(tuple(_outcome(check, check) for check in checks))


class _Expected(NamedTuple):
    losses: list[float]  # on held-out data, after each epoch
    weights: list[list[Tensor]]


def _by_hand(task: Task) -> tuple[list[float], dict[str, _Expected]]:
    """A plain loop, which swaps for each measurement: training losses, and both models."""
    model, trained = task.model(), list[float]()
    optimizer: Any = task.optimizer(model.parameters())
    found = {name: _Expected([], []) for name in ("live", "average")}
    for _ in range(EPOCHS):
        for batch in task.batches():
            optimizer.train()
            optimizer.zero_grad()
            loss: Any = task.loss(model, batch)
            loss.backward()
            optimizer.step()
            trained.append(loss.item())
        for name, swap in (("live", optimizer.train), ("average", optimizer.eval)):
            swap()
            with torch.no_grad():
                found[name].losses.append(task.loss(model, task.held_out).item())
            found[name].weights.append(_copied(model.parameters()))
    return trained, found


def _copied(weights: Iterable[Tensor]) -> list[Tensor]:
    return [x.detach().clone() for x in weights]
