"""DeepSpeed: the average reaches the model, files and exports at ZeRO stages 1, 2 and 3."""

import os

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("deepspeed")

from sharding import net

from paceline import PACE, Pullback
from paceline.testing.hosts import Driven, check_host

KINDS = {
    "pace": lambda params: PACE(params, lr=0.05, pullback=0.3),
    "returns": lambda params: PACE(params, lr=0.05, pullback=0.3, return_kappa=0.9),
    "bfloat16 state": lambda params: PACE(
        params, lr=0.05, pullback=0.3, state_dtype=torch.bfloat16
    ),
    "pullback": lambda params: Pullback(torch.optim.SGD(params, lr=0.05), pullback=0.1),
}
KAPPA = {"returns": 0.9}  # of the average that is returned; else 0.5


@pytest.fixture(scope="module")
def ranks(ranks_of_deepspeed):
    """Processes of their own, because DeepSpeed is imported."""
    return ranks_of_deepspeed


def started(stage, kind="pace", *, bf16=True, task=None, offload=()):
    """A real engine on the CPU, and the optimizer in it."""
    import deepspeed

    place = {"RANK": dist.get_rank(), "LOCAL_RANK": dist.get_rank(), "WORLD_SIZE": 2}
    os.environ |= {name: str(x) for name, x in place.items()} | {"DS_ACCELERATOR": "cpu"}
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo; it would be compiled
    model = task.model() if task else net()
    opt = (task.optimizer if task else KINDS[kind])(list(model.parameters()))
    config = {
        "train_micro_batch_size_per_gpu": 4 if task else 8,
        # At stage 3 biases stay whole, and matrices are in parts.
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 8},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": bf16},
        "gradient_clipping": 0.0 if task else 1.0,  # 1.0 is DeepSpeed's default
    }
    config["zero_optimization"] |= {f"offload_{what}": {"device": "cpu"} for what in offload}
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=opt, config=config, dist_init_required=False
    )
    return engine, opt


def step(engine, t):
    generator = torch.Generator().manual_seed(100 + t)
    x = torch.randn(16, 6, generator=generator).view(2, 8, 6)[dist.get_rank()]
    x = x.to(next(engine.module.parameters()).dtype)
    loss = (engine(x) - x[:, :1]).square().mean()
    engine.backward(loss)
    engine.step()
    return loss.item()


def masters(engine):
    """The whole float32 weights, as DeepSpeed's own accessor gives them."""
    from deepspeed.utils import safe_get_full_fp32_param

    return [safe_get_full_fp32_param(p).double() for p in engine.module.parameters()]


def watched(engine, kind, steps):
    """Train, and compute the returned average by its formula from the float32 weights."""
    average = masters(engine)
    for t in range(1, steps + 1):
        step(engine, t)
        beta = (1 + t) ** -KAPPA.get(kind, 0.5)
        average = [a + beta * (x - a) for a, x in zip(average, masters(engine), strict=True)]
    return average


def held(engine):
    """The model's own weights, whole."""
    from deepspeed import zero

    params = list(engine.module.parameters())
    with zero.GatheredParameters(params):
        return [p.detach().clone() for p in params]


def fill_padding(engine):
    """Partitions end in memory that DeepSpeed has not written: anything may be there."""
    if engine.zero_optimization_stage() < 3:
        return
    rank, (group,), (flat,) = (
        dist.get_rank(),
        engine.optimizer.fp16_groups,
        engine.optimizer.fp32_partitioned_groups_flat,
    )
    end = filled = 0
    for p in group:
        end += p.partition_numel()
        padding = max(0, (rank + 1) * p.partition_numel() - p.ds_numel)
        flat.data[end - padding : end] = float("nan")
        filled += padding
    assert end == flat.numel()
    assert filled or rank == 0


def averages_in_the_model(stage, kind, bf16):
    from paceline.integrations.deepspeed import attach, averaged_state_dict

    engine, opt = started(stage, kind, bf16=bf16)
    fill_padding(engine)
    attach(engine)
    average = watched(engine, kind, 5)
    exported = averaged_state_dict(engine)
    live = held(engine)
    names = [name for name, _ in engine.module.named_parameters()]
    close = {"rtol": 2e-3, "atol": 2e-3} if kind == "bfloat16 state" else {}
    with opt.averaged():
        assert opt.swapped
        averaged = held(engine)
    for name, now, x, y, a in zip(names, held(engine), live, averaged, average, strict=True):
        assert torch.equal(now, x)
        assert not torch.equal(x, y)
        if dist.get_rank() == 0:
            whole = exported[name]
            torch.testing.assert_close(whole, a.float(), **close)
            assert torch.equal(whole.to(y.dtype), y) or kind == "bfloat16 state"
        else:
            assert not exported
        rough = {"rtol": 1e-2, "atol": 2e-3} if bf16 else {}
        torch.testing.assert_close(y.double(), a, **(close | rough))
    other, _ = started(stage, kind, bf16=bf16)  # which nobody looks into
    losses = [step(other, t) for t in range(1, 8)]
    assert [step(engine, t) for t in (6, 7)] == losses[5:]


@pytest.mark.parametrize(
    ("stage", "kind", "bf16"),
    [
        *((1, kind, True) for kind in KINDS),
        (2, "returns", True),
        *((3, kind, True) for kind in KINDS),
        (3, "pace", False),
    ],
)
def test_the_average_reaches_the_model_and_goes_without_a_trace(stage, kind, bf16, ranks):
    ranks(averages_in_the_model, stage, kind, bf16)


def by_the_kit(stage, kind):
    """The row of docs/hosts.md in float32; both ranks train on the same batches."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    from paceline.integrations.deepspeed import attach

    def drive(task, folder, stop, resume):
        shared = [str(folder)]  # rank 0's, for both
        dist.broadcast_object_list(shared)
        engine, opt = started(stage, bf16=False, task=task)
        attach(engine)
        if resume:
            engine.load_checkpoint(shared[0], tag=f"{stop - 1}")
            opt.train()
        losses, evaluated, live = [], [], []
        for epoch in range(int(resume), stop):
            for batch in task.batches():
                loss = task.loss(engine, batch)
                engine.backward(loss)
                engine.step()
                losses.append(loss.item())
            with torch.no_grad():
                live.append(task.loss(engine, task.held_out).item())
                with opt.averaged():
                    evaluated.append(task.loss(engine, task.held_out).item())
                    engine.save_checkpoint(shared[0], tag=f"{epoch + 1}")
        saved = task.model()
        saved.load_state_dict(get_fp32_state_dict_from_zero_checkpoint(shared[0], f"{stop}"))
        if stage < 3:
            file = f"{shared[0]}/{stop}/mp_rank_00_model_states.pt"
            same = torch.load(file, weights_only=False)["module"]
            assert all(torch.equal(x, same[name]) for name, x in saved.state_dict().items())
        dist.barrier()
        return Driven(losses, evaluated, saved.parameters(), held(engine), live)

    report = check_host(drive, KINDS[kind], after="live")
    assert report.passed, str(report)


@pytest.mark.parametrize("kind", ["pace", "pullback"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_engine_passes_the_conformance_kit(stage, kind, ranks):
    ranks(by_the_kit, stage, kind)


def resumed(stage, kind, folder):
    from paceline.integrations.deepspeed import attach, averaged_state_dict

    whole, _ = started(stage, kind)
    losses = [step(whole, t) for t in range(1, 8)]
    engine, opt = started(stage, kind)
    fill_padding(engine)
    attach(engine)
    for t in range(1, 5):
        step(engine, t)
    exported = averaged_state_dict(engine)
    with opt.averaged():
        engine.save_checkpoint(folder, tag="four")
    again, opt = started(stage, kind)
    attach(again)
    step(again, 99)  # so that what is loaded is seen
    again.load_checkpoint(folder, tag="four")
    for (key, _), x in zip(again.module.named_parameters(), held(again), strict=True):
        if dist.get_rank() == 0 and kind != "bfloat16 state":
            assert torch.equal(x, exported[key].to(x.dtype))
    assert opt.swapped
    opt.train()
    assert [step(again, t) for t in range(5, 8)] == losses[4:]
    for x, y in zip(masters(again), masters(whole), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(
    ("stage", "kind"),
    [*((stage, kind) for stage in (1, 3) for kind in KINDS), (2, "pace"), (2, "pullback")],
)
def test_a_checkpoint_holds_the_average_and_resumes_bit_for_bit(stage, kind, ranks, tmp_path):
    ranks(resumed, stage, kind, str(tmp_path))


def refused(stage):
    from paceline.integrations.deepspeed import attach, averaged_state_dict

    engine, opt = started(stage)
    with pytest.raises(RuntimeError, match="needs averages; call it after"):
        averaged_state_dict(engine)
    step(engine, 1)
    before = [*masters(engine), *held(engine)]
    exported = averaged_state_dict(engine)
    assert bool(exported) == (dist.get_rank() == 0)
    for method in (opt.eval, lambda: opt.choose(lambda: 0.0), lambda: opt.averaged().__enter__()):
        with pytest.raises(RuntimeError, match="flat copies.*deepspeed.attach"):
            method()
    assert not opt.swapped
    after = [*masters(engine), *held(engine)]
    assert all(map(torch.equal, before, after))
    attach(engine)
    with pytest.raises(ValueError, match="name must be one of average, got 'slow'"):
        averaged_state_dict(engine, "slow")
    with opt.averaged(), pytest.raises(RuntimeError, match="needs the live weights"):
        averaged_state_dict(engine)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_without_attach_an_average_is_refused(stage, ranks):
    ranks(refused, stage)


def other_optimizers():
    import deepspeed

    from paceline.integrations.deepspeed import attach, averaged_state_dict

    KINDS["adamw"] = lambda params: torch.optim.AdamW(params, lr=0.05)
    engine, _ = started(1, "adamw")
    for function in (attach, averaged_state_dict):
        with pytest.raises(ValueError, match="must step PACE or Pullback, got AdamW"):
            function(engine)
    KINDS["auto"] = lambda params: PACE(params, lr=0.05, pullback="auto")
    with pytest.warns(UserWarning, match="experimental"):
        engine, _ = started(1, "auto")
    with pytest.raises(ValueError, match="pullback='auto' does not go with ZeRO"):
        attach(engine)
    engine, opt = started(0, bf16=False)
    assert isinstance(engine, deepspeed.DeepSpeedEngine)
    attach(engine)
    step(engine, 1)
    live = held(engine)
    with opt.averaged():  # stage 0 in float32 steps the model's own weights
        assert not all(map(torch.equal, held(engine), live))
    for stage, what in ((1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "param")):
        engine, _ = started(stage, offload=[what])
        with pytest.raises(ValueError, match=f"ZeRO without offloading, got stage {stage}"):
            attach(engine)


def test_other_optimizers_and_stages_are_refused_by_name(ranks):
    ranks(other_optimizers)


def test_flat_parameters_of_a_plain_loop_are_served():
    """DeepSpeed is imported; the optimizer's parameters are not its copies."""
    p = torch.nn.Parameter(torch.ones(4))
    opt = PACE([p], lr=0.1, pullback=0.1)
    p.sum().backward()
    opt.step()
    with opt.averaged():
        pass
