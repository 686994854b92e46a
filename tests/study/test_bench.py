"""`paceline bench`: everything is measured, and what can be known beforehand comes out right."""

import json

import pytest
import torch

from paceline.cli import main
from paceline.study import bench


def test_measures_every_optimizer(monkeypatch, tmp_path, capsys, kernel):
    monkeypatch.setattr(bench, "shapes", lambda model: [(64, 33), (10,), (2, 3, 4)])
    out = tmp_path / "results.json"
    assert main(["bench", "--models", "gpt2", "--rounds", "3", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    results = json.loads(out.read_text())
    assert results["kernel_build_seconds"] > 0
    rows = results["gpt2"]["optimizers"]
    state = {name: round(row["state_bytes_per_parameter"], 1) for name, row in rows.items()}
    count = 4 * 3 / (64 * 33 + 10 + 24)  # each tensor's float32 step number
    adamw, pace = round(8 + count, 1), round(12 + count, 1)
    assert state == {
        "AdamW fused": adamw,
        "AdamW foreach": adamw,
        "AdamW for-loop": adamw,
        "AdamW fused + EMA": pace,
        "schedulefree AdamW": 8.0,
        "PACE eager unsliced": pace,
        "PACE eager": pace,
        "PACE fused": pace,
        "PACE fused bf16 state": round(6 + count, 1),
    }
    for name, row in rows.items():
        assert name in printed
        assert row["milliseconds"] > 0
        low, high = row["ratio_quartiles"]
        assert 0 < low <= row["ratio"] <= high
        assert row["times_byte_floor"] > 0
        # Both shares are of the same time and bytes.
        shares = row["share_of_copy"] * row["times_byte_floor"]
        of_copy = results["gpt2"]["copy_gigabytes_per_second"]
        of_scaling = results["gpt2"]["bandwidth_gigabytes_per_second"]
        assert shares == pytest.approx(of_scaling / of_copy)
    elements = results["gpt2"]["parameters"]
    adamw_seconds = rows["AdamW fused"]["milliseconds"] / 1e3
    reached = rows["AdamW fused"]["share_of_copy"] * of_copy * 1e9
    assert reached == pytest.approx(28 * elements / adamw_seconds)
    assert "of a copy" in printed
    assert rows["PACE fused"]["scratch_megabytes"] < 1e-3
    assert rows["PACE eager"]["scratch_megabytes"] > 0


def test_measures_others_by_name(monkeypatch, tmp_path, kernel):
    monkeypatch.setattr(bench, "shapes", lambda model: [(64, 33), (10,), (2, 3, 4)])
    names = ["Pullback(AdamW fused), c = 0", "Pullback(AdamW fused)", "PACE fused, BEMA"]
    names.append("PACE fused, returned apart")
    out = tmp_path / "results.json"
    options = ["--models", "gpt2", "--rounds", "3", "--out", str(out)]
    assert main(["bench", *options, "--only", *names]) == 0
    rows = json.loads(out.read_text())["gpt2"]["optimizers"]
    state = [rows[name]["state_bytes_per_parameter"] for name in names]
    each = 3 / (64 * 33 + 10 + 24)  # a byte for each tensor, to a parameter
    # Two counts of 8 bytes beside AdamW's of 4; and EMA, start and average of BEMA beside m and v.
    sizes = [12 + 20 * each, 12 + 20 * each, 20 + 16 * each, 16 + 16 * each]
    assert state == pytest.approx(sizes)
    assert set(rows) == {"AdamW fused", *names}


def test_the_share_of_a_training_step(monkeypatch, capsys, kernel):
    layer = torch.nn.Linear(64, 64)
    passes = list(layer.parameters()), lambda: layer(torch.ones(8, 64)).sum().backward()
    monkeypatch.setattr(bench, "_small_gpt2", lambda device: passes)
    options = ["--models", "training", "--rounds", "3", "--only", "PACE fused"]
    assert main(["bench", *options, "--threads", "2"]) == 0
    assert "forward and backward" in capsys.readouterr().out


def test_the_models_are_what_they_say():
    params, backward = bench._small_gpt2("cpu")
    backward()
    assert all(p.grad.any() for p in params)
    sizes = {model: [_size(s) for s in bench.shapes(model)] for model in ("gpt2", "small")}
    assert sum(sizes["gpt2"]) == 124_439_808
    assert len(sizes["small"]) == 2000
    assert max(sizes["small"]) == 65_536


def test_without_a_compiler_it_says_so(monkeypatch, capsys):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    assert main(["bench"]) == 2
    error = capsys.readouterr().err
    assert "the benchmark needs the one-pass kernel: /nowhere/c++" in error
    assert error.count("\n") == 1


def _size(shape):
    total = 1
    for length in shape:
        total *= length
    return total


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "Adam"], "only: unknown optimizer 'Adam'; known: AdamW for-loop, "),
        (["--rounds", "2"], "rounds: must be greater than or equal to 3, got 2"),
        (["--out", "."], "out: . cannot be written; name a file"),
        (["--device", "cuda"], "device: torch finds no cuda device here"),
    ],
)
def test_bad_input(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
