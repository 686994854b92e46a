"""What is done on the way of a run: the last step, signals, progress, lines of metrics."""

import json
import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..files import whole


class AtTheEnd(TrainerCallback):
    """The last step is evaluated and saved, a multiple of the intervals or not.

    And the pull is measured only where it is logged or evaluated.
    """

    def on_step_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any
    ) -> None:
        step = state.global_step + 1
        intervals = [args.logging_steps, args.eval_steps or args.logging_steps]
        measured = step == args.max_steps or any(step % interval == 0 for interval in intervals)
        for group in optimizer.param_groups:
            if "track_stats" in group:
                group["track_stats"] = measured

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == args.max_steps:
            control.should_log = control.should_evaluate = True
            control.should_save = args.save_strategy != "no"


class Stop(TrainerCallback):
    """The first signal to end asks for a checkpoint and an end; the second ends."""

    asked = False

    @contextmanager
    def on_signals(self, processes: int) -> Iterator[None]:
        """Listen. Several processes would not hear it at the same step, and are not asked."""
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


class Progress(TrainerCallback):
    """A bar, with the last losses."""

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
        shown = "  ".join(f"{name} {loss:.3f}" for name, loss in self.losses.items())
        self.progress.update(self.task, description="training", losses=shown)


class Lines(TrainerCallback):
    """metrics.jsonl: what was logged up to now, of a resumed run up to its checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        with whole(self.path) as partial:
            partial.write_text("".join(map(_line, state.log_history)), encoding="utf-8")

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(state.log_history[-1]))


def _line(entry: dict[str, Any]) -> str:
    finite = {
        k: None if isinstance(x, float) and not math.isfinite(x) else x for k, x in entry.items()
    }
    return json.dumps(finite) + "\n"
