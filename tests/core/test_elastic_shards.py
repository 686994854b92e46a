"""Elastic across workers of two ranks each, which hold their model by DDP or FSDP2."""

import pytest
import torch
import torch.distributed as dist
from sharding import net, whole
from torch import optim
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from paceline import PACE, Elastic

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")

OPTIMIZERS = {
    "PACE": (lambda p: PACE(p, lr=0.05, pullback=2.0, nonfinite="skip"), {"exchange": "average"}),
    "AdamW": (lambda p: optim.AdamW(p, lr=0.05), {"exchange": "diloco"}),
}


def made(engine, name):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("across", "inside"))
    model = net()
    if engine == "ddp":
        model = DistributedDataParallel(model, process_group=mesh["inside"].get_group())
    if engine == "fsdp":
        for layer in (model[0], model[3]):
            fully_shard(layer, mesh=mesh["inside"])
        fully_shard(model, mesh=mesh["inside"])
    base, options = OPTIMIZERS[name]
    opt = Elastic(base(model.parameters()), every=2, process_group=mesh["across"], **options)
    return mesh, model, opt


def advance(mesh, model, opt, engine, steps, first=0, faulty=None):
    """Steps on the batches of each worker, of which a rank of it has a half."""
    worker, part = mesh.get_local_rank("across"), mesh.get_local_rank("inside")
    for step in range(first, first + steps):
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(100 + 50 * worker + step))
        x = x.view(2, 8, 6)[part] if engine else x
        (model(x) - x[:, :1]).square().mean().backward()
        if step == faulty and worker == 1 and (part == 1 or engine != "fsdp"):
            grad = next(model.parameters()).grad
            (grad.to_local() if engine == "fsdp" else grad)[-1, 3] = float("nan")
        opt.step()
        opt.zero_grad()


def held(model, opt):
    params = list(model.parameters())
    return [whole(p) for p in params] + [whole(opt.state[p]["average"]) for p in params]


def run(engine, name):
    """What is held after each step; worker 1 skips the fourth for a NaN, on one rank of FSDP2."""
    mesh, model, opt = made(engine, name)
    moments = []
    for step in range(7):
        advance(mesh, model, opt, engine, 1, first=step, faulty=3)
        moments.append(held(model, opt))
    with opt.averaged():
        moments.append([whole(p) for p in model.parameters()])
    return moments, opt.stats()["skipped_steps"]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_workers_of_two_ranks_go_where_workers_of_one_go(engine, name, four):
    alone = four(run, None, name)
    for rank, (mine, skips) in enumerate(four(run, engine, name)):
        want, want_skips = alone[rank]
        assert skips == want_skips == rank // 2
        for a, b in zip(mine, want, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
    first, second = alone[0][0], alone[2][0]
    assert not torch.equal(first[0][0], second[0][0])  # the workers differ


def resumed(name, stop):
    """What is held after a resume by torch's distributed checkpoint, and without one."""
    mesh, model, opt = made("fsdp", name)
    advance(mesh, model, opt, "fsdp", stop)
    weights, state = get_model_state_dict(model), get_optimizer_state_dict(model, opt)
    weights = {key: x.clone() for key, x in weights.items()}
    state["state"] = {
        key: {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in own.items()}
        for key, own in state["state"].items()
    }
    advance(mesh, model, opt, "fsdp", 3, first=stop)
    again_mesh, again, other = made("fsdp", name)
    set_model_state_dict(again, weights)
    set_optimizer_state_dict(again, other, state)
    advance(again_mesh, again, other, "fsdp", 3, first=stop)
    return held(model, opt), held(again, other)


@pytest.mark.parametrize("stop", [1, 3])  # before the first exchange, and after it
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_sharded_worker_resumes_by_torchs_distributed_checkpoint(name, stop, four):
    for a, b in four(resumed, name, stop):
        assert all(map(torch.equal, a, b))


def fault_in_a_shard(what):
    """What is said where one rank of one worker holds what the others cannot go on with."""
    mesh, model, opt = made("fsdp", "AdamW")
    advance(mesh, model, opt, "fsdp", 2)
    if dist.get_rank() == 3:
        p = next(model.parameters())
        with torch.no_grad():
            shard = (opt.state[p]["average"] if what == "center" else p).to_local()
            shard[0, 0] = 5.0 if what == "center" else float("inf")
    try:
        advance(mesh, model, opt, "fsdp", 2, first=2)
    except (FloatingPointError, RuntimeError) as error:
        return str(error)


def test_a_fault_in_a_shard_ends_all_ranks_of_all_workers(four):
    for said in four(fault_in_a_shard, "weights"):
        assert said == (
            "parameter 0 of group 0 of shape (5, 6) is not finite on a worker at step 4; nothing "
            "was exchanged"
        )
    for said in four(fault_in_a_shard, "center"):
        assert said.startswith("workers must have the same center: ")
        assert said.endswith("; nothing was changed")


def unscaled(engine):
    """The weights at the end, and skipped steps, where a GradScaler skips a step of worker 1."""
    mesh, model, opt = made(engine, "AdamW")
    worker, part = mesh.get_local_rank("across"), mesh.get_local_rank("inside")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for step in range(4):
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(50 * worker + step))
        x = x.view(2, 8, 6)[part] if engine else x
        scaler.scale((model(x) - x[:, :1]).square().mean()).backward()
        if (step, worker) == (1, 1) and (part == 1 or engine != "fsdp"):
            grad = next(model.parameters()).grad
            (grad.to_local() if engine == "fsdp" else grad)[0, 0] = float("inf")
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
    return [whole(p) for p in model.parameters()], opt.stats()["skipped_steps"]


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_a_grad_scaler_skips_a_step_of_all_ranks_of_a_worker(engine, four):
    alone = four(unscaled, None)
    for rank, (mine, skips) in enumerate(four(unscaled, engine)):
        want, want_skips = alone[rank]
        assert skips == want_skips == rank // 2
        torch.testing.assert_close(mine, want, atol=1e-6, rtol=1e-6)
