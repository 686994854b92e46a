"""accelerate: the README's recipe on a prepared optimizer, and save_state of both weights."""

import copy
import os
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("accelerate")

from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from problems import RETURNS, advance, assert_same, problem, snapshot
from pytorch_optimizer import ScheduleFreeWrapper
from safetensors.torch import load_file
from sharding import advance as advance_on_ranks
from sharding import assert_equal, held, net, whole
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from paceline import PACE
from paceline.integrations.accelerate import attach

README = Path(__file__).parents[2] / "README.md"

OPTIMIZERS = {
    "pace": lambda params: PACE(params, lr=0.05, pullback=0.3),
    "returns": lambda params: PACE(params, lr=0.05, pullback=0.3, returns=RETURNS),
}


def prepared(kind="pace", seed=0, attached=True):
    accelerator = Accelerator(cpu=True)
    model, generator = problem(seed=seed)
    model, opt = accelerator.prepare(model, OPTIMIZERS[kind](list(model.parameters())))
    if attached:
        attach(accelerator)
    return accelerator, model, opt, generator


def watched(model, opt, generator, steps, kappa=0.5):
    """Train, and compute an average of PACE by its formula from the iterates, in float64."""
    average = [p.detach().double() for p in model.parameters()]
    for t in range(1, steps + 1):
        advance(model, opt, generator, 1)
        for a, p in zip(average, model.parameters(), strict=True):
            a += (1 + t) ** -kappa * (p.detach().double() - a)
    return [a.float() for a in average]


def close(a, b):
    return all(torch.allclose(x, y, atol=1e-6, rtol=1e-5) for x, y in zip(a, b, strict=True))


# ---- the README's recipe -------------------------------------------------------------------------


def test_the_readmes_recipe_works_on_a_prepared_optimizer():
    recipe = README.read_text().split("```python\n")[1].split("```")[0]
    [make] = [line for line in recipe.splitlines() if line.startswith("opt = ")]
    use = next(line for line in recipe.splitlines() if line.startswith("opt.eval()"))
    model, generator = problem()
    names = {"model": model, "PACE": PACE}
    exec(make, names)
    accelerator = Accelerator(cpu=True)
    model, opt = accelerator.prepare(model, names["opt"])
    attach(accelerator)
    average = watched(model, opt, generator, 4, kappa=0.7)  # its return_kappa
    live = snapshot(model, opt)
    exec(use, {"opt": opt})
    assert close(model.parameters(), average)
    assert not close(live[0], average)
    opt.train()
    assert_same(snapshot(model, opt), live)


def test_a_prepared_optimizer_has_what_is_in_it():
    _, model, opt, generator = prepared("returns")
    advance(model, opt, generator, 3)
    assert opt.returns == (*RETURNS, "average")
    assert opt.stats() == opt.optimizer.stats()
    live = snapshot(model, opt)
    opt.eval("mean")
    assert opt.swapped
    mean = snapshot(model, opt)[0]
    opt.eval()
    assert not close(snapshot(model, opt)[0], mean)
    opt.train()
    assert not opt.swapped
    assert_same(snapshot(model, opt), live)
    assert close(opt.averaged_state_dict(model, "mean").values(), mean)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        opt.nothing  # noqa: B018
    assert copy.deepcopy(opt).returns == opt.returns


# ---- save_state and load_state -------------------------------------------------------------------


# Other optimizers and dtypes, and new ones that load: tests/core/test_testing_hosts.py.
@pytest.mark.parametrize("now", ["live", "average"])
def test_whatever_is_in_the_model_a_folder_is_the_same_and_loaded(now, tmp_path):
    accelerator, model, opt, generator = prepared()
    average = watched(model, opt, generator, 4)
    live, at = snapshot(model, opt), generator.get_state()
    if now == "average":
        opt.eval()
    before = snapshot(model, opt)
    accelerator.save_state(tmp_path)
    assert_same(snapshot(model, opt), before)
    assert opt.swapped == (now == "average")
    file = load_file(tmp_path / "model.safetensors")
    assert close((file[name] for name, _ in model.named_parameters()), average)
    opt.train()
    advance(model, opt, generator, 3)
    end = snapshot(model, opt)
    if now == "average":
        opt.eval()
    accelerator.load_state(tmp_path)
    assert not opt.swapped
    assert_same(snapshot(model, opt), live)
    generator.set_state(at)
    advance(model, opt, generator, 3)
    assert_same(snapshot(model, opt), end)


def test_without_attach_a_folder_is_not_taken_for_live_weights(tmp_path):
    accelerator, model, opt, generator = prepared()
    advance(model, opt, generator, 3)
    live = snapshot(model, opt)
    accelerator.save_state(tmp_path)
    accelerator, model, opt, generator = prepared(seed=1, attached=False)
    accelerator.load_state(tmp_path)
    with pytest.raises(RuntimeError, match=r"call train\(\) first"):
        advance(model, opt, generator, 1)
    opt.train()
    assert_same(snapshot(model, opt), live)


def test_a_folder_of_before_is_loaded_too(tmp_path):
    accelerator, model, opt, generator = prepared(attached=False)
    advance(model, opt, generator, 3)
    accelerator.save_state(tmp_path)
    live = snapshot(model, opt)
    accelerator, model, opt, _ = prepared(seed=1)
    accelerator.load_state(tmp_path)
    assert_same(snapshot(model, opt), live)


def test_a_save_before_the_first_step_or_one_that_fails_leaves_the_live_weights(tmp_path):
    accelerator, model, opt, generator = prepared()
    accelerator.save_state(tmp_path / "first")
    advance(model, opt, generator, 3)
    live = snapshot(model, opt)
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        accelerator.save_state(tmp_path / "file")
    assert not opt.swapped
    assert_same(snapshot(model, opt), live)


def test_several_optimizers_and_those_that_swap_in_their_own_way(tmp_path):
    accelerator = Accelerator(cpu=True)
    (one, data), (two, _) = problem(), problem(seed=1)
    base = torch.optim.SGD(two.parameters(), lr=0.05)
    pace, free = PACE(one.parameters(), lr=0.05, pullback=0.3), ScheduleFreeWrapper(base)
    plain, _ = problem(seed=2)
    adamw = torch.optim.AdamW(plain.parameters())
    one, two, plain, *opts = accelerator.prepare(one, two, plain, pace, free, adamw)
    attach(accelerator)
    attach(accelerator)
    opts[1].train()
    for model, opt in zip((one, two, plain), opts, strict=True):
        advance(model, opt, data, 3)
    now = [[p.detach().clone() for p in model.parameters()] for model in (one, two, plain)]
    accelerator.save_state(tmp_path)
    for opt in opts[:2]:
        opt.eval()
    files = ("model", "model_1", "model_2")
    for name, model in zip(files, (one, two, plain), strict=True):
        saved = load_file(tmp_path / f"{name}.safetensors")
        assert close([saved[key] for key, _ in model.named_parameters()], model.parameters())
    accelerator.load_state(tmp_path)
    for model, before in zip((one, two, plain), now, strict=True):
        assert close(model.parameters(), before)


# ---- several processes ---------------------------------------------------------------------------


def on_ranks(engine, folder):
    """Train, save, go on; then load into a new model, and go on as far."""
    place = {"RANK": dist.get_rank(), "LOCAL_RANK": dist.get_rank(), "WORLD_SIZE": 2}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # asked for, though there is a group
    os.environ |= {name: str(x) for name, x in place.items()}
    plugin = None
    if engine == "fsdp":
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, state_dict_type="SHARDED_STATE_DICT", cpu_ram_efficient_loading=False
        )

    def made():
        PartialState._reset_state()
        AcceleratorState._reset_state()
        state = PartialState(cpu=True)
        if plugin:  # for every kind of several processes but those on CPUs
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        accelerator = Accelerator(fsdp_plugin=plugin)
        assert state.device.type == "cpu"
        model = net()
        opt = PACE(model.parameters(), lr=0.05, pullback=2.0)
        model, opt = accelerator.prepare(model, opt)
        attach(accelerator)
        return accelerator, model, opt

    accelerator, model, opt = made()
    assert accelerator.is_fsdp2 == bool(plugin)
    advance_on_ranks(model, opt, engine, 3)
    now = held(model, opt)
    accelerator.save_state(folder)
    assert_equal(held(model, opt), now)
    advance_on_ranks(model, opt, engine, 3, first=3)
    end = held(model, opt)
    accelerator, model, opt = made()
    accelerator.load_state(folder)
    assert_equal(held(model, opt), now)
    average = [whole(opt.state[p]["average"]) for p in model.parameters()]
    advance_on_ranks(model, opt, engine, 3, first=3)
    assert_equal(held(model, opt), end)
    return average


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_two_ranks_go_on_bit_for_bit(engine, ranks, tmp_path):
    average, _ = ranks(on_ranks, engine, str(tmp_path))
    if engine == "ddp":
        saved = load_file(tmp_path / "model.safetensors")
    else:
        dcp_to_torch_save(tmp_path / "pytorch_model_fsdp_0", tmp_path / "whole.pt")
        saved = torch.load(tmp_path / "whole.pt")["model"]
    names = [name for name, _ in net().named_parameters()]
    assert all(torch.equal(saved[name], x) for name, x in zip(names, average, strict=True))


# ---- refused -------------------------------------------------------------------------------------


def test_what_cannot_be_attached_is_named():
    accelerator = Accelerator(cpu=True)
    with pytest.raises(ValueError, match="call accelerator.prepare first"):
        attach(accelerator)
    model = nn.Linear(2, 2)
    accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    with pytest.raises(ValueError, match="needs an optimizer that averages"):
        attach(accelerator)
    accelerator, model, *_ = prepared(attached=False)
    with (
        mock.patch.object(Accelerator, "distributed_type", DistributedType.DEEPSPEED),
        pytest.raises(ValueError, match="does not go with DEEPSPEED"),
    ):
        attach(accelerator)
    model[0].weight._fsdp_flattened = True  # FSDP1's mark
    with pytest.raises(ValueError, match="flattened by FSDP1"):
        attach(accelerator)


def test_batchnorms_statistics_are_of_the_live_weights():
    accelerator = Accelerator(cpu=True)
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    accelerator.prepare(model, PACE(model.parameters(), pullback=0.1))
    with pytest.warns(UserWarning, match=r"running statistics \(BatchNorm1d\) stay") as warned:
        attach(accelerator)
    assert any(x.filename == __file__ for x in warned)
