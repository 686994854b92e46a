"""What long commands show in the terminal."""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import datasets
import transformers
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


def quiet() -> None:
    """Silence the bars and logs of transformers and datasets."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    # peft calls deprecated functions of transformers.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")


def say(console: Console, text: str, end: str = "\n") -> None:
    """Print a text as it is: without colours and line breaks, so that it can be copied."""
    console.print(Text(text), end=end, soft_wrap=True)


_told: set[str] | None = None  # lines that are not printed again


@contextmanager
def told_once() -> Iterator[None]:
    """For the time of the context, `tell` prints equal lines once."""
    global _told
    before, _told = _told, set()
    try:
        yield
    finally:
        _told = before


def tell(text: str) -> None:
    """Print a line to standard error, in one process of several."""
    if _told is not None and text in _told:
        return
    if _told is not None:
        _told.add(text)
    if os.environ.get("RANK", "0") == "0":
        print(f"paceline: {text}", file=sys.stderr)


def progress_bars(console: Console, *columns: Any, **options: Any) -> Progress:
    """Progress bars with these columns in the middle, and options of rich's `Progress`.

    By default they show a field `losses` of their tasks, made by `show_losses`.
    """
    losses = (TextColumn("{task.percentage:>3.0f}%"), TextColumn("{task.fields[losses]}"))
    return Progress(
        _Name("{task.description}", table_column=Column()),
        BarColumn(bar_width=24),
        *(columns or losses),
        TimeElapsedColumn(Column(no_wrap=True)),
        TextColumn("left"),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
        console=console,
        **options,
    )


class _Name(TextColumn):
    """A name that ends in … where there is no room; numbers are never cut."""

    def render(self, task: Task) -> Text:
        text = super().render(task)
        text.no_wrap, text.overflow = True, "ellipsis"
        return text


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
