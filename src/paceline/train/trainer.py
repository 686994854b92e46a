"""Trainers of our methods: one method, or several that share one trajectory."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from accelerate import DistributedDataParallelKwargs
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import TensorDataset
from torch.utils.tensorboard import SummaryWriter
from transformers import PreTrainedModel, PrinterCallback, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback

from ..averaging import Averaging
from ..defaults import BETAS
from ..elastic import Elastic
from ..integrations.transformers import PaceTrainer
from ..swap import swap_back, swap_in
from . import reporting
from .callbacks import EvalAndSaveAtEnd
from .data import blocks, collate
from .methods import Method, Setup, steps_of


class ReadOuts:
    """Several averages of one run's weights, which do not change the run.

    They are updated after every step of the optimizer, and start from its weights at construction.
    """

    def __init__(self, optimizer: Optimizer, rules: Sequence[Averaging]) -> None:
        self.rules = rules
        self.params = [p for group in optimizer.param_groups for p in group["params"]]
        self.averages = [[p.detach().float().clone() for p in self.params] for _ in rules]
        self.kept = [[rule.begin(p, torch.float32) for p in self.params] for rule in rules]
        self.steps = 0
        optimizer.register_step_post_hook(self._update)

    @torch.no_grad()
    def _update(self, *_: Any) -> None:
        self.steps += 1
        for rule, averages, kept in zip(self.rules, self.averages, self.kept, strict=True):
            rule.update_(self.steps, self.params, averages, kept)

    @contextmanager
    def swapped(self, index: int) -> Iterator[bool]:
        """Put one of the averages into the parameters for the time of the context."""
        averages = self.averages[index]
        pairs = [(p.detach(), average) for p, average in zip(self.params, averages, strict=True)]
        swap_in(pairs)
        try:
            yield True
        finally:
            swap_back(pairs)


class _Alone(DistributedDataParallelKwargs):  # type: ignore[misc]
    """DDP of one process, which sends nothing."""

    def to_kwargs(self) -> dict[str, Any]:
        own = dist.new_group([dist.get_rank()], use_local_synchronization=True)
        return {**super().to_kwargs(), "process_group": own}


class OneMethodTrainer(PaceTrainer):
    """Trains by the optimizer and the schedule of a method of `paceline.train.methods`.

    With `elastic`, options of `paceline.Elastic`, each process is a worker that trains alone.
    """

    elastic: dict[str, Any] | None = None
    _expects_average = False  # a method may be AdamW's

    def __init__(
        self,
        *args: Any,
        method: Method,
        warmup: int,
        weight_decay: float,
        betas: tuple[float, float] = BETAS,
        stochastic_round: bool = False,
        scale: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self.method, self.warmup, self.scale = method, warmup, scale
        self.setup = partial(
            Setup,
            weight_decay=weight_decay,
            betas=betas,
            stochastic_round=stochastic_round,
            scale=scale,
        )

    def create_optimizer(self, model: Any = None) -> Optimizer:
        """The method's optimizer."""
        model = self.model if model is None else model
        if self.optimizer is None:
            decayed = set(self.get_decay_parameter_names(model))
            setup = self.setup(model, decayed, warmup=self.warmup, steps=self.args.max_steps)
            self.optimizer = self.method.build(setup)
            if self.elastic is not None:
                with reporting("elastic", ValueError):
                    self.optimizer = Elastic(self.optimizer, **self.elastic)
        return self.optimizer

    @property
    def shares_gradients(self) -> bool:
        """Whether DDP around the model sends gradients: not between elastic workers."""
        return self.elastic is None

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        if self.elastic is not None:
            self.accelerator.ddp_handler = _Alone()
        return super()._prepare_for_training(*args, **kwargs)

    def create_scheduler(
        self, num_training_steps: int, optimizer: Optimizer | None = None
    ) -> LambdaLR:
        """The method's schedule."""
        if self.lr_scheduler is None:
            made: Any = optimizer or self.optimizer
            self.lr_scheduler = self.method.make_scheduler(made, self.warmup, num_training_steps)
        return self.lr_scheduler

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the losses, and beside a training loss the measures of the pull."""
        if "loss" in logs and self.method.pulls:
            stats = self.bare_optimizer.stats() or {}
            logs |= {k: x for k, x in stats.items() if isinstance(x, float)}
        super().log(logs, start_time)


class MethodTrainer(OneMethodTrainer):
    """Trains one trajectory, and evaluates the returned models of all methods that share it.

    The live weights' loss is `eval_live_loss`. The returned model's loss is `eval_loss` for the
    first method and `eval_LABEL_loss` for the others, on the same batches.

    `curves` has a list of points for each method: step, losses, and of a pull the mean gain and the
    fraction of clipped coordinates. With two sets to evaluate on, `selection` and `test`, the
    losses are those of the test set, and `selection_loss` is the returned model's on the other.
    """

    def __init__(self, *args: Any, methods: Sequence[Method], **options: Any) -> None:
        super().__init__(*args, **options)
        self.methods = methods
        assert all(method.trajectory == self.method for method in methods)
        self.read_outs: dict[Method, Callable[[], AbstractContextManager[bool]]] = {}
        self.curves: list[list[dict[str, float]]] = [[] for _ in methods]

    def create_optimizer(self, model: Any = None) -> Optimizer:
        """The trajectory's optimizer, with the averages of the methods that only watch it."""
        made = self.optimizer is None
        optimizer = super().create_optimizer(model)
        others = [method for method in self.methods if method != self.method]
        rules = {method: method.rules(self.args.max_steps, self.scale) for method in others}
        watching = {method: own[-1] for method, own in rules.items() if own}
        if made and watching:
            averages = ReadOuts(optimizer, list(watching.values()))
            for index, method in enumerate(watching):
                self.read_outs[method] = partial(averages.swapped, index)
        return optimizer

    def returned(self, method: Method) -> AbstractContextManager[bool]:
        """Hold what a method returns in the model; yields False if that is the live weights."""
        return self.read_outs.get(method, self.averaged)()

    def returned_models(self) -> dict[str, Callable[[], AbstractContextManager[bool]]]:
        """The returned model of each method: a suffix for its metrics -> how to hold it."""
        return {
            f"_{method.label}" if index else "": partial(self.returned, method)
            for index, method in enumerate(self.methods)
        }

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: Any = None,
        metric_key_prefix: str = "eval",
        **options: Any,
    ) -> dict[str, float]:
        """Evaluate the live weights and each returned model; adds a point to each curve."""
        # Loaders draw random numbers: dropout must not depend on how many models are evaluated.
        with torch.random.fork_rng(devices=[]):
            metrics: Any = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix, **options)
        if metric_key_prefix != "eval":  # one of two sets
            return metrics
        losses = [entry["loss"] for entry in self.state.log_history if "loss" in entry]
        two = isinstance(self.eval_dataset, dict)
        prefix = "eval_test" if two else "eval"
        models = zip(self.returned_models(), self.methods, self.curves, strict=True)
        for suffix, method, curve in models:
            point = {
                "step": self.state.global_step,
                "train_loss": losses[-1] if losses else math.nan,  # mean since the last line
                "live_loss": metrics[f"{prefix}_live_loss"],
                "returned_loss": metrics[f"{prefix}{suffix}_loss"],
            }
            if two:
                point["selection_loss"] = metrics[f"eval_selection{suffix}_loss"]
            if method.pulls and self.state.global_step:
                stats = self.bare_optimizer.stats()
                point |= {name: stats[name] for name in ("gain_mean", "clipped")}
            curve.append(point)
        return metrics

    def save_returned(self, method: Method, folder: str) -> None:
        """Write what a method returns to a folder that `transformers` loads, at any step."""
        with self.returned(method):
            model: Any = self.model
            model.save_pretrained(folder)


class Trained(NamedTuple):
    """A training that has ended: its trainer, and whether it was stopped early."""

    trainer: MethodTrainer
    stopped: bool


def train_blocks(
    model: PreTrainedModel,
    tokens: dict[str, Tensor],
    methods: Sequence[Method],
    folder: Path,
    *,
    steps: int,
    batch: int,
    context: int,
    warmup: float,
    weight_decay: float,
    max_grad_norm: float,
    seed: int,
    evaluations: int,
    eval_tokens: int,
    watch: Callable[[int, dict[str, float]], bool] = lambda step, losses: False,
    checkpoints: Path | None = None,
    resume: Path | None = None,
) -> Trained:
    """Train a causal language model on blocks of tokens.

    Equal `seed`, `batch`, `context` and `steps` give equal batches in equal order for all methods.

    Args:
        model: trained in place.
        tokens: `train` and `validation`, 1-D integer tensors.
        methods: one, or several that share their trajectory.
        folder: for TensorBoard's events.
        steps: optimizer steps.
        batch: blocks a step.
        context: tokens of a block.
        warmup: steps of linear warm-up, or below 1 a share of all steps.
        weight_decay: decoupled, on matrices only.
        max_grad_norm: gradients are clipped to this 2-norm.
        seed: of the order of the batches.
        evaluations: number of evaluations, evenly spread, after the one at the start.
        eval_tokens: validation tokens that each evaluation reads, about.
        watch: called some hundred times with the step and the last losses; True stops the run.
        checkpoints: folder that keeps the last checkpoint, made at each evaluation. None: none.
        resume: a checkpoint to go on from, exactly.
    """
    every = math.ceil(steps / evaluations)
    arguments = TrainingArguments(
        output_dir=str(checkpoints or folder),
        max_steps=steps,
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=64,
        max_grad_norm=max_grad_norm,
        seed=seed,
        data_seed=seed,
        eval_strategy="steps",
        eval_steps=every,
        logging_steps=every,
        logging_nan_inf_filter=False,  # a diverged batch is a diverged loss
        save_strategy="no" if checkpoints is None else "steps",
        save_steps=every,
        save_total_limit=1,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    validation = blocks(tokens["validation"], context)
    count = max(1, eval_tokens // context)
    validation = validation[:: max(1, len(validation) // count)][:count]  # from the whole of it
    trainer = MethodTrainer(
        model,
        arguments,
        method=methods[0].trajectory,
        methods=methods,
        warmup=steps_of(warmup, steps),
        weight_decay=weight_decay,
        data_collator=collate,
        train_dataset=TensorDataset(blocks(tokens["train"], context)),
        eval_dataset=TensorDataset(validation),
        callbacks=[
            TensorBoardCallback(SummaryWriter(str(folder))),
            Watcher(watch, max(1, steps // 200)),
        ],
    )
    trainer.remove_callback(PrinterCallback)
    if resume is None:
        trainer.evaluate()
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return Trained(trainer, stopped=trainer.state.global_step < steps)


class Watcher(EvalAndSaveAtEnd):
    """Calls `watch` with the step and the last losses every so many steps; True stops the run."""

    def __init__(self, watch: Callable[[int, dict[str, float]], bool], every: int) -> None:
        self.watch, self.every = watch, every
        self.losses: dict[str, float] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Keep the last losses."""
        self.losses.update(logs or {})

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Call it, and stop the run if it says so."""
        super().on_step_end(args, state, control)
        if state.global_step % self.every == 0 and self.watch(state.global_step, self.losses):
            control.should_training_stop = True
