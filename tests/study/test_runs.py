"""What says how far trainings are: the bars, and the file."""

import io
import re

import pytest

pytest.importorskip("pydantic")
pytest.importorskip("rich")

from queue import Queue as News

from rich.console import Console

from paceline.study.runs import Job, Queue, _Bars
from paceline.train.terminal import progress_bars

NAME = (
    "pace-pullback10-kappa0.3-return_kappa0.7-gainscalar-statebf16-every5-twin_gain1-lr0.001-seed"
)


class Half(Queue):
    """Of four trainings of 100 steps, two have ended."""

    def claim(self):
        return None

    def finish(self, job, result):
        pass

    def fail(self, job, reason):
        pass

    def progress(self):
        return 200, 400


def test_the_file_says_how_far_all_and_each_are_in_80_columns(tmp_path):
    told, news = tmp_path / "progress.txt", News()
    console = Console(width=80, file=io.StringIO())
    with progress_bars(console, auto_refresh=False) as progress:
        bars = _Bars(progress, Half(), told)
        for seed in (0, 1):
            bars.begin(Job(f"{NAME}{seed}", 100, print))
        news.put((f"{NAME}1", 40, {"eval_live_loss": 3.21, "eval_loss": 3.1}))
        bars.show(news)
        text = told.read_text()
        bars.end(Job(f"{NAME}0", 100, print))
        bars.show(News())
        assert told.read_text() == text  # it is not written all the time
        bars.tell()
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert re.match(r"60 % of all runs after 0:00:0\d", lines[0])
    assert re.fullmatch(r"\d{4}-\d\d-\d\d [\d:]{8}, 2 running in process \d+", lines[1])
    assert [line.endswith(f"lr0.001-seed{i}") for i, line in enumerate(lines[2::2])] == [True] * 2
    assert all("…" in line and line.startswith("pace-pullback10") for line in lines[2::2])
    assert lines[3::2] == [
        "    step 0 of 100",
        "    step 40 of 100  live 3.210 returned 3.100",
    ]
    assert "1 running" in told.read_text()


def test_a_file_that_cannot_be_written_stops_no_run(tmp_path):
    with progress_bars(Console(quiet=True), auto_refresh=False) as progress:
        _Bars(progress, Half(), tmp_path / "missing" / "progress.txt").tell()
        _Bars(progress, Half(), None).tell()
    assert not [*tmp_path.iterdir()]
