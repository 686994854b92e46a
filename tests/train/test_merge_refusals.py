"""Merging of checkpoints: what is refused."""

import json
import re

import pytest
import torch

pytest.importorskip("transformers")

from merged import average, tree
from safetensors.torch import load_file, save_file

from paceline.averaging import RULES
from paceline.cli import main
from paceline.sums import find_damage, write_sums
from paceline.train import merge as merging


def put(folder, state, name="model.safetensors"):
    folder.mkdir(exist_ok=True)
    save_file(state, folder / name)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder of good and bad checkpoints; the current folder."""
    monkeypatch.chdir(tmp_path)
    good = {"w": torch.ones(2, 3), "b": torch.ones(3)}
    for name, state in {
        "A": good,
        "B": good,
        "LESS": {"w": torch.ones(2, 3)},
        "MORE": good | {"c": torch.ones(1)},
        "SHAPE": good | {"b": torch.ones(1, 3)},
        "DTYPE": good | {"b": torch.ones(3).half()},
        "NAN": good | {"b": torch.tensor([1.0, float("nan"), 1.0])},
        "INF": good | {"w": torch.ones(2, 3).index_fill(1, torch.tensor(1), float("inf"))},
        "MINUS": good | {"w": torch.ones(2, 3).index_fill(1, torch.tensor(2), -float("inf"))},
        "HUGE": good | {"w": torch.full((2, 3), 1e6)},
        "NONE": {},
        "QUANT": good,
        "FP8": {"w": torch.ones(2, 3).to(torch.float8_e4m3fn)},
        "CUT": good,
    }.items():
        put(tmp_path / name, state)
        save_file(state, f"{name}.safetensors")
    put(tmp_path / "LORA", good, "adapter_model.safetensors")
    (tmp_path / "QUANT" / "config.json").write_text('{"quantization_config": {}}')
    data = (tmp_path / "CUT" / "model.safetensors").read_bytes()
    (tmp_path / "CUT" / "model.safetensors").write_bytes(data[:-1])
    (tmp_path / "GARBAGE.safetensors").write_text("no header at all")
    (tmp_path / "EMPTY.safetensors").write_text("")
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "BIN").mkdir()
    (tmp_path / "BIN" / "pytorch_model-00001-of-00002.bin").write_text("")
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "LINK").symlink_to("nowhere")
    for name, index in {
        "NOJSON": "{",
        "LIST": "[]",
        "NOMAP": "{}",
        "NOFILES": '{"weight_map": {}}',
        "OUTSIDE": '{"weight_map": {"w": "../A/model.safetensors"}}',
        "NUMBER": '{"weight_map": {"w": 1}}',
        "LOST": '{"weight_map": {"w": "lost.safetensors"}}',
        "LISTED": '{"weight_map": {"w": "part.safetensors", "z": "part.safetensors"}}',
        "NESTED": '{"weight_map": {"w": ["part.safetensors"]}}',
        "FACTS": '{"weight_map": {"w": "part.safetensors", "b": "paceline.json"}}',
        "CONFIG": '{"weight_map": {"w": "config.json"}}',
        "NUL": r'{"weight_map": {"w": "a\u0000.safetensors"}}',
        "TWICE": '{"weight_map": {"w": "other.safetensors", "c": "part.safetensors"}}',
    }.items():
        put(tmp_path / name, good, "part.safetensors")
        (tmp_path / name / "model.safetensors.index.json").write_text(index)
    save_file(good, tmp_path / "TWICE" / "other.safetensors")
    save_file(good | {"c": torch.ones(3)}, tmp_path / "TWICE" / "part.safetensors")
    save_file(good, tmp_path / "FACTS" / "paceline.json")
    (tmp_path / "RUN" / "checkpoint-1").mkdir(parents=True)
    put(tmp_path / "RUN" / "checkpoint-1", good)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "give at least two checkpoints, got 0"),
        ("A", "give at least two checkpoints, got 1"),
        ("RUN", "give at least two checkpoints, got 1"),
        ("A nowhere", "no such file or folder: nowhere"),
        ("A " + "x" * 300, "xxx: File name too long"),
        (
            "A EMPTY",
            "model.safetensors, model.safetensors.index.json nor adapter_model.safetensors\n",
        ),
        ("A BIN", "BIN holds neither .*; convert its .bin by from_pretrained() and save_pre"),
        ("A B A", "checkpoints: give each only once"),
        ("A ./RUN/../A", "checkpoints: give each only once"),
        ("A B.safetensors", "A is a model folder, and B.safetensors is a file"),
        ("A B LORA", "A is a model folder, and LORA is an adapter folder"),
        ("A B LESS", "tensor 'b' is F32 of shape (3,) in A and missing in LESS"),
        ("A MORE", "tensor 'c' is missing in A and F32 of shape (1,) in MORE"),
        ("A SHAPE", "tensor 'b' is F32 of shape (3,) in A and F32 of shape (1, 3) in SHAPE"),
        ("A B DTYPE", "tensor 'b' is F32 of shape (3,) in A and F16 of shape (3,) in DTYPE"),
        ("A NAN B", "tensor 'b' of NAN holds a NaN or infinity"),
        ("INF A", "tensor 'w' of INF holds a NaN or infinity"),
        ("A MINUS", "tensor 'w' of MINUS holds a NaN or infinity"),
        ("A HUGE --dtype float16", "the average of 'w' is too large for torch.float16"),
        ("A.safetensors NAN.safetensors --out o.safetensors", "tensor 'b' of NAN.safe"),
        ("A QUANT", "QUANT is a quantized model.*'quantization_config' in config.json"),
        ("QUANT A", "QUANT is a quantized model"),
        ("A FP8", "FP8/model.safetensors: tensor 'w' is of dtype F8_E4M3, which cannot be"),
        ("NONE A", "NONE has no tensors"),
        ("A CUT", "CUT/model.safetensors cannot be read as safetensors: "),
        ("A.safetensors GARBAGE.safetensors", "GARBAGE.safetensors cannot be read as safetens"),
        ("A.safetensors EMPTY.safetensors", "EMPTY.safetensors cannot be read as safetensors"),
        ("notes.txt A", "notes.txt cannot be read as safetensors"),
        (
            "A NOJSON",
            "NOJSON/model.safetensors.index.json is not JSON (.*mend it or leave out NOJSON",
        ),
        ("A LIST", "LIST/model.safetensors.index.json is not a JSON object"),
        (
            "A NOMAP",
            "NOMAP/model.safetensors.index.json has no weight_map of tensors to .safetensors files",
        ),
        ("A NOFILES", "NOFILES/model.safetensors.index.json has no weight_map"),
        ("A OUTSIDE", "OUTSIDE/model.safetensors.index.json has no weight_map"),
        ("A NUMBER", "NUMBER/model.safetensors.index.json has no weight_map"),
        ("A LOST", "LOST/lost.safetensors cannot be read as safetensors: No such file"),
        ("A LISTED", "LISTED/model.safetensors.index.json lists 'z' in part.safetensors, which do"),
        ("A NESTED", "NESTED/model.safetensors.index.json has no weight_map of tensors to .safete"),
        ("A FACTS", "FACTS/model.safetensors.index.json has no weight_map of tensors to .safetens"),
        ("A CONFIG", "CONFIG/model.safetensors.index.json has no weight_map"),
        ("A NUL", "cannot be read as safetensors"),
        ("A TWICE", "other.safetensors and part.safetensors both have tensor 'b', which model.saf"),
        ("A B --out EMPTY", "out: EMPTY exists; name another"),
        ("A B --out LINK", "out: LINK exists; name another"),
        ("A B --out notes.txt", "out: notes.txt exists"),
        ("A B --out no/where", "out: there is no folder no for where"),
        ("A B --out notes.txt/x", "out: there is no folder notes.txt for x"),
        ("A B --out o.safetensors", "out: o.safetensors must be a folder, as the checkpoints"),
        ("A.safetensors B.safetensors", "out: OUT must end in .safetensors"),
        ("A B --rule mean", "rule: unknown average 'mean' in 'mean'; known: ema, swa, uniform, l"),
        ("A B --rule ema:start", "rule: averaging 'ema:start': 'start' must be one option=number"),
        ("A B --rule swa:window=2", "rule: averaging 'swa:window=2' has no option 'window'"),
        ("A B --rule lawa", "rule: averaging 'lawa' needs window="),
        ("A B --rule ema:beta=2", "rule: .*beta of ema must be in (0, 1], got 2"),
        ("A B --dtype int8", "int8"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, place, capsys):
    before = tree(place)
    arguments = arguments.split()
    if "--out" not in arguments:
        arguments += ["--out", "OUT"]
    average(*arguments, status=2)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("paceline: ")
    assert re.search(re.escape(message).replace(r"\.\*", ".*"), error), error
    assert tree(place) == before


CODES = torch.arange(12, dtype=torch.uint8).reshape(4, 3)
SCALES = {"w.scales": torch.ones(4)}


@pytest.mark.parametrize(
    ("tensors", "beside", "sign"),
    [
        ({}, {"config.json": {"quantization": {"bits": 8}}}, "'quantization' in config.json"),
        ({}, {"config.json": {"text_config": {"quantization_config": {}}}}, "quantization_config"),
        ({}, {"config.json": {"compression_config": {}}}, "'compression_config'"),
        ({}, {"config.json": {"load_in_4bit": True}}, "'load_in_4bit'"),
        ({}, {"config.json": {"quant_method": "awq"}}, "'quant_method'"),
        ({}, {"quantize_config.json": {}}, "it has quantize_config.json"),
        ({}, {"hf_quant_config.json": {}}, "it has hf_quant_config.json"),
        ({"w": CODES, **SCALES}, {}, "integers, and the tensor 'w.scales'"),
        ({"w.qweight": CODES.int()}, {}, "the tensor 'w.qweight'"),
        ({"w": CODES, "w.absmax": torch.ones(4)}, {}, "the tensor 'w.absmax'"),
        ({"w": torch.ones(4), "w.quant_state.bitsandbytes__nf4": CODES}, {}, "quant_state"),
        ({"w": CODES.to(torch.int8), "w.SCB": torch.ones(4)}, {}, "the tensor 'w.SCB'"),
        ({"w": CODES.to(torch.int8), "w_scale_inv": torch.ones(4)}, {}, None),
        ({"w.weight_scale": torch.ones(1), "w.weight": CODES.to(torch.int8)}, {}, "weight_scale"),
    ],
)
def test_quantized_models_however_they_say_so(tensors, beside, sign, tmp_path, capsys):
    for n in (1, 2):
        put(tmp_path / f"step-{n}", tensors or {"w": torch.ones(2)})
        for name, value in beside.items():
            (tmp_path / f"step-{n}" / name).write_text(json.dumps(value))
    average(*tmp_path.iterdir(), "--out", tmp_path / "out", status=2 if sign else 0)
    assert not sign or re.search(rf"step-1 is a quantized model.*{sign}", capsys.readouterr().err)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64, torch.bool])
def test_integers_that_differ_are_refused_unless_they_count(dtype, tmp_path, capsys):
    for n in (0, 1):
        codes = torch.tensor([0, n]).to(dtype)
        put(tmp_path / f"step-{n}", {"w": codes, "b": torch.ones(2), "n": torch.tensor(n)})
    before = tree(tmp_path)
    average(*tmp_path.iterdir(), "--out", tmp_path / "out", status=2)
    assert re.search(r"tensor 'w' of \w+ differs between .*step-0 and ", capsys.readouterr().err)
    assert tree(tmp_path) == before
    average(*tmp_path.iterdir(), "--rule=lawa:window=1", "--out", tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors")["n"] == 1


def test_what_only_sounds_quantized_is_merged(tmp_path):
    """Scales of float models, masks that are equal, and sizes of a codec."""
    state = {"norm.scales": torch.ones(2), "attn.mask": torch.ones(1, 1, dtype=torch.bool)}
    for n in (1, 2):
        put(tmp_path / f"step-{n}", state)
        values = {"num_quantizers": 8, "quantization_config": None, "quant_mode": False}
        (tmp_path / f"step-{n}" / "config.json").write_text(json.dumps(values))
    average(*tmp_path.iterdir(), "--out", tmp_path / "out")


def test_all_headers_are_checked_before_anything_is_written(place, monkeypatch):
    monkeypatch.setattr(merging, "write", lambda *_: pytest.fail("something was written"))
    for bad in ("CUT", "SHAPE", "LESS"):
        average("A", "B", bad, "--out", "OUT", status=2)


def test_what_has_no_weight_is_not_read(place):
    average("NAN", "A", "B", "--rule", "lawa:window=2", "--out", "OUT")
    assert torch.equal(load_file("OUT/model.safetensors")["b"], torch.ones(3))


def test_the_help_explains_the_rules(capsys):
    assert main(["average", "--help"]) == 0
    said = capsys.readouterr().out
    assert "count checkpoints" in " ".join(said.split())
    ours = [rule for rules in RULES.values() for rule in rules if "paceline" in rule.__module__]
    assert len(ours) == 6
    for name in {rule.name for rule in ours}:
        assert re.search(rf"^{name}[\[:]", said, re.MULTILINE)


def test_a_flipped_bit_is_refused(place, capsys):
    write_sums(place / "B")
    file = place / "B" / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    for given in ("B", "B/model.safetensors"):
        other = "A" if given == "B" else "A.safetensors"
        out = "out" if given == "B" else "out.safetensors"
        assert main(["average", other, given, "--out", out]) == 2
        assert "paceline: checkpoints: B/model.safetensors is damaged" in capsys.readouterr().err
        assert not (place / out).exists()


def test_what_is_made_has_check_sums(place):
    average("A", "B", "--out", "out")
    assert find_damage(place / "out") is None
    (place / "out" / "paceline.json").write_text("{}")
    assert "paceline.json is damaged" in find_damage(place / "out")
