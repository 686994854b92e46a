"""The run folder: its checks, its checkpoints, and its lines of JSON."""

import json
import math

import pytest

pytest.importorskip("pydantic")

from paceline.train import InputError, folder
from paceline.train.manifest import read_json, write_json


def test_only_an_empty_or_new_folder_is_taken(tmp_path):
    new = folder.make_empty(tmp_path / "a" / "b")
    assert new.is_dir()
    assert folder.make_empty(new) == new
    (new / "x").touch()
    with pytest.raises(
        InputError, match=r"^out: .*b is not an empty folder; name another, or wait$"
    ):
        folder.require_empty(new, ", or wait")
    with pytest.raises(InputError, match="x is not an empty folder; name another$"):
        folder.make_empty(new / "x")
    with pytest.raises(InputError, match="^out: cannot use .*: File name too long"):
        folder.require_empty(tmp_path / ("x" * 300))
    with pytest.raises(InputError, match="^out: cannot make the folder .*: Not a directory"):
        folder.make(new / "x" / "y")


def test_states_of_a_run(tmp_path):
    assert not folder.is_begun(tmp_path)
    with pytest.raises(
        InputError, match=r"^resume: .* is no folder of a run: it has no recipe\.yaml"
    ):
        folder.recipe_of(tmp_path)
    (tmp_path / folder.RECIPE).write_text("lr: 1e-3\n")
    assert folder.is_begun(tmp_path)
    assert folder.recipe_of(tmp_path) == {"lr": 1e-3}
    assert not folder.is_finished(tmp_path)
    (tmp_path / folder.MODEL).mkdir()
    assert folder.is_finished(tmp_path)


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    assert folder.last_checkpoint(tmp_path) is None
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-x", ".checkpoint-11", "other-12"):
        (tmp_path / folder.CHECKPOINTS / name).mkdir(parents=True)
    (tmp_path / folder.CHECKPOINTS / "checkpoint-13").touch()  # a file
    found = folder.checkpoints_in(tmp_path / folder.CHECKPOINTS)
    assert [path.name for path in found] == ["checkpoint-9", "checkpoint-10"]
    assert folder.last_checkpoint(tmp_path) == found[-1]
    assert folder.step_of(found[-1]) == 10


def test_lines_of_json(tmp_path):
    path = tmp_path / folder.METRICS
    rows = [{"step": 1, "loss": 2.5, "κ": "ä"}, {"loss": math.nan, "other": -math.inf}]
    path.write_text("".join(map(folder.json_line, rows)) + "\n" + '{"loss": NaN}\n', "utf-8")
    assert folder.read_lines(path) == (
        [(1, rows[0]), (2, {"loss": None, "other": None}), (4, {"loss": None})],
        False,
    )
    with path.open("a") as file:
        file.write('{"step": 3, "lo')
    lines, torn = folder.read_lines(path)
    assert (len(lines), torn) == (3, True)
    for broken in ('{"a": 1}\n{"b"\n{"c": 1}\n', '{"a": 1}\n[]\n'):
        path.write_text(broken)
        with pytest.raises(InputError, match="line 2 is not a JSON object .*mend or delete"):
            folder.read_lines(path)
    with pytest.raises(InputError, match="^cannot read .*: No such file"):
        folder.read_lines(tmp_path / "nowhere")


def test_objects_in_files(tmp_path):
    path = tmp_path / folder.MANIFEST
    write_json(path, {"κ": [1, None]})
    assert folder.manifest_of(tmp_path) == read_json(path) == {"κ": [1, None]}
    for broken, message in (
        (b"[1]", "is not a JSON object; mend it or leave out"),
        (b"{", "is not JSON .*; mend it or leave out"),
        (b'{"a": "\xff"}', "is not JSON"),
        (json.dumps("x").encode(), "is not a JSON object"),
    ):
        path.write_bytes(broken)
        with pytest.raises(InputError, match=message):
            folder.manifest_of(tmp_path)
    path.unlink()
    with pytest.raises(InputError, match=r"^cannot read .*manifest\.json: No such file"):
        folder.manifest_of(tmp_path)
