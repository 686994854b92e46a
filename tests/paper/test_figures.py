"""`paceline figure`: the command, and its files."""

import random
import shlex

import pandas as pd
import pytest

pytest.importorskip("optuna")
pytest.importorskip("pandas")

from rich.console import Console

from paceline.cli import _parse, main
from paceline.paper import figures
from paceline.train.methods import parse_method
from paceline.train.run import Train


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["21"], "unknown figure '21'"),
        (["6", "--recipe", "tiny-gtp2"], "did you mean 'tiny-gpt2'?"),
        (["6", "--storage", "nothing://x"], "storage: nothing://x: "),
        (["6", "--out", "FILE"], "out: FILE is not an empty folder"),
    ],
)
def test_bad_input(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("")
    assert main(["figure", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("paceline: ")
    assert said.count("\n") == 1
    assert message in said


def test_what_is_missing_is_said(tmp_path, capsys):
    assert main(["figure", "6,13", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "Figure 6: 282 of 282 trainings are missing; --run runs them." in said
    assert "Figure 13: 282 of 282" in said
    assert not list(tmp_path.glob("*.svg"))


def test_paper_scale_writes_commands_that_paceline_takes(tmp_path, capsys):
    assert main(["figure", "6", "--scale", "paper", "--out", str(tmp_path)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"{tmp_path}/figure-6.sh" in said.replace(" ", "").replace("Theircommands:", "")
    lines = (tmp_path / "figure-6.sh").read_text().splitlines()
    commands = [shlex.split(line) for line in lines if line.startswith("paceline train")]
    assert len(commands) > 100
    found = set()
    for words in random.Random(0).sample(commands, 12):
        options = _parse("train", Train, words[2:])
        assert options.parsed == parse_method(options.method)
        found.add(options.out)
    assert len(found) == 12
    outs = [words[words.index("--out") + 1] for words in commands]
    assert len(set(outs)) == len(outs)


def test_figures_are_files_that_say_the_same_each_time(small, everything, tmp_path, monkeypatch):
    """SVG, PNG, and the data beside them."""
    written = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        options = figures.FigureOptions(figures=("13",))
        figures.show_figure("13", everything, options, folder, Console(quiet=True))
        assert sorted(p.name for p in folder.iterdir()) == [
            f"figure-13.{kind}" for kind in ("csv", "md", "png", "svg")
        ]
        written.append([p.read_bytes() for p in sorted(folder.iterdir())])
    assert written[0] == written[1]
    table = pd.read_csv(tmp_path / "a" / "figure-13.csv")
    assert set(table.setting) == {"one"}
    assert {"pullback", "kappa", "lr", "seed", "clipped"} <= set(table.columns)
