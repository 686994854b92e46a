"""`paceline average` from snapshots of averages: the average of a rule that was not kept."""

import json
import re
import shutil

import pytest
import torch

pytest.importorskip("transformers")

from merged import average, tree
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from paceline import PACE, snapshot_steps
from paceline.averaging import parse
from paceline.cli import main
from paceline.snapshots import SNAPSHOT, save_averages
from paceline.sums import find_damage
from paceline.train import rebuild
from paceline.train.rebuild import read_snapshots, rounding_noise, snapshot_files
from paceline.train.weighted import read_headers, weighted_sum

STEPS = 200
TIMES = snapshot_steps(STEPS, 8)


def train(model, folder, dtype=torch.float32, lr=1e-2, steps=STEPS, times=TIMES, **options):
    """Steps on noise, with snapshots; the iterates of what is trained."""
    torch.manual_seed(0)
    params = [p for p in model.parameters() if p.requires_grad]
    options = {"kappa": 0.5, "returns": {"slow": "ema:kappa=0.9"}} | options
    opt = PACE(params, lr=lr, pullback=0.1, fused=False, **options)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    iterates = [{name: p.detach().double().clone() for name, p in named.items()}]
    for step in range(1, steps + 1):
        for p in params:
            p.grad = 0.1 * p.detach() + 0.1 * torch.randn(p.shape)
        opt.step()
        iterates.append({name: p.detach().double().clone() for name, p in named.items()})
        if step in times:
            save_averages(folder / "averages", model, opt, dtype=dtype)
    return iterates, opt


def direct(iterates, rule):
    """The average of the iterates, by its coefficients."""
    shares = parse(rule).coefficients(len(iterates) - 1)
    return {
        name: torch.einsum("t,t...->...", shares, torch.stack([x[name] for x in iterates]))
        for name in iterates[0]
    }


def off(found, iterates, rule):
    """The error as a share of the average's distance from the live weights."""
    wanted = direct(iterates, rule)
    missed = sum(float((found[n].double() - x).square().sum()) for n, x in wanted.items())
    far = sum(float((iterates[-1][n] - x).square().sum()) for n, x in wanted.items())
    return (missed / far) ** 0.5


def small():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 9))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a small net, whose snapshots are float32, and its iterates."""
    folder = tmp_path_factory.mktemp("run")
    iterates, _ = train(small(), folder)
    return folder, iterates


# ---- the average -------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["folder", "steps", "files"])
@pytest.mark.parametrize("rule", ["ema:kappa=0.7", "ema:half_life=30", "uniform:start=50"])
def test_any_rule_in_a_file(rule, given, run, tmp_path, capsys):
    folder, iterates = run
    paths = {
        "folder": [folder / "averages"],
        "steps": sorted((folder / "averages").iterdir()),
        "files": sorted((folder / "averages").glob("*/*.safetensors")),
    }[given]
    out = tmp_path / "out.safetensors"
    average(*paths, "--rule", rule, "--out", out)
    said = " ".join(capsys.readouterr().out.split())
    expected = float(re.search(r"Expected error: ([\d.]+)%", said)[1]) / 100
    assert 0 < expected < 0.05
    found = load_file(out)
    assert {x.dtype for x in found.values()} == {torch.float32}
    assert off(found, iterates, rule) < 1.25 * expected
    with safe_open(out, "pt") as opened:
        metadata = opened.metadata()
    assert SNAPSHOT not in metadata
    facts = json.loads(metadata["paceline"])
    assert (facts["rule"], facts["rebuilt_at_step"]) == (rule, STEPS)
    assert len(facts["weights"]) == len(facts["snapshots"]) == 2 * len(TIMES)
    assert facts["expected_error"] == pytest.approx(expected, abs=1e-4)


def test_what_was_kept_is_as_it_was(run, tmp_path):
    folder, _ = run
    average(folder / "averages", "--rule", "ema:kappa=0.9", "--out", tmp_path / "o.safetensors")
    kept = load_file(folder / "averages" / f"step-{STEPS}" / "slow.safetensors")
    for name, x in load_file(tmp_path / "o.safetensors").items():
        assert torch.equal(x, kept[name])


@pytest.mark.parametrize("lr", [1e-2, 1e-3])
def test_bfloat16_snapshots(lr, tmp_path, monkeypatch, capsys):
    """Their rounding is measured, and keeps weights small; at a low rate it costs the most."""
    model = small()
    iterates, _ = train(model, tmp_path, torch.bfloat16, lr)
    errors = []
    for name, noise in (("measured", rounding_noise), ("none", lambda _: 1e-4)):
        monkeypatch.setattr(rebuild, "rounding_noise", noise)
        out = tmp_path / f"{name}.safetensors"
        arguments = [tmp_path / "averages", "--rule", "ema:kappa=0.8", "--out", out]
        average(*arguments)
        said = " ".join(capsys.readouterr().out.split())
        expected = float(re.search(r"Expected error: ([\d.]+)%", said)[1]) / 100
        errors.append(off(load_file(out), iterates, "ema:kappa=0.8"))
        if name == "measured":
            assert errors[0] < 1.5 * expected
    assert errors[0] < errors[1]


def test_bfloat16_snapshots_of_weights_that_hardly_move(tmp_path, capsys):
    """At a rate at which their rounding is larger than what is between them it is refused."""
    train(small(), tmp_path, torch.bfloat16, lr=1e-4)
    out = tmp_path / "out.safetensors"
    average(tmp_path / "averages", "--rule", "ema:kappa=0.8", "--out", out, status=2)
    assert (
        "cannot be rebuilt from these snapshots: the expected error is" in capsys.readouterr().err
    )
    assert not out.exists()


def test_the_noise_is_the_rounding_in_steps(tmp_path):
    """Of float32, it is a small share of a step; bfloat16's is 2^16 times that."""
    noises = []
    for dtype in (torch.float32, torch.bfloat16):
        train(small(), tmp_path / str(dtype), dtype, steps=30, times=[20, 30])
        files = snapshot_files([tmp_path / str(dtype) / "averages"])
        noises.append(rounding_noise(read_snapshots(files)))
    assert 1e-7 < noises[0] < 1e-5
    assert noises[1] / noises[0] == pytest.approx(2**16, rel=0.02)
    assert rounding_noise(read_snapshots(files[:1])) == 1e-4


def test_tensors_of_different_steps(tmp_path):
    """Each by its own count, one that joined late among them."""
    model = small()
    torch.manual_seed(0)
    opt = PACE(
        model.parameters(), lr=1e-2, pullback=0.1, fused=False, returns={"slow": "ema:kappa=0.9"}
    )
    late, iterates = model[1].weight, []
    for step in range(1, 121):
        for p in model.parameters():
            p.grad = 0.1 * torch.randn(p.shape)
        if step <= 20:
            late.grad = None
        if step == 21:
            iterates.append({"1.weight": late.detach().double().clone()})
        opt.step()
        if step > 20:
            iterates.append({"1.weight": late.detach().double().clone()})
        if step in (60, 90, 110, 120):
            save_averages(tmp_path / "averages", model, opt)
    out = tmp_path / "out.safetensors"
    average(tmp_path / "averages", "--rule", "ema:kappa=0.8", "--out", out)
    assert len(iterates) == 101
    assert off(load_file(out), iterates, "ema:kappa=0.8") < 0.03


def test_an_average_that_was_asked_for_later(tmp_path):
    """It began with the weights of that step, and the files say so."""
    torch.manual_seed(0)
    model = small()
    opt = PACE(model.parameters(), lr=1e-2, pullback=0.1, kappa=0.3, fused=False)
    named = dict(model.named_parameters())
    iterates = [{name: p.detach().double().clone() for name, p in named.items()}]
    for step in range(1, 151):
        for p in model.parameters():
            p.grad = 0.1 * p.detach() + 0.1 * torch.randn(p.shape)
        if step == 71:
            opt.param_groups[0]["returns"] = {"slow": "ema:kappa=0.9"}
        opt.step()
        iterates.append({name: p.detach().double().clone() for name, p in named.items()})
        if step in (20, 40, 60, 70, 80, 95, 110, 130, 140, 146, 149, 150):
            save_averages(tmp_path / "averages", model, opt)
    out = tmp_path / "out.safetensors"
    average(tmp_path / "averages", "--rule", "ema:kappa=0.8", "--out", out)
    assert off(load_file(out), iterates, "ema:kappa=0.8") < 0.03
    for file in (tmp_path / "averages").glob("*/slow.safetensors"):
        rewritten(file, begun=0)
    wrong = tmp_path / "wrong.safetensors"
    average(tmp_path / "averages", "--rule", "ema:kappa=0.8", "--out", wrong)
    assert off(load_file(wrong), iterates, "ema:kappa=0.8") > 0.05


def test_weights_whose_sum_is_0_on_the_way(tmp_path):
    """Negative ones count last, so that nothing is divided by it."""
    found = []
    for n, x in enumerate((3.0, 5.0, 7.0)):
        save_file({"x": torch.tensor([x])}, tmp_path / f"{n}.safetensors")
        found.append(read_headers(tmp_path / f"{n}.safetensors"))
    assert weighted_sum("x", found, [1.0, 1.0, -1.0], torch.float32).item() == 1.0
    assert weighted_sum("x", found, [-1.0, 1.0, 1.0], torch.float32).item() == 9.0


def test_a_mean_of_one_is_that_one_bit_for_bit(tmp_path):
    """Also where that is a zero with a sign."""
    save_file({"x": torch.tensor([-0.0, 0.0, 1e-45])}, tmp_path / "one.safetensors")
    one = read_headers(tmp_path / "one.safetensors")
    found = weighted_sum("x", [one, one], [1.0, 0.0], torch.float32)
    assert found.view(torch.int32).tolist() == [-(2**31), 0, 1]


# ---- models ------------------------------------------------------------------------------------


def gpt2():
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "n_positions": 16, "n_embd": 8, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def test_a_model_of_a_run(tmp_path):
    """Its model/ gives names, dtypes, the configuration, and what was not trained."""
    model = gpt2()
    model.transformer.wpe.weight.requires_grad_(False)
    iterates, _ = train(model, tmp_path)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model", max_shard_size="5KB")
    out = tmp_path / "out"
    assert read_snapshots(snapshot_files([tmp_path / "averages"]))[0].tied == {
        "lm_head.weight": "transformer.wte.weight"
    }
    average(tmp_path / "averages", "--rule", "ema:kappa=0.7", "--out", out)
    found = AutoModelForCausalLM.from_pretrained(out)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found.transformer.wpe.weight, model.transformer.wpe.weight)
    assert found.lm_head.weight is found.transformer.wte.weight
    for name, x in direct(iterates, "ema:kappa=0.7").items():
        torch.testing.assert_close(
            found.get_parameter(name).double(), x, rtol=2**-7, atol=1e-3, msg=name
        )
    assert find_damage(out) is None
    assert json.loads((out / "paceline.json").read_text())["rule"] == "ema:kappa=0.7"
    average(
        *(tmp_path / "averages", "--model", tmp_path / "model", "--dtype", "float32"),
        *("--rule", "ema:kappa=0.7", "--out", tmp_path / "wide"),
    )
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "wide").dtype == torch.float32


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters(tmp_path):
    lora = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    model = get_peft_model(gpt2(), lora)
    iterates, _ = train(model, tmp_path)
    kept = load_file(tmp_path / "averages" / f"step-{STEPS}" / "slow.safetensors")
    assert all("lora_" in name for name in kept)
    model.save_pretrained(tmp_path / "model")
    average(tmp_path / "averages", "--rule", "ema:kappa=0.7", "--out", tmp_path / "out")
    found = PeftModel.from_pretrained(gpt2(), tmp_path / "out")
    for name, x in direct(iterates, "ema:kappa=0.7").items():
        torch.testing.assert_close(found.get_parameter(name).double(), x, rtol=0, atol=1e-3)


# ---- refusals ----------------------------------------------------------------------------------


def rewritten(file, **changes):
    """The file with other metadata; None leaves one out."""
    with safe_open(file, "pt") as opened:
        facts = json.loads(opened.metadata()[SNAPSHOT])
    facts = {k: x for k, x in (facts | changes).items() if x is not None}
    save_file(load_file(file), file, {"format": "pt", SNAPSHOT: json.dumps(facts)})
    (file.parent / "checksums.json").unlink(missing_ok=True)


@pytest.fixture
def place(run, tmp_path, monkeypatch):
    """Snapshots A, and B of another run; iterates."""
    monkeypatch.chdir(tmp_path)
    for name in "AB":
        for step in (TIMES[-1], TIMES[-2]):
            shutil.copytree(run[0] / "averages" / f"step-{step}", f"{name}/step-{step}")
    for file in tmp_path.glob("B/*/*.safetensors"):
        rewritten(file, run="other")
    for name in ("one", "two"):
        save_file({"x": torch.zeros(2)}, f"{name}.safetensors")
    return tmp_path


LAST = f"step-{STEPS}"


def spoil(place, how):
    file = place / "A" / LAST / "slow.safetensors"
    if how == "twice":
        rewritten(file, name="again")
        shutil.copytree(file.parent, place / "A" / "step-7")
        (place / "A" / "step-7" / "average.safetensors").unlink()
    elif how == "shape":
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        save_file(load_file(file) | {"0.bias": torch.zeros(3)}, file, metadata)
        (file.parent / "checksums.json").unlink()
    elif how == "foreign":
        save_file(load_file(file), file, {"format": "pt"})
    elif how == "bit":
        data = file.read_bytes()
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif how == "model":
        (place / "GPT").mkdir()
        save_file({"0.weight": torch.zeros(2)}, place / "GPT" / "model.safetensors")
    elif how == "run":
        (place / "RUN").mkdir()
        (place / "RUN" / "recipe.yaml").touch()
    else:
        rewritten(file, **how)


@pytest.mark.parametrize(
    ("how", "arguments", "message"),
    [
        (None, "A B", r"A/.*safetensors is of the run \w+ and B/.* of other; give snapshots of on"),
        (None, "A one.safetensors", r"average\.safetensors is an average at a step, and one\.saf"),
        (None, "one.safetensors A", r"is an average at a step, and one\.safetensors is not"),
        ("twice", "A", r"are both ema:kappa=0.9 at step 200; leave one out"),
        ("shape", "A", r"tensor '0.bias' is of shape \(30,\) in .* and of shape \(3,\) in A"),
        ("foreign", "A", rf"is an average at a step, and A/{LAST}/slow.safetensors is not"),
        ("bit", "A", rf"A/{LAST}/slow.safetensors is damaged"),
        ({"rule": "median"}, "A", r"slow.safetensors does not say which average it is: ValueErr"),
        ({"rule": "lawa:window=2"}, "A", r"does not say which average it is: .*keeps more tensors"),
        ({"step": -1}, "A", r"does not say which average it is: .*whole number"),
        ({"begun": None}, "A", r"does not say which average it is: KeyError: 'begun'"),
        ({"begun": 201}, "A", r"does not say which average it is: .*begun=201"),
        ({"step": None}, "A", r"does not say which average it is: KeyError: 'step'"),
        ({"others": [3]}, "A", r"does not say which average it is: AttributeError"),
        ({"others": {"x": 3}}, "A", r"does not say which average it is: TypeError"),
        ({"others": {"x": ["ema", 3]}}, "A", r"does not say which average it is: ValueError"),
        (
            None,
            "A --rule ema:kappa=0.3",
            r"^rule: ema:kappa=0.3 at step 200 cannot be rebuilt .* n",
        ),
        (None, "A --rule bema", r"^rule: bema:kappa=0.5 keeps more tensors than its average"),
        (None, "A --rule mean", r"^rule: unknown average 'mean'"),
        (None, "A --out OUT", r"^model: give the folder of the model that the snapshots are of, o"),
        (
            "model",
            "A --out OUT --model GPT",
            r"tensor '0.bias' of the snapshots, .* is missing in GPT",
        ),
        ("run", "A --out OUT --model RUN", r"^model: RUN is not finished; .* --resume RUN goes on"),
        (None, "A --model one.safetensors", r"^model: leave it out where the average is written t"),
        (None, "one.safetensors two.safetensors --model A", r"^model: it is for averages at a ste"),
        (None, "A --out one.safetensors", r"^out: one.safetensors exists; name another"),
    ],
    ids=lambda x: None if isinstance(x, str) and " " in x else str(x)[:20],
)
def test_bad_input_is_one_line_and_nothing_is_written(how, arguments, message, place, capsys):
    if how:
        spoil(place, how)
    given = arguments.split()
    given += [] if "--rule" in given else ["--rule", "ema:kappa=0.85"]
    given += [] if "--out" in given else ["--out", "out.safetensors"]
    before = tree(place)
    assert main(["average", *given]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert re.search(message, said.removeprefix("paceline: ")), said
    assert tree(place) == before
