"""The Trainer of transformers, made right for optimizers that return another model."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset, TensorDataset
from torch.utils.tensorboard import SummaryWriter
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations.integration_utils import TensorBoardCallback

from .data import blocks, collate
from .methods import Method, optimizer_and_options, scheduler


class MethodTrainer(Trainer):
    """Trains by a `Method`, and evaluates both models on the same batches.

    The returned model's loss is `eval_loss`, that of the live weights `eval_live_loss`; the two are
    one for optimizers without an average. `curve` collects them with their step, and for PACE the
    mean gain and the fraction of clipped coordinates at that step.
    """

    def __init__(self, *args: Any, method: Method, warmup: int, **options: Any) -> None:
        options["optimizer_cls_and_kwargs"] = optimizer_and_options(method, warmup)
        super().__init__(*args, **options)
        self.method, self.warmup = method, warmup
        self.curve: list[dict[str, float]] = []

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> LambdaLR:
        """The method's own schedule."""
        optimizer = optimizer or self.optimizer
        assert optimizer is not None
        if self.lr_scheduler is None:
            self.lr_scheduler = scheduler(self.method, optimizer, self.warmup, num_training_steps)
        return self.lr_scheduler

    def evaluate(
        self,
        eval_dataset: Dataset[Any] | dict[str, Dataset[Any]] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Evaluate the returned weights, then the live ones, which stay in the model."""
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        returned = live = metrics[f"{metric_key_prefix}_loss"]
        optimizer: Any = self.optimizer
        if hasattr(_unwrapped(optimizer), "train"):
            optimizer.train()
            self.optimizer = None  # or the evaluation loop would put the average in again
            try:
                more = super().evaluate(eval_dataset, ignore_keys, f"{metric_key_prefix}_live")
            finally:
                self.optimizer = optimizer
            live = more[f"{metric_key_prefix}_live_loss"]
            metrics.update(more)
        losses = [entry["loss"] for entry in self.state.log_history if "loss" in entry]
        point = {
            "step": self.state.global_step,
            "train_loss": losses[-1] if losses else math.nan,  # mean since the last evaluation
            "live_loss": live,
            "returned_loss": returned,
        }
        if self.method.name == "pace" and self.state.global_step:
            stats = _unwrapped(optimizer).stats()
            point |= {"gain_mean": stats["gain_mean"], "clipped": stats["clipped"]}
        self.curve.append(point)
        return metrics

    def save_returned(self, folder: str) -> None:
        """Write the model to return, whatever the moment, as a folder that `transformers` loads."""
        optimizer = _unwrapped(self.optimizer)
        swaps = hasattr(optimizer, "eval")
        if swaps:
            optimizer.eval()
        try:
            model: Any = self.model
            model.save_pretrained(folder)
        finally:
            if swaps:
                optimizer.train()


def _unwrapped(optimizer: Any) -> Any:
    """The optimizer inside accelerate's wrapper, which has `train` and `eval` either way."""
    return getattr(optimizer, "optimizer", optimizer)


class Trained(NamedTuple):
    """What a training run leaves: its trainer, and whether it was stopped before its end."""

    trainer: MethodTrainer
    stopped: bool


def train(
    model: PreTrainedModel,
    tokens: dict[str, Tensor],
    method: Method,
    folder: Path,
    *,
    steps: int,
    batch: int,
    context: int,
    warmup: int,
    weight_decay: float,
    max_grad_norm: float,
    seed: int,
    evaluations: int,
    eval_tokens: int,
    watch: Callable[[int, dict[str, float]], bool] = lambda step, losses: False,
) -> Trained:
    """Train a causal language model on blocks of tokens.

    Equal `seed`, `batch`, `context` and `steps` give equal batches in equal order, whatever the
    method.

    Args:
        model: trained in place.
        tokens: `train` and `validation`, 1-D integer tensors.
        method: optimizer, learning rate and schedule.
        folder: gets the TensorBoard events.
        steps: optimizer steps.
        batch: blocks a step.
        context: tokens a block.
        warmup: steps of linear warm-up.
        weight_decay: decoupled, on matrices only.
        max_grad_norm: gradients are clipped to this 2-norm.
        seed: of the order of the batches.
        evaluations: how often both models are evaluated, evenly spread, besides at the start.
        eval_tokens: about how many validation tokens each evaluation reads.
        watch: called some hundred times with the step and the last losses; True stops the run.
    """
    every = math.ceil(steps / evaluations)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=64,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        seed=seed,
        data_seed=seed,
        eval_strategy="steps",
        eval_steps=every,
        logging_steps=every,
        logging_nan_inf_filter=False,  # a diverged batch is a diverged loss
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    validation = blocks(tokens["validation"], context)
    count = max(1, eval_tokens // context)
    validation = validation[:: max(1, len(validation) // count)][:count]  # from all over
    trainer = MethodTrainer(
        model,
        arguments,
        method=method,
        warmup=warmup,
        data_collator=collate,
        train_dataset=TensorDataset(blocks(tokens["train"], context)),
        eval_dataset=TensorDataset(validation),
        callbacks=[
            TensorBoardCallback(SummaryWriter(str(folder))),
            _Watch(watch, max(1, steps // 200)),
        ],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.evaluate()
    trainer.train()
    return Trained(trainer, stopped=trainer.state.global_step < steps)


class _Watch(TrainerCallback):
    def __init__(self, watch: Callable[[int, dict[str, float]], bool], every: int) -> None:
        self.watch, self.every = watch, every
        self.losses: dict[str, float] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.losses.update(logs or {})

    def on_step_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any
    ) -> None:
        # Statistics are only read at evaluations, and take longer than such small steps.
        step = state.global_step + 1
        for group in optimizer.param_groups:
            if "track_stats" in group:
                group["track_stats"] = step % args.eval_steps == 0 or step == args.max_steps

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == args.max_steps:  # the end counts, a multiple of eval_steps or not
            control.should_log = control.should_evaluate = True
        if state.global_step % self.every == 0 and self.watch(state.global_step, self.losses):
            control.should_training_stop = True
