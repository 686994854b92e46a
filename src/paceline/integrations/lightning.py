"""Lightning trainers that evaluate, save and return the average."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

try:
    import lightning.pytorch as pl
except ImportError:  # the package of the older name
    import pytorch_lightning as pl  # type: ignore[no-redef]

from ..batchnorm import warn_of_statistics
from ..hosts import check_reach, holding, swapping, unwrapped
from ..snapshots import Snapshots

OTHERS = ("WeightAveraging", "StochasticWeightAveraging")  # Lightning's own averages


class ReturnAverage(pl.Callback):
    """Have a Trainer validate, save and return the average that its optimizers keep.

        trainer = Trainer(callbacks=[ReturnAverage()])
        trainer.fit(module)  # whose configure_optimizers returns PACE(...)

    It is for PACE, Pullback, and every optimizer whose `eval()` puts the returned weights into the
    model and whose `train()` takes them out; for several of them, and manual optimization, too.

    - Validation in `fit` measures the returned model. So do the metrics that `ModelCheckpoint` and
      `EarlyStopping` watch.
    - Checkpoints hold the returned model as `state_dict`, and the live weights in the optimizer's
      state. `load_from_checkpoint`, `test(ckpt_path=...)` and `predict` take the returned model.
    - After `fit` the module holds the returned model.
    - `fit(ckpt_path=...)` goes on from the live weights: bit for bit with PACE and Pullback.
      Without this callback the first step refuses such a checkpoint.

    Args:
        live: validate the live weights, too, before the average; what the module logs then has
            the prefix `live_`. Validation takes twice as long. Other callbacks do not see it.
        snapshots: how many times the averages are kept on the way, closer together toward the end,
            so that others can be rebuilt: `paceline average DIR --rule ema:kappa=0.8`. It needs one
            optimizer alone, PACE or Pullback. 0: none.
        snapshot_dir: their folder. Default: averages/ in the trainer's `default_root_dir`.
        snapshot_dtype: torch.float32, or torch.bfloat16, as `paceline.snapshots` has it.

    Raises:
        ValueError: at the start of `fit`: no optimizer averages, a callback of Lightning averages,
            too, or the strategy (FSDP1, DeepSpeed) keeps the weights elsewhere; snapshots cannot be
            kept, for there are several optimizers or the number of steps is not known.
    """

    def __init__(
        self,
        *,
        live: bool = False,
        snapshots: int = 0,
        snapshot_dir: str | Path | None = None,
        snapshot_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.live, self._count = live, snapshots
        self._folder, self._dtype = snapshot_dir, snapshot_dtype
        self._snapshots: Snapshots | None = None  # of this fit
        self._kept = 0  # the step that was looked at last
        self._replaced: list[tuple[Any, str]] = []  # methods of this fit's objects

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """See that it can be done, and have validations and saves hold the average."""
        self._put_back()  # of a fit that ended in an error
        for other in trainer.callbacks:
            for name in {kind.__name__ for kind in type(other).__mro__}.intersection(OTHERS):
                raise ValueError(
                    f"the callbacks must have one that averages, got {name} beside ReturnAverage, "
                    "which returns the optimizer's own average; leave one out"
                )
        if not any(map(swapping, trainer.optimizers)):
            names = ", ".join(type(unwrapped(x)).__name__ for x in trainer.optimizers) or "none"
            raise ValueError(
                "ReturnAverage needs an optimizer that averages, as PACE or Pullback do, "
                f"got {names}"
            )
        for optimizer in trainer.optimizers:
            if swapping(optimizer):
                check_reach(optimizer, pl_module)
        warn_of_statistics(pl_module, stacklevel=2)
        loop, save = trainer.fit_loop.epoch_loop.val_loop, trainer.save_checkpoint
        validate = loop.run

        def validate_both() -> Any:
            if self.live and not trainer.sanity_checking:
                with holding(trainer.optimizers, "train"), _apart(trainer, pl_module):
                    validate()
            with holding(trainer.optimizers, "eval"):
                return validate()

        def save_returned(*args: Any, **kwargs: Any) -> Any:
            with holding(trainer.optimizers, "eval"):
                return save(*args, **kwargs)

        self._replace(loop, "run", validate_both)
        self._replace(trainer, "save_checkpoint", save_returned)

    def _replace(self, owner: Any, name: str, method: Callable[..., Any]) -> None:
        setattr(owner, name, method)
        self._replaced.append((owner, name))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Train the live weights, after a checkpoint that held the average, too."""
        for optimizer in _of(trainer):
            optimizer.train()
        if self._count and not trainer.fast_dev_run:
            self._begin_snapshots(trainer)

    def _begin_snapshots(self, trainer: Any) -> None:
        steps, optimizers = trainer.estimated_stepping_batches, trainer.optimizers
        if len(optimizers) > 1:
            raise ValueError(
                f"snapshots needs one optimizer, got {len(optimizers)}; "
                "paceline.snapshots.save_averages keeps those of several in folders of their own"
            )
        if not math.isfinite(steps):
            raise ValueError("snapshots needs max_steps or max_epochs, to know when to keep them")
        folder = Path(self._folder or Path(trainer.default_root_dir) / "averages")
        self._snapshots = Snapshots(self._count, folder, self._dtype)
        self._snapshots.tell = pl.utilities.rank_zero_info
        self._snapshots.begin(optimizers[0], trainer.global_step, int(steps))
        self._kept = trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Keep a snapshot of the averages if it is time."""
        step = trainer.global_step
        if self._snapshots and step != self._kept:  # batches that accumulate do not step
            self._snapshots.keep(step, pl_module, trainer.optimizers[0])
            self._kept = step

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Leave the returned model in the module."""
        for optimizer in _of(trainer):
            optimizer.eval()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Give the objects of this fit their own methods back."""
        self._put_back()

    def _put_back(self) -> None:
        while self._replaced:
            delattr(*self._replaced.pop())


def _of(trainer: Any) -> list[Any]:
    """The optimizers of a trainer that return another model."""
    return [x for x in map(swapping, trainer.optimizers) if x]


@contextmanager
def _apart(trainer: Any, pl_module: Any) -> Iterator[None]:
    """Log what the module logs with the prefix `live_`, and show it to no callback."""
    log, callbacks = pl_module.log, trainer.callbacks

    def log_live(name: str, *args: Any, **kwargs: Any) -> None:
        log(f"live_{name}", *args, **kwargs)

    pl_module.log, trainer.callbacks = log_live, []
    try:
        yield
    finally:
        del pl_module.log
        trainer.callbacks = callbacks
