"""A Trainer of transformers for optimizers that return another model than they train."""

import copy
import logging
import re
import shutil
import warnings
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_utils import EvalLoopOutput

from ..base import LIVE, AveragedOptimizer, Choice
from ..batchnorm import warn_of_statistics
from ..elastic import Elastic
from ..files import put, remove
from ..hosts import check_reach, restoring, swapping, unwrapped
from ..loading import check_keeps_averages
from ..snapshots import Snapshots
from ..sums import find_damage, write_sums


class PaceTrainer(Trainer):
    """A Trainer that evaluates, saves and leaves in the model what the optimizer returns.

        trainer = PaceTrainer(model, arguments, train_dataset=..., eval_dataset=...,
                              optimizer_cls_and_kwargs=(PACE, {"lr": 4e-3}))
        trainer.train()

    Combine it with any other Trainer as the first base: `class Mine(PaceTrainer, SFTTrainer)`. It
    works with PACE, Pullback, and every optimizer whose `eval()` puts the returned weights into the
    model and whose `train()` takes them out, such as Schedule-Free's. With other optimizers it is a
    plain Trainer, and logs a warning.

    - Evaluations measure both models on the same batches. `eval_loss` and the other metrics are of
      the returned model, `eval_live_loss` and so on of the live weights, `eval_<name>_loss` of
      more averages (`returns`). What the trainer beside it gathers for its `log`, as TRL's do, is
      kept apart in the same way. An evaluation set that is called as an average is refused.
    - The best checkpoint is that of the best returned model. `metric_for_best_model` may name a
      metric of other weights only where nothing is saved by it (`save_strategy="no"`).
    - Every saved model, checkpoints too, is the returned one. A checkpoint's optimizer state has
      the live weights, and a checkpoint gets its name when it is complete. Resuming restores live
      weights and average bit for bit. Uploads to the Hub begin when it has its name, and
      `save_total_limit` goes by the steps in the names.
    - BatchNorm's running statistics stay those of the live weights, and a warning says so;
      `paceline.recomputed_statistics` has them of the returned ones.
    - The rate is that of `optimizer_cls_and_kwargs`, or of the arguments if it has none. Weight
      decay is that of the arguments. Their schedule falls to 0 unless `lr_scheduler_type` says
      otherwise; a pull needs a warm-up alone.
    - Under DeepSpeed's ZeRO, at every stage without offloading, give the optimizer's class by
      `optimizer_cls_and_kwargs`. A trainer trains once there, and keeps no snapshots.
    - With `paceline.Elastic` a checkpoint has the center as its model, and the optimizer state of
      each worker in a file of its own. Where there are more workers than files, some share one. A
      file that a worker needs and does not see, as on the disk of another machine, ends all.
    - After `train()` the model holds the returned weights: the best of them with
      `load_best_model_at_end`, and with `load_best_average_at_end` the best average.

    Metrics with another prefix than `eval` get `_live` after it. Predictions are made by the
    returned model.

    Args:
        snapshots: how many times the averages are kept on the way, closer together toward the end,
            so that others can be rebuilt from them: `paceline average OUTPUT_DIR/averages --rule
            ema:kappa=0.8 ...`. It needs PACE or Pullback. 0: none.
        snapshot_dtype: torch.float32, or torch.bfloat16, as `paceline.snapshots` has it.
        snapshot_dir: their folder. Default: averages/ in the output_dir.
        load_best_average_at_end: after the last step score each average, and the live weights, on
            the evaluation data by `metric_for_best_model` (default: the loss), and return the best.
            It is then in the model, and what `save_model` writes. `best_average` has its name and
            the scores, which are logged as `choice_<name>`; the metrics of `train()` have both. It
            needs PACE or Pullback. Report on other data than these.
        args: all else as for the Trainer.
        kwargs: likewise.
    """

    best_average: Choice | None = None
    _expects_average = True  # and says so where there is none
    _best_loaded = False
    _saving = False
    _uploads: tuple[tuple[str, Future[Any]], ...] = ()  # of checkpoints, by name

    def __init__(
        self,
        *args: Any,
        snapshots: int = 0,
        snapshot_dtype: torch.dtype = torch.float32,
        snapshot_dir: str | Path | None = None,
        load_best_average_at_end: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.optimizer_cls_and_kwargs is not None:
            self.optimizer_cls_and_kwargs = self._completed(*self.optimizer_cls_and_kwargs)
        self.load_best_average_at_end = load_best_average_at_end
        folder = Path(snapshot_dir or Path(self.args.output_dir or ".") / "averages")
        self.snapshots = Snapshots(snapshots, folder, snapshot_dtype)
        if snapshots:
            self.add_callback(_KeepSnapshots(self.snapshots))

    def _completed(self, kind: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """An optimizer's class and options, with the rate of the arguments where there is none.

        Raises:
            ValueError: the options have a weight decay, which the Trainer takes from the arguments.
        """
        if isinstance(kind, type) and issubclass(kind, AveragedOptimizer):
            if "weight_decay" in options:
                raise ValueError(
                    "weight_decay of optimizer_cls_and_kwargs would not be used; give it by "
                    "TrainingArguments, whose weight decay leaves biases and norms out"
                )
            options = {"lr": self.args.learning_rate, **options}
        return kind, options

    # ---- which weights the model holds -------------------------------------------------------

    @property
    def bare_optimizer(self) -> Any:
        """The optimizer without the trainer's wrappers."""
        return unwrapped(self.optimizer)

    def _swapping(self) -> Any:
        """The bare optimizer; None if it never holds another model than the live weights."""
        return None if self._best_loaded else swapping(self.optimizer)

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
        try:
            with restoring(optimizer):
                differs = True
                if not average:
                    optimizer.train()
                elif names:
                    optimizer.eval(*names)
                else:
                    differs = self._hold_returned(optimizer)
                self._last_loaded_step = -1  # TRL's vLLM has other weights; it loads these
                yield differs and bool(optimizer.state)
        finally:
            self._last_loaded_step = -1

    def _hold_returned(self, optimizer: Any) -> bool:
        """Put the returned weights into the model; False if those are the live ones."""
        if self.best_average is None:
            optimizer.eval()
        elif self.best_average.best == LIVE:
            optimizer.train()
            return False
        else:
            optimizer.eval(self.best_average.best)
        return True

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, and leave the returned weights in the model."""
        self._best_loaded, self.best_average = False, None
        output = super().train(*args, **kwargs)
        if optimizer := self._swapping():
            self._hold_returned(optimizer)
        return output

    def _choose_average(self, optimizer: AveragedOptimizer) -> Choice:
        """Leave the best average in the model, or the live weights; and log the scores.

        Raises:
            ValueError: the evaluation gives no metric of that name.
        """
        metric = self.args.metric_for_best_model or "loss"
        key = metric if metric.startswith("eval_") else f"eval_{metric}"
        data: Any = self.eval_dataset
        sets = {f"eval_{name}": name for name in data} if isinstance(data, dict) else {"eval": None}
        gathered = _Gathered(self)

        def score() -> float:
            mine, self.optimizer = self.optimizer, None  # what is in the model, and nothing else
            metrics: dict[str, float] = {}
            try:
                for prefix, name in sets.items():
                    loader = self.get_eval_dataloader(name)
                    only_loss = None if self.compute_metrics else True
                    output = self.evaluation_loop(loader, "Evaluation", only_loss, None, prefix)
                    metrics |= output.metrics or {}
            finally:
                self.optimizer = mine
            if key not in metrics:
                raise ValueError(
                    f"load_best_average_at_end needs the metric {key!r}, and there are "
                    f"{', '.join(sorted(metrics))}; name one by metric_for_best_model"
                )
            return metrics[key]

        try:
            found = optimizer.choose(score, maximize=bool(self.args.greater_is_better))
        finally:
            gathered.restore()
        self.log({f"choice_{name}": score for name, score in found.scores.items()})
        return found

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

        def loop(suffix: str) -> EvalLoopOutput:
            # The loop would swap an average in by the optimizer's own `eval`.
            optimizer, self.optimizer = self.optimizer, None
            try:
                output = super(PaceTrainer, self).evaluation_loop(
                    dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
                )
            finally:
                self.optimizer = optimizer
            metrics = output.metrics or {}
            logged = self._logged(_named(metrics, metric_key_prefix, suffix))
            begins = re.compile(f"^({re.escape(metric_key_prefix + suffix)}_|eval_)")
            gathered = {begins.sub(f"{metric_key_prefix}_", k, 1): x for k, x in logged.items()}
            return output._replace(metrics=metrics | gathered)

        if description == "Prediction":
            with self.averaged():
                return loop("")
        before = _Gathered(self)
        with self.live():
            live = loop("_live")
        after = _Gathered(self)
        outputs = {"_live": live}
        for suffix, holding in self.returned_models().items():
            with holding() as differs:
                if differs:
                    before.restore()  # as if this were the only evaluation
                outputs[suffix] = loop(suffix) if differs else live
                if differs and not suffix:
                    after = _Gathered(self)
        after.restore()
        metrics: dict[str, float] = {}
        for suffix, output in outputs.items():
            named = _named(output.metrics or {}, metric_key_prefix, suffix)
            if twice := sorted(metrics.keys() & named.keys()):
                raise ValueError(
                    f"the metric {twice[0]} would be of two models; name the average or what "
                    "compute_metrics returns otherwise"
                )
            metrics |= named
        return outputs[""]._replace(metrics=metrics)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: Any = None,
        metric_key_prefix: str = "eval",
        **options: Any,
    ) -> dict[str, float]:
        """Evaluate the live weights and each returned model.

        Raises:
            ValueError: an evaluation set is called as an average or "live", so that a metric
                would have two meanings.
        """
        self._prefixes(eval_dataset, metric_key_prefix)
        metrics: dict[str, float] = super().evaluate(
            eval_dataset, ignore_keys, metric_key_prefix, **options
        )
        return metrics

    def _prefixes(self, data: Any = None, prefix: str = "eval") -> dict[str, tuple[str, str]]:
        """What metrics' names begin with -> the prefix of the data, and the suffix of the model."""
        sets = {"eval": "", prefix: prefix}
        for start, parts in (("eval", self.eval_dataset), (prefix, data)):
            if isinstance(parts, dict):
                sets |= {f"{start}_{name}": name for name in parts}
        found: dict[str, tuple[str, str]] = {}
        for begin in sorted(sets, key=len):
            for suffix in ("_live", *self.returned_models()):
                if (name := begin + suffix) in found:
                    raise ValueError(
                        f"the evaluation set {sets[begin]!r} is called as an average: metrics "
                        f"{name}_... would have two meanings; rename it"
                    )
                found[name] = (begin, suffix)
        return found

    def _logged(self, metrics: dict[str, float]) -> dict[str, float]:
        """What the trainer's own `log` adds to these metrics; nothing is logged.

        TRL's trainers gather metrics in stores of many names, which their `log` empties.
        """
        added: dict[str, float] = {}

        def on_log(args: Any, state: Any, control: Any, logs: dict[str, float]) -> Any:
            added.update(logs)
            return control

        kept = (self.callback_handler, self.state.log_history)
        shows_completions = vars(self).get("log_completions")
        silent: Any = copy.copy(self.callback_handler)
        silent.on_log = on_log
        self.callback_handler, self.state.log_history = silent, [*self.state.log_history]
        if shows_completions:
            self.log_completions = False  # they are shown once, when the evaluation is logged
        try:
            self.log(dict(metrics))
        finally:
            self.callback_handler, self.state.log_history = kept
            if shows_completions:
                self.log_completions = shows_completions
        others = added.keys() - metrics.keys() - {"epoch", "num_input_tokens_seen"}
        return {key: added[key] for key in added if key in others}

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
        return str(folder / "_partial" if self._saving else folder)  # no upload takes _*

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save model and optimizer with the average swapped in, and rename the complete folder."""
        folder = Path(super()._get_output_dir(trial))
        partial, name = folder / "_partial", f"checkpoint-{self.state.global_step}"
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
                        write_sums(partial / name)
                        put(partial / name, folder / name)
                    remove(partial)
                self.accelerator.wait_for_everyone()
        except BaseException:
            self.state.best_model_checkpoint = best
            remove(partial)
            raise
        finally:
            self._saving = False
        if self.args.push_to_hub:
            with self.averaged():
                self._push_from_checkpoint(str(folder / name))
        if self.args.should_save:
            self._rotate(folder, name)

    def _rotate(self, folder: Path, name: str) -> None:
        """Remove the checkpoints of the lowest steps, but not the one of this name or the best."""
        steps = {
            int(found[1]): path
            for path in folder.iterdir()
            if (found := re.fullmatch(r"checkpoint-(\d+)", path.name)) and path.is_dir()
        }
        kept = {name, Path(self.state.best_model_checkpoint or name).name}
        others = [path for _, path in sorted(steps.items()) if path.name not in kept]
        limit = self.args.save_total_limit or 0
        excess = len(steps) - limit if limit > 0 else 0
        for path in others[: max(0, excess)]:
            wait([job for uploaded, job in self._uploads if uploaded == path.name])
            shutil.rmtree(path, ignore_errors=True)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upload a checkpoint that has its name; `_save_checkpoint` calls it again then."""
        if self._saving:
            return
        super()._push_from_checkpoint(checkpoint_folder)
        known = [job for _, job in self._uploads]
        for job in getattr(getattr(self, "push_in_progress", None), "jobs", ()):
            if job not in known:
                self._uploads += ((Path(checkpoint_folder).name, job),)
                job.add_done_callback(_tell_failure)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self._finish_current_push()  # it may remove checkpoints
        best = f"checkpoint-{self.state.best_global_step}"
        kept = Path(self.state.best_model_checkpoint or "none").name
        if self.args.load_best_model_at_end and self.state.best_global_step and kept != best:
            warnings.warn(
                f"the best model, {best}, was not saved, and {kept} is loaded as the best; let "
                "save_steps be eval_steps",
                stacklevel=2,
            )
        optimizer = self._swapping()
        if self.load_best_average_at_end and optimizer.state:
            self.best_average = self._choose_average(optimizer)
        if optimizer:
            self._hold_returned(optimizer)  # callbacks upload the model at the end
        output = super()._finalize_training(*args, **kwargs)
        if found := self.best_average:
            scores = {f"choice_{name}": score for name, score in found.scores.items()}
            output.metrics.update(scores, best_average=found.best)
        return output

    def _tune_save_checkpoint(self, checkpoint_dir: str) -> None:
        with self.averaged():  # as in `_save_checkpoint`
            super()._tune_save_checkpoint(checkpoint_dir)

    def _name_best(self, partial: Path, folder: Path, name: str) -> None:
        """Set the name of the best checkpoint in the state to the one that it has or will get."""
        best = folder / f"checkpoint-{self.state.best_global_step}"
        named = self.state.best_model_checkpoint == str(best)
        if not named and (best.name == name or self._has_best(best)):
            self.state.best_model_checkpoint = str(best)
            if self.args.should_save:
                self.state.save_to_json(str(partial / name / "trainer_state.json"))

    def _has_best(self, checkpoint: Path) -> bool:
        """Whether a checkpoint is of the best evaluation, and not of an earlier run's."""
        if not (file := checkpoint / "trainer_state.json").exists():
            return False
        state = TrainerState.load_from_json(str(file))
        mine = (self.state.best_global_step, self.state.best_metric)
        return (state.best_global_step, state.best_metric) == mine

    def check_checkpoint(self, checkpoint: str) -> None:
        """Compare the files of a checkpoint with their check sums before they are loaded.

        Raises:
            ValueError: in all processes: a file is damaged or missing; the message names it.
        """
        self._refuse_together(
            self._damage(checkpoint),
            "resume from another checkpoint, or delete its checksums.json if it was changed on "
            "purpose",
        )

    def _damage(self, checkpoint: str) -> str | None:
        """What is damaged in a checkpoint, as this process sees it."""
        return find_damage(Path(checkpoint)) if self.is_local_process_zero() else None

    def _refuse_together(self, fault: str | None, advice: str) -> None:
        """Raises: ValueError: some process has a fault; in all of them, which would wait for it."""
        several = dist.is_available() and dist.is_initialized()
        for process, found in enumerate(gather_object([fault]) if several else [fault]):
            if found:
                raise ValueError(f"{f'process {process}: ' * several}{found}; {advice}")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        rank = self.args.process_index
        if rank and isinstance(self.bare_optimizer, Elastic):  # the Trainer writes that of rank 0
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            torch.save(self.bare_optimizer.state_dict(), Path(output_dir) / f"optimizer-{rank}.pt")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.check_checkpoint(resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        optimizer = self._swapping()
        if checkpoint is not None and optimizer is not None:
            for part in ("*optim*", "scheduler.pt"):  # the Trainer loads both or neither
                if not any(Path(checkpoint).rglob(part)):
                    raise ValueError(
                        f"{checkpoint} has no optimizer state, which holds the live weights to "
                        "resume from; start a new run from it as a model instead"
                    )
        own, written = None, Path(checkpoint or "") / "optimizer.pt"
        keeps = isinstance(self.bare_optimizer, AveragedOptimizer)
        if checkpoint is not None and not keeps and written.is_file():
            saved = torch.load(written, map_location="cpu", weights_only=True, mmap=True)
            check_keeps_averages(self.bare_optimizer, saved, checkpoint)
        if checkpoint is not None and isinstance(optimizer, Elastic):
            own = self._file_of_worker(Path(checkpoint))
        super()._load_optimizer_and_scheduler(checkpoint)
        if own is not None:  # another's than rank 0's
            optimizer.load_state_dict(torch.load(own, map_location="cpu", weights_only=True))

    def _file_of_worker(self, checkpoint: Path) -> Path | None:
        """The file that this worker of an Elastic goes on from; None for that of rank 0.

        Raises:
            ValueError: in all processes: one of them does not see what it needs.
        """
        seen = gather_object([path.name for path in checkpoint.glob("optimizer-*.pt")])
        rank = self.args.process_index % (1 + len({*seen}))  # files may be on several disks
        own = checkpoint / (f"optimizer-{rank}.pt" if rank else "optimizer.pt")
        needed = (own, checkpoint / "optimizer.pt", checkpoint / "scheduler.pt")
        missing = next((f"{path} is missing" for path in needed if not path.is_file()), None)
        self._refuse_together(missing, "give all workers one disk, or a copy of the checkpoint")
        return own if rank else None

    @property
    def shares_gradients(self) -> bool:
        """Whether DDP around the model sends gradients."""
        return True

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        given = self._swapping()
        if resume_from_checkpoint is not None and self.is_deepspeed_enabled:
            self.check_checkpoint(resume_from_checkpoint)  # the engine loads it
        prepared = super()._prepare_for_training(
            max_steps, train_dataloader, resume_from_checkpoint
        )
        prefixes = self._prefixes()
        if self.load_best_average_at_end:
            for wrong, why in {
                "PACE or Pullback": not isinstance(self.bare_optimizer, AveragedOptimizer),
                "an eval_dataset": self.eval_dataset is None,
                "load_best_model_at_end=False": self.args.load_best_model_at_end,
            }.items():
                if why:
                    raise ValueError(f"load_best_average_at_end needs {wrong}")
        if (optimizer := self._swapping()) is None:
            chosen = self.optimizer_cls_and_kwargs
            if chosen is not None and issubclass(chosen[0], AveragedOptimizer):
                raise ValueError(
                    f"{type(self.bare_optimizer).__name__} of the DeepSpeed configuration took the "
                    f'place of {chosen[0].__name__}; leave "optimizer" out of the configuration'
                )
            if given is not None:
                raise ValueError(
                    f"a new {type(self.bare_optimizer).__name__} took the place of the given "
                    f"{type(given).__name__}, as transformers does under DeepSpeed; give the class "
                    "by optimizer_cls_and_kwargs instead of optimizers"
                )
            if self._expects_average:
                logging.getLogger(__name__).warning(
                    "%s keeps no average: what is evaluated and saved are the live weights; give "
                    "PACE by optimizer_cls_and_kwargs, or by optimizers",
                    type(self.bare_optimizer).__name__,
                )
            return prepared
        if self.is_deepspeed_enabled:
            self._attach(optimizer)
        else:
            wrapped: Any = self.model_wrapped
            shared = self.shares_gradients and isinstance(wrapped, DistributedDataParallel)
            if shared and isinstance(optimizer, Elastic):
                raise ValueError(
                    "Elastic's workers must not share gradients, and this trainer's DDP sends them "
                    "at each step; use paceline train --elastic, or a loop of your own"
                )
            check_reach(optimizer, wrapped)
            warn_of_statistics(wrapped, stacklevel=2)
        if (metric := self.args.metric_for_best_model) and self.args.save_strategy != "no":
            full = metric if metric.startswith("eval_") else f"eval_{metric}"
            prefix = max((x for x in prefixes if full.startswith(f"{x}_")), key=len)
            begin, suffix = prefixes[prefix]
            if suffix:
                raise ValueError(
                    f"metric_for_best_model={metric!r} measures "
                    + ("the live weights" if suffix == "_live" else f"the average {suffix[1:]!r}")
                    + ", but checkpoints and the best model are the returned one; name "
                    f"{begin + full.removeprefix(prefix)!r}, or set save_strategy='no'"
                )
        optimizer.train()  # a checkpoint has the average in
        return prepared

    def _attach(self, optimizer: Any) -> None:
        """Have the average reach the model of DeepSpeed's engine."""
        from .deepspeed import attach

        engine: Any = self.model_wrapped
        if unwrapped(engine.optimizer) is not optimizer:
            raise ValueError(
                "train() can be called once under DeepSpeed, whose engine keeps its first "
                "optimizer; make a new trainer"
            )
        attach(engine)

    def _load_best_model(self) -> None:
        if optimizer := self._swapping():
            optimizer.train()
        self.check_checkpoint(self.state.best_model_checkpoint or "")
        super()._load_best_model()
        self._best_loaded = True  # the optimizer's average is of another step

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Resumed at its last step within an epoch, a run would take one step more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)


class _KeepSnapshots(TrainerCallback):
    """Keeps the averages at their steps."""

    def __init__(self, snapshots: Snapshots) -> None:
        self.snapshots = snapshots

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Refuse what cannot be kept."""
        step, steps = state.global_step, state.max_steps
        self.snapshots.begin(given["optimizer"], step, steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Keep them if it is time."""
        self.snapshots.keep(state.global_step, given["model"], given["optimizer"])


def _named(metrics: dict[str, float], prefix: str, suffix: str) -> dict[str, float]:
    """The metrics of the model with this suffix; the returned model, "", has the plain names."""
    if not suffix:
        return metrics
    return {f"{prefix}{suffix}_{key.removeprefix(f'{prefix}_')}": metrics[key] for key in metrics}


class _Gathered:
    """What a trainer gathers in numbers and plain containers, to put it back.

    Weights, data, and objects of other types are left alone.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        left = {"train_dataset", "eval_dataset", "_last_loaded_step"}
        self.attributes = {
            name: value
            for name, value in vars(trainer).items()
            if name not in left and type(value) in (*_CONTAINERS, bool, int, float)
        }
        self.contents: dict[int, tuple[Any, Any]] = {}
        for value in self.attributes.values():
            self._note(value)

    def _note(self, value: Any) -> None:
        if type(value) not in _CONTAINERS or id(value) in self.contents:
            return
        keyed = isinstance(value, dict)
        self.contents[id(value)] = (value, dict(value) if keyed else list(value))
        for part in value.values() if keyed else value:
            self._note(part)

    def restore(self) -> None:
        """Put it back, into the same containers."""
        vars(self.trainer).update(self.attributes)
        for value, content in self.contents.values():
            value.clear()
            if isinstance(value, dict):
                for key, part in content.items():
                    value[key] = part
            else:
                value += content


_CONTAINERS = (dict, defaultdict, OrderedDict, Counter, list, deque)


def _tell_failure(upload: Future[Any]) -> None:
    if not upload.cancelled() and (error := upload.exception()):
        logging.getLogger(__name__).warning("an upload to the Hub failed: %s", error)
