"""Averages on the disk: what is written is what the optimizer keeps, and says what it is."""

import copy
import json
import resource
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from problems import RETURNS, advance, assert_same, problem, snapshot
from sharding import advance as advance_wrapped
from sharding import net, whole, wrapped
from torch import nn

pytest.importorskip("safetensors")

from safetensors import safe_open
from safetensors.torch import load_file

from paceline import PACE, Pullback
from paceline.averaging import parse
from paceline.snapshots import SNAPSHOT, averages_bytes, save_averages
from paceline.sums import find_damage

KINDS = {
    "pace": lambda params, **o: PACE(params, lr=0.05, pullback=2.0, **o),
    "bfloat16 state": lambda params, **o: PACE(
        params, lr=0.05, pullback=2.0, state_dtype=torch.bfloat16, **o
    ),
    "pullback": lambda params, **o: Pullback(torch.optim.AdamW(params, lr=0.05), 2.0, **o),
}
NAMES = ["average", "mean", "slow"]


def facts(file):
    with safe_open(file, "pt") as opened:
        return json.loads(opened.metadata()[SNAPSHOT])


def held(opt, model, name):
    """An average in float32, by the swap that users know."""
    key = f"return_{name}" if name != "average" else "average"
    found = {}
    for full, p in model.named_parameters():
        state = opt.state[p]
        found[full] = state[key] if key in state else (p.detach() + state["offset"]).float()
    return {full: x.clone() for full, x in found.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_files_are_the_averages(kind, weights, dtype, tmp_path):
    """Whatever is in the model at the moment, which stays there."""
    model, generator = problem(weights)
    opt = KINDS[kind](model.parameters(), returns=RETURNS)
    advance(model, opt, generator, 5)
    expected = {name: held(opt, model, name) for name in NAMES}
    for name in (None, "mean"):
        opt.eval(name) if name else opt.train()
        before = snapshot(model, opt)
        folder = save_averages(tmp_path / "averages", model, opt, dtype=dtype)
        assert folder == tmp_path / "averages" / "step-5"
        there = {x.name for x in folder.iterdir()}
        assert there == {"checksums.json", *(f"{name}.safetensors" for name in NAMES)}
        assert_same(snapshot(model, opt), before)
        for name, tensors in expected.items():
            found = load_file(folder / f"{name}.safetensors")
            assert found.keys() == tensors.keys()
            for key, x in found.items():
                assert x.dtype == dtype
                assert torch.equal(x, tensors[key].to(dtype))
        assert find_damage(folder) is None
    rules = {"average": "ema:kappa=0.5", **RETURNS}
    for name in NAMES:
        said = facts(folder / f"{name}.safetensors")
        run = said.pop("run")
        kind = {"rule": rules[name], "step": 5, "begun": 0}
        assert said == {"name": name, **kind, "others": {}, "tied": {}}
        assert run == facts(folder / "mean.safetensors")["run"]


def test_only_what_has_stepped_and_each_by_its_own_count(tmp_path):
    """A frozen parameter is left out; one that joined late, or stood still, says its own steps."""
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in "abcd"})
    first, late, frozen, still = (model[name].weight for name in "abcd")
    frozen.requires_grad_(False)
    opt = PACE(
        [{"params": [first, frozen, still]}, {"params": [late], "returns": "ema:kappa=0.9"}],
        lr=0.1,
        pullback=0.1,
        fused=False,
    )
    for step in range(4):
        for p in (first, late, still):
            p.grad = torch.ones(2, 2)
        if step < 1:
            late.grad = None
        if step == 2:
            still.grad = None  # its averages go on
        opt.step()
    folder = save_averages(tmp_path, model, opt)
    assert load_file(folder / "average.safetensors").keys() == {"a.weight", "b.weight", "d.weight"}
    said = facts(folder / "returned.safetensors")
    assert (said["rule"], said["step"]) == ("ema:kappa=0.5", 4)
    assert said["others"] == {"b.weight": ["ema:kappa=0.9", 3, 0]}
    assert facts(folder / "average.safetensors")["others"] == {"b.weight": ["ema:kappa=0.5", 3, 0]}


def steps(opt, params, count, taken, iterates):
    """Steps on noise, with the weights after each."""
    for _ in range(count):
        for p in params:
            p.grad = 0.1 * torch.randn(p.shape).to(p.dtype)
        opt.step()
        iterates.append([p.detach().double().clone() for p in taken])


def asks_for_more(opt):
    opt.param_groups[0]["returns"] = {"slow": "ema:kappa=0.9"}


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_an_average_that_was_added_says_when_it_began(kind, weights, tmp_path):
    """From there on it is the average of the iterates by its rule, also after a resume."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3).to(weights)
    params, iterates = list(model.parameters()), []
    opt = KINDS[kind](model.parameters())
    steps(opt, params, 7, params, iterates)
    asks_for_more(opt)
    steps(opt, params, 2, params, iterates)
    saved = copy.deepcopy(opt.state_dict())
    opt = KINDS[kind](model.parameters())
    opt.load_state_dict(saved)
    assert opt.state[params[0]]["begun_return_slow"].dtype == torch.float64  # bfloat16 has 8 bits
    steps(opt, params, 3, params, iterates)
    folder = save_averages(tmp_path, model, opt)
    said = {name: facts(folder / f"{name}.safetensors") for name in ("slow", "average")}
    assert [(x["step"], x["begun"]) for x in said.values()] == [(12, 7), (12, 0)]
    rule, average = parse("ema:kappa=0.9"), iterates[6]
    for t in range(8, 13):
        average = [
            a + float(rule.weight(t)) * (x - a)
            for a, x in zip(average, iterates[t - 1], strict=True)
        ]
    found = load_file(folder / "slow.safetensors")
    for x, name in zip(average, ("weight", "bias"), strict=True):
        torch.testing.assert_close(found[name].double(), x, rtol=0, atol=1e-6)
    # taken out and asked for again, it begins again
    opt.param_groups[0]["returns"] = None
    steps(opt, params, 1, params, iterates)
    assert "begun_return_slow" not in opt.state[params[0]]
    asks_for_more(opt)
    steps(opt, params, 1, params, iterates)
    assert facts(save_averages(tmp_path, model, opt) / "slow.safetensors")["begun"] == 13


def test_averages_that_begin_at_different_steps_of_their_parameters(tmp_path):
    """Those of a group that joins late begin with it; those of a checkpoint of AdamW do not."""
    model = nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in "ab"})
    first, late = (model[name].weight for name in "ab")
    adamw = torch.optim.AdamW([first], lr=0.1)
    steps(adamw, [first], 5, [], [])
    opt = PACE([first], lr=0.1, pullback=0.1)
    with pytest.warns(UserWarning, match="keeps no averages"):
        opt.load_state_dict(adamw.state_dict())
    steps(opt, [first], 2, [], [])
    opt.add_param_group({"params": [late]})
    steps(opt, [first, late], 4, [], [])
    said = facts(save_averages(tmp_path, model, opt) / "average.safetensors")
    assert (said["step"], said["begun"]) == (11, 5)
    assert said["others"] == {"b.weight": ["ema:kappa=0.5", 4, 0]}


def other_rule(opt, model):
    opt.param_groups[0]["returns"] = {"mean": "uniform", "slow": "ema:kappa=0.6"}


def other_rule_in_a_checkpoint(opt, model):
    saved = copy.deepcopy(opt.state_dict())
    saved["param_groups"][0]["returns"] = "mean=uniform,slow=ema:kappa=0.6"
    opt.load_state_dict(saved)


def no_history(opt, model):
    saved = copy.deepcopy(opt.state_dict())
    del saved["param_groups"][0]["history"]
    opt.load_state_dict(saved)


def no_beginning(opt, model):
    """As after torch's distributed checkpoint, into a fresh optimizer."""
    saved = copy.deepcopy(opt.state_dict())
    for state in saved["state"].values():
        del state["begun_return_slow"]
    opt.load_state_dict(saved)


def projected(opt, model):
    opt.register_projection(lambda: model.weight.clamp_(-0.01, 0.01))


@pytest.mark.parametrize(
    "change", [other_rule, other_rule_in_a_checkpoint, no_history, no_beginning, projected]
)
@pytest.mark.parametrize("kind", ["pace", "pullback"])
def test_averages_of_which_too_little_is_known_are_left_out(kind, change, tmp_path):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    params = list(model.parameters())
    opt = KINDS[kind](model.parameters(), returns={"mean": "uniform"})
    steps(opt, params, 3, [], [])
    opt.param_groups[0]["returns"] = {"mean": "uniform", "slow": "ema:kappa=0.9"}
    steps(opt, params, 2, [], [])
    change(opt, model)
    steps(opt, params, 2, [], [])
    if change in (no_history, projected):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with pytest.raises(ValueError, match="averages of .*, of one rule each, .* got none"):
                save_averages(tmp_path, model, opt)
        assert len(caught) == 3
        return
    with pytest.warns(UserWarning, match="'slow' is left out of the snapshot: it has not had"):
        folder = save_averages(tmp_path, model, opt)
    assert not (folder / "slow.safetensors").exists()
    assert facts(folder / "average.safetensors")["begun"] == 0


def test_a_projection_that_changes_no_average_leaves_them_known(tmp_path):
    model, generator = problem()
    opt = PACE(model.parameters(), lr=0.1, pullback=0.1)
    advance(model, opt, generator, 2)
    opt.register_projection(lambda: model[0].weight.clamp_(-1e6, 1e6))
    advance(model, opt, generator, 2)
    assert save_averages(tmp_path, model, opt).name == "step-4"


@pytest.mark.parametrize("text", ["{", "[1]", '{"average": 3}', '{"average": [1, 2]}', 7])
def test_a_history_that_is_none_is_refused(text):
    model, generator = problem()
    opt = PACE(model.parameters(), lr=0.1, pullback=0.1)
    advance(model, opt, generator, 1)
    saved = opt.state_dict()
    saved["param_groups"][0]["history"] = text
    with pytest.raises(ValueError, match="history must be as a state_dict"):
        opt.load_state_dict(saved)


def test_averages_that_cannot_be_rebuilt_from_are_left_out(tmp_path):
    model, generator = problem()
    opt = PACE(
        model.parameters(), lr=0.1, pullback=0.1, returns={"last": "lawa:window=2", "a": "uniform"}
    )
    advance(model, opt, generator, 2)
    folder = save_averages(tmp_path, model, opt)
    assert sorted(x.stem for x in folder.glob("*.safetensors")) == ["a", "average"]
    only = PACE(model.parameters(), lr=0.1, pullback=0.1, averaging="bema")
    advance(model, only, generator, 1)
    with pytest.raises(ValueError, match="of one rule each, other than LAWA and BEMA, got none"):
        save_averages(tmp_path, model, only)


def test_names_are_those_of_the_model_unwrapped(tmp_path):
    model, generator = problem()
    outer = torch.compile(model, backend="eager")
    opt = PACE(outer.parameters(), lr=0.1, pullback=0.1)
    advance(model, opt, generator, 1)
    folder = save_averages(tmp_path, outer, SimpleNamespace(optimizer=opt))
    assert load_file(folder / "average.safetensors").keys() == dict(model.named_parameters()).keys()


def test_one_run_has_one_word(tmp_path):
    model, generator = problem()
    opt = PACE(model.parameters(), lr=0.1, pullback=0.1)
    words = []
    for folder, steps in (("a", 3), ("a", 4), ("a", 2), ("b", 1)):
        advance(model, opt, generator, steps)
        words.append(facts(save_averages(tmp_path / folder, model, opt) / "average.safetensors"))
    assert [x["step"] for x in words] == [3, 7, 9, 10]
    runs = [x["run"] for x in words]
    assert runs[0] == runs[1] == runs[2] != runs[3]
    # once more, as after a resume
    save_averages(tmp_path / "b", model, opt)
    assert len(list((tmp_path / "b").iterdir())) == 1


def test_another_run_in_the_folder_is_told_of(tmp_path):
    model, generator = problem()
    for steps in (5, 3):
        opt = PACE(model.parameters(), lr=0.1, pullback=0.1)
        advance(model, opt, generator, steps)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            save_averages(tmp_path, model, opt)
    assert "step-5 is of a later step than 3: if it is of another run" in str(caught[0].message)
    assert caught[0].filename == __file__
    runs = {facts(tmp_path / f"step-{n}" / "average.safetensors")["run"] for n in (3, 5)}
    assert len(runs) == 2


def test_a_full_disk_leaves_what_was_there(tmp_path):
    model, generator = problem()
    opt = PACE(model.parameters(), lr=0.1, pullback=0.1)
    advance(model, opt, generator, 1)
    folder = save_averages(tmp_path, model, opt)
    before = {x: x.read_bytes() for x in folder.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_averages(tmp_path, model, opt, dtype=torch.bfloat16)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {x: x.read_bytes() for x in folder.iterdir()} == before
    assert list(tmp_path.iterdir()) == [folder]


def test_bad_input(tmp_path):
    model, generator = problem()
    opt = PACE(model.parameters(), lr=0.1, pullback=0.1)
    for call, message in (
        (lambda: save_averages(tmp_path, model, opt), "must keep averages of this model's param"),
        (lambda: save_averages(tmp_path, nn.Linear(2, 2), opt), "must keep averages of this model"),
        (
            lambda: save_averages(tmp_path, model, opt, dtype=torch.float16),
            "dtype must be torch.float32 or torch.bfloat16, got torch.float16",
        ),
        (
            lambda: save_averages(tmp_path, model, torch.optim.SGD(model.parameters())),
            "optimizer must be PACE or Pullback, got SGD",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
        advance(model, opt, generator, 1)
    assert not list(tmp_path.iterdir())


def test_the_bytes_are_said_before(tmp_path):
    """Of the elements, without headers."""
    model, generator = problem()
    model[0].bias.requires_grad_(False)
    opt = PACE(model.parameters(), lr=0.1, pullback=0.1, returns=RETURNS)
    said = {dtype: averages_bytes(opt, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    advance(model, opt, generator, 1)
    for dtype, number in said.items():
        folder = save_averages(tmp_path, model, opt, dtype=dtype)
        files = [load_file(folder / f"{name}.safetensors") for name in NAMES]
        assert number == sum(x.nbytes for tensors in files for x in tensors.values())


WITHOUT = """
import sys
sys.modules["numpy"] = sys.modules["safetensors"] = None
import torch
from paceline import PACE
from paceline.snapshots import save_averages
model = torch.nn.Linear(3, 2)
opt = PACE(model.parameters(), lr=0.1, pullback=0.1, fused=False)
model(torch.ones(1, 3)).sum().backward()
opt.step()
save_averages(sys.argv[1], model, opt)
"""


def test_it_needs_torch_alone(tmp_path):
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", WITHOUT, tmp_path], check=False)
    assert run.returncode == 0
    assert load_file(tmp_path / "step-1" / "average.safetensors")["weight"].shape == (2, 3)


# ---- several ranks ----------------------------------------------------------------------------


def save(engine, folder):
    model = wrapped(net(), engine)
    opt = PACE(model.parameters(), lr=0.05, pullback=2.0, returns=RETURNS)
    advance_wrapped(model, opt, engine, 3)
    path = save_averages(folder, model, opt)
    if engine:
        dist.barrier()
    slow = {n: whole(opt.state[p]["return_slow"]) for n, p in model.named_parameters()}
    return path, sorted(x.name for x in path.iterdir()), slow


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_rank_0_writes_whole_tensors(engine, ranks, tmp_path):
    found = ranks(save, engine, tmp_path)
    assert found[0][:2] == found[1][:2]
    tensors = load_file(found[0][0] / "slow.safetensors")
    for name, x in found[0][2].items():
        assert torch.equal(tensors[name.removeprefix("module.")], x)
