"""Optimizers inside of trainers' wrappers, and engines that keep the weights elsewhere."""

import os

import pytest
import torch
import torch.distributed as dist
from problems import advance, assert_same, problem, snapshot
from pytorch_optimizer import Lookahead, ScheduleFreeWrapper
from sharding import net
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from paceline import PACE, Pullback, load_checkpoint, save_checkpoint
from paceline.hosts import check_reach, is_swapped, restoring, swapping, unwrapped


@pytest.fixture(scope="module")
def ranks(ranks_of_deepspeed):
    """Processes of their own, because DeepSpeed is imported."""
    return ranks_of_deepspeed


def accelerated(opt):
    accelerate = pytest.importorskip("accelerate")
    accelerate.Accelerator(cpu=True)
    return accelerate.optimizer.AcceleratedOptimizer(opt)


def twice_accelerated(opt):
    return accelerated(accelerated(opt))


def imitating(opt):
    """As Lightning and Fabric make theirs: one that steps, of the class of what is in it."""

    class Imitating:
        def __init__(self, opt):
            self._optimizer = opt
            self.__class__ = type("Imitating", (Imitating, type(opt)), {})

        @property
        def optimizer(self):
            return self._optimizer

        def step(self):
            self.optimizer.step()

        def __getattr__(self, name):
            return getattr(self._optimizer, name)

    return Imitating(opt)


def lightnings(opt):
    return pytest.importorskip("lightning.pytorch.core.optimizer").LightningOptimizer(opt)


def fabrics(opt):
    fabric = pytest.importorskip("lightning.fabric")
    return fabric.Fabric(accelerator="cpu").setup_optimizers(opt)


WRAPPERS = {
    "accelerate": accelerated,
    "accelerate twice": twice_accelerated,
    "imitating": imitating,
    "lightning": lightnings,
    "fabric": fabrics,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_every_wrapper_leads_to_the_optimizer(wrapper):
    for make in (
        lambda: PACE([nn.Parameter(torch.ones(2))], pullback=0.1),
        lambda: Pullback(torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)),
        lambda: ScheduleFreeWrapper(torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)),
        lambda: Lookahead(torch.optim.AdamW([nn.Parameter(torch.ones(2))])),
        lambda: torch.optim.AdamW([nn.Parameter(torch.ones(2))]),
    ):
        opt = make()
        wrapped = WRAPPERS[wrapper](opt)
        assert wrapped is not opt
        assert unwrapped(wrapped) is opt
        swaps = not isinstance(opt, Lookahead | torch.optim.AdamW)
        assert swapping(wrapped) is (opt if swaps else None)
    assert unwrapped(None) is None


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_checkpoint_has_live_weights_whatever_is_around_the_optimizer(wrapper, tmp_path):
    model, generator = problem()
    opt = PACE(model.parameters(), lr=0.05, pullback=0.3)
    advance(model, opt, generator, 3)
    live = snapshot(model, opt)
    opt.eval()
    swapped = snapshot(model, opt)
    wrapped = WRAPPERS[wrapper](opt)
    save_checkpoint(tmp_path / "run.pt", model, wrapped)
    assert_same(snapshot(model, opt), swapped)
    assert opt.swapped
    other, _ = problem(seed=1)
    resumed = PACE(other.parameters(), lr=0.05, pullback=0.3)
    load_checkpoint(tmp_path / "run.pt", other, WRAPPERS[wrapper](resumed))
    assert_same(snapshot(other, resumed), live)
    assert not resumed.swapped


@pytest.mark.parametrize("swapped", [False, True])
def test_a_checkpoint_knows_schedule_frees_mode(swapped, tmp_path):
    model, generator = problem()
    opt = ScheduleFreeWrapper(torch.optim.SGD(model.parameters(), lr=0.1))
    opt.train()
    advance(model, opt, generator, 3)
    live = snapshot(model, opt)[0]
    if swapped:
        opt.eval()
    save_checkpoint(tmp_path / "run.pt", model, opt)
    assert is_swapped(opt) == swapped
    saved = torch.load(tmp_path / "run.pt")["model"]
    for x, name in zip(live, saved, strict=True):
        torch.testing.assert_close(saved[name], x, atol=1e-6, rtol=1e-6)


def test_what_was_in_the_model_comes_back():
    model, generator = problem()
    opt = PACE(
        model.parameters(), lr=0.05, pullback=0.3, returns={"a": "uniform", "b": "ema:kappa=0.7"}
    )
    advance(model, opt, generator, 3)
    opt.eval("b")
    held = snapshot(model, opt)
    with restoring(opt):
        opt.train()
        assert not opt.swapped
    assert_same(snapshot(model, opt), held)


# ---- engines that keep the weights elsewhere ---------------------------------------------------


def test_a_model_of_other_parameters_is_refused(tmp_path):
    opt = PACE(nn.Linear(2, 2).parameters(), pullback=0.1)
    with pytest.raises(ValueError, match="must step parameters of the model, got other tensors"):
        save_checkpoint(tmp_path / "run.pt", nn.Linear(2, 2), opt)
    assert list(tmp_path.iterdir()) == []


def flattened(kind, original):
    """FSDP1, before the optimizer is made and after."""

    def made(params):
        if kind == "pace":
            return PACE(params, lr=0.1, pullback=0.1)
        return Pullback(torch.optim.SGD(params, lr=0.1))

    cpu = torch.device("cpu")
    model = FullyShardedDataParallel(net(), device_id=cpu, use_orig_params=original)
    with pytest.raises(ValueError, match="flattened by FSDP1.*shard the model by FSDP2"):
        made(model.parameters())
    with pytest.raises(ValueError, match="flattened by FSDP1"):
        check_reach(torch.optim.SGD(model.parameters(), lr=0.1), model)
    with pytest.raises(ValueError, match="flattened by FSDP1"):
        save_checkpoint("run.pt", model, torch.optim.SGD(model.parameters(), lr=0.1))
    if original:
        model = net()
        opt = made(model.parameters())
        model = FullyShardedDataParallel(model, device_id=cpu, use_orig_params=True)
        model(torch.ones(2, 6)).sum().backward()
        before = [p.detach().clone() for p in model.parameters()]
        with pytest.raises(RuntimeError, match="flattened by FSDP1.*nothing was changed"):
            opt.step()
        assert not opt.state
        for p, x in zip(model.parameters(), before, strict=True):
            assert torch.equal(p, x)


@pytest.mark.filterwarnings("ignore:.*FSDP", "ignore:.*FullyShardedDataParallel")
@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("kind", ["pace", "pullback"])
def test_fsdp1_is_refused_before_anything_is_trained(kind, original, ranks):
    ranks(flattened, kind, original)


def partitioned(stage):
    """A real DeepSpeed engine."""
    import deepspeed

    place = {"RANK": dist.get_rank(), "LOCAL_RANK": dist.get_rank(), "WORLD_SIZE": 2}
    os.environ |= {name: str(x) for name, x in place.items()} | {"DS_ACCELERATOR": "cpu"}
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo; it would be compiled
    model = net()
    opt = PACE(model.parameters(), lr=0.1, pullback=0.1)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": True},
    }
    engine, wrapper, *_ = deepspeed.initialize(
        model=model, optimizer=opt, config=config, dist_init_required=False
    )
    engine.backward(engine(torch.ones(2, 6, dtype=torch.bfloat16)).sum())
    engine.step()
    assert unwrapped(wrapper) is opt
    assert opt.state
    for refused in (check_reach, lambda *x: save_checkpoint("run.pt", x[1], x[0])):
        with pytest.raises(ValueError, match="DeepSpeed's ZeRO makes such"):
            refused(wrapper, engine)
    with pytest.raises((RuntimeError, ValueError), match="flat copies|must hold parameters"):
        opt.averaged_state_dict(model)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeeds_copies_are_refused(stage, ranks):
    pytest.importorskip("deepspeed")
    ranks(partitioned, stage)
