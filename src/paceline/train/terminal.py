"""What long commands show in the terminal."""

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

BESIDE = 62  # columns of a bar beside its name, in a narrow terminal


def quiet() -> None:
    """Silence the bars and logs of transformers and datasets."""
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    # peft calls deprecated functions of transformers.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")


def say(console: Console, text: str, end: str = "\n") -> None:
    """Print a text as it is: without colours and line breaks, so that it can be copied."""
    console.print(Text(text), end=end, soft_wrap=True)


def _to_stderr(text: str) -> None:
    print(f"paceline: {text}", file=sys.stderr)


_hear: Callable[[str], object] = _to_stderr  # what `tell` passes lines to


@contextmanager
def told_to(hear: Callable[[str], object]) -> Iterator[None]:
    """For the time of the context, `tell` passes its lines to a function."""
    global _hear
    before, _hear = _hear, hear
    try:
        yield
    finally:
        _hear = before


def tell(text: str) -> None:
    """Print a line to standard error, in one process of several."""
    if os.environ.get("RANK", "0") == "0":
        _hear(text)


def progress_bars(console: Console, *columns: Any, **options: Any) -> Progress:
    """Progress bars with these columns in the middle, and options of rich's `Progress`.

    By default they show a field `losses` of their tasks, made by `show_losses`.
    """
    losses = (TextColumn("{task.percentage:>3.0f}%"), TextColumn("{task.fields[losses]}"))
    return Progress(
        _Name(console.width - BESIDE, "{task.description}", table_column=Column()),
        BarColumn(bar_width=24 if console.width > 100 else 8),
        *(columns or losses),
        TimeElapsedColumn(Column(no_wrap=True)),
        TextColumn("left"),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
        console=console,
        **options,
    )


def steady_bars(console: Console) -> Progress:
    """Progress bars that go on while what libraries print is silenced, and leave nothing behind."""
    return progress_bars(
        Console(file=console.file), transient=True, redirect_stdout=False, redirect_stderr=False
    )


class _Name(TextColumn):
    """A name with … in its middle where there is no room; numbers are never cut."""

    def __init__(self, room: int, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.room = max(room, 12)

    def render(self, task: Task) -> Text:
        text = Text(shortened(super().render(task).plain, self.room))
        text.no_wrap, text.overflow = True, "ellipsis"
        return text


def shortened(text: str, room: int) -> str:
    """A text of at most so many characters; … is in the middle, since names differ at the end."""
    if len(text) <= room:
        return text
    end = room // 2
    return f"{text[: room - 1 - end]}…{text[-end:]}"


def show_losses(losses: dict[str, float]) -> str:
    """The last losses of the live weights and of the best returned model, as a short text.

    With two sets to evaluate on, the losses are those of the test set.
    """
    kept = {k: x for k, x in losses.items() if not k.startswith("eval_selection_")}
    losses = {k.replace("eval_test_", "eval_"): x for k, x in kept.items()}
    if "eval_live_loss" not in losses:
        return ""
    live = losses["eval_live_loss"]
    found = [x for name, x in losses.items() if name.startswith("eval_") and name.endswith("_loss")]
    found.remove(live)
    return f"live {live:.3f} returned {min(found, default=live):.3f}"
