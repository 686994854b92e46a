"""What long commands show in the terminal."""

import io
import re

import pytest

pytest.importorskip("transformers")

from rich.console import Console

from paceline.train.terminal import progress_bars, show_losses

LOSSES = {"eval_live_loss": 12.3456, "eval_loss": 12.2222}


@pytest.mark.parametrize(
    "name", ["training", "pace-pullback10-kappa0.3-return_kappa0.7-lr0.001-seed0"]
)
def test_numbers_are_whole_at_80_columns(name):
    console = Console(width=80, file=io.StringIO(), force_terminal=True, color_system=None)
    with progress_bars(console, auto_refresh=False) as progress:
        # What `paceline train` shows is the longest.
        losses = show_losses(LOSSES) + " loss 15.555" * (name == "training")
        task = progress.add_task(name, total=100, losses=losses, completed=40)
        progress.tasks[task].start_time -= 7265
        progress.refresh()
        written = console.file.getvalue()
    said = re.sub(r"\x1b\[[0-9?]*[A-Za-z]|\r", "\n", written)
    *_, line = (line for line in said.splitlines() if "live" in line)
    assert len(line.rstrip()) <= 80
    assert losses in line
    assert "40%" in line
    assert re.search(r"2:01:0\d left (-:--:--|\d+:\d\d:\d\d)", line)
    shown = line.split()[0]
    assert re.fullmatch(re.escape(shown).replace("…", ".*"), name)
    assert len(shown) >= (16 if len(name) > 16 else 5)
    assert said.count("live") == said.count("40%")  # a name takes one line
