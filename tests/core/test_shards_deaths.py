"""A rank that dies, in a step, an export or a save: the others end, the last checkpoint loads."""

import os
import re

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import Ranks
from sharding import BASES, advance, assert_equal, held, net, wrapped
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from paceline import PACE, Pullback, load_checkpoint, save_checkpoint, shards

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")

LAST = 2  # the rank that dies
LOST = r"(?i)connection (closed|reset)|broken pipe"  # gloo's word for it


@pytest.fixture
def mortals(tmp_path):
    (tmp_path / "ranks").mkdir()
    ranks = Ranks(LAST + 1, tmp_path / "ranks")
    yield ranks
    ranks.close()


def die(*_, **__):
    os._exit(1)


def error_of(call):
    """What a call ends with, where some other rank dies in it."""
    try:
        call()
    except (Exception, CheckpointException) as error:
        return f"{type(error).__name__}: {error}"
    return None


def mine(model, opt):
    """What this rank holds; the others need not be there."""
    with torch.no_grad():
        params = [shards.local(p).clone() for p in model.parameters()]
        states = [opt.state[p] for p in model.parameters()]
        return params, [{k: shards.local(x).clone() for k, x in s.items()} for s in states]


def made(engine, kind, **options):
    model = wrapped(net(), engine)
    if kind == "PACE":
        return model, PACE(model.parameters(), lr=0.05, pullback=2.0, **options)
    return model, Pullback(BASES[kind](model.parameters()), pullback=2.0, **options)


def states(model, opt):
    return dict(zip(("model", "optimizer"), get_state_dict(model, opt), strict=True))


def saved(folder, kind, **options):
    """Two steps and a checkpoint, and beside it what it holds."""
    model, opt = made("fsdp", kind, **options)
    advance(model, opt, "fsdp", 2)
    dcp.save(states(model, opt), checkpoint_id=folder / "2")
    torch.save(held(model, opt), folder / f"held by {dist.get_rank()}")
    return model, opt


def check_loads(folder, kind):
    """The last whole checkpoint does, on one process."""
    model, opt = made(None, kind)
    state = states(model, opt)
    dcp.load(state, checkpoint_id=folder / "2", no_dist=True)
    set_state_dict(model, opt, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    assert_equal(held(model, opt), torch.load(folder / "held by 0"))


def check_ended(said):
    """Of three ranks one has died, and the others say that it is gone."""
    assert said.pop(LAST) is None
    for error in said:
        assert error is not None
        assert re.search(LOST, error)


def dies_in_a_step(folder, kind, nonfinite):
    model, opt = saved(folder, kind, nonfinite=nonfinite)
    last = mine(model, opt)
    if dist.get_rank() == LAST:
        if nonfinite == "skip":  # the others are about to wait for it
            shards.on_any_rank = die
        else:
            opt.register_step_pre_hook(die)
    said = error_of(lambda: advance(model, opt, "fsdp", 2, first=2))
    if nonfinite == "skip":  # nothing was changed
        assert_equal(mine(model, opt), last)
    return said


@pytest.mark.filterwarnings("ignore:.*torch.distributed.*:UserWarning")
@pytest.mark.parametrize(
    ("kind", "nonfinite"), [("PACE", "guard"), ("PACE", "skip"), ("AdamW", "skip")]
)
def test_of_a_rank_that_dies_in_a_step(kind, nonfinite, mortals, tmp_path):
    check_ended(mortals(dies_in_a_step, tmp_path, kind, nonfinite, last=True))
    check_loads(tmp_path, kind)


def dies_in_an_export(folder):
    model, opt = saved(folder, "PACE", return_kappa=0.7)
    last = mine(model, opt)
    if dist.get_rank() == LAST:
        shards.full = die
    opt.eval("average")
    inside = mine(model, opt)
    said = error_of(lambda: opt.averaged_state_dict(model))  # another average, for a while
    assert_equal(mine(model, opt), inside)
    opt.train()
    assert_equal(mine(model, opt), last)
    return said


def test_of_a_rank_that_dies_in_an_export(mortals, tmp_path):
    check_ended(mortals(dies_in_an_export, tmp_path, last=True))


class Dying(dcp.FileSystemWriter):
    """Ends one rank's process when it has written its part."""

    def write_data(self, *args):
        found = super().write_data(*args)
        if dist.get_rank() == LAST:
            die()
        return found


def dies_in_a_save(folder):
    model, opt = saved(folder, "PACE")
    advance(model, opt, "fsdp", 1, first=2)
    state = states(model, opt)
    return error_of(lambda: dcp.save(state, storage_writer=Dying(folder / "3")))


@pytest.mark.filterwarnings("ignore:.*torch.distributed.*:UserWarning")
def test_of_a_rank_that_dies_in_a_save_of_shards(mortals, tmp_path):
    check_ended(mortals(dies_in_a_save, tmp_path, last=True))
    check_loads(tmp_path, "PACE")
    model, opt = made(None, "PACE")
    with pytest.raises(CheckpointException, match=r"No such file.*\.metadata"):
        dcp.load(states(model, opt), checkpoint_id=tmp_path / "3", no_dist=True)


def dies_in_save_checkpoint(path):
    """All ranks of DDP save on one path; one dies when it has written half of it."""
    model, opt = made("ddp", "PACE")
    advance(model, opt, "ddp", 1)
    save_checkpoint(path, model.module, opt, step=1)
    advance(model, opt, "ddp", 1, first=1)
    torch.save(held(model, opt), path.parent.parent / f"held by {dist.get_rank()}")
    dist.barrier()
    if dist.get_rank() == LAST:
        save = torch.save

        def half(run, file):
            save(run["model"], file)
            die()

        torch.save = half
    save_checkpoint(path, model.module, opt, step=2)
    return error_of(lambda: advance(model, opt, "ddp", 1, first=2))


def test_of_a_rank_that_dies_in_save_checkpoint(mortals, tmp_path):
    path = tmp_path / "saves" / "run.pt"
    path.parent.mkdir()
    check_ended(mortals(dies_in_save_checkpoint, path, last=True))
    model, opt = made(None, "PACE")
    assert load_checkpoint(path, model, opt) == {"step": 2}
    assert_equal(held(model, opt), torch.load(tmp_path / "held by 0"))
    save_checkpoint(path, model, opt, step=3)
    assert [file.name for file in path.parent.iterdir()] == ["run.pt"]  # no part is left
