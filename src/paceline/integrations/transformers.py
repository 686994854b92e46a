"""A Trainer of transformers for optimizers that return another model than they train."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput, rotate_checkpoints

from ..base import AveragedOptimizer
from ..files import put, remove


class PaceTrainer(Trainer):
    """A Trainer that evaluates, saves and leaves in the model what the optimizer returns.

        trainer = PaceTrainer(model, arguments, train_dataset=..., eval_dataset=...,
                              optimizer_cls_and_kwargs=(PACE, {"lr": 1e-3, "pullback": 0.1}))
        trainer.train()

    Combine it with any other Trainer as the first base: `class Mine(PaceTrainer, SFTTrainer)`. It
    works with PACE, Pullback, and every optimizer whose `eval()` puts the returned weights into the
    model and whose `train()` takes them out, such as Schedule-Free's. With other optimizers it is a
    plain Trainer.

    - Evaluations measure both models on the same batches. `eval_loss` and the other metrics are of
      the returned model, `eval_live_loss` and so on of the live weights, `eval_<name>_loss` of
      more averages (`returns`). The best checkpoint and early stopping use the returned model.
    - Every saved model, checkpoints too, is the returned one. A checkpoint's optimizer state has
      the live weights, and a checkpoint gets its name when it is complete. Resuming restores live
      weights and average bit for bit.
    - After `train()` the model holds the returned weights (the best of them, with
      `load_best_model_at_end`).

    Metrics with another prefix than `eval` get `_live` after it. Predictions are made by the
    returned model.
    """

    _best_loaded = False
    _saving = False

    # ---- which weights the model holds -------------------------------------------------------

    @property
    def bare_optimizer(self) -> Any:
        """The optimizer without accelerate's wrapper."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def _swapping(self) -> Any:
        """The bare optimizer; None if it never holds another model than the live weights."""
        optimizer = self.bare_optimizer
        swaps = callable(getattr(optimizer, "eval", None)) and callable(optimizer.train)
        return optimizer if swaps and not self._best_loaded else None

    @contextmanager
    def averaged(self) -> Iterator[bool]:
        """Hold the returned weights in the model; yields False if they are the live ones."""
        with self._holding(average=True) as differs:
            yield differs

    @contextmanager
    def live(self) -> Iterator[bool]:
        """Hold the live weights in the model; yields False if it never holds others."""
        with self._holding(average=False) as differs:
            yield differs

    @contextmanager
    def _holding(self, *names: str, average: bool) -> Iterator[bool]:
        if (optimizer := self._swapping()) is None:
            yield False
            return
        with _restoring(optimizer):
            optimizer.eval(*names) if average else optimizer.train()
            yield bool(optimizer.state)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, and leave the returned weights in the model."""
        self._best_loaded = False
        output = super().train(*args, **kwargs)
        if optimizer := self._swapping():
            optimizer.eval()
        return output

    # ---- evaluation ---------------------------------------------------------------------------

    def returned_models(self) -> dict[str, Callable[[], AbstractContextManager[bool]]]:
        """The models that are evaluated besides the live weights.

        Returns:
            A suffix for the metrics -> a context that holds the model, and yields False if it is
            the live weights. The first average that PACE or Pullback `returns` has no suffix, the
            others have `_<name>`.
        """
        models: dict[str, Callable[[], AbstractContextManager[bool]]] = {"": self.averaged}
        for name in getattr(self._swapping(), "returns", ())[1:-1]:
            models[f"_{name}"] = partial(self._holding, name, average=True)
        return models

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate the live weights, and then each returned model."""

        def loop(prefix: str) -> EvalLoopOutput:
            # The loop would swap an average in by the optimizer's own `eval`.
            optimizer, self.optimizer = self.optimizer, None
            try:
                output = super(PaceTrainer, self).evaluation_loop(
                    dataloader, description, prediction_loss_only, ignore_keys, prefix
                )
            finally:
                self.optimizer = optimizer
            # TRL's trainers gather more metrics, and would log them mixed over all weights.
            gathered = getattr(self, "_metrics", {}).get("eval", {})
            more = {f"{prefix}_{name}": sum(x) / len(x) for name, x in gathered.items()}
            gathered.clear()
            return output._replace(metrics={**(output.metrics or {}), **more})

        if description == "Prediction":
            with self.averaged():
                return loop(metric_key_prefix)
        live_prefix = f"{metric_key_prefix}_live"
        with self.live():
            live = loop(live_prefix)
        outputs = []
        for suffix, holding in self.returned_models().items():
            prefix = metric_key_prefix + suffix
            with holding() as differs:
                outputs.append(loop(prefix) if differs else _renamed(live, live_prefix, prefix))
        metrics = {k: x for output in (live, *outputs) for k, x in (output.metrics or {}).items()}
        return outputs[0]._replace(metrics=metrics)

    # ---- saving and resuming --------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the returned model, at any step."""
        with self.averaged():
            super().save_model(output_dir, _internal_call)

    def save_live_model(self, output_dir: str) -> None:
        """Save the live weights as `save_model` saves the returned ones."""
        with self.live():
            super().save_model(output_dir, _internal_call=True)

    def _get_output_dir(self, trial: Any) -> str:
        folder = Path(super()._get_output_dir(trial))
        return str(folder / ".partial" if self._saving else folder)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save model and optimizer with the average swapped in, and rename the complete folder."""
        folder = Path(super()._get_output_dir(trial))
        partial, name = folder / ".partial", f"checkpoint-{self.state.global_step}"
        if self.is_world_process_zero():
            remove(partial)
        self.accelerator.wait_for_everyone()
        best = self.state.best_model_checkpoint
        self._saving = True
        try:
            with self.averaged():
                super()._save_checkpoint(model, trial)
            self._name_best(partial, folder, name)
            self.accelerator.wait_for_everyone()
            for is_first in (True, False):  # a shared disk, or one of each machine
                if self.is_local_process_zero() and is_first == self.is_world_process_zero():
                    if (partial / name).exists():
                        put(partial / name, folder / name)
                    remove(partial)
                self.accelerator.wait_for_everyone()
        except BaseException:
            self.state.best_model_checkpoint = best
            remove(partial)
            raise
        finally:
            self._saving = False
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(folder),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,  # a run resumed from an earlier checkpoint keeps its new ones
            )

    def _name_best(self, partial: Path, folder: Path, name: str) -> None:
        """Set the name of the best checkpoint in the state to the one that it has or will get."""
        best = folder / f"checkpoint-{self.state.best_global_step}"
        named = self.state.best_model_checkpoint == str(best)
        if not named and (best.name == name or best.exists()):
            self.state.best_model_checkpoint = str(best)
            if self.args.should_save:
                self.state.save_to_json(str(partial / name / "trainer_state.json"))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        optimizer = self._swapping()
        if checkpoint is not None and optimizer is not None:
            for part in ("*optimizer*", "scheduler.pt"):  # the Trainer loads both or neither
                if not any(Path(checkpoint).glob(part)):
                    raise ValueError(
                        f"{checkpoint} has no optimizer state, which holds the live weights to "
                        "resume from; start a new run from it as a model instead"
                    )
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and optimizer is not None:
            optimizer.train()

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._best_loaded = True  # the optimizer's average is of another step

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Resumed at its last step within an epoch, a run would take one step more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)


def _swapped(optimizer: Any) -> bool:
    """Whether the returned weights are in the model now."""
    mine: bool | None = getattr(optimizer, "swapped", None)
    mode = getattr(optimizer, "train_mode", True)  # wrappers have it beside another's groups
    return not optimizer.param_groups[0].get("train_mode", mode) if mine is None else mine


@contextmanager
def _restoring(optimizer: Any) -> Iterator[None]:
    if isinstance(optimizer, AveragedOptimizer):  # knows which of several averages is in
        with optimizer.restoring():
            yield
        return
    before = _swapped(optimizer)
    try:
        yield
    finally:
        optimizer.eval() if before else optimizer.train()


def _renamed(output: EvalLoopOutput, before: str, after: str) -> EvalLoopOutput:
    """The same output with another prefix; names that have it already stay."""
    metrics = {k.removeprefix(f"{before}_"): x for k, x in (output.metrics or {}).items()}
    return output._replace(
        metrics={k if k.startswith(f"{after}_") else f"{after}_{k}": x for k, x in metrics.items()}
    )
