"""A net under DDP or FSDP2, and its training, for tests on two ranks."""

import contextlib

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from problems import RETURNS
from torch import nn, optim
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from paceline import PACE, Pullback
from paceline.testing.hosts import Driven, check_host


def net(dtype=torch.float32):
    """Of 5 rows 2 ranks hold 3 and 2, and 4 ranks 2, 2, 1 and none; of 1 row all but one none."""
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 1))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return model.to(dtype)


def wrapped(model, engine):
    """A net on all ranks by DDP, FSDP2, HSDP, or FSDP2 over tensor parallelism ("tp")."""
    if not engine:
        return model
    if engine == "ddp":
        return DistributedDataParallel(model)
    count = dist.get_world_size()
    if engine == "fsdp":
        mesh = init_device_mesh("cpu", (count,))
    else:
        mesh = init_device_mesh("cpu", (2, count // 2), mesh_dim_names=("data", "tensor"))
    if engine == "tp":
        first, last = ColwiseParallel(output_layouts=Replicate()), RowwiseParallel()
        last.input_layouts = (Replicate(),)
        parallelize_module(model, mesh["tensor"], {"0": first, "3": last})
        mesh = mesh["data"]
    for layer in (model[0], model[3]):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(x):
    x = x.detach()
    return (x.full_tensor() if isinstance(x, DTensor) else x).clone()


def held(model, opt):
    """All that a run holds, gathered: parameters and their state, in order."""
    state = [{key: whole(value) for key, value in opt.state[p].items()} for p in model.parameters()]
    return [whole(p) for p in model.parameters()], state


def advance(model, opt, engine, steps, *, first=0, parts=1, clip=None):
    """Steps on the same global batches whatever the engine: a part of each for each rank.

    Ranks that hold one model by tensor parallelism have the same part.
    """
    world = dist.get_world_size() if engine else 1
    shares = 2 if engine == "tp" else world
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(100 + step)
        x = torch.randn(24, 6, generator=generator).to(next(model.parameters()).dtype)
        if engine:
            x = x.chunk(shares)[dist.get_rank() * shares // world]
        for i, part in enumerate(x.chunk(parts)):
            later = engine == "ddp" and i < parts - 1
            with model.no_sync() if later else contextlib.nullcontext():
                loss = (model(part) - part[:, :1]).square().mean() / parts
                loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        opt.step()
        opt.zero_grad()


def assert_close(a, b, atol=1e-6, rtol=1e-6):
    for x, y in zip(a[0], b[0], strict=True):
        torch.testing.assert_close(x, y, atol=atol, rtol=rtol)
    for s, t in zip(a[1], b[1], strict=True):
        assert s.keys() == t.keys()
        for key in s:
            torch.testing.assert_close(s[key], t[key], atol=atol, rtol=rtol)


def assert_equal(a, b):
    assert_close(a, b, 0.0, 0.0)


BASES = {
    "AdamW": lambda params: optim.AdamW(params, lr=0.05),
    "SGD": lambda params: optim.SGD(params, lr=0.05, momentum=0.9),
}

AROUND = {
    "no pull": {},
    "adam": {"pullback": 2.0},
    "own": {"pullback": 2.0, "gain": "own", "averaging": "bema:start=1"},
    "scalar": {"pullback": 0.3, "gain": "scalar", "averaging": "lawa:window=2"},
    "measured": {"pullback": 2.0, "track_stats": True},
    "returns": {"pullback": 2.0, "returns": RETURNS},
}


def pullback(model, base, around):
    return Pullback(BASES[base](model.parameters()), **AROUND[around])


KIT = {
    "pace": lambda params: PACE(params, lr=0.05, pullback=0.3),
    "returns": lambda params: PACE(params, lr=0.05, pullback=0.3, returns=RETURNS),
    "pullback": lambda params: Pullback(BASES["SGD"](params), pullback=0.1),
}


def pass_the_kit(engine, kind):
    """A loop of one's own on two ranks, which halve each batch, with torch's own checkpoints."""

    def drive(task, folder, stop, resume):
        shared = [str(folder)]
        dist.broadcast_object_list(shared)  # rank 0's, for both
        [place] = shared
        model = task.model()
        if engine == "ddp":
            model = DistributedDataParallel(model)
        else:
            for layer in (model[0], model[2], model):
                fully_shard(layer, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        opt = task.optimizer(model.parameters())

        def state():
            return dict(zip(("model", "optimizer"), get_state_dict(model, opt), strict=True))

        if resume:
            loaded = state()
            dcp.load(loaded, checkpoint_id=f"{place}/{stop - 1}")
            set_state_dict(
                model,
                opt,
                model_state_dict=loaded["model"],
                optim_state_dict=loaded["optimizer"],
            )
        losses, evaluated, live = [], [], []
        for epoch in range(int(resume), stop):
            for batch in task.batches():
                opt.zero_grad()
                mine = [x[dist.get_rank() :: dist.get_world_size()] for x in batch]
                loss = task.loss(model, mine)
                loss.backward()
                opt.step()
                dist.all_reduce(loss.detach())
                losses.append(loss.item() / dist.get_world_size())
            with torch.no_grad():
                live.append(task.loss(model, task.held_out).item())
                with opt.averaged():
                    evaluated.append(task.loss(model, task.held_out).item())
            dcp.save(state(), checkpoint_id=f"{place}/{epoch + 1}")
        saved = task.model()
        dcp.load({"model": saved.state_dict()}, checkpoint_id=f"{place}/{stop}")
        dist.barrier()
        return Driven(losses, evaluated, saved.parameters(), map(whole, model.parameters()), live)

    report = check_host(drive, KIT[kind], checkpoint="live", after="live")
    assert report.passed, str(report)
