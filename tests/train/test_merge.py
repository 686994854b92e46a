"""Merging of checkpoints: the sum, the formats, memory and kills."""

import io
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from merged import average, tree
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from paceline.averaging import parse
from paceline.cli import main
from paceline.train import InputError, weighted
from paceline.train import merge as merging
from paceline.train.folder import LIVE, WEIGHTS_IN, step_of
from paceline.train.merge import Merge


def config(**options):
    sizes = {"vocab_size": 50, "n_positions": 16, "n_embd": 8, "n_layer": 2, "n_head": 2}
    return GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, **options)


def gpt2(seed, **options):
    torch.manual_seed(seed)
    return GPT2LMHeadModel(config(**options))


def mean(states, name):
    return sum(state[name].double() for state in states) / len(states)


def header(path):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), len(data) - 8 - length


@pytest.fixture
def files(tmp_path):
    """Three plain files, and their x."""
    torch.manual_seed(0)
    states = [{"x": torch.randn(5, 3), "y": torch.randn(4)} for _ in range(3)]
    paths = [tmp_path / f"step-{n}.safetensors" for n in (90, 200, 1000)]
    for path, state in zip(paths, states, strict=True):
        save_file(state, path, {"format": "pt", "from": path.stem})
    return paths, states


# ---- the sum -----------------------------------------------------------------------------------


def bema_by_hand(bias_power):
    """Its weights for three checkpoints, κ = 0.5, ρ = 10, γ = 1, from θ_0 = θ_1."""
    ema = [1.0, 0.0, 0.0]
    for t in (1, 2, 3):
        beta = (10 + t) ** -0.5
        ema = [(1 - beta) * e + beta * (t == i + 1) for i, e in enumerate(ema)]
    alpha = 13**-bias_power
    return [ema[0] - alpha, ema[1], ema[2] + alpha]


# η for which the first two weights add up to nothing, and so divide nothing
BALANCED = -math.log(1 - 13**-0.5) / math.log(13)


@pytest.mark.parametrize(
    ("rule", "weights"),
    [
        ("uniform", [1 / 3, 1 / 3, 1 / 3]),
        ("uniform:start=1", [0, 1 / 2, 1 / 2]),
        ("uniform:start=7", [0, 0, 1]),
        ("ema:beta=0.5", [1 / 4, 1 / 4, 1 / 2]),
        ("ema:kappa=1", [1 / 2, 1 / 4, 1 / 4]),
        ("swa:every=2", [0, 1, 0]),
        ("lawa:window=2", [0, 1 / 2, 1 / 2]),
        ("bema", bema_by_hand(0.2)),
        (f"bema:bias_power={BALANCED}", bema_by_hand(BALANCED)),
    ],
)
def test_rules(rule, weights, files, tmp_path, capsys):
    paths, states = files
    out = tmp_path / "out.safetensors"
    average(paths[2], paths[0], paths[1], "--rule", rule, "--out", out)  # sorted by number
    merged = load_file(out)
    assert merged.keys() == {"x", "y"}
    for name, tensor in merged.items():
        direct = sum(w * s[name].double() for w, s in zip(weights, states, strict=True))
        torch.testing.assert_close(tensor.double(), direct, rtol=0, atol=5e-7)
    with safe_open(out, "pt") as opened:
        metadata = opened.metadata()
    facts = json.loads(metadata.pop("paceline"))
    assert metadata == {"format": "pt", "from": "step-1000"}
    assert facts.pop("weights") == pytest.approx(weights, abs=1e-12)
    assert facts.pop("rule") == (rule if rule.startswith("ema") else str(parse(rule)))
    assert facts.pop("checkpoints") == [str(path) for path in paths]
    assert facts == {"dtype": "as in the checkpoints", "paceline": merging.version("paceline")}
    said = capsys.readouterr().out
    assert "checkpoint, by number" in said
    assert [f"{float(w):.4g}" for w in re.findall(r"\| +([\d.e-]+) \|$", said, re.M)] == [
        f"{w:.4g}" for w in weights
    ]
    assert "Merged: " in said


@pytest.mark.parametrize("rule", ["uniform", "ema:kappa=0.3", "bema", "bema:lag=1:every=2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_what_is_equal_in_all_stays_as_it_is(rule, dtype, tmp_path):
    """Bit for bit: frozen parameters, for one."""
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    paths = [tmp_path / f"{n}.safetensors" for n in range(7)]
    for path in paths:
        save_file({"x": x}, path)
    average(*paths, "--rule", rule, "--out", tmp_path / "out.safetensors")
    assert torch.equal(load_file(tmp_path / "out.safetensors")["x"], x)


def test_the_default_rule_and_the_order_given(files, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths, states = files
    paths[1].rename("last[b].safetensors")
    average(
        "step-90.safetensors", "last[b].safetensors", "step-1000.safetensors", "--out=o.safetensors"
    )
    torch.testing.assert_close(load_file("o.safetensors")["x"], mean(states, "x").float())
    said = capsys.readouterr().out
    assert "checkpoint, as given" in said
    assert re.search(r"step-90\b.*last\[b\]\..*step-1000\b", said, re.DOTALL)
    average("last[b].safetensors", paths[2], "--rule=lawa:window=1", "--out=2.safetensors")
    assert torch.equal(load_file("2.safetensors")["x"], states[2]["x"])
    Path("last[b].safetensors").rename("X" * 150)
    Path("Y" * 150).symlink_to(paths[0])
    average("X" * 150, "Y" * 150, "--out=3.safetensors")
    said = capsys.readouterr().out
    assert said.count("X") == said.count("Y") == 150  # nothing cut short


def test_the_number_that_ends_a_name(files):
    paths, _ = files
    assert step_of(paths[0]) == 90
    for name in ("checkpoint-7a", "checkpoint7", "7", "-", "a-1.5"):
        assert step_of(Path(name)) is None


@pytest.mark.parametrize(
    "names",
    [
        "step_500 step_1000 step_1500",
        "500 1000",
        "step500-hf step1000-hf",
        "epoch=1-step=500 epoch=2-step=1000",
        "epoch-0.25 epoch-0.5 epoch-1",
        "step_500 step_1e3 step_1.5k step_1M",
        "step_500 step_1_000 step_1_500",
        "seed_1_500 seed_1_1000",
        "step_500/model step_1000/model",
        "a/checkpoint-9.safetensors b/checkpoint-10.safetensors",
        "iter_0000900 iter_0001000",
    ],
)
def test_numbers_in_names_are_an_order_however_they_are_written(names):
    paths = [Path(name) for name in names.split()]
    assert merging._in_order(paths[::-1]) == (paths, "by number")
    assert merging._in_order(sorted(paths)) == (paths, "by number")


@pytest.mark.parametrize("names", ["b a", "base step-500 step-1000 last", "a-2 b-2 c-3"])
def test_other_names_stay_in_the_order_given(names):
    paths = [Path(name) for name in names.split()]
    assert merging._in_order(paths) == (paths, "as given")


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (
            "step-1000 step-500 last",
            "step-500 comes after step-1000, but its number is smaller; gi",
        ),
        ("b-2 a-2 c-1", "c-1 comes after a-2, but its number is smaller; give them from first to"),
        ("epoch1-step9 epoch2-step5", "the numbers in epoch1-step9 and epoch2-step5 leave their o"),
        ("epoch2-step5 epoch1-step9", "the numbers in epoch2-step5 and epoch1-step9 leave their o"),
    ],
)
def test_numbers_that_fall_are_refused(names, says):
    with pytest.raises(InputError, match=f"^checkpoints: {says}"):
        merging._in_order([Path(name) for name in names.split()])


def test_all_dtypes_and_shapes(tmp_path):
    """Wide sums, one rounding; counters are the last checkpoint's."""
    torch.manual_seed(1)
    paths, states = [], []
    for n in range(4):
        state = {
            "half": torch.randn(33).half(),
            "brain": torch.randn(33).bfloat16(),
            "single": torch.randn(2, 1, 3),
            "double": torch.randn(7, dtype=torch.float64),
            "scalar": torch.randn(()),
            "empty": torch.zeros(0, 4),
            "mask": torch.arange(5) > 2,
            "count": torch.tensor(n),
            "byte": torch.full((3,), 7, dtype=torch.uint8),
            "word": torch.full((3,), 7, dtype=torch.uint16),
        }
        paths.append(tmp_path / f"{n}.safetensors")
        states.append(state)
        save_file(state, paths[-1])
    average(*paths, "--out", tmp_path / "own.safetensors")
    average(*paths, "--out", tmp_path / "cast.safetensors", "--dtype", "bfloat16")
    own, cast = load_file(tmp_path / "own.safetensors"), load_file(tmp_path / "cast.safetensors")
    for name, x in states[-1].items():
        assert own[name].shape == cast[name].shape == x.shape
        assert own[name].dtype == x.dtype
        if not x.is_floating_point():
            assert torch.equal(own[name], x)
            assert torch.equal(cast[name], x)
            continue
        direct = mean(states, name)
        half_a_step = torch.finfo(x.dtype).eps / 2  # what one rounding costs at most
        tolerance = {"rtol": 1.01 * half_a_step, "atol": 0}
        if x.dtype.itemsize > 2:
            tolerance = {"rtol": 0, "atol": 8 * half_a_step}
        torch.testing.assert_close(own[name].double(), direct, **tolerance)
        assert cast[name].dtype == torch.bfloat16
        torch.testing.assert_close(cast[name].double(), direct, rtol=2**-8 * 1.01, atol=0)
    assert torch.equal(cast["brain"], own["brain"])
    with safe_open(tmp_path / "cast.safetensors", "pt") as opened:
        assert opened.metadata()["format"] == "pt"  # though the checkpoints have no metadata
        assert json.loads(opened.metadata()["paceline"])["dtype"] == "bfloat16"
    for name in ("own", "cast"):
        entries, size = header(tmp_path / f"{name}.safetensors")
        entries.pop("__metadata__")
        sizes = {"F64": 8, "I64": 8, "F32": 4, "F16": 2, "BF16": 2, "U16": 2, "BOOL": 1, "U8": 1}
        for entry in entries.values():  # as aligned as a mapped file has to be
            assert entry["data_offsets"][0] % sizes[entry["dtype"]] == 0
        assert max(entry["data_offsets"][1] for entry in entries.values()) == size
        with (tmp_path / f"{name}.safetensors").open("rb") as file:
            assert int.from_bytes(file.read(8), "little") % 8 == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_means_of_the_largest_numbers(dtype, tmp_path):
    """Differences overflow where means do not; small numbers beside them stay exact."""
    most = torch.finfo(dtype).max
    rows = [[most, -most, most, 1e-38], [-most, -most, most, 1e-38], [most, -most, 0, 1e-38]]
    for n, row in enumerate(rows):
        save_file({"x": torch.tensor(row, dtype=dtype)}, tmp_path / f"{n}.safetensors")
    average(*sorted(tmp_path.iterdir()), "--out", tmp_path / "out.safetensors")
    merged = load_file(tmp_path / "out.safetensors")["x"]
    expected = torch.tensor([most / 3, -most, most / 3 * 2, 1e-38], dtype=dtype)
    torch.testing.assert_close(merged, expected)
    assert merged[3] == expected[3]


# ---- models ------------------------------------------------------------------------------------


def test_a_run_of_a_tied_model(tmp_path, capsys):
    """Also what of a checkpoint goes with the merged weights, and what does not."""
    run = tmp_path / "run"
    models = {n: gpt2(n) for n in (200, 30, 1000)}
    for n, model in models.items():
        model.save_pretrained(run / f"checkpoint-{n}")
        (run / f"checkpoint-{n}" / "tokenizer.json").write_text(f"of {n}")
    last = run / "checkpoint-1000"
    kept = {"config.json", "generation_config.json", "tokenizer.json"}
    left = ["optimizer.pt", "optimizer.bin", "scheduler.pt", "rng_state.pth", "rng_state_0.pth"]
    left += ["trainer_state.json", "training_args.bin", "pytorch_model.bin", "scaler.pt", "latest"]
    left += ["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"]
    left += ["other.safetensors", "model.safetensors.index.json", "tf_model.h5", "zero_to_fp32.py"]
    left += ["flax_model.msgpack", "m.gguf", "m.onnx", "m.distcp", "m.pth", "m.bin.index.json"]
    left += ["optimizer", "scheduler.json", "rng_state", "pytorch_model.index"]
    for name in left:
        (last / name).write_text("{}")
    for name in ("global_step1000", "pytorch_model_fsdp_0"):
        (last / name).mkdir()
        (last / name / "shard").write_text("x")
    (run / "checkpoint-best").mkdir()
    (run / "checkpoint-5").write_text("no folder")
    out = tmp_path / "out"
    average(run, "--out", out)
    assert {path.name for path in out.iterdir()} == kept | {
        *("model.safetensors", "paceline.json", "checksums.json")
    }
    assert (out / "tokenizer.json").read_text() == "of 1000"
    facts = json.loads((out / "paceline.json").read_text())
    assert facts["checkpoints"] == [str(run / f"checkpoint-{n}") for n in (30, 200, 1000)]
    assert facts["weights"] == pytest.approx([1 / 3] * 3)
    assert header(out / "model.safetensors")[0]["__metadata__"] == {"format": "pt"}
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    states = [model.state_dict() for model in models.values()]
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, mean(states, name).float(), rtol=0, atol=1e-6)
    assert "factors" not in capsys.readouterr().out
    mode = (out / "model.safetensors").stat().st_mode
    assert mode == (out / "config.json").stat().st_mode


def test_shards_are_as_in_the_last_checkpoint(tmp_path):
    models = [gpt2(n, tie_word_embeddings=False) for n in range(3)]
    folders = [tmp_path / name for name in "abc"]
    for model, folder, size in zip(models, folders, ("1GB", "5KB", "3KB"), strict=True):
        model.save_pretrained(folder, max_shard_size=size)
    shards = {path.name for path in folders[2].glob("*.safetensors")}
    assert len(shards) > 3
    states = [model.state_dict() for model in models]
    direct = {name: mean(states, name).float() for name in states[0]}
    out = tmp_path / "out"
    average(*folders, "--out", out)
    assert {path.name for path in out.glob("*.safetensors")} == shards
    index, like = (
        json.loads((folder / "model.safetensors.index.json").read_text())
        for folder in (out, folders[2])
    )
    assert index["weight_map"] == like["weight_map"]
    assert index["metadata"]["total_size"] == like["metadata"]["total_size"]
    for shard in shards:
        names = load_file(out / shard).keys()
        assert names == {name for name, file in like["weight_map"].items() if file == shard}
    average(*folders, "--out", tmp_path / "half", "--dtype", "float16")
    index = json.loads((tmp_path / "half" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == like["metadata"]["total_size"] / 2
    average(*folders[::-1], "--out", tmp_path / "whole")
    assert not (tmp_path / "whole" / "model.safetensors.index.json").exists()
    for folder in (out, tmp_path / "whole"):
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert loaded.lm_head.weight is not loaded.transformer.wte.weight
        assert loaded.state_dict().keys() == direct.keys()
        for name, tensor in loaded.state_dict().items():
            torch.testing.assert_close(tensor, direct[name], rtol=0, atol=1e-6)


def test_of_two_shards_with_one_tensor_the_index_decides(tmp_path):
    for n in (1, 2):
        path = tmp_path / f"model-{n}"
        path.mkdir()
        save_file({"w": torch.full((2,), float(n))}, path / "a.safetensors")
        save_file({"w": torch.full((2,), 9.0), "v": torch.zeros(1)}, path / "b.safetensors")
        index = {"weight_map": {"w": "a.safetensors", "v": "b.safetensors"}}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    average(tmp_path / "model-1", tmp_path / "model-2", "--out", tmp_path / "out")
    assert load_file(tmp_path / "out" / "a.safetensors")["w"].tolist() == [1.5, 1.5]
    assert load_file(tmp_path / "out" / "b.safetensors").keys() == {"v"}


def test_bfloat16_models(tmp_path):
    models = [gpt2(n).bfloat16() for n in range(2)]
    folders = [tmp_path / name for name in "ab"]
    for model, folder in zip(models, folders, strict=True):
        model.save_pretrained(folder)
    states = [model.state_dict() for model in models]
    for dtype in (None, "float32", "float16"):
        out = tmp_path / str(dtype)
        average(*folders, "--out", out, *(["--dtype", dtype] if dtype else []))
        loaded = AutoModelForCausalLM.from_pretrained(out)  # in the dtype that config.json has
        expected = getattr(torch, dtype or "bfloat16")
        assert loaded.dtype == expected
        for name, tensor in loaded.state_dict().items():
            assert torch.equal(tensor, mean(states, name).to(expected)), name
    before, after = (json.loads((tmp_path / x / "config.json").read_text()) for x in ("b", "None"))
    assert before == after


def test_the_dtype_in_every_part_of_a_configuration(tmp_path):
    for n in range(2):
        folder = tmp_path / f"model-{n}"
        folder.mkdir()
        save_file({"x": torch.ones(2)}, folder / "model.safetensors")
        parts = {"text_config": {"dtype": "float32", "n": [1]}, "torch_dtype": None, "name": "é"}
        (folder / "config.json").write_text(json.dumps(parts))
    average(tmp_path / "model-0", tmp_path / "model-1", "--out", tmp_path / "o", "--dtype=bfloat16")
    assert json.loads((tmp_path / "o" / "config.json").read_text()) == {
        "text_config": {"dtype": "bfloat16", "n": [1]},
        "torch_dtype": "bfloat16",
        "name": "é",
    }


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters(tmp_path, capsys):
    base = gpt2(0)
    base.save_pretrained(tmp_path / "base")
    folders, states = [], []
    for n in range(2):
        torch.manual_seed(n)
        lora = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
        lora.init_lora_weights = False  # both factors random
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), lora)
        folders.append(tmp_path / f"lora-{n}")
        model.save_pretrained(folders[-1])
        states.append(model.state_dict())
    average(*folders, "--out", tmp_path / "out")
    assert "factor of the adapters is averaged" in capsys.readouterr().out
    assert (tmp_path / "out" / "adapter_config.json").exists()
    config = folders[1] / "adapter_config.json"
    kept = config.read_text()
    others = {"use_rslora": True, "alpha_pattern": {"x": 2}, "alpha": 8, "projection_prng_key": 1}
    for key, value in ({"lora_alpha": 99} | others).items():
        config.write_text(json.dumps(json.loads(kept) | {key: value}))
        capsys.readouterr()
        average(*folders, "--out", tmp_path / "scaled", status=2)
        assert re.search(rf"{key!r} is .* and {value}".replace("{", r"\{"), capsys.readouterr().err)
    config.write_text(kept)
    average(*folders, "--out", tmp_path / "half", "--dtype", "bfloat16")
    half = load_file(tmp_path / "half" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in half.values()} == {torch.bfloat16}
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(base, tmp_path / "out").state_dict()
    assert sum("lora" in name for name in loaded) == 4
    for name, tensor in loaded.items():
        torch.testing.assert_close(tensor, mean(states, name).float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["pace", "adamw"])
def test_the_folder_of_a_run(method, tmp_path, monkeypatch, capsys):
    """Its checkpoints are a folder below it, and are averages but for AdamW."""
    run = tmp_path / "run"
    for step in (5, 10):
        (run / f"checkpoints/checkpoint-{step}").mkdir(parents=True)
        state = {"x": torch.tensor([float(step)])}
        save_file(state, run / f"checkpoints/checkpoint-{step}/model.safetensors")
    (run / "recipe.yaml").write_text(f"task: sft\nmethod: {method}\n")
    average(run, "--out", tmp_path / "out")
    assert load_file(tmp_path / "out/model.safetensors")["x"] == 7.5
    said = "2 of these 2 are averages already, such as"
    assert (said in " ".join(capsys.readouterr().out.split())) == (method == "pace")
    (run / "live").mkdir()
    facts = {"rule": "ema", "weights": WEIGHTS_IN[LIVE]}
    (run / "live/paceline.json").write_text(json.dumps(facts))
    assert not merging.is_average(run / "live")
    monkeypatch.chdir(run / "checkpoints")
    assert merging.is_average(Path("checkpoint-5")) == (method == "pace")
    assert merging.is_average(tmp_path / "out")


# ---- memory, kills, full disks -----------------------------------------------------------------


PEAK = """
import sys
from pathlib import Path
from rich.console import Console
from paceline.train.merge import Merge, merge

def run(names, out):
    merge(Merge(checkpoints=tuple(map(Path, names)), out=Path(out)), Console(file=sys.stderr))

def resident(kind):  # kB
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(kind)))

run(sys.argv[1:3], "first.safetensors")  # loads what is loaded once
Path("/proc/self/clear_refs").write_text("5")  # the peak is forgotten
before = resident("VmRSS:")
run(sys.argv[3:], "out.safetensors")
print(resident("VmHWM:") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_that_of_a_few_tensors(dtype, tmp_path):
    """All that is resident: of the process's own, and of the files it has mapped."""
    for n in range(2):
        save_file({"x": torch.zeros(4)}, tmp_path / f"first-{n}.safetensors")
    state = {f"x{i}": torch.full((2**18,), i, dtype=dtype) for i in range(40)}
    for n in range(3):
        save_file(state, tmp_path / f"{n}.safetensors")
    names = ["first-0", "first-1", "0", "1", "2"]
    command = [sys.executable, "-c", PEAK, *(f"{name}.safetensors" for name in names)]
    # glibc: what is freed is no longer resident, at whatever size
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    one = 2**20  # bytes of a tensor in float32; a checkpoint has 40 of them
    # The sum and one more in float32, what of it is in the file, and 1 MB for all that is else.
    assert int(run.stdout) * 1024 < (2 + dtype.itemsize / 4 * (dtype != torch.float32)) * one + one
    assert torch.equal(load_file(tmp_path / "out.safetensors")["x7"], state["x7"])


def test_interrupted_it_leaves_nothing(tmp_path, files, monkeypatch, capsys):
    paths, _ = files
    for n in range(2):
        gpt2(n).save_pretrained(tmp_path / f"model-{n}", max_shard_size="5KB")
    folders = [tmp_path / "model-0", tmp_path / "model-1"]
    before = tree(tmp_path)
    load, calls = weighted.load_tensor, []
    out = None

    def interrupted(checkpoint, name):
        calls.append(name)
        assert not out.exists()  # all the while nothing is under the final name
        assert list(out.parent.glob(f".{out.name}.*.partial/whole"))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return load(checkpoint, name)

    monkeypatch.setattr(weighted, "load_tensor", interrupted)
    for given, name in ((folders, "out"), (paths, "out.safetensors")):
        calls.clear()
        out = tmp_path / name
        average(*given, "--out", out, status=130)
        assert tree(tmp_path) == before
    assert "interrupted" in capsys.readouterr().err


def test_a_full_disk_leaves_nothing(tmp_path, files, capsys):
    paths, _ = files
    for n in range(2):
        gpt2(n).save_pretrained(tmp_path / f"model-{n}")
    folders = [tmp_path / "model-0", tmp_path / "model-1"]
    before = tree(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for given, name, limit in ((folders, "out", 5000), (paths, "out.safetensors", 300)):
        capsys.readouterr()
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            status = main(["average", *map(str, given), "--out", str(tmp_path / name)])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert status == 2
        assert tree(tmp_path) == before
        assert capsys.readouterr().err == f"paceline: {tmp_path / name}: File too large\n"


def test_all_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    for n in range(2):
        gpt2(n).save_pretrained(tmp_path / f"model-{n}")
    out, synced = tmp_path / "out", []

    def sync(path):
        assert out.exists() == (path == tmp_path)
        synced.append(path.name)

    monkeypatch.setattr("paceline.files.sync", sync)
    average(tmp_path / "model-0", tmp_path / "model-1", "--out", out)
    names = [path.name for path in out.iterdir()]
    assert {*names, "whole", tmp_path.name} <= set(synced)


def test_a_bar_on_a_terminal(tmp_path, files):
    shown = io.StringIO()
    paths, _ = files
    options = Merge(checkpoints=tuple(paths), out=tmp_path / "out.safetensors")
    merging.merge(options, Console(file=shown, force_terminal=True, width=100))
    assert "merging" in shown.getvalue()
    assert "100%" in shown.getvalue()
    assert shown.getvalue().rindex("\x1b[?25h") > shown.getvalue().index("\x1b[?25l")  # the cursor


KILLED = """
import os, signal, sys
from pathlib import Path
from rich.console import Console
from paceline.train import merge as merging
from paceline.train import weighted
from paceline.train.folder import step_of

point, out, *paths = sys.argv[1:]
load, calls = weighted.load_tensor, []

def killed(*_):
    calls.append(0)
    if point == "renaming" or len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return load(*_)

if point == "renaming":
    Path.replace = killed
else:
    weighted.load_tensor = killed
options = merging.Merge(checkpoints=tuple(map(Path, paths)), out=Path(out))
merging.merge(options, Console())
"""


@pytest.mark.parametrize("point", ["writing", "renaming"])
def test_a_kill_leaves_nothing_that_could_be_taken_for_a_model(point, tmp_path, files):
    for n in range(2):
        gpt2(n).save_pretrained(tmp_path / f"model-{n}")
    folders = [str(tmp_path / "model-0"), str(tmp_path / "model-1")]
    for given, name in ((folders, "out"), (map(str, files[0]), "out.safetensors")):
        given, out = list(given), tmp_path / name
        run = subprocess.run([sys.executable, "-c", KILLED, point, out, *given], check=False)
        assert run.returncode == -signal.SIGKILL
        assert not out.exists()
        assert list(tmp_path.glob(f".{name}.*.partial/whole"))
        average(*given, "--out", out)
        assert not list(tmp_path.glob(".*"))
