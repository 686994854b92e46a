"""Callbacks of a training: its last step, signals, the progress bar, lines of metrics."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..files import whole
from .folder import json_line


class EvalAndSaveAtEnd(TrainerCallback):
    """Evaluates and saves after the last step, whatever the intervals are.

    It also has the optimizer measure its pull only at steps that are logged or evaluated.
    """

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        step = state.global_step + 1
        intervals = [args.logging_steps, args.eval_steps or args.logging_steps]
        measured = step == args.max_steps or any(step % interval == 0 for interval in intervals)
        for group in given["optimizer"].param_groups:
            if "track_stats" in group:
                group["track_stats"] = measured

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == args.max_steps:
            control.should_log = control.should_evaluate = True
            control.should_save = args.save_strategy != "no"


class Stop(TrainerCallback):
    """The first signal saves a checkpoint and ends the run; the second interrupts at once."""

    asked = False

    @contextmanager
    def on_signals(self, processes: int) -> Iterator[None]:
        """Handle signals of a run of one process: several would not stop at the same step."""
        signals = (signal.SIGINT, signal.SIGTERM) if processes == 1 else ()

        def ask(number: int, frame: Any) -> None:
            if self.asked:
                raise KeyboardInterrupt
            self.asked = True

        before = {number: signal.signal(number, ask) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.asked:
            control.should_save = control.should_training_stop = True


class ProgressBar(TrainerCallback):
    """Shows a progress bar with the last losses."""

    def __init__(self, progress: Any) -> None:
        self.progress = progress
        self.task = progress.add_task("training", total=None, losses="")
        self.losses: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress.update(self.task, total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress.update(self.task, completed=state.global_step)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress.update(self.task, description="evaluating")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        names = {"loss": "loss", "eval_live_loss": "live", "eval_loss": "returned"}
        self.losses |= {name: logs[key] for key, name in names.items() if key in logs}
        shown = " ".join(f"{name} {loss:.3f}" for name, loss in self.losses.items())
        self.progress.update(self.task, description="training", losses=shown)


class JsonlMetrics(TrainerCallback):
    """Writes what is logged to metrics.jsonl; a resumed run starts from its checkpoint's log."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        with whole(self.path) as partial:
            partial.write_text("".join(map(json_line, state.log_history)), encoding="utf-8")

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json_line(state.log_history[-1]))
